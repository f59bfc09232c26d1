"""A step of the objective of several fields on ranks, compared with one process.

The ranks get different modes of a mixture and different absent fields, so that in some steps a rank
has no row of a field.
"""

from __future__ import annotations

from pathlib import Path

import torch
from ddiff_dit.mmdit import MMDiT, StreamSpec
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.field import Field
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.paths import given_path, shared_path
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.core.training_paths import MixedPaths
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.fields_batch import FieldsBatch, token_field, vector_field
from ddiff.distributed.data_parallel import DistributedBackend, ShardedBackend
from ddiff.distributed.single import SingleBackend
from ddiff.nn.heads import TokenHead
from ddiff.nn.joint_denoiser import JointDenoiser
from ddiff.nn.parameterization import PARAMETERIZATIONS
from ddiff.nn.vector_head import VectorHead
from ddiff.training.fields_objective import FieldsObjective
from ddiff.training.losses import ElboLoss

SAMPLES = 4
LENGTH = 6
DIM = 3
VOCABULARY = FlatVocabulary(7)
BACKENDS = {"ddp": DistributedBackend, "fsdp": ShardedBackend, "single": SingleBackend}


def make_objective() -> FieldsObjective:
    """Return an objective with random weights, the same in every process."""
    fields = {
        "text": Field(TreeProcess(VOCABULARY, LogTimeClock((1.0,))), FlatTimes(), LENGTH),
        "latent": Field(GaussianProcess(CosineVP(), DIM), FlatTimes(), 1),
    }
    streams = {"text": StreamSpec(32, vocabulary=VOCABULARY), "latent": StreamSpec(16, dim=DIM)}
    vector_head = VectorHead(DIM, 16)
    denoiser = JointDenoiser(
        MMDiT(streams, layers=2, heads=2, head_width=8),
        {"text": TokenHead(VOCABULARY, 32), "latent": vector_head},
        {"text": PARAMETERIZATIONS["rest"], "latent": vector_head.parameterization},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    shared = shared_path(list(fields))
    path = MixedPaths([(shared, 0.5), (given_path(shared, {"latent": "clean"}), 0.5)])
    losses = {"text": ElboLoss(), "latent": ElboLoss()}
    return FieldsObjective(fields, denoiser, path, losses)


def make_batch(slots: Tensor) -> FieldsBatch:
    """Return the samples of some slots; the second half of the global batch has no latent."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 7, (SAMPLES, LENGTH), generator=generator)
    vectors = torch.randn(SAMPLES, 1, DIM, generator=generator, dtype=torch.float64)
    absent = torch.arange(SAMPLES) >= SAMPLES // 2
    vectors = vectors * ~absent[:, None, None]
    fields = {
        "text": token_field(ids[slots]),
        "latent": vector_field(vectors[slots], absent=absent[slots]),
    }
    return FieldsBatch(fields, slots)


def train_fields(folder: str, kind: str, steps: int = 3) -> None:
    """Take plain gradient steps, and save the weights of rank 0."""
    backend = BACKENDS[kind]("cpu")
    objective = make_objective()
    module = backend.wrap(objective.denoiser)
    objective.module = module
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    whole = make_batch(torch.arange(SAMPLES))
    counts = {name: count.double() for name, count in objective.counts(whole).items()}
    slots = torch.arange(SAMPLES).chunk(backend.world_size)[backend.rank]
    for step in range(steps):
        batch = make_batch(slots)
        rng = CounterRng(0, step, batch.index, LENGTH)
        optimizer.zero_grad()
        objective(batch, rng, counts, SAMPLES).loss.backward()
        optimizer.step()
    weights = {}
    for name, parameter in backend.unwrap(module).named_parameters():
        whole_value = parameter.detach()
        if hasattr(whole_value, "full_tensor"):
            whole_value = whole_value.full_tensor()
        weights[name] = whole_value
    if backend.rank == 0:
        torch.save(weights, Path(folder) / f"{kind}.pt")
    objective.module = torch.nn.Identity()
    del module, optimizer
    backend.close()
