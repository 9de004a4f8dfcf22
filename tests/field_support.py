"""What an output sees of the input, by the support of the float64 gradient."""

import torch
from torch import nn

AVERAGES = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}
NONLINEAR = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU)


def positive(network: nn.Module) -> nn.Module:
    """The network with positive weights and without nonlinearities: nothing that is seen can cancel."""
    network = network.double().eval()
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NONLINEAR):
                setattr(parent, name, nn.Identity())
            elif type(child) in AVERAGES:
                settings = {k: getattr(child, k) for k in ("kernel_size", "stride", "padding", "ceil_mode")}
                setattr(parent, name, AVERAGES[type(child)](**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            weight /= max(weight[0].numel() if weight.dim() > 1 else 1, 1)
    return network


def seen_by_gradient(network, x, of, position, places, axes):
    """Which positions of the input the output at a position has a gradient for."""
    x = x.clone().requires_grad_()
    y = of(network, x)
    index = [slice(None)] * y.dim()
    if y.shape[0] == x.shape[0] and 0 not in axes:
        index[0] = slice(0, 1)
    for axis, p in zip(places, position, strict=True):
        index[axis] = slice(p, p + 1)
    part = y[tuple(index)]
    generator = torch.Generator().manual_seed(1)
    (part * (torch.rand(part.shape, generator=generator) + 0.5)).sum().backward()
    return x.grad.abs().sum([a for a in range(x.dim()) if a not in axes]) > 0


def boxed(field):
    full = torch.zeros([field.input[a] for a in field.axes], dtype=torch.bool)
    full[tuple(slice(a, b) for a, b in zip(field.window.start, field.window.stop, strict=True))] = torch.from_numpy(
        field.window.mask
    )
    return full


def example(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
