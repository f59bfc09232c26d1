"""Joint samples of two tokens and a number have the known distribution, on every kind of path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from all_samplers import NOT_MONOTONE, SAMPLERS
from ddiff_dit.mmdit import MMDiT, StreamSpec
from exact_fields import BITS, MEAN, PROBABILITY, SPREAD, VOCABULARY, exact_network
from gaussian_mixture import BatchRng
from joint import exact_network as exact_tokens
from joint import processes
from torch import Tensor

import ddiff.sampling.fields
from ddiff.core.clock import LogTimeClock
from ddiff.core.elbo import network_from_table
from ddiff.core.field import Field, Fields
from ddiff.core.fields import JointNetwork, JointNoisy, hold, joint_network_from_functions
from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.paths import HeldAt, Leg, LegPath, first_path, shared_path
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import Query
from ddiff.core.times import FlatTimes, Noisy, WindowTimes
from ddiff.core.tree import TreeProcess
from ddiff.errors import ArgumentError
from ddiff.nn.heads import TokenHead
from ddiff.nn.joint_denoiser import JointDenoiser
from ddiff.nn.joint_network import JointDenoiserNetwork
from ddiff.nn.parameterization import PARAMETERIZATIONS
from ddiff.nn.vector_head import VectorHead
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.fields import JointSampler, generate_fields
from ddiff.sampling.first_hitting import FirstHittingSampler
from ddiff.sampling.gaussian import (
    DdimSampler,
    EulerMaruyamaSampler,
    EulerSampler,
    HeunSampler,
)
from ddiff.sampling.grid import LoopGrid
from ddiff.sampling.hyperschedule import HyperscheduleSampler
from ddiff.sampling.joint_network import Guidance
from ddiff.sampling.loop import Canvas, generate
from ddiff.sampling.psi import LoopRemasking, PsiSampler
from ddiff.sampling.shaping import ShapedSampler, Temperature
from ddiff.sampling.trapezoidal import TrapezoidalSampler

MANY = 20_000
STEPS = 48
# The number should not be formed long before the tokens, so it moves early: p = share^0.2.
POWER = {"latent": 0.2}
TOGETHER = LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.0, 1.0)}, POWER)
LAGGED = LegPath({"text": Leg(0.3, 1.0), "latent": Leg(0.0, 0.7)}, POWER)
TEXT_FIRST = first_path(["text", "latent"])
LATENT_FIRST = first_path(["latent", "text"])
PATHS = {
    "shared": TOGETHER,
    "lagged": LAGGED,
    "text first": TEXT_FIRST,
    "latent first": LATENT_FIRST,
}
FIELDS: Fields = {
    "text": Field(TreeProcess(VOCABULARY, LogTimeClock((1.0,))), FlatTimes(), 2),
    "latent": Field(GaussianProcess(CosineVP(), 1), FlatTimes(), 1),
}
EXACT = exact_network(FIELDS)


@pytest.fixture
def fast_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the random numbers of a batch at once; the draws then depend on the batch."""
    monkeypatch.setattr(ddiff.sampling.fields, "CounterRng", BatchRng)


def sampler_on(path: LegPath, steps: int = STEPS, **settings: Any) -> JointSampler:
    samplers = {"text": AncestralSampler(steps), "latent": HeunSampler(steps)}
    return JointSampler(samplers, path, steps, **settings)


def draw(sampler: JointSampler, count: int = MANY, network: Any = EXACT, **settings: Any) -> Any:
    return generate_fields(
        sampler, FIELDS, network, index=torch.arange(count), **{"seed": 0, **settings}
    )


def check_joint(states: Any) -> None:
    """Compare shares, means and deviations of the number with the exact ones.

    With 20 000 samples the shares have a deviation of .0035, the means of at most .0134 and the
    deviations of at most .0095; the tolerances are 3.5 times as large.
    """
    number = states["text"][:, 0] * 2 + states["text"][:, 1]
    z = states["latent"][:, 0, 0]
    shares = torch.bincount(number, minlength=4).double() / len(number)
    assert torch.allclose(shares, PROBABILITY, rtol=0.0, atol=0.0125)
    for value in range(4):
        part = z[number == value]
        assert float(part.mean()) == pytest.approx(float(MEAN[value]), abs=0.047)
        assert float(part.std()) == pytest.approx(SPREAD, abs=0.034)


# ---------------------------------------------------------------------- distributions


@pytest.mark.usefixtures("fast_draws")
@pytest.mark.parametrize("name", PATHS)
def test_joint_samples_have_the_joint_distribution(name: str) -> None:
    check_joint(draw(sampler_on(PATHS[name])).states)


@pytest.mark.usefixtures("fast_draws")
def test_gauss_seidel_samples_have_the_joint_distribution() -> None:
    check_joint(draw(sampler_on(TOGETHER, update="gauss-seidel")).states)


@pytest.mark.usefixtures("fast_draws")
def test_noisy_samplers_have_the_joint_distribution() -> None:
    samplers = {"text": TrapezoidalSampler(64), "latent": DdimSampler(64, eta=1.0)}
    check_joint(draw(JointSampler(samplers, TOGETHER, 80)).states)


@pytest.mark.usefixtures("fast_draws")
@pytest.mark.parametrize("path", [TOGETHER, TEXT_FIRST, LATENT_FIRST], ids=str)
def test_text_given_the_number_has_its_conditional_distribution(path: LegPath) -> None:
    number = torch.tensor([-0.5, 0.7], dtype=torch.float64).repeat_interleave(MANY // 2)
    values = number.reshape(-1, 1, 1)
    samplers = {"text": FirstHittingSampler(), "latent": DdimSampler(2)}
    drawn = draw(JointSampler(samplers, path), given={"latent": (values, None)})
    assert drawn.states["latent"] is values
    found = drawn.states["text"][:, 0] * 2 + drawn.states["text"][:, 1]
    for part, z in enumerate((-0.5, 0.7)):
        weight = PROBABILITY.log() - 0.5 * ((z - MEAN) / SPREAD) ** 2
        shares = torch.bincount(found[part * MANY // 2 :][: MANY // 2], minlength=4)
        expected = weight.softmax(-1)
        # 3.5 deviations of 10 000 samples
        assert torch.allclose(shares.double() * 2 / MANY, expected, rtol=0.0, atol=0.0175)


@pytest.mark.usefixtures("fast_draws")
@pytest.mark.parametrize("path", [TOGETHER, TEXT_FIRST, LATENT_FIRST], ids=str)
def test_number_given_the_text_has_its_conditional_distribution(path: LegPath) -> None:
    bits = BITS[torch.arange(MANY) % 4]
    drawn = draw(sampler_on(path), given={"text": (bits, None)})
    assert drawn.states["text"] is bits
    for value in range(4):
        part = drawn.states["latent"][value::4, 0, 0]
        assert float(part.mean()) == pytest.approx(float(MEAN[value]), abs=0.03)
        assert float(part.std()) == pytest.approx(SPREAD, abs=0.021)


@pytest.mark.usefixtures("fast_draws")
def test_one_given_token_conditions_the_other_fields() -> None:
    """The first token is 1: the second token and the number follow their conditionals."""
    mask = torch.tensor([[True, False]]).expand(MANY, 2)
    ones = torch.ones(MANY, 2, dtype=torch.long)
    drawn = draw(sampler_on(TOGETHER), given={"text": (ones, mask)})
    second = drawn.states["text"][:, 1]
    assert bool((drawn.states["text"][:, 0] == 1).all())
    assert float(second.double().mean()) == pytest.approx(0.35 / 0.45, abs=0.0125)
    for bit in (0, 1):
        part = drawn.states["latent"][second == bit, 0, 0]
        assert float(part.mean()) == pytest.approx(float(MEAN[2 + bit]), abs=0.04)


@pytest.mark.usefixtures("fast_draws")
def test_jacobi_and_gauss_seidel_agree_as_steps_grow() -> None:
    """With equal random numbers the distance of both updates falls about as 1/steps."""
    distances = []
    for steps in (8, 32, 128):
        one = draw(sampler_on(TOGETHER, steps), 4000).states
        other = draw(sampler_on(TOGETHER, steps, update="gauss-seidel"), 4000).states
        distances.append(float((one["text"] != other["text"]).double().mean()))
    assert distances[2] < 0.012
    assert distances[0] > 2.0 * distances[1] > 4.0 * distances[2]


# ---------------------------------------------------------------------- one field


def token_fields(rule: Any = None) -> Fields:
    return {"text": FIELDS["text"]._replace(rule=rule or FlatTimes())}


def token_network() -> tuple[JointNetwork, Any]:
    """Return networks of the tokens without the number, for several fields and for one."""

    def log_probs(zt: Tensor, t: Tensor) -> Tensor:
        logits = torch.stack([zt.double().sin(), (zt + 1).double().cos()], -1)
        return (logits + 0.3 * t.unsqueeze(-1)).flip(1).log_softmax(-1)

    def text(state: JointNoisy) -> Any:
        log_p = log_probs(state["text"].zt, state["text"].t).flatten(0, 1)
        return lambda rows: DenseDistribution(log_p[rows], VOCABULARY)

    return joint_network_from_functions({"text": text}), network_from_table(log_probs, VOCABULARY)


FOR_MASKED = [name for name, (_, refused) in SAMPLERS.items() if "masked" not in refused]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["masked", "tree", "uniform"])
def test_one_field_of_tokens_equals_generate_bit_for_bit(name: str, kind: str) -> None:
    build, refused = SAMPLERS[name]
    if kind in refused:
        pytest.skip("the sampler refuses this process")
    process = processes()[kind]
    plain = exact_tokens(process)

    def joint(state: JointNoisy) -> dict[str, Query]:
        return {"text": plain(state["text"])}

    fields = {"text": Field(process, FlatTimes(), 2)}
    path = LegPath({"text": Leg(0.0, 1.0)})
    request: dict[str, Any] = {"index": torch.arange(3, 20), "seed": 4}
    one = generate_fields(JointSampler({"text": build(6)}, path), fields, joint, **request)
    other = generate(build(6), process, plain, length=2, **request)
    assert torch.equal(one.states["text"], other.ids)
    assert one.nfe == other.nfe
    assert torch.equal(one.runs, other.runs)


@pytest.mark.parametrize(
    "sampler",
    [DdimSampler(5), DdimSampler(5, 1.0), HeunSampler(5), EulerSampler(5), EulerMaruyamaSampler(5)],
    ids=lambda one: type(one).__name__,
)
def test_one_field_of_vectors_equals_generate_bit_for_bit(sampler: Any) -> None:
    process = GaussianProcess(CosineVP(), 2)
    fields = {"latent": Field(process, FlatTimes(), 3)}

    def latent(state: JointNoisy) -> Any:
        mean = state["latent"].zt.flatten(0, 1).tanh()
        return lambda rows: PredictedMean(mean[rows])

    joint = joint_network_from_functions({"latent": latent})

    def plain(noisy: Noisy) -> Query:
        return joint({"latent": noisy})["latent"]

    path = LegPath({"latent": Leg(0.0, 1.0)})
    request: dict[str, Any] = {"index": torch.arange(4), "seed": 4}
    one = generate_fields(JointSampler({"latent": sampler}, path), fields, joint, **request)
    other = generate(sampler, process, plain, length=3, **request)
    assert torch.equal(one.states["latent"], other.ids)
    assert one.nfe == other.nfe


@pytest.mark.parametrize("shape", ["block", "slide"])
def test_windows_are_followed_on_a_leg_of_one_field(shape: Any) -> None:
    rule = WindowTimes(1, shape, paired=False)
    joint, plain = token_network()
    fields = token_fields(rule)
    path = LegPath({"text": Leg(0.0, 1.0)})
    request: dict[str, Any] = {"index": torch.arange(30), "seed": 4}
    one = generate_fields(
        JointSampler({"text": AncestralSampler(6)}, path), fields, joint, **request
    )
    along = HyperscheduleSampler(AncestralSampler(6), rule)
    other = generate(along, fields["text"].process, plain, length=2, **request)
    assert torch.equal(one.states["text"], other.ids)
    shaped = JointSampler({"text": ShapedSampler(AncestralSampler(6), [Temperature(0.5)])}, path)
    assert bool((generate_fields(shaped, fields, joint, **request).states["text"] < 2).all())


# ---------------------------------------------------------------------- all token samplers


@pytest.mark.usefixtures("fast_draws")
@pytest.mark.parametrize("path", [TEXT_FIRST, LATENT_FIRST], ids=["text first", "latent first"])
@pytest.mark.parametrize("name", FOR_MASKED)
def test_every_token_sampler_runs_on_a_leg_of_its_field(name: str, path: LegPath) -> None:
    """The text has one leg and the number the other; both stay near the joint distribution."""
    samplers = {"text": SAMPLERS[name][0](8), "latent": HeunSampler(8)}
    drawn = draw(JointSampler(samplers, path), 2000)
    text = drawn.states["text"]
    assert bool(((text == 0) | (text == 1)).all())
    correlation = torch.corrcoef(
        torch.stack([text[:, 0].double(), drawn.states["latent"][:, 0, 0]])
    )
    # The exact correlation is .62; shaped and heuristic samplers change it.
    assert 0.4 < float(correlation[0, 1]) < 0.9
    if SAMPLERS[name][0](8).quality == "exact":
        shares = torch.bincount(text[:, 0] * 2 + text[:, 1], minlength=4).double() / 2000
        assert torch.allclose(shares, PROBABILITY, rtol=0.0, atol=0.045)


def test_sampler_on_its_leg_equals_the_sampler_on_the_held_network() -> None:
    """Text given the number: the same draws as with `hold`, from the generator of the field."""
    number = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64).reshape(-1, 1, 1)
    clean = Noisy(number, torch.zeros(20, 1).double(), torch.ones(20, 1, dtype=torch.bool))
    sampler = JointSampler({"text": FirstHittingSampler()}, shared_path(["text", "latent"]))
    one = draw(sampler, 20, given={"latent": (number, None)})
    canvas = Canvas(
        torch.full((20, 2), VOCABULARY.root),
        torch.ones(20, 2, dtype=torch.float64),
        torch.zeros(20, 2, dtype=torch.bool),
        torch.ones(20, 2, dtype=torch.bool),
    )
    network = hold(EXACT, {"latent": clean}, "text")

    def rng_at(step: int) -> Any:
        return ddiff.sampling.fields.CounterRng(0, step, torch.arange(20), 2, "sample/text")

    canvases = list(FirstHittingSampler().run(FIELDS["text"].process, network, canvas, rng_at))
    assert torch.equal(one.states["text"], canvases[-1].zt)


# ---------------------------------------------------------------------- the loop


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("update", ["jacobi", "gauss-seidel"])
def test_joint_samples_do_not_depend_on_the_batch(name: str, update: Any) -> None:
    sampler = sampler_on(PATHS[name], 5, update=update)
    whole = draw(sampler, 6)
    one = generate_fields(sampler, FIELDS, EXACT, index=torch.tensor([4]), seed=0)
    for field, states in whole.states.items():
        assert torch.allclose(states[4:5], one.states[field], rtol=0.0, atol=1e-12)


def test_given_positions_are_bit_identical_on_every_path() -> None:
    mask = torch.tensor([[True, False], [False, True], [False, False], [True, True]])
    bits = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]])
    vectors = torch.tensor([0.1, 1 / 3, -2.7, 5e-7]).reshape(4, 1, 1)
    marked = torch.tensor([[True], [False], [True], [False]])
    for path in PATHS.values():
        for update in ("jacobi", "gauss-seidel"):
            sampler = sampler_on(path, 4, update=update)
            partly = draw(sampler, 4, given={"text": (bits, mask), "latent": (vectors, marked)})
            assert torch.equal(partly.states["text"][mask], bits[mask])
            assert torch.equal(partly.states["latent"][marked], vectors[marked].double())
            assert not bool((partly.states["latent"] == vectors)[~marked].any())
            wholly = draw(sampler, 4, given={"latent": (vectors, None), "text": (bits, mask)})
            assert wholly.states["latent"] is vectors
            assert torch.equal(wholly.states["text"][mask], bits[mask])


def test_fields_keep_their_prior_draw_until_their_leg_and_are_clean_after_it() -> None:
    seen: list[dict[str, Canvas]] = []
    sampler = JointSampler({"text": AncestralSampler(4), "latent": DdimSampler(3)}, LATENT_FIRST)
    drawn = draw(sampler, 5, on_step=lambda step, canvases: seen.append(dict(canvases)))
    assert len(seen) == 7
    for canvases in seen[:3]:
        assert bool((canvases["text"].zt == VOCABULARY.root).all())
        assert bool((canvases["text"].t == 1.0).all())
    for canvases in seen[3:]:
        assert torch.equal(canvases["latent"].zt, drawn.states["latent"])
        assert bool(canvases["latent"].clean.all())
    start = {}

    def network(state: JointNoisy) -> Any:
        start.setdefault("zt", state["latent"].zt)
        if not bool(state["text"].clean.all()):
            assert torch.equal(state["latent"].zt, start["zt"])
        return EXACT(state)

    draw(
        JointSampler({"text": AncestralSampler(4), "latent": DdimSampler(3)}, TEXT_FIRST),
        5,
        network,
    )
    assert float(start["zt"].std()) > 0.1


def test_network_evaluations_are_counted_once() -> None:
    """Each call of a query below the counter belongs to one evaluation of one joint state."""
    evaluated = []

    def network(state: JointNoisy) -> Any:
        known: set[int] = set()

        def wrap(query: Query) -> Query:
            def asked(*arguments: Any) -> Any:
                if not known:
                    known.add(1)
                    evaluated.append(state)
                return query(*arguments)

            return asked

        return {name: wrap(query) for name, query in EXACT(state).items()}

    for latent, update, per_step in (
        (DdimSampler(2), "jacobi", 1),
        (HeunSampler(2), "jacobi", 2),
        (DdimSampler(2), "gauss-seidel", 2),
        (HeunSampler(2), "gauss-seidel", 3),
    ):
        evaluated.clear()
        samplers = {"text": AncestralSampler(2), "latent": latent}
        # 200 samples: in every step some sample has a masked token.
        drawn = draw(JointSampler(samplers, TOGETHER, 6, update), 200, network)  # type: ignore[arg-type]
        assert drawn.nfe == len(evaluated)
        # The text asks the network once less often if no token of the batch is masked.
        assert 6 * per_step - 1 <= drawn.nfe <= 6 * per_step
        # A sample without masked tokens takes no part in the evaluations of its text alone.
        assert int(drawn.runs.max()) <= drawn.nfe
        if update == "jacobi":
            assert drawn.runs.tolist() == [drawn.nfe] * 200
    assert "network evaluations" in repr(drawn)


def test_fields_that_are_held_at_the_prior_or_absent_are_marked() -> None:
    seen: list[JointNoisy] = []

    def network(state: JointNoisy) -> Any:
        seen.append(state)
        return EXACT(state)

    for left_out in ("absent", "prior"):
        seen.clear()
        path = LegPath({"text": Leg(0.0, 1.0), "latent": left_out})  # type: ignore[dict-item]
        drawn = draw(JointSampler({"text": AncestralSampler(3)}, path), 4, network)
        assert set(drawn.states) == {"text"}
        assert all(bool((state["latent"].t == 1.0).all()) for state in seen)
        absent = seen[0]["latent"].absent
        assert (absent is not None and bool(absent.all())) == (left_out == "absent")


def test_filters_act_on_fields_that_move_together() -> None:
    text = ShapedSampler(AncestralSampler(8), [Temperature(0.0)])
    samplers = {"text": text, "latent": DdimSampler(8)}
    states = draw(JointSampler(samplers, TOGETHER, 8), 300).states
    plain = draw(sampler_on(TOGETHER, 8), 300).states
    assert len(states["text"].unique(dim=0)) <= len(plain["text"].unique(dim=0))
    assert float((states["text"][:, 0] == 0).double().mean()) != pytest.approx(
        float((plain["text"][:, 0] == 0).double().mean()), abs=1e-9
    )


# ---------------------------------------------------------------------- guidance


BOTH: dict[str, Guidance] = {
    "text": Guidance(2.0, {"latent": "prior"}),
    "latent": Guidance(2.0, {"text": "prior"}),
}


def test_guidance_of_weight_one_changes_nothing_but_the_count() -> None:
    given = {"latent": (torch.full((40, 1, 1), 0.4, dtype=torch.float64), None)}
    plain = draw(sampler_on(TOGETHER, 6), 40, given=given)
    one = {"text": Guidance(1.0, {"latent": "prior"})}
    guided = draw(sampler_on(TOGETHER, 6, guidance=one), 40, given=given)
    assert torch.equal(plain.states["text"], guided.states["text"])
    assert guided.nfe == 2 * plain.nfe


@pytest.mark.usefixtures("fast_draws")
def test_guided_tokens_follow_the_guided_distribution() -> None:
    """One masked token given the other and the number: p^w p_null^(1-w), normalized."""
    mask = torch.tensor([[True, False]]).expand(MANY, 2)
    ones = torch.ones(MANY, 2, dtype=torch.long)
    number = torch.full((MANY, 1, 1), 0.2, dtype=torch.float64)
    guidance = {"text": Guidance(2.5, {"latent": "prior"})}
    samplers = {"text": FirstHittingSampler()}
    drawn = draw(
        JointSampler(samplers, TOGETHER, guidance=guidance),
        given={"text": (ones, mask), "latent": (number, None)},
    )
    null = PROBABILITY[2:].log().log_softmax(-1)
    conditional = (PROBABILITY[2:].log() - 0.5 * ((0.2 - MEAN[2:]) / SPREAD) ** 2).log_softmax(-1)
    expected = (2.5 * conditional - 1.5 * null).softmax(-1)
    found = float(drawn.states["text"][:, 1].double().mean())
    assert found == pytest.approx(float(expected[1]), abs=0.0125)


def test_guided_means_are_mixed_linearly() -> None:
    """Euler steps with the mean u + w (c - u), computed by hand for the number given the text."""
    bits = BITS[torch.tensor([0, 3])]
    guidance = {"latent": Guidance(3.0, {"text": "prior"})}
    samplers = {"latent": DdimSampler(4, last="mean")}
    drawn = draw(
        JointSampler(samplers, TOGETHER, guidance=guidance), 2, given={"text": (bits, None)}
    )
    process = FIELDS["latent"].process

    def by_hand(noisy: Noisy) -> Query:
        def predict(text: Noisy) -> Tensor:
            query = EXACT({"text": text, "latent": noisy})["latent"]
            rows = torch.arange(2)
            mean: Tensor = query(rows, rows, lambda prediction: prediction.mean)
            return mean

        nothing = torch.zeros(2, 2, dtype=torch.bool)
        times = torch.zeros(2, 2, dtype=torch.float64)
        conditional = predict(Noisy(bits, times, ~nothing))
        null = predict(Noisy(torch.full_like(bits, VOCABULARY.root), times + 1.0, nothing))
        mean = null + 3.0 * (conditional - null)

        def query(rows: Tensor, node: Tensor, fn: Callable[..., Any], *per_row: Tensor) -> Any:
            return fn(PredictedMean(mean[rows]), *per_row)

        return query

    def rng_at(step: int) -> Any:
        return ddiff.sampling.fields.CounterRng(0, step, torch.arange(2), 1, "sample/latent")

    free = torch.ones(2, 1, dtype=torch.bool)
    start = process.prior.draw_positions(rng_at(0), "start")
    canvas = Canvas(start, free.double(), ~free, free)
    canvases = list(samplers["latent"].run(process, by_hand, canvas, rng_at))
    assert torch.allclose(drawn.states["latent"], canvases[-1].zt, rtol=0.0, atol=1e-12)
    assert drawn.nfe == 8


def test_guidance_of_both_fields_takes_three_evaluations_per_step() -> None:
    samplers = {"text": AncestralSampler(4), "latent": DdimSampler(4)}
    drawn = draw(JointSampler(samplers, TOGETHER, 5, guidance=BOTH), 100)
    assert 3 * 5 - 2 <= drawn.nfe <= 3 * 5
    ignored = {name: guidance._replace(weight=0.0) for name, guidance in BOTH.items()}
    states = draw(JointSampler(samplers, TOGETHER, 16, guidance=ignored), 1000).states
    pair = torch.stack([states["text"][:, 0].double(), states["latent"][:, 0, 0]])
    # Without the other field each is drawn from its marginal: no correlation (deviation .03).
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.11


def test_field_at_its_prior_guides_nothing_and_costs_nothing() -> None:
    plain = draw(sampler_on(TEXT_FIRST, 4), 50)
    guided = draw(sampler_on(TEXT_FIRST, 4, guidance={"text": BOTH["text"]}), 50)
    assert torch.equal(plain.states["text"], guided.states["text"])
    assert torch.equal(plain.states["latent"], guided.states["latent"])
    assert plain.nfe == guided.nfe


# ---------------------------------------------------------------------- refusals


def refused(match: str, sampler: JointSampler, fields: Fields = FIELDS, **settings: Any) -> None:
    with pytest.raises(ArgumentError, match=match):
        generate_fields(sampler, fields, EXACT, index=torch.arange(3), seed=0, **settings)


def test_samplers_that_choose_their_times_are_refused_on_shared_legs() -> None:
    for name, (build, _) in SAMPLERS.items():
        sampler = build(4)
        is_grid = name not in (
            "first_hitting",
            "entropy",
            "self_correction",
            "blockwise",
            "blockwise events",
            "loop",
        )
        if name in NOT_MONOTONE or not is_grid:
            match = "pauses" if name == "loop" else "chooses its own times"
            if "masked" in SAMPLERS[name][1]:
                match = "must train the prediction"
            refused(match, JointSampler({"text": sampler, "latent": DdimSampler(2)}, TOGETHER))
    pausing = PsiSampler(LoopGrid(4), LoopRemasking())
    refused("pauses", JointSampler({"text": pausing, "latent": DdimSampler(2)}, LAGGED))


def test_path_with_a_noisy_field_is_refused() -> None:
    path = LegPath({"text": Leg(0.0, 1.0), "latent": HeldAt(0.5)})
    refused("is for training and evaluation", JointSampler({"text": AncestralSampler(2)}, path))


def test_samplers_of_other_states_are_refused() -> None:
    swapped = JointSampler({"text": DdimSampler(2), "latent": AncestralSampler(2)}, TOGETHER)
    refused("moves vectors, but TreeProcess", swapped)
    refused("has no sampler", JointSampler({"text": AncestralSampler(2)}, TOGETHER))
    more = {"text": AncestralSampler(2), "latent": DdimSampler(2), "image": DdimSampler(2)}
    refused("samplers name image", JointSampler(more, TOGETHER))


def test_windows_are_refused_on_shared_legs() -> None:
    fields = {**FIELDS, "text": FIELDS["text"]._replace(rule=WindowTimes(1))}
    refused("time rule with windows", sampler_on(TOGETHER, 4), fields)


def test_given_states_that_do_not_fit_are_refused() -> None:
    sampler = sampler_on(TOGETHER, 4)
    bits = torch.zeros(3, 2, dtype=torch.long)
    number = torch.zeros(3, 1, 1)
    refused("given names image", sampler, given={"image": (number, None)})
    refused(r'given\["text"\] does not fit', sampler, given={"text": (bits + 2, None)})
    refused(r'given\["text"\] does not fit', sampler, given={"text": (bits[:, :1], None)})
    refused(r'given\["latent"\] does not fit', sampler, given={"latent": (number[0], None)})
    refused("finite", sampler, given={"latent": (number * torch.nan, None)})
    refused("nothing is sampled", sampler, given={"text": (bits, None), "latent": (number, None)})
    held = LegPath({"text": Leg(0.0, 1.0), "latent": "clean"})
    refused("must be given", sampler_on(held, 4))
    mask = torch.tensor([[True]] * 3)
    refused("without a mask", sampler_on(held, 4), given={"latent": (number, mask)})


def test_settings_out_of_range_are_refused() -> None:
    for settings, match in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"update": "newton"}, "update must be"),
    ):
        with pytest.raises(ArgumentError, match=match):
            JointSampler({"text": AncestralSampler(2)}, TOGETHER, **settings)  # type: ignore[arg-type]
    for guidance, match in (
        ({"text": Guidance(math.inf, {"latent": "prior"})}, "finite"),
        ({"text": Guidance(2.0, {})}, "must leave out other fields"),
        ({"text": Guidance(2.0, {"text": "prior"})}, "must leave out other fields"),
        ({"text": Guidance(2.0, {"latent": "clean"})}, '"absent" or "prior"'),
        ({"image": Guidance(2.0, {"latent": "prior"})}, "guidance names image"),
    ):
        refused(match, sampler_on(TOGETHER, 2, guidance=guidance))


# ---------------------------------------------------------------------- with a denoiser


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("update", ["jacobi", "gauss-seidel"])
def test_denoiser_runs_as_often_as_evaluations_are_counted(name: str, update: Any) -> None:
    torch.manual_seed(0)
    streams = {"text": StreamSpec(16, vocabulary=VOCABULARY), "latent": StreamSpec(16, dim=1)}
    head = VectorHead(1, 16)
    denoiser = JointDenoiser(
        MMDiT(streams, layers=1, heads=2, head_width=8),
        {"text": TokenHead(VOCABULARY, 16), "latent": head},
        {"text": PARAMETERIZATIONS["rest"], "latent": head.parameterization},
    ).eval()
    # With the initial weights predictions are constant, and a stage may repeat the state before it.
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network = JointDenoiserNetwork(denoiser, FIELDS)
    assert network.predicts == {"text": "distribution", "latent": "mean"}
    guidance = {"latent": Guidance(1.5, {"text": "absent"})}
    evaluations: list[bool] = []
    denoiser.backbone.register_forward_hook(lambda *_: evaluations.append(True))
    for settings in ({}, {"guidance": guidance}):
        evaluations.clear()
        drawn = draw(sampler_on(PATHS[name], 5, update=update, **settings), 6, network)
        assert drawn.nfe == len(evaluations) > 0
        assert bool((drawn.states["text"] < 2).all())
        assert bool(drawn.states["latent"].isfinite().all())
