"""Diffusion transformer (DiT, arXiv 2212.09748) as a backbone.

Pre-norm blocks with adaLN-zero modulation, rotary positions and full attention. Unlike in the
original DiT, one network computes the modulation vectors (shift, scale and gate) from noise times
and conditions for all blocks, and every block adds learned vectors to them (arXiv 2310.00426).
Since every position may have a separate noise time, a modulation network per block would cost a
matrix product over all positions in every block.

Shapes: B sequences, L positions, `width` channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ddiff import (
    ArgumentError,
    AttentionMask,
    Backbone,
    ComponentConfig,
    Context,
    Label,
    Neighbours,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    StateEmbedding,
    Vector,
    Vocabulary,
    attend,
)

Size = Literal["tiny", "small", "base", "1B"]
SIZES: dict[str, tuple[int, int]] = {  # width, layers
    "tiny": (512, 8),
    "small": (768, 12),
    "base": (1024, 24),
    "1B": (2048, 24),
}
HEAD_WIDTH = 64  # channels of an attention head by default
TIME_FEATURES = 64  # cosines and sines of 32 frequencies
CONDITION_WIDTH = 128  # width of the embeddings of time and conditions by default
CONVOLUTION_STD = 0.3  # of the first weights of convolutions by default
ROTARY_BASE = 10_000.0

Layers = Annotated[int, Field(gt=0, le=4096)]
Via = Literal["adaln", "cross", "tokens"]

# Shifts, scales and gates, each [B,L or 1,width].
ModulationVectors = tuple[Tensor, ...]
# Prepends the cached keys and values of a layer: (k, v) -> (k, v) of all columns so far.
ExtendCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Condition(ComponentConfig):
    """Settings of one condition of the network: a label or a vector, per sample or per position."""

    classes: PositiveInt | None = None
    """Number of labels, for a condition that is a label."""
    width: PositiveInt | None = None
    """Length of the vector, for a condition that is a vector."""
    dropout: Probability = 0.1
    """Fraction of training samples without the condition; guidance needs dropout above 0."""
    via: Via = "adaln"
    """Where the condition enters: modulation ("adaln"), cross-attention, or input tokens."""
    count: PositiveInt = 1
    """Number of vectors of `width` numbers; the value is one list of count * width numbers."""

    @model_validator(mode="after")
    def _check_count(self) -> Condition:
        if self.count > 1 and (self.width is None or self.via == "adaln"):
            raise ValueError(
                'a condition with count above 1 must be of vectors (width) and have via = "cross" '
                f'or "tokens"; got count = {self.count}, width = {self.width} and via = '
                f'"{self.via}". With via = "adaln", set width to the length of the whole list'
            )
        return self

    @model_validator(mode="after")
    def _check_one_form(self) -> Condition:
        if (self.classes is None) == (self.width is None):
            raise ValueError(
                "a condition must have exactly one of classes (labels) and width (vectors); "
                f"got classes = {self.classes} and width = {self.width}"
            )
        return self

    @property
    def form(self) -> Label | Vector:
        if self.width is None:
            return Label(self.classes)
        return Vector(self.count * self.width)


class DiT(Backbone):
    """Diffusion transformer: state ids [B,L] and times t [B,L] -> hidden states [B,L,width].

    A state is a token, the mask, or on a tree a node of any level. With `time=False` the hidden
    states do not depend on t. If a condition is absent (label -1, vector NaN, or not in the
    context), a learned vector replaces its embedding. The key `via` of a condition selects where
    its embedding enters:

    - "adaln": it is added to the embedding of t, which modulates every block.
    - "cross": every position attends to it in every block (see `CrossAttention`).
    - "tokens": it is prepended to the sequence as clean inputs at the positions -1, -2, ... All
      inputs may attend to them, and they attend only to each other. All conditions must then have
      one value per sequence, and a sequence must be one document.

    Raises ArgumentError if width is not a multiple of 2 * heads.
    """

    caches = True

    class Config(ComponentConfig):
        """Settings of the backbone; explicit `width`, `layers` and `heads` override `size`."""

        size: Size = "tiny"
        """Width x layers: tiny 512 x 8, small 768 x 12, base 1024 x 24, 1B 2048 x 24."""
        width: PositiveInt | None = None
        """Channels of the hidden states."""
        layers: Layers | None = None
        """Number of blocks."""
        heads: PositiveInt | None = None
        """Number of attention heads; width / 64 by default."""
        time: bool = True
        """Condition the network on the noise time t."""
        dropout: Probability = 0.0
        """Dropout probability after attention and after the MLP."""
        conditions: dict[str, Condition] = Field(default_factory=dict)
        """Conditions of the network by name: labels or vectors."""
        condition_width: PositiveInt = CONDITION_WIDTH
        """Width of the embeddings of time and conditions, from which the modulation is computed."""
        cross_every: PositiveInt = 1
        """Blocks 1, 1 + n, 1 + 2 n, ... attend to the conditions with via = "cross"."""
        qk_norm: bool = False
        """Normalize queries and keys by their root mean square."""
        convolution: NonNegativeInt = 0
        """Taps of the convolutions over positions before attention and MLP; odd, or 0 for none."""
        convolution_std: NonNegativeFloat = CONVOLUTION_STD
        """Standard deviation of the first weights of the convolutions."""

        @field_validator("convolution")
        @classmethod
        def _check_convolution(cls, convolution: int) -> int:
            if convolution and convolution % 2 == 0:
                raise ValueError(
                    "convolution must be odd, so that as many taps are before a position as after "
                    f"it, or 0 for no convolution; got {convolution}. Take {convolution + 1}"
                )
            return convolution

        @field_validator("conditions")
        @classmethod
        def _check_names(cls, conditions: dict[str, Condition]) -> dict[str, Condition]:
            # The embedding of a condition is a submodule with the name of the condition. Torch
            # refuses names with dots and names of attributes of its modules.
            taken = dir(nn.ModuleDict)
            for name in conditions:
                if not name or "." in name or name in taken:
                    raise ValueError(
                        "the name of a condition must not be empty, contain a dot or be the name "
                        "of an attribute of torch.nn.ModuleDict; "
                        f"got {name!r}. Rename the condition, for example to author"
                    )
            return conditions

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, length: int) -> DiT:
        """Build the backbone that the settings of a recipe describe.

        `length`, the number of positions, is not used: rotary positions work for any length.
        """
        width, layers = SIZES[config.size]
        width = config.width or width
        return cls(
            vocabulary,
            width,
            layers=config.layers or layers,
            heads=config.heads or max(1, width // HEAD_WIDTH),
            time=config.time,
            dropout=config.dropout,
            conditions=config.conditions,
            condition_width=config.condition_width,
            cross_every=config.cross_every,
            qk_norm=config.qk_norm,
            convolution=config.convolution,
            convolution_std=config.convolution_std,
        )

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        layers: int,
        heads: int,
        time: bool = True,
        dropout: float = 0.0,
        conditions: Mapping[str, Condition] = {},
        condition_width: int = CONDITION_WIDTH,
        cross_every: int = 1,
        qk_norm: bool = False,
        convolution: int = 0,
        convolution_std: float = CONVOLUTION_STD,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ArgumentError(
                "DiT: width must be a multiple of 2 * heads, since rotary positions rotate pairs "
                f"of channels; got width {width} and heads {heads}. "
                f"Take e.g. heads = width / {HEAD_WIDTH}."
            )
        self.width = width
        self.head_width = width // heads
        self.embedding = StateEmbedding(vocabulary, width)
        self.reads_time = time
        self.condition_dropout = {name: condition.dropout for name, condition in conditions.items()}
        self.condition_forms = {name: condition.form for name, condition in conditions.items()}
        adaln = _select_via(conditions, "adaln")
        cross = _select_via(conditions, "cross")
        tokens = _select_via(conditions, "tokens")
        self.modulation = None
        if time or adaln:
            self.modulation = Modulation(width, time, adaln, condition_width)
        self.blocks = nn.ModuleList()
        for layer in range(layers):
            block = Block(
                width,
                heads,
                dropout,
                qk_norm=qk_norm,
                has_cross=bool(cross) and layer % cross_every == 0,
                convolution=convolution,
                convolution_std=convolution_std,
            )
            self.blocks.append(block)
        self.convolution = convolution
        self.cross = ConditionSequence(cross, width) if cross else None
        self.tokens = ConditionSequence(tokens, width) if tokens else None
        self.reads_packed_rows = not tokens
        # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
        self.out_modulation = nn.Parameter(torch.zeros(2, 1, width))

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        self._check_conditions(context)
        x = self.embedding(ids)
        positions = context.positions(ids.shape[1], ids.device)
        num_tokens = 0
        if self.tokens is not None:
            tokens = self.tokens(context.conditions, len(ids), x.dtype).squeeze(1)
            num_tokens = tokens.shape[1]
            x = torch.cat([tokens, x], 1)
            # Condition tokens are clean, so their time is 0.
            t = torch.cat([t.new_zeros(len(t), num_tokens), t], 1)
            before = torch.arange(-num_tokens, 0, device=positions.device)
            positions = torch.cat([before, positions])
        # Mask, rotation, neighbours, shared modulation and the vectors of cross-attention are the
        # same in every block: computed once.
        seen = context.kernel_mask(x, self.head_width, num_tokens)
        rotation = Rotation(x, self.head_width, positions)
        shared = None
        if self.modulation is not None:
            shared = self.modulation(t, context.conditions, x.dtype)
        neighbours = None
        if self.convolution:
            neighbours = context.neighbours(x, self.convolution, num_tokens)
        vectors = None
        if self.cross is not None:
            vectors = self.cross(context.conditions, len(ids), x.dtype)
        for layer, block in enumerate(self.blocks):
            extend = None
            if context.cache is not None:
                extend = partial(_extend_after, num_tokens, partial(context.cache.update, layer))
            own = None if neighbours is None else neighbours.in_layer(layer)
            x = block(x, shared, rotation, seen, extend, vectors, own)
        # Vectors 0 to 5 are for the blocks, 6 and 7 for the final norm.
        shift, scale = add_shared(self.out_modulation, None if shared is None else shared[6:])
        return modulate(x, shift, scale)[:, num_tokens:]

    def _check_conditions(self, context: Context) -> None:
        known = sorted(self.condition_dropout)
        unknown = sorted(set(context.conditions) - set(known))
        if unknown:
            raise ArgumentError(
                "DiT: context.conditions must be among the conditions of this backbone, "
                f"{known or 'none'}; got {unknown}. "
                "Add these names to [denoiser] conditions, or remove them from the batch."
            )
        if self.tokens is None:
            return
        per_position = [
            name for name, value in context.conditions.items() if _is_per_position(value)
        ]
        if context.document is not None or per_position:
            raise ArgumentError(
                'DiT: with a condition of via = "tokens", a row must hold one document, and every '
                "condition one value per row; got rows of several documents (packed), or values "
                f"per position of {per_position or 'no condition'}. Set [denoiser] "
                f'conditions.{next(iter(self.tokens))}.via = "cross": each position then attends '
                "to the condition of the document that contains it."
            )


class Block(nn.Module):
    """Transformer block: x + gate * attention(norm(x)), then x + gate * MLP(norm(x)).

    The norms are modulated by a shift and a scale. Gates are zero at initialization, so that the
    block starts as the identity.

    A block of several streams calls `project` of every stream, attends once over all inputs, and
    calls `combine` of every stream.

    Args:
        width: channels of the hidden states.
        heads: number of attention heads.
        dropout: dropout probability after attention and after the MLP.
        head_width: channels of an attention head; width / heads by default.
        qk_norm: normalize queries and keys by their root mean square before the rotation.
        has_cross: attend to conditions after the attention and before the MLP.
        convolution: taps of the convolutions over positions, one on the inputs of the attention
            and one on those of the MLP; 0: none.
        convolution_std: standard deviation of the first weights of the convolutions.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        head_width: int | None = None,
        qk_norm: bool = False,
        has_cross: bool = False,
        convolution: int = 0,
        convolution_std: float = CONVOLUTION_STD,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = head_width or width // heads
        inner = self.heads * self.head_width
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.attended = nn.Linear(inner, width, bias=False)
        self.query_norm = nn.RMSNorm(self.head_width) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_width) if qk_norm else None
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
        self.modulation = nn.Parameter(torch.zeros(6, 1, width))
        for linear in (self.qkv, self.attended, self.up, self.down):
            # Variance 1 / inputs keeps the scale of normalized activations.
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.up, self.down):
            nn.init.zeros_(linear.bias)
        self.cross = CrossAttention(width, heads, self.head_width) if has_cross else None
        self.attention_convolution = None
        self.mlp_convolution = None
        if convolution:
            self.attention_convolution = Convolution(width, convolution, convolution_std, number=0)
            self.mlp_convolution = Convolution(width, convolution, convolution_std, number=1)

    def forward(
        self,
        x: Tensor,
        shared: ModulationVectors | None,
        rotation: Rotation,
        seen: AttentionMask,
        extend: ExtendCache | None,
        conditions: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> Tensor:
        vectors = self.modulate_by(shared)
        q, k, v = self.project(x, vectors, rotation, neighbours)
        if extend is not None:
            # Keys are cached after the rotation: their positions do not change any more.
            k, v = extend(k, v)
        return self.combine(x, attend(q, k, v, seen), vectors, conditions, neighbours)

    def modulate_by(self, shared: ModulationVectors | None) -> ModulationVectors:
        """Return the six modulation vectors of this block, with the shared ones added."""
        return add_shared(self.modulation, None if shared is None else shared[:6])

    def project(
        self,
        x: Tensor,
        vectors: ModulationVectors,
        rotation: Rotation,
        neighbours: Neighbours | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B,heads,L,head width] of hidden states x [B,L,width].

        A block with convolutions needs the `neighbours` of the inputs.
        """
        shift, scale = vectors[:2]
        h = modulate(x, shift, scale)
        if self.attention_convolution is not None:
            assert neighbours is not None
            h = self.attention_convolution(h, neighbours)
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, self.head_width))
        # Queries and keys are rotated together, in one operation. Values are not rotated.
        qk, v = qkv.split([2, 1], 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = qk.unbind(2)
            qk = torch.stack([self.query_norm(q), self.key_norm(k)], 2)
        q, k = rotation(qk).transpose(1, 3).unbind(2)
        return q, k, v.squeeze(2).transpose(1, 2)

    def combine(
        self,
        x: Tensor,
        attended: Tensor,
        vectors: ModulationVectors,
        conditions: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> Tensor:
        """Add the result of attention [B,heads,L,head width] to x, then the MLP.

        In a block with `has_cross`, the positions attend to the vectors `conditions` between both.
        A block with convolutions needs the `neighbours` of the inputs.
        """
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        out = self.attended(attended.transpose(1, 2).flatten(2))
        x = torch.addcmul(x, gate, self.dropout(out))
        if self.cross is not None:
            assert conditions is not None
            x = x + self.dropout(self.cross(x, conditions))
        h = modulate(x, mlp_shift, mlp_scale)
        if self.mlp_convolution is not None:
            assert neighbours is not None
            h = self.mlp_convolution(h, neighbours)
        hidden = F.gelu(self.up(h), approximate="tanh")
        return torch.addcmul(x, mlp_gate, self.dropout(self.down(hidden)))


class Convolution(nn.Module):
    """Residual depthwise convolution over positions: h -> h + convolution(h), without a bias.

    A tap reads an input only if attention may read it (see `ddiff.Neighbours`).

    Args:
        width: channels of h; each has a separate weight per tap.
        taps: odd number of taps; the middle tap reads the input itself.
        std: standard deviation of the first weights.
        number: number of the convolution in its block.
    """

    def __init__(self, width: int, taps: int, std: float, number: int) -> None:
        super().__init__()
        self.number = number
        # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
        self.weight = nn.Parameter(torch.empty(taps, 1, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, h: Tensor, neighbours: Neighbours) -> Tensor:
        return neighbours.convolve(h, self.weight.squeeze(1), self.number)


class CrossAttention(nn.Module):
    """Attention of every position to the vectors of its conditions (arXiv 2310.00426).

    x [B,L,width] attends to vectors [B,1 or L,Z,width] and to one learned null key. The null key
    has the value 0, so a position that attends to it takes nothing from the conditions. Without
    the null key, a single vector would have the attention weight 1 at every position: its effect
    would be the same at all positions, and attention could not switch it off.

    The output matrix is zero at initialization. The vectors have no order and no rotary positions.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
        self.null_key = nn.Parameter(torch.zeros(1, heads, head_width))
        for linear in (self.query, self.key_value):
            # Variance 1 / inputs keeps the scale of normalized activations.
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        head_shape = (self.heads, -1)
        query = self.query(F.layer_norm(x, x.shape[-1:])).unflatten(-1, head_shape)
        key, value = self.key_value(vectors).chunk(2, -1)
        key = key.unflatten(-1, head_shape)
        null_key = self.null_key.to(key.dtype).expand(*key.shape[:2], -1, -1, -1)
        key = torch.cat([null_key, key], 2)
        # Dimension l of keys and values is 1 if all positions share the vectors; it broadcasts.
        logits = torch.einsum("blhw,blzhw->blhz", query, key) * query.shape[-1] ** -0.5
        # The value of the null key is 0, so only its weight is computed.
        weights = logits.softmax(-1)[..., 1:].to(value.dtype)
        out = torch.einsum("blhz,blzhw->blhw", weights, value.unflatten(-1, head_shape))
        return self.out(out.flatten(2))


class Modulation(nn.Module):
    """Modulation network: noise times [B,L] and conditions -> eight vectors [B,L or 1,width].

    All blocks share the first six vectors: shift, scale and gate of the attention, then those of
    the MLP. The last two are shift and scale of the final norm. A noise time is embedded as sines
    and cosines at 32 frequencies from 1 to 256 radians per unit of t, followed by an MLP of width
    `condition_width`. The embeddings of conditions are added (see `ConditionEmbedding`), and a
    linear map that is zero at initialization makes the vectors from the sum.
    """

    def __init__(
        self,
        width: int,
        time: bool,
        conditions: Mapping[str, Condition],
        condition_width: int = CONDITION_WIDTH,
    ) -> None:
        super().__init__()
        self.mlp = None
        if time:
            self.mlp = nn.Sequential(
                nn.Linear(TIME_FEATURES, condition_width),
                nn.SiLU(),
                nn.Linear(condition_width, condition_width),
                nn.SiLU(),
            )
        self.conditions = nn.ModuleDict()
        for name, condition in conditions.items():
            self.conditions[name] = ConditionEmbedding(name, condition, condition_width)
        self.out = Channels(condition_width, 8 * width)

    def forward(
        self, t: Tensor, conditions: Mapping[str, Tensor], dtype: torch.dtype
    ) -> ModulationVectors:
        features = []
        if self.mlp is not None:
            features.append(self.mlp(self.embed_time(t, dtype)))
        for name, embedding in self.conditions.items():
            features.append(embedding(conditions.get(name), t.shape, dtype))
        # The sum starts at the first tensor: `sum` would start at the integer 0.
        return self.out(sum(features[1:], features[0])).chunk(8, -1)

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        # At least float32: in bfloat16 an angle of 256 radians has an error of half a radian.
        angle_dtype = torch.promote_types(dtype, torch.float32)
        # Not a buffer, which would be rounded if the network is loaded in bfloat16.
        exponents = torch.linspace(0, 8, TIME_FEATURES // 2, dtype=torch.float32, device=t.device)
        angle = t.to(angle_dtype).unsqueeze(-1) * 2.0**exponents
        return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)


class ConditionEmbedding(nn.Module):
    """Embedding [B,L or 1,width] of one condition.

    A label selects a row of a table, and a vector is mapped linearly. A learned vector is the
    embedding of an absent condition.
    """

    def __init__(self, name: str, condition: Condition, width: int) -> None:
        super().__init__()
        self.name = name
        self.table = None
        self.matrix = None
        if condition.classes is not None:
            self.table = nn.Embedding(condition.classes, width)
        if condition.width is not None:
            self.matrix = nn.Linear(condition.width, width)
        self.absent = nn.Parameter(torch.zeros(width))

    def forward(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if value is None:
            return self.absent.to(dtype).expand(shape[0], 1, -1)
        if self.table is not None:
            is_present, embedded = self._embed_label(value)
        else:
            is_present, embedded = self._embed_vector(value, dtype)
        embedded = torch.where(is_present.unsqueeze(-1), embedded, self.absent).to(dtype)
        # A condition of a whole sample is [B,width]; the new dimension broadcasts over positions.
        return embedded if embedded.dim() == 3 else embedded.unsqueeze(1)

    def _embed_label(self, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        classes = self.table.num_embeddings
        # Only on the CPU: on a GPU `int(value.max())` would make the host wait for the GPU.
        if value.device.type == "cpu" and int(value.max()) >= classes:
            raise ArgumentError(
                f'DiT: a label of the condition "{self.name}" must be below its {classes} classes '
                f"([denoiser] conditions.{self.name}.classes); got {int(value.max())}. "
                "Labels are integers from 0; -1 means that the label is absent."
            )
        # Absent labels select row 0, which the caller replaces by the learned vector.
        return value >= 0, self.table(value.clamp(min=0))

    def _embed_vector(self, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.matrix is not None
        # NaN is replaced before the product, else it would reach the gradient of the matrix.
        return ~value.isnan().any(-1), self.matrix(value.nan_to_num(0.0).to(dtype))


class ConditionVectors(ConditionEmbedding):
    """Embedding [B,L or 1,count,width] of one condition, as a set of vectors.

    A label is one vector. A learned vector replaces each vector that is absent. If there are
    several vectors, each has a learned embedding of its number added.
    """

    def __init__(self, name: str, condition: Condition, width: int) -> None:
        super().__init__(name, condition, width)
        self.count = condition.count
        self.number = None
        if self.count > 1:
            # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
            self.number = nn.Parameter(torch.zeros(1, self.count, width))

    def forward(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if value is None:
            vectors = self.absent.expand(shape[0], 1, self.count, -1)
        else:
            if self.table is not None:
                is_present, embedded = self._embed_label(value.unsqueeze(-1))
            else:
                each = value.unflatten(-1, (self.count, -1))
                is_present, embedded = self._embed_vector(each, dtype)
            vectors = torch.where(is_present.unsqueeze(-1), embedded, self.absent)
            if vectors.dim() == 3:
                # One set of vectors per sample; the new dimension broadcasts over positions.
                vectors = vectors.unsqueeze(1)
        if self.number is not None:
            vectors = vectors + self.number
        return vectors.to(dtype)


class ConditionSequence(nn.ModuleDict):
    """Embeddings of several conditions, concatenated: [B,L or 1,Z,width] with Z vectors."""

    def __init__(self, conditions: Mapping[str, Condition], width: int) -> None:
        super().__init__({name: ConditionVectors(name, c, width) for name, c in conditions.items()})

    def forward(self, values: Mapping[str, Tensor], batch: int, dtype: torch.dtype) -> Tensor:
        vectors = [one(values.get(name), torch.Size([batch]), dtype) for name, one in self.items()]
        groups = max(part.shape[1] for part in vectors)
        return torch.cat([part.expand(-1, groups, -1, -1) for part in vectors], 2)


class Channels(nn.Linear):
    """Linear map to modulation vectors, initialized to zero and trained by AdamW, not Muon."""

    # AdamW instead of Muon trains the matrix: its rows are independent channels.
    is_table = True

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Rotation:
    """Rotary position embedding (arXiv 2104.09864) of queries or keys [B,L,...,w].

    Channels i and i + w/2 of the w channels are rotated by the angle position * base^(-2i/w), where
    base is 10,000. The product of a rotated query and a rotated key depends only on the difference
    of their positions. Positions therefore need not restart at 0 in every packed document.

    Args:
        x: a tensor with the device and dtype of the queries.
        width: number w of channels of a query.
        positions: [L] position numbers, or [L,axes] for several axes, such as the rows and columns
            of an image. Each axis then rotates an equal part of the channel pairs.
    """

    def __init__(self, x: Tensor, width: int, positions: Tensor) -> None:
        # At least float32: in bfloat16 an angle of 500 radians has an error of up to 1 radian.
        dtype = torch.promote_types(x.dtype, torch.float32)
        axes = 1 if positions.dim() == 1 else positions.shape[1]
        pair = torch.arange(0, width // axes, 2, device=x.device, dtype=dtype)
        frequency = torch.exp(pair * (-math.log(ROTARY_BASE) / (width // axes)))
        angle = positions.to(dtype).unsqueeze(-1) * frequency
        if axes > 1:
            angle = angle.flatten(1)
        # `roll` in __call__ swaps the halves a and b of the channels. With these signs the result
        # is the rotation (a, b) -> (a cos - b sin, b cos + a sin).
        self.cos = torch.cat([angle.cos(), angle.cos()], -1).to(x.dtype)
        self.sin = torch.cat([-angle.sin(), angle.sin()], -1).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        # Dimensions between positions and channels (q or k, heads) share the angles.
        broadcast = (1,) * (x.dim() - 3)
        shape = (x.shape[1], *broadcast, x.shape[-1])
        cos = self.cos.to(x.dtype).view(shape)
        sin = self.sin.to(x.dtype).view(shape)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift, where norm is a layer norm without parameters."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


def add_shared(own: Tensor, shared: ModulationVectors | None) -> ModulationVectors:
    """Return the n modulation vectors of a block: its own `own` [n,1,width] plus the shared ones.

    `shared` is None if there is no modulation network.
    """
    if shared is None:
        return own.unbind()
    return tuple(vector + common for vector, common in zip(own, shared))


def _select_via(conditions: Mapping[str, Condition], via: Via) -> dict[str, Condition]:
    return {name: condition for name, condition in conditions.items() if condition.via == via}


def _is_per_position(value: Tensor) -> bool:
    """Return whether a condition is [B,L] labels or [B,L,d] vectors, one per position."""
    return value.dim() == (3 if value.is_floating_point() else 2)


def _extend_after(
    num_tokens: int, extend: ExtendCache, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Insert cached keys and values after the first `num_tokens` inputs, the condition tokens.

    Condition tokens are not cached: they are few, and are run again in every pass.
    """
    if not num_tokens:
        return extend(k, v)
    extended_k, extended_v = extend(k[:, :, num_tokens:], v[:, :, num_tokens:])
    k = torch.cat([k[:, :, :num_tokens], extended_k], 2)
    v = torch.cat([v[:, :, :num_tokens], extended_v], 2)
    return k, v
