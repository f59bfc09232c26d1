"""Import of published checkpoints into run directories: `ddiff import`."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddiff import __version__
from ddiff.atomic import partial_name
from ddiff.checkpoint.checkpoints import Checkpoints, load_weights
from ddiff.checkpoint.layout import Imported, Layout
from ddiff.checkpoint.published_files import HUB, Location, PublishedFiles, locate, open_published
from ddiff.data.pretrained import first_line
from ddiff.data.tokenizer import Tokenizer
from ddiff.distributed.single import SingleBackend
from ddiff.errors import ArgumentError, CheckpointError, DataError, suggest
from ddiff.nn.denoiser import count_parameters
from ddiff.plugin.loader import survey_plugins
from ddiff.plugin.registry import Component
from ddiff.progress import show_activity
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import parse_recipe
from ddiff.recipe.tables import validate_table
from ddiff.recipe.toml import explain_toml_error, write_toml
from ddiff.recipe.tree import RecipeTree
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import CHECKPOINTS, ORIGIN
from ddiff.run_dir.identity import flatten_keys
from ddiff.run_dir.location import check_location
from ddiff.run_dir.origin_record import ImportedFile, OriginRecord
from ddiff.run_dir.protection import check_deleting, delete_run
from ddiff.runs.build import NO_OVERRIDES
from ddiff.runs.conditioning import check_sampling
from ddiff.runs.data import RunText
from ddiff.runs.directory import lock_run_dir
from ddiff.runs.hub.restore import is_saved_model, read_saved_recipe, write_saved_run
from ddiff.runs.masked_predictions import MaskedPredictions, check_masked_predictions
from ddiff.runs.provenance import component_fingerprints
from ddiff.runs.record import record_run, write_run_file
from ddiff.runs.run import Run
from ddiff.runs.text_stages import load_run, suggest_options
from ddiff.training.run_state import RunState

KIND = "layout"
# Without [data] in the layout or in --set, `ddiff eval` evaluates the bundled novels.
DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"kind": "bundled"},
    # The learning rate with which the published models were trained.
    "train": {"batch": 8, "optimizer": {"kind": "adamw", "lr": 3e-4}},
    "backend": {"kind": "single"},
}


@dataclass(frozen=True)
class ImportedRun:
    """Result of an import.

    Attributes:
        directory: the run directory.
        origin: record of the published files.
        parameters: number of parameters of the network.
        process: description of the forward process, or of the objective of a model without one.
        num_tokens: number of tokens.
        length: number of tokens in a row.
        predictions: result of the check of predictions; None if it was left out.
        sample_options: options of a first `ddiff sample`.
    """

    directory: Path
    origin: OriginRecord
    parameters: int
    process: str
    num_tokens: int
    length: int
    predictions: MaskedPredictions | None = None
    sample_options: str = "--count 4"


def import_published(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    settings: Iterable[str] = (),
    fresh: bool = False,
    check: bool | None = None,
    check_text: str | None = None,
) -> ImportedRun:
    """Convert a published checkpoint to a run directory.

    The run can be sampled, evaluated, reported and exported like a trained run, and another run can
    start from it with `[train] init = { run = ... }`. The directory appears when it is complete.

    A model that `run.save_pretrained` has written becomes an equal run.

    Args:
        source: local folder, file of weights, or hub name OWNER/NAME[@REVISION].
        out: run directory, which must not exist or be empty.
        layout: name of the layout, or a mapping with its name as `kind` and its keys; None: the
            layout that recognizes the files, with default keys.
        tokenizer: folder or hub name of the tokenizer; None: that of the checkpoint.
        settings: `key=value` texts that override keys of the recipe, as `--set` does.
        fresh: replace an existing run in the directory.
        check: refuse a model that predicts masked tokens no better than a constant guess
            (`check_masked_predictions`); None: only if the layout has this check by default, or if
            `check_text` is given.
        check_text: text of this check; None: the beginning of a bundled novel.

    Raises DataError if the files are damaged, unknown or incomplete, and CheckpointError if the
    directory must not be written. Nothing is written in these cases.
    """
    directory = Path(out)
    _check_directory(directory, fresh)
    location = locate(source)
    if is_saved_model(location.directory):
        _refuse_choices(layout, tokenizer, check, check_text)
        return import_saved(location, directory, list(settings), fresh)
    check = _is_check_given(check, check_text)
    files = open_published(location)
    chosen = _choose_layout(files, layout)
    imported = _read_model(chosen.build(), files)
    settings = list(settings)
    place, table = _choose_tokenizer(files, imported, tokenizer, settings)
    recipe = _build_recipe(imported, directory, table, files.step, settings)
    remedy = _advise_tokenizer(files, imported, tokenizer, settings)
    run = _build_run(recipe, imported, files, remedy)
    # The network has a copy of the weights. For large models, this one is freed before the save.
    imported = replace(imported, weights={})
    predictions = None
    if imported.must_predict if check is None else check:
        predictions = _check_predictions(run, files, chosen, check_text)
    origin = _describe_origin(files, chosen.component, imported, place)
    with lock_run_dir(directory), _replace_directory(directory, fresh) as folder:
        _write_run(run, folder, origin)
    return ImportedRun(
        directory=directory,
        origin=origin,
        parameters=count_parameters(run.denoiser),
        process=str(run.process or type(run.objective).__name__),
        num_tokens=imported.num_tokens,
        length=recipe.length,
        predictions=predictions,
    )


def _describe_origin(
    files: PublishedFiles, layout: Component, imported: Imported, tokenizer: str
) -> OriginRecord:
    """Return the record of the published files. `tokenizer`: source of the tokenizer."""
    return OriginRecord(
        ddiff=__version__,
        source=files.source,
        revision=files.revision,
        layout=f"{layout.name} ({layout.origin})",
        tokenizer=tokenizer,
        step=files.step,
        is_average=files.is_average,
        files={
            name: ImportedFile(bytes=digest.bytes, sha256=digest.sha256)
            for name, digest in files.digests.items()
        },
        notes=tuple(imported.notes),
    )


# ---------------------------------------------------------------------- saved models


def _refuse_choices(
    layout: str | Mapping[str, Any] | None,
    tokenizer: str | None,
    check: bool | None,
    check_text: str | None,
) -> None:
    """Raise ArgumentError for options that a model saved by ddiff determines."""
    _refuse_check(check, check_text)
    for option, value in (("--layout", layout), ("--tokenizer", tokenizer)):
        if value is not None:
            raise ArgumentError(
                f"{option} {value}: ddiff saved this model with its layout and its tokenizer. "
                f"Leave {option} out."
            )


def _refuse_check(check: bool | None, text: str | None) -> None:
    """Raise ArgumentError if the check of predictions is requested for a model saved by ddiff."""
    option = "--check-text" if text is not None else "--check"
    if check or text is not None:
        raise ArgumentError(
            f"{option}: a model that ddiff saved is imported without the check of predictions, "
            f"since its record has the mask and the shift. Leave out {option}; in Python, call "
            "ddiff.check_masked_predictions with the run."
        )


def _is_check_given(check: bool | None, text: str | None) -> bool | None:
    """Return `check`, or True if only the text of the check is given.

    Raises ArgumentError for the text of a check that is left out.
    """
    if check is False and text is not None:
        raise ArgumentError(
            "--check-text is the text of the check that --unchecked leaves out. Leave out one of "
            "these options."
        )
    return True if text is not None else check


def import_saved(
    location: Location, directory: Path, settings: Iterable[str] = (), fresh: bool = False
) -> ImportedRun:
    """Write the run directory of a model that `save_pretrained` has written."""
    recipe = read_saved_recipe(location.directory, directory, settings)
    with lock_run_dir(directory), _replace_directory(directory, fresh) as target:
        origin = write_saved_run(location, recipe, target)
        # Loading compares the weights with the network, before the directory appears.
        run = _load_saved(recipe, target)
    return ImportedRun(
        directory=directory,
        origin=origin,
        parameters=count_parameters(run.denoiser),
        process=str(run.process or type(run.objective).__name__),
        num_tokens=run.vocabulary.num_tokens,
        length=recipe.length,
        sample_options=suggest_options(directory, ImportedRun.sample_options),
    )


def _load_saved(recipe: Recipe, folder: Path) -> Run:
    newest = Checkpoints(str(folder / CHECKPOINTS)).newest()
    assert newest is not None
    run = load_run(recipe, folder, newest, None)
    check_sampling(recipe, run.model)
    return run


# ---------------------------------------------------------------------- directory


def _check_directory(directory: Path, fresh: bool) -> None:
    """Raise CheckpointError if the run directory must not be written."""
    check_location(str(directory))
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(
            f"--out: {directory} is a file; a directory was expected. Use another path."
        )
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not fresh:
        raise CheckpointError(
            f"--out: {directory} exists and is not empty. Use another directory, or replace the "
            "run in it with --fresh."
        )
    check_deleting(classify_contents(directory), "", ())


@contextmanager
def _replace_directory(directory: Path, fresh: bool) -> Iterator[Path]:
    """Context manager that yields a new folder and renames it to `directory` at the end.

    After an error the new folder is removed, and `directory` is unchanged.
    """
    # A symbolic link is followed, so that the link is kept.
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(partial_name(target.name))
    try:
        yield folder
        if fresh and target.exists():
            # Deleted last, when nothing else can fail.
            delete_run(target)
        os.replace(folder, target)
    except OSError as error:
        raise CheckpointError(
            f"--out: {directory} cannot be written ({error.strerror or error}). Use another "
            "directory, or free space."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_run(run: Run, folder: Path, origin: OriginRecord) -> None:
    """Write the files of a run to a folder, as training would leave them."""
    backend = SingleBackend("cpu")
    record_run(run, backend, directory=folder)
    write_run_file(folder / ORIGIN, origin.to_json())
    state = {
        "run": RunState(step=origin.step or 0).to_tree(),
        "ema": None,
        "origins": run.recipe.origins(),
        # No fingerprints of data: the model was trained on other data than those of the recipe.
        "fingerprints": component_fingerprints(run.data, run.model),
        "made_with": {
            "recipe": flatten_keys(run.recipe.to_dict()),
            "given": run.given(),
            "noising": run.noising(),
        },
    }
    checkpoints = Checkpoints(str(folder / CHECKPOINTS))
    with show_activity("writing the checkpoint"):
        checkpoints.save(origin.step or 0, run.objective.module.state_dict(), state)


# ---------------------------------------------------------------------- layout


def list_layouts() -> dict[str, Component]:
    """Return the layouts of all installed plugins, by name."""
    components = survey_plugins().registry.components(KIND)
    return {component.name: component for component in components}


def build_layout(component: Component) -> Layout:
    """Build a layout with its default settings."""
    return ComponentSpec(component, component.config_class()()).build()


def find_layout(name: str, option: str) -> Component:
    """Return the layout with a name. Raises ArgumentError, which names `option`, if it is unknown.

    `option`: option of the command line that selects the layout.
    """
    layouts = list_layouts()
    if name not in layouts:
        raise ArgumentError(
            f"{option}: there is no layout {name!r}.{suggest(name, layouts)} Layouts of the "
            f"installed plugins: {', '.join(layouts) or 'none'}."
        )
    return layouts[name]


def parse_layout(text: str) -> str | dict[str, Any]:
    """Parse the value of --layout: a name, or an inline table with `kind` and keys."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        table = tomllib.loads(f"layout = {text}")["layout"]
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(
            "--layout must be the name of a layout, or an inline table of TOML such as '{kind = "
            f'"dream", shift = true}}\'; got {text} ({explain_toml_error(error)}).'
        ) from error
    assert isinstance(table, dict)  # the text begins with a brace
    return table


def read_check_text(file: Path) -> str:
    """Read the text of --check-text. Raises DataError if it is not a file of UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"--check-text: {file} cannot be read ({first_line(error)}). Name a file of UTF-8 text "
            "in the language of the model."
        ) from error


def _configure_layout(table: Mapping[str, Any]) -> ComponentSpec:
    """Return a layout with the keys of a table. Raises ArgumentError for a wrong key."""
    tree = RecipeTree({"layout": dict(table)}, "--layout")
    keys = {key: value for key, value in table.items() if key != "kind"}
    kind = table.get("kind")
    if not isinstance(kind, str):
        raise ArgumentError(
            f"--layout: the table needs the key kind, the name of a layout; got {dict(table)}. "
            f"Layouts of the installed plugins: {', '.join(list_layouts()) or 'none'}."
        )
    component = find_layout(kind, "--layout")
    model = component.config_class()
    config = validate_table(model, keys, tree, ("layout",), component, model.model_fields)
    return ComponentSpec(component, config)


def _choose_layout(files: PublishedFiles, given: str | Mapping[str, Any] | None) -> ComponentSpec:
    """Return the given layout, or the only layout that recognizes the files."""
    if isinstance(given, Mapping):
        return _configure_layout(given)
    if given is not None:
        return _configure_layout({"kind": given})
    layouts = list_layouts()
    fitting = [
        component for component in layouts.values() if build_layout(component).recognize(files)
    ]
    if len(fitting) == 1:
        return _configure_layout({"kind": fitting[0].name})
    if fitting:
        names = ", ".join(component.name for component in fitting)
        raise DataError(
            f"{files.source}: several layouts recognize the files: {names}. Choose one with "
            "--layout NAME."
        )
    declared = {key: files.config[key] for key in ("model_type", "graph") if key in files.config}
    raise DataError(
        f"{files.source}: no layout recognizes the files. The configuration declares "
        f"{declared or 'neither model_type nor graph'}, and the first tensors are "
        f"{', '.join(files.tensors.names[:3])}. Layouts of the installed plugins: "
        f"{', '.join(layouts) or 'none'}. If the model is one of these, choose it with --layout "
        "NAME; else install or write a plugin with its layout."
    )


def _read_model(layout: Layout, files: PublishedFiles) -> Imported:
    """Read the files with a layout, which must use every tensor."""
    with show_activity("reading the weights"):
        imported = layout.read(files)
    files.tensors.finish()
    return imported


# ---------------------------------------------------------------------- recipe and model


def _choose_tokenizer(
    files: PublishedFiles, imported: Imported, given: str | None, settings: list[str]
) -> tuple[str, dict[str, Any] | None]:
    """Return the source of the tokenizer, and its recipe table.

    The table is None if `settings` contain the tokenizer. `given`: folder or name that the caller
    chose.
    """
    has_setting = _sets_tokenizer(settings)
    if has_setting and given is not None:
        raise ArgumentError(
            f"--tokenizer {given} and --set tokenizer both select the tokenizer. Leave one out."
        )
    if has_setting:
        return "--set", None
    if given is None and files.tokenizer_directory is not None:
        # A hub name instead of the folder of its download, which may be deleted.
        given = str(files.tokenizer_directory)
        if files.revision is not None:
            given = files.source.removeprefix(HUB).partition("@")[0]
    given = given or imported.tokenizer
    if given is None:
        raise DataError(
            f"{files.source} has no tokenizer, and its layout does not know the tokenizer of the "
            "publication. Give its folder or hub name with --tokenizer."
        )
    return given, {"kind": "pretrained", "path": given, "num_tokens": imported.num_tokens}


def _sets_tokenizer(settings: Iterable[str]) -> bool:
    """Return whether a `key=value` text contains the tokenizer."""
    return any(setting.lstrip().startswith("tokenizer") for setting in settings)


def _advise_tokenizer(
    files: PublishedFiles, imported: Imported, given: str | None, settings: Iterable[str]
) -> str:
    """Return sentences that follow the message about a tokenizer that cannot be loaded.

    `given`: value of --tokenizer.
    """
    if _sets_tokenizer(settings):
        return ""
    if given is not None:
        is_missing = not Path(given).expanduser().exists()
        where = f" The folder {given} of --tokenizer does not exist." if is_missing else ""
        return f"{where} Name another folder with --tokenizer FOLDER."
    where = "" if files.tokenizer_directory else " The checkpoint has no tokenizer."
    if files.tokenizer_directory and imported.tokenizer:
        where = f" The tokenizer {imported.tokenizer} on the hub has the same ids."
    return f"{where} Give the folder of the tokenizer with --tokenizer FOLDER."


def _build_recipe(
    imported: Imported,
    directory: Path,
    tokenizer: dict[str, Any] | None,
    step: int | None,
    settings: list[str],
) -> Recipe:
    """Build the recipe of an imported run."""
    tree: dict[str, Any] = {"name": directory.resolve().name, "run_dir": str(directory)}
    _merge(tree, DEFAULTS)
    _merge(tree, {"train": {"steps": max(step or 0, 1)}})
    _merge(tree, imported.recipe)
    if tokenizer is not None:
        tree["tokenizer"] = tokenizer
    text = write_toml(tree, "Recipe of an import")
    recipe = parse_recipe(text, "the recipe of the import", settings)
    return require_text_recipe(recipe, "ddiff import")


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add nested tables to `tree`. A value of `other` replaces the value of the same key."""
    for key, value in other.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _build_run(recipe: Recipe, imported: Imported, files: PublishedFiles, remedy: str) -> Run:
    """Build the model of a recipe with the imported weights.

    `remedy`: sentences for the message about a tokenizer that cannot be loaded.
    """
    tokenizer = _build_tokenizer(recipe, imported, remedy)
    # A published vocabulary is flat, so it needs no rows, which would tokenize the whole corpus.
    vocabulary = recipe.vocabulary.build(tokenizer=tokenizer, rows=None, cache=None)
    with show_activity("building the model"):
        text = RunText(recipe, tokenizer)
        run = Run.assemble(text, vocabulary, torch.device("cpu"), NO_OVERRIDES)
        load_weights(run.objective.module, imported.weights, files.source)
    check_sampling(recipe, run.model)
    return run


def _check_predictions(
    run: Run, files: PublishedFiles, layout: ComponentSpec, text: str | None
) -> MaskedPredictions:
    """Raise DataError if the model predicts masked tokens no better than a constant guess."""
    with show_activity("checking the predictions of masked tokens"):
        found = check_masked_predictions(run, text)
    if found.problem is None:
        return found
    table: dict[str, Any] = {"kind": layout.component.name}
    if found.needed_shift is not None:
        table["shift"] = found.needed_shift
    elif found.better_mask is not None and found.better_shift is None:
        table["mask_token"] = found.mask_ids[found.better_mask]
    remedy = ""
    if table.keys() <= {"kind", *layout.component.config_class().model_fields} and len(table) > 1:
        written = ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
        remedy = f" Import it with --layout '{{{written}}}'."
    raise DataError(
        f"{files.source}: {found.problem}{remedy} Nothing was written. To import the model as it "
        "is, leave out this check with --unchecked."
    )


def _build_tokenizer(recipe: Recipe, imported: Imported, remedy: str) -> Tokenizer:
    """Build the tokenizer of a recipe. Raises DataError if it does not fit the network.

    `remedy`: sentences for the message about a tokenizer that cannot be loaded.
    """
    try:
        tokenizer = RunText(recipe).tokenizer
    except DataError as error:
        raise DataError(f"{error}{remedy}") from error
    if tokenizer.num_tokens != imported.num_tokens:
        raise DataError(
            f"The tokenizer has {tokenizer.num_tokens} tokens, but the network has "
            f"{imported.num_tokens}. Use the tokenizer of the publication: --tokenizer FOLDER or "
            "--set tokenizer=..."
        )
    return tokenizer
