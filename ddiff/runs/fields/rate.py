"""Bounds of a text through a vector of its sample: rate plus distortion, as report and table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ddiff.core.field_targets import ThroughTarget
from ddiff.evaluation.fields import Interval, JointEvaluation, RateDistortion

RATE_DISTORTION = "rate_distortion"
"""Key of evaluation.json with the parts of such a bound."""


def describe_mean(bound: JointEvaluation | RateDistortion) -> str:
    """Return a bound in nats per sample with half its interval, and the number of samples."""
    half = ""
    if bound.interval is not None:
        low, high = bound.interval
        half = f" ± {(high - low) / 2:.4f}"
    return f"{bound.nats_per_sample:.4f}{half} nats per sample, {bound.samples:,} samples"


@dataclass(frozen=True, repr=False)
class ThroughEvaluation:
    """Bound of a text through a vector.

    Attributes:
        target: the fields.
        bound: rate plus distortion of the validation samples.
        entropy: true entropy of the text in nats per sample, a lower limit for every model; None:
            unknown.
        left_out: number of validation samples that lack one of the fields.
    """

    target: ThroughTarget
    bound: RateDistortion
    entropy: float | None = None
    left_out: int = 0

    def __repr__(self) -> str:
        rate = f"rate {self.bound.rate:.4f}, distortion {self.bound.distortion:.4f}"
        return f"ThroughEvaluation({describe_mean(self.bound)}; {rate})"

    @property
    def is_below_entropy(self) -> bool:
        """True if the whole interval of the bound lies below the true entropy."""
        if self.entropy is None or self.bound.interval is None:
            return False
        return self.bound.interval[1] < self.entropy

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, with all keys of the other targets."""
        found = self.bound
        parts = {
            **self.target._asdict(),
            "deviation": found.deviation,
            "time": found.time,
            "rate": found.rate,
            "rate_interval": _plain(found.rate_interval),
            "distortion": found.distortion,
            "distortion_interval": _plain(found.distortion_interval),
            "nats_per_token": found.nats_per_token,
            "token_interval": _plain(found.token_interval),
            "tokens": found.tokens,
        }
        return {
            "nats_per_sample": found.nats_per_sample,
            "interval": _plain(found.interval),
            "monte_carlo_interval": _plain(found.monte_carlo_interval),
            "samples": found.samples,
            "fields": {},
            RATE_DISTORTION: parts,
            "entropy_nats_per_sample": self.entropy,
            "is_below_entropy": self.is_below_entropy,
            "left_out": self.left_out,
            "own_vectors": [],
            "notes": {},
            "controls": {},
            "untrained_controls": {},
        }


def list_parts(
    parts: Mapping[str, Any] | None,
) -> Iterator[tuple[str, float, list[float] | None, str]]:
    """Return label, mean, interval and unit of the parts of a bound in evaluation.json.

    `parts`: value of the key `rate_distortion`; None for other bounds, which have no such parts.
    """
    if parts is None:
        return
    text = parts["text"]
    latent = parts["latent"]
    noise = f"noise of deviation {parts['deviation']:g}"
    yield (
        "rate",
        parts["rate"],
        parts["rate_interval"],
        f"per sample, of {latent} with {noise}",
    )
    yield (
        "distortion",
        parts["distortion"],
        parts["distortion_interval"],
        f"per sample, of {text} given {latent} with {noise}",
    )
    yield (
        text,
        parts["nats_per_token"],
        parts["token_interval"],
        f"per token, rate plus distortion: a bound of {text}",
    )


def _plain(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
