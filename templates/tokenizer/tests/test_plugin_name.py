"""The tokenizer plugin_name obeys every law of a tokenizer, and restores every text."""

from __future__ import annotations

from functools import partial

from ddiff_plugin_name.tokenizer import PluginName

from ddiff.testing import assert_laws, check_tokenizer

TEXTS = ["To be, or not to be.", "naïve café", "日本語", "", "a\nb"]


def test_tokenizer_obeys_every_law() -> None:
    config = PluginName.Config()
    load = partial(PluginName.load, config)
    assert_laws(check_tokenizer(PluginName.build(config), TEXTS, lambda path: load(path=path)))


def test_tokenizer_restores_every_text() -> None:
    tokenizer = PluginName.build(PluginName.Config())
    assert tokenizer.decode(tokenizer.encode(TEXTS)) == TEXTS
