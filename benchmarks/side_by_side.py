"""Train all families under equal conditions: one backbone, number of tokens and corpus.

    python benchmarks/side_by_side.py runs/side            # all families
    python benchmarks/side_by_side.py runs/side --gap      # ablations of hierarchical diffusion

All runs have the same number of steps, batch size and validation text. The first three families are
trained with three seeds, all other families with one seed. With `--gap`, the script instead trains
the runs in the list `GAP`. Each of these runs tests one reason why hierarchical diffusion may learn
later than masked diffusion. The script can be stopped and started again; finished runs are not
repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

STEPS = 400
THREE_SEEDS = ("mdlm_small", "hdlm_small", "ar_small")
ONE_SEED = (
    "hdlm_xi_small",
    "hdlm_three_level",
    "gidd_small",
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


LOW = 'objective.times={kind="flat", start=0.02, stop=0.3}'


def after(name: str, steps: int, parts: str = "all") -> tuple[str, str]:
    return f'train.init={{run="{{side}}/{name}", parts="{parts}"}}', f"train.steps={steps}"


# Each run tests a reason why a tree may learn later than masked diffusion, by one change to the
# recipe hdlm_small, with seed 0. A run whose weights initialize other runs is listed before them.
# If initial weights may help masked diffusion too, a run of masked diffusion starts from the same
# weights. At low noise times most tokens are visible.
GAP = (
    Trained("mdlm_200", "mdlm_small", ("train.steps=200",)),
    Trained("mdlm_300", "mdlm_small", ("train.steps=300",)),
    Trained("mdlm_low_100", "mdlm_small", (LOW, "train.steps=100")),
    Trained("mdlm_300_after_low_100", "mdlm_small", after("mdlm_low_100", 300)),
    Trained("hdlm_hard", "hdlm_small", ('objective.loss={kind="hard", largest=10.0}',)),
    Trained("hdlm_100_after_mdlm_400", "hdlm_small", after("mdlm_small_seed0", 100)),
    Trained("hdlm_100_after_mdlm_300", "hdlm_small", after("mdlm_300", 100)),
    Trained("hdlm_200_after_mdlm_200", "hdlm_small", after("mdlm_200", 200)),
    Trained("hdlm_embeddings", "hdlm_small", after("mdlm_small_seed0", STEPS, "embeddings")),
    Trained("mdlm_embeddings", "mdlm_small", after("mdlm_small_seed0", STEPS, "embeddings")),
    Trained("hdlm_rates_1_4", "hdlm_small", ('process={kind="hdlm", rates=[1.0, 4.0]}',)),
    Trained("hdlm_tied", "hdlm_small", ("denoiser.head=tied",)),
    Trained(
        "hdlm_even", "hdlm_small", ('objective.loss={kind="clip", smallest=1.0, largest=1.0}',)
    ),
    Trained("hdlm_gamma_2", "hdlm_small", ("process.gamma=2.0",)),
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
        "--gap", action="store_true", help="train ablations of hierarchical diffusion"
    )
    given = parser.parse_args()
    runs = GAP if given.gap else families()
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
