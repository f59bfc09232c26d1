"""Live display of the states of samples on the terminal during sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ddiff.data.pictures import Pixels
from ddiff.progress import hide_progress
from ddiff.runs.report.clusters import SPACE, TokenTree, show_token

MOST_WATCHED = 4  # samples of a batch that the terminal shows
STYLES = ("", "black on yellow", "black on cyan", "black on magenta")
"""Terminal styles of the levels between the tokens and the mask, by level."""
HALF_BLOCK = "▀"  # its upper half has the text colour, and its lower half the background colour
SHORTEST_FRAME = 0.05  # seconds between two frames, because eyes see no more
WATCH_SHARE = 0.2  # largest share of the time that drawing takes with --watch

Draw = Callable[[], tuple[float, Sequence[Text]]]
"""draw() reads the states of samples, and returns their mean time and their texts."""
Show = Callable[[int, Draw], None]
"""show(step, draw) shows the samples after a step. It does not call `draw` for every step."""


class FrameClock:
    """Clock that limits the share of the time in which frames are drawn.

    The pause after a frame is at least its drawing time divided by `share`. Reading the states is a
    part of drawing, because the host waits for the device.

        if clock.is_due():
            with clock.measure():
                draw()
    """

    def __init__(self, share: float, now: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._now = now
        self._next = now()

    def is_due(self) -> bool:
        """Return whether the next frame may be drawn."""
        return self._now() >= self._next

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the time in which a frame is drawn in a `with` block."""
        began = self._now()
        yield
        ended = self._now()
        self._next = ended + max(SHORTEST_FRAME, (ended - began) / self._share)


@contextmanager
def watch_samples(
    console: Console | None = None,
    title: str = "",
    share: float = WATCH_SHARE,
    transient: bool = False,
) -> Iterator[Show]:
    """Redraw samples in place on stderr, or on `console`, and hide progress bars.

    Yields a function `Show`. In a file or pipe, only the last texts are printed.

    Args:
        console: output; stderr by default.
        title: first words of the line above the samples.
        share: largest share of the time that drawing takes.
        transient: remove the samples at the end.
    """
    console = console or Console(stderr=True)
    # On a terminal, a bar and the samples would overwrite each other.
    hiding = hide_progress() if console.is_terminal else nullcontext()
    clock = FrameClock(share)
    last: tuple[int, Draw] | None = None  # the newest state, unless it is shown
    with hiding, Live(console=console, auto_refresh=False, transient=transient) as live:

        def draw_frame(step: int, draw: Draw) -> None:
            mean_time, samples = draw()
            heading = f"{title}: step" if title else "step"
            first = Text(f"{heading} {step}, mean time {mean_time:.3f}\n", style="bold")
            live.update(_fit_screen(first, samples, console), refresh=console.is_terminal)

        def show(step: int, draw: Draw) -> None:
            nonlocal last
            last = (step, draw)
            if console.is_terminal and clock.is_due():
                with clock.measure():
                    draw_frame(step, draw)
                last = None

        yield show
        if last is not None and not transient:
            draw_frame(*last)
        live.refresh()


def _fit_screen(title: Text, samples: Sequence[Text], console: Console) -> Text:
    """Return the title and as many of the first samples as the terminal has lines for.

    The first sample is always part of the text; rich cuts it if it is too long.
    """
    content = title.copy()
    for number, sample in enumerate(samples[:MOST_WATCHED]):
        longer = content.copy().append_text(sample).append("\n\n")
        height = len(longer.wrap(console, console.width))
        if number and console.is_terminal and height > console.height:
            break
        content = longer
    return content


class StateView:
    """Coloured text of tokens, nodes and masks, in which changes since the last frame are marked.

    Masks are shaded blocks. A node of a tree is shown by its typical tokens, in brackets.
    """

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree
        self._before: Sequence[Sequence[int]] = []
        self._batch = 0

    def draw(self, states: Sequence[Sequence[int]], batch: int = 0) -> list[Text]:
        """Return the texts of the first samples of a batch.

        `states` are those of the batch after a step, and `batch` is the number of the batch.
        Changes since the last drawn step of the same batch are marked.
        """
        states = states[:MOST_WATCHED]
        before = self._before if batch == self._batch and self._before else states
        self._before = states
        self._batch = batch
        drawn = []
        for row, previous in zip(states, before):
            text = Text()
            for state, old in zip(row, previous):
                text.append_text(self._draw_state(state, old))
            drawn.append(text)
        return drawn

    def _draw_state(self, state: int, old: int) -> Text:
        level = self.tree.level_of(state)
        is_new = state != old
        if level == 0:
            word = make_printable(show_token(self.tree.words[state]).replace(SPACE, " "))
            is_correction = is_new and self.tree.level_of(old) == 0
            style = "bold red" if is_correction else "bold" if is_new else ""
            return Text(word, style=style)
        if level == len(self.tree.parents):
            # red: the position was a token or a node before, and is masked again
            return Text("░", style="red" if is_new else "dim")
        style = STYLES[min(level, len(STYLES) - 1)]
        # Without spaces, so that a line is broken between two nodes and not within a node.
        words = make_printable(self.tree.name_state(state).replace(" ", ""))
        return Text(f"[{words}]", style=style).append(" ", style="default on default")


def make_printable(text: str) -> str:
    """Return a text without control characters, which a terminal would obey."""
    return "".join(part if part.isprintable() else "·" for part in text)


def draw_pixels(pixels: Pixels) -> Text:
    """Return a picture as text with two rows of pixels in a line.

    An odd last row is shown with a black row below.
    """
    text = Text()
    for top in range(0, len(pixels), 2):
        if top:
            text.append("\n")
        upper = pixels[top].tolist()
        lower = pixels[top + 1].tolist() if top + 1 < len(pixels) else [(0, 0, 0)] * len(upper)
        for first, second in zip(upper, lower):
            style = f"rgb({','.join(map(str, first))}) on rgb({','.join(map(str, second))})"
            text.append(HALF_BLOCK, style=style)
    return text
