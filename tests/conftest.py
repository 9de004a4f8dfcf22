import pytest
import torch

from omniconv import _native


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
