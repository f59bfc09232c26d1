"""Trackers of the engine as recipe components. `metrics.jsonl` is written with any of them."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ddiff import ComponentConfig, NoTracker, PluginError, Tracker

MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # of wandb.init


class Disabled:
    """No tracker."""

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, run_dir: str, recipe: Mapping[str, Any]) -> NoTracker:
        return NoTracker()


class WeightsAndBiases:
    """Weights & Biases.

    A resumed run continues under its id, which is stored in the run directory.
    """

    writes = ("wandb", "wandb_id")  # names in the run directory, which --fresh removes

    class Config(ComponentConfig):
        mode: Literal["auto", "online", "offline", "off"] = "auto"
        """With "auto": WANDB_MODE if set, else "online" if logged in to wandb, else "off"."""
        project: str = "ddiff"
        """Project in wandb."""
        entity: str | None = None
        """User or team in wandb."""

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
                "Unset it, or set [tracker] mode."
            )
        return WandbTracker(mode, config.project, config.entity, run_dir, recipe)


class WandbTracker:
    """Tracker of one wandb run. Raises PluginError if wandb cannot start the run."""

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
    """Return whether wandb would find a key in the environment or in the netrc file.

    wandb itself is not imported, since that takes seconds.
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
        # Written aside and renamed, so that a killed process never leaves an empty id.
        part = path.with_suffix(".part")
        part.write_text(uuid.uuid4().hex[:8])
        part.replace(path)
    return path.read_text()
