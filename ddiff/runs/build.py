"""The parts of a recipe, built and held against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ddiff.core.information import OwnTime
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.distributed.launcher import place
from ddiff.distributed.single import SingleBackend, device_named
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import Denoiser
from ddiff.recipe.model import Recipe
from ddiff.runs.conditioning import SampleConditions, network_for, told
from ddiff.sampling.loop import Sampler, looks_ahead
from ddiff.training.protocols import Backend, Objective

if TYPE_CHECKING:  # these load the libraries of texts, which a dry run mostly does without
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
    """Parts that a Python caller hands in instead of the recipe's."""

    vocabulary: Vocabulary | None = None
    process: ForwardProcess | None = None

    def to_dict(self) -> dict[str, str]:
        given: dict[str, str] = {}
        if self.vocabulary is not None:
            given["vocabulary"] = self.vocabulary.fingerprint
        if self.process is not None:
            given["process"] = f"{type(self.process).__module__}:{type(self.process).__qualname__}"
        return given


def build_documents(recipe: Recipe, cache: Cache) -> Documents | Corpus:
    return recipe.data.build(length=recipe.length, seed=recipe.seed, cache=cache)


def build_backend(recipe: Recipe) -> Backend:
    """Raises ArgumentError where the batch cannot be shared among the processes that there are."""
    train = recipe.train
    backend = _backend(recipe, recipe.backend_keys.processes)
    there = place()
    if there is not None and there.world_size != backend.world_size:
        raise ArgumentError(
            f'[backend] kind = "{recipe.backend.component.name}" runs {backend.world_size} process, but {there.world_size} '
            'were started, and each would write the same run. Set kind = "ddp" or "fsdp", or start one.'
        )
    if train.batch % (train.accumulate * backend.world_size):
        raise ArgumentError(
            f"[train] batch must be a multiple of accumulate times the number of processes, so that every process has as "
            f"many rows; got batch = {train.batch}, accumulate = {train.accumulate} and {backend.world_size} processes."
        )
    return backend


def check_backend(recipe: Recipe) -> None:
    """Refuse what can be known to fail without starting processes."""
    if recipe.backend.members.is_distributed:
        device_named(recipe.backend_keys.device)
    else:
        build_backend(recipe).close()


def backend_alone(recipe: Recipe) -> Backend:
    """For a trained run, which one process asks, however many trained it."""
    return (
        SingleBackend(recipe.backend_keys.device)
        if recipe.backend.members.is_distributed
        else _backend(recipe, 1)
    )


def _backend(recipe: Recipe, processes: int) -> Backend:
    device = recipe.backend_keys.device
    return recipe.backend.build(
        device=device, processes=processes, length=recipe.length, precision=build_precision(recipe)
    )


def build_precision(recipe: Recipe) -> torch.dtype | None:
    """What matrix products are computed in; None: in that of the weights."""
    keys = recipe.backend_keys
    on_gpu = keys.device.startswith("cuda") or (keys.device == "auto" and torch.cuda.is_available())
    return (
        torch.bfloat16
        if keys.precision == "bfloat16" or (keys.precision == "auto" and on_gpu)
        else None
    )


def build_process(recipe: Recipe, vocabulary: Vocabulary) -> ForwardProcess | None:
    """None where the recipe has none and its objective wants none."""
    if recipe.process is None:
        if not recipe.objective.takes_input("process"):
            return None
        raise ArgumentError(
            f'{recipe.name}: [objective] kind = "{recipe.objective.component.name}" needs a [process].'
        )
    return recipe.process.build(vocabulary=vocabulary)


def build_denoiser(recipe: Recipe, vocabulary: Vocabulary) -> Denoiser:
    torch.manual_seed(recipe.seed)
    backbone = recipe.denoiser.build(vocabulary=vocabulary, length=recipe.length)
    assert recipe.head is not None
    denoiser = Denoiser(
        backbone,
        recipe.head.build(vocabulary=vocabulary, width=backbone.width),
        recipe.denoiser_keys.given,
    )
    denoiser.precision = build_precision(recipe)
    return denoiser


def outlined(recipe: Recipe, vocabulary: Vocabulary) -> Denoiser:
    """The denoiser without room for its weights, where its parts can be had so: a billion of them are made in no time."""
    try:
        return build_on_meta(recipe, vocabulary)
    except (
        NotImplementedError,
        RuntimeError,
    ) as error:  # a part that computes with its weights when it is made
        if _overflows(error):
            raise ArgumentError(
                f"{recipe.denoiser.table}: a tensor of these sizes has more bytes than 64 bits can count ({error}). Take "
                "a smaller network."
            ) from error
        return build_denoiser(recipe, vocabulary)


def build_on_meta(recipe: Recipe, vocabulary: Vocabulary) -> Denoiser:
    """The denoiser with shapes and no storage. RuntimeError or NotImplementedError where a part cannot be built so."""
    with torch.device("meta"), _Unfilled():
        denoiser = build_denoiser(recipe, vocabulary)
    return denoiser.to("meta")  # a library may have made a buffer where it pleased


class _Unfilled(TorchFunctionMode):
    """Leaves meta tensors unfilled: torch would load its compiler (a second) to draw numbers that nothing holds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        tensor = args[0] if args else given.get("tensor")
        if func in _FILLS and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **given)


def _overflows(error: Exception) -> bool:
    return "overflow" in str(error).lower()


def build_objective(recipe: Recipe, process: ForwardProcess | None, denoiser: Denoiser) -> Any:
    loss = recipe.loss.build(process=process) if recipe.loss else None
    times = recipe.times.build() if recipe.times else None
    return recipe.objective.build(process=process, denoiser=denoiser, loss=loss, times=times)


def check_tokenizer(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Raises DataError when a vocabulary was built for another tokenizer."""
    theirs = vocabulary.tokenizer_fingerprint
    if vocabulary.num_tokens != tokenizer.num_tokens or (
        theirs and theirs != tokenizer.fingerprint
    ):
        raise DataError(
            f"The vocabulary belongs to another tokenizer: it has {vocabulary.num_tokens} words for tokenizer "
            f"{theirs or '(not recorded)'}, and the tokenizer in use has {tokenizer.num_tokens} tokens and fingerprint "
            f"{tokenizer.fingerprint}. Build the vocabulary with this tokenizer, or use the tokenizer it was built for."
        )


def check_process(process: ForwardProcess | None, vocabulary: Vocabulary) -> None:
    if process is not None and process.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ArgumentError(
            f"process must be on the run's vocabulary {vocabulary}; got one on {process.vocabulary}. "
            "Hand in both, or build the process on that vocabulary."
        )


def check_sampling(
    recipe: Recipe,
    vocabulary: Vocabulary,
    process: ForwardProcess | None,
    denoiser: Denoiser,
    objective: Objective,
) -> None:
    """Raises ArgumentError where the samples at the end of the run could not be drawn."""
    keys = recipe.sample
    sampler = recipe.sampler.build(steps=keys.steps, vocabulary=vocabulary)
    given = told(denoiser, keys.conditions, keys.count)
    check_asking(objective, process, denoiser, sampler, given, keys.guidance, recipe.length)


def check_asking(
    objective: Objective,
    process: ForwardProcess | None,
    denoiser: Denoiser,
    sampler: Sampler,
    conditions: SampleConditions,
    guidance: float,
    length: int,
) -> None:
    """Raises ArgumentError where this sampler makes no sense of this network, so that nothing is drawn first."""
    network_for(denoiser, process, sampler, conditions, guidance)
    _check_sight(objective, sampler, length)


def _check_sight(objective: Objective, sampler: Sampler, length: int) -> None:
    """Raises ArgumentError where a network that has learnt windows, each without the later ones, is shown all at once."""
    rule = getattr(objective, "times", None)
    window = (
        None
        if rule is None
        else rule.at(OwnTime(), torch.full((1,), 0.5, dtype=torch.float64), length).block
    )
    if window is not None and bool((window != window[:, :1]).any()) and looks_ahead(sampler):
        raise ArgumentError(
            f"{type(sampler).__name__}: this run was trained in windows from left to right ([objective] times) and never "
            "saw noise after the window that it draws; this sampler shows it all positions at once. Use blockwise or "
            "hyperschedule with the width of the run, or set looks_ahead = False on a sampler of your own that goes so."
        )
