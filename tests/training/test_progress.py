"""Progress display: lines in a log file, a bar on a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from ddiff.progress import show_activity, show_progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("ddiff.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def shown(clock: Clock, total: int | None, seconds: float, count: int, start: int = 0) -> list[str]:
    out = io.StringIO()
    with show_progress(
        total, "training", start=start, console=Console(file=out, force_terminal=False, width=40)
    ) as job:
        for _ in range(count):
            clock.now += seconds
            job.advance(1, loss=4.21456, tokens_per_second=5312.0)
    return out.getvalue().splitlines()


def test_progress_log_prints_every_10_s_or_every_twentieth_of_the_work(clock: Clock) -> None:
    slow = shown(clock, 1000, seconds=2.0, count=20)
    assert [line.split()[1] for line in slow] == ["5/1000", "10/1000", "15/1000", "20/1000"]
    fast = shown(clock, 100, seconds=0.5, count=100)
    assert [line.split()[1] for line in fast] == [f"{n}/100" for n in range(5, 101, 5)]


def test_progress_log_of_a_long_job_prints_at_fixed_time_intervals(clock: Clock) -> None:
    def minutes(seconds: float, count: int) -> list[str]:
        clock.now = 0.0
        return shown(clock, 10**9, seconds, count)

    day = 24 * 3600
    seldom, often = minutes(60.0, day // 60), minutes(2.0, day // 2)
    assert 300 < len(seldom) < 500
    assert abs(len(often) - len(seldom)) < 100, "the number of lines depends on the number of steps"
    assert len(minutes(0.01, 5000)) == 5, "expected a line every ten seconds at the start"


def test_progress_log_of_a_short_job_prints_only_one_line(clock: Clock) -> None:
    lines = shown(clock, 40, seconds=0.1, count=10, start=20)
    assert lines == [
        "training: 30/40 (75%)  loss 4.215  tokens/s 5.31k  0:00:01 elapsed  ETA 0:00:01"
    ]


def test_progress_log_of_unknown_length_shows_no_total(clock: Clock) -> None:
    assert shown(clock, None, seconds=6.0, count=3) == [
        "training: 2  loss 4.215  tokens/s 5.31k  0:00:12 elapsed",
        "training: 3  loss 4.215  tokens/s 5.31k  0:00:18 elapsed",
    ]


@pytest.mark.parametrize(
    ("width", "figures"), [(140, "loss 2  tokens/s 2M"), (80, "loss 2 tokens/s 2M")]
)
def test_progress_on_a_terminal_shows_a_bar_with_metrics(width: int, figures: str) -> None:
    out = io.StringIO()
    with show_progress(
        3, "training", start=1, console=Console(file=out, force_terminal=True, width=width)
    ) as job:
        job.advance(1, loss=2.0)
        job.advance(1, tokens_per_second=2e6)
    text = out.getvalue()
    assert "training" in text
    assert "3/3" in text
    assert figures in text


def test_bar_of_an_inner_job_is_shown_below_the_outer_bar_until_its_end() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with show_progress(2, "points", console=console) as outer:
        with show_progress(5, "sampling") as inner:
            inner.advance(3)
            bar = outer._bar  # type: ignore[attr-defined]
            assert [task.description for task in bar.tasks] == ["points", "sampling"]
            assert bar.tasks[1].completed == 3
        with show_activity("reading"):
            assert [task.description for task in bar.tasks] == ["points", "reading"]
        assert [task.description for task in bar.tasks] == ["points"]
    assert "sampling" in out.getvalue()
