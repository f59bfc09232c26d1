"""Attention: blocks that attend to clean tokens, key-value cache, autoregression, packing.

Forward passes that must agree sum in different orders. The tolerance is 1e-12, for float64 hidden
states of order 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ddiff_dit.dit import Condition, DiT
from networks import randomize_zeros
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from ddiff import Backbone
from ddiff.core.components import MixtureProcess, token_distribution
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import FlatTimes, Noisy, WindowTimes
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.batch import Batch
from ddiff.errors import ArgumentError
from ddiff.nn import attention
from ddiff.nn import denoiser as denoiser_module
from ddiff.nn.attention import AttentionLayout, KeyValueCache, attend
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser, Inputs
from ddiff.nn.heads import TokenHead
from ddiff.nn.network import as_network
from ddiff.training.losses import ElboLoss
from ddiff.training.objective import DiffusionObjective

VOCABULARY = FlatVocabulary(7)
BATCH, LENGTH, WIDTH = 3, 10, 16
CLOSE = {"rtol": 0.0, "atol": 1e-12}
BLOCKS = {
    "fours": torch.arange(LENGTH) // 4,
    "singles": torch.arange(LENGTH),
    "uneven": torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3]),
    "one": torch.zeros(LENGTH, dtype=torch.long),
    "numbered from anywhere": torch.arange(LENGTH) // 3 * 5 - 4,
}
DOCUMENTS = torch.tensor([[0] * 10, [0] * 5 + [1] * 5, [0] * 3 + [1] * 3 + [2] * 4])
VALID = torch.arange(LENGTH) < torch.tensor([[10], [7], [9]])
CONTEXTS = {
    "alone": UNPADDED,
    "packed": Context(document=DOCUMENTS),
    "padded": Context(valid=VALID),
    "both": Context(valid=VALID, document=DOCUMENTS),
    "conditions": Context(
        conditions={
            "author": torch.tensor([1, -1, 0]),
            "place": torch.randn(BATCH, LENGTH, 2, dtype=torch.float64),
        }
    ),
}


@pytest.fixture(scope="module", params=["attention only", "convolutions"])
def backbone(request: pytest.FixtureRequest) -> DiT:
    """Make a DiT; convolutions must obey the rules of attention."""
    torch.manual_seed(0)
    conditions = {"author": Condition(classes=2), "place": Condition(width=2)}
    options = {"conditions": conditions}
    if request.param == "convolutions":
        options |= {"convolution": 5, "qk_norm": True}
    model = DiT(VOCABULARY, WIDTH, layers=3, heads=2, **options).double().eval()
    randomize_zeros(model)
    return model


def denoiser(backbone: DiT, inputs: Inputs = "own") -> Denoiser:
    """Make a denoiser of the backbone, with a head whose logits depend on every hidden channel."""
    head = TokenHead(VOCABULARY, WIDTH).double()
    with torch.no_grad():
        head.table.normal_(generator=torch.Generator().manual_seed(5))
    return Denoiser(backbone, head, inputs=inputs)


def random_noisy(seed: int, clean: Tensor | None = None) -> Noisy:
    generator = torch.Generator().manual_seed(seed)
    zt = torch.randint(VOCABULARY.num_states, (BATCH, LENGTH), generator=generator)
    clean = torch.zeros(BATCH, LENGTH, dtype=torch.bool) if clean is None else clean
    zt = torch.where(clean, zt % VOCABULARY.num_tokens, zt)
    t = torch.rand(BATCH, LENGTH, dtype=torch.float64, generator=generator).masked_fill(clean, 0.0)
    return Noisy(zt, t, clean)


def random_tokens(seed: int) -> Tensor:
    return torch.randint(
        VOCABULARY.num_tokens, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed)
    )


def hidden(model: Denoiser, noisy: Noisy, context: Context = UNPADDED) -> Tensor:
    return model.hidden_states(noisy, context).unflatten(0, (BATCH, -1)).detach()


def dense(context: Context) -> Tensor:
    mask = context.attention_mask()
    assert mask is not None
    return mask[:, 0]


def cut(context: Context, stop: int) -> Context:
    return context.select_positions(torch.arange(stop), LENGTH)


# ---------------------------------------------------------------------- blocks with clean tokens


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_one_pass_over_clean_and_noisy_tokens_equals_one_pass_per_block(
    backbone: DiT, blocks: str, name: str
) -> None:
    model, block, context = denoiser(backbone), BLOCKS[blocks], CONTEXTS[name]
    noisy, memory = random_noisy(1)._replace(block=block.unsqueeze(0)), random_tokens(2)
    together = hidden(model, noisy._replace(memory=memory), context)
    for number in block.unique().tolist():
        own, stop = block == number, int((block <= number).sum())
        shown = Noisy(
            torch.where(own, noisy.zt, memory)[:, :stop],
            torch.where(own, noisy.t, 0.0)[:, :stop],
            noisy.clean[:, :stop],
            block[:stop].unsqueeze(0),
        )
        alone = hidden(model, shown, cut(context, stop))
        seen = VALID if context.valid is not None else torch.ones_like(VALID)
        for row in range(BATCH):  # outputs at padding are not compared
            kept = own & seen[row]
            torch.testing.assert_close(together[row][kept], alone[row][kept[:stop]], **CLOSE)


@pytest.mark.parametrize("memory", [False, True])
def test_block_attends_only_to_itself_and_earlier_blocks(backbone: DiT, memory: bool) -> None:
    """Changing a position changes exactly the hidden states that attend to this position.

    Other hidden states are bitwise equal, because their attention weight is exp(-inf) = 0.
    """
    model, block = denoiser(backbone), BLOCKS["fours"]
    noisy = random_noisy(3)._replace(
        block=block.unsqueeze(0), memory=random_tokens(4) if memory else None
    )
    before = hidden(model, noisy)
    for position in range(LENGTH):
        for field in ("zt", "memory") if memory else ("zt",):
            ids = getattr(noisy, field).clone()
            ids[:, position] = (ids[:, position] + 1) % VOCABULARY.num_tokens
            moved = (hidden(model, noisy._replace(**{field: ids})) != before).any(-1)
            after_it, own = block > block[position], block == block[position]
            expected = after_it if field == "memory" else own if memory else after_it | own
            assert torch.equal(moved, expected.expand(BATCH, -1)), (field, position)


def test_sequences_with_different_blocks_equal_separate_forward_passes(backbone: DiT) -> None:
    model, context = denoiser(backbone), CONTEXTS["both"]
    blocks = torch.stack([BLOCKS[name] for name in ("fours", "singles", "uneven")])
    for memory in (None, random_tokens(5)):
        noisy = random_noisy(6)._replace(block=blocks, memory=memory)
        together = hidden(model, noisy, context)
        for row in range(BATCH):
            alone = hidden(model, noisy._replace(block=blocks[row : row + 1]), context)
            torch.testing.assert_close(together[row], alone[row], **CLOSE)


def test_single_block_equals_full_attention(backbone: DiT) -> None:
    model, noisy = denoiser(backbone), random_noisy(7)
    flat = hidden(model, noisy)
    block = BLOCKS["one"].unsqueeze(0)
    torch.testing.assert_close(hidden(model, noisy._replace(block=block)), flat, **CLOSE)
    torch.testing.assert_close(
        hidden(model, noisy._replace(block=block, memory=random_tokens(8))), flat, **CLOSE
    )


def test_attention_mask_equals_the_published_block_diffusion_mask() -> None:
    """Compare with figure 3 of arXiv 2503.09573 (block diffusion), for two blocks of two tokens.

    The columns of the clean copy come first.
    """
    block = torch.tensor([[0, 0, 1, 1]])
    twice = Context(
        layout=AttentionLayout(torch.arange(4).repeat(2), block.repeat(1, 2), torch.arange(8) >= 4)
    )
    rows = [
        "11......",
        "11......",
        "1111....",
        "1111....",
        "....11..",
        "....11..",
        "11....11",
        "11....11",
    ]
    assert ["".join(".1"[int(x)] for x in row) for row in dense(twice)[0]] == rows
    cache = KeyValueCache()
    cache.ids = torch.zeros(1, 2, dtype=torch.long)
    beside = Context(layout=AttentionLayout(torch.arange(2), torch.tensor([[0, 1]])), cache=cache)
    assert dense(beside)[0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert (
        beside._replace(
            layout=AttentionLayout(torch.arange(2), torch.tensor([[4, 4]]))
        ).attention_mask()
        is None
    )


# ---------------------------------------------------------------------- autoregression


@pytest.mark.parametrize("name", CONTEXTS)
def test_autoregressive_hidden_states_depend_only_on_earlier_tokens(
    backbone: DiT, name: str
) -> None:
    model, context = denoiser(backbone, "previous"), CONTEXTS[name]
    noisy = Noisy(
        random_tokens(9),
        torch.zeros(BATCH, LENGTH).double(),
        torch.ones(BATCH, LENGTH, dtype=torch.bool),
    )
    before = hidden(model, noisy, context)
    for position in range(LENGTH):
        ids = noisy.zt.clone()
        ids[:, position] = (ids[:, position] + 1) % VOCABULARY.num_tokens
        moved = (hidden(model, noisy._replace(zt=ids), context) != before).any(-1)
        later = (torch.arange(LENGTH) > position).expand(BATCH, -1)
        if context.document is not None:
            later = later & (context.document == context.document[:, position : position + 1])
        seen = torch.ones_like(later) if context.valid is None else context.valid
        assert torch.equal(moved & seen, later & seen), position


def test_autoregressive_input_begins_each_packed_document_with_the_mask(backbone: DiT) -> None:
    model, ids = denoiser(backbone, "previous"), random_tokens(10)
    noisy = Noisy(
        ids, torch.zeros(BATCH, LENGTH).double(), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    )
    packed = hidden(model, noisy, Context(document=DOCUMENTS))
    for row, first, last in ((1, 5, 10), (2, 3, 6), (2, 6, 10)):
        alone = Noisy(*(part[row : row + 1, first:last] for part in noisy[:3]))
        own = model.hidden_states(alone, UNPADDED).detach()
        torch.testing.assert_close(packed[row, first:last], own, **CLOSE)


def test_autoregressive_input_is_shifted_by_one_after_a_mask(backbone: DiT) -> None:
    """A denoiser with inputs = "previous" gets the mask and then all tokens except the last.

    It attends causally, and the time of every position is 0.
    """
    model, noisy = denoiser(backbone, "previous"), random_noisy(11)
    shown = torch.cat([torch.full((BATCH, 1), VOCABULARY.root), noisy.zt[:, :-1]], 1)
    causal = Noisy(shown, torch.zeros_like(noisy.t), noisy.clean, torch.arange(LENGTH).unsqueeze(0))
    torch.testing.assert_close(hidden(model, noisy), hidden(denoiser(backbone), causal), **CLOSE)


# ---------------------------------------------------------------------- cached columns


PROMPTS = {
    "no prompt": torch.zeros(BATCH, LENGTH, dtype=torch.bool),
    "ragged": torch.arange(LENGTH) < torch.tensor([[2], [7], [5]]),
    "infilling": torch.arange(LENGTH) % torch.tensor([[2], [3], [9]]) == 0,
}


@pytest.mark.parametrize("inputs", ["own", "previous"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_forward_with_cache_block_by_block_equals_one_full_forward(
    backbone: DiT, blocks: str, prompt: str, inputs: Inputs, name: str
) -> None:
    """Every block is queried twice with different noise before it becomes clean."""
    model, context, block = denoiser(backbone, inputs), CONTEXTS[name], BLOCKS[blocks]
    clean, cache, final = PROMPTS[prompt].clone(), KeyValueCache(), random_tokens(12)
    for number in block.unique().tolist():
        own = block == number
        if bool(clean[:, own].all()):
            continue
        for seed in (13, 14):
            rng = random_noisy(seed + 10 * number, clean)
            noisy = rng._replace(zt=torch.where(clean, final, rng.zt), block=block.unsqueeze(0))
            got, columns = model.extend_cache(noisy, context, cache)
            assert torch.equal(columns, own.nonzero().squeeze(-1))
            torch.testing.assert_close(got, hidden(model, noisy, context)[:, own], **CLOSE)
        clean = clean | own


class Counting(Backbone):
    """Backbone that records the number of positions (columns) of every forward pass."""

    caches = True

    def __init__(self, backbone: DiT) -> None:
        super().__init__()
        self.backbone, self.width, self.reads_time, self.ran = backbone, backbone.width, True, []

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        self.ran.append(ids.shape[1])
        return self.backbone(ids, t, context)


def test_forward_with_cache_runs_only_positions_not_in_the_cache(backbone: DiT) -> None:
    """The numbers of positions per forward pass are as expected.

    A block of four positions is queried in two steps, and is then run once more with its clean
    tokens. With blocks of one token and inputs = "previous", no position is run twice.
    """
    counted = Counting(backbone)
    model, cache, clean = (
        Denoiser(counted, TokenHead(VOCABULARY, WIDTH)),
        KeyValueCache(),
        PROMPTS["no prompt"].clone(),
    )
    for number in range(3):
        own = BLOCKS["fours"] == number
        for seed in (1, 2):
            rng = random_noisy(seed, clean)
            noisy = rng._replace(
                zt=torch.where(clean, random_tokens(3), rng.zt), block=BLOCKS["fours"].unsqueeze(0)
            )
            model.extend_cache(noisy, UNPADDED, cache)
        clean = clean | own
    assert counted.ran == [4, 4, 8, 4, 6, 2]
    counted.ran.clear()
    model, cache = (
        Denoiser(counted, TokenHead(VOCABULARY, WIDTH), inputs="previous"),
        KeyValueCache(),
    )
    for position in range(4, LENGTH):
        clean = (torch.arange(LENGTH) < position).expand(BATCH, -1)
        model.extend_cache(
            Noisy(random_tokens(4), (~clean).double(), clean, BLOCKS["singles"].unsqueeze(0)),
            UNPADDED,
            cache,
        )
    assert counted.ran == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("inputs", ["own", "previous"])
def test_key_value_cache_is_cropped_at_the_first_changed_position(
    backbone: DiT, inputs: Inputs
) -> None:
    """After a change of clean tokens, blocks or batch size, results equal a full forward pass."""
    model, cache, final = denoiser(backbone, inputs), KeyValueCache(), random_tokens(15)
    changed = final.clone()
    changed[1, 2] = (changed[1, 2] + 1) % VOCABULARY.num_tokens
    for ids, blocks, stop in (
        (final, "fours", 8),
        (changed, "fours", 8),
        (changed, "uneven", 8),
        (final, "uneven", 4),
        (final, "numbered from anywhere", 9),
        (final, "one", 0),
        (final[:2], "fours", 4),
        (final[:2], "fours", 8),
    ):
        block = BLOCKS[blocks]
        clean = (block < block[stop]).expand(len(ids), -1)
        rng = random_noisy(16, clean if len(clean) == BATCH else None)
        zt = torch.where(clean, ids, rng.zt[: len(ids)])
        noisy = Noisy(zt, rng.t[: len(ids)].masked_fill(clean, 0.0), clean, block.unsqueeze(0))
        got, columns = model.extend_cache(noisy, UNPADDED, cache)
        whole = model.hidden_states(noisy, UNPADDED).detach().unflatten(0, zt.shape)
        torch.testing.assert_close(got, whole[:, columns], **CLOSE)


def test_predictions_with_and_without_key_value_cache_agree(backbone: DiT) -> None:
    model, clean = denoiser(backbone), PROMPTS["ragged"]
    rng = random_noisy(17, clean)
    noisy = rng._replace(block=BLOCKS["fours"].unsqueeze(0))
    rows = torch.tensor([2, 3, 22])
    node, mass = torch.full_like(rows, VOCABULARY.root), lambda dist: dist.log_mass(0)
    cached, plain = as_network(model, cached=True), as_network(model)
    for _ in range(2):  # the second query has the same inputs
        torch.testing.assert_close(
            cached(noisy)(rows, node, mass), plain(noisy)(rows, node, mass), rtol=0, atol=1e-12
        )
    assert cached.calls == 1
    with pytest.raises(ArgumentError, match=r"positions 0 to 3; got positions .*5"):
        cached(noisy)(torch.tensor([5]), node[:1], mass)


def test_key_value_cache_refuses_unsupported_block_layouts(backbone: DiT) -> None:
    model, noisy = denoiser(backbone), random_noisy(18)
    blocks = torch.stack([BLOCKS["fours"], BLOCKS["fours"], BLOCKS["uneven"]])
    for wrong in (None, blocks, BLOCKS["fours"].flip(0).unsqueeze(0)):
        with pytest.raises(ArgumentError, match="block must number the blocks"):
            model.extend_cache(noisy._replace(block=wrong), UNPADDED, KeyValueCache())
    plain = Backbone()
    plain.width = WIDTH
    with pytest.raises(ArgumentError, match="caches = True"):
        as_network(Denoiser(plain, TokenHead(VOCABULARY, WIDTH)), cached=True)


# ---------------------------------------------------------------------- flex attention


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use flex-attention masks with tiles of four positions, evaluated densely on the CPU."""
    monkeypatch.setattr(denoiser_module, "has_flex_kernel", lambda x, width: True)
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


OWN = torch.stack([BLOCKS[name] for name in ("fours", "singles", "uneven")])
TWICE, HALF = torch.arange(LENGTH).repeat(2), torch.arange(2 * LENGTH) >= LENGTH
LAYOUTS = {
    "all": None,
    "blocks": AttentionLayout(torch.arange(LENGTH), BLOCKS["fours"].unsqueeze(0)),
    "own blocks": AttentionLayout(torch.arange(LENGTH), OWN),
    "paired": AttentionLayout(TWICE, BLOCKS["fours"][TWICE].unsqueeze(0), HALF),
    "own paired": AttentionLayout(TWICE, OWN[:, TWICE], HALF),
}


def contexts() -> Iterator[tuple[str, Context]]:
    """Yield contexts, by name, in which some positions may not attend to each other.

    They have padding, several documents, blocks, or blocks with a clean copy (paired).
    """
    for layout_name, layout in LAYOUTS.items():
        for name in ("alone", "packed", "padded", "both"):
            context = CONTEXTS[name]._replace(layout=layout)
            if layout is not None and layout.noisy is not None:
                context = context.select_positions(TWICE, LENGTH)
            if (name, layout) != ("alone", None):
                yield f"{name}, {layout_name}", context


ALL = dict(contexts())


@pytest.mark.parametrize("name", ALL)
def test_flex_attention_mask_tiles_equal_the_dense_mask(flex: None, name: str) -> None:
    """Entries and tiles of the mask equal the dense mask, and attention values agree.

    The tolerance of values is 1e-5 in float32 and 1e-13 in float64.
    """
    context = ALL[name]
    mask = context.attention_mask()
    assert mask is not None
    size = mask.shape[-1]
    seen = context.kernel_mask(torch.empty(0), WIDTH)
    assert isinstance(seen, flex_attention.BlockMask)
    assert seen.shape == (*mask.shape[:2], size, size)
    assert torch.equal(
        flex_attention.create_mask(seen.mask_mod, len(mask), 1, size, size, "cpu"), mask
    )
    tiles = flex_attention.create_block_mask(
        lambda b, h, q, k: mask[b, h, q, k], len(mask), 1, size, size, "cpu", BLOCK_SIZE=4
    )
    for field in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(seen, field), getattr(tiles, field)), field
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        q, k, v = torch.randn(
            3, BATCH, 2, size, 8, dtype=dtype, generator=torch.Generator().manual_seed(19)
        )
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=0, atol=0)
        torch.testing.assert_close(attend(q, k, v, seen), expected, rtol=0, atol=atol)


def test_flex_attention_has_no_mask_if_attention_is_unrestricted(flex: None) -> None:
    assert UNPADDED.kernel_mask(torch.empty(0), WIDTH) is None


@pytest.mark.parametrize(
    "name", ["none", *(name for name in ALL if name.startswith(("alone", "padded")))]
)
def test_prefix_inputs_attend_to_each_other_and_all_inputs_attend_to_them(
    flex: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The mask of the other inputs does not change; dense and flex attention agree."""
    context = ALL.get(name, UNPADDED)
    old = context.attention_mask()
    size = LENGTH if old is None else old.shape[-1]
    x = torch.empty(BATCH, 2 + size, WIDTH)
    flexible = context.kernel_mask(x, WIDTH, num_prefix=2)
    assert isinstance(flexible, flex_attention.BlockMask)
    monkeypatch.setattr(denoiser_module, "has_flex_kernel", attention.has_flex_kernel)
    mask = context.kernel_mask(x, WIDTH, num_prefix=2)
    assert isinstance(mask, Tensor)
    assert mask[..., :2].all()
    assert not mask[..., :2, 2:].any()
    rest = torch.ones(1, 1, size, size, dtype=torch.bool) if old is None else old
    assert torch.equal(mask[..., 2:, 2:], rest.expand_as(mask[..., 2:, 2:]))
    made = flex_attention.create_mask(flexible.mask_mod, len(mask), 1, size + 2, size + 2, "cpu")
    assert torch.equal(made, mask)


def test_prefix_inputs_before_packed_documents_are_refused() -> None:
    with pytest.raises(ArgumentError, match="every row must be one document"):
        CONTEXTS["packed"].kernel_mask(torch.empty(BATCH, 2 + LENGTH, WIDTH), WIDTH, num_prefix=2)


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["own", "previous"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_flex_attention_forward_equals_masked_sdpa_forward(
    backbone: DiT, flex: None, monkeypatch: pytest.MonkeyPatch, inputs: Inputs, name: str
) -> None:
    model, plain = denoiser(backbone, inputs), random_noisy(20)
    memory = plain._replace(block=OWN, memory=random_tokens(21))
    for noisy in (plain, memory, memory._replace(memory=None), memory._replace(block=OWN[:1])):
        with monkeypatch.context() as patch:
            patch.setattr(denoiser_module, "has_flex_kernel", attention.has_flex_kernel)
            expected = hidden(model, noisy, CONTEXTS[name])
        torch.testing.assert_close(hidden(model, noisy, CONTEXTS[name]), expected, **CLOSE)


@torch.no_grad()
def test_forward_with_cache_equals_full_forward_with_flex_attention(
    backbone: DiT, flex: None
) -> None:
    """With a cache the attention mask is dense; the full forward pass uses flex attention."""
    model, noisy = (
        denoiser(backbone),
        random_noisy(22, PROMPTS["ragged"])._replace(block=BLOCKS["fours"].unsqueeze(0)),
    )
    got, columns = model.extend_cache(noisy, CONTEXTS["both"], KeyValueCache())
    torch.testing.assert_close(got, hidden(model, noisy, CONTEXTS["both"])[:, columns], **CLOSE)


def test_has_flex_kernel_depends_on_device_dtype_and_head_width() -> None:
    assert not attention.has_flex_kernel(torch.empty(1), 64)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        assert attention.has_flex_kernel(x, 16)
        assert attention.has_flex_kernel(x.bfloat16(), 64)
        assert not attention.has_flex_kernel(x.double(), 64)
        assert not attention.has_flex_kernel(x, 8)
        with sdpa_kernel(SDPBackend.MATH):  # FLOP counting requires explicit products
            assert not attention.has_flex_kernel(x, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_attention_kernels_match_masked_sdpa_with_gradients(layout: str) -> None:
    """Sequences have 300 positions, which is not a multiple of the tile size.

    The tolerance 1e-4 is the rounding of float32 sums in another order.
    """
    length, device = 300, "cuda"
    wide, stretch = torch.arange(length), torch.arange(length) * LENGTH // length
    shown = LAYOUTS[layout]
    if shown is not None:
        noisy = (
            None
            if shown.noisy is None
            else shown.noisy[wide * len(shown.noisy) // length].to(device)
        )
        columns = wide * shown.block.shape[-1] // length
        shown = AttentionLayout(wide.to(device), shown.block[:, columns].to(device), noisy)
    context = Context(VALID[:, stretch].to(device), DOCUMENTS[:, stretch].to(device), layout=shown)
    parts = [torch.randn(BATCH, 2, length, 16, device=device, requires_grad=True) for _ in range(3)]
    values, gradients = [], []
    for seen in (context.attention_mask(), context.kernel_mask(parts[0], 16)):
        values.append(attend(*parts, seen))
        gradients.append(torch.stack(torch.autograd.grad(values[-1].square().sum(), parts)))
    assert isinstance(seen, flex_attention.BlockMask)
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_new_flex_attention_masks_do_not_recompile_blocks(backbone: DiT, flex: None) -> None:
    """A single traced graph serves all blocks and batches, although each batch has a new mask."""
    model = denoiser(deepcopy(backbone))
    noisy = random_noisy(23)._replace(block=OWN, memory=random_tokens(24))
    batches = [
        CONTEXTS["both"],
        CONTEXTS["both"]._replace(document=DOCUMENTS.flip(0), valid=VALID.flip(0)),
    ]
    expected = [hidden(model, noisy, context) for context in batches]
    assert not torch.equal(*expected)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.backbone.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)
    for context, values in zip(batches, expected):
        torch.testing.assert_close(hidden(model, noisy, context), values, **CLOSE)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------- packed documents


def elsewhere(ids: Tensor, there: Tensor) -> Tensor:
    return torch.where(there, (ids + 1) % VOCABULARY.num_tokens, ids)


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["own", "previous"])
@pytest.mark.parametrize("name", ["packed", "both"])
def test_packing_does_not_change_hidden_states_or_predictions(
    backbone: DiT, name: str, inputs: Inputs
) -> None:
    """Results of a document are bitwise equal for any tokens and times of the other documents."""
    model, context = denoiser(backbone, inputs), CONTEXTS[name]
    every, root = torch.arange(BATCH * LENGTH), torch.full((BATCH * LENGTH,), VOCABULARY.root)

    def hidden_and_predictions(noisy: Noisy) -> tuple[Tensor, Tensor]:
        dists = model.query(noisy, context, every, root, lambda dist, idx: dist.log_mass(0))
        assert isinstance(dists, Tensor)
        return hidden(model, noisy, context), dists.unflatten(0, (BATCH, LENGTH))

    for block in (None, BLOCKS["fours"].unsqueeze(0), OWN):
        for memory in (None, random_tokens(26)) if block is not None else (None,):
            noisy = random_noisy(25)._replace(block=block, memory=memory)
            before = hidden_and_predictions(noisy)
            for number in range(3):
                there = number == DOCUMENTS
                after = hidden_and_predictions(
                    noisy._replace(
                        zt=elsewhere(noisy.zt, there),
                        t=torch.where(there, 1 - noisy.t, noisy.t),
                        memory=None if memory is None else elsewhere(memory, there),
                    )
                )
                for old, new in zip(before, after):
                    assert torch.equal(old[~there], new[~there])
                    assert not torch.equal(old[there], new[there])


RULES = {
    "flat": ("own", FlatTimes()),
    "blocks": ("own", WindowTimes(4, paired=False)),
    "paired blocks": ("own", WindowTimes(4)),
    "sliding window": ("own", WindowTimes(4, shape="slide")),
    "token by token": ("previous", WindowTimes(1)),
}


@pytest.mark.parametrize("rule", RULES)
def test_packing_does_not_change_bound_loss_or_gradient_of_a_document(
    backbone: DiT, rule: str
) -> None:
    """Other documents of a row do not change the terms of the bound of a document.

    If only one document is scored, the other documents change neither its training loss nor its
    gradient. Equality is bitwise. All tokens have uniform noise, so that the network is queried at
    the same positions in every row.
    """
    inputs, times = RULES[rule]
    process = MixtureProcess(VOCABULARY, LinearSchedule(floor=0.01), token_distribution(VOCABULARY))
    model = denoiser(backbone, inputs)
    objective, slots = DiffusionObjective(process, model, ElboLoss(), times), torch.arange(BATCH)
    batch = Batch(random_tokens(27), VALID, VALID, DOCUMENTS, slots, packed=True)
    rng = CounterRng(0, 0, slots, LENGTH)

    def bound_terms(batch: Batch) -> Tensor:
        return sum(
            objective.nll(batch, rng, slots, BATCH, times).terms.values(),
            torch.zeros(BATCH, LENGTH),
        )

    def loss_and_gradient(batch: Batch) -> list[Tensor]:
        loss = objective(batch, rng, {"tokens": torch.tensor(1.0)}, BATCH).loss
        return [
            loss.detach(),
            *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True),
        ]

    before = bound_terms(batch)
    for number in range(3):
        there = number == DOCUMENTS
        changed = replace(batch, ids=elsewhere(batch.ids, there))
        after = bound_terms(changed)
        assert torch.equal(before[~there], after[~there])
        assert not torch.equal(before[there], after[there])
        others = VALID & ~there
        mine, theirs = (loss_and_gradient(replace(b, scored=others)) for b in (batch, changed))
        assert mine[0] != 0
        for old, new in zip(mine, theirs):
            assert (old is None and new is None) or torch.equal(old, new)


def test_bfloat16_attention_on_a_cpu_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8, 16, generator=generator).to(torch.bfloat16).unbind()
    exact = attend(q.double(), k.double(), v.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, None)
    # Equal up to the rounding of the result: nothing before it is rounded to bfloat16.
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
