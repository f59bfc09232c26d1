"""Tracker for TensorBoard: curves of resumed runs, results, and a missing package."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ddiff_core.tensorboard import TensorBoard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddiff.data.pictures import write_grid
from ddiff.errors import PluginError
from ddiff.training.protocols import ResultTracker, RunResults, Tracker

RECIPE = {"name": "small", "data": {"kind": "text"}}


def start(run_dir: Path) -> Tracker:
    return TensorBoard.build(TensorBoard.Config(), run_dir=str(run_dir), recipe=RECIPE)


def read_events(run_dir: Path) -> EventAccumulator:
    """Read all event files of a run, as TensorBoard does."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def read_curve(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def read_text(events: EventAccumulator, name: str) -> str:
    (event,) = events.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_resumed_run_continues_the_curves_without_repeated_steps(tmp_path: Path) -> None:
    """The second part starts at the checkpoint of step 2; the first part logged four steps."""
    first = start(tmp_path)
    for step in range(1, 5):
        first.log(step, {"train_loss": 1.0})
    second = start(tmp_path)  # the first part was killed: it is not closed
    for step in range(3, 7):
        second.log(step, {"train_loss": 2.0})
    second.close()
    events = read_events(tmp_path)
    assert read_curve(events, "train_loss") == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)
    ]  # fmt: skip
    assert '"kind": "text"' in read_text(events, "recipe")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_results_after_a_finished_training_keep_the_curves(tmp_path: Path) -> None:
    """The process is killed while it evaluates; the next process trains no step."""
    first = start(tmp_path)
    for step in (1, 2):
        first.log(step, {"train_loss": 1.0})
    second = start(tmp_path)
    assert isinstance(second, ResultTracker)
    second.log_results(2, RunResults({"evaluation/ppl": 8.5}))
    second.close()
    events = read_events(tmp_path)
    assert read_curve(events, "train_loss") == [(1, 1.0), (2, 1.0)]
    assert read_curve(events, "evaluation/ppl") == [(2, 8.5)]


def test_samples_are_written_as_text_and_pictures_pixel_by_pixel(tmp_path: Path) -> None:
    picture = tmp_path / "samples-image.png"
    write_grid(str(picture), [np.arange(48, dtype=np.uint8).reshape(4, 4, 3)], ["one"])
    samples = [{"index": 0, "text": "# no title\n<b>"}, {"index": 1, "text": "c"}]
    tracker = start(tmp_path)
    assert isinstance(tracker, ResultTracker)
    tracker.log_results(4, RunResults({}, samples, [picture], tmp_path / "report.html"))
    tracker.close()
    events = read_events(tmp_path)
    # four spaces make a block of code, in which Markdown and HTML have no meaning
    assert read_text(events, "samples/0") == "    index: 0\n    text: # no title\n    <b>"
    assert read_text(events, "samples/1") == "    index: 1\n    text: c"
    (image,) = events.Images("samples-image")
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    np.testing.assert_array_equal(shown, np.asarray(Image.open(picture).convert("RGB")))


def test_repeated_command_without_new_steps_writes_no_event_file(tmp_path: Path) -> None:
    start(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_explained_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PluginError, match=r"pip install 'discrete-diffusion\[tensorboard\]'"):
        start(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_component_is_listed_without_importing_the_package() -> None:
    program = (
        "import sys\nfrom ddiff_core.tensorboard import TensorBoard\n"
        "assert not {'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
