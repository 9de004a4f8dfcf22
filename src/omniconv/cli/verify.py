"""``omniconv verify``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.tables import Column, Table
from omniconv.analysis.verify import Verification, summaries, verify
from omniconv.cli.output import (
    TEXT_SUFFIXES,
    FileOption,
    ForceOption,
    Format,
    FormatOption,
    check_file,
    deliver,
    draw,
    give_up,
    progress,
)
from omniconv.cli.summary import InputOption

_CHECKS: tuple[Column, ...] = (
    Column("check", "check", lambda c: c.check, folds=True),
    Column("technique", "technique", lambda c: c.technique, hidden=True),
    Column("problem", "problem", lambda c: c.problem, folds=True),
    Column("of", "of", lambda c: c.of),
    Column("expected", "counted", lambda c: c.expected, lambda c: _number(c.expected), right=True),
    Column("got", "said", lambda c: c.got, lambda c: _number(c.got), right=True),
    Column("ok", "", lambda c: c.ok, lambda c: "=" if c.ok else "≠", style=lambda c: "green" if c.ok else "bold red"),
)


def _summary(what: str) -> tuple[Column, ...]:
    return (
        Column(what, what, lambda s: s.of, style=lambda s: "bold", folds=True),
        Column("problems", "problems", lambda s: s.problems, lambda s: f"{s.problems:,}", right=True),
        Column("compared", "compared", lambda s: s.compared, lambda s: f"{s.compared:,}", right=True),
        Column("failed", "differ", lambda s: s.failed, right=True, style=lambda s: "bold red" if s.failed else "green"),
    )


MOST = 20  # failures that are shown to people


def _number(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return " × ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shown(result: Verification) -> list[Table]:
    """One problem whole; of many, how many comparisons of each kind, and what failed."""
    if result.problems == 1:
        return [Table("", _CHECKS, result.rows)]
    tables = [Table("", _summary(by), summaries(result, by)) for by in ("check", "technique")]
    if result.failed:
        rest = f"and {len(result.failed) - MOST:,} more" if len(result.failed) > MOST else ""
        tables.append(Table("What does not agree", _CHECKS, result.failed[:MOST], rest))
    return tables


def command(
    target: Annotated[
        str,
        typer.Argument(help="all, a technique, the text of a problem such as 'transposed2d c4-6 i5 k4 s2 p1', or a network."),
    ] = "all",
    inputs: InputOption = None,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """Whether cost and receptive field are what the convolutions do: formulas against counted ones, ops and gradients.

    Exit code 1 where anything differs.
    """
    try:
        check_file("verify", output, force, TEXT_SUFFIXES)
        with progress("verify") as tell:
            result = verify(target, inputs or (), tell)
    except ValueError as error:
        give_up(error)

    def show(console: Console) -> None:
        for table in _shown(result):
            draw(table, console)
            console.print()
        console.print(Text(result.verdict, style="bold red" if result.failed else "bold green"))

    people = form is Format.md or (output is not None and output.suffix.lower() == ".md")
    tables = _shown(result) if people else [Table("", _CHECKS, result.rows)]
    deliver("verify", result, tables, form, output, show=show, remarks=(result.verdict,))
    if result.failed:
        raise typer.Exit(1)
