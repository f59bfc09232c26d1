"""Commands for exchange with other programs: import and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ddiff.cli.options import RunDir, Settings
from ddiff.errors import ArgumentError

if TYPE_CHECKING:
    from ddiff.runs.importing import ImportedRun

SAFETENSORS = "safetensors"
HF = "hf"
PEFT = "peft"
Weights = Literal["auto", "ema", "trained"]


def import_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, file of weights, or hub name OWNER/NAME\\[@REVISION].",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Run directory to write, such as runs/NAME.")
    ],
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Layout of the files; by default it is recognized. A table sets its keys: "
            "'{kind = \"NAME\", key = value}'.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder or hub name of the tokenizer; by default that of the checkpoint.",
        ),
    ] = None,
    settings: Settings = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Replace an existing run in the directory.")
    ] = False,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--unchecked",
            show_default=False,
            help="Refuse a model that predicts masked tokens of a text no better than a constant "
            "guess; by default only for models of transformers.",
        ),
    ] = None,
    check_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text of this check, in the language of the model; by default a bundled novel. "
            "With this option, the check is always made.",
        ),
    ] = None,
) -> None:
    """Convert a published checkpoint to a run directory, for eval, sample, report and fine-tuning.

    No Python code of a repository is run, and no pickled object other than tensors is loaded.
    """
    from ddiff.runs.importing import import_published, parse_layout, read_check_text

    imported = import_published(
        source,
        out,
        layout=None if layout is None else parse_layout(layout),
        tokenizer=tokenizer,
        settings=settings or (),
        fresh=fresh,
        check=check,
        check_text=None if check_text is None else read_check_text(check_text),
    )
    _print_import(imported)


def _print_import(imported: ImportedRun) -> None:
    """Print what was imported, and the next commands."""
    origin = imported.origin
    step = "" if origin.step is None else f", step {origin.step}"
    average = ", moving averages" if origin.is_average else ""
    rows = [
        ("source", f"{origin.source}{step}{average}"),
        ("layout", origin.layout),
        ("parameters", f"{imported.parameters:,}"),
        ("process", imported.process),
        ("tokenizer", f"{origin.tokenizer}, {imported.num_tokens} tokens"),
        ("length", f"{imported.length} tokens"),
    ]
    if imported.predictions is not None:
        found = imported.predictions
        rows.append(
            (
                "predictions",
                f"{found.accuracy:.0%} of {found.count} masked tokens (constant guess: "
                f"{found.unigram:.0%})",
            )
        )
    for name, file in origin.files.items():
        rows.append((name, f"{file.bytes} bytes, SHA-256 {file.sha256}"))
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{imported.directory}: imported")
    for name, value in rows:
        typer.echo(f"  {name:{width}}  {value}")
    for note in origin.notes:
        typer.echo(f"  {note}")
    typer.echo("Next:")
    typer.echo(f"  ddiff sample {imported.directory} {imported.sample_options}")
    evaluate = f"  ddiff eval {imported.directory}"
    typer.echo(f"{evaluate}              # on the data set of its recipe.toml")
    typer.echo(f"{evaluate} --data FILE  # on your text")


def export(
    run_dir: RunDir,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="Output file NAME.safetensors, a local or fsspec path; with another format, a new "
            "folder. Leave it out with --push.",
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(
            help="ema: the moving average; trained: the trained weights; auto: ema if the run "
            "has a moving average."
        ),
    ] = "auto",
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="safetensors (default): one file with the names of ddiff; hf: a model of the "
            "transformers library; peft: a folder with the LoRA adapters; or a layout, such as "
            "that of a published model.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload to this repository on the hub, in the format hf."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; else it is private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push, list the files and upload nothing.")
    ] = False,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged",
            help="Merge LoRA adapters into their base. FILE is then a new run directory, or a "
            "file NAME.safetensors.",
        ),
    ] = False,
) -> None:
    """Write the weights of a trained run to a file, to a published format, or to the hub."""
    if push is not None:
        _push(run_dir, file, weights, format, push, public, dry_run)
        return
    if public or dry_run:
        name = "--public" if public else "--dry-run"
        raise ArgumentError(f"{name} needs --push OWNER/NAME. Leave {name} out, or add --push.")
    if file is None:
        raise ArgumentError(
            "export: expected the output file or folder; got none. Name a file, such as "
            "weights.safetensors, or with --format a new folder."
        )
    if merged or format == PEFT:
        _export_adapters(run_dir, file, weights, format, merged)
    elif format == HF:
        _save(run_dir, file, weights)
    else:
        _export_weights(run_dir, file, weights, format or SAFETENSORS)


def _export_weights(run_dir: Path, file: str, weights: Weights, format: str) -> None:
    from ddiff.runs.export import export_published, export_run
    from ddiff.runs.provenance import BASE

    if format == SAFETENSORS:
        metadata = export_run(run_dir, file, weights)
        kind, step = metadata["weights"], metadata["step"]
        typer.echo(f"{file}: the {kind} weights of step {step} of {run_dir}")
        if f"{BASE} fingerprint" in metadata:  # recorded only for adapters
            typer.echo(
                "  The file has only the trained tensors of the LoRA adapters, without their base. "
                "--merged writes the whole\n  weights with the adapters, and "
                f"--format {PEFT} a folder for the package peft."
            )
        return
    exported = export_published(run_dir, Path(file), format, weights)
    typer.echo(
        f"{file}: the {exported.weights} weights of step {exported.step} of {run_dir}, "
        f"layout {format}"
    )
    for note in exported.notes:
        typer.echo(f"  {note}")


def _load(run_dir: Path, weights: Weights) -> Any:
    """Load a text run with the given weights. Raises ArgumentError for a run of several fields."""
    from ddiff.recipe.fields_recipe import require_text_recipe
    from ddiff.runs.loading import load

    settings = [] if weights == "auto" else [f'evaluate.weights="{weights}"']
    run = load(run_dir, settings=settings)
    require_text_recipe(run.recipe, f"--format {HF}")
    return run


def _save(run_dir: Path, folder: str, weights: Weights) -> None:
    saved = _load(run_dir, weights).save_pretrained(folder)
    typer.echo(
        f"{folder}: the {saved.weights} weights of step {saved.step} of {run_dir}, as a model of "
        "transformers"
    )
    _print_files(saved.files, saved.local_paths)


def _push(
    run_dir: Path,
    file: str | None,
    weights: Weights,
    format: str | None,
    name: str,
    public: bool,
    dry_run: bool,
) -> None:
    if file is not None:
        raise ArgumentError(
            f"--push uploads a folder that it makes; got the output {file}, too. Leave it out, or "
            "call the command twice."
        )
    if format not in (None, HF):
        raise ArgumentError(f"--push uploads the format {HF}; got --format {format}. Leave it out.")
    from ddiff.runs.hub.push import check_name

    check_name(name)
    pushed = _load(run_dir, weights).push_to_hub(name, private=not public, dry_run=dry_run)
    done = "would be uploaded (dry run)" if pushed.url is None else f"are at {pushed.url}"
    typer.echo(f"{name}: the {pushed.weights} weights of step {pushed.step} of {run_dir} {done}")
    _print_files(pushed.files, pushed.local_paths)


def _print_files(files: Mapping[str, int], local_paths: Sequence[str]) -> None:
    """Print the files of a saved model, and the keys of its recipe with paths of this machine."""
    width = max(len(name) for name in files)
    for name, size in files.items():
        typer.echo(f"  {name:{width}}  {size:>13,} bytes")
    if local_paths:
        typer.echo(
            f"  The saved recipe has paths of this machine: {', '.join(local_paths)}. Read run/ "
            "before you publish it."
        )


def _export_adapters(
    run_dir: Path, file: str, weights: Weights, format: str | None, merged: bool
) -> None:
    """Export a run with LoRA adapters, merged or in the format of peft."""
    from ddiff.runs.adapter_export import export_adapters, export_merged

    if not merged:
        step = export_adapters(run_dir, file, weights)
        typer.echo(f"{file}: the adapters of step {step} of {run_dir}, in the format of peft")
        return
    if format not in (None, SAFETENSORS):
        raise ArgumentError(
            f"--merged and --format {format} exclude each other. Merge to a new run directory "
            "first, and export that run."
        )
    step = export_merged(run_dir, file, weights)
    typer.echo(f"{file}: the weights of {run_dir}, with the adapters of step {step} merged")
