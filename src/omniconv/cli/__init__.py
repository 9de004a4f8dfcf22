"""The command line: parsing and printing only. Every command is a function of the library that returns a dataclass."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from omniconv.cli import bench, catalogue, compare, cost, diff, dilate, doctor, receptive_field, roofline, schema, summary, verify

app = typer.Typer(
    help="Every convolution a network designer reaches for, compared and timed; and your network: what it costs, sees and takes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare.command)
app.command("bench")(bench.command)
app.command("summary")(summary.command)
app.command("cost")(cost.command)
app.command("diff")(diff.command)
app.command("roofline")(roofline.command)
app.command("receptive-field")(receptive_field.command)
app.command("dilate")(dilate.command)
app.command("verify")(verify.command)
app.command("list")(catalogue.list_techniques)
app.command("info")(catalogue.info)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"omniconv {version('omniconv')}")
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """The console script ``omniconv``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without × and ± shows ? rather than a traceback
    app(prog_name="omniconv")
