"""Confidence of the network in the states that a sampler draws, for trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddiff.core.prediction import Prediction, require_distribution
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.runs.conditioning import SamplingPlan
from ddiff.runs.run import Run
from ddiff.runs.sampling import build_sampler, make_plan
from ddiff.sampling.loop import Canvas, Sampler


class ConfidenceMeter:
    """Probabilities of new states under the prediction of the network before the step.

    The network is evaluated again on the states before each step, with the conditions and guidance
    of the samples. The probability of a new state n at a position is

        P(n | node),    node: the node below which the process needs the prediction,

    before temperature, filters and corrections of the sampler. A new state that is not below this
    node, such as a mask in place of a token, has no probability.

    Args:
        plan: plan of the samples. Its network must predict distributions.
    """

    def __init__(self, plan: SamplingPlan) -> None:
        # each step is evaluated without the others, so there is no cache of earlier steps
        self.plan = replace(plan, is_cached=False)

    def measure(self, first: int, before: Canvas, after: Canvas) -> list[dict[int, float]]:
        """Return the probability of each new state by its position, one mapping per sample.

        Args:
            first: number of the first of the B samples.
            before: state of the batch before the step.
            after: state of the batch after the step.
        """
        model = self.plan.model
        found: list[dict[int, float]] = [{} for _ in after.zt]
        old = before.zt.reshape(-1)
        new = after.zt.reshape(-1)
        node = _find_scope(model.process, model.vocabulary, old)
        is_known = _find_changes(model.process, before, after) & _is_below(
            model.vocabulary, new, node
        )
        rows = is_known.nonzero().squeeze(-1)
        if not len(rows):
            return found
        network = self.plan.network(slice(first, first + len(found)))
        # attention during the step is that of the new canvas
        query = network(replace(before, block=after.block).network_input())
        log_p = query(rows, node[rows], _log_child, node[rows], new[rows])
        length = after.zt.shape[1]
        for row, value in zip(rows.tolist(), log_p.double().exp().tolist()):
            found[row // length][row % length] = value
        return found


def make_meter(
    run: Run,
    count: int,
    sampler: str | Sampler | None = None,
    conditions: Mapping[str, Any] | None = None,
    guidance: float | None = None,
) -> ConfidenceMeter | None:
    """Return the meter of `count` samples of a run, or None if its network predicts scores.

    The other arguments are those of `Run.sample`.
    """
    if run.denoiser.parameterization.predicts != "distribution":
        return None
    built = build_sampler(run.recipe, run.model, sampler)
    plan = make_plan(run.recipe, run.model, built, conditions, guidance, count)
    return ConfidenceMeter(plan)


def select_samples(canvas: Canvas, count: int) -> Canvas:
    """Return the state of the first `count` samples of a batch."""
    block = canvas.block
    if block is not None and len(block) > 1:
        block = block[:count]
    return Canvas(
        canvas.zt[:count], canvas.t[:count], canvas.clean[:count], canvas.free[:count], block
    )


def _log_child(prediction: Prediction, node: Tensor, child: Tensor) -> Tensor:
    return require_distribution(prediction, "ConfidenceMeter").log_child(node, child)


def _find_changes(process: ForwardProcess | None, before: Canvas, after: Canvas) -> Tensor:
    """Return which positions have a new state, bool [B * L].

    Without a process, the old state of a drawn position is arbitrary, and may equal the new one.
    """
    changed = before.zt != after.zt if process is not None else after.clean & ~before.clean
    return changed.reshape(-1)


def _find_scope(process: ForwardProcess | None, vocabulary: Vocabulary, zt: Tensor) -> Tensor:
    """Return the node [r] below which each position is predicted: the root without a process."""
    return torch.full_like(zt, vocabulary.root) if process is None else process.scope(zt)


def _is_below(vocabulary: Vocabulary, states: Tensor, node: Tensor) -> Tensor:
    """Return whether each state is below its node, bool [r]."""
    ancestor = vocabulary.ancestor(states, vocabulary.level_of(node))
    return (ancestor == node) & (states != node)
