"""Layouts of published diffusion models whose networks are classes of the transformers library.

LLaDA (arXiv 2502.09992), Dream (2508.15487), LLaDA2 and models that dllm made from autoregressive
models (A2D) have repositories with Python code. The networks are those of classes of the library
(`hub_models.py`), most of them under other names. A layout translates configuration and names, so
that no code of a repository is run.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddiff import (
    ComponentConfig,
    DataError,
    Imported,
    Layout,
    NonNegativeInt,
    PublishedFiles,
    PublishedTensors,
)

from .backbone import make_model
from .hub_models import HUB_MODELS, HubModel

NO_OUTPUT = -1e4  # logit of the mask token, which is never a clean token
LONGEST_ROW = 1024  # tokens of a row, unless the model has fewer positions or --set says otherwise
NOT_OF_THE_NETWORK = ("architectures", "dtype", "transformers_version", "id2label", "label2id")
SUPPORTED = ("llama", "qwen2", "qwen3", "glm4_moe")

# Keys of the configuration that the library's classes share. Other keys that change the network
# are checked by each layout.
SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
)


class HubLayout(Layout):
    """Base class of the layouts. A subclass names its entry of the table, and translates names."""

    facts: ClassVar[HubModel]
    embedding: ClassVar[str] = "embed_tokens.weight"
    """Name of the embedding in the library's class."""
    has_prediction_head: ClassVar[bool] = False
    """True for masked language models with layers between encoder and output matrix."""
    output_bias: ClassVar[str | None] = None
    """Published name of the biases of the output; None if there are none."""

    class Config(ComponentConfig):
        """Facts of a model that differ from those of its architecture."""

        mask_token: NonNegativeInt | None = None
        """Id of the mask; by default `mask_token_id` of the configuration, else as in the table."""
        shift: bool | None = None
        """True if the output at a position predicts the token at the next position; by default as
        in the table."""
        block: NonNegativeInt | None = None
        """Number of positions of a block; 0: every position attends to every position; by default
        as in the table."""

    @classmethod
    def build(cls, config: Config) -> HubLayout:
        return cls(config)

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def read_settings(self, files: PublishedFiles) -> dict[str, Any]:
        """Return the configuration of the class of the library.

        Raises DataError for a published configuration whose network the class does not compute.
        """

    @abstractmethod
    def take(self, tensors: PublishedTensors, name: str, shape: torch.Size) -> Tensor:
        """Return the published tensor with the name `name` of the library's class."""

    @property
    def output_name(self) -> str:
        """Published name of the output matrix."""
        return "lm_head.weight"

    def find_library(self, files: PublishedFiles) -> str:
        """Return the model type of the library."""
        assert self.facts.library is not None  # a layout without one overrides this method
        return self.facts.library

    def recognize(self, files: PublishedFiles) -> bool:
        return files.config.get("model_type") == self.facts.model_type

    def read(self, files: PublishedFiles) -> Imported:
        library = self.find_library(files)
        settings = self.read_settings(files)
        num_tokens = settings["vocab_size"]
        mask = self._find_mask(files, num_tokens)
        weights = self._read_weights(files, library, settings, mask)
        shift = self.facts.shift if self.config.shift is None else self.config.shift
        block = self.facts.block if self.config.block is None else self.config.block
        length = min(LONGEST_ROW, settings["max_position_embeddings"])
        recipe: dict[str, Any] = {
            "plugins": ["mdlm", "hf"],
            "data": {"length": length},
            "vocabulary": {"kind": "flat"},
            "process": {"kind": "mdlm"},
            "denoiser": {
                "kind": "hf",
                "architecture": library,
                "settings": settings,
                "bidirectional": self.facts.attention != "causal",
                "shift": shift,
                "prediction_head": self.has_prediction_head,
                "head": "tokens",
            },
            "objective": {},
            "sample": {},
        }
        if block:
            recipe["objective"]["times"] = {"kind": "block", "width": block}
            recipe["sample"] = {"sampler": {"kind": "blockwise", "width": block}, "steps": block}
        notes = [
            f"The mask is the embedding of the id {mask}. The output for this id is left out, and "
            "the distribution is normalized over the other tokens.",
            f"Recorded end of an answer: {self.facts.end}. This was not compared with the program "
            "of the model.",
        ]
        return Imported(recipe, weights, num_tokens, self.facts.tokenizer, notes, must_predict=True)

    def _find_mask(self, files: PublishedFiles, num_tokens: int) -> int:
        """Return the id of the mask. Raises DataError if it is unknown, or has no embedding."""
        mask = self.config.mask_token
        if mask is None:
            mask = files.config.get("mask_token_id", self.facts.mask_token)
        if mask is None and files.tokenizer_directory is not None:
            mask = find_mask_token(files.tokenizer_directory)
        remedy = "Give the id of the mask, as in --layout '{kind = \"a2d\", mask_token = 151669}'."
        if mask is None:
            raise DataError(
                f"{files.source}: the mask id is unknown, because the configuration has no "
                f"mask_token_id, and there is no tokenizer with a mask token. {remedy}"
            )
        if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < num_tokens:
            raise DataError(
                f"{files.source}: the mask id must be below {num_tokens}, the number of embeddings "
                f"(vocab_size); got {mask!r}. {remedy}"
            )
        return mask

    def _read_weights(
        self, files: PublishedFiles, library: str, settings: Mapping[str, Any], mask: int
    ) -> dict[str, Tensor]:
        """Return the state dict of the denoiser."""
        with torch.device("meta"):
            model = make_model(library, settings, self.has_prediction_head)
        weights = {}
        for name, parameter in model.state_dict().items():
            weights[f"backbone.model.{name}"] = self.take(files.tensors, name, parameter.shape)
        # Frequencies of the rotary positions follow from the configuration.
        files.tensors.skip(*(name for name in files.tensors.names if name.endswith("inv_freq")))
        embedding = f"backbone.model.{self.embedding}"
        table = weights[embedding]
        if files.tensors.has(self.output_name):
            output = files.tensors.take(self.output_name, *table.shape)
        elif self._is_tied(files):
            output = table.clone()
        else:
            output = files.tensors.take(self.output_name, *table.shape)  # raises an error
        if self.output_bias is None:
            bias = torch.zeros(len(table), device=table.device)
        else:
            bias = files.tensors.take(self.output_bias, len(table)).clone()
        bias[mask] = NO_OUTPUT
        weights[embedding] = torch.cat([table, table[mask : mask + 1]])
        weights["head.table"] = output
        weights["head.bias"] = bias
        return weights

    def _is_tied(self, files: PublishedFiles) -> bool:
        """Return whether the output matrix is the embedding."""
        return bool(files.config.get("tie_word_embeddings", files.config.get("weight_tying")))


def find_mask_token(directory: Path) -> int | None:
    """Return the id of the mask token in the files of a tokenizer; None if there is none.

    `tokenizer_config.json` names the token, and `tokenizer.json` or `added_tokens.json` has its id.
    """
    config = _read_json(directory / "tokenizer_config.json")
    token = config.get("mask_token")
    if isinstance(token, Mapping):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    for number, added in config.get("added_tokens_decoder", {}).items():
        if added.get("content") == token:
            return int(number)
    definition = _read_json(directory / "tokenizer.json")
    for added in definition.get("added_tokens", []):
        if added.get("content") == token:
            return int(added["id"])
    found = _read_json(directory / "added_tokens.json").get(token)
    return found if isinstance(found, int) else None


def _read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; {} if it is missing. Raises DataError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}). Download it again.") from error
    return content if isinstance(content, dict) else {}


def read_shared_settings(files: PublishedFiles) -> dict[str, Any]:
    """Return the keys of a configuration that has the names of the library."""
    config = files.config
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        files.read_count(key)
    settings = {key: config[key] for key in SHARED_KEYS if config.get(key) is not None}
    settings["rope_parameters"] = read_rope(files)
    require(files, "use_sliding_window", False, config.get("use_sliding_window", False))
    return settings


def read_rope(files: PublishedFiles) -> dict[str, Any]:
    """Return the parameters of the rotary positions, in the form of transformers 5."""
    config = files.config
    if config.get("rope_parameters") is not None:
        return dict(files.read_value("rope_parameters"))
    scaling = dict(config.get("rope_scaling") or {})
    # The key had another name before version 4.43 of the library.
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    return {**scaling, "rope_theta": float(config.get("rope_theta", 10000.0))}


def require(files: PublishedFiles, key: str, expected: Any, found: Any) -> None:
    """Raise DataError if a key of the configuration has another value than the expected one."""
    if found != expected:
        raise DataError(
            f"{files.source}: this layout needs {key} = {json.dumps(expected)}, because the class "
            f"of the transformers library computes no other network; got {json.dumps(found)}. "
            "Import another version of the model, or write a layout for it."
        )


# ---------------------------------------------------------------------- LLaDA


class LladaLayout(HubLayout):
    """LLaDA, with the names of OLMo: a Llama with full attention."""

    facts = HUB_MODELS["llada"]
    names: ClassVar[dict[str, str]] = {
        "embed_tokens": "wte",
        "norm": "ln_f",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
    }
    # Keys whose other values are other networks, with their defaults in the published program.
    required: ClassVar[dict[str, tuple[Any, Any]]] = {
        "block_type": ("llama", "sequential"),
        "activation_type": ("silu", "swiglu"),
        "layer_norm_type": ("rms", "default"),
        "rope": (True, False),
        "alibi": (False, False),
        "include_bias": (False, False),
        "include_qkv_bias": (False, False),
        "attention_layer_norm": (False, False),
        "scale_logits": (False, False),
        "input_emb_norm": (False, False),
        "block_group_size": (1, 1),
    }

    @property
    def output_name(self) -> str:
        return "model.transformer.ff_out.weight"

    def recognize(self, files: PublishedFiles) -> bool:
        # LLaDA-MoE has the same model_type, and the key hidden_size in place of d_model.
        return super().recognize(files) and "d_model" in files.config

    def read_settings(self, files: PublishedFiles) -> dict[str, Any]:
        config = files.config
        for key, (expected, default) in self.required.items():
            require(files, key, expected, config.get(key, default))
        heads = files.read_count("n_heads")
        groups = heads if config.get("n_kv_heads") is None else files.read_count("n_kv_heads")
        width = files.read_count("d_model")
        hidden = config.get("mlp_hidden_size")
        return {
            "vocab_size": config.get("embedding_size") or files.read_count("vocab_size"),
            "hidden_size": width,
            "intermediate_size": hidden or width * files.read_count("mlp_ratio"),
            "num_hidden_layers": files.read_count("n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": 1 if config.get("multi_query_attention") else groups,
            "max_position_embeddings": files.read_count("max_sequence_length"),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
            "rope_parameters": read_rope(files),
        }

    def take(self, tensors: PublishedTensors, name: str, shape: torch.Size) -> Tensor:
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if layer is None:
            published = self.names[name.removesuffix(".weight")]
        else:
            published = f"blocks.{layer[1]}.{self.names[layer[2]]}"
        return tensors.take(f"model.transformer.{published}.weight", *shape)


# ---------------------------------------------------------------------- Dream and A2D


class DreamLayout(HubLayout):
    """Dream: a Qwen2 with full attention, whose outputs are shifted."""

    facts = HUB_MODELS["dream"]

    def read_settings(self, files: PublishedFiles) -> dict[str, Any]:
        return read_shared_settings(files)

    def take(self, tensors: PublishedTensors, name: str, shape: torch.Size) -> Tensor:
        return tensors.take(f"model.{name}", *shape)


class A2DLayout(DreamLayout):
    """Autoregressive models with full attention, trained by dllm as masked models.

    The model type is "a2d-" and the type of the library, such as "a2d-qwen3".
    """

    facts = HUB_MODELS["a2d"]

    def recognize(self, files: PublishedFiles) -> bool:
        return str(files.config.get("model_type", "")).startswith(self.facts.model_type)

    def find_library(self, files: PublishedFiles) -> str:
        library = str(files.config.get("model_type", "")).removeprefix(self.facts.model_type)
        if library not in SUPPORTED:
            raise DataError(
                f"{files.source}: the layout a2d reads the model types "
                f"{', '.join(self.facts.model_type + name for name in SUPPORTED[:3])}; got "
                f"{files.config.get('model_type')!r}. Write a layout for this model."
            )
        return library


# ---------------------------------------------------------------------- ModernBERT


class ModernBertLayout(HubLayout):
    """ModernBERT as a masked language model, which dllm trained on conversations."""

    facts = HUB_MODELS["modernbert"]
    embedding = "model.embeddings.tok_embeddings.weight"
    has_prediction_head = True
    output_bias = "decoder.bias"

    @property
    def output_name(self) -> str:
        return "decoder.weight"

    def recognize(self, files: PublishedFiles) -> bool:
        # Other classes, such as classifiers, have no output for tokens.
        classes = files.config.get("architectures") or ()
        return super().recognize(files) and any("ForMaskedLM" in name for name in classes)

    def read_settings(self, files: PublishedFiles) -> dict[str, Any]:
        from transformers import ModernBertConfig

        keys = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        counts = {key: files.read_count(key) for key in keys}
        try:
            # The library translates keys of earlier versions.
            config = ModernBertConfig.from_dict(dict(files.config)).to_dict()
        except Exception as error:  # the library has many error classes
            raise DataError(
                f"{files.source}: the configuration is not one of ModernBERT ({error}). Use the "
                "configuration that was published with the weights."
            ) from error
        defaults = ModernBertConfig().to_dict()
        changed = {
            key: config[key]
            for key, value in defaults.items()
            if key not in NOT_OF_THE_NETWORK and config[key] is not None and config[key] != value
        }
        return {**changed, **counts}

    def take(self, tensors: PublishedTensors, name: str, shape: torch.Size) -> Tensor:
        return tensors.take(name, *shape)

    def _is_tied(self, files: PublishedFiles) -> bool:
        return bool(files.config.get("tie_word_embeddings", True))


# ---------------------------------------------------------------------- LLaDA2


class Llada2Layout(HubLayout):
    """LLaDA2: a mixture of experts with attention to earlier blocks, the network of GLM-4.5."""

    facts = HUB_MODELS["llada2"]
    names: ClassVar[dict[str, str]] = {
        "embed_tokens": "word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
    }

    def read_settings(self, files: PublishedFiles) -> dict[str, Any]:
        config = files.config
        for key, expected, default in (
            ("use_qkv_bias", False, False),
            ("use_bias", False, True),
            ("use_qk_norm", True, True),
            ("norm_head", False, False),
            ("score_function", "sigmoid", "sigmoid"),
        ):
            require(files, key, expected, config.get(key, default))
        settings = read_shared_settings(files)
        width = settings.pop("head_dim", None)
        usual = files.read_count("hidden_size") // files.read_count("num_attention_heads")
        require(files, "head_dim", usual, width or usual)
        settings["rope_parameters"].setdefault(
            "partial_rotary_factor", config.get("partial_rotary_factor", 0.5)
        )
        return {
            **settings,
            "moe_intermediate_size": files.read_count("moe_intermediate_size"),
            "num_experts_per_tok": files.read_count("num_experts_per_tok"),
            "n_shared_experts": files.read_count("num_shared_experts"),
            "n_routed_experts": files.read_count("num_experts"),
            "routed_scaling_factor": float(config.get("routed_scaling_factor", 2.5)),
            "n_group": files.read_count("n_group"),
            "topk_group": files.read_count("topk_group"),
            "first_k_dense_replace": config.get("first_k_dense_replace", 0),
            "norm_topk_prob": files.read_count("num_experts_per_tok") > 1,
            "use_qk_norm": True,
            "num_mtp_layers": 0,
        }

    def take(self, tensors: PublishedTensors, name: str, shape: torch.Size) -> Tensor:
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            stem = name.removesuffix(".weight")
            return tensors.take(f"model.{self.names.get(stem, stem)}.weight", *shape)
        prefix = f"model.layers.{layer[1]}."
        own = tensors.without_prefix(prefix)
        stem = layer[2].removesuffix(".weight")
        if stem in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return self._take_projection(own, stem[-6], shape)
        if stem == "mlp.gate.e_score_correction_bias":
            return own.take("mlp.gate.expert_bias", *shape)
        if stem == "mlp.experts.gate_up_proj":
            experts, rows, width = shape
            parts = [
                torch.cat(
                    [
                        own.take(f"mlp.experts.{expert}.{part}_proj.weight", rows // 2, width)
                        for part in ("gate", "up")
                    ]
                )
                for expert in range(experts)
            ]
            return torch.stack(parts)
        if stem == "mlp.experts.down_proj":
            experts, *size = shape
            return torch.stack(
                [
                    own.take(f"mlp.experts.{expert}.down_proj.weight", *size)
                    for expert in range(experts)
                ]
            )
        return own.take(f"{self.names.get(stem, stem)}.weight", *shape)

    def _take_projection(self, own: PublishedTensors, part: str, shape: torch.Size) -> Tensor:
        """Return the rows of queries, keys or values (`part` is "q", "k" or "v")."""
        name = "attention.query_key_value.weight"
        rows, *_ = own.shape(name)
        # The keys and values have equally many rows, and come after the queries.
        joined = own.take(name, rows, shape[1])
        groups = shape[0] if part != "q" else (rows - shape[0]) // 2
        sizes = [rows - 2 * groups, groups, groups]
        found = joined.split(sizes)["qkv".index(part)]
        if found.shape != shape:
            raise DataError(
                f"{own.source}: the tensor {name} must have {shape[0]} rows of {part}, as follows "
                f"from the configuration; it has {rows} rows for queries, keys and values. Use the "
                "configuration that was published with these weights."
            )
        return found.clone()
