"""Recorded steps: read back, thinned, refused when damaged; and the drift of a profile from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.core import step_trace
from penstock.core.errors import TraceError
from penstock.core.step_trace import StepRecord, line_of
from penstock.gateway.drift import MEMORY_STEPS, StepDrift
from penstock.twin.costs.recorded import predictor_of, read_samples, read_steps, work_of
from penstock.twin.costs.tables import fit_steps

RECORDS = [
    StepRecord(
        prefills=((index % 7 + 1, 40 + index),) if index % 3 else (),
        decodes=index % 5 + 1,
        decode_context=100 + 3 * index,
        samples=index % 5 + 1,
        seconds=0.002 + 0.0001 * (index % 5) + 0.0002 * (index % 7 if index % 3 else 0),
        schedule_s=0.0001,
        ended_s=float(index),
    )
    for index in range(200)
]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "steps", step_trace.header(), *map(line_of, RECORDS))


def test_what_is_written_is_read(trace: Path) -> None:
    found = list(read_steps(trace))
    assert len(found) == len(RECORDS)
    for record, read in zip(RECORDS, found, strict=True):
        assert work_of(read) == work_of(record) and read.ended_s == record.ended_s
        assert read.total_s == pytest.approx(record.seconds + 0.0001, abs=1e-6)


def test_a_long_trace_is_thinned_evenly(trace: Path) -> None:
    works = [work for work, _ in read_samples(trace, steps_max=60)]
    assert works == [work_of(record) for record in RECORDS[::4]]


def test_a_fit_of_recorded_steps_predicts_them(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.toml"
    fit_steps(read_samples(trace)).save(profile)
    drift = StepDrift(predictor_of(profile))
    for record in RECORDS:
        drift.observe(record)
    assert drift.signed is not None and drift.absolute is not None
    assert abs(drift.signed) <= drift.absolute < 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decodes", -1),
        ("samples", "3"),
        ("seconds", 1e9),
        ("seconds", float("nan")),
        ("prefills", [[5, 4]]),
        ("prefills", [[1]]),
        ("prefills", 3),
        ("decode_context", True),
        ("ended_s", None),
    ],
)
def test_a_damaged_line_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    path = write(
        tmp_path / "bad", step_trace.header(), line_of(RECORDS[0]), line_of(RECORDS[1]) | {field: value}
    )
    with pytest.raises(TraceError, match=f"line 3, field `{field}`"):
        read_samples(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="penstock-step-trace"):
        read_samples(write(tmp_path / "bad", {"format": "penstock-journal", "version": 1}))


def test_drift_is_a_plain_mean_at_first_and_forgets_later() -> None:
    measured_s = iter([1.0, 2.0, 0.5])
    drift = StepDrift(lambda record: 1.0)
    assert drift.signed is drift.absolute is None
    for _ in range(3):
        drift.observe(StepRecord((), 1, 1, 1, next(measured_s)))
    assert drift.signed == pytest.approx((0.0 - 0.5 + 1.0) / 3)
    assert drift.absolute == pytest.approx((0.0 + 0.5 + 1.0) / 3)
    for _ in range(8 * MEMORY_STEPS):
        drift.observe(StepRecord((), 1, 1, 1, 1.25))
    assert drift.signed == pytest.approx(-0.2, abs=0.001)
    assert drift.absolute == pytest.approx(0.2, abs=0.001)


def test_a_step_that_took_no_time_is_left_out() -> None:
    drift = StepDrift(lambda record: 1.0)
    drift.observe(StepRecord((), 1, 1, 1, 0.0))
    assert drift.signed is None
