"""fairseq's LightweightConv1d, LightweightConv1dTBC and DynamicConv1dTBC as our layers, its blocks as ours, and their weights back.

    fairseq                         ours                            head of channel c
    LightweightConv1d (B×C×T)       InterleavedLightweightConv1d    c % H
    LightweightConv1dTBC            LightweightConv1d, layout TNC   c // (C/H)
    DynamicConv1dTBC                DynamicConv1d, layout TNC       c // (C/H)

The two orders of heads differ, although the weights look the same. fairseq itself is not needed: its modules are known by their
attributes. In training, LightweightConv1dTBC drops weights anew for every sample and position, ours (and fairseq's CUDA layer) once
a call. Masked inputs, which fairseq's models zero before the layer, are our layers' ``padding_mask``.

LightConvEncoderLayer and LightConvDecoderLayer are the two forms of LightConvBlock and DynamicConvBlock in ``omniconv.models``;
their state dicts go there and back by :func:`block_state_from_fairseq` and :func:`block_state_to_fairseq`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import Pairs
from omniconv.techniques.dynamic import DynamicConv1d
from omniconv.techniques.lightweight import LightweightConv1d

_DYNAMIC = {"weight_linear.weight": "projection.weight", "weight_linear.bias": "projection.bias", "conv_bias": "bias"}
_LIGHTWEIGHT = {"weight": "weight", "bias": "bias"}
_LINEAR = {
    "linear1": "input_projection", "linear2": "output_projection", "fc1": "feed_forward_in", "fc2": "feed_forward_out",
}  # fmt: skip
_ENCODER = _LINEAR | {"layer_norms.0": "conv_norm", "layer_norms.1": "feed_forward_norm"}
_DECODER = _LINEAR | {"conv_layer_norm": "conv_norm", "final_layer_norm": "feed_forward_norm"}
_ATTENTION = {"encoder_attn.out_proj": "attention.out_proj", "encoder_attn_layer_norm": "attention_norm"}
_PARTS = ("weight", "bias")


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


def block_state_from_fairseq(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a LightConvEncoderLayer or LightConvDecoderLayer under our names, for a strict ``load_state_dict``.

    A decoder layer goes into a block with ``causal=True``, and ``attention=True`` if it has ``encoder_attn``; one with
    ``conv.weight`` into a LightConvBlock, one with ``conv.weight_linear`` into a DynamicConvBlock. Sizes are those of the tensors;
    ``normalize_before`` and the number of attention heads no tensor tells.

    Args:
        state: Of the layer, or of a model that holds it.
        prefix: What the layer's entries start with in ``state``, such as "encoder.layers.0.".

    Returns:
        What ``omniconv.models.LightConvBlock`` or ``DynamicConvBlock`` names so. Projections of queries, keys and values, apart in
        today's fairseq and together in the first, are together.

    Raises:
        ValueError: There are no entries, entries missing, or entries of another module.

    Example:
        >>> from omniconv.models import LightConvBlock
        >>> ours = LightConvBlock(6, 3, heads=2)
        >>> theirs = block_state_to_fairseq(ours.state_dict(), "encoder.layers.0.")
        >>> theirs["encoder.layers.0.linear1.weight"].shape, theirs["encoder.layers.0.conv.weight"].shape
        (torch.Size([12, 6]), torch.Size([2, 1, 3]))
        >>> ours.load_state_dict(block_state_from_fairseq(theirs, "encoder.layers.0."))
        <All keys matched successfully>

    Source: Wu et al. 2019, arXiv:1901.10430, and its implementation, fairseq.
    """
    op = "block_state_from_fairseq"
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    decoder = "conv_layer_norm.weight" in own
    attention = any(key.startswith("encoder_attn.") for key in own)
    names = _block_names(decoder, attention)
    others = {key for key in own if not key.startswith("conv.")}
    missing = sorted(set(names) - others) + ["conv"] * (len(others) == len(own))
    unknown = sorted(others - set(names) - _projections(own))
    if missing or unknown:
        _refuse_keys(op, "LightConvDecoderLayer" if decoder else "LightConvEncoderLayer", missing, unknown)
    renamed = {f"conv.{name}": value for name, value in state_from_fairseq(own, "conv.").items()}
    if attention:
        renamed |= _attention_from_fairseq(op, own)
    return renamed | {ours: own[theirs] for theirs, ours in names.items()}


def block_state_to_fairseq(state: Mapping[str, Tensor], prefix: str = "", *, decoder: bool | None = None) -> dict[str, Tensor]:
    """The inverse of :func:`block_state_from_fairseq`: the state dict of one of our blocks for the fairseq layer it stands for.

    Args:
        state: Of a LightConvBlock or DynamicConvBlock.
        prefix: Put before every name.
        decoder: Whether the layer is a decoder's; by default, if there is attention. A causal block without attention has the
            names of an encoder layer unless it is said.

    Returns:
        fairseq's entries, with the projections of queries, keys and values apart.

    Raises:
        ValueError: The entries are not those of a block, or those of attention are to go into an encoder layer.

    Example:
        >>> from omniconv.models import DynamicConvBlock
        >>> ours = DynamicConvBlock(6, 3, heads=2, causal=True)
        >>> sorted(name for name in block_state_to_fairseq(ours.state_dict(), decoder=True) if "norm" in name)
        ['conv_layer_norm.bias', 'conv_layer_norm.weight', 'final_layer_norm.bias', 'final_layer_norm.weight']
    """
    op = "block_state_to_fairseq"
    attention = "attention.in_proj_weight" in state
    if attention and decoder is False:
        raise ValueError(f"{op}: decoder must be True where there is attention, got {decoder}")
    names = {ours: theirs for theirs, ours in _block_names(attention if decoder is None else decoder, attention).items()}
    own = {key: value for key, value in state.items() if not key.startswith("conv.")}
    fused = {f"attention.in_proj_{part}" for part in _PARTS} if attention else set()
    missing, unknown = sorted((set(names) | fused) - set(own)), sorted(set(own) - set(names) - fused)
    if missing or unknown:
        _refuse_keys(op, "LightConvBlock or DynamicConvBlock", missing, unknown)
    renamed = {prefix + theirs: own[ours] for ours, theirs in names.items()}
    for part in _PARTS if attention else ():
        for which, value in zip("qkv", own[f"attention.in_proj_{part}"].chunk(3), strict=True):
            renamed[f"{prefix}encoder_attn.{which}_proj.{part}"] = value
    convolution = {key[len("conv.") :]: value for key, value in state.items() if key.startswith("conv.")}
    return renamed | state_to_fairseq(convolution, f"{prefix}conv.")


def _block_names(decoder: bool, attention: bool) -> dict[str, str]:
    """fairseq's names as ours, of all that is renamed and no more."""
    modules = (_DECODER if decoder else _ENCODER) | (_ATTENTION if attention else {})
    return {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in modules.items() for part in _PARTS}


def _projections(state: Mapping[str, Tensor]) -> set[str]:
    """Those of queries, keys and values, in either form, if the state has them."""
    apart = {f"encoder_attn.{which}_proj.{part}" for which in "qkv" for part in _PARTS}
    return (apart | {f"encoder_attn.in_proj_{part}" for part in _PARTS}) & set(state)


def _attention_from_fairseq(op: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for part in _PARTS:
        fused = f"encoder_attn.in_proj_{part}"
        apart = [f"encoder_attn.{which}_proj.{part}" for which in "qkv"]
        if (fused in state) == any(name in state for name in apart) or (fused not in state and not all(n in state for n in apart)):
            got = [name for name in (fused, *apart) if name in state]
            raise ValueError(f"{op}: the entries must have {fused} or {', '.join(apart)}, got {', '.join(got) or 'none'}")
        values = [state[fused]] if fused in state else [state[name] for name in apart]
        if len({value.shape for value in values}) > 1:
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise ValueError(f"{op}: queries, keys and values must be projected from as many channels, got shapes {shapes}")
        made[f"attention.in_proj_{part}"] = torch.cat(values)
    return made


def _refuse_keys(op: str, module: str, missing: Sequence[str], unknown: Sequence[str]) -> None:
    got = "; ".join(f"{word} {', '.join(keys)}" for word, keys in (("without", missing), ("also", unknown)) if keys)
    raise ValueError(f"{op}: the entries must be those of a {module}, got them {got}")


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
