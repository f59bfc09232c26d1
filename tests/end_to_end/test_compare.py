"""`ddiff compare`: one table of runs with the same evaluation settings."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from small import FLAT, working_in

import ddiff as api
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.comparison import compare
from ddiff.evaluation.intervals import student95

SHORT = ["train.steps=3", "denoiser.dropout=0.0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with five trained runs.

    `tree`: hierarchical diffusion. `flat`: masked diffusion. `flat1`: the same with another seed.
    `long`: rows of 12 tokens. `window`: another time window.
    """
    folder = tmp_path_factory.mktemp("compare")
    with working_in(folder):
        api.run("small.toml", settings=[*SHORT, 'name="tree"'])
        for name, *settings in (
            ("flat",),
            ("flat1", "seed=1"),
            ("long", "data.length=12"),
            ("window", "evaluate.window=[0.1, 0.9]", "evaluate.draws=2"),
        ):
            api.run("small.toml", settings=[*SHORT, *FLAT, f'name="{name}"', *settings])
        yield folder / "runs"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_compare_returns_the_numbers_stored_in_the_run_directories(place: Path) -> None:
    comparison = compare([place / "tree", place / "flat"])
    assert [row.process for row in comparison.rows] == ["hdlm", "mdlm"]
    for row in comparison.rows:
        run = api.load(place / row.run)
        evaluation, metrics = (
            read(place / row.run / "evaluation.json"),
            lines(place / row.run / "metrics.jsonl"),
        )
        assert row.parameters == sum(parameter.numel() for parameter in run.denoiser.parameters())
        assert row.tokens_seen == sum(line["tokens"] for line in metrics)
        assert (row.bound, row.nats) == ("NELBO", evaluation["nelbo_nats_per_token"])
        assert list(row.interval or ()) == evaluation["interval"]
        assert row.bits_per_byte == evaluation["bits_per_byte"]
        assert row.train_seconds == pytest.approx(
            1000 * sum(line["seconds"] for line in metrics) / row.tokens_seen
        )
        samples, timing = (
            lines(place / row.run / "samples.jsonl"),
            read(place / row.run / "sampling.json"),
        )
        assert row.nfe == sum(sample["nfe"] for sample in samples) / len(samples)
        assert row.sample_seconds == pytest.approx(1000 * timing["seconds"] / (8 * len(samples)))
        entropies = [
            -sum(
                sample["ids"].count(v) / 8 * math.log(sample["ids"].count(v) / 8)
                for v in set(sample["ids"])
            )
            for sample in samples
        ]
        assert row.sample_entropy == pytest.approx(sum(entropies) / len(entropies))


@pytest.mark.slow
def test_compare_command_prints_and_writes_one_table(
    place: Path, ddiff: Command, tmp_path: Path
) -> None:
    runs = [str(place / "tree"), str(place / "flat")]
    code, out, _ = ddiff("compare", *runs, "--out", str(tmp_path / "made"))
    assert code == 0
    written = read(tmp_path / "made/compare.json")
    assert written["command"] == f"ddiff compare {' '.join(runs)}"
    assert [row["run"] for row in written["rows"]] == ["tree", "flat"]
    markdown = (tmp_path / "made/compare.md").read_text()
    nats = f"{written['rows'][0]['nats']:.4f}"
    assert nats in markdown
    assert nats in out
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "nats/token" in table[0]
    assert "unigram" in markdown
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "compare.json",
        "compare.md",
    ]


@pytest.mark.slow
def test_compare_averages_seeds_and_computes_students_t_interval(place: Path) -> None:
    comparison = compare([place / "flat", place / "tree", place / "flat1"], group_seeds=True)
    assert [(row.run, row.seeds) for row in comparison.rows] == [("flat{,1}", 2), ("tree", 1)]
    nats = [
        read(place / name / "evaluation.json")["nelbo_nats_per_token"] for name in ("flat", "flat1")
    ]
    row, half = comparison.rows[0], student95(1) * abs(nats[0] - nats[1]) / 2
    assert nats[0] != nats[1]
    assert row.nats == pytest.approx(sum(nats) / 2)
    assert row.interval == pytest.approx((sum(nats) / 2 - half, sum(nats) / 2 + half))
    assert "seeds" in comparison.columns()[0]
    assert [row.run for row in compare([place / "flat", place / "flat1"]).rows] == ["flat", "flat1"]


@pytest.mark.slow
def test_compare_names_runs_by_directory_if_their_names_are_equal(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "flat", tmp_path / "again")
    runs = [place / "flat", tmp_path / "again"]
    assert [row.run for row in compare(runs).rows] == [str(run) for run in runs]


@pytest.mark.slow
def test_compare_refuses_runs_with_different_evaluation_settings(
    place: Path, ddiff: Command
) -> None:
    code, out, err = ddiff(
        "compare", str(place / "flat"), str(place / "long"), str(place / "window")
    )
    assert (code, out) == (2, "")
    for expected in (
        "length: 8 in",
        "12 in",
        "data: ",
        "window: [0.001, 0.999] in",
        "[0.1, 0.9] in",
        "draws: 1 in",
    ):
        assert expected in err
    assert "tokenizer: " not in err
    assert not Path("compare.json").exists()


@pytest.mark.slow
def test_compare_marks_exact_likelihoods_as_nll_and_ignores_the_time_window(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "window", tmp_path / "exact")
    evaluation = read(place / "window/evaluation.json")
    evaluation |= {"bound": "NLL", "nll_nats_per_token": evaluation.pop("nelbo_nats_per_token")}
    evaluation["figures"]["nll"] = evaluation["figures"].pop("nelbo")
    (tmp_path / "exact/evaluation.json").write_text(json.dumps(evaluation))
    comparison = compare([tmp_path / "exact", place / "flat"])
    assert [row.bound for row in comparison.rows] == ["NLL", "NELBO"]
    assert comparison.protocol["window"] == [0.001, 0.999]
    assert any("NLL is exact" in note for note in comparison.notes)


@pytest.mark.slow
def test_compare_refuses_unfinished_runs(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run directory"):
        compare([tmp_path])
    with pytest.raises(ArgumentError, match="given twice"):
        compare([place / "flat", place / "flat"])
    shutil.copytree(place / "flat", tmp_path / "half")
    with pytest.raises(ArgumentError, match="same recipe and seed"):
        compare([place / "flat", tmp_path / "half"], group_seeds=True)
    path = tmp_path / "half/evaluation.json"
    newer = json.dumps(read(path) | {"schema_version": 99})
    path.write_text(newer)
    with pytest.raises(CheckpointError, match="newer version of ddiff: it has schema version 99"):
        compare([tmp_path / "half"])
    (tmp_path / "half/evaluation.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        compare([tmp_path / "half"])
    (tmp_path / "half/evaluation.json").write_text(
        json.dumps(read(place / "flat/evaluation.json") | {"step": 2})
    )
    with pytest.raises(CheckpointError, match=r"evaluation\.json of step 2"):
        compare([tmp_path / "half"])
    (tmp_path / "half/samples.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"samples\.jsonl is missing"):
        compare([tmp_path / "half"])


@pytest.mark.slow
def test_compare_shows_number_of_steps_recorded_by_the_sampler(place: Path, tmp_path: Path) -> None:
    """The table shows "–" for a sampler with a random number of steps, even if `steps` is set."""
    asked = api.load(place / "flat").recipe.sample
    shown = []
    for name, steps in (("took", 7), ("none", None)):
        shutil.copytree(place / "flat", tmp_path / name)
        timing = tmp_path / name / "sampling.json"
        timing.write_text(json.dumps(read(timing) | {"steps": steps}))
        shown.append(compare([tmp_path / name]).rows[0].sampler)
    assert asked.steps != 7
    assert shown == ["ancestral, 7", "ancestral, –"]


@pytest.mark.slow
def test_compare_imports_no_torch(place: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom ddiff.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([name for name in ('torch', 'numpy', 'datasets') if name in sys.modules])"
    )
    arguments = ["compare", str(place / "flat"), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_comparison_table_shows_nll_of_autoregressive_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("DDIFF_CACHE", str(place.parent / "cache"))
    recipe = (place.parent / "small.toml").read_text().replace('[process]\nkind = "hdlm"\n', "")
    (place.parent / "ar.toml").write_text(recipe.replace('plugins = ["hdlm",', 'plugins = ["ar",'))
    settings = [
        'vocabulary={kind="flat"}',
        'denoiser.head="tokens"',
        'objective="ar"',
        'sample.sampler="left_to_right"',
    ]
    run = api.run("ar.toml", settings=[*SHORT, *settings, 'name="ar"'])
    assert run.process is None
    first, second = compare([place / "ar", place / "flat"]).rows
    assert (first.process, first.bound, second.bound) == ("ar", "NLL", "NELBO")
    evaluation = read(place / "ar/evaluation.json")
    assert evaluation["nll_nats_per_token"] == first.nats
    assert evaluation["terms_nats_per_token"] == {"nll": first.nats}


@pytest.mark.slow
def test_compare_reads_evaluation_json_of_version_1(place: Path, tmp_path: Path) -> None:
    """Version 1 has no figures, fingerprints, components and provenance."""
    shutil.copytree(place / "flat", tmp_path / "old")
    path = tmp_path / "old/evaluation.json"
    tree = read(path)
    for key in ("schema_version", "figures", "fingerprints", "components", "sampler", "provenance"):
        del tree[key]
    path.write_text(json.dumps(tree))
    old, new = compare([tmp_path / "old", place / "flat"]).rows
    assert (old.nats, old.interval, old.bits_per_byte) == (
        new.nats,
        new.interval,
        new.bits_per_byte,
    )
