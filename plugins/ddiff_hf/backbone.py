"""Encoders and decoders of the transformers library as backbones.

The model contributes its stack of layers. Embeddings have a row per state of the vocabulary, and
the attention mask is that of the denoiser.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ddiff import (
    ArgumentError,
    Backbone,
    ComponentConfig,
    Context,
    NonNegativeInt,
    StateEmbedding,
    Vocabulary,
    load_pretrained,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
class PretrainedBackbone(Backbone):
    """Pretrained model: ids [B,L] of any level -> last hidden states [B,L,width].

    Times are not used. The denoiser's mask replaces the model's own mask, a decoder's causal mask
    included, so that by default every position attends to every position. Tokens keep the model's
    first V embeddings, nodes start as the mean of the embeddings of their tokens. Raises
    ArgumentError for models without these parts.
    """

    reads_time = False

    class Config(ComponentConfig):
        """Model and the parts of it that are used."""

        path: str | None = None
        """Local directory, or a name on the hub."""
        pretrained: bool = True
        """Load the pretrained weights; if false, only the architecture with random weights."""
        architecture: str | None = None
        """Instead of path: a model type, such as "bert" or "llama", with random weights."""
        settings: dict[str, int | float | bool | str] = Field(default_factory=dict)
        """Configuration of that architecture: `hidden_size`, `num_hidden_layers`, ..."""
        bidirectional: bool = True
        """Every position attends to every position; false keeps a decoder causal."""
        mask_token: NonNegativeInt | None = None
        """Token id whose embedding the mask starts from; by default the mean of the tokens."""

        @model_validator(mode="after")
        def _check_one_model(self) -> Self:
            both_or_none = (self.path is None) == (self.architecture is None)
            settings_of_path = self.settings and self.architecture is None
            if both_or_none or settings_of_path:
                raise ValueError(
                    "name either a path or an architecture; only an architecture takes settings"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, length: int) -> PretrainedBackbone:
        if config.architecture is not None:
            model = make_model(config.architecture, config.settings)
            pretrained = False
        else:
            model = load_model(str(config.path), config.pretrained)
            pretrained = config.pretrained
        return cls(model, vocabulary, length, config.bidirectional, config.mask_token, pretrained)

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        length: int,
        bidirectional: bool = True,
        mask_token: int | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.width: int = model.config.hidden_size
        self.first_position = _find_first_position(model)
        table_size = getattr(model.config, "max_position_embeddings", None)
        if table_size is not None and length > table_size - self.first_position:
            raise ArgumentError(
                f"PretrainedBackbone: {type(model).__name__} has "
                f"{table_size - self.first_position} positions; got rows of {length} tokens. "
                "Set [data] length to at most that."
            )
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.takes_cache = "use_cache" in parameters
        self.model = model
        embedding = _make_embedding(model, vocabulary, mask_token, pretrained)
        model.set_input_embeddings(embedding)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        if context.conditions:
            raise ArgumentError(
                "PretrainedBackbone: this backbone takes no conditions; "
                f"got {sorted(context.conditions)}. "
                'Take the backbone "dit", or leave them out of the batch.'
            )
        options: dict[str, Any] = {"use_cache": False} if self.takes_cache else {}
        positions = context.positions(ids.shape[1], ids.device)
        if self.takes_positions:
            options["position_ids"] = (positions + self.first_position).expand(ids.shape)
        elif context.layout is not None and context.layout.noisy is not None:
            raise ArgumentError(
                f"PretrainedBackbone: {type(self.model).__name__} numbers its positions itself, so "
                "that a clean and a noisy token cannot share one. "
                "Set [objective] times.paired = false."
            )
        mask = self._make_mask(ids, positions, context)
        return self.model(input_ids=ids, attention_mask=mask, **options).last_hidden_state

    @property
    def table(self) -> StateEmbedding:
        """Embeddings of all states, which the model holds."""
        embedding: Any = self.model.get_input_embeddings()
        return embedding

    def _make_mask(self, ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Return the additive attention mask [B,1,L,L]: 0 where a position is attended to.

        It is never None, since a decoder would then apply its causal mask.
        """
        visible = context.attention_mask()
        length = ids.shape[1]
        if visible is None:
            visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device)
        if not self.bidirectional:
            visible = visible & (positions <= positions.unsqueeze(-1))
        dtype = self.table.weight.dtype
        zeros = torch.zeros(visible.shape, dtype=dtype, device=ids.device)
        # The smallest finite value and not -inf: a row that attends to nothing stays finite.
        mask = zeros.masked_fill(~visible, torch.finfo(dtype).min)
        return mask.expand(len(ids), -1, -1, -1)


def load_model(path: str, pretrained: bool = True) -> PreTrainedModel:
    """Load the model of a directory or hub name without its output layer, in float32.

    Code that the model ships is never run. Raises DataError if there is no model, ArgumentError
    for an encoder-decoder.
    """
    from transformers import AutoConfig, AutoModel  # takes seconds to import

    config = load_pretrained(AutoConfig.from_pretrained, path, "model")
    _check_one_stack(config)
    # On the meta device only shapes are needed, and the library refuses to load weights there.
    on_meta = torch.get_default_device().type == "meta"
    if pretrained and not on_meta:
        return load_pretrained(AutoModel.from_pretrained, path, "model", dtype=torch.float32)

    def from_config(path: str, **options: Any) -> PreTrainedModel:
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)

    model: PreTrainedModel = load_pretrained(from_config, path, "model")
    return model


def make_model(architecture: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Build a model of one of the library's types with random weights.

    Raises ArgumentError if the library has no such type.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if architecture not in MODEL_MAPPING_NAMES:
        raise ArgumentError(
            "PretrainedBackbone: architecture must be a model type of the transformers library; "
            f'got "{architecture}". Some are bert, roberta, modernbert, gpt2, llama, qwen3.'
        )
    config = AutoConfig.for_model(architecture, **settings)
    # A configuration accepts any keyword, so that misspelt keys must be found here.
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ArgumentError(
            f"PretrainedBackbone: settings must be keys of {type(config).__name__}; "
            f"it knows no {', '.join(unknown)}."
        )
    _check_one_stack(config)
    return AutoModel.from_config(config, dtype=torch.float32)


def _check_one_stack(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ArgumentError(
            "PretrainedBackbone: the model must be one stack, an encoder or a decoder; "
            f"a {config.model_type} is both. Take e.g. a BERT, GPT-2 or Llama."
        )


def _make_embedding(
    model: PreTrainedModel, vocabulary: Vocabulary, mask_token: int | None, pretrained: bool
) -> StateEmbedding:
    """Return an embedding with a row per state that starts from the model's own embedding."""
    table: Any = model.get_input_embeddings()
    weight: Tensor = table.weight.detach()
    if mask_token is not None and (mask_token >= len(weight) or vocabulary.mask_id is None):
        raise ArgumentError(
            f"PretrainedBackbone: mask_token must be one of the model's {len(weight)} embeddings, "
            f"for a vocabulary with a mask; got {mask_token} for {vocabulary}."
        )
    embedding = StateEmbedding(vocabulary, weight.shape[1])
    if not pretrained:
        return embedding
    if len(weight) < vocabulary.num_tokens:
        raise ArgumentError(
            f"PretrainedBackbone: the model has embeddings of {len(weight)} tokens; got a "
            f"vocabulary of {vocabulary.num_tokens} tokens. Use the model's tokenizer, "
            '[tokenizer] kind = "pretrained" with the same path, or pretrained = false.'
        )
    embedding.start_from_tokens(weight[: vocabulary.num_tokens])
    if mask_token is not None:
        with torch.no_grad():
            embedding.weight[vocabulary.mask_id] = weight[mask_token]
    return embedding


def _find_first_position(model: PreTrainedModel) -> int:
    """Return the number of the first position: one past the padding id for RoBERTa's family."""
    table = dict(model.named_modules()).get("embeddings.position_embeddings")
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        return int(table.padding_idx) + 1
    return 0
