"""SlotViews for tests: from tensors, or with random contents."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.network import FORECAST_FEATURES, Network
from reasonkv.view import SlotView


def make_view(
    keys_BHND: Tensor,
    queries_BHqTD: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    prompt: int = 0,
    keep_prompt: bool = False,
    event: int = 0,
    seed: int = 0,
    layer: int = 0,
    row_seeds: tuple[int, ...] | None = None,
) -> SlotView:
    """A view in which slot n holds position n, unless positions (broadcast to [B, H, N]) say otherwise."""
    B, H, N, D = keys_BHND.shape
    positions_BHN = (torch.arange(N) if positions is None else positions.long()).expand(B, H, N)
    length = int(positions_BHN.max()) + 1
    query_positions_BT = None
    if queries_BHqTD is not None:
        T = queries_BHqTD.shape[2]
        query_positions = torch.arange(length - T, length) if query_positions is None else query_positions.long()
        query_positions_BT = query_positions.expand(B, T)
    is_prompt_BHN = positions_BHN < prompt
    is_protected_BHN = (positions_BHN < sinks) | (positions_BHN >= length - recent)
    return SlotView(
        keys_BHND=keys_BHND,
        values_BHND=keys_BHND,
        positions_BHN=positions_BHN,
        counts_BHN=torch.ones(B, H, N, dtype=torch.int32),
        is_prompt_BHN=is_prompt_BHN,
        is_protected_BHN=is_protected_BHN | is_prompt_BHN if keep_prompt else is_protected_BHN,
        queries_BHqTD=queries_BHqTD,
        query_positions_BT=query_positions_BT,
        scaling=D**-0.5,
        length_B=torch.full((B,), length),
        event_B=torch.full((B,), event),
        row_seed_B=torch.tensor(row_seeds or (0,) * B),
        seed=seed,
        layer=layer,
    )


def random_view(
    B: int = 1,
    H: int = 2,
    N: int = 96,
    D: int = 16,
    *,
    group: int = 2,
    queries: int = 16,
    dtype: torch.dtype = torch.float32,
    key_seed: int = 0,
    **options: object,
) -> SlotView:
    """Normal keys with a common direction per head (so that some count as duplicates), and normal queries."""
    generator = torch.Generator().manual_seed(key_seed)
    keys = torch.randn(B, H, N, D, generator=generator) + torch.randn(B, H, 1, D, generator=generator)
    queries_BHqTD = torch.randn(B, H * group, queries, D, generator=generator) if queries else None
    return make_view(
        keys.to(dtype),
        None if queries_BHqTD is None else queries_BHqTD.to(dtype),
        **options,  # type: ignore[arg-type]
    )


def random_network(heads: int, head_dim: int, seed: int = 0, beside: int = FORECAST_FEATURES) -> Network:
    """One layer's forecast with random weights; `beside` inputs are not of the key."""
    draw = torch.Generator().manual_seed(seed)
    inputs, units = head_dim + beside, 4
    shapes = ((heads, inputs, units), (heads, units), (heads, units), (heads, inputs))
    weights = [torch.randn(shape, generator=draw) * inputs**-0.5 for shape in shapes]
    far = 0.5 + 2 * torch.rand(heads, inputs, generator=draw)
    return Network(*weights, -far, far)
