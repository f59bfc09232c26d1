"""Multimodal diffusion transformer (MMDiT, arXiv 2403.03206): one stream per field.

Every field has its own embedding, width, modulation, projections and MLP. In each block, all inputs
of all streams attend to each other in one attention. A backbone with one stream is the `DiT` of
this package.

Shapes: B samples, m inputs of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ddiff import (
    ArgumentError,
    AttentionMask,
    ComponentConfig,
    JointBackbone,
    JointContext,
    JointMask,
    PositiveInt,
    Probability,
    StateEmbedding,
    StreamInput,
    StreamShape,
    Vocabulary,
    attend,
)
from ddiff_dit.dit import (
    CONDITION_WIDTH,
    HEAD_WIDTH,
    SIZES,
    TIME_FEATURES,
    Block,
    Condition,
    Layers,
    Modulation,
    ModulationVectors,
    Rotation,
    Size,
    add_shared,
    modulate,
)


class StreamSpec(NamedTuple):
    """Stream of one field.

    Attributes:
        width: channels of the hidden states.
        vocabulary: vocabulary of a field of tokens; None for vectors.
        dim: numbers per vector of a field of vectors; None for tokens.
        grid: rows and columns of an image whose positions are numbered row by row; None for a
            sequence.
        learned_positions: number of positions that have a learned vector, added to the embedding;
            0: positions enter the attention only, as differences. If all states of a field are
            masked, differences do not tell the first position from the last one.
    """

    width: int
    vocabulary: Vocabulary | None = None
    dim: int | None = None
    grid: tuple[int, int] | None = None
    learned_positions: int = 0


class StreamKeys(ComponentConfig):
    """Settings of the stream of one field."""

    width: PositiveInt
    """Channels of the hidden states of this field."""


class MMDiT(JointBackbone):
    """Multimodal diffusion transformer: noisy states of all fields -> hidden states by field.

    A stream is modulated by the times of its positions and, in a linear embedding, by the mean
    time of every other field. If a field has blocks, streams are not modulated by the times of
    other fields: later blocks have other times in sampling than in training.

    Args:
        streams: stream of every field, by name.
        layers: number of blocks.
        heads: number of attention heads, the same in all streams.
        head_width: channels of an attention head.
        time: condition the network on the times.
        qk_norm: normalize queries and keys.
        dropout: dropout probability after attention and after the MLP.
        conditions: conditions of a sample by name: labels or vectors.
        condition_width: width of the embeddings of times and conditions.
    """

    class Config(ComponentConfig):
        """Settings of the backbone; explicit `width`, `layers` and `heads` override `size`."""

        size: Size = "tiny"
        """Width x layers: tiny 512 x 8, small 768 x 12, base 1024 x 24, 1B 2048 x 24."""
        width: PositiveInt | None = None
        """Channels of the hidden states of every field."""
        layers: Layers | None = None
        """Number of blocks."""
        heads: PositiveInt | None = None
        """Number of attention heads, the same for all fields; width / 64 by default."""
        head_width: PositiveInt | None = None
        """Channels of an attention head; width / heads by default."""
        qk_norm: bool = False
        """Normalize queries and keys, which keeps the training of large networks stable."""
        time: bool = True
        """Condition every field on its time and on the times of the other fields."""
        positions: Literal["relative", "learned"] = "relative"
        """Positions of the network's inputs.

        "relative": differences of positions, in the attention. "learned": also one learned vector
        per position, which helps short texts and images."""
        dropout: Probability = 0.0
        """Dropout probability after attention and after the MLP."""
        condition_width: PositiveInt = CONDITION_WIDTH
        """Width of the embeddings of times, from which the modulation is computed."""
        streams: dict[str, StreamKeys] = Field(default_factory=dict)
        """Settings of single fields by name: {width = 128}."""

    @classmethod
    def build(cls, config: Config, *, streams: Mapping[str, StreamShape]) -> MMDiT:
        """Build the backbone that the settings of a recipe describe."""
        for name in config.streams:
            if name not in streams:
                raise ArgumentError(
                    f'streams must have names of fields; got "{name}". '
                    f"Fields: {', '.join(streams)}."
                )
        width, layers = SIZES[config.size]
        width = config.width or width
        heads = config.heads or max(1, width // HEAD_WIDTH)
        specs = {}
        for name, shape in streams.items():
            own_width = config.streams[name].width if name in config.streams else width
            learned = shape.positions if config.positions == "learned" else 0
            specs[name] = StreamSpec(own_width, shape.vocabulary, shape.dim, shape.grid, learned)
        if config.head_width is None and width % heads:
            raise ArgumentError(
                f"width must be a multiple of heads; got width {width} and heads {heads}. Take "
                f"heads = width / {HEAD_WIDTH}, or set head_width."
            )
        return cls(
            specs,
            layers=config.layers or layers,
            heads=heads,
            head_width=config.head_width or width // heads,
            time=config.time,
            qk_norm=config.qk_norm,
            dropout=config.dropout,
            condition_width=config.condition_width,
        )

    def __init__(
        self,
        streams: Mapping[str, StreamSpec],
        layers: int,
        heads: int,
        head_width: int,
        time: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        conditions: Mapping[str, Condition] = {},
        condition_width: int = CONDITION_WIDTH,
    ) -> None:
        super().__init__()
        _check_streams(streams, head_width)
        _check_conditions(conditions)
        self.widths = {name: stream.width for name, stream in streams.items()}
        self.head_width = head_width
        self.reads_time = time
        self.condition_dropout = {name: condition.dropout for name, condition in conditions.items()}
        self.streams = nn.ModuleDict()
        for name, stream in streams.items():
            others = [other for other in streams if other != name] if time else []
            self.streams[name] = Stream(stream, time, conditions, others, condition_width)
        self.blocks = nn.ModuleList(
            JointBlock(self.widths, heads, head_width, qk_norm, dropout) for _ in range(layers)
        )

    def forward(
        self, streams: Mapping[str, StreamInput], mask: JointMask, context: JointContext
    ) -> dict[str, Tensor]:
        has_blocks = mask.facts is not None and mask.facts.block is not None
        times = {} if has_blocks else {name: _mean_time(one) for name, one in streams.items()}
        hidden = {}
        shared = {}
        rotations = {}
        for name, inputs in streams.items():
            stream = self._stream(name)
            x = stream.embed(inputs.states, inputs.position)
            hidden[name] = x
            shared[name] = stream.modulate(inputs.t, times, context.conditions, x.dtype)
            rotations[name] = Rotation(x, self.head_width, stream.positions(inputs.position))
        # Mask, rotations and shared modulations are the same in every block: computed once.
        seen = mask.kernel_mask(next(iter(hidden.values())), self.head_width)
        for block in self.blocks:
            hidden = block(hidden, shared, rotations, seen)
        return {name: self._stream(name).finish(x, shared[name]) for name, x in hidden.items()}

    def _stream(self, name: str) -> Stream:
        return self.streams[name]  # type: ignore[return-value]


class Stream(nn.Module):
    """Embedding, modulation and final norm of one field.

    Args:
        spec: widths and kind of the field.
        time: condition the stream on times.
        conditions: conditions of a sample by name.
        others: names of the other fields whose times modulate this stream.
        condition_width: width of the embeddings of times and conditions.
    """

    def __init__(
        self,
        spec: StreamSpec,
        time: bool,
        conditions: Mapping[str, Condition],
        others: list[str],
        condition_width: int,
    ) -> None:
        super().__init__()
        self.grid = spec.grid
        self.others = others
        if spec.vocabulary is not None:
            self.embedding: nn.Module = StateEmbedding(spec.vocabulary, spec.width)
        else:
            assert spec.dim is not None
            self.embedding = VectorEmbedding(spec.dim, spec.width)
        self.position_embedding = None
        if spec.learned_positions:
            self.position_embedding = nn.Embedding(spec.learned_positions, spec.width)
            nn.init.zeros_(self.position_embedding.weight)
        embedded = dict(conditions)
        for other in others:
            embedded[time_name(other)] = Condition(width=TIME_FEATURES, dropout=0.0)
        self.modulation = None
        if time or embedded:
            self.modulation = Modulation(spec.width, time, embedded, condition_width)
        # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
        self.out_modulation = nn.Parameter(torch.zeros(2, 1, spec.width))

    def embed(self, states: Tensor, position: Tensor) -> Tensor:
        """Return hidden states [B,m,width] of tokens [B,m] or vectors [B,m,d] at positions [m]."""
        x = self.embedding(states)
        if self.position_embedding is None:
            return x
        return x + self.position_embedding(position).to(x.dtype)

    def positions(self, position: Tensor) -> Tensor:
        """Return the positions [m] of a sequence, or rows and columns [m,2] of an image."""
        if self.grid is None:
            return position
        columns = self.grid[1]
        return torch.stack([position // columns, position % columns], -1)

    def modulate(
        self,
        t: Tensor,
        times: Mapping[str, Tensor],
        conditions: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> ModulationVectors | None:
        """Return the modulation vectors [B,m or 1,width] that all blocks share.

        `t` [B,m] are the times of the inputs, and `times` the mean times [B] by field.
        """
        if self.modulation is None:
            return None
        values = dict(conditions)
        for other in self.others:
            if other in times:
                values[time_name(other)] = self.modulation.embed_time(times[other], dtype)
        return self.modulation(t, values, dtype)

    def finish(self, x: Tensor, shared: ModulationVectors | None) -> Tensor:
        """Apply the final norm to hidden states x [B,m,width]."""
        shift, scale = add_shared(self.out_modulation, None if shared is None else shared[6:])
        return modulate(x, shift, scale)


class VectorEmbedding(nn.Linear):
    """Linear embedding of vectors [...,d], in the dtype of its weight."""

    def forward(self, vectors: Tensor) -> Tensor:
        return super().forward(vectors.to(self.weight.dtype))


class JointBlock(nn.Module):
    """Transformer block of several streams with one attention over all their inputs."""

    def __init__(
        self,
        widths: Mapping[str, int],
        heads: int,
        head_width: int,
        qk_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.streams = nn.ModuleDict(
            {
                name: Block(width, heads, dropout, head_width, qk_norm)
                for name, width in widths.items()
            }
        )

    def forward(
        self,
        hidden: Mapping[str, Tensor],
        shared: Mapping[str, ModulationVectors | None],
        rotations: Mapping[str, Rotation],
        seen: AttentionMask,
    ) -> dict[str, Tensor]:
        vectors = {}
        projected = []
        for name, x in hidden.items():
            block = self._block(name)
            vectors[name] = block.modulate_by(shared[name])
            projected.append(block.project(x, vectors[name], rotations[name]))
        q, k, v = (torch.cat(parts, 2) for parts in zip(*projected, strict=True))
        sizes = [x.shape[1] for x in hidden.values()]
        attended = attend(q, k, v, seen).split(sizes, 2)
        combined = {}
        for (name, x), own in zip(hidden.items(), attended, strict=True):
            combined[name] = self._block(name).combine(x, own, vectors[name])
        return combined

    def _block(self, name: str) -> Block:
        return self.streams[name]  # type: ignore[return-value]


def time_name(field: str) -> str:
    """Return the name of the condition that is the time of a field."""
    return f"{field}_time"


def _mean_time(inputs: StreamInput) -> Tensor:
    """Return the mean time [B] of the valid positions of a field; NaN for samples without it."""
    mean = inputs.t.mean(1)
    if inputs.valid is not None:
        # Padding has the time 0 in training, so only valid positions count.
        times = inputs.t * inputs.valid
        mean = times.sum(1) / inputs.valid.sum(1).clamp(min=1)
    if inputs.absent is None:
        return mean
    return mean.masked_fill(inputs.absent, torch.nan)


def _check_conditions(conditions: Mapping[str, Condition]) -> None:
    for name, condition in conditions.items():
        if condition.via != "adaln":
            raise ArgumentError(
                f'MMDiT: the condition "{name}" must have via = "adaln"; got "{condition.via}". '
                "Every stream attends to all others, so make the condition a field of the sample "
                "to attend to it."
            )


def _check_streams(streams: Mapping[str, StreamSpec], head_width: int) -> None:
    taken = dir(nn.ModuleDict)
    for name, stream in streams.items():
        if not name or "." in name or name in taken:
            raise ArgumentError(
                "MMDiT: the name of a stream must not be empty, have dots or be an attribute of "
                f"torch modules; got {name!r}. Rename the field, for example text"
            )
        if (stream.vocabulary is None) == (stream.dim is None):
            raise ArgumentError(
                f'MMDiT: the stream "{name}" must have exactly one of a vocabulary (tokens) and '
                f"dim (vectors); got {stream}."
            )
        axes = 1 if stream.grid is None else 2
        if head_width % (2 * axes):
            raise ArgumentError(
                f'MMDiT: head_width must be a multiple of {2 * axes} for the stream "{name}", '
                f"since rotary positions rotate pairs of channels; got {head_width}."
            )
