"""Layouts of published checkpoints whose networks are exactly a `DiT` with `time = false`.

MDLM (arXiv 2406.07524) and BD3LM (2503.09573) replace sigma by 0 unless `time_conditioning` is
true. The epsilon-hybrid (2504.06416) and the autoregressive baseline of Duo (2506.10892) have no
embedding of sigma. Their modulation vectors are therefore constants, and `folding` moves them into
the vectors of `DiT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    Context,
    DataError,
    Exported,
    ExportSource,
    FlatVocabulary,
    Imported,
    PublishedFiles,
    PublishedTensors,
)

from .dit import HEAD_WIDTH, SIZES, DiT
from .folding import Sizes, fold_weights, unfold_plain_weights, unfold_weights
from .published_config import (
    PREFIX,
    SettinglessLayout,
    check_equal,
    kind_of,
    read_hub_sizes,
    strip_prefix,
    write_hub_config,
)

TOKENIZER = "gpt2"  # the published models that have no tokenizer in their folder use this one
PROBED = 64  # positions of the sequence of masks on which the probability of the mask is measured


class MdlmLayout(SettinglessLayout):
    """MDLM of kuleshov-group, such as mdlm-owt, without time conditioning."""

    def recognize(self, files: PublishedFiles) -> bool:
        config = files.config
        # Training checkpoints have the configuration of the training program.
        is_trained = config.get("parameterization") == "subs" and config.get("backbone") == "dit"
        is_known = config.get("model_type") == "mdlm" or is_trained
        return is_known and not config.get("time_conditioning") and "block_size" not in config

    def read(self, files: PublishedFiles) -> Imported:
        return _read_masked(files, {}, {})

    def write(self, source: ExportSource) -> Exported:
        sizes = _check_folds(source, "mdlm")
        _check_times(source, "flat")
        config = {"model_type": "mdlm", **_write_config(source, sizes), "return_dict": False}
        return _write_masked(source, sizes, config)


class Bd3lmLayout(SettinglessLayout):
    """Block diffusion of kuleshov-group, such as bd3lm-owt-block_size4."""

    def recognize(self, files: PublishedFiles) -> bool:
        return files.config.get("model_type") == "bd3lm"

    def read(self, files: PublishedFiles) -> Imported:
        width = files.read_count("block_size")
        files.tensors.skip("sampling_eps_min", "sampling_eps_max")
        if files.config.get("cross_attn") is False:
            raise DataError(
                f"{files.source}: the key cross_attn must be true, because blocks attend to the "
                "clean tokens before them; it is false. This layout does not read such a model."
            )
        length = files.read_count("model_length")
        if width == length:
            # One block: the pretrained models from which training with blocks starts.
            return _read_masked(files, {}, {})
        if length % width:
            raise DataError(
                f"{files.source}: the key block_size must divide model_length; got block_size = "
                f"{width} and model_length = {length}. Use the published config.json."
            )
        times = {"kind": "block", "width": width}
        sampler = {"kind": "blockwise", "width": width}
        steps = {"steps": width}
        return _read_masked(files, {"times": times}, {"sampler": sampler, **steps})

    def write(self, source: ExportSource) -> Exported:
        sizes = _check_folds(source, "mdlm")
        width = _check_times(source, "block")
        config = {
            "model_type": "bd3lm",
            **_write_config(source, sizes),
            "block_size": width,
            "cross_attn": True,
            "adaln": True,
            "var_min": False,
        }
        return _write_masked(source, sizes, config)


class EpsilonLayout(SettinglessLayout):
    """Epsilon-hybrid of ServiceNow, such as hdlm-base-epsilon-0.01."""

    def recognize(self, files: PublishedFiles) -> bool:
        if files.config.get("model_type") == "epsilon_hybrid":
            return True
        training = files.config.get("training")
        has_epsilon = isinstance(training, Mapping) and "epsilon" in training
        return has_epsilon and not _has_modulation(files.tensors)

    def read(self, files: PublishedFiles) -> Imported:
        epsilon = files.read_value("training.epsilon")
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
            raise DataError(
                f"{files.source}: the key training.epsilon must be a number; got {epsilon!r}. Use "
                "the published configuration."
            )
        num_tokens = files.read_count("tokenizer.tokens")
        sizes = Sizes(
            rows=num_tokens + 1,
            width=files.read_count("model.hidden_size"),
            layers=files.read_count("model.n_blocks"),
            heads=files.read_count("model.n_heads"),
            condition=0,
            length=files.read_count("model.length"),
        )
        tensors = strip_prefix(files.tensors)
        weights = fold_weights(tensors, sizes, num_tokens=num_tokens, has_modulation=False)
        # The training of the mask's row with cross-entropy makes its probability small.
        mask = (
            tensors.take("output_layer.linear.weight", sizes.rows, sizes.width)[-1],
            tensors.take("output_layer.linear.bias", sizes.rows)[-1],
        )
        recipe = _make_recipe(
            files, sizes, "hybrid", {"kind": "hybrid_epsilon", "epsilon": epsilon}
        )
        # Plain cross-entropy at visible tokens trains P(x | z), which includes their own state.
        recipe["denoiser"]["given"] = "all"
        notes = [_describe_mask(weights, mask, sizes), *_describe_annealing(files, sizes)]
        return Imported(recipe, weights, num_tokens, TOKENIZER, [note for note in notes if note])

    def write(self, source: ExportSource) -> Exported:
        sizes = _check_folds(source, "hybrid_epsilon")
        _check_times(source, "flat")
        if source.recipe["denoiser"]["given"] != "all":
            raise ArgumentError(
                'export: the layout hybrid_epsilon needs [denoiser] given = "all", the full '
                f'conditional P(x | z); got "{source.recipe["denoiser"]["given"]}". Use another '
                "--format."
            )
        config = {
            "model_type": "epsilon_hybrid",
            "tokenizer": {"tokens": source.vocabulary.num_tokens},
            "training": {"epsilon": source.recipe["process"]["epsilon"]},
            "annealing": {"type": "block", "width": sizes.length, "tau": sizes.length},
            "model": {
                "hidden_size": sizes.width,
                "cond_dim": sizes.condition,
                "n_heads": sizes.heads,
                "n_blocks": sizes.layers,
                "length": sizes.length,
                "dropout": source.recipe["denoiser"]["dropout"],
                "scale_by_sigma": False,
                "transformer_sigma_conditioning": False,
                "hybrid_sigma_embedding": False,
                "post_process_logits": False,
                "use_timestep_embedding": False,
            },
        }
        return Exported(config, unfold_plain_weights(source.weights, sizes))


class AutoregressiveLayout(SettinglessLayout):
    """Autoregressive baseline of s-sahoo/duo: the same network with a causal mask and no sigma.

    The published network reads the token before each position, and the end mark before the first
    token of a row. `DiT` with `inputs = "previous"` reads the mask there, so that the embedding of
    the mask is that of the end mark.
    """

    def recognize(self, files: PublishedFiles) -> bool:
        config = files.config
        algorithm = config.get("algo")
        own = algorithm if isinstance(algorithm, Mapping) else config
        is_causal = bool(own.get("causal_attention")) or own.get("parameterization") == "ar"
        return is_causal and not _has_modulation(files.tensors)

    def read(self, files: PublishedFiles) -> Imported:
        sizes = _read_sizes(files, has_modulation=False)
        tensors = strip_prefix(files.tensors)
        weights = fold_weights(tensors, sizes, num_tokens=sizes.rows, has_modulation=False)
        # The end mark is the last token of the tokenizer of these models.
        table = weights["backbone.embedding.weight"]
        weights["backbone.embedding.weight"] = torch.cat([table, table[-1:]])
        recipe = _make_recipe(files, sizes, "ar", None)
        recipe["objective"] = {"kind": "ar"}
        recipe["sample"] = {"sampler": "left_to_right"}
        return Imported(recipe, weights, sizes.rows, TOKENIZER)


# ---------------------------------------------------------------------- reading


def _read_masked(
    files: PublishedFiles, objective: Mapping[str, Any], sample: Mapping[str, Any]
) -> Imported:
    """Read a masked model. `objective` and `sample`: further keys of these tables."""
    if files.config.get("time_conditioning"):
        raise DataError(
            f"{files.source}: the key time_conditioning must be false, because the modulation "
            "vectors are constants only without it; it is true. Choose a layout that keeps the "
            "noise level, with --layout."
        )
    sizes = _read_sizes(files)
    num_tokens = sizes.rows - 1  # the mask is the last row
    tensors = strip_prefix(files.tensors)
    weights = fold_weights(tensors, sizes, num_tokens=num_tokens, has_modulation=True)
    recipe = _make_recipe(files, sizes, "mdlm", {"kind": "mdlm"})
    recipe["objective"] = {**objective}
    recipe["sample"] = {**sample}
    return Imported(recipe, weights, num_tokens, TOKENIZER)


def _read_sizes(files: PublishedFiles, *, has_modulation: bool = True) -> Sizes:
    """Read the sizes from the configuration on the hub, or from that of the training program.

    Only a network with modulation vectors has the key `cond_dim`.
    """
    if "hidden_dim" in files.config:
        return read_hub_sizes(files, has_modulation=has_modulation)
    # The training program has no key for the number of rows.
    rows, *_ = strip_prefix(files.tensors).shape("vocab_embed.embedding")
    return Sizes(
        rows=rows,
        width=files.read_count("model.hidden_size"),
        layers=files.read_count("model.n_blocks"),
        heads=files.read_count("model.n_heads"),
        condition=files.read_count("model.cond_dim") if has_modulation else 0,
        length=files.read_count("model.length"),
    )


def _make_recipe(
    files: PublishedFiles, sizes: Sizes, plugin: str, process: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the tables of the recipe of a network. `process`: its table; None for no process."""
    model = files.config.get("model")
    dropout = (model if isinstance(model, Mapping) else files.config).get("dropout", 0.0)
    recipe: dict[str, Any] = {
        "plugins": [plugin, "dit"],
        "data": {"length": sizes.length},
        "vocabulary": {"kind": "flat"},
        "denoiser": {
            "kind": "dit",
            "width": sizes.width,
            "layers": sizes.layers,
            "heads": sizes.heads,
            "condition_width": sizes.condition or 128,
            "time": False,
            "dropout": dropout,
            "head": "tokens",
        },
        "objective": {},
        "sample": {},
    }
    if process is not None:
        recipe["process"] = dict(process)
    return recipe


def _has_modulation(tensors: PublishedTensors) -> bool:
    return any("adaLN_modulation" in name for name in tensors.names)


@torch.no_grad()
def _describe_mask(
    weights: Mapping[str, Tensor], mask: tuple[Tensor, Tensor], sizes: Sizes
) -> str | None:
    """Measure the probability that the network gives the mask, on a sequence of masks.

    `mask`: row and bias of the mask in the output matrix, which the import leaves out. Returns
    None on the meta device, which has no values.
    """
    row, bias = mask
    if row.is_meta:
        return None
    backbone = DiT(FlatVocabulary(sizes.rows - 1), sizes.width, sizes.layers, sizes.heads, False)
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(PREFIX)
    }
    backbone.load_state_dict(own)
    ids = torch.full((1, min(sizes.length, PROBED)), sizes.rows - 1)
    hidden = backbone.eval()(ids, torch.ones_like(ids), Context())
    logits = hidden @ weights["head.table"].T + weights["head.bias"]
    total = torch.logaddexp(logits.logsumexp(-1), hidden @ row + bias)
    share = float((hidden @ row + bias - total).exp().max())
    return (
        f"The network gives the mask a probability of at most {share:.2g}, measured on "
        f"{ids.shape[1]} masks. The import leaves out this output and normalizes over the tokens."
    )


def _describe_annealing(files: PublishedFiles, sizes: Sizes) -> Sequence[str]:
    """Return a note if the model was trained with a window of noise."""
    annealing = files.config.get("annealing")
    width = annealing.get("width") if isinstance(annealing, Mapping) else None
    if width in (None, sizes.length):
        return []
    return [
        f"The model was trained with a window of noise of width {width} (annealing). The recipe "
        "evaluates and samples it without a window; see the time rules block and slide."
    ]


# ---------------------------------------------------------------------- writing


def _write_masked(source: ExportSource, sizes: Sizes, config: Mapping[str, Any]) -> Exported:
    tensors = unfold_weights(source.weights, sizes)
    return Exported(config, {PREFIX + name: tensor for name, tensor in tensors.items()})


def _write_config(source: ExportSource, sizes: Sizes) -> dict[str, Any]:
    dropout = source.recipe["denoiser"]["dropout"]
    return write_hub_config(sizes, dropout, time_conditioning=False)


def _check_folds(source: ExportSource, process: str) -> Sizes:
    """Return the sizes of the network. Raises ArgumentError if it does not fold into the layout.

    `process`: kind of the process that the layout represents.
    """
    recipe = source.recipe
    denoiser = recipe["denoiser"]
    found = recipe.get("process") or {"kind": "none"}
    check_equal("[process] kind", process, found["kind"])
    check_equal("[denoiser] kind", "dit", denoiser["kind"])
    check_equal("[denoiser] head", "tokens", kind_of(denoiser["head"]))
    check_equal("[denoiser] time", False, denoiser["time"])
    check_equal("[denoiser] conditions", [], sorted(denoiser.get("conditions", {})))
    check_equal("[denoiser] convolution", 0, denoiser["convolution"])
    check_equal("[denoiser] qk_norm", False, denoiser["qk_norm"])
    if source.vocabulary.num_levels != 1:
        raise ArgumentError(
            "export: this layout needs a vocabulary of tokens and a mask; got "
            f"{source.vocabulary}. Use another --format."
        )
    width, layers = SIZES[denoiser["size"]]
    width = denoiser.get("width") or width
    return Sizes(
        rows=source.vocabulary.num_states,
        width=width,
        layers=denoiser.get("layers") or layers,
        heads=denoiser.get("heads") or max(1, width // HEAD_WIDTH),
        condition=denoiser["condition_width"],
        length=recipe["data"]["length"],
    )


def _check_times(source: ExportSource, kind: str) -> int | None:
    """Return the width of the blocks. Raises ArgumentError for another time rule than `kind`."""
    times = source.recipe["objective"].get("times", "flat")
    check_equal("[objective] times", kind, kind_of(times))
    return times.get("width") if isinstance(times, Mapping) else None
