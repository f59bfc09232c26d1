"""The autoregressive objective: -ln p(x_i | x_<i), in training and in evaluation alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    Batch,
    CleanDistribution,
    ComponentConfig,
    CounterRng,
    Denoiser,
    Likelihood,
    LossTerms,
    Network,
    Noisy,
    TimeRule,
    as_network,
    build_context,
    drop_conditions,
    get_device,
    to_device,
)


@final
class AutoregressiveObjective:
    """Trains a denoiser that is shown the word before each position, on the negative log-likelihood.

    No process, no times, no bound: `nll` is exact. `module` is what the trainer and its backend hold. ArgumentError for a
    vocabulary without a mask, which a document starts with, and for a head that says anything but a law.
    """

    bound = "NLL"  # exact, for tables that hold it beside bounds
    times: TimeRule | None = None  # nothing is drawn

    def __init__(self, denoiser: Denoiser) -> None:
        if denoiser.inputs != "previous":
            raise ArgumentError(
                f'AutoregressiveObjective: the denoiser must be shown the word before each position, inputs = "previous"; '
                f'got "{denoiser.inputs}".'
            )
        if denoiser.reading.predicts != "law":
            raise ArgumentError(
                f"AutoregressiveObjective: the head must say a law of the next word; {type(denoiser.head).__name__} says a "
                'score. Take [denoiser] head = "tokens".'
            )
        self.vocabulary = denoiser.head.vocabulary
        if self.vocabulary.mask_id is None:
            raise ArgumentError(
                f"AutoregressiveObjective: the vocabulary must have a mask, which stands before the first word of a "
                f"document; got {self.vocabulary}. Leave out [vocabulary] mask = false."
            )
        self.denoiser = denoiser
        self.module: torch.nn.Module = denoiser

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": batch.scored.sum()}

    def __call__(
        self, batch: Batch, rng: CounterRng, denominators: Mapping[str, Tensor], slots: int
    ) -> LossTerms:
        """(sum of -ln p over the scored words of this micro-batch) / (tokens of the global batch)."""
        device = get_device(self.module)
        context = drop_conditions(build_context(batch), self.denoiser.condition_dropout, rng)
        rows, node, question = self._asked(batch, device)
        tokens = denominators["tokens"]

        def share(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, Tensor]:
            nats = question(dist, idx)
            return nats / tokens, nats.detach()

        loss, _, nats = self.module(
            to_device(_shown(batch), device), to_device(context, device), rows, node, share
        )
        return LossTerms(loss, {"nll_nats_per_token": (nats.sum(), batch.scored.sum())})

    def network(self, batch: Batch) -> Network:
        """How the denoiser is asked about these rows."""
        return as_network(self.denoiser, None, build_context(batch))

    def nll(
        self, batch: Batch, rng: CounterRng, slot: Tensor, slots: int | Tensor, times: TimeRule
    ) -> Likelihood:
        """-ln p(x_i | x_<i) at every scored position; nothing is drawn, so noise and times are not used."""
        rows, node, question = self._asked(batch, batch.ids.device)
        nats = torch.zeros(batch.ids.numel(), dtype=torch.float64, device=batch.ids.device)
        if len(rows):
            numbers = torch.arange(len(rows), device=rows.device)
            query = self.network(batch)(_shown(batch))
            found: Tensor = query(rows, node, question, numbers)
            nats[rows] = found.double()
        return Likelihood({"nll": nats.reshape(batch.ids.shape)}, {})

    def _asked(
        self, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor, Callable[[CleanDistribution, Tensor], Tensor]]:
        """The scored positions on the device, the root for each where the batch is, and the question about them."""
        rows = batch.scored.reshape(-1).nonzero().squeeze(-1)
        node = torch.full_like(rows, self.vocabulary.root)
        rows, words = to_device((rows, batch.ids.reshape(-1)[rows]), device)

        def question(dist: CleanDistribution, idx: Tensor) -> Tensor:
            return -dist.log_prob(words[idx])

        return rows, node, question


def _shown(batch: Batch) -> Noisy:
    """All words, clean: who sees which of them is the denoiser's business."""
    return Noisy(
        batch.ids,
        torch.zeros(batch.ids.shape, device=batch.ids.device).double(),
        torch.ones_like(batch.scored),
    )


@final
class Autoregression:
    """The likelihood itself, word by word from left to right; it needs no [process], no loss and no times."""

    slots = ()
    inputs = "previous"  # the denoiser that `build` takes sees the token before each position

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, denoiser: Denoiser) -> AutoregressiveObjective:
        return AutoregressiveObjective(denoiser)
