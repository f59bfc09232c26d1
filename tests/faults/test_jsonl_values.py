"""Errors for invalid text, labels and vectors name the file and line; prompts are checked too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddiff.cli import main
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.jsonl import read_json_lines
from ddiff.data.packing import pack_texts
from ddiff.data.sources import open_file_source
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import ArgumentError, DataError
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.prompts import encode_infill, encode_prompt, make_templates, read_prompts
from ddiff.runs.run import Run
from ddiff.runs.session import TrainingSession

GOOD = [
    json.dumps({"text": f"line number {number} is here", "y": 0, "v": [0.5, 1.0]})
    for number in range(60)
]
TOKENIZER = BytePairTokenizer.train(["line number is here"], 260)


def read(
    folder: Path, *lines: str, labels: tuple[str, ...] = ("y",), vectors: tuple[str, ...] = ("v",)
) -> Documents:
    (folder / "x.jsonl").write_text("\n".join([*GOOD, *lines]), encoding="utf-8")
    (folder / "v.jsonl").write_text('{"text": "held out"}')
    return read_json_lines(
        [str(folder / "x.jsonl")],
        validation=[str(folder / "v.jsonl")],
        labels=labels,
        vectors=vectors,
    )


BAD: dict[str, tuple[str, str]] = {
    "half a pair": (
        r'{"text": "a \ud800 b"}',
        r"holds half of a surrogate pair at character 2 \(U\+D800\)",
    ),
    "the other half": (
        r'{"text": "\udc00"}',
        r"half of a surrogate pair at character 0 \(U\+DC00\)",
    ),
    "halves in the wrong order": (
        r'{"text": "\ude00\ud83d"}',
        "half of a surrogate pair at character 0",
    ),
    "NUL": (r'{"text": "a\u0000b"}', "holds the NUL character at character 1"),
    "a label of 64 bits": (
        '{"text": "a", "y": 9223372036854775808}',
        'the label "y" must be .* got 9223372036854775808',
    ),
    "a label of 32 digits": (
        '{"text": "a", "y": 1%s}' % ("0" * 31),
        'the label "y" must be an integer in 0',
    ),
    "a label of 5000 digits": (
        '{"text": "a", "y": 1%s}' % ("0" * 5000),
        "is not JSON: it cannot be read",
    ),
    "a label below 0": ('{"text": "a", "y": -1}', 'the label "y"'),
    "a label that is true": ('{"text": "a", "y": true}', "got True"),
    "a label that is 1.0": ('{"text": "a", "y": 1.0}', "got 1.0"),
    "a label by name": ('{"text": "a", "y": "austen"}', "got 'austen'"),
    "a vector of 400 digits": (
        '{"text": "a", "v": [1%s, 1.0]}' % ("0" * 400),
        r"finite and at most 3\.403e\+38",
    ),
    "a vector beyond 32 bits": ('{"text": "a", "v": [1e39, 1.0]}', "finite and at most"),
    "a vector beyond 64 bits": ('{"text": "a", "v": [1e999, 1.0]}', "finite and at most"),
    "a vector with NaN": ('{"text": "a", "v": [NaN, 1.0]}', "finite and at most"),
    "a vector with infinity": ('{"text": "a", "v": [1.0, -Infinity]}', "finite and at most"),
    "a vector of text": ('{"text": "a", "v": ["1"]}', "a list of numbers"),
    "a vector of nothing": ('{"text": "a", "v": []}', "a list of numbers"),
    "a vector of lists": ('{"text": "a", "v": [[1.0]]}', "a list of numbers"),
    "a vector that is long": ('{"text": "a", "v": ["%s"]}' % ("x" * 100_000), "a list of numbers"),
    "deep nesting": (
        '{"text": "a", "z": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "nested too deeply",
    ),
    "deep nesting that is not closed": ('{"text":' + "[" * 100_000 + "}", "nested too deeply"),
    "deep objects": (
        '{"text": "a", "z": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        "nested too deeply",
    ),
    "the text twice": ('{"text": "a", "text": "b"}', 'has the field "text" twice'),
    "a label twice": ('{"text": "a", "y": 1, "y": 0}', 'has the field "y" twice'),
    "a number as text": ('{"text": 3}', "is not text but 3"),
    "a long list as text": ('{"text": [%s1]}' % ("1," * 50_000), "is not text but"),
    "no text": ('{"y": 1}', 'has no field "text"'),
    "a string": ('"text"', "must be an object"),
    "a number": ("3", "must be an object"),
    "half a line": ('{"text": "a', "is not JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "is not JSON"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_read_json_lines_raises_an_error_that_names_the_line_of_an_invalid_value(
    tmp_path: Path, kind: str
) -> None:
    line, message = BAD[kind]
    with pytest.raises(DataError, match=rf"x\.jsonl line 61\b.*{message}") as raised:
        read(tmp_path, line)
    assert len(str(raised.value)) < 700
    str(raised.value).encode()  # as when it is printed


@pytest.mark.parametrize(
    "kind", [kind for kind in BAD if not kind.startswith(("a label", "a vector", "no text"))]
)
def test_file_source_raises_an_error_that_names_the_line_of_an_invalid_text(
    tmp_path: Path, kind: str
) -> None:
    line, message = BAD[kind]
    (tmp_path / "x.jsonl").write_text("\n".join([*GOOD, line]), encoding="utf-8")
    message = message.replace("is not text but", "must hold text; it holds")
    with pytest.raises(DataError, match=rf"x\.jsonl line 61\b.*{message}"):
        list(open_file_source([str(tmp_path / "x.jsonl")]).chunks())


def test_read_json_lines_accepts_values_at_the_allowed_limits(tmp_path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    lines = [
        '{"text": "largest label", "y": 9223372036854775807}',
        json.dumps({"text": "largest numbers", "v": [largest, -largest]}),
        r'{"text": "a whole pair \ud83d\ude00", "y": null}',
        '{"text": "other fields", "z": [1e999, NaN], "z": 3, "w": 1%s}' % ("0" * 400),
    ]
    train = read(tmp_path, *lines).train
    assert train["y"][60] == 2**63 - 1
    assert train["v"][61] == [largest, -largest]
    assert train["text"][62] == "a whole pair \U0001f600"
    assert (train["y"][62], train["v"][63]) == (None, None)


NOT_TEXT: dict[str, tuple[Any, str]] = {
    "half a pair": ("\ud800", "half of a surrogate pair at character 0"),
    "an argument that is not UTF-8": (
        "\udcff\udcfe hello",
        "half of a surrogate pair at character 0",
    ),
    "NUL": ("a\0b", "NUL character at character 1"),
    "bytes": (b"She", r"is not text but b'She' \(bytes\)"),
    "a number": (3, "is not text but 3"),
    "nothing": (None, "is not text but None"),
}


@pytest.mark.parametrize("kind", list(NOT_TEXT))
def test_invalid_prompts_and_in_memory_texts_are_refused(kind: str) -> None:
    text, message = NOT_TEXT[kind]
    with pytest.raises(DataError, match=f"text 1.*{message}"):
        documents_from_texts(["fine", text])
    with pytest.raises(DataError, match=message):
        pack_texts([text], TOKENIZER, 8)
    for read_one in (encode_prompt, encode_infill):
        argument = f"{text} [MASK:2]" if isinstance(text, str) else text
        with pytest.raises(ArgumentError, match=message) as raised:
            read_one(argument, TOKENIZER, 32)
        str(raised.value).encode()
    with pytest.raises(ArgumentError, match=message):
        make_templates(["fine", text], None, TOKENIZER, 32)
    if text is not None:
        with pytest.raises(ArgumentError, match=message):
            make_templates(text, None, TOKENIZER, 32)


RECIPE = """
name = "small"
extends = "mdlm_small"
[data]
kind = "markov"
alphabet = 4
rows = 64
validation = 8
length = 8
[tokenizer]
kind = "alphabet"
[denoiser]
width = 16
layers = 1
heads = 2
[train]
steps = 1
batch = 4
warmup = 1
[sample]
steps = 2
count = 1
[evaluate]
batch = 8
rows = 2
draws = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        session = TrainingSession.open(parse_recipe(RECIPE, "small.toml", []))
        session.initialize_weights()
        return session.run


@pytest.mark.parametrize("kind", list(NOT_TEXT))
def test_run_methods_refuse_invalid_text(run: Run, kind: str) -> None:
    text, message = NOT_TEXT[kind]
    with pytest.raises(DataError, match=f"run.nelbo: text 0.*{message}"):
        run.nelbo([text])
    if text is not None:
        with pytest.raises(ArgumentError, match=message):
            run.sample(prompt=text)
        with pytest.raises(ArgumentError, match=message):
            run.sample(prompt=[text])
        with pytest.raises(ArgumentError):
            run.sample(infill=text)


@pytest.mark.parametrize("texts", ["acgt", b"acgt", {"a": 1}, 3, None])
def test_run_nelbo_requires_a_list_of_texts(run: Run, texts: Any) -> None:
    with pytest.raises(ArgumentError, match="must be a list of str"):
        run.nelbo(texts)


PROMPT_FILES: dict[str, tuple[bytes, str]] = {
    "UTF-16": ("She\n".encode("utf-16"), "UTF-16"),
    "Windows-1252": (b"caf\xe9\n", "0xe9 at offset 3"),
    "NUL": (b"a\0b\n", "NUL"),
    "packed": (b"\x1f\x8b\x08" + b"x" * 20, "gzip"),
    "blank": (b" \n\t\r\n", "contains no prompt"),
    "empty": (b"", "contains no prompt"),
}


@pytest.mark.parametrize("kind", list(PROMPT_FILES))
def test_read_prompts_decodes_prompt_files_in_the_same_way_as_data_files(
    tmp_path: Path, kind: str
) -> None:
    content, message = PROMPT_FILES[kind]
    (tmp_path / "p[1].txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"--prompts: \S*p\[1\]\.txt.*{message}"):
        read_prompts(tmp_path / "p[1].txt")
    (tmp_path / "p[1].txt").write_bytes("\ufeffone\rtwo\u2028still two\r\n \r\r\nthree".encode())
    assert read_prompts(tmp_path / "p[1].txt") == ["one", "two\u2028still two", "three"]
    with pytest.raises(DataError, match=r"--prompts: .*cannot be read"):
        read_prompts(tmp_path)


@pytest.mark.slow
def test_sample_command_refuses_a_prompt_that_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    Path("small.toml").write_text(RECIPE)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "small.toml"])
    capsys.readouterr()
    for option, text in (("--prompt", "\udcff\udcfe hello"), ("--infill", "\udcff [MASK:2]")):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", "runs/small", option, text])
        output = " ".join(capsys.readouterr().err.split())
        assert stopped.value.code == 2
        assert "half of a surrogate pair at character 0" in output
        assert "Traceback" not in output
