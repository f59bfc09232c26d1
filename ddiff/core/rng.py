"""Counter-based randomness: a number is a pure function of what it is for, never of what was drawn before it.

World size, micro-batches, workers and restarts then cannot change a run, and a sample does not depend on its batch.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from ddiff.errors import ArgumentError


class CounterRng:
    """Uniforms for one step: `uniform(channel)` depends on (seed, purpose, step, sample index, position, channel) only.

    `index` [B] long numbers the samples globally (>= 0); `length` L is the number of positions; `purpose` keeps training,
    evaluation and sampling apart under one seed; `group` [B] numbers the samples that share the number that `shared` draws.
    A position's value does not depend on L. Philox-4x64 (Salmon et al. 2011) is run with (seed, purpose) as key and
    (position block, index, step, channel) as counter.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        index: Tensor,
        length: int,
        purpose: str = "train",
        group: Tensor | None = None,
    ) -> None:
        if not 0 <= seed < 2**64 or step < 0:
            raise ArgumentError(
                f"Noise: seed must be in [0, 2^64) and step >= 0; got seed {seed}, step {step}."
            )
        self.seed, self.step, self.index, self.length, self.purpose = (
            seed,
            step,
            index,
            length,
            purpose,
        )
        self.group = torch.zeros_like(index) if group is None else group

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        """[B,L] (count 1) or [B,L,count] float64 in [0,1), on the device of `index`. Channels are names."""
        draws = [self._one(f"{channel}.{i}") for i in range(count)]
        return draws[0] if count == 1 else torch.stack(draws, -1)

    def _one(self, channel: str) -> Tensor:
        words = [self._words(i, channel, self.length) for i in self.index.tolist()]
        stacked = np.stack(words) if words else np.empty((0, self.length), dtype=np.uint64)
        return torch.from_numpy((stacked >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(
            self.index.device
        )

    def uniform_per_group(self, channel: str) -> Tensor:
        """[B] one uniform for all samples of a group (without groups: of the global batch) in this step."""
        groups, place = self.group.unique(return_inverse=True)
        words = [
            int(self._words(i, f"shared.{channel}", 1)[0] >> np.uint64(11)) for i in groups.tolist()
        ]
        return (torch.tensor(words, dtype=torch.float64) * 2.0**-53).to(self.index.device)[place]

    def _words(self, index: int, channel: str, count: int) -> np.ndarray:
        counter = np.array([0, index, self.step, _hash(channel)], np.uint64)
        bits = np.random.Philox(
            key=np.array([self.seed, _hash(self.purpose)], np.uint64), counter=counter
        )
        return bits.random_raw(count)


def _hash(name: str) -> int:
    """A number for a name that never changes between runs or machines."""
    return zlib.crc32(name.encode())
