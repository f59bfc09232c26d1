"""Command line of ddiff. Commands call functions of `ddiff.runs`.

Importing this module does not import torch, so that `--help` is fast.

An error that the caller can fix is printed as one paragraph, and the exit code is 2.
"""

from __future__ import annotations

import codecs
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from ddiff import __version__
from ddiff.distributed.launcher import (
    MISTAKE,
    exit_with_launcher,
    exit_with_message,
    get_rank_info,
    launch,
)
from ddiff.errors import (
    REPORT,
    TRACEBACK,
    ArgumentError,
    DataError,
    PluginError,
    explain_error,
    shorten,
)
from ddiff.plugin.registry import describe_error

if TYPE_CHECKING:
    from ddiff.recipe.model import BaseRecipe

MOST = 2**31 - 1  # of counts and steps, as in a recipe
LONGEST_MESSAGE = 6000  # characters of an error message
BROKEN_PIPE = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Commands(TyperGroup):
    """Command group that turns some exceptions of commands into clear errors.

    - SystemExit of a plugin or library: without the conversion, a plugin that exits with 0 would
      look like a passed check.
    - EOFError at the end of an input file: typer would print only "Aborted.".
    - BrokenPipeError after the reader closed a pipe: typer would exit with 1 and print no message.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise DataError(explain_error(error)) from error
        except BrokenPipeError as error:
            _discard_output()
            raise typer.Exit(BROKEN_PIPE) from error
        except SystemExit as stop:
            # raised by a second SIGTERM, or by the script that calls `main`
            if stop.code == TERMINATED or _is_raised_by_main(stop):
                raise
            raise PluginError(
                f"A plugin, or a library of a plugin, ended the command: {describe_error(stop)}. "
                "The command has no result. Fix or uninstall the distribution of that plugin."
            ) from stop


def _is_raised_by_main(error: BaseException) -> bool:
    """Return whether an error was raised in the main script, not in an imported module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "__main__"


app = typer.Typer(
    cls=Commands,
    help=("Discrete diffusion: train and evaluate models, draw samples, and check plugins."),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# ---------------------------------------------------------------------- arguments and help texts

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Path of a TOML file, or the name of a shipped recipe."),
]
RunDir = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="A run directory, such as runs/<name>.")
]


def _set_option(help: str) -> Any:
    return typer.Option("--set", metavar="KEY=VALUE", help=help)


Settings = Annotated[
    list[str] | None,
    _set_option("Replace the value of a dotted key by a TOML value; may be repeated."),
]
EvaluateSettings = Annotated[
    list[str] | None,
    _set_option(
        "Replace a key of \\[evaluate], such as evaluate.draws=4, or of \\[sample] with --generate."
    ),
]
SamplerSettings = Annotated[
    list[str] | None, _set_option("Replace a key of the sampler, such as temperature=0.9.")
]

# Options of `ddiff eval`.
Until = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Add draws of times and noise until the Monte-Carlo interval has this half width.",
    ),
]
EvaluatedData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|RECIPE",
        help="Evaluate text files, or the validation text of a recipe; may be repeated.",
    ),
]
DocumentSplit = Annotated[
    Literal["file", "paragraph", "line"],
    typer.Option(help="Unit that counts as one document of a text file."),
]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Protocol of a public test set: ptb, wikitext2, wikitext103, lm1b, lambada, ag_news, "
        "pubmed, arxiv.",
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published", help="Evaluate as published code does; the result may lie below the bound."
    ),
]
JudgeName = Annotated[
    str | None,
    typer.Option(
        metavar="JUDGE",
        help="With --generate: model for the generative perplexity; the directory of an "
        "autoregressive run or of a causal language model, or a name on the hub.",
    ),
]
NoRetokenize = Annotated[
    bool,
    typer.Option(
        "--no-retokenize",
        help="With --generate: score the token ids of the samples. The judge must have the "
        "tokenizer of the run.",
    ),
]

# Options of `ddiff sample`.
SampleCount = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Number of samples; by default \\[sample] count."),
]
SamplingSteps = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Number of sampling steps.")
]
SamplingSeed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="Seed; equal seeds give equal samples.")
]
SamplingBatch = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Samples per batch; does not change the samples."),
]
Prompts = Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated.")]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with one prompt per line.")
]
InfillTexts = Annotated[
    list[str] | None,
    typer.Option(help='Text with gaps, such as "She [MASK:8] to Bath"; may be repeated.'),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Condition with a label (2) or a vector ([0.5, 1.0]); may be repeated.",
    ),
]
GuidanceWeight = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Weight of classifier-free guidance; 1 is off, above 1 follows the conditions "
        "more closely.",
    ),
]
EditedTexts = Annotated[
    list[str] | None,
    typer.Option(help="Text to edit toward the conditions; may be repeated."),
]
EditRatio = Annotated[
    float | None,
    typer.Option(
        help="With --edit: fraction of the tokens that are sampled again; by default 0.3."
    ),
]
EditModeName = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="With --edit: random, entropy (the least certain tokens) or suffix (the last tokens).",
    ),
]
EditTarget = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.npy", help="With --edit: vector condition, one vector or one per text."
    ),
]
SamplerKind = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="Sampler to use instead of \\[sample] sampler."),
]
GivenFields = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Runs of several fields: value of a field, a text or the name of a file FILE.npy; "
        "repeat it for one text per sample.",
    ),
]
OnlyFields = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Runs of several fields: draw only this field; may be repeated."
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET",
        help='Runs of several fields: joint, or "A | B" to draw A given B. Given fields without '
        "--given take the values of validation samples.",
    ),
]
ImageFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.png", help="Runs of several fields: also write pictures of the samples."
    ),
]
WatchSamples = Annotated[
    bool,
    typer.Option("--watch", help="Show the samples on the terminal while they are drawn."),
]
TrajectoryFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.json",
        help="Also write the states after each step, which `ddiff report --trajectory` plays.",
    ),
]
NoIds = Annotated[
    bool, typer.Option("--no-ids", help="Leave the token ids out of the printed JSON objects.")
]

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

# ---------------------------------------------------------------------- runs


@app.command("run")
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
    with _pause_garbage_collection():
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
    with _pause_garbage_collection():
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


@app.command("data")
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


@app.command("encode")
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
            min=1, max=MOST, metavar="N", help="Encode only the first N documents of each part."
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


@app.command("eval")
def evaluate(
    run_dir: RunDir,
    settings: EvaluateSettings = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the results to NAME.json instead of a file of the run.",
        ),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Draw samples and evaluate these.")
    ] = False,
    judge: JudgeName = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="With --generate: number of samples; by default \\[sample] count."
        ),
    ] = None,
    no_retokenize: NoRetokenize = False,
    until: Until = None,
    data: EvaluatedData = None,
    split: DocumentSplit = "file",
    protocol: ProtocolName = None,
    published: Published = False,
) -> None:
    """Evaluate the likelihood bound of a trained run on the validation text, or on other text.

    The results include confidence intervals and baselines. Results on other text are written to
    evaluation-NAME.json of the run. With --generate, samples are drawn and evaluated instead:
    entropy, repetition, diversity, and perplexity under a judge. The results are written to
    generation.json of the run.
    """
    if generate:
        if no_retokenize and judge is None:
            raise ArgumentError("--no-retokenize needs --judge, the model that scores the samples.")
        if until or data or protocol or published:
            raise ArgumentError(
                "--generate evaluates samples, so it excludes --until, --data, --protocol and "
                "--published. Remove --generate to evaluate a text."
            )
        from ddiff.runs.generation import generate_and_evaluate

        generate_and_evaluate(
            run_dir,
            judge=judge,
            count=count,
            retokenize=not no_retokenize,
            settings=settings or (),
            out=out,
        )
        return
    only_generate = {"--judge": judge, "--count": count, "--no-retokenize": no_retokenize}
    for name, value in only_generate.items():
        if value:
            raise ArgumentError(f"{name} needs --generate, which draws samples and evaluates them.")
    from ddiff.runs.evaluation_report import evaluate_run
    from ddiff.runs.kinds import EvaluationOptions

    options = EvaluationOptions(until, tuple(data or ()), split, protocol, published)
    evaluate_run(run_dir, settings or (), out, options)


@app.command("export")
def export(
    run_dir: RunDir,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Output file NAME.safetensors, a local or fsspec path."
        ),
    ],
    weights: Annotated[
        Literal["auto", "ema", "trained"],
        typer.Option(
            help="ema: the moving average; trained: the trained weights; auto: ema if the run "
            "has a moving average."
        ),
    ] = "auto",
) -> None:
    """Write all weights of a trained run to one safetensors file."""
    from ddiff.runs.export import export_run

    metadata = export_run(run_dir, file, weights)
    typer.echo(f"{file}: the {metadata['weights']} weights of step {metadata['step']} of {run_dir}")


@app.command("sample")
def sample(
    run_dir: RunDir,
    count: SampleCount = None,
    steps: SamplingSteps = None,
    seed: SamplingSeed = None,
    batch: SamplingBatch = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    infill: InfillTexts = None,
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
) -> None:
    """Draw samples from a trained run, as JSON lines.

    The tokens of prompts and infill texts stay unchanged in the samples. With --edit, some tokens
    of the given texts are sampled again. Given fields stay unchanged too.
    """
    further = _keep_given(
        given=given, only=only, target=target, images=images, watch=watch, trajectory=trajectory
    )
    others = [*_keep_given(prompt=prompt, prompts=prompts, infill=infill, count=count), *further]
    chosen = _keep_given(ratio=ratio, mode=mode, toward=toward)
    _check_edit_options(edit, others, list(chosen))
    if edit:
        from ddiff.runs.stages import edit_run

        edit_run(
            run_dir,
            edit,
            steps=steps,
            seed=seed,
            batch=batch,
            conditions=read_conditions(condition),
            guidance=guidance,
            sampler=sampler,
            settings=settings or (),
            prints_ids=not no_ids,
            **chosen,
        )
        return
    from ddiff.runs.stages import sample_run

    sample_run(
        run_dir,
        count=count,
        steps=steps,
        seed=seed,
        batch=batch,
        prompt=read_prompts(prompt, prompts),
        infill=_unwrap_single(infill),
        conditions=read_conditions(condition),
        guidance=guidance,
        sampler=sampler,
        settings=settings or (),
        prints_ids=not no_ids,
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


@app.command("compare")
def compare_runs(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of evaluated runs.")
    ],
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Average over runs that differ only in the seed.")
    ] = False,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for compare.json and compare.md.")
    ] = ".",
) -> None:
    """Compare evaluated runs in one table.

    All runs must have been evaluated in the same way.
    """
    from ddiff.evaluation.comparison import compare, write_comparison

    comparison = compare(run_dirs, group_seeds=seeds)
    print_columns(*comparison.columns())
    for remark in comparison.remarks():
        typer.echo(remark)
    command = ["ddiff compare", *map(str, run_dirs)]
    if seeds:
        command.append("--seeds")
    written = write_comparison(comparison, out, " ".join(command))
    typer.echo(f"Written to {' and '.join(map(str, written))}")


@app.command("report")
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs.")
    ],
    out: Annotated[
        str, typer.Option(metavar="FILE.html", help="The file to write.")
    ] = "report.html",
    figures: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also write the charts to this folder, as SVG files."),
    ] = None,
    trajectory: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.json",
            help="Play the trajectories of `ddiff sample --trajectory`; may be repeated. By "
            "default, trajectories are drawn.",
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            min=0, max=100, help="Samples per text run whose trajectories are drawn; 0 for none."
        ),
    ] = 2,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Sampler of the drawn trajectories; repeat it to compare samplers on the same "
            "random numbers.",
        ),
    ] = None,
) -> None:
    """Write a report of runs: one HTML file, which needs no network.

    The page shows curves, bounds, samples, pictures, clusters, and the states of some samples
    after each sampling step.
    """
    from ddiff.runs.report_command import report_runs

    written = report_runs(run_dirs, out, figures, trajectory or (), draws, sampler or ())
    typer.echo(f"Written to {written[0]}")
    if figures is not None:
        typer.echo(f"{len(written) - 1} charts written to {figures}")


# ---------------------------------------------------------------------- components


@app.command("check")
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Component, plugin to check all its processes and samplers, or recipe file.",
        ),
    ],
    settings: Settings = None,
) -> None:
    """Check the mathematical properties of a component or recipe, with the largest error of each.

    Of a recipe, every component with such properties is built in small with the settings of the
    recipe. The paths of several fields are checked too.
    """
    from ddiff.testing.check_command import check_component

    raise typer.Exit(check_component(name, settings or []))


@app.command("plugins")
def plugins(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Plugin whose components and keys are listed."),
    ] = None,
    components: Annotated[
        bool, typer.Option("--components", help="List what each plugin registers.")
    ] = False,
) -> None:
    """List the installed plugins, or the components and keys of one plugin.

    A plugin that cannot be loaded is reported, and the working plugins are listed.
    """
    if name is not None:
        _print_plugin(name)
        return
    from ddiff.plugin.loader import survey_plugins

    registry, reports = survey_plugins()
    rows = []
    for report in reports:
        found = "does not load: see below" if report.error else str(len(report.components))
        rows.append([report.plugin.name, str(report.plugin.origin), found])
    print_columns(["plugin", "from", "components"], rows)
    if components:
        typer.echo()
        rows = [
            [component.kind, component.name, component.plugin, component.target]
            for component in registry.components()
        ]
        print_columns(["kind", "name", "plugin", "target"], rows)
    errors = [report.error for report in reports if report.error is not None]
    _exit_after(f"\n{error}" for error in errors)


def _print_plugin(name: str) -> None:
    """Print the components of a plugin, with their tables and keys."""
    with _pause_garbage_collection():
        from ddiff.recipe.listing import list_plugin

        listing = list_plugin(name)
    for paragraph in listing.paragraphs:
        typer.echo(paragraph)
    if listing.errors:
        _exit_after(map(str, listing.errors))


def _exit_after(errors: Iterable[str]) -> NoReturn:
    """Print errors and exit with 2, or exit with 0 if there are no errors."""
    code = 0
    for error in errors:
        typer.echo(error, err=True)
        code = MISTAKE
    raise typer.Exit(code)


@app.command("recipes")
def recipes() -> None:
    """List the recipes that are shipped with ddiff, for `ddiff run NAME`."""
    from ddiff.recipe.files import find_shipped_recipes

    shipped = find_shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        summary = first.removeprefix("#").strip() if first.startswith("#") else ""
        typer.echo(f"{name:{width}}  {summary}".rstrip())


def print_columns(titles: list[str], rows: list[list[str]]) -> None:
    """Print a table of plain text with aligned columns.

    Lines are not wrapped at the width of the terminal.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for line in (titles, *rows):
        cells = [f"{cell:{width}}" for cell, width in zip(line, widths)]
        typer.echo("  ".join(cells).rstrip())


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ddiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------------- process


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (entry point `ddiff`). Exit with 2 after a user error."""
    # OpenMP threads that spin while they wait slow down other processes: 0.4 instead of 1.9 steps
    # per second on two busy cores. The variable must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if get_rank_info() is not None:
            # DDP warns in each run that every parameter was used, which is the normal case
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        exit_with_launcher()
        _escape_unencodable_output()
        with _exit_on_sigterm():
            try:
                app(arguments)
            finally:
                # flush here, where a full disk or a closed pipe is still reported
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()
    except SystemExit as ending:
        if arguments is None and _is_query(sys.argv[1:]):
            # skip the unloading of torch, which takes half a second
            os._exit(ending.code if isinstance(ending.code, int) else 0)
        raise
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(BROKEN_PIPE) from None
    except Exception as error:
        _end_with(error)


def _is_query(arguments: list[str]) -> bool:
    """Return whether a command only prints text: `ddiff plugins` or `ddiff run --dry-run`.

    The process of such a command may end without cleanup.
    """
    return arguments[:1] == ["plugins"] or (arguments[:1] == ["run"] and "--dry-run" in arguments)


def _end_with(error: Exception) -> NoReturn:
    """Print one paragraph about a user's error, or the traceback of a defect, and exit."""
    message = explain_error(error)
    # At exit Python would write the rest of the buffer again, fail again on a full disk, and
    # replace the exit code.
    _discard_output()
    if message is None:
        exit_with_message(f"{traceback.format_exc()}{REPORT}", 1)
    if os.environ.get(TRACEBACK):
        message = f"{traceback.format_exc()}{message}"
    exit_with_message(shorten(message, LONGEST_MESSAGE), MISTAKE)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM in a `with` block, so that locks and partial files are removed.

    Worker processes of a distributed run do not install the handler: training handles SIGTERM.
    """
    if get_rank_info() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector in a `with` block of imports.

    During imports, the collector would scan a million objects that are all in use.
    """
    # all imported objects stay alive, so that a scan frees no memory
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _escape_unencodable_output() -> None:
    """Escape the characters of the output that its encoding cannot represent.

    They are printed as `\\uXXXX`, as in TOML and JSON.
    """
    codecs.register_error("ddiff", _escape)
    for stream in (sys.stdout, sys.stderr):
        # a test or a notebook may have put another kind of stream there
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ddiff")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return the escapes of the characters that cannot be encoded, and the end of these characters.

    A character is escaped as \\uXXXX, or as \\UXXXXXXXX above 65535. This function is an error
    handler of `codecs`.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    escapes = ""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        escapes += f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return escapes, error.end


def _discard_output() -> None:
    """Discard buffered output that cannot be written, so that Python does not fail at exit."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                try:
                    os.dup2(nowhere.fileno(), stream.fileno())
                except (OSError, ValueError, AttributeError):  # no file behind the stream
                    continue
