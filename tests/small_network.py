"""A small network with every turn that a look at its layers must take, and what a look could change of it."""

import torch
from torch import nn


class Net(nn.Module):
    """Two layers that are alike, one that is called twice, one that is given by name, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.wide = nn.Conv2d(4, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Conv2d(1, 1, 1)
        self.stop = None

    def forward(self, x, scale=1.0):
        x = self.again(self.first(x)) * scale
        x = self.wide(input=x)
        if self.stop is not None:
            raise self.stop
        return self.head(x.mean((2, 3))), self.head(x.amax((2, 3)))


X = torch.ones(1, 4, 6, 6)


def state(net):
    """All that a look at a network could change."""
    return (
        {k: (v.clone(), v.stride()) for k, v in net.state_dict().items()},
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()],
        [(None if p.grad is None else p.grad.tolist(), p.requires_grad) for p in net.parameters()],
        torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(),
    )  # fmt: skip


def same(before, after):
    (numbers, *rest, rng, threads, grad), (numbers2, *rest2, rng2, threads2, grad2) = before, after
    return (
        all(torch.equal(v, numbers2[k][0]) and s == numbers2[k][1] for k, (v, s) in numbers.items())
        and torch.equal(rng, rng2)
        and (rest, threads, grad) == (rest2, threads2, grad2)
    )
