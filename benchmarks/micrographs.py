"""Segmentation of fluorescence micrographs: three ways back to full resolution, at equal parameters.

    pip install --no-deps mnfinder==1.2.3         # its pictures are read, the package not imported
    python benchmarks/micrographs.py run --threads 2    # every network, every seed; stopped with Ctrl-C, it goes on where it was
    python benchmarks/micrographs.py table benchmarks/results/micrographs-*.json

    dilated      strides to 1/4, then dilation 2 and 4 in place of strides, then without gaps; bilinear ×4     (a small DRN-D)
    transposed   strides to 1/16, then four transposed convolutions; narrower, so that the parameters are equal
    bilinear     the very layers of "dilated", with strides to 1/16; bilinear ×16

Three classes: background, nucleus and micronucleus, which has 0.2 % of the pixels and is about five of them wide. The pictures at
half size, in the package's own parts: 30 to learn from, 3 to choose settings by ("valid"), 16 for the reported error, most of other
microscopes and cells. IoU: pixels of a class both predicted and true over those either, of all pictures together.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from trials import Tick, every_run, origin, save, size_of, spread, train, watched

from omniconv.analysis import cost
from omniconv.bench.results import slug
from omniconv.nn import Conv2d, ConvTranspose2d, DilatedConv2d
from omniconv.timing import alternate

KINDS = ("dilated", "transposed", "bilinear")
CLASSES = ("background", "nucleus", "micronucleus")
PARTS = {"train": "training-data", "valid": "validation-data", "test": "test-data"}
WIDTHS = (16, 24, 48, 64, 64)  # of the stem and the four levels
GAPS = (1, 1, 2, 4)  # dilations of the levels of "dilated"; what is not 1 stands for a stride of 2
DEEPEST = 16  # of the strides: sizes are made a multiple of it
BATCH, CROP, RATE = 8, 160, 4e-3
WEIGHTS = (1.0, 2.0, 6.0)  # of the classes in the loss; with (1, 3, 12) "valid" was worse
WHERE = "micrographs: the pictures must be there: pip install --no-deps mnfinder==1.2.3, or --data its folder, got {}"
SHA256 = "49b58c3ab940f8b0e0346ee6dbc48903ab35aeef76d486a1de6683e729a963c8"  # of mnfinder 1.2.3's pictures and masks

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


# the pictures


@dataclass(frozen=True)
class Picture:
    """A micrograph (1, H, W), its values about 0 to 1 from the dark to the bright, and the class of every pixel (H, W)."""

    name: str
    x: Tensor
    y: Tensor


def find_pictures(folder: Path | None) -> Path:
    """The folder asked for, or the one of the mnfinder package, which is not imported."""
    if folder is None:
        found = importlib.util.find_spec("mnfinder")
        folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not all((folder / part).is_dir() for part in PARTS.values()):
        raise typer.BadParameter(WHERE.format(folder or "no package mnfinder"))
    return folder


def files_of(folder: Path, part: str) -> list[Path]:
    """The micrographs of a part; their masks lie in folders beside."""
    return sorted((folder / PARTS[part]).glob("*/images/*.png"))


def masks_of(image: Path) -> tuple[Path, Path]:
    """Where the nuclei and the micronuclei are drawn."""
    beside = image.parent
    return beside.with_name("nucleus_masks") / image.name, beside.with_name("mn_masks") / image.name


def digest_of(folder: Path) -> str:
    """SHA-256 of all pictures and masks."""
    made = hashlib.sha256()
    for part in PARTS:
        for image in files_of(folder, part):
            for file in (image, *masks_of(image)):
                made.update(file.read_bytes())
    return made.hexdigest()


def read(image: Path) -> Picture:
    """A picture at half size: means of 2 × 2 pixels, its median 0 and its 99.5th percentile 1; classes of every other pixel."""
    grey = torch.from_numpy(np.asarray(Image.open(image)).astype(np.float32))
    x = F.avg_pool2d(grey[None], 2)
    values = x.flatten()
    dark = values.median()
    bright = values.kthvalue(math.ceil(0.995 * values.numel())).values
    x = ((x - dark) / (bright - dark).clamp_min(1e-6)).clamp(-1, 4)
    y = torch.zeros(grey.shape, dtype=torch.long)
    for number, file in enumerate(masks_of(image), 1):
        drawn = torch.from_numpy(np.asarray(Image.open(file).convert("RGBA")).astype(np.int64))
        y[(drawn[..., 3] > 0) & (drawn[..., :3].amax(-1) > 0)] = number  # a colour an object, nothing where there is none
    return Picture(image.stem, x, y[: 2 * x.shape[1] : 2, : 2 * x.shape[2] : 2].contiguous())


def crops(pictures: Sequence[Picture], seed: int, step: int, size: int, side: int) -> tuple[Tensor, Tensor]:
    """What a seed learns from at a step: squares (N, 1, side, side), turned, mirrored and brighter or darker, and their classes.

    Every other square has a micronucleus in it, where the picture has one.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    xs, ys = [], []
    for place in range(size):
        picture = pictures[int(torch.randint(len(pictures), (), generator=generator))]
        height, width = picture.y.shape
        rare = (picture.y == 2).nonzero()
        row, column, turn, pick = torch.rand(4, generator=generator).tolist()
        top, left = int(row * (height - side + 1)), int(column * (width - side + 1))
        if place % 2 and len(rare):
            r, c = rare[int(pick * len(rare))].tolist()
            top, left = (
                max(0, min(at - int(share * side), most - side)) for at, share, most in ((r, row, height), (c, column, width))
            )
        x, y = picture.x[:, top : top + side, left : left + side], picture.y[top : top + side, left : left + side]
        quarter = int(8 * turn)
        x, y = x.rot90(quarter % 4, (1, 2)), y.rot90(quarter % 4)
        if quarter >= 4:
            x, y = x.flip(2), y.flip(1)
        gain, power = torch.rand(2, generator=generator).tolist()
        xs.append(x.sign() * x.abs() ** (0.7 + 0.7 * power) * (0.7 + 0.6 * gain))
        ys.append(y)
    return torch.stack(xs), torch.stack(ys)


# the networks


class Residual(nn.Module):
    """Two 3 × 3 convolutions and a way around them, as in ResNet-18; the first has the stride, both the dilation."""

    def __init__(self, inside: int, outside: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.first = DilatedConv2d(inside, outside, 3, dilation, stride, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = DilatedConv2d(outside, outside, 3, dilation, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.around = Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return (y + self.around(x)).relu()


def plain(inside: int, outside: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """A convolution without a way around it."""
    made = DilatedConv2d(inside, outside, kernel, dilation, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(outside), nn.ReLU())


class Network(nn.Module):
    """A micrograph (N, 1, H, W) → scores (N, 3, H, W), for sizes that are multiples of 16."""

    def __init__(self, kind: str, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.kind = kind
        gaps = GAPS if kind == "dilated" else (1,) * len(GAPS)
        levels = [
            Residual(inside, outside, 2 if gap == 1 else 1, gap)
            for inside, outside, gap in zip(widths[:-1], widths[1:], gaps, strict=True)
        ]
        last = widths[-1]
        # as the dilation goes down again, what the gaps of the grid left out is filled in: "degridding"
        ends = [plain(last, last, 3, dilation) for dilation in ((2, 1) if kind == "dilated" else (1, 1))]
        self.body = nn.Sequential(plain(1, widths[0], 5), *levels, *ends)
        if kind == "transposed":
            back = widths[-2::-1]  # as wide at each size as the body is
            self.up = nn.Sequential(
                *(
                    nn.Sequential(ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                    for i, o in zip((last, *back[:-1]), back, strict=True)
                )
            )
        self.head = Conv2d(widths[0] if kind == "transposed" else last, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of every pixel."""
        y = self.body(x)
        if self.kind == "transposed":
            return self.head(self.up(y))
        return F.interpolate(self.head(y), x.shape[2:], mode="bilinear", align_corners=False)


def build(kind: str, widths: Sequence[int] = WIDTHS) -> Network:
    """A network of a kind, as wide as brings its parameters nearest to those of "dilated"."""
    if kind != "transposed":
        return Network(kind, widths)
    with torch.device("meta"):
        goal = size_of(Network("dilated", widths))
        shares = [[max(1, round(width * share)) for width in widths] for share in (0.5 + i / 512 for i in range(257))]
        nearest = min(shares, key=lambda tried: abs(size_of(Network(kind, tried)) - goal))
    return Network(kind, nearest)


# the run


@dataclass(frozen=True)
class Settings:
    """What a run is, besides its network and its seed."""

    steps: int
    threads: int = 1
    batch: int = BATCH
    crop: int = CROP
    widths: tuple[int, ...] = WIDTHS


@dataclass
class Run:
    """One network trained from one seed: IoU in percent, seconds of the process's CPU time and of the clock for the steps."""

    kind: str
    seed: int
    parameters: int
    iou: dict[str, float]
    mean_iou: float
    valid_mean_iou: float
    train_cpu_seconds: float
    train_seconds: float
    loss: float


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step on a batch; returns its loss."""
    loss = F.cross_entropy(model(x), y, torch.tensor(WEIGHTS))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, as all are trained."""
    return torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)


def trained(
    pictures: Sequence[Picture], kind: str, seed: int, settings: Settings, out: Path, tick: Tick, every: int = 50
) -> tuple[Network, dict[str, float]]:
    """Trains a network from a seed, or on from where it was stopped."""
    torch.manual_seed(seed)
    model = build(kind, settings.widths)
    optimizer = optimizer_of(model)

    def step(number: int) -> float:
        return learn(model, optimizer, *crops(pictures, seed, number, settings.batch, settings.crop))

    return model, train(model, optimizer, step, settings, RATE, out / f"{kind}-{seed}.pt", tick, every)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The class of every pixel (H, W) of a picture (1, H, W), of any size."""
    height, width = x.shape[1:]
    more = (0, -width % DEEPEST, 0, -height % DEEPEST)
    with torch.inference_mode():
        return model(F.pad(x[None], more, mode="replicate"))[0, :, :height, :width].argmax(0)


def confusion(model: nn.Module, pictures: Sequence[Picture]) -> Tensor:
    """Pixels by their true class (rows) and the predicted one (columns)."""
    counts = torch.zeros(len(CLASSES) ** 2, dtype=torch.long)
    for picture in pictures:
        counts += torch.bincount((len(CLASSES) * picture.y + predict(model, picture.x)).flatten(), minlength=len(counts))
    return counts.view(len(CLASSES), len(CLASSES))


def iou(counts: Tensor) -> list[float]:
    """Percent of each class: both over either.

    >>> iou(torch.tensor([[6, 2], [1, 1]]))
    [66.66666666666667, 25.0]
    """
    both, either = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return [100 * b / max(e, 1) for b, e in zip(both.tolist(), either.tolist(), strict=True)]


def run_all(
    parts: dict[str, list[Picture]], seeds: int, settings: Settings, out: Path, bar: Progress, budget: float
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Every network with every seed, then the cost and the times; and the networks of seed 0."""

    def judge(kind: str, seed: int, model: nn.Module, spent: dict[str, float]) -> dict[str, Any]:
        shares, valid = (iou(confusion(model, parts[part])) for part in ("test", "valid"))
        by_class, many = dict(zip(CLASSES, shares, strict=True)), len(CLASSES)
        times = spent["cpu"], spent["wall"], spent["loss"]
        return asdict(Run(kind, seed, size_of(model), by_class, sum(shares) / many, sum(valid) / many, *times))

    runs, models = every_run(
        KINDS, seeds, settings.steps, out, bar, lambda kind, seed, tick: trained(parts["train"], kind, seed, settings, out, tick),
        judge, lambda run: f"IoU {run['mean_iou']:.1f} %",
    )  # fmt: skip
    return {"runs": runs, "cost": costs(models, settings, budget)}, models


def costs(models: dict[str, nn.Module], settings: Settings, budget: float) -> dict[str, dict[str, float]]:
    """MACs and the time of a 512 × 512 micrograph (at half size), and of a training step; medians, the networks in turns."""
    x, y = torch.rand(1, 1, 256, 256), torch.zeros(settings.batch, settings.crop, settings.crop, dtype=torch.long)
    batch = torch.rand(settings.batch, 1, settings.crop, settings.crop)
    learners = {kind: build(kind, settings.widths) for kind in models}
    optimizers = {kind: optimizer_of(model) for kind, model in learners.items()}
    step = alternate({k: lambda m=m, o=optimizers[k]: learn(m, o, batch, y) for k, m in learners.items()}, budget=budget)
    with torch.inference_mode():
        one = alternate({kind: lambda m=model: m(x) for kind, model in models.items()}, budget=budget)
    return {
        kind: {"macs": cost(model, x).macs_dense, "latency_ms": 1e3 * one[kind].median, "step_ms": 1e3 * step[kind].median}
        for kind, model in models.items()
    }


# what is reported


def draw(models: dict[str, nn.Module], pictures: Sequence[Picture], file: Path) -> None:
    """A part of some pictures, what is true, and what each network says: nuclei blue, micronuclei orange."""
    from matplotlib.figure import Figure

    shown = sorted(pictures, key=lambda p: -int((p.y == 2).sum()))[:4]
    figure = Figure(figsize=(2.6 * (2 + len(models)), 2.6 * len(shown) + 0.3), layout="constrained")
    panels = figure.subplots(len(shown), 2 + len(models), squeeze=False)
    colours = torch.tensor([[0, 0, 0], [86, 180, 233], [230, 120, 0]]) / 255  # of Okabe and Ito: told apart by everyone
    for row, picture in zip(panels, shown, strict=True):
        r, c = (picture.y == 2).nonzero().double().mean(0).round().long().tolist() if (picture.y == 2).any() else (0, 0)
        top, left = (max(0, min(at - 64, most - 128)) for at, most in zip((r, c), picture.y.shape, strict=True))
        cut = slice(top, top + 128), slice(left, left + 128)
        grey = picture.x[0].clamp(0, 1)[..., None].expand(-1, -1, 3)
        row[0].imshow(grey[cut].numpy())
        for axes, y in zip(row[1:], [picture.y, *(predict(model, picture.x) for model in models.values())], strict=True):
            over = (y > 0)[..., None]
            axes.imshow(torch.where(over, 0.35 * grey + 0.65 * colours[y], grey)[cut].numpy())
    for axes, title in zip(panels[0], ["micrograph", "true", *models], strict=True):
        axes.set_title(title, fontsize=10)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.savefig(file, dpi=110)


def table(report: dict[str, Any]) -> str:
    """The result as a Markdown table: means over the seeds ± their standard deviation."""
    lines = [
        "| network | parameters | GMACs | IoU %: background | nucleus | micronucleus | mean | latency ms | training step ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        runs, costs = [r for r in report["runs"] if r["kind"] == kind], report["cost"][kind]
        columns = [[r["iou"][name] for r in runs] for name in CLASSES] + [[r["mean_iou"] for r in runs]]
        shares = " | ".join(spread(column, 1) for column in columns)
        lines.append(
            f"| {kind} | {runs[0]['parameters']:,} | {costs['macs'] / 1e9:.2f} | {shares} "
            f"| {costs['latency_ms']:.1f} | {costs['step_ms']:.0f} |"
        )
    return "\n".join(lines)


@app.command()
def run(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each network.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run, 8 squares each.")] = 400,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch's.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and pictures; a run goes on from those it finds.")] = Path(
        "build/micrographs"
    ),
    data: Annotated[Path | None, typer.Option(help="A folder laid out as mnfinder's.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Where the JSON goes; by default beside the checkpoints.")] = None,
    budget: Annotated[float, typer.Option(min=0.01, help="Seconds of each of the two timings at the end.")] = 10.0,
) -> None:
    """Train, score, time and draw all networks."""
    folder = find_pictures(data)
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter('micrographs: matplotlib must be there, to draw the predictions: pip install ".[plot]", got none')
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    parts = {part: [read(file) for file in files_of(folder, part)] for part in PARTS}
    digest, settings = digest_of(folder), Settings(steps, threads)
    made, models = watched(lambda bar: run_all(parts, seeds, settings, out, bar, budget), out)
    result = origin("micrographs.py") | {
        "pictures": {"sha256": digest, "mnfinder_1_2_3": digest == SHA256} | {part: len(some) for part, some in parts.items()},
        "settings": asdict(settings) | {"rate": RATE, "weights": WEIGHTS, "gaps": GAPS},
        **made,
    }
    save(result, report or out / f"micrographs-{slug()}.json")
    draw(models, parts["test"], out / "predictions.png")
    print(table(result))


@app.command("table")
def show(file: Annotated[Path, typer.Argument(help="The JSON of a run.")]) -> None:
    """Print the table of a committed result."""
    print(table(json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    app()
