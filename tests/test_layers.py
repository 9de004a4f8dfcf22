"""Every layer: its op, its parameters, copies, files, devices, dtypes, and the layers of torch.nn that it stands for."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import (
    all_cases,
    constructor_call,
    few_cases,
    layer_input,
    on,
    one_case_per_op,
)

from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES
from omniconv.testing import verify_layer


def assert_same_layer(a, b, x):
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert torch.equal(a(x), b(x))


@on(all_cases())
def test_forward_is_the_op_on_its_operands(technique, problem):
    layer, x = technique.layer(problem), layer_input(problem)
    assert type(layer) is technique.modules[problem.rank]
    assert (layer.technique, layer.rank) == (technique.name, problem.rank)
    y = layer(x)
    assert y.shape == technique.output_shape(problem)
    assert torch.equal(y, technique.ops[problem.rank](**layer.operands(x)))


@on(few_cases())
def test_is_right(technique, problem):
    """Under the bound, in three dtypes."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer, x = technique.layer(problem).to(dtype), layer_input(problem).to(dtype)
        assert verify_layer(layer, x) <= 1


@on(all_cases())
def test_parameters_are_counted(technique, problem):
    assert sum(p.numel() for p in technique.layer(problem).parameters()) == technique.cost(problem).params


@on(one_case_per_op())
def test_bias_off(technique, problem):
    """``bias=False`` takes the bias of the result away; a record without biases counts none at all."""
    cls, arguments = constructor_call(technique, problem)
    with_bias, without = (cls(**arguments | {"bias": b}) for b in (True, False))
    gone = with_bias.state_dict().keys() - without.state_dict().keys()
    assert gone
    assert all(key.split(".")[-1] == "bias" for key in gone)
    assert repr(with_bias) != repr(without)
    assert without(layer_input(problem)).shape == technique.output_shape(problem)


@on(one_case_per_op())
def test_every_parameter_gets_a_gradient(technique, problem):
    layer = technique.layer(problem)
    layer(layer_input(problem)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.shape == p.shape


@on(one_case_per_op())
def test_fresh_parameters_are_finite_and_seeded(technique, problem):
    layers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layers.append(technique.layer(problem).state_dict())
    assert all(torch.equal(layers[0][k], layers[1][k]) for k in layers[0])
    assert any(not torch.equal(layers[0][k], layers[2][k]) for k in layers[0])
    assert all(v.isfinite().all() for v in layers[0].values())


@on(few_cases())
def test_copies_and_files(technique, problem):
    layer, x = technique.layer(problem), layer_input(problem)
    assert_same_layer(copy.deepcopy(layer), layer, x)
    assert_same_layer(pickle.loads(pickle.dumps(layer)), layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_same_layer(torch.load(file, weights_only=False), layer, x)


@on(few_cases())
def test_copies_do_not_share(technique, problem):
    layer, x = technique.layer(problem), layer_input(problem)
    before = layer(x)
    for p in copy.deepcopy(layer).parameters():
        p.data.fill_(7)
    assert torch.equal(layer(x), before)


@on(few_cases())
def test_state_dict_round_trip(technique, problem):
    """Through a file that holds tensors alone, into a layer with other numbers."""
    torch.manual_seed(1)
    layer, x = technique.layer(problem), layer_input(problem)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(2)
    other = technique.layer(problem)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_layer(other, layer, x)


@on(few_cases())
def test_dtypes(technique, problem):
    x = layer_input(problem)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer = technique.layer(problem).to(dtype)
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


@on(one_case_per_op())
def test_training_and_evaluation_agree(technique, problem):
    """Nothing is random by default, and nothing is learnt from being called."""
    layer, x = technique.layer(problem), layer_input(problem)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@on(one_case_per_op())
def test_without_a_batch_axis(technique, problem):
    layer, x = technique.layer(problem).double(), layer_input(problem).double()
    for i in range(problem.batch):
        assert torch.equal(layer(x[i]), layer(x[i : i + 1])[0])


@on(one_case_per_op())
def test_device_and_dtype(technique, problem):
    """Both are keywords, and the surrounding ``torch.device`` counts too."""
    cls, arguments = constructor_call(technique, problem)
    made = cls(**arguments | {"device": "meta", "dtype": torch.float64})
    assert list(made.parameters())
    assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in made.parameters())
    assert made(layer_input(problem).to("meta", torch.float64)).shape == technique.output_shape(problem)
    with torch.device("meta"):
        assert all(p.is_meta for p in technique.layer(problem).parameters())
    real = made.to_empty(device="cpu")
    real.load_state_dict(cls(**arguments, dtype=torch.float64).state_dict(), strict=True)
    assert real(layer_input(problem).double()).isfinite().all()


@on(one_case_per_op())
def test_functional_call_and_ensembles(technique, problem):
    """Several layers of one shape as one, mapped over their stacked parameters."""
    x = layer_input(problem).double()
    layers = [technique.layer(problem).double() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(layers)

    def run(p, b):
        return torch.func.functional_call(layers[0], (p, b), (x,))

    y = torch.func.vmap(run)(params, buffers)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]), rtol=1e-12, atol=1e-12)


CHANGES = {
    "kernel": lambda p: tuple(k + 2 for k in p.kernel),
    "stride": lambda p: tuple(s + 1 for s in p.stride),
    "padding": lambda p: ((7, 7),) * p.rank,
    "dilation": lambda p: tuple(d + 1 for d in p.dilation),
    "padding_mode": lambda p: "replicate",
    "out_channels": lambda p: 12,
    "groups": lambda p: 3,
    "multiplier": lambda p: 3 * p.channels,
    "heads": lambda p: 6,
    "offset_groups": lambda p: 6,
    "output_padding": lambda p: (1,) * p.rank,
    "channels": lambda p: 24,
}


def test_every_setting_of_a_problem_can_be_changed():
    fields = {name for t in TECHNIQUES for name in t.takes} | {"channels"}
    assert fields <= CHANGES.keys()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_repr_tells_layers_apart(technique, rank):
    """Any setting that makes another layer makes another line."""
    if rank not in technique.ranks:
        return
    changeable = technique.takes | {"channels"}
    plain = {"out_channels": 6, "stride": (2,) * rank, "kernel": (3,) * rank, "padding": ((2, 2),) * rank}
    base = Problem(technique.name, 12, (9,) * rank, **{k: v for k, v in plain.items() if k in technique.takes})
    technique.check(base)
    seen = {repr(technique.layer(base)): "nothing"}
    for name in sorted(changeable):
        line = repr(technique.layer(technique.check(base.replace(**{name: CHANGES[name](base)}))))
        assert line not in seen, f"{name} looks like {seen[line]}"
        seen[line] = name


@on(one_case_per_op())
def test_repr_shows_the_activation(technique, problem):
    cls, arguments = constructor_call(technique, problem)
    for name in inspect.signature(cls).parameters:
        if name.endswith("activation"):
            assert "silu" in repr(cls(**arguments | {name: "silu"})), name


def torch_base(cls):
    """The layer of torch.nn that a class derives from, if any."""
    return next((b for b in cls.__mro__ if b.__module__ == "torch.nn.modules.conv" and not b.__name__.startswith("_")), None)


def test_some_layers_are_torchs():
    assert sum(torch_base(cls) is not None for t in TECHNIQUES for cls in t.modules.values()) >= 6


@on([(t, p) for t, p in few_cases() if torch_base(t.modules[p.rank])])
def test_state_dicts_are_exchanged_with_torch(technique, problem):
    layer, x = technique.layer(problem), layer_input(problem)
    base = torch_base(type(layer))
    numbers = all(isinstance(p, int) for p in layer.padding)
    extra = {"output_padding": layer.output_padding} if any(layer.output_padding) else {}
    theirs = base(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding if numbers else 0,
        groups=layer.groups, dilation=layer.dilation, padding_mode=layer.padding_mode, **extra,
    )  # fmt: skip
    assert isinstance(layer, base)
    assert issubclass(base, torch.nn.Module)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    if numbers:
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.nn.init.normal_(layer.weight)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    if numbers:
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)


def namesakes():
    classes = [cls for t in TECHNIQUES for cls in t.modules.values()]
    return [cls for cls in classes if hasattr(torch.nn, cls.__name__)]


@pytest.mark.parametrize("cls", namesakes(), ids=lambda cls: cls.__name__)
def test_namesakes_take_torchs_arguments(cls):
    """Same names, order, defaults and kinds; what is added is keyword-only."""
    theirs = list(inspect.signature(getattr(torch.nn, cls.__name__)).parameters.values())
    ours = list(inspect.signature(cls).parameters.values())
    for a, b in zip(theirs, ours, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_constructors_end_in_device_and_dtype(technique):
    for cls in technique.modules.values():
        parameters = inspect.signature(cls).parameters
        assert parameters["device"].default is None
        assert parameters["dtype"].default is None
        assert "bias" in parameters
