"""Steps of several fields: no waiting, recomputation, compilation, and ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from joint_ranks import LENGTH, SAMPLES, make_batch, make_objective, train_fields
from ranks import on_ranks
from torch import Tensor

from ddiff.core.rng import CounterRng
from ddiff.distributed.blocks import compile_blocks, find_blocks, recompute_activations
from ddiff.training.fields_objective import FieldsObjective
from ddiff.training.protocols import LossTerms


def compute(objective: FieldsObjective, counts: dict[str, Tensor] | None = None) -> LossTerms:
    batch = make_batch(torch.arange(SAMPLES))
    counts = counts or count(objective)
    return objective(batch, CounterRng(0, 0, batch.index, LENGTH), counts, SAMPLES)


def count(objective: FieldsObjective) -> dict[str, Tensor]:
    batch = make_batch(torch.arange(SAMPLES))
    return {name: items.double() for name, items in objective.counts(batch).items()}


def gradients(objective: FieldsObjective) -> dict[str, Tensor]:
    objective.denoiser.zero_grad()
    compute(objective).loss.backward()
    return {name: p.grad.clone() for name, p in objective.denoiser.named_parameters()}


def test_step_of_several_fields_does_not_wait_for_the_device(no_sync_guard: Any) -> None:
    objective = make_objective()
    counts = {name: items.to("meta") for name, items in count(objective).items()}
    objective.module.to("meta")
    compute(objective, counts)
    with no_sync_guard():
        terms = compute(objective, counts)
        terms.loss.backward()
    assert terms.loss.is_meta


def test_recomputed_activations_of_several_fields_give_equal_gradients() -> None:
    objective = make_objective()
    expected = gradients(objective)
    assert len(find_blocks(objective.denoiser)) == 2
    recompute_activations(objective.denoiser)
    for name, gradient in gradients(objective).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.slow
def test_compiled_blocks_of_several_fields_give_close_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are traced as one graph; `test_blocks.py` tests the generated code of Inductor."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    objective = make_objective()
    expected = gradients(objective)
    compile_blocks(objective.denoiser)
    for name, gradient in gradients(objective).items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0.0, atol=1e-4 * largest + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_the_weights_of_one_process(tmp_path: Path, kind: str) -> None:
    """Rank 1 has no sample with a latent, so its head of the latent gets no row.

    The tolerance covers float32 sums in another order.
    """
    train_fields(str(tmp_path), "single")
    on_ranks(2, train_fields, str(tmp_path), kind)
    expected = torch.load(tmp_path / "single.pt")
    found = torch.load(tmp_path / f"{kind}.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
