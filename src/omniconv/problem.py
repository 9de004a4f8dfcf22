"""One convolution as a frozen value with a one-line text form, for people, tests, cost, benchmarks and errors.

    <technique><rank>d n<N> c<C>[-<O>] i<size> k<kernel> [s…] [p…] [d…] [g<G>] [m<multiplier or mid>] [h<heads>]
    [o<offset groups>] [op<output padding>] [mode:<padding mode>] [dt:<f32|f64|bf16|f16>] [cl]

One number per axis joined by ``x``, a single number for all axes; a per-side pad is ``a+b``; ``psame``, ``pcausal``, …; what is
left out has the default; anything after ``#`` is a comment. A Problem knows the grammar; what its fields mean for a technique
(output size, weight shapes, cost) is the technique's to say.
"""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from omniconv.geometry import PADDING_MODES, PADDING_NAMES, Pairs

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HEAD = re.compile(r"([a-z]+(?:_[a-z]+)*)([123])d")
_TOKEN = re.compile(r"(mode:|dt:|op|[ncikspdgmho])(.+)")
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Problem:
    """One convolution; see the module's text for its one-line form.

    ``out_channels``, ``multiplier`` and ``heads`` are None where the text leaves them out: the technique knows the default.

    >>> str(Problem.parse("depthwise1d n8 c512 i512 k31 p30+0"))
    'depthwise1d n8 c512 i512 k31 p30+0'
    """

    technique: str
    channels: int
    size: tuple[int, ...]
    batch: int = 1
    out_channels: int | None = None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: str | Pairs = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    multiplier: int | None = None
    heads: int | None = None
    offset_groups: int = 1
    output_padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    dtype: str = "f32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 3:
            raise ValueError(f"Problem: size must have 1 to 3 axes, got {self.size}")
        for name, default in (
            ("kernel", 1),
            ("stride", 1),
            ("dilation", 1),
            ("output_padding", 0),
            ("padding", (0, 0)),
        ):
            value = getattr(self, name)
            if value == ():
                object.__setattr__(self, name, (default,) * self.rank)
            elif not isinstance(value, str) and len(value) != self.rank:
                raise ValueError(f"Problem: {name} must have one entry per axis of size {self.size}, got {value}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"Problem: padding_mode must be one of {', '.join(PADDING_MODES)}, got {self.padding_mode!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Problem: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    def replace(self, **changes: Any) -> "Problem":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @staticmethod
    def parse(text: str) -> "Problem":
        """The problem that a line of text describes.

        Raises:
            ValueError: The text is malformed; the message names the offending token.

        >>> Problem.parse("standard2d c64-128 i56 k3 p1  # ResNet").kernel
        (3, 3)
        """
        words = text.split("#", 1)[0].split()
        if not words:
            raise ValueError(f"Problem: the text must start with <technique><rank>d, got {text!r}")
        head = _HEAD.fullmatch(words[0])
        if head is None:
            raise ValueError(f"Problem: the first token must be <technique><1|2|3>d, got {words[0]!r} in {text!r}")
        values: dict[str, Any] = {"technique": head[1]}
        for token in words[1:]:
            try:
                read = _read(token, int(head[2]))
            except ValueError as error:
                raise ValueError(f"Problem: {error}, got {token!r} in {text!r}") from None
            for name, value in read.items():
                if name in values:
                    raise ValueError(f"Problem: a setting must be given once, got a second {token!r} in {text!r}")
                values[name] = value
        for name, token in (("channels", "c<channels>"), ("size", "i<size>")):
            if name not in values:
                raise ValueError(f"Problem: the text must have a {token} token, got {text!r}")
        return Problem(**values)

    def __str__(self) -> str:
        words = [f"{self.technique}{self.rank}d"]
        words += [
            f"n{self.batch}",
            f"c{self.channels}" + (f"-{self.out_channels}" if self.out_channels is not None else ""),
        ]
        words += [f"i{_joined(self.size)}"]
        defaults = Problem(self.technique, self.channels, self.size)
        for letter, name in _AXES.items():
            if getattr(self, name) != getattr(defaults, name):
                words.append(letter + _joined(getattr(self, name)))
            if letter == "s" and self.padding != defaults.padding:
                words.append("p" + (self.padding if isinstance(self.padding, str) else _joined(self.padding)))
        for letter, name in (_NUMBERS | _WORDS).items():
            if getattr(self, name) != getattr(defaults, name):
                words.append(f"{letter}{getattr(self, name)}")
        return " ".join(words + ["cl"] * self.channels_last)

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name; technique, channels and size always."""
        defaults = Problem(self.technique, self.channels, self.size)
        always = ("technique", "channels", "size")
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != getattr(defaults, f.name) or f.name in always}


# token -> field, in the order in which str() writes them
_AXES = {"k": "kernel", "s": "stride", "d": "dilation", "op": "output_padding"}
_NUMBERS = {"g": "groups", "m": "multiplier", "h": "heads", "o": "offset_groups"}
_WORDS = {"mode:": "padding_mode", "dt:": "dtype"}


def _joined(values: tuple[Any, ...]) -> str:
    words = [(str(v[0]) if v[0] == v[1] else f"{v[0]}+{v[1]}") if isinstance(v, tuple) else str(v) for v in values]
    return words[0] if len(set(words)) == 1 else "x".join(words)


def _read(token: str, rank: int) -> dict[str, Any]:
    """The fields that one token sets; raises ValueError with what must hold."""
    if token == "cl":
        return {"channels_last": True}
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ValueError("a token must be one of n c i k s p d g m h o op mode: dt: with a value, or cl")
    key, word = match[1], match[2]
    if key == "c":
        channels, dash, out = word.partition("-")
        return {"channels": _number(channels)} | ({"out_channels": _number(out)} if dash else {})
    if key == "n":
        return {"batch": _number(word, 0)}
    if key == "i":
        return {"size": _axes(word, rank)}
    if key == "p":
        return {"padding": word if word in PADDING_NAMES else _pads(word, rank)}
    if key in _AXES:
        return {_AXES[key]: _axes(word, rank, 0 if key == "op" else 1)}
    if key in _NUMBERS:
        return {_NUMBERS[key]: _number(word)}
    allowed = PADDING_MODES if key == "mode:" else tuple(DTYPES)
    if word not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}")
    return {_WORDS[key]: word}


def _number(word: str, minimum: int = 1) -> int:
    if not _NUMBER.fullmatch(word) or int(word) < minimum:
        raise ValueError(f"a number must be a whole number of at least {minimum}")
    return int(word)


def _axes(word: str, rank: int, minimum: int = 1) -> tuple[int, ...]:
    parts = [_number(part, minimum) for part in word.split("x")]
    if len(parts) not in (1, rank):
        raise ValueError(f"a setting must have 1 or {rank} values joined by 'x'")
    return tuple(parts * rank if len(parts) == 1 else parts)


def _pads(word: str, rank: int) -> Pairs:
    sides = [[_number(side, 0) for side in part.split("+")] for part in word.split("x")]
    if len(sides) not in (1, rank) or any(len(s) > 2 for s in sides):
        raise ValueError(f"padding must be {', '.join(PADDING_NAMES)}, or 1 or {rank} pads, each <both> or <before>+<after>")
    return tuple((s[0], s[-1]) for s in (sides * rank if len(sides) == 1 else sides))
