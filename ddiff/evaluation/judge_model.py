"""Judges of generated text: autoregressive models that score the tokens of samples.

A sample is a list of documents, which end marks separate. The judge encodes the documents with its
own tokenizer, joins them with its own end mark, and scores each token once, given the tokens before
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.data.pretrained import load_pretrained
from ddiff.data.tokenizer import PretrainedTokenizer
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DataError, NonFiniteError
from ddiff.progress import show_progress

Item = TypeVar("Item")

LONGEST = 1024  # default window in tokens, if the model has no smaller limit


@dataclass(frozen=True)
class Scores:
    """Scores of N samples.

    Attributes:
        nats: negative log-likelihood [N] of the scored tokens of each sample.
        tokens: number [N] of scored tokens of each sample.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]


class JudgeModel(Protocol):
    """Autoregressive model that scores token ids of samples.

    Attributes:
        name: name of the judge in records.
        protocol: settings on which the scores depend: `judge` (its name), `model` (a fingerprint of
            its weights), tokenizer, window, stride, dtype and the rule for special tokens.
        tokenizer_fingerprint: fingerprint of the tokenizer; None if it is unknown. A judge with the
            tokenizer of a run can score the token ids of its samples.
    """

    name: str
    protocol: Mapping[str, Any]
    tokenizer_fingerprint: str | None

    def encode(self, documents: Sequence[str]) -> list[int]:
        """Return the ids of a sample: its documents, with an end mark between two of them."""
        ...

    def score(self, rows: Sequence[Sequence[int]]) -> Scores:
        """Score the ids of N samples. Samples may have different lengths, and may be empty."""
        ...

    def features(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32] | None:
        """Return a vector [d] per sample for MAUVE, [N,d]; None if the judge has none."""
        ...


@dataclass(frozen=True)
class Window:
    """Part of a row that a judge reads at once.

    Attributes:
        row: number of the row.
        start, stop: first position, and position after the last.
        scored: first position that is scored; those before it are context.
    """

    row: int
    start: int
    scored: int
    stop: int


def plan_windows(row: int, size: int, first: int, window: int, stride: int) -> Iterator[Window]:
    """Divide a row into windows, so that each position from `first` on is scored in one window.

    The first window begins at position 0. Each further window begins `stride` positions later and
    scores the positions that the windows before it did not score.

    Args:
        row: number of the row.
        size: number of positions of the row.
        first: first position that is scored: 1 if the position 0 is only context.
        window: number of positions of a window.
        stride: distance of two windows, from 1 to `window` - `first`.
    """
    start = 0
    scored = first
    while scored < size:
        stop = min(start + window, size)
        yield Window(row, start, scored, stop)
        scored = stop
        start += stride


def check_windows(name: str, window: int, stride: int, first: int) -> None:
    """Raise ArgumentError unless 1 <= stride <= window - first, so that no token is left out.

    `name` is the judge, for the message.
    """
    if not 1 <= stride <= window - first:
        raise ArgumentError(
            f"judge {name}: stride must be from 1 to {window - first}, so that each token is "
            f"scored once with a token before it; got stride = {stride} and window = {window}."
        )


def divide(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Divide items into consecutive parts of `size` items; the last part may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def score_windows(
    windows: Sequence[Window],
    count: int,
    batch: int,
    score: Callable[[Sequence[Window]], NDArray[np.float64]],
    ranks: Ranks | None = None,
) -> Scores:
    """Score windows in batches, and add up the nats and the scored tokens of each row.

    Args:
        windows: windows of all rows.
        count: number N of rows.
        batch: largest number of windows of a batch. The last batch may be smaller.
        score: returns the nats of the scored positions of each window [b] of a batch.
        ranks: processes that divide the batches; None: only this process.
    """
    ranks = ranks or Ranks()
    # Long windows come first, so that a batch that is too large for the memory fails at once.
    order = sorted(windows, key=lambda window: window.start - window.stop)
    batches = divide(order, batch)
    own = sum(len(batches[number]) for number in ranks.share(len(batches)))
    with show_progress(own, ranks.label("judging"), console=ranks.console()) as bar:

        def score_batch(part: Sequence[Window]) -> NDArray[np.float64]:
            found = score(part)
            bar.advance(len(part))
            return found

        scored = ranks.map(score_batch, batches)
    nats = np.zeros(count)
    tokens = np.zeros(count, np.int64)
    for part, found in zip(batches, scored, strict=True):
        rows = np.array([window.row for window in part])
        np.add.at(nats, rows, found)
        np.add.at(tokens, rows, np.array([window.stop - window.scored for window in part]))
    if not np.isfinite(nats).all():
        raise NonFiniteError(
            f"The judge gave {int((~np.isfinite(nats)).sum())} of {count} samples a likelihood "
            "that is zero or not a number. Check the weights of the judge, and its precision."
        )
    return Scores(nats, tokens)


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Return a fingerprint of the weights of a model: of their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        plain = weight.detach().cpu().contiguous().view(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def load_complete_model(source: str, **options: Any) -> Any:
    """Load a language model. Raises DataError if weights are missing, which would be random."""
    from transformers import AutoModelForCausalLM  # slow to import

    # Any, because the declared type of `from_pretrained` does not include the second result.
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(source, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"No model from {source!r}: its files lack {len(missing)} weights of the model "
            f"({', '.join(missing[:3])}), which would be random numbers. Save the complete model, "
            "with the head that predicts tokens."
        )
    return model


@torch.inference_mode()
def check_causal(model: Any, name: str) -> None:
    """Raise DataError if the prediction of a token depends on that token or on later tokens.

    The library also loads models such as BERT, which attend to all tokens, as language models. The
    scores of such a model are not a likelihood. `name` is the model, for the message.
    """
    model.eval()
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    changed = ids.clone()
    changed[:, -1] = 1
    before, after = (model(input_ids=row).logits[:, :-1].float() for row in (ids, changed))
    # rounding differs far less than predictions from another text
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise DataError(
            f"No causal language model from {name!r}: its prediction of a token depends on later "
            "tokens, so that its scores are not a likelihood. Name a causal model, such as GPT-2."
        )


class TransformersJudge:
    """Causal language model of the transformers library.

    If the tokenizer has a start mark (or an end mark, which GPT-2 uses as start mark), it precedes
    each sample as context and every token is scored. Otherwise the first token of each sample is
    context, and is not scored. An end mark between two documents is scored like other tokens.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        name: name in records and messages.
        window: number of tokens that the model reads at once; by default its largest length, and at
            most 1024.
        stride: distance of two windows; by default half a window.
        batch: number of windows in a batch, which changes the scores only by rounding.
        device: device of the model; None: where the model is.
        ranks: processes that divide the batches, all of which call the methods with the same
            arguments; None: only this process.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        window: int | None = None,
        stride: int | None = None,
        batch: int = 8,
        device: torch.device | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.name = name
        self._ranks = ranks or Ranks()
        self._tokenizer = tokenizer
        known = PretrainedTokenizer(tokenizer, f"The tokenizer of the judge {name}")
        self.tokenizer_fingerprint: str | None = known.fingerprint
        rows = model.get_input_embeddings().weight.shape[0]
        if known.num_tokens > rows:
            raise DataError(
                f"judge {name}: the model must have the tokens of its tokenizer; got a tokenizer "
                f"with {known.num_tokens} tokens and a model with {rows}. They belong to different "
                "models: save the tokenizer of this model in its folder."
            )
        self._model = model.eval()
        if device is not None:
            self._model.to(device)
        config = model.config.to_dict()
        longest = config.get("max_position_embeddings") or config.get("n_positions") or LONGEST
        self._window = min(longest, LONGEST) if window is None else window
        if not 2 <= self._window <= longest:
            raise ArgumentError(
                f"judge {name}: window must be from 2 to {longest}, the largest length of the "
                f"model; got {window}."
            )
        self._stride = max(1, self._window // 2) if stride is None else stride
        check_windows(name, self._window, self._stride, 1)
        self._batch = batch
        self._end: int | None = tokenizer.eos_token_id
        start = tokenizer.bos_token_id
        self._start: int | None = self._end if start is None else start
        self.protocol: Mapping[str, Any] = {
            "judge": name,
            "model": fingerprint_weights(model),
            "revision": getattr(model.config, "_commit_hash", None),
            "tokenizer": self.tokenizer_fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "window": self._window,
            "stride": self._stride,
            "first_token": "context" if self._start is None else "scored after a start mark",
            "special_tokens": "end mark of the judge between documents"
            if self._end is not None
            else "removed",
        }

    @classmethod
    def load(cls, source: str, **options: Any) -> TransformersJudge:
        """Load a judge from a local directory or by its name on the hub, in float32.

        `options` are the other arguments of the judge. Raises DataError if there is no model.
        """
        from transformers import AutoTokenizer  # slow to import

        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer")
        model = load_pretrained(load_complete_model, source, "model", dtype=torch.float32)
        check_causal(model, source)
        return cls(model, tokenizer, source, **options)

    def encode(self, documents: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for number, document in enumerate(documents):
            if number > 0 and self._end is not None:
                ids.append(self._end)
            found = self._tokenizer(document, add_special_tokens=False, verbose=False)
            ids += found["input_ids"]
        return ids

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]]) -> Scores:
        complete = [self._prepend_start(row) for row in rows]
        windows: list[Window] = []
        for number, row in enumerate(complete):
            windows += plan_windows(number, len(row), 1, self._window, self._stride)

        def score(part: Sequence[Window]) -> NDArray[np.float64]:
            return self._score_windows(complete, part)

        return score_windows(windows, len(rows), self._batch, score, self._ranks)

    def _prepend_start(self, row: Sequence[int]) -> list[int]:
        return list(row) if self._start is None else [self._start, *row]

    def _score_windows(
        self, rows: Sequence[Sequence[int]], windows: Sequence[Window]
    ) -> NDArray[np.float64]:
        """Return the nats [b] of the scored positions of b windows."""
        ids, valid = self._pad([rows[window.row][window.start : window.stop] for window in windows])
        logits = self._model(input_ids=ids, attention_mask=valid.long()).logits
        # The logits at position i predict the token at position i + 1. One window at a time, since
        # the logarithms of all windows would double the memory.
        nats = np.zeros(len(windows))
        for number, window in enumerate(windows):
            first = window.scored - window.start
            size = window.stop - window.start
            log_p = logits[number, first - 1 : size - 1].float().log_softmax(-1)
            targets = ids[number, first:size]
            nats[number] = -float(log_p.gather(-1, targets[:, None]).double().sum())
        return nats

    @torch.inference_mode()
    def features(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the last hidden state of the last token of each sample, as published for MAUVE.

        Only the first window of a sample is read.
        """
        complete = [(self._prepend_start(row) or [0])[: self._window] for row in rows]
        return np.concatenate(self._ranks.map(self._read_states, divide(complete, self._batch)))

    def _read_states(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the last hidden states [b,d] at the last tokens of b rows."""
        ids, valid = self._pad(rows)
        output = self._model(input_ids=ids, attention_mask=valid.long(), output_hidden_states=True)
        last = valid.sum(-1) - 1
        states = output.hidden_states[-1][torch.arange(len(rows)), last]
        return states.float().cpu().numpy()

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids [b,n] on the device of the model, padded at the end, and where they are real.

        A causal model does not attend to later positions, so any id can pad.
        """
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            valid[number, : len(row)] = True
        device = self._model.device
        return ids.to(device), valid.to(device)
