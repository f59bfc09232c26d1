"""`Denoiser` joins a backbone and a head, and runs the backbone at most once per noisy state."""

from __future__ import annotations

import pytest
import torch
from dense_heads import TREES, dense_distribution, make_head, random_nodes, random_token_below
from torch import Tensor, nn

from ddiff import Backbone
from ddiff.core.clock import LogTimeClock
from ddiff.core.prediction import CleanDistribution
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser, resolve_precision
from ddiff.nn.heads import TokenHead
from ddiff.nn.network import as_network

VOCABULARY = TREES["two levels"]
BATCH, LENGTH, WIDTH = 3, 4, 5


class CountingBackbone(Backbone):
    """Backbone that depends on ids, times and every weight, and counts its forward passes."""

    width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY.num_states, WIDTH)
        self.runs = 0

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        self.runs += 1
        return self.embedding(ids) + t.unsqueeze(-1)


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(1)
    return Denoiser(CountingBackbone(), make_head("levelwise", VOCABULARY, WIDTH)).double()


def shown() -> Noisy:
    generator = torch.Generator().manual_seed(2)
    zt = random_nodes(VOCABULARY, BATCH * LENGTH, generator).reshape(BATCH, LENGTH)
    t = torch.rand(BATCH, LENGTH, dtype=torch.float64, generator=generator)
    return Noisy(zt, t, torch.zeros_like(zt, dtype=torch.bool))


def test_gradients_through_head_chunks_reach_backbone_and_head(denoiser: Denoiser) -> None:
    """Gradients of a head that computes in chunks equal those of plain autograd."""
    noisy = shown()
    rows = torch.tensor([7, 0, 3, 10])
    node = noisy.zt.flatten()[rows]
    word = random_token_below(VOCABULARY, node, torch.Generator().manual_seed(0))
    fn = lambda dist, idx: -dist.log_child(node[idx], word[idx])  # noqa: E731
    total, values = denoiser(noisy, UNPADDED, rows, node, fn)
    dense = fn(
        dense_distribution(denoiser.head, denoiser.hidden_states(noisy, UNPADDED)[rows]),
        torch.arange(4),
    )
    torch.testing.assert_close(values, dense.detach(), rtol=1e-12, atol=1e-12)
    parameters = list(denoiser.parameters())
    for ours, expected in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(dense.sum(), parameters)
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        denoiser.query(noisy, UNPADDED, rows, node, fn), values, rtol=1e-12, atol=1e-12
    )


def test_backbone_runs_once_for_repeated_queries_of_one_state(denoiser: Denoiser) -> None:
    process = TreeProcess(VOCABULARY, LogTimeClock((1.0, 1.0)))
    network = as_network(denoiser, process)
    noisy = shown()
    query = network(noisy)
    assert (network.calls, denoiser.backbone.runs) == (0, 0)
    fn = lambda dist: dist.log_below(0).logsumexp(-1)  # noqa: E731
    rows = torch.arange(5)
    first = query(rows, noisy.zt.flatten()[rows], fn)
    query(rows + 3, noisy.zt.flatten()[rows + 3], fn)
    assert (network.calls, denoiser.backbone.runs) == (1, 1)
    assert not first.requires_grad
    network(noisy)(rows, noisy.zt.flatten()[rows], fn)
    assert network.calls == 1, "an unchanged state was evaluated twice"


def test_backbone_runs_only_on_queried_sequences_that_changed(denoiser: Denoiser) -> None:
    """Sequences whose ids are unchanged are not run again if the network has no time input."""
    process = TreeProcess(VOCABULARY, LogTimeClock((1.0, 1.0)))
    noisy, fn = shown(), lambda dist: dist.log_below(0).logsumexp(-1)
    everywhere = torch.arange(BATCH * LENGTH)
    for reads_time, runs in ((True, [2, 1, 0]), (False, [1, 1, 0])):
        denoiser.backbone.reads_time = reads_time
        network = as_network(denoiser, process)
        rows = everywhere[: 2 * LENGTH]
        network(noisy)(rows, noisy.zt.flatten()[rows], fn)
        later = noisy._replace(t=noisy.t * 0.5 if reads_time else noisy.t)
        rows = everywhere[:LENGTH]
        values = network(later)(rows, later.zt.flatten()[rows], fn)
        assert network.runs is not None
        assert network.runs.tolist() == runs
        torch.testing.assert_close(
            values, as_network(denoiser, process)(later)(rows, later.zt.flatten()[rows], fn)
        )
        changed = later._replace(
            zt=torch.where(torch.arange(BATCH).unsqueeze(-1) == 1, 0, later.zt)
        )
        network(changed)(rows, changed.zt.flatten()[rows], fn)
        assert network.runs.tolist()[0] == runs[0]


class FullConditional(Backbone):
    """Backbone whose hidden states are the exact log P(x_i | z), conditioned also on z_i.

    `rest` [B,L,V] are the distributions P(x_i | z without z_i).
    """

    width = VOCABULARY.num_tokens

    def __init__(self, process: TreeProcess, log_rest: Tensor) -> None:
        super().__init__()
        self.process, self.log_rest = process, log_rest

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        likelihood = self.process.log_likelihood(ids.flatten(), t.flatten()).reshape(
            self.log_rest.shape
        )
        return (self.log_rest + likelihood).log_softmax(-1)


def test_denoiser_divides_full_conditional_by_likelihood_of_own_state() -> None:
    """The full conditional, p(x) q_t(z|x), divided by q_t(z|x) is p(x), below any node."""
    process = TreeProcess(VOCABULARY, LogTimeClock((1.0, 1.0)), xi=0.8)
    log_rest = torch.randn(BATCH, LENGTH, VOCABULARY.num_tokens, dtype=torch.float64).log_softmax(
        -1
    )
    head = TokenHead(VOCABULARY, VOCABULARY.num_tokens).double()
    with torch.no_grad():
        head.table.copy_(torch.eye(VOCABULARY.num_tokens))
    noisy, rows = shown(), torch.tensor([2, 11, 5])
    mass = lambda dist: dist.log_mass(0)  # noqa: E731
    dists = {
        given: as_network(Denoiser(FullConditional(process, log_rest), head, given), process)(
            noisy
        )(rows, noisy.zt.flatten()[rows], mass)
        for given in ("all", "rest")
    }
    expected = log_rest.flatten(0, 1)[rows]
    torch.testing.assert_close(dists["all"], expected, rtol=1e-12, atol=1e-12)
    nodes = noisy.zt.flatten()[rows] != VOCABULARY.root  # the root has no information on the token
    assert nodes.any()
    assert ((dists["rest"] - expected).abs().amax(-1) > 0.1)[nodes].all()


def test_attention_mask_is_none_without_padding_and_packing() -> None:
    assert UNPADDED.attention_mask() is None
    valid = torch.tensor([[True, True, False]])
    document = torch.tensor([[0, 1, 1]])
    padded = Context(valid=valid).attention_mask()
    packed = Context(valid=valid, document=document).attention_mask()
    assert padded is not None
    assert packed is not None
    assert padded[0, 0].tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert packed[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, True, True],
    ]


def test_denoiser_refuses_wrong_widths_and_unknown_parameterization() -> None:
    with pytest.raises(ArgumentError, match="as wide as"):
        Denoiser(CountingBackbone(), TokenHead(VOCABULARY, WIDTH + 1))
    with pytest.raises(ArgumentError, match="parameterization must be"):
        Denoiser(CountingBackbone(), TokenHead(VOCABULARY, WIDTH), parameterization="some")  # type: ignore[arg-type]


def test_denoiser_query_passes_each_row_to_its_callback_once(denoiser: Denoiser) -> None:
    """The callback receives each queried row exactly once."""
    noisy = shown()
    seen: list[int] = []

    def fn(dist: CleanDistribution, idx: Tensor) -> Tensor:
        seen.extend(idx.tolist())
        return idx

    process = TreeProcess(VOCABULARY, LogTimeClock((1.0, 1.0)))
    rows = torch.tensor([1, 4, 4, 9, 0])
    order = as_network(denoiser, process)(noisy)(
        rows, noisy.zt.flatten()[rows], fn, torch.arange(5)
    )
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert order.tolist() == [0, 1, 2, 3, 4]


def test_state_changed_in_place_after_a_query_is_evaluated_again(denoiser: Denoiser) -> None:
    process = TreeProcess(VOCABULARY, LogTimeClock((1.0, 1.0)))
    noisy, fn = shown(), lambda dist: dist.log_below(0).logsumexp(-1)
    rows = torch.arange(BATCH * LENGTH)
    network = as_network(denoiser, process)
    network(noisy)(rows, noisy.zt.flatten(), fn)
    noisy.zt.fill_(VOCABULARY.root)
    values = network(noisy)(rows, noisy.zt.flatten(), fn)
    expected = as_network(denoiser, process)(noisy)(rows, noisy.zt.flatten(), fn)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("units", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_native_precision_is_bfloat16_only_on_devices_with_bfloat16_units(
    units: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == units)
    expected = torch.bfloat16 if units else None
    assert resolve_precision("native", "cpu") == expected
    assert resolve_precision("auto", "cpu") is None
    assert resolve_precision("native", "cuda:0") == torch.bfloat16
