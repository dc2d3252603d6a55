"""What this machine can do at best, measured in the same run as the rows it is compared with."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.nn import functional as torch_functional

_STREAMING_FROM = 16 << 20  # bytes; below, the start of Python threads is what is measured
_SIZE_STEP = math.sqrt(2.0)
_SMALLEST = 64 << 10
_LARGEST = 512 << 20


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second at one working-set size, read and written bytes counted alike."""

    copy_cached: float  # into the same destination each time
    copy_fresh: float  # into memory allocated for the call, as ops do
    copy_streaming: float  # by memmove, which bypasses the caches; 0 below its sizes
    read: float

    @property
    def copy(self) -> float:
        return max(self.copy_cached, self.copy_fresh, self.copy_streaming)

    @property
    def best(self) -> float:
        return max(self.copy, self.read)


class Ceilings:
    """Measures on first use, and keeps, each working-set size and each dtype's product."""

    def __init__(self, device: torch.device, seconds: float = 0.02) -> None:
        self.device = device
        self.seconds = seconds
        self.bandwidths: dict[tuple[int, int], Bandwidth] = {}
        self.products: dict[tuple[str, int], float] = {}

    def bandwidth(self, working_set: int) -> Bandwidth:
        """At the nearest measured size, steps of sqrt(2) apart."""
        bounded = min(max(working_set, _SMALLEST), _LARGEST)
        size = round(_SIZE_STEP ** round(math.log(bounded, _SIZE_STEP)))
        key = (size, torch.get_num_threads())
        if key not in self.bandwidths:
            self.bandwidths[key] = self._measure_bandwidth(size)
        return self.bandwidths[key]

    def product(self, dtype: torch.dtype) -> float:
        """Flops per second of the best dense product: a matrix product or a convolution."""
        key = (str(dtype), torch.get_num_threads())
        if key not in self.products:
            self.products[key] = self._measure_product(dtype)
        return self.products[key]

    def _measure_bandwidth(self, size: int) -> Bandwidth:
        half = torch.rand(size // 8, device=self.device)  # float32: half of the working set
        out = torch.empty_like(half)
        whole = torch.rand(size // 4, device=self.device)
        moved = 2 * half.numel() * half.element_size()
        streaming = 0.0
        if self.device.type == "cpu" and size >= _STREAMING_FROM:
            streaming = moved / self._stream(half, out)
        reads = min(self._best(lambda: torch.dot(whole, whole)), self._best(whole.sum))
        return Bandwidth(
            copy_cached=moved / self._best(lambda: out.copy_(half)),
            copy_fresh=moved / self._best(half.clone),
            copy_streaming=streaming,
            read=whole.numel() * whole.element_size() / reads,
        )

    def _stream(self, source: torch.Tensor, out: torch.Tensor) -> float:
        threads = torch.get_num_threads()
        size = source.numel() * source.element_size() // threads
        with ThreadPoolExecutor(threads) as pool:

            def part(i: int) -> None:
                offset = i * size
                ctypes.memmove(out.data_ptr() + offset, source.data_ptr() + offset, size)

            return self._best(lambda: list(pool.map(part, range(threads))))

    def _measure_product(self, dtype: torch.dtype) -> float:
        fast = (torch.float32, torch.bfloat16, torch.float64)
        n = 8192 if self.device.type == "cuda" else 1024 if dtype in fast else 256
        left, right = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        matrix = 2 * n**3 / self._best(lambda: left @ right)
        if self.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return matrix
        image = torch.randn(8, 256, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3).to(dtype)
        flops = 2 * image.numel() * 256 * 9
        seconds = self._best(lambda: torch_functional.conv2d(image, weight, padding=1))
        return max(matrix, flops / seconds)

    def _best(self, call: Callable[[], object]) -> float:
        """Fastest of the calls that fit the time, and of no fewer than three."""
        best = math.inf
        call()
        stop = time.perf_counter() + self.seconds
        done = 0
        while done < 3 or time.perf_counter() < stop:
            best = min(best, self._seconds(call))
            done += 1
        return best

    def _seconds(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
