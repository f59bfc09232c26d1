"""The table in the README of ddiff_hdlm equals the output of benchmarks/xi_bounds.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import xi_bounds as command

from ddiff.testing.bound import WHOLE, exact_nelbo

README = (Path(__file__).parents[2] / "plugins" / "ddiff_hdlm" / "README.md").read_text(
    encoding="utf-8"
)
ROUNDED = 5.1e-5 + command.TOLERANCE  # four decimals


class Cell(NamedTuple):
    gamma: float
    xi: float
    prediction: str
    exact: str
    published: str


def cells() -> Iterator[Cell]:
    head, _, *lines = README.partition(command.BEGIN)[2].partition(command.END)[0].splitlines()
    names = head.strip("| ").split(" | ")[2:]
    for line in lines:
        gamma, xi, *values = line.strip("| ").split(" | ")
        for name, value in zip(names, values):
            yield Cell(float(gamma), float(xi), name, *value.split(" / "))


def number(written: str) -> float:
    return float(written.strip("*"))


def test_hdlm_readme_table_equals_the_output_of_xi_bounds() -> None:
    written = README.partition(command.BEGIN)[2].partition(command.END)[0]
    for gamma, xi in ((0.5, 0.8), (2.0, 0.95)):
        (*_, line) = command.table(command.rows((gamma,), (xi,))).splitlines()
        assert line in written.splitlines()
    assert len(written.splitlines()) == 2 + len(command.GAMMAS) * len(command.XIS)


def test_hdlm_readme_table_has_every_prediction_and_setting() -> None:
    dists = ("exact", "bent", "constant", "flattering")
    expected = {
        (gamma, xi, dist) for gamma in command.GAMMAS for xi in command.XIS for dist in dists
    }
    assert {cell[:3] for cell in cells()} == expected


def test_hdlm_readme_bounds_are_at_least_the_entropy() -> None:
    for cell in cells():
        assert number(cell.exact) >= command.entropy() - ROUNDED
        assert "*" not in cell.exact
        if cell.prediction == "exact":
            assert number(cell.exact) == pytest.approx(command.entropy(), abs=ROUNDED)
        if cell.prediction == "constant":
            assert number(cell.exact) == pytest.approx(command.unigram_nelbo(), abs=ROUNDED)


def test_hdlm_readme_compares_the_loss_of_the_paper_code_with_the_bound() -> None:
    for cell in cells():
        exact, published = number(cell.exact), number(cell.published)
        assert ("*" in cell.published) == (published < command.entropy() - ROUNDED)
        if cell.xi == 1.0 or cell.prediction == "constant":
            assert published == pytest.approx(exact, abs=2 * ROUNDED)
        elif cell.prediction == "flattering":
            assert published < command.entropy() - 0.01 < exact
        else:
            assert published > exact + 0.001


def test_hdlm_readme_quotes_the_entropies_printed_by_script_xi_bounds() -> None:
    assert re.findall(r"entropy of (\d\.\d{4}) nats", README) == [f"{command.entropy():.4f}"]
    assert re.findall(r"cross-entropy is (\d\.\d{4}) ", README) == [
        f"{command.unigram_nelbo():.4f}"
    ]


def test_prediction_named_flattering_minimizes_the_loss_of_hdlm_code() -> None:
    """Any change of the prediction `flattering` at any state increases the loss in HDLM's code."""
    published = command.process_of(command.Published, 1.0, 0.8)
    best = command.predictions_of(command.process_of(command.TreeProcess, 1.0, 0.8))["flattering"]

    def nats(tilt: torch.Tensor) -> float:
        dist: Any = lambda zt, t: (best(zt, t) + tilt[zt]).log_softmax(-1)  # noqa: E731
        return command.mean(exact_nelbo(published, dist, 2, WHOLE).total)

    states, words = command.TREE.num_states, command.TREE.num_tokens
    least = nats(torch.zeros(states, words, dtype=torch.float64))
    for seed in range(3):
        tilt = torch.randn(
            states, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        assert nats(0.05 * tilt) > least + 1e-4


def test_script_xi_bounds_changes_only_the_table_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}old\n{command.END}after\n")
    monkeypatch.setattr(command, "rows", lambda: [command.Row(1.0, 0.9, "exact", 2.5, 2.0)])
    monkeypatch.setattr(sys, "argv", ["xi_bounds.py", "--out", str(page)])
    command.main()
    made = "| gamma | xi | exact |\n|---|---|---|\n| 1 | 0.9 | 2.5000 / **2.0000** |\n"
    assert page.read_text() == f"before\n{command.BEGIN}{made}{command.END}after\n"
