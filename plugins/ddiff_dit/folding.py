"""Weights of published diffusion transformers <-> weights of `DiT` with `time = false`.

The published networks have the DiT of arXiv 2310.16834 with a layer norm weight before each
modulation, and modulation vectors (adaLN) that are computed per block from the noise level sigma.
Where sigma is always 0, the vectors are constants. `DiT` adds constants of the same kind, and its
layer norms have no weight, so that

    norm * (1 + scale) = 1 + scale',    scale' = scale + (norm - 1) (1 + scale).

The form on the right is exact if norm is 1. All constants are computed in float64.

S: rows of the embedding, the V tokens and the mask. d: width. C: width of the embedding of sigma.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddiff import ArgumentError, PublishedTensors

TIME_FEATURES = 256  # cosines and sines of 128 frequencies of sigma
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tables of the rotary positions, which are computed from the width of a head."""

# Logit of the mask in exported files whose readers normalize over all rows. Finite in bfloat16,
# and low enough that the mask has the probability 0.
LOWEST_LOGIT = -1e4


class Sizes(NamedTuple):
    """Sizes of a published network.

    Attributes:
        rows: rows of the embedding and of the output matrix.
        width: channels of the hidden states.
        layers: number of blocks.
        heads: number of attention heads.
        condition: width of the embedding of sigma.
        length: number of positions.
    """

    rows: int
    width: int
    layers: int
    heads: int
    condition: int
    length: int


# ---------------------------------------------------------------------- reading


def fold_weights(
    tensors: PublishedTensors, sizes: Sizes, *, num_tokens: int, has_modulation: bool
) -> dict[str, Tensor]:
    """Convert published tensors to the state dict of a denoiser with `DiT` and the head "tokens".

    Args:
        tensors: published tensors, without a prefix.
        sizes: sizes of the network.
        num_tokens: number V of tokens. Rows of the output matrix above V, such as that of the mask,
            are left out.
        has_modulation: whether the network has modulation vectors, which are evaluated at sigma 0.
            If not, shifts and scales are 0 and gates are 1.
    """
    rows, width = sizes.rows, sizes.width
    sigma = _embed_zero(tensors, sizes) if has_modulation else None
    weights = {"backbone.embedding.weight": tensors.take("vocab_embed.embedding", rows, width)}
    for layer in range(sizes.layers):
        block = tensors.without_prefix(f"blocks.{layer}.")
        for name, tensor in _fold_block(block, width, sigma).items():
            weights[f"backbone.blocks.{layer}.{name}"] = tensor
    out = tensors.without_prefix("output_layer.")
    norm = out.take("norm_final.weight", width).double()
    shift, scale = _read_modulation(out, norm, sigma, 2)
    folded = torch.stack([shift, _fold_norm(norm, scale)])
    weights["backbone.out_modulation"] = folded.unsqueeze(1).float()
    weights["head.table"] = out.take("linear.weight", rows, width)[:num_tokens].clone()
    weights["head.bias"] = out.take("linear.bias", rows)[:num_tokens].clone()
    tensors.skip(*BUFFERS)
    return weights


def _embed_zero(tensors: PublishedTensors, sizes: Sizes) -> Tensor:
    """Return the embedding [C] of sigma = 0 in float64."""
    width = sizes.condition
    mlp = tensors.without_prefix("sigma_map.mlp.")
    first = mlp.take("0.weight", width, TIME_FEATURES).double()
    # The features of 0 are ones (cosines), then zeros (sines).
    features = torch.zeros(TIME_FEATURES, dtype=torch.float64, device=first.device)
    features[: TIME_FEATURES // 2] = 1.0
    hidden = F.silu(F.linear(features, first, mlp.take("0.bias", width).double()))
    second = mlp.take("2.weight", width, width).double()
    return F.silu(F.linear(hidden, second, mlp.take("2.bias", width).double()))


def _fold_block(block: PublishedTensors, width: int, sigma: Tensor | None) -> dict[str, Tensor]:
    norm = block.take("norm1.weight", width).double()
    mlp_norm = block.take("norm2.weight", width).double()
    vectors = _read_modulation(block, norm, sigma, 6)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
    modulation = [
        shift,
        _fold_norm(norm, scale),
        gate,
        mlp_shift,
        _fold_norm(mlp_norm, mlp_scale),
        mlp_gate,
    ]
    return {
        "qkv.weight": block.take("attn_qkv.weight", 3 * width, width),
        "attended.weight": block.take("attn_out.weight", width, width),
        "up.weight": block.take("mlp.0.weight", 4 * width, width),
        "up.bias": block.take("mlp.0.bias", 4 * width),
        "down.weight": block.take("mlp.2.weight", width, 4 * width),
        "down.bias": block.take("mlp.2.bias", width),
        "modulation": torch.stack(modulation).unsqueeze(1).float(),
    }


def _read_modulation(
    tensors: PublishedTensors, like: Tensor, sigma: Tensor | None, count: int
) -> tuple[Tensor, ...]:
    """Return the `count` modulation vectors [d] of a block, or of the output, at sigma 0.

    `like`: a tensor [d] with the device and dtype of the vectors.
    """
    if sigma is None:
        zero = torch.zeros_like(like)
        one = torch.ones_like(like)
        # Every third vector is a gate. The output has no gate.
        return tuple(one if i % 3 == 2 else zero for i in range(count))
    size = count * len(like)
    matrix = tensors.take("adaLN_modulation.weight", size, len(sigma)).double()
    bias = tensors.take("adaLN_modulation.bias", size).double()
    return F.linear(sigma, matrix, bias).chunk(count)


def _fold_norm(norm: Tensor, scale: Tensor) -> Tensor:
    """Return scale' with norm * (1 + scale) = 1 + scale'."""
    return scale + (norm - 1.0) * (1.0 + scale)


# ---------------------------------------------------------------------- writing


def unfold_weights(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Convert the weights of a denoiser to published tensors with modulation vectors.

    The vectors do not depend on sigma: their matrices are 0. Norm weights are 1. The mask has a row
    of zeros in the output matrix, which readers of these files replace by minus infinity.
    """
    width, condition = sizes.width, sizes.condition
    tensors = _unfold_embedding(weights, sizes, mask_logit=0.0)
    for part, shape in (("0", (condition, TIME_FEATURES)), ("2", (condition, condition))):
        tensors[f"sigma_map.mlp.{part}.weight"] = torch.zeros(shape)
        tensors[f"sigma_map.mlp.{part}.bias"] = torch.zeros(condition)
    for layer in range(sizes.layers):
        prefix = f"blocks.{layer}"
        tensors |= _unfold_matrices(weights, layer)
        tensors[f"{prefix}.norm1.weight"] = torch.ones(width)
        tensors[f"{prefix}.norm2.weight"] = torch.ones(width)
        vectors = weights[f"backbone.blocks.{layer}.modulation"]
        tensors[f"{prefix}.adaLN_modulation.weight"] = torch.zeros(6 * width, condition)
        tensors[f"{prefix}.adaLN_modulation.bias"] = vectors.flatten().clone()
    tensors["output_layer.norm_final.weight"] = torch.ones(width)
    tensors["output_layer.adaLN_modulation.weight"] = torch.zeros(2 * width, condition)
    tensors["output_layer.adaLN_modulation.bias"] = weights["backbone.out_modulation"].flatten()
    return tensors


def unfold_plain_weights(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Convert the weights of a denoiser to published tensors without modulation vectors.

    Scales become norm weights. Gates are multiplied into the matrices after attention and MLP, and
    the shifts before the MLP and the output into the biases behind them. Raises ArgumentError if a
    shift before attention is not 0, because the matrix behind it has no bias.
    """
    tensors = _unfold_embedding(weights, sizes, mask_logit=LOWEST_LOGIT)
    for layer in range(sizes.layers):
        prefix = f"blocks.{layer}"
        name = f"backbone.blocks.{layer}.modulation"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = weights[name].double().squeeze(1)
        if bool((shift != 0.0).any()):
            raise ArgumentError(
                f"export: the first row of {name}, the shift before attention, must be 0, because "
                "this layout has neither a shift nor a bias there; its largest entry is "
                f"{float(shift.abs().max()):.3g}. Use another --format."
            )
        tensors |= _unfold_matrices(weights, layer)
        tensors[f"{prefix}.norm1.weight"] = (1.0 + scale).float()
        tensors[f"{prefix}.norm2.weight"] = (1.0 + mlp_scale).float()
        _add_shift(tensors, f"{prefix}.mlp.0", mlp_shift)
        _multiply_gate(tensors, f"{prefix}.attn_out", gate)
        _multiply_gate(tensors, f"{prefix}.mlp.2", mlp_gate)
    shift, scale = weights["backbone.out_modulation"].double().squeeze(1)
    tensors["output_layer.norm_final.weight"] = (1.0 + scale).float()
    _add_shift(tensors, "output_layer.linear", shift)
    return tensors


def _unfold_embedding(
    weights: Mapping[str, Tensor], sizes: Sizes, mask_logit: float
) -> dict[str, Tensor]:
    """Return embedding and output matrix, with a row for the mask that does not depend on x."""
    table = weights["head.table"]
    bias = weights["head.bias"]
    missing = sizes.rows - len(table)
    return {
        "vocab_embed.embedding": weights["backbone.embedding.weight"],
        "output_layer.linear.weight": torch.cat([table, table.new_zeros(missing, sizes.width)]),
        "output_layer.linear.bias": torch.cat([bias, bias.new_full((missing,), mask_logit)]),
    }


def _unfold_matrices(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Return the matrices of a block under their published names."""
    own = f"backbone.blocks.{layer}"
    published = f"blocks.{layer}"
    return {
        f"{published}.attn_qkv.weight": weights[f"{own}.qkv.weight"],
        f"{published}.attn_out.weight": weights[f"{own}.attended.weight"],
        f"{published}.mlp.0.weight": weights[f"{own}.up.weight"],
        f"{published}.mlp.0.bias": weights[f"{own}.up.bias"],
        f"{published}.mlp.2.weight": weights[f"{own}.down.weight"],
        f"{published}.mlp.2.bias": weights[f"{own}.down.bias"],
    }


def _add_shift(tensors: dict[str, Tensor], name: str, shift: Tensor) -> None:
    """Add the image of a shift to the bias of a linear map. A shift of 0 changes no bit."""
    added = tensors[f"{name}.weight"].double() @ shift
    tensors[f"{name}.bias"] = (tensors[f"{name}.bias"].double() + added).float()


def _multiply_gate(tensors: dict[str, Tensor], name: str, gate: Tensor) -> None:
    """Multiply the outputs of a linear map by a gate. A gate of 1 changes no bit."""
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].double() * gate.unsqueeze(1)).float()
    if f"{name}.bias" in tensors:
        tensors[f"{name}.bias"] = (tensors[f"{name}.bias"].double() * gate).float()
