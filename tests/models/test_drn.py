"""Dilated residual networks beside the published ones: names, shapes, counts, and a forward pass written down again from them."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omniconv import models
from omniconv.analysis.receptive_field import receptive_field
from omniconv.convert import state_from_drn
from omniconv.models import DRNSegmentation, drn_a_50, drn_c_26, drn_c_58, drn_d_22

# family, wide blocks (1×1, 3×3, 1×1), how often each stage repeats; parameters of the published table in millions, and to the unit
PUBLISHED = {
    "drn_a_50": ("A", True, (3, 4, 6, 3), 25.6, 25_557_032),
    "drn_c_26": ("C", False, (1, 1, 2, 2, 2, 2, 1, 1), 21.1, 21_126_584),
    "drn_c_42": ("C", False, (1, 1, 3, 4, 6, 3, 1, 1), 31.2, 31_234_744),
    "drn_c_58": ("C", True, (1, 1, 3, 4, 6, 3, 1, 1), 41.6, 41_591_608),
    "drn_d_22": ("D", False, (1, 1, 2, 2, 2, 2, 1, 1), 16.4, 16_393_752),
    "drn_d_24": ("D", False, (1, 1, 2, 2, 2, 2, 2, 2), None, 21_114_392),
    "drn_d_38": ("D", False, (1, 1, 3, 4, 6, 3, 1, 1), 26.5, 26_501_912),
    "drn_d_40": ("D", False, (1, 1, 3, 4, 6, 3, 2, 2), None, 31_222_552),
    "drn_d_54": ("D", True, (1, 1, 3, 4, 6, 3, 1, 1), 35.8, 35_809_176),
    "drn_d_56": ("D", True, (1, 1, 3, 4, 6, 3, 2, 2), None, 40_529_816),
    "drn_d_105": ("D", True, (1, 1, 3, 4, 23, 3, 1, 1), 54.8, 54_801_304),
}
WIDTHS = {"A": (64, 128, 256, 512), "C": (16, 32, 64, 128, 256, 512, 512, 512)}
WIDTHS["D"] = WIDTHS["C"]
STRIDES = {"A": (1, 2, 1, 1), "C": (1, 2, 2, 2, 1, 1, 1, 1), "D": (1, 2, 2, 2, 1, 1, 1, 1)}
DILATIONS = {"A": (1, 1, 2, 4), "C": (1, 1, 1, 1, 2, 4, 2, 1), "D": (1, 1, 1, 1, 2, 4, 2, 1)}


def kind_of(name, stage):
    family, wide, *_ = PUBLISHED[name]
    if family != "A" and stage in (1, 2, 7, 8):
        return "plain" if family == "D" else "basic"
    return "wide" if wide else "basic"


def shapes(name, classes=1000):
    """Every entry of the published state dict, in its order."""
    family, _, repeats, *_ = PUBLISHED[name]
    found = {}

    def convolution(key, out, into, kernel):
        found[f"{key}.weight"] = (out, into, kernel, kernel)

    def norm(key, channels):
        found.update({f"{key}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        found[f"{key}.num_batches_tracked"] = ()

    into = 64 if family == "A" else 16
    first = ("layer0.0", "layer0.1") if family == "D" else ("conv1", "bn1")
    convolution(first[0], into, 3, 7)
    norm(first[1], into)
    for stage, (width, times) in enumerate(zip(WIDTHS[family], repeats, strict=True), start=1):
        kind = kind_of(name, stage)
        for i in range(times):
            key = f"layer{stage}.{i}"
            if kind == "plain":
                convolution(f"layer{stage}.{3 * i}", width, into, 3)
                norm(f"layer{stage}.{3 * i + 1}", width)
                into = width
                continue
            out = width * (4 if kind == "wide" else 1)
            kernels = (1, 3, 1) if kind == "wide" else (3, 3)
            channels = (into, width, width, out) if kind == "wide" else (into, width, out)
            for j, kernel in enumerate(kernels):
                convolution(f"{key}.conv{j + 1}", channels[j + 1], channels[j], kernel)
                norm(f"{key}.bn{j + 1}", channels[j + 1])
            if i == 0 and (into != out or STRIDES[family][stage - 1] == 2):
                convolution(f"{key}.downsample.0", out, into, 1)
                norm(f"{key}.downsample.1", out)
            into = out
    found["fc.weight"] = (classes, into) if family == "A" else (classes, into, 1, 1)
    found["fc.bias"] = (classes,)
    return found


def published(name, state, x):
    """The maps of all stages, by a forward pass written on the state dict alone."""
    family = PUBLISHED[name][0]

    def norm(x, key):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{key}.weight"], state[f"{key}.bias"])

    def block(x, key, stride, dilation, residual):
        y, last = x, 3 if f"{key}.conv3.weight" in state else 2
        for j in range(1, last + 1):
            weight = state[f"{key}.conv{j}.weight"]
            spread = weight.shape[2] == 3
            step = stride if spread and j == last - 1 else 1
            d = dilation if spread else 1
            y = norm(F.conv2d(y, weight, None, step, d if spread else 0, d), f"{key}.bn{j}")
            y = y if j == last else y.relu()
        if f"{key}.downsample.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{key}.downsample.0.weight"], None, stride), f"{key}.downsample.1")
        return (y + x if residual else y).relu()

    first = ("layer0.0", "layer0.1") if family == "D" else ("conv1", "bn1")
    x = norm(F.conv2d(x, state[f"{first[0]}.weight"], None, 2 if family == "A" else 1, 3), first[1]).relu()
    x = F.max_pool2d(x, 3, 2, 1) if family == "A" else x
    maps = []
    for stage, times in enumerate(PUBLISHED[name][2], start=1):
        stride, dilation = STRIDES[family][stage - 1], DILATIONS[family][stage - 1]
        for i in range(times):
            step = stride if i == 0 else 1
            if kind_of(name, stage) == "plain":
                weight = state[f"layer{stage}.{3 * i}.weight"]
                x = norm(F.conv2d(x, weight, None, step, dilation, dilation), f"layer{stage}.{3 * i + 1}").relu()
            else:
                first_of_a = family == "A" and i == 0
                x = block(x, f"layer{stage}.{i}", step, 1 if first_of_a else dilation, family != "C" or stage < 7)
        maps.append(x)
    return maps


def random_state(name, classes=1000, dtype=torch.float32):
    """Values that keep the maps in range, the running statistics far from their defaults."""
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict()
    for key, shape in shapes(name, classes).items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            state[key] = torch.rand(shape, generator=generator, dtype=dtype) + 0.5
        else:
            fan = max(torch.Size(shape[1:]).numel(), 1)
            state[key] = torch.randn(shape, generator=generator, dtype=dtype) / fan**0.5
    return state


def eighth(size, s=8):
    return -(-size // s)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_are_the_published(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    expected = shapes(name)
    state = model.state_dict()
    assert list(state) == list(expected)  # the order too: optimizers save their state by it
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    *_, millions, exact = PUBLISHED[name]
    counts = {key: torch.Size(shape).numel() for key, shape in expected.items() if "running" not in key and "num_" not in key}
    count = sum(p.numel() for p in model.parameters())
    assert count == exact == sum(counts.values())
    assert millions is None or f"{count / 1e6:.1f}" == f"{millions}"


@pytest.mark.parametrize("name", ["drn_a_50", "drn_c_26", "drn_c_58", "drn_d_22", "drn_d_24", "drn_d_54"])
def test_it_computes_what_is_published(name):
    size = (33, 26)
    model = getattr(models, name)(5, out_map=True, out_middle=True).double().eval()
    state = random_state(name, 5, torch.float64)
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        y, maps = model(x)
        expected = published(name, state, x)
        weight = state["fc.weight"].reshape(5, -1, 1, 1)
        torch.testing.assert_close(y, F.conv2d(expected[-1], weight, state["fc.bias"]), rtol=1e-10, atol=1e-10)
    assert len(maps) == len(expected)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (57, 71), (1, 9)])
@pytest.mark.parametrize("name", ["drn_a_50", "drn_c_42", "drn_d_105"])
def test_maps_have_the_published_sizes(name, size):
    with torch.device("meta"):
        model = getattr(models, name)(7, out_map=True, out_middle=True)
        y, maps = model(torch.empty(2, 3, *size))
    shrinks = (4, 8, 8, 8) if name == "drn_a_50" else (1, 2, 4, 8, 8, 8, 8, 8)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(eighth(n, s) for n in size) for s in shrinks]
    assert maps[-1].shape[1] == model.out_dim == {"drn_a_50": 2048, "drn_c_42": 512, "drn_d_105": 512}[name]
    assert y.shape == (2, 7, *(eighth(n) for n in size))


def test_without_a_map_the_windows_of_the_pool_are_scored():
    x = torch.randn(1, 3, 65, 40)
    model = drn_d_22(4, pool_size=2).eval()
    with torch.no_grad():
        whole = model(x)
        model.out_map = True
        scores = model(x)  # 9 × 5
    assert whole.shape == (1, 4 * 4 * 2)
    expected = scores[:, :, :8, :4].unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).flatten(1)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)


def test_a_slides_its_pool_by_one():
    with torch.device("meta"):
        assert drn_a_50(4, pool_size=3)(torch.empty(1, 3, 33, 32)).shape == (1, 4 * 3 * 2)
        assert drn_a_50()(torch.empty(1, 3, 224, 224)).shape == (1, 1000)


def test_no_classes_no_head():
    model = drn_d_22(0).eval()
    assert not [key for key in model.state_dict() if key.startswith("fc")]
    y = model(torch.ones(1, 3, 17, 16))
    assert y.shape == (1, 512, 3, 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_round_trip_strictly(name):
    state = random_state(name)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.device("meta"):
        model = getattr(models, name)()
    model.load_state_dict(state_from_drn(torch.load(buffer, weights_only=True)), strict=True, assign=True)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=True)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_checkpoints_of_all_forms_load():
    """Bare, of DataParallel, of a training script, and of a torch without counts of batches."""
    state = random_state("drn_d_22")
    prefixed = OrderedDict((f"module.{key}", value) for key, value in state.items())
    old = OrderedDict((key, value) for key, value in state.items() if "num_batches" not in key)
    for checkpoint in (state, prefixed, {"epoch": 3, "arch": "drn_d_22", "best_prec1": 0.5, "state_dict": prefixed}, old):
        model = drn_d_22()
        model.load_state_dict(state_from_drn(checkpoint), strict=True)
        assert torch.equal(model.layer8[0].weight, state["layer8.0.weight"])
        assert model.layer8[1].num_batches_tracked.item() == (0 if checkpoint is old else 7)
    for wrong, said in (
        ([], "checkpoint must be a mapping, as torch.load gives it, got list"),
        ({"epoch": 3}, "every entry must be a Tensor by name, got int for 'epoch'"),
        ({0: torch.ones(2)}, "every entry must be a Tensor by name, got Tensor for 0"),
        ({"state_dict": torch.ones(2)}, "the checkpoint's state_dict must be a mapping, got Tensor"),
    ):
        with pytest.raises(TypeError, match=f"state_from_drn: {said}"):
            state_from_drn(wrong)
    with pytest.raises(ValueError, match="state_from_drn: checkpoint must hold tensors, got none"):
        state_from_drn({"state_dict": {}})
    with pytest.raises(ValueError, match="state_from_drn: no name may stand there with and without"):
        state_from_drn({"module.fc.bias": torch.ones(2), "fc.bias": torch.zeros(2)})


def test_torchvisions_resnet_50_is_drn_a_50():
    try:
        from torchvision.models import resnet50
    except (ImportError, RuntimeError) as error:  # a build for another torch raises RuntimeError
        pytest.skip(f"torchvision: {error}")
    theirs = resnet50().state_dict()
    assert list(theirs) == list(shapes("drn_a_50"))
    drn_a_50().load_state_dict(theirs, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("family", [drn_c_26, drn_d_22], ids=lambda f: f.__name__)
def test_a_training_step_in_every_type(family, dtype):
    torch.manual_seed(0)
    model = family(3, pool_size=4).to(dtype)
    x = torch.randn(2, 3, 32, 32).to(dtype)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    F.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        if value.dim() == 4:
            assert not torch.equal(value, before[key]), key
    assert model(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
def test_the_wide_blocks_and_the_segmentation_train_in_every_type(dtype):
    model = DRNSegmentation(drn_a_50(0), 3, "learned").to(dtype)
    log_probabilities, _ = model(torch.randn(2, 3, 17, 16).to(dtype))
    assert log_probabilities.dtype == dtype
    F.nll_loss(log_probabilities[..., :17, :16], torch.randint(3, (2, 17, 16))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_dead_shortcut_of_c_58_has_no_gradient():
    model = drn_c_58(3, pool_size=2)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None}
    assert without == {f"layer7.0.downsample.{part}" for part in ("0.weight", "1.weight", "1.bias")}
    assert sum(p.numel() for key, p in model.named_parameters() if key in without) == 1_049_600
    assert model.layer7[0].downsample[1].num_batches_tracked == 0


def test_initial_weights_are_the_published():
    torch.manual_seed(1)
    model = drn_c_26()
    for key, kernel, out in (("conv1", 7, 16), ("layer6.0.conv2", 3, 512), ("layer5.0.downsample.0", 1, 256)):
        weight = model.get_submodule(key).weight
        expected = (2 / (kernel * kernel * out)) ** 0.5
        assert abs(weight.mean()) < 5 * expected / weight.numel() ** 0.5
        assert abs(weight.std() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5
    norm = model.layer3[0].bn1
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()


def test_every_convolution_is_ours():
    for family in ("drn_a_50", "drn_c_58", "drn_d_22"):
        with torch.device("meta"):
            model = getattr(models, family)()
        for key, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                assert type(module).__module__.startswith("omniconv."), key
                assert (type(module).__name__ == "DilatedConv2d") == (module.dilation != (1, 1)), key


@pytest.mark.parametrize("family", [drn_c_26, drn_d_22], ids=lambda f: f.__name__)
def test_smoothing_closes_the_grid(family):
    """Dilations 2 and 4 alone read even positions: 25² of 49². With the smoothing stages all are read."""
    model = family(0).eval()
    dilated = nn.Sequential(model.layer5, model.layer6)
    gridded = receptive_field(dilated, torch.empty(1, 128, 41, 41))
    assert gridded.size == (49, 49)  # 1 + 2·(4·2 + 4·4): four 3×3 of each dilation
    assert gridded.gridding == pytest.approx(1 - (25 / 49) ** 2)
    assert gridded.unevenness == 1
    smoothed = receptive_field(nn.Sequential(dilated, model.layer7, model.layer8), torch.empty(1, 128, 41, 41))
    wider = {"drn_c_26": 2 * (2 * 2 + 2 * 1), "drn_d_22": 2 * (2 + 1)}[family.__name__]
    assert smoothed.size == (49 + wider,) * 2
    assert smoothed.gridding == 0
    assert round(smoothed.unevenness, 2) == {"drn_c_26": 0.11, "drn_d_22": 0.33}[family.__name__]


def test_a_has_no_holes_as_its_stages_begin_undilated():
    model = drn_a_50(0).eval()
    field = receptive_field(nn.Sequential(model.layer3, model.layer4), torch.empty(1, 512, 25, 25))
    assert field.size == (1 + 2 * (1 + 5 * 2 + 1 + 2 * 4),) * 2
    assert field.gridding == 0
    assert round(field.unevenness, 2) == 0.08
    undilated_left_out = receptive_field(model.layer3[1:], torch.empty(1, 1024, 25, 25))
    assert undilated_left_out.gridding == pytest.approx(1 - (11 / 21) ** 2)


def test_segmentation_has_the_published_names():
    with torch.device("meta"):
        d = DRNSegmentation(drn_d_22(), 19)
        c = DRNSegmentation(drn_c_26(), 19)
        a = DRNSegmentation(drn_a_50(), 19, "interpolate")
    places = {"D": [f"layer{i}" for i in range(9)], "C": ["conv1", "bn1", "relu", *(f"layer{i}" for i in range(1, 9))]}
    places["A"] = ["conv1", "bn1", "relu", "maxpool", *(f"layer{i}" for i in range(1, 5))]
    for model, name, up in ((d, "drn_d_22", True), (c, "drn_c_26", True), (a, "drn_a_50", False)):
        order = places[name[4].upper()]
        expected = {}
        for key, shape in shapes(name).items():
            first, rest = key.split(".", 1)
            if first != "fc":
                expected[f"base.{order.index(first)}.{rest}"] = shape
        out = 2048 if name == "drn_a_50" else 512
        expected |= {"seg.weight": (19, out, 1, 1), "seg.bias": (19,)}
        if up:
            expected["up.weight"] = (19, 1, 16, 16)
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
        assert list(model.state_dict()) == list(expected)


@pytest.mark.parametrize("up", ["bilinear", "learned", "interpolate"])
def test_segmentation_enlarges_eight_times(up):
    model = DRNSegmentation(drn_d_22(0), 3, up).double().eval()
    with torch.no_grad():
        y, scores = model(torch.randn(2, 3, 33, 24, dtype=torch.float64))
    assert scores.shape == (2, 3, 5, 3)
    assert y.shape == (2, 3, 40, 24)
    torch.testing.assert_close(y.exp().sum(1), torch.ones(2, 40, 24, dtype=torch.float64))
    if up == "interpolate":
        enlarged = F.interpolate(scores, scale_factor=8, mode="bilinear", align_corners=True)
        torch.testing.assert_close(y, enlarged.log_softmax(1))
        return
    assert model.up.weight.requires_grad == (up == "learned")
    assert any(p is model.up.weight for p in model.optim_parameters()) == (up == "learned")
    enlarged = F.interpolate(scores, scale_factor=8, mode="bilinear", align_corners=False)
    inside = (..., slice(8, -8), slice(8, -8))  # at the rim a transposed convolution meets zeros
    torch.testing.assert_close(model.up(scores)[inside], enlarged[inside])
    assert model.up.weight[0, 0, 0, 0].item() == (1 / 16) ** 2


def test_a_segmentation_is_made_of_the_network_it_is_given():
    base = drn_d_22()
    model = DRNSegmentation(base, 2)
    assert model.base[0] is base.layer0
    torch.testing.assert_close(model.seg.bias, torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: drn_d_22(1.0), TypeError, r"drn_d_22: num_classes must be an int, got 1\.0"),
        (lambda: drn_c_26(-1), ValueError, "drn_c_26: num_classes must be at least 0, got -1"),
        (lambda: drn_a_50(pool_size=0), ValueError, "drn_a_50: pool_size must be at least 1, got 0"),
        (
            lambda: drn_d_22(2)(torch.ones(1, 3, 64, 224)), ValueError,
            r"drn_d_22: the last map must be at least pool_size = 28 high and wide, got \(8, 28\)",
        ),
        (lambda: drn_d_22(2)(torch.ones(1, 4, 64, 64)), ValueError, "got"),
        (
            lambda: DRNSegmentation(nn.Conv2d(3, 3, 1), 2), TypeError,
            r"DRNSegmentation: base must be one of omniconv.models' drn_\*\(\), got Conv2d",
        ),
        (lambda: DRNSegmentation(drn_d_22(0), 0), ValueError, "DRNSegmentation: classes must be at least 1, got 0"),
        (lambda: DRNSegmentation(drn_d_22(0), True), TypeError, "DRNSegmentation: classes must be an int, got True"),
        (
            lambda: DRNSegmentation(drn_d_22(0), 2, "nearest"), ValueError,
            "DRNSegmentation: up must be bilinear, learned or interpolate, got 'nearest'",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(call, error, said):
    with torch.device("meta"), pytest.raises(error, match=said):
        call()


def test_a_network_is_copied_pickled_exported_and_compiled():
    model = drn_d_22(3, pool_size=2).eval()
    x = torch.randn(1, 3, 24, 17)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), y)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)


def test_a_map_is_exported_for_every_size():
    model = drn_c_26(3, out_map=True).eval()
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (torch.randn(1, 3, 24, 17),), dynamic_shapes=({**sizes},)).module()
    x = torch.randn(1, 3, 41, 30)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)
