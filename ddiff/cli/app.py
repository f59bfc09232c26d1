"""Application object of the command line, and the conversion of exceptions to clear errors."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ddiff import __version__
from ddiff.cli.output import discard_output
from ddiff.errors import DataError, PluginError, explain_error
from ddiff.plugin.registry import TERMINATED, describe_error

BROKEN_PIPE = 128 + signal.SIGPIPE


class Commands(TyperGroup):
    """Command group that turns some exceptions of commands into clear errors.

    - SystemExit of a plugin or library: without the conversion, a plugin that exits with 0 would
      look like a passed check.
    - EOFError at the end of an input file: typer would print only "Aborted.".
    - BrokenPipeError after the reader closed a pipe: typer would exit with 1 and print no message.

    The object of the context is the list of arguments, so that a command can launch itself in
    several processes.
    """

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        extra.setdefault("obj", list(args))  # copied, since parsing empties the list
        return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise DataError(explain_error(error)) from error
        except BrokenPipeError as error:
            discard_output()
            raise typer.Exit(BROKEN_PIPE) from error
        except SystemExit as stop:
            # raised by a second SIGTERM, or by the script that calls `main`
            if stop.code == TERMINATED or _is_raised_by_main(stop):
                raise
            raise PluginError(
                f"A plugin, or a library of a plugin, ended the command: {describe_error(stop)}. "
                "The command has no result. Fix or uninstall the distribution of that plugin."
            ) from stop


def _is_raised_by_main(error: BaseException) -> bool:
    """Return whether an error was raised in the main script, not in an imported module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "__main__"


app = typer.Typer(
    cls=Commands,
    help=("Discrete diffusion: train and evaluate models, draw samples, and check plugins."),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ddiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    pass
