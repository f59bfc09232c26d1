"""Every command that reads a damaged .gz file ends with a one-paragraph error naming the file."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from commands import refusal, run_command

TEXT = "\n".join(f"line {number} of words" for number in range(9000)).encode()
RECIPE = """
name = "d"
extends = "mdlm_small"
[data]
kind = "files"
length = 16
files = [{files}]
[tokenizer]
size = 260
"""
FILES = {
    "cut.txt.gz": (gzip.compress(TEXT)[:-200], "cut.txt.gz is truncated"),
    "fake.txt.gz": (TEXT, "fake.txt.gz has the ending of a gzip file"),
    "zeros.txt.gz": (gzip.compress(TEXT)[:100] + bytes(500), "zeros.txt.gz is"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("command", ["run", "data"])
@pytest.mark.parametrize("name", list(FILES))
def test_run_and_data_commands_raise_an_error_that_names_a_damaged_gzip_file(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    content, message = FILES[name]
    (folder / name).write_bytes(content)
    (folder / "good.txt.gz").write_bytes(gzip.compress(TEXT))
    (folder / "g.toml").write_text(RECIPE.format(files=f'"good.txt.gz", "{name}"'))
    output = refusal(run_command(capsys, command, "g.toml"))
    assert message in " ".join(output.split())
    assert not (folder / "runs").exists()


def test_data_kind_text_raises_an_error_that_suggests_kind_files_for_gzip(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "good.txt.gz").write_bytes(gzip.compress(TEXT))
    (folder / "g.toml").write_text(
        RECIPE.format(files='"good.txt.gz"').replace('"files"', '"text"')
    )
    output = refusal(run_command(capsys, "run", "g.toml"))
    assert "first bytes are those of a gzip file" in " ".join(output.split())
    assert 'kind = "files"' in " ".join(output.split())
