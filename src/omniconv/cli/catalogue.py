"""``omniconv list`` and ``omniconv info``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from omniconv.analysis.catalogue import Description, Entry, catalogue, describe
from omniconv.analysis.tables import Column, Table, amount
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
)

_AXES: tuple[Column, ...] = (
    Column("technique", "technique", lambda e: e.name, style=lambda e: "bold"),
    Column("sampling", "sampling:\nwhere does a tap look?", lambda e: e.sampling, folds=True),
    Column("mixing", "mixing:\nwhich channels meet?", lambda e: e.mixing, folds=True),
    Column("weights", "weights:\nwhere from?", lambda e: e.weights, folds=True),
    Column("ranks", "axes", lambda e: e.ranks, lambda e: ranks(e), needs=90),
    Column("summary", "in short", lambda e: e.summary, needs=140, folds=True),
)


def ranks(entry: Entry) -> str:
    """1–3, or the one rank."""
    return f"{entry.ranks[0]}–{entry.ranks[-1]}" if len(entry.ranks) > 1 else str(entry.ranks[0])


def list_techniques(form: FormatOption = Format.table, output: FileOption = None, force: ForceOption = False) -> None:
    """The techniques on the three axes of the one equation."""
    try:
        check_file("list", output, force, TEXT_SUFFIXES)
    except ValueError as error:
        give_up(error)
    found = catalogue()
    table = Table("", _AXES, found.techniques)
    deliver("list", found, [table], form, output, show=lambda console: draw(table, console))


_FACTS: tuple[Column, ...] = (
    Column("fact", "", lambda fact: fact[0], style=lambda fact: "bold"),
    Column("value", "", lambda fact: fact[1], folds=True),
)


def _facts(known: Description) -> list[tuple[str, str]]:
    entry, cost, base = known.entry, known.cost, known.standard_cost
    shapes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in known.operands.items())
    field = " × ".join(map(str, cost.receptive_field))
    return [
        ("technique", f"{entry.title}: {entry.summary}"),
        ("formula", known.formula),
        ("sampling", entry.sampling),
        ("mixing", entry.mixing),
        ("weights", entry.weights),
        ("functions", ", ".join(known.ops)),
        ("layers", ", ".join(known.layers)),
        ("example", known.example),
        ("shapes", f"{shapes} → ({', '.join(map(str, known.output))})"),
        ("params", f"{cost.params:,}  ({_share(cost.params, base.params)} of {known.standard})"),
        ("MACs", f"{cost.macs_dense:,}  ({_share(cost.macs_dense, base.macs_dense)}); on real inputs {cost.macs_valid:,}"),
        ("bytes", f"{amount(float(cost.bytes))}B, each operand moved once"),
        ("receptive field", f"{field} input positions are seen by one output"),
        ("when", known.when),
        *[("trap", trap) for trap in known.traps],
        ("paper", known.paper),
    ]


def _share(value: int, base: int) -> str:
    share = 100 * value / base
    return f"{share:.0f} %" if share >= 9.5 else f"{share:.2g} %"


def info(
    technique: Annotated[str, typer.Argument(help="A name that `omniconv list` shows.", show_default=False)],
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """Formula, cost, when to use, traps and paper of one technique."""
    try:
        check_file("info", output, force, TEXT_SUFFIXES)
        known = describe(technique)
    except ValueError as error:
        give_up(error)
    facts = _facts(known)

    def show(console: Console) -> None:
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="bold")
        grid.add_column(overflow="fold")
        for name, value in facts:
            grid.add_row(Text(name), Text(value))
        console.print(grid)

    deliver("info", known, [Table(known.entry.title, _FACTS, facts)], form, output, show=show)
