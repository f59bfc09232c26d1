"""Trajectories of samples: the states of all positions after each sampling step, as a JSON file.

A trajectory is stored as its first states and, for each later step, the positions that changed:

    {"format": "ddiff trajectories 1", "trajectories": [{
        "run": "NAME", "sampler": "KIND", "seed": 0, "index": 0,
        "level_sizes": [1024, 32, 1],       # tokens first, the root last
        "start": [1056, 1056],              # state ids before the first recorded step
        "changes": [[[0, 1030]], [[0, 17], [1, 4]]],   # (position, new state), by step
        "times": [0.5, 0.0],                # mean time of the positions after each step
        "names": {"17": "the"},             # text of each state that occurs
        "parents": {"17": 1030},            # parent of each state that occurs
        "given": [0]                        # positions of the prompt, which do not change
    }]}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ddiff.errors import ArgumentError, DataError
from ddiff.runs.report.clusters import TokenTree

FORMAT = "ddiff trajectories 1"


@dataclass(frozen=True)
class Trajectory:
    """States of one sample after each step; the module describes the attributes."""

    run: str
    sampler: str
    seed: int
    index: int
    level_sizes: Sequence[int]
    start: Sequence[int]
    changes: Sequence[Sequence[Sequence[int]]]
    times: Sequence[float]
    names: Mapping[str, str]
    parents: Mapping[str, int]
    given: Sequence[int]

    @classmethod
    def of(
        cls,
        states: Sequence[Sequence[int]],
        times: Sequence[float],
        tree: TokenTree,
        given: Sequence[int] = (),
        **origin: Any,
    ) -> Trajectory:
        """Make a trajectory from the states [steps + 1][L] and the times after the steps.

        `origin` has the attributes `run`, `sampler`, `seed` and `index`.
        """
        changes = []
        for before, after in itertools.pairwise(states):
            pairs = enumerate(zip(before, after))
            changes.append([[place, new] for place, (old, new) in pairs if old != new])
        shown = sorted({state for row in states for state in row})
        parents = {}
        for state in shown:
            # the ancestors tell a page whether a new state lies below the old state
            parent = tree.parent_of(state)
            while parent is not None:
                parents[str(state)] = parent
                state = parent
                parent = tree.parent_of(state)
        return cls(
            level_sizes=list(tree.level_sizes),
            start=list(states[0]),
            changes=changes,
            times=[round(time, 5) for time in times],
            names={str(state): tree.name_state(state) for state in shown},
            parents=parents,
            given=list(given),
            **origin,
        )


def to_json(trajectories: Sequence[Trajectory]) -> str:
    """Return the content of a file of trajectories."""
    content = [asdict(trajectory) for trajectory in trajectories]
    return json.dumps({"format": FORMAT, "trajectories": content}) + "\n"


def is_trajectory_file(file: IO[bytes]) -> bool:
    """Return whether `ddiff sample --trajectory` wrote an open file."""
    return file.read(100).lstrip().startswith(b'{"format": "ddiff trajectories')


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """Read a file that `ddiff sample --trajectory` wrote.

    Raises ArgumentError if there is no such file, and DataError for other content.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(
            f"ddiff report --trajectory: {path} is not a file. Write one with `ddiff sample RUN "
            f"--trajectory {path}`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        return [_check(Trajectory(**entry)) for entry in content["trajectories"]]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{path} is not a file of trajectories: {error}. Write it again with `ddiff sample RUN "
            f"--trajectory {path}`."
        ) from error


def _check(trajectory: Trajectory) -> Trajectory:
    """Return the trajectory.

    Raises ValueError if a change has a position outside of the sample, or a state has no name.
    """
    length = len(trajectory.start)
    states = list(trajectory.start)
    for step in trajectory.changes:
        for position, state in step:
            if not 0 <= position < length:
                raise ValueError(f"a change is at position {position} of {length}")
            states.append(state)
    missing = {str(state) for state in states} - trajectory.names.keys()
    if missing:
        raise ValueError(f"the state {min(missing)} has no name")
    return trajectory
