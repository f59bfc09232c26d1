"""Commands `ddiff sample` and `ddiff encode` for recipes of several fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ddiff.data.pictures import is_grid
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, RecipeError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.run_dir.destination import Destination, check_destination
from ddiff.runs.encode import EncodedDocuments
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.given import read_given_option
from ddiff.runs.fields.grids import shown_fields, write_pictures
from ddiff.runs.fields.run import FieldsRun
from ddiff.runs.fields.sampling import (
    DrawnSamples,
    FieldsRequest,
    choose_target,
    draw_fields,
)
from ddiff.runs.fields.trajectory import observe_fields
from ddiff.runs.kinds import refuse_options
from ddiff.runs.observer import SampleObserver
from ddiff.sampling.fields import OnJointStep

OPTIONS_OF_TEXT = {
    "prompt": "--prompt",
    "infill": "--infill",
    "message": "--message",
    "conditions": "--condition",
    "guidance": "--guidance",
    "sampler": "--sampler",
    "settings": "--set",
}
"""Options of text runs, by the name of the argument of `Run.sample`."""


def sample_run(
    run: FieldsRun,
    arguments: Mapping[str, Any],
    prints_ids: bool,
    observer: SampleObserver | None = None,
    ranks: Ranks | None = None,
) -> Iterable[Mapping[str, Any]]:
    """Draw the samples that the options of `ddiff sample` ask for, and return the printed dicts.

    `observer` shows or records the states after each step. `ranks` divide the batches; None: only
    this process. Raises ArgumentError for an option of text runs, and for values that do not fit.
    """
    options = dict(arguments)
    text = {option: options.pop(name, None) for name, option in OPTIONS_OF_TEXT.items()}
    use = "Use --given NAME=VALUE, --only NAME or --target TARGET. Samplers are set in the recipe."
    refuse_options(run, text, "a run of several fields", use)
    images = options.pop("images", None)
    options["given"] = read_given(run, options.pop("given", None) or ())
    request = FieldsRequest(**options)
    target = choose_target(list(run.model.fields), request)
    place = None
    if images is not None:
        place = check_destination(images, "ddiff sample --images", suffix=".png", owned=is_grid)
    observing: AbstractContextManager[OnJointStep | None] = nullcontext()
    if observer is not None:
        observing = observe_fields(run, observer, target, request.seed)
    with observing as on_step:
        drawn = draw_fields(run.recipe, run.model, run.data, request, on_step, ranks)
    if place is not None and (ranks is None or ranks.is_first):
        _write_images(run, drawn, place)
    samples = drawn.to_dicts()
    return samples if prints_ids else [_drop_ids(sample) for sample in samples]


def read_given(run: FieldsRun, options: Sequence[str]) -> dict[str, Any]:
    """Return the values of the options --given NAME=VALUE, by the name of the field."""
    texts: dict[str, list[str]] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in run.values:
            raise ArgumentError(
                f"--given {option}: expected NAME=VALUE, where NAME is a field of this run "
                f"({', '.join(run.values)})."
            )
        texts.setdefault(name, []).append(value)
    found = {}
    for name, values in texts.items():
        found[name] = read_given_option(run.values[name], values)
    return found


def _write_images(run: FieldsRun, drawn: DrawnSamples, place: Destination) -> None:
    """Write the pictures of samples to a PNG file."""
    names = shown_fields(run.data.fields, drawn)
    if not names:
        raise ArgumentError(
            f'ddiff sample --images: no field of the target "{drawn.target}" has pictures. Leave '
            "the option out."
        )
    path = place.name if place.local is None else place.local
    write_pictures(path, run.data.fields, drawn, names[0])


def _drop_ids(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample without token ids."""
    fields = {}
    for name, value in sample["fields"].items():
        fields[name] = {key: entry for key, entry in value.items() if key != "ids"}
    return {**sample, "fields": fields}


def encode_fields(recipe: FieldsRecipe, options: Mapping[str, Any]) -> EncodedDocuments:
    """Compute the vectors of all fields with the key `encode`, and store them in the cache.

    A run of the recipe then reads these vectors. Several processes may call this function at the
    same time; they share the work.

    `options`: values of options that such a recipe does not have.
    """
    for name, value in options.items():
        if value is not None:
            raise ArgumentError(
                f"ddiff encode {name}: the vectors of a recipe of several fields are stored in the "
                "cache, where the run reads them, so this option has no use. Leave it out."
            )
    names = [name for name, tables in recipe.fields.items() if tables.keys.encode is not None]
    if not names:
        raise RecipeError(
            f"{recipe.source or recipe.name}: `ddiff encode` needs a field with the key `encode`, "
            'such as [fields.latent] encode = "text"; the recipe has none. Add the key and a table '
            "[encoder]."
        )
    data = RunFields(recipe)
    rows = []
    remarks = []
    for name in names:
        vectors = data.encode(name)
        for title, part in ((TRAIN, vectors.train), (VALIDATION, vectors.validation)):
            missing = part.num_documents - int(np.count_nonzero(part.present))
            present = part.num_documents - missing
            rows.append([name, title, f"{part.num_documents:,}", f"{present:,}", f"{missing:,}"])
        remarks.append(f"Vectors of {vectors.dim} dimensions in {vectors.folder}")
    return EncodedDocuments(["field", "part", "texts", "vectors", "missing"], rows, remarks)
