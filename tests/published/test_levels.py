"""Layouts of published networks that read the noise level (ddit)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from imports import draw_ids, run_logits
from reference_forward import (
    CONDITION,
    HEADS,
    LAYERS,
    LENGTH,
    MDLM,
    ROWS,
    SYMBOLS,
    TOKENS,
    WIDTH,
    compute_logits,
    make_tensors,
    write_checkpoint,
)
from safetensors import safe_open
from test_shared_checkpoints import SHARED
from torch import Tensor
from torch.nn import functional as F

import ddiff
from ddiff.core.prediction import Score
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import Context
from ddiff.nn.network import as_network
from ddiff.runs.importing import build_layout, find_layout

TOLERANCE = 5e-5  # of logits that reach 40, in float32
MODEL = {
    "hidden_size": WIDTH,
    "cond_dim": CONDITION,
    "length": LENGTH,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "dropout": 0.1,
}
SEDD = {
    "tokens": TOKENS,
    "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20.0},
    "model": {**MODEL, "scale_by_sigma": True},
}
UNIFORM: dict[str, Any] = {
    **SEDD,
    "tokens": ROWS,
    "graph": {"type": "uniform"},
    "noise": {"type": "geometric", "sigma_min": 1e-4, "sigma_max": 20.0},
    "model": {**MODEL, "scale_by_sigma": False},
}
GIDD = {
    "model_type": "dit",
    "vocab_size": ROWS,
    "max_seq_len": LENGTH,
    "hidden_size": WIDTH,
    "timestep_cond_dim": CONDITION,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "attention_dropout": 0.0,
    "p_uniform": 0.2,
    "t_eps": 1e-4,
}
CONDITIONED = MDLM | {"time_conditioning": True}
GAMMA: dict[str, Any] = {
    "model_type": "gamma_hybrid",
    "tokenizer": {"tokens": TOKENS},
    "graph": {"type": "QGamma", "gamma": 0.1},
    "model": {
        **MODEL,
        "scale_by_sigma": True,
        "transformer_sigma_conditioning": True,
        "hybrid_sigma_embedding": True,
        "post_process_logits": True,
        "use_timestep_embedding": True,
    },
}
FAMILIES: dict[str, tuple[str, Mapping[str, Any], str]] = {  # layout, configuration, prefix
    "sedd": ("sedd", SEDD, ""),
    "sedd_uniform": ("sedd", UNIFORM, ""),
    "gidd": ("gidd", GIDD, ""),
    "mdlm_sigma": ("mdlm_sigma", CONDITIONED, "backbone."),
    "udlm": ("udlm", CONDITIONED | {"model_type": "udlm"}, "backbone."),
    "udlm_labels": (
        "udlm",
        CONDITIONED | {"model_type": "udlm", "cfg": True, "cfg_num_classes": 3},
        "backbone.",
    ),
    "duo": ("duo", CONDITIONED | {"model_type": "DUO", "causal_attention": False}, "backbone."),
    "hybrid_gamma": ("hybrid_gamma", GAMMA, ""),
}
SCORED = {"sedd", "sedd_uniform", "hybrid_gamma"}
MASKED = {"sedd", "gidd", "mdlm_sigma", "hybrid_gamma"}
MARKOV = 'data={kind="markov", length=8, rows=64, validation=16}'


def make_family(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Draw the tensors of a tiny network of a family, without a prefix."""
    tensors = make_tensors(seed)
    if family == "hybrid_gamma":
        for part in ("weight", "bias"):
            del tensors[f"output_layer.adaLN_modulation.{part}"]
    if family == "gidd":
        del tensors["rotary_emb.inv_freq"]
        tensors["rotary_emb.cos_cached"] = torch.ones(1, LENGTH, 3, 1, WIDTH // HEADS)
        tensors["rotary_emb.sin_cached"] = torch.ones(1, LENGTH, 3, 1, WIDTH // HEADS)
    if family == "udlm_labels":
        generator = torch.Generator().manual_seed(seed + 1)
        tensors["cond_map.embedding_table.weight"] = torch.randn(4, CONDITION, generator=generator)
    return tensors


def settings_of(family: str) -> list[str]:
    symbols = SYMBOLS if family in MASKED else f"{SYMBOLS}l"
    return [f'tokenizer={{kind="alphabet", symbols="{symbols}"}}', MARKOV]


def import_family(family: str, out: str = "runs/imported") -> tuple[dict[str, Tensor], Any]:
    _, config, prefix = FAMILIES[family]
    tensors = make_family(family)
    write_checkpoint(Path("published"), config, tensors, prefix)
    ddiff.import_published("published", out, settings=settings_of(family))
    return tensors, ddiff.load(out)


def draw_noisy(family: str) -> Noisy:
    """Draw states and times. Each sequence has one time, apart from the gamma-hybrid."""
    ids = draw_ids()
    if family not in MASKED:
        ids = ids % ROWS  # the last row is a token
    generator = torch.Generator().manual_seed(4)
    count = LENGTH if family == "hybrid_gamma" else 1
    t = 0.05 + 0.9 * torch.rand(len(ids), count, generator=generator, dtype=torch.float64)
    return Noisy(ids, t.expand(ids.shape), torch.zeros_like(ids, dtype=torch.bool))


def expect_tau(family: str, t: Tensor) -> Tensor:
    """Return the noise level of the published networks at times t, from their description."""
    if family == "gidd":
        return t
    if family == "sedd_uniform":
        return 1e-4 ** (1.0 - t) * 20.0**t
    floor = {"hybrid_gamma": 5e-3, "mdlm_sigma": 0.0}.get(family, 1e-3)
    return -torch.log1p(-(1.0 - floor) * t)


def expect_raw(family: str, tensors: Mapping[str, Tensor], noisy: Noisy) -> Tensor:
    """Return the published outputs [B,L,S]."""
    tau = expect_tau(family, noisy.t)
    if family != "hybrid_gamma":
        added = None
        if family == "udlm_labels":
            added = F.silu(tensors["cond_map.embedding_table.weight"][-1])
        return compute_logits(tensors, noisy.zt, tau[:, :1].float(), added=added)
    kept = torch.exp(-0.1 * tau).float().unsqueeze(-1)
    table = tensors["vocab_embed.embedding"]
    mixed = kept * table[noisy.zt] + (1.0 - kept) * table[-1]
    return compute_logits(tensors, noisy.zt, tau.float(), embedded=mixed)


def query_scores(run: Any, noisy: Noisy) -> Tensor:
    """Return the log-scores [B,L,S] that the formulas of a run receive."""
    network = as_network(run.denoiser.eval(), run.process)
    rows = torch.arange(noisy.zt.numel())

    def read(prediction: Any, *_: Tensor) -> Tensor:
        assert isinstance(prediction, Score)
        return prediction.log_ratio

    root = torch.full_like(rows, run.vocabulary.root)
    scores: Tensor = network(noisy)(rows, root, read)
    return scores.unflatten(0, noisy.zt.shape)


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_network_has_the_published_outputs(folder: Path, family: str) -> None:
    tensors, run = import_family(family)
    noisy = draw_noisy(family)
    raw = expect_raw(family, tensors, noisy)
    assert raw.abs().max() > 3.0
    if family not in SCORED:
        tokens = raw[..., : run.vocabulary.num_tokens]
        found = run_logits(run, noisy)
        assert torch.allclose(found, tokens, atol=TOLERANCE, rtol=0.0)
        return
    scale = torch.zeros_like(noisy.t)
    if family != "sedd_uniform":
        scale = torch.log(torch.expm1(expect_tau(family, noisy.t))) + math.log(TOKENS)
    expected = raw - scale.float().unsqueeze(-1)
    own = F.one_hot(noisy.zt, ROWS).bool()
    scores = query_scores(run, noisy)
    assert not scores[own].any()  # the ratio of a state to itself is 1
    compared = ~own
    if family == "sedd":
        compared &= (noisy.zt == TOKENS).unsqueeze(-1)  # tokens of this process never change
    difference = (scores - expected)[compared].abs().max()
    assert difference <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_network_reads_the_published_noise_level(folder: Path, family: str) -> None:
    """At another level the reference network has other outputs, so that the test above can fail."""
    tensors, _ = import_family(family)
    noisy = draw_noisy(family)
    later = noisy._replace(t=noisy.t + 0.02)
    change = expect_raw(family, tensors, later) - expect_raw(family, tensors, noisy)
    assert change.abs().max() > 20 * TOLERANCE


def test_label_of_an_imported_model_selects_the_published_row(folder: Path) -> None:
    tensors, run = import_family("udlm_labels")
    noisy = draw_noisy("udlm_labels")
    label = torch.tensor([2, 0, -1])
    rows = tensors["cond_map.embedding_table.weight"][label].unsqueeze(1)
    tau = expect_tau("udlm_labels", noisy.t)[:, :1].float()
    expected = compute_logits(tensors, noisy.zt, tau, added=F.silu(rows))
    with torch.no_grad():
        context = Context(conditions={"class": label})
        hidden = run.denoiser.eval().hidden_states(noisy, context)
        logits = hidden @ run.denoiser.head.table.T + run.denoiser.head.bias
    assert torch.allclose(logits.unflatten(0, noisy.zt.shape), expected, atol=TOLERANCE, rtol=0.0)


def test_prompt_does_not_change_the_level_of_a_sequence(folder: Path) -> None:
    _, run = import_family("gidd")
    noisy = draw_noisy("gidd")
    t = noisy.t.clone()
    t[:, :3] = 0.0
    assert torch.equal(run_logits(run, noisy._replace(t=t)), run_logits(run, noisy))


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("family", ["sedd", "gidd", "duo", "hybrid_gamma"])
def test_imported_run_evaluates_and_samples(folder: Path, family: str, ddiff: Any) -> None:
    import_family(family)
    found = ddiff("eval", "runs/imported")
    assert found.code == 0, found.err
    record = json.loads(Path("runs/imported/evaluation.json").read_text())
    assert math.isfinite(record["figures"]["nelbo"]["value"])
    found = ddiff("sample", "runs/imported", "--count", "2", "--steps", "4")
    assert found.code == 0, found.err


@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_keeps_every_weight_bitwise(folder: Path, family: str) -> None:
    layout, *_ = FAMILIES[family]
    _, first = import_family(family, "runs/first")
    ddiff.export_published("runs/first", "exported", layout)
    ddiff.import_published("exported", "runs/second", settings=settings_of(family))
    second = ddiff.load("runs/second")
    before, after = first.denoiser.state_dict(), second.denoiser.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        # The constants of a norm without modulation are the norm weight minus 1.
        tolerance = 1e-7 if name == "backbone.out_constants" else 0.0
        assert torch.allclose(before[name], after[name], rtol=0.0, atol=tolerance), name
    assert first.recipe.denoiser.config == second.recipe.denoiser.config
    assert first.recipe.process.config == second.recipe.process.config


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_layout_recognizes_each_family(family: str) -> None:
    layout, config, prefix = FAMILIES[family]
    named = {prefix + name: tensor for name, tensor in make_family(family).items()}
    tensors = ddiff.PublishedTensors.from_tensors(named)
    files = ddiff.PublishedFiles("here", Path("here"), config, tensors, {})
    layouts = {"mdlm", "bd3lm", "hybrid_epsilon", *(name for name, *_ in FAMILIES.values())}
    found = [
        name for name in layouts if build_layout(find_layout(name, "--layout")).recognize(files)
    ]
    assert found == [layout]


SMALL = {"width": 768, "condition": 128, "layers": 12}
COUNTS = {  # tensors and parameters of the small published models, with S rows
    "sedd": (50258, 131, 169_627_218),
    "sedd_uniform": (50257, 131, 169_625_681),
    "gidd": (50258, 132, 169_627_218),
    "udlm": (30522, 131, 139_292_986),
    "duo": (50258, 131, 169_627_218),
    "hybrid_gamma": (50258, 129, 169_429_074),
}
FULL_SIZES = {ROWS: 0, 32: 768, 96: 2304, 128: 3072, 192: 4608, 64: 1536, 16: 128, 256: 256}


def full_shapes(family: str, rows: int) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for name, tensor in make_family(family).items():
        if name.startswith("rotary"):
            shapes[name] = list(tensor.shape)
            continue
        shape = [FULL_SIZES[size] or rows for size in tensor.shape]
        if not name.startswith("blocks."):
            shapes[name] = shape
        elif name.startswith("blocks.0."):
            for layer in range(12):
                shapes[name.replace("blocks.0.", f"blocks.{layer}.")] = shape
    return shapes


def full_config(family: str, rows: int) -> dict[str, Any]:
    _, config, _ = FAMILIES[family]
    names = {
        "vocab_size": rows,
        "tokens": rows - int(family in MASKED),
        "tokenizer": {"tokens": rows - 1},
        **dict.fromkeys(("hidden_dim", "hidden_size"), 768),
        **dict.fromkeys(("cond_dim", "timestep_cond_dim"), 128),
        **dict.fromkeys(("n_blocks", "num_hidden_layers"), 12),
        **dict.fromkeys(("n_heads", "num_attention_heads"), 12),
    }
    full = {key: names.get(key, value) for key, value in config.items()}
    if "model" in full:
        full["model"] = {key: names.get(key, value) for key, value in full["model"].items()}
    return full


@pytest.mark.parametrize("family", COUNTS)
def test_full_size_checkpoint_fits_its_layout(family: str) -> None:
    rows, count, parameters = COUNTS[family]
    shapes = full_shapes(family, rows)
    assert len(shapes) == count
    trained = [shape for name, shape in shapes.items() if not name.startswith("rotary")]
    assert sum(math.prod(shape) for shape in trained) == parameters
    tensors = ddiff.PublishedTensors.from_shapes(shapes)
    files = ddiff.PublishedFiles("here", Path("here"), full_config(family, rows), tensors, {})
    layout = build_layout(find_layout(FAMILIES[family][0], "--layout"))
    assert layout.recognize(files)
    imported = layout.read(files)
    tensors.finish()
    assert imported.num_tokens == rows - int(family in MASKED)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("sedd", {"graph": {"type": "banana"}}, r"graph\.type must be 'absorb' or 'uniform'"),
        ("sedd", {"noise": {"type": "cosine"}}, r"noise\.type must be 'loglinear'"),
        ("sedd", {"tokens": ROWS}, r"vocab_embed\.embedding must have the shape \[13, 32\]"),
        (
            "sedd_uniform",
            {"model": {**MODEL, "scale_by_sigma": True}},
            r"model\.scale_by_sigma must be false",
        ),
        ("gidd", {"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ("duo", {"causal_attention": True}, "no layout recognizes the files"),
        ("udlm", {"time_conditioning": False}, "time_conditioning must be true"),
        (
            "hybrid_gamma",
            {"model": {**MODEL, "transformer_sigma_conditioning": False}},
            r"model\.transformer_sigma_conditioning must be true",
        ),
    ],
)
def test_configuration_of_another_model_is_refused(
    folder: Path, family: str, changes: Mapping[str, Any], reason: str
) -> None:
    _, config, prefix = FAMILIES[family]
    write_checkpoint(Path("published"), {**config, **changes}, make_family(family), prefix)
    with pytest.raises(DataError, match=reason):
        ddiff.import_published("published", "runs/imported", settings=settings_of(family))
    assert not Path("runs").exists()


@pytest.mark.parametrize("family", ["sedd", "hybrid_gamma"])
def test_missing_and_unknown_tensors_are_named(folder: Path, family: str) -> None:
    _, config, prefix = FAMILIES[family]
    tensors = make_family(family)
    del tensors["blocks.1.adaLN_modulation.bias"]
    write_checkpoint(Path("published"), config, tensors, prefix)
    with pytest.raises(DataError, match=r"no tensor blocks\.1\.adaLN_modulation\.bias"):
        ddiff.import_published("published", "runs/imported", settings=settings_of(family))
    tensors = make_family(family) | {"logit_bias": torch.zeros(1, 1, 1)}
    write_checkpoint(Path("published"), config, tensors, prefix)
    with pytest.raises(DataError, match="does not know: logit_bias"):
        ddiff.import_published("published", "runs/imported", settings=settings_of(family))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("sedd", {"process": {"floor": 0.5}}, r"\[process\] floor = 0.001"),
        ("gidd", {"process": {"gamma": 2.0}}, r"\[process\] gamma = 1.0"),
        ("duo", {"denoiser": {"noise": "t"}}, r"\[denoiser\] noise = 'sigma'; got 't'"),
        ("duo", {"denoiser": {"kind": "dit"}}, r"\[denoiser\] kind = 'ddit'; got 'dit'"),
        ("hybrid_gamma", {"denoiser": {"mixing": 0.7}}, "mixing is 0 or the gamma"),
    ],
)
def test_export_refuses_models_that_the_layout_cannot_represent(
    folder: Path, family: str, changes: Mapping[str, Mapping[str, Any]], reason: str
) -> None:
    _, run = import_family(family)
    recipe = run.recipe.to_dict()
    for table, keys in changes.items():
        recipe[table] = {**recipe[table], **keys}
    layout = build_layout(find_layout(FAMILIES[family][0], "--format"))
    source = ddiff.ExportSource(recipe, run.denoiser.state_dict(), run.vocabulary)
    with pytest.raises(ArgumentError, match=reason):
        layout.write(source)


# ---------------------------------------------------------------------- published programs


@pytest.mark.skipif(SHARED is None, reason="there is no folder shared/checkpoints")
@pytest.mark.parametrize("family", ["sedd_absorb", "gidd", "hybrid_gamma"])
def test_import_has_the_outputs_of_the_published_program(folder: Path, family: str) -> None:
    assert SHARED is not None
    with safe_open(SHARED / f"{family}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {n: t for n, t in tensors.items() if not n.startswith(("input.", "output."))}
    write_checkpoint(Path("published"), config, weights)
    ddiff.import_published("published", "runs/imported", settings=settings_of("gidd"))
    run = ddiff.load("runs/imported")
    ids = tensors["input.ids"]
    if family == "gidd":
        t = tensors["input.t"].double().unsqueeze(-1)
    else:
        floor = 5e-3 if family == "hybrid_gamma" else 1e-3
        sigma = tensors["input.sigma"].double()
        sigma = sigma.unsqueeze(-1) if sigma.dim() == 1 else sigma
        t = -torch.expm1(-sigma) / (1.0 - floor)
    noisy = Noisy(ids, t.expand(ids.shape), torch.zeros_like(ids, dtype=torch.bool))
    if family == "gidd":
        expected = tensors["output.logits"][..., :TOKENS]
        assert torch.allclose(run_logits(run, noisy), expected, atol=TOLERANCE, rtol=0.0)
        return
    compared = ~F.one_hot(ids, ROWS).bool()
    if family == "sedd_absorb":
        compared &= (ids == TOKENS).unsqueeze(-1)
    difference = query_scores(run, noisy) - tensors["output.log_score"]
    assert difference[compared].abs().max() <= TOLERANCE
