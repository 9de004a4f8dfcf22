"""The networks of torchvision as they are: published fields, and the gradient's support on the smaller ones."""

import pytest
import torch
from field_support import boxed, example, positive, seen_by_gradient

from omniconv.analysis.receptive_field import receptive_field

try:
    from torchvision import models
except (ImportError, RuntimeError) as error:  # a build for another torch raises RuntimeError
    pytest.skip(f"torchvision: {error}", allow_module_level=True)

# Araujo, Norris, Sim 2019, Distill: networks whose strides lie where torchvision has them
PUBLISHED = {
    "alexnet": ("features", 195),
    "vgg16": ("features", 212),
    "resnet18": ("layer4", 435),
    "mobilenet_v2": ("features", 491),
    "densenet121": ("features", 2071),
    "inception_v3": ("Mixed_7c", 1311),
}


def built(name):
    plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(models, name)(weights=None, **plain).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields(name):
    layer, size = PUBLISHED[name]
    field = receptive_field(built(name), torch.empty(1, 3, 299, 299), of=layer)
    assert (field.size, field.jump, field.status) == ((size, size), (32.0, 32.0), "exact")


# up to which module, in an input of which size
CROPPED = {
    "resnet18": ("layer2", 64), "resnext50_32x4d": ("layer2", 64), "mobilenet_v2": ("features.6", 64),
    "densenet121": ("features.transition1", 64),
    "mobilenet_v3_small": ("features.3", 64), "efficientnet_b0": ("features.2", 64), "googlenet": ("inception3b", 64),
    "inception_v3": ("Mixed_5b", 96), "shufflenet_v2_x1_0": ("stage2", 96), "mnasnet1_0": ("layers.9", 64),
    "regnet_x_400mf": ("trunk_output.block2", 64), "convnext_tiny": ("features.2", 64), "squeezenet1_0": ("features.6", 96),
}  # fmt: skip


@pytest.mark.parametrize("name", CROPPED)
def test_the_field_is_the_support_of_the_gradient(name):
    layer, size = CROPPED[name]
    network, kept = positive(built(name)), []
    network.get_submodule(layer).register_forward_hook(lambda *given: kept.append(given[2]))

    def cropped(network, x):
        kept.clear()
        network(x)
        return kept[0]

    x = example((1, 3, size, size))
    field = receptive_field(network, x, of=layer)
    for position in (field.window.position, (0, 0)):
        at = receptive_field(network, x, of=layer, position=position)
        expected = seen_by_gradient(network, x, cropped, position, field.axes, field.axes)
        assert at.status == "exact"
        assert torch.equal(boxed(at), expected), position
