"""Two summaries' JSON against each other, total by total and layer by layer, with conditions that a build may fail on.

    condition  :=  metric (">" | "<") amount
    metric     :=  params | macs | valid | flops | bytes | moved | peak | intensity | backward
    amount     :=  ["+" | "-"] number ["k" | "M" | "G" | "T"] ["%"]

With a sign the amount is a change from the first file to the second: ``macs>+1%`` holds where MACs grew by more than a hundredth,
``params<-10k`` where more than ten thousand parameters went. Without one it is what the second file must not pass: ``peak>200M``.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniconv.analysis.tables import SCHEMA_VERSION

# what conditions call it -> the field of a Summary
METRICS = {
    "params": "params",
    "macs": "macs_dense",
    "valid": "macs_valid",
    "flops": "flops",
    "bytes": "bytes_min",
    "moved": "bytes_impl",
    "peak": "peak_activation",
    "intensity": "intensity",
    "backward": "backward",
}
OF_LAYERS = ("params", "macs_dense", "macs_valid", "flops", "bytes_min", "bytes_impl")
_CONDITION = re.compile(r"\s*([a-z]+)\s*([<>])\s*([+-]?)\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kMGT]?)\s*(%?)\s*")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Condition:
    """A condition as it was read; ``sign`` is +1 or -1 for a change, 0 for an amount of its own."""

    text: str
    metric: str
    above: bool
    sign: int
    amount: float
    percent: bool

    @staticmethod
    def parse(text: str) -> "Condition":
        """Reads a condition; see the module's text for the grammar.

        Raises:
            ValueError: The text is malformed.

        >>> Condition.parse("macs>+1%").limit(200.0)
        202.0
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"a condition must be a metric, > or <, and an amount, as macs>+1% or peak>200M, got {text!r}")
        metric, comparison, sign, number, unit, percent = match.groups()
        if metric not in METRICS:
            raise ValueError(f"the metric of a condition must be one of {', '.join(METRICS)}, got {text!r}")
        if percent and (unit or not sign):
            raise ValueError(f"a percentage must be a change, with a sign and without a unit, got {text!r}")
        value = float(number) * _UNITS[unit]
        return Condition(text.strip(), metric, comparison == ">", {"+": 1, "-": -1, "": 0}[sign], value, bool(percent))

    def limit(self, before: float) -> float:
        """What the amount in the second file is held against.

        >>> Condition.parse("params<-10k").limit(25_000.0)
        15000.0
        """
        if not self.sign:
            return self.amount
        return before + self.sign * (before * self.amount / 100 if self.percent else self.amount)

    def holds(self, before: float, after: float) -> bool:
        """Whether it is so of the two amounts."""
        return after > self.limit(before) if self.above else after < self.limit(before)


@dataclass(frozen=True)
class Verdict:
    """A condition on the totals, the amounts it was judged on, and whether it holds."""

    condition: str
    before: float
    after: float
    holds: bool


@dataclass(frozen=True)
class Total:
    """A total before and after."""

    metric: str
    before: float
    after: float


@dataclass(frozen=True)
class Amounts:
    """What one layer costs."""

    params: int
    macs_dense: int
    macs_valid: int
    flops: int
    bytes_min: int
    bytes_impl: int


@dataclass(frozen=True)
class Change:
    """A layer in both files (``same`` or ``changed``) or in one of them (``added``, ``removed``); ``kind`` is technique or type."""

    name: str
    status: str
    kind_before: str | None
    kind_after: str | None
    before: Amounts | None
    after: Amounts | None


@dataclass(frozen=True)
class Diff:
    """Two summaries compared; ``failed`` says whether a condition holds."""

    before: str
    after: str
    totals: tuple[Total, ...]
    layers: tuple[Change, ...]
    verdicts: tuple[Verdict, ...]
    failed: bool


def diff(before: str | Path, after: str | Path, conditions: Iterable[str] = ()) -> Diff:
    """Compares two files that ``omniconv summary … -o FILE.json`` wrote. Layers are matched by name.

    Args:
        before: The first file.
        after: The second file.
        conditions: What must not be so of the totals, as ``macs>+1%``; see the module's text.

    Raises:
        ValueError: A file or a condition is malformed, or a metric is not known in both.
    """
    try:
        return _compared(before, after, [Condition.parse(text) for text in conditions])
    except ValueError as error:
        raise ValueError(f"diff: {error}") from None


def _compared(before: str | Path, after: str | Path, conditions: list[Condition]) -> Diff:
    first, second = _read(before), _read(after)
    pairs = {name: (_total(first, field), _total(second, field)) for name, field in METRICS.items()}
    verdicts = tuple(_judged(condition, *pairs[condition.metric]) for condition in conditions)
    return Diff(
        str(before),
        str(after),
        totals=tuple(Total(name, a, b) for name, (a, b) in pairs.items() if a is not None and b is not None),
        layers=tuple(_changes(_leaves(first, before), _leaves(second, after))),
        verdicts=verdicts,
        failed=any(verdict.holds for verdict in verdicts),
    )


def _refused(word: str) -> float:
    """NaN and the infinities, which Python reads and JSON has not."""
    raise ValueError(f"{word} is no number")


def _read(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refused)
    except OSError as error:
        raise ValueError(f"the file must be readable, got '{path}' ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file must be JSON, got '{path}' ({str(error).splitlines()[0]})") from None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind != "summary":
        raise ValueError(f"the file must be what `omniconv summary -o FILE.json` wrote, got '{path}' of kind {kind!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {data.get('schema_version')!r} in '{path}'")
    for name in ("status", "lines", *METRICS.values()):
        if name not in data:
            raise ValueError(f"the file must have all that a summary has, got '{path}' without {name!r}")
    if not isinstance(data["status"], dict):
        raise ValueError(f"the status of the totals must be an object, got {data['status']!r} in '{path}'")
    return dict(data)


def _total(data: dict[str, Any], field: str) -> float | None:
    """A total as a number; None where it is unknown or was not asked for."""
    value = data[field]
    if field == "backward":
        value = value.get("macs_dense") if isinstance(value, dict) else None
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and data["status"].get(field) != "unknown" else None


def _leaves(data: dict[str, Any], path: str | Path) -> dict[str, dict[str, Any]]:
    try:
        leaves = {line["name"]: line for line in data["lines"] if line["leaf"]}
        for line in leaves.values():
            if not all(isinstance(line[field], int) for field in OF_LAYERS) or not isinstance(line["type"], str):
                raise TypeError
            line["technique"]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"the lines of the file must be those of a summary, got '{path}'") from None
    return leaves


def _changes(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> Iterable[Change]:
    """In the order of the second file; what is gone comes after what stood before it."""
    gone: dict[str | None, list[str]] = {}
    last: str | None = None
    for name in first:
        if name in second:
            last = name
        else:
            gone.setdefault(last, []).append(name)
    for name in gone.get(None, []):
        yield _change(name, first[name], None)
    for name, line in second.items():
        yield _change(name, first.get(name), line)
        for lost in gone.get(name, []):
            yield _change(lost, first[lost], None)


def _change(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> Change:
    kinds = [None if line is None else line["technique"] or line["type"] for line in (before, after)]
    amounts = [None if line is None else Amounts(**{field: line[field] for field in OF_LAYERS}) for line in (before, after)]
    same = amounts[0] == amounts[1] and kinds[0] == kinds[1]
    status = "added" if before is None else "removed" if after is None else "same" if same else "changed"
    return Change(name, status, kinds[0], kinds[1], amounts[0], amounts[1])


def _judged(condition: Condition, before: float | None, after: float | None) -> Verdict:
    if after is None or (before is None and condition.sign):
        which = "second" if after is None else "first"
        raise ValueError(f"the metric of a condition must be known in both files, got {condition.text!r}, unknown in the {which}")
    before = after if before is None else before
    return Verdict(condition.text, before, after, condition.holds(before, after))
