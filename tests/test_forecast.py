"""forecast: its inputs written out, networks in calibration files, and fitting that finds what there is to find."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from command_line import run
from models import calibration, tiny_model
from slot_views import random_network, random_view
from torch import Tensor

from reasonkv import CompressedCache, MethodError, get_method
from reasonkv.calibration import CalibrationError, load_calibration, save_calibration
from reasonkv.calibration.files import read_tensors, write_tensors
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.fitting import (
    _ATTENTION,
    Compaction,
    _fit,
    _Recorder,
    _share,
    _without_queries,
    fit_forecast,
)
from reasonkv.methods.forecast import Forecast
from reasonkv.network import Network
from reasonkv.rotary import Rotary
from reasonkv.view import LayerStatistics, SlotView

D = 16
ROTARY = Rotary(10000.0 ** (-torch.arange(D // 2) / (D // 2)))


def view_of(B: int = 2, H: int = 2, N: int = 40, window: int = 24) -> SlotView:
    view = random_view(B=B, H=H, N=N, D=D, group=3, queries=window, dtype=torch.float64)
    mean = torch.zeros(3 * H, D // 2, dtype=torch.complex64)
    statistics = LayerStatistics(mean, mean.abs(), forecast=random_network(H, D))
    return replace(view, rotary=ROTARY, calibration=statistics)


def test_inputs_and_score_are_the_definition_written_out() -> None:
    view, method = view_of(), Forecast(window=24)
    inputs, scores = method.inputs(view), method.score(view)
    queries, network = view.queries_BHgTD(), method.network(view)
    assert view.query_positions_BT is not None
    for b, h, n in ((0, 0, 3), (0, 1, 39), (1, 0, 20), (1, 1, 30)):
        position, key = view.positions_BHN[b, h, n], view.keys_BHND[b, h, n]
        attention = torch.zeros(3, 24, dtype=torch.float64)
        for g in range(3):
            for t in range(24):
                seen = view.positions_BHN[b, h] <= view.query_positions_BT[b, t]
                logits = (view.keys_BHND[b, h] @ queries[b, h, g, t] * view.scaling).masked_fill(~seen, -torch.inf)
                attention[g, t] = logits.softmax(-1)[n]
        wanted = [
            attention.mean(), attention.mean(1).max(), attention.mean(0).max(), attention[:, -16:].mean(),
        ]  # fmt: skip
        numbers = [math.log(max(float(one), 1e-9)) for one in wanted]
        numbers += [math.log(max(1, int(view.length_B[b] - position)))]
        numbers += [math.log(float(key.norm())), math.log(float(view.values_BHND[b, h, n].norm()))]
        plain = ROTARY.unrotate(key[None], position[None])[0]
        x = torch.cat([plain, torch.tensor(numbers, dtype=torch.float64)])
        torch.testing.assert_close(inputs[b, h, n], x, rtol=1e-9, atol=1e-9)
        hidden, bias, out, linear, low, high = (weight[h].double() for weight in network.tensors().values())
        x = torch.minimum(torch.maximum(x, low), high)
        score = sum(
            out[u] * torch.nn.functional.gelu((hidden[:, u] * x).sum() + bias[u]) for u in range(len(out))
        ) + (linear * x).sum()  # fmt: skip
        torch.testing.assert_close(scores[b, h, n], score, rtol=1e-9, atol=1e-9)


def test_without_queries_the_other_inputs_are_the_same_and_nothing_is_observed() -> None:
    view, method = view_of(), Forecast(window=0)
    assert view.calibration is not None and not method.needs.queries
    own = replace(
        view, queries_BHqTD=None, query_positions_BT=None, query_heads=6,
        calibration=replace(view.calibration, forecast=random_network(2, D, beside=3)),
    )  # fmt: skip
    whole = Forecast(window=24).inputs(view)
    assert torch.equal(method.inputs(own), torch.cat([whole[..., :D], whole[..., D + 4 :]], -1))
    assert torch.equal(method.score(own), method.network(own)(method.inputs(own)))
    fitted_to = _without_queries(Compaction(whole[:1], whole[:1, ..., 0], 20, 0))  # what a fit sees
    assert torch.equal(fitted_to.inputs_LHNX, method.inputs(own)[:1])
    for asked, other in ((Forecast(window=24), own), (method, view)):
        words = f"was fitted {'without' if asked.window else 'with'} queries; choose forecast:window={0 if asked.window else 64}"
        with pytest.raises(MethodError, match=words):
            asked.score(other)


def test_scaled_inputs_give_the_same_order() -> None:
    draw = torch.Generator().manual_seed(0)
    x, network = torch.randn(1, 2, 50, D + 7, generator=draw), random_network(2, D)
    mean, deviation = torch.randn(2, D + 7, generator=draw), 0.5 + torch.rand(2, D + 7, generator=draw)
    scaled = network((x - mean[:, None]) / deviation[:, None])
    difference = scaled - network.of_scaled(mean, deviation)(x)
    assert bool((x > network.of_scaled(mean, deviation).high_HX[:, None]).any())
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=0, atol=1e-4)


def test_a_calibration_without_a_network_or_with_another_models_is_one_sentence() -> None:
    view = view_of()
    assert view.calibration is not None
    with pytest.raises(MethodError, match=r"fit one with `reasonkv calibrate --forecast`\.$"):
        Forecast().score(replace(view, calibration=replace(view.calibration, forecast=None)))
    with pytest.raises(MethodError, match=r"keys of another size"):
        Forecast().score(replace(view, calibration=replace(view.calibration, forecast=random_network(2, D + 2))))


def test_networks_are_stored_in_half_precision_and_damage_is_found(tmp_path: Path) -> None:
    found, path = calibration(tiny_model("llama")), tmp_path / "a.safetensors"
    save_calibration(path, found)
    read = load_calibration(path)
    assert found.forecast is not None and read.forecast is not None
    for name, weight in found.forecast.tensors().items():
        assert torch.equal(read.forecast.tensors()[name], weight.half().float())
    assert read.digest != replace(read, forecast=None).digest
    header, parts = read_tensors(path, "calibration", CalibrationError)
    facts = {name: value for name, value in header.items() if name not in ("format", "version")}
    for damage in (
        {"forecast.bias": None},
        {"forecast.out": parts["forecast.out"][:, :, :-1]},
        {"forecast.linear": parts["forecast.linear"] * torch.inf},
        {"forecast.hidden": parts["forecast.hidden"][0]},
        {name: parts[name][:-1] for name in parts if name.startswith("forecast.")},
    ):
        changed = {name: x.contiguous() for name, x in (parts | damage).items() if x is not None}
        write_tensors(path, "calibration", changed, facts)
        with pytest.raises(CalibrationError, match=r"^\S+ is damaged: .*\.$"):
            load_calibration(path)


class Known:
    """Attention to come that is known: of row 0, whose trace has 50 tokens."""

    def __init__(self, H: int) -> None:
        self.lengths = [50]
        self.by_reduce = dict(
            zip(("sum", "max"), torch.rand(2, H, 50, generator=torch.Generator().manual_seed(3)), strict=True)
        )

    def received(self, layer: int, row: int, start: int, end: int, reduce: Literal["sum", "max"] = "sum") -> Tensor:
        assert (row, start, end) == (0, 40, 50)
        return self.by_reduce[reduce]


def test_a_recorded_compaction_is_the_target_written_out_and_evicts_by_the_network_once_there_is_one() -> None:
    known, sink, protected = (
        Known(2),
        dict[tuple[int, int], list[Compaction]](),
        torch.zeros(1, 2, 40, dtype=torch.bool),
    )
    protected[..., [0, 1, 39]] = True
    view = replace(view_of(B=1), is_protected_BHN=protected, reference=known, rows=(0,))
    recorder, inputs = _Recorder(window=24, sink=sink), Forecast(window=24).inputs(view)
    assert torch.equal(recorder.plan(view, 20).kept_BHK, Forecast(window=24).plan(view, 20).kept_BHK)
    [found] = sink[0, 0]
    assert found.stayed == 17
    for h in range(2):
        norms = view.values_BHND[0, h].norm(dim=-1)
        parts = [known.by_reduce[how][h, :40] * norms for how in ("sum", "max")]
        target = sum(part[2:39] / part[2:39].sum() for part in parts)
        torch.testing.assert_close(found.target_LHN[h], target, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.inputs_LHNX[h], inputs[0, h, 2:39].half(), rtol=0, atol=0)
    assert view.calibration is not None
    bare = replace(view, calibration=replace(view.calibration, forecast=None))
    by_attention = inputs[..., _ATTENTION].exp() * view.values_BHND.norm(dim=-1)
    by_attention = by_attention.masked_fill(protected, torch.inf)
    assert torch.equal(recorder.plan(bare, 20).kept_BHK, by_attention.topk(20).indices.sort().values)


def test_a_fit_finds_a_rule_that_recent_attention_does_not_know() -> None:
    """Planted: the attention to come is decided by one dimension of the key, another one in every head."""
    model, draw = tiny_model("llama"), torch.Generator().manual_seed(0)
    L, H = model.config.num_hidden_layers, model.config.num_key_value_heads
    seen = []
    for row in range(24):
        inputs = torch.randn(L, H, 60, D + 7, generator=draw)
        decides = torch.stack([inputs[layer, h, :, (3 * layer + h) % D] for layer in range(L) for h in range(H)])
        target = (3 * decides.view(L, H, 60)).softmax(-1)
        seen.append(Compaction(inputs.half(), target, 20, row))
    network = _fit(model, seen[:20], 0, lambda done, of: None)
    found = _share(seen[20:], lambda one: network_of_all(network, one))
    assert found > 0.9
    assert _share(seen[20:], lambda one: one.inputs_LHNX[..., _ATTENTION].float()) < 0.6


def network_of_all(network: Network, one: Compaction) -> Tensor:
    return torch.stack([network.part(layer)(x[None].float())[0] for layer, x in enumerate(one.inputs_LHNX)])


def test_fitting_replays_and_its_networks_serve_the_model() -> None:
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(1)
    rows = [TraceRow(*torch.randint(5, 200, (120,), generator=draw).split([20, 100])) for _ in range(9)]
    stages: list[str] = []
    fitted = fit_forecast(
        model, rows, replace(calibration(model), forecast=None), budgets=(24, 32),
        progress=lambda what, done, of: stages.append(what),
    )  # fmt: skip
    assert list(dict.fromkeys(stages)) == ["replay 1", "fit 1", "replay 2", "fit 2"]
    again = fit_forecast(model, rows, replace(calibration(model), forecast=None), budgets=(24, 32))
    assert all(
        torch.equal(a, b)
        for a, b in zip(fitted.network.tensors().values(), again.network.tensors().values(), strict=True)
    )
    assert fitted.share is not None and 0.0 < fitted.share <= 1.0 and fitted.compactions > 8
    assert fit_forecast(model, rows[:4], calibration(model), budgets=(24,), rounds=1).share is None  # none is left over
    known = replace(calibration(model), forecast=fitted.network)
    with CompressedCache(model, get_method("forecast"), tokens=24, interval=8, calibration=known) as cache:
        model.generate(rows[0].prompt_P[None], past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert cache.stats().rows[0].events > 0
    blind = fit_forecast(model, rows, replace(calibration(model), forecast=None), budgets=(24, 32), queries=False)
    assert blind.network.inputs == fitted.network.inputs - 4 and blind.attention_share == pytest.approx(
        fitted.attention_share, abs=0.2
    )
    known = replace(calibration(model), forecast=blind.network)
    with CompressedCache(model, tokens=24, interval=8, calibration=known) as cache:
        assert cache.method == Forecast(window=0)
        model.generate(rows[0].prompt_P[None], past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert cache.stats().rows[0].events > 0
    with pytest.raises(CalibrationError, match=r"too short to fit a forecast"):
        fit_forecast(model, [TraceRow(row.prompt_P, row.output_T[:20]) for row in rows], known, budgets=(24,))


def test_the_command_line_fits_to_questions_of_a_file(tmp_path: Path) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "stats.safetensors"
    lines = [{"ask": f"list data {n} {n + 1} {n + 2} ask sum", "is": "x"} for n in range(4)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    asked = ["--prompt", "{ask}", "--answer", "is", "--chat", "off", "--limit", "2", "--window", "240"]
    code, said, told = run("calibrate", "--task", str(questions), *asked, "--forecast", "--out", str(out))
    assert code == 0, told
    assert "none is left over to measure it on" in told and str(out.name) in said
    assert load_calibration(out).forecast is not None
    code, _, told = run(
        "calibrate", "--task", str(questions), *asked, "--forecast", "--without-queries", "--out", str(out)
    )
    assert code == 0, told
    blind = load_calibration(out).forecast
    assert blind is not None and blind.inputs == load_calibration(out).head_dim + 3
