"""Denoiser of several fields: a backbone with one stream per field, and one head per field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ddiff.core.fields import JointNoisy
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError
from ddiff.nn.attention import (
    AttentionMask,
    PositionFacts,
    build_block_mask,
    build_dense_mask,
    has_flex_kernel,
)
from ddiff.nn.parameterization import PARAMETERIZATIONS


class StreamInput(NamedTuple):
    """Inputs of one stream of a backbone.

    Attributes:
        states: tokens [B,m] or vectors [B,m,d].
        t: times [B,m] of the inputs; 0 at clean inputs.
        position: position [m] of each input in its field. With a clean copy of the field
            (`Noisy.memory`) there are twice as many inputs as positions.
        absent: bool [B], samples without this field; None: no sample.
        valid: bool [B,n], False at padding; None: no padding. With a clean copy of the field there
            are twice as many inputs as entries.
    """

    states: Tensor
    t: Tensor
    position: Tensor
    absent: Tensor | None = None
    valid: Tensor | None = None


class StreamShape(NamedTuple):
    """Shape of a field, from which a backbone builds the stream of the field.

    Attributes:
        vocabulary: vocabulary of a field of tokens; None for vectors.
        dim: numbers per vector of a field of vectors; None for tokens.
        positions: number of positions.
        grid: rows and columns of an image whose positions are numbered row by row; None for a
            sequence.
    """

    vocabulary: Vocabulary | None
    dim: int | None
    positions: int
    grid: tuple[int, int] | None = None


class JointContext(NamedTuple):
    """Inputs of a joint backbone other than states and times.

    Attributes:
        valid: name of a field -> bool [B,n], False at padding. A missing name means no padding.
        conditions: name of a condition -> labels [B] or vectors [B,d].
    """

    valid: Mapping[str, Tensor] = {}
    conditions: Mapping[str, Tensor] = {}


class JointMask(NamedTuple):
    """Attention between the inputs of all streams, in the order of the streams.

    `facts` are the properties of all inputs that determine attention; None: every input attends to
    every input.
    """

    facts: PositionFacts | None

    def kernel_mask(self, x: Tensor, head_width: int) -> AttentionMask:
        """Return the mask for `attend`, for hidden states like x in heads of `head_width`."""
        if self.facts is None:
            return None
        if has_flex_kernel(x, head_width):
            return build_block_mask(self.facts)
        return build_dense_mask(self.facts)


class JointBackbone(nn.Module):
    """Base class of backbones of several fields.

    `widths` are the channels of the hidden states by field. `forward` maps the inputs of all
    streams to hidden states [B,m,width] by field, and passes `mask.kernel_mask` to `attend`.
    """

    widths: Mapping[str, int]
    reads_time: bool = True
    """The hidden states depend on the times."""

    def forward(
        self, streams: Mapping[str, StreamInput], mask: JointMask, context: JointContext
    ) -> dict[str, Tensor]:
        raise NotImplementedError


class FieldHead(Protocol):
    """Members that heads of tokens and heads of vectors share."""

    width: int
    parameterization: Any

    def total(self, hidden: Tensor, node: Tensor, fn: Any) -> tuple[Tensor, ...]: ...

    def query(self, hidden: Tensor, node: Tensor, fn: Any) -> Any: ...


FieldQuery = tuple[Tensor, Tensor, Callable[..., Any]]
"""Flat rows [k], their query nodes [k], and the callback for the head."""


class JointDenoiser(nn.Module):
    """Backbone with one stream per field, and one head per field.

    Args:
        backbone: maps noisy states to hidden states.
        heads: head of every field.
        parameterizations: meaning of the output of every head. A field that is not named has the
            parameterization of its head, or for tokens the distribution given all other positions.
    """

    precision: torch.dtype | None = None
    """Dtype of matrix products; None: that of the weights. Predictions are at least float32."""

    def __init__(
        self,
        backbone: JointBackbone,
        heads: Mapping[str, Any],
        parameterizations: Mapping[str, Any] = {},
    ) -> None:
        super().__init__()
        _check_heads(backbone, heads)
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(heads))
        self.parameterizations: dict[str, Any] = {}
        for name, head in heads.items():
            own = head.parameterization or PARAMETERIZATIONS["rest"]
            self.parameterizations[name] = parameterizations.get(name, own)

    def forward(
        self, state: JointNoisy, context: JointContext, queries: Mapping[str, FieldQuery]
    ) -> dict[str, tuple[Tensor, ...]]:
        """Return for every queried field the sum of the first result of fn, and all results.

        A field without rows is queried too, so that every rank of a parallel run uses the same
        parameters.
        """
        hidden = self.hidden_states(state, context)
        results = {}
        for name, (rows, node, fn) in queries.items():
            chosen = hidden[name].index_select(0, rows)
            with self._autocast(chosen.device):
                results[name] = self._head(name).total(chosen, node, fn)
        return results

    def hidden_states(self, state: JointNoisy, context: JointContext) -> dict[str, Tensor]:
        """Return the hidden states [B*n,width] of the flat positions of every field."""
        streams = {}
        for name, noisy in state.items():
            streams[name] = _stream_input(noisy, context.valid.get(name))
        mask = JointMask(joint_facts(state, context.valid))
        device = next(iter(streams.values())).t.device
        with self._autocast(device):
            hidden = self.backbone(streams, mask, context)
        found = {}
        for name, noisy in state.items():
            # With a clean copy of the field, only the noisy half is returned.
            length = noisy.t.shape[1]
            found[name] = hidden[name][:, -length:].flatten(0, 1)
        return found

    def query_head(self, name: str, hidden: Tensor, node: Tensor, fn: Any) -> Any:
        """Return fn's results for hidden rows [k,width] of a field; no gradients."""
        with self._autocast(hidden.device):
            return self._head(name).query(hidden, node, fn)

    def _head(self, name: str) -> FieldHead:
        return self.heads[name]  # type: ignore[return-value]

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.precision, enabled=self.precision is not None)


def _stream_input(noisy: Noisy, valid: Tensor | None) -> StreamInput:
    position = torch.arange(noisy.t.shape[1], device=noisy.t.device)
    if noisy.memory is None:
        return StreamInput(noisy.zt, noisy.t, position, noisy.absent, valid)
    states = torch.cat([noisy.memory, noisy.zt], 1)
    t = torch.cat([torch.zeros_like(noisy.t), noisy.t], 1)
    return StreamInput(states, t, torch.cat([position, position]), noisy.absent, valid)


def joint_facts(state: JointNoisy, valid: Mapping[str, Tensor]) -> PositionFacts | None:
    """Return the properties of all inputs that determine attention; None: no input is hidden.

    If a field has blocks, every field without blocks gets a block before all others. Its inputs
    then attend only to fields without blocks, and all blocks attend to them. A block therefore
    receives no information on later blocks through another field.
    """
    has_blocks = any(noisy.block is not None for noisy in state.values())
    has_memory = any(noisy.memory is not None for noisy in state.values())
    is_hidden = has_blocks or bool(valid)
    is_hidden = is_hidden or any(noisy.absent is not None for noisy in state.values())
    if not is_hidden:
        return None
    facts = [_field_facts(noisy, valid.get(name), has_blocks) for name, noisy in state.items()]
    batch = max(len(fact) for field in facts for fact in field)
    joined = []
    for parts in zip(*facts, strict=True):
        rows = batch if any(len(part) > 1 for part in parts) else 1
        joined.append(torch.cat([part.expand(rows, -1) for part in parts], 1))
    valid_all, block, noisy_all = joined
    place = torch.arange(valid_all.shape[1], device=valid_all.device).unsqueeze(0)
    return PositionFacts(
        place,
        valid_all,
        block=block if has_blocks else None,
        noisy=noisy_all if has_memory else None,
    )


def _field_facts(
    noisy: Noisy, valid: Tensor | None, has_blocks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return valid, block and noisy [1 or B,m] of the m inputs of a field."""
    length = noisy.t.shape[1]
    device = noisy.t.device
    if valid is None:
        valid = torch.ones(1, length, dtype=torch.bool, device=device)
    if noisy.absent is not None:
        valid = valid & ~noisy.absent.unsqueeze(-1)
    if noisy.block is not None:
        block = noisy.block
    else:
        block = torch.full((1, length), -1 if has_blocks else 0, device=device)
    is_noisy = torch.zeros(1, length, dtype=torch.bool, device=device)
    if noisy.memory is None:
        return valid, block, is_noisy
    twice = torch.cat([is_noisy, ~is_noisy], 1)
    return torch.cat([valid, valid], 1), torch.cat([block, block], 1), twice


def _check_heads(backbone: JointBackbone, heads: Mapping[str, Any]) -> None:
    if set(backbone.widths) != set(heads):
        raise ArgumentError(
            "JointDenoiser: heads must name the fields of the backbone, "
            f"{sorted(backbone.widths)}; got {sorted(heads)}."
        )
    for name, head in heads.items():
        if head.width != backbone.widths[name]:
            raise ArgumentError(
                f'JointDenoiser: the head of "{name}" must be as wide as its stream; got '
                f"{head.width} for a stream of {backbone.widths[name]}."
            )
