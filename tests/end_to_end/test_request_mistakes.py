"""Invalid requests for samples, runs and comparisons are refused and write no file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from commands import Command
from labelled import RECIPE, rows
from safetensors.torch import load_file, save_file
from small import working_in

import ddiff as api
from ddiff import Backbone
from ddiff.errors import ArgumentError, DataError
from ddiff.runs.conditioning import SampleConditions
from ddiff.runs.prompts import read_prompts

PROGRESS = re.compile(r"[a-z ]+: \d+/\d+ ")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with four trained runs, which differ in their conditions.

    `labelled`: a label that is dropped in some training rows. `always`: a label that is never
    dropped. `styled`: a vector. `small`: no condition, with a tree of clusters.
    """
    folder = tmp_path_factory.mktemp("mistakes")
    with working_in(folder):
        Path("rows.jsonl").write_text(rows(60))
        Path("labelled.toml").write_text(RECIPE.replace("steps = 80", "steps = 2"))
        api.run("labelled.toml")
        always = ["denoiser.conditions.kind.dropout=0.0", "sample.conditions.kind=1"]
        api.run("labelled.toml", settings=[*always, 'name="always"'])
        styled = RECIPE.replace("rows.jsonl", "styled.jsonl").replace(
            'labels = ["kind"]', 'vectors = ["style"]'
        )
        Path("styled.toml").write_text(
            styled.replace("kind = { classes = 2,", "style = { width = 3,")
        )
        lines = [
            json.loads(line) | {"style": [0.5, 1, number % 3], "group": 1}
            for number, line in enumerate(rows(60).splitlines())
        ]
        Path("styled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        api.run("styled.toml", settings=['name="styled"', "train.steps=2"])
        api.run("small.toml", settings=["train.steps=2"])
        yield folder


def refused(answer: tuple[int, str, str], *expected: str) -> None:
    code, out, err = answer
    message = "\n".join(line for line in err.splitlines() if not PROGRESS.match(line))
    assert (code, out) == (2, ""), message
    assert "Traceback" not in message
    assert [text for text in expected if text not in message] == [], message


SAMPLING: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "unknown sampler": (
        "small",
        ("--sampler", "confidnce"),
        ('no sampler "confidnce"', '"confidence"'),
    ),
    "a sampler of vectors": (
        "small",
        ("--sampler", "ddim"),
        ('"ddim"', "needs a process of vectors", "Available: acs, analytic, ancestral"),
    ),
    "a sampler of models without a process": (
        "small",
        ("--sampler", "left_to_right"),
        ('"left_to_right"', "needs a model without a process", "has a process of tokens"),
    ),
    "unknown key of a sampler": (
        "small",
        ("--set", "temperatur=1.0"),
        ("temperatur", '"temperature"'),
    ),
    "a key with its table": (
        "small",
        ("--set", "sample.sampler.last=argmax"),
        ("sample", "Remove"),
    ),
    "a key out of range": ("small", ("--set", "temperature=-1.0"), ("temperature", "0")),
    "zero steps": ("small", ("--steps", "0"), ("--steps", "1")),
    "zero samples": ("small", ("--count", "0"), ("--count", "1")),
    "a prompt longer than the canvas": (
        "small",
        ("--prompt", "the old cat sat on the red hat and on the old cat and on the hat"),
        ("prompt", "8 tokens", "[data] length"),
    ),
    "an infill longer than the canvas": (
        "small",
        ("--infill", "the [MASK:8]"),
        ("infill", "8 tokens", "of 9"),
    ),
    "no gap": ("small", ("--infill", "the cat"), ("gap", "[MASK:8]")),
    "an empty gap": ("small", ("--infill", "the [MASK:0]"), ("N >= 1", "[MASK:0]")),
    "a gap without a number": (
        "small",
        ("--infill", "the [MASK]"),
        ("number of tokens", "[MASK]"),
    ),
    "a gap of words": ("small", ("--infill", "the [MASK:many]"), ("[MASK:many]",)),
    "text that a sampler from left to right would not see": (
        "small",
        ("--infill", "the [MASK:2] sat", "--sampler", "blockwise", "--set", "width=4"),
        ("text after a gap", "from left to right", "sight=all"),
    ),
    "prompt and infill": (
        "small",
        ("--infill", "[MASK:2]", "--prompt", "a"),
        ("either prompt or infill",),
    ),
    "a prompt and a file of them": (
        "small",
        ("--prompts", "x.txt", "--prompt", "a"),
        ("exclude each other",),
    ),
    "a file that is not there": (
        "small",
        ("--prompts", "nowhere.txt"),
        ("nowhere.txt", "cannot be read"),
    ),
    "a file without a prompt": ("small", ("--prompts", "empty.txt"), ("empty.txt", "no prompt")),
    "a prompt outside the alphabet": ("labelled", ("--prompt", "abx"), ("'abx'", "'x'", "a b c d")),
    "a condition nobody reads": (
        "small",
        ("--condition", "kind=1"),
        ('reads no conditions; got "kind"',),
    ),
    "another condition": ("labelled", ("--condition", "kid=1"), ('got "kid"', '"kind"')),
    "a label that is no number": ("labelled", ("--condition", "kind=ab"), ('"kind"', "'ab'")),
    "a label beyond the classes": (
        "labelled",
        ("--condition", "kind=2"),
        ('"kind" is a label of 2 classes', "0 to 1", "got 2"),
    ),
    "a label below the classes": (
        "always",
        ("--condition", "kind=-1"),
        ('"kind" is a label of 2 classes', "got -1"),
    ),
    "a vector for a label": (
        "labelled",
        ("--condition", "kind=[0.0, 1.0]"),
        ('"kind" is a label of 2', "got [0.0, 1.0]"),
    ),
    "a label for a vector": (
        "styled",
        ("--condition", "style=1"),
        ('"style" is a vector of width 3', "got 1"),
    ),
    "a vector of another width": (
        "styled",
        ("--condition", "style=[1.0, 0.5]"),
        ("width 3", "got [1.0, 0.5]"),
    ),
    "a vector that is not finite": (
        "styled",
        ("--condition", "style=[1.0, nan, 0]"),
        ("3 finite numbers", "nan"),
    ),
    "a condition without a value": (
        "labelled",
        ("--condition", "kind"),
        ("--condition kind: expected NAME=VALUE",),
    ),
    "a broken vector": (
        "labelled",
        ("--condition", "kind=[0,"),
        ("--condition kind=[0,:", "author=2"),
    ),
    "labels for other samples": ("labelled", ("--condition", "kind=[0, 1, 0]"), ("or 2 values",)),
    "guidance by nothing": ("labelled", ("--guidance", "2.0"), ("guidance", "needs a condition")),
    "guidance without trained dropout": (
        "always",
        ("--guidance", "2.0", "--condition", "kind=1"),
        ("guidance", "never trained without", "conditions.kind.dropout"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SAMPLING))
def test_sample_command_refuses_invalid_requests_with_a_reason(
    name: str, place: Path, ddiff: Command
) -> None:
    run, arguments, expected = SAMPLING[name]
    (place / "empty.txt").write_text("\n \n")
    patched = [
        str(place / argument) if argument == "empty.txt" else argument for argument in arguments
    ]
    refused(ddiff("sample", str(place / "runs" / run), *patched), *expected)


@pytest.mark.slow
def test_sample_method_refuses_invalid_arguments_with_a_reason(place: Path) -> None:
    run = api.load(place / "runs/small")
    for expected, arguments in (
        ("steps", {"steps": 0}),
        ("at least 1", {"count": 0}),
        ("either prompt or infill", {"prompt": "a", "infill": "[MASK:1]"}),
        ("a sampler object, which has its own", {"sampler": api.AncestralSampler(3), "steps": 4}),
        ("no conditions", {"conditions": {"kind": 1}}),
    ):
        with pytest.raises(ArgumentError, match=expected):
            run.sample(**arguments)
    assert run.sample(1, infill="the [MASK:2]", sampler="blockwise", settings=["width=4"])


@pytest.mark.slow
def test_integers_are_accepted_for_a_declared_vector_condition(place: Path) -> None:
    run = api.load(place / "runs/styled")
    for whole in ([1, 0, -1], [[1, 0, -1], [2, 0, 3]]):
        fractions = torch.tensor(whole).float().tolist()
        assert run.sample(2, conditions={"style": whole}) == run.sample(
            2, conditions={"style": fractions}
        )
        found = SampleConditions.parse(run.denoiser, {"style": whole}, 2).values["style"]
        assert found.tolist() == torch.tensor(fractions).expand(2, 3).tolist()


class Plain(Backbone):
    """Backbone that uses a condition without declaring its form (classes or width)."""

    width = 4
    condition_dropout: ClassVar[dict[str, float]] = {"kind": 0.0}


def test_undeclared_condition_is_a_label_if_its_value_is_an_integer() -> None:
    denoiser = api.Denoiser(Plain(), api.TokenHead(api.FlatVocabulary(4), 4))
    for value, expected in (
        (7, [7, 7]),
        ([1, 0], [1, 0]),
        ([1.0, 0.5, 2.0], [[1.0, 0.5, 2.0]] * 2),
    ):
        assert (
            SampleConditions.parse(denoiser, {"kind": value}, 2).values["kind"].tolist() == expected
        )
    for value in (-7, [0, -1], [1.0, float("nan")], [float("inf")], True, 10**30):
        with pytest.raises(ArgumentError, match=r'"kind" is a label .* or a vector .*; got'):
            SampleConditions.parse(denoiser, {"kind": value}, 2)


@pytest.mark.slow
def test_condition_with_dropout_0_is_required_for_sampling(place: Path) -> None:
    run = api.load(place / "runs/always")
    assert len(run.sample()) == 2  # [sample] conditions of the recipe gives the condition
    with pytest.raises(ArgumentError, match="given with every training sample"):
        run.sample(conditions={})
    with pytest.raises(ArgumentError, match="given with every training sample"):
        run.nelbo(["abab" * 2])


@pytest.mark.slow
def test_incompatible_sampler_is_refused_before_training(place: Path) -> None:
    """The process "dense" replaces tokens by tokens, which the sampler "confidence" cannot undo."""
    process = api.DenseProcess(api.FlatVocabulary(4), torch.tensor(SWAPPING).double())
    recipe = (place / "labelled.toml").read_text().replace('name = "labelled"', 'name = "swapping"')
    (place / "swapping.toml").write_text(recipe + '\n[sample.sampler]\nkind = "confidence"\n')
    with pytest.raises(ArgumentError) as raised:
        api.run(
            place / "swapping.toml",
            process=process,
            settings=[f"run_dir={str(place / 'swapping')!r}"],
        )
    assert "UnmaskingSampler" in str(raised.value)
    assert not (place / "swapping").exists()


SWAPPING = (np.full((5, 5), 0.2) - np.eye(5)).tolist()


@pytest.mark.slow
def test_sample_command_refuses_model_weights_with_nan(place: Path, ddiff: Command) -> None:
    shutil.copytree(place / "runs/small", place / "runs/nan")
    [weights] = (place / "runs/nan/checkpoints").glob("*/model.safetensors")
    save_file(
        {name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()},
        weights,
    )
    resealed(weights)
    refused(ddiff("sample", str(place / "runs/nan")), "NaN")


def resealed(weights: Path) -> None:
    """Update the checksums in complete.json after a change to the file `weights`."""
    marker = weights.with_name("complete.json")
    content, data = json.loads(marker.read_text()), weights.read_bytes()
    content["files"][weights.name] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    marker.write_text(json.dumps(content))


BEGINNING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no conditions in the data": (
        ("denoiser.conditions.author.classes=2",),
        ('"author"', "no such column", "kind"),
    ),
    "labels beyond the classes": (
        ("denoiser.conditions.kind.classes=1",),
        ('label 1 in "kind"', "a label of 1 classes", "conditions.kind.classes = 2"),
    ),
    "labels for a vector": (
        (
            'data={kind="jsonl", files=["styled.jsonl"], labels=["kind", "group"]}',
            "denoiser.conditions={group={width = 4}}",
        ),
        ('labels in "group"', "a vector of width 4", "{ classes = N }"),
    ),
    "vectors of another length": (
        (
            'data={kind="jsonl", files=["styled.jsonl"], vectors=["style"]}',
            "denoiser.conditions={style={width = 4}}",
        ),
        ('vectors of length 3 in "style"', "a vector of width 4", "{ width = 3 }"),
    ),
    "tokens for packed rows": (
        ('tokenizer={kind="bpe", size=300}', 'denoiser.conditions.kind.via="tokens"'),
        ("a row must hold one document", 'conditions.NAME.via = "cross"'),
    ),
    "several vectors by modulation": (
        ("denoiser.conditions={style={width = 4, count = 2}}",),
        ("count above 1", 'via = "cross" or "tokens"'),
    ),
    "a field in no line": (
        ('data.labels=["kid"]', "denoiser.conditions={kid={classes = 2}}"),
        ('"kid"', "no line of rows.jsonl", 'Did you mean "kind"?'),
    ),
    "a vector for a label at the end": (
        ("sample.conditions.kind=[0.5]",),
        ('"kind" is a label of 2', "got [0.5]"),
    ),
    "guidance at the end that nobody trained": (
        ("denoiser.conditions.kind.dropout=0.0", "sample.conditions.kind=1", "sample.guidance=2.0"),
        ("guidance", "never trained without"),
    ),
    "a required label missing from [sample]": (
        ("denoiser.conditions.kind.dropout=0.0",),
        ("given with every",),
    ),
    "a sampler of another plugin": (('sample.sampler="confidnce"',), ("confidnce", '"confidence"')),
    "a prefix share over one": (("train.prefix=1.5",), ("[train] prefix", "1.5")),
    "weights of no run": (
        ('train.init={run="nowhere"}',),
        ("[train] init", "nowhere", "not a trained run"),
    ),
    "weights without a run": (
        ('train.init={parts="all"}',),
        ("[train] init", '"run"', "got neither"),
    ),
    "weights of unknown parts": (
        ('train.init={run="runs/labelled", parts="half"}',),
        ("parts", "half"),
    ),
    "weights on another tokenizer": (
        ('train.init={run="runs/small"}',),
        ("[train] init", "the same tokenizer"),
    ),
    "weights of another width": (
        ('train.init={run="runs/labelled"}', "denoiser.width=32"),
        ("[train] init", "shape", "do not fit"),
    ),
    "embeddings of another width": (
        ('train.init={run="runs/labelled", parts="embeddings"}', "denoiser.width=32"),
        (
            "[train] init",
            "embedding.weight has shape [5, 16] in the trained run and [5, 32] in this run",
        ),
    ),
    "weights of another depth": (
        ('train.init={run="runs/labelled"}', "denoiser.layers=2"),
        ("[train] init", "is missing in the trained run"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BEGINNING))
def test_run_with_impossible_settings_is_refused_and_writes_no_file(
    name: str, place: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    settings, expected = BEGINNING[name]
    named = [part for setting in ('run_dir="runs/never"', *settings) for part in ("--set", setting)]
    refused(ddiff("run", "labelled.toml", *named), *expected)
    assert not Path("runs/never").exists()


@pytest.mark.slow
def test_option_fresh_with_an_invalid_init_keeps_the_old_run(
    place: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = {
        path: path.read_bytes() for path in Path("runs/labelled").rglob("*") if path.is_file()
    }
    refused(
        ddiff("run", "labelled.toml", "--fresh", "--set", 'train.init={run="runs/small"}'),
        "the same tokenizer",
    )
    refused(
        ddiff("run", "labelled.toml", "--fresh", "--set", "denoiser.conditions.kind.classes=1"),
        'label 1 in "kind"',
    )
    assert {
        path: path.read_bytes() for path in Path("runs/labelled").rglob("*") if path.is_file()
    } == before


@pytest.mark.slow
def test_load_accepts_only_evaluate_and_sample_settings(place: Path, ddiff: Command) -> None:
    run_dir = place / "runs/always"
    refused(
        ddiff("eval", str(run_dir), "--set", "train.steps=9"),
        "[evaluate] or [sample]",
        "train.steps=9",
    )
    refused(ddiff("eval", str(run_dir), "--set", "evaluate.window=[0.9, 0.1]"), "window", "0.9")
    assert (
        ddiff(
            "eval", str(run_dir), "--set", "evaluate.draws=3", "--set", "evaluate.window=[0.1, 0.9]"
        )[0]
        == 0
    )
    protocol = json.loads((run_dir / "evaluation.json").read_text())["protocol"]
    assert (protocol["draws"], protocol["window"]) == (3, [0.1, 0.9])


def test_prompt_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt")
