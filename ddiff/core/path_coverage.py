"""Which states of the fields a training rule has trained, and which a path asks for.

A *situation* says which fields move and in which state the others are held, such as "image moves,
text is clean". At every progress tau a path is in one situation. A network predicts well only in
situations that occurred in its training, so sampling and evaluation may ask for no other one.

    require_trained(path, trained, "FieldsRun.sample")

Situations do not compare times: a path on which two fields move together asks for the same
situation as every other path on which they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, get_args

from ddiff.core.paths import Hold, Leg, Path
from ddiff.core.training_paths import CyclePaths, IndependentTimes, MixedPaths, TrainingPath
from ddiff.errors import ArgumentError

State = Hold | Literal["moves"]
"""State of a field: it moves, or is held."""

Situation = Mapping[str, State]
"""State of every field by name, in the order of the recipe."""

HOLDS: tuple[Hold, ...] = get_args(Hold)
WORDS: Mapping[Hold, str] = {"clean": "clean", "prior": "at the prior", "absent": "absent"}


def situations(path: TrainingPath) -> list[Situation]:
    """Return the situations of a path or of a rule of training, each once.

    Independent times have one situation here, in which all fields move; `is_trained` accepts more.
    """
    found: list[Situation] = []
    for situation in _list_situations(path):
        if situation not in found:
            found.append(situation)
    return found


def is_trained(situation: Situation, trained: TrainingPath, lacking: Collection[str] = ()) -> bool:
    """Return whether a situation occurs in training.

    With independent times, every field has every time from clean to prior while the others move,
    so all situations without absent fields occur, at least as a limit.

    Args:
        situation: state of every field.
        trained: path or rule of training.
        lacking: fields that some training samples lack; for these samples they are absent.
    """
    if isinstance(trained, CyclePaths | MixedPaths):
        return any(is_trained(situation, path, lacking) for path, _ in trained.parts)
    absent = {name for name, state in situation.items() if state == "absent"}
    if isinstance(trained, IndependentTimes):
        return absent <= set(lacking)
    for known in situations(trained):
        differing = {name for name in situation if situation[name] != known[name]}
        # Samples that lack a field train every situation of the path with this field absent.
        if differing <= absent & set(lacking):
            return True
    return False


def require_trained(
    path: Path,
    trained: TrainingPath,
    caller: str,
    guidance: Mapping[str, Mapping[str, Hold]] | None = None,
    lacking: Collection[str] = (),
) -> None:
    """Raise ArgumentError if a path asks for a situation that does not occur in training.

    Args:
        path: path of sampling or evaluation.
        trained: path or rule of training.
        caller: subject of the message, such as `[sample] targets, "image | text"`.
        guidance: for every guided field, the fields that its second prediction leaves out, with
            their states. The second prediction asks for further situations.
        lacking: fields that some training samples lack.
    """
    for situation in situations(path):
        if not is_trained(situation, trained, lacking):
            raise _untrained_error(situation, trained, caller, "")
    for guided, without in (guidance or {}).items():
        for situation in situations(path):
            if situation.get(guided) != "moves":
                continue
            second = {name: without.get(name, state) for name, state in situation.items()}
            if not is_trained(second, trained, lacking):
                raise _untrained_error(second, trained, caller, f" The guidance of {guided}")


def describe_situation(situation: Situation) -> str:
    """Describe a situation in words: `image moves, text is clean`."""
    moving = [name for name, state in situation.items() if state == "moves"]
    parts = [f"{_join(moving)} {'moves' if len(moving) == 1 else 'move'}"]
    for hold in HOLDS:
        held = [name for name, state in situation.items() if state == hold]
        if held:
            parts.append(f"{_join(held)} {'is' if len(held) == 1 else 'are'} {WORDS[hold]}")
    return ", ".join(parts)


def part_of_recipe(situation: Situation) -> str:
    """Return the part of a mixture, in TOML, that trains a situation."""
    keys = ['path = "shared"']
    for hold in HOLDS:
        held = [f'"{name}"' for name, state in situation.items() if state == hold]
        if held:
            keys.append(f"{hold} = [{', '.join(held)}]")
    return f"{{{', '.join(keys)}}}"


# ---------------------------------------------------------------------- helpers


def _list_situations(path: TrainingPath) -> Iterator[Situation]:
    if isinstance(path, MixedPaths | CyclePaths):
        for part, _ in path.parts:
            yield from _list_situations(part)
    elif isinstance(path, IndependentTimes):
        yield dict.fromkeys(path.names, "moves")
    else:
        moving = [leg for leg in path.legs.values() if isinstance(leg, Leg)]
        points = sorted({end for leg in moving for end in leg})
        for start, stop in itertools.pairwise(points):
            yield {name: _state(leg, start, stop) for name, leg in path.legs.items()}


def _state(leg: Leg | Hold, start: float, stop: float) -> State:
    """Return the state of a field between two neighbouring ends of legs."""
    if not isinstance(leg, Leg):
        return leg
    if leg.start >= stop:
        # The leg has not begun: the field is decoded.
        return "clean"
    return "prior" if leg.stop <= start else "moves"


def _untrained_error(
    situation: Situation, trained: TrainingPath, caller: str, source: str
) -> ArgumentError:
    known = situations(trained)
    listed = "; ".join(describe_situation(one) for one in known)
    if isinstance(trained, IndependentTimes):
        listed += ", at independent times"
        known = []
    parts = ", ".join(part_of_recipe(one) for one in [*known, situation])
    subject = source or " It"
    return ArgumentError(
        f"{caller}: the network was not trained for this.{subject} needs predictions where "
        f"{describe_situation(situation)}. Trained: {listed}. Train it with [objective] times = "
        f'{{kind = "mixture", parts = [{parts}]}}, or choose another target or path.'
    )


def _join(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
