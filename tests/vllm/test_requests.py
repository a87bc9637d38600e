"""What one request may set, and what the engine refuses when it starts."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from engines import core_of, engine, greedy, prompts, reference, runtime_of, serve
from vllm.exceptions import VLLMValidationError

from reasonkv import Budget, testbed
from reasonkv.methods import get_method
from reasonkv.methods.random import RandomEviction
from reasonkv.plan import Plan
from reasonkv.runtimes.vllm.config import OPT_OUT, OPTIONS, SCHEDULER, EngineConfig, ServingError
from reasonkv.runtimes.vllm.options import method_of
from reasonkv.runtimes.vllm.requests import RequestOptions, RequestOptionsWithOptOut
from reasonkv.view import SlotView

CALIBRATION = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
GIVEN = {"method": "random", "tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count", "seed": 7}
BUDGET = Budget(64, interval=32, sinks=4, recent=16, prompt="count")


def test_a_requests_seed_is_its_row_seed_and_wrong_options_never_reach_the_engine(folder: Path) -> None:
    ids = prompts((90,))[0]
    with engine(folder, GIVEN, logits_processors=[f"{OPTIONS}.random"]) as llm:
        assert core_of(llm).scheduler.kv_cache_manager.enable_caching  # on, and nothing is ever found in it
        sampling = [greedy(80, extra_args={"reasonkv": {"seed": seed}}) for seed in (0, 5, 5)]
        mine = serve(llm, [ids] * 3, sampling)
        theirs = reference("random", BUDGET, [ids] * 3, 80, seed=7, row_seeds=[0, 5, 5])
        assert mine.tokens == theirs.tokens
        assert all(torch.equal(mine.kept[key], kept) for key, kept in theirs.kept.items())
        assert not torch.equal(mine.kept[0, 0, 0], mine.kept[1, 0, 0])
        assert torch.equal(mine.kept[1, 0, 0], mine.kept[2, 0, 0])
        for wrong, sentence in (
            ({"seed": "x"}, "seed must be a whole number"),
            ({"tokens": 5}, "cannot be set by a request"),
            ({"unknown": 1}, "Unknown reasonkv options"),
            ({"enabled": False}, f"without --scheduler-cls {SCHEDULER}"),
            ({"options": {"redarw": True}}, "did you mean 'redraw'"),
            ({"options": {"redraw": "no"}}, "redraw must be true or false"),
            ('{"options": {"redraw": 1}}', "redraw must be true or false"),
        ):
            with pytest.raises(VLLMValidationError, match=sentence):
                serve(llm, [ids], greedy(4, extra_args={"reasonkv": wrong}))
        again = serve(llm, [ids], greedy(80))  # the engine is alive, and a request without options has seed 0
        assert again.tokens == mine.tokens[:1]
        assert not core_of(llm).scheduler.running


def test_requests_of_one_batch_each_keep_what_their_options_keep(folder: Path) -> None:
    """Row by row what `CompressedCache` keeps when that row's options are the method's."""
    asked, tokens = prompts((90, 90, 90, 130)), 120
    options: list[dict[str, Any]] = [{}, {"temperature": 0.25}, {"sample": False, "magnitude": "norm"}, {}]
    given = GIVEN | {"method": "vase-attnv:window=16"}
    with engine(folder, given, logits_processors=[f"{OPTIONS}.vase-attnv"]) as llm:
        sampling = [greedy(tokens, extra_args={"reasonkv": {"seed": 3, "options": one}}) for one in options]
        mine = serve(llm, asked, sampling)
        others = serve(llm, asked, greedy(tokens, extra_args={"reasonkv": {"seed": 3}}))
        for row, (ids, own) in enumerate(zip(asked, options, strict=True)):
            method = method_of(get_method(given["method"]), own)
            theirs = reference(method, BUDGET, [ids], tokens, seed=7, row_seeds=[3])
            assert mine.tokens[row] == theirs.tokens[0]
            assert {key[1:] for key in mine.kept if key[0] == row} == {key[1:] for key in theirs.kept}
            for (_, layer, event), kept in theirs.kept.items():
                assert torch.equal(mine.kept[row, layer, event], kept), (row, layer, event)
            differs = any(not torch.equal(mine.kept[key], others.kept[key]) for key in mine.kept if key[0] == row)
            assert differs == bool(own)  # the options do something, to their own request


@dataclass(frozen=True)
class Fragile(RandomEviction):
    """`random`, but for an option that nobody tried out."""

    name: ClassVar[str] = "fragile"
    divisor: int = 1

    def plan(self, view: SlotView, keep: int) -> Plan:
        if view.layer == 1:  # by then the first layer is rewritten
            _ = 1 // self.divisor
        return super().plan(view, keep)


def test_a_method_that_fails_with_a_requests_options_goes_on_with_the_engines(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = prompts((90, 64, 90))
    options: list[dict[str, Any]] = [{}, {"divisor": 0}, {"divisor": 0}]
    with engine(folder, GIVEN) as llm:
        runtime_of(llm).use(EngineConfig(Fragile(), BUDGET, 7))
        plain = serve(llm, asked, greedy(80))
        with caplog.at_level("WARNING", "vllm.reasonkv"):
            mine = serve(llm, asked, [greedy(80, extra_args={"reasonkv": {"options": one}}) for one in options])
        assert mine.tokens == plain.tokens and mine.kept.keys() == plain.kept.keys()
        assert all(torch.equal(mine.kept[key], kept) for key, kept in plain.kept.items())
        said = [one.getMessage() for one in caplog.records if "goes on with" in one.getMessage()]
        assert len(said) == 2 and all("fragile:divisor=0 failed with its own: integer division" in one for one in said)
        runtime_of(llm).use(EngineConfig(Fragile(divisor=0), BUDGET, 7))  # a defect of the engine's is not hidden
        with pytest.raises(ZeroDivisionError):
            serve(llm, asked[:1], greedy(80))


def test_a_class_checks_the_options_of_the_method_it_is_bound_to() -> None:
    bound = RequestOptions.random
    assert bound is RequestOptions.random and bound is pickle.loads(pickle.dumps(bound))
    assert issubclass(bound, RequestOptions) and bound is not RequestOptionsWithOptOut.random
    assert RequestOptionsWithOptOut.random.may_opt_out and not bound.may_opt_out
    assert RequestOptions.cask.method == get_method("cask:mass=none")  # as it is served
    for name, sentence in (
        ("nothing", "no method is called so"),
        ("full", "keeps everything"),
        ("quest", "selects what each query reads"),
        ("__wrapped__", "no attribute"),
    ):
        with pytest.raises(AttributeError, match=sentence):
            getattr(RequestOptions, name)
    with pytest.raises(AttributeError, match="no method is called so"):
        _ = bound.random
    with pytest.raises(ServingError, match=f"in --logits-processors {OPT_OUT}.METHOD"):
        RequestOptionsWithOptOut.validate_params(
            SimpleNamespace(extra_args={"reasonkv": {"options": {"redraw": True}}})
        )


def test_a_prompt_that_cannot_be_kept_is_compressed_and_the_engine_lives_on(folder: Path) -> None:
    short, long = prompts((40, 130))
    with engine(folder, GIVEN | {"prompt": "keep"}) as llm:
        mine = serve(llm, [short, long], greedy(80))
        assert [len(tokens) for tokens in mine.tokens] == [80, 80]
        assert (mine.kept[0, 0, 0][:, :40] == torch.arange(40)).all()  # it fits: 40 + 16 < 64
        assert not (mine.kept[1, 0, 0][:, :40] == torch.arange(40)).all()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"logical": 41}, r"The scheduler has 42 tokens of request one-.* the worker 41"),
        ({"physical": 43}, r"The scheduler has 43 slots of request one-.* the worker 44"),
    ],
)
def test_lengths_that_scheduler_and_worker_do_not_agree_on_are_never_served(
    folder: Path, wrong: dict[str, int], sentence: str
) -> None:
    with engine(folder, GIVEN, scheduler_cls=SCHEDULER) as llm:
        llm.llm_engine.add_request("one", {"prompt_token_ids": prompts((40,))[0]}, greedy(20))
        for _ in range(3):
            llm.llm_engine.step()
        runtime = runtime_of(llm)
        (request,) = runtime.requests.values()
        runtime.tiers[0].lengths.start(request.row, BUDGET, request.state._replace(**wrong))
        with pytest.raises(RuntimeError, match=sentence):
            llm.llm_engine.step()


def test_a_batch_that_is_padded_as_graphs_pad_it_has_the_slots_that_are_there(folder: Path) -> None:
    """Two of three places and three of four tokens are padding, which is written nowhere and reads nothing."""
    with engine(folder, GIVEN) as llm:
        llm.llm_engine.add_request("one", {"prompt_token_ids": prompts((90,))[0]}, greedy(20))
        for _ in range(3):
            llm.llm_engine.step()
        runtime = runtime_of(llm)
        ((name, request),) = runtime.requests.items()
        assert request.state == (92, 66, 90)
        runtime.fed, runtime._computed = {name: 1}, {name: 92}
        common = SimpleNamespace(
            num_reqs=3, seq_lens=torch.tensor([93, 0, 0], dtype=torch.int32), slot_mapping=torch.zeros(4).long(),
            seq_lens_cpu_upper_bound=torch.tensor([94, 0, 0], dtype=torch.int32), replace=SimpleNamespace,
            query_start_loc=torch.tensor([0, 1, 1, 1], dtype=torch.int32),
            block_table_tensor=torch.tensor([[7, 8], [0, 0], [0, 0]], dtype=torch.int32),
        )  # fmt: skip
        made = runtime.physical_metadata(common, 64)
        runtime.fed = runtime.tiers[0].step = None
        assert made.seq_lens.tolist() == [67, 0, 0] and made.seq_lens_cpu_upper_bound.tolist() == [68, 0, 0]
        assert made.slot_mapping.tolist() == [8 * 64 + 2, -1, -1, -1] and made.max_seq_len == 67


def test_the_meter_counts_what_the_schedule_says(folder: Path) -> None:
    ids = prompts((90,))[0]
    with engine(folder, GIVEN) as llm:
        serve(llm, [ids], greedy(80))
        meter = runtime_of(llm).meter
        # the prompt is cut from 90 to 64; then an event each time 96 are held: after 32 and after 64 of 79 fed tokens
        assert (meter.compactions, meter.dropped, meter.peak) == (3, 26 + 32 + 32, 96)
        assert (meter.steps, meter.physical, meter.logical) == (80, 64 + 79 - 64, 90 + 79)
        assert 0 < meter.seconds < meter.step_seconds
        serve(llm, [ids], greedy(33))  # 96 are held after its last step, and nobody needs that event any more
        assert (meter.physical, meter.logical) == (64, 90 + 32)  # but lengths are those after it
        serve(llm, [ids], greedy(1))  # nor the prompt's cut here
        serve(llm, [ids[:5]], greedy(1))
        assert (meter.compactions, meter.dropped) == (3 + 1, 26 + 32 + 32 + 26)


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ({"method": "cask", "tokens": 96}, {}, "mass=none"),
        ({"method": "triattention", "tokens": 96}, {}, "The method or layer_shares need a calibration"),
        (
            {"method": "triattention:horizon=variational", "tokens": 96, "calibration": CALIBRATION},
            {},
            "has no horizon statistics",
        ),
        (
            GIVEN,
            {"max_model_len": 1024, "block_size": 32, "num_gpu_blocks_override": 9},
            "needs 32 blocks until it is compacted",
        ),
        (GIVEN, {"logits_processors": [f"{OPT_OUT}.random"]}, f"needs --scheduler-cls {SCHEDULER}"),
        (GIVEN, {"logits_processors": [f"{OPTIONS}.rkv"]}, f"give --logits-processors {OPTIONS}.random"),
    ],
)
def test_an_engine_that_cannot_be_served_does_not_start(
    folder: Path, given: dict[str, object], options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ServingError, match=sentence), engine(folder, given, **options):
        pass
