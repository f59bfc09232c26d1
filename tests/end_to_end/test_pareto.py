"""`ddiff pareto`: points, resuming, charts, and messages about settings that do not fit."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command, is_refusal
from small import AUTOREGRESSIVE, FLAT, make_autoregressive_recipe, working_in

import ddiff as api
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.pareto_record import ParetoRecord, SweepPoint, read_pareto
from ddiff.runs.generation import evaluate_generation
from ddiff.runs.pareto import SweepSampling, sweep_runs
from ddiff.runs.pareto_settings import SweepGrid, read_integers
from ddiff.runs.report.pareto import ColoredRecord, compare_costs, draw_costs, draw_fronts
from ddiff.runs.run import Run

LEFT = [*AUTOREGRESSIVE, 'name="left"', "train.steps=4", "data.length=16"]
PLAIN = """
from ddiff import AncestralSampler, ComponentConfig, Grid, hookimpl


class Plain:
    class Config(ComponentConfig):
        pass

    @staticmethod
    def build(config, *, steps):
        return AncestralSampler(Grid("uniform", steps))


@hookimpl
def ddiff_register(registry):
    registry.add("sampler", "plain", "ddiff_plain_sampler:Plain")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the runs `small` and `flat`, and the judge: the autoregressive run `left`."""
    folder = tmp_path_factory.mktemp("pareto")
    with working_in(folder):
        api.run("small.toml", settings=["train.steps=4"])
        api.run("small.toml", settings=[*FLAT, 'name="flat"', "train.steps=4"])
        Path("left.toml").write_text(make_autoregressive_recipe())
        api.run("left.toml", settings=LEFT)
        yield folder


@pytest.fixture(autouse=True)
def _without_points(runs: Path) -> None:
    """Delete the points of earlier tests."""
    for path in runs.glob("**/pareto.*"):
        path.unlink()


GRID = ("--judge", "runs/left", "--count", "3")


def sweep(**grid: Any) -> ParetoRecord:
    """Sweep the run `small`, and return its record."""
    count = grid.pop("count", 3)
    fresh = grid.pop("fresh", False)
    result = sweep_runs(
        ["runs/small"], "runs/left", SweepGrid(**grid), SweepSampling(count), fresh=fresh
    )
    return result.records[0]


def refuse_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "sample", lambda *_, **__: pytest.fail("samples were drawn"))


def settings_of(record: ParetoRecord) -> list[tuple[str, int | None, float | None]]:
    return [(point.kind, point.steps, point.temperature) for point in record.points]


# ---------------------------------------------------------------------- points


def test_pareto_measures_every_setting_and_prints_perplexity_with_entropy(
    ddiff: Command, runs: Path
) -> None:
    result = ddiff("pareto", "runs/small", *GRID, "--steps", "1,2", "--temperature", ".7,1")
    assert result.code == 0, result.err
    record = read_pareto(Path("runs/small/pareto.json"))
    assert record is not None
    expected = [("ancestral", steps, value) for steps in (1, 2) for value in (0.7, 1.0)]
    assert settings_of(record) == expected
    assert "perplexity at entropy" in result.out
    assert "held-out text" in result.out
    assert "* No other comparable point" in result.out
    # on the progress lines of stderr too
    for line in (result.out + result.err).splitlines():
        assert ("perplexity" in line) <= ("entropy" in line)
    assert Path("runs/small/pareto.svg").exists()
    foreign = classify_contents(Path("runs/small")).foreign
    assert not [name for name in foreign if "pareto" in name]


def test_point_of_the_recipe_equals_the_evaluation_of_generated_samples(runs: Path) -> None:
    run = api.load("runs/small")
    record = sweep(steps=[run.recipe.sample.steps], temperatures=[1.0])
    (point,) = record.points
    judged = evaluate_generation(run, "runs/left", count=3)
    assert judged.perplexity is not None
    assert point.perplexity.value == pytest.approx(judged.perplexity.corpus)
    assert point.entropy.value == pytest.approx(judged.samples.entropy.value)
    assert point.entropy.interval == pytest.approx(judged.samples.entropy.interval)
    assert point.distinct_2 == pytest.approx(judged.samples.distinct[2])
    assert judged.samples.known_words is not None
    assert point.known_words is not None
    assert point.known_words.value == pytest.approx(judged.samples.known_words.value)
    assert point.nfe == judged.written["sampling"]["nfe"]
    held_out = judged.written["judge"]["held_out"]
    assert record.held_out.perplexity.value == pytest.approx(held_out["corpus"])


def test_default_settings_follow_the_recipe(runs: Path) -> None:
    record = sweep(temperatures=[1.0])
    # [sample] steps is 4: an eighth is less than one step
    assert [point.steps for point in record.points] == [1, 2, 4]
    assert {point.kind for point in record.points} == {"ancestral"}


def test_equal_settings_are_drawn_once(runs: Path) -> None:
    record = sweep(steps=[2, 2], temperatures=[1.0, 1.0], samplers=["ancestral", "ancestral"])
    assert len(record.points) == 1


def test_autoregressive_run_has_one_point_per_temperature(runs: Path) -> None:
    result = sweep_runs(
        ["runs/left"],
        "runs/left",
        SweepGrid(steps=[1, 2], temperatures=[0.5, 1.0]),
        SweepSampling(2),
    )
    (record,) = result.records
    assert settings_of(record) == [("left_to_right", None, 0.5), ("left_to_right", None, 1.0)]
    assert {point.nfe for point in record.points} == {16.0}


def test_sampler_without_steps_has_one_point_per_temperature(runs: Path) -> None:
    record = sweep(steps=[1, 2], temperatures=[1.0], samplers=["first_hitting", "ancestral"])
    assert settings_of(record) == [
        ("ancestral", 1, 1.0),
        ("ancestral", 2, 1.0),
        ("first_hitting", None, 1.0),
    ]


def test_autoregressive_run_keeps_its_sampler_next_to_diffusion_runs(
    ddiff: Command, runs: Path
) -> None:
    arguments = ["--steps", "1", "--temperature", "1", "--sampler", "ancestral"]
    result = ddiff("pareto", "runs/small", "runs/left", *GRID, *arguments)
    assert result.code == 0, result.err
    assert "left: without the sampler ancestral" in result.err
    left = read_pareto(Path("runs/left/pareto.json"))
    assert left is not None
    assert settings_of(left) == [("left_to_right", None, 1.0)]


# ---------------------------------------------------------------------- resuming


def test_recorded_points_are_not_drawn_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(steps=[1, 2], temperatures=[1.0])
    with monkeypatch.context() as patch:
        refuse_samples(patch)
        again = sweep(steps=[2], temperatures=[1.0])
    assert again.points == first.points
    more = sweep(steps=[1], temperatures=[0.5, 1.0])
    assert len(more.points) == 3
    assert set(map(repr, first.points)) < set(map(repr, more.points))


def test_interrupted_sweep_keeps_finished_points(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Run.sample
    calls = []

    def stop_at_third(run: Run, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(run, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "sample", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            sweep(steps=[1, 2], temperatures=[0.5, 1.0])
    kept = read_pareto(Path("runs/small/pareto.json"))
    assert kept is not None
    assert len(kept.points) == 2
    complete = sweep(steps=[1, 2], temperatures=[0.5, 1.0])
    assert len(complete.points) == 4
    assert complete.points[:2] == kept.points


def test_points_of_another_protocol_are_refused_unless_fresh(runs: Path) -> None:
    sweep(steps=[1], temperatures=[1.0])
    with pytest.raises(ArgumentError, match=r"count \(3 in the file, 4 now\).*--fresh"):
        sweep(steps=[1], temperatures=[1.0], count=4)
    fresh = sweep(steps=[2], temperatures=[1.0], count=4, fresh=True)
    assert settings_of(fresh) == [("ancestral", 2, 1.0)]


def test_points_of_other_weights_are_refused(runs: Path) -> None:
    sweep(steps=[1], temperatures=[1.0])
    path = Path("runs/small/pareto.json")
    tree = json.loads(path.read_text())
    tree["fingerprints"]["weights"] = "of an earlier step"
    path.write_text(json.dumps(tree))
    with pytest.raises(ArgumentError, match="the weights of the run"):
        sweep(steps=[1], temperatures=[1.0])


# ---------------------------------------------------------------------- record


def test_record_round_trips_and_requires_entropy(runs: Path) -> None:
    record = sweep(steps=[1], temperatures=[1.0])
    assert ParetoRecord.model_validate(json.loads(record.to_json())) == record
    tree = json.loads(record.to_json())["points"][0]
    del tree["entropy"]
    with pytest.raises(ValueError, match="entropy"):
        SweepPoint.model_validate(tree)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": 99}, "newer version"),
        ({"held_out": None}, 'key "held_out" is invalid'),
        ({"surprise": 1}, 'key "surprise" is invalid'),
    ],
)
def test_damaged_and_newer_records_are_refused(
    runs: Path, change: dict[str, Any], expected: str
) -> None:
    record = sweep(steps=[1], temperatures=[1.0])
    path = Path("runs/small/pareto.json")
    path.write_text(json.dumps({**json.loads(record.to_json()), **change}))
    with pytest.raises(CheckpointError, match=expected):
        read_pareto(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="ddiff pareto"):
        read_pareto(path)


# ---------------------------------------------------------------------- charts


def make_record(record: ParetoRecord, *figures: tuple[int, float, float, float]) -> ColoredRecord:
    """Record with a point for each (steps, perplexity, entropy, NFE)."""
    points = []
    for number, (steps, perplexity, entropy, nfe) in enumerate(figures):
        changes = {"steps": steps, "nfe": nfe, "temperature": 0.5 + 0.1 * number}
        changes |= {"perplexity": {"value": perplexity}, "entropy": {"value": entropy}}
        points.append({**record.points[0].model_dump(), **changes})
    held_out = {**record.held_out.model_dump(), "entropy": {"value": 4.0}}
    made = {**record.model_dump(), "points": points, "held_out": held_out}
    return ColoredRecord(ParetoRecord.model_validate(made), 0, "toy")


def test_costs_are_compared_at_the_entropy_of_held_out_text(runs: Path) -> None:
    record = sweep(steps=[1], temperatures=[1.0])
    toy = make_record(
        record,
        (8, 10.0, 3.9, 8.0),
        (8, 40.0, 4.1, 8.0),
        (16, 5.0, 3.8, 16.0),
        (16, 20.0, 4.2, 16.0),
    )
    entropy, points = compare_costs([toy])
    assert entropy == 4.0
    # the geometric means, because 4.0 is in the middle
    found = {point.steps: (point.tradeoff.nfe, point.tradeoff.perplexity) for point in points}
    assert found == {8: (8.0, pytest.approx(20.0)), 16: (16.0, pytest.approx(10.0))}
    assert "entropy 4.00 nats" in draw_costs([toy])


def test_chart_draws_every_point_once_and_fills_the_front(runs: Path) -> None:
    record = sweep(steps=[1], temperatures=[1.0])
    toy = make_record(record, (8, 10.0, 3.9, 8.0), (8, 40.0, 4.1, 8.0), (8, 50.0, 3.9, 9.0))
    root = xml.fromstring(draw_fronts([toy]))
    circles = [part for part in root.iter() if part.tag.endswith("circle")]
    assert len(circles) == 3
    assert ["hollow" in circle.get("class", "") for circle in circles].count(True) == 1
    hints = [part.text or "" for part in root.iter() if part.tag.endswith("}title")]
    for hint in hints:
        assert ("perplexity" in hint) <= ("entropy" in hint)
    assert sum("held-out text" in hint for hint in hints) == 1


def test_chart_file_is_valid_and_names_all_runs(ddiff: Command, runs: Path) -> None:
    arguments = [*GRID, "--steps", "1", "--temperature", "1", "--out", "fronts.svg"]
    for _ in range(2):  # the second time, the chart of the first is replaced
        assert ddiff("pareto", "runs/small", "runs/flat", *arguments).code == 0
    text = Path("fronts.svg").read_text()
    xml.fromstring(text)
    assert "small" in text
    assert "flat" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_report_shows_the_fronts_of_runs(ddiff: Command, runs: Path) -> None:
    arguments = ["--steps", "1,2", "--temperature", "1"]
    assert ddiff("pareto", "runs/small", "runs/flat", *GRID, *arguments).code == 0
    result = ddiff("report", "runs/small", "runs/flat", "--draws", "0", "--out", "with.html")
    assert result.code == 0, result.err
    text = Path("with.html").read_text()
    assert 'id="pareto"' in text
    assert "points are not dominated" in text
    Path("runs/small/pareto.json").unlink()
    Path("runs/flat/pareto.json").unlink()
    assert ddiff("report", "runs/small", "--draws", "0", "--out", "without.html").code == 0
    assert 'id="pareto"' not in Path("without.html").read_text()


def test_report_separates_points_of_different_protocols(ddiff: Command, runs: Path) -> None:
    for name, count in (("small", "3"), ("flat", "4")):
        arguments = ["--judge", "runs/left", "--count", count, "--steps", "1", "--temperature", "1"]
        assert ddiff("pareto", f"runs/{name}", *arguments).code == 0
    arguments = ["report", "runs/small", "runs/flat", "--draws", "0", "--out", "two.html"]
    assert ddiff(*arguments).code == 0
    assert Path("two.html").read_text().count("points are not dominated") == 2


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--count", "3"], "needs --judge"),
        ([*GRID, "--steps", "8,"], "--steps must be numbers separated by commas"),
        ([*GRID, "--steps", "1.5"], "--steps must be integers"),
        ([*GRID, "--steps", "0"], "--steps must be integers from 1"),
        ([*GRID, "--temperature", "warm"], "--temperature must be numbers"),
        ([*GRID, "--temperature", "-1"], "--temperature must be numbers from 0"),
        ([*GRID, "--set", "temperature=0.5"], "Use --temperature"),
        ([*GRID, "--sampler", "left_to_right"], "needs a model without a process"),
        ([*GRID, "--sampler", "ancestrall"], "ancestral"),
        ([*GRID, "--set", "grit=1"], "grid"),
        (["--judge", "runs/small"], "exact likelihood"),
        (["--judge", "./missing"], "no such folder"),
    ],
)
def test_pareto_refuses_mistakes_before_samples_are_drawn(
    ddiff: Command,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    refuse_samples(monkeypatch)
    assert is_refusal(ddiff("pareto", "runs/small", *arguments), expected)
    assert not Path("runs/small/pareto.json").exists()


def test_unsupported_samplers_are_refused_before_samples_are_drawn(
    ddiff: Command, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_samples(monkeypatch)
    # self-correction needs predictions at tokens, which masked diffusion does not train
    result = ddiff("pareto", "runs/flat", *GRID, "--sampler", "self_correction")
    assert is_refusal(result, "SelfCorrectingSampler")


def test_temperature_is_refused_for_a_sampler_without_one(
    ddiff: Command, runs: Path, distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(
        "ddiff-plain", "1.0", {"plain": "ddiff_plain_sampler"}, {"ddiff_plain_sampler": PLAIN}
    )
    plugins = 'plugins=["mdlm", "dit", "plain"]'
    settings = [*FLAT, 'name="plain"', "train.steps=1", plugins, 'sample.sampler="plain"']
    api.run("small.toml", settings=settings)
    result = ddiff("pareto", "runs/plain", *GRID, "--steps", "1")
    assert result.code == 0, result.err
    (point,) = read_pareto(Path("runs/plain/pareto.json")).points  # type: ignore[union-attr]
    assert point.temperature is None
    refuse_samples(monkeypatch)
    result = ddiff("pareto", "runs/plain", *GRID, "--temperature", "1")
    assert is_refusal(result, "has no key temperature", "--sampler")


def test_repeated_run_and_foreign_chart_file_are_refused(
    ddiff: Command, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_samples(monkeypatch)
    assert is_refusal(ddiff("pareto", "runs/small", "runs/../runs/small", *GRID), "given twice")
    Path("mine.svg").write_text("<svg/>")
    assert is_refusal(ddiff("pareto", "runs/small", *GRID, "--out", "mine.svg"), "did not write")
    assert is_refusal(ddiff("pareto", "runs/small", *GRID, "--out", "mine.png"), ".svg")


def test_numbers_are_read_with_and_without_leading_zero() -> None:
    assert read_integers("8,16, 32", "--steps") == [8, 16, 32]
