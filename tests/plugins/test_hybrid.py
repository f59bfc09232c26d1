"""Masks and uniform noise together, by evolution and by rates: the paper's generators, exact steps, what was published."""

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
def test_every_setting_obeys_every_law(process: ForwardProcess) -> None:
    torch.set_num_threads(1)
    assert_laws([*check_process(process), *check_parts(process)])


# ---------------------------------------------------------------------- the generator of the paper


def generators() -> tuple[Tensor, Tensor]:
    """Q_absorb and Q_uniform [S,S], rates from row to column."""
    absorb = -torch.eye(WORDS + 1, dtype=torch.float64)
    absorb[:, WORDS] += 1.0
    uniform = torch.zeros_like(absorb)
    uniform[:WORDS, :WORDS] = 1.0 / WORDS - torch.eye(WORDS)
    return absorb, uniform


def noise_of(process: GammaHybrid, t: Tensor) -> tuple[Tensor, Tensor]:
    """sigma and its derivative."""
    if process.masking == 1.0:  # of time "masked", where e^{-(1 - gamma) sigma} = 1 - t
        return -torch.log1p(-t) / (1.0 - process.gamma), 1.0 / (1.0 - t) / (1.0 - process.gamma)
    left = 1.0 - process.noise.floor
    return -torch.log1p(-left * t), left / (1.0 - left * t)


SETTINGS = [
    *({"gamma": gamma} for gamma in GAMMAS),
    {"gamma": 0.9, "time": "noise", "floor": 0.005},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_rates_are_the_mixture_of_both_generators(keys: dict[str, Any]) -> None:
    """The marginals are those of an interpolating process, so this and the next are what tells it from one."""
    process, t = gamma_hybrid(**keys), times(INNER)
    absorb, uniform = generators()
    mixed = (1.0 - process.gamma) * absorb + process.gamma * uniform
    _, speed = noise_of(process, t)
    torch.testing.assert_close(process.rates(t).dense(), speed[:, None, None] * mixed, **CLOSE)


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_transitions_are_the_exponential_of_the_mixture(keys: dict[str, Any]) -> None:
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
    """The interpolating process with the marginals of the gamma-hybrid."""

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


def test_marginals_do_not_tell_it_from_an_interpolating_process() -> None:
    process = gamma_hybrid(0.3)
    twin, t = Twin(process), times(INNER)
    torch.testing.assert_close(likelihoods(process, t), likelihoods(twin, t), **CLOSE)
    assert (twin.rates(t).dense()[:, WORDS, :WORDS] > 0.1).all()  # the twin leaves the mask
    rows = ReachableRows(process, times(INNER))
    ours, its = (p.density(rows.dist, rows.x0, rows.zt, rows.t) for p in (process, twin))
    assert ((ours - its).abs() > 0.01 * its).double().mean() > 0.5  # and is charged otherwise


def test_both_clocks_read_one_chain() -> None:
    """Where the clocks show the same noise, transitions are the same and densities differ by the speed of the clocks."""
    masked, rng = gamma_hybrid(0.4), gamma_hybrid(0.4, time="noise", floor=0.005)
    rows = ReachableRows(rng, times(INNER))
    there = -torch.expm1(-0.6 * noise_of(rng, rows.t)[0])  # t of the other clock: 1 - A
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
    """t of the clock "noise" at which a share `masked` is masked."""
    return (1.0 - (1.0 - masked) ** (1.0 / (1.0 - process.gamma))) / (1.0 - process.noise.floor)


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "process", [gamma_hybrid(0.0), epsilon_hybrid(0.0)], ids=["gamma 0", "epsilon 0"]
)
def test_without_redrawing_both_are_masked_diffusion(process: ForwardProcess) -> None:
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


def test_the_epsilon_hybrid_is_an_instant_of_shuffling_and_then_masks() -> None:
    """Its transitions only mask, and nothing is charged at words but the last draw."""
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
    # a mask hides the shuffled word: 1/t KL( shuffled x || shuffled p )
    here = rows.zt == WORDS
    truth, dist = shuffled[rows.x0[here]], rows.log_p[here].exp() @ shuffled
    expected_density = (truth * (truth / dist).log()).sum(-1) / rows.t[here]
    torch.testing.assert_close(density[here], expected_density, **CLOSE)


# ---------------------------------------------------------------------- steps


def test_masks_are_revealed_whatever_the_network_says() -> None:
    """A share 1 - (1 - A_s)/(1 - A_t) = 1 - s/t of the masks is asked about, and each of those is revealed."""
    process, count = gamma_hybrid(0.3), 4096
    u = grid_of_uniforms(count, process.uniforms_per_step)
    zt, t, s = torch.full((count,), WORDS), times((0.8,)).expand(count), times((0.6,)).expand(count)
    for log_p in random_log_probs(WORDS):
        query = TableQuery(log_p.expand(count, -1), process.vocabulary)
        zs = process.step(query, zt, t, s, u)
        assert torch.equal((zs < WORDS).nonzero().squeeze(-1), query.queried.sort().values)
        assert len(query.queried) == pytest.approx(0.25 * count, abs=2)


def test_few_words_are_shown_to_the_network() -> None:
    """Of words at most 1 - B_ts over 1 - B_t times all others: here a fifth, where the dense step shows all."""
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


def test_a_score_is_taken_back_in_time_exactly() -> None:
    """The staggered score r e^{-D Q} is q_s/q_t(z); mixed linearly, as published, it is not, by the square of the step."""
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


def test_nothing_as_wide_as_the_vocabulary_is_float64() -> None:
    """With a float32 law of 3000 words: bound, ends, noise and events; only a draw sums its own row in float64."""
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


# ---------------------------------------------------------------------- what was published


def coded_mixture(gamma: float, sigma: Tensor, log_s: Tensor, x0: Tensor, zt: Tensor) -> Tensor:
    """The paper's loss per unit of sigma: (1 - gamma) L_absorb at masks, gamma L_uniform at words, both at all of sigma.

    arXiv 2310.16834: K(r) = r (ln r - 1); a = e^sigma - 1, L_absorb = sum s - ln s(x)/a + K(1/a).
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
def test_the_published_gamma_loss_is_the_coded_mixture(keys: dict[str, Any]) -> None:
    process = gamma_hybrid(**keys)
    loss, rows = MixedEntropies(process), ReachableRows(process, times(INNER))
    sigma, speed = noise_of(process, rows.t)
    log_marginal = process.log_marginal(rows.log_p, rows.t)
    log_s = log_marginal - log_marginal.gather(-1, rows.zt.unsqueeze(-1))
    expected = speed * coded_mixture(process.gamma, sigma, log_s, rows.x0, rows.zt)
    asked = (rows.x0, rows.zt, rows.t)
    for prediction in (rows.dist, Score(log_s)):
        got = loss.weight(process, *asked) * loss.divergence(process, prediction, *asked)
        # at t = .97 and gamma = .9 e^sigma is 1e15: what differs by one part of it is lost in either form
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_the_published_gamma_loss_is_not_the_bound() -> None:
    """To an even law wrong words are charged some ninety times too little; at masks the truth itself is charged."""
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
def test_the_published_epsilon_weights_are_the_coded_ones(weights: Any, lam: float) -> None:
    """1/p at masks; lam (1 - e) at shuffled words and lam e at the others, over 1 - p if flat. On average over who was
    shuffled, which is not seen where a word was drawn onto itself."""
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


def test_the_published_epsilon_loss_is_cross_entropy_of_the_full_conditional() -> None:
    """-ln P(x | z): of a network that gives it (given = "all") it is plain cross-entropy against the clean word."""
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
def test_visible_words_are_read_if_they_count(epsilon: float, lam: float, everything: bool) -> None:
    process = epsilon_hybrid(epsilon)
    zt, clean = torch.tensor([[0, WORDS, 1, WORDS]]), torch.tensor([[False, False, True, False]])
    t = torch.full((1, 4), 0.5, dtype=torch.float64)
    speed = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    timed = FlatTimes().at(IdentityTime(), t[:, 0], 4)._replace(speed=speed, clean=clean)
    reads = EverywhereCrossEntropy(lam).select_rows(process, Noisy(zt, t, clean), timed)
    assert reads.tolist() == [[everything, True, False, False]]


# ---------------------------------------------------------------------- training


class Unigram(torch.nn.Module):
    """A backbone that sees the position's own state."""

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
    """The objective's terms on a batch of 64 x 8 even words, and the denoiser with the gradients they leave."""
    denoiser = Denoiser(
        Unigram(), TokenHead(process.vocabulary, Unigram.width), given=given
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


def test_the_elbo_of_the_epsilon_hybrid_trains_its_last_draw() -> None:
    """Nothing else reaches what a network says at visible words."""
    terms, denoiser = trained_on(epsilon_hybrid(), ElboLoss())
    assert visible_gradient(denoiser) > 0
    assert not any("published" in name for name in terms.metrics)
    _, closed = trained_on(epsilon_hybrid(0.0), ElboLoss())
    assert visible_gradient(closed) == 0


@pytest.mark.parametrize("given", ["rest", "all"])
@pytest.mark.parametrize("process", [epsilon_hybrid(), gamma_hybrid()], ids=["epsilon", "gamma"])
def test_published_losses_are_logged_by_their_name_and_the_bound_by_its_own(
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


def test_rows_that_the_bound_does_not_charge_count_with_their_own_speed() -> None:
    """A window of times ten times as wide stands for ten times as much, visible words included; its times are the same to
    1e-3, and few rows of 512 differ for it."""
    losses = [
        trained_on(epsilon_hybrid(), EverywhereCrossEntropy(), "rest", (0.4, 0.4 + h))[0].loss
        for h in (1e-3, 1e-4)
    ]
    assert (losses[0] / losses[1]).item() == pytest.approx(10.0, rel=0.05)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "keys", [{"gamma": 0.96}, {"gamma": -0.1}, {"time": "log"}, {"floor": 0.1}, {"floor": 1.0}]
)
def test_gamma_settings_out_of_range_are_refused(keys: dict[str, Any]) -> None:
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
def test_epsilon_settings_out_of_range_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        EpsilonHybrid.Config(**keys)


def test_masks_that_come_too_slowly_for_float64_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"masked at 1 - gamma = 0\.1/\(1 - t\).*time = masked"):
        gamma_hybrid(0.9, time="noise")


@pytest.mark.parametrize(
    "vocabulary", [FlatVocabulary(4, mask=False), HierarchicalVocabulary([[0, 1, 0, 1]])]
)
@pytest.mark.parametrize("kind", [EpsilonHybrid, GammaHybrid])
def test_a_vocabulary_that_does_not_fit_is_refused(kind: Any, vocabulary: FlatVocabulary) -> None:
    with pytest.raises(ArgumentError, match=r'hybrid_\w+ needs tokens and a mask.*kind = "flat"'):
        kind.build(kind.Config(), vocabulary=vocabulary)


def test_the_published_loss_says_whose_it_is() -> None:
    with pytest.raises(ArgumentError, match=r"hybrid_epsilon or hybrid_gamma; got MaskedDiffusion"):
        Published.build(Published.Config(), process=masked_diffusion())
    with pytest.raises(
        ArgumentError, match=r"lam and weights belong to the process hybrid_epsilon"
    ):
        Published.build(Published.Config(lam=1.0), process=gamma_hybrid())


def test_what_has_forgotten_is_not_solved() -> None:
    process, vector = gamma_hybrid(), torch.ones(1, WORDS + 1, dtype=torch.float64)
    assert process.transition(times((0.2,)), times((0.9,))).solve(vector).isfinite().all()
    for kernel in (process.transition(times((0.2,)), times((1.0,))), process.rates(times((0.5,)))):
        with pytest.raises(ArgumentError, match="invertible in every row"):
            kernel.solve(vector)


def test_a_score_without_a_possible_token_has_finite_gradients() -> None:
    """At t = 1 only the mask is possible, and the tokens of a perfect score are alike."""
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
