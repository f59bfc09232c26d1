"""Recipe keys `[train] init` (weights of another run or model) and `prefix` (clean prefixes)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FLAT, working_in

import ddiff as api
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError, RecipeError
from ddiff.nn.embedding import StateEmbedding
from ddiff.recipe.resolve import read_recipe
from ddiff.runs.initial_weights import start_from_cooccurrence
from ddiff.runs.session import TrainingSession

SHORT = ["train.steps=4", "evaluate.draws=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with two trained runs.

    runs/flat: masked diffusion with a token head. runs/tree: two tree levels, level-wise head.
    """
    folder = tmp_path_factory.mktemp("tuning")
    with working_in(folder):
        api.run("small.toml", settings=[*SHORT, *FLAT, 'name="flat"', "train.steps=12"])
        api.run("small.toml", settings=[*SHORT, 'name="tree"'])
        yield folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("DDIFF_CACHE", str(place / "cache"))


def initialized(*settings: str) -> tuple[api.Run, dict[str, Any]]:
    """Return an untrained run with its initial weights, and its record of the key [train] init."""
    session = TrainingSession.open(read_recipe("small.toml", [*SHORT, *settings]))
    init = session.initialize_weights()
    return session.run, init or {}


def weights(name: str) -> dict[str, torch.Tensor]:
    return Checkpoints(f"runs/{name}/checkpoints").read_weights()


@pytest.mark.slow
def test_init_from_run_with_same_vocabulary_copies_every_tensor() -> None:
    run, init = initialized(*FLAT, 'train.init={run="runs/flat"}')
    state = run.denoiser.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights("flat").items())
    assert init["step"] == 12
    assert init["anew"] == []


@pytest.mark.slow
def test_init_of_cluster_embeddings_is_the_mean_of_token_embeddings() -> None:
    run, init = initialized('train.init={run="runs/flat"}')
    theirs = weights("flat")
    state, vocabulary = run.denoiser.state_dict(), run.vocabulary
    words, old = vocabulary.num_tokens, theirs["backbone.embedding.weight"]
    table = state["backbone.embedding.weight"]
    assert torch.equal(table[:words], old[:words])
    assert torch.equal(table[vocabulary.mask_id], old[-1])
    cluster = vocabulary.parent(torch.arange(words))
    for node in cluster.unique().tolist():
        torch.testing.assert_close(table[node], old[:words][cluster == node].mean(0))
    assert torch.equal(
        state["backbone.blocks.0.qkv.weight"], theirs["backbone.blocks.0.qkv.weight"]
    )
    assert set(init["by_word"]) == {"backbone.embedding.weight", "head.table", "head.bias"}


@pytest.mark.slow
def test_init_from_flat_vocabulary_keeps_distribution_within_clusters() -> None:
    """The distribution within a cluster is the softmax of the old logits over its tokens.

    The hidden states are random.
    """
    run, _ = initialized('train.init={run="runs/flat"}')
    theirs = weights("flat")
    vocabulary, hidden = (
        run.vocabulary,
        torch.randn(5, 16, generator=torch.Generator().manual_seed(0)),
    )
    logits = hidden @ theirs["head.table"].T + theirs["head.bias"]
    cluster = vocabulary.parent(torch.arange(vocabulary.num_tokens))
    for node in cluster.unique().tolist():
        probs = run.denoiser.head.query(
            hidden, torch.full((5,), node), lambda dist, idx: dist.log_below(0).exp()
        )
        first = int(vocabulary.node_range(torch.tensor(node), 0)[0])
        below = vocabulary.order(0)[first : first + probs.shape[1]]
        assert set(below.tolist()) == set((cluster == node).nonzero().squeeze(-1).tolist())
        torch.testing.assert_close(probs, logits[:, below].softmax(-1))


@pytest.mark.slow
def test_init_of_embeddings_changes_no_other_weights() -> None:
    run, _ = initialized('train.init={run="runs/flat", parts="embeddings"}')
    plain, _ = initialized()
    theirs = weights("flat")
    words = run.vocabulary.num_tokens
    for name, value in run.denoiser.state_dict().items():
        if name == "backbone.embedding.weight":
            assert torch.equal(value[:words], theirs[name][:words])
        else:
            assert torch.equal(value, plain.denoiser.state_dict()[name]), name


@pytest.mark.slow
def test_init_from_run_with_another_head_starts_the_head_from_unigram_counts() -> None:
    run, init = initialized(*FLAT, 'train.init={run="runs/tree"}')
    plain, _ = initialized(*FLAT)
    assert init["anew"] == ["head.table", "head.bias"]
    assert torch.equal(run.denoiser.head.bias, plain.denoiser.head.bias)
    mask, theirs = run.denoiser.state_dict()["backbone.embedding.weight"][-1], weights("tree")
    assert torch.equal(mask, theirs["backbone.embedding.weight"][-1])


@pytest.mark.slow
def test_resume_works_after_the_run_of_the_initial_weights_is_deleted(place: Path) -> None:
    settings = [*SHORT, *FLAT, 'name="tuned"', 'train.init={run="runs/flat"}']
    api.run("small.toml", settings=settings)
    recorded = json.loads(Path("runs/tuned/environment.json").read_text())["init"]
    assert (recorded["run"], recorded["parts"], recorded["step"]) == ("runs/flat", "all", 12)
    first = [
        json.loads(line)["train_loss"]
        for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()
    ]
    Path("runs/flat").rename("runs/elsewhere")
    try:
        api.run("small.toml", settings=[*settings, "train.steps=6"])
    finally:
        Path("runs/elsewhere").rename("runs/flat")
    lines = Path("runs/tuned/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_loss"] for line in lines[:4]] == first
    assert len(lines) == 6
    assert json.loads(Path("runs/tuned/environment.json").read_text())["init"] == recorded


@pytest.mark.slow
def test_init_from_pretrained_model_copies_token_embeddings(tmp_path: Path) -> None:
    """A token gets its row of the pretrained table, and a cluster the mean over its tokens.

    A pretrained model of another width is refused.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "model")
    run, init = initialized(f"train.init={{model='{tmp_path / 'model'}', parts='embeddings'}}")
    table, theirs = (
        run.denoiser.state_dict()["backbone.embedding.weight"],
        model.get_input_embeddings().weight.detach(),
    )
    words = run.vocabulary.num_tokens
    assert torch.equal(table[:words], theirs[:words])
    for node in (words, words + 3):
        members = (run.vocabulary.parent(torch.arange(words)) == node).nonzero().squeeze(-1)
        torch.testing.assert_close(table[node], theirs[members].mean(0))
    assert init == {
        "model": str(tmp_path / "model"),
        "parts": "embeddings",
        "tokenizer": run.tokenizer.fingerprint,
    }
    with pytest.raises(
        ArgumentError, match="embeddings of width 16, but the network of this run has 32"
    ):
        initialized(f"train.init={{model='{tmp_path / 'model'}'}}", "denoiser.width=32")


def test_train_init_requires_exactly_one_of_keys_run_and_model() -> None:
    for init in ("{parts='all'}", "{run='a', model='b'}"):
        with pytest.raises(
            RecipeError, match='exactly one of the keys "run" and "model" must be given'
        ):
            read_recipe("small.toml", [f"train.init={init}"])


def test_cosine_learning_rate_ends_at_the_floor_of_the_recipe() -> None:
    session = TrainingSession.open(read_recipe("small.toml", [*SHORT, "train.floor=0.25"]))
    multiplier = session.trainer().multiplier
    assert multiplier(3) == pytest.approx(0.25)


# ---------------------------------------------------------------------- prompts in training


@pytest.mark.slow
def test_train_prefix_key_sets_the_fraction_of_rows_with_a_prefix() -> None:
    """Half of the rows have a prefix of clean tokens, of uniformly random length 0 to 7.

    In 256 rows of 8 tokens, 256 * 1/2 * 7/8 = 112 prefixes of length > 0 are expected. The
    tolerance 32 is four standard deviations.
    """
    run, _ = initialized("train.prefix=0.5", "train.batch=256")
    batch = run.data.batch_at(3, 0)
    shown = (batch.valid & ~batch.scored).sum(-1)
    assert 112 - 32 < int((shown > 0).sum()) < 112 + 32
    assert set(shown.tolist()) == set(range(8))
    positions = torch.arange(8)
    assert torch.equal(batch.valid & ~batch.scored, batch.valid & (positions < shown.unsqueeze(-1)))
    assert torch.equal(batch.scored, run.data.batch_at(3, 0).scored)
    assert not torch.equal(batch.scored, run.data.batch_at(4, 0).scored)


@pytest.mark.slow
def test_prefix_tokens_are_clean_and_not_scored() -> None:
    run, _ = initialized("train.prefix=1.0", "train.batch=64")
    batch = run.data.batch_at(0, 0)
    drawn = run.objective._draw(
        batch, CounterRng(run.recipe.seed, 0, batch.index, run.recipe.length), 64
    )
    prefix = batch.valid & ~batch.scored
    assert bool(prefix.any())
    assert bool(drawn.noisy.clean[prefix].all())
    assert torch.equal(drawn.noisy.zt[prefix], batch.ids[prefix])
    assert not set(drawn.rows.tolist()) & set(prefix.reshape(-1).nonzero().squeeze(-1).tolist())
    assert int(run.objective.counts(batch)["tokens"]) == int(batch.scored.sum())


def test_cooccurrence_embeddings_have_norm_1_and_clusters_their_mean() -> None:
    run, _ = initialized('train.embeddings="cooccurrence"')
    (table,) = [m for m in run.denoiser.backbone.modules() if isinstance(m, StateEmbedding)]
    num_tokens = run.vocabulary.num_tokens
    ids, document = run.data.train_rows.stream()
    counted = api.compute_cooccurrence_embeddings(
        ids, document, num_tokens, width=table.embedding_dim
    )
    expected = torch.nn.functional.normalize(torch.from_numpy(counted), dim=1)
    # A token without neighbours in its document has no co-occurrences, although it occurs.
    has_counts = expected.norm(dim=1) > 0.5
    assert 0 < int(has_counts.sum()) < num_tokens
    torch.testing.assert_close(table.weight[:num_tokens][has_counts], expected[has_counts])
    random, _ = initialized()
    (start,) = [m for m in random.denoiser.backbone.modules() if isinstance(m, StateEmbedding)]
    assert torch.equal(
        table.weight[:num_tokens][~has_counts], start.weight[:num_tokens][~has_counts]
    )
    cluster = run.vocabulary.offsets[1]
    members = run.vocabulary.ancestor(torch.arange(num_tokens), 1) == cluster
    mean = table.weight[:num_tokens][members].mean(0)
    torch.testing.assert_close(table.weight[cluster], mean, rtol=1e-5, atol=1e-6)


def test_cooccurrence_embeddings_need_a_table_of_embeddings() -> None:
    run, _ = initialized()
    run.denoiser.backbone = torch.nn.Identity()
    with pytest.raises(ArgumentError, match=r'\[train\] embeddings = "cooccurrence" needs a'):
        start_from_cooccurrence(run.denoiser, run.data.train_rows)
