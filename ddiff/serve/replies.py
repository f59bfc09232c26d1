"""Bodies of the responses, in the form of the OpenAI API with further fields."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ddiff.data.tokenizer import Tokenizer
from ddiff.serve.engine import Drawn
from ddiff.serve.requests import Request, Row


class ReplyWriter:
    """Writer of the responses to one request.

    Further fields next to those of the API: `seed` of the request, and `ids` (all token ids of the
    sample, prompt included) and `nfe` (network evaluations) of a choice.
    """

    def __init__(self, request: Request, model: str, tokenizer: Tokenizer) -> None:
        self.request = request
        self._tokenizer = tokenizer
        is_infill = request.endpoint == "infill"
        self._head = {
            "id": f"{'infill' if is_infill else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "infill" if is_infill else "text_completion",
            "created": int(time.time()),
            "model": model,
            "seed": request.seed,
        }
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    def write_choice(self, row: Row, drawn: Drawn) -> dict[str, Any]:
        """Return the choice of a sample, and add its tokens to the usage."""
        given = int(row.template.given.sum())
        self._usage["prompt_tokens"] += given
        self._usage["completion_tokens"] += len(drawn.ids) - given
        self._usage["total_tokens"] += len(drawn.ids)
        reason = "length"
        if self.request.endpoint == "infill":
            text = self._tokenizer.decode([drawn.ids])[0]
        else:
            text, reason = self._cut_completion(drawn.ids, given)
        return {
            "index": row.index,
            "text": text,
            "finish_reason": reason,
            "logprobs": None,
            "ids": drawn.ids,
            "nfe": drawn.nfe,
        }

    def _cut_completion(self, ids: Sequence[int], given: int) -> tuple[str, str]:
        """Return the text after the prompt, and why it ends.

        The text ends before the first end mark of a document, or before a stop text.
        """
        tokenizer = self._tokenizer
        reason = "length"
        kept = list(ids)
        if tokenizer.eos_id is not None and tokenizer.eos_id in kept[given:]:
            kept = kept[: kept.index(tokenizer.eos_id, given)]
            reason = "stop"
        # Some tokenizers drop a space at the beginning of a text, so the prompt is decoded too.
        whole, prompt = tokenizer.decode([kept, kept[:given]])
        text = whole[len(prompt) :]
        if not whole.startswith(prompt):
            text = tokenizer.decode([kept[given:]])[0]
        places = [text.find(stop) for stop in self.request.stop]
        found = [place for place in places if place >= 0]
        if found:
            return text[: min(found)], "stop"
        return text, reason

    def write_reply(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of a response with all choices."""
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return {**self._head, "choices": ordered, "usage": self._usage}

    def write_start(self, row: Row, size: int, edits: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the first event of a sample: number of positions, and the given tokens."""
        return self._write_event(row, {"step": 0, "positions": size, "edits": edits})

    def write_step(self, row: Row, step: int, edits: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the event of a step."""
        return self._write_event(row, {"step": step, "edits": edits})

    def write_last(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the last event of a sample."""
        return {**self._head, "choices": [choice], "usage": self._usage}

    def _write_event(self, row: Row, fields: dict[str, Any]) -> dict[str, Any]:
        # A client of the API appends the texts of all events, so only the last event has a text.
        choice = {"index": row.index, "text": "", "finish_reason": None, "logprobs": None, **fields}
        return {**self._head, "choices": [choice]}
