"""Print the cost of a recipe: parameters, FLOPs and speed, and memory by backend."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from rich.table import Table
from rich.text import Text

from ddiff.console import make_console, print_table
from ddiff.runs.cost import TRAINING, Footprint
from ddiff.runs.measure import Measurement

GIB = 2.0**30
MIB = 2.0**20
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Row = tuple[str, str, str]
"""Name of a figure, value, method of measurement."""


def print_measurement(measured: Measurement) -> None:
    """Print all figures of a measurement.

    A warning follows if the first loss differs from the expected first loss.
    """
    recipe = measured.recipe
    ranks = recipe.backend_keys.processes
    rows = plural(recipe.train.batch // ranks, "row", "rows")
    heading = [
        f"{recipe.name}, one of {plural(ranks, 'process', 'processes')}, on {measured.device}, "
        f"{rows} of {recipe.length} tokens a step"
    ]
    if measured.items != "tokens":
        heading.append(f"Figures per token count the {measured.items}, and not other positions.")
    if measured.stand_in:
        heading.append(f"Random tokens replace the text of the recipe: {measured.stand_in}")
    print_cost(
        heading,
        [*_counted_rows(measured), *_timed_rows(measured), *_loss_rows(measured)],
        make_memory_table(measured.cost.footprint, measured.cost.gathered, ranks),
        _warning(measured) if measured.is_off else None,
    )


def print_cost(
    heading: Sequence[str], rows: Sequence[Row], memory: Table, warning: str | None
) -> None:
    """Print a heading, the figures, the table of the memory, and a warning if there is one."""
    console = make_console()
    for line in heading:
        console.print(line, markup=False)
    console.print()
    print_table(make_table(rows), console)
    console.print()
    print_table(memory, console)
    if warning is not None:
        console.print(f"\n{warning}", markup=False)


def make_table(rows: Sequence[Row]) -> Table:
    """Return a table of figures."""
    table = Table("", "", "how", box=None, pad_edge=False, show_header=False)
    table.columns[1].justify = "right"
    for row in rows:
        # Text, since a cell may contain what rich takes for markup
        table.add_row(*map(Text, row))
    return table


def _counted_rows(measured: Measurement) -> list[Row]:
    cost = measured.cost
    backbone, embedding, head = cost.parameters
    return [
        (
            "parameters",
            f"{cost.parameters.total:,}",
            f"backbone {backbone:,}, embedding {embedding:,}, head {head:,}",
        ),
        (
            "logits/token",
            f"{cost.logits:,.1f}",
            f"counted; the vocabulary has {measured.num_tokens:,} tokens",
        ),
        (
            "FLOPs/token",
            format_count(cost.flops),
            f"{TRAINING} x (backbone {format_count(cost.backbone_flops)} + head "
            f"{format_count(cost.head_flops)}): a backward pass counts as two forward passes; "
            "backbone: 2 n m k for each matrix product, with attention; head: 2 x width x logits",
        ),
    ]


def _timed_rows(measured: Measurement) -> list[Row]:
    pace = measured.pace
    recipe = measured.recipe
    keys = recipe.train
    ranks = recipe.backend_keys.processes
    per_step = f"{pace.step_seconds:.3f} s a step"
    if ranks > 1:
        per_step += (
            f" x {ranks} processes = {pace.tokens_per_second * ranks:,.0f} without communication"
        )
    positions = keys.steps * keys.batch * recipe.length
    processes = plural(ranks, "process", "processes")
    return [
        ("tokens/s", f"{pace.tokens_per_second:,.0f}", per_step),
        ("MFU", f"{measured.mfu:.1%}", f"of {format_count(pace.peak)}FLOP/s: {pace.peak_from}"),
        (
            "ETA",
            format_duration(pace.step_seconds * keys.steps),
            f"for {keys.steps:,} steps, {format_count(positions)} positions, with {processes}",
        ),
        (
            "checkpoint",
            format_bytes(measured.cost.checkpoint),
            f"weights and optimizer; {keys.keep} are kept",
        ),
    ]


def _loss_rows(measured: Measurement) -> list[Row]:
    initial = measured.initial
    rows = [("first loss", f"{measured.first_loss:.4f}", "nats/token, of training step 1")]
    if initial is None:
        unknown = "unknown: the head does not start from the token counts"
        return [*rows, ("  expected", "", unknown)]
    expected = (
        f"± {initial.error:.4f}: mean loss of the head's initial distribution over rows and times; "
        f"standard deviation of one step: {initial.spread:.4f}"
    )
    return [
        *rows,
        ("  expected", f"{initial.mean:.4f}", expected),
        (
            "  of step 1",
            f"{initial.of_step_1:.4f}",
            "the same for the rows, times and noise of step 1",
        ),
        (
            "  unigram",
            f"{measured.unigram:.4f}",
            "unigram entropy of the training text, at which a bound starts",
        ),
    ]


def make_memory_table(footprint: Footprint, gathered: int, ranks: int) -> Table:
    """Return a table of the bytes on each rank, with one row for each backend.

    The bytes of activations were measured for the micro-batch of one rank.

    Args:
        footprint: bytes of one process that stores the whole model.
        gathered: bytes of weights that FSDP gathers at once.
        ranks: number of processes of the recipe.
    """
    columns = ("parameters", "gradients", "optimizer", "communication", "activations", "total")
    table = Table("memory per rank", *columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Footprint] = {"single": footprint}
    if ranks > 1:
        rows = {
            f"single, accumulate x {ranks}": footprint,
            f"ddp, {ranks} processes": footprint.replicate(),
            f"fsdp, {ranks} processes": footprint.shard(ranks, gathered),
        }
    for name, row in rows.items():
        figures = (
            row.parameters,
            row.gradients,
            row.optimizer,
            row.exchange,
            row.activations,
            row.total,
        )
        table.add_row(name, *map(format_bytes, figures))
    return table


def _warning(measured: Measurement) -> str:
    assert measured.initial is not None
    return (
        f"WARNING: the first loss is {measured.first_loss:.4f}, but the initial distribution of "
        f"the head has the loss {measured.initial.of_step_1:.4f} on the same rows, times and "
        "noise, for any hidden states. Training therefore sums, weights or counts differently from "
        "the objective. Check the loss, its denominators, and the reduction of both by the backend."
    )


def plural(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def format_count(value: float) -> str:
    """Format a number with four digits and an SI prefix, and a space before the unit."""
    for size, letter in _PREFIXES:
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g} "


def format_bytes(count: float) -> str:
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB"


def format_duration(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    clock = str(timedelta(seconds=rest))
    return f"{days} d {clock}" if days else clock
