"""SEDD (score entropy): scores, distributions and published bounds agree, for every setting."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from ddiff_dit.dit import DiT
from ddiff_sedd.head import RatioDistribution, ScoreHead
from ddiff_sedd.process import ScoreEntropyDiffusion
from pydantic import ValidationError
from torch import Tensor

import ddiff
from ddiff import (
    AncestralSampler,
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
    GeometricSchedule,
    HierarchicalVocabulary,
    IdentityTime,
    MixtureProcess,
    Noisy,
    Query,
    Score,
    TokenHead,
    as_network,
)
from ddiff.checkpoint.weight_transfer import TrainedWeights, transfer_weights
from ddiff.core.elbo import closing_term
from ddiff.core.process import ForwardProcess, RowFunction
from ddiff.plugin.loader import survey_plugins
from ddiff.recipe.resolve import parse_recipe
from ddiff.testing import assert_laws, check_head, check_process, check_schedule
from ddiff.testing.probes import INNER, ReachableRows, times

# Both sides are a few dozen float64 operations on numbers up to 1e5, compared relatively.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WORDS = 5


def make(
    graph: str, noise: str = "loglinear", words: int = WORDS, **keys: float
) -> ComponentProcess:
    config = ScoreEntropyDiffusion.Config.model_validate({"graph": graph, "noise": noise, **keys})
    return ScoreEntropyDiffusion.build(
        config, vocabulary=FlatVocabulary(words, mask=graph == "absorb")
    )


def named(process: ForwardProcess) -> str:
    assert isinstance(process, MixtureProcess)
    graph = "uniform" if process.vocabulary.mask_id is None else "absorb"
    return f"{graph} {type(process.schedule).__name__} {vars(process.schedule)}"


SETTINGS = [
    (graph, noise) for graph in ("absorb", "uniform") for noise in ("loglinear", "geometric")
]


@pytest.mark.parametrize("process", ScoreEntropyDiffusion.examples(), ids=named)
def test_sedd_passes_every_conformance_check_in_every_setting(process: ForwardProcess) -> None:
    torch.set_num_threads(1)
    assert_laws(check_process(process))


@pytest.mark.parametrize("sigmas", [(1e-4, 20.0), (1e-3, 1.0), (0.05, 3.0)])
def test_geometric_schedule_passes_every_conformance_check(sigmas: tuple[float, float]) -> None:
    schedule = GeometricSchedule(*sigmas)
    assert_laws(check_schedule(schedule))
    ends = schedule.sigma(times((0.0, 0.5, 1.0)))
    expected = times((sigmas[0], (sigmas[0] * sigmas[1]) ** 0.5, sigmas[1]))
    torch.testing.assert_close(ends, expected, **CLOSE)


@pytest.mark.parametrize("sigmas", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_geometric_schedule_refuses_sigmas_that_do_not_grow(sigmas: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="0 < sigma_min < sigma_max"):
        GeometricSchedule(*sigmas)


# ---------------------------------------------------------------------- published formulas


def sigmas(process: ComponentProcess, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (total noise sigma at time t, its derivative)."""
    alpha = process.alpha(t)
    return -alpha.log(), -process.d_alpha(t) / alpha


def any_scores(rows: ReachableRows, states: int) -> Tensor:
    """Return random log-ratios log s(y) [n,S] that are the score of no distribution.

    The ratio at the current state is 1, so its logarithm is 0.
    """
    generator = torch.Generator().manual_seed(8)
    log_s = 1.5 * torch.randn(len(rows.zt), states, generator=generator, dtype=torch.float64)
    return log_s.scatter(-1, rows.zt.unsqueeze(-1), 0.0)


def times_log_less_one(ratio: Tensor) -> Tensor:
    """Return K(r) = r (ln r - 1), a term of the score entropy, for r = `ratio`."""
    return ratio * (ratio.log() - 1.0)


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sedd_absorb_bound_integrand_is_the_score_entropy_of_the_paper(noise: str) -> None:
    """At masks, the integrand is sigma' ( sum_y s(y) - ln s(x)/a + K(1/a) ); at tokens it is 0.

    s is the predicted score, a = e^sigma - 1 for the total noise sigma, and K(r) = r (ln r - 1).
    """
    process = make("absorb", noise)
    rows = ReachableRows(process, times(INNER))
    log_s, (sigma, d_sigma) = any_scores(rows, WORDS + 1), sigmas(process, rows.t)
    ratio = 1.0 / torch.expm1(sigma)
    own = log_s.gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
    entropy = log_s[:, :WORDS].exp().sum(-1) - ratio * own + times_log_less_one(ratio)
    expected = torch.where(rows.zt == WORDS, d_sigma * entropy, 0.0)
    torch.testing.assert_close(
        process.density(Score(log_s), rows.x0, rows.zt, rows.t), expected, **CLOSE
    )


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sedd_uniform_bound_integrand_is_score_entropy_of_the_paper(noise: str) -> None:
    """Compare with the closed form in the published code.

    The form contains rho = (e^sigma - 1)/(e^sigma - 1 + V) and means over the V tokens.
    """
    process = make("uniform", noise)
    rows = ReachableRows(process, times(INNER))
    log_s, (sigma, d_sigma) = any_scores(rows, WORDS), sigmas(process, rows.t)
    growth = torch.expm1(sigma)
    rho = growth / (growth + WORDS)
    own = log_s.gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
    mean_s, mean_log = log_s.exp().mean(-1) - 1.0 / WORDS, log_s.mean(-1)
    at_clean = mean_s - rho * mean_log + (WORDS - 1) / WORDS * times_log_less_one(rho)
    elsewhere = mean_s - own / growth - mean_log + ((-rho.log() - 1.0) / rho - (WORDS - 2)) / WORDS
    expected = d_sigma * torch.where(rows.zt == rows.x0, at_clean, elsewhere)
    torch.testing.assert_close(
        process.density(Score(log_s), rows.x0, rows.zt, rows.t), expected, **CLOSE
    )


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sedd_uniform_bound_integrand_is_that_of_udlm_and_duo(noise: str) -> None:
    """Compare with the integrand of the bound in arXiv 2412.10193 (UDLM) and 2506.10892 (Duo).

    Let V be the number of tokens, xbar = V alpha p + 1 - alpha for the prediction p, and y the same
    for the clean token in place of p. The integrand at the state z is

        alpha'/(V alpha) [ V/y_z - V/xbar_z - sum_j (y_j/y_z) ln( xbar_z y_j / (xbar_j y_z) ) ].
    """
    process = make("uniform", noise)
    rows = ReachableRows(process, times(INNER))
    alpha = process.alpha(rows.t).unsqueeze(-1)
    clean = torch.nn.functional.one_hot(rows.x0, WORDS).double()
    bars = [WORDS * alpha * p + 1.0 - alpha for p in (clean, rows.log_p.exp())]
    at_z = [bar.gather(-1, rows.zt.unsqueeze(-1)) for bar in bars]
    logs = (at_z[1] * bars[0] / (bars[1] * at_z[0])).log()
    bracket = WORDS / at_z[0] - WORDS / at_z[1] - (bars[0] / at_z[0] * logs).sum(-1, keepdim=True)
    duo = (process.d_alpha(rows.t).unsqueeze(-1) / (WORDS * alpha) * bracket).squeeze(-1)
    torch.testing.assert_close(process.density(rows.dist, rows.x0, rows.zt, rows.t), duo, **CLOSE)
    # The same with the score ln s(y) = ln xbar_y - ln xbar_z.
    score = Score((bars[1] / at_z[1]).log())
    torch.testing.assert_close(process.density(score, rows.x0, rows.zt, rows.t), duo, **CLOSE)


def read(head: ScoreHead, process: ForwardProcess, raw: Tensor, zt: Tensor, t: Tensor) -> Score:
    """Return the score that a score head makes of its raw output [r,S] at states zt and times t."""
    taken: list[Score] = []
    question = head.parameterization.wrap_callback(
        lambda prediction, idx: taken.append(prediction),
        process,
        zt,
        t,
        head.parameterization.prepare(process, zt, t),
    )
    question(RatioDistribution(raw, process.vocabulary), torch.arange(len(zt)))
    return taken[0]


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sedd_loss_of_a_scaled_score_equals_the_masked_diffusion_loss(noise: str) -> None:
    """The head output ln p + ln V has the loss -ln p(x) sigma'/(e^sigma - 1) of arXiv 2406.07524.

    The head scales this output to the score p/(e^sigma - 1), where p is a distribution over V
    tokens and sigma the total noise. Without scaling, the loss differs.
    """
    process = make("absorb", noise)
    rows = ReachableRows(process, times(INNER))
    raw = torch.nn.functional.pad(rows.log_p + torch.tensor(float(WORDS)).double().log(), (0, 1))
    sigma, d_sigma = sigmas(process, rows.t)
    masked = torch.where(
        rows.zt == WORDS, -d_sigma / torch.expm1(sigma) * rows.dist.log_prob(rows.x0), 0.0
    )
    charged = {
        scaled: process.density(
            read(ScoreHead(process.vocabulary, 2, scaled), process, raw, rows.zt, rows.t),
            rows.x0,
            rows.zt,
            rows.t,
        )
        for scaled in (True, False)
    }
    torch.testing.assert_close(charged[True], masked, **CLOSE)
    torch.testing.assert_close(
        process.density(rows.dist, rows.x0, rows.zt, rows.t), masked, **CLOSE
    )
    assert ((charged[False] - masked).abs() > 0.01)[rows.zt == WORDS].any()


@pytest.mark.parametrize(("graph", "noise"), SETTINGS)
def test_sedd_loss_of_a_distribution_equals_the_loss_of_its_score(graph: str, noise: str) -> None:
    process = make(graph, noise)
    rows = ReachableRows(process, times(INNER))
    asked = (rows.x0, rows.zt, rows.t)
    log_marginal = process.log_marginal(rows.log_p, rows.t)
    score = Score(log_marginal - log_marginal.gather(-1, rows.zt.unsqueeze(-1)))
    torch.testing.assert_close(
        process.density(score, *asked), process.density(rows.dist, *asked), **CLOSE
    )


@pytest.mark.parametrize("stop", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sedd_prior_term_of_a_score_equals_that_of_its_distribution(
    noise: str, stop: float
) -> None:
    """The prior term of the bound (KL to the prior) is evaluated with the score at t = 1.

    A score for states at t = 0.5 would make this term too large.
    """
    process, rule = make("absorb", noise), FlatTimes(0.05, stop)
    log_p = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]], dtype=torch.float64).log()
    x0, scored, slot = (
        torch.arange(WORDS).unsqueeze(0),
        torch.ones(1, WORDS, dtype=torch.bool),
        torch.zeros(1).long(),
    )

    def network(noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Tensor:
            zt, t = noisy.zt.reshape(-1)[rows], noisy.t.reshape(-1)[rows]
            log_marginal = process.log_marginal(log_p.expand(len(rows), -1), t)
            return fn(Score(log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1))), *per_row)

        return query

    noise_of_bound = CounterRng(3, 0, slot, WORDS)
    _, last = rule.ends(IdentityTime(), noise_of_bound, slot, 1, WORDS)
    closing = closing_term(process, network, x0, last, scored, noise_of_bound)
    dist = DenseDistribution(log_p.expand(WORDS, -1), process.vocabulary)
    expected = process.closing_kl(dist, x0[0], torch.full((WORDS,), stop, dtype=torch.float64))
    torch.testing.assert_close(closing[0], expected, **CLOSE)


# ---------------------------------------------------------------------- the head


@pytest.mark.parametrize("mask", [True, False])
def test_score_head_passes_every_conformance_check_of_heads(mask: bool) -> None:
    vocabulary = FlatVocabulary(WORDS, mask)
    assert_laws(check_head(ScoreHead.build(ScoreHead.Config(), vocabulary=vocabulary, width=6)))


def test_score_head_starts_at_the_unigram_distribution() -> None:
    process, counts = make("absorb"), torch.tensor([0, 1, 2, 5, 90])
    head = ScoreHead.build(ScoreHead.Config(), vocabulary=process.vocabulary, width=3).double()
    head.start_from_counts(counts)
    log_p = (counts.double() + 1.0).log().log_softmax(-1)
    t, zt = times(INNER), torch.full((len(INNER),), WORDS)
    x0 = torch.arange(len(INNER)) % WORDS
    score = read(head, process, head.bias.detach().expand(len(t), -1), zt, t)
    dist = DenseDistribution(log_p.expand(len(t), -1), process.vocabulary)
    torch.testing.assert_close(
        process.density(score, x0, zt, t), process.density(dist, x0, zt, t), **CLOSE
    )


def test_score_head_without_mask_starts_at_ratio_one() -> None:
    process = make("uniform")
    head = ScoreHead.build(ScoreHead.Config(), vocabulary=process.vocabulary, width=3)
    head.start_from_counts(torch.ones(WORDS))
    score = read(
        head, process, head.bias.detach().expand(3, -1), torch.arange(3), times((0.1, 0.5, 1.0))
    )
    assert (score.log_ratio == 0).all()


def test_score_head_scale_is_finite_at_time_one() -> None:
    process = make("absorb", floor=0.0)
    head = ScoreHead.build(ScoreHead.Config(), vocabulary=process.vocabulary, width=3)
    score = read(head, process, torch.zeros(1, WORDS + 1), torch.tensor([WORDS]), times((1.0,)))
    assert score.log_ratio.isfinite().all()
    assert score.log_ratio[0, WORDS] == 0


# ---------------------------------------------------------------------- networks

RECIPE = """
name = "scores"
seed = 1
plugins = ["sedd", "dit"]

[data]
kind = "markov"
alphabet = 6
peakedness = 3.0
rows = 512
validation = 64
length = 8

[tokenizer]
kind = "alphabet"

[vocabulary]
kind = "flat"

[process]
kind = "sedd"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
head = "score"

[objective]
loss = { kind = "clip", largest = 10.0 }

[train]
steps = 4
batch = 32
warmup = 5
optimizer = "muon"
checkpoint_every = 1000
log_every = 1

[evaluate]
window = [1e-3, 1.0]

[sample]
sampler = "tau_leaping"
steps = 8
count = 4

[backend]
device = "cpu"
"""


def format_settings(graph: str, noise: str, head: str, run_dir: Path) -> list[str]:
    return [
        f"process.graph={graph}",
        f"process.noise={noise}",
        f"denoiser.head={head}",
        f"vocabulary.mask={str(graph == 'absorb').lower()}",
        f"run_dir={str(run_dir)!r}",
    ]


@pytest.mark.parametrize("head", ["score", "tokens"])
@pytest.mark.parametrize(("graph", "noise"), SETTINGS)
def test_sedd_training_lowers_the_loss_of_score_head_and_token_head(
    graph: str, noise: str, head: str
) -> None:
    """Train on a single batch with fixed noise, so that the loss depends only on the weights."""
    torch.set_num_threads(1)
    process = make(graph, noise)
    torch.manual_seed(0)
    backbone = DiT(process.vocabulary, 16, layers=1, heads=2)
    heads = {"score": ScoreHead.build(ScoreHead.Config(), vocabulary=process.vocabulary, width=16)}
    denoiser = Denoiser(backbone, heads.get(head) or TokenHead(process.vocabulary, 16))
    objective = DiffusionObjective(process, denoiser, ElboLoss(), FlatTimes(1e-3, 1.0))
    ids = (torch.arange(32).unsqueeze(-1) + torch.arange(6)) % WORDS
    yes, index = torch.ones_like(ids, dtype=torch.bool), torch.arange(32)
    batch = Batch(ids, yes, yes, torch.zeros_like(ids), index, False, {})
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        prediction = objective(batch, CounterRng(0, 0, index, 6), objective.counts(batch), 32)
        optimizer.zero_grad()
        prediction.loss.backward()
        optimizer.step()
        losses.append(float(prediction.loss.detach()))
        assert math.isfinite(losses[-1])
    # A single step may rise again, depending on rounding: use the median.
    assert statistics.median(losses[-10:]) < 0.7 * losses[0], losses


@pytest.mark.parametrize(("graph", "noise"), [("absorb", "loglinear"), ("uniform", "geometric")])
def test_sedd_recipe_with_score_head_trains_evaluates_and_samples(
    graph: str, noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    run = ddiff.run(
        parse_recipe(RECIPE, settings=format_settings(graph, noise, "score", tmp_path / "run"))
    )
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    (terms,) = [told for name, told in written.items() if name.startswith("terms_nats_per_")]
    assert sorted(terms) == ["closing", "decoding", "diffusion"]
    assert all(math.isfinite(nats) for nats in terms.values()), terms
    for kind in ("tau_leaping", "analytic", "trapezoidal"):
        (named,) = [
            one for one in survey_plugins().registry.components("sampler") if one.name == kind
        ]
        sampler = named.load().build(named.config_class()(), steps=6)
        network = as_network(run.denoiser, run.process)
        ids = ddiff.generate(
            sampler, run.process, network, index=torch.arange(3), length=8, seed=2
        ).ids
        assert ids.shape == (3, 8)
        assert ids.min() >= 0
        assert ids.max() < 6


def test_ancestral_sampler_refuses_a_score() -> None:
    process = make("absorb")
    head = ScoreHead.build(ScoreHead.Config(), vocabulary=process.vocabulary, width=4)
    denoiser = Denoiser(Constant(), head)
    with pytest.raises(ArgumentError, match="score, from which no token can be drawn"):
        ddiff.generate(
            AncestralSampler(2),
            process,
            as_network(denoiser, process),
            index=torch.arange(2),
            length=3,
            seed=0,
        )


class Constant(Backbone):
    width = 4

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return torch.ones(*ids.shape, self.width)


# ---------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"noise": "loglinear", "sigma_min": 0.1}, "takes no sigma_min"),
        ({"noise": "geometric", "floor": 0.1}, "takes no floor"),
        ({"floor": 1.0}, "floor"),
        ({"graph": "cycle"}, "graph"),
        ({"noise": "cosine"}, "noise"),
        ({"noise": "geometric", "sigma_min": 1e-320}, "sigma_min"),
        ({"noise": "geometric", "sigma_max": 2000.0}, "sigma_max"),
    ],
)
def test_sedd_refuses_settings_of_another_graph_or_noise(
    keys: dict[str, object], named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        ScoreEntropyDiffusion.Config(**keys)


def test_sedd_refuses_sigmas_in_the_wrong_order() -> None:
    with pytest.raises(ArgumentError, match="0 < sigma_min < sigma_max"):
        make("uniform", "geometric", sigma_min=0.5, sigma_max=0.2)


def test_sedd_refuses_a_vocabulary_that_does_not_match_its_graph() -> None:
    build = ScoreEntropyDiffusion.build
    with pytest.raises(
        ArgumentError, match=r'graph = "absorb" needs tokens and a mask.*mask = true'
    ):
        build(ScoreEntropyDiffusion.Config(), vocabulary=FlatVocabulary(4, mask=False))
    with pytest.raises(
        ArgumentError, match=r'graph = "uniform" needs tokens without a mask.*mask = false'
    ):
        build(ScoreEntropyDiffusion.Config(graph="uniform"), vocabulary=FlatVocabulary(4))


@pytest.mark.parametrize("scaled", [True, False])
def test_weight_transfer_skips_a_score_head_with_another_output_scaling(scaled: bool) -> None:
    """Scores of a scaled and an unscaled head differ by the factor V (e^sigma - 1)."""
    vocabulary = FlatVocabulary(WORDS)
    theirs = ScoreHead(vocabulary, Constant.width, True)
    mine = Denoiser(Constant(), ScoreHead(vocabulary, Constant.width, scaled))
    weights = {f"head.{name}": value for name, value in theirs.state_dict().items()}
    source = TrainedWeights("there", {**mine.state_dict(), **weights}, vocabulary, theirs)
    assert (transfer_weights(mine, source, "all").fresh == []) == scaled


def test_score_head_refuses_trees_and_scaling_without_a_mask() -> None:
    with pytest.raises(ArgumentError, match='"tied" or "levelwise"'):
        ScoreHead(HierarchicalVocabulary([[0, 1, 0, 1]]), 4, scaled=False)
    with pytest.raises(ArgumentError, match="Remove scaled = true"):
        ScoreHead(FlatVocabulary(4, mask=False), 4, scaled=True)


def test_denoiser_refuses_parameterization_all_with_a_score_head() -> None:
    head = ScoreHead(FlatVocabulary(3), 8, scaled=True)
    backbone = torch.nn.Linear(1, 1)
    backbone.width = 8  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match='parameterization="all" applies to a distribution'):
        Denoiser(backbone, head, parameterization="all")
