"""A few probabilities of a process, by which a checkpoint tells whether it is noised by the process it was trained with."""

from __future__ import annotations

import torch

from ddiff.core.process import ForwardProcess

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def noising_of(process: ForwardProcess | None) -> list[float]:
    """Probabilities of q_t(. | x) at five times for the first, the middle and the last token x; [] without a process.

    For each: that the token is still x, that it is the prior's likeliest state, and sum_z q_t(z | x)^2, in which every
    state counts. Settings that a recipe names show here, and so do a process from Python and changed code of a plugin.
    """
    if process is None:
        return []
    num_tokens = process.vocabulary.num_tokens
    likeliest = int(process.prior.log_prob.argmax())
    found: list[float] = []
    for token in dict.fromkeys((0, num_tokens // 2, num_tokens - 1)):
        certain = torch.full((1, num_tokens), -torch.inf, dtype=torch.float64)
        certain[0, token] = 0.0
        for time in TIMES:
            log_q = process.log_marginal(certain, torch.tensor([time], dtype=torch.float64))[0]
            probabilities = log_q.double().exp()
            found += [
                float(probabilities[token]),
                float(probabilities[likeliest]),
                float(probabilities.square().sum()),
            ]
    return found
