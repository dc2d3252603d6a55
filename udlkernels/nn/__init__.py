"""torch.nn's modules on our kernels: same names, constructor arguments and `state_dict` keys.

Each is a subclass of torch's module, and carries the attribute `implementation` ("auto" unless
set), which it passes to the function of `udlkernels.functional` that it calls.
"""

from udlkernels.nn import utils as utils
from udlkernels.nn.act_norm import ActNorm
from udlkernels.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from udlkernels.nn.group_norm import GroupNorm
from udlkernels.nn.instance_norm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from udlkernels.nn.local_response_norm import LocalResponseNorm
from udlkernels.nn.multihead_attention import MultiheadAttention
from udlkernels.nn.row_norm import LayerNorm, RMSNorm
from udlkernels.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "ActNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "LocalResponseNorm",
    "MultiheadAttention",
    "RMSNorm",
    "SyncBatchNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
