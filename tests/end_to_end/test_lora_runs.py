"""Runs with LoRA adapters: checkpoints, evaluation, merging, other bases and mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from safetensors import safe_open
from small import working_in
from test_chat_runs import RECIPE

import ddiff as api
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.nn.adapters import remove_adapters
from ddiff.nn.denoiser import UNPADDED
from ddiff.runs.run import Run

pytest.importorskip("peft")
pytestmark = pytest.mark.slow

LORA = """
extends = "chat.toml"
name = "lora"
denoiser = { lora = { rank = 2 } }
train = { init = { run = "runs/chat" }, optimizer = { kind = "adamw", lr = 0.05 } }
"""


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Adapters that were trained on the run runs/chat, and that run."""
    with working_in(tmp_path_factory.mktemp("lora")):
        Path("chat.toml").write_text(RECIPE)
        Path("lora.toml").write_text(LORA)
        api.run("chat.toml")
        yield api.run("lora.toml")


def hidden_states(run: Run) -> torch.Tensor:
    ids = torch.arange(2 * 56).reshape(2, 56) % run.vocabulary.num_states
    with torch.no_grad():
        return run.denoiser.eval().backbone(ids, torch.full(ids.shape, 0.5), UNPADDED)


def test_checkpoint_holds_only_adapters_and_the_fingerprint_of_the_base(lora: Run) -> None:
    newest = lora.checkpoints.newest()
    assert newest is not None
    weights = newest.read_weights()
    assert weights
    assert all(".lora_" in name for name in weights)
    assert len(newest.state["fingerprints"]["base weights"]) == 32


def test_loaded_adapters_evaluate_to_the_recorded_bound(lora: Run) -> None:
    recorded = json.loads((lora.run_dir / "evaluation.json").read_text())
    base = json.loads(Path("runs/chat/evaluation.json").read_text())
    found, _ = api.load("runs/lora").evaluate()
    assert found.nelbo_nats_per_token == recorded["nelbo_nats_per_token"]
    assert recorded["nelbo_nats_per_token"] != base["nelbo_nats_per_token"]


def test_adapters_answer_and_report(lora: Run, ddiff: Command) -> None:
    assert ddiff("sample", "runs/lora", "--message", "Which?", "--steps", "2").code == 0
    assert ddiff("report", "runs/lora", "--out", "report.html").code == 0


def test_merged_run_equals_the_adapters(lora: Run, ddiff: Command) -> None:
    code, out, err = ddiff("export", "runs/lora", "runs/merged", "--merged")
    assert code == 0, err
    assert "merged" in out
    adapted = api.load("runs/lora")
    merged = api.load("runs/merged")
    assert merged.recipe.denoiser_keys.lora is None
    assert merged.denoiser.adapters is None
    # float32: W h + B A h and (W + B A) h are rounded differently
    assert torch.allclose(hidden_states(merged), hidden_states(adapted), rtol=0.0, atol=1e-5)
    first, _ = adapted.evaluate()
    second, _ = merged.evaluate()
    assert abs(first.nelbo_nats_per_token - second.nelbo_nats_per_token) < 1e-4
    assert merged.sample(message="Which?", steps=2)[0]["message"] == "Which?"


def test_merged_weights_are_written_to_one_file(lora: Run, ddiff: Command) -> None:
    assert ddiff("export", "runs/lora", "merged.safetensors", "--merged").code == 0
    with safe_open("merged.safetensors", "pt") as file:
        assert set(file.keys()) == set(api.load("runs/chat").denoiser.state_dict())


def test_export_without_an_option_says_that_the_base_is_missing(lora: Run, ddiff: Command) -> None:
    code, out, err = ddiff("export", "runs/lora", "plain.safetensors")
    assert code == 0, err
    assert "without their base" in out
    assert "--merged" in out
    assert "--format peft" in out
    code, out, err = ddiff("export", "runs/chat", "chat.safetensors")
    assert code == 0, err
    assert "base" not in out


def test_adapters_are_written_in_the_format_of_peft(lora: Run, ddiff: Command) -> None:
    assert ddiff("export", "runs/lora", "adapters", "--format", "peft").code == 0
    config = json.loads(Path("adapters/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 2
    assert config["base_model_name_or_path"] == "runs/chat"
    with safe_open("adapters/adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {
        f"base_model.model.{layer}.lora_{each}.weight"
        for layer in config["target_modules"]
        for each in "AB"
    }


def test_whole_head_starts_with_the_head_of_the_base(lora: Run) -> None:
    settings = ["name=whole", "train.steps=1", 'denoiser.lora.full=["head"]']
    settings += ["train.optimizer.lr=1e-9", "train.checkpoint_every=1", "sample.count=1"]
    started = api.run("lora.toml", settings=settings).denoiser.head
    base = api.load("runs/chat").denoiser.head
    assert (base.bias - base.bias.mean()).abs().max() > 0.1
    assert torch.allclose(started.bias, base.bias, rtol=0.0, atol=1e-6)
    assert torch.allclose(started.table, base.table, rtol=0.0, atol=1e-6)


def test_base_is_the_moving_average_with_which_its_run_is_evaluated(lora: Run) -> None:
    api.run("chat.toml", settings=["name=averaged", "train.ema=0.5", "sample.count=1"])
    settings = ["name=on_average", "train.init.run=runs/averaged", "train.steps=1"]
    adapted = api.run("lora.toml", settings=[*settings, "sample.count=1"]).denoiser
    base = api.load("runs/averaged")
    trained = base.checkpoints.read_weights()
    with remove_adapters(adapted):
        found = adapted.state_dict()
        assert all(
            torch.equal(found[name], value) for name, value in base.denoiser.state_dict().items()
        )
    assert not all(torch.equal(found[name], value) for name, value in trained.items())


def test_frozen_head_without_weights_of_the_base_is_refused(lora: Run) -> None:
    levelwise = ["name=levels", 'denoiser.head="levelwise"', "train.steps=1", "sample.count=1"]
    api.run("chat.toml", settings=levelwise)
    settings = ["name=other_head", "train.init.run=runs/levels", "train.steps=1"]
    with pytest.raises(ArgumentError, match=r"head of runs/levels.*lora\.full"):
        api.run("lora.toml", settings=settings)
    assert not Path("runs/other_head").exists()
    settings += ['denoiser.lora.full=["head"]', "train.optimizer.lr=1e-9", "sample.count=1"]
    head = api.run("lora.toml", settings=settings).denoiser.head
    # the new head starts from the counts of the tokens
    assert (head.bias - head.bias.mean()).abs().max() > 0.1


def test_peft_reads_exported_adapters_with_equal_hidden_states(lora: Run, ddiff: Command) -> None:
    from peft import PeftModel

    dit = '{ kind = "dit", width = 16, layers = 1, heads = 2 }'
    sizes = "hidden_size = 16, num_attention_heads = 2, num_hidden_layers = 1"
    llama = f'{{ kind = "hf", architecture = "llama", settings = {{ {sizes} }} }}'
    recipe = RECIPE.replace(dit, llama).replace('"dit"]', '"hf"]')
    Path("decoder.toml").write_text(recipe.replace('"chat"', '"decoder"'))
    api.run("decoder.toml", settings=["train.steps=1", "sample.count=1"])
    recipe = LORA.replace("chat.toml", "decoder.toml").replace("runs/chat", "runs/decoder")
    Path("adapted.toml").write_text(recipe)
    adapted = api.run("adapted.toml", settings=["name=adapted", "sample.count=1"])
    assert ddiff("export", "runs/adapted", "peft_files", "--format", "peft").code == 0
    base = api.load("runs/decoder")
    assert (hidden_states(adapted) - hidden_states(base)).abs().max() > 0.01
    backbone: Any = base.denoiser.backbone
    backbone.model = PeftModel.from_pretrained(backbone.model, "peft_files")
    assert torch.allclose(hidden_states(base), hidden_states(adapted), rtol=0.0, atol=1e-6)


def test_training_of_adapters_resumes(lora: Run, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/lora", "runs/more")
    trained = sum(each.numel() for each in lora.denoiser.parameters() if each.requires_grad)
    capfd.readouterr()
    resumed = api.run("lora.toml", settings=["run_dir=runs/more", "train.steps=8"])
    assert f" parameters ({trained:,} trained) in " in capfd.readouterr().err
    lines = Path("runs/more/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 9))
    assert not torch.equal(hidden_states(resumed), hidden_states(lora))


def test_sharded_training_of_adapters_equals_that_of_one_process(
    lora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 shards adapters and base. Float32 sums of two ranks are added in another order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["run_dir=runs/sharded", "backend.kind=fsdp", "backend.processes=2"]
    line = [sys.executable, "-m", "ddiff", "run", "lora.toml", "--set", "sample.count=1"]
    for setting in settings:
        line += ["--set", setting]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = []
    for folder in ("runs/lora", "runs/sharded"):
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(each)["train_loss"] for each in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert api.load("runs/sharded").checkpoints.read_weights().keys() == (
        lora.checkpoints.read_weights().keys()
    )


@pytest.fixture
def other_base(lora: Run) -> Iterator[str]:
    """Another run in the place of the base."""
    if not Path("runs/other").is_dir():
        api.run("chat.toml", settings=["name=other", "seed=1", "train.steps=1"])
    shutil.move("runs/chat", "runs/kept")
    shutil.copytree("runs/other", "runs/chat")
    yield "runs/chat"
    shutil.rmtree("runs/chat")
    shutil.move("runs/kept", "runs/chat")


def list_files(folder: str) -> dict[str, Any]:
    return {
        str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "runs/lora"),
        ("sample", "runs/lora"),
        ("export", "runs/lora", "runs/wrong", "--merged"),
        ("export", "runs/lora", "wrong", "--format", "peft"),
        ("run", "lora.toml", "--set", "train.steps=9"),
    ],
)
def test_adapters_of_another_base_are_refused_and_nothing_is_written(
    arguments: tuple[str, ...], other_base: str, ddiff: Command
) -> None:
    before = list_files("runs/lora")
    code, _, err = ddiff(*arguments)
    assert code != 0
    assert "base weights: was" in err
    assert f"here {Path('runs/chat').resolve()}" in err.replace("\n", "")
    assert "`ddiff export runs/lora DIR --merged` writes a run" in " ".join(err.split())
    assert "Traceback" not in err
    assert list_files("runs/lora") == before
    assert not Path("runs/wrong").exists()
    assert not Path("wrong").exists()


def test_missing_base_is_named(lora: Run) -> None:
    shutil.move("runs/chat", "runs/kept")
    try:
        with pytest.raises(CheckpointError, match="runs/chat is not a trained run") as caught:
            api.load("runs/lora")
        assert f"here {Path('runs/chat').resolve()}" in str(caught.value)
        assert "`ddiff export runs/lora DIR --merged`" in str(caught.value)
    finally:
        shutil.move("runs/kept", "runs/chat")


def test_adapters_without_a_base_are_refused(lora: Run, ddiff: Command) -> None:
    code, _, err = ddiff("run", "chat.toml", "--set", "name=none", "--set", "denoiser.lora={}")
    assert code != 0
    assert "adapters need trained weights" in err
    assert not Path("runs/none/recipe.toml").exists()


def test_run_of_adapters_is_no_base_before_it_is_merged(lora: Run) -> None:
    with pytest.raises(ArgumentError, match=r"`ddiff export runs/lora DIR --merged`"):
        api.run("lora.toml", settings=["name=twice", "train.init.run=runs/lora"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("runs/chat", "out", "--merged"), "has no adapters"),
        (("runs/lora", "runs/chat", "--merged"), "new or empty"),
        (("runs/lora", "out", "--merged", "--format", "peft"), "exclude each other"),
        (("runs/lora", "out", "--format", "hf"), "Merge them first"),
    ],
)
def test_wrong_export_of_adapters_is_refused(
    arguments: tuple[str, ...], expected: str, lora: Run, ddiff: Command
) -> None:
    code, _, err = ddiff("export", *arguments)
    assert code != 0
    assert expected in " ".join(err.split())
    assert not Path("out").exists()
