"""The noise is a pure function of who asks, with the same bits everywhere, and it is good noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reasonkv import noise

PINNED_ZERO = [3921887580, 3819736483, 1231901243, 2301939639, 1113766690, 769243028]
PINNED_OTHER = [917653948, 3885631088, 572699078, 2562082555]
ASK: dict[str, Any] = {"seed": 0, "row_seed": 0, "layer": 0, "head": 0, "event": 0, "draw": 0}


def reference_bits(position: int, *, seed: int, row_seed: int, layer: int, head: int, event: int, draw: int) -> int:
    """The hash in unbounded integers, written independently of the tensor code."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    a, b = 0x243F6A88, 0x85A308D3
    low, high = seed % 2**32, (seed >> 32) % 2**32
    row_low, row_high = row_seed % 2**32, (row_seed >> 32) % 2**32
    for word in (low, high, layer, draw, head, event, row_low, row_high):
        a = mix(a ^ word)
        b = mix((b + a) % 2**32)
    return mix((mix(position ^ a) + b) % 2**32)


def test_the_bits_are_pinned_for_ever() -> None:
    assert noise.hash_bits(torch.arange(6), **ASK).tolist() == PINNED_ZERO
    ask = {"seed": 2026, "row_seed": -7, "layer": 35, "head": 7, "event": 499, "draw": 3}
    assert noise.hash_bits(torch.tensor([0, 1, 1023, 131071]), **ask).tolist() == PINNED_OTHER
    assert noise.uniform(torch.arange(3), **ASK).tolist() == [((h >> 9) + 0.5) / 2**23 for h in PINNED_ZERO[:3]]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63)])
def test_the_bits_equal_plain_integer_arithmetic(seed: int) -> None:
    positions = torch.tensor([0, 1, 2, 77, 4095, 2**31, 2**32 - 1])
    for row_seed, head, event in ((0, 0, 0), (seed, 5, 123), (-3, 63, 10**6)):
        ask = {"seed": seed, "row_seed": row_seed, "layer": 17, "head": head, "event": event, "draw": 2}
        got = noise.hash_bits(positions, **{**ask, "row_seed": torch.tensor(row_seed)})
        assert got.tolist() == [reference_bits(p, **ask) for p in positions.tolist()]
        assert torch.equal(noise.hash_bits(positions, **ask), got)


def test_a_row_draws_the_same_numbers_in_any_batch() -> None:
    positions = torch.arange(50).expand(4, 3, 50) + torch.arange(4)[:, None, None]
    row_seed, event = torch.tensor([9, 0, 9, -4])[:, None, None], torch.tensor([0, 1, 2, 3])[:, None, None]
    ask = {"seed": 1, "layer": 2, "head": torch.arange(3)[None, :, None]}
    whole = noise.uniform(positions, row_seed=row_seed, event=event, **ask)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(
        noise.uniform(positions[order], row_seed=row_seed[order], event=event[order], **ask), whole[order]
    )
    for b in range(4):
        alone = noise.uniform(positions[b : b + 1], row_seed=row_seed[b : b + 1], event=event[b : b + 1], **ask)
        assert torch.equal(alone[0], whole[b])


def test_uniforms_are_uniform_and_never_0_or_1() -> None:
    u = noise.uniform(torch.arange(1 << 18), **ASK)
    assert (u.dtype, float(u.min()) >= 2.0**-24, float(u.max()) <= 1 - 2.0**-24) == (torch.float32, True, True)
    assert (u.double() * 2**24 % 2 == 1).all()
    for bins in (16, 256):
        counts = torch.bincount((u * bins).long(), minlength=bins).double()
        expected = len(u) / bins
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - (bins - 1)) < 4 * (2 * (bins - 1)) ** 0.5
    gap = (u.double().sort().values - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert float(gap) < 1.63 / len(u) ** 0.5  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("name", ["seed", "row_seed", "layer", "head", "event", "draw", "position"])
@pytest.mark.parametrize("step", [1, 2, 64])
def test_neighbours_are_uncorrelated(name: str, step: int) -> None:
    positions = torch.arange(1 << 15)
    here = noise.uniform(positions, **ASK)
    there = (
        noise.uniform(positions + step, **ASK)
        if name == "position"
        else noise.uniform(positions, **{**ASK, name: step})
    )
    correlation = torch.corrcoef(torch.stack([here, there]))[0, 1]
    assert abs(float(correlation)) < 4 / len(positions) ** 0.5


def test_no_two_streams_of_a_run_are_the_same_or_shifted() -> None:
    head, event, layer = torch.arange(16)[:, None, None], torch.arange(512)[None, :, None], torch.arange(36)
    bits = [
        noise.hash_bits(torch.tensor(p), seed=0, row_seed=0, layer=0, head=head, event=event * 36 + layer)
        for p in (0, 1)
    ]
    pairs = (bits[0] << 31) ^ bits[1]
    assert len(pairs.unique()) == pairs.numel()


@pytest.mark.parametrize("name", ["seed", "row_seed", "layer", "head", "event", "draw", "position"])
def test_every_input_bit_flips_half_of_the_output_bits(name: str) -> None:
    positions = torch.arange(4096)
    for bit in range(20):
        flipped = (
            noise.hash_bits(positions ^ (1 << bit), **ASK)
            if name == "position"
            else noise.hash_bits(positions, **{**ASK, name: 1 << bit})
        )
        difference = noise.hash_bits(positions, **ASK) ^ flipped
        share = torch.stack([(difference >> k & 1).double().mean() for k in range(32)])
        assert float((share - 0.5).abs().max()) < 0.1, bit


def moments(x: Tensor) -> tuple[float, float]:
    return float(x.double().mean()), float(x.double().std())


def test_gumbel_and_normal_have_their_moments_and_are_finite_at_the_ends() -> None:
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert noise.gumbel(ends).tolist() == pytest.approx([-2.8115, 16.6355], abs=1e-3)
    assert noise.normal(ends).tolist() == pytest.approx([-5.2947, 5.2947], abs=1e-3)
    u = noise.uniform(torch.arange(1 << 18), **ASK)
    assert moments(noise.gumbel(u)) == pytest.approx((0.5772, 1.2825), abs=0.01)
    assert moments(noise.normal(u)) == pytest.approx((0.0, 1.0), abs=0.01)
    assert noise.gumbel(u).dtype == noise.normal(u).dtype == torch.float32
