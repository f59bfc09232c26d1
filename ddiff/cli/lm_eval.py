"""Command that evaluates a run on tasks of the lm-evaluation-harness: lm-eval."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ddiff.cli.options import MOST, Conditions, RunDir, SamplerKind, SamplerSettings, SamplingSteps
from ddiff.cli.sampling import read_conditions

Tasks = Annotated[
    list[str],
    typer.Option(metavar="TASK", help="Task or group of the harness; may be repeated."),
]
Draws = Annotated[
    int,
    typer.Option(
        min=1,
        max=MOST,
        help="Draws of times and noise per likelihood: 1, or an even number. No effect on exact "
        "likelihoods (autoregressive runs).",
    ),
]
IncludePath = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder with more task definitions.")
]
Limit = Annotated[
    float | None,
    typer.Option(help="Number of documents per task, or a share below 1, for a test."),
]
Examples = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, max=MOST, help="Examples before each question."),
]
GenerationArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--gen-kwargs",
        metavar="KEY=VALUE",
        help="Replace an argument of generation of the tasks, such as max_gen_toks=32; may be "
        "repeated.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of times, noise and samples.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Rows per batch; does not change the results.")
]
Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate", help="Leave out the beginning of a context that is too long for a row."
    ),
]
GreedyMode = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(
        help="Questions for which a greedy continuation is drawn and compared; auto: those with "
        "one continuation."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the price of the job and stop.")]
OutFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Write the results to NAME.json instead of a file of the run."
    ),
]


def evaluate_tasks(
    run_dir: RunDir,
    tasks: Tasks,
    draws: Draws = 64,
    include_path: IncludePath = None,
    limit: Limit = None,
    num_fewshot: Examples = None,
    gen_kwargs: GenerationArguments = None,
    seed: Seed = None,
    batch: BatchSize = None,
    truncate: Truncate = False,
    greedy: GreedyMode = "auto",
    sampler: SamplerKind = None,
    steps: SamplingSteps = None,
    settings: SamplerSettings = None,
    condition: Conditions = None,
    dry_run: DryRun = False,
    out: OutFile = None,
) -> None:
    """Evaluate a run on tasks of the lm-evaluation-harness.

    Prints the price of the job before it starts. The results are written to lm-eval-TASKS.json of
    the run. Log-likelihoods are exact for an autoregressive run, and estimates of lower bounds for
    a diffusion run. Needs the package lm_eval: pip install 'discrete-diffusion[lm-eval]'.
    """
    from ddiff.recipe.settings import read_settings
    from ddiff.runs.lm_eval.harness import TaskOptions, require_harness
    from ddiff.runs.lm_eval.scoring import Settings

    require_harness()
    replaced = read_settings(gen_kwargs or (), "--gen-kwargs", option="--gen-kwargs").values
    options = TaskOptions(num_fewshot, limit, include_path, replaced or None)
    evaluation = Settings(
        draws=draws,
        seed=seed,
        batch=batch,
        truncate=truncate,
        greedy=greedy,
        sampler=sampler,
        steps=steps,
        settings=tuple(settings or ()),
        conditions=read_conditions(condition) or {},
    )
    from ddiff.runs.lm_eval.harness import evaluate_run

    evaluate_run(run_dir, tasks, evaluation, options, dry_run=dry_run, out=out)
