"""Option --fresh deletes only files of a run, and a run never overwrites foreign files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import Command, is_refusal
from tiny_run import RECIPE, files

import ddiff as api
from ddiff.errors import CheckpointError
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import CHECKPOINTS, FIELDS, FILES, PATTERNS
from ddiff.run_dir.protection import delete_run

ROOT = Path(__file__).parents[2]
ALWAYS = ("every run", "every run of one text")
"""Entries of the table of files in docs/runs.md for files that each run of one text writes."""
FRESH = ("run", "tiny.toml", "--fresh")
FOREIGN = {
    "a document": "thesis.tex",
    "a folder": "notes/today.txt",
    "a hidden file": ".env",
    "weights of the user's own": "weights.safetensors",
    "a file among the checkpoints": "checkpoints/best.safetensors",
    "a folder among the checkpoints": "checkpoints/best/model.safetensors",
    "a file in a checkpoint": "checkpoints/step_00000004/notes.txt",
    "exported weights in a checkpoint": "checkpoints/step_00000004/exported.safetensors",
    "a file in the folder of a verification": "replay/notes.txt",
    "a copy of a run's file": "evaluation.json.bak",
    "a comparison": "compare.md",
}


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    return path


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_option_fresh_refuses_a_run_directory_with_foreign_files(
    kind: str, mode: tuple[str, ...], run_dir: Path, ddiff: Command
) -> None:
    put(run_dir / FOREIGN[kind])
    before = files(run_dir)
    name = FOREIGN[kind].split("/")[0] if kind == "a folder" else Path(FOREIGN[kind]).name
    name = "best" if kind == "a folder among the checkpoints" else name
    assert is_refusal(ddiff(*FRESH, *mode), "--fresh", "runs/tiny", name)
    assert files(run_dir) == before


def test_option_fresh_trains_again_in_a_directory_with_only_a_run(
    run_dir: Path, ddiff: Command
) -> None:
    old = (run_dir / "metrics.jsonl").read_text()
    answer = ddiff(*FRESH, "--set", "seed=1", "--set", "train.steps=2")
    assert answer.code == 0, answer.err
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run_dir / "metrics.jsonl").read_text()[:60] != old[:60]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]


def test_option_fresh_deletes_partial_files_of_a_killed_run(run_dir: Path) -> None:
    for name in (
        "recipe.toml.part",
        "tokenizer.json.partial-0123abcd",
        "vocabulary.safetensors.89abcdef.part",
    ):
        put(run_dir / name)
    put(run_dir / "checkpoints/step_00000006/model.rank_00001.safetensors")
    put(run_dir / "checkpoints/step_00000006/complete.json.part")
    put(run_dir / "replay/checkpoints/step_00000003/state.json")
    (run_dir / ".ddiff-a1b2").mkdir()
    assert classify_contents(run_dir).foreign == []
    delete_run(run_dir)
    assert list(run_dir.iterdir()) == []


def test_every_file_of_a_finished_run_is_recognized_as_a_run_file(run_dir: Path) -> None:
    found = classify_contents(run_dir)
    assert found.foreign == []
    assert {str(run_dir / name) for name in files(run_dir)} <= set(map(str, found.written))
    assert found.written[-1].name == "recipe.toml", (
        "the recipe must be deleted last, because it identifies a run directory"
    )
    always = {name for name, writer in documented_files().items() if writer in ALWAYS}
    assert len(always) >= 8  # without rows for these files the next check would pass
    assert always <= {name.partition("/")[0] for name in files(run_dir)}


def documented_files() -> dict[str, str]:
    """Return who writes each file of a run directory, from the table in docs/runs.md."""
    page = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    section = page.partition("## Files of a run directory")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, flags=re.MULTILINE)
    return {
        name.rstrip("/"): writer.partition(",")[0]
        for names, writer in rows
        for name in re.findall(r"`(.*?)`", names)
    }


def test_page_on_runs_describes_exactly_the_files_of_a_run_directory() -> None:
    assert set(documented_files()) == {*FILES, *PATTERNS, CHECKPOINTS, FIELDS}


@pytest.mark.parametrize("what", ["a file", "the checkpoints", "a checkpoint", "weights"])
def test_option_fresh_does_not_follow_symbolic_links(
    what: str, run_dir: Path, ddiff: Command
) -> None:
    place = {
        "a file": run_dir / "metrics.jsonl",
        "the checkpoints": run_dir / "checkpoints",
        "a checkpoint": run_dir / "checkpoints/step_00000004",
        "weights": run_dir / "checkpoints/step_00000004/model.safetensors",
    }[what]
    elsewhere = Path("elsewhere").absolute()
    shutil.move(place, elsewhere)
    place.symlink_to(elsewhere)
    before = files(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    assert is_refusal(ddiff(*FRESH), place.name)
    assert (files(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before
    assert place.is_symlink()


def test_option_fresh_refuses_a_run_directory_that_is_a_link(run_dir: Path, ddiff: Command) -> None:
    Path("link").symlink_to(run_dir.absolute())
    before = files(run_dir)
    assert is_refusal(ddiff(*FRESH, "--set", "run_dir=link"), "symbolic link")
    assert files(run_dir) == before


@pytest.mark.parametrize("place", [".", "..", "../work", "/", "work/..", "~"])
def test_option_fresh_refuses_a_directory_above_the_working_directory(
    place: str, run_dir: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directories contain valid runs, so they are refused only because of their position."""
    Path("work").mkdir()
    before = files(run_dir)
    if place == "~":
        monkeypatch.setenv("HOME", str(run_dir.absolute()))
        place = str(run_dir)
    elif place != "/":
        for name in before:
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / name).write_bytes(before[name])
    answer = ddiff(*FRESH, "--set", f"run_dir={place!r}")
    assert is_refusal(answer, "directory")
    assert Path("tiny.toml").read_text() == RECIPE
    assert files(run_dir) == before


def test_option_fresh_does_not_delete_the_recipe_that_it_reads(
    run_dir: Path, ddiff: Command
) -> None:
    before = files(run_dir)
    assert is_refusal(ddiff("run", "runs/tiny/recipe.toml", "--fresh"), "holds the recipe")
    assert files(run_dir) == before


def test_run_does_not_overwrite_a_recipe_of_the_user(folder: Path, ddiff: Command) -> None:
    Path("proj").mkdir()
    own = f"# my comments\n{RECIPE}"
    Path("proj/recipe.toml").write_text(own)
    for more in ((), ("--fresh",), ("--dry-run",)):
        answer = ddiff("run", "proj/recipe.toml", "--set", "run_dir=proj", *more)
        assert is_refusal(answer, "proj", "run_dir")
        assert files(Path("proj")) == {"recipe.toml": own.encode()}


@pytest.mark.parametrize("name", [name for name in FILES if name != "recipe.toml"])
def test_first_run_refuses_a_directory_with_files_named_like_run_files(
    name: str, folder: Path, ddiff: Command
) -> None:
    put(Path("model") / name)
    for more in ((), ("--fresh",)):
        assert is_refusal(ddiff("run", "tiny.toml", "--set", "run_dir=model", *more), "model", name)
        assert files(Path("model")) == {name: b"precious"}


def test_first_run_reports_and_keeps_foreign_files(folder: Path, ddiff: Command) -> None:
    put(Path("own/thesis.tex"))
    answer = ddiff("run", "tiny.toml", "--set", "run_dir=own", "--set", "train.steps=2")
    assert answer.code == 0, answer.err
    assert "own already contains thesis.tex" in answer.err
    assert is_refusal(ddiff(*FRESH, "--set", "run_dir=own"), "thesis.tex")
    assert Path("own/thesis.tex").read_text() == "precious"


def test_resuming_a_run_keeps_comments_added_to_its_recipe_file(
    run_dir: Path, ddiff: Command
) -> None:
    recipe = run_dir / "recipe.toml"
    recipe.write_text(recipe.read_text() + "# the best so far\n")
    before = files(run_dir)
    for more in (("--set", "train.steps=6"), ("--fresh",)):
        assert is_refusal(ddiff("run", "tiny.toml", *more), "recipe.toml")
    assert files(run_dir) == before
    assert ddiff("sample", "runs/tiny", "--count", "1").code == 0


def test_option_fresh_deletes_files_that_a_tracker_declares_as_its_own(run_dir: Path) -> None:
    put(run_dir / "wandb/offline-run/log.txt")
    (run_dir / "wandb/latest").symlink_to(Path("corpus.txt").absolute())
    put(run_dir / "wandb_id")
    with pytest.raises(CheckpointError, match="wandb"):
        delete_run(run_dir)
    assert (run_dir / "recipe.toml").is_file()
    delete_run(
        run_dir, api.read_recipe("tiny.toml", ['tracker="wandb"']).tracker.component.load().writes
    )
    assert list(run_dir.iterdir()) == []
    assert Path("corpus.txt").is_file()


@pytest.mark.parametrize("address", ["s3://bucket/run", "memory://run", "file:///tmp/run"])
def test_run_dir_must_be_a_local_path(address: str, folder: Path, ddiff: Command) -> None:
    for more in ((), ("--dry-run",)):
        assert is_refusal(
            ddiff("run", "tiny.toml", "--set", f"run_dir={address}", *more), address, "run_dir"
        )
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "tiny.toml"]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ('train.init={run="runs/tiny"}', "train.init"),
        ('tokenizer={kind="saved", path="runs/tiny/tokenizer.json"}', "tokenizer.json"),
    ],
)
def test_option_fresh_refuses_to_delete_inputs_of_its_recipe(
    setting: str, name: str, run_dir: Path, ddiff: Command
) -> None:
    before = files(run_dir)
    assert is_refusal(ddiff(*FRESH, "--set", setting), name, "runs/tiny")
    assert files(run_dir) == before


def test_run_refuses_a_run_dir_inside_a_checkpoints_folder(run_dir: Path, ddiff: Command) -> None:
    before = files(run_dir)
    for place in ("runs/tiny/checkpoints/mine", "runs/tiny/checkpoints/step_00000004"):
        assert is_refusal(ddiff("run", "tiny.toml", "--set", f"run_dir={place}"), "checkpoints")
    assert files(run_dir) == before


def test_deleting_old_checkpoints_keeps_foreign_files_in_their_folders(
    run_dir: Path, ddiff: Command
) -> None:
    """`[train] keep` deletes the checkpoint of step 2, but not foreign files in its folder."""
    old = run_dir / "checkpoints/step_00000002"
    put(old / "notes.txt")
    put(old / "kept/exported.safetensors")
    put(old / "mine.safetensors")
    answer = ddiff("run", "tiny.toml", "--set", "train.steps=6")
    assert answer.code == 0, answer.err
    assert sorted(files(old)) == ["kept/exported.safetensors", "mine.safetensors", "notes.txt"]
    steps = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert steps == ["step_00000002", "step_00000004", "step_00000006"]


def test_first_run_refuses_a_directory_with_checkpoints_of_another_tool(
    folder: Path, ddiff: Command
) -> None:
    put(Path("own/checkpoints/step_00000001/model.safetensors"))
    for more in ((), ("--fresh",)):
        assert is_refusal(ddiff("run", "tiny.toml", "--set", "run_dir=own", *more), "checkpoints")
    assert list(files(Path("own"))) == ["checkpoints/step_00000001/model.safetensors"]
