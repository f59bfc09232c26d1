"""Kill runs at random moments, resume them, and compare the results with uninterrupted runs.

    python benchmarks/soak.py --trials 50 --seed 0

In each trial, a run of a tiny recipe is killed with SIGKILL once or twice, and is resumed after
each kill until the run is finished. The moment of a kill is random, from the start of the process
to the evaluation after training. Half of the kills are delayed until a checkpoint is being saved:
the directory of the checkpoint exists, and its marker file does not. If a run has several
processes, either one process or all processes are killed.

There are two types of trials:

- The layout (a single process, or ddp or fsdp on two processes) stays the same. The recipe has
  dropout and Muon. Metrics, checkpoint, evaluation and samples must be bitwise identical to those
  of the uninterrupted run.
- The layout is chosen at random at each start ("mixed"). The recipe has AdamW and no dropout.
  Losses must agree with those of the uninterrupted run within 1e-6 relative, and weights within
  1e-5 in norm.

The exit code is 0 if all trials agree. `make soak` runs fifty trials; the test suite runs three.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 20
EVERY = (1, 3)  # steps between checkpoints
RECIPE = f"""
name = "soak"
plugins = ["mdlm", "dit"]

[data]
kind = "markov"
rows = 256
validation = 16
length = 16

[tokenizer]
kind = "alphabet"

[vocabulary]
kind = "flat"

[process]
kind = "mdlm"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2

[train]
steps = {STEPS}
batch = 8
warmup = 3
log_every = 5

[evaluate]
draws = 1

[sample]
steps = 4
count = 2
"""
PROCESSES = {"single": 1, "ddp": 2, "fsdp": 2}
SAME = ("train.optimizer.kind=muon", "denoiser.dropout=0.2")
MIXED = ("train.optimizer.kind=adamw", "denoiser.dropout=0.0")
PATIENCE = 120.0  # time limit of each wait on a busy machine, in seconds
PRELOAD = [
    "ddiff.runs.stages",
    "ddiff.distributed.data_parallel",
    "ddiff.checkpoint.dcp_storage",
    "torch._dynamo",
    "ddiff_dit.dit",
]


class Kill(NamedTuple):
    """Random moment at which a run is killed.

    Attributes:
        share: fraction of the remaining training steps to complete before the kill.
        delay: seconds from the last of these steps to the kill.
        in_save: delay the kill further until a checkpoint is being saved.
        all_ranks: kill all processes of the run instead of one.
    """

    share: float
    delay: float
    in_save: bool
    all_ranks: bool


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", default=None, help="single, ddp, fsdp or mixed; default: all"
    )
    given = parser.parse_args()
    layouts = [kind for kind in PROCESSES if kind in backends()]
    kinds = given.kinds or [*layouts, "mixed"]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["DDIFF_CACHE"] = str(Path(folder, "cache"))
        # Ignore warnings about the semaphores of killed processes.
        os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
        return soak(Path(folder), kinds, layouts, given.trials, random.Random(given.seed))


def backends() -> list[str]:
    from ddiff.plugin.loader import survey_plugins

    return survey_plugins()[0].names("backend")


def soak(
    folder: Path, kinds: Sequence[str], layouts: Sequence[str], trials: int, draw: random.Random
) -> int:
    began, faults, moments = time.monotonic(), 0, Counter[str]()
    for trial in range(trials):
        kind, every = kinds[trial % len(kinds)], draw.choice(EVERY)
        whole = folder / f"whole_{kind}_{every}"
        if not whole.exists():
            Run(whole, "single" if kind == "mixed" else kind, kind, every).finish()
        place, deaths = folder / f"trial_{trial}", draw.randint(1, 2)
        seen, used = [], []
        for _ in range(deaths):
            used.append(draw.choice(layouts) if kind == "mixed" else kind)
            seen.append(Run(place, used[-1], kind, every).start_and_kill(draw_kill(draw)))
        used.append(draw.choice(layouts) if kind == "mixed" else kind)
        Run(place, used[-1], kind, every).finish()
        moments.update(seen)
        found = list(differences(whole, place, exact=kind != "mixed"))
        faults += bool(found)
        kills = ", ".join(f"{layout} killed {moment}" for layout, moment in zip(used, seen))
        print(
            f"{trial + 1:3d} {kind}: {kills}; ended {used[-1]}: {'; '.join(found) or 'equal'}",
            flush=True,
        )
        shutil.rmtree(place)
    minutes = (time.monotonic() - began) / 60.0
    when = ", ".join(f"{count} {moment}" for moment, count in moments.most_common())
    print(
        f"{trials} runs, {sum(moments.values())} times killed ({when}), "
        f"{faults} ended differently; {minutes:.1f} min"
    )
    return int(faults > 0)


def draw_kill(draw: random.Random) -> Kill:
    return Kill(draw.random(), draw.uniform(0.0, 0.05), draw.random() < 0.5, draw.random() < 0.5)


class Run:
    """Run of the tiny recipe in a directory, on one process or on several ranks."""

    def __init__(self, place: Path, layout: str, kind: str, every: int) -> None:
        self.place, self.layout = place, layout
        self.settings = [
            f"run_dir={json.dumps(str(place))}",
            f"train.checkpoint_every={every}",
            *(MIXED if kind == "mixed" else SAME),
            *(
                [f"backend.kind={layout}", f"backend.processes={PROCESSES[layout]}"]
                if layout != "single"
                else []
            ),
        ]
        self.log = place.with_suffix(".log")

    def finish(self) -> None:
        """Run the recipe to the end; raise RuntimeError with the log if the run fails."""
        ranks = self._start()
        deadline = time.monotonic() + PATIENCE
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        _kill(ranks)
        if any(code != 0 for code in codes):
            raise RuntimeError(
                f"{self.place} in {self.layout} failed with exit codes {codes}:\n"
                f"{self.log.read_text()[-4000:]}"
            )

    def start_and_kill(self, kill: Kill) -> str:
        """Start the run, kill it at the given moment, and return a description of the moment."""
        before = self._lines()
        ranks = self._start()
        deadline = time.monotonic() + PATIENCE
        target = before + int(kill.share * (STEPS + 1 - before))
        while self._lines() < target and _alive(ranks) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(kill.delay)
        if kill.in_save:
            while not self._unfinished() and _alive(ranks) and time.monotonic() < deadline:
                pass
        alive = _alive(ranks)
        last = ranks[-1]
        assert last.pid
        if kill.all_ranks or len(ranks) == 1 or not alive:
            _kill(ranks)
        else:  # the other ranks fail, or wait as for a lost machine
            os.kill(last.pid, signal.SIGKILL)
            for rank in ranks:
                rank.join(10.0)
            _kill(ranks)
        if not alive:
            return "after its end"
        if self._unfinished():
            return "in a save"
        return "before its first step" if not self._lines() else "elsewhere"

    def _start(self) -> list[BaseProcess]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        world = PROCESSES[self.layout]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (world, port, self.settings, str(self.log), sys.path)
        ranks: list[Any] = [
            context.Process(target=train, args=(rank, *arguments)) for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        return ranks

    def _lines(self) -> int:
        path = self.place / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def _unfinished(self) -> list[str]:
        """Return the names of incomplete checkpoints, which have no marker file."""
        folder = self.place / "checkpoints"
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [name for name in names if not (folder / name / "complete.json").exists()]


def train(rank: int, world: int, port: int, settings: list[str], log: str, path: list[str]) -> None:
    """Train as rank `rank` of `world` ranks; the main function of a separate process.

    port: port of rank 0. settings: overrides of recipe keys. log: path of the log file. path:
    `sys.path` of the parent process.
    """
    sys.path[:] = path
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from ddiff.recipe.resolve import parse_recipe
    from ddiff.runs.stages import run_recipe

    torch.set_num_threads(1)
    sys.exit(run_recipe(parse_recipe(RECIPE, "soak.toml", settings)))


def _alive(ranks: Sequence[BaseProcess]) -> bool:
    return all(rank.exitcode is None for rank in ranks)


def _kill(ranks: Sequence[BaseProcess]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def differences(whole: Path, place: Path, exact: bool) -> Iterator[str]:
    from ddiff.checkpoint.checkpoints import Checkpoints
    from ddiff.runs.replay import (
        ROUNDING,
        ROUNDING_OF_WEIGHTS,
        compare_records,
        compare_states,
        compare_weights,
        read_records,
    )

    one, two = read_records(whole), read_records(place)
    if [line["step"] for line in two] != list(range(1, STEPS + 1)):
        yield f"metrics.jsonl has the steps {[line['step'] for line in two]}"
        return
    figures = compare_records(one, two)
    whole_state, state_after_kills = (
        Checkpoints(run / "checkpoints").load(STEPS) for run in (whole, place)
    )
    state = (
        compare_states(whole_state, state_after_kills)
        if exact
        else compare_weights(whole_state, state_after_kills)
    )
    for difference, allowed in ((figures, ROUNDING), (state, ROUNDING_OF_WEIGHTS)):
        if difference is not None and difference.size > (0.0 if exact else allowed):
            yield f"{difference.size:.3g} {difference.where}"
    if exact:
        if read_evaluation(whole) != read_evaluation(place):
            yield "evaluation.json differs"
        if (whole / "samples.jsonl").read_bytes() != (place / "samples.jsonl").read_bytes():
            yield "samples.jsonl differs"
    left = [
        path.name
        for path in (place / "checkpoints").iterdir()
        if not (path / "complete.json").exists()
    ]
    if left:
        yield f"left behind: {sorted(left)}"


def read_evaluation(place: Path) -> dict[str, Any]:
    """Return evaluation.json of a run without its provenance: the command and its duration."""
    found: dict[str, Any] = json.loads((place / "evaluation.json").read_text())
    del found["provenance"]
    return found


if __name__ == "__main__":
    sys.exit(main())
