"""Python code and pickles of a tokenizer or model repository are never run."""

from __future__ import annotations

import base64
import builtins
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddiff_hf.backbone import load_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ddiff.clustering.files import load_model_embeddings
from ddiff.data.pretrained import load_pretrained
from ddiff.data.tokenizer import PretrainedTokenizer, load_tokenizer
from ddiff.errors import DataError, DdiffError

VOCABULARY = {"[UNK]": 0, "</s>": 1, "cat": 2, "dog": 3}
AUTO_MAPS = {
    "AutoTokenizer": ["custom.Custom", "custom.Custom"],
    "AutoConfig": "custom.Custom",
    "AutoModel": "custom.Custom",
}


@pytest.fixture(autouse=True)
def no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        pytest.fail("there was a prompt on the terminal")

    monkeypatch.setattr(builtins, "input", fail)


@pytest.fixture
def custom_code(tmp_path: Path) -> str:
    marker = str(tmp_path / "HAS_RUN")
    return f"open({marker!r}, 'w').close()\nfrom transformers import BertModel as Custom\n"


def edit_json(folder: Path, file: str, **keys: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | keys))


@pytest.fixture
def tokenizer_folder(tmp_path: Path, custom_code: str) -> Path:
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(folder)
    (folder / "custom.py").write_text(custom_code)
    return folder


@pytest.fixture
def model_folder(tmp_path: Path, custom_code: str) -> Path:
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    folder = tmp_path / "model"
    BertModel(config).save_pretrained(folder)
    (folder / "custom.py").write_text(custom_code)
    return folder


@pytest.mark.parametrize("named", [{}, {"tokenizer_class": "Custom"}, {"tokenizer_class": None}])
@pytest.mark.parametrize("form", ["pair", "list"])
def test_from_pretrained_refuses_a_tokenizer_with_custom_code(
    tokenizer_folder: Path, tmp_path: Path, named: dict[str, Any], form: str
) -> None:
    auto_map: Any = {"AutoTokenizer": AUTO_MAPS["AutoTokenizer"]}
    edit_json(
        tokenizer_folder,
        "tokenizer_config.json",
        auto_map=auto_map if form == "pair" else auto_map["AutoTokenizer"],
        **named,
    )
    with pytest.raises(DataError, match=r"tokenizer'.*auto_map.*runs no code") as caught:
        PretrainedTokenizer.from_pretrained(str(tokenizer_folder))
    assert str(tokenizer_folder) in str(caught.value)
    assert not (tmp_path / "HAS_RUN").exists()


def test_error_about_saved_tokenizer_with_custom_code_names_its_path(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    edit_json(
        tokenizer_folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": AUTO_MAPS["AutoTokenizer"]},
    )
    files = {
        file.name: base64.b64encode(file.read_bytes()).decode()
        for file in tokenizer_folder.iterdir()
    }
    path = tmp_path / "run" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"kind": "pretrained", "files": files}))
    with pytest.raises(DataError, match=r"run/tokenizer\.json'.*auto_map") as caught:
        load_tokenizer(str(path))
    assert "/tmp/tmp" not in str(caught.value)
    assert not (tmp_path / "HAS_RUN").exists()


READERS = {
    "backbone": load_model,
    "architecture only": lambda path: load_model(path, pretrained=False),
    "embeddings": lambda path: load_model_embeddings(path, 8),
}


@pytest.mark.parametrize("reader", READERS)
def test_model_of_unknown_type_with_custom_code_is_refused(
    model_folder: Path, tmp_path: Path, reader: str
) -> None:
    edit_json(model_folder, "config.json", model_type="custom", auto_map=AUTO_MAPS)
    with pytest.raises(DataError, match=r"model'.*auto_map.*runs no code"):
        READERS[reader](str(model_folder))
    assert not (tmp_path / "HAS_RUN").exists()


@pytest.mark.parametrize("reader", READERS)
def test_model_of_known_type_loads_the_library_class_with_a_warning(
    model_folder: Path, tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(model_folder, "config.json", auto_map=AUTO_MAPS)
    READERS[reader](str(model_folder))
    assert "custom Python code (auto_map), which ddiff does not run" in caplog.text
    assert not (tmp_path / "HAS_RUN").exists()


class FileOnUnpickling:
    """Object that creates a file when it is unpickled, which shows that its code was run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("content", ["pickle", "torch", "junk", "nothing"])
@pytest.mark.parametrize("reader", ["backbone", "embeddings"])
def test_pickled_weights_with_code_raise_data_error(
    model_folder: Path, tmp_path: Path, reader: str, content: str
) -> None:
    (model_folder / "model.safetensors").unlink()
    weights, running = (
        model_folder / "pytorch_model.bin",
        FileOnUnpickling(str(tmp_path / "HAS_RUN")),
    )
    if content == "torch":
        torch.save({"weight": running}, weights)
    else:
        weights.write_bytes(
            {"pickle": pickle.dumps(running), "junk": b"junk", "nothing": b""}[content]
        )
    with pytest.raises(DataError, match=r"model'.*pytorch_model\.bin"):
        READERS[reader](str(model_folder))
    assert not (tmp_path / "HAS_RUN").exists()


DAMAGES = {
    "config.json": [
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"model_type": 3}',
        b'{"model_type": "bert", "hidden_size": "x"}',
    ],
    "model.safetensors": [b"", b"junk", b"\xff" * 40],
}


@pytest.mark.parametrize("reader", ["backbone", "embeddings"])
@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file in DAMAGES for content in DAMAGES[file]]
)
def test_damaged_model_files_raise_data_error(
    model_folder: Path, reader: str, file: str, content: bytes
) -> None:
    (model_folder / file).write_bytes(content)
    with pytest.raises(
        DataError, match="No model from .*model'" if content else "model.safetensors"
    ):
        READERS[reader](str(model_folder))


def test_model_embeddings_refuse_nan(model_folder: Path) -> None:
    model = BertModel.from_pretrained(model_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[2, 3] = float("nan")
    model.save_pretrained(model_folder)
    with pytest.raises(DataError, match="NaN"):
        load_model_embeddings(str(model_folder), 8)


def test_load_pretrained_does_not_wrap_errors_of_ddiff() -> None:
    def load(*_: Any, **__: Any) -> None:
        raise DdiffError("as it was")

    with pytest.raises(DdiffError, match="as it was"):
        load_pretrained(load, str(Path.cwd()), "model")


def test_run_command_does_not_prompt_to_run_custom_code(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    edit_json(
        tokenizer_folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": AUTO_MAPS["AutoTokenizer"]},
    )
    setting = f'tokenizer={{kind="pretrained", path="{tokenizer_folder}"}}'
    ended = subprocess.run(
        [sys.executable, "-m", "ddiff", "run", "mdlm_small", "--set", setting],
        input="y\n" * 9,
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "DDIFF_CACHE": str(tmp_path / "cache")},
    )
    assert ended.returncode == 2
    assert "y/N" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert str(tokenizer_folder) in ended.stderr
    assert "runs no code" in ended.stderr
    assert not (tmp_path / "HAS_RUN").exists()
