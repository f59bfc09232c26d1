"""Toy model, objective and trainer, and a program that trains the toy model.

python toy.py RUN_DIR STEPS [SECONDS_PER_STEP]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddiff.distributed.single import SingleBackend
from ddiff.training.optimizers import muon
from ddiff.training.protocols import LossTerms
from ddiff.training.settings import Provenance, TrainerSettings
from ddiff.training.trainer import Trainer

ROWS, LENGTH, SYMBOLS, WIDTH = 8, 6, 5, 4
PARTS = ("batch_at", "rng_at", "backend", "multiplier", "tracker", "validation")  # not settings


@dataclass(frozen=True)
class Rows:
    ids: Tensor  # [B, LENGTH]
    scored: Tensor  # [B, LENGTH] bool, a different number in each row
    index: Tensor  # [B] slots in the global batch


class Net(nn.Module):
    """Toy network with an embedding, a hidden matrix, dropout and an output matrix."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.head.is_table = True  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(self.embedding(ids)))))


class Identify:
    """Toy objective: cross-entropy of predicting each symbol from itself.

    `noise` is added to the weights of the rows.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slots_seen: set[int] = set()

    def counts(self, batch: Rows) -> dict[str, Tensor]:
        return {"text": batch.scored.sum()}

    def __call__(
        self, batch: Rows, noise: Tensor, denominators: dict[str, Tensor], slots: int
    ) -> LossTerms:
        self.slots_seen.add(slots)
        losses = nn.functional.cross_entropy(
            self.module(batch.ids).transpose(1, 2), batch.ids, reduction="none"
        )
        weighted = (losses * batch.scored * (1.0 + noise[:, None])).sum()
        metrics = {"nats_per_symbol": ((losses * batch.scored).sum(), batch.scored.sum())}
        return LossTerms(weighted / denominators["text"], metrics)


def row(slot: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + slot)
    ids = torch.randint(SYMBOLS, (LENGTH,), generator=generator)
    return ids, torch.arange(LENGTH) < 1 + (slot * 5 + step) % LENGTH


def rows_at(accumulate: int) -> Callable[[int, int], Rows]:
    size = ROWS // accumulate

    def batch_at(step: int, micro: int) -> Rows:
        index = torch.arange(micro * size, (micro + 1) * size)
        ids, scored = zip(*(row(int(slot), step) for slot in index))
        return Rows(torch.stack(ids), torch.stack(scored), index)

    return batch_at


def rng_at(step: int, batch: Rows) -> Tensor:
    return torch.frac(0.618 * (batch.index + 31 * step)).double()


def toy_trainer(
    run_dir: str | Path, steps: int = 20, *, dropout: float = 0.0, **settings: Any
) -> Trainer:
    """Build a trainer of `Net` in float64 with Muon.

    `settings` override the defaults of `TrainerSettings` and the arguments of `Trainer`.
    """
    torch.manual_seed(0)
    objective = settings.pop("objective", None) or Identify(Net(dropout).double())
    optimizer = settings.pop("optimizer", muon)(objective.module)
    parts = {name: settings.pop(name) for name in PARTS if name in settings}
    recorded = {name: settings.pop(name, {}) for name in ("origins", "fingerprints")}
    settings = {"slots": ROWS, "log_every": 4, "checkpoint_every": 5} | settings
    batch_at = parts.pop("batch_at", None) or rows_at(settings.get("accumulate", 1))
    return Trainer(
        objective,
        optimizer,
        batch_at,
        parts.pop("rng_at", rng_at),
        TrainerSettings(steps=steps, **settings),
        backend=parts.pop("backend", None) or SingleBackend("cpu"),
        run_dir=run_dir,
        provenance=Provenance(**recorded),
        **parts,
    )


def main(run_dir: str, steps: str, seconds: str = "0") -> int:
    """Train with dropout, resuming from the newest checkpoint, and print each step.

    The arguments are a run directory, the number of steps, and seconds to wait in each step.
    """
    rows = rows_at(1)

    def batch_at(step: int, micro: int) -> Rows:
        time.sleep(float(seconds))
        print("step", step + 1, flush=True)
        return rows(step, micro)

    trainer = toy_trainer(run_dir, int(steps), dropout=0.2, batch_at=batch_at)
    summary = trainer.fit(trainer.checkpoints.newest())
    print("status", summary.status, summary.step, flush=True)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
