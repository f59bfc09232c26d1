"""Build a denoiser on the meta device, whose tensors have no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser
from ddiff.recipe.model import Recipe
from ddiff.runs.network import build_denoiser

M = TypeVar("M", bound=nn.Module)

_FILLS = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.trunc_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
}


def build_denoiser_on_meta(
    recipe: Recipe, vocabulary: Vocabulary, process: ForwardProcess | None
) -> Denoiser | None:
    """Build the denoiser on the meta device; None if this is not possible."""
    return build_on_meta(lambda: build_denoiser(recipe, vocabulary, process), recipe.denoiser.table)


def build_on_meta(build: Callable[[], M], table: str) -> M | None:
    """Build a module on the meta device, without memory for the weights.

    Returns None if the constructor of a component computes with its weights, which the meta device
    does not support. Raises ArgumentError if the number of bytes of a tensor overflows 64 bits.
    `table` is the recipe table of the network, for the message.
    """
    try:
        with torch.device("meta"), _SkipFills():
            module = build()
    except (NotImplementedError, RuntimeError) as error:
        if "overflow" in str(error).lower():
            raise ArgumentError(
                f"{table}: the sizes must give tensors of fewer than 2^63 bytes; "
                f"got a larger tensor ({error}). Reduce the sizes of the network."
            ) from error
        return None
    return module.to("meta")  # a library may have placed a buffer on a device of its choice


class _SkipFills(TorchFunctionMode):
    """Torch function mode that skips the random initialization of meta tensors.

    To initialize a meta tensor, torch would import its compiler, which takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args else kwargs.get("tensor")
        if func in _FILLS and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)
