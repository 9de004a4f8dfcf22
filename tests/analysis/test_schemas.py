"""What the commands write as JSON is what the published schemas say, and these are what the types say."""

import json
import shlex
from functools import partial

import jsonschema
import pytest
import schemas
from typer.testing import CliRunner

import omniconv.bench.compare as bench
from omniconv.analysis.schemas import names, schema
from omniconv.cli import app
from omniconv.timing import alternate

# kind -> a call that is over soon
CALLS = {
    "compare": "compare --channels 8 --size 6 --budget 0.01 --sequence {folder}/a.csv",
    "cost": "cost 'standard n1 c8-16 i6 k3 p1' --all --measure --budget 0.01",
    "diff": "diff {folder}/s.json {folder}/s.json --fail-if macs>+1%",
    "dilate": "dilate 'torch.nn:Conv2d(in_channels=3, out_channels=8, kernel_size=3, stride=2)' --input 1x3x9x9 --output-stride 1",
    "doctor": "doctor",
    "info": "info deformable",
    "list": "list",
    "receptive-field": "receptive-field 'transposed2d c2 i9 k4 s2 p1' --effective --samples 2",
    "summary": "summary 'torch.nn:Conv2d(in_channels=3, out_channels=8, kernel_size=3)' --input 1x3x8x8 --backward",
    "verify": "verify 'transposed2d c4-6 i5 k4 s2 p1'",
}
MEASURED_ELSEWHERE = {"bench", "bench-network", "doctor-network", "roofline"}  # its runs take seconds a layer


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("kind", schemas.RESULTS)
def test_the_published_schemas_are_those_of_the_types(kind):
    file = schemas.FOLDER / f"{kind}.json"
    assert file.exists(), "make schemas"
    assert json.loads(file.read_text()) == json.loads(schemas.schema(kind)), f"{file.name} is stale: make schemas"


def test_every_command_that_gives_a_result_has_a_schema():
    commands = {command.name for command in app.registered_commands} - {"schema"}
    assert set(schemas.RESULTS) == set(names()) == set(CALLS) | MEASURED_ELSEWHERE
    # a command may give results of several kinds
    assert commands == {kind if kind in commands else kind.partition("-")[0] for kind in schemas.RESULTS}


@pytest.mark.parametrize("kind", schemas.RESULTS)
def test_schemas_are_schemas(kind):
    jsonschema.Draft202012Validator.check_schema(schema(kind))
    assert schema(kind)["properties"]["kind"] == {"const": kind, "type": "string"}
    assert set(schema(kind)["required"]) >= {"schema_version", "kind"}
    assert schema(kind)["additionalProperties"] is False


@pytest.mark.parametrize("kind", CALLS)
def test_what_is_written_is_valid(kind, monkeypatch, tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    if kind == "diff":
        run(*shlex.split(CALLS["summary"]), "-o", tmp_path / "s.json")
    monkeypatch.setattr(bench, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))
    result = run(*shlex.split(CALLS[kind].format(folder=tmp_path)), "--format", "json", "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout, parse_constant=pytest.fail)
    validator = jsonschema.Draft202012Validator(schema(kind))
    assert [error.message for error in validator.iter_errors(data)] == []
    for wrong in (data | {"more": 1}, data | {"schema_version": 2}, data | {"kind": "other"}, {}, []):
        assert not validator.is_valid(wrong)
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


def test_the_command():
    assert run("schema").stdout.split() == list(names())
    for kind in names():
        assert json.loads(run("schema", kind).stdout) == schema(kind)
    result = run("schema", "nothing")
    assert result.exit_code == 2
    assert result.stderr.strip() == f"schema: the name must be one of {', '.join(names())}, got 'nothing'"
