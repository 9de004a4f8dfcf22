"""How other counters of multiply-accumulates do, and ours, case by case: ``python benchmarks/counters.py run``.

The truth of every case is written down as products of whole numbers, from the definitions alone; nothing here asks our own
formulas for it. Every tool is used as its own documentation says, in a process of its own, on a fresh copy of every model:

    ours             omniconv.analysis.cost(model, *inputs).macs_dense; backward=True adds .backward.macs_dense
    torchinfo        summary(model, input_data=…).total_mult_adds
    fvcore           FlopCountAnalysis(model, inputs).total(); its "flops" are multiply-accumulates
    thop             profile(model, inputs)[0]
    ptflops          get_model_complexity_info(…, backend="aten")[0], its default backend; multiply-accumulates
    FlopCounterMode  torch.utils.flop_counter, get_total_flops() / 2; it counts two flops a multiply-accumulate
    torch-scan       crawl_module(…)["totals"]["macs"]; where that is not complete, what is known of it
    torchlens        trace(…).total_macs_forward; with the backward pass total_flops / 2, since it has no such number for that
    calflops         calculate_flops(…)[1], multiply-accumulates

An answer within 2 % of the truth is right, one up to a tenth above is shown as that: some tools count biases, normalisation and
activations too. What a tool says it does not know is no wrong answer, and is told apart.
"""

import contextlib
import importlib
import importlib.metadata
import io
import json
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

Terms = list[tuple[int, ...]]
RIGHT = 0.02  # of the truth
MORE = 1.1  # times the truth: what normalisation and activations come to where they are counted too

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Case:
    """A model with its inputs, and its multiply-accumulates as a sum of products."""

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    terms: Terms
    backward: bool = False

    @property
    def truth(self) -> int:
        """Every tap counts, over the whole batch."""
        return sum(map(prod, self.terms))


class Call(nn.Module):
    """A function of its input and of parameters, as a module."""

    def __init__(self, function: Callable[..., Tensor], **parameters: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.names = function, tuple(parameters)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The result."""
        return self.function(*inputs, *(getattr(self, name) for name in self.names))


class Deformable(nn.Module):
    """DCNv2 as everyone writes it with torchvision: a convolution makes offsets and mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        import torchvision

        self.offset = nn.Conv2d(channels, 27, 3, padding=1, bias=False)
        self.main = torchvision.ops.DeformConv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        offset, mask = self.offset(x).split([18, 9], 1)
        return self.main(x, offset, mask.sigmoid())


class Generated(nn.Module):
    """A convolution whose weight another layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(8, 16 * 16 * 9, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The result."""
        return F.conv2d(x, self.make(z).view(16, 16, 3, 3), padding=1)


class Lightweight(nn.Module):
    """One softmaxed kernel a head (Wu et al. 2019), as a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 31))

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        weight = self.weight.softmax(-1).repeat_interleave(512 // 16, 0).unsqueeze(1)
        return F.conv1d(x, weight, padding=15, groups=512)


class Dynamic(nn.Module):
    """A kernel for every position and head, made from the position (Wu et al. 2019), by unfolding."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(256, 8 * 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, C)
        """The result."""
        n, t, c = x.shape
        kernels = self.make(x).view(n * t * 8, 7, 1).softmax(1)
        windows = F.pad(x, (0, 0, 3, 3)).unfold(1, 7, 1).reshape(n * t * 8, c // 8, 7)
        return torch.bmm(windows, kernels).view(n, t, c)


class Conditional(nn.Module):
    """CondConv: every sample mixes a kernel of its own from four, then one grouped convolution over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(32, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, 32 * 32 * 9))

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        n, c, h, w = x.shape
        weight = torch.matmul(self.route(x.mean((2, 3))).sigmoid(), self.experts)
        return F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * c, c, 3, 3), padding=1, groups=n).view(n, c, h, w)


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        return self.conv(self.conv(x).relu())


class Branches(nn.Module):
    """Parallel branches, joined: an Inception block without its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(192, 64, 1, bias=False)
        self.three = nn.Sequential(nn.Conv2d(192, 96, 1, bias=False), nn.Conv2d(96, 128, 3, padding=1, bias=False))
        self.five = nn.Sequential(nn.Conv2d(192, 16, 1, bias=False), nn.Conv2d(16, 32, 5, padding=2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        return torch.cat([self.one(x), self.three(x), self.five(x)], 1)


class Attention(nn.Module):
    """torch's own self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(256, 8, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        return self.attention(x, x, x, need_weights=False)[0]


def _one(layer: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    return lambda: (layer(), (torch.randn(shape),))


def _conv(kind: Any, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*arguments, **options, bias=False)


def _mix(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, w)


def _network(name: str) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        import torchvision

        return getattr(torchvision.models, name)(weights=None), (torch.randn(1, 3, 224, 224),)

    return build


def resnet50() -> Terms:
    """He et al. 2016, table 1, with the stride in the 3×3 as torchvision has it."""
    terms, channels, size = [(112, 112, 3, 64, 7, 7)], 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            before = size
            if stage and not block:
                size //= 2
            terms += [(before, before, channels, width), (size, size, width, width, 3, 3), (size, size, width, 4 * width)]
            if not block:
                terms.append((size, size, channels, 4 * width))
            channels = 4 * width
    return [*terms, (2048, 1000)]


def mobilenet_v2() -> Terms:
    """Sandler et al. 2018, table 2."""
    terms, channels, size = [(112, 112, 3, 32, 3, 3)], 32, 112
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, width, blocks, stride in table:
        for block in range(blocks):
            inner = expansion * channels
            if expansion > 1:
                terms.append((size, size, channels, inner))
            size //= stride if not block else 1
            terms += [(size, size, inner, 3, 3), (size, size, inner, width)]
            channels = width
    return [*terms, (7, 7, 320, 1280), (1280, 1000)]


def unet() -> Terms:
    """Two levels down and up, as :func:`_unet` builds it."""
    down = [(64, 64, 3, 16, 3, 3), (32, 32, 16, 32, 3, 3), (16, 16, 32, 64, 3, 3)]
    up = [(16, 16, 64, 32, 2, 2), (32, 32, 64, 32, 3, 3), (32, 32, 32, 16, 2, 2), (64, 64, 32, 16, 3, 3)]
    return [*down, *up]


class UNet(nn.Module):
    """Two levels down and up with k2 s2 transposed convolutions and skips."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, c // 2, 2, 2, bias=False) for c in (64, 32))
        self.join = nn.ModuleList(nn.Conv2d(c, c // 2, 3, padding=1, bias=False) for c in (64, 32))

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.down[2](F.max_pool2d(second, 2))
        x = self.join[0](torch.cat([self.up[0](x), second], 1))
        return self.join[1](torch.cat([self.up[1](x), first], 1))


CASES = (
    Case("standard 3×3", _one(_conv(nn.Conv2d, 64, 128, 3, padding=1), 1, 64, 56, 56), [(56, 56, 64, 128, 3, 3)]),
    Case("strided 7×7, padded", _one(_conv(nn.Conv2d, 3, 64, 7, 2, 3), 1, 3, 224, 224), [(112, 112, 3, 64, 7, 7)]),
    Case("dilated, d4", _one(_conv(nn.Conv2d, 64, 64, 3, padding=4, dilation=4), 1, 64, 28, 28), [(28, 28, 64, 64, 3, 3)]),
    Case("batch of 4", _one(_conv(nn.Conv2d, 16, 16, 3, padding=1), 4, 16, 20, 20), [(4, 20, 20, 16, 16, 3, 3)]),
    Case(
        "circular padding",
        _one(_conv(nn.Conv2d, 16, 32, 3, padding=1, padding_mode="circular"), 1, 16, 20, 20),
        [(20, 20, 16, 32, 3, 3)],
    ),
    Case("1-D", _one(_conv(nn.Conv1d, 256, 256, 5, padding=2), 1, 256, 400), [(400, 256, 256, 5)]),
    Case("3-D", _one(_conv(nn.Conv3d, 16, 32, 3, padding=1), 1, 16, 8, 28, 28), [(8, 28, 28, 16, 32, 3, 3, 3)]),
    Case("transposed k4 s2 p1", _one(_conv(nn.ConvTranspose2d, 128, 64, 4, 2, 1), 1, 128, 28, 28), [(28, 28, 128, 64, 4, 4)]),
    Case(
        "transposed k3 s2, output padding",
        _one(_conv(nn.ConvTranspose2d, 64, 32, 3, 2, 1, 1), 1, 64, 28, 28),
        [(28, 28, 64, 32, 3, 3)],
    ),
    Case(
        "transposed, 8 groups",
        _one(_conv(nn.ConvTranspose2d, 64, 64, 4, 2, 1, groups=8), 1, 64, 28, 28),
        [(28, 28, 64, 64 // 8, 4, 4)],
    ),
    Case("transposed 1-D k16 s8", _one(_conv(nn.ConvTranspose1d, 256, 128, 16, 8, 4), 1, 256, 64), [(64, 256, 128, 16)]),
    Case("depthwise", _one(_conv(nn.Conv2d, 128, 128, 3, padding=1, groups=128), 1, 128, 56, 56), [(56, 56, 128, 3, 3)]),
    Case("grouped, 32", _one(_conv(nn.Conv2d, 128, 128, 3, padding=1, groups=32), 1, 128, 56, 56), [(56, 56, 128, 4, 3, 3)]),
    Case("pointwise", _one(_conv(nn.Conv2d, 64, 256, 1), 1, 64, 56, 56), [(56, 56, 64, 256)]),
    Case(
        "separable 7×1, 1×7",
        _one(
            lambda: nn.Sequential(
                nn.Conv2d(64, 64, (7, 1), padding=(3, 0), bias=False), nn.Conv2d(64, 64, (1, 7), padding=(0, 3), bias=False)
            ),
            1, 64, 28, 28,
        ),
        [(28, 28, 64, 64, 7), (28, 28, 64, 64, 7)],
    ),
    Case(
        "depthwise-separable",
        _one(
            lambda: nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False), nn.Conv2d(64, 128, 1, bias=False)),
            1, 64, 56, 56,
        ),
        [(28, 28, 64, 3, 3), (28, 28, 64, 128)],
    ),
    Case(
        "deformable v2 (torchvision)",
        _one(lambda: Deformable(64), 1, 64, 28, 28),
        [(28, 28, 64, 27, 3, 3), (28, 28, 64, 64, 3, 3)],
    ),
    Case(
        "F.conv2d, generated weight",
        lambda: (Generated(), (torch.randn(1, 16, 32, 32), torch.randn(8))),
        [(8, 16, 16, 3, 3), (32, 32, 16, 16, 3, 3)],
    ),
    Case(
        "F.conv_transpose2d",
        _one(lambda: Call(lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), weight=(32, 16, 4, 4)), 1, 32, 16, 16),
        [(16, 16, 32, 16, 4, 4)],
    ),
    Case("lightweight 1-D", _one(Lightweight, 2, 512, 100), [(2, 100, 512, 31)]),
    Case("dynamic 1-D", _one(Dynamic, 2, 100, 256), [(2, 100, 256, 8, 7), (2, 100, 256, 7)]),
    Case("dynamic 2-D (CondConv)", _one(Conditional, 4, 32, 14, 14), [(4, 32, 4), (4, 4, 32, 32, 3, 3), (4, 14, 14, 32, 32, 3, 3)]),
    Case("one layer called twice", _one(Twice, 1, 32, 28, 28), [(28, 28, 32, 32, 3, 3)] * 2),
    Case(
        "parallel branches",
        _one(Branches, 1, 192, 28, 28),
        [(28, 28, 192, 64), (28, 28, 192, 96), (28, 28, 96, 128, 3, 3), (28, 28, 192, 16), (28, 28, 16, 32, 5, 5)],
    ),
    Case("linear on a sequence", _one(lambda: nn.Linear(384, 1536, bias=False), 8, 196, 384), [(8, 196, 384, 1536)]),
    Case("functional matmul", _one(lambda: Call(lambda x, w: x @ w, weight=(256, 512)), 4, 50, 256), [(4, 50, 256, 512)]),
    Case("einsum", _one(lambda: Call(_mix, w=(64, 32)), 2, 32, 14, 14), [(2, 14, 14, 32, 64)]),
    Case("attention (nn.Multihead…)", _one(Attention, 2, 64, 256), [(4, 2, 64, 256, 256), (2, 2, 64, 64, 256)]),
    Case(
        "scaled_dot_product_attention",
        lambda: (Call(F.scaled_dot_product_attention), tuple(torch.randn(2, 8, 64, 32) for _ in range(3))),
        [(2, 2, 8, 64, 64, 32)],
    ),
    Case("U-Net", _one(UNet, 1, 3, 64, 64), unet()),
    Case("ResNet-50", _network("resnet50"), resnet50()),
    Case("MobileNetV2", _network("mobilenet_v2"), mobilenet_v2()),
    Case(
        "forward + backward, standard",
        _one(_conv(nn.Conv2d, 32, 32, 3, padding=1), 1, 32, 28, 28), [(3, 28, 28, 32, 32, 3, 3)], backward=True,
    ),
    Case(
        "forward + backward, 8 groups",
        _one(_conv(nn.Conv2d, 32, 32, 3, padding=1, groups=8), 1, 32, 28, 28), [(3, 28, 28, 32, 4, 3, 3)], backward=True,
    ),
    Case(
        "forward + backward, depthwise",
        _one(_conv(nn.Conv2d, 32, 32, 3, padding=1, groups=32), 1, 32, 28, 28), [(3, 28, 28, 32, 3, 3)], backward=True,
    ),
    Case(
        "forward + backward, transposed",
        _one(_conv(nn.ConvTranspose2d, 32, 16, 4, 2, 1), 1, 32, 14, 14), [(3, 14, 14, 32, 16, 4, 4)], backward=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a tool said of a case: ``known`` is false where it says itself that something is missing."""

    macs: float | None
    known: bool = True
    error: str | None = None


def _ours(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    from omniconv.analysis import cost

    found = cost(model, *inputs, backward=backward)
    total = found.macs_dense + (found.backward.macs_dense if backward and found.backward else 0)
    return Answer(total, found.status["macs_dense"] == "exact")


def _torchinfo(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    import torchinfo

    return Answer(torchinfo.summary(model, input_data=inputs, verbose=0).total_mult_adds)


def _fvcore(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    from fvcore.nn import FlopCountAnalysis

    found = FlopCountAnalysis(model, inputs)
    total = found.total()
    products = ("conv", "matmul", "mm", "attention", "einsum", "linear")
    return Answer(total, not any(part in op for op in found.unsupported_ops() for part in products))


def _thop(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    import thop

    return Answer(thop.profile(model, inputs=inputs, verbose=False)[0])


def _ptflops(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    from ptflops import get_model_complexity_info

    class Spread(nn.Module):
        """Its input constructor gives keyword arguments; ours are positional."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
            """The result."""
            return self.model(*inputs)

    found = get_model_complexity_info(
        Spread(), (1,), input_constructor=lambda _: {"inputs": inputs}, as_strings=False, print_per_layer_stat=False, backend="aten"
    )
    return Answer(found[0])


def _flop_counter(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        y = model(*inputs)
        if backward:
            y.sum().backward()
    return Answer(counter.get_total_flops() / 2)


def _torch_scan(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    from torchscan import crawl_module

    found = crawl_module(model, args=inputs)["totals"]["macs"]
    return Answer(found["value"] if found["status"] == "complete" else found["known_value"], found["status"] == "complete")


def _torchlens(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    import torchlens

    trace = torchlens.trace(model, *inputs) if len(inputs) == 1 else torchlens.trace(model, list(inputs))
    known = not trace.unknown_flop_ops and not trace.macs_unknown_split_ops
    if backward:
        return Answer(int(trace.total_flops) / 2, known)
    return Answer(int(trace.total_macs_forward), known)


def _calflops(model: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Answer:
    from calflops import calculate_flops

    return Answer(
        calculate_flops(model=model, args=list(inputs), output_as_string=False, print_results=False, print_detailed=False)[1]
    )


@dataclass(frozen=True)
class Tool:
    """A counter: its package, the module that has it, how it is asked, and whether it counts backward passes."""

    package: str
    module: str
    ask: Callable[[nn.Module, tuple[Tensor, ...], bool], Answer]
    backward: bool = False
    forks: bool = True  # torchlens refuses to work in a forked process


TOOLS = {
    "omniconv": Tool("omniconv", "omniconv.analysis", _ours, backward=True),
    "torchinfo": Tool("torchinfo", "torchinfo", _torchinfo),
    "fvcore": Tool("fvcore", "fvcore.nn", _fvcore),
    "thop": Tool("thop", "thop", _thop),
    "ptflops": Tool("ptflops", "ptflops", _ptflops),
    "FlopCounterMode": Tool("torch", "torch.utils.flop_counter", _flop_counter, backward=True),
    "torch-scan": Tool("torchscan", "torchscan", _torch_scan),
    "torchlens": Tool("torchlens", "torchlens", _torchlens, backward=True, forks=False),
    "calflops": Tool("calflops", "calflops", _calflops),
}


def verdict(case: Case, answer: Answer) -> str:
    """What an answer is worth.

    "right" within 2 %; "+4 %" up to a tenth above; "zero" or the factor to the truth, such as "×4", where it is wrong; "unknown"
    where the tool says itself that something is missing; "crash".
    """
    if answer.error is not None:
        return "crash"
    if answer.macs is None:
        return "unknown"
    factor = answer.macs / case.truth
    if abs(factor - 1) <= RIGHT:
        return "right"
    if not answer.known:
        return "unknown"
    if 1 < factor < MORE:
        return f"+{100 * (factor - 1):.0f} %"
    return "zero" if factor < 0.0005 else f"×{factor:.2g}"


def asked(tool: str, case: Case) -> Answer:
    """What a tool says of a fresh copy of the model, in torch's default mode; the model is in evaluation mode unless trained."""
    torch.manual_seed(0)
    model, inputs = case.build()
    model.train(case.backward)
    if case.backward:
        inputs = tuple(x.requires_grad_() for x in inputs)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return TOOLS[tool].ask(model, inputs, case.backward)
        except Exception as error:
            return Answer(None, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _into(pipe: Any, tool: str, case: Case) -> None:
    pipe.send(asked(tool, case))


@app.command()
def one(tool: str) -> None:
    """Asks one tool all cases, each in a fork of this process where it can: some leave torch patched. JSON on standard output."""
    for module in ("torchvision", "torch._subclasses.fake_tensor", "torch._decomp", TOOLS[tool].module):
        importlib.import_module(module)  # once, rather than in every fork
    answers: dict[str, Any] = {}
    fork = multiprocessing.get_context("fork")
    for case in CASES:
        if case.backward and not TOOLS[tool].backward:
            answers[case.name] = None
            continue
        if not TOOLS[tool].forks:
            answers[case.name] = asdict(asked(tool, case))
            continue
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_into, args=(theirs, tool, case))
        child.start()
        answers[case.name] = asdict(ours.recv())
        child.join()
    print(json.dumps(answers))


def _right(results: dict[str, Any], tool: str) -> str:
    """Of the cases that a tool was asked, how many are right."""
    verdicts = [row["answers"][tool]["verdict"] for row in results["rows"] if tool in row["answers"]]
    return f"**{verdicts.count('right')}** of {len(verdicts)}"


def _products(terms: Terms) -> str:
    """28·28·64·64·9 + …, where that is short."""
    if len(set(map(tuple, terms))) == 1 and len(terms) > 1:
        return f"{len(terms)}·" + "·".join(map(str, terms[0]))
    return " + ".join("·".join(map(str, term)) for term in terms) if len(terms) <= 3 else f"sum of {len(terms)} layers"


def report(results: dict[str, Any]) -> str:
    """The page, from the results alone."""
    tools = list(results["versions"])
    lines = [
        "# Counters of multiply-accumulates, side by side",
        "",
        "Made by `make counters` from [benchmarks/counters.py](../benchmarks/counters.py), not by hand. Each tool is used as its",
        "documentation says, on a fresh copy of every model. The truth of each case is written down as products of whole numbers,",
        "never asked of our own formulas: every tap counts, over the whole batch, no bias, no softmax, no interpolation. Flops are",
        "halved where a tool counts two for each multiply-accumulate.",
        "",
        "- **right**: within 2 %. **+4 %**: the tool counts normalisation and activations too. **×4**: wrong by that factor.",
        "- **unknown**: the tool says itself that it does not know all of it (a warning, or a status). **crash**: it raised.",
        "- –: it does not count backward passes. Forward + backward is three times forward: both operands have gradients.",
        "",
        "| case | MACs | " + " | ".join(f"{tool} {results['versions'][tool]}" for tool in tools) + " |",
        "|---|---:|" + "---|" * len(tools),
    ]
    for row in results["rows"]:
        said = [row["answers"].get(tool, {}).get("verdict", "–") for tool in tools]
        lines.append(f"| {row['case']} | {row['macs']:,} | " + " | ".join(said) + " |")
    lines.append("| right | | " + " | ".join(_right(results, tool) for tool in tools) + " |")
    lines += ["", "The truth of each:", ""]
    lines += [f"- {row['case']}: {_products(row['terms'])} = {row['macs']:,}" for row in results["rows"]]
    crashes = [
        f"- {tool}, {row['case']}: `{row['answers'][tool]['error']}`"
        for row in results["rows"]
        for tool in tools
        if row["answers"].get(tool, {}).get("error")
    ]
    if crashes:
        lines += ["", "What was raised:", "", *crashes]
    lines += [
        "",
        "torch-scan reports FlopCounterMode's number beside its own, which is the one here. ptflops has a second, older backend",
        'for modules alone (`backend="pytorch"`), which its documentation advises against beyond CNNs.',
    ]
    lines += ["", *_fields_report(results)]
    return "\n".join(lines) + "\n"


def _fields_report(results: dict[str, Any]) -> list[str]:
    rows = results["receptive_fields"]
    tools = list(rows[0]["answers"])
    lines = [
        "## Receptive fields",
        "",
        "Positions from the first to the last that one output sees along an axis, in an input of 32; 32 is all of it. torch-scan",
        "reports each module's own field, here that of the last one; torchlens says where its number is an upper bound (≤). Of the",
        "13 × 13 positions of three 3×3 with dilation 2 only 49 are seen: `omniconv receptive-field` says which.",
        "",
        "| network | truth | " + " | ".join(tools) + " |",
        "|---|---:|" + "---:|" * len(tools),
    ]
    for row in rows:
        lines.append(f"| {row['case']} | {row['size']} | " + " | ".join(row["answers"][tool] for tool in tools) + " |")
    return lines


@dataclass(frozen=True)
class Field:
    """A network whose receptive field along an axis is known, in inputs of 32: by hand; 32 where it sees all."""

    name: str
    build: Callable[[], nn.Module]
    size: int


class Added(nn.Module):
    """The input plus two 3×3 convolutions of it."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """The result."""
        return x + self.path(x)


SIDE = 32
FIELDS = (
    Field("3×3", lambda: nn.Conv2d(3, 3, 3, padding=1), 3),
    Field(
        "3×3, 3×3 stride 2, 3×3",  # 3, then + 2·1, then + 2·2
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, padding=1)),
        9,
    ),
    Field("three 3×3, d2", lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=2, dilation=2) for _ in range(3))), 13),
    Field("transposed k4 s2 p1", lambda: nn.ConvTranspose2d(3, 3, 4, 2, 1), 2),  # of 4 taps, every phase has 2
    Field("stride 2, then transposed", lambda: nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ConvTranspose2d(3, 3, 4, 2, 1)), 5),
    Field("residual of two 3×3", Added, 5),
    Field("nearest ×2, then 3×3", lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1)), 2),
    Field("mean over 2, then 3×3", lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 3, 3, padding=1)), 6),
    Field("3×3, then instance norm", lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3)), SIDE),
)


def _our_field(model: nn.Module, x: Tensor) -> str:
    from omniconv.analysis.receptive_field import receptive_field

    (size, _) = receptive_field(model, x).size
    return str(SIDE if size is None else size)


def _torch_scan_field(model: nn.Module, x: Tensor) -> str:
    from torchscan import crawl_module

    metrics = [layer["metrics"].get("receptive_field", {}) for layer in crawl_module(model, args=(x,))["layers"]]
    value = [m["value"] for m in metrics if "value" in m][-1]
    return "unknown" if value is None else f"{value:g}"


def _torchlens_field(model: nn.Module, x: Tensor) -> str:
    import torchlens

    field = torchlens.trace(model, x)[-2].receptive_field
    bound = {"UPPER_BOUND": "≤ ", "EXACT": ""}.get(field.status.name)
    return "unknown" if bound is None or field.size is None else f"{bound}{field.size[-1]}"


FIELD_TOOLS = {"omniconv": _our_field, "torch-scan": _torch_scan_field, "torchlens": _torchlens_field}


@app.command()
def fields(tool: str) -> None:
    """Asks one tool the receptive fields; JSON on standard output."""
    answers: dict[str, str] = {}
    for case in FIELDS:
        torch.manual_seed(0)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                answers[case.name] = FIELD_TOOLS[tool](case.build().eval(), torch.randn(1, 3, SIDE, SIDE))
            except Exception as error:
                answers[case.name] = f"crash ({type(error).__name__})"
    print(json.dumps(answers))


def _asks(*arguments: str) -> Any:
    made = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {made.stderr.strip()}")
    return json.loads(made.stdout.splitlines()[-1])


@app.command()
def run(results: Path = Path("benchmarks/results/counters.json"), page: Path = Path("docs/counters.md")) -> None:
    """Asks every tool, each in its own process, and writes results and page."""
    answers: dict[str, dict[str, Answer | None]] = {}
    for tool in TOOLS:
        print(tool, file=sys.stderr)
        answers[tool] = {name: answer and Answer(**answer) for name, answer in _asks("one", tool).items()}
    versions = {name: importlib.metadata.version(tool.package) for name, tool in TOOLS.items()}
    rows = [
        {
            "case": case.name,
            "macs": case.truth,
            "terms": case.terms,
            "answers": {
                tool: asdict(answer) | {"verdict": verdict(case, answer)}
                for tool in TOOLS
                if (answer := answers[tool][case.name]) is not None
            },
        }
        for case in CASES
    ]
    seen = {tool: _asks("fields", tool) for tool in FIELD_TOOLS}
    known = [{"case": case.name, "size": case.size, "answers": {tool: seen[tool][case.name] for tool in seen}} for case in FIELDS]
    results.parent.mkdir(parents=True, exist_ok=True)
    whole = {"schema_version": 1, "versions": versions, "rows": rows, "receptive_fields": known}
    results.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    page.write_text(report(json.loads(results.read_text())))


if __name__ == "__main__":
    app()
