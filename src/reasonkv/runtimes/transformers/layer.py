"""One compressed layer: append, attend to everything that was fed, and only then compact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from reasonkv.methods import Observed
from reasonkv.offload import loaded
from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.attention import LogitRule, MaskLength
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.runtimes.transformers.packed import PackedStorage
from reasonkv.runtimes.transformers.sequences import LayerGroup
from reasonkv.runtimes.transformers.session import Session
from reasonkv.runtimes.transformers.sparse_read import SparseReader
from reasonkv.runtimes.transformers.storage import LayerStorage
from reasonkv.slots import CompactionGroup, make_view
from reasonkv.view import SlotView


class CompressedLayer(CacheLayerMixin):
    """One full-attention layer of a `CompressedCache`.

    Args:
        session: what all layers share.
        index: its number in the model.

    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, session: Session, index: int) -> None:
        super().__init__()
        self.session, self.index = session, index
        self.group: LayerGroup | None = None  # set by the first forward
        self.waiting = False  # between `update` and `after_attention`
        self.storage: LayerStorage | None = None
        self.rule: LogitRule | None = None  # of the newest forward
        self.query_heads = 0
        self.output_projection: Tensor | None = None  # [Hq, D, M], a view of the model's weight

    @property
    def forward(self) -> ForwardPlan:
        """The forward under way."""
        if self.group is None or self.group.forward is None:
            raise UnsupportedModelError(
                f"{self.session.model_name} built no mask through AttentionMaskInterface for this forward; "
                "a compressed cache needs the 2-D attention mask (do not pass a 4-D one)."
            )
        return self.group.forward

    @property
    def reader(self) -> SparseReader | None:
        """Chooses what this forward reads; None where it reads every slot."""
        reader = self.session.reader
        return None if reader is None or self.forward.is_prompt else reader

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of the layer contract; storage is made by the first forward, which knows the prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one forward's keys and values [B, H, q, D]; return views of everything the layer attends to."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise UnsupportedModelError("A compressed cache is for inference; call the model under torch.no_grad().")
        forward, session = self.forward, self.session
        assert self.group is not None
        if self.storage is None:
            capacity = self.group.capacity(session.max_length)
            of_layer = (key_states, value_states, session.needs, capacity)
            self.storage = PackedStorage(*of_layer, session.bits) if session.bits else LayerStorage(*of_layer)
        allocated = self.storage.allocated
        keys, values = self.storage.append(key_states, value_states, forward)
        if self.storage.allocated != allocated:
            session.note_allocation()
        if session.reader is not None:
            session.reader.fill(self.index, keys, forward)
        keys.reasonkv_layer = self  # type: ignore[attr-defined]
        self.waiting = self.is_initialized = True
        return keys, values

    def after_attention(self, query: Tensor, rule: LogitRule, module: nn.Module) -> None:
        """Store what the method wants to know of this forward, and report to the cache, which may compact.

        Args:
            query: rotated queries [B, Hq, q, D].
            rule: how this layer's logits come from query-key products.
            module: the model's attention module.

        """
        storage, session, forward = self.storage, self.session, self.forward
        assert storage is not None
        self.rule, self.query_heads = rule, query.shape[1]
        method, needs = session.method, session.needs
        storage.prepare(method, query.shape[1], query.shape[3])
        storage.remember(query, forward)
        if needs.observes:
            assert session.rotary is not None
            positions_Bq, valid_Bq = forward.token_indices(query.device)
            seen = Observed(query, positions_Bq, valid_Bq, layer=self.index, rotary=session.rotary)
            storage.take_in(method, seen, forward)
        if needs.output_projection and self.output_projection is None:
            self.output_projection = _output_projection(module, query.shape[1], query.shape[3])
        self.waiting = False
        session.layer_done(self)

    def log_mass_BH1W(self, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the logits of every slot, or None where every slot weighs one token."""
        assert self.storage is not None
        found = self.storage.log_mass(self.forward.width)
        return None if found is None else found[:, :, None].to(dtype)

    def view(self, group: CompactionGroup) -> SlotView:
        """Return what the method may look at for sequences that hold equally many slots."""
        storage, session = self.storage, self.session
        assert storage is not None and self.rule is not None
        rows, lengths = list(group.rows), [one.logical for one in group.after]
        keys, values = storage.slots(rows, group.held)
        return make_view(
            SlotView,
            storage,
            group,
            keys_BHND=keys,
            values_BHND=values,
            scaling=self.rule.scaling,
            seed=session.seed,
            layer=self.index,
            query_heads=self.query_heads,
            calibration=None if session.calibration is None else session.calibration.layer(self.index),
            rotary=session.rotary,
            token_ids=session.token_ids.of(rows, lengths) if session.needs.token_ids else None,
            output_projection_HqDM=None if self.output_projection is None else self.output_projection.float(),
            reference=session.reference,
        )

    def slot_positions(self) -> list[Tensor]:
        """Return the token index of every slot held now, int64 [H, P] per sequence.

        Raises:
            ValueError: the layer has not seen a token.

        """
        if self.storage is None or self.group is None:
            raise ValueError(f"Layer {self.index} has not seen a token.")
        found = []
        for number, row in enumerate(self.group.rows):
            numbers = [[number], [row.state.logical], [row.compacted_slots]]
            row_b, length_b, compacted_b = torch.tensor(numbers, device=self.storage.device)
            found.append(self.storage.token_indices(row_b, row.state.physical, length_b, compacted_b)[0])
        return found

    # -- the layer contract of transformers ---------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Columns fed so far, padding included: what positions and `generate` count with."""
        return self.session.columns_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes; the length knows its session, so that the mask function can announce the forward."""
        self.session.attach()
        return MaskLength(self.session.columns_seen + query_length, self.session.begin_forward), 0

    def get_max_length(self) -> int:
        """No limit on what may be fed."""
        return -1

    def reset(self) -> None:
        """Forget this layer's slots."""
        self.storage, self.group, self.rule, self.output_projection = None, None, None, None
        self.waiting = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows with their beams."""
        if self.storage is not None:
            self.storage.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; `CompressedCache.batch_repeat_interleave` does it for the bookkeeping too."""
        if self.storage is not None:
            self.storage.select_rows(torch.arange(self.storage.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.storage is not None:
            self.storage.select_rows(torch.arange(self.storage.rows)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: dropped slots cannot come back, so a rollback (assisted decoding) would be wrong."""
        raise UnsupportedModelError(
            "A compressed cache cannot be rolled back, which assisted (speculative) decoding needs; use plain decoding."
        )


def _output_projection(module: nn.Module, query_heads: int, head_dim: int) -> Tensor:
    """Return the columns of the output projection that each query head's output is multiplied with, [Hq, D, M]."""
    projection = getattr(module, "o_proj", None)
    with loaded(module if projection is None else projection):
        weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != query_heads * head_dim:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no plain output projection `o_proj`, which this option of the method reads."
        )
    return weight.detach().view(-1, query_heads, head_dim).permute(1, 2, 0)
