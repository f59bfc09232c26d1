"""Recipes of several fields that train in a few seconds."""

from __future__ import annotations

DIGITS = """
name = "digits"
plugins = ["dit", "mdlm"]
data = "digits"

[fields.image]
process = "mdlm"

[fields.text]
tokenizer = "words"
length = 1
process = "mdlm"
weight = 0.3

[denoiser]
kind = "mmdit"
width = 16
layers = 1
heads = 2
dropout = 0.1

[objective.times]
kind = "mixture"
parts = [
    {path = "shared", weight = 0.2},
    {path = "shared", clean = ["text"], weight = 0.4},
    {path = "shared", clean = ["image"], weight = 0.2},
    {path = "shared", prior = ["image"], weight = 0.2},
]

[train]
steps = 10
batch = 8
warmup = 2
checkpoint_every = 4
keep = 5
log_every = 5

[evaluate]
targets = ["joint", "image | text", "text | image"]
samples = 16

[sample]
targets = ["joint", "image | text"]
count = 4
steps = 3
path = {kind = "first", order = ["text", "image"]}

[judge]
kind = "digits"
"""

PATCHES = """
name = "patches"
plugins = ["dit", "mdlm", "gaussian"]
data = {kind = "digits", image = "patches", patch = 4}

[fields.image]
process = "gaussian"
head = "vector"
sampler = "ddim"
normalizer = "standard"

[fields.text]
tokenizer = "words"
length = 1
process = "mdlm"

[denoiser]
kind = "mmdit"
width = 16
layers = 1
heads = 2

[objective.times]
kind = "mixture"
parts = [{path = "shared"}, {path = "shared", clean = ["image"]}]

[train]
steps = 4
batch = 8

[evaluate]
targets = ["joint", "text | image"]
samples = 8

[sample]
targets = ["joint"]
count = 2
steps = 3
"""
