"""What a cache does for a selection method: summaries of full pages, masks of what queries read, and their counts.

Nothing is ever dropped, so a row's slot n holds its token n. Tokens of a prompt attend to everything before them;
every later token reads what the method selects for it, whatever piece it came in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.methods import Method
from reasonkv.methods.sparse_read import FullPages, PageView, Prepared, SelectionMethod
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers.forward import ForwardPlan, SequenceState

Rotaries = Sequence[Rotary] | None
MASK_ELEMENTS = 1 << 24
"""Mask entries worked on at once: queries of a long piece are attended to in parts."""


@dataclass(eq=False)
class PageTable:
    """The pages of one layer.

    Args:
        state: summaries of full pages by name, [B, H, pages allocated, ...]; zeros where a row has none yet.
        read_B3: float64, sums over decoded tokens: slots they read per KV head, pages whose summaries they read, and
            how many tokens there were; None before the first.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    read_B3: Tensor | None = None

    def write(self, row_n: Tensor, page_n: Tensor, pages: int, rows: int, summaries: dict[str, Tensor]) -> None:
        """Store summaries [n, H, ...] of pages that have become full; `pages` and `rows` are how many there are."""
        for name, summary in summaries.items():
            stored = self.state.get(name)
            if stored is None or stored.shape[2] < pages:
                grown = summary.new_zeros(rows, summary.shape[1], pages + pages // 2 + 8, *summary.shape[2:])
                if stored is not None:
                    grown[:, :, : stored.shape[2]] = stored
                stored = self.state[name] = grown
            stored[row_n, :, page_n] = summary

    def count(self, slots_Bq: Tensor, pages_Bq: Tensor, decoded_Bq: Tensor) -> None:
        """Add what the decoded tokens of a forward read."""
        per_token = torch.stack([slots_Bq.double(), pages_Bq.double(), torch.ones_like(slots_Bq).double()], -1)
        new_B3 = (per_token * decoded_Bq[..., None]).sum(1)
        self.read_B3 = new_B3 if self.read_B3 is None else self.read_B3 + new_B3

    def bytes_per_page(self) -> int:
        """Bytes of one page's summaries, of all KV heads."""
        return sum(tensor[0, :, 0].numel() * tensor.element_size() for tensor in self.state.values())

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        self.state = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.state.items()}
        if self.read_B3 is not None:
            self.read_B3 = self.read_B3.index_select(0, index.to(self.read_B3.device))


class SparseReader:
    """A selection method at a budget, on one model.

    Args:
        method: the method.
        prepared: its size of pages and its parameters.
        budget: its `tokens` are slots to read per decoded token and KV head, with `prompt="on_top"` beyond as many as
            the prompt has; its other fields say what may be dropped and when, and nothing is.
        rotaries: every layer's rotary embedding, if the method needs it.

    Raises:
        BudgetError: a budget below the pages that are always read, or a window.
    """

    def __init__(self, method: SelectionMethod, prepared: Prepared, budget: Budget, rotaries: Rotaries) -> None:
        if isinstance(budget, Window) or budget.tokens is None:
            raise BudgetError(f"{method.name} drops nothing, so it has no windows; give it a Budget in tokens.")
        always = method.first + method.last
        if budget.tokens < always * prepared.page_size:
            raise BudgetError(
                f"{method.name} reads whole pages of {prepared.page_size} tokens and always {always} of them; "
                f"raise tokens from {budget.tokens} to at least {always * prepared.page_size}."
            )
        self.method, self.prepared, self.rotaries = method, prepared, rotaries
        self.page_size = prepared.page_size
        self.tokens, self.prompt_on_top = budget.tokens, budget.prompt == "on_top"
        self.tables: dict[int, PageTable] = {}  # by layer

    @classmethod
    def of(
        cls, method: Method, model: PreTrainedModel, budget: Budget | None, rotaries: Rotaries
    ) -> tuple[SparseReader | None, Budget | None]:
        """Return a method's reader, None for one that evicts; and the schedule's budget, None for a reader.

        Raises:
            BudgetError, MethodError: a budget too small, or parameters that cannot be found.
        """
        if not isinstance(method, SelectionMethod) or budget is None:
            return None, budget
        return cls(method, method.prepare(model), budget, rotaries), None  # nothing is ever dropped: no events

    def fill(self, layer: int, keys_BHWD: Tensor, forward: ForwardPlan) -> None:
        """Summarise the pages that a forward has made full, from all keys held."""
        c = self.page_size
        spans = [(row.state.physical // c, held // c) for row, held in zip(forward.rows, forward.held, strict=True)]
        if layer < self.method.dense or all(start == end for start, end in spans):
            return
        device = keys_BHWD.device
        row_n = torch.tensor([row for row, (start, end) in enumerate(spans) for _ in range(start, end)], device=device)
        page_n = torch.tensor([page for start, end in spans for page in range(start, end)], device=device)
        first_n = page_n * c
        # a row's slots are its tokens, so a page's slots are consecutive
        keys_ncHD = keys_BHWD[row_n[:, None], :, first_n[:, None] + torch.arange(c, device=device)]
        pages = FullPages(keys_ncHD.transpose(1, 2), first_n, self._parameters(layer), self._rotary(layer))
        with torch.autocast(device.type, enabled=False):
            summaries = self.method.summarise(pages)
        table = self.tables.setdefault(layer, PageTable())
        table.write(row_n, page_n, max(end for _, end in spans), len(spans), summaries)

    def masks(
        self, layer: int, queries_BHqqD: Tensor, kv_heads: int, forward: ForwardPlan
    ) -> Iterator[tuple[slice, Tensor]]:
        """What the queries of a forward read, a few queries at a time, and count it.

        Args:
            layer: index in the model.
            queries_BHqqD: rotated queries.
            kv_heads: KV heads H.
            forward: the forward.

        Yields:
            Columns of the forward, and their additive mask [B, Hq, columns, width], 0 or -inf, in the queries' dtype.
        """
        B, Hq, q, _ = queries_BHqqD.shape
        step = max(1, MASK_ELEMENTS // (B * Hq * forward.width))
        for start in range(0, q, step):
            columns = slice(start, min(start + step, q))
            slots_BHqqN = self._slots(layer, queries_BHqqD[:, :, columns], columns, kv_heads, forward)
            mask = torch.zeros(slots_BHqqN.shape, dtype=queries_BHqqD.dtype, device=queries_BHqqD.device)
            yield columns, mask.masked_fill_(~slots_BHqqN, float("-inf")).expand(B, Hq, -1, -1)

    def pages(self, row: SequenceState) -> int:
        """Pages that a decoded token of a row reads."""
        return (self.tokens + (row.state.prompt if self.prompt_on_top else 0)) // self.page_size

    def read(self, row: int) -> tuple[float, float]:
        """Slots and bytes of page summaries that decoded tokens of a row read, mean over tokens.

        Returns:
            Slots per KV head, mean over layers; bytes over all KV heads and layers.
        """
        slots, summaries = [], 0.0
        for table in self.tables.values():
            slots_read, pages_read, tokens = (0.0, 0.0, 0.0) if table.read_B3 is None else table.read_B3[row].tolist()
            if tokens:
                slots.append(slots_read / tokens)
                summaries += pages_read / tokens * table.bytes_per_page()
        return (sum(slots) / len(slots) if slots else 0.0), summaries

    def bytes_held(self, held: int) -> int:
        """Bytes of the page summaries of a row that holds so many slots, in all layers."""
        return held // self.page_size * sum(table.bytes_per_page() for table in self.tables.values())

    def select_rows(self, index: Tensor) -> None:
        """Move rows with their beams."""
        for table in self.tables.values():
            table.select_rows(index)

    def reset(self) -> None:
        """Forget every page."""
        self.tables = {}

    # -- internals ------------------------------------------------------------------------------------------------

    def _parameters(self, layer: int) -> dict[str, Tensor] | None:
        layers = self.prepared.layers
        return None if layers is None else dict(layers[layer])

    def _rotary(self, layer: int) -> Rotary | None:
        return None if self.rotaries is None else self.rotaries[layer]

    def _slots(self, layer: int, queries_BHqqD: Tensor, columns: slice, kv_heads: int, forward: ForwardPlan) -> Tensor:
        """Slots each query reads, bool [B, Hq or 1, columns, width]."""
        device, c = queries_BHqqD.device, self.page_size
        number_N = torch.arange(forward.width, device=device)
        visible_BqN = number_N < forward.visible_Bq(device)[:, columns, None]
        positions_Bq, valid_Bq = (tensor[:, columns] for tensor in forward.token_indices(device))
        decoded_Bq = valid_Bq & ~forward.in_prompt_Bq(device)[:, columns]
        table = self.tables.setdefault(layer, PageTable())
        if layer < self.method.dense or not table.state:  # not one page is full yet
            table.count(positions_Bq + 1, torch.zeros_like(positions_Bq), decoded_Bq)
            return visible_BqN[:, None]
        pages = max(forward.held) // c
        view = PageView(
            {name: tensor[:, :, :pages] for name, tensor in table.state.items()},
            queries_BHqqD, positions_Bq, c, self._parameters(layer), self._rotary(layer),
        )  # fmt: skip
        with torch.autocast(device.type, enabled=False):  # scores are float32 whoever calls
            chosen_BHqP = self.method.select(view, [self.pages(row) for row in forward.rows])
        B, heads = chosen_BHqP.shape[:2]
        union_BHqP = chosen_BHqP.view(B, kv_heads, heads // kv_heads, *chosen_BHqP.shape[2:]).any(2)
        slots_Bq = union_BHqP.sum(-1).double().mean(1) * c + positions_Bq % c + 1
        table.count(slots_Bq, view.own_Bq, decoded_Bq)
        own_BqN = number_N // c == view.own_Bq[..., None]
        page_N = (number_N // c).clamp(max=pages - 1)  # beyond the last full page stands the query's own
        earlier_BqN = number_N < (view.own_Bq * c)[..., None]
        chosen_BHqN = chosen_BHqP[..., page_N] & earlier_BqN[:, None]
        # tokens of a prompt, and padding, see all there is
        read_BHqN = chosen_BHqN | (own_BqN | ~decoded_Bq[..., None])[:, None]
        read_BHqN &= visible_BqN[:, None]
        return read_BHqN.repeat_interleave(queries_BHqqD.shape[1] // heads, dim=1)
