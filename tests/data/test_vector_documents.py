"""Documents of a recipe of text whose vectors are conditions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ddiff_core.fields_files import VectorFiles, VectorShards
from ddiff_core.vector_documents import ConditionedVectorFiles, ConditionedVectorShards

from ddiff.data.cache import Cache
from ddiff.data.columns import FieldsDocuments, FieldsTable, TextColumn, VectorColumn
from ddiff.data.paired_vectors import read_vector_files
from ddiff.data.vector_documents import join_vectors
from ddiff.errors import DataError

WIDTH = 3


def make_table(count: int) -> FieldsTable:
    """Make samples of which sample 1 has no vector and sample 2 no text."""
    present = np.arange(count) != 1
    vectors = np.arange(count * WIDTH, dtype=float).reshape(count, WIDTH)
    texts = [None if number == 2 else f"text {number}" for number in range(count)]
    column = VectorColumn.from_array(vectors, present=present)
    return FieldsTable({"text": TextColumn(texts), "latent": column})


@pytest.mark.parametrize("is_cached", [False, True])
def test_join_vectors_keeps_pairs_and_leaves_out_samples_without_text(
    is_cached: bool, tmp_path: Path
) -> None:
    cache = Cache(tmp_path) if is_cached else None
    samples = FieldsDocuments(make_table(5), make_table(4))
    for _ in range(2):  # the second time from the cache
        documents = join_vectors(samples, cache=cache)
        assert documents.train["text"][:] == ["text 0", "text 1", "text 3", "text 4"]
        assert documents.train["latent"][:] == [[0, 1, 2], None, [9, 10, 11], [12, 13, 14]]
        assert documents.validation["text"][:] == ["text 0", "text 1", "text 3"]
        assert documents.own_vectors == ()


def test_join_vectors_marks_vectors_that_are_computed_from_the_text(folder: Path) -> None:
    for computed, marked in ((True, ("latent",)), (False, ())):
        samples = read_vector_files(str(folder), held_out=0.3, computed=computed)
        assert join_vectors(samples).own_vectors == marked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with 20 texts in both published layouts; the vector of text i is (i, i, i)."""
    place = tmp_path / "vectors"
    (place / "latent_shards").mkdir(parents=True)
    manifest = []
    lines = []
    for number in range(20):
        np.save(place / f"{number}.npy", np.full(WIDTH, number, np.float32))
        text = f"text {number}"
        manifest.append({"text": text, "latent_path": f"{number}.npy"})
        lines.append(json.dumps({"text": text, "shard": 0, "idx": number}))
    (place / "train_data.json").write_text(json.dumps(manifest))
    (place / "train_data.jsonl").write_text("\n".join(lines))
    shard = np.repeat(np.arange(20, dtype=np.float32)[:, None], WIDTH, 1)
    np.save(place / "latent_shards" / "shard_0000.npy", shard)
    return place


@pytest.mark.parametrize("component", [ConditionedVectorFiles, ConditionedVectorShards])
def test_data_sets_of_texts_have_the_vectors_as_condition(component: type, folder: Path) -> None:
    config = component.Config(path=str(folder), held_out=0.3, dim=WIDTH)
    documents = component.build(config, length=8, seed=0, cache=None)
    texts = []
    for part in (documents.train, documents.validation):
        for text, vector in zip(part["text"][:], part["latent"][:], strict=True):
            assert vector == [float(text.split()[1])] * WIDTH
            texts.append(text)
    assert len(set(texts)) == 20


@pytest.mark.parametrize("component", [VectorFiles, VectorShards])
def test_dim_of_vectors_is_checked_and_replaces_files_in_a_dry_run(
    component: type, folder: Path
) -> None:
    missing = component.preview(component.Config(path=str(folder / "none"), dim=7))
    assert (missing["latent"].positions, missing["latent"].width) == (1, 7)
    config = component.Config(path=str(folder), dim=7)
    with pytest.raises(DataError, match=r"dim = 7, but the vectors .* have 3 numbers"):
        component.preview(config)
    with pytest.raises(DataError, match=r"dim = 7, but the vectors .* have 3 numbers"):
        component.build(config, seed=0, cache=None)
    with pytest.raises(DataError):
        component.preview(component.Config(path=str(folder / "none")))
