"""Lines of a trace file, plain, gzip or xz, with every read bounded.

The file is untrusted: a line, the decompressed total and the decompressor's memory all have a limit, and
whatever is wrong ends as a `TraceError` that names file and line.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from penstock.core.errors import TraceError
from penstock.core.units import GIB, MIB, format_bytes

CHUNK_BYTES = MIB
LINE_BYTES_MAX = 8 * MIB  # a Mooncake row of a million-token prompt takes 20 KB
TRACE_BYTES_MAX = 64 * GIB  # after decompression; 10^8 rows are about 6 GiB
XZ_MEMORY_BYTES_MAX = 256 * MIB  # `xz -9` needs 65 MiB

_GZIP_MAGIC = b"\x1f\x8b"
_XZ_MAGIC = b"\xfd7zXZ\x00"


class Lines:
    """The text lines of one file, read once, in order. `number` is the line last handed out, from 1."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        """Yield lines without their end. Raises TraceError for anything unreadable."""
        tail = b""
        for chunk in self._chunks():
            pieces = (tail + chunk).split(b"\n")
            tail = pieces.pop()
            for piece in pieces:
                yield self._decode(piece)
            if len(tail) > LINE_BYTES_MAX:
                self.number += 1
                raise self.error(
                    None,
                    f"the line is longer than {format_bytes(LINE_BYTES_MAX)}",
                    "this does not look like a trace",
                )
        if tail:
            yield self._decode(tail)

    def error(self, field: str | None, problem: str, hint: str) -> TraceError:
        """An error that points at the current line; `field` names the column or key."""
        place = f"line {self.number}" + (f", field `{field}`" if field else "")
        return TraceError(f"`{self.name}` {place}: {problem}.", hint=hint, param=field)

    def _decode(self, raw: bytes) -> str:
        self.number += 1
        try:
            text = raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise self.error(None, "it is not UTF-8 text", "save the file as UTF-8, .gz or .xz") from None
        return text.removesuffix("\r")

    def _chunks(self) -> Iterator[bytes]:
        total_bytes = 0
        try:
            with self.path.open("rb") as file:
                for chunk in _decompressed(file):
                    total_bytes += len(chunk)
                    if total_bytes > TRACE_BYTES_MAX:
                        raise self.error(
                            None,
                            f"the trace unpacks to more than {format_bytes(TRACE_BYTES_MAX)}",
                            "split the file",
                        )
                    yield chunk
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as problem:
            raise self.error(
                None,
                f"the compressed file is truncated or damaged ({problem})",
                "copy or download the file again",
            ) from None
        except OSError as problem:
            raise TraceError(
                f"`{self.name}` cannot be read: {problem.strerror or problem}.",
                hint="name a file, or a bundled trace such as `sample:burstgpt1`",
            ) from None


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """Plain bytes in chunks of at most CHUNK_BYTES, by the file's magic number and not by its name."""
    magic = file.read(len(_XZ_MAGIC))
    file.seek(0)
    if magic.startswith(_GZIP_MAGIC):
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from iter(lambda: unpacked.read(CHUNK_BYTES), b"")
    elif magic == _XZ_MAGIC:
        yield from _unxz(file)
    else:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"")


def _unxz(file: BinaryIO) -> Iterator[bytes]:
    """`lzma.open` knows no memory limit, hence this loop over the streams of an xz file."""
    packed = file.read(CHUNK_BYTES)
    while packed:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES_MAX)
        while not decoder.eof:
            if decoder.needs_input and not packed:
                packed = file.read(CHUNK_BYTES)
                if not packed:
                    raise EOFError("the file ends inside the data")
            yield decoder.decompress(packed, CHUNK_BYTES)
            packed = b""
        packed = (decoder.unused_data or file.read(CHUNK_BYTES)).lstrip(b"\x00")  # streams may be padded
