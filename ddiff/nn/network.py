"""Adapter that turns a denoiser into the network function of samplers and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddiff.core.network import CountingNetwork
from ddiff.core.prediction import Prediction
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.nn.attention import KeyValueCache
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser
from ddiff.nn.parameterization import HeadCallback

if TYPE_CHECKING:
    from ddiff.core.process import ForwardProcess, RowFunction


class DenoiserNetwork(CountingNetwork):
    """Network function made from a denoiser: network(noisy) returns a query object.

    The query, when called, runs the denoiser on the sequences that have queried rows. It runs each
    sequence at most once. If a sequence has the same ids as in the query before, and the same times
    or a backbone that does not read times, its hidden states are reused. Dropout follows the mode
    of the denoiser: call `.eval()` first.

    Args:
        process: needed to convert the output of the head to the prediction that the formulas use
            (see `Parameterization`). None: the predictions of the head are used unchanged.
        context: padding, documents and conditions of the sequences.
        cached: whether keys and values of finished blocks are cached.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: ForwardProcess | None = None,
        context: Context = UNPADDED,
        cached: bool = False,
    ) -> None:
        super().__init__()
        if cached and not denoiser.caches:
            raise ArgumentError(
                "as_network: cached=True needs a backbone that caches keys and values; "
                f"{type(denoiser.backbone).__name__} does not declare `caches = True`. "
                "Omit cached=True: the result is the same, only slower."
            )
        self.denoiser = denoiser
        self.process = process
        self.context = context
        self.cache = KeyValueCache() if cached else None
        self.predicts = denoiser.parameterization.predicts
        self.last: _DenoiserQuery | None = None

    def __call__(self, noisy: Noisy) -> _DenoiserQuery:
        return _DenoiserQuery(self, noisy)


class _DenoiserQuery:
    """Query of one noisy batch: evaluates the denoiser at some rows, and keeps hidden states."""

    def __init__(self, network: DenoiserNetwork, noisy: Noisy) -> None:
        self.network = network
        # Copies: the next query compares its state with this one, and the caller may by then have
        # changed the tensors in place.
        self.noisy = noisy._replace(zt=noisy.zt.clone(), t=noisy.t.clone())
        self.hidden: Tensor | None = None
        self.is_known = torch.zeros(len(noisy.zt), dtype=torch.bool, device=noisy.zt.device)
        # Positions that have hidden states; None: all positions. A cached pass computes only some.
        self.positions: Tensor | None = None

    @torch.no_grad()
    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        def on_chunk(prediction: Prediction, idx: Tensor) -> Any:
            return fn(prediction, *(value[idx] for value in per_row))

        callback: HeadCallback = on_chunk
        hidden = self._hidden_states(rows).index_select(0, rows)
        self._check_computed(rows)
        denoiser = self.network.denoiser
        process = self.network.process
        if process is not None:
            parameterization = denoiser.parameterization
            zt = self.noisy.zt.flatten()[rows]
            t = self.noisy.t.flatten()[rows]
            prepared = parameterization.prepare(process, zt, t)
            callback = parameterization.wrap_callback(callback, process, zt, t, prepared)
            node = parameterization.scope(node, process)
        return denoiser.query_head(hidden, node, callback)

    def _hidden_states(self, rows: Tensor) -> Tensor:
        """Return hidden states [B*L,width], valid at least for the sequences that hold `rows`."""
        if self.hidden is None:
            self._reuse_hidden_states(self.network.last)
            self.network.last = self
        is_needed = torch.zeros_like(self.is_known)
        is_needed[rows // self.noisy.zt.shape[1]] = True
        missing = (is_needed & ~self.is_known).nonzero().squeeze(-1)
        if len(missing):
            self._run(missing)
        assert self.hidden is not None
        return self.hidden

    def _reuse_hidden_states(self, last: _DenoiserQuery | None) -> None:
        """Copy the hidden states of sequences whose input is the same as in the query `last`."""
        if last is None or last.hidden is None or not _is_same_attention(last.noisy, self.noisy):
            return
        same = last.is_known & (last.noisy.zt == self.noisy.zt).all(-1)
        if self.network.denoiser.reads_time:
            same &= (last.noisy.t == self.noisy.t).all(-1)
        if last.positions is not None:
            # A cached pass covers the same block in all sequences, so the hidden states of all
            # sequences are reused, or those of none.
            same &= same.all() & torch.equal(last.noisy.clean, self.noisy.clean)
        if bool(same.any()):
            self.hidden = last.hidden.clone()
            self.is_known = same
            self.positions = last.positions

    def _run(self, sequences: Tensor) -> None:
        """Run the backbone on the sequences with these indices, and store their hidden states."""
        network = self.network
        batch, length = self.noisy.zt.shape
        positions = torch.arange(length, device=self.is_known.device)
        if network.cache is not None:
            # The cache contains all sequences, so all are run.
            sequences = torch.arange(batch, device=self.is_known.device)
            hidden, positions = network.denoiser.extend_cache(
                self.noisy, network.context, network.cache
            )
            self.positions = positions
        else:
            noisy = self.noisy
            context = network.context
            if len(sequences) < batch:
                noisy = _select_sequences(noisy, sequences)
                context = context.select_sequences(sequences)
            hidden = network.denoiser.hidden_states(noisy, context).unflatten(0, noisy.zt.shape)
        network.count.add(batch, sequences.cpu())
        if self.hidden is None:
            self.hidden = hidden.new_zeros(self.noisy.zt.numel(), hidden.shape[-1])
        rows = (sequences.unsqueeze(-1) * length + positions).flatten()
        self.hidden[rows] = hidden.flatten(0, 1)
        self.is_known[sequences] = True

    def _check_computed(self, rows: Tensor) -> None:
        """Raise ArgumentError if a row has no hidden state.

        With a cache of keys and values, only the first block that is not clean is computed.
        """
        if self.positions is None or not len(rows):
            return
        position = rows % self.noisy.zt.shape[1]
        first = int(self.positions[0])
        last = int(self.positions[-1])
        if bool(((position < first) | (position > last)).any()):
            raise ArgumentError(
                "as_network: with cached=True only the first block that is not clean can be "
                f"queried, here positions {first} to {last}; got positions "
                f"{sorted(set(position.tolist()))}. Query without the cache."
            )


def _is_same_attention(first: Noisy, second: Noisy) -> bool:
    """Return whether positions attend to each other in the same way in two noisy states."""
    if first.zt.shape != second.zt.shape or first.memory is not None or second.memory is not None:
        return False
    if first.block is None or second.block is None:
        return first.block is second.block
    return torch.equal(first.block, second.block)


def _select_sequences(noisy: Noisy, sequences: Tensor) -> Noisy:
    block = noisy.block
    if block is not None and len(block) > 1:
        block = block[sequences]
    return Noisy(
        zt=noisy.zt[sequences],
        t=noisy.t[sequences],
        clean=noisy.clean[sequences],
        block=block,
        memory=None if noisy.memory is None else noisy.memory[sequences],
    )


def as_network(
    denoiser: Denoiser,
    process: ForwardProcess | None = None,
    context: Context = UNPADDED,
    cached: bool = False,
) -> DenoiserNetwork:
    """Wrap a denoiser as the network that samplers and evaluation call: network(noisy) -> query.

    `DenoiserNetwork` explains the arguments.
    """
    return DenoiserNetwork(denoiser, process, context, cached)
