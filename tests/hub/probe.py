"""Loads saved models in a Python that cannot import ddiff, and writes their logits and samples.

python probe.py FOLDER NAME... OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DRAWS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "confidence": {
        "sampler": "confidence",
        "steps": 3,
        "by": "top",
        "temperature": 0.7,
        "top_p": 0.9,
    },
    "misspelt": {"temprature": 0.5},
    "missing": {"sampler": "psi"},
}
"""Arguments of `generate` whose results are written."""


class Blocked:
    """Finder that refuses to import ddiff and its plugins."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0].startswith("ddiff"):
            raise ImportError(f"{name} is blocked")


def make_inputs(num_states: int) -> tuple[Any, Any]:
    """Return random states [2,8] and a time per sequence."""
    import torch

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(num_states, (2, 8), generator=generator)
    return ids, torch.tensor([0.25, 0.75], dtype=torch.float64)


def main(folder: str, *rest: str) -> None:
    *names, output = rest
    sys.meta_path.insert(0, Blocked())
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    found = {}
    for name in names:
        place = str(Path(folder) / name)
        model = AutoModel.from_pretrained(place, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
        ids, timesteps = make_inputs(model.config.vocab_size)
        with torch.no_grad():
            found[name] = {
                "logits": model(ids, timesteps=timesteps).logits,
                "module": type(model).__module__,
                "ids": tokenizer("the old cat <|eos|>")["input_ids"],
            }
        for label, settings in DRAWS.items():
            try:
                drawn = model.generate(batch_size=2, seed=5, **settings)
            except Exception as error:  # the error classes are in the file of the model
                drawn = f"{type(error).__name__}: {error}"
            found[name][label] = drawn
    assert not [name for name in sys.modules if name.partition(".")[0] == "ddiff"]
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
