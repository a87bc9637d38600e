"""Replay of selection methods, and the gate of SeerAttention-R, on the testbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import batch, tiny_model
from tiny import TASK

from reasonkv import Budget, CompressedCache
from reasonkv.calibration.corpus import Passage, task_passages
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.run import run
from reasonkv.evaluate.traces import load_or_make_traces
from reasonkv.identity import model_hash
from reasonkv.methods.base import MethodError
from reasonkv.methods.quest import Quest
from reasonkv.methods.seer import SeerAttention
from reasonkv.methods.sparse_read import FullPages, PageView
from reasonkv.models import load_model
from reasonkv.rotary import Rotary
from reasonkv.seer.gate import FILE, GateError, find_gate, load_gate, random_gate, save_gate
from reasonkv.seer.job import GateRecipe
from reasonkv.seer.training import kept_attention, train_gate
from reasonkv.tasks import get_task


@pytest.fixture(scope="module")
def testbed():
    torch.set_num_threads(1)
    return load_model("testbed")


def test_chunked_replay_equals_one_token_at_a_time(testbed, tmp_path: Path) -> None:
    task = get_task(TASK)
    traces = load_or_make_traces(
        testbed.model, testbed.tokenizer, task, task_spec=TASK, examples=range(2), seed=0,
        settings=TraceSettings(max_new_tokens=60), folder=tmp_path, batch_size=2,
    )  # fmt: skip
    cell = RunConfig(Quest(), Budget(64, recent=16, prompt="count"))
    many, single = (replay_batch(testbed.model, traces, cell, chunked=chunked) for chunked in (True, False))
    for left, right in zip(many, single, strict=True):
        assert (left.metrics.nll_T - right.metrics.nll_T).abs().max() <= 1e-4  # float32
        assert left.stats == right.stats
    budget = BudgetOptions(tokens=(64,), recent=16, prompt="count")
    job = ReplayJob(task=TASK, methods="quest", budget=budget, limit=1, traces=TraceSettings(max_new_tokens=60))
    (record,) = run(job, testbed, tmp_path / "run")
    assert record.slots_read_mean is not None and record.slots_read_mean <= 64 < record.physical_mean
    assert record.saved_ratio_terminal == 0 and record.selects


def test_a_gate_scores_pages_by_its_three_steps() -> None:
    """Head by head and page by page; a page's key is rotated for its first token."""
    rotary, c = Rotary.from_config(tiny_model("qwen3").config, "full_attention"), 4
    (parameters,) = random_gate([(2, 2, 16)], c, "any", seed=3).layers
    parameters = {name: tensor.double() for name, tensor in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    first_n = torch.tensor([0, c, 2 * c])
    keys_nHcD = torch.randn(3, 2, c, 16, generator=generator, dtype=torch.float64)
    query_HgD = torch.randn(2, 2, 16, generator=generator, dtype=torch.float64)
    at = torch.tensor([[13]])
    turned = rotary.rotate(keys_nHcD, (first_n[:, None] + torch.arange(c))[:, None])
    asked = rotary.rotate(query_HgD.view(1, 4, 1, 16), at[:, None])
    state = SeerAttention().summarise(FullPages(turned, first_n, parameters, rotary))["gate"].transpose(0, 1)[None]
    scores = SeerAttention().score(PageView({"gate": state}, asked, at, c, parameters, rotary))

    def normed(x_E, weight_E, position: int):
        return rotary.rotate(x_E / (x_E.square().mean() + 1e-6).sqrt() * weight_E, torch.tensor(position))

    for head in range(2):
        mixed_E = sum(query_HgD[head, member] @ parameters["query"][head, member] for member in range(2))
        query_E = normed(mixed_E, parameters["query_norm"], 13)
        for page in range(3):
            keys_cD = keys_nHcD[page, head]
            pooled_X = torch.cat([keys_cD.amax(0), keys_cD.amin(0), keys_cD.mean(0)])
            key_E = normed(pooled_X @ parameters["key"][head], parameters["key_norm"], page * c)
            assert scores[0, head, 0, page] == pytest.approx(float(query_E @ key_E) / 4, rel=1e-9)


def test_training_a_gate_lowers_its_loss_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    rows = [Passage(batch([48], seed)[0][0], 16) for seed in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses: list[float] = []
    recipe = GateRecipe(page_size=4, steps=12, rows=3, warmup=2, rate=1e-2)
    gate = train_gate(model, rows, recipe, source="noise", on_step=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    save_gate(tmp_path / "gate.safetensors", gate)
    back = load_gate(tmp_path / "gate.safetensors")
    assert (back.page_size, back.model, back.source) == (4, model_hash(model), "noise")
    assert back.parameters == gate.parameters == 3 * (2 * 2 * 16 * 16 + 2 * 48 * 16 + 32)
    with pytest.raises(GateError, match="nothing to train on"):
        train_gate(model, [Passage(rows[0].ids_L[:6], 5)], recipe)


def test_the_shipped_gate_keeps_more_attention_than_a_random_one_on_held_out_traces(testbed, tmp_path: Path) -> None:
    tasks = [get_task(name) for name in ("program", "search", "recall")]
    held_out = list(task_passages(testbed.model, testbed.tokenizer, tasks, limit=1, split="test"))
    shipped = find_gate(testbed.model)
    assert shipped.model == testbed.hash
    config = testbed.model.config
    shape = (config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim)
    save_gate(tmp_path / FILE, random_gate([shape] * config.num_hidden_layers, shipped.page_size, testbed.hash))
    for pages in (4, 8):
        trained, untrained = (
            kept_attention(testbed.model, held_out, method, pages, queries=64)
            for method in (SeerAttention(), SeerAttention(gate=str(tmp_path / FILE)))
        )
        assert trained > untrained + 0.1


def test_a_missing_or_foreign_gate_is_one_sentence(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with pytest.raises(MethodError, match="reasonkv train-gate"):
        CompressedCache(model, SeerAttention(), Budget(64, recent=8, prompt="count"))
    save_gate(tmp_path / FILE, random_gate([(2, 2, 16)] * 3, 4, "another"))
    with pytest.raises(GateError, match="another model"):
        find_gate(model, tmp_path / FILE)
    with pytest.raises(GateError, match="no gate"):
        load_gate(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(GateError, match="cannot be read"):
        load_gate(tmp_path / "text.safetensors")
