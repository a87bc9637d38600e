"""Quest: read the pages whose keys could give a query the largest product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.methods.ops import upcast
from reasonkv.methods.options import Size
from reasonkv.methods.sparse_read import FullPages, PageView, Prepared, SelectionMethod


@dataclass(frozen=True)
class Quest(SelectionMethod):
    """Read the pages with the highest upper bound of q.k (Tang et al., 2024, "Quest: Query-Aware Sparsity for
    Efficient Long-Context LLM Inference", arXiv 2406.10774, section 3.3).

    1. Of every full page keep the smallest and the largest value of each key channel: k lies in that box.
    2. A page's bound is the largest product of any key in the box with the query: sum of max(q_i low_i, q_i high_i).
    3. Attend to the pages with the highest bounds.

    Args:
        page_size: tokens of a page (published: 16).
        share: "max" and "sum" of the bounds of a KV head's query heads choose one set for all of them; "none" lets each
            choose its own, as published for models without groups.
        first, last, dense: see `SelectionMethod`; published: 0, 1, 2.
    """

    page_size: Size = 16
    share: Literal["max", "sum", "none"] = "max"

    def prepare(self, model: PreTrainedModel) -> Prepared:
        return Prepared(self.page_size)

    def summarise(self, pages: FullPages) -> dict[str, Tensor]:
        """Return the corners of the box that a page's keys lie in, [n, H, D] each, in the keys' dtype."""
        low_nHD, high_nHD = pages.keys_nHcD.aminmax(dim=2)
        return {"low": low_nHD, "high": high_nHD}

    def score(self, view: PageView) -> Tensor:
        """Return upper bounds of q.k, [B, H, q, P], or [B, Hq, q, P] with `share="none"`."""
        queries_BHgqD = upcast(view.queries_BHgqD())
        low_BH1DP, high_BH1DP = (upcast(view.state[name])[:, :, None].mT for name in ("low", "high"))
        # A positive q_i is bounded by the largest value of its channel, a negative one by the smallest.
        bound_BHgqP = queries_BHgqD.clamp(min=0) @ high_BH1DP + queries_BHgqD.clamp(max=0) @ low_BH1DP
        if self.share == "none":
            return bound_BHgqP.flatten(1, 2)
        return bound_BHgqP.amax(2) if self.share == "max" else bound_BHgqP.sum(2)
