"""Load the tokenizer of a run directory, also one that a plugin defines."""

from __future__ import annotations

from ddiff.data.tokenizer import Tokenizer, load_tokenizer
from ddiff.recipe.component import ComponentSpec


def load_saved_tokenizer(spec: ComponentSpec, path: str) -> Tokenizer:
    """Load a tokenizer that `save` has written.

    Args:
        spec: tokenizer of the recipe of the run. If the component defines `load(config, path)`,
            this function loads the file. Otherwise the file must be of a tokenizer of ddiff.
        path: file.
    """
    if spec.members.load is None:
        return load_tokenizer(path)
    tokenizer: Tokenizer = spec.load(path=path)
    return tokenizer
