"""Benchmark cases (model family and size), and the functions of ddiff that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from ddiff_ar.objective import AutoregressiveObjective
from ddiff_ar.sampler import LeftToRightSampler
from ddiff_dit.dit import DiT
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_mdlm.process import MaskedDiffusion
from torch import Tensor, nn

from ddiff import (
    AncestralSampler,
    Batch,
    CounterRng,
    Denoiser,
    DiffusionObjective,
    ElboLoss,
    FlatTimes,
    FlatVocabulary,
    ForwardProcess,
    Head,
    HierarchicalVocabulary,
    TokenHead,
    TreeHead,
    Vocabulary,
    as_network,
)
from ddiff.sampling.loop import generate

P_UNIFORM = 0.2
# Number of clusters in HDLM's clustering of GPT-2's 50257 tokens. For other vocabularies the number
# of clusters is proportional to the square root of the number of tokens.
CLUSTERS = {50257: 128}
# Smallest and largest cluster of HDLM's clustering, relative to the mean size.
SMALLEST = 24 / 393
LARGEST = 1801 / 393
# Standard deviation of the logarithm of cluster sizes in HDLM's clustering. There, the mean size of
# a token's cluster, over all tokens, is 626 tokens, 1.6 times the mean size of a cluster.
SPREAD = 0.68


class Size(NamedTuple):
    """Size of a benchmark case.

    `vocabulary` is the number of tokens, `batch` the number of sequences in training, `samples` the
    number of sequences in sampling, and `steps` the number of sampling steps.
    """

    vocabulary: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 8
    samples: int = 4
    steps: int = 64


class Case(NamedTuple):
    """Model family (mdlm, gidd, hdlm-tied, hdlm-levelwise or ar) at a size.

    `levels` is the number of tree levels above the tokens, and only trees use it. `convolution` and
    `qk_norm` are keys of the backbone. `documents` is the number of documents in a training row.
    """

    family: str
    size: Size
    levels: int = 2
    convolution: int = 0
    qk_norm: bool = False
    documents: int = 1

    def __str__(self) -> str:
        return f"{self.family} V={self.size.vocabulary}"


def cluster_sizes(num_tokens: int, clusters: int) -> list[int]:
    """Return sizes of `clusters` clusters with the spread of HDLM's clusters of GPT-2's tokens.

    The sizes sum to `num_tokens`. They are quantiles of a log-normal distribution between the
    smallest and the largest size of HDLM (arXiv 2510.08632), scaled to the mean size. Fewer than 16
    clusters get equal sizes.
    """
    mean = num_tokens / clusters
    if clusters < 16:
        return [len(part) for part in torch.arange(num_tokens).tensor_split(clusters)]
    normal = torch.distributions.Normal(0.0, 1.0)
    quantile = normal.icdf((torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters)
    share = torch.exp(SPREAD * quantile - SPREAD**2 / 2).clamp(SMALLEST, LARGEST)
    share[0], share[-1] = SMALLEST, LARGEST
    inner = share[1:-1]
    inner *= (clusters - SMALLEST - LARGEST) / inner.sum()
    sizes = (share * mean).round().long().clamp(min=1)
    sizes[clusters // 2] += num_tokens - int(sizes.sum())
    return sizes.tolist()


def clusters_of(num_tokens: int) -> int:
    return CLUSTERS.get(num_tokens, max(2, round(128 * math.sqrt(num_tokens / 50257))))


def vocabulary_of(case: Case) -> Vocabulary:
    """Return the vocabulary of a case: a tree for hdlm, a flat vocabulary otherwise.

    Token ids are assigned to the clusters of a tree at random.
    """
    num_tokens = case.size.vocabulary
    if not case.family.startswith("hdlm"):
        return FlatVocabulary(num_tokens)
    sizes = cluster_sizes(num_tokens, clusters_of(num_tokens))
    finest = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    scattered = finest[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))]
    parents = [scattered]
    for _ in range(
        case.levels - 2
    ):  # the size of a coarser level is the square root of the size of the level below
        below = int(parents[-1].max()) + 1
        parents.append(torch.arange(below) % max(2, round(math.sqrt(below))))
    return HierarchicalVocabulary(parents)


def process_of(case: Case, vocabulary: Vocabulary) -> ForwardProcess:
    if case.family == "mdlm":
        return MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=vocabulary)
    if case.family == "gidd":
        config = GeneralizedInterpolation.Config(p_uniform=P_UNIFORM)
        return GeneralizedInterpolation.build(config, vocabulary=vocabulary)
    return HierarchicalDiffusion.build(HierarchicalDiffusion.Config(), vocabulary=vocabulary)


def head_of(case: Case, vocabulary: Vocabulary) -> Head:
    if case.family.startswith("hdlm-"):
        return TreeHead(
            vocabulary, case.size.width, "tied" if case.family == "hdlm-tied" else "levelwise"
        )
    return TokenHead(vocabulary, case.size.width)


def backbone_of(case: Case, vocabulary: Vocabulary) -> DiT:
    backbone = DiT(
        vocabulary,
        case.size.width,
        case.size.layers,
        case.size.heads,
        convolution=case.convolution,
        qk_norm=case.qk_norm,
    )
    return fill_zero_parameters(backbone)


def fill_zero_parameters(module: nn.Module) -> nn.Module:
    """Fill parameters that are all zero with small random numbers, as if the model were trained."""
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return module


def tokens_of(case: Case, count: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        case.size.vocabulary, (count or case.size.batch, case.size.length), generator=generator
    )


def batch_of(ids: Tensor, documents: int = 1) -> Batch:
    """Return a batch of rows `ids` [B,L] without padding, each of `documents` documents."""
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    document = torch.arange(ids.shape[1], device=ids.device) * documents // ids.shape[1]
    return Batch(
        ids,
        everywhere,
        everywhere,
        document.expand(ids.shape),
        torch.arange(len(ids), device=ids.device),
        packed=documents > 1,
    )


def denoiser_of(case: Case) -> Denoiser:
    vocabulary = vocabulary_of(case)
    inputs = "previous" if case.family == "ar" else "own"
    return Denoiser(
        backbone_of(case, vocabulary),
        fill_zero_parameters(head_of(case, vocabulary)),
        inputs=inputs,
    )


def objective_of(case: Case, denoiser: Denoiser) -> DiffusionObjective | AutoregressiveObjective:
    if case.family == "ar":
        return AutoregressiveObjective(denoiser)
    process = process_of(case, denoiser.head.vocabulary)
    return DiffusionObjective(process, denoiser, ElboLoss(), FlatTimes(1e-3, 1.0))


def our_training_step(case: Case) -> Callable[[], float]:
    """Return a function that runs a training step of ddiff and returns the loss."""
    denoiser = denoiser_of(case)
    return step_of(case, denoiser, objective_of(case, denoiser))


def step_of(
    case: Case, module: nn.Module, objective: DiffusionObjective | AutoregressiveObjective
) -> Callable[[], float]:
    batch, count = batch_of(tokens_of(case), case.documents), 0

    def step() -> float:
        nonlocal count
        count += 1
        module.zero_grad()
        rng = CounterRng(0, count, batch.index, case.size.length)
        terms = objective(batch, rng, {"tokens": batch.scored.sum()}, case.size.batch)
        terms.loss.backward()
        return float(terms.loss.detach())

    return step


def our_sampler(case: Case) -> Callable[[], float]:
    """Return a function that samples with ddiff and returns the fraction of ids that are tokens."""
    denoiser = denoiser_of(case).eval()
    index, length = torch.arange(case.size.samples), case.size.length
    if case.family == "ar":
        sampler, process, network = (
            LeftToRightSampler(denoiser.head.vocabulary),
            None,
            as_network(denoiser, cached=True),
        )
    else:
        process = process_of(case, denoiser.head.vocabulary)
        sampler, network = AncestralSampler(case.size.steps), as_network(denoiser, process)

    def run() -> float:
        ids = generate(sampler, process, network, index=index, length=length, seed=0).ids
        return float((ids < case.size.vocabulary).double().mean())

    return run
