"""`ddiff eval --data` and `--until`: other texts, more draws, and impossible results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command, is_refusal
from small import CORPUS
from tiny_run import files

import ddiff as api
from ddiff.errors import DataError
from ddiff.evaluation.protocols import PROTOCOLS, HubText, Protocol
from ddiff.runs.evaluation_report import find_impossible
from ddiff.runs.given_texts import check_bytes, count_lossy_texts, name_files

EVAL = ("eval", "runs/tiny")
TEXT = "the old cat saw a dog\nna\u00efve caf\u00e9s, \u2018quoted\u2019\n" + CORPUS[:300]


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def test_eval_of_files_counts_the_bytes_of_the_text_and_keeps_evaluation_json(
    run_dir: Path, ddiff: Command
) -> None:
    Path("my text.txt").write_text(TEXT)
    before = files(run_dir)
    answer = ddiff(*EVAL, "--data", "my text.txt", "--split", "line")
    assert answer.code == 0, answer.err
    found = read("runs/tiny/evaluation-my_text.json")
    assert {name: files(run_dir)[name] for name in before} == before
    lines = [line for line in TEXT.split("\n") if line.strip()]
    num_bytes = len("".join(lines).encode())
    nats = found["nelbo_nats_per_token"] * found["tokens"]
    assert found["documents"] == len(lines)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)
    assert found["figures"]["nelbo"]["protocol"] == "my_text"
    assert found["weights"] == "trained"
    assert found["protocol"]["texts_that_the_tokenizer_changes"] == 0


@pytest.mark.parametrize("more", [(), ("--generate",)], ids=["bound", "samples"])
def test_split_without_texts_is_refused(
    more: tuple[str, ...], run_dir: Path, ddiff: Command
) -> None:
    before = files(run_dir)
    assert is_refusal(ddiff(*EVAL, "--split", "line", *more), "--split", "--data")
    assert files(run_dir) == before


def test_eval_of_the_recipe_of_the_run_gives_the_results_of_the_run(
    run_dir: Path, ddiff: Command
) -> None:
    answer = ddiff(*EVAL, "--data", "tiny.toml", "--out", "again.json")
    assert answer.code == 0, answer.err
    own, again = read("runs/tiny/evaluation.json"), read("again.json")
    for key in ("nelbo_nats_per_token", "interval", "bits_per_byte", "terms_nats_per_token"):
        assert again[key] == own[key], key


def test_evaluation_of_several_files_does_not_replace_that_of_the_first(
    run_dir: Path, ddiff: Command
) -> None:
    Path("first.txt").write_text(TEXT)
    Path("second.txt").write_text(CORPUS[:200])
    assert ddiff(*EVAL, "--data", "first.txt").code == 0
    answer = ddiff(*EVAL, "--data", "first.txt", "--data", "second.txt")
    assert answer.code == 0, answer.err
    single = read("runs/tiny/evaluation-first.json")
    several = read("runs/tiny/evaluation-first-second.json")
    assert (single["documents"], several["documents"]) == (1, 2)
    assert "1 document" in ddiff(*EVAL, "--data", "second.txt").out


def test_name_of_many_files_has_the_first_and_the_number_of_the_others() -> None:
    assert name_files(["data/a.txt", "b.txt", "c.txt"]) == "a-b-c"
    assert name_files(["data/a.txt", "b.txt", "c.txt", "d.txt"]) == "a-and-3-more"


def test_setting_without_its_table_is_refused_with_the_full_name(
    run_dir: Path, ddiff: Command
) -> None:
    answer = ddiff(*EVAL, "--set", "steps=4")
    assert is_refusal(answer, "sample.steps=4")


def test_run_with_other_evaluations_may_be_trained_again(run_dir: Path, ddiff: Command) -> None:
    Path("a.txt").write_text(TEXT)
    assert ddiff(*EVAL, "--data", "a.txt").code == 0
    assert ddiff("run", "tiny.toml", "--fresh").code == 0
    assert not (run_dir / "evaluation-a.json").exists()


def test_protocol_and_published_evaluation_have_their_own_names(
    run_dir: Path, ddiff: Command
) -> None:
    Path("ptb.test.txt").write_text("the old cat did n't see a dog\n" * 8)
    options = (*EVAL, "--data", "ptb.test.txt", "--protocol", "ptb")
    assert ddiff(*options).code == 0
    assert ddiff(*options, "--published").code == 0
    assert ddiff(*options, "--published", "--program", "2310.16834").code == 0
    ours = read("runs/tiny/evaluation-ptb.json")
    theirs = read("runs/tiny/evaluation-published-2406.07524-ptb.json")
    others = read("runs/tiny/evaluation-published-2310.16834-ptb.json")
    assert ours["figures"]["nelbo"]["protocol"] == "ptb"
    assert "nelbo" not in theirs["figures"]
    assert theirs["figures"]["published"]["protocol"] == "published 2406.07524 ptb"
    assert theirs["protocol"]["window"] == [1e-3, 1.0]
    assert theirs["protocol"]["program"]["has_block_marks"]
    assert not others["protocol"]["program"]["has_block_marks"]
    assert theirs["bits_per_byte"] is None
    size = len(b"the old cat didn't see a dog") * 8
    nats = ours["nelbo_nats_per_token"] * ours["tokens"]
    assert ours["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)


LINES = ["the old cat did n't see a dog", " ", "it 's a dog"]


def hub_copy(folder: Path, name: str) -> Protocol:
    """Return a protocol whose hub data set is a local folder, which `datasets` reads alike."""
    protocol = PROTOCOLS[name]
    folder.mkdir()
    rows = [json.dumps({protocol.hub.column: line, "number": 1}) + "\n" for line in LINES]
    (folder / f"{protocol.hub.split}.jsonl").write_text("".join(rows))
    hub = HubText(str(folder), None, protocol.hub.split, protocol.hub.column)
    return replace(protocol, hub=hub)


@pytest.mark.parametrize("name", ["ptb", "wikitext2"])
def test_test_set_of_the_hub_gives_the_results_of_local_files(
    name: str, run_dir: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = hub_copy(Path("folder"), name)
    monkeypatch.setitem(PROTOCOLS, name, copy)  # type: ignore[arg-type]
    answer = ddiff(*EVAL, "--data", name, "--out", "hub.json")
    assert answer.code == 0, answer.err
    Path("lines.txt").write_text("\n".join(LINES) + "\n")
    table = f"folder/{copy.hub.split}.jsonl"
    for file in ("lines.txt", table):
        answer = ddiff(*EVAL, "--data", file, "--protocol", name, "--out", "file.json")
        assert answer.code == 0, answer.err
        hub, local = read("hub.json"), read("file.json")
        for key in ("nelbo_nats_per_token", "tokens", "bits_per_byte", "protocol", "figures"):
            assert hub[key] == local[key], key
    assert hub["documents"] == (2 if name == "ptb" else 1)
    assert hub["protocol"]["name"] == name


def test_missing_test_set_of_the_hub_names_the_local_files_that_replace_it(
    run_dir: Path, ddiff: Command
) -> None:
    answer = ddiff(*EVAL, "--data", "lm1b")
    assert is_refusal(answer, "billion-word-benchmark/lm1b")
    assert "--data FILE --protocol lm1b" in " ".join(answer.err.split())
    assert "hf download" in answer.err


def test_until_adds_draws_until_the_interval_is_narrow(run_dir: Path, ddiff: Command) -> None:
    answer = ddiff(*EVAL, "--until", "0.5", "--out", "wide.json")
    assert answer.code == 0, answer.err
    wide = read("wide.json")
    assert ddiff(*EVAL, "--until", "0.2", "--out", "narrow.json").code == 0
    narrow = read("narrow.json")
    for found, until in ((wide, 0.5), (narrow, 0.2)):
        low, high = found["monte_carlo_interval"]
        assert (high - low) / 2 <= until
        assert found["protocol"]["until"] == until
    assert narrow["protocol"]["draws"] > wide["protocol"]["draws"] >= 4
    assert "after" in answer.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--data", "missing.txt"), "missing.txt"),
        (("--data", "empty.txt"), "there is no text in empty.txt"),
        (("--data", "tiny.toml", "--data", "a.txt"), "one recipe"),
        (("--protocol", "ptb"), "--data"),
        (("--published",), "--data"),
        (("--data", "a.txt", "--program", "2406.07524"), "--published"),
        (("--data", "a.txt", "--published", "--program", "1"), "2406.07524"),
        (("--data", "ptb", "--protocol", "lm1b"), "--data FILE --protocol ptb"),
        (("--data", "ptb", "--data", "a.txt"), "--data FILE --protocol ptb"),
        # no network in tests
        (("--data", "ptb"), "--data FILE --protocol ptb"),
        (("--data", "a.txt", "--protocol", "ptbb"), "ptb"),
        (("--until", "0"), "--until"),
        (("--until", "nan"), "--until"),
    ],
)
def test_eval_refuses_wrong_options_and_writes_nothing(
    options: tuple[str, ...], expected: str, run_dir: Path, ddiff: Command
) -> None:
    Path("empty.txt").write_text("\n\n")
    Path("a.txt").write_text(TEXT)
    before = files(run_dir)
    assert is_refusal(ddiff(*EVAL, *options), expected)
    assert files(run_dir) == before


def test_bytes_that_do_not_add_up_are_refused(run_dir: Path) -> None:
    run = api.load(run_dir)
    rows = run.data.validation_rows
    texts = list(run.data.documents.validation["text"])
    check_bytes(texts, rows)
    with pytest.raises(DataError, match=r"claim \d+ bytes, but the text has \d+ bytes"):
        check_bytes([*texts, "more"], rows)


def test_texts_that_a_tokenizer_changes_are_counted(run_dir: Path) -> None:
    tokenizer = api.load(run_dir).tokenizer

    class Lower:
        encode = staticmethod(lambda texts: tokenizer.encode([text.lower() for text in texts]))
        decode = tokenizer.decode

    assert count_lossy_texts(["A cat", "a cat"], tokenizer) == 0
    assert count_lossy_texts(["A cat", "a cat"], Lower()) == 1  # type: ignore[arg-type]


def test_impossible_result_is_shown_by_eval_compare_and_report(
    run_dir: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "Impossible result: below the entropy."
    monkeypatch.setattr("ddiff.runs.evaluation_report.find_impossible", lambda *_: warning)
    answer = ddiff(*EVAL)
    assert answer.code == 0
    assert warning in answer.err
    assert read("runs/tiny/evaluation.json")["warning"] == warning
    assert warning in ddiff("compare", "runs/tiny").out
    assert warning in Path("compare.md").read_text()
    assert ddiff("report", "runs/tiny", "--draws", "0", "--out", "a.html").code == 0
    assert warning in Path("a.html").read_text()


def test_bound_significantly_below_the_entropy_is_called_impossible(run_dir: Path) -> None:
    evaluation = api.load(run_dir).nelbo(["the old cat", "a dog saw it"], draws=2)
    narrow = replace(evaluation, nelbo_nats_per_token=1.0, interval=(0.9, 1.1))
    assert find_impossible(narrow, None) is None
    assert find_impossible(narrow, 1.15) is None
    warning = find_impossible(narrow, 1.3)
    assert warning is not None
    assert "below the entropy rate 1.3000" in warning
