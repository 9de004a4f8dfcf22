"""The build: it succeeds and says so where there is no compiler; a sanitizer's build sees what it is for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import REPOSITORY


def configure(into: Path, **environment: str) -> str:
    command = ["cmake", "-S", str(REPOSITORY), "-B", str(into)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="there is no cmake or no compiler")
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    """And a compiler that comes later is found."""
    says = "omniconv: no C++ compiler found; building without native kernels"
    assert says in configure(tmp_path, CC="false", CXX="false")
    assert says not in configure(tmp_path)


SHORT = """
import ctypes, torch
from omniconv.functional import depthwise_conv2d
x = torch.zeros(1, 32, 40, 40).to(memory_format=torch.channels_last)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
memory = (ctypes.c_float * x.numel()).from_address(libc.malloc(4 * x.numel() - 4))
x = torch.frombuffer(memory, dtype=torch.float32).as_strided(x.shape, x.stride())
depthwise_conv2d(x, torch.ones(32, 1, 3, 3), padding=1)
"""


@pytest.mark.skipif("asan" not in os.environ.get("LD_PRELOAD", ""), reason="for `make sanitize`")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_the_sanitizers_are_there(isa):
    """An input whose memory is four bytes short is read once too far, by a vector."""
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "OMNICONV_ISA": isa}
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode
    assert "AddressSanitizer" in done.stderr
    assert "depthwise_nhwc.kernel.cpp" in done.stderr
    assert b"__ubsan_handle" in Path(os.environ["OMNICONV_LIBRARY"]).read_bytes()
