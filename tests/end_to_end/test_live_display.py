"""Live displays of `ddiff run` on a terminal: samples that are drawn, and a growing sample."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from small import FLAT, SENTENCES, working_in
from test_trajectories import make_screen, run_on_terminal

from ddiff.progress import show_progress
from ddiff.runs.terminal_view import SHORTEST_FRAME, FrameClock, watch_samples


class FakeTime:
    """Clock that stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("drawing", [0.0001, 0.005, 0.3])
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_frames_take_at_most_their_share_of_the_time(drawing: float, share: float) -> None:
    now = FakeTime()
    clock = FrameClock(share, now)
    drawn = 0
    for _ in range(20000):
        now.now += 0.002  # a step of the sampler
        if clock.is_due():
            with clock.measure():
                now.now += drawing
            drawn += 1
    assert drawn >= 2
    # the last frame may have no pause after it
    assert (drawn - 1) * drawing <= share * now.now
    assert drawn <= 1 + now.now / SHORTEST_FRAME


def count_draws(console: Console, steps: int, **options: bool) -> list[int]:
    """Return the numbers of the steps whose states are read."""
    read = []

    def make_draw(step: int) -> tuple[float, Sequence[Text]]:
        read.append(step)
        return 0.5, [Text(f"state {step}")]

    with watch_samples(console, **options) as show:
        for step in range(1, steps + 1):
            show(step, lambda step=step: make_draw(step))  # type: ignore[misc]
    return read


def test_watch_reads_few_states_and_always_the_last() -> None:
    read = count_draws(make_screen(), 2000)
    assert read[0] == 1
    assert read[-1] == 2000
    assert len(read) < 200


def test_watch_in_a_pipe_reads_only_the_last_state() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    assert count_draws(console, 50) == [50]
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.split("\n")[:2] == ["step 50, mean time 0.500", "state 50"]
    assert "\x1b" not in written


def test_line_below_a_bar_is_replaced_on_a_terminal_and_printed_in_a_file() -> None:
    texts = ["step 1: sample: a\nb", "step 2: sample: [bold]" + "word " * 40]
    for width in (80, 200):
        console = make_screen(width)
        with show_progress(2, "training", console=console) as job:
            for text in texts:
                job.advance(1, loss=1.0)
                job.show(text)
        frame = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
        last = frame.rstrip("\n").split("\n")[-1]
        assert last.startswith("step 2: sample: [bold]word")
        assert len(last) <= width
    plain = Console(file=io.StringIO(), force_terminal=False, width=80)
    with show_progress(2, "training", console=plain) as job:
        for text in texts:
            job.show(text)
    written = plain.file.getvalue()  # type: ignore[attr-defined]
    assert "".join(f"{text}\n" for text in texts) == written


def test_figures_of_a_bar_fit_a_terminal_of_80_columns() -> None:
    console = make_screen()
    figures = {"loss": 4.2153, "bound": 4.3341, "tokens_per_second": 5310.0, "bigram": 4.0642}
    with show_progress(450, "training", console=console) as job:
        job.advance(60, **figures)
    shown = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
    assert "60/450 loss 4.215 bound 4.334 tokens/s 5.31k bigram 4.064 ETA" in shown
    assert "…" not in shown


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("live")
    with working_in(folder):
        Path("corpus.txt").write_text(SENTENCES)
        yield folder


@pytest.mark.slow
def test_run_on_a_terminal_shows_gaps_and_samples_while_they_are_drawn(place: Path) -> None:
    settings = [*FLAT, "data.length=32", "train.steps=6", "tokenizer.size=300", "sample.every=3"]
    arguments = ["run", "small.toml", *(f"--set={setting}" for setting in settings)]
    screen = run_on_terminal([sys.executable, "-m", "ddiff", *arguments])
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    assert "filling gaps: step 1, mean time" in plain
    assert "sampling: step 1, mean time" in plain
    assert "░" in plain
    assert "step 6: sample: " in plain
    assert "bigram" in plain
    lines = re.split(r"[\r\n]+", plain)
    assert max(map(len, lines)) <= 80
    # removed at the end, because the summary on standard output has the samples
    assert re.search(r"\x1b\[\d*A[^░]*$", screen)
