"""Made-up results and quick runs for the tests of ``omniconv.bench``."""

from dataclasses import replace

from omniconv import techniques
from omniconv.analysis.peaks import Floor, Level, Peaks
from omniconv.bench.layer_lists import NetworkLayer
from omniconv.bench.peers import FORWARD, Absent
from omniconv.bench.results import Benchmark, Measured, Row, Settings
from omniconv.bench.runner import run
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES
from omniconv.timing import Timing, machine

PEAKS = Peaks(1e9, 5e8, (Level("L1", 1000, 4e9), Level("L2", 10_000, 2e9), Level("DRAM", None, 1e9)))
SMALL = ("lightweight1d n2 c6 i9 k3 psame h3", "dynamic1d n2 c6 i9 k3 psame h3")
TINY = ("depthwise1d c3 i9 k3 p1", "depthwise2d c3 i5x6 k3 p1", "depthwise3d c2 i3x4x3 k2 p1")


def layers(*texts):
    return [NetworkLayer("net", Problem.parse(text)) for text in texts]


def measured(*texts, **options):
    return run("depthwise", layers=layers(*(texts or TINY)), budget=0.01, **options)


def timing(median, width=0.0):
    return Timing(median, median - width, median + width, samples=5, repeats=1)


def row(ratio=2.0, *, problem="depthwise2d n1 c4 i8 k3 p1", direction=FORWARD, f32=None, noise=False, network="net"):
    """Ours takes a second, the best peer as many as the ratio says."""
    return Row(
        network,
        problem,
        direction,
        "verified",
        floor=Floor(0.25, "L2"),
        ours=(Measured("contiguous", timing(1.5), agrees=True), Measured("channels-last", timing(1.0, 0.1), agrees=True)),
        f32=() if f32 is None else (Measured("contiguous", timing(f32), agrees=True),),
        peers=(
            Measured("torch contiguous", timing(2 * ratio), agrees=True),
            Measured("OpenVINO", timing(ratio, 10.0 if noise else 0.0), agrees=True),
            Measured("ONNX Runtime", reason="NotImplemented: no"),
        ),
    )


def benchmark(*rows, **changes):
    absent = (Absent("OpenVINO", "openvino is not installed"),)
    made = Benchmark(Settings("depthwise"), rows, PEAKS, absent, ("A note.",), "native", (), None, machine())
    return replace(made, **changes)


def broken(monkeypatch, **changes):
    changed = tuple(replace(t, **changes) if t.name == "depthwise" else t for t in TECHNIQUES)
    monkeypatch.setattr(techniques, "TECHNIQUES", changed)
