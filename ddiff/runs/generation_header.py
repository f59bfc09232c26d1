"""Content of generation.json: settings of the sampler, figures, fingerprints and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddiff.evaluation.judge_model import JudgeModel
from ddiff.recipe.resolve import configure_sampler
from ddiff.run_dir.evaluation_record import dump_figures
from ddiff.run_dir.generation_record import (
    GENERATION_VERSION,
    make_generation_figures,
    make_generation_protocol,
)
from ddiff.runs.evaluation_header import (
    describe_components,
    describe_provenance,
    fingerprint_weights,
)
from ddiff.runs.provenance import component_fingerprints
from ddiff.runs.run import Run
from ddiff.runs.sampling import build_sampler


def describe_generation(
    run: Run, parts: Mapping[str, Any], judge: JudgeModel | None, seconds: float
) -> dict[str, Any]:
    """Return the content of generation.json.

    Args:
        run: the run that drew the samples.
        parts: `sampling`, `samples`, `held_out`, `self_correction`, `mauve`, `judge` and `findings`
            of the file.
        judge: the judge of the samples, if there is one.
        seconds: duration of sampling and evaluation.
    """
    tree = {
        "run": run.recipe.name,
        "step": run.step,
        "weights": "ema" if run.uses_ema else "trained",
        "tokenizer": run.tokenizer.fingerprint,
        "unit": run.tokenizer.unit,
        **parts,
    }
    return {
        "schema_version": GENERATION_VERSION,
        "figures": dump_figures(make_generation_figures(tree)),
        "protocol": make_generation_protocol(tree),
        "fingerprints": {
            "weights": fingerprint_weights(run),
            **component_fingerprints(run.data, run.model),
            "validation rows": run.data.validation_rows.fingerprint,
            **_fingerprint_judge(judge),
            **_fingerprint_encoder(parts),
        },
        "components": describe_components(run),
        **tree,
        "provenance": describe_provenance(run, seconds),
    }


def describe_sampling(run: Run, drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sampler and all settings on which the samples depend.

    `drawn`: the samples. `steps` is None if the sampler does not depend on it.
    """
    weights = next(run.denoiser.parameters()).dtype
    steps = build_sampler(run.recipe, run.model).steps
    if steps is None and configure_sampler(run.recipe).takes_input("steps"):
        steps = run.recipe.sample.steps  # per block or window, such as those of `blockwise`
    other_clock = {} if run.clock_source == "recipe" else {"clock": run.clock_source}
    return {
        **run.recipe.to_dict()["sample"],
        **other_clock,
        "steps": steps,
        "count": len(drawn),
        "length": run.recipe.length,
        "nfe": sum(sample["nfe"] for sample in drawn) / len(drawn),
        "dtype": str(weights).removeprefix("torch."),
        "precision": str(run.precision or weights).removeprefix("torch."),
    }


def _fingerprint_judge(judge: JudgeModel | None) -> dict[str, str]:
    """Return the fingerprints of a judge, as far as its protocol has them."""
    if judge is None:
        return {}
    found = {"judge": judge.protocol.get("model"), "judge tokenizer": judge.protocol["tokenizer"]}
    return {name: str(value) for name, value in found.items() if value is not None}


def _fingerprint_encoder(parts: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprint of the encoder that gave the features of MAUVE."""
    found = parts["mauve"]
    return {} if found is None else {"encoder of MAUVE": found["features"]["fingerprint"]}
