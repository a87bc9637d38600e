"""The floor model counts what hand-worked sums say: parameters, bytes and operations of small configurations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run, sentence
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3MoeConfig

from reasonkv.budget import Budget
from reasonkv.capacity import Device, find_device, plan_capacity, slots_over_answer
from reasonkv.errors import ReasonKVError
from reasonkv.floor import GPUS, Rates, Work, compaction, decode_step, measure_rates, prompt_tokens, shape_of
from reasonkv.load import Load

BF16 = torch.bfloat16
SMALL: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
    "intermediate_size": 16, "vocab_size": 10, "dtype": BF16, "tie_word_embeddings": False,
}  # fmt: skip
# One layer: queries and output 8 x 8 each, keys and values 8 x 4 each, three matrices of 8 x 16, two norms of 8: 592.
DENSE, HEAD = 2 * 592 + 8, 80
CACHED = 2 * 2 * 2 * 2 * 2  # bytes a token: layers, keys and values, heads, dimensions, bytes of bfloat16
PER_SLOT = 2 * 4 * (2 + 2) * 2  # operations: a multiply-add, query heads, dimensions of key and value, layers


def small(**fields: Any) -> PreTrainedConfig:
    return LlamaConfig(**SMALL | fields)


def test_parameters_are_counted_without_weights() -> None:
    shape = shape_of(small())
    assert (shape.dense, shape.head, shape.parameters) == (DENSE, HEAD, DENSE + HEAD + 80)
    assert shape_of(small(tie_word_embeddings=True)).parameters == DENSE + 80  # a tied matrix is stored once
    assert shape_of(small(tie_word_embeddings=True)).head == HEAD  # and read as the output projection


def test_a_decode_step_reads_weights_once_and_every_slot_of_every_sequence() -> None:
    step = decode_step(small(), 3, 5, BF16)
    assert step.bytes == 2 * (DENSE + HEAD) + 3 * (5 + 1) * CACHED
    assert step.operations == 3 * 2 * (DENSE + HEAD) + 3 * 5 * PER_SLOT
    assert decode_step(small(), 3, 5, torch.float32).bytes == 2 * step.bytes
    assert decode_step(shape_of(small()), 3, 5, BF16) == step


def test_fewer_kv_heads_make_a_smaller_cache_and_the_same_operations() -> None:
    every, one = (shape_of(small(num_key_value_heads=heads)) for heads in (4, 1))
    assert every.kinds[0].bytes_per_token == 4 * one.kinds[0].bytes_per_token == 2 * CACHED
    assert every.operations_per_slot == one.operations_per_slot == (PER_SLOT,)


def test_a_block_of_tokens_attends_causally() -> None:
    block = prompt_tokens(small(), 2, 4, 7, BF16)
    assert block.bytes == 2 * (DENSE + HEAD) + 2 * (7 + 4 + 4) * CACHED
    assert block.operations == 2 * 4 * 2 * (DENSE + HEAD) + 2 * (8 + 9 + 10 + 11) * PER_SLOT


@pytest.mark.parametrize("held", [0, 1, 3, 9])
def test_a_sliding_window_bounds_what_is_read(held: int) -> None:
    config = MistralConfig(**SMALL | {"sliding_window": 4})
    block = prompt_tokens(config, 1, 3, held, BF16)
    pairs = sum(min(held + number, 4) for number in (1, 2, 3))
    assert block.operations == 3 * 2 * (DENSE + HEAD) + pairs * PER_SLOT
    assert block.bytes == 2 * (DENSE + HEAD) + (min(held + 3, 4 + 2) + 3) * CACHED


def test_a_mixture_computes_with_chosen_experts_and_reads_those_that_some_token_chose() -> None:
    config = Qwen3MoeConfig(**SMALL | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 3})
    shape = shape_of(config)
    assert shape.experts == 2 * 4 * 3 * 8 * 3 and shape.active == 0.25
    assert shape.active_parameters == shape.dense + shape.head + shape.experts / 4
    assert shape.weights_read(1) == shape.active_parameters
    assert shape.weights_read(2) == shape.dense + shape.head + shape.experts * (1 - 0.75**2)
    step = decode_step(config, 2, 1, BF16)
    assert step.operations == 2 * 2 * shape.active_parameters + 2 * PER_SLOT


def test_a_compaction_reads_and_writes_what_stays() -> None:
    assert compaction(small(), 3, 9, 5, BF16) == Work(2 * 3 * 5 * CACHED)
    assert compaction(small(), 3, 5, 5, BF16) == Work(0)


def test_the_slower_of_moving_and_computing_is_the_floor() -> None:
    assert Work(6, 10).seconds(Rates(2, 5)) == 3
    assert Work(6, 20).seconds(Rates(2, 5)) == 4


def test_this_machine_has_rates_and_a_data_sheet_has_peaks() -> None:
    found = measure_rates(torch.float32)
    assert found.bytes_per_second > 1e8 and found.operations_per_second > 1e8
    assert all(one.memory > 1e10 and one.bytes_per_second > 1e11 < one.operations_per_second for one in GPUS.values())


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: decode_step(small(), 0, 5, BF16), "batch must be at least 1, not 0"),
        (lambda: decode_step(small(), 1, 0, BF16), "slots must be at least 1, not 0"),
        (lambda: prompt_tokens(small(), 1, 0, 5, BF16), "tokens must be at least 1, not 0"),
        (lambda: compaction(small(), 1, 4, 5, BF16), "cannot keep 5 of 4 slots"),
    ],
)
def test_impossible_amounts_are_one_sentence(work: Any, words: str) -> None:
    with pytest.raises(ReasonKVError, match=words):
        work()


# -- plans ------------------------------------------------------------------------------------------------------------

STORED = 2 * (DENSE + HEAD + 80)
RULE = Budget(4, interval=4, sinks=0, recent=0, prompt="count")
ANSWER: dict[str, Any] = {"requests": 100, "length": "20", "prompt": "4", "reserve": 0.0}


def toy(cache: float) -> Device:
    """A device that moves 1,000 bytes a second, computes at once, and has so many bytes beside the weights."""
    return Device("toy", STORED + cache, Rates(1000, math.inf))


def test_slots_of_an_answer_are_those_its_tokens_attend_to() -> None:
    assert slots_over_answer(None, 4, 20) == (sum(range(5, 21)) / 16, 0)
    assert slots_over_answer(RULE, 4, 20) == ((5 + 6 + 7 + 8) / 4, 4 * 4)  # four compactions, each to four slots


def test_a_plan_counts_requests_and_tokens_per_second() -> None:
    plan = plan_capacity(small(), toy(4000), Load(**ANSWER), RULE, BF16)
    assert (plan.devices, plan.parameters, plan.weight_bytes, plan.cache_memory) == (1, STORED // 2, STORED, 4000)
    full, bounded = plan.full, plan.bounded
    assert (full.slots_mean, full.slots_peak, full.bytes_mean, full.bytes_peak) == (12.5, 20, 12.5 * 32, 20 * 32)
    assert (bounded.slots_mean, bounded.slots_peak, bounded.bytes_mean) == (6.5, 8, 6.5 * 32)
    assert (full.at_once, full.at_once_surely) == (4000 // 400, 4000 // 640)
    assert (bounded.at_once, bounded.at_once_surely) == (4000 // 208, 4000 // 256)
    step = (2 * (DENSE + HEAD) + 10 * (12.5 + 1) * CACHED) / 1000
    assert full.step_ms == pytest.approx(1e3 * step)
    assert full.tokens_per_second == pytest.approx(10 / step)
    assert full.hours == pytest.approx(100 * 16 / (10 / step) / 3600)
    step = (2 * (DENSE + HEAD) + 19 * (6.5 + 1) * CACHED) / 1000
    compactions = 4 * 2 * 4 * CACHED / 1000  # of one request: each reads and writes what stays
    assert bounded.tokens_per_second == pytest.approx(16 / (16 * step / 19 + compactions))


def test_prompts_take_the_time_of_their_products() -> None:
    slow = Device("slow", STORED + 400, Rates(math.inf, 1000))
    full = plan_capacity(small(), slow, Load(**ANSWER), RULE, BF16).full
    decoded = 2 * (DENSE + HEAD) + 12.5 * PER_SLOT
    prompt = 2 * 4 * (DENSE + HEAD) + 10 * PER_SLOT
    assert full.tokens_per_second == pytest.approx(16 * 1000 / (16 * decoded + prompt))


def test_ranks_share_heads_and_replicate_those_that_do_not_divide() -> None:
    two = plan_capacity(small(), toy(4000), Load(**ANSWER, tensor_parallel=2), RULE, BF16)
    assert (two.devices, two.weight_bytes, two.kv_copies) == (2, STORED / 2, 1)
    assert two.full.at_once == int((4000 + STORED / 2) / 200)  # half of each request's cache on each rank
    four = plan_capacity(small(), toy(4000), Load(**ANSWER, tensor_parallel=4), RULE, BF16)
    assert four.kv_copies == 2 and four.full.bytes_mean == 2 * 400  # two KV heads on four ranks


def test_stages_hold_layers_and_copies_hold_everything() -> None:
    stages = plan_capacity(small(), toy(4000), Load(**ANSWER, pipeline_parallel=2), RULE, BF16)
    assert stages.weight_bytes == 2 * (DENSE / 2 + HEAD)  # one of the two layers, and one end
    one = plan_capacity(small(), toy(4000), Load(**ANSWER), RULE, BF16)
    copies = plan_capacity(small(), toy(4000), Load(**ANSWER, data_parallel=3), RULE, BF16)
    assert copies.devices == 3 and copies.full.at_once == 3 * one.full.at_once
    assert copies.full.tokens_per_second == pytest.approx(3 * one.full.tokens_per_second)


def test_no_more_run_than_are_asked_for_and_none_where_none_fits() -> None:
    few = plan_capacity(small(), toy(4000), Load(**ANSWER | {"requests": 3}), RULE, BF16)
    assert few.full.at_once == few.bounded.at_once == 3
    tight = plan_capacity(small(), toy(300), Load(**ANSWER), RULE, BF16)
    assert (tight.full.at_once, tight.full.tokens_per_second, tight.full.hours) == (0, 0.0, None)
    assert tight.bounded.at_once == 1


def test_an_efficiency_stretches_its_own_part_of_a_step() -> None:
    half = toy(4000)._replace(attention=0.5)
    whole, slower = (plan_capacity(small(), one, Load(**ANSWER), RULE, BF16).full for one in (toy(4000), half))
    assert slower.step_ms - whole.step_ms == pytest.approx(10 * 13.5 * CACHED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a configuration and nothing else."""
    place = tmp_path_factory.mktemp("shape")
    small(num_hidden_layers=4, hidden_size=512, head_dim=128, vocab_size=1000, intermediate_size=2048).save_pretrained(
        place
    )
    return place


def test_the_command_plans_from_a_configuration_alone(folder: Path) -> None:
    found = run(
        "plan-capacity", "--model", folder, "--gpu", "h200", "--requests", 4096, "--length", "32k", "--budget", 2048
    )
    assert found.exit_code == 0, found.stderr
    assert "requests at once" in found.stdout and "random, 2048 tokens and the prompt" in found.stdout
    assert "upper bound" in found.stderr and "Links between devices" in found.stderr
    assert f"reasonkv serve {folder} --method random --budget 2048" in found.stdout
    data = json.loads(run("plan-capacity", "--model", folder, "--tensor-parallel", 4, "--json").stdout)
    assert data["device"] == "H200" and data["devices"] == 4 and data["kv_copies"] == 2
    assert any("refuses" in one for one in data["notes"])
    assert data["bounded"]["slots_peak"] == 1024 + 2048 + 128
    share = run("plan-capacity", "--model", folder, "--keep", "0.25")
    assert "25 % of the tokens and the prompt" in share.stdout and "--method random --keep 0.25\n" in share.stdout
    window = run("plan-capacity", "--model", folder, "--window", 512, "--method", "kara")
    assert "kara, 154 of every 512 tokens" in window.stdout and "--window 512" in window.stdout
    stages = run("plan-capacity", "--model", folder, "--pipeline-parallel", 2, "--data-parallel", 3)
    assert (
        stages.stdout.endswith(" --pipeline-parallel-size 2 --data-parallel-size 3\n")
        and "refuses" not in stages.stderr
    )
    together = run("plan-capacity", "--model", folder, "--pipeline-parallel", 2, "--method", "triattention:mode=global")
    assert "refuses triattention with pipeline parallelism, because its layers decide together" in together.stderr


def test_the_command_measures_this_machine(folder: Path) -> None:
    asked = ("plan-capacity", "--model", folder, "--gpu", "cpu", "--length", "512", "--prompt", "64", "--budget", "128")
    found = run(*asked, "--requests", 4, "--dtype", "float32", "--json")
    assert found.exit_code == 0, found.stderr
    data = json.loads(found.stdout)
    assert data["device"] == "this CPU" and data["full"]["at_once"] == 4
    assert 0 < data["full"]["tokens_per_second"] < 1e5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--gpu H900", "There is no GPU 'H900' in the table"),
        ("--length 32q", "length must be 1 to 16m tokens, a whole number such as 32768 or 32k, not '32q'"),
        ("--length 0", "length must be 1 to 16m tokens"),
        ("--length 17m", "length must be 1 to 16m tokens"),
        (f"--length 1{30 * '0'}", "length must be 1 to 16m tokens"),
        (f"--requests 1{30 * '0'}", "--requests cannot be used"),
        ("--prompt 32k", "cannot have a prompt of 32k"),
        ("--requests 0", "requests must be a whole number of at least 1"),
        ("--tensor-parallel 3", "4 query heads do not divide among 3"),
        ("--pipeline-parallel 9", "4 layers cannot be divided among 9"),
        ("--reserve 1", "reserve must be a share"),
        ("--reserve nan", "--reserve cannot be used"),
        ("--reserve 0.9999", "The weights take"),
        ("--method full", "full keeps every slot"),
        ("--method rand0m", "rand0m"),
        ("--budget 1,2", "Give one budget"),
        ("--budget 2 --sinks 5", "cannot hold 5 sinks"),
        ("--model /nowhere", "There is no folder /nowhere"),
    ],
)  # fmt: skip
def test_a_load_that_cannot_be_is_one_sentence(folder: Path, options: str, words: str) -> None:
    given = {"--model": str(folder)} | dict(zip(options.split()[::2], options.split()[1::2], strict=True))
    result = run("plan-capacity", *(word for pair in given.items() for word in pair))
    assert words in sentence(result)


def test_this_machine_and_every_name_of_the_table_are_devices() -> None:
    assert all(find_device(name.upper(), BF16).memory == gpu.memory for name, gpu in GPUS.items())
