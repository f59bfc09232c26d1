"""Compute probabilities that identify a forward process in a checkpoint."""

from __future__ import annotations

import torch

from ddiff.core.process import ForwardProcess

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def sample_noising(process: ForwardProcess | None) -> list[float]:
    """Return probabilities of a process that identify its settings and its code.

    Let q_t(z | x) be the probability that token x is in state z at time t, and z* the most likely
    state of the prior. For each of five times t, and for the first, the middle and the last token x
    of the vocabulary, the list contains three numbers: q_t(x | x), q_t(z* | x), and sum_z q_t(z |
    x)^2. The sum depends on every state z. Returns [] if `process` is None.
    """
    if process is None:
        return []
    num_tokens = process.vocabulary.num_tokens
    likeliest = int(process.prior.log_prob.argmax())
    found: list[float] = []
    # dict.fromkeys: the three tokens coincide in a small vocabulary, and keep their order
    for token in dict.fromkeys((0, num_tokens // 2, num_tokens - 1)):
        certain = torch.full((1, num_tokens), -torch.inf, dtype=torch.float64)
        certain[0, token] = 0.0
        for time in TIMES:
            t = torch.tensor([time], dtype=torch.float64)
            log_q = process.log_marginal(certain, t)[0]
            probabilities = log_q.double().exp()
            found.append(float(probabilities[token]))
            found.append(float(probabilities[likeliest]))
            found.append(float(probabilities.square().sum()))
    return found
