"""Every family lays its rotary pairs out in a way of its own; what the model caches says which, and we must know it."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.calibration.queries import watched
from reasonkv.calibration.statistics import LayerStatistics
from reasonkv.methods.frequency import FrequencyOptions, frequency_scores
from reasonkv.methods.moments import add_queries, expected_logits, mean_rotation, moments_of, rotated
from reasonkv.rotary import Rotary

POSITIONS = torch.tensor([0, 1, 2, 5, 31, 200])
FAMILIES = [
    "llama", "phi3", "gemma4", "glm4", "cohere", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4",
    "longcat_flash", "youtu",
]  # fmt: skip
INTERLEAVED = Rotary(torch.tensor([0.7, 0.2]), interleaved=True)
AT_END = Rotary(torch.tensor([0.7, 0.2]), at_end=True)
BOTH = Rotary(torch.tensor([0.7, 0.2]), interleaved=True, at_end=True)


def cached_keys(model: PreTrainedModel) -> dict[int, Tensor]:
    """The keys of one token alone, at several positions: layers then see the same, and only the rotation differs."""
    seen: dict[int, Tensor] = {}
    with watched(model, lambda layer, query, key, _: seen.__setitem__(layer, key)) as arguments, torch.no_grad():
        model(torch.full((len(POSITIONS), 1), 7), position_ids=POSITIONS[:, None], use_cache=False, **arguments)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_is_what_the_model_does_to_its_keys(family: str) -> None:
    model = tiny_model(family)
    rotary = Rotary.from_config(model.config, "full_attention")
    keys = cached_keys(model)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(keys)
    for layer, keys_PHND in keys.items():
        if types[layer] == "full_attention":
            plain = rotary.unrotate(keys_PHND, POSITIONS[:, None, None])
            torch.testing.assert_close(plain, plain[:1].expand_as(plain), atol=2e-5, rtol=0)
            assert (keys_PHND - keys_PHND[:1]).abs().max() > 1e-3  # it does turn


@pytest.mark.parametrize("rotary", [INTERLEAVED, AT_END, BOTH], ids=["interleaved", "at-end", "both"])
def test_layouts_turn_the_same_pairs_wherever_they_stand(rotary: Rotary) -> None:
    plain = Rotary(rotary.inv_freq)
    x, positions = torch.randn(2, 3, 7, 6, dtype=torch.float64), torch.arange(7) * 11
    for one, other in (
        (rotary.rotate(x, positions), plain.rotate(rotary.canonical(x), positions)),
        (rotary.unrotate(x, positions), plain.unrotate(rotary.canonical(x), positions)),
        (rotary.rerotate(x, positions, positions + 5), plain.rerotate(rotary.canonical(x), positions, positions + 5)),
    ):
        assert torch.equal(rotary.canonical(one), other)
    back = rotary.unrotate(rotary.rotate(x, positions), positions)
    torch.testing.assert_close(back, x, atol=1e-14, rtol=0)


@pytest.mark.parametrize("rotary", [INTERLEAVED, AT_END, BOTH], ids=["interleaved", "at-end", "both"])
def test_scores_do_not_depend_on_the_layout(rotary: Rotary) -> None:
    plain, generator = Rotary(rotary.inv_freq), torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 9, 6, dtype=torch.float64, generator=generator)
    mean = torch.randn(4, 2, dtype=torch.complex64, generator=generator)
    statistics = LayerStatistics(mean, mean.abs() + 1, None)
    length = torch.tensor([20, 30])
    scores = [
        frequency_scores(keys if one is rotary else rotary.canonical(keys), statistics, one, length, FrequencyOptions())
        for one in (rotary, plain)
    ]
    assert torch.equal(*scores)

    queries = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator)
    logits = []
    for one in (rotary, plain):
        sums = {
            "seen": torch.zeros(2, dtype=torch.float64), "sum": torch.zeros(2, 4, 6, dtype=torch.float64),
            "squares": torch.zeros(2, 4, 6, dtype=torch.float64), "cross": torch.zeros(2, 4, 3, dtype=torch.float64),
        }  # fmt: skip
        given = queries if one is rotary else rotary.canonical(queries)
        add_queries(sums, given, torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.bool), one)
        moments = rotated(moments_of(sums, one), mean_rotation(one, length, 16))
        logits.append(expected_logits(rotary.canonical(keys), moments, 0.5))
    torch.testing.assert_close(*logits, atol=1e-12, rtol=0)
