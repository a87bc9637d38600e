"""Weights of the future distances: the sums against attention written out, the fit against another solver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from models import tiny_model
from scipy.optimize import minimize
from torch.testing import assert_close

from reasonkv.calibration import CalibrationError, collect, export_pt, import_pt, load_calibration, save_calibration
from reasonkv.calibration.horizon import HorizonSums, fit_horizon, future_distances, onto_simplex
from reasonkv.rotary import Rotary

INV_FREQ = 1e4 ** -(torch.arange(8, dtype=torch.float64) / 8)


def random_heads(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tau = torch.polar(torch.rand(heads, 8, generator=generator), 6 * torch.rand(heads, 8, generator=generator))
    return tau.to(torch.complex128), torch.randn(heads, 8, dtype=torch.complex64, generator=generator)


def objective(pi: np.ndarray, tau: np.ndarray, weight: np.ndarray, turn: np.ndarray) -> float:
    return float((weight * np.abs(turn @ pi - tau) ** 2).sum())


def test_the_fit_is_as_good_as_another_solvers() -> None:
    offsets = future_distances()
    tau, mean = random_heads(5)
    found = fit_horizon(tau, mean, INV_FREQ).numpy()
    turn = np.exp(1j * INV_FREQ.numpy()[:, None] * offsets.numpy())
    for head in range(5):
        weight = mean[head].to(torch.complex128).abs().numpy()
        weight /= weight.sum()
        arguments = (tau[head].numpy(), weight, turn)
        best = minimize(
            objective, np.full(17, 1 / 17), arguments, method="SLSQP", bounds=[(0, 1)] * 17,
            constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1}, options={"ftol": 1e-12, "maxiter": 1000},
        )  # fmt: skip
        assert found[head].min() >= 0
        assert found[head].sum() == pytest.approx(1)
        assert objective(found[head], *arguments) <= best.fun + 1e-7


def test_a_head_that_looks_back_by_one_distance_gets_all_weight_there() -> None:
    tau = torch.polar(torch.ones(1, 8, dtype=torch.float64), INV_FREQ[None] * 16)
    found = fit_horizon(tau, torch.ones(1, 8, dtype=torch.complex64), INV_FREQ)
    assert found[0, 4] == pytest.approx(1, abs=1e-3)


def test_the_simplex_projection_is_the_nearest_point() -> None:
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = onto_simplex(x)
    assert_close(found.sum(-1), torch.ones(20, dtype=torch.float64))
    corners = torch.eye(6, dtype=torch.float64)
    # nearest: no corner lies in the direction from the projection to the point
    assert float(((corners[None] - found[:, None]) * (x - found)[:, None]).sum(-1).max()) < 1e-9


def test_sums_are_the_phases_that_attention_pays_to_earlier_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    rotary = Rotary(INV_FREQ.float())
    queries, keys = torch.randn(2, 4, 30, 16, generator=generator), torch.randn(2, 2, 30, 16, generator=generator)
    sums = HorizonSums()
    for row in (slice(0, 1), slice(1, 2)):
        sums.add(0, rotary, queries[row], keys[row], 0.25)
    logits = 0.25 * queries @ keys.repeat_interleave(2, 1).mT
    attention = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf")).softmax(-1).double().tril(-1)
    distance = (torch.arange(30)[:, None] - torch.arange(30)).double()
    turns = torch.exp(1j * distance[..., None] * INV_FREQ)
    wanted = torch.einsum("bhqk,qkf->hf", attention.to(turns), turns) / attention.sum((0, 2, 3))[:, None]
    assert_close(sums.tau_HqF(0), wanted, atol=1e-6, rtol=0)


def test_weights_survive_files_and_are_used(tmp_path: Path) -> None:
    model = tiny_model("qwen3", torch.float32)
    ids = torch.randint(5, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    plain, fitted = collect(model, [ids]), collect(model, [ids], horizon=True)
    assert plain.horizon_LHqJ is None
    assert fitted.horizon_LHqJ is not None
    assert fitted.horizon_LHqJ.shape == (*fitted.mean_LHqF.shape[:2], 17)
    assert_close(plain.mean_LHqF, fitted.mean_LHqF)
    assert fitted.digest != plain.digest
    save_calibration(tmp_path / "a.safetensors", fitted)
    export_pt(fitted, tmp_path / "a.pt")
    for read in (load_calibration(tmp_path / "a.safetensors"), import_pt(tmp_path / "a.pt")):
        assert read.horizon_LHqJ is not None
        assert torch.equal(read.horizon_LHqJ, fitted.horizon_LHqJ)


def test_a_public_file_that_is_damaged_or_lacks_a_head_is_one_sentence(tmp_path: Path) -> None:
    found, path = collect(tiny_model("qwen3", torch.float32), [torch.arange(5, 40)[None]]), tmp_path / "a.pt"
    with pytest.raises(CalibrationError, match=r"There is no calibration file .*a\.pt\.$"):
        import_pt(path)
    export_pt(found, path)
    whole = torch.load(path, weights_only=True)
    first = next(iter(whole["stats"]))
    for broken in (
        {**whole, "stats": {name: head for name, head in whole["stats"].items() if name != first}},
        {**whole, "stats": {**whole["stats"], first: {}}},
        {**whole, "stats": {}},
        {**whole, "stats": {**whole["stats"], "others": 1}},
        {**whole, "stats": {name: {**head, "q_mean_real": torch.rand(99)} for name, head in whole["stats"].items()}},
        [1],
    ):
        torch.save(broken, path)
        with pytest.raises(CalibrationError, match=r"cannot be read as a \.pt calibration \("):
            import_pt(path)
    torch.save({**whole, "metadata": {"rope_style": "interleaved"}}, path)
    with pytest.raises(CalibrationError, match="RoPE layout 'interleaved'"):
        import_pt(path)


def test_the_command_fits_them_and_replay_takes_them(tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    made = run(*f"calibrate --task program --limit 2 --horizon --out {stats}".split())
    assert made.exit_code == 0, made.output
    replay = (
        f"replay --task program:lines=12 --methods triattention:horizon=variational --budgets 64 --interval 16 "
        f"--recent 8 --limit 1 --calibration {stats} --out {tmp_path / 'out'}"
    )
    used = run(*replay.split())
    assert used.exit_code == 0, used.output
    without = replay.replace(f"--calibration {stats}", "").replace("out", "other")
    refused = run(*(part.replace("--other", "--out") for part in without.split()))
    assert refused.exit_code != 0
    assert "calibrate --horizon" in refused.output
