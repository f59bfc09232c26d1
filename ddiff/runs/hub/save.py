"""Save a text run as a model of the transformers library: `run.save_pretrained`.

`CONTENTS` lists the files of the folder, which `run.push_to_hub` uploads.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddiff import __version__
from ddiff.checkpoint.dcp_storage import write_tensors
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.nn.denoiser import UNPADDED, Denoiser
from ddiff.plugin.registry import Component
from ddiff.progress import show_activity
from ddiff.recipe.component import ComponentSpec
from ddiff.run_dir.destination import Destination, check_new_folder, write_folder
from ddiff.runs.conditioning import SampleConditions, SamplingPlan, is_trained_in_windows
from ddiff.runs.hub.card import CARD, write_card
from ddiff.runs.hub.chat_files import write_chat_template
from ddiff.runs.hub.record import CONTENTS as RECORD_CONTENTS
from ddiff.runs.hub.record import FOLDER, find_local_paths, write_record
from ddiff.runs.hub.source import Place, generate_source
from ddiff.runs.hub.tokenizer_files import CONTENTS as TOKENIZER_CONTENTS
from ddiff.runs.hub.tokenizer_files import write_tokenizer
from ddiff.sampling.loop import generate

if TYPE_CHECKING:
    from ddiff.runs.run import Run

MODELING = "modeling_ddiff"
"""Name of the module with the network."""

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MODEL_CLASS = "DdiffModel"
METHODS = ("generate", "has_sampler")
"""Methods of the model that no other code of the file calls."""

CONFIG_CLASS = "DdiffConfig"
AUTO_CLASSES = ("AutoModel", "AutoModelForMaskedLM")

CONTENTS = {
    CONFIG: "settings of the model: backbone, head, process, vocabulary with its tree, and the "
    "table `[sample]` of the recipe",
    WEIGHTS: "weights (`denoiser.*`) and constants of the network",
    f"{MODELING}.py": "network, process and samplers in one file, which needs only torch and "
    "transformers",
    **TOKENIZER_CONTENTS,
    CARD: "model card: process, prediction, evaluation with intervals and protocol, loading",
    **{f"{FOLDER}/{name}": content for name, content in RECORD_CONTENTS.items()},
}
"""Description of each file of a saved model, for the documentation. A pretrained tokenizer may add
files with its vocabulary."""

FILES_KEY = "path"
"""Key of a component that reads files when it is built."""

SAMPLERS = ("ancestral", "analytic", "confidence", "entropy", "margin")
"""Samplers in the file of a saved model, in addition to that of the recipe."""

CHECKED_POSITIONS = 32
"""Positions of the row whose logits and samples are compared before anything is written."""

CHECKED_STEPS = 2
"""Steps of the sample that is compared."""

TOLERANCE = 1e-4
"""Largest difference between the probabilities of the logits and those that samplers read. They
are not bitwise equal, because samplers multiply matrices in chunks of other sizes."""

HEADER = f"""Network and samplers of a discrete diffusion model, for the transformers library.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    logits = model(input_ids, timesteps=0.5).logits
    ids = model.generate(batch_size=4)

ddiff {__version__} generated this file from its source code (Apache-2.0). It needs only torch and
transformers. Some docstrings refer to parts of ddiff that are not in this file.
"""


@dataclass(frozen=True)
class SavedModel:
    """Result of saving a run.

    Attributes:
        weights: saved weights, "ema" or "trained".
        step: training step of the weights.
        files: size in bytes of each file, by its path in the folder.
        local_paths: keys of the saved recipe with paths of this machine.
    """

    weights: str
    step: int
    files: Mapping[str, int]
    local_paths: tuple[str, ...] = ()


def save_pretrained(run: Run, folder: str | Path) -> SavedModel:
    """Save a text run as a model of the transformers library.

    Args:
        run: trained run. The weights that it evaluates are saved.
        folder: new or empty folder. It appears when it is complete.

    The saved network is compared with that of the run. Raises ArgumentError, which names the
    reason, if the saved file cannot represent the network or the tokenizer, and CheckpointError if
    the run has no checkpoint. Nothing is written in these cases.
    """
    place = check_new_folder(folder, "save_pretrained")
    with show_activity("saving the model"):
        return _write(run, place)


def _write(run: Run, place: Destination) -> SavedModel:
    newest = run.checkpoints.newest()
    if newest is None:
        raise CheckpointError(
            f"save_pretrained: {run.run_dir} has no checkpoint. Train the run before it is saved."
        )
    if run.given():
        raise ArgumentError(
            "save_pretrained: the run was given components from Python "
            f"({', '.join(run.given())}), which its recipe does not define. Register them as "
            "components of a plugin, and name them in the recipe."
        )
    if run.denoiser.adapters is not None:
        raise ArgumentError(
            f"save_pretrained: {run.run_dir} holds LoRA adapters without their base. Merge them "
            f"first: `ddiff export {run.run_dir} DIR --merged`, and save the run DIR."
        )
    text = _generate_modeling(run)
    config = _describe_model(run)
    with write_folder(place) as folder:
        (folder / f"{MODELING}.py").write_text(text, encoding="utf-8")
        with load_module(folder / f"{MODELING}.py") as module:
            network = _build_network(run, module, config)
        # Before config.json, whose unknown type of model transformers would report.
        write_tokenizer(run.tokenizer, run.vocabulary.mask_id, folder)
        chat = write_chat_template(run, folder)
        (folder / CONFIG).write_text(_format_config(network.config), encoding="utf-8")
        with (folder / WEIGHTS).open("wb") as file:
            write_tensors(file, network.tensors, {"format": "pt"})
        record = write_record(run, newest, network.constants, folder)
        write_card(run, record, folder, chat)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    kind = "ema" if run.uses_ema else "trained"
    return SavedModel(kind, newest.step, files, find_local_paths(run.recipe))


# ---------------------------------------------------------------------- network


def _generate_modeling(run: Run) -> str:
    """Return the source of the file with the network and the samplers of a run."""
    network = [run.recipe.denoiser.component, _require_head(run).component]
    if any(spec.to_dict().get(FILES_KEY) for spec in (run.recipe.denoiser, _require_head(run))):
        raise _unsupported(run, f"its key {FILES_KEY} names files that are not in the folder.")
    process = [run.recipe.process.component] if run.recipe.process else []
    try:
        return _write_modeling([*network, *process, *_find_samplers(run)])
    except ArgumentError:
        # A process or a sampler of a plugin may need another package. The file then gives logits.
        try:
            return _write_modeling(network)
        except ArgumentError as error:
            raise _unsupported(run, str(error)) from error


def _write_modeling(components: Iterable[Component]) -> str:
    """Return the source of the model class with these components and their table."""
    places = {}
    for component in components:
        found = component.load()
        places[component] = Place(found.__module__, found.__name__)

    def write_table(names: Mapping[Place, str]) -> str:
        entries = []
        for component, place in places.items():
            entries.append(f'    ("{component.kind}", "{component.name}"): {names[place]},')
        return "\n".join([f"{MODEL_CLASS}.components = {{", *entries, "}"])

    roots = [Place("ddiff.runs.hub.modeling", MODEL_CLASS), *places.values()]
    return generate_source(roots, METHODS, HEADER, write_table)


def _find_samplers(run: Run) -> list[Component]:
    """Return the sampler of the recipe, and those of `SAMPLERS` that support the model."""
    own = run.recipe.sampler.component
    is_windowed = is_trained_in_windows(run.model.objective, run.recipe.length)
    found = [own]
    for component in run.recipe.registry.components("sampler"):
        if component.name in SAMPLERS and component != own:
            spec = ComponentSpec(component, component.config_class()())
            try:
                sampler = spec.build(steps=1, vocabulary=run.vocabulary)
                sampler.check_supported(run.process, run.denoiser.parameterization.predicts)
            except ArgumentError:
                continue
            if not (is_windowed and sampler.looks_ahead):
                found.append(component)
    return found


def _require_head(run: Run) -> ComponentSpec:
    assert run.recipe.head is not None  # a recipe of one text has a head
    return run.recipe.head


def _unsupported(run: Run, reason: str) -> ArgumentError:
    """Return the error for a network that one file cannot represent."""
    kind = run.recipe.denoiser.component.name
    return ArgumentError(
        f'save_pretrained: the network of this run, [denoiser] kind = "{kind}", cannot be written '
        f"as a file that works without ddiff: {reason} Use the backbone dit or ddit, or export "
        "only the weights: "
        f"ddiff export {run.run_dir} weights.safetensors. For the backbone hf with a path, "
        "run.denoiser.backbone.model.save_pretrained(folder) saves the model of transformers."
    )


@contextmanager
def load_module(path: Path) -> Iterator[ModuleType]:
    """Context manager that loads the module of a saved model.

    The import machinery would leave bytecode in the folder, which is published.
    """
    name = "_ddiff_saved_model"
    module = ModuleType(name)
    module.__file__ = str(path)
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
        yield module
    finally:
        del sys.modules[name]


@dataclass(frozen=True)
class _Network:
    """Network of a saved model.

    Attributes:
        tensors: tensors of the file of weights.
        constants: names of the tensors that are no weights of the run.
        config: content of config.json.
    """

    tensors: Mapping[str, Tensor]
    constants: tuple[str, ...]
    config: Mapping[str, Any]


def _build_network(run: Run, module: ModuleType, config: Mapping[str, Any]) -> _Network:
    """Build the network of the file, and compare it with that of the run."""
    contents = vars(module)
    denoiser = copy.deepcopy(run.denoiser).cpu().eval()
    denoiser.precision = None
    settings = contents[CONFIG_CLASS](**config)
    try:
        model = contents[MODEL_CLASS](settings).eval()
    except Exception as error:  # the constructor of a component may raise any error
        raise _unsupported(run, f"{type(error).__name__}: {error}.") from error
    own = denoiser.state_dict()
    # The constants of the file's network are no weights of the run.
    missing, unexpected = model.denoiser.load_state_dict(own, strict=False)
    constants = {name for name, _ in denoiser.named_buffers()}
    if unexpected or set(missing) - constants:
        names = ", ".join([*unexpected, *missing][:3])
        raise _unsupported(run, f"the networks have different weights, such as {names}.")
    _compare(run, model, denoiser)
    _compare_samples(run, model, denoiser)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return _Network(tensors, tuple(missing), json.loads(settings.to_json_string()))


@torch.no_grad()
def _compare(run: Run, model: Any, denoiser: Denoiser) -> None:
    """Raise ArgumentError unless both networks give the same logits for random states.

    The logits are also compared with the predictions that samplers use.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(run.recipe.length, CHECKED_POSITIONS)
    ids = torch.randint(run.vocabulary.num_states, (1, length), generator=generator)
    t = torch.full((1, length), 0.5, dtype=torch.float64)
    noisy = Noisy(ids, t, torch.zeros_like(ids, dtype=torch.bool))
    hidden = denoiser.hidden_states(noisy, UNPADDED)
    expected = denoiser.head(hidden)
    found = model(ids, timesteps=0.5).logits[0]
    if not torch.equal(found, expected):
        raise _unsupported(
            run, f"its logits differ by {(found - expected).abs().max():g} from those of the run."
        )
    node = torch.full((length,), run.vocabulary.root)
    log_p = denoiser.query_head(hidden, node, lambda prediction, _: prediction.log_mass(0))
    assert isinstance(log_p, Tensor)
    logits = expected[:, : run.vocabulary.num_tokens].log_softmax(-1)
    difference = float((logits.exp() - log_p.exp()).abs().max())
    if not difference < TOLERANCE:
        raise _unsupported(
            run, f"the logits of its head differ by {difference:g} from its predictions."
        )


def _compare_samples(run: Run, model: Any, denoiser: Denoiser) -> None:
    """Raise ArgumentError if the file and the run draw different ids.

    Nothing is compared if the file lacks the process or the sampler of the run.
    """
    if not model.has_sampler:
        return
    keys = run.recipe.sample
    own = replace(run.model, denoiser=denoiser, device=torch.device("cpu"))
    sampler = run.recipe.sampler.build(steps=CHECKED_STEPS, vocabulary=run.vocabulary)
    conditions = SampleConditions.parse(denoiser, keys.conditions, 1)
    plan = SamplingPlan.check(own, sampler, conditions, keys.guidance, run.recipe.length)
    length = min(run.recipe.length, CHECKED_POSITIONS)
    expected = generate(
        sampler,
        run.process,
        plan.network(slice(0, 1)),
        index=torch.arange(1),
        length=length,
        seed=keys.seed,
    )
    found = model.generate(length=length, steps=CHECKED_STEPS)
    if not torch.equal(found, expected.ids):
        raise _unsupported(run, "it draws other samples than the run.")


# ---------------------------------------------------------------------- configuration


def _describe_model(run: Run) -> dict[str, Any]:
    """Return the arguments of the configuration."""
    recipe = run.recipe
    vocabulary = run.vocabulary
    has_tree = vocabulary.num_levels > 1
    keys = recipe.denoiser_keys.model_dump(mode="json")
    backbone = recipe.denoiser.to_dict()
    # The keys of [denoiser] that every backbone has are arguments of the denoiser, not of `build`.
    config: dict[str, Any] = {
        "architectures": [MODEL_CLASS],
        "auto_map": {
            "AutoConfig": f"{MODELING}.{CONFIG_CLASS}",
            **dict.fromkeys(AUTO_CLASSES, f"{MODELING}.{MODEL_CLASS}"),
        },
        "dtype": "float32",
        "num_tokens": vocabulary.num_tokens,
        "has_mask": vocabulary.mask_id is not None,
        "parents": [level.tolist() for level in vocabulary.parents] if has_tree else None,
        "length": recipe.length,
        "backbone": backbone,
        "head": _require_head(run).to_dict(),
        "inputs": run.denoiser.inputs,
        "given": keys["given"] if run.denoiser.inputs == "own" else "rest",
        "process": recipe.process.to_dict() if recipe.process else None,
        "is_windowed": is_trained_in_windows(run.model.objective, recipe.length),
        "sample": recipe.to_dict().get("sample"),
        "vocab_size": vocabulary.num_states,
        "hidden_size": run.denoiser.backbone.width,
        "mask_token_id": vocabulary.mask_id,
        "eos_token_id": run.tokenizer.eos_id,
    }
    return config


def _format_config(config: Mapping[str, Any]) -> str:
    """Return a configuration as JSON with one line per key, because a tree may have many nodes."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
