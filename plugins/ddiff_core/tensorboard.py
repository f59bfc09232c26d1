"""TensorBoard tracker as a recipe component. It needs the optional package tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddiff import ComponentConfig, PluginError, RunResults, Tracker

FOLDER = "tensorboard"


class TensorBoard:
    """TensorBoard tracker, whose event files are in the folder `tensorboard` of the run.

    `tensorboard --logdir runs` shows the runs of a folder.
    """

    # Names in the run directory that --fresh removes.
    writes = (FOLDER,)

    class Config(ComponentConfig):
        """Empty: this tracker has no keys."""

    @staticmethod
    def build(config: Config, *, run_dir: str, recipe: Mapping[str, Any]) -> Tracker:
        try:
            # imported before training starts, so that a missing package is found early
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise PluginError(
                f'tracker "tensorboard" needs the package tensorboard ({error}). Install it with '
                "`pip install 'discrete-diffusion[tensorboard]'`, or choose another tracker: "
                '[tracker] kind = "none".'
            ) from error
        return TensorBoardTracker(Path(run_dir) / FOLDER, recipe)


class TensorBoardTracker:
    """Tracker that writes metrics and results as event files.

    A resumed run writes another file to the same folder. Its first step hides the later steps of
    the files before it, so that no step is in a curve twice.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self._folder = folder
        self._recipe = recipe
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._open(purge_step=step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        # A kill then loses no metrics before the newest checkpoint, which are not logged again.
        writer.flush()

    def log_results(self, step: int, results: RunResults) -> None:
        """Write figures as scalars, samples as texts and pictures as images.

        TensorBoard cannot show the report.
        """
        writer = self._open(purge_step=None)
        for name, value in results.figures.items():
            writer.add_scalar(name, value, step)
        for number, sample in enumerate(results.samples):
            lines = "\n".join(f"{key}: {value}" for key, value in sample.items())
            writer.add_text(f"samples/{number}", _quote(lines), step)
        for path in results.pictures:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None) -> Any:
        """Return the writer, which is opened when the first step is known.

        `purge_step`: events of this step and of later steps in older files are not shown.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            is_new = not self._folder.exists()
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
            if is_new:
                recipe = json.dumps(self._recipe, indent=2, ensure_ascii=False)
                self._writer.add_text("recipe", _quote(recipe), 0)
        return self._writer


def _quote(text: str) -> str:
    """Indent a text, so that TensorBoard shows it as it is instead of as Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
