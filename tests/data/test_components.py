"""Dataset, tokenizer and vocabulary components, built from a recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import WORDS
from ddiff_core import COMPONENTS
from ddiff_core.data import (
    Markov,
    Names,
    Symbols,
    Text,
)
from ddiff_core.tokenizers import Alphabet, BytePair, Pretrained
from ddiff_core.vocabularies import Clusters, File, Flat
from pydantic import ValidationError

from ddiff.data.cache import Cache
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.packing import pack
from ddiff.data.tokenizer import AlphabetTokenizer, BytePairTokenizer
from ddiff.errors import ArgumentError, DataError


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 30)) for _ in range(count)]


@pytest.fixture(scope="module")
def documents() -> Documents:
    return Documents(documents_from_texts(sentences(20, 0)), documents_from_texts(sentences(3, 1)))


@pytest.fixture(scope="module")
def tokenizer(documents: Documents) -> BytePairTokenizer:
    return BytePairTokenizer.train(documents.train["text"], 275)


def build_clusters(
    tokenizer: Any, rows: Any = None, cache: Cache | None = None, **keys: Any
) -> Any:
    return Clusters.build(Clusters.Config(**keys), tokenizer=tokenizer, rows=rows, cache=cache)


def test_data_component_modules_import_no_heavy_libraries() -> None:
    kinds = ("dataset", "fields_dataset", "tokenizer", "vocabulary")
    targets = [target for kind in kinds for target in COMPONENTS[kind].values()]
    modules = sorted({target.partition(":")[0] for target in targets})
    script = (
        f"import sys, {', '.join(modules)}\n"
        "heavy = ('torch', 'datasets', 'transformers', 'faiss', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_text_component_reads_training_and_validation_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "v.txt").write_text("three")
    config = Text.Config(
        files=(str(tmp_path / "a.txt"),), validation=(str(tmp_path / "v.txt"),), split="paragraph"
    )
    built = Text.build(config, length=8, seed=0, cache=Cache(tmp_path / "cache"))
    assert (built.train["text"], built.validation["text"]) == (["one", "two"], ["three"])


def test_symbols_component_refuses_rows_of_another_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ACGT\n" * 3)
    (tmp_path / "v.txt").write_text("AAAA\n")
    config = Symbols.Config(files=(str(tmp_path / "a.txt"),), validation=(str(tmp_path / "v.txt"),))
    assert Symbols.build(config, length=4, seed=0, cache=None).train["text"] == ["ACGT"] * 3
    with pytest.raises(DataError, match="length = 5"):
        Symbols.build(config, length=5, seed=0, cache=None)


def test_markov_component_uses_the_seed_of_its_config_and_reports_entropy() -> None:
    config = Markov.Config(alphabet=5, rows=6, validation=2, seed=4)
    built = [Markov.build(config, length=9, seed=seed, cache=None) for seed in (0, 1)]
    assert built[0].fingerprint == built[1].fingerprint
    assert (len(built[0].train), len(built[0].validation)) == (6, 2)
    assert built[0].entropy_rate == Markov.source(config).row_entropy(9)
    assert Markov.source(config).entropy_rate < Markov.source(config).row_entropy(9) < np.log(5)


def test_byte_pair_component_learns_from_training_part_and_is_cached(
    documents: Documents, tmp_path: Path
) -> None:
    config, cache = BytePair.Config(size=275), Cache(tmp_path)
    direct = BytePair.build(config, documents=documents, cache=None)
    for _ in range(2):
        assert (
            BytePair.build(config, documents=documents, cache=cache).fingerprint
            == direct.fingerprint
        )
    elsewhere = Documents(documents.train, documents_from_texts(["other words"]))
    assert (
        BytePair.build(config, documents=elsewhere, cache=cache).fingerprint == direct.fingerprint
    )
    assert len(list((tmp_path / "byte_pairs").iterdir())) == 1
    assert (
        BytePair.build(BytePair.Config(size=270), documents=documents, cache=cache).fingerprint
        != direct.fingerprint
    )


def test_byte_pair_component_warns_if_it_learns_fewer_tokens_than_size(
    documents: Documents, caplog: pytest.LogCaptureFixture
) -> None:
    built = BytePair.build(BytePair.Config(size=5000), documents=documents, cache=None)
    assert built.num_tokens < 5000
    assert "of the 5000" in caplog.text


def test_alphabet_component_includes_validation_symbols() -> None:
    rows = Documents(documents_from_texts(["CA"]), documents_from_texts(["GT"]))
    assert Alphabet.build(Alphabet.Config(), documents=rows, cache=None).tokens() == list("ACGT")
    assert Alphabet.build(
        Alphabet.Config(symbols="TGCA"), documents=rows, cache=None
    ).tokens() == list("TGCA")


def test_alphabet_component_takes_the_fill_symbol_of_the_documents() -> None:
    parts = (documents_from_texts(["CA-"]), documents_from_texts(["GT-"]))
    filled = Alphabet.build(Alphabet.Config(), documents=Documents(*parts, fill="-"), cache=None)
    assert (filled.tokens(), filled.fill_id) == (list("-ACGT"), 0)
    plain = Alphabet.build(Alphabet.Config(), documents=Documents(*parts), cache=None)
    assert plain.fill_id is None
    with pytest.raises(ArgumentError, match="fill must be one of the 4 symbols"):
        Alphabet.build(
            Alphabet.Config(symbols="ACGT"), documents=Documents(*parts, fill="-"), cache=None
        )


def test_vocabulary_components_store_the_tokenizer_fingerprint(
    documents: Documents, tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    np.save(tmp_path / "c.npy", np.arange(tokenizer.num_tokens) % 7)
    rows = pack(documents.train, tokenizer, 16)
    built = [
        Flat.build(Flat.Config(), tokenizer=tokenizer, rows=rows, cache=None),
        build_clusters(tokenizer, rows, sizes=(8,)),
        File.build(
            File.Config(paths=(str(tmp_path / "c.npy"),)),
            tokenizer=tokenizer,
            rows=None,
            cache=None,
        ),
    ]
    assert {vocabulary.tokenizer_fingerprint for vocabulary in built} == {tokenizer.fingerprint}
    assert [vocabulary.num_tokens for vocabulary in built] == [tokenizer.num_tokens] * 3


def test_clusters_component_puts_special_tokens_in_a_separate_branch(
    documents: Documents, tokenizer: BytePairTokenizer
) -> None:
    tree = build_clusters(tokenizer, pack(documents.train, tokenizer, 16), sizes=(12, 3), width=8)
    assert tree.level_sizes == (tokenizer.num_tokens, 12, 3, 1)
    assert [None if c is None else tuple(c.shape) for c in tree.centroids] == [
        (12, 8),
        (3, 8),
        None,
    ]
    for level in (1, 2):
        node = int(tree.ancestor(torch.tensor(tokenizer.eos_id), level))
        start, stop = tree.node_range(torch.tensor(node), 0)
        assert tree.order(0)[int(start) : int(stop)].tolist() == [tokenizer.eos_id]


def test_clusters_are_cached_by_training_rows_and_settings(
    documents: Documents, tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    cache, rows = Cache(tmp_path), pack(documents.train, tokenizer, 16)
    direct = build_clusters(tokenizer, rows, sizes=(12,), width=8)
    for _ in range(2):
        cached = build_clusters(tokenizer, rows, cache, sizes=(12,), width=8)
        assert cached.fingerprint == direct.fingerprint
        assert torch.equal(cached.centroids[0], direct.centroids[0])
        assert cached.tokenizer_fingerprint == tokenizer.fingerprint
    assert len(list((tmp_path / "clusters").iterdir())) == 1
    build_clusters(tokenizer, rows, cache, sizes=(12,), width=9)
    build_clusters(
        tokenizer, pack(documents.validation, tokenizer, 16), cache, sizes=(12,), width=8
    )
    assert len(list((tmp_path / "clusters").iterdir())) == 3


def test_clusters_component_with_an_embeddings_file_needs_no_training_rows(
    tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    source = str(tmp_path / "e.npy")
    np.save(
        source,
        np.random.default_rng(0).standard_normal((tokenizer.num_tokens, 5)).astype(np.float32),
    )
    first = build_clusters(tokenizer, None, Cache(tmp_path / "cache"), sizes=(9,), source=source)
    assert first.level_sizes == (tokenizer.num_tokens, 9, 1)
    np.save(
        source,
        np.random.default_rng(1).standard_normal((tokenizer.num_tokens, 5)).astype(np.float32),
    )
    second = build_clusters(tokenizer, None, Cache(tmp_path / "cache"), sizes=(9,), source=source)
    assert second.fingerprint != first.fingerprint


def test_cluster_tree_without_special_tokens_has_no_branch_for_them() -> None:
    config = Markov.Config(alphabet=8, rows=50, validation=5)
    rows = Markov.build(config, length=20, seed=0, cache=None)
    tokenizer = AlphabetTokenizer.from_texts(rows.train["text"])
    tree = build_clusters(tokenizer, pack(rows.train, tokenizer, 20), sizes=(3,), width=4)
    assert tree.level_sizes == (8, 3, 1)


@pytest.mark.parametrize("sizes", [(10_000,), (8, 8), (4, 8)])
def test_clusters_component_raises_an_error_that_names_impossible_sizes(
    documents: Documents, tokenizer: BytePairTokenizer, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    rows = pack(documents.train, tokenizer, 16)
    with pytest.raises(ArgumentError, match="sizes"):
        build_clusters(tokenizer, rows, Cache(tmp_path), sizes=sizes)
    assert not list((tmp_path / "clusters").iterdir())


def test_clusters_component_raises_an_error_that_names_missing_training_rows(
    tokenizer: BytePairTokenizer,
) -> None:
    with pytest.raises(DataError, match="packed training rows"):
        build_clusters(tokenizer)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (Text.Config, {"files": ()}),
        (Text.Config, {"files": ("a",), "held_out": 1.0}),
        (Text.Config, {"files": ("a",), "split": "word"}),
        (Markov.Config, {"alphabet": 3}),
        (BytePair.Config, {"size": 256}),
        (Alphabet.Config, {"symbols": ""}),
        (Symbols.Config, {"files": ("a",), "fill": "--"}),
        (Names.Config, {"held_out": 0.0}),
        (Names.Config, {"length": 16}),
        (Clusters.Config, {"sizes": ()}),
        (Clusters.Config, {"max_share": 0.5}),
        (Clusters.Config, {"source": "e.npy", "model": "folder"}),
        (File.Config, {"paths": ()}),
        (Flat.Config, {"masks": True}),
    ],
)
def test_data_component_config_refuses_impossible_values(config: Any, keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**keys)


def test_clusters_component_of_one_cluster_keeps_a_separate_root(
    tokenizer: BytePairTokenizer,
) -> None:
    """The preview and the built tree both have three levels: tokens, one cluster and the root."""
    embeddings = (
        np.random.default_rng(0).standard_normal((tokenizer.num_tokens, 4)).astype(np.float32)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ddiff.load_model_embeddings", lambda source, num_tokens: embeddings, raising=False
        )
        built = build_clusters(tokenizer, sizes=(1,), model="somewhere")
    seen = Clusters.preview(Clusters.Config(sizes=(1,)), num_tokens=tokenizer.num_tokens)
    assert seen is not None
    assert built.level_sizes == seen.level_sizes == (tokenizer.num_tokens, 1, 1)


def test_pretrained_component_refuses_a_size_other_than_the_tokenizer_size(
    tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    """The tokenizer is a directory written by the transformers library."""
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|eos|>"
    )
    made.save_pretrained(tmp_path)
    documents: Any = None
    for size in (None, tokenizer.num_tokens):
        config = Pretrained.Config(path=str(tmp_path), size=size)
        assert Pretrained.preview(config) == size
        assert (
            Pretrained.build(config, documents=documents, cache=None).num_tokens
            == tokenizer.num_tokens
        )
    with pytest.raises(
        DataError, match=f"size must be the number of tokens of .*, {tokenizer.num_tokens}; got 7"
    ):
        Pretrained.build(
            Pretrained.Config(path=str(tmp_path), size=7), documents=documents, cache=None
        )
