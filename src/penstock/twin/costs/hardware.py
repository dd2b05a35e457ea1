"""Hardware and engine profiles: what `profiles/*.toml` say, checked.

A hardware profile belongs to a device: peaks (dense, not sparse), memory, power, links, and the fitted
operators. An engine profile belongs to a serving engine's version: host time a step and a sequence that the
device waits for. Every section of a profile names its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeVar

from penstock.core.errors import ConfigError
from penstock.policies.registry import nearest
from penstock.twin.costs.operators import (
    CollectiveFit,
    DecodeAttentionFit,
    Device,
    FitError,
    GemmFit,
    PointwiseFit,
    PrefillAttentionFit,
)
from penstock.twin.costs.profile_file import Section, read_profile

PROFILES: Final = Path(__file__).parent.parent / "profiles"
_ROWS_MAX: Final = 1 << 30
_SECONDS_MAX: Final = 60.0  # no launch, latency or step overhead takes longer
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class PowerCurve:
    """Watts of one device from how busy its arithmetic and its memory are (card polca):

    idle + (max − idle) · (u_c · f^exponent + memory_share · u_m), at most max; f is the clock as a fraction.
    `status` says how the figures are known: `measured`, `published` or `assumed`.
    """

    idle_w: float
    max_w: float
    memory_share: float
    exponent: float
    status: str

    def watts(self, compute_frac: float, memory_frac: float, clock_frac: float = 1.0) -> float:
        """Both utilisations as fractions of the device's peaks."""
        share = compute_frac * clock_frac**self.exponent + self.memory_share * memory_frac
        return float(min(self.max_w, self.idle_w + (self.max_w - self.idle_w) * share))


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One device and its links. Rates per second; `links` are collectives: method → devices → fit."""

    name: str
    description: str
    memory_bytes: float
    bandwidth: float
    units: int
    peak_flops: dict[str, float]
    power: PowerCurve
    gemm: dict[str, GemmFit]
    decode_attention: DecodeAttentionFit
    prefill_attention: PrefillAttentionFit
    pointwise: PointwiseFit
    links: dict[str, dict[int, CollectiveFit]]
    sources: dict[str, str]

    def device(self, dtype: str) -> Device:
        return Device(self.flops(dtype), self.bandwidth, self.units)

    def flops(self, dtype: str) -> float:
        return self._known(self.peak_flops, dtype, "peak_flops")

    def gemm_of(self, dtype: str) -> GemmFit:
        return self._known(self.gemm, dtype, "operators.gemm")

    def all_reduce(self, method: str, devices: int) -> CollectiveFit:
        """Raises ConfigError where this profile has no link of that method and width."""
        widths = self._known(self.links, method, "links")
        if devices not in widths:
            known = ", ".join(str(width) for width in sorted(widths)) or "no"
            raise ConfigError(
                f"Hardware `{self.name}` has no `{method}` all-reduce over {devices} devices.",
                hint=f"Its profile covers {known} devices.",
                param=f"links.{method}.{devices}",
            )
        return widths[devices]

    def _known(self, values: dict[str, _Value], key: str, field: str) -> _Value:
        if key not in values:
            raise ConfigError(
                f"Hardware `{self.name}` has no `{field}.{key}`.",
                hint=f"Its profile has {', '.join(sorted(values)) or 'none'}.",
                param=f"{field}.{key}",
            )
        return values[key]


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Time that one engine version adds to a step while the device waits.

    `step_s` a step, `sequence_s` a running sequence, `kernel_s` a kernel (0 where a graph is replayed).
    `sample_passes` are trips of a row's float32 logits through memory. `all_reduce` names the links of the
    hardware profile that it uses. `error_frac` is of a whole step. `request_s` passes between a request's
    arrival and its first step on an idle engine, beyond that step: HTTP, tokenising, hand-over.
    """

    name: str
    description: str
    step_s: float
    sequence_s: float
    kernel_s: float
    sample_passes: float
    request_s: float
    all_reduce: str
    error_frac: float
    sources: dict[str, str]


def load_hardware(name_or_path: str) -> HardwareProfile:
    """A shipped profile by name, or a file by path. Raises ConfigError, with the nearest names on a typo."""
    return parse_hardware(read_profile(_find(name_or_path, "hardware"), "hardware"))


def load_engine(name_or_path: str) -> EngineProfile:
    """As `load_hardware`, for engine profiles."""
    return parse_engine(read_profile(_find(name_or_path, "engine"), "engine"))


def profile_names(kind: str) -> list[str]:
    """Shipped profiles: engine profiles carry the prefix `engine-` in their file names."""
    stems = [path.stem for path in PROFILES.glob("*.toml")]
    if kind == "engine":
        return sorted(stem.removeprefix("engine-") for stem in stems if stem.startswith("engine-"))
    return sorted(stem for stem in stems if not stem.startswith("engine-"))


def _find(name_or_path: str, kind: str) -> Path:
    known = profile_names(kind)
    if name_or_path in known:
        prefix = "engine-" if kind == "engine" else ""
        return PROFILES / f"{prefix}{name_or_path}.toml"
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return Path(name_or_path)
    raise ConfigError(
        f"`{name_or_path}` is not a known {kind} profile.",
        hint=f"{nearest(name_or_path, known)} A path to a `.toml` profile works too.",
        param=f"twin.{kind}",
    )


def parse_hardware(root: Section) -> HardwareProfile:
    """Raises ConfigError naming the field. Pure."""
    device, operators = root.section("device"), root.section("operators")
    profile = HardwareProfile(
        name=root.text("name"),
        description=root.text("description"),
        memory_bytes=device.positive("memory_bytes"),
        bandwidth=device.positive("bandwidth_bytes_per_s"),
        units=device.integer("compute_units", 1, 1 << 20),
        peak_flops=_peaks(root.section("peak_flops")),
        power=parse_power(root.section("power")),
        gemm={dtype: _gemm(section) for dtype, section in operators.sections("gemm").items()},
        decode_attention=_decode_attention(operators.section("decode_attention")),
        prefill_attention=_prefill_attention(operators.section("prefill_attention")),
        pointwise=_pointwise(operators.section("pointwise")),
        links={method: _widths(section) for method, section in root.sections("links").items()},
        sources=_sources(root),
    )
    for section in (root, device, operators):
        section.done()
    if profile.prefill_attention.dtype not in profile.peak_flops:
        root.section("peak_flops").refuse(
            profile.prefill_attention.dtype, "is missing, but attention uses it"
        )
    if not profile.gemm:
        operators.refuse("gemm", "holds no fit, but a profile needs one matrix product at least")
    return profile


def parse_engine(root: Section) -> EngineProfile:
    """Raises ConfigError naming the field. Pure."""
    overhead = root.section("overhead")
    profile = EngineProfile(
        name=root.text("name"),
        description=root.text("description"),
        step_s=overhead.number("step_s", 0.0, _SECONDS_MAX),
        sequence_s=overhead.number("sequence_s", 0.0, _SECONDS_MAX),
        kernel_s=overhead.number("kernel_s", 0.0, _SECONDS_MAX),
        sample_passes=overhead.number("sample_passes", 0.0, 1000.0),
        request_s=overhead.number("request_s", 0.0, _SECONDS_MAX),
        all_reduce=overhead.text("all_reduce"),
        error_frac=overhead.number("error_frac", 0.0, 10.0),
        sources=_sources(root),
    )
    for section in (root, overhead):
        section.done()
    return profile


def _checked(section: Section, value: _Value) -> _Value:
    section.done()
    return value


def _peaks(section: Section) -> dict[str, float]:
    peaks = {dtype: section.positive(dtype) for dtype in section.names()}
    return _checked(section, peaks)


def parse_power(section: Section) -> PowerCurve:
    idle_w = section.number("idle_w", 0.0, 1e6)
    curve = PowerCurve(
        idle_w=idle_w,
        max_w=section.number("max_w", idle_w, 1e6),
        memory_share=section.number("memory_share", 0.0, 1.0),
        exponent=section.number("exponent", 0.0, 10.0),
        status=section.text("status"),
    )
    if curve.status not in ("measured", "published", "assumed"):
        section.refuse("status", "must be `measured`, `published` or `assumed`")
    return _checked(section, curve)


def parse_error(section: Section) -> FitError:
    return FitError(
        median=section.number("median_error_frac", 0.0, 10.0),
        p90=section.number("p90_error_frac", 0.0, 10.0),
        points=section.integer("points", 0, _ROWS_MAX),
    )


def _gemm(section: Section) -> GemmFit:
    fit = GemmFit(
        launch_s=section.number("launch_s", 0.0, _SECONDS_MAX),
        compute_eff=section.positive("compute_eff", 1.5),
        memory_eff=section.positive("memory_eff", 1.5),
        sharpness=section.number("sharpness", 1.0, 100.0),
        wave_waste=section.number("wave_waste", 0.0, 1.0),
        input_passes=section.number("input_passes", 0.0, 100.0),
        rows_max=section.integer("rows_max", 1, _ROWS_MAX),
        error=parse_error(section),
    )
    return _checked(section, fit)


def _decode_attention(section: Section) -> DecodeAttentionFit:
    fit = DecodeAttentionFit(
        launch_s=section.number("launch_s", 0.0, _SECONDS_MAX),
        kv_head_s=section.number("kv_head_s", 0.0, _SECONDS_MAX),
        head_s=section.number("head_s", 0.0, _SECONDS_MAX),
        memory_eff=section.positive("memory_eff", 1.5),
        stream_bytes_per_s=section.positive("stream_bytes_per_s"),
        splits=section.number("splits", 1.0, 1e6),
        sequences_max=section.integer("sequences_max", 1, _ROWS_MAX),
        context_max=section.integer("context_max", 1, _ROWS_MAX),
        error=parse_error(section),
    )
    return _checked(section, fit)


def _prefill_attention(section: Section) -> PrefillAttentionFit:
    fit = PrefillAttentionFit(
        dtype=section.text("dtype"),
        launch_s=section.number("launch_s", 0.0, _SECONDS_MAX),
        compute_eff=section.positive("compute_eff", 1.5),
        head_row_s=section.number("head_row_s", 0.0, _SECONDS_MAX),
        kv_row_s=section.number("kv_row_s", 0.0, _SECONDS_MAX),
        kv_head_s=section.number("kv_head_s", 0.0, _SECONDS_MAX),
        chunk_max=section.integer("chunk_max", 1, _ROWS_MAX),
        error=parse_error(section),
    )
    return _checked(section, fit)


def _pointwise(section: Section) -> PointwiseFit:
    launch_s = section.number("launch_s", 0.0, _SECONDS_MAX)
    fit = PointwiseFit(launch_s, section.positive("memory_eff", 1.5), parse_error(section))
    return _checked(section, fit)


def _collective(section: Section) -> CollectiveFit:
    fit = CollectiveFit(
        starts_bytes=tuple(section.numbers("starts_bytes")),
        latency_s=tuple(section.numbers("latency_s")),
        bytes_per_s=tuple(section.numbers("bytes_per_s")),
        error=parse_error(section),
    )
    starts, count = fit.starts_bytes, len(fit.starts_bytes)
    if not starts or starts[0] != 0.0 or any(low >= high for low, high in pairwise(starts)):
        section.refuse("starts_bytes", "must ascend from 0")
    if not count == len(fit.latency_s) == len(fit.bytes_per_s):
        section.refuse("latency_s", f"and `bytes_per_s` must have {count} values, one a start")
    if not all(fit.bytes_per_s) or not all(fit.latency_s):
        section.refuse("bytes_per_s", "and `latency_s` must be positive")
    return _checked(section, fit)


def _widths(section: Section) -> dict[int, CollectiveFit]:
    widths: dict[int, CollectiveFit] = {}
    for name in section.names():
        if not (name.isascii() and name.isdecimal() and len(name) <= 6):
            section.refuse(name, "must be a number of devices")
        widths[int(name)] = _collective(section.section(name))
    return widths


def _sources(root: Section) -> dict[str, str]:
    """Section → where its numbers come from. Every section with numbers needs a source of its own."""
    section = root.section("sources")
    sources = {name: section.text(name) for name in section.names()}
    for path in root.section_paths():
        if path != section.path and not any(path == name or path.startswith(f"{name}.") for name in sources):
            section.refuse(path, "is missing: every section names where its numbers come from")
    return sources
