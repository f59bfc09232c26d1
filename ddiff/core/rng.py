"""Counter-based random generator: each number is a pure function of its purpose and position.

A number never depends on earlier draws. World size, micro-batches, workers and restarts therefore
cannot change a run, and a sample does not depend on its batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from ddiff.errors import ArgumentError

# Numbers per position up to which `uniform` uses a separate stream for each.
MAX_STREAMS = 4


class CounterRng:
    """Uniform random numbers for the samples of one step.

    A number depends only on (seed, purpose, step, sample index, position, channel). The number of
    a position does not depend on `length`. Philox-4x64 (Salmon et al. 2011) is run with (seed,
    purpose) as key and (position block, index, step, channel) as counter.

        rng = CounterRng(seed=1, step=7, index=torch.arange(4), length=16)
        u = rng.uniform("time")           # [4,16]; "time" is the channel

    Args:
        seed: in [0, 2^64); one seed for all samples, or a list with one seed per sample. A sample
            has the same numbers in both cases.
        step: training or sampling step, >= 0.
        index: [B] long, global indices of the samples, >= 0.
        length: number of positions L.
        purpose: separates training, evaluation and sampling under one seed.
        group: [B] long, group of each sample. Samples of one group share the numbers of
            `uniform_per_group`. Without `group` all samples are in one group.
        mirrored: `uniform` returns 1 - 2^-53 - u in place of u (see `mirror`).
    """

    def __init__(
        self,
        seed: int | Sequence[int],
        step: int,
        index: Tensor,
        length: int,
        purpose: str = "train",
        group: Tensor | None = None,
        mirrored: bool = False,
    ) -> None:
        seeds = seed if isinstance(seed, Sequence) else [seed]
        if not all(0 <= value < 2**64 for value in seeds) or step < 0:
            raise ArgumentError(
                f"CounterRng: seed must be in [0, 2^64) and step >= 0; got seed {seed}, step "
                f"{step}."
            )
        if isinstance(seed, Sequence) and len(seeds) != len(index):
            raise ArgumentError(
                f"CounterRng: a list of seeds must have one seed per sample, {len(index)}; got "
                f"{len(seeds)} seeds."
            )
        self.seed = seed
        self.step = step
        self.index = index
        self.length = length
        self.purpose = purpose
        self.group = torch.zeros_like(index) if group is None else group
        self.mirrored = mirrored

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        """Return float64 uniforms in [0,1), on the device of the sample indices `index`.

        The shape is [B,L] for count 1, else [B,L,count]. `channel` names the purpose of the
        numbers; numbers of different channels are independent. Many numbers per position
        come from one stream per sample, position by position, since a stream per number would be
        slow for vectors.
        """
        if count > MAX_STREAMS:
            numbers = self._draw_channel(f"{channel}.block", self.length * count)
            return numbers.reshape(len(self.index), self.length, count)
        draws = [self._draw_channel(f"{channel}.{i}", self.length) for i in range(count)]
        if count == 1:
            return draws[0]
        return torch.stack(draws, -1)

    def derive(self, purpose: str, length: int) -> CounterRng:
        """Return a generator of the same samples for another purpose and number of positions."""
        return CounterRng(
            self.seed, self.step, self.index, length, purpose, self.group, self.mirrored
        )

    def mirror(self) -> CounterRng:
        """Return a generator whose numbers are as far from 1 as the numbers of this one from 0.

        A number u of `uniform` becomes 1 - 2^-53 - u, which is also uniform on the same grid. The
        mean of two estimates with u and with mirrored u has less variance if the estimate rises or
        falls with u (antithetic numbers).
        """
        other = copy(self)
        other.mirrored = not self.mirrored
        return other

    def _draw_channel(self, channel: str, length: int) -> Tensor:
        """Return uniforms [B,length] of one stream per sample."""
        rows = []
        for seed, sample in zip(self._seeds(), self.index.tolist()):
            rows.append(self._raw_bits(seed, sample, channel, length))
        if rows:
            bits = np.stack(rows)
        else:
            bits = np.empty((0, length), dtype=np.uint64)
        # The upper 53 bits are the digits of a float64 in [0,1).
        numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        if self.mirrored:
            numbers = (1.0 - 2.0**-53) - numbers
        return torch.from_numpy(numbers).to(self.index.device)

    def uniform_per_group(self, channel: str) -> Tensor:
        """Return float64 uniforms [B] in [0,1); all samples of a group get the same number.

        The group of each sample is the argument `group` of the class; without it, all samples are
        in one group. The number changes from step to step. `channel` names the purpose of the
        numbers.
        """
        numbers: dict[tuple[int, int], int] = {}  # by seed and group
        keys = list(zip(self._seeds(), self.group.tolist()))
        for seed, group in dict.fromkeys(keys):
            bits = self._raw_bits(seed, group, f"shared.{channel}", 1)
            numbers[seed, group] = int(bits[0] >> np.uint64(11))
        uniforms = torch.tensor([numbers[key] for key in keys], dtype=torch.float64) * 2.0**-53
        return uniforms.to(self.index.device)

    def _seeds(self) -> Sequence[int]:
        """Return the seed of each sample."""
        if isinstance(self.seed, Sequence):
            return self.seed
        return [self.seed] * len(self.index)

    def _raw_bits(self, seed: int, index: int, channel: str, count: int) -> np.ndarray:
        """Return `count` random uint64 numbers of one seed and channel.

        `index` is the number of a sample or of a group.
        """
        # The first number of the Philox counter counts blocks of positions, so it starts at 0.
        counter = np.array([0, index, self.step, _hash(channel)], np.uint64)
        key = np.array([seed, _hash(self.purpose)], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)


def _hash(name: str) -> int:
    """Return an integer for a name, the same in every run and on every machine."""
    return zlib.crc32(name.encode())
