"""`ddiff report`, and the options --trajectory and --watch of `ddiff sample`."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, find_missing, open_browser
from commands import Command
from PIL import Image, ImageColor
from small import AUTOREGRESSIVE, FLAT, make_autoregressive_recipe, working_in
from small_fields import DIGITS

import ddiff as api
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError, CheckpointError, DataError
from ddiff.recipe.resolve import read_recipe
from ddiff.runs.confusion import measure_confusion
from ddiff.runs.report import bands
from ddiff.runs.report.bands import HealthyBand, Range, select_keys
from ddiff.runs.report.charts import (
    LIGHT,
    Axis,
    Band,
    Bar,
    BarChart,
    Chart,
    Line,
    draw_file,
    smooth,
)
from ddiff.runs.report.clusters import TokenTree, read_tree_of
from ddiff.runs.report.confusions import LevelConfusion
from ddiff.runs.report.curves import make_charts
from ddiff.runs.report.extras import Extras
from ddiff.runs.report.markup import element, json_script
from ddiff.runs.report.page import make_page, write_report
from ddiff.runs.report.raster import draw_png
from ddiff.runs.report.run_files import read_runs
from ddiff.runs.report.training_samples import choose_evenly
from ddiff.runs.report.trajectories import Trajectory, read_trajectories, to_json

VOID = {"meta", "link", "img", "input"}
LOADING = {"src", "href", "data", "action", "poster", "srcset"}
WIDTHS = (390, 1400)  # pixels of a phone and of a wide window
HOSTILE = '</script><img src=x onerror="alert(1)"> & <b>'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with three trained runs: `tree` with clusters, `flat`, and `digits` of two fields."""
    folder = tmp_path_factory.mktemp("reports")
    torch.set_num_threads(1)
    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        every = "evaluate.every=5"
        drawn = "sample.every=6"
        api.run("small.toml", settings=['name="tree"', "train.steps=12", every, drawn])
        api.run("small.toml", settings=[*FLAT, 'name="flat"', "train.steps=12", every])
        Path("digits.toml").write_text(DIGITS)
        api.run("digits.toml")
        yield folder / "runs"


class Page(HTMLParser):
    """Elements of a page. Raises AssertionError for an end tag without its start tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def make_trajectory(states: list[list[int]], **changes: Any) -> Trajectory:
    """Trajectory over four tokens, two nodes (4, 5) and the mask (6)."""
    tree = TokenTree([np.array([0, 0, 1, 1]), np.array([0, 0])], ["a", "b", "c", "d"], {})
    origin: dict[str, Any] = {"run": "toy", "sampler": "by hand", "seed": 0, "index": 0}
    times = np.linspace(1, 0, len(states)).tolist()[1:]
    return Trajectory.of(states, times, tree, **{**origin, **changes})


def replay(trajectory: Trajectory) -> list[list[int]]:
    """Return the states before the first step and after every step."""
    states = [list(trajectory.start)]
    for changes in trajectory.changes:
        row = list(states[-1])
        for position, state in changes:
            row[position] = state
        states.append(row)
    return states


# ---------------------------------------------------------------------- page


def test_report_names_all_runs_and_has_every_section(place: Path, ddiff: Command) -> None:
    runs = [str(place / name) for name in ("tree", "flat", "digits")]
    out = place.parent / "report.html"
    assert ddiff("report", *runs, "--out", str(out), "--draws", "1").code == 0
    text = out.read_text()
    page = Page(text)
    assert {"tree", "flat", "digits"} <= set(page.texts)
    names = {value for tag, name, value in page.attributes if (tag, name) == ("section", "id")}
    assert names == {
        "summary",
        "curves",
        "evaluation",
        "trajectories",
        "samples",
        "training-samples",
        "pictures",
        "confusions",
        "clusters",
        "formulas",
        "environment",
        "recipes",
    }
    bounds = [
        json.loads((place / name / "evaluation.json").read_text()) for name in ("tree", "flat")
    ]
    for found in bounds:
        assert f"{found['nelbo_nats_per_token']:.4f}" in text


def test_report_loads_nothing_from_a_network(place: Path) -> None:
    page = Page(make_page(*_read_all(place)))
    for _, name, value in page.attributes:
        if name in LOADING:
            assert value.startswith(("#", "data:")), value
    text = make_page(*_read_all(place))
    assert "default-src &#x27;none&#x27;" in text
    assert re.search(r"url\(|@import", text) is None
    # the only address is the name of the SVG language
    assert set(re.findall(r"https?://[^\s\"'<>&;]+", text)) == {"http://www.w3.org/2000/svg"}


def _read_all(place: Path) -> tuple[Any, Any]:
    runs = read_runs([place / name for name in ("tree", "flat", "digits")])
    return runs, make_charts(runs)


def test_reports_of_equal_runs_are_equal_bytes(place: Path, ddiff: Command) -> None:
    contents = []
    for name in ("one.html", "two.html"):
        out = place.parent / name
        assert ddiff("report", str(place / "tree"), "--out", str(out)).code == 0
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert b'"trajectory-data"' in contents[0]


def test_report_escapes_texts_of_samples_recipes_and_trajectories(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "hostile"
    shutil.copytree(place / "tree", run)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    lines[0]["text"] = HOSTILE
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace('name = "tree"', f"name = '{HOSTILE}'"))
    trajectory = make_trajectory([[6, 6], [0, 1]], run=HOSTILE)
    path = tmp_path / "hostile.html"
    write_report([run], path, Extras([trajectory]))
    text = path.read_text()
    page = Page(text)
    assert not any(name == "onerror" for _, name, _ in page.attributes)
    assert HOSTILE not in text
    assert HOSTILE in "".join(page.texts)
    data = re.search(r'id="trajectory-data">(.*?)</script>', text)
    assert data is not None
    assert json.loads(data[1])[0]["run"] == HOSTILE


def test_report_embeds_the_pictures_of_a_run_of_fields(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "fields.html"
    write_report([place / "digits"], path)
    text = path.read_text()
    pictures = sorted((place / "digits").glob("samples-*.png"))
    assert len(pictures) == 2
    for picture in pictures:
        assert base64.b64encode(picture.read_bytes()).decode() in text
    targets = json.loads((place / "digits/evaluation.json").read_text())["targets"]
    for target, found in targets.items():
        assert f"{target}, nats per sample" in text
        assert f"{found['nats_per_sample']:.4f}" in text


def test_report_says_which_settings_make_bounds_incomparable(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(place / "flat", other)
    found = json.loads((other / "evaluation.json").read_text())
    found["protocol"]["draws"] = 7
    (other / "evaluation.json").write_text(json.dumps(found))
    texts = []
    for run in (place / "flat", other):
        write_report([place / "tree", run], tmp_path / "both.html")
        texts.append((tmp_path / "both.html").read_text())
    assert "not comparable" not in texts[0]
    assert "has the lowest bound" in texts[0]
    assert "different settings (draws)" in texts[1]
    assert "has the lowest bound" not in texts[1]


def test_report_does_not_compare_the_number_of_draws_of_until(place: Path, tmp_path: Path) -> None:
    runs = []
    for name, draws in (("tree", 4), ("flat", 9)):
        run = tmp_path / name
        shutil.copytree(place / name, run)
        found = json.loads((run / "evaluation.json").read_text())
        found["protocol"] |= {"until": 0.01, "draws": draws}
        (run / "evaluation.json").write_text(json.dumps(found))
        runs.append(run)
    write_report(runs, tmp_path / "until.html")
    text = (tmp_path / "until.html").read_text()
    assert "not comparable" not in text
    assert "has the lowest bound" in text


def test_report_of_files_only_does_not_import_torch(place: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from ddiff.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    arguments = ["report", str(place / "tree"), "--draws", "0", "--out", str(tmp_path / "r.html")]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_report_of_an_unfinished_run_has_no_missing_sections(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    for name in ("recipe.toml", "environment.json", "metrics.jsonl"):
        shutil.copy(place / "flat" / name, run)
    write_report([run], tmp_path / "begun.html")
    text = (tmp_path / "begun.html").read_text()
    assert "not evaluated yet" in text
    assert "Training loss" in text
    assert 'id="samples"' not in text


def test_report_shows_perplexity_only_together_with_entropy(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    run = tmp_path / "judged"
    shutil.copytree(place / "flat", run)
    assert ddiff("eval", str(run), "--generate", "--count", "4").code == 0
    found = json.loads((run / "generation.json").read_text())
    own = {"corpus": 12.25, "entropy_nats": {"value": 1.375, "interval": None}}
    held_out = {"corpus": 9.5, "entropy_nats": {"value": 1.625, "interval": None}}
    protocol = {"judge": "a judge", "window": 8, "stride": 8, "dtype": "float32"}
    found["judge"] = {"protocol": protocol, "samples": own, "held_out": held_out, "mauve": None}
    (run / "generation.json").write_text(json.dumps(found))
    write_report([run, place / "tree"], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "12.25 at entropy 1.375" in page.texts
    assert "9.5 at entropy 1.625" in page.texts
    assert "held-out text" in page.texts
    assert f"{found['samples']['entropy_nats']['value']:.4f}" in page.texts
    assert any(text.endswith("judge a judge.") for text in page.texts)


def test_report_keeps_figures_of_other_protocols_in_separate_rows(
    place: Path, tmp_path: Path
) -> None:
    runs = []
    figure = {"value": 3.25, "interval": [3.0, 3.5], "unit": "nats/token", "protocol": "ptb"}
    for name, protocol in (("one", "ptb"), ("two", "published ptb")):
        run = tmp_path / name
        shutil.copytree(place / "flat", run)
        record = {"figures": {"nelbo": {**figure, "protocol": protocol}}, "protocol": {"draws": 4}}
        (run / "evaluation-ptb.json").write_text(json.dumps(record))
        runs.append(run)
    harness = {"value": 0.5, "interval": None, "unit": "share", "protocol": "lm-eval 1, exact"}
    content = json.dumps({"figures": {"quiz: acc": harness}})
    (runs[0] / "lm-eval-quiz.json").write_text(content)
    write_report(runs, tmp_path / "r.html")
    texts = Page((tmp_path / "r.html").read_text()).texts
    first = texts.index("ptb, nats/token, 4 draws")
    second = texts.index("published ptb, nats/token, 4 draws")
    for place_of_row, values in ((first, ["3.2500", "3.0000 to 3.5000", "–"]), (second, ["–"])):
        assert texts[place_of_row + 1 : place_of_row + 1 + len(values)] == values
    assert texts[texts.index("lm-eval-quiz: quiz: acc") + 2] == "0.5000"


def test_report_shows_which_clusters_are_confused(place: Path, tmp_path: Path) -> None:
    sizes = read_tree_of(place / "tree")
    assert sizes is not None
    first, second, third = (sizes.offsets[1] + number for number in range(3))
    found = LevelConfusion(1, [(first, first, 6), (first, second, 3), (third, second, 1)])
    write_report([place / "tree"], tmp_path / "r.html", Extras(confusions={0: [found]}))
    texts = " ".join(Page((tmp_path / "r.html").read_text()).texts)
    texts = texts.replace("\N{NO-BREAK SPACE}", " ")
    # the number is bold, so it is a separate text
    assert "The most likely cluster is right at  60.0 %  of 10 positions." in texts
    assert "The most frequent cluster is right at 90.0 %." in texts
    assert "predicted right at 67 % of 9 masks" in texts
    assert found.mistakes_of(first) == [(first, second, 3)]


def test_typical_mistakes_exceed_the_frequency_of_their_prediction() -> None:
    # 0 is predicted for everything; 2 is predicted for 1 only
    found = LevelConfusion(0, [(0, 0, 9), (1, 0, 4), (1, 2, 4), (2, 0, 6), (3, 0, 2)])
    # of 16 mistakes, 12 predict 0: by chance (1, 2) has 8 * 4 / 16 = 2 and (2, 0) 6 * 12 / 16 = 4.5
    assert found.typical_mistakes() == [(1, 2, 4), (2, 0, 6), (3, 0, 2)]


def test_report_computes_the_confusions_of_a_trained_run(place: Path) -> None:
    run = api.load(place / "tree")
    levels = measure_confusion(run)
    assert [level.level for level in levels] == [0, 1]
    assert sum(level.positions for level in levels) > 10
    assert levels == measure_confusion(run)
    vocabulary = run.vocabulary
    for level in levels:
        nodes = torch.tensor([pair[:2] for pair in level.pairs])
        assert set(vocabulary.level_of(nodes).flatten().tolist()) == {level.level}


def test_report_shows_the_formulas_of_the_process(place: Path, ddiff: Command) -> None:
    out = place.parent / "formulas.html"
    assert ddiff("report", str(place / "flat"), "--out", str(out), "--draws", "1").code == 0
    text = out.read_text()
    assert "process: mdlm" in text
    assert "q<sub>t</sub>(.|x) = α<sub>t</sub> δ<sub>x</sub>" in text


def test_report_shows_the_samples_during_training(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    write_report([place / "tree", place / "flat"], path)
    page = Page(path.read_text())
    lines = (place / "tree/training_samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found] == [6, 12]
    for line in found:
        assert f"step {line['step']}" in page.texts
        assert line["texts"]["text"] in "".join(page.texts)


def test_samples_during_training_are_chosen_evenly() -> None:
    samples = [{"step": step} for step in range(1, 101)]
    chosen = [sample["step"] for sample in choose_evenly(samples, 12)]
    assert chosen == [1, 10, 19, 28, 37, 46, 55, 64, 73, 82, 91, 100]
    assert choose_evenly(samples[:3], 12) == samples[:3]


# ---------------------------------------------------------------------- mistakes


def test_report_refuses_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_report_refuses_a_run_given_twice(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="given twice"):
        write_report([place / "tree", place / "flat/../tree"], tmp_path / "r.html")


def test_report_does_not_overwrite_a_foreign_file(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.html"
    path.write_text("<p>mine</p>")
    with pytest.raises(ArgumentError, match="did not write"):
        write_report([place / "tree"], path)
    assert path.read_text() == "<p>mine</p>"


def test_report_overwrites_its_own_files(place: Path, tmp_path: Path) -> None:
    for _ in range(2):
        write_report([place / "tree"], tmp_path / "r.html", figures=tmp_path / "figures")


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": "other"}', '{"format": "ddiff trajectories 1", "trajectories": [{}]}'],
)
def test_report_refuses_a_damaged_file_of_trajectories(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(DataError, match="not a file of trajectories"):
        read_trajectories(path)


def test_trajectory_file_with_a_state_without_a_name_is_refused(tmp_path: Path) -> None:
    text = to_json([make_trajectory([[6, 6], [0, 1]])])
    path = tmp_path / "t.json"
    path.write_text(text.replace("[1, 1]", "[1, 3]"))
    with pytest.raises(DataError, match="the state 3 has no name"):
        read_trajectories(path)


# ---------------------------------------------------------------------- trajectories


def test_trajectory_file_ends_with_the_printed_samples(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    path = tmp_path / "t.json"
    found = ddiff("sample", str(place / "tree"), "--count", "3", "--trajectory", str(path))
    samples = [json.loads(line) for line in found.out.splitlines()]
    trajectories = read_trajectories(path)
    mask = Vocabulary.load(str(place / "tree/vocabulary.safetensors")).mask_id
    assert len(trajectories) == 3
    for sample, trajectory in zip(samples, trajectories):
        states = replay(trajectory)
        assert set(states[0]) == {mask}
        assert states[-1] == sample["ids"]
        assert len(trajectory.times) == len(trajectory.changes)
        # the states between the masks and the tokens are nodes of the tree
        levels = [bisect_level(trajectory, state) for row in states for state in row]
        assert set(levels) == {0, 1, 2}


def bisect_level(trajectory: Trajectory, state: int) -> int:
    ends = np.cumsum(trajectory.level_sizes)
    return int(np.searchsorted(ends, state, side="right"))


def test_trajectory_marks_the_tokens_of_a_prompt_as_given(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    path = tmp_path / "t.json"
    arguments = ["--prompt", "the", "--trajectory", str(path), "--count", "1"]
    assert ddiff("sample", str(place / "flat"), *arguments).code == 0
    (trajectory,) = read_trajectories(path)
    assert len(trajectory.given) >= 1
    changed = {position for step in trajectory.changes for position, _ in step}
    assert changed.isdisjoint(trajectory.given)
    assert len(changed) + len(trajectory.given) == len(trajectory.start)


def test_trajectory_survives_its_file(tmp_path: Path) -> None:
    trajectory = make_trajectory([[6, 6], [4, 6], [0, 5], [0, 3]], given=[])
    path = tmp_path / "t.json"
    path.write_text(to_json([trajectory]))
    assert read_trajectories(path) == [trajectory]
    assert replay(trajectory) == [[6, 6], [4, 6], [0, 5], [0, 3]]


def test_watch_prints_the_states_on_stderr_and_only_samples_on_stdout(
    place: Path, ddiff: Command
) -> None:
    found = ddiff("sample", str(place / "tree"), "--count", "1", "--watch")
    (sample,) = [json.loads(line) for line in found.out.splitlines()]
    assert "step 4, mean time 0.000" in found.err
    words = sample["text"].replace("\n", "⏎").split()
    assert words[0] in found.err


def test_trajectory_of_an_autoregressive_run_draws_masks_from_left_to_right(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    path = tmp_path / "t.json"
    with working_in(tmp_path):
        Path("ar.toml").write_text(make_autoregressive_recipe())
        api.run("ar.toml", settings=[*AUTOREGRESSIVE, 'name="ar"', "train.steps=2"])
        found = ddiff("sample", "runs/ar", "--count", "1", "--trajectory", str(path))
    # the lines before the sample are the summary of the training
    sample = json.loads(found.out.splitlines()[-1])
    states = replay(read_trajectories(path)[0])
    length = len(states[0])
    mask = states[0][0]
    for step, row in enumerate(states):
        assert row == sample["ids"][:step] + [mask] * (length - step)


# ---------------------------------------------------------------------- tree of tokens


def test_token_tree_agrees_with_the_vocabulary(place: Path) -> None:
    vocabulary = Vocabulary.load(str(place / "tree/vocabulary.safetensors"))
    tree = read_tree_of(place / "tree")
    assert tree is not None
    assert tree.has_clusters
    assert tree.level_sizes == vocabulary.level_sizes
    states = torch.arange(vocabulary.num_states)
    assert [tree.level_of(state) for state in states.tolist()] == vocabulary.level_of(
        states
    ).tolist()
    parents = vocabulary.parent(states).tolist()
    for state in states.tolist()[:-1]:
        assert tree.parent_of(state) == parents[state]
    assert tree.parent_of(vocabulary.root) is None
    assert sorted(tree.tokens_below(vocabulary.root)) == list(range(vocabulary.num_tokens))


def test_typical_words_of_a_node_are_frequent_words_of_several_letters() -> None:
    parents = [np.zeros(4, int), np.zeros(1, int)]
    tree = TokenTree(parents, ["a", "the", "cat", "hat"], {0: 9, 3: 2})
    assert tree.name_state(4) == "hat · the · cat"
    assert tree.name_state(5) == "mask"


# ---------------------------------------------------------------------- charts


def test_chart_files_are_svg_with_the_names_of_the_runs(place: Path, tmp_path: Path) -> None:
    written = write_report(
        [place / "tree", place / "flat"], tmp_path / "r.html", figures=tmp_path / "figures"
    )
    charts = [path for path in written[1:] if path.suffix == ".svg"]
    assert len(charts) == len(written[1:]) // 2
    assert {"training-loss.svg", "validation-bound.svg", "bound-parts.svg"} <= {
        path.name for path in charts
    }
    for path in charts:
        root = xml.fromstring(path.read_text())
        assert root.tag.endswith("svg")
        assert {"tree", "flat"} <= {text.strip() for text in root.itertext()}


def test_chart_images_show_the_lines_bars_and_legend_in_the_colours_of_the_runs() -> None:
    band = Band([(0.0, 1.0, 1.5), (4.0, 1.0, 1.5)], 2)
    lines = [
        Line([(0.0, 2.0), (4.0, 2.0)], 1),
        Line([(0.0, 3.0), (4.0, 3.0)], 7, "dashed", "reference"),
    ]
    chart = Chart("c", "Title", "step", lines, bands=[band])
    image = Image.open(io.BytesIO(draw_png(draw_file(chart.draw(), [("run", 0)])))).convert("RGB")
    # 440 x 260 units with a margin of 6 units on each side, at 3 pixels per unit
    assert image.size == (452 * 3, 272 * 3)
    colors = {color for _, color in image.getcolors(2**20) or []}

    def is_drawn(name: str, opacity: float = 1.0) -> bool:
        full = np.array(ImageColor.getrgb(name)[:3])
        wanted = 255 + opacity * (full - 255)
        # the image has 128 colours, so each may be a little off
        return any(np.abs(wanted - color).max() <= 6 for color in colors)

    assert is_drawn(LIGHT[0])  # the legend
    assert is_drawn(LIGHT[1])  # the line
    assert is_drawn(LIGHT[2], opacity=0.18)
    assert is_drawn(LIGHT[7])
    assert not is_drawn(LIGHT[3])
    bars = BarChart("b", "Title", "nats", [("g", [Bar("b", 2.0, 3, (1.5, 2.5))])])
    drawn = Image.open(io.BytesIO(draw_png(draw_file(bars.draw(), [])))).convert("RGB")
    left, right = (drawn.getpixel((x * 3, (34 + 2 + 6) * 3)) for x in (110, 440))
    assert left == pytest.approx(ImageColor.getrgb(LIGHT[3]), abs=6)
    assert right == pytest.approx((255, 255, 255), abs=6)


def test_chart_file_has_its_note_below_the_chart() -> None:
    chart = Chart("c", "Title", "step", [Line([(0.0, 2.0), (4.0, 2.0)], 1)])
    plain = xml.fromstring(draw_file(chart.draw(), []))
    note = "A note of more than one line. " * 5
    noted = xml.fromstring(draw_file(chart.draw(), [], note))
    heights = [float(root.attrib["viewBox"].split()[3]) for root in (plain, noted)]
    assert heights[0] == 260
    assert heights[1] > 280
    texts = [text for text in noted.itertext() if "note" in text]
    assert " ".join(texts) == note.strip()
    places = [float(each.attrib["y"]) for each in noted if "note" in (each.text or "")]
    assert all(heights[0] < y < heights[1] for y in places)


def test_figures_do_not_overwrite_a_foreign_image(place: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "training-loss.png")
    with pytest.raises(ArgumentError, match="did not write"):
        write_report([place / "flat"], tmp_path / "r.html", figures=tmp_path)


def test_validation_chart_has_the_baselines_and_ends_at_the_final_bound(place: Path) -> None:
    _, charts = _read_all(place)
    (chart,) = [chart for chart in charts if chart.name == "validation-bound"]
    found = json.loads((place / "tree/evaluation.json").read_text())
    lines = {line.label: line.points for line in chart.lines}
    assert [step for step, _ in lines["tree"]] == [5, 10, 12]
    assert lines["tree"][-1][1] == found["nelbo_nats_per_token"]
    for name in ("unigram", "bigram"):
        assert lines[name][0][1] == found["baselines"][f"{name}_nats_per_token"]


def test_chart_of_the_bound_by_time_has_a_point_per_bin(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "bins"
    shutil.copytree(place / "flat", run)
    found = json.loads((run / "evaluation.json").read_text())
    found["time_bins"] = [
        {"start": 0.0, "stop": 0.5, "nats": 1.5, "share": 0.75},
        {"start": 0.5, "stop": 1.0, "nats": 0.5, "share": 0.25},
    ]
    (run / "evaluation.json").write_text(json.dumps(found))
    (chart,) = [chart for chart in make_charts(read_runs([run])) if chart.name == "bound-by-time"]
    assert isinstance(chart, Chart)
    assert chart.lines[0].points == [(0.25, 1.5), (0.75, 0.5)]


def test_band_needs_an_equal_recipe_and_allows_any_seed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "flat", run)
    (found,) = read_runs([run])
    band = HealthyBand(
        recipe="flat",
        keys=select_keys(found.record.recipe),
        seeds=[1, 2, 3],
        rule="range",
        train_loss=Range([1, 12], [2.0, 1.0], [3.0, 2.0]),
        validation=Range([12], [1.0], [2.0]),
        provenance={},
    )
    assert HealthyBand.parse(band.to_json()) == band
    monkeypatch.setattr(bands, "read_bands", lambda: (band,))
    recipe = (run / "recipe.toml").read_text()
    for old, new, is_drawn in (
        ("seed = 0", "seed = 7", True),
        ("count = ", "count = 1", True),  # of samples
        ("steps = 12", "steps = 13", False),
        ("layers = ", "layers = 1", False),
    ):
        assert old in recipe, old
        (run / "recipe.toml").write_text(recipe.replace(old, new, 1))
        charts = {chart.name: chart for chart in make_charts(read_runs([run]))}
        chart = charts["training-loss"]
        assert isinstance(chart, Chart)
        assert bool(chart.bands) == is_drawn, new
        assert ("healthy runs of flat; range, from 3 seeds" in chart.note) == is_drawn
        xml.fromstring(chart.draw())


def test_shipped_bands_are_those_of_shipped_recipes() -> None:
    for band in bands.read_bands():
        recipe = read_recipe(band.recipe).to_dict()
        assert select_keys(recipe) == band.keys, (
            f"{band.recipe} changed: make its band again with benchmarks/bands.py, or add a new "
            "key to the band by hand if the key changes no result."
        )
        assert len(band.seeds) >= 3
        for found in (band.train_loss, band.validation):
            assert all(low < high for low, high in zip(found.low, found.high, strict=True))


def test_charts_draw_constant_empty_and_infinite_values() -> None:
    for points in ([], [(1.0, 2.0)], [(1.0, 0.0), (2.0, float("inf"))]):
        for is_log in (False, True):
            drawn = Chart("c", "t", "x", [Line(points, 0)], is_log).draw()
            xml.fromstring(drawn)
            assert "nan" not in drawn
            assert "inf" not in drawn
    xml.fromstring(BarChart("c", "t", "nats", [("g", [Bar("b", 0.0, 0)])]).draw())


def test_axis_ticks_are_round_numbers_inside_the_axis() -> None:
    axis = Axis(0.13, 0.87, 0.0, 100.0)
    assert axis.ticks(5) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Axis(-1.0, 1.0, 0.0, 1.0).log_ticks() == pytest.approx(
        [-1.0, -0.69897, -0.30103, 0.0, 0.30103, 0.69897, 1.0], abs=1e-5
    )


def test_smoothing_keeps_lines_and_averages_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(20)]
    assert np.array(smooth(line, 5)) == pytest.approx(np.array(line))
    zigzag = [(float(x), float(x % 2)) for x in range(20)]
    assert all(0.3 < y < 0.7 for _, y in smooth(zigzag, 9)[4:-4])


def test_markup_escapes_content_and_attribute_values() -> None:
    assert element("p", "<b>", title='"&') == '<p title="&quot;&amp;">&lt;b&gt;</p>'
    assert element("p", element("b", "x\x00")) == "<p><b>x\N{REPLACEMENT CHARACTER}</b></p>"
    assert "</script><" not in json_script("data", [HOSTILE])


# ---------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    missing = find_missing()
    if missing is not None:
        pytest.skip(f"{missing} is not installed (Debian packages chromium, chromium-driver)")
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


TO_STEP = (
    "const s = document.querySelector('.controls input'); s.value = %d;"
    "s.dispatchEvent(new Event('input'))"
)
CELLS = "return [...document.querySelectorAll('.pane')].map((pane) => pane.innerText)"


# paragraphs, table cells and descriptions with a text that are less than 48 pixels wide
NARROW = (
    "return [...document.querySelectorAll('p, td, dd')]"
    ".filter((e) => e.textContent.length > 20 && e.offsetParent && e.clientWidth < 48)"
    ".map((e) => e.textContent)"
)


def test_page_in_a_browser_fits_phone_and_desktop_without_errors(
    place: Path, tmp_path: Path, browser: Browser, ddiff: Command
) -> None:
    path = tmp_path / "r.html"
    runs = [str(place / name) for name in ("tree", "flat", "digits")]
    assert ddiff("report", *runs, "--draws", "1", "--out", str(path)).code == 0
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.resize(width, 900, scheme)
            browser.open(path)
            browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            assert browser.run("return document.documentElement.scrollWidth") == width
            assert browser.run(NARROW) == []
            background = browser.run("return getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", background))) > 3 * 128
            assert light == (scheme == "light")
            assert browser.errors() == []


def test_player_in_a_browser_shows_confidences_as_bars(
    place: Path, tmp_path: Path, browser: Browser
) -> None:
    states = [[6, 6], [4, 6], [4, 3]]
    trajectory = make_trajectory(states, confidence=[{0: 0.25}, {1: 1.0}])
    path = tmp_path / "r.html"
    write_report([place / "tree"], path, Extras([trajectory]))
    browser.resize(1400, 900)
    browser.open(path)
    bars = (
        "return [...document.querySelectorAll('.cells span')].map((cell) =>"
        "cell.classList.contains('sure') ? cell.style.getPropertyValue('--sure') : null)"
    )
    for step, expected in enumerate([[None, None], ["0.25", None], ["0.25", "1"]]):
        browser.run(TO_STEP % step)
        assert browser.run(bars) == expected
    assert browser.errors() == []


def test_player_in_a_browser_steps_plays_and_shows_corrections(
    place: Path, tmp_path: Path, browser: Browser
) -> None:
    # refined to a node, remasked, refined to a token, corrected to a token of the other node
    states = [[6, 6], [4, 6], [6, 6], [0, 6], [2, 3]]
    path = tmp_path / "r.html"
    write_report(
        [place / "tree"],
        path,
        Extras([make_trajectory(states), make_trajectory([[6, 6], [1, 1]], sampler="other")]),
    )
    browser.open(path)
    assert "step 2 of 4" in browser.run("return document.querySelector('.controls').innerText")
    browser.run(TO_STEP % 0)
    left, right = browser.run(CELLS)
    assert "by hand" in left
    assert "other" in right
    counts = []
    for _ in states[1:]:
        browser.run("document.querySelectorAll('.controls button')[2].click()")
        counts.append(
            re.search(r"(\d) refined · (\d) remasked · (\d) corrected", browser.run(CELLS)[0])
        )
    assert [tuple(map(int, count.groups())) for count in counts if count] == [
        (1, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 0, 1),
    ]
    corrected = browser.run(
        "return [...document.querySelectorAll('.corrected')].map((cell) => cell.textContent)"
    )
    assert "c" in corrected
    browser.run(TO_STEP % 1)
    assert "step 1 of 4" in browser.run("return document.querySelector('.controls').innerText")
    browser.run("document.querySelector('button.main').click()")
    browser.run("return new Promise((done) => setTimeout(done, 2500))")
    assert "step 4 of 4" in browser.run("return document.querySelector('.controls').innerText")
    assert browser.errors() == []
