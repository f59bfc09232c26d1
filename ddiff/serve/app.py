"""Starlette application of the HTTP server: endpoints and their errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ddiff.errors import REPORT
from ddiff.runs.run import Run
from ddiff.serve.delivery import Mailbox, ResultResponse, refuse
from ddiff.serve.edits import EditRecorder, StateNames
from ddiff.serve.engine import RunEngine
from ddiff.serve.fields import read_object
from ddiff.serve.limits import Limits
from ddiff.serve.refusals import Refusal
from ddiff.serve.replies import ReplyWriter
from ddiff.serve.requests import Endpoint, Request, parse_request
from ddiff.serve.scheduler import Job, Scheduler

PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    # the page has no external resources, and texts of the model cannot add any
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}
ENDPOINTS = "/v1/completions, /v1/infill, /v1/models, /health and / (a page)"


class RunServer:
    """Endpoints of one run."""

    def __init__(self, run: Run, limits: Limits) -> None:
        self.limits = limits
        self.engine = RunEngine(run)
        self.names = StateNames(run)
        self.scheduler = Scheduler(self.engine.draw, limits)

    def make_app(self) -> Starlette:
        """Return the ASGI application. When it stops, the scheduler stops too."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.scheduler.close)

        routes = [
            Route("/", self.show_page),
            Route("/health", self.report_health),
            Route("/v1/models", self.list_models),
            Route("/v1/completions", self._make_endpoint("completions"), methods=["POST"]),
            Route("/v1/infill", self._make_endpoint("infill"), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            Refusal: _on_refusal,
            HTTPException: _on_http_error,
            Exception: _on_defect,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

    # ------------------------------------------------------------------ endpoints

    async def show_page(self, http: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def report_health(self, http: HttpRequest) -> Response:
        """Return the state of the scheduler, with status 503 if its thread does not run."""
        scheduler = self.scheduler
        body = {
            "status": "ok" if scheduler.is_alive else "stopping",
            "queued": scheduler.queued,
            "running": scheduler.running,
            **vars(scheduler.counts),
        }
        return JSONResponse(body, 200 if scheduler.is_alive else 503)

    async def list_models(self, http: HttpRequest) -> Response:
        engine = self.engine
        model = {
            "id": engine.name,
            "object": "model",
            "created": 0,
            "owned_by": "ddiff",
            "positions": engine.length,
            "left_to_right": engine.run.denoiser.inputs == "previous",
        }
        return JSONResponse({"object": "list", "data": [model]})

    def _make_endpoint(self, endpoint: Endpoint) -> Callable[[HttpRequest], Awaitable[Any]]:
        async def answer(http: HttpRequest) -> Any:
            body = read_object(await read_body(http, self.limits))
            request = parse_request(endpoint, body, self.engine, self.limits)
            return self._start(request)

        return answer

    def _start(self, request: Request) -> ResultResponse:
        """Submit the rows of a request, and return the response that waits for them."""
        engine = self.engine
        writer = ReplyWriter(request, engine.name, engine.tokenizer)
        recorders: dict[int, EditRecorder] = {}
        first: list[dict[str, Any]] = []
        if request.stream:
            for row in request.rows:
                template = row.template
                size = len(template.ids) if template.whole else engine.length
                recorder = EditRecorder(
                    self.names, template.ids.tolist(), template.given.tolist(), size, engine.start
                )
                recorders[row.index] = recorder
                first.append(writer.write_start(row, size, recorder.begin()))
        mailbox = Mailbox(writer, recorders)
        job = Job(request.rows, mailbox)
        self.scheduler.submit(job)
        return ResultResponse(job, mailbox, writer, self.scheduler, self.limits.timeout, first)


async def read_body(http: HttpRequest, limits: Limits) -> bytes:
    """Read the body of a request. Raises Refusal if it is too large, too slow or not JSON."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers send JSON to another site only after they asked that site, so a foreign page cannot
    # use the server.
    if kind != "application/json":
        raise Refusal(
            f"Content-Type must be application/json; got {kind[:80] or 'no Content-Type'}. With "
            "curl: -H 'Content-Type: application/json'.",
            status=415,
        )
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in http.stream():
                size += len(part)
                if size > limits.body:
                    raise Refusal(
                        f"The body must have at most {limits.body} bytes; got more. Send a shorter "
                        "text.",
                        status=413,
                    )
                parts.append(part)
    except TimeoutError:
        raise Refusal(
            f"The body did not arrive within {limits.body_timeout:g} seconds. Send it again.",
            status=408,
        ) from None
    except ClientDisconnect:
        raise Refusal("The client closed the connection.", status=400) from None
    return b"".join(parts)


async def _on_refusal(http: HttpRequest, error: Refusal) -> Response:
    return refuse(error)


async def _on_defect(http: HttpRequest, error: Exception) -> Response:
    # the traceback goes to the terminal of the server, and not to the client
    return refuse(Refusal(f"{type(error).__name__}. {REPORT}", status=500, code="defect"))


async def _on_http_error(http: HttpRequest, error: HTTPException) -> Response:
    """Answer requests for another path or with another method."""
    path = http.url.path[:80]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path} needs the method {allowed}; got {http.method}."
    elif path == "/v1/chat/completions":
        message = (
            "/v1/chat/completions: the server has no chat template. Write the conversation into "
            "the prompt of /v1/completions."
        )
    else:
        message = f"{path}: no such endpoint. The endpoints are {ENDPOINTS}."
    return refuse(Refusal(message, status=error.status_code, code="not_found"))
