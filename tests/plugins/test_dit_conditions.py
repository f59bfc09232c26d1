"""Conditions of the DiT by modulation, cross-attention and input tokens (key `via`).

Forward passes that must agree sum in different orders. The tolerance is 1e-12, for float64 hidden
states of order 1. The models have convolutions, which must obey the same rules as attention.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_dit.dit import Condition, CrossAttention, DiT, Via
from ddiff_dit.mmdit import MMDiT, StreamSpec
from networks import randomize_zeros
from pydantic import ValidationError
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ddiff.core.clock import CdfClock
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.condition_forms import Label, Vector
from ddiff.distributed.blocks import recompute_activations
from ddiff.errors import ArgumentError
from ddiff.nn.attention import KeyValueCache
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser, Inputs
from ddiff.nn.heads import TokenHead
from ddiff.nn.network import as_network
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.blockwise import BlockwiseSampler
from ddiff.sampling.loop import generate
from ddiff.sampling.shaping import guide_network
from ddiff.training.optimizers import split_parameters

VOCABULARY = FlatVocabulary(7)
BATCH, LENGTH, WIDTH = 3, 10, 16
CLOSE = {"rtol": 0.0, "atol": 1e-12}
VIAS: tuple[Via, ...] = ("adaln", "cross", "tokens")
BLOCK = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
VALID = torch.arange(LENGTH) < torch.tensor([[10], [7], [9]])
DOCUMENTS = torch.tensor([[0] * 10, [0] * 5 + [1] * 5, [0] * 3 + [1] * 3 + [2] * 4])


def make_conditions(via: Via) -> dict[str, Condition]:
    count = 1 if via == "adaln" else 2
    return {
        "author": Condition(classes=3, via=via),
        "style": Condition(width=6 // count, count=count, via=via),
    }


def make_model(via: Via, is_trained: bool = True, time: bool = True) -> DiT:
    """Make a float64 DiT; `is_trained` fills parameters that start at zero with random numbers."""
    torch.manual_seed(0)
    conditions = make_conditions(via)
    model = DiT(
        VOCABULARY,
        WIDTH,
        layers=3,
        heads=2,
        time=time,
        conditions=conditions,
        qk_norm=True,
        convolution=3,
    )
    model = model.double().eval()
    if is_trained:
        randomize_zeros(model)
    return model


def make_denoiser(via: Via, inputs: Inputs = "own") -> Denoiser:
    return Denoiser(make_model(via), TokenHead(VOCABULARY, WIDTH).double(), inputs=inputs)


def make_context() -> Context:
    """Make conditions of which some are absent: author of row 1, style of row 2."""
    style = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1)).double()
    style[2] = torch.nan
    return Context(conditions={"author": torch.tensor([1, -1, 0]), "style": style})


def with_condition(context: Context, name: str, value: Tensor) -> Context:
    return context._replace(conditions={**context.conditions, name: value})


def make_noisy(seed: int, clean: Tensor | None = None) -> Noisy:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.zeros(BATCH, LENGTH, dtype=torch.bool) if clean is None else clean
    zt = torch.randint(VOCABULARY.num_states, (BATCH, LENGTH), generator=generator)
    t = torch.rand(BATCH, LENGTH, dtype=torch.float64, generator=generator)
    return Noisy(torch.where(clean, zt % 7, zt), t.masked_fill(clean, 0.0), clean)


def make_tokens(seed: int) -> Tensor:
    return torch.randint(7, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def hidden(denoiser: Denoiser, noisy: Noisy, context: Context) -> Tensor:
    return denoiser.hidden_states(noisy, context).unflatten(0, (BATCH, -1)).detach()


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("via", VIAS)
def test_condition_changes_exactly_the_rows_in_which_it_is_present(via: Via) -> None:
    model, noisy, context = make_denoiser(via), make_noisy(1), make_context()
    before = hidden(model, noisy, context)
    author, style = context.conditions["author"], context.conditions["style"]
    for name, changed, rows in (
        ("author", torch.where(author < 0, -5, 2 - author), [True, False, True]),
        ("style", style + 1.0, [True, True, False]),
    ):
        if name == "author":
            changed[0] = 2
        after = hidden(model, noisy, with_condition(context, name, changed))
        moved = (after != before).flatten(1).any(-1)
        assert moved.tolist() == rows, name


@pytest.mark.parametrize("via", VIAS)
def test_numbers_of_an_absent_vector_change_no_bit(via: Via) -> None:
    """A vector is absent if one of its numbers is NaN."""
    model, noisy, context = make_denoiser(via), make_noisy(1), make_context()
    before = hidden(model, noisy, context)
    style = context.conditions["style"].clone()
    style[2] = torch.tensor([torch.nan, 9.0, -7.0, 5.0, torch.nan, 3.0])
    assert torch.equal(hidden(model, noisy, with_condition(context, "style", style)), before)


@pytest.mark.parametrize("via", VIAS)
def test_condition_missing_from_the_context_equals_an_absent_one(via: Via) -> None:
    model, noisy = make_denoiser(via), make_noisy(1)
    absent = Context(
        conditions={
            "author": torch.full((BATCH,), -1),
            "style": torch.full((BATCH, 6), torch.nan, dtype=torch.float64),
        }
    )
    assert torch.equal(hidden(model, noisy, absent), hidden(model, noisy, UNPADDED))


@pytest.mark.parametrize("via", ["cross", "tokens"])
def test_one_absent_vector_of_several_is_replaced_alone(via: Via) -> None:
    model, noisy, context = make_denoiser(via), make_noisy(1), make_context()
    style = context.conditions["style"].clone()
    style[0, :3] = torch.nan
    partial = hidden(model, noisy, with_condition(context, "style", style))
    style[0, 3:] += 1.0  # the second vector is still read
    moved = hidden(model, noisy, with_condition(context, "style", style)) != partial
    assert moved.flatten(1).any(-1).tolist() == [True, False, False]


@pytest.mark.parametrize("via", ["cross", "tokens"])
def test_vectors_of_a_condition_are_distinguished_by_their_number(via: Via) -> None:
    model, noisy, context = make_denoiser(via), make_noisy(1), make_context()
    swapped = context.conditions["style"].roll(3, -1)
    assert not torch.allclose(
        hidden(model, noisy, context)[:2],
        hidden(model, noisy, with_condition(context, "style", swapped))[:2],
    )


def test_time_modulates_the_network_for_every_via() -> None:
    noisy = make_noisy(1)
    for via in VIAS:
        model = make_denoiser(via)
        later = noisy._replace(t=noisy.t * 0.5)
        context = make_context()
        assert not torch.allclose(hidden(model, noisy, context), hidden(model, later, context))


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("via", VIAS)
def test_block_of_a_conditioned_dit_ignores_later_blocks(via: Via, has_memory: bool) -> None:
    """Changing a token changes exactly the blocks that attend to it, and no other bit."""
    model, context = make_denoiser(via), make_context()
    memory = make_tokens(3) if has_memory else None
    noisy = make_noisy(2)._replace(block=BLOCK.unsqueeze(0), memory=memory)
    before = hidden(model, noisy, context)
    for position, number in enumerate(BLOCK.tolist()):
        later = number < BLOCK
        own = number == BLOCK
        ids = noisy.zt.clone()
        ids[:, position] = (ids[:, position] + 1) % 7
        moved = (hidden(model, noisy._replace(zt=ids), context) != before).any(-1)
        expected = own if has_memory else own | later
        assert torch.equal(moved, expected.expand(BATCH, -1))
        if memory is not None:
            ids = memory.clone()
            ids[:, position] = (ids[:, position] + 1) % 7
            moved = (hidden(model, noisy._replace(memory=ids), context) != before).any(-1)
            assert torch.equal(moved, later.expand(BATCH, -1))


@pytest.mark.parametrize("via", VIAS)
def test_one_pass_over_conditioned_blocks_equals_one_pass_per_block(via: Via) -> None:
    model, context = make_denoiser(via), make_context()
    memory = make_tokens(3)
    noisy = make_noisy(2)._replace(block=BLOCK.unsqueeze(0), memory=memory)
    together = hidden(model, noisy, context)
    for number in range(4):
        own = number == BLOCK
        stop = int((number >= BLOCK).sum())
        alone = Noisy(
            torch.where(own, noisy.zt, memory)[:, :stop],
            torch.where(own, noisy.t, 0.0)[:, :stop],
            noisy.clean[:, :stop],
            BLOCK[:stop].unsqueeze(0),
        )
        got = hidden(model, alone, context)[:, own[:stop]]
        torch.testing.assert_close(together[:, own], got, **CLOSE)


@pytest.mark.parametrize("inputs", ["own", "previous"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("via", VIAS)
def test_cached_passes_of_a_conditioned_dit_equal_full_passes(
    via: Via, is_padded: bool, inputs: Inputs
) -> None:
    """Every block is queried twice with different noise before it becomes clean."""
    model, cache, final = make_denoiser(via, inputs), KeyValueCache(), make_tokens(4)
    context = make_context()._replace(valid=VALID if is_padded else None)
    clean = torch.arange(LENGTH) < torch.tensor([[2], [5], [0]])
    for number in range(4):
        own = number == BLOCK
        for seed in (5, 6):
            drawn = make_noisy(seed + 10 * number, clean)
            zt = torch.where(clean, final, drawn.zt)
            noisy = drawn._replace(zt=zt, block=BLOCK.unsqueeze(0))
            got, columns = model.extend_cache(noisy, context, cache)
            assert torch.equal(columns, own.nonzero().squeeze(-1))
            expected = hidden(model, noisy, context)[:, own]
            torch.testing.assert_close(got, expected, **CLOSE)
        clean = clean | own


@pytest.mark.parametrize("via", VIAS)
def test_guided_blockwise_samples_with_and_without_cache_are_equal(via: Via) -> None:
    """Guidance by the condition uses a second network, which has a separate cache."""
    model = make_denoiser(via)
    torch.nn.init.normal_(model.head.table, generator=torch.Generator().manual_seed(17))
    process = TreeProcess(VOCABULARY, CdfClock([LinearSchedule()]))
    sampler = BlockwiseSampler(AncestralSampler(4), width=4)

    def draw(context: Context, cached: bool) -> Tensor:
        conditional = as_network(model, process, context, cached)
        unconditional = as_network(model, process, UNPADDED, cached)
        network = guide_network(conditional, unconditional, 2.0)
        index = torch.arange(BATCH)
        return generate(sampler, process, network, index=index, length=LENGTH, seed=3).ids

    context = make_context()
    samples = draw(context, cached=True)
    assert torch.equal(samples, draw(context, cached=False))
    other = with_condition(context, "style", context.conditions["style"] + 3.0)
    assert not torch.equal(samples, draw(other, cached=True))


@pytest.mark.parametrize("via", VIAS)
def test_padding_of_a_conditioned_dit_changes_no_valid_position(via: Via) -> None:
    model, noisy = make_denoiser(via), make_noisy(7)
    context = make_context()._replace(valid=VALID)
    before = hidden(model, noisy, context)
    changed = noisy._replace(zt=torch.where(VALID, noisy.zt, 0), t=noisy.t.where(VALID, 1.0))
    assert torch.equal(hidden(model, changed, context)[VALID], before[VALID])


@pytest.mark.parametrize("inputs", ["own", "previous"])
@pytest.mark.parametrize("via", ["adaln", "cross"])
def test_packed_position_reads_the_condition_of_its_own_document(via: Via, inputs: Inputs) -> None:
    """Other documents' conditions change no bit, and a document alone gives the same states."""
    model, noisy = make_denoiser(via, inputs), make_noisy(8)
    generator = torch.Generator().manual_seed(9)
    author = torch.tensor([1, -1, 0])[DOCUMENTS]
    style = torch.randn(3, 6, generator=generator).double()[DOCUMENTS]
    context = Context(document=DOCUMENTS, conditions={"author": author, "style": style})
    before = hidden(model, noisy, context)
    for number in range(3):
        own = number == DOCUMENTS
        changed = torch.where(own.unsqueeze(-1), style, style + 1.0)
        changed_context = with_condition(context, "style", changed)
        changed_context = with_condition(changed_context, "author", torch.where(own, author, 2))
        after = hidden(model, noisy, changed_context)
        assert torch.equal(after[own], before[own])
        assert not torch.equal(after[~own], before[~own])
    first = Noisy(*(part[2:, 3:6] for part in noisy[:3]))
    conditions = {"author": author[2:, 4], "style": style[2:, 4]}
    alone = model.hidden_states(first, Context(conditions=conditions)).detach()
    torch.testing.assert_close(before[2, 3:6], alone, **CLOSE)


def test_tokens_refuse_packed_rows_and_conditions_per_position() -> None:
    model, noisy = make_model("tokens"), make_noisy(10)
    assert not model.reads_packed_rows
    assert make_model("cross").reads_packed_rows
    for context in (
        make_context()._replace(document=DOCUMENTS),
        Context(conditions={"author": DOCUMENTS}),
        Context(conditions={"style": torch.zeros(BATCH, LENGTH, 6)}),
    ):
        with pytest.raises(ArgumentError, match=r'via = "tokens".*one document.*via = "cross"'):
            model(noisy.zt, noisy.t, context)


# ---------------------------------------------------------------------- cross-attention


def test_cross_attention_starts_as_zero_and_differs_between_positions_later() -> None:
    noisy, context = make_noisy(11), make_context()
    model = make_model("cross", is_trained=False)
    start = torch.nn.functional.layer_norm(model.embedding(noisy.zt), (WIDTH,))
    assert torch.equal(model(noisy.zt, noisy.t, context), start)
    torch.manual_seed(0)
    cross = CrossAttention(WIDTH, heads=2, head_width=8)
    torch.nn.init.normal_(cross.out.weight)
    x = torch.randn(1, LENGTH, WIDTH)
    added = cross(x, torch.randn(1, 1, 1, WIDTH))
    # A single vector without a null key would add the same vector at every position.
    assert (added - added[:, :1]).abs().max() > 0.1


def test_null_key_switches_cross_attention_off() -> None:
    torch.manual_seed(0)
    cross = CrossAttention(WIDTH, heads=2, head_width=8)
    torch.nn.init.normal_(cross.out.weight)
    torch.nn.init.zeros_(cross.query.weight)
    x = torch.zeros(1, 1, WIDTH)
    x[..., 0] = 1.0
    vectors = torch.randn(1, 1, 3, WIDTH)
    with torch.no_grad():
        cross.query.weight[:, 0] = 10.0
        cross.null_key.fill_(10.0)
    assert cross(x, vectors).abs().max() < 1e-9
    with torch.no_grad():
        cross.null_key.fill_(-10.0)
    assert cross(x, vectors).abs().max() > 0.1


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("via", VIAS)
def test_every_parameter_of_a_conditioned_dit_gets_a_gradient(via: Via) -> None:
    model, noisy = make_model(via), make_noisy(12)
    weight = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    (model(noisy.zt, noisy.t, make_context()) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("via", VIAS)
def test_muon_gets_matrices_and_no_tables_of_conditions(via: Via) -> None:
    hidden_matrices, others = split_parameters(make_model(via))
    owners = {name.split(".")[-2] for name in hidden_matrices}
    assert {"null_key" in name for name in hidden_matrices} == {False}
    assert {"query", "key_value", "out"} <= owners or via != "cross"
    assert any(name.endswith("author.table.weight") for name in others)


def test_default_condition_adds_the_parameters_of_the_modulation_only() -> None:
    plain = DiT(VOCABULARY, WIDTH, layers=2, heads=2)
    conditioned = DiT(
        VOCABULARY, WIDTH, layers=2, heads=2, conditions={"author": Condition(classes=3)}
    )
    added = set(conditioned.state_dict()) - set(plain.state_dict())
    prefix = "modulation.conditions.author."
    assert added == {f"{prefix}table.weight", f"{prefix}absent"}
    assert conditioned.condition_forms == {"author": Label(3)}


def test_cross_every_adds_cross_attention_to_every_nth_block() -> None:
    """Blocks without cross-attention do not depend on the conditions."""
    torch.manual_seed(0)
    conditions = make_conditions("cross")
    model = DiT(VOCABULARY, WIDTH, layers=5, heads=2, conditions=conditions, cross_every=2)
    assert [block.cross is not None for block in model.blocks] == [True, False, True, False, True]
    ids = make_tokens(0)
    output = model(ids, torch.rand(BATCH, LENGTH), make_context())
    assert output.shape == (BATCH, LENGTH, WIDTH)


def test_condition_width_sets_the_inputs_of_the_modulation() -> None:
    conditions = make_conditions("adaln")
    model = DiT(VOCABULARY, WIDTH, layers=1, heads=2, conditions=conditions, condition_width=24)
    assert model.modulation.out.weight.shape == (8 * WIDTH, 24)
    assert model.modulation.conditions["style"].matrix.weight.shape == (24, 6)
    output = model(make_tokens(0), torch.rand(BATCH, LENGTH), make_context())
    assert output.shape == (BATCH, LENGTH, WIDTH)


@pytest.mark.parametrize("via", VIAS)
def test_recomputed_activations_of_a_conditioned_dit_give_the_same_bits(via: Via) -> None:
    noisy, context = make_noisy(13), make_context()
    gradients = []
    for is_recomputed in (False, True):
        model = make_model(via)
        if is_recomputed:
            recompute_activations(model)
        model(noisy.zt, noisy.t, context).square().sum().mul(0.5).sin().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("via", VIAS)
def test_blocks_of_a_conditioned_dit_compile_to_one_graph(via: Via) -> None:
    model, context = make_denoiser(via), make_context()
    noisy = make_noisy(14)._replace(block=BLOCK.unsqueeze(0), memory=make_tokens(15))
    expected = hidden(model, noisy, context)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.backbone.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(hidden(model, noisy, context), expected, **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("via", VIAS)
def test_pass_of_a_conditioned_dit_does_not_wait_for_the_device(
    via: Via, has_memory: bool, no_sync_guard: Any
) -> None:
    model = make_denoiser(via).to("meta")
    conditions = {name: value.to("meta") for name, value in make_context().conditions.items()}
    ids, t, clean = (part.to("meta") for part in make_noisy(16)[:3])
    noisy = Noisy(ids, t, clean, BLOCK.unsqueeze(0).to("meta"), ids if has_memory else None)
    with no_sync_guard():
        model.hidden_states(noisy, Context(conditions=conditions)).sum().backward()
    assert model.backbone.blocks[0].qkv.weight.grad.is_meta


# ---------------------------------------------------------------------- settings


def test_condition_of_several_vectors_is_one_list_of_numbers() -> None:
    assert Condition(width=4, count=3, via="cross").form == Vector(12)
    for settings in (
        {"width": 4, "count": 3},
        {"classes": 4, "count": 3, "via": "cross"},
    ):
        with pytest.raises(ValidationError, match="count above 1"):
            Condition.model_validate(settings)


def test_mmdit_refuses_conditions_that_are_not_modulations() -> None:
    streams = {"text": StreamSpec(WIDTH, vocabulary=VOCABULARY)}
    with pytest.raises(ArgumentError, match=r'"style" must have via = "adaln"; got "cross"'):
        MMDiT(streams, 1, 2, 8, conditions={"style": Condition(width=3, via="cross")})
