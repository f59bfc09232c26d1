"""Unusual environment variables, encodings and standard outputs of a command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refusal, run_command

from ddiff import ArgumentError, Cache, DataError, PluginError
from ddiff.cli.output import escape
from ddiff.data.cache import default_root
from ddiff.distributed.launcher import check_address, get_rank_info
from ddiff.errors import explain_error

COMMAND = [sys.executable, "-m", "ddiff"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK, which torchrun sets, must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE, which torchrun sets, must be an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be less than WORLD_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""},
            "LOCAL_RANK, which torchrun sets, must be an integer",
        ),
    ],
)
def test_commands_refuse_invalid_rank_environment_variables(
    variables: dict, expected: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=expected):
        get_rank_info()
    assert expected in refusal(run_command(capsys, "recipes"))


@pytest.mark.parametrize("port", [None, "abc", "0", "70000", "-1"])
def test_check_address_refuses_an_invalid_master_port(
    port: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if port is not None:
        monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ArgumentError, match="MASTER_PORT"):
        check_address()


def test_cache_folder_must_be_local_and_tilde_is_expanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", "~/elsewhere")
    assert default_root() == Path.home() / "elsewhere"
    monkeypatch.setenv("DDIFF_CACHE", "s3://bucket/cache")
    with pytest.raises(DataError, match="must be a local folder"):
        Cache()


@pytest.mark.parametrize("cache", ["/dev/null", "/dev/null/x", "/proc/x"])
def test_commands_print_an_error_that_names_an_unwritable_cache_folder(
    cache: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", cache)
    assert cache in refusal(run_command(capsys, "run", "tiny.toml"))
    assert not Path("runs").exists()


def test_unknown_wandb_mode_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ddiff_core.trackers import WeightsAndBiases

    monkeypatch.setenv("WANDB_MODE", "abc")
    with pytest.raises(PluginError, match="WANDB_MODE"):
        WeightsAndBiases.build(WeightsAndBiases.Config(), run_dir=str(tmp_path), recipe={})


def test_unencodable_characters_are_written_as_toml_escapes() -> None:
    import codecs
    import tomllib

    codecs.register_error("ddiff-test", escape)
    written = 'name = "é😀"'.encode("ascii", "ddiff-test").decode("ascii")
    assert tomllib.loads(written) == {"name": "é😀"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_printed_samples_are_json_in_every_encoding_of_stdout(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddiff.runs.stages import _writes_unicode

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    text = json.dumps({"text": "é😀"}, ensure_ascii=not _writes_unicode())
    print(text, flush=True)
    assert json.loads(out.buffer.getvalue().decode(encoding)) == {"text": "é😀"}


def test_closed_or_full_stdout_ends_a_command_without_a_traceback() -> None:
    shell = f"{' '.join(COMMAND)} recipes"
    for redirected, codes in (
        (f"{shell} >&-", (0,)),
        (f"{shell} > /dev/full", (2,)),
        (f"{shell} 2>&-", (0,)),
    ):
        done = subprocess.run(["bash", "-c", redirected], capture_output=True, text=True)
        assert done.returncode in codes, (redirected, done.stderr)
        assert "Traceback" not in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "recipes"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EOFError(), "ended too early"),
        (RecursionError("maximum"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UTF-8"),
        (OverflowError("int too large"), "too large"),
        (MemoryError(), "Out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "Out of memory",
        ),
        (RuntimeError("Storage size calculation overflowed"), "too large"),
        (RuntimeError("can't start new thread"), "cannot start another thread"),
        (
            IsADirectoryError(21, "Is a directory", "x"),
            "Is a directory: x. This path must be a file",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            "Permission denied: x. Change its permissions",
        ),
        (OSError(28, "No space left on device"), "Free disk space"),
        (ConnectionError("gone"), "gone"),
    ],
)
def test_explain_error_turns_python_and_torch_errors_into_advice(
    error: BaseException, expected: str, monkeypatch, capsys
) -> None:
    assert expected in str(explain_error(error))

    def broken() -> None:
        raise error

    monkeypatch.setattr("ddiff.recipe.files.find_shipped_recipes", broken)
    assert expected in refusal(run_command(capsys, "recipes"))


def test_internal_error_prints_a_traceback_and_asks_for_a_report(monkeypatch, capsys) -> None:
    monkeypatch.setattr("ddiff.recipe.files.find_shipped_recipes", lambda: 1 / 0)
    code, _, err = run_command(capsys, "recipes")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Please report it" in err


def test_traceback_of_a_user_error_is_shown_on_request(monkeypatch, capsys) -> None:
    monkeypatch.setenv("DDIFF_TRACEBACK", "1")
    code, _, err = run_command(capsys, "run", "nowhere.toml")
    assert code == 2
    assert "Traceback" in err
