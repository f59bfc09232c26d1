"""Components of fields recipes: paths, normalizers, heads, losses and the backbone mmdit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ddiff.core.gaussian import GaussianProcess, Output, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP, Flow, LinearBetaVP
from ddiff.core.normalizer import IdentityNormalizer, MeanStdNormalizer, PcaNormalizer
from ddiff.core.paths import HeldAt, Leg, LegPath, first_path, lagged_path, shared_path
from ddiff.core.training_paths import CyclePaths, IndependentTimes, MixedPaths
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError, PluginError
from ddiff.nn.heads import TokenHead
from ddiff.nn.joint_denoiser import StreamShape
from ddiff.nn.vector_head import VectorHead
from ddiff.plugin.loader import load_plugins
from ddiff.recipe.component import ComponentSpec
from ddiff.training.gaussian_losses import MinSnr, OutputMse, SigmoidWeighted

PLUGINS = ["core", "dit", "gaussian", "mdlm", "gidd", "sedd", "hdlm", "hybrid"]
REGISTRY = load_plugins(PLUGINS)
NAMES = ("text", "image", "latent")
WORDS = FlatVocabulary(5)


def make_spec(kind: str, name: str, **keys: Any) -> ComponentSpec:
    """Configure a component from keys as a recipe has them: JSON values, validated strictly."""
    component = REGISTRY.component(kind, name)
    config = component.config_class().model_validate_json(json.dumps(keys), strict=True)
    return ComponentSpec(component, config, "[table]")


def build_path(kind: str, names: tuple[str, ...] = NAMES, **keys: Any) -> Any:
    return make_spec("path_rule", kind, **keys).build(names=names)


def is_same_path(first: LegPath, second: LegPath) -> bool:
    return dict(first.legs) == dict(second.legs) and dict(first.power) == dict(second.power)


# ---------------------------------------------------------------------- paths


def test_path_rules_build_the_paths_of_their_names() -> None:
    assert is_same_path(build_path("shared"), shared_path(NAMES))
    order = ["image", "latent", "text"]
    assert is_same_path(build_path("first", order=order), first_path(order))
    lagged = build_path("lagged", ("text", "latent"), ahead="latent", behind="text", lag=0.4)
    assert is_same_path(lagged, lagged_path("latent", "text", 0.4))
    independent = build_path("independent")
    assert isinstance(independent, IndependentTimes)
    assert independent.names == NAMES


@pytest.mark.parametrize("kind", ["shared", "first"])
def test_path_rules_accept_a_single_field(kind: str) -> None:
    keys = {"order": ["text"]} if kind == "first" else {}
    path = build_path(kind, ("text",), **keys)
    assert path.legs == {"text": Leg(0.0, 1.0)}


def test_path_rules_pass_the_power_of_every_field() -> None:
    for kind, keys in [("shared", {}), ("first", {"order": list(NAMES)})]:
        path = build_path(kind, power={"latent": 0.2}, **keys)
        assert path.power == {"latent": 0.2}


def test_mixture_holds_fields_and_divides_weights_by_their_sum() -> None:
    mixture = build_path(
        "mixture",
        parts=[
            {"path": "shared", "weight": 3.0},
            {"clean": ["latent"], "absent": ["text"]},
        ],
    )
    assert isinstance(mixture, MixedPaths)
    (joint, first), (given, second) = mixture.parts
    assert (first, second) == (0.75, 0.25)
    assert is_same_path(joint, shared_path(NAMES))
    assert given.legs == {"text": "absent", "image": Leg(0.0, 1.0), "latent": "clean"}


def test_part_of_a_mixture_holds_vectors_with_noise() -> None:
    parts = [{"noisy": {"latent": 0.3}, "prior": ["image"]}]
    ((path, _),) = build_path("mixture", parts=parts).parts
    assert path.legs == {"text": Leg(0.0, 1.0), "image": "prior", "latent": HeldAt(0.3)}


def test_part_of_a_mixture_may_have_any_path_of_its_moving_fields() -> None:
    parts = [
        {"path": {"kind": "first", "order": ["latent", "text"]}, "prior": ["image"]},
        {"path": {"kind": "lagged", "ahead": "text", "behind": "image"}, "clean": ["latent"]},
        {"path": {"power": {"text": 2.0}}, "clean": ["latent", "image"]},
    ]
    first, lagged, power = (path for path, _ in build_path("mixture", parts=parts).parts)
    assert first.legs == {**first_path(["latent", "text"]).legs, "image": "prior"}
    assert lagged.legs == {**lagged_path("text", "image", 0.25).legs, "latent": "clean"}
    assert power.power == {"text": 2.0}


def test_cycle_changes_its_path_by_the_step() -> None:
    cycle = build_path(
        "cycle",
        ("text", "latent"),
        parts=[{"path": "independent", "steps": 2}, {"clean": ["latent"]}],
    )
    assert isinstance(cycle, CyclePaths)
    kinds = [type(cycle.path_at(step)).__name__ for step in range(6)]
    assert kinds == ["IndependentTimes", "IndependentTimes", "LegPath"] * 2


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("first", {"order": ["text", "image"]}, r"order must have every moving field once"),
        ("first", {"order": ["text", "text", "image", "latent"]}, "every moving field once"),
        ("first", {"order": ["txt", "image", "latent"]}, "Moving fields: text, image, latent"),
        ("shared", {"power": {"img": 0.5}}, r'power must have names of moving fields; got "img"'),
        ("lagged", {"ahead": "text", "behind": "image"}, "has two moving fields"),
        ("mixture", {"parts": [{"clean": ["txt"]}]}, r'part 1: clean must .* got "txt"'),
        (
            "mixture",
            {"parts": [{}, {"clean": ["text"], "absent": ["text"]}]},
            'part 2: clean, prior, absent and noisy must have different .*; got "text" in clean',
        ),
        ("mixture", {"parts": [{"noisy": {"txt": 0.3}}]}, r'part 1: noisy must .* got "txt"'),
        (
            "mixture",
            {"parts": [{"clean": ["text"], "noisy": {"text": 0.3}}]},
            'got "text" in clean and in noisy',
        ),
        ("mixture", {"parts": [{"prior": list(NAMES)}]}, "at least one field must move"),
        ("mixture", {"parts": [{"path": "independent"}]}, "must be a path"),
        (
            "mixture",
            {"parts": [{"path": {"kind": "first", "order": list(NAMES)}, "clean": ["text"]}]},
            "part 1: order must .* Moving fields: image, latent",
        ),
        ("mixture", {"parts": [{"path": {"power": {"text": 2}}, "clean": ["text"]}]}, "part 1: po"),
        ("cycle", {"parts": [{"path": "independent", "clean": ["text"]}]}, "move every field"),
    ],
)
def test_path_rules_refuse_wrong_fields_and_list_the_fields(
    kind: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        build_path(kind, **keys)
    assert str(caught.value).startswith("[table]: ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parts": []}, "at least 1 item"),
        ({"parts": [{"path": "diagonal"}]}, "'shared', 'first', 'lagged' or 'independent'"),
        ({"parts": [{"path": {"lag": 0.5}}]}, 'kind = "shared" has the keys power; got lag'),
        ({"parts": [{"path": "first"}]}, "needs order"),
        ({"parts": [{"path": {"kind": "lagged", "ahead": "text"}}]}, "needs ahead and behind"),
        ({"parts": [{"weight": 0.0}]}, "greater than 0"),
        ({"parts": [{"given": ["text"]}]}, "Extra inputs are not permitted"),
    ],
)
def test_mixture_config_refuses_wrong_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_spec("path_rule", "mixture", **keys)


@pytest.mark.parametrize("kind", ["mixture", "cycle"])
def test_parts_of_a_path_rule_are_written_and_read_again_unchanged(kind: str) -> None:
    parts = [
        {"path": "shared"},
        {"path": {"kind": "lagged", "ahead": "text", "behind": "image"}, "clean": ["latent"]},
    ]
    config = make_spec("path_rule", kind, parts=parts).config
    # A recipe file omits keys with the value None.
    written = json.dumps(config.model_dump(mode="json", exclude_none=True))
    assert type(config).model_validate_json(written, strict=True) == config


# ---------------------------------------------------------------------- normalizers


def test_normalizers_are_fitted_and_announce_their_width() -> None:
    vectors = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * 1.5 + 1.0
    chunks = [vectors[:50], vectors[50:]]
    widths = {"none": 4, "standard": 4, "pca": 2}
    kinds = {"none": IdentityNormalizer, "standard": MeanStdNormalizer, "pca": PcaNormalizer}
    for name, width in widths.items():
        spec = make_spec("normalizer", name, **({"width": 2} if name == "pca" else {}))
        normalizer = spec.build(chunks=chunks, width=4)
        assert isinstance(normalizer, kinds[name])
        assert normalizer.width == width == spec.preview(width=4)
        again = spec.load(tensors=normalizer.tensors(), width=4)
        assert torch.equal(again.encode(vectors), normalizer.encode(vectors))
    # The normalizer "standard" divides by the deviation of the whole data, not of a chunk.
    encoded = make_spec("normalizer", "standard").build(chunks=chunks, width=4).encode(vectors)
    assert torch.allclose(encoded.mean(0), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(encoded.var(0, correction=0), torch.ones(4).double(), atol=1e-12)


@pytest.mark.parametrize("scale", [0.04, 3.0])
def test_normalizer_none_refuses_vectors_of_another_scale(scale: float) -> None:
    vectors = scale * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match=r"\[table\]: .* between 0.5 and 2.0; got .*standard"):
        make_spec("normalizer", "none").build(chunks=[vectors], width=4)


def test_load_of_a_component_without_it_asks_the_plugin_for_it() -> None:
    with pytest.raises(PluginError, match=r"define load\(config, tensors, width\)"):
        make_spec("head", "tokens").load(tensors={}, width=4)


STATES = {
    "vectors": ["gaussian", "vector", "output_mse", "min_snr", "sigmoid"],
    "tokens": ["mdlm", "hdlm", "tokens", "published", "hard"],
}


def test_components_declare_the_states_that_they_serve() -> None:
    kinds = ("process", "head", "training_loss", "sampler")
    states = {}
    for component in REGISTRY.components():
        if component.kind in kinds:
            states[component.name] = component.members().states
    for state, names in STATES.items():
        assert {states[name] for name in names} == {frozenset({state})}
    for name in ("elbo", "clip"):
        assert states[name] == {"tokens", "vectors"}
    # The declaration of a sampler in a recipe is that of the sampler it builds.
    for component in REGISTRY.components("sampler"):
        spec = ComponentSpec(component, component.config_class()())
        built = spec.build(steps=4, vocabulary=WORDS)
        assert component.members().states == {built.states}, component.name


def test_pca_normalizer_refuses_more_components_than_numbers_before_reading() -> None:
    with pytest.raises(ArgumentError, match=r"width must be at most 4.*got 5"):
        make_spec("normalizer", "pca", width=5).build(chunks=None, width=4)


# ---------------------------------------------------------------------- heads and losses


@pytest.mark.parametrize("output", ["eps", "x0", "v", "u"])
def test_vector_head_has_the_output_in_its_settings(output: Output) -> None:
    spec = make_spec("head", "vector", output=output)
    head = spec.build(vocabulary=None, width=6, dim=3)
    assert isinstance(head, VectorHead)
    assert (head.dim, head.width, head.parameterization.output) == (3, 6, output)


def test_heads_refuse_fields_of_the_other_kind() -> None:
    with pytest.raises(ArgumentError, match=r'\[table\]: The head "vector" is for fields of vec'):
        make_spec("head", "vector").build(vocabulary=WORDS, width=6)
    for name in ("tokens", "tied", "levelwise"):
        with pytest.raises(
            ArgumentError, match=rf'\[table\]: The head "{name}" is for tokens, but'
        ):
            make_spec("head", name).build(vocabulary=None, width=6, dim=3)
    assert isinstance(
        make_spec("head", "tokens").build(vocabulary=WORDS, width=6, dim=None), TokenHead
    )


@pytest.mark.parametrize("name", ["mdlm", "gidd", "sedd", "hdlm", "hybrid_epsilon"])
def test_processes_of_tokens_refuse_a_field_of_vectors(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf'\[table\]: The process "{name}" is for tokens, but'):
        make_spec("process", name).build(vocabulary=None, width=3)


def test_gaussian_process_is_built_for_vectors_and_refuses_tokens() -> None:
    assert make_spec("process", "gaussian").build(vocabulary=None, width=3).width == 3
    with pytest.raises(ArgumentError, match="is for vectors and needs their width"):
        make_spec("process", "gaussian").build(vocabulary=WORDS, width=None)


def test_losses_of_vectors_have_the_weights_of_their_settings() -> None:
    process = GaussianProcess(CosineVP(), 2)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    rows = torch.zeros(3, 2, dtype=torch.float64)
    # v on a variance-preserving schedule: |v - v_hat|^2 = |x - x_hat|^2 / sigma^2.
    loss = make_spec("training_loss", "output_mse").build(process=process)
    assert isinstance(loss, OutputMse)
    expected = process.deviation(t) ** -2
    assert torch.allclose(loss.weight(process, rows, rows, t), expected, rtol=1e-12)
    loss = make_spec("training_loss", "min_snr", gamma=1.5).build(process=process)
    assert isinstance(loss, MinSnr)
    assert torch.equal(loss.weight(process, rows, rows, t), process.snr(t).clamp(max=1.5))
    loss = make_spec("training_loss", "sigmoid", bias=-1.0).build(process=process)
    assert isinstance(loss, SigmoidWeighted)
    factor = torch.sigmoid(-1.0 - process.snr(t).log())
    expected = process.weight(rows, rows, t) * factor
    assert torch.allclose(loss.weight(process, rows, rows, t), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["output_mse", "min_snr", "sigmoid"])
def test_losses_of_vectors_refuse_a_process_of_tokens(name: str) -> None:
    process = make_spec("process", "mdlm").build(vocabulary=WORDS, width=None)
    with pytest.raises(ArgumentError, match=f'loss = "{name}" is for vectors .* got MaskedDiff'):
        make_spec("training_loss", name).build(process=process)


def test_output_mse_refuses_noise_on_a_schedule_without_signal_at_the_end() -> None:
    spec = make_spec("training_loss", "output_mse", output="eps")
    assert spec.build(process=GaussianProcess(LinearBetaVP(), 2)).output == "eps"
    with pytest.raises(ArgumentError, match=r'cannot predict "eps" on a schedule with SNR'):
        spec.build(process=GaussianProcess(Flow(), 2))


@pytest.mark.parametrize("name", ["empirical", "hard", "published", "dynamic"])
def test_losses_of_other_processes_refuse_vectors(name: str) -> None:
    with pytest.raises(ArgumentError, match="got GaussianProcess"):
        make_spec("training_loss", name).build(process=GaussianProcess(CosineVP(), 2))


@pytest.mark.parametrize("name", ["elbo", "clip"])
def test_losses_of_tokens_that_use_the_bound_accept_vectors(name: str) -> None:
    process = GaussianProcess(CosineVP(), 2)
    loss = make_spec("training_loss", name).build(process=process)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    rows = torch.ones(2, 2, dtype=torch.float64)
    weight = loss.weight(process, rows, rows, t)
    divergence = loss.divergence(process, PredictedMean(0.0 * rows), rows, rows, t)
    assert bool((weight > 0).all())
    assert torch.allclose(divergence, torch.full((2,), 2.0, dtype=torch.float64))


# ---------------------------------------------------------------------- backbone


STREAMS = {
    "text": StreamShape(WORDS, None, 7),
    "image": StreamShape(None, 3, 12, grid=(3, 4)),
}


def test_mmdit_component_builds_streams_of_the_given_widths() -> None:
    spec = make_spec(
        "joint_backbone",
        "mmdit",
        width=32,
        layers=2,
        heads=4,
        qk_norm=True,
        dropout=0.5,
        streams={"image": {"width": 16}},
    )
    backbone = spec.build(streams=STREAMS)
    assert backbone.widths == {"text": 32, "image": 16}
    assert backbone.head_width == 8
    assert len(backbone.blocks) == 2
    block = backbone.blocks[0].streams["image"]
    assert (block.heads, block.dropout.p) == (4, 0.5)
    assert block.query_norm is not None
    assert backbone.streams["image"].grid == (3, 4)
    assert backbone.streams["text"].grid is None
    assert backbone.streams["image"].embedding.in_features == 3


def test_mmdit_component_takes_defaults_from_its_size() -> None:
    with torch.device("meta"):
        backbone = make_spec("joint_backbone", "mmdit", size="small").build(streams=STREAMS)
    assert backbone.widths == {"text": 768, "image": 768}
    assert len(backbone.blocks) == 12
    assert (backbone.head_width, backbone.reads_time) == (64, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"streams": {"img": {"width": 8}}}, r'got "img"\. Fields: text, image\.'),
        ({"width": 30, "heads": 4}, "width must be a multiple of heads"),
        ({"width": 12, "heads": 2}, "head_width must be a multiple of 4"),
    ],
)
def test_mmdit_component_refuses_wrong_settings(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_spec("joint_backbone", "mmdit", **keys).build(streams=STREAMS)


def test_mmdit_component_accepts_a_tree_of_tokens() -> None:
    tree = HierarchicalVocabulary([[0, 1, 0]])
    spec = make_spec("joint_backbone", "mmdit", width=16, layers=1, heads=2)
    backbone = spec.build(streams={"text": StreamShape(tree, None, 4)})
    assert backbone.widths == {"text": 16}
