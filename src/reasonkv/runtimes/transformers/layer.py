"""One compressed layer: append, attend to everything promised, and only then carry out the event."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from reasonkv.methods import Observed
from reasonkv.plan import Plan
from reasonkv.protection import protected_slots
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
        self.track = 0  # of the cache's tracks; set by the first forward
        self.waiting = False  # between `update` and `after_attention`
        self.storage: LayerStorage | None = None
        self.rule: LogitRule | None = None  # of the newest forward
        self.query_heads = 0
        self.output_projection: Tensor | None = None  # [Hq, D, M], a view of the model's weight

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
        tracks = self.cache.tracks
        piece = tracks[self.track].piece if tracks else None
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
            self.storage = self.cache.new_storage(self.track)
        allocated = self.storage.allocated
        keys, values = self.storage.append(key_states, value_states, piece)
        if self.storage.allocated != allocated:
            self.cache.note_allocation()
        if self.cache.selection is not None:
            self.cache.selection.fill(self.index, keys, piece)
        keys.reasonkv_layer = self  # type: ignore[attr-defined]
        self.waiting = self.is_initialized = True
        return keys, values

    def after_attention(self, query: Tensor, rule: LogitRule, module: nn.Module) -> None:
        """Remember the queries, let the cache carry out the events of this forward, and hand on to it.

        Args:
            query: rotated queries [B, Hq, q, D].
            rule: how this layer's logits come from query-key products.
            module: the model's attention module.

        """
        assert self.storage is not None
        self.rule, self.query_heads = rule, query.shape[1]
        needs = self.cache.method.needs
        self.storage.remember_queries(query, self.piece)
        if needs.observes:
            self._observe(query)
        if needs.output_projection and self.output_projection is None:
            self.output_projection = _output_projection(module, *query.shape[1::2])
        self.waiting = False
        self.cache.layer_done(self)

    def _observe(self, query: Tensor) -> None:
        storage, cache, piece = self.storage, self.cache, self.piece
        assert storage is not None and cache.rotary is not None
        if not storage.row_state:
            B, Hq, _, D = query.shape
            storage.row_state = cache.method.new_row_state(B, Hq, D, query.device)
        positions_Bq, valid_Bq = piece.token_indices(query.device)
        cache.method.observe(
            storage.row_state, Observed(query, positions_Bq, valid_Bq, layer=self.index, rotary=cache.rotary)
        )

    def log_mass_BH1W(self, dtype: torch.dtype) -> Tensor | None:
        """What this forward adds to the logits of every slot, or None where every slot weighs one token."""
        assert self.storage is not None
        found = self.storage.log_mass(self.piece.width)
        return None if found is None else found[:, :, None].to(dtype)

    def view(self, rows: list[int], piece: Piece) -> SlotView:
        """What the method may look at for rows that hold equally many slots."""
        storage, cache = self.storage, self.cache
        assert storage is not None and self.rule is not None
        needs = cache.method.needs
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
            is_protected_BHN=self._protected(index, is_prompt, rows, piece),
            queries_BHqTD=queries,
            query_positions_BT=query_index,
            scaling=self.rule.scaling,
            state=storage.slot_state(rows, index, settled),
            length_B=numbers(lengths),
            event_B=numbers([piece.rows[row].events for row in rows]),
            row_seed_B=numbers([piece.rows[row].seed for row in rows]),
            seed=cache.seed,
            layer=self.index,
            rows=tuple(rows),
            prompt_length_B=numbers([piece.rows[row].state.prompt for row in rows]),
            query_heads=self.query_heads,
            calibration=None if cache.calibration is None else cache.calibration.layer(self.index),
            rotary=cache.rotary,
            token_ids=cache.token_ids.of(rows, lengths) if needs.token_ids else None,
            row_state={name: tensor[numbers(rows)] for name, tensor in storage.row_state.items()},
            output_projection_HqDM=None if self.output_projection is None else self.output_projection.float(),
            reference=cache.reference,
        )

    def _protected(self, index_BHN: Tensor, is_prompt_BHN: Tensor, rows: list[int], piece: Piece) -> Tensor:
        budgets = [one for one in (piece.rows[row].budget for row in rows) if one is not None]  # an event has one
        before, after = [piece.rows[row].state for row in rows], [piece.after[row] for row in rows]
        return protected_slots(index_BHN, is_prompt_BHN, budgets, before, after, self.cache.method.needs.recent)

    # -- the layer contract of transformers ---------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Columns fed so far, padding included: what positions and `generate` count with."""
        return self.cache.columns_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes; the length says whose it is, so that the mask function can announce the forward."""
        self.cache.attach()
        return MaskLength(self.cache.columns_seen + query_length, self.cache), 0

    def get_max_length(self) -> int:
        """No limit on what may be fed."""
        return -1

    def reset(self) -> None:
        """Forget this layer's slots."""
        self.storage, self.rule, self.waiting, self.is_initialized = None, None, False, False
        self.output_projection = None

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


def _output_projection(module: nn.Module, query_heads: int, head_dim: int) -> Tensor:
    """The columns of the layer's output projection that each query head's output is multiplied with, [Hq, D, M]."""
    projection = getattr(module, "o_proj", None)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != query_heads * head_dim:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no plain output projection `o_proj`, which this option of the method reads."
        )
    return weight.detach().view(-1, query_heads, head_dim).permute(1, 2, 0)
