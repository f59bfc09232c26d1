"""Requests of the lm-evaluation-harness as token ids.

The harness asks for the likelihood of a text given a context, for the likelihood of a whole text,
and for a text that continues a context. The functions of this module convert such requests to
`Continuation` objects and `Template` objects. They do not import the harness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddiff.data.text import check_text
from ddiff.data.tokenizer import Tokenizer, Unencodable
from ddiff.errors import ArgumentError, DataError, shorten
from ddiff.evaluation.conditional import Continuation
from ddiff.runs.prompts import Template

MOST_GENERATED = 256
"""Number of generated tokens if a task does not name one, as in the harness."""

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the largest number of generated tokens, in the order in which the harness reads them."""

FILTERS = ("top_k", "top_p", "min_p")
"""Generation arguments that are keys of the samplers, too."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """Length of the rows of a run, and the treatment of longer contexts.

    Attributes:
        length: largest number of tokens of a row.
        truncate: whether the beginning of a context that is too long is left out. Otherwise such a
            context is an error.
    """

    length: int
    truncate: bool


# ---------------------------------------------------------------------- text


class Encoder:
    """Encodes the texts of requests. Error messages name the request.

    Attributes:
        num_lossy: number of texts that differ after encoding and decoding, for example because the
            tokenizer changes upper case to lower case.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_lossy = 0

    def encode(self, text: str, name: str) -> Ids:
        """Return the token ids of a text, without special tokens.

        Raises DataError, which names the request `name`, for a text that cannot be encoded.
        """
        try:
            ids = self._tokenizer.encode([check_text(text, name)])[0]
        except Unencodable as error:
            raise error.at(0, f"{name}: {shorten(text)!r}") from None
        return tuple(ids)

    def encode_pair(self, context: str, continuation: str, name: str) -> tuple[Ids, Ids]:
        """Return the token ids of a context and of its continuation, by the rule of the harness.

        White space at the end of the context is moved to the continuation. If the context has n
        tokens, the tokens of the continuation are those of the whole text after the first n. Raises
        DataError if the continuation has no token.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        whole = self.encode(kept + continuation, name)
        before = self.encode(kept, name) if kept else ()
        after = whole[len(before) :]
        if not after:
            raise DataError(
                f"{name}: the continuation {shorten(continuation)!r} adds no token to "
                f"{shorten(kept[-80:])!r} with the tokenizer of this run, so it has no likelihood. "
                "Change the task, so that each continuation has at least one token."
            )
        self._count_loss(kept + continuation, whole)
        return before, after

    def encode_document(self, text: str, name: str) -> Ids:
        """Return the token ids of a whole text. Raises DataError for a text without tokens."""
        ids = self.encode(text, name)
        if not ids:
            raise DataError(
                f"{name}: the text {shorten(text)!r} has no token, so it has no likelihood. Remove "
                "the document from the task."
            )
        self._count_loss(text, ids)
        return ids

    def _count_loss(self, text: str, ids: Ids) -> None:
        if self._tokenizer.decode([list(ids)])[0] != text:
            self.num_lossy += 1


# ---------------------------------------------------------------------- likelihood


def make_continuation(
    pair: tuple[Ids, Ids], key: str, name: str, limits: Limits
) -> tuple[Continuation, bool]:
    """Return the continuation of a request, and whether its context was truncated.

    Args:
        pair: token ids of the context and of the continuation.
        key: key of the random numbers; equal for all answers of a question.
        name: name of the request, for messages.
        limits: length of a row.

    Raises ArgumentError if the tokens do not fit into a row.
    """
    context, tokens = pair
    if len(tokens) > limits.length:
        raise ArgumentError(
            f"{name}: the continuation has {len(tokens)} tokens, but a row of this run has "
            f"{limits.length} ([data] length), so the model cannot score it. Leave out the task, "
            "or train with a larger length."
        )
    room = limits.length - len(tokens)
    is_cut = len(context) > room
    if is_cut and not limits.truncate:
        raise ArgumentError(
            f"{name}: context and continuation have {len(context)} + {len(tokens)} tokens, but a "
            f"row of this run has {limits.length} ([data] length). Use fewer examples "
            "(num_fewshot), or truncate=true (--truncate), which leaves out the beginning of a "
            "context that is too long."
        )
    kept = context[len(context) - room :] if is_cut else context
    return Continuation(kept, tokens, key), is_cut


def split_windows(ids: Ids, length: int) -> list[tuple[Ids, Ids]]:
    """Divide a text into windows (context, tokens) such that each token is scored once.

    A window has at most `length` tokens. The first window has no context. The next windows have one
    token of context, and the last window as much context as fits. The harness divides texts in this
    way. It also puts a prefix token before the first window, which ddiff omits: its models predict
    the first token without one.
    """
    windows: list[tuple[Ids, Ids]] = [((), ids[:length])]
    start = len(windows[0][1])
    while start < len(ids):
        # a row of one token has no room for a context
        stop = min(len(ids), start + max(1, length - 1))
        first = max(0, min(start, stop - length))
        windows.append((ids[first:start], ids[start:stop]))
        start = stop
    return windows


def make_windows(ids: Ids, key: str, limits: Limits) -> list[Continuation]:
    """Return the windows of a text as continuations with separate random numbers."""
    windows = []
    for number, (context, tokens) in enumerate(split_windows(ids, limits.length)):
        windows.append(Continuation(context, tokens, f"{key}/{number}"))
    return windows


# ---------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Generation:
    """Request for a text that continues a context.

    Attributes:
        template: tokens of the context.
        size: largest number of generated tokens.
        until: stop strings. The text ends before the first of them.
        settings: `key=value` texts for the sampler, such as temperature=0.
        is_cut: whether the context was truncated.
    """

    template: Template
    size: int
    until: tuple[str, ...]
    settings: tuple[str, ...]
    is_cut: bool

    def finish(self, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        """Return the generated text of a sample with the token ids `ids`.

        The text ends before the end mark and before the first stop string.
        """
        start = len(self.template.ids)
        drawn = list(ids[start : start + self.size])
        if tokenizer.eos_id in drawn:
            drawn = drawn[: drawn.index(tokenizer.eos_id)]
        text = tokenizer.decode([drawn])[0]
        for stop in self.until:
            if stop:
                text = text.split(stop)[0]
        return text


def make_generation(
    context: str, options: Mapping[str, Any], name: str, encoder: Encoder, limits: Limits
) -> Generation:
    """Return the generation request for a context.

    `options` are the generation arguments of the harness: `until`, the largest number of tokens,
    `do_sample`, `temperature`, `top_k`, `top_p` and `min_p`. The temperature is 0 unless `options`
    ask for random draws. Raises ArgumentError for other arguments, and if context and generated
    tokens do not fit into a row.
    """
    left = dict(options)
    until = left.pop("until", None) or []
    if isinstance(until, str):
        until = [until]
    limit = None
    for key in TOKEN_LIMITS:
        value = left.pop(key, None)
        if limit is None and value is not None:
            limit = int(value)
    settings = _pop_settings(left)
    if left:
        raise ArgumentError(
            f"{name}: the samplers of ddiff have no counterpart of the generation argument "
            f"{min(left)!r}. Known arguments: until, {', '.join(TOKEN_LIMITS)}, do_sample, "
            f"temperature, {', '.join(FILTERS)}. Remove the argument from the task or gen_kwargs."
        )
    ids = encoder.encode(context, name) if context else ()
    ids, size, is_cut = _fit(ids, limit, name, limits)
    template = Template(
        text=context,
        ids=torch.tensor(ids, dtype=torch.long),
        given=torch.ones(len(ids), dtype=torch.bool),
        whole=False,
    )
    return Generation(template, size, tuple(until), settings, is_cut)


def make_gap(continuation: Continuation) -> Template:
    """Return a template that has a gap in the place of the scored tokens."""
    before = len(continuation.context)
    ids = torch.zeros(continuation.length, dtype=torch.long)
    ids[:before] = torch.tensor(continuation.context, dtype=torch.long)
    given = torch.arange(continuation.length) < before
    return Template(text="", ids=ids, given=given, whole=True)


def _pop_settings(left: dict[str, Any]) -> tuple[str, ...]:
    """Remove temperature and filters from generation arguments. Return them as settings."""
    temperature = float(left.pop("temperature", None) or 0.0)
    is_random = left.pop("do_sample", None)
    if is_random is False:
        temperature = 0.0
    elif is_random and temperature == 0.0:
        temperature = 1.0  # random draws without a named temperature
    settings = [f"temperature={temperature}"]
    for key in FILTERS:
        value = left.pop(key, None)
        if value is not None:
            settings.append(f"{key}={value}")
    return tuple(settings)


def _fit(ids: Ids, limit: int | None, name: str, limits: Limits) -> tuple[Ids, int, bool]:
    """Return the context, the number of generated tokens, and whether the context was truncated.

    `limit` is the requested number of tokens; None: as many as fit, up to MOST_GENERATED.
    """
    least = 1 if limit is None else limit
    if not 1 <= least <= limits.length:
        raise ArgumentError(
            f"{name}: max_gen_toks must be from 1 to {limits.length}, the number of tokens of a "
            f"row of this run ([data] length); got {limit}. Pass another value in gen_kwargs."
        )
    room = limits.length - least
    is_cut = len(ids) > room
    if is_cut and not limits.truncate:
        raise ArgumentError(
            f"{name}: the context has {len(ids)} tokens, and at least {least} more are generated, "
            f"but a row of this run has {limits.length} ([data] length). Use fewer examples "
            "(num_fewshot) or a smaller max_gen_toks, or truncate=true (--truncate), which leaves "
            "out the beginning of a context that is too long."
        )
    kept = ids[len(ids) - room :] if is_cut else ids
    size = min(MOST_GENERATED, limits.length - len(kept)) if limit is None else limit
    return kept, size, is_cut
