"""`ddiff doctor`: a healthy machine, broken parts, time limits, and the printed lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddiff.cli import main
from ddiff.runs.doctor import examination, libraries, machine
from ddiff.runs.doctor.examination import CHECKS, examine
from ddiff.runs.doctor.findings import Finding, ProbeError, read_probe

ROOT = Path(__file__).parents[2]


def run_doctor(folder: Path, **variables: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Run `ddiff doctor --json` in a process; return the exit code, and the findings by name."""
    done = subprocess.run(
        [sys.executable, "-m", "ddiff", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | variables,
        timeout=300,
    )
    written = json.loads(done.stdout)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in written["findings"]:
        found.setdefault(finding["name"], []).append(finding)
    states = [finding["state"] for finding in written["findings"]]
    assert written["problems"] == states.count("problem")
    return done.returncode, found


def test_healthy_machine_has_no_problem(tmp_path: Path) -> None:
    code, found = run_doctor(tmp_path, DDIFF_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    problems = [one for group in found.values() for one in group if one["state"] == "problem"]
    assert (code, problems) == (0, [])
    (gloo,) = found["gloo"]
    assert (gloo["state"], gloo["meaning"][:13]) == ("ok", "two processes")
    (plugins,) = found["plugins"]
    assert "mdlm" in plugins["meaning"]
    (downloads,) = found["downloads"]
    assert downloads["state"] == "note"
    assert "unset HF_HUB_OFFLINE" in downloads["remedy"]
    assert not (tmp_path / "cache").exists()  # the check leaves nothing behind
    assert list(tmp_path.iterdir()) == []


def test_broken_plugin_and_unwritable_cache_are_problems(tmp_path: Path) -> None:
    site = tmp_path / "site"
    information = site / "broken-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[ddiff]\nbroken = broken_plugin\n")
    (site / "broken_plugin.py").write_text("raise RuntimeError('no such symbol')\n")
    file = tmp_path / "file"
    file.write_text("")
    code, found = run_doctor(
        tmp_path,
        PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}:{site}",
        DDIFF_CACHE=str(file / "cache"),
    )
    assert code == 1
    broken, working = found["plugins"]
    assert broken["state"] == "problem"
    assert '"broken" from broken_plugin, broken 1.0' in broken["meaning"]
    assert "no such symbol" in broken["meaning"]
    assert "mdlm" in working["meaning"]
    assert "broken" not in working["meaning"]
    (cache,) = found["cache of ddiff"]
    assert cache["state"] == "problem"
    assert "is not writable: Not a directory" in cache["meaning"]
    assert "DDIFF_CACHE" in cache["remedy"]


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_missing_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = {"tensorboard", "transformers", "ddiff"}
    found = libraries.find_version
    monkeypatch.setattr(
        libraries, "find_version", lambda name: None if name in missing else found(name) or "1.0"
    )
    required = by_name(libraries.check_installation())["required packages"]
    assert (required.state, required.meaning) == ("problem", "not installed: transformers")
    assert required.remedy == "Install them: pip install transformers."
    optional = by_name(libraries.check_optional())["tensorboard"]
    assert optional.state == "note"
    assert optional.remedy == "pip install 'discrete-diffusion[tensorboard]'"


def test_every_extra_of_users_is_reported_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]
    lines = [f"{line}; extra == '{extra}'" for extra, group in extras.items() for line in group]
    required = [*declared["dependencies"], *lines]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    monkeypatch.setattr(libraries, "find_version", lambda name: None)
    found = by_name(libraries.check_optional())
    assert found.keys() == extras.keys() - {"dev"} | {"wandb", "chromium"}
    assert libraries.EXTRA_USES.keys() == extras.keys() - {"dev"}
    assert "not installed: peft; needed only for LoRA adapters" in found["lora"].meaning
    assert found["8bit"].remedy == "pip install 'discrete-diffusion[8bit]'"
    assert "mkdocs, mkdocs-material, mkdocstrings" in found["docs"].meaning
    page = (ROOT / "docs/runs.md").read_text()
    assert f"| {', '.join(f'`{extra}`' for extra in libraries.EXTRA_USES)} | packages" in page


def test_other_project_with_the_same_name_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_version", lambda name: "1.0")
    finding = by_name(libraries.check_installation())["ddiff"]
    assert finding.state == "problem"
    assert "pip uninstall ddiff" in finding.remedy


HEALTHY: dict[str, Any] = {
    "version": libraries.TESTED_TORCH,
    "cuda": None,
    "devices": [],
    "warnings": [],
    "mps_built": False,
    "mps": False,
    "threads": 1,
    "gloo": True,
    "nccl": False,
    "triton": False,
}
GPU = {"name": "a GPU", "bytes": 8e10}


@pytest.mark.parametrize(
    ("changed", "name", "state", "part"),
    [
        ({}, "torch", "ok", "the tested version"),
        ({"version": "2.9.0+cu130"}, "torch", "note", "is tested with"),
        ({"version": "2.8.1"}, "torch", "problem", "2.9 or newer"),
        ({"devices": [GPU], "nccl": True}, "device", "ok", "1 GPU: a GPU (80 GB)"),
        ({}, "device", "problem", "this build of torch has no CUDA"),
        ({"cuda": "13.0", "warnings": ["driver too old"]}, "device", "problem", "driver too old"),
        ({"devices": [GPU, GPU]}, "nccl", "problem", "no NCCL"),
        ({"devices": [GPU]}, "compiler", "note", "no triton"),
        ({"threads": 10**6}, "threads", "note", "wait for each other"),
    ],
)
def test_properties_of_torch_are_judged(
    changed: dict[str, Any],
    name: str,
    state: str,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine has the driver of a GPU and a compiler."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # any program
    monkeypatch.setattr(libraries, "GPU_FILES", (str(tmp_path),))
    monkeypatch.setattr(libraries, "start_probe", lambda module: None)
    monkeypatch.setattr(libraries, "read_probe", lambda probe, seconds: HEALTHY | changed)
    finding = by_name(libraries.check_torch())[name]
    assert finding.state == state
    assert part in finding.meaning
    assert state == "ok" or finding.remedy


def test_tested_version_of_torch_is_the_pinned_version() -> None:
    lines = (ROOT / "ci/constraints.txt").read_text().splitlines()
    assert f"torch=={libraries.TESTED_TORCH}" in lines


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "died with signal 4"),
        ("raise ImportError('libcudart.so is missing')", "libcudart.so is missing"),
        ("raise SystemExit(3)", "exit code 3"),
        ("print('{}'); print('leaving')", "its last line is no result: leaving"),
    ],
)
def test_probe_that_hangs_or_dies_is_explained(program: str, message: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # an interpreter needs longer than a second to start on a busy machine
    seconds = 1.0 if "sleep" in program else 60.0
    with pytest.raises(ProbeError, match=message):
        read_probe(process, seconds)
    assert process.returncode is not None


def test_hanging_and_failing_checks_do_not_stop_the_others() -> None:
    release = threading.Event()

    def hang() -> Iterator[Finding]:
        release.wait(60)
        yield Finding("never", "ok", "")

    def fail() -> Iterator[Finding]:
        yield Finding("lost", "ok", "")
        raise OSError("the disk is gone")

    def work() -> Iterator[Finding]:
        yield Finding("works", "ok", "yes")

    began = time.monotonic()
    found = examine({"hangs": hang, "fails": fail, "works": work}, limit=1.0)
    release.set()
    assert time.monotonic() - began < 30
    assert [(finding.name, finding.state) for finding in found] == [
        ("hangs", "problem"), ("fails", "problem"), ("works", "ok")
    ]  # fmt: skip
    assert "more than 1 s" in found[0].meaning
    assert "OSError: the disk is gone" in found[1].meaning
    assert len(CHECKS) == 9


def test_full_disk_and_little_memory_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LITTLE_SPACE", 1e30)
    monkeypatch.setattr(machine, "LITTLE_MEMORY", 1e30)
    for finding in (*machine.check_folders(), *machine.check_memory()):
        assert (finding.state, bool(finding.remedy)) == ("note", True)
        assert "which is little" in finding.meaning


@pytest.mark.parametrize("state", ["note", "problem"])
def test_lines_have_state_name_meaning_and_remedy(
    state: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("torch", "ok", "works"), Finding("x", state, "is slow", "Use another.")]
    monkeypatch.setattr(examination, "examine", lambda: findings)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert (stop.value.code or 0) == (1 if state == "problem" else 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "torch", "works"]
    assert lines[1].split() == [state, "x", "is", "slow"]
    assert lines[2].split() == ["->", "Use", "another."]
    assert lines[-1].endswith(", 1 ok")


def test_doctor_imports_no_torch_into_its_own_process() -> None:
    """A torch that crashes when it is imported must be reported, not end the command."""
    program = (
        "import sys\nimport ddiff.runs.doctor.examination\n"
        "assert not {'torch', 'numpy', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
