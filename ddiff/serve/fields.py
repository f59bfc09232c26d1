"""Fields of a JSON request: their types and ranges.

body = read_object(data)
fields = Fields(body, {"prompt", "n"}, neutral={"user": [""]}, refused={"logprobs": "..."})
count = fields.integer("n", 1, 32)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from ddiff.errors import shorten, suggest
from ddiff.serve.refusals import Refusal


def read_object(data: bytes) -> dict[str, Any]:
    """Parse the body of a request. Raises Refusal unless it is a JSON object."""
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise Refusal("The body is nested too deeply. Send a flat JSON object.") from None
    except ValueError as error:  # also invalid UTF-8, and integers with too many digits
        raise Refusal(
            f"The body must be a JSON object in UTF-8; got {shorten(repr(data), 80)} ({error})."
        ) from None
    if not isinstance(found, dict):
        raise Refusal(f"The body must be a JSON object; got {shorten(repr(found), 80)}.")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


class Fields:
    """Reader of the fields of a request. A field that is null counts as absent.

    Args:
        body: JSON object of the request.
        known: names of the fields that the endpoint reads.
        neutral: fields without effect, with the values that are accepted and ignored.
        refused: fields that the endpoint refuses, with the reason.

    Raises Refusal for any other field.
    """

    def __init__(
        self,
        body: Mapping[str, Any],
        known: Collection[str],
        neutral: Mapping[str, Collection[Any]],
        refused: Mapping[str, str],
    ) -> None:
        self.values = {name: value for name, value in body.items() if value is not None}
        for name, value in self.values.items():
            if name in known:
                continue
            if name in neutral and _is_among(value, neutral[name]):
                continue
            if name in refused:
                raise Refusal(
                    f"{name}: {refused[name]}; got {_show(value)}. Leave the field out.",
                    name,
                    code="unsupported_parameter",
                )
            raise Refusal(
                f"{shorten(name)}: this endpoint has no such field.{suggest(name, known)} Its "
                f"fields are {', '.join(sorted(known))}.",
                shorten(name),
                code="unknown_parameter",
            )

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return an integer in [low, high], or None if the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        # true is an int in Python
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(name, f"an integer in {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number in [low, high], or None if the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            self._refuse(name, f"a number in {low:g}..{high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return a boolean, False if the field is absent."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self._refuse(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """Return a string, or None if the field is absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self._refuse(name, "a string")
        return value

    def texts(self, name: str, most: int) -> list[str] | None:
        """Return one string or up to `most` strings as a list, or None if the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        found = [value] if isinstance(value, str) else value
        is_list = isinstance(found, list) and 1 <= len(found) <= most
        if not is_list or not all(isinstance(text, str) for text in found):
            self._refuse(name, f"a string or a list of 1 to {most} strings")
        return list(found)

    def table(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object, or None if the field is absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self._refuse(name, "a JSON object")
        return value

    def _refuse(self, name: str, expected: str) -> NoReturn:
        value = self.values[name]
        raise Refusal(f"{name}: must be {expected}; got {_show(value)}.", name)


def _is_among(value: Any, accepted: Collection[Any]) -> bool:
    # False == 0 in Python, so the types are compared too
    return any(type(value) is type(other) and value == other for other in accepted)


def _show(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=True), 80)
