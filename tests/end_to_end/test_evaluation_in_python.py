"""Public functions of `ddiff` for evaluation: written files, returned values and their repr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small import AUTOREGRESSIVE, FLAT, make_autoregressive_recipe, working_in

import ddiff as api
from ddiff.errors import CheckpointError
from ddiff.runs.fields.evaluation import TargetEvaluation

PAGE = Path(__file__).parents[2] / "docs/evaluation.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the runs `tree`, `flat` and `left`, of which `left` is autoregressive."""
    folder = tmp_path_factory.mktemp("python")
    with working_in(folder):
        short = ["train.steps=3"]
        api.run("small.toml", settings=[*short, 'name="tree"'])
        api.run("small.toml", settings=[*short, *FLAT, 'name="flat"'])
        Path("left.toml").write_text(make_autoregressive_recipe())
        api.run("left.toml", settings=[*short, *AUTOREGRESSIVE, 'name="left"'])
        yield folder


def test_evaluate_run_writes_and_returns_the_bound(runs: Path) -> None:
    found = api.evaluate_run("runs/flat", ["evaluate.draws=2"])
    assert isinstance(found, api.Evaluation)
    assert re.fullmatch(r"Evaluation\(NELBO .* nats per token, PPL .*\)", repr(found))
    record = api.read_evaluation("runs/flat")
    assert record.figures["nelbo"].value == found.nelbo_nats_per_token
    assert record.protocol["draws"] == 2


def test_evaluate_run_with_options_evaluates_other_text(runs: Path) -> None:
    Path("other.txt").write_text("the old hat\nthe red cat\n")
    options = api.EvaluationOptions(data=("other.txt",), split="line")
    found = api.evaluate_run("runs/flat", out="other.json", options=options)
    assert found.documents == 2
    assert json.loads(Path("other.json").read_text())["documents"] == 2


def test_results_of_a_run_have_an_informative_repr(runs: Path) -> None:
    run = api.load("runs/flat")
    evaluation, baselines = run.evaluate()
    assert f"{evaluation.nelbo_nats_per_token:.4f}" in repr(evaluation)
    assert f"unigram_nats_per_token={baselines.unigram_nats_per_token}" in repr(baselines)


def test_bounds_of_several_fields_have_an_informative_repr() -> None:
    scores = np.zeros((4, 1))
    bound = api.JointEvaluation("joint", 12.5, (12.0, 13.0), None, 4, {}, scores)
    shuffled = api.JointEvaluation("joint", 14.25, None, None, 4, {}, scores)
    found = TargetEvaluation(bound, controls={"shuffled": shuffled})
    expected = "12.5000 ± 0.5000 nats per sample, 4 samples; shuffled 14.2500"
    assert repr(found) == f"TargetEvaluation({expected})"


def test_generate_and_evaluate_writes_the_record_that_read_generation_returns(runs: Path) -> None:
    report = api.generate_and_evaluate("runs/flat", judge="runs/left", count=3)
    assert isinstance(report, api.GenerationReport)
    assert report.record == api.read_generation("runs/flat")
    figure = report.record.figures["perplexity"]
    assert isinstance(figure, api.Figure)
    assert report.perplexity is not None
    assert figure.value == report.perplexity.corpus


def test_compare_and_write_comparison_write_the_table(runs: Path) -> None:
    comparison = api.compare(["runs/tree", "runs/left"])
    assert isinstance(comparison, api.Comparison)
    paths = api.write_comparison(comparison, "table", "ddiff compare runs/tree runs/left")
    assert [path.name for path in paths] == ["compare.json", "compare.md"]


def test_sweep_runs_judges_every_setting(runs: Path) -> None:
    grid = api.SweepGrid(steps=[1, 2], temperatures=[1.0])
    result = api.sweep_runs(["runs/tree"], "runs/left", grid, api.SweepSampling(2))
    assert isinstance(result, api.SweepResult)
    assert len(result.columns()[1]) >= 2


def test_report_runs_writes_a_page(runs: Path) -> None:
    assert api.report_runs(["runs/tree"], "page.html", draws=0) == [Path("page.html")]
    assert "Report of" in Path("page.html").read_text()


def test_export_run_writes_all_weights(runs: Path) -> None:
    api.export_run("runs/tree", "weights.safetensors")
    assert Path("weights.safetensors").stat().st_size > 0


def test_records_are_read_without_torch(runs: Path) -> None:
    script = (
        "import sys, ddiff; ddiff.read_evaluation('runs/tree');"
        "print('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_missing_record_is_named_with_the_command_that_writes_it(runs: Path) -> None:
    with pytest.raises(CheckpointError, match="ddiff eval runs/left --generate"):
        api.read_generation("runs/left")
    with pytest.raises(CheckpointError, match="`ddiff eval runs/none`"):
        api.read_evaluation("runs/none")


def test_every_name_of_the_page_is_public() -> None:
    section = PAGE.read_text().partition("## In Python")[2]
    names = set(re.findall(r"\bddiff\.(\w+)", section))
    assert {"evaluate_run", "compare", "sweep_runs", "report_runs"} <= names
    assert sorted(name for name in names if not hasattr(api, name)) == []
