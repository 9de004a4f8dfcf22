"""``omniconv doctor``."""

from pathlib import Path as FilePath
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.doctor import Examination, Path, Refusal, examine
from omniconv.analysis.tables import Column, Table
from omniconv.bench.checkup import checkup
from omniconv.bench.checkup_tables import checkup_remarks, checkup_tables
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
    warn_of_load,
)
from omniconv.timing import Interrupted

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


_PATHS_TOGETHER: tuple[Column, ...] = (
    Column("techniques", "techniques", lambda g: ", ".join(p.technique for p in g), style=lambda g: "bold", folds=True),
    Column("path", "path", lambda g: g[0].path),
    Column("description", "what it does", lambda g: g[0].description, folds=True),
    Column("reason", "why", lambda g: g[0].reason, folds=True),
)
_REFUSALS_TOGETHER: tuple[Column, ...] = (
    Column("reason", "a call takes the composite path where", lambda g: g[0].reason, folds=True),
    Column("engines", "of", lambda g: ", ".join(r.engine for r in g), folds=True),
)


def _together(found: Examination) -> list[Table]:
    """For people: techniques that take the same path, and engines that step aside for the same reason, in one line."""
    paths: dict[tuple[str, ...], list[Path]] = {}
    for path in found.paths:
        paths.setdefault((path.path, path.description, path.reason), []).append(path)
    reasons: dict[str, list[Refusal]] = {}
    for refusal in found.refusals:
        reasons.setdefault(refusal.reason, []).append(refusal)
    versions, machine, *_ = _tables(found)
    return [
        versions,
        machine,
        Table("Which path the ops take", _PATHS_TOGETHER, list(paths.values())),
        Table("When native kernels step aside", _REFUSALS_TOGETHER, list(reasons.values())),
    ]


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


def doctor(
    network: Annotated[
        str | None,
        typer.Argument(
            metavar="[NETWORK]",
            help="Look at a network instead: pkg.module:factory, timm:NAME, torchvision:NAME, a .pt2, or a problem's text.",
            show_default=False,
        ),
    ] = None,
    input: Annotated[
        list[str] | None, typer.Option("--input", help="Its example input, as 1x3x224x224; several in turn.", show_default=False)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time its layers in torch and in omniconv.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch for that.")] = 1,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for one kind of layers.")] = 0.2,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """Versions, the machine, and which path the ops take and why; of a network, which layers are slow and what omniconv gains."""
    try:
        check_file("doctor", output, force, TEXT_SUFFIXES)
        if network is not None:
            _network(network, input, measure, threads, budget, form, output)
            return
        if input or measure:
            raise ValueError(f"doctor: {'--input' if input else '--measure'} must come with a network, got none")
    except ValueError as error:
        give_up(error)
    found = examine()
    tables = _tables(found)

    def show(console: Console) -> None:
        for table in _together(found):
            draw(table, console)
            console.print(Text())

    deliver("doctor", found, tables, form, output, show=show)


def _network(
    network: str, input: list[str] | None, measure: bool, threads: int, budget: float, form: Format, output: FilePath | None
) -> None:
    try:
        with progress("doctor") as tell:
            result = checkup(
                network, input=tuple(input or ()), measure=measure, threads=threads, budget=budget,
                progress=tell,
            )  # fmt: skip
    except Interrupted as stopped:
        result = stopped.done
    if measure:
        warn_of_load(result.machine)
    *remarks, last = checkup_remarks(result)

    def show(console: Console) -> None:
        for table in checkup_tables(result):
            draw(table, console)
        console.print()
        for line in remarks:
            console.print(Text(line, style="dim"))
        console.print(Text(last, style="bold"))

    deliver("doctor-network", result, checkup_tables(result), form, output, show=show, remarks=(*remarks, last))
    if result.interrupted:
        raise typer.Exit(130)
