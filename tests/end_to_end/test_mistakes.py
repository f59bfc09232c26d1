"""Bad input through the command line: one paragraph that names what is wrong, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CORPUS, RECIPE

import ddiff as api
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import DdiffError
from ddiff.training.checkpoint import Checkpoints

PROGRESS = re.compile(r"[a-z ]+: \d+/\d+ ")
Command = Callable[..., tuple[int, str, str]]
SHORT = ("--set", "train.steps=4", "--set", "train.checkpoint_every=2")


def refused(answer: tuple[int, str, str], *expected: str) -> str:
    """The message of a mistake that was answered as it should be."""
    code, out, err = answer
    shown = [line for line in err.splitlines() if not PROGRESS.match(line)]
    message = "\n".join(shown)
    assert (code, out) == (2, ""), message
    assert "Traceback" not in message
    assert len(shown) == 1, message
    assert [text for text in expected if text not in message] == [], message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FLAT = ("--set", 'vocabulary={kind="flat"}')
MISTAKES = {
    "unknown key": (("--set", "process.gama=2"), ('[process] has no key "gama"', '"gamma"')),
    "unknown table": (("--set", "proces.gamma=2"), ("proces", "process")),
    "wrong type": (("--set", 'train.steps="many"'), ("[train] steps", "many")),
    "zero steps": (("--set", "train.steps=0"), ("[train] steps", "0")),
    "negative warm-up": (("--set", "train.warmup=-1"), ("[train] warmup", "-1")),
    "batch that does not divide": (("--set", "train.accumulate=3"), ("batch = 4, accumulate = 3",)),
    "missing file": (("--set", 'data.files=["nowhere.txt"]'), ("nowhere.txt",)),
    "xi over one": (("--set", "process.xi=1.5"), ("[process] xi", "1.5")),
    "xi of zero": (("--set", "process.xi=0.0"), ("[process] xi", "0")),
    "two clocks": (("--set", "process.gamma=1.0", "--set", "process.rates=[1.0, 2.0]"), ("gamma and rates",)),
    "too many rates": (("--set", "process.rates=[1.0, 2.0, 3.0]"), ("3", "2")),
    "xi for other levels": (("--set", "process.xi=[0.9, 0.8, 0.7]"), ("xi", "2 levels", "0.7")),
    "zero clusters": (("--set", "vocabulary.sizes=[0]"), ("0",)),
    "more clusters than words": (("--set", "vocabulary.sizes=[4000]"), ("4000", "270")),
    "levels that grow": (("--set", "vocabulary.sizes=[4, 9]"), ("9",)),
    "tree process on words alone": (FLAT, ("hdlm", "clusters")),
    "flat process on a tree": (("--set", 'process={kind="mdlm"}'), ("mdlm", '"flat"')),
    "masks for a vocabulary without": (
        ("--set", 'vocabulary={kind="flat", mask=false}', "--set", 'process={kind="mdlm"}'),
        ("mdlm",),
    ),
    "heads that do not divide": (("--set", "denoiser.heads=3"), ("width 16 and heads 3",)),
    "window inside out": (("--set", "evaluate.window=[0.9, 0.1]"), ("window", "0.9")),
    "times inside out": (("--set", 'objective.times={kind="flat", start=0.5, stop=0.4}'), ("0.5", "0.4")),
    "unknown component": (("--set", 'process={kind="hdml"}'), ("hdml", "hdlm")),
    "unknown device": (("--set", 'backend.device="tpu9"'), ("tpu9",)),
    "several processes": (("--set", "backend.processes=4"), ("4",)),
    "too small an alphabet": (("--set", "tokenizer.size=12"), ("[tokenizer] size", "257")),
    "missing embeddings": (("--set", 'vocabulary.source="none.npy"'), ("none.npy",)),
    "symbols of another length": (("--set", 'tokenizer={kind="alphabet"}'), ("length",)),
    "paper weights on three levels": (
        ("--set", "vocabulary.sizes=[8, 3]", "--set", 'objective.loss="empirical"'),
        ("empirical", "2 levels"),
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_recipe_that_cannot_be_run_says_why_and_writes_nothing(name: str, folder: Path, ddiff: Command) -> None:
    settings, expected = MISTAKES[name]
    refused(ddiff("run", "small.toml", *settings), *expected)
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "small.toml"]


CORPORA = {
    "empty": (b"", ("corpus.txt",)),
    "blank": (b"\n \n\n", ("corpus.txt",)),
    "not text": (b"the cat\n\xff\xfe sat\n" * 30, ("corpus.txt", "UTF-8")),
    "NUL bytes": (b"the cat sat\n" * 30 + b"the \x00 hat\n", ("corpus.txt", "NUL")),
}


@pytest.mark.parametrize("name", list(CORPORA))
def test_a_corpus_that_is_no_text_says_why_and_writes_nothing(name: str, folder: Path, ddiff: Command) -> None:
    content, expected = CORPORA[name]
    Path("corpus.txt").write_bytes(content)
    refused(ddiff("run", "small.toml"), *expected)
    assert not Path("runs").exists()


def test_embeddings_with_nan_make_no_clusters(folder: Path, ddiff: Command) -> None:
    np.save("embeddings.npy", np.full((270, 4), np.nan, np.float32))
    refused(ddiff("run", "small.toml", "--set", 'vocabulary.source="embeddings.npy"'), "embeddings.npy")
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_directory_that_is_no_run_is_named(command: str, folder: Path, ddiff: Command) -> None:
    refused(ddiff(command, "."), "not a run directory", "recipe.toml")
    refused(ddiff(command, "nowhere"), "nowhere", "not a run directory")
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "small.toml"]


def test_a_mistake_with_fresh_leaves_the_old_run_as_it_was(run_dir: Path, ddiff: Command) -> None:
    before = files(run_dir)
    refused(ddiff("run", "small.toml", "--fresh", "--set", "vocabulary.sizes=[4000]"), "4000")
    refused(ddiff("run", "small.toml", "--fresh", "--set", 'process={kind="mdlm"}'), "mdlm")
    assert files(run_dir) == before


# ---------------------------------------------------------------------- a run that was damaged afterwards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run beside its recipe and corpus, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        Path("small.toml").write_text(RECIPE)
        Path("corpus.txt").write_text(CORPUS)
        api.run("small.toml", settings=["train.steps=4", "train.checkpoint_every=2"])
    return folder / "runs"


@pytest.fixture
def run_dir(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, "runs")
    return Path("runs/small")


def newest(run_dir: Path, name: str) -> Path:
    return run_dir / "checkpoints" / f"step_{Checkpoints(run_dir / 'checkpoints').steps()[-1]:08d}" / name


COMMANDS = {
    "run": ("run", "small.toml", *SHORT),
    "more steps": ("run", "small.toml", *SHORT, "--set", "train.steps=6"),
    "eval": ("eval", "runs/small"),
    "sample": ("sample", "runs/small"),
}


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "complete.json"])
def test_a_truncated_checkpoint_is_named_and_left_alone(file: str, name: str, run_dir: Path, ddiff: Command) -> None:
    damaged = newest(run_dir, file)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    before = files(run_dir)
    refused(ddiff(*COMMANDS[name]), file, "step_00000004", "go on from step 2")
    assert files(run_dir) == before


@pytest.mark.parametrize("file", ["recipe.toml", "environment.json", "tokenizer.json", "vocabulary.safetensors"])
@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_truncated_file_of_the_run_is_named(file: str, command: str, run_dir: Path, ddiff: Command) -> None:
    damaged = run_dir / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    before = files(run_dir)
    refused(ddiff(command, "runs/small"), file)
    assert files(run_dir) == before


@pytest.mark.parametrize("file", ["recipe.toml", "environment.json", "evaluation.json", "samples.jsonl"])
def test_a_truncated_file_of_the_run_is_named_when_the_run_goes_on(file: str, run_dir: Path, ddiff: Command) -> None:
    damaged = run_dir / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    refused(ddiff(*COMMANDS["run"]), file)


def test_a_run_without_a_checkpoint_cannot_be_read(run_dir: Path, ddiff: Command) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    refused(ddiff("eval", "runs/small"), "no complete checkpoint")


def poison(run_dir: Path) -> None:
    """NaN in the head, as a checkpoint of its own that is whole."""
    checkpoints = Checkpoints(run_dir / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None
    name = next(name for name in newest.model if name.endswith("head.bias"))
    newest.model[name] = torch.full_like(newest.model[name], torch.nan)
    checkpoints.save(newest.step, newest.model, newest.state)


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_weights_with_nan_neither_score_nor_speak(command: str, run_dir: Path, ddiff: Command) -> None:
    poison(run_dir)
    before = files(run_dir)
    refused(ddiff(command, "runs/small"), "finite")
    assert files(run_dir) == before


def test_training_that_only_gives_nan_stops_with_a_reason(run_dir: Path, ddiff: Command) -> None:
    poison(run_dir)
    answer = ddiff("run", "small.toml", *SHORT, "--set", "train.steps=40")
    refused(answer, "not finite in 20 steps in a row", "step 24")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 24)), "each step that did not end in the error"


def test_a_vocabulary_of_another_tokenizer_is_refused(run_dir: Path, ddiff: Command) -> None:
    other = BytePairTokenizer.train(["quite another text, quite another text and its words"] * 9, 270)
    other.save(str(run_dir / "tokenizer.json"))
    for command in ("eval", "sample"):
        refused(ddiff(command, "runs/small"), "another tokenizer", other.fingerprint)
    vocabulary = api.Vocabulary.load(str(run_dir / "vocabulary.safetensors"))
    Path("corpus.txt").write_text("\n".join(f"quite another text, number {i}" for i in range(40)))
    with pytest.raises(DdiffError, match="another tokenizer"):
        api.run("small.toml", vocabulary=vocabulary, settings=['run_dir="runs/other"'])
    assert not Path("runs/other").exists()


def test_weights_of_another_model_are_refused(run_dir: Path, ddiff: Command) -> None:
    text = (run_dir / "recipe.toml").read_text()
    assert "width = 16\n" in text
    (run_dir / "recipe.toml").write_text(text.replace("width = 16\n", "width = 32\n"))
    refused(ddiff("sample", "runs/small"), "another model")


def test_another_corpus_is_not_trained_on_by_accident(run_dir: Path, ddiff: Command) -> None:
    Path("corpus.txt").write_text(Path("corpus.txt").read_text() + "\nand one line more that was not there")
    before = files(run_dir)
    refused(ddiff(*COMMANDS["more steps"]), "--fresh")
    assert files(run_dir) == before


def test_a_damaged_vocabulary_file_of_the_users_own_is_named(run_dir: Path, ddiff: Command) -> None:
    tensors = load_file(run_dir / "vocabulary.safetensors")
    save_file({"something": next(iter(tensors.values()))}, run_dir / "vocabulary.safetensors")
    refused(ddiff("sample", "runs/small"), "vocabulary.safetensors")
