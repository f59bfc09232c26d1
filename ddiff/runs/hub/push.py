"""Upload of a saved model to the Hugging Face hub: `run.push_to_hub`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddiff import __version__
from ddiff.data.pretrained import first_line
from ddiff.errors import ArgumentError, DataError
from ddiff.progress import show_activity
from ddiff.runs.hub.save import save_pretrained

if TYPE_CHECKING:
    from ddiff.runs.run import Run

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class PushedModel:
    """Result of an upload.

    Attributes:
        name: name of the repository, OWNER/NAME.
        url: address of the commit; None after a dry run.
        files: size in bytes of each file, by its path in the repository.
        weights: uploaded weights, "ema" or "trained".
        step: training step of the weights.
        local_paths: keys of the uploaded recipe with paths of this machine.
    """

    name: str
    url: str | None
    files: Mapping[str, int]
    weights: str
    step: int
    local_paths: tuple[str, ...] = ()


def push_to_hub(
    run: Run,
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> PushedModel:
    """Save a run and upload the folder to the hub; `Run.push_to_hub` explains the arguments.

    Raises ArgumentError for an invalid name or a run that cannot be saved, and DataError, which
    names the cause, if the upload fails.
    """
    check_name(name)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        saved = save_pretrained(run, folder)
        url = None
        if not dry_run:
            message = message or f"Upload step {saved.step}, saved by ddiff {__version__}"
            with show_activity(f"uploading to {name}"):
                url = _upload(folder, name, private, revision, message, token)
    return PushedModel(name, url, saved.files, saved.weights, saved.step, saved.local_paths)


def check_name(name: str) -> None:
    """Raise ArgumentError unless `name` can be the name of a repository, OWNER/NAME."""
    if not _NAME.fullmatch(name):
        raise ArgumentError(
            f"push_to_hub: the name must be OWNER/NAME, of letters, digits, '-', '_' and '.'; got "
            f"{name!r}. Use your user name or organization as OWNER."
        )


def _upload(
    folder: Path,
    name: str,
    private: bool,
    revision: str | None,
    message: str,
    token: str | None,
) -> str:
    """Create the repository if necessary, upload the folder, and return the commit's address."""
    # Imported here, because only this function needs the network.
    from huggingface_hub import HfApi

    try:
        api: Any = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message=message,
            revision=revision,
            repo_type="model",
        )
    except Exception as error:  # the library has many error classes
        reason = first_line(error)
        if token:
            reason = reason.replace(token, "***")
        # `from None`: the traceback of the library could show the token.
        raise DataError(
            f"push_to_hub: the upload to {name!r} failed ({reason}). Check the connection, the "
            "name, and that the token may write (`hf auth login`, or the argument token). "
            f"`--dry-run` lists the files without a connection."
        ) from None
    return str(commit)
