"""The package as a whole: complete records in one list, nothing exported without a word and an executed example."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from cases import PROBLEMS, cases_of, larger_than_input

import omniconv
from omniconv import TECHNIQUES, convert, functional, models, surgery
from omniconv import nn as layers
from omniconv.geometry import PADDING_MODES, PADDING_NAMES
from omniconv.problem import Problem

ROOT = Path(omniconv.__path__[-1])
if not (ROOT / "geometry.py").exists():
    ROOT = Path(next(p for p in omniconv.__path__ if (Path(p) / "geometry.py").exists()))
REPOSITORY = Path(__file__).parent.parent


def test_every_technique_has_a_name_of_its_own():
    names = [t.name for t in TECHNIQUES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_a_technique_is_complete(technique):
    assert (PROBLEMS / f"{technique.name}.txt").exists()
    slices = (f"{technique.name}.py", f"{technique.name}/__init__.py")  # a large slice is a folder
    assert any((ROOT / "techniques" / name).exists() for name in slices)
    assert (Path(__file__).parent / "techniques" / f"test_{technique.name}.py").exists()
    for text in ("title", "summary", "sampling", "mixing", "weights", "formula", "when", "paper"):
        assert getattr(technique, text).strip(), text
    assert technique.traps
    assert technique.peers
    assert technique.reference.__doc__
    assert technique.composite.__doc__
    assert technique.ops.keys() == technique.modules.keys()
    for rank, op in technique.ops.items():
        assert op in [getattr(functional, name) for name in functional.__all__]
        module = technique.modules[rank]
        assert getattr(layers, module.__name__) is module
        assert (module.technique, module.rank, module.op) == (technique.name, rank, op)
    assert technique.title.split(" ")[0].lower() in (REPOSITORY / "CHANGELOG.md").read_text().lower()


def taken(technique, problem: Problem) -> bool:
    try:
        technique.check(problem)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_a_techniques_problems_reach_all_it_takes(technique):
    """Every rank, setting, padding and mode; batches of none, one and more; what is small, uneven or does not divide."""
    problems = [p for _, p in cases_of(technique)]
    plain = {rank: Problem(technique.name, 12, (9,) * rank) for rank in technique.ranks}
    assert {p.rank for p in problems} == set(technique.ranks)
    assert {0, 1, 2} <= {p.batch for p in problems}
    for name in technique.takes:
        assert any(getattr(p, name) != getattr(plain[p.rank], name) for p in problems), name
    assert any(p.channels_last for p in problems) or max(technique.ranks) == 1
    assert any(max(p.size) == 1 for p in problems) or min(technique.ranks) > 1
    if "padding" in technique.takes:
        for name in PADDING_NAMES:
            asked = any(taken(technique, p.replace(padding=name)) for p in plain.values())
            assert asked == any(p.padding == name for p in problems), name
        assert any(not isinstance(p.padding, str) and any(a != b for a, b in p.padding) for p in problems)
    if "padding_mode" in technique.takes:
        assert {p.padding_mode for p in problems} == set(PADDING_MODES)
    if "kernel" in technique.takes:
        assert any(larger_than_input(p) for p in problems)
    if "stride" in technique.takes:
        assert any(i % s for p in problems for i, s in zip(p.size, p.stride, strict=True))


@pytest.mark.parametrize("room_of_names", [functional, layers, convert, models, surgery], ids=lambda m: m.__name__)
def test_exports_are_sorted_and_exist(room_of_names):
    assert room_of_names.__all__ == sorted(room_of_names.__all__)
    assert all(hasattr(room_of_names, name) for name in room_of_names.__all__)


TEMPLATE = re.compile(r"\{(n|axes|over|taps|threes|ones|twos|twice|doubled)\}")
PUBLIC = [(m, name) for m in (functional, layers, convert, models, surgery) for name in m.__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda v: v if isinstance(v, str) else v.__name__.split(".")[-1])
def test_every_public_name_has_an_executed_example(module, name):
    """Functions of one rank share a text that doctest does not find by itself."""
    thing = getattr(module, name)
    text = inspect.getdoc(thing)
    assert text, name
    assert not TEMPLATE.search(text), "a place of the template is left open"
    globs = vars(importlib.import_module(thing.__module__)) | vars(module) | {"torch": torch}
    test = doctest.DocTestParser().get_doctest(text, dict(globs), name, None, None)
    assert test.examples, f"{name}: the docstring must have an example"
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed
    assert failed == 0


# without the native library, which lies among the modules of an installed package and is none
NO_MODULES = ("omniconv.__main__", "omniconv._library")
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "omniconv.") if m.name not in NO_MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch}):
        if not TEMPLATE.search(test.docstring or ""):  # what the template makes is among the public names
            assert runner.run(test).failed == 0, test.name


def test_the_readme_shows_the_taxonomy_of_the_records():
    """Of every technique that its first sentence names, word for word, and of no other."""
    readme = (REPOSITORY / "README.md").read_text()
    named = re.split(r",\s+", readme.split(" — ")[1].replace("\n", " "))
    rows = re.findall(r"^\| technique \| sampling.*\n\|-.*\n((?:\|.*\n)+)", readme, re.M)[0].splitlines()
    records = {t.title.split(" ")[0].lower(): t for t in TECHNIQUES}
    assert rows == [f"| {t.name} | {t.sampling} | {t.mixing} | {t.weights} |" for t in map(records.get, named)]


def test_the_readmes_code_runs():
    for block in re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S):
        exec(compile(block, "README.md", "exec"), {})
