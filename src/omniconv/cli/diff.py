"""``omniconv diff``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.diff import METRICS, Change, Diff, Total, Verdict, diff
from omniconv.analysis.tables import Column, Table, amount, figures
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

_WORDS = {
    "params": "parameters",
    "macs": "MACs",
    "valid": "MACs on real inputs",
    "flops": "flops",
    "bytes": "bytes at least",
    "moved": "bytes as run",
    "peak": "activation bytes, peak",
    "intensity": "flops a byte",
    "backward": "MACs backward",
}
_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}


def _signed(change: float) -> str:
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return sign + amount(int(abs(change)) if float(change).is_integer() else abs(change))


def _percent(before: float, after: float) -> str:
    if before == after:
        return "±0 %"
    if before == 0:
        return "new"
    return f"{'+' if after > before else '−'}{figures(abs(100 * (after - before) / before))} %"


def _shown(value: float) -> str:
    return amount(int(value) if float(value).is_integer() else value)


def _side(field: str, which: str) -> Callable[[Change], int | None]:
    def value(change: Change) -> int | None:
        side = getattr(change, which)
        return None if side is None else getattr(side, field)

    return value


def _delta(field: str) -> Callable[[Change], int]:
    def value(change: Change) -> int:
        before, after = _side(field, "before")(change), _side(field, "after")(change)
        return (after or 0) - (before or 0)

    return value


def _delta_text(field: str) -> Callable[[Change], str]:
    return lambda change: _signed(_delta(field)(change)) if _delta(field)(change) else ""


def _amount(value: int | None) -> str:
    return "–" if value is None else amount(value)


_TOTALS: tuple[Column, ...] = (
    Column("metric", "total", lambda t: t.metric, lambda t: _WORDS[t.metric], style=lambda t: "bold"),
    Column("before", "before", lambda t: t.before, lambda t: _shown(t.before), right=True),
    Column("after", "after", lambda t: t.after, lambda t: _shown(t.after), right=True),
    Column("change", "change", lambda t: t.after - t.before, lambda t: _signed(t.after - t.before), right=True),
    Column("percent", "", lambda t: None, lambda t: _percent(t.before, t.after), right=True, style=lambda t: _direction(t)),
)
_LAYERS: tuple[Column, ...] = (
    Column("layer", "layer", lambda c: c.name, lambda c: c.name or "all", folds=True),
    Column("status", "", lambda c: c.status, style=lambda c: _STYLES.get(c.status, "dim")),
    Column("kind", "kind", lambda c: c.kind_after or c.kind_before, lambda c: _kind(c), folds=True),
    Column(
        "macs_before",
        "MACs\nbefore",
        _side("macs_dense", "before"),
        lambda c: _amount(_side("macs_dense", "before")(c)),
        right=True,
    ),
    Column(
        "macs_after", "MACs\nafter", _side("macs_dense", "after"), lambda c: _amount(_side("macs_dense", "after")(c)), right=True
    ),
    Column("macs_change", "±MACs", _delta("macs_dense"), _delta_text("macs_dense"), right=True, needs=90),
    Column("params_change", "±params", _delta("params"), _delta_text("params"), right=True),
    Column("bytes_change", "±bytes", _delta("bytes_min"), _delta_text("bytes_min"), right=True),
    *(
        Column(f"{field}_{which}", "", _side(field, which), hidden=True)
        for field in ("params", "macs_valid", "flops", "bytes_min", "bytes_impl")
        for which in ("before", "after")
    ),
)
_VERDICTS: tuple[Column, ...] = (
    Column("condition", "condition", lambda v: v.condition, style=lambda v: "bold"),
    Column("before", "before", lambda v: v.before, lambda v: _shown(v.before), right=True),
    Column("after", "after", lambda v: v.after, lambda v: _shown(v.after), right=True),
    Column(
        "holds", "", lambda v: v.holds, lambda v: "holds" if v.holds else "no", style=lambda v: "bold red" if v.holds else "green"
    ),
)


def _direction(total: Total) -> str:
    return "" if total.before == total.after else "yellow" if total.after > total.before else "green"


def _kind(change: Change) -> str:
    before, after = change.kind_before, change.kind_after
    return f"{before} → {after}" if before and after and before != after else str(after or before)


def command(
    before: Annotated[Path, typer.Argument(help="A file that `omniconv summary … -o FILE.json` wrote.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit code 1 where it holds of the totals; may be repeated. A metric (" + ", ".join(METRICS) + "), > or <, and an "
            "amount: with a sign a change (macs>+1%, params>+10k), without one the second file's own (peak>200M).",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """Two summaries against each other, layer by layer: what became dearer, what is new, what is gone."""
    try:
        check_file("diff", output, force, TEXT_SUFFIXES)
        result = diff(before, after, fail_if or ())
    except ValueError as error:
        give_up(error)
    deliver("diff", result, _tables(result), form, output, show=partial(_show, result), remarks=_said(result))
    if result.failed:
        raise typer.Exit(1)


def _tables(result: Diff) -> list[Table]:
    layers = [change for change in result.layers if change.status != "same"]
    verdicts: list[Verdict] = list(result.verdicts)
    made = [Table(f"{result.before} → {result.after}", _TOTALS, result.totals)]
    made += [Table("Layers that differ", _LAYERS, layers)] if layers else []
    return made + ([Table("Conditions", _VERDICTS, verdicts)] if verdicts else [])


def _said(result: Diff) -> list[str]:
    count = {status: sum(c.status == status for c in result.layers) for status in ("changed", "added", "removed", "same")}
    said = [f"{count['changed']} layers changed, {count['added']} added, {count['removed']} removed, {count['same']} the same"]
    holding = [verdict.condition for verdict in result.verdicts if verdict.holds]
    return said + ([f"must not be: {', '.join(holding)}"] if holding else [])


def _show(result: Diff, console: Console) -> None:
    for table in _tables(result):
        draw(table, console)
        console.print()
    first, *rest = _said(result)
    console.print(Text(first))
    for line in rest:
        console.print(Text(line, style="bold red"))
