"""Convolutions over positions read only inputs to which attention may attend.

The fast convolution is compared with a dense one, which multiplies by the attention mask. Both sum
in different orders. The tolerance is 1e-12, for float64 numbers of order 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ddiff_dit.dit import Condition, DiT
from networks import randomize_zeros
from torch import Tensor

from ddiff.core.vocabulary import FlatVocabulary
from ddiff.nn import neighbours as neighbours_module
from ddiff.nn.attention import AttentionLayout, KeyValueCache, PositionFacts, may_attend
from ddiff.nn.denoiser import UNPADDED, Context

BATCH, LENGTH, WIDTH = 3, 10, 4
CLOSE = {"rtol": 0.0, "atol": 1e-12}
VOCABULARY = FlatVocabulary(7)
POSITION = torch.arange(LENGTH)
VALID = torch.tensor([[10], [7], [9]]) > POSITION
HOLES = torch.tensor([[1] * 10, [1, 1, 0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]]) > 0
DOCUMENTS = torch.tensor([[0] * 10, [0] * 5 + [1] * 5, [0, 1, 2, 2, 3, 3, 3, 3, 3, 4]])
FOURS = (POSITION // 4).unsqueeze(0)
ROWS = torch.stack([POSITION // 4, POSITION, torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])])
# Blocks that do not rise from left to right.
SHUFFLED = torch.tensor([[1, 0, 0, 2, 2, 1, 1, 0, 3, 2]])

FACTS = {
    "plain": UNPADDED,
    "padded": Context(valid=VALID),
    "padded inside": Context(valid=HOLES),
    "packed": Context(document=DOCUMENTS),
    "packed and padded": Context(valid=HOLES, document=DOCUMENTS),
}
BLOCKS = {
    "blocks": FOURS,
    "blocks of rows": ROWS,
    "shuffled blocks": SHUFFLED,
    "causal": POSITION.unsqueeze(0),
}


def make_contexts() -> Iterator[tuple[str, Context]]:
    twice = torch.cat([POSITION, POSITION])
    is_noisy = torch.arange(2 * LENGTH) >= LENGTH
    for name, facts in FACTS.items():
        yield name, facts
        for kind, block in BLOCKS.items():
            layout = AttentionLayout(POSITION, block)
            yield f"{name}, {kind}", facts._replace(layout=layout)
            paired = AttentionLayout(twice, block[:, twice], is_noisy)
            both = facts.select_positions(twice, LENGTH)
            yield f"{name}, paired {kind}", both._replace(layout=paired)


CONTEXTS = dict(make_contexts())


def num_inputs(context: Context) -> int:
    return LENGTH if context.layout is None else len(context.layout.position)


def dense_mask(context: Context, num_keys: int) -> Tensor:
    """Return the bool mask [1 or B,n,m+n] with which n inputs attend to all m + n inputs."""
    mask = context.attention_mask()
    if mask is None:
        return torch.ones(1, num_inputs(context), num_keys, dtype=torch.bool)
    return mask[:, 0]


def convolve_densely(h: Tensor, columns: Tensor, weight: Tensor, context: Context) -> Tensor:
    """Convolve by the definition: a tap is a matrix [B,n,m+n] that selects the inputs it reads."""
    mask = dense_mask(context, columns.shape[1])
    query = context.positions(h.shape[1], h.device)
    # Cached positions come first, and are the positions before those of the new inputs.
    cached = torch.arange(columns.shape[1] - h.shape[1])
    key = torch.cat([cached, query])
    out = h
    for tap in range(len(weight)):
        is_at_tap = key.unsqueeze(0) == query.unsqueeze(-1) + tap - len(weight) // 2
        is_read = is_at_tap & mask
        assert is_read.sum(-1).max() <= 1  # a tap reads at most one input
        out = out + weight[tap] * (is_read.to(h.dtype) @ columns)
    return out


def make_arguments(count: int, taps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(taps)
    h = torch.randn(BATCH, count, WIDTH, dtype=torch.float64, generator=generator)
    weight = torch.randn(taps, WIDTH, dtype=torch.float64, generator=generator)
    return h.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("taps", [1, 3, 5, 25])
@pytest.mark.parametrize("name", CONTEXTS)
def test_convolution_and_its_gradients_equal_a_dense_masked_product(name: str, taps: int) -> None:
    """The 25 taps reach beyond both ends of the sequence."""
    context = CONTEXTS[name]
    h, weight = make_arguments(num_inputs(context), taps)
    fast = context.neighbours(h, taps).convolve(h, weight, 0)
    dense = convolve_densely(h, h, weight, context)
    torch.testing.assert_close(fast, dense, **CLOSE)
    direction = torch.randn_like(h)
    for ours, expected in zip(
        torch.autograd.grad(fast, (h, weight), direction),
        torch.autograd.grad(dense, (h, weight), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("name", ["plain", "packed", "padded, causal", "packed, paired blocks"])
def test_convolution_gradients_equal_finite_differences(name: str) -> None:
    context = CONTEXTS[name]
    h, weight = make_arguments(num_inputs(context), 5)
    neighbours = context.neighbours(h, 5)
    assert torch.autograd.gradcheck(lambda *args: neighbours.convolve(*args, 0), (h, weight))


def test_convolution_equals_torch_conv1d_with_zero_padding() -> None:
    h, weight = make_arguments(LENGTH, 5)
    kernel = weight.t().unsqueeze(1)
    expected = torch.nn.functional.conv1d(h.transpose(1, 2), kernel, padding=2, groups=WIDTH)
    got = UNPADDED.neighbours(h, 5).convolve(h, weight, 0)
    torch.testing.assert_close(got, h + expected.transpose(1, 2), **CLOSE)


def test_context_without_hidden_inputs_has_neighbours_without_masks() -> None:
    found = UNPADDED.neighbours(torch.zeros(BATCH, LENGTH, WIDTH), 5)
    assert len(found.links) == 4
    assert all(link.mask is None for link in found.links)


@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (3, 1, 4, 2), (4, 6), (LENGTH,)])
def test_convolution_with_cached_columns_equals_the_full_convolution(
    facts: str, sizes: tuple[int, ...]
) -> None:
    """Every pass has a final block of the given size, and an open block after it."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    context, cache = FACTS[facts], KeyValueCache()
    h, weight = make_arguments(LENGTH, 5)
    whole = context._replace(layout=AttentionLayout(POSITION, block.unsqueeze(0)))
    expected = whole.neighbours(h, 5).convolve(h, weight, 1)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for number, size in enumerate(sizes):
        new = POSITION[(block == number) | (block == number + 1)]
        upto = context.select_positions(POSITION[: new[-1] + 1], LENGTH)
        layout = AttentionLayout(new, block[new].unsqueeze(0))
        own = upto._replace(layout=layout, cache=cache)
        cache.begin_update(size)
        neighbours = own.neighbours(h[:, new], 5).in_layer(2)
        got = neighbours.convolve(h[:, new], weight, 1)
        columns = torch.cat([cache.columns[2, 1][:, : cache.length], h[:, new]], 1)
        torch.testing.assert_close(got, expected[:, new], **CLOSE)
        torch.testing.assert_close(got, convolve_densely(h[:, new], columns, weight, own), **CLOSE)
        cache.finish_update(ids[:, : new[-1] + 1], block[: new[-1] + 1], h[:, new])


def test_inputs_before_the_sequence_neither_read_nor_are_read() -> None:
    context = CONTEXTS["padded, blocks"]
    h, weight = make_arguments(3 + LENGTH, 5)
    got = context.neighbours(h, 5, num_prefix=3).convolve(h, weight, 0)
    rest = h[:, 3:]
    assert torch.equal(got[:, :3], h[:, :3])
    assert torch.equal(got[:, 3:], context.neighbours(rest, 5).convolve(rest, weight, 0))


# ---------------------------------------------------------------------- whole networks


def make_model(**options: Any) -> DiT:
    """Make a float64 DiT with random numbers in the parameters that start at zero."""
    torch.manual_seed(0)
    model = DiT(VOCABULARY, 8, layers=2, heads=2, convolution=5, qk_norm=True, **options)
    randomize_zeros(model)
    return model.double().eval()


@torch.no_grad()
def find_leaks(context: Context) -> int:
    """Count the hidden states that change with an input to which they may not attend."""
    model = make_model()
    count = num_inputs(context)
    ids = torch.randint(7, (BATCH, count), generator=torch.Generator().manual_seed(1))
    t = torch.full((BATCH, count), 0.5, dtype=torch.float64)
    mask = dense_mask(context, count)
    before = model(ids, t, context)
    leaks = 0
    for number in range(count):
        changed = ids.clone()
        changed[:, number] = (changed[:, number] + 1) % 7
        has_moved = (model(changed, t, context) != before).any(-1)
        leaks += int((has_moved & ~mask[..., number]).sum())
        assert has_moved[:, number].all()
    return leaks


@pytest.mark.parametrize("name", CONTEXTS)
def test_dit_with_convolutions_depends_on_no_bit_of_hidden_inputs(name: str) -> None:
    assert find_leaks(CONTEXTS[name]) == 0


FAULTS: dict[str, tuple[str, Callable[[PositionFacts], PositionFacts]]] = {
    "documents": ("packed", lambda facts: facts._replace(document=None)),
    "padding": ("padded inside", lambda facts: facts._replace(valid=None)),
    "later blocks": ("plain, blocks", lambda facts: facts._replace(block=None)),
    "future": ("plain, causal", lambda facts: facts._replace(block=None)),
    "noisy copies": ("plain, paired blocks", lambda facts: facts._replace(noisy=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_leak_search_finds_convolutions_that_ignore_a_rule(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, forget = FAULTS[fault]

    def may_attend_too_much(query: PositionFacts, key: PositionFacts) -> Tensor:
        return may_attend(forget(query), forget(key))

    monkeypatch.setattr(neighbours_module, "may_attend", may_attend_too_much)
    assert find_leaks(CONTEXTS[name]) > 0


def test_condition_tokens_give_no_taps() -> None:
    """The hidden states depend on the tokens through the attention only."""
    model = make_model(conditions={"author": Condition(classes=3, via="tokens")})
    with torch.no_grad():
        for block in model.blocks:
            block.attended.weight.zero_()  # no attention
    ids = torch.randint(7, (BATCH, LENGTH))
    t = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    states = [
        model(ids, t, Context(conditions={"author": torch.full((BATCH,), label)}))
        for label in (0, 1)
    ]
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["plain", "packed", "packed and padded, paired blocks of rows"])
def test_convolution_in_bfloat16_autocast_is_close_to_float32(name: str) -> None:
    """A number in bfloat16 has 8 bits, so states of order 1 differ by some hundredths."""
    context = CONTEXTS[name]
    model = make_model().float()
    ids = torch.randint(7, (BATCH, num_inputs(context)))
    t = torch.rand(ids.shape, dtype=torch.float64)
    expected = model(ids, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, t, context)
    torch.testing.assert_close(got.float(), expected, rtol=0.0, atol=0.2)
    got.float().square().sum().backward()
    gradient = model.blocks[0].attention_convolution.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.flatten(1).any(-1).all()


@pytest.mark.parametrize("name", ["packed and padded", "packed and padded, paired blocks of rows"])
def test_masked_convolution_does_not_wait_for_the_device(name: str, no_sync_guard: Any) -> None:
    context = CONTEXTS[name]
    layout = context.layout
    if layout is not None:
        layout = AttentionLayout(*(fact.to("meta") for fact in layout if fact is not None))
    context = Context(context.valid.to("meta"), context.document.to("meta"), layout=layout)
    model = make_model().to("meta")
    ids = torch.zeros(BATCH, num_inputs(context), dtype=torch.long, device="meta")
    with no_sync_guard():
        model(ids, ids.double(), context).sum().backward()
    assert model.blocks[0].mlp_convolution.weight.grad.is_meta
