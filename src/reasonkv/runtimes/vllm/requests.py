"""Refuse a request's wrong options while the client can still be told: `--logits-processors`.

vLLM asks every custom logits processor whether it accepts a request's parameters before the request enters the engine,
and answers HTTP 400 if it does not. That is the one public place to look at `extra_args` there; logits are left alone.
Without the flag, a request with wrong options runs with the defaults and a warning in the log.

The question is asked in a process that does not know how the engine was started, and a class is all that vLLM lets us
name there; so engines whose requests may opt out of compression name another class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from reasonkv.runtimes.vllm.config import OPT_OUT, SCHEDULER, RequestConfig, ServingError

if TYPE_CHECKING:
    from torch import Tensor


class RequestOptions(LogitsProcessor, LogitsProcessorV2):  # type: ignore[misc]
    """Checks `extra_args["reasonkv"]` and does nothing else; for both of vLLM's model runners."""

    may_opt_out: ClassVar[bool] = False

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called for every request, in the process that took it.

        Raises:
            ServingError: a ValueError, which vLLM turns into HTTP 400.

        """
        asked = RequestConfig.of(sampling_params.extra_args)
        if not asked.enabled and not cls.may_opt_out:
            raise ServingError(
                "No request of this server can opt out of compression: it was started without "
                f"--scheduler-cls {SCHEDULER} and --logits-processors {OPT_OUT}."
            )

    def __init__(self, *args: Any) -> None:
        """Nothing to set up."""

    def apply(self, logits: Tensor, *args: Any) -> Tensor:
        """The logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """It changes nothing, so greedy requests can skip it."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """It has no state."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """It changes no request's logits."""
        return False


class RequestOptionsWithOptOut(RequestOptions):
    """The same where `--scheduler-cls` is ours, so that `{"enabled": false}` can be granted."""

    may_opt_out = True
