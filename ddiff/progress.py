"""Show the progress of a long job: a live bar on a terminal, lines of text in a file or pipe.

All progress is printed on stderr, because stdout is reserved for results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Protocol, final

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

# The interval between two lines grows with the elapsed time, so that the log of a job of several
# days has hundreds of lines instead of ten thousand.
LINE_EVERY_SECONDS = 10.0  # at the start of a job
LINE_EVERY_SECONDS_AT_MOST = 300.0
LINE_EVERY_SHARE = 0.05  # fraction of the elapsed time, and of the items of a short job
SHORTEST_INTERVAL = 1.0  # seconds between two lines of a short job

NARROW = 128  # columns of a terminal below which figures take the place of the bar

# The live display of the innermost open job. Two live displays on one terminal would overwrite
# each other.
_OPEN: ContextVar[_LiveBars | None] = ContextVar("open_progress", default=None)


class Progress(Protocol):
    """Interface through which a running job reports its progress."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """Add `n` finished items, and show named numbers, such as `tokens_per_second=5300.0`."""
        ...

    def note(self, text: str) -> None:
        """Print a text on a separate line immediately."""
        ...

    def show(self, text: str) -> None:
        """Show a text in one line below the bar, in place of the text of the last call.

        In a file or pipe, the text is printed as by `note`.
        """
        ...


_is_hidden: ContextVar[bool] = ContextVar("progress is hidden", default=False)


@contextmanager
def hide_progress() -> Iterator[None]:
    """Show no progress in a `with` block.

    For jobs that are part of another job with a bar, or that have another display on the terminal:
    two displays would overwrite each other.
    """
    token = _is_hidden.set(True)
    try:
        yield
    finally:
        _is_hidden.reset(token)


@contextmanager
def show_progress(
    total: int | None, title: str, *, start: int = 0, console: Console | None = None
) -> Iterator[Progress]:
    """Show the progress of a job inside a `with` block.

    On a terminal, the bar of a job inside another job is shown below the bar of the other job, and
    disappears at its end.

    Args:
        total: number of items; None if the number is unknown.
        title: name of the job.
        start: number of items that were finished before, such as the steps of a resumed run.
        console: output; stderr by default.
    """
    outer = _OPEN.get()
    if console is None and outer is not None and not _is_hidden.get():
        inner = outer.add_task(title, total=total, completed=start, figures="")
        try:
            yield ProgressBar(outer, inner)
        finally:
            outer.remove_task(inner)
        return
    console = _choose_console(console)
    if not console.is_terminal:
        lines = ProgressLines(total, title, start, console)
        yield lines
        lines.finish()
        return
    with _LiveBars(*_choose_columns(console.width), console=console) as bar:
        task = bar.add_task(title, total=total, completed=start, figures="")
        token = _OPEN.set(bar)
        try:
            yield ProgressBar(bar, task)
        finally:
            _OPEN.reset(token)


def _choose_columns(width: int) -> list[ProgressColumn]:
    """Return the columns of a bar on a terminal of `width` columns."""
    columns = [
        TextColumn("{task.description}"),
        _OptionalBar() if width < NARROW else BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=width < NARROW),
    ]
    if width >= NARROW:
        columns.insert(-2, TimeElapsedColumn())
    return columns


class _OptionalBar(BarColumn):
    """Bar that gives its room to the figures of a job, if it has any."""

    def __init__(self) -> None:
        super().__init__(bar_width=None)

    def render(self, task: Task) -> Any:
        return "" if task.fields["figures"] else super().render(task)


@contextmanager
def show_activity(title: str, *, console: Console | None = None) -> Iterator[None]:
    """Show that a job of unknown size is running.

    On a terminal, a spinner is shown. In a log file or pipe, a line is printed every ten seconds.
    """
    if console is None and _OPEN.get() is not None:
        with show_progress(None, title):
            yield
        return
    console = _choose_console(console)
    if console.is_terminal:
        with console.status(title):
            yield
        return
    ended = threading.Event()
    printer = threading.Thread(target=_print_elapsed, args=(title, console, ended), daemon=True)
    printer.start()
    try:
        yield
    finally:
        ended.set()
        printer.join()


def _choose_console(console: Console | None) -> Console:
    """Return the console of a display: `console`, stderr, or none while progress is hidden."""
    if _is_hidden.get():
        return Console(quiet=True, force_terminal=False)
    return console or Console(stderr=True)


def _print_elapsed(title: str, console: Console, ended: threading.Event) -> None:
    began = time.monotonic()
    while not ended.wait(LINE_EVERY_SECONDS):
        elapsed = _format_seconds(time.monotonic() - began)
        print_line(f"{title}: {elapsed} elapsed", console)


def print_line(line: str, console: Console | None = None) -> None:
    """Print a line unchanged on stderr, or on `console` if given.

    If a live bar is shown, the line is printed above the bar.
    """
    console = console or Console(stderr=True)
    # rich would style numbers and interpret text in brackets as markup
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class _LiveBars(RichProgress):
    """Bars of open jobs on a terminal, with a line of text below them."""

    line = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.line:
            # The text is cut to one line of the terminal, so that the bars do not move.
            yield Text(self.line, style="dim", no_wrap=True, overflow="ellipsis")


@final
class ProgressBar:
    """Live progress bar on a terminal."""

    def __init__(self, bar: _LiveBars, task: TaskID) -> None:
        self._bar = bar
        self._task = task
        self._figures: dict[str, float] = {}

    def advance(self, n: int = 1, **figures: float) -> None:
        self._figures |= figures
        distance = 1 if self._bar.console.width < NARROW else 2
        shown = _format_figures(self._figures, distance)
        self._bar.update(self._task, advance=n, figures=shown)

    def note(self, text: str) -> None:
        print_line(text, self._bar.console)

    def show(self, text: str) -> None:
        # a control character or a line break would move the cursor
        self._bar.line = "".join(part if part.isprintable() else " " for part in text)


@final
class ProgressLines:
    """Progress as plain lines, for a log file or a pipe.

    The interval between two lines is 5 % of the elapsed time, but at least 10 and at most 300
    seconds. A short job also prints a line after each 5 % of its items, at most one line per
    second. The interval does not depend on the number of calls of `advance`.
    """

    def __init__(self, total: int | None, title: str, start: int, console: Console) -> None:
        self._total = total
        self._title = title
        self._start = start
        self._console = console
        self._figures: dict[str, float] = {}
        self._done = start
        self._printed = start  # items done at the last line
        self._began = time.monotonic()
        self._last = self._began  # time of the last line

    def advance(self, n: int = 1, **figures: float) -> None:
        self._done += n
        self._figures |= figures
        now = time.monotonic()
        since_last = now - self._last
        interval = max(LINE_EVERY_SECONDS, LINE_EVERY_SHARE * (now - self._began))
        interval = min(interval, LINE_EVERY_SECONDS_AT_MOST)
        share = (self._done - self._printed) / self._total if self._total else 0.0
        is_share_due = since_last >= SHORTEST_INTERVAL and share >= LINE_EVERY_SHARE
        if since_last >= interval or is_share_due:
            self._print()

    def note(self, text: str) -> None:
        print_line(text, self._console)

    def show(self, text: str) -> None:
        self.note(text)

    def finish(self) -> None:
        """Print a last line, unless the latest line already shows the number of finished items."""
        if self._printed != self._done:
            self._print()

    def _print(self) -> None:
        self._printed = self._done
        self._last = time.monotonic()
        seconds = self._last - self._began
        count = f"{self._title}: {self._done}"
        if self._total:
            count += f"/{self._total} ({self._done / self._total:.0%})"
        parts = [count, _format_figures(self._figures), f"{_format_seconds(seconds)} elapsed"]
        if self._total:
            per_item = seconds / max(1, self._done - self._start)
            remaining = per_item * (self._total - self._done)
            parts.append(f"ETA {_format_seconds(remaining)}")
        print_line("  ".join(part for part in parts if part), self._console)


def _format_seconds(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _format_figures(figures: dict[str, float], distance: int = 2) -> str:
    """Format named numbers as `loss 4.215  tokens/s 5.31k`, with `distance` spaces between them."""
    parts = []
    for name, value in figures.items():
        label = name.replace("_per_second", "/s").replace("_", " ")
        parts.append(f"{label} {_format_number(value)}")
    return (" " * distance).join(parts)


def _format_number(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"
