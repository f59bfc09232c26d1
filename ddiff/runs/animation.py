"""Animations of trajectories as GIF files, drawn with pillow.

Text cells have the colours of the trajectory player of `ddiff report`. A cell keeps its place and
its width during the animation, so that the eye can follow a position.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import IO, Any, NamedTuple, Protocol

from ddiff.runs.report.trajectories import AnyTrajectory, PictureTrajectory, Trajectory

COMMENT = b"ddiff sample --gif"  # written into every file, so that it is recognized
LARGEST = 2_000_000  # bytes of a file; a larger animation gets fewer frames
MOST_FRAMES = 100
FEWEST_FRAMES = 8
MOST_TEXTS = 4  # samples of texts
MOST_PICTURES = 16  # samples with pictures
TALLEST = 1000  # pixels

WIDTH = 800  # pixels of a frame
MARGIN = 16
GAP = 10  # between two samples
FONT_SIZE = 15
LINE_HEIGHT = 24
PADDING = 3  # left and right of the text of a cell
MASK_WIDTH = 14
NARROWEST_SAMPLE = 150  # a sample with pictures, so that its text has room
SMALLEST_SIDE = 96  # pixels of a picture
MOST_CELLS = 1024  # positions of a text that are shown

LAST_MILLISECONDS = 2500
SHORTEST_MILLISECONDS = 60
LONGEST_MILLISECONDS = 400
WHOLE_MILLISECONDS = 6000  # of an animation, without the last frame
COLOURS = 64  # of a file

BACKGROUND = (246, 247, 249)
PAPER = (255, 255, 255)
INK = (27, 31, 36)
MUTED = (87, 96, 106)
MASK = (200, 207, 216)
LEVELS = (PAPER, (207, 227, 255), (255, 226, 184), (227, 212, 255))
"""Background of a token, and of nodes of levels 1, 2, and 3 or more."""
REFINED = (26, 127, 55)
CORRECTED = (198, 40, 57)
GIVEN = (232, 234, 237)
MARKS = (*LEVELS, INK, MUTED, MASK, REFINED, CORRECTED, GIVEN)
STRIPE = 8  # rows of pixels of each mark, for the choice of the palette

PLAIN = {"\n": "\\n", "\t": "\\t", "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-"}
"""Replacements of characters that the built-in font of pillow lacks."""


def is_animation(file: IO[bytes]) -> bool:
    """Return whether an open file is an animation that `draw_animation` made."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=["GIF"]) as image:
            return image.info.get("comment") == COMMENT
    except (UnidentifiedImageError, OSError, ValueError):
        return False


def draw_animation(trajectories: Sequence[AnyTrajectory]) -> bytes:
    """Return a GIF file that shows the first samples of trajectories, step by step.

    The first frame shows the states before the first step. The last frame is held. Long
    trajectories, and those whose file would be larger than `LARGEST` bytes, have fewer frames.
    """
    page = _Page(trajectories)
    most = MOST_FRAMES
    content = page.draw(most)
    while len(content) > LARGEST and most > FEWEST_FRAMES:
        most //= 2
        content = page.draw(most)
    return content


def choose_steps(num_steps: int, most: int) -> list[int]:
    """Return at most `most` steps from 0 to `num_steps`, at about equal distances."""
    count = min(num_steps + 1, most)
    if count == 1:
        return [num_steps]
    return [round(k * num_steps / (count - 1)) for k in range(count)]


# ---------------------------------------------------------------------- page


class _Panel(Protocol):
    """Area of a frame that shows one trajectory."""

    width: int
    height: int

    def draw(self, page: Any, left: int, top: int, before: int, step: int) -> None:
        """Draw the states after a step on an image. `before`: step of the previous frame."""
        ...


class _Placed(NamedTuple):
    """Panel and its place in a frame."""

    panel: _Panel
    left: int
    top: int


class _Page:
    """Places of the panels of the first samples, and their frames."""

    def __init__(self, trajectories: Sequence[AnyTrajectory]) -> None:
        from PIL import ImageFont

        self.font = ImageFont.load_default(FONT_SIZE)
        self.num_steps = max(each.num_steps for each in trajectories)
        self.title = _make_title(trajectories)
        self.placed: list[_Placed] = []
        self.height = self._place(_group_samples(trajectories))

    def _place(self, samples: Sequence[Sequence[AnyTrajectory]]) -> int:
        """Place the panels of the samples in rows, and return the height of a frame."""
        top = MARGIN + LINE_HEIGHT + GAP
        left = MARGIN
        row_height = 0
        for number, sample in enumerate(samples):
            panels, width, height = self._arrange(sample)
            if left > MARGIN and left + width > WIDTH - MARGIN:
                top += row_height + GAP
                left = MARGIN
                row_height = 0
            if number and top + height > TALLEST - MARGIN:
                break
            for panel, x, y in panels:
                self.placed.append(_Placed(panel, left + x, top + y))
            left += width + GAP
            row_height = max(row_height, height)
        return min(top + row_height + MARGIN, TALLEST)

    def _arrange(self, sample: Sequence[AnyTrajectory]) -> tuple[list[_Placed], int, int]:
        """Place the panels of a sample, pictures above texts. Returns them, width and height."""
        pictures = [_PicturePanel(each) for each in sample if isinstance(each, PictureTrajectory)]
        placed = []
        left = 0
        for picture in pictures:
            placed.append(_Placed(picture, left, 0))
            left += picture.width + GAP
        top = max((picture.height for picture in pictures), default=0)
        width = WIDTH - 2 * MARGIN
        if pictures:
            width = min(max(left - GAP, NARROWEST_SAMPLE), width)
        for each in sample:
            if isinstance(each, Trajectory):
                text = _TextPanel(each, width, self.font)
                placed.append(_Placed(text, 0, top))
                top += text.height
        return placed, width, top

    def draw(self, most: int) -> bytes:
        """Return a GIF file of at most `most` frames."""
        steps = choose_steps(self.num_steps, most)
        frames = []
        for before, step in zip([steps[0], *steps], steps):
            frames.append(self._draw_frame(before, step))
        return _encode_gif(frames)

    def _draw_frame(self, before: int, step: int) -> Any:
        from PIL import Image, ImageDraw

        page = Image.new("RGB", (WIDTH, self.height), BACKGROUND)
        draw = ImageDraw.Draw(page)
        count = f"step {step} of {self.num_steps}"
        draw.text((MARGIN, MARGIN), self.title, fill=MUTED, font=self.font)
        right = WIDTH - MARGIN - self.font.getlength(count)
        # covers the end of a long title
        draw.rectangle((right - GAP, 0, WIDTH, MARGIN + LINE_HEIGHT), fill=BACKGROUND)
        draw.text((right, MARGIN), count, fill=INK, font=self.font)
        for panel, left, top in self.placed:
            panel.draw(page, left, top, before, step)
        return page


def _make_title(trajectories: Sequence[AnyTrajectory]) -> str:
    """Return the run, the target and the samplers of trajectories."""
    first = trajectories[0]
    samplers = dict.fromkeys(each.sampler for each in trajectories if each.sampler != "given")
    return _make_plain(", ".join(filter(None, [first.run, first.target, *samplers])))


def _group_samples(trajectories: Sequence[AnyTrajectory]) -> list[list[AnyTrajectory]]:
    """Return the trajectories of the first samples: one per field in a run of several fields."""
    samples = [list(group) for _, group in groupby(trajectories, key=_sample_key)]
    has_pictures = any(isinstance(each, PictureTrajectory) for each in trajectories)
    return samples[: MOST_PICTURES if has_pictures else MOST_TEXTS]


def _sample_key(trajectory: AnyTrajectory) -> tuple[str, int]:
    """Return a key that is equal for the fields of one sample."""
    sampler = "" if trajectory.field else trajectory.sampler
    return sampler, trajectory.index


def _encode_gif(frames: Sequence[Any]) -> bytes:
    """Return a GIF file of images, whose last image is held."""
    from PIL import Image

    width, height = frames[0].size
    # One palette for all frames, so that equal pixels stay equal and take little space.
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    sheet = Image.new("RGB", (width, height * len(chosen) + STRIPE * len(MARKS)))
    for number, frame in enumerate(chosen):
        sheet.paste(frame, (0, number * height))
    for number, colour in enumerate(MARKS):
        # a stripe, because few pixels of the frames have the colour of a mark
        top = height * len(chosen) + STRIPE * number
        sheet.paste(colour, (0, top, width, top + STRIPE))
    palette = sheet.quantize(COLOURS)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each = WHOLE_MILLISECONDS // len(frames)
    duration = min(max(each, SHORTEST_MILLISECONDS), LONGEST_MILLISECONDS)
    file = io.BytesIO()
    drawn[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=drawn[1:],
        duration=[duration] * (len(drawn) - 1) + [LAST_MILLISECONDS],
        loop=0,
        comment=COMMENT,
        optimize=False,
    )
    return file.getvalue()


# ---------------------------------------------------------------------- panels


class _PicturePanel:
    """Picture of one field, enlarged without smoothing."""

    def __init__(self, trajectory: PictureTrajectory) -> None:
        self.frames = trajectory.frames
        self.pictures = [_decode_picture(picture) for picture in trajectory.pictures]
        self.width, height = self.pictures[0].size
        self.height = height + GAP // 2

    def draw(self, page: Any, left: int, top: int, before: int, step: int) -> None:
        frame = self.frames[min(step, len(self.frames) - 1)]
        page.paste(self.pictures[frame], (left, top))


def _decode_picture(text: str) -> Any:
    """Return the image of a PNG file in base64, enlarged to at least `SMALLEST_SIDE` pixels."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    scale = max(1, -(-SMALLEST_SIDE // min(image.size)))
    large = (image.width * scale, image.height * scale)
    return image.resize(large, Image.Resampling.NEAREST)


class _TextPanel:
    """Cells of the tokens of one sample, in lines."""

    def __init__(self, trajectory: Trajectory, width: int, font: Any) -> None:
        self.trajectory = trajectory
        self.font = font
        self.states = trajectory.unfold()
        self.given = set(trajectory.given)
        self.mask_level = len(trajectory.level_sizes) - 1
        self.texts = {int(state): self._name(int(state)) for state in trajectory.names}
        self.cells = self._place_cells(width)
        self.width = width
        self.height = self.cells[-1][1] + LINE_HEIGHT + GAP // 2 if self.cells else LINE_HEIGHT

    def _name(self, state: int) -> str:
        """Return the text of a state: a token, or the most typical token of a node."""
        if self._is_mask(state):
            return ""
        name = self.trajectory.names[str(state)]
        if self.trajectory.level_of(state) > 0:
            name = name.partition(" · ")[0]
        return _make_plain(name)

    def _is_mask(self, state: int) -> bool:
        return self.mask_level > 0 and self.trajectory.level_of(state) == self.mask_level

    def _place_cells(self, width: int) -> list[tuple[int, int, int]]:
        """Return left, top and width of the cell of each position."""
        cells = []
        left = 0
        top = 0
        for column in list(zip(*self.states))[:MOST_CELLS]:
            widest = max(self.font.getlength(self.texts[state]) for state in set(column))
            size = min(max(MASK_WIDTH, round(widest) + 2 * PADDING), width)
            if left and left + size > width:
                left = 0
                top += LINE_HEIGHT
            cells.append((left, top, size))
            left += size + 1
        return cells

    def draw(self, page: Any, left: int, top: int, before: int, step: int) -> None:
        from PIL import ImageDraw

        draw = ImageDraw.Draw(page)
        last = len(self.states) - 1
        # after the last step of a short trajectory, nothing changes
        previous = self.states[min(before, last)]
        now = self.states[min(step, last)]
        for position, (x, y, width) in enumerate(self.cells):
            box = (left + x, top + y, left + x + width - 1, top + y + LINE_HEIGHT - 4)
            self._draw_cell(draw, box, position, previous[position], now[position])

    def _draw_cell(
        self, draw: Any, box: tuple[int, int, int, int], position: int, old: int, state: int
    ) -> None:
        level = self.trajectory.level_of(state)
        fill = LEVELS[min(level, len(LEVELS) - 1)]
        if self._is_mask(state):
            fill = MASK
        elif position in self.given:
            fill = GIVEN
        draw.rectangle(box, fill=fill)
        left, top, right, bottom = box
        draw.text((left + PADDING, top + 1), self.texts[state], fill=INK, font=self.font)
        if position in self.given:
            draw.line((left, bottom, right, bottom), fill=MUTED)
        if state == old:
            return
        if self.trajectory.is_below(state, old):
            draw.rectangle((left, bottom - 1, right, bottom), fill=REFINED)
        else:
            draw.rectangle(box, outline=CORRECTED, width=2)


def _make_plain(text: str) -> str:
    """Return a text in the characters of the built-in font of pillow, which has ASCII only.

    Accents are left out, and other characters are replaced by "?".
    """
    for character, plain in PLAIN.items():
        text = text.replace(character, plain)
    # NFKD separates a letter from its accents
    letters = unicodedata.normalize("NFKD", text)
    kept = [part for part in letters if not unicodedata.combining(part)]
    return "".join(part if " " <= part <= "~" else "?" for part in kept)
