"""Prompts, which a sample continues, and infill texts, whose gaps it fills."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.data.compression import open_uncompressed
from ddiff.data.paths import printable
from ddiff.data.text import check_text, text_lines
from ddiff.data.tokenizer import Tokenizer, Unencodable
from ddiff.errors import ArgumentError, DataError, shorten

GAP = re.compile(r" ?\[MASK(?::([^\]]*))?\]")


class Template(NamedTuple):
    """A partly given sequence: ids [n] long, and `given` [n] bool where they are kept.

    Positions after the template are free, or do not exist if it is `whole`.
    """

    text: str
    ids: Tensor
    given: Tensor
    whole: bool

    @property
    def has_suffix(self) -> bool:
        """True if tokens are given after a gap."""
        return bool((self.given[1:] & ~self.given[:-1]).any())


class Frame(NamedTuple):
    """Templates on canvases of one length.

    `tokens` [B,L] long are kept where `clamped` [B,L]; `valid` [B,L] is False beyond the end of a
    whole template, None if no position is.
    """

    tokens: Tensor
    clamped: Tensor
    valid: Tensor | None

    def to(self, device: torch.device) -> Frame:
        """Move all tensors to `device`."""
        valid = None if self.valid is None else self.valid.to(device)
        return Frame(self.tokens.to(device), self.clamped.to(device), valid)


def prompt(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Encode a text that samples of `length` tokens begin with; ArgumentError if it is longer."""
    _check_text(text, "prompt")
    ids = _encode(text, text, tokenizer)
    given = torch.ones_like(ids, dtype=torch.bool)
    return _check_length(Template(text, ids, given, whole=False), length)


def infill(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Encode a text with gaps: `She [MASK:8] to Bath` has eight free tokens.

    A sample ends where the text ends. One space before a gap belongs to the gap, since words that
    fill it bring their own. Raises ArgumentError for a text without a gap, a gap without tokens,
    and more than `length` tokens.
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
            f"{shorten(text)!r}. A text to continue is a prompt."
        )
    last = _encode(text[rest:], text, tokenizer)
    ids.append(last)
    given.append(torch.ones_like(last, dtype=torch.bool))
    template = Template(text, torch.cat(ids), torch.cat(given), whole=True)
    return _check_length(template, length)


def make_templates(
    prompts: str | Sequence[str] | None,
    infills: str | Sequence[str] | None,
    tokenizer: Tokenizer,
    length: int,
) -> list[Template]:
    """Encode one or several prompts or infill texts; ArgumentError for both kinds at once."""
    if prompts is not None and infills is not None:
        raise ArgumentError(
            "run.sample: prompt and infill exclude each other; begin the infill text with the "
            "prompt."
        )
    if prompts is not None:
        return [prompt(text, tokenizer, length) for text in _as_list(prompts)]
    if infills is not None:
        return [infill(text, tokenizer, length) for text in _as_list(infills)]
    return []


def _as_list(texts: str | Sequence[str]) -> list[str]:
    # bytes and mappings can be iterated over, too, and would be taken for their numbers or keys
    if isinstance(texts, Iterable) and not isinstance(texts, str | bytes | dict):
        return list(texts)
    return [texts]


def check_no_suffix(templates: Iterable[Template], subject: str, remedy: str) -> None:
    """Raise ArgumentError for text after a gap, which `subject` does not attend to."""
    for template in templates:
        if template.has_suffix:
            raise ArgumentError(
                f"infill: {shorten(template.text)!r} has text after a gap, which would be ignored: "
                f"{subject} goes from left to right and does not attend to later tokens. Give a "
                f"prompt, or {remedy}."
            )


def make_frame(templates: Sequence[Template], length: int, filler: int) -> Frame:
    """Lay the templates on canvases of `length`; `filler` stands beyond the end of a whole one."""
    shape = (len(templates), length)
    tokens = torch.full(shape, filler)
    clamped = torch.zeros(shape, dtype=torch.bool)
    valid = torch.ones(shape, dtype=torch.bool)
    for row, template in enumerate(templates):
        size = len(template.ids)
        tokens[row, :size] = template.ids
        clamped[row, :size] = template.given
        if template.whole:
            valid[row, size:] = False
            clamped[row, size:] = True
    # Whole templates get a mask even if none is padded, so that attention takes the same way for
    # all of them and a sample does not depend on its batch.
    has_end = any(template.whole for template in templates)
    return Frame(tokens, clamped, valid if has_end else None)


def read_prompts(path: str | Path) -> list[str]:
    """Read a UTF-8 file with one prompt on each line; blank lines are skipped."""
    name = printable(str(path))
    try:
        with open_uncompressed(str(path)) as file:
            lines = [line for line in text_lines(file, name) if line and not line.isspace()]
    except DataError as error:
        raise DataError(
            f"--prompts: {error} A UTF-8 text file is expected, one prompt a line."
        ) from error
    if not lines:
        raise DataError(f"--prompts: {name} holds no prompt. Write one a line.")
    return lines


def _check_text(text: str, argument: str) -> None:
    place = f"{argument}: {shorten(text)!r}" if isinstance(text, str) else argument
    try:
        check_text(text, place)
    except DataError as error:
        raise ArgumentError(str(error)) from error


def _encode(piece: str, text: str, tokenizer: Tokenizer) -> Tensor:
    """Encode a piece of `text`, which an error names."""
    try:
        return torch.tensor(tokenizer.encode([piece])[0], dtype=torch.long)
    except Unencodable as error:
        raise error.at(0, repr(shorten(text))) from None


def _gap_size(gap: re.Match[str], text: str, length: int) -> int:
    """Read the number of tokens of a gap, checked before a tensor of that size is made."""
    written = gap[1]
    is_number = written is not None and written.isascii() and written.isdecimal()
    if not is_number or not written.strip("0"):
        raise ArgumentError(
            "infill: a gap is written [MASK:8], with the number of its tokens, at least 1; got "
            f"{shorten(gap[0].strip())!r} in {shorten(text)!r}."
        )
    digits = written.lstrip("0")
    # Python refuses to convert very long numbers, so the number of digits is looked at first
    if len(digits) > 18 or int(digits) > length:
        raise ArgumentError(
            f"infill: the canvas holds {length} tokens, [data] length of the run; got a gap of "
            f"{shorten(digits)} in {shorten(text)!r}. Take a shorter gap, or train with a larger "
            "length."
        )
    return int(digits)


def _check_length(template: Template, length: int) -> Template:
    if len(template.ids) > length:
        kind = "infill" if template.whole else "prompt"
        raise ArgumentError(
            f"{kind}: the canvas holds {length} tokens, [data] length of the run; got a text of "
            f"{len(template.ids)}, {shorten(template.text)!r}. Shorten it, or train with a larger "
            "length."
        )
    return template
