"""Statements of README and docs/samplers.md on samplers agree with measurements."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from joint import JOINT

from ddiff import (
    ArgumentError,
    FlatVocabulary,
    HierarchicalVocabulary,
    MixtureProcess,
    TreeProcess,
    guide_network,
)
from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import token_distribution
from ddiff.core.elbo import network_from_noisy
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.plugin.loader import load_plugins
from ddiff.recipe.component import ComponentSpec
from ddiff.sampling.tau_leaping import TauLeapingSampler
from ddiff.testing.sampler_distribution import measure_sampler

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "samplers.md").read_text()
README = (ROOT / "README.md").read_text()
NOISE = 0.015  # limit of the statistical error of a distance; the page gives about 0.008

Table = dict[str, tuple[str, list[float]]]  # label -> accuracy, distances by number of steps


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "sampler_matrix", ROOT / "benchmarks" / "sampler_matrix.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables() -> dict[str, Table]:
    """Return the tables of docs/samplers.md by process."""
    found: dict[str, Table] = {}
    name = ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            name = line[3:]
        elif name and line.startswith("| ") and not line.startswith("| sampler"):
            label, kind, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            numbers = [float(cell.partition("<")[0]) for cell in cells if cell]
            found.setdefault(name, {})[label] = (kind, numbers)
    return found


TABLES = tables()
ROWS = [(process, label) for process, table in TABLES.items() for label in table]


def test_docs_samplers_page_has_a_table_for_every_benchmark_process() -> None:
    assert set(TABLES) == set(benchmark().processes())


@pytest.mark.parametrize(
    ("process", "label"), [row for row in ROWS if TABLES[row[0]][row[1]][0] == "exact"]
)
def test_docs_samplers_page_shows_no_error_for_exact_samplers(process: str, label: str) -> None:
    """Distances of exact samplers are within sampling noise, except for hybrid_epsilon.

    hybrid_epsilon redraws a tenth of the tokens at t = 0. The final decoding step replaces both
    tokens independently, which adds an error.
    """
    _, distances = TABLES[process][label]
    shuffled = (0.1 * 2) ** 2 / 2 if process == "hybrid_epsilon" else 0.0
    assert max(distances) < shuffled + NOISE


@pytest.mark.parametrize(
    ("process", "label"), [row for row in ROWS if "order" in TABLES[row[0]][row[1]][0]]
)
def test_samplers_page_error_of_convergent_samplers_falls_with_steps(
    process: str, label: str
) -> None:
    """At order 1, 64 steps have an eighth of the distance of 8 steps; a third is accepted."""
    _, distances = TABLES[process][label]
    floor = (0.1 * 2) ** 2 / 2 if process == "hybrid_epsilon" else 0.0
    assert distances[-1] < floor + max(NOISE, (distances[3] - floor) / 3.0)


@pytest.mark.parametrize("process", [name for name in TABLES if "hdlm" not in name])
@pytest.mark.parametrize("sampler", ["analytic", "tau_leaping", "trapezoidal"])
def test_samplers_page_has_equal_errors_for_scores_and_distributions(
    process: str, sampler: str
) -> None:
    """Distances from scores must equal those from distributions, up to sampling noise."""
    _, of_law = TABLES[process][sampler]
    _, of_score = TABLES[process][f"{sampler}, score"]
    assert len(of_law) == len(of_score) == 7
    for dist, score in zip(of_law, of_score):
        assert score == pytest.approx(dist, abs=0.01)


@pytest.mark.parametrize(
    ("process", "label", "predicts", "steps"),
    [
        ("mdlm", "ancestral", "distribution", 2),
        ("mdlm", "analytic", "score", 4),
        ("sedd uniform", "tau_leaping", "score", 4),
        ("hybrid_gamma", "analytic", "score", 2),
        ("hybrid_epsilon", "tau_leaping", "distribution", 2),
        ("dense", "analytic", "score", 2),
    ],
)
def test_numbers_in_docs_samplers_md_equal_recomputed_numbers(
    process: str, label: str, predicts: str, steps: int
) -> None:
    """The benchmark has fixed seeds, so results differ between machines only by rounding."""
    matrix = benchmark()
    line = matrix.row(
        label,
        matrix.SAMPLERS[label],
        matrix.processes()[process](),
        (steps,),
        2**12,
        predicts,
        process,
    )
    computed = float(line.split("|")[3].partition("<")[0])
    place = (1, 2, 4, 8, 16, 32, 64).index(steps)
    _, distances = TABLES[process][label if predicts == "distribution" else f"{label}, score"]
    assert computed == pytest.approx(distances[place], abs=3e-3)


def test_readme_lists_every_sampler_with_its_declared_accuracy() -> None:
    lines = README[README.index("**Samplers**") :].splitlines()
    group = ""
    listed: dict[str, str] = {}
    for line in lines[lines.index("| accuracy | `kind` | method |") + 2 :]:
        if not line.startswith("|"):
            break
        kind, names, _ = [cell.strip() for cell in line.strip("|").split("|", 2)]
        group = kind or group
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", names), group)
    registry = load_plugins(["ar"])
    vocabulary = FlatVocabulary(4)
    declared = {}
    for name in listed:
        component = registry.component("sampler", name)
        keys = {"width": 2} if name in ("blockwise", "hyperschedule") else {}
        config = component.config_class()(**keys)
        sampler = ComponentSpec(component, config).build(steps=4, vocabulary=vocabulary)
        declared[name] = (
            f"order {sampler.order}" if sampler.quality == "of an order" else sampler.quality
        )
    for name, said in listed.items():
        if said != "as their inner sampler":
            assert said.startswith(declared[name]), name
    assert {"first_hitting", "trapezoidal", "ancestral", "psi"} <= set(listed)


def test_first_hitting_is_refused_if_it_would_not_be_exact() -> None:
    """The README states that the first-hitting sampler is exact for every process with events."""
    gidd = load_plugins(["gidd"]).component("process", "gidd").load()
    process = gidd.build(gidd.Config(p_uniform=0.9, gamma=0.5), vocabulary=FlatVocabulary(3))
    from ddiff.sampling.first_hitting import find_event_interval

    with pytest.raises(ArgumentError, match="drawn at once"):
        find_event_interval(process, 1e-3, 64)


# ---------------------------------------------------------------------- guidance


def _distributions() -> tuple[torch.Tensor, torch.Tensor]:
    told = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    untold = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    return told, untold


def _guided(
    process: MixtureProcess | TreeProcess, zt: torch.Tensor, t: float, s: float, weight: float
) -> torch.Tensor:
    """Return the reverse transition [S] from t to s that ddiff draws from under guidance.

    The distribution of the clean token is guided with the given weight.
    """
    told, untold = _distributions()
    asks = [
        network_from_noisy(lambda noisy, log_p=log_p: log_p.expand(1, 1, 3), process.vocabulary)
        for log_p in (told, untold)
    ]
    network = guide_network(asks[0], asks[1], weight)
    now = torch.full((1, 1), t, dtype=torch.float64)
    noisy = Noisy(zt.reshape(1, 1), now, torch.zeros(1, 1, dtype=torch.bool))
    query = network(noisy)
    log_p = query(
        torch.tensor([0]),
        torch.tensor([process.vocabulary.root]),
        lambda dist: dist.log_mass(0),
    )
    return process.reverse_log_probs(
        log_p, zt, now[0], torch.full((1,), s, dtype=torch.float64)
    ).exp()[0]


def _guided_transition(
    process: MixtureProcess | TreeProcess, zt: torch.Tensor, t: float, s: float, weight: float
) -> torch.Tensor:
    """Return the guided reverse transition of arXiv 2412.10193, a tensor [S].

    It is p(z_s|z_t)^w p_null(z_s|z_t)^(1-w), normalized, where w is the weight, and p and p_null
    are the transitions with and without the condition.
    """
    now = torch.full((1,), t, dtype=torch.float64)
    then = torch.full((1,), s, dtype=torch.float64)
    told, untold = (
        process.reverse_log_probs(log_p[None], zt, now, then) for log_p in _distributions()
    )
    mixed = weight * told + (1.0 - weight) * untold
    return mixed.nan_to_num(nan=-torch.inf).softmax(-1)[0]


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_guidance_does_not_change_the_rate_at_which_masks_are_revealed(weight: float) -> None:
    process = TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()]))
    mask = torch.tensor([3])
    assert float(_guided(process, mask, 0.8, 0.4, weight)[3]) == pytest.approx(0.5, abs=1e-12)


def test_guided_clean_distribution_differs_from_a_guided_transition() -> None:
    """Guiding the clean distribution and guiding the transition agree only for w = 0 and w = 1.

    For w = 3, the guided transition also changes the rate at which masks are revealed.
    """
    process = TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()]))
    bare = FlatVocabulary(3, mask=False)
    uniform = MixtureProcess(bare, LinearSchedule(), token_distribution(bare))
    for chain, state in ((process, 3), (uniform, 1)):
        zt = torch.tensor([state])
        for weight in (0.0, 1.0):
            ours = _guided(chain, zt, 0.8, 0.4, weight)
            theirs = _guided_transition(chain, zt, 0.8, 0.4, weight)
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)
        gap = _guided(chain, zt, 0.8, 0.4, 3.0) - _guided_transition(chain, zt, 0.8, 0.4, 3.0)
        assert float(gap.abs().max()) > 0.05


def test_tau_leaping_does_not_converge_on_trees_with_gamma_below_one() -> None:
    """For gamma < 1 the rate of leaving the mask is infinite at t = 1 (see docs/samplers.md)."""
    tree = HierarchicalVocabulary([[0, 1, 0]])
    late = TreeProcess(tree, LogTimeClock((0.5, 1.0)), xi=0.8)
    even = TreeProcess(tree, LogTimeClock((1.0, 1.0)), xi=0.8)
    distances = {
        (name, steps): measure_sampler(
            TauLeapingSampler(steps), process, JOINT, points=2**12
        ).distance(JOINT)
        for name, process in (("late", late), ("even", even))
        for steps in (32, 128)
    }
    assert distances["late", 128] > 0.04
    assert distances["late", 128] > 0.6 * distances["late", 32]
    assert distances["even", 128] < 0.04
