"""Imports of LLaDA, Dream, LLaDA2 and A2D, and the check that a model predicts masked tokens."""

from __future__ import annotations

import dataclasses
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import Command, is_refusal
from ddiff_hf.hub_layouts import HubLayout, read_shared_settings
from ddiff_hf.hub_models import HUB_MODELS
from hub_checkpoints import (
    CHAT,
    CONFIGS,
    EOS,
    LENGTH,
    MASK,
    PAD,
    TEXT,
    WORDS,
    V,
    build_library_model,
    draw_llada,
    draw_llada2,
    full_logits,
    llada2_logits,
    llada_logits,
    published_tensors,
    train,
    write_checkpoint,
)
from torch import Tensor

import ddiff
from ddiff import DataError
from ddiff.core.times import Noisy
from ddiff.data.tokenizer import load_tokenizer
from ddiff.nn.denoiser import UNPADDED
from ddiff.runs.masked_predictions import MaskedPredictions

# Logits are up to 15; another order of the same float32 products changes them by less.
CLOSE = {"rtol": 0.0, "atol": 5e-5}


def import_hub(source: Path, out: str = "runs/hub", **arguments: Any) -> Any:
    ddiff.import_published(source, out, **{"check": False, **arguments})
    return ddiff.load(out)


def draw_ids(length: int = 24) -> tuple[Tensor, Tensor]:
    """Return states of ddiff (mask V), and the same ids in the published vocabulary."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, len(WORDS), (2, length), generator=generator)
    is_masked = torch.rand(ids.shape, generator=generator) < 0.4
    return torch.where(is_masked, V, ids), torch.where(is_masked, MASK, ids)


@torch.no_grad()
def run_logits(run: Any, ids: Tensor, block: Tensor | None = None) -> Tensor:
    noisy = Noisy(ids, torch.full(ids.shape, 0.5, dtype=torch.float64), ids < V, block)
    hidden = run.denoiser.eval().hidden_states(noisy, UNPADDED)
    head = run.denoiser.head
    return (hidden @ head.table.T + head.bias).unflatten(0, ids.shape)


def assert_equal_logits(found: Tensor, expected: Tensor) -> None:
    """Compare logits. The output for the mask token is left out."""
    is_token = torch.arange(V) != MASK
    torch.testing.assert_close(found[..., is_token], expected[..., is_token], **CLOSE)
    assert found[..., MASK].max() < found[..., is_token].min() - 1000


# ---------------------------------------------------------------------- networks


def test_llada_import_equals_the_published_network(folder: Path) -> None:
    tensors = draw_llada()
    run = import_hub(write_checkpoint(Path("llada"), CONFIGS["llada"], tensors))
    ids, published = draw_ids()
    assert_equal_logits(run_logits(run, ids), llada_logits(tensors, published))
    # The run needs neither the folder nor the published class.
    assert run.recipe.to_dict()["denoiser"]["architecture"] == "llama"
    assert run.recipe.length == LENGTH


def test_llada2_import_equals_the_published_network(folder: Path) -> None:
    tensors = draw_llada2()
    config = {**CONFIGS["llada2"]}
    source = write_checkpoint(Path("llada2"), config, tensors)
    run = import_hub(source, layout={"kind": "llada2", "block": 8})
    block = torch.arange(24) // 8
    ids, published = draw_ids()
    expected = llada2_logits(tensors, published, block)
    assert_equal_logits(run_logits(run, ids, block.unsqueeze(0)), expected)
    recipe = run.recipe.to_dict()
    assert recipe["objective"]["times"]["width"] == recipe["sample"]["sampler"]["width"] == 8
    write_checkpoint(source, config | {"num_shared_experts": 0}, tensors)
    with pytest.raises(DataError, match="must be a positive integer; got 0"):
        import_hub(source, "runs/other")


@pytest.mark.parametrize("layout", ["dream", "a2d"])
def test_qwen_import_equals_the_published_network(folder: Path, layout: str) -> None:
    model = build_library_model(CONFIGS[layout])
    source = write_checkpoint(Path(layout), CONFIGS[layout], published_tensors(model))
    run = import_hub(source)
    ids, published = draw_ids()
    expected = full_logits(model, published).detach()
    if layout == "dream":
        expected = torch.cat([expected[:, :1], expected[:, :-1]], 1)
    assert_equal_logits(run_logits(run, ids), expected)
    assert run.recipe.to_dict()["denoiser"]["shift"] == (layout == "dream")


def test_modernbert_import_equals_the_published_network(folder: Path) -> None:
    """The prediction head, the output biases and the windows of local layers are kept."""
    torch.manual_seed(0)
    config = transformers.ModernBertConfig.from_dict(CONFIGS["modernbert"])
    model = transformers.ModernBertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tensors = {
        name: value for name, value in model.state_dict().items() if name != "decoder.weight"
    }
    run = import_hub(write_checkpoint(Path("modernbert"), CONFIGS["modernbert"], tensors))
    ids, published = draw_ids()
    assert_equal_logits(run_logits(run, ids), model(input_ids=published).logits.detach())


def test_hub_run_keeps_the_chat_template(folder: Path) -> None:
    model = build_library_model(CONFIGS["dream"])
    run = import_hub(write_checkpoint(Path("dream"), CONFIGS["dream"], published_tensors(model)))
    # Loaded from the run directory, without the folder of the checkpoint.
    assert run.tokenizer.chat_template == CHAT
    assert run.tokenizer.eos_id == EOS
    # Several named templates are files in a folder.
    run.tokenizer._tokenizer.chat_template = {"default": CHAT, "tools": "tools"}
    run.tokenizer.save("named.json")
    assert load_tokenizer("named.json").chat_template == CHAT
    content = json.loads(Path("named.json").read_text())
    content["files"]["../outside"] = ""
    Path("named.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="a file outside of its folder"):
        load_tokenizer("named.json")
    notes = " ".join(json.loads(Path("runs/hub/origin.json").read_text())["notes"])
    assert "end of an answer: end mark, repeated to the end of the row" in notes


# ---------------------------------------------------------------------- check of predictions


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a trained Dream (shifted) and a trained A2D, and the text of the check."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("trained")
    for layout in ("dream", "a2d"):
        model = build_library_model(CONFIGS[layout])
        train(model, shift=layout == "dream")
        write_checkpoint(place / layout, CONFIGS[layout], published_tensors(model))
    (place / "text.txt").write_text(TEXT)
    return place


def test_trained_model_passes_the_check_and_is_sampled_and_evaluated(
    folder: Path, trained: Path, ddiff: Command
) -> None:
    text = str(trained / "text.txt")
    done = ddiff("import", str(trained / "dream"), "--out", "runs/dream", "--check-text", text)
    assert done.code == 0, done.err
    assert "of 40 masked tokens (constant guess: 9%)" in done.out
    prompt = ("--prompt", "two three")
    sampled = ddiff("sample", "runs/dream", "--count", "1", "--steps", "64", *prompt)
    assert sampled.code == 0, sampled.err
    ids = json.loads(sampled.out)["ids"]
    follows = [after == (before + 1) % len(WORDS) for before, after in pairwise(ids)]
    assert sum(follows) > 0.5 * len(follows)  # 1/12 by chance
    evaluated = ddiff("eval", "runs/dream", "--data", text)
    assert evaluated.code == 0, evaluated.err


def test_wrong_shift_is_refused_and_named(folder: Path, trained: Path, ddiff: Command) -> None:
    text = str(trained / "text.txt")
    common = ("--out", "runs/new", "--check-text", text)
    done = ddiff(
        "import", str(trained / "dream"), "--layout", '{kind="dream", shift=false}', *common
    )
    assert is_refusal(
        done,
        "the shift is wrong, and must be true",
        "--layout '{kind = \"dream\", shift = true}'",
    )
    done = ddiff("import", str(trained / "a2d"), "--layout", '{kind="a2d", shift=true}', *common)
    assert is_refusal(done, "the shift is wrong, and must be false")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("shift", "offset", "needed"),
    [(False, -1, True), (True, 1, False), (True, -1, None), (False, 1, None), (None, -1, None)],
)
def test_shift_is_named_only_if_another_value_helps(
    shift: bool | None, offset: int, needed: bool | None
) -> None:
    accuracies = {-1: 0.1, 1: 0.1, offset: 0.9}
    found = MaskedPredictions(0.1, 0.1, 40, shifted=accuracies, shift=shift)
    assert found.needed_shift is needed
    assert found.problem is not None
    assert ("the shift is wrong, and must be" in found.problem) is (needed is not None)
    assert ("already" in found.problem) is (needed is None and shift is not None)


def test_check_text_of_a_check_that_is_left_out_is_refused(
    folder: Path, trained: Path, ddiff: Command
) -> None:
    text = str(trained / "text.txt")
    common = ("--out", "runs/new", "--check-text", text)
    refused = ddiff("import", str(trained / "a2d"), "--unchecked", *common)
    assert is_refusal(refused, "--check-text is the text of the check that --unchecked leaves out")
    assert not Path("runs").exists()


def test_import_hides_the_warning_about_a_type_without_a_name(folder: Path, trained: Path) -> None:
    logger = logging.getLogger("transformers.configuration_utils")
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        import_hub(trained / "dream")
        assert texts == []
        logger.warning("another warning")
        transformers.AutoTokenizer.from_pretrained(str(trained / "dream"), local_files_only=True)
    finally:
        logger.removeHandler(handler)
    # the library still warns those who call it themselves
    assert texts[0] == "another warning"
    assert any("to instantiate a model of type ``" in text for text in texts)


def test_wrong_mask_is_refused_and_named(folder: Path, trained: Path) -> None:
    wrong = {"kind": "a2d", "mask_token": PAD}
    with pytest.raises(DataError, match=r"'\[MASK\]' \(id 13\) as the mask, the model predicts"):
        ddiff.import_published(trained / "a2d", "runs/new", layout=wrong, check_text=TEXT)
    assert not Path("runs").exists()
    run = import_hub(trained / "a2d", layout=wrong)
    found = ddiff.check_masked_predictions(run, TEXT)
    assert found.better_mask == "[MASK]"
    assert found.mask_ids["[MASK]"] == MASK
    # The check leaves the network unchanged.
    assert ddiff.check_masked_predictions(run, TEXT) == found


def test_random_weights_are_refused_unless_unchecked(folder: Path) -> None:
    source = write_checkpoint(Path("llada"), CONFIGS["llada"], draw_llada())
    with pytest.raises(DataError, match="No other position or mask is better"):
        ddiff.import_published(source, "runs/new", check_text=TEXT)
    assert not Path("runs").exists()
    with pytest.raises(ddiff.ArgumentError, match="at least 16 tokens"):
        ddiff.import_published(source, "runs/new", check_text="one two")
    imported = ddiff.import_published(source, "runs/new", check=False)
    assert imported.predictions is None


def test_block_model_is_checked_sampled_and_evaluated(
    folder: Path, trained: Path, ddiff: Command
) -> None:
    """Each block attends to the clean tokens of earlier blocks, as in training."""
    layout = ("--layout", '{kind = "a2d", block = 8}')
    text = ("--check-text", str(trained / "text.txt"))
    done = ddiff("import", str(trained / "a2d"), "--out", "runs/blocks", *layout, *text)
    assert done.code == 0, done.err
    sampled = ddiff("sample", "runs/blocks", "--count", "1", "--prompt", "two three")
    assert sampled.code == 0, sampled.err
    ids = json.loads(sampled.out)["ids"]
    follows = [after == (before + 1) % len(WORDS) for before, after in pairwise(ids)]
    # The model was trained with full attention; 1/12 by chance, with a deviation of 0.035.
    assert sum(follows) > 0.25 * len(follows)
    evaluated = ddiff("eval", "runs/blocks", "--data", str(trained / "text.txt"))
    assert evaluated.code == 0, evaluated.err


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("llada", {"block_type": "sequential"}, 'block_type = "llama"'),
        ("llada", {"alibi": True}, "alibi = false"),
        ("llada", {"mask_token_id": V}, f"mask id must be below {V}"),
        ("llada2", {"use_bias": True}, "use_bias = false"),
        ("llada2", {"num_experts": 7}, "has no tensor|must have the shape"),
        ("dream", {"hidden_size": 16}, "must have the shape"),
        ("dream", {"use_sliding_window": True}, "use_sliding_window = false"),
        ("a2d", {"model_type": "a2d-bert"}, "a2d-llama, a2d-qwen2, a2d-qwen3"),
    ],
)
def test_hub_model_of_another_network_is_refused(
    folder: Path, layout: str, changes: dict[str, Any], message: str
) -> None:
    if layout == "llada":
        tensors = draw_llada()
    elif layout == "llada2":
        tensors = draw_llada2()
    else:
        tensors = published_tensors(build_library_model(CONFIGS[layout]))
    source = write_checkpoint(Path(layout), CONFIGS[layout] | changes, tensors)
    with pytest.raises(DataError, match=message):
        import_hub(source)
    assert not Path("runs").exists()


def test_a2d_without_a_mask_token_says_how_to_name_it(folder: Path) -> None:
    tensors = published_tensors(build_library_model(CONFIGS["a2d"]))
    source = write_checkpoint(Path("a2d"), CONFIGS["a2d"], tensors, tokenizer=False)
    with pytest.raises(DataError, match="mask_token = 151669"):
        import_hub(source)


def test_incomplete_downloads_are_refused(folder: Path, ddiff: Command) -> None:
    source = write_checkpoint(Path("llada"), CONFIGS["llada"], draw_llada())
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    command = ("import", str(source), "--out", "runs/new", "--unchecked")
    assert is_refusal(ddiff(*command), "model.safetensors is damaged or incomplete")
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    assert is_refusal(ddiff(*command), "has no tokenizer", "--tokenizer")
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert is_refusal(ddiff(*command), "no layout recognizes the files", "'llama'")
    assert not Path("runs").exists()


def test_tokenizer_with_code_names_another_tokenizer(folder: Path) -> None:
    tensors = published_tensors(build_library_model(CONFIGS["dream"]))
    source = write_checkpoint(Path("dream"), CONFIGS["dream"], tensors)
    file = source / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    file.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"auto_map.* The tokenizer Qwen/Qwen2\.5-7B on the hub"):
        import_hub(source)
    assert not Path("runs").exists()


def test_hub_run_is_not_exported_to_its_layout(folder: Path, ddiff: Command) -> None:
    import_hub(write_checkpoint(Path("llada"), CONFIGS["llada"], draw_llada()))
    done = ddiff("export", "runs/hub", "exported", "--format", "llada")
    assert is_refusal(done, "export --format llada: this layout only reads checkpoints")
    assert not Path("exported").exists()


def test_plugin_adds_a_model_by_a_layout(folder: Path) -> None:
    """A layout of another plugin names its facts, and translates configuration and names."""

    class OwnLayout(HubLayout):
        facts = dataclasses.replace(HUB_MODELS["dream"], model_type="own", shift=False)

        def read_settings(self, files: ddiff.PublishedFiles) -> dict[str, Any]:
            return read_shared_settings(files)

        def take(self, tensors: Any, name: str, shape: torch.Size) -> Tensor:
            return tensors.take(f"model.{name}", *shape)

    tensors = published_tensors(build_library_model(CONFIGS["dream"]))
    config = CONFIGS["dream"] | {"model_type": "own"}
    files = ddiff.open_published(write_checkpoint(Path("own"), config, tensors))
    layout = OwnLayout.build(OwnLayout.Config(block=4))
    assert layout.recognize(files)
    imported = layout.read(files)
    files.tensors.finish()
    assert imported.must_predict
    assert imported.recipe["denoiser"]["shift"] is False
    assert imported.recipe["objective"]["times"] == {"kind": "block", "width": 4}
    assert torch.equal(imported.weights["head.table"], tensors["lm_head.weight"])


def test_documentation_has_the_table_of_hub_models() -> None:
    page = (Path(__file__).parents[2] / "docs" / "published.md").read_text(encoding="utf-8")
    for name, facts in HUB_MODELS.items():
        attention = facts.attention if facts.block is None else f"{facts.attention} {facts.block}"
        mask = "that of the tokenizer" if facts.mask_token is None else str(facts.mask_token)
        row = [
            f"`{name}`",
            f"`{facts.examples[0]}`",
            f"`{facts.library}`" if facts.library else "see *Class*",
            mask,
            "yes" if facts.shift else "no",
            attention,
            facts.end,
            facts.chat_template,
        ]
        assert f"| {' | '.join(row)} |" in page, row


def test_layout_keys_are_checked(folder: Path, ddiff: Command) -> None:
    source = write_checkpoint(Path("llada"), CONFIGS["llada"], draw_llada())
    for layout, message in (
        ('{kind="llada", shfit=true}', 'has no key "shfit"'),
        ('{kind="llada", shift=3}', "shift must be"),
        ('{kind="lada"}', "there is no layout 'lada'"),
        ("{kind=", "an inline table of TOML"),
        ("{shift=true}", "needs the key kind"),
    ):
        done = ddiff("import", str(source), "--out", "runs/new", "--layout", layout)
        assert is_refusal(done, message)
