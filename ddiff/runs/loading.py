"""Loading of trained runs: `ddiff.load`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from ddiff.core.process import ForwardProcess
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.files import RECIPE, RunRecord
from ddiff.run_dir.identity import check_recorded, recorded_overrides
from ddiff.runs.hub.restore import find_run
from ddiff.runs.kinds import ClockSource, find_kind
from ddiff.runs.record import open_checkpoints


def load(
    run_dir: str | Path,
    *,
    process: ForwardProcess | None = None,
    settings: Iterable[str] = (),
    clock: ClockSource = "recipe",
) -> Any:
    """Load a trained run with the weights of its newest checkpoint.

    Args:
        run_dir: directory that `ddiff run` wrote, folder that `run.save_pretrained` wrote, or
            name on the hub, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`. Models are imported
            into the cache of ddiff.
        process: forward process, required if a process was passed to `ddiff.run`.
        settings: `key=value` texts that override keys of [evaluate] and [sample].
        clock: "found" for the clock in clock.json, which `ddiff clock` writes.

    Raises CheckpointError if the run has no complete checkpoint, or if its files do not belong to
    the checkpoint. Raises ArgumentError for a setting outside of [evaluate] and [sample].
    """
    directory = find_run(run_dir)
    newest = open_checkpoints(directory).newest()
    assert newest is not None  # `open_checkpoints` refuses a run without one
    settings = list(settings)
    _check_settings(settings)
    record = RunRecord.read(directory)
    check_recorded(record, newest.state)
    settings = [f"run_dir={json.dumps(str(directory))}", *settings]
    recipe = read_recipe(directory / RECIPE, settings)
    given = recorded_overrides(record, newest.state)
    if "process" in given and process is None:
        raise CheckpointError(
            f"{run_dir} was trained with a process that was passed from Python "
            f"({given['process']}), so the recipe does not define the process. Load the run with "
            "ddiff.load(run_dir, process=...)."
        )
    if clock not in get_args(ClockSource):
        raise ArgumentError(
            f'ddiff.load: clock must be "recipe" or "found"; got {clock!r}. "found" is the clock '
            "that `ddiff clock` writes to clock.json."
        )
    if clock != "recipe":
        require_text_recipe(recipe, f"the clock {clock!r}")
    run: Any = find_kind(recipe).load_run(recipe, directory, newest, process)
    if clock == "recipe":
        return run
    from ddiff.runs.found_clock import apply_found_clock  # only trees need it

    return apply_found_clock(run)


def _check_settings(settings: Iterable[str]) -> None:
    """Raise ArgumentError if a setting is not in the recipe tables [evaluate] or [sample]."""
    for setting in settings:
        if not setting.lstrip().startswith(("evaluate.", "sample.")):
            key = setting.partition("=")[0]
            advice = "" if "." in key else f" Name the table, too: sample.{setting.strip()}."
            raise ArgumentError(
                "settings of a trained run must be a list of keys of [evaluate] or [sample], such "
                f"as evaluate.draws=4; got {setting!r}. Other keys define the trained run and "
                f"cannot change.{advice}"
            )
