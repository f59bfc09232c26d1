"""Diffusion transformer with a modulation network in every block, as in published checkpoints.

The networks of SEDD (arXiv 2310.16834), MDLM, GIDD, UDLM, Duo and the gamma-hybrid are one design
with small differences. Unlike `dit`, every block computes its own modulation vectors from the
embedding of the noise level, and the noise level is embedded at other frequencies. By default a
sequence has one noise level, so that a small product per block and sequence suffices.

Shapes: B sequences, L positions, `width` channels, C channels of the embedded noise level.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddiff import (
    ArgumentError,
    AttentionMask,
    Backbone,
    ComponentConfig,
    Context,
    ForwardProcess,
    Label,
    PositiveInt,
    Probability,
    StateEmbedding,
    Vocabulary,
)

from .dit import HEAD_WIDTH, Block, Channels, Rotation, add_shared, modulate

NoiseLevel = Literal["sigma", "t"]
Per = Literal["sequence", "position"]
NUM_FREQUENCIES = 128  # of the cosines and sines that embed a noise level
SLOWEST = 10_000.0  # slowest period, in units of the fastest
CLASS = "class"  # name of the condition
LEAST_KEPT = 1e-12  # keep probability below which sigma does not grow


class DDiT(Backbone):
    """Diffusion transformer of published checkpoints: ids [B,L], t [B,L] -> hidden states.

    The network reads a noise level tau: sigma = -ln(probability that a token has no noise), or t.
    With `per = "sequence"`, it reads one level for all positions of a sequence, the largest of
    their levels: published networks have never seen a level 0 at single positions, as those of a
    prompt have.

    With `mixing` = m above 0, the embedding of a position is a mixture of that of its state and
    that of the mask, with the weights e^(-m sigma) and 1 - e^(-m sigma).

    Raises ArgumentError if width is not a multiple of 2 * heads, if mixing lacks a mask, or if
    sigma is asked for without a process.
    """

    class Config(ComponentConfig):
        """Settings of the backbone."""

        width: PositiveInt = 768
        """Channels of the hidden states."""
        layers: PositiveInt = 12
        """Number of blocks."""
        heads: PositiveInt | None = None
        """Number of attention heads; width / 64 by default."""
        condition_width: PositiveInt = 128
        """Channels of the embedded noise level."""
        noise: NoiseLevel = "sigma"
        """Noise level that the network reads: "sigma" = -ln(share without noise), or "t"."""
        per: Per = "sequence"
        """Read one noise level per "sequence", the largest of its positions, or per "position"."""
        mixing: Probability = 0.0
        """Weight m of the embedding of the mask in that of a noisy position, 1 - e^(-m sigma)."""
        final_modulation: bool = True
        """Modulate the final norm, too, by the noise level."""
        dropout: Probability = 0.0
        """Dropout probability after attention and after the MLP."""
        classes: PositiveInt | None = None
        """Number of labels of the condition "class"; none by default."""
        class_dropout: Probability = 0.1
        """Share of training samples without their label; guidance needs a share above 0."""

    @classmethod
    def build(
        cls, config: Config, *, vocabulary: Vocabulary, process: ForwardProcess | None
    ) -> DDiT:
        return cls(
            vocabulary,
            process,
            config.width,
            layers=config.layers,
            heads=config.heads or max(1, config.width // HEAD_WIDTH),
            condition_width=config.condition_width,
            noise=config.noise,
            per=config.per,
            mixing=config.mixing,
            final_modulation=config.final_modulation,
            dropout=config.dropout,
            classes=config.classes,
            class_dropout=config.class_dropout,
        )

    def __init__(
        self,
        vocabulary: Vocabulary,
        process: ForwardProcess | None,
        width: int,
        layers: int,
        heads: int,
        condition_width: int = 128,
        noise: NoiseLevel = "sigma",
        per: Per = "sequence",
        mixing: float = 0.0,
        final_modulation: bool = True,
        dropout: float = 0.0,
        classes: int | None = None,
        class_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check_sizes(width, heads)
        if mixing > 0.0 and vocabulary.mask_id is None:
            raise ArgumentError(
                "DDiT: mixing > 0 needs a vocabulary with a mask, whose embedding is mixed in; got "
                f"{vocabulary}. Set mixing = 0."
            )
        if process is None and (noise == "sigma" or mixing > 0.0):
            raise ArgumentError(
                'DDiT: noise = "sigma" and mixing > 0 need a forward process, which defines sigma; '
                'got none. Set noise = "t" and mixing = 0.'
            )
        self.width = width
        self.head_width = width // heads
        self.process = process
        self.noise = noise
        self.per = per
        self.mixing = mixing
        self.embedding = StateEmbedding(vocabulary, width)
        self.level = LevelEmbedding(condition_width)
        self.classes: nn.Embedding | None = None
        if classes is not None:
            self.classes = nn.Embedding(classes + 1, condition_width)  # the last row: no label
            self.condition_forms = {CLASS: Label(classes)}
            self.condition_dropout = {CLASS: class_dropout}
        self.blocks = nn.ModuleList(
            LevelBlock(width, heads, dropout, condition_width) for _ in range(layers)
        )
        # Three dimensions, so that Muon does not treat the parameter as a hidden matrix.
        self.out_constants = nn.Parameter(torch.zeros(2, 1, width))
        self.out_modulation: Channels | None = None
        if final_modulation:
            self.out_modulation = Channels(condition_width, 2 * width, bias=False)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        x = self._embed(ids, t)
        read = t.amax(-1, keepdim=True) if self.per == "sequence" else t
        features = self.level(self._sigma(read) if self.noise == "sigma" else read, x.dtype)
        if self.classes is not None:
            features = features + self._embed_class(context, len(ids)).to(x.dtype)
        seen = context.kernel_mask(x, self.head_width)
        rotation = Rotation(x, self.head_width, context.positions(ids.shape[1], ids.device))
        for block in self.blocks:
            x = block(x, features, rotation, seen)
        shared = None
        if self.out_modulation is not None:
            shared = self.out_modulation(features).chunk(2, -1)
        shift, scale = add_shared(self.out_constants, shared)
        return modulate(x, shift, scale)

    def _sigma(self, t: Tensor) -> Tensor:
        """Return sigma = -ln(probability that a token has had no noise until t), as t [B,n]."""
        assert self.process is not None
        kept = self.process.keep_probability(t.flatten()).view(t.shape)
        return -kept.clamp(min=LEAST_KEPT).log()

    def _embed(self, ids: Tensor, t: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.mixing == 0.0:
            return x
        kept = torch.exp(-self.mixing * self._sigma(t)).to(x.dtype).unsqueeze(-1)
        return torch.lerp(self.embedding.weight[-1].to(x.dtype), x, kept)

    def _embed_class(self, context: Context, batch: int) -> Tensor:
        """Return the embedding [B,1 or L,C] of the label; without one, that of "no label"."""
        assert self.classes is not None
        absent = self.classes.num_embeddings - 1
        label = context.conditions.get(CLASS)
        if label is None:
            label = torch.full((batch,), absent, device=self.classes.weight.device)
        embedded = F.silu(self.classes(torch.where(label < 0, absent, label)))
        # A label of a whole sequence is [B]; the new dimension broadcasts over positions.
        return embedded if embedded.dim() == 3 else embedded.unsqueeze(1)


class LevelBlock(Block):
    """Block of `dit` that computes its modulation vectors from the embedded noise level.

    The vectors that a `Block` learns are the biases of this matrix.
    """

    def __init__(self, width: int, heads: int, dropout: float, condition_width: int) -> None:
        super().__init__(width, heads, dropout)
        self.level = Channels(condition_width, 6 * width, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, features: Tensor, rotation: Rotation, seen: AttentionMask
    ) -> Tensor:
        return super().forward(x, self.level(features).chunk(6, -1), rotation, seen, None)


class LevelEmbedding(nn.Module):
    """Embedding [B,n,C] of noise levels tau [B,n].

    The features of tau are the cosines and then the sines of tau at 128 frequencies from 1 to
    nearly 1/10,000 radian per unit, followed by an MLP.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        # float64 costs little for one level per sequence. Published weights amplify the errors of
        # float32 angles a thousandfold, to 1e-4 in the logits.
        number = torch.arange(NUM_FREQUENCIES, dtype=torch.float64, device=level.device)
        frequencies = torch.exp(-math.log(SLOWEST) * number / NUM_FREQUENCIES)
        angle = level.double().unsqueeze(-1) * frequencies
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(dtype))
        return embedded


def _check_sizes(width: int, heads: int) -> None:
    if width % (2 * heads):
        raise ArgumentError(
            "DDiT: width must be a multiple of 2 * heads, since rotary positions rotate pairs of "
            f"channels; got width {width} and heads {heads}. "
            f"Take e.g. heads = width / {HEAD_WIDTH}."
        )
