"""The engine's trackers as components of a recipe. `metrics.jsonl` is written whichever is chosen."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ddiff import ComponentConfig, NoTracker, PluginError, Tracker

MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # that wandb takes


class Nothing:
    """No tracker."""

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, run_dir: str, recipe: Mapping[str, Any]) -> NoTracker:
        return NoTracker()


class WeightsAndBiases:
    """Weights & Biases: `mode` "auto" sends when there is a login or WANDB_MODE says how, and is off otherwise.

    A run that goes on after an end goes on under the same id, which the run directory keeps.
    """

    writes = ("wandb", "wandb_id")  # names in the run directory, so that --fresh knows them

    class Config(ComponentConfig):
        mode: Literal["auto", "online", "offline", "off"] = "auto"
        project: str = "ddiff"
        entity: str | None = None

    @staticmethod
    def build(config: Config, *, run_dir: str, recipe: Mapping[str, Any]) -> Tracker:
        mode = config.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_login() else "off")  # type: ignore[assignment]
        if mode in ("off", "disabled"):
            return NoTracker()
        if mode not in MODES:
            raise PluginError(
                f'tracker "wandb": WANDB_MODE must be one of {", ".join(MODES)}; got {mode!r}. '
                "Unset it, or set [tracker] mode."
            )
        return WandbTracker(mode, config.project, config.entity, run_dir, recipe)


class WandbTracker:
    """A run of the wandb library. Raises PluginError when wandb will not start it."""

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
                f'tracker "wandb" could not start in mode "{mode}": {error} Log in with `wandb login`, choose '
                'mode = "offline" (and `wandb sync` later), or mode = "off".'
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def has_login() -> bool:
    """Whether wandb would find a key: in the environment or in the netrc file of `wandb login`; wandb is not imported."""
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
        part = path.with_suffix(".part")
        part.write_text(uuid.uuid4().hex[:8])
        part.replace(path)
    return path.read_text()
