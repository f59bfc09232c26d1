"""Layouts of published checkpoints whose networks read the noise level; they become a `DDiT`.

| layout | process | network reads | output |
|---|---|---|---|
| sedd | sedd, absorbing or uniform | sigma | log-scores |
| gidd | gidd | t | logits of the tokens |
| mdlm_sigma | mdlm, with time_conditioning | sigma | logits of the tokens |
| udlm | sedd, uniform and log-linear | sigma | logits of the tokens |
| duo | sedd, uniform and log-linear | sigma | logits of the tokens |
| hybrid_gamma | hybrid_gamma | sigma of each position | log-scores |

Papers: SEDD arXiv 2310.16834, GIDD 2503.04482, MDLM 2406.07524, UDLM 2412.10193, Duo 2506.10892,
gamma-hybrid 2504.06416.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from ddiff import ArgumentError, DataError, Exported, ExportSource, Imported, PublishedFiles

from .folding import Sizes
from .level_folding import fold_level_weights, unfold_level_weights
from .published_config import (
    PREFIX,
    SettinglessLayout,
    check_equal,
    kind_of,
    read_hub_sizes,
    strip_prefix,
    write_hub_config,
)

GPT2 = "gpt2"
BERT = "bert-base-uncased"
LOG_LINEAR = {"noise": "loglinear", "floor": 1e-3}  # of all published models but the gamma-hybrid


class LevelLayout(SettinglessLayout):
    """Base class of the layouts of `DDiT`.

    A subclass names the keys of the configuration and the tables of the recipe.
    """

    prefix = ""
    plugins: tuple[str, ...] = ("dit",)
    tokenizer: str = GPT2

    @abstractmethod
    def read_sizes(self, files: PublishedFiles) -> Sizes:
        """Return the sizes of the network, from the configuration."""

    @abstractmethod
    def read_tables(self, files: PublishedFiles, sizes: Sizes) -> dict[str, dict[str, Any]]:
        """Return the tables vocabulary, process, denoiser, and others that are not empty.

        [denoiser] need not contain the sizes.
        """

    def read(self, files: PublishedFiles) -> Imported:
        sizes = self.read_sizes(files)
        tables = self.read_tables(files, sizes)
        has_mask = tables["vocabulary"].get("mask", True)
        num_tokens = sizes.rows - int(has_mask)
        tensors = strip_prefix(files.tensors)
        denoiser = tables["denoiser"]
        weights = fold_level_weights(
            tensors,
            sizes,
            outputs=sizes.rows if kind_of(denoiser["head"]) == "score" else num_tokens,
            has_final=denoiser.get("final_modulation", True),
        )
        if "classes" in denoiser:
            rows = denoiser["classes"] + 1
            weights["backbone.classes.weight"] = tensors.take(
                "cond_map.embedding_table.weight", rows, sizes.condition
            )
        recipe = {
            "plugins": list(self.plugins),
            "data": {"length": sizes.length},
            "objective": {},
            "sample": {},
            **tables,
            "denoiser": {
                "kind": "ddit",
                "width": sizes.width,
                "layers": sizes.layers,
                "heads": sizes.heads,
                "condition_width": sizes.condition,
                **denoiser,
            },
        }
        return Imported(recipe, weights, num_tokens, self.tokenizer)

    @abstractmethod
    def write_config(self, recipe: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return the configuration of a model.

        Raises ArgumentError for a model that the layout cannot represent.
        """

    def write(self, source: ExportSource) -> Exported:
        denoiser = source.recipe["denoiser"]
        check_equal("[denoiser] kind", "ddit", denoiser["kind"])
        sizes = Sizes(
            rows=source.vocabulary.num_states,
            width=denoiser["width"],
            layers=denoiser["layers"],
            heads=denoiser["heads"],
            condition=denoiser["condition_width"],
            length=source.recipe["data"]["length"],
        )
        config = self.write_config(source.recipe, sizes)
        tensors = unfold_level_weights(source.weights, sizes)
        if "backbone.classes.weight" in source.weights:
            classes = source.weights["backbone.classes.weight"]
            tensors["cond_map.embedding_table.weight"] = classes
        return Exported(config, {self.prefix + name: tensor for name, tensor in tensors.items()})


# ---------------------------------------------------------------------- SEDD


class SeddLayout(LevelLayout):
    """Score entropy of louaaron, such as sedd-small. The configuration has no model_type."""

    plugins = ("sedd", "dit")

    def recognize(self, files: PublishedFiles) -> bool:
        config = files.config
        return "graph" in config and "tokens" in config and "model_type" not in config

    def read_sizes(self, files: PublishedFiles) -> Sizes:
        is_masked = _read_choice(files, "graph.type", ("absorb", "uniform")) == "absorb"
        return _read_nested_sizes(files, files.read_count("tokens") + int(is_masked))

    def read_tables(self, files: PublishedFiles, sizes: Sizes) -> dict[str, dict[str, Any]]:
        graph = files.read_value("graph.type")
        scaled = bool(files.read_value("model.scale_by_sigma"))
        if scaled and graph == "uniform":
            raise DataError(
                f"{files.source}: the key model.scale_by_sigma must be false with graph.type = "
                '"uniform", which the published program does not scale; it is true. Use the '
                "configuration that was published with the weights."
            )
        noise = _read_choice(files, "noise.type", ("loglinear", "geometric"))
        process = {"kind": "sedd", "graph": graph, **LOG_LINEAR}
        if noise == "geometric":
            ends = {name: files.read_value(f"noise.{name}") for name in ("sigma_min", "sigma_max")}
            process = {"kind": "sedd", "graph": graph, "noise": noise, **ends}
        return {
            "vocabulary": {"kind": "flat", "mask": graph == "absorb"},
            "process": process,
            "denoiser": {
                "head": {"kind": "score", "scaled": scaled},
                "noise": "sigma",
                "dropout": files.config["model"].get("dropout", 0.0),
            },
            "sample": {"sampler": "analytic"},
        }

    def write_config(self, recipe: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        process, denoiser = recipe["process"], recipe["denoiser"]
        check_equal("[process] kind", "sedd", process["kind"])
        check_equal("[denoiser] head", "score", kind_of(denoiser["head"]))
        _check_level(denoiser, noise="sigma")
        is_masked = process["graph"] == "absorb"
        scaled = denoiser["head"].get("scaled")
        noise = {"type": process["noise"], "sigma_min": 1e-4, "sigma_max": 20.0}
        if process["noise"] == "loglinear":
            check_equal("[process] floor", 1e-3, process.get("floor", 1e-3))
        for name in ("sigma_min", "sigma_max"):
            noise[name] = process.get(name, noise[name])
        return {
            "tokens": sizes.rows - int(is_masked),
            "graph": {"type": process["graph"], "file": "data", "report_all": False},
            "noise": noise,
            "model": {
                **_write_nested_sizes(sizes),
                "scale_by_sigma": is_masked if scaled is None else scaled,
                "dropout": denoiser["dropout"],
            },
        }


# ---------------------------------------------------------------------- GIDD


class GiddLayout(LevelLayout):
    """Generalized interpolating diffusion of dvruette, such as gidd-small-p_unif-0.1."""

    plugins = ("gidd", "dit")

    def recognize(self, files: PublishedFiles) -> bool:
        return files.config.get("model_type") == "dit" and "p_uniform" in files.config

    def read_sizes(self, files: PublishedFiles) -> Sizes:
        return Sizes(
            rows=files.read_count("vocab_size"),
            width=files.read_count("hidden_size"),
            layers=files.read_count("num_hidden_layers"),
            heads=files.read_count("num_attention_heads"),
            condition=files.read_count("timestep_cond_dim"),
            length=files.read_count("max_seq_len"),
        )

    def read_tables(self, files: PublishedFiles, sizes: Sizes) -> dict[str, dict[str, Any]]:
        share = files.read_value("p_uniform")
        return {
            "vocabulary": {"kind": "flat"},
            "process": {"kind": "gidd", "p_uniform": share, "gamma": 1.0, "form": "current"},
            "denoiser": {"head": "tokens", "noise": "t"},
        }

    def write_config(self, recipe: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        process, denoiser = recipe["process"], recipe["denoiser"]
        check_equal("[process] kind", "gidd", process["kind"])
        check_equal("[process] gamma", 1.0, process["gamma"])
        check_equal("[process] form", "current", process["form"])
        check_equal("[denoiser] head", "tokens", kind_of(denoiser["head"]))
        _check_level(denoiser, noise="t")
        return {
            "model_type": "dit",
            "vocab_size": sizes.rows,
            "max_seq_len": sizes.length,
            "hidden_size": sizes.width,
            "timestep_cond_dim": sizes.condition,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "attention_dropout": 0.0,
            "p_uniform": process["p_uniform"],
            "t_eps": 1e-4,
        }


# ---------------------------------------------------------------------- MDLM, UDLM, Duo


class ConditionedLayout(LevelLayout):
    """Base class of the layouts of kuleshov-group and s-sahoo that read sigma.

    Attributes:
        model_type: value of this key in the configuration, in lower case.
        mask: whether the last row is a mask.
        process: table [process].
    """

    prefix = PREFIX
    plugins = ("sedd", "dit")
    model_type = ""
    mask = False
    process: Mapping[str, Any] = {"kind": "sedd", "graph": "uniform", **LOG_LINEAR}

    def recognize(self, files: PublishedFiles) -> bool:
        return str(files.config.get("model_type")).lower() == self.model_type

    def read_sizes(self, files: PublishedFiles) -> Sizes:
        return read_hub_sizes(files)

    def read_tables(self, files: PublishedFiles, sizes: Sizes) -> dict[str, dict[str, Any]]:
        config = files.config
        _check_flag(files, "time_conditioning", config.get("time_conditioning", True), True)
        denoiser = {"head": "tokens", "noise": "sigma", "dropout": config.get("dropout", 0.0)}
        if config.get("cfg"):
            denoiser["classes"] = files.read_count("cfg_num_classes")
        return {
            "vocabulary": {"kind": "flat", "mask": self.mask},
            "process": dict(self.process),
            "denoiser": denoiser,
        }

    def write_config(self, recipe: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        process, denoiser = recipe["process"], recipe["denoiser"]
        for key, value in self.process.items():
            check_equal(f"[process] {key}", value, process.get(key, value))
        check_equal("[denoiser] head", "tokens", kind_of(denoiser["head"]))
        _check_level(denoiser, noise="sigma")
        config: dict[str, Any] = {
            "model_type": self.model_type,
            **write_hub_config(sizes, denoiser["dropout"], time_conditioning=True),
        }
        if denoiser.get("classes"):
            config |= {"cfg": True, "cfg_num_classes": denoiser["classes"]}
        return config


class SigmaMdlmLayout(ConditionedLayout):
    """MDLM whose network reads sigma (`time_conditioning = true`)."""

    plugins = ("mdlm", "dit")
    model_type = "mdlm"
    mask = True
    process: Mapping[str, Any] = {"kind": "mdlm"}

    def recognize(self, files: PublishedFiles) -> bool:
        return super().recognize(files) and bool(files.config.get("time_conditioning"))


class UdlmLayout(ConditionedLayout):
    """Uniform diffusion of kuleshov-group, such as udlm-lm1b, also with labels."""

    model_type = "udlm"
    tokenizer = BERT


class DuoLayout(ConditionedLayout):
    """Duo of s-sahoo, also distilled. The tokens include one that the tokenizer never writes."""

    model_type = "duo"

    def recognize(self, files: PublishedFiles) -> bool:
        return super().recognize(files) and not files.config.get("causal_attention")


# ---------------------------------------------------------------------- gamma-hybrid


class GammaLayout(LevelLayout):
    """Gamma-hybrid of ServiceNow, such as hdlm-base-gamma-0.01."""

    plugins = ("hybrid", "sedd", "dit")

    def recognize(self, files: PublishedFiles) -> bool:
        graph = files.config.get("graph")
        kind = graph.get("type") if isinstance(graph, Mapping) else None
        return files.config.get("model_type") == "gamma_hybrid" or kind == "QGamma"

    def read_sizes(self, files: PublishedFiles) -> Sizes:
        return _read_nested_sizes(files, files.read_count("tokenizer.tokens") + 1)

    def read_tables(self, files: PublishedFiles, sizes: Sizes) -> dict[str, dict[str, Any]]:
        gamma = files.read_value("graph.gamma")
        model = files.config["model"]
        for key in ("transformer_sigma_conditioning", "use_timestep_embedding"):
            _check_flag(files, f"model.{key}", model.get(key, True), True)
        return {
            "vocabulary": {"kind": "flat"},
            "process": {"kind": "hybrid_gamma", "gamma": gamma, "time": "noise", "floor": 5e-3},
            "denoiser": {
                "head": {"kind": "score", "scaled": True, "everywhere": True},
                "noise": "sigma",
                "per": "position",
                "mixing": gamma if model.get("hybrid_sigma_embedding", True) else 0.0,
                "final_modulation": False,
                "dropout": model.get("dropout", 0.0),
            },
            "sample": {"sampler": "analytic"},
        }

    def write_config(self, recipe: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        process, denoiser = recipe["process"], recipe["denoiser"]
        check_equal("[process] kind", "hybrid_gamma", process["kind"])
        check_equal("[process] time", "noise", process["time"])
        check_equal("[process] floor", 5e-3, process.get("floor", 5e-3))
        check_equal("[denoiser] head", "score", kind_of(denoiser["head"]))
        check_equal("[denoiser] head.everywhere", True, denoiser["head"].get("everywhere"))
        _check_level(denoiser, noise="sigma", per="position", final_modulation=False)
        if denoiser["mixing"] not in (0.0, process["gamma"]):
            raise ArgumentError(
                "export: this layout represents only models whose [denoiser] mixing is 0 or the "
                f"gamma of the process, {process['gamma']}; got {denoiser['mixing']}. Export the "
                "weights under their own names with --format safetensors."
            )
        return {
            "model_type": "gamma_hybrid",
            "tokenizer": {"tokens": sizes.rows - 1},
            "graph": {"type": "QGamma", "gamma": process["gamma"]},
            "model": {
                **_write_nested_sizes(sizes),
                "dropout": denoiser["dropout"],
                "scale_by_sigma": True,
                "transformer_sigma_conditioning": True,
                "hybrid_sigma_embedding": denoiser["mixing"] > 0.0,
                "post_process_logits": True,
                "use_timestep_embedding": True,
            },
        }


# ---------------------------------------------------------------------- configuration


def _read_nested_sizes(files: PublishedFiles, rows: int) -> Sizes:
    """Return the sizes in the table `model` of a configuration of the SEDD program."""
    return Sizes(
        rows=rows,
        width=files.read_count("model.hidden_size"),
        layers=files.read_count("model.n_blocks"),
        heads=files.read_count("model.n_heads"),
        condition=files.read_count("model.cond_dim"),
        length=files.read_count("model.length"),
    )


def _write_nested_sizes(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.width,
        "cond_dim": sizes.condition,
        "length": sizes.length,
        "n_blocks": sizes.layers,
        "n_heads": sizes.heads,
    }


def _read_choice(files: PublishedFiles, key: str, choices: tuple[str, ...]) -> str:
    """Return the value of a key. Raises DataError for a value that is not among `choices`."""
    value = files.read_value(key)
    if value not in choices:
        raise DataError(
            f"{files.source}: the key {key} must be {' or '.join(map(repr, choices))}; got "
            f"{value!r}. This layout does not know such a model. Choose another with --layout."
        )
    return str(value)


def _check_flag(files: PublishedFiles, key: str, found: Any, expected: bool) -> None:
    if found is not expected:
        raise DataError(
            f"{files.source}: the key {key} must be {str(expected).lower()} in this layout; got "
            f"{found!r}. Choose another layout with --layout."
        )


def _check_level(
    denoiser: Mapping[str, Any],
    *,
    noise: str,
    per: str = "sequence",
    final_modulation: bool = True,
) -> None:
    """Raise ArgumentError if the network reads another noise level."""
    check_equal("[denoiser] noise", noise, denoiser["noise"])
    check_equal("[denoiser] per", per, denoiser["per"])
    check_equal("[denoiser] final_modulation", final_modulation, denoiser["final_modulation"])
    if per == "sequence":
        check_equal("[denoiser] mixing", 0.0, denoiser["mixing"])
