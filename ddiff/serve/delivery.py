"""Responses: results go from the thread of the scheduler to the client of a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ddiff.serve.edits import EditRecorder
from ddiff.serve.engine import Drawn
from ddiff.serve.refusals import Refusal
from ddiff.serve.replies import ReplyWriter
from ddiff.serve.requests import Row
from ddiff.serve.scheduler import Job, Scheduler

MOST_PENDING = 64  # events that a slow client has not read yet
SHORTEST_REPLY_TIME = 1.0  # seconds to send an error to a client that does not read


class Disconnected(NamedTuple):
    """Event after the client closed the connection."""


Event = tuple[Row, Drawn] | dict[str, Any] | Refusal | Disconnected
"""Sample of a row, JSON object of a stream, error, or end of the connection."""


class Mailbox:
    """Listener of a request that passes results on to the event loop.

    A client that reads slowly gets fewer events: while many events are pending, the states of a
    step are skipped. The next event has all edits since the last one, so no edit is lost.
    """

    def __init__(self, writer: ReplyWriter, recorders: dict[int, EditRecorder]) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._writer = writer
        self._recorders = recorders  # by index of the row; empty without a stream

    def on_states(self, row: Row, step: int, read: Callable[[], list[int]]) -> None:
        recorder = self._recorders.get(row.index)
        if recorder is None or self.events.qsize() >= MOST_PENDING:
            return
        edits = recorder.update(read())
        self._send(self._writer.write_step(row, step, edits))

    def on_drawn(self, row: Row, drawn: Drawn) -> None:
        recorder = self._recorders.get(row.index)
        if recorder is not None:
            edits = recorder.update(drawn.ids)
            if edits:  # steps were skipped
                self._send(self._writer.write_step(row, drawn.nfe, edits))
        self._send((row, drawn))

    def on_error(self, error: Refusal) -> None:
        self._send(error)

    def _send(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # the event loop is closed, and with it the connection
            return


class ResultResponse:
    """ASGI response that sends the results of a job, as JSON or as server-sent events.

    The job is cancelled if the client disconnects or the time is over.
    """

    def __init__(
        self,
        job: Job,
        mailbox: Mailbox,
        writer: ReplyWriter,
        scheduler: Scheduler,
        timeout: float,
        first: list[dict[str, Any]],
    ) -> None:
        self._job = job
        self._mailbox = mailbox
        self._writer = writer
        self._scheduler = scheduler
        self._timeout = timeout
        self._first = first  # first events of a stream
        self._is_closed = False  # by the client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._writer.request.stream:
                await self._send_stream(send)
            else:
                await self._send_json(scope, receive, send)
        except OSError:
            return  # the client closed the connection while it was written to
        finally:
            self._scheduler.cancel(self._job)
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        """Send an event when the client closes the connection."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_closed = True  # pending events are not sent any more
        self._mailbox.events.put_nowait(Disconnected())

    async def _next_event(self, deadline: float) -> Event:
        """Return the next event.

        Returns `Disconnected` if the client closed the connection, and a `Refusal` with status 504
        after the deadline.
        """
        try:
            async with asyncio.timeout_at(deadline):
                event = await self._mailbox.events.get()
        except TimeoutError:
            return Refusal(
                f"The request took longer than {self._timeout:g} seconds. Ask for fewer steps or "
                "samples, or start the server with a longer --timeout.",
                status=504,
                code="timeout",
            )
        return Disconnected() if self._is_closed else event

    async def _send_json(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout
        choices: list[dict[str, Any]] = []
        while len(choices) < len(self._job.rows):
            event = await self._next_event(deadline)
            if isinstance(event, Disconnected):
                return
            if isinstance(event, Refusal):
                await refuse(event)(scope, receive, send)
                return
            if isinstance(event, tuple):
                choices.append(self._writer.write_choice(*event))
        await JSONResponse(self._writer.write_reply(choices))(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # proxies must not collect events
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in self._first:
            await _send_event(send, body, deadline)
        left = len(self._job.rows)
        while left:
            event = await self._next_event(deadline)
            if isinstance(event, Disconnected):
                return
            if isinstance(event, Refusal):
                grace = asyncio.get_running_loop().time() + SHORTEST_REPLY_TIME
                await _send_event(send, event.to_json(), grace)
                break
            if isinstance(event, tuple):
                left -= 1
                event = self._writer.write_last(self._writer.write_choice(*event))
            await _send_event(send, event, deadline)
        if not left:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            return
        await send({"type": "http.response.body", "body": b""})


async def _send_event(send: Send, body: dict[str, Any], deadline: float) -> None:
    """Send one server-sent event. Raises OSError if the client does not read until the deadline."""
    data = f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
    async with asyncio.timeout_at(deadline):  # TimeoutError is an OSError
        await send({"type": "http.response.body", "body": data, "more_body": True})


def refuse(error: Refusal) -> JSONResponse:
    """Return the response of a refused request."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.to_json(), error.status, headers)
