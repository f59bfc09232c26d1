"""Commands for data and training: run, data and encode."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ddiff.cli.options import MOST, RecipeName, Settings
from ddiff.cli.output import print_columns
from ddiff.cli.process import pause_garbage_collection
from ddiff.distributed.launcher import get_rank_info, launch
from ddiff.errors import ArgumentError

if TYPE_CHECKING:
    from ddiff.recipe.model import BaseRecipe

DRY_RUN = (
    "Check the recipe, print the resolved recipe and a verdict, and stop. The check covers the "
    "keys, the run directory, the named files, the device, the memory, and the shapes of the "
    "components if the recipe gives the number of tokens. Not checked: the texts, an alphabet that "
    "is found in the texts, external tokenizers and models, and checkpoints."
)
MEASURE = (
    "With --dry-run: run STEPS training steps in a temporary directory and print the cost of the "
    "recipe instead of the recipe: parameters, FLOPs and logits per token, memory per rank, "
    "tokens/s, MFU, ETA, checkpoint size, and the first loss."
)
FRESH = (
    "Delete the run in the run directory, and start a new run. Refused if the run directory "
    "contains files that ddiff did not write."
)
VERIFY_RESUME = (
    "Repeat K recorded training steps from a checkpoint, compare their losses and final state with "
    "the recorded losses and state, and stop. The exit code is 0 if they are equal, else 1. "
    "Rounding differences are accepted if \\[backend] or the machine has changed."
)


def run(
    recipe: RecipeName,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    measure: Annotated[
        int | None, typer.Option("--measure", min=2, max=MOST, metavar="STEPS", help=MEASURE)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=FRESH)] = False,
    verify_resume: Annotated[
        int | None,
        typer.Option("--verify-resume", metavar="K", min=1, max=MOST, help=VERIFY_RESUME),
    ] = None,
) -> None:
    """Train the model of a recipe, evaluate it and draw samples.

    Repeat the command to resume an interrupted run.
    """
    settings = settings or []
    if measure is not None and not dry_run:
        raise ArgumentError(
            f"--measure {measure} needs --dry-run, because measured steps run in a temporary "
            "directory and their weights are not kept. Add --dry-run to measure, or remove "
            "--measure to train."
        )
    if verify_resume is not None and (fresh or dry_run):
        raise ArgumentError(
            "--verify-resume repeats steps of an existing run, so it excludes --fresh and "
            "--dry-run. Remove these options."
        )
    if measure is not None:
        # a measurement downloads nothing; libraries read this variable when they are imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    with pause_garbage_collection():
        from ddiff.recipe.resolve import read_recipe

        resolved = read_recipe(recipe, settings)
    if dry_run:
        _check_only(resolved, measure, fresh)
        return
    if needs_launcher(resolved):
        raise typer.Exit(_launch_run(resolved, recipe, settings, fresh, verify_resume))
    if verify_resume is not None:
        from ddiff.runs.replay import verify_resume as verify

        raise typer.Exit(verify(resolved, verify_resume))
    from ddiff.runs.stages import run_recipe

    raise typer.Exit(run_recipe(resolved, fresh=fresh))


def _check_only(recipe: BaseRecipe, measure: int | None, fresh: bool) -> None:
    """Check a recipe without training, and print the result.

    If `measure` is None, the resolved recipe is printed. Otherwise `measure` training steps are run
    and their cost is printed. The last line says that the recipe fits into memory. `fresh` is the
    option --fresh of the command, which deletes an existing run.
    """
    with pause_garbage_collection():
        from ddiff.runs.dry_run import rehearse

        verdict = rehearse(recipe, fresh=fresh)
    if measure is None:
        print(recipe.to_toml(), end="")
        print(f"# {verdict}")  # a TOML comment, so that the output is a valid recipe
        return
    from ddiff.runs.kinds import find_kind

    find_kind(recipe).print_cost(recipe, measure)
    print(verdict)


def needs_launcher(recipe: BaseRecipe) -> bool:
    """Return whether this process must launch the worker processes of a recipe.

    Returns False if the recipe uses one process, or if this process is already a worker process.
    """
    if recipe.backend_keys.processes == 1 or get_rank_info() is not None:
        return False
    return recipe.backend.members.is_distributed


def _launch_run(
    recipe: BaseRecipe, name: str, settings: list[str], fresh: bool, verify_resume: int | None
) -> int:
    """Run the command in each worker process of a recipe, and return the exit code.

    `name` is the recipe as given on the command line. The other arguments are the command's
    options.
    """
    arguments = ["run"]
    arguments += [f"--set={setting}" for setting in settings]
    if fresh:
        arguments.append("--fresh")
    if verify_resume is not None:
        arguments.append(f"--verify-resume={verify_resume}")
    return launch([*arguments, "--", name], recipe.backend_keys.processes)


def prepare(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also copy the shards to this folder or fsspec path."),
    ] = None,
) -> None:
    """Tokenize the data set of a recipe before training.

    An interrupted tokenization is resumed. The shards of a complete tokenization are verified.
    """
    from ddiff.recipe.fields_recipe import require_text_recipe
    from ddiff.recipe.resolve import read_recipe
    from ddiff.runs.tokenize import prepare_data

    resolved = require_text_recipe(read_recipe(recipe, settings or ()), "ddiff data prepare")
    prepared = prepare_data(resolved, out)
    print_columns(prepared.titles, prepared.parts)
    for remark in prepared.remarks:
        typer.echo(remark)


def encode(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Output folder; by default <run_dir>-vectors."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(min=1, max=1024, metavar="N", help="Processes that share the work."),
    ] = 1,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, metavar="N", help="Documents in a file; by default 4096."),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            metavar="N",
            help="Encode only the first N training and the first N validation documents.",
        ),
    ] = None,
) -> None:
    """Encode every document of a recipe as a vector, with the encoder in \\[encoder].

    An interrupted job is resumed, by any number of processes. A finished folder is verified. For a
    recipe of several fields, the vectors of fields with the key `encode` are stored in the cache.
    """
    if processes > 1 and get_rank_info() is None:
        options = {"--out": out, "--shard-size": shard_size, "--max-samples": max_samples}
        arguments = ["encode", *(f"--set={setting}" for setting in settings or ())]
        for name, value in options.items():
            if value is not None:
                arguments.append(f"{name}={value}")
        raise typer.Exit(launch([*arguments, "--", recipe], processes))
    from ddiff.recipe.resolve import read_recipe
    from ddiff.runs.kinds import find_kind

    resolved = read_recipe(recipe, settings or ())
    encoded = find_kind(resolved).encode(resolved, out, shard_size, max_samples)
    print_columns(encoded.titles, encoded.parts)
    for remark in encoded.remarks:
        typer.echo(remark)
