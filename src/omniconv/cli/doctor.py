"""``omniconv doctor``."""

from rich.console import Console
from rich.text import Text

from omniconv.analysis.doctor import Examination, examine
from omniconv.analysis.tables import Column, Table
from omniconv.cli.output import TEXT_SUFFIXES, FileOption, ForceOption, Format, FormatOption, check_file, deliver, draw, give_up

_PACKAGES: tuple[Column, ...] = (
    Column("package", "package", lambda p: p.name, style=lambda p: "bold"),
    Column("version", "version", lambda p: p.version, lambda p: p.version or "not installed"),
)
_MACHINE: tuple[Column, ...] = (
    Column("property", "property", lambda fact: fact[0], style=lambda fact: "bold"),
    Column("value", "value", lambda fact: fact[1]),
)
_PATHS: tuple[Column, ...] = (
    Column("technique", "technique", lambda p: p.technique, style=lambda p: "bold"),
    Column("ops", "ops", lambda p: p.ops, lambda p: _names(p.ops), under="technique"),
    Column("path", "path", lambda p: p.path),
    Column("description", "what it does", lambda p: p.description, folds=True),
    Column("reason", "why", lambda p: p.reason, folds=True),
)
_REFUSALS: tuple[Column, ...] = (
    Column("engine", "engine", lambda r: r.engine, style=lambda r: "bold"),
    Column("place", "order", lambda r: r.place),
    Column("reason", "a call takes the composite path where", lambda r: r.reason, folds=True),
)


def _names(ops: tuple[str, ...]) -> str:
    """conv1d, 2d, 3d."""
    return ", ".join([ops[0], *(op[-2:] for op in ops[1:])])


def _tables(found: Examination) -> list[Table]:
    machine = found.machine
    load = "unknown" if machine.load is None else " ".join(f"{value:.2f}" for value in machine.load)
    facts = [
        ("processor", machine.cpu),
        ("cores", str(machine.cores)),
        ("torch threads", str(machine.threads)),
        ("torch's instruction set", machine.capability),
        ("native kernels", found.native),
        ("system", machine.system),
        ("python", machine.python),
        ("load average", load),
    ]
    return [
        Table("Versions", _PACKAGES, found.packages),
        Table("Machine", _MACHINE, facts),
        Table("Which path the ops take", _PATHS, found.paths),
        Table("When native kernels step aside", _REFUSALS, found.refusals),
    ]


def doctor(form: FormatOption = Format.table, output: FileOption = None, force: ForceOption = False) -> None:
    """Versions, the machine, and which path the ops take and why."""
    try:
        check_file("doctor", output, force, TEXT_SUFFIXES)
    except ValueError as error:
        give_up(error)
    found = examine()
    tables = _tables(found)

    def show(console: Console) -> None:
        for table in tables:
            draw(table, console)
            console.print(Text())

    deliver("doctor", found, tables, form, output, show=show)
