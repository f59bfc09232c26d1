"""`ddiff eval --generate`: figures of samples of a run, under judges of both kinds."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from small import working_in
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ddiff as api
from ddiff.data.packing import pack_texts
from ddiff.errors import ArgumentError, CheckpointError, DataError
from ddiff.evaluation.judge_model import Scores, TransformersJudge
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import GENERATION, read_json
from ddiff.run_dir.generation_record import GENERATION_VERSION, GenerationRecord
from ddiff.runs.generation import (
    TokenSamples,
    evaluate_generation,
    generate_and_evaluate,
    read_held_out_rows,
)
from ddiff.runs.judge_run import RunJudge
from ddiff.runs.run import Run

LEFT = [
    'vocabulary={kind="flat"}',
    'objective={kind="ar"}',
    'denoiser.head="tokens"',
    'sample.sampler="left_to_right"',
    'name="left"',
    "train.steps=4",
    "data.length=16",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with `small`, an autoregressive run `left` and a run `uniform`, and a GPT-2 `gpt`."""
    folder = tmp_path_factory.mktemp("generation")
    with working_in(folder):
        recipe = Path("small.toml").read_text()
        api.run("small.toml", settings=["train.steps=4"])
        left = recipe.replace('[process]\nkind = "hdlm"\n', "").replace('"hdlm", "mdlm"', '"ar"')
        Path("left.toml").write_text(left)
        api.run("left.toml", settings=LEFT)
        uniform = recipe.replace('"hdlm", "mdlm"', '"gidd"')
        uniform = uniform.replace('kind = "hdlm"', 'kind = "gidd"').replace("levelwise", "tokens")
        Path("uniform.toml").write_text(uniform)
        settings = ['vocabulary={kind="flat"}', 'name="uniform"', "train.steps=4"]
        api.run("uniform.toml", settings=settings)
        save_gpt(folder / "gpt")
        yield folder


def save_gpt(folder: Path) -> None:
    words = ["<end>", "<unk>", "the", "old", "red", "cat", "hat", "sat", "on"]
    table = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=32,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def left(runs: Path) -> Run:
    return api.load("runs/left")


class ConstantJudge:
    """Judge that gives every token 2 nats."""

    name = "constant"
    protocol: Mapping[str, Any] = {"judge": "constant", "tokenizer": "that of the run"}

    def __init__(self, fingerprint: str) -> None:
        self.tokenizer_fingerprint: str | None = fingerprint

    def encode(self, documents: Sequence[str]) -> list[int]:
        raise AssertionError("nothing must be tokenized again")

    def score(self, rows: Sequence[Sequence[int]]) -> Scores:
        tokens = np.array([len(row) for row in rows])
        return Scores(2.0 * tokens, tokens)

    def features(self, rows: Sequence[Sequence[int]]) -> None:
        return None


# ---------------------------------------------------------------------- judges that are runs


def test_run_judge_equals_the_likelihood_of_the_run_for_single_documents(left: Run) -> None:
    texts = ["the old cat", "the red hat sat on the x"]
    rows = pack_texts(texts, left.tokenizer, left.recipe.length)
    assert len(rows) == 2  # so that no window is needed
    found = RunJudge(left).score([rows[[number]].ids[0].tolist() for number in range(2)])
    block = rows[np.arange(2)]
    scores = RunJudge(left).score(
        [block.ids[row, : block.num_valid[row]].tolist() for row in range(2)]
    )
    nelbo = left.nelbo(texts, draws=1)
    # both read the same rows; sums are in another order
    total = nelbo.nelbo_nats_per_token * nelbo.tokens
    assert scores.nats.sum() == pytest.approx(total, rel=1e-5)
    assert scores.tokens.sum() == nelbo.tokens
    assert found.tokens.sum() > scores.tokens.sum()  # padding was passed as tokens here


def test_run_judge_scores_a_document_after_an_end_mark_like_a_separate_sample(left: Run) -> None:
    judge = RunJudge(left)
    first, second = (judge.encode([text]) for text in ("the old", "red cat"))
    end = left.tokenizer.eos_id
    assert end is not None
    joined = judge.encode(["the old", "red cat"])
    assert joined == [*first, end, *second]
    apart = judge.score([[*first, end], second])
    assert judge.score([joined]).nats == pytest.approx([apart.nats.sum()], rel=1e-5)


def test_run_judge_scores_every_token_of_long_ragged_rows_once(left: Run) -> None:
    judge = RunJudge(left, stride=5)
    rows = [[3] * size for size in (0, 1, 15, 16, 17, 50)]
    found = judge.score(rows)
    assert found.tokens.tolist() == [0, 1, 15, 16, 17, 50]
    single = [judge.score([row]).nats[0] for row in rows]
    assert found.nats == pytest.approx(single, rel=1e-5)


def test_run_judge_refuses_a_run_with_only_a_bound(runs: Path) -> None:
    with pytest.raises(ArgumentError, match="exact likelihood"):
        RunJudge(api.load("runs/small"))


# ---------------------------------------------------------------------- the command


def test_generate_writes_and_prints_perplexity_with_entropy(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = generate_and_evaluate("runs/small", judge="runs/left", count=3)
    shown = capsys.readouterr().out
    saved = read_json(Path("runs/small") / GENERATION)
    assert saved == json.loads(record.to_json())
    assert saved["sampling"]["count"] == 3
    assert saved["sampling"]["length"] == 8
    assert saved["sampling"]["nfe"] > 0
    assert saved["sampling"]["sampler"]["temperature"] == 1.0
    assert saved["judge"]["samples"]["entropy_nats"] == saved["samples"]["entropy_nats"]
    for line in shown.splitlines():
        assert ("perplexity" in line) <= ("entropy" in line)
    assert "perplexity" in shown
    assert GENERATION not in classify_contents(Path("runs/small")).foreign


def test_equal_evaluations_differ_only_in_provenance(runs: Path) -> None:
    first, second = (
        dict(evaluate_generation(api.load("runs/small"), "runs/left", count=3).written)
        for _ in range(2)
    )
    assert first.pop("provenance").keys() == second.pop("provenance").keys()
    assert first == second
    assert "seconds" not in first["sampling"]


def test_record_has_fingerprints_and_origins_of_run_and_judge(runs: Path, left: Run) -> None:
    run = api.load("runs/small")
    record = GenerationRecord.from_tree(evaluate_generation(run, RunJudge(left), count=2).written)
    assert record.schema_version == GENERATION_VERSION
    evaluation = read_json(Path("runs/small/evaluation.json"))
    for name in ("weights", "tokenizer", "vocabulary", "validation rows"):
        assert record.fingerprints[name] == evaluation["fingerprints"][name]
    judge = read_json(Path("runs/left/evaluation.json"))["fingerprints"]
    assert record.fingerprints["judge"] == judge["weights"] != record.fingerprints["weights"]
    assert record.fingerprints["judge tokenizer"] == judge["tokenizer"]
    assert record.components == evaluation["components"]
    assert record.components["process"].startswith("hdlm (ddiff_hdlm, discrete-diffusion ")
    assert record.sampling.steps == 4
    assert record.sampling.sampler["kind"] == "ancestral"
    assert record.provenance.hardware["device"] == "cpu"
    assert record.provenance.seconds is not None


def test_fingerprint_of_a_transformers_judge_is_that_of_its_weights(
    runs: Path, tmp_path: Path
) -> None:
    model = GPT2LMHeadModel.from_pretrained("gpt")
    first = TransformersJudge.load("gpt")
    shutil.copytree("gpt", tmp_path / "copy")
    copy = TransformersJudge.load(str(tmp_path / "copy"))
    assert copy.protocol["model"] == first.protocol["model"]
    assert copy.tokenizer_fingerprint == first.tokenizer_fingerprint
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1e-6
    model.save_pretrained(tmp_path / "copy")
    changed = TransformersJudge.load(str(tmp_path / "copy"))
    assert changed.protocol["model"] != first.protocol["model"]


def test_repr_of_a_generation_report_shows_perplexity_with_entropy(runs: Path) -> None:
    report = evaluate_generation(api.load("runs/small"), "runs/left", count=2)
    assert re.fullmatch(
        r"GenerationReport\(2 samples, perplexity \S+ under runs/left, entropy \S+ nats, NFE \S+\)",
        repr(report),
    )


def test_generate_without_judge_has_all_other_figures(runs: Path) -> None:
    record = evaluate_generation(api.load("runs/small"), count=2)
    assert record.perplexity is None
    assert record.written["judge"] is None
    assert record.samples.count == 2
    assert record.samples.known_words is not None


def test_generate_draws_the_samples_of_the_recipe(runs: Path) -> None:
    run = api.load("runs/small")
    drawn = run.sample(4)
    record = evaluate_generation(run, count=4)
    expected = TokenSamples.split([sample["ids"] for sample in drawn], run)
    assert record.samples.pooled_entropy == pytest.approx(
        type(record.samples).of(expected.texts(), expected.ids).pooled_entropy
    )


def test_generate_with_a_transformers_judge_retokenizes_and_computes_mauve(runs: Path) -> None:
    record = evaluate_generation(api.load("runs/small"), "gpt", count=20)
    judge = record.written["judge"]
    assert judge["protocol"]["retokenized"] is True
    assert judge["samples"]["tokens"] > 0
    # the recipe has fewer held-out rows than MAUVE needs
    assert record.held_out.count < 20
    assert judge["mauve"] is None


def test_mauve_of_samples_like_the_held_out_rows_is_one(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = api.load("runs/small")
    rows = read_held_out_rows(run, 100)
    repeated = [rows[number % len(rows)] for number in range(24)]
    monkeypatch.setattr("ddiff.runs.generation.read_held_out_rows", lambda run, count: repeated)
    monkeypatch.setattr(
        Run, "sample", lambda run, count: [{"ids": row, "nfe": 1} for row in repeated]
    )
    found = evaluate_generation(run, "gpt").written["judge"]
    assert found["mauve"] == {"value": pytest.approx(1.0), "samples": 24, "held_out": 24}
    assert found["samples"] == found["held_out"]


def test_judge_object_scores_the_ids_of_the_samples_without_retokenization(runs: Path) -> None:
    run = api.load("runs/small")
    judge = ConstantJudge(run.tokenizer.fingerprint)
    record = evaluate_generation(run, judge, count=3, retokenize=False)
    assert record.perplexity is not None
    # two nats per token, for all tokens that were drawn
    assert record.perplexity.corpus == pytest.approx(math.exp(2.0))
    assert record.perplexity.tokens == 3 * run.recipe.length


def test_self_correction_is_measured_only_where_tokens_are_trained(runs: Path) -> None:
    uniform = evaluate_generation(api.load("runs/uniform"), count=2).written["self_correction"]
    assert 0.0 <= uniform["accuracy"]["value"] <= 1.0
    assert len(uniform["curve"]) == uniform["rounds"] + 1
    assert evaluate_generation(api.load("runs/left"), count=2).written["self_correction"] is None


def test_samples_are_split_at_end_marks(left: Run) -> None:
    end = left.tokenizer.eos_id
    assert end is not None
    ids = left.tokenizer.encode(["the", "cat"])
    row = [end, *ids[0], end, *ids[1], end]
    assert TokenSamples.split([row], left).documents == [["", "the", "cat", ""]]
    # a judge with the same end mark gets the same row
    assert RunJudge(left).encode(["", "the", "cat", ""]) == row


# ---------------------------------------------------------------------- mistakes


def test_judge_of_another_tokenizer_needs_retokenization(runs: Path) -> None:
    with pytest.raises(ArgumentError, match="--no-retokenize"):
        evaluate_generation(api.load("runs/small"), "gpt", count=2, retokenize=False)


def test_missing_and_empty_judges_are_refused_before_samples_are_drawn(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "sample", lambda *_, **__: pytest.fail("samples were drawn"))
    run = api.load("runs/small")
    Path("empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="no such folder"):
        evaluate_generation(run, "./missing")
    with pytest.raises(DataError, match="no readable"):
        evaluate_generation(run, "empty")
    with pytest.raises(ArgumentError, match="exact likelihood"):
        evaluate_generation(run, "runs/small")


def test_run_without_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(Path("runs/small/recipe.toml").read_text())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        generate_and_evaluate(tmp_path)


def test_samples_that_the_judge_cannot_tokenize_are_named(runs: Path, left: Run) -> None:
    judge = RunJudge(left)
    with pytest.raises(DataError, match="cannot be tokenized"):
        judge.encode(["a lone surrogate \ud800"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--judge", "runs/left"], "--judge needs --generate"),
        (["--count", "2"], "--count needs --generate"),
        (["--generate", "--no-retokenize"], "--no-retokenize needs --judge"),
        (["--generate", "--judge", "./missing"], "no such folder"),
    ],
)
def test_command_refuses_options_that_do_not_fit(
    ddiff: Command, runs: Path, arguments: list[str], expected: str
) -> None:
    result = ddiff("eval", "runs/small", *arguments)
    assert result.code == 2
    assert expected in " ".join(result.err.split())
