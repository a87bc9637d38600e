"""CompressedCache: a transformers cache that stays within a budget.

    cache = CompressedCache(model, SnapKV(), tokens=512)
    model.generate(**inputs, past_key_values=cache)

The mask function announces a forward (`begin_forward`). Every compressed layer appends its tokens, attends to all it
holds, and only then compacts. After the last layer the sequences move on.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv import resolve
from reasonkv.budget import Budget, BudgetFields
from reasonkv.calibration import Calibration, default_method
from reasonkv.layers import is_recurrent, layer_rotaries
from reasonkv.methods import Method, Requirements, get_method, refuse_future
from reasonkv.numbers import KVDtype, kv_dtype, whole_number, whole_numbers
from reasonkv.offload import input_device
from reasonkv.resolve import UnsupportedModelError, check_model, check_window, context_length
from reasonkv.runtimes.transformers import sequences
from reasonkv.runtimes.transformers.attachment import Attachment
from reasonkv.runtimes.transformers.events import settle_layers
from reasonkv.runtimes.transformers.forward import ForwardPlan, SequenceState, check_padding, fed_tokens
from reasonkv.runtimes.transformers.kinds import empty_layers
from reasonkv.runtimes.transformers.layer import CompressedLayer
from reasonkv.runtimes.transformers.lightning import FittingCache
from reasonkv.runtimes.transformers.packed import tokens_to_packing
from reasonkv.runtimes.transformers.sequences import LayerGroup
from reasonkv.runtimes.transformers.session import Observer, Session, callbacks_of, load_statistics, resolve_for, weakly
from reasonkv.runtimes.transformers.sparse_read import SparseReader
from reasonkv.runtimes.transformers.stats import CacheStats, collect_stats
from reasonkv.runtimes.transformers.storage import LayerStorage
from reasonkv.runtimes.transformers.tokens import TokenLog
from reasonkv.view import TraceAttention


class CompressedCache(FittingCache):
    """A KV cache whose full-attention layers stay within a budget; sliding and recurrent layers stay stock.

    Args:
        model: the model that will use the cache; its attention implementation is wrapped until `detach()`.
        method: a `Method`, or its spec (`"rkv:window=16"`). Unless given, full KV without a budget, and with one what
            suits the model best (`reasonkv.calibration.default_method`).
        budget: a `Budget`, its `tokens`, or a `Window`; every field is also a keyword. Full KV takes none.
        prompt_lengths: tokens of each row's prompt; unless given, what the first forward feeds.
        seed, row_seeds: seed of stochastic methods, and a further one per row (0 each unless given).
        max_length: most tokens a row will ever see, if known; storage is never larger.
        reopen_prompt: count what later turns feed in chunks of several tokens as prompt, too.
        kernel: attention kernel to drive ("sdpa", "eager", "flash_attention_2", "reference"); the model's by default.
        observer: called as `observer(layer, rows, view, plan)` for every plan before storage is rewritten, which it
            must not change.
        reference: full KV's attention over the rows that will be fed, for methods that look into the future.
        window_events: (row, logical length) of every event, for a `Window` whose events a scheduler decides
            (`reasonkv.periodic.periodic_events`) instead of the rows' own lengths.
        calibration: statistics of the model's queries, or their file, for methods and calibrated `layer_shares`; looked
            up beside the model and in the user's cache unless given (`reasonkv.calibration.find_calibration`).
        dtype: what all but the newest 32 to 63 slots of a row are stored in: "int8", "int4", "int2" on grids, "turbo4",
            "turbo2" rotated and in a codebook (`reasonkv.runtimes.transformers.packed`); None: the model's dtype.
        fields: `tokens`, `keep`, `interval` and the other fields of `Budget`, instead of `budget`.

    Raises:
        UnsupportedModelError, BudgetError, MethodError: the model or the choice cannot be served.
        CalibrationError: statistics or shares that are needed are missing or of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method | None = None,
        budget: Budget | int | None = None,
        *,
        prompt_lengths: list[int] | int | None = None,
        seed: int = 0,
        row_seeds: list[int] | None = None,
        max_length: int | None = None,
        reopen_prompt: bool = False,
        kernel: str | None = None,
        observer: Observer | None = None,
        reference: TraceAttention | None = None,
        calibration: Calibration | str | Path | None = None,
        window_events: Sequence[tuple[int, int]] | None = None,
        dtype: KVDtype | None = None,
        **fields: Unpack[BudgetFields],
    ) -> None:
        whole = Budget.from_fields(budget, fields)
        if problems := check_model(model, None if method is None else get_method(method)):
            raise UnsupportedModelError(problems[0])
        chosen = get_method(method or "full") if method or whole is None else default_method(model, calibration)
        self.method, self.budget = resolve_for(model, chosen, whole, calibration)
        check_window(self.budget, reopen_prompt=reopen_prompt, listed=window_events is not None)
        if reference is None:
            refuse_future(self.method)
        needs = self.method.needs
        rotates = needs.rotary or needs.calibration
        rotaries = [one.to(input_device(model)) for one in layer_rotaries(model.config)] if rotates else None
        reader, self.budget = SparseReader.of(self.method, model, self.budget, rotaries)
        self.window_events, self.reopen_prompt = window_events, reopen_prompt
        self.prompt_lengths = whole_numbers(prompt_lengths, "prompt_lengths")
        self.row_seeds = whole_numbers(row_seeds, "row_seeds")
        self.layer_groups: list[LayerGroup] = []  # one, unless the method gives layers budgets of their own
        self.layers_done = self.bytes_peak = 0
        self.compaction_seconds = 0.0
        self._attachment = Attachment(model, kernel, self._receiver(needs), unrotates=rotates)
        self.session = Session(
            method=self.method,
            needs=needs,
            seed=whole_number(seed, "seed"),
            observer=observer,
            reference=reference,
            calibration=load_statistics(model, calibration) if needs.calibration else None,
            rotaries=rotaries,
            reader=reader,
            model_name=type(model).__name__,
            max_length=None if max_length is None else whole_number(max_length, "max_length", 1),
            kv_dtype=kv_dtype(dtype),
            reads_mask=resolve.reads_mask(model),
            context=context_length(model),
            **callbacks_of(self),
        )
        self.attach()
        self._config, self._is_recurrent = model.config, is_recurrent(model.config)
        super().__init__(layers=empty_layers(self.session, model.config))
        self.compressed_layers = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        self._plans_last = needs.scope == "model" or any(x.leader != x.index for x in self.compressed_layers)
        sequences.check_layers(self.method, self.budget, len(self.compressed_layers), self.session.reads_mask)

    @property
    def rows(self) -> list[SequenceState]:
        """What every sequence holds; in the first layer, where layers have budgets of their own."""
        return self.layer_groups[0].rows if self.layer_groups else []

    @property
    def forward(self) -> ForwardPlan | None:
        """The forward under way, as the first layer sees it."""
        return self.layer_groups[0].forward if self.layer_groups else None

    @property
    def columns_seen(self) -> int:
        """Columns fed so far, padding included."""
        return self.session.columns_seen

    @property
    def token_ids(self) -> TokenLog:
        """Every token each sequence has seen, if the method reads them."""
        return self.session.token_ids

    def begin_forward(self, batch: int, columns: int, attention_mask: Tensor | None) -> ForwardPlan:
        """Announce a forward, and return its plan; called by the registered mask function before the first layer.

        Args:
            batch: rows.
            columns: tokens per row, padding included.
            attention_mask: 2-D mask over every column fed so far and these, or None when nothing is padding.

        Raises:
            UnsupportedModelError, BudgetError: the forward cannot be served.
        """
        if self.forward is not None and (self.layers_done or any(x.waiting for x in self.compressed_layers)):
            raise UnsupportedModelError(
                "The previous forward did not finish, or its attention did not go through this cache; "
                "call cache.reset() before going on."
            )
        if self.rows and len(self.rows) != batch:
            raise UnsupportedModelError(
                f"This cache holds {len(self.rows)} rows but the forward has {batch}; "
                "call cache.reset() or make a new cache for a new batch."
            )
        if self._is_recurrent and attention_mask is not None:
            check_padding(attention_mask, columns, [row.state.logical > 0 for row in self.rows])
        valid, fed = fed_tokens(batch, columns, attention_mask)
        if not self.layer_groups:
            self._first_rows(batch, fed)
        else:
            if columns > 1 and (self.budget is not None or self.session.reader is not None):
                is_declared, recent = self.prompt_lengths is not None, self.session.needs.recent
                sequences.later_prompt(self.layer_groups, fed, is_declared, self.reopen_prompt, recent)
        for group in self.layer_groups:
            group.forward = ForwardPlan.of(group.rows, columns, valid, fed, group.layers)
        self.session.warn_past_context(max(row.state.logical + new for row, new in zip(self.rows, fed, strict=True)))
        forward = self.forward
        assert forward is not None
        if self.session.needs.token_ids:
            self.token_ids.append(forward)
        return forward

    def layer_done(self, layer: CompressedLayer) -> None:
        """Compact a layer that attended, or after the last layer all of them; then move the sequences on.

        Raises:
            PlanError: a plan that cannot be carried out, a defect of the method.
        """
        forward = layer.forward
        self.layers_done += 1
        is_last = self.layers_done == len(self.compressed_layers)
        waits = self._plans_last and any(keep is not None for keep in forward.keep)
        layers = [layer] if not waits else self.compressed_layers if is_last else []
        self.compaction_seconds += settle_layers(self.method, self.session.observer, layers, forward)
        if is_last:
            for group in self.layer_groups:
                assert group.forward is not None
                group.forward.commit()
                group.forward = None
            self.session.columns_seen += forward.columns
            self.layers_done = 0

    def tokens_to_next_event(self) -> list[int | None]:
        """Return per row how many tokens until it is compacted or packed: the longest chunk that crosses neither."""
        groups, layers, events = self.layer_groups, len(self.compressed_layers), self.window_events
        if not groups and self.prompt_lengths:
            groups, _ = sequences.make_groups(self.method, self.budget, layers, self.prompt_lengths, None, events)
        return sequences.tokens_to_next_event(groups, tokens_to_packing if self.session.kv_dtype else None)

    def note_allocation(self) -> None:
        """Remember the most bytes of keys and values that were allocated at once."""
        self.bytes_peak = max(self.bytes_peak, sum(one.bytes_allocated() for _, one in self._storages()))

    def stats(self) -> CacheStats:
        """Return what every sequence holds and evicted so far, and the bytes of it."""
        layers, storages = len(self.compressed_layers), self._storages()
        rows = collect_stats(self.session, self.layer_groups, storages, self.budget is not None)
        stored, others = [one for _, one in storages], len(self.layers) - layers
        return CacheStats.of(rows, stored, layers, others, self.compaction_seconds, self.bytes_peak)

    def __repr__(self) -> str:
        budget = "full KV" if self.budget is None else self.budget.describe()
        return f"CompressedCache({self.method.spec()}, {budget}: {self.stats()})"

    def _repr_html_(self) -> str:
        return self.stats()._repr_html_()

    def inspect(self, output: Tensor, tokenizer: PreTrainedTokenizerBase, *, row: int = 0) -> Any:
        """Feed a generated sequence again and return what became of every token; a notebook shows it as a page.

        Args:
            output: int64 [B, L] or [L], what `generate` returned with this cache, prompt included.
            tokenizer: the model's.
            row: batch row.

        Raises:
            InspectError: the output is not this cache's.
        """
        sources = importlib.import_module("reasonkv.report.sources")  # by name: it stands above the runtimes
        return sources.inspect_cache(self, self._attachment.model, output, tokenizer, row)

    def slot_positions(self, layer: int) -> list[Tensor]:
        """Return the token index of every slot a layer holds now, int64 [H, P] per row."""
        found = self.layers[layer]
        if isinstance(found, CompressedLayer):
            return found.slot_positions()
        raise ValueError(f"Layer {layer} is not a compressed layer.")

    def reset(self) -> None:
        """Forget everything fed; the cache can then be used for another batch."""
        self.layers = empty_layers(self.session, self._config)  # a stock layer's own reset keeps its number of rows
        self.compressed_layers = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        self.layer_groups, self.layers_done = [], 0
        self.compaction_seconds, self.bytes_peak = 0.0, 0
        self.session.token_ids, self.session.columns_seen = TokenLog(), 0
        if self.session.reader is not None:
            self.session.reader.reset()

    def attach(self) -> None:
        """Set the model's attention to ours, in case another cache was attached or detached since."""
        self._attachment.attach()

    def detach(self) -> None:
        """Give the model its attention back; detaching twice is fine, and a later forward attaches again."""
        self._attachment.detach()

    def __enter__(self) -> CompressedCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """Return an independent cache with the same contents (a shared prompt, decoded several ways)."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        own = self.session
        shared = (own.observer, own.reference, own.calibration, own.rotaries, self._config, self._attachment)
        memo |= {id(one): one for one in shared}  # not the contents
        for name, value in self.__dict__.items():
            setattr(twin, name, copy.deepcopy(value, memo))
        twin._attachment = self._attachment.twin(twin._receiver(own.needs))
        for name, callback in callbacks_of(twin).items():
            setattr(twin.session, name, callback)
        twin.attach()
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows with their beams."""
        self._move_rows(beam_idx.tolist())
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.reorder_cache(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by index or by boolean mask."""
        self.reorder_cache(torch.arange(len(self.rows))[indices.cpu()])

    def _receiver(self, needs: Requirements) -> Callable[..., None] | None:
        return weakly(self._receive_ids) if needs.token_ids else None

    def _receive_ids(self, used: object, ids: Tensor | None) -> None:
        if used is self:
            self.token_ids.announced = ids

    def _storages(self) -> list[tuple[int, LayerStorage]]:
        """Every layer's storage, with the number of the layer's group."""
        numbers = {id(group): number for number, group in enumerate(self.layer_groups)}
        return [(numbers[id(x.group)], x.storage) for x in self.compressed_layers if x.storage is not None]

    def _move_rows(self, index: list[int]) -> None:
        """Move the bookkeeping of rows; their storage is the layers'."""
        if self.session.reference is not None:
            raise UnsupportedModelError(
                "The rows of a cache with a reference are the reference's and cannot be reordered, repeated or dropped."
            )
        for group in self.layer_groups:
            group.rows = [group.rows[row].copy() for row in index]
        self.token_ids.select_rows(torch.tensor(index))
        if self.session.reader is not None:
            self.session.reader.select_rows(torch.tensor(index))

    def _first_rows(self, batch: int, fed: list[int]) -> None:
        prompts = resolve.broadcast_per_prompt(self.prompt_lengths, batch, "prompt_lengths") or fed
        sequences.check_first_forward(prompts, fed, self.prompt_lengths is not None, self.session.reference)
        if self.budget is not None:
            self.budget.check_protected(recent=self.session.needs.recent, prompt_length=max(prompts))
        seeds = resolve.broadcast_per_prompt(self.row_seeds, batch, "row_seeds")
        layers, events = len(self.compressed_layers), self.window_events
        self.layer_groups, numbers = sequences.make_groups(self.method, self.budget, layers, prompts, seeds, events)
        for layer, number in zip(self.compressed_layers, numbers, strict=True):
            layer.group = self.layer_groups[number]
