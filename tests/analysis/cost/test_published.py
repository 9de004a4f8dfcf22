"""Published numbers: networks built from their papers, and a hundred models of timm against timm's own results."""

import csv
import importlib

import pytest
import torch
from cases import REPOSITORY
from published_networks import NETWORKS

from omniconv.analysis import cost

FOLDER = REPOSITORY / "tests/published"


def _rows(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


PAPERS, TIMM = _rows("papers.csv"), _rows("timm.csv")


def _image(size: str) -> torch.Tensor:
    return torch.empty(1, 3, int(size), int(size), device="meta")


def _rounds_to(value: int, published: str) -> bool:
    """Whether a number has the published digits once it is rounded to as many: 568,740,352 and "569e6"."""
    digits, exponent = published.split("e")
    decimals = len(digits.partition(".")[2])
    return round(value / 10 ** int(exponent), decimals) == float(digits)


def test_rounding():
    assert _rounds_to(568_740_352, "569e6")
    assert not _rounds_to(569_540_352, "569e6")
    assert _rounds_to(385_814_752, "0.39e9")
    assert not _rounds_to(384_999_999, "0.39e9")


def test_every_network_is_published():
    assert [row["network"] for row in PAPERS] == list(NETWORKS)


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: row["network"])
def test_a_network_of_a_paper(row):
    """Within rounding; where the source has another number, within one percent and with a note that says so."""
    with torch.device("meta"):
        network = NETWORKS[row["network"]]().eval()
    found = cost(network, _image(row["size"]))
    assert found.status["params"] == found.status["macs_dense"] == "exact"
    normalised = (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    apart = sum(p.numel() for m in normalised for p in m.parameters()) if row["count"] == "weights" else 0
    assert _rounds_to(found.params - apart, row["params"])
    if row["macs"] and not _rounds_to(found.macs_dense, row["macs"]):
        assert row["note"]
        assert f"{found.macs_dense:,}" in row["note"]
        assert abs(found.macs_dense / float(row["macs"]) - 1) < 0.01
    else:
        assert not row["note"]


def test_a_hundred_models_of_many_families():
    assert len({row["model"] for row in TIMM}) == len(TIMM) == 100
    assert len({row["model"].replace("_", " ").split()[0].rstrip("0123456789bdtlsv") for row in TIMM}) > 50


def _timm():
    try:
        return importlib.import_module("timm")
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"timm is not installed, or not for this torch ({type(error).__name__})")


def _agree(value: float, published: str, share: float = 0.0) -> bool:
    """Within the rounding to two decimals, or within a share of it."""
    return abs(value - float(published)) <= max(0.005 + 1e-4, share * float(published))


@pytest.mark.slow
@pytest.mark.parametrize("row", TIMM, ids=lambda row: row["model"])
def test_a_model_of_timm(row):
    """Parameters within 1 % or the rounding; multiply-accumulates, plus what is counted there besides products, to the rounding."""
    timm = _timm()
    with torch.device("meta"):
        model = timm.create_model(row["model"]).eval()
    found = cost(model, _image(row["size"]))
    assert _agree(found.params / 1e6, row["params"], share=0.01)
    if row["note"]:
        assert not _agree(found.macs_dense / 1e9, row["gmacs"], share=0.01)  # else the note is stale
        return
    assert _agree(found.macs_dense / 1e9 + float(row["others"]), row["gmacs"])


def test_lstms_count_where_the_published_table_leaves_them_out():
    """Tatsunami & Taki 2022, arXiv:2205.01972, table 1: Sequencer2D-S has 28 M parameters and 8.4 G."""
    (row,) = [row for row in TIMM if row["note"]]
    timm = _timm()
    with torch.device("meta"):
        model = timm.create_model(row["model"]).eval()
    found = cost(model, _image(row["size"]))
    assert abs(found.macs_dense / 8.4e9 - 1) < 0.01
    assert _rounds_to(found.params, "28e6")
