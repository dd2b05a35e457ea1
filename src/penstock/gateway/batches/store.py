"""Files and batches on disk. Everything here survives a restart; a torn write never counts.

    FOLDER/lock                      held by the one server that uses the folder
    FOLDER/files/ID.json, ID.data    a file's record, and its bytes
    FOLDER/batches/ID.json           a batch's record
    FOLDER/batches/ID.output         lines of finished requests, while it runs; a file afterwards
    FOLDER/batches/ID.errors         lines of failed ones

A record is written whole beside its place and moved there. One event loop owns the store.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import orjson
from filelock import FileLock, Timeout

from penstock.core.errors import (
    EnvironmentMissing,
    InvalidRequest,
    ObjectNotFound,
    PayloadTooLarge,
    PenstockError,
    RateLimitExceeded,
)
from penstock.core.settings import BatchSettings
from penstock.core.units import format_bytes
from penstock.gateway.batches.records import (
    BATCH_PREFIX,
    FILE_PREFIX,
    BatchRecord,
    FileRecord,
    Purpose,
    Record,
    restored,
    stored,
)

logger = logging.getLogger(__name__)

_SAFE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
FULL_RETRY_S: Final = 60.0
OUTPUT, ERRORS = ".output", ".errors"

Kept = TypeVar("Kept", FileRecord, BatchRecord)


class BatchStore:
    """Records in memory, contents on disk. `wall_clock` is Unix time in seconds."""

    def __init__(self, folder: Path, settings: BatchSettings, wall_clock: Callable[[], float]) -> None:
        self._settings = settings
        self._wall_clock = wall_clock
        self._files_folder, self._batches_folder = folder / "files", folder / "batches"
        try:
            for each in (self._files_folder, self._batches_folder):
                each.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / "lock", thread_local=False)  # threads may differ
            self._lock.acquire(timeout=0)
        except Timeout:
            raise EnvironmentMissing(
                f"Another server uses the folder `{folder}`.", hint="Give each server its own `batch.folder`."
            ) from None
        except OSError as error:
            raise EnvironmentMissing(
                f"`batch.folder` cannot be used: {error}", hint="Name a folder that may be written."
            ) from error
        self.files = _load(self._files_folder, FileRecord)
        self.batches = _load(self._batches_folder, BatchRecord)
        self._sweep()

    def close(self) -> None:
        self._lock.release()

    # ---- files ----------------------------------------------------------------------------------------

    def file(self, file_id: str, tenant: str) -> FileRecord:
        """Raises ObjectNotFound, also for another tenant's."""
        return _owned(self.files, file_id, tenant, "file")

    def path_of(self, file: FileRecord) -> Path:
        return self._files_folder / f"{file.id}.data"

    def check_room(self, count_bytes: int) -> None:
        """Raise PayloadTooLarge or RateLimitExceeded where a file of that size does not fit."""
        settings = self._settings
        if count_bytes > settings.file_bytes_max:
            raise PayloadTooLarge(
                f"The file is larger than {format_bytes(settings.file_bytes_max)}.",
                hint="Split it, or raise `batch.file_bytes_max`.",
            )
        uploads = sum(file.purpose == Purpose.BATCH for file in self.files.values())
        held = sum(file.bytes for file in self.files.values())
        if uploads >= settings.files_max or held + count_bytes > settings.folder_bytes_max:
            raise RateLimitExceeded(
                f"{uploads} uploaded files and {format_bytes(held)} in all are kept: there is no room.",
                hint="Delete files that you no longer need.",
                retry_after_s=FULL_RETRY_S,
            )

    def new_part(self) -> Path:
        """A path for bytes that are still arriving; `_sweep` removes what a crash left of them."""
        return self._files_folder / f"{uuid.uuid4().hex}.part"

    def add_file(
        self, part: Path, filename: str, purpose: str, tenant: str, file_id: str | None = None
    ) -> FileRecord:
        """Take over the bytes at `part`."""
        size, now_s = part.stat().st_size, int(self._wall_clock())
        file = FileRecord(file_id or _new_id(FILE_PREFIX), tenant, filename, purpose, size, now_s)
        self._write(self._files_folder, file)  # first: a record without bytes is swept, bytes alone are too
        os.replace(part, self.path_of(file))
        self.files[file.id] = file
        return file

    def delete_file(self, file: FileRecord) -> None:
        """Raises InvalidRequest while a batch needs it."""
        users = [b.id for b in self.batches.values() if b.input_file_id == file.id and not b.status.is_end]
        if users:
            raise InvalidRequest(
                f"The file `{file.id}` is the input of `{users[0]}`, which has not ended.",
                hint="Cancel the batch first, or wait for it.",
                param="file_id",
            )
        self._forget(file)

    # ---- batches --------------------------------------------------------------------------------------

    def batch(self, batch_id: str, tenant: str) -> BatchRecord:
        """Raises ObjectNotFound, also for another tenant's."""
        return _owned(self.batches, batch_id, tenant, "batch")

    def add_batch(self, batch: BatchRecord) -> None:
        """Raises RateLimitExceeded while too many are kept that have not ended; else the oldest end goes."""
        while len(self.batches) >= self._settings.batches_max:
            ended = [each for each in self.batches.values() if each.status.is_end]
            if not ended:
                raise RateLimitExceeded(
                    f"{len(self.batches)} batches have not ended; the limit is {self._settings.batches_max}.",
                    hint="Wait for one to end.",
                    retry_after_s=FULL_RETRY_S,
                )
            oldest = min(ended, key=lambda each: each.created_s)
            del self.batches[oldest.id]
            (self._batches_folder / f"{oldest.id}.json").unlink(missing_ok=True)
        self.batches[batch.id] = batch
        self.save(batch)

    def save(self, batch: BatchRecord) -> None:
        self._write(self._batches_folder, batch)

    def running_path(self, batch: BatchRecord, kind: str) -> Path:
        """Where lines of kind OUTPUT or ERRORS gather while the batch runs."""
        return self._batches_folder / f"{batch.id}{kind}"

    def keep_results(self, batch: BatchRecord) -> None:
        """Turn what has gathered into files. Called again after a crash in between, it goes on."""
        for kind, field in ((OUTPUT, "output_file_id"), (ERRORS, "error_file_id")):
            path, suffix = self.running_path(batch, kind), kind.replace(".", "_")
            file_id = FILE_PREFIX + batch.id.removeprefix(BATCH_PREFIX) + suffix
            if path.exists() and path.stat().st_size:
                self.add_file(path, f"{batch.id}{suffix}.jsonl", Purpose.BATCH_OUTPUT, batch.tenant, file_id)
            path.unlink(missing_ok=True)
            if file_id in self.files:
                setattr(batch, field, file_id)
                self.save(batch)

    # ---- inside ---------------------------------------------------------------------------------------

    def _write(self, folder: Path, record: FileRecord | BatchRecord) -> None:
        path = folder / f"{record.id}.json"
        part = path.with_suffix(".part")
        part.write_bytes(orjson.dumps(stored(record)))
        os.replace(part, path)

    def _forget(self, file: FileRecord) -> None:
        del self.files[file.id]
        (self._files_folder / f"{file.id}.json").unlink(missing_ok=True)
        self.path_of(file).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what no record names: uploads that never ended, bytes whose record was not written."""
        for path in self._files_folder.iterdir():
            is_known = path.stem in self.files and path.suffix in (".json", ".data")
            if not is_known:
                path.unlink(missing_ok=True)
        for path in self._batches_folder.glob("*.part"):
            path.unlink(missing_ok=True)
        for file in [each for each in self.files.values() if not self.path_of(each).exists()]:
            logger.warning("the bytes of file %s are gone; it is forgotten", file.id)
            self._forget(file)


def new_batch_id() -> str:
    return _new_id(BATCH_PREFIX)


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def _owned(records: dict[str, Kept], record_id: str, tenant: str, noun: str) -> Kept:
    record = records.get(record_id)
    if record is None or record.tenant != tenant:
        shown = record_id if _SAFE_ID.fullmatch(record_id) else "?"
        raise ObjectNotFound(f"There is no {noun} `{shown}`.", hint="List what there is.")
    return record


def _load(folder: Path, kind: type[Record]) -> dict[str, Record]:
    """Every record in order of creation; one that cannot be read is left alone, and logged."""
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(restored(kind, orjson.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError, KeyError, PenstockError) as error:
            logger.warning("%s is no record of a batch or file: %s", path.name, error)
    return {record.id: record for record in sorted(found, key=lambda each: (each.created_s, each.id))}
