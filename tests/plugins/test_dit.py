"""Diffusion transformer (DiT): attention, initialization, conditions, sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ddiff_dit.dit import SIZES, Condition, DiT, Rotation
from networks import randomize_zeros
from pydantic import ValidationError
from torch import Tensor

from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.data.condition_forms import Label, Vector
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.training.optimizers import split_parameters

VOCABULARY = HierarchicalVocabulary([[1, 0, 2, 1, 2, 0, 1, 1]])
BATCH, LENGTH, WIDTH = 2, 12, 16


def make(time: bool = True, trained: bool = True, **kwargs: float) -> DiT:
    """Make a float64 DiT; `time`: the network reads noise times.

    `trained`: fill parameters that start at zero with random numbers, so that all of them matter.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers": 2, "heads": 2, "time": time, **kwargs}
    model = DiT(VOCABULARY, WIDTH, **options).double().eval()
    if trained:
        randomize_zeros(model)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY.num_states, (BATCH, LENGTH), generator=generator)
    return ids, torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64)


def test_dit_output_has_the_declared_width_and_module_dtype() -> None:
    ids, t = inputs()
    model = make()
    assert model(ids, t, UNPADDED).shape == (BATCH, LENGTH, model.width)
    assert model.float()(ids, t, UNPADDED).dtype == torch.float32  # times stay float64


def test_dit_blocks_start_as_the_identity() -> None:
    ids, t = inputs()
    model = make(trained=False)
    start = torch.nn.functional.layer_norm(model.embedding(ids), (WIDTH,))
    assert torch.equal(model(ids, t, UNPADDED), start)


def test_dit_first_loss_is_that_of_the_uniform_distribution() -> None:
    ids, t = inputs()
    denoiser = Denoiser(make(trained=False), TokenHead(VOCABULARY, WIDTH).double())
    rows = torch.arange(ids.numel())
    root = torch.full_like(rows, VOCABULARY.root)
    noisy = Noisy(ids, t, torch.zeros_like(ids, dtype=torch.bool))
    total, _ = denoiser(
        noisy, UNPADDED, rows, root, lambda dist, idx: -dist.log_prob(ids.flatten()[idx] % 8)
    )
    assert total.item() == pytest.approx(len(rows) * math.log(VOCABULARY.num_tokens), rel=1e-12)


def test_dit_rotary_products_depend_only_on_position_differences() -> None:
    """The angles are up to 40 radians, whose float64 rounding error is 1e-14."""
    rotation = Rotation(torch.zeros(1, 40, WIDTH, dtype=torch.float64), 8, torch.arange(40))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 40, 1, 8)
    products = torch.einsum("bihw,bjhw->ij", rotation(q), rotation(k))
    for shift in (1, 7, 30):
        torch.testing.assert_close(
            products[shift:, shift:], products[:-shift, :-shift], rtol=0, atol=1e-12
        )
    assert (products[0, 0] - products[0, 5]).abs() > 0.01  # products depend on the difference


def test_dit_output_of_a_document_does_not_depend_on_its_place_in_the_row() -> None:
    ids, t = inputs()
    model = make()
    alone = model(ids[:, 5:9], t[:, 5:9], UNPADDED)
    document = torch.tensor([0] * 5 + [1] * 4 + [2] * 3).expand(BATCH, -1)
    packed = model(ids, t, Context(document=document))[:, 5:9]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_dit_packed_documents_do_not_attend_to_each_other() -> None:
    """Equality is bitwise, because a hidden position has the weight exp(-inf) = 0."""
    ids, t = inputs()
    model = make()
    context = Context(document=(torch.arange(LENGTH) >= 5).long().expand(BATCH, -1))
    before = model(ids, t, context)
    ids[:, :5] = (ids[:, :5] + 1) % VOCABULARY.num_states
    t[:, :5] = 1 - t[:, :5]
    after = model(ids, t, context)
    assert torch.equal(after[:, 5:], before[:, 5:])
    assert not torch.equal(after[:, :5], before[:, :5])


def test_dit_hidden_states_do_not_depend_on_padding() -> None:
    ids, t = inputs()
    model = make()
    valid = (torch.arange(LENGTH) < 7).expand(BATCH, -1)
    before = model(ids, t, Context(valid=valid))
    ids[:, 7:] = 0
    t[:, 7:] = 1.0
    after = model(ids, t, Context(valid=valid))
    assert torch.equal(after[:, :7], before[:, :7])
    unpadded = model(ids[:, :7], t[:, :7], UNPADDED)
    # Longer rows are summed in another order.
    torch.testing.assert_close(after[:, :7], unpadded, rtol=0, atol=1e-12)
    assert model(ids, t, Context(valid=torch.zeros_like(valid))).isfinite().all()


def test_dit_attends_to_every_position_without_a_mask() -> None:
    ids, t = inputs()
    model = make()
    before = model(ids, t, UNPADDED)
    ids[:, -1] = (ids[:, -1] + 1) % VOCABULARY.num_states
    assert ((model(ids, t, UNPADDED) - before).abs().amax(-1) > 1e-6).all()


def test_dit_uses_the_time_of_each_position_or_ignores_time() -> None:
    ids, t = inputs()
    later = t.clone()
    later[:, 3] = 1 - later[:, 3]
    timeless = make(time=False)
    assert torch.equal(timeless(ids, t, UNPADDED), timeless(ids, later, UNPADDED))
    model = make()
    change = (model(ids, later, UNPADDED) - model(ids, t, UNPADDED)).abs().amax(-1)
    assert (change > 1e-6).all()  # all positions attend to position 3, whose time changed
    apart = Context(
        document=torch.arange(LENGTH).expand(BATCH, -1)
    )  # no position attends to another
    change = (model(ids, later, apart) - model(ids, t, apart)).abs().amax(-1)
    assert (change[:, 3] > 1e-6).all()
    assert not change[:, torch.arange(LENGTH) != 3].any()


def test_dit_dropout_is_off_in_evaluation() -> None:
    ids, t = inputs()
    model = make(dropout=0.5)
    assert torch.equal(model(ids, t, UNPADDED), model(ids, t, UNPADDED))
    model.train()
    assert not torch.equal(model(ids, t, UNPADDED), model(ids, t, UNPADDED))


def test_dit_every_parameter_gets_a_gradient() -> None:
    ids, t = inputs()
    model = make()
    weight = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    (model(ids, t, UNPADDED) * weight).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
    )


def test_muon_gets_matrices_of_dit_blocks_and_no_tables() -> None:
    hidden, _ = split_parameters(Denoiser(make(), TokenHead(VOCABULARY, WIDTH)))
    assert {name.split(".")[-2] for name in hidden} == {
        "qkv",
        "attended",
        "up",
        "down",
        "0",
        "2",
    }  # "0" and "2" are the layers of the time MLP


def test_dit_explicit_dimensions_override_those_of_the_named_size() -> None:
    config = DiT.Config(size="tiny", width=128, layers=3)
    model = DiT.build(config, vocabulary=FlatVocabulary(10), length=8)
    assert (model.width, len(model.blocks), model.blocks[0].heads) == (128, 3, 2)
    assert SIZES["small"] == (768, 12)
    published = DiT.build(DiT.Config(size="tiny"), vocabulary=FlatVocabulary(10), length=8)
    assert (published.width, len(published.blocks), published.blocks[0].heads) == (512, 8, 8)


def test_dit_convolutions_and_norms_are_off_by_default() -> None:
    config = DiT.Config(width=128, layers=2)
    plain = DiT.build(config, vocabulary=FlatVocabulary(10), length=8)
    assert not any("convolution" in name or "norm" in name for name in plain.state_dict())


def test_dit_convolutions_have_weights_of_the_given_taps_and_std() -> None:
    """The standard deviation of 5120 normal numbers has a relative error of 1 %."""
    config = DiT.Config(width=256, layers=2, convolution=5, convolution_std=0.5, qk_norm=True)
    model = DiT.build(config, vocabulary=FlatVocabulary(10), length=8)
    weights = {name: p for name, p in model.named_parameters() if "convolution" in name}
    assert len(weights) == 4
    assert all(weight.shape == (5, 1, 256) for weight in weights.values())
    std = torch.cat(list(weights.values())).std().item()
    assert std == pytest.approx(0.5, rel=0.05)
    assert {"blocks.0.query_norm.weight", "blocks.0.key_norm.weight"} <= set(model.state_dict())


def test_dit_convolution_weights_are_trained_by_adamw_not_muon() -> None:
    hidden, others = split_parameters(make(convolution=3))
    assert not any("convolution" in name for name in hidden)
    assert sum("convolution" in name for name in others) == 4


def test_dit_with_zero_convolution_weights_equals_dit_without_convolutions() -> None:
    ids, t = inputs()
    plain = make()
    zero = make(trained=False, convolution=3, convolution_std=0.0)
    zero.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(zero(ids, t, UNPADDED), plain(ids, t, UNPADDED))


@pytest.mark.parametrize("convolution", [2, 4, -1])
def test_dit_refuses_even_and_negative_convolutions(convolution: int) -> None:
    with pytest.raises(ValidationError, match="convolution"):
        DiT.Config(convolution=convolution)


def test_dit_refuses_invalid_heads_and_unknown_conditions() -> None:
    with pytest.raises(ArgumentError, match="heads"):
        DiT(VOCABULARY, width=20, layers=1, heads=3)
    ids, t = inputs()
    with pytest.raises(ArgumentError, match="of this backbone, none"):
        make()(ids, t, Context(conditions={"label": ids}))


def test_dit_declares_conditions_and_refuses_too_large_labels() -> None:
    conditions = {"author": Condition(classes=3), "style": Condition(width=2)}
    model = DiT(VOCABULARY, WIDTH, layers=1, heads=1, conditions=conditions)
    assert model.condition_forms == {"author": Label(3), "style": Vector(2)}
    ids, t = inputs()
    with pytest.raises(ArgumentError, match=r'"author" must be below its 3 classes.*got 3'):
        model(ids, t, Context(conditions={"author": torch.full((len(ids),), 3)}))
