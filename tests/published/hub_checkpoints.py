"""Tiny checkpoints in the formats of LLaDA, Dream, LLaDA2 and A2D, and their forward passes.

The forward passes of LLaDA and LLaDA2 are written from the description of the networks, with the
published names. Those of Dream and A2D are the classes of the transformers library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
SPECIAL = ["<eos>", "[MASK]", "[PAD]"]
V = len(WORDS) + len(SPECIAL)
EOS, MASK, PAD = range(len(WORDS), V)
TEXT = " ".join(WORDS * 8)
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
WIDTH, HEADS, LAYERS, HIDDEN, LENGTH = 32, 2, 2, 48, 64

QWEN = {
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
}
DREAM = QWEN | {
    "model_type": "Dream",
    "mask_token_id": MASK,
    "tie_word_embeddings": False,
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
}
# The mask is that of the tokenizer, and the output matrix is the embedding.
A2D = QWEN | {"model_type": "a2d-qwen3", "head_dim": WIDTH // HEADS, "tie_word_embeddings": True}
LLADA = {
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "d_model": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": 1,
    "mlp_hidden_size": HIDDEN,
    "max_sequence_length": LENGTH,
    "vocab_size": V,
    "embedding_size": V,
    "weight_tying": False,
    "mask_token_id": MASK,
}
LLADA2 = QWEN | {
    "model_type": "llada2_moe",
    "use_bias": False,
    "use_qkv_bias": False,
    "moe_intermediate_size": 8,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "mask_token_id": MASK,
}
# Keys of the configuration as before version 5 of the library.
MODERNBERT = {
    "model_type": "modernbert",
    "architectures": ["ModernBertForMaskedLM"],
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "local_attention": 8,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 80000.0,
    "local_rope_theta": 5000.0,
    "pad_token_id": PAD,
}
CONFIGS = {
    "llada": LLADA,
    "dream": DREAM,
    "llada2": LLADA2,
    "a2d": A2D,
    "modernbert": MODERNBERT,
}


def write_tokenizer(folder: Path, mask_token: str | None = "[MASK]") -> None:
    """Write a tokenizer of words, with a chat template."""
    ids = {word: number for number, word in enumerate([*WORDS, *SPECIAL])}
    spelled = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {} if mask_token is None else {"mask_token": mask_token}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="[PAD]", eos_token="<eos>", **named
    )
    fast.add_special_tokens({"additional_special_tokens": ["[MASK]"]})
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    copied = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copied, folder / "model.safetensors")
    return folder


def build_library_model(config: Mapping[str, Any]) -> Any:
    """Build the class of the transformers library for Dream or A2D, with random weights."""
    torch.manual_seed(0)
    keys = {key: config[key] for key in [*QWEN, "tie_word_embeddings"]}
    if config["model_type"] == "Dream":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**keys)).eval()
    width = config["head_dim"]
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**keys, head_dim=width)).eval()


def published_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that the library saves: a tied output matrix is left out."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def full_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [B,L,V] of a model of the library with full attention."""
    length = ids.shape[1]
    mask = torch.zeros(len(ids), 1, length, length)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def train(model: Any, *, shift: bool, steps: int = 150) -> None:
    """Train a model to predict masked words of the repeated text, in about two seconds.

    Visible words are predicted too, and the padding predicts itself, so that only the embedding of
    the mask makes a model predict from the context.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        start = torch.randint(0, len(WORDS), (16, 1), generator=generator)
        x0 = (start + torch.arange(24)) % len(WORDS)
        drawn = torch.rand(x0.shape, generator=generator)
        share = 0.9 * torch.rand(16, 1, generator=generator)
        zt = torch.where(drawn < share, MASK, x0)
        is_padding = drawn > 0.9
        zt = torch.where(is_padding, PAD, zt)
        target = torch.where(is_padding, PAD, x0)
        logits = full_logits(model, zt)
        if shift:
            logits = logits[:, :-1]
            target = target[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


# ---------------------------------------------------------------------- forward passes


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, base: float, width: int) -> Tensor:
    """Rotate the first `width` channels of x [B,L,heads,w] by their position."""
    half = width // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64).unsqueeze(-1) * frequency
    cos, sin = angle.cos().float().unsqueeze(1), angle.sin().float().unsqueeze(1)
    a, b = x[..., :half], x[..., half:width]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., width:]], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, attends: Tensor) -> Tensor:
    """Return the attention of q [B,L,h,w] to k and v [B,L,g,w], where query i sees key j."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihw,bjhw->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~attends, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhw->bihw", weights, v).flatten(2)


def draw_llada() -> dict[str, Tensor]:
    """Draw the tensors of a tiny LLaDA."""
    shapes = {"wte": (V, WIDTH), "ln_f": (WIDTH,), "ff_out": (V, WIDTH)}
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        shapes[f"{block}.attn_norm"] = (WIDTH,)
        shapes[f"{block}.ff_norm"] = (WIDTH,)
        shapes[f"{block}.q_proj"] = (WIDTH, WIDTH)
        shapes[f"{block}.k_proj"] = (WIDTH // HEADS, WIDTH)
        shapes[f"{block}.v_proj"] = (WIDTH // HEADS, WIDTH)
        shapes[f"{block}.attn_out"] = (WIDTH, WIDTH)
        shapes[f"{block}.ff_proj"] = (HIDDEN, WIDTH)
        shapes[f"{block}.up_proj"] = (HIDDEN, WIDTH)
        shapes[f"{block}.ff_out"] = (WIDTH, HIDDEN)
    return _draw({f"model.transformer.{name}.weight": shape for name, shape in shapes.items()})


def llada_logits(tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return the logits [B,L,V] of LLaDA."""

    def take(name: str) -> Tensor:
        return tensors[f"model.transformer.{name}.weight"]

    x = take("wte")[ids]
    attends = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        h = norm(x, take(f"{block}.attn_norm"), LLADA["rms_norm_eps"])
        q, k, v = (
            (h @ take(f"{block}.{part}_proj").T).unflatten(-1, (-1, WIDTH // HEADS))
            for part in "qkv"
        )
        q, k = (rotate(part, LLADA["rope_theta"], WIDTH // HEADS) for part in (q, k))
        x = x + attend(q, k, v, attends) @ take(f"{block}.attn_out").T
        h = norm(x, take(f"{block}.ff_norm"), LLADA["rms_norm_eps"])
        gate = F.silu(h @ take(f"{block}.ff_proj").T)
        x = x + (gate * (h @ take(f"{block}.up_proj").T)) @ take(f"{block}.ff_out").T
    return norm(x, take("ln_f"), LLADA["rms_norm_eps"]) @ take("ff_out").T


def draw_llada2() -> dict[str, Tensor]:
    """Draw the tensors of a tiny LLaDA2, whose first layer has no experts."""
    w = WIDTH // HEADS
    shapes = {
        "model.word_embeddings.weight": (V, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (V, WIDTH),
    }

    def add_mlp(name: str, hidden: int) -> None:
        shapes[f"{name}.gate_proj.weight"] = (hidden, WIDTH)
        shapes[f"{name}.up_proj.weight"] = (hidden, WIDTH)
        shapes[f"{name}.down_proj.weight"] = (WIDTH, hidden)

    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes[f"{block}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (WIDTH,)
        shapes[f"{block}.attention.query_key_value.weight"] = ((HEADS + 2) * w, WIDTH)
        shapes[f"{block}.attention.query_layernorm.weight"] = (w,)
        shapes[f"{block}.attention.key_layernorm.weight"] = (w,)
        shapes[f"{block}.attention.dense.weight"] = (WIDTH, WIDTH)
        if layer < LLADA2["first_k_dense_replace"]:
            add_mlp(f"{block}.mlp", HIDDEN)
            continue
        shapes[f"{block}.mlp.gate.weight"] = (LLADA2["num_experts"], WIDTH)
        shapes[f"{block}.mlp.gate.expert_bias"] = (LLADA2["num_experts"],)
        add_mlp(f"{block}.mlp.shared_experts", LLADA2["moe_intermediate_size"])
        for expert in range(LLADA2["num_experts"]):
            add_mlp(f"{block}.mlp.experts.{expert}", LLADA2["moe_intermediate_size"])
    return _draw(shapes)


def llada2_logits(tensors: Mapping[str, Tensor], ids: Tensor, block: Tensor) -> Tensor:
    """Return the logits [B,L,V] of LLaDA2, whose positions attend to their and earlier blocks."""
    w = WIDTH // HEADS
    eps, base = LLADA2["rms_norm_eps"], LLADA2["rope_theta"]
    attends = block.unsqueeze(-1) >= block

    def mlp(name: str, h: Tensor) -> Tensor:
        gate = F.silu(h @ tensors[f"{name}.gate_proj.weight"].T)
        hidden = gate * (h @ tensors[f"{name}.up_proj.weight"].T)
        return hidden @ tensors[f"{name}.down_proj.weight"].T

    x = tensors["model.word_embeddings.weight"][ids]
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        h = norm(x, tensors[f"{own}.input_layernorm.weight"], eps)
        joined = h @ tensors[f"{own}.attention.query_key_value.weight"].T
        q, k, v = joined.unflatten(-1, (-1, w)).split([HEADS, 1, 1], 2)
        q = norm(q, tensors[f"{own}.attention.query_layernorm.weight"], eps)
        k = norm(k, tensors[f"{own}.attention.key_layernorm.weight"], eps)
        q, k = rotate(q, base, w // 2), rotate(k, base, w // 2)
        x = x + attend(q, k, v, attends) @ tensors[f"{own}.attention.dense.weight"].T
        h = norm(x, tensors[f"{own}.post_attention_layernorm.weight"], eps)
        if layer < LLADA2["first_k_dense_replace"]:
            x = x + mlp(f"{own}.mlp", h)
            continue
        routed = torch.zeros_like(h)
        for b in range(len(ids)):
            for i in range(ids.shape[1]):
                for expert, weight in _route(tensors, f"{own}.mlp.gate", h[b, i]):
                    routed[b, i] += weight * mlp(f"{own}.mlp.experts.{expert}", h[b, i])
        x = x + routed + mlp(f"{own}.mlp.shared_experts", h)
    return norm(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T


def _route(tensors: Mapping[str, Tensor], name: str, h: Tensor) -> list[tuple[int, float]]:
    """Return the experts of a position and their weights.

    The groups with the largest sum of their two best biased scores are kept. Among their experts,
    those with the best biased scores are chosen, with weights proportional to the plain scores.
    """
    scores = torch.sigmoid(tensors[f"{name}.weight"] @ h)
    biased = (scores + tensors[f"{name}.expert_bias"]).tolist()
    size = LLADA2["num_experts"] // LLADA2["n_group"]
    groups = [range(first, first + size) for first in range(0, LLADA2["num_experts"], size)]
    strength = [sum(sorted(biased[expert] for expert in group)[-2:]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda group: -strength[group])[: LLADA2["topk_group"]]
    experts = sorted((e for group in kept for e in groups[group]), key=lambda e: -biased[e])
    chosen = experts[: LLADA2["num_experts_per_tok"]]
    total = sum(float(scores[expert]) for expert in chosen)
    factor = LLADA2["routed_scaling_factor"] / total
    return [(expert, factor * float(scores[expert])) for expert in chosen]


def _draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator) * 0.3
        tensors[name] = 1.0 + drawn if "norm" in name or "ln_f" in name else drawn
    return tensors
