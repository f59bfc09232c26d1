"""Files of a run directory: their names, and readers that check their contents.

This module does not import torch, so that `ddiff compare` and error messages are fast.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddiff.errors import CheckpointError

if TYPE_CHECKING:
    from ddiff.run_dir.evaluation_record import EvaluationRecord, Record
    from ddiff.run_dir.generation_record import GenerationRecord

AnyRecord = TypeVar("AnyRecord", bound="Record")

RECIPE = "recipe.toml"
ENVIRONMENT = "environment.json"
TOKENIZER = "tokenizer.json"
VOCABULARY = "vocabulary.safetensors"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
SAMPLES = "samples.jsonl"
SAMPLING = "sampling.json"
GAPS = "gaps.jsonl"
"""Gaps in sentences of the validation documents, filled by the model ([sample] gaps)."""
JUDGED = "judged.json"
TRAINING_SAMPLES = "training_samples.jsonl"
"""Samples that were drawn during training ([sample] every)."""
GENERATION = "generation.json"
TRACKED = "tracked.json"
"""Digests of the results that were sent to the tracker."""
PARETO = "pareto.json"
PARETO_CHART = "pareto.svg"
CLOCK = "clock.json"
"""Field, path and bounds of the clocks of a tree (`ddiff clock`)."""
ORIGIN = "origin.json"
"""Published files from which a run was imported (`ddiff import`)."""
CHAT = "chat.json"
"""Chat template of a run of conversations, and the length of its answers."""
CHECKPOINTS = "checkpoints"
REPLAY = "replay"
"""Temporary folder of `--verify-resume`."""
LOCK = ".lock"

FIELDS = "fields"
"""Folder with a folder per field: its shape, tokenizer, vocabulary or normalizer."""
FIELD_SHAPE = "shape.json"
NORMALIZER = "normalizer.safetensors"
OTHER_EVALUATIONS = "evaluation-*.json"
"""Pattern of the files with evaluations on other data."""
OTHER_GENERATIONS = "generation-*.json"
"""Pattern of the files with figures of samples of other clocks."""
PICTURES = "samples-*.png"
"""Pattern of the files with pictures of samples."""
LM_EVALS = "lm-eval-*.json"
"""Pattern of the files with evaluations by the lm-evaluation-harness."""
PATTERNS = (OTHER_EVALUATIONS, OTHER_GENERATIONS, PICTURES, LM_EVALS)
"""Patterns of files of a run whose names depend on the run."""

FILES = (
    RECIPE,
    ENVIRONMENT,
    TOKENIZER,
    VOCABULARY,
    METRICS,
    TRAINING_SAMPLES,
    EVALUATION,
    SAMPLES,
    SAMPLING,
    GAPS,
    JUDGED,
    GENERATION,
    TRACKED,
    PARETO,
    PARETO_CHART,
    CLOCK,
    ORIGIN,
    CHAT,
)

REPEATABLE = (EVALUATION, SAMPLES, SAMPLING, GAPS, JUDGED)
"""Files that can be deleted, because `ddiff run` writes them again."""

RECORDS = (EVALUATION, GENERATION)
"""Files with figures, whose schema has a version."""

HEADER = "Every key of this recipe with its value, as ddiff"
"""Beginning of the comment line at the top of a resolved recipe."""


def name_of_clock(record: str, clock_source: str) -> str:
    """Return the name of a record (`EVALUATION`, `GENERATION`) of a run with a clock.

    The record of the recipe's clock has its plain name.
    """
    if clock_source == "recipe":
        return record
    return f"{record.removesuffix('.json')}-{clock_source}-clock.json"


# ---------------------------------------------------------------------- shapes

NUMBER = (int, float)
"""Python types of a JSON number."""

Shape = Mapping[str, Any]
"""Expected types of the values of a JSON object, by key.

The expected type of a value is a Python type, a tuple of alternatives, a list [type] for a JSON
list with entries of that type, or a Shape for a JSON object. None in a tuple means that the value
may be null and the key may be missing. The key "*" means every key of the object."""

OBJECTS: dict[str, Shape] = {
    ENVIRONMENT: {"parameters": int, "given": {}, "init": ({}, None)},
    EVALUATION: {
        "step": int,
        "unit": str,
        "bound": str,
        "protocol": {},
        "baselines": {"*": NUMBER},
        "interval": ([NUMBER], None),
        "ppl": (*NUMBER, None),
        "bits_per_byte": (*NUMBER, None),
        "documents": int,
    },
    SAMPLING: {"step": int, "seconds": NUMBER, "tokens": int},
    SAMPLES: {"step": int, "index": int, "text": str, "ids": [int], "nfe": NUMBER},
    GAPS: {
        "step": int,
        "index": int,
        "document": int,
        "position": int,
        "before": str,
        "model": str,
        "original": str,
        "after": str,
        "nfe": NUMBER,
    },
    METRICS: {"step": int, "tokens": NUMBER, "seconds": NUMBER},
    TRAINING_SAMPLES: {"step": int, "texts": {"*": str}, "steps": int, "nfe": NUMBER},
    GENERATION: {
        "schema_version": int,
        "step": int,
        "weights": str,
        "sampling": {"nfe": NUMBER, "length": int},
        "samples": {"count": int, "entropy_nats": {"value": NUMBER}},
        "judge": ({"samples": {"corpus": NUMBER, "entropy_nats": {"value": NUMBER}}}, None),
    },
    RECIPE: {
        "name": str,
        "seed": int,
        "process": ({"kind": str}, None),
        "objective": {"kind": str, "times": ({"kind": str}, None)},
        "sample": {"steps": int, "sampler": {"kind": str}},
    },
}
"""Shape of each file with the keys that readers need; in `.jsonl` files, shape of every line."""

BOUND: Shape = {
    "nats_per_sample": NUMBER,
    "interval": ([NUMBER], None),
    "samples": int,
    "fields": {
        "*": {
            "nats_per_item": NUMBER,
            "interval": ([NUMBER], None),
            "items": int,
            "terms": {"*": NUMBER},
        }
    },
}
"""Shape of a bound in evaluation.json of a run of several fields."""

RATE_DISTORTION: Shape = {
    "text": str,
    "latent": str,
    "deviation": NUMBER,
    "rate": NUMBER,
    "rate_interval": ([NUMBER], None),
    "distortion": NUMBER,
    "distortion_interval": ([NUMBER], None),
    "nats_per_token": NUMBER,
    "token_interval": ([NUMBER], None),
}
"""Shape of the parts of a bound of a text through a vector."""

TARGET: Shape = {
    **BOUND,
    "controls": {"*": BOUND},
    "rate_distortion": (RATE_DISTORTION, None),
}
"""Shape of the results of a target."""

FIELDS_OBJECTS: dict[str, tuple[str, Shape]] = {
    EVALUATION: (
        "targets",
        {
            "step": int,
            "weights": str,
            "protocol": {},
            "units": {"*": str},
            "targets": {"*": TARGET},
        },
    ),
    SAMPLING: ("samples", {"step": int, "seconds": NUMBER, "samples": int}),
    SAMPLES: (
        "fields",
        {"step": int, "index": int, "target": str, "given": [str], "fields": {}, "nfe": NUMBER},
    ),
    JUDGED: ("targets", {"step": int, "targets": {"*": [{"name": str, "value": NUMBER}]}}),
    RECIPE: (
        "fields",
        {
            "name": str,
            "seed": int,
            "fields": {"*": {"process": {"kind": str}}},
            "sample": {"steps": int},
        },
    ),
}
"""Key that only runs of several fields have, and shape, of each file of such a run."""


def _choose_shape(name: str, found: Mapping[str, Any]) -> Shape:
    """Return the shape of a file of a run with the content `found`."""
    if name in FIELDS_OBJECTS:
        key, shape = FIELDS_OBJECTS[name]
        if key in found or name not in OBJECTS:
            return shape
    return OBJECTS.get(name, {})


def _evaluation_figures(found: Mapping[str, Any]) -> Shape:
    """Return the types of those keys of evaluation.json whose names depend on its content.

    An example is `nelbo_nats_per_token`, which contains the bound and the unit. `found` is the
    content of the file.
    """
    unit = found["unit"]
    return {
        f"{found['bound'].lower()}_nats_per_{unit}": NUMBER,
        f"terms_nats_per_{unit}": {"*": NUMBER},
        f"parts_nats_per_{unit}": {"*": NUMBER},
        f"{unit}s": int,
    }


def _check_shape(
    found: Mapping[str, Any],
    shape: Shape,
    path: Path,
    where: str = "",
    *,
    allow_missing: bool = False,
) -> None:
    """Raise CheckpointError if a key is missing or a value has a wrong type.

    Args:
        found: JSON object that was read.
        shape: required keys with the types of their values.
        path: file of the object, for the message.
        where: place in the file, such as " in line 3", for the message.
        allow_missing: whether keys may be missing.
    """
    for key, types in shape.items():
        if key == "*":
            wrong = [name for name, value in found.items() if not _fits(value, types)]
        elif key not in found:
            if allow_missing or _fits(None, types):
                continue
            raise damage_error(path, f'the key "{key}" is missing{where}')
        else:
            wrong = [] if _fits(found[key], types) else [key]
        if wrong:
            value = _format_json(found[wrong[0]])
            raise damage_error(path, f'the key "{wrong[0]}"{where} has the invalid value {value}')


def _fits(value: Any, types: Any) -> bool:
    """Return whether `value` has the type that `types` describes.

    `types` is one value of a `Shape`: a type, None, a tuple of alternatives, a list with the type
    of its entries, or a dict with the types of its keys.
    """
    if isinstance(types, tuple):
        return any(_fits(value, alternative) for alternative in types)
    if isinstance(types, Mapping):
        return isinstance(value, dict) and _fits_shape(value, types)
    if isinstance(types, list):
        return isinstance(value, list) and all(_fits(entry, types[0]) for entry in value)
    if types is None:
        return value is None
    # bool is a subclass of int in Python, but true and false are not numbers in JSON
    if isinstance(value, bool) and types is not bool:
        return False
    return isinstance(value, types)


def _fits_shape(value: Mapping[str, Any], shape: Shape) -> bool:
    for key, types in shape.items():
        entries = list(value.values()) if key == "*" else [value.get(key)]
        if not all(_fits(entry, types) for entry in entries):
            return False
    return True


# ---------------------------------------------------------------------- readers


def require_run_dir(directory: Path) -> None:
    """Raise CheckpointError if a directory is not that of a run."""
    if (directory / RECIPE).is_file():
        return
    reason = f"{RECIPE} is missing" if directory.exists() else "there is no such folder"
    raise CheckpointError(
        f"{directory} is not a run directory: {reason}. Give a directory that `ddiff run` wrote, "
        "such as runs/<name>."
    )


def read_text(path: Path) -> str:
    """Read a UTF-8 file of a run. Raises CheckpointError if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"the file is not UTF-8 text ({error.reason} at byte {error.start})"
        raise damage_error(path, reason) from error
    except IsADirectoryError as error:
        raise damage_error(path, "a file was expected, and the path is a folder") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Change its permissions, or restore the "
            "file from a copy."
        ) from error


def read_json(path: Path, *, allow_missing: bool = False) -> dict[str, Any]:
    """Read a JSON file of a run. Returns {} if the file does not exist.

    Raises CheckpointError if the content is not an object of the expected shape. If `allow_missing`
    is True, keys of the object may be missing.
    """
    if not path.exists():
        return {}
    found = _parse_object(read_text(path), path)
    if path.name in RECORDS:
        _check_version(found, path)
    shape = _choose_shape(path.name, found)
    _check_shape(found, shape, path, allow_missing=allow_missing)
    if path.name == EVALUATION and not allow_missing:
        if shape == OBJECTS[EVALUATION]:
            _check_shape(found, _evaluation_figures(found), path)
            interval = found.get("interval")
            if interval is not None and len(interval) != 2:
                raise damage_error(
                    path, f"an interval must have two ends; got {_format_json(interval)}"
                )
        evaluation_record(found, path)
    if path.name == GENERATION and not allow_missing:
        generation_record(found, path)
    return found


def evaluation_record(found: Mapping[str, Any], path: Path) -> EvaluationRecord:
    """Return the record with the content `found` of the evaluation.json at `path`.

    Raises CheckpointError if a key is missing or invalid.
    """
    # imported here, since pydantic is slow to import and other files do not need it
    from ddiff.run_dir.evaluation_record import EvaluationRecord

    return _make_record(EvaluationRecord, found, path)


def generation_record(found: Mapping[str, Any], path: Path) -> GenerationRecord:
    """Return the record with the content `found` of the generation.json at `path`.

    Raises CheckpointError if a key is missing or invalid.
    """
    from ddiff.run_dir.generation_record import GenerationRecord

    return _make_record(GenerationRecord, found, path)


def read_evaluation(run_dir: str | Path) -> EvaluationRecord:
    """Read evaluation.json of a run: `read_evaluation("runs/a").figures["nelbo"].value`.

    Raises CheckpointError if the file is missing or damaged, or if a newer version of ddiff wrote
    it.
    """
    path = Path(run_dir) / EVALUATION
    return evaluation_record(_read_figures(path, f"ddiff eval {run_dir}"), path)


def read_generation(run_dir: str | Path) -> GenerationRecord:
    """Read generation.json of a run: `read_generation("runs/a").figures["entropy"].value`.

    Raises CheckpointError if the file is missing or damaged, or if a newer version of ddiff wrote
    it.
    """
    path = Path(run_dir) / GENERATION
    return generation_record(_read_figures(path, f"ddiff eval {run_dir} --generate"), path)


def _read_figures(path: Path, command: str) -> dict[str, Any]:
    """Read a record of figures. `command` writes the file, for the message if it is missing."""
    found = read_json(path)
    if not found:
        raise CheckpointError(f"{path} does not exist. Call `{command}`, which writes the file.")
    return found


def _make_record(kind: type[AnyRecord], found: Mapping[str, Any], path: Path) -> AnyRecord:
    try:
        return kind.from_tree(found)
    except ValueError as error:
        raise damage_error(path, str(error)) from error


def _check_version(found: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if a newer version of ddiff wrote a record of figures.

    This is checked before the shape, which may have changed in the newer version.
    """
    from ddiff.run_dir.evaluation_record import EvaluationRecord, NewerSchemaError, check_version
    from ddiff.run_dir.generation_record import GenerationRecord

    kind = EvaluationRecord if path.name == EVALUATION else GenerationRecord
    try:
        check_version(found, kind.newest_version)
    except NewerSchemaError as error:
        raise CheckpointError(
            f"{path} was written by a newer version of ddiff: {error}. Install that version of "
            "ddiff, or move the file away and repeat the command, which writes the file again."
        ) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a `.jsonl` file of a run. Returns [] if the file does not exist.

    Raises CheckpointError if a line is not an object of the expected shape.
    """
    if not path.exists():
        return []
    lines = read_text(path).split("\n")
    if lines[-1] == "":  # the text after the last line break
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        where = f" in line {number}"
        entry = _parse_object(line, path, where)
        _check_shape(entry, _choose_shape(path.name, entry), path, where)
        found.append(entry)
    return found


def read_recipe_tree(path: Path) -> dict[str, Any]:
    """Read the recipe of a run as nested tables, without loading plugins.

    Raises CheckpointError if the file is damaged.
    """
    return _parse_recipe_tree(read_text(path), path)


def _parse_recipe_tree(text: str, path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(text)
    except ValueError as error:
        raise damage_error(path, str(error)) from error
    except RecursionError as error:
        raise damage_error(path, "its tables are nested too deeply") from error
    _check_shape(found, _choose_shape(RECIPE, found), path)
    return found


@dataclass(frozen=True)
class RunRecord:
    """Recipe and environment that a run recorded in its directory.

    Args:
        directory: directory of the run.
        recipe_text: content of recipe.toml.
        recipe: the recipe as nested tables, without defaults of keys that are newer than the file.
        environment: content of environment.json; empty if the file does not exist.
    """

    directory: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """Read the record of a run. Raises CheckpointError if a file is missing or damaged."""
        path = directory / RECIPE
        text = read_text(path)
        recipe = _parse_recipe_tree(text, path)
        return cls(directory, text, recipe, read_json(directory / ENVIRONMENT))


def is_own_recipe(path: Path) -> bool:
    """Return whether ddiff wrote a recipe.toml and the user added no comment to the file."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return False
    comments = [line for line in lines if line.lstrip().startswith(b"#")]
    return bool(lines) and lines[0].startswith(f"# {HEADER}".encode()) and len(comments) == 1


def check_entry_types(directory: Path) -> None:
    """Raise CheckpointError if a file of a run is a folder, or a folder of a run is a file."""
    for name in FILES:
        path = directory / name
        if path.is_dir():
            raise damage_error(path, "a file was expected, and the path is a folder")
    for name in (CHECKPOINTS, FIELDS):
        path = directory / name
        if path.exists() and not path.is_dir():
            raise CheckpointError(
                f"{path} is a file; a folder was expected. Move the file away and repeat the "
                "command."
            )


def check_readable(directory: Path) -> None:
    """Raise CheckpointError if a result file of a run is damaged.

    Called before any long work.
    """
    for name in (ENVIRONMENT, EVALUATION, SAMPLING, JUDGED):
        read_json(directory / name)
    for name in (SAMPLES, GAPS):
        read_json_lines(directory / name)


def _parse_object(text: str, path: Path, where: str = "") -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise damage_error(path, f"invalid JSON{where} ({error})") from error
    except RecursionError as error:
        raise damage_error(path, f"the JSON{where} is nested too deeply") from error
    if not isinstance(found, dict):
        came = _format_json(found)
        raise damage_error(path, f"a JSON object was expected{where}; got {came}")
    return found


def _format_json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------- damage


def damage_error(path: Path, what: str) -> CheckpointError:
    """Return the CheckpointError for a damaged file of a run.

    `what` describes the damage, such as "an interval must have two ends".
    """
    return CheckpointError(f"{path} is damaged: {what}. {_remedy(path)}")


def _remedy(path: Path) -> str:
    if path.name in REPEATABLE:
        return "Delete the file, and repeat `ddiff run` to write it again."
    if path.name == GENERATION:
        return "Delete the file, and repeat `ddiff eval` with --generate to write it again."
    if path.name == PARETO:
        return "Delete the file, and repeat `ddiff pareto` to write it again."
    if path.name == CLOCK:
        return "Delete the file, and repeat `ddiff clock` to write it again."
    if path.name == RECIPE and not is_own_recipe(path):
        return "Restore the file from a copy, or train again with another name."
    if path.is_dir():
        return (
            "Move the folder away. Then restore the file from a copy, or repeat `ddiff run` with "
            "--fresh."
        )
    return "Restore the file from a copy, or start a new run with `ddiff run` and --fresh."
