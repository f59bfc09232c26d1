"""Prompts and infill texts, whose tokens are given and not sampled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.data.chat import ChatEncoder
from ddiff.data.chat_template import Message
from ddiff.data.compression import open_uncompressed
from ddiff.data.paths import printable
from ddiff.data.text import check_text, text_lines
from ddiff.data.tokenizer import Tokenizer, Unencodable
from ddiff.errors import ArgumentError, DataError, shorten

GAP = re.compile(r" ?\[MASK(?::([^\]]*))?\]")
SIZED_GAP = re.compile(r"\[MASK:[0-9]+\]")


class Template(NamedTuple):
    """Sequence of n tokens, of which some are given and the others are sampled.

    text: text from which the template was encoded.
    ids: long tensor [n]. The sampler keeps the ids of the given positions.
    given: bool tensor [n], True at positions whose token is given. All other positions are sampled.
    whole: True for an infill text: the sample ends after n tokens. False for a prompt: the sampler
        continues after the template.
    answer: position at which the answer to a message begins; None if the text is not a message.
    """

    text: str
    ids: Tensor
    given: Tensor
    whole: bool
    answer: int | None = None

    @property
    def has_suffix(self) -> bool:
        """True if a given token follows a gap."""
        return bool((self.given[1:] & ~self.given[:-1]).any())


class Frame(NamedTuple):
    """Batch of B templates, padded to L positions.

    tokens: long tensor [B,L]. clamped: bool tensor [B,L], True at positions whose token the sampler
    keeps. valid: bool tensor [B,L], False after the end of an infill text; None if every position
    is valid, as for a tokenizer with a fill symbol.
    """

    tokens: Tensor
    clamped: Tensor
    valid: Tensor | None

    def to(self, device: torch.device) -> Frame:
        """Move all tensors to `device`."""
        valid = None if self.valid is None else self.valid.to(device)
        return Frame(self.tokens.to(device), self.clamped.to(device), valid)


def encode_prompt(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Return the template of a prompt, a text with which samples of `length` tokens begin.

    Raises ArgumentError if the text has a gap such as [MASK:8], or more than `length` tokens.
    """
    _check_text(text, "prompt")
    gap = SIZED_GAP.search(text)
    if gap is not None:
        raise ArgumentError(
            f"prompt: a prompt has no gaps; got {shorten(gap[0])} in {shorten(text)!r}. Pass a "
            "text with gaps as infill (over HTTP, as the field text of /v1/infill)."
        )
    ids = _encode(text, text, tokenizer)
    given = torch.ones_like(ids, dtype=torch.bool)
    return _check_length(Template(text, ids, given, whole=False), length, "prompt")


def encode_infill(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Encode a text with gaps: `She [MASK:8] to Bath` has a gap of eight tokens, which are sampled.

    The sample ends at the end of the text. One space before a gap is removed, since sampled tokens
    contain their own spaces. Raises ArgumentError for a text without a gap, for a gap of 0 tokens,
    and for a text of more than `length` tokens.
    """
    _check_text(text, "infill")
    ids: list[Tensor] = []
    given: list[Tensor] = []
    rest = 0
    for gap in GAP.finditer(text):
        before = _encode(text[rest : gap.start()], text, tokenizer)
        size = _gap_size(gap, text, length)
        ids += [before, torch.zeros(size, dtype=torch.long)]
        given += [torch.ones_like(before, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)]
        rest = gap.end()
    if not ids:
        raise ArgumentError(
            "infill: the text must have a gap, such as [MASK:8] for eight tokens; got "
            f"{shorten(text)!r}. To continue a text, pass prompt."
        )
    last = _encode(text[rest:], text, tokenizer)
    ids.append(last)
    given.append(torch.ones_like(last, dtype=torch.bool))
    template = Template(text, torch.cat(ids), torch.cat(given), whole=True)
    return _check_length(template, length, "infill")


def encode_messages(
    messages: str | Sequence[Message], encoder: ChatEncoder, length: int, answer_length: int | None
) -> Template:
    """Return the template of a conversation whose next answer is sampled.

    Args:
        messages: messages of the conversation, or the text of one message of the user.
        encoder: encoder with the chat template of the run.
        length: number of tokens of a row.
        answer_length: number of sampled tokens; None: up to the end of the row.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    text = shorten(messages[-1]["content"])
    if encoder.has_special(messages):
        raise ArgumentError(
            f"message: {text!r} contains the spelling of a special token, which would end its "
            "turn. Remove it."
        )
    ids = torch.tensor(encoder.encode_prompt(messages), dtype=torch.long)
    room = answer_length or length - len(ids)
    if len(ids) + room > length or room < 1:
        raise ArgumentError(
            f"message: a sample has {length} tokens ([data] length of the run), but the "
            f"conversation with the last message {text!r} has {len(ids)} tokens, and its answer "
            f"{answer_length or 'at least 1'}. Shorten the messages, or train with a larger length."
        )
    given = torch.arange(len(ids) + room) < len(ids)
    padded = torch.cat([ids, torch.zeros(room, dtype=torch.long)])
    return Template(messages[-1]["content"], padded, given, whole=True, answer=len(ids))


def encode_source(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Return the template of a text to edit, in which only special tokens are given.

    Raises ArgumentError for a text without tokens and for a text of more than `length` tokens.
    """
    _check_text(text, "edit")
    ids = _encode(text, text, tokenizer)
    if len(ids) == 0:
        raise ArgumentError(
            f"edit: the text must have at least one token; got {shorten(text)!r}. To sample "
            "without a source, use run.sample."
        )
    special = torch.tensor(tokenizer.special_ids, dtype=torch.long)
    template = Template(text, ids, torch.isin(ids, special), whole=True)
    return _check_length(template, length, "edit")


def make_templates(
    prompts: str | Sequence[str] | None,
    infills: str | Sequence[str] | None,
    tokenizer: Tokenizer,
    length: int,
) -> list[Template]:
    """Encode one or several prompts or infill texts of at most `length` tokens.

    Raises ArgumentError if both prompts and infill texts are given.
    """
    if prompts is not None and infills is not None:
        raise ArgumentError(
            "run.sample: pass either prompt or infill; got both. To use both, begin the infill "
            "text with the prompt."
        )
    if prompts is not None:
        return [encode_prompt(text, tokenizer, length) for text in as_list(prompts)]
    if infills is not None:
        return [encode_infill(text, tokenizer, length) for text in as_list(infills)]
    return []


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Return one text or several texts as a list."""
    # bytes and dicts are iterable too, but their items are not texts
    if isinstance(texts, Iterable) and not isinstance(texts, str | bytes | dict):
        return list(texts)
    return [texts]


def check_no_suffix(templates: Iterable[Template], subject: str, remedy: str) -> None:
    """Raise ArgumentError for a template with text after a gap.

    `subject`: network or sampler that does not attend to later tokens, for the message. `remedy`:
    last sentence of the message.
    """
    for template in templates:
        if template.has_suffix:
            raise ArgumentError(
                f"infill: {shorten(template.text)!r} has text after a gap, but {subject} works "
                "from left to right and does not attend to later tokens. Pass a prompt instead, or "
                f"use {remedy}."
            )


def make_frame(templates: Sequence[Template], length: int, tokenizer: Tokenizer) -> Frame:
    """Pad templates to `length` positions and stack them to one batch.

    Positions after the end of an infill text (`whole`) are not sampled. If the tokenizer has a fill
    symbol, this symbol is given at these positions, because it fills up the rows of shorter texts
    in training. Otherwise these positions are not valid.
    """
    filler = tokenizer.fill_id
    if filler is None:
        filler = tokenizer.eos_id or 0  # has no effect: these positions are not valid
    shape = (len(templates), length)
    tokens = torch.full(shape, filler)
    clamped = torch.zeros(shape, dtype=torch.bool)
    valid = torch.ones(shape, dtype=torch.bool)
    for row, template in enumerate(templates):
        size = len(template.ids)
        tokens[row, :size] = template.ids
        clamped[row, :size] = template.given
        if template.whole:
            valid[row, size:] = tokenizer.fill_id is not None
            clamped[row, size:] = True
    # Whole templates have a mask even if no template is padded, so that every batch uses the same
    # attention kernel and a sample does not depend on its batch.
    has_end = tokenizer.fill_id is None and any(template.whole for template in templates)
    return Frame(tokens, clamped, valid if has_end else None)


def read_prompts(path: str | Path) -> list[str]:
    """Read a UTF-8 text file with one prompt per line. Blank lines are skipped."""
    name = printable(str(path))
    try:
        with open_uncompressed(str(path)) as file:
            lines = [line for line in text_lines(file, name) if line and not line.isspace()]
    except DataError as error:
        raise DataError(
            f"--prompts: {error} The file must be UTF-8 text with one prompt per line."
        ) from error
    if not lines:
        raise DataError(f"--prompts: {name} contains no prompt. Write one prompt per line.")
    return lines


def _check_text(text: str, argument: str) -> None:
    place = f"{argument}: {shorten(text)!r}" if isinstance(text, str) else argument
    try:
        check_text(text, place)
    except DataError as error:
        raise ArgumentError(str(error)) from error


def _encode(piece: str, text: str, tokenizer: Tokenizer) -> Tensor:
    """Encode `piece`, a part of `text`. An error message quotes `text`."""
    try:
        return torch.tensor(tokenizer.encode([piece])[0], dtype=torch.long)
    except Unencodable as error:
        raise error.at(0, repr(shorten(text))) from None


def _gap_size(gap: re.Match[str], text: str, length: int) -> int:
    """Parse the number N of tokens of a gap [MASK:N] in the infill text `text`.

    Raises ArgumentError unless N is in 1..length.
    """
    written = gap[1]
    is_number = written is not None and written.isascii() and written.isdecimal()
    if not is_number or not written.strip("0"):
        raise ArgumentError(
            "infill: a gap must be written [MASK:N] with the number of tokens N >= 1; got "
            f"{shorten(gap[0].strip())!r} in {shorten(text)!r}."
        )
    digits = written.lstrip("0")
    # int() refuses very long numbers, so the number of digits is checked first
    if len(digits) > 18 or int(digits) > length:
        raise ArgumentError(
            f"infill: a sample has {length} tokens ([data] length of the run); got a gap of "
            f"{shorten(digits)} tokens in {shorten(text)!r}. Use a shorter gap, or train with a "
            "larger length."
        )
    return int(digits)


def _check_length(template: Template, length: int, kind: str) -> Template:
    if len(template.ids) > length:
        raise ArgumentError(
            f"{kind}: a sample has {length} tokens ([data] length of the run); got a text of "
            f"{len(template.ids)} tokens, {shorten(template.text)!r}. Shorten the text, or train "
            "with a larger length."
        )
    return template
