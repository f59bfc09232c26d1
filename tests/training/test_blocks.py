"""Blocks (layers) of a backbone: activation recomputation, compilation and mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import SYMBOLS
from torch import Tensor, nn

from ddiff.core.rng import CounterRng
from ddiff.distributed.blocks import compile_blocks, find_blocks, recompute_activations
from ddiff.distributed.single import SingleBackend
from ddiff.nn.denoiser import NUM_ROW_COUNTS
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.run import Run
from ddiff.runs.session import build_run

DEEP = ["denoiser.layers=3", "denoiser.dropout=0.2"]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return build_run(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), DEEP), SingleBackend())


def step(run: Run, number: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, gradients by parameter name) of batch `number`."""
    torch.manual_seed(1)  # dropout
    batch = run.data.batch_at(number, 0)
    rng = CounterRng(0, number, batch.index, run.recipe.length)
    run.objective.module.zero_grad()
    loss = run.objective(batch, rng, {"tokens": batch.scored.sum().double()}, 8).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in run.objective.module.named_parameters()
    }


def with_random_head(run: Run) -> None:
    torch.manual_seed(2)
    nn.init.normal_(run.denoiser.head.table, std=0.3)
    for block in run.denoiser.backbone.blocks:
        nn.init.normal_(block.modulation, std=0.3)


def test_find_blocks_lists_the_outermost_module_lists(run: Run) -> None:
    assert find_blocks(run.denoiser) == list(run.denoiser.backbone.blocks)
    assert len(find_blocks(run.denoiser)) == 3


def test_recompute_activations_keeps_loss_gradients_and_names(
    run: Run,
) -> None:
    with_random_head(run)
    names, (loss, gradients) = list(run.denoiser.state_dict()), step(run)
    recompute_activations(run.denoiser)
    again, recomputed = step(run)
    assert list(run.denoiser.state_dict()) == names
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_recompute_activations_saves_fewer_tensors(run: Run) -> None:
    def kept() -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch = run.data.batch_at(0, 0)
            rng = CounterRng(0, 0, batch.index, run.recipe.length)
            run.objective(batch, rng, {"tokens": batch.scored.sum().double()}, 8)
        return sum(sizes)

    whole = kept()
    recompute_activations(run.denoiser)
    assert kept() < 0.5 * whole


@pytest.mark.slow
def test_compile_blocks_compiles_equal_blocks_once(run: Run) -> None:
    from torch._dynamo.utils import counters

    with_random_head(run)
    for block in run.denoiser.backbone.blocks:
        block.dropout.p = 0.0  # compiled dropout uses other random numbers
    loss, gradients = step(run)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(run.denoiser)
    recompute_activations(run.denoiser)
    for _ in range(2):
        compiled, theirs = step(run)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # Fused kernels sum float32 values in another order.
    torch.testing.assert_close(compiled, loss, rtol=1e-6, atol=0.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)


def test_padding_the_inputs_of_the_head_keeps_the_loss_and_limits_their_shapes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_random_head(run)
    shapes: set[int] = set()
    total = run.denoiser.head.total
    for number in range(12):
        plain, gradients = step(run, number)
        with monkeypatch.context() as patch:
            patch.setattr(run.denoiser, "fixed_shapes", True)
            patch.setattr(
                run.denoiser.head, "total", lambda h, *rest: shapes.add(len(h)) or total(h, *rest)
            )
            filled, theirs = step(run, number)
        # Padding changes the order of float32 sums.
        torch.testing.assert_close(filled, plain, rtol=1e-6, atol=0.0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)
    positions = 8 * run.recipe.length
    assert len(shapes) > 1
    assert all(size % (positions // NUM_ROW_COUNTS) == 0 for size in shapes)


def test_mixed_precision_computes_only_matrix_products_in_bfloat16(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_random_head(run)
    exact, _ = step(run)
    seen: dict[str, Any] = {}

    divergence = run.process.divergence

    def record_dtype(dist: Any, *rows: Tensor) -> Tensor:
        seen["distribution"] = dist.log_mass(0).dtype
        return divergence(dist, *rows)

    monkeypatch.setattr(run.process, "divergence", record_dtype)
    run.denoiser.backbone.blocks[0].up.register_forward_hook(
        lambda m, i, out: seen.update(product=out.dtype)
    )
    run.denoiser.precision = torch.bfloat16
    rounded, gradients = step(run)
    assert seen == {"distribution": torch.float32, "product": torch.bfloat16}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    # bfloat16 has 8 bits of precision: a mean of 100 losses has an error below 1 %.
    assert 0.0 < abs(rounded - exact) < 1e-2 * exact
