"""Runs: what a recipe builds, the directory it lives in, and the stages train, evaluate, sample.

    run = ddiff.run("recipes/mine.toml", settings=["train.steps=200"])      # trains, or goes on where it stopped
    run = ddiff.load("runs/mine")
    run.sample(8, steps=64, seed=1)
    run.nelbo(["It is a truth universally acknowledged"])

A stage that is done is not done again; what a directory was made with is held against what comes.
"""

from __future__ import annotations

from ddiff.runs.built import Run
from ddiff.runs.export import export_run
from ddiff.runs.stages import evaluate_run, load, rehearse, run, run_recipe, sample_run
from ddiff.runs.verify import verify_resume

__all__ = ["Run", "evaluate_run", "export_run", "load", "rehearse", "run", "run_recipe", "sample_run", "verify_resume"]
