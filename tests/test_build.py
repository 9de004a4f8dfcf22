"""The build succeeds and says so where there is no compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


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
