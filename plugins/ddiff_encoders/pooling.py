"""Encoders of the transformers library: pooled hidden states, or the states of all tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddiff import (
    ArgumentError,
    ComponentConfig,
    DataError,
    NonFiniteError,
    PositiveInt,
    load_pretrained,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pooling = Literal["mean", "cls", "last", "none"]
LONGEST = 512  # default limit of tokens, if the model has no smaller limit
FORMAT = 1  # increase it when the same settings give other vectors
_log = logging.getLogger(__name__)


@final
class PooledEncoder:
    """Hidden states of a transformers model in float32, pooled or one per token.

    Only real tokens of a text are pooled; padding never counts. Texts are sorted by length and
    encoded in batches, so that little padding is computed. The batch changes a vector only by
    rounding.

    Args:
        model: encoder, decoder, or the encoder of an encoder-decoder; has the output
            `last_hidden_state`.
        tokenizer: tokenizer of the model, which adds the special tokens.
        pooling: "mean" of all tokens, "cls" (first token) or "last" token of the text; "none": the
            vectors of all tokens, up to `positions`.
        normalize: whether vectors are divided by their Euclidean norm.
        max_tokens: number of tokens, including special tokens, after which a text is cut off. None:
            the limit of model and tokenizer, and at most 512.
        batch: number of texts in a batch.
        prefix: text that is put before every text, such as "query: ".
        dim: number of coordinates that are kept, before normalization. None: all.
        device: device of the model; None: where the model is.
        positions: largest number of vectors of a text; only for pooling "none", and required there.

    Raises ArgumentError if the model does not support an argument.
    """

    class Config(ComponentConfig):
        path: str
        """Local directory with model and tokenizer, or a name on the hub."""
        pooling: Pooling = "mean"
        """Pooled tokens: the mean of all tokens, the first ("cls") or the last token. "none": one
        vector per token."""
        positions: PositiveInt | None = None
        """Largest number of vectors of a text with pooling = "none"; longer texts are cut."""
        normalize: bool = False
        """Divide every vector by its Euclidean norm."""
        max_tokens: PositiveInt | None = None
        """Longest text in tokens; longer texts are cut. By default the limit of the model, and at
        most 512."""
        batch: PositiveInt = 64
        """Number of texts in a batch."""
        prefix: str = ""
        """Text before every text, such as "query: ", if the model was trained with one."""
        dim: PositiveInt | None = None
        """Keep only the first coordinates, for models that were trained for it (Matryoshka)."""

    @classmethod
    def build(cls, config: Config, *, device: torch.device) -> PooledEncoder:
        return cls(
            load_model(config.path),
            load_tokenizer(config.path),
            pooling=config.pooling,
            normalize=config.normalize,
            max_tokens=config.max_tokens,
            batch=config.batch,
            prefix=config.prefix,
            dim=config.dim,
            device=device,
            positions=config.positions,
        )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        max_tokens: int | None = None,
        batch: int = 64,
        prefix: str = "",
        dim: int | None = None,
        device: torch.device | None = None,
        positions: int | None = None,
    ) -> None:
        if (pooling == "none") == (positions is None):
            raise ArgumentError(
                "PooledEncoder: positions, the largest number of vectors of a text, is required "
                f'for pooling "none" and refused for other poolings; got pooling = {pooling!r} and '
                f"positions = {positions}. Set both keys, or neither."
            )
        if pooling not in get_args(Pooling):
            raise ArgumentError(
                f"PooledEncoder: pooling must be one of {', '.join(get_args(Pooling))}; got "
                f"{pooling!r}. Use the pooling with which the model was trained."
            )
        table: Any = model.get_input_embeddings()
        embeddings = len(table.weight)
        largest = max(tokenizer.get_vocab().values())
        if largest >= embeddings:
            raise ArgumentError(
                f"PooledEncoder: the ids of the tokenizer must be below {embeddings}, the number "
                f"of embeddings of the model; the largest is {largest}. Use the tokenizer of the "
                "model."
            )
        width: int = model.config.hidden_size
        if dim is not None and dim > width:
            raise ArgumentError(
                f"PooledEncoder: dim must be at most {width}, the width of the model; got {dim}. "
                "Leave dim out to keep all coordinates."
            )
        self.dim = dim or width
        self._pooling = pooling
        self._normalize = normalize
        self.positions = positions
        self._max_tokens = _choose_max_tokens(model, tokenizer, max_tokens)
        if positions is not None:
            self._max_tokens = min(self._max_tokens, positions)
        self._batch = batch
        self._prefix = prefix
        self._tokenizer = tokenizer
        settings = [FORMAT, pooling, normalize, self._max_tokens, prefix, self.dim]
        if positions is not None:  # absent otherwise, so that older fingerprints stay valid
            settings.append(positions)
        self.fingerprint = _fingerprint(model, tokenizer, settings)
        self._model: Any = model.eval()
        if device is not None:
            self._model.to(device)
        self._has_warned = False

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        ids = self._tokenize(texts)
        shape = (self.dim,) if self.positions is None else (self.positions, self.dim)
        vectors = np.full((len(texts), *shape), np.nan, np.float32)
        # a text without tokens keeps the row of NaN, which means that it has no vector
        filled = [row for row, tokens in enumerate(ids) if tokens]
        # the longest texts come first, so that a batch that is too large fails at once
        order = sorted(filled, key=lambda row: len(ids[row]), reverse=True)
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            found = self._encode_batch([ids[row] for row in rows]).cpu().numpy()
            if self.positions is None:
                vectors[rows] = found
                continue
            for row, states in zip(rows, found):
                # states of padding are not vectors of the text
                vectors[row, : len(ids[row])] = states[: len(ids[row])]
        if not self._is_finite(vectors, ids):
            raise NonFiniteError(
                "PooledEncoder: the model returned infinite or NaN hidden states. Its weights are "
                "damaged, or were trained for another precision."
            )
        return vectors

    def _is_finite(self, vectors: NDArray[np.float32], ids: list[list[int]]) -> bool:
        """Return whether all vectors of tokens are finite."""
        filled = [row for row, tokens in enumerate(ids) if tokens]
        if self.positions is None:
            return bool(np.isfinite(vectors[filled]).all())
        return all(np.isfinite(vectors[row, : len(ids[row])]).all() for row in filled)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text with special tokens, cut to the largest length."""
        prefixed = [self._prefix + text for text in texts]
        found = self._tokenizer(
            prefixed, truncation=True, max_length=self._max_tokens, verbose=False
        )
        ids: list[list[int]] = found["input_ids"]
        # a text of exactly the limit cannot be distinguished from a longer text without encoding it
        if not self._has_warned and any(len(tokens) == self._max_tokens for tokens in ids):
            self._has_warned = True
            _log.warning(
                "Some texts have %d tokens or more. Only their first %d tokens are encoded.",
                self._max_tokens,
                self._max_tokens,
            )
        return ids

    def _encode_batch(self, ids: list[list[int]]) -> Tensor:
        """Return the vectors [n,D] of n token sequences, or [n,L,D] with padding."""
        device = next(self._model.parameters()).device
        sizes = torch.tensor([len(tokens) for tokens in ids])
        padding = self._tokenizer.pad_token_id or 0
        padded = torch.full((len(ids), int(sizes.max())), padding)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        # padding is on the right, so that the last token of a text is at its size minus one
        mask = torch.arange(padded.shape[1]) < sizes.unsqueeze(1)
        output = self._model(input_ids=padded.to(device), attention_mask=mask.long().to(device))
        hidden = output.last_hidden_state.float()
        pooled = self._pool(hidden, mask.to(device), sizes.to(device))[..., : self.dim]
        return nn.functional.normalize(pooled, dim=-1) if self._normalize else pooled

    def _pool(self, hidden: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
        """Pool hidden states [n,L,width]. `mask` [n,L]: real tokens; `sizes` [n]: their number."""
        if self._pooling == "none":
            return hidden
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), sizes - 1]
        # Padded states are replaced and not multiplied by 0, because 0 times infinity is NaN.
        total = hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)
        return total / sizes.unsqueeze(-1)


def load_model(path: str) -> PreTrainedModel:
    """Load a model in float32; of an encoder-decoder only the encoder.

    `path` is a local directory or a name on the hub. Code in the repository of the model is never
    run. Raises DataError if there is no model, or if weights are missing.
    """
    from transformers import AutoModel  # takes seconds to import

    def load(source: str, **options: Any) -> PreTrainedModel:
        model, report = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
        # the pooler is not used; the library would fill other missing weights with random numbers
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing:
            raise DataError(
                f"No model from {path!r}: {len(missing)} weights are missing ({missing[0]}, ...), "
                "so that vectors would be random. Save the whole model, or name another model."
            )
        return model

    model = load_pretrained(load, path, "model")
    return model.get_encoder() if model.config.is_encoder_decoder else model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises DataError if there is none."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, path, "tokenizer")
    # without vocabulary files, the library makes a tokenizer that knows only its special tokens
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise DataError(
            f"No tokenizer from {path!r}: its vocabulary has only special tokens. Copy the files "
            "of the tokenizer, such as tokenizer.json, into the directory of the model."
        )
    return tokenizer


def _choose_max_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> int:
    """Return the largest number of tokens of a text. Raises ArgumentError if `wanted` is larger."""
    key = model.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    limit: int | None = model.config.to_dict().get(key)
    table = dict(model.named_modules()).get("embeddings.position_embeddings")
    if limit is not None and isinstance(table, nn.Embedding) and table.padding_idx is not None:
        limit -= table.padding_idx + 1  # RoBERTa's family reserves the first positions for padding
    if wanted is None:
        limits = [LONGEST, int(tokenizer.model_max_length)]
        return min([*limits, limit] if limit is not None else limits)
    if limit is not None and wanted > limit:
        raise ArgumentError(
            f"PooledEncoder: max_tokens must be at most {limit}, the number of positions of the "
            f"model; got {wanted}. Leave max_tokens out to use the limit of the model."
        )
    special = tokenizer.num_special_tokens_to_add()
    if wanted <= special:
        raise ArgumentError(
            f"PooledEncoder: max_tokens must be larger than {special}, the number of special "
            f"tokens of a text; got {wanted}. Set a larger number."
        )
    return wanted


def _fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: list[Any]
) -> str:
    """Hash weights, configuration, tokenizer and settings. The path of the model is left out."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in sorted(model.state_dict().items()):
        if "pooler" in name:
            continue  # not used, and random if the directory does not have it
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(_describe_tokenizer(tokenizer).encode())
    return digest.hexdigest()[:32]


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that identifies the token ids that a tokenizer gives."""
    if not tokenizer.is_fast:
        return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # padding and truncation are those of the last call
    definition.pop("padding", None)
    definition.pop("truncation", None)
    return json.dumps(definition, sort_keys=True)
