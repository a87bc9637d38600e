"""One compressed layer: append, attend to everything that was fed, and only then compact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from reasonkv.layers import layer_readers
from reasonkv.methods import Observed
from reasonkv.offload import loaded, plain
from reasonkv.resolve import UnsupportedModelError
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers.attention import LogitRule
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.runtimes.transformers.latent import Expansion
from reasonkv.runtimes.transformers.masks import MaskLength
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
        self.waiting = False  # between `update` and the last `after_attention`
        self.readers = self.unread = 1  # layers that attend to these slots, and those that did not yet in this forward
        self.appended: ForwardPlan | None = None  # the newest forward
        self.storage: LayerStorage | None = None
        self.rule: LogitRule | None = None  # of the newest forward
        self.query_heads = 0
        self.output_projection: Tensor | None = None  # [Hq, D, M], a view of the model's weight
        self.expansion: Expansion | None = None  # of latent attention
        self.leader = index  # the layer whose plans this one carries out
        self.beside = 0  # dimensions behind the values, of what else a model caches of a token

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
    def keys(self) -> Tensor | None:
        """Keys of the slots that are held [B, H, P, D], as models ask a stock layer for them; None before any."""
        return self._held("keys")

    @keys.setter
    def keys(self, none: None) -> None:
        """Part of the layer contract, which begins without keys."""

    @property
    def values(self) -> Tensor | None:
        """Values of the slots that are held [B, H, P, D]; None before any."""
        return self._held("values")

    @values.setter
    def values(self, none: None) -> None:
        """Part of the layer contract, which begins without values."""

    def _held(self, name: str) -> Tensor | None:
        if self.storage is None or self.group is None:
            return None
        found: Tensor = getattr(self.storage, name)
        return found[:, :, : max(row.state.physical for row in self.group.rows)]

    @property
    def reader(self) -> SparseReader | None:
        """Chooses what this forward reads; None where it reads every slot."""
        reader = self.session.reader
        return None if reader is None or self.forward.is_prompt else reader

    @property
    def rotary(self) -> Rotary | None:
        """How this layer rotates its keys, if the method asks for it."""
        rotaries = self.session.rotaries
        return None if rotaries is None else rotaries[self.index]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of the layer contract; storage is made by the first forward, which knows the prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one forward's keys and values [B, H, q, D]; return views of everything the layer attends to."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise UnsupportedModelError("A compressed cache is for inference; call the model under torch.no_grad().")
        forward, session = self.forward, self.session
        assert self.group is not None
        if self.appended is forward:
            raise UnsupportedModelError(
                f"Layer {self.index} of {session.model_name} caches twice in one forward, as a decoder that reads an "
                "encoder does; only decoders that read nothing but their own text are served."
            )
        self.appended = forward
        if self.storage is None:
            capacity = self.group.capacity(session.max_length)
            if capacity is not None:
                capacity += -capacity % session.capacity_step
            of_layer = (key_states, value_states, session.needs, capacity)
            self.storage = PackedStorage(*of_layer, session.kv_dtype) if session.kv_dtype else LayerStorage(*of_layer)
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

        Where later layers share these keys and values, the method sees this layer's queries, and nothing is compacted
        before the last of them has attended.

        Args:
            query: rotated queries [B, Hq, q, D].
            rule: how this layer's logits come from query-key products.
            module: the model's attention module.
        """
        storage = self.storage
        assert storage is not None
        if self.unread < self.readers:
            self._read()
            return
        if self.rule is None and isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            self.readers = self.unread = layer_readers(config, self.index)
        self.rule, self.query_heads = rule, query.shape[1]
        if hasattr(module, "expand_kv"):
            latent, rotated = storage.keys.shape[3], storage.values.shape[3] - self.beside
            self.expansion = Expansion(module.expand_kv, latent, rotated)  # type: ignore[arg-type]
        if self.leader == self.index:
            self._take_queries(storage, query, module)
        self._read()

    def after_own_attention(self, query_heads: int) -> None:
        """As `after_attention`, once a model has attended by code of its own, which shows no queries.

        Args:
            query_heads: Hq.
        """
        assert self.storage is not None
        self.rule, self.query_heads = LogitRule(self.storage.keys.shape[3] ** -0.5), query_heads
        self._read()

    def _take_queries(self, storage: LayerStorage, query: Tensor, module: nn.Module) -> None:
        session, forward = self.session, self.forward
        method, needs = session.method, session.needs
        observed_dim, value_dim = None, storage.values.shape[3]
        if self.expansion is not None:
            observed_dim, value_dim = self.expansion.latent + self.expansion.rotated, module.v_head_dim  # type: ignore[assignment]
        storage.prepare(method, query.shape[1], query.shape[3], observed_dim)
        storage.remember(query, forward)
        if needs.observes:
            positions_Bq, valid_Bq = forward.token_indices(query.device)
            query = query if self.expansion is None else self.expansion.absorb(query)
            seen = Observed(query, positions_Bq, valid_Bq, layer=self.index, rotary=self.rotary)
            storage.take_in(method, seen, forward)
        if needs.output_projection and self.output_projection is None:
            self.output_projection = _output_projection(module, query.shape[1], value_dim)

    def _read(self) -> None:
        self.unread -= 1
        if self.unread == 0:
            self.waiting, self.unread = False, self.readers
            self.session.layer_done(self)

    def log_mass_BH1W(self, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the logits of every slot, or None where every slot weighs one token."""
        return self.log_mass_of(self.forward.width, dtype)

    def log_mass_of(self, width: int, dtype: torch.dtype) -> Tensor | None:
        """Return the same of the first slots, [B, H, 1, width]."""
        assert self.storage is not None
        found = self.storage.log_mass(width)
        return None if found is None else found[:, :, None].to(dtype)

    def view(self, group: CompactionGroup) -> SlotView:
        """Return what the method may look at for sequences that hold equally many slots."""
        storage, session = self.storage, self.session
        assert storage is not None and self.rule is not None
        rows, lengths = list(group.rows), [one.logical for one in group.after]
        keys, values = storage.slots(rows, group.held)
        if self.expansion is not None:
            keys, values = self.expansion.shown(keys, values)
        made = make_view(
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
            rotary=self.rotary,
            token_ids=session.token_ids.of(rows, lengths) if session.needs.token_ids else None,
            output_projection_HqDM=None if self.output_projection is None else self.output_projection.float(),
            reference=session.reference,
        )
        return made if self.expansion is None else self._absorbed(made, self.expansion)

    def _absorbed(self, view: SlotView, expansion: Expansion) -> SlotView:
        """Return a view whose queries and output projection fit latent keys and values."""
        queries, output = view.queries_BHqTD, view.output_projection_HqDM
        return replace(
            view,
            queries_BHqTD=None if queries is None else expansion.absorb(queries),
            output_projection_HqDM=None if output is None else expansion.project(output, view.keys_BHND),
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
        session = self.session
        return MaskLength(session.columns_seen + query_length, session.begin_forward, session.reads_mask), 0

    def get_max_length(self) -> int:
        """No limit on what may be fed."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows with their beams."""
        if self.storage is not None:
            self.storage.select_rows(beam_idx)

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
    return plain(weight).detach().view(-1, query_heads, head_dim).permute(1, 2, 0)
