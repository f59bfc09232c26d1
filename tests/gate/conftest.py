"""Fixture for the messages of PluginError."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ddiff.errors import PluginError


@pytest.fixture
def message() -> Callable[..., str]:
    """Function that calls `call(*arguments)` and returns the message of the PluginError raised."""

    def call_and_catch(call: Callable[..., object], *arguments: object) -> str:
        with pytest.raises(PluginError) as caught:
            call(*arguments)
        text = str(caught.value)
        assert "\n" not in text, "an error message must be one paragraph"
        return text

    return call_and_catch
