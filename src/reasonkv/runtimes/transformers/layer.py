"""One compressed layer: append, attend to everything promised, and only then carry out the event."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from reasonkv.plan import Plan
from reasonkv.runtimes.transformers.attention import LogitRule, MaskLength
from reasonkv.runtimes.transformers.rows import Piece
from reasonkv.runtimes.transformers.storage import LayerStorage
from reasonkv.runtimes.transformers.support import UnsupportedModelError
from reasonkv.view import SlotView

if TYPE_CHECKING:
    from reasonkv.runtimes.transformers.cache import CompressedCache

Observer = Callable[[int, list[int], SlotView, Plan], None]
"""Called as `observer(layer, rows, view, plan)`: row i of the view and of the plan is batch row `rows[i]`."""


class CompressedLayer(CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`: its storage, and its event after attention."""

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: CompressedCache, index: int) -> None:
        super().__init__()
        self.attach(cache)
        self.index = index
        self.waiting = False  # between `update` and `after_attention`
        self.storage: LayerStorage | None = None
        self.rule: LogitRule | None = None  # of the newest forward

    def attach(self, cache: CompressedCache) -> None:
        """Belong to a cache (weakly: the cache owns its layers)."""
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> CompressedCache:
        """The cache this layer belongs to."""
        owner = self._cache()
        assert owner is not None, "a layer does not outlive its cache"
        return owner

    @property
    def piece(self) -> Piece:
        """The forward under way."""
        piece = self.cache.piece
        if piece is None:
            raise UnsupportedModelError(
                f"{self.cache.describe_model()} built no mask through AttentionMaskInterface for this forward; "
                "a compressed cache needs the 2-D attention mask (do not pass a 4-D one)."
            )
        return piece

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of the layer contract; storage is made by the first forward, which knows the prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one forward's keys and values [B, H, q, D]; return views of everything the layer attends to."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise UnsupportedModelError("A compressed cache is for inference; call the model under torch.no_grad().")
        piece = self.piece
        if self.storage is None:
            self.storage = self.cache.new_storage()
        allocated = self.storage.allocated
        keys, values = self.storage.append(key_states, value_states, piece)
        if self.storage.allocated != allocated:
            self.cache.note_allocation()
        keys.reasonkv_layer = self  # type: ignore[attr-defined]
        self.waiting = self.is_initialized = True
        return keys, values

    def after_attention(self, query: Tensor, rule: LogitRule) -> None:
        """Remember the queries, carry out the events of this forward, and hand on to the cache.

        Args:
            query: rotated queries [B, Hq, q, D].
            rule: how this layer's logits come from query-key products.

        """
        assert self.storage is not None
        self.rule = rule
        piece = self.piece
        self.storage.remember_queries(query, piece)
        if any(keep is not None for keep in piece.keep):
            start = time.perf_counter()
            self._compact(piece, rule.scaling)
            self.cache.compaction_seconds += time.perf_counter() - start
        self.waiting = False
        self.cache.layer_done()

    def _compact(self, piece: Piece, scaling: float) -> None:
        storage, cache = self.storage, self.cache
        assert storage is not None
        plans: list[tuple[list[int], Plan, Tensor, Tensor]] = []
        seen: list[tuple[list[int], SlotView, Plan]] = []
        for rows in piece.groups(storage.ring_length):
            view = self.view(rows, piece, scaling)
            keep = piece.keep[rows[0]]
            assert keep is not None
            with torch.autocast(view.keys_BHND.device.type, enabled=False):  # scores are float32 whoever calls
                plan = cache.method.plan(view, keep)
            plan.check(tuple(view.positions_BHN.shape), keep, view.is_protected_BHN)  # type: ignore[arg-type]
            if plan.fold is not None:
                if not cache.method.needs.folds:
                    raise UnsupportedModelError(f"{cache.method.name} folds slots without declaring Needs(folds=True).")
                cache.note_folds(rows, plan)
            plans.append((rows, plan, view.positions_BHN, view.counts_BHN))
            if cache.observer is not None:
                seen.append((rows, view, plan))
        for rows, view, plan in seen:  # once every plan is known to be sound, and while the slots are still there
            cache.observer(self.index, rows, view, plan)  # type: ignore[misc]
        storage.carry_out(plans, piece)

    def view(self, rows: list[int], piece: Piece, scaling: float) -> SlotView:
        """What the method may look at for rows that hold equally many slots."""
        storage, cache = self.storage, self.cache
        assert storage is not None
        held = piece.held[rows[0]]
        lengths = [piece.after[row].length for row in rows]
        settled = [piece.rows[row].settled for row in rows]
        keys, values = storage.slots(rows, held)
        index = storage.token_indices(rows, held, lengths, settled)
        queries = query_index = None
        if storage.ring_length:
            queries, query_index = storage.recent_queries(rows, lengths)
        is_prompt = cache.is_prompt(index, rows)

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, device=keys.device)

        return SlotView(
            keys_BHND=keys,
            values_BHND=values,
            positions_BHN=index,
            counts_BHN=storage.source_counts(rows, held, settled),
            is_prompt_BHN=is_prompt,
            is_protected_BHN=cache.is_protected(index, is_prompt),
            queries_BHqTD=queries,
            query_positions_BT=query_index,
            scaling=scaling,
            length_B=numbers(lengths),
            event_B=numbers([piece.rows[row].events for row in rows]),
            row_seed_B=numbers([piece.rows[row].seed for row in rows]),
            seed=cache.seed,
            layer=self.index,
            rows=tuple(rows),
            reference=cache.reference,
        )

    # -- the layer contract of transformers ---------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Columns fed so far, padding included: what positions and `generate` count with."""
        return self.cache.columns_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes; the length says whose it is, so that the mask function can announce the forward."""
        self.cache.take_over()
        return MaskLength(self.cache.columns_seen + query_length, self.cache), 0

    def get_max_length(self) -> int:
        """No limit on what may be fed."""
        return -1

    def reset(self) -> None:
        """Forget this layer's slots."""
        self.storage, self.rule, self.waiting, self.is_initialized = None, None, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows with their beams."""
        if self.storage is not None:
            self.storage.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; `CompressedCache.batch_repeat_interleave` does it for the bookkeeping too."""
        if self.storage is not None and self.storage.keys is not None:
            rows = torch.arange(self.storage.keys.shape[0], device=self.storage.keys.device)
            self.storage.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.storage is not None and self.storage.keys is not None:
            rows = torch.arange(self.storage.keys.shape[0], device=self.storage.keys.device)
            self.storage.select_rows(rows[indices.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: dropped slots cannot come back, so a rollback (assisted decoding) would be wrong."""
        raise UnsupportedModelError(
            "A compressed cache cannot be rolled back, which assisted (speculative) decoding needs; use plain decoding."
        )
