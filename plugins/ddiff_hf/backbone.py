"""Encoders and decoders of the transformers library as trunks: theirs is the stack of layers, the sight is the engine's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ddiff import (
    ArgumentError,
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
class PretrainedBackbone(nn.Module):
    """ids [B,L] of any level -> the model's last hidden states [B,L,width]; times are not read.

    Everybody sees everybody unless the engine says otherwise: its mask takes the place of the model's own, a decoder's
    causal one included. The table of embeddings has a row per state: words keep the model's first V rows, nodes start as
    the mean of their words. ArgumentError for a model that this cannot be done to.
    """

    reads_time = False

    class Config(ComponentConfig):
        """Which model, and how much of it."""

        path: str | None = None
        """A local directory, or a name on the hub."""
        pretrained: bool = True
        """With its weights; else its architecture alone, with weights drawn anew."""
        architecture: str | None = None
        """In place of a path: one of the library's model types, such as "bert" or "llama", with weights drawn anew."""
        settings: dict[str, int | float | bool | str] = Field(default_factory=dict)
        """What that architecture's configuration is told: `hidden_size`, `num_hidden_layers`, ..."""
        bidirectional: bool = True
        """Everybody sees everybody; false leaves a decoder's positions blind for what comes later."""
        mask_token: NonNegativeInt | None = None
        """The model's own mask, a row of its embeddings that the mask starts from; else the mean of the words."""

        @model_validator(mode="after")
        def _one_model(self) -> Self:
            if (self.path is None) == (self.architecture is None) or (
                self.settings and self.architecture is None
            ):
                raise ValueError(
                    "name either a path or an architecture, which alone takes settings"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, length: int) -> PretrainedBackbone:
        if config.architecture is not None:
            model, pretrained = make_model(config.architecture, config.settings), False
        else:
            model, pretrained = load_model(str(config.path), config.pretrained), config.pretrained
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
        longest = getattr(model.config, "max_position_embeddings", None)
        self.first_position = _first_position(model)
        if longest is not None and length > longest - self.first_position:
            raise ArgumentError(
                f"PretrainedBackbone: {type(model).__name__} has {longest - self.first_position} positions; got rows of "
                f"{length} tokens. Set [data] length to at most that."
            )
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.model = model
        model.set_input_embeddings(_embedding(model, vocabulary, mask_token, pretrained))

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        if context.conditions:
            raise ArgumentError(
                f"PretrainedBackbone: this trunk reads no conditions; got {sorted(context.conditions)}. Take the backbone "
                '"dit", or leave them out of the batch.'
            )
        given: dict[str, Any] = {"use_cache": False} if self.takes_cache else {}
        positions = context.positions(ids.shape[1], ids.device)
        if self.takes_positions:
            given["position_ids"] = (positions + self.first_position).expand(ids.shape)
        elif context.sight is not None and context.sight.noisy is not None:
            raise ArgumentError(
                f"PretrainedBackbone: {type(self.model).__name__} numbers its positions itself, so the clean words cannot "
                "stand beside the noisy ones. Set [objective] times.paired = false."
            )
        mask = self._mask(ids, positions, context)
        return self.model(input_ids=ids, attention_mask=mask, **given).last_hidden_state

    @property
    def table(self) -> StateEmbedding:
        """The embeddings of all states, which the model holds."""
        held: Any = self.model.get_input_embeddings()
        return held

    def _mask(self, ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """[B,1,L,L] what is added to the logits of attention: 0 where a column is seen. Never None, which a decoder takes
        for causal."""
        visible = context.attention_mask()
        length = ids.shape[1]
        if visible is None:
            visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device)
        if not self.bidirectional:
            visible = visible & (positions <= positions.unsqueeze(-1))
        dtype = self.table.weight.dtype
        closed = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )
        return closed.expand(len(ids), -1, -1, -1)


def load_model(path: str, pretrained: bool = True) -> PreTrainedModel:
    """The bare model of a directory or hub name, in float32, none of whose own code is run.

    DataError when there is none, ArgumentError for an encoder with a decoder.
    """
    from transformers import AutoConfig, AutoModel  # seconds to import

    config = load_pretrained(AutoConfig.from_pretrained, path, "model")
    _check_one_stack(config)
    on_meta = (
        torch.get_default_device().type == "meta"
    )  # only shapes are wanted there, and the library refuses to load
    if pretrained and not on_meta:
        return load_pretrained(AutoModel.from_pretrained, path, "model", dtype=torch.float32)
    model: PreTrainedModel = load_pretrained(
        lambda _, **options: AutoModel.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        ),
        path,
        "model",
    )
    return model


def make_model(architecture: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """A model of one of the library's types with weights drawn anew; ArgumentError when the library knows no such type."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if architecture not in MODEL_MAPPING_NAMES:
        raise ArgumentError(
            f'PretrainedBackbone: architecture must be a model type of the transformers library; got "{architecture}". '
            "Some are bert, roberta, modernbert, gpt2, llama, qwen3."
        )
    config = AutoConfig.for_model(architecture, **settings)
    unknown = sorted(set(settings) - set(type(config)().to_dict()) - set(config.attribute_map))
    if unknown:
        raise ArgumentError(
            f"PretrainedBackbone: settings must be keys of {type(config).__name__}; it knows no {', '.join(unknown)}."
        )
    _check_one_stack(config)
    return AutoModel.from_config(config, dtype=torch.float32)


def _check_one_stack(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ArgumentError(
            f"PretrainedBackbone: the model must be one stack, an encoder or a decoder; a {config.model_type} is both. "
            "Take e.g. a BERT, GPT-2 or Llama."
        )


def _embedding(
    model: PreTrainedModel, vocabulary: Vocabulary, mask_token: int | None, pretrained: bool
) -> StateEmbedding:
    """A row per state, words as the model has them."""
    table: Any = model.get_input_embeddings()
    theirs: Tensor = table.weight.detach()
    if mask_token is not None and (mask_token >= len(theirs) or vocabulary.mask_id is None):
        raise ArgumentError(
            f"PretrainedBackbone: mask_token must be one of the model's {len(theirs)} embeddings, for a vocabulary with a "
            f"mask; got {mask_token} for {vocabulary}."
        )
    own = StateEmbedding(vocabulary, theirs.shape[1])
    if not pretrained:
        return own
    if len(theirs) < vocabulary.num_tokens:
        raise ArgumentError(
            f"PretrainedBackbone: the model has embeddings of {len(theirs)} tokens; got a vocabulary of "
            f'{vocabulary.num_tokens} words. Use its own tokenizer, [tokenizer] kind = "pretrained" with the same path, or '
            "pretrained = false."
        )
    own.start_from_words(theirs[: vocabulary.num_tokens])
    if mask_token is not None:
        with torch.no_grad():
            own.weight[vocabulary.mask_id] = theirs[mask_token]
    return own


def _first_position(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from one past the padding's id."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1
