"""The encoder plugin of docs/data.md: one file, installed and used by `ddiff encode`."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

import ddiff
from ddiff.cli import main
from ddiff.plugin.loader import load_plugins

ROOT = Path(__file__).parents[2]
RECIPE = f"""
name = "example"
extends = "{ROOT / "recipes" / "mdlm_small.toml"}"
plugins = ["mdlm", "dit", "hashing"]

[data]
kind = "text"
files = ["corpus.txt"]
split = "line"
held_out = 0.3

[encoder]
kind = "hashing"
dim = 8
"""
LINES = [f"the {a} {b} sat" for a in ("old", "red", "wet") for b in ("cat", "hat", "mat", "rat")]


def read_example() -> str:
    """Return the code of the plugin in docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    found = re.search(r'^    """ddiff_hashing\.py.*?(?=^\S)', page, re.MULTILINE | re.DOTALL)
    assert found is not None
    return dedent(found[0])


@pytest.fixture
def _installed(distribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(
        "hashing-dist", "1.0", {"hashing": "ddiff_hashing"}, {"ddiff_hashing": read_example()}
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    Path("corpus.txt").write_text("\n".join(LINES))
    Path("example.toml").write_text(RECIPE)


@pytest.mark.usefixtures("_installed")
def test_encoder_in_one_file_encodes_the_documents_of_a_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["encode", "example.toml", "--out", "vectors", "--shard-size", "3"])
    assert not ended.value.code, capsys.readouterr().err
    vectors = ddiff.EncodedVectors.open("vectors", dim=8)
    documents = ddiff.read_text_files(["corpus.txt"], held_out=0.3, split="line")
    encoder = load_plugins(["hashing"]).component("encoder", "hashing").load()(8)
    for part, read in (
        (documents.train, vectors.train),
        (documents.validation, vectors.validation),
    ):
        found, present = read.read(range(len(part)))
        assert present.all()
        assert np.array_equal(found, encoder.encode(part["text"]))
    assert vectors.settings.encoder == encoder.fingerprint


@pytest.mark.usefixtures("_installed")
def test_encoder_of_an_unlisted_plugin_is_refused_with_the_plugin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["encode", "example.toml", "--set", 'plugins=["mdlm", "dit"]'])
    assert ended.value.code == 2
    assert 'Add "hashing" to plugins' in capsys.readouterr().err
