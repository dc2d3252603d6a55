"""Drop-in functions with torch.nn.functional's names and signatures, and the fused ones beside."""

from udlkernels.attention.attention.op import attention, scaled_dot_product_attention
from udlkernels.attention.block_sparse_attention.op import block_sparse_attention
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
    "attention",
    "batch_norm",
    "batch_norm_act",
    "block_sparse_attention",
    "group_norm",
    "group_norm_act",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "pixel_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "spectral_norm",
    "weight_norm",
]
