"""Multipart forms: any cut into pieces reads the same, and nothing that is no form is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.gateway.batches.multipart import MultipartReader, PartBegin, PartEnd, boundary_of

BOUNDARY = b"--mark"
Parts = list[tuple[str, str | None, bytes]]


def encoded(parts: Parts) -> bytes:
    body = b""
    for name, filename, data in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        head = f'Content-Disposition: form-data; name="{name}"{file}\r\nContent-Type: text/plain'
        body += b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"
    return body + b"--" + BOUNDARY + b"--\r\n"


def read(pieces: list[bytes]) -> Parts:
    reader, parts = MultipartReader(BOUNDARY), []
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, PartBegin):
                parts.append((event.name, event.filename, b""))
            elif isinstance(event, bytes):
                name, filename, data = parts.pop()
                parts.append((name, filename, data + event))
            else:
                assert isinstance(event, PartEnd)
    reader.close()
    return parts


names = st.text(st.sampled_from("abc_-9"), min_size=1, max_size=8)
# Bodies made of what boundaries are made of, so that half of one is common.
bodies = st.lists(
    st.sampled_from([b"\r\n", b"--", BOUNDARY[:-1], b"\r", b"x", b"\r\n--" + BOUNDARY[:-2], b"\x00\xff"]),
    max_size=12,
).map(b"".join)
parts_of_form = st.lists(st.tuples(names, st.none() | names, bodies), max_size=5)


@given(parts_of_form, st.data())
@settings(max_examples=300, deadline=None)
def test_a_form_reads_the_same_however_it_is_cut(parts: Parts, data: st.DataObject) -> None:
    whole = encoded(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    edges = [0, *cuts, len(whole)]
    pieces = [whole[first:last] for first, last in zip(edges, edges[1:], strict=False)]
    assert read(pieces) == parts
    assert read([bytes([byte]) for byte in whole]) == parts


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_or_read_but_never_breaks(noise: bytes, cuts: list[int]) -> None:
    for start in (b"", b"--" + BOUNDARY + b"\r\n"):
        edges = [0, *sorted(cuts), 1 << 20]
        whole = start + noise
        try:
            read([whole[first:last] for first, last in zip(edges, edges[1:], strict=False)])
        except InvalidRequest as error:
            assert error.hint


def test_a_preamble_and_an_epilogue_are_skipped() -> None:
    parts: Parts = [("a", None, b"1")]
    assert read([b"hello\r\n" + encoded(parts) + b"\r\nbye --" + BOUNDARY]) == parts


def test_no_memory_is_taken_for_what_is_held_back() -> None:
    reader = MultipartReader(BOUNDARY)
    list(reader.feed(encoded([("file", "f", b"")])[:-14]))
    for _ in range(50):
        assert sum(len(event) for event in reader.feed(b"x" * 100_000) if isinstance(event, bytes)) > 99_000
        assert len(reader._buffer) < 100


@pytest.mark.parametrize(
    "start",
    [
        b"--" + BOUNDARY + b"\r\n" + b"x" * 20_000,
        b"--" + BOUNDARY + b" " * 500,
        b"--" + BOUNDARY + b"\r\n\r\ndata",
        b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data\r\n\r\n",
        (b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n') * 50,
    ],
)
def test_what_is_too_large_or_without_a_name_is_refused(start: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read([start])


def test_a_form_that_stops_early_is_refused() -> None:
    whole = encoded([("a", None, b"1")])
    for end in range(len(whole) - 4):
        with pytest.raises(InvalidRequest):
            read([whole[:end]])


@pytest.mark.parametrize(
    "declared", ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 71]
)
def test_a_boundary_is_needed(declared: str) -> None:
    with pytest.raises(InvalidRequest):
        boundary_of(declared)
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
