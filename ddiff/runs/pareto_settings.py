"""Settings of a sweep: the samplers, steps and temperatures at which a run draws samples.

All settings are checked before anything is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddiff.errors import ArgumentError, DdiffError, PluginError, shorten
from ddiff.plugin.config import COUNTS
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.resolve import configure_sampler
from ddiff.run_dir.pareto_record import make_key
from ddiff.runs.run import Run
from ddiff.runs.sampling import make_plan
from ddiff.sampling.loop import Sampler

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
"""Default temperatures."""

TEMPERATURE = "temperature"
"""Key of a sampler that a sweep varies."""

_DIVISORS = (8, 4, 2, 1)  # of [sample] steps, for the default numbers of steps
LARGEST_TEMPERATURE = 100.0  # far above it, every token has the same probability


@dataclass(frozen=True)
class SweepGrid:
    """Requested settings of the samplers.

    Attributes:
        steps: numbers of steps; None for an eighth, a quarter, a half and all of [sample] steps.
        temperatures: temperatures; None for `TEMPERATURES`.
        samplers: kinds of samplers; empty for the sampler of the recipe.
        settings: "key=value" texts that replace other keys of every sampler.
    """

    steps: Sequence[int] | None = None
    temperatures: Sequence[float] | None = None
    samplers: Sequence[str] = ()
    settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        for steps in self.steps or ():
            if not 1 <= steps < COUNTS:
                raise ArgumentError(
                    f"ddiff pareto: --steps must be integers from 1 to 2^31 - 1; got {steps}."
                )
        for value in self.temperatures or ():
            if not 0.0 <= value <= LARGEST_TEMPERATURE:  # False for NaN
                raise ArgumentError(
                    "ddiff pareto: --temperature must be numbers from 0 to "
                    f"{LARGEST_TEMPERATURE:g}; got {value}. 0 takes the most likely token, and 1 "
                    "changes nothing."
                )
        if any(text.partition("=")[0].strip() == TEMPERATURE for text in self.settings):
            raise ArgumentError(
                "ddiff pareto: --set temperature=... and the temperatures of the sweep exclude "
                "each other. Use --temperature."
            )


def read_integers(text: str, option: str) -> list[int]:
    """Parse numbers separated by commas, such as "8,16,32". `option`: name for messages."""
    found = []
    for value in _read_numbers(text, option):
        if not value.is_integer():
            raise ArgumentError(f"{option} must be integers separated by commas; got {value:g}.")
        found.append(int(value))
    return found


def read_numbers(text: str, option: str) -> list[float]:
    """Parse numbers separated by commas, such as ".7,.8,1". `option`: name for messages."""
    return _read_numbers(text, option)


def _read_numbers(text: str, option: str) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ArgumentError(
                f"{option} must be numbers separated by commas, such as {option} 8,16; got "
                f"{shorten(text)!r}."
            )
        found.append(value)
    return found


@dataclass(frozen=True)
class SweepSetting:
    """Setting of one point of a sweep.

    Attributes:
        spec: the sampler with its keys.
        sampler: the built sampler.
        steps: number of steps; None if the sampler does not take this setting.
        temperature: temperature of the sampler; None if the sampler has none.
    """

    spec: ComponentSpec
    sampler: Sampler
    steps: int | None
    temperature: float | None

    @property
    def key(self) -> str:
        return make_key(self.spec.to_dict(), self.steps)


def choose_kinds(runs: Sequence[Run], grid: SweepGrid) -> tuple[list[list[str | None]], list[str]]:
    """Choose the kinds of samplers of every run from the requested kinds.

    Returns the kinds of each run, and remarks on kinds that are left out. None is the sampler of
    the recipe. A kind that does not support a run is left out for this run. An autoregressive run,
    which shares no sampler with other runs, then uses the sampler of its recipe. Raises an error
    for a kind that supports no run, and for another run without a kind.
    """
    kinds = list(dict.fromkeys(grid.samplers))
    if not kinds:
        return [[None] for _ in runs], []
    reasons: dict[str, DdiffError] = {}
    used: set[str] = set()
    chosen: list[list[str | None]] = []
    remarks: list[str] = []
    for run in runs:
        suitable: list[str | None] = []
        for kind in kinds:
            try:
                _check_supported(run, kind, grid)
            except (ArgumentError, PluginError) as error:
                reasons[kind] = error
                remarks.append(f"{run.recipe.name}: without the sampler {kind}. {error}")
                continue
            suitable.append(kind)
            used.add(kind)
        if not suitable and run.process is None and len(runs) > 1:
            remarks.append(f"{run.recipe.name}: the sampler of its recipe is used.")
            suitable = [None]
        if not suitable:
            raise reasons[kinds[0]]
        chosen.append(suitable)
    for kind in kinds:
        if kind not in used:
            raise reasons[kind]
    return chosen, remarks


def _check_supported(run: Run, kind: str, grid: SweepGrid) -> None:
    """Raise ArgumentError or PluginError if a sampler does not support the process of a run."""
    spec = configure_sampler(run.recipe, kind, grid.settings)
    sampler = spec.build(steps=run.recipe.sample.steps, vocabulary=run.model.vocabulary)
    sampler.check_supported(run.process, run.denoiser.parameterization.predicts)


def plan_settings(
    run: Run, kinds: Sequence[str | None], grid: SweepGrid, count: int
) -> list[SweepSetting]:
    """Return all settings of a run, after checking that the run can be sampled with each of them.

    Args:
        run: the run.
        kinds: kinds of samplers; None for the sampler of the recipe.
        grid: requested steps, temperatures and other settings.
        count: number of samples of each point.

    Raises ArgumentError if a sampler does not support the process, or has no temperature.
    """
    found: dict[str, SweepSetting] = {}
    for kind in kinds:
        base = configure_sampler(run.recipe, kind, grid.settings)
        all_steps: Sequence[int | None] = [None]
        if base.takes_input("steps"):
            all_steps = grid.steps or _default_steps(run)
        temperatures: Sequence[float | None] = [None]
        if TEMPERATURE in base.component.config_class().model_fields:
            temperatures = grid.temperatures or TEMPERATURES
        elif grid.temperatures:
            raise ArgumentError(
                f"ddiff pareto: the {base.component} has no key temperature, so --temperature "
                f"cannot be used with it. Leave out --temperature, or name other samplers with "
                "--sampler."
            )
        for steps, temperature in itertools.product(all_steps, temperatures):
            setting = _build_setting(run, kind, grid, steps, temperature)
            make_plan(run.recipe, run.model, setting.sampler, None, None, count)
            found[setting.key] = setting  # equal settings are drawn once
    return list(found.values())


def _default_steps(run: Run) -> list[int]:
    """Return an eighth, a quarter, a half and all of [sample] steps, without zero."""
    largest = run.recipe.sample.steps
    return sorted({max(1, largest // divisor) for divisor in _DIVISORS})


def _build_setting(
    run: Run, kind: str | None, grid: SweepGrid, steps: int | None, temperature: float | None
) -> SweepSetting:
    settings = list(grid.settings)
    if temperature is not None:
        settings.append(f"{TEMPERATURE}={float(temperature)!r}")
    spec = configure_sampler(run.recipe, kind, settings)
    # a sampler that does not take the input ignores this number
    given = run.recipe.sample.steps if steps is None else steps
    sampler = spec.build(steps=given, vocabulary=run.model.vocabulary)
    return SweepSetting(spec, sampler, steps, temperature)
