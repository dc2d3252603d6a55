"""Drop-in functions with torch.nn.functional's names and signatures, and the fused ones beside."""

from udlkernels.normalization.layer_norm.op import add_layer_norm, layer_norm
from udlkernels.normalization.rms_norm.op import add_rms_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
