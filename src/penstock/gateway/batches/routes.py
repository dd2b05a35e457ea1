"""`/v1/files` and `/v1/batches`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from penstock.core.errors import (
    InvalidRequest,
    ObjectNotFound,
    Overloaded,
    PenstockError,
    RateLimitExceeded,
    RequestTimeout,
    RouteNotFound,
)
from penstock.gateway import schema_out as out
from penstock.gateway.access import check_key, tenant_of
from penstock.gateway.batches.lines import ENDPOINTS
from penstock.gateway.batches.multipart import MultipartReader, PartBegin, PartEnd, boundary_of
from penstock.gateway.batches.records import BatchRecord, FileRecord, Purpose, Status
from penstock.gateway.batches.schema import BatchRequest
from penstock.gateway.batches.store import BatchStore, new_batch_id
from penstock.gateway.batches.worker import BatchWorker
from penstock.gateway.body import parse_json_object, read_body
from penstock.gateway.errors import from_validation
from penstock.gateway.openapi import BODY_ERRORS, describe
from penstock.gateway.state import Gateway

UPLOADS_MAX: Final = 4  # at once
UPLOAD_BYTES_PER_S_MIN: Final = 64 << 10
FIELD_BYTES_MAX: Final = 4096  # of a form's field that is no file
FORM_BYTES_EXTRA: Final = 64 << 10  # boundaries, headers and fields around the file
FILENAME_CHARS_MAX: Final = 255
LIST_MAX: Final = {"file": 10_000, "batch": 100}
LIST_DEFAULT: Final = {"file": 10_000, "batch": 20}
WINDOW: Final = re.compile(r"([1-9][0-9]{0,4})([mhd])")
WINDOW_UNITS_S: Final = {"m": 60, "h": 3600, "d": 86_400}
WINDOW_S_MAX: Final = 30 * 86_400
UPLOAD_SCHEMA: Final = {
    "type": "object",
    "properties": {
        "purpose": {"type": "string", "enum": [Purpose.BATCH.value]},
        "file": {"type": "string", "format": "binary"},
    },
    "required": ["purpose", "file"],
}

Kept = TypeVar("Kept", FileRecord, BatchRecord)


class BatchApi:
    """The handlers, all on the event loop, which owns the store. `store` is None where the API is off."""

    def __init__(self, gateway: Gateway, store: BatchStore | None, wall_clock: Callable[[], float]) -> None:
        self._gateway = gateway
        self._kept = store
        self._wall_clock = wall_clock
        self._worker = None if store is None else BatchWorker(gateway, store, wall_clock)
        self._uploads = 0

    def start(self) -> None:
        """Go on with batches that an earlier server left; on the event loop."""
        if self._worker is not None:
            self._worker.start()

    async def stop(self) -> None:
        """Stop, and give the folder free."""
        if self._worker is not None:
            await self._worker.stop()

    # ---- files ----------------------------------------------------------------------------------------

    async def upload_file(self, request: Request) -> Response:
        store, tenant = self._enter(request)
        boundary = boundary_of(request.headers.get("content-type", ""))
        declared = request.headers.get("content-length", "")
        most = self._gateway.settings.batch.file_bytes_max
        if declared.isdigit() and int(declared[:20]) > most + FORM_BYTES_EXTRA:
            store.check_room(most + 1)
        store.check_room(0)
        if self._uploads >= UPLOADS_MAX:
            raise Overloaded(
                "The server is full: too many files are arriving.",
                hint="Retry after the time in `Retry-After`.",
                retry_after_s=5.0,
            )
        self._uploads += 1
        part = store.new_part()
        try:
            form = await self._receive(request, MultipartReader(boundary), part, store)
            return _answer(store.add_file(part, form.filename, form.purpose, tenant).wire())
        finally:
            self._uploads -= 1
            part.unlink(missing_ok=True)

    async def _receive(
        self, request: Request, reader: MultipartReader, part: Path, store: BatchStore
    ) -> _Form:
        """The form, its file at `part`. It may take `gateway.body_timeout_s`, and longer if it is large."""
        deadline_s = self._gateway.clock() + self._gateway.settings.gateway.body_timeout_s
        with part.open("wb") as sink:
            form, more = _Form(sink, store), True
            while more:
                try:
                    async with asyncio.timeout(max(0.0, deadline_s - self._gateway.clock())):
                        message = await request.receive()
                except TimeoutError:
                    raise RequestTimeout(
                        "The file arrived too slowly.", hint="Send it again, over a better line."
                    ) from None
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                data = message.get("body", b"")
                deadline_s += len(data) / UPLOAD_BYTES_PER_S_MIN
                for event in reader.feed(data):
                    form.take(event)
                more = message.get("more_body", False)
            reader.close()
        form.check()
        return form

    async def list_files(self, request: Request) -> Response:
        store, tenant = self._enter(request)
        purpose = request.query_params.get("purpose")
        files = [
            file for file in store.files.values() if file.tenant == tenant and purpose in (None, file.purpose)
        ]
        return _answer(_page(request, files, "file"))

    async def file(self, request: Request, file_id: str) -> Response:
        store, tenant = self._enter(request)
        return _answer(store.file(file_id, tenant).wire())

    async def content(self, request: Request, file_id: str) -> Response:
        store, tenant = self._enter(request)
        path = store.path_of(store.file(file_id, tenant))
        return FileResponse(path, media_type="application/octet-stream")

    async def delete(self, request: Request, file_id: str) -> Response:
        store, tenant = self._enter(request)
        store.delete_file(store.file(file_id, tenant))
        return _answer({"id": file_id, "object": "file", "deleted": True})

    # ---- batches --------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        store, tenant = self._enter(request)
        with self._gateway.budget.hold() as hold:
            payload = parse_json_object(await read_body(request, hold, self._gateway.settings.gateway))
        try:
            body = BatchRequest.model_validate(payload)
        except ValidationError as error:
            raise from_validation(error, payload) from None
        if body.endpoint not in ENDPOINTS:
            raise InvalidRequest(
                f"Batches for `{body.endpoint[:100]}` are not served here.",
                hint="Served: " + ", ".join(f"`{each}`" for each in ENDPOINTS) + ".",
                param="endpoint",
            )
        file = store.file(body.input_file_id, tenant)
        if file.purpose != Purpose.BATCH:
            raise InvalidRequest(
                f"The file `{file.id}` is no input of a batch.",
                hint='Upload it with the purpose "batch".',
                param="input_file_id",
            )
        window_s, now_s = _window_s(body.completion_window), int(self._wall_clock())
        batch = BatchRecord(
            new_batch_id(),
            tenant,
            body.endpoint,
            file.id,
            body.completion_window,
            now_s,
            now_s + window_s,
            metadata=body.metadata,
        )
        store.add_batch(batch)
        assert self._worker is not None
        self._worker.added()
        return _answer(batch.wire())

    async def list_batches(self, request: Request) -> Response:
        store, tenant = self._enter(request)
        mine = [batch for batch in store.batches.values() if batch.tenant == tenant]
        return _answer(_page(request, mine, "batch"))

    async def batch(self, request: Request, batch_id: str) -> Response:
        store, tenant = self._enter(request)
        return _answer(store.batch(batch_id, tenant).wire())

    async def cancel(self, request: Request, batch_id: str) -> Response:
        store, tenant = self._enter(request)
        batch = store.batch(batch_id, tenant)
        if batch.status is not Status.CANCELLING:
            if batch.status not in (Status.VALIDATING, Status.IN_PROGRESS):
                raise InvalidRequest(
                    f"The batch `{batch.id}` is {batch.status} and cannot be cancelled.", param="batch_id"
                )
            assert self._worker is not None
            self._worker.cancel(batch)
        return _answer(batch.wire())

    def _enter(self, request: Request) -> tuple[BatchStore, str]:
        """The store, and whose files and batches the caller may see."""
        check_key(request, self._gateway.settings.gateway)
        if self._kept is None:
            raise RouteNotFound(
                "This server keeps no files and runs no batches.",
                hint="Start it with `batch.folder` set to a folder.",
            )
        return self._kept, tenant_of(request, self._gateway.settings.gateway)


class _Form:
    """The fields of an upload; the file's bytes go to `sink`."""

    def __init__(self, sink: IO[bytes], store: BatchStore) -> None:
        self._sink = sink
        self._store = store
        self._field: str | None = None
        self._value = b""
        self._file_bytes: int | None = None
        self.purpose = ""
        self.filename = ""

    def take(self, event: PartBegin | bytes | PartEnd) -> None:
        if isinstance(event, PartBegin):
            self._begin(event)
        elif isinstance(event, bytes):
            self._more(event)
        elif self._field == "purpose":
            self.purpose = self._value.decode("utf-8", errors="replace")

    def check(self) -> None:
        """Raises InvalidRequest where something is missing."""
        if self._file_bytes is None:
            raise InvalidRequest("`file` is required.", hint="Send the file in the form.", param="file")
        if self.purpose != Purpose.BATCH:
            raise InvalidRequest('`purpose` must be "batch".', param="purpose")

    def _begin(self, part: PartBegin) -> None:
        self._field, self._value = part.name, b""
        if part.name == "file":
            if self._file_bytes is not None:
                raise InvalidRequest("The form has more than one file.", param="file")
            self._file_bytes = 0
            name = "".join(char for char in part.filename or "upload" if char.isprintable())
            self.filename = name[:FILENAME_CHARS_MAX]

    def _more(self, data: bytes) -> None:
        if self._field == "file":
            assert self._file_bytes is not None
            self._file_bytes += len(data)
            self._store.check_room(self._file_bytes)
            self._sink.write(data)
        elif len(self._value) + len(data) > FIELD_BYTES_MAX:
            raise InvalidRequest("A field of the form is too long.", param=self._field)
        else:
            self._value += data


def _window_s(text: str) -> int:
    match = WINDOW.fullmatch(text)
    seconds = int(match[1]) * WINDOW_UNITS_S[match[2]] if match else 0
    if not 0 < seconds <= WINDOW_S_MAX:
        raise InvalidRequest(
            "`completion_window` must be a number of minutes, hours or days, at most 30 days.",
            hint='For example "24h", "90m" or "7d".',
            param="completion_window",
        )
    return seconds


def _page(request: Request, records: list[Kept], noun: str) -> dict[str, Any]:
    """Newest first unless `order` says otherwise, from behind `after`, at most `limit`."""
    limit_text = request.query_params.get("limit", str(LIST_DEFAULT[noun]))
    if not (limit_text.isascii() and limit_text.isdigit() and 1 <= int(limit_text[:9]) <= LIST_MAX[noun]):
        raise InvalidRequest(f"`limit` must be a whole number from 1 to {LIST_MAX[noun]}.", param="limit")
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be `asc` or `desc`.", param="order")
    if order == "desc":
        records = records[::-1]
    after = request.query_params.get("after")
    if after is not None:
        places = [place for place, record in enumerate(records) if record.id == after]
        if not places:
            raise InvalidRequest(f"`after` is no {noun} of yours.", param="after")
        records = records[places[0] + 1 :]
    limit = int(limit_text)
    shown = records[:limit]
    return {
        "object": "list",
        "data": [record.wire() for record in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(records) > limit,
    }


def _answer(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


def add_batch_routes(app: FastAPI, api: BatchApi) -> None:
    upload = describe(out.FileObject, *BODY_ERRORS, RateLimitExceeded, is_keyed=True)
    upload["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_SCHEMA}}}
    created = describe(out.BatchObject, *BODY_ERRORS, RateLimitExceeded, body=BatchRequest, is_keyed=True)

    def named(answer: type[BaseModel] | None, *errors: type[PenstockError]) -> dict[str, Any]:
        return describe(answer, *errors, ObjectNotFound, is_keyed=True)

    file, batch = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
    for method, path, handler, summary, extra in (
        ("POST", "/v1/files", api.upload_file, "Upload a file of requests", upload),
        ("GET", "/v1/files", api.list_files, "List the files", named(out.FileList, InvalidRequest)),
        ("GET", file, api.file, "Describe one file", named(out.FileObject)),
        ("GET", f"{file}/content", api.content, "The bytes of a file", named(None)),
        ("DELETE", file, api.delete, "Delete a file", named(out.FileDeleted, InvalidRequest)),
        ("POST", "/v1/batches", api.create, "Run a file of requests in the background", created),
        ("GET", "/v1/batches", api.list_batches, "List the batches", named(out.BatchList, InvalidRequest)),
        ("GET", batch, api.batch, "Where a batch stands", named(out.BatchObject)),
        ("POST", f"{batch}/cancel", api.cancel, "Stop a batch", named(out.BatchObject, InvalidRequest)),
    ):
        app.add_api_route(path, handler, methods=[method], summary=summary, openapi_extra=extra)
