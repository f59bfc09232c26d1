"""Command line of the lm-evaluation-harness, with the model `ddiff`.

    python -m ddiff.lm_eval --model ddiff --model_args run=runs/NAME,draws=64 --tasks TASK

The harness finds only models that are registered in its own process, so the command `lm_eval` does
not know this model. All options are those of `lm_eval`.
"""

from __future__ import annotations

import os
import traceback
from typing import NoReturn

from ddiff.distributed.launcher import MISTAKE, exit_with_message
from ddiff.errors import REPORT, TRACEBACK, explain_error


def main() -> None:
    """Register the model `ddiff` and run the command line of the harness."""
    try:
        from ddiff.runs.lm_eval.harness import require_harness

        require_harness()
        from lm_eval.__main__ import cli_evaluate

        import ddiff.runs.lm_eval.model  # noqa: F401  # registers the model

        cli_evaluate()
    except Exception as error:
        _end_with(error)


def _end_with(error: Exception) -> NoReturn:
    """Print one paragraph about a user's error, or the traceback of another error, and exit."""
    message = explain_error(error)
    if message is None:
        exit_with_message(f"{traceback.format_exc()}{REPORT}", 1)
    if os.environ.get(TRACEBACK):
        message = f"{traceback.format_exc()}{message}"
    exit_with_message(message, MISTAKE)


if __name__ == "__main__":
    main()
