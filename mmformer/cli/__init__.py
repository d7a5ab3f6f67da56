"""The command line, `mmformer`, and its commands.

Each command is a module that imports nothing heavy at its top, so that `mmformer --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mmformer import __version__
from mmformer.cli.bench import bench
from mmformer.cli.capfilt import capfilt
from mmformer.cli.chat import chat
from mmformer.cli.compress import compress
from mmformer.cli.convert import convert
from mmformer.cli.data import data
from mmformer.cli.debug import debug as debugging
from mmformer.cli.evaluate import evaluate
from mmformer.cli.export import export
from mmformer.cli.index import index
from mmformer.cli.models import models
from mmformer.cli.predict import predict
from mmformer.cli.probe import probe
from mmformer.cli.report import report
from mmformer.cli.runs import runs
from mmformer.cli.search import search

DEBUG = "--debug"
WRONG = 2
"""Exit code for what the user can mend; 1 is a fault of the program."""

app = typer.Typer(
    name="mmformer",
    help="Use models that `python train.py` has trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    predict,
    chat,
    evaluate,
    bench,
    compress,
    probe,
    report,
    runs,
    index,
    search,
    capfilt,
    convert,
    export,
    models,
):
    app.command()(command)
app.add_typer(debugging, name="debug")
app.add_typer(data, name="data")


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"mmformer {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Use models that `python train.py` has trained."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors become one line, with their traceback only after `--debug` (at any place)."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = DEBUG in given
    try:
        app([argument for argument in given if argument != DEBUG], prog_name="mmformer")
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        sys.stderr.close()
        sys.exit(0)
    except (OSError, ValueError) as error:
        if debug:
            raise
        _fail(str(error) or type(error).__name__, WRONG)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}\nThis is a fault of mmformer: add {DEBUG} to see where.", 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"mmformer: error: {message}", err=True)
    sys.exit(code)
