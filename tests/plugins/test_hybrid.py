"""Epsilon- and gamma-hybrid (masks and redrawn tokens): generators, exact steps, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_hybrid.losses import EverywhereCrossEntropy, MixedEntropies, Published
from ddiff_mdlm.process import MaskedDiffusion
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddiff import (
    ArgumentError,
    Backbone,
    Batch,
    ComponentProcess,
    Context,
    CounterRng,
    Denoiser,
    DenseDistribution,
    DiffusionObjective,
    ElboLoss,
    FlatTimes,
    FlatVocabulary,
    ForwardProcess,
    HierarchicalVocabulary,
    IdentityTime,
    LinearSchedule,
    Noisy,
    Score,
    TokenHead,
    TrainedPart,
    mask_distribution,
    token_distribution,
)
from ddiff.core.prediction import drop_own_evidence
from ddiff.testing import assert_laws, check_process
from ddiff.testing.probes import (
    INNER,
    ReachableRows,
    TableQuery,
    grid_of_uniforms,
    likelihoods,
    product,
    random_log_probs,
    times,
)
from ddiff.testing.process import check_parts

# Both sides are a few dozen float64 operations on numbers up to 1e4, compared relatively.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
WORDS = 4
GAMMAS = (0.01, 0.3, 0.9)


def gamma_hybrid(gamma: float = 0.3, **keys: Any) -> GammaHybrid:
    return GammaHybrid(FlatVocabulary(WORDS), gamma, **keys)


def epsilon_hybrid(epsilon: float = 0.3) -> EpsilonHybrid:
    return EpsilonHybrid(FlatVocabulary(WORDS), LinearSchedule(), epsilon)


def masked_diffusion() -> MaskedDiffusion:
    return MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=FlatVocabulary(WORDS))


def name_of(process: ForwardProcess) -> str:
    shown = {name: value for name, value in vars(process).items() if isinstance(value, float)}
    return ", ".join(
        [type(process).__name__, *(f"{name} {value:.3g}" for name, value in shown.items())]
    )


@pytest.mark.parametrize(
    "process", [*GammaHybrid.examples(), *EpsilonHybrid.examples()], ids=name_of
)
def test_gamma_and_epsilon_hybrids_pass_every_conformance_check(process: ForwardProcess) -> None:
    torch.set_num_threads(1)
    assert_laws([*check_process(process), *check_parts(process)])


# ---------------------------------------------------------------------- the generator of the paper


def generators() -> tuple[Tensor, Tensor]:
    """Return Q_absorb and Q_uniform [S,S]; entry [y,z] is the rate from y to z."""
    absorb = -torch.eye(WORDS + 1, dtype=torch.float64)
    absorb[:, WORDS] += 1.0
    uniform = torch.zeros_like(absorb)
    uniform[:WORDS, :WORDS] = 1.0 / WORDS - torch.eye(WORDS)
    return absorb, uniform


def noise_of(process: GammaHybrid, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (noise sigma_t of the paper, its derivative)."""
    if process.masking == 1.0:  # time = "masked": e^{-(1 - gamma) sigma} = 1 - t
        return -torch.log1p(-t) / (1.0 - process.gamma), 1.0 / (1.0 - t) / (1.0 - process.gamma)
    left = 1.0 - process.noise.floor
    return -torch.log1p(-left * t), left / (1.0 - left * t)


SETTINGS = [
    *({"gamma": gamma} for gamma in GAMMAS),
    {"gamma": 0.9, "time": "noise", "floor": 0.005},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_gamma_hybrid_rates_are_a_mixture_of_masking_and_uniform_rates(
    keys: dict[str, Any],
) -> None:
    """The generator is Q_t = sigma' [ (1 - gamma) Q_absorb + gamma Q_uniform ].

    sigma' is the derivative of the noise. An interpolating process with the same marginals has
    other rates and transitions.
    """
    process, t = gamma_hybrid(**keys), times(INNER)
    absorb, uniform = generators()
    mixed = (1.0 - process.gamma) * absorb + process.gamma * uniform
    _, speed = noise_of(process, t)
    torch.testing.assert_close(process.rates(t).dense(), speed[:, None, None] * mixed, **CLOSE)


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_gamma_hybrid_transitions_are_the_exponential_of_mixed_rates(keys: dict[str, Any]) -> None:
    process = gamma_hybrid(**keys)
    absorb, uniform = generators()
    mixed = (1.0 - process.gamma) * absorb + process.gamma * uniform
    s, t = product(times((0.0, 0.1, 0.5)), times((0.5, 0.8, 0.999)))
    grown = noise_of(process, t)[0] - noise_of(process, s)[0]
    expected = torch.matrix_exp(grown[:, None, None] * mixed)
    torch.testing.assert_close(process.transition(s, t).dense(), expected, rtol=0.0, atol=1e-13)
    assert (
        process.transition(s, t).dense()[:, WORDS, :WORDS] == 0
    ).all()  # nothing leaves the mask


class Twin(ComponentProcess):
    """Interpolating process with the marginals of the gamma-hybrid."""

    def __init__(self, original: GammaHybrid) -> None:
        self.original = original
        super().__init__(
            original.vocabulary,
            [token_distribution(original.vocabulary), mask_distribution(original.vocabulary)],
        )

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) ** (self.original.masking + self.original.redrawing)

    def coefficients(self, t: Tensor) -> Tensor:
        return torch.stack([(1.0 - t) - self.alpha(t), t], -1)


def test_gamma_hybrid_and_interpolating_process_have_equal_marginals() -> None:
    process = gamma_hybrid(0.3)
    twin, t = Twin(process), times(INNER)
    torch.testing.assert_close(likelihoods(process, t), likelihoods(twin, t), **CLOSE)
    assert (twin.rates(t).dense()[:, WORDS, :WORDS] > 0.1).all()  # the twin leaves the mask
    rows = ReachableRows(process, times(INNER))
    ours, its = (p.density(rows.dist, rows.x0, rows.zt, rows.t) for p in (process, twin))
    assert ((ours - its).abs() > 0.01 * its).double().mean() > 0.5  # and has another density


def test_gamma_hybrid_with_either_time_setting_has_equal_transitions_at_equal_noise() -> None:
    """At times of equal noise sigma, both settings have equal transitions and bounds.

    The integrand of the bound is compared per unit of sigma.
    """
    masked, rng = gamma_hybrid(0.4), gamma_hybrid(0.4, time="noise", floor=0.005)
    rows = ReachableRows(rng, times(INNER))
    there = -torch.expm1(
        -0.6 * noise_of(rng, rows.t)[0]
    )  # time of the process "masked" with equal sigma
    speed = noise_of(rng, rows.t)[1] / noise_of(masked, there)[1]
    asked = (rows.dist, rows.x0, rows.zt)
    torch.testing.assert_close(
        rng.density(*asked, rows.t), masked.density(*asked, there) * speed, **CLOSE
    )
    both = (
        masked.transition(0.5 * there, there),
        rng.transition(_earlier(rng, 0.5 * there), rows.t),
    )
    torch.testing.assert_close(*(kernel.dense() for kernel in both), **CLOSE)


def _earlier(process: GammaHybrid, masked: Tensor) -> Tensor:
    """Return the time at which a fraction `masked` of the tokens is masked, for time = "noise"."""
    return (1.0 - (1.0 - masked) ** (1.0 / (1.0 - process.gamma))) / (1.0 - process.noise.floor)


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "process", [gamma_hybrid(0.0), epsilon_hybrid(0.0)], ids=["gamma 0", "epsilon 0"]
)
def test_gamma_and_epsilon_hybrids_without_redraws_are_masked_diffusion(
    process: ForwardProcess,
) -> None:
    masked = masked_diffusion()
    rows, states = ReachableRows(masked, times(INNER)), torch.arange(WORDS + 1)
    asked = (rows.dist, rows.x0, rows.zt, rows.t)
    for formula in ("density", "decode_nll"):
        torch.testing.assert_close(
            getattr(process, formula)(*asked), getattr(masked, formula)(*asked), **CLOSE
        )
    for s in (0.0, 0.3):
        steps = [
            p.reverse_log_probs(rows.log_p, rows.zt, rows.t, s * rows.t).exp()
            for p in (process, masked)
        ]
        torch.testing.assert_close(*steps, **CLOSE)
    assert process.active(states).tolist() == masked.active(states).tolist()
    assert process.trained_part(states)[:WORDS].tolist() == [int(TrainedPart.NONE)] * WORDS
    assert (process.closes_at_clean, process.closes_at_prior, process.is_monotone) == (
        True,
        True,
        True,
    )
    assert process.prior.log_prob.exp().tolist() == masked.prior.log_prob.exp().tolist()


def test_epsilon_hybrid_redraws_tokens_only_at_time_0_and_then_masks_them() -> None:
    """For t > 0 the transitions are those of masked diffusion.

    The integrand of the bound is 0 at visible tokens; only the decoding term depends on their
    prediction.
    """
    process, masked = epsilon_hybrid(), masked_diffusion()
    s, t = product(times((0.0, 0.2, 0.5)), times((0.5, 0.9, 1.0)))
    torch.testing.assert_close(
        process.transition(s, t).dense(), masked.transition(s, t).dense(), **CLOSE
    )
    now, shuffled = times(INNER), 0.7 * torch.eye(WORDS, dtype=torch.float64) + 0.3 / WORDS
    expected = torch.cat(
        [(1.0 - now)[:, None, None] * shuffled, now[:, None, None].expand(-1, WORDS, 1)], -1
    )
    torch.testing.assert_close(likelihoods(process, now), expected, **CLOSE)
    rows = ReachableRows(process, now)
    density = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    assert (density[rows.zt < WORDS] == 0).all()
    assert (density[rows.zt == WORDS] > 0).all()
    # A mask hides the shuffled token: 1/t KL( shuffled x || shuffled p ).
    here = rows.zt == WORDS
    truth, dist = shuffled[rows.x0[here]], rows.log_p[here].exp() @ shuffled
    expected_density = (truth * (truth / dist).log()).sum(-1) / rows.t[here]
    torch.testing.assert_close(density[here], expected_density, **CLOSE)


# ---------------------------------------------------------------------- steps


def test_gamma_hybrid_reveals_equally_many_masks_for_any_prediction() -> None:
    """A step from t to s queries the network at 1 - s/t of the masks, and reveals all of these."""
    process, count = gamma_hybrid(0.3), 4096
    u = grid_of_uniforms(count, process.uniforms_per_step)
    zt, t, s = torch.full((count,), WORDS), times((0.8,)).expand(count), times((0.6,)).expand(count)
    for log_p in random_log_probs(WORDS):
        query = TableQuery(log_p.expand(count, -1), process.vocabulary)
        zs = process.step(query, zt, t, s, u)
        assert torch.equal((zs < WORDS).nonzero().squeeze(-1), query.queried.sort().values)
        assert len(query.queried) == pytest.approx(0.25 * count, abs=2)


def test_gamma_hybrid_step_queries_network_only_at_tokens_that_may_change() -> None:
    """A step from t to s queries the network at a known fraction of the visible tokens, here 0.3.

    The fraction is (1 - B_t/B_s)/(1 - B_t) (1 - (1 - B_s)/V), where V is the number of tokens and
    B_t the probability that a token is not redrawn by time t (1 - t for gamma = 0.5). The tolerance
    of 5 of 4096 rows allows for rounding of the grid of uniforms.
    """
    process, count = gamma_hybrid(0.5), 4096
    u = grid_of_uniforms(count, process.uniforms_per_step)
    zt, t, s = (
        torch.zeros(count, dtype=torch.long),
        times((0.5,)).expand(count),
        times((0.4,)).expand(count),
    )
    query = TableQuery(random_log_probs(WORDS, 1).expand(count, -1), process.vocabulary)
    process.step(query, zt, t, s, u)
    bound = (1.0 - 0.5 / 0.6) / 0.5 * (1.0 - 0.4 / WORDS)
    assert len(query.queried) == pytest.approx(bound * count, abs=5)


def test_gamma_hybrid_kernel_solve_gives_exact_score_ratios() -> None:
    """Solving with the transition kernel gives the exact ratios q_s(y)/q_t(z) from the score at t.

    The kernel from s to t is exp(D Q), where D = sigma_t - sigma_s. The published code instead
    mixes the results for Q_absorb and Q_uniform linearly, with an error of second order in D.
    """
    process = gamma_hybrid(0.5, time="noise", floor=0.005)
    absorb, uniform = generators()
    rows = ReachableRows(process, times(INNER))
    errors = []
    for step in (0.02, 0.01):
        s = rows.t - step
        marginal = process.log_marginal(rows.log_p, rows.t)
        at = marginal.gather(-1, rows.zt.unsqueeze(-1))
        score, expected = (marginal - at).exp(), (process.log_marginal(rows.log_p, s) - at).exp()
        torch.testing.assert_close(
            process.transition(s, rows.t).solve(score), expected, rtol=1e-9, atol=1e-9
        )
        grown = (noise_of(process, rows.t)[0] - noise_of(process, s)[0])[:, None, None]
        apart = [
            torch.einsum("ry,ryz->rz", score, torch.matrix_exp(-grown * q))
            for q in (absorb, uniform)
        ]
        early = rows.t < 0.6
        errors.append((0.5 * (apart[0] + apart[1]) - expected)[early].abs().max().item())
    assert errors[0] > 1e-3
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


def test_gamma_hybrid_makes_no_float64_tensor_of_vocabulary_width() -> None:
    """Evaluate bound terms, noise and event times for a float32 prediction of 3000 tokens.

    `step` and `decode` are not called, because draws from a distribution may use float64.
    """
    words, count = 3000, 6
    vocabulary = FlatVocabulary(words)
    process = GammaHybrid(vocabulary, 0.3)
    dist = DenseDistribution(
        torch.randn(count, words, generator=torch.Generator().manual_seed(0)).log_softmax(-1),
        vocabulary,
    )
    x0, zt, t = (
        torch.arange(count),
        torch.tensor([words, words, 2, 5, 4, 7]),
        times((0.2, 0.9)).repeat(3),
    )
    wide: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, Tensor)
                and out.dtype == torch.float64
                and out.dim() > 1
                and out.shape[-1] >= words
            ):
                wide.append(str(func))
            return out

    with Watch():
        for formula in (process.density, process.divergence, process.decode_nll):
            formula(dist, x0, zt, t)
        process.closing_kl(dist, x0, t)
        process.weight(x0, zt, t)
        process.sample(x0, t, torch.rand(count, 3, dtype=torch.float64))
        process.event_time(zt, t, torch.rand(count, dtype=torch.float64))
    assert wide == []
    got = process.density(dist, x0, zt, t)
    exact = DenseDistribution(dist.log_mass(0).double(), vocabulary)
    torch.testing.assert_close(
        got, ForwardProcess.density(process, exact, x0, zt, t), rtol=1e-4, atol=1e-6
    )


# ---------------------------------------------------------------------- published formulas


def coded_mixture(gamma: float, sigma: Tensor, log_s: Tensor, x0: Tensor, zt: Tensor) -> Tensor:
    """Return the loss in the code of the paper, per unit of the noise sigma.

    `log_s` are the logarithms of the predicted score s. The loss is (1 - gamma) L_absorb at masks
    and gamma L_uniform at tokens, where L_absorb and L_uniform are the score entropies of arXiv
    2310.16834: L_absorb = sum_y s(y) - ln s(x)/a + K(1/a), with a = e^sigma - 1 and
    K(r) = r (ln r - 1).
    """
    a, pick = torch.expm1(sigma), x0.unsqueeze(-1)
    entropy = lambda r: r * (r.log() - 1.0)  # noqa: E731
    words = log_s[:, :WORDS]
    at_x = words.gather(-1, pick).squeeze(-1)
    absorb = words.exp().sum(-1) - at_x / a + entropy(1.0 / a)
    rho = a / (WORDS + a)
    ratio = torch.where((zt == x0)[:, None], rho[:, None].expand(-1, WORDS), torch.ones_like(words))
    ratio = torch.where((zt != x0)[:, None], ratio.scatter(-1, pick, 1.0 / rho[:, None]), ratio)
    terms = words.exp() - ratio * words + entropy(ratio)
    here = torch.arange(WORDS) == zt.unsqueeze(-1)
    uniform = terms.masked_fill(here, 0.0).sum(-1) / WORDS
    return torch.where(zt == WORDS, (1.0 - gamma) * absorb, gamma * uniform)


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_gamma_hybrid_published_loss_equals_the_code_of_the_paper(keys: dict[str, Any]) -> None:
    process = gamma_hybrid(**keys)
    loss, rows = MixedEntropies(process), ReachableRows(process, times(INNER))
    sigma, speed = noise_of(process, rows.t)
    log_marginal = process.log_marginal(rows.log_p, rows.t)
    log_s = log_marginal - log_marginal.gather(-1, rows.zt.unsqueeze(-1))
    expected = speed * coded_mixture(process.gamma, sigma, log_s, rows.x0, rows.zt)
    asked = (rows.x0, rows.zt, rows.t)
    for prediction in (rows.dist, Score(log_s)):
        got = loss.weight(process, *asked) * loss.divergence(process, prediction, *asked)
        # At t = .97 and gamma = .9 e^sigma is 1e15, near the resolution of float64.
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_gamma_hybrid_loss_of_the_paper_code_is_not_the_bound() -> None:
    """The loss is not proportional to the integrand of the bound.

    At a wrong token, the loss of a uniform prediction is 90 times smaller than the integrand. At a
    mask, the loss of the exact prediction is positive, but the integrand is 0.
    """
    process = GammaHybrid(FlatVocabulary(6), 0.05, "noise", 0.005)
    loss, even = MixedEntropies(process), torch.full((1, 6), 1.0 / 6.0, dtype=torch.float64).log()
    asked = (
        DenseDistribution(even, process.vocabulary),
        torch.tensor([0]),
        torch.tensor([1]),
        times((0.5,)),
    )
    ratio = (
        loss.weight(process, *asked[1:])
        * loss.divergence(process, *asked)
        / process.density(*asked)
    )
    assert 1.0 / ratio.item() == pytest.approx(90.0, rel=0.05)
    x0, mask, t = torch.zeros(1, dtype=torch.long), torch.full((1,), 6), times((0.5,))
    sure = DenseDistribution(
        torch.tensor([[0.0] + [-torch.inf] * 5], dtype=torch.float64), process.vocabulary
    )
    assert process.density(sure, x0, mask, t).item() == pytest.approx(0.0, abs=1e-12)
    assert loss.divergence(process, sure, x0, mask, t).item() > 1e-4


@pytest.mark.parametrize("weights", ["flat", "annealing"])
@pytest.mark.parametrize("lam", [1.0, 0.1])
def test_epsilon_hybrid_loss_weights_equal_those_in_the_code_of_the_paper(
    weights: Any, lam: float
) -> None:
    """Compare the weights of the published loss with a formula.

    The weight is 1/t at masks, lam (1 - epsilon) at redrawn tokens and lam epsilon at other visible
    tokens, where epsilon is the probability of a redraw and lam a setting. An unchanged token may
    have been redrawn as itself, so its weight is the mean over both cases. With weights = "flat",
    the weights of visible tokens are divided by 1 - t.
    """
    process, loss, t = epsilon_hybrid(), EverywhereCrossEntropy(lam, weights), times(INNER)
    x0 = torch.zeros(len(t), dtype=torch.long)
    share = 1.0 - t if weights == "flat" else torch.ones_like(t)
    at = lambda state: loss.weight(process, x0, torch.full_like(x0, state), t)  # noqa: E731
    torch.testing.assert_close(at(WORDS), 1.0 / t, **CLOSE)
    torch.testing.assert_close(at(1), lam * 0.7 / share, **CLOSE)
    onto_itself, untouched = 0.3 / WORDS, 0.7
    mean = (onto_itself * 0.7 + untouched * 0.3) / (onto_itself + untouched)
    torch.testing.assert_close(at(0), lam * mean / share, **CLOSE)
    torch.testing.assert_close(
        loss.weight(process, x0[:1], x0[:1] + WORDS, times((0.0,))), times((1e4,))
    )


def test_epsilon_hybrid_published_loss_is_full_conditional_cross_entropy() -> None:
    """The loss of a network that predicts P(x | z) is its cross-entropy -ln P(x | z)."""
    process, loss = epsilon_hybrid(), EverywhereCrossEntropy()
    rows = ReachableRows(process, times(INNER))
    rest = drop_own_evidence(rows.log_p, process.log_likelihood(rows.zt, rows.t))
    got = loss.divergence(
        process, DenseDistribution(rest, process.vocabulary), rows.x0, rows.zt, rows.t
    )
    plain = -rows.log_p.gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, plain, **CLOSE)


@pytest.mark.parametrize(
    ("epsilon", "lam", "everything"), [(0.3, 1.0, True), (0.0, 1.0, False), (0.3, 0.0, False)]
)
def test_epsilon_hybrid_published_loss_skips_tokens_of_weight_zero(
    epsilon: float, lam: float, everything: bool
) -> None:
    process = epsilon_hybrid(epsilon)
    zt, clean = torch.tensor([[0, WORDS, 1, WORDS]]), torch.tensor([[False, False, True, False]])
    t = torch.full((1, 4), 0.5, dtype=torch.float64)
    speed = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    timed = FlatTimes().at(IdentityTime(), t[:, 0], 4)._replace(speed=speed, clean=clean)
    reads = EverywhereCrossEntropy(lam).select_rows(process, Noisy(zt, t, clean), timed)
    assert reads.tolist() == [[everything, True, False, False]]


# ---------------------------------------------------------------------- training


class Unigram(Backbone):
    """Backbone whose hidden state at a position depends only on the state of this position."""

    width = 8
    reads_time = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(WORDS + 1, self.width)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return self.embedding(ids)


def trained_on(
    process: ForwardProcess,
    loss: Any,
    given: Any = "rest",
    window: tuple[float, float] = (1e-3, 1.0),
) -> tuple[Any, Denoiser]:
    """Evaluate a training loss on 64 x 8 uniform tokens, and run backward.

    `given` is the parameterization of the denoiser, and `window` the range of noise times. Returns
    the terms of the objective and the denoiser with gradients.
    """
    denoiser = Denoiser(
        Unigram(), TokenHead(process.vocabulary, Unigram.width), parameterization=given
    ).double()
    with torch.no_grad():
        for parameter in denoiser.head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.randint(WORDS, (64, 8), generator=torch.Generator().manual_seed(2))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, everywhere, everywhere, torch.zeros_like(ids), torch.arange(64), False, {})
    objective = DiffusionObjective(process, denoiser, loss, FlatTimes(*window))
    terms = objective(batch, CounterRng(0, 0, batch.index, 8), objective.counts(batch), 64)
    terms.loss.backward()
    return terms, denoiser


def visible_gradient(denoiser: Denoiser) -> float:
    return denoiser.backbone.embedding.weight.grad[:WORDS].abs().max().item()


def test_epsilon_hybrid_loss_elbo_trains_the_decoding_term() -> None:
    """With the bound as loss, only the decoding term trains the prediction at visible tokens."""
    terms, denoiser = trained_on(epsilon_hybrid(), ElboLoss())
    assert visible_gradient(denoiser) > 0
    assert not any("published" in name for name in terms.metrics)
    _, closed = trained_on(epsilon_hybrid(0.0), ElboLoss())
    assert visible_gradient(closed) == 0


@pytest.mark.parametrize("given", ["rest", "all"])
@pytest.mark.parametrize("process", [epsilon_hybrid(), gamma_hybrid()], ids=["epsilon", "gamma"])
def test_published_hybrid_losses_are_logged_in_addition_to_the_bound(
    process: ForwardProcess, given: Any
) -> None:
    loss = Published.build(Published.Config(), process=process)
    terms, denoiser = trained_on(process, loss, given)
    total, count = terms.metrics["loss_published_nats_per_token"]
    assert (total / count).item() == pytest.approx(terms.loss.item())
    bound, tokens = terms.metrics["nelbo_diffusion_nats_per_token"]
    assert (bound / tokens).item() != pytest.approx(terms.loss.item(), rel=1e-3)
    assert visible_gradient(denoiser) > 0
    assert all(parameter.grad.isfinite().all() for parameter in denoiser.parameters())


def test_epsilon_hybrid_published_loss_scales_with_time_window_width() -> None:
    """A time window ten times as wide has ten times the loss, also at visible tokens.

    The times of both windows differ by at most 1e-3, so that few of the 512 states differ.
    """
    losses = [
        trained_on(epsilon_hybrid(), EverywhereCrossEntropy(), "rest", (0.4, 0.4 + h))[0].loss
        for h in (1e-3, 1e-4)
    ]
    assert (losses[0] / losses[1]).item() == pytest.approx(10.0, rel=0.05)


# ---------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    "keys", [{"gamma": 0.96}, {"gamma": -0.1}, {"time": "log"}, {"floor": 0.1}, {"floor": 1.0}]
)
def test_gamma_hybrid_settings_out_of_range_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        GammaHybrid.Config(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"epsilon": 1.0},
        {"epsilon": -0.1},
        {"power": 2.0},
        {"schedule": "power"},
        {"power": 0.05, "schedule": "power"},
        {"power": 1e4, "schedule": "power"},
    ],
)
def test_epsilon_hybrid_settings_out_of_range_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        EpsilonHybrid.Config(**keys)


def test_gamma_hybrid_refuses_masking_too_slow_for_float64() -> None:
    with pytest.raises(
        ArgumentError, match=r'gamma must be at most 0\.7; got 0\.9\d*\..*time = "masked"'
    ):
        gamma_hybrid(0.9, time="noise")


@pytest.mark.parametrize(
    "vocabulary", [FlatVocabulary(4, mask=False), HierarchicalVocabulary([[0, 1, 0, 1]])]
)
@pytest.mark.parametrize("kind", [EpsilonHybrid, GammaHybrid])
def test_hybrids_refuse_a_vocabulary_without_mask_or_with_clusters(
    kind: Any, vocabulary: FlatVocabulary
) -> None:
    with pytest.raises(
        ArgumentError, match=r'"hybrid_\w+" needs a vocabulary of tokens and a mask.*kind = "flat"'
    ):
        kind.build(kind.Config(), vocabulary=vocabulary)


def test_published_loss_refuses_other_processes_and_unused_keys() -> None:
    with pytest.raises(ArgumentError, match=r"hybrid_epsilon or hybrid_gamma; got MaskedDiffusion"):
        Published.build(Published.Config(), process=masked_diffusion())
    with pytest.raises(
        ArgumentError, match=r"takes lam and weights only with the process hybrid_epsilon"
    ):
        Published.build(Published.Config(lam=1.0), process=gamma_hybrid())


def test_gamma_hybrid_kernel_solve_refuses_a_singular_matrix() -> None:
    process, vector = gamma_hybrid(), torch.ones(1, WORDS + 1, dtype=torch.float64)
    assert process.transition(times((0.2,)), times((0.9,))).solve(vector).isfinite().all()
    for kernel in (process.transition(times((0.2,)), times((1.0,))), process.rates(times((0.5,)))):
        with pytest.raises(ArgumentError, match="invertible in every row"):
            kernel.solve(vector)


def test_gamma_hybrid_decoding_term_has_finite_gradient_at_zero_scores() -> None:
    """At t = 1 every state is the mask, so the exact score of all tokens is 0."""
    log_ratio = torch.full((1, WORDS + 1), -torch.inf, dtype=torch.float64)
    log_ratio[0, WORDS] = 0.0
    log_ratio.requires_grad_()
    mask = torch.tensor([WORDS])
    nll = gamma_hybrid().decode_nll(
        Score(log_ratio), torch.tensor([2]), mask, torch.ones(1, dtype=torch.float64)
    )
    assert nll.item() == pytest.approx(torch.tensor(float(WORDS)).log().item())
    (gradient,) = torch.autograd.grad(nll.sum(), log_ratio)
    assert gradient.isfinite().all()
