"""Saved models: equal logits with and without ddiff, and restored runs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, is_refusal
from probe import DRAWS, make_inputs
from safetensors.torch import load_file, save_file
from saved_runs import RUNS
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import ddiff as api
from ddiff import ArgumentError, DataError
from ddiff.checkpoint import published_files
from ddiff.checkpoint.published_files import compute_digest, locate
from ddiff.plugin.loader import survey_plugins
from ddiff.recipe.component import ComponentSpec
from ddiff.run_dir.evaluation_record import EvaluationRecord
from ddiff.runs import importing
from ddiff.runs.hub import restore, save
from ddiff.runs.hub.card import describe_evaluation
from ddiff.runs.hub.modeling import DdiffConfig, DdiffModel
from ddiff.runs.hub.save import load_module
from ddiff.runs.hub.source import Place, generate_source
from ddiff.runs.loading import load
from ddiff.runs.run import Run

importlib.import_module("ddiff.hf")  # registers the model class

NAMES = list(RUNS)
LARGEST_ROUNDING = 0.04
"""Mean total variation distance of predictions in bfloat16, which has 8 bits of precision."""


def logits_of(model: Any) -> torch.Tensor:
    ids, timesteps = make_inputs(model.config.vocab_size)
    with torch.no_grad():
        return model.eval()(ids, timesteps=timesteps).logits


@pytest.fixture(scope="session")
def without_ddiff(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of probe.py: logits of every saved model in a process that cannot import ddiff."""
    folder = tmp_path_factory.mktemp("probe")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    script = str(Path(__file__).with_name("probe.py"))
    output = str(folder / "found.pt")
    command = [sys.executable, script, str(saved / "saved"), *NAMES, output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.mark.parametrize("name", NAMES)
def test_generated_file_and_registered_class_give_equal_logits(
    place: Path, without_ddiff: dict[str, Any], name: str
) -> None:
    folder = place / "saved" / name
    found = without_ddiff[name]
    assert found["module"].startswith("transformers_modules.")
    registered = AutoModel.from_pretrained(folder)
    assert type(registered) is DdiffModel
    assert torch.equal(logits_of(registered), found["logits"])
    assert found["ids"] == load(place / "runs" / name).tokenizer.encode(["the old cat <|eos|>"])[0]


@pytest.mark.parametrize("name", NAMES)
def test_registered_model_has_the_predictions_of_the_run(place: Path, name: str) -> None:
    run: Run = load(place / "runs" / name)
    model = AutoModelForMaskedLM.from_pretrained(place / "saved" / name).eval()
    ids, timesteps = make_inputs(run.vocabulary.num_states)
    t = timesteps.unsqueeze(-1).expand(ids.shape)
    noisy = api.Noisy(ids, t, torch.zeros_like(ids, dtype=torch.bool))
    rows = torch.arange(ids.numel())
    node = torch.full_like(rows, run.vocabulary.root)
    log_p = run.denoiser.eval().query(
        noisy, api.Context(), rows, node, lambda prediction, _: prediction.log_mass(0)
    )
    logits = model(ids, timesteps=timesteps).logits.flatten(0, 1)
    found = logits[:, : run.vocabulary.num_tokens].log_softmax(-1)
    # The matrix products have other shapes, so the last bits differ.
    torch.testing.assert_close(found, log_p, atol=1e-5, rtol=1e-5)


def test_logits_depend_on_the_time_that_the_run_reads(place: Path) -> None:
    for name, reads_time in (("tree", True), ("flat", False), ("score", True)):
        model = AutoModel.from_pretrained(place / "saved" / name).eval()
        for parameter in model.parameters():  # two steps leave the modulation at almost 0
            parameter.data += 0.1
        ids, _ = make_inputs(model.config.vocab_size)
        early = model(ids, timesteps=0.1).logits
        late = model(ids, timesteps=torch.full(ids.shape, 0.9)).logits
        assert torch.equal(early, late) is not reads_time
        if reads_time:
            with pytest.raises(ArgumentError, match="timesteps must be noise times"):
                model(ids)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_changes_predictions_only_by_rounding(
    place: Path, tmp_path: Path, name: str
) -> None:
    """Constants such as the frequencies of the noise time stay in float32.

    In bfloat16, an angle of 256 radians would have an error of up to half a radian.
    """
    folder = tmp_path / "strong"
    model = AutoModel.from_pretrained(place / "saved" / name).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # two steps leave the modulation at almost 0
            parameter.add_(0.2 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    small = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    ids = torch.randint(model.config.vocab_size, (8, 8))
    timesteps = torch.rand(ids.shape, dtype=torch.float64)
    with torch.no_grad():
        exact = model(ids, timesteps=timesteps).logits.softmax(-1)
        found = small(ids, timesteps=timesteps).logits.softmax(-1)
    difference = (exact - found).abs().sum(-1) / 2
    assert float(difference.mean()) < LARGEST_ROUNDING


def test_attention_mask_hides_padding(place: Path) -> None:
    model = AutoModel.from_pretrained(place / "saved" / "flat").eval()
    ids, _ = make_inputs(model.config.vocab_size)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    other = ids.clone()
    other[:, 6:] = 0
    first = model(ids, attention_mask=mask).logits[:, :6]
    second = model(other, attention_mask=mask).logits[:, :6]
    assert torch.equal(first, second)
    assert not torch.equal(model(ids).logits[:, :6], model(other).logits[:, :6])


def test_logits_have_gradients_for_all_parameters(place: Path) -> None:
    for name in ("tree", "flat"):
        model = AutoModel.from_pretrained(place / "saved" / name)
        ids, timesteps = make_inputs(model.config.vocab_size)
        logits = model(ids, timesteps=timesteps).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        missing = [key for key, value in model.named_parameters() if value.grad is None]
        assert missing == []


def test_saved_configuration_names_installed_components_only(place: Path) -> None:
    config = AutoConfig.from_pretrained(place / "saved/flat")
    config.backbone = {**config.backbone, "kind": "subprocess:Popen"}
    with pytest.raises(ArgumentError, match="the backbone 'subprocess:Popen'"):
        DdiffModel(config)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", ["tree", "score"])
def test_load_of_a_saved_model_gives_an_equal_run(place: Path, name: str) -> None:
    before: Run = api.load(f"runs/{name}")
    after: Run = api.load(f"saved/{name}")
    assert after.run_dir.is_relative_to(place / "cache" / "models")
    own, theirs = before.denoiser.state_dict(), after.denoiser.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    first, second = before.recipe.to_dict(), after.recipe.to_dict()
    assert first | {"run_dir": ""} == second | {"run_dir": ""}
    assert (before.step, before.uses_ema) == (after.step, after.uses_ema)
    assert before.fingerprints() == after.fingerprints()
    assert before.sample(2, seed=5) == after.sample(2, seed=5)
    assert before.evaluate()[0] == after.evaluate()[0]


def test_saving_a_restored_run_gives_the_same_files(place: Path, tmp_path: Path) -> None:
    api.load("saved/tree").save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "modeling_ddiff.py", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == Path("saved/tree", name).read_bytes()


def test_import_writes_a_run_directory(place: Path, ddiff: Command, tmp_path: Path) -> None:
    out = str(tmp_path / "imported")
    code, text, _ = ddiff("import", "saved/tree", "--out", out)
    assert code == 0
    assert "hf (saved by ddiff" in text
    origin = json.loads(Path(out, "origin.json").read_text())
    assert (origin["step"], origin["is_average"]) == (2, True)
    code, text, _ = ddiff("sample", out, "--count", "1", "--seed", "3")
    assert json.loads(text)["ids"] == api.load("runs/tree").sample(1, seed=3)[0]["ids"]
    assert is_refusal(ddiff("import", "saved/tree", "--out", out), "is not empty")
    refused = ddiff("import", "saved/tree", "--out", f"{out}2", "--layout", "mdlm")
    assert is_refusal(refused, "--layout mdlm", "Leave --layout out")


def test_damaged_weights_are_refused_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    for path in Path("saved/flat").rglob("*"):
        if path.is_file():
            target = copied / path.relative_to("saved/flat")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    tensors = load_file(copied / "model.safetensors")
    name = tensors.pop("denoiser.head.bias")
    save_file(tensors, copied / "model.safetensors")
    assert name is not None
    with pytest.raises(api.CheckpointError, match=r"head\.bias is missing"):
        api.import_published(copied, tmp_path / "out")
    (copied / "model.safetensors").write_bytes(b"12")
    with pytest.raises(DataError, match="damaged or incomplete"):
        api.load(copied)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "copy") == []


def test_load_of_a_saved_model_hashes_each_file_once_and_large_files_only_if_modified(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree("saved/flat", folder)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    hashed: list[str] = []
    located: list[str] = []

    def compute(file: Path) -> Any:
        hashed.append(file.relative_to(folder).as_posix())
        return compute_digest(file)

    def find(source: str) -> Any:
        located.append(source)
        return locate(source)

    for module in (published_files, restore):
        monkeypatch.setattr(module, "compute_digest", compute)
    for module in (importing, restore):
        monkeypatch.setattr(module, "locate", find)
    weights = folder / "model.safetensors"
    monkeypatch.setattr(restore, "SMALL", weights.stat().st_size - 1)
    first = api.load(folder)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(hashed) == sorted(names)
    assert located == [str(folder)]
    hashed.clear()
    assert api.load(folder).run_dir == first.run_dir
    assert weights.name not in hashed
    assert "config.json" in hashed
    tensors = load_file(weights)
    tensors["denoiser.head.bias"] += 1.0
    save_file(tensors, weights)
    second = api.load(folder)
    assert second.run_dir != first.run_dir
    assert torch.equal(second.denoiser.head.bias, first.denoiser.head.bias + 1.0)


# ---------------------------------------------------------------------- files


def test_model_card_has_evaluation_with_interval_and_protocol(place: Path) -> None:
    card = Path("saved/tree/README.md").read_text()
    record = json.loads(Path("runs/tree/evaluation.json").read_text())
    figure = record["figures"]["nelbo"]
    low, high = figure["interval"]
    assert f"| nelbo | {figure['value']:.5g} | {low:.4g} to {high:.4g} | nats/token |" in card
    assert "upper bound of the negative log-likelihood" in card
    assert f'"tokenizer": "{record["protocol"]["tokenizer"]}"' in card
    assert card.startswith('---\nlibrary_name: transformers\ntags:\n- "ddiff"\n')
    assert "exponential moving average" in card


def test_card_explains_figures_that_are_no_bounds(place: Path) -> None:
    tree = json.loads(Path("runs/tree/evaluation.json").read_text())
    bound = describe_evaluation(EvaluationRecord.from_tree(tree))
    assert "upper bound of the negative log-likelihood" in bound
    tree["protocol"]["own_vectors"] = ["style"]
    own = describe_evaluation(EvaluationRecord.from_tree(tree))
    assert "no\nbound of the likelihood" in own
    assert "upper bound" not in own
    tree = json.loads(Path("runs/tree/evaluation.json").read_text())
    tree["protocol"]["given"] = "prompts"
    given = describe_evaluation(EvaluationRecord.from_tree(tree))
    assert "upper bound of the conditional negative log-likelihood" in given
    assert "answers, given their prompts" in given
    assert "The perplexity" not in given
    tree = json.loads(Path("runs/tree/evaluation.json").read_text())
    tree["figures"]["nll"] = tree["figures"].pop("nelbo")
    exact = describe_evaluation(EvaluationRecord.from_tree(tree))
    assert "The NLL is the exact negative log-likelihood" in exact


def test_card_of_other_weights_has_no_evaluation(
    place: Path, ddiff: Command, tmp_path: Path
) -> None:
    folder = str(tmp_path / "trained")
    arguments = ("export", "runs/tree", folder, "--format", "hf", "--weights", "trained")
    code, out, _ = ddiff(*arguments)
    assert code == 0
    assert out.startswith(f"{folder}: the trained weights of step 2 of runs/tree, as a model")
    assert "These weights were not evaluated" in Path(folder, "README.md").read_text()
    trained = load_file(Path(folder, "model.safetensors"))
    own = api.load("runs/tree").checkpoints.read_weights()
    assert all(torch.equal(trained[f"denoiser.{name}"], own[name]) for name in own)


def test_generated_file_imports_torch_numpy_and_transformers_only(place: Path) -> None:
    for name in NAMES:
        text = Path("saved", name, "modeling_ddiff.py").read_text()
        lines = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        roots = {line.split()[1].partition(".")[0] for line in lines}
        assert roots - {*sys.stdlib_module_names, "__future__"} == {
            "numpy",
            "torch",
            "transformers",
        }
        assert "\n# ----" in text
        assert "class Head" in text
        assert "def total" not in text  # the training is left out


def test_generated_file_has_the_conditions_of_the_backbone(tmp_path: Path) -> None:
    conditions = {
        "kind": {"classes": 2},
        "style": {"width": 3, "count": 2, "via": "cross"},
        "latent": {"width": 4, "via": "tokens"},
    }
    config = {
        "num_tokens": 5,
        "length": 6,
        "backbone": {
            "kind": "dit",
            "width": 16,
            "layers": 2,
            "heads": 2,
            "conditions": conditions,
        },
        "head": {"kind": "tokens"},
    }
    roots = [
        Place("ddiff.runs.hub.modeling", "DdiffModel"),
        Place("ddiff_dit.dit", "DiT"),
        Place("ddiff_core.heads", "Tokens"),
    ]
    path = tmp_path / "generated.py"
    path.write_text(generate_source(roots, ["generate"], "Header."))
    torch.manual_seed(0)
    registered = DdiffModel(DdiffConfig(**config)).eval()
    for parameter in registered.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    values = {
        "kind": torch.tensor([1, -1]),
        "style": torch.rand(2, 6),
        "latent": torch.rand(2, 4),
    }
    ids = torch.randint(6, (2, 6))
    with load_module(path) as module, torch.no_grad():
        module.DdiffModel.components = {
            ("backbone", "dit"): module.DiT,
            ("head", "tokens"): module.Tokens,
        }
        generated = module.DdiffModel(module.DdiffConfig(**config)).eval()
        generated.load_state_dict(registered.state_dict())
        found = generated(ids, timesteps=0.5, conditions=values).logits
        expected = registered(ids, timesteps=0.5, conditions=values).logits
        without = generated(ids, timesteps=0.5).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, without)


def test_documentation_lists_the_files_of_saved_models(place: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/published.md").read_text()
    section = page.partition("## Export for transformers and the hub\n")[2]
    table = section.partition("| file | content |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| `{name}` | {text} |" for name, text in save.CONTENTS.items()]
    for name in NAMES:
        folder = place / "saved" / name
        files = [path for path in folder.rglob("*") if path.is_file()]
        written = {path.relative_to(folder).as_posix() for path in files}
        assert written <= save.CONTENTS.keys()


def test_loading_the_modeling_file_leaves_no_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "modeling_ddiff.py"
    path.write_text("value = 3\n")
    with load_module(path) as module:
        assert module.value == 3
    assert list(tmp_path.iterdir()) == [path]


def test_saved_models_have_no_samples_and_no_arguments_of_commands(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    assert Path("runs/tree/samples.jsonl").is_file()
    copied = tmp_path / "copied"
    shutil.copytree("runs/tree", copied)
    record = json.loads((copied / "evaluation.json").read_text())
    record["provenance"]["command"] = "ddiff run /home/someone/private.toml"
    (copied / "evaluation.json").write_text(json.dumps(record))
    code, out, _ = ddiff("export", str(copied), str(tmp_path / "saved"), "--format", "hf")
    assert code == 0
    assert "paths of this machine: run_dir" in out
    names = {path.name for path in (tmp_path / "saved").rglob("*")}
    assert not names & {"samples.jsonl", "sampling.json", "metrics.jsonl"}
    saved = json.loads((tmp_path / "saved/run/evaluation.json").read_text())
    assert saved["provenance"].pop("command") == "ddiff run"
    assert saved["provenance"] == {
        key: value for key, value in record["provenance"].items() if key != "command"
    }


def test_save_refuses_used_folders_and_leaves_no_partial_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = api.load("runs/flat")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(ArgumentError, match="new or empty"):
        run.save_pretrained(tmp_path / "used")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_card", fail)
    with pytest.raises(OSError, match="No space"):
        run.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_save_refuses_a_network_whose_file_gives_other_logits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = save.generate_source

    def change(*arguments: Any) -> str:
        text = generate(*arguments)
        assert text.count("x.shape[-1:]), 1 + scale") == 1
        return text.replace("x.shape[-1:]), 1 + scale", "x.shape[-1:]), 2 + scale")

    monkeypatch.setattr(save, "generate_source", change)
    with pytest.raises(ArgumentError, match="its logits differ by"):
        api.load("runs/flat").save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_backbones_that_read_files(place: Path, tmp_path: Path) -> None:
    run: Run = api.load("runs/flat")
    (component,) = [
        component
        for component in survey_plugins().registry.components("backbone")
        if component.name == "hf"
    ]
    spec = ComponentSpec(component, component.config_class()(path="downloads/bert"))
    other = replace(run, recipe=replace(run.recipe, denoiser=spec))
    with pytest.raises(ArgumentError, match="its key path names files that are not in the folder"):
        other.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", NAMES)
def test_generated_file_draws_the_samples_of_the_run(
    place: Path, without_ddiff: dict[str, Any], name: str
) -> None:
    run: Run = load(place / "runs" / name)
    found = without_ddiff[name]
    assert found["recipe"].tolist() == [one["ids"] for one in run.sample(2, seed=5)]
    registered = AutoModel.from_pretrained(place / "saved" / name)
    assert torch.equal(registered.generate(batch_size=2, seed=5), found["recipe"])
    settings = dict(DRAWS["confidence"])
    keys = {key: settings.pop(key) for key in ("sampler", "steps")}
    texts = [f"{key}={value}" for key, value in settings.items()]
    if name in ("score", "uniform", "blocks"):
        with pytest.raises(ArgumentError):
            run.sample(2, seed=5, settings=texts, **keys)
        assert found["confidence"].startswith("ArgumentError: ")
    else:
        drawn = run.sample(2, seed=5, settings=texts, **keys)
        assert found["confidence"].tolist() == [one["ids"] for one in drawn]


def test_generate_refuses_what_the_file_lacks_and_names_the_package(
    place: Path, without_ddiff: dict[str, Any]
) -> None:
    found = without_ddiff["flat"]
    assert (
        "sampler must be one of ancestral, analytic, confidence, entropy, margin"
        in found["missing"]
    )
    assert "pip install discrete-diffusion" in found["missing"]
    assert "temprature is no setting of Ancestral.Config" in found["misspelt"]
    assert 'Did you mean "temperature"?' in found["misspelt"]
    assert "sampler must be one of blockwise, which" in without_ddiff["blocks"]["confidence"]
    registered = AutoModel.from_pretrained(place / "saved/blocks")  # has every sampler
    with pytest.raises(ArgumentError, match="trained in windows from left to right"):
        registered.generate(sampler="confidence")


def test_saved_model_without_its_process_gives_logits_and_refuses_to_generate(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of the process needs a package that the file may not import."""
    generate = save.generate_source

    def refuse_processes(roots: list[Place], *rest: Any) -> str:
        if any("MaskedDiffusion" in root for root in roots):
            raise ArgumentError("A definition needs scipy.")
        return generate(roots, *rest)

    monkeypatch.setattr(save, "generate_source", refuse_processes)
    api.load("runs/flat").save_pretrained(tmp_path / "new")
    config = AutoConfig.from_pretrained(tmp_path / "new")
    with load_module(tmp_path / "new/modeling_ddiff.py") as module:
        model = module.DdiffModel(module.DdiffConfig(**config.to_dict())).eval()
        assert logits_of(model).isfinite().all()
        with pytest.raises(
            module.ArgumentError, match="'mdlm' and its samplers could not be copied"
        ) as caught:
            model.generate()
    assert "pip install discrete-diffusion" in str(caught.value)


def test_generate_keeps_prompts_and_fills_gaps(place: Path) -> None:
    run: Run = api.load("runs/flat")
    model = AutoModel.from_pretrained(place / "saved/flat")
    prompt = run.tokenizer.encode(["the"])[0]
    drawn = model.generate(torch.tensor(prompt), batch_size=2, seed=3)
    expected = run.sample(2, seed=3, prompt="the")
    assert drawn.tolist() == [one["ids"] for one in expected]
    ids = torch.arange(8).expand(3, 8)
    kept = torch.tensor([True, False] * 4)
    filled = model.generate(ids, kept, sampler="confidence", steps=2)
    assert torch.equal(filled[:, kept], ids[:, kept])
    assert not torch.equal(filled, ids)
    with pytest.raises(ArgumentError, match="at most length = 2"):
        model.generate(torch.arange(3), length=2)


def test_generate_uses_conditions_and_guidance() -> None:
    torch.manual_seed(0)
    config = DdiffConfig(
        num_tokens=5,
        length=6,
        backbone={
            "kind": "dit",
            "width": 16,
            "layers": 1,
            "heads": 2,
            "conditions": {"kind": {"classes": 2, "dropout": 0.1}},
        },
        head={"kind": "tokens"},
        process={"kind": "mdlm"},
        sample={"sampler": {"kind": "ancestral"}, "steps": 4, "conditions": {"kind": 1}},
    )
    model = DdiffModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with_recipe = model.generate(batch_size=4)
    assert torch.equal(with_recipe, model.generate(batch_size=4, conditions={"kind": [1] * 4}))
    other = model.generate(batch_size=4, conditions={"kind": 0})
    assert not torch.equal(with_recipe, other)
    assert not torch.equal(other, model.generate(batch_size=4, conditions={"kind": 0}, guidance=5))
    with pytest.raises(ArgumentError, match='got "kin"'):
        model.generate(conditions={"kin": 0})
    with pytest.raises(ArgumentError, match="a weight of 3 needs a condition"):
        model.generate(conditions={}, guidance=3)


@pytest.mark.parametrize("steps", [1, 2])
def test_generate_reads_the_time_zero_at_given_tokens(steps: int) -> None:
    """The tokens of a prompt are clean, as for `run.sample` and in training on conversations."""
    count = 20_000
    torch.manual_seed(0)
    config = DdiffConfig(
        num_tokens=3,
        length=2,
        backbone={"kind": "dit", "width": 8, "layers": 1, "heads": 1},
        head={"kind": "tokens"},
        process={"kind": "mdlm"},
        sample={"sampler": {"kind": "ancestral"}},
    )
    model = DdiffModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    torch.nn.init.normal_(model.denoiser.head.table)
    states = torch.tensor([[1, 3]])
    expected = torch.zeros(3)
    wrong = torch.zeros(3)
    with torch.no_grad():
        for step in range(steps):
            t = 1.0 - step / steps
            # Under the linear schedule a position moves in each step with the same probability.
            at_prompt = torch.tensor([[0.0, t]])
            expected += model(states, timesteps=at_prompt).logits[0, 1].softmax(-1) / steps
            wrong += model(states, timesteps=t).logits[0, 1].softmax(-1) / steps
    assert (expected - wrong).abs().sum() > 0.05
    drawn = model.generate(states[0, :1], batch_size=count, steps=steps, seed=0)
    assert bool((drawn[:, 0] == 1).all())
    counts = torch.bincount(drawn[:, 1], minlength=3)
    # The 99.9 % quantile of chi-square with 2 degrees of freedom is 13.8.
    assert float(((counts - expected * count) ** 2 / (expected * count)).sum()) < 13.8


def test_generate_draws_the_distribution_of_ancestral_sampling() -> None:
    steps, count = 3, 30_000
    torch.manual_seed(0)
    config = DdiffConfig(
        num_tokens=3,
        length=2,
        backbone={"kind": "dit", "width": 8, "layers": 1, "heads": 1, "time": False},
        head={"kind": "tokens"},
        process={"kind": "mdlm"},
        sample={"sampler": {"kind": "ancestral"}},
    )
    model = DdiffModel(config).eval()
    torch.nn.init.normal_(model.denoiser.head.table, std=0.3)
    torch.nn.init.normal_(model.denoiser.backbone.blocks[0].modulation)
    mask = 3
    first_known = [[token, mask] for token in range(3)]
    second_known = [[mask, token] for token in range(3)]
    states = torch.tensor([[mask, mask], *first_known, *second_known])
    with torch.no_grad():
        p = model(states).logits.softmax(-1)
    together = p[0, 0].outer(p[0, 1])
    left_first = p[0, 0].unsqueeze(1) * p[1:4, 1]
    right_first = p[0, 1].unsqueeze(0) * p[4:7, 0].t()
    # Under the linear schedule a position moves in each step with the same probability.
    expected = together / steps + (1 - 1 / steps) * (left_first + right_first) / 2
    drawn = model.generate(batch_size=count, steps=steps, seed=1)
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    expected_counts = expected.flatten() * count
    assert not torch.allclose(left_first, right_first, atol=0.02)
    # The 99.9 % quantile of chi-square with 8 degrees of freedom is 26.1.
    assert float(((counts - expected_counts) ** 2 / expected_counts).sum()) < 26.1
