"""One of the processes of test_sync_batch_norm.py: computes its share of every case and saves it.

Arguments: rank, world size, the file where the processes meet, the output folder, the backend.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import udlkernels
from udlkernels import _library, testing

CHANNELS = 6
# Samples of each process; a process may have none.
CASES = {
    "planes": dict(split=(3, 5), rest=(4, 5)),
    "channels-last": dict(split=(3, 5), rest=(4, 5), layout="channels_last"),
    "rows": dict(split=(2, 7), rest=()),
    "one-empty": dict(split=(4, 0), rest=(9,)),
    "one-value": dict(split=(1, 1), rest=()),
    "bare": dict(split=(2, 2), rest=(9,), affine=False, track_running_stats=False),
    "cumulative": dict(split=(2, 3), rest=(9,), momentum=None),
    "shifted": dict(split=(3, 5), rest=(4, 5), values="shifted"),
    "large": dict(split=(3, 5), rest=(4, 5), values="large"),
}


def inputs(
    case: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], list[int]]:
    """The batch of all processes, its cotangent, the module's options, each one's samples."""
    options: dict[str, Any] = dict(CASES[case])
    split = options.pop("split")
    shape = (sum(split), CHANNELS, *options.pop("rest"))
    layout, values = options.pop("layout", "contiguous"), options.pop("values", "normal")
    x = testing.make(shape, dtype, values, layout)
    return x, testing.make(shape, dtype, layout=layout, seed=3), options, list(split)


def module(options: dict[str, Any], cls: Any = udlkernels.nn.SyncBatchNorm) -> Any:
    """A norm with weights that are not their initial ones."""
    norm = cls(CHANNELS, **options)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(testing.make((CHANNELS,), seed=1))
            norm.bias.copy_(testing.make((CHANNELS,), seed=2))
    return norm


def share(rank: int, case: str, dtype: torch.dtype, compiled: bool = False) -> dict[str, Any]:
    """What this process computes of a case."""
    x, dy, options, split = inputs(case, dtype)
    norm = module(options)
    norm = norm.to(dtype) if dtype == torch.float64 else norm
    x, dy = (t.split(split)[rank] for t in (x, dy))
    x = x.detach().requires_grad_()
    call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
    y = call(x)
    y.backward(dy)
    found = {name: p.grad for name, p in norm.named_parameters()} | dict(norm.named_buffers())
    return found | {"y": y.detach(), "x": x.grad}


def distributed_data_parallel(rank: int) -> dict[str, Any]:
    """A model converted to our SyncBatchNorm, in torch's DistributedDataParallel."""
    torch.manual_seed(0)
    layers = torch.nn.Conv1d(3, CHANNELS, 3), torch.nn.BatchNorm1d(CHANNELS), torch.nn.ReLU()
    model = udlkernels.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(*layers))
    assert type(model[1]) is udlkernels.nn.SyncBatchNorm
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel(testing.make((6, 3, 9))[3 * rank : 3 * rank + 3]).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def main(rank: str, world: str, meeting: str, folder: str, backend: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world)
    )
    interpreted = backend == "interpreter"
    dtypes = [torch.float32, torch.float16]
    dtypes += [] if interpreted else [torch.float64, torch.bfloat16]
    with _library.interpreter() if interpreted else contextlib.nullcontext():
        found: dict[Any, Any] = {
            (case, str(dtype)): share(int(rank), case, dtype) for case in CASES for dtype in dtypes
        }
        found["ddp"] = distributed_data_parallel(int(rank))
        if not interpreted:
            for case in ("planes", "cumulative"):
                found["compiled", case] = share(int(rank), case, torch.float32, compiled=True)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
