"""A run, however it ends, leaves the model and what torch keeps beside it as they were."""

import os
import random
import signal
import sys
from contextlib import suppress

import numpy
import pytest
import torch
from torch import nn

from omniconv.analysis import cost, untouched
from omniconv.analysis.cost import engine, recorder
from omniconv.analysis.cost.modules import Modules
from omniconv.nn import DeformConv2d, DepthwiseConv2d

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called")


class Trouble(nn.Module):
    """Raises what it is told to, in the forward or in the backward pass."""

    def __init__(self):
        super().__init__()
        self.forwards = self.backwards = None
        self.seen = []
        self.asks_data = False

    def forward(self, x):
        self.seen.append(1)
        if self.asks_data and x.sum().item() > 1e9:
            return x
        if self.forwards is not None:
            raise self.forwards
        return Raises.apply(x, self.backwards)


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        if ctx.error is not None:
            raise ctx.error
        return grad_y, None


def network():
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        DepthwiseConv2d(8, 3),
        DeformConv2d(8, 8, 3, padding=1),
        nn.Dropout(),
        Trouble(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )
    made[4].eval()
    made[1].register_forward_hook(lambda module, inputs, y: y * 2)
    made[0].weight.grad = torch.ones_like(made[0].weight)
    made[7].bias.requires_grad_(False)
    return made


def state(model):
    """Everything that has to be the same afterwards; tensors by identity and by number."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": [(n, id(t), t.requires_grad, t.detach().clone()) for n, t in tensors],
        "grads": [(n, t.grad if t.grad is None else (id(t.grad), t.grad.clone())) for n, t in tensors],
        "training": [m.training for m in model.modules()],
        "hooks": [{name: dict(getattr(m, name)) for name in HOOKS} for m in model.modules()],
        "attributes": [[(k, id(v)) for k, v in vars(m).items()] for m in model.modules()],
        "books": [[list(m._parameters), list(m._buffers), list(m._modules)] for m in model.modules()],
        "seen": [list(m.seen) for m in model.modules() if isinstance(m, Trouble)],
        "torch": (
            torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(), random.getstate(), *numpy.random.get_state()[1:],
        ),
    }  # fmt: skip


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(model, before):
    after = state(model)
    for name in before:
        assert same(before[name], after[name]), name


def test_the_comparison_sees_changes():
    changes = [
        lambda m: m.eval(),
        lambda m: m[1](torch.ones(2, 8, 3, 3)),
        lambda m: m[2].register_forward_pre_hook(print),
        lambda m: m[0].weight.data.add_(1),
        lambda m: setattr(m[0].weight, "grad", None),
        lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach().clone())),
        lambda m: torch.rand(1),
        lambda m: random.random(),
        lambda m: m[7].bias.requires_grad_(),
        lambda m: m[5].seen.append(1),
    ]
    for change in changes:
        model = network()
        before = state(model)
        change(model)
        with pytest.raises(AssertionError):
            assert_untouched(model, before)


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("asks_data", [False, True])
def test_a_count_changes_nothing(asks_data, backward):
    model = network()
    model[5].asks_data = asks_data
    before = state(model)
    found = cost(model, X, backward=backward)
    assert any("on data" in note for note in found.notes) == asks_data
    assert_untouched(model, before)
    assert X.grad is None


@pytest.mark.parametrize("asks_data", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("stage", ["forwards", "backwards"])
def test_errors_of_the_model(stage, error, asks_data):
    model = network()
    model[5].asks_data = asks_data
    setattr(model[5], stage, error)
    before = state(model)
    if isinstance(error, RuntimeError):
        found = cost(model, X, backward=True)
        assert found.status["macs_dense"] == "lower_bound"
        assert found.params == sum(p.numel() for p in model.parameters())
        assert any("no" in note and ("'5' (Trouble)" in note or stage == "backwards") for note in found.notes)
    else:
        with pytest.raises(type(error)):
            cost(model, X, backward=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("place", "name", "at"),
    [
        (engine, "_without_data", 1),
        (engine, "_totals", 1),
        (engine, "_tree", 1),
        (recorder, "work_of", 1),
        (recorder, "work_of", 9),
        (recorder, "op_cost", 1),
        (recorder.Memory, "see", 5),
        (recorder.Recorder, "_gradients", 1),
        (Modules, "_entered", 3),
        (Modules, "_left", 3),
        (Modules, "__exit__", 1),
        (engine._Run, "_gradients", 1),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_errors_at_every_stage_of_the_count(monkeypatch, place, name, at, error):
    real, calls = getattr(place, name), []
    static = isinstance(vars(place).get(name), staticmethod)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) >= at:
            raise error("broken off")
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, staticmethod(failing) if static else failing)
    model = network()
    before = state(model)
    with suppress(error):
        cost(model, X, backward=True)
    assert len(calls) >= at
    assert_untouched(model, before)


class NoCopy(nn.Module):
    """A part that cannot be copied, as one that holds a lock."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def forward(self, x):
        self.last = x
        return self.inner(x)


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("asks_data", [False, True])
def test_what_has_no_copy_runs_under_guard(asks_data, error):
    model = NoCopy()
    model.inner[5].asks_data, model.inner[5].forwards = asks_data, error
    before = state(model) | {"seen": []}
    try:
        found = cost(model, X, backward=True)
        assert found.macs_dense == 0 or found.params == sum(p.numel() for p in model.parameters())
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    after = state(model) | {"seen": []}
    for name in before:
        assert same(before[name], after[name]), name


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_guard_puts_everything_back(error):
    model = network()
    before = state(model)
    try:
        with untouched(model):
            model.eval()
            model.requires_grad_(False)
            model[1].train()(torch.ones(2, 8, 3, 3))
            for part in model:
                part.register_forward_hook(print)
                part.register_full_backward_hook(print)
            model[0].weight.data.mul_(3)
            model[0].weight.grad.zero_()
            model[7].weight.grad = torch.ones_like(model[7].weight)
            del model[3].weight
            model[3].weight = nn.Parameter(torch.zeros(1))
            model[0].register_buffer("more", torch.ones(1))
            model.append(nn.ReLU())
            model[2].said = 1
            torch.rand(3), random.random(), numpy.random.rand()
            torch.set_num_threads(torch.get_num_threads() + 1)
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
            torch.set_autocast_enabled("cpu", True)
            torch.backends.mha.set_fastpath_enabled(False)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert_untouched(model, before)


def test_an_interruption_waits_until_all_is_back(monkeypatch):
    """Ctrl-C while things are being put back."""
    guard = sys.modules["omniconv.analysis.untouched"]
    set_back = guard._set_back

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        set_back(*args)

    monkeypatch.setattr(guard, "_set_back", interrupted)
    model = network()
    before = state(model)

    def changed():
        with untouched(model):
            for part in model.modules():
                part.train(not part.training)
                part.register_forward_hook(print)

    with pytest.raises(KeyboardInterrupt):
        changed()
    assert_untouched(model, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_weights_may_be_left_out():
    model = nn.Linear(2, 2)
    with untouched(model, weights=False):
        model.weight.data.zero_()
    assert not model.weight.any()
