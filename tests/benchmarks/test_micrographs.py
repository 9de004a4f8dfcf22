"""The segmentation run on pictures small enough to learn in seconds, and its committed result."""

import doctest
import importlib
import json

import numpy as np
import pytest
import torch
import typer
from cases import REPOSITORY, fetched
from PIL import Image
from typer.testing import CliRunner

RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("micrographs-*.json"))
WIDTHS = (8, 8, 8, 16, 16)


@pytest.fixture(scope="module")
def micrographs():
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield importlib.import_module("micrographs")
    torch.use_deterministic_algorithms(deterministic)


def drawn(seed, deep):
    """A picture with bright disks of two sizes on a dark ground, and their masks as mnfinder stores them."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:128, :160]
    grey = generator.normal(10, 1, (128, 160))
    masks = np.zeros((2, 128, 160, 4), np.uint8)
    for kind, radius, many in ((0, 17, 2), (1, 5, 3)):
        for number in range(1, 1 + many):
            r, c = generator.integers(radius, 128 - radius), generator.integers(radius, 160 - radius)
            disk = (rows - r) ** 2 + (columns - c) ** 2 < radius**2
            masks[:, disk] = 0
            masks[kind][disk] = (40 * number, 0, 0, 255)
            grey[disk] = 120 + 60 * kind
    scale = 256 if deep else 1
    return (grey.clip(0, 255) * scale).astype(np.uint16 if deep else np.uint8), masks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mnfinder")
    for part, names in {"training-data": "abcd", "validation-data": "e", "test-data": "fg"}.items():
        for index, name in enumerate(names):
            grey, masks = drawn(ord(name), deep=index % 2)
            for place, pixels in (("images", grey), ("nucleus_masks", masks[0]), ("mn_masks", masks[1])):
                at = root / part / "cells" / place
                at.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(at / f"{name}.png")
    return root


def parts_of(micrographs, folder):
    return {part: [micrographs.read(file) for file in micrographs.files_of(folder, part)] for part in micrographs.PARTS}


def silent(step, loss):
    pass


def test_a_picture_is_read(micrographs, folder):
    parts = parts_of(micrographs, folder)
    assert [p.name for p in parts["train"]] == list("abcd")
    for picture in parts["train"]:  # of 8 and of 16 bits
        assert picture.x.shape == (1, 64, 80)
        assert picture.y.shape == (64, 80)
        means = [float(picture.x[0][picture.y == c].mean()) for c in range(3)]
        assert abs(means[0]) < 0.1
        assert 0.4 < means[1] < means[2] < 1.1


def test_crops_are_a_matter_of_the_seed_and_hold_what_is_rare(micrographs, folder):
    train = parts_of(micrographs, folder)["train"]
    x, y = micrographs.crops(train, 0, 3, 8, 32)
    assert x.shape == (8, 1, 32, 32)
    assert y.shape == (8, 32, 32)
    assert all((y[i] == 2).any() for i in range(1, 8, 2))
    again = micrographs.crops(train, 0, 3, 8, 32)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert not torch.equal(x, micrographs.crops(train, 1, 3, 8, 32)[0])
    for one, classes in zip(x[:, 0], y, strict=True):  # turned alike
        if (classes == 0).any() and (classes > 0).any():
            assert one[classes > 0].min() > one[classes == 0].median()


def test_networks_have_equal_parameters_and_two_have_the_same_layers(micrographs):
    sizes = {kind: micrographs.size_of(micrographs.build(kind)) for kind in micrographs.KINDS}
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    dilated, bilinear = (micrographs.build(kind) for kind in ("dilated", "bilinear"))
    assert {n: p.shape for n, p in dilated.named_parameters()} == {n: p.shape for n, p in bilinear.named_parameters()}
    x = torch.zeros(1, 1, 32, 48)
    assert dilated.body(x).shape[2:] == (8, 12)
    assert bilinear.body(x).shape[2:] == (2, 3)
    for kind in micrographs.KINDS:
        assert micrographs.build(kind)(x).shape == (1, 3, 32, 48)


def test_pictures_of_any_size_are_predicted(micrographs):
    for kind in micrographs.KINDS:
        model = micrographs.build(kind, WIDTHS).eval()
        assert micrographs.predict(model, torch.rand(1, 37, 50)).shape == (37, 50)


def test_iou(micrographs):
    assert doctest.testmod(micrographs).failed == 0
    picture = micrographs.Picture("p", torch.zeros(1, 16, 16), torch.zeros(16, 16, dtype=torch.long))
    picture.y[:8] = 1
    picture.y[0, 0] = 2

    class Says(torch.nn.Module):
        def forward(self, x):
            scores = torch.zeros(1, 3, *x.shape[2:])
            scores[:, 1, :4] = 1
            return scores

    counts = micrographs.confusion(Says(), [picture])
    assert counts.tolist() == [[128, 0, 0], [64, 63, 0], [0, 1, 0]]
    assert micrographs.iou(counts) == [100 * 128 / 192, 100 * 63 / 128, 0.0]


@pytest.mark.parametrize("kind", ["dilated", "transposed", "bilinear"])
def test_a_run_learns_and_is_the_same_after_an_interruption(micrographs, folder, tmp_path, kind):
    parts = parts_of(micrographs, folder)
    settings = micrographs.Settings(200, batch=4, crop=48, widths=WIDTHS)
    whole, spent = micrographs.trained(parts["train"], kind, 1, settings, tmp_path / "..", silent, every=1000)
    assert micrographs.iou(micrographs.confusion(whole, parts["train"]))[1] > 20
    assert spent["loss"] < 1

    def stop(step, loss):
        if step == 63:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        micrographs.trained(parts["train"], kind, 1, settings, tmp_path, stop, every=25)
    resumed, _ = micrographs.trained(parts["train"], kind, 1, settings, tmp_path, silent, every=25)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = micrographs.Settings(121, batch=4, crop=48, widths=WIDTHS)
    with pytest.raises(typer.BadParameter, match="must be of the same settings, or --out another folder, got"):
        micrographs.trained(parts["train"], kind, 1, other, tmp_path, silent)


def test_the_command(micrographs, folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(micrographs, "CROP", 32)
    threads, settings = torch.get_num_threads(), micrographs.Settings
    monkeypatch.setattr(micrographs, "Settings", lambda steps, threads: settings(steps, threads, 2, 32, WIDTHS))
    report = tmp_path / "micrographs.json"
    options = ["run", "--seeds", "2", "--steps", "2", "--out", str(tmp_path / "runs"), "--data", str(folder)]
    options += ["--report", str(report), "--budget", "0.01"]
    try:
        first = CliRunner().invoke(micrographs.app, options)
        assert first.exit_code == 0, first.output
        made = json.loads(report.read_text())
        assert [(r["kind"], r["seed"]) for r in made["runs"]] == [(k, s) for s in (0, 1) for k in micrographs.KINDS]
        assert not made["pictures"]["mnfinder_1_2_3"]
        assert made["cost"]["dilated"]["macs"] > 2 * made["cost"]["bilinear"]["macs"]
        assert micrographs.table(made) in first.stdout
        assert not list(tmp_path.rglob("*.part"))
        with Image.open(tmp_path / "runs" / "predictions.png") as picture:
            assert min(picture.size) > 300
        again = CliRunner().invoke(micrographs.app, options)
        assert again.exit_code == 0, again.output
        assert json.loads(report.read_text())["runs"] == made["runs"]  # nothing was trained anew
    finally:
        torch.set_num_threads(threads)
    shown = CliRunner().invoke(micrographs.app, ["table", str(report)])
    assert shown.stdout.count("\n") == 5


def test_missing_pictures_are_told_how_to_get(micrographs, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for options in ([], ["--data", str(tmp_path)]):
        result = CliRunner().invoke(micrographs.app, ["run", *options], env={"COLUMNS": "400", "TERM": "dumb"})
        assert result.exit_code == 2
        assert "pip install --no-deps mnfinder==1.2.3" in result.output


def test_a_missing_matplotlib_is_told_before_the_work(micrographs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = ["run", "--data", str(folder), "--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(micrographs.app, options, env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2
    assert 'pip install ".[plot]"' in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.stem)
def test_the_committed_result(micrographs, file):
    """Three seeds of three networks on all pictures, and the README's table is theirs."""
    report = json.loads(file.read_text())
    assert report["schema_version"] == 1
    assert report["pictures"]["mnfinder_1_2_3"]
    assert [report["pictures"][part] for part in micrographs.PARTS] == [30, 3, 16]
    assert [(r["kind"], r["seed"]) for r in report["runs"]] == [(k, s) for s in (0, 1, 2) for k in micrographs.KINDS]
    sizes = {r["parameters"] for r in report["runs"]}
    assert max(sizes) < 1.01 * min(sizes)
    assert micrographs.table(report) in (REPOSITORY / "README.md").read_text()


def test_the_pinned_pictures_are_those_that_were_learnt(micrographs):
    folder = fetched("mnfinder")
    assert micrographs.digest_of(folder) == micrographs.SHA256
    counts = {part: len(micrographs.files_of(folder, part)) for part in micrographs.PARTS}
    for path in RESULTS:
        told = json.loads(path.read_text())["pictures"]
        assert {part: told[part] for part in counts} == counts
