"""Arguments and options that commands share, as annotated types of typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddiff.cli.completion import complete_recipe, complete_run_dir, complete_sampler
from ddiff.run_dir.files import require_run_dir

MOST = 2**31 - 1  # of counts and steps, as in a recipe

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Path of a TOML file, or the name of a shipped recipe.",
        autocompletion=complete_recipe,
    ),
]


def _check_run_dir(context: typer.Context, run_dir: Path) -> Path:
    """Return an existing run directory. A missing one raises CheckpointError before torch loads."""
    if not context.resilient_parsing and not run_dir.exists():
        require_run_dir(run_dir)
    return run_dir


RunDir = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="A run directory, such as runs/<name>.",
        autocompletion=complete_run_dir,
        callback=_check_run_dir,
    ),
]


def _set_option(help: str) -> Any:
    return typer.Option("--set", metavar="KEY=VALUE", help=help)


Settings = Annotated[
    list[str] | None,
    _set_option("Replace the value of a dotted key by a TOML value; may be repeated."),
]
EvaluateSettings = Annotated[
    list[str] | None,
    _set_option(
        "Replace a key of \\[evaluate], such as evaluate.draws=4, or of \\[sample] with --generate."
    ),
]
SamplerSettings = Annotated[
    list[str] | None, _set_option("Replace a key of the sampler, such as temperature=0.9.")
]

# Options of `ddiff eval`.
RunProcesses = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        metavar="N",
        help="Processes that divide the work; by default those of the training.",
    ),
]
Until = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Add draws of times and noise until the Monte-Carlo interval has this half width.",
    ),
]
EvaluatedData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|RECIPE|NAME",
        help="Evaluate text files (may be repeated), the validation text of a recipe, or the "
        "public test set of a protocol, which is loaded from the hub.",
    ),
]
DocumentSplit = Annotated[
    Literal["file", "paragraph", "line"],
    typer.Option(help="Unit that counts as one document of a text file."),
]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Protocol of a public test set: ptb, wikitext2, wikitext103, lm1b, lambada, ag_news, "
        "pubmed, arxiv.",
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published", help="Evaluate as published code does; the result may lie below the bound."
    ),
]
PublishedPaper = Annotated[
    str | None,
    typer.Option(
        "--program",
        metavar="ARXIV",
        help="With --published: the paper whose program is repeated: 2310.16834, 2406.07524 (the "
        "default), 2503.09573, 2504.06416 or 2506.10892.",
    ),
]
ClockSource = Annotated[
    Literal["recipe", "found"],
    typer.Option(
        help="Clock of a tree: that of the recipe, or the one that `ddiff clock` found.",
    ),
]
JudgeName = Annotated[
    str | None,
    typer.Option(
        metavar="JUDGE",
        help="With --generate: model for the generative perplexity; the directory of an "
        "autoregressive run or of a causal language model, or a name on the hub.",
        autocompletion=complete_run_dir,
    ),
]
FeaturesName = Annotated[
    str | None,
    typer.Option(
        metavar="ENCODER",
        help="With --generate: encoder of texts for MAUVE; the directory of a sentence encoder or "
        "of a transformers model, a registered encoder such as cooccurrence, or a name on the hub.",
    ),
]
EvaluatedCount = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST, help="With --generate: number of samples; by default \\[sample] count."
    ),
]
NoRetokenize = Annotated[
    bool,
    typer.Option(
        "--no-retokenize",
        help="With --generate: score the token ids of the samples. The judge must have the "
        "tokenizer of the run.",
    ),
]

# Options of `ddiff pareto`.
SweepJudge = Annotated[
    str | None,
    typer.Option(
        metavar="JUDGE",
        help="Required: model for the perplexity; the directory of an autoregressive run or of a "
        "causal language model, or a name on the hub.",
    ),
]
SweepSteps = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Numbers of sampling steps, such as 8,16,32; by default an eighth, a quarter, a half "
        "and all of \\[sample] steps.",
    ),
]
SweepTemperatures = Annotated[
    str | None,
    typer.Option(metavar="T,T,...", help="Temperatures; by default .7,.8,.9,1."),
]
SweepSamplers = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help="Sampler instead of \\[sample] sampler; may be repeated."),
]

# Options of `ddiff sample`.
SampleCount = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Number of samples; by default \\[sample] count."),
]
SamplingSteps = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Number of sampling steps.")
]
SamplingSeed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="Seed; equal seeds give equal samples.")
]
SamplingBatch = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Samples per batch; does not change the samples."),
]
Prompts = Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated.")]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with one prompt per line.")
]
InfillTexts = Annotated[
    list[str] | None,
    typer.Option(
        help='Text with gaps, such as "She [MASK:8] to Bath" with a gap of 8 tokens; may be '
        "repeated."
    ),
]
Messages = Annotated[
    list[str] | None,
    typer.Option(help="Message of a user, which the model answers; may be repeated."),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Condition with a label (2) or a vector ([0.5, 1.0]); may be repeated.",
    ),
]
GuidanceWeight = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Weight of classifier-free guidance; 1 is off, above 1 follows the conditions "
        "more closely.",
    ),
]
EditedTexts = Annotated[
    list[str] | None,
    typer.Option(help="Text to edit toward the conditions; may be repeated."),
]
EditRatio = Annotated[
    float | None,
    typer.Option(
        help="With --edit: fraction of the tokens that are sampled again; by default 0.3."
    ),
]
EditModeName = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="With --edit: random, entropy (the least certain tokens) or suffix (the last tokens).",
    ),
]
EditTarget = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.npy", help="With --edit: vector condition, one vector or one per text."
    ),
]
SamplerKind = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Sampler to use instead of \\[sample] sampler.",
        autocompletion=complete_sampler,
    ),
]
GivenFields = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Runs of several fields: value of a field, a text or the name of a file FILE.npy; "
        "repeat it for one text per sample.",
    ),
]
OnlyFields = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Runs of several fields: draw only this field; may be repeated."
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET",
        help='Runs of several fields: joint, or "A | B" to draw A given B. Given fields without '
        "--given take the values of validation samples.",
    ),
]
ImageFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.png", help="Runs of several fields: also write pictures of the samples."
    ),
]
WatchSamples = Annotated[
    bool,
    typer.Option("--watch", help="Show the samples on the terminal while they are drawn."),
]
TrajectoryFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.json",
        help="Also write the states after each step, which `ddiff report --trajectory` plays.",
    ),
]
AnimationFile = Annotated[
    str | None,
    typer.Option(
        "--gif",
        metavar="FILE.gif",
        help="Also write an animation of the states after each step.",
    ),
]
NoIds = Annotated[
    bool, typer.Option("--no-ids", help="Leave the token ids out of the printed JSON objects.")
]
