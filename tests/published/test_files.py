"""Files of published checkpoints: formats, moving averages, and refusals that name the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from imports import import_run
from reference_forward import (
    EPSILON,
    MDLM,
    ROWS,
    make_tensors,
    write_checkpoint,
    write_family,
)
from safetensors.torch import save_file
from torch import Tensor

import ddiff
from ddiff import DataError
from ddiff.checkpoint.moving_average import align_average
from ddiff.checkpoint.published_files import open_published

EMBEDDING = "backbone.vocab_embed.embedding"


def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}


def write_config(folder: Path, config: Any = MDLM) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_embedding(source: str | Path) -> Tensor:
    return open_published(source).tensors.take(EMBEDDING, ROWS, 32)


# ---------------------------------------------------------------------- formats


def test_safetensors_are_preferred_to_pickled_weights(folder: Path) -> None:
    tensors = write_family(Path("both"), "mdlm")
    torch.save(prefixed(make_tensors(1)), "both/pytorch_model.bin")
    files = open_published("both")
    assert torch.equal(read_embedding("both"), tensors["vocab_embed.embedding"])
    assert set(files.digests) == {"config.json", "model.safetensors"}
    assert files.digests["config.json"].bytes == Path("both/config.json").stat().st_size


def test_pickled_weights_and_single_files_are_read(folder: Path) -> None:
    tensors = prefixed(make_tensors())
    torch.save(tensors, write_config(Path("bin")) / "pytorch_model.bin")
    assert torch.equal(read_embedding("bin"), tensors[EMBEDDING])
    save_file(tensors, "alone.safetensors", {"config": json.dumps(MDLM)})
    assert torch.equal(read_embedding("alone.safetensors"), tensors[EMBEDDING])
    assert open_published("alone.safetensors").config == MDLM


def test_config_yaml_is_read_without_running_its_tags(folder: Path) -> None:
    pytest.importorskip("yaml")
    tensors = make_tensors(has_adaln=False)
    place = write_checkpoint(Path("hydra"), {}, tensors)
    (place / "config.json").unlink()
    (place / "config.yaml").write_text(json.dumps(EPSILON))  # JSON is YAML
    assert open_published(place).config == EPSILON
    (place / "config.yaml").write_text("a: !!python/object/apply:os.mkdir [marker]\n")
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        open_published(place)
    assert not Path("marker").exists()


def test_weights_in_half_precision_become_float32(folder: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in make_tensors().items()}
    write_checkpoint(Path("half"), MDLM, half, "backbone.")
    found = read_embedding("half")
    assert found.dtype == torch.float32
    assert torch.equal(found, half["vocab_embed.embedding"].float())


def test_shards_of_an_index_are_read_as_one_file(folder: Path) -> None:
    tensors = prefixed(make_tensors())
    place = write_config(Path("sharded"))
    names = sorted(tensors)
    halves = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, place / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    files = open_published(place)
    assert set(files.tensors.names) == set(tensors)
    assert torch.equal(read_embedding(place), tensors[EMBEDDING])
    assert set(files.digests) == {"config.json", index.name, *halves}
    (place / "b.safetensors").unlink()
    with pytest.raises(DataError, match=r"lists the file b\.safetensors, which is not"):
        open_published(place)
    index.write_text(json.dumps({"weight_map": {EMBEDDING: "../../both/model.safetensors"}}))
    with pytest.raises(DataError, match="which is not in the folder"):
        open_published(place)


# ---------------------------------------------------------------------- moving averages


@pytest.mark.parametrize("kind", ["lightning", "loop"])
def test_moving_average_replaces_the_trained_weights(folder: Path, kind: str) -> None:
    trained = prefixed(make_tensors(0))
    average = make_tensors(7)
    # The buffer has no average, and the list has no names.
    shadow = [tensor for name, tensor in average.items() if "inv_freq" not in name]
    place = write_config(Path("training"))
    if kind == "lightning":
        content = {"state_dict": trained, "ema": {"shadow_params": shadow}, "global_step": 5000}
        torch.save(content, place / "last.ckpt")
    else:
        ema = {"decay": 0.9999, "num_updates": 9, "shadow_params": shadow}
        torch.save({"model": trained, "ema": ema, "step": 5000}, place / "checkpoint.pth")
    files = open_published(place)
    assert (files.step, files.is_average) == (5000, True)
    for name, tensor in average.items():
        is_buffer = "inv_freq" in name
        expected = trained[f"backbone.{name}"] if is_buffer else tensor
        assert torch.equal(files.tensors.take(f"backbone.{name}", *tensor.shape), expected)
    run = import_run(place)
    assert run.step == 5000
    assert torch.equal(
        run.denoiser.state_dict()["head.bias"], average["output_layer.linear.bias"][:11]
    )


def test_moving_averages_without_a_unique_order_are_refused() -> None:
    state = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.zeros(3)}
    with pytest.raises(DataError, match="in more than one way"):
        align_average(state, [torch.zeros(2), torch.zeros(3)], "file")
    with pytest.raises(DataError, match="in no way"):
        align_average(state, [torch.zeros(4)], "file")
    found = align_average(state, [torch.full((3,), 5.0)], "file")
    assert {name: float(tensor[0]) for name, tensor in found.items()} == {"a": 0, "b": 1, "c": 5}


# ---------------------------------------------------------------------- refusals


class Payload:
    """Object whose pickle creates a file when it is loaded with full pickle."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("marker",)


def test_pickle_with_code_is_refused_and_not_run(folder: Path) -> None:
    place = write_config(Path("evil"))
    torch.save({"state_dict": prefixed(make_tensors()), "extra": Payload()}, place / "last.ckpt")
    with pytest.raises(DataError, match=r"last\.ckpt is damaged, or has pickled objects") as found:
        ddiff.import_published(place, "runs/evil")
    assert "weights_only=False" in str(found.value)
    assert not Path("marker").exists()
    assert not Path("runs").exists()
    # The file does run code where it is trusted, so that the refusal was needed.
    torch.load(place / "last.ckpt", weights_only=False)
    assert Path("marker").exists()


def damage_empty(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "config.json").unlink()


def damage_text(place: Path) -> None:
    (place / "model.safetensors").write_text("This is not a checkpoint.")


def damage_half(place: Path) -> None:
    content = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(content[: len(content) // 2])


def damage_config(place: Path) -> None:
    (place / "config.json").write_text("[1, 2")


def damage_no_config(place: Path) -> None:
    (place / "config.json").unlink()


def change(**changed: Any) -> Callable[[Path], None]:
    """Return a function that changes keys of config.json; None removes a key."""

    def apply(place: Path) -> None:
        config = {name: value for name, value in (MDLM | changed).items() if value is not None}
        (place / "config.json").write_text(json.dumps(config))

    return apply


def edit(function: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of a checkpoint."""

    def apply(place: Path) -> None:
        tensors = prefixed(make_tensors())
        function(tensors)
        save_file(tensors, place / "model.safetensors")

    return apply


def drop(name: str) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.__delitem__(name))


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.update({name: tensor}))


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (damage_empty, "is not a checkpoint: the folder has no weights"),
    "text file": (damage_text, r"model\.safetensors is damaged or incomplete.*Download"),
    "half a download": (damage_half, r"model\.safetensors is damaged or incomplete.*Download"),
    "damaged config": (damage_config, r"config\.json is damaged"),
    "no config": (damage_no_config, "has no configuration.*Copy the configuration"),
    "missing tensor": (
        drop("backbone.blocks.1.mlp.0.bias"),
        r"has no tensor backbone\.blocks\.1\.mlp\.0\.bias.*Download it again",
    ),
    "unknown tensor": (
        put("backbone.cond_map.embedding_table.weight", torch.zeros(3, 16)),
        r"does not know: backbone\.cond_map\.embedding_table\.weight.*--layout",
    ),
    "another shape": (
        put("backbone.blocks.0.attn_out.weight", torch.zeros(32, 16)),
        r"attn_out\.weight must have the shape \[32, 32\].*has the shape \[32, 16\]",
    ),
    "no row for the mask": (
        put(EMBEDDING, torch.zeros(ROWS - 1, 32)),
        r"vocab_embed\.embedding must have the shape \[12, 32\].*\[11, 32\]",
    ),
    "NaN": (put(EMBEDDING, torch.full((ROWS, 32), torch.nan)), "NaN or infinite"),
    "integers": (put(EMBEDDING, torch.zeros(ROWS, 32, dtype=torch.int8)), "dtype torch.int8"),
    "missing key": (change(n_heads=None), "no key n_heads"),
    "value of a key": (change(n_blocks="two"), "n_blocks must be a positive integer; got 'two'"),
    "unknown model": (
        change(model_type="plaid"),
        "no layout recognizes the files.*'plaid'.*mdlm.*--layout NAME",
    ),
    "unknown graph": (
        change(model_type=None, graph={"type": "roulette"}),
        "no layout recognizes the files.*roulette",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_damaged_or_unknown_checkpoints_are_refused_by_name(folder: Path, case: str) -> None:
    damage, message = REFUSALS[case]
    write_family(Path("published"), "mdlm")
    damage(Path("published"))
    with pytest.raises(DataError, match=f"(?s){message}"):
        import_run(Path("published"))
    assert [path.name for path in folder.iterdir()] == ["published"]


def test_masked_layout_refuses_networks_that_read_the_noise_level(folder: Path) -> None:
    write_family(Path("published"), "mdlm")
    change(time_conditioning=True)(Path("published"))
    with pytest.raises(DataError, match="time_conditioning must be false"):
        import_run(Path("published"), layout="mdlm")


def test_missing_paths_and_offline_hub_names_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder or file"):
        open_published("./nowhere")
    with pytest.raises(DataError, match="there is no such folder or file"):
        open_published("")
    with pytest.raises(DataError, match=r"cannot be downloaded from the hub.*name their folder"):
        open_published("nobody/nothing@main")
    Path("notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"is not a file of weights.*\.safetensors"):
        open_published("notes.txt")


def test_hub_download_prefers_safetensors_and_takes_no_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is replaced by a function that records its arguments and has no network."""
    tensors = write_family(folder / "hub/0123abc", "mdlm")
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder / "hub/0123abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = open_published("hf://owner/model@v1")
    assert (files.source, files.revision) == ("hf://owner/model@v1", "0123abc")
    assert torch.equal(files.tensors.take(EMBEDDING, ROWS, 32), tensors["vocab_embed.embedding"])
    assert [(name, revision) for name, revision, _ in asked] == [("owner/model", "v1")]
    assert "*.safetensors" in asked[0][2]
    assert not any(pattern.endswith((".py", "*", ".bin")) for pattern in asked[0][2])
    # Without safetensors, pickled weights are downloaded too.
    Path("hub/0123abc/model.safetensors").unlink()
    torch.save(prefixed(tensors), "hub/0123abc/pytorch_model.bin")
    assert open_published("owner/model").tensors.has(EMBEDDING)
    assert "*.bin" in asked[-1][2]
    assert not any(pattern.endswith((".py", "*")) for pattern in asked[-1][2])
