"""What replay promises: chunks change nothing but speed, batches change nothing, full KV is its own ceiling, and a run
that is killed continues to the records it would have had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TASK, tiny_loaded, tiny_model

from reasonkv import CompressedCache
from reasonkv.budget import Budget, BudgetError
from reasonkv.evaluate import chunks
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import feed
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.metrics import TeacherLogprobs
from reasonkv.evaluate.records import ReplayRecord
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.run import run
from reasonkv.evaluate.traces import Trace, load_or_make_traces, reference_logprobs
from reasonkv.methods import get_method
from reasonkv.methods.rkv import RKV
from reasonkv.tasks import get_task

METHODS = (
    "streaming", "random", "knorm", "keydiff", "snapkv:window=8", "rkv", "pyramidkv:window=8",
    "adakv:base=snapkv:window=8",
)  # fmt: skip
BUDGET = Budget(24, interval=12, sinks=2, recent=8, prompt="on_top")


def random_traces(model: torch.nn.Module, shapes: list[tuple[int, int]], seed: int = 0) -> list[Trace]:
    """Traces of random tokens with these prompt and output lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 150, (p,), generator=generator) for p, _ in shapes]
    outputs = [torch.randint(5, 150, (t,), generator=generator) for _, t in shapes]
    references = reference_logprobs(model, prompts, outputs)  # type: ignore[arg-type]
    return [Trace(i, p, t, r, False) for i, (p, t, r) in enumerate(zip(prompts, outputs, references, strict=True))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "budget",
    [
        BUDGET,
        Budget(40, interval=7, sinks=2, recent=8, prompt="count"),
        Budget(40, interval=16, sinks=2, recent=8, prompt="count", trigger="grid", cut_prompt="first_event"),
        Budget(60, interval=10, sinks=2, recent=8, prompt="keep"),
        Budget(24, interval=8, sinks=2, recent=8, prompt="count", prefill_chunk=16),
    ],
    ids=["on_top", "count", "grid", "keep", "prefill_chunk"],
)
def test_chunks_give_the_kept_sets_and_scores_of_single_tokens(method: str, budget: Budget) -> None:
    model = tiny_model(torch.float64)
    (trace,) = random_traces(model, [(45, 90)])
    kept, nll, forwards = [], [], []
    for max_piece in (chunks.MAX_CHUNK, 1):
        row = trace.row
        lengths = [len(row.prompt_P)]
        scores = torch.zeros(len(row.output_T), dtype=torch.float64)
        with CompressedCache(model, method, budget, prompt_lengths=lengths, seed=3) as cache:
            count = 0
            for scored in feed(model, cache, [row], distances=cache.tokens_to_next_event, max_piece=max_piece):
                span = slice(scored.start, scored.start + len(scored.logits_NV))
                logprobs = scored.logits_NV.log_softmax(-1)
                scores[span] = -logprobs.gather(1, row.output_T[span, None])[:, 0]
                count += 1
            kept.append(cache.slot_positions(0)[0])
            assert cache.stats().rows[0].events > 3
        nll.append(scores)
        forwards.append(count)
    assert torch.equal(kept[0], kept[1])
    torch.testing.assert_close(nll[0], nll[1], rtol=0, atol=1e-6)
    # pyramidkv's layers have events of their own, which end chunks, too
    assert forwards[0] * (2 if method.startswith("pyramidkv") else 4) < forwards[1] == 90
    cell = RunConfig(get_method(method), budget)
    fast, slow = (replay_batch(model, [trace], cell, seed=3, chunked=chunked)[0] for chunked in (True, False))
    assert fast.metrics.nll == pytest.approx(slow.metrics.nll, abs=1e-6)
    assert fast.stats == slow.stats


@pytest.mark.parametrize("method", ["full", *METHODS, "oracle"])
def test_a_row_of_a_ragged_batch_scores_as_it_does_alone(method: str) -> None:
    model = tiny_model(torch.float64)
    traces = random_traces(model, [(30, 60), (7, 90), (51, 3), (18, 1)])
    cell = RunConfig(get_method(method), None if method == "full" else BUDGET)
    together = replay_batch(model, traces, cell, seed=1)
    for trace, row in zip(traces, together, strict=True):
        (alone,) = replay_batch(model, [trace], cell, seed=1)
        torch.testing.assert_close(row.metrics.nll_T, alone.metrics.nll_T, rtol=0, atol=1e-6)
        assert row.metrics.top1 == alone.metrics.top1
        assert row.metrics.first_mismatch == alone.metrics.first_mismatch
        fed = len(trace.prompt_P) + len(trace.output_T) - 1
        assert row.stats.length == alone.stats.length == fed
        for name in ("physical_mean", "physical_peak", "physical_terminal", "events"):
            assert getattr(row.stats, name) == getattr(alone.stats, name)


def test_full_kv_is_its_own_ceiling() -> None:
    model = tiny_model()
    traces = random_traces(model, [(30, 60), (7, 90)])
    for outcome in replay_batch(model, traces, RunConfig(get_method("full"), None)):
        assert outcome.metrics.top1 == 1.0
        assert outcome.metrics.first_mismatch is None
        assert abs(outcome.metrics.kl) < 1e-6
        assert outcome.stats.physical_terminal == outcome.stats.length
    bounded = replay_batch(model, traces, RunConfig(get_method("streaming"), BUDGET))
    assert all(outcome.metrics.kl > 1e-3 for outcome in bounded)


def test_the_reference_is_a_plain_forward_of_the_model_without_a_cache() -> None:
    model = tiny_model(torch.float64)
    traces = random_traces(model, [(30, 20), (9, 33)])
    for trace in traces:
        ids = torch.cat([trace.prompt_P, trace.output_T])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(trace.prompt_P) - 1 : -1]
        expected = TeacherLogprobs.from_logits(logits, 10**6)
        torch.testing.assert_close(trace.teacher.logprobs_Nk, expected.logprobs_Nk, rtol=0, atol=1e-5)
        assert torch.equal(trace.teacher.best_N(), expected.best_N())


def test_a_chunk_of_a_large_vocabulary_is_shortened_to_bound_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(chunks, "LOGIT_BYTES", 2 * 10 * 4 * model.config.vocab_size)
    trace = random_traces(model, [(30, 60)])[0]
    row = trace.row
    widths = []
    with CompressedCache(model, "full", prompt_lengths=[30, 30]) as cache:
        widths = [len(scored.logits_NV) for scored in feed(model, cache, [row, row])]
    assert max(widths) == 10


# -- traces -----------------------------------------------------------------------------------------------------------


def make(folder: Path, count: int = 4, **changes: object) -> list[Trace]:
    loaded = tiny_loaded()
    arguments: dict = {
        "task_spec": TASK, "examples": range(count), "seed": 0, "settings": TraceSettings(max_new_tokens=30),
        "folder": folder, "batch_size": 2,
    }  # fmt: skip
    arguments.update(changes)
    return load_or_make_traces(loaded.model, loaded.tokenizer, get_task(TASK), **arguments)


def same(one: Trace, other: Trace) -> bool:
    return (
        torch.equal(one.prompt_P, other.prompt_P)
        and torch.equal(one.output_T, other.output_T)
        and torch.equal(one.teacher.logprobs_Nk, other.teacher.logprobs_Nk)
        and one.correct == other.correct
    )


def test_traces_are_greedy_generations_and_come_back_from_disk_unchanged(tmp_path: Path) -> None:
    made = make(tmp_path)
    for trace in made:
        assert torch.equal(trace.teacher.best_N(), trace.output_T)
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert all(same(one, other) for one, other in zip(made, make(tmp_path), strict=True))
    assert before == [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert load_file(next(tmp_path.glob("*.safetensors")))["0.logprobs"].dtype == torch.float32


def test_traces_cut_short_by_a_kill_are_finished_and_equal(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = make(tmp_path / "whole")

    def stop(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", on_done=stop)
    tensors = next((tmp_path / "cut").glob("*.safetensors"))
    assert len(load_file(tensors)) == 2 * 4, "one batch is there"
    made: list[int] = []
    assert all(same(one, other) for one, other in zip(whole, make(tmp_path / "cut", on_done=made.append), strict=True))
    assert made == [2, 4], "what was there is not made again"
    # a kill between the two files leaves tensors that the list does not name yet
    listed = json.loads(tensors.with_suffix(".json").read_text())
    tensors.with_suffix(".json").write_text(json.dumps(listed | {"traces": listed["traces"][:2]}))
    assert all(same(one, other) for one, other in zip(whole, make(tmp_path / "cut"), strict=True))


def test_a_sampled_trace_is_the_same_in_any_batch(tmp_path: Path) -> None:
    settings = TraceSettings(source="sampled", max_new_tokens=30)
    found = []
    for size in (1, 4):
        (tmp_path / str(size)).mkdir()
        found.append(
            [trace.output_T.tolist() for trace in make(tmp_path / str(size), settings=settings, batch_size=size)]
        )
    assert found[0] == found[1]
    assert found[0] != [trace.output_T.tolist() for trace in make(tmp_path)]


def test_traces_of_other_settings_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    make(tmp_path, 2)
    with pytest.raises(ResultsError, match="other settings"):
        make(tmp_path, 2, seed=1)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(ResultsError, match="damaged"):
        make(tmp_path, 2)


def test_reference_traces_are_the_task_s_own_text_with_an_end(tmp_path: Path) -> None:
    loaded, task = tiny_loaded(), get_task(TASK)
    trace = make(tmp_path, 1, settings=TraceSettings(source="reference"))[0]
    assert loaded.tokenizer.decode(trace.output_T[:-1]) == task.problem(0).trace
    assert trace.output_T[-1] == loaded.model.config.eos_token_id
    assert trace.correct


# -- runs -------------------------------------------------------------------------------------------------------------


RULE = {"interval": 12, "sinks": 2, "recent": 8, "prompt": "on_top"}


def job(**changes: object) -> ReplayJob:
    values: dict = {
        "task": [TASK], "methods": ["full", "random", RKV()], "budget": BudgetOptions(tokens=(24, 32), **RULE),
        "limit": 5, "batch_size": 2, "traces": TraceSettings(max_new_tokens=60),
    }  # fmt: skip
    return ReplayJob(**(values | changes))


def timeless(records: list[ReplayRecord]) -> dict[str, ReplayRecord]:
    found = {record.key: record.model_copy(update={"seconds": 0.0}) for record in records}
    assert len(found) == len(records)
    return found


def test_wherever_the_record_file_is_cut_the_rerun_gives_every_record_once_and_the_same(tmp_path: Path) -> None:
    whole = run(job(), tiny_loaded(), tmp_path)
    assert len(timeless(whole)) == 5 * (1 + 2 * 2)
    path = tmp_path / "records.jsonl"
    data = path.read_bytes()
    for share in (1.0, 0.0, 0.031, 0.27, 0.5, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        assert timeless(run(job(), tiny_loaded(), tmp_path)) == timeless(whole)
        assert share < 1 or path.read_bytes() == data, "a rerun of a whole run writes nothing"


def test_a_prompt_that_a_keep_budget_cannot_hold_is_refused_before_any_replay(tmp_path: Path) -> None:
    budget = BudgetOptions(tokens=(60,), **(RULE | {"prompt": "keep"}))
    with pytest.raises(BudgetError, match=r"prompt of \d+ tokens"):
        run(job(budget=budget), tiny_loaded(), tmp_path)
    assert not (tmp_path / "records.jsonl").exists()


def test_a_run_can_be_asked_for_equal_mean_lengths_instead_of_equal_budgets(tmp_path: Path) -> None:
    wanted_mean = len(get_task(TASK).problem(0).prompt.split()) + 20  # reachable: all 60 output tokens give 30 more
    found = {}
    for policy in ("count", "on_top"):
        budget = BudgetOptions(mean_slots=(wanted_mean,), **(RULE | {"prompt": policy, "interval": 4}))
        found[policy] = run(job(methods=["keydiff"], budget=budget), tiny_loaded(), tmp_path / policy)
    for records in found.values():
        assert len(records) == 5
        mean = sum(record.physical_mean for record in records) / 5
        assert mean == pytest.approx(wanted_mean, rel=0.02)
    assert found["count"][0].budget != found["on_top"][0].budget
