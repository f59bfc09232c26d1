"""Trajectories of samples: the states of all positions after each sampling step, as a JSON file.

A trajectory of tokens is stored as its first states and, for each later step, the positions that
changed:

    {"format": "ddiff trajectories 2", "trajectories": [{
        "run": "NAME", "sampler": "KIND", "seed": 0, "index": 0,
        "level_sizes": [1024, 32, 1],       # tokens first, the root last
        "start": [1056, 1056],              # state ids before the first recorded step
        "changes": [[[0, 1030]], [[0, 17], [1, 4]]],   # (position, new state), by step
        "times": [0.5, 0.0],                # mean time of the positions after each step
        "names": {"17": "the"},             # text of each state that occurs
        "parents": {"17": 1030},            # parent of each state that occurs
        "given": [0],                       # positions of the prompt, which do not change
        "confidence": [[0.2], [0.9, null]], # probability of each change; may be missing
        "target": "", "field": ""           # see below
    }]}

A trajectory of pictures has a PNG file for each different picture, and the number of the picture
that is shown before the first step and after each step:

        "run": "NAME", "sampler": "KIND", "seed": 0, "index": 0,
        "target": "joint", "field": "image",
        "pictures": ["iVBORw0...", "iVBORw0..."],     # PNG files in base64
        "frames": [0, 0, 1],                          # before the first step, after each step
        "times": [1.0, 0.0]

A sample of a run of several fields has one trajectory per field. They have the same index, target
and number of steps. Files of format 1 have no target, no field and no pictures.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ddiff.data.pictures import PNG, Pixels, encode_png
from ddiff.errors import ArgumentError, DataError
from ddiff.runs.report.clusters import TokenTree

FORMAT = "ddiff trajectories 2"
READABLE = ("ddiff trajectories 1", FORMAT)
DIGITS = 5  # of times in a file
CONFIDENCE_DIGITS = 3


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
    target: str = ""
    field: str = ""
    confidence: Sequence[Sequence[float | None]] = ()

    @property
    def num_steps(self) -> int:
        """Number of sampling steps."""
        return len(self.changes)

    def unfold(self) -> list[list[int]]:
        """Return the states before the first step and after each step."""
        states = [list(self.start)]
        for changes in self.changes:
            row = list(states[-1])
            for position, state in changes:
                row[position] = state
            states.append(row)
        return states

    def level_of(self, state: int) -> int:
        """Return the level of a state id: 0 for tokens."""
        ends = itertools.accumulate(self.level_sizes)
        return sum(state >= end for end in ends)

    def is_below(self, state: int, node: int) -> bool:
        """Return True if `node` is an ancestor of `state` in the tree."""
        above = self.parents.get(str(state))
        while above is not None and above != node:
            above = self.parents.get(str(above))
        return above is not None

    @classmethod
    def of(
        cls,
        states: Sequence[Sequence[int]],
        times: Sequence[float],
        tree: TokenTree,
        given: Sequence[int] = (),
        confidence: Sequence[Mapping[int, float]] = (),
        **origin: Any,
    ) -> Trajectory:
        """Make a trajectory from the states [steps + 1][L] and the times after the steps.

        `confidence` has the probabilities of the new states of each step by their positions, or is
        empty. `origin` has the attributes `run`, `sampler`, `seed` and `index`, and in a run of
        several fields `target` and `field`.
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
            times=[round(time, DIGITS) for time in times],
            names={str(state): tree.name_state(state) for state in shown},
            parents=parents,
            given=list(given),
            confidence=_list_confidence(changes, confidence),
            **origin,
        )


def _list_confidence(
    changes: Sequence[Sequence[Sequence[int]]], confidence: Sequence[Mapping[int, float]]
) -> list[list[float | None]]:
    """Return the probability of each change, or None where it is unknown."""
    listed = []
    for step, values in zip(changes, confidence):
        found = [values.get(place) for place, _ in step]
        listed.append([None if p is None else round(p, CONFIDENCE_DIGITS) for p in found])
    return listed


@dataclass(frozen=True)
class PictureTrajectory:
    """Pictures of one field of a sample after each step; the module describes the attributes."""

    run: str
    sampler: str
    seed: int
    index: int
    target: str
    field: str
    pictures: Sequence[str]
    frames: Sequence[int]
    times: Sequence[float]

    @property
    def num_steps(self) -> int:
        """Number of sampling steps."""
        return len(self.frames) - 1

    @classmethod
    def of(
        cls, shown: Sequence[Pixels], times: Sequence[float], **origin: Any
    ) -> PictureTrajectory:
        """Make a trajectory from the pixels before the first step and after each step.

        `times` are those after the steps. `origin` has the other attributes.
        """
        numbers: dict[bytes, int] = {}
        frames = []
        for pixels in shown:
            # a field that is held has the same picture after many steps
            frames.append(numbers.setdefault(encode_png(pixels), len(numbers)))
        pictures = [base64.b64encode(picture).decode() for picture in numbers]
        rounded = [round(time, DIGITS) for time in times]
        return cls(pictures=pictures, frames=frames, times=rounded, **origin)


AnyTrajectory = Trajectory | PictureTrajectory


def to_json(trajectories: Sequence[AnyTrajectory]) -> str:
    """Return the content of a file of trajectories."""
    content = [asdict(trajectory) for trajectory in trajectories]
    return json.dumps({"format": FORMAT, "trajectories": content}) + "\n"


def is_trajectory_file(file: IO[bytes]) -> bool:
    """Return whether `ddiff sample --trajectory` wrote an open file."""
    return file.read(100).lstrip().startswith(b'{"format": "ddiff trajectories')


def read_trajectories(path: str | Path) -> list[AnyTrajectory]:
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
        if content["format"] not in READABLE:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        return [_read_entry(entry) for entry in content["trajectories"]]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{path} is not a file of trajectories: {error}. Write it again with `ddiff sample RUN "
            f"--trajectory {path}`."
        ) from error


def _read_entry(entry: Mapping[str, Any]) -> AnyTrajectory:
    """Return the trajectory of an entry of a file.

    Raises ValueError or TypeError if the entry is damaged.
    """
    if "pictures" in entry:
        return _check_pictures(PictureTrajectory(**entry))
    return _check_states(Trajectory(**entry))


def _check_pictures(trajectory: PictureTrajectory) -> PictureTrajectory:
    """Return the trajectory. Raises ValueError if a frame or a picture is wrong."""
    count = len(trajectory.pictures)
    if not trajectory.frames:
        raise ValueError("a trajectory of pictures has no frames")
    for frame in trajectory.frames:
        if not 0 <= frame < count:
            raise ValueError(f"a frame shows picture {frame}; pictures are 0..{count - 1}")
    for picture in trajectory.pictures:
        if not base64.b64decode(picture, validate=True).startswith(PNG):
            raise ValueError("a picture is not a PNG file in base64")
    return trajectory


def _check_states(trajectory: Trajectory) -> Trajectory:
    """Return the trajectory.

    Raises ValueError if a change has a position outside of the sample, or a state has no name.
    """
    length = len(trajectory.start)
    states = list(trajectory.start)
    for step in trajectory.changes:
        for position, state in step:
            if not 0 <= position < length:
                raise ValueError(
                    f"a change is at position {position}; positions are 0..{length - 1}"
                )
            states.append(state)
    for step, values in zip(trajectory.changes, trajectory.confidence):
        if len(step) != len(values):
            raise ValueError(f"a step has {len(step)} changes, but {len(values)} probabilities")
    missing = {str(state) for state in states} - trajectory.names.keys()
    if missing:
        raise ValueError(f"the state {min(missing)} has no name")
    return trajectory
