"""Runs: what a recipe builds, the directory it lives in, and the stages train, evaluate, sample.

    run = ddiff.run("recipes/mine.toml", settings=["train.steps=200"])      # trains, or goes on where it stopped
    run = ddiff.load("runs/mine")
    run.sample(8, steps=64, seed=1)
    run.nelbo(["It is a truth universally acknowledged"])

A stage that is done is not done again; what a directory was made with is held against what comes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddiff.runs.run import Run as Run
    from ddiff.runs.export import export_run as export_run
    from ddiff.runs.dry_run import rehearse as rehearse
    from ddiff.runs.stages import evaluate_run as evaluate_run
    from ddiff.runs.stages import load as load
    from ddiff.runs.stages import run as run
    from ddiff.runs.stages import run_recipe as run_recipe
    from ddiff.runs.stages import sample_run as sample_run
    from ddiff.runs.replay import verify_resume as verify_resume

_MODULE_OF = {
    "Run": "built",
    "evaluate_run": "stages",
    "export_run": "export",
    "load": "stages",
    "rehearse": "rehearsal",
    "run": "stages",
    "run_recipe": "stages",
    "sample_run": "stages",
    "verify_resume": "verify",
}

__all__ = [
    "Run",
    "evaluate_run",
    "export_run",
    "load",
    "rehearse",
    "run",
    "run_recipe",
    "sample_run",
    "verify_resume",
]


def __getattr__(name: str) -> Any:
    """Import a name from its module when it is first asked for: a dry run needs no corpus library."""
    if name not in _MODULE_OF:
        raise AttributeError(f'module "ddiff.runs" has no attribute "{name}"')
    value = getattr(importlib.import_module(f"ddiff.runs.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
