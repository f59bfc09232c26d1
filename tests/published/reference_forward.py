"""Published diffusion transformers, written from their description and without code of ddiff.

`make_tensors` draws the tensors of a tiny network under their published names. `compute_logits` is
its forward pass:

    a_k = tau exp(-ln(10000) k / 128), k = 0..127
    c   = silu(mlp2(silu(mlp0([cos a; sin a]))))
    x   = E[ids]
    per block, with (b1, c1, g1, b2, c2, g2) = adaLN(c):
      h  = LN(x) norm1 (1 + c1) + b1
      x += g1 attn_out(softmax(q k' / sqrt(w)) v), q and k rotated with base 10000
      x += g2 mlp2(gelu_tanh(mlp0(LN(x) norm2 (1 + c2) + b2)))
    logits = linear(LN(x) norm_final (1 + s) + b), (b, s) = output adaLN(c)

A network without adaLN has shifts and scales 0, and gates 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

TOKENS = 11  # V; the mask is row 11
ROWS = TOKENS + 1
LENGTH = 8
WIDTH = 32
HEADS = 2
LAYERS = 2
CONDITION = 16
SYMBOLS = "abcdefghijk"

MDLM = {
    "model_type": "mdlm",
    "vocab_size": ROWS,
    "hidden_dim": WIDTH,
    "cond_dim": CONDITION,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "model_length": LENGTH,
    "dropout": 0.1,
    "time_conditioning": False,
}
BD3LM = MDLM | {"model_type": "bd3lm", "block_size": 4, "cross_attn": True, "adaln": True}
EPSILON = {
    "model_type": "epsilon_hybrid",
    "tokenizer": {"tokens": TOKENS},
    "training": {"epsilon": 0.01},
    "model": {
        "hidden_size": WIDTH,
        "cond_dim": CONDITION,
        "n_heads": HEADS,
        "n_blocks": LAYERS,
        "dropout": 0.1,
        "length": LENGTH,
    },
}
# Here the symbol "k" is the end mark, and there is no mask.
DUO_AR = MDLM | {"model_type": "DUO", "vocab_size": TOKENS, "causal_attention": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "mdlm": MDLM,
    "bd3lm": BD3LM,
    "hybrid_epsilon": EPSILON,
    "duo_ar": DUO_AR,
}
PREFIXES = {"mdlm": "backbone.", "bd3lm": "backbone.", "hybrid_epsilon": "", "duo_ar": "backbone."}


def make_tensors(seed: int = 0, *, has_adaln: bool = True, rows: int = ROWS) -> dict[str, Tensor]:
    """Draw the tensors of a tiny network, without a prefix. No two rows have the same role."""
    shapes = {
        "vocab_embed.embedding": [rows, WIDTH],
        "rotary_emb.inv_freq": [WIDTH // HEADS // 2],
        "output_layer.norm_final.weight": [WIDTH],
        "output_layer.linear.weight": [rows, WIDTH],
        "output_layer.linear.bias": [rows],
    }
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        shapes[f"{block}.norm1.weight"] = [WIDTH]
        shapes[f"{block}.attn_qkv.weight"] = [3 * WIDTH, WIDTH]
        shapes[f"{block}.attn_out.weight"] = [WIDTH, WIDTH]
        shapes[f"{block}.norm2.weight"] = [WIDTH]
        shapes[f"{block}.mlp.0.weight"] = [4 * WIDTH, WIDTH]
        shapes[f"{block}.mlp.0.bias"] = [4 * WIDTH]
        shapes[f"{block}.mlp.2.weight"] = [WIDTH, 4 * WIDTH]
        shapes[f"{block}.mlp.2.bias"] = [WIDTH]
        if has_adaln:
            shapes[f"{block}.adaLN_modulation.weight"] = [6 * WIDTH, CONDITION]
            shapes[f"{block}.adaLN_modulation.bias"] = [6 * WIDTH]
    if has_adaln:
        shapes["output_layer.adaLN_modulation.weight"] = [2 * WIDTH, CONDITION]
        shapes["output_layer.adaLN_modulation.bias"] = [2 * WIDTH]
        shapes["sigma_map.mlp.0.weight"] = [CONDITION, 256]
        shapes["sigma_map.mlp.0.bias"] = [CONDITION]
        shapes["sigma_map.mlp.2.weight"] = [CONDITION, CONDITION]
        shapes["sigma_map.mlp.2.bias"] = [CONDITION]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        # Large enough that every part of the network changes the logits.
        drawn = torch.randn(shape, generator=generator) * 0.3
        tensors[name] = 1.0 + drawn if "norm" in name else drawn
    return tensors


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = ""
) -> Path:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    named = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return folder


def write_family(folder: Path, family: str, seed: int = 0) -> dict[str, Tensor]:
    """Write a checkpoint of a family, and return its tensors without the prefix."""
    has_adaln = family in ("mdlm", "bd3lm")
    rows = TOKENS if family == "duo_ar" else ROWS
    tensors = make_tensors(seed, has_adaln=has_adaln, rows=rows)
    write_checkpoint(folder, CONFIGS[family], tensors, PREFIXES[family])
    return tensors


def compute_logits(
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    tau: float | Tensor = 0.0,
    *,
    positions: Tensor | None = None,
    attends: Tensor | None = None,
    embedded: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Return the logits [B,L,S] of state ids [B,L].

    Args:
        tensors: tensors without a prefix.
        ids: state ids.
        tau: noise level, a number or [B,1 or L].
        positions: [L] positions; by default 0, 1, ...
        embedded: [B,L,d] embeddings in place of those of `ids`.
        added: [B,1,C] vectors that are added to the embedding of tau.
        attends: [L,L] whether a position (row) attends to another one (column); None: to all.
    """
    if positions is None:
        positions = torch.arange(ids.shape[1])
    condition = embed_tau(tensors, tau) if "sigma_map.mlp.0.weight" in tensors else None
    if added is not None:
        assert condition is not None
        condition = condition + added
    x = tensors["vocab_embed.embedding"][ids] if embedded is None else embedded
    layers = sum(name.endswith("norm1.weight") for name in tensors)
    for layer in range(layers):
        x = run_block(tensors, f"blocks.{layer}", x, condition, positions, attends)
    shift, scale = modulation(tensors, "output_layer", condition, 2)
    h = normalize(x) * tensors["output_layer.norm_final.weight"] * (1.0 + scale) + shift
    return h @ tensors["output_layer.linear.weight"].T + tensors["output_layer.linear.bias"]


def embed_tau(tensors: Mapping[str, Tensor], tau: float | Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    angles = torch.as_tensor(tau, dtype=torch.float32).unsqueeze(-1) * frequencies
    features = torch.cat([angles.cos(), angles.sin()], -1)
    first, second = tensors["sigma_map.mlp.0.weight"], tensors["sigma_map.mlp.2.weight"]
    hidden = F.silu(features @ first.T + tensors["sigma_map.mlp.0.bias"])
    return F.silu(hidden @ second.T + tensors["sigma_map.mlp.2.bias"])


def modulation(
    tensors: Mapping[str, Tensor], name: str, condition: Tensor | None, count: int
) -> list[Tensor]:
    weight = tensors.get(f"{name}.adaLN_modulation.weight")
    if weight is None or condition is None:
        return [torch.ones(1) if i % 3 == 2 else torch.zeros(1) for i in range(count)]
    vectors = condition @ weight.T + tensors[f"{name}.adaLN_modulation.bias"]
    return list(vectors.chunk(count, -1))


def normalize(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def run_block(
    tensors: Mapping[str, Tensor],
    block: str,
    x: Tensor,
    condition: Tensor | None,
    positions: Tensor,
    attends: Tensor | None,
) -> Tensor:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(tensors, block, condition, 6)
    h = normalize(x) * tensors[f"{block}.norm1.weight"] * (1.0 + scale) + shift
    qkv = h @ tensors[f"{block}.attn_qkv.weight"].T
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    scores = rotate(q, positions) @ rotate(k, positions).transpose(-1, -2)
    scores = scores / math.sqrt(q.shape[-1])
    if attends is not None:
        scores = scores.masked_fill(~attends, -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + gate * (out @ tensors[f"{block}.attn_out.weight"].T)
    h = normalize(x) * tensors[f"{block}.norm2.weight"] * (1.0 + mlp_scale) + mlp_shift
    hidden = h @ tensors[f"{block}.mlp.0.weight"].T + tensors[f"{block}.mlp.0.bias"]
    hidden = F.gelu(hidden, approximate="tanh")
    out = hidden @ tensors[f"{block}.mlp.2.weight"].T + tensors[f"{block}.mlp.2.bias"]
    return x + mlp_gate * out


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate channels j and j + w/2 by position / 10000^(2j/w)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 10000.0 ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        -1,
    )


def block_mask(length: int, width: int) -> Tensor:
    """Return the attention mask [2L,2L] of one pass over [noisy; clean] in blocks of `width`."""
    block = torch.arange(length) // width
    same = block[:, None] == block[None, :]
    earlier = block[:, None] > block[None, :]
    noisy = torch.cat([same, earlier], 1)
    clean = torch.cat([torch.zeros_like(same), same | earlier], 1)
    return torch.cat([noisy, clean])
