"""Weights of published diffusion transformers <-> weights of `DDiT`.

The published networks have a layer norm weight before each modulation, and `DDiT` has none. With
the modulation vectors W c + b of the embedded noise level c,

    norm * (1 + W c + b) = 1 + W' c + b',    W' = norm * W,    b' = b + (norm - 1) (1 + b).

Both are exact if norm is 1. They are computed in float64.

S: rows of the embedding. d: width. C: width of the embedded noise level.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddiff import PublishedTensors

from .folding import BUFFERS, TIME_FEATURES, Sizes

LEVEL = {f"mlp.{part}": f"sigma_map.mlp.{part}" for part in ("0", "2")}
"""Layers of the embedding of the noise level: own name -> published name."""
MATRICES = {
    "qkv": "attn_qkv",
    "attended": "attn_out",
    "up": "mlp.0",
    "down": "mlp.2",
}
"""Linear maps of a block: own name -> published name."""
NORMED = {6: (1, 4), 2: (1,)}
"""Number of modulation vectors -> which of them are scales, each behind a layer norm."""


# ---------------------------------------------------------------------- reading


def fold_level_weights(
    tensors: PublishedTensors, sizes: Sizes, *, outputs: int, has_final: bool = True
) -> dict[str, Tensor]:
    """Convert published tensors to the state dict of a denoiser with `DDiT`.

    Args:
        tensors: published tensors, without a prefix.
        sizes: sizes of the network.
        outputs: number of rows of the output matrix that the head has; the rest is left out.
        has_final: whether the noise level modulates the final norm.
    """
    rows, width, condition = sizes.rows, sizes.width, sizes.condition
    weights = {"embedding.weight": tensors.take("vocab_embed.embedding", rows, width)}
    for own, published in LEVEL.items():
        inputs = TIME_FEATURES if own.endswith("0") else condition
        weights[f"level.{own}.weight"] = tensors.take(f"{published}.weight", condition, inputs)
        weights[f"level.{own}.bias"] = tensors.take(f"{published}.bias", condition)
    for layer in range(sizes.layers):
        block = tensors.without_prefix(f"blocks.{layer}.")
        for name, tensor in _read_block(block, width, condition).items():
            weights[f"blocks.{layer}.{name}"] = tensor
    out = tensors.without_prefix("output_layer.")
    norm = out.take("norm_final.weight", width)
    if has_final:
        matrix, constants = _read_modulation(out, [norm], width, condition, 2)
        weights["out_modulation.weight"] = matrix
    else:
        constants = torch.stack([torch.zeros_like(norm), norm - 1.0]).unsqueeze(1)
    weights["out_constants"] = constants
    named = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    named["head.table"] = out.take("linear.weight", rows, width)[:outputs].clone()
    named["head.bias"] = out.take("linear.bias", rows)[:outputs].clone()
    tensors.skip(*BUFFERS)
    return named


def _read_block(block: PublishedTensors, width: int, condition: int) -> dict[str, Tensor]:
    shapes = {
        "qkv": (3 * width, width),
        "attended": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
    }
    weights = {}
    for own, published in MATRICES.items():
        weights[f"{own}.weight"] = block.take(f"{published}.weight", *shapes[own])
        if published.startswith("mlp"):
            weights[f"{own}.bias"] = block.take(f"{published}.bias", shapes[own][0])
    norms = [block.take(f"norm{number}.weight", width) for number in (1, 2)]
    matrix, constants = _read_modulation(block, norms, width, condition, 6)
    return {**weights, "level.weight": matrix, "modulation": constants}


def _read_modulation(
    tensors: PublishedTensors, norms: list[Tensor], width: int, condition: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the matrix [count*d,C] and the constants [count,1,d] of modulation vectors.

    `norms`: weights of the layer norms before the scales, which are folded into them.
    """
    size = count * width
    matrix = tensors.take("adaLN_modulation.weight", size, condition).double()
    bias = tensors.take("adaLN_modulation.bias", size).double()
    matrix = matrix.view(count, width, condition).clone()
    bias = bias.view(count, width).clone()
    for number, norm in zip(NORMED[count], norms, strict=True):
        wide = norm.double()
        matrix[number] = wide.unsqueeze(-1) * matrix[number]
        bias[number] = bias[number] + (wide - 1.0) * (1.0 + bias[number])
    return matrix.flatten(0, 1).float(), bias.unsqueeze(1).float()


# ---------------------------------------------------------------------- writing


def unfold_level_weights(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Convert the weights of a denoiser with `DDiT` to published tensors, with norm weights of 1.

    A missing row of the output matrix, which is that of the mask, is filled with zeros. Readers of
    these files replace its output by minus infinity.
    """
    own = {
        name.removeprefix("backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
    table, bias = weights["head.table"], weights["head.bias"]
    missing = sizes.rows - len(table)
    ones = torch.ones(sizes.width)
    tensors = {
        "vocab_embed.embedding": own["embedding.weight"],
        "output_layer.norm_final.weight": ones,
        "output_layer.linear.weight": torch.cat([table, table.new_zeros(missing, sizes.width)]),
        "output_layer.linear.bias": torch.cat([bias, bias.new_zeros(missing)]),
    }
    for name, published in LEVEL.items():
        tensors[f"{published}.weight"] = own[f"level.{name}.weight"]
        tensors[f"{published}.bias"] = own[f"level.{name}.bias"]
    for layer in range(sizes.layers):
        block = f"blocks.{layer}"
        for name, published in MATRICES.items():
            tensors[f"{block}.{published}.weight"] = own[f"{block}.{name}.weight"]
            if published.startswith("mlp"):
                tensors[f"{block}.{published}.bias"] = own[f"{block}.{name}.bias"]
        for number in (1, 2):
            tensors[f"{block}.norm{number}.weight"] = ones.clone()
        tensors[f"{block}.adaLN_modulation.weight"] = own[f"{block}.level.weight"]
        tensors[f"{block}.adaLN_modulation.bias"] = own[f"{block}.modulation"].flatten()
    if "out_modulation.weight" in own:
        tensors["output_layer.adaLN_modulation.weight"] = own["out_modulation.weight"]
        tensors["output_layer.adaLN_modulation.bias"] = own["out_constants"].flatten()
    else:
        _, scale = own["out_constants"].squeeze(1)
        tensors["output_layer.norm_final.weight"] = 1.0 + scale
    return tensors
