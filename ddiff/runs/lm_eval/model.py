"""Model `ddiff` of the lm-evaluation-harness. Importing this module registers the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import count_parameters
from ddiff.runs.lm_eval.price import DOCUMENTS, GENERATIONS, PAIRS, price_requests
from ddiff.runs.lm_eval.record import describe_job
from ddiff.runs.lm_eval.scoring import Greedy, Request, RequestScorer, Settings
from ddiff.runs.loading import load
from ddiff.runs.run import Run


@register_model("ddiff")
class HarnessModel(LM):
    """Text run as a model of the harness.

    Args:
        run: directory of a run, or a loaded run.
        announces: print the price of the requests of each type before they are answered.
        batch_size: ignored, as are max_batch_size and device: the harness passes a batch size of 1
            and the device cuda:0 if the user names none. `batch` is the batch size, and the run
            chooses its device.

    The other arguments are those of `Settings`.
    """

    def __init__(
        self,
        run: str | Run,
        draws: int = 64,
        seed: int | None = None,
        batch: int | None = None,
        truncate: bool = False,
        greedy: Greedy = "auto",
        sampler: str | None = None,
        steps: int | None = None,
        settings: Sequence[str] = (),
        conditions: dict[str, Any] | None = None,
        announces: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ArgumentError(
                f"--model_args: the model ddiff has no argument {min(unknown)!r}. Its arguments "
                "are run, draws, seed, batch, truncate, greedy, sampler and steps."
            )
        loaded = load(run) if isinstance(run, str) else run
        self.settings = Settings(
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
        self.announces = announces
        self.scorer = RequestScorer(loaded, self.settings)
        self.run = loaded
        self._device = loaded.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.scorer.score_pairs(self._read(requests, PAIRS))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self.scorer.score_documents(self._read(requests, DOCUMENTS))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.scorer.generate(self._read(requests, GENERATIONS))

    @property
    def tokenizer_name(self) -> str:
        return f"ddiff {self.run.tokenizer.fingerprint}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> NoReturn:
        self.chat_template()

    def chat_template(self, chat_template: bool | str = False) -> NoReturn:
        raise ArgumentError(
            "--apply_chat_template: the tokenizers of ddiff have no chat template, since runs are "
            "trained on plain text. Leave out the option; the prompts of the task are then plain "
            "text."
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return settings and Monte-Carlo errors, which the harness writes to its results."""
        parameters = count_parameters(self.run.denoiser)
        return {"model_num_parameters": parameters, "ddiff": describe_job(self.scorer)}

    def _read(self, instances: Sequence[Instance], kind: str) -> list[Request]:
        """Convert requests of the harness, and print their price if `announces` is true."""
        requests = read_instances(instances)
        if self.announces:
            # a separate scorer, because pricing counts the encoded texts, too
            price = price_requests(RequestScorer(self.run, self.settings), {kind: requests})
            print(f"ddiff: {price}", file=sys.stderr)
        return requests


def read_instances(instances: Sequence[Instance]) -> list[Request]:
    """Convert requests of the harness."""
    requests = []
    for number, instance in enumerate(instances):
        # requests that no task made have neither a task nor a document
        task = instance.task_name or "unnamed"
        document = number if instance.doc_id is None else instance.doc_id
        requests.append(Request(task, document, tuple(instance.args)))
    return requests
