"""Data sets of several fields as recipe components: captioned images.

A data set has the columns "image" and "text". The modules that read data are imported inside
`build`, so that parsing a recipe stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ddiff import ComponentConfig, PositiveInt, Seed

if TYPE_CHECKING:
    from ddiff import Cache, CaptionedImages, ColumnShape, FieldsDocuments, FieldsTable

# Largest number of generated samples of a part, which is kept in memory.
MOST_SAMPLES = 2**20
DIGIT_SIDE = 8  # rows and columns of a digit
DIGIT_LEVELS = 17
SHAPE_PALETTE = (
    (0, 0, 0),
    (220, 40, 40),
    (40, 160, 60),
    (60, 90, 230),
    (240, 210, 60),
    (255, 255, 255),
    (250, 150, 190),
    (70, 210, 220),
)
"""Background, and the colours red, green, blue, yellow, white, pink and cyan."""

Count = Annotated[int, Field(gt=0, le=MOST_SAMPLES)]


class Digits:
    """Handwritten digits with their number words: 1347 training and 450 validation samples.

    An image has 8 x 8 pixels with 17 levels of grey. The field "text" holds the word of the digit.
    """

    class Config(ComponentConfig):
        image: Literal["levels", "patches"] = "levels"
        """Values of the field "image".

        "levels": 64 tokens, the levels 0 to 16. "patches": vectors of pixels, scaled to [-1, 1]."""
        patch: Literal[1, 2, 4] | None = None
        """Rows and columns of a patch; by default 2. Only for patches."""

        @model_validator(mode="after")
        def _check_patch(self) -> Digits.Config:
            if self.patch is not None and self.image != "patches":
                raise ValueError(
                    f'patch = {self.patch} is used only with image = "patches"; leave out patch, '
                    "or change image"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import FieldsDocuments, load_digits

        train, validation = load_digits()
        return FieldsDocuments(_digits_table(config, train), _digits_table(config, validation))

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name."""
        from ddiff import ColumnShape

        picture = _digits_picture(config)
        if config.image == "levels":
            image = ColumnShape("tokens", DIGIT_SIDE**2, DIGIT_LEVELS, picture=picture)
        else:
            image = ColumnShape("vectors", picture.positions, width=picture.width, picture=picture)
        return {"image": image, "text": ColumnShape("texts")}


def _digits_picture(config: Digits.Config) -> Any:
    from ddiff import LevelPicture, PatchPicture, grey_palette

    if config.image == "levels":
        return LevelPicture(DIGIT_SIDE, DIGIT_SIDE, grey_palette(DIGIT_LEVELS))
    return PatchPicture(DIGIT_SIDE, DIGIT_SIDE, 2 if config.patch is None else config.patch)


def _digits_table(config: Digits.Config, images: CaptionedImages) -> FieldsTable:
    from ddiff import FieldsTable, TextColumn, TokenColumn, VectorColumn

    picture = _digits_picture(config)
    image: TokenColumn | VectorColumn
    if config.image == "levels":
        image = TokenColumn(images.levels, images.num_levels, picture)
    else:
        # levels 0 .. 16 become -1, -7/8, ..., 1
        scaled = 2 * images.levels / (images.num_levels - 1) - 1
        pixels = scaled.reshape(-1, DIGIT_SIDE, DIGIT_SIDE, 1)
        image = VectorColumn.from_array(picture.to_patches(pixels), picture)
    return FieldsTable({"image": image, "text": TextColumn(_join_captions(images))})


class Shapes:
    """Generated images of two shapes with a caption, such as "red square left of blue disc".

    An image has `side` x `side` tokens: the background, and one token per colour. All scenes are
    equally likely, so that the entropies of images and captions are known. The samples depend on
    the seed in [data] and not on the seed of the recipe.
    """

    class Config(ComponentConfig):
        train: Count = 8192
        """Number of training samples."""
        validation: Count = 512
        """Number of validation samples."""
        colours: Annotated[PositiveInt, Field(le=len(SHAPE_PALETTE) - 1)] = 7
        """Number of colours."""
        side: Literal[8, 12] = 12
        """Rows and columns of an image. The shapes have 3 x 3 pixels for 8, and 5 x 5 for 12."""
        seed: Seed = 0
        """Seed of the samples."""

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import FieldsDocuments, ShapesSource

        source = ShapesSource(config.seed, config.colours, config.side)
        # sample numbers of the validation part begin after those of the training part
        validation = source.draw(config.validation, first=config.train)
        return FieldsDocuments(
            _shapes_table(config, source.draw(config.train)),
            _shapes_table(config, validation),
            entropies={
                "joint": source.joint_entropy,
                "text": source.caption_entropy,
                "image | text": source.image_entropy_given_caption,
            },
        )

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name."""
        from ddiff import ColumnShape

        image = ColumnShape(
            "tokens", config.side**2, config.colours + 1, picture=_shapes_picture(config)
        )
        return {"image": image, "text": ColumnShape("texts")}


def _shapes_picture(config: Shapes.Config) -> Any:
    import numpy as np

    from ddiff import LevelPicture

    palette = np.array(SHAPE_PALETTE[: config.colours + 1], np.uint8)
    return LevelPicture(config.side, config.side, palette)


def _shapes_table(config: Shapes.Config, images: CaptionedImages) -> FieldsTable:
    from ddiff import FieldsTable, TextColumn, TokenColumn

    image = TokenColumn(images.levels, config.colours + 1, _shapes_picture(config))
    return FieldsTable({"image": image, "text": TextColumn(_join_captions(images))})


def _join_captions(images: CaptionedImages) -> list[str]:
    return [" ".join(words) for words in images.captions]
