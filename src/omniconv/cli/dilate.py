"""``omniconv dilate``."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.tables import Column, Table
from omniconv.cli.output import TEXT_SUFFIXES, FileOption, ForceOption, Format, FormatOption, check_file, deliver, draw, give_up
from omniconv.cli.summary import InputOption, TargetArgument
from omniconv.surgery import DilatedTarget, DilationChange, dilate_target


def _pair(name: str) -> Callable[[Any], Any]:
    return lambda change: getattr(change, name)


def _step(name: str) -> Callable[[Any], str]:
    """1 → 2, or 1×2 → 2×4."""

    def numbers(values: tuple[int, ...]) -> str:
        return str(values[0]) if len(set(values)) == 1 else "×".join(map(str, values))

    def text(change: DilationChange) -> str:
        before, after = getattr(change, name)
        return numbers(before) if before == after else f"{numbers(before)} → {numbers(after)}"

    return text


_COLUMNS: tuple[Column, ...] = (
    Column("module", "module", lambda c: c.module, lambda c: c.module or "(itself)", folds=True, style=lambda c: "bold"),
    Column("type", "type", lambda c: c.type, needs=80),
    *(Column(name, name, _pair(name), _step(name), right=True) for name in ("stride", "dilation", "padding")),
    Column("extended", "lengthened", lambda c: c.extended, lambda c: "yes" if c.extended else "", needs=100),
)
_MODEL_SUFFIXES = (".pt", ".pt2")
OutputStride = Annotated[int, typer.Option("--output-stride", metavar="N", help="Input steps between neighbouring positions.")]


def _remarks(result: DilatedTarget) -> tuple[str, ...]:
    sizes = ", ".join("×".join(map(str, shape)) for shape in result.inputs)
    marks = {"exact": "", "estimate": " (estimate)", "lower_bound": " (at least)", "unknown": " (unknown)"}
    (before, after), (low, high) = result.macs, result.peak_activation
    ratio = f", {after / before:.2f} times" if before else ""
    return (
        f"for an input of {sizes}: {result.params:,} parameters stay",
        f"MACs: {before / 1e6:,.1f} → {after / 1e6:,.1f} million{ratio}{marks[result.status['macs_dense']]}",
        f"activations: {low / 1e6:,.1f} → {high / 1e6:,.1f} MB alive at once{marks[result.status['peak_activation']]}",
        *(f"note: {note}" for note in result.notes),
    )


def command(
    target: TargetArgument,
    inputs: InputOption = None,
    output_stride: OutputStride = 8,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """A network's late strides turned into dilation, weights untouched; -o FILE.pt2 or FILE.pt writes the network itself."""
    try:
        check_file("dilate", output, force, (*_MODEL_SUFFIXES, *TEXT_SUFFIXES))
        result = dilate_target(target, output_stride, inputs=inputs or ())
        suffix = "" if output is None else output.suffix.lower()
        model = result.saved(suffix) if suffix in _MODEL_SUFFIXES else b""
    except ValueError as error:
        give_up(error)
    title = f"{len(result.changes)} layers of {target} at output stride {output_stride}"
    table, remarks = Table(title, _COLUMNS, result.changes), _remarks(result)

    def show(console: Console) -> None:
        draw(table, console)
        console.print()
        for remark in remarks:
            console.print(Text(remark))

    deliver(
        "dilate", result, [table], form, output, show=show, remarks=remarks, writers={s: lambda: model for s in _MODEL_SUFFIXES}
    )
