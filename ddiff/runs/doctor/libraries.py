"""Checks of `ddiff doctor` of Python, torch, plugins and other packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import netrc
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddiff import __version__
from ddiff.distributed.launcher import count_cores
from ddiff.runs.doctor.findings import Finding, ProbeError, format_bytes, read_probe, start_probe

DISTRIBUTION = "discrete-diffusion"
TESTED_TORCH = "2.13.0"
"""Version of torch in ci/constraints.txt."""
OLDEST_TORCH = (2, 9)
PROBE_SECONDS = 240.0  # importing torch takes two seconds, and much longer from a network disk
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")  # of the drivers of NVIDIA and AMD
COMPILERS = ("g++", "clang++", "c++")
DEVELOPMENT = "dev"
"""Extra of the packages that only the development of ddiff needs."""

EXTRA_USES = {
    "tensorboard": '[tracker] kind = "tensorboard"',
    "lm-eval": "the tasks of lm-evaluation-harness",
    "lora": "LoRA adapters, [denoiser] lora",
    "gguf": "models in GGUF files",
    "8bit": '[train] optimizer = "adamw_8bit"',
    "serve": "ddiff serve",
    "docs": "building the pages of the documentation",
}
"""Use of each extra of pyproject.toml."""


def check_installation() -> Iterator[Finding]:
    """Check the Python version and the packages that ddiff requires."""
    found = f"ddiff {__version__}, Python {platform.python_version()}, {platform.platform()}"
    if find_version("ddiff") is not None:
        yield Finding(
            "ddiff",
            "problem",
            f"{found}; the package called ddiff, which is another project, is installed too",
            f"Remove it: pip uninstall ddiff. This project is called {DISTRIBUTION}.",
        )
    else:
        yield Finding("ddiff", "ok", found)
    missing = [name for name in _list_required() if find_version(name) is None]
    if missing:
        yield Finding(
            "required packages",
            "problem",
            f"not installed: {', '.join(missing)}",
            f"Install them: pip install {' '.join(missing)}.",
        )
    else:
        yield Finding("required packages", "ok", "all installed")


def find_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _list_required() -> list[str]:
    """Return the names of the distributions that ddiff requires, without optional ones."""
    requirements = _read_requirements()
    if not requirements:  # a source folder on the path
        return ["torch", "numpy", "transformers", "datasets"]
    return [name for name, extra in requirements if extra is None]


def list_extras() -> dict[str, list[str]]:
    """Return the extras of ddiff for its users, with the names of their distributions."""
    extras: dict[str, list[str]] = {}
    for name, extra in _read_requirements():
        if extra is not None and extra != DEVELOPMENT:
            extras.setdefault(extra, []).append(name)
    return extras


def _read_requirements() -> list[tuple[str, str | None]]:
    """Return the name of each required distribution, and the extra that needs it, or None.

    The result is empty if ddiff is not installed, but a source folder on the path.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[tuple[str, str | None]] = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", line)
        if name is not None:
            found.append((name[0], None if extra is None else extra[1]))
    return found


# ---------------------------------------------------------------------- torch


def check_torch() -> Iterator[Finding]:
    """Import torch in another process, and check its version, devices and threads."""
    try:
        found = read_probe(start_probe("torch_probe"), PROBE_SECONDS)
    except (ProbeError, OSError) as error:
        yield Finding(
            "torch",
            "problem",
            f"cannot be imported: {error}",
            f"Install it again: pip install torch=={TESTED_TORCH}.",
        )
        return
    yield _judge_version(found["version"])
    yield _judge_device(found)
    yield _judge_threads(found["threads"])
    yield _judge_compiler(found)
    yield _judge_nccl(found)


def _judge_version(version: str) -> Finding:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding(
            "torch",
            "problem",
            f"{version}, but ddiff needs {oldest} or newer",
            f"Install the tested version: pip install torch=={TESTED_TORCH}.",
        )
    if version.partition("+")[0] != TESTED_TORCH:
        return Finding(
            "torch",
            "note",
            f"{version}; ddiff is tested with {TESTED_TORCH}",
            f"If a command fails, install the tested version: pip install torch=={TESTED_TORCH}.",
        )
    return Finding("torch", "ok", f"{version}, the tested version")


def _judge_device(found: Mapping[str, Any]) -> Finding:
    devices = found["devices"]
    if devices:
        listed = [f"{one['name']} ({format_bytes(one['bytes'])})" for one in devices]
        return Finding("device", "ok", f"{len(devices)} GPU: {', '.join(listed)}")
    if found["mps"]:
        return Finding(
            "device",
            "note",
            'the CPU; torch also finds the GPU "mps", which ddiff does not select by itself',
            "",
        )
    if not any(os.path.exists(file) for file in GPU_FILES):
        return Finding("device", "ok", "the CPU; the machine has no driver of a CUDA or ROCm GPU")
    if found["cuda"] is None:
        return Finding(
            "device",
            "problem",
            "the CPU; the machine has a GPU, but this build of torch has no CUDA",
            "Install torch with CUDA: https://pytorch.org/get-started/locally.",
        )
    reason = "; ".join(found["warnings"]) or "torch does not say why"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding(
            "device",
            "note",
            f'the CPU; CUDA_VISIBLE_DEVICES="{hidden}" hides every GPU',
            "To use a GPU, unset CUDA_VISIBLE_DEVICES.",
        )
    return Finding(
        "device",
        "problem",
        f"the CPU; the machine has a GPU, but torch cannot use it: {reason}",
        "Compare the driver (nvidia-smi) with the CUDA version of torch "
        f"({found['cuda']}), and update the driver or torch.",
    )


def _judge_threads(threads: int) -> Finding:
    cores = count_cores()
    used = "1 thread" if threads == 1 else f"{threads} threads"
    usable = "1 core" if cores == 1 else f"{cores} cores"
    meaning = f"torch uses {used}; this process may use {usable}"
    limit = os.environ.get("OMP_NUM_THREADS")
    if threads > cores:
        return Finding(
            "threads",
            "note",
            f"{meaning}, so the threads wait for each other",
            f"Set OMP_NUM_THREADS={cores}.",
        )
    if threads < cores and limit is not None:
        return Finding(
            "threads",
            "note",
            f"{meaning}, because OMP_NUM_THREADS={limit}",
            f"To use all cores: OMP_NUM_THREADS={cores}.",
        )
    return Finding("threads", "ok", meaning)


def _judge_compiler(found: Mapping[str, Any]) -> Finding:
    """Check that torch.compile, which [backend] compile uses, has a compiler."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else COMPILERS
    paths = [path for name in names if (path := shutil.which(name)) is not None]
    if not paths:
        return Finding(
            "compiler",
            "note",
            f"no C++ compiler ({', '.join(names)}): [backend] compile = true fails",
            "Install one, such as the package g++, or set CXX.",
        )
    if found["devices"] and not found["triton"]:
        return Finding(
            "compiler",
            "note",
            f"{paths[0]}, but no triton: [backend] compile = true fails on the GPU",
            "Install it: pip install triton.",
        )
    return Finding("compiler", "ok", f"{paths[0]}, for [backend] compile = true")


def _judge_nccl(found: Mapping[str, Any]) -> Finding:
    if found["nccl"]:
        return Finding("nccl", "ok", "available, for several GPUs")
    if len(found["devices"]) > 1:
        return Finding(
            "nccl",
            "problem",
            "this build of torch has no NCCL, so only one of the GPUs can be used",
            "Install torch with CUDA for Linux: https://pytorch.org/get-started/locally.",
        )
    return Finding("nccl", "ok", "not available; needed only for several GPUs")


# ---------------------------------------------------------------------- processes


def check_gloo() -> Iterator[Finding]:
    """Let two processes add numbers, as the backends ddp and fsdp do on CPUs."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            probes = [start_probe("gloo_probe", str(rank), f"{folder}/store") for rank in (0, 1)]
            try:
                results = [read_probe(probe, PROBE_SECONDS) for probe in probes]
            finally:
                for probe in probes:
                    probe.kill()
    except (ProbeError, OSError) as error:
        yield Finding(
            "gloo",
            "problem",
            f"two processes cannot exchange numbers: {error}",
            "Check that the name of this machine resolves to an address (hostname, /etc/hosts), or "
            "set GLOO_SOCKET_IFNAME=lo. Runs with one process do not need gloo.",
        )
        return
    sums = [result["sum"] for result in results]
    if sums != [3.0, 3.0]:
        yield Finding(
            "gloo", "problem", f"1 + 2 over two processes gives {sums}", "Install torch again."
        )
        return
    seconds = max(result["seconds"] for result in results)
    yield Finding("gloo", "ok", f"two processes connected and added numbers in {seconds:.1f} s")


# ---------------------------------------------------------------------- plugins and packages


def check_plugins() -> Iterator[Finding]:
    """Load every plugin in another process, and import its components."""
    try:
        plugins = read_probe(start_probe("plugin_probe"), PROBE_SECONDS)
    except (ProbeError, OSError) as error:
        yield Finding(
            "plugins",
            "problem",
            f"loading them failed: {error}",
            "On a busy machine, repeat the command. Else uninstall the newest plugin.",
        )
        return
    working = []
    for plugin in plugins:
        if not plugin["errors"]:
            working.append(plugin["name"])
        for message in plugin["errors"]:
            yield Finding(
                "plugins",
                "problem",
                f'"{plugin["name"]}" from {plugin["origin"]} does not load: {message}',
                "Fix or uninstall this distribution.",
            )
    yield Finding("plugins", "ok", f"{len(working)} load: {', '.join(working)}")


def check_optional() -> Iterator[Finding]:
    """Report the optional packages and programs, and what does not work without them."""
    yield _judge_wandb()
    for extra, packages in list_extras().items():
        yield _judge_extra(extra, packages)
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if programs:
        yield Finding(
            "chromium",
            "note",
            f"no {' and no '.join(programs)}; needed only for the tests of the report page",
            "On Debian: apt install chromium chromium-driver.",
        )
    else:
        yield Finding("chromium", "ok", "found, for the tests of the report page")


def _judge_extra(extra: str, packages: Sequence[str]) -> Finding:
    """Report whether the packages of an extra of ddiff are installed."""
    use = EXTRA_USES.get(extra, f"the extra {extra}")
    versions = {name: find_version(name) for name in packages}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        meaning = f"not installed: {', '.join(missing)}; needed only for {use}"
        return Finding(extra, "note", meaning, f"pip install '{DISTRIBUTION}[{extra}]'")
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(extra, "ok", f"{found}, for {use}")


def _judge_wandb() -> Finding:
    version = find_version("wandb")
    if version is None:
        return Finding("wandb", "problem", "not installed", "pip install wandb")
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return Finding("wandb", "ok", f"{version}, mode {mode} from the variable WANDB_MODE")
    if _has_wandb_login():
        return Finding("wandb", "ok", f"{version}, logged in")
    return Finding(
        "wandb",
        "note",
        f'{version}, not logged in: the tracker "wandb" logs nothing unless its mode is offline',
        'wandb login, or [tracker] mode = "offline".',
    )


def _has_wandb_login() -> bool:
    """Return whether there is a key for W&B; the import of wandb would take seconds."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        file = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in file.hosts)
