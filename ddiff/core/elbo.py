"""The bound: closing term + diffusion term + decoding term, for any process, any window and any time rule.

    NELBO(x) = E_{z1 ~ prior} KL( q_{t1}(.|x) || law of z_{t1} under the network at z1 )        one call at t = 1
             + E_tau sum_i speed_i density_i(z_i, x_i)                                          one call at random times
             + E_{z ~ q_{t0}} sum_i -ln P(x_i | z_i)                                            one call at the first times

Times are drawn by the process's information time, speed_i = dt_i/dtau (`ddiff.core.information`). The bound is exact for
any window, finite where a point prior would give infinity, and never sees a training weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.core.prediction import DenseDistribution, Prediction, Score
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, Times, TimeSampler
from ddiff.core.vocabulary import Vocabulary

Network = Callable[[Noisy], Query]


class NelboTerms(NamedTuple):
    """[B,L] float64 nats each, 0 where a position is not scored; `noisy` is what the diffusion term was read at."""

    closing: Tensor
    diffusion: Tensor
    decoding: Tensor
    noisy: Noisy

    def __repr__(self) -> str:
        terms = {"closing": self.closing, "diffusion": self.diffusion, "decoding": self.decoding}
        return f"NelboTerms({_means(terms)})"

    @property
    def total(self) -> Tensor:
        """[B] nats per sequence."""
        return (self.closing + self.diffusion + self.decoding).sum(-1)


@dataclass(frozen=True)
class Likelihood:
    """Nats per position [B,L] by term of the bound, and `parts`, how the diffusion term divides (by level)."""

    terms: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Likelihood({_means(self.terms)}; parts {', '.join(self.parts) or 'none'})"


def _means(terms: Mapping[str, Tensor]) -> str:
    """`closing 0.0000, diffusion 3.1052; mean nats per position of 8 x 16`, for people."""
    shapes = {" x ".join(map(str, tensor.shape)) for tensor in terms.values()}
    if any(tensor.is_meta for tensor in terms.values()):
        return f"{', '.join(terms)}; of {', '.join(sorted(shapes))}, on meta"
    shown = ", ".join(
        f"{name} {float(tensor.detach().double().mean()):.4f}" for name, tensor in terms.items()
    )
    return f"{shown}; mean nats per position of {', '.join(sorted(shapes))}"


def nelbo(
    process: ForwardProcess,
    network: Network,
    x0: Tensor,
    scored: Tensor,
    rule: TimeSampler,
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
) -> NelboTerms:
    """One unbiased draw of the three terms per sequence.

    x0 [B,L]; scored bool [B,L]: the others stay clean and count nothing; slot [B] is each sequence's stratum of `slots`
    (one number, or [B] when sequences are stratified in groups of their own).
    """
    length = x0.shape[1]
    clock = process.information_time
    first, last = rule.ends(clock, rng, slot, slots, length)
    times = rule.draw(clock, rng, slot, slots, length)
    noisy = corrupt(process, x0, times, scored, rng, "diffusion")
    return NelboTerms(
        closing_term(process, network, x0, last, scored, rng),
        diffusion_term(process, network, x0, noisy, times.speed),
        decoding_term(process, network, x0, first, scored, rng),
        noisy,
    )


def corrupt(
    process: ForwardProcess, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, channel: str
) -> Noisy:
    """z_t ~ q_t(.|x0) at scored positions that the rule noises; the others are clean, at time 0; some wait at the prior."""
    u = rng.uniform(channel, process.uniforms_per_sample).reshape(x0.numel(), -1)
    zt = process.sample(x0.reshape(-1), times.t.reshape(-1), u).reshape(x0.shape)
    if times.at_prior is not None:  # a draw of the prior says nothing of x0, even where q_1 does
        zt = torch.where(times.at_prior, process.prior.draw(rng.uniform(f"{channel}.waiting")), zt)
    clean = times.clean | ~scored
    memory = x0 if times.paired else None
    return Noisy(
        torch.where(clean, x0, zt), torch.where(clean, 0.0, times.t), clean, times.block, memory
    )


def diffusion_term(
    process: ForwardProcess, network: Network, x0: Tensor, noisy: Noisy, speed: Tensor
) -> Tensor:
    """[B,L] speed * weight * divergence, read only where it can be non-zero."""
    reads = (speed > 0) & ~noisy.clean & process.active(noisy.zt)
    divergence = _read(
        network, noisy, reads, process.scope, process.divergence, x0, noisy.zt, noisy.t
    )
    flat = reads.reshape(-1)
    weight = torch.zeros(flat.shape, dtype=torch.float64, device=flat.device)
    weight[flat] = process.weight(*(values.reshape(-1)[flat] for values in (x0, noisy.zt, noisy.t)))
    return speed * weight.reshape(speed.shape) * divergence


def decoding_term(
    process: ForwardProcess,
    network: Network,
    x0: Tensor,
    times: Times,
    scored: Tensor,
    rng: CounterRng,
) -> Tensor:
    """[B,L] -ln P(x0 | z) at the first times, own evidence included; nothing where the process has closed."""
    noisy = corrupt(process, x0, times, scored, rng, "decoding")
    reads = (times.speed > 0) & ~noisy.clean
    if (
        process.closes_at_clean
    ):  # then a state that nothing ever moves into still holds its clean token
        reads = reads & (times.t > 0) & process.active(noisy.zt)
    return times.speed * _read(
        network, noisy, reads, process.scope, process.decode_nll, x0, noisy.zt, noisy.t
    )


def closing_term(
    process: ForwardProcess,
    network: Network,
    x0: Tensor,
    times: Times,
    scored: Tensor,
    rng: CounterRng,
) -> Tensor:
    """[B,L] KL at the last times, charged positions being at a draw of the prior; nothing where the process has closed."""
    charged = (times.speed > 0) & ~times.clean & scored
    reads = charged & (times.t < 1) if process.closes_at_prior else charged
    noisy = corrupt(process, x0, times, scored, rng, "closing")
    shown = noisy._replace(
        zt=torch.where(charged, process.prior.draw(rng.uniform("prior")), noisy.zt),
        t=torch.where(charged, 1.0, noisy.t),
    )
    whole = lambda zt: torch.full_like(zt, process.vocabulary.root)  # noqa: E731
    return times.speed * _read(
        network, shown, reads, whole, partial(_closing_kl, process), x0, times.t
    )


def _closing_kl(process: ForwardProcess, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
    """[r] KL at t of what was asked at t = 1.

    A score that says what is likely there says nothing of how much noise is left at an earlier t, which the process knows:
    its shares among the words are taken as their law.
    """
    if not isinstance(prediction, Score):
        return process.closing_kl(prediction, x0, t)
    words = DenseDistribution(
        prediction.log_ratio[:, : process.vocabulary.num_tokens].log_softmax(-1), process.vocabulary
    )
    return torch.where(
        t < 1, process.closing_kl(words, x0, t), process.closing_kl(prediction, x0, t)
    )


def _read(
    network: Network,
    noisy: Noisy,
    reads: Tensor,
    scope: Callable[[Tensor], Tensor],
    formula: Callable[..., Tensor],
    *arguments: Tensor,
) -> Tensor:
    """[B,L] formula(law, *arguments) at the marked positions of one network call, 0 elsewhere."""
    rows = reads.reshape(-1).nonzero().squeeze(-1)
    values = torch.zeros(reads.numel(), dtype=torch.float64, device=reads.device)
    if len(rows):
        node = scope(noisy.zt.reshape(-1)[rows])
        flat = [argument.reshape(-1)[rows] for argument in arguments]
        values[rows] = network(noisy)(rows, node, formula, *flat).double()
    return values.reshape(reads.shape)


def network_from_noisy(dist: Callable[[Noisy], Tensor], vocabulary: Vocabulary) -> Network:
    """An `Ask` from a plain function of all that a network is shown: noisy -> log_p [B,L,V]."""

    def network(noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            log_p = dist(noisy).reshape(-1, vocabulary.num_tokens)[rows]
            return fn(DenseDistribution(log_p, vocabulary), *per_row)

        return query

    return network


def network_from_table(
    denoiser: Callable[[Tensor, Tensor], Tensor], vocabulary: Vocabulary
) -> Network:
    """An `Ask` from a plain function (zt [B,L], t [B,L]) -> log_p [B,L,V], for toys, oracles and own networks."""
    return network_from_noisy(lambda noisy: denoiser(noisy.zt, noisy.t), vocabulary)
