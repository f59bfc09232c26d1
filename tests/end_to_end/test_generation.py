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
from ddiff_encoders.pooling import PooledEncoder
from safetensors.torch import load_file, save_file
from small import AUTOREGRESSIVE, make_autoregressive_recipe, working_in
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import ddiff as api
from ddiff.data.packing import pack_texts
from ddiff.errors import ArgumentError, CheckpointError, DataError
from ddiff.evaluation.judge_model import Scores, TransformersJudge
from ddiff.evaluation.mauve import mauve
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import GENERATION, read_json
from ddiff.run_dir.generation_record import GENERATION_VERSION, GenerationRecord
from ddiff.runs.generation import (
    _read_other_rows,
    evaluate_generation,
    generate_and_evaluate,
    read_held_out_rows,
)
from ddiff.runs.judge_run import RunJudge
from ddiff.runs.run import Run
from ddiff.runs.token_samples import TokenSamples

LEFT = [*AUTOREGRESSIVE, 'name="left"', "train.steps=4", "data.length=16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with `small`, an autoregressive run `left` and a run `uniform`, and a GPT-2 `gpt`."""
    folder = tmp_path_factory.mktemp("generation")
    with working_in(folder):
        recipe = Path("small.toml").read_text()
        api.run("small.toml", settings=["train.steps=4"])
        Path("left.toml").write_text(make_autoregressive_recipe())
        api.run("left.toml", settings=LEFT)
        uniform = recipe.replace('"hdlm", "mdlm"', '"gidd"')
        uniform = uniform.replace('kind = "hdlm"', 'kind = "gidd"').replace("levelwise", "tokens")
        Path("uniform.toml").write_text(uniform)
        settings = ['vocabulary={kind="flat"}', 'name="uniform"', "train.steps=4"]
        api.run("uniform.toml", settings=settings)
        save_gpt(folder / "gpt")
        yield folder


WORDS = ("<end>", "<unk>", "the", "old", "red", "cat", "hat", "sat", "on")


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    table = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_gpt(folder: Path, words: Sequence[str] = WORDS) -> None:
    make_tokenizer(words).save_pretrained(folder)
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
    repeat_rows(run, monkeypatch)
    found = evaluate_generation(run, "gpt", count=24).written["judge"]
    one = pytest.approx(1.0)
    assert found["mauve"] == {
        "value": one,
        "lowest": one,
        "highest": one,
        "seeds": 5,
        "held_out_value": None,  # there are no other rows
        "samples": 24,
        "held_out": 24,
    }
    assert found["samples"] == found["held_out"]


def repeat_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let samples and held-out rows be 24 rows of the held-out text, with repetitions."""
    rows = read_held_out_rows(run, 100)
    repeated = [rows[number % len(rows)] for number in range(24)]
    monkeypatch.setattr("ddiff.runs.generation.read_held_out_rows", lambda run, count: repeated)
    drawn = [{"ids": row, "nfe": 1} for row in repeated]
    monkeypatch.setattr(Run, "sample", lambda run, count, **_: drawn)
    return repeated


def save_sentence_encoder(folder: Path) -> None:
    """Save the small GPT-2 as a directory of the package sentence-transformers."""
    save_gpt(folder)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


@pytest.mark.parametrize("kind", ["transformers", "sentence_transformers"])
def test_mauve_has_the_features_of_a_local_encoder_without_a_judge(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = api.load("runs/small")
    encoder = runs / "gpt"
    if kind == "sentence_transformers":
        encoder = tmp_path / "sentences"
        save_sentence_encoder(encoder)
    repeated = repeat_rows(run, monkeypatch)
    # twelve of the samples are other texts than the held-out rows
    drawn = [{"ids": row[:2] if number % 2 else row} for number, row in enumerate(repeated)]
    samples = [{"ids": sample["ids"], "nfe": 1} for sample in drawn]
    monkeypatch.setattr(Run, "sample", lambda run, count, **_: samples)
    written = evaluate_generation(run, count=24, features=str(encoder)).written
    assert written["judge"] is None
    found = written["mauve"]
    vectors = PooledEncoder.build(PooledEncoder.Config(path=str(encoder)), device=run.device)
    texts = [
        TokenSamples.split(rows, run).texts()
        for rows in ([sample["ids"] for sample in drawn], repeated)
    ]
    ours, theirs = (vectors.encode(part) for part in texts)
    expected = [mauve(ours, theirs, seed=seed) for seed in range(5)]
    assert found["value"] == pytest.approx(np.mean(expected))
    assert (found["lowest"], found["highest"]) == (min(expected), max(expected))
    assert found["features"]["encoder"] == str(encoder)
    assert found["features"]["fingerprint"] == vectors.fingerprint
    assert kind in found["features"]["component"]
    assert written["fingerprints"]["encoder of MAUVE"] == vectors.fingerprint
    assert vectors.fingerprint in written["figures"]["mauve"]["protocol"]


def test_mauve_of_other_held_out_rows_uses_rows_that_are_not_compared(runs: Path) -> None:
    run = api.load("runs/small")
    total = len(read_held_out_rows(run, 1000))
    half = total // 2
    others = _read_other_rows(run, half)
    assert others is not None
    compared = read_held_out_rows(run, half)
    both = read_held_out_rows(run, 2 * half)
    assert both[::2] == compared
    assert both[1::2] == others.ids
    assert _read_other_rows(run, total) is None


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


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("./missing", "no such folder.*cooccurrence"),
        ("transformers", "give the directory"),
        ("cooccurrence", "dim must be at most"),
    ],
)
def test_unusable_encoders_are_refused_before_samples_are_drawn(
    runs: Path, monkeypatch: pytest.MonkeyPatch, features: str, expected: str
) -> None:
    run = api.load("runs/small")
    repeat_rows(run, monkeypatch)
    monkeypatch.setattr(Run, "sample", lambda *_, **__: pytest.fail("samples were drawn"))
    with pytest.raises((ArgumentError, DataError), match=expected):
        evaluate_generation(run, count=24, features=features)


def test_run_without_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(Path("runs/small/recipe.toml").read_text())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        generate_and_evaluate(tmp_path)


def test_samples_that_the_judge_cannot_tokenize_are_named(runs: Path, left: Run) -> None:
    judge = RunJudge(left)
    with pytest.raises(DataError, match="cannot be tokenized"):
        judge.encode(["a lone surrogate \ud800"])


RUN = "runs/small"

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "judge without samples": ([RUN, "--judge", "runs/left"], ["--judge needs --generate"]),
    "empty judge without samples": ([RUN, "--judge", ""], ["--judge needs --generate"]),
    "encoder without samples": ([RUN, "--features", "gpt"], ["--features needs --generate"]),
    "too few samples for MAUVE": (
        [RUN, "--generate", "--features", "gpt", "--count", "3"],
        ["at least 20 samples", "--count 20"],
    ),
    "count without samples": ([RUN, "--count", "2"], ["--count needs --generate"]),
    "token ids without judge": (
        [RUN, "--generate", "--no-retokenize"],
        ["--no-retokenize needs --judge"],
    ),
    "no samples": ([RUN, "--generate", "--count", "0"], ["--count", "1"]),
    "text and samples": (
        [RUN, "--generate", "--protocol", "ptb"],
        ["--generate evaluates samples", "--protocol"],
    ),
    "unknown protocol": (
        [RUN, "--data", "corpus.txt", "--protocol", "pbt"],
        ["pbt", "ptb", "lambada"],
    ),
    "folder without run": (
        ["empty", "--generate"],
        ["empty is not a run directory", "recipe.toml"],
    ),
    "missing run": (["runs/none", "--generate"], ["runs/none is not a run directory"]),
    "run without checkpoint": (["begun", "--generate"], ["begun", "no complete checkpoint"]),
    "unknown key": (
        [RUN, "--generate", "--set", "train.steps=2"],
        ["[evaluate] or [sample]", "train.steps=2"],
    ),
    "missing judge": (
        [RUN, "--generate", "--judge", "./missing"],
        ["--judge", "'./missing'", "no such folder", "A judge is"],
    ),
    "no judge": ([RUN, "--generate", "--judge", " "], ["--judge", "no such folder"]),
    "judge on the hub without a connection": (
        [RUN, "--generate", "--judge", "nobody/no-model"],
        ["--judge", "'nobody/no-model'", "download from the hub failed"],
    ),
    "judge that is a file": (
        [RUN, "--generate", "--judge", "gpt/config.json"],
        ["this is a file", "Name the folder 'gpt'"],
    ),
    "empty judge": ([RUN, "--generate", "--judge", "empty"], ["--judge", "no readable tokenizer"]),
    "judge without tokenizer": (
        [RUN, "--generate", "--judge", "weights"],
        ["--judge", "The tokenizer of the judge weights has an empty vocabulary"],
    ),
    "judge without weights": (
        [RUN, "--generate", "--judge", "tokenizer"],
        ["--judge", "No model from 'tokenizer'", "no readable model"],
    ),
    "judge with half of its weights": (
        [RUN, "--generate", "--judge", "half"],
        ["--judge", "lack", "transformer.h.0", "random numbers"],
    ),
    "judge with damaged weights": (
        [RUN, "--generate", "--judge", "damaged"],
        ["--judge", "model.safetensors is damaged"],
    ),
    "judge with the tokenizer of another model": (
        [RUN, "--generate", "--judge", "mixed"],
        ["--judge", "judge mixed", "a tokenizer with 16 tokens and a model with 9"],
    ),
    "judge that reads later tokens": (
        [RUN, "--generate", "--judge", "bert"],
        ["--judge", "'bert'", "depends on later tokens"],
    ),
    "judge that is a diffusion run": (
        [RUN, "--generate", "--judge", "runs/uniform"],
        ["runs/uniform must have an exact likelihood", "ar_small"],
    ),
    "judge that is an untrained run": (
        [RUN, "--generate", "--judge", "begun"],
        ["begun", "no complete checkpoint"],
    ),
    "judge of another vocabulary": (
        [RUN, "--generate", "--judge", "gpt", "--no-retokenize"],
        ["--no-retokenize", "gpt must have the tokenizer of", "Leave out --no-retokenize"],
    ),
}


@pytest.fixture(scope="module")
def mistakes(runs: Path) -> Path:
    """Folder `runs` with a run without checkpoint, and incomplete judges."""
    for name in ("empty", "begun", "weights", "tokenizer", "half", "damaged", "mixed"):
        Path(name).mkdir(exist_ok=True)
    shutil.copy("runs/small/recipe.toml", "begun")
    for file in Path("gpt").iterdir():
        is_tokenizer = file.name.startswith(("tokenizer", "special", "vocab"))
        shutil.copy(file, "tokenizer" if is_tokenizer else "weights")
        if not is_tokenizer:
            shutil.copy(file, "mixed")
        shutil.copy(file, "half")
        shutil.copy(file, "damaged")
    weights = load_file("gpt/model.safetensors")
    half = {name: value for name, value in weights.items() if ".h.0." not in name}
    save_file(half, "half/model.safetensors", {"format": "pt"})
    Path("damaged/model.safetensors").write_bytes(b"half a file")
    make_tokenizer([*WORDS, *"xyzabcd"]).save_pretrained("mixed")
    save_bert(Path("bert"))
    return runs


def save_bert(folder: Path) -> None:
    """Save a model that attends to all tokens, which the library loads as a language model."""
    shutil.copytree("tokenizer", folder)
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    # so large that the other token changes the predictions
    config.initializer_range = 1.0
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)


@pytest.mark.parametrize("name", list(REFUSED))
def test_eval_refuses_bad_input_with_a_reason_and_writes_nothing(
    name: str, ddiff: Command, mistakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "sample", lambda *_, **__: pytest.fail("samples were drawn"))
    arguments, expected = REFUSED[name]
    before = sorted(Path("runs").rglob("*.json"))
    result = ddiff("eval", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    message = " ".join(result.err.split())
    assert [text for text in expected if text not in message] == [], message
    assert sorted(Path("runs").rglob("*.json")) == before


def test_transformers_judge_with_the_tokenizer_of_a_run_scores_token_ids(
    runs: Path, tmp_path: Path
) -> None:
    """A run with a tokenizer of the library, and a judge with the same tokenizer."""
    recipe = Path("small.toml").read_text()
    recipe = recipe.replace('kind = "bpe"\nsize = 270', 'kind = "pretrained"\npath = "words"')
    # all words of the corpus
    save_gpt(Path("words"), [*WORDS, *"xyzabcd"])
    Path("words.toml").write_text(recipe)
    settings = ['vocabulary={kind="flat"}', 'process={kind="mdlm"}', 'denoiser.head="tokens"']
    run = api.run("words.toml", settings=[*settings, 'name="words"', "train.steps=2"])
    report = evaluate_generation(run, "words", count=3, retokenize=False)
    assert report.perplexity is not None
    assert report.perplexity.tokens == 3 * run.recipe.length
    assert report.written["judge"]["protocol"]["retokenized"] is False
