"""Objective of two bits and a number with exact predictions, for the evaluation of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exact_fields import VOCABULARY, exact_network
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.elbo import Likelihood
from ddiff.core.field import Field
from ddiff.core.fields import joint_nelbo
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.times import FlatTimes
from ddiff.core.training_paths import IndependentTimes
from ddiff.core.tree import TreeProcess
from ddiff.data.fields_batch import FieldsBatch

FIELDS = {
    "text": Field(TreeProcess(VOCABULARY, LogTimeClock((1.0,))), FlatTimes(), 2),
    # The ends add less than 1e-4 nats at this log SNR.
    "latent": Field(GaussianProcess(CosineVP(), 1, largest_log_snr=9.5), FlatTimes(), 1),
}


class ExactObjective:
    """Bound with exact predictions; its expectation is -ln p(x) at every sample."""

    fields = FIELDS
    path: Any = IndependentTimes(["text", "latent"])

    def nll(
        self, batch: FieldsBatch, rng: Any, slot: Tensor, slots: Any, path: Any
    ) -> Mapping[str, Likelihood]:
        values = {name: field.values for name, field in batch.fields.items()}
        scored = {name: field.scored for name, field in batch.fields.items()}
        terms = joint_nelbo(FIELDS, exact_network(FIELDS), values, scored, path, rng, slot, slots)
        return {
            name: Likelihood(
                {
                    "closing": each.closing,
                    "diffusion": each.diffusion,
                    "decoding": each.decoding,
                },
                {},
            )
            for name, each in terms.items()
        }

    def counts(self, batch: FieldsBatch) -> Mapping[str, Tensor]:
        return {name: field.count_items() for name, field in batch.fields.items()}
