"""TriAttention: scores, kept sets and replays of the public code, and what the score and the modes promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slot_views import make_view
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from reasonkv import Budget, CompressedCache
from reasonkv.calibration.statistics import Calibration, LayerStatistics
from reasonkv.methods import MethodError
from reasonkv.methods.frequency import FrequencyOptions, frequency_scores, horizon_weights
from reasonkv.methods.triattention import TriAttention, standardize
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

DATA = Path(__file__).parent / "data"
TENSORS = load_file(DATA / "reference.safetensors")
JSON = json.loads((DATA / "reference.json").read_text())
LAYERS = JSON["meta"]["L"]
CALIBRATION = Calibration(
    torch.complex(TENSORS["v.stats.q_mean_complex.re"], TENSORS["v.stats.q_mean_complex.im"]),
    TENSORS["v.stats.q_abs_mean"],
    head_dim=JSON["meta"]["D"],
)
ROTARY = Rotary(TENSORS["v.rotary.inv_freq"])
MODES = {"global": "global", "per_head": "per_head", "per_layer_perhead": "per_layer_per_head"}


def read(leaf: dict[str, str]) -> Tensor:
    return TENSORS[leaf["tensor"]]


def keys_of(layer: int) -> Tensor:
    return TENSORS[f"v.pkv.{layer}.0"]


def layer_views(prompt: int = 0, *, keep_prompt: bool = False, length: int | None = None) -> list[SlotView]:
    """The public code's dump as views of its three layers."""
    views = []
    for layer in range(LAYERS):
        view = make_view(keys_of(layer), prompt=prompt, keep_prompt=keep_prompt, layer=layer)
        views.append(
            replace(
                view,
                length_B=view.length_B if length is None else torch.tensor([length]),
                prompt_length_B=torch.tensor([prompt]),
                query_heads=JSON["meta"]["H"],
                calibration=CALIBRATION.layer(layer),
                rotary=ROTARY,
            )
        )
    return views


def kept_of(plans: list[Plan]) -> Tensor:
    """[L, B, H, K]."""
    return torch.stack([plan.kept_BHK for plan in plans])


# ------------------------------------------------------------------------------------------------------ public code


@pytest.mark.parametrize("case", JSON["scoring"])
def test_scores_equal_the_public_code(case: dict[str, Any]) -> None:
    options = FrequencyOptions(
        aggregation=case["cfg"]["aggregation"],
        mlr=not case["cfg"]["disable_mlr"],
        trig=not case["cfg"]["disable_trig"],
    )
    length = torch.tensor([case["round_start"]])
    ours = [
        frequency_scores(keys_of(layer), CALIBRATION.layer(layer), ROTARY, length, options)[0]
        for layer in range(LAYERS)
    ]
    assert_close(torch.cat(ours), read(case["head_matrix"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", JSON["keep"])
def test_kept_sets_equal_the_public_code(case: dict[str, Any]) -> None:
    cfg, public = case["cfg"], read(case["keep"]).long().sort(-1).values
    method = TriAttention(
        mode=MODES[cfg["mode"]],
        normalize=cfg["normalize_scores"],
        pin_prompt=not cfg["allow_prefill_compression"],
    )
    views = layer_views(prompt=cfg["prefix_length"])
    kept = kept_of(method.plan_layers(views, cfg["budget"]))[:, 0]
    assert cfg["seed"] is None
    # 1-D: one set for all, [Hkv, K]: one for all layers; their per-head sets are in order of score, hence the sort.
    assert torch.equal(kept, public.expand_as(kept))


PUBLIC_REPLAYS = [case for case in JSON["replay"] if case["kind"] in ("fullkv", "triattention")]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DATA / "tiny_qwen3", dtype=torch.float32).eval()


def as_ours(cfg: dict[str, Any]) -> tuple[TriAttention, Budget]:
    """The method and budget of a public replay; its interval is 32."""
    method = TriAttention(
        variant="paper",
        mode="per_head" if cfg.get("per_head_pruning") else "global",
        normalize=cfg.get("normalize_scores", False),
    )
    entry = "command_line" if cfg.get("use_slack_trigger") else "library"
    return method, replace(TriAttention.paper_budget(cfg["kv_budget"], entry), interval=32)


@pytest.mark.parametrize("case", PUBLIC_REPLAYS, ids=lambda case: f"{case['kind']}-{case['cfg'].get('kv_budget')}")
def test_replays_equal_the_public_code(case: dict[str, Any], model: PreTrainedModel) -> None:
    tokens, prompt = read(case["tokens"]).long().view(1, -1), case["prompt"]
    method, budget = as_ours(case["cfg"]) if case["kind"] == "triattention" else ("full", None)
    cache = CompressedCache(model, method, budget, prompt_lengths=prompt, calibration=CALIBRATION)
    logits, held = [], []
    with torch.no_grad(), cache:
        for step in [tokens[:, :prompt], *tokens[:, prompt:-1].split(1, dim=1)]:
            logits.append(model(step, past_key_values=cache).logits[0, -1])
            held.append(cache.stats().rows[0].physical_terminal)
    assert held == case["cache_len"]
    if "positions" in case:
        assert cache.slot_positions(0)[0][0].tolist() == sorted(case["positions"])
    found = torch.stack(logits)
    assert_close(found, read(case["logits"]), rtol=1e-3, atol=1e-4)
    nll = torch.nn.functional.cross_entropy(found, tokens[0, prompt:])
    assert float(nll) == pytest.approx(case["mean_nll"], abs=1e-4)


# -------------------------------------------------------------------------------------------------- what it promises


def explicit_scores(
    keys_BHND: Tensor, statistics: LayerStatistics, rotary: Rotary, positions_BHN: Tensor, length: int, aggregation: str
) -> Tensor:
    """The paper's formula with keys before RoPE and true distances, float64 [B, Hq, N]."""
    F, s = rotary.inv_freq.numel(), rotary.scaling
    plain = rotary.unrotate(keys_BHND, positions_BHN)
    group = statistics.mean_HqF.shape[0] // keys_BHND.shape[1]
    key = torch.complex(plain[..., :F], plain[..., F : 2 * F]).repeat_interleave(group, 1)
    mean = statistics.mean_HqF.to(torch.complex128)[:, None]
    alpha = (statistics.modulus_HqF.double()[:, None] - mean.abs()).clamp(min=0)
    distance = length - positions_BHN.repeat_interleave(group, 1).double()
    each = []
    for exponent in range(17):
        angle = (distance + 2**exponent)[..., None] * rotary.inv_freq.double() + (mean * key.conj()).angle()
        each.append((s * s * (mean.abs() * key.abs() * angle.cos() + alpha * key.abs())).sum(-1))
    stacked = torch.stack(each)
    return stacked.mean(0) if aggregation == "mean" else stacked.amax(0)


def random_statistics(query_heads: int, F: int, seed: int = 0) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(50, query_heads, F, dtype=torch.complex64, generator=generator)
    queries = queries + 2 * torch.randn(query_heads, F, dtype=torch.complex64, generator=generator)
    return LayerStatistics(queries.mean(0), queries.abs().mean(0), queries.abs().square().mean(0))


def random_views(
    prompts: list[int], N: int = 60, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[SlotView]:
    """Two KV heads, four query heads and eight pairs; rows have prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for layer in range(layers):
        keys = torch.randn(len(prompts), 2, N, 16, generator=generator, dtype=dtype)
        view = make_view(keys, layer=layer, sinks=2, recent=3, row_seeds=tuple(range(len(prompts))))
        views.append(
            replace(
                view,
                is_prompt_BHN=view.positions_BHN < torch.tensor(prompts)[:, None, None],
                prompt_length_B=torch.tensor(prompts),
                length_B=torch.arange(N, N + len(prompts)),
                calibration=random_statistics(4, 8, seed + layer),
                rotary=Rotary(10000.0 ** (-torch.arange(8) / 8)),
                query_heads=4,
            )
        )
    return views


def row_of(view: SlotView, row: int) -> SlotView:
    fields = [name for name in vars(view) if name.endswith(("_B", "_BHN", "_BHND")) and getattr(view, name) is not None]
    return replace(view, **{name: getattr(view, name)[row : row + 1] for name in fields})


@pytest.mark.parametrize("scaling", [1.0, 1.2])
@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_rotated_form_equals_the_sum_over_distances_with_unrotated_keys(aggregation: str, scaling: float) -> None:
    """Dimensions beyond the rotary pairs do not count, and slots of different heads may hold different tokens."""
    generator = torch.Generator().manual_seed(1)
    rotary = Rotary(10000.0 ** (-torch.arange(8) / 8), scaling)
    positions = torch.stack([torch.randperm(900, generator=generator)[:40].sort().values for _ in range(4)])
    positions = positions.view(2, 2, 40)
    keys = rotary.rotate(torch.randn(2, 2, 40, 20, generator=generator, dtype=torch.float64), positions)
    statistics = random_statistics(4, 8)
    found = frequency_scores(keys, statistics, rotary, torch.tensor([901, 901]), FrequencyOptions(aggregation))
    assert found.dtype == torch.float64
    assert_close(found, explicit_scores(keys, statistics, rotary, positions, 901, aggregation), rtol=0, atol=1e-10)


def test_scores_of_bfloat16_keys_are_float32() -> None:
    view = random_views([4])[0]
    keys = view.keys_BHND.bfloat16()
    scores = frequency_scores(keys, view.calibration, view.rotary, view.length_B)
    assert scores.dtype == torch.float32
    assert_close(scores, frequency_scores(keys.float(), view.calibration, view.rotary, view.length_B))


def test_rms2_equals_its_formula_and_needs_the_mean_squares() -> None:
    view = random_views([4], dtype=torch.float64)[0]
    statistics, length = view.calibration, view.length_B
    options = FrequencyOptions(norm="rms2", trig=False, norm_lambda=0.5)
    mean = statistics.mean_HqF.to(torch.complex128).abs()
    alpha = 0.5 * (statistics.square_HqF.double() - mean**2) / (statistics.modulus_HqF.double() + mean)
    modulus = torch.complex(view.keys_BHND[..., :8], view.keys_BHND[..., 8:]).abs().repeat_interleave(2, 1)
    found = frequency_scores(view.keys_BHND, statistics, view.rotary, length, options)
    assert_close(found, (alpha[:, None] * modulus).sum(-1))
    with pytest.raises(MethodError, match="needs the mean squares of the queries"):
        frequency_scores(view.keys_BHND, replace(statistics, square_HqF=None), view.rotary, length, options)


def test_adaptive_horizon_weighs_distances_around_each_heads_wavelength() -> None:
    statistics, inv_freq = random_statistics(4, 8), 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    found = horizon_weights(statistics, inv_freq, FrequencyOptions(horizon="adaptive"))
    for head in range(4):
        mean, modulus = statistics.mean_HqF[head].to(torch.complex128).abs(), statistics.modulus_HqF[head].double()
        share = mean / mean.sum()
        wavelength = (share * (2 * torch.pi / inv_freq).log()).sum().exp()
        deviation = 1 + (1 - (share * mean / modulus).sum())
        logits = torch.stack([-((j - wavelength.log2()) ** 2) / (2 * deviation**2) for j in range(17)])
        assert_close(found[head], logits.softmax(0))


def test_variational_horizon_takes_its_weights_from_the_calibration() -> None:
    view = random_views([4])[0]
    with_horizon = replace(view.calibration, horizon_HqJ=torch.full((4, 17), 1 / 17))
    options = FrequencyOptions(horizon="variational")
    uniform = frequency_scores(view.keys_BHND, with_horizon, view.rotary, view.length_B, options)
    assert_close(uniform, frequency_scores(view.keys_BHND, view.calibration, view.rotary, view.length_B))
    with pytest.raises(MethodError, match="horizon=variational needs weights"):
        frequency_scores(view.keys_BHND, view.calibration, view.rotary, view.length_B, options)


def test_another_models_statistics_are_refused() -> None:
    view = random_views([4])[0]
    for query_heads, F in ((5, 8), (4, 6)):
        with pytest.raises(MethodError, match="do not belong"):
            frequency_scores(view.keys_BHND, random_statistics(query_heads, F), view.rotary, view.length_B)


def union_rule(matrix: Tensor, keep: int) -> list[int]:
    """The public code's global choice in words: every head names its best, of those named the best stay."""
    named = sorted({int(i) for row in matrix for i in row.topk(keep).indices})
    best = matrix.amax(0)
    return sorted(sorted(named, key=lambda i: float(best[i]), reverse=True)[:keep])


def test_global_choice_is_the_union_of_every_heads_best_ranked_by_the_best_head() -> None:
    for seed in range(5):
        views = [
            replace(v, is_protected_BHN=torch.zeros_like(v.is_protected_BHN)) for v in random_views([4], seed=seed)
        ]
        scores = [frequency_scores(v.keys_BHND, v.calibration, v.rotary, v.length_B)[0] for v in views]
        kept = kept_of(TriAttention(mode="global", normalize=False).plan_layers(views, 20))
        assert kept.shape == (2, 1, 2, 20)
        assert torch.equal(kept, torch.tensor(union_rule(torch.cat(scores), 20)).expand_as(kept))


def z_score(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)


def test_candidates_alone_are_standardized() -> None:
    scores = torch.randn(2, 3, 40, dtype=torch.float64)
    candidate = torch.rand(2, 3, 40) > 0.4
    assert_close(standardize(scores, torch.ones_like(candidate)), z_score(scores))
    for b in range(2):
        for h in range(3):
            inside = candidate[b, h]
            assert_close(standardize(scores, candidate)[b, h][inside], z_score(scores[b, h][inside]))


@pytest.mark.parametrize("mode", ["per_head", "global", "per_layer_per_head"])
@pytest.mark.parametrize(
    "options", [{}, {"pin_prompt": True}, {"pin_prompt": True, "noise": True, "aggregation": "max"}]
)
def test_rows_with_different_prompts_plan_as_they_would_alone(mode: str, options: dict[str, Any]) -> None:
    """A prompt of 40 is more than is kept, so that one of the rows falls under the public code's quirk."""
    method = TriAttention(mode=mode, **options)
    views = random_views([4, 11, 40])
    together = kept_of(method.plan_layers(views, 24))
    for row in range(3):
        alone = kept_of(method.plan_layers([row_of(view, row) for view in views], 24))
        assert torch.equal(together[:, row : row + 1], alone)
        for view, kept in zip(views, together, strict=True):
            plan = Plan(kept)
            plan.check(tuple(view.positions_BHN.shape), 24, view.is_protected_BHN)
    if options.get("pin_prompt"):
        assert together[0, 1, 0, :11].tolist() == list(range(11))
        # 3 recent slots are protected; the other 21 are the oldest.
        assert together[0, 2, 0].tolist() == [*range(21), 57, 58, 59]


def test_modes_share_their_sets_as_they_say() -> None:
    views = random_views([4])
    per_head = kept_of(TriAttention().plan_layers(views, 24))
    assert torch.equal(per_head[0], per_head[1])
    assert not torch.equal(per_head[:, :, 0], per_head[:, :, 1])
    everywhere = kept_of(TriAttention(mode="per_layer_per_head").plan_layers(views, 24))
    assert not torch.equal(everywhere[0], everywhere[1])
    assert torch.equal(everywhere[:1], kept_of([TriAttention(mode="per_layer_per_head").plan(views[0], 24)]))
    mean = kept_of(TriAttention(mode="per_layer_per_head", group="mean").plan_layers(views, 24))
    assert not torch.equal(everywhere, mean)


def test_noise_only_breaks_ties() -> None:
    views = random_views([4])
    assert torch.equal(
        kept_of(TriAttention(noise=True).plan_layers(views, 24)), kept_of(TriAttention().plan_layers(views, 24))
    )
    equal = [replace(view, keys_BHND=torch.ones_like(view.keys_BHND)) for view in views]
    newest, hashed = (kept_of(TriAttention(noise=n, normalize=False).plan_layers(equal, 24)) for n in (False, True))
    assert newest[0, 0, 0].tolist() == [0, 1, *range(38, 60)]
    assert not torch.equal(newest, hashed)
    assert torch.equal(hashed, kept_of(TriAttention(noise=True, normalize=False).plan_layers(equal, 24)))
