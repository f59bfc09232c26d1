"""From the command to the first step: with a warm cache nothing is prepared, and what takes time is importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Where training would begin the command says how much CPU time it took until then, and what it has loaded and built.
SCRIPT = """
import json, sys, time
import ddiff.data.cache as cache
from ddiff.cli import main
from ddiff.training.trainer import Trainer

built = []
publish = cache._publish
cache._publish = lambda partial, place, identity: (built.append(place.parent.name), publish(partial, place, identity))
heavy = [{heavy}]

def told(trainer, start=None, **limits):
    print(json.dumps([time.process_time(), built, [name for name in heavy if name in sys.modules]]))
    sys.stdout.flush()
    raise SystemExit(0)

Trainer.fit = told
main(["run", "small.toml", *{settings}])
"""
HEAVY = ("transformers", "faiss", "scipy", "sklearn", "matplotlib", "tensorboard")
SECONDS = 20.0  # 6 to 7 on a machine where importing torch and its compiler, which its optimizers load, takes 4


def started(folder: Path, *settings: str) -> tuple[float, list[str], list[str]]:
    script = SCRIPT.replace("{heavy}", ", ".join(map(repr, HEAVY))).replace(
        "{settings}", repr(list(settings))
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def test_warm_start_imports_and_builds_nothing(folder: Path) -> None:
    """CPU seconds, since other work on the machine is not the command's; the cold start says that the counting works."""
    _, cold, _ = started(folder)
    seconds, built, loaded = started(folder, "--set", "name=again")
    assert {"byte_pairs", "clusters"} <= set(cold)
    assert built == []
    assert loaded == []
    assert seconds < SECONDS
