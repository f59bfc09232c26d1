"""Exact likelihood of short sequences under a masked diffusion model.

A masked model whose network does not depend on time reveals the positions in a uniformly random
order. Let S be the set of revealed positions of a sequence of L tokens, and p(x_i | x_S) the
predicted probability of the token at i. Then

    p(x) = E_order prod_k p(x_{order_k} | x_{order_1}, ..., x_{order_{k-1}}),

and f(S), the probability that the positions S are revealed first and get the tokens x_S, follows
from

    f({}) = 1,    f(S + i) = sum over i of f(S) p(x_i | x_S) / (L - |S|),

so that p(x) = f(all positions). The expectation of the bound (NELBO) over all times is

    -E_order sum_k ln p(x_{order_k} | x_{order_1}, ..., x_{order_{k-1}}),

which is at least -ln p(x) (Jensen). The difference is the gap of the bound. All 2^L sets are
evaluated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import Prediction, require_distribution
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError

LONGEST = 16  # positions: the network is evaluated at 2**16 sets
CHECKED_TOKENS = 32  # tokens on which the process is checked
SETS_AT_ONCE = 1024
TIMES = (0.25, 0.75)  # times at which a network without time must agree


class ChainRule(NamedTuple):
    """Exact likelihood of each sequence, and the expectation of its bound.

    Attributes:
        nll: -ln p(x) [B] in nats per sequence.
        bound: expectation of the bound [B] in nats per sequence, over all times and masks.
    """

    nll: Tensor
    bound: Tensor


def chain_rule_nll(network: Network, process: ForwardProcess, x0: Tensor) -> ChainRule:
    """Compute the exact likelihood of short sequences by a sum over sets of positions.

    Args:
        network: function that returns the query of a corrupted batch. It must not depend on time.
        process: masked process on a flat vocabulary.
        x0: [B,L] clean tokens, with L up to `LONGEST`.

    Raises ArgumentError for another process, for longer sequences, and for a network that depends
    on time: its positions are revealed at random times, which the sum over sets does not contain.
    """
    length = x0.shape[1]
    if not 1 <= length <= LONGEST:
        raise ArgumentError(
            f"chain_rule_nll: sequences must have 1 to {LONGEST} tokens, since 2**L sets are "
            f"evaluated; got {length}. Score shorter sequences."
        )
    mask = _mask_of(process)
    sets = torch.arange(2**length)
    # is_shown[s,i]: whether set s contains position i; bit i of the number s
    is_shown = (sets.unsqueeze(-1) >> torch.arange(length)) & 1 == 1
    nll = []
    bound = []
    for row in x0:
        log_prob = _log_probs(network, process, row, is_shown.to(row.device), mask)
        found = _sum_over_sets(log_prob.cpu(), is_shown)
        nll.append(found.nll)
        bound.append(found.bound)
    return ChainRule(torch.stack(nll), torch.stack(bound))


def _sum_over_sets(log_prob: Tensor, is_shown: Tensor) -> ChainRule:
    """Sum over the sets of one sequence.

    Args:
        log_prob: [2^L,L] ln p(x_i | x_S) of every set S and every position i outside of S.
        is_shown: bool [2^L,L], whether the set contains the position.
    """
    count, length = is_shown.shape
    size = is_shown.sum(-1)
    log_f = torch.full((count,), -torch.inf, dtype=torch.float64)
    log_f[0] = 0.0
    bound = torch.zeros((), dtype=torch.float64)
    # a larger set has a larger number than each of its subsets, so ascending order is enough
    for number in range(count - 1):
        hidden = (~is_shown[number]).nonzero().squeeze(-1)
        left = len(hidden)
        step = log_f[number] + log_prob[number, hidden] - math.log(left)
        after = number + 2**hidden
        log_f[after] = torch.logaddexp(log_f[after], step)
        # a random order reveals exactly this set first with probability 1 / C(L, |S|)
        share = 1.0 / math.comb(length, int(size[number]))
        bound = bound - share * log_prob[number, hidden].mean()
    return ChainRule(-log_f[-1], bound)


def _log_probs(
    network: Network, process: ForwardProcess, row: Tensor, is_shown: Tensor, mask: int
) -> Tensor:
    """Return ln p(x_i | x_S) [2^L,L] of one sequence `row` [L], 0 at positions of S.

    Raises ArgumentError if the network depends on time.
    """
    chunks = []
    for shown in is_shown.split(SETS_AT_ONCE):
        first, second = (_query(network, process, row, shown, mask, t) for t in TIMES)
        if not torch.allclose(first, second, rtol=1e-6, atol=1e-6):
            raise ArgumentError(
                "chain_rule_nll: the network must not depend on time; its predictions at t = "
                f"{TIMES[0]} and t = {TIMES[1]} differ. Train a network without time, or compare "
                "with the bound only."
            )
        chunks.append(first)
    return torch.cat(chunks)


def _query(
    network: Network, process: ForwardProcess, row: Tensor, shown: Tensor, mask: int, t: float
) -> Tensor:
    """Return ln p(x_i | x_S) of n sets `shown` [n,L] at time t, as [n,L]."""
    tokens = row.expand(shown.shape)
    zt = torch.where(shown, tokens, mask)
    times = torch.where(shown, 0.0, t).double()
    hidden = (~shown).reshape(-1).nonzero().squeeze(-1)
    found = torch.zeros(shown.numel(), dtype=torch.float64, device=row.device)
    if len(hidden):
        node = torch.full_like(hidden, process.vocabulary.root)
        query = network(Noisy(zt=zt, t=times, clean=shown))
        found[hidden] = query(hidden, node, _log_prob, tokens.reshape(-1)[hidden]).double()
    return found.reshape(shown.shape)


def _log_prob(dist: Prediction, targets: Tensor) -> Tensor:
    return require_distribution(dist, "chain_rule_nll").log_prob(targets)


def _mask_of(process: ForwardProcess) -> int:
    """Return the id of the mask. Raises ArgumentError unless tokens change to the mask only."""
    mask = process.vocabulary.mask_id
    tokens = torch.arange(min(process.vocabulary.num_tokens, CHECKED_TOKENS))
    likely = process.log_likelihood(tokens, torch.full((len(tokens),), 0.5).double()).isfinite()
    from_others = likely.sum() - likely[tokens, tokens].sum()
    if mask is None or process.vocabulary.num_levels != 1 or from_others:
        raise ArgumentError(
            "chain_rule_nll: expected a masked process on a flat vocabulary, in which a token "
            f"changes to the mask only; got {process}. Other processes have no order in which "
            "tokens are revealed."
        )
    return mask
