"""A run on valid JSON with unusable values ends with an error that names the file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddiff.cli import main

RECIPE = """
name = "odd"
extends = "mdlm_small"
[data]
kind = "{kind}"
files = ["odd.jsonl"]
length = 16
{keys}
[tokenizer]
size = 260
[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
{conditions}
"""
ODD = {
    "half a surrogate pair": (
        '{"text":"\\ud800 bad"}\n' * 99,
        "",
        "odd.jsonl line 1 holds half of a surrogate pair",
    ),
    "deep nesting": ('{"text":' + "[" * 100_000 + "}", "", "odd.jsonl line 1 is nested too deeply"),
    "a label of 32 digits": (
        "\n".join(
            f'{{"text": "t {number}", "l": 10000000000000000000000000000000}}'
            for number in range(99)
        ),
        'labels = ["l"]',
        'odd.jsonl line 1: the label "l" must be an integer in 0',
    ),
    "a label beyond the classes": (
        "\n".join(f'{{"text": "t {number}", "l": {number}}}' for number in range(99)),
        'labels = ["l"]',
        "the label 9",
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "files"])
@pytest.mark.parametrize("name", list(ODD))
def test_run_command_prints_an_error_that_names_file_and_line_of_an_invalid_value(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
) -> None:
    content, keys, message = ODD[name]
    if keys and kind == "files":
        pytest.skip("files have no labels")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    Path("odd.jsonl").write_text(content)
    conditions = "conditions = { l = { classes = 3 } }" if keys else ""
    Path("odd.toml").write_text(RECIPE.format(kind=kind, keys=keys, conditions=conditions))
    with pytest.raises(SystemExit) as stopped:
        main(["run", "odd.toml"])
    output = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2
    assert message in output
    assert "Traceback" not in output
    assert not Path("runs").exists()
