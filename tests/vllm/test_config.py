"""What can be asked of an engine and of a request, and one sentence for each thing that cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reasonkv import Budget, Window
from reasonkv.budget import PeriodicWindow
from reasonkv.methods import get_method, method_classes
from reasonkv.runtimes.vllm import config
from reasonkv.runtimes.vllm.config import (
    OPT_OUT,
    OPTIONS,
    SCHEDULER,
    EngineConfig,
    ServingError,
    check_engine,
    has_scheduler,
    installed_package,
    vllm_variant,
)  # fmt: skip
from reasonkv.runtimes.vllm.options import RequestConfig, method_of


def test_an_engine_is_configured_by_a_method_and_the_fields_of_a_budget() -> None:
    made = EngineConfig.parse(
        {"method": "snapkv:window=16", "tokens": 256, "interval": 64, "prompt": "on_top", "seed": 3}
    )
    assert made.method.spec() == "snapkv:window=16" and made.seed == 3
    assert made.budget == Budget(256, interval=64, prompt="on_top")


def test_a_window_takes_the_place_of_a_budget_and_sizes_karas_ring() -> None:
    made = EngineConfig.parse({"method": "kara", "window": {"size": 96, "buffer": 32, "retention": 0.25}})
    assert made.budget == Window(size=96, buffer=32, retention=0.25)
    assert made.method.needs.queries == 96 + 32


def test_nothing_is_configured_without_the_key() -> None:
    assert EngineConfig.of(SimpleNamespace(additional_config={})) is None
    assert EngineConfig.of(SimpleNamespace(additional_config={"other": 1})) is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tokens": 5}, "configured as"),
        ("snapkv", "configured as"),
        ({"method": "snapvk", "tokens": 512}, "did you mean 'snapkv'"),
        ({"method": "snapkv"}, "needs a budget"),
        ({"method": "snapkv", "interval": 64}, "needs tokens"),
        ({"method": "snapkv", "tokens": 64, "recent": 100}, "cannot hold"),
        ({"method": "snapkv", "token": 64}, "Unknown reasonkv fields: token"),
        ({"method": "snapkv", "tokens": "many"}, "whole number"),
        ({"method": "snapkv", "tokens": 512, "seed": 0.5}, "seed must be a whole number"),
        ({"method": "snapkv", "tokens": 512, "log_requests": 1}, "log_requests must be true or false"),
        ({"method": "kara", "tokens": 512, "window": {"size": 96}}, "takes the place of tokens"),
        ({"method": "kara", "window": {"width": 96}}, "window takes size, buffer, retention"),
        ({"method": "kara", "window": {"retention": 2}}, "retention must be a number between 0 and 1"),
        ({"method": "kara", "window": {"size": 48, "period": 48}}, "longer than a window"),
        ({"method": "full"}, "leave reasonkv out"),
        ({"method": "cask", "tokens": 512}, "mass=none"),
        ({"method": "defensivekv", "tokens": 512}, "output projection.*output_norm=false"),
        ({"method": "quest", "tokens": 512}, "selects what each query reads"),
        ({"method": "oracle", "tokens": 512}, "looks into the future"),
        ({"method": "h2o", "tokens": 512}, "only if all come in one forward"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_in_one_sentence(given: Any, sentence: str) -> None:
    with pytest.raises(ServingError, match=sentence) as error:
        EngineConfig.parse(given)
    assert "\n" not in str(error.value)


def stock(**changes: Any) -> SimpleNamespace:
    """What `check_engine` reads of vLLM's configuration; `a.b=` sets a field of a part."""
    parts = {
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, use_ubatching=False,
        ),
        "scheduler_config": SimpleNamespace(scheduler_reserve_full_isl=True, scheduler_cls=None),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "model_config": SimpleNamespace(
            is_multimodal_model=False, is_encoder_decoder=False, get_total_num_kv_heads=lambda: 8
        ),
        "attention_config": SimpleNamespace(backend=None), "speculative_config": None, "kv_transfer_config": None,
        "lora_config": None,
    }  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


RANDOM = EngineConfig.parse({"method": "random", "tokens": 256})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"lora_config": object()}, "LoRA"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__use_ubatching": True}, "microbatching"),
        ({"parallel_config__tensor_parallel_size": 3}, "8 KV heads do not divide among 3 ranks"),
        ({"cache_config__cache_dtype": "turboquant_4bit_nc"}, "blocks of turboquant_4bit_nc, .* --kv-cache-dtype fp8"),
        ({"cache_config__cache_dtype": "fp8_per_token_head"}, "blocks of fp8_per_token_head"),
        ({"cache_config__calculate_kv_scales": True}, "drop --calculate-kv-scales"),
        ({"attention_config__backend": SimpleNamespace(name="FLASHINFER")}, "backend FLASHINFER; give .*FLASH_ATTN"),
        ({"model_config__use_mla": True}, "latent attention"),
        ({"scheduler_config__scheduler_reserve_full_isl": False}, "admission without the whole prompt"),
        ({"model_config__is_multimodal_model": True}, "multi-modal"),
    ],
)
def test_an_engine_that_would_go_wrong_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    check_engine(stock(), RANDOM)
    with pytest.raises(ServingError, match=sentence):
        check_engine(stock(**changes), RANDOM)


@pytest.mark.parametrize("method", ["cask:mass=none", "triattention:mode=global"])
def test_pipeline_stages_are_refused_for_methods_whose_layers_decide_together(method: str) -> None:
    stages = stock(parallel_config__pipeline_parallel_size=2)
    check_engine(stages, RANDOM)
    config = EngineConfig.parse({"method": method, "tokens": 256, "calibration": "stats.safetensors"})
    check_engine(stock(), config)
    with pytest.raises(ServingError, match=r"^.*pipeline parallelism, because its layers decide together.*\Z"):
        check_engine(stages, config)


def test_versions_of_vllm_that_were_never_tried_are_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"0.32.0": True, "0.32.4+cpu": True, "0.33.1": False, "0.31.2": False, "0.330.0": False, "0.34.0": False}
    for found, is_fine in fine.items():
        monkeypatch.setattr(config, "version", lambda name, found=found: found)
        assert installed_package(untested=True) == ("vllm", found)
        if is_fine:
            assert installed_package() == ("vllm", found)
        else:
            with pytest.raises(ServingError, match=f"vLLM {found} is installed; .*--untested"):
                installed_package()
    assert EngineConfig.parse({"method": "random", "tokens": 256, "untested": True}).untested


def test_the_table_of_versions_in_the_docs_and_the_requirement_are_those_that_were_tried() -> None:
    root = Path(__file__).parents[2]
    rows = re.findall(r"^\| (\d+\.\d+) \| (.+?) \|", (root / "docs" / "serving.md").read_text(), re.MULTILINE)
    assert dict(rows) == config.TESTED
    after = f"0.{int(max(config.TESTED).split('.')[1]) + 1}"
    assert f'"vllm>={min(config.TESTED)},<{after}"' in (root / "pyproject.toml").read_text()


def test_a_refusal_does_not_repeat_a_megabyte_of_the_request() -> None:
    for given in ("x" * 10**6, {"unknown" * 10**5: 1}, {"seed": "5" * 10**6}, {"options": {"o" * 10**6: 1}}):
        with pytest.raises(ServingError) as error:
            method_of(get_method("random"), RequestConfig.of({"reasonkv": given}).options)
        assert 20 < len(str(error.value)) < 700


def test_our_scheduler_is_known_by_its_name_and_by_its_class() -> None:
    ours = type("Scheduler", (), {"__module__": "reasonkv.runtimes.vllm.scheduler"})
    for given in (SCHEDULER, ours, type("Own", (ours,), {})):
        assert has_scheduler(stock(scheduler_config__scheduler_cls=given))
    for given in (None, "vllm.v1.core.sched.scheduler.Scheduler", dict):
        assert not has_scheduler(stock(scheduler_config__scheduler_cls=given))


@pytest.mark.parametrize("processor", [OPT_OUT, f"{OPT_OUT}.random"])
def test_requests_may_opt_out_only_where_our_scheduler_is(processor: str) -> None:
    asked = stock(model_config__logits_processors=[processor], scheduler_config__scheduler_cls=SCHEDULER)
    check_engine(asked, RANDOM)
    with pytest.raises(ServingError, match="needs --scheduler-cls reasonkv"):
        check_engine(stock(model_config__logits_processors=[processor], scheduler_config__scheduler_cls=None), RANDOM)


def test_requests_are_checked_by_the_engines_own_method() -> None:
    bound = type("Bound", (), {"__module__": OPTIONS.split(":")[0], "__qualname__": "RequestOptions.random"})
    for fine in (OPTIONS, f"{OPTIONS}.random", bound, "other.module:RequestOptions.rkv"):
        check_engine(stock(model_config__logits_processors=[fine], scheduler_config__scheduler_cls=None), RANDOM)
    for flag in (OPTIONS, OPT_OUT):
        for method in ("rkv", "nonsense", "random.rkv", ""):
            asked = stock(
                model_config__logits_processors=["a:B", f"{flag}.{method}"], scheduler_config__scheduler_cls=SCHEDULER
            )
            with pytest.raises(ServingError, match=f"give --logits-processors {flag}.random"):
                check_engine(asked, RANDOM)


def test_a_window_with_a_period_needs_our_scheduler() -> None:
    window = {"size": 48, "buffer": 16, "retention": 0.25, "period": 64, "most": 2}
    made = EngineConfig.parse({"method": "kara", "window": window})
    assert made.budget == PeriodicWindow(48, 16, 0.25, period=64, most=2)
    assert made.method.needs.queries == 48 + 16
    assert "12 of 48 tokens of 2 requests every 64 steps" in made.describe()
    check_engine(stock(scheduler_config__scheduler_cls=SCHEDULER), made)
    with pytest.raises(ServingError, match="give --scheduler-cls"):
        check_engine(stock(scheduler_config__scheduler_cls=None), made)


def test_a_request_opts_out_as_an_object_or_as_text() -> None:
    for given, enabled in (({"enabled": False}, False), ('{"enabled": false}', False), ({"enabled": "no"}, True)):
        assert RequestConfig.asked(SimpleNamespace(extra_args={"reasonkv": given})).enabled is enabled
    assert RequestConfig.asked(None) == RequestConfig.asked(SimpleNamespace(extra_args=None)) == RequestConfig()


def test_a_request_sets_its_seed_as_an_object_or_as_text() -> None:
    assert RequestConfig.of(None) == RequestConfig.of({}) == RequestConfig.of({"other": 1}) == RequestConfig(0)
    assert (
        RequestConfig.of({"reasonkv": {"seed": 5}}) == RequestConfig.of({"reasonkv": '{"seed": 5}'}) == RequestConfig(5)
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("seed", "must be an object"),
        (5, "must be an object"),
        ({"seed": "five"}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"sede": 5}, "Unknown reasonkv options of a request: sede"),
        ({"tokens": 64}, "tokens cannot be set by a request"),
        ({"enabled": "no"}, "enabled must be true or false"),
        ({"options": "redraw=false"}, "options must be an object"),
        ({"options": ["redraw"]}, "options must be an object"),
        # what would end the engine if it got there
        ({"seed": 2**63}, "at most 64 bits"),
        ('{"seed": ' + "1" * 5000 + "}", "must be an object"),
        ("[" * 100_000, "must be an object"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_one_sentence(given: Any, sentence: str) -> None:
    with pytest.raises(ServingError, match=sentence):
        RequestConfig.of({"reasonkv": given})


def test_a_request_sets_options_as_an_object_or_within_its_text() -> None:
    given = {"seed": 5, "options": {"temperature": 0.5, "sample": False}}
    asked = RequestConfig.of({"reasonkv": given})
    assert asked == RequestConfig.of({"reasonkv": json.dumps(given)}) == RequestConfig(5, options=given["options"])
    assert asked != RequestConfig(5) and len({asked, RequestConfig.of({"reasonkv": given})}) == 1
    given["options"]["temperature"] = 2.0  # what was asked is asked
    assert asked.options == {"temperature": 0.5, "sample": False}
    with pytest.raises(TypeError):
        asked.options["temperature"] = 2.0  # type: ignore[index]


def test_a_requests_method_is_the_engines_with_its_options() -> None:
    engines = get_method("vase-attnv:window=16,n_sink=2")
    assert method_of(engines, RequestConfig().options) is engines
    made = method_of(engines, {"temperature": 2, "magnitude": "norm"})
    assert made == method_of(engines, {"magnitude": "norm", "temperature": 2.0})
    assert hash(made) == hash(method_of(engines, {"magnitude": "norm", "temperature": 2.0}))
    assert made.spec() == "vase-attnv:window=16,n_sink=2,temperature=2.0,magnitude=norm"
    assert made.needs == engines.needs
    assert method_of(engines, {"window": 16, "sample": False}).spec() == "vase-attnv:window=16,n_sink=2,sample=False"
    assert (
        method_of(get_method("triattention"), {"mode": "global", "group": "max"}).spec() == "triattention:mode=global"
    )


def test_every_option_of_every_method_can_be_restated_unless_all_queries_are_observed() -> None:
    for cls in method_classes():
        try:
            method = vllm_variant(get_method(cls.name))
        except ServingError:
            continue
        for key, value in method.options().items():
            if method.needs.observes:
                with pytest.raises(ServingError, match=f"^{key} of {cls.name} cannot be set by a request"):
                    method_of(method, {key: value})
            else:
                assert method_of(method, {key: value}) == method


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("vase-attnv", {"tempreture": 0.5}, "Unknown option of vase-attnv 'tempreture'; did you mean 'temperature'"),
        ("vase-attnv", {"tokens": 5}, "Unknown option of vase-attnv 'tokens'"),
        ("streaming", {"window": 5}, "It takes none"),
        ("vase-attnv", {"temperature": "0.5"}, "temperature must be a finite number, not '0.5'"),
        ("vase-attnv", {"temperature": True}, "temperature must be a finite number, not True"),
        ("vase-attnv", {"temperature": None}, "temperature must be a finite number, not None"),
        ("vase-attnv", {"temperature": float("nan")}, "temperature must be a finite number, not nan"),
        ("vase-attnv", {"temperature": float("inf")}, "temperature must be a finite number, not inf"),
        ("vase-attnv", {"temperature": 10**400}, "temperature must be a finite number, not 1000"),
        ("vase-attnv", {"sample": 0}, "sample must be true or false, not 0"),
        ("vase-attnv", {"kernel": 3.0}, "kernel must be a whole number, not 3.0"),
        ("vase-attnv", {"kernel": False}, "kernel must be a whole number, not False"),
        ("vase-attnv", {"magnitude": ["norm"]}, "magnitude must be range, variance, norm or random, not"),
        ("vase-attnv", {"magnitude": "size"}, "magnitude must be range"),
        ("vase-attnv", {"temperature": 0}, "temperature must be above 0"),
        ("vase-attnv", {"kernel": 2}, "kernel must be an odd number"),
        ("chunkkv", {"base": "nothing"}, "Unknown method 'nothing'"),
        # extremes, by which an event would never end, or end the engine
        ("vase-attnv", {"temperature": 1e-300}, "temperature must be 0 or between 0.0001 and 10000 in size"),
        ("lagkv", {"value_ratio": 1e300}, "value_ratio must be 0 or between"),
        ("rkv", {"kernel": 2**31 - 1}, "kernel must be 0 or between"),
        ("vase-dkv", {"projection": 10**9}, "projection must be 0 or between"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_sentence(
    method: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ServingError, match=sentence) as error:
        method_of(get_method(method), options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "deciding"),
    [
        ("snapkv", {"window": 32}, "window"),  # the length of the ring
        ("snapkv", {"kernel": 3, "window": 32}, "window"),
        ("vase-dkv", {"window": 32}, "window"),  # what is protected
        ("vase-attnv", {"variant": "paper"}, "variant"),  # state beside slots
        ("vase-attnv", {"evict_large": True}, "evict_large"),
        ("random-attention", {"shared": True}, "shared"),  # which heads decide together
        ("triattention", {"mode": "per_layer_per_head", "group": "mean"}, "mode"),
        ("triattention", {"horizon": "variational"}, "horizon"),  # parts of the statistics
        ("triattention", {"norm": "rms2"}, "norm"),
        ("cask:mass=none", {"mass": "log"}, "mass"),
        ("cask:mass=none", {"fold": "none"}, "fold"),
        ("cask:mass=none", {"per_layer": True}, "per_layer"),
        ("defensivekv:output_norm=false", {"output_norm": True}, "output_norm"),
        ("adakv:stretch=1.0", {"stretch": 1.5}, "stretch"),
        ("chunkkv", {"base": "keydiff"}, "base"),
        ("chunkkv", {"reuse": 2}, "reuse"),
        ("kara:queries=96", {"queries": 0}, "queries"),
        ("expected", {"future": 64, "covariance": "full"}, "covariance, future"),  # every query
        ("beaconkv", {"beacons": 8}, "beacons"),
    ],
)
def test_what_the_engine_collects_is_not_for_a_request_to_decide(
    method: str, options: dict[str, Any], deciding: str
) -> None:
    engines = get_method(method)
    with pytest.raises(ServingError, match=f"^{deciding} of {engines.name} cannot be set by a request") as error:
        method_of(engines, options)
    assert "set it in --additional-config" in str(error.value)
