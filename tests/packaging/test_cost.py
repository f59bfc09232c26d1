"""Cost of an idea: a process is a class of at most 560 code tokens, a sampler one of at most 650.

Counted are the tokens of the class as Python's tokenizer gives them, without comments, docstrings
and layout, and its methods. Lines are not counted: a cap on lines makes code dense, and a cap on
tokens leaves it room. Code spread over more methods counts the same, up to
the limit of methods, beyond which a class does more than one thing.

The process of the example plugin, whose whole file is small, is counted in tests/examples.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from code_count import class_size

import ddiff
import ddiff.sampling
from ddiff import ForwardProcess, Sampler

ROOT = Path(__file__).parents[2]
SAMPLING = Path(ddiff.sampling.__file__).parent

PROCESS_TOKENS = 560
PROCESS_METHODS = 10
SAMPLER_TOKENS = 650
SAMPLER_METHODS = 10

PROCESSES = {
    "ddiff_mdlm/process.py": "MaskedDiffusion",
    "ddiff_hdlm/process.py": "HierarchicalDiffusion",
    "ddiff_gidd/process.py": "GeneralizedInterpolation",
    "ddiff_sedd/process.py": "ScoreEntropyDiffusion",
    "ddiff_hybrid/epsilon.py": "EpsilonHybrid",
}
SAMPLER_PARTS = (
    ddiff.ForwardBackward,
    ddiff.CapRemasking,
    ddiff.RescaleRemasking,
    ddiff.ConfidenceRemasking,
    ddiff.LoopRemasking,
)
"""Small classes that a sampler is given; each is an idea as well."""


@pytest.mark.parametrize("file", PROCESSES)
def test_process_class_of_model_family_has_at_most_560_tokens(file: str) -> None:
    tokens, methods = class_size(ROOT / "plugins" / file, PROCESSES[file])
    assert tokens <= PROCESS_TOKENS
    assert methods <= PROCESS_METHODS


def test_gamma_hybrid_processes_stay_below_their_token_limits() -> None:
    """The chain of hybrid_gamma, masks over redrawn tokens, needs only what a process must write.

    The plugin's own class also writes what the engine derives densely from these (density, step,
    events, last draw, ends), for vocabularies of any size. That buys speed and accuracy with six
    times the code, and is not part of the promise.
    """
    tokens, methods = class_size(ROOT / "tests/laws/chains.py", "ShuffledThenMasked")
    assert tokens <= PROCESS_TOKENS
    assert methods <= PROCESS_METHODS
    tokens, methods = class_size(ROOT / "plugins/ddiff_hybrid/gamma.py", "GammaHybrid")
    assert tokens <= 3200
    assert methods <= 40


def processes_of(plugin: Path) -> set[str]:
    """Names of the process classes that a plugin defines."""
    found = set()
    for file in plugin.glob("*.py"):
        if file.stem == "__init__":
            continue
        for value in vars(importlib.import_module(f"{plugin.name}.{file.stem}")).values():
            is_own = getattr(value, "__module__", "").startswith(plugin.name)
            if inspect.isclass(value) and issubclass(value, ForwardProcess) and is_own:
                found.add(value.__name__)
    return found


def test_every_process_class_of_plugins_has_a_token_limit() -> None:
    """ddiff_sedd defines no process class: it builds the core's mixture."""
    plugins = [path.parent for path in sorted((ROOT / "plugins").glob("*/__init__.py"))]
    found = set().union(*map(processes_of, plugins))
    assert found == {*PROCESSES.values(), "GammaHybrid"} - {"ScoreEntropyDiffusion"}


def samplers_of(file: Path) -> list[type]:
    """The sampler classes that a module of ddiff.sampling defines: those that have `run`."""
    module = importlib.import_module(f"ddiff.sampling.{file.stem}")
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and hasattr(value, "run")
        and value is not Sampler
    ]


def test_every_sampler_class_has_at_most_650_tokens() -> None:
    found = [sampler for file in sorted(SAMPLING.glob("*.py")) for sampler in samplers_of(file)]
    assert len(found) >= 15  # a wrong folder would make this true
    sizes = {
        sampler.__name__: class_size(Path(inspect.getfile(sampler)), sampler.__name__)
        for sampler in (*found, *SAMPLER_PARTS)
    }
    sizes["LeftToRightSampler"] = class_size(
        ROOT / "plugins/ddiff_ar/sampler.py", "LeftToRightSampler"
    )
    large = {
        name: (tokens, methods)
        for name, (tokens, methods) in sizes.items()
        if tokens > SAMPLER_TOKENS or methods > SAMPLER_METHODS
    }
    assert large == {}
