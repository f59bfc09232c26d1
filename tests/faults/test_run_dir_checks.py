"""Checks of a run directory decide from its listing and its record, and read each file once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ddiff.errors import CheckpointError
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import HEADER, RunRecord
from ddiff.run_dir.protection import check_overwriting
from ddiff.run_dir.resume import check_resumable
from ddiff.runs.build import NO_OVERRIDES
from ddiff.runs.directory import check_directory

ALLOWED = [
    ("train.steps", 4, 5),
    ("run_dir", "runs/a", "runs/b"),
    ("evaluate.every", None, 10),
    ("backend.kind", "single", "ddp"),
]
REFUSED = [
    ("train.steps", 5, 4),
    ("train.steps", None, 4),
    ("seed", 0, 1),
    ("evaluate.draws", 1, 2),
    ("process.kind", "masked", None),
]


@pytest.mark.parametrize("change", ALLOWED)
def test_check_resumable_accepts_changes_of_keys_that_may_change(
    change: tuple[str, Any, Any],
) -> None:
    check_resumable(Path("runs/a"), [change], [])


@pytest.mark.parametrize("change", REFUSED)
def test_check_resumable_raises_an_error_that_names_the_changed_key(
    change: tuple[str, Any, Any],
) -> None:
    key, old, new = change
    with pytest.raises(CheckpointError, match=rf"{key}: was {old!r}, is {new!r}"):
        check_resumable(Path("runs/a"), [*ALLOWED, change], [])


def test_check_resumable_refuses_a_change_of_components_passed_as_objects() -> None:
    with pytest.raises(CheckpointError, match="given process: was 'a:A', is None"):
        check_resumable(Path("runs/a"), [], [("process", "a:A", None)])


@pytest.mark.parametrize(
    ("text", "is_own"),
    [
        (f"# {HEADER} 0.1.0 resolved it.\nseed = 0\n", True),
        (f"# {HEADER} 0.1.0 resolved it.\nseed = 0  \n# a note\n", False),
        ("seed = 0\n", False),
        ("", False),
    ],
)
def test_classify_contents_recognizes_a_recipe_of_ddiff_by_its_header(
    tmp_path: Path, text: str, is_own: bool
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    (tmp_path / "samples.jsonl").touch()
    contents = classify_contents(tmp_path)
    assert contents.has_own_recipe == is_own
    assert contents.names == ["recipe.toml", "samples.jsonl"]
    assert contents.foreign == ([] if is_own else ["recipe.toml"])
    assert contents.written[-1].name == ("recipe.toml" if is_own else "samples.jsonl")


def test_check_overwriting_warns_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    check_overwriting(classify_contents(tmp_path))
    assert capsys.readouterr().err == ""
    check_overwriting(classify_contents(tmp_path), warn=True)
    assert "already contains notes.txt, which ddiff did not write" in capsys.readouterr().err


def test_check_directory_reads_every_result_file_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """environment.json is read twice: to check that it is readable, and as part of the record."""
    reads: Counter[str] = Counter()
    read_text = Path.read_text

    def count(path: Path, *arguments: Any, **keywords: Any) -> str:
        if path.parent == run_dir:
            reads[path.name] += 1
        return read_text(path, *arguments, **keywords)

    recipe = read_recipe("tiny.toml")
    monkeypatch.setattr(Path, "read_text", count)
    check_directory(recipe, NO_OVERRIDES, fresh=False)
    assert reads == {
        "environment.json": 2,
        "evaluation.json": 1,
        "recipe.toml": 1,
        "samples.jsonl": 1,
        "sampling.json": 1,
    }


def test_run_record_raises_an_error_that_names_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"recipe\.toml cannot be read"):
        RunRecord.read(tmp_path)
