"""SteadyCache: decoding with static shapes between two compactions, so that a model's forward can be compiled.

    cache = SteadyCache(model, SnapKV(), tokens=512)
    model.generate(**inputs, past_key_values=cache)  # compiled where transformers compiles

Every layer attends to its whole storage under a mask. Tensors say where the next token goes, so that a compiled forward
reads no number of the host. transformers makes the masks of a compilable cache outside of the compiled graph. There
lengths move on, and there a compaction runs, before the step that follows it. Between compactions nothing waits for
the device: what sequences hold is brought up to date for all steps at once.

Legend: B rows, H KV heads, Hq query heads, C slots of the storage, D head_dim, T ring length, L steps until the method
observes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from reasonkv.methods import Observed, divides
from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.attention import base_kernel
from reasonkv.runtimes.transformers.cache import CompressedCache
from reasonkv.runtimes.transformers.forward import ForwardPlan, SequenceState
from reasonkv.runtimes.transformers.layer import CompressedLayer
from reasonkv.runtimes.transformers.masks import MaskLength
from reasonkv.runtimes.transformers.stats import CacheStats
from reasonkv.runtimes.transformers.storage import LayerStorage

CAPACITY_STEP = 256
"""Capacities are multiples of it, so that prompts of many lengths are served by few compiled forwards."""
REFUSED = "Steps with static shapes (compile=True) do not serve"


class Cursor:
    """Where a step writes and what it may read, on the device; all layers share it.

    Args:
        storage: of a layer.
    """

    def __init__(self, storage: LayerStorage) -> None:
        B, H, C, _ = storage.keys.shape
        numbers = torch.arange(max(B, H, C), device=storage.device)
        self.row_B, self.head_1H, self.slot_C = numbers[:B].clone(), numbers[None, :H].clone(), numbers[:C].clone()
        # slot and token index of every row's new token, and how many steps were taken before since `start`
        self.at_3B = numbers.new_zeros(3, B)
        self.mask_B11C = storage.keys.new_zeros(B, 1, 1, C)  # 0 at slots that are held, -inf elsewhere
        self.is_fed = numbers.new_ones((), dtype=torch.bool)  # no row was given padding

    def start(self, rows: list[SequenceState]) -> None:
        """Stand before the next step of some rows."""
        lengths = [[one.state.physical for one in rows], [one.state.logical for one in rows], [0] * len(rows)]
        self.at_3B.copy_(torch.tensor(lengths) - 1)
        hidden_BC = self.slot_C > self.at_3B[0][:, None]
        self.mask_B11C.zero_().masked_fill_(hidden_BC[:, None, None], float("-inf"))

    def step(self, attention_mask: Tensor | None) -> Tensor:
        """Move on by a token, and return the mask of its forward, [B, 1, 1, C]."""
        self.at_3B.add_(1)
        self.mask_B11C.view(len(self.row_B), -1).scatter_(1, self.at_3B[0][:, None], 0.0)
        if attention_mask is not None:
            self.is_fed.logical_and_(attention_mask[:, -1].all())
        return self.mask_B11C


class Beside:
    """What one layer's attention needs beside keys and values; an attribute of the keys, through which it is found.

    Args:
        layer: the compressed layer.
        cursor: of all layers.
        steps: steps whose queries the method is given at once; 0 if it observes nothing.
    """

    def __init__(self, layer: CompressedLayer, cursor: Cursor, steps: int) -> None:
        storage = layer.storage
        assert storage is not None
        B, H, C, D = storage.keys.shape
        self.cursor, self.ring_BTHqD = cursor, storage.ring
        self.queries_BLHqD = storage.keys.new_zeros(B, steps, layer.query_heads, D) if steps else None
        weighs = "log_mass" in storage.needs.stored_state
        self.log_mass_BH1C = storage.keys.new_zeros(B, H, 1, C) if weighs else None

    def take(self, query_BHq1D: Tensor) -> None:
        """Store a step's rotated queries where the method will look for them."""
        at_3B, row_B, query_BHqD = self.cursor.at_3B, self.cursor.row_B, query_BHq1D[:, :, 0]
        if self.ring_BTHqD is not None:
            self.ring_BTHqD.index_put_((row_B, at_3B[1] % self.ring_BTHqD.shape[1]), query_BHqD)
        if self.queries_BLHqD is not None:
            self.queries_BLHqD.index_put_((row_B, at_3B[2]), query_BHqD)

    def mask(self, mask_B11C: Tensor) -> Tensor:
        """Return what is added to the logits of every slot, [B, 1 or H, 1, C]."""
        return mask_B11C if self.log_mass_BH1C is None else mask_B11C + self.log_mass_BH1C


class SteadyLayer(CacheLayerMixin):
    """One layer between two compactions: the storage of a `CompressedLayer` at its full capacity.

    Args:
        layer: the compressed layer; its storage has the capacity.
        cursor, steps: as in `Beside`.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, layer: CompressedLayer, cursor: Cursor, steps: int) -> None:
        super().__init__()
        assert layer.storage is not None
        self.keys, self.values, self.cursor = layer.storage.keys, layer.storage.values, cursor
        self.beside = Beside(layer, cursor, steps)
        # what knows no keys: a circle would keep them until it is collected
        self.keys.reasonkv_steady = self.beside  # type: ignore[attr-defined]
        self.is_initialized = True
        for tensor in (*vars(self).values(), *vars(cursor).values(), *vars(self.beside).values()):
            if isinstance(tensor, Tensor):  # CUDA graphs then write in place, and record anew for another cache
                torch._dynamo.mark_static_address(tensor, guard=False)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of the layer contract; everything is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's key and value [B, H, 1, D], and return those of all slots, [B, H, C, D]."""
        slot_BH = self.cursor.row_B[:, None], self.cursor.head_1H, self.cursor.at_3B[0][:, None]
        self.keys.index_put_(slot_BH, key_states[:, :, 0])
        self.values.index_put_(slot_BH, value_states[:, :, 0])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Part of the layer contract; `SteadyCache.get_seq_length` answers."""
        return int(self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Part of the layer contract; `SteadyCache.get_mask_sizes` answers."""
        return int(self.keys.shape[2]), 0

    def get_max_length(self) -> int:
        """No limit on what may be fed."""
        return -1


class StepLength(MaskLength):
    """A key length whose mask is that of a steady step."""

    cache: SteadyCache

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Announce a step, and return its mask."""
        return self.cache.step(int(kwargs["batch_size"]), kwargs.get("attention_mask"))


class SteadyCache(CompressedCache):
    """A `CompressedCache` whose decode steps have static shapes; prompts are fed as there, and so are later turns.

    Every step feeds a token to every row. A row that ended is fed whatever follows, as `generate` does.

    Raises:
        UnsupportedModelError: a model, a method or a budget that has no static shapes.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **options: Any) -> None:
        self._steady: list[SteadyLayer] | None = None
        self._pending = self._run = 0  # steps since the last account, and steps from it to the next
        self._event = 0  # and to the next compaction
        if base_kernel(model.config, options.get("kernel")).startswith("flash"):
            raise UnsupportedModelError(f"{REFUSED} flash attention, which takes no mask; load the model with sdpa.")
        super().__init__(model, *args, **options)
        self.session.capacity_step = CAPACITY_STEP
        self._check(self._attachment.is_plain)

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile decode steps; it makes their masks before."""
        return True

    @property
    def rows(self) -> list[SequenceState]:
        """What every sequence holds."""
        self._leave()
        return super().rows

    @property
    def columns_seen(self) -> int:
        """Columns fed so far, padding included."""
        return super().columns_seen + self._pending

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns fed so far: what `generate` counts with at a later turn."""
        return self.columns_seen

    def begin_forward(self, batch: int, columns: int, attention_mask: Tensor | None) -> ForwardPlan:
        """Announce a forward that is no steady step; `generate` does so once with its 2-D mask, the model again."""
        again, is_begun = self.forward, self.layers_done or any(one.waiting for one in self.compressed_layers)
        if again and attention_mask is None and not is_begun and (len(again.rows), again.columns) == (batch, columns):
            return again
        return super().begin_forward(batch, columns, attention_mask)

    def step(self, batch: int, attention_mask: Tensor | None) -> Tensor:
        """Announce a steady step, and return its mask [B, 1, 1, C]; a compaction that is due runs before."""
        assert self._steady is not None
        cursor = self._steady[0].cursor
        if batch != len(cursor.row_B):
            self._leave()
            super().begin_forward(batch, 1, attention_mask)  # says so
        if self._pending == self._run:
            self._account()
            self._start(self._steady)
        self._pending += 1
        return cursor.step(attention_mask)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the size of a mask; its type decides which mask is made."""
        self.session.attach()
        if query_length == 1 and self._enter():
            length = StepLength(self.columns_seen + 1, self.session.begin_forward, False)
            length.cache = self
            return length, 0
        self._leave()
        return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[no-any-return]

    def tokens_to_next_event(self) -> list[int | None]:
        """Return per row how many tokens until it is compacted."""
        self._leave()
        return super().tokens_to_next_event()

    def stats(self) -> CacheStats:
        """Return what every sequence holds and evicted so far, and the bytes of it."""
        self._leave()
        return super().stats()

    def slot_positions(self, layer: int) -> list[Tensor]:
        """Return the token index of every slot a layer holds now, int64 [H, P] per row."""
        self._leave()
        return super().slot_positions(layer)

    def reset(self) -> None:
        """Forget everything fed; the cache can then be used for another batch."""
        super().reset()
        self._steady, self._pending = None, 0

    def _move_rows(self, index: list[int]) -> None:
        self._leave()
        self._steady = None
        super()._move_rows(index)

    def _check(self, is_plain_model: bool) -> None:
        """Raise one sentence about what has no static shapes."""
        needs, budget = self.method.needs, self.budget
        refused = {
            "a method that selects what it reads": self.session.reader is not None,
            "full KV, which grows": budget is None,
            "slots in fewer bits": self.session.kv_dtype is not None,
            "a method that reads token ids": needs.token_ids,
            "layers with budgets or turns of their own": budget is not None
            and (divides(self.method, budget) or budget.stagger > 1),
            "this model: layers that are not bounded, or attention of its own": not is_plain_model
            or any(type(layer) is not CompressedLayer for layer in self.layers),
        }
        found = next((what for what, is_so in refused.items() if is_so), None)
        if found is not None:
            self.detach()
            raise UnsupportedModelError(f"{REFUSED} {found}; leave compile out.")

    def _enter(self) -> bool:
        """Go on with static shapes, if every row is past its prompt; return whether it is so."""
        if self.layers is self._steady:
            return True
        rows = self.layer_groups[0].rows if self.layer_groups else []
        if not rows or any(row.state.logical < row.state.prompt for row in rows):
            return False
        storages = [storage for _, storage in self._storages()]
        if not all([storage.to_capacity() for storage in storages]):
            return False
        if len({storage.device for storage in storages}) > 1:
            raise UnsupportedModelError("A model on several devices is not compiled; leave compile out.")
        self.note_allocation()
        if self._steady is None or any(a.keys is not b.keys for a, b in zip(self._steady, storages, strict=True)):
            needs, cursor = self.session.needs, Cursor(storages[0])
            steps = needs.observe_steps if needs.observes else 0
            self._steady = [SteadyLayer(layer, cursor, steps) for layer in self.compressed_layers]
        self._start(self._steady)
        return True

    def _leave(self) -> None:
        """Bring the account of rows up to date, and go on with growing shapes."""
        self._account()
        if self.layers is self._steady:
            self.layers = self.compressed_layers

    def _start(self, steady: list[SteadyLayer]) -> None:
        """Begin the steps to the next account: a compaction, or a method that observes."""
        rows, steps = self.layer_groups[0].rows, self.session.needs.observe_steps
        distances = [one for one in super().tokens_to_next_event() if one is not None]
        self._event = min(distances, default=1 << 62)
        most = self.layer_groups[0].capacity(self.session.max_length)
        assert most is not None  # `_enter` has checked that the storage is bounded
        room = min(most, len(steady[0].cursor.slot_C)) - max(row.state.physical for row in rows)
        if room == 0:  # a capacity for `max_length` tokens
            raise UnsupportedModelError(f"The text grows beyond the max_length of {self.session.max_length} tokens.")
        self._run = min(self._event, room, steps if self.session.needs.observes else room)
        steady[0].cursor.start(rows)
        for layer, one in zip(self.compressed_layers, steady, strict=True):
            mass_BH1C = one.beside.log_mass_BH1C
            found_BH1C = layer.log_mass_of(len(steady[0].cursor.slot_C), one.keys.dtype)
            if mass_BH1C is not None and found_BH1C is not None:
                mass_BH1C.copy_(found_BH1C)
        self.layers = steady

    def _account(self) -> None:
        """Advance the account of rows by the steps taken since the last one, and compact where it is due."""
        steps, self._pending, steady = self._pending, 0, self._steady
        if not steps or steady is None:
            return
        last = int(steps == self._event)  # alone, as an observer of compactions sees it in every cache
        for first, count in ((0, steps - last), (steps - last, last)):
            if count:
                self._fed(steady, first, count)

    def _fed(self, steady: list[SteadyLayer], first: int, count: int) -> None:
        """Move all rows on by some of the steps, whose keys, values and queries are stored."""
        group, session = self.layer_groups[0], self.session
        forward = ForwardPlan.of(group.rows, count, layers=group.layers)
        if any(keep is not None for keep in forward.keep) and not bool(steady[0].cursor.is_fed):
            raise UnsupportedModelError("A row was given padding after its prompt; feed every row a token a step.")
        group.forward = forward
        session.warn_past_context(max(row.state.logical for row in group.rows) + count)
        for layer, one in zip(self.compressed_layers, steady, strict=True):
            queries_BLHqD, storage = one.beside.queries_BLHqD, layer.storage
            assert storage is not None
            if queries_BLHqD is not None:
                positions_Bq, valid_Bq = forward.token_indices(storage.device)
                query = queries_BLHqD[:, first : first + count].transpose(1, 2).clone()  # it may wait
                seen = Observed(query, positions_Bq, valid_Bq, layer=layer.index, rotary=layer.rotary)
                storage.take_in(session.method, seen, forward)
            self.layer_done(layer)
