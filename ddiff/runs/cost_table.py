"""What a person reads of a measurement: one table, then memory by backend."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.table import Table

from ddiff.runs.cost import TRAINING, Footprint
from ddiff.runs.measure import Measurement

GIB, MIB = 2.0**30, 2.0**20
WIDE = 130  # of lines that no terminal breaks


def print_measurement(measured: Measurement) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=WIDE, highlight=False, markup=False)
    keys, ranks = measured.recipe.train, measured.recipe.backend_keys.processes
    title = f"{measured.recipe.name}, one of {_many(ranks, 'process', 'processes')}, on {measured.device}"
    rows = _many(keys.batch // ranks, "row", "rows")
    console.print(f"{title}, {rows} of {measured.recipe.length} tokens a step")
    if measured.stand_in:
        console.print(f"Random tokens stand in for its text: {measured.stand_in}")
    console.print()
    table = Table("", "", "how", box=None, pad_edge=False, show_header=False)
    table.columns[1].justify = "right"
    for row in (*_counted(measured), *_timed(measured), *_first(measured)):
        table.add_row(*row)
    console.print(table)
    console.print()
    console.print(_memory(measured))
    if measured.is_off:
        console.print(f"\n{_warning(measured)}")


def _counted(measured: Measurement) -> list[tuple[str, str, str]]:
    cost = measured.cost
    trunk, embedding, head = cost.parameters
    return [
        (
            "parameters",
            f"{cost.parameters.total:,}",
            f"trunk {trunk:,}, embedding {embedding:,}, head {head:,}",
        ),
        (
            "logits/token",
            f"{cost.logits:,.1f}",
            f"of {measured.num_tokens:,}: what the head computes, counted",
        ),
        (
            "FLOPs/token",
            _short(cost.flops),
            f"{TRAINING} x (trunk {_short(cost.trunk_flops)} + head {_short(cost.head_flops)}), a backward being two "
            "forwards; trunk: 2nmk of its products by shapes, attention's too; head: 2 x width x logits",
        ),
    ]


def _timed(measured: Measurement) -> list[tuple[str, str, str]]:
    pace, recipe = measured.pace, measured.recipe
    ranks, keys = recipe.backend_keys.processes, recipe.train
    together = (
        f" x {ranks} processes = {pace.tokens_per_second * ranks:,.0f}, their exchange not counted"
        * (ranks > 1)
    )
    tokens = keys.steps * keys.batch * recipe.length
    checkpoint = measured.cost.checkpoint
    return [
        (
            "tokens/s",
            f"{pace.tokens_per_second:,.0f}",
            f"{pace.step_seconds:.3f} s a step{together}",
        ),
        ("MFU", f"{measured.mfu:.1%}", f"of {_short(pace.peak)}FLOP/s: {pace.peak_from}"),
        (
            "ETA",
            _span(pace.step_seconds * keys.steps),
            f"for {keys.steps:,} steps, {_short(tokens)} tokens, on {ranks} such",
        ),
        ("checkpoint", _bytes(checkpoint), f"weights and optimizer; {keys.keep} are kept"),
    ]


def _first(measured: Measurement) -> list[tuple[str, str, str]]:
    law = measured.first_law
    rows = [("first loss", f"{measured.first_loss:.4f}", "nats/token, of step 1 as it was trained")]
    if law is None:
        return [
            *rows,
            ("  expected", "", "unknown: the head begins with other weights than its counts"),
        ]
    expected = (
        f"± {law.error:.4f}: the loss of the head's first law over rows and times, no network asked"
    )
    return [
        *rows,
        ("  expected", f"{law.mean:.4f}", f"{expected}; a step is off by {law.spread:.4f}"),
        ("  there", f"{law.there:.4f}", "the same on the rows, times and noise of step 1"),
        ("  unigram", f"{measured.unigram:.4f}", "the entropy by counts: what a bound starts from"),
    ]


def _memory(measured: Measurement) -> Table:
    """Bytes on each rank, activations of one rank's micro-batch as they were measured."""
    footprint, ranks = measured.cost.footprint, measured.recipe.backend_keys.processes
    table = Table(
        "memory per rank",
        "parameters",
        "gradients",
        "optimizer",
        "exchange",
        "step's rise",
        "in all",
    )
    table.box, table.pad_edge = None, False
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Footprint] = {"single": footprint}
    if ranks > 1:
        rows = {
            f"single, accumulate x {ranks}": footprint,
            f"ddp, {ranks} processes": footprint.replicated(),
            f"fsdp, {ranks} processes": footprint.sharded(ranks, measured.cost.gathered),
        }
    for name, one in rows.items():
        figures = (
            one.parameters,
            one.gradients,
            one.optimizer,
            one.exchange,
            one.activations,
            one.total,
        )
        table.add_row(name, *map(_bytes, figures))
    return table


def _warning(measured: Measurement) -> str:
    law = measured.first_law
    assert law is not None
    return (
        f"WARNING: the first loss is {measured.first_loss:.4f}, and the head's first law has {law.there:.4f} on the same "
        "rows, times and noise, whatever the trunk says there. What is summed, weighed or counted in training differs from "
        "what the objective says: look at the loss, its denominators and what the backend does to them."
    )


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g} "


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _span(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    clock = str(timedelta(seconds=rest))
    return f"{days} d {clock}" if days else clock
