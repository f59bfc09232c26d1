"""Command `ddiff eval --generate`: draw samples and evaluate them, and generation.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ddiff.core.rng import CounterRng
from ddiff.distributed.ranks import Ranks, connect_ranks
from ddiff.errors import ArgumentError
from ddiff.evaluation.generation import GenerativePerplexity, MeanFigure, SampleFigures
from ddiff.evaluation.judge_model import JudgeModel
from ddiff.evaluation.mauve import FEWEST
from ddiff.evaluation.self_correction import measure_correction
from ddiff.progress import show_activity
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.run_dir.destination import Destination, check_destination, write_text
from ddiff.run_dir.files import GENERATION, name_of_clock
from ddiff.run_dir.generation_record import GenerationRecord
from ddiff.run_dir.location import check_writable
from ddiff.runs.generation_header import describe_generation, describe_sampling
from ddiff.runs.generation_table import print_generation
from ddiff.runs.judge_run import open_judge
from ddiff.runs.kinds import ClockSource
from ddiff.runs.loading import load
from ddiff.runs.mauve import check_counts, compare_features, compare_texts, open_features
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.runs.sampling import make_plan
from ddiff.runs.text_judging import judge_texts
from ddiff.runs.token_samples import TokenSamples
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.self_correction import SelfCorrectingSampler

ROUNDS = 16  # of the self-correction curve
_CANDIDATES = 2**16  # held-out rows among which full rows are chosen


@dataclass(frozen=True, repr=False)
class GenerationReport:
    """Figures of the samples of a run.

    Attributes:
        samples: figures of the samples.
        held_out: the same figures of as many rows of held-out text.
        perplexity: perplexity of the samples under the judge; None without a judge.
        written: content of generation.json.
    """

    samples: SampleFigures
    held_out: SampleFigures
    perplexity: GenerativePerplexity | None
    written: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = [f"{self.samples.count} samples", f"entropy {self.samples.entropy.value:.3f} nats"]
        if self.perplexity is not None:
            judge = self.written["judge"]["protocol"]["judge"]
            parts.insert(1, f"perplexity {self.perplexity.corpus:.4g} under {judge}")
        parts.append(f"NFE {self.written['sampling']['nfe']:.4g}")
        return f"GenerationReport({', '.join(parts)})"

    @property
    def record(self) -> GenerationRecord:
        """The content of generation.json as a record, whose figures have units and intervals."""
        # as it is written, so that it equals the record that is read: JSON has no tuples
        return GenerationRecord.from_tree(json.loads(self.to_json()))

    def to_json(self) -> str:
        return json.dumps(self.written, indent=2) + "\n"


def generate_and_evaluate(
    run_dir: str | Path,
    *,
    judge: str | None = None,
    count: int | None = None,
    retokenize: bool = True,
    settings: Iterable[str] = (),
    out: str | Path | None = None,
    features: str | None = None,
    clock: ClockSource = "recipe",
) -> GenerationReport:
    """Run `ddiff eval --generate`: draw samples, evaluate them, print and write the figures.

    The figures are written to generation.json of the run, or to the JSON file `out`. See
    `evaluate_generation` for the other arguments. `settings` are `key=value` texts that override
    keys of [sample]. With the `clock` "found", a tree is sampled with the clock that `ddiff clock`
    found, and the figures are written to generation-found-clock.json.
    """
    target = None
    if out is not None:
        target = check_destination(out, "ddiff eval --out", suffix=".json", owned=_is_generation)
    with connect_ranks() as ranks:
        run = load(run_dir, settings=settings, clock=clock)
        require_text_recipe(run.recipe, "ddiff eval --generate")
        if target is None:
            check_writable(run.run_dir)  # before samples are drawn
        record = evaluate_generation(
            run, judge, count=count, retokenize=retokenize, features=features, ranks=ranks
        )
    if ranks.is_first:
        _write_record(run, record, target)
    return record


def _write_record(run: Run, record: GenerationReport, target: Destination | None) -> None:
    """Write the figures to `target`, by default that of the run, and print them."""
    place = run.run_dir / name_of_clock(GENERATION, run.clock_source)
    if target is None:
        write_run_file(place, record.to_json())
    else:
        write_text(target, record.to_json())
    print_generation(record.written)
    print(f"Written to {place if target is None else target.name}")


def _is_generation(file: IO[bytes]) -> bool:
    """Return True if a file contains figures that `ddiff eval --generate` wrote."""
    try:
        found = json.load(file)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema_version", "sampling", "samples"} <= found.keys()


def evaluate_generation(
    run: Run,
    judge: str | JudgeModel | None = None,
    *,
    count: int | None = None,
    retokenize: bool = True,
    features: str | None = None,
    ranks: Ranks | None = None,
) -> GenerationReport:
    """Draw samples of a text run and compute their figures.

    Args:
        run: trained run, whose [sample] table selects sampler, steps and seed.
        judge: directory of an autoregressive run, directory of a causal language model, the name of
            a model on the hub, or a judge object. None: no generative perplexity.
        count: number of samples; by default [sample] count.
        retokenize: whether the judge tokenizes the texts of the samples. False: the judge scores
            the token ids that the run drew, and must have the tokenizer of the run.
        features: encoder of texts for MAUVE: directory of a sentence-transformers or transformers
            model, kind of a registered encoder such as "cooccurrence", or name on the hub. None:
            MAUVE has the features of the judge, if the judge has some.
        ranks: processes that divide the batches of samples, of corrections and of scored windows,
            all of which call this function; None: only this process. A judge object scores all
            samples on every rank, unless it divides them itself.

    Raises ArgumentError or DataError, before samples are drawn, if the judge or the encoder cannot
    be used.
    """
    ranks = ranks or Ranks()
    model = _open_judge_model(run, judge, retokenize, ranks)
    ranks.on_first(run.read_validation)  # the other ranks then read the tokens in the cache
    number = run.recipe.sample.count if count is None else count
    rows = read_held_out_rows(run, number)
    encoder = None
    if features is not None:
        check_counts(number, len(rows))
        encoder = open_features(features, run)
    start = time.perf_counter()
    drawn = run.sample(count, ranks=ranks)
    samples = TokenSamples.split([sample["ids"] for sample in drawn], run)
    held_out = TokenSamples.split(rows, run)
    figures, baseline = _compute_figures(run, samples, held_out, ranks)
    corrected = None if run.process is None else correct_samples(run, samples.ids, ranks)
    parts: dict[str, Any] = {
        "sampling": describe_sampling(run, drawn),
        "samples": figures.to_dict(),
        "held_out": {**baseline.to_dict(), "rows": run.data.validation_rows.fingerprint},
        "self_correction": corrected,
        "mauve": None,
        "judge": None,
        "findings": judge_texts(run, drawn),
    }
    seed = run.recipe.sample.seed
    others = _read_other_rows(run, len(rows))
    if encoder is not None:
        other_texts = None if others is None else others.texts()
        parts["mauve"] = compare_texts(
            encoder, samples.texts(), held_out.texts(), other_texts, seed
        )
    perplexity = None
    if model is not None:
        judging = _Judging(model, retokenize)
        perplexity = judging.measure(samples, figures.entropy)
        reference = judging.measure(held_out, baseline.entropy)
        parts["judge"] = judging.describe(perplexity, reference)
        if encoder is None:
            parts["judge"]["mauve"] = judging.measure_mauve(samples, held_out, others, seed)
    written = describe_generation(run, parts, model, time.perf_counter() - start)
    return GenerationReport(figures, baseline, perplexity, written)


def _open_judge_model(
    run: Run, judge: str | JudgeModel | None, retokenize: bool, ranks: Ranks
) -> JudgeModel | None:
    """Return the model that scores the samples; None without a judge.

    Raises ArgumentError if the model must score token ids but has another tokenizer.
    """
    model = open_judge(judge, run.device, ranks) if isinstance(judge, str) else judge
    if model is not None and not retokenize:
        check_same_tokenizer(run, model)
    return model


def _compute_figures(
    run: Run, samples: TokenSamples, held_out: TokenSamples, ranks: Ranks
) -> tuple[SampleFigures, SampleFigures]:
    """Return the figures of samples and those of rows of held-out text.

    Only the main process of `ranks` shows progress.
    """
    unit = run.tokenizer.unit
    with show_activity("comparing the samples", console=ranks.console()):
        # self-BLEU compares every pair of samples
        figures = SampleFigures.of(samples.texts(), samples.ids, run.data.validation_texts, unit)
        # the words of held-out rows occur in held-out text by definition
        baseline = SampleFigures.of(held_out.texts(), held_out.ids, None, unit)
    return figures, baseline


def check_same_tokenizer(run: Run, judge: JudgeModel) -> None:
    """Raise ArgumentError if a judge cannot score the token ids of a run."""
    own = run.tokenizer.fingerprint
    if judge.tokenizer_fingerprint != own:
        theirs = judge.tokenizer_fingerprint or judge.protocol["tokenizer"]
        raise ArgumentError(
            f"--no-retokenize: the judge {judge.name} must have the tokenizer of {run.run_dir} "
            f"(fingerprint {own}), because it would score the token ids of the samples; got the "
            f"tokenizer {theirs}. Leave out --no-retokenize: the judge then tokenizes the texts."
        )


def read_held_out_rows(run: Run, count: int) -> list[list[int]]:
    """Return the token ids of `count` rows of held-out text, evenly spaced over the text.

    Only rows of [data] length tokens are taken, because the entropy of a row grows with its length.
    If there are none, all rows are. The result has fewer rows if there are fewer.
    """
    rows = run.data.validation_rows
    size = min(len(rows), _CANDIDATES)
    block = rows[np.arange(size) * len(rows) // size]
    full = np.flatnonzero(block.num_valid == rows.length)
    if len(full) == 0:
        full = np.arange(size)
    taken = min(count, len(full))
    chosen = full[np.arange(taken) * len(full) // taken]
    return [block.ids[row, : block.num_valid[row]].tolist() for row in chosen]


def _read_other_rows(run: Run, count: int) -> TokenSamples | None:
    """Return `count` held-out rows other than those of `read_held_out_rows`; None if too few."""
    # of twice as many rows, every second one is a row of `count` rows
    rows = read_held_out_rows(run, 2 * count)
    return TokenSamples.split(rows[1::2], run) if len(rows) == 2 * count else None


def measure_perplexity(
    samples: TokenSamples, entropy: MeanFigure, judge: JudgeModel, retokenize: bool
) -> GenerativePerplexity:
    """Return the perplexity of samples under a judge.

    `entropy` is the entropy of the same samples. `retokenize`: see `evaluate_generation`.
    """
    return _Judging(judge, retokenize).measure(samples, entropy)


class _Judging:
    """Samples as the token ids of a judge, and their scores."""

    def __init__(self, judge: JudgeModel, retokenize: bool) -> None:
        self._judge = judge
        self._retokenize = retokenize

    def describe(
        self, perplexity: GenerativePerplexity, reference: GenerativePerplexity
    ) -> dict[str, Any]:
        """Return the part of generation.json about the judge, without MAUVE.

        `perplexity` is that of the samples, `reference` that of held-out text.
        """
        return {
            "protocol": {**self._judge.protocol, "retokenized": self._retokenize},
            "samples": perplexity.to_dict(),
            "held_out": reference.to_dict(),
            "mauve": None,
        }

    def _encode(self, samples: TokenSamples) -> list[list[int]]:
        if not self._retokenize:
            return samples.ids
        return [self._judge.encode(documents) for documents in samples.documents]

    def measure(self, samples: TokenSamples, entropy: MeanFigure) -> GenerativePerplexity:
        """Return the perplexity of samples, which have the entropy `entropy`."""
        scores = self._judge.score(self._encode(samples))
        return GenerativePerplexity.of(scores.nats, scores.tokens, entropy)

    def measure_mauve(
        self,
        samples: TokenSamples,
        held_out: TokenSamples,
        others: TokenSamples | None,
        seed: int,
    ) -> dict[str, Any] | None:
        """Return MAUVE of samples and held-out rows, as `compare_texts` explains.

        Returns None if the judge has no features, or if there are too few samples or rows.
        """
        if min(len(samples.ids), len(held_out.ids)) < FEWEST:
            return None
        features = self._judge.features(self._encode(samples))
        reference = self._judge.features(self._encode(held_out))
        if features is None or reference is None:
            return None
        best = None if others is None else self._judge.features(self._encode(others))
        return compare_features(features, reference, best, seed)


def correct_samples(
    run: Run, ids: Sequence[Sequence[int]], ranks: Ranks | None = None
) -> dict[str, Any] | None:
    """Measure the self-correction accuracy of samples, and its curve over rounds of correction.

    `ranks`: processes that divide the batches; None: only this process.

    Returns None if the bound of the process does not train predictions at tokens, so that they are
    arbitrary there, and for a model without a process.
    """
    sampler = SelfCorrectingSampler(AncestralSampler(1), rounds=ROUNDS)
    process = run.process
    try:
        sampler.check_supported(process, run.denoiser.parameterization.predicts)
    except ArgumentError:
        return None
    assert process is not None  # the sampler refuses a model without a process
    plan = make_plan(run.recipe, run.model, sampler, None, None, len(ids))
    length = run.recipe.length
    seed = run.recipe.sample.seed
    batch = run.recipe.sample.batch

    def correct(numbers: slice) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor(ids[numbers], dtype=torch.long, device=run.device)
        index = torch.arange(numbers.start, numbers.stop, device=run.device)

        def rng_at(k: int) -> CounterRng:
            return CounterRng(seed, k, index, length, "correction")

        found = measure_correction(sampler, process, plan.network(numbers), tokens, rng_at)
        return found.accuracy.cpu(), (found.ids != tokens).double().mean(-1).cpu()

    batches = [slice(first, min(first + batch, len(ids))) for first in range(0, len(ids), batch)]
    ranks = ranks or Ranks()
    with show_activity("correcting", console=ranks.console()):
        parts = ranks.map(correct, batches)
    accuracy = torch.cat([curve for curve, _ in parts]).numpy()
    changed = torch.cat([share for _, share in parts])
    figure = MeanFigure.of(accuracy[:, 0])
    assert figure is not None  # there is a sample
    return {
        "accuracy": asdict(figure),
        "curve": accuracy.mean(0).tolist(),
        "changed": float(changed.mean()),
        "rounds": sampler.rounds,
        "commit": sampler.commit,
        "temperature": sampler.temperature,
        "at": sampler.at,
    }
