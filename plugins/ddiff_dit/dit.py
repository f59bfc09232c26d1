"""A diffusion transformer (arXiv 2212.09748): pre-norm blocks, adaLN-zero, rotary positions, full attention.

One network maps times to a modulation that all blocks share, and each block adds six vectors of its own
(arXiv 2310.00426): a time per position then costs one matrix product per pass and not one per block.
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
    ComponentConfig,
    Context,
    Label,
    PositiveInt,
    Probability,
    Seen,
    StateEmbedding,
    Vector,
    Vocabulary,
    attend,
)

Size = Literal["tiny", "small", "base", "1B"]
SIZES: dict[str, tuple[int, int]] = {
    "tiny": (512, 8),
    "small": (768, 12),
    "base": (1024, 24),
    "1B": (2048, 24),
}
HEAD_WIDTH = 64
TIME_FEATURES = 64
TIME_WIDTH = 128
ROTARY_BASE = 10_000.0

Layers = Annotated[int, Field(gt=0, le=4096)]

Shared = tuple[Tensor, ...]
Remembered = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Condition(ComponentConfig):
    """A condition of a sample or position: one of `classes` labels, or a vector of `width` numbers."""

    classes: PositiveInt | None = None
    width: PositiveInt | None = None
    dropout: Probability = 0.1
    """The share of training samples from which it is withheld, so that guidance has something to compare with."""

    @model_validator(mode="after")
    def _one_form(self) -> Condition:
        if (self.classes is None) == (self.width is None):
            raise ValueError("a condition has either classes (labels) or width (vectors)")
        return self

    @property
    def form(self) -> Label | Vector:
        return Vector(self.width) if self.classes is None else Label(self.classes)


class DiT(nn.Module):
    """ids [B,L] of any level, times t [B,L] -> hidden states [B,L,width].

    `time=False` leaves t out: the law then depends on the ids alone. Conditions are added where time is: an absent one
    (label -1, vector NaN, or not there at all) adds a learned vector of its own. ArgumentError when the numbers do not
    fit.
    """

    caches = True

    class Config(ComponentConfig):
        """`size` gives width and layers; each explicit number wins over it; heads default to 64 wide."""

        size: Size = "tiny"
        width: PositiveInt | None = None
        layers: Layers | None = None
        heads: PositiveInt | None = None
        time: bool = True
        dropout: Probability = 0.0
        conditions: dict[str, Condition] = Field(default_factory=dict)
        """What the network is told of a sample, by name: labels or vectors."""

        @field_validator("conditions")
        @classmethod
        def _names_of_modules(cls, conditions: dict[str, Condition]) -> dict[str, Condition]:
            """A condition's embedding is a module of that name, and torch takes only some names."""
            taken = dir(nn.ModuleDict)
            for name in conditions:
                if not name or "." in name or name in taken:
                    raise ValueError(
                        f"a condition is named by a word without dots that torch does not use itself; got {name!r}. Rename "
                        "the field, such as author"
                    )
            return conditions

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, length: int) -> DiT:
        """The backbone of a recipe; rotary positions know no longest sequence, so `length` is not needed."""
        width, layers = SIZES[config.size]
        width = config.width or width
        heads = config.heads or max(1, width // HEAD_WIDTH)
        return cls(
            vocabulary,
            width,
            config.layers or layers,
            heads,
            config.time,
            config.dropout,
            config.conditions,
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
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ArgumentError(
                f"DiT: width must be a multiple of 2 * heads, since positions turn pairs of channels; got width "
                f"{width} and heads {heads}. Take e.g. heads = width / {HEAD_WIDTH}."
            )
        self.width, self.head_width = width, width // heads
        self.embedding = StateEmbedding(vocabulary, width)
        self.reads_time = time
        self.condition_dropout = {name: condition.dropout for name, condition in conditions.items()}
        self.condition_forms = {name: condition.form for name, condition in conditions.items()}
        self.modulation = Modulation(width, time, conditions) if time or conditions else None
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.out_modulation = nn.Parameter(torch.zeros(2, 1, width))

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        if unknown := sorted(set(context.conditions) - set(self.condition_dropout)):
            raise ArgumentError(
                f"DiT: context.conditions must be among those that this backbone reads, "
                f"{sorted(self.condition_dropout) or 'none'}; "
                f"got {unknown}. Name them in [denoiser] conditions, or take them out of the batch."
            )
        x = self.embedding(ids)
        seen, positions = (
            context.seen(x, self.head_width),
            context.positions(ids.shape[1], ids.device),
        )
        rotation = Rotation(x, self.head_width, positions)
        shared = self.modulation(t, context.conditions, x.dtype) if self.modulation else None
        for layer, block in enumerate(self.blocks):
            x = block(
                x, shared, rotation, seen, context.cache and partial(context.cache.extended, layer)
            )
        shift, scale = _modulation(self.out_modulation, shared and shared[6:])
        return modulate(x, shift, scale)


class Block(nn.Module):
    """x + gate * attention(norm x), then x + gate * MLP(norm x); gates start at zero, the block as the identity."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Parameter(
            torch.zeros(6, 1, width)
        )  # not two-dimensional: no hidden matrix
        for linear in (self.qkv, self.attended, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.up, self.down):
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        shared: Shared | None,
        rotation: Rotation,
        seen: Seen,
        remembered: Remembered | None,
    ) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = _modulation(
            self.modulation, shared and shared[:6]
        )
        x = torch.addcmul(
            x,
            gate,
            self.dropout(self._attend(modulate(x, shift, scale), rotation, seen, remembered)),
        )
        hidden = F.gelu(self.up(modulate(x, shift2, scale2)), approximate="tanh")
        return torch.addcmul(x, gate2, self.dropout(self.down(hidden)))

    def _attend(
        self, x: Tensor, rotation: Rotation, seen: Seen, remembered: Remembered | None
    ) -> Tensor:
        turned, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).split([2, 1], 2)
        q, k = rotation(turned).transpose(1, 3).unbind(2)
        v = v.squeeze(2).transpose(1, 2)
        if remembered:
            k, v = remembered(k, v)
        return self.attended(attend(q, k, v, seen).transpose(1, 2).flatten(2))


class Modulation(nn.Module):
    """Times [B,L] and conditions -> eight [B,L or 1,width]: six that all blocks share and two for the final norm.

    Time: sines and cosines of 32 frequencies from 1 to 256 radians per unit through an MLP of width 128. A label: a
    row of a table; a vector: a linear map. Their sum goes through a matrix of zeros at first.
    """

    frequencies: Tensor

    def __init__(self, width: int, time: bool, conditions: Mapping[str, Condition]) -> None:
        super().__init__()
        self.mlp = (
            nn.Sequential(
                nn.Linear(TIME_FEATURES, TIME_WIDTH),
                nn.SiLU(),
                nn.Linear(TIME_WIDTH, TIME_WIDTH),
                nn.SiLU(),
            )
            if time
            else None
        )
        self.conditions = nn.ModuleDict(
            {name: ConditionEmbedding(name, c) for name, c in conditions.items()}
        )
        self.out = Channels(TIME_WIDTH, 8 * width)
        self.register_buffer(
            "frequencies", 2.0 ** torch.linspace(0, 8, TIME_FEATURES // 2), persistent=False
        )

    def forward(self, t: Tensor, conditions: Mapping[str, Tensor], dtype: torch.dtype) -> Shared:
        features = [] if self.mlp is None else [self._of_time(t, dtype)]
        for name, embedding in self.conditions.items():
            features.append(embedding(conditions.get(name), t.shape, dtype))
        return self.out(sum(features[1:], features[0])).chunk(8, -1)

    def _of_time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.mlp is not None
        angle = t.to(torch.promote_types(dtype, torch.float32)).unsqueeze(-1) * self.frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))


class ConditionEmbedding(nn.Module):
    """A label (its row of a table) or a vector (a linear map) -> [B,L or 1,128]; a learned vector where it is absent."""

    def __init__(self, name: str, condition: Condition) -> None:
        super().__init__()
        self.name = name
        self.table = (
            None if condition.classes is None else nn.Embedding(condition.classes, TIME_WIDTH)
        )
        self.matrix = None if condition.width is None else nn.Linear(condition.width, TIME_WIDTH)
        self.absent = nn.Parameter(torch.zeros(TIME_WIDTH))

    def forward(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if value is None:
            return self.absent.to(dtype).expand(shape[0], 1, -1)
        present, embedded = (
            self._label(value) if self.table is not None else self._vector(value, dtype)
        )
        embedded = torch.where(present.unsqueeze(-1), embedded, self.absent).to(dtype)
        return embedded if embedded.dim() == 3 else embedded.unsqueeze(1)

    def _label(self, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        if (
            value.device.type == "cpu" and int(value.max()) >= self.table.num_embeddings
        ):  # a device is not waited for
            raise ArgumentError(
                f'DiT: a label of the condition "{self.name}" must be below its {self.table.num_embeddings} classes '
                f"([denoiser] conditions.{self.name}.classes); got {int(value.max())}. Labels count from 0; -1 is no label."
            )
        return value >= 0, self.table(value.clamp(min=0))

    def _vector(self, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.matrix is not None
        return ~value.isnan().any(-1), self.matrix(value.nan_to_num(0.0).to(dtype))


class Channels(nn.Linear):
    """A linear map to the channels of a modulation, zero at first."""

    is_table = True  # its rows are channels: no hidden matrix to an optimizer

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Rotation:
    """Rotary positions (arXiv 2104.09864): channels i and i + w/2 of [B,L,...,w] turn by position * base^(-2i/w).

    Products of a turned query and a turned key depend on the difference of their positions alone, so packed documents
    need no positions of their own.
    """

    def __init__(self, x: Tensor, width: int, positions: Tensor) -> None:
        # at least float32: an angle of hundreds of radians in bfloat16 is off by whole turns
        dtype = torch.promote_types(x.dtype, torch.float32)
        pair = torch.arange(0, width, 2, device=x.device, dtype=dtype)
        angle = positions.to(dtype).unsqueeze(-1) * torch.exp(
            pair * (-math.log(ROTARY_BASE) / width)
        )
        self.cos = torch.cat([angle.cos(), angle.cos()], -1).to(x.dtype)
        self.sin = torch.cat([-angle.sin(), angle.sin()], -1).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        shape = (x.shape[1], *(1,) * (x.dim() - 3), x.shape[-1])
        cos, sin = self.cos.to(x.dtype).view(shape), self.sin.to(x.dtype).view(shape)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, the norm without parameters of its own."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


def _modulation(own: Tensor, shared: Shared | None) -> Shared:
    """A block's own vectors [n,1,width] one by one, plus the shared ones where time is read."""
    if shared is None:
        return own.unbind()
    return tuple(mine + theirs for mine, theirs in zip(own, shared))
