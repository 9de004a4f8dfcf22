"""Pictures and sequences from files, and the fixed stem that makes feature maps of them.

The stem is a bank of Gabor filters, no training and no download: filter c looks along one of many orientations at one of many
wavelengths, on brightness, red against green or blue against yellow. Its settings walk a low-discrepancy (Kronecker) sequence, so
any number of channels is spread evenly, the same for the same seed. Every map then gets mean 0 and variance 1, as a normalisation
layer would leave it.
"""

import math
import warnings
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SAMPLE = Path(__file__).parent / "data" / "chelsea.jpg"
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # not those that start other programs (EPS) or fetch files
LARGEST_PIXELS = 80_000_000  # below the sizes at which Pillow itself suspects a decompression bomb
STEM_KERNEL = 7
STEM_STRIDE = 2
LONGEST_HOP = 16  # samples of a sequence per time step


@dataclass(frozen=True)
class Picture:
    """A picture as it is used: 8-bit RGB, upright, on white; ``notes`` say in words what was done to get there."""

    name: str
    image: Image.Image
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sequence:
    """A sequence as it is used: (channels, T) samples in float64; ``notes`` say in words what it is."""

    name: str
    samples: Tensor
    notes: tuple[str, ...] = ()


def _existing(what: str, path: str | Path) -> Path:
    file = Path(path)
    if not file.exists():
        raise ValueError(f"compare: the {what} must be a file that exists, got '{file}'")
    if not file.is_file():
        raise ValueError(f"compare: the {what} must be a file, got {'the folder' if file.is_dir() else 'the device'} '{file}'")
    if file.stat().st_size == 0:
        raise ValueError(f"compare: the {what} must not be empty, got '{file}' of 0 bytes")
    return file


@contextmanager
def _decoding(what: str, kinds: str, file: Path) -> Iterator[None]:
    """Turns whatever a decoder raises on a malformed file into one sentence, and silences what it warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError:
        raise ValueError(f"compare: the {what} must have at most {LARGEST_PIXELS:,} pixels, got more in '{file}'") from None
    except PermissionError:
        raise ValueError(f"compare: the {what} must be readable, got no permission for '{file}'") from None
    except MemoryError:
        raise ValueError(f"compare: the {what} must fit into memory, got '{file}'") from None
    except ValueError as error:
        if str(error).startswith("compare: "):
            raise
        raise ValueError(f"compare: the {what} must be {kinds}, got '{file}' ({_one_line(error)})") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise ValueError(f"compare: the {what} must be {kinds}, got '{file}' ({_one_line(error)})") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def read_picture(path: str | Path | None = None) -> Picture:
    """The picture in a file; by default the photograph that ships with the package.

    EXIF orientation is applied, transparency is laid on white, an animation gives its first frame, and 16-bit grey keeps its
    range; CMYK is converted without its colour profile.

    Args:
        path: A PNG, JPEG, GIF, WebP, BMP, TIFF or PPM file.

    Raises:
        ValueError: There is no such file, it is no whole picture, or it is too large.

    >>> read_picture().image.size
    (451, 300)
    """
    file = _existing("picture", SAMPLE if path is None else path)
    with _decoding("picture", "a whole picture (PNG, JPEG, GIF, WebP, BMP, TIFF or PPM)", file):
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError("its content is none of these") from None
        with image:
            width, height = image.size
            if width * height > LARGEST_PIXELS:
                raise ValueError(
                    f"compare: the picture must have at most {LARGEST_PIXELS:,} pixels, got {width} × {height} in '{file}'"
                )
            frames = getattr(image, "n_frames", 1)
            notes = [f"the first of {frames} frames"] if frames > 1 else []
            image.load()
            rgb, what = _as_rgb(_upright(image, notes))
    return Picture(file.name, rgb, (*notes, *what))


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data beside a sound picture
        return image
    if turned:
        notes.append("turned upright, as its EXIF data asks")
    return upright


def _as_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """8-bit RGB, and what was done in words."""
    if image.mode.startswith(("I", "F")):
        return _from_wide_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), ["laid on white"]
    if image.mode == "CMYK":
        return image.convert("RGB"), ["CMYK, converted without its colour profile"]
    return image.convert("RGB"), []


def _from_wide_grey(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Grey of more than 8 bits, where Pillow's own conversion clips."""
    values = np.array(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a pixel is not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        scaled, note = values / 65535, "16-bit grey"
    elif image.mode == "F" and low >= 0 and high <= 1:
        scaled, note = values, "floating-point grey"
    else:
        scaled, note = (values - low) / ((high - low) or 1.0), f"grey from {low:g} to {high:g}, stretched to black and white"
    return Image.fromarray((scaled * 255).round().astype(np.uint8)).convert("RGB"), [note]


def square(picture: Picture, size: int) -> Tensor:
    """The largest square in the middle of the picture, scaled to (3, size, size), in [0, 1]."""
    width, height = picture.image.size
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    middle = picture.image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(middle)).movedim(-1, 0).float() / 255


def feature_maps(picture: Picture, channels: int, size: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """The picture through the stem.

    Args:
        picture: What to look at; its middle square is taken.
        channels: How many filters.
        size: Positions of a map on each axis.
        batch: How many samples; sample i is the picture rolled sideways by i/batch of its width.
        seed: Where the filters' settings start.

    Returns:
        (batch, channels, size, size), float32, contiguous; every map of mean 0 and variance 1 (a constant map is all 0).
    """
    pixels = square(picture, STEM_STRIDE * size)
    samples = torch.stack([pixels.roll(i * pixels.shape[2] // batch, 2) for i in range(batch)])
    pad = STEM_KERNEL // 2
    padded = F.pad(samples, (pad, pad, pad, pad), mode="replicate")
    return _normal(F.conv2d(padded, _gabor_bank(channels, seed), stride=STEM_STRIDE))


def _spread(channels: int, dimensions: int, seed: int) -> Tensor:
    """(channels, dimensions) points spread evenly over the unit cube: a Kronecker sequence from a start drawn by the seed."""
    root = 2.0
    for _ in range(60):  # the positive root of x^(d + 1) = x + 1 (Roberts 2018)
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = torch.tensor([root ** -(d + 1) for d in range(dimensions)], dtype=torch.float64)
    start = torch.rand(dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (start + steps * torch.arange(channels, dtype=torch.float64)[:, None]) % 1


# brightness, red against green, blue against yellow
_COLOURS = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]], dtype=torch.float64)


def _gabor_bank(channels: int, seed: int) -> Tensor:
    """(channels, 3, 7, 7): a wave of some orientation, length and phase under a Gaussian, on one of the three colour axes."""
    angle, length, phase = (v[:, None, None] for v in _spread(channels, 3, seed).unbind(1))
    y, x = torch.meshgrid(*[torch.arange(STEM_KERNEL, dtype=torch.float64) - STEM_KERNEL // 2] * 2, indexing="ij")
    along = x * torch.cos(math.pi * angle) + y * torch.sin(math.pi * angle)
    wavelength = 3 * 4**length  # 3 to 12 pixels
    waves = torch.cos(2 * math.pi * (along / wavelength + phase)) * torch.exp(-(x**2 + y**2) / (2 * 2.0**2))
    colours = _COLOURS[torch.arange(channels) % 3]
    return (waves[:, None] * colours[:, :, None, None]).float()


def _normal(maps: Tensor) -> Tensor:
    """Every map of every sample with mean 0 and variance 1; one that does not vary becomes 0."""
    axes = tuple(range(2, maps.dim()))
    centred = maps - maps.mean(axes, keepdim=True)
    deviation = centred.square().mean(axes, keepdim=True).sqrt()
    scale = maps.abs().amax(axes, keepdim=True).clamp(min=1e-30)
    return torch.where(deviation > 1e-5 * scale, centred / deviation.clamp(min=1e-30), 0.0)


def read_sequence(path: str | Path, longest: int) -> Sequence:
    """The sequence in a file: a PCM WAV of 8, 16, 24 or 32 bits, or a CSV of numbers whose columns are channels.

    Args:
        path: The file; a first row of a CSV that holds no number is its head. Commas, semicolons, tabs or spaces separate.
        longest: The most samples to read; what comes after is left out, and a note says so.

    Raises:
        ValueError: There is no such file, or it is not a whole sequence of finite numbers.
    """
    file = _existing("sequence", path)
    with _decoding("sequence", "a PCM WAV or a CSV of numbers", file):
        with open(file, "rb") as stream:
            start = stream.read(4)
        if start in (b"RIFF", b"RIFX"):
            return _read_wav(file, longest)
        return _read_csv(file, longest)


def _read_wav(file: Path, longest: int) -> Sequence:
    try:
        with wave.open(str(file)) as stream:
            channels, width, rate, frames = stream.getparams()[:4]
            data = stream.readframes(min(frames, longest))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"as a WAV: {_one_line(error)}") from None
    if frames == 0:
        raise ValueError("as a WAV: it holds no samples")
    if width not in (1, 2, 3, 4):
        raise ValueError(f"as a WAV: it has {8 * width} bits a sample")
    if len(data) != min(frames, longest) * channels * width:
        raise ValueError(f"as a WAV: it is cut off, {len(data) // (channels * width)} of {frames} frames are there")
    raw = np.frombuffer(data, dtype=np.uint8).reshape(-1, channels, width)
    if width == 1:
        values = raw[..., 0].astype(np.float64) - 128
    else:  # little-endian, signed: into the high bytes of 32 bits, which carries the sign
        wide = np.zeros((*raw.shape[:2], 4), dtype=np.uint8)
        wide[..., 4 - width :] = raw
        values = wide.view("<i4")[..., 0].astype(np.float64)
    samples = torch.from_numpy(values / 2.0 ** (7 if width == 1 else 31)).t().contiguous()
    notes = [f"{8 * width}-bit PCM, {rate:,} Hz, {channels} channel{'s' * (channels > 1)}"]
    if frames > longest:
        notes.append(f"the first {longest:,} of {frames:,} frames")
    return Sequence(file.name, samples, tuple(notes))


def _read_csv(file: Path, longest: int) -> Sequence:
    numbers: list[list[float]] = []
    with open(file, encoding="utf-8-sig") as stream:
        lines = (line for line in stream if line.strip())
        for row, line in enumerate(islice(lines, longest + 2), start=1):
            words = _words(line)
            if row == 1 and not any(_is_number(word) for word in words):
                continue
            numbers.append(_row_of_numbers(row, words, len(numbers[0]) if numbers else None))
    if not numbers:
        raise ValueError("it holds no numbers")
    notes = [f"{len(numbers[0])} column{'s' * (len(numbers[0]) > 1)}"]
    if len(numbers) > longest:
        notes.append(f"the first {longest:,} rows")
    return Sequence(file.name, torch.tensor(numbers[:longest], dtype=torch.float64).t().contiguous(), tuple(notes))


def _words(line: str) -> list[str]:
    """The fields of a line, split at semicolons, else tabs, else commas, else spaces."""
    separator = next((mark for mark in ";\t," if mark in line), None)
    words = [word.strip().strip('"') for word in line.strip("\r\n").split(separator)]
    return words[:-1] if separator and len(words) > 1 and not words[-1] else words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _row_of_numbers(row: int, words: list[str], columns: int | None) -> list[float]:
    if columns is not None and len(words) != columns:
        raise ValueError(f"row {row} has {len(words)} values where the first has {columns}")
    bad = next((w for w in words if not _is_number(w)), None)
    if bad is not None:
        raise ValueError(f"row {row} holds {bad[:30]!r}")
    values = [float(w) for w in words]
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"row {row} holds a number that is not finite")
    return values


def sequence_features(sequence: Sequence, channels: int, steps: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """A sequence through its stem: Gabor filters along time, over a mixture of the sequence's channels.

    Args:
        sequence: What to listen to.
        channels: How many filters.
        steps: The most time steps; a longer sequence is read ``hop`` samples a step, ``hop`` at most 16.
        batch: How many samples; sample i is the sequence rolled by i/batch of its length.
        seed: Where the filters' settings start.

    Returns:
        (batch, channels, T), float32, contiguous; every channel of mean 0 and variance 1.
    """
    samples = (sequence.samples / sequence.samples.abs().max().clamp(min=1e-300)).float()
    length = samples.shape[1]
    hop = min(max(length // steps, 1), LONGEST_HOP)
    half = 4 * hop
    samples = samples[:, : steps * hop]
    length = samples.shape[1]
    rolled = torch.stack([samples.roll(i * length // batch, 1) for i in range(batch)])
    filters = _time_bank(channels, samples.shape[0], half, hop, seed)
    return _normal(F.conv1d(F.pad(rolled, (half, half), mode="replicate"), filters, stride=hop)[..., :steps]).contiguous()


def _time_bank(channels: int, inputs: int, half: int, hop: int, seed: int) -> Tensor:
    """(channels, inputs, 2·half + 1): waves of 2.5 to 8 hops under a Gaussian, each over its own mixture of the inputs."""
    length, phase, mixture = (v[:, None] for v in _spread(channels, 3, seed).unbind(1))
    time = torch.arange(-half, half + 1, dtype=torch.float64)
    wavelength = 2.5 * hop * (8 / 2.5) ** length
    waves = torch.cos(2 * math.pi * (time / wavelength + phase)) * torch.exp(-(time**2) / (2 * (half / 2.5) ** 2))
    mix = torch.cos(2 * math.pi * mixture * torch.arange(inputs, dtype=torch.float64))
    return (mix[:, :, None] * waves[:, None, :]).float()
