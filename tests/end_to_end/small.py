"""Recipe that trains in a second, and its corpus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

RECIPE = """
name = "small"
plugins = ["hdlm", "mdlm", "dit"]

[data]
kind = "text"
files = ["corpus.txt"]
split = "line"
held_out = 0.2
length = 8

[tokenizer]
kind = "bpe"
size = 270

[vocabulary]
kind = "clusters"
sizes = [8]

[process]
kind = "hdlm"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
dropout = 0.1
head = "levelwise"

[train]
steps = 30
batch = 4
warmup = 3
optimizer = "muon"
checkpoint_every = 7
log_every = 5

[evaluate]
batch = 16

[sample]
steps = 4
count = 2
"""

CORPUS = "\n".join(
    f"the {a} {b} sat on the {c}" for a in ("old", "red") for b in ("cat", "hat") for c in "xyzabcd"
)
SENTENCES = "\n".join(
    f"the {a} {b} sat on the {c} and the {d} ran to it."
    for a in ("old", "red")
    for b in ("cat", "hat", "rat")
    for c in ("mat", "box", "bed")
    for d in ("dog", "cow", "pig")
)
"""Corpus whose lines are sentences that are long enough for gaps ([sample] gaps)."""
FLAT = ['vocabulary={kind="flat"}', 'process={kind="mdlm"}', 'denoiser.head="tokens"']
AUTOREGRESSIVE = [
    'vocabulary={kind="flat"}',
    'objective={kind="ar"}',
    'denoiser.head="tokens"',
    'sample.sampler="left_to_right"',
]
"""Settings of an autoregressive run of `make_autoregressive_recipe`."""


def make_autoregressive_recipe() -> str:
    """Return `RECIPE` with the plugin of autoregression and without a process."""
    recipe = RECIPE.replace('[process]\nkind = "hdlm"\n', "")
    return recipe.replace('"hdlm", "mdlm"', '"ar"')


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Context manager: change to `folder`, with the recipe, its corpus and a separate cache.

    Module fixtures use it, because they cannot use the fixture `folder`.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        Path("small.toml").write_text(RECIPE)
        Path("corpus.txt").write_text(CORPUS)
        yield
