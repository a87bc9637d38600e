"""Refuse a request's wrong options while the client can still be answered: `--logits-processors`.

vLLM asks every custom logits processor whether it accepts a request's parameters before the request enters the engine,
and answers HTTP 400 if it does not. No other public place sees `extra_args` there. Logits are left alone. Without the
flag, a request with wrong options runs with the defaults and a warning in the log.

The check runs in a process that does not know the engine's configuration, and vLLM only lets us name a class there. So
engines whose requests may opt out name another class, and the engine's method is an attribute of either class
(`RequestOptions.vase-attnv`): vLLM finds a class by getattr, name after name.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from reasonkv.methods import Method, MethodError, get_method, method_names
from reasonkv.runtimes.vllm.config import OPT_OUT, SCHEDULER, ServingError, vllm_variant
from reasonkv.runtimes.vllm.options import RequestConfig, method_of

if TYPE_CHECKING:
    from torch import Tensor


class PerMethod(ABCMeta):
    """Gives a class an attribute for every method that vLLM can serve: the class bound to that method."""

    method: Method | None
    _bound: dict[str, PerMethod]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        cls._bound = {}  # of this class alone: what a base has bound may do less

    def __getattr__(cls, name: str) -> PerMethod:
        """Return the class bound to a method, the same one every time; AttributeError for one that cannot be served."""
        if name.startswith("_") or cls.method is not None or name not in method_names():
            raise AttributeError(f"{cls.__qualname__} has no attribute {name!r}, and no method is called so.")
        if name not in cls._bound:
            try:
                method = vllm_variant(get_method(name))
            except (MethodError, ServingError) as error:
                raise AttributeError(str(error)) from None
            own = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.{name}", "method": method}
            cls._bound[name] = PerMethod(f"{cls.__name__}.{name}", (cls,), own)
        return cls._bound[name]


class RequestOptions(LogitsProcessor, LogitsProcessorV2, metaclass=PerMethod):  # type: ignore[misc]
    """Checks `extra_args["reasonkv"]` and does nothing else; for both of vLLM's model runners."""

    may_opt_out: ClassVar[bool] = False
    method: ClassVar[Method | None] = None
    """Whose options a request may set; None: nobody's."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request, in the process that took it; vLLM turns a ServingError, a ValueError, into HTTP 400."""
        asked = RequestConfig.of(sampling_params.extra_args)
        if not asked.enabled and not cls.may_opt_out:
            processor = OPT_OUT if cls.method is None else f"{OPT_OUT}.{cls.method.name}"
            raise ServingError(
                "No request of this server can opt out of compression: it was started without "
                f"--scheduler-cls {SCHEDULER} and --logits-processors {processor}."
            )
        if cls.method is not None:
            method_of(cls.method, asked.options)
        elif asked.options:
            raise ServingError(
                "No request of this server can set options of its method: it was started without the method's name "
                f"in --logits-processors {cls.__module__}:{cls.__qualname__}.METHOD."
            )

    def __init__(self, *args: Any) -> None:
        pass

    def apply(self, logits: Tensor, *args: Any) -> Tensor:
        """Return the logits unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Return True, so that greedy requests skip it."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Ignore changes of the batch (model runner V1)."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return False: it changes no request's logits (model runner V2)."""
        return False


class RequestOptionsWithOptOut(RequestOptions):
    """The same where `--scheduler-cls` is ours, so that `{"enabled": false}` can be granted."""

    may_opt_out = True
