"""A run fills gaps in sentences of its validation documents ([sample] gaps)."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, is_refusal
from exact import exact_network, row_nats
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from small import AUTOREGRESSIVE, FLAT, SENTENCES, make_autoregressive_recipe, working_in

import ddiff as api
from ddiff.data.gaps import Gap
from ddiff.runs.conditioning import SamplingPlan
from ddiff.runs.gap_table import print_gaps
from ddiff.runs.gaps import FilledGaps, choose_validation_gaps, fill_gaps, make_template
from ddiff.runs.prompts import encode_infill
from ddiff.runs.report.gaps import BLANK
from ddiff.runs.report.page import write_report
from ddiff.runs.run import Run

SETTINGS = [*FLAT, "data.length=32", "train.steps=3", "tokenizer.size=300"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the run `flat`, which has filled gaps."""
    folder = tmp_path_factory.mktemp("gaps")
    with working_in(folder):
        Path("corpus.txt").write_text(SENTENCES)
        Path("ar.toml").write_text(make_autoregressive_recipe())
        api.run("small.toml", settings=[*SETTINGS, 'name="flat"', "sample.gaps=4"])
        yield folder


def read_lines(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{run}/gaps.jsonl").read_text().splitlines()]


def test_tokens_around_each_gap_are_those_of_the_held_out_sentence(place: Path) -> None:
    run = api.load("runs/flat")
    gaps = choose_validation_gaps(run)
    lines = read_lines("flat")
    assert len(lines) == len(gaps) == 4
    texts = run.data.validation_texts
    assert texts is not None
    held_out = list(texts)
    for line, gap in zip(lines, gaps):
        start, stop = line["start"], line["stop"]
        assert line["ids"][:start] == list(gap.ids[:start])
        assert line["ids"][stop:] == list(gap.ids[stop:])
        assert line["before"] + line["original"] + line["after"] == gap.sentence
        assert held_out[line["document"]][line["position"] :].startswith(gap.sentence)
        assert line["name"].startswith("corpus.txt line")
        assert line["model"] == run.tokenizer.decode([line["ids"][start:stop]])[0]
        assert line["step"] == 3
        assert line["nfe"] >= 1


def test_infill_text_of_a_gap_has_the_same_tokens_in_the_command(place: Path) -> None:
    run = api.load("runs/flat")
    for gap in choose_validation_gaps(run):
        ours = make_template(gap)
        theirs = encode_infill(gap.infill, run.tokenizer, run.recipe.length)
        assert ours.given.tolist() == theirs.given.tolist()
        assert ours.ids[ours.given].tolist() == theirs.ids[theirs.given].tolist()


def test_filled_gaps_do_not_depend_on_the_batch_size(place: Path) -> None:
    run = api.load("runs/flat", settings=["sample.batch=3"])
    assert fill_gaps(run, choose_validation_gaps(run)) == read_lines("flat")


def test_repeated_run_reads_the_file_and_a_longer_run_fills_the_gaps_again(
    place: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["run", "small.toml"]
    for setting in [*SETTINGS, 'name="again"', "sample.gaps=3", 'train.schedule="constant"']:
        arguments += ["--set", setting]
    assert ddiff(*arguments).code == 0
    before = read_lines("again")
    with monkeypatch.context() as patch:
        patch.setattr("ddiff.runs.gaps.fill_gaps", None)  # an error if gaps were filled
        found = ddiff(*arguments)
    assert found.code == 0
    assert "3 gaps in sentences of held-out text" in found.out
    assert ddiff(*arguments, "--set", "train.steps=5").code == 0
    after = read_lines("again")
    assert [line["infill"] for line in after] == [line["infill"] for line in before]
    assert {line["step"] for line in after} == {5}


def test_words_at_temperature_zero_do_not_depend_on_the_seed(place: Path) -> None:
    gaps = choose_validation_gaps(api.load("runs/flat"))
    found = []
    for temperature, seed in itertools.product((0.0, 1.0), (1, 2)):
        # one step, because the order of several steps depends on the seed
        settings = [f"gap_temperature={temperature}", f"seed={seed}", "steps=1"]
        run = api.load("runs/flat", settings=[f"sample.{setting}" for setting in settings])
        lines = fill_gaps(run, gaps)
        assert all(line["temperature"] == temperature for line in lines)
        found.append([line["ids"] for line in lines])
    cold, cold_again, warm, warm_again = found
    assert cold == cold_again
    assert warm != warm_again


def test_summary_in_a_pipe_has_plain_lines_with_gaps_before_samples(
    place: Path, ddiff: Command
) -> None:
    arguments = [*SETTINGS, 'name="flat"', "sample.gaps=4"]
    found = ddiff("run", "small.toml", *(f"--set={setting}" for setting in arguments))
    assert found.code == 0
    assert "\x1b" not in found.out + found.err
    lines = found.out.splitlines()
    (title,) = [number for number, line in enumerate(lines) if "4 gaps in sentences" in line]
    header, *rows = lines[title + 1 : title + 6]
    assert header.split() == ["before", "model", "original"]
    place_of_original = header.index("original")
    for row, line in zip(rows, read_lines("flat")):
        assert row.startswith(f"{line['before']} {BLANK}{line['after']} ")
        assert row[place_of_original:] == line["original"].strip()
    (samples,) = [number for number, line in enumerate(lines) if "2 samples" in line]
    assert samples > title
    pattern = "for each; entropy "
    assert pattern in lines[samples]
    assert lines[samples].endswith("% of their words occur in held-out text:")
    assert "gaps.jsonl" in found.out


def test_report_has_the_gaps_of_every_run_in_one_table(place: Path, tmp_path: Path) -> None:
    other = ["train.steps=4", 'name="other"', "sample.gaps=2"]
    api.run("small.toml", settings=[*SETTINGS, *other])
    path = tmp_path / "report.html"
    write_report(["runs/flat", "runs/other"], path)
    page = path.read_text()
    (table,) = re.findall(r'<section id="gaps".*?</section>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    assert len(rows) == 1 + 4  # the two gaps of the second run are among the four of the first
    for row, line in zip(rows[1:], read_lines("flat")):
        assert f"{line['before']} {BLANK}{line['after']}" in unescape(row)
        assert row.endswith(f"<td>{line['original'].strip()}</td>")
    assert rows[1].count("–") == rows[2].count("–") == 0
    assert rows[3].count("–") == rows[4].count("–") == 1


# ---------------------------------------------------------------------- runs without gaps


def test_autoregressive_run_says_in_one_line_why_it_fills_no_gaps(
    place: Path, ddiff: Command
) -> None:
    settings = [*AUTOREGRESSIVE, *SETTINGS[3:], 'name="ar"']
    found = ddiff("run", "ar.toml", *(f"--set={setting}" for setting in settings))
    assert found.code == 0, found.err
    (line,) = [line for line in found.out.splitlines() if "gaps" in line]
    assert "network works from left to right" in line
    assert not Path("runs/ar/gaps.jsonl").exists()


def test_run_whose_documents_have_no_sentences_says_so(place: Path, ddiff: Command) -> None:
    Path("words.txt").write_text(SENTENCES.replace(".", ""))
    settings = [*SETTINGS, 'name="words"', 'data.files=["words.txt"]']
    found = ddiff("run", "small.toml", *(f"--set={setting}" for setting in settings))
    assert found.code == 0, found.err
    assert "no plain sentence of 12 to 30 tokens" in found.out
    assert not Path("runs/words/gaps.jsonl").exists()


def test_zero_gaps_print_and_write_nothing(place: Path, ddiff: Command) -> None:
    settings = [*SETTINGS, 'name="none"', "sample.gaps=0"]
    found = ddiff("run", "small.toml", *(f"--set={setting}" for setting in settings))
    assert found.code == 0, found.err
    assert "gaps" not in found.out
    assert not Path("runs/none/gaps.jsonl").exists()


@pytest.mark.parametrize("value", ["-1", "2.5", "true", '"many"'])
def test_wrong_number_of_gaps_is_refused_before_a_file_is_written(
    place: Path, ddiff: Command, value: str
) -> None:
    found = ddiff("run", "small.toml", "--set", 'name="wrong"', "--set", f"sample.gaps={value}")
    assert is_refusal(found, "gaps")
    assert not Path("runs/wrong").exists()


# ---------------------------------------------------------------------- the table

LINES = [
    {
        "before": "She had been forced into prudence in her youth, and",
        "model": " learned [bold]romance",
        "original": " learned romance\nas",
        "after": ", as she grew older.",
        "temperature": None,
    },
    {
        "before": "I",
        "model": " am\x1b[2J half",
        "original": " am half",
        "after": " agony.",
        "temperature": None,
    },
    {
        "before": "You",
        "model": " pierce",
        "original": " pierce",
        "after": " my soul, 漢字.",
        "temperature": None,
    },
]


def print_lines(console: Console) -> list[str]:
    """Return the lines of the table, the titles of the columns first."""
    print_gaps(FilledGaps(LINES, "Austen"), console)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in written
    lines = Text.from_ansi(written).plain.rstrip("\n").split("\n")
    (first,) = [number for number, line in enumerate(lines) if line.startswith("before")]
    return lines[first:]


def cut_cells(line: str, starts: list[int]) -> list[str]:
    """Return the parts of a line between columns of the screen."""
    cells = []
    rest = line
    for width in [stop - start for start, stop in pairwise(starts)]:
        cell = set_cell_size(rest, width) if cell_len(rest) > width else rest
        cells.append(cell)
        rest = rest[len(cell) :]
    return [*cells, rest]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_columns_of_the_table_align_on_a_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    header, *rows = print_lines(console)
    starts = [header.index(title) for title in ("before", "model", "Austen")]
    assert starts[0] == 0
    text = ["", "", ""]
    for row in rows:
        assert cell_len(row) <= width
        cells = cut_cells(row, starts)
        for column, cell in enumerate(cells):
            text[column] += cell
        for cell, following in pairwise(cells):
            assert not following or cell.endswith("  ")  # two spaces between columns
    words = "".join(text[0].split())
    assert words.startswith("Shehadbeenforcedintoprudenceinheryouth,and____,asshegrewolder.")
    assert "".join(text[1].split()) == "learned[bold]romanceam·[2Jhalfpierce"
    assert "".join(text[2].split()) == "learnedromanceasamhalfpierce"


def test_table_in_a_pipe_has_one_line_for_each_gap() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    header, *rows = print_lines(console)
    assert len(rows) == len(LINES)
    place = header.index("Austen")
    assert rows[0][place:] == "learned romance as"
    assert rows[1][place:] == "am half"
    # two wide characters
    assert rows[2][place - 2 :] == "pierce"


def test_gap_that_the_model_filled_with_the_original_words_is_counted() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    print_gaps(FilledGaps(LINES, "Austen"), console)
    title = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 gaps in sentences of held-out text, filled; 1 with the original words:" in title


# ---------------------------------------------------------------------- distribution

MARKOV = """
name = "chain"
plugins = ["mdlm", "dit"]
data = { kind = "markov", alphabet = 4, rows = 64, validation = 16, length = 6 }
tokenizer = { kind = "alphabet" }
vocabulary = { kind = "flat" }
process = { kind = "mdlm" }
denoiser = { kind = "dit", width = 8, layers = 1, heads = 1 }
train = { steps = 1, batch = 4 }
sample = { sampler = "first_hitting", batch = 4096, gap_temperature = 1.0 }
"""
FILLS = 16384


def test_fills_of_an_exact_network_have_the_conditional_distribution(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("chain.toml").write_text(MARKOV)
    run: Run = api.run("chain.toml")
    assert not Path("runs/chain/gaps.jsonl").exists()  # rows of symbols have no sentences
    source = api.MarkovSource(4, seed=run.recipe.seed)
    process = run.process
    assert process is not None
    network = exact_network(process, source)
    monkeypatch.setattr(SamplingPlan, "network", lambda self, samples, valid: network)
    row = [0, 2, 1, 0, 1, 2]
    gap = Gap(0, 0, "ac", "ba", "bc", row, 2, 4)
    found = [line["ids"] for line in fill_gaps(run, [gap] * FILLS)]
    assert all(ids[:2] == row[:2] and ids[4:] == row[4:] for ids in found)
    pairs = [[first, second] for first in range(4) for second in range(4)]
    rows = torch.tensor([[*row[:2], *pair, *row[4:]] for pair in pairs])
    expected = (-row_nats(source, rows)).softmax(-1)
    counts = torch.tensor([sum(ids[2:4] == pair for ids in found) for pair in pairs])
    # chi-squared with 15 degrees of freedom exceeds 37.7 with probability 0.001
    statistic = ((counts - FILLS * expected) ** 2 / (FILLS * expected)).sum()
    assert float(statistic) < 37.7
