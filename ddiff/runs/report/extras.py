"""Parts of a report that need the checkpoint or the plugins of a run, and not only its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ddiff.runs.report.confusions import LevelConfusion
from ddiff.runs.report.formulas import Explanation
from ddiff.runs.report.trajectories import AnyTrajectory


@dataclass(frozen=True)
class Extras:
    """Computed parts of a report.

    Attributes:
        trajectories: trajectories of samples that the page plays.
        confusions: wrong predictions of the network of each run, by its number in the report.
        explanations: components of each run with their formulas, by the number of the run.
    """

    trajectories: Sequence[AnyTrajectory] = ()
    confusions: Mapping[int, Sequence[LevelConfusion]] = field(default_factory=dict)
    explanations: Mapping[int, Sequence[Explanation]] = field(default_factory=dict)
