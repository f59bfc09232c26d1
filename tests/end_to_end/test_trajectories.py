"""Options of `ddiff sample` that show states during sampling: --gif, --trajectory and --watch."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, is_refusal
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.text import Text
from small import working_in
from small_fields import DIGITS, PATCHES

import ddiff as api
from ddiff.runs import animation
from ddiff.runs.fields.trajectory import MASK_COLOUR, draw_states
from ddiff.runs.report.clusters import TokenTree
from ddiff.runs.report.trajectories import (
    AnyTrajectory,
    PictureTrajectory,
    Trajectory,
    read_trajectories,
    to_json,
)
from ddiff.runs.terminal_view import StateView, draw_pixels, watch_samples

STEPS = 4  # [sample] steps of the recipe in small.py
ROUNDING = 16  # of a colour channel, because a file has 64 colours


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the runs `tree` of text, `digits` of pixels and `patches` of vectors."""
    folder = tmp_path_factory.mktemp("trajectories")
    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        api.run("small.toml", settings=['name="tree"', "train.steps=3"])
        for name, recipe in (("digits", DIGITS), ("patches", PATCHES)):
            Path(f"{name}.toml").write_text(recipe)
            api.run(f"{name}.toml", settings=["train.steps=2"])
        yield folder / "runs"


def make_trajectory(states: list[list[int]], **changes: Any) -> Trajectory:
    """Trajectory over four tokens, two nodes (4, 5) and the mask (6)."""
    words = ["and", "the", "cat", "hat"]
    tree = TokenTree([np.array([0, 0, 1, 1]), np.array([0, 0])], words, {})
    origin: dict[str, Any] = {"run": "toy", "sampler": "by hand", "seed": 0, "index": 0}
    times = np.linspace(1, 0, len(states)).tolist()[1:]
    return Trajectory.of(states, times, tree, **{**origin, **changes})


def read_frames(content: bytes) -> list[NDArray[Any]]:
    """Return the pixels [rows,columns,3] of every frame of a GIF file."""
    frames = []
    with Image.open(io.BytesIO(content)) as image:
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    return frames


def is_close(pixel: NDArray[Any], colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel - np.array(colour)).max() <= ROUNDING)


# ---------------------------------------------------------------------- animations


def test_gif_has_a_frame_for_each_step_and_holds_the_last(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    path = tmp_path / "tree.gif"
    found = ddiff("sample", str(place / "tree"), "--count", "2", "--gif", str(path))
    assert found.code == 0
    assert len(found.out.splitlines()) == 2
    durations = []
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert image.n_frames == STEPS + 1
        assert image.info["loop"] == 0
        assert image.width <= 800
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    assert durations[-1] > 2000
    assert max(durations[:-1]) <= 400
    assert path.stat().st_size < animation.LARGEST


def test_gif_cells_have_the_colours_of_mask_node_token_and_changes() -> None:
    # refined to a node, then to a token, then corrected to a token of the other node
    frames = read_frames(animation.draw_animation([make_trajectory([[6], [4], [0], [3]])]))
    left = animation.MARGIN
    top = animation.MARGIN + animation.LINE_HEIGHT + animation.GAP
    inside = [frame[top + 2, left + 2] for frame in frames]
    expected = [animation.MASK, animation.LEVELS[1], animation.PAPER, animation.PAPER]
    for pixel, colour in zip(inside, expected):
        assert is_close(pixel, colour)
    bottom = top + animation.LINE_HEIGHT - 4
    edges = [frame[bottom, left + 3] for frame in frames]
    assert is_close(edges[0], animation.MASK)
    assert is_close(edges[1], animation.REFINED)
    assert is_close(edges[2], animation.REFINED)
    assert is_close(edges[3], animation.CORRECTED)


def test_gif_frames_differ_only_in_cells_that_change_and_in_the_title() -> None:
    states = [[6, 6], [6, 1], [0, 1]]
    frames = read_frames(animation.draw_animation([make_trajectory(states)]))
    top = animation.MARGIN + animation.LINE_HEIGHT + animation.GAP
    first = slice(animation.MARGIN, animation.MARGIN + animation.MASK_WIDTH)
    cells = [frame[top:, first] for frame in frames]
    assert (cells[0] == cells[1]).all()
    assert (cells[1] != cells[2]).any()
    assert (frames[0][top:] != frames[1][top:]).any()


def test_gif_marks_given_tokens_in_every_frame() -> None:
    frames = read_frames(animation.draw_animation([make_trajectory([[0, 6], [0, 1]], given=[0])]))
    top = animation.MARGIN + animation.LINE_HEIGHT + animation.GAP
    for frame in frames:
        assert is_close(frame[top + 2, animation.MARGIN + 1], animation.GIVEN)


def test_gif_of_64_tokens_and_64_steps_stays_below_two_megabytes() -> None:
    # the worst case: every token of four samples changes in every step
    rng = np.random.default_rng(0)
    drawn = []
    for index in range(4):
        states = rng.integers(0, 7, (65, 64)).tolist()
        drawn.append(make_trajectory(states, index=index))
    content = animation.draw_animation(drawn)
    assert len(content) < animation.LARGEST
    frames = read_frames(content)
    assert len(frames) >= 25
    assert len(frames[0]) <= animation.TALLEST


@pytest.mark.parametrize(("steps", "most"), [(0, 5), (1, 5), (4, 5), (100, 7), (1000, 100)])
def test_chosen_steps_begin_at_zero_and_end_at_the_last_step(steps: int, most: int) -> None:
    chosen = animation.choose_steps(steps, most)
    assert chosen[-1] == steps
    assert len(chosen) == min(steps + 1, most)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0 or steps == 0


def test_gif_shows_characters_that_the_font_lacks_in_a_similar_form() -> None:
    assert animation._make_plain("caf\u00e9 \u201cno\u201d\n") == 'cafe "no"\\n'
    assert animation._make_plain("\u4e2d") == "?"


def test_gif_of_fields_shows_pictures_and_texts_step_by_step(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    path = tmp_path / "digits.gif"
    record = tmp_path / "digits.json"
    arguments = ["--count", "2", "--gif", str(path), "--trajectory", str(record)]
    assert ddiff("sample", str(place / "digits"), *arguments).code == 0
    frames = read_frames(path.read_bytes())
    pictures = [each for each in read_trajectories(record) if isinstance(each, PictureTrajectory)]
    assert len(frames) == pictures[0].num_steps + 1
    top = animation.MARGIN + animation.LINE_HEIGHT + animation.GAP
    left = animation.MARGIN
    side = animation.SMALLEST_SIDE
    for frame, shown in zip(frames, unfold_pictures(pictures[0])):
        drawn = frame[top : top + side, left : left + side]
        scale = side // len(shown)
        large = shown.repeat(scale, 0).repeat(scale, 1)
        assert np.abs(drawn - large).max() <= ROUNDING


def test_gif_refuses_another_suffix_before_sampling(
    place: Path, tmp_path: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddiff.runs.stages.load", None)  # an error if the run were loaded
    path = tmp_path / "tree.png"
    found = ddiff("sample", str(place / "tree"), "--gif", str(path))
    assert is_refusal(found, "ddiff sample --gif", ".gif", str(path))
    assert not path.exists()


def test_gif_replaces_its_own_files_and_no_others(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    path = tmp_path / "mine.gif"
    Image.new("RGB", (4, 4)).save(path, "GIF")
    before = path.read_bytes()
    arguments = ["sample", str(place / "tree"), "--count", "1", "--gif", str(path)]
    assert is_refusal(ddiff(*arguments), "did not write")
    assert path.read_bytes() == before
    path.unlink()
    contents = []
    for _ in range(2):
        assert ddiff(*arguments).code == 0
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_gif_is_refused_for_edits(place: Path, tmp_path: Path, ddiff: Command) -> None:
    arguments = ["--edit", "the old cat", "--gif", str(tmp_path / "e.gif")]
    assert is_refusal(ddiff("sample", str(place / "tree"), *arguments), "--edit and --gif")


# ---------------------------------------------------------------------- fields


def unfold_pictures(trajectory: PictureTrajectory) -> list[NDArray[Any]]:
    """Return the pixels of every frame."""
    pictures = []
    for text in trajectory.pictures:
        image = Image.open(io.BytesIO(base64.b64decode(text)))
        pictures.append(np.asarray(image.convert("RGB")).astype(int))
    return [pictures[frame] for frame in trajectory.frames]


def record(run: Path, path: Path, ddiff: Command, *arguments: str) -> tuple[Any, Any]:
    """Return the printed samples and the trajectories of `ddiff sample --trajectory`."""
    found = ddiff("sample", str(run), "--trajectory", str(path), *arguments)
    assert found.code == 0, found.err
    samples = [json.loads(line) for line in found.out.splitlines()]
    return samples, read_trajectories(path)


def by_field(trajectories: list[AnyTrajectory], index: int) -> dict[str, AnyTrajectory]:
    return {each.field: each for each in trajectories if each.index == index}


def test_fields_trajectories_end_with_the_printed_samples(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    run = api.load(place / "digits")
    samples, trajectories = record(place / "digits", tmp_path / "t.json", ddiff, "--count", "3")
    assert len(trajectories) == 6
    for index, sample in enumerate(samples):
        fields = by_field(trajectories, index)
        text = fields["text"]
        picture = fields["image"]
        assert isinstance(text, Trajectory)
        assert isinstance(picture, PictureTrajectory)
        assert text.num_steps == picture.num_steps == len(text.times) == len(picture.times)
        assert text.unfold()[-1] == sample["fields"]["text"]["ids"]
        assert text.target == picture.target == sample["target"]
        ids = torch.tensor([sample["fields"]["image"]["ids"]])
        shown = unfold_pictures(picture)
        assert (shown[-1] == run.values["image"].draw(ids)[0]).all()
        assert (shown[0] == MASK_COLOUR).all()
        assert text.times[-1] == picture.times[-1] == 0.0


def test_fields_trajectories_hold_the_fields_that_do_not_move(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    # [sample] path moves the text after the image: `order` lists the fields from clean to noise
    _, trajectories = record(place / "digits", tmp_path / "t.json", ddiff, "--count", "1")
    fields = by_field(trajectories, 0)
    text = fields["text"]
    picture = fields["image"]
    assert isinstance(text, Trajectory)
    assert isinstance(picture, PictureTrajectory)
    moves_text = [step for step, changes in enumerate(text.changes, 1) if changes]
    moves_picture = [
        step
        for step in range(1, len(picture.frames))
        if picture.frames[step] != picture.frames[step - 1]
    ]
    assert moves_text
    assert moves_picture
    is_first = max(moves_text) < min(moves_picture)
    assert is_first or max(moves_picture) < min(moves_text)


def test_given_fields_keep_their_states_in_every_step(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    arguments = ["--count", "1", "--given", "text=three"]
    _, trajectories = record(place / "digits", tmp_path / "t.json", ddiff, *arguments)
    fields = by_field(trajectories, 0)
    text = fields["text"]
    assert isinstance(text, Trajectory)
    assert text.sampler == "given"
    assert not any(text.changes)
    assert list(text.given) == [0]
    assert text.names[str(text.start[0])].strip() == "three"
    assert fields["image"].sampler == "ancestral"


def test_vector_field_trajectory_starts_at_noise_and_ends_at_the_sample(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    run = api.load(place / "patches")
    samples, trajectories = record(place / "patches", tmp_path / "t.json", ddiff, "--count", "2")
    starts = []
    for index, sample in enumerate(samples):
        picture = by_field(trajectories, index)["image"]
        assert isinstance(picture, PictureTrajectory)
        shown = unfold_pictures(picture)
        vectors = np.array(sample["fields"]["image"]["vectors"])
        expected = run.values["image"].picture.pixels(vectors).astype(int)
        # one level of brightness, because a printed number is rounded
        assert np.abs(shown[-1] - expected).max() <= 1
        starts.append(shown[0])
    assert (starts[0] != starts[1]).any()


def test_trajectories_do_not_change_the_samples(
    place: Path, tmp_path: Path, ddiff: Command
) -> None:
    plain = ddiff("sample", str(place / "digits"), "--count", "3").out
    batches = ["--count", "3", "--batch", "2", "--trajectory", str(tmp_path / "t.json")]
    assert ddiff("sample", str(place / "digits"), *batches).out == plain
    _, one = record(place / "digits", tmp_path / "u.json", ddiff, "--count", "3")
    assert read_trajectories(tmp_path / "t.json") == one


def test_masked_pixels_have_the_mask_colour_and_others_their_grey(place: Path) -> None:
    values = api.load(place / "digits").values["image"]
    assert values.vocabulary is not None
    states = torch.arange(64).remainder(17)[None].clone()
    states[0, 5] = values.vocabulary.mask_id
    (pixels,) = draw_states(values, states)
    assert tuple(pixels[0, 5]) == MASK_COLOUR
    clean = values.draw(torch.arange(64).remainder(17)[None])[0]
    is_same = (pixels == clean).all(-1)
    assert is_same.sum() == 63
    assert not is_same[0, 5]


def test_picture_trajectory_survives_its_file(tmp_path: Path) -> None:
    black = np.zeros((2, 3, 3), np.uint8)
    origin = {"run": "r", "sampler": "s", "seed": 1, "index": 0, "target": "a", "field": "a"}
    made = PictureTrajectory.of([black, black, black + 9], [0.5, 0.0], **origin)
    assert list(made.frames) == [0, 0, 1]
    assert len(made.pictures) == 2
    path = tmp_path / "t.json"
    path.write_text(to_json([made]))
    assert read_trajectories(path) == [made]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"frames": [0, 1]', '"frames": [0, 2]', "picture 2; pictures are 0"),
        ('"frames": [0, 1]', '"frames": []', "no frames"),
        ('"pictures": ["', '"pictures": ["AAAA', "not a PNG file"),
    ],
)
def test_damaged_picture_trajectories_are_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    black = np.zeros((1, 1, 3), np.uint8)
    origin = {"run": "r", "sampler": "s", "seed": 1, "index": 0, "target": "a", "field": "a"}
    text = to_json([PictureTrajectory.of([black, black + 9], [0.0], **origin)])
    assert old in text
    path = tmp_path / "t.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(api.DataError, match=message):
        read_trajectories(path)


def test_files_of_format_1_are_read(tmp_path: Path) -> None:
    text = to_json([make_trajectory([[6], [1]])])
    old = text.replace("trajectories 2", "trajectories 1")
    old = old.replace(', "target": "", "field": ""', "")
    assert old.count("target") == 0
    path = tmp_path / "t.json"
    path.write_text(old)
    assert read_trajectories(path) == [make_trajectory([[6], [1]])]


# ---------------------------------------------------------------------- terminal


def make_screen(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height)


def test_watch_shows_as_many_samples_as_the_screen_has_lines_for() -> None:
    console = make_screen()
    with watch_samples(console) as show:
        show(1, lambda: (0.5, [Text(f"sample {k} " + "word " * 100) for k in range(4)]))
    shown = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
    # 24 lines: a title, and three samples of seven lines with an empty line after each
    assert "sample 1" in shown
    assert "sample 3" not in shown


def test_watch_breaks_lines_between_nodes_and_not_within_a_node() -> None:
    words = [f"word{number}" for number in range(30)]
    tree = TokenTree([np.arange(30) // 3, np.zeros(10, int)], words, {})
    nodes = [30 + number % 10 for number in range(40)]
    (text,) = StateView(tree).draw([nodes])
    console = make_screen()
    lines = [line.plain for line in text.wrap(console, 80)]
    assert len(lines) > 5
    for line in lines:
        assert re.fullmatch(r"(\[word\d+·word\d+·word\d+\] *)+", line), line
        assert len(line.rstrip()) <= 80


def test_half_blocks_show_two_rows_of_pixels_in_a_line() -> None:
    pixels = np.array([[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]], np.uint8)
    text = draw_pixels(pixels)
    assert text.plain == "▀\n▀"
    assert [span.style for span in text.spans] == [
        "rgb(1,2,3) on rgb(4,5,6)",
        "rgb(7,8,9) on rgb(0,0,0)",
    ]


@pytest.mark.parametrize("name", ["tree", "digits"])
def test_watch_on_a_terminal_of_80_columns_redraws_in_place(place: Path, name: str) -> None:
    arguments = ["sample", str(place / name), "--count", "2", "--watch"]
    screen = run_on_terminal([sys.executable, "-m", "ddiff", *arguments])
    # the cursor goes up before the text is drawn again
    assert re.search(r"\x1b\[\d*A", screen)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    # steps that are faster than the frames are left out
    assert re.search(r"step [01], mean time", plain)
    lines = re.split(r"[\r\n]+", plain)
    assert max(map(len, lines)) <= 80
    if name == "digits":
        assert "▀" * 8 in plain


def run_on_terminal(command: list[str], columns: int = 80, rows: int = 24) -> str:
    """Run a command whose stderr is a terminal, and return what the terminal receives."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (rows, columns))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        received = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not block:
                break
            received += block
    os.close(leader)
    assert process.returncode == 0
    return received.decode(errors="replace")
