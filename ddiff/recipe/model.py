"""Recipes: TOML text -> checked settings and the components that they name.

    recipe = read_recipe("recipes/mine.toml", settings=["train.steps=200"])
    recipe.process.build(vocabulary=vocabulary)

A recipe has a few keys of its own and a table per part of an experiment (`ddiff.recipe.schema`). A table may hold keys that
the engine reads, and otherwise belongs to the component that its `kind` names: its keys are those of that component's
`Config`. Some keys are slots for a component inside a table (`[train] optimizer`). Wherever a component is named, a string
stands for a table with nothing but a kind: `optimizer = "muon"` is `optimizer = {kind = "muon"}`.

Reading a recipe imports the components that it names, to ask for their keys; importing this module imports none.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from ddiff import __version__
from ddiff.errors import ArgumentError, DataError, PluginError, RecipeError, shorten, suggest
from ddiff.plugin.config import ComponentConfig
from ddiff.plugin.loader import installed_plugins, load_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.recipe.messages import explain, first_error, shown, table_label, unknown_key
from ddiff.recipe.schema import (
    SLOTS,
    TABLES,
    TOP_LEVEL,
    BackendKeys,
    DataKeys,
    DenoiserKeys,
    EvaluateKeys,
    SampleKeys,
    Table,
    TopLevelKeys,
    TrainKeys,
)
from ddiff.recipe.toml import (
    KeyPath,
    RecipeTree,
    read_settings,
    read_toml,
    scalars_first,
    write_toml,
)
from ddiff.run_dir.files import HEADER
from ddiff.run_dir.identity import dotted

Keys = TypeVar("Keys", bound=ComponentConfig)

LONGEST_CHAIN = 32  # recipes that extend one another
LARGEST_FILE = 2**20  # bytes of a recipe; the shipped ones have two thousand


@dataclass(frozen=True)
class ComponentSpec:
    """A component with its settings, ready to be built; `table` is its place in a recipe, as messages write it."""

    component: Component
    config: ComponentConfig
    table: str = ""

    def build(self, **inputs: Any) -> Any:
        """`build(config, ...)` with those of the inputs that it names; PluginError when it names another one.

        A component takes what it needs, so that an input that comes to a kind later breaks nobody's plugin. What it
        refuses (ArgumentError, DataError) is told with the table that it stands in.
        """
        return self._called("build", inputs)

    def reads(self) -> tuple[str, ...]:
        """The paths and globs that `build` will read, by the component's `reads(config)`; none without one."""
        return self._called("reads", {}) if hasattr(self.component.load(), "reads") else ()

    def wants(self, name: str) -> bool:
        """Whether its `build` names that input."""
        return name in inspect.signature(self.component.load().build).parameters

    def declares(self, name: str) -> bool:
        """Whether the component has the attribute `name`, and it is true."""
        return bool(getattr(self.component.load(), name, False))

    def preview(self, **inputs: Any) -> Any:
        """What is known of the result before any data is read: `preview(config, ...)` of a component that has one."""
        return (
            self._called("preview", inputs) if hasattr(self.component.load(), "preview") else None
        )

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """ArgumentError and DataError that are raised within are told with the part's table."""
        try:
            yield
        except (ArgumentError, DataError) as error:
            error.args = (f"{self.table}: {error}" if self.table else str(error),)
            raise

    def _called(self, name: str, inputs: Mapping[str, Any]) -> Any:
        function = getattr(self.component.load(), name)
        signature = inspect.signature(function)
        takes_all = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()
        )
        wanted = {
            key: value for key, value in inputs.items() if takes_all or key in signature.parameters
        }
        try:
            signature.bind(self.config, **wanted)
        except TypeError as error:
            raise PluginError(
                f"The {self.component} cannot be built: its {name}{signature} may ask for config and "
                f"{', '.join(inputs) or 'nothing else'}, but {error}."
            ) from error
        with self.blamed():
            return function(self.config, **wanted)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.component.name, **self.config.model_dump(mode="json")}


@dataclass(frozen=True)
class Recipe:
    """A recipe with every default filled in. A part is None where the recipe has none."""

    name: str
    seed: int
    run_dir: str
    plugins: tuple[str, ...]
    length: int
    data: ComponentSpec
    tokenizer: ComponentSpec
    vocabulary: ComponentSpec
    process: ComponentSpec | None
    denoiser: ComponentSpec
    given: Literal["rest", "all"]
    head: ComponentSpec | None
    objective: ComponentSpec
    loss: ComponentSpec | None
    times: ComponentSpec | None
    train: TrainKeys
    optimizer: ComponentSpec
    backend: ComponentSpec
    backend_keys: BackendKeys
    evaluate: EvaluateKeys
    sample: SampleKeys
    sampler: ComponentSpec
    tracker: ComponentSpec
    registry: Registry = field(repr=False, compare=False)
    source: str = field(default="", repr=False, compare=False)
    """The file that it was read from."""

    def parts(self) -> dict[str, ComponentSpec]:
        """Every part by its place in the recipe: `process`, `denoiser.head`, `train.optimizer`."""
        named = {
            "data": self.data, "tokenizer": self.tokenizer, "vocabulary": self.vocabulary, "process": self.process,
            "denoiser": self.denoiser, "denoiser.head": self.head,
            "objective": self.objective, "objective.loss": self.loss, "objective.times": self.times,
            "train.optimizer": self.optimizer, "backend": self.backend, "sample.sampler": self.sampler,
            "tracker": self.tracker,
        }  # fmt: skip
        return {place: part for place, part in named.items() if part is not None}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested tables of plain values, every default written out, nothing left out."""
        tree: dict[str, Any] = {
            "name": self.name, "seed": self.seed, "run_dir": self.run_dir, "plugins": list(self.plugins),
            "data": {"length": self.length}, "denoiser": {"given": self.given}, "train": self.train.model_dump(mode="json"),
            "backend": self.backend_keys.model_dump(mode="json"), "evaluate": self.evaluate.model_dump(mode="json"),
            "sample": self.sample.model_dump(mode="json"),
        }  # fmt: skip
        for place, part in self.parts().items():
            table, _, slot = place.partition(".")
            if slot:
                tree[table][slot] = part.to_dict()
            else:
                tree[table] = {**part.to_dict(), **tree.get(table, {})}
        return scalars_first({key: tree[key] for key in TOP_LEVEL if key in tree})

    def to_toml(self) -> str:
        """`to_dict` as TOML text, which reads back as the same recipe."""
        return write_toml(self.to_dict(), f"{HEADER} {__version__} resolved it.")

    def sampler_part(self, kind: str | None, settings: Iterable[str] = ()) -> ComponentSpec:
        """Another sampler, or the recipe's own, with `key=value` settings that go over its keys."""
        if kind is None and not tuple(settings):
            return self.sampler
        own = kind in (None, self.sampler.component.name)
        component = (
            self.sampler.component if kind is None else self.registry.component("sampler", kind)
        )
        return component_part(
            component, settings, self.sampler.config.model_dump(mode="json") if own else {}
        )

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of `to_dict`."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def origins(self) -> dict[str, str]:
        """Where each component comes from: `{"process": "kimura (ddiff_kimura, ddiff-kimura 1.0)"}`."""
        return {
            place: f"{part.component.name} ({part.component.origin})"
            for place, part in self.parts().items()
        }


def read_recipe(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe by path or by the name of a shipped one; `settings` are `--set` texts that go over it.

    Raises RecipeError (file, line, key, what came and what is due) and PluginError.
    """
    draft = _read_draft(str(name))
    if "extends" in draft.tree:  # or it would be written over the run of the recipe that it extends
        draft.tree.setdefault("name", PurePosixPath(draft.source).stem)
    return resolve(_extended(draft, ()), settings)


def parse_recipe(text: str, source: str = "<text>", settings: Iterable[str] = ()) -> Recipe:
    """The same for TOML text; `source` stands for the file in messages and is where `extends` looks first."""
    return resolve(_extended(_shorthand_expanded(read_toml(text, source)), ()), settings)


def resolve(draft: RecipeTree, settings: Iterable[str] = ()) -> Recipe:
    """Check a draft and load what it names."""
    if isinstance(settings, str | Mapping):
        raise ArgumentError(
            f'settings must be a list of "key=value" texts, such as ["train.steps=200"]; got {settings!r}. '
            "Put each setting into a list as one text."
        )
    draft = _shorthand_expanded(read_settings(settings, draft.source)).under(draft, _handed_on)
    _check_tables(draft)
    heading = _checked(
        TopLevelKeys,
        {key: draft.tree[key] for key in TopLevelKeys.model_fields if key in draft.tree},
        draft,
        (),
    )
    registry = _load_plugins(heading, draft)
    resolver = _Resolver(draft, registry)
    data, tokenizer, vocabulary = (
        resolver.part("data"),
        resolver.part("tokenizer"),
        resolver.part("vocabulary"),
    )
    process = resolver.part("process") if "process" in draft.tree else None
    denoiser, objective = resolver.part("denoiser"), resolver.part("objective")
    train, backend_keys = resolver.keys(TrainKeys, "train"), resolver.keys(BackendKeys, "backend")
    evaluate = resolver.keys(EvaluateKeys, "evaluate")
    _check_shares(train, backend_keys, draft)
    _check_average(train, evaluate, draft)
    return Recipe(
        name=heading.name,
        seed=heading.seed,
        run_dir=heading.run_dir or f"runs/{heading.name}",
        plugins=tuple(dict.fromkeys(heading.plugins)),
        length=resolver.keys(DataKeys, "data").length,
        data=data,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        process=process,
        denoiser=denoiser,
        given=resolver.keys(DenoiserKeys, "denoiser").given,
        head=resolver.slot("denoiser", "head"),
        objective=objective,
        loss=resolver.slot("objective", "loss"),
        times=resolver.slot("objective", "times"),
        train=train,
        optimizer=resolver.part("train", "optimizer"),
        backend=resolver.part("backend"),
        backend_keys=backend_keys,
        evaluate=evaluate,
        sample=resolver.keys(SampleKeys, "sample"),
        sampler=resolver.part("sample", "sampler"),
        tracker=resolver.part("tracker"),
        registry=registry,
        source=draft.source,
    )


def component_part(
    component: Component, settings: Iterable[str] = (), below: Mapping[str, Any] | None = None
) -> ComponentSpec:
    """A component outside a recipe, with `key=value` settings of its own over the keys `below`: what `ddiff check NAME
    --set` reads."""
    draft = read_settings(settings, "--set").under(
        RecipeTree(dict(below or {}), "--set"), lambda path, old, new: None
    )
    config = component.config_class()
    for table in draft.tree:
        if table in TABLES and table not in config.model_fields:
            raise RecipeError(
                f"{draft.place((table,))}: outside a recipe there are no tables, and keys are the {component}'s own: "
                f"leave out {table} and the dot. It takes: {', '.join(config.model_fields) or 'no keys'}."
            )
    whole = f"the {component}"
    return ComponentSpec(
        component, _checked(config, draft.tree, draft, (), known=config.model_fields, whole=whole)
    )


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The dotted keys in which two `Recipe.to_dict` differ, with both values; None where one has no such key."""
    before, after = dotted(old), dotted(new)
    keys = dict.fromkeys([*before, *after])
    return [
        (key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    ]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with ddiff, by name; `paper/<name>` in a sub-folder."""
    package = Path(__file__).parents[1]
    folder = package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.toml"))
    }


def _check_shares(train: TrainKeys, backend_keys: BackendKeys, draft: RecipeTree) -> None:
    if train.batch % (train.accumulate * backend_keys.processes):
        raise RecipeError(
            f"{draft.place(('train', 'batch'))}: [train] batch must be a multiple of accumulate times [backend] "
            f"processes, so that every process has as many rows; got batch = {train.batch}, "
            f"accumulate = {train.accumulate}, processes = {backend_keys.processes}."
        )


def _check_average(train: TrainKeys, evaluate: EvaluateKeys, draft: RecipeTree) -> None:
    if evaluate.weights == "ema" and not train.ema:
        raise RecipeError(
            f'{draft.place(("evaluate", "weights"))}: [evaluate] weights = "ema" wants a moving average of the weights, '
            'and the run keeps none. Set [train] ema, such as 0.9999, or leave weights at "auto".'
        )


class _Resolver:
    """Finds the parts and engine keys of one draft."""

    def __init__(self, draft: RecipeTree, registry: Registry) -> None:
        self.draft = draft
        self.registry = registry

    def table(self, path: tuple[str, ...]) -> dict[str, Any]:
        tree = self.draft.tree
        for key in path:
            tree = tree.get(key, {})
        return tree

    def part(self, *path: str) -> ComponentSpec:
        """The component that a place names, with its settings."""
        component, slots = self.component(path), self.slots(path)
        config, table = component.config_class(), self.table(path)
        shared = TABLES[path[0]].keys if len(path) == 1 else None
        known = list(
            dict.fromkeys([*config.model_fields, *slots, *(shared.model_fields if shared else ())])
        )
        _check_contract(component, config, slots)
        _refuse_unknown(
            [key for key in table if key not in ("kind", *known)],
            self.draft,
            path,
            component,
            known,
        )
        own = {key: value for key, value in table.items() if key in config.model_fields}
        if shared:
            # A Config that repeats a key of the engine is given what the engine reads, default or not.
            engine = self.keys(shared, path[0]).model_dump(mode="json")
            own |= {key: value for key, value in engine.items() if key in config.model_fields}
        part = ComponentSpec(
            component, _checked(config, own, self.draft, path, component, known), table_label(path)
        )
        _check_reads_back(part)
        return part

    def slot(self, table: str, key: str) -> ComponentSpec | None:
        """The component in a slot; None where the table's own component declines that slot."""
        return self.part(table, key) if key in self.slots((table,)) else None

    def slots(self, path: tuple[str, ...]) -> list[str]:
        """The slots of a component's table; a component with the attribute `slots` has those that it names there."""
        if len(path) > 1:
            return []
        offered = TABLES[path[0]].slots
        used = getattr(self.component(path).load(), "slots", offered)
        return [slot for slot in offered if slot in used]

    def keys(self, model: type[Keys], name: str) -> Keys:
        """The engine's keys in a table; in a table without a component there are no others."""
        table = TABLES[name]
        mine = model.model_fields if table.component else self.table((name,))
        values = {
            key: value
            for key, value in self.table((name,)).items()
            if key in mine and key not in table.slots
        }
        return _checked(model, values, self.draft, (name,), known=table.engine_keys())

    def component(self, path: tuple[str, ...]) -> Component:
        slot, table = SLOTS[path], self.table(path)
        name = table.get("kind", slot.default)
        label = table_label(path)
        if not isinstance(name, str):
            place = self.draft.place((*path, "kind") if "kind" in table else path)
            came = f"; got {shown(name)}" if "kind" in table else ""
            raise RecipeError(
                f"{place}: {label} needs a kind, the {slot.kind}'s name in quotes{came}. "
                f"There is: {', '.join(self.registry.names(slot.kind)) or 'none in the listed plugins'}."
            )
        try:
            return self.registry.component(slot.kind, name)
        except PluginError as error:
            raise RecipeError(
                f'{self.draft.place((*path, "kind"))}: {label} kind = "{shorten(name)}": {error}'
            ) from error


def _read_draft(name: str, place: str = "") -> RecipeTree:
    """The draft of a recipe file or shipped recipe, its shorthand expanded; `place` is where its name was written."""
    return _shorthand_expanded(read_toml(*_read_text(name, place)))


def _read_text(name: str, place: str) -> tuple[str, str]:
    """The text of a recipe and the name of its file."""
    path = Path(name)
    if "://" not in name and not _is_file(path):
        shipped = shipped_recipes()
        if name not in shipped:
            raise RecipeError(_missing_file(name, place, shipped))
        path = _shortest(shipped[name])
    try:
        written = _read_remote(name) if "://" in name else _read_local(path)
        return written.decode("utf-8-sig"), name if "://" in name else str(path)
    except (
        OSError,
        ValueError,
        ImportError,
    ) as error:  # ValueError: bytes that are no UTF-8, or an unknown protocol
        raise RecipeError(
            f"{place}{shorten(name)}: this recipe cannot be read: {shorten(str(error))}. Give the path of a readable "
            "TOML file."
        ) from error


def _read_local(path: Path) -> bytes:
    with path.open("rb") as file:
        return _limited(file.read(LARGEST_FILE + 1))


def _read_remote(name: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(name, "rb") as file:
            return _limited(file.read(LARGEST_FILE + 1))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # every protocol has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def _limited(written: bytes) -> bytes:
    if len(written) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE:,} bytes, so it is no recipe")
    return written


def _is_file(path: Path) -> bool:
    """Whether there is such a file; False for a name that no file can have, on which `Path.is_file` raises."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _missing_file(name: str, place: str, shipped: Mapping[str, Path]) -> str:
    near = suggest(PurePosixPath(name).stem, shipped) or suggest(
        name.removesuffix(".toml"), shipped
    )
    what = (
        "is a directory, not a recipe file"
        if _is_dir(Path(name))
        else "there is no such file and no shipped recipe of that name"
    )
    small = [shipped_name for shipped_name in shipped if "/" not in shipped_name]
    more = f"; all {len(shipped)}: ddiff recipes" if len(small) < len(shipped) else ""
    return f"{place}{shorten(name)}: {what}.{near} Shipped recipes: {', '.join(small) or 'none'}{more}."


def _shortest(path: Path) -> Path:
    """Relative to the working directory when that is shorter to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _extended(draft: RecipeTree, below: tuple[str, ...]) -> RecipeTree:
    """The draft over the recipe that it extends, and so on down."""
    if "extends" not in draft.tree:
        return draft
    name, place = draft.tree.pop("extends"), draft.place(("extends",))
    if not isinstance(name, str):
        raise RecipeError(
            f"{place}: extends must be the path or name of one recipe, in quotes; got {shown(name)}."
        )
    chain = (*below, draft.source)
    if len(chain) > LONGEST_CHAIN:
        raise RecipeError(
            f"{place}: recipes extend one another more than {LONGEST_CHAIN} times: {chain[0]} -> {chain[1]} -> ... -> "
            f"{shorten(name)}. Write the tables of the first few into one file."
        )
    base = _read_draft(_beside(name, draft.source), f"{place}: extends ")
    if _identity(base.source) in [_identity(source) for source in chain]:
        raise RecipeError(
            f"{place}: extends goes in a circle: {' -> '.join((*chain, base.source))}. Take one link out."
        )
    places = {
        path: f"{written} (extended by {draft.source})" for path, written in base.places.items()
    }
    return draft.under(_extended(RecipeTree(base.tree, base.source, places), chain), _handed_on)


def _beside(name: str, source: str) -> str:
    """A relative path is looked for beside the file that extends it, then as it stands."""
    beside = Path(source).parent / name
    return str(beside) if "://" not in source and _is_file(beside) else name


def _identity(source: str) -> str:
    return source if "://" in source else str(Path(source).resolve())


def _shorthand_expanded(draft: RecipeTree) -> RecipeTree:
    """`optimizer = "muon"` -> `optimizer = {kind = "muon"}` wherever a component is named."""
    for path in SLOTS:
        table = draft.tree
        for key in path[:-1]:
            table = table.get(key, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict) and isinstance(table.get(path[-1]), str):
            table[path[-1]] = {"kind": table[path[-1]]}
    return draft


def _handed_on(
    path: tuple[str, ...], below: Mapping[str, Any], above: Mapping[str, Any]
) -> frozenset[str] | None:
    """Another kind in a table means other keys: of the old table only those that the engine reads are handed on."""
    if (
        path not in SLOTS
        or "kind" not in above
        or above["kind"] == below.get("kind", SLOTS[path].default)
    ):
        return None
    return frozenset(TABLES[str(path[0])].engine_keys()) if len(path) == 1 else frozenset()


def _check_tables(draft: RecipeTree) -> None:
    """Top-level names are known, tables are tables, and the required ones are there."""
    for name in draft.tree:
        if name not in TOP_LEVEL:
            owners = [table for table, keys in TABLES.items() if name in keys.engine_keys()]
            near = f' Did you mean "{owners[0]}.{name}"?' if owners else suggest(name, TOP_LEVEL)
            raise RecipeError(
                f'{draft.place((name,))}: a recipe has no key or table "{shorten(name)}".{near} '
                f"It takes: {', '.join(TOP_LEVEL)}."
            )
    if "extends" in draft.tree:
        raise RecipeError(
            f"{draft.place(('extends',))}: extends belongs into a recipe file; it cannot be set."
        )
    for path in [*((name,) for name in TABLES), *SLOTS]:
        _check_is_table(draft, path)
    missing = [
        name for name, table in TABLES.items() if not _has_default(table) and name not in draft.tree
    ]
    if missing:
        needed = [name for name, table in TABLES.items() if not _has_default(table)]
        raise RecipeError(
            f"{draft.source}: there is no [{missing[0]}] table. A recipe needs {', '.join(needed)}; "
            'extends = "<recipe>" takes what is missing from another one.'
        )


def _check_is_table(draft: RecipeTree, path: tuple[str, ...]) -> None:
    value: Any = draft.tree
    for key in path:
        value = value.get(key, {})
    if isinstance(value, dict):
        return
    alternative = f", or the {SLOTS[path].kind}'s name in quotes" if path in SLOTS else ""
    raise RecipeError(
        f"{draft.place(path)}: {'.'.join(map(str, path))} must be a table{alternative}; got {shown(value)}."
    )


def _has_default(table: Table) -> bool:
    named = table.component is None or table.component.default is not None
    complete = table.keys is None or not any(
        key.is_required() for key in table.keys.model_fields.values()
    )
    return table.optional or (named and complete)


def _load_plugins(heading: TopLevelKeys, draft: RecipeTree) -> Registry:
    try:
        return load_plugins(heading.plugins)
    except PluginError as error:
        missing = not set(heading.plugins) <= set(installed_plugins())
        remedy = (
            " Install the distribution that brings it: pip install -e path/to/it."
            if missing
            else ""
        )
        place = draft.place(("plugins",))
        raise RecipeError(
            f"{place}: plugins = {shown(list(heading.plugins))}: {error}{remedy}"
        ) from error


def _check_contract(
    component: Component, config: type[ComponentConfig], slots: Iterable[str]
) -> None:
    reserved = [key for key in ("kind", *slots) if key in config.model_fields]
    if reserved:
        raise PluginError(
            f'The Config of the {component} has the key "{reserved[0]}", which names a component in that table of a '
            "recipe. Give the key another name."
        )


def _check_reads_back(part: ComponentSpec) -> None:
    """A run keeps its recipe with every default written out; a table that it could not read again ends the run here."""
    written = json.dumps(scalars_first(part.config.model_dump(mode="json")))
    try:
        again = type(part.config).model_validate_json(written, strict=True)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise PluginError(_unreadable(part, f"is refused: {reason}")) from error
    if again != part.config:
        raise PluginError(_unreadable(part, "is read as other values"))


def _unreadable(part: ComponentSpec, what: str) -> str:
    return (
        f"The Config of the {part.component} {what} once every default is written out, as a run keeps its recipe. "
        "In the plugin: give keys that exclude each other the default None, and let validators leave values as they came."
    )


def _refuse_unknown(
    unknown: list[str], draft: RecipeTree, path: KeyPath, component: Component, known: list[str]
) -> None:
    for key in unknown:
        message = unknown_key(table_label(path), key, _owner(component), known)
        raise RecipeError(f"{draft.place((*path, key))}: {message}")


def _owner(component: Component | None) -> str:
    return f' for kind "{component.name}" (from {component.origin})' if component else ""


def _checked(
    model: type[Keys],
    values: Mapping[str, Any],
    draft: RecipeTree,
    path: KeyPath,
    component: Component | None = None,
    known: Iterable[str] = (),
    whole: str = "the recipe",
) -> Keys:
    """The model of a table's values, or a RecipeError for the first that is wrong; `known` are the table's keys and
    `whole` is what has the keys above all tables.

    JSON is the strict reading in which an array may still become a tuple and 1 become 1.0, but "3" stays a string.
    """
    try:
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        first = first_error(error.errors(include_url=False), model)
        message = explain(first, model, path, _owner(component), list(known), whole)
        raise RecipeError(f"{draft.place((*path, *first['loc']))}: {message}") from error
