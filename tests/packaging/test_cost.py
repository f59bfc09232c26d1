"""Size limits: a process class has at most 560 code tokens, and a sampler class at most 650.

Code tokens are tokens of Python's tokenizer, without comments, docstrings and whitespace. Lines are
not counted, because a limit on lines leads to dense code. The number of methods is limited too,
because a class with many methods has more than one purpose.

The process of the example plugin is checked in tests/examples.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from code_count import class_size

import ddiff
import ddiff.sampling
from ddiff import ForwardProcess, Sampler
from ddiff.plugin.loader import survey_plugins

ROOT = Path(__file__).parents[2]
SAMPLING = Path(ddiff.sampling.__file__).parent

PROCESS_TOKENS = 560
PROCESS_METHODS = 10
SAMPLER_TOKENS = 650
SAMPLER_METHODS = 10

SAMPLER_PARTS = (
    ddiff.ForwardBackward,
    ddiff.CapRemasking,
    ddiff.RescaleRemasking,
    ddiff.ConfidenceRemasking,
    ddiff.LoopRemasking,
)
"""Small classes that samplers use. The limits of samplers hold for these classes too."""


def size_of(found: type) -> tuple[int, int]:
    return class_size(Path(inspect.getfile(found)), found.__name__)


def find_process_classes() -> set[type]:
    """Return the processes of plugins: their components, and other subclasses that they define."""
    components = survey_plugins().registry.components()
    found = {one.load() for one in components if one.kind == "process"}
    for file in (ROOT / "plugins").glob("*/*.py"):
        if file.stem == "__init__":
            continue
        module = importlib.import_module(f"{file.parent.name}.{file.stem}")
        for value in vars(module).values():
            is_own = (getattr(value, "__module__", None) or "").startswith(file.parent.name)
            if inspect.isclass(value) and issubclass(value, ForwardProcess) and is_own:
                found.add(value)
    return found


def test_every_process_class_of_plugins_has_at_most_560_code_tokens() -> None:
    """GammaHybrid has its own limit, below."""
    sizes = {found.__name__: size_of(found) for found in find_process_classes()}
    assert len(sizes) >= 7  # without classes, the test would pass
    del sizes["GammaHybrid"]
    large = {
        name: (tokens, methods)
        for name, (tokens, methods) in sizes.items()
        if tokens > PROCESS_TOKENS or methods > PROCESS_METHODS
    }
    assert large == {}


def test_both_gamma_hybrid_classes_stay_below_their_code_token_limits() -> None:
    """Check two implementations of the GammaHybrid process, which masks and replaces tokens.

    The minimal class in tests/laws has only the required methods and must meet the limit. The class
    of the plugin also overrides methods that the engine would derive with dense matrices, for speed
    with large vocabularies, and has a higher limit.
    """
    tokens, methods = class_size(ROOT / "tests/laws/chains.py", "ShuffledThenMasked")
    assert tokens <= PROCESS_TOKENS
    assert methods <= PROCESS_METHODS
    tokens, methods = class_size(ROOT / "plugins/ddiff_hybrid/gamma.py", "GammaHybrid")
    assert tokens <= 3200
    assert methods <= 40


def samplers_of(file: Path) -> list[type]:
    """Return the classes with a method `run` that a module of ddiff.sampling defines."""
    module = importlib.import_module(f"ddiff.sampling.{file.stem}")
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and hasattr(value, "run")
        and value is not Sampler
    ]


def test_every_sampler_class_has_at_most_650_code_tokens() -> None:
    found = [sampler for file in sorted(SAMPLING.glob("*.py")) for sampler in samplers_of(file)]
    assert len(found) >= 15  # with a wrong folder this test would pass
    sizes = {sampler.__name__: size_of(sampler) for sampler in (*found, *SAMPLER_PARTS)}
    sizes["LeftToRightSampler"] = class_size(
        ROOT / "plugins/ddiff_ar/sampler.py", "LeftToRightSampler"
    )
    large = {
        name: (tokens, methods)
        for name, (tokens, methods) in sizes.items()
        if tokens > SAMPLER_TOKENS or methods > SAMPLER_METHODS
    }
    assert large == {}
