"""What a sample is asked to keep: a prompt that it goes on from, or a text with gaps that it fills."""

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
    """A sequence that is partly written: ids [n] and where they are given, bool [n].

    What comes after it is free, or, where it is `whole`, not there at all.
    """

    text: str
    ids: Tensor
    given: Tensor
    whole: bool

    @property
    def has_suffix(self) -> bool:
        """Whether something is given after a gap."""
        return bool((self.given[1:] & ~self.given[:-1]).any())


class Frame(NamedTuple):
    """Templates on canvases of one length: words [B,L] kept where `clamped` [B,L]; `valid` [B,L], None: everything."""

    words: Tensor
    clamped: Tensor
    valid: Tensor | None

    def to(self, device: torch.device) -> Frame:
        valid = None if self.valid is None else self.valid.to(device)
        return Frame(self.words.to(device), self.clamped.to(device), valid)

    def rows(self, chosen: slice) -> Frame:
        return Frame(
            self.words[chosen],
            self.clamped[chosen],
            None if self.valid is None else self.valid[chosen],
        )


def prompt(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """A text that samples of `length` tokens begin with. ArgumentError when it does not fit or is no text."""
    _check_text(text, "prompt")
    ids = _encoded(text, text, tokenizer)
    return _fitting(Template(text, ids, torch.ones_like(ids, dtype=torch.bool), False), length)


def infill(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """A whole text with gaps: `She [MASK:8] to Bath` has eight free tokens, and ends where it ends.

    One space before a gap belongs to it, since the words that fill it bring their own. ArgumentError for a text without
    a gap, a gap of no tokens, and more than `length` tokens.
    """
    _check_text(text, "infill")
    ids, given, rest = [], [], 0
    for gap in GAP.finditer(text):
        before = _encoded(text[rest : gap.start()], text, tokenizer)
        size = _size(gap, text, length)
        ids += [before, torch.zeros(size, dtype=torch.long)]
        given += [torch.ones_like(before, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)]
        rest = gap.end()
    if not ids:
        raise ArgumentError(
            f"infill: the text must have a gap, such as [MASK:8] for eight tokens; got {shorten(text)!r}. A text to "
            "continue is a prompt."
        )
    last = _encoded(text[rest:], text, tokenizer)
    return _fitting(
        Template(
            text,
            torch.cat([*ids, last]),
            torch.cat([*given, torch.ones_like(last, dtype=torch.bool)]),
            True,
        ),
        length,
    )


def templates_of(
    prompts: str | Sequence[str] | None,
    infills: str | Sequence[str] | None,
    tokenizer: Tokenizer,
    length: int,
) -> list[Template]:
    """The templates of one or several prompts or infill texts. ArgumentError for both at once, and for what is no text."""
    if prompts is not None and infills is not None:
        raise ArgumentError(
            "run.sample: prompt and infill exclude each other; begin the infill text with the prompt."
        )
    texts, read = (infills, infill) if prompts is None else (prompts, prompt)
    if texts is None:
        return []
    # bytes and mappings can be iterated over, too, and would be taken for their numbers or keys
    listed = (
        list(texts)
        if isinstance(texts, Iterable) and not isinstance(texts, str | bytes | dict)
        else [texts]
    )
    return [read(text, tokenizer, length) for text in listed]


def check_no_suffix(templates: Iterable[Template], who: str, remedy: str) -> None:
    """Raises ArgumentError for a gap with text after it, which `who` goes from left to right without seeing."""
    for template in templates:
        if template.has_suffix:
            raise ArgumentError(
                f"infill: {shorten(template.text)!r} has text after a gap, which nobody would read: {who} goes from left "
                f"to right and does not see what comes later. Give a prompt, or {remedy}."
            )


def framed(templates: Sequence[Template], length: int, filler: int) -> Frame:
    """The templates side by side; what is not there of a whole one holds `filler` and is not valid."""
    shape = len(templates), length
    words, clamped = torch.full(shape, filler), torch.zeros(shape, dtype=torch.bool)
    valid = torch.ones(shape, dtype=torch.bool)
    for row, template in enumerate(templates):
        size = len(template.ids)
        words[row, :size], clamped[row, :size] = template.ids, template.given
        if template.whole:
            valid[row, size:], clamped[row, size:] = False, True
    # a mask even where nothing is padded: a sample then is the same whatever it is batched with
    return Frame(words, clamped, valid if any(template.whole for template in templates) else None)


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; blank lines are left out. DataError when there is none, or the file is no UTF-8 text."""
    try:
        with open_uncompressed(str(path)) as file:
            prompts = [
                line
                for line in text_lines(file, printable(str(path)))
                if line and not line.isspace()
            ]
    except DataError as error:
        raise DataError(
            f"--prompts: {error} A UTF-8 text file is due, one prompt a line."
        ) from error
    if not prompts:
        raise DataError(f"--prompts: {printable(str(path))} holds no prompt. Write one a line.")
    return prompts


def _check_text(text: str, argument: str) -> None:
    try:
        check_text(text, f"{argument}: {shorten(text)!r}" if isinstance(text, str) else argument)
    except DataError as error:
        raise ArgumentError(str(error)) from error


def _encoded(piece: str, text: str, tokenizer: Tokenizer) -> Tensor:
    try:
        return torch.tensor(tokenizer.encode([piece])[0], dtype=torch.long)
    except Unencodable as error:
        raise error.at(0, repr(shorten(text))) from None


def _size(gap: re.Match[str], text: str, length: int) -> int:
    """The tokens of a gap. Refused here where it is longer than the canvas, before a tensor of that length is made."""
    written = gap[1]
    if written is None or not (written.isascii() and written.isdecimal()) or not written.strip("0"):
        raise ArgumentError(
            f"infill: a gap is written [MASK:8], with the number of its tokens, at least 1; got "
            f"{shorten(gap[0].strip())!r} in {shorten(text)!r}."
        )
    digits = written.lstrip("0")
    if len(digits) > 18 or int(digits) > length:
        raise ArgumentError(
            f"infill: the canvas holds {length} tokens, [data] length of the run; got a gap of {shorten(digits)} in "
            f"{shorten(text)!r}. Take a shorter gap, or train with a larger length."
        )
    return int(digits)


def _fitting(template: Template, length: int) -> Template:
    if len(template.ids) > length:
        kind = "infill" if template.whole else "prompt"
        raise ArgumentError(
            f"{kind}: the canvas holds {length} tokens, [data] length of the run; got a text of {len(template.ids)}, "
            f"{shorten(template.text)!r}. Shorten it, or train with a larger length."
        )
    return template
