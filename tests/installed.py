"""What must hold of an installed package far from its sources; `make wheel` runs it, pytest does not.

Its argument is the path that must run, native or composite.
"""

import shutil
import sys
import warnings
from pathlib import Path

import torch


def main(path: str) -> None:
    """Imports omniconv and takes each kind of depthwise op forward and backward beside torch's own."""
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang", "clang++") if shutil.which(name)]
    assert not compilers, f"installed: no compiler may be in sight, got {compilers}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import omniconv
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning and "omniconv" in str(w.message)]
    sources = Path(__file__).resolve().parent.parent / "src"
    assert not any(Path(p).resolve().is_relative_to(sources) for p in omniconv.__path__), f"installed: got the sources, {sources}"

    from omniconv import _native
    from omniconv.functional import depthwise_conv2d

    assert ("native" if _native.AVAILABLE else "composite") == path, (
        f"installed: the path must be {path}, got {_native.WHY_ABSENT!r}"
    )
    assert len(messages) == (path == "composite"), f"installed: one warning without the library and none with it, got {messages}"
    for layout in (torch.contiguous_format, torch.channels_last):
        for stride in (1, 2):
            x = torch.randint(-4, 5, (2, 20, 13, 11)).float().to(memory_format=layout).requires_grad_()
            w = torch.randint(-4, 5, (20, 1, 3, 3)).float().requires_grad_()
            ours = depthwise_conv2d(x, w, stride=stride, padding=1)
            theirs = torch.nn.functional.conv2d(x, w, stride=stride, padding=1, groups=20)
            assert torch.equal(ours, theirs)
            g = torch.randint(-4, 5, ours.shape).float()
            for a, b in zip(torch.autograd.grad(ours, (x, w), g), torch.autograd.grad(theirs, (x, w), g), strict=True):
                assert torch.equal(a, b)
    print(f"installed: {omniconv.__path__[0]}: the {path} path on torch {torch.__version__}", *messages, sep="\n  ")


main(sys.argv[1])
