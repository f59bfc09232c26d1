"""Shards of a tokenized corpus: the same bytes for any number of workers and after kills."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import SENTENCE, TOKENIZER, chunks_of, sentences

from ddiff.data.documents import documents_from_texts, split_documents
from ddiff.data.packing import PackedRows, pack, pack_stream
from ddiff.data.shards import Shards, read_shards, write_shards
from ddiff.data.tokenizer import AlphabetTokenizer, BytePairTokenizer
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION, Chunk, encode_chunks
from ddiff.errors import ArgumentError, DataError

TEXTS = sentences(300)
HELD_OUT = 0.2


def build(folder: Path, texts: list[str] = TEXTS, **settings: Any) -> Shards:
    given = {"source": {"texts": len(texts)}, "held_out": HELD_OUT, "shard_tokens": 500} | settings
    return write_shards(folder, chunks_of(texts), TOKENIZER, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read_all(rows: PackedRows) -> tuple[Any, Any, Any]:
    block = rows[:]
    return block.ids.tolist(), block.document.tolist(), block.num_valid.tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build(tmp_path_factory.mktemp("shards"))


def test_shards_give_the_same_rows_as_packing_in_memory(made: Shards) -> None:
    """Train and validation rows and their documents are equal, even across ends of shards."""
    assert len(made.records(TRAIN)) > 5
    direct = split_documents(documents_from_texts(TEXTS), HELD_OUT, "")
    for part, documents, separate in (
        (TRAIN, direct.train, False),
        (VALIDATION, direct.validation, True),
    ):
        for length in (7, 64, 2000):
            rows = pack_stream(made.stream(part), TOKENIZER, length, separate=separate)
            expected = pack(documents, TOKENIZER, length, separate=separate)
            assert read_all(rows) == read_all(expected)
            assert rows.fingerprint == expected.fingerprint
            assert (rows.token_counts() == expected.token_counts()).all()
        assert made.stream(part).num_bytes == sum(len(text.encode()) for text in documents["text"])


def test_rows_read_from_shards_do_not_depend_on_the_reading_order(made: Shards) -> None:
    for part, separate in ((TRAIN, False), (TRAIN, True)):
        rows = pack_stream(made.stream(part), TOKENIZER, 16, separate=separate)
        order = np.random.default_rng(0).permutation(len(rows))
        ids, document, num_valid = (np.array(column) for column in read_all(rows))
        block = rows[order]
        assert (block.ids == ids[order]).all()
        assert (block.document == document[order]).all()
        assert (block.num_valid == num_valid[order]).all()
        assert (rows.first_documents() == document[:, 0]).all()
    with pytest.raises(ArgumentError, match="numbers"):
        rows[[len(rows)]]


def test_shards_store_16_bit_ids_and_document_ends(made: Shards) -> None:
    shard = made.stream(TRAIN).shards[0]
    assert (shard.tokens.dtype, shard.ends.dtype) == (np.uint16, np.int64)
    assert len(shard.ends) == shard.record.documents < len(shard.tokens)
    assert isinstance(shard.tokens.base, np.memmap)


@pytest.mark.parametrize("workers", [2, 3])
def test_shard_files_do_not_depend_on_the_number_of_workers(
    made: Shards, tmp_path: Path, workers: int
) -> None:
    build(tmp_path / "many", workers=workers)
    assert contents(tmp_path / "many") == contents(made.folder)


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
from pathlib import Path
from test_shards import TEXTS, build
import ddiff.data.shards as shards
from corpora import chunks_of
wrote, write = 0, shards._write_array
def write_and_die(path, array):
    global wrote
    wrote += 1
    if wrote == {after}:
        path.with_name(path.name + ".partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, array)
shards._write_array = write_and_die
build(Path(sys.argv[1]), workers={workers})
"""


@pytest.mark.parametrize(("after", "workers"), [(1, 1), (8, 1), (11, 2)])
def test_write_shards_resumes_a_killed_build(
    made: Shards, tmp_path: Path, after: int, workers: int
) -> None:
    """The build is killed within a file, between two files of a shard, or between two shards."""
    script = KILLED.format(here=str(Path(__file__).parent), after=after, workers=workers)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "killed")], stderr=subprocess.DEVNULL
    )
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(
        DataError, match="it has no manifest" if after == 1 else "an interrupted build"
    ):
        read_shards(tmp_path / "killed")
    cursors: list[Any] = []

    def chunks(cursor: Any) -> Any:
        cursors.append(cursor)
        return chunks_of(TEXTS)(cursor)

    again = {"source": {"texts": len(TEXTS)}, "held_out": HELD_OUT, "shard_tokens": 500}
    write_shards(tmp_path / "killed", chunks, TOKENIZER, **again)
    assert contents(tmp_path / "killed") == contents(made.folder)
    # The texts of complete shards are not read again.
    assert cursors == [None] if after == 1 else cursors[0] > 0
    write_shards(tmp_path / "killed", chunks, TOKENIZER, **again)
    assert len(cursors) == 1  # finished shards are not built again


def test_copied_shards_give_the_same_rows(made: Shards, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "copy")
    copy = read_shards(tmp_path / "copy")
    copy.verify()
    assert copy.stream(TRAIN).fingerprint == made.stream(TRAIN).fingerprint


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "wide"])
def test_verify_raises_an_error_that_names_the_damaged_shard_file_and_the_remedy(
    made: Shards, tmp_path: Path, damage: str
) -> None:
    copied = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    file = copied / "train_00001.tokens.npy"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
        file.write_bytes(content)
        read_shards(copied).stream(TRAIN)  # the size is right, so only the checksum differs
    elif damage == "cut":
        file.write_bytes(content[:-50])
    elif damage == "missing":
        file.unlink()
    else:
        np.save(file, np.load(file).astype(np.int64))
    with pytest.raises(DataError, match=r"train_00001\.tokens\.npy is damaged.*delete the folder"):
        read_shards(copied).verify()
    if damage != "flipped":
        with pytest.raises(DataError, match=r"train_00001\.tokens\.npy is damaged"):
            read_shards(copied).stream(TRAIN)


def test_shards_refuse_another_tokenizer_and_name_the_difference(made: Shards) -> None:
    other = BytePairTokenizer.train([SENTENCE] * 4, 270)
    with pytest.raises(
        DataError, match=f"num_tokens was {TOKENIZER.num_tokens} and is {other.num_tokens}"
    ):
        made.check_tokenizer(other)
    with pytest.raises(DataError, match="another tokenizer"):
        write_shards(
            made.folder, chunks_of(TEXTS), other, source={"texts": len(TEXTS)}, held_out=HELD_OUT
        )
    made.check_tokenizer(TOKENIZER)


def test_write_shards_refuses_a_folder_of_other_shards(made: Shards) -> None:
    with pytest.raises(DataError, match="another corpus: source"):
        build(made.folder, TEXTS[:-1])


def test_read_shards_refuses_a_missing_newer_or_damaged_manifest(
    tmp_path: Path, made: Shards
) -> None:
    with pytest.raises(DataError, match="not a folder of token shards"):
        read_shards(tmp_path)
    copied = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    (copied / "manifest.json").write_text(json.dumps(dict(made.manifest) | {"format": 99}))
    with pytest.raises(DataError, match="format that this version of ddiff does not read: 99"):
        read_shards(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_shards(copied)


def test_write_shards_writes_no_manifest_for_an_empty_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token"):
        build(tmp_path, [])
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_encode_chunks_raises_an_error_that_names_the_row_of_an_unknown_symbol(
    workers: int,
) -> None:
    texts = ["ACGT"] * 90 + ["ACNT"] + ["ACGT"] * 9
    chunks = [
        Chunk(texts[i : i + 10], names=[f"line {n}" for n in range(i, i + 10)])
        for i in range(0, 100, 10)
    ]
    with pytest.raises(DataError, match=r"Row 90 \(line 90\).*'N'"):
        list(encode_chunks(chunks, AlphabetTokenizer("ACGT"), workers=workers))


def test_tokenizer_worker_encodes_the_eos_string_in_a_text_as_ordinary_text() -> None:
    """The string `<|eos|>` in a text is not encoded as the end mark of a document."""
    text = ["the <|eos|> cat"]
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode(text) == TOKENIZER.encode(text)
    (_, found), *_ = encode_chunks([Chunk(text)], TOKENIZER, workers=2)
    assert found.ids.tolist() == [*TOKENIZER.encode(text)[0], 0]


class ExitingTokenizer:
    """Tokenizer that ends the process that unpickles it, with exit code 9."""

    num_tokens, eos_id = 3, None

    def __reduce__(self) -> Any:
        return exec, ("import os; os._exit(9)",)


def test_encode_chunks_reports_the_exit_code_of_a_dead_worker(tmp_path: Path) -> None:
    tokenizer: Any = ExitingTokenizer()
    with pytest.raises(DataError, match="exit code 9"):
        list(encode_chunks([Chunk(["a"])] * 3, tokenizer, workers=2))
    with pytest.raises(ArgumentError, match="workers"):
        list(encode_chunks([], TOKENIZER, workers=0))


def test_encode_chunks_refuses_ids_beyond_num_tokens() -> None:
    class WrongSizeTokenizer:
        num_tokens, eos_id = 2, None

        def encode(self, texts: Any) -> Any:
            return [[0, 2] for _ in texts]

    with pytest.raises(DataError, match=r"num_tokens = 2, but returned the ids 0\.\.2"):
        list(encode_chunks([Chunk(["a"])], WrongSizeTokenizer()))  # type: ignore[arg-type]


MEASURED = """
import re, sys
from pathlib import Path
import numpy as np
from ddiff.data.packing import pack_stream
from ddiff.data.shards import write_shards
from ddiff.data.tokenizer_workers import TRAIN, Chunk
from ddiff.data.tokenizer import AlphabetTokenizer

def held():
    "KiB of private memory; pages of mapped files do not count."
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def chunks(cursor):
    for start in range(0, int(sys.argv[2]), 1000):
        peaks.append(held())
        yield Chunk([str(number) for number in range(start, start + 1000)], start + 1000, None)

peaks, tokenizer = [], AlphabetTokenizer("0123456789")
tokenizer.unit = "token"
settings = dict(source={}, held_out=0.01, shard_tokens=50_000)
made = write_shards(Path(sys.argv[1]), chunks, tokenizer, **settings)
rows = pack_stream(made.stream(TRAIN), tokenizer, 32)
for step in range(200):
    rows[rows.order(0, np.arange(step * 64, step * 64 + 64))]
    peaks.append(held())
print(max(peaks) - peaks[0], made.stream(TRAIN).num_documents)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from Linux")
def test_write_shards_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """If the build kept 64 bits per document, the larger corpus would need 1.6 MB more."""
    grown = []
    for documents in (2000, 200_000):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / str(documents)), str(documents)]
        rise, found = map(
            int, subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).split()
        )
        assert found > 0.98 * documents
        grown.append(rise)
    assert grown[1] - grown[0] < 1300  # KiB; typically 180, up to 1110 on a busy machine
    assert len(list((tmp_path / "200000").iterdir())) < 120
    assert (tmp_path / "200000" / "manifest.json").stat().st_size < 50_000
