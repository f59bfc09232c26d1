"""Message of the error that a call raises."""

from __future__ import annotations

from typing import Any

import pytest

from ddiff.errors import DataError


def message(call: Any, *arguments: Any, error: type[Exception] = DataError, **options: Any) -> str:
    """Assert that `call` raises `error` with one line of text, and return the text."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text
