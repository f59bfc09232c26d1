"""`ddiff compare`: one table of runs with the same evaluation settings."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from commands import Command
from small import FLAT, working_in

import ddiff as api
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.comparison import compare
from ddiff.evaluation.intervals import student95
from ddiff.evaluation.judge_model import Scores

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
    assert "Train the runs with the same [data] and [tokenizer]." in err
    assert not Path("compare.json").exists()


@pytest.mark.slow
def test_compare_names_the_command_that_evaluates_other_rows_again(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    """One evaluation read 3 of 10 rows with 4 draws, the other all rows with 1 draw."""
    shutil.copytree(place / "flat", tmp_path / "few")
    evaluation = read(place / "flat/evaluation.json")
    evaluation["protocol"]["data"] += ", 3 of 10 rows"
    evaluation["protocol"]["draws"] = 4
    (tmp_path / "few/evaluation.json").write_text(json.dumps(evaluation))
    code, _, err = ddiff("compare", str(place / "flat"), str(tmp_path / "few"))
    assert code == 2
    assert "ddiff eval RUN_DIR --set evaluate.rows=10 --set evaluate.draws=1" in err


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
    with pytest.raises(CheckpointError, match="there is no such folder"):
        compare([tmp_path / "none"])
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


# ---------------------------------------------------------------------- figures of samples


@pytest.fixture(scope="module")
def sampled(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with copies of `tree`, `flat` and `flat1`. The first two have figures of 3 samples."""
    folder = tmp_path_factory.mktemp("sampled")
    for name in ("tree", "flat", "flat1"):
        shutil.copytree(place / name, folder / name)
    judge = ConstantJudge()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.parent)
        patch.setenv("DDIFF_CACHE", str(place.parent / "cache"))
        for name in ("tree", "flat"):
            report = api.evaluate_generation(api.load(folder / name), judge, count=3)
            (folder / name / "generation.json").write_text(report.to_json())
    return folder


class ConstantJudge:
    """Judge that gives every character 2 nats."""

    name = "constant"
    tokenizer_fingerprint = None
    protocol: ClassVar = {"judge": "constant", "model": "2 nats", "tokenizer": "characters"}

    def encode(self, documents: Sequence[str]) -> list[int]:
        return [0] * max(1, len("".join(documents)))

    def score(self, rows: Sequence[Sequence[int]]) -> Scores:
        tokens = np.array([len(row) for row in rows])
        return Scores(2.0 * tokens, tokens)

    def features(self, rows: Sequence[Sequence[int]]) -> None:
        return None


@pytest.mark.slow
def test_compare_shows_the_figures_of_generation_json(sampled: Path) -> None:
    comparison = compare([sampled / "tree", sampled / "flat", sampled / "flat1"])
    titles, cells = comparison.columns()
    for row, line in zip(comparison.rows[:2], cells[:2]):
        written = read(sampled / row.run / "generation.json")
        shown = dict(zip(titles, line))
        entropy = written["samples"]["entropy_nats"]["value"]
        assert shown["entropy, nats"].startswith(f"{entropy:.3f}")
        assert shown["judge perplexity"].startswith(f"{math.exp(2.0):.4g}")
        assert shown["judge perplexity"].endswith(f"at entropy {entropy:.3f}")
        assert shown["NFE of samples"] == f"{written['sampling']['nfe']:.1f}"
        assert shown["samples drawn by"] == "ancestral, 4 steps, temperature 1"
        assert shown["distinct-2"] == f"{written['samples']['distinct']['2']:.3f}"
    assert comparison.rows[2].generated is None
    assert dict(zip(titles, cells[2]))["judge perplexity"] == "–"
    assert any("judge constant" in remark for remark in comparison.remarks())
    assert "sampler" not in titles  # the samples of samples.jsonl are others


@pytest.mark.slow
def test_compare_without_generation_has_the_columns_of_samples_jsonl(
    sampled: Path, ddiff: Command, tmp_path: Path
) -> None:
    runs = [str(sampled / "tree"), str(sampled / "flat")]
    result = ddiff("compare", *runs, "--no-generation", "--out", str(tmp_path))
    assert result.code == 0
    written = read(tmp_path / "compare.json")
    assert [row["generated"] for row in written["rows"]] == [None, None]
    assert written["command"].endswith("--no-generation")
    markdown = (tmp_path / "compare.md").read_text()
    assert "sample entropy, nats" in markdown
    assert "perplexity" not in markdown


@pytest.mark.slow
def test_compare_refuses_samples_that_were_evaluated_with_another_count(
    sampled: Path, ddiff: Command, tmp_path: Path
) -> None:
    shutil.copytree(sampled / "flat", tmp_path / "more")
    path = tmp_path / "more/generation.json"
    written = read(path)
    written["protocol"]["count"] = 5
    path.write_text(json.dumps(written))
    result = ddiff("compare", str(sampled / "tree"), str(tmp_path / "more"))
    assert result.code == 2
    assert "count: 3 in" in result.err
    assert "--generate --count 3 --judge constant" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("change", ["step", "weights"])
def test_compare_refuses_samples_of_other_weights_than_the_likelihood(
    change: str, sampled: Path, tmp_path: Path
) -> None:
    shutil.copytree(sampled / "flat", tmp_path / "old")
    path = tmp_path / "old/generation.json"
    written = read(path)
    if change == "step":
        written["step"] = 2
    else:
        written["fingerprints"]["weights"] = "of another training"
    path.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"generation\.json has the figures of samples of"):
        compare([tmp_path / "old"])
    assert compare([tmp_path / "old"], generation=False).rows[0].generated is None


@pytest.mark.slow
def test_compare_names_a_damaged_generation_json(sampled: Path, tmp_path: Path) -> None:
    shutil.copytree(sampled / "flat", tmp_path / "bad")
    (tmp_path / "bad/generation.json").write_text('{"schema_version": 2, ')
    with pytest.raises(CheckpointError, match=r"generation\.json is damaged"):
        compare([tmp_path / "bad"])


@pytest.mark.slow
def test_compare_with_until_does_not_compare_the_number_of_draws(
    place: Path, tmp_path: Path
) -> None:
    for name, draws in (("few", 4), ("many", 9)):
        shutil.copytree(place / "flat", tmp_path / name)
        path = tmp_path / name / "evaluation.json"
        written = read(path)
        written["protocol"] |= {"until": 0.01, "draws": draws}
        path.write_text(json.dumps(written))
    comparison = compare([tmp_path / "few", tmp_path / "many"])
    assert comparison.protocol["until"] == 0.01
    assert comparison.protocol["draws"] is None


@pytest.mark.slow
def test_published_values_never_share_a_column_with_bounds(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "flat", tmp_path / "published")
    path = tmp_path / "published/evaluation.json"
    written = read(path)
    written |= {
        "bound": "PUBLISHED",
        "published_nats_per_token": written.pop("nelbo_nats_per_token"),
    }
    figures = {name: dict(figure) for name, figure in written["figures"].items()}
    figures["published"] = figures.pop("nelbo")
    for figure in figures.values():
        figure["protocol"] = "published ptb"
    path.write_text(json.dumps(written | {"figures": figures}))
    with pytest.raises(ArgumentError, match=r"protocol: validation in .*, published ptb in"):
        compare([place / "flat", tmp_path / "published"])
    comparison = compare([tmp_path / "published"])
    assert comparison.rows[0].bound == "PUBLISHED"
    assert any("not a bound" in note for note in comparison.notes)


@pytest.mark.slow
def test_repr_of_a_comparison_is_its_table(place: Path) -> None:
    comparison = compare([place / "tree", place / "flat"])
    lines = repr(comparison).splitlines()
    assert lines[0] == "Comparison:"
    assert [line.split()[0] for line in lines[1:]] == ["run", "tree", "flat"]
    assert comparison._repr_markdown_().startswith("| run |")
