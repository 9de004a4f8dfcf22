"""``omniconv bench``."""

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.targets import read_problem
from omniconv.bench.layer_lists import NetworkLayer, measurable
from omniconv.bench.network import NetworkBenchmark, bench_network
from omniconv.bench.network_tables import network_headline, network_remarks, network_tables
from omniconv.bench.peers import DIRECTIONS
from omniconv.bench.results import Benchmark
from omniconv.bench.runner import run
from omniconv.bench.speed import headline, remarks, tables, update_readme
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
    notes,
    progress,
    warn_of_load,
)
from omniconv.problem import DTYPES
from omniconv.timing import Interrupted


def command(
    target: Annotated[
        str,
        typer.Argument(
            help=f"A technique ({', '.join(measurable())}), a problem's text, or a network: pkg.module:factory, timm:NAME, "
            "torchvision:NAME, a .pt2.",
            show_default=False,
        ),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option("--input", help="Of a network: example input, as 1x3x224x224; several in turn.", show_default=False),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Of a network: another one to time beside it.", show_default=False)
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help=f"{' or '.join(DIRECTIONS)} (forward + backward); by default each.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of every layer, in place of its own: {', '.join(DTYPES)}.", show_default=False)
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only layers whose network or text contains it.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads, ours and the peers'.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="Measure with empty caches too.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compare with torch.compile too; it takes a while.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time for one layer: 2, or 0.2 of a network's.", show_default=False),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure nothing: put benchmarks/results beside FILE into its table.", show_default=False
        ),
    ] = None,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """How fast. A technique on layers of real networks, or one problem: ours beside every peer and the machine's limits, verified.

    A network of yours: whole and layer by layer, contiguous beside channels-last, compiled, or beside another network.
    """
    directions = DIRECTIONS if direction is None else (direction,)
    try:
        if readme is not None:
            changed = update_readme(target, readme)
            notes().print(Text(f"{readme} {'written' if changed else 'is up to date'}"), soft_wrap=True)
            return
        check_file("bench", output, force, TEXT_SUFFIXES)
        layers = None if target in measurable() else _layers(target, {"--only": only, "--dtype": dtype})
        if layers is None and target not in measurable():
            _refuse("a network", {"--direction": direction, "--dtype": dtype, "--only": only, "--cold": cold})
            _network(target, input, against, compiled, threads, budget, form, output)
            return
        _refuse("a technique or a problem", {"--input": input, "--against": against})
        with progress("peaks") as tell:
            result = run(
                target if layers is None else layers[0].problem.technique, directions=directions, dtype=dtype, only=only,
                threads=threads, cold=cold, compiled=compiled, budget=2.0 if budget is None else budget, layers=layers,
                progress=tell,
            )  # fmt: skip
    except ValueError as error:
        give_up(error)
    except Interrupted as stopped:
        result = stopped.done
    warn_of_load(result.machine)
    deliver("bench", result, tables(result), form, output, show=partial(_show, result), remarks=remarks(result))
    if result.interrupted:
        raise typer.Exit(130)
    if result.failed:
        raise typer.Exit(1)


def _layers(target: str, refused: dict[str, object]) -> list[NetworkLayer] | None:
    """The one layer that a problem's text is; None where the target names a network.

    Raises:
        ValueError: The target is neither, or a problem with an option that only a technique has.
    """
    if not re.search(r"\s", target):
        if not re.search(r"[:.]", target):
            raise ValueError(
                f"bench: the target must be one of {', '.join(measurable())}, a problem's text or a network as pkg.module:factory, "
                f"got {target!r}"
            )
        return None
    try:
        problem = read_problem(target)
    except ValueError as error:
        raise ValueError(f"bench: {error}") from None
    _refuse("a problem", refused)
    return [NetworkLayer("one layer", problem)]


def _refuse(what: str, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"bench: {what} must be measured without {name}, got {name} {value}")


def _network(
    target: str,
    input: list[str] | None,
    against: str | None,
    compiled: bool,
    threads: int,
    budget: float | None,
    form: Format,
    output: Path | None,
) -> None:
    try:
        with progress("network") as tell:
            result = bench_network(
                target, input=tuple(input or ()), against=against, compiled=compiled, threads=threads,
                budget=0.2 if budget is None else budget,
                progress=tell,
            )  # fmt: skip
    except Interrupted as stopped:
        result = stopped.done
    warn_of_load(result.machine)
    deliver(
        "bench-network", result, network_tables(result), form, output,
        show=partial(_show_network, result), remarks=network_remarks(result),
    )  # fmt: skip
    if result.interrupted:
        raise typer.Exit(130)


def _show_network(result: NetworkBenchmark, console: Console) -> None:
    console.print(Text(network_headline(result)))
    for table in network_tables(result):
        console.print()
        draw(table, console)
    console.print()
    *others, last = network_remarks(result)
    for line in others:
        console.print(Text(line, style="dim"))
    console.print(Text(last, style="bold"))


def _show(result: Benchmark, console: Console) -> None:
    console.print(Text(headline(result)))
    for table in tables(result):
        console.print()
        draw(table, console)
    console.print()
    *others, last = remarks(result)
    for line in others:
        console.print(Text(line, style="dim"))
    style = "bold red" if result.failed else "bold green"
    console.print(Text(last, style="bold" if result.interrupted else style))
