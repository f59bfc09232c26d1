"""generation.json: a versioned schema, in which a perplexity has the entropy of its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddiff.errors import CheckpointError
from ddiff.run_dir.evaluation_record import Figure, dump_figures
from ddiff.run_dir.files import read_json
from ddiff.run_dir.generation_record import (
    GENERATION_VERSION,
    GenerationRecord,
    make_generation_figures,
    make_generation_protocol,
)


def mean(value: float, interval: list[float] | None = None) -> dict[str, Any]:
    return {"value": value, "interval": interval, "count": 4}


def part(entropy: float) -> dict[str, Any]:
    return {
        "count": 4,
        "lengths": [8, 8.0, 8],
        "distinct": {"1": 0.5, "2": 0.75},
        "repetition": {"2": mean(0.25, [0.2, 0.3])},
        "self_bleu": None,
        "known_words": mean(0.9),
        "entropy_nats": mean(entropy, [entropy - 0.1, entropy + 0.1]),
        "pooled_entropy_nats": entropy + 1.0,
    }


def perplexity(corpus: float, entropy: float) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "corpus_interval": [corpus - 1.0, corpus + 1.0],
        "per_sample": mean(corpus + 2.0),
        "entropy_nats": mean(entropy),
        "tokens": 30,
        "unscored": 0,
    }


OLD: dict[str, Any] = {
    "schema_version": 1,
    "run": "small",
    "step": 10,
    "weights": "ema",
    "tokenizer": "abc",
    "unit": "token",
    "sampling": {
        "steps": 4,
        "count": 4,
        "seed": 0,
        "sampler": {"kind": "ancestral", "temperature": 0.9},
        "length": 8,
        "nfe": 3.5,
        "dtype": "float32",
        "precision": "bfloat16",
        "device": "cpu",
        "seconds": 1.5,
    },
    "samples": part(1.5),
    "held_out": {**part(1.75), "known_words": None, "rows": "def"},
    "self_correction": {"accuracy": mean(0.8), "curve": [0.8, 0.9], "rounds": 1},
    "judge": {
        "protocol": {"judge": "a judge", "retokenized": True},
        "samples": perplexity(20.0, 1.5),
        "held_out": perplexity(10.0, 1.75),
        "mauve": {"value": 0.5, "samples": 4, "held_out": 4},
    },
}


def new(old: dict[str, Any]) -> dict[str, Any]:
    """Return the content of version 2, as `ddiff eval --generate` writes it."""
    sampling = dict(old["sampling"])
    del sampling["seconds"], sampling["device"]
    tree = {**old, "schema_version": GENERATION_VERSION, "sampling": sampling}
    return {
        **tree,
        "figures": dump_figures(make_generation_figures(tree)),
        "protocol": make_generation_protocol(tree),
        "fingerprints": {"weights": "123"},
        "components": {"process": "a (b, c 1.0)"},
        "findings": None,
        "provenance": {"command": "ddiff eval", "seconds": 1.5, "hardware": {"device": "cpu"}},
    }


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "generation.json"
    path.write_text(json.dumps(tree))
    return path


def test_record_survives_a_json_round_trip_to_the_last_bit() -> None:
    record = GenerationRecord.from_tree(new(OLD))
    written = json.loads(record.model_dump_json())
    assert GenerationRecord.from_tree(written) == record
    assert written == json.loads(json.dumps(new(OLD)))


def test_figures_have_value_interval_unit_and_protocol() -> None:
    figures = GenerationRecord.from_tree(new(OLD)).figures
    own = "4 samples of 8 tokens"
    rows = "4 rows of held-out text"
    judge = "judge a judge, texts tokenized again"
    assert figures["entropy"] == Figure(
        value=1.5, interval=(1.4, 1.6), unit="nats/sample", protocol=own
    )
    assert figures["held_out: entropy"].protocol == rows
    assert figures["perplexity"] == Figure(
        value=20.0,
        interval=(19.0, 21.0),
        unit="perplexity per token of the judge",
        protocol=f"{own}, {judge}",
    )
    assert figures["held_out: perplexity"].protocol == f"{rows}, {judge}"
    assert figures["mauve"].protocol == f"{own}, {rows}, {judge}"
    values = {name: figure.value for name, figure in figures.items()}
    assert values == {
        "entropy": 1.5,
        "entropy_pooled": 2.5,
        "known_words": 0.9,
        "distinct_1": 0.5,
        "distinct_2": 0.75,
        "repetition_2": 0.25,
        "nfe": 3.5,
        "self_correction_accuracy": 0.8,
        "perplexity": 20.0,
        "perplexity_mean_of_samples": 22.0,
        "mauve": 0.5,
        "held_out: entropy": 1.75,
        "held_out: entropy_pooled": 2.75,
        "held_out: distinct_1": 0.5,
        "held_out: distinct_2": 0.75,
        "held_out: repetition_2": 0.25,
        "held_out: perplexity": 10.0,
        "held_out: perplexity_mean_of_samples": 12.0,
    }


def test_generation_protocol_excludes_the_sampler() -> None:
    protocol = GenerationRecord.from_tree(new(OLD)).protocol
    assert protocol == {
        "count": 4,
        "length": 8,
        "unit": "token",
        "tokenizer": "abc",
        "data": "def",
        "judge": {"judge": "a judge", "retokenized": True},
    }
    assert "judge" not in make_generation_protocol({**OLD, "judge": None})


# ---------------------------------------------------------------------- perplexity and entropy


@pytest.mark.parametrize(
    ("entropy", "perplexity"),
    [
        ("entropy", "perplexity"),
        ("held_out: entropy", "held_out: perplexity"),
    ],
)
def test_perplexity_without_the_entropy_of_its_samples_is_refused(
    entropy: str, perplexity: str, tmp_path: Path
) -> None:
    tree = new(OLD)
    del tree["figures"][entropy]
    with pytest.raises(ValueError, match=f'"{perplexity}" is a perplexity.*"{entropy}" is missing'):
        GenerationRecord.from_tree(tree)
    with pytest.raises(CheckpointError, match=f'damaged: the figure "{perplexity}"'):
        read_json(write(tmp_path, tree))


def test_perplexity_with_the_entropy_of_other_rows_only_is_refused() -> None:
    tree = new(OLD)
    figure = tree["figures"]["perplexity"]
    tree["figures"] = {"perplexity": figure, "held_out: entropy": figure}
    with pytest.raises(ValueError, match='"entropy" is missing'):
        GenerationRecord.from_tree(tree)


def test_findings_of_a_judge_without_entropy_are_refused() -> None:
    tree = new(OLD)
    samples = {"corpus": 20.0}
    tree["judge"] = {**tree["judge"], "samples": samples}
    with pytest.raises(ValueError, match=r'"judge\.samples\.entropy_nats" is invalid'):
        GenerationRecord.from_tree(tree)


# ---------------------------------------------------------------------- versions and damage


def test_file_of_version_1_is_read_with_the_figures_of_version_2(tmp_path: Path) -> None:
    found = read_json(write(tmp_path, OLD))
    old = GenerationRecord.from_tree(found)
    record = GenerationRecord.from_tree(new(OLD))
    assert old.schema_version == 1
    assert old.figures == record.figures
    assert old.protocol == record.protocol
    assert old.sampling == record.sampling
    assert old.provenance.seconds == 1.5
    assert old.provenance.hardware == {"device": "cpu"}


def test_file_of_a_newer_version_is_refused_even_if_its_shape_differs(tmp_path: Path) -> None:
    path = write(tmp_path, {"schema_version": GENERATION_VERSION + 1, "all": "new"})
    with pytest.raises(CheckpointError, match=f"newer version.*{GENERATION_VERSION + 1}.*up to"):
        read_json(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("figures", {"entropy": {"value": "1.0", "unit": "nats", "protocol": "a"}}),
        ("weights", "best"),
        ("fingerprints", {"judge": 3}),
        ("sampling", {**new(OLD)["sampling"], "seed": "zero"}),
        ("sampling", {"nfe": 1.0, "length": 8}),
        ("judge", {**OLD["judge"], "protocol": None}),
        ("provenance", {"seconds": "long"}),
        ("run", 3),
    ],
)
def test_error_about_an_invalid_generation_record_names_the_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, new(OLD) | {key: value})
    with pytest.raises(CheckpointError, match=rf'damaged: the key "{key}'):
        read_json(path)


def test_version_1_without_a_figure_is_named_as_damaged(tmp_path: Path) -> None:
    path = write(tmp_path, {**OLD, "unit": None})
    with pytest.raises(CheckpointError, match=r"generation\.json is damaged"):
        read_json(path)
