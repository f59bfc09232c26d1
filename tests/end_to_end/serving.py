"""HTTP server of a run in a thread, and a client for it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ddiff.runs.run import Run
from ddiff.serve.app import RunServer
from ddiff.serve.command import open_port
from ddiff.serve.limits import Limits

JSON = {"Content-Type": "application/json"}
SOON = 30.0  # seconds; far more than an event of these tests takes


class Client:
    """Client of a server on a port of this machine."""

    def __init__(self, port: int, server: RunServer) -> None:
        self.port = port
        self.server = server

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SOON)

    def open(self, path: str, **body: Any) -> http.client.HTTPConnection:
        """Send a request, and return the connection without reading the response."""
        connection = self.connect()
        connection.request("POST", f"/v1/{path}", json.dumps(body).encode(), JSON)
        return connection

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Send a request, and return the status and the JSON object of the response."""
        connection = self.open(path, **body)
        response = connection.getresponse()
        found = json.loads(response.read())
        connection.close()
        return response.status, found

    def get(self, path: str) -> tuple[int, str]:
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def draw(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Send a request, check that it succeeds, and return the choices."""
        status, found = self.post(path, **body)
        assert status == 200, found
        return found["choices"]

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Send a request with a stream, and return its events without the last, [DONE]."""
        connection = self.open(path, **body | {"stream": True})
        response = connection.getresponse()
        assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
        events = response.read().decode().split("\n\n")
        connection.close()
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def wait_until_idle(self) -> None:
        """Wait until no row is queued or drawn."""
        end = time.monotonic() + SOON
        while not self.server.scheduler.is_idle:
            assert time.monotonic() < end
            time.sleep(0.005)


@contextmanager
def serve(run: Run, **limits: Any) -> Iterator[Client]:
    """Serve a run in a thread while a `with` block runs."""
    listener = open_port("127.0.0.1", 0)
    server = RunServer(run, Limits(**limits))
    config = uvicorn.Config(
        server.make_app(), log_level="error", lifespan="on", timeout_graceful_shutdown=2
    )
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Client(listener.getsockname()[1], server)
    finally:
        web.should_exit = True
        thread.join(SOON)
        listener.close()
    assert not thread.is_alive()
    assert not server.scheduler.is_alive
