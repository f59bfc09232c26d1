"""Train all families under equal conditions: one backbone, number of tokens and corpus.

    python benchmarks/side_by_side.py runs/side              # all families
    python benchmarks/side_by_side.py runs/side --gap        # changes of hierarchical diffusion
    python benchmarks/side_by_side.py runs/side --backbone   # changes of backbone and optimizer

All runs have the same number of steps, batch size and validation text. The first four families are
trained with three seeds, all other families with one seed. With `--gap` or `--backbone`, the script
instead trains the runs in the list `GAP` or `BACKBONE`. Each run of `GAP` tests one reason why
hierarchical diffusion may learn later than masked diffusion, and each run of `BACKBONE` one part of
the backbone or one setting of the training. The script can be stopped and started again; finished
runs are not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STEPS = 400
THREE_SEEDS = ("mdlm_small", "hdlm_small", "hdlm_three_level", "ar_small")
ONE_SEED = (
    "hdlm_xi_small",
    "gidd_small",
    "gidd_plus_small",
    "sedd_small",
    "sedd_uniform_small",
    "hybrid_epsilon_small",
    "hybrid_gamma_small",
    "bd3_small",
)


class Trained(NamedTuple):
    """Training run: name, recipe, and overrides of recipe keys (`settings`).

    The text `{side}` in an override is replaced by the directory of the runs.
    """

    name: str
    recipe: str
    settings: tuple[str, ...] = ()


def after(name: str, steps: int, parts: str = "all") -> tuple[str, str]:
    return f'train.init={{run="{{side}}/{name}", parts="{parts}"}}', f"train.steps={steps}"


# Each run tests a reason why a tree may learn later than masked diffusion, by one change to the
# recipe hdlm_small, with seed 0. A run whose weights initialize other runs is listed before them.
# If initial weights may help masked diffusion too, a run of masked diffusion starts from the same
# weights.
GAP = (
    Trained("mdlm_small_seed0", "mdlm_small", ("seed=0",)),
    Trained("mdlm_200", "mdlm_small", ("train.steps=200",)),
    Trained("hdlm_clip", "hdlm_small", ('objective.loss={kind="clip", largest=10.0}',)),
    Trained("hdlm_200_after_mdlm_200", "hdlm_small", after("mdlm_200", 200)),
    Trained("hdlm_100_after_mdlm_400", "hdlm_small", after("mdlm_small_seed0", 100)),
    Trained("mdlm_100_after_mdlm_400", "mdlm_small", after("mdlm_small_seed0", 100)),
    Trained("hdlm_gamma_3", "hdlm_small", ("process.gamma=3.0",)),
    Trained("hdlm_gamma_8", "hdlm_small", ("process.gamma=8.0",)),
    Trained("hdlm_rates_1_4", "hdlm_small", ('process={kind="hdlm", rates=[1.0, 4.0]}',)),
    Trained("hdlm_tied", "hdlm_small", ("denoiser.head=tied",)),
    Trained("hdlm_128_clusters", "hdlm_small", ("vocabulary.sizes=[128]",)),
)

# Each run has one change of the backbone or of the training of masked diffusion. Short runs, in
# which the changes show most.
SHORT = "train.steps=200"
BACKBONE = (
    Trained("short", "mdlm_small", (SHORT,)),
    Trained("short_other_seed", "mdlm_small", (SHORT, "seed=1")),
    Trained("short_none", "mdlm_small", (SHORT, "denoiser.convolution=0")),
    Trained("short_width3", "mdlm_small", (SHORT, "denoiser.convolution=3")),
    Trained("short_width7", "mdlm_small", (SHORT, "denoiser.convolution=7")),
    Trained("short_std01", "mdlm_small", (SHORT, "denoiser.convolution_std=0.1")),
    Trained("short_std05", "mdlm_small", (SHORT, "denoiser.convolution_std=0.5")),
    Trained("short_qk_norm", "mdlm_small", (SHORT, "denoiser.qk_norm=true")),
    Trained("short_random", "mdlm_small", (SHORT, "train.embeddings=random")),
    Trained("short_table003", "mdlm_small", (SHORT, "train.optimizer.table_lr=0.003")),
    Trained("short_muon04", "mdlm_small", (SHORT, "train.optimizer.lr=0.04")),
    Trained("short_ema", "mdlm_small", (SHORT, "train.ema=0.95")),
    Trained("short_adamw", "mdlm_small", (SHORT, 'train.optimizer={kind="adamw"}')),
    Trained("short_float32", "mdlm_small", (SHORT, "backend.precision=float32")),
)


def families() -> list[Trained]:
    runs = [(recipe, seed) for recipe in THREE_SEEDS for seed in range(3)] + [
        (recipe, 0) for recipe in ONE_SEED
    ]
    ordered = sorted(runs, key=lambda run: run[1])
    return [Trained(f"{recipe}_seed{seed}", recipe, (f"seed={seed}",)) for recipe, seed in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "side", type=Path, nargs="?", default=Path("runs/side"), help="directory of the runs"
    )
    parser.add_argument(
        "--gap", action="store_true", help="train changes of hierarchical diffusion"
    )
    parser.add_argument(
        "--backbone", action="store_true", help="train changes of the backbone and optimizer"
    )
    given = parser.parse_args()
    runs: Sequence[Trained] = families()
    if given.gap:
        runs = GAP
    if given.backbone:
        runs = BACKBONE
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}", flush=True)
        common = (f"run_dir={given.side / run.name}", f"train.steps={STEPS}", "sample.count=16")
        settings = (*common, *(text.replace("{side}", str(given.side)) for text in run.settings))
        command = [sys.executable, "-m", "ddiff", "run", run.recipe]
        subprocess.run(
            [*command, *(part for text in settings for part in ("--set", text))], check=True
        )


if __name__ == "__main__":
    main()
