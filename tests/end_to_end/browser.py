"""Headless Chromium for tests of pages, driven by chromedriver over its HTTP interface."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
START_SECONDS = 60.0  # until the driver accepts commands, on a busy machine
COMMAND_SECONDS = 120.0


def find_missing() -> str | None:
    """Return the program that is missing for a test in a browser, or None."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return program
    return None


class Browser:
    """Browser window at the address `address` of its session."""

    def __init__(self, address: str) -> None:
        self.address = address

    def open(self, page: Path) -> None:
        self._post("url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """Run JavaScript and return the value of its `return` statement."""
        return self._post("execute/sync", {"script": script, "args": []})

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the page in pixels, and whether it is "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._command("Emulation.setEmulatedMedia", {"features": [feature]})

    def errors(self) -> list[str]:
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        shot = self._command(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True}
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def _command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Send a command of the Chrome DevTools protocol."""
        return self._post("goog/cdp/execute", {"cmd": name, "params": arguments})

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        return request(f"{self.address}/{path}", content)


def request(address: str, content: dict[str, Any] | None = None, method: str = "POST") -> Any:
    data = None if content is None else json.dumps(content).encode()
    message = urllib.request.Request(address, data, method=method)
    # the driver runs on this machine, whatever proxy the environment names
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(message, timeout=COMMAND_SECONDS) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start a browser whose profile is in `folder`, and close it after the `with` block."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        root = f"http://127.0.0.1:{_read_port(driver)}"
        options = {"args": [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = request(f"{root}/session", {"capabilities": {"alwaysMatch": wanted}})
        session = f"{root}/session/{answer['sessionId']}"
        try:
            yield Browser(session)
        finally:
            request(session, method="DELETE")
    finally:
        driver.terminate()
        driver.communicate()


def _read_port(driver: subprocess.Popen[str]) -> int:
    """Return the port that the driver chose, which it prints when it is ready."""
    assert driver.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        line = driver.stdout.readline()
        if "successfully on port" in line:
            return int(line.rstrip().rstrip(".").rsplit(" ", 1)[1])
        if not line:
            break
    raise RuntimeError("chromedriver did not start")
