"""Refuse a request's wrong options while the client can still be told: `--logits-processors`.

vLLM asks every custom logits processor whether it accepts a request's parameters before the request enters the engine,
and answers HTTP 400 if it does not. That is the one public place to look at `extra_args` there; logits are left alone.
Without the flag, a request with wrong options runs with the defaults and a warning in the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from reasonkv.runtimes.vllm.config import RequestConfig

if TYPE_CHECKING:
    from torch import Tensor


class RequestOptions(LogitsProcessor):  # type: ignore[misc]
    """Checks `extra_args["reasonkv"]` and does nothing else."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called for every request, in the process that took it.

        Raises:
            ServingError: a ValueError, which vLLM turns into HTTP 400.

        """
        RequestConfig.of(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Nothing to set up."""

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """It changes nothing, so greedy requests can skip it."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """It has no state."""
