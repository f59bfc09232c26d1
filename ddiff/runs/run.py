"""A run: the parts of a recipe, and what they can do together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints, load_weights
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.batch import Batch
from ddiff.data.cache import Cache
from ddiff.data.conditions import Conditions, read_conditions
from ddiff.data.corpus import (
    Corpus,
    build_train_rows,
    build_validation_rows,
    check_repetitions,
    load_or_build_shards,
)
from ddiff.data.documents import Documents
from ddiff.data.packing import (
    PackedRows,
    Rows,
    batch_rows,
    pack_texts,
)
from ddiff.data.prefetch import Prefetcher
from ddiff.data.text import check_text
from ddiff.data.tokenizer import Tokenizer
from ddiff.distributed.blocks import compile_blocks, recompute_activations
from ddiff.distributed.launcher import cores_alone
from ddiff.distributed.single import SingleBackend
from ddiff.errors import ArgumentError, CheckpointError, shorten
from ddiff.evaluation.baselines import Baselines, baselines
from ddiff.evaluation.likelihood import Evaluation, evaluate
from ddiff.nn.denoiser import Denoiser
from ddiff.plugin.config import COUNTS
from ddiff.progress import show_progress
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import configure_sampler
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.run_dir.identity import (
    DATA,
    Difference,
    check_fingerprints,
    check_noising,
    compare_fingerprints,
    flatten_keys,
)
from ddiff.runs.build import (
    Overrides,
    build_backend,
    build_denoiser,
    build_documents,
    build_objective,
    build_on_meta,
    build_process,
    check_asking,
    check_process,
    check_tokenizer,
)
from ddiff.runs.conditioning import SampleConditions, network_for, told
from ddiff.runs.initial_weights import started
from ddiff.runs.memory import check_memory
from ddiff.runs.noising import noising_of
from ddiff.runs.prompts import Template, check_no_suffix, framed, templates_of
from ddiff.sampling.loop import OnStep, Sampler, generate, looks_ahead
from ddiff.training.learning_rate import WarmupConstant, WarmupCosine
from ddiff.training.protocols import Backend, Tracker
from ddiff.training.tracker import NoTracker
from ddiff.training.trainer import (
    Provenance,
    Trainer,
    TrainerSettings,
    TrainingSummary,
    Validation,
)

_COUNTED = (
    2**26
)  # training tokens whose pairs are counted: sorting them all would take longer than an evaluation


class Run:
    """A recipe's parts, built: `process`, `denoiser`, `tokenizer`, `vocabulary`, `objective`, `recipe`, `run_dir`."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        given: Overrides,
        backend: Backend,
    ) -> None:
        self.recipe, self.tokenizer, self.vocabulary = recipe, tokenizer, vocabulary
        self.run_dir = Path(recipe.run_dir)
        self.given = given
        self.process = given.process or build_process(recipe, vocabulary)
        check_process(self.process, vocabulary)
        self.backend = backend
        self._build_network()
        self.init: dict[str, Any] | None = None  # what was taken of another run
        self._begun = False

    def __repr__(self) -> str:
        steps = self.checkpoints.steps()
        denoiser = vars(self).get("denoiser")  # there is none between training and evaluation
        parts = [
            f"{self.process or type(vars(self).get('objective')).__name__}",
            f"{sum(parameter.numel() for parameter in denoiser.parameters()):,} parameters"
            if denoiser
            else "no network",
            f"step {steps[-1] if steps else 0} of {self.recipe.train.steps}",
            str(self.backend.device),
        ]
        return f"Run({str(self.run_dir)!r}: {', '.join(parts)})"

    def _build_network(self) -> None:
        denoiser = build_denoiser(self.recipe, self.vocabulary)
        self.objective = build_objective(self.recipe, self.process, denoiser)
        # an objective may ask the denoiser in its own way, by one of its own on the same parts
        self.denoiser: Denoiser = getattr(self.objective, "denoiser", denoiser)
        self.denoiser.precision = denoiser.precision
        self.objective.module.to(self.backend.device)

    # ------------------------------------------------------------------ data

    @cached_property
    def cache(self) -> Cache:
        return Cache()

    @cached_property
    def documents(self) -> Documents | Corpus:
        return build_documents(self.recipe, self.cache)

    @cached_property
    def train_rows(self) -> Rows:
        return build_train_rows(self.documents, self.tokenizer, self.recipe.length, self.cache)

    @cached_property
    def validation_rows(self) -> PackedRows:
        return build_validation_rows(self.documents, self.tokenizer, self.recipe.length, self.cache)

    @cached_property
    def train_conditions(self) -> Conditions:
        return self._conditions(self.documents.train)

    @cached_property
    def validation_conditions(self) -> Conditions:
        return self._conditions(self.documents.validation)

    def _conditions(self, documents: Dataset) -> Conditions:
        return read_conditions(
            documents, self.denoiser.condition_dropout, self.denoiser.condition_forms
        )

    # ------------------------------------------------------------------ stages

    def train(self, *, accepted: Callable[[], None] = lambda: None) -> TrainingSummary:
        """Train to the recipe's last step, going on from the newest checkpoint.

        `accepted` is called once that checkpoint is known to be whole and to fit, before anything is written.
        """
        start = self.checkpoints.newest()
        if start is None:
            self.begin()
        if self.recipe.evaluate.every:
            with (
                self.backend.first()
            ):  # every rank evaluates: rank 0 packs the rows, the others find them
                self.validation_rows  # noqa: B018
        self.distribute()
        trainer = self.trainer()
        with closing(trainer.tracker), closing(self._batches):
            if start is not None:
                trainer.check_fit(start)
                self.check_trained_with(start.state)
            accepted()
            return trainer.fit(start)

    def replay(self, start: Checkpoint | None, end: int, folder: Path) -> TrainingSummary:
        """The steps from `start` (None: the beginning) to `end` again, written to another folder and told to no tracker."""
        if start is None:
            self.begin()
        else:
            self.check_trained_with(start.state)
        self.distribute()
        with closing(self._batches):
            return self.trainer(folder, end, NoTracker()).fit(start)

    def distribute(self) -> None:
        """The network as it is trained: recomputed, compiled and shared among the processes as the recipe has it."""
        keys, module = self.recipe.backend_keys, self.objective.module
        if keys.compile:
            compile_blocks(module)
            self.denoiser.fixed_shapes = True
        if keys.activation_checkpointing:
            recompute_activations(module)
        self.objective.module = self.backend.wrap(module)

    def end_together(self) -> None:
        """Leave the other processes, after training: what speaks through the group is dropped first."""
        del self.objective, self.denoiser
        self.backend.close()

    def go_on_alone(self) -> None:
        """The network anew, with the weights that are evaluated: nothing is sharded, compiled or wrapped."""
        if cores := cores_alone():
            torch.set_num_threads(cores)
        self.backend = SingleBackend(str(self.backend.device))
        self._build_network()
        self.load_weights()

    def load_weights(self) -> None:
        """The newest checkpoint's weights, the average where it is what is evaluated."""
        load_weights(
            self.objective.module,
            self.checkpoints.weights(average=self.averaged),
            str(self.run_dir),
        )

    def check_trained_with(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless this run's parts are those that a checkpoint of this state was trained with."""
        parts = {"tokenizer": self.tokenizer.fingerprint, "vocabulary": self.vocabulary.fingerprint}
        check_fingerprints(
            self.run_dir,
            state,
            parts,
            f"Restore the files of {self.run_dir} that say so from a copy; a run keeps those that it was trained with.",
            parts,
        )
        remedy = (
            "Hand in the process that it was trained with: ddiff.load(run_dir, process=...)."
            if self.given.process is not None
            else "Install the version of the plugin that it was trained with, or train again."
        )
        check_noising(self.run_dir, state, noising_of(self.process), remedy)

    def changed_data(self) -> list[Difference]:
        """Which data differ from those that the newest checkpoint was trained with, by their fingerprints."""
        newest = self.checkpoints.newest()
        if newest is None:
            return []
        return compare_fingerprints(newest.state.get("fingerprints", {}), self.fingerprints(), DATA)

    @property
    def averaged(self) -> bool:
        """Whether the moving average of the weights is what is evaluated, sampled and loaded."""
        wanted = self.recipe.evaluate.weights
        return self.recipe.train.ema > 0.0 if wanted == "auto" else wanted == "ema"

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(str(self.run_dir / CHECKPOINTS), self.recipe.train.keep)

    def begin(self) -> None:
        """The first weights, once: the head's from counts, and what [train] init takes from another run."""
        if self._begun:
            return
        self._begun = True
        self._start_from_counts()
        if (init := self.recipe.train.init) is not None:
            self.init = started(self.denoiser, self.tokenizer, init)

    def _start_from_counts(self) -> None:
        """The first law is the unigram law of the training text, so the first loss is known."""
        self.denoiser.head.start_from_counts(
            torch.from_numpy(np.array(self.train_rows.token_counts()))
        )

    def trainer(
        self, folder: Path | None = None, end: int | None = None, tracker: Tracker | None = None
    ) -> Trainer:
        """What trains this run, as the recipe has it; or some of its steps, to another folder and another tracker."""
        recipe, keys = self.recipe, self.recipe.train
        cosine = WarmupCosine(keys.steps, keys.warmup, keys.floor)
        settings = TrainerSettings(
            steps=end or keys.steps,
            slots=keys.batch,
            accumulate=keys.accumulate,
            clip=keys.clip,
            ema=keys.ema,
            log_every=keys.log_every,
            checkpoint_every=keys.checkpoint_every,
            keep=keys.keep,
        )
        provenance = Provenance(
            origins=recipe.origins(),
            fingerprints=self.fingerprints(),
            made_with={
                "recipe": flatten_keys(recipe.to_dict()),
                "given": self.given.to_dict(),
                "noising": noising_of(self.process),
            },
        )
        return Trainer(
            self.objective,
            recipe.optimizer.build(module=self.backend.unwrap(self.objective.module)),
            self._batches,
            lambda step, batch: CounterRng(recipe.seed, step, batch.index, recipe.length),
            settings,
            backend=self.backend,
            run_dir=folder or self.run_dir,
            multiplier=cosine if keys.schedule == "cosine" else WarmupConstant(keys.warmup),
            tracker=tracker or self._tracker(),
            validation=self._validation(),
            provenance=provenance,
        )

    def _validation(self) -> Validation | None:
        """The evaluation while training, of what is evaluated at the end, on the same rows."""
        every = self.recipe.evaluate.every
        return None if every is None else Validation(every, self._validated, self.averaged)

    def _validated(self) -> tuple[Mapping[str, float], str]:
        quiet = Console(quiet=True, force_terminal=False)  # the bar of training stands
        keys = self.recipe.evaluate
        found = self._score(
            self.validation_rows, self._evaluated, keys.draws, self.validation_conditions, quiet
        )
        unit, mean = f"nats_per_{found.unit}", found.nelbo_nats_per_token
        figures = {f"validation_{found.bound.lower()}_{unit}": mean}
        spoken = f"validation {found.bound} {mean:.4f}"
        if found.interval is not None:
            low, high = found.interval
            figures |= {
                f"validation_interval_low_{unit}": low,
                f"validation_interval_high_{unit}": high,
            }
            spoken += f" ({low:.4f} to {high:.4f})"
        return figures, f"{spoken} nats/{found.unit}"

    def fingerprints(self) -> dict[str, str]:
        """What tells the parts and the data of this run from others."""
        found = {
            "tokenizer": self.tokenizer.fingerprint,
            "vocabulary": self.vocabulary.fingerprint,
            "training rows": self.train_rows.fingerprint,
            "validation rows": self.validation_rows.fingerprint,
        }
        conditions = {
            "conditions": self.train_conditions,
            "validation conditions": self.validation_conditions,
        }
        return found | {
            name: known.fingerprint for name, known in conditions.items() if known.values
        }

    def _tracker(self) -> Tracker:
        if self.backend.rank > 0:
            return NoTracker()
        return self.recipe.tracker.build(run_dir=str(self.run_dir), recipe=self.recipe.to_dict())

    @cached_property
    def _batches(self) -> Prefetcher[Batch]:
        """`_batch_at`, read ahead."""
        return Prefetcher(
            self._batch_at,
            accumulate=self.recipe.train.accumulate,
            workers=self.recipe.backend_keys.workers,
            quiet=self.backend.rank > 0,
        )

    def _batch_at(self, step: int, micro: int) -> Batch:
        """This rank's rows of a micro-batch, on the host; their order is a function of seed and global sample number."""
        keys = self.recipe.train
        size = keys.batch // (keys.accumulate * self.backend.world_size)
        first = (micro * self.backend.world_size + self.backend.rank) * size
        slots = np.arange(first, first + size)
        rows = self.train_rows.order(self.recipe.seed, step * keys.batch + slots)
        batch = batch_rows(self.train_rows, rows, index=slots, conditions=self.train_conditions)
        if keys.prefix > 0.0:
            batch = batch.with_prefixes(self._prefixes(step, batch.index))
        return batch

    def _prefixes(self, step: int, index: Tensor) -> Tensor:
        """[B] how many first tokens each sample is shown: of a share of them uniformly many, of the others none."""
        chosen, size = CounterRng(self.recipe.seed, step, index, 2).uniform("prefix").unbind(-1)
        return torch.where(chosen < self.recipe.train.prefix, (size * self.recipe.length).long(), 0)

    def evaluate(self, *, changed_data: bool = False) -> tuple[Evaluation, Baselines]:
        """Compute the bound on the validation text, every token of the rows read, once, with counting baselines.

        Raises CheckpointError when the data are not those that the run was trained with, unless `changed_data` allows it.
        """
        if not changed_data and (changed := self.changed_data()):
            raise CheckpointError(other_data(self.run_dir, changed))
        keys, chosen = self.recipe.evaluate, self._evaluated
        evaluation = self._score(
            self.validation_rows, chosen, keys.draws, self.validation_conditions
        )
        return evaluation, self._baselines(chosen)

    @property
    def _evaluated(self) -> NDArray[np.int64]:
        """The numbers of the validation rows that are read."""
        held, wanted = len(self.validation_rows), self.recipe.evaluate.rows
        return (
            np.arange(held)
            if wanted is None or wanted >= held
            else np.arange(wanted) * held // wanted
        )

    def _score(
        self,
        rows: PackedRows,
        chosen: NDArray[np.int64],
        draws: int,
        conditions: Conditions,
        console: Console | None = None,
    ) -> Evaluation:
        keys = self.recipe.evaluate
        # bytes of symbols mean nothing, and those of some rows are not known
        has_bytes = self.tokenizer.unit == "token" and len(chosen) == len(rows)
        self.objective.module.eval()
        return evaluate(
            self.objective,
            lambda numbers: batch_rows(rows, chosen[numbers], conditions=conditions).to(
                self.backend.device
            ),
            rows.first_documents()[chosen],
            length=self.recipe.length,
            times=getattr(self.objective, "times", FlatTimes()).over(
                *keys.window, self.recipe.length
            ),
            num_bytes=rows.tokens.num_bytes if has_bytes else None,
            draws=draws,
            batch=keys.batch,
            seed=keys.seed,
            unit=self.tokenizer.unit,
            device=self.backend.device,
            console=console,
        )

    def _baselines(self, chosen: NDArray[np.int64]) -> Baselines:
        streams = self.train_rows.stream(_COUNTED), self.validation_rows.stream()
        return baselines(
            *streams, self.vocabulary.num_tokens, self.validation_rows.tokens_in_rows(chosen)
        )

    def protocol(self) -> dict[str, Any]:
        """How the validation text is evaluated: runs that agree in it can be compared."""
        keys, rows, read = self.recipe.evaluate, self.validation_rows, len(self._evaluated)
        some = f", {read} of {len(rows)} rows" if read < len(rows) else ""
        return {
            "window": list(keys.window),
            "tokenizer": self.tokenizer.fingerprint,
            "data": rows.fingerprint + some,
            "conditions": sorted(self.validation_conditions.values),
        }

    def nelbo(
        self,
        texts: Sequence[str],
        draws: int = 8,
        *,
        conditions: Mapping[str, int | Sequence[float]] | None = None,
    ) -> Evaluation:
        """The bound of some texts, each a document; more draws narrow the estimate, not the bound. All texts are under
        the `conditions`."""
        if isinstance(texts, str | bytes | dict) or not isinstance(texts, Iterable):
            raise ArgumentError(
                f"run.nelbo: texts must be a list of texts, each a document; got {texts!r}. Write [text]."
            )
        texts = [check_text(text, f"run.nelbo: text {number}") for number, text in enumerate(texts)]
        given = told(self.denoiser, conditions or {}, len(texts))
        rows = pack_texts(texts, self.tokenizer, self.recipe.length)
        return self._score(rows, np.arange(len(rows)), draws, Conditions(given.values))

    def sample(
        self,
        count: int | None = None,
        *,
        steps: int | None = None,
        seed: int | None = None,
        batch: int | None = None,
        prompt: str | Sequence[str] | None = None,
        infill: str | Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        sampler: str | Sampler | None = None,
        settings: Sequence[str] = (),
        on_step: OnStep | None = None,
    ) -> list[dict[str, Any]]:
        """Draw sequences: dicts with `index`, `text`, `ids`, `nfe`, and the `prompt` or `infill` they keep, bit for bit.

        A sample is a function of its number and the seed, not of its batch. `prompt`, one text or several, is gone on from
        to [data] length; `infill` has gaps, `She [MASK:8] to Bath`, and ends where it ends. `count` samples of each: the
        recipe's, or one where several are given. `conditions` by name: a label (int), a vector, or one of them per sample;
        `guidance` above 1 heeds them more. `sampler` is a kind, or an object; `settings` are `key=value` texts over its
        keys. `on_step(step, canvas)` sees every canvas.
        """
        keys = self.recipe.sample
        seed, batch = _or(seed, keys.seed), _or(batch, keys.batch)
        templates = templates_of(prompt, infill, self.tokenizer, self.recipe.length)
        count = _or(count, keys.count if len(templates) <= 1 else 1)
        _check_asked(count, batch, seed, _or(steps, keys.steps))
        wanted = [template for template in templates for _ in range(count)]
        total = len(wanted) or count
        given = told(self.denoiser, keys.conditions if conditions is None else conditions, total)
        strength = keys.guidance if guidance is None else guidance
        moves = self.sampler(sampler, settings, steps)
        check_asking(
            self.objective, self.process, self.denoiser, moves, given, strength, self.recipe.length
        )
        self._check_suffixes(templates, moves)
        self.objective.module.eval()
        samples: list[dict[str, Any]] = []
        batches = range(0, total, batch)
        with show_progress(
            None if moves.steps is None else len(batches) * moves.steps, "sampling"
        ) as bar:

            def stepped(step: int, canvas: Any) -> None:
                bar.advance(1)
                if on_step:
                    on_step(step, canvas)

            for first in batches:
                chosen = slice(first, min(first + batch, total))
                samples += self._drawn(
                    moves, chosen, wanted[chosen], given.rows(chosen), strength, seed, stepped
                )
        return samples

    def _check_suffixes(self, templates: Sequence[Template], sampler: Sampler) -> None:
        """Refuse text after a gap where network or sampler goes from left to right."""
        if self.denoiser.inputs == "previous":
            check_no_suffix(templates, "this run's network", "take a run that sees both sides")
        elif not looks_ahead(sampler):
            remedy = "a sampler that looks ahead (ancestral, or blockwise with sight=all) if the run was trained so"
            check_no_suffix(templates, f"the sampler {type(sampler).__name__}", remedy)

    def sampler(
        self,
        sampler: str | Sampler | None = None,
        settings: Sequence[str] = (),
        steps: int | None = None,
    ) -> Sampler:
        """The recipe's sampler, or another by kind with `settings` over its keys; an object is what it is."""
        if sampler is not None and not isinstance(sampler, str):
            if settings or steps is not None:
                raise ArgumentError(
                    "run.sample: steps and settings belong to samplers by kind; a sampler object has its own."
                )
            return sampler
        part = configure_sampler(self.recipe, sampler, settings)
        return part.build(steps=_or(steps, self.recipe.sample.steps), vocabulary=self.vocabulary)

    def _drawn(
        self,
        sampler: Sampler,
        numbers: slice,
        templates: Sequence[Template],
        given: SampleConditions,
        guidance: float,
        seed: int,
        on_step: OnStep,
    ) -> list[dict[str, Any]]:
        """One batch of samples, with these numbers."""
        device, length = self.backend.device, self.recipe.length
        index = torch.arange(numbers.start, numbers.stop, device=device)
        frame = (
            framed(templates, length, self.tokenizer.eos_id or 0).to(device) if templates else None
        )
        drawn = generate(
            sampler,
            self.process,
            network_for(
                self.denoiser,
                self.process,
                sampler,
                given.to(device),
                guidance,
                frame.valid if frame else None,
            ),
            index=index,
            length=length,
            seed=seed,
            given=frame.words if frame else None,
            clamped=frame.clamped if frame else None,
            on_step=on_step,
        )
        sizes = [len(template.ids) if template.whole else length for template in templates] or [
            length
        ] * len(index)
        rows = [row[:size] for row, size in zip(drawn.ids.tolist(), sizes)]
        asked = [
            {"infill" if template.whole else "prompt": template.text} for template in templates
        ] or [{}] * len(rows)
        texts, nfe = self.tokenizer.decode(rows), drawn.runs.tolist()
        return [
            {"index": number, **told_, "text": text, "ids": row, "nfe": runs}
            for number, told_, text, row, runs in zip(index.tolist(), asked, texts, rows, nfe)
        ]


def other_data(run_dir: Path, changed: Sequence[Difference]) -> str:
    """The message for data that are not those of the run."""
    return (
        f"The data are not those that {run_dir} was trained and evaluated with: {'; '.join(map(str, changed))}. Its "
        "figures would change though the model did not, text that was trained on may be scored, and the baselines count "
        f"another corpus. Restore the files of [data]; or score the data as they are now beside the run's own figures: "
        f"ddiff eval {run_dir} --out other_data.json (from Python, run.evaluate(changed_data=True))."
    )


def build_run(recipe: Recipe, given: Overrides) -> Run:
    """Documents, tokenizer and vocabulary by the recipe, then the parts that a saved run has too."""
    cache, backend = Cache(), build_backend(recipe)
    with backend.first():
        documents = build_documents(recipe, cache)
        tokenizer = recipe.tokenizer.build(documents=documents, cache=cache)
        rows = build_train_rows(documents, tokenizer, recipe.length, cache)
        check_repetitions(documents, load_or_build_shards(documents, tokenizer, cache))
        vocabulary = given.vocabulary or (given.process.vocabulary if given.process else None)
        if vocabulary is None:
            vocabulary = recipe.vocabulary.build(tokenizer=tokenizer, rows=rows, cache=cache)
    check_tokenizer(tokenizer, vocabulary)
    with suppress(
        NotImplementedError, RuntimeError
    ):  # a part that cannot be built without its weights
        check_memory(recipe, build_on_meta(recipe, vocabulary))
    built = Run(recipe, tokenizer, vocabulary, given, backend)
    vars(built).update(
        cache=cache,
        documents=documents,
        train_rows=rows,
        # here and not when first asked for: what the denoiser cannot read is refused before anything is written
        train_conditions=built._conditions(documents.train),
        validation_conditions=built._conditions(documents.validation),
    )
    return built


def _check_asked(count: int, batch: int, seed: int, steps: int) -> None:
    """Raises ArgumentError for numbers that a recipe would refuse."""
    for name, number in (("count", count), ("batch", batch), ("steps", steps)):
        if not 1 <= number < COUNTS:
            raise ArgumentError(
                f"run.sample: {name} must be at least 1 and below 2^31; got {shorten(str(number))}."
            )
    if not 0 <= seed < 2**64:
        raise ArgumentError(f"run.sample: seed must be in [0, 2^64); got {shorten(str(seed))}.")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
