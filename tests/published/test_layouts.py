"""Layouts of published checkpoints: networks, sizes, round trips and bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from imports import draw_ids, import_run, make_noisy, run_logits
from reference_forward import (
    CONFIGS,
    LENGTH,
    MDLM,
    TOKENS,
    block_mask,
    compute_logits,
    make_tensors,
    write_family,
)
from safetensors.torch import load_file

import ddiff
from ddiff.core.times import Noisy
from ddiff.nn.network import as_network
from ddiff.recipe.resolve import parse_recipe
from ddiff.recipe.toml import write_toml
from ddiff.runs.build import assemble
from ddiff.runs.importing import build_layout, find_layout, list_layouts

# Rounding of float32 in two orders of summation; the logits of these networks reach about 10.
TOLERANCE = 5e-5


@pytest.mark.parametrize("family", ["mdlm", "hybrid_epsilon"])
def test_imported_network_has_the_published_logits(folder: Path, family: str) -> None:
    tensors = write_family(Path("published"), family)
    run = import_run(Path("published"))
    ids = draw_ids()
    expected = compute_logits(tensors, ids)[..., :TOKENS]
    assert expected.abs().max() > 3.0
    assert torch.allclose(run_logits(run, make_noisy(ids)), expected, atol=TOLERANCE, rtol=0.0)


def test_imported_block_network_has_the_published_logits(folder: Path) -> None:
    tensors = write_family(Path("published"), "bd3lm")
    run = import_run(Path("published"))
    noisy, clean = draw_ids(1), draw_ids(2).clamp(max=TOKENS - 1)
    block = (torch.arange(LENGTH) // 4).expand_as(noisy)
    expected = compute_logits(
        tensors,
        torch.cat([noisy, clean], 1),
        positions=torch.arange(LENGTH).repeat(2),
        attends=block_mask(LENGTH, 4),
    )[:, :LENGTH, :TOKENS]
    time = torch.full(noisy.shape, 0.5, dtype=torch.float64)
    given = Noisy(noisy, time, noisy < TOKENS, block=block, memory=clean)
    assert torch.allclose(run_logits(run, given), expected, atol=TOLERANCE, rtol=0.0)
    assert run.recipe.times.config.model_dump()["width"] == 4
    assert run.recipe.sampler.component.name == "blockwise"


def test_imported_autoregression_has_the_published_logits(folder: Path) -> None:
    tensors = write_family(Path("published"), "duo_ar")
    run = import_run(Path("published"))
    x = draw_ids(5).clamp(max=TOKENS - 1)
    end = torch.full((len(x), 1), TOKENS - 1)
    before = torch.cat([end, x[:, :-1]], 1)  # the published network reads the end mark first
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    expected = compute_logits(tensors, before, attends=causal)
    clean = Noisy(
        x, torch.zeros(x.shape, dtype=torch.float64), torch.ones_like(x, dtype=torch.bool)
    )
    assert torch.allclose(run_logits(run, clean), expected, atol=TOLERANCE, rtol=0.0)
    assert run.process is None


def test_imported_model_reads_neither_sigma_nor_time(folder: Path) -> None:
    """The reference network at another sigma has other logits, so that the test can fail."""
    tensors = write_family(Path("published"), "mdlm")
    run = import_run(Path("published"))
    ids = draw_ids()
    late = Noisy(ids, torch.full(ids.shape, 0.9, dtype=torch.float64), ids < TOKENS)
    assert torch.equal(run_logits(run, late), run_logits(run, make_noisy(ids)))
    difference = compute_logits(tensors, ids, tau=1.0) - compute_logits(tensors, ids)
    assert difference.abs().max() > 0.01


def test_bound_of_an_import_equals_that_of_the_published_network(folder: Path) -> None:
    tensors = write_family(Path("published"), "mdlm")
    run = import_run(Path("published"))
    assert run.process is not None
    x0 = draw_ids(5).clamp(max=TOKENS - 1)
    reference = ddiff.network_from_noisy(
        lambda noisy: compute_logits(tensors, noisy.zt)[..., :TOKENS].log_softmax(-1),
        run.vocabulary,
    )
    bounds = []
    for network in (reference, as_network(run.denoiser.eval(), run.process)):
        rng = ddiff.CounterRng(0, 0, torch.arange(3), LENGTH)
        terms = ddiff.nelbo(
            run.process,
            network,
            x0,
            torch.ones_like(x0, dtype=torch.bool),
            ddiff.FlatTimes(),
            rng,
            torch.arange(3),
            3,
        )
        bounds.append(terms.closing + terms.diffusion + terms.decoding)
    assert bounds[0].sum() > 1.0
    # The weight of a position multiplies the rounding of the logits.
    assert torch.allclose(bounds[0], bounds[1].to(bounds[0]), atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------------- full sizes


def full_shapes(rows: int, *, has_adaln: bool, prefix: str = "") -> dict[str, list[int]]:
    """Return the shapes of the small published networks: width 768, 12 blocks, C 128."""
    shapes = {}
    for name, tensor in make_tensors(has_adaln=has_adaln).items():
        sizes = {12: rows, 32: 768, 96: 2304, 128: 3072, 192: 4608, 64: 1536, 16: 128, 256: 256}
        shape = [32] if name == "rotary_emb.inv_freq" else [sizes[n] for n in tensor.shape]
        if not name.startswith("blocks."):
            shapes[prefix + name] = shape
        elif name.startswith("blocks.0."):
            for layer in range(12):
                shapes[prefix + name.replace("blocks.0.", f"blocks.{layer}.")] = shape
    return shapes


SMALL = {"hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12, "model_length": 1024}
FULL: dict[str, tuple[dict[str, Any], dict[str, list[int]], int, int]] = {
    "mdlm": (
        MDLM | SMALL | {"vocab_size": 50258},
        full_shapes(50258, has_adaln=True, prefix="backbone."),
        131,
        169_627_218,
    ),
    "bd3lm": (
        CONFIGS["bd3lm"] | SMALL | {"vocab_size": 50258, "block_size": 16},
        full_shapes(50258, has_adaln=True, prefix="backbone.")
        | {"sampling_eps_min": [], "sampling_eps_max": []},
        133,
        169_627_218,
    ),
    "hybrid_epsilon": (
        CONFIGS["hybrid_epsilon"]
        | {
            "tokenizer": {"tokens": 50257},
            "model": {"hidden_size": 768, "n_blocks": 12, "n_heads": 12, "length": 1024},
        },
        full_shapes(50258, has_adaln=False),
        101,
        162_246_482,
    ),
    "duo_ar": (
        CONFIGS["duo_ar"] | SMALL | {"vocab_size": 50257},
        full_shapes(50257, has_adaln=False),
        101,
        162_244_945,
    ),
}


@pytest.mark.parametrize("family", FULL)
def test_full_size_checkpoint_fits_its_layout_and_its_recipe(family: str) -> None:
    config, shapes, count, parameters = FULL[family]
    assert len(shapes) == count
    buffers = ("inv_freq", "sampling_eps_min", "sampling_eps_max")
    sizes = [
        torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith(buffers)
    ]
    assert sum(sizes) == parameters
    tensors = ddiff.PublishedTensors.from_shapes(shapes)
    files = ddiff.PublishedFiles("here", Path("here"), config, tensors, {})
    layout = build_layout(find_layout(family, "--layout"))
    assert layout.recognize(files)
    imported = layout.read(files)
    tensors.finish()
    assert imported.num_tokens == 50257
    assert imported.tokenizer == "gpt2"
    tree: dict[str, Any] = {
        "name": "full",
        "train": {"steps": 1, "batch": 1},
        "tokenizer": {"kind": "letters"},
        **imported.recipe,
    }
    tree["data"] = {"kind": "bundled", **imported.recipe["data"]}
    recipe: Any = parse_recipe(write_toml(tree, "full size"))
    model = assemble(recipe, ddiff.FlatVocabulary(50257), torch.device("meta"))
    own = {name: tensor.shape for name, tensor in model.denoiser.state_dict().items()}
    assert own == {name: tensor.shape for name, tensor in imported.weights.items()}


@pytest.mark.parametrize("family", FULL)
def test_exactly_one_layout_recognizes_each_family(family: str) -> None:
    config, shapes, *_ = FULL[family]
    tensors = ddiff.PublishedTensors.from_shapes(shapes)
    files = ddiff.PublishedFiles("here", Path("here"), config, tensors, {})
    found = [
        name
        for name, component in list_layouts().items()
        if build_layout(component).recognize(files)
    ]
    assert found == [family]


# ---------------------------------------------------------------------- export


@pytest.mark.parametrize("family", ["mdlm", "bd3lm"])
def test_export_then_import_keeps_every_weight_bitwise(folder: Path, family: str) -> None:
    write_family(Path("published"), family)
    first = import_run(Path("published"), "runs/first")
    ddiff.export_published("runs/first", "exported", family)
    second = import_run(Path("exported"), "runs/second")
    before, after = first.denoiser.state_dict(), second.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = draw_ids()
    noisy = make_noisy(ids)
    assert torch.equal(run_logits(first, noisy), run_logits(second, noisy))


def test_exported_files_have_the_logits_of_the_run(folder: Path) -> None:
    write_family(Path("published"), "mdlm")
    run = import_run(Path("published"))
    ddiff.export_published("runs/imported", "exported", "mdlm")
    raw = load_file("exported/model.safetensors")
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in raw.items()}
    config = json.loads(Path("exported/config.json").read_text())
    assert config == MDLM | {"dropout": 0.1, "return_dict": False}
    ids = draw_ids()
    # Any tau: the matrices of the modulation are 0.
    expected = run_logits(run, make_noisy(ids))
    assert torch.allclose(
        compute_logits(tensors, ids, tau=0.7)[..., :TOKENS], expected, atol=TOLERANCE, rtol=0.0
    )


def test_export_of_an_imported_epsilon_hybrid_has_the_published_logits(folder: Path) -> None:
    tensors = write_family(Path("published"), "hybrid_epsilon")
    import_run(Path("published"))
    ddiff.export_published("runs/imported", "exported", "hybrid_epsilon")
    again = load_file("exported/model.safetensors")
    assert again.keys() == tensors.keys() - {"rotary_emb.inv_freq"}
    ids = draw_ids()
    expected = compute_logits(tensors, ids)[..., :TOKENS]
    found = compute_logits(again, ids)
    assert torch.allclose(found[..., :TOKENS], expected, atol=TOLERANCE, rtol=0.0)
    # The row of the mask was left out by the import, and has no probability.
    assert found.softmax(-1)[..., TOKENS].max() == 0.0


def test_epsilon_export_folds_gates_and_shifts_behind_attention(folder: Path) -> None:
    """Fine-tuning changes the vectors that the published network does not have."""
    write_family(Path("published"), "hybrid_epsilon")
    run = import_run(Path("published"))
    generator = torch.Generator().manual_seed(3)
    weights = run.denoiser.state_dict()
    for name in ("backbone.blocks.0.modulation", "backbone.blocks.1.modulation"):
        drawn = torch.randn(weights[name].shape, generator=generator)
        drawn[0] = 0.0  # the shift before attention
        weights[name] = drawn
    weights["backbone.out_modulation"] = torch.randn(2, 1, 32, generator=generator)
    run.denoiser.load_state_dict(weights)
    layout = build_layout(find_layout("hybrid_epsilon", "--format"))
    source = ddiff.ExportSource(run.recipe.to_dict(), weights, run.vocabulary)
    exported = layout.write(source)
    ids = draw_ids()
    found = compute_logits(exported.tensors, ids)[..., :TOKENS]
    assert torch.allclose(found, run_logits(run, make_noisy(ids)), atol=2e-4, rtol=0.0)
    weights["backbone.blocks.1.modulation"][0] += 0.25
    with pytest.raises(ddiff.ArgumentError, match=r"blocks\.1\.modulation.*largest entry is 0\.25"):
        layout.write(source)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["denoiser.time=true"], r"\[denoiser\] time = False; got True"),
        (["denoiser.convolution=3"], r"\[denoiser\] convolution = 0; got 3"),
        (["denoiser.qk_norm=true"], r"\[denoiser\] qk_norm = False"),
        (["denoiser.head='tied'"], r"\[denoiser\] head = 'tokens'; got 'tied'"),
        (["objective.times={kind='block', width=4}"], r"\[objective\] times = 'flat'"),
        (['plugins=["hybrid","dit"]', "process={kind='hybrid_epsilon'}"], r"\[process\] kind"),
    ],
)
def test_export_refuses_models_that_do_not_fold(
    folder: Path, settings: list[str], reason: str
) -> None:
    text = (
        'name = "small"\nplugins = ["mdlm", "dit"]\ndata = { kind = "markov", length = 8 }\n'
        'tokenizer = { kind = "alphabet", symbols = "abcdefgh" }\nvocabulary = { kind = "flat" }\n'
        'process = { kind = "mdlm" }\ntrain = { steps = 1, batch = 8 }\n'
        'denoiser = { kind = "dit", width = 32, layers = 1, heads = 2, time = false }\n'
    )
    recipe: Any = parse_recipe(text, settings=settings)
    model = assemble(recipe, ddiff.FlatVocabulary(8), torch.device("cpu"))
    layout = build_layout(find_layout("mdlm", "--format"))
    source = ddiff.ExportSource(recipe.to_dict(), model.denoiser.state_dict(), model.vocabulary)
    with pytest.raises(ddiff.ArgumentError, match=reason):
        layout.write(source)


# ---------------------------------------------------------------------- fine-tuning


def test_another_run_starts_from_the_imported_weights(folder: Path) -> None:
    write_family(Path("published"), "mdlm")
    run = import_run(Path("published"))
    Path("tuned.toml").write_text(
        'name = "tuned"\nrun_dir = "runs/tuned"\nextends = "runs/imported/recipe.toml"\n'
        '[train]\nsteps = 1\noptimizer = { kind = "adamw", lr = 1e-12 }\n'
        'init = { run = "runs/imported" }\n'
    )
    found = ddiff.run("tuned.toml", settings=["sample.gaps=0", "sample.count=1"])
    before, after = run.denoiser.state_dict(), found.denoiser.state_dict()
    # One step of AdamW changes a weight by about the learning rate of 1e-12.
    assert all(torch.allclose(before[name], after[name], atol=1e-9, rtol=0.0) for name in before)
