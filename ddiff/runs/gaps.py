"""Gaps in sentences of the validation documents, which the model of a run fills."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddiff.data.documents import Documents
from ddiff.data.gaps import SENTENCE_TOKENS, Gap, choose_gaps
from ddiff.distributed.ranks import Ranks
from ddiff.run_dir.files import GAPS, read_json_lines
from ddiff.runs.prompts import Template
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.runs.sampling import (
    SampleRequest,
    build_sampler,
    draw_templates,
    find_left_to_right,
    make_plan,
)
from ddiff.runs.trajectory import watch_stage
from ddiff.sampling.loop import OnStep

FILLING = "filling gaps"  # title of the progress bar

ORIGINAL = "original"
"""Title of the column with the hidden words of documents without a known author."""


@dataclass(frozen=True)
class FilledGaps:
    """Gaps in sentences of the validation documents, with the words of the model.

    Attributes:
        lines: lines of gaps.jsonl.
        title: title of the column with the hidden words.
        remark: reason why there are no gaps, as a sentence; "" for none.
    """

    lines: Sequence[Mapping[str, Any]] = ()
    title: str = ORIGINAL
    remark: str = ""


def fill_gaps_once(run: Run, ranks: Ranks) -> FilledGaps:
    """Fill the gaps of the recipe with the sampler of the recipe, and write gaps.jsonl.

    If gaps.jsonl already contains the same gaps at the newest step, the file is read instead.
    `ranks` divide the batches; only rank 0 writes.
    """
    if run.recipe.sample.gaps == 0 or run.tokenizer.unit == "symbol":
        return FilledGaps()
    if obstacle := find_obstacle(run):
        return FilledGaps(remark=f"No gaps in held-out sentences were filled: {obstacle}.")
    # chosen by one process, because a corpus may give its texts to one process only
    gaps = ranks.on_first(lambda: choose_validation_gaps(run))
    if not gaps:
        fewest, most = SENTENCE_TOKENS
        return FilledGaps(
            remark=f"No gaps in held-out sentences were filled: the validation documents have no "
            f"plain sentence of {fewest} to {most} tokens that is not in the training text."
        )
    # decided by one process, because rank 0 may write the file before another rank reads it
    lines = ranks.on_first(lambda: _read_saved(run, gaps))
    if lines is None:
        with watch_stage(run, FILLING, ranks, [len(gap.ids) for gap in gaps]) as on_step:
            lines = fill_gaps(run, gaps, ranks, on_step)
        if ranks.is_first:
            content = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
            write_run_file(run.run_dir / GAPS, "".join(content))
    documents = run.data.documents
    author = documents.author if isinstance(documents, Documents) else None
    return FilledGaps(lines, author or ORIGINAL)


def find_obstacle(run: Run) -> str | None:
    """Return why a run cannot fill gaps in its validation documents; None if it can."""
    plan = make_plan(run.recipe, run.model, build_sampler(run.recipe, run.model), None, None, 1)
    if found := find_left_to_right(plan):
        return f"{found[0]} works from left to right and does not attend to later tokens"
    if run.data.is_chat:
        return "the documents are conversations, of which the model writes answers"
    if run.data.validation_texts is None:
        return "only the tokens of the validation documents are stored"
    return None


def choose_validation_gaps(run: Run) -> list[Gap]:
    """Choose [sample] gaps sentences of the validation documents, and a gap in each.

    Runs with the same documents, tokenizer and [sample] seed have the same gaps.
    """
    keys = run.recipe.sample
    texts = run.data.validation_texts
    assert texts is not None, "see find_obstacle"
    return choose_gaps(
        texts,
        run.tokenizer,
        keys.gaps,
        length=run.recipe.length,
        seed=keys.seed,
        training=run.data.training_texts or (),
    )


def fill_gaps(
    run: Run, gaps: Sequence[Gap], ranks: Ranks | None = None, on_step: OnStep | None = None
) -> list[dict[str, Any]]:
    """Fill gaps with the sampler of the recipe, and return the lines of gaps.jsonl.

    The temperature is [sample] gap_temperature, which is low by default, because likely words read
    better than random ones. The tokens around a gap are given and never change. `ranks`: processes
    that divide the batches; None: only this process.
    """
    templates = [make_template(gap) for gap in gaps]
    temperature = find_temperature(run)
    settings = [] if temperature is None else [f"temperature={temperature}"]
    request = SampleRequest(count=1, settings=settings)
    drawn = draw_templates(
        run.recipe, run.model, run.tokenizer, templates, request, on_step, ranks, FILLING
    )
    words = run.tokenizer.decode(
        [sample["ids"][gap.start : gap.stop] for gap, sample in zip(gaps, drawn, strict=True)]
    )
    step = run.step
    lines = []
    for gap, sample, model in zip(gaps, drawn, words, strict=True):
        lines.append(
            {
                "step": step,
                "index": sample["index"],
                **_describe_place(gap),
                "name": run.data.name_validation_document(gap.document),
                "before": gap.before,
                "model": model,
                "original": gap.hidden,
                "after": gap.after,
                "infill": gap.infill,
                "ids": sample["ids"],
                "start": gap.start,
                "stop": gap.stop,
                "temperature": temperature,
                "nfe": sample["nfe"],
            }
        )
    return lines


def find_temperature(run: Run) -> float | None:
    """Return the temperature at which gaps are filled; None if the sampler has no temperature."""
    has_temperature = "temperature" in type(run.recipe.sampler.config).model_fields
    return run.recipe.sample.gap_temperature if has_temperature else None


def make_template(gap: Gap) -> Template:
    """Return the infill text of a gap, with exactly the token ids of the sentence around it."""
    ids = torch.tensor(gap.ids, dtype=torch.long)
    given = torch.ones_like(ids, dtype=torch.bool)
    given[gap.start : gap.stop] = False
    return Template(gap.infill, ids, given, whole=True)


def _describe_place(gap: Gap) -> dict[str, int]:
    return {"document": gap.document, "position": gap.position}


def _read_saved(run: Run, gaps: Sequence[Gap]) -> list[dict[str, Any]] | None:
    """Return the content of gaps.jsonl, or None unless it has these gaps at the newest step."""
    saved = read_json_lines(run.run_dir / GAPS)
    if len(saved) != len(gaps):
        return None
    step = run.step
    for line, gap in zip(saved, gaps):
        place = {"step": step, **_describe_place(gap), "original": gap.hidden}
        if not line.items() >= place.items():
            return None
    return saved
