"""`ddiff serve`: opens a port, loads a run and serves it until Ctrl-C or SIGTERM."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.runs.kinds import ClockSource
from ddiff.runs.loading import load
from ddiff.serve.limits import Limits

BACKLOG = 128  # connections that the system keeps until the server accepts them
MOST_CONNECTIONS = 1000  # further connections get status 503
SHUTDOWN = 5  # seconds for open connections after Ctrl-C


def serve_run(
    run_dir: str | Path,
    *,
    host: str,
    port: int,
    limits: Limits,
    clock: ClockSource = "recipe",
) -> None:
    """Serve a run over HTTP until the process is interrupted.

    Raises ArgumentError if starlette or uvicorn is missing, or if the address cannot be used. The
    port is opened before the run is loaded.
    """
    require_packages()
    with open_port(host, port) as listener:
        run = load(run_dir, clock=clock)
        require_text_recipe(run.recipe, "ddiff serve")
        print_start(run_dir, listener, host)
        _serve(run, listener, limits)


def _serve(run: object, listener: socket.socket, limits: Limits) -> None:
    import uvicorn

    from ddiff.runs.run import Run
    from ddiff.serve.app import RunServer

    assert isinstance(run, Run)
    server = RunServer(run, limits)
    config = uvicorn.Config(
        server.make_app(),
        # the same libraries on every machine
        loop="asyncio",
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="on",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN,
        server_header=False,
    )
    # uvicorn stops the server on Ctrl-C and raises the signal again
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    print("ddiff serve: stopped", file=sys.stderr)


def require_packages() -> None:
    """Raise ArgumentError if starlette or uvicorn is not installed."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"ddiff serve: {' and '.join(missing)} must be installed. Install the server with "
            "pip install 'discrete-diffusion[serve]'."
        )


def open_port(host: str, port: int) -> socket.socket:
    """Open a port for connections. Port 0 is any free port.

    Raises ArgumentError if the address is not one of this machine, or the port is in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ArgumentError(
            f"--host: must be an address of this machine, such as 127.0.0.1; got {host!r} "
            f"({error})."
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # otherwise the port stays in use for a minute after the last connection
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _explain_port(host, port, error) from error
    return listener


def _explain_port(host: str, port: int, error: OSError) -> ArgumentError:
    if error.errno == errno.EADDRINUSE:
        return ArgumentError(
            f"--port: {host}:{port} is in use by another program. Choose another port, or --port 0 "
            "for any free port."
        )
    if error.errno == errno.EACCES:
        return ArgumentError(
            f"--port: the port {port} needs special rights. Choose a port above 1023."
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ArgumentError(
            f"--host: must be an address of this machine, such as 127.0.0.1; got {host!r}."
        )
    reason = os.strerror(error.errno or 0)
    return ArgumentError(f"--host, --port: {host}:{port} cannot be opened: {reason}.")


def format_address(listener: socket.socket) -> str:
    """Return the URL of an open port."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def print_start(run_dir: str | Path, listener: socket.socket, host: str) -> None:
    """Print the address of the server, and a warning if other machines can reach it."""
    own = str(listener.getsockname()[0])
    if not ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        print(
            f"ddiff serve: warning: --host {host} lets other machines use this server, which has "
            "no passwords and no encryption.",
            file=sys.stderr,
        )
    address = format_address(listener)
    print(f"{run_dir}: serving on {address} (Ctrl-C stops the server)", flush=True)
