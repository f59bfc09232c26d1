"""evaluation.json: a versioned schema that reads older files and refuses newer ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ddiff.errors import CheckpointError
from ddiff.run_dir.evaluation_record import (
    SCHEMA_VERSION,
    EvaluationRecord,
    Figure,
    make_figures,
)
from ddiff.run_dir.files import read_json

OLD: dict[str, Any] = {
    "step": 10,
    "weights": "ema",
    "nelbo_nats_per_token": 1.1,
    "interval": [1.0, 1.2],
    "monte_carlo_interval": None,
    "ppl": math.exp(1.1),
    "bits_per_byte": 0.55,
    "terms_nats_per_token": {"closing": 0.1, "diffusion": 0.9, "decoding": 0.1},
    "parts_nats_per_token": {"diffusion": 0.9},
    "tokens": 30,
    "documents": 3,
    "unit": "token",
    "bound": "NELBO",
    "protocol": {"draws": 1, "window": [0.001, 0.999]},
    "baselines": {"unigram_nats_per_token": 2.0, "bigram_nats_per_token": 1.5},
    "entropy_rate_nats_per_token": None,
}
FIELDS: dict[str, Any] = {
    "step": 10,
    "weights": "trained",
    "protocol": {},
    "units": {"text": "token", "image": "pixel"},
    "targets": {
        "joint": {
            "nats_per_sample": 30.0,
            "interval": [29.0, 31.0],
            "samples": 4,
            "fields": {
                "text": {"nats_per_item": 2.0, "interval": None, "items": 5, "terms": {"a": 1.0}}
            },
            "controls": {},
        }
    },
}


def new(old: dict[str, Any]) -> dict[str, Any]:
    figures = {name: figure.model_dump() for name, figure in make_figures(old).items()}
    return old | {"schema_version": SCHEMA_VERSION, "figures": figures}


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "evaluation.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize("tree", [OLD, FIELDS], ids=["text", "fields"])
def test_record_survives_a_json_round_trip_to_the_last_bit(tree: dict[str, Any]) -> None:
    record = EvaluationRecord.from_tree(new(tree))
    written = json.loads(record.model_dump_json())
    assert EvaluationRecord.from_tree(written) == record
    assert written.items() >= json.loads(json.dumps(new(tree))).items()


def test_figures_of_a_text_have_value_interval_unit_and_protocol() -> None:
    figures = make_figures(OLD, "named")
    assert figures["nelbo"] == Figure(
        value=1.1, interval=(1.0, 1.2), unit="nats/token", protocol="named"
    )
    assert figures["ppl"].interval == (math.exp(1.0), math.exp(1.2))
    bits = figures["bits_per_byte"].interval
    assert bits is not None
    assert bits == pytest.approx((0.5, 0.6), rel=1e-12)
    assert figures["unigram"].value == 2.0
    assert "entropy_rate" not in figures


def test_figures_of_fields_have_the_unit_of_their_field() -> None:
    figures = make_figures(FIELDS)
    assert figures["joint"].unit == "nats/sample"
    assert figures["joint: text"].unit == "nats/token"


@pytest.mark.parametrize("tree", [OLD, FIELDS], ids=["text", "fields"])
def test_file_of_version_1_is_read_with_the_figures_of_version_2(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    found = read_json(write(tmp_path, tree))
    old = EvaluationRecord.from_tree(found)
    assert old.schema_version == 1
    assert old.figures == EvaluationRecord.from_tree(new(tree)).figures


def test_file_of_a_newer_version_is_refused_even_if_its_shape_differs(tmp_path: Path) -> None:
    path = write(tmp_path, {"schema_version": SCHEMA_VERSION + 1, "all": "new"})
    with pytest.raises(CheckpointError, match=f"newer version.*{SCHEMA_VERSION + 1}.*up to"):
        read_json(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("figures", {"nelbo": {"value": "1.0", "unit": "nats", "protocol": "validation"}}),
        ("figures", {"nelbo": {"value": 1.0, "protocol": "validation"}}),
        ("figures", {"nelbo": {"value": 1.0, "interval": [1.0], "unit": "a", "protocol": "b"}}),
        ("weights", "best"),
        ("fingerprints", {"tokenizer": 3}),
        ("provenance", {"seconds": "long"}),
        ("schema_version", "two"),
    ],
)
def test_error_about_an_invalid_record_names_the_key(key: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path, new(OLD) | {key: value})
    with pytest.raises(CheckpointError, match=rf'damaged: the key "{key}'):
        read_json(path)
