"""Bound (NELBO) = prior term + diffusion term + decoding term, for any process and time rule.

    NELBO(x) = E_{z1 ~ prior} sum_i KL( q_{t1}(.|x_i) || predicted q_{t1} )     prior
             + E_tau sum_i speed_i density_i(z_i, x_i)                          diffusion
             + E_{z ~ q_{t0}} sum_i -ln P(x_i | z_i)                            decoding

The sums run over the positions i. The time rule draws times between t0 and t1 (0 and 1 by default).
Each term takes one network call:

- The prior term (`closing` in code) compares the marginals at the last time t1. The network is
  evaluated at z1, a draw from the prior at t = 1. The predicted q_{t1} is the marginal at t1 of a
  token that is drawn from this prediction. Because z1 is drawn from the prior, the prior term is
  also finite for a prior on a single state.
- The diffusion term is an integral over time. density_i is its integrand per unit of time
  (`ForwardProcess.density`). Times are drawn in the information time tau of the process
  (`ddiff.core.information`), and speed_i = dt_i/dtau.
- The decoding term is the negative log-likelihood of the tokens given the states at the first time
  t0.

The bound holds for any t0 < t1 and does not depend on training weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.core.field import FieldProcess
from ddiff.core.numerics import find_rows
from ddiff.core.prediction import DenseDistribution, Prediction, Score
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, Times, TimeSampler
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError

Network = Callable[[Noisy], Query]
"""Function from a corrupted batch to the query of its rows. Calling the query runs the network."""


class NelboTerms(NamedTuple):
    """Terms of the bound in nats, [B,L] float64 each, 0 at positions that are not scored.

    Attributes:
        closing: prior term, the KL divergence between the true and the predicted marginal at the
            last time.
        diffusion: integrand of the bound at the drawn time t, times the speed dt/dtau, where tau is
            the information time from which t is computed.
        decoding: negative log-likelihood of the token given the state at the first time.
        noisy: corrupted batch at which the diffusion term was evaluated.
    """

    closing: Tensor
    diffusion: Tensor
    decoding: Tensor
    noisy: Noisy

    def __repr__(self) -> str:
        return f"NelboTerms({_format_means(self.by_name())})"

    def by_name(self) -> dict[str, Tensor]:
        """Return the three terms [B,L] by their names."""
        return {"closing": self.closing, "diffusion": self.diffusion, "decoding": self.decoding}

    @property
    def total(self) -> Tensor:
        """Return the sum of the terms per sequence [B], in nats."""
        return (self.closing + self.diffusion + self.decoding).sum(-1)


@dataclass(frozen=True)
class Likelihood:
    """Terms of the bound per position, in nats.

    Attributes:
        terms: name of each term of the bound -> values [B,L].
        parts: name of each part of the diffusion term (for example a level of the tree) -> values
            [B,L].
        time_bins: [B,L] long, bin of information time in which the diffusion term of each position
            was drawn (`ddiff.core.information.find_time_bins`). None: there is no such term, or the
            times are unknown.
    """

    terms: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]
    time_bins: Tensor | None = None

    def __repr__(self) -> str:
        parts = ", ".join(self.parts) or "none"
        return f"Likelihood({_format_means(self.terms)}; parts {parts})"


def _format_means(terms: Mapping[str, Tensor]) -> str:
    """Format terms as `closing 0.0000, diffusion 3.1052; mean nats per position of 8 x 16`."""
    shapes = {" x ".join(map(str, tensor.shape)) for tensor in terms.values()}
    if any(tensor.is_meta for tensor in terms.values()):
        return f"{', '.join(terms)}; of {', '.join(sorted(shapes))}, on meta"
    means = []
    for name, tensor in terms.items():
        mean = float(tensor.detach().double().mean())
        means.append(f"{name} {mean:.4f}")
    return f"{', '.join(means)}; mean nats per position of {', '.join(sorted(shapes))}"


def nelbo(
    process: FieldProcess,
    network: Network,
    x0: Tensor,
    scored: Tensor,
    rule: TimeSampler,
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
) -> NelboTerms:
    """Draw one unbiased estimate of the three terms of the bound for each sequence.

    Args:
        network: function that returns the query of a corrupted batch (`Network`).
        x0: [B,L] clean tokens.
        scored: bool [B,L]. Positions that are not scored stay clean and add nothing.
        rule: time rule that draws the times.
        rng: random generator of the B samples.
        slot: [B] index of the stratum from which the time of each sequence is drawn.
        slots: number of strata, or one number per sequence [B] if sequences are stratified in
            separate groups.
    """
    length = x0.shape[1]
    clock = process.information_time
    first, last = rule.ends(clock, rng, slot, slots, length)
    times = rule.draw(clock, rng, slot, slots, length)
    if times.detour is not None:
        raise ArgumentError(
            f"nelbo: rule must stay on the path of the process; got {type(rule).__name__}, which "
            "draws detours for training. Use rule.with_window(0.0, 1.0)."
        )
    noisy = corrupt(process, x0, times, scored, rng, "diffusion")
    return NelboTerms(
        closing=closing_term(process, network, x0, last, scored, rng),
        diffusion=diffusion_term(process, network, x0, noisy, times.speed),
        decoding=decoding_term(process, network, x0, first, scored, rng),
        noisy=noisy,
    )


def corrupt(
    process: FieldProcess,
    x0: Tensor,
    times: Times,
    scored: Tensor,
    rng: CounterRng,
    channel: str,
) -> Noisy:
    """Corrupt a batch: draw the state z_t of each position at the time given by `times`.

    The state of a position is

    - its token x0, with time 0, if `times.clean` is True or the position is not scored;
    - otherwise a draw from the prior, if `times.at_prior` is True;
    - otherwise a draw from q_t(.|x0), with t = `times.t`, of the process along `times.detour`.

    Args:
        x0: [B,L] clean tokens.
        times: times and marks of the positions, drawn by a time rule.
        scored: bool [B,L], whether the position is part of the bound.
        rng: random generator of the B samples.
        channel: name of the random stream of `rng` from which the uniforms are taken.
    """
    u = rng.uniform(channel, process.uniforms_per_sample).reshape(times.t.numel(), -1)
    if times.detour is not None:
        assert isinstance(process, ForwardProcess)  # vectors have no levels
        process = process.along(times.detour.flatten())
    flat = process.sample(x0.flatten(0, 1), times.t.reshape(-1), u)
    zt = flat.reshape(x0.shape)
    if times.at_prior is not None:
        # A draw of the prior carries no information on x0, even if q_1 does. The channel's name is
        # part of the counter: another name would change every recorded draw.
        prior = process.prior.draw_positions(rng, f"{channel}.waiting")
        zt = choose_states(times.at_prior, prior, zt)
    clean = times.clean | ~scored
    return Noisy(
        zt=choose_states(clean, x0, zt),
        t=torch.where(clean, 0.0, times.t),
        clean=clean,
        block=times.block,
        memory=x0 if times.paired else None,
        absent=times.absent,
    )


def diffusion_term(
    process: FieldProcess,
    network: Network,
    x0: Tensor,
    noisy: Noisy,
    speed: Tensor,
) -> Tensor:
    """Return the diffusion term of the bound, speed * weight * divergence [B,L], in nats.

    `noisy` is a batch that was corrupted at the times of a time rule. `speed` [B,L] is the weight
    of each position for these times (`Times.speed`). The product weight * divergence of the process
    is the integrand of the bound (`ForwardProcess.density`). The network is queried only at
    positions where speed * weight * divergence can be non-zero.
    """
    # States in which the integrand of the bound is 0 are not queried.
    evaluated = (speed > 0) & ~noisy.clean & is_active(process, noisy.zt)
    divergence = evaluate_at(
        network,
        noisy,
        evaluated,
        process.scope,
        process.divergence,
        x0,
        noisy.zt,
        noisy.t,
    )
    flat = evaluated.reshape(-1)
    weight = torch.zeros(flat.shape, dtype=torch.float64, device=flat.device)
    weight[flat] = process.weight(
        x0.flatten(0, 1)[flat],
        noisy.zt.flatten(0, 1)[flat],
        noisy.t.reshape(-1)[flat],
    )
    return speed * weight.reshape(speed.shape) * divergence


def decoding_term(
    process: FieldProcess,
    network: Network,
    x0: Tensor,
    times: Times,
    scored: Tensor,
    rng: CounterRng,
) -> Tensor:
    """Return the decoding term of the bound, speed * (-ln P(x0 | z_t0)) [B,L], in nats.

    `times` holds the first time t0 of each position, and `times.speed` the weight of each position
    in the bound. z_t0 is drawn at t0. P(x0 | z_t0) includes the evidence of the position's own
    state. The term is 0 at positions that are clean or not scored, and at t0 = 0 if q_0 is the
    clean token (`closes_at_clean`).
    """
    noisy = corrupt(process, x0, times, scored, rng, "decoding")
    evaluated = (times.speed > 0) & ~noisy.clean
    if process.closes_at_clean:
        # If q_0 is the clean token, a state into which the chain never jumps is the clean token.
        evaluated = evaluated & (times.t > 0) & is_active(process, noisy.zt)
    needs_network = process.end_needs_network(noisy.t)
    nll = evaluate_at(
        network,
        noisy,
        evaluated & needs_network,
        process.scope,
        process.decode_nll,
        x0,
        noisy.zt,
        noisy.t,
    )
    nll += _evaluate_without_network(
        evaluated & ~needs_network,
        process.decode_nll,
        x0,
        noisy.zt,
        noisy.t,
    )
    return times.speed * nll


def closing_term(
    process: FieldProcess,
    network: Network,
    x0: Tensor,
    times: Times,
    scored: Tensor,
    rng: CounterRng,
) -> Tensor:
    """Return the prior term, speed * KL( q_t1(.|x0) || predicted q_t1 ) [B,L], in nats.

    `times` holds the last time t1 of each position, and `times.speed` the weight of each position
    in the bound. The network is evaluated with every scored position drawn from the prior. The term
    is 0 at positions that are clean or not scored, and at t1 = 1 if q_1 is exactly the prior
    (`closes_at_prior`).
    """
    counted = (times.speed > 0) & ~times.clean & scored
    evaluated = counted
    if process.closes_at_prior:
        # If q_1 is the prior for every token, the KL at t = 1 is 0.
        evaluated = counted & (times.t < 1)
    noisy = corrupt(process, x0, times, scored, rng, "closing")
    prior = process.prior.draw_positions(rng, "prior")
    noisy = noisy._replace(
        zt=choose_states(counted, prior, noisy.zt),
        t=torch.where(counted, 1.0, noisy.t),
    )
    needs_network = process.end_needs_network(times.t)
    closing_kl = partial(_closing_kl, process)
    kl = evaluate_at(
        network,
        noisy,
        evaluated & needs_network,
        process.closing_scope,
        closing_kl,
        x0,
        times.t,
    )
    kl += _evaluate_without_network(evaluated & ~needs_network, closing_kl, x0, times.t)
    return times.speed * kl


def choose_states(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return `first` at the positions where `condition` [B,n] is True, else `second`.

    `first` and `second` hold one state per position: tokens [B,n] or vectors [B,n,d]. Raises
    ArgumentError if `condition` has another shape, which torch would broadcast along the wrong
    dimension if two sizes are equal.
    """
    if condition.shape != first.shape[:2] or first.shape != second.shape:
        raise ArgumentError(
            "choose_states: condition must be [B,n] for states [B,n] or [B,n,d]; got condition "
            f"{list(condition.shape)}, first {list(first.shape)} and second {list(second.shape)}."
        )
    ones = (1,) * (second.dim() - condition.dim())
    return torch.where(condition.reshape(*condition.shape, *ones), first, second)


def is_active(process: FieldProcess, zt: Tensor) -> Tensor:
    """Return bool [B,n]: whether the state of a position may add to the bound."""
    return process.active(zt.flatten(0, 1)).reshape(zt.shape[:2])


def _closing_kl(
    process: FieldProcess,
    prediction: Prediction | None,
    x0: Tensor,
    t: Tensor,
) -> Tensor:
    """Return the prior term KL( q_t(.|x0) || q_t-bar ) [r] for a prediction made at t = 1.

    q_t-bar is the marginal of z_t if the clean token has the predicted distribution.

    A score at t = 1 gives the relative probabilities of the states at t = 1. It does not contain
    the smaller amount of noise at an earlier t, which only the process knows. At t < 1, the score
    is therefore normalized over the tokens and used as the predicted distribution of the clean
    token.
    """
    if not isinstance(prediction, Score):
        return process.closing_kl(prediction, x0, t)
    assert isinstance(process, ForwardProcess)  # only tokens have scores
    at_tokens = prediction.log_ratio[:, : process.vocabulary.num_tokens]
    tokens = DenseDistribution(at_tokens.log_softmax(-1), process.vocabulary)
    before_end = process.closing_kl(tokens, x0, t)
    at_end = process.closing_kl(prediction, x0, t)
    return torch.where(t < 1, before_end, at_end)


def evaluate_at(
    network: Network,
    noisy: Noisy,
    evaluated: Tensor,
    scope: Callable[[Tensor], Tensor],
    formula: Callable[..., Tensor],
    *arguments: Tensor,
) -> Tensor:
    """Return formula(prediction, *arguments) [B,L] at `evaluated` positions, and 0 elsewhere.

    `scope` returns for each state the node below which the formula needs the prediction. The
    network is called once, or not at all if no position is marked in `evaluated`.
    """
    rows = find_rows(evaluated.reshape(-1))
    values = torch.zeros(evaluated.numel(), dtype=torch.float64, device=evaluated.device)
    # Without rows the network is not run at all.
    if len(rows):
        node = scope(noisy.zt.flatten(0, 1)[rows])
        flat = [argument.flatten(0, 1)[rows] for argument in arguments]
        values[rows] = network(noisy)(rows, node, formula, *flat).double()
    return values.reshape(evaluated.shape)


def _evaluate_without_network(
    evaluated: Tensor,
    formula: Callable[..., Tensor],
    *arguments: Tensor,
) -> Tensor:
    """Return formula(None, *arguments) [B,n] at `evaluated` positions, and 0 elsewhere."""
    rows = find_rows(evaluated.reshape(-1))
    values = torch.zeros(evaluated.numel(), dtype=torch.float64, device=evaluated.device)
    if len(rows):
        flat = [argument.flatten(0, 1)[rows] for argument in arguments]
        values[rows] = formula(None, *flat).double()
    return values.reshape(evaluated.shape)


def network_from_noisy(log_probs: Callable[[Noisy], Tensor], vocabulary: Vocabulary) -> Network:
    """Make a `Network` from the function `log_probs`: corrupted batch -> log_p [B,L,V].

    log_p holds the predicted log-probabilities of the V tokens at every position.
    """

    def network(noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            log_p = log_probs(noisy).reshape(-1, vocabulary.num_tokens)[rows]
            return fn(DenseDistribution(log_p, vocabulary), *per_row)

        return query

    return network


def network_from_table(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    vocabulary: Vocabulary,
) -> Network:
    """Make a `Network` from a function `denoiser`: (zt [B,L], t [B,L]) -> log_p [B,L,V].

    log_p holds the predicted log-probabilities of the V tokens at every position. Toy models,
    exact predictions and custom networks are evaluated and sampled in this way.
    """

    def log_probs(noisy: Noisy) -> Tensor:
        return denoiser(noisy.zt, noisy.t)

    return network_from_noisy(log_probs, vocabulary)
