"""fairseq's LightweightConv1d, LightweightConv1dTBC and DynamicConv1dTBC as our layers, and their weights back.

    fairseq                         ours                            head of channel c
    LightweightConv1d (B×C×T)       InterleavedLightweightConv1d    c % H
    LightweightConv1dTBC            LightweightConv1d, layout TNC   c // (C/H)
    DynamicConv1dTBC                DynamicConv1d, layout TNC       c // (C/H)

The two orders of heads differ, although the weights look the same. fairseq itself is not needed: its modules are known by their
attributes. In training, LightweightConv1dTBC drops weights anew for every sample and position, ours (and fairseq's CUDA layer) once
a call. Masked inputs, which fairseq's models zero before the layer, are our layers' ``padding_mask``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import Pairs
from omniconv.techniques.dynamic import DynamicConv1d
from omniconv.techniques.lightweight import LightweightConv1d

_DYNAMIC = {"weight_linear.weight": "projection.weight", "weight_linear.bias": "projection.bias", "conv_bias": "bias"}
_LIGHTWEIGHT = {"weight": "weight", "bias": "bias"}


class InterleavedLightweightConv1d(LightweightConv1d):
    """A lightweight layer in the head order of fairseq's B×C×T module: channel c has the kernel of head c % H.

    Constructor and state dict are those of :class:`omniconv.nn.LightweightConv1d`, whose channel c has head c // (C/H). The op sees
    one row of weights per channel, repeated from the H there are.

    Example:
        >>> layer = InterleavedLightweightConv1d(4, 1, heads=2, softmax=False)
        >>> _ = layer.load_state_dict({"weight": torch.tensor([[1.0], [5.0]])})
        >>> layer(torch.ones(1, 4, 1)).flatten().tolist()
        [1.0, 5.0, 1.0, 5.0]
    """

    def operands(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        called = super().operands(input, padding_mask)
        weight: Tensor = self.weight
        if self.training and self.weight_dropout:  # drawn here, once for a head: the op would draw for every channel
            weight = F.dropout(weight.softmax(1) if self.softmax else weight, self.weight_dropout)
            called |= {"softmax": False, "weight_dropout": 0.0}
        return called | {"weight": weight.repeat(self.channels // self.heads, 1)}


def from_fairseq(module: nn.Module) -> LightweightConv1d | DynamicConv1d:
    """Our layer with the settings, weights, dtype, device and mode of a fairseq module; it gives the same outputs in evaluation.

    Args:
        module: fairseq's LightweightConv1d, LightweightConv1dTBC or DynamicConv1dTBC.

    Returns:
        As the table of this module says. A layer made of a T×B×C module takes and gives (T, N, C).

    Raises:
        TypeError: The module is none of the three.
        ValueError: It has a setting that no layer of ours has: ``renorm_padding`` under a softmax, ``in_proj``, another
            ``query_size``, or a ``padding_l`` outside the window.

    Example:
        >>> theirs = torch.nn.Module()  # fairseq's LightweightConv1dTBC, by its attributes
        >>> theirs.input_size, theirs.kernel_size, theirs.num_heads, theirs.padding_l = 6, 3, 2, 2
        >>> theirs.weight_softmax, theirs.weight_dropout, theirs.bias = True, 0.0, None
        >>> theirs.weight = torch.nn.Parameter(torch.zeros(2, 1, 3))
        >>> from_fairseq(theirs)(torch.ones(5, 1, 6)).shape
        torch.Size([5, 1, 6])

    Source: Wu et al. 2019, arXiv:1901.10430, and its implementation, fairseq.
    """
    needed = ("input_size", "kernel_size", "num_heads", "weight_softmax")
    dynamic = hasattr(module, "weight_linear")
    time_first = hasattr(module, "padding_l")
    known = dynamic or hasattr(module, "weight")
    if not known or not (time_first or hasattr(module, "padding")) or not all(hasattr(module, name) for name in needed):
        raise TypeError(
            "from_fairseq: module must be fairseq's LightweightConv1d, LightweightConv1dTBC or DynamicConv1dTBC, "
            f"got {type(module).__name__}"
        )
    source: Any = module
    weight = source.weight_linear.weight if dynamic else source.weight
    settings: dict[str, Any] = {
        "bias": (source.conv_bias if dynamic else source.bias) is not None,
        "softmax": source.weight_softmax,
        "weight_dropout": _weight_dropout(source),
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if time_first:
        settings |= {"padding": _pads(source.padding_l, source.kernel_size), "layout": "TNC"}
    sizes = (source.input_size, source.kernel_size, source.num_heads)
    layer: LightweightConv1d | DynamicConv1d
    if dynamic:
        _check_dynamic(source)
        layer = DynamicConv1d(*sizes, projection_bias=source.weight_linear.bias is not None, **settings)
    elif time_first:
        layer = LightweightConv1d(*sizes, **settings)
    else:
        layer = InterleavedLightweightConv1d(*sizes, source.padding, **settings)
    layer.load_state_dict(state_from_fairseq(module.state_dict()))
    return layer.train(module.training)


def state_from_fairseq(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a fairseq module under our names and shapes, for a strict ``load_state_dict``.

    Weights alone do not tell the order of heads: see the table of this module for the layer to load them into.

    Args:
        state: Of the module, or of a model that holds it.
        prefix: What the module's entries start with in ``state``, such as "encoder.layers.0.conv.".

    Returns:
        ``weight`` (H, K) and ``bias``, or ``projection.weight`` (H·K, C), ``projection.bias`` and ``bias``: those there are.

    Raises:
        ValueError: There are no entries, or entries of another module.

    Example:
        >>> state_from_fairseq({"conv.weight": torch.zeros(2, 1, 3)}, prefix="conv.")["weight"].shape
        torch.Size([2, 3])
    """
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    names = _DYNAMIC if "weight_linear.weight" in own else _LIGHTWEIGHT
    _check_keys("state_from_fairseq", own, names, "weight_linear.weight" if names is _DYNAMIC else "weight")
    renamed = {names[key]: value for key, value in own.items()}
    if names is _LIGHTWEIGHT:
        weight = renamed["weight"]
        if weight.dim() not in (2, 3) or (weight.dim() == 3 and weight.shape[1] != 1):
            raise ValueError(f"state_from_fairseq: weight must be (H, 1, K) or (H, K), got shape {tuple(weight.shape)}")
        renamed["weight"] = weight.reshape(weight.shape[0], weight.shape[-1])
    return renamed


def state_to_fairseq(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The inverse of :func:`state_from_fairseq`: the state dict of one of our layers for the fairseq module it stands for.

    Args:
        state: Of a LightweightConv1d, an InterleavedLightweightConv1d or a DynamicConv1d.
        prefix: Put before every name.

    Returns:
        ``weight`` (H, 1, K) and ``bias``, or ``weight_linear.weight``, ``weight_linear.bias`` and ``conv_bias``.

    Raises:
        ValueError: The entries are not those of such a layer.

    Example:
        >>> state_to_fairseq({"weight": torch.zeros(2, 3)})["weight"].shape
        torch.Size([2, 1, 3])
    """
    dynamic = "projection.weight" in state
    names = {ours: theirs for theirs, ours in (_DYNAMIC if dynamic else _LIGHTWEIGHT).items()}
    _check_keys("state_to_fairseq", state, names, "projection.weight" if dynamic else "weight")
    renamed = {prefix + names[key]: value for key, value in state.items()}
    if not dynamic:
        renamed[prefix + "weight"] = renamed[prefix + "weight"].unsqueeze(1)
    return renamed


def _check_keys(op: str, state: Mapping[str, Tensor], names: Mapping[str, str], needed: str) -> None:
    unknown = sorted(set(state) - set(names))
    if unknown or needed not in state:
        raise ValueError(f"{op}: the entries must be {needed} and at most {', '.join(names)}, got {', '.join(state) or 'none'}")


def _weight_dropout(source: Any) -> float:
    """By either of the names that versions of fairseq have for it."""
    rate = getattr(source, "weight_dropout", None)
    return source.weight_dropout_module.p if rate is None else rate


def _pads(padding_l: int | Sequence[int] | None, kernel: int) -> Pairs:
    """fairseq pads ``padding_l`` before and the rest of K − 1 after; its models give a pair for even kernels."""
    pads = (padding_l, kernel - 1 - padding_l) if isinstance(padding_l, int) else tuple(padding_l or ())
    if len(pads) != 2 or min(pads) < 0 or sum(pads) != kernel - 1:
        raise ValueError(f"from_fairseq: padding_l must lie between 0 and kernel_size − 1 = {kernel - 1}, got {padding_l}")
    return (pads,)


def _check_dynamic(source: Any) -> None:
    logits = source.num_heads * source.kernel_size
    if getattr(source, "renorm_padding", False) and source.weight_softmax:
        raise ValueError("from_fairseq: renorm_padding must be False: our softmax runs over all taps of a head, got True")
    if source.weight_linear.in_features != source.input_size:
        raise ValueError(
            f"from_fairseq: query_size must be input_size, the kernels being made from the input, got "
            f"{source.weight_linear.in_features} and {source.input_size}"
        )
    if source.weight_linear.out_features != logits:
        raise ValueError(
            f"from_fairseq: in_proj must be False, the projection giving num_heads·kernel_size = {logits} features alone, "
            f"got {source.weight_linear.out_features}"
        )
