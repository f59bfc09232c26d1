"""Probabilities that identify a forward process in a checkpoint."""

from __future__ import annotations

import torch

from ddiff.core.process import ForwardProcess

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def sample_noising(process: ForwardProcess | None) -> list[float]:
    """Evaluate q_t(. | x) at five times for the first, the middle and the last token x.

    For each pair (t, x) the list has three numbers: q_t(x | x), q_t(z* | x) for the most likely
    state z* of the prior, and sum_z q_t(z | x)^2, which depends on every state z. The numbers
    change with the settings of the process, with the process itself and with the code of a plugin.
    Returns [] without a process.
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
