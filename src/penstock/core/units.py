"""Integer arithmetic that says how it rounds, and text for humans."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer >= numerator / denominator, for non-negative numerators."""
    return -(-numerator // denominator)


def format_bytes(count_bytes: float) -> str:
    """`1.5 GiB`; binary units because memory comes in them."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count_bytes) >= size:
            return f"{count_bytes / size:.1f} {unit}"
    return f"{count_bytes:.0f} B"


def parse_bytes(text: str) -> int:
    """`512MiB`, `2 GiB`, `1.5g` or a plain count of bytes. Raises ValueError with the accepted forms."""
    cleaned = text.strip().lower().replace(" ", "")
    for suffixes, size in ((("gib", "gb", "g"), GIB), (("mib", "mb", "m"), MIB), (("kib", "kb", "k"), KIB)):
        for suffix in suffixes:
            if cleaned.endswith(suffix):
                return _positive_bytes(cleaned[: -len(suffix)], size, text)
    return _positive_bytes(cleaned.removesuffix("b"), 1, text)


def _positive_bytes(number: str, size: int, text: str) -> int:
    try:
        value = float(number) * size
    except ValueError:
        value = 0.0
    if not 1 <= value < 1 << 60:
        raise ValueError(f"`{text}` is not a size; write for example `512MiB` or `2GiB`")
    return int(value)
