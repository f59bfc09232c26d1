"""Sample of two masked tokens and one Gaussian number, with exact predictions and expectations.

The tokens x = (x_1, x_2) are bits with joint probabilities `PROBABILITY`. Given x, the number z is
normal with mean `MEAN[x]` and deviation `SPREAD`. The entropy of (x, z) is known, and so is every
prediction given noisy tokens and a noisy number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.field import Field, Fields, JointTimes
from ddiff.core.fields import JointNoisy, joint_nelbo, joint_network_from_functions
from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.information import TimeChange
from ddiff.core.paths import Leg, Path, shared_path
from ddiff.core.prediction import DenseDistribution
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, Times
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary

BITS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
PROBABILITY = torch.tensor([0.4, 0.15, 0.1, 0.35], dtype=torch.float64)
MEAN = torch.tensor([-1.2, 0.3, 0.8, 1.1], dtype=torch.float64)
SPREAD = 0.6
LOG_SNR = 30.0  # at t = 0, and minus at t = 1: the ends then add less than 1e-12 nats
ENTROPY = float(-(PROBABILITY * PROBABILITY.log()).sum()) + 0.5 * math.log(
    2.0 * math.pi * math.e * SPREAD**2
)

Terms = dict[str, dict[str, float]]
"""Name of a field -> name of a term -> nats."""

VOCABULARY = FlatVocabulary(2)
MASK = 2


class LogSnrTimes:
    """Time rule of the number: log SNR falls linearly with the progress, for cosine noise.

    The integrand is then smooth, so few quadrature nodes are accurate.
    """

    tokens = 1
    has_one_time = True

    def __init__(self, process: GaussianProcess, start: float = 0.0, stop: float = 1.0) -> None:
        self.process = process
        self.start = start
        self.stop = stop

    def with_window(self, start: float, stop: float, tokens: int = 16) -> LogSnrTimes:
        return LogSnrTimes(self.process, start, stop)

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
        last = self.process.smallest_log_snr
        share = self.start + (self.stop - self.start) * tau
        log_snr = LOG_SNR + (last - LOG_SNR) * share
        time = torch.atan(torch.exp(-log_snr / 2.0)) * (2.0 / math.pi)
        # d log SNR / d time = -2 pi / sin(pi time)
        change = (LOG_SNR - last) * (self.stop - self.start)
        slope = change * torch.sin(math.pi * time) / (2.0 * math.pi)
        span = self.process.schedule_time(torch.tensor([0.0, 1.0], dtype=torch.float64))
        width = float(span[1] - span[0])
        t = ((time - float(span[0])) / width).clamp(0.0, 1.0).unsqueeze(-1)
        speed = (slope / width).unsqueeze(-1)
        return Times(t, speed, torch.zeros_like(t, dtype=torch.bool))

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        ones = torch.ones(len(slot), length, dtype=torch.float64)
        nowhere = torch.zeros_like(ones, dtype=torch.bool)
        tau = torch.tensor([0.0, 1.0], dtype=torch.float64)
        first, last = self.at(clock, tau, length).t
        return Times(first * ones, ones, nowhere), Times(last * ones, ones, nowhere)


class EnumeratedTokens(TreeProcess):
    """Masked process whose draws are the states that the uniforms encode."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return (u[:, 0] * 3).long()


class NodeRng(CounterRng):
    """Generator whose uniforms encode given states of each field, the same in every channel."""

    def __init__(self, numbers: Mapping[str, Tensor], name: str = "", length: int = 1) -> None:
        index = torch.arange(len(next(iter(numbers.values()))))
        super().__init__(0, 0, index, length)
        self.numbers = numbers
        self.name = name

    def derive(self, purpose: str, length: int) -> NodeRng:
        return NodeRng(self.numbers, purpose.rpartition("/")[2], length)

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        return self.numbers[self.name]


def make_fields(smallest_log_snr: float = -LOG_SNR) -> Fields:
    number = GaussianProcess(CosineVP(), 1, LOG_SNR, smallest_log_snr)
    tokens = EnumeratedTokens(VOCABULARY, LogTimeClock((1.0,)))
    return {
        "text": Field(tokens, FlatTimes(), 2),
        "latent": Field(number, LogSnrTimes(number), 1),
    }


def exact_network(fields: Fields):
    """Return the joint network that predicts the exact conditional distributions."""
    process = fields["latent"].process

    def log_weights(state: JointNoisy, hidden: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln p(x, states) [B,4] without token `hidden`, and a, sigma of the number [B]."""
        latent = state["latent"]
        is_clean = latent.clean[:, 0]
        a = torch.where(is_clean, 1.0, process.signal(latent.t[:, 0]))
        sigma = torch.where(is_clean, 0.0, process.deviation(latent.t[:, 0]))
        z = latent.zt[:, 0, 0].unsqueeze(-1)
        variance = (a**2 * SPREAD**2 + sigma**2).unsqueeze(-1)
        log_w = PROBABILITY.log() - 0.5 * (z - a.unsqueeze(-1) * MEAN) ** 2 / variance
        tokens = state["text"].zt
        for position in range(2):
            if position == hidden:
                continue
            seen = tokens[:, position].unsqueeze(-1)
            possible = (seen == MASK) | (seen == BITS[:, position])
            log_w = log_w.masked_fill(~possible, -torch.inf)
        return log_w, a, sigma

    def text(state: JointNoisy):
        log_p = []
        for position in range(2):
            log_w, _, _ = log_weights(state, position)
            both = [log_w[:, BITS[:, position] == bit].logsumexp(-1) for bit in (0, 1)]
            log_p.append(torch.stack(both, -1).log_softmax(-1))
        flat = torch.stack(log_p, 1).flatten(0, 1)
        return lambda rows: DenseDistribution(flat[rows], VOCABULARY)

    def latent(state: JointNoisy):
        log_w, a, sigma = log_weights(state, None)
        z = state["latent"].zt[:, 0, 0]
        gain = a * SPREAD**2 / (a**2 * SPREAD**2 + sigma**2)
        means = MEAN + gain.unsqueeze(-1) * (z.unsqueeze(-1) - a.unsqueeze(-1) * MEAN)
        # States of probability 0 have no finite weight; their terms are not counted.
        mean = (log_w.softmax(-1).nan_to_num() * means).sum(-1, keepdim=True)
        return lambda rows: PredictedMean(mean[rows])

    return joint_network_from_functions({"text": text, "latent": latent})


class NodePath:
    """Path at given values of tau [B] with weights [B], in place of random draws."""

    def __init__(self, path: Path, tau: Tensor) -> None:
        self.path = path
        self.tau = tau
        self.legs = path.legs

    def draws(self, fields, rng, slot, slots) -> list[JointTimes]:
        return [self.path.at(fields, self.tau)]

    def at(self, fields, tau) -> JointTimes:
        return self.path.at(fields, tau)

    def ends(self, fields, name, rng, slot, slots):
        return self.path.ends(fields, name, rng, slot, slots)


class IndependentNodes:
    """Pairs of independent tau of the two fields, numbered by 0, 1, 2, ... in place of tau.

    This is a rule of training and not a path: it shows that its terms are no bound.
    """

    def __init__(self, text: Tensor, latent: Tensor) -> None:
        self.tau = {"text": text, "latent": latent}
        self.path = shared_path(["text", "latent"])
        self.legs = self.path.legs

    def at(self, fields: Fields, tau: Tensor) -> JointTimes:
        number = tau.long()
        times = {}
        for name, field in fields.items():
            clock = field.process.information_time
            times[name] = field.rule.at(clock, self.tau[name][number], field.positions)
        return times

    def ends(self, fields, name, rng, slot, slots):
        return self.path.ends(fields, name, rng, slot, slots)


def tau_nodes(panels: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre nodes and weights on equal panels of [0,1]."""
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    left = torch.arange(panels, dtype=torch.float64).unsqueeze(-1)
    tau = ((left + (x + 1.0) / 2.0) / panels).reshape(-1)
    return tau, (w / 2.0 / panels).repeat(panels)


def expected_bound(path: Path, panels: int = 24, nodes: int = 8, hermite: int = 24) -> Terms:
    """Return the exact expectation of every term of the bound along a path, in nats, by field.

    `panels` panels of `nodes` Gauss-Legendre nodes in tau, and `hermite` Gauss-Hermite nodes for
    the number and for its noise.
    """
    tau, weight = tau_nodes(panels, nodes)
    return expected_terms(path, tau, weight, hermite)


def expected_terms_at_independent_times(panels: int = 24, nodes: int = 6) -> Terms:
    """Return the expectation of the same terms if the fields have independent times.

    In the time of the text all terms are polynomials of degree 2 at most, so two nodes are exact.
    """
    text, text_weight = tau_nodes(1, 2)
    latent, latent_weight = tau_nodes(panels, nodes)
    i, j = torch.cartesian_prod(torch.arange(len(text)), torch.arange(len(latent))).T
    number = torch.arange(len(i), dtype=torch.float64)
    path = IndependentNodes(text[i], latent[j])
    return expected_terms(path, number, text_weight[i] * latent_weight[j], 24)


def expected_terms(
    path: Path,
    tau: Tensor,
    tau_weight: Tensor,
    hermite: int,
    fields: Fields | None = None,
    spread: float = SPREAD,
) -> Terms:
    """Return the expectation of every term at the values tau of a path, with given weights.

    The number of a sample has the deviation `spread` around its mean. The predictions are those for
    the deviation `SPREAD`.
    """
    fields = fields or make_fields()
    h, hw = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(hermite))
    # Nodes beyond 7 deviations have no weight, and their uniforms would round to 1.
    h, hw = h[h.abs() < 7.0], hw[h.abs() < 7.0]
    hw = hw / hw.sum()
    # A number without spread needs one node.
    d, dw = (h, hw) if spread > 0 else (torch.zeros(1).double(), torch.ones(1).double())
    grid = torch.meshgrid(
        torch.arange(len(tau)),
        torch.arange(4),
        torch.arange(9),
        torch.arange(len(d)),
        torch.arange(len(h)),
        indexing="ij",
    )
    k, c, m, i, j = (axis.reshape(-1) for axis in grid)
    states = torch.stack([m // 3, m % 3], -1)
    bits = BITS[c]
    possible = ((states == MASK) | (states == bits)).all(-1)
    k, c, i, j, states, bits = (axis[possible] for axis in (k, c, i, j, states, bits))
    number = MEAN[c] + spread * d[i]
    x0 = {"text": bits, "latent": number.reshape(-1, 1, 1)}
    uniforms = {
        "text": (states.double() + 0.5) / 3.0,
        "latent": torch.special.ndtr(h[j]).reshape(-1, 1),
    }
    scored = {"text": torch.ones_like(bits, dtype=torch.bool)}
    scored["latent"] = scored["text"][:, :1]
    node_path = NodePath(path, tau[k])
    slot = torch.zeros_like(k)
    terms = joint_nelbo(
        fields, exact_network(fields), x0, scored, node_path, NodeRng(uniforms), slot, 1
    )
    # Probability of the data and of the noise of the number.
    base = PROBABILITY[c] * dw[i] * hw[j]
    times = path.at(fields, tau[k])["text"]
    found = {}
    for name in terms:
        if not isinstance(path.legs[name], Leg):
            found[name] = {"diffusion": 0.0, "decoding": 0.0, "closing": 0.0}
            continue
        first, last = path.ends(fields, name, NodeRng(uniforms), slot, 1)
        even = 1.0 / len(tau)
        found[name] = {
            "diffusion": _mean(terms[name].diffusion, base * tau_weight[k], states, bits, times),
            "decoding": _mean(terms[name].decoding, base * even, states, bits, first["text"]),
            "closing": _mean(terms[name].closing, base * even, states, bits, last["text"]),
        }
    return found


def _mean(values: Tensor, weight: Tensor, states: Tensor, bits: Tensor, times: Times) -> float:
    """Return the mean of values [B,n] over rows, with the probabilities of the tokens' states."""
    masked = times.t.clone()
    if times.at_prior is not None:
        masked = torch.where(times.at_prior, 1.0, masked)
    masked = torch.where(times.clean, 0.0, masked)
    chance = torch.where(states == MASK, masked, 1.0 - masked).prod(-1)
    used = chance > 0
    return float((values[used].sum(-1) * weight[used] * chance[used]).sum())
