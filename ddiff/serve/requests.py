"""Requests of the endpoints: fields that are read, accepted without effect, or refused.

A request becomes rows. A row is one sample to draw, with its template, seed and index. A row gives
the same tokens as the sample with this index of `Run.sample` with the same arguments.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from ddiff.errors import DdiffError
from ddiff.runs.conditioning import SamplingPlan
from ddiff.runs.prompts import Template
from ddiff.serve.fields import Fields
from ddiff.serve.limits import Limits
from ddiff.serve.refusals import Refusal

Endpoint = Literal["completions", "infill"]
Result = TypeVar("Result")
LARGEST_DRAWN_SEED = 2**53 - 1  # JavaScript reads larger integers with errors
MOST_STOPS = 4
STOP_LENGTH = 200  # characters of a stop text
# beginning of the messages about an unknown sampler, or one for another kind of model
SAMPLER_ERROR = re.compile(r'(There is no|The) sampler "')

SHARED = frozenset(
    (
        *("model", "n", "seed", "stream", "user", "temperature", "top_p", "top_k"),
        *("steps", "sampler", "conditions", "guidance"),
    )
)
KNOWN: Mapping[Endpoint, Collection[str]] = {
    "completions": SHARED | {"prompt", "max_tokens", "stop"},
    "infill": SHARED | {"text"},
}
NEUTRAL: Mapping[str, Collection[Any]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "suffix": ("",),
}
"""Values of refused fields that change nothing, and that some clients always send."""

REFUSED: Mapping[str, str] = {
    "best_of": "samples of a diffusion model have no likelihood by which they could be ranked",
    "echo": "the text of a choice never contains the prompt",
    "frequency_penalty": "tokens are drawn in parallel, so there is no count of earlier tokens",
    "logit_bias": "samplers have no bias of single tokens",
    "logprobs": "a sampler of a diffusion model has no log-probabilities of its samples",
    "presence_penalty": "tokens are drawn in parallel, so there is no count of earlier tokens",
    "stream_options": "the last event of a stream always has the usage",
    "suffix": 'use /v1/infill with "PROMPT [MASK:8] SUFFIX"',
}
OF_COMPLETIONS = {
    "max_tokens": "each gap [MASK:N] of the text has the number of its tokens",
    "prompt": "the endpoint reads the field text, which has gaps [MASK:N]",
    "stop": "an infill text is never cut",
}


@dataclass(frozen=True)
class BatchKey:
    """Properties that the rows of one batch share.

    `has_end` is True if positions after the end of the text are masked.
    """

    sampler: str | None
    settings: tuple[str, ...]
    steps: int | None
    conditions: tuple[str, ...]
    guidance: float
    has_end: bool


@dataclass(frozen=True, eq=False)
class Row:
    """One sample to draw.

    Attributes:
        template: prompt or infill text.
        seed: seed of the random numbers of the request.
        index: number of the sample in its request.
        plan: sampler and conditions of one sample.
        key: rows with equal keys may share a batch.
    """

    template: Template
    seed: int
    index: int
    plan: SamplingPlan
    key: BatchKey


@dataclass(frozen=True, eq=False)
class Request:
    """Checked request.

    Attributes:
        endpoint: endpoint that received the request.
        rows: samples to draw.
        seed: seed of the request.
        stop: texts before which a completion is cut.
        stream: whether the states after each step are sent.
    """

    endpoint: Endpoint
    rows: Sequence[Row]
    seed: int
    stop: Sequence[str]
    stream: bool


@dataclass(frozen=True)
class SamplingOptions:
    """Options of a request for the sampler; None: the value of the recipe."""

    sampler: str | None
    settings: tuple[str, ...]
    steps: int | None
    conditions: Mapping[str, Any] | None
    guidance: float | None


class Engine(Protocol):
    """Model that makes the rows of a request."""

    name: str

    def encode_prompts(self, texts: Sequence[str], room: int | None) -> list[Template]: ...

    def encode_infills(self, texts: Sequence[str]) -> list[Template]: ...

    def make_rows(
        self, templates: Sequence[Template], seed: int, options: SamplingOptions
    ) -> list[Row]: ...


def parse_request(
    endpoint: Endpoint, body: Mapping[str, Any], engine: Engine, limits: Limits
) -> Request:
    """Check the JSON object of a request. Raises Refusal with the name of the wrong field."""
    refused = REFUSED if endpoint == "completions" else {**REFUSED, **OF_COMPLETIONS}
    fields = Fields(body, KNOWN[endpoint], NEUTRAL, refused)
    _check_model(fields, engine.name)
    fields.text("user")  # read by nothing, as in the OpenAI API
    count = fields.integer("n", 1, limits.choices) or 1
    seed = fields.integer("seed", 0, 2**64 - 1)
    if seed is None:
        seed = secrets.randbelow(LARGEST_DRAWN_SEED + 1)
    stop = _read_stop(fields)
    stream = fields.flag("stream")
    options = _read_options(fields, limits)
    name = "prompt" if endpoint == "completions" else "text"
    texts = fields.texts(name, limits.choices // count)
    if texts is None and endpoint == "infill":
        raise Refusal(
            'text: required, a text with gaps such as "She [MASK:8] to Bath"; got no field text.',
            "text",
        )
    encode = _choose_encoder(endpoint, fields, engine)
    templates = _refuse_errors(endpoint, name, lambda: encode(texts or [""]))
    every = [template for template in templates for _ in range(count)]
    rows = _refuse_errors(endpoint, None, lambda: engine.make_rows(every, seed, options))
    return Request(endpoint, rows, seed, stop, stream)


def _choose_encoder(
    endpoint: Endpoint, fields: Fields, engine: Engine
) -> Callable[[Sequence[str]], list[Template]]:
    """Return the function that makes templates of the texts of a request."""
    if endpoint == "infill":
        return engine.encode_infills
    room = fields.integer("max_tokens", 1, 2**31 - 1)
    return lambda texts: engine.encode_prompts(texts, room)


def _check_model(fields: Fields, name: str) -> None:
    model = fields.text("model")
    if model is not None and model != name:
        raise Refusal(
            f"model: this server has the model {name!r}; got {model[:80]!r}. Leave the field out, "
            "or ask /v1/models.",
            "model",
            status=404,
            code="model_not_found",
        )


def _read_stop(fields: Fields) -> Sequence[str]:
    """Return the texts before which a completion is cut."""
    if "stop" in fields and fields.values["stop"] == []:
        return ()
    stops = fields.texts("stop", MOST_STOPS) or []
    for text in stops:
        if not 1 <= len(text) <= STOP_LENGTH:
            raise Refusal(
                f"stop: a stop text must have 1 to {STOP_LENGTH} characters; got {len(text)}.",
                "stop",
            )
    return tuple(stops)


def _read_options(fields: Fields, limits: Limits) -> SamplingOptions:
    settings = []
    temperature = fields.number("temperature", 0.0, 100.0)
    if temperature is not None:
        settings.append(f"temperature={temperature!r}")
    top_p = fields.number("top_p", 0.0, 1.0)
    if top_p is not None:
        settings.append(f"top_p={top_p!r}")
    top_k = fields.integer("top_k", 1, 2**31 - 1)
    if top_k is not None:
        settings.append(f"top_k={top_k}")
    return SamplingOptions(
        sampler=fields.text("sampler"),
        settings=tuple(settings),
        steps=fields.integer("steps", 1, limits.steps),
        conditions=fields.table("conditions"),
        guidance=fields.number("guidance", 0.0, 1e6),
    )


def _refuse_errors(endpoint: Endpoint, param: str | None, call: Callable[[], Result]) -> Result:
    """Call a function, and turn an error of the user into a Refusal.

    The wrong field is `sampler` for a message about the name of the sampler, else the one with
    which the message begins, otherwise `param`.
    """
    try:
        return call()
    except DdiffError as error:
        first = str(error).partition(":")[0]
        if first == "infill":  # the argument of `Run.sample`
            first = "text"
        elif SAMPLER_ERROR.match(str(error)):
            first = "sampler"
        raise Refusal(str(error), first if first in KNOWN[endpoint] else param) from error
