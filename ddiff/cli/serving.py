"""Command that serves a run over HTTP: serve."""

from __future__ import annotations

from typing import Annotated

import typer

from ddiff.cli.options import MOST, ClockSource, RunDir
from ddiff.serve.limits import Limits

DEFAULTS = Limits()


def serve(
    run_dir: RunDir,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address of this machine; 0.0.0.0 for all of them."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free port.")] = 8000,
    batch: Annotated[
        int, typer.Option(min=1, max=MOST, help="Samples that are drawn together.")
    ] = DEFAULTS.batch,
    queue: Annotated[
        int,
        typer.Option(min=1, max=MOST, help="Samples in the queue; more get the status 429."),
    ] = DEFAULTS.queue,
    max_choices: Annotated[
        int, typer.Option(min=1, max=MOST, help="Samples of one request.")
    ] = DEFAULTS.choices,
    max_steps: Annotated[
        int, typer.Option(min=1, max=MOST, help="Sampling steps that a request may ask for.")
    ] = DEFAULTS.steps,
    timeout: Annotated[
        float, typer.Option(min=0.001, max=MOST, help="Seconds until a request fails.")
    ] = DEFAULTS.timeout,
    clock: ClockSource = "recipe",
) -> None:
    """Serve a trained run over HTTP: completions, infilling, and a page to type a prompt.

    The endpoints have the form of the OpenAI API. Needs starlette and uvicorn: pip install
    'discrete-diffusion\\[serve]'.
    """
    from ddiff.serve.command import serve_run

    limits = Limits(batch=batch, queue=queue, choices=max_choices, steps=max_steps, timeout=timeout)
    serve_run(run_dir, host=host, port=port, limits=limits, clock=clock)
