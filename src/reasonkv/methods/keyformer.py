"""Keyformer: accumulated attention under Gumbel noise, at a temperature that rises as tokens are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from reasonkv import noise
from reasonkv.methods.h2o import H2O
from reasonkv.methods.options import Share, Size
from reasonkv.methods.received import received
from reasonkv.view import SlotView


@dataclass(frozen=True)
class Keyformer(H2O):
    """Keep key tokens and the newest (Adnan et al., 2024, "Keyformer: KV Cache Reduction through Key Tokens Selection
    for Efficient Generative Inference", MLSys 2024, arXiv 2403.09054, and its code).

    H2O with another score: a query adds softmax((x + z) / tau) to every slot's sum, x its logits, z standard Gumbel
    noise of its own for every slot and query head, so that slots lose less of what eviction took from them. The
    temperature tau is `tau` for the prompt's queries and rises linearly with every generated token.

    Args:
        window, recent_share: H2O's; the paper gives 30 % to the newest.
        tau: temperature for the prompt.
        tau_end: temperature from generated token `steps` on.
        steps: tokens until then. The paper uses the length of the text, its code 0.01 a step.
    """

    recent_share: Share = 0.3
    tau: Annotated[float, Gt(0)] = 1.0
    tau_end: Annotated[float, Gt(0)] = 2.0
    steps: Size = 100

    def received(self, view: SlotView, queries_BHqTD: Tensor, positions_BT: Tensor, counts_BT: Tensor) -> Tensor:
        H, group = view.positions_BHN.shape[1], queries_BHqTD.shape[1] // view.positions_BHN.shape[1]
        prompt_B = torch.zeros_like(view.length_B) if view.prompt_length_B is None else view.prompt_length_B
        heads_qg = (view.first_head * group + torch.arange(H * group, device=positions_BT.device)).view(H, group)
        heads_Rg = heads_qg.repeat(len(positions_BT), 1)
        slots_RN, seeds_R = view.positions_BHN.flatten(0, 1), view.row_seed_B.repeat_interleave(H, 0)
        positions_RT, taus_RT = (
            x.repeat_interleave(H, 0) for x in (positions_BT, self.temperature(positions_BT, prompt_B[:, None]))
        )

        def disturb(block: slice, at: slice, logits_rgtn: Tensor) -> None:
            uniform_rgtn = noise.uniform(
                slots_RN[block, None, None, : logits_rgtn.shape[-1]],
                seed=view.seed,
                row_seed=seeds_R[block, None, None, None],
                layer=view.layer,
                head=heads_Rg[block, :, None, None],
                event=positions_RT[block, None, at, None],
            )
            logits_rgtn += noise.gumbel(uniform_rgtn)
            logits_rgtn /= taus_RT[block, None, at, None].to(logits_rgtn.dtype)

        return received(view, queries_BHqTD, counts_BT, disturb)

    def temperature(self, positions: Tensor, prompt: Tensor) -> Tensor:
        """Return tau of queries by their token index, float64; the first generated token is step 1."""
        step = (positions - prompt + 1).clamp(0, self.steps)
        return self.tau + (self.tau_end - self.tau) * step.double() / self.steps
