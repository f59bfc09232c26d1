"""Models of the transformers library as backbones; all are built here, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ddiff_hf.backbone import PretrainedBackbone, load_model, make_model
from torch import Tensor

import ddiff
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.recipe.resolve import parse_recipe
from ddiff.training.optimizers import split_parameters

transformers = pytest.importorskip("transformers")

V, WIDTH, BATCH, LENGTH = 11, 16, 2, 8
TREE = HierarchicalVocabulary([[i % 3 for i in range(V)]])
SHAPE = {
    "vocab_size": V + 2,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(
        **SHAPE, intermediate_size=32, max_position_embeddings=32
    ),
    "roberta": lambda: transformers.RobertaConfig(
        **SHAPE, intermediate_size=32, max_position_embeddings=32, pad_token_id=1
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V + 2, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32
    ),
    "llama": lambda: transformers.LlamaConfig(
        **SHAPE, intermediate_size=32, max_position_embeddings=32
    ),
    # In the second layer a position attends to two positions on each side.
    "modernbert": lambda: transformers.ModernBertConfig(
        **SHAPE,
        intermediate_size=32,
        max_position_embeddings=32,
        local_attention=4,
        global_attn_every_n_layers=2,
        pad_token_id=0,
    ),
}
# The graph of LLaDA2: groups of experts, and rotary positions of half of each head.
EXPERTS: dict[str, Any] = {
    **SHAPE,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "use_qk_norm": True,
    "num_mtp_layers": 0,
}
CLOSE = {"rtol": 0.0, "atol": 1e-11}


@pytest.fixture(scope="module", params=CONFIGS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a saved model with random weights."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[request.param]())
    directory = tmp_path_factory.mktemp(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return str(directory)


def build_backbone(path: str, **settings: Any) -> PretrainedBackbone:
    config = PretrainedBackbone.Config(path=path, **settings)
    return PretrainedBackbone.build(config, vocabulary=TREE, length=LENGTH).double().eval()


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        TREE.num_states, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed)
    )
    return ids, torch.zeros(BATCH, LENGTH, dtype=torch.float64)


def moved_by(model: PretrainedBackbone, position: int, context: Context = UNPADDED) -> Tensor:
    """Return which hidden states [B,L] change if the id at `position` changes.

    Changes below 1e-9 count as rounding errors.
    """
    ids, t = inputs()
    before = model(ids, t, context)
    ids[:, position] = (ids[:, position] + 1) % TREE.num_states
    return (model(ids, t, context) - before).abs().amax(-1) > 1e-9


def test_hf_backbone_copies_token_embeddings_and_averages_them_for_nodes(path: str) -> None:
    table = build_backbone(path).model.get_input_embeddings().weight
    theirs = load_model(path).get_input_embeddings().weight.double()
    assert table.shape == (TREE.num_states, WIDTH)
    assert torch.equal(table[:V], theirs[:V])
    # The table is float32 here.
    torch.testing.assert_close(table[V], theirs[[0, 3, 6, 9]].mean(0), rtol=0, atol=1e-6)
    masked = build_backbone(path, mask_token=V + 1).model.get_input_embeddings().weight
    assert torch.equal(masked[TREE.root], theirs[V + 1])
    anew = build_backbone(path, pretrained=False).model.get_input_embeddings().weight
    assert not torch.equal(anew[:V], theirs[:V])


def test_hf_hidden_states_of_tokens_are_those_of_the_library(path: str) -> None:
    """Hidden states of clean tokens equal those of the library's model, causal for decoders."""
    ids, t = inputs()
    ids = ids % V
    ids = torch.where(ids == 1, 2, ids)  # 1 is the padding id of RoBERTa
    model = (
        build_backbone(path, bidirectional=False)
        if "bert" not in Path(path).name
        else build_backbone(path)
    )
    theirs = load_model(path).double().eval()
    torch.testing.assert_close(
        model(ids, t, UNPADDED), theirs(input_ids=ids).last_hidden_state, **CLOSE
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_hf_windows_of_decoders_are_kept(bidirectional: bool) -> None:
    """In one layer of Mistral, a position attends to itself and the two positions before it."""
    torch.manual_seed(0)
    settings = SHAPE | {"num_hidden_layers": 1, "sliding_window": 3, "num_key_value_heads": 1}
    settings["vocab_size"] = TREE.num_states
    library = make_model("mistral", settings).double().eval()
    ids, t = inputs()
    theirs = library(input_ids=ids).last_hidden_state
    table = library.get_input_embeddings().weight.detach()
    model = PretrainedBackbone(library, TREE, LENGTH, bidirectional).double().eval()
    with torch.no_grad():
        model.table.weight.copy_(table[: TREE.num_states])
    assert torch.allclose(model(ids, t, UNPADDED), theirs, **CLOSE) != bidirectional
    seen = moved_by(model, 3)[0]
    first = 1 if bidirectional else 3
    place = torch.arange(LENGTH)
    assert torch.equal(seen, (place >= first) & (place <= 5))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_hf_prediction_head_gives_the_states_before_the_output(
    architecture: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    theirs = transformers.AutoModelForMaskedLM.from_config(config).double().eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), prediction_head=True)
    backbone = PretrainedBackbone(model, TREE, LENGTH, prediction_head=True).double().eval()
    ids, t = inputs()
    ids = torch.where(ids % V == 1, 2, ids % V)  # 1 is the padding id of RoBERTa
    output = theirs.get_output_embeddings()
    hidden = backbone(ids, t, UNPADDED)
    logits = hidden @ output.weight.T + output.bias
    # The saved weights are float64 and the loaded ones float32, with logits below 1.
    torch.testing.assert_close(logits, theirs(input_ids=ids).logits, rtol=0.0, atol=1e-5)
    hidden.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_hf_backbone_refuses_layers_without_attention() -> None:
    library = make_model("qwen2", SHAPE | {"num_key_value_heads": 1})
    library.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ArgumentError, match="layers of the type linear_attention"):
        PretrainedBackbone(library, TREE, LENGTH)


def test_hf_backbone_attends_to_every_position_if_bidirectional(path: str) -> None:
    model = build_backbone(path)
    assert moved_by(model, LENGTH - 1).all()
    assert moved_by(model, 0).all()
    causal = moved_by(build_backbone(path, bidirectional=False), 3)
    assert torch.equal(causal, (torch.arange(LENGTH) >= 3).expand(BATCH, -1))


def test_hf_backbone_does_not_attend_to_padding_or_other_documents(path: str) -> None:
    model = build_backbone(path)
    valid = (torch.arange(LENGTH) < 6).expand(BATCH, -1)
    assert not moved_by(model, 7, Context(valid=valid))[:, :6].any()
    document = (torch.arange(LENGTH) >= 5).long().expand(BATCH, -1)
    assert torch.equal(moved_by(model, 2, Context(document=document)), document == 0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "glm4_moe"])
def test_hf_attention_masks_hold_bit_for_bit(
    architecture: str, attention: str, bidirectional: bool
) -> None:
    """Full, block-causal and causal attention, for both implementations of the library."""
    torch.manual_seed(0)
    # Tokens that go to the same expert share a matrix product, whose rounding depends on their
    # number. The logits are about 5, so that 1e-4 is far above rounding errors.
    tolerance = 1e-4 if architecture == "glm4_moe" else 0.0
    grouped = SHAPE | {"num_key_value_heads": 1, "max_position_embeddings": 32}
    settings = EXPERTS if architecture == "glm4_moe" else grouped
    library = make_model(architecture, settings)
    model = PretrainedBackbone(library, TREE, LENGTH, bidirectional, pretrained=False).eval()
    model.model.set_attn_implementation(attention)
    head = TokenHead(TREE, WIDTH)
    torch.nn.init.normal_(head.table)
    denoiser = Denoiser(model, head)

    def logits(ids: Tensor, block: Tensor | None = None) -> Tensor:
        noisy = Noisy(ids, torch.zeros(ids.shape), ids < 0, block)
        hidden = denoiser.hidden_states(noisy, UNPADDED)
        return (hidden @ head.table.T).detach().unflatten(0, ids.shape)

    ids = inputs()[0]
    is_last = torch.arange(LENGTH) == LENGTH - 1
    is_later = torch.arange(LENGTH) >= 3
    last = torch.where(is_last, (ids + 1) % TREE.num_states, ids)
    later = torch.where(is_later, (ids + 1) % TREE.num_states, ids)
    moved = (logits(ids)[:, 0] - logits(last)[:, 0]).abs().max()
    assert moved > 1e-3 if bidirectional else moved <= tolerance
    if not bidirectional:
        assert (logits(ids) - logits(later))[:, :3].abs().max() <= tolerance
    # The first block does not change, whatever the later blocks are.
    block = (torch.arange(LENGTH) // 3).unsqueeze(0)
    by_block = logits(ids, block) - logits(later, block)
    assert by_block[:, :3].abs().max() <= tolerance
    assert by_block[:, 3:].abs().max() > 1e-3


def test_hf_shifted_hidden_state_is_that_of_the_position_before(path: str) -> None:
    plain = build_backbone(path)
    shifted = build_backbone(path, shift=True)
    ids, t = inputs()
    document = (torch.arange(LENGTH) >= 5).long().expand(BATCH, -1)
    for context in (UNPADDED, Context(document=document)):
        own, moved = plain(ids, t, context), shifted(ids, t, context)
        assert torch.equal(moved[:, 0], own[:, 0])
        assert torch.equal(moved[:, 1:5], own[:, :4])
        assert torch.equal(moved[:, 6:], own[:, 5:-1])
        assert torch.equal(moved[:, 5], own[:, 5 if context.document is not None else 4])
    with pytest.raises(ArgumentError, match="Set shift = false"):
        Denoiser(shifted, TokenHead(TREE, WIDTH).double(), inputs="previous")


@pytest.mark.parametrize(("inputs_", "shift"), [("own", False), ("own", True), ("previous", False)])
def test_hf_hidden_states_of_a_block_equal_a_separate_forward_pass(
    path: str, inputs_: Any, shift: bool
) -> None:
    """Hidden states of a block equal those of a separate pass over clean prefix and block."""
    backbone = build_backbone(path, shift=shift)
    model = Denoiser(backbone, TokenHead(TREE, WIDTH).double(), inputs=inputs_)
    (zt, t), memory = inputs(2), inputs(3)[0] % V
    block = torch.arange(LENGTH) // 3
    noisy = Noisy(zt, t, torch.zeros_like(zt, dtype=torch.bool), block.unsqueeze(0), memory)
    together = model.hidden_states(noisy, UNPADDED).detach().unflatten(0, zt.shape)
    if inputs_ == "previous":
        shifted = torch.cat([torch.full_like(memory[:, :1], TREE.root), memory[:, :-1]], 1)
        causal = build_backbone(path, bidirectional=False)(shifted, t, UNPADDED)
        torch.testing.assert_close(together, causal, **CLOSE)
        return
    for number in range(3):
        own, stop = block == number, int((block <= number).sum())
        shown = noisy._replace(zt=torch.where(own, zt, memory), memory=None)
        prefix: Any = [part[:, :stop] for part in shown[:4]]  # type: ignore[index]
        alone = model.hidden_states(Noisy(*prefix), UNPADDED)
        torch.testing.assert_close(
            together[:, own], alone.detach().unflatten(0, (BATCH, -1))[:, own[:stop]], **CLOSE
        )


def test_hf_backbone_weights_get_gradients(path: str) -> None:
    model = build_backbone(path)
    ids, t = inputs()
    model(ids, t, UNPADDED).square().sum().backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    unused = {name for name, _ in model.named_parameters()} - used
    # A key's bias shifts all attention logits equally, so that it has no gradient.
    assert all("pooler" in name or "key.bias" in name for name in unused), unused
    hidden, _ = split_parameters(model)
    assert not any("emb" in name or "wte" in name or "wpe" in name for name in hidden)


def test_hf_backbone_refuses_unsupported_models_and_inputs(tmp_path: Path, path: str) -> None:
    config = PretrainedBackbone.Config(path=path)
    with pytest.raises(ArgumentError, match=r"at most 13 tokens, the embeddings of .*; got 20"):
        PretrainedBackbone.build(config, vocabulary=FlatVocabulary(20), length=8)
    with pytest.raises(ArgumentError, match=r"length must be at most .*; got 64"):
        PretrainedBackbone.build(config, vocabulary=TREE, length=64)
    with pytest.raises(ArgumentError, match="mask_token must be below"):
        build_backbone(path, mask_token=99)
    with pytest.raises(ArgumentError, match=r"has no conditions; got \['author'\]"):
        build_backbone(path)(
            *inputs(), Context(conditions={"author": torch.zeros(BATCH, dtype=torch.long)})
        )
    with pytest.raises(DataError, match="the directory has no readable model"):
        load_model(str(tmp_path))
    both = tmp_path / "t5"
    transformers.T5Config(
        vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2
    ).save_pretrained(both)
    with pytest.raises(ArgumentError, match="encoder-decoder t5"):
        load_model(str(both))


def test_hf_backbone_is_built_from_architecture_and_settings() -> None:
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = PretrainedBackbone.Config(architecture="bert", settings=settings)
    assert PretrainedBackbone.build(config, vocabulary=TREE, length=LENGTH).width == 16
    with pytest.raises(ArgumentError, match='got "elmo"'):
        make_model("elmo", {})
    with pytest.raises(ArgumentError, match="got the unknown keys hiden_size"):
        make_model("bert", {"hiden_size": 3})
    for wrong in ({}, {"path": "a", "architecture": "bert"}, {"path": "a", "settings": settings}):
        with pytest.raises(ValueError, match="exactly one of path and architecture"):
            PretrainedBackbone.Config(**wrong)


RECIPE = """
name = "fine"
plugins = ["mdlm", "hf"]
data = { kind = "text", files = ["corpus.txt"], split = "line", held_out = 0.2, length = 8 }
tokenizer = { kind = "pretrained", path = "model" }
vocabulary = "flat"
process = "mdlm"
denoiser = { kind = "hf", path = "model" }
train = { steps = 4, batch = 4, warmup = 1 }
evaluate = { batch = 8 }
sample = { count = 2, steps = 4 }
backend = { kind = "single", device = "cpu" }
"""


def test_hf_model_with_its_tokenizer_is_fine_tuned_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [
        f"the {a} {b} sat"
        for a in ("old", "red")
        for b in ("cat", "hat", "dog", "cow", "hen", "pig", "rat", "elk", "owl", "fox")
    ]
    Path("corpus.txt").write_text("\n".join(texts))
    words = ["<pad>", "[MASK]", *sorted({word for text in texts for word in text.split()})]
    from tokenizers import Tokenizer, models, pre_tokenizers

    spelled = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="<pad>", eos_token="<pad>"
    )
    fast.save_pretrained("model")
    shape = SHAPE | {"vocab_size": len(words)}
    transformers.AutoModel.from_config(
        transformers.BertConfig(**shape, intermediate_size=32, max_position_embeddings=16)
    ).save_pretrained("model")
    run = ddiff.run(parse_recipe(RECIPE, source=str(tmp_path / "fine.toml")))
    again = ddiff.load(run.run_dir)
    assert again.sample(2, seed=3) == run.sample(2, seed=3)
    assert run.vocabulary.num_tokens == len(words)
