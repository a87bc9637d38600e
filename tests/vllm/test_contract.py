"""What we build on in vLLM. When one of these fails after an update, the extension point it names has moved."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn, registry
from vllm.v1.core.sched.async_scheduler import AsyncScheduler as StockAsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as StockScheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.sample.logits_processor import LogitsProcessor, cached_load_custom_logitsprocs
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator
from vllm.v1.worker.gpu_worker import Worker

from reasonkv.runtimes.vllm import backend
from reasonkv.runtimes.vllm.config import OPT_OUT, OPTIONS
from reasonkv.runtimes.vllm.manager import BoundedManager
from reasonkv.runtimes.vllm.plugin import register
from reasonkv.runtimes.vllm.requests import RequestOptions, RequestOptionsWithOptOut
from reasonkv.runtimes.vllm.scheduler import AsyncScheduler, Scheduler
from reasonkv.runtimes.vllm.spec import BoundedSpec


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def names(cls: Any) -> set[str]:
    return {one.name for one in fields(cls)}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            SingleTypeKVCacheManager.get_num_blocks_to_allocate,
            "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
            "num_tokens_main_model apply_admission_cap prefill_end",
        ),
        (SingleTypeKVCacheManager.allocate_new_blocks, "self request_id num_tokens num_tokens_main_model"),
        (
            SingleTypeKVCacheManager.remove_skipped_blocks,
            "self request_id processed_computed_tokens num_prompt_tokens",
        ),
        (SingleTypeKVCacheManager.pop_blocks_for_free, "self request_id"),
        (AttentionMetadataBuilder.build, "self common_prefix_len common_attn_metadata fast_build"),
        (
            cpu_attn.CPUAttentionBackendImpl.forward,
            "self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        ),
        (cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update, "self layer key value kv_cache slot_mapping"),
        (registry.register_backend, "backend class_path is_mamba"),
        (KVCacheSpecRegistry.register, "kvcache_spec_cls manager_class uniform_type_base_spec"),
        (StockScheduler.add_request, "self request"),
        (StockScheduler._reserve_prefill_lookahead, "self request num_computed_tokens num_new_tokens"),
        (StockScheduler._free_request, "self request delay_free_blocks"),
        (Worker.execute_model, "self scheduler_output"),
        (Worker.initialize_from_config, "self kv_cache_config"),
        (Worker.get_kv_cache_spec, "self"),
    ],
)
def test_functions_we_override_or_call_take_what_they_took(function: Any, expected: str) -> None:
    assert parameters(function) == expected.split()


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (
            CommonAttentionMetadata,
            "seq_lens seq_lens_cpu_upper_bound max_seq_len block_table_tensor slot_mapping num_reqs req_idx",
        ),
        (
            SchedulerOutput,
            "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens finished_req_ids preempted_req_ids",
        ),
        (NewRequestData, "req_id prompt_token_ids sampling_params"),
        (CachedRequestData, "req_ids resumed_req_ids num_computed_tokens"),
        (FullAttentionSpec, "block_size num_kv_heads head_size dtype"),
    ],
)
def test_what_we_read_is_still_there(cls: Any, expected: str) -> None:
    assert set(expected.split()) <= names(cls)


def test_what_we_subclass_and_register_by_is_still_there() -> None:
    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    assert {"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"} <= set(registry.AttentionBackendEnum.__members__)
    assert AttentionCGSupport.NEVER and AttentionMetadataBuilder.supports_update_block_table is False
    assert isinstance(NewRequestData.prompt_len, property)
    assert issubclass(BoundedManager, FullAttentionManager) and issubclass(BoundedSpec, FullAttentionSpec)
    assert backend.CPU_ATTN.get_name() == "CPU_ATTN"
    assert backend.CPU_ATTN.forward_includes_kv_cache_update
    assert not cpu_attn.CPUAttentionBackend.forward_includes_kv_cache_update
    assert "validate_params" in vars(LogitsProcessor)
    assert {"get_attn_backend", "get_kv_cache_spec"} <= set(vars(Attention))


def test_what_the_freeing_of_a_request_returns_is_in_its_response() -> None:
    source = inspect.getsource(StockScheduler.update_from_output)
    assert "kv_transfer_params, ec_transfer_params = self._free_request(request)" in source


def test_the_scheduler_asks_last_how_long_a_piece_may_be() -> None:
    source = inspect.getsource(StockScheduler.schedule)
    assert source.count("self._reserve_prefill_lookahead(") == 2  # of running requests, and of waiting ones
    assert "grammar_compile_error_reqs" in inspect.getsource(StockScheduler.update_from_output)


@pytest.mark.parametrize(("is_async", "kind"), [(False, Scheduler), (True, AsyncScheduler), (None, Scheduler)])
def test_one_name_makes_the_scheduler_that_the_engine_needs(is_async: bool | None, kind: type) -> None:
    asked = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async))
    assert type(Scheduler.__new__(Scheduler, asked)) is kind
    assert issubclass(AsyncScheduler, StockAsyncScheduler) and not issubclass(Scheduler, StockAsyncScheduler)


def test_the_check_of_requests_is_a_processor_for_both_model_runners() -> None:
    assert issubclass(RequestOptionsWithOptOut, LogitsProcessor) and issubclass(
        RequestOptionsWithOptOut, LogitsProcessorV2
    )
    first, second = RequestOptionsWithOptOut(None, "cpu", False), RequestOptionsWithOptOut(None, None)
    assert first.apply("logits") == second.apply("logits", "context") == "logits"
    assert first.is_argmax_invariant() and not second.add_request(0, None)


def test_a_processor_is_found_by_getattr_name_after_name() -> None:
    assert type(LogitsProcessor) is type(LogitsProcessorV2) is ABCMeta
    bound = getattr(RequestOptions, "vase-attnv"), getattr(RequestOptionsWithOptOut, "vase-attnv")
    given = (f"{OPTIONS}.vase-attnv", f"{OPT_OUT}.vase-attnv")
    assert cached_load_custom_logitsprocs(given) == list(bound)
    assert cached_load_custom_logitsprocs(bound) == list(bound)
    validate = build_custom_logits_processors_params_validator(given)
    validate(SamplingParams(extra_args={"reasonkv": {"options": {"temperature": 0.5}}}))
    with pytest.raises(VLLMValidationError, match="temperature must be a finite number"):
        validate(SamplingParams(extra_args={"reasonkv": {"options": {"temperature": "x"}}}))


def test_registering_twice_keeps_vllms_own_specs() -> None:
    register()
    register()
    assert KVCacheSpecRegistry.get_manager_class(
        FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=None)
    ) is (FullAttentionManager)
