"""The command line. It answers about itself without importing torch; the work is done in `ddiff.runs`.

A mistake that the caller can mend is printed as one paragraph, and the exit code is 2.
"""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from ddiff import __version__
from ddiff.distributed.launcher import MISTAKE, end, follow_launcher, launch, place
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
    from ddiff.plugin.config import ComponentConfig
    from ddiff.plugin.registry import Component
    from ddiff.recipe.model import Recipe

MOST = 2**31 - 1  # of counts and steps, as in a recipe
LONGEST_MESSAGE = (
    6000  # characters; what a message repeats of the input is cut by whoever writes it, mostly
)
BROKEN_PIPE = 128 + signal.SIGPIPE


class Commands(TyperGroup):
    """The commands, none of which ends the process by itself, whatever it or a plugin of others raises.

    typer would print "Aborted." for the end of a file, and end with 1 without a word where the reader of a pipe has left.
    A plugin that leaves with 0 would look like a check that has passed.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise DataError(explain_error(error)) from error
        except BrokenPipeError as error:
            _forget_output()
            raise typer.Exit(BROKEN_PIPE) from error
        except SystemExit as stop:
            # The second SIGTERM of a user who does not want to wait, or the script that calls `main`.
            if stop.code == 128 + signal.SIGTERM or _comes_from_main(stop):
                raise
            raise PluginError(
                f"A plugin, or a library that it uses, ended the command: {describe_error(stop)}. "
                "Nothing can be said of what was asked. Fix or uninstall that distribution."
            ) from stop


def _comes_from_main(error: BaseException) -> bool:
    """Whether an error was raised by the script that was started, and by no module that it imports."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "__main__"


app = typer.Typer(
    cls=Commands,
    help="Discrete diffusion: train, evaluate and sample from recipes; prove a plugin's mathematics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Path of a TOML file, or the name of a shipped recipe."),
]
RunDir = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="A run directory, such as runs/<name>.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A dotted key and its TOML value; may be repeated."
    ),
]

DRY_RUN = (
    "Check the recipe, print it resolved with a verdict below, and stop. Checked are keys, the run directory, files that "
    "are named, the device, the memory, and how the parts fit where the recipe says how many tokens there are. Not checked "
    "is what only the data tells: the texts themselves, an alphabet found in them, tokenizers and models of other origin, "
    "checkpoints."
)
MEASURE = (
    "With --dry-run: take that many training steps in a temporary directory and print, in place of the recipe, what it "
    "costs: parameters, FLOPs and logits per token, memory per rank, tokens/s, MFU, ETA, checkpoint size, the first loss."
)


FRESH = (
    "Delete the run that stands in the run directory, and start over. Refused where anything stands there that ddiff did "
    "not write."
)
VERIFY_RESUME = (
    "Do K recorded steps again from a checkpoint, compare losses and state with what is recorded, and stop. The exit code "
    "is 0 when they are equal (to rounding, where \\[backend] or the machine is another than the record's), else 1."
)


@app.command()
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
    """Train, evaluate and sample as a recipe says; run again to resume."""
    if measure is not None and not dry_run:
        raise ArgumentError(
            f"--measure {measure} goes with --dry-run: its steps are taken in a place of their own and train nothing. Add "
            "--dry-run to measure, or leave --measure out to train."
        )
    if measure:  # nothing is fetched to be measured; the libraries read this when they are imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    if verify_resume is not None and (fresh or dry_run):
        raise ArgumentError(
            "--verify-resume does steps of a run that stands: leave out --fresh and --dry-run."
        )
    if dry_run:
        with _answered_quickly():
            from ddiff.recipe.resolve import read_recipe
            from ddiff.runs.dry_run import rehearse

            resolved = read_recipe(recipe, settings or ())
            verdict = rehearse(resolved, fresh=fresh)
        if measure is not None:
            from ddiff.runs.cost_table import print_measurement
            from ddiff.runs.measure import measure as measured

            print_measurement(measured(resolved, measure))
            print(verdict)
            return
        print(resolved.to_toml(), end="")
        print(f"# {verdict}")  # a comment, so that the output stays a recipe
        return
    from ddiff.recipe.resolve import read_recipe

    resolved = read_recipe(recipe, settings or ())
    if starts_workers(resolved):
        given = [f"--set={setting}" for setting in settings or ()] + ["--fresh"] * fresh
        given += [f"--verify-resume={verify_resume}"] if verify_resume is not None else []
        raise typer.Exit(launch(["run", *given, "--", recipe], resolved.backend_keys.processes))
    if verify_resume is not None:
        from ddiff.runs.replay import verify_resume as verify

        raise typer.Exit(verify(resolved, verify_resume))
    from ddiff.runs.stages import run_recipe

    raise typer.Exit(run_recipe(resolved, fresh=fresh))


@app.command("data")
def prepare(
    recipe: RecipeName,
    settings: Settings = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Copy the shards there: a folder, or any fsspec path."),
    ] = None,
) -> None:
    """Tokenise the text of a recipe ahead of its run; an interrupted build goes on, a finished one is verified."""
    from ddiff.recipe.resolve import read_recipe
    from ddiff.runs.tokenize import prepare_data

    prepared = prepare_data(read_recipe(recipe, settings or ()), out)
    print_columns(prepared.titles, prepared.parts)
    for remark in prepared.remarks:
        typer.echo(remark)


def starts_workers(recipe: Recipe) -> bool:
    """Whether several processes are asked for, of a backend that takes part in several, and are not there yet."""
    return (
        recipe.backend_keys.processes > 1
        and place() is None
        and recipe.backend.members.is_distributed
    )


@app.command("eval")
def evaluate(
    run_dir: RunDir,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A key of \\[evaluate], such as evaluate.draws=4."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the figures there, NAME.json, and leave the run's own as they are.",
        ),
    ] = None,
) -> None:
    """The likelihood bound of a trained run on its validation text, with intervals and baselines."""
    from ddiff.runs.stages import evaluate_run

    if out is None:
        evaluate_run(run_dir, settings or ())
    else:
        evaluate_run(run_dir, settings or (), out)


@app.command()
def export(
    run_dir: RunDir,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="The file to write, NAME.safetensors; any fsspec path."
        ),
    ],
    weights: Annotated[
        Literal["auto", "ema", "trained"],
        typer.Option(
            help="The moving average, the weights as trained, or the average where the run keeps one."
        ),
    ] = "auto",
) -> None:
    """Write a trained run's weights, whole, into one safetensors file."""
    from ddiff.runs.export import export_run

    metadata = export_run(run_dir, file, weights)
    typer.echo(f"{file}: the {metadata['weights']} weights of step {metadata['step']} of {run_dir}")


@app.command()
def sample(
    run_dir: RunDir,
    count: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Samples to draw; the recipe's by default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Steps from noise to text.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same samples.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Samples drawn at a time; changes no sample."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to go on from; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one a line.")
    ] = None,
    infill: Annotated[
        list[str] | None,
        typer.Option(help='A text with gaps: "She [MASK:8] to Bath"; may be repeated.'),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A label, or a vector [0.5, 1.0]; may be repeated."
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Above 1: heed the conditions more.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="KIND", help="Another sampler than the recipe's.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A key of the sampler, such as temperature=0.9."
        ),
    ] = None,
) -> None:
    """Draw samples from a trained run as JSON lines; what a prompt or infill text gives is kept."""
    from ddiff.runs.stages import sample_run

    sample_run(
        run_dir,
        count=count,
        steps=steps,
        seed=seed,
        batch=batch,
        prompt=read_prompts(prompt, prompts),
        infill=only_one(infill),
        conditions=read_conditions(condition),
        guidance=guidance,
        sampler=sampler,
        settings=settings or (),
    )


def read_prompts(prompts: list[str] | None, file: Path | None) -> str | list[str] | None:
    """--prompt and --prompts; a single --prompt is one text, of which --count samples are drawn."""
    if prompts and file is not None:
        raise ArgumentError(
            "--prompt and --prompts exclude each other: write all prompts into the file, one a line."
        )
    if file is None:
        return only_one(prompts)
    from ddiff.runs.prompts import read_prompts as read_file

    return read_file(file)


def only_one(texts: list[str] | None) -> str | list[str] | None:
    return texts[0] if texts and len(texts) == 1 else texts or None


def read_conditions(written: list[str] | None) -> dict[str, object] | None:
    """`NAME=VALUE` texts, the value as in a recipe."""
    from ddiff.recipe.toml import read_settings

    if not written:
        return None
    found: dict[str, object] = {}
    for one in written:
        for name, value in read_settings([one], "--condition", option="--condition").values.items():
            if name in found:
                raise ArgumentError(
                    f'--condition {shorten(one)}: "{shorten(name)}" is given twice. Give each condition once: one '
                    "value for all samples, or a list with one for each."
                )
            found[name] = value
    return found


@app.command("compare")
def compare_runs(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Finished runs, such as runs/<name>.")
    ],
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Average runs that differ in their seed alone.")
    ] = False,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where compare.json and compare.md go.")
    ] = ".",
) -> None:
    """Runs side by side in one table; refused unless all were evaluated in the same way."""
    from ddiff.evaluation.comparison import compare, write_comparison

    comparison = compare(run_dirs, group_seeds=seeds)
    print_columns(*comparison.columns())
    for remark in comparison.remarks():
        typer.echo(remark)
    command = " ".join(["ddiff compare", *map(str, run_dirs), *(["--seeds"] if seeds else [])])
    written = write_comparison(comparison, out, command)
    typer.echo(f"Written to {' and '.join(map(str, written))}")


@app.command()
def evaluate_laws(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A component, or a plugin: then all its processes and samplers."
        ),
    ],
    settings: Settings = None,
) -> None:
    """Prove the laws that a component must obey; print the largest error of each."""
    from ddiff.testing.check_command import check_component

    raise typer.Exit(check_component(name, settings or []))


@app.command()
def plugins(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A plugin, to see the keys of its tables."),
    ] = None,
    components: Annotated[
        bool, typer.Option("--components", help="List what each plugin registers.")
    ] = False,
) -> None:
    """List the installed plugins, or the keys of one; a broken plugin says why and does not hide the others."""
    from ddiff.plugin.loader import survey_plugins

    if name is not None:
        with _answered_quickly():
            print_plugin(name)
        return
    registry, reports = survey_plugins()
    rows = [
        [plugin.name, str(plugin.origin), summarised(found, error)]
        for plugin, found, error in reports
    ]
    print_columns(["plugin", "from", "components"], rows)
    if components:
        typer.echo()
        listed = [
            [part.kind, part.name, part.plugin, part.target] for part in registry.components()
        ]
        print_columns(["kind", "name", "plugin", "target"], listed)
    broken = [report.error for report in reports if report.error is not None]
    for error in broken:
        typer.echo(f"\n{error}", err=True)
    raise typer.Exit(2 if broken else 0)


def print_plugin(name: str) -> None:
    """Each component of a plugin with the place that names it and its keys; for `core` the engine's own keys first."""
    from ddiff.plugin.loader import CORE, load_plugins
    from ddiff.plugin.registry import KINDS
    from ddiff.recipe.schema import TABLES, TopLevelKeys

    registry = load_plugins([name])
    if name == CORE:
        print_keys("above all tables:", TopLevelKeys)
        for table, owner in TABLES.items():
            if owner.keys is not None:
                print_keys(f"[{table}], keys of the engine:", owner.keys)
    broken: list[PluginError] = []
    for component in registry.components():
        if component.plugin != name:
            continue
        try:
            found, keys = component.load(), component.config_class()
        except PluginError as error:
            broken.append(error)
            continue
        summary = " ".join(str(found.__doc__ or "").partition("\n\n")[0].split())
        place = KINDS[component.kind].partition(":")[0]
        print_keys(f'{place} kind = "{component.name}": {summary}', keys)
    for problem in broken:
        typer.echo(str(problem), err=True)
    if broken:
        raise typer.Exit(2)


def print_keys(title: str, model: type[ComponentConfig]) -> None:
    from ddiff.recipe.messages import describe_keys

    keys = describe_keys(model)
    width = max((len(key) for key, _, _ in keys), default=0)
    lines = [
        title,
        *(f"    {key:{width}}  {value}. {meaning}".rstrip() for key, value, meaning in keys),
    ]
    typer.echo("\n".join(lines) + "\n")


def summarised(components: list[Component], error: PluginError | None) -> str:
    return "does not load: see below" if error else str(len(components))


def print_columns(titles: list[str], rows: list[list[str]]) -> None:
    """Aligned columns of plain text, as wide as they need to be, whatever the terminal."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for line in (titles, *rows):
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip())


@app.command()
def recipes() -> None:
    """List the recipes that come with ddiff: `ddiff run NAME`."""
    from ddiff.recipe.sources import find_shipped_recipes

    shipped = find_shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(
            f"{name:{width}}  {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip()
        )


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


@contextmanager
def _answered_quickly() -> Iterator[None]:
    """Pause the garbage collector: while torch is imported it looks through a million objects that all stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _leaves_at_once(arguments: list[str]) -> bool:
    """Whether a command only answers, so that nothing is left to close when it has ended."""
    return arguments[:1] == ["plugins"] or (arguments[:1] == ["run"] and "--dry-run" in arguments)


def main(arguments: list[str] | None = None) -> None:
    """The entry point `ddiff`; exits with 2 after a mistake that the caller can mend."""
    # Threads that wait for one another by spinning stall when anything else runs: 0.4 steps a second against 1.9 measured
    # on two busy cores. It must be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if (
            place() is not None
        ):  # DDP warns of each run that no parameter went unused, which is as it should be
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        follow_launcher()
        _encode_what_can_be()
        with _ended_in_order():
            try:
                app(arguments)
            finally:
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()  # here, where a full disk or a closed pipe still has a message
    except SystemExit as ending:
        if arguments is None and _leaves_at_once(sys.argv[1:]):
            os._exit(
                ending.code if isinstance(ending.code, int) else 0
            )  # taking torch down costs half a second
        raise
    except BrokenPipeError:
        _forget_output()
        raise SystemExit(BROKEN_PIPE) from None
    except Exception as error:
        _end_with(error)


def _end_with(error: Exception) -> NoReturn:
    """A paragraph for what the user can mend; else the traceback, and where to send it."""
    message = explain_error(error)
    _forget_output()  # a full disk under the standard output would end Python with another exit code
    if message is None:
        # one command's own process dies as Python programs do; a worker hands its traceback to the launcher
        end(f"{traceback.format_exc()}{REPORT}", 1)
    if os.environ.get(TRACEBACK):
        message = f"{traceback.format_exc()}{message}"
    end(shorten(message, LONGEST_MESSAGE), MISTAKE)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C does, so that locks and half-written files go; workers leave it to training."""
    if place() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _encode_what_can_be() -> None:
    """Write what the encoding of an output lacks as an escape that TOML and JSON read back, in place of a UnicodeError."""
    codecs.register_error("ddiff", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="ddiff")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = [
        f"\\u{ord(x):04x}" if ord(x) < 0x10000 else f"\\U{ord(x):08x}"
        for x in error.object[error.start : error.end]
    ]
    return "".join(written), error.end


def _forget_output() -> None:
    """After a closed pipe: Python writes what is left in its buffer when it ends, and would complain again."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                try:
                    os.dup2(nowhere.fileno(), stream.fileno())
                except (OSError, ValueError, AttributeError):  # no file behind it
                    continue
