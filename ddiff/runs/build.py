"""Build the components of a recipe, and check that the components are compatible.

Only `assemble` combines a process, a denoiser and an objective. Training, loading, dry runs and
measurements all call `assemble`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.distributed.launcher import get_rank_info
from ddiff.distributed.single import SingleBackend, resolve_device
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.likelihood import Scored
from ddiff.nn.denoiser import Backbone, Denoiser
from ddiff.nn.heads import Head
from ddiff.recipe.model import Recipe
from ddiff.training.protocols import Backend, Objective

if TYPE_CHECKING:  # these modules import text libraries, which most dry runs do not need
    from ddiff.data.cache import Cache
    from ddiff.data.corpus import Corpus
    from ddiff.data.documents import Documents
    from ddiff.data.tokenizer import Tokenizer

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


@dataclass(frozen=True)
class Overrides:
    """Components from a Python caller that replace the components of the recipe."""

    vocabulary: Vocabulary | None = None
    process: ForwardProcess | None = None

    def to_dict(self) -> dict[str, str]:
        given: dict[str, str] = {}
        if self.vocabulary is not None:
            given["vocabulary"] = self.vocabulary.fingerprint
        if self.process is not None:
            given["process"] = f"{type(self.process).__module__}:{type(self.process).__qualname__}"
        return given


NO_OVERRIDES: Overrides = Overrides()


class ModelObjective(Objective, Scored, Protocol):
    """Objective that trains a denoiser and computes the likelihood of text under the denoiser."""


@dataclass(frozen=True)
class Model:
    """Denoiser with its forward process and its objective.

    `process` is None for a model without a forward process (autoregression).
    """

    vocabulary: Vocabulary
    process: ForwardProcess | None
    denoiser: Denoiser
    objective: ModelObjective
    device: torch.device


def assemble(
    recipe: Recipe,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    process: ForwardProcess | None = None,
    backbone: Backbone | None = None,
) -> Model:
    """Build the process, the denoiser and the objective of a recipe on `device`.

    The seed of the recipe determines the initial weights. `process` and `backbone` replace the
    components of the recipe if they are not None. On the meta device, weights use no memory and are
    not initialized, unless the constructor of a component computes with its weights.
    """
    if process is None:
        process = build_process(recipe, vocabulary)
    check_process(process, vocabulary)
    denoiser = None
    if device.type == "meta" and backbone is None:
        denoiser = build_denoiser_on_meta(recipe, vocabulary)
    if denoiser is None:
        denoiser = _build_denoiser(recipe, vocabulary, backbone)
    objective = _build_objective(recipe, process, denoiser)
    objective.module.to(device)
    return Model(vocabulary, process, denoiser, objective, device)


def build_process(recipe: Recipe, vocabulary: Vocabulary) -> ForwardProcess | None:
    """Build the forward process of a recipe.

    Returns None if the recipe has no [process] and its objective does not use a process. Raises
    ArgumentError if the objective needs a process and the recipe has no [process].
    """
    if recipe.process is not None:
        return recipe.process.build(vocabulary=vocabulary)
    if recipe.objective.takes_input("process"):
        raise ArgumentError(
            f'{recipe.name}: [objective] kind = "{recipe.objective.component.name}" needs a '
            "[process]. Add the table to the recipe."
        )
    return None


def build_head(recipe: Recipe, vocabulary: Vocabulary, width: int) -> Head:
    """Build the output head for hidden states of size `width`."""
    assert recipe.head is not None
    return recipe.head.build(vocabulary=vocabulary, width=width)


def _build_denoiser(
    recipe: Recipe, vocabulary: Vocabulary, backbone: Backbone | None = None
) -> Denoiser:
    if backbone is None:
        torch.manual_seed(recipe.seed)  # dropout continues from the state after building
        backbone = recipe.denoiser.build(vocabulary=vocabulary, length=recipe.length)
    inputs = recipe.objective.members.inputs
    # P(x_i | x_<i) contains no evidence from position i that could be divided out
    given = recipe.denoiser_keys.given if inputs == "own" else "rest"
    head = build_head(recipe, vocabulary, backbone.width)
    denoiser = Denoiser(backbone, head, given, inputs)
    denoiser.precision = build_precision(recipe)
    return denoiser


def build_denoiser_on_meta(recipe: Recipe, vocabulary: Vocabulary) -> Denoiser | None:
    """Build the denoiser on the meta device, without memory for the weights.

    Returns None if the constructor of a component computes with its weights, which the meta device
    does not support. Raises ArgumentError if the number of bytes of a tensor overflows 64 bits.
    """
    try:
        with torch.device("meta"), _SkipFills():
            denoiser = _build_denoiser(recipe, vocabulary)
    except (NotImplementedError, RuntimeError) as error:
        if "overflow" in str(error).lower():
            raise ArgumentError(
                f"{recipe.denoiser.table}: the sizes must give tensors of fewer than 2^63 bytes; "
                f"got a larger tensor ({error}). Reduce the sizes of the network."
            ) from error
        return None
    return denoiser.to("meta")  # a library may have placed a buffer on a device of its choice


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


def _build_objective(recipe: Recipe, process: ForwardProcess | None, denoiser: Denoiser) -> Any:
    loss = recipe.loss.build(process=process) if recipe.loss else None
    times = recipe.times.build() if recipe.times else None
    return recipe.objective.build(process=process, denoiser=denoiser, loss=loss, times=times)


def build_precision(recipe: Recipe) -> torch.dtype | None:
    """Return the dtype of matrix products, or None for the dtype of the weights."""
    keys = recipe.backend_keys
    if keys.precision == "bfloat16":
        return torch.bfloat16
    on_gpu = keys.device.startswith("cuda")
    if keys.device == "auto":
        on_gpu = torch.cuda.is_available()
    if keys.precision == "auto" and on_gpu:
        return torch.bfloat16
    return None


def build_documents(recipe: Recipe, cache: Cache) -> Documents | Corpus:
    """Build the data set that [data] describes."""
    return recipe.data.build(length=recipe.length, seed=recipe.seed, cache=cache)


# ---------------------------------------------------------------------- backends


def build_backend(recipe: Recipe) -> Backend:
    """Build the backend for training.

    Raises ArgumentError if several processes were started for a backend of one process, or if the
    batch cannot be divided among the processes.
    """
    train = recipe.train
    backend = _build_backend(recipe, recipe.backend_keys.processes)
    there = get_rank_info()
    if there is not None and there.world_size != backend.world_size:
        raise ArgumentError(
            f'[backend] kind = "{recipe.backend.component.name}" runs {backend.world_size} '
            f"process, but {there.world_size} processes were started, and each would write the "
            'same run. Set kind = "ddp" or "fsdp", or start one process.'
        )
    if train.batch % (train.accumulate * backend.world_size):
        raise ArgumentError(
            "[train] batch must be a multiple of accumulate times the number of processes, so that "
            f"every process has as many rows; got batch = {train.batch}, "
            f"accumulate = {train.accumulate} and {backend.world_size} processes."
        )
    return backend


def build_single_backend(recipe: Recipe) -> Backend:
    """Build a backend of one process, to evaluate or sample a run.

    The run may have been trained by any number of processes.
    """
    if recipe.backend.members.is_distributed:
        return SingleBackend(recipe.backend_keys.device)
    return _build_backend(recipe, 1)


def check_backend(recipe: Recipe) -> None:
    """Raise ArgumentError if the backend cannot start. No process is started for this check."""
    if recipe.backend.members.is_distributed:
        resolve_device(recipe.backend_keys.device)
    else:
        build_backend(recipe).close()


def _build_backend(recipe: Recipe, processes: int) -> Backend:
    return recipe.backend.build(
        device=recipe.backend_keys.device,
        processes=processes,
        length=recipe.length,
        precision=build_precision(recipe),
    )


# ---------------------------------------------------------------------- checks


def check_tokenizer(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Raise DataError if the vocabulary was built for another tokenizer."""
    theirs = vocabulary.tokenizer_fingerprint
    has_other_fingerprint = bool(theirs) and theirs != tokenizer.fingerprint
    if vocabulary.num_tokens != tokenizer.num_tokens or has_other_fingerprint:
        raise DataError(
            "The vocabulary belongs to another tokenizer: the vocabulary has "
            f"{vocabulary.num_tokens} tokens of tokenizer {theirs or '(not recorded)'}, but the "
            f"tokenizer of the run has {tokenizer.num_tokens} tokens and fingerprint "
            f"{tokenizer.fingerprint}. Build the vocabulary from this tokenizer, or use the "
            "tokenizer of the vocabulary."
        )


def check_process(process: ForwardProcess | None, vocabulary: Vocabulary) -> None:
    """Raise ArgumentError if the process was built on a different vocabulary."""
    if process is not None and process.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ArgumentError(
            f"process must be on the run's vocabulary {vocabulary}; got a process on "
            f"{process.vocabulary}. Pass vocabulary as well, or build the process on the run's "
            "vocabulary."
        )
