"""What a text names: found, made the same every time, and refused in one line where it cannot be had."""

import random
import sys
import warnings
from importlib import import_module

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import omniconv
from omniconv.analysis import _models, onnx_file, targets
from omniconv.analysis.targets import Input, load, read_problem

NETS = '''
"""A module of the user."""
import sys
from dataclasses import dataclass
import torch
from torch import nn
from beside import WIDTH

print("prints at import")

@dataclass
class Setting:
    width: int = WIDTH

class Net(nn.Sequential):
    def __init__(self, width=WIDTH, sizes=(3, 3)):
        print("prints when made")
        super().__init__(nn.Conv2d(3, width, sizes[0]), nn.Dropout())
    @classmethod
    def wide(cls):
        return cls(64)

class Lit(Net):
    example_input_array = torch.zeros(2, 3, 9, 9, dtype=torch.float64)

class Keyed(Net):
    example_input_array = {"input": torch.zeros(1, 3, 5, 5), "mask": torch.zeros(1, 5, dtype=torch.bool)}

def build(**settings):
    return Net(**settings)

def half():
    return Net().bfloat16()

def raises():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    sys.exit(3)

def lazily():
    import lazy
    return lazy.made()

def gives_a_dict():
    return {}

net = nn.Dropout()
net.train()
number = 7
'''


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A current directory with code of the user's."""
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    (tmp_path / "lazy.py").write_text("from torch import nn\ndef made(): return nn.ReLU()")
    (tmp_path / "broken.py").write_text("import no_such_package")
    (tmp_path / "wrong.py").write_text("def f(:")
    (tmp_path / "leaving.py").write_text("raise SystemExit('usage: me')")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def importable(package):
    """Skips where a package is missing or, as torchvision for another torch, does not import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(package)
    except Exception as error:
        pytest.skip(f"{package}: {error}")


def weights(target):
    return list(target.network().state_dict().values())


@pytest.mark.parametrize("place", ["mynets", "mynets.py", "{folder}/mynets.py"])
def test_a_factory_of_the_users(user, monkeypatch, tmp_path_factory, place, capsys):
    text = f"{place.format(folder=user)}:build(width=6, sizes=(5, 1))"
    if "folder" in place:
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    path, state = list(sys.path), torch.get_rng_state()
    target = load(text, input="1x3x8x8")
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)
    assert (target.kind, target.text, target.problem) == ("module", text, None)
    assert target.network() is target.module
    assert not target.module.training
    assert not target.module[1].training
    assert target.module[0].weight.shape == (6, 3, 5, 5)
    (x,), keywords = target.example_inputs()
    assert keywords == {}
    assert (x.shape, x.dtype) == ((1, 3, 8, 8), torch.float32)
    assert x.std() > 0.5
    assert target.module(x).shape == (1, 6, 4, 4)
    torch.rand(3)
    again = load(text, input="1x3x8x8")
    assert all(torch.equal(a, b) for a, b in zip(weights(target), weights(again), strict=True))
    assert torch.equal(again.example_inputs()[0][0], x)
    out, err = capsys.readouterr()
    assert out == ""
    assert "prints when made" in err


def test_classes_methods_modules_and_what_they_say_of_their_inputs(user):
    assert load("mynets:Net.wide", input="1x3x4x4").module[0].out_channels == 64
    assert load("mynets:lazily", input="3").module(torch.tensor([-1.0])) == 0
    (x,), _ = load("mynets:half", input="1x3x4x4").example_inputs()
    assert x.dtype == torch.bfloat16
    (x,), _ = load("mynets:Lit").example_inputs()
    assert (x.shape, x.dtype) == ((2, 3, 9, 9), torch.float64)
    args, keywords = load("mynets:Keyed").example_inputs()
    assert args == ()
    assert {name: (tuple(x.shape), x.dtype) for name, x in keywords.items()} == {
        "input": ((1, 3, 5, 5), torch.float32),
        "mask": ((1, 5), torch.bool),
    }
    copied = load("mynets:net", input="3").module
    assert not copied.training
    assert sys.modules["mynets"].net.training, "a module of the user's stays as it is"


def test_inputs(user):
    assert Input.parse("1x128:int64") == Input((1, 128), "i64")
    assert str(Input.parse("mask=1x128:bool")) == "mask=1x128:bool"
    assert Input.parse("7") == Input((7,))
    args, keywords = load("mynets:Net", input=["1x3x8x8:f16", "0x2", "ids=1x5:i64"]).example_inputs()
    assert [(tuple(x.shape), x.dtype) for x in args] == [((1, 3, 8, 8), torch.float16), ((0, 2), torch.float32)]
    assert keywords["ids"].tolist() == [[0] * 5]
    with torch.device("meta"):
        made = nn.Linear(3, 3)
    target = targets.Target("", "module", "", (Input((2, 3)),), module=made)
    assert target.example_inputs()[0][0].is_meta


@pytest.mark.parametrize("text", ["", "1x", "x3", "1,3", "1x3:f8", "1x-3", "3=1x3", "1x3:", "1.5x3", "1x9999999999"])
def test_malformed_inputs(text):
    with pytest.raises(ValueError, match=r"^cost: .* must be .*, got "):
        load("torch.nn:ReLU", input=text, caller="cost")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mynets:buidl", "target: the factory must be a function or class of 'mynets', got 'buidl' (near: build)"),
        ("mynets:xyz", "(it has Setting, Net, Lit, Keyed, build, half, raises, leaves)"),
        ("mynets:raises", "target: the factory 'raises' must return a module, got RuntimeError: first line"),
        ("mynets:leaves", "got SystemExit: 3"),
        ("mynets:gives_a_dict", "must return a torch.nn.Module, got a dict"),
        ("mynets:number", "target: the factory must be a function or class, got 'number', a int"),
        ("mynets:net(width=3)", "arguments must go to a function or class, got the module 'net'"),
        ("mynets:build(depth=3)", "got TypeError: Net.__init__() got an unexpected keyword argument 'depth'"),
        ("mynets:build", "there must be an input (as --input 1x3x224x224) where the module states none, got 'mynets:build'"),
        ("broken:f", "target: the module 'broken' must import, got ModuleNotFoundError: No module named 'no_such_package'"),
        ("broken.py:f", "the file 'broken.py' must import, got ModuleNotFoundError: No module named 'no_such_package'"),
        ("wrong:f", "got SyntaxError: "),
        ("leaving:f", "got SystemExit: usage: me"),
        ("absent:f", "target: the module must be in the current directory or installed, got 'absent'"),
        ("absent.py:f", "target: the file must exist, got 'absent.py'"),
        ("torch.absent:f", "got 'torch.absent'"),
        ("a-b:f", "what stands before the colon must be a module"),
        (":f", "what stands before the colon must be a module"),
        ("mynets:", "a factory must be a name"),
        ("mynets:build(3)", "literal keyword arguments"),
        ("mynets:build(**{'width': 3})", "literal keyword arguments"),
        ("mynets:build(width=open('x'))", "literal keyword arguments"),
        ("mynets:build(width=3", "literal keyword arguments"),
        ("mynets:build(width=3)(4)", "literal keyword arguments"),
        ("mynets:build()+1", "literal keyword arguments"),
        ("mynets:1", "the factory must be a function or class of 'mynets', got '1'"),
        ("mynets", "the target must be package.module:factory, file.py:factory, timm:NAME"),
        ("", "the target must be"),
        ("net.pth", "weights must come with the code that makes their module"),
        ("net.pt2", "the file must exist, got 'net.pt2'"),
        ("net.onnx", "the file must exist, got 'net.onnx'"),
        ("mynets.py/x.pt2", "the file must exist"),
        ("standart c6 i7 k3", "got 'standart' (near: standard)"),
        ("standard2d c6", "the text must have a i<size> token"),
        ("standard c6 i7x7x7x7", "1|2|3"),
        ("lightweight c6 i7x7", "the rank must be one of 1, got 2"),
        ("depthwise2d c6 i7 k3 s0", "at least 1"),
    ],
)
def test_refusals_are_one_line(user, text, said):
    with pytest.raises(ValueError, match=r"must|needs") as refusal:
        load(text)
    assert said in str(refusal.value)
    assert str(refusal.value).startswith("target: ")
    assert "\n" not in str(refusal.value)
    assert ", got " in str(refusal.value)


def test_a_file_that_fails_leaves_no_module_behind(user):
    before = set(sys.modules)
    for name in ("broken", "leaving"):
        with pytest.raises(ValueError, match="must import"):
            load(f"{name}.py:f")
    assert not [name for name in sys.modules if name.startswith("_omniconv_target") and name not in before]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("standard n1 c64-128 i56 k3 p1", "standard2d n1 c64-128 i56 k3 p1"),
        ("standard c8 i8x9x10 k3", "standard3d n1 c8 i8x9x10 k3"),
        ("standard c8 i9 k3x1", "standard2d n1 c8 i9 k3x1"),
        ("depthwise c8 i9 k3 p1+0x2x0", "depthwise3d n1 c8 i9 k3 p1+0x2x0"),
        ("transposed c8 i9 k4 s2 op1x0", "transposed2d n1 c8 i9 k4 s2 op1x0"),
        ("dynamic c8 i9 k3 h2", "dynamic1d n1 c8 i9 k3 h2"),
        ("lightweight1d c8 i9 k3 h2 # of 2019", "lightweight1d n1 c8 i9 k3 h2"),
        ("standard2d c8 i9 mode:reflect k3 p1 dt:bf16 cl", "standard2d n1 c8 i9 k3 p1 mode:reflect dt:bf16 cl"),
    ],
)
def test_problems(text, expected):
    assert str(read_problem(text)) == expected
    target = load(text)
    assert (target.kind, str(target.problem), target.module) == ("problem", expected, None)
    (x,), _ = target.example_inputs()
    y = target.network()(x)
    assert x.shape == (target.problem.batch, target.problem.channels, *target.problem.size)
    assert x.dtype == target.problem.torch_dtype
    assert torch.equal(target.network()(x), y), "weights are the same every time"
    if target.problem.channels_last:
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_problem_takes_no_inputs():
    with pytest.raises(ValueError, match="a problem must come without inputs, which it has of itself, got '1x3'"):
        load("standard2d c64 i56", input="1x3")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = omniconv.nn.DepthwiseConv2d(8, 3)

    def forward(self, x, *, scale):
        return self.head(self.stem(x)) * scale


def test_exported_programs(tmp_path, user):
    x, scale = torch.randn(2, 3, 8, 8), torch.ones(1)
    module = Block().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (x,), {"scale": scale}), tmp_path / "net.pt2")
    target = load("net.pt2")
    assert target.kind == "program"
    assert [str(i) for i in target.inputs] == ["2x3x8x8:f32", "scale=1:f32"]
    assert {name for name, _ in target.module.named_modules()} >= {"stem", "stem.0", "head"}, "the hierarchy is rebuilt"
    args, keywords = target.example_inputs()
    assert torch.allclose(target.module(*args, **keywords), module(*args, **keywords))
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"must hold a program of torch.export.save, got 'bad.pt2' \("):
        load("bad.pt2")


def test_onnx_files(tmp_path, user):
    def save(*sizes):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        w = helper.make_tensor("w", TensorProto.FLOAT, (4, 3, 3, 3), [0.0] * 108)
        graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [w])
        onnx.save(helper.make_model(graph), tmp_path / "net.onnx")

    save("N", 3, 8, 8)
    target = load("net.onnx")
    assert (target.kind, target.inputs) == ("onnx", (Input((1, 3, 8, 8), "f32", "x"),))
    assert load("net.onnx", input="5x3x8x8").inputs[0].shape == (5, 3, 8, 8)
    assert load("net.onnx", input="x=5x3x8x8").inputs[0].shape == (5, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^target: it must be something that runs in torch, got 'net.onnx'"):
        load("net.onnx").network()
    for wrong in ("5x4x8x8", "5x3x8", "y=5x3x8x8"):
        with pytest.raises(ValueError, match="must be"):
            load("net.onnx", input=wrong)
    with pytest.raises(ValueError, match="too many"):
        load("net.onnx", input=["1x3x8x8", "1x3x8x8"])
    save("N", 3, "H", 8)
    with pytest.raises(ValueError, match=r"got no size of axis 2 of 'x' \(1x3x\?x8\)"):
        load("net.onnx")
    assert load("net.onnx", input="1x3x9x8").inputs[0].shape == (1, 3, 9, 8)
    for content in (b"", bytes(random.Random(0).randrange(256) for _ in range(99))):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"must hold an ONNX model, got 'bad\.onnx'"):
            load("bad.onnx")


@pytest.mark.parametrize(("text", "package"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_a_missing_package_names_its_extra(monkeypatch, text, package):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_models, "import_module", missing)
    with pytest.raises(
        ValueError, match=rf'{package}:NAME needs the extra \'models\' \(pip install "omniconv\[models\]"\), got no'
    ):
        load(text)


def test_a_package_that_does_not_import(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(_models, "import_module", broken)
    with pytest.raises(ValueError, match=r"^target: timm must import, got RuntimeError: operator torchvision::nms does not exist$"):
        load("timm:resnet18")


def test_onnx_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"an ONNX file needs the extra 'onnx' \(pip install \"omniconv\[onnx\]\"\), got no onnx"):
        onnx_file.read_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "inputs", "params"),
    [
        ("timm:resnet18", ["1x3x224x224"], 11_689_512),
        ("timm:resnet18.a1_in1k(num_classes=10)", ["1x3x224x224"], 11_181_642),
        ("timm:inception_v3", ["1x3x299x299"], 23_834_568),
        ("torchvision:resnet18", ["1x3x224x224"], 11_689_512),
        ("torchvision:inception_v3", ["1x3x299x299"], 27_161_264),
        ("torchvision:googlenet", ["1x3x224x224"], 13_004_888),
        ("torchvision:r3d_18", ["1x3x16x112x112"], 33_371_472),
        ("torchvision:raft_small", ["1x3x520x960"] * 2, 990_162),
        ("torchvision:lraspp_mobilenet_v3_large", ["1x3x520x520"], 3_221_538),
        ("torchvision:swin_t", ["1x3x224x224"], 28_288_354),
    ],
)
def test_models_by_name(text, inputs, params):
    """Parameters as timm and torchvision publish them, of all that is built: auxiliary heads too."""
    importable(text.partition(":")[0])
    target = load(text)
    assert list(map(str, target.inputs)) == inputs
    assert sum(p.numel() for p in target.module.parameters()) == params
    assert not target.module.training
    assert target.source.split()[0] == text.partition(":")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timm:resnet5", "near: resnet50"),
        ("torchvision:resnet5", "near: resnet50"),
        ("timm:resnet18(pretrained=True)", "nothing is ever downloaded, got pretrained="),
        ("torchvision:resnet18(weights='DEFAULT')", "nothing is ever downloaded, got weights="),
        ("torchvision:fcn_resnet50(weights_backbone='DEFAULT')", "nothing is ever downloaded, got weights_backbone="),
        ("timm:hf_hub:timm/resnet18", "got 'hf_hub:timm/resnet18'"),
        ("timm:resnet18(no_such=1)", "must return a module, got TypeError"),
    ],
)
def test_models_that_are_refused(text, said):
    importable(text.partition(":")[0])
    with pytest.raises(ValueError, match="must") as refusal:
        load(text)
    assert said in str(refusal.value)


def test_an_input_that_no_memory_holds_is_refused(user):
    with pytest.raises(ValueError, match="target: an input must fit into memory, got '999999999x999999999x9'"):
        load("mynets:build", input="999999999x999999999x9").example_inputs()
