"""LoRA adapters (arXiv 2106.09685): a trained product of small matrices next to frozen weights.

A linear layer with the frozen weight W computes W h + (alpha / rank) B A h, where A [rank,in] and
B [out,rank] are trained. The frozen weights are the base of the adapters. The layers are those of
the package peft.

The state dict of a denoiser with adapters has only the trained tensors, so that checkpoints, moving
averages and exports hold no copy of the base. `remove_adapters` gives access to the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import Denoiser

NAME = "default"
"""Name of the adapter in the layers of peft."""
INSTALL = 'pip install "discrete-diffusion[lora]"'


@dataclass(frozen=True)
class LoraSettings:
    """Settings of LoRA adapters.

    Attributes:
        rank: number of rows of A and columns of B.
        alpha: scale of the adapters, which are multiplied by alpha / rank.
        dropout: dropout of the input of A in training.
        targets: last parts of the names of the linear layers with adapters, such as "q_proj". None:
            every linear layer of the blocks of the backbone.
        full: last parts of the names of further modules whose weights are trained whole.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    full: tuple[str, ...] = ()


class Adapters:
    """Adapters of a denoiser, with its hooks for the state dict.

    Attributes:
        settings: settings of the adapters.
        layers: name of each layer with an adapter, in the denoiser -> layer of peft.
        has_new_head: whether the head is trained whole from its initial values, because the base
            has no weights for it.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: LoraSettings,
        names: Sequence[str],
        has_new_head: bool = False,
    ) -> None:
        self.settings = settings
        self.has_new_head = has_new_head
        self.layers: dict[str, Any] = {name: denoiser.get_submodule(name) for name in names}
        self.base_fingerprint: str | None = None
        self._is_active = True
        # torch sets an attribute on a hook, which a bound method does not allow
        self._hooks = [
            denoiser.register_state_dict_post_hook(partial(self._drop_base)),
            denoiser.register_load_state_dict_post_hook(partial(self._allow_missing_base)),
        ]

    @contextmanager
    def removed_from(self, denoiser: Denoiser) -> Iterator[None]:
        """Context manager in which the denoiser is the base: its layers are the frozen ones."""
        for name, layer in self.layers.items():
            denoiser.set_submodule(name, layer.get_base_layer())
        self._is_active = False
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                denoiser.set_submodule(name, layer)
            self._is_active = True

    def merge_into(self, denoiser: Denoiser) -> None:
        """Add the adapters to the frozen weights, and remove them."""
        for name, layer in self.layers.items():
            layer.merge(adapter_names=[NAME])
            denoiser.set_submodule(name, layer.get_base_layer())
        for hook in self._hooks:
            hook.remove()

    def _drop_base(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        if not self._is_active:
            return
        trained = {
            prefix + name
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        for name in list(state):
            if name.startswith(prefix) and name not in trained:
                del state[name]

    def _allow_missing_base(self, module: nn.Module, keys: Any) -> None:
        if not self._is_active:
            return
        trained = set(module.state_dict())
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]


def add_adapters(denoiser: Denoiser, settings: LoraSettings, *, trains_head: bool) -> None:
    """Add LoRA adapters to the backbone of a denoiser, and freeze all other weights.

    `trains_head`: whether the head is trained whole, because the base has none. Raises DataError if
    peft is not installed, and ArgumentError if a name of `settings` fits no module.
    """
    targets = _find_targets(denoiser, settings.targets)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DataError(
            "[denoiser] lora: LoRA adapters need the package peft, which is not installed "
            f"({error}). Run `{INSTALL}`."
        ) from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works in alpha / r
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    inject_adapter_in_model(config, denoiser, NAME)
    whole = _find_whole(denoiser, settings.full, trains_head)
    for name, parameter in denoiser.named_parameters():
        is_adapter = f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name
        parameter.requires_grad_(is_adapter or any(name.startswith(each) for each in whole))
    denoiser.adapters = Adapters(denoiser, settings, targets, has_new_head=trains_head)


@contextmanager
def remove_adapters(denoiser: Denoiser) -> Iterator[None]:
    """Context manager in which a denoiser has no adapters: its state dict is that of the base."""
    if denoiser.adapters is None:
        yield
        return
    with denoiser.adapters.removed_from(denoiser):
        yield


def merge_adapters(denoiser: Denoiser) -> None:
    """Replace W by W + (alpha / rank) B A in every layer with an adapter.

    The result is an ordinary denoiser. Raises ArgumentError for a denoiser without adapters.
    """
    if denoiser.adapters is None:
        raise ArgumentError("merge_adapters: the denoiser has no adapters.")
    denoiser.adapters.merge_into(denoiser)
    denoiser.adapters = None
    denoiser.requires_grad_(True)


def fingerprint_base(denoiser: Denoiser) -> str:
    """Return a SHA-256 of the names and values of the frozen weights, 32 hexadecimal digits.

    It is computed once per denoiser, since the base does not change.
    """
    adapters = denoiser.adapters
    assert adapters is not None, "only for a denoiser with adapters"
    if adapters.base_fingerprint is None:
        trained = set(denoiser.state_dict())
        with remove_adapters(denoiser):
            frozen = {
                name: tensor
                for name, tensor in denoiser.state_dict().items()
                if name not in trained
            }
        adapters.base_fingerprint = _hash_tensors(frozen)
    return adapters.base_fingerprint


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # bytes of any dtype, since numpy has no bfloat16
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:32]


def _find_targets(denoiser: Denoiser, wanted: Sequence[str] | None) -> list[str]:
    """Return the names of the linear layers that get adapters."""
    linear = [
        name
        for name, module in denoiser.backbone.named_modules(prefix="backbone")
        if isinstance(module, nn.Linear)
    ]
    if wanted is not None:
        return _select(linear, wanted, "targets", "linear layers")
    inside = [name for name in linear if _is_in_list(denoiser, name)]
    found = [name for name in inside if type(denoiser.get_submodule(name)) is nn.Linear]
    if not found:
        raise ArgumentError(
            "[denoiser] lora: the backbone has no linear layer in its blocks. Name the layers in "
            f"lora.targets; its linear layers are {', '.join(linear) or 'none'}."
        )
    return found


def _is_in_list(denoiser: Denoiser, name: str) -> bool:
    """Return whether a module is inside an `nn.ModuleList`, and so in a block of the backbone."""
    parts = name.split(".")
    parents = (".".join(parts[:size]) for size in range(1, len(parts)))
    return any(isinstance(denoiser.get_submodule(parent), nn.ModuleList) for parent in parents)


def _find_whole(denoiser: Denoiser, wanted: Sequence[str], trains_head: bool) -> list[str]:
    """Return the prefixes of the names of the parameters that are trained whole."""
    names = [name for name, _ in denoiser.named_modules() if name]
    found = _select(names, wanted, "full", "modules") if wanted else []
    prefixes = [f"{name}." for name in found]
    return [*prefixes, "head."] if trains_head else prefixes


def _select(names: Sequence[str], wanted: Sequence[str], key: str, what: str) -> list[str]:
    """Return the names that equal a wanted name or end with it, after a dot."""
    chosen = []
    for each in wanted:
        found = [name for name in names if name == each or name.endswith(f".{each}")]
        if not found:
            last = sorted({name.rpartition(".")[2] for name in names})
            raise ArgumentError(
                f'[denoiser] lora: {key} has "{each}", but the network has no such {what}. The '
                f"last parts of their names are {', '.join(last)}."
            )
        chosen += found
    return list(dict.fromkeys(chosen))
