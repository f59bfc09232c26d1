"""The event-driven sampler: time runs to the next event, and the network is asked only then (arXiv 2409.02908)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import final

import torch

from ddiff.core.elbo import Ask
from ddiff.core.numerics import EARLIEST
from ddiff.core.process import ForwardProcess
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import reverse
from ddiff.sampling.loop import Canvas, NoiseAt, Quality, Says, need_law, need_process, step_rows
from ddiff.sampling.stepped import draw_words, uniforms


@final
class FirstHittingSampler:
    """Each sequence jumps to the latest candidate event of its positions, where that position alone draws. Exact.

    Candidates come from `process.event_time` without the network (thinned by `process.event` where the rate depends on
    it); a new one is drawn for every position after each event, which is the same chain since candidates have no memory.
    Masks: as many network calls as there are positions. Needs a process with events.

    Where words are noise, their candidates come at about 1/t and 1/(1 - t), most of them for nothing. So words take one
    ancestral step to 1 - `until`, and from `until` the last draw takes all of them at once. The shares n_1 and n_0 of L
    positions that change there do so without each other: an error of at most (n_1 L)^2 / 2 + (n_0 L)^2 / 2 in total
    variation. Masks and trees, whose words are no noise, have none. `until` is in (0, 1/2), and small beside 1/L.
    """

    quality: Quality = "exact"
    order: int = 0
    steps: int | None = None

    def __init__(self, until: float = 1e-4) -> None:
        if not EARLIEST <= until < 0.5:
            raise ArgumentError(f"FirstHittingSampler: until must be in [{EARLIEST}, 1/2); got {until}, a time near 0.")
        self.until = until

    def needs(self, process: ForwardProcess | None, says: Says) -> None:
        need_process(self, process)
        need_law(self, says)
        if process is not None and not process.has_events:
            raise ArgumentError(
                f"FirstHittingSampler: process must have events; {type(process).__name__} bounds its reverse rate by "
                "nothing that is free of the network. Use a sampler with steps, such as ancestral or tau_leaping."
            )

    def run(self, process: ForwardProcess, ask: Ask, canvas: Canvas, noise_at: NoiseAt) -> Iterator[Canvas]:
        words = replace(canvas, free=canvas.free & (canvas.zt < process.vocabulary.num_tokens))
        begun = reverse(process, ask, words, canvas.t.clamp(max=1.0 - self.until), noise_at(0), "first")
        canvas = replace(begun, free=canvas.free)
        for k in count():
            is_word = canvas.zt < process.vocabulary.num_tokens
            u = uniforms(noise_at(k), "when", 1)[:, 0]
            when = process.event_time(canvas.zt.reshape(-1), canvas.t.reshape(-1), u).reshape(canvas.t.shape)
            when = torch.where(canvas.free & (~is_word | (when > self.until)), when, 0.0)
            latest, place = when.max(-1, keepdim=True)
            happens = torch.zeros_like(canvas.free).scatter(-1, place, latest > 0)
            # candidates of other states are read down to EARLIEST
            end = torch.full_like(canvas.t, EARLIEST).masked_fill(is_word, self.until)
            canvas = canvas.moved(canvas.zt, torch.minimum(canvas.t, torch.maximum(latest, end)))
            if not bool(happens.any()):
                break
            u = uniforms(noise_at(k), "event", process.uniforms_per_event)
            draw = lambda visit, zt, t, rows: process.event(visit, zt, t, u[rows])  # noqa: B023, E731
            canvas = canvas.moved(step_rows(ask, canvas, draw, happens), canvas.t)
            yield canvas
        yield draw_words(process, ask, canvas, noise_at(0))  # not of step k, at which the slowest of the batch ended
