"""Profile files: what ships is sound, and what is damaged is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.twin.costs.hardware import (
    PROFILES,
    PowerCurve,
    load_engine,
    load_hardware,
    parse_hardware,
    profile_names,
)
from penstock.twin.costs.profile_file import PROFILE_BYTES_MAX, parse_profile, toml_text

TEXT = (PROFILES / "h100-sxm.toml").read_text()


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_hardware(parse_profile(text.encode(), "hardware", "x.toml"))
    assert caught.value.hint
    return caught.value


def test_the_promised_profiles_ship() -> None:
    assert {"h100-sxm", "h200-sxm", "a100-80g", "l40s", "a10", "cpu-2core"} <= set(profile_names("hardware"))
    assert {"vllm-2024", "vllm-2025", "penstock-cpu"} <= set(profile_names("engine"))


@pytest.mark.parametrize("name", profile_names("hardware"))
def test_shipped_hardware_is_sound(name: str) -> None:
    profile = load_hardware(name)
    assert profile.name == name and profile.sources
    assert profile.power.idle_w < profile.power.max_w
    assert profile.prefill_attention.dtype in profile.gemm
    for fit in (*profile.gemm.values(), profile.decode_attention, profile.prefill_attention):
        # Either there are held-out points, or the source says that the value is assumed.
        assert fit.error.points > 50 or any("assumed" in text for text in profile.sources.values())
        assert 0 < fit.error.median <= fit.error.p90 < 1


@pytest.mark.parametrize("name", profile_names("engine"))
def test_shipped_engines_are_sound(name: str) -> None:
    assert load_engine(name).name == name


def test_peaks_are_dense_not_sparse() -> None:
    assert load_hardware("h100-sxm").flops("bfloat16") == pytest.approx(989.5e12)


def test_a_typo_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        load_hardware("h100-smx")
    assert "h100-sxm" in (caught.value.hint or "")
    with pytest.raises(ConfigError) as caught:
        load_engine("vllm-2023")
    assert "vllm-2024" in (caught.value.hint or "")


def test_a_path_works_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert load_hardware(str(path)) == load_hardware("h100-sxm")
    with pytest.raises(ConfigError, match="nowhere.toml"):
        load_hardware(str(tmp_path / "nowhere.toml"))
    path.write_bytes(b"#" * (PROFILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_hardware(str(path))


@pytest.mark.parametrize(
    "old, new, field",
    [
        ("[operators.decode_attention]", "[operators.decode_atention]", "operators.decode_attention"),
        ("[operators.prefill_attention]", "[operators.foo]", "operators.prefill_attention"),
        ("bandwidth_bytes_per_s = 33", "bandwidth_bytes_per_s = -33", "device.bandwidth_bytes_per_s"),
        ("idle_w = 70.0", "idle_w = nan", "power.idle_w"),
        ("max_w = 700.0", "max_w = inf", "power.max_w"),
        ("max_w = 700.0", "max_w = 7.0", "power.max_w"),
        ("compute_units = 132", "compute_units = 0", "device.compute_units"),
        ("compute_units = 132", "compute_units = true", "device.compute_units"),
        ("compute_units = 132", 'compute_units = "many"', "device.compute_units"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        ('kind = "hardware"', 'kind = "engine"', "kind"),
        ('status = "published"', 'status = "guessed"', "power.status"),
        ("[device]", "[device]\ncolour = 1", "device.colour"),
        ("[device]", "[extra]\na = 1\n[device]", "sources.extra"),
        ("[links.engine.2]", "[links.engine.two]", "links.engine.two"),
        ('device = "NVIDIA', 'devise = "NVIDIA', "sources.device"),
        ('dtype = "bfloat16"', 'dtype = "float16"', "peak_flops.float16"),
        ("bfloat16 = 98", "bfloat16 = 0.0\nfloat32 = 98", "peak_flops.bfloat16"),
    ],
)
def test_damage_is_named(old: str, new: str, field: str) -> None:
    assert old in TEXT
    error = refusal(TEXT.replace(old, new, 1))
    assert error.param == field
    assert field in error.message


def test_a_negative_fit_is_named() -> None:
    lines = TEXT.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("launch_s"))
    lines[index] = "launch_s = -1e-6"
    assert refusal("\n".join(lines)).param == "operators.gemm.bfloat16.launch_s"


def test_missing_operator_of_a_model_is_named() -> None:
    profile = load_hardware("a100-80g")
    with pytest.raises(ConfigError, match="float8"):
        profile.gemm_of("float8")
    with pytest.raises(ConfigError, match="64 devices"):
        profile.all_reduce("engine", 64)
    with pytest.raises(ConfigError, match="none-such"):
        profile.all_reduce("none-such", 2)


def test_not_toml_and_not_utf8() -> None:
    assert "not valid TOML" in refusal("= 3").message
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_profile(b"\xff\xfe", "hardware", "x.toml")


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_a_changed_letter_is_read_or_refused(position: int, letter: str) -> None:
    text = TEXT[:position] + letter + TEXT[position + 1 :]
    try:
        parse_hardware(parse_profile(text.encode(), "hardware", "x.toml"))
    except ConfigError as error:
        assert error.message and error.hint


names = st.text(min_size=1, max_size=12)
values = st.one_of(
    st.integers(-(1 << 60), 1 << 60), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)


@given(
    st.dictionaries(
        names,
        st.one_of(
            values, st.lists(st.floats(0, 1e9), max_size=5), st.dictionaries(names, values, max_size=3)
        ),
        max_size=5,
    )
)
def test_toml_is_read_back(drawn: dict[str, object]) -> None:
    whole = {**drawn, "schema_version": 1, "kind": "any"}
    root = parse_profile(toml_text(whole, "a comment\nof two lines").encode(), "any", "x.toml")
    assert {name: root._values[name] for name in whole} == whole


def test_power_rises_with_use_and_stops_at_the_limit() -> None:
    curve = PowerCurve(50.0, 400.0, 0.35, 2.5, "assumed")
    assert curve.watts(0.0, 0.0) == 50.0
    assert curve.watts(0.0, 1.0) == pytest.approx(50 + 350 * 0.35)
    assert curve.watts(1.0, 1.0) == 400.0
    assert curve.watts(1.0, 0.0, clock_frac=0.5) == pytest.approx(50 + 350 * 0.5**2.5)
