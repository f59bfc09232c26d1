"""Weights & Biases tracker as a recipe component, and the component for no tracker.

A tracker sends the metrics and the results of a run to a service. Every run also writes its metrics
to `metrics.jsonl`.
"""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ddiff import ComponentConfig, NoTracker, PluginError, RunResults, Tracker

# Modes that wandb.init accepts.
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


class Disabled:
    """No tracker: metrics are written to `metrics.jsonl` only."""

    class Config(ComponentConfig):
        """Empty: this tracker has no keys."""

    @staticmethod
    def build(config: Config, *, run_dir: str, recipe: Mapping[str, Any]) -> NoTracker:
        return NoTracker()


class WeightsAndBiases:
    """Weights & Biases tracker.

    The id of the run in wandb is stored in the run directory, so that a resumed run continues the
    same wandb run. The resolved recipe is the config of the wandb run.
    """

    # Names in the run directory that --fresh removes.
    writes = ("wandb", "wandb_id", "wandb_step")

    class Config(ComponentConfig):
        mode: Literal["auto", "online", "offline", "off"] = "auto"
        """Mode; "auto" is WANDB_MODE if set, else "online" if logged in to wandb, else "off"."""
        project: str = "ddiff"
        """Name of the project in wandb."""
        entity: str | None = None
        """Name of the user or team in wandb."""

    @staticmethod
    def build(config: Config, *, run_dir: str, recipe: Mapping[str, Any]) -> Tracker:
        mode: str = config.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_login() else "off")
        if mode in ("off", "disabled"):
            return NoTracker()
        if mode not in MODES:
            raise PluginError(
                f'tracker "wandb": WANDB_MODE must be one of {", ".join(MODES)}; got {mode!r}. '
                "Unset WANDB_MODE, or set [tracker] mode."
            )
        return WandbTracker(mode, config.project, config.entity, run_dir, recipe)


class WandbTracker:
    """Tracker that logs the metrics and results of one run to wandb.

    Raises PluginError if wandb cannot start the run.
    """

    def __init__(
        self, mode: str, project: str, entity: str | None, run_dir: str, recipe: Mapping[str, Any]
    ) -> None:
        import wandb

        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=project,
                entity=entity,
                dir=run_dir,
                id=_run_id(directory),
                resume="allow",
                name=recipe.get("name"),
                config=dict(recipe),
                # a resumed run may have more training steps
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise PluginError(
                f'tracker "wandb" could not start in mode "{mode}": {error} Log in with '
                '`wandb login`, choose mode = "offline" (and `wandb sync` later), or mode = "off".'
            ) from error
        # The step is a metric too, and the axis of every other metric. The counter of wandb
        # would keep the last step in memory, where a kill loses it, and drop a step that it has.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._step_file = directory / "wandb_step"
        # The steps after the newest checkpoint are repeated after a kill. They have been logged.
        self._logged = _read_step(self._step_file)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._logged:
            return
        self._run.log({"step": step, **metrics})
        _write_whole(self._step_file, str(step))

    def log_results(self, step: int, results: RunResults) -> None:
        """Log figures, samples as a table, pictures as images and the report as HTML."""
        import wandb

        logged: dict[str, Any] = {"step": step, **results.figures}
        if results.samples:
            columns: list[str | int] = [*results.samples[0]]
            rows = [list(sample.values()) for sample in results.samples]
            logged["samples"] = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        for path in results.pictures:
            logged[path.stem] = wandb.Image(str(path))
        if results.report is not None:
            # `inject` would add a style sheet of wandb to the page
            logged["report"] = wandb.Html(results.report.read_text(encoding="utf-8"), inject=False)
        self._run.log(logged)

    def close(self) -> None:
        self._run.finish()


def has_login() -> bool:
    """Return whether the environment or the netrc file has a login for wandb.

    wandb is not imported, since the import takes seconds.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        entries = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return host in entries.hosts


def _run_id(run_dir: Path) -> str:
    """Return the id of the run in wandb, and write it to a file if the run is new."""
    path = run_dir / "wandb_id"
    if not path.exists():
        _write_whole(path, uuid.uuid4().hex[:8])
    return path.read_text()


def _read_step(path: Path) -> int:
    """Return the last logged step, or 0 for a new run."""
    return int(path.read_text()) if path.exists() else 0


def _write_whole(path: Path, text: str) -> None:
    # written to a temporary file and renamed, so that a killed process leaves no empty file
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
