"""Samples during training ([sample] every) are recorded and do not change training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SYMBOLS, on_ranks, train_symbols
from test_validation import assert_same, state, trained, without_validation

from ddiff import ArgumentError, load
from ddiff import run as api_run
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.replay import verify_resume
from ddiff.training.preview import PreviewFile

FILE = "training_samples.jsonl"
DROPOUT = ("denoiser.dropout=0.3", "train.checkpoint_every=2")
CONSTANT = "train.schedule=constant"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, FILE).read_text().splitlines()]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_trained_weights_are_bitwise_equal_with_and_without_samples(ema: float) -> None:
    trained("plain", f"train.ema={ema}", *DROPOUT)
    trained("watched", f"train.ema={ema}", "sample.every=1", *DROPOUT)
    assert without_validation("plain") == without_validation("watched")
    assert_same(state("plain"), state("watched"))
    assert not Path("plain", FILE).exists()
    assert [line["step"] for line in lines("watched")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("weights", ["ema", "trained"])
def test_last_sample_during_training_equals_a_sample_of_the_run(
    weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.ema=0.5", f"evaluate.weights={weights}", "sample.every=3"]
    trained("run", *settings, "sample.steps=40")
    printed = capsys.readouterr().err
    run = load("run")
    (sample,) = run.sample(1, steps=16)
    found = lines("run")
    assert [line["step"] for line in found] == [3, 6]
    assert found[-1] == {
        "step": 6,
        "texts": {"text": sample["text"]},
        "steps": 16,
        "nfe": sample["nfe"],
        "seed": run.recipe.sample.seed,
        "weights": weights,
    }
    assert found[0]["texts"] != found[1]["texts"]
    shown = " ".join(sample["text"].split())[:40]
    assert f"step 6: sample: {shown}" in printed
    assert "\x1b" not in printed  # plain lines, because stderr is not a terminal


def test_resumed_run_has_the_samples_of_an_uninterrupted_run() -> None:
    settings = ["sample.every=1", CONSTANT, *DROPOUT]
    trained("whole", *settings)
    trained("torn", *settings, "train.steps=4")
    # as after a kill: samples of later steps were written, the last line only in part
    with Path("torn", FILE).open("a") as file:
        file.write(json.dumps({"step": 5, "texts": {"text": "later"}, "steps": 1, "nfe": 1}))
        file.write('\n{"step": 6, "te')
    trained("torn", *settings)
    assert Path("torn", FILE).read_bytes() == Path("whole", FILE).read_bytes()


def test_killed_run_neither_repeats_nor_loses_a_sample() -> None:
    settings = ["sample.every=1", "train.steps=60", *DROPOUT]
    recipe = parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), ['run_dir="killed"', *settings])
    Path("killed.toml").write_text(recipe.to_toml())
    process = subprocess.Popen([sys.executable, "-m", "ddiff", "run", "killed.toml"])
    path = Path("killed", FILE)
    while not path.exists() or path.read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trained("killed", *settings)
    assert [line["step"] for line in lines("killed")] == list(range(1, 61))


def test_resuming_without_the_key_drops_samples_of_repeated_steps() -> None:
    trained("run", "sample.every=1", "train.steps=3", CONSTANT, *DROPOUT)
    with Path("run", FILE).open("a") as file:
        file.write('{"step": 5, "texts": {}, "steps": 1, "nfe": 1}\n')
    trained("run", CONSTANT, *DROPOUT)
    assert [line["step"] for line in lines("run")] == [1, 2, 3]


def test_preview_file_keeps_only_whole_lines_of_earlier_steps(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text('{"step": 2}\nnot json\n[1]\n{"step": 4}\n{"step": "5"}\n{"step": 5}')
    file = PreviewFile(tmp_path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    file.append(6, {"texts": {"text": "é\n"}})
    assert path.read_text().splitlines()[-1] == '{"step": 6, "texts": {"text": "é\\n"}}'


def test_verify_resume_draws_no_samples(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ['run_dir="run"', "sample.every=1", *DROPOUT]
    trained("run", *settings[1:])
    before = Path("run", FILE).read_bytes()
    capsys.readouterr()
    assert verify_resume(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), settings), 2) == 0
    assert "sample:" not in capsys.readouterr().err
    assert Path("run", FILE).read_bytes() == before


def test_training_continues_after_a_sample_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any) -> Any:
        raise ArgumentError("the sampler stopped")

    monkeypatch.setattr("ddiff.runs.session.TrainingSession._draw_preview", broken)
    trained("run", "sample.every=3")
    assert "step 3: the sampler stopped" in capsys.readouterr().err
    assert not Path("run", FILE).exists()
    assert (Path("run") / "evaluation.json").exists()


FIELDS = Path(__file__).parent / "fields.toml"


def fields_recipe(*settings: str) -> Any:
    return parse_recipe(FIELDS.read_text(), str(FIELDS), ['run_dir="fields"', *settings])


def test_fields_run_records_the_texts_of_its_first_target_with_a_text() -> None:
    recipe = fields_recipe("sample.every=1", "train.steps=2")
    run = api_run(recipe)
    # the only target of [sample] targets is "joint", and the only texts are those of the field text
    (sample,) = run.sample(1, "joint", steps=min(16, recipe.sample.steps))
    expected = {"text": sample["fields"]["text"]["text"]}
    assert [line["step"] for line in lines("fields")] == [1, 2]
    assert lines("fields")[-1]["texts"] == expected


def test_fields_run_without_a_drawn_text_refuses_the_key() -> None:
    trained_paths = 'objective.times={kind="mixture", parts=[{path="shared", clean=["text"]}]}'
    targets = ['sample.targets=["image | text"]', 'evaluate.targets=["image | text"]']
    recipe = fields_recipe("sample.every=1", trained_paths, *targets)
    with pytest.raises(ArgumentError, match=r"\[sample\] every = 1 .* field of texts"):
        api_run(recipe)
    assert not Path("fields").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_samples_do_not_change_training(kind: str, tmp_path: Path) -> None:
    common = [f"backend.kind={kind}", "backend.processes=2", "train.ema=0.9"]
    for name, more in (("plain", []), ("watched", ["sample.every=2"])):
        settings = [f'run_dir="{tmp_path / name}"', *common, *more, "denoiser.dropout=0.3"]
        on_ranks(2, train_symbols, settings, str(tmp_path / "cache"))
    assert without_validation("plain") == without_validation("watched")
    assert [line["step"] for line in lines("watched")] == [2, 4, 6]
