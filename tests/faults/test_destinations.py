"""Output paths of commands: foreign files are never overwritten, and no partial file is left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest
from commands import Command, is_refusal
from safetensors.torch import load_file
from tiny_run import files

import ddiff as api
from ddiff.errors import ArgumentError
from ddiff.run_dir.destination import check_destination, write_file
from ddiff.runs.export import export_run

EXPORT = ("export", "runs/tiny")
DATA = ("data", "tiny.toml", "--out")
COMPARE = ("compare", "runs/tiny", "--out")
STEP = "runs/tiny/checkpoints/step_00000004"
is_root = os.geteuid() == 0

IN_A_RUN = {
    "weights of a checkpoint": f"{STEP}/model.safetensors",
    "a new file in a checkpoint": f"{STEP}/new.safetensors",
    "a new file among checkpoints": "runs/tiny/checkpoints/new.safetensors",
    "the run's vocabulary": "runs/tiny/vocabulary.safetensors",
    "by a way around": "runs/other/../tiny/checkpoints/new.safetensors",
    "by a link": "link/new.safetensors",
    "by an address": "file://{here}/runs/tiny/vocabulary.safetensors",
}


@pytest.mark.parametrize("name", IN_A_RUN)
def test_export_into_a_run_directory_is_refused_and_changes_nothing(
    name: str, run_dir: Path, ddiff: Command
) -> None:
    Path("runs/other").mkdir()
    Path("link").symlink_to((run_dir / "checkpoints").absolute())
    before = files(Path())
    target = IN_A_RUN[name].format(here=Path.cwd())
    assert is_refusal(
        ddiff(*EXPORT, target), "export", "run" if "vocabulary" in target else "checkpoint"
    )
    assert files(Path()) == before


def test_export_next_to_the_files_of_a_run_is_allowed(run_dir: Path, ddiff: Command) -> None:
    assert ddiff(*EXPORT, "runs/tiny/weights.safetensors").code == 0
    assert load_file("runs/tiny/weights.safetensors")
    assert ddiff("sample", "runs/tiny", "--count", "1").code == 0


ADDRESSES = {
    "a scheme of nobody's": "foo://x/{name}",
    "a scheme without its library": "gs://bucket/{name}",
    "a slash short": "s3:/bucket/{name}",
    "under a file": "corpus.txt/{name}",
    "where nobody writes": "/proc/{name}",
    "a name with a NUL": "a\0b/{name}",
}


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("command", ["export", "data", "compare", "eval"])
def test_commands_print_an_error_that_names_an_output_path_that_is_not_writable(
    name: str, command: str, run_dir: Path, ddiff: Command
) -> None:
    call, file = {
        "export": (EXPORT, "w.safetensors"),
        "data": (DATA, "shards"),
        "compare": (COMPARE, "tables"),
        "eval": (("eval", "runs/tiny", "--out"), "e.json"),
    }[command]
    before = files(Path())
    assert is_refusal(ddiff(*call, ADDRESSES[name].format(name=file)), command)
    assert files(Path()) == before
    assert not Path("foo:").exists()
    assert not Path("s3:").exists()
    assert not Path("gs:").exists()


@pytest.mark.skipif(is_root, reason="root may write to read-only folders")
def test_commands_print_an_error_that_names_a_read_only_output_folder(
    run_dir: Path, ddiff: Command
) -> None:
    Path("locked").mkdir(mode=0o555)
    for call in ((*EXPORT, "locked/w.safetensors"), (*DATA, "locked/shards"), (*COMPARE, "locked")):
        assert is_refusal(ddiff(*call), "locked")


def test_export_writes_to_any_fsspec_address(run_dir: Path, ddiff: Command) -> None:
    answer = ddiff(*EXPORT, "memory://exported/w.safetensors")
    assert answer.code == 0, answer.err
    # The file system in memory is shared by all tests of a process, so the folder is not.
    memory = fsspec.filesystem("memory")
    assert [entry.rsplit("/", 1)[-1] for entry in memory.ls("/exported", detail=False)] == [
        "w.safetensors"
    ]
    content = memory.cat_file("/exported/w.safetensors")
    assert ddiff(*EXPORT, "w.safetensors").code == 0
    assert Path("w.safetensors").read_bytes() == content
    memory.rm("/exported", recursive=True)
    assert sorted(path.name for path in Path().iterdir()) == [
        "corpus.txt",
        "runs",
        "tiny.toml",
        "w.safetensors",
    ]


def test_export_replaces_only_files_of_an_export(run_dir: Path, ddiff: Command) -> None:
    assert ddiff(*EXPORT, "w.safetensors").code == 0
    assert ddiff(*EXPORT, "w.safetensors").code == 0
    own = Path(STEP, "model.safetensors").read_bytes()
    for content in (own, b"precious", b"", b"\xff" * 64):
        Path("mine.safetensors").write_bytes(content)
        assert is_refusal(
            ddiff(*EXPORT, "mine.safetensors"), "mine.safetensors", "did not write this file"
        )
        assert Path("mine.safetensors").read_bytes() == content


def test_export_onto_a_folder_is_refused(run_dir: Path, ddiff: Command) -> None:
    Path("w.safetensors").mkdir()
    assert is_refusal(ddiff(*EXPORT, "w.safetensors"), "is a folder")
    assert list(Path("w.safetensors").iterdir()) == []


def test_export_creates_folders_and_leaves_no_partial_file(
    run_dir: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ddiff(*EXPORT, "new/deep/w.safetensors").code == 0

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    before = files(Path())
    monkeypatch.setattr("ddiff.checkpoint.dcp_storage.write_tensors", fail)
    for name in ("new/deep/w.safetensors", "new/deep/other.safetensors"):
        assert is_refusal(ddiff(*EXPORT, name), "Input/output error")
    assert files(Path()) == before


def test_python_functions_check_output_paths_like_commands(run_dir: Path) -> None:
    with pytest.raises(ArgumentError, match="without its second slash"):
        export_run(run_dir, Path("s3://bucket/w.safetensors"))
    with pytest.raises(ArgumentError, match="checkpoint"):
        export_run(run_dir, Path(STEP) / "model.safetensors")


def test_data_with_option_out_does_not_overwrite_existing_files(
    run_dir: Path, ddiff: Command
) -> None:
    Path("mine").mkdir()
    Path("mine/tokenizer.json").write_text("precious")
    Path("file").write_text("precious")
    before = files(Path())
    assert is_refusal(ddiff(*DATA, "mine"), "mine", "tokenizer.json")
    assert is_refusal(ddiff(*DATA, "file"), "file")
    assert is_refusal(ddiff(*DATA, "runs/tiny/checkpoints/shards"), "checkpoints")
    assert files(Path()) == before


def test_data_command_with_option_out_resumes_an_interrupted_copy(
    run_dir: Path, ddiff: Command
) -> None:
    assert ddiff(*DATA, "shards").code == 0
    whole = files(Path("shards"))
    Path("shards/manifest.json").unlink()
    assert ddiff(*DATA, "shards").code == 0
    assert files(Path("shards")) == whole
    assert ddiff(*DATA, "memory://shards").code == 0
    assert not [name for name in whole if "partial" in name]


def test_compare_with_option_out_replaces_only_tables_that_compare_wrote(
    run_dir: Path, ddiff: Command
) -> None:
    assert ddiff(*COMPARE, "tables").code == 0
    assert ddiff(*COMPARE, "tables").code == 0
    table = Path("tables/compare.md").read_text()
    for name in ("compare.md", "compare.json"):
        kept = Path("tables", name).read_text()
        Path("tables", name).write_text("my notes")
        before = files(Path("tables"))
        assert is_refusal(ddiff(*COMPARE, "tables"), name)
        assert files(Path("tables")) == before
        Path("tables", name).write_text(kept)
    assert table.startswith("`ddiff compare")
    assert is_refusal(ddiff(*COMPARE, "runs/tiny/checkpoints"), "checkpoints")
    assert is_refusal(ddiff(*COMPARE, "corpus.txt"), "corpus.txt")
    assert json.loads(Path("tables/compare.json").read_text())["rows"]


def test_failed_write_leaves_the_old_file(folder: Path) -> None:
    Path("a.json").write_text("old")
    place = check_destination("a.json", "test")

    def fill(file: object) -> None:
        raise ValueError("no")

    with pytest.raises(ArgumentError, match=r"a\.json"):
        write_file(place, fill)
    assert Path("a.json").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "corpus.txt", "tiny.toml"]


@pytest.mark.parametrize("tilde", ["~/out.safetensors"])
def test_output_paths_expand_the_home_directory(tilde: str, run_dir: Path, ddiff: Command) -> None:
    Path(os.environ["HOME"]).mkdir()
    assert ddiff(*EXPORT, tilde).code == 0
    assert (Path.home() / "out.safetensors").is_file()
    assert api.load(run_dir)
