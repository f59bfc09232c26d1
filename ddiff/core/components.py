"""Interpolating processes whose noise is a mixture of a few fixed distributions.

Notation: the marginal given the token x is q_t(.|x) = alpha_t delta_x + b_t
(`ddiff.core.interpolating`). alpha_t is the probability that the token is clean and was never
redrawn, and the vector b_t over the states is the noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ddiff.core.interpolating import ROUNDING, InterpolatingProcess, subtract_or_zero
from ddiff.core.numerics import Constant, draw_index, evaluate_per_time, find_rows, interior, pick
from ddiff.core.process import ForwardProcess, Prior
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.vocabulary import FlatVocabulary, Vocabulary
from ddiff.errors import ArgumentError


class ComponentProcess(InterpolatingProcess):
    """Interpolating process whose noise mixes K fixed distributions: b_t = sum_k c_k(t) nu_k.

    The marginal given the token x is q_t(.|x) = alpha_t delta_x + b_t. A subclass defines `alpha`
    and the coefficients c_k (`coefficients`), with sum_k c_k = 1 - alpha. Each component must have
    a non-negative arrival rate: c_k' >= (alpha'/alpha) c_k. Training and sampling make no float64
    tensor [r,S] for S states; only methods for tests, such as `transition`, make such tensors.

    `__init__` computes `closes_at_clean` (alpha(0) = 1), `closes_at_prior` (alpha(1) = 0) and the
    prior (b_1, normalized) from alpha and c_k. A subclass must therefore set the attributes that
    alpha and c_k use before it calls `super().__init__`.

    Args:
        vocabulary: the S states.
        components: the K distributions nu_k over the states, for example `mask_distribution` or
            `token_distribution` of the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, components: Sequence[Tensor]) -> None:
        self.vocabulary = vocabulary
        checked = [_check_distribution(self, vocabulary, dist) for dist in components]
        self.components = torch.stack(checked)
        self._components_on = Constant(self.components).on
        at_tokens = self.components[:, : vocabulary.num_tokens]
        # If the noise of all tokens is equal, b_t is stored as one number per row for all tokens.
        self._is_even_on_tokens = bool((at_tokens == at_tokens[:, :1]).all())
        # The ends and the prior are computed here, since a subclass only defines alpha and c_k.
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        alpha_first, alpha_last = self.alpha(ends).tolist()
        self.closes_at_clean = abs(1.0 - alpha_first) < ROUNDING
        self.closes_at_prior = abs(alpha_last) < ROUNDING
        noise = self.noise(torch.ones(1, dtype=torch.float64))[0]
        self.prior = Prior((noise / noise.sum()).log())

    @abstractmethod
    def coefficients(self, t: Tensor) -> Tensor:
        """Return the coefficients c_k(t) >= 0 [r,K] of the K distributions in the noise."""

    def d_coefficients(self, t: Tensor) -> Tensor:
        """Return the derivatives dc_k/dt [r,K], by forward differentiation of `coefficients`.

        A subclass may override this method with a closed form.
        """
        ones = torch.ones_like(t)
        return torch.func.jvp(self.coefficients, (t,), (ones,))[1]

    def _component_rates(self, t: Tensor) -> Tensor:
        """Return the rates [r,K] at which a state is redrawn from each of the K distributions."""
        t = interior(t)
        log_decay = (self.d_alpha(t) / self.alpha(t)).unsqueeze(-1)
        return subtract_or_zero(self.d_coefficients(t), log_decay * self.coefficients(t))

    def _component_arrivals(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the probabilities [r,K] that the last redraw between s and t is from component k.

        Component k is the k-th distribution of the noise. The probabilities of a row sum to
        1 - alpha_t / alpha_s, the probability of at least one redraw; alpha_t is the probability of
        no redraw until t.
        """
        kept = self._stay(s, t).unsqueeze(-1) * self.coefficients(s)
        return subtract_or_zero(self.coefficients(t), kept).clamp(min=0.0)

    def _components_at(self, zt: Tensor) -> Tensor:
        """Return nu_k(z_t) [r,K], the probability of the state z_t under each component."""
        return self._components_on(zt.device).T[zt]

    # ------------------------------------------------------------------ noise and arrivals

    def noise(self, t: Tensor) -> Tensor:
        return self.coefficients(t) @ self._components_on(t.device)

    def d_noise(self, t: Tensor) -> Tensor:
        return self.d_coefficients(t) @ self._components_on(t.device)

    def arrivals(self, t: Tensor) -> Tensor:
        return self._component_rates(t) @ self._components_on(t.device)

    def noise_at(self, zt: Tensor, t: Tensor) -> Tensor:
        mass = evaluate_per_time(self.coefficients, t)
        return (mass * self._components_at(zt)).sum(-1)

    def arrivals_at(self, zt: Tensor, t: Tensor) -> Tensor:
        rates = evaluate_per_time(self._component_rates, t)
        return (rates * self._components_at(zt)).sum(-1)

    def _noise_elsewhere(self, zt: Tensor, t: Tensor) -> Tensor:
        mass = evaluate_per_time(self.coefficients, t)
        return (mass * (1.0 - self._components_at(zt))).sum(-1)

    def representative(self, zt: Tensor) -> Tensor:
        return self._representatives.on(zt.device)[zt]

    @cached_property
    def _representatives(self) -> Constant:
        """Representative of each state [S]: the first state with the same noise at all times.

        Two states have the same noise if every component gives them the same probability.
        """
        _, kind = self.components.T.unique(dim=0, return_inverse=True)
        states = torch.arange(len(kind))
        no_state = torch.full_like(kind, len(kind))
        first = no_state.scatter_reduce(0, kind, states, "amin")
        return Constant(first[kind])

    def _largest_arrivals(self, t: Tensor) -> Tensor:
        return self._component_rates(t).amax(0) @ self._components_on(t.device)

    def noise_table(self, states: Tensor, t: Tensor) -> Tensor:
        return self.coefficients(t) @ self._components_on(t.device)[:, states]

    def arrivals_table(self, states: Tensor, t: Tensor) -> Tensor:
        return self._component_rates(t) @ self._components_on(t.device)[:, states]

    def split_noise(self, log_p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mass = self.coefficients(t).to(log_p.dtype)
        components = self._components_on(log_p.device).to(log_p.dtype)
        num_tokens = self.vocabulary.num_tokens
        # One column stands for all tokens if their noise is equal, and broadcasts over them.
        width = 1 if self._is_even_on_tokens else num_tokens
        at_tokens = _weighted_sum(mass, components[:, :width])
        beyond = _weighted_sum(mass, components[:, num_tokens:])
        return at_tokens, beyond

    def _arrive_at(self, zt: Tensor, s: Tensor, t: Tensor) -> Tensor:
        mass = self._component_arrivals(s, t)
        return (mass * self._components_at(zt)).sum(-1)

    # ------------------------------------------------------------------ forward draws

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        stay = evaluate_per_time(self.alpha, t)
        mass = evaluate_per_time(self.coefficients, t)
        return self._redraw(x0, stay, mass, u)

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        stay = self._stay(s, t)
        mass = self._component_arrivals(s, t)
        return self._redraw(zs, stay, mass, u)

    def _redraw(self, ids: Tensor, stay: Tensor, mass: Tensor, u: Tensor) -> Tensor:
        """Keep each id with probability `stay` [r]; otherwise redraw it from a random component.

        `mass` [r,K] holds the unnormalized probabilities of the components, and u [r,2] the
        uniforms.
        """
        drawn = ids.clone()
        redrawn = find_rows(u[:, 0] >= stay)
        mass = mass[redrawn]
        uniform = u[redrawn, 1]
        cdf = mass.cumsum(-1) / mass.sum(-1, keepdim=True)
        component = draw_index(mass, uniform)
        upper = pick(cdf, component)
        previous = (component - 1).clamp(min=0)
        lower = torch.where(component > 0, pick(cdf, previous), 0.0)
        # Given the component, the relative position in its interval is uniform and independent.
        rest = (uniform - lower) / (upper - lower)
        # Rounding may reach 1, but uniforms are in [0,1).
        rest = rest.clamp(0.0, 1.0 - 2.0**-53)
        for k, dist in enumerate(self._components_on(ids.device)):
            rows = component == k
            states = Prior(dist.log()).draw(rest[rows])
            drawn[redrawn[rows]] = states
        return drawn


@final
class MixtureProcess(ComponentProcess):
    """Interpolating process with one noise distribution `target`: b_t = (1 - alpha_t) target.

    The marginal given the token x is q_t(.|x) = alpha_t delta_x + b_t. `target` is a distribution
    over the states. If alpha(1) = 0, it is also the prior. All probability on the mask gives masked
    diffusion, and 1/V on each of the V tokens gives uniform diffusion.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        schedule: Schedule,
        target: Tensor,
    ) -> None:
        self.schedule = schedule
        super().__init__(vocabulary, [target])
        self.target = self.components[0]
        self.closes_at_clean = schedule.closes_at_clean
        self.closes_at_prior = schedule.closes_at_prior

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.schedule.d_alpha(t)

    def coefficients(self, t: Tensor) -> Tensor:
        return self.schedule.one_minus_alpha(t).unsqueeze(-1)

    def d_coefficients(self, t: Tensor) -> Tensor:
        return -self.schedule.d_alpha(t).unsqueeze(-1)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        masked = FlatVocabulary(4)
        bare = FlatVocabulary(4, mask=False)
        uneven = torch.tensor([0.4, 0.3, 0.2, 0.1])
        return [
            cls(masked, LinearSchedule(), mask_distribution(masked)),
            cls(bare, LinearSchedule(), token_distribution(bare)),
            cls(bare, LinearSchedule(floor=0.01), uneven),
        ]


def mask_distribution(vocabulary: Vocabulary) -> Tensor:
    """Return the distribution over the states with all probability on the mask."""
    if vocabulary.mask_id is None:
        raise ArgumentError(
            f"mask_distribution: vocabulary must have a mask; {vocabulary} has none. Use "
            "FlatVocabulary(mask=True)."
        )
    zeros = torch.zeros(vocabulary.num_states, dtype=torch.float64)
    return zeros.index_fill(0, torch.tensor([vocabulary.mask_id]), 1.0)


def token_distribution(vocabulary: Vocabulary) -> Tensor:
    """Return the uniform distribution over the tokens, as probabilities [S] of all states."""
    num_tokens = vocabulary.num_tokens
    beyond = vocabulary.num_states - num_tokens
    even = torch.full((num_tokens,), 1.0 / num_tokens, dtype=torch.float64)
    return torch.nn.functional.pad(even, (0, beyond))


def _check_distribution(process: object, vocabulary: Vocabulary, dist: Tensor) -> Tensor:
    """Check the noise distribution `dist` [S], and return it normalized.

    Raises ArgumentError, with the class name of `process`, if `dist` is not a distribution over the
    states.
    """
    dist = dist.double()
    sums_to_one = torch.isclose(dist.sum(), dist.new_ones(()))
    is_valid = bool((dist >= 0).all()) and sums_to_one
    if dist.shape != (vocabulary.num_states,) or not is_valid:
        raise ArgumentError(
            f"{type(process).__name__}: the noise must be a distribution over the "
            f"{vocabulary.num_states} states, with no negative entry and sum 1; got shape "
            f"{tuple(dist.shape)}, smallest entry {float(dist.min()):.3g} and sum "
            f"{float(dist.sum()):.6g}."
        )
    return dist / dist.sum()


def _weighted_sum(mass: Tensor, dists: Tensor) -> Tensor:
    """Return the product mass [r,K] @ dists [K,n], summed term by term.

    A matrix product could be rounded to fewer digits on an accelerator (TF32).
    """
    total = mass[:, :1] * dists[:1]
    for k in range(1, len(dists)):
        total = total + mass[:, k : k + 1] * dists[k : k + 1]
    return total
