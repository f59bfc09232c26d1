"""Backbone of convolutions over positions and MLPs, without attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddiff import (
    Backbone,
    ComponentConfig,
    Context,
    Neighbours,
    PositiveInt,
    StateEmbedding,
    Vocabulary,
)


class Layer(nn.Module):
    """Depthwise convolution over positions, then an MLP at every position."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(taps, width) / taps)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, neighbours: Neighbours) -> Tensor:
        # adds the convolution, which reads no padding, no other document and no later block
        h = neighbours.convolve(h, self.taps, 0)
        return h + self.mlp(self.norm(h))


class ConvolutionBackbone(Backbone):
    """Backbone with `layers` layers. A position reads layers * taps // 2 positions on each side."""

    def __init__(self, vocabulary: Vocabulary, width: int, layers: int, taps: int) -> None:
        super().__init__()
        self.width = width
        self._num_taps = taps
        self.embedding = StateEmbedding(vocabulary, width)
        self.time = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Layer(width, taps) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        """Map states [B,L] and times [B,L] to hidden states [B,L,width]."""
        embedded = self.embedding(ids)
        times = torch.stack([t, t.square()], -1).to(embedded.dtype)
        h = embedded + self.time(times)
        neighbours = context.neighbours(h, self._num_taps)
        for layer in self.layers:
            h = layer(h, neighbours)
        return self.norm(h)


class PluginName:
    """Backbone of convolutions over positions and MLPs."""

    class Config(ComponentConfig):
        width: PositiveInt = 32
        """Numbers of a hidden state."""
        layers: PositiveInt = 2
        """Number of layers."""
        reach: PositiveInt = 2
        """Positions to each side that a layer reads."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary) -> ConvolutionBackbone:
        taps = 2 * config.reach + 1
        return ConvolutionBackbone(vocabulary, config.width, config.layers, taps)
