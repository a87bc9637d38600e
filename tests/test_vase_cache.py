"""VaSE in a cache: memory is allocated once, and a batch holds what its rows hold alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from models import CONFIGS, batch, tiny_model
from same_choice import Choices, check_same_choices
from test_vase import SHORT
from transformers import AutoModelForCausalLM

from reasonkv import Budget
from reasonkv.methods import Method
from reasonkv.methods.vase_attnv import VaseAttnV
from reasonkv.methods.vase_dkv import VaseDKV
from reasonkv.runtimes.transformers import CompressedCache

SPECS: list[Method] = [
    VaseAttnV(**SHORT),
    VaseAttnV(**SHORT, sample=False),
    VaseAttnV(**SHORT, kernel=5, temperature=0.5, magnitude="variance"),
    VaseAttnV(**SHORT, n_large=0, n_sink=0),
    VaseAttnV(**SHORT, n_large=1000, magnitude="norm"),
    VaseAttnV(**SHORT, magnitude="random"),
    VaseAttnV(**SHORT, evict_large=True),
    VaseAttnV(**SHORT, variant="paper"),
    VaseDKV(**SHORT),
    VaseDKV(**SHORT, redraw=False),
    VaseDKV(**SHORT, projection=0, n_sink=0),
]


def ids(method: Method) -> str:
    return method.spec()


# ------------------------------------------------------------------------------------------------------- static memory


class CountingCache(CompressedCache):
    """Counts what every layer allocates for keys and values."""

    allocations = 0

    def note_allocation(self) -> None:
        self.allocations += 1
        super().note_allocation()


def addresses(cache: CompressedCache) -> list[int]:
    """Of everything any layer stores."""
    found = []
    for layer in cache.compressed_layers:
        storage = layer.storage
        assert storage is not None
        stored = [storage.keys, storage.values, storage.token_index, storage.ring, *storage.state.values()]
        found += [tensor.data_ptr() for tensor in stored if tensor is not None]
    return found


@pytest.mark.parametrize("method", [VaseAttnV(**SHORT), VaseDKV(**SHORT)], ids=ids)
def test_capacity_is_allocated_once_in_2000_decoded_tokens(method: Method) -> None:
    config = deepcopy(CONFIGS["qwen3"])
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    body = model.model
    tokens, budget = batch([20])[0], Budget(48, interval=16, sinks=4, recent=16, prompt="count")
    with torch.no_grad(), CountingCache(model, method, budget) as cache:
        body(tokens, past_key_values=cache)
        for step in range(60):  # past the first event, which writes the token indices
            body(tokens[:, step % 20 : step % 20 + 1], past_key_values=cache)
        assert cache.allocations == len(cache.compressed_layers)
        before, events = addresses(cache), cache.rows[0].events
        bytes_before = cache.stats().bytes_allocated
        for step in range(1940):
            body(tokens[:, step % 20 : step % 20 + 1], past_key_values=cache)
        assert cache.allocations == len(cache.compressed_layers)
        assert addresses(cache) == before
        assert cache.stats().bytes_allocated == cache.stats().bytes_allocated_peak == bytes_before
        assert cache.rows[0].events - events > 115
        assert cache.compressed_layers[0].storage.keys.shape[2] == 48 + 16  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [SPECS[0], SPECS[7], SPECS[8]], ids=ids)
@pytest.mark.parametrize("prompt", ["count", "keep"])
def test_a_decoded_batch_holds_what_each_row_holds_alone(method: Method, prompt: Any) -> None:
    model = tiny_model("qwen3", torch.float64)
    budget = Budget(48, interval=16, sinks=4, recent=16, prompt=prompt)
    tokens, mask, position = batch([20, 12])
    found = []
    for rows in ([0, 1], [0], [1]):
        start = 0 if 0 in rows else 8
        choices, seeds = Choices(rows), [3 + row for row in rows]
        with torch.no_grad(), CompressedCache(model, method, budget, row_seeds=seeds, observer=choices) as cache:
            grown, place = mask[rows, start:], position[rows, start:]
            model(tokens[rows, start:], attention_mask=grown, position_ids=place, past_key_values=cache)
            for step in range(90):
                grown, place = torch.nn.functional.pad(grown, (0, 1), value=1), place[:, -1:] + 1
                new = tokens[rows, 8 + step % 12, None]
                model(new, attention_mask=grown, position_ids=place, past_key_values=cache)
            assert cache.rows[0].events > 2
        found.append(choices)
    for row in (0, 1):
        same = check_same_choices(method, found[0], found[1 + row])
        # The variant "paper" compares the equal values of equal words as they are, so rounding may decide early.
        assert same > (0 if method == SPECS[7] else len(found[1 + row].made[row]) // 2)
