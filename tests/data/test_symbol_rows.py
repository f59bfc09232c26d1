"""Rows of symbols: rows of one length, shorter rows with a fill symbol, and the bundled names."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

import pytest
from ddiff_core.data import Names, Symbols

from ddiff.data.documents import Documents
from ddiff.data.packing import pack
from ddiff.data.symbol_rows import LONGEST_NAME, load_bundled_names, read_symbol_rows
from ddiff.data.tokenizer import AlphabetTokenizer, load_tokenizer
from ddiff.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def names() -> Documents:
    return load_bundled_names(length=16)


def read_names(documents: Documents) -> tuple[set[str], set[str]]:
    """Return the training and the validation names without fill."""
    parts = (documents.train, documents.validation)
    train, validation = ({text.rstrip(" ") for text in part["text"][:]} for part in parts)
    return train, validation


def write(folder: Path, content: str) -> list[str]:
    (folder / "rows.txt").write_text(content, encoding="utf-8")
    return [str(folder / "rows.txt")]


def paths_of_validation(folder: Path, content: str = "acg\n") -> list[str]:
    (folder / "validation.txt").write_text(content, encoding="utf-8")
    return [str(folder / "validation.txt")]


def test_bundled_names_are_disjoint_in_training_and_validation(names: Documents) -> None:
    train, validation = read_names(names)
    assert len(train) == len(names.train) == 87_285
    assert len(validation) == len(names.validation) == 4_625
    assert not train & validation
    assert {"smith", "mary", "james"} <= train | validation


def test_bundled_names_are_lower_case_letters_then_spaces(names: Documents) -> None:
    for part in (names.train, names.validation):
        for text in part["text"][:]:
            name = text.rstrip(" ")
            assert len(text) == 16
            assert set(name) <= set(ascii_lowercase)
            assert name
    assert names.fill == " "


def test_longest_name_is_the_longest_bundled_name(names: Documents) -> None:
    train, validation = read_names(names)
    assert max(map(len, train | validation)) == LONGEST_NAME


def test_held_out_names_depend_neither_on_length_nor_on_other_names(names: Documents) -> None:
    longer = load_bundled_names(length=20)
    assert read_names(longer) == read_names(names)
    fewer = load_bundled_names(length=16, held_out=0.01)
    assert read_names(fewer)[1] < read_names(names)[1]


@pytest.mark.parametrize("component", [Names.build, Names.preview])
def test_names_component_refuses_rows_too_short_for_a_name(component: object) -> None:
    others = {} if component is Names.preview else {"seed": 0, "cache": None}
    with pytest.raises(ArgumentError, match=r"\[data\] length must be at least 13.*got 12"):
        component(Names.Config(), length=12, **others)  # type: ignore[operator]


def test_names_fill_every_row_with_one_token_per_symbol(names: Documents) -> None:
    tokenizer = AlphabetTokenizer(" abcdefghijklmnopqrstuvwxyz", fill=names.fill)
    rows = pack(names.validation, tokenizer, 16, separate=True)
    assert len(rows) == len(names.validation)
    block = rows[[0]]
    assert block.num_valid.tolist() == [16]
    assert tokenizer.decode(block.ids.tolist()) == names.validation["text"][:1]


def test_read_symbol_rows_refuses_rows_of_another_length(tmp_path: Path) -> None:
    validation = paths_of_validation(tmp_path, "aaaa\n")
    paths = write(tmp_path, "acgt\n\nttga\n")
    documents = read_symbol_rows(paths, validation=validation, length=4)
    assert documents.train["text"] == ["acgt", "ttga"]
    with pytest.raises(DataError, match=r"rows\.txt line 1 has 4 symbols.*length = 5"):
        read_symbol_rows(paths, validation=validation, length=5)
    write(tmp_path, "acgt\n\nttg\n")
    with pytest.raises(DataError, match=r"rows\.txt line 3 has 3 symbols"):
        read_symbol_rows(paths, validation=validation, length=4)


def test_read_symbol_rows_fills_up_shorter_rows(tmp_path: Path) -> None:
    paths = write(tmp_path, "acgt\nac\n\ng\n" + "tt\n" * 20)
    config = Symbols.Config(files=tuple(paths), held_out=0.5, fill="-")
    documents = Symbols.build(config, length=4, seed=0, cache=None)
    rows = documents.train["text"][:] + documents.validation["text"][:]
    assert set(rows) == {"acgt", "ac--", "g---", "tt--"}
    assert documents.fill == "-"


def test_read_symbol_rows_splits_filled_rows_by_the_hash_of_the_line(tmp_path: Path) -> None:
    paths = write(tmp_path, "\n".join(f"r{number}" for number in range(1000, 1200)))
    filled = read_symbol_rows(paths, length=9, held_out=0.3, fill="-")
    plain = read_symbol_rows(paths, length=5, held_out=0.3)
    assert [text.rstrip("-") for text in filled.train["text"]] == plain.train["text"][:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("acgta", r"rows\.txt line 2 has 5 symbols, but a row has length = 4"),
        ("a-c", r"rows\.txt line 2 holds '-', the symbol that fills up shorter rows"),
    ],
)
def test_read_symbol_rows_refuses_rows_that_cannot_be_filled(
    tmp_path: Path, line: str, message: str
) -> None:
    paths = write(tmp_path, f"acgt\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_symbol_rows(paths, validation=paths_of_validation(tmp_path), length=4, fill="-")


def test_alphabet_tokenizer_restores_its_fill_symbol(tmp_path: Path) -> None:
    tokenizer = AlphabetTokenizer.from_texts(["cab"], fill="-")
    assert (tokenizer.tokens(), tokenizer.fill_id) == (["-", "a", "b", "c"], 0)
    tokenizer.save(str(tmp_path / "t.json"))
    restored = load_tokenizer(str(tmp_path / "t.json"))
    assert (restored.fill_id, restored.fingerprint) == (0, tokenizer.fingerprint)
    assert tokenizer.fingerprint != AlphabetTokenizer("-abc").fingerprint


def test_alphabet_tokenizer_refuses_a_fill_that_is_not_a_symbol() -> None:
    with pytest.raises(ArgumentError, match="fill must be one of the 3 symbols; got '-'"):
        AlphabetTokenizer("abc", fill="-")
