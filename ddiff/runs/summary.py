"""Print the output of a run: start line, evaluation, samples and suggested commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from ddiff.console import make_console, print_table
from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.likelihood import Evaluation, TimeBin
from ddiff.nn.denoiser import Denoiser, count_parameters, has_bfloat16_units
from ddiff.run_dir.files import RECIPE
from ddiff.runs.findings import print_findings
from ddiff.runs.gap_table import print_gaps
from ddiff.runs.gaps import FilledGaps
from ddiff.runs.terminal_view import make_printable
from ddiff.runs.trainable import TrainableRun
from ddiff.training.settings import TrainingSummary

MOST_SHOWN = 16  # samples of the summary; samples.jsonl has all


def print_start(run: TrainableRun, processes: int, kind: str) -> None:
    """Print the number of parameters, the dtypes and the device to standard error.

    `processes` is the number of ranks, and `kind` the kind of the backend, such as "ddp".
    """
    parameters = count_parameters(run.denoiser)
    trained = count_parameters(run.denoiser, only_trained=True)
    size = f"{parameters:,} parameters"
    if trained < parameters:
        size += f" ({trained:,} trained)"
    weights = _dtype_name(next(run.denoiser.parameters()).dtype)
    products = ""
    if run.precision is not None:
        products = f", matrix products in {_dtype_name(run.precision)}"
    device = run.device
    where = str(device)
    if processes > 1:
        where = f"{processes} processes ({kind}), each on {device.type}"
    console = _progress_console()
    name = run.recipe.name
    console.print(f"[bold]{name}[/]: {size} in {weights}{products}; {where}")
    on_cpu = run.precision == torch.bfloat16 and device.type == "cpu"
    if on_cpu and not has_bfloat16_units():
        console.print(
            "This CPU has no bfloat16 units; a step may take ten times as long as in float32."
        )


def print_resume(done: int, steps: int, recorded: int | None) -> None:
    """Print the step from which a run resumes.

    Args:
        done: number of finished steps.
        steps: number of steps of the present recipe.
        recorded: number of steps of the recorded recipe, which determined the learning rate until
            now; None if the learning rate does not depend on the number of steps.
    """
    if done >= steps:
        line = f"All {steps} steps are done."
    elif recorded in (None, steps):
        line = f"Resuming from step {done} of {steps}."
    else:
        line = (
            f"Resuming from step {done}. Until now the learning rate followed the schedule of "
            f"{recorded} steps; from here it follows the schedule of {steps} steps. A run of "
            f"{steps} steps from the start may reach another result."
        )
    _progress_console().print(line)


def _progress_console() -> Console:
    # standard output is reserved for the summary, which may be piped
    return make_console(stderr=True)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_summary(
    run_dir: Path,
    title: str,
    denoiser: Denoiser,
    summary: TrainingSummary,
    evaluation: Evaluation,
    counted: Baselines,
    entropy_rate: float | None,
    filled: FilledGaps,
    samples: Sequence[Mapping[str, Any]],
    judged: Mapping[str, Any],
    sample_figures: str,
    items: str,
    sample_options: str,
) -> None:
    """Print the results of a run: metrics, gaps, samples, paths and suggested commands.

    `counted` are the unigram and bigram baselines. `entropy_rate` is the entropy rate of the data,
    or None if it is unknown. `filled` are the gaps in held-out sentences. `judged` is the content
    of judged.json, empty without a judge. `sample_figures` describes the samples, such as
    "entropy 3.61 nats". `items`: name of the items that `summary.tokens` counts. `sample_options`:
    options of the suggested `ddiff sample`.
    """
    console = make_console()
    print_heading(console, run_dir, title, denoiser, summary, items)
    print_evaluation(evaluation, counted, entropy_rate, console)
    print_gaps(filled, console)
    print_samples(samples, sample_figures, console)
    print_findings(judged, console)
    written = ["evaluation.json", "samples.jsonl", "metrics.jsonl", "checkpoints/", "recipe.toml"]
    if filled.lines:
        written.insert(1, "gaps.jsonl")
    print_next_commands(console, run_dir, written, sample_options, summary.step)


def print_next_commands(
    console: Console, run_dir: Path, written: Sequence[str], sample_options: str, step: int
) -> None:
    """Print the written files, and commands that use the run or train it longer.

    `sample_options`: options of the suggested `ddiff sample`. `step`: number of training steps.
    """
    console.print(f"\nWritten to {run_dir}: {', '.join(written)}")
    console.print(
        f"Next: `ddiff sample {run_dir} {sample_options}`, `ddiff eval {run_dir}`, or "
        f"`ddiff run {run_dir / RECIPE} --set train.steps={2 * step}` to train longer"
    )


def print_heading(
    console: Console,
    run_dir: Path,
    title: str,
    denoiser: nn.Module,
    summary: TrainingSummary,
    items: str = "tokens",
) -> None:
    """Print the run directory, the title, the size of the network and the speed of the training.

    `items`: name of the items that `summary.tokens` counts.
    """
    console.print(f"\n[bold]{run_dir}[/]  {title}")
    trained = "trained before"
    if summary.tokens:
        speed = summary.tokens / summary.seconds
        trained = (
            f"this time {summary.tokens:,.0f} {items} in {summary.seconds:.0f} s "
            f"({speed:,.0f} per second)"
        )
    if summary.skipped_steps:
        trained += f", {summary.skipped_steps} steps skipped (not finite)"
    parameters = count_parameters(denoiser)
    console.print(f"{parameters:,} parameters, step {summary.step}; {trained}\n")


def print_evaluation(
    evaluation: Evaluation,
    counted: Baselines | None,
    entropy_rate: float | None,
    console: Console | None = None,
    title: str = "validation",
) -> None:
    """Print the bound, its terms, the parts of the diffusion term, and the baselines.

    `counted`: unigram and bigram baselines; None if they were not computed. `entropy_rate`: entropy
    rate of the source in nats per symbol; None if it is unknown. `title`: name of the data.
    """
    console = console or make_console()
    table = Table(title, f"nats/{evaluation.unit}", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    table.add_row(evaluation.bound, *_bound_cells(evaluation))
    if evaluation.monte_carlo_interval:
        low, high = evaluation.monte_carlo_interval
        table.add_row(
            "  Monte Carlo", f"± {(high - low) / 2:.4f}", "of times and noise, for these documents"
        )
    for name, value in evaluation.terms_nats_per_token.items():
        table.add_row(f"  {name}", f"{value:.4f}", "")
    if len(evaluation.parts_nats_per_token) > 1:
        for name, value in evaluation.parts_nats_per_token.items():
            table.add_row(f"    of diffusion, {name}", f"{value:.4f}", "")
    if evaluation.time_bins:
        table.add_row("    of diffusion, by time", *_time_cells(evaluation.time_bins))
    if counted is not None:
        table.add_row("unigram", *_baseline_cells(counted.unigram_nats_per_token, evaluation))
        nats, side = _baseline_cells(counted.bigram_nats_per_token, evaluation)
        table.add_row("bigram", nats, f"Witten-Bell; {side}")
    if entropy_rate is not None:
        table.add_row(
            "entropy rate", f"{entropy_rate:.4f}", "of the source: a lower limit for every model"
        )
    print_table(table, console)


def _baseline_cells(nats: float, evaluation: Evaluation) -> tuple[str, str]:
    """Return a baseline in nats per token, and the distance of the bound from it."""
    under = nats - evaluation.nelbo_nats_per_token
    side = "under" if under >= 0 else "above"
    return f"{nats:.4f}", f"the {evaluation.bound} is {abs(under):.4f} {side} it"


def _time_cells(bins: Sequence[TimeBin]) -> tuple[str, str]:
    """Return the shares of the bins of time, from clean text to the prior."""
    shares = " ".join(f"{100 * each.share:.0f}" for each in bins)
    return "", f"{shares} % in {len(bins)} equal intervals of information time"


def _bound_cells(evaluation: Evaluation) -> tuple[str, str]:
    bound = f"{evaluation.nelbo_nats_per_token:.4f}"
    if evaluation.interval:
        low, high = evaluation.interval
        bound += f" ± {(high - low) / 2:.4f}"
    also = evaluation.describe_perplexity()
    if evaluation.bits_per_byte is not None:
        also += f", {evaluation.bits_per_byte:.4f} bits/byte"
    documents = "document" if evaluation.documents == 1 else "documents"
    also += f"; {evaluation.tokens:,} {evaluation.unit}s, {evaluation.documents} {documents}"
    return bound, also


def print_samples(samples: Sequence[Mapping[str, Any]], figures: str, console: Console) -> None:
    """Print the mean number of network evaluations, then the first samples, each on one line.

    `figures` describes the samples.
    """
    if samples:
        nfe = sum(sample["nfe"] for sample in samples) / len(samples)
        title = f"\n{len(samples)} samples, {nfe:.4g} network evaluations for each"
        if figures:
            title += f"; {figures}"
        if len(samples) > MOST_SHOWN:
            title += f"; the first {MOST_SHOWN}"
        console.print(f"{title}:")
    for sample in samples[:MOST_SHOWN]:
        # a Text, since the sample may contain what rich takes for markup
        text = make_printable(" ".join(sample["text"].split()))
        console.print(Text(f"  {sample['index']}  {text}"))
