"""The native library: it is there, exports one function, wants the stable C ABI alone; levels; life without it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import REPOSITORY

from omniconv import _native

CSRC = REPOSITORY / "csrc"


def test_the_library_is_there():
    """A silent fall-back would pass every other test."""
    assert _native.AVAILABLE, _native.WHY_ABSENT


compiler = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(compiler is None, reason="there is no compiler")
def test_our_declarations_are_torchs(tmp_path):
    """Both headers in one translation unit: a signature that differs is a compile error."""
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "agree.cpp"

    def compiles(ours: str) -> bool:
        source.write_text(
            "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n"
            + ours.replace("#pragma once", "")
        )
        command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{include}/torch/csrc/api/include", str(source)]
        return subprocess.run(command, capture_output=True).returncode == 0

    ours = (CSRC / "torch_c.h").read_text()
    assert compiles(ours)
    wrong = ours.replace("torch_parallel_for(int64_t", "torch_parallel_for(int32_t")
    assert wrong != ours
    assert not compiles(wrong)


def library() -> str:
    return os.environ.get("OMNICONV_LIBRARY") or find_spec("omniconv._library").origin


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_library_exports_one_function_and_wants_only_the_stable_abi():
    lines = subprocess.run(["nm", "-D", library()], capture_output=True, text=True, check=True).stdout.splitlines()
    defined = {line.split()[-1] for line in lines if " T " in line or " D " in line or " B " in line}
    assert defined == {"omniconv_isa"}
    wanted = {line.split()[-1] for line in lines if " U " in line}
    torchs = {name for name in wanted if "torch" in name}
    assert torchs <= set(re.findall(r"\b((?:aoti_)?torch_[a-z0-9_]+)\(", (CSRC / "torch_c.h").read_text()))
    assert not {name for name in wanted if name.startswith(("_ZN2at", "_ZN3c10", "Py", "GOMP"))}


@pytest.mark.skipif(compiler is None or shutil.which("nm") is None, reason="there is no compiler")
@pytest.mark.parametrize("kernel", sorted(CSRC.glob("kernels/*.kernel.cpp")), ids=lambda p: p.name)
def test_a_kernel_object_exports_its_table_alone(kernel, tmp_path):
    """Anything else could be merged with the copy of another instruction set, and die of an illegal instruction."""
    made = tmp_path / "kernel.o"
    command = [
        compiler,
        "-std=gnu++17",
        "-O0",  # nothing is hidden by being inlined
        "-fno-exceptions",
        "-fno-rtti",
        "-Wno-psabi",
        "-DISA=isa_base",
        "-DVECTOR_BYTES=16",
        f"-I{CSRC}",
        "-c",
    ]
    subprocess.run([*command, str(kernel), "-o", str(made)], check=True, capture_output=True)
    lines = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout.splitlines()
    exported = [line.split(maxsplit=2)[-1] for line in lines if re.search(r" [A-TV-Z] ", line)]
    family = kernel.name.removesuffix(".kernel.cpp")
    assert exported
    assert all(re.fullmatch(rf"omniconv::isa_base::{family}(_grad)?", name) for name in exported)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_environment_caps_the_level():
    code = "from omniconv import _native; print(_native.isa(), len(_native.levels()))"
    assert python(code, OMNICONV_ISA="base").stdout.split() == ["base", "1"]
    assert "OMNICONV_ISA must be one of base, avx2, avx512, got 'sse'" in python(code, OMNICONV_ISA="sse").stderr


def test_a_library_that_cannot_load_is_one_warning_and_the_composite_path(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    call = "f(torch.ones(1, 1, 3), torch.ones(1, 1, 3)).item()"
    code = f"import torch, omniconv; from omniconv.functional import depthwise_conv1d as f; print({call})"
    done = python(code, OMNICONV_LIBRARY=str(broken))
    assert done.stdout.strip() == "3.0", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "cannot be loaded" in done.stderr
