"""Exponential moving averages that a training checkpoint stores as a list without names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ddiff.errors import DataError


def align_average(
    state: Mapping[str, Tensor], averages: Sequence[Tensor], source: str
) -> dict[str, Tensor]:
    """Replace the parameters of a state dict by their averages, which are listed in the same order.

    A state dict has the parameters in the order of the list, with buffers between them. The shapes
    decide which entries are buffers.

    Args:
        state: state dict of the model.
        averages: averages of its parameters.
        source: name of the file in error messages.

    Raises DataError if the shapes do not fit, or if they fit in more than one way.
    """
    names = list(state)
    shapes = [state[name].shape for name in names]
    wanted = [average.shape for average in averages]
    # ways[i][j]: number of ways, at most 2, in which the averages from j on fit the entries from i
    ways = [[0] * (len(wanted) + 1) for _ in range(len(names) + 1)]
    for row in ways:
        row[-1] = 1
    for i in range(len(names) - 1, -1, -1):
        for j in range(len(wanted) - 1, -1, -1):
            count = ways[i + 1][j]
            if shapes[i] == wanted[j]:
                count += ways[i + 1][j + 1]
            ways[i][j] = min(count, 2)
    if ways[0][0] != 1:
        fits = "in more than one way" if ways[0][0] else "in no way"
        raise DataError(
            f"{source}: the list ema.shadow_params has {len(wanted)} tensors whose shapes fit the "
            f"{len(names)} entries of the state dict {fits}. Save the averages under the names of "
            "the parameters in a separate file, or remove ema from the file to import the "
            "trained weights."
        )
    return _replace(state, averages, ways)


def _replace(
    state: Mapping[str, Tensor], averages: Sequence[Tensor], ways: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Follow the only alignment. `ways` counts the alignments of the ends of both lists."""
    found: dict[str, Tensor] = {}
    j = 0
    for i, (name, tensor) in enumerate(state.items()):
        is_parameter = (
            j < len(averages) and tensor.shape == averages[j].shape and ways[i + 1][j + 1] > 0
        )
        if is_parameter:
            found[name] = averages[j]
            j += 1
        else:
            found[name] = tensor
    return found
