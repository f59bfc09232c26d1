"""Groups of symbols as groups of `[vocabulary] kind = "patterns"`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import islice


def format_groups(groups: Sequence[str | Sequence[str]]) -> str:
    """Return groups of symbols, or lists of groups, as TOML text of regular expressions."""
    patterns: list[str | list[str]] = []
    for group in groups:
        if isinstance(group, str):
            patterns.append(_match_any(group))
        else:
            patterns.append([_match_any(symbols) for symbols in group])
    return json.dumps(patterns)  # lists of strings are written alike in JSON and TOML


def _match_any(symbols: str) -> str:
    return f"[{re.escape(symbols)}]"


def shuffle_symbols(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return groups of the same sizes with the symbols in a random order, always the same one."""
    symbols = [symbol for members in groups for group in members for symbol in group]
    random.Random(0).shuffle(symbols)
    rest = iter(symbols)
    return [["".join(islice(rest, len(group))) for group in members] for members in groups]
