"""Rows of symbols with a label, and a recipe that is conditioned on the label.

Rows of label 0 have symbols a and b, and rows of label 1 have symbols c and d.
"""

from __future__ import annotations

import json
import random

RECIPE = """
name = "labelled"
plugins = ["mdlm", "dit"]

[data]
kind = "jsonl"
files = ["rows.jsonl"]
labels = ["kind"]
held_out = 0.1
length = 8

[tokenizer]
kind = "alphabet"
symbols = "abcd"

[vocabulary]
kind = "flat"

[process]
kind = "mdlm"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 1
time = false
conditions = { kind = { classes = 2, dropout = 0.2 } }

[train]
steps = 80
batch = 32
warmup = 5
schedule = "constant"
optimizer = { kind = "adamw", lr = 0.01 }
checkpoint_every = 1000

[evaluate]
window = [0.01, 0.999]

[sample]
steps = 8
count = 2

[backend]
device = "cpu"
"""


def rows(count: int) -> str:
    """Return `count` rows as JSON lines, with alternating labels and uniformly random symbols."""
    draw = random.Random(0)
    kinds = [(number % 2, "cd" if number % 2 else "ab") for number in range(count)]
    return "".join(
        json.dumps({"text": "".join(draw.choice(two) for _ in range(8)), "kind": kind}) + "\n"
        for kind, two in kinds
    )
