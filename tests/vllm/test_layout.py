"""Whatever way a platform packs keys and values, the probe finds every element again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reasonkv.runtimes.vllm.layout import Codec, Kind, Layout, LayoutError, Write

H, S, D, BLOCKS = 3, 32, 16, 5
Place = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def plain(h: Tensor, s: Tensor, d: Tensor, kind: int) -> Tensor:
    """Tokens with their key and value side by side, as FlashAttention and Triton have them."""
    return (h * S + s) * 2 * D + kind * D + d


def transposed(h: Tensor, s: Tensor, d: Tensor, kind: int) -> Tensor:
    """Keys by dimension, values by token, as one CPU kernel has them."""
    inside = s * D + d if kind else d * S + s
    return h * 2 * S * D + kind * S * D + inside


def in_groups(h: Tensor, s: Tensor, d: Tensor, kind: int) -> Tensor:
    """Groups of 8 tokens, transposed within."""
    return h * 2 * S * D + kind * S * D + s // 8 * 8 * D + d * 8 + s % 8


def in_pairs(h: Tensor, s: Tensor, d: Tensor, kind: int) -> Tensor:
    """Pairs of dimensions interleaved over tokens, as matrix units want them: not linear."""
    return h * 2 * S * D + kind * S * D + d // 2 * 2 * S + s * 2 + d % 2


def scrambled(h: Tensor, s: Tensor, d: Tensor, kind: int) -> Tensor:
    """No order at all."""
    order = torch.randperm(H * S * D * 2, generator=torch.Generator().manual_seed(3))
    return order[plain(h, s, d, kind)]


def writer(place: Place) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    h, d = torch.arange(H)[:, None], torch.arange(D)

    def write(keys_nHD: Tensor, values_nHD: Tensor, kv_cache: Tensor, slots_n: Tensor) -> None:
        flat = kv_cache.view(BLOCKS, -1)
        for key_HD, value_HD, slot in zip(keys_nHD, values_nHD, slots_n, strict=True):
            block, s = slot // S, slot % S
            flat[block, place(h, s, d, 0)] = key_HD
            flat[block, place(h, s, d, 1)] = value_HD

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [plain, transposed, in_groups, in_pairs, scrambled])
def test_what_is_written_is_read_back_bit_for_bit(place: Place, dtype: torch.dtype) -> None:
    layout = check_reading(torch.zeros(BLOCKS, H, S, 2 * D, dtype=dtype), writer(place))
    assert layout.is_rows == {"keys": place is plain, "values": place not in (in_groups, in_pairs, scrambled)}
    assert layout.stride["keys"] == {plain: 1, transposed: S, in_groups: 8}.get(place)  # what is regular needs no index


def check_reading(cache: Tensor, write: Write) -> Layout:
    layout = Layout.probe(cache, 1, H, D, write)
    assert not cache.any()
    keys, values = torch.randn(2, 2 * S, H, D).to(cache.dtype)
    blocks = torch.tensor([4, 2])
    slots = (blocks[:, None] * S + torch.arange(S)).flatten()
    write(keys, values, cache, slots)
    both = torch.stack([blocks, blocks.flip(0)])
    every = torch.arange(2 * S).expand(2, H, 2 * S)
    some = torch.stack([torch.randperm(2 * S)[: S + 1] for _ in range(2 * H)]).view(2, H, S + 1)  # each head its own
    for kind, written in (("keys", keys), ("values", values)):
        got, picked = layout.read(kind, cache, both, every), layout.read(kind, cache, both, some)
        assert torch.equal(got[0], written.transpose(0, 1))
        assert torch.equal(got[1], torch.cat([written[S:], written[:S]]).transpose(0, 1))
        assert torch.equal(picked, got.take_along_dim(some[..., None], 2))
    front, untouched = torch.randn(2, 2, H, S + 1, D).to(cache.dtype), cache[0].clone()  # a block and a slot more
    asked = torch.tensor([[1, 3], [4, 2]])
    old = {kind: layout.read(kind, cache, asked, every)[:, :, S + 1 :] for kind in layout.is_rows}
    for kind, new in (("keys", front[0]), ("values", front[1])):
        layout.write_front(kind, cache, asked, new)
    for kind, new in (("keys", front[0]), ("values", front[1])):
        assert torch.equal(layout.read(kind, cache, asked, every), torch.cat([new, old[kind]], 2))
    assert torch.equal(cache[0], untouched)
    return layout


@pytest.mark.parametrize("memory", ["slots first", "gaps"])
def test_blocks_may_lie_in_memory_as_they_like(memory: str) -> None:
    """By slots and then heads, as FlashAttention may be told to, or with something else between two heads."""
    cache = torch.zeros(BLOCKS, S, H, 2 * D).transpose(1, 2)
    if memory == "gaps":
        cache = torch.zeros(BLOCKS, H, S + 3, 2 * D)[:, :, :S]

    def write(keys_nHD: Tensor, values_nHD: Tensor, kv_cache: Tensor, slots_n: Tensor) -> None:
        kv_cache[slots_n // S, :, slots_n % S] = torch.cat([keys_nHD, values_nHD], -1)

    assert check_reading(cache, write).is_rows == {"keys": True, "values": True}


def test_a_cache_operation_that_rounds_is_refused() -> None:
    exact = writer(plain)

    def write(keys: Tensor, values: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        exact((keys / 4).round() * 4, values, kv_cache, slots)

    with pytest.raises(LayoutError, match="changes what it stores"):
        Layout.probe(torch.zeros(BLOCKS, H, S, 2 * D), 1, H, D, write)


def check_codec(dtype: torch.dtype, scales: dict[Kind, float]) -> None:
    """Every byte that stands for a number is itself again, and a cache of such bytes is found and read."""
    codec = Codec(dtype, scales)
    every = torch.arange(256, dtype=torch.uint8)
    for wide in (torch.float32, torch.bfloat16):
        numbers = codec.decode("keys", every, wide)
        bytes_ = every[numbers.isfinite()]
        assert torch.equal(codec.encode("keys", numbers[numbers.isfinite()]), bytes_) and len(bytes_) > 200
    assert codec.decode("values", codec.encode("values", torch.tensor([1e9])), torch.float32).isfinite()

    def write(keys: Tensor, values: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        both = [(x.float() / scales[kind]).to(dtype) for kind, x in (("keys", keys), ("values", values))]
        kv_cache[slots // S, :, slots % S] = torch.cat(both, -1).view(torch.uint8)

    cache = torch.zeros(BLOCKS, H, S, 2 * D, dtype=torch.uint8)
    layout = Layout.probe(cache, 1, H, D, write, codec, torch.bfloat16)
    x = torch.randn(S, H, D).bfloat16()
    write(x, 2 * x, cache, torch.arange(S) + 3 * S)
    read = layout.read("values", cache, torch.tensor([[3]]), torch.arange(S).expand(1, H, S))
    expected = codec.decode("values", codec.encode("values", 2 * x), torch.bfloat16)
    assert torch.equal(codec.decode("values", read, torch.bfloat16)[0].transpose(0, 1), expected)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_numbers_are_read_and_written_as_they_are_stored(dtype: torch.dtype, scale: float) -> None:
    check_codec(dtype, {"keys": scale, "values": 2 * scale})
