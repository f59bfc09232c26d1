"""Encoders and decoders of the transformers library as backbones.

The layers of the model are used unchanged. The embedding of the model is replaced by a table with
one row per state of the vocabulary, and its attention mask by the attention mask of the denoiser.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, final

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
    """Backbone made from a transformers model: state ids [B,L] -> hidden states [B,L,width].

    Noise times are not used. The attention mask of the denoiser replaces that of the model, so that
    by default every position attends to every position, also in a decoder.

    Args:
        model: the model, without its output layer.
        length: number of positions of a sequence.
        bidirectional: False: a position attends only to itself and to earlier positions.
        mask_token: id of the token in the model whose embedding initializes the mask. None: the
            mask starts as the mean of all tokens.
        shift: True: the hidden state of a position is that of the position before it, as in an
            autoregressive model, whose output at position i - 1 predicts the token at position i.
            See `_find_sources`.
        prediction_head: True: `model` is a masked language model. Its layers after the encoder
            are applied, without the output matrix.
        pretrained: whether the V tokens start with the first V embeddings of the model, and a node
            of a tree with the mean of the embeddings of its tokens. False: random embeddings.

        head_path: path of the model, if the head starts with its output matrix, else None.

    Raises ArgumentError if the model has too few positions or embeddings.
    """

    reads_time = False
    library_prefix = "backbone.model."

    class Config(ComponentConfig):
        """Settings of the backbone: a model by `path`, or a new one by `architecture`."""

        path: str | None = None
        """Local directory with the model, or its name on the hub."""
        pretrained: bool = True
        """Load the pretrained weights; false: the architecture of the model with random weights."""
        architecture: str | None = None
        """Model type such as "bert" or "llama", built with random weights; in place of `path`."""
        settings: dict[str, Any] = Field(default_factory=dict)
        """Keys of the configuration of `architecture`: `hidden_size`, `num_hidden_layers`, ..."""
        bidirectional: bool = True
        """true: every position attends to every position; false: only to earlier positions."""
        shift: bool = False
        """true: the output at a position predicts the token at the next position, as in
        autoregressive models and in models that were made from them, such as Dream."""
        prediction_head: bool = False
        """true: apply the layers between encoder and output matrix of a masked language model, such
        as BERT; false: the head reads the last hidden states of the encoder."""
        mask_token: NonNegativeInt | None = None
        """Id of the token whose embedding initializes the mask; by default the mask starts as the
        mean of all tokens."""

        pretrained_head: bool = False
        """Start the head with the output matrix of the model, a decoder with pretrained weights;
        false: the head starts from token counts."""

        @model_validator(mode="after")
        def _check_one_model(self) -> Self:
            both_or_none = (self.path is None) == (self.architecture is None)
            settings_of_path = self.settings and self.architecture is None
            if both_or_none or settings_of_path:
                raise ValueError(
                    "exactly one of path and architecture must be given, and settings only with "
                    f"an architecture; got path = {self.path!r}, architecture = "
                    f"{self.architecture!r} and {len(self.settings)} settings"
                )
            if self.pretrained_head and (self.path is None or not self.pretrained):
                raise ValueError("pretrained_head = true needs path, and pretrained = true")
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary, length: int) -> PretrainedBackbone:
        if config.architecture is not None:
            model = make_model(config.architecture, config.settings, config.prediction_head)
            pretrained = False
        else:
            model = load_model(str(config.path), config.pretrained, config.prediction_head)
            pretrained = config.pretrained
        return cls(
            model,
            vocabulary,
            length,
            config.bidirectional,
            config.mask_token,
            pretrained,
            config.shift,
            config.prediction_head,
            config.path if config.pretrained_head else None,
        )

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        length: int,
        bidirectional: bool = True,
        mask_token: int | None = None,
        pretrained: bool = True,
        shift: bool = False,
        prediction_head: bool = False,
        head_path: str | None = None,
    ) -> None:
        super().__init__()
        self.has_prediction_head = prediction_head
        self.is_pretrained = pretrained
        self.head_path = head_path
        self.bidirectional = bidirectional
        self.is_shifted = shift
        self.width: int = model.config.hidden_size
        self.first_position = _find_first_position(model)
        # RoBERTa's family reserves the first rows of the position table for padding.
        table_size = getattr(model.config, "max_position_embeddings", None)
        if table_size is not None and length > table_size - self.first_position:
            raise ArgumentError(
                f"PretrainedBackbone: [data] length must be at most "
                f"{table_size - self.first_position}, the largest sequence length of "
                f"{type(model).__name__}; got {length}. Use shorter rows or another model."
            )
        # Models differ in the arguments that they accept; unknown arguments would be an error.
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.takes_cache = "use_cache" in parameters
        self.local_layers = _find_local_layers(model)
        self.model = model
        embedding = _make_embedding(model, vocabulary, mask_token, pretrained)
        model.set_input_embeddings(embedding)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        if context.conditions:
            raise ArgumentError(
                "PretrainedBackbone: context.conditions must be empty, since this backbone has no "
                f"conditions; got {sorted(context.conditions)}. "
                'Use the backbone "dit", or remove the conditions from the batch.'
            )
        options: dict[str, Any] = {"use_cache": False} if self.takes_cache else {}
        positions = context.positions(ids.shape[1], ids.device)
        if self.takes_positions:
            # The clean and the noisy copy of a position have the same position id.
            options["position_ids"] = (positions + self.first_position).expand(ids.shape)
        elif context.layout is not None and context.layout.noisy is not None:
            raise ArgumentError(
                f"PretrainedBackbone: paired windows need a model that takes position_ids; "
                f"{type(self.model).__name__} numbers its positions itself, so that the clean and "
                "the noisy token of a position would get different numbers. "
                "Set [objective] times.paired = false."
            )
        mask = self._make_mask(ids, positions, context)
        local = self.local_layers
        masks: Tensor | dict[str, Tensor] = mask
        if local is not None:
            near = (positions - positions.unsqueeze(-1)).abs() <= local.distance
            limited = mask.masked_fill(~near, torch.finfo(mask.dtype).min)
            # The model chooses the mask of each layer by the type of the layer.
            masks = limited
            if local.is_mixed:
                masks = {"full_attention": mask, "sliding_attention": limited}
        output = self.model(input_ids=ids, attention_mask=masks, **options)
        # Without an output matrix, the logits are the hidden states before it.
        hidden = output.logits if self.has_prediction_head else output.last_hidden_state
        if self.is_shifted:
            sources = _find_sources(ids, context).unsqueeze(-1).expand(hidden.shape)
            hidden = hidden.gather(1, sources)
        return hidden

    @property
    def has_pretrained_output(self) -> bool:
        return self.head_path is not None

    def pretrained_output(self) -> Tensor | None:
        if self.head_path is None:
            return None
        if self.model.config.tie_word_embeddings:
            return self.table.weight.detach()[: self.table.vocabulary.num_tokens]
        return load_output(self.head_path)

    @property
    def table(self) -> StateEmbedding:
        """Embedding table of all states, which replaces the input embedding of the model."""
        embedding: Any = self.model.get_input_embeddings()
        return embedding

    def _make_mask(self, ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Return the attention mask [B,1,L,L] that the model adds to its attention scores.

        An entry is 0 if the query may attend to the key, else the smallest finite number. The mask
        is that of `context`, combined with a causal mask over `positions` if `bidirectional` is
        False. The result is never None, since a decoder without a mask would apply its causal mask.
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


class LocalLayers(NamedTuple):
    """Layers whose positions attend only to near positions.

    distance: largest distance between two positions that attend to each other.
    is_mixed: whether the model also has layers with full attention.
    """

    distance: int
    is_mixed: bool


def _find_local_layers(model: PreTrainedModel) -> LocalLayers | None:
    """Return the local layers of a model, such as those of ModernBERT; None if it has none.

    Raises ArgumentError if the model has layers without attention, which no mask makes
    bidirectional.
    """
    settings = model.config.to_dict()
    kinds = set(settings.get("layer_types") or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ArgumentError(
            "PretrainedBackbone: the layers of the model must have full or sliding attention; got "
            f"layers of the type {', '.join(sorted(unknown))}, which no attention mask makes "
            "bidirectional. Use another model."
        )
    # Without a list of types, all layers have the window of the configuration.
    if "sliding_attention" not in kinds and (kinds or settings.get("sliding_window") is None):
        return None
    window: int = model.config.sliding_window
    # The window of a decoder contains the position itself.
    is_decoder = any(vars(module).get("is_causal") for module in model.modules())
    distance = window - 1 if is_decoder else window
    return LocalLayers(distance, is_mixed=bool(kinds))


def _find_sources(ids: Tensor, context: Context) -> Tensor:
    """Return for each input the number [B or 1,n] of the input whose hidden state predicts it.

    This is the input of the position before it. There are two special cases:

    - The first position of a sequence or document has no position before it, and uses its own
      hidden state, as Dream does (arXiv 2508.15487).
    - A noisy input at the start of a block uses the clean input before it, because the noisy input
      before it is in an earlier block. This equals a pass over the clean earlier blocks.
    """
    length = ids.shape[1]
    number = torch.arange(length, device=ids.device).unsqueeze(0)
    source = (number - 1).clamp(min=0)
    layout = context.layout
    if layout is not None and layout.noisy is not None:
        # The clean inputs come first, so that the noisy input of position i has the number L + i.
        num_clean = length // 2
        is_same_block = torch.ones_like(layout.block, dtype=torch.bool)
        is_same_block[:, 1:] = layout.block[:, 1:] == layout.block[:, :-1]
        is_same_block[:, num_clean] = True
        source = torch.where(layout.noisy & ~is_same_block, source - num_clean, source)
        source[:, num_clean] = num_clean
    if context.document is not None:
        is_first = torch.ones_like(context.document, dtype=torch.bool)
        is_first[:, 1:] = context.document[:, 1:] != context.document[:, :-1]
        source = torch.where(is_first, number, source)
    return source.expand(len(ids), -1)


def load_model(
    path: str, pretrained: bool = True, prediction_head: bool = False
) -> PreTrainedModel:
    """Load a model of the transformers library without its output matrix, in float32.

    `path` is a local directory or a name on the hub. With `pretrained=False` only the architecture
    is loaded, and weights are random. With `prediction_head=True` the model is a masked language
    model. Code in the repository of the model is never run.

    Raises DataError if there is no model, and ArgumentError if the model is an encoder-decoder.
    """
    from transformers import AutoConfig  # takes seconds to import

    loader = _choose_loader(prediction_head)
    config = load_pretrained(AutoConfig.from_pretrained, path, "model")
    _check_one_stack(config)
    # On the meta device only shapes are needed, and the library refuses to load weights onto it.
    on_meta = torch.get_default_device().type == "meta"
    if pretrained and not on_meta:
        model = load_pretrained(loader.from_pretrained, path, "model", dtype=torch.float32)
        return _remove_output_matrix(model) if prediction_head else model

    def from_config(path: str, **options: Any) -> PreTrainedModel:
        return loader.from_config(config, dtype=torch.float32, trust_remote_code=False)

    model = load_pretrained(from_config, path, "model")
    return _remove_output_matrix(model) if prediction_head else model


def load_output(path: str) -> Tensor:
    """Return the output matrix [n,width] of a pretrained decoder.

    Raises ArgumentError if the model has no output matrix.
    """
    from transformers import AutoModelForCausalLM  # takes seconds to import

    model = load_pretrained(
        AutoModelForCausalLM.from_pretrained, path, "model", dtype=torch.float32
    )
    output = model.get_output_embeddings()
    if output is None:
        raise ArgumentError(
            f"PretrainedBackbone: pretrained_head = true needs a model with an output matrix; got "
            f"{type(model).__name__} in {path!r}. Leave pretrained_head out."
        )
    return output.weight.detach()


def make_model(
    architecture: str, settings: Mapping[str, Any], prediction_head: bool = False
) -> PreTrainedModel:
    """Build a randomly initialized model of the transformers library.

    `architecture` is a model type such as "bert", and `settings` are keys of its configuration.
    With `prediction_head=True` the model is a masked language model without its output matrix.
    Raises ArgumentError if the library has no such type, or the configuration no such key.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    if prediction_head and architecture not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ArgumentError(
            "PretrainedBackbone: prediction_head needs a masked language model of the transformers "
            f'library, such as bert, roberta or modernbert; got "{architecture}". Set '
            "prediction_head = false."
        )
    if architecture not in MODEL_MAPPING_NAMES:
        raise ArgumentError(
            "PretrainedBackbone: architecture must be a model type of the transformers library; "
            f'got "{architecture}". Use e.g. bert, roberta, modernbert, gpt2, llama or qwen3.'
        )
    config = AutoConfig.for_model(architecture, **settings)
    # The library accepts any keyword without an error, so that misspelt keys are found here.
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ArgumentError(
            f"PretrainedBackbone: settings must be keys of {type(config).__name__}; "
            f"got the unknown keys {', '.join(unknown)}. Correct or remove them."
        )
    _check_one_stack(config)
    # While transformers loads a saved model, the default dtype is that of its weights, for example
    # bfloat16.
    dtype = torch.get_default_dtype()
    model = _choose_loader(prediction_head).from_config(config, dtype=dtype)
    return _remove_output_matrix(model) if prediction_head else model


def _choose_loader(prediction_head: bool) -> Any:
    """Return the class of the library that loads models with or without a prediction head."""
    from transformers import AutoModel, AutoModelForMaskedLM

    return AutoModelForMaskedLM if prediction_head else AutoModel


def _remove_output_matrix(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the output matrix of a masked language model by the identity, in place."""
    matrix = model.get_output_embeddings()
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child is not matrix:
                continue
            setattr(parent, name, nn.Identity())
            # In the family of BERT, the bias is also a parameter of the parent.
            if "bias" in dict(parent.named_parameters(recurse=False)):
                del parent.bias
    return model


def _check_one_stack(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ArgumentError(
            "PretrainedBackbone: the model must be an encoder or a decoder; got the "
            f"encoder-decoder {config.model_type}. Use e.g. a BERT, GPT-2 or Llama."
        )


def _make_embedding(
    model: PreTrainedModel, vocabulary: Vocabulary, mask_token: int | None, pretrained: bool
) -> StateEmbedding:
    """Return an embedding with one row per state of the vocabulary.

    If `pretrained` is true, the rows are initialized from the token embedding of `model`. The row
    of the mask is initialized from the embedding of the token with the id `mask_token`.
    """
    table: Any = model.get_input_embeddings()
    weight: Tensor = table.weight.detach()
    if mask_token is not None and (mask_token >= len(weight) or vocabulary.mask_id is None):
        raise ArgumentError(
            f"PretrainedBackbone: mask_token must be below {len(weight)}, the number of embeddings "
            f"of the model, and needs a vocabulary with a mask; got {mask_token} and {vocabulary}. "
            "Use the id of the model's mask token, or leave mask_token out."
        )
    embedding = StateEmbedding(vocabulary, weight.shape[1])
    if not pretrained:
        return embedding
    if len(weight) < vocabulary.num_tokens:
        raise ArgumentError(
            f"PretrainedBackbone: the vocabulary must have at most {len(weight)} tokens, the "
            f"embeddings of the model; got {vocabulary.num_tokens}. Use the model's tokenizer, "
            '[tokenizer] kind = "pretrained" with the same path, or pretrained = false.'
        )
    # Models may have more rows than tokens, for example padded to a multiple of 64.
    embedding.start_from_tokens(weight[: vocabulary.num_tokens])
    if mask_token is not None:
        with torch.no_grad():
            embedding.weight[vocabulary.mask_id] = weight[mask_token]
    return embedding


def _find_first_position(model: PreTrainedModel) -> int:
    """Return the number that the model gives to the first position of a sequence.

    It is padding id + 1 for RoBERTa and related models, else 0.
    """
    for name, table in model.named_modules():
        is_positions = name.endswith("embeddings.position_embeddings")
        if is_positions and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(table.padding_idx) + 1
    return 0
