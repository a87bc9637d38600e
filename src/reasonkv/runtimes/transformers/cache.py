"""CompressedCache: a transformers cache that stays within a budget.

    cache = CompressedCache(model, "snapkv", Budget(tokens=512))
    model.generate(**inputs, past_key_values=cache)

One forward goes: the mask function announces its tokens (`begin_forward`); every compressed layer appends them, attends
to everything it was promised, and only then carries out its event (`CompressedLayer.after_attention`); after the last
layer the rows move on. All decisions about when and how many are integers (`reasonkv.schedule`).
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.calibration import Calibration
from reasonkv.methods import Method, get_method, layer_budgets, refuse_future
from reasonkv.runtimes.transformers.attention import implementation_name
from reasonkv.runtimes.transformers.events import carry_out_events
from reasonkv.runtimes.transformers.layer import CompressedLayer, Observer
from reasonkv.runtimes.transformers.rows import Piece, Row
from reasonkv.runtimes.transformers.setup import (
    check_window,
    fitted,
    load_statistics,
    rotary_of,
    spread,
)
from reasonkv.runtimes.transformers.sparse_read import Selection
from reasonkv.runtimes.transformers.stats import CacheStats, collect_stats
from reasonkv.runtimes.transformers.storage import LayerStorage
from reasonkv.runtimes.transformers.support import UnsupportedModelError, base_kernel, check_model, text_config
from reasonkv.runtimes.transformers.tokens import TokenLog, listen
from reasonkv.runtimes.transformers.tracks import Track, make_tracks, tokens_to_next_event
from reasonkv.view import TraceAttention


class CompressedCache(Cache):
    """A KV cache whose full-attention layers stay within a budget; sliding-window layers stay stock.

    Args:
        model: the model that will use the cache; its attention implementation is wrapped until `close()`.
        method: a `Method`, or its spec (`"snapkv"`, `"rkv:form=port"`).
        budget: a `Budget`, or its `tokens`, or a `Window`, or None for full KV alone.
        prompt_lengths: tokens of each row's prompt. Needed when a prompt is fed in several pieces; otherwise what the
            first forward feeds is the prompt.
        seed: seed of stochastic methods.
        row_seeds: a further seed per row (0 each unless given), for several samples of one prompt.
        max_length: most tokens a row will ever see, if known; storage is never larger.
        reopen_prompt: count what later turns feed in pieces of several tokens as prompt, too.
        kernel: attention kernel to drive ("sdpa", "eager", "flash_attention_2", "reference"); the model's by default.
        observer: called as `observer(layer, rows, view, plan)` for every plan that is carried out, before storage is
            rewritten; it must not change what it is shown. The view's keys and values are the cache's own, so it
            copies what it wants to keep of them. A deep copy of the cache calls the same observer.
        reference: full KV's attention over the very rows that will be fed, in this order, for methods that look into
            the future; see `reasonkv.evaluate.reference`.
        window_events: (row, logical length) of every event, for a `Window` whose events a scheduler decides
            (`reasonkv.schedule.periodic_events`) instead of the rows' own lengths.
        calibration: statistics of the model's queries, or the file they are in, for methods that need them; looked up
            beside the model and in the user's cache unless given (`reasonkv.calibration.find_calibration`).

    Raises:
        UnsupportedModelError: the model cannot be served; one sentence says why.
        BudgetError, MethodError: what was asked for makes no sense; one sentence says why.
        CalibrationError: the method needs statistics that are missing or of another model.

    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "full",
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
    ) -> None:
        problems = check_model(model)
        if problems:
            raise UnsupportedModelError(problems[0])
        self.method, self.budget = fitted(get_method(method), budget)
        self.window_events = window_events
        check_window(self.budget, reopen_prompt=reopen_prompt, listed=window_events is not None)
        if reference is None:
            refuse_future(self.method)
        self.observer, self.reference = observer, reference
        needs = self.method.needs
        self.rotary = rotary_of(model) if needs.rotary or needs.observes or needs.calibration else None
        self.calibration = load_statistics(model, calibration) if needs.calibration else None
        self.selection, self.budget = Selection.of(self.method, model, self.budget, self.rotary)
        self.seed, self.row_seeds, self.max_length = seed, row_seeds, max_length
        self.prompt_lengths = [prompt_lengths] if isinstance(prompt_lengths, int) else prompt_lengths
        self.reopen_prompt = reopen_prompt
        self.tracks: list[Track] = []  # one, unless the method gives layers budgets of their own
        self.columns_seen = self.layers_done = 0
        self.compaction_seconds = 0.0
        self.bytes_peak = 0
        self.token_ids = TokenLog()
        self._listening: RemovableHandle | None = None
        self._model = weakref.ref(model)
        current = base_kernel(model.config)
        self._restore = "eager" if current == "reference" else current  # another open cache may drive our own kernel
        self._name = implementation_name(base_kernel(model.config, kernel))
        self.attach()
        stock = DynamicCache(config=model.config).layers
        super().__init__(
            layers=[CompressedLayer(self, i) if type(x) is DynamicLayer else x for i, x in enumerate(stock)]
        )
        self.compressed_layers: list[CompressedLayer] = [
            layer for layer in self.layers if isinstance(layer, CompressedLayer)
        ]
        layer_budgets(self.method, self.budget, len(self.compressed_layers))  # so that a share too small is said now

    @property
    def rows(self) -> list[Row]:
        """What every row holds; of the first layer, where layers have budgets of their own."""
        return self.tracks[0].rows if self.tracks else []

    @property
    def piece(self) -> Piece | None:
        """The forward under way, as the first layer sees it."""
        return self.tracks[0].piece if self.tracks else None

    # -- one forward ----------------------------------------------------------------------------------------------

    def begin_forward(self, batch: int, columns: int, attention_mask: Tensor | None) -> None:
        """Announce a forward; called by the registered mask function before the first layer.

        Args:
            batch: rows.
            columns: tokens per row, padding included.
            attention_mask: 2-D mask over every column fed so far and these, or None when nothing is padding.

        Raises:
            UnsupportedModelError, BudgetError: the forward cannot be served.

        """
        if self.piece is not None and (self.layers_done or any(x.waiting for x in self.compressed_layers)):
            raise UnsupportedModelError(
                "The previous forward did not finish, or its attention did not go through this cache; "
                "call cache.reset() before going on."
            )
        if self.rows and len(self.rows) != batch:
            raise UnsupportedModelError(
                f"This cache holds {len(self.rows)} rows but the forward has {batch}; "
                "call cache.reset() or make a new cache for a new batch."
            )
        valid = None
        if attention_mask is not None:
            if attention_mask.shape[-1] < columns:
                raise UnsupportedModelError(
                    f"The attention mask covers {attention_mask.shape[-1]} columns but the forward feeds {columns}; "
                    "it must cover every column fed so far."
                )
            valid = attention_mask[:, -columns:].bool()
        fed = [columns] * batch if valid is None else [int(n) for n in valid.sum(-1).tolist()]
        if not self.tracks:
            self._first_rows(batch, fed)
        else:
            self._check_later_prompt(columns, fed)
        for track in self.tracks:
            track.piece = Piece.plan(track.rows, columns, valid, fed, track.layers)
        if self.method.needs.token_ids and self.piece is not None:
            self.token_ids.append(self.piece)

    def layer_done(self, layer: CompressedLayer) -> None:
        """Called by every compressed layer after it attended: its event, or all layers' after the last; rows move on.

        Raises:
            PlanError, UnsupportedModelError: a plan that cannot be carried out, a defect of the method.

        """
        piece = layer.piece
        self.layers_done += 1
        is_last = self.layers_done == len(self.compressed_layers)
        whole_model = self.method.needs.scope == "model"
        if any(keep is not None for keep in piece.keep) and (is_last or not whole_model):
            start = time.perf_counter()
            carry_out_events(self, self.compressed_layers if whole_model else [layer], piece)
            self.compaction_seconds += time.perf_counter() - start
        if is_last:
            for track in self.tracks:
                assert track.piece is not None
                track.piece.commit()
                track.piece = None
            self.columns_seen += piece.columns
            self.layers_done = 0

    def tokens_to_next_event(self) -> list[int | None]:
        """Per row, how many more tokens until its next event: the longest piece that crosses none. None: never."""
        tracks = self.tracks
        if not tracks and self.prompt_lengths:
            tracks, _ = self._tracks(self.prompt_lengths)
        return tokens_to_next_event(tracks)

    def new_storage(self, track: int = 0) -> LayerStorage:
        """Storage for a layer of a track, sized by the longest row's schedule."""
        needs = self.method.needs
        if self.budget is None:
            return LayerStorage(None, queries=needs.queries)
        grows = isinstance(self.budget, Window) and self.max_length is None  # with the text, without an end in sight
        slots = None if grows else max(row.capacity(self.max_length) for row in self.tracks[track].rows)
        return LayerStorage(slots, queries=needs.queries, counts=needs.folds, state=needs.stored_state)

    def is_prompt(self, index_BHN: Tensor, rows: list[int]) -> Tensor:
        """Which slots hold a token of their row's prompt, bool [b, H, N]."""
        marked = torch.zeros_like(index_BHN, dtype=torch.bool)
        for place, row in enumerate(rows):
            for start, end in self.rows[row].prompt_spans:
                marked[place] |= (index_BHN[place] >= start) & (index_BHN[place] < end)
        return marked

    def note_allocation(self) -> None:
        """Called when a layer allocated: remember the most bytes of keys and values that were alive at once."""
        live = sum(x.storage.bytes_allocated() for x in self.compressed_layers if x.storage is not None)
        self.bytes_peak = max(self.bytes_peak, live)

    # -- what it held ----------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """What every row held and dropped so far, and the bytes of it."""
        return collect_stats(self)

    def slot_positions(self, layer: int) -> list[Tensor]:
        """Token index of every slot a layer holds now, int64 [H, P] per row."""
        found = self.layers[layer]
        if not isinstance(found, CompressedLayer) or found.storage is None:
            raise ValueError(f"Layer {layer} is not a compressed layer that has seen a token.")
        return [
            found.storage.token_indices([i], row.state.held, [row.state.length], [row.settled])[0]
            for i, row in enumerate(self.tracks[found.track].rows)
        ]

    # -- life cycle -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything fed; the cache can then be used for another batch."""
        super().reset()
        self.tracks, self.columns_seen, self.layers_done = [], 0, 0
        self.compaction_seconds, self.bytes_peak = 0.0, 0
        self.token_ids = TokenLog()
        if self.selection is not None:
            self.selection.reset()

    def attach(self) -> None:
        """Set the model's attention to ours, in case another cache was made or closed since."""
        model = self._model()
        if model is not None and text_config(model.config)._attn_implementation != self._name:
            model.set_attn_implementation(self._name)
        if model is not None and self._listening is None and self.method.needs.token_ids:
            self._listening = listen(model, self)

    def close(self) -> None:
        """Give the model its attention implementation back. Closing twice is fine; a later forward takes it again."""
        model = self._model()
        if self._listening is not None:
            self._listening.remove()
            self._listening = None
        if model is not None and text_config(model.config)._attn_implementation == self._name:
            model.set_attn_implementation(self._restore)

    def __enter__(self) -> CompressedCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """An independent cache with the same contents (a shared prompt, decoded several ways)."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        # the caller's or the model's, not part of the contents
        for shared in (self.observer, self.reference, self.calibration, self.rotary):
            memo[id(shared)] = shared
        for name, value in self.__dict__.items():
            setattr(twin, name, None if name == "_listening" else copy.deepcopy(value, memo))
        for layer in twin.compressed_layers:
            layer.attach(twin)
        twin.attach()
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows with their beams."""
        self._refuse_moving_rows()
        super().reorder_cache(beam_idx)
        self._move_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._refuse_moving_rows()
        super().batch_repeat_interleave(repeats)
        self._move_rows([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by index or by boolean mask."""
        self._refuse_moving_rows()
        super().batch_select_indices(indices)
        self._move_rows(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def describe_model(self) -> str:
        """The model's class name, for messages."""
        model = self._model()
        return "The model" if model is None else type(model).__name__

    # -- internals ----------------------------------------------------------------------------------------------------

    def _refuse_moving_rows(self) -> None:
        if self.reference is not None:
            raise UnsupportedModelError(
                "The rows of a cache with a reference are the reference's and cannot be reordered, repeated or dropped."
            )

    def _move_rows(self, index: list[int]) -> None:
        for track in self.tracks:
            track.rows = [track.rows[row].copy() for row in index]
        self.token_ids.select_rows(torch.tensor(index))
        if self.selection is not None:
            self.selection.select_rows(torch.tensor(index))

    def _tracks(self, prompts: list[int], seeds: list[int] | None = None) -> tuple[list[Track], list[int]]:
        layers = len(self.compressed_layers)
        return make_tracks(self.method, self.budget, layers, prompts, seeds=seeds, window_events=self.window_events)

    def _first_rows(self, batch: int, fed: list[int]) -> None:
        prompts = spread(self.prompt_lengths, batch, "prompt_lengths") or fed
        if self.reference is not None and len(self.reference.lengths) != batch:
            raise UnsupportedModelError(
                f"The reference was collected from {len(self.reference.lengths)} rows but the forward has {batch}; "
                "collect it from the rows that are fed."
            )
        for prompt, first in zip(prompts, fed, strict=True):
            if self.prompt_lengths is not None and prompt < first and first > 1:
                raise BudgetError(
                    f"prompt_lengths says {prompt} tokens, but the first forward feeds {first}; "
                    "feed the prompt in pieces that end with it, or correct prompt_lengths."
                )
        if self.budget is not None:
            self.budget.check_protected(recent=self.method.needs.recent, prompt_length=max(prompts))
        self.tracks, numbers = self._tracks(prompts, spread(self.row_seeds, batch, "row_seeds"))
        for layer, number in zip(self.compressed_layers, numbers, strict=True):
            layer.track = number

    def _check_later_prompt(self, columns: int, fed: list[int]) -> None:
        """A second piece of several tokens is either a promised part of the prompt, or a later turn."""
        if columns == 1 or (self.budget is None and self.selection is None):
            return
        still_prompt = all(row.decoded == 0 for row in self.rows)
        if still_prompt and self.prompt_lengths is None:
            raise BudgetError(
                "This prompt is fed in several pieces, so the cache cannot tell where it ends; "
                "pass prompt_lengths=[tokens of each row's prompt] to CompressedCache."
            )
        if not self.reopen_prompt or still_prompt:
            return
        for track in self.tracks:
            for row, count in zip(track.rows, fed, strict=True):
                row.reopen(count)
                if row.budget is not None:
                    row.budget.check_protected(recent=self.method.needs.recent, prompt_length=row.state.prompt)
