"""Startup time of a run with a warm cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# In place of training, the command prints its CPU time, the built cache entries and the imports.
SCRIPT = """
import json, sys, time
import ddiff.data.cache as cache
from ddiff.cli import main
from ddiff.training.trainer import Trainer

built = []
publish = cache._publish

def record(partial, place, identity):
    built.append(place.parent.name)
    return publish(partial, place, identity)

cache._publish = record
heavy = [{heavy}]

def report(trainer, start=None, **limits):
    loaded = [name for name in heavy if name in sys.modules]
    print(json.dumps([time.process_time(), built, loaded]))
    sys.stdout.flush()
    raise SystemExit(0)

Trainer.fit = report
main(["run", "small.toml", *{settings}])
"""
HEAVY = ("transformers", "faiss", "scipy", "sklearn", "matplotlib", "tensorboard")
# Limit of CPU time; measured are 6 to 7 seconds, of which the import of torch takes 4.
SECONDS = 20.0


def started(folder: Path, *settings: str) -> tuple[float, list[str], list[str]]:
    script = SCRIPT.replace("{heavy}", ", ".join(map(repr, HEAVY))).replace(
        "{settings}", repr(list(settings))
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def test_second_run_builds_neither_tokenizer_nor_clusters_again(folder: Path) -> None:
    """The time limit is in CPU seconds, which do not depend on other processes."""
    _, cold, _ = started(folder)
    seconds, built, loaded = started(folder, "--set", "name=again")
    assert {"byte_pairs", "clusters"} <= set(cold)
    assert built == []
    assert loaded == []
    assert seconds < SECONDS
