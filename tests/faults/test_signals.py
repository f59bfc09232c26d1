"""SIGINT and SIGTERM outside training: exit code 130 or 143, no traceback, no partial file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddiff.atomic import original_name

# The stage prints "begun" and then sleeps, to simulate a long computation.
STAGE = """
import sys, time
import {module}

def waits(*_, **__):
    print("begun", flush=True)
    time.sleep(60)

{module}.{name} = waits
from ddiff.cli import main
main({arguments})
"""
STAGES = {
    "dry run": ("ddiff.runs.dry_run", "check_directory", ["run", "tiny.toml", "--dry-run"]),
    "data": ("ddiff.runs.data", "build_train_rows", ["run", "tiny.toml"]),
    "data command": ("ddiff.runs.tokenize", "build_documents", ["data", "tiny.toml"]),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_signal_ends_every_stage_without_traceback_or_partial_file(
    stage: str, number: signal.Signals, folder: Path
) -> None:
    module, name, arguments = STAGES[stage]
    script = STAGE.format(module=module, name=name, arguments=arguments)
    working = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert working.stdout is not None
    assert working.stdout.readline() == "begun\n"
    time.sleep(0.1)
    working.send_signal(number)
    _, err = working.communicate(timeout=60)
    assert working.returncode == 128 + number, err
    assert "Traceback" not in err
    left = [
        name
        for _, _, names in os.walk(folder)
        for name in names
        if name != original_name(name) or name.endswith(".lock")
    ]
    assert left == []
