"""Trained run: recipe, model and data, with the methods `evaluate`, `nelbo` and `sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.console import Console

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.clock import LevelClock
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.batch import Batch
from ddiff.data.chat import ChatEncoder
from ddiff.data.chat_template import Message, find_template
from ddiff.data.tokenizer import Tokenizer
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError
from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.chain_rule import ChainRule
from ddiff.evaluation.likelihood import Evaluation
from ddiff.nn.adapters import fingerprint_base
from ddiff.nn.denoiser import Denoiser, count_parameters
from ddiff.recipe.model import Recipe
from ddiff.run_dir.files import TOKENIZER, VOCABULARY
from ddiff.run_dir.identity import Difference
from ddiff.runs.build import (
    NO_OVERRIDES,
    Model,
    ModelObjective,
    Overrides,
    assemble,
    replace_process,
)
from ddiff.runs.conditioning import check_sampling
from ddiff.runs.data import RunData, RunText
from ddiff.runs.editing import EditRequest, edit_texts
from ddiff.runs.evaluation import (
    count_baselines,
    count_changed_documents,
    evaluation_protocol,
    find_given_own_vectors,
    score_texts,
    score_validation,
)
from ddiff.runs.exact import score_chain_rule
from ddiff.runs.initial_weights import (
    explain_base,
    load_base,
    load_initial_weights,
    start_from_cooccurrence,
    start_pretrained_head,
)
from ddiff.runs.noising import sample_noising
from ddiff.runs.prompts import Template, encode_messages
from ddiff.runs.provenance import (
    changed_data_error,
    check_checkpoint,
    find_changed_data,
    run_fingerprints,
)
from ddiff.runs.sampling import SampleRequest, build_sampler, draw_samples, draw_templates
from ddiff.runs.trainable import TrainableRun, count_preview_steps
from ddiff.sampling.editing import EditMode
from ddiff.sampling.loop import OnStep, Sampler

if TYPE_CHECKING:
    from ddiff.runs.hub.push import PushedModel
    from ddiff.runs.hub.save import SavedModel

MOST_COUNTED = 2**22  # training tokens whose bigrams are counted during training


@dataclass(frozen=True, eq=False, repr=False)
class Run(TrainableRun):
    """Text recipe with its model and its data.

    `ddiff.run` and `ddiff.load` return a run with the weights of the newest checkpoint.

    Attributes:
        clock_source: source of the level clock of a tree: "recipe", "found" (by `ddiff clock`) or
            "given" (to `with_clock`). Records of evaluations and samples contain it.
    """

    recipe: Recipe
    model: Model
    data: RunData
    overrides: Overrides = NO_OVERRIDES
    clock_source: str = "recipe"

    @classmethod
    def assemble(
        cls, text: RunText, vocabulary: Vocabulary, device: torch.device, overrides: Overrides
    ) -> Run:
        """Build a run with untrained weights from `text`, which contains the recipe.

        `overrides` contains the objects that replace those of the recipe.
        """
        recipe = text.recipe
        model = assemble(recipe, vocabulary, device, process=overrides.process)
        if recipe.denoiser_keys.lora is not None:
            load_base(model.denoiser, recipe, text.tokenizer)
        data = RunData(text, model.denoiser.condition_dropout, model.denoiser.condition_forms)
        return cls(recipe, model, data, overrides)

    def with_clock(self, clock: LevelClock) -> Run:
        """Return the same run with another level clock, for evaluation and sampling.

        Raises ArgumentError if the process is not a tree.
        """
        if not isinstance(self.process, TreeProcess):
            raise ArgumentError(
                "run.with_clock: only a tree process has a level clock; got a run with the process "
                f"{self.process}."
            )
        model = replace_process(self.recipe, self.model, self.process.with_clock(clock))
        return replace(self, model=model, clock_source="given")

    def __repr__(self) -> str:
        parameters = count_parameters(self.denoiser)
        parts = [
            str(self.process or type(self.objective).__name__),
            f"{parameters:,} parameters",
            f"step {self.step} of {self.recipe.train.steps}",
            str(self.device),
        ]
        return f"Run({str(self.run_dir)!r}: {', '.join(parts)})"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def process(self) -> ForwardProcess | None:
        return self.model.process

    @property
    def denoiser(self) -> Denoiser:
        return self.model.denoiser

    @property
    def objective(self) -> ModelObjective:
        return self.model.objective

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def precision(self) -> torch.dtype | None:
        return self.denoiser.precision

    # ------------------------------------------------------------------ likelihood

    def evaluate(
        self,
        *,
        changed_data: bool = False,
        until: float | None = None,
        ranks: Ranks | None = None,
    ) -> tuple[Evaluation, Baselines]:
        """Compute the likelihood bound of the validation text, and n-gram baselines.

        In each draw, every token of the evaluated rows is scored at one noise time. `until`: half
        width of the Monte-Carlo interval in nats per token; draws are added until the interval is
        that narrow. `ranks`: processes that divide the batches, all of which call this method
        (`ddiff.connect_ranks`); None: only this process. Raises CheckpointError if the data differ
        from the data of training, unless `changed_data` is True.
        """
        ranks = ranks or Ranks()
        ranks.on_first(self.read_validation)  # the other ranks then read the tokens in the cache
        # checked here and not in `ddiff.load`, which must work without the data
        if not changed_data:
            changed = ranks.on_first(self.find_changed_data)
            if changed:
                raise changed_data_error(self.run_dir, changed)
        lossy = ranks.on_first(lambda: count_changed_documents(self.data, self.recipe))
        found = score_validation(
            self.model,
            self.data,
            self.recipe,
            until=until,
            has_bytes=lossy == 0,
            ranks=ranks,
        )
        num_tokens = self.vocabulary.num_tokens
        # only one process counts the training text, which may need much memory
        counted = ranks.on_first(lambda: count_baselines(self.data, self.recipe, num_tokens))
        return found, counted

    def find_changed_data(self) -> list[Difference]:
        """List the data whose fingerprints differ from those of the newest checkpoint."""
        return find_changed_data(self.checkpoints.newest(), self.data, self.model)

    def nelbo(
        self,
        texts: Sequence[str],
        draws: int = 8,
        *,
        conditions: Mapping[str, int | Sequence[float]] | None = None,
    ) -> Evaluation:
        """Compute the likelihood bound of given texts, one document per text.

        In a run of rows with a fill symbol, a shorter text is filled up to a row. `draws`: number
        of independent draws of noise times and noise per text. More draws narrow the confidence
        interval and do not change the expected bound. `conditions`: maps the name of a condition to
        one value for all texts or to a list with one value per text. If one of them is a vector
        that the data set computes from the text itself, the bound does not bound the likelihood of
        the text, and the result has neither perplexity nor bits per byte.
        """
        found = score_texts(self.model, self.recipe, self.tokenizer, texts, draws, conditions or {})
        if not conditions:
            return found
        own = find_given_own_vectors(self.data, self.run_dir, conditions)
        return found.mark_own_vectors(own) if own else found

    def chain_rule(self, texts: Sequence[str]) -> ChainRule:
        """Compute the exact likelihood of short texts under a masked model, one document per text.

        Returns `nll` and `bound`, float64 [n] in nats per text: -ln p, and the expectation of the
        bound, which is larger. A text has at most 16 tokens, end mark included, and the network
        does not depend on time (`[denoiser] time = false`). Raises ArgumentError for other models.
        """
        return score_chain_rule(self.model, self.tokenizer, texts, self.recipe.length)

    def lm_eval(
        self,
        tasks: str | Sequence[str],
        draws: int = 64,
        *,
        num_fewshot: int | None = None,
        limit: float | None = None,
        include_path: str | None = None,
        gen_kwargs: Mapping[str, Any] | None = None,
        seed: int | None = None,
        batch: int | None = None,
        truncate: bool = False,
        greedy: Literal["auto", "always", "never"] = "auto",
        sampler: str | None = None,
        steps: int | None = None,
        settings: Sequence[str] = (),
        conditions: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        out: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate the run on tasks of the lm-evaluation-harness (package lm_eval).

        Log-likelihoods are exact for a run with an exact likelihood. Otherwise they are estimates
        of lower bounds. Prints the price of the job before it starts: requests, network evaluations
        and estimated time. Returns the record, and writes it to lm-eval-TASKS.json in the run
        directory.

        Args:
            tasks: names of tasks or groups of the harness.
            draws: draws of times and noise per likelihood: 1, or an even number.
            num_fewshot: number of examples before each question; by default that of the task.
            limit: number of documents per task, or a share below 1.
            include_path: folder with more task definitions.
            gen_kwargs: arguments of generation that replace those of the tasks.
            seed: seed of times, noise and samples; by default those of the recipe.
            batch: rows per batch; does not change the results.
            truncate: leave out the beginning of a context that is too long for a row, which is an
                error otherwise.
            greedy: requests for which the sampler draws a continuation at temperature 0, which is
                compared with the given one. "auto": questions with one continuation.
            sampler: name of the sampler of generated texts.
            steps: number of steps of the sampler.
            settings: `key=value` texts that override keys of the sampler.
            conditions: maps the name of a condition to a label or a vector for all requests.
            dry_run: return only the price.
            out: path of the JSON file to write instead of a file of the run.
        """
        from ddiff.runs.lm_eval.harness import TaskOptions, evaluate_tasks
        from ddiff.runs.lm_eval.scoring import Settings

        evaluation = Settings(
            draws=draws,
            seed=seed,
            batch=batch,
            truncate=truncate,
            greedy=greedy,
            sampler=sampler,
            steps=steps,
            settings=tuple(settings),
            conditions=conditions or {},
        )
        options = TaskOptions(num_fewshot, limit, include_path, gen_kwargs)
        return evaluate_tasks(self, tasks, evaluation, options, dry_run=dry_run, out=out)

    def protocol(self) -> dict[str, Any]:
        """Return the evaluation settings that must be equal in two runs that are compared."""
        return evaluation_protocol(self.data, self.recipe)

    # ------------------------------------------------------------------ samples

    def sample(
        self,
        count: int | None = None,
        *,
        steps: int | None = None,
        seed: int | None = None,
        batch: int | None = None,
        prompt: str | Sequence[str] | None = None,
        infill: str | Sequence[str] | None = None,
        message: str | Sequence[str | Sequence[Message]] | None = None,
        conditions: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        sampler: str | Sampler | None = None,
        settings: Sequence[str] = (),
        on_step: OnStep | None = None,
        ranks: Ranks | None = None,
    ) -> list[dict[str, Any]]:
        """Draw samples.

        Returns one dict per sample with `index`, `text`, `ids`, `nfe` (number of network
        evaluations), and `prompt`, `infill`, or `message` and `answer` if given. A sample depends
        on its index and the seed, but not on the batch size. The tokens of a prompt, infill text or
        message never change. If an argument is None, the value in the recipe is used.

        Args:
            count: samples per prompt or infill text; the default is 1 for several texts.
            steps: number of steps of the sampler.
            seed: seed of the random generator.
            batch: number of samples per batch.
            prompt: one text or several; each sample continues its text to [data] length tokens.
            infill: one text or several with gaps, such as `She [MASK:8] to Bath`. The sample ends
                with the text.
            message: one message of a user or several, each of which is answered. In place of a
                text, an item may be a conversation, a list of {"role", "content"}.
            conditions: maps the name of a condition to a label (int) or a vector for all samples,
                or to a list with one label or vector per sample.
            guidance: classifier-free guidance weight; above 1 follows the conditions more closely.
            sampler: name of a sampler, or a sampler object.
            settings: `key=value` texts that override keys of the sampler.
            on_step: callback `on_step(step, canvas)` after every step of a batch of this process.
            ranks: processes that divide the batches, all of which call this method with the same
                arguments and get all samples; None: only this process.
        """
        request = SampleRequest(
            count=count,
            steps=steps,
            seed=seed,
            batch=batch,
            prompt=prompt,
            infill=infill,
            conditions=conditions,
            guidance=guidance,
            sampler=sampler,
            settings=settings,
        )
        arguments = (self.recipe, self.model, self.tokenizer)
        if message is None:
            return draw_samples(*arguments, request, on_step, ranks)
        if prompt is not None or infill is not None:
            raise ArgumentError(
                "run.sample: message excludes prompt and infill; got both. The chat template "
                "writes the text around a message."
            )
        return draw_templates(*arguments, self._open_answers(message), request, on_step, ranks)

    def _open_answers(self, message: str | Sequence[str | Sequence[Message]]) -> list[Template]:
        """Return one template per message, whose answer is sampled."""
        settings = self.data.text.chat_settings()
        encoder = ChatEncoder(self.tokenizer, find_template(self.tokenizer, settings.template))
        conversations = [message] if isinstance(message, str) else message
        return [
            encode_messages(each, encoder, self.recipe.length, settings.answer_length)
            for each in conversations
        ]

    def edit(
        self,
        texts: str | Sequence[str],
        ratio: float = 0.3,
        mode: EditMode = "random",
        *,
        conditions: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | Sampler | None = None,
        settings: Sequence[str] = (),
        seed: int | None = None,
        batch: int | None = None,
        on_step: OnStep | None = None,
        ranks: Ranks | None = None,
    ) -> list[dict[str, Any]]:
        """Edit texts toward a condition: noise some tokens and sample them under the condition.

        Returns one dict per text with `index`, `source`, `text`, `ids`, `edited` (the sampled
        positions), `ratio`, `mode` and `nfe` (number of network evaluations). All other positions
        keep their tokens. Special tokens are never edited. Arguments that are not listed here are
        those of `sample`.

        Args:
            texts: one text or several, of at most [data] length tokens.
            ratio: fraction of the tokens that are sampled again, and time at which sampling starts.
                0 changes nothing, and 1 samples every token.
            mode: "random" chooses every token with probability `ratio`, "entropy" the tokens of
                largest predictive entropy, "suffix" the last tokens.
            conditions: the target: a label or vector for all texts, or a list with one per text.
            sampler: a sampler on a grid of times.
        """
        request = EditRequest(
            texts, ratio, mode, conditions, guidance, steps, sampler, settings, seed, batch
        )
        return edit_texts(self.recipe, self.model, self.tokenizer, request, on_step, ranks)

    # ------------------------------------------------------------------ other programs

    def save_pretrained(self, folder: str | Path) -> SavedModel:
        """Save the run as a model of the transformers library.

        `folder`: new or empty folder, which appears when it is complete. The weights that the run
        evaluates are saved. The folder has configuration, weights, tokenizer, model card, the
        network and some samplers as one Python file that needs only torch and transformers, and the
        record from which `ddiff.load(folder)` restores an equal run. Raises ArgumentError, which
        names the reason, if such a file cannot represent the run.
        """
        from ddiff.runs.hub.save import save_pretrained

        return save_pretrained(self, folder)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = True,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
        dry_run: bool = False,
    ) -> PushedModel:
        """Save the run as `save_pretrained` does, and upload the folder to the hub.

        Args:
            name: name of the repository, OWNER/NAME. It is created if it does not exist.
            private: whether a new repository is private.
            revision: branch to which the files are uploaded; None: the main branch.
            message: commit message.
            token: access token; None: that of `hf auth login`. It is never printed.
            dry_run: list the files without a connection to the hub.
        """
        from ddiff.runs.hub.push import push_to_hub

        return push_to_hub(
            self,
            name,
            private=private,
            revision=revision,
            message=message,
            token=token,
            dry_run=dry_run,
        )

    # ------------------------------------------------------------------ training

    def check_stages(self) -> None:
        check_sampling(self.recipe, self.model)
        if self.recipe.sample.every is not None:
            # some samplers refuse small numbers of steps
            build_sampler(self.recipe, self.model, steps=count_preview_steps(self.recipe))

    def initialize_weights(self) -> dict[str, Any] | None:
        """Initialize the head biases and the embeddings, then load the weights of [train] init.

        The biases come from token counts: the predicted distribution before training is the unigram
        distribution of the training text, so the first loss is known. [train] embeddings selects
        how the embeddings start. Returns a record of the weights that [train] init loads, or None
        if the recipe has no [train] init.
        """
        adapters = self.denoiser.adapters  # their base is loaded already
        if adapters is None or adapters.has_new_head:
            counts = self.data.train_rows.token_counts()
            self.denoiser.head.start_from_counts(torch.from_numpy(np.array(counts)))
        if adapters is not None:
            return {"base": fingerprint_base(self.denoiser)}
        if self.recipe.train.embeddings == "cooccurrence":
            start_from_cooccurrence(self.denoiser, self.data.train_rows)
        start_pretrained_head(self.denoiser)
        init = self.recipe.train.init
        if init is None:
            return None
        return load_initial_weights(self.denoiser, self.tokenizer, init)

    def rng_at(self, step: int, batch: Batch) -> CounterRng:
        return CounterRng(self.recipe.seed, step, batch.index, self.recipe.length)

    def prefer_fixed_shapes(self) -> None:
        # otherwise each new number of rows would trigger a compilation
        self.denoiser.fixed_shapes = True

    def read_validation(self) -> None:
        self.data.validation_rows  # noqa: B018

    def score_validation(self, ranks: Ranks | None = None) -> tuple[Mapping[str, float], str]:
        """Evaluate the validation rows. Return metrics by name, and one line of text to print."""
        quiet = Console(quiet=True, force_terminal=False)  # keep the progress bar of training
        found = score_validation(self.model, self.data, self.recipe, quiet, ranks=ranks)
        unit = f"nats_per_{found.unit}"
        mean = found.nelbo_nats_per_token
        figures = {f"validation_{found.bound.lower()}_{unit}": mean}
        sentence = f"validation {found.bound} {mean:.4f}"
        if found.interval is not None:
            low, high = found.interval
            figures[f"validation_interval_low_{unit}"] = low
            figures[f"validation_interval_high_{unit}"] = high
            sentence += f" ({low:.4f} to {high:.4f})"
        return figures, f"{sentence} nats/{found.unit}"

    def sample_texts(self, steps: int) -> tuple[Mapping[str, str], int]:
        message = self.data.first_prompts(1) if self.data.is_chat else None
        (sample,) = self.sample(1, steps=steps, message=message)
        return {"text": sample["text"]}, sample["nfe"]

    def references(self) -> Mapping[str, float]:
        """Return the nats per token of a bigram model, if it is counted within a second."""
        if len(self.data.train_rows) * self.recipe.length > MOST_COUNTED:
            return {}
        counted = count_baselines(self.data, self.recipe, self.vocabulary.num_tokens)
        return {"bigram": counted.bigram_nats_per_token}

    def copier(self) -> Callable[[], Run]:
        # the forward process has no weights, so the object is reused
        build = partial(assemble, self.recipe, self.vocabulary, self.device, process=self.process)
        recipe = self.recipe
        data = self.data
        overrides = self.overrides

        def copy() -> Run:
            model = build()
            if recipe.denoiser_keys.lora is not None:
                load_base(model.denoiser, recipe, data.tokenizer)
            return Run(recipe, model, data, overrides)

        return copy

    # ------------------------------------------------------------------ record

    def fingerprints(self) -> dict[str, str]:
        return run_fingerprints(self.data, self.model)

    def noising(self) -> list[float]:
        return sample_noising(self.process)

    def given(self) -> dict[str, str]:
        return self.overrides.to_dict()

    def advise_on_differences(self) -> str:
        return "" if self.denoiser.adapters is None else explain_base(self.recipe)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        check_checkpoint(checkpoint, self.data, self.model, self.overrides)

    def save_components(self, directory: Path) -> None:
        self.tokenizer.save(str(directory / TOKENIZER))
        self.vocabulary.save(str(directory / VOCABULARY))
        self.data.text.save_chat(directory)
