"""Requests of the HTTP server: accepted fields, refused fields, and messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from ddiff.errors import ArgumentError
from ddiff.runs.conditioning import SamplingPlan
from ddiff.runs.prompts import Template
from ddiff.serve.fields import read_object
from ddiff.serve.limits import Limits
from ddiff.serve.refusals import Refusal
from ddiff.serve.requests import (
    KNOWN,
    NEUTRAL,
    REFUSED,
    BatchKey,
    Endpoint,
    Request,
    Row,
    SamplingOptions,
    parse_request,
)

LIMITS = Limits(choices=4, steps=100)
LENGTH = 10


class LetterEngine:
    """Engine whose tokens are characters. It remembers the options of the latest request."""

    name = "letters"
    options: SamplingOptions

    def encode_prompts(self, texts: Sequence[str], room: int | None) -> list[Template]:
        if room is not None and any(len(text) + room > LENGTH for text in texts):
            raise ArgumentError(f"max_tokens: must be at most {LENGTH}; got {room}.")
        return [self._encode(text, False) for text in texts]

    def encode_infills(self, texts: Sequence[str]) -> list[Template]:
        return [self._encode(text, True) for text in texts]

    def _encode(self, text: str, whole: bool) -> Template:
        ids = torch.tensor([ord(letter) for letter in text], dtype=torch.long)
        return Template(text, ids, torch.ones_like(ids, dtype=torch.bool), whole)

    def make_rows(
        self, templates: Sequence[Template], seed: int, options: SamplingOptions
    ) -> list[Row]:
        self.options = options
        if options.sampler is not None and options.sampler.startswith("message: "):
            raise ArgumentError(options.sampler.removeprefix("message: "))
        plan = cast(SamplingPlan, None)
        key = BatchKey(options.sampler, options.settings, options.steps, (), 1.0, False)
        return [Row(template, seed, n, plan, key) for n, template in enumerate(templates)]


def parse(endpoint: Endpoint = "completions", **body: Any) -> Request:
    return parse_request(endpoint, body, LetterEngine(), LIMITS)


def refusal(endpoint: Endpoint = "completions", **body: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(endpoint, **body)
    return caught.value


def test_request_has_n_rows_per_prompt_numbered_over_all_prompts() -> None:
    request = parse(prompt=["ab", "c"], n=2, seed=7)
    assert [(row.index, row.template.text, row.seed) for row in request.rows] == [
        (0, "ab", 7),
        (1, "ab", 7),
        (2, "c", 7),
        (3, "c", 7),
    ]


def test_requests_without_a_seed_get_different_seeds_that_javascript_can_read() -> None:
    seeds = {parse().seed for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) < 2**53


def test_sampling_fields_become_settings_of_the_sampler() -> None:
    engine = LetterEngine()
    body = {"temperature": 0, "top_p": 0.5, "top_k": 3, "steps": 9, "sampler": "psi"}
    parse_request("completions", body, engine, LIMITS)
    settings = ("temperature=0.0", "top_p=0.5", "top_k=3")
    assert engine.options == SamplingOptions("psi", settings, 9, None, None)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_field_is_refused_by_name(name: str) -> None:
    error = refusal(**{name: 3})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert error.message.startswith(f"{name}: ")
    assert error.to_json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["prompt", "max_tokens", "stop"])
def test_infill_refuses_fields_of_completions(name: str) -> None:
    assert refusal("infill", text="a", **{name: 1}).param == name


def test_null_and_neutral_values_of_unsupported_fields_are_accepted() -> None:
    values = {name: next(iter(accepted)) for name, accepted in NEUTRAL.items()}
    assert len(parse(**values, logprobs=None, n=None, user="somebody").rows) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", True),
        ("n", 0),
        ("n", 5),
        ("n", 1.0),
        ("n", "1"),
        ("seed", -1),
        ("seed", 2**64),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", 1.1),
        ("top_p", False),
        ("top_k", 0),
        ("steps", 101),
        ("max_tokens", 0),
        ("max_tokens", 11),
        ("stream", 1),
        ("sampler", ["psi"]),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("prompt", [1, 2]),
        ("prompt", []),
        ("prompt", ["a", "b", "c", "d", "e"]),
        ("conditions", [1]),
        ("guidance", -1),
        ("model", "gpt"),
        ("user", 3),
    ],
)
def test_value_outside_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert error.param == name
    assert error.message.startswith(f"{name}: ")
    assert len(error.message) < 400


def test_n_times_prompts_is_limited() -> None:
    assert len(parse(prompt=["a", "b"], n=2).rows) == 4
    assert refusal(prompt=["a", "b", "c"], n=2).param == "prompt"


def test_unknown_field_gets_a_suggestion() -> None:
    error = refusal(promt="a")
    assert 'Did you mean "prompt"?' in error.message
    assert all(name in error.message for name in KNOWN["completions"])


def test_infill_without_text_is_refused() -> None:
    assert refusal("infill").param == "text"


def test_errors_of_the_run_are_refusals_without_a_field() -> None:
    error = refusal(sampler="message: Psi: needs masks.")
    assert (error.message, error.param) == ("Psi: needs masks.", None)


@pytest.mark.parametrize(
    "message",
    [
        'There is no sampler "ancestrl". Did you mean "ancestral"?',
        'The sampler "heun" (from ddiff_core) needs a process of vectors.',
    ],
)
def test_errors_about_the_name_of_a_sampler_have_the_field_sampler(message: str) -> None:
    error = refusal(sampler=f"message: {message}")
    assert (error.message, error.param) == (message, "sampler")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"[1]",
        b'"text"',
        b'{"temperature": NaN}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"prompt": "\xff"}',
    ],
    ids=range(8),
)
def test_body_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        read_object(data)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    json.dumps(caught.value.to_json()).encode()


@pytest.mark.parametrize("name", ["batch", "queue", "timeout"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"serve: {name} must be above 0"):
        Limits(**{name: 0})
