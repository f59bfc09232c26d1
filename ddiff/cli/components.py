"""Commands for components: check, plugins and recipes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, NoReturn

import typer

from ddiff.cli.completion import complete_checked, complete_plugin
from ddiff.cli.options import Settings
from ddiff.cli.output import print_columns
from ddiff.cli.process import pause_garbage_collection
from ddiff.distributed.launcher import MISTAKE


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A component, a plugin (all its processes and samplers), or a recipe file.",
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
        bool, typer.Option("--components", help="List what each plugin registers.")
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
