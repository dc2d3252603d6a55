"""The transformer's modules of torch.nn on our kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from udlkernels.nn.multihead_attention import MultiheadAttention
from udlkernels.nn.row_norm import LayerNorm

_Activation = str | Callable[[Tensor], Tensor]
_relu = torch.nn.functional.relu


class _Whole(torch.nn.Module):
    """A module whose attribute `implementation` is also that of all our modules inside."""

    implementation: str = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "implementation":
            for module in self.modules():
                if isinstance(module, (_Whole, MultiheadAttention, LayerNorm)):
                    module.__dict__[name] = value


def _adopt(layer: torch.nn.Module) -> None:
    """Makes the attentions and norms that torch's constructor built ours."""
    forms = {torch.nn.MultiheadAttention: MultiheadAttention, torch.nn.LayerNorm: LayerNorm}
    for child in layer.children():
        child.__class__ = forms.get(type(child), type(child))


def _is_causal(mask: Tensor | None, hint: bool | None, x: Tensor, batch_first: bool) -> bool:
    """The hint, or where there is none, whether the mask is the causal one.

    To look at it needs its values: a graph that is being compiled has none, and reads the mask.
    """
    if hint is not None or mask is None or torch.compiler.is_compiling():
        return bool(hint)
    length = x.shape[1 if batch_first and x.dim() == 3 else 0]
    if mask.shape != (length, length):
        return False
    hidden = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, -math.inf))


class TransformerEncoderLayer(_Whole, torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with our MultiheadAttention and LayerNorm inside.

    Arguments, parameters and `state_dict` are torch's. In evaluation too: torch's own fast path is
    taken for nested tensors alone.

    Attributes:
        implementation: that of the modules inside, "auto" unless set; setting it sets theirs.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = _relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        _adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = src_mask, src_key_padding_mask
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(_Whole, torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer with our MultiheadAttention and LayerNorm inside.

    Arguments, parameters and `state_dict` are torch's.

    Attributes:
        implementation: that of the modules inside, "auto" unless set; setting it sets theirs.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = _relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        _adopt(self)


class TransformerEncoder(_Whole, torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder, without nested tensors.

    Arguments and `state_dict` are torch's; the layers are copies of the one given, which may be
    ours. `enable_nested_tensor` is accepted and changes nothing: padded positions are computed as
    in training, where torch's evaluation may make them zeros. Layers of other classes get what
    torch's encoder gives them.

    Attributes:
        implementation: that of the modules inside, "auto" unless set; setting it sets theirs.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src.is_nested or not all(isinstance(m, TransformerEncoderLayer) for m in self.layers):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        is_causal = _is_causal(mask, is_causal, src, self.layers[0].self_attn.batch_first)
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(_Whole, torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder; its layers are copies of the one given, which may be ours.

    Arguments and `state_dict` are torch's.

    Attributes:
        implementation: that of the modules inside, "auto" unless set; setting it sets theirs.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        return super().forward(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            _is_causal(tgt_mask, tgt_is_causal, tgt, batch_first), memory_is_causal,
        )  # fmt: skip


class Transformer(_Whole, torch.nn.Transformer):
    """torch.nn.Transformer of our encoder and decoder.

    Arguments, parameters and `state_dict` are torch's, and so are the first values of the
    parameters for a seed. A custom encoder or decoder stays what it is.

    Attributes:
        implementation: that of the modules inside, "auto" unless set; setting it sets theirs.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = _relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        norm = dict(eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
        encoder, decoder = custom_encoder, custom_decoder
        if encoder is None:
            one = TransformerEncoderLayer(*layer)
            encoder = TransformerEncoder(one, num_encoder_layers, LayerNorm(d_model, **norm))
        if decoder is None:
            other = TransformerDecoderLayer(*layer)
            decoder = TransformerDecoder(other, num_decoder_layers, LayerNorm(d_model, **norm))
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
            activation, encoder, decoder, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
