"""What a device moves and computes in a second: published figures of GPUs, and a measurement of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Clock = Callable[[], float]
"""Returns seconds. `time.process_time` leaves out what other jobs take, and adds threads up."""
_ROUNDS = 5  # of each measurement; the fastest counts, because other jobs only make a device slower


class Rates(NamedTuple):
    """What a device does in a second: bytes it reads or copies, operations (a multiply-add is two) of its products."""

    bytes_per_second: float
    operations_per_second: float


class Gpu(NamedTuple):
    """A GPU by its vendor's data sheet."""

    memory: float  # bytes; a gigabyte of a data sheet is taken as 10^9, the least it can be
    bytes_per_second: float  # of its memory, at the peak
    operations_per_second: float  # dense bfloat16 products with float32 sums, at the peak

    @property
    def rates(self) -> Rates:
        """The peaks as rates: no program reaches them, so a time from them is a floor."""
        return Rates(self.bytes_per_second, self.operations_per_second)


GPUS: dict[str, Gpu] = {
    "B200": Gpu(180e9, 7.7e12, 2250e12),
    "H200": Gpu(141e9, 4.8e12, 989e12),
    "H100": Gpu(80e9, 3.35e12, 989e12),
    "H100-NVL": Gpu(94e9, 3.9e12, 835e12),
    "H100-PCIe": Gpu(80e9, 2.0e12, 756e12),
    "H20": Gpu(96e9, 4.0e12, 148e12),
    "A100": Gpu(80e9, 2.039e12, 312e12),
    "A100-PCIe": Gpu(80e9, 1.935e12, 312e12),
    "A100-40GB": Gpu(40e9, 1.555e12, 312e12),
    "L40S": Gpu(48e9, 0.864e12, 362e12),
    "L4": Gpu(24e9, 0.3e12, 121e12),
    "A10": Gpu(24e9, 0.6e12, 125e12),
    "RTX-6000-Ada": Gpu(48e9, 0.96e12, 364e12),
    "RTX-5090": Gpu(32e9, 1.792e12, 209.5e12),
    "RTX-4090": Gpu(24e9, 1.008e12, 165.2e12),
    "RTX-3090": Gpu(24e9, 0.936e12, 71e12),
    "MI300X": Gpu(192e9, 5.3e12, 1307e12),
    "MI325X": Gpu(256e9, 6.0e12, 1307e12),
}
"""Published figures of boards; SXM where a name has several forms and says none."""


def measure_rates(dtype: torch.dtype, device: torch.device | str = "cpu", clock: Clock = time.perf_counter) -> Rates:
    """Measure a device's rates in about a second, with torch's threads as they are set.

    Bytes: the faster of reading 256 MiB (1 GiB on a GPU) and copying it, read and written. Operations: the product of
    two square matrices, of 2,048 rows (8,192 on a GPU).
    """
    place = torch.device(device)
    on_gpu = place.type != "cpu"
    source = torch.ones((1 << 30 if on_gpu else 1 << 28) // 8, dtype=torch.int64, device=place)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 2048
    a = torch.ones(side, side, dtype=dtype, device=place)
    read = source.nbytes / shortest(source.sum, place, clock)
    copied = 2 * source.nbytes / shortest(lambda: target.copy_(source), place, clock)
    return Rates(max(read, copied), 2 * side**3 / shortest(lambda: a @ a, place, clock))


def measure_attention(
    batch: int, kv_heads: int, group: int, dim: int, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> float:  # fmt: skip
    """Return the seconds one layer's attention takes: a token of each sequence, `group` query heads a KV head."""
    place = torch.device(device)
    each = 2 * batch * kv_heads * slots * dim * dtype.itemsize
    copies = max(2, (2**30 if place.type != "cpu" else 2**26) // each)
    query = torch.ones(batch, kv_heads, group, dim, dtype=dtype, device=place)
    kept = [torch.ones(2, batch, kv_heads, slots, dim, dtype=dtype, device=place) for _ in range(copies)]

    def work() -> object:
        return [torch.nn.functional.scaled_dot_product_attention(query, one[0], one[1]) for one in kept]

    return shortest(work, place, clock) / copies


def shortest(work: Callable[[], object], place: torch.device, clock: Clock) -> float:
    """Return the shortest time of a few runs after one that warms up."""
    took = []
    for _ in range(1 + _ROUNDS):
        start = clock()
        work()
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        took.append(clock() - start)
    return min(took[1:])
