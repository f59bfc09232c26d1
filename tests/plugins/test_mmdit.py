"""Multimodal transformer: one stream is the DiT, and attention respects blocks and absence."""

from __future__ import annotations

import pytest
import torch
from ddiff_dit.dit import DiT
from ddiff_dit.mmdit import MMDiT, StreamSpec
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.field import Field, JointTimes
from ddiff.core.fields import corrupt_fields
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.paths import first_path, given_path, shared_path
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, Noisy, Shape, WindowTimes
from ddiff.core.training_paths import MixedPaths, draw_training
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import UNPADDED
from ddiff.nn.heads import TokenHead
from ddiff.nn.joint_denoiser import JointContext, JointDenoiser, JointMask, StreamInput
from ddiff.nn.parameterization import PARAMETERIZATIONS
from ddiff.nn.vector_head import VectorHead

VOCABULARY = FlatVocabulary(11)
LENGTH = 8
DIM = 5


def randomize(module: torch.nn.Module) -> None:
    """Set all parameters to random values; some are zero before training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_denoiser(qk_norm: bool = False) -> JointDenoiser:
    streams = {
        "text": StreamSpec(32, vocabulary=VOCABULARY),
        "latent": StreamSpec(16, dim=DIM),
    }
    backbone = MMDiT(streams, layers=3, heads=4, head_width=8, qk_norm=qk_norm)
    vector_head = VectorHead(DIM, 16)
    denoiser = JointDenoiser(
        backbone,
        {"text": TokenHead(VOCABULARY, 32), "latent": vector_head},
        {"text": PARAMETERIZATIONS["rest"], "latent": vector_head.parameterization},
    )
    randomize(denoiser)
    return denoiser.eval()


def make_state(samples: int = 3, vectors: int = 2) -> dict[str, Noisy]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 12, (samples, LENGTH), generator=generator)
    latent = torch.randn(samples, vectors, DIM, generator=generator, dtype=torch.float64)
    text_t = torch.rand(samples, 1, generator=generator, dtype=torch.float64)
    latent_t = torch.rand(samples, 1, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(samples, LENGTH, dtype=torch.bool)
    return {
        "text": Noisy(text, text_t.expand(-1, LENGTH), nothing),
        "latent": Noisy(latent, latent_t.expand(-1, vectors), nothing[:, :vectors]),
    }


def test_mmdit_with_one_stream_equals_the_dit_bitwise() -> None:
    dit = DiT(VOCABULARY, 32, layers=2, heads=4)
    randomize(dit)
    mmdit = MMDiT({"text": StreamSpec(32, vocabulary=VOCABULARY)}, 2, heads=4, head_width=8)
    mmdit.load_state_dict({rename(name): value for name, value in dit.state_dict().items()})
    noisy = make_state()["text"]
    streams = {"text": StreamInput(noisy.zt, noisy.t, torch.arange(LENGTH))}
    hidden = mmdit(streams, JointMask(None), JointContext())["text"]
    assert torch.equal(hidden, dit(noisy.zt, noisy.t, UNPADDED))


def rename(name: str) -> str:
    """Return the name of a DiT's parameter in the one-stream MMDiT."""
    if not name.startswith("blocks."):
        return f"streams.text.{name}"
    _, layer, rest = name.split(".", 2)
    return f"blocks.{layer}.streams.text.{rest}"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_mmdit_streams_attend_to_each_other(qk_norm: bool) -> None:
    denoiser = make_denoiser(qk_norm)
    state = make_state()
    before = denoiser.hidden_states(state, JointContext())
    other = {**state, "latent": state["latent"]._replace(zt=state["latent"].zt + 1.0)}
    after = denoiser.hidden_states(other, JointContext())
    assert not torch.allclose(before["text"], after["text"])
    # The time of the latent modulates the stream of the text.
    later = {**state, "latent": state["latent"]._replace(t=state["latent"].t * 0.5)}
    assert not torch.allclose(before["text"], denoiser.hidden_states(later, JointContext())["text"])


def test_mmdit_output_ignores_the_values_of_an_absent_field() -> None:
    denoiser = make_denoiser()
    state = make_state()
    absent = torch.tensor([True, False, True])
    state["latent"] = state["latent"]._replace(absent=absent)
    before = denoiser.hidden_states(state, JointContext())["text"].unflatten(0, (3, LENGTH))
    latent = state["latent"]
    changed = latent._replace(zt=latent.zt + 7.0, t=torch.ones_like(latent.t))
    after = denoiser.hidden_states({**state, "latent": changed}, JointContext())["text"]
    after = after.unflatten(0, (3, LENGTH))
    assert torch.equal(before[absent], after[absent])
    assert not torch.equal(before[~absent], after[~absent])


def test_mmdit_output_ignores_padding_of_another_field() -> None:
    denoiser = make_denoiser()
    state = make_state()
    valid = torch.ones(3, LENGTH, dtype=torch.bool)
    valid[:, 5:] = False
    context = JointContext({"text": valid})
    before = denoiser.hidden_states(state, context)["latent"]
    text = state["text"]
    other_states = torch.where(valid, text.zt, (text.zt + 1) % 12)
    changed = text._replace(zt=other_states, t=torch.where(valid, text.t, 1.0 - text.t))
    after = denoiser.hidden_states({**state, "text": changed}, context)["latent"]
    assert torch.equal(before, after)


@pytest.mark.parametrize("held", ["clean", "noise"])
def test_mmdit_passes_no_later_block_through_a_latent_to_an_earlier_block(held: str) -> None:
    """In one pass over a clean copy and noisy blocks, a latent must not carry later tokens.

    The latent may be clean or noise. Its stream attends to no block, so three layers pass nothing
    from a block to an earlier one.
    """
    denoiser = make_denoiser()
    block = (torch.arange(LENGTH) // 4).unsqueeze(0)

    def hidden(memory: Tensor, text: Tensor) -> Tensor:
        state = make_state()
        state["text"] = state["text"]._replace(zt=text, block=block, memory=memory)
        if held == "clean":
            latent = state["latent"]
            state["latent"] = latent._replace(t=0.0 * latent.t, clean=~latent.clean)
        return denoiser.hidden_states(state, JointContext())["text"].unflatten(0, (3, LENGTH))

    text = make_state()["text"].zt
    memory = (text + 3) % 11
    before = hidden(memory, text)
    later = torch.arange(LENGTH) >= 4
    after = hidden(torch.where(later, (memory + 1) % 11, memory), text)
    # Block 0 attends to no later token; block 1 attends to the noisy tokens of its own block only.
    assert torch.equal(before, after)
    after = hidden(memory, torch.where(later, (text + 1) % 12, text))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
    after = hidden(torch.where(later, memory, (memory + 1) % 11), text)
    assert not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", ["block", "slide"])
@pytest.mark.parametrize("rule", ["mixture", "first"])
def test_latent_is_trained_with_the_clean_text_that_evaluation_gives(
    rule: str, shape: Shape, paired: bool
) -> None:
    """Hidden states of the latent while it moves next to a clean text whose time rule has windows.

    A text that moves has blocks, to which the latent does not attend. The samples on which the text
    is given must have none, or the network learns to predict the latent without the text.
    """
    samples = 16
    slot = torch.arange(samples)
    fields = {
        "text": Field(
            TreeProcess(VOCABULARY, LogTimeClock((1.0,))),
            WindowTimes(2, shape, paired=paired),
            LENGTH,
        ),
        "latent": Field(GaussianProcess(CosineVP(), DIM), FlatTimes(), 1),
    }
    shared = shared_path(["text", "latent"])
    given_text = given_path(shared, {"text": "clean"})
    mixed = MixedPaths([(given_path(shared, {"latent": "clean"}), 1.0), (given_text, 1.0)])
    path = mixed if rule == "mixture" else first_path(["text", "latent"])
    denoiser = make_denoiser()
    generator = torch.Generator().manual_seed(3)
    values = {
        "text": torch.randint(0, 11, (samples, LENGTH), generator=generator),
        "latent": torch.randn(samples, 1, DIM, generator=generator, dtype=torch.float64),
    }
    other = {**values, "text": (values["text"] + 1) % 11}
    scored = {name: torch.ones(each.shape[:2], dtype=torch.bool) for name, each in values.items()}

    @torch.no_grad()
    def hidden(times: JointTimes, clean: dict[str, Tensor], rng: CounterRng) -> Tensor:
        state = corrupt_fields(fields, clean, times, scored, rng, "diffusion")
        return denoiser.hidden_states(state, JointContext())["latent"]

    trained = 0
    for step in range(12):
        rng = CounterRng(0, step, slot, 1)
        times = draw_training(path, fields, rng, slot, samples).times
        moves = (times["latent"].speed > 0).any(-1)
        if not bool(moves.any()):
            continue
        trained += int(moves.sum())
        found = hidden(times, values, rng)
        # The state of evaluation: the same time of the latent, and the text given.
        (given,) = given_text.draws(fields, rng, slot, samples)
        expected = hidden({**given, "latent": times["latent"]}, values, rng)
        # Rows may be evaluated with a mask or without one, which rounds in another way.
        torch.testing.assert_close(found[moves], expected[moves], rtol=1e-4, atol=1e-4)
        influence = (found - hidden(times, other, rng)).abs().amax(-1)
        assert float(influence[moves].min()) > 1e-3
    assert trained > samples


def test_mmdit_image_positions_rotate_rows_and_columns() -> None:
    """The attention of two pixels depends on their rows and columns, not on their number."""
    stream = StreamSpec(16, dim=DIM, grid=(2, 4))
    backbone = MMDiT({"image": stream}, 1, heads=2, head_width=8)
    positions = backbone.streams["image"].positions(torch.arange(8))
    assert positions.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize(("learned", "differ"), [(0, False), (LENGTH, True)])
def test_mmdit_tells_masked_positions_apart_only_with_learned_positions(
    learned: int, differ: bool
) -> None:
    """Differences of positions do not tell the first of equal states from the last one."""
    stream = StreamSpec(32, vocabulary=VOCABULARY, learned_positions=learned)
    backbone = MMDiT({"text": stream}, 2, heads=4, head_width=8)
    randomize(backbone)
    states = torch.full((1, LENGTH), VOCABULARY.num_tokens)
    times = torch.ones(1, LENGTH, dtype=torch.float64)
    inputs = StreamInput(states, times, torch.arange(LENGTH))
    hidden = backbone({"text": inputs}, JointMask(None), JointContext())["text"][0]
    spread = float((hidden - hidden[:1]).abs().max().detach())
    # Without learned positions, only the order of float32 sums differs between positions.
    assert spread > 0.1 if differ else spread < 1e-5


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"text.one": StreamSpec(16, dim=3)}, "name of a stream"),
        ({"text": StreamSpec(16)}, "exactly one of a vocabulary"),
        ({"image": StreamSpec(16, dim=3, grid=(2, 2))}, "multiple of 4"),
    ],
)
def test_mmdit_refuses_wrong_streams(streams: dict[str, StreamSpec], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MMDiT(streams, 1, heads=2, head_width=6)


def test_joint_denoiser_names_a_head_of_wrong_width() -> None:
    backbone = MMDiT({"latent": StreamSpec(16, dim=DIM)}, 1, heads=2, head_width=8)
    head = VectorHead(DIM, 8)
    with pytest.raises(ArgumentError, match='head of "latent"'):
        JointDenoiser(backbone, {"latent": head}, {"latent": head.parameterization})


def test_inner_attention_width_and_condition_width_do_not_depend_on_stream_widths() -> None:
    """Streams of widths 32 and 16 share an attention of 3 heads of 4 channels."""
    streams = {
        "text": StreamSpec(32, vocabulary=VOCABULARY),
        "latent": StreamSpec(16, dim=DIM),
    }
    backbone = MMDiT(streams, layers=1, heads=3, head_width=4, condition_width=24)
    shapes = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    assert shapes["blocks.0.streams.text.qkv.weight"] == (3 * 12, 32)
    assert shapes["blocks.0.streams.latent.attended.weight"] == (16, 12)
    assert shapes["streams.text.modulation.out.weight"] == (8 * 32, 24)
    assert shapes["streams.latent.modulation.out.weight"] == (8 * 16, 24)
