"""Rows of records as JSON, CSV and Markdown; the terminal's table is drawn from the same columns by the command line."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omniconv.problem import Problem

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    """One column: ``name`` and ``value`` for machines, ``head`` and ``text`` for people.

    ``head`` may break lines; ``right`` aligns numbers; a ``hidden`` column is for machines alone. In a terminal, a column is left
    out where there are fewer than ``needs`` characters, or where not all columns fit (the neediest first, one of 0 never), goes
    into the second line of the column that ``under`` names, ``folds`` long text and has a ``style`` of rich. ``bar`` is a share
    in [0, 1] that is drawn beside the cell; ``guides`` keeps the lines of a tree together.
    """

    name: str
    head: str
    value: Callable[[Any], Any]
    text: Callable[[Any], str] | None = None
    right: bool = False
    needs: int = 0
    under: str | None = None
    folds: bool = False
    style: Callable[[Any], str] | None = None
    hidden: bool = False
    bar: Callable[[Any], float] | None = None
    guides: bool = False

    def shown(self, row: Any) -> str:
        """The cell for people; an en dash for what is unknown."""
        if self.text is not None:
            return self.text(row)
        value = self.value(row)
        return "–" if value is None else str(value)

    def classes(self, row: Any) -> str:
        """What a page's style knows of the cell.

        >>> Column("n", "n", lambda row: row, right=True, style=lambda row: "bold red").classes(3)
        'right bold red'
        """
        words = [word for word in ("right", "folds", "guides", "bar") if getattr(self, word)]
        return " ".join([*words, *([self.style(row)] if self.style else [])]).strip()


@dataclass(frozen=True)
class Table:
    """Rows under a title, and a line below that says how to read them."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Any]
    caption: str = ""

    @property
    def visible(self) -> tuple[Column, ...]:
        """The columns for people."""
        return tuple(column for column in self.columns if not column.hidden)


def plain(value: Any) -> Any:
    """A dataclass as what JSON knows.

    Fields marked ``metadata={"json": False}`` are left out, numbers that JSON lacks are null, a Problem is its text.
    """
    if isinstance(value, Problem):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.metadata.get("json", True)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(result: Any, kind: str | None = None) -> str:
    """A result as JSON with its schema's version and, if it is known, the kind of result: the name of its schema.

    >>> print(as_json({"answer": 42}, "question"))
    {
      "schema_version": 1,
      "kind": "question",
      "answer": 42
    }
    """
    head = {"schema_version": SCHEMA_VERSION} | ({"kind": kind} if kind else {})
    return json.dumps(head | plain(result), indent=2, ensure_ascii=False)


def as_csv(tables: Sequence[Table]) -> str:
    """The rows of all tables under one head: full precision, whatever one table lacks is empty."""
    heads = list(dict.fromkeys(column.name for table in tables for column in table.columns))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            writer.writerow({column.name: _cell(column.value(row)) for column in table.columns})
    return text.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return ("x" if all(isinstance(item, int) for item in value) else " ").join(map(str, value))
    return value


def as_markdown(tables: Sequence[Table]) -> str:
    """The tables for people, every column."""
    return "\n\n".join(map(_markdown, tables))


def _markdown(table: Table) -> str:
    lines = [f"### {table.title}", ""] if table.title else []
    lines.append("| " + " | ".join(_escaped(column.head) for column in table.visible) + " |")
    lines.append("|" + "|".join("---:" if column.right else "---" for column in table.visible) + "|")
    lines += ["| " + " | ".join(_escaped(column.shown(row)) for column in table.visible) + " |" for row in table.rows]
    return "\n".join(lines + (["", table.caption] if table.caption else []))


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def amount(value: float) -> str:
    """A count in three figures with its unit prefix.

    >>> amount(36928), amount(115605504), amount(64)
    ('36.9k', '116M', '64')
    """
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{figures(value / factor)}{prefix}"
    return figures(value) if isinstance(value, float) else str(value)


def figures(value: float) -> str:
    """Three figures without an exponent.

    >>> figures(0.01234), figures(1.5), figures(123.4)
    ('0.0123', '1.50', '123')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(2 - math.floor(math.log10(abs(float(f"{value:.2e}")))), 0)
    return f"{value:.{digits}f}"
