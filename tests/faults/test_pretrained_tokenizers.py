"""Pretrained tokenizers that have unused ids, have no unknown token, or are damaged."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ddiff.data.documents import documents_from_texts
from ddiff.data.packing import pack
from ddiff.data.shards import write_shards
from ddiff.data.tokenizer import (
    MOST_TOKENS,
    AlphabetTokenizer,
    BytePairTokenizer,
    PretrainedTokenizer,
    UnknownWord,
    load_tokenizer,
)
from ddiff.data.tokenizer_workers import Chunk, encode_chunks
from ddiff.errors import DataError

HOLES = {"[UNK]": 0, "</s>": 1, "cat": 10, "dog": 12, "mat": 14}
WHOLE = {"[UNK]": 0, "</s>": 1, "cat": 2, "dog": 3}


def fast(model: Any) -> Tokenizer:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def save(folder: Path, made: Tokenizer, **roles: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)
    return folder


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    model = models.WordLevel(HOLES, unk_token="[UNK]")
    return save(tmp_path / "holes", fast(model), unk_token="[UNK]", eos_token="</s>")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    model = models.WordLevel(WHOLE, unk_token="[UNK]")
    return save(tmp_path / "whole", fast(model), unk_token="[UNK]", eos_token="</s>")


def test_pretrained_num_tokens_is_the_highest_id_plus_one(holes: Path) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(str(holes))
    assert tokenizer.num_tokens == 15
    assert tokenizer.encode(["cat dog mat cow"]) == [[10, 12, 14, 0]]
    packed = pack(documents_from_texts(["cat dog", "mat"]), tokenizer, 5)
    assert packed[[0]].ids.tolist() == [[10, 12, 1, 14, 1]]


def test_unused_tokenizer_ids_have_unique_names_and_empty_text(holes: Path) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(str(holes))
    assert len(set(tokenizer.tokens())) == 15
    assert [tokenizer.tokens()[number] for number in HOLES.values()] == list(HOLES)
    assert set(tokenizer.special_ids) == set(range(15)) - {10, 12, 14}
    assert tokenizer.decode([[10, 3, 12], [3]]) == ["cat dog", ""]


def test_pretrained_tokenizer_keeps_unused_ids_after_save_and_load(
    holes: Path, tmp_path: Path
) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(str(holes))
    tokenizer.save(str(tmp_path / "t.json"))
    again = load_tokenizer(str(tmp_path / "t.json"))
    assert (again.num_tokens, again.tokens()) == (15, tokenizer.tokens())
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"cat": 0, "dog": 1}),
        models.WordPiece({"cat": 0, "dog": 1}),
        models.Unigram([(letter, -1.0) for letter in "catdog"]),
        models.BPE({letter: number for number, letter in enumerate("catdg" + "o")}, []),
    ],
    ids=["WordLevel", "WordPiece", "Unigram", "BPE"],
)
def test_pretrained_encode_raises_an_error_that_names_the_row_and_unknown_word(
    model: Any, tmp_path: Path
) -> None:
    """The tokenizers library drops unknown letters silently, or raises a plain Exception."""
    tokenizer = PretrainedTokenizer.from_pretrained(str(save(tmp_path / "d", fast(model))))
    assert len(tokenizer.encode(["cat dog"])[0]) > 1
    with pytest.raises(UnknownWord, match=r"Row 1 holds '(zebu|[zebu])'.*unknown") as caught:
        tokenizer.encode(["cat dog", "cat zebu dog"])
    assert (caught.value.row, caught.value.word in ("zebu", *"zebu")) == (1, True)
    chunks = [Chunk(["cat"] * 3, names=["a"] * 3), Chunk(["dog", "zebu"], names=["b.txt", "c.txt"])]
    with pytest.raises(DataError, match=r"Row 4 \(c.txt\) holds"):
        list(encode_chunks(chunks, tokenizer))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(["cat dog"]) == tokenizer.encode(
        ["cat dog"]
    )


def test_encode_chunks_in_workers_raises_an_error_that_names_the_row_of_an_unknown_word(
    tmp_path: Path,
) -> None:
    letters = models.BPE({letter: number for number, letter in enumerate("catdgo")}, [])
    tokenizer = PretrainedTokenizer.from_pretrained(str(save(tmp_path / "d", fast(letters))))
    chunks = [Chunk(["cat"] * 3, names=["a"] * 3), Chunk(["dog", "zebu"], names=["b.txt", "c.txt"])]
    with pytest.raises(DataError, match=r"Row 4 \(c.txt\) holds"):
        list(encode_chunks(chunks, tokenizer, workers=2))


def test_byte_level_bpe_refuses_text_with_bytes_that_have_no_token(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PretrainedTokenizer.from_pretrained(str(save(tmp_path / "d", made)))
    assert tokenizer.encode(["ab ba"]) == [[0, 1, 2, 1, 0]]
    with pytest.raises(UnknownWord):
        tokenizer.encode(["abc"])


@pytest.mark.parametrize(
    "tokenizer",
    [BytePairTokenizer.train(["a b"], 257), AlphabetTokenizer("ab")],
    ids=["bytes", "alphabet"],
)
def test_tokenizers_refuse_a_lone_surrogate_and_name_its_row(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="Row 1"):
        tokenizer.encode(["ab", "a\ud800b"])
    with pytest.raises(DataError, match=r"Row 1.*surrogate"):
        BytePairTokenizer.train(["ab", "a\udc80"], 300)


def test_pretrained_tokenizer_refuses_an_empty_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has an empty vocabulary"):
        PretrainedTokenizer.from_pretrained(str(save(tmp_path / "d", fast(models.WordLevel({})))))


def test_pretrained_tokenizer_refuses_ids_above_the_limit(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", fast(models.WordLevel({"cat": 0, "dog": MOST_TOKENS})))
    with pytest.raises(DataError, match=f"2 tokens with ids up to {MOST_TOKENS}"):
        PretrainedTokenizer.from_pretrained(str(folder))


def test_pretrained_encode_adds_no_special_tokens_and_neither_truncates_nor_pads(
    tmp_path: Path,
) -> None:
    from tokenizers.processors import TemplateProcessing

    made = fast(models.WordLevel(WHOLE, unk_token="[UNK]"))
    made.post_processor = TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(2)
    made.enable_padding(length=4)
    folder = save(tmp_path / "d", made, unk_token="[UNK]", eos_token="</s>", pad_token="[UNK]")
    tokenizer = PretrainedTokenizer.from_pretrained(str(folder))
    assert tokenizer.encode(["cat cat cat", "dog"]) == [[2, 2, 2], [3]]


def test_write_shards_warns_of_a_tokenizer_that_loses_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = fast(models.WordLevel(WHOLE, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    tokenizer = PretrainedTokenizer.from_pretrained(
        str(save(tmp_path / "d", made, unk_token="[UNK]"))
    )
    write_shards(tmp_path / "s", lambda _: [Chunk(["cat dog"], 1)], tokenizer, source={})
    assert "is decoded as" not in caplog.text
    write_shards(tmp_path / "t", lambda _: [Chunk(["cat Dog"], 1)], tokenizer, source={})
    assert "'cat Dog' is decoded as 'cat dog'" in caplog.text


DAMAGES = {
    "tokenizer.json": [
        '{"version": "1.0", "trun',
        "[1, 2]",
        "3",
        '{"version": "1.0", "model": 3}',
        "\udcff",
    ],
    "tokenizer_config.json": ['{"a', "[1]", '{"tokenizer_class": 3}', '{"eos_token": 3}', '"x"'],
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, text) for file in DAMAGES for text in DAMAGES[file]]
)
def test_from_pretrained_raises_data_error_for_damaged_files(
    whole: Path, file: str, content: str
) -> None:
    (whole / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"No tokenizer from .*whole") as caught:
        PretrainedTokenizer.from_pretrained(str(whole))
    if content in ('{"version": "1.0", "trun', "[1, 2]", '{"a', "[1]"):
        assert f"its file {file} is damaged" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("spiece.model", "sentencepiece"),
        ("tokenizer.model", "sentencepiece"),
        ("tiktoken.model", "tiktoken"),
    ],
)
def test_from_pretrained_raises_an_error_that_names_a_missing_package(
    whole: Path, file: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole / "tokenizer.json").unlink()
    (whole / file).write_bytes(b"xx")
    (whole / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == package else find(name, *more),
    )
    with pytest.raises(
        DataError, match=f"needs the package {package}, which is not installed.*pip install"
    ):
        PretrainedTokenizer.from_pretrained(str(whole))


def test_load_tokenizer_raises_an_error_that_names_a_huggingface_tokenizer_json(
    whole: Path,
) -> None:
    file = whole / "tokenizer.json"
    with pytest.raises(
        DataError, match=r"tokenizers library \(HuggingFace\).*\"pretrained\".*whole\""
    ):
        load_tokenizer(str(file))
    with pytest.raises(DataError, match=r"tokenizers library \(HuggingFace\).*whole\""):
        PretrainedTokenizer.from_pretrained(str(file))


def test_from_pretrained_recognizes_a_tokenizer_saved_by_ddiff(tmp_path: Path) -> None:
    BytePairTokenizer.train(["a b"], 257).save(str(tmp_path / "run" / "tokenizer.json"))
    for place in ("run", "run/tokenizer.json"):
        with pytest.raises(DataError, match=r'a tokenizer saved by ddiff.*"saved"'):
            PretrainedTokenizer.from_pretrained(str(tmp_path / place))


@pytest.mark.parametrize("source", ["/no/such/folder", "./no", "../no", "no/such/folder", "", " "])
def test_from_pretrained_makes_no_request_for_a_missing_local_path(source: str) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        PretrainedTokenizer.from_pretrained(source)


@pytest.mark.parametrize("change", ["kind", "hole", "eos", "files", "base64"])
def test_load_tokenizer_refuses_a_damaged_file(whole: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / "t.json"
    if change in ("files", "base64"):
        PretrainedTokenizer.from_pretrained(str(whole)).save(str(path))
    else:
        BytePairTokenizer.train(["a b"], 257).save(str(path))
    content = json.loads(path.read_text())
    if change == "kind":
        content["kind"] = ["bytepair"]
    elif change == "files":
        content["files"] = 3
    elif change == "base64":
        content["files"]["tokenizer.json"] = "?" + content["files"]["tokenizer.json"]
    elif change == "hole":
        vocabulary = content["definition"]["model"]["vocab"]
        vocabulary[next(word for word, number in vocabulary.items() if number == 200)] = 300
    else:
        content["definition"]["added_tokens"] = []
        vocabulary = content["definition"]["model"]["vocab"]
        vocabulary["<|end|>"] = vocabulary.pop("<|eos|>")
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"t\.json"):
        load_tokenizer(str(path))


def test_run_trains_on_a_tokenizer_with_unused_ids(
    holes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ddiff

    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("cat dog mat cow\n" * 60)
    Path("b.txt").write_text("cow mat dog cat\n" * 60)
    settings = [
        'data={kind="text", files=["a.txt"], split="line", length=8, validation=["b.txt"]}',
        f'tokenizer={{kind="pretrained", path="{holes}"}}',
        'denoiser={kind="dit", width=16, layers=1, heads=1, time=false, head="tokens"}',
        "train.steps=2",
        "train.batch=4",
        "evaluate.rows=4",
        "sample.count=1",
        "sample.steps=4",
    ]
    run = ddiff.run("mdlm_small", settings=settings)
    assert run.vocabulary.num_tokens == 15
    shutil.rmtree(holes)
    assert ddiff.load(run.run_dir).tokenizer.num_tokens == 15
