"""The laws of the source: who may import whom, what no code may know by name, and the one list of what still breaks them.

Every law reads one file's text and says what in it breaks the law. All of it stands in ``EXCEPTIONS`` or the test fails, and an
exception that no longer applies fails it too: the list may only shrink.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from omniconv.techniques import TECHNIQUES

REPOSITORY = Path(__file__).parent.parent
PACKAGE = "src/omniconv/"

# by path from the repository, law by law: what breaks it, and how often
EXCEPTIONS: dict[str, dict[str, dict[str, int]]] = {
    # torch calls an argument of its convolution so: windows.py, _positions.py
    "technique_literals": {
        "src/omniconv/analysis/catalogue.py": {"standard": 3},
        "src/omniconv/analysis/receptive_field/windows.py": {"transposed": 1},
        "src/omniconv/analysis/slow_paths.py": {"deformable": 1, "grouped": 1},
        "src/omniconv/analysis/what_if.py": {"standard": 4},
        "src/omniconv/bench/compare.py": {"depthwise": 1, "standard": 1},
        "src/omniconv/bench/what_if.py": {"standard": 1},
        "src/omniconv/surgery/_positions.py": {"transposed": 1},
    },
}

Law = Callable[[str, str], Iterator[str]]


# room -> the rooms that it may import besides itself; the order of DESIGN is the order of these lines
_SETTINGS = {"_native", "problem", "layout", "settings", "timing", "geometry"}
_TECHNIQUES = {"techniques", "engines", "ops"} | _SETTINGS
_LAYERS = {"functional", "nn", "streaming", "convert", "models"} | _TECHNIQUES
_SURGERY = {"surgery", "analysis"} | _LAYERS
_RUNNING = {"optimize", "export"} | _SURGERY
MAY_IMPORT = {
    "cli": {"bench", "lab", "explain", "report"} | _RUNNING,
    "bench": {"report", "testing"} | _RUNNING,
    "lab": {"report"} | _RUNNING,
    "explain": _RUNNING,
    "optimize": _SURGERY,
    "export": _SURGERY,
    "surgery": {"analysis"} | _LAYERS,
    "analysis": _LAYERS,
    "testing": _TECHNIQUES,
    "models": {"functional", "nn", "streaming"} | _TECHNIQUES,
    "streaming": _TECHNIQUES,
    "convert": _TECHNIQUES,
    "functional": {"techniques"},  # re-exports only
    "nn": {"techniques"},
    "techniques": _TECHNIQUES,
    "engines": {"ops"} | _SETTINGS,
    "ops": _SETTINGS,
    "problem": {"geometry"},
    "layout": {"geometry"},
    "timing": {"geometry"},
    "settings": {"geometry"},
    "_native": {"geometry"},
    "geometry": set(),
    "__init__": {"functional", "nn", "streaming", "techniques", "problem", "settings"},
}


def _room(path: str) -> str:
    """The room of a file of the package."""
    return path.removeprefix(PACKAGE).split("/")[0].removesuffix(".py")


def imports(text: str) -> Iterator[str]:
    """The dotted names that a text imports, inside functions too: of ``from a import b`` it is a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


def _foreign(path: str, text: str) -> Iterator[list[str]]:
    """What a file imports from other rooms, in parts: the room first."""
    for name in imports(text):
        package, *parts = name.split(".")
        if package == "omniconv":
            parts = parts if parts and parts[0] in MAY_IMPORT else ["__init__", *parts]
            if parts[0] != _room(path):
                yield parts


def upward_imports(path: str, text: str) -> Iterator[str]:
    """Imports of rooms that the file's room may not know."""
    assert _room(path) in MAY_IMPORT, f"{path}: a room must have a place in the order of imports"
    for parts in _foreign(path, text):
        if parts[0] not in MAY_IMPORT[_room(path)] and parts != ["__init__", "__version__"]:
            yield f"omniconv.{parts[0]}"


def private_imports(path: str, text: str) -> Iterator[str]:
    """Imports of another room's modules that begin with an underscore."""
    for parts in _foreign(path, text):
        if any(_is_private(parts[:end]) for end in range(2, len(parts) + 1)):
            yield ".".join(parts)


def _is_private(parts: list[str]) -> bool:
    if not parts[-1].startswith("_"):
        return False
    module = REPOSITORY / PACKAGE / "/".join(parts)
    return module.is_dir() or module.with_suffix(".py").exists()


def strings(text: str) -> Iterator[str]:
    """The string literals of a text, those of f-strings too; docstrings are none."""
    tree = ast.parse(text)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


@cache
def _names() -> re.Pattern[str]:
    """A technique's name, alone or at the head of a problem's text."""
    return re.compile(rf"({'|'.join(t.name for t in TECHNIQUES)})([123]d\b.*)?", re.S)


def technique_literals(path: str, text: str) -> Iterator[str]:
    """Techniques known by name: what is done for one is for its record to say. An engine may say its own family's."""
    room, stem = _room(path), Path(path).stem
    if room == "techniques":
        return
    own = set()
    if room == "engines":
        engines = [t.engine for t in TECHNIQUES if t.engine is not None]
        own = {stem, *(engine.name for engine in engines if type(engine).__module__ == f"omniconv.engines.{stem}")}
    for literal in strings(text):
        named = _names().fullmatch(literal)
        if named and named[1] not in own:
            yield named[1]


# as code spells them; prose says AVX-512
_LEVELS = re.compile(
    r"avx2|avx512\w*|isa_(?:base|neon)|kBase|kAvx\w+|kNeon|neon|__AVX\w*__|__SSE\w*__|__F16C__|__FMA__|__ARM\w*|__x86_64__|__aarch64__"
    r"|_mm\d*_\w+|(?:VECTOR_BYTES|lanes)\s*[=!<>]=?\s*(?:16|32|64)\b"
)
MAY_NAME_LEVELS = ("csrc/simd/", "csrc/ops/isa.", PACKAGE + "_native.py", PACKAGE + "bench/peers.py")


def level_literals(path: str, text: str) -> Iterator[str]:
    """Instruction sets by name, and widths of their vectors."""
    if path.startswith(MAY_NAME_LEVELS):
        return
    if path.endswith(".py"):
        for literal in strings(text):
            yield from ("base",) if literal == "base" else _LEVELS.findall(literal)
    else:
        yield from (re.sub(r"\s", "", found) for found in _LEVELS.findall(_without_comments(text)))


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


@cache
def _shared_headers() -> frozenset[str]:
    """Headers that kernels of several families may include: CONTRIBUTING names them."""
    (line,) = re.findall(r"^Shared kernel headers: (.*)$", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.M)
    return frozenset(re.findall(r"`(kernels/\w+\.h)`", line))


def foreign_includes(path: str, text: str) -> Iterator[str]:
    """Includes of what a file's layer may not know: ops → kernels' headers; kernels → their own, the shared, simd/."""
    folder = path.removeprefix("csrc/").rpartition("/")[0]
    family = Path(path).name.split(".")[0].split("_")[0]
    for header in re.findall(r'^\s*#\s*include "([^"]+)"', text, re.M):
        if folder == "ops":
            allowed = header.startswith(("ops/", "kernels/")) or header in ("box.h", "torch_c.h", "simd/denormals.h")
        elif path.endswith(".kernel.cpp"):
            own = re.fullmatch(rf"kernels/{family}(_\w+)?\.h", header)
            allowed = header.startswith("simd/") or own is not None or header in _shared_headers()
        elif folder == "kernels":
            allowed = header.startswith(("simd/", "kernels/"))
        elif folder == "simd":
            allowed = header.startswith("simd/") or header in _shared_headers()
        else:
            allowed = header == "torch_c.h"
        if not allowed:
            yield header


def torch_below_ops(path: str, text: str) -> Iterator[str]:
    """Names of torch's C interface in kernels."""
    if path.startswith(("csrc/kernels/", "csrc/simd/")):
        yield from re.findall(r"\b(?:aoti_)?torch_\w+|\b(?:box|torch_c)\.h\b", _without_comments(text))


PYTHON, NATIVE = "src/omniconv/**/*.py", "csrc/**/*"
LAWS: dict[Law, tuple[str, ...]] = {
    upward_imports: (PYTHON,),
    private_imports: (PYTHON,),
    technique_literals: (PYTHON,),
    level_literals: (PYTHON, "benchmarks/*.py", NATIVE),
    foreign_includes: (NATIVE,),
    torch_below_ops: (NATIVE,),
}


def breaches(law: Law) -> Counter[tuple[str, str]]:
    """By file, what breaks a law, and how often."""
    paths = sorted(p for pattern in LAWS[law] for p in REPOSITORY.glob(pattern) if p.suffix in (".py", ".h", ".cpp"))
    assert paths
    found: Counter[tuple[str, str]] = Counter()
    for path in paths:
        name = str(path.relative_to(REPOSITORY))
        found.update((name, what) for what in law(name, path.read_text()))
    return found


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_nothing_breaks_the_law_but_what_is_listed(law):
    known = Counter({(path, what): n for path, of in EXCEPTIONS.get(law.__name__, {}).items() for what, n in of.items()})
    found = breaches(law)
    assert not found - known, f"{law.__doc__}\n" + "\n".join(f"{path}: {what} × {n}" for (path, what), n in (found - known).items())
    left = "\n".join(f"{path}: {what}, {n} fewer" for (path, what), n in (known - found).items())
    assert not known - found, f"EXCEPTIONS[{law.__name__!r}] must shrink:\n{left}"


def test_every_exception_is_of_a_law():
    assert EXCEPTIONS.keys() <= {law.__name__ for law in LAWS}


def test_geometry_knows_integers_alone():
    known = {"collections.abc", "dataclasses", "itertools", "math", "numbers", "typing"}
    assert {name.rpartition(".")[0] or name for name in imports((REPOSITORY / PACKAGE / "geometry.py").read_text())} <= known


BREAKS: list[tuple[Law, str, str, str]] = [
    (upward_imports, "src/omniconv/layout.py", "def f():\n    from omniconv.techniques import find\n", "omniconv.techniques"),
    (upward_imports, "src/omniconv/analysis/layers.py", "from omniconv import bench\n", "omniconv.bench"),
    (upward_imports, "src/omniconv/surgery/dilate.py", "importlib.import_module('omniconv.cli')\n", "omniconv.cli"),
    (upward_imports, "src/omniconv/nn.py", "import omniconv.ops.layer\n", "omniconv.ops"),
    (private_imports, "src/omniconv/cli/dilate.py", "from omniconv.surgery._layers import rule\n", "surgery._layers.rule"),
    (private_imports, "src/omniconv/cli/dilate.py", "from omniconv.surgery import _layers\n", "surgery._layers"),
    (technique_literals, "src/omniconv/cli/cost.py", "if problem.technique == 'dynamic':\n    pass\n", "dynamic"),
    (technique_literals, "src/omniconv/bench/layers.py", "base = f'standard1d c{channels} i9'\n", "standard"),
    (technique_literals, "src/omniconv/engines/depthwise.py", "paths = {'pointwise': run}\n", "pointwise"),
    (level_literals, "src/omniconv/timing.py", "wide = level == 'base'\n", "base"),
    (level_literals, "src/omniconv/bench/runner.py", "if _native.isa() == 'avx512':\n    pass\n", "avx512"),
    (level_literals, "csrc/kernels/sum.kernel.cpp", "#if VECTOR_BYTES == 64\n#endif\n", "VECTOR_BYTES==64"),
    (level_literals, "csrc/ops/depthwise.cpp", "if (isa() == kAvx2) return;  // AVX2\n", "kAvx2"),
    (foreign_includes, "csrc/ops/depthwise.cpp", '#include "simd/vec.h"\n', "simd/vec.h"),
    (foreign_includes, "csrc/kernels/sum.kernel.cpp", '#include "kernels/gemm.h"\n', "kernels/gemm.h"),
    (foreign_includes, "csrc/kernels/gemm.h", '#include "ops/thread.h"\n', "ops/thread.h"),
    (foreign_includes, "csrc/kernels/gemm.h", '#include "box.h"\n', "box.h"),
    (torch_below_ops, "csrc/kernels/sum.kernel.cpp", "torch_parallel_for(0, n, 1, f, nullptr);\n", "torch_parallel_for"),
]


@pytest.mark.parametrize(("law", "path", "text", "what"), BREAKS, ids=[f"{law.__name__} {what}" for law, _, _, what in BREAKS])
def test_a_break_is_seen(law, path, text, what):
    assert list(law(path, text)) == [what]


LAWFUL: list[tuple[Law, str, str]] = [
    (upward_imports, "src/omniconv/cli/cost.py", "from omniconv.bench import report\n"),
    (private_imports, "src/omniconv/surgery/dilate.py", "from omniconv.surgery import _layers\n"),
    (private_imports, "src/omniconv/engines/depthwise.py", "from omniconv import _native\n"),
    (technique_literals, "src/omniconv/cli/cost.py", "def f():\n    'dynamic'\n    export(dynamic=True, to='dynamic kernels')\n"),
    (technique_literals, "src/omniconv/techniques/dynamic.py", "name = 'dynamic'\n"),
    (technique_literals, "src/omniconv/engines/depthwise.py", "family = 'depthwise'\n"),
    (level_literals, "src/omniconv/analysis/slow_paths.py", "why = 'channels do not fill a vector of AVX-512'\n"),
    (level_literals, "csrc/simd/vec.h", "#if defined(__AVX2__)\n#endif\n"),
    (foreign_includes, "csrc/kernels/dynamic_grad.kernel.cpp", '#include "kernels/dynamic_apply.h"\n#include "simd/vec.h"\n'),
    (foreign_includes, "csrc/ops/dynamic.cpp", '#include <vector>\n#include "kernels/dynamic.h"\n#include "box.h"\n'),
    (torch_below_ops, "csrc/ops/thread.h", "torch_parallel_for(0, n, 1, f, nullptr);\n"),
]


@pytest.mark.parametrize(("law", "path", "text"), LAWFUL, ids=lambda v: v.__name__ if callable(v) else v)
def test_what_is_lawful_passes(law, path, text):
    assert not list(law(path, text))
