"""Latency of whole networks: ours, the same network with torch.nn's convolutions, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/latency.py run              # make latency does it pinned, in the peers' environment, and renews the README
    python benchmarks/latency.py run omniconv.models:drn_c_26 --input 1x3x224x224
    python benchmarks/latency.py table benchmarks/results/latency-*.json

One image, float32, in eval mode. Norms have random statistics, so that nobody can leave them out. Every way is timed only if its
answer is that of the torch.nn network in float64 within BOUND of the 1-norm; all are timed in turns in one process. "frozen" is
Inductor told that weights never change (it folds the norms, as the two runtimes do); eager ways compute them.
"""

import copy
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from trials import save, size_of

from omniconv.analysis import cost
from omniconv.analysis.layers import copied, formatted
from omniconv.analysis.targets import load
from omniconv.bench.peers import Absent, Way, lacking, onnxruntime_call, openvino_call, reason_of, runtime_way
from omniconv.bench.results import slug
from omniconv.bench.runner import PACKAGES, commit, package
from omniconv.bench.speed import fill_readme
from omniconv.ops.grid import GridLayer
from omniconv.ops.layer import Layer
from omniconv.timing import WITHIN_NOISE, Timing, contest, machine

# what `run` measures; a further network is a line
NETWORKS: dict[str, tuple[str, ...]] = {
    "omniconv.models:drn_d_22": ("1x3x224x224", "1x3x512x512"),
}
BOUND = 1e-4  # of the 1-norm; float32 differs by 1e-6, Winograd's sums by 1e-5, a network without one of its norms by 1
BASELINE = "torch contiguous"
RESULTS = Path("benchmarks/results")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


# the networks


def plain(model: nn.Module) -> nn.Module:
    """A copy with torch.nn's convolutions in the place of ours; the state dict is the same.

    Raises:
        ValueError: A layer has pads or an activation that torch.nn's lacks.

    >>> from omniconv.nn import DilatedConv2d
    >>> plain(nn.Sequential(DilatedConv2d(2, 4, 3)))
    Sequential(
      (0): Conv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2))
    )
    """
    made = copy.deepcopy(model)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, Layer):
            made.set_submodule(name, _torch_layer(name, layer))
    return made


def _torch_layer(name: str, layer: Layer) -> nn.Module:
    fits = isinstance(layer, GridLayer) and layer.activation is None and layer.padding != "same_minimal"
    pads = layer._reversed_padding_repeated_twice if fits else ()
    if not fits or pads[::2] != pads[1::2]:
        raise ValueError(f"latency: every layer must be a convolution that torch.nn has, got {name}: {layer}")
    made = _TORCH[layer.rank](
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, tuple(reversed(pads[::2])), layer.dilation,
        layer.groups, layer.bias is not None, layer.padding_mode, layer.weight.device, layer.weight.dtype,
    )  # fmt: skip
    made.load_state_dict(layer.state_dict())
    return made.train(layer.training)


_TORCH = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def unsettle(model: nn.Module, seed: int) -> None:
    """Gives every norm statistics, scales and shifts of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for x in (norm.running_mean, norm.bias):
                    x.uniform_(-0.2, 0.2, generator=generator)
                for x in (norm.running_var, norm.weight):
                    x.uniform_(0.5, 1.5, generator=generator)


def as_onnx(model: nn.Module, x: Tensor) -> bytes:
    """A network as an ONNX model of one input and one output, its weights inside."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None  # as it is where a file is written
    return bytes(program.model_proto.SerializeToString())


# who is timed


def _eager(who: str, model: nn.Module, x: Tensor, last: bool) -> Way:
    call = partial(copied(model, last), formatted(x, last))
    return Way(f"{who} channels-last" if last else f"{who} contiguous", call, lambda: (call(),))


def _compiled(name: str, model: nn.Module, x: Tensor, frozen: bool) -> Way:
    """As Inductor makes it; it chooses the layouts itself."""
    call = partial(torch.compile(copied(model, False), dynamic=False, options={"freezing": frozen}), x)
    return Way(name, call, lambda: (call(),))


def makers(ours: nn.Module, theirs: nn.Module, x: Tensor, y: Tensor, threads: int, compiled: bool) -> dict[str, Any]:
    """By name what makes a way ready, or why it is absent; ``y`` has the shape of the answer."""
    torch._dynamo.reset()  # here alone: it forgets what was compiled before
    found: dict[str, Any] = {}
    for who, model in (("torch", theirs), ("omniconv", ours)):
        for last in (False, True):
            found[f"{who} {'channels-last' if last else 'contiguous'}"] = partial(_eager, who, model, x, last)
    for name, model, frozen in (
        ("torch.compile", theirs, False), ("torch.compile frozen", theirs, True), ("omniconv, torch.compile frozen", ours, True)
    ):  # fmt: skip
        found[name] = (
            partial(_compiled, name, model, x, frozen) if compiled else Absent(name, "it was not asked for (--no-compile)")
        )
    for name, make, needs in (("ONNX Runtime", onnxruntime_call, "onnxruntime"), ("OpenVINO", openvino_call, "openvino")):
        found[name] = lacking(name, ("onnx", "onnxscript", needs)) or (
            lambda name=name, make=make: runtime_way(name, make, as_onnx(theirs, x), x, torch.zeros_like(y), threads)
        )
    return found


# the measurement


@dataclass(frozen=True)
class Timed:
    """One way: seconds of a call, how many times as fast as BASELINE it is, and how far its answer is away in the 1-norm."""

    name: str
    timing: Timing
    error: float
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Case:
    """A network on one input. ``away`` are the ways that were not timed, and why."""

    target: str
    name: str
    input: str
    parameters: int
    macs: int
    ways: tuple[Timed, ...]
    away: tuple[Absent, ...]


def distance(answer: Tensor, expected: Tensor) -> float:
    """Of the 1-norm of what is expected.

    >>> distance(torch.tensor([1.0, 3.5]), torch.tensor([1.0, 3.0]))
    0.125
    """
    return float((answer.double() - expected.double()).abs().sum() / expected.double().abs().sum())


def measure(
    target: str, input: str, threads: int, budget: float, compiled: bool, cases: int, say: Callable[[str], None]
) -> Case:  # fmt: skip
    """Every way of a network on one input, verified, then timed in turns.

    Args:
        target: As :func:`omniconv.analysis.targets.load` takes it.
        input: The one example input, as there.
        threads: Of all.
        budget: Seconds of the rounds.
        compiled: Whether torch.compile takes part.
        cases: How many are measured in the run, which every verdict answers for.
        say: Told what is at work.

    Raises:
        ValueError: The network does not give one tensor, or has a layer that torch.nn lacks.
    """
    torch.manual_seed(0)
    found = load(target, input=[input], caller="latency")
    ours, (args, _) = found.network(), found.example_inputs()
    unsettle(ours, 0)
    theirs, (x, *others) = plain(ours), args
    say("the answer in float64")
    expected = copy.deepcopy(theirs).double()(x.double())
    if others or not isinstance(expected, Tensor):
        raise ValueError(f"latency: the network must make one tensor of one, got {target} on {input}")
    ready: dict[str, Way] = {}
    errors, away = {}, []
    made = makers(ours, theirs, x, expected.float(), threads, compiled)
    for name, way in _verified(made, expected, say):
        if isinstance(way, Absent):
            away.append(way)
        else:
            ready[name], errors[name] = way
    say("in turns")
    fought = contest({n: w.call for n, w in ready.items()}, comparisons=cases * (len(ready) - 1), budget=budget)
    ways = []
    for name, timing in fought.timings.items():
        beside = fought.versus.get(name)
        said = () if beside is None else (beside.ratio, beside.low, beside.high, beside.verdict)
        ways.append(Timed(name, timing, errors[name], *said))
    counted = cost(theirs, x)
    name = target.rpartition(":")[2] or target
    return Case(target, name, input, size_of(ours), counted.macs_dense, tuple(ways), tuple(away))


def _verified(
    made: dict[str, Any], expected: Tensor, say: Callable[[str], None]
) -> Iterator[tuple[str, Absent | tuple[Way, float]]]:  # fmt: skip
    """Every way with its error, or why it is not timed."""
    for name, make in made.items():
        if isinstance(make, Absent):
            yield name, make
            continue
        say(name)
        try:
            way = make()
            error = distance(way.answer()[0], expected)
        except Exception as problem:  # whatever a package raises only means that it cannot be compared with
            if name.startswith("omniconv"):
                raise
            yield name, Absent(name, reason_of(problem))
            continue
        if error <= BOUND:
            yield name, (way, error)
        else:
            yield name, Absent(name, f"its answer is {error:.1e} of the 1-norm away, the bound is {BOUND:.0e}")


# what is reported


def table(report: dict[str, Any]) -> str:
    """The result as Markdown: a table a network, a pair of columns an input."""
    state = report["machine"]
    versions = ", ".join(f"{p['name']} {p['version']}" for p in report["packages"] if p["version"] and p["name"] != "omniconv")
    lines = [f"{state['cpu']} ({state['capability']}), {state['threads']} thread{'s' * (state['threads'] > 1)}; {versions}."]
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in report["cases"]:
        cases.setdefault(case["target"], []).append(case)
    for group in cases.values():
        sizes = [case["input"].split("x", 2)[2].replace("x", "×") for case in group]
        heads = "".join(f" {size}: ms | × |" for size in sizes)
        work = ", ".join(f"{case['macs'] / 1e9:.1f} at {size}" for case, size in zip(group, sizes, strict=True))
        lines += [
            "", f"`{group[0]['name']}`: {group[0]['parameters'] / 1e6:.1f} M parameters; G MACs: {work}.", "",
            f"| way |{heads}", "|---|" + "---:|---:|" * len(group),
        ]  # fmt: skip
        for name in dict.fromkeys(way["name"] for case in group for way in case["ways"]):
            cells = "".join(_cells(next((w for w in case["ways"] if w["name"] == name), None)) for case in group)
            lines.append(f"| {name} |{cells}")
        absent = {way["name"]: way["reason"] for case in group for way in case["away"]}
        lines += [f"\nNot timed: {'; '.join(f'{name} ({reason})' for name, reason in absent.items())}."] if absent else []
    return "\n".join(lines)


def _cells(way: dict[str, Any] | None) -> str:
    if way is None:
        return " – | – |"
    timing = way["timing"]
    median, low, high = (1e3 * timing[key] for key in ("median", "low", "high"))
    ratio = "1" if way["ratio"] is None else f"{'≈' if way['verdict'] == WITHIN_NOISE else ''}{way['ratio']:.2f}"
    return f" {median:.1f} ({low:.1f}–{high:.1f}) | {ratio} |"


@app.command()
def run(
    target: Annotated[str | None, typer.Argument(help="A network of one tensor; by default those of the README.")] = None,
    input: Annotated[list[str] | None, typer.Option(help="Its input, as 1x3x224x224; several are measured in turn.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of everybody.")] = 1,
    budget: Annotated[float, typer.Option(min=0.01, help="Seconds of the rounds of one input.")] = 30.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compare with torch.compile.")] = True,
    report: Annotated[Path | None, typer.Option(help="Where the JSON goes; by default benchmarks/results.")] = None,
) -> None:
    """Verify and time every way of every network."""
    torch.set_num_threads(threads)
    if target is not None and not input:
        raise typer.BadParameter(f"--input must be given beside a network, got {target} alone")
    asked = NETWORKS if target is None else {target: tuple(input or ())}
    cases = [(name, size) for name, sizes in asked.items() for size in sizes]
    state, err = machine(), Console(stderr=True)
    with torch.no_grad(), err.status("") as status:
        measured = [
            measure(
                name, size, threads, budget, compiled, len(cases), lambda what, at=f"{name} {size}": status.update(f"{at}: {what}")
            )
            for name, size in cases
        ]  # fmt: skip
    result = {
        "schema_version": 1,
        "command": shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
        "settings": {"threads": threads, "budget": budget, "compiled": compiled, "bound": BOUND, "baseline": BASELINE, "seed": 0},
        "packages": [asdict(package(name)) for name in (*PACKAGES, "onnxscript")],
        "commit": commit(),
        "machine": asdict(state),
        "cases": [asdict(case) for case in measured],
    }
    save(result, report or RESULTS / f"latency-{slug()}.json")
    print(table(result))
    wrong = [f"{case.name} {way.name}: {way.reason}" for case in measured for way in case.away if _is_wrong(way)]
    if wrong:
        err.print("; ".join(wrong), style="bold red")
        raise typer.Exit(1)


def _is_wrong(way: Absent) -> bool:
    """Whether it is ours and gave another answer."""
    return way.name.startswith("omniconv") and way.reason.startswith("its answer")


@app.command("table")
def show(
    file: Annotated[Path, typer.Argument(help="The JSON of a run.")],
    readme: Annotated[Path | None, typer.Option(help="Put it between the marks of this README.")] = None,
) -> None:
    """Print the table of a result, or renew that of the README."""
    made = table(json.loads(file.read_text(encoding="utf-8")))
    if readme is None:
        print(made)
    else:
        fill_readme("latency", readme, lambda: made)


if __name__ == "__main__":
    app()
