"""Data of runs of several fields: batches, components, files and plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hash_encoder import DIM, HashTokenEncoder, hash_vector
from small_run_fields import LEVELS, PATCHES, RECIPE, make_table, read_small
from torch import Tensor

from ddiff.core.paths import LegPath, first_path, given_path, shared_path
from ddiff.core.vocabulary import HierarchicalVocabulary
from ddiff.data.captioned_images import load_digits
from ddiff.data.fields_batch import FieldsBatch
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import ArgumentError, DataError
from ddiff.plugin.registry import UNPACKAGED, Component
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.resolve import read_recipe
from ddiff.runs.fields.data import RunFields, preview_fields
from ddiff.runs.fields.own_vectors import describe_own_vectors
from ddiff.runs.fields.values import TextValues, VectorValues


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small(folder: Path, *settings: str, **keys: Any) -> RunFields:
    return RunFields(read_small(folder, *settings, **keys))


def tensors(batch: FieldsBatch) -> list[Tensor]:
    found = [batch.index]
    for values in batch.fields.values():
        found.extend(values)
    return found


def join(batches: list[FieldsBatch]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*(tensors(batch) for batch in batches))]


def test_batches_have_all_fields_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    batch = small(tmp_path).batch_at(0, 0)
    assert list(batch.fields) == ["image", "text", "latent"]
    assert batch.fields["image"].values.shape == (12, 8)
    assert batch.fields["text"].values.shape == (12, 3)
    assert batch.fields["latent"].values.shape == (12, 2, 4)
    assert batch.index.tolist() == list(range(12))


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 3), (2, 1), (2, 3)])
def test_global_batch_depends_neither_on_ranks_nor_on_micro_batches(
    tmp_path: Path, accumulate: int, world_size: int
) -> None:
    whole = small(tmp_path)
    parts = small(tmp_path, f"train.accumulate={accumulate}")
    for step in (0, 7):
        expected = tensors(whole.batch_at(step, 0))
        found = join(
            [
                parts.batch_at(step, micro, rank, world_size)
                for micro in range(accumulate)
                for rank in range(world_size)
            ]
        )
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_batch_of_a_step_is_the_same_in_a_new_process_and_another_in_the_next_step(
    tmp_path: Path,
) -> None:
    first = tensors(small(tmp_path).batch_at(5, 0))
    again = tensors(small(tmp_path).batch_at(5, 0))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    following = small(tmp_path).batch_at(6, 0)
    assert not torch.equal(first[1], following.fields["image"].values)


def test_every_training_sample_occurs_once_in_an_epoch(tmp_path: Path) -> None:
    run_fields = small(tmp_path, train=36)
    images = make_table(36, 0).read("image", np.arange(36)).values
    batches = [run_fields.batch_at(step, 0).fields["image"].values for step in range(3)]
    found = torch.cat(batches).tolist()
    assert sorted(found) == sorted(images.tolist())


def test_absent_samples_have_zeros_and_are_neither_scored_nor_counted(tmp_path: Path) -> None:
    batch = small(tmp_path).validation_batch(np.arange(9))
    assert batch.index.tolist() == list(range(9))
    for lacking, name in enumerate(("image", "text", "latent")):
        values = batch.fields[name]
        assert values.absent.tolist() == [number == lacking for number in range(9)]
        assert not values.values[lacking].any()
        assert not values.scored[lacking].any()
        assert not values.counted[lacking].any()
        assert values.scored[~values.absent].all()


def test_texts_are_filled_with_scored_end_marks_of_which_the_first_is_counted(
    tmp_path: Path,
) -> None:
    run_fields = small(tmp_path)
    text = run_fields.fields["text"]
    batch = text.encode_values(["red", "light dark", "green red blue", ""])
    assert (batch.values == 0).tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
        [True, True, True],
    ]
    assert batch.valid.all()
    assert batch.scored.all()
    assert batch.counted.sum(-1).tolist() == [2, 3, 3, 1]


def test_decoded_texts_end_before_the_first_end_mark(tmp_path: Path) -> None:
    text = small(tmp_path).fields["text"]
    texts = ["red", "light dark", "green red blue", ""]
    batch = text.encode_values(texts)
    assert [found["text"] for found in text.decode(batch.values)] == texts
    noisy = batch.values.clone()
    noisy[0, 2] = 1
    assert text.decode(noisy)[0]["text"] == "red"
    assert text.decode(noisy)[0]["ids"] == batch.values[0, :1].tolist()


def test_text_that_is_too_long_is_refused_or_cut(tmp_path: Path) -> None:
    message = r'Column "text", train sample 2 has 3 tokens.*length = 2.*Set .* length = 3'
    with pytest.raises(DataError, match=message):
        small(tmp_path, "fields.text.length=2").read()
    run_fields = small(tmp_path, "fields.text.length=2", 'fields.text.long="cut"')
    text = run_fields.fields["text"]
    found = text.decode(text.encode([2], TRAIN).values)[0]["text"]
    whole = make_table(40, 0).read_texts("text", [2]).values[0]
    assert found == " ".join(whole.split()[:2])


def test_unknown_word_is_refused_with_the_number_of_its_sample(tmp_path: Path) -> None:
    text = small(tmp_path).fields["text"]
    with pytest.raises(DataError, match=r"given sample 1 holds 'cow'"):
        text.encode_values(["red", "red cow"])


def test_tokenizer_without_end_mark_refuses_shorter_texts(tmp_path: Path) -> None:
    run_fields = small(tmp_path, 'fields.text.tokenizer="alphabet"', "fields.text.length=40")
    with pytest.raises(DataError, match="no end mark"):
        run_fields.read()


@pytest.mark.parametrize("normalizer", ["none", "standard", "pca"])
def test_decoded_vectors_equal_the_data(tmp_path: Path, normalizer: str) -> None:
    """The tolerance covers rounding in float64 of numbers near 5."""
    settings = [f'fields.latent.normalizer={{kind="{normalizer}"}}']
    if normalizer == "pca":
        settings = ['fields.latent.normalizer={kind="pca", width=4}']
    latent = small(tmp_path, *settings).fields["latent"]
    numbers = [0, 1, 5]
    data = make_table(40, 0).read("latent", numbers).values
    batch = latent.encode(numbers, TRAIN)
    decoded = np.array([found["vectors"] for found in latent.decode(batch.values)])
    assert decoded == pytest.approx(data, abs=1e-12)
    assert torch.equal(latent.encode_values(data).values, batch.values)


def test_normalized_training_vectors_have_mean_zero_and_variance_one(tmp_path: Path) -> None:
    """Vectors of absent samples do not count."""
    batch = small(tmp_path).fields["latent"].encode(np.arange(40), TRAIN)
    present = batch.values[~batch.absent].reshape(-1, 4)
    assert present.mean(0).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert present.square().mean(0).tolist() == pytest.approx([1.0] * 4, abs=1e-12)


def test_pictures_are_drawn_in_data_units(tmp_path: Path) -> None:
    run_fields = small(tmp_path)
    batch = run_fields.validation_batch([3, 4])
    data = make_table(18, 1)
    pixels = run_fields.fields["latent"].draw(batch.fields["latent"].values)
    expected = PATCHES.pixels(data.read("latent", [3]).values[0])
    # rounding of the normalizer may move a value over the border of two grey levels
    assert np.abs(pixels[0].astype(int) - expected.astype(int)).max() <= 1
    levels = run_fields.fields["image"].draw(batch.fields["image"].values)
    assert levels[1].shape == (2, 4, 3)
    with pytest.raises(ArgumentError, match="no pictures"):
        run_fields.fields["text"].draw(batch.fields["text"].values)


def test_shapes_describe_the_fields_for_the_model(tmp_path: Path) -> None:
    fields = small(tmp_path).fields
    image, text, latent = (values.shape for values in fields.values())
    assert image.vocabulary is not None
    assert (image.vocabulary.num_tokens, image.width, image.positions) == (LEVELS, None, 8)
    assert text.vocabulary is not None
    assert (text.vocabulary.num_tokens, text.positions, text.grid) == (6, 3, None)
    assert (latent.vocabulary, latent.width, latent.positions) == (None, 4, 2)
    assert (image.grid, latent.grid) == ((2, 4), (1, 2))
    assert [values.unit for values in fields.values()] == ["pixel", "token", "number"]


def test_token_counts_of_rows_are_those_of_present_training_samples(tmp_path: Path) -> None:
    run_fields = small(tmp_path)
    image = run_fields.fields["image"]
    ids, present = make_table(40, 0).read("image", np.arange(40))
    assert image.rows.token_counts().tolist() == np.bincount(ids[present].ravel()).tolist()
    text = run_fields.fields["text"]
    counts = text.rows.token_counts()
    present_texts = make_table(40, 0).read_texts("text", np.arange(40)).present
    assert counts.sum() == 3 * present_texts.sum()


def test_vocabulary_of_image_levels_may_be_a_tree(tmp_path: Path) -> None:
    setting = 'fields.image.vocabulary={kind="clusters", sizes=[3], width=4}'
    image = small(tmp_path, setting).fields["image"]
    assert isinstance(image.vocabulary, HierarchicalVocabulary)
    assert image.vocabulary.level_sizes == (LEVELS, 3, 1)
    assert image.encode([0], TRAIN).values.max() < LEVELS


# ---------------------------------------------------------------------- files


def test_saved_fields_encode_and_decode_equally_without_reading_data(tmp_path: Path) -> None:
    setting = 'fields.image.vocabulary={kind="clusters", sizes=[3], width=4}'
    recipe = read_small(tmp_path, setting)
    first = RunFields(recipe)
    first.save(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "fields").iterdir()}
    assert names == {"image", "text", "latent"}
    loaded = RunFields(recipe, tmp_path / "run")
    assert loaded.component_fingerprints() == first.component_fingerprints()
    batch = first.validation_batch([5, 6])
    for name, values in loaded.fields.items():
        states = batch.fields[name].values
        assert values.decode(states) == first.fields[name].decode(states)
        assert values.shape.positions == first.fields[name].shape.positions
        assert values.shape.grid == first.fields[name].shape.grid
    given = loaded.fields["text"].encode_values(["red blue"])
    assert torch.equal(given.values, first.fields["text"].encode_values(["red blue"]).values)
    vectors = np.ones((1, 2, 4))
    latent = loaded.fields["latent"].encode_values(vectors)
    assert torch.equal(latent.values, first.fields["latent"].encode_values(vectors).values)
    # the data were not read until now
    assert "_stored_documents" not in vars(loaded)
    again = loaded.validation_batch([5, 6])
    assert all(torch.equal(one, other) for one, other in zip(tensors(again), tensors(batch)))
    assert loaded.fingerprints() == first.fingerprints()


def test_saved_normalizer_is_not_fitted_to_other_data(tmp_path: Path) -> None:
    first = small(tmp_path)
    first.save(tmp_path / "run")
    other = RunFields(read_small(tmp_path, train=20), tmp_path / "run")
    assert other.component_fingerprints() == first.component_fingerprints()
    assert other.data_fingerprints() != first.data_fingerprints()


def test_damaged_normalizer_is_named(tmp_path: Path) -> None:
    run_fields = small(tmp_path)
    run_fields.save(tmp_path / "run")
    path = tmp_path / "run" / "fields" / "latent" / "normalizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"normalizer\.safetensors is not a complete file"):
        assert RunFields(run_fields.recipe, tmp_path / "run").fields


def test_fitted_normalizer_is_shared_by_all_processes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_small(tmp_path)
    first = RunFields(recipe).component_fingerprints()

    def fail(chunks: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("ddiff.core.normalizer.MeanStdNormalizer.fit", fail)
    assert RunFields(recipe).component_fingerprints() == first


# ---------------------------------------------------------------------- values on a grid

ON_GRID = (
    'fields.latent.process={kind="gaussian", decoder="grid", values=[-1.0, 1.0]}',
    'fields.latent.normalizer="none"',
)


def test_vectors_on_a_grid_keep_their_units_at_every_scale(tmp_path: Path) -> None:
    """The deviation of these vectors is 0.34. The normalizer "none" refuses others below 0.5."""
    run_fields = small(tmp_path, *ON_GRID, values=(-1.0, 1.0))
    normalizer = run_fields.fields["latent"].normalizer
    assert normalizer is not None
    assert normalizer.log_volume == 0.0
    batch = run_fields.fields["latent"].encode(np.arange(40), TRAIN)
    present = batch.values[~batch.absent]
    assert float(present.std()) < 0.5
    assert set(present.unique().tolist()) == {-1.0, 1.0}
    decoded = run_fields.fields["latent"].decode(batch.values[:2])
    assert decoded[1]["vectors"] == batch.values[1].tolist()
    run_fields.save(tmp_path / "run")
    assert RunFields(run_fields.recipe, tmp_path / "run").fields["latent"].width == 4
    with pytest.raises(ArgumentError, match=r"between 0\.5 and 2\.0"):
        assert small(tmp_path, ON_GRID[1], values=(-1.0, 1.0)).fields


@pytest.mark.parametrize("values", [(-1.0, 0.5), ()])
def test_vectors_that_are_not_on_the_grid_are_refused(
    tmp_path: Path, values: tuple[float, ...]
) -> None:
    message = r'Column "latent", train samples: .*one of the 2 values, from -1 to 1; got'
    with pytest.raises(DataError, match=message):
        assert small(tmp_path, *ON_GRID, values=values).fields


def test_grid_is_checked_on_validation_samples_too(tmp_path: Path) -> None:
    run_fields = small(tmp_path, *ON_GRID, values=(-1.0, 1.0))
    other = small(tmp_path, values=(-1.0, 0.5)).documents.validation
    # A replaced cached property.
    vars(run_fields)["documents"] = dataclasses.replace(run_fields.documents, validation=other)
    with pytest.raises(DataError, match=r"validation samples: .*got 0\.5"):
        assert run_fields.fields


@pytest.mark.parametrize("normalizer", ['"standard"', '{kind="pca", width=2}'])
def test_grid_with_a_normalizer_is_refused_without_reading_data(
    tmp_path: Path, normalizer: str
) -> None:
    run_fields = small(tmp_path, ON_GRID[0], f"fields.latent.normalizer={normalizer}")
    message = r'\[fields.latent\] normalizer must be "none".*Set normalizer = "none"'
    with pytest.raises(DataError, match=message):
        preview_fields(run_fields.recipe)
    with pytest.raises(DataError, match=message):
        assert run_fields.fields


# ---------------------------------------------------------------------- mistakes


def test_fields_without_column_and_columns_without_field_are_listed(tmp_path: Path) -> None:
    recipe = RECIPE.replace("[fields.image]", "[fields.picture]")
    message = r'Fields without column: "picture"\. Columns without field: "image"'
    run_fields = RunFields(read_small(tmp_path, text=recipe))
    with pytest.raises(DataError, match=message):
        run_fields.batch_at(0, 0)
    with pytest.raises(DataError, match=message):
        preview_fields(run_fields.recipe)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('fields.image.tokenizer="words"', r"\[fields.image\] must have no tokenizer.*8 of 6"),
        ("fields.image.length=2", r"\[fields.image\] must have no length.*8 of 6"),
    ],
)
def test_keys_that_do_not_fit_the_column_are_refused(
    tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        assert small(tmp_path, setting).documents


TOKENS = 'process = "mdlm"\n'
VECTORS = RECIPE.partition("[fields.latent]\n")[2].partition("[denoiser]")[0]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("image", VECTORS, r'"gaussian" is not for tokens.*8 of 6 tokens'),
        ("latent", TOKENS, r'"mdlm" is not for vectors.*2 vectors of 4 numbers'),
    ],
)
def test_process_of_the_other_kind_is_refused(
    tmp_path: Path, name: str, wrong: str, message: str
) -> None:
    right = TOKENS if wrong == VECTORS else VECTORS
    text = RECIPE.replace(f"[fields.{name}]\n{right}", f"[fields.{name}]\n{wrong}")
    run_fields = RunFields(read_small(tmp_path, text=text))
    with pytest.raises(DataError, match=rf"\[fields.{name}\].*{message}"):
        assert run_fields.documents


@pytest.mark.parametrize(
    ("line", "message"),
    [('tokenizer = "words"\n', "needs a tokenizer"), ("length = 3\n", "needs length")],
)
def test_missing_keys_of_a_text_field_are_named(tmp_path: Path, line: str, message: str) -> None:
    recipe = read_small(tmp_path, text=RECIPE.replace(line, ""))
    with pytest.raises(DataError, match=rf"\[fields.text\] {message}"):
        assert RunFields(recipe).documents


def test_given_values_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    fields = small(tmp_path).fields
    with pytest.raises(ArgumentError, match=r'"latent".*\[k,2,4\].*got float64 \[1, 2, 5\]'):
        fields["latent"].encode_values(np.ones((1, 2, 5)))
    with pytest.raises(ArgumentError, match="finite"):
        fields["latent"].encode_values(np.full((1, 2, 4), np.nan))
    with pytest.raises(ArgumentError, match=r'"image".*in 0\.\.5 of shape \[k,8\]'):
        fields["image"].encode_values([[6] * 8])


# ---------------------------------------------------------------------- dry runs


def test_preview_has_the_shapes_of_the_built_fields(tmp_path: Path) -> None:
    settings = ('fields.text.tokenizer={kind="bpe", size=257}', "fields.text.length=30")
    recipe = read_small(tmp_path, *settings)
    preview = preview_fields(recipe)
    assert preview is not None
    for name, values in RunFields(recipe).fields.items():
        found = preview[name]
        assert found._replace(vocabulary=None) == values.shape._replace(vocabulary=None)
        if found.vocabulary is not None:
            assert values.vocabulary is not None
            assert found.vocabulary.level_sizes == values.vocabulary.level_sizes


def test_preview_is_unknown_if_the_number_of_words_is_unknown(tmp_path: Path) -> None:
    assert preview_fields(read_small(tmp_path)) is None


# ---------------------------------------------------------------------- computed vectors

COMPUTED = RECIPE.replace("[fields.latent]\n", '[fields.latent]\nencode = "text"\n').replace(
    "[denoiser]", '[encoder]\nkind = "cooccurrence"\ndim = 3\n[denoiser]'
)


def computed(folder: Path) -> RunFields:
    return RunFields(read_small(folder, text=COMPUTED, without=("latent",)))


def test_vectors_of_a_text_field_are_computed_and_marked(tmp_path: Path, cache: Path) -> None:
    run_fields = computed(tmp_path)
    latent = run_fields.fields["latent"]
    assert isinstance(latent, VectorValues)
    assert latent.computed_from == "text"
    assert (latent.positions, latent.width) == (1, 3)
    text = run_fields.fields["text"]
    assert isinstance(text, TextValues)
    for part, count in ((TRAIN, 40), (VALIDATION, 18)):
        batch = latent.encode(np.arange(count), part)
        assert torch.equal(batch.absent, text.encode(np.arange(count), part).absent)
        assert batch.values.isfinite().all()
        assert not batch.values[batch.absent].any()
    # equal texts have equal vectors
    texts = run_fields.documents.train.read_texts("text", np.arange(40)).values
    first = texts.index("red") if "red" in texts else 0
    same = [number for number, found in enumerate(texts) if found == texts[first]]
    vectors = latent.encode(same, TRAIN).values
    assert (vectors == vectors[:1]).all()
    # a second run opens the finished folder
    files = sorted((cache / "encoded_fields").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    assert computed(tmp_path).fingerprints() == run_fields.fingerprints()
    assert [file.stat().st_mtime_ns for file in files] == times


def test_encoder_of_tokens_gives_a_field_one_position_per_token(
    tmp_path: Path, cache: Path
) -> None:
    recipe = read_small(tmp_path, text=COMPUTED, without=("latent",))
    component = Component("encoder", "hash", "hash_encoder:HashTokenEncoder", UNPACKAGED)
    spec = ComponentSpec(component, HashTokenEncoder.Config(positions=4), "[encoder]")
    run_fields = RunFields(dataclasses.replace(recipe, encoder=spec))
    latent = run_fields.fields["latent"]
    assert (latent.positions, latent.width) == (4, DIM)
    texts = run_fields.documents.train.read_texts("text", np.arange(40)).values
    found = run_fields.documents.train.read("latent", np.arange(40))
    assert found.present.tolist() == [bool(text) for text in texts]
    for text, vectors in zip(texts, found.values):
        words = text.split()
        expected = [hash_vector(word) for word in words]
        assert np.array_equal(vectors[: len(words)], np.reshape(expected, (-1, DIM)))
        assert not vectors[len(words) :].any()
    batch = latent.encode(np.arange(40), TRAIN)
    assert batch.values.shape == (40, 4, DIM)
    # zeros after the last token are part of the field, so that they do not show the length
    assert batch.valid.all()


def test_damaged_or_unfinished_vectors_are_computed_again(tmp_path: Path, cache: Path) -> None:
    first = computed(tmp_path)
    batch = first.fields["latent"].encode([0, 1], TRAIN)
    (folder,) = (cache / "encoded_fields").iterdir()
    for name in ("train_00000.safetensors", "manifest.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-8])
        again = computed(tmp_path).fields["latent"].encode([0, 1], TRAIN)
        assert torch.equal(again.values, batch.values)
        (folder / name).unlink()
        again = computed(tmp_path).fields["latent"].encode([0, 1], TRAIN)
        assert torch.equal(again.values, batch.values)


def test_run_with_computed_vectors_is_loaded_without_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fields = computed(tmp_path)
    run_fields.save(tmp_path / "run")

    def fail(*_: Any) -> None:
        raise AssertionError("the encoder was built")

    monkeypatch.setattr("ddiff.runs.fields.encoded.build_encoder", fail)
    loaded = RunFields(run_fields.recipe, tmp_path / "run")
    latent = loaded.fields["latent"]
    assert latent.computed_from == "text"
    states = torch.zeros(1, 1, 3, dtype=torch.float64)
    assert latent.decode(states) == run_fields.fields["latent"].decode(states)


# ---------------------------------------------------------------------- bundled digits


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_decoded_digit_patches_draw_the_bundled_digits(tmp_path: Path, patch: int) -> None:
    """Encoded and decoded patches have the pixels of the data, up to one grey level of 255."""
    text = RECIPE.replace(
        'data = "digits"', f'data = {{kind = "digits", image = "patches", patch = {patch}}}'
    )
    text = text.replace(f"[fields.image]\n{TOKENS}", "").replace(
        "[fields.latent]", "[fields.image]"
    )
    path = tmp_path / "digits.toml"
    path.write_text(text)
    recipe = read_recipe(path)
    assert isinstance(recipe, FieldsRecipe)
    run_fields = RunFields(recipe)
    numbers = np.arange(20)
    image = run_fields.fields["image"]
    drawn = image.draw(run_fields.validation_batch(numbers).fields["image"].values)
    _, validation = load_digits()
    expected = np.rint(255 * validation.levels[:20] / 16).reshape(20, 8, 8)
    assert np.abs(np.stack(drawn)[..., 0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("path", "noted"),
    [
        (shared_path(["text", "latent"]), {"text", "latent"}),
        # Sampling draws the vector first: the text moves while the vector is clean.
        (first_path(["latent", "text"]), {"text"}),
        (first_path(["text", "latent"]), {"latent"}),
        (given_path(shared_path(["text", "latent"]), {"latent": "clean"}), {"text"}),
        (given_path(shared_path(["text", "latent"]), {"text": "clean"}), {"latent"}),
        (given_path(shared_path(["text", "latent"]), {"text": "prior"}), set()),
        (given_path(shared_path(["text", "latent"]), {"latent": "absent"}), set()),
    ],
)
def test_describe_own_vectors_notes_fields_that_move_while_the_other_one_is_known(
    path: LegPath, noted: set[str]
) -> None:
    assert set(describe_own_vectors(path, {"latent": "text"})) == noted
    assert describe_own_vectors(path, {}) == {}
