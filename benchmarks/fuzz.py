"""Test the command line with mutated recipes: each must run or be refused with a message.

python benchmarks/fuzz.py                          # 1,000 dry runs, then 40 short runs
python benchmarks/fuzz.py --recipes 100 --runs 5 --seed 3

A mutated recipe is a valid recipe with random changes. All recipes run in one process and in a
temporary directory. A fault is a traceback, an empty or very long message, a time limit that is
exceeded, or a file that is not removed. Each fault is printed with the text and the number of the
recipe; `--seed S --only N` repeats recipe N. The exit code is 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddiff.cli import main as ddiff
from ddiff.plugin.loader import find_installed_plugins, survey_plugins
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.resolve import parse_recipe, read_recipe
from ddiff.recipe.schema import find_layout

SECONDS = 20.0  # CPU limit of a dry run, and of a run of two steps
LONGEST = 4000  # characters of a refusal
CORPUS = "\n".join(
    f"the {a} {b} sat on the {c}" for a in ("old", "red") for b in ("cat", "hat") for c in "xyzabcd"
)
SMALL = [
    "data.length=8", "denoiser.width=16", "denoiser.layers=1", "denoiser.heads=2",
    "train.steps=2", "train.batch=4", "train.warmup=1", "evaluate.rows=4", "evaluate.batch=4",
    "sample.steps=2", "sample.count=2", "sample.batch=2",
]  # fmt: skip
SHORT = ["train.steps=2", "evaluate.rows=4", "evaluate.draws=1", "sample.steps=2", "sample.count=2"]
TEXT = 'data={kind="text", files=["corpus.txt"], split="line", held_out=0.2, length=8}'
CHAIN = 'data={kind="markov", rows=64, validation=8, length=8}'
PAIR = """
name = "pair"
plugins = ["dit", "gaussian", "mdlm"]
data = "digits"

[fields.image]
process = "{process}"

[fields.text]
process = "mdlm"
weight = 0.3

[denoiser]
kind = "mmdit"
width = 16
layers = 1
heads = 2

[objective.times]
kind = "mixture"
parts = [{{path = "shared"}}, {{path = "shared", clean = ["text"]}}]

[train]
steps = 2
batch = 4
warmup = 1

[evaluate]
samples = 4
batch = 4
targets = ["joint", "image | text"]

[sample]
steps = 2
count = 2
batch = 2

[sample.guidance.image]
weight = 1.5
without = {{text = "prior"}}
"""
INTEGERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    255,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
]
FLOATS = [
    0.0,
    -0.0,
    1e-320,
    1e-12,
    0.1,
    0.5,
    1.0,
    1.5,
    2.0,
    1e30,
    1e38,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    -0.5,
]
TEXTS = [
    "",
    " ",
    "x" * 300,
    "x" * 5000,
    "é😀",
    "..",
    "../x",
    "/",
    "a\x00b",
    "a\nb",
    "nan",
    "auto",
    "cuda",
    "cpu:7",
    "none",
    "[x]",
]


class Fault(NamedTuple):
    """Recipe on which the command line failed, with a description of the fault."""

    number: int
    what: str
    text: str

    def __str__(self) -> str:
        return f"--- recipe {self.number}: {self.what}\n{self.text}"


class Output(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def bases() -> list[dict[str, Any]]:
    """Return the recipes to mutate: shipped small recipes, reduced in size, on two data sets.

    Two recipes of a picture and a word are added, with tokens and with vectors. The recipes are
    nested tables in which every default is filled in.
    """
    plugins = [name for name in find_installed_plugins() if name != "core"]
    found = []
    for name in find_shipped_recipes():
        if "/" in name:
            continue
        for data in (TEXT, CHAIN):
            alphabet = (
                ['tokenizer={kind="alphabet", symbols="abcdefgh"}']
                if data is CHAIN
                else ["tokenizer.size=270"]
            )
            clusters = ["vocabulary.sizes=[4]"] if "hdlm" in name and "three" not in name else []
            try:
                tree = read_recipe(name, [data, *alphabet, *SMALL, *clusters]).to_dict()
            except Exception:  # a recipe with another backbone or tokenizer has other keys
                continue
            found.append({**tree, "plugins": plugins})
    for process, image in (("mdlm", "levels"), ("gaussian", "patches")):
        recipe = parse_recipe(PAIR.format(process=process), settings=[f"data.image={image}"])
        found.append({**recipe.to_dict(), "plugins": plugins})
    return found


# ---------------------------------------------------------------------- mutations


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def inside(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        tree = tree[key]
    return tree


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: rng.choice(INTEGERS),
        lambda: -rng.choice(INTEGERS),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice([True, False]),
    ]
    if depth < 3:
        makers += [
            lambda: [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(["kind", "x", "", "é"]): odd_value(rng, depth + 1)},
            lambda: {},
        ]
    return rng.choice(makers)()


def set_oddly(tree: dict[str, Any], rng: random.Random, kinds: dict[str, list[str]]) -> None:
    *path, key = rng.choice(list(leaves(tree)))
    inside(tree, path)[key] = odd_value(rng)


def near_limits(tree: dict[str, Any], rng: random.Random, kinds: dict[str, list[str]]) -> None:
    """Replace a random number in the recipe `tree` by another number of the same type, in place.

    Most recipes stay valid. `kinds` is ignored.
    """
    numbers = [
        path for path in leaves(tree) if type(inside(tree, path[:-1])[path[-1]]) in (int, float)
    ]
    *path, key = rng.choice(numbers)
    table = inside(tree, path)
    table[key] = rng.choice(INTEGERS if isinstance(table[key], int) else FLOATS)


def drop(tree: dict[str, Any], rng: random.Random, kinds: dict[str, list[str]]) -> None:
    *path, key = rng.choice(list(leaves(tree)))
    del inside(tree, path)[key]


def rename(tree: dict[str, Any], rng: random.Random, kinds: dict[str, list[str]]) -> None:
    *path, key = rng.choice(list(leaves(tree)))
    table = inside(tree, path)
    odd = [key.upper(), key[:-1], key + "s", "", "é", "x" * 400, f"{key}.{key}", "kind"]
    table[rng.choice(odd)] = table.pop(key)


def swap_kind(tree: dict[str, Any], rng: random.Random, kinds: dict[str, list[str]]) -> None:
    slots = find_layout(tree).list_slots(tree)
    place = rng.choice([place for place in slots if isinstance(reached(tree, place), dict)])
    kind = slots[place].kind if rng.random() < 0.8 else rng.choice(list(kinds))
    inside(tree, place[:-1])[place[-1]] = {"kind": rng.choice(kinds[kind])} | (
        {"length": 8} if slots[place].kind == "dataset" else {}
    )


def wrap(tree: dict[str, Any], rng: random.Random, kinds: dict[str, list[str]]) -> None:
    """Replace a random value of the recipe `tree` by a value of another structure, in place.

    A scalar becomes a list, a list becomes a scalar, or the value is wrapped in a table. `kinds` is
    not used: all mutations have the same signature.
    """
    *path, key = rng.choice(list(leaves(tree)))
    table = inside(tree, path)
    value = table[key]
    unlisted = value[0] if isinstance(value, list) and value else value
    table[key] = rng.choice([[value], unlisted, {"kind": value}, [value, value]])


def reached(tree: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


MUTATIONS = [
    set_oddly,
    set_oddly,
    near_limits,
    near_limits,
    near_limits,
    drop,
    rename,
    swap_kind,
    swap_kind,
    wrap,
]


def mutate_text(text: str, rng: random.Random) -> str:
    """Damage the text of a recipe: truncate it, double it, or insert misplaced characters."""
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            text[:at],
            text[:at] + rng.choice("\x00\x07\x7f\u2028\ufeff\"'[]{}=#\\😀") + text[at:],
            text.replace("\n", "\r\n"),
            "\ufeff" + text,
            text + text[at:],
            f"deep = {'[' * 2000}{']' * 2000}\n{text}",
            text.replace("=", ":", 1),
        ]
    )


def to_toml(value: Any) -> str:
    """Format a value as TOML, even a value that TOML libraries refuse to write."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return (
            "nan"
            if math.isnan(value)
            else ("-inf" if value < 0 else "inf")
            if math.isinf(value)
            else repr(value)
        )
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return (
            '"'
            + "".join(
                x if x.isprintable() and x not in '"\\' else f"\\u{ord(x):04x}" for x in value
            )
            + '"'
        )
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{to_toml(str(key))} = {to_toml(inner)}" for key, inner in value.items())
            + "}"
        )
    return "[" + ", ".join(map(to_toml, value)) + "]"


def mutant(number: int, seed: int, trees: list[dict[str, Any]], kinds: dict[str, list[str]]) -> str:
    """Return the text of the mutated recipe with the given number, reproducibly by seed.

    trees: recipes to mutate. kinds: names of components, by kind.
    """
    import copy

    rng = random.Random(f"{seed} {number}")
    tree = copy.deepcopy(rng.choice(trees))
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        with contextlib.suppress(KeyError, IndexError, TypeError):  # removed by an earlier mutation
            rng.choice(MUTATIONS)(tree, rng, kinds)
    text = (
        "\n".join(f"{to_toml(str(key))} = {to_toml(value)}" for key, value in tree.items()) + "\n"
    )
    return mutate_text(text, rng) if rng.random() < 0.1 else text


# ---------------------------------------------------------------------- checks


class TooSlow(BaseException):
    """Raised when the time limit is exceeded; the command line catches only `Exception`."""


def run_command(*arguments: str) -> Output:
    """Run `ddiff ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    began, code = time.process_time(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with time_limit(SECONDS):
                ddiff(list(arguments))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except TooSlow:
            code = -1
        except BaseException:
            err.write(traceback.format_exc())
            code = 1
    return Output(code, out.getvalue(), err.getvalue(), time.process_time() - began)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def find_fault(output: Output, running: bool) -> str | None:
    """Return a description of the fault in the output of a command, or None.

    `running`: the command was a run and not a dry run. A run may exceed the time limit, because
    mutated recipes may be large.
    """
    if output.code == -1:
        return None if running else f"no answer after {SECONDS} s"
    if "Traceback" in output.err or output.code not in (0, 2):
        return f"exit code {output.code}: {output.err[-3000:]}"
    if output.code == 0:
        return None if running or "\n# fits" in output.out else "no verdict"
    if not output.err.strip():
        return "a refusal with an empty message"
    return (
        f"a refusal of {len(output.err)} characters"
        if len(output.err) > LONGEST and not running
        else None
    )


def fuzz(
    recipes: Sequence[int], runs: int, seed: int, report: Callable[[str], None]
) -> list[Fault]:
    """Dry-run all recipes, then train `runs` of the accepted recipes; return the faults.

    recipes: numbers of the recipes. report: function that prints a line.
    """
    registry = survey_plugins().registry
    kinds: dict[str, list[str]] = {}
    for component in registry.components():
        kinds.setdefault(component.kind, []).append(component.name)
    trees, faults, passed = bases(), [], []
    Path("corpus.txt").write_text(CORPUS)
    before = sorted(os.listdir())
    for number in recipes:
        text = mutant(number, seed, trees, kinds)
        Path("../mutant.toml").write_text(text, encoding="utf-8", newline="")
        output = run_command("run", "../mutant.toml", "--dry-run")
        what = find_fault(output, running=False)
        if sorted(os.listdir()) != before:
            what = f"files are left: {sorted(set(os.listdir()) - set(before))}"
        if what is not None:
            faults.append(Fault(number, what, text))
            report(str(faults[-1]))
        elif output.code == 0:
            passed.append((number, text))
    report(f"{len(recipes)} recipes: {len(passed)} accepted, {len(faults)} faults")
    chosen = passed[:: max(1, len(passed) // runs)][:runs] if runs else []
    late = 0
    for number, text in chosen:
        Path("../mutant.toml").write_text(text, encoding="utf-8", newline="")
        settings = [
            f"--set={setting}"
            for setting in (*SHORT, f'run_dir="runs/r{number}"', 'tracker="none"')
        ]
        output = run_command("run", "../mutant.toml", *settings)
        if what := find_fault(output, running=True):
            faults.append(Fault(number, f"accepted, then {what}", text))
            report(str(faults[-1]))
        elif output.code == 2:
            late += 1
            last_line = output.err.strip().splitlines()[-1]
            report(f"--- recipe {number}: accepted, then refused: {last_line[:600]}")
        shutil.rmtree("runs", ignore_errors=True)
    report(f"{len(chosen)} runs: {late} refused late, {len(faults)} faults in all")
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument(
        "--runs", type=int, default=40, help="accepted recipes to run for two steps"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the only recipe to test")
    chosen = parser.parse_args(arguments)
    numbers = range(chosen.recipes) if chosen.only is None else [chosen.only]
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="ddiff-fuzz-") as folder:
        os.environ["DDIFF_CACHE"] = f"{folder}/cache"
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        work = Path(folder, "work")
        work.mkdir()
        os.chdir(work)
        try:
            faults = fuzz(numbers, chosen.runs, chosen.seed, lambda line: print(line, flush=True))
        finally:
            os.chdir(here)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
