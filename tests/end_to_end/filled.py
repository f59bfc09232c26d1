"""Names of three and five symbols in rows of six, and a recipe for them."""

from __future__ import annotations

from itertools import product

RECIPE = """
name = "filled"
plugins = ["mdlm", "dit"]

[data]
kind = "symbols"
files = ["filled.txt"]
validation = ["filled_validation.txt"]
fill = " "
length = 6

[tokenizer]
kind = "alphabet"
symbols = " abcd"

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

[train]
steps = 2
batch = 16
warmup = 1
schedule = "constant"
optimizer = { kind = "adamw", lr = 0.01 }

[evaluate]
draws = 1

[sample]
steps = 6
count = 16
batch = 16

[judge]
kind = "strings"

[backend]
device = "cpu"
"""
TRAINING = ["".join(name) for name in product("abcd", repeat=3)]
VALIDATION = ["abcda", "bcdab", "cdabc", "dabcd"]
