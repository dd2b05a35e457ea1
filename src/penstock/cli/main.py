"""The `penstock` program: collects the commands, turns errors into a message, a hint and an exit code.

Exit codes: 0 ok, 1 failed, 2 usage (flags, config), 3 environment (a package, file or device is missing),
130 interrupted.
"""

from __future__ import annotations

import signal
import sys

import typer
from rich.console import Console

from penstock import __version__
from penstock.cli import (
    batch,
    calibrate,
    compare,
    fidelity,
    model,
    replay,
    serve,
    settings,
    simulate,
    trace,
    vopr,
)
from penstock.core.errors import ConfigError, EnvironmentMissing, PenstockError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_ENVIRONMENT = 0, 1, 2, 3

app = typer.Typer(
    name="penstock",
    help="Serve language models to many tenants, and know what a change will do before you make it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def version_option(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


for _command in (serve, replay, batch, simulate, compare, calibrate, fidelity, vopr, trace, model, settings):
    _command.register(app)


def exit_code_of(error: PenstockError) -> int:
    """2 for what the user wrote, 3 for what the machine lacks, 1 for the rest."""
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    return EXIT_ENVIRONMENT if isinstance(error, EnvironmentMissing) else EXIT_FAILED


def main() -> None:
    # As Ctrl-C: what was started is ended, and what is done is kept. A server that runs drains instead.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except PenstockError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("error: ", style="bold red", end="")
        console.print(error.message, markup=False)
        if error.hint:
            console.print(f"\nhint: {error.hint}", markup=False)
        sys.exit(exit_code_of(error))


if __name__ == "__main__":
    main()
