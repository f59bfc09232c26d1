"""Trackers as recipe components. A tracker sends the metrics of a run to a service.

Every run also writes its metrics to `metrics.jsonl`.
"""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ddiff import ComponentConfig, NoTracker, PluginError, Tracker

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
    same wandb run.
    """

    # Names in the run directory that --fresh removes.
    writes = ("wandb", "wandb_id")

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
    """Tracker that logs the metrics of one run to wandb.

    Raises PluginError if wandb cannot start the run.
    """

    def __init__(
        self, mode: str, project: str, entity: str | None, run_dir: str, recipe: Mapping[str, Any]
    ) -> None:
        import wandb

        Path(run_dir).mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=project,
                entity=entity,
                dir=run_dir,
                id=_run_id(Path(run_dir)),
                resume="allow",
                name=recipe.get("name"),
                config=dict(recipe),
            )
        except wandb.Error as error:
            raise PluginError(
                f'tracker "wandb" could not start in mode "{mode}": {error} Log in with '
                '`wandb login`, choose mode = "offline" (and `wandb sync` later), or mode = "off".'
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

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
    path = run_dir / "wandb_id"
    if not path.exists():
        # Written to a temporary file and renamed, so that a killed process leaves no empty id.
        part = path.with_suffix(".part")
        part.write_text(uuid.uuid4().hex[:8])
        part.replace(path)
    return path.read_text()
