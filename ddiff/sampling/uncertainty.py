"""Uncertainty of the tokens of a text, measured by the entropy of the predicted distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, TrainedPart
from ddiff.core.times import Noisy
from ddiff.sampling.loop import query_at_root, restrict

# Number of network evaluations for the entropies of a process that predicts only noised positions.
ENTROPY_PASSES = 4
# Time of the source for other processes. At t = 0 a state determines its token, and the network is
# not trained there.
SOURCE_TIME = 1e-3


def predictive_entropy(
    process: ForwardProcess,
    network: Network,
    source: Tensor,
    editable: Tensor,
) -> Tensor:
    """Return the entropy [B,L] of the predicted token at every position, in nats.

    If the process trains predictions at tokens, the network is evaluated once at `source`, with the
    time SOURCE_TIME. Masked processes train predictions only at masks. For them the network is
    evaluated ENTROPY_PASSES times, and each time every ENTROPY_PASSES-th position is at the prior.
    The result is 0 where `editable` is False.
    """
    token = torch.zeros(1, dtype=torch.long, device=source.device)
    is_trained = process.active(token) & (process.trained_part(token) == TrainedPart.ALL)
    is_trained_at_tokens = bool(is_trained[0])
    passes = 1 if is_trained_at_tokens else ENTROPY_PASSES
    time = SOURCE_TIME if is_trained_at_tokens else 1.0 / passes
    place = torch.arange(source.shape[1], device=source.device)
    prior = process.prior.draw(torch.zeros(1, dtype=torch.float64, device=source.device))
    entropy = torch.zeros(source.shape, dtype=torch.float64, device=source.device).reshape(-1)
    for k in range(passes):
        queried = editable & (place % passes == k)
        rows = queried.reshape(-1).nonzero().squeeze(-1)
        if len(rows) == 0:
            continue
        zt = source if is_trained_at_tokens else torch.where(queried, prior, source)
        t = torch.where(queried, time, 0.0).double()
        query = restrict(network(Noisy(zt, t, ~queried)), rows)
        entropy[rows] = query_at_root(query, process, _entropy, zt.reshape(-1)[rows])
    return entropy.reshape(source.shape)


def _entropy(dist: CleanDistribution, zt: Tensor) -> Tensor:
    log_p = dist.log_mass(0)
    # p ln p is 0 at p = 0, where the product would be NaN.
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1).double()
