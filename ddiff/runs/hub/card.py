"""Model card (README.md) of a saved model: process, network, evaluation, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddiff import __version__
from ddiff.nn.denoiser import count_parameters
from ddiff.run_dir.evaluation_record import EvaluationRecord, Figure
from ddiff.runs.hub.record import FOLDER, RECORD, SavedRecord, read_evaluation

if TYPE_CHECKING:
    from ddiff.runs.hub.chat_files import SavedChat
    from ddiff.runs.run import Run

CARD = "README.md"

_LOADING = """
## Loading

With transformers and torch. `trust_remote_code` runs `modeling_ddiff.py` of this folder:

```python
from transformers import AutoModel, AutoTokenizer

folder = "FOLDER"  # or the name on the hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
logits = model(input_ids, timesteps=0.5).logits
ids = model.generate(batch_size=4)
```

`input_ids` are noisy states. `timesteps` are noise times in [0, 1], 0 for clean text; a network
that does not read the time needs none. The docstring of `DdiffModel.forward` describes the other
inputs, and that of `DdiffModel.generate` the samplers and their settings.

With ddiff, no code of this folder is run, and every sampler and evaluation works:

```python
import ddiff

run = ddiff.load("FOLDER")  # or "hf://OWNER/NAME"
samples = SAMPLE
```

`import ddiff.hf` registers the model in transformers, so that `AutoModel` needs no
`trust_remote_code`.
"""

_BOUND = """
The NELBO is an upper bound of the negative log-likelihood, estimated from random times and noise.
The perplexity that is computed from it is an upper bound, too. It is not comparable with an exact
likelihood, nor with a bound of another protocol.
"""

_EQUAL_PROMPTS = """
The tokenizer has the chat template of the training. `apply_chat_template` gives the prompts of
ddiff, token for token:
"""

_OTHER_PROMPTS = """
`chat_template.jinja` is the chat template of the training. With it, `apply_chat_template` of
transformers gives other tokens than ddiff, or an error. Use ddiff for the prompts of this model.
"""

_PROMPT = """
```python
messages = [{"role": "user", "content": "..."}]
ids = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
)
```
"""

_ANSWER = """
The method `generate` draws an answer after this prompt, if the file has the samplers of this model:
"""

_GENERATE = """
```python
ids = model.generate(ids, length=LENGTH)
```
"""

_OWN_VECTORS = """
The network was given vectors that are computed from the text itself. The figure is therefore no
bound of the likelihood of the text.
"""

_GIVEN = """
The figures are those of the answers, given their prompts, in nats per token of the answers. The
NELBO is an upper bound of the conditional negative log-likelihood, estimated from random times and
noise. It does not bound the likelihood of whole texts, so that it gives neither a perplexity of a
text nor bits per byte.
"""

_GIVEN_EXACT = """
The figures are those of the answers, given their prompts, in nats per token of the answers. The NLL
is the exact conditional negative log-likelihood. It gives neither a perplexity of a text nor bits
per byte.
"""

_EXACT = "The NLL is the exact negative log-likelihood of the text."


def write_card(run: Run, record: Path, folder: Path, chat: SavedChat | None) -> None:
    """Write README.md to the folder of a saved model.

    `record`: folder of the record of the run. `chat`: chat template of a run of conversations.
    """
    sample = "run.sample(4)" if chat is None else 'run.sample(message="...")'
    saved = SavedRecord.read(record / RECORD)
    parts = [
        _write_metadata(run),
        f"# {run.recipe.name}",
        _describe(run, saved),
        _describe_process(run),
        describe_evaluation(read_evaluation(record)),
        _LOADING.strip().replace("SAMPLE", sample),
        "" if chat is None else _describe_chat(chat),
        _describe_record(saved),
    ]
    text = "\n\n".join(part for part in parts if part)
    (folder / CARD).write_text(f"{text}\n", encoding="utf-8")


def _write_metadata(run: Run) -> str:
    """Return the metadata of the hub as a YAML block. JSON strings are valid YAML."""
    tags = ["ddiff", "discrete-diffusion", run.recipe.denoiser.component.name]
    if run.recipe.process is not None:
        tags.append(run.recipe.process.component.name)
    lines = ["---", "library_name: transformers", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def _describe(run: Run, saved: SavedRecord) -> str:
    parameters = count_parameters(run.denoiser)
    average = ", the exponential moving average" if saved.weights == "ema" else ""
    rows = {
        "process": f"`{run.process}`" if run.process else "none (autoregressive)",
        "network": f"`{run.recipe.denoiser.component.name}`, {parameters:,} parameters",
        "prediction": _describe_prediction(run),
        "vocabulary": f"{run.vocabulary.num_tokens:,} tokens, {run.vocabulary.num_states:,} states",
        "mask": "none" if run.vocabulary.mask_id is None else f"state {run.vocabulary.mask_id}",
        "length": f"{run.recipe.length} tokens",
        "weights": f"step {saved.step} of {run.recipe.train.steps}{average}",
        "data": f"`{run.recipe.data.component.name}` of the recipe",
        "sampler": f"`{run.recipe.sampler.component.name}`, {run.recipe.sample.steps} steps",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "A discrete diffusion model of text, trained with ddiff.\n\n" + "\n".join(lines)


def _describe_prediction(run: Run) -> str:
    """Return a sentence about the logits of the network."""
    if run.denoiser.parameterization.predicts == "score":
        return "log-ratios of the probabilities of all states, before their scale (head `score`)"
    if run.denoiser.inputs == "previous":
        return "logits at position i of the token at i, given the tokens before i"
    keys = run.recipe.denoiser_keys
    given = "all states" if keys.given == "all" else "the states of the other positions"
    return f"logits of the clean token at each position, given {given}"


def _describe_process(run: Run) -> str:
    """Return a section with the formulas of the process, or "" without formulas."""
    spec = run.recipe.process
    formulas = "" if spec is None else cleandoc(spec.members.formulas)
    return f"## Process\n\n```\n{formulas}\n```" if formulas else ""


def describe_evaluation(record: EvaluationRecord | None) -> str:
    """Return the section with the figures of an evaluation, their intervals and the protocol.

    `record`: record of the evaluation of the saved weights; None if they were not evaluated.
    """
    if record is None:
        return "## Evaluation\n\nThese weights were not evaluated before they were saved."
    lines = ["| figure | value | 95 % interval | unit | protocol |", "|---|---|---|---|---|"]
    for name, figure in record.figures.items():
        lines.append(f"| {name} | {_format_figure(figure)} |")
    is_bound = "nelbo" in record.figures
    words = _BOUND if is_bound else _EXACT
    text = "the training text"
    if record.protocol.get("given"):
        words = _GIVEN if is_bound else _GIVEN_EXACT
        text = "the answers of the training"
    if record.protocol.get("own_vectors"):
        words = _OWN_VECTORS
    protocol = json.dumps(dict(record.protocol), indent=1)
    return "\n\n".join(
        [
            "## Evaluation",
            "\n".join(lines),
            words.strip(),
            f"`unigram` and `bigram` are n-gram models of {text}, for comparison.",
            f"Protocol:\n\n```json\n{protocol}\n```",
        ]
    )


def _describe_chat(chat: SavedChat) -> str:
    """Return the section about prompts and answers of a run of conversations."""
    answers = "The answer fills the rest of the row."
    length = "model.config.length"
    if chat.answer_length is not None:
        answers = (
            f"An answer has {chat.answer_length} tokens, and is cut at its first special token."
        )
        length = f"ids.shape[1] + {chat.answer_length}"
    parts = ["## Conversations", answers]
    if not chat.is_equal:
        return "\n\n".join([*parts, _OTHER_PROMPTS.strip()])
    sample = _GENERATE.strip().replace("LENGTH", length)
    parts += [_EQUAL_PROMPTS.strip(), _PROMPT.strip(), _ANSWER.strip(), sample]
    return "\n\n".join(parts)


def _format_figure(figure: Figure) -> str:
    interval = "unknown, or the value is exact"
    if figure.interval is not None:
        low, high = figure.interval
        interval = f"{low:.4g} to {high:.4g}"
    return f"{figure.value:.5g} | {interval} | {figure.unit} | {figure.protocol}"


def _describe_record(saved: SavedRecord) -> str:
    lines = list(_list_components(saved.components))
    return "\n".join(
        [
            "## Origin",
            "",
            f"ddiff {__version__} saved this folder. `{FOLDER}/` has the recipe, the environment "
            "and the evaluation of the run; `ddiff import` makes a run directory from it.",
            "",
            "| component | name, plugin and version |",
            "|---|---|",
            *lines,
        ]
    )


def _list_components(components: Mapping[str, Any]) -> Iterator[str]:
    for key, origin in components.items():
        yield f"| {key} | {origin} |"
