"""Self-correction of finished samples: accuracy of the tokens under the model that drew them.

The model predicts each token of a clean sample from all tokens, the token itself included. The
accuracy is the share of positions whose token is the most likely one (arXiv 2503.04482).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.sampling.loop import Canvas
from ddiff.sampling.self_correction import (
    SelfCorrectingSampler,
    choose_changes,
    propose_changes,
)


@dataclass(frozen=True)
class CorrectionCurve:
    """Accuracy of B samples during their correction.

    Attributes:
        accuracy: [B, rounds + 1] float64, the accuracy after 0, 1, 2, ... rounds.
        ids: corrected tokens [B,L].
    """

    accuracy: Tensor
    ids: Tensor


@torch.no_grad()
def measure_correction(
    sampler: SelfCorrectingSampler,
    process: ForwardProcess,
    network: Network,
    ids: Tensor,
    rng_at: Callable[[int], CounterRng],
) -> CorrectionCurve:
    """Correct finished samples in the rounds of `sampler`, and measure the accuracy of each round.

    A sample in which a round changes no token is finished, and keeps its accuracy. The patience of
    the sampler is not used, so that the curve shows all rounds.

    Args:
        sampler: number of rounds, changes per round, temperature and time of the network. It must
            support the process.
        process: process of the model.
        network: network of the model, without a prompt.
        ids: tokens [B,L] of finished samples.
        rng_at: rng_at(k) is the random generator of round k.
    """
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    time = torch.full(ids.shape, sampler.at, dtype=torch.float64, device=ids.device)
    is_active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    accuracy = torch.zeros(len(ids), sampler.rounds + 1, dtype=torch.float64)
    for k in range(sampler.rounds + 1):
        canvas = Canvas(ids, time, ~everywhere, everywhere)
        drawn, score, is_best = propose_changes(
            process, network, canvas, is_active, rng_at(k), sampler.temperature
        )
        previous = accuracy[:, max(k - 1, 0)]
        found = is_best.double().mean(-1).cpu()
        accuracy[:, k] = torch.where(is_active.cpu(), found, previous)
        if k == sampler.rounds:
            break
        change = choose_changes(ids, drawn, score, sampler.commit) & is_active.unsqueeze(-1)
        is_active = change.any(-1)
        ids = torch.where(change, drawn, ids)
    return CorrectionCurve(accuracy, ids)
