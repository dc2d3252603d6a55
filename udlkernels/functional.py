"""Drop-in functions with torch.nn.functional's names and signatures, and the fused ones beside."""

from udlkernels.attention.apply_rotary.op import apply_rotary
from udlkernels.attention.attention.op import attention, scaled_dot_product_attention
from udlkernels.attention.attention_decode.op import attention_decode
from udlkernels.attention.attention_varlen.op import attention_varlen
from udlkernels.attention.block_sparse_attention.op import block_sparse_attention
from udlkernels.attention.linear_attention.op import linear_attention
from udlkernels.attention.merge_lse.op import merge_lse
from udlkernels.attention.multi_head_attention_forward.op import multi_head_attention_forward
from udlkernels.attention.relative_position_bias.op import relative_position_bias
from udlkernels.normalization.act_norm.op import act_norm
from udlkernels.normalization.adaptive_layer_norm.op import adaptive_layer_norm
from udlkernels.normalization.batch_norm.op import batch_norm, batch_norm_act
from udlkernels.normalization.group_norm.op import group_norm, group_norm_act
from udlkernels.normalization.instance_norm.op import adaptive_instance_norm, instance_norm
from udlkernels.normalization.layer_norm.op import add_layer_norm, layer_norm
from udlkernels.normalization.local_response_norm.op import local_response_norm
from udlkernels.normalization.pixel_norm.op import pixel_norm
from udlkernels.normalization.rms_norm.op import add_rms_norm, rms_norm
from udlkernels.normalization.spectral_norm.op import spectral_norm
from udlkernels.normalization.weight_norm.op import weight_norm

__all__ = [
    "act_norm",
    "adaptive_instance_norm",
    "adaptive_layer_norm",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary",
    "attention",
    "attention_decode",
    "attention_varlen",
    "batch_norm",
    "batch_norm_act",
    "block_sparse_attention",
    "group_norm",
    "group_norm_act",
    "instance_norm",
    "layer_norm",
    "linear_attention",
    "local_response_norm",
    "merge_lse",
    "multi_head_attention_forward",
    "pixel_norm",
    "relative_position_bias",
    "rms_norm",
    "scaled_dot_product_attention",
    "spectral_norm",
    "weight_norm",
]
