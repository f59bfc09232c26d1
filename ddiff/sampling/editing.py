"""Editing: noise some positions of a text, and sample them again under another condition.

This is latent-steered masked editing, the analogue of SDEdit (arXiv 2108.01073) for tokens. An edit
is an initial state, a mask of clamped positions and a start time; the sampler is any sampler on a
grid of times. The condition (a label, a vector or another field) belongs to the network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts, count_evaluations
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError, suggest
from ddiff.sampling.loop import (
    Canvas,
    OnStep,
    Sampler,
    Samples,
    require_process,
    sample_from,
)
from ddiff.sampling.uncertainty import predictive_entropy
from ddiff.sampling.unmasking import rank_by_confidence

EditMode = Literal["random", "entropy", "suffix"]


class Edits(NamedTuple):
    """Edited sequences, and a bool [B,L] `edited` that marks the positions that were sampled."""

    samples: Samples
    edited: Tensor


def edit(
    sampler: Sampler,
    process: ForwardProcess,
    network: Network,
    *,
    source: Tensor,
    editable: Tensor,
    ratio: float,
    mode: EditMode = "random",
    index: Tensor,
    seed: int,
    on_step: OnStep | None = None,
) -> Edits:
    """Noise chosen positions to the time `ratio`, and sample them while all others stay clean.

    Chosen positions start at the prior if the prior is a single state (a mask), and otherwise at a
    draw of z_ratio from the forward process. With ratio 0 the result is `source`. With ratio 1 all
    editable positions are sampled from the prior, as by `generate`. Other arguments are those of
    `generate`.

    Args:
        source: [B,L] token ids.
        editable: [B,L] bool, False at special tokens and after the end of a text.
        ratio: time at which sampling starts, and fraction of editable positions that are chosen.
        mode: see `choose_positions`.

    Raises ArgumentError for a ratio outside [0,1], an unknown mode or another shape, and if the
    sampler chooses its own times or does not support the process or the prediction.
    """
    counted = count_evaluations(network)
    check_edit(sampler, process, counted.predicts, ratio, mode)
    if editable.shape != source.shape or len(index) != len(source):
        raise ArgumentError(
            "edit: source and editable must have the shape [B,L] with one index per sequence; got "
            f"{tuple(source.shape)}, {tuple(editable.shape)} and {len(index)} indices."
        )
    calls_before = counted.calls
    runs_before = counted.runs_of_batch(len(source))

    def rng_at(step: int) -> CounterRng:
        return CounterRng(seed, step, index, source.shape[1], "sample")

    # A separate purpose, so that the choice is independent of the draws of the sampler.
    rng = rng_at(0).derive("edit", source.shape[1])
    edited = choose_positions(mode, ratio, process, counted, source, editable, rng)
    t = torch.where(edited, ratio, 0.0).double()
    noised = _noise(process, source, t, ratio, rng_at(0))
    start = Canvas(torch.where(edited, noised, source), t, clean=~edited, free=edited)
    if ratio > 0.0:
        sampler = sampler.start_at(ratio)
    samples = sample_from(start, sampler, process, counted, rng_at, on_step)
    # The evaluations that chose the positions count too.
    runs = counted.runs_of_batch(len(source)) - runs_before
    return Edits(replace(samples, nfe=counted.calls - calls_before, runs=runs), edited)


def check_edit(
    sampler: Sampler,
    process: ForwardProcess | None,
    predicts: Predicts,
    ratio: float,
    mode: str,
) -> None:
    """Raise ArgumentError if `edit` does not support the arguments."""
    if not 0.0 <= ratio <= 1.0:
        raise ArgumentError(
            f"edit: ratio must be in [0, 1]; got {ratio}. 0 changes nothing, 1 samples every token."
        )
    if mode not in get_args(EditMode):
        raise ArgumentError(
            f"edit: mode must be one of {', '.join(get_args(EditMode))}; got {mode!r}."
            + suggest(mode, get_args(EditMode))
        )
    require_process(sampler, process)
    # Refuses samplers that choose their own times, also at ratio 0.
    sampler.start_at(ratio)
    sampler.check_supported(process, predicts)
    if mode == "entropy" and predicts != "distribution":
        raise ArgumentError(
            "edit: mode entropy needs predicted distributions of tokens; this denoiser predicts a "
            "score. Use mode random or suffix."
        )


def choose_positions(
    mode: EditMode,
    ratio: float,
    process: ForwardProcess,
    network: Network,
    source: Tensor,
    editable: Tensor,
    rng: CounterRng,
) -> Tensor:
    """Choose the positions to edit, a bool [B,L] that is False where `editable` is False.

    For a text with n editable positions, `mode` selects:

    - random: every editable position with probability `ratio`, independently.
    - entropy: the round(ratio * n) positions of largest predictive entropy (`predictive_entropy`).
    - suffix: the last round(ratio * n) editable positions.
    """
    if mode == "random" or ratio in (0.0, 1.0):
        return editable & (rng.uniform("edited") < ratio)
    if mode == "entropy":
        rank = predictive_entropy(process, network, source, editable)
    else:
        rank = torch.arange(source.shape[1], dtype=torch.float64, device=source.device)
    order = rank_by_confidence(torch.where(editable, rank, -torch.inf), rng)
    count = (ratio * editable.sum(-1, keepdim=True) + 0.5).floor()
    # The second argsort inverts the first: the place of each position in the order.
    return editable & (order.argsort(-1) < count)


def _noise(
    process: ForwardProcess, source: Tensor, t: Tensor, ratio: float, rng: CounterRng
) -> Tensor:
    """Return noised states [B,L] of all positions, from which the chosen positions are taken."""
    is_single = int(process.prior.log_prob.isfinite().sum()) == 1
    if is_single or ratio == 1.0:
        # The uniforms of `generate`, so that ratio 1 gives the same samples.
        return process.prior.draw(rng.uniform("start"))
    u = rng.uniform("noised", process.uniforms_per_sample)
    drawn = process.sample(source.reshape(-1), t.reshape(-1), u.reshape(source.numel(), -1))
    return drawn.reshape(source.shape)
