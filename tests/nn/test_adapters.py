"""LoRA adapters of denoisers: trained tensors, base, merging, names and mistakes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddiff_dit.ddit import DDiT
from ddiff_dit.dit import DiT
from ddiff_hf.backbone import PretrainedBackbone, make_model
from torch import Tensor

from ddiff.core.components import MixtureProcess, mask_distribution
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import FlatTimes
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.batch import Batch
from ddiff.distributed.blocks import recompute_activations
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.adapters import (
    LoraSettings,
    add_adapters,
    fingerprint_base,
    merge_adapters,
    remove_adapters,
)
from ddiff.nn.denoiser import UNPADDED, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.training.losses import ElboLoss
from ddiff.training.objective import DiffusionObjective
from ddiff.training.optimizers import adamw

pytest.importorskip("peft")

V, WIDTH, LENGTH = 11, 16, 8
VOCABULARY = FlatVocabulary(V)
LLAMA = {
    "vocab_size": V,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def make_dit() -> Any:
    config = DiT.Config(width=WIDTH, layers=2, heads=2)
    return DiT.build(config, vocabulary=VOCABULARY, length=LENGTH)


def make_llama() -> Any:
    return PretrainedBackbone(make_model("llama", LLAMA), VOCABULARY, LENGTH)


def make_denoiser(make_backbone: Any = make_dit) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(make_backbone(), TokenHead(VOCABULARY, WIDTH))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return denoiser


def make_adapted(make_backbone: Any = make_dit, **settings: Any) -> Denoiser:
    denoiser = make_denoiser(make_backbone)
    add_adapters(denoiser, LoraSettings(rank=2, **settings), trains_head=False)
    return denoiser


def train(denoiser: Denoiser, steps: int = 3) -> None:
    ids = torch.arange(4 * LENGTH).reshape(4, LENGTH) % V
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, everywhere, everywhere, torch.zeros_like(ids), torch.arange(4))
    process = MixtureProcess(VOCABULARY, LinearSchedule(), mask_distribution(VOCABULARY))
    objective = DiffusionObjective(process, denoiser, ElboLoss(), FlatTimes())
    optimizer = adamw(denoiser, lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        rng = CounterRng(0, step, batch.index, LENGTH)
        objective(batch, rng, objective.counts(batch), 4).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits(denoiser: Denoiser) -> Tensor:
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % (V + 1)
    hidden = denoiser.backbone(ids, torch.full(ids.shape, 0.5), UNPADDED)
    return hidden @ denoiser.head.table.T + denoiser.head.bias


@pytest.mark.parametrize("make_backbone", [make_dit, make_llama])
def test_new_adapters_do_not_change_the_network(make_backbone: Any) -> None:
    plain = logits(make_denoiser(make_backbone))
    assert torch.equal(logits(make_adapted(make_backbone)), plain)


@pytest.mark.parametrize("make_backbone", [make_dit, make_llama])
def test_training_changes_only_adapters(make_backbone: Any) -> None:
    denoiser = make_adapted(make_backbone)
    before = {name: value.clone() for name, value in denoiser.named_parameters()}
    base = fingerprint_base(denoiser)
    train(denoiser)
    changed = {
        name for name, value in denoiser.named_parameters() if not torch.equal(before[name], value)
    }
    assert changed == set(denoiser.state_dict())
    assert changed
    assert all(".lora_" in name for name in changed)
    assert denoiser.adapters is not None
    denoiser.adapters.base_fingerprint = None  # compute it again
    assert fingerprint_base(denoiser) == base


@pytest.mark.parametrize("make_backbone", [make_dit, make_llama])
def test_merged_logits_equal_those_of_the_adapters(make_backbone: Any) -> None:
    denoiser = make_adapted(make_backbone)
    plain = logits(denoiser)
    train(denoiser)
    adapted = logits(denoiser)
    assert (adapted - plain).abs().max() > 0.1
    merge_adapters(denoiser)
    # float32: the products are added in another order
    assert torch.allclose(logits(denoiser), adapted, rtol=0.0, atol=1e-5)
    assert denoiser.state_dict().keys() == make_denoiser(make_backbone).state_dict().keys()
    assert all(parameter.requires_grad for parameter in denoiser.parameters())


def test_state_dict_of_adapters_loads_into_another_copy_of_the_base() -> None:
    trained = make_adapted()
    train(trained)
    other = make_adapted()
    other.load_state_dict(trained.state_dict())
    assert torch.equal(logits(other), logits(trained))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_removed_adapters_show_the_base_and_come_back() -> None:
    denoiser = make_adapted()
    train(denoiser)
    adapted = logits(denoiser)
    plain = make_denoiser()
    with remove_adapters(denoiser):
        assert denoiser.state_dict().keys() == plain.state_dict().keys()
        assert torch.equal(logits(denoiser), logits(plain))
    assert torch.equal(logits(denoiser), adapted)


def test_fingerprint_of_the_base_finds_a_changed_weight() -> None:
    first = make_adapted()
    second = make_adapted()
    with torch.no_grad():
        second.head.bias[3] += 1e-6
    assert fingerprint_base(first) == fingerprint_base(make_adapted())
    assert fingerprint_base(first) != fingerprint_base(second)


def test_targets_and_full_select_modules_by_the_end_of_their_names() -> None:
    denoiser = make_adapted(targets=("qkv",), full=("blocks.1.down", "head"))
    names = set(denoiser.state_dict())
    assert {name for name in names if ".lora_" in name} == {
        f"backbone.blocks.{block}.qkv.lora_{each}.default.weight"
        for block in (0, 1)
        for each in "AB"
    }
    whole = {name for name in names if ".lora_" not in name}
    assert whole == {
        "backbone.blocks.1.down.weight",
        "backbone.blocks.1.down.bias",
        "head.table",
        "head.bias",
    }


def test_every_linear_layer_of_the_blocks_of_ddit_gets_adapters() -> None:
    config = DDiT.Config(width=64, layers=2, heads=1)
    process = MixtureProcess(VOCABULARY, LinearSchedule(), mask_distribution(VOCABULARY))
    backbone = DDiT.build(config, vocabulary=VOCABULARY, process=process)
    denoiser = Denoiser(backbone, TokenHead(VOCABULARY, backbone.width))
    add_adapters(denoiser, LoraSettings(rank=2), trains_head=False)
    assert denoiser.adapters is not None
    adapted = {name.rpartition(".")[2] for name in denoiser.adapters.layers}
    assert {"qkv", "up", "down"} <= adapted


@pytest.mark.parametrize("key", ["targets", "full"])
def test_unknown_name_is_refused_with_the_known_ones(key: str) -> None:
    with pytest.raises(ArgumentError, match=rf'{key} has "q_proj".*qkv'):
        make_adapted(**{key: ("q_proj",)})


def test_missing_peft_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataError, match=r'pip install "discrete-diffusion\[lora\]"'):
        make_adapted()


@pytest.mark.parametrize("make_backbone", [make_dit, make_llama])
def test_recomputed_activations_give_adapters_the_same_gradients(make_backbone: Any) -> None:
    gradients = []
    for recomputes in (False, True):
        denoiser = make_adapted(make_backbone)
        if recomputes:
            recompute_activations(denoiser)
        train(denoiser, steps=1)
        found = [parameter.grad for parameter in denoiser.parameters()]
        gradients.append([gradient for gradient in found if gradient is not None])
    assert gradients[0]
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_frozen_head_computes_no_gradient_of_its_table() -> None:
    denoiser = make_adapted()
    train(denoiser, steps=1)
    assert denoiser.head.table.grad is None
    gradients = [p.grad for p in denoiser.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)


def test_files_of_peft_load_into_the_model_of_transformers(tmp_path: Path) -> None:
    """The names of the exported tensors are those that peft gives to the same layers."""
    from peft import LoraConfig, get_peft_model

    denoiser = make_adapted(make_llama)
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    plain = make_model("llama", LLAMA)
    wrapped = get_peft_model(plain, config)
    theirs = {name for name in wrapped.state_dict() if ".lora_" in name and "proj" in name}
    prefix = denoiser.backbone.library_prefix
    ours = {
        f"base_model.model.{name.removeprefix(prefix)}"
        for name in denoiser.state_dict()
        if "self_attn" in name
    }
    assert ours == {name for name in theirs if "self_attn" in name}
