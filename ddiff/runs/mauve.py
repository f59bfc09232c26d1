"""MAUVE of samples, with the features of a judge or of an encoder of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddiff.data.cache import Cache
from ddiff.data.encoding import TEXTS_AT_ONCE, Encoder, get_positions
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.mauve import FEWEST, measure_mauve
from ddiff.plugin.loader import survey_plugins
from ddiff.progress import show_progress
from ddiff.recipe.resolve import configure_component
from ddiff.runs.encode import build_encoder
from ddiff.runs.run import Run

SENTENCE_MODEL = "modules.json"
"""File of the directories that the package sentence-transformers saves."""

# Names of registered encoders that read a directory or a name on the hub.
_OF_SENTENCES = "sentence_transformers"
_OF_MODELS = "transformers"


@dataclass(frozen=True)
class TextFeatures:
    """Encoder of texts, which gives the features of MAUVE.

    Attributes:
        name: name in records: the argument of `open_features`.
        component: kind, plugin and version of the encoder.
        encoder: the encoder.
    """

    name: str
    component: str
    encoder: Encoder

    def describe(self) -> dict[str, Any]:
        """Return the name and the fingerprint of the encoder for a record."""
        return {
            "encoder": self.name,
            "component": self.component,
            "fingerprint": self.encoder.fingerprint,
            "dim": self.encoder.dim,
        }

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], int]:
        """Return the vectors [N,D] of texts, and the number of texts without a vector.

        A text without a vector has the vector 0.
        """
        found = []
        with show_progress(len(texts), "encoding") as bar:
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                part = texts[start : start + TEXTS_AT_ONCE]
                found.append(self.encoder.encode(part))
                bar.advance(len(part))
        vectors = np.concatenate(found).astype(np.float64)
        missing = np.isnan(vectors).any(1)
        vectors[missing] = 0.0
        return vectors, int(missing.sum())


def open_features(name: str, run: Run) -> TextFeatures:
    """Open an encoder of texts.

    Args:
        name: directory of a sentence-transformers or transformers model, kind of a registered
            encoder that needs no settings, such as "cooccurrence", or name on the hub.
        run: run whose text, tokenizer and device an encoder may use.

    Raises ArgumentError or DataError if there is no such encoder, or if it gives several vectors
    per text.
    """
    registry = survey_plugins().registry
    kinds = registry.names("encoder")
    kind = name
    settings: dict[str, str] = {}
    if (Path(name) / SENTENCE_MODEL).is_file():
        kind = _OF_SENTENCES
        settings = {"path": name}
    elif Path(name).is_dir() or name not in kinds:
        kind = _OF_MODELS
        settings = {"path": name}
    elif "path" in registry.component("encoder", name).config_class().model_fields:
        raise ArgumentError(
            f'--features {name}: the encoder "{name}" reads a model, so give the directory or the '
            "name of the model in its place, such as --features models/all-MiniLM-L6-v2."
        )
    component = registry.component("encoder", kind)
    spec = configure_component(component, defaults=settings)
    inputs = {
        "documents": run.data.documents,
        "tokenizer": run.tokenizer,
        # rows are packed only for an encoder that uses them
        "rows": run.data.train_rows if spec.takes_input("rows") else None,
        "device": run.device,
        "cache": Cache(),
    }
    try:
        encoder = build_encoder(spec, inputs)
    except DataError as error:
        raise DataError(
            f"--features {name}: {error} Encoders without a model: "
            f"{', '.join(_without_model(kinds))}."
        ) from error
    if get_positions(encoder) is not None:
        raise ArgumentError(
            f"--features {name}: MAUVE needs one vector per text; the {component} gives several. "
            "Use another encoder."
        )
    return TextFeatures(name, str(component), encoder)


def _without_model(kinds: Sequence[str]) -> list[str]:
    return [kind for kind in kinds if kind not in (_OF_SENTENCES, _OF_MODELS)]


def check_counts(samples: int, held_out: int) -> None:
    """Raise ArgumentError if there are too few samples or held-out rows for MAUVE."""
    if min(samples, held_out) < FEWEST:
        raise ArgumentError(
            f"--features: MAUVE needs at least {FEWEST} samples and {FEWEST} rows of held-out "
            f"text; got {samples} samples and {held_out} rows. Set --count {FEWEST} or more, or "
            "leave out --features."
        )


def compare_texts(
    features: TextFeatures,
    samples: Sequence[str],
    held_out: Sequence[str],
    others: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """Return MAUVE of texts for a record.

    Args:
        features: encoder of the texts.
        samples: texts of the samples.
        held_out: texts of held-out rows.
        others: texts of as many other held-out rows; None if there are none.
        seed: first seed of k-means.
    """
    ours, missing = features.encode(samples)
    theirs, absent = features.encode(held_out)
    reference = None if others is None else features.encode(others)[0]
    return {
        **compare_features(ours, theirs, reference, seed),
        "features": {**features.describe(), "texts_without_vector": missing + absent},
    }


def compare_features(
    ours: NDArray[np.floating],
    theirs: NDArray[np.floating],
    others: NDArray[np.floating] | None,
    seed: int,
) -> dict[str, Any]:
    """Return MAUVE of feature vectors for a record.

    The arguments are the features of the texts of `compare_texts`. `held_out_value` is MAUVE of the
    other held-out rows in place of the samples: the value of samples that are as good as text.
    """
    found = measure_mauve(ours, theirs, seed=seed)
    best = None if others is None else measure_mauve(others, theirs, seed=seed).value
    return {
        **asdict(found),
        "held_out_value": best,
        "samples": len(ours),
        "held_out": len(theirs),
    }
