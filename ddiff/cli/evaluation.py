"""Commands for evaluation: eval, compare, report, pareto and clock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ddiff.cli.completion import complete_run_dir, complete_sampler
from ddiff.cli.launching import launch_for_run
from ddiff.cli.options import (
    MOST,
    ClockSource,
    DocumentSplit,
    EvaluatedCount,
    EvaluatedData,
    EvaluateSettings,
    FeaturesName,
    JudgeName,
    NoRetokenize,
    ProtocolName,
    Published,
    PublishedPaper,
    RunDir,
    RunProcesses,
    SamplerSettings,
    SamplingBatch,
    SamplingSeed,
    SweepJudge,
    SweepSamplers,
    SweepSteps,
    SweepTemperatures,
    Until,
)
from ddiff.cli.output import print_columns
from ddiff.errors import ArgumentError


def evaluate(
    context: typer.Context,
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
        bool, typer.Option("--generate", help="Draw samples and evaluate the samples.")
    ] = False,
    judge: JudgeName = None,
    count: EvaluatedCount = None,
    no_retokenize: NoRetokenize = False,
    features: FeaturesName = None,
    until: Until = None,
    data: EvaluatedData = None,
    split: DocumentSplit = "file",
    protocol: ProtocolName = None,
    published: Published = False,
    program: PublishedPaper = None,
    clock: ClockSource = "recipe",
    processes: RunProcesses = None,
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
        if until is not None or data or split != "file" or protocol or published or program:
            raise ArgumentError(
                "--generate evaluates samples, and excludes --until, --data, --split, --protocol, "
                "--published and --program. Remove --generate to evaluate a text."
            )
        launch_for_run(context, run_dir, processes)
        from ddiff.runs.generation import generate_and_evaluate

        generate_and_evaluate(
            run_dir,
            judge=judge,
            count=count,
            retokenize=not no_retokenize,
            settings=settings or (),
            out=out,
            features=features,
            clock=clock,
        )
        return
    _refuse_without_generate(
        {
            "--judge": judge,
            "--count": count,
            "--no-retokenize": no_retokenize,
            "--features": features,
        }
    )
    launch_for_run(context, run_dir, processes)
    from ddiff.runs.evaluation_report import evaluate_run
    from ddiff.runs.kinds import EvaluationOptions

    given = EvaluationOptions(until, tuple(data or ()), split, protocol, published, program, clock)
    evaluate_run(run_dir, settings or (), out, given)


def _refuse_without_generate(options: Mapping[str, object]) -> None:
    """Raise ArgumentError if an option of --generate was given without --generate."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ArgumentError(f"{name} needs --generate, which draws samples and evaluates them.")


def compare_runs(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="Directories of evaluated runs.",
            autocompletion=complete_run_dir,
        ),
    ],
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Average over runs that differ only in the seed.")
    ] = False,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for compare.json and compare.md.")
    ] = ".",
    generation: Annotated[
        bool,
        typer.Option(
            help="Include the figures of samples that `ddiff eval --generate` drew, if there are "
            "some."
        ),
    ] = True,
) -> None:
    """Compare evaluated runs in one table.

    All runs must have been evaluated in the same way, and so must their samples.
    """
    from ddiff.evaluation.comparison import compare, write_comparison

    comparison = compare(run_dirs, group_seeds=seeds, generation=generation)
    print_columns(*comparison.columns())
    for remark in comparison.remarks():
        typer.echo(remark)
    command = ["ddiff compare", *map(str, run_dirs)]
    if seeds:
        command.append("--seeds")
    if not generation:
        command.append("--no-generation")
    written = write_comparison(comparison, out, " ".join(command))
    typer.echo(f"Written to {' and '.join(map(str, written))}")


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...", help="Directories of runs.", autocompletion=complete_run_dir
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE.html", help="Output file.")] = "report.html",
    figures: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Also write the charts to this folder, as SVG and PNG files."
        ),
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
            min=0,
            max=100,
            help="Samples per text run whose trajectories are drawn. With 0, only files are read: "
            "no trajectories, confusions or formulas.",
        ),
    ] = 2,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Sampler of the drawn trajectories; repeat it to compare samplers on the same "
            "random numbers.",
            autocompletion=complete_sampler,
        ),
    ] = None,
) -> None:
    """Write a report of runs: one HTML file, which needs no network.

    The page shows curves, bounds, samples, pictures, clusters and their confusions, formulas, and
    the states of some samples after each sampling step.
    """
    from ddiff.runs.report_command import report_runs

    written = report_runs(run_dirs, out, figures, trajectory or (), draws, sampler or ())
    typer.echo(f"Written to {written[0]}")
    if figures is not None:
        typer.echo(f"{len(written) - 1} files of charts written to {figures}")


def pareto(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...",
            help="Directories of trained text runs.",
            autocompletion=complete_run_dir,
        ),
    ],
    judge: SweepJudge = None,
    steps: SweepSteps = None,
    temperature: SweepTemperatures = None,
    sampler: SweepSamplers = None,
    settings: SamplerSettings = None,
    count: Annotated[
        int, typer.Option(min=2, max=MOST, help="Number of samples of each point.")
    ] = 64,
    seed: SamplingSeed = None,
    batch: SamplingBatch = None,
    no_retokenize: Annotated[
        bool,
        typer.Option(
            "--no-retokenize",
            help="Judge the token ids of the samples. The judge must have the tokenizer of the "
            "runs.",
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete recorded points, and draw all points again.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.svg",
            help="File of the chart; by default pareto.svg in the directory of a single run, or "
            "in the working directory.",
        ),
    ] = None,
) -> None:
    """Draw and judge samples at several steps, temperatures and samplers, and show the fronts.

    Each point has the perplexity under the judge, the entropy and the network evaluations of its
    samples. The points are written to pareto.json of each run as soon as they are measured.
    Repeat the command to resume it; recorded points are not drawn again.
    """
    if judge is None:
        raise ArgumentError(
            "ddiff pareto needs --judge, the model whose perplexity of the samples is measured: "
            "the directory of an autoregressive run, such as a run of the recipe ar_small, the "
            "directory of a causal language model, or a name on the hub."
        )
    from ddiff.runs.pareto import SweepSampling, sweep_runs
    from ddiff.runs.pareto_settings import SweepGrid, read_integers, read_numbers

    grid = SweepGrid(
        steps=None if steps is None else read_integers(steps, "--steps"),
        temperatures=None if temperature is None else read_numbers(temperature, "--temperature"),
        samplers=sampler or (),
        settings=settings or (),
    )
    sampling = SweepSampling(count, seed, batch, retokenize=not no_retokenize)
    swept = sweep_runs(run_dirs, judge, grid, sampling, fresh=fresh, out=out)
    print_columns(*swept.columns())
    for remark in swept.remarks:
        typer.echo(remark)
    typer.echo(f"Written to {' and '.join(map(str, swept.written))}")


def clock(
    run_dir: RunDir,
    cells: Annotated[
        int,
        typer.Option(
            min=4,
            max=64,
            help="Fineness of the measured points; 6 gives 28 points for a tree with two levels "
            "above the tokens.",
        ),
    ] = 6,
    draws: Annotated[
        int, typer.Option(min=1, max=256, help="Draws per row in the comparison of the clocks.")
    ] = 4,
    rows: Annotated[
        int | None,
        typer.Option(min=8, max=MOST, help="Number of validation rows; by default all."),
    ] = None,
) -> None:
    """Find the clock of a trained tree with the smallest bound.

    The clock decides when tokens become clusters and masks. The path of a better clock is searched
    on half of the validation documents. Its bound is compared on the other half with that of the
    recipe's clock and of masked diffusion. The result is written to clock.json of the run;
    `ddiff eval` and `ddiff sample` use it with --clock found.
    """
    from ddiff.runs.clock import ClockSearch, find_run_clock
    from ddiff.runs.clock_table import describe_choice, make_bound_rows, make_path_rows

    record, written = find_run_clock(run_dir, ClockSearch(cells, draws=draws, rows=rows))
    print_columns(*make_bound_rows(record))
    typer.echo("")
    print_columns(*make_path_rows(record))
    for sentence in describe_choice(record):
        typer.echo(sentence)
    typer.echo(f"Written to {written}")
    typer.echo(f"Next: `ddiff eval {run_dir} --clock found`, or `ddiff sample` with --clock found")
