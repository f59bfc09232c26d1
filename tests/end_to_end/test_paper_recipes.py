"""Recipes of published models: token counts, parameter counts, and training at reduced size."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddiff
import ddiff.runs.initial_weights
from ddiff.core.rng import CounterRng
from ddiff.distributed.single import SingleBackend
from ddiff.errors import DataError
from ddiff.evaluation.likelihood import Evaluation
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.model import diff_recipes
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.evaluation_record import make_figures
from ddiff.runs.build import assemble
from ddiff.runs.data import RunData
from ddiff.runs.evaluation import (
    evaluation_protocol,
    find_given_own_vectors,
    score_validation,
)
from ddiff.runs.measure import measure
from ddiff.runs.record import record_run
from ddiff.runs.session import TrainingSession, build_run

PAPER = sorted(name for name in find_shipped_recipes() if name.startswith("paper/"))
CONDITIONED = ["paper/latent_cross", "paper/latent_dit"]
FIELDS = [name for name in PAPER if name.startswith(("paper/image_", "paper/mmdit"))]
TEXT = [name for name in PAPER if name not in FIELDS + CONDITIONED]
WIDTH, LENGTH, WORDS = 32, 16, 300
DIM = 4  # numbers of a vector
SMALL = [
    f'data={{kind="text", files=["train.txt"], validation=["validation.txt"], length={LENGTH}}}',
    f'tokenizer={{kind="bpe", size={WORDS}}}',
    "backend={kind='single', device='cpu', processes=1, compile=false}",
    "train.steps=2",  # the learning rate of the last step of a cosine schedule is 0
    "train.batch=2",
]
DIT = [f"denoiser.width={WIDTH}", "denoiser.layers=1", "denoiser.heads=2"]
LLAMA = [
    f"hidden_size={WIDTH}",
    "num_hidden_layers=1",
    "num_attention_heads=2",
    "intermediate_size=64",
]
SHRUNK = (
    "data.*",
    "tokenizer.*",
    "backend.*",
    "train.steps",
    "train.batch",
    "denoiser.*",
    "run_dir",
)
KEPT = (
    "denoiser.kind",
    "denoiser.time",
    "denoiser.dropout",
    "denoiser.given",
    "denoiser.head.kind",
)


def small(name: str) -> list[str]:
    """Return the settings that reduce the sizes of a recipe of text."""
    if "llama" in name:
        return [*SMALL, *(f"denoiser.settings.{key}" for key in LLAMA)]
    if name in CONDITIONED:
        data = f"data={{kind='vector_files', path='vectors', dim={DIM}, length={LENGTH}}}"
        conditions = [f"denoiser.conditions.latent.width={DIM}", "denoiser.condition_width=8"]
        return [*SMALL, data, *DIT, *conditions]
    return [*SMALL, *DIT]


def embeddings(source: str, num_tokens: int) -> np.ndarray:
    """Return random embeddings; replaces the function that loads those of a pretrained model."""
    return np.random.default_rng(0).standard_normal((num_tokens, WIDTH)).astype(np.float32)


def write_vectors(folder: Path, text: str) -> None:
    """Write 40 texts with vectors in the two published layouts."""
    (folder / "latent_shards").mkdir(parents=True)
    texts = [text[start : start + 300] for start in range(0, 12000, 300)]
    vectors = np.random.default_rng(0).standard_normal((len(texts), DIM)).astype(np.float32)
    np.save(folder / "latent_shards" / "shard_0000.npy", vectors)
    manifest = []
    lines = []
    for number, part in enumerate(texts):
        np.save(folder / f"{number}.npy", vectors[number])
        manifest.append({"text": part, "latent_path": f"{number}.npy"})
        lines.append(json.dumps({"text": part, "shard": 0, "idx": number}))
    for part, numbers in (("train", slice(32)), ("validation", slice(32, None))):
        (folder / f"{part}_data.json").write_text(json.dumps(manifest[numbers]))
        (folder / f"{part}_data.jsonl").write_text("\n".join(lines[numbers]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a small text and a shared cache; pretrained embeddings are random there."""
    folder = tmp_path_factory.mktemp("paper")
    novels = ddiff.load_bundled_novels()
    (folder / "train.txt").write_text(novels.train["text"][0][:6000], encoding="utf-8")
    (folder / "validation.txt").write_text(novels.validation["text"][0][:500], encoding="utf-8")
    write_vectors(folder / "vectors", novels.train["text"][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        patch.setattr(ddiff, "load_model_embeddings", embeddings)
        patch.setattr(ddiff.runs.initial_weights, "load_model_embeddings", embeddings)
        yield folder


@pytest.mark.usefixtures("no_sync_guard")
@pytest.mark.parametrize("name", TEXT + CONDITIONED)
def test_paper_recipe_training_step_does_not_synchronize_with_device(
    name: str, place: Path
) -> None:
    run = build_run(read_recipe(name, small(name)), SingleBackend())
    run.objective.module.to("meta")
    batch = run.data.batch_at(0, 0)
    counts = run.objective.counts(batch)
    run.objective(
        batch, CounterRng(0, 0, batch.index, LENGTH), counts, len(batch.index)
    ).loss.backward()
    assert all(parameter.grad is not None for parameter in run.denoiser.head.parameters())


@pytest.mark.parametrize("name", TEXT + CONDITIONED)
def test_paper_recipe_with_reduced_sizes_trains(name: str, place: Path) -> None:
    recipe = read_recipe(name, small(name))
    published = read_recipe(name)
    changed = {key for key, _, _ in diff_recipes(published.to_dict(), recipe.to_dict())}
    assert not {
        key
        for key in changed
        if not any(fnmatch.fnmatch(key, shrunk) for shrunk in SHRUNK) or key in KEPT
    }

    if (
        (init := recipe.train.init) is not None
        and init.run is not None
        and not Path(init.run).exists()
    ):
        source = Path(init.run).name.replace("paper_", "paper/")
        train(source)
    before, after, loss = train(name)
    assert 0 < loss < math.inf
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_text_given_its_own_vector_has_no_perplexity(place: Path) -> None:
    recipe = require_text_recipe(read_recipe(CONDITIONED[1], small(CONDITIONED[1])), "test")
    session = TrainingSession.open(recipe)
    session.initialize_weights()
    run = session.run
    found = score_validation(run.model, run.data, recipe)
    assert found.ppl is None
    assert found.bits_per_byte is None
    assert "given its own vector (latent): no likelihood of the text" in repr(found)
    assert found.protocol["own_vectors"] == ["latent"]
    assert evaluation_protocol(run.data, recipe)["own_vectors"] == ["latent"]
    assert Evaluation.from_dict(found.to_dict()) == found
    written = {**found.to_dict(), "baselines": {}}
    assert not {"ppl", "bits_per_byte"} & set(make_figures(written))


def test_nelbo_of_texts_given_their_own_vectors_has_no_perplexity(
    place: Path, tmp_path: Path
) -> None:
    recipe = require_text_recipe(read_recipe(CONDITIONED[1], small(CONDITIONED[1])), "test")
    session = TrainingSession.open(recipe)
    session.initialize_weights()
    run = session.run
    width = run.denoiser.condition_forms["latent"].width
    texts = list(run.data.documents.validation["text"][:1])
    found = run.nelbo(texts, draws=1, conditions={"latent": [0.5] * width})
    assert found.ppl is None
    assert found.bits_per_byte is None
    assert found.protocol["own_vectors"] == ["latent"]
    assert "given its own vector (latent)" in repr(found)
    # without the data set, evaluation.json tells which vectors are computed from the text
    recorded = {"protocol": {"own_vectors": ["latent"]}}
    (tmp_path / "evaluation.json").write_text(json.dumps(recorded))
    given = {"latent": [], "other": []}
    assert find_given_own_vectors(MissingData(), tmp_path, given) == ["latent"]
    (tmp_path / "evaluation.json").unlink()
    assert find_given_own_vectors(MissingData(), tmp_path, given) == []


class MissingData(RunData):
    """Data of a run that was copied without its data set."""

    def __init__(self) -> None:
        pass

    @property
    def documents(self) -> Any:
        raise DataError("the data set is missing")


@pytest.mark.parametrize("name", CONDITIONED)
def test_measure_uses_random_tokens_and_vectors_without_the_data(name: str, place: Path) -> None:
    tokenizer = f"tokenizer={{kind='pretrained', path='missing', size={WORDS}}}"
    recipe = read_recipe(name, [*small(name), tokenizer, "data.path=missing"])
    measured = measure(require_text_recipe(recipe, "test"), 2)
    assert "missing" in measured.stand_in
    assert math.isfinite(measured.first_loss)
    assert not measured.is_off


def train(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Train a recipe; return (weights before training, weights after training, first loss)."""
    recipe = read_recipe(name, small(name))
    session = TrainingSession.open(recipe)
    init = session.initialize_weights()
    run = session.run
    before = {key: value.clone() for key, value in run.denoiser.state_dict().items()}
    summary = session.fit(accepted=lambda: record_run(run, session.backend, init))
    assert (summary.step, summary.skipped_steps) == (2, 0)
    line = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    return before, run.denoiser.state_dict(), line["train_loss"]


@pytest.mark.parametrize("name", TEXT)
def test_paper_recipe_has_the_published_token_count(name: str) -> None:
    """The number of training tokens is steps x batch x length."""
    recipe = read_recipe(name)
    tokens = recipe.train.steps * recipe.train.batch * recipe.length
    expected = {512: {131e9}, 128: {66e9}, 1024: {524e9, 682e9, 262e9}}[
        recipe.length
    ]  # 262e9: the recipe with gamma and batch 256
    assert any(abs(tokens / value - 1) < 0.01 for value in expected)
    assert name.removeprefix("paper/") == recipe.name.removeprefix("paper_")


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        # All blocks of ddiff share one time modulation. Each block of the published models has a
        # modulation of its size, 6 x 128 x width parameters.
        ("mdlm_small", 169.7, 0.045),
        ("hdlm_small_64", 169.9, 0.045),
        ("hdlm_base_128", 424.8, 0.045),
        ("mdlm_1b", 1453.0, 0.03),
        ("ar_small_llama", 190.5, 0.001),
    ],
)
def test_paper_recipe_has_the_published_parameter_count(
    name: str, millions: float, tolerance: float
) -> None:
    recipe = read_recipe(f"paper/{name}")
    vocabulary = recipe.vocabulary.preview(num_tokens=recipe.tokenizer.preview())
    denoiser = assemble(recipe, vocabulary, torch.device("meta")).denoiser
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=tolerance)
