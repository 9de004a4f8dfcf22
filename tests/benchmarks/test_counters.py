"""The table of other counters: its truth, its page, and that ours is right on every case today and not only when it was made."""

import importlib.util
import json
import sys

import pytest
import torch
from cases import REPOSITORY

from omniconv.analysis import cost

RESULTS = REPOSITORY / "benchmarks/results/counters.json"


def _benchmark():
    spec = importlib.util.spec_from_file_location("counters", REPOSITORY / "benchmarks/counters.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["counters"] = module
    spec.loader.exec_module(module)
    return module


counters = _benchmark()
COMMITTED = json.loads(RESULTS.read_text())


def _has_torchvision() -> bool:
    """Whether it can be imported: a torchvision that was built for another torch cannot."""
    try:
        return importlib.util.find_spec("torchvision") is not None and bool(importlib.import_module("torchvision"))
    except (ImportError, OSError, RuntimeError):
        return False


NEED_TORCHVISION = {"deformable v2 (torchvision)", "ResNet-50", "MobileNetV2"}


@pytest.mark.parametrize("case", counters.CASES, ids=lambda case: case.name)
def test_ours_is_right(case):
    if case.name in NEED_TORCHVISION and not _has_torchvision():
        pytest.skip("torchvision is not installed, or not for this torch")
    model, inputs = case.build()
    model.train(case.backward)
    found = cost(model, *(x.requires_grad_(case.backward) for x in inputs), backward=case.backward)
    assert found.macs_dense + (found.backward.macs_dense if case.backward else 0) == case.truth


@pytest.mark.parametrize("case", counters.FIELDS, ids=lambda case: case.name)
def test_our_receptive_field_is_right(case):
    """By hand, and by where the float64 gradient is, with positive weights."""
    model = case.build().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.1)
    x = torch.rand(1, 3, counters.SIDE, counters.SIDE, dtype=torch.float64, requires_grad=True)
    assert counters._our_field(model, x.detach()) == str(case.size)
    y = model(x)
    extents = []
    for shift in (0, 1):  # both phases of an upsampled result
        row = y.shape[-1] // 2 + shift
        (support,) = torch.autograd.grad(y[0, 0, row, row], x, retain_graph=True)
        columns = support[0].abs().sum((0, 1)).nonzero()
        extents.append(int(columns.max() - columns.min()) + 1)
    assert max(extents) == case.size


def test_what_is_committed_is_what_would_be_written():
    rows = COMMITTED["rows"]
    assert [(row["case"], row["macs"]) for row in rows] == [(case.name, case.truth) for case in counters.CASES]
    assert len(rows) >= 20
    for case, row in zip(counters.CASES, rows, strict=True):
        assert row["terms"] == [list(term) for term in case.terms]
        for tool, answer in row["answers"].items():
            said = {key: answer[key] for key in ("macs", "known", "error")}
            assert answer["verdict"] == counters.verdict(case, counters.Answer(**said)), tool
    assert [(row["case"], row["size"]) for row in COMMITTED["receptive_fields"]] == [
        (case.name, case.size) for case in counters.FIELDS
    ]
    assert all(row["answers"]["omniconv"] == str(row["size"]) for row in COMMITTED["receptive_fields"])
    assert (REPOSITORY / "docs/counters.md").read_text() == counters.report(COMMITTED)


def test_ours_is_right_on_all_and_nobody_else_is():
    right = {
        tool: [row["answers"][tool]["verdict"] == "right" for row in COMMITTED["rows"] if tool in row["answers"]]
        for tool in COMMITTED["versions"]
    }
    assert all(right.pop("omniconv"))
    assert len(right) == len(counters.TOOLS) - 1
    assert not any(all(answers) for answers in right.values())


def test_published_totals_of_the_two_networks():
    """He et al. 2016: 4.1 G with the stride in the 3×3 (torchvision); Sandler et al. 2018: 300 M."""
    truth = {case.name: case.truth for case in counters.CASES}
    assert round(truth["ResNet-50"] / 1e9, 1) == 4.1
    assert round(truth["MobileNetV2"] / 1e6) == 301


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ((100.0, True, None), "right"),
        ((101.5, True, None), "right"),
        ((104.0, True, None), "+4 %"),
        ((104.0, False, None), "unknown"),
        ((400.0, True, None), "×4"),
        ((50.0, True, None), "×0.5"),
        ((0.0, True, None), "zero"),
        ((0.0, False, None), "unknown"),
        ((None, False, None), "unknown"),
        ((None, True, "TypeError: no"), "crash"),
    ],
)
def test_verdicts(answer, word):
    case = counters.Case("a hundred", lambda: (torch.nn.Identity(), ()), [(10, 10)])
    assert counters.verdict(case, counters.Answer(*answer)) == word
