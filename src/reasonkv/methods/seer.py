"""SeerAttention-R: a small trained gate says which pages a query will attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.methods.base import Requirements
from reasonkv.methods.ops import upcast
from reasonkv.methods.sparse_read import FullPages, PageView, Parameters, Prepared, SelectionMethod
from reasonkv.rotary import Rotary

_EPSILON = 1e-6


@dataclass(frozen=True)
class SeerAttention(SelectionMethod):
    """Read the pages that a gate expects the query to attend to (Gao et al., 2025, "SeerAttention-R: Sparse Attention
    Adaptation for Long Reasoning", arXiv 2506.08889, section 3).

    1. Queries before RoPE, all of a KV head's group, give one gate query: a linear map, normed, rotated.
    2. A full page gives one gate key: maximum, minimum and mean of its keys before RoPE, a linear map, normed, rotated
       for the page's first token.
    3. Their products rank the pages; the page being filled is always read.

    The gate was trained to predict the model's own attention (`reasonkv train-gate`); the size of pages is the one it
    was trained for.

    Args:
        gate: a gate's file; unless given, `reasonkv_gate.safetensors` in the model's folder.
        first, last, dense: see `SelectionMethod`; published: 0, 1, 0.
    """

    gate: str = ""

    @property
    def needs(self) -> Requirements:
        return Requirements(rotary=True, selects=True)

    def prepare(self, model: PreTrainedModel) -> Prepared:
        """Return the model's gate.

        Raises:
            GateError: there is none, or it belongs to another model.
        """
        from reasonkv.seer.gate import find_gate  # which builds on this package

        found = find_gate(model, self.gate or None).to(model.device)
        return Prepared(found.page_size, found.layers)

    def summarise(self, pages: FullPages) -> dict[str, Tensor]:
        """Return the gate keys of pages, [n, H, E], in the keys' dtype."""
        assert pages.parameters is not None and pages.rotary is not None
        tokens_c = torch.arange(pages.keys_nHcD.shape[2], device=pages.first_n.device)
        position_n1c = (pages.first_n[:, None] + tokens_c)[:, None]
        plain_nHcD = pages.rotary.unrotate(upcast(pages.keys_nHcD), position_n1c)
        gate_nHE = gate_keys(pages.parameters, plain_nHcD, pages.first_n, pages.rotary)
        return {"gate": gate_nHE.to(pages.keys_nHcD.dtype)}

    def score(self, view: PageView) -> Tensor:
        """Return logits of the gate, [B, H, q, P]."""
        assert view.parameters is not None and view.rotary is not None
        position_B1q = view.positions_Bq[:, None]
        plain_BHgqD = view.rotary.unrotate(upcast(view.queries_BHgqD()), position_B1q[:, None])
        queries_BHqE = gate_queries(view.parameters, plain_BHgqD, position_B1q, view.rotary)
        return gate_logits(queries_BHqE, upcast(view.state["gate"]))


def gate_queries(parameters: Parameters, plain_BHgqD: Tensor, position_B1q: Tensor, rotary: Rotary) -> Tensor:
    """Return gate queries [B, H, q, E] from queries before RoPE; `parameters` as in `reasonkv.seer.gate.Gate`."""
    weight_HgDE = parameters["query"].to(plain_BHgqD.dtype)
    projected_BHqE = torch.einsum("bhgqd,hgde->bhqe", plain_BHgqD, weight_HgDE)
    return rotary.rotate(_rms_norm(projected_BHqE, parameters["query_norm"]), position_B1q)


def gate_keys(parameters: Parameters, plain_nHcD: Tensor, first_n: Tensor, rotary: Rotary) -> Tensor:
    """Return gate keys [n, H, E] of pages from their keys before RoPE; `first_n` are their first tokens' indices."""
    pooled_nHX = torch.cat([plain_nHcD.amax(2), plain_nHcD.amin(2), plain_nHcD.mean(2)], -1)
    projected_nHE = torch.einsum("nhx,hxe->nhe", pooled_nHX, parameters["key"].to(plain_nHcD.dtype))
    return rotary.rotate(_rms_norm(projected_nHE, parameters["key_norm"]), first_n[:, None])


def gate_logits(queries_BHqE: Tensor, keys_BHPE: Tensor) -> Tensor:
    """Return logits [B, H, q, P]; their softmax over pages is the attention the gate expects."""
    logits: Tensor = queries_BHqE @ keys_BHPE.mT * queries_BHqE.shape[-1] ** -0.5
    return logits


def _rms_norm(x: Tensor, weight_E: Tensor) -> Tensor:
    normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPSILON) * weight_E.to(x.dtype)
    return normed
