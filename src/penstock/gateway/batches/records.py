"""What is known of a file and of a batch: as it is stored, and as OpenAI's clients read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, TypeVar

JSON = dict[str, Any]

FILE_PREFIX: Final = "file-"
BATCH_PREFIX: Final = "batch_"


class Status(StrEnum):
    """Where a batch stands. The last four are ends."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.EXPIRED, Status.CANCELLED)


class Purpose(StrEnum):
    """What a file is for."""

    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


@dataclass(slots=True)
class FileRecord:
    """One file. `created_s` is Unix time."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_s: int

    def wire(self) -> JSON:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_s,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(slots=True)
class Problem:
    """Why a batch cannot run: a line of its file, counted from 1, or the file as a whole (None)."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(slots=True)
class BatchRecord:
    """One batch. Instants are Unix time; `changed_s` has that of every status it ever had."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_s: int
    expires_s: int
    status: Status = Status.VALIDATING
    metadata: dict[str, str] | None = None
    problems: list[Problem] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    changed_s: dict[str, int] = field(default_factory=dict)

    def enter(self, status: Status, now_s: float) -> None:
        self.status = status
        self.changed_s[status.value] = int(now_s)

    def wire(self) -> JSON:
        problems = None
        if self.problems:
            problems = {"object": "list", "data": [asdict(problem) for problem in self.problems]}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": problems,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            **{
                f"{status.value}_at": self.changed_s.get(status.value)
                for status in Status
                if status is not Status.VALIDATING
            },
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


Record = TypeVar("Record", FileRecord, BatchRecord)


def stored(record: FileRecord | BatchRecord) -> JSON:
    return asdict(record)


def restored(kind: type[Record], data: JSON) -> Record:
    """Raises TypeError, KeyError or ValueError for what is no such record."""
    known = {item.name for item in fields(kind)}
    values = {name: value for name, value in data.items() if name in known}
    if kind is BatchRecord:
        values["status"] = Status(values["status"])
        values["problems"] = [Problem(**problem) for problem in values["problems"]]
    return kind(**values)
