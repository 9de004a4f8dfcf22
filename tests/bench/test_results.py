"""What the times say, as numbers, tables, files and the README's words."""

import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
from bench_rows import SMALL, TINY, benchmark, measured, row, timing
from cases import REPOSITORY

from omniconv.analysis.tables import as_csv, as_json
from omniconv.bench.layer_lists import measurable
from omniconv.bench.peers import BOTH, FORWARD
from omniconv.bench.results import Measured, Row, fastest, load, slug
from omniconv.bench.speed import NO_RESULTS, RESULTS, committed, readme_table, summaries, tables, update_readme
from omniconv.timing import machine

pytestmark = pytest.mark.usefixtures("quick_bench")


def test_ratios_by_hand():
    one = row(2.0, f32=3.0)
    assert (one.best, one.best_peer) == ("channels-last", "OpenVINO")
    assert one.ratio == 2.0
    assert one.torch_ratio == 4.0
    assert one.f32_ratio == 3.0
    assert one.to_floor == 4.0
    assert one.differs is True
    assert row(1.05, noise=True).differs is False
    alone = (Measured("contiguous", timing(1.7), agrees=True),)
    assert replace(one, one_thread=alone).scaling == 1.7
    short = tuple(Measured(way.name, timing(way.hot.median * 5e-5), agrees=True) for way in alone)
    assert replace(one, one_thread=short).scaling is None
    nothing = Row("net", TINY[1], FORWARD, "failed", "no")
    assert nothing.ratio is nothing.best is nothing.differs is nothing.torch_ratio is None


def test_cold_and_hot_have_their_own_best():
    way = Measured("a", timing(1.0), timing(9.0)), Measured("b", timing(2.0), timing(3.0))
    assert fastest(way).name == "a"
    assert fastest(way, cold=True).name == "b"
    assert fastest([Measured("c", reason="no")]) is None
    assert fastest([]) is None


def test_summaries_by_hand():
    rows = (
        row(4.0),
        row(1.0 / 4, network="slow"),
        row(0.5, network="slower", noise=True),
        row(3.0, direction=BOTH),
        row(2.0, problem="depthwise2d n1 c4 i8 k3 p1 dt:bf16", f32=8.0),
        row(2.0, problem="depthwise1d n1 c4 i8 k3 p1"),
    )
    assert [s.name for s in summaries(rows)] == ["2-D forward", "2-D forward + backward", "1-D forward", "bf16, f16 forward"]
    first, *_, half = summaries(rows)
    assert first.shapes == 3
    assert first.ratio == pytest.approx(0.5 ** (1 / 3))
    assert first.worst == 0.25
    assert [r.network for r in first.losses] == ["slow", "slower"]
    assert first.to_floor == pytest.approx(4.0)
    assert first.torch_ratio == pytest.approx(2 * 0.5 ** (1 / 3))
    assert first.f32_ratio is None
    assert half.f32_ratio == pytest.approx(8.0)


def test_the_readmes_table_by_hand():
    slow, slower = row(1 / 4, network="slow"), row(0.5, network="slower", noise=True)
    text = readme_table([benchmark(row(4.0), slow, slower, row(3.0, direction=BOTH))])
    assert "| 2-D forward | 3 | 0.79 | 0.25 | 1.59 | 0.50 | – | – | 4.00 |" in text
    assert "| 2-D forward + backward | 1 | 3.00 | 3.00 | 6.00 | 6.00 | – | – | 4.00 |" in text
    assert "- 2-D forward: slow `n1 c4 i8 k3 p1` 0.25 (OpenVINO); slower `n1 c4 i8 k3 p1` ≈0.50 (OpenVINO)" in text
    assert "peak 1 GFLOP/s, copies L1 4, L2 2, DRAM 1 GB/s" in text
    assert "Losses: none." in readme_table([benchmark(row(2.0))])
    assert readme_table([]) == NO_RESULTS
    text = "depthwise2d n1 c4 i8 k3 p1 dt:bf16"
    halves = readme_table([benchmark(row(2.0, problem=text, f32=0.5), row(2.0, problem=text, f32=2.0))])
    assert "| bf16, f16 forward | 2 | 2.00 | 2.00 | 4.00 | 4.00 | 1.00 | 0.50 | 4.00 |" in halves
    scaled = replace(row(2.0), one_thread=(Measured("contiguous", timing(1.9), agrees=True),))
    made = readme_table([benchmark(scaled, row(2.0))])
    assert "| ours ÷ floor | one thread ÷ ours |" in made
    assert "| 4.00 | 1.90 |" in made
    flat = Row(
        "net", SMALL[0], FORWARD, "verified",
        ours=(Measured("NCT", timing(1.0), agrees=True), Measured("TNC", timing(2.0), agrees=True)),
        peers=(Measured("torch a NCT", timing(5.0), agrees=True), Measured("torch a TNC", timing(4.0), agrees=True)),
    )  # fmt: skip
    assert flat.layouts == {"NCT": 5.0, "TNC": 2.0}
    made = readme_table([benchmark(flat)])
    assert "| ours ÷ floor | both in NCT | both in TNC |" in made
    assert "| 1-D forward | 1 | 4.00 | 4.00 | 4.00 | 4.00 | – | – | – | 5.00 | 2.00 |" in made


def test_tables_for_machines():
    result = benchmark(row(2.0), row(0.5, direction=BOTH), row(2.0, problem="depthwise1d n1 c4 i8 k3 dt:f16", f32=2.0))
    lines = list(csv.DictReader(io.StringIO(as_csv(tables(result)))))
    assert [(line["direction"], line["ratio"], line["peer"]) for line in lines] == [
        ("forward", "2.0", "OpenVINO"),
        ("both", "0.5", "OpenVINO"),
        ("forward", "2.0", "OpenVINO"),
    ]
    assert lines[0]["ours_ms"] == "1000.0"
    assert lines[0]["peer_q3_ms"] == "2000.0"
    assert lines[2]["f32_ratio"] == "2.0"
    assert [table.title for table in tables(result)] == ["2-D, forward", "2-D, forward + backward", "bf16, f16, forward"]


def test_names_of_machines():
    assert slug(replace(machine(), cpu="AMD EPYC 7B13 (R)", capability="AVX2")) == "amd-epyc-7b13-r-avx2"
    assert slug(replace(machine(), cpu="AMD EPYC", capability="AVX2", threads=2)) == "amd-epyc-avx2-2-threads"
    assert slug() == slug(machine())


# the file


def test_a_result_comes_back_from_its_file(tmp_path):
    result = measured(TINY[1], "depthwise2d c3 i5 k3 p1 dt:f16", cold=True)
    file = tmp_path / "a.json"
    file.write_text(as_json(result))
    assert load(file) == result
    assert json.loads(file.read_text())["rows"][0]["ratio"] == result.rows[0].ratio


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema_version=0), "schema_version must be 1"),
        (lambda d: d.pop("peaks"), "the file must have the fields .*, got "),
        (lambda d: d.update(more=1), "the file must have the fields "),
        (lambda d: d["rows"][0].pop("ours"), r"rows\[0\] must have the fields "),
        (lambda d: d["rows"][0].update(ratio=9.0), r"rows\[0\].ratio must be 2.0 as the times say, got 9.0"),
        (lambda d: d["rows"][0].update(best_peer="torch"), r"rows\[0\].best_peer must be 'OpenVINO'"),
        (
            lambda d: d["rows"][0]["ours"][0]["hot"].update(median="fast"),
            r"rows\[0\].ours\[0\].hot.median must be float, got 'fast'",
        ),
        (lambda d: d["rows"][0]["floor"].update(seconds=True), r"rows\[0\].floor.seconds must be float, got True"),
        (lambda d: d["rows"][0].update(macs=1.5), r"rows\[0\].macs must be int, got 1.5"),
        (lambda d: d.update(rows={}), "rows must be a list"),
        (lambda d: d["settings"].update(directions=["up"]), "the direction must be forward or both, got up"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, change, words):
    data = json.loads(as_json(benchmark(row())))
    change(data)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"^bench: .*{words}.*a\.json'$"):
        load(file)


def test_files_that_are_no_results(tmp_path):
    with pytest.raises(ValueError, match="must be readable"):
        load(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="schema_version"):
        load(tmp_path / "a.json")


COMMITTED = [path for name in measurable() for path in committed(name, REPOSITORY)]


def test_the_committed_results_are_whole():
    """Every file is of a technique, can be read, and holds neither failures nor half a run."""
    scripts = ("g2p", "latency", "micrographs", "counters")  # of benchmarks/, each of which has its own test
    others = {path for path in (REPOSITORY / RESULTS).glob("*") if path.stem.partition("-")[0] in scripts}
    assert set(COMMITTED) == set((REPOSITORY / RESULTS).glob("*")) - others
    for path in COMMITTED:
        result = load(path)
        assert path.name == f"{result.settings.technique}-{slug(result.machine)}.json"
        assert result.rows
        assert not result.failed
        assert not result.interrupted


@pytest.mark.parametrize("name", measurable())
def test_the_readme_says_what_the_committed_results_say(tmp_path, name):
    copy = tmp_path / "README.md"
    shutil.copy(REPOSITORY / "README.md", copy)
    (tmp_path / RESULTS).mkdir(parents=True)
    for path in committed(name, REPOSITORY):
        shutil.copy(path, tmp_path / RESULTS)
    assert not update_readme(name, copy), f"omniconv bench {name} --readme README.md"


def test_the_readme_is_written_between_its_marks(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / RESULTS
    results.mkdir(parents=True)
    readme.write_text("a\n<!-- bench:depthwise -->\nold\n<!-- /bench:depthwise -->\nb\n")
    (results / "depthwise-here.json").write_text(as_json(benchmark(row(0.5))))
    assert update_readme("depthwise", readme)
    text = readme.read_text()
    assert text.startswith("a\n<!-- bench:depthwise -->\n")
    assert text.endswith("\n<!-- /bench:depthwise -->\nb\n")
    assert "old" not in text
    assert "| 2-D forward | 1 | 0.50 |" in text
    assert not update_readme("depthwise", readme)
    (results / "depthwise-here.json").write_text(as_json(benchmark(row(0.6))))
    assert update_readme("depthwise", readme)
    readme.write_text("no marks")
    with pytest.raises(ValueError, match=r"^bench: the README must have one '<!-- bench:depthwise -->'"):
        update_readme("depthwise", readme)
