"""Helpers of the tests of published checkpoints: import a tiny checkpoint, and compute logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference_forward import LENGTH, SYMBOLS, TOKENS
from torch import Tensor

import ddiff
from ddiff.core.times import Noisy
from ddiff.nn.denoiser import UNPADDED

SETTINGS = (
    f'tokenizer={{kind="alphabet", symbols="{SYMBOLS}"}}',
    'data={kind="markov", length=8, rows=64, validation=16}',
)
OPTIONS = tuple(f"--set={setting}" for setting in SETTINGS)


def import_run(source: Path, out: str = "runs/imported", **arguments: Any) -> Any:
    """Import a tiny checkpoint with the alphabet as tokenizer, and load the run."""
    ddiff.import_published(source, out, settings=SETTINGS, **arguments)
    return ddiff.load(out)


def draw_ids(seed: int = 1, batch: int = 3) -> Tensor:
    """Draw states [B,L], of which about half are masks (id V)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TOKENS, (batch, LENGTH), generator=generator)
    is_masked = torch.rand(batch, LENGTH, generator=generator) < 0.5
    return torch.where(is_masked, TOKENS, ids)


@torch.no_grad()
def run_logits(run: Any, noisy: Noisy) -> Tensor:
    """Return the logits [B,L,V] of the network of a run."""
    hidden = run.denoiser.eval().hidden_states(noisy, UNPADDED)
    logits = hidden @ run.denoiser.head.table.T + run.denoiser.head.bias
    return logits.unflatten(0, noisy.zt.shape)


def make_noisy(ids: Tensor) -> Noisy:
    return Noisy(ids, torch.full(ids.shape, 0.5, dtype=torch.float64), ids < TOKENS)
