"""User errors on the command line: one paragraph, exit code 2 and no partial file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, read_evaluation
from safetensors.torch import load_file, save_file
from small import working_in

import ddiff as api
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.data.cache import Cache
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import ArgumentError, DdiffError
from ddiff.testing import check_process
from ddiff.training.metrics import MetricsFile, StepRecord
from ddiff.training.tracker import NoTracker

PROGRESS = re.compile(
    r"[a-z ]+: \d+/\d+ |\w+: [\d,]+ parameters in |Resuming from step |All \d+ steps are done"
)
SHORT = ("--set", "train.steps=4", "--set", "train.checkpoint_every=2")


def refused(answer: tuple[int, str, str], *expected: str) -> str:
    """Check that a command failed with one paragraph that contains `expected`; return it.

    `answer` is (exit code, stdout, stderr).
    """
    code, out, err = answer
    shown = [line for line in err.splitlines() if not PROGRESS.match(line)]
    message = "\n".join(shown)
    assert (code, out) == (2, ""), message
    assert "Traceback" not in message
    assert len(shown) == 1, message
    assert [text for text in expected if text not in message] == [], message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


FLAT = ("--set", 'vocabulary={kind="flat"}')
MISTAKES = {
    "unknown key": (("--set", "process.gama=2"), ('[process] has no key "gama"', '"gamma"')),
    "unknown table": (("--set", "proces.gamma=2"), ("proces", "process")),
    "wrong type": (("--set", 'train.steps="many"'), ("[train] steps", "many")),
    "zero steps": (("--set", "train.steps=0"), ("[train] steps", "0")),
    "negative warm-up": (("--set", "train.warmup=-1"), ("[train] warmup", "-1")),
    "batch that does not divide": (("--set", "train.accumulate=3"), ("batch = 4, accumulate = 3",)),
    "missing file": (("--set", 'data.files=["nowhere.txt"]'), ("[data]: ", "nowhere.txt")),
    "xi over one": (("--set", "process.xi=1.5"), ("[process] xi", "1.5")),
    "xi of zero": (("--set", "process.xi=0.0"), ("[process] xi", "0")),
    "two clocks": (
        ("--set", "process.gamma=1.0", "--set", "process.rates=[1.0, 2.0]"),
        ("gamma and rates",),
    ),
    "too many rates": (("--set", "process.rates=[1.0, 2.0, 3.0]"), ("[process]: ", "3", "2")),
    "xi for other levels": (
        ("--set", "process.xi=[0.9, 0.8, 0.7]"),
        ("[process]: ", "xi", "2 levels", "0.7"),
    ),
    "a power that is not used": (
        ("--set", 'process={kind="mdlm", power=2.0}'),
        ("power", 'schedule = "linear"'),
    ),
    "a power that is missing": (
        ("--set", 'process={kind="mdlm", schedule="power"}'),
        ("power", "None"),
    ),
    "zero clusters": (
        ("--set", "vocabulary.sizes=[0]"),
        ("[vocabulary] sizes[0]", "greater than 0"),
    ),
    "more clusters than words": (
        ("--set", "vocabulary.sizes=[4000]"),
        ("[vocabulary]: sizes", "4000", "270"),
    ),
    "levels that grow": (("--set", "vocabulary.sizes=[4, 9]"), ("[vocabulary]: sizes", "9")),
    "tree process on words alone": (FLAT, ("[process]: ", "hdlm", "clusters")),
    "flat process on a tree": (
        ("--set", 'process={kind="mdlm"}'),
        ("[process]: ", "mdlm", '"flat"'),
    ),
    "masks for a vocabulary without": (
        ("--set", 'vocabulary={kind="flat", mask=false}', "--set", 'process={kind="mdlm"}'),
        ("mdlm",),
    ),
    "a sampler that shows windows what they never saw": (
        ("--set", 'objective.times={kind="block", width=4}'),
        ("AncestralSampler", "trained in windows", "blockwise"),
    ),
    "heads that do not divide": (
        ("--set", "denoiser.heads=3"),
        ("[denoiser]: ", "width 16 and heads 3"),
    ),
    "window inside out": (("--set", "evaluate.window=[0.9, 0.1]"), ("window", "0.9")),
    "times inside out": (
        ("--set", 'objective.times={kind="flat", start=0.5, stop=0.4}'),
        ("0.5", "0.4"),
    ),
    "unknown component": (("--set", 'process={kind="hdml"}'), ("hdml", "hdlm")),
    "unknown device": (("--set", 'backend.device="tpu9"'), ("[backend]: device", "tpu9")),
    "device that is not here": (
        ("--set", 'backend.device="cuda:99"'),
        ("[backend]: device", "cuda:99"),
    ),
    "several processes": (("--set", "backend.processes=4"), ("[backend]: ", "4")),
    "too small an alphabet": (("--set", "tokenizer.size=12"), ("[tokenizer] size", "257")),
    "missing embeddings": (
        ("--set", 'vocabulary.source="none.npy"'),
        ("[vocabulary]: ", "none.npy"),
    ),
    "symbols of another length": (("--set", 'tokenizer={kind="alphabet"}'), ("length",)),
    "paper weights on three levels": (
        ("--set", "vocabulary.sizes=[8, 3]", "--set", 'objective.loss="empirical"'),
        ("[objective.loss]: ", "empirical", "2 levels"),
    ),
    "run_dir under a file": (("--set", 'run_dir="corpus.txt/run"'), ("run_dir", "corpus.txt")),
    "run_dir that is a file": (("--set", 'run_dir="corpus.txt"'), ("run_dir", "corpus.txt")),
    "run_dir where nobody writes": (("--set", 'run_dir="/proc/run"'), ("run_dir", "/proc")),
    "name that is a path": (
        ("--set", 'name="../small"'),
        ("the recipe name", "../small", "run_dir"),
    ),
}
ONLY_THE_DATA_TELLS = {"symbols of another length"}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_invalid_recipe_is_refused_with_a_reason_and_no_files(
    name: str, folder: Path, ddiff: Command
) -> None:
    settings, expected = MISTAKES[name]
    refused(ddiff("run", "small.toml", *settings), *expected)
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "small.toml"]


@pytest.mark.parametrize("name", list(MISTAKES))
def test_dry_run_refuses_mistakes_that_are_visible_without_data(
    name: str, folder: Path, ddiff: Command
) -> None:
    settings, expected = MISTAKES[name]
    answer = ddiff("run", "small.toml", "--dry-run", *settings)
    if name in ONLY_THE_DATA_TELLS:
        assert answer[0] == 0
    else:
        refused(answer, *expected)
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "small.toml"]


def test_run_checks_run_directory_before_reading_data(folder: Path, ddiff: Command) -> None:
    Path("corpus.txt").write_bytes(b"\xff\xfe")
    refused(
        ddiff("run", "small.toml", "--set", 'run_dir="small.toml/run"'), "run_dir", "small.toml"
    )


CORPORA = {
    "empty": (b"", ("corpus.txt",)),
    "blank": (b"\n \n\n", ("corpus.txt",)),
    "not text": (b"the cat\n\xff\xfe sat\n" * 30, ("corpus.txt", "UTF-8")),
    "NUL bytes": (b"the cat sat\n" * 30 + b"the \x00 hat\n", ("corpus.txt", "NUL")),
}


@pytest.mark.parametrize("name", list(CORPORA))
def test_corpus_that_is_not_text_is_refused_and_no_file_is_written(
    name: str, folder: Path, ddiff: Command
) -> None:
    content, expected = CORPORA[name]
    Path("corpus.txt").write_bytes(content)
    refused(ddiff("run", "small.toml"), *expected)
    assert not Path("runs").exists()


def test_cluster_command_refuses_embeddings_with_nan(folder: Path, ddiff: Command) -> None:
    np.save("embeddings.npy", np.full((270, 4), np.nan, np.float32))
    refused(
        ddiff("run", "small.toml", "--set", 'vocabulary.source="embeddings.npy"'), "embeddings.npy"
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_commands_print_an_error_that_names_a_directory_that_is_not_a_run(
    command: str, folder: Path, ddiff: Command
) -> None:
    refused(ddiff(command, "."), "not a run directory", "recipe.toml")
    refused(ddiff(command, "nowhere"), "nowhere", "not a run directory")
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "small.toml"]


def test_option_fresh_with_an_invalid_recipe_keeps_the_old_run(
    run_dir: Path, ddiff: Command
) -> None:
    before = files(run_dir)
    refused(ddiff("run", "small.toml", "--fresh", "--set", "vocabulary.sizes=[4000]"), "4000")
    refused(ddiff("run", "small.toml", "--fresh", "--set", 'process={kind="mdlm"}'), "mdlm")
    assert files(run_dir) == before


# ---------------------------------------------------------------------- damaged runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run, which tests copy and damage."""
    folder = tmp_path_factory.mktemp("finished")
    with working_in(folder):
        api.run("small.toml", settings=["train.steps=4", "train.checkpoint_every=2"])
    return folder / "runs"


@pytest.fixture
def run_dir(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, "runs")
    return Path("runs/small")


def newest(run_dir: Path, name: str) -> Path:
    return (
        run_dir
        / "checkpoints"
        / f"step_{Checkpoints(run_dir / 'checkpoints').steps()[-1]:08d}"
        / name
    )


COMMANDS = {
    "run": ("run", "small.toml", *SHORT),
    "more steps": ("run", "small.toml", *SHORT, "--set", "train.steps=6"),
    "eval": ("eval", "runs/small"),
    "sample": ("sample", "runs/small"),
}


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize(
    "file", ["model.safetensors", "manifest.json", "state.json", "complete.json"]
)
def test_commands_print_an_error_that_names_a_truncated_checkpoint_and_delete_nothing(
    file: str, name: str, run_dir: Path, ddiff: Command
) -> None:
    damaged = newest(run_dir, file)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    before = files(run_dir)
    refused(ddiff(*COMMANDS[name]), file, "step_00000004", "resume from step 2")
    assert files(run_dir) == before


@pytest.mark.parametrize(
    "file", ["recipe.toml", "environment.json", "tokenizer.json", "vocabulary.safetensors"]
)
@pytest.mark.parametrize("command", ["eval", "sample"])
def test_eval_and_sample_print_an_error_that_names_a_truncated_run_file(
    file: str, command: str, run_dir: Path, ddiff: Command
) -> None:
    damaged = run_dir / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    before = files(run_dir)
    refused(ddiff(command, "runs/small"), file)
    assert files(run_dir) == before


@pytest.mark.parametrize(
    "file", ["recipe.toml", "environment.json", "evaluation.json", "samples.jsonl"]
)
def test_resume_prints_an_error_that_names_a_truncated_run_file(
    file: str, run_dir: Path, ddiff: Command
) -> None:
    damaged = run_dir / file
    content = damaged.read_bytes()
    damaged.write_bytes(
        content[: content.rindex(b'"')]
    )  # truncated within a string, so that the rest is invalid
    refused(ddiff(*COMMANDS["run"]), file)


def test_data_files_of_mixed_formats_are_refused_before_reading(
    folder: Path, ddiff: Command
) -> None:
    for name in ("a.jsonl", "b.parquet"):
        (folder / name).write_text('{"text": "It rained."}\n')
    corpus = 'data={kind="files", files=["*.jsonl", "*.parquet"], length=16}'
    refused(
        ddiff("run", "small.toml", "--dry-run", "--set", corpus),
        "one of",
        "parquet",
        "files of one format",
    )


def test_load_refuses_a_run_without_checkpoint(run_dir: Path, ddiff: Command) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    refused(ddiff("eval", "runs/small"), "no complete checkpoint")


def test_repeated_run_with_fewer_train_steps_is_refused(run_dir: Path, ddiff: Command) -> None:
    before = files(run_dir)
    for mode in ([], ["--dry-run"]):
        refused(
            ddiff(*COMMANDS["run"], "--set", "train.steps=3", *mode),
            "is a run of 4 steps",
            "train.steps >= 4",
            "`ddiff eval runs/small`",
            "`ddiff sample runs/small`",
            'ddiff.load("runs/small")',
            "--fresh",
        )
    assert files(run_dir) == before


def poison(run_dir: Path) -> None:
    """Put NaN into the head of the newest checkpoint of a run, with a valid checksum."""
    checkpoints = Checkpoints(run_dir / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None
    weights, state = newest.read_weights(), newest.read_state()
    name = next(name for name in weights if name.endswith("head.bias"))
    weights[name] = torch.full_like(weights[name], torch.nan)
    checkpoints.save(newest.step, weights, state)


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_eval_and_sample_refuse_weights_with_nan(
    command: str, run_dir: Path, ddiff: Command
) -> None:
    poison(run_dir)
    before = files(run_dir)
    refused(ddiff(command, "runs/small"), "finite")
    assert files(run_dir) == before


def test_training_fails_if_the_loss_is_nan_in_every_step(run_dir: Path, ddiff: Command) -> None:
    poison(run_dir)
    answer = ddiff("run", "small.toml", *SHORT, "--set", "train.steps=40")
    refused(answer, "not finite in 20 steps in a row", "step 24")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25)), (
        "the failed step must be recorded too"
    )


def test_vocabulary_of_another_tokenizer_is_refused(run_dir: Path, ddiff: Command) -> None:
    other = BytePairTokenizer.train(
        ["quite another text, quite another text and its words"] * 9, 270
    )
    other.save(str(run_dir / "tokenizer.json"))
    for command in ("eval", "sample"):
        refused(ddiff(command, "runs/small"), "another tokenizer", other.fingerprint)
    vocabulary = api.Vocabulary.load(str(run_dir / "vocabulary.safetensors"))
    Path("corpus.txt").write_text("\n".join(f"quite another text, number {i}" for i in range(40)))
    with pytest.raises(DdiffError, match="another tokenizer"):
        api.run("small.toml", vocabulary=vocabulary, settings=['run_dir="runs/other"'])
    assert not Path("runs/other").exists()


def test_resume_refuses_weights_of_another_architecture(run_dir: Path, ddiff: Command) -> None:
    text = (run_dir / "recipe.toml").read_text()
    assert "width = 16\n" in text
    (run_dir / "recipe.toml").write_text(text.replace("width = 16\n", "width = 32\n"))
    refused(ddiff("sample", "runs/small"), "denoiser.width: was 16, is 32", "recipe.toml")


def test_resume_refuses_another_corpus(run_dir: Path, ddiff: Command) -> None:
    Path("corpus.txt").write_text(
        Path("corpus.txt").read_text() + "\nand one line more that was not there"
    )
    before = files(run_dir)
    refused(ddiff(*COMMANDS["more steps"]), "--fresh")
    assert files(run_dir) == before


def test_sample_command_prints_an_error_that_names_a_damaged_vocabulary_file(
    run_dir: Path, ddiff: Command
) -> None:
    tensors = load_file(run_dir / "vocabulary.safetensors")
    save_file({"something": next(iter(tensors.values()))}, run_dir / "vocabulary.safetensors")
    refused(ddiff("sample", "runs/small"), "vocabulary.safetensors")


# ---------------------------------------------------------------------- Python


@pytest.mark.parametrize("settings", ["train.steps=4", {"train.steps": 4}])
def test_run_refuses_settings_that_are_not_a_list_of_texts(settings: Any, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r'settings must be a list .*\["train.steps=200"\]'):
        api.run("small.toml", settings=settings)


def test_nelbo_refuses_a_single_str_and_sample_refuses_count_0(run_dir: Path) -> None:
    run = api.load(run_dir)
    with pytest.raises(ArgumentError, match=r"texts must be a list .*'the cat'"):
        run.nelbo("the cat")
    for wrong in ({"count": 0}, {"count": -1}, {"batch": 0}, {"steps": 0}):
        with pytest.raises(ArgumentError, match="at least 1"):
            run.sample(**wrong)


def test_rate_matrix_accepts_nested_lists_of_numbers_only() -> None:
    vocabulary = api.FlatVocabulary(2, mask=False)
    rates = [[-1.0, 1.0], [2.0, -2.0]]
    t = torch.tensor([0.3], dtype=torch.float64)
    given = [
        api.DenseProcess(vocabulary, matrix) for matrix in (rates, torch.tensor(rates).double())
    ]
    assert torch.equal(*(process.rates(t).dense() for process in given))
    for wrong in ([[-1.0, 1.0], [2.0]], "rates", None):
        with pytest.raises(ArgumentError, match="matrix must be"):
            api.DenseProcess(vocabulary, wrong)  # type: ignore[arg-type]


def test_run_refuses_a_process_class_in_place_of_an_instance() -> None:
    with pytest.raises(ArgumentError, match=r"instance .*DenseProcess"):
        check_process(api.DenseProcess)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_run_raises_on_signal_and_the_same_call_resumes(
    number: int, error: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.steps=4", "train.log_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "log", lambda self, step, metrics: signal.raise_signal(number))
        with pytest.raises(error):
            api.run("small.toml", settings=settings)
    assert Checkpoints(folder / "runs/small/checkpoints").steps()[-1] == 2
    assert not (folder / "runs/small/evaluation.json").exists()
    api.run("small.toml", settings=settings)
    assert Checkpoints(folder / "runs/small/checkpoints").steps()[-1] == 4


def test_full_disk_is_reported_and_the_same_command_resumes(
    folder: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = MetricsFile.append

    def full(file: MetricsFile, record: StepRecord, *figures: Any) -> None:
        if record.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", full)
        refused(ddiff("run", "small.toml", *SHORT), "No space left", "repeat the command")
    assert Checkpoints(folder / "runs/small/checkpoints").steps() == [2]
    assert ddiff("run", "small.toml", *SHORT)[0] == 0
    assert Checkpoints(folder / "runs/small/checkpoints").steps()[-1] == 4


def test_second_process_cannot_write_to_a_run_in_progress(run_dir: Path, ddiff: Command) -> None:
    """A run in progress holds a lock, also against option --fresh, until its process ends."""
    before = files(run_dir)
    code = "from ddiff.runs.directory import lock_run_dir; from pathlib import Path; import time\n"
    code += f"with lock_run_dir(Path({str(run_dir)!r})): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for more in ((), ("--fresh",)):
            refused(
                ddiff("run", "small.toml", *SHORT, *more),
                "being written by another process",
                str(other.pid),
            )
        other.kill()
    assert files(run_dir) == before
    assert ddiff("run", "small.toml", *SHORT)[0] == 0
    assert not (run_dir.parent / ".small.lock").exists()


def test_run_evaluates_again_after_eval_with_other_settings(run_dir: Path, ddiff: Command) -> None:
    first = read_evaluation(run_dir)
    code, out, _ = ddiff("eval", "runs/small", "--set", "evaluate.draws=3")
    assert (code, "Written to runs/small/evaluation.json" in out) == (0, True)
    assert read_evaluation(run_dir) != first
    assert ddiff("run", "small.toml", *SHORT)[0] == 0
    assert read_evaluation(run_dir) == first


def test_error_for_changed_evaluation_keys_suggests_ddiff_eval(
    run_dir: Path, ddiff: Command
) -> None:
    code, _, err = ddiff("run", "small.toml", *SHORT, "--set", "evaluate.draws=3")
    assert code == 2
    assert "evaluate.draws: was 1, is 3" in err
    assert "ddiff eval runs/small" in err
    assert "--fresh" not in err


def test_recipe_that_extends_another_gets_the_name_of_its_own_file(folder: Path) -> None:
    Path("mine.toml").write_text('extends = "small.toml"\n')
    assert api.read_recipe("mine.toml").run_dir == "runs/mine"
    assert api.read_recipe("mine.toml", ["name=other"]).run_dir == "runs/other"


def test_error_for_key_in_wrong_table_suggests_the_correct_table(
    folder: Path, ddiff: Command
) -> None:
    refused(ddiff("run", "small.toml", "--set", "steps=4"), 'Did you mean "train.steps"?')


def test_export_creates_missing_folder(run_dir: Path, ddiff: Command) -> None:
    assert ddiff("export", "runs/small", "new/folder/small.safetensors")[0] == 0
    assert Path("new/folder/small.safetensors").is_file()


def test_tracker_is_closed_after_a_training_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tracker: NoTracker, step: int, metrics: object) -> None:
        raise RuntimeError("the disk is full")

    closed: list[NoTracker] = []
    monkeypatch.setattr(NoTracker, "log", fail)
    monkeypatch.setattr(NoTracker, "close", lambda tracker: closed.append(tracker))
    with pytest.raises(RuntimeError, match="the disk is full"):
        api.run("small.toml", settings=["train.steps=1"])
    assert len(closed) == 1


GENERATED = (
    "--set", 'data={kind="markov", alphabet=4, rows=64, validation=8, length=8}',
    "--set", 'tokenizer={kind="alphabet"}', "--set", 'vocabulary={kind="flat"}',
    "--set", 'process={kind="mdlm"}', "--set", "denoiser.head=tokens",
)  # fmt: skip


def test_evaluation_of_generated_symbols_prints_entropy_rate(folder: Path, ddiff: Command) -> None:
    for command in (("run", "small.toml", *SHORT, *GENERATED), ("eval", "runs/small")):
        code, out, err = ddiff(*command)
        assert code == 0, err
        written = json.loads(Path("runs/small/evaluation.json").read_text())
        assert re.search(rf"entropy rate +{written['entropy_rate_nats_per_symbol']:.4f} ", out), out
    run = api.load("runs/small")
    assert run.nelbo(run.data.documents.validation["text"][:2], draws=1).bits_per_byte is None


def test_evaluation_of_text_prints_bits_per_byte_but_no_entropy_rate(
    run_dir: Path, ddiff: Command
) -> None:
    assert api.load(run_dir).nelbo(["the old cat"], draws=1).bits_per_byte is not None
    assert "entropy rate" not in ddiff("eval", "runs/small")[1]


# ---------------------------------------------------------------------- the cache


def test_cache_leftovers_of_killed_builds_are_removed_after_a_day(tmp_path: Path) -> None:
    abandoned, under_way = (tmp_path / "rows" / f"{name}.partial-0" for name in ("old", "new"))
    for partial in (abandoned, under_way):
        partial.mkdir(parents=True)
        (partial / "file").write_text("half")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (
        abandoned / "file",
        abandoned,
        under_way,
    ):  # the file of the running build stays new
        os.utime(path, (two_days_ago, two_days_ago))
    Cache(tmp_path).load_or_build("rows", {}, lambda place: None)
    assert (abandoned.exists(), under_way.exists()) == (False, True)


def test_run_without_checkpoint_accepts_a_changed_recipe(folder: Path, ddiff: Command) -> None:
    """A run that was killed before its first checkpoint can be repeated with another recipe."""
    (folder / "runs/small").mkdir(parents=True)
    (folder / "runs/small/recipe.toml").write_text(api.read_recipe("small.toml").to_toml())
    refused(ddiff("sample", "runs/small"), "runs/small", "no complete checkpoint")
    code, _, err = ddiff("run", "small.toml", *SHORT, "--set", "process.gamma=2.0")
    assert code == 0, err


def test_model_trained_with_one_window_of_full_length_can_be_sampled(folder: Path) -> None:
    settings = ["train.steps=2", 'objective.times={kind="block", width=8}']
    assert api.run("small.toml", settings=settings).sample(1)
