"""The command line: what it prints, where it writes, how it fails."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import omniconv.bench.compare as bench
import omniconv.bench.report
from omniconv.analysis.catalogue import op_names
from omniconv.analysis.tables import Column, Table
from omniconv.cli import app
from omniconv.cli.output import draw
from omniconv.techniques import TECHNIQUES, find
from omniconv.timing import alternate

SMALL = ["compare", "--channels", "8", "--size", "6", "--budget", "0.01"]
NAMES = [t.name for t in TECHNIQUES]


@pytest.fixture(autouse=True)
def _one_short_sample(monkeypatch):
    monkeypatch.setattr(bench, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


def refused(*arguments):
    """The one line with which a call is refused."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert ", got " in lines[0]
    return lines[0]


@pytest.mark.parametrize("width", [80, 120])
def test_compare_reads_well(width):
    result = run(*SMALL, width=width)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in result.stdout
    for name in NAMES:
        assert any(line.startswith(f"{name} ") for line in lines)
    assert lines[-1].startswith(f"{len(NAMES)} techniques verified against their references")
    assert ("MB" in result.stdout) == (width == 120)


def test_compare_prints_only_the_result_on_stdout():
    data = json.loads(run(*SMALL, "--format", "json").stdout)
    assert {row["technique"] for row in data["rows"]} == set(NAMES)
    lines = list(csv.DictReader(io.StringIO(run(*SMALL, "--format", "csv").stdout)))
    assert {line["technique"] for line in lines} == set(NAMES)
    text = run(*SMALL, "--format", "md").stdout
    assert text.startswith("### Picture: chelsea.jpg")
    assert text.rstrip().splitlines()[-1].startswith(f"{len(NAMES)} techniques verified")


def test_compare_takes_all_its_options(tmp_path):
    Image.linear_gradient("L").save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("1\n2\n3\n")
    options = ["--kernel", 5, "--batch", 2, "--dtype", "f64", "--seed", 3, "--threads", 1, "--format", "json"]
    options += ["--backward", "--channels-last"]
    data = json.loads(run(*SMALL, tmp_path / "a.png", "--sequence", tmp_path / "a.csv", *options).stdout)
    settings = data["settings"]
    assert settings["kernel"] == 5
    assert settings["batch"] == 2
    assert settings["dtype"] == "f64"
    assert settings["backward"]
    assert settings["channels_last"]
    assert settings["seed"] == 3
    assert data["picture"] == "a.png"
    assert data["sequence"] == "a.csv"
    assert data["machine"]["threads"] == 1


@pytest.mark.parametrize("suffix", ["html", "json", "csv", "md", "HTML"])
def test_output_file(tmp_path, suffix):
    file = tmp_path / f"out.{suffix}"
    result = run(*SMALL, "-o", file)
    assert result.exit_code == 0, result.output
    assert "techniques verified" in result.stdout
    assert f"{file} written" in result.stderr.replace("\n", "")
    assert TECHNIQUES[-1].name in file.read_text()
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("arguments", [SMALL, ["list"], ["info", NAMES[0]], ["doctor"]], ids=lambda a: a[0])
def test_an_output_file_is_never_overwritten_without_force(tmp_path, arguments, monkeypatch):
    file = tmp_path / "out.json"
    file.write_text("mine")
    monkeypatch.setattr(bench, "read_picture", pytest.fail)  # before any work
    assert "must not exist" in refused(*arguments, "-o", file)
    assert file.read_text() == "mine"
    monkeypatch.undo()
    assert run(*arguments, "-o", file, "--force").exit_code == 0
    json.loads(file.read_text())


def test_output_files_that_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "read_picture", pytest.fail)
    assert "must end in .json, .csv, .md or .html" in refused(*SMALL, "-o", tmp_path / "a.txt")
    assert "must end in" in refused(*SMALL, "-o", tmp_path / "html")
    assert "must end in .json, .csv, .md or .html" in refused("list", "-o", tmp_path / "a.htm")
    assert "folder that exists" in refused(*SMALL, "-o", tmp_path / "none" / "a.html")
    (tmp_path / "dir.html").mkdir()
    assert "must be a file" in refused(*SMALL, "-o", tmp_path / "dir.html", "--force")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "must be writable" in refused(*SMALL, "-o", tmp_path / "a.html")


def test_a_failed_write_says_so_and_leaves_the_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = run("list", "-o", file, "--force")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert file.read_text() == "mine"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_report_without_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setattr(bench, "read_picture", pytest.fail)
    monkeypatch.setattr(omniconv.bench.report, "find_spec", lambda name: None if name == package else find_spec(name))
    sentence = refused(*SMALL, "-o", tmp_path / "a.html")
    assert sentence == f"compare: a report needs the extra 'plot' (pip install \"omniconv[plot]\"), got no {package}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "no/such.png"],
        ["compare", "/"],
        ["compare", "--sequence", "no/such.wav"],
        ["compare", "--channels", "0"],
        ["compare", "--kernel", "-1"],
        ["compare", "--size", "1000000"],
        ["compare", "--dtype", "f8"],
        ["compare", "--threads", "0"],
        ["compare", "--budget", "0"],
        ["compare", "--budget", "nan"],
        ["info", "no_such"],
    ],
)
def test_usage_errors_are_one_line(arguments):
    assert refused(*arguments).startswith(f"{arguments[0]}: ")


@pytest.mark.parametrize("arguments", [["compare", "--channels", "x"], ["compare", "--format", "xml"], ["nothing"], ["info"]])
def test_malformed_calls(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_failed_verification_is_exit_code_1(monkeypatch, tmp_path):
    def layer(problem):
        raise RuntimeError("no layer today")

    last = TECHNIQUES[-1]
    monkeypatch.setattr(bench, "TECHNIQUES", (*TECHNIQUES[:-1], replace(last, layer=layer)))
    result = run(*SMALL, "-o", tmp_path / "a.html")
    assert result.exit_code == 1
    row = next(line for line in result.stdout.splitlines() if line.startswith(f"{last.name} "))
    assert "FAILED" in row
    assert f"{len(TECHNIQUES) - 1} of {len(TECHNIQUES)} techniques" in result.stdout
    assert "FAILED" in (tmp_path / "a.html").read_text()


def test_an_interruption_prints_what_is_done(monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "alternate", stopped)
    result = run(*SMALL, "-o", tmp_path / "a.json")
    assert result.exit_code == 130
    assert result.stdout.splitlines()[-1].endswith("interrupted")
    assert json.loads((tmp_path / "a.json").read_text())["interrupted"] is True


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c(tmp_path):
    """The real signal to the real program."""
    ready = tmp_path / "ready"
    program = (
        "import sys, pathlib, omniconv.bench.compare as bench; from omniconv.cli import main; right = bench.alternate\n"
        f"def alternate(*a, **k): pathlib.Path({str(ready)!r}).touch(); return right(*a, rounds=(10**9, 10**9), **k)\n"
        "bench.alternate = alternate; sys.argv[0] = 'omniconv'; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *SMALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for _ in range(600):
            if ready.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:  # nothing is left running when the wait above is over
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert out.rstrip().endswith("interrupted")
    assert "Traceback" not in err


def test_list_is_the_taxonomy():
    result = run("list", width=200)
    assert result.exit_code == 0
    for technique in TECHNIQUES:
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"{technique.name} "))
        for words in (technique.sampling, technique.mixing, technique.weights):
            assert words in line
    assert [t["name"] for t in json.loads(run("list", "--format", "json").stdout)["techniques"]] == NAMES
    assert [row["technique"] for row in csv.DictReader(io.StringIO(run("list", "--format", "csv").stdout))] == NAMES
    assert run("list", "--format", "md").stdout.count("\n") == len(NAMES) + 2


@pytest.mark.parametrize("command", [["list"], ["doctor"], *(["info", name] for name in NAMES)], ids=" ".join)
@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(command, width):
    result = run(*command, width=width)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "…" not in result.stdout


@pytest.mark.parametrize("width", [80, 120])
def test_long_names_are_shortened_and_never_the_numbers(width):
    names, numbers = Column("layer", "layer", lambda row: row[0]), Column("macs", "MACs", lambda row: row[1], right=True)
    console = Console(width=width, file=io.StringIO())
    draw(Table("", [names, numbers], [("a" * 200, "1,234,567")]), console)
    (line,) = [line for line in console.file.getvalue().splitlines() if "1,234,567" in line]
    assert len(line) <= width
    assert "…" in line


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_info(technique):
    text = run("info", technique.name, width=400).stdout
    for words in (technique.formula, technique.when, *technique.traps, technique.paper, technique.summary):
        assert words in text
    data = json.loads(run("info", technique.name, "--format", "json").stdout)
    assert data["cost"]["params"] >= 1
    assert data["entry"]["name"] == technique.name
    assert run("info", technique.name, "--format", "md").stdout.startswith(f"### {technique.title}")


def test_info_names_the_techniques():
    assert ", ".join(NAMES) in refused("info", "convolution")


def test_doctor():
    data = json.loads(run("doctor", "--format", "json").stdout)
    assert {package["name"] for package in data["packages"]} >= {"omniconv", "torch", "numpy"}
    assert [path["technique"] for path in data["paths"]] == NAMES
    assert [path["ops"] for path in data["paths"]] == [list(op_names(t)) for t in TECHNIQUES]
    for path in data["paths"]:
        assert path["path"] == ("native" if find(path["technique"]).engine else "composite")
        assert path["reason"]
        assert path["description"]


@pytest.mark.parametrize(("width", "heads"), [(39, "name second first"), (38, "name first"), (30, "name first"), (29, "name")])
def test_columns_that_do_not_fit_are_left_out_the_neediest_first(width, heads):
    columns = (
        Column("name", "name", lambda row: row, folds=True),
        Column("second", "second", lambda row: 2, needs=2),
        Column("first", "first", lambda row: 1, needs=1),
    )
    console = Console(width=width, file=io.StringIO())
    draw(Table("", columns, ["a name of more than 22 characters"]), console)
    lines = console.file.getvalue().splitlines()
    assert " ".join(lines[0].split()) == heads
    assert max(map(len, lines)) <= width


def test_bars_are_drawn_in_eighths():
    column = Column("share", "share", lambda row: row, lambda row: f"{row:.0%}", bar=lambda row: row)
    console = Console(width=80, file=io.StringIO())
    draw(Table("", (column,), [1.0, 0.5, 0.01, 0.0, 7.0]), console)
    assert [line.split()[0] for line in console.file.getvalue().splitlines()[2:]] == ["████", "██", "▏", "0%", "████"]


def test_version_and_help():
    assert run("--version").stdout.startswith("omniconv 0.")
    text = run("--help").stdout
    for command in ("compare", "list", "info", "doctor"):
        assert command in text
        assert run(command, "--help").exit_code == 0


def test_a_terminal_without_the_signs():
    """Where the encoding lacks ×, a ? stands in its place."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-c", "from omniconv.cli import main; main()", "info", NAMES[0]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout
