"""Named components by kind, each a target "module:object" that is imported when it is used.

    registry.add("process", "kimura", "ddiff_kimura.process:Kimura")
    registry.component("process", "kimura").load()

Knows kinds by name only: no torch, no room of the engine.
"""

from __future__ import annotations

import importlib
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ddiff.errors import PluginError, nearest, shortened
from ddiff.plugin.config import ComponentConfig

KINDS: dict[str, str] = {
    "dataset": "[data]: build(config, *, length, seed, cache) -> Documents(train, validation)",
    "tokenizer": "[tokenizer]: build(config, *, documents, cache) -> Tokenizer",
    "vocabulary": "[vocabulary]: build(config, *, tokenizer, rows, cache) -> Vocabulary",
    "process": "[process]: build(config, *, vocabulary) -> ForwardProcess",
    "backbone": "[denoiser]: build(config, *, vocabulary, length) -> Backbone",
    "head": "[denoiser] head: build(config, *, vocabulary, width) -> Head",
    "objective": "[objective]: build(config, *, process, denoiser, and its own sub-components) -> Objective",
    "training_loss": "[objective] loss: build(config, *, process) -> TrainingLoss",
    "time_rule": "[objective] times: build(config) -> TimeRule",
    "optimizer": "[train] optimizer: build(config, *, module) -> optimizer",
    "backend": "[backend]: build(config, *, device, processes, precision) -> Backend",
    "sampler": "[sample] sampler: build(config, *, steps, vocabulary) -> Sampler",
    "tracker": "[tracker]: build(config, *, run_dir, recipe) -> Tracker",
}
"""Every kind of component: the place in a recipe that names it, what `build` takes and what it returns."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class NoKeys(ComponentConfig):
    """The `Config` of a component that declares none: its table takes no keys."""


@dataclass(frozen=True)
class Origin:
    """Who registers a component: plugin (entry-point name), import package, distribution and version."""

    plugin: str
    package: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.package}, {self.distribution} {self.version}"


UNPACKAGED = Origin(
    plugin="(none)", package="this session", distribution="no distribution", version="0"
)
"""The origin of what is added to a registry by hand, outside a plugin."""


@dataclass(frozen=True)
class Component:
    """A registered name of a kind; nothing is imported before `load`."""

    kind: str
    name: str
    target: str
    origin: Origin

    @property
    def plugin(self) -> str:
        return self.origin.plugin

    @property
    def distribution(self) -> str:
        return self.origin.distribution

    @property
    def version(self) -> str:
        return self.origin.version

    def __str__(self) -> str:
        return f'{self.kind} "{self.name}" (from {self.origin})'

    def load(self) -> Any:
        """The object behind the target: it has `build(config, **inputs)` and perhaps a `Config`.

        Raises PluginError when the import fails, the object is missing or does not keep that contract.
        """
        module, _, path = self.target.partition(":")

        def refusal(error: BaseException) -> PluginError:
            return PluginError(
                f'The {self} does not load: importing its target "{self.target}" raised {describe(error)}. '
                f"Mend or reinstall that distribution, or name another {self.kind}."
            )

        with reported(refusal):
            found = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
            self._check_contract(found)
        return found

    def config_class(self) -> type[ComponentConfig]:
        """The model of the component's table."""
        return getattr(self.load(), "Config", NoKeys)

    def _check_contract(self, found: Any) -> None:
        if not callable(getattr(found, "build", None)):
            raise PluginError(
                f'The {self} has no build: "{self.target}" must offer {KINDS[self.kind].partition(": ")[2]}, '
                "as a class method or static method."
            )
        config = getattr(found, "Config", NoKeys)
        if not (isinstance(config, type) and issubclass(config, ComponentConfig)):
            raise PluginError(
                f'The {self} has a Config that is not a ddiff.ComponentConfig: "{self.target}.Config" is {config!r}. '
                "Derive it from ddiff.ComponentConfig, so that unknown keys are refused."
            )


class Registry:
    """Components by kind and name; a plugin's hook is handed one and fills it with `add`.

    `unlisted` gives the components of installed plugins that were not asked for; it is called only to explain a name
    that is not here.
    """

    def __init__(
        self, origin: Origin = UNPACKAGED, unlisted: Callable[[], Iterable[Component]] = tuple
    ) -> None:
        self.origin = origin
        self._unlisted = unlisted
        self._components: dict[tuple[str, str], Component] = {}

    def add(self, kind: str, name: str, target: str) -> None:
        """Register `target` ("module:object") under a kind and a name.

        Raises PluginError for an unknown kind, a malformed name or target, and a name that is taken.
        """
        if kind not in KINDS:
            raise PluginError(
                f'registry.add: there is no kind "{kind}" (for the component "{name}" from {self.origin}).'
                f"{nearest(str(kind), KINDS)} The kinds are: {', '.join(KINDS)}."
            )
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise PluginError(
                f"registry.add: the name of a {kind} must be a word of letters, digits, _ . and -; got {name!r} "
                f"(from {self.origin})."
            )
        if not (isinstance(target, str) and _TARGET.fullmatch(target)):
            raise PluginError(
                f'registry.add: the target of {kind} "{name}" must be a string "module:object", which is imported only '
                f"when a recipe names it; got {target!r} (from {self.origin})."
            )
        self._admit(Component(kind, name, target, self.origin))

    def admit(self, other: Registry) -> None:
        """Take all components of another registry, or none: PluginError when a name is taken."""
        taken = [self._components[key] for key in other._components if key in self._components]
        if taken:
            refuse_twice(taken[0], other._components[taken[0].kind, taken[0].name])
        self._components.update(other._components)

    def component(self, kind: str, name: str) -> Component:
        """The component of that kind and name; PluginError says what there is instead, and where."""
        found = self._components.get((kind, name))
        if found is None:
            raise PluginError(self._explain_unknown(kind, name))
        return found

    def components(self, kind: str | None = None) -> list[Component]:
        """All components, or those of one kind, by kind and name."""
        chosen = [
            component for component in self._components.values() if kind in (None, component.kind)
        ]
        return sorted(
            chosen, key=lambda component: (list(KINDS).index(component.kind), component.name)
        )

    def names(self, kind: str) -> list[str]:
        return [component.name for component in self.components(kind)]

    def _admit(self, component: Component) -> None:
        key = component.kind, component.name
        if key in self._components:
            refuse_twice(self._components[key], component)
        self._components[key] = component

    def _explain_unknown(self, kind: str, name: str) -> str:
        if kind not in KINDS:
            return f'There is no kind of component "{kind}".{nearest(kind, KINDS)} The kinds are: {", ".join(KINDS)}.'
        unlisted = [component for component in self._unlisted() if component.kind == kind]
        for component in unlisted:
            if component.name == name:
                return (
                    f'The {component} belongs to the plugin "{component.plugin}", which is installed but not listed. '
                    f'Add "{component.plugin}" to plugins.'
                )
        known = self.names(kind)
        others = {component.name: component.plugin for component in unlisted}
        more = "".join(
            f'; "{other}" with plugin "{plugin}"' for other, plugin in sorted(others.items())
        )
        return (
            f'There is no {kind} "{shortened(name)}".{nearest(name, [*known, *others])} '
            f"There is: {', '.join(known) or 'none in the listed plugins'}{more}."
        )


@contextmanager
def reported(refusal: Callable[[BaseException], PluginError]) -> Iterator[None]:
    """Run somebody else's code: whatever it raises becomes a PluginError, SystemExit and KeyboardInterrupt included.

    A Ctrl-C of the user stays one: it is told from a KeyboardInterrupt of the code by the signal that came.
    """
    interrupted: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        if callable(before):
            before(number, frame)

    before: Any = None
    listens = threading.current_thread() is threading.main_thread()
    if listens:
        before = signal.getsignal(signal.SIGINT)
        listens = callable(before)  # else the signal is ignored, or handled outside of Python
    if listens:
        signal.signal(signal.SIGINT, receive)
    try:
        yield
    except PluginError:
        raise
    except BaseException as error:
        if interrupted and isinstance(error, KeyboardInterrupt):
            raise
        raise refusal(error) from error
    finally:
        if listens and signal.getsignal(signal.SIGINT) is receive:
            signal.signal(signal.SIGINT, before)


def refuse_twice(first: Component, second: Component) -> None:
    """Raise the PluginError of two components that claim one name."""
    if first.origin == second.origin:
        raise PluginError(
            f'The plugin "{first.plugin}" ({first.origin}) registers the {first.kind} "{first.name}" twice, as '
            f'"{first.target}" and as "{second.target}". Give each its own name.'
        )
    raise PluginError(
        f'Two plugins claim the {first.kind} "{first.name}": "{first.plugin}" ({first.origin}) and "{second.plugin}" '
        f"({second.origin}). List only one of them in plugins, or have one renamed."
    )


def describe(error: BaseException) -> str:
    """`ValueError: message (file.py, line 3)`: what went wrong in somebody else's code, and where, in one line."""
    try:
        words = str(error)
    except Exception:  # of a class whose own text fails
        words = ""
    text = " ".join(f"{type(error).__name__}: {words}".split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_machinery(frame.filename)
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _is_machinery(filename: str) -> bool:
    """The frames of importing itself, which say nothing about the plugin."""
    return filename.startswith("<frozen") or Path(filename).parent.name in (
        "importlib",
        "metadata",
        "pluggy",
        "ddiff",
    )
