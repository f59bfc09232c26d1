"""Build the backend of a recipe: the device and the processes of training."""

from __future__ import annotations

import torch

from ddiff.distributed.launcher import get_rank_info
from ddiff.distributed.single import SingleBackend, choose_device, resolve_device
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import resolve_precision
from ddiff.recipe.model import BaseRecipe
from ddiff.training.protocols import Backend


def build_backend(recipe: BaseRecipe) -> Backend:
    """Build the backend for training.

    Raises ArgumentError if several processes were started for a backend of one process, or if the
    batch cannot be divided among the processes.
    """
    train = recipe.train
    backend = _build_backend(recipe, recipe.backend_keys.processes)
    rank_info = get_rank_info()
    if rank_info is not None and rank_info.world_size != backend.world_size:
        raise ArgumentError(
            f'[backend] kind = "{recipe.backend.component.name}" runs {backend.world_size} '
            f"process, but {rank_info.world_size} processes were started, and each would write the "
            'same run. Set kind = "ddp" or "fsdp", or start one process.'
        )
    if train.batch % (train.accumulate * backend.world_size):
        raise ArgumentError(
            "[train] batch must be a multiple of accumulate times the number of processes, so that "
            f"every process has as many rows; got batch = {train.batch}, "
            f"accumulate = {train.accumulate} and {backend.world_size} processes."
        )
    return backend


def build_single_backend(recipe: BaseRecipe) -> Backend:
    """Build a backend of one process, to evaluate or sample a run.

    The run may have been trained by any number of processes. Each of several processes that divide
    the evaluation uses its own GPU.
    """
    device = recipe.backend_keys.device
    info = get_rank_info()
    if info is not None and info.world_size > 1:
        return SingleBackend(choose_device(device, info.local_rank))
    if recipe.backend.members.is_distributed:
        return SingleBackend(device)
    return _build_backend(recipe, 1)


def check_backend(recipe: BaseRecipe) -> torch.device:
    """Check that the backend can start, and return the device of training.

    No process is started. Raises ArgumentError if the backend cannot start.
    """
    if not recipe.backend.members.is_distributed:
        backend = build_backend(recipe)
        backend.close()
        return backend.device
    return resolve_device(recipe.backend_keys.device)


def _build_backend(recipe: BaseRecipe, processes: int) -> Backend:
    keys = recipe.backend_keys
    precision = resolve_precision(keys.precision, keys.device)
    return recipe.backend.build(
        device=keys.device, processes=processes, length=recipe.length, precision=precision
    )
