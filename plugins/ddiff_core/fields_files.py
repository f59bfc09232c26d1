"""Data sets of several fields from files as recipe components.

The modules that read files are imported inside the methods, so that parsing a recipe stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ddiff import ComponentConfig, DataError, PositiveInt
from ddiff_core.data import HeldOut, ListedFiles, Paths

if TYPE_CHECKING:
    from ddiff import Cache, ColumnShape, Documents, FieldsDocuments, ImageFormat, MissingRules

Missing = Literal["error", "absent"]


class VectorConfig(ComponentConfig):
    """Keys of data sets that pair texts with .npy files of vectors."""

    path: str
    """Folder of the data set."""
    held_out: HeldOut = 0.05
    """Fraction of the samples for validation, chosen by the hash of their text."""
    missing: Missing = "error"
    """Samples without text or without vectors: an error, or marked as lacking the field."""
    computed: bool = True
    """True: the vectors are computed from the texts, as embeddings are."""
    dim: PositiveInt | None = None
    """Expected numbers of a vector; another dimension is an error. With this key, a dry run before
    the files exist assumes one vector of this dimension per text."""

    def check_dim(self, width: int | None) -> None:
        """Raise DataError if vectors do not have the dimension that the recipe expects."""
        if self.dim not in (None, width):
            raise DataError(
                f"[data] dim must be the numbers of a vector; got dim = {self.dim}, but the "
                f"vectors in {self.path} have {width} numbers. Correct dim, or name the folder of "
                "the other vectors in path."
            )


class VectorFiles:
    """Texts and a .npy file with the vectors of each text: the columns "text" and "latent"."""

    class Config(VectorConfig):
        manifest: str = "train_data.json"
        """List of objects with text (or text_path) and latent_path, in the folder. If it does not
        exist, texts/train/NAME.txt and latents/train/NAME.npy are a pair."""
        validation: str | None = None
        """Manifest of the validation samples; by default validation_data.json, if it exists.
        Without validation samples `held_out` selects some."""

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import read_vector_files

        return _read_vectors(config, read_vector_files, manifest=config.manifest)

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name, from the first file of vectors."""
        from ddiff import find_vector_shape

        return _preview_vectors(config, find_vector_shape, config.manifest)


class VectorShards:
    """JSON lines with texts, and .npy files with many vectors: the columns "text" and "latent"."""

    class Config(VectorConfig):
        train: str = "train_data.jsonl"
        """File with one object per line, with the keys text, shard and idx, in the folder."""
        validation: str | None = None
        """File of the validation samples; by default validation_data.jsonl, if it exists. Without
        validation samples `held_out` selects some."""
        shards: str = "latent_shards"
        """Folder with the files shard_NNNN.npy, in the folder of the data set."""

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import read_vector_shards

        return _read_vectors(config, read_vector_shards, train=config.train, shards=config.shards)

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name, from the headers of the shards."""
        from ddiff import find_shard_shape

        return _preview_vectors(config, find_shard_shape, config.shards)


def _read_vectors(
    config: VectorFiles.Config | VectorShards.Config,
    read: Callable[..., FieldsDocuments],
    **places: str,
) -> FieldsDocuments:
    """Read texts and vectors with the function `read`. `places`: its arguments for files."""
    found = read(
        config.path,
        validation=config.validation,
        held_out=config.held_out,
        missing=config.missing,
        computed=config.computed,
        **places,
    )
    config.check_dim(found.shapes["latent"].width)
    return found


def _preview_vectors(
    config: VectorConfig, find_shape: Callable[[str, str], Any], place: str
) -> dict[str, ColumnShape]:
    """Return the description of each column from the shape that `find_shape` reads at `place`."""
    if config.dim is not None and not Path(config.path).exists():
        return _describe_vectors(1, config.dim, config.computed)
    shape = find_shape(config.path, place)
    config.check_dim(shape.width)
    return _describe_vectors(shape.positions, shape.width, config.computed)


class EncodedTexts(ListedFiles):
    """Texts with the vectors that `ddiff encode` computed: the columns "text" and "latent"."""

    class Config(ComponentConfig):
        vectors: str
        """Folder that `ddiff encode` wrote."""
        source: Literal["text", "jsonl", "bundled"] = "text"
        """Kind of the data set that was encoded. Its keys must be those of the encoded recipe."""
        files: tuple[str, ...] = ()
        """Paths or globs of the texts; not for source = "bundled"."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation texts; without them `held_out` selects some."""
        held_out: HeldOut = 0.05
        """Fraction of the texts for validation, chosen by the hash of the text."""
        split: Literal["file", "paragraph", "line"] = "file"
        """Unit that counts as one text; only for source = "text"."""
        text: str = "text"
        """Field with the text; only for source = "jsonl"."""
        dim: PositiveInt | None = None
        """Expected dimension of a vector; another dimension is an error."""
        encoder: str | None = None
        """Expected fingerprint of the encoder, as in settings.json; another one is an error."""

        @model_validator(mode="after")
        def _check_source(self) -> EncodedTexts.Config:
            if (self.source == "bundled") == bool(self.files):
                raise ValueError(
                    f'source = "{self.source}" {"has no" if self.files else "needs"} files; '
                    f"got files = {list(self.files)}"
                )
            return self

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import read_encoded_texts

        return read_encoded_texts(
            _read_texts(config, cache), config.vectors, dim=config.dim, encoder=config.encoder
        )

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name, from the folder of the vectors."""
        from ddiff import EncodedVectors

        vectors = EncodedVectors.open(config.vectors, dim=config.dim, encoder=config.encoder)
        return _describe_vectors(vectors.train.positions, vectors.dim, True)


def _read_texts(config: EncodedTexts.Config, cache: Cache | None) -> Documents:
    from ddiff import load_bundled_novels, read_json_lines, read_text_files

    if config.source == "bundled":
        return load_bundled_novels()
    options: dict[str, Any] = {
        "validation": config.validation,
        "held_out": config.held_out,
        "cache": cache,
    }
    if config.source == "jsonl":
        return read_json_lines(config.files, text=config.text, **options)
    return read_text_files(config.files, split=config.split, **options)


def _describe_vectors(positions: int, width: int, computed: bool) -> dict[str, ColumnShape]:
    from ddiff import ColumnShape

    source = "text" if computed else None
    latent = ColumnShape("vectors", positions, width=width, computed_from=source)
    return {"text": ColumnShape("texts"), "latent": latent}


# ---------------------------------------------------------------------- images


class ImageConfig(ComponentConfig):
    """Keys of images with captions."""

    size: tuple[PositiveInt, PositiveInt]
    """Rows and columns of pixels. Larger and smaller images are cropped around the centre and
    scaled."""
    colour: Literal["grey", "rgb"] = "rgb"
    """Channels of a pixel."""
    values: Literal["patches", "levels"] = "patches"
    """Values of the field "image".

    "patches": vectors of the pixels of square patches, scaled to [-1, 1]. "levels": one token per
    pixel, only with colour = "grey"."""
    patch: PositiveInt | None = None
    """Rows and columns of a patch. Required for patches."""
    levels: Annotated[int, Field(ge=2, le=256)] | None = None
    """Number of levels of grey. Required for levels."""
    held_out: HeldOut = 0.05
    """Fraction of the images for validation, chosen by a hash of the image."""
    unreadable: Missing = "error"
    """Images that are missing or cannot be decoded: an error, or samples without image."""
    captionless: Missing = "error"
    """Images without caption: an error, or samples without text."""

    @model_validator(mode="after")
    def _check_values(self) -> ImageConfig:
        key = "patch" if self.values == "patches" else "levels"
        other = "levels" if self.values == "patches" else "patch"
        given = {"patch": self.patch, "levels": self.levels}
        if given[key] is None or given[other] is not None:
            raise ValueError(
                f'values = "{self.values}" needs the key {key} and not the key {other}; got '
                f"{key} = {given[key]} and {other} = {given[other]}"
            )
        return self


def _image_format(config: ImageConfig) -> ImageFormat:
    from ddiff import ImageFormat

    return ImageFormat(
        *config.size,
        colour=config.colour,
        values=config.values,
        patch=config.patch or 1,
        levels=config.levels or 256,
    )


def _missing_rules(config: ImageConfig) -> MissingRules:
    from ddiff import MissingRules

    return MissingRules(config.unreadable, config.captionless)


def _preview_images(config: ImageConfig) -> dict[str, ColumnShape]:
    from ddiff import ColumnShape

    return {"image": _image_format(config).shape, "text": ColumnShape("texts")}


class Images:
    """Image files with captions: the columns "image" and "text"."""

    class Config(ImageConfig):
        path: str
        """Folder of the images."""
        manifest: str | None = None
        """JSON, JSON lines, CSV or parquet file in the folder, with path and caption of each
        sample. Without manifest, NAME.txt is the caption of NAME.png (.jpg, ...)."""
        validation: str | None = None
        """Manifest of the validation samples; without it `held_out` selects some."""
        image: str = "image_path"
        """Key or column of a manifest with the path of the image, relative to the folder."""
        caption: str = "caption"
        """Key or column of a manifest with the caption."""

        @model_validator(mode="after")
        def _check_manifest(self) -> Images.Config:
            if self.validation is not None and self.manifest is None:
                raise ValueError(
                    f'validation = "{self.validation}" is a manifest and needs manifest, the '
                    "manifest of the training samples"
                )
            return self

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import read_image_folder

        return read_image_folder(
            config.path,
            _image_format(config),
            manifest=config.manifest,
            validation=config.validation,
            held_out=config.held_out,
            image=config.image,
            caption=config.caption,
            rules=_missing_rules(config),
            cache=cache,
        )

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name."""
        return _preview_images(config)


class ImageTables(ListedFiles):
    """Images with captions in parquet files: the columns "image" and "text"."""

    class Config(ImageConfig):
        files: Paths
        """Paths or globs of parquet files, local or of any fsspec protocol."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation files; without them `held_out` selects some images."""
        image: str = "image"
        """Column with encoded images, as bytes or as a structure with the key bytes."""
        caption: str = "caption"
        """Column with the caption."""

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import read_image_tables

        return read_image_tables(
            config.files,
            _image_format(config),
            validation=config.validation,
            held_out=config.held_out,
            image=config.image,
            caption=config.caption,
            rules=_missing_rules(config),
            cache=cache,
        )

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name."""
        return _preview_images(config)


class TokenGrids:
    """Token ids of images, such as codes of a vector quantizer, with captions.

    The columns are "image" and "text".
    """

    class Config(ComponentConfig):
        ids: str
        """File of the ids: a .npy file with integers [N,n], or JSON, JSON lines or parquet."""
        captions: str | None = None
        """Text file with one caption per line, for ids in a .npy file."""
        validation: str | None = None
        """File of the validation ids; without it `held_out` selects some samples."""
        validation_captions: str | None = None
        """Captions of the validation ids, for a .npy file."""
        num_tokens: PositiveInt
        """Number of different tokens; the ids are 0 to num_tokens - 1."""
        size: tuple[PositiveInt, PositiveInt]
        """Rows and columns of the grid of ids, which are in reading order."""
        column: str = "ids"
        """Key or column with the list of ids."""
        caption: str = "caption"
        """Key or column with the caption."""
        held_out: HeldOut = 0.05
        """Fraction of the samples for validation, chosen by the hash of their ids."""
        missing: Missing = "error"
        """Samples without ids or without caption: an error, or marked as lacking the field."""

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import GridFiles, GridFormat, read_token_grids

        validation = None
        if config.validation is not None:
            validation = GridFiles(config.validation, config.validation_captions)
        return read_token_grids(
            GridFiles(config.ids, config.captions),
            GridFormat(*config.size, config.num_tokens),
            validation=validation,
            held_out=config.held_out,
            ids=config.column,
            caption=config.caption,
            missing=config.missing,
        )

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name."""
        from ddiff import ColumnShape, GridFormat

        image = GridFormat(*config.size, config.num_tokens).shape
        return {"image": image, "text": ColumnShape("texts")}

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        files = (config.ids, config.captions, config.validation, config.validation_captions)
        return tuple(file for file in files if file is not None)
