"""Images with captions from files: decoding, manifests, parquet files and damaged images."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from refusals import message

from ddiff.data.cache import Cache
from ddiff.data.captioned_files import MissingRules, read_image_folder, read_image_tables
from ddiff.data.columns import FieldsDocuments
from ddiff.data.image_files import ImageFormat, decode_image
from ddiff.errors import ArgumentError

COUNT = 12
GREY = ImageFormat(4, 4, colour="grey", patch=2)
LEVELS = ImageFormat(4, 4, colour="grey", values="levels", levels=5)
ABSENT = MissingRules("absent", "absent")


def pixels_of(number: int) -> np.ndarray:
    """Return a grey image [4,4] that the number determines."""
    return np.random.default_rng(number).integers(0, 256, (4, 4)).astype(np.uint8)


def encode(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def decode(content: bytes, form: ImageFormat) -> np.ndarray:
    return decode_image(io.BytesIO(content), "image.png", form)


# ---------------------------------------------------------------------- decoding


def test_decode_keeps_the_pixels_of_an_image_of_the_wanted_size() -> None:
    assert np.array_equal(decode(encode(pixels_of(0)), GREY)[..., 0], pixels_of(0))
    coloured = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    assert np.array_equal(decode(encode(coloured), ImageFormat(4, 4, patch=2)), coloured)


@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 8)])
def test_decode_crops_around_the_centre(height: int, width: int) -> None:
    """The margins are black and the central square is white, so the result is white."""
    image = np.zeros((height, width), np.uint8)
    top, left = (height - 8) // 2, (width - 8) // 2
    image[top : top + 8, left : left + 8] = 255
    found = decode(encode(image), GREY)
    assert np.array_equal(found, np.full((4, 4, 1), 255))


def test_decode_crops_to_the_proportions_of_the_wanted_image() -> None:
    image = np.zeros((8, 8), np.uint8)
    image[2:6] = 255  # the central half of the rows
    form = ImageFormat(2, 4, colour="grey", patch=2)
    assert np.array_equal(decode(encode(image), form), np.full((2, 4, 1), 255))


def test_decode_applies_the_orientation_of_photographs() -> None:
    image = np.zeros((4, 4), np.uint8)
    image[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    found = decode(encode(image, exif=exif), GREY)
    assert np.array_equal(found[..., 0], image[::-1, ::-1])


def test_decode_shows_transparent_pixels_as_white() -> None:
    image = np.zeros((4, 4, 4), np.uint8)
    image[0, :, 3] = 255  # only the first row is opaque, and black
    found = decode(encode(image), GREY)[..., 0]
    assert np.array_equal(found, [[0] * 4, [255] * 4, [255] * 4, [255] * 4])


def test_decode_refuses_images_of_16_bits() -> None:
    content = encode(np.full((4, 4), 1000, np.uint16))
    assert "more than 8 bits" in message(decode, content, GREY)


def test_levels_are_the_nearest_of_equal_steps() -> None:
    pixels = np.array([0, 31, 32, 127, 128, 223, 224, 255], np.uint8)
    form = ImageFormat(1, 8, colour="grey", values="levels", levels=5)
    # level k has the brightness 63.75 k
    expected = [0, 0, 1, 2, 2, 3, 4, 4]
    assert form.to_levels(pixels.reshape(1, 1, 8, 1))[0].tolist() == expected


def test_pictures_of_patches_have_the_pixels_of_the_image() -> None:
    pixels = pixels_of(1)[None, ..., None]
    picture = GREY.picture
    found = picture.pixels(GREY.to_patches(pixels)[0])
    assert np.array_equal(found, np.broadcast_to(pixels[0], (4, 4, 3)))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"values": "levels"}, "needs colour"),
        ({"levels": 257}, "levels must be 2 to 256"),
        ({"patch": 3}, "patch must divide"),
    ],
)
def test_image_format_refuses_impossible_values(keys: dict[str, Any], part: str) -> None:
    assert part in message(ImageFormat, 4, 4, error=ArgumentError, **keys)


# ---------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with 12 images in a subfolder, and their captions next to them."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for number in range(COUNT):
        (root / "sub" / f"{number}.png").write_bytes(encode(pixels_of(number)))
        (root / "sub" / f"{number}.txt").write_text(f"picture {number}\n")
    return root


def check_images(documents: FieldsDocuments, form: ImageFormat, copies: int = 1) -> None:
    """Assert that every caption has its image, `copies` times in all."""
    found = []
    for table in (documents.train, documents.validation):
        numbers = np.arange(len(table))
        captions = table.read_texts("text", numbers)
        images = table.read("image", numbers)
        assert captions.present.all()
        assert images.present.all()
        for caption, values in zip(captions.values, images.values):
            pixels = pixels_of(int(caption.split()[1]))[None, ..., None]
            make = form.to_levels if form.values == "levels" else form.to_patches
            assert np.array_equal(values, make(pixels)[0])
        found += captions.values
    assert sorted(found) == sorted(copies * [f"picture {number}" for number in range(COUNT)])


@pytest.mark.parametrize("form", [GREY, LEVELS])
@pytest.mark.parametrize("is_cached", [False, True])
def test_folder_pairs_images_with_the_captions_next_to_them(
    folder: Path, tmp_path: Path, form: ImageFormat, is_cached: bool
) -> None:
    cache = Cache(tmp_path / "cache") if is_cached else None
    for _ in range(2):  # the second time from the cache
        documents = read_image_folder(str(folder), form, held_out=0.3, cache=cache)
        check_images(documents, form)
        assert documents.shapes["image"] == form.shape


def write_manifest(folder: Path, ending: str) -> str:
    """Write a manifest in which every image has two captions."""
    rows = [
        {"image_path": f"sub/{number}.png", "caption": f"picture {number}", "image_id": number}
        for number in range(COUNT)
        for _ in range(2)
    ]
    path = folder / f"manifest{ending}"
    if ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path.name


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_manifests_of_all_formats_give_the_same_samples(folder: Path, ending: str) -> None:
    name = write_manifest(folder, ending)
    documents = read_image_folder(str(folder), GREY, manifest=name, held_out=0.3)
    check_images(documents, GREY, copies=2)


def test_all_captions_of_an_image_are_in_the_same_part(folder: Path) -> None:
    name = write_manifest(folder, ".json")
    documents = read_image_folder(str(folder), GREY, manifest=name, held_out=0.3)
    parts = []
    for table in (documents.train, documents.validation):
        parts.append(set(table.read_texts("text", np.arange(len(table))).values))
    assert not parts[0] & parts[1]


def test_validation_manifest_with_the_training_images_is_refused(folder: Path) -> None:
    name = write_manifest(folder, ".json")
    text = message(read_image_folder, str(folder), GREY, manifest=name, validation=name)
    assert "memorization" in text


def test_manifest_without_the_named_column_is_refused_with_a_suggestion(folder: Path) -> None:
    name = write_manifest(folder, ".csv")
    text = message(read_image_folder, str(folder), GREY, manifest=name, caption="captions")
    assert 'no column "captions"' in text
    assert 'Did you mean "caption"?' in text


# ---------------------------------------------------------------------- missing and unreadable


def damage(folder: Path) -> None:
    """Truncate one image, replace one by text, and remove one caption."""
    path = folder / "sub" / "3.png"
    path.write_bytes(path.read_bytes()[:45])
    (folder / "sub" / "4.png").write_text("not an image")
    (folder / "sub" / "5.txt").unlink()


def test_image_that_is_not_an_image_is_named_before_anything_is_read(folder: Path) -> None:
    (folder / "sub" / "4.png").write_text("not an image")
    text = message(read_image_folder, str(folder), GREY, held_out=0.3)
    assert "4.png cannot be read" in text


def test_image_without_file_is_an_error_that_names_sample_and_file(folder: Path) -> None:
    name = write_manifest(folder, ".json")
    (folder / "sub" / "4.png").unlink()
    text = message(read_image_folder, str(folder), GREY, manifest=name)
    assert "manifest.json object 9" in text
    assert "4.png" in text
    assert 'unreadable = "absent"' in text


def test_missing_caption_is_an_error_that_names_the_image(folder: Path) -> None:
    (folder / "sub" / "5.txt").unlink()
    text = message(read_image_folder, str(folder), GREY)
    assert "sub/5.png has no caption" in text
    assert 'captionless = "absent"' in text


@pytest.mark.parametrize("form", [GREY, LEVELS])
def test_unreadable_images_and_missing_captions_are_marked_and_counted_if_absent(
    folder: Path, form: ImageFormat
) -> None:
    damage(folder)
    documents = read_image_folder(str(folder), form, held_out=0.3, rules=ABSENT)
    counts = {"image": 0, "text": 0}
    for table in (documents.train, documents.validation):
        for name, count in table.missing().items():
            counts[name] += count
        images = table.read("image", np.arange(len(table)))
        assert images.present.tolist() == table["image"].present.tolist()
    assert counts == {"image": 2, "text": 1}


def test_truncated_image_raises_an_error_with_column_and_file_when_it_is_read(
    folder: Path,
) -> None:
    for number in range(COUNT):
        path = folder / "sub" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:45])
    documents = read_image_folder(str(folder), GREY, held_out=0.3)
    text = message(documents.train.read, "image", [0])
    assert 'Column "image"' in text
    assert ".png" in text


def test_sample_with_unreadable_image_and_without_caption_is_refused(folder: Path) -> None:
    (folder / "sub" / "4.png").write_text("not an image")
    (folder / "sub" / "4.txt").unlink()
    text = message(read_image_folder, str(folder), GREY, held_out=0.3, rules=ABSENT)
    assert "4.png cannot be decoded, and the sample has no caption" in text


def test_fingerprint_of_images_depends_on_contents_and_format(folder: Path) -> None:
    def fingerprint(form: ImageFormat = GREY) -> str:
        return read_image_folder(str(folder), form, held_out=0.3).train.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(ImageFormat(4, 4, colour="grey", patch=4)) != before
    for number in range(COUNT):
        (folder / "sub" / f"{number}.png").write_bytes(encode(pixels_of(100 + number)))
    assert fingerprint() != before


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    assert "has no images" in message(read_image_folder, str(tmp_path), GREY)
    assert "There is no folder" in message(read_image_folder, str(tmp_path / "none"), GREY)


# ---------------------------------------------------------------------- parquet files


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def rows_of(numbers: range, is_structure: bool) -> list[dict[str, Any]]:
    rows = []
    for number in numbers:
        content = encode(pixels_of(number))
        image = {"bytes": content, "path": None} if is_structure else content
        rows.append({"image": image, "caption": f"picture {number}", "other": number})
    return rows


@pytest.mark.parametrize("is_structure", [False, True])
@pytest.mark.parametrize("form", [GREY, LEVELS])
def test_parquet_files_pair_images_with_captions(
    tmp_path: Path, is_structure: bool, form: ImageFormat
) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows_of(range(COUNT), is_structure))
    cache = Cache(tmp_path / "cache")
    for _ in range(2):
        documents = read_image_tables([path], form, held_out=0.3, cache=cache)
        check_images(documents, form)


def test_parquet_validation_files_are_the_validation_part(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", rows_of(range(8), True))
    held = write_parquet(tmp_path / "held.parquet", rows_of(range(8, COUNT), True))
    documents = read_image_tables([train], GREY, validation=[held])
    assert (len(documents.train), len(documents.validation)) == (8, COUNT - 8)
    check_images(documents, GREY)
    same = write_parquet(tmp_path / "same.parquet", rows_of(range(4), False))
    assert "memorization" in message(read_image_tables, [train], GREY, validation=[same])


def test_parquet_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    rows = rows_of(range(COUNT), True)
    rows[2]["image"] = {"bytes": b"no image", "path": None}
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert "a.parquet row 3" in message(read_image_tables, [path], GREY, held_out=0.3)
    rows[2] = {"image": None, "caption": "picture 2", "other": 2}
    path = write_parquet(tmp_path / "b.parquet", rows)
    assert "b.parquet row 3 has no image" in message(read_image_tables, [path], GREY)
    documents = read_image_tables([path], GREY, held_out=0.3, rules=ABSENT)
    missing = [table.missing()["image"] for table in (documents.train, documents.validation)]
    assert sum(missing) == 1
