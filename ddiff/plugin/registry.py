"""Registry of components by kind and name. Components are imported on first use.

    registry.add("process", "kimura", "ddiff_kimura.process:Kimura")
    registry.component("process", "kimura").load()

This module does not import torch or other packages of ddiff.
"""

from __future__ import annotations

import importlib
import operator
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from ddiff.errors import PluginError, shorten, suggest
from ddiff.plugin.config import ComponentConfig

KINDS: dict[str, str] = {
    "dataset": "[data]: build(config, *, length, seed, cache) -> Documents(train, validation)",
    "tokenizer": "[tokenizer]: build(config, *, documents, cache) -> Tokenizer",
    "vocabulary": "[vocabulary]: build(config, *, tokenizer, rows, cache) -> Vocabulary",
    "process": (
        "[process]: build(config, *, vocabulary, width) -> ForwardProcess, or GaussianProcess for "
        "vectors of `width` numbers (None for tokens)"
    ),
    "backbone": "[denoiser]: build(config, *, vocabulary, length, process) -> Backbone",
    "head": (
        "[denoiser] head: build(config, *, vocabulary, width, dim) -> Head, or VectorHead for "
        "vectors of `dim` numbers (None for tokens)"
    ),
    "objective": (
        "[objective]: build(config, *, process, denoiser, and its own sub-components) -> Objective"
    ),
    "training_loss": "[objective] loss: build(config, *, process) -> TrainingLoss",
    "time_rule": "[objective] times: build(config) -> TimeRule",
    "optimizer": "[train] optimizer: build(config, *, module) -> optimizer",
    "backend": "[backend]: build(config, *, device, processes, length, precision) -> Backend",
    "sampler": "[sample] sampler: build(config, *, steps, vocabulary) -> Sampler",
    "tracker": "[tracker]: build(config, *, run_dir, recipe) -> Tracker",
    "encoder": "[encoder]: build(config, *, documents, tokenizer, rows, device, cache) -> Encoder",
    "fields_dataset": "[data]: build(config, *, seed, cache) -> FieldsDocuments",
    "joint_backbone": "[denoiser]: build(config, *, streams) -> JointBackbone",
    "path_rule": (
        "[objective] times, [evaluate] path and [sample] path: build(config, *, names) -> "
        "TrainingPath"
    ),
    "normalizer": "[fields.NAME] normalizer: build(config, *, chunks, width) -> Normalizer",
    "judge": "[judge]: build(config, *, documents) -> Judge",
    "layout": "ddiff import --layout: build(config) -> Layout",
}
"""Kind -> table in a recipe, arguments of `build`, and return type of `build`."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class NoKeys(ComponentConfig):
    """Default `Config`, for components whose table has no keys."""


@dataclass(frozen=True)
class Origin:
    """Source of a component: name of the plugin, import package, distribution and version."""

    plugin: str
    package: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.package}, {self.distribution} {self.version}"


TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, with which the commands raise SystemExit."""

UNPACKAGED = Origin(
    plugin="(none)", package="this session", distribution="no distribution", version="0"
)
"""Origin of components that are added to a registry without a plugin."""


def _read_nothing(config: ComponentConfig) -> tuple[str, ...]:
    """Default of `reads`, for components whose `build` does not read files."""
    return ()


def _preview_nothing(config: ComponentConfig) -> None:
    """Default of `preview`: return None, because no description exists before `build` is called."""


@dataclass(frozen=True)
class Members:
    """Attributes that ddiff reads from a component. All except `build` have defaults.

    A component is any object with the attribute `build`, and needs no base class. The
    attributes of a component are read only through this class.
    """

    build: Callable[..., Any] | None = None
    """`build(config, **inputs)`, with any of the inputs of its kind as parameters; required."""
    Config: type[ComponentConfig] = NoKeys
    """Keys of the component's table."""
    reads: Callable[..., tuple[str, ...]] = _read_nothing
    """`reads(config)`: paths and globs that `build` will read."""
    preview: Callable[..., Any] = _preview_nothing
    """`preview(config, **inputs)`: description of the result without reading data, or None."""
    slots: tuple[str, ...] | None = None
    """Slots of its table that the component uses; None: all slots."""
    inputs: Literal["own", "previous"] = "own"
    """Objectives only: input of the denoiser at a position.

    "own": the state of the position. "previous": the token of the previous position."""
    is_distributed: bool = False
    """Backends only: whether the backend supports several processes."""
    writes: tuple[str, ...] = ()
    """Trackers only: names in the run directory that the tracker writes and `--fresh` deletes."""
    moment_bytes: float = 4.0
    """Optimizers only: lower bound of the bytes of the moments of a weight.

    The default is one moment in float32."""
    states: frozenset[str] = frozenset({"tokens"})
    """Processes, heads, losses and samplers: states of a field, "tokens", "vectors", or both.

    A sampler of models without a process has the empty set."""
    load: Callable[..., Any] | None = None
    """Normalizers: `load(config, tensors, width)` rebuilds a saved normalizer.

    `tensors` are those of `Normalizer.tensors`, and `width` the numbers of a vector of the data.
    Tokenizers: `load(config, path)` loads the file that `save` has written. None: the file is
    loaded by `load_tokenizer`, which knows only the tokenizers of ddiff."""
    formulas: str = ""
    """Formulas in plain text, which `ddiff plugins NAME` and `ddiff report` show.

    A line is a name, at least two spaces and a formula; indented lines continue the line above. The
    symbols follow after an empty line, in the same form."""
    example_vocabularies: Callable[[], list[Any]] | None = None
    """Processes only: vocabularies for which `ddiff check` builds the process."""
    example_settings: tuple[Mapping[str, Any], ...] = ()
    """Processes only: settings of the processes that `examples()` returns, in the same order.

    `ddiff check` prints them."""

    @classmethod
    def collect(cls, target: object) -> Members:
        """Read the members from the attributes of `target`, the imported object of a component.

        Attributes that `target` lacks have their default.
        """
        found: dict[str, Any] = {}
        for member in fields(cls):
            found[member.name] = getattr(target, member.name, member.default)
        # A component that is itself a class of processes or samplers has their `states`, one word.
        if isinstance(found["states"], str):
            found["states"] = frozenset({found["states"]})
        return cls(**found)


@dataclass(frozen=True)
class Component:
    """Registered component. `target` ("module:object") is imported by `load`."""

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
        """Import the object `target` and check that it has `build` and a valid `Config`.

        Raises PluginError if the import or a check fails.
        """
        module, _, path = self.target.partition(":")

        def to_plugin_error(error: BaseException) -> PluginError:
            return PluginError(
                f'The {self} cannot be loaded: importing its target "{self.target}" raised '
                f"{describe_error(error)}. Fix or reinstall the distribution, or use another "
                f"{self.kind}."
            )

        with convert_errors(to_plugin_error):
            found = operator.attrgetter(path)(importlib.import_module(module))
            self._check_contract(Members.collect(found))
        return found

    def members(self) -> Members:
        """Load the component and read its attributes. Raises PluginError if `load` fails."""
        return Members.collect(self.load())

    def config_class(self) -> type[ComponentConfig]:
        """Load the component and return its `Config`, the pydantic model of its table."""
        return self.members().Config

    def _check_contract(self, members: Members) -> None:
        if not callable(members.build):
            raise PluginError(
                f'The {self} has no build: "{self.target}" must have '
                f"{KINDS[self.kind].partition(': ')[2]} as a class method or static method."
            )
        config = members.Config
        if not (isinstance(config, type) and issubclass(config, ComponentConfig)):
            raise PluginError(
                f"The {self} has a Config that is not a ddiff.ComponentConfig: "
                f'"{self.target}.Config" is {config!r}. Derive this class from '
                "ddiff.ComponentConfig, so that unknown keys are refused."
            )
        if not isinstance(members.formulas, str):
            raise PluginError(
                f'The {self} has formulas that are not a text: "{self.target}.formulas" is '
                f"{members.formulas!r}. Write them as one str, with a name and a formula on each "
                "line."
            )


class Registry:
    """Registry of components by kind and name. The hook of a plugin calls `add`.

    Args:
        origin: source of the components that `add` registers.
        unlisted: function that returns the components of installed plugins that the recipe does
            not list; called only for the message about an unknown name.
    """

    def __init__(
        self, origin: Origin = UNPACKAGED, unlisted: Callable[[], Iterable[Component]] = tuple
    ) -> None:
        self.origin = origin
        self._unlisted = unlisted
        self._components: dict[tuple[str, str], Component] = {}

    def add(self, kind: str, name: str, target: str) -> None:
        """Register `target` ("module:object") under a kind and a name.

        Raises PluginError for an unknown kind, an invalid name or target, and a duplicate name.
        """
        if kind not in KINDS:
            raise PluginError(
                f'registry.add: there is no kind "{kind}" (for the component "{name}" from '
                f"{self.origin}).{suggest(str(kind), KINDS)} Valid kinds: {', '.join(KINDS)}."
            )
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise PluginError(
                f"registry.add: the name of a {kind} must consist of letters, digits, _ . and -; "
                f"got {name!r} (from {self.origin})."
            )
        if not (isinstance(target, str) and _TARGET.fullmatch(target)):
            raise PluginError(
                f'registry.add: the target of {kind} "{name}" must be a string "module:object", '
                f"so that the component is imported on first use; got {target!r} (from "
                f"{self.origin})."
            )
        component = Component(kind, name, target, self.origin)
        key = (kind, name)
        if key in self._components:
            raise duplicate_error(self._components[key], component)
        self._components[key] = component

    def merge(self, other: Registry) -> None:
        """Add all components of another registry.

        Raises PluginError, and adds no component, if a name is registered in both registries.
        """
        # checked first, so that either all components of a plugin are added or none
        for key, component in other._components.items():
            if key in self._components:
                raise duplicate_error(self._components[key], component)
        self._components.update(other._components)

    def component(self, kind: str, name: str) -> Component:
        """Return the component of a kind and name. Raises PluginError for an unknown name."""
        found = self._components.get((kind, name))
        if found is None:
            raise PluginError(self._explain_unknown(kind, name))
        return found

    def components(self, kind: str | None = None) -> list[Component]:
        """List all components or the components of one kind, sorted by kind and name."""
        chosen = [
            component for component in self._components.values() if kind in (None, component.kind)
        ]
        order = list(KINDS)
        return sorted(chosen, key=lambda component: (order.index(component.kind), component.name))

    def names(self, kind: str) -> list[str]:
        """List the names of the components of one kind."""
        return [component.name for component in self.components(kind)]

    def unlisted_components(self, kind: str) -> list[Component]:
        """List the components of one kind in installed plugins that the recipe does not list.

        This call imports every installed plugin, which is too slow except for an error message.
        """
        return [component for component in self._unlisted() if component.kind == kind]

    def _explain_unknown(self, kind: str, name: str) -> str:
        if kind not in KINDS:
            return (
                f'There is no kind of component "{kind}".{suggest(kind, KINDS)} '
                f"Valid kinds: {', '.join(KINDS)}."
            )
        unlisted = self.unlisted_components(kind)
        for component in unlisted:
            if component.name == name:
                return (
                    f'The {component} belongs to the plugin "{component.plugin}", which is '
                    f'installed but not listed. Add "{component.plugin}" to plugins.'
                )
        known = self.names(kind)
        others = {component.name: component.plugin for component in unlisted}
        more = ""
        for other, plugin in sorted(others.items()):
            more += f'; "{other}" with plugin "{plugin}"'
        return (
            f'There is no {kind} "{shorten(name)}".{suggest(name, [*known, *others])} '
            f"Available: {', '.join(known) or 'none in the listed plugins'}{more}."
        )


def duplicate_error(first: Component, second: Component) -> PluginError:
    """Return the PluginError for two components registered under the same kind and name."""
    if first.origin == second.origin:
        return PluginError(
            f'The plugin "{first.plugin}" ({first.origin}) registers the {first.kind} '
            f'"{first.name}" twice, as "{first.target}" and as "{second.target}". Rename one '
            "of them."
        )
    return PluginError(
        f'Two plugins claim the {first.kind} "{first.name}": "{first.plugin}" ({first.origin}) and '
        f'"{second.plugin}" ({second.origin}). List only one of these plugins in the recipe, or '
        "rename one component."
    )


# ---------------------------------------------------------------------- running plugin code


@contextmanager
def convert_errors(convert: Callable[[BaseException], PluginError]) -> Iterator[None]:
    """Convert exceptions of plugin code in a `with` block, including SystemExit, to PluginError.

    `convert`: function that returns the PluginError for an exception. A KeyboardInterrupt that the
    plugin raised is converted. A KeyboardInterrupt after Ctrl-C is not converted. To distinguish
    the two cases, a signal handler records whether SIGINT arrived. The SystemExit that the commands
    raise on SIGTERM is not converted either.
    """
    interrupts: list[int] = []
    previous: Any = None

    def note_interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        previous(number, frame)

    # Only the main thread may set handlers. If the present handler is not callable, the signal is
    # ignored or handled outside of Python, and no handler is installed.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        previous = signal.getsignal(signal.SIGINT)
    installs = callable(previous)
    if installs:
        signal.signal(signal.SIGINT, note_interrupt)
    try:
        yield
    except PluginError:
        raise
    except BaseException as error:
        if interrupts and isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            raise
        raise convert(error) from error
    finally:
        # keep a handler that the plugin has installed in the meantime
        if installs and signal.getsignal(signal.SIGINT) is note_interrupt:
            signal.signal(signal.SIGINT, previous)


def describe_error(error: BaseException) -> str:
    """Format an exception of plugin code, as `ValueError: message (file.py, line 3)`."""
    try:
        message = str(error)
    except Exception:  # `__str__` of an exception class in a plugin may fail
        message = ""
    text = " ".join(f"{type(error).__name__}: {message}".split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_import_machinery(frame.filename)
    ]
    # the innermost frame is the line of the plugin that raised the exception
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _is_import_machinery(filename: str) -> bool:
    """Return whether a file of a traceback belongs to the import machinery, not to the plugin."""
    if filename.startswith("<frozen"):
        return True
    folder = Path(filename).parent
    own_folder = Path(__file__).parent
    if folder in (own_folder, own_folder.parent):
        return True
    return folder.name in ("importlib", "metadata", "pluggy")
