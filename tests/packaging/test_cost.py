"""What an idea costs: a process is one class of at most 60 lines of code, a sampler one of at most 40.

Counted are lines that are neither blank nor comment nor docstring. Kimura of the examples, whose whole file has fewer
than 60 lines, is counted in tests/examples.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from code_count import classes, code_lines

import ddiff.sampling
from ddiff import ForwardProcess, Sampler

ROOT = Path(__file__).parents[2]
SAMPLING = Path(ddiff.sampling.__file__).parent
PROCESSES = {
    "ddiff_mdlm/process.py": "MaskedDiffusion",
    "ddiff_hdlm/process.py": "HierarchicalDiffusion",
    "ddiff_gidd/process.py": "GeneralizedInterpolation",
    "ddiff_sedd/process.py": "ScoreEntropyDiffusion",
    "ddiff_hybrid/epsilon.py": "EpsilonHybrid",
}
SAMPLERS = {
    "acs.py": ["AdaptiveCorrectionSampler"],
    "along.py": ["HyperscheduleSampler"],
    "analytic.py": ["AnalyticSampler"],
    "ancestral.py": ["AncestralSampler"],
    "blockwise.py": ["BlockwiseSampler"],
    "corrected.py": ["PredictorCorrectorSampler", "ForwardBackward"],
    "first_hitting.py": ["FirstHittingSampler"],
    "one_level.py": ["OneLevelSampler"],
    "psi.py": ["PsiSampler", "Cap", "Rescale", "Confidence", "Loop"],
    "self_correction.py": ["SelfCorrectingSampler"],
    "shaping.py": ["ShapedSampler"],
    "stepped.py": ["GridSampler"],
    "tau_leaping.py": ["TauLeapingSampler"],
    "trapezoidal.py": ["TrapezoidalSampler"],
    "unmasking.py": ["UnmaskingSampler", "EntropyBoundSampler"],
}


@pytest.mark.parametrize("file", PROCESSES)
def test_a_familys_process_is_a_class_of_at_most_sixty_lines(file: str) -> None:
    assert classes(ROOT / "plugins" / file)[PROCESSES[file]] <= 60


def test_a_chain_outside_the_families_of_the_core_needs_no_more() -> None:
    """Masks over words that are redrawn, the chain of hybrid_gamma, with what a process must write and nothing besides.

    The plugin's own class writes, for vocabularies of any size, what the engine derives densely from these (density, step,
    events, last draw, ends). That is speed and accuracy, three times as much, and no part of the promise.
    """
    assert classes(ROOT / "tests/laws/chains.py")["ShuffledThenMasked"] <= 60
    assert classes(ROOT / "plugins/ddiff_hybrid/gamma.py")["GammaHybrid"] <= 200


def processes_of(plugin: Path) -> set[str]:
    modules = [
        f"{plugin.name}.{file.stem}" for file in plugin.glob("*.py") if file.stem != "__init__"
    ]
    found = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    return {
        value.__name__
        for value in found
        if inspect.isclass(value)
        and issubclass(value, ForwardProcess)
        and value.__module__.startswith(plugin.name)
    }


def test_no_process_of_a_plugin_goes_uncounted() -> None:
    """sedd has none of its own: it builds the core's mixture."""
    plugins = [
        path for path in sorted((ROOT / "plugins").iterdir()) if (path / "__init__.py").exists()
    ]
    found = set().union(*map(processes_of, plugins))
    assert found == {*PROCESSES.values(), "GammaHybrid"} - {"ScoreEntropyDiffusion"}


def test_a_sampler_is_a_class_of_at_most_forty_lines() -> None:
    counted = {name: lines for file in SAMPLERS for name, lines in classes(SAMPLING / file).items()}
    named = {name for names in SAMPLERS.values() for name in names}
    assert {name: counted[name] for name in named if counted[name] > 40} == {}
    assert classes(ROOT / "plugins/ddiff_ar/sampler.py")["LeftToRightSampler"] <= 40


def samplers_of(file: Path) -> set[str]:
    module = importlib.import_module(f"ddiff.sampling.{file.stem}")
    own = [
        value
        for value in vars(module).values()
        if getattr(value, "__module__", "") == module.__name__
    ]
    return {
        value.__name__
        for value in own
        if inspect.isclass(value) and hasattr(value, "run") and value is not Sampler
    }


def test_no_sampler_goes_uncounted() -> None:
    found = set().union(*map(samplers_of, SAMPLING.glob("*.py")))
    assert len(found) >= 15
    assert found <= {name for names in SAMPLERS.values() for name in names}


def test_what_counts_is_code() -> None:
    lines = [
        '"""Doc."""',
        "",
        "# why",
        "class A:",
        '    """Doc.',
        "",
        '    More."""',
        "",
        "    x: int = 1",
        '    """Of x."""',
    ]
    assert code_lines("\n".join([*lines, '    y = """a', 'b"""'])) == {4, 9, 11, 12}
