"""Options of `ddiff sample` that show or record the states of samples during sampling.

The options are `--watch`, `--trajectory FILE.json` and `--gif FILE.gif`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ddiff.run_dir.destination import Destination, check_destination, write_file, write_text
from ddiff.runs.animation import draw_animation, is_animation
from ddiff.runs.report.trajectories import AnyTrajectory, is_trajectory_file, to_json

MOST_RECORDED = 16  # samples of a file of trajectories


@dataclass(frozen=True)
class SampleObserver:
    """Terminal and files that show the states of samples.

    Attributes:
        watch: whether the terminal shows the samples while they are drawn.
        trajectory: JSON file for the trajectories, or None.
        animation: GIF file for the trajectories, or None.
    """

    watch: bool
    trajectory: Destination | None
    animation: Destination | None

    @classmethod
    def check(
        cls, watch: bool = False, trajectory: str | None = None, gif: str | None = None
    ) -> SampleObserver | None:
        """Return the observer, or None without options.

        Raises ArgumentError if a file cannot be written, or is a file that ddiff did not write.
        """
        if not watch and trajectory is None and gif is None:
            return None
        places: list[Destination | None] = [None, None]
        if trajectory is not None:
            argument = "ddiff sample --trajectory"
            places[0] = check_destination(
                trajectory, argument, suffix=".json", owned=is_trajectory_file
            )
        if gif is not None:
            argument = "ddiff sample --gif"
            places[1] = check_destination(gif, argument, suffix=".gif", owned=is_animation)
        return cls(watch, *places)

    @property
    def records(self) -> bool:
        """True if trajectories are written to a file."""
        return self.trajectory is not None or self.animation is not None

    def write(self, trajectories: Sequence[AnyTrajectory]) -> None:
        """Write the files of trajectories."""
        if self.trajectory is not None:
            write_text(self.trajectory, to_json(trajectories))
            _tell_written(self.trajectory)
        if self.animation is not None:
            content = draw_animation(trajectories)
            write_file(self.animation, lambda file: file.write(content))
            _tell_written(self.animation)


def _tell_written(place: Destination) -> None:
    # standard output has the samples as JSON lines
    print(f"Written to {place.name}", file=sys.stderr)
