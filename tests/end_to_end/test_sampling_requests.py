"""Arguments of `Run.sample`: conditions, guidance, prompts, infill texts, samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from labelled import RECIPE, rows
from small import working_in

import ddiff as api
from ddiff.runs.run import Run


def share(samples: list[dict[str, Any]], symbols: str) -> float:
    text = "".join(sample["text"] for sample in samples)
    return sum(text.count(symbol) for symbol in symbols) / len(text)


# ---------------------------------------------------------------------- conditions


@pytest.mark.slow
def test_samples_conditioned_on_a_label_have_symbols_of_that_label(labelled: Run) -> None:
    """More than 99 % of 512 symbols belong to the label. Without a label, both kinds occur."""
    assert share(labelled.sample(64, conditions={"kind": 0}, batch=64), "ab") > 0.95
    assert share(labelled.sample(64, conditions={"kind": 1}, batch=64), "cd") > 0.95
    assert 0.1 < share(labelled.sample(64, batch=64), "ab") < 0.9


@pytest.mark.slow
def test_labelled_sample_does_not_depend_on_other_samples_of_its_batch(labelled: Run) -> None:
    kinds = [0, 1, 1, 0, 1]
    samples = labelled.sample(5, conditions={"kind": kinds}, batch=2)
    assert [sample["ids"] for sample in samples] == [
        sample["ids"] for sample in labelled.sample(5, conditions={"kind": kinds}, batch=5)
    ]
    alone = labelled.sample(5, conditions={"kind": 1}, batch=5)
    assert [samples[i]["ids"] for i in (1, 2, 4)] == [alone[i]["ids"] for i in (1, 2, 4)]


@pytest.mark.slow
def test_guidance_0_samples_unconditionally_and_1_conditionally(labelled: Run) -> None:
    """Samples with weight 0 are bitwise equal to unconditional, with 1 to conditional samples."""
    plain = labelled.sample(8, conditions={"kind": 1}, batch=8)
    assert labelled.sample(8, conditions={"kind": 1}, guidance=1.0, batch=8) == plain
    none = labelled.sample(8, conditions={"kind": 1}, guidance=0.0, batch=8)
    assert [sample["ids"] for sample in none] == [
        sample["ids"] for sample in labelled.sample(8, batch=8)
    ]
    strong = labelled.sample(8, conditions={"kind": 1}, guidance=3.0, batch=8)
    assert strong[0]["nfe"] > 1.5 * max(sample["nfe"] for sample in plain)
    assert share(strong, "cd") >= share(plain, "cd")


@pytest.mark.slow
def test_nelbo_of_a_text_is_lower_with_its_true_label(labelled: Run) -> None:
    own, other = (
        labelled.nelbo(["abbaabab"], conditions={"kind": kind}).nelbo_nats_per_token
        for kind in (0, 1)
    )
    assert own + 2.0 < other


@pytest.mark.slow
def test_evaluation_conditions_each_document_on_its_true_label(labelled: Run) -> None:
    """Given its label, each of the 8 symbols of a row has ln 2 nats.

    Without the label, a row has ln 2 nats more.
    """
    evaluation, _ = labelled.evaluate()
    unconditional = labelled.nelbo(labelled.data.documents.validation["text"][:], draws=1)
    assert evaluation.nelbo_nats_per_token < unconditional.nelbo_nats_per_token
    assert labelled.protocol()["conditions"] == ["kind"]


@pytest.mark.slow
def test_sample_command_accepts_condition_options(
    place: Path, labelled: Run, ddiff: Command
) -> None:
    arguments = (
        "sample",
        str(place / "runs/labelled"),
        "--count",
        "3",
        "--condition",
        "kind=1",
        "--guidance",
        "2.5",
    )
    code, out, _ = ddiff(*arguments)
    assert code == 0
    samples = [json.loads(line) for line in out.splitlines()]
    assert samples == labelled.sample(3, conditions={"kind": 1}, guidance=2.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["width = 2", 'width = 1, count = 2, via = "cross"', 'width = 2, via = "tokens"']
)
def test_vector_conditions_change_the_samples(
    place: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """The weights are random, so that the predictions depend on the vector."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("DDIFF_CACHE", str(place / "cache"))
    lines = [
        json.loads(line) | {"style": [0.5, float(number % 3)]}
        for number, line in enumerate(rows(60).splitlines())
    ]
    (place / "vectors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = RECIPE.replace("rows.jsonl", "vectors.jsonl").replace(
        'labels = ["kind"]', 'vectors = ["style"]'
    )
    recipe = recipe.replace("kind = { classes = 2,", f"style = {{ {form},").replace(
        '"labelled"', '"vectors"'
    )
    (place / "vectors.toml").write_text(recipe)
    run = api.run("vectors.toml", settings=["train.steps=2"], fresh=True)
    with torch.no_grad():
        for parameter in run.denoiser.backbone.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        run.denoiser.head.table.normal_(generator=torch.Generator().manual_seed(2))
    text = ["abcdabcd"]
    one, same, other = (
        run.nelbo(text, conditions={"style": vector}).nelbo_nats_per_token
        for vector in ([1.0, 0.0], [1.0, 0.0], [0.0, 5.0])
    )
    assert one == same != other
    each = run.sample(2, conditions={"style": [[1.0, 0.0], [0.0, 5.0]]}, batch=2)
    for number, vector in enumerate(([1.0, 0.0], [0.0, 5.0])):
        assert (
            each[number]["ids"]
            == run.sample(2, conditions={"style": vector}, batch=2)[number]["ids"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("via", ["cross", "tokens"])
def test_guided_samples_follow_a_condition_of_any_via(place: Path, via: str) -> None:
    """Weight 0 gives the bits of unconditional samples; a label selects its symbols."""
    with working_in(place):
        settings = [f'name="{via}"', f'denoiser.conditions.kind.via="{via}"']
        run = api.run("labelled.toml", settings=settings)
    plain = run.sample(32, conditions={"kind": 1}, batch=32)
    assert share(plain, "cd") > 0.9
    assert share(run.sample(32, conditions={"kind": 0}, batch=32), "ab") > 0.9
    none = run.sample(8, conditions={"kind": 1}, guidance=0.0, batch=8)
    assert [sample["ids"] for sample in none] == [
        sample["ids"] for sample in run.sample(8, batch=8)
    ]
    strong = run.sample(32, conditions={"kind": 1}, guidance=3.0, batch=32)
    assert share(strong, "cd") >= share(plain, "cd")
    # With tokens, the label matters mostly if all symbols are masked: 1/8 of the bound.
    own, other = (
        run.nelbo(["abbaabab"], draws=64, conditions={"kind": kind}).nelbo_nats_per_token
        for kind in (0, 1)
    )
    assert own + 0.1 < other


# ---------------------------------------------------------------------- prompts and gaps


def encoded(run: Run, text: str) -> list[int]:
    return run.tokenizer.encode([text])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", ["ancestral", "confidence", "first_hitting", "remdm", "tau_leaping"]
)
def test_samples_begin_with_prompts_of_any_length(sampler: str, small: Run) -> None:
    prompts = ["the old cat", "the", "", "a red hat sat"]
    samples = small.sample(prompt=prompts, sampler=sampler, steps=3, batch=3)
    assert [sample["prompt"] for sample in samples] == prompts
    for sample in samples:
        kept = encoded(small, sample["prompt"])
        assert sample["ids"][: len(kept)] == kept
        assert len(sample["ids"]) == 24


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "first_hitting"])
def test_infill_sampling_changes_only_the_gaps_of_a_text(sampler: str, small: Run) -> None:
    samples = small.sample(2, infill="the [MASK:3] sat on [MASK:2]", sampler=sampler, steps=3)
    begin, middle = encoded(small, "the"), encoded(small, " sat on")
    assert len(samples) == 2
    for sample in samples:
        ids = sample["ids"]
        assert len(ids) == len(begin) + 3 + len(middle) + 2
        assert ids[: len(begin)] == begin
        assert ids[len(begin) + 3 : -2] == middle
        assert max(ids) < small.vocabulary.num_tokens
        assert sample["infill"] == "the [MASK:3] sat on [MASK:2]"


@pytest.mark.slow
def test_infill_sample_does_not_depend_on_other_samples_of_its_batch(small: Run) -> None:
    texts = ["the [MASK:3] sat", "[MASK:9]", "a[MASK:1] red hat sat on the [MASK:2]"]
    together = small.sample(infill=texts, steps=3, batch=3)
    assert together == small.sample(infill=texts, steps=3, batch=1)


@pytest.mark.slow
def test_no_ids_option_leaves_only_the_ids_out(place: Path, small: Run, ddiff: Command) -> None:
    run_dir = str(place / "runs/small")
    code, out, _ = ddiff("sample", run_dir, "--prompt", "the", "--steps", "3", "--no-ids")
    assert code == 0
    samples = small.sample(prompt="the", steps=3)
    expected = [{key: value for key, value in sample.items() if key != "ids"} for sample in samples]
    assert [json.loads(line) for line in out.splitlines()] == expected


@pytest.mark.slow
def test_sample_command_reads_prompts_from_a_file(place: Path, small: Run, ddiff: Command) -> None:
    (place / "prompts.txt").write_text("the old\n\nthe red cat\n")
    code, out, _ = ddiff(
        "sample", str(place / "runs/small"), "--prompts", str(place / "prompts.txt"), "--steps", "3"
    )
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == small.sample(
        prompt=["the old", "the red cat"], steps=3
    )
    code, out, _ = ddiff(
        "sample",
        str(place / "runs/small"),
        "--infill",
        "the [MASK:2]",
        "--count",
        "2",
        "--steps",
        "3",
    )
    assert [json.loads(line) for line in out.splitlines()] == small.sample(
        2, infill="the [MASK:2]", steps=3
    )


# ---------------------------------------------------------------------- samplers


@pytest.mark.slow
def test_settings_argument_of_sample_overrides_sampler_keys(labelled: Run, small: Run) -> None:
    """At temperature 0.01 the most likely symbol is always drawn, so few samples are distinct."""
    cold = {
        sample["text"]
        for sample in labelled.sample(16, conditions={"kind": 0}, settings=["temperature=0.01"])
    }
    assert (
        len(cold)
        < len({sample["text"] for sample in labelled.sample(16, conditions={"kind": 0})}) / 2
    )
    assert small.sample(2, steps=3, sampler="ancestral") == small.sample(2, steps=3)


@pytest.mark.slow
def test_sample_accepts_a_sampler_object_and_a_step_callback(small: Run) -> None:
    seen: list[int] = []
    samples = small.sample(
        2, sampler=api.AncestralSampler(3), on_step=lambda step, canvas: seen.append(step)
    )
    assert samples == small.sample(2, steps=3)
    assert seen == [1, 2, 3]


@pytest.mark.slow
def test_network_evaluations_are_counted_separately_for_each_sample(small: Run) -> None:
    """A gap of one token needs fewer network evaluations than a gap of 24 tokens."""
    closed, opened = small.sample(infill=["the old cat[MASK:1]", "[MASK:24]"], steps=24)
    assert closed["nfe"] < opened["nfe"] <= 24
