"""Judge of generated text that is a trained autoregressive run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.data.batch import Batch
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.judge_model import (
    JudgeModel,
    Scores,
    TransformersJudge,
    Window,
    check_windows,
    plan_windows,
    score_windows,
)
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.run_dir.files import RECIPE
from ddiff.runs.evaluation_header import fingerprint_weights
from ddiff.runs.loading import load
from ddiff.runs.run import Run


def open_judge(source: str, device: torch.device, ranks: Ranks | None = None) -> JudgeModel:
    """Open a judge: a run directory, a local directory of a model, or a name on the hub.

    Args:
        source: path or name.
        device: device of a model of the transformers library.
        ranks: processes that divide the scored windows; None: only this process.

    Raises DataError if there is no model, CheckpointError if a run has no checkpoint, and
    ArgumentError if a run has only a bound of the likelihood.
    """
    if not source.strip() or not (Path(source) / RECIPE).is_file():
        try:
            return TransformersJudge.load(source, device=device, ranks=ranks)
        except DataError as error:
            raise DataError(
                f"--judge: {error} A judge is the directory of an autoregressive run (with a "
                f"{RECIPE}), the directory of a causal language model of the transformers library, "
                "or the name of such a model on the hub."
            ) from error
    run = load(source)
    require_text_recipe(run.recipe, "--judge")
    return RunJudge(run, ranks=ranks)


class RunJudge:
    """Trained run with an exact likelihood, such as an autoregressive run.

    The first token of a document is predicted from the mask, as in training, so every token is
    scored. The tokens after an end mark are another document, and do not attend to the tokens
    before it.

    Args:
        run: the run. Samples that are longer than [data] length are read in windows.
        stride: distance of two windows; by default half of [data] length.
        ranks: processes that divide the windows, all of which call `score` with the same rows;
            None: only this process.

    Raises ArgumentError if the run has only a bound of the likelihood.
    """

    def __init__(self, run: Run, stride: int | None = None, ranks: Ranks | None = None) -> None:
        if run.objective.bound != "NLL":
            raise ArgumentError(
                f"--judge: {run.run_dir} must have an exact likelihood; its objective has only a "
                "bound, whose gap would count as an error of the samples. Give an autoregressive "
                'run (objective kind = "ar"), such as a run of the recipe ar_small.'
            )
        self._run = run
        self._ranks = ranks or Ranks()
        self._window = run.recipe.length
        self._stride = max(1, self._window // 2) if stride is None else stride
        self.name = str(run.run_dir)
        check_windows(self.name, self._window, self._stride, 1)
        self._end = run.tokenizer.eos_id
        self.tokenizer_fingerprint: str | None = run.tokenizer.fingerprint
        precision = run.precision or next(run.denoiser.parameters()).dtype
        self.protocol: Mapping[str, Any] = {
            "judge": self.name,
            "model": fingerprint_weights(run),
            "step": run.step,
            "weights": "ema" if run.uses_ema else "trained",
            "tokenizer": run.tokenizer.fingerprint,
            "dtype": str(precision).removeprefix("torch."),
            "window": self._window,
            "stride": self._stride,
            "first_token": "scored after the mask",
            "special_tokens": "removed" if self._end is None else "end mark between documents",
        }

    def encode(self, documents: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for number, found in enumerate(self._run.tokenizer.encode(documents)):
            if number > 0 and self._end is not None:
                ids.append(self._end)
            ids += found
        return ids

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]]) -> Scores:
        self._run.objective.module.eval()  # no dropout
        windows: list[Window] = []
        for number, row in enumerate(rows):
            windows += plan_windows(number, len(row), 0, self._window, self._stride)

        def score(part: Sequence[Window]) -> NDArray[np.float64]:
            batch = self._make_batch(rows, part).to(self._run.device)
            rng = CounterRng(0, 0, batch.index, self._window, "judge")  # draws nothing
            slot = torch.zeros_like(batch.index)
            found = self._run.objective.nll(batch, rng, slot, slot + 1, FlatTimes())
            total = torch.stack(list(found.terms.values())).sum(0)
            return total.sum(-1).double().cpu().numpy()

        batch = self._run.recipe.evaluate.batch
        return score_windows(windows, len(rows), batch, score, self._ranks)

    def features(self, rows: Sequence[Sequence[int]]) -> None:
        """Return None: MAUVE is published for the hidden states of a large language model."""

    def _make_batch(self, rows: Sequence[Sequence[int]], windows: Sequence[Window]) -> Batch:
        """Return the windows as rows of [data] length tokens, padded at the end."""
        shape = (len(windows), self._window)
        ids = torch.full(shape, self._end or 0, dtype=torch.long)
        valid = torch.zeros(shape, dtype=torch.bool)
        scored = torch.zeros(shape, dtype=torch.bool)
        document = torch.zeros(shape, dtype=torch.long)
        for number, window in enumerate(windows):
            size = window.stop - window.start
            part = torch.tensor(rows[window.row][window.start : window.stop], dtype=torch.long)
            ids[number, :size] = part
            valid[number, :size] = True
            scored[number, window.scored - window.start : size] = True
            if self._end is None:
                continue
            # an end mark belongs to the document that it ends
            ends = (part == self._end).long()
            document[number, :size] = ends.cumsum(0) - ends
            document[number, size:] = document[number, size - 1]
        packed = bool((document[:, :1] != document[:, -1:]).any())
        index = torch.arange(len(windows))
        return Batch(ids, valid, scored, document, index, packed)
