"""Encoding jobs: interruptions, several processes, damaged and foreign files, and the reader."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hash_encoder import (
    DIM,
    HashEncoder,
    HashTokenEncoder,
    fork_job,
    hash_vector,
    make_documents,
    make_job,
    read_files,
    run_job,
)
from refusals import message

from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.encoded_vectors import EncodedVectors, Moments, read_shard, text_keys
from ddiff.errors import ArgumentError, DataError, NonFiniteError, PluginError

KILLS = 20


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """Finished folder of 60 training and 9 validation documents, in shards of 7."""
    folder = tmp_path / "done"
    run_job(folder)
    return folder


# ---------------------------------------------------------------------- results


def test_encoded_vectors_are_those_of_the_documents_in_order(done: Path) -> None:
    vectors = EncodedVectors.open(done, dim=DIM, encoder="hash")
    assert (vectors.train.num_documents, vectors.validation.num_documents) == (60, 9)
    numbers = [59, 0, 7, 6, 7]
    found, present = vectors.train.read(numbers)
    assert present.all()
    expected = np.stack([hash_vector(f"training text {number}") for number in numbers])
    assert np.array_equal(found, expected)
    assert np.array_equal(vectors.validation.read([8])[0][0], hash_vector("held-out text 8"))
    vectors.verify()


def test_mean_and_std_of_the_manifest_are_those_of_the_training_vectors(done: Path) -> None:
    vectors = EncodedVectors.open(done)
    every = vectors.train.read(range(60))[0].astype(np.float64)
    # both are float64 sums of 60 numbers in [0,1)
    np.testing.assert_allclose(vectors.mean, every.mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(vectors.std, every.std(0), rtol=0, atol=1e-14)


def test_moments_of_vectors_far_from_zero_keep_float64_precision() -> None:
    """A sum of squares would lose all digits: the mean is 1e4, the standard deviation 0.01."""
    values = (1e4 + 0.01 * np.random.default_rng(0).standard_normal((4000, 2))).astype(np.float32)
    moments = Moments(2)
    for block in np.array_split(values, 13):
        moments.add(block)
    np.testing.assert_allclose(moments.std, values.astype(np.float64).std(0), rtol=1e-9)
    assert moments.count == 4000


def test_blank_texts_and_texts_without_vector_are_marked_missing(tmp_path: Path) -> None:
    class Silent(HashEncoder):
        def encode(self, texts: Any) -> Any:
            assert all(text.strip() for text in texts)
            found = super().encode(texts)
            found[[text == "unknown" for text in texts]] = np.nan
            return found

    documents = Documents(
        documents_from_texts(["a", " \n", "unknown", "b"]), documents_from_texts(["c"])
    )
    result = run_job(tmp_path / "made", documents=documents, encoder=Silent(), shard_size=3)
    assert result.manifest["missing"] == {"train": 2, "validation": 0}
    vectors = EncodedVectors.open(tmp_path / "made")
    found, present = vectors.train.read([0, 1, 2, 3])
    assert present.tolist() == [True, False, False, True]
    assert not found[1:3].any()
    assert vectors.train.num_missing == 2
    # missing documents do not count in the mean
    np.testing.assert_allclose(vectors.mean, found[[0, 3]].mean(0), atol=1e-7)


def test_max_samples_encodes_the_first_documents_and_marks_the_rest(tmp_path: Path) -> None:
    run_job(tmp_path / "made", max_samples=10)
    vectors = EncodedVectors.open(tmp_path / "made")
    assert (vectors.train.num_documents, vectors.validation.num_documents) == (10, 9)
    _, present = vectors.train.read([9, 10, 59])
    assert present.tolist() == [True, False, False]


def test_keys_of_a_shard_are_hashes_of_its_texts(done: Path) -> None:
    expected = text_keys(f"training text {number}" for number in range(60))
    assert np.array_equal(EncodedVectors.open(done).train.keys(), expected)


# ---------------------------------------------------------------------- interruptions


def test_job_killed_20_times_gives_the_files_of_an_unkilled_job(tmp_path: Path) -> None:
    """Kill all processes at random moments, with 1 to 4 processes after each kill."""
    draw = random.Random(13)
    documents = make_documents(600, 40)
    run_job(tmp_path / "unkilled", documents=documents)
    folder = tmp_path / "killed"
    job = make_job(folder, documents, HashEncoder(seconds=0.012))
    written: dict[str, int] = {}  # modification time of each shard when it was first seen
    num_unfinished = 0
    for _ in range(KILLS):
        processes = [fork_job(job) for _ in range(draw.randint(1, 4))]
        time.sleep(draw.uniform(0.02, 0.25))
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        num_unfinished += not (folder / "manifest.json").exists()
        for path in folder.glob("*.safetensors"):
            read_shard(path)  # every file is complete
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert num_unfinished >= KILLS - 5
    assert len(written) >= 10
    last = [fork_job(job) for _ in range(3)]
    assert [os.waitpid(process, 0)[1] for process in last] == [0, 0, 0]
    assert read_files(folder) == read_files(tmp_path / "unkilled")
    for name, modified in written.items():
        assert (folder / name).stat().st_mtime_ns == modified  # no shard was encoded twice


def test_processes_finish_the_shards_of_a_killed_process(tmp_path: Path) -> None:
    job = make_job(tmp_path / "made", encoder=HashEncoder(seconds=0.01))
    processes = [fork_job(job) for _ in range(3)]
    time.sleep(0.1)
    os.kill(processes[1], signal.SIGKILL)
    codes = [os.waitpid(process, 0)[1] for process in processes]
    assert codes == [0, signal.SIGKILL, 0]
    run_job(tmp_path / "unkilled")
    assert read_files(tmp_path / "made") == read_files(tmp_path / "unkilled")


def test_every_text_is_encoded_once_by_concurrent_processes(tmp_path: Path) -> None:
    class Counting(HashEncoder):
        def encode(self, texts: Any) -> Any:
            with open(tmp_path / "log", "a") as file:  # appending a short line is atomic
                file.write("".join(f"{text}\n" for text in texts))
            return super().encode(texts)

    job = make_job(tmp_path / "made", encoder=Counting(seconds=0.003))
    processes = [fork_job(job) for _ in range(4)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0, 0]
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 69


def test_partial_files_and_locks_of_killed_processes_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    run_job(folder)
    expected = read_files(folder)
    (folder / "train_00002.safetensors").rename(folder / "train_00002.safetensors.partial-0123abcd")
    (folder / "manifest.json").rename(folder / "manifest.json.partial-0123abcd")
    (folder / "train_00002.lock").touch()
    run_job(folder)
    assert read_files(folder) == expected


def test_second_call_verifies_and_encodes_nothing(done: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    result = run_job(done)
    assert (result.encoded, result.was_finished) == (0, True)
    after = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    del before[".lock"], after[".lock"]
    assert after == before


# ---------------------------------------------------------------------- damaged and other files


@pytest.mark.parametrize("size", [0, 5, 100, -1, -20])
def test_truncated_shard_is_named_and_encoded_again(
    done: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    expected = read_files(done)
    path = done / "train_00004.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    text = message(EncodedVectors.open, done)
    assert "train_00004" in text
    assert "ddiff encode" in text
    with caplog.at_level(logging.WARNING):
        assert run_job(done).encoded == 7
    assert "train_00004" in caplog.text
    assert read_files(done) == expected


def test_changed_bit_of_a_vector_is_found_and_encoded_again(
    done: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_files(done)
    path = done / "train_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-12] ^= 1
    path.write_bytes(content)
    assert "train_00001" in message(EncodedVectors.open, done)
    with caplog.at_level(logging.WARNING):
        run_job(done)
    assert "train_00001" in caplog.text
    assert read_files(done) == expected


def test_missing_shard_is_refused_by_the_reader_and_encoded_again(done: Path) -> None:
    expected = read_files(done)
    (done / "validation_00001.safetensors").unlink()
    assert "validation_00001" in message(EncodedVectors.open, done)
    assert run_job(done).encoded == 2
    assert read_files(done) == expected


def test_shard_of_other_texts_is_encoded_again(done: Path, tmp_path: Path) -> None:
    expected = read_files(done)
    other = done / "train_00001.safetensors"
    other.write_bytes((done / "train_00000.safetensors").read_bytes())
    assert "another job" in message(EncodedVectors.open, done)
    assert run_job(done).encoded == 7
    assert read_files(done) == expected


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"encoder": HashEncoder(fingerprint="other")}, r"encoder: was .*hash.*, is .*other"),
        ({"encoder": HashEncoder(dim=5)}, "dim: was 4, is 5"),
        ({"documents": make_documents(61)}, "train documents: was"),
        ({"shard_size": 8}, "shard_size: was 7, is 8"),
        ({"max_samples": 3}, "max_samples: was None, is 3"),
    ],
)
def test_folder_of_another_job_is_refused_with_the_difference(
    done: Path, change: dict[str, Any], difference: str
) -> None:
    before = read_files(done)
    text = message(run_job, done, **change)
    assert re.search(difference, text)
    assert "another folder" in text
    assert read_files(done) == before


def test_job_of_the_same_encoder_in_another_place_keeps_the_folder(done: Path) -> None:
    """The description of an encoder may change, for example the path of its model."""
    before = read_files(done)
    documents = make_documents()
    job = make_job(done, documents)
    job.settings = replace(job.settings, description={"path": "elsewhere"})
    assert job.run().encoded == 0
    assert read_files(done) == before


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    assert "letters" in message(run_job, tmp_path, error=ArgumentError)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize("name", ["settings.json", "manifest.json"])
def test_damaged_json_file_is_named(done: Path, name: str) -> None:
    (done / name).write_text('{"format": 1')
    if name == "settings.json":
        assert name in message(run_job, done)
    else:
        assert name in message(EncodedVectors.open, done)
        run_job(done)  # writes the manifest again
        EncodedVectors.open(done)


# ---------------------------------------------------------------------- reader


def test_reader_refuses_other_dimension_encoder_and_data(done: Path) -> None:
    assert "must have 8 dimensions; they have 4" in message(EncodedVectors.open, done, dim=8)
    text = message(EncodedVectors.open, done, encoder="minilm")
    assert "fingerprint minilm" in text
    assert "(fingerprint hash)" in text
    data = {"train": "abc"}
    assert "fingerprint abc" in message(EncodedVectors.open, done, data=data)


def test_reader_refuses_a_folder_without_manifest(done: Path, tmp_path: Path) -> None:
    (done / "manifest.json").unlink()
    assert "unfinished" in message(EncodedVectors.open, done)
    assert "not a folder of encoded vectors" in message(EncodedVectors.open, tmp_path)


@pytest.mark.parametrize("numbers", [[60], [-1], [[1]]])
def test_reader_refuses_numbers_outside_the_corpus(done: Path, numbers: Any) -> None:
    assert "0..59" in message(EncodedVectors.open(done).train.read, numbers, error=ArgumentError)


def test_reader_maps_vectors_into_memory(done: Path) -> None:
    vectors = read_shard(done / "train_00000.safetensors").vectors
    assert isinstance(vectors.base, np.memmap)
    assert not vectors.flags.writeable


# ---------------------------------------------------------------------- mistakes of an encoder


def encoder_returning(result: Any) -> HashEncoder:
    class Wrong(HashEncoder):
        def encode(self, texts: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return result(super().encode(texts))

    return Wrong()


@pytest.mark.parametrize(
    ("result", "error", "expected"),
    [
        (lambda found: found[:, :3], PluginError, r"must return a float array \(7, 4\)"),
        (lambda found: found[:-1], PluginError, r"got float32 \(6, 4\)"),
        (lambda found: found.astype(int), PluginError, "got int64"),
        (lambda found: found / np.float32([1, 1, 1, 0]), NonFiniteError, "train document 0"),
        (MemoryError("unable to allocate 9 GiB"), DataError, "smaller batch"),
        (RuntimeError("CUDA out of memory. Tried"), DataError, r"CUDA out of memory.*\[encoder\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_wrong_result_of_an_encoder_is_explained(
    tmp_path: Path, result: Any, error: type[Exception], expected: str
) -> None:
    text = message(run_job, tmp_path / "made", encoder=encoder_returning(result), error=error)
    assert re.search(expected, text)
    assert not list((tmp_path / "made").glob("*.safetensors*"))
    run_job(tmp_path / "made")  # a correct encoder resumes the job
    assert json.loads((tmp_path / "made" / "manifest.json").read_text())["documents"]["train"] == 60


# ---------------------------------------------------------------------- one vector per token

WORDS = ["one", "two three", "four none five", "none", "a b c d e f", " "]
LENGTHS = [1, 2, 1, 0, 4, 0]


def word_documents() -> Documents:
    return Documents(documents_from_texts(WORDS), documents_from_texts(["x", "y z"]))


def run_word_job(folder: Path, **arguments: Any) -> EncodedVectors:
    run_job(folder, documents=word_documents(), encoder=HashTokenEncoder(), **arguments)
    return EncodedVectors.open(folder)


def test_token_vectors_are_padded_by_zeros_and_keep_their_number(tmp_path: Path) -> None:
    vectors = run_word_job(tmp_path / "words", shard_size=4)
    assert (vectors.train.positions, vectors.dim) == (4, DIM)
    found, present = vectors.train.read(range(6))
    lengths = vectors.train.read_lengths(range(6))
    assert lengths.tolist() == LENGTHS
    assert present.tolist() == [length > 0 for length in LENGTHS]
    for text, length, rows in zip(WORDS, LENGTHS, found):
        expected = np.zeros((4, DIM), np.float32)
        for place, word in enumerate(text.split()[:length]):
            expected[place] = hash_vector(word)
        assert np.array_equal(rows, expected)
    assert vectors.validation.read_lengths([1, 0]).tolist() == [2, 1]
    vectors.verify()


def test_mean_of_token_vectors_leaves_out_the_padding(tmp_path: Path) -> None:
    vectors = run_word_job(tmp_path / "words", shard_size=4)
    words = [word for text, size in zip(WORDS, LENGTHS) for word in text.split()[:size]]
    every = np.stack([hash_vector(word) for word in words]).astype(np.float64)
    # float64 sums of a few numbers in [0,1)
    np.testing.assert_allclose(vectors.mean, every.mean(0), rtol=0, atol=1e-15)
    np.testing.assert_allclose(vectors.std, every.std(0), rtol=0, atol=1e-15)


def test_token_vectors_resume_after_a_kill_with_equal_files(tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    run_word_job(expected, shard_size=2)
    folder = tmp_path / "resumed"
    run_word_job(folder, shard_size=2)
    (folder / "manifest.json").unlink()
    (folder / "train_00001.safetensors").unlink()
    run_word_job(folder, shard_size=2)
    assert read_files(folder) == read_files(expected)


def test_token_vectors_of_other_positions_are_refused(tmp_path: Path) -> None:
    run_word_job(tmp_path / "words")
    job = make_job(tmp_path / "words", word_documents(), HashTokenEncoder(3))
    assert "positions: was 4, is 3" in message(job.run)


def test_single_vectors_keep_the_first_format(done: Path) -> None:
    """Folders of older versions have no key `positions`, and their fingerprint must not change."""
    settings = json.loads((done / "settings.json").read_text())
    assert settings["format"] == 1
    assert "positions" not in settings
    assert EncodedVectors.open(done).train.read_lengths([0, 1]).tolist() == [1, 1]


class GapEncoder(HashTokenEncoder):
    """Encoder with a row of NaN before a vector."""

    def encode(self, texts: Any) -> np.ndarray:
        return super().encode(texts)[:, ::-1]


def test_vector_after_a_row_of_nan_is_an_error_of_the_encoder(tmp_path: Path) -> None:
    job = make_job(tmp_path / "words", word_documents(), GapEncoder())
    assert "a vector after a row of NaN" in message(job.run, error=PluginError)


def test_damaged_token_shard_is_encoded_again(tmp_path: Path) -> None:
    folder = tmp_path / "words"
    run_word_job(folder)
    path = folder / "train_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "checksum is wrong" in message(EncodedVectors.open, folder)
    run_word_job(folder).verify()
