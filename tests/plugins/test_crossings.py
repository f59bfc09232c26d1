"""Combinations that need no special code: trees that redraw tokens, hyperschedules, remasking."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_hybrid.gamma import GammaHybrid
from exact_windows import ENTROPY, cost_of_ends, exact_prediction, exact_terms, mean
from restless_tree import RestlessTree
from torch import Tensor

import ddiff
from ddiff import (
    AncestralSampler,
    ArgumentError,
    CapRemasking,
    FlatTimes,
    FlatVocabulary,
    ForwardProcess,
    HierarchicalVocabulary,
    Kernel,
    LogTimeClock,
    LoopRemasking,
    Noisy,
    PsiSampler,
    RescaleRemasking,
    TimeRule,
    TreeKernel,
    TreeProcess,
    WindowTimes,
)
from ddiff.sampling.loop import Canvas
from ddiff.testing import assert_laws, chain, check_process
from ddiff.testing.bound import WHOLE, exact_nelbo, random_joint, rest_conditional_table
from ddiff.testing.probes import INNER, ReachableRows, likelihoods, times
from ddiff.testing.sampler_distribution import ExactNetwork, ShiftedSobolRng, measure_sampler

# A few dozen float64 operations on numbers up to 1e4, compared relatively.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
TREE = HierarchicalVocabulary([[0, 1, 0]])


def restless(below: int, redrawing: float = 0.7) -> RestlessTree:
    return RestlessTree(TREE, LogTimeClock((1.0, 1.0)), redrawing, below)


def hdlm(**keys: Any) -> HierarchicalDiffusion:
    return HierarchicalDiffusion.build(HierarchicalDiffusion.Config(**keys), vocabulary=TREE)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------------- restless tree


@pytest.mark.parametrize("process", RestlessTree.examples(), ids=["tokens", "tokens and clusters"])
def test_tree_that_redraws_tokens_passes_every_conformance_check(process: ForwardProcess) -> None:
    assert_laws(check_process(process))


class RatesWithoutRedrawing(RestlessTree):
    """Fault: the rates do not redraw tokens."""

    def rates(self, t: Tensor) -> Kernel:
        return TreeKernel(self.clock.generator(t), self.parents)


def test_conformance_check_detects_rates_that_never_redraw_tokens() -> None:
    assert chain.transition_is_oracle(restless(1)).passed
    faulty = RatesWithoutRedrawing(TREE, LogTimeClock((1.0, 1.0)), 0.7)
    assert not chain.transition_is_oracle(faulty).passed


def test_restless_tree_with_redraw_rate_0_equals_tree_process() -> None:
    process, tree = restless(2, 0.0), TreeProcess(TREE, LogTimeClock((1.0, 1.0)))
    t = times(INNER)
    torch.testing.assert_close(likelihoods(process, t), likelihoods(tree, t), **CLOSE)
    torch.testing.assert_close(process.rates(t).dense(), tree.rates(t).dense(), **CLOSE)
    rows = ReachableRows(tree, t)
    asked = (rows.dist, rows.x0, rows.zt, rows.t)
    torch.testing.assert_close(process.density(*asked), tree.density(*asked), **CLOSE)


def test_redrawing_tree_process_without_clusters_equals_gamma_hybrid() -> None:
    """The gamma-hybrid redraws tokens at gamma/(1 - gamma) times its mask rate."""
    flat, gamma = FlatVocabulary(4), 0.4
    process, hybrid = (
        RestlessTree(flat, LogTimeClock((1.0,)), gamma / (1.0 - gamma)),
        GammaHybrid(flat, gamma),
    )
    t = times(INNER)
    torch.testing.assert_close(process.rates(t).dense(), hybrid.rates(t).dense(), **CLOSE)
    torch.testing.assert_close(
        process.transition(0.5 * t, t).dense(), hybrid.transition(0.5 * t, t).dense(), **CLOSE
    )
    rows = ReachableRows(hybrid, t)
    asked = (rows.dist, rows.x0, rows.zt, rows.t)
    torch.testing.assert_close(process.density(*asked), hybrid.density(*asked), **CLOSE)


def test_tree_that_redraws_tokens_draws_below_a_common_ancestor() -> None:
    """A token is replaced by a token below the same ancestor, on the level given by `below`.

    Cluster 3 has tokens 0 and 2, and cluster 4 has token 1. A cluster is replaced in proportion to
    the numbers of tokens, 2/3 and 1/3.
    """
    within, across = (likelihoods(restless(below), times((0.5,)))[0] for below in (1, 2))
    assert within[0, 1] == within[1, 0] == within[1, 2] == within[0, 4] == within[1, 3] == 0.0
    assert within[0, 2] > 0.05
    lost = 1.0 - 0.5**0.7
    assert float(across[1, 3] / across[1, 3:5].sum()) == pytest.approx(lost * 2 / 3, rel=1e-11)


@pytest.mark.parametrize("below", [1, 2])
def test_exact_bound_of_tree_that_redraws_tokens_is_the_entropy(below: int) -> None:
    log_joint = random_joint(3)
    entropy = -(log_joint.exp() * log_joint).sum()
    process = restless(below)
    total = exact_nelbo(process, rest_conditional_table(process, log_joint), 2, WHOLE).total
    # Quadrature has an error of 1e-9, and so have the times within 1e-12 of the ends.
    assert float((log_joint.exp().reshape(-1) * total).sum()) == pytest.approx(
        float(entropy), abs=1e-8
    )


@pytest.mark.parametrize("below", [1, 2])
def test_samples_of_tree_that_redraws_tokens_converge_to_the_data_distribution(below: int) -> None:
    """The error is of first order: 64 steps have a sixteenth of the error of 4 steps.

    The measured error is 0.14 or 0.17 for 4 steps. For 64 steps it is between 0.007 and 0.017 over
    five seeds, including sampling noise.
    """
    far, near = (
        measure_sampler(
            AncestralSampler(steps), restless(below), JOINT, points=2**12, apart=True
        ).distance(JOINT)
        for steps in (4, 64)
    )
    assert near < 0.025
    assert far > 4 * near


def test_tree_that_redraws_tokens_refuses_invalid_rate_and_level() -> None:
    for arguments in (
        {"redrawing": -1.0},
        {"redrawing": 1.0, "below": 3},
        {"redrawing": 1.0, "below": 0},
    ):
        with pytest.raises(
            ArgumentError,
            match=r"redrawing must be a rate in \[0, 20\] and below a level in 1\.\.2",
        ):
            RestlessTree(TREE, LogTimeClock((1.0, 1.0)), **arguments)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- hyperschedules over a tree

RULES: dict[str, TimeRule] = {
    "flat": FlatTimes(),
    "quenched": WindowTimes(1),
    "block, paired": WindowTimes(2, "block", True),
    "block, single": WindowTimes(2, "block", False),
    "slide, paired": WindowTimes(2, "slide", True),
    "slide, single": WindowTimes(2, "slide", False),
}


@pytest.mark.parametrize("rule", RULES)
def test_hdlm_bound_of_exact_prediction_is_the_entropy_with_every_time_rule(rule: str) -> None:
    """For gamma = 2 the marginals are polynomials in t, so quadrature is exact up to rounding."""
    closing, diffusion, decoding = exact_terms(hdlm(gamma=2.0), RULES[rule])
    assert not closing.any()
    assert not decoding.any()
    assert mean(diffusion) == pytest.approx(float(ENTROPY), abs=1e-11)


@pytest.mark.parametrize("keys", [{"gamma": 0.5}, {"gamma": 1.0, "xi": 0.8}], ids=str)
@pytest.mark.parametrize("rule", ["quenched", "block, paired", "slide, paired"])
def test_hdlm_bound_on_a_time_window_is_entropy_plus_cost_of_prior_and_decoding_terms(
    rule: str, keys: dict[str, float]
) -> None:
    """Decoding and prior term cost nats only if several positions are noised together."""
    process, window = hdlm(**keys), (0.05, 0.9)
    cost = float(cost_of_ends(process, window, [[0, 1], [2]])) if rule == "block, paired" else 0.0
    total = mean(sum(exact_terms(process, RULES[rule].with_window(*window))))
    # The error of six panels of six nodes for integrands that grow as 1/t.
    assert total == pytest.approx(float(ENTROPY) + cost, abs=1e-6)


@pytest.mark.parametrize("rule", ["block, paired", "slide, paired"])
def test_hdlm_bound_rises_if_the_clean_prefix_is_ignored(rule: str) -> None:
    """A network that ignores the clean tokens of earlier blocks has a bound above the entropy."""
    process, blind = hdlm(gamma=2.0), exact_prediction(hdlm(gamma=2.0))

    def forgetful(noisy: Noisy) -> Tensor:
        alone = torch.arange(noisy.zt.shape[1]).expand(len(noisy.zt), -1)
        return blind(
            noisy._replace(
                block=alone, memory=None, clean=torch.zeros_like(noisy.clean), t=noisy.t * 0 + 1.0
            )
        )

    assert mean(sum(exact_terms(process, RULES[rule], forgetful))) > float(ENTROPY) + 0.05


# ---------------------------------------------------------------------- training

SMALL = (
    'data={kind = "text", files = ["corpus.txt"], split = "line", held_out = 0.2, length = 16}',
    "tokenizer.size=270",
    "vocabulary.sizes=[8]",
    "denoiser.width=16",
    "denoiser.layers=1",
    "denoiser.heads=2",
    "train.steps=12",
    "train.batch=8",
    "train.warmup=2",
    "evaluate.batch=16",
    "evaluate.draws=2",
    "sample.steps=8",
    "sample.count=2",
)
CORPUS = "\n".join(
    f"the {a} {b} sat on the {c}" for a in ("old", "red") for b in ("cat", "hat") for c in "xyzabcd"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("crossings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        Path("corpus.txt").write_text(CORPUS)
        yield folder


def learns(run: ddiff.Run) -> None:
    """Check that text like the training text has a lower bound than uniformly random tokens."""
    assert run.nelbo(CORPUS.splitlines()[:8]).nelbo_nats_per_token < math.log(269)


HYPER = {
    "block": ("{kind = 'block', width = 4}", "{kind = 'blockwise', width = 4}"),
    "slide": ("{kind = 'slide', width = 4}", "{kind = 'hyperschedule', width = 4}"),
    "slide alone": (
        "{kind = 'slide', width = 4, paired = false}",
        "{kind = 'hyperschedule', width = 4, inner = 'psi'}",
    ),
    "quenched": ("quenched", "{kind = 'hyperschedule', width = 1, shape = 'block'}"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "xi"), [*((rule, 1.0) for rule in HYPER), ("slide", 0.8)])
def test_hdlm_trains_and_samples_with_noise_times_per_position(
    place: Path, rule: str, xi: float
) -> None:
    times_of, sampler = HYPER[rule]
    named = f"hyper_{rule.replace(' ', '_')}_{xi}"
    asked = [
        f"name={named}",
        f"process.xi={xi}",
        f"objective.times={times_of}",
        f"sample.sampler={sampler}",
    ]
    run = ddiff.run("hdlm_small", settings=[*SMALL, "sample.steps=20", *asked])
    learns(run)
    (sample,) = run.sample(1, prompt="the old", seed=2)
    assert sample["text"].startswith("the old")
    assert max(sample["ids"]) < run.vocabulary.num_tokens


@pytest.fixture(scope="module")
def flat(place: Path) -> ddiff.Run:
    return ddiff.run("hdlm_small", settings=[*SMALL, "name=flat"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        ("psi", ["kappa=0.5"]),
        ("remdm", []),
        ("remdm", ["setting=rescale", "eta=0.3"]),
        ("remdm", ["setting=confidence"]),
        ("remdm", ["setting=loop", "eta=0.3"]),
    ],
    ids=str,
)
def test_remasking_on_a_tree_moves_tokens_up_and_ends_with_tokens(
    flat: ddiff.Run, sampler: str, settings: list[str]
) -> None:
    seen: list[Canvas] = []
    drawn = flat.sample(
        16,
        sampler=sampler,
        settings=settings,
        steps=32,
        seed=3,
        prompt="the",
        on_step=lambda step, c: seen.append(c),
    )
    words = flat.vocabulary.num_tokens
    assert all(sample["text"].startswith("the") and max(sample["ids"]) < words for sample in drawn)
    level = torch.stack([flat.vocabulary.level_of(canvas.zt) for canvas in seen])
    up = level[1:] > level[:-1]
    assert bool(up.any())
    assert not bool(up[..., 0].any())  # the prompt does not change


@pytest.mark.slow
def test_tree_that_redraws_tokens_trains_in_a_shipped_recipe(place: Path) -> None:
    """Train a shipped recipe with a process object passed to `ddiff.run`, and sample.

    The sampler "acs" requires noise on visible tokens, which this process has.
    """
    vocabulary = HierarchicalVocabulary([[word % 8 for word in range(270)]])
    process = RestlessTree(vocabulary, LogTimeClock((1.0, 1.0)), redrawing=0.5, below=2)
    # The loss "hard" of the recipe is defined only for trees that redraw no token.
    loss = 'objective.loss={kind="clip", largest=10.0}'
    recipe = ddiff.read_recipe("hdlm_small", [*SMALL, "name=restless", loss])
    run = ddiff.run(recipe, vocabulary=vocabulary, process=process)
    learns(run)
    for sampler in ("ancestral", "psi", "acs"):
        (sample,) = run.sample(1, sampler=sampler, steps=8, seed=1)
        assert max(sample["ids"]) < vocabulary.num_tokens


# ---------------------------------------------------------------------- psi on a tree


def after_a_psi_step(process: ForwardProcess, sampler: PsiSampler, t: float, s: float) -> Tensor:
    """Return the joint distribution [S,S] of two positions after a step of the first position.

    Before the step, both positions follow q_t. The step moves the first position to time s, and the
    second position stays at time t.
    """
    size, points = process.vocabulary.num_states, 2**15
    marginal = likelihoods(process, times((t,)))[0]
    before = torch.einsum("ab,ai,bj->ij", JOINT, marginal, marginal).reshape(-1)
    possible = (before > 0).nonzero().squeeze(-1)
    counts = (points * before[possible]).long().clamp(min=64)
    zt = torch.cartesian_prod(torch.arange(size), torch.arange(size))[possible].repeat_interleave(
        counts, 0
    )
    weight = (before[possible] / counts).repeat_interleave(counts)
    free = torch.zeros(zt.shape, dtype=torch.bool)
    free[:, 0] = True
    at = torch.full(zt.shape, t, dtype=torch.float64)
    noise: Any = ShiftedSobolRng(counts, seed=5)
    canvas = Canvas(zt, at, torch.zeros_like(free), free)
    moved = sampler.move(
        process, ExactNetwork(process, JOINT), canvas, torch.full_like(at, s), noise
    )
    return torch.bincount(
        moved.zt[:, 0] * size + moved.zt[:, 1], weights=weight, minlength=size * size
    ).reshape(size, -1)


def joint_at(process: ForwardProcess, s: float, t: float) -> Tensor:
    """Return the exact joint distribution [S,S] of the first position at s and the second at t."""
    first, second = likelihoods(process, times((s, t)))
    return torch.einsum("ab,ai,bj->ij", JOINT, first, second)


PSI = {
    "ancestral": (PsiSampler(8, 1.0), 0.7, 0.4),
    "half": (PsiSampler(8, 0.5), 0.7, 0.4),
    "none": (PsiSampler(8, 0.0), 0.7, 0.4),
    "cap": (PsiSampler(8, CapRemasking(0.2)), 0.3, 0.2),
    "rescale": (PsiSampler(8, RescaleRemasking(0.5)), 0.3, 0.2),
    "loop": (PsiSampler(8, LoopRemasking(0.4)), 0.3, 0.3),
}
# 2^15 Sobol points over all canvases: the distance was at most .0040 over seeds 0..9.
EVEN = 0.006


@pytest.mark.parametrize(
    "process", [hdlm(gamma=0.5), hdlm(gamma=2.0, xi=0.8)], ids=["sure", "unsure"]
)
@pytest.mark.parametrize("case", PSI)
def test_psi_sampler_step_keeps_the_marginals_of_a_tree_process(
    case: str, process: ForwardProcess
) -> None:
    """After a step to s, both positions have the joint distribution of the forward process.

    This holds for any kappa, the weight of the posterior in the step.
    """
    sampler, t, s = PSI[case]
    moved = after_a_psi_step(process, sampler, t, s)
    assert 0.5 * float((moved - joint_at(process, s, t)).abs().sum()) < EVEN
    if s < t:
        assert 0.5 * float((moved - joint_at(process, t, t)).abs().sum()) > 5 * EVEN


def test_marginal_check_of_psi_step_detects_tokens_noised_to_a_wrong_time() -> None:
    process = hdlm(gamma=0.5)
    late = copy.copy(process)

    def sample_late(x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return process.sample(x0, torch.full_like(t, 0.7), u)

    late.sample = sample_late  # type: ignore[method-assign]
    sampler, t, s = PSI["half"]
    moved = after_a_psi_step(late, sampler, t, s)
    assert 0.5 * float((moved - joint_at(process, s, t)).abs().sum()) > 5 * EVEN
