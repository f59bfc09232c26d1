"""Runs of several fields: train, evaluate, sample, load, resume and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, is_refusal, read_evaluation
from safetensors.torch import load_file
from small_fields import DIGITS, PATCHES

import ddiff as package
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.recipe.fields_keys import FieldsEvaluateKeys
from ddiff.runs.fields.report import describe_settings
from ddiff.runs.fields.summary import format_value, print_bounds
from ddiff.runs.stages import run_recipe
from ddiff.training.metrics import WALL_CLOCK

RUN = Path("runs/digits")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the trained runs `runs/digits` and `runs/patches`."""
    folder = tmp_path_factory.mktemp("fields")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        Path("digits.toml").write_text(DIGITS)
        Path("patches.toml").write_text(PATCHES)
        for name in ("digits", "patches"):
            assert run_recipe(package.read_recipe(f"{name}.toml")) == 0
        yield folder


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------- files after training


def test_run_writes_bounds_of_every_target_with_parts_that_add_up() -> None:
    found = json.loads((RUN / "evaluation.json").read_text())
    assert list(found["targets"]) == ["joint", "image | text", "text | image"]
    for name, bounds in found["targets"].items():
        drawn = name.partition("|")[0]
        assert set(bounds["fields"]) == ({"image", "text"} if name == "joint" else {drawn.strip()})
        total = 0.0
        for figures in bounds["fields"].values():
            assert sum(figures["terms"].values()) == pytest.approx(figures["nats_per_item"])
            total += figures["nats_per_item"] * figures["items"]
        assert total / bounds["samples"] == pytest.approx(bounds["nats_per_sample"])
        low, high = bounds["interval"]
        assert low < bounds["nats_per_sample"] < high


def test_controls_have_the_same_samples_and_paired_intervals() -> None:
    targets = json.loads((RUN / "evaluation.json").read_text())["targets"]
    assert targets["joint"]["controls"] == {}
    # no training part has an image that moves while the text is noise
    assert set(targets["image | text"]["controls"]) == {"shuffled"}
    assert "noise" in targets["image | text"]["untrained_controls"]
    controls = targets["text | image"]["controls"]
    assert set(controls) == {"shuffled", "noise"}
    for found in controls.values():
        difference = found["nats_per_sample"] - targets["text | image"]["nats_per_sample"]
        assert found["excess_nats_per_sample"] == pytest.approx(difference)
        low, high = found["excess_interval"]
        assert low <= difference <= high


def test_summary_describes_pictures_and_vectors_instead_of_listing_their_numbers(
    ddiff: Command,
) -> None:
    code, out, err = ddiff("run", "digits.toml")
    assert code == 0, err
    assert "  image: 8 x 8 picture; text (given): 'three'" in out.splitlines()
    assert "  image: 8 x 8 picture; text: '" in ddiff("run", "patches.toml").out


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ({"vectors": [0.5] * 384}, "vector of 384 numbers"),
        ({"vectors": [[0.5] * 384]}, "vector of 384 numbers"),
        ({"vectors": [[0.5] * 8] * 16}, "16 vectors of 8 numbers"),
        ({"ids": [1, 2, 3]}, "[1, 2, 3]"),
        ({"text": "six", "ids": [7]}, "'six'"),
    ],
)
def test_format_value_describes_a_value_in_one_line(value: dict[str, Any], described: str) -> None:
    assert format_value(value) == described


def test_bound_without_variation_prints_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((RUN / "evaluation.json").read_text())
    bounds = report["targets"]["joint"]
    mean = bounds["nats_per_sample"]
    bounds["interval"] = [mean, mean]
    print_bounds({**report, "targets": {"joint": bounds}})
    out = capsys.readouterr().out
    assert "no interval: all draws are equal" in out
    assert f"[{mean:.4f}" not in out


def test_bounds_of_few_samples_are_printed_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = json.loads((RUN / "evaluation.json").read_text())
    control = {**report["targets"]["joint"], "excess_nats_per_sample": 1.0}
    control["excess_interval"] = [0.5, 1.5]
    for samples, is_small in ((49, True), (50, False)):
        bounds = {**report["targets"]["joint"], "samples": samples}
        bounds["controls"] = {"shuffled": control}
        print_bounds({**report, "targets": {"joint": bounds}})
        out = capsys.readouterr().out
        assert ("may be too narrow for fewer than 50 samples" in out) == is_small
        assert "fewer than 16 samples" not in out
    bounds["samples"] = 15
    print_bounds({**report, "targets": {"joint": bounds}})
    assert "Intervals of fewer than 16 samples may be too narrow." in capsys.readouterr().out


def test_samples_pictures_and_findings_are_written_for_every_target() -> None:
    samples = lines(RUN / "samples.jsonl")
    assert [sample["target"] for sample in samples] == ["joint"] * 4 + ["image | text"] * 4
    assert samples[4]["given"] == ["text"]
    truth = package.load_digits()[1].captions
    assert [sample["fields"]["text"]["text"] for sample in samples[4:]] == [
        " ".join(words) for words in truth[:4]
    ]
    assert all(len(sample["fields"]["image"]["ids"]) == 64 for sample in samples)
    for name in ("samples-joint.png", "samples-image-given-text.png"):
        assert (RUN / name).read_bytes().startswith(b"\x89PNG")
    judged = json.loads((RUN / "judged.json").read_text())
    assert set(judged["targets"]) == {"joint", "image | text"}
    assert judged["targets"]["joint"][0]["count"] == 4


def test_repeated_command_evaluates_and_samples_nothing_again(ddiff: Command) -> None:
    names = ("evaluation.json", "samples.jsonl", "judged.json", "samples-joint.png")
    before = {name: (RUN / name).stat().st_mtime_ns for name in names}
    code, out, err = ddiff("run", "digits.toml")
    assert code == 0
    assert "All 10 steps are done." in err
    assert "images and words that agree" in out
    assert {name: (RUN / name).stat().st_mtime_ns for name in names} == before


def test_saved_evaluation_is_reused_only_with_equal_keys_of_the_evaluation() -> None:
    """All keys that change a figure are compared; the size of a batch changes none."""
    keys = set(FieldsEvaluateKeys.model_fields) - {"every", "batch", "weights"}
    compared = describe_settings(package.load(RUN))["protocol"]
    assert keys <= set(compared)
    other = package.load(RUN, settings=["evaluate.unnamed='absent'"])
    assert describe_settings(other)["protocol"] != compared


def test_key_given_limits_the_validation_samples_and_repeats_them() -> None:
    from ddiff.runs.session import TrainingSession

    settings = ["run_dir='few'", "sample.given=2", "sample.steps=2"]
    session = TrainingSession.open(package.read_recipe("digits.toml", settings))
    session.initialize_weights()
    drawn = session.run.sample(5, target="image | text")
    texts = [sample["fields"]["text"]["text"] for sample in drawn]
    assert texts == ["three", "seven", "three", "seven", "three"]
    images = [sample["fields"]["image"]["ids"] for sample in drawn]
    assert images[0] != images[2]


def test_bound_of_untrained_denoiser_equals_unigram_entropy_of_the_text() -> None:
    """The biases of the head start at the frequencies of the words.

    All words are masked at the prior, so that the bound of one word is the mean of -ln frequency.
    """
    from ddiff.runs.session import TrainingSession

    session = TrainingSession.open(
        package.read_recipe("digits.toml", ["run_dir='new'", "evaluate.samples=500"])
    )
    session.initialize_weights()
    found = session.run.evaluate(["text | image"], draws=20)["text | image"].bound
    training, held_out = package.load_digits()
    words = [word for (word,) in training.captions]
    nats = [-np.log(words.count(word) / len(words)) for (word,) in held_out.captions]
    low, high = found.interval
    assert low < np.mean(nats) < high
    assert high - low < 0.2


# ---------------------------------------------------------------------- loading


def test_loaded_run_repeats_evaluation_and_samples() -> None:
    run = package.load(RUN)
    report = json.loads((RUN / "evaluation.json").read_text())
    found = run.evaluate(["joint"])["joint"]
    assert found.bound.nats_per_sample == report["targets"]["joint"]["nats_per_sample"]
    again = run.sample(target="image | text")
    written = lines(RUN / "samples.jsonl")[4:]
    assert [sample["fields"] for sample in again] == [sample["fields"] for sample in written]


def test_samples_do_not_depend_on_batch_size_or_count() -> None:
    run = package.load(RUN)
    whole = run.sample(3, "image | text", given={"text": "six"}, batch=8)
    parts = run.sample(3, "image | text", given={"text": "six"}, batch=2)
    assert whole == parts
    assert run.sample(2, "image | text", given={"text": "six"}) == whole[:2]


def test_run_samples_without_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    run = package.load(RUN)
    monkeypatch.setattr(
        "ddiff.runs.fields.data.RunFields._stored_documents",
        property(lambda self: pytest.fail("the data were read")),
    )
    assert len(run.sample(2, given={"text": ["one", "two"]})) == 2
    assert run.sample(1, only=["text"])[0]["target"] == "text"


def test_given_vectors_are_returned_unchanged() -> None:
    run = package.load("runs/patches")
    rng = np.random.default_rng(0)
    given = rng.uniform(-1.0, 1.0, (3, 4, 16))
    samples = run.sample(3, "text | image", given={"image": given})
    assert [sample["fields"]["image"]["vectors"] for sample in samples] == given.tolist()


def test_given_validation_samples_have_the_vectors_of_the_data() -> None:
    run = package.load("runs/patches")
    samples = run.sample(3, "text | image")
    stored = run.data.documents.validation.read("image", range(3)).values
    assert [sample["fields"]["image"]["vectors"] for sample in samples] == stored.tolist()


def test_wrong_given_file_is_named_with_its_shape(ddiff: Command, tmp_path: Path) -> None:
    vectors = np.zeros((2, 4, 16))
    vectors[1, 0, 3] = np.nan
    for name, array in (("nan", vectors), ("narrow", np.zeros((4, 5)))):
        np.save(tmp_path / f"{name}.npy", array)
    sample = ("sample", "runs/patches", "--count", "2", "--given")
    refused = ddiff(*sample, f"image={tmp_path / 'nan.npy'}")
    assert is_refusal(refused, "--given image=", "nan.npy", "nan in sample 1", "[2, 4, 16]")
    refused = ddiff(*sample, f"image={tmp_path / 'narrow.npy'}")
    assert is_refusal(refused, "narrow.npy", "16 numbers", "float64 [4, 5]")


def test_given_text_that_is_too_long_needs_a_shorter_text() -> None:
    with pytest.raises(package.DataError, match=r"at most 1\. Give a shorter text") as refused:
        package.load(RUN).sample(1, given={"text": "one two"})
    assert "[fields" not in str(refused.value)


def test_fingerprint_of_a_changed_component_is_refused(tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(RUN, copy)
    place = copy / "fields/text/tokenizer.json"
    place.write_text(place.read_text().replace("seven", "sevem"))
    with pytest.raises((CheckpointError, package.DataError), match="tokenizer"):
        package.load(copy)


# ---------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"given": {"word": "one"}}, ["given", "image, text", '"word"']),
        ({"given": {"text": "eleven"}}, ["eleven"]),
        ({"given": {"text": ["one", "two", "six"]}, "count": 2}, ["or 2", "got 3"]),
        ({"given": {"image": [0] * 63}}, ["64", "63"]),
        ({"given": {"text": "one", "image": [0] * 64}}, ["nothing is drawn"]),
        ({"target": "image", "given": {"text": "one"}}, ["image | text"]),
        ({"target": "joint", "only": ["text"]}, ["exclude"]),
        ({"target": "joint", "given": {"text": "one"}}, ["Write", '"image | text"']),
        ({"target": "image | word"}, ["word"]),
        ({"target": "image"}, ["image moves, text is at the prior"]),
        ({"count": 0}, ["count"]),
    ],
)
def test_wrong_request_is_refused_with_a_teaching_error(
    arguments: dict[str, Any], expected: list[str]
) -> None:
    run = package.load(RUN)
    with pytest.raises((ArgumentError, package.DataError)) as refused:
        run.sample(**arguments)
    assert [text for text in expected if text not in str(refused.value)] == []


def test_vectors_of_another_width_name_both_widths() -> None:
    run = package.load("runs/patches")
    with pytest.raises(ArgumentError, match=r"4 vectors of 16 numbers.*\[1, 4, 5\]"):
        run.sample(1, given={"image": np.zeros((4, 5))})


def test_sample_command_takes_texts_files_and_targets(ddiff: Command, tmp_path: Path) -> None:
    sample = ("sample", str(RUN), "--count", "2")
    picture = tmp_path / "drawn.png"
    code, out, _ = ddiff(*sample, "--given", "text=three", "--images", str(picture), "--no-ids")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["fields"]["text"] for line in found] == [{"text": "three"}] * 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    both = ddiff(*sample, "--given", "text=one", "--given", "text=two").out.splitlines()
    assert [json.loads(line)["fields"]["text"]["text"] for line in both] == ["one", "two"]
    only = [json.loads(line) for line in ddiff(*sample, "--only", "text").out.splitlines()]
    assert [set(line["fields"]) for line in only] == [{"text"}] * 2
    file = tmp_path / "image.npy"
    np.save(file, np.arange(64) % 17)
    code, out, err = ddiff(*sample, "--given", f"image={file}")
    assert code == 0, err
    assert json.loads(out.splitlines()[0])["fields"]["image"]["ids"][:3] == [0, 1, 2]


def test_field_options_are_refused_for_a_text_run(ddiff: Command, folder: Path) -> None:
    assert ddiff("run", "small.toml", "--set", "train.steps=2").code == 0
    for option in ("--given", "--only", "--target", "--images"):
        result = ddiff("sample", "runs/small", option, "text=one")
        assert is_refusal(result, option, "a run of text", "--prompt")


def test_generation_figures_are_refused_for_fields(ddiff: Command) -> None:
    answer = ddiff("eval", str(RUN), "--generate")
    assert is_refusal(answer, "--generate", "a recipe of one text")


def test_text_options_are_refused_for_fields(ddiff: Command) -> None:
    for options in (["--prompt", "x"], ["--guidance", "2"], ["--set", "temperature=1"]):
        assert is_refusal(ddiff("sample", str(RUN), *options), options[0], "several fields")
    assert is_refusal(ddiff("sample", str(RUN), "--edit", "x"), "--edit")
    assert is_refusal(ddiff("sample", str(RUN), "--given", "text"), "NAME=VALUE")
    assert is_refusal(ddiff("compare", str(RUN)), "several fields")


# ---------------------------------------------------------------------- commands


def test_eval_command_repeats_the_evaluation_and_takes_settings(
    ddiff: Command, tmp_path: Path
) -> None:
    out = tmp_path / "other.json"
    settings = ("--set", "evaluate.samples=8", "--set", 'evaluate.targets=["joint"]')
    code, printed, err = ddiff("eval", str(RUN), *settings, "--out", str(out))
    assert code == 0, err
    assert "joint" in printed
    found = json.loads(out.read_text())
    assert found["targets"]["joint"]["samples"] == 8
    before = read_evaluation(RUN)
    assert ddiff("eval", str(RUN)).code == 0
    assert read_evaluation(RUN) == before


def test_independent_times_and_untrained_targets_are_refused_before_training(
    ddiff: Command,
) -> None:
    fresh = ("run", "digits.toml", "--set", "run_dir='refused'")
    wrong = ddiff(*fresh, "--set", 'evaluate.path="independent"')
    assert is_refusal(wrong, "independent times", "not a bound")
    wrong = ddiff(*fresh, "--set", 'sample.targets=["image"]')
    assert is_refusal(wrong, "[sample] targets", "image moves, text is at the prior")
    wrong = ddiff(
        *fresh, "--set", 'fields.image.sampler="first_hitting"', "--set", 'sample.path="shared"'
    )
    assert is_refusal(wrong, "together")
    assert not Path("refused").exists()


def test_export_contains_the_normalizers(ddiff: Command, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    code, _, err = ddiff("export", "runs/patches", str(file))
    assert code == 0, err
    tensors = load_file(str(file))
    own = load_file("runs/patches/fields/image/normalizer.safetensors")
    for name, value in own.items():
        assert torch.equal(tensors[f"normalizers.image.{name}"], value)
    assert any(name.startswith("backbone.") for name in tensors)


def test_dry_run_checks_the_targets_of_a_recipe_whose_words_are_unknown(ddiff: Command) -> None:
    """The words of the tokenizer are only in the data, so that the model cannot be built."""
    code, _, err = ddiff(
        "run",
        "digits.toml",
        "--dry-run",
        "--set",
        "run_dir='dry'",
        "--set",
        "objective.times='shared'",
    )
    assert code == 2
    assert '[evaluate] targets, "image | text"' in err
    assert "Train it with [objective] times" in err


def test_dry_run_prints_a_recipe_that_reads_again(ddiff: Command) -> None:
    code, out, err = ddiff("run", "digits.toml", "--dry-run", "--set", "run_dir='dry'")
    assert code == 0, err
    Path("again.toml").write_text(out)
    first = package.read_recipe("digits.toml", ["run_dir='dry'"])
    assert package.read_recipe("again.toml").to_dict() == first.to_dict()
    assert not Path("dry").exists()


# ---------------------------------------------------------------------- exactness


def records(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for line in lines(run_dir / "metrics.jsonl"):
        found.append({key: value for key, value in line.items() if key not in WALL_CLOCK})
    return found


def same_weights(one: str, two: str) -> bool:
    first = Checkpoints(f"{one}/checkpoints").newest()
    second = Checkpoints(f"{two}/checkpoints").newest()
    assert first is not None
    assert second is not None
    theirs = second.read_weights()
    return all(torch.equal(value, theirs[name]) for name, value in first.read_weights().items())


def test_resumed_run_equals_uninterrupted_run(ddiff: Command) -> None:
    """The recipe has dropout, so that the random state of torch must be restored too."""
    torn = ("run", "digits.toml", "--set", "run_dir='torn'", "--set", 'train.schedule="constant"')
    whole = [*torn]
    whole[3] = "run_dir='whole'"
    assert ddiff(*torn, "--set", "train.steps=7").code == 0
    assert ddiff(*torn).code == 0
    assert ddiff(*whole).code == 0
    assert records(Path("torn")) == records(Path("whole"))
    assert same_weights("torn", "whole")
    assert read_evaluation(Path("torn")) == read_evaluation(Path("whole"))
    for name in ("samples.jsonl", "judged.json", "samples-joint.png"):
        assert (Path("torn") / name).read_bytes() == (Path("whole") / name).read_bytes(), name


def test_verify_resume_finds_equal_steps(ddiff: Command) -> None:
    code, out, err = ddiff("run", "digits.toml", "--verify-resume", "4")
    assert code == 0, err
    assert "losses and other figures: equal" in out
    assert "state after step 8: equal" in out


@pytest.mark.parametrize("setting", ["backend.workers=0", "train.accumulate=2"])
def test_micro_batches_and_workers_do_not_change_the_losses(ddiff: Command, setting: str) -> None:
    name = setting.partition("=")[0]
    options = ["run", "digits.toml", "--set", "denoiser.dropout=0.0", "--set", "train.steps=4"]
    assert ddiff(*options, "--set", f"run_dir='plain-{name}'").code == 0
    assert ddiff(*options, "--set", f"run_dir='{name}'", "--set", setting).code == 0
    for first, second in zip(records(Path(f"plain-{name}")), records(Path(name)), strict=True):
        # the sum over micro-batches is a sum in another order, in float32
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)


def test_fresh_deletes_all_files_of_the_run(ddiff: Command) -> None:
    options = ("run", "patches.toml", "--set", "run_dir='fresh'")
    assert ddiff(*options).code == 0
    (Path("fresh") / "samples-old.png").write_bytes(b"")
    assert ddiff(*options, "--fresh").code == 0
    assert not (Path("fresh") / "samples-old.png").exists()
    (Path("fresh") / "fields/image/notes.txt").write_text("mine")
    assert is_refusal(ddiff(*options, "--fresh"), "fields/image/notes.txt")


# ---------------------------------------------------------------------- cost


def test_measured_first_loss_is_that_of_the_initial_heads(ddiff: Command) -> None:
    """The output matrices of the heads start at 0, so the backbone has no influence."""
    for name in ("digits", "patches"):
        recipe = f"{name}.toml"
        code, out, err = ddiff("run", recipe, "--dry-run", "--measure", "2", "--set", "name=cost")
        assert code == 0, err
        assert "WARNING" not in out
        line = next(line for line in out.splitlines() if line.startswith("first loss"))
        first, *_, expected = (word for word in line.split() if word[0].isdigit())
        # printed with four digits
        assert float(first) == pytest.approx(float(expected), abs=2e-4)
    assert not Path("runs/cost").exists()


# ---------------------------------------------------------------------- rate plus distortion

THROUGH = "text through image"
NOISY = "{kind = 'mixture', parts = [{}, {prior = ['text']}, {noisy = {image = 0.5}}]}"


def through(*settings: str, times: str = NOISY) -> list[str]:
    """Return the command that trains a run and evaluates the word through its image."""
    options = ["run", "patches.toml"]
    for setting in (
        f"objective.times={times}",
        f"evaluate.targets=['{THROUGH}']",
        "evaluate.deviation=0.5",
        "evaluate.draws=2",
        "evaluate.every=2",
        *settings,
    ):
        options += ["--set", setting]
    return options


@pytest.mark.parametrize("times", [NOISY, "'independent'"], ids=["noisy", "independent"])
def test_run_reports_rate_plus_distortion_of_a_text(ddiff: Command, times: str) -> None:
    name = "noisy" if times == NOISY else "independent"
    code, out, err = ddiff(*through(f"run_dir='{name}'", times=times))
    assert code == 0, err
    found = json.loads((Path(name) / "evaluation.json").read_text())["targets"]
    assert list(found) == [THROUGH]
    parts = found[THROUGH]["rate_distortion"]
    assert parts["rate"] + parts["distortion"] == pytest.approx(found[THROUGH]["nats_per_sample"])
    # every text is one counted token
    assert parts["tokens"] == found[THROUGH]["samples"] == 8
    assert parts["nats_per_token"] == pytest.approx(found[THROUGH]["nats_per_sample"])
    low, high = found[THROUGH]["interval"]
    assert low < found[THROUGH]["nats_per_sample"] < high
    # four steps teach little about the image, whose 64 numbers then cost many nats
    assert parts["rate"] > 1.0
    for words in ("rate", "distortion", "a bound of text", "noise of deviation 0.5"):
        assert words in out
    again = package.load(name).evaluate([THROUGH])[THROUGH]
    assert again.bound.nats_per_sample == found[THROUGH]["nats_per_sample"]
    metric = "validation_text_through_image_nats_per_sample"
    assert any(metric in line for line in records(Path(name)))


@pytest.mark.parametrize(
    ("settings", "times", "expected"),
    [
        ((), "'shared'", ["rate", "image moves, text is at the prior"]),
        (
            (),
            "{kind = 'mixture', parts = [{}, {prior = ['text']}]}",
            ["distortion", "noisy = {image = 0.5}", '"independent"'],
        ),
        (["evaluate.deviation=0.4"], NOISY, ["noisy = {image = 0.4}"]),
        (["evaluate.deviation={text = 0.4}"], NOISY, ["needs [evaluate] deviation"]),
        (["evaluate.deviation={imag = 0.4}"], NOISY, ['got "imag"']),
        (["evaluate.deviation=1e-9"], NOISY, ["deviation must lie between"]),
        (["evaluate.targets=['image through text']"], NOISY, ["with a Gaussian process"]),
        (["evaluate.targets=['text through imag']"], NOISY, ['Did you mean "image"?']),
        ([f"sample.targets=['{THROUGH}']"], NOISY, ["evaluated and not sampled"]),
    ],
)
def test_impossible_bounds_through_a_vector_are_refused_before_training(
    ddiff: Command, settings: list[str], times: str, expected: list[str]
) -> None:
    assert is_refusal(ddiff(*through("run_dir='refused'", *settings, times=times)), *expected)
    assert not Path("refused").exists()
