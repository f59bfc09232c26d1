"""Compare the cost of ddiff with the cost of a reference implementation (`make bench`).

The reference implementation (`plain.py`) is in the style of paper code. Every case runs in a
separate process, in which runs of both implementations alternate. The script prints tables of CPU
seconds, and of the least, median and greatest ratio of two successive runs. All numbers are also
written to a JSON file (`--json`).

    python benchmarks/bench                      # all parts
    python benchmarks/bench --quick              # fewer rounds
    python benchmarks/bench --only train,memory  # only these parts
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import BENCH, environment, in_process, machine, ratios

SMALL, LARGE = 8192, 50257
STEPS, LENGTH = 64, 128
HEADS = {"mdlm": ["mdlm"], "gidd": ["gidd"], "hdlm": ["hdlm-tied", "hdlm-levelwise"], "ar": ["ar"]}
TRAIN_TARGETS = {"mdlm": 0.25, "gidd": 0.45, "hdlm-tied": 0.20, "hdlm-levelwise": 0.08}
SAMPLE_TARGETS = {"mdlm": 0.10, "gidd": 0.25, "hdlm-tied": 0.06, "hdlm-levelwise": 0.06}
PLAIN_LIMITS = {
    "mdlm": 8.7,
    "gidd": 12.8,
    "hdlm": 17.0,
}  # cost of a step of published code, in units of forward and backward of the backbone
RISE_TARGET, HANDWRITTEN_TARGET, DDP_TARGET = 0.25, 1.05, 1.10
TAPS, CONVOLUTION_TARGET = 5, 1.06


class Effort(NamedTuple):
    """Number of measurement rounds of each part of the benchmark.

    `plain_steps` is the number of sampling steps of the reference implementation in a round of the
    part `sample`, for the vocabulary of 50257 tokens.
    """

    train: int = 5
    sample: int = 4
    plain_steps: int = 8
    handwritten: int = 9
    growth: int = 3
    ddp: int = 5
    convolutions: int = 15


QUICK = Effort(train=2, sample=1, plain_steps=3, handwritten=3, growth=1, ddp=2, convolutions=5)
Part = Callable[[Effort], list[dict[str, Any]]]


def say(line: str = "") -> None:
    print(line, flush=True)


def say_header(*names: str) -> None:
    """Print the header of a Markdown table, with the given column names."""
    say_row(*names)
    say("|" + "---|" * len(names))


def say_row(*cells: str) -> None:
    """Print one row of a Markdown table."""
    say("| " + " | ".join(cells) + " |")


def spread(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} [{found['least']:.3f}, {found['greatest']:.3f}]"


def verdict(value: float, target: float | None) -> str:
    return "" if target is None else f"<= {target:g} {'yes' if value <= target else 'NO'}"


def train(effort: Effort) -> list[dict[str, Any]]:
    """Measure training steps of each family of models, without the optimizer update.

    A step draws noise times and noisy states, and runs forward, loss and backward. `effort` has the
    number of measurement rounds. Prints a table and returns the rows of the table.
    """
    say("\n## Training step, 4 layers, width 256, batch 8x128: CPU seconds\n")
    say_header(
        "family",
        "V",
        "ours",
        "plain",
        "trunk",
        "plain/trunk (limit)",
        "ours/plain [least, greatest]",
        "target",
    )
    rows = []
    for vocabulary in (SMALL, LARGE):
        for family, names in HEADS.items():
            found = in_process("train", family=family, vocabulary=vocabulary, rounds=effort.train)
            over = ratios(found["plain"], found["trunk"])
            limit = PLAIN_LIMITS.get(family) if vocabulary == LARGE else None
            # A plain step above the limit is slow because of page faults: use the limit instead.
            counted = [
                min(p, limit * t) if limit else p for p, t in zip(found["plain"], found["trunk"])
            ]
            for name in names:
                ratio = ratios(found[name], counted)
                target = TRAIN_TARGETS.get(name) if vocabulary == LARGE else None
                medians = {
                    side: statistics.median(found[side]) for side in (name, "plain", "trunk")
                }
                say_row(
                    name,
                    str(vocabulary),
                    f"{medians[name]:.3f}",
                    f"{medians['plain']:.3f}",
                    f"{medians['trunk']:.3f}",
                    f"{over['median']:.1f} {f'({limit:g})' if limit else ''}",
                    spread(ratio),
                    verdict(ratio["median"], target),
                )
                row = {"family": name, "vocabulary": vocabulary, "ratio": ratio, "target": target}
                rows.append(row | {"plain_over_trunk": over, "limit": limit, "seconds": found})
    return rows


def sample(effort: Effort) -> list[dict[str, Any]]:
    """Measure sampling with each family of models. Print a table and return its rows.

    `effort` contains the number of measurement rounds.

    All steps of a diffusion sampler of the reference implementation cost the same. Therefore only
    some steps are run, and the cost of a whole run is extrapolated.
    """
    say(
        f"\n## Sampling, 4x128, N = {STEPS} (ar: {LENGTH} tokens, ours cached): "
        "CPU seconds of a run\n"
    )
    say_header(
        "family",
        "V",
        "ours",
        "plain",
        "a plain step [least, greatest]",
        "steps run",
        "ours/plain [least, greatest]",
        "target",
    )
    rows = []
    for vocabulary in (SMALL, LARGE):
        for family, names in HEADS.items():
            steps = LENGTH if family == "ar" else STEPS
            few = vocabulary == LARGE or effort == QUICK
            each = min(steps, effort.plain_steps if few else -(-steps // effort.sample))
            if family == "ar":  # later steps cost more, so that only whole runs are comparable
                each = steps
            found = in_process(
                "sample",
                family=family,
                vocabulary=vocabulary,
                rounds=effort.sample,
                plain_steps=each,
            )
            parts = [
                found["plain_step"][i : i + each] for i in range(0, len(found["plain_step"]), each)
            ]
            plain = [sum(part) * steps / each for part in parts]
            step = found["plain_step"]
            for name in names:
                ratio = ratios(found[name], plain)
                target = SAMPLE_TARGETS.get(name) if vocabulary == LARGE else None
                say_row(
                    name,
                    str(vocabulary),
                    f"{statistics.median(found[name]):.2f}",
                    f"{statistics.median(plain):.1f}",
                    f"{statistics.median(step):.2f} [{min(step):.2f}, {max(step):.2f}]",
                    str(len(step)),
                    spread(ratio),
                    verdict(ratio["median"], target),
                )
                row = {"family": name, "vocabulary": vocabulary, "ratio": ratio, "target": target}
                rows.append(row | {"seconds": found, "plain_run": plain})
    return rows


def memory(effort: Effort) -> list[dict[str, Any]]:
    """Measure the peak memory of a training step and of a sampling run.

    ddiff and the reference implementation are measured in separate processes. Prints a table and
    returns its rows. `effort` is ignored.
    """
    say(f"\n## Memory increase over the model, gradients included, V = {LARGE}: MB\n")
    say_header("what", "family", "ours", "plain", "ours/plain", "target")
    rows = []
    for what in ("train", "sample"):
        for names in HEADS.values():
            plain = in_process("memory", what=what, side="plain", family=names[0], vocabulary=LARGE)
            for name in names:
                ours = in_process("memory", what=what, side="ours", family=name, vocabulary=LARGE)
                target = RISE_TARGET if name in TRAIN_TARGETS else None
                ratio = ours / plain
                cells = (f"{ours:.0f}", f"{plain:.0f}", f"{ratio:.3f}", verdict(ratio, target))
                say_row(what, name, *cells)
                rows.append(
                    {
                        "what": what,
                        "family": name,
                        "ours_mb": ours,
                        "plain_mb": plain,
                        "target": target,
                    }
                )
    return rows


def handwritten(effort: Effort) -> list[dict[str, Any]]:
    say("\n## Training step of the generic engine and of hand-written masked diffusion\n")
    say_header("V", "generic", "by hand", "generic/by hand [least, greatest]", "target")
    rows = []
    for vocabulary in (SMALL, LARGE):
        found = in_process("handwritten", vocabulary=vocabulary, rounds=effort.handwritten)
        ratio = ratios(found["generic"], found["handwritten"])
        generic, by_hand = (statistics.median(found[side]) for side in ("generic", "handwritten"))
        say_row(
            str(vocabulary),
            f"{generic:.3f}",
            f"{by_hand:.3f}",
            spread(ratio),
            verdict(ratio["median"], HANDWRITTEN_TARGET),
        )
        rows.append(
            {
                "vocabulary": vocabulary,
                "ratio": ratio,
                "target": HANDWRITTEN_TARGET,
                "seconds": found,
            }
        )
    return rows


GROWTH: list[tuple[str, str, str, str, list[dict[str, int]]]] = [
    (
        "V",
        family,
        "train",
        "a training step",
        [{"vocabulary": v} for v in (SMALL, 16384, 32768, LARGE)],
    )
    for family in ("mdlm", "gidd", "hdlm-tied", "hdlm-levelwise", "ar")
]
GROWTH += [
    (
        "L",
        "mdlm",
        "train",
        "a training step, 1024 tokens",
        [{"length": n, "batch": 1024 // n} for n in (64, 128, 256, 512)],
    )
]
GROWTH += [
    (
        "levels",
        "hdlm-levelwise",
        "train",
        "a training step, V = 50257",
        [{"vocabulary": LARGE, "levels": n} for n in (2, 3, 4)],
    )
]
GROWTH += [
    ("N", family, "sample", "a run of N steps", [{"steps": n} for n in (16, 64, 256)])
    for family in ("mdlm", "gidd", "hdlm-levelwise")
]


def growth(effort: Effort) -> list[dict[str, Any]]:
    """Measure how the cost of ddiff grows with vocabulary, length, tree levels and sampling steps.

    Prints a table and returns its rows.
    """
    say(f"\n## Growth of the cost of ddiff, V = {SMALL} by default: CPU seconds\n")
    say_header("with", "family", "what", "CPU seconds")
    rows = []
    for name, family, what, label, sizes in GROWTH:
        key = {"V": "vocabulary", "L": "length", "levels": "levels", "N": "steps"}[name]
        found = {}
        for size in sizes:
            found[size[key]] = statistics.median(
                in_process("grow", family=family, what=what, rounds=effort.growth, **size)
            )
        seconds = ", ".join(f"{at}: {value:.3f}" for at, value in found.items())
        say_row(name, family, label, seconds)
        rows.append({"with": name, "family": family, "what": label, "seconds": found})
    return rows


def convolutions(effort: Effort) -> list[dict[str, Any]]:
    """Measure the cost of convolutions and of norms of queries and keys in a training step.

    Rows contain one document, or three documents, which need masks. `effort` has the number of
    repetitions. Prints a table and returns its rows.
    """
    say(f"\n## Convolutions of {TAPS} taps, mdlm, 2 layers, width 256, V = 1024, 32x64\n")
    say_header("documents", "with", "CPU seconds", "with/without [least, greatest]", "target")
    rows = []
    for documents in (1, 3):
        found = in_process(
            "convolutions", taps=TAPS, documents=documents, rounds=effort.convolutions
        )
        for name in ("convolutions", "qk_norm", "both"):
            ratio = ratios(found[name], found["plain"])
            target = CONVOLUTION_TARGET if name == "convolutions" else None
            seconds = f"{statistics.median(found[name]):.3f}"
            mark = verdict(ratio["median"], target)
            say_row(str(documents), name, seconds, spread(ratio), mark)
            rows.append({"documents": documents, "with": name, "ratio": ratio, "target": target})
    return rows


def ddp(effort: Effort) -> list[dict[str, Any]]:
    """Measure the cost of the gradient all-reduce in a training step of two ranks (DDP).

    Each rank has 8 sequences. `effort` has the number of repetitions. Prints a table and returns
    its rows.
    """
    say("\n## Two processes with and without all-reduce (ddp, gloo), mdlm, 8x128 each\n")
    say_header(
        "V", "alone", "together", "CPU, together/alone [least, greatest]", "wall clock", "target"
    )
    rows = []
    for vocabulary in (SMALL, LARGE):
        found = _on_ranks(2, "ddp", vocabulary=vocabulary, rounds=effort.ddp)
        ratio, wall = (
            ratios(found["together"], found["alone"]),
            ratios(found["together_wall"], found["alone_wall"]),
        )
        alone, together = (statistics.median(found[side]) for side in ("alone", "together"))
        say_row(
            str(vocabulary),
            f"{alone:.3f}",
            f"{together:.3f}",
            spread(ratio),
            spread(wall),
            verdict(ratio["median"], DDP_TARGET),
        )
        rows.append(
            {
                "vocabulary": vocabulary,
                "ratio": ratio,
                "wall": wall,
                "target": DDP_TARGET,
                "seconds": found,
            }
        )
    return rows


def _on_ranks(count: int, work: str, **arguments: Any) -> Any:
    """Run a function of workers.py on several ranks, as torchrun does; return rank 0's result.

    count: number of ranks. work: name of the function. arguments: its keyword arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(BENCH / "workers.py"), work, json.dumps(arguments)]
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            command,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs):
        if rank.returncode:
            raise SystemExit(
                f"{work} {arguments} failed with exit code {rank.returncode}:\n{errors}"
            )
    return json.loads(outputs[0][0].splitlines()[-1])


GPU_BATCHES = (
    64,
    128,
    256,
)  # rows of 512 tokens; the larger batches show which implementation runs out of memory


def gpu(effort: Effort, rehearsal: bool = False) -> list[dict[str, Any]]:
    """Measure training steps of all families on a GPU, and of hdlm also with larger batches.

    Prints a table and returns its rows. `effort` is ignored. With `rehearsal`, tiny steps run on
    the CPU instead, to test this function.
    """
    say("\n## Training step on a GPU: 12 layers, width 768, V = 50257, bfloat16, 64x512\n")
    if not rehearsal and not torch.cuda.is_available():
        say("This machine has no GPU.")
        return []
    say_header(
        "family",
        "compiled ms",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "memory GB",
        "eager ms",
        "compiled/eager",
        "plain ms",
        "memory GB",
    )
    batch, rows = (2 if rehearsal else GPU_BATCHES[0]), []
    measure = lambda family, side, batch=batch: in_process(  # noqa: E731
        "gpu", family=family, side=side, batch=batch, rehearsal=rehearsal
    )
    formatted = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"  # noqa: E731
    for name in (name for names in HEADS.values() for name in names):
        compiled, eager, plain = (measure(name, side) for side in ("compiled", "eager", "plain"))
        say_row(
            name,
            f"{compiled['ms']:.1f}",
            f"{compiled['tokens_per_second']:.0f}",
            f"{compiled['tflops_per_second']:.1f}",
            formatted(compiled["mfu"], 3),
            f"{compiled['memory_gb']:.1f}",
            f"{eager['ms']:.1f}",
            f"{compiled['ms'] / eager['ms']:.2f}",
            formatted(plain["ms"], 1),
            formatted(plain["memory_gb"], 1),
        )
        rows.append({"family": name, "compiled": compiled, "eager": eager, "plain": plain})
    ms = {row["family"]: row["compiled"]["ms"] for row in rows}
    for above, below in (
        ("hdlm-levelwise", "mdlm"),
        ("hdlm-tied", "mdlm"),
        ("mdlm", "ar"),
        ("gidd", "ar"),
    ):
        say(f"\n{above}/{below}: {ms[above] / ms[below]:.3f}")
    if not rehearsal:
        for rows_at_once in GPU_BATCHES[1:]:
            sides = {
                side: measure("hdlm-levelwise", side, rows_at_once)
                for side in ("compiled", "plain")
            }
            texts = {
                side: "does not fit" if found["ms"] is None else f"{found['ms']:.0f} ms"
                for side, found in sides.items()
            }
            say(
                f"\nhdlm-levelwise, {rows_at_once}x512: ours {texts['compiled']}, "
                f"plain {texts['plain']}"
            )
            rows.append({"family": "hdlm-levelwise", "batch": rows_at_once} | sides)
    return rows


PARTS: dict[str, Part] = {
    "train": train,
    "sample": sample,
    "memory": memory,
    "handwritten": handwritten,
    "growth": growth,
    "ddp": ddp,
    "convolutions": convolutions,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"comma-separated parts: {','.join(PARTS)}"
    )
    parser.add_argument(
        "--rehearse-gpu",
        action="store_true",
        help="run the GPU part in miniature on the CPU",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"))
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    if chosen.rehearse_gpu:
        gpu(QUICK, rehearsal=True)
        return
    where = machine(chosen.threads) | {
        "command": shlex.join(["python", "benchmarks/bench", *sys.argv[1:]])
    }
    say(", ".join(f"{name}: {value}" for name, value in where.items()))
    began, found = time.monotonic(), {}
    for name in chosen.only.split(","):
        found[name] = PARTS[name](QUICK if chosen.quick else Effort())
    where["minutes"] = round((time.monotonic() - began) / 60, 1)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps({"machine": where, **found}, indent=1))
    say(f"\n{where['minutes']} minutes. All numbers are in {chosen.json}")


if __name__ == "__main__":
    main()
