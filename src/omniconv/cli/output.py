"""How a result leaves: a table for people or JSON, CSV, Markdown on standard output, and the same in a file."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from omniconv.analysis import page
from omniconv.analysis.plots.style import SUFFIXES, rendered
from omniconv.analysis.tables import Column, Table, as_csv, as_json, as_markdown
from omniconv.timing import Machine


class Format(str, Enum):
    """What a result can be printed as."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"
    html = "html"


def _printable(form: Format) -> Format:
    if form is Format.html:
        try:
            page.check_extra("--format")
        except ValueError as error:
            give_up(error)
    return form


FormatOption = Annotated[Format, typer.Option("--format", help="What to print.", callback=_printable)]
FileOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the result to FILE, in the format of its suffix.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite FILE.")]

Show = Callable[[Console], None]
Writer = Callable[[], str | bytes]


def notes() -> Console:
    """Standard error, where everything goes that is not the result."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def give_up(error: object) -> NoReturn:
    """Says in one line what is wrong with the call; exit code 2."""
    notes().print(Text(str(error)), soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def progress(first: str) -> Iterator[Callable[[float, str], None]]:
    """What long work shows of itself where a terminal looks on; it is told the share that is done and what is next."""
    console = notes()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(first, total=1.0)
        yield lambda share, what: bar.update(task, completed=share, description=what)


def warn_of_load(machine: Machine) -> None:
    """Says on standard error that others were running while times were taken."""
    if machine.load is not None and machine.busy:
        notes().print(
            Text(f"note: load average {machine.load[0]:.1f} on {machine.cores} cores: others are running, times may be high")
        )


def check_file(command: str, file: Path | None, force: bool, suffixes: Sequence[str]) -> None:
    """Raises ValueError unless the file can be written and has one of the suffixes, before any work."""
    if file is None:
        return
    if file.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ValueError(f"{command}: the output file must end in {known}, got '{file}'")
    if file.is_dir():
        raise ValueError(f"{command}: the output must be a file, got the folder '{file}'")
    if file.exists() and not force:
        raise ValueError(f"{command}: the output file must not exist (--force overwrites it), got '{file}'")
    if not file.parent.is_dir():
        raise ValueError(f"{command}: the output file must lie in a folder that exists, got '{file}'")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{command}: the output file must be writable, got '{file}'")
    if file.suffix.lower() == ".html":
        page.check_extra(command)


def write_file(command: str, file: Path, content: str | bytes) -> None:
    """Writes the file whole or not at all; text ends its last line."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        give_up(f"{command}: the output file must be writable, got '{file}' ({error.strerror})")
    notes().print(Text(f"{file} written"), soft_wrap=True)


def deliver(
    command: str,
    result: Any,
    tables: Sequence[Table],
    form: Format,
    file: Path | None = None,
    *,
    show: Show,
    remarks: Sequence[str] = (),
    writers: dict[str, Writer] | None = None,
) -> None:
    """Prints a result and writes it to the file.

    Args:
        command: Who speaks in errors.
        result: The dataclass, for JSON.
        tables: Its rows, for CSV, Markdown and HTML.
        form: What to print.
        file: Where to write it too; its suffix says as what.
        show: Draws the table for people.
        remarks: Lines below the Markdown and on the page.
        writers: Further suffixes of the file, or a page of the result's own.
    """
    texts: dict[str, Writer] = {
        ".json": lambda: as_json(result, command),
        ".csv": lambda: as_csv(tables),
        ".md": lambda: "\n".join([as_markdown(tables), *(line for remark in remarks for line in ("", remark))]),
        ".html": lambda: page.as_html(f"omniconv {command}", tables, remarks),
        **(writers or {}),
    }
    if form is Format.table:
        show(Console(highlight=False, markup=False, emoji=False))
    else:
        text = texts[f".{form.value}"]()
        assert isinstance(text, str)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    if file is not None:
        write_file(command, file, texts[file.suffix.lower()]())


def plot_writers(plot: Callable[[], Any]) -> dict[str, Writer]:
    """What ``deliver`` writes of a plot, by suffix."""

    def writer(suffix: str) -> Writer:
        return lambda: rendered(plot(), suffix)

    return {suffix: writer(suffix) for suffix in SUFFIXES}


TEXT_SUFFIXES = (".json", ".csv", ".md", ".html")


_FOLDED = 22  # characters that a column of long text is given before others are left out for it


def draw(table: Table, console: Console) -> None:
    """Draws a table: what does not fit is left out, what goes under another column becomes its second line."""
    below = {c.under: c for c in table.visible if c.under is not None}
    beside = _fitting([c for c in table.visible if c.under is None and c.needs <= console.width], table.rows, console.width)
    if table.title:
        console.print(Text(table.title, style="bold"))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    widths = [_wide(column, table.rows, console.width) for column in beside]
    excess = sum(widths) + 3 * (len(widths) - 1) - console.width
    longest = max(widths, default=0)
    for column, width in zip(beside, widths, strict=True):
        folds = column.name in below or column.folds
        shortened = excess > 0 and not folds and not column.right and column.bar is None and width == longest
        drawn.add_column(
            column.head, justify="right" if column.right else "left", no_wrap=not folds, vertical="top",
            overflow="ellipsis" if shortened else "fold", max_width=max(width - excess, 8) if shortened else None,
        )  # fmt: skip
    for row in table.rows:
        drawn.add_row(*[_cell(column, below.get(column.name), row, console.width) for column in beside])
    console.print(drawn)
    if table.caption:
        console.print(Text(table.caption, style="dim"))


def _fitting(columns: list[Column], rows: Sequence[Any], width: int) -> list[Column]:
    """The columns without as many of those that can be done without, the neediest first, as do not fit."""
    kept = list(columns)
    while sum(_wide(column, rows, width) for column in kept) + 3 * (len(kept) - 1) > width and any(column.needs for column in kept):
        kept.remove(max(kept, key=lambda column: column.needs))
    return kept


def _wide(column: Column, rows: Sequence[Any], width: int) -> int:
    """Characters that a column takes."""
    cells = [*column.head.split("\n"), *(column.shown(row) for row in rows)]
    widest = max(map(len, cells), default=0)
    bar = 0 if column.bar is None else _cells(width) + max(6 - widest, 0) + 1
    return (min(widest, _FOLDED) if column.folds else widest) + bar


_EIGHTHS = " ▏▎▍▌▋▊▉█"


def _cells(width: int) -> int:
    return 4 if width < 100 else 8


def _bar(share: float, cells: int) -> str:
    """So much of so many cells, in eighths; what there is a little of shows."""
    eighths = max(round(8 * cells * min(max(share, 0.0), 1.0)), 1 if share > 0 else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(cells)


def _cell(column: Column, below: Column | None, row: Any, width: int) -> Text:
    cell = Text(column.shown(row), style=column.style(row) if column.style else "")
    if column.bar is not None:
        cell = Text.assemble((_bar(column.bar(row), _cells(width)), "cyan"), cell.plain.rjust(7))
    if below is not None:
        cell.append(f"\n{below.shown(row)}", style="not bold dim")
    return cell
