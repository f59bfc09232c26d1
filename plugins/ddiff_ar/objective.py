"""Autoregressive objective: -ln p(x_i | x_<i), in training and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Objective that trains an autoregressive denoiser on the negative log-likelihood.

    The denoiser must have `inputs = "previous"`: its input at each position is the token before
    that position. There is no forward process and no noise time, and `nll` is exact. The attribute
    `module` is the module that the trainer calls: the denoiser, possibly wrapped by the backend.

    Raises ArgumentError if the vocabulary has no mask, since the mask is the input before the first
    token of a document, or if the head predicts scores.
    """

    bound = "NLL"  # name in tables: the negative log-likelihood is exact and not a bound
    times: TimeRule | None = None  # no noise times are drawn

    def __init__(self, denoiser: Denoiser) -> None:
        if denoiser.inputs != "previous":
            raise ArgumentError(
                "AutoregressiveObjective: the denoiser must take the token before each position as "
                f'input, inputs = "previous"; got "{denoiser.inputs}".'
            )
        if denoiser.parameterization.predicts != "distribution":
            raise ArgumentError(
                "AutoregressiveObjective: the head must predict a distribution of the next token; "
                f"{type(denoiser.head).__name__} predicts a score. "
                'Take [denoiser] head = "tokens".'
            )
        self.vocabulary = denoiser.head.vocabulary
        if self.vocabulary.mask_id is None:
            raise ArgumentError(
                "AutoregressiveObjective: the vocabulary must have a mask, which comes before the "
                f"first token of a document; got {self.vocabulary}. "
                "Leave out [vocabulary] mask = false."
            )
        self.denoiser = denoiser
        self.module: torch.nn.Module = denoiser

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": batch.tokens.sum()}

    def __call__(
        self, batch: Batch, rng: CounterRng, denominators: Mapping[str, Tensor], slots: int
    ) -> LossTerms:
        """Return the loss of a micro-batch, in nats per token.

        The loss is the sum of -ln p over the scored tokens of `batch`, divided by
        `denominators["tokens"]`, the number of scored tokens of the global batch. `rng` selects the
        sequences whose conditions are dropped. `slots` is not used.
        """
        device = get_device(self.module)
        context = drop_conditions(build_context(batch), self.denoiser.condition_dropout, rng)
        rows, node, targets = self._scored_rows(batch, device)
        tokens = denominators["tokens"]

        def loss_of_rows(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, Tensor]:
            nats = -dist.log_prob(targets[idx])
            # The head forms gradients chunk by chunk, so that each row is divided here.
            return nats / tokens, nats.detach()

        inputs = to_device(_clean_input(batch), device)
        loss, _, nats = self.module(inputs, to_device(context, device), rows, node, loss_of_rows)
        return LossTerms(loss, {"nll_nats_per_token": (nats.sum(), batch.tokens.sum())})

    def network(self, batch: Batch) -> Network:
        """Return the denoiser as a network function for the documents and conditions of `batch`."""
        return as_network(self.denoiser, None, build_context(batch))

    def nll(
        self, batch: Batch, rng: CounterRng, slot: Tensor, slots: int | Tensor, times: TimeRule
    ) -> Likelihood:
        """Return -ln p(x_i | x_<i) [B,L], 0 at positions that are not scored.

        This likelihood is exact and deterministic. The other arguments are for objectives that
        estimate a bound at random times, and are not used.
        """
        rows, node, targets = self._scored_rows(batch, batch.ids.device)
        nats = torch.zeros(batch.ids.numel(), dtype=torch.float64, device=batch.ids.device)
        if len(rows):
            query = self.network(batch)(_clean_input(batch))
            row_nats: Tensor = query(rows, node, _nats, targets)
            nats[rows] = row_nats.double()
        return Likelihood({"nll": nats.reshape(batch.ids.shape)}, {})

    def _scored_rows(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return three tensors [k] for the k scored positions.

        - flat indices b * L + i, on `device`,
        - query nodes, on the device of the batch, since heads group rows by node on the host,
        - tokens, on `device`.

        Every query node is the root of the tree, so that the head predicts over all tokens.
        """
        rows = batch.scored.reshape(-1).nonzero().squeeze(-1)
        node = torch.full_like(rows, self.vocabulary.root)
        rows, targets = to_device((rows, batch.ids.reshape(-1)[rows]), device)
        return rows, node, targets


def _nats(dist: CleanDistribution, targets: Tensor) -> Tensor:
    return -dist.log_prob(targets)


def _clean_input(batch: Batch) -> Noisy:
    """Return the tokens of a batch as network input without noise.

    The denoiser is causal, so that the prediction at a position does not use its own token.
    """
    times = torch.zeros(batch.ids.shape, device=batch.ids.device).double()
    return Noisy(batch.ids, times, torch.ones_like(batch.scored))


@final
class Autoregression:
    """Autoregressive objective from left to right; its recipes have no process, loss or times."""

    slots = ()
    inputs = "previous"  # input of the denoiser: the token before each position
    formulas = """
        input        position i gets the token x_{i-1}, or the mask state at the start of a document
        attention    position i attends to no later position
        prediction   P(x_i | x_<i)
        loss         -ln P(x_i | x_<i), averaged over the tokens of the global batch
        sampling     x_i ~ P(. | x_<i) for i = 0, 1, ..., L - 1: exact, with one network call per
                     token

        x_i          token at position i = 0, ..., L - 1
        x_<i         all tokens before it
        """

    class Config(ComponentConfig):
        """Empty: this objective has no keys."""

    @staticmethod
    def build(config: Config, *, denoiser: Denoiser) -> AutoregressiveObjective:
        return AutoregressiveObjective(denoiser)
