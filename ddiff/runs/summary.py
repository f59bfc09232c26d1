"""What a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.likelihood import Evaluation
from ddiff.nn.denoiser import Denoiser
from ddiff.training.trainer import TrainingSummary


def print_start(
    name: str, denoiser: Denoiser, device: torch.device, processes: int, kind: str
) -> None:
    """The first line, beside the progress: what is trained, where, and in what its matrix products are computed."""
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    weights = next(denoiser.parameters()).dtype
    products = (
        "" if denoiser.precision is None else f", matrix products in {_short(denoiser.precision)}"
    )
    where = (
        f"{processes} processes ({kind}), each on {device.type}" if processes > 1 else str(device)
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(
        f"[bold]{name}[/]: {parameters:,} parameters in {_short(weights)}{products}; {where}"
    )
    if denoiser.precision == torch.bfloat16 and device.type == "cpu" and not _multiplies_bfloat16():
        console.print(
            "This CPU has no units for bfloat16: a step may take ten times as long as in float32."
        )


def _multiplies_bfloat16() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()  # of those without, some emulate it


def print_going_on(done: int, steps: int, before: int | None) -> None:
    """From which step a run goes on, and whether it was told to take another number, `before`, of them."""
    if done >= steps:
        line = f"All {steps} steps are done."
    elif before in (None, steps):
        line = f"Going on from step {done} of {steps}."
    else:
        line = (
            f"Going on from step {done}. The run was of {before} steps, and its learning rate fell towards their end; from "
            f"here it follows the schedule of {steps}. A run of {steps} from the start may end elsewhere."
        )
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_summary(
    run_dir: Path,
    what: str,
    denoiser: Denoiser,
    summary: TrainingSummary,
    evaluation: Evaluation,
    counted: Baselines,
    entropy_rate: float | None,
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Figures, samples, paths, what to try next; `what` was run, in a few words."""
    console = Console(soft_wrap=True, highlight=False)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    speed = summary.tokens / summary.seconds if summary.tokens else 0.0
    console.print(f"\n[bold]{run_dir}[/]  {what}")
    trained = (
        f"this time {summary.tokens:,.0f} tokens in {summary.seconds:.0f} s ({speed:,.0f} tokens/s)"
    )
    skipped = (
        f", {summary.skipped_steps} steps skipped (not finite)" if summary.skipped_steps else ""
    )
    console.print(
        f"{parameters:,} parameters, step {summary.step}; {trained if speed else 'trained before'}{skipped}\n"
    )
    print_evaluation(evaluation, counted, entropy_rate, console)
    print_samples(samples, console)
    console.print(
        f"\nWritten to {run_dir}: evaluation.json, samples.jsonl, metrics.jsonl, checkpoints/, recipe.toml"
    )
    console.print(
        f"Next: `ddiff sample {run_dir} --count 4 --steps 128`, `ddiff eval {run_dir}`, or the same command with "
        "--set train.steps=N, which goes on"
    )


def print_evaluation(
    evaluation: Evaluation,
    counted: Baselines,
    entropy_rate: float | None,
    console: Console | None = None,
) -> None:
    """The bound with its terms, parts and the baselines; `entropy_rate` of the source, in nats per symbol, if known."""
    console = console or Console(soft_wrap=True, highlight=False)
    unit = evaluation.unit
    table = Table("validation", f"nats/{unit}", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    bound = f"{evaluation.nelbo_nats_per_token:.4f}"
    if evaluation.interval:
        bound += f" ± {(evaluation.interval[1] - evaluation.interval[0]) / 2:.4f}"
    also = f"PPL {evaluation.ppl:.2f}"
    if evaluation.bits_per_byte is not None:
        also += f", {evaluation.bits_per_byte:.4f} bits/byte"
    table.add_row(
        evaluation.bound,
        bound,
        f"{also}; {evaluation.tokens:,} {unit}s, {evaluation.documents} documents",
    )
    if evaluation.monte_carlo_interval:
        low, high = evaluation.monte_carlo_interval
        table.add_row(
            "  of it from random times", f"± {(high - low) / 2:.4f}", "for these very documents"
        )
    for name, value in evaluation.terms_nats_per_token.items():
        table.add_row(f"  {name}", f"{value:.4f}", "")
    if len(evaluation.parts_nats_per_token) > 1:
        for name, value in evaluation.parts_nats_per_token.items():
            table.add_row(f"    of diffusion, {name}", f"{value:.4f}", "")
    under = counted.unigram_nats_per_token - evaluation.nelbo_nats_per_token
    side = f"{abs(under):.4f} {'under' if under >= 0 else 'above'} it"
    table.add_row(
        "unigram", f"{counted.unigram_nats_per_token:.4f}", f"the {evaluation.bound} is {side}"
    )
    table.add_row("bigram", f"{counted.bigram_nats_per_token:.4f}", "Witten-Bell")
    if entropy_rate is not None:
        table.add_row("entropy rate", f"{entropy_rate:.4f}", "of the source: no model is below it")
    console.print(table)


def print_samples(samples: Sequence[Mapping[str, Any]], console: Console) -> None:
    if samples:
        asked = sum(sample["nfe"] for sample in samples) / len(samples)
        console.print(f"\n{len(samples)} samples, the network run {asked:.4g} times for each:")
    for sample in samples:
        console.print(Text(f"  {sample['index']}  " + " ".join(sample["text"].split())))
