"""The yardstick for models that attend by code of their own: that code again, over a history written down apart.

Which module attends is found by who calls the cache. Its forward is repeated twice: over the kept tokens alone, in the
order of their slots, where every rounding is the same; and over the whole history under an explicit mask, where a
model that reads an index of a slot as a position would differ. Modules round to float32 inside, so the second is only
held to `LOOSE`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reasonkv import CompressedCache

LOOSE = 1e-5
SAME_FOR_ALL_HEADS = ("TrOCRAttention", "MvpAttention", "XGLMAttention")
"""They take no mask with a plane for each head, so where heads keep other tokens, only the first comparison is made."""


class _Given:
    """Stands for a cache that holds these keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.pair = keys, values

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.pair


class Watch:
    """Repeats every call of attention of a model; `worst` is the largest difference over the kept tokens."""

    def __init__(self, model: nn.Module, cache: CompressedCache, mask_BL: Tensor) -> None:
        self.cache, self.mask_BL, self.worst, self.calls = cache, mask_BL, 0.0, 0
        self.open: list[nn.Module] = []
        self.attending: dict[nn.Module, int] = {}  # modules under way that called the cache, and for which layer
        self.handles = [
            handle
            for module in model.modules()
            for handle in (
                module.register_forward_pre_hook(lambda module, args: self.open.append(module)),
                module.register_forward_hook(self._done, with_kwargs=True),
            )
        ]

    def note(self, layer: int) -> None:
        """Note that the innermost module under way cached keys of a layer."""
        self.attending[self.open[-1]] = layer

    def close(self) -> None:
        """Watch no longer."""
        for handle in self.handles:
            handle.remove()

    def _done(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.open.pop()
        layer = self.attending.pop(module, None)
        if layer is None:
            return
        keys, values = (torch.cat(parts, 2) for parts in zip(*self.cache.history[layer], strict=True))
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.ndim == 4]
        q, T = given[0].shape[2], keys.shape[2]
        real_Bq = self.mask_BL[:, T - q : T].bool()
        allowed = self.cache._allowed(layer, keys.shape[1], q)
        compact = self._compact(layer, keys, values, q)
        for pair, seen, most in ((compact[:2], compact[2], 0.0), ((keys, values), allowed, LOOSE)):
            mask = torch.zeros(seen.shape, dtype=keys.dtype).masked_fill(~seen, float("-inf"))
            if mask.shape[1] == 1 or bool((mask == mask[:, :1]).all()):
                mask = mask[:, :1]
            if most and mask.shape[1] > 1 and module.__class__.__name__ in SAME_FOR_ALL_HEADS:
                continue
            again = _repeat(module, args, kwargs, self.cache, given[0], _Given(*pair), mask)
            gap = (_first(again) - _first(out))[real_Bq].abs().max().item() if real_Bq.any() else 0.0
            self.worst = max(self.worst, gap if gap > most else 0.0)
        self.calls += 1

    def _compact(self, layer: int, keys: Tensor, values: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of every head in the order of their slots, and which of them every query may see."""
        (B, H, T, _), held = keys.shape, self.cache.held[layer]
        mask_BT = self.mask_BL[:, :T].bool()
        old = [row.shape[1] for row in held] if held else [0] * B
        width = max(count + int(mask_BT[row, T - q :].sum()) for row, count in enumerate(old))
        pair = keys.new_zeros(B, H, width, keys.shape[3]), values.new_zeros(B, H, width, values.shape[3])
        seen = torch.zeros(B, 1, q, width, dtype=torch.bool)
        for row in range(B):
            columns = mask_BT[row].nonzero()[:, 0]
            fresh = columns[columns >= T - q]
            for head in range(H):
                own = torch.cat([columns[held[row][head]] if held else fresh[:0], fresh])
                for made, source in zip(pair, (keys, values), strict=True):
                    made[row, head, : len(own)] = source[row, head, own]
            upto = old[row] + mask_BT[row, T - q :].cumsum(0)
            seen[row, 0] = torch.arange(width) < upto.clamp(min=1)[:, None]
        return *pair, seen


def _repeat(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cache: object,
    mask: Tensor,
    stub: object,
    new: Tensor,
) -> Any:
    def swap(one: Any) -> Any:
        return stub if one is cache else new if one is mask else one

    return module.forward(*map(swap, args), **{name: swap(one) for name, one in kwargs.items()})


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
