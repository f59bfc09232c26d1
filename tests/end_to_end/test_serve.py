"""`ddiff serve`: results, batches, streams, cancelled requests, and limits over HTTP."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from commands import Command, is_refusal

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from serving import SOON, Client, serve
from small import AUTOREGRESSIVE, make_autoregressive_recipe

import ddiff as api
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import UNPADDED
from ddiff.runs.run import Run
from ddiff.serve import command
from ddiff.serve.app import RunServer
from ddiff.serve.command import open_port, print_start
from ddiff.serve.engine import Drawn, RunEngine
from ddiff.serve.requests import Row, SamplingOptions

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def client(small: Run) -> Iterator[Client]:
    with serve(small, batch=4, choices=8, queue=64, body=4096, body_timeout=0.3) as client:
        yield client


# ---------------------------------------------------------------------- results


def test_completion_equals_samples_of_the_run_with_this_seed(client: Client, small: Run) -> None:
    choices = client.draw("completions", prompt="the old", n=3, seed=5, steps=STEPS)
    expected = small.sample(3, prompt="the old", seed=5, steps=STEPS)
    assert [choice["ids"] for choice in choices] == [sample["ids"] for sample in expected]
    assert [choice["nfe"] for choice in choices] == [sample["nfe"] for sample in expected]


def test_max_tokens_equals_a_gap_of_this_size(client: Client, small: Run) -> None:
    (choice,) = client.draw("completions", prompt="the old", max_tokens=5, seed=5, steps=STEPS)
    (expected,) = small.sample(1, infill="the old[MASK:5]", seed=5, steps=STEPS)
    assert choice["ids"] == expected["ids"]


def test_infill_equals_samples_of_the_run_and_keeps_the_text(client: Client, small: Run) -> None:
    text = "the [MASK:3] sat on the x"
    choices = client.draw("infill", text=text, n=2, seed=2**64 - 1, temperature=0.5, steps=STEPS)
    expected = small.sample(
        2, infill=text, seed=2**64 - 1, settings=["temperature=0.5"], steps=STEPS
    )
    assert [choice["text"] for choice in choices] == [sample["text"] for sample in expected]
    assert all(choice["text"].endswith(" sat on the x") for choice in choices)


def test_completion_ends_before_end_mark_and_before_stop_text(client: Client, small: Run) -> None:
    (choice,) = client.draw("completions", prompt="the", seed=1, steps=STEPS)
    eos = small.tokenizer.eos_id
    given = len(small.tokenizer.encode(["the"])[0])
    rest = choice["ids"][given:]
    end = rest.index(eos) if eos in rest else len(rest)
    assert choice["text"] == small.tokenizer.decode([rest[:end]])[0]
    assert choice["finish_reason"] == ("stop" if eos in rest else "length")
    letter = choice["text"][2]
    (cut,) = client.draw("completions", prompt="the", seed=1, steps=STEPS, stop=["zzz", letter])
    assert cut["text"] == choice["text"][: choice["text"].index(letter)]
    assert (cut["finish_reason"], cut["ids"]) == ("stop", choice["ids"])


def test_request_without_seed_returns_the_seed_that_repeats_it(client: Client) -> None:
    status, found = client.post("completions", max_tokens=6, steps=STEPS)
    assert status == 200
    again = client.draw("completions", max_tokens=6, steps=STEPS, seed=found["seed"])
    assert again == found["choices"]
    assert found["usage"] == {"prompt_tokens": 0, "completion_tokens": 6, "total_tokens": 6}


def test_conditions_of_the_requests_of_a_batch_may_differ(labelled: Run) -> None:
    engine = RunEngine(labelled)
    rows: list[Row] = []
    expected = []
    for kind in (0, 1, 0):
        options = SamplingOptions(None, (), 4, {"kind": kind}, 1.5)
        rows += engine.make_rows(engine.encode_prompts([""], None), kind, options)
        expected += labelled.sample(
            1, prompt="", seed=kind, steps=4, conditions={"kind": kind}, guidance=1.5
        )
    assert len({row.key for row in rows}) == 1
    drawn = engine.draw(rows, lambda step, states: None)
    assert [row.ids for row in drawn] == [sample["ids"] for sample in expected]


# ---------------------------------------------------------------------- batches


def draw_rows(engine: RunEngine, rows: list[Row]) -> list[tuple[Drawn, list[list[int]]]]:
    """Return the samples of a batch, and their states after each step."""
    states: list[list[list[int]]] = [[] for _ in rows]

    def keep(step: int, read: Any) -> None:
        for number in range(len(rows)):
            states[number].append(read(number))

    return list(zip(engine.draw(rows, keep), states))


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "psi"])
def test_row_does_not_depend_on_the_other_rows_of_its_batch(small: Run, sampler: str) -> None:
    """Rows with other seeds, prompts and lengths; all states after all steps are compared."""
    engine = RunEngine(small)
    options = SamplingOptions(sampler, (), STEPS, None, None)
    rows: list[Row] = []
    for seed, (text, room) in enumerate(
        [("the old", 5), ("", 12), ("the red cat sat", 2), ("x", 1), ("the", 7)]
    ):
        rows += engine.make_rows(engine.encode_prompts([text], room), seed, options)
    alone = [draw_rows(engine, [row])[0] for row in rows]
    for batch in ([0, 1], [4, 3, 2, 1, 0]):
        found = draw_rows(engine, [rows[number] for number in batch])
        for number, (drawn, states) in zip(batch, found):
            expected, expected_states = alone[number]
            assert drawn == expected
            # a batch runs until its slowest row ends
            assert states[: len(expected_states)] == expected_states


def test_hidden_states_of_a_row_have_equal_bits_in_every_batch(small: Run) -> None:
    """On a CPU with one thread, the network rounds a row in the same way in every batch."""
    denoiser = small.denoiser.eval()
    ids = torch.arange(5 * 24).reshape(5, 24) % small.vocabulary.num_tokens
    times = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).unsqueeze(1).expand(5, 24)

    def hidden(rows: slice) -> torch.Tensor:
        clean = torch.zeros_like(ids[rows], dtype=torch.bool)
        with torch.no_grad():
            found = denoiser.hidden_states(Noisy(ids[rows], times[rows], clean), UNPADDED)
        return found.reshape(len(clean), -1)

    whole = hidden(slice(0, 5))
    for row in range(5):
        assert torch.equal(hidden(slice(row, row + 1))[0], whole[row])
        assert torch.equal(hidden(slice(row, row + 2))[0], whole[row])


@pytest.fixture(scope="module")
def autoregressive(place: Path) -> Run:
    Path("served_ar.toml").write_text(
        make_autoregressive_recipe().replace('"small"', '"served_ar"')
    )
    settings = [*AUTOREGRESSIVE, "train.steps=2", "data.length=12"]
    api.run("served_ar.toml", settings=settings)
    return api.load(place / "runs/served_ar")


def test_autoregressive_run_is_served_from_left_to_right(autoregressive: Run) -> None:
    run = autoregressive
    with serve(run, batch=4) as client:
        choices = client.draw("completions", prompt="the", n=3, seed=5)
        events = client.stream("completions", prompt="the", max_tokens=4, seed=5)
        status, found = client.post("infill", text="the [MASK:2] sat")
    expected = run.sample(3, prompt="the", seed=5)
    assert [choice["ids"] for choice in choices] == [sample["ids"] for sample in expected]
    steps = [event["choices"][0] for event in events if "edits" in event["choices"][0]]
    positions = [edit["position"] for step in steps for edit in step["edits"]]
    assert positions == sorted(positions)
    assert len(steps) == 1 + 4  # the prompt, and one token per step
    assert (status, found["error"]["param"]) == (400, "text")
    assert "works from left to right" in found["error"]["message"]


# ---------------------------------------------------------------------- streams


def replay(events: list[dict[str, Any]], index: int) -> list[int | None]:
    """Apply all edits of one choice, and return its token ids."""
    ids: list[int | None] = []
    for event in events:
        (choice,) = event["choices"]
        if choice["index"] != index:
            continue
        if choice.get("step") == 0:
            ids = [None] * choice["positions"]
        for edit in choice.get("edits", ()):
            ids[edit["position"]] = edit["id"]
    return ids


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "the old", "max_tokens": 9, "n": 2}),
        ("infill", {"text": "the [MASK:4] sat"}),
    ],
)
def test_edits_of_a_stream_give_the_sample(client: Client, path: str, body: Any) -> None:
    plain = client.draw(path, seed=3, steps=STEPS, **body)
    events = client.stream(path, seed=3, steps=STEPS, **body)
    for choice in plain:
        assert replay(events, choice["index"]) == choice["ids"]
    # a client of the API appends the texts of the events
    for choice in plain:
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1] == choice
        steps = [part["step"] for part in own[:-1]]
        assert steps == list(range(len(steps)))
    assert events[-1]["usage"]["completion_tokens"] > 0


def test_stream_shows_inner_nodes_of_the_tree(client: Client) -> None:
    events = client.stream("completions", prompt="the", seed=3, steps=STEPS)
    edits = [edit for event in events for edit in event["choices"][0].get("edits", ())]
    nodes = [edit for edit in edits if "node" in edit]
    assert nodes
    assert all(edit["id"] is None and edit["node"] for edit in nodes)


# ---------------------------------------------------------------------- cancelled requests


@pytest.mark.parametrize("stream", [False, True])
def test_closed_connection_stops_the_batch(client: Client, stream: bool) -> None:
    client.wait_until_idle()  # the batch of the previous test may not have ended yet
    counts = client.server.scheduler.counts
    before = counts.stopped
    connection = client.open("completions", steps=1024, n=4, stream=stream)
    end = time.monotonic() + SOON
    while not client.server.scheduler.running:
        assert time.monotonic() < end
        time.sleep(0.002)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    client.wait_until_idle()
    assert counts.stopped == before + 1
    assert client.draw("completions", max_tokens=1, steps=1)


def test_timeout_is_an_error_and_ends_the_work(small: Run) -> None:
    with serve(small, timeout=0.05) as client:
        status, found = client.post("completions", steps=1024, n=8)
        assert (status, found["error"]["code"]) == (504, "timeout")
        client.wait_until_idle()
        assert client.server.scheduler.counts.drawn == 0


def test_clients_that_share_the_server_get_their_own_results(client: Client, small: Run) -> None:
    """60 requests of 8 clients, some of which close the connection."""
    expected = {
        (text, seed): small.sample(1, infill=f"{text}[MASK:4]", seed=seed, steps=4)[0]["ids"]
        for text in ("the old", "the red cat", "x")
        for seed in range(5)
    }
    cases = list(expected) * 4
    errors: list[str] = []
    threads = threading.active_count()
    batches = client.server.scheduler.counts.batches

    def work(number: int) -> None:
        for case, (text, seed) in enumerate(cases[number::8]):
            body: dict[str, Any] = {"prompt": text, "seed": seed, "max_tokens": 4, "steps": 4}
            try:
                if case % 4 == 3:
                    client.open("completions", **body).close()
                    continue
                if case % 4 == 2:
                    ids = replay(client.stream("completions", **body), 0)
                else:
                    ids = client.draw("completions", **body)[0]["ids"]
            except Exception as error:
                errors.append(f"{body}: {error!r}")
                continue
            if ids != expected[text, seed]:
                errors.append(f"{body}: {ids} instead of {expected[text, seed]}")

    clients = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(SOON)
    assert not any(thread.is_alive() for thread in clients)
    assert errors == []
    client.wait_until_idle()
    assert threading.active_count() == threads
    # requests shared batches
    assert client.server.scheduler.counts.batches - batches < len(cases)


# ---------------------------------------------------------------------- refusals


def test_full_queue_is_answered_with_status_429(small: Run) -> None:
    with serve(small, batch=1, queue=2, choices=2) as client:
        first = client.open("completions", steps=1024, n=2)
        end = time.monotonic() + SOON
        while not client.server.scheduler.running:
            assert time.monotonic() < end
        connection = client.open("completions", n=2)
        response = connection.getresponse()
        assert (response.status, response.getheader("retry-after")) == (429, "1")
        assert json.loads(response.read())["error"]["code"] == "queue_full"
        connection.close()
        first.close()


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"prompt": "the", "max_tokens": 24}, "max_tokens", "at most 23; got 24"),
        ("completions", {"prompt": "a" * 24}, "prompt", "leaves no position"),
        ("completions", {"prompt": "a" * 25}, "prompt", "a text of 25 tokens"),
        ("completions", {"prompt": "\ud800"}, "prompt", "surrogate"),
        ("completions", {"prompt": "the [MASK:3]"}, "prompt", "field text of /v1/infill"),
        ("completions", {"logprobs": 5}, "logprobs", "no log-probabilities"),
        ("completions", {"conditions": {"kind": 1}}, "conditions", "reads no conditions"),
        ("completions", {"guidance": 2}, "guidance", "needs a condition"),
        ("completions", {"sampler": "left_to_right"}, "sampler", "needs a model without a process"),
        ("infill", {"text": "the cat"}, "text", "must have a gap"),
        ("infill", {"text": "[MASK:99]"}, "text", "a gap of 99 tokens"),
        ("infill", {"text": "[MASK]"}, "text", "written [MASK:N]"),
    ],
)
def test_bad_request_names_the_field(
    client: Client, path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    status, found = client.post(path, **body)
    error = found["error"]
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]


def send(client: Client, method: str, path: str, data: bytes, kind: str) -> tuple[int, str]:
    connection = client.connect()
    connection.request(method, path, data, {"Content-Type": kind})
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    return response.status, found["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "data", "kind", "status", "message"),
    [
        ("POST", "/v1/infill", b"{}", "text/plain", 415, "must be application/json"),
        ("POST", "/v1/infill", b"x" * 5000, "application/json", 413, "at most 4096 bytes"),
        ("POST", "/v1/infill", b"x", "application/json", 400, "must be a JSON object"),
        ("GET", "/v1/infill", b"", "application/json", 405, "needs the method POST"),
        ("GET", "/v2", b"", "application/json", 404, "The endpoints are /v1/completions"),
        ("POST", "/v1/chat/completions", b"{}", "application/json", 404, "no chat template"),
    ],
)
def test_requests_that_are_no_request_of_the_api_are_refused(
    client: Client, method: str, path: str, data: bytes, kind: str, status: int, message: str
) -> None:
    found = send(client, method, path, data, kind)
    assert found[0] == status
    assert message in found[1]


def test_body_that_does_not_arrive_is_refused(client: Client) -> None:
    connection = client.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "10")
    connection.endheaders()
    assert connection.getresponse().status == 408
    connection.close()


def test_page_has_no_external_resources(client: Client) -> None:
    status, page = client.get("/")
    assert status == 200
    assert "<textarea" in page
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|innerHTML""", page)


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("--host", "192.0.2.1"), ("--host: must be an address of this machine", "192.0.2.1")),
        (("--host", "no such host"), ("--host: must be an address of this machine",)),
        (("--port", "70000"), ("--port", "65535")),
        (("--batch", "0"), ("--batch",)),
    ],
)
def test_serve_command_refuses_wrong_options(
    place: Path, ddiff: Command, arguments: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    assert is_refusal(ddiff("serve", "runs/small", "--port", "0", *arguments), *messages)


def test_serve_command_refuses_a_port_in_use(place: Path, ddiff: Command, client: Client) -> None:
    result = ddiff("serve", "runs/small", "--port", str(client.port))
    assert is_refusal(result, f"127.0.0.1:{client.port} is in use by another program")


def test_serve_command_refuses_a_missing_run(place: Path, ddiff: Command) -> None:
    assert is_refusal(ddiff("serve", "runs/none", "--port", "0"), "runs/none")


def test_serve_command_answers_and_stops_at_ctrl_c(place: Path, ddiff: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers: list[int] = []

    def ask_and_interrupt() -> None:
        client = Client(port, cast(RunServer, None))
        end = time.monotonic() + SOON
        while time.monotonic() < end:
            try:
                answers.append(client.post("completions", max_tokens=2)[0])
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=ask_and_interrupt)
    other.start()
    result = ddiff("serve", "runs/small", "--port", str(port), "--host", "127.0.0.1")
    other.join(SOON)
    assert answers == [200]
    assert result.code == 0
    assert result.out == (
        f"runs/small: serving on http://127.0.0.1:{port} (Ctrl-C stops the server)\n"
    )
    assert result.err == "ddiff serve: stopped\n"


def test_warning_is_printed_if_other_machines_can_reach_the_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for host, is_warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        with open_port(host, 0) as listener:
            print_start("runs/small", listener, host)
        assert ("no passwords" in capsys.readouterr().err) == is_warned


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(ArgumentError, match=r"uvicorn must be.*discrete-diffusion\[serve\]"):
        command.require_packages()


# ---------------------------------------------------------------------- docs/serve.md

PAGE = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^    curl ((?:.*\\\n)*.*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_curl_example_of_the_page_succeeds(client: Client, example: str) -> None:
    words = shlex.split(example.replace("\\\n", " "))
    url = next(word for word in words if word.startswith("http://127.0.0.1:8000"))
    path = url.removeprefix("http://127.0.0.1:8000")
    if "-d" not in words:
        assert client.get(path)[0] == 200
        return
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    body = json.loads(words[words.index("-d") + 1])
    if body.get("stream"):
        assert client.stream(path.removeprefix("/v1/"), **body)
    else:
        assert client.draw(path.removeprefix("/v1/"), **body)


def test_page_has_an_example_of_every_endpoint() -> None:
    text = " ".join(EXAMPLES)
    paths = ("/v1/completions", "/v1/infill", "/v1/models", "/health")
    assert [path for path in paths if path not in text] == []
