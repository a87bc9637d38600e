"""The yardstick of the matrix: what every call of attention over kept slots should have returned, in float64.

A recording cache notes the keys and values a layer is given, and which tokens it holds. Every call of attention is then
compared with attention written out over the whole history, under an explicit mask over the kept tokens. Nothing is
assumed about the model, so any architecture that calls attention through transformers' interface can be checked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonkv import CompressedCache
from reasonkv.resolve import attends_by_itself
from reasonkv.runtimes.transformers.attention import PREFIX, naive_attention
from reasonkv.runtimes.transformers.latent import NAMED_LAYER
from reasonkv.runtimes.transformers.layer import CompressedLayer
from tools.own_attention import Watch

_RECORDERS: weakref.WeakValueDictionary[int, RecordingCache] = weakref.WeakValueDictionary()


class RecordingCache(CompressedCache):
    """A compressed cache whose every attention output is compared; takes what `CompressedCache` takes.

    `worst` is the largest difference so far over real tokens, `calls` how many calls were compared.
    """

    def __init__(self, *args: Any, mask_BL: Tensor, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mask_BL, self.worst, self.calls = mask_BL, 0.0, 0
        self.index_keys: dict[int, list[Tensor]] = {}
        self.chosen_BqT: Tensor | None = None  # of the newest indexer, over the whole history
        indexers = [module.indexer for module in args[0].modules() if getattr(module, "indexer", None) is not None]
        self.handles = [one.register_forward_hook(_choose_from_all, with_kwargs=True) for one in indexers]
        self.history: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.held: dict[int, list[Tensor]] = {}
        _RECORDERS[id(self.session)] = self
        self.watch = Watch(args[0], self, mask_BL) if attends_by_itself(args[0]) else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note what a layer holds and what it is given."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CompressedLayer):
            self.held[layer_idx] = [] if layer.storage is None else layer.slot_positions()
            self.history.setdefault(layer_idx, []).append((key_states.clone(), value_states.clone()))
            if self.watch is not None:
                self.watch.note(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def detach(self) -> None:
        """Give the model back, and its indexers."""
        super().detach()
        for handle in self.handles:
            handle.remove()
        if self.watch is not None:
            self.watch.close()
            self.worst, self.calls = self.watch.worst, self.watch.calls

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Note what an indexer is given."""
        self.index_keys.setdefault(layer_idx, []).append(indexer_key_states.clone())
        return super().update_indexer(indexer_key_states, layer_idx)

    def choose(self, indexer: nn.Module, inputs: tuple[Any, ...], positions: Tensor) -> None:
        """Let an indexer choose again, from the whole history, of which it sees the kept tokens."""
        index = indexer.layer_idx
        allowed_BqT = self._allowed(index, 1, inputs[0].shape[1])[:, 0]
        stored = _AllIndexKeys(torch.cat(self.index_keys[index], 1))
        columns_Bqk = indexer.forward(*inputs, allowed_BqT, positions, past_key_values=stored).long()
        self.chosen_BqT = torch.zeros_like(allowed_BqT).scatter(-1, columns_Bqk, True) & allowed_BqT

    def compare(
        self, layer: CompressedLayer, module: nn.Module, query: Tensor, out: Tensor, options: dict[str, Any]
    ) -> None:
        """Compare one call's output [B, q, Hq, D] with attention over the history."""
        keys, values = (torch.cat(parts, 2) for parts in zip(*self.history[layer.index], strict=True))
        allowed = self._allowed(layer.index, keys.shape[1], query.shape[2])
        group = query.shape[1] // keys.shape[1]
        if self.chosen_BqT is not None:
            allowed = allowed & self.chosen_BqT[:, None]
        if layer.expansion is not None:  # latent attention: what is cached is not what is attended to
            keys, values = layer.expansion.expand(keys, values)
        options = {name: options[name] for name in ("scaling", "softcap", "s_aux") if name in options}
        expected, _ = naive_attention(module, query, keys, values, allowed.repeat_interleave(group, 1), **options)
        end = keys.shape[2]
        real = self.mask_BL[:, end - query.shape[2] : end].bool()
        self.worst = max(self.worst, (out.view_as(expected) - expected)[real].abs().max().item() if real.any() else 0.0)
        self.calls += 1

    def _allowed(self, layer: int, heads: int, q: int) -> Tensor:
        """Which columns every query may see, bool [B, H, q, T]."""
        T = sum(keys.shape[2] for keys, _ in self.history[layer])
        mask_BT = self.mask_BL[:, :T].bool()
        token_BT = mask_BT.cumsum(-1) - 1
        allowed = torch.zeros(len(mask_BT), heads, q, T, dtype=torch.bool)
        for row, held_HP in enumerate(self.held[layer]):
            for head, held_P in enumerate(held_HP):
                allowed[row, head, :, : T - q] = torch.isin(token_BT[row, : T - q], held_P) & mask_BT[row, : T - q]
        allowed[..., T - q :] = torch.ones(q, q, dtype=torch.bool).tril() & mask_BT[:, None, None, T - q :]
        return allowed | ~allowed.any(-1, keepdim=True)  # padding: any finite output will do


class _AllIndexKeys:
    def __init__(self, keys_BTD: Tensor) -> None:
        self.keys_BTD = keys_BTD

    def update_indexer(self, new: Tensor, layer_idx: int) -> Tensor:
        return self.keys_BTD


def _choose_from_all(indexer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Tensor) -> None:
    recorder = kwargs["past_key_values"]
    if isinstance(recorder, RecordingCache):
        recorder.choose(indexer, args[:3], args[4])


def _compared(stock: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        layer = getattr(key, NAMED_LAYER, None) or kwargs.get(NAMED_LAYER)
        recorder = _RECORDERS.get(id(layer.session)) if isinstance(layer, CompressedLayer) else None
        out = stock(module, query, key, value, attention_mask, **kwargs)
        if recorder is not None:
            recorder.compare(layer, module, query, out[0], kwargs)
        return out

    return forward


for _kernel in ("sdpa", "eager", "reference"):
    AttentionInterface.register(PREFIX + _kernel, _compared(ALL_ATTENTION_FUNCTIONS[PREFIX + _kernel]))
