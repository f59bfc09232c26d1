"""Tensors of a published checkpoint, which are read by name and must all be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ddiff.errors import DataError, suggest

LISTED_NAMES = 5  # largest number of tensor names in a message


class PublishedTensors:
    """Named tensors of a checkpoint. Remembers which tensors were used.

    Args:
        shapes: shape of each tensor by name, in the order of the file.
        load: function (name) that returns a tensor.
        source: name of the checkpoint in error messages.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        load: Callable[[str], Tensor],
        source: str = "the checkpoint",
    ) -> None:
        self.source = source
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._load = load
        self._prefix = ""
        self._used: set[str] = set()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], source: str = "the checkpoint"
    ) -> PublishedTensors:
        """Wrap tensors that are in memory."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return cls(shapes, tensors.__getitem__, source)

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], source: str = "the checkpoint"
    ) -> PublishedTensors:
        """Make tensors on the meta device, which have a shape and no values."""
        return cls(shapes, lambda name: torch.empty(shapes[name], device="meta"), source)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the file.

        A view that `without_prefix` made has only the names with its prefix, without the prefix.
        """
        return tuple(
            name.removeprefix(self._prefix)
            for name in self._shapes
            if name.startswith(self._prefix)
        )

    def has(self, name: str) -> bool:
        return self._prefix + name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises DataError if it does not exist."""
        self._check_exists(name)
        return self._shapes[self._prefix + name]

    def without_prefix(self, prefix: str) -> PublishedTensors:
        """Return a view of the tensors whose names begin with `prefix`, under the rest of the name.

        A tensor that the view uses also counts as used here.
        """
        view = PublishedTensors(self._shapes, self._load, self.source)
        view._prefix = self._prefix + prefix
        view._used = self._used
        return view

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in float32, and mark it as used.

        Raises DataError if the tensor does not exist, has another shape, has no floating-point
        numbers, or has values that are not finite.
        """
        self._check_exists(name)
        full = self._prefix + name
        found = self._shapes[full]
        if found != shape:
            raise DataError(
                f"{self.source}: the tensor {full} must have the shape {list(shape)}, which "
                f"follows from the configuration; it has the shape {list(found)}. Use the "
                "configuration that was published with these weights."
            )
        tensor = self._load(full)
        if not tensor.is_floating_point():
            raise DataError(
                f"{self.source}: the tensor {full} must have floating-point numbers; it has the "
                f"dtype {tensor.dtype}. Import the weights before their quantization."
            )
        tensor = tensor.to(torch.float32)
        # Tensors on the meta device have no values.
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"{self.source}: the tensor {full} has values that are NaN or infinite. Download "
                "the file again; if the values are the same, the training of this model diverged."
            )
        self._used.add(full)
        return tensor

    def skip(self, *names: str) -> None:
        """Mark tensors as used that can be computed from the rest. Absent names are allowed."""
        self._used.update(self._prefix + name for name in names)

    def finish(self) -> None:
        """Raise DataError if a tensor was not used, because the model would be incomplete."""
        unused = [name for name in self._shapes if name not in self._used]
        if unused:
            more = f" and {len(unused) - LISTED_NAMES} more" if len(unused) > LISTED_NAMES else ""
            raise DataError(
                f"{self.source} has tensors that this layout does not know: "
                f"{', '.join(unused[:LISTED_NAMES])}{more}. Without them the imported model would "
                "be another one. Choose the layout of this model with --layout, or remove tensors "
                "that do not belong to the network from the file."
            )

    def _check_exists(self, name: str) -> None:
        full = self._prefix + name
        if full in self._shapes:
            return
        raise DataError(
            f"{self.source} has no tensor {full}, which this layout needs."
            f"{suggest(full, self._shapes)} The file has {len(self._shapes)} tensors. Download it "
            "again, or choose the layout of this model with --layout."
        )
