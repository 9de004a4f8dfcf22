from functools import partial

import pytest
import torch
from bench_rows import PEAKS

from omniconv import _native
from omniconv.bench import peers, runner
from omniconv.timing import alternate


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(params=_native.LEVELS)
def level(request):
    """Every instruction set that the machine has."""
    if request.param not in _native.levels():
        pytest.skip(f"this machine has no {request.param}")
    with _native.at_level(request.param):
        assert _native.isa() == request.param
        yield request.param


@pytest.fixture
def quick_bench(monkeypatch):
    """One short sample of everything on a machine with known peaks, without the runtimes that may be installed here."""
    monkeypatch.setattr(runner, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))
    monkeypatch.setattr(runner, "COLD_ROUNDS", (1, 1))
    monkeypatch.setattr(runner, "measure_peaks", lambda double: PEAKS)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
