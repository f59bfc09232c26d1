"""Command line of ddiff. Commands call functions of `ddiff.runs`.

Importing this package does not import torch, so that `--help` is fast.

An error that the caller can fix is printed as one paragraph, and the exit code is 2.
"""

from __future__ import annotations

from collections.abc import Callable

from ddiff.cli import components, doctor, evaluation, lm_eval, sampling, serving, sharing, training
from ddiff.cli.app import app
from ddiff.cli.process import main

__all__ = ["app", "main"]

# in the order in which `ddiff --help` lists them
COMMANDS: dict[str, Callable[..., None]] = {
    "run": training.run,
    "data": training.prepare,
    "encode": training.encode,
    "eval": evaluation.evaluate,
    "lm-eval": lm_eval.evaluate_tasks,
    "import": sharing.import_checkpoint,
    "export": sharing.export,
    "sample": sampling.sample,
    "serve": serving.serve,
    "compare": evaluation.compare_runs,
    "pareto": evaluation.pareto,
    "clock": evaluation.clock,
    "report": evaluation.report,
    "doctor": doctor.doctor,
    "new": components.new,
    "check": components.check,
    "plugins": components.plugins,
    "recipes": components.recipes,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
