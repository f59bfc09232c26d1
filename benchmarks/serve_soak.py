"""Soak test of `ddiff serve`: many requests of several clients, some of which are aborted.

    python benchmarks/serve_soak.py --requests 1000 --clients 16
    python benchmarks/serve_soak.py runs/NAME --requests 100

Without a run directory, a small run is trained in a temporary folder. The script checks that every
request is answered, that equal requests have equal results in every batch, and that memory,
threads and open files of the server do not grow. It prints the figures and exits with 1 if a check
fails.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADERS = {"Content-Type": "application/json"}
TIMEOUT = 300.0  # seconds to wait for an answer
KINDS = ("plain", "plain", "stream", "stream", "abort", "abort stream", "bad")
"""Kinds of requests, drawn with equal probability."""
MEMORY_GROWTH = 1.1  # largest ratio of the memory at the end and after the first fifth

RECIPE = """
name = "soak"
plugins = ["mdlm", "dit"]

[data]
kind = "text"
files = ["corpus.txt"]
split = "line"
held_out = 0.2
length = 24

[tokenizer]
kind = "bpe"
size = 270

[vocabulary]
kind = "flat"

[process]
kind = "mdlm"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
head = "tokens"

[train]
steps = 2
batch = 4
warmup = 1

[evaluate]
batch = 16

[sample]
steps = 8
count = 1
"""


@dataclass
class Usage:
    """Resources of a process: memory in KiB, threads, and open files."""

    memory: int
    threads: int
    files: int

    @classmethod
    def of(cls, process: int) -> Usage:
        status = Path(f"/proc/{process}/status").read_text()
        memory = int(re.findall(r"VmRSS:\s+(\d+)", status)[0])
        threads = int(re.findall(r"Threads:\s+(\d+)", status)[0])
        return cls(memory, threads, len(os.listdir(f"/proc/{process}/fd")))


@dataclass
class Tally:
    """Results of all clients."""

    answers: Counter[str] = field(default_factory=Counter)
    results: dict[str, Any] = field(default_factory=dict)  # by request
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, seconds: float, error: str | None = None) -> None:
        with self.lock:
            self.answers[kind] += 1
            self.seconds.append(seconds)
            if error is not None:
                self.errors.append(error)

    def compare(self, request: str, result: Any) -> str | None:
        """Return an error if an equal request had another result."""
        with self.lock:
            first = self.results.setdefault(request, result)
        return None if first == result else f"{request}: {result} instead of {first}"


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request out of about a hundred."""
    seed = rng.randrange(6)
    if rng.random() < 0.3:
        return "/v1/infill", {"text": "the [MASK:3] sat on the [MASK:1]", "seed": seed}
    body = {"prompt": rng.choice(["the", "the old cat", ""]), "seed": seed}
    if rng.random() < 0.5:
        body["max_tokens"] = rng.choice([1, 5])
    if rng.random() < 0.3:
        body["n"] = 3
    if rng.random() < 0.2:
        body["steps"] = 4
    return "/v1/completions", body


def send(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("POST", path, json.dumps(body), HEADERS)
    return connection


def read_choices(response: http.client.HTTPResponse, is_stream: bool) -> list[Any]:
    """Return (index, ids, text) of the choices of a response."""
    text = response.read().decode()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {text[:200]}")
    if not is_stream:
        bodies = [json.loads(text)]
    else:
        events = text.split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            raise ValueError(f"the stream ends with {events[-2:]}")
        bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    choices = [choice for body in bodies for choice in body["choices"] if choice["finish_reason"]]
    return sorted((choice["index"], choice["ids"], choice["text"]) for choice in choices)


def send_one(port: int, rng: random.Random, tally: Tally) -> None:
    """Send one request of a random kind, and record its result."""
    kind = rng.choice(KINDS)
    path, body = make_request(rng)
    is_stream = "stream" in kind
    key = json.dumps([path, body])
    sent = dict(body, stream=is_stream)
    if kind == "bad":
        sent["logprobs"] = 3
    if kind.startswith("abort"):
        sent["steps"] = 200
    began = time.monotonic()
    error = None
    connection = send(port, path, sent)
    try:
        if kind.startswith("abort"):
            time.sleep(rng.random() * 0.2)
        elif kind == "bad":
            response = connection.getresponse()
            response.read()
            if response.status != 400:
                error = f"bad request: status {response.status}"
        else:
            choices = read_choices(connection.getresponse(), is_stream)
            error = tally.compare(key, choices)
            if len(choices) != body.get("n", 1):
                error = f"{key}: {len(choices)} choices"
    except (OSError, ValueError, http.client.HTTPException) as failure:
        error = f"{kind} {key}: {failure!r}"
    finally:
        connection.close()
    tally.add(kind, time.monotonic() - began, error)


def get_health(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", "/health")
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found


def wait_until_idle(port: int) -> dict[str, Any]:
    """Return the health of the server after its queue is empty."""
    end = time.monotonic() + TIMEOUT
    while True:
        health = get_health(port)
        if not health["queued"] and not health["running"]:
            return health
        if time.monotonic() > end:
            raise SystemExit(f"The server is not idle after {TIMEOUT:g} seconds: {health}")
        time.sleep(0.05)


def send_all(port: int, requests: int, clients: int, seed: int, tally: Tally) -> None:
    """Send requests from several threads."""

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        for _ in range(number, requests, clients):
            send_one(port, rng, tally)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def compare_alone(port: int, tally: Tally) -> int:
    """Repeat every request without other requests, and return how many there were."""
    requests = list(tally.results)
    for request in requests:
        path, body = json.loads(request)
        choices = read_choices(send(port, path, body).getresponse(), False)
        error = tally.compare(request, choices)
        if error is not None:
            tally.errors.append(f"alone: {error}")
    return len(requests)


def train_small_run(folder: Path) -> Path:
    """Train a small run, and return its directory."""
    lines = [
        f"the {a} {b} sat on the {c}"
        for a in ("old", "red")
        for b in ("cat", "hat")
        for c in "abcdxyz"
    ]
    (folder / "corpus.txt").write_text("\n".join(lines))
    (folder / "soak.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "ddiff", "run", "soak.toml"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "runs/soak"


def soak(run_dir: Path, requests: int, clients: int) -> int:
    """Run the soak test on a run. Returns the exit code."""
    command = [sys.executable, "-m", "ddiff", "serve", str(run_dir), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)", server.stdout.readline())
    if found is None:
        raise SystemExit("The server did not start.")
    port = int(found[1])
    tally = Tally()
    began = time.monotonic()
    first = requests // 5  # threads and buffers exist after the first fifth
    send_all(port, first, clients, 1, tally)
    wait_until_idle(port)
    before = Usage.of(server.pid)
    send_all(port, requests - first, clients, 2, tally)
    health = wait_until_idle(port)
    seconds = time.monotonic() - began
    distinct = compare_alone(port, tally)
    time.sleep(0.5)  # closed connections of the last requests
    after = Usage.of(server.pid)
    server.send_signal(signal.SIGINT)
    code = server.wait(60)
    tally.seconds.sort()
    print(f"requests    {sum(tally.answers.values())} of {requests}: {dict(tally.answers)}")
    print(
        f"time        {seconds:.1f} s; median {tally.seconds[len(tally.seconds) // 2]:.3f} s, "
        f"longest {tally.seconds[-1]:.3f} s"
    )
    print(f"server      {health}")
    print(f"repeated    {distinct} different requests without other requests")
    print(f"resources   {before} -> {after}")
    print(f"errors      {len(tally.errors)}", *tally.errors[:10], sep="\n  ")
    checks = {
        "every request is answered": sum(tally.answers.values()) == requests,
        "no errors": not tally.errors and health["failed"] == 0,
        "memory does not grow": after.memory <= MEMORY_GROWTH * before.memory,
        "threads do not grow": after.threads <= before.threads,
        "files do not grow": after.files <= before.files,
        "the server ends with 0": code == 0,
    }
    for name, is_met in checks.items():
        print(f"{'ok' if is_met else 'FAILED':8}{name}")
    return 0 if all(checks.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run_dir", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    if options.run_dir is not None:
        return soak(options.run_dir, options.requests, options.clients)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = train_small_run(Path(folder))
        return soak(run_dir, options.requests, options.clients)


if __name__ == "__main__":
    raise SystemExit(main())
