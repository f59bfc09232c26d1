"""Upload to and download from the hub, with stand-ins for the library that makes the requests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, is_refusal

import ddiff as api
from ddiff import ArgumentError, DataError

TOKEN = "hf_secret"


class FakeHub:
    """Stand-in for `huggingface_hub.HfApi`, which copies uploaded folders to `root`."""

    root: Path
    calls: list[tuple[str, Mapping[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"name": name, **options}))

    def create_branch(self, name: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"name": name, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        self.calls.append(("upload_folder", {"name": repo_id, **options}))
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub/{repo_id}/commit/1"


class OfflineHub(FakeHub):
    """Hub without a connection, whose error message has the token."""

    def create_repo(self, name: str, **options: Any) -> None:
        raise ConnectionError(f"no route to the hub with the token {self.token}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    """Replace the upload and the download of the library; files are in `hub.root`."""

    def download(name: str, revision: str | None = None, allow_patterns: Any = ()) -> str:
        assert "*.py" not in allow_patterns
        FakeHub.calls.append(("download", {"name": name, "revision": revision}))
        if not (FakeHub.root / name).is_dir():
            raise OSError(f"repository {name} not found")
        return str(FakeHub.root / name)

    FakeHub.root = tmp_path / "hub"
    FakeHub.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return FakeHub


def test_pushed_run_is_loaded_from_the_hub(place: Path, hub: type[FakeHub]) -> None:
    run = api.load("runs/flat")
    pushed = run.push_to_hub("owner/tiny", message="first")
    assert pushed.url == "https://hub/owner/tiny/commit/1"
    created, uploaded = hub.calls
    assert created == (
        "create_repo",
        {"name": "owner/tiny", "private": True, "exist_ok": True, "repo_type": "model"},
    )
    assert uploaded[1]["commit_message"] == "first"
    sizes = {
        path.relative_to(hub.root / "owner/tiny").as_posix(): path.stat().st_size
        for path in (hub.root / "owner/tiny").rglob("*")
        if path.is_file()
    }
    assert sizes == dict(pushed.files)
    loaded = api.load("hf://owner/tiny@v1")
    assert hub.calls[2] == ("download", {"name": "owner/tiny", "revision": "v1"})
    own, theirs = run.denoiser.state_dict(), loaded.denoiser.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert loaded.sample(1, seed=7) == run.sample(1, seed=7)


def test_push_to_a_public_branch(place: Path, hub: type[FakeHub]) -> None:
    api.load("runs/flat").push_to_hub("owner/tiny", private=False, revision="v2")
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1]["private"] is False
    assert hub.calls[2][1]["revision"] == "v2"


def test_dry_run_lists_files_and_makes_no_request(
    place: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    code, out, _ = ddiff("export", "runs/flat", "--push", "owner/tiny", "--dry-run")
    assert code == 0
    first, *listed = out.splitlines()
    assert first == (
        "owner/tiny: the trained weights of step 2 of runs/flat would be uploaded (dry run)"
    )
    size = Path("saved/flat/model.safetensors").stat().st_size
    assert [line.split() for line in listed].count(["model.safetensors", f"{size:,}", "bytes"]) == 1
    assert len(listed) == len([path for path in Path("saved/flat").rglob("*") if path.is_file()])


def test_failed_push_names_the_cause_without_the_token(
    place: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", OfflineHub)
    with pytest.raises(DataError, match=r"no route to the hub with the token \*\*\*") as caught:
        api.load("runs/flat").push_to_hub("owner/tiny", token=TOKEN)
    assert TOKEN not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "owner/", "own er/tiny"])
def test_push_refuses_invalid_names(place: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="the name must be OWNER/NAME"):
        api.load("runs/flat").push_to_hub(name, dry_run=True)


def test_load_of_a_missing_repository_is_refused(place: Path, hub: type[FakeHub]) -> None:
    with pytest.raises(DataError, match="cannot be downloaded from the hub"):
        api.load("hf://owner/missing")


def test_export_refuses_options_that_do_not_fit(place: Path, ddiff: Command) -> None:
    assert is_refusal(ddiff("export", "runs/flat"), "expected the output file")
    assert is_refusal(ddiff("export", "runs/flat", "x", "--dry-run"), "--dry-run needs --push")
    both = ddiff("export", "runs/flat", "x", "--push", "owner/tiny")
    assert is_refusal(both, "got the output x, too")
    other = ddiff("export", "runs/flat", "--push", "owner/tiny", "--format", "mdlm")
    assert is_refusal(other, "--push uploads the format hf")
