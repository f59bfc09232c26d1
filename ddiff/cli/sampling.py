"""Command that draws samples: sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ddiff.cli.launching import launch_for_run
from ddiff.cli.options import (
    AnimationFile,
    ClockSource,
    Conditions,
    EditedTexts,
    EditModeName,
    EditRatio,
    EditTarget,
    GivenFields,
    GuidanceWeight,
    ImageFile,
    InfillTexts,
    Messages,
    NoIds,
    OnlyFields,
    PromptFile,
    Prompts,
    RunDir,
    RunProcesses,
    SampleCount,
    SamplerKind,
    SamplerSettings,
    SamplingBatch,
    SamplingSeed,
    SamplingSteps,
    TargetName,
    TrajectoryFile,
    WatchSamples,
)
from ddiff.errors import ArgumentError, shorten


def sample(
    context: typer.Context,
    run_dir: RunDir,
    count: SampleCount = None,
    steps: SamplingSteps = None,
    seed: SamplingSeed = None,
    batch: SamplingBatch = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    infill: InfillTexts = None,
    message: Messages = None,
    edit: EditedTexts = None,
    ratio: EditRatio = None,
    mode: EditModeName = None,
    toward: EditTarget = None,
    condition: Conditions = None,
    guidance: GuidanceWeight = None,
    sampler: SamplerKind = None,
    settings: SamplerSettings = None,
    no_ids: NoIds = False,
    given: GivenFields = None,
    only: OnlyFields = None,
    target: TargetName = None,
    images: ImageFile = None,
    watch: WatchSamples = False,
    trajectory: TrajectoryFile = None,
    gif: AnimationFile = None,
    clock: ClockSource = "recipe",
    processes: RunProcesses = None,
) -> None:
    """Draw samples from a trained run, as JSON lines.

    The tokens of prompts and infill texts stay unchanged in the samples. With --edit, some tokens
    of the given texts are sampled again. Given fields stay unchanged too.
    """
    observed = _keep_given(watch=watch, trajectory=trajectory, gif=gif)
    further = _keep_given(given=given, only=only, target=target, images=images) | observed
    texts = _keep_given(prompt=prompt, prompts=prompts, infill=infill, message=message)
    others = [*texts, *_keep_given(count=count), *further]
    chosen = _keep_given(ratio=ratio, mode=mode, toward=toward)
    _check_edit_options(edit, others, list(chosen))
    if not observed:  # states are shown and recorded by one process
        launch_for_run(context, run_dir, processes)
    shared: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "conditions": read_conditions(condition),
        "guidance": guidance,
        "sampler": sampler,
        "settings": settings or (),
        "prints_ids": not no_ids,
        "clock": clock,
    }
    if edit:
        from ddiff.runs.stages import edit_run

        edit_run(run_dir, edit, **shared, **chosen)
        return
    from ddiff.runs.stages import sample_run

    sample_run(
        run_dir,
        count=count,
        prompt=read_prompts(prompt, prompts),
        infill=_unwrap_single(infill),
        message=_unwrap_single(message),
        **shared,
        **further,
    )


def _keep_given(**options: Any) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    # a ratio of 0.0 is a value
    return {
        name: value for name, value in options.items() if value or isinstance(value, float | Path)
    }


def _check_edit_options(texts: list[str] | None, others: list[str], chosen: list[str]) -> None:
    """Raise ArgumentError if options of edits and of samples are mixed.

    `texts` are those of --edit. `others` are the given options that --edit excludes, and `chosen`
    the names of the given options that need --edit.
    """
    if texts and others:
        raise ArgumentError(
            f"--edit and --{others[0]} exclude each other. An edit keeps or replaces tokens of the "
            "given text; repeat --edit for several results."
        )
    if chosen and not texts:
        raise ArgumentError(f'--{chosen[0]} needs --edit "TEXT", the text to edit.')


def read_prompts(prompts: list[str] | None, file: Path | None) -> str | list[str] | None:
    """Return the prompts of the option --prompt or of the file of the option --prompts.

    A single --prompt is returned as a string, from which --count samples are drawn.
    """
    if prompts and file is not None:
        raise ArgumentError(
            "--prompt and --prompts exclude each other. Write all prompts into the file, one per "
            "line."
        )
    if file is None:
        return _unwrap_single(prompts)
    from ddiff.runs.prompts import read_prompts as read_file

    return read_file(file)


def _unwrap_single(texts: list[str] | None) -> str | list[str] | None:
    if not texts:
        return None
    return texts[0] if len(texts) == 1 else texts


def read_conditions(texts: list[str] | None) -> dict[str, object] | None:
    """Parse the `NAME=VALUE` texts of the option --condition. VALUE is a TOML value."""
    if not texts:
        return None
    from ddiff.recipe.settings import read_settings

    found: dict[str, object] = {}
    for text in texts:
        values = read_settings([text], "--condition", option="--condition").values
        for name, value in values.items():
            if name in found:
                raise ArgumentError(
                    f'--condition {shorten(text)}: "{shorten(name)}" is given twice. Give each '
                    "condition once, with one value for all samples or a list of one per sample."
                )
            found[name] = value
    return found
