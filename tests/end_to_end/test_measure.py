"""`ddiff run --dry-run --measure N`: predicts cost, memory and first loss of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import Command
from small import RECIPE

from ddiff.errors import ArgumentError, DataError
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs import cost
from ddiff.runs.cost import Footprint, Parameters, count_logits, num_bytes
from ddiff.runs.measure import Measurement, measure
from ddiff.runs.peak_memory import MemoryRise
from ddiff.training.trainer import Trainer

WIDTH, LENGTH, LAYERS, WORDS = 16, 8, 1, 270
FLAT = ["vocabulary={kind='flat'}", "process={kind='mdlm'}", "denoiser.head=tokens"]
AR = [
    "plugins=['ar', 'dit']",
    "vocabulary={kind='flat'}",
    "denoiser.head=tokens",
    "denoiser.time=false",
]
ABSENT = f"tokenizer={{kind='pretrained', path='nowhere', size={WORDS}}}"


def measured(settings: Sequence[str] = (), steps: int = 2, text: str = RECIPE) -> Measurement:
    return measure(
        parse_recipe(text, settings=["backend.device=cpu", "train.optimizer=adamw", *settings]),
        steps,
    )


def autoregressive() -> str:
    """Path of a recipe of an autoregressive model, which has no process."""
    return RECIPE.replace('[process]\nkind = "hdlm"\n', '[objective]\nkind = "ar"\n').replace(
        "steps = 4\n", 'sampler = "left_to_right"\n'
    )


# FLOPs, parameters and memory


def test_backbone_flops_equal_formula_of_transformer_width_and_length(folder: Path) -> None:
    """A block of width d has 24 d^2 + 4 L d FLOPs per token, for sequences of L tokens.

    The matrices of the block have 12 d^2 entries (4 d^2 for attention, 8 d^2 for the MLP), with 2
    FLOPs each. 4 L d is the cost of attention.
    """
    found = measured([*FLAT, "denoiser.time=false"])
    assert found.cost.backbone_flops == LAYERS * (24 * WIDTH**2 + 4 * LENGTH * WIDTH)
    assert found.cost.head_flops == pytest.approx(2 * WIDTH * found.cost.logits)
    assert found.cost.flops == 3 * (found.cost.backbone_flops + found.cost.head_flops)


def test_logit_count_equals_logits_computed_by_the_head(folder: Path) -> None:
    every = measured(AR, text=autoregressive())
    masked, tree = measured(FLAT, steps=10), measured(steps=10)
    assert every.cost.logits == every.num_tokens  # all tokens at each position
    assert (
        0.3 * masked.num_tokens < masked.cost.logits < 0.7 * masked.num_tokens
    )  # all tokens at masks, which are half of the positions
    assert tree.cost.logits < 0.2 * tree.num_tokens  # all clusters, or the tokens of one cluster


def test_parameter_counts_of_embedding_and_head_are_separate(folder: Path) -> None:
    found = measured(FLAT)
    states = found.num_tokens + 1
    assert found.cost.parameters.embedding == states * WIDTH
    assert found.cost.parameters.head == found.num_tokens * (WIDTH + 1)
    assert (
        4 * found.cost.parameters.total
        == found.cost.footprint.parameters
        == found.cost.footprint.gradients
    )
    moments = 2 * found.cost.footprint.parameters
    assert (
        moments <= found.cost.footprint.optimizer < 1.01 * moments
    )  # and one step count per parameter
    assert found.cost.checkpoint == found.cost.footprint.parameters + found.cost.footprint.optimizer


def test_ddp_footprint_adds_buffers_and_fsdp_footprint_is_sharded() -> None:
    one = Footprint(parameters=800.0, gradients=800.0, optimizer=1600.0, activations=50.0)
    assert one.total == 3250.0
    assert one.replicate().total == one.total + 800.0  # buckets for the gradient all-reduce
    assert one.shard(8, gathered=100.0).total == 3200.0 / 8 + 2 * 100.0 + 50.0


def test_count_logits_stops_counting_after_its_with_block(folder: Path) -> None:
    from ddiff import FlatVocabulary, TokenHead

    head = TokenHead(FlatVocabulary(5), 3)
    hidden, node = torch.zeros(4, 3), torch.full((4,), 5)
    with count_logits(head) as logits:
        head.query(hidden, node, lambda dist, idx: dist.log_mass(0))
    head.query(hidden, node, lambda dist, idx: dist.log_mass(0))
    assert logits.total == 4 * 5
    assert num_bytes({"a": [hidden, {"b": node}], "c": "text", "d": 1}) == 4 * 3 * 4 + 4 * 8


def test_measured_memory_rise_includes_memory_that_was_freed() -> None:
    """The rise while 64 MiB are allocated and freed is 48 to 96 MiB.

    The tolerance allows for other memory of the interpreter.
    """
    rise = MemoryRise(torch.device("cpu"))
    torch.ones(2**24).sum()
    assert 48 * 2**20 < rise.bytes() < 96 * 2**20


# initial loss


@pytest.mark.parametrize(
    ("settings", "text"),
    [([], RECIPE), (FLAT, RECIPE), (AR, autoregressive()), (["train.accumulate=2"], RECIPE)],
)
def test_first_training_loss_equals_predicted_initial_loss(
    folder: Path, settings: list[str], text: str
) -> None:
    """Both losses are computed for the same rows, times, noise and dropout.

    The tolerance 1e-6 is the rounding of float32 sums.
    """
    found = measured(settings, text=text)
    assert found.initial is not None
    assert found.first_loss == pytest.approx(found.initial.of_step_1, rel=1e-6)
    assert not found.is_off
    assert (
        abs(found.initial.mean - found.unigram) < 6 * found.initial.error + 0.05
    )  # the bound of the unigram distribution


def test_autoregressive_initial_loss_is_the_unigram_entropy(
    folder: Path,
) -> None:
    found = measured(AR, text=autoregressive())
    assert found.initial is not None
    assert found.initial.mean == pytest.approx(found.unigram, abs=4 * found.initial.error)


def test_option_measure_warns_if_the_loss_has_a_wrong_denominator(
    folder: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Trainer._denominators
    monkeypatch.setattr(
        Trainer,
        "_denominators",
        lambda self, batches: {k: v / 2 for k, v in counts(self, batches).items()},
    )
    assert measured().is_off
    code, out, _ = ddiff("run", "small.toml", "--dry-run", "--measure", "2")
    assert code == 0
    assert "WARNING: the first loss is" in out


def test_initial_loss_is_none_for_pretrained_weights(folder: Path, ddiff: Command) -> None:
    assert ddiff("run", "small.toml", "--set", "train.steps=2")[0] == 0
    assert measured(["train.init={run='runs/small'}", "name=second"]).initial is None


# command line


def test_option_measure_prints_one_table_and_leaves_no_file(folder: Path, ddiff: Command) -> None:
    before = sorted(path.name for path in folder.iterdir())
    settings = ("--set", "backend.kind=ddp", "--set", "backend.processes=2")
    code, out, err = ddiff("run", "small.toml", "--dry-run", "--measure", "3", *settings)
    assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == before
    assert out.startswith("small, one of 2 processes, on cpu, 2 rows of 8 tokens a step")
    rows = [
        "parameters",
        "logits/token",
        "FLOPs/token",
        "tokens/s",
        "MFU",
        "ETA",
        "checkpoint",
        "first loss",
        "  expected",
    ]
    rows += ["single, accumulate x 2", "ddp, 2 processes", "fsdp, 2 processes"]
    for row in rows:
        assert f"\n{row} " in out, row
    assert "timed here" in out  # the peak FLOPs of this CPU are unknown
    assert "WARNING" not in out


def test_option_measure_requires_option_dry_run(folder: Path, ddiff: Command) -> None:
    code, _, err = ddiff("run", "small.toml", "--measure", "3")
    assert code == 2
    assert "--measure 3 needs --dry-run" in err
    assert not (folder / "runs").exists()


def test_option_measure_uses_random_tokens_if_the_text_is_missing(folder: Path) -> None:
    Path("nowhere").mkdir()  # a local folder, so that the name is not looked up on the hub
    found = measured([ABSENT])
    assert "nowhere" in found.stand_in
    assert found.num_tokens == WORDS
    assert not found.is_off
    assert measured().stand_in == ""


def test_option_measure_needs_the_text_if_vocabulary_size_is_unknown(folder: Path) -> None:
    Path("nowhere").mkdir()
    with pytest.raises(DataError, match="No tokenizer from 'nowhere'"):
        measured(["tokenizer={kind='pretrained', path='nowhere'}"])


def test_option_measure_refuses_runs_larger_than_free_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArgumentError, match=r"backward pass .* for 4000000 rows.*train.batch=\d+"):
        measured(["train.batch=4000000"])
    monkeypatch.setattr("ddiff.runs.measure.free_bytes", lambda device: 1000.0)
    with pytest.raises(
        ArgumentError, match=r"parameters, which with gradients .* free\. Use a device"
    ):
        measured()


def test_peak_flops_of_nvidia_gpus_equal_data_sheet_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, figure in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert cost.peak_flops(torch.device("cuda"))[0] == figure


def test_total_parameters_is_the_sum_of_all_three_parameter_groups() -> None:
    assert Parameters(1, 2, 3).total == 6
