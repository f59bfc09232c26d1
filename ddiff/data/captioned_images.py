"""Small captioned images: the bundled digits, and generated shapes whose distribution is known.

An image is a grid of integer levels, and a caption is a list of words from a small vocabulary.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddiff.errors import ArgumentError

DIGIT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
DIGIT_SIDE = 8  # rows and columns of a digit
DIGIT_LEVELS = 17
TRAINING_DIGITS = 1347

SHAPE_SIDES = (8, 12)  # possible rows and columns of an image of shapes
COLOURS = ("red", "green", "blue", "yellow", "white", "pink", "cyan")
"""Colour words; colour number c is level c + 1 of an image, and level 0 is the background."""
RELATIONS = ("left of", "above")
FIGURES: Mapping[int, Mapping[str, tuple[str, ...]]] = {
    8: {
        "square": ("111", "101", "111"),
        "disc": ("010", "111", "010"),
        "cross": ("101", "010", "101"),
    },
    12: {
        "square": ("11111", "10001", "10001", "10001", "11111"),
        "disc": ("01110", "11111", "11111", "11111", "01110"),
        "cross": ("00100", "00100", "11111", "00100", "00100"),
    },
}
"""Pixels of each shape, 3 x 3 in an image of 8 x 8 pixels and 5 x 5 in one of 12 x 12."""


class CaptionedImages(NamedTuple):
    """Images with their captions.

    Attributes:
        levels: integer levels [n, rows * columns], row by row.
        captions: words of the caption of every image.
        side: rows and columns of an image.
        num_levels: number of levels, 0 .. num_levels - 1.
    """

    levels: NDArray[np.int64]
    captions: Sequence[tuple[str, ...]]
    side: int
    num_levels: int


def load_digits() -> tuple[CaptionedImages, CaptionedImages]:
    """Load the bundled digits, 8 x 8 with 17 levels and a number word: training and validation."""
    packed = resources.files("ddiff.data").joinpath("images", "digits.bin.xz").read_bytes()
    table = np.frombuffer(lzma.decompress(packed), np.uint8).reshape(-1, DIGIT_SIDE**2 + 1)
    levels = table[:, :-1].astype(np.int64)
    captions = [(DIGIT_WORDS[digit],) for digit in table[:, -1]]
    parts = []
    for part in (slice(None, TRAINING_DIGITS), slice(TRAINING_DIGITS, None)):
        parts.append(CaptionedImages(levels[part], captions[part], DIGIT_SIDE, DIGIT_LEVELS))
    return parts[0], parts[1]


class Scene(NamedTuple):
    """Two shapes and their relation.

    Attributes:
        side: rows and columns of the image.
        relation: number of the relation of the first shape to the second.
        shapes: names of both shapes.
        colours: colour numbers of both shapes.
        offsets: row and column of the upper left corner of each shape.
    """

    side: int
    relation: int
    shapes: tuple[str, str]
    colours: tuple[int, int]
    offsets: tuple[tuple[int, int], tuple[int, int]]

    def caption(self) -> tuple[str, ...]:
        """Return the words, such as ("red", "square", "left", "of", "blue", "disc")."""
        first, second = (
            (COLOURS[colour], shape) for colour, shape in zip(self.colours, self.shapes)
        )
        return *first, *RELATIONS[self.relation].split(), *second

    def image(self) -> NDArray[np.int64]:
        """Return the levels [side * side]."""
        canvas = np.zeros((self.side, self.side), np.int64)
        for shape, colour, (row, column) in zip(self.shapes, self.colours, self.offsets):
            pixels = _pixels(self.side, shape)
            area = canvas[row : row + len(pixels), column : column + len(pixels)]
            area[pixels] = colour + 1
        return canvas.reshape(-1)


class ShapesSource:
    """Uniform distribution over scenes of two shapes, whose entropies are known.

    A scene has two shapes with colours, one left of or above the other, at random offsets in the
    two halves of the image. A scene determines its image and its caption, and both together
    determine the scene. In nats per sample:

    - H(image, caption) = ln(number of scenes)
    - H(caption) = ln(number of captions)
    - H(image | caption) = ln(number of offsets)

    Args:
        seed: seed of the draws.
        colours: number of colours, 1 to 7.
        side: rows and columns of an image, 8 or 12.
    """

    def __init__(self, seed: int = 0, colours: int = len(COLOURS), side: int = 12) -> None:
        if not 1 <= colours <= len(COLOURS):
            raise ArgumentError(
                f"ShapesSource: colours must be 1 to {len(COLOURS)}; got {colours}."
            )
        if side not in SHAPE_SIDES:
            raise ArgumentError(f"ShapesSource: side must be 8 or 12; got {side}.")
        self.seed = seed
        self.colours = colours
        self.side = side
        self.shapes = tuple(FIGURES[side])

    @staticmethod
    def count_colours(words: Iterable[str]) -> int:
        """Return the smallest number of colours whose names include all colours in `words`."""
        numbers = [COLOURS.index(word) + 1 for word in words if word in COLOURS]
        return max(numbers, default=1)

    @property
    def num_captions(self) -> int:
        """Number of captions, all equally likely."""
        return len(RELATIONS) * (len(self.shapes) * self.colours) ** 2

    @property
    def num_offsets(self) -> int:
        """Number of pairs of offsets, all equally likely given the caption."""
        return (self._num_offsets(True) * self._num_offsets(False)) ** 2

    @property
    def caption_entropy(self) -> float:
        """H(caption) in nats."""
        return math.log(self.num_captions)

    @property
    def image_entropy_given_caption(self) -> float:
        """H(image | caption) in nats."""
        return math.log(self.num_offsets)

    @property
    def joint_entropy(self) -> float:
        """H(image, caption) in nats."""
        return self.caption_entropy + self.image_entropy_given_caption

    def scene(self, index: int) -> Scene:
        """Draw scene number `index` of the seed."""
        rng = np.random.default_rng([self.seed, index])
        relation = int(rng.integers(len(RELATIONS)))
        first, second = rng.integers(len(self.shapes), size=2)
        colours = rng.integers(self.colours, size=2)
        offsets = []
        for half in (0, 1):
            within = int(rng.integers(self._num_offsets(True)))
            across = int(rng.integers(self._num_offsets(False)))
            offsets.append(self._place(relation, half, within, across))
        return Scene(
            self.side,
            relation,
            (self.shapes[first], self.shapes[second]),
            (int(colours[0]), int(colours[1])),
            (offsets[0], offsets[1]),
        )

    def draw(self, count: int, *, first: int = 0) -> CaptionedImages:
        """Draw `count` samples, beginning with number `first` of the seed."""
        scenes = [self.scene(index) for index in range(first, first + count)]
        return CaptionedImages(
            np.stack([scene.image() for scene in scenes]),
            [scene.caption() for scene in scenes],
            self.side,
            len(COLOURS) + 1,
        )

    def captions(self) -> Iterator[tuple[str, ...]]:
        """Iterate over all captions."""
        nouns = list(product(COLOURS[: self.colours], self.shapes))
        for relation, first, second in product(RELATIONS, nouns, nouns):
            yield *first, *relation.split(), *second

    def images_of(self, caption: Sequence[str]) -> set[bytes]:
        """Return all images that a caption can have, each as the bytes of its levels."""
        relation, shapes, colours = self._parse(caption)
        within = range(self._num_offsets(True))
        across = range(self._num_offsets(False))
        images = set()
        for first, second in product(product(within, across), repeat=2):
            offsets = (self._place(relation, 0, *first), self._place(relation, 1, *second))
            scene = Scene(self.side, relation, shapes, colours, offsets)
            images.add(scene.image().astype(np.uint8).tobytes())
        return images

    def is_right(self, levels: NDArray[np.int64], caption: Sequence[str]) -> bool:
        """Return whether an image is one that the caption can have."""
        try:
            self._parse(caption)
        except ArgumentError:
            return False
        return np.asarray(levels).astype(np.uint8).tobytes() in self.images_of(caption)

    def _parse(self, caption: Sequence[str]) -> tuple[int, tuple[str, str], tuple[int, int]]:
        """Return relation, shapes and colours of a caption.

        Raises ArgumentError if the words do not form a caption.
        """
        words = list(caption)
        known = COLOURS[: self.colours]
        for number, relation in enumerate(RELATIONS):
            middle = relation.split()
            if len(words) != 4 + len(middle) or words[2:-2] != middle:
                continue
            first, second = words[:2], words[-2:]
            if all(one[0] in known and one[1] in self.shapes for one in (first, second)):
                colours = (COLOURS.index(first[0]), COLOURS.index(second[0]))
                return number, (first[1], second[1]), colours
        raise ArgumentError(
            "ShapesSource: a caption must be like `red square left of blue disc`; got "
            f"`{' '.join(words)}`."
        )

    def _num_offsets(self, is_within_half: bool) -> int:
        """Return the number of offsets of a shape along one axis of a half, or of the image."""
        length = self.side // 2 if is_within_half else self.side
        return length - len(_pixels(self.side, self.shapes[0])) + 1

    def _place(self, relation: int, half: int, within: int, across: int) -> tuple[int, int]:
        """Return row and column of the shape in a half (0 or 1) of the image.

        `within` is the offset inside the half, and `across` the offset along the other axis.
        """
        along = within + half * (self.side // 2)
        return (across, along) if relation == 0 else (along, across)


def _pixels(side: int, shape: str) -> NDArray[np.bool_]:
    """Return the pixels of a shape in an image with `side` rows, bool [k,k]."""
    return np.array([[pixel == "1" for pixel in row] for row in FIGURES[side][shape]])
