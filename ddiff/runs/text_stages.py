"""Stages of text runs: build and load a run, and evaluate and sample it after training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, CheckpointError, DdiffError, end_sentence
from ddiff.evaluation.generation import MeanFigure, measure_known_words
from ddiff.evaluation.ngrams import sample_entropies
from ddiff.recipe.model import Recipe
from ddiff.run_dir.files import (
    CHAT,
    SAMPLES,
    SAMPLING,
    TOKENIZER,
    VOCABULARY,
    read_json,
    read_json_lines,
)
from ddiff.runs.backends import build_single_backend
from ddiff.runs.build import Overrides, build_process
from ddiff.runs.data import RunText
from ddiff.runs.evaluation_report import evaluate_once
from ddiff.runs.gaps import fill_gaps_once
from ddiff.runs.initial_weights import explain_base
from ddiff.runs.memory import check_memory
from ddiff.runs.meta_device import build_denoiser_on_meta
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.runs.sampling import build_sampler
from ddiff.runs.saved_tokenizer import load_saved_tokenizer
from ddiff.runs.summary import print_summary
from ddiff.runs.text_judging import write_judged
from ddiff.runs.token_samples import TokenSamples
from ddiff.runs.trajectory import watch_stage
from ddiff.training.protocols import Backend
from ddiff.training.settings import TrainingSummary


def build_run(recipe: Recipe, backend: Backend, overrides: Overrides) -> Run:
    """Build the data, the vocabulary and the untrained model of a run.

    Raises an error before a file is written if the network does not accept the conditions of
    the data, or if the memory is too small.
    """
    text = RunText(recipe)
    text.judge  # noqa: B018, raises an error if the judge does not fit the data
    # rank 0 tokenizes first; the other ranks then find the shards in the cache
    with backend.main_process_first():
        text.train_rows  # noqa: B018
        text.check_repetitions()
        vocabulary = _choose_vocabulary(text, overrides)
    text.check_vocabulary(vocabulary)
    process = overrides.process or build_process(recipe, vocabulary)
    check_memory(recipe, build_denoiser_on_meta(recipe, vocabulary, process), backend.device)
    run = Run.assemble(text, vocabulary, backend.device, overrides)
    run.data.read_conditions()
    _check_packing(run)
    return run


def load_run(
    recipe: Recipe, directory: Path, newest: Checkpoint, process: ForwardProcess | None
) -> Run:
    """Build the run in `directory` from its files, with the weights of a checkpoint."""
    tokenizer = load_saved_tokenizer(recipe.tokenizer, str(directory / TOKENIZER))
    vocabulary = Vocabulary.load(str(directory / VOCABULARY))
    text = RunText(recipe, tokenizer)
    text.check_vocabulary(vocabulary)
    device = build_single_backend(recipe).device
    try:
        run = Run.assemble(text, vocabulary, device, Overrides(process=process))
    except DdiffError as error:
        if recipe.denoiser_keys.lora is None:
            raise
        raise CheckpointError(f"{end_sentence(str(error))} {explain_base(recipe)}") from error
    run.check_checkpoint(newest)
    run.load_weights(newest)
    return run


def after_training(run: Run, summary: TrainingSummary, ranks: Ranks) -> None:
    """Evaluate, sample and print the summary. `ranks` divide the work; only rank 0 prints."""
    report = evaluate_once(run, ranks)
    filled = fill_gaps_once(run, ranks)
    samples = _sample_once(run, ranks)
    if not ranks.is_first:
        return
    title = f"{type(run.process or run.objective).__name__} on {run.vocabulary}"
    if run.uses_ema:
        title += ", the exponential moving average of its weights"
    print_summary(
        run.run_dir,
        title,
        run.denoiser,
        summary,
        report.evaluation,
        report.baselines,
        run.data.documents.entropy_rate,
        filled,
        samples,
        write_judged(run, samples),
        describe_samples(run, samples),
        run.data.counted_items,
        suggest_options(run.run_dir, "--count 4 --steps 128"),
    )


def _check_packing(run: Run) -> None:
    """Raise ArgumentError if training rows hold several documents, and the backbone reads one."""
    backbone = run.denoiser.backbone
    # Training rows of text are cut from a stream of documents. A row of symbols is one document.
    if backbone.reads_packed_rows or run.tokenizer.unit == "symbol":
        return
    raise ArgumentError(
        f"{type(backbone).__name__}: with these settings a row must hold one document, but the "
        "training rows of this run are cut from a stream of documents. For the backbone dit, set "
        '[denoiser] conditions.NAME.via = "cross" in place of "tokens".'
    )


def _choose_vocabulary(text: RunText, overrides: Overrides) -> Vocabulary:
    if overrides.vocabulary is not None:
        return overrides.vocabulary
    if overrides.process is not None:
        return overrides.process.vocabulary
    return text.build_vocabulary()


def _sample_once(run: Run, ranks: Ranks) -> list[dict[str, Any]]:
    """Draw the samples of the recipe and write samples.jsonl.

    If samples.jsonl already contains all samples of the newest step, the file is read instead.
    """
    step = run.step
    # decided by one process, because rank 0 may write the file before another rank reads it
    saved = ranks.on_first(lambda: _read_samples(run, step))
    if saved is not None:
        return saved
    began = time.monotonic()
    # built here because sampler.steps may differ from [sample] steps
    sampler = build_sampler(run.recipe, run.model)
    with watch_stage(run, "sampling", ranks) as on_step:
        drawn = run.sample(
            1 if run.data.is_chat else None,
            message=run.data.first_prompts(run.recipe.sample.count) if run.data.is_chat else None,
            sampler=sampler,
            on_step=on_step,
            ranks=ranks,
        )
    samples = [{"step": step, **sample} for sample in drawn]
    if not ranks.is_first:
        return samples
    figures = {
        "step": step,
        "seconds": time.monotonic() - began,
        "tokens": sum(len(sample["ids"]) for sample in samples),
        "steps": sampler.steps,
    }
    write_run_file(run.run_dir / SAMPLING, json.dumps(figures) + "\n")
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    write_run_file(run.run_dir / SAMPLES, "".join(lines))
    return samples


def describe_samples(run: Run, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the entropy of samples, and the share of their words that held-out text contains.

    Of conversations, only the answers are described, without entropy: their lengths differ.
    """
    if run.data.is_chat:
        answers = [sample["answer"] for sample in samples]
        words = "the words of their answers"
        return _describe_known_words(run, answers, words, "held-out conversations")
    split = TokenSamples.split([sample["ids"] for sample in samples], run)
    parts = []
    entropy = MeanFigure.of(sample_entropies(split.ids))
    if entropy is not None:
        parts.append(f"entropy {entropy.value:.2f} nats")
    if run.tokenizer.unit == "token":
        parts.append(_describe_known_words(run, split.texts(), "their words", "held-out text"))
    return ", ".join(filter(None, parts))


def suggest_options(run_dir: Path, otherwise: str) -> str:
    """Return options of `ddiff sample` for a run: a message for a run of conversations.

    `otherwise`: options for other runs.
    """
    return '--message "..."' if (run_dir / CHAT).is_file() else otherwise


def _describe_known_words(run: Run, texts: Sequence[str], words: str, source: str) -> str:
    """Return the share of the words of texts that occur in the validation texts.

    `words` and `source` name the words and the validation texts. Returns an empty text if the run
    has no validation texts, or if `texts` have no words.
    """
    reference = run.data.validation_texts
    known = None if reference is None else measure_known_words(texts, reference)
    return "" if known is None else f"{known.value:.0%} of {words} occur in {source}"


def _read_samples(run: Run, step: int) -> list[dict[str, Any]] | None:
    """Return the content of samples.jsonl, or None unless it has all samples of a step."""
    saved = read_json_lines(run.run_dir / SAMPLES)
    is_timed = read_json(run.run_dir / SAMPLING).get("step") == step
    is_complete = len(saved) == run.recipe.sample.count
    if is_timed and is_complete and all(sample.get("step") == step for sample in saved):
        return saved
    return None
