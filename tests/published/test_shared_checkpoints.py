"""Tiny checkpoints of the published programs, if their folder is next to the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from imports import import_run, make_noisy, run_logits
from reference_forward import LENGTH, TOKENS, write_checkpoint
from safetensors import safe_open
from test_layouts import FULL

from ddiff.core.times import Noisy

SHARED = next(
    (
        parent / "shared/checkpoints"
        for parent in Path(__file__).resolve().parents
        if (parent / "shared/checkpoints").is_dir()
    ),
    None,
)
pytestmark = pytest.mark.skipif(SHARED is None, reason="there is no folder shared/checkpoints")

# Their float32 sums have another order than ours; the logits reach 41. The published block network
# itself differs by 4e-5 from its evaluation in float64, and ours by 5e-5.
TOLERANCES = {"mdlm": 5e-5, "hybrid_epsilon": 5e-5, "bd3lm": 1e-4}


@pytest.mark.parametrize("family", TOLERANCES)
def test_import_has_the_logits_of_the_published_program(folder: Path, family: str) -> None:
    assert SHARED is not None
    with safe_open(SHARED / f"{family}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    weights = {}
    for name, tensor in tensors.items():
        if not name.startswith(("input.", "output.")):
            weights[name] = tensor
    run = import_run(write_checkpoint(Path("published"), config, weights))
    expected = tensors["output.logits"][..., :TOKENS]
    if family == "bd3lm":
        noisy, clean = tensors["input.ids_noisy_then_clean"].chunk(2, -1)
        block = (torch.arange(LENGTH) // config["block_size"]).expand_as(noisy)
        time = torch.full(noisy.shape, 0.5, dtype=torch.float64)
        given = Noisy(noisy, time, noisy < TOKENS, block=block, memory=clean)
    else:
        given = make_noisy(tensors["input.ids"])
    found = run_logits(run, given)
    assert torch.allclose(found, expected, atol=TOLERANCES[family], rtol=0.0)


INVENTORY = {
    "mdlm": ("mdlm DIT(raw backbone)", "backbone."),
    "bd3lm": ("bd3lm HF", ""),
    "hybrid_epsilon": ("snow epsilon", ""),
    "duo_ar": ("duo AR", ""),
}


@pytest.mark.parametrize("family", INVENTORY)
def test_full_size_names_and_shapes_equal_the_inventory(family: str) -> None:
    assert SHARED is not None
    name, prefix = INVENTORY[family]
    inventory = json.loads((SHARED / "layouts_full_size.json").read_text())[name]
    _, shapes, count, parameters = FULL[family]
    found = {prefix + key: shape for key, (shape, _) in inventory["tensors"].items()}
    assert found == shapes
    assert (len(found), inventory["parameters"]) == (count, parameters)
