"""Clusters and embeddings in files: formats, published layouts, and errors that name sizes."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel

from ddiff.clustering.files import load_model_embeddings, read_clusters, read_embeddings
from ddiff.errors import DataError

CLUSTERS = np.array([0, 1, 1, 2, 0, 3], dtype=np.int64)


def write(folder: Path, kind: str, values: np.ndarray, name: str = "c") -> str:
    path = folder / f"{name}.{kind.split('-')[0]}"
    if kind == "npy":
        np.save(path, values)
    elif kind == "safetensors":
        save_file({"clusters": values}, path)
    elif kind == "json":
        path.write_text(json.dumps(values.tolist()))
    else:  # an object with its keys out of order
        path.write_text(json.dumps({str(i): int(values[i]) for i in reversed(range(len(values)))}))
    return str(path)


@pytest.mark.parametrize("kind", ["npy", "json", "json-object", "safetensors"])
def test_read_clusters_accepts_every_format(tmp_path: Path, kind: str) -> None:
    (level,) = read_clusters([write(tmp_path, kind, CLUSTERS)], 6)
    assert level.dtype == np.int64
    assert level.tolist() == CLUSTERS.tolist()


def test_read_clusters_reads_one_level_per_file(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, "npy", CLUSTERS, "a"),
        write(tmp_path, "json", np.array([0, 1, 1, 0]), "b"),
    ]
    assert [level.tolist() for level in read_clusters(paths, 6)] == [
        CLUSTERS.tolist(),
        [0, 1, 1, 0],
    ]
    with pytest.raises(
        DataError, match=r"b\.json has 3 entries, but the level below it has 4 clusters"
    ):
        read_clusters([paths[0], write(tmp_path, "json", np.array([0, 1, 1]), "b")], 6)


def test_read_clusters_accepts_fsspec_paths(tmp_path: Path) -> None:
    path = f"memory://clusters{tmp_path}/c.json"
    with fsspec.open(path, "w") as file:
        json.dump(CLUSTERS.tolist(), file)
    assert read_clusters([path], 6)[0].tolist() == CLUSTERS.tolist()


def test_read_clusters_accepts_files_without_the_mask_token(tmp_path: Path) -> None:
    # The file has tokens 0..4 and a padding token, but no mask. One tokenizer has neither token,
    # the other has both.
    path = write(tmp_path, "npy", np.array([0, 1, 1, 2, 0, 0], dtype=np.int64))
    assert read_clusters([path], 5, extra=1)[0].tolist() == [0, 1, 1, 2, 0]
    assert read_clusters([path], 7, mask_token_id=6)[0].tolist() == [0, 1, 1, 2, 0, 0, 0]
    assert read_clusters([path], 7, mask_token_id=3)[0].tolist() == [0, 1, 1, 1, 2, 0, 0]


@pytest.mark.parametrize("num_tokens", [5, 7])
def test_read_clusters_raises_an_error_that_names_expected_and_actual_length(
    tmp_path: Path, num_tokens: int
) -> None:
    with pytest.raises(DataError, match=f"has 6 entries, but {num_tokens} are expected"):
        read_clusters([write(tmp_path, "npy", CLUSTERS)], num_tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 2, 2]), "cluster 1 has no member"),
        (np.array([0, -1, 1]), "numbered from 0"),
        (np.array([0.0, 1.0, 1.0]), "integers"),
        (np.zeros((3, 1), dtype=np.int64), "one list"),
        (np.array([0.0, np.nan, 1.0]), "integers"),
        (np.array([True, False, True]), "integers"),
        (np.array([0, 1, 10**15]), "cluster number 1000000000000000"),
        (np.array([0, 1, 2**63 + 5], dtype=np.uint64), "numbered from 0"),
    ],
)
def test_read_clusters_refuses_arrays_that_are_not_cluster_numbers(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_clusters([write(tmp_path, "npy", values)], 3)


def test_read_clusters_refuses_pickles_and_damaged_files(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "c.pt")
    with pytest.raises(DataError, match="can run code"):
        read_clusters([str(tmp_path / "c.pt")], 3)
    np.save(tmp_path / "o.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a complete"):
        read_clusters([str(tmp_path / "o.npy")], 2)
    for kind in ("npy", "json", "safetensors"):
        path = Path(write(tmp_path, kind, CLUSTERS))
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(DataError, match="not a complete"):
            read_clusters([str(path)], 6)
    with pytest.raises(DataError, match=r"missing\.npy"):
        read_clusters([str(tmp_path / "missing.npy")], 3)
    with pytest.raises(DataError, match="at least one file"):
        read_clusters([], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": 0, "0": 1, "1": 1}', "occurs twice"),
        ('{"0": 0, "2": 1}', "without gaps"),
        ('{"a": 0}', "not a complete"),
        ("[[0], [1, 2]]", "not a complete"),
        ("[0, null]", "integers"),
        ('"01"', "one list"),
        ("[" * 5000 + "]" * 5000, "not a complete"),
    ],
)
def test_read_clusters_refuses_json_that_is_not_cluster_numbers(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_clusters([str(tmp_path / "c.json")], 2)


def test_cluster_and_embedding_readers_refuse_an_npz_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", CLUSTERS)
    (tmp_path / "c.npz").rename(tmp_path / "c.npy")
    for read in (lambda path: read_clusters([path], 6), lambda path: read_embeddings(path, 6)):
        with pytest.raises(DataError, match="archive"):
            read(str(tmp_path / "c.npy"))


def test_read_clusters_refuses_a_mask_token_id_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mask_token_id .* 7 tokens, 0\.\.6; got 9"):
        read_clusters([write(tmp_path, "npy", CLUSTERS)], 7, mask_token_id=9)


def test_read_embeddings_requires_a_row_per_token(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    assert np.array_equal(read_embeddings(write(tmp_path, "safetensors", matrix), 6), matrix)
    with pytest.raises(DataError, match=r"5 tokens.*\(6, 3\)"):
        read_embeddings(write(tmp_path, "npy", matrix), 5)


def test_load_model_embeddings_reads_the_input_table(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path)
    table = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(load_model_embeddings(str(tmp_path), 20), table)
    assert np.array_equal(load_model_embeddings(str(tmp_path), 17), table[:17])  # a padded table
    with pytest.raises(DataError, match="20 rows, but the tokenizer has 21"):
        load_model_embeddings(str(tmp_path), 21)


def test_load_model_embeddings_raises_an_error_that_names_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No model from"):
        load_model_embeddings(str(tmp_path), 3)
