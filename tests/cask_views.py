"""Views of several layers for CASK's tests: random ones, and those of the reference's recorded cases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from slot_views import make_view
from torch import Tensor

from reasonkv.calibration import LayerStatistics
from reasonkv.methods.cask import CASK
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

DATA = Path(__file__).parent / "data"


class Recorded:
    """`reference.json` with its tensors."""

    def __init__(self) -> None:
        self.json: dict[str, Any] = json.loads((DATA / "reference.json").read_text())
        self.tensors = load_file(DATA / "reference.safetensors")
        self.rotary = Rotary(self.read(self.json["rotary"]["inv_freq"]), self.json["rotary"]["attention_scaling"])
        mean, modulus = (self.read(self.json["stats"][name]) for name in ("q_mean_complex", "q_abs_mean"))
        self.statistics = [LayerStatistics(m, a) for m, a in zip(mean, modulus, strict=True)]

    def read(self, leaf: dict[str, str]) -> Tensor:
        if "tensor_complex" in leaf:
            name = leaf["tensor_complex"]
            return torch.complex(self.tensors[f"{name}.re"], self.tensors[f"{name}.im"])
        return self.tensors[leaf["tensor"]]

    def views(self, case: dict[str, Any], event: int) -> list[SlotView]:
        """The layers before one of the two events of a case."""
        before = case[f"before{'_2' if event else ''}"]
        pairs = case["pkv_before_2"] if event else self.json["pkv"]
        positions = torch.tensor(before["cache_positions"])
        found = []
        for layer, (keys, values) in enumerate(pairs):
            view = make_view(self.read(keys), positions=positions, prompt=case["prefix"], layer=layer, event=event)
            spans = torch.tensor(before["merge_spans"], dtype=torch.int32).T[:, None, None].expand(2, 1, 2, -1)
            found.append(
                replace(
                    view,
                    values_BHND=self.read(values),
                    counts_BHN=torch.tensor(before["merge_counts"], dtype=torch.int32).expand(1, 2, -1),
                    state={"span_start": spans[0], "span_end": spans[1]},
                    length_B=torch.tensor([before["absolute_position"]]),
                    prompt_length_B=torch.tensor([case["prefix"]]),
                    query_heads=4,
                    calibration=self.statistics[layer],
                    rotary=self.rotary,
                )
            )
        return found


def random_views(
    method: CASK,
    *,
    layers: int = 2,
    B: int = 1,
    H: int = 2,
    N: int = 96,
    D: int = 16,
    seed: int = 0,
    prompts: tuple[int, ...] | None = None,
    sinks: int = 0,
    recent: int = 0,
    keep_prompt: bool = False,
    dtype: torch.dtype = torch.float32,
    counts: bool = False,
    ids: int = 5,
) -> list[SlotView]:
    """Layers of an event in mid-trace: drifting keys, some slots folded before, tokens out of `ids` kinds."""
    generator = torch.Generator().manual_seed(seed)
    rotary = Rotary(1e4 ** -(torch.arange(0, D, 2) / D))
    prompts = prompts or (N // 4,) * B
    count_BN = torch.ones(B, N, dtype=torch.int32)
    if counts:
        count_BN = torch.randint(1, 4, (B, N), generator=generator, dtype=torch.int32)
        for row, prompt in enumerate(prompts):
            count_BN[row, : prompt + sinks] = 1
            count_BN[row, N - recent :] = 1
    end_BN = count_BN.cumsum(1) - 1
    start_BN = end_BN - count_BN + 1
    length = end_BN[:, -1] + 1
    position_BHN = end_BN[:, None].expand(B, H, N)
    token_ids = tuple(torch.randint(ids, (int(n),), generator=generator) for n in length)
    prompt_B = torch.tensor(prompts)
    is_prompt = start_BN < prompt_B[:, None]
    protected = (start_BN < sinks) | (torch.arange(N) >= N - max(recent, method.needs.recent))
    if keep_prompt:
        protected = protected | is_prompt
    found = []
    for layer in range(layers):
        keys = torch.randn(B, H, 1, D, generator=generator)
        keys = keys + 0.2 * torch.randn(B, H, N, D, generator=generator).cumsum(2)
        mean = torch.randn(2 * H, D // 2, dtype=torch.complex64, generator=generator)
        view = make_view(rotary.rotate(keys, position_BHN).to(dtype), positions=position_BHN, layer=layer)
        found.append(
            replace(
                view,
                values_BHND=torch.randn(B, H, N, D, generator=generator).to(dtype),
                counts_BHN=count_BN[:, None].expand(B, H, N),
                is_prompt_BHN=is_prompt[:, None].expand(B, H, N),
                is_protected_BHN=protected[:, None].expand(B, H, N),
                state={
                    "span_start": start_BN[:, None].expand(B, H, N).int(),
                    "span_end": end_BN[:, None].expand(B, H, N).int(),
                    "log_mass": count_BN[:, None].expand(B, H, N).float().log(),
                },
                length_B=length.long(),
                prompt_length_B=prompt_B,
                token_ids=token_ids,
                query_heads=2 * H,
                calibration=LayerStatistics(mean, mean.abs() + torch.rand(2 * H, D // 2, generator=generator)),
                rotary=rotary,
                output_projection_HqDM=torch.randn(2 * H, D, 8, generator=generator),
            )
        )
    return found
