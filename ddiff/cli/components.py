"""Commands for components: new, check, plugins and recipes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from ddiff.cli.completion import (
    NEW_KINDS,
    complete_checked,
    complete_new_kind,
    complete_plugin,
)
from ddiff.cli.options import Settings
from ddiff.cli.output import print_columns
from ddiff.cli.process import pause_garbage_collection
from ddiff.distributed.launcher import MISTAKE


def new(
    what: Annotated[
        Literal["plugin"],
        typer.Argument(metavar="plugin", help="The word plugin."),
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of the plugin and of its component, such as ising.",
        ),
    ],
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help=f"Kind of the component: {', '.join(NEW_KINDS)}. A metric is a judge of samples, "
            "and a field is a data set of several fields.",
            autocompletion=complete_new_kind,
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="New or empty folder; by default ddiff-NAME."),
    ] = None,
) -> None:
    """Write the package of a new plugin: a component, its tests, a recipe and a README.

    The package works as it is: install it with pip install -e, and replace the example.
    """
    from ddiff.plugin.package_template import write_package

    written = write_package(name, kind, folder)
    typer.echo(f"Wrote {written}. Install, check and run it:")
    typer.echo(f"    pip install -e {shlex.quote(str(written))}")
    typer.echo(f"    ddiff check {name}")
    typer.echo(f"    cd {shlex.quote(str(written))} && ddiff run {name}.toml")


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A component, a plugin (all its components), or a recipe file.",
            autocompletion=complete_checked,
        ),
    ],
    settings: Settings = None,
) -> None:
    """Check the mathematical properties of a component or recipe, with the largest error of each.

    Of a recipe, every component with such properties is built in small with the settings of the
    recipe. The paths of several fields are checked too.
    """
    from ddiff.testing.check_command import check_component

    raise typer.Exit(check_component(name, settings or []))


def plugins(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Plugin whose components and keys are listed.",
            autocompletion=complete_plugin,
        ),
    ] = None,
    components: Annotated[
        bool, typer.Option("--components", help="List the components of each plugin.")
    ] = False,
) -> None:
    """List the installed plugins, or the components and keys of one plugin.

    A plugin that cannot be loaded is reported, and the working plugins are listed.
    """
    if name is not None:
        _print_plugin(name)
        return
    from ddiff.plugin.loader import survey_plugins

    registry, reports = survey_plugins()
    rows = []
    for report in reports:
        found = "does not load: see below" if report.error else str(len(report.components))
        rows.append([report.plugin.name, str(report.plugin.origin), found])
    print_columns(["plugin", "from", "components"], rows)
    if components:
        typer.echo()
        rows = [
            [component.kind, component.name, component.plugin, component.target]
            for component in registry.components()
        ]
        print_columns(["kind", "name", "plugin", "target"], rows)
    errors = [report.error for report in reports if report.error is not None]
    _exit_after(f"\n{error}" for error in errors)


def _print_plugin(name: str) -> None:
    """Print the components of a plugin, with their tables and keys."""
    with pause_garbage_collection():
        from ddiff.recipe.listing import list_plugin

        listing = list_plugin(name)
    for paragraph in listing.paragraphs:
        typer.echo(paragraph)
    if listing.errors:
        _exit_after(map(str, listing.errors))


def _exit_after(errors: Iterable[str]) -> NoReturn:
    """Print errors and exit with 2, or exit with 0 if there are no errors."""
    code = 0
    for error in errors:
        typer.echo(error, err=True)
        code = MISTAKE
    raise typer.Exit(code)


def recipes() -> None:
    """List the recipes that are shipped with ddiff, for `ddiff run NAME`."""
    from ddiff.recipe.files import find_shipped_recipes

    shipped = find_shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        summary = first.removeprefix("#").strip() if first.startswith("#") else ""
        typer.echo(f"{name:{width}}  {summary}".rstrip())
