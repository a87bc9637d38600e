"""What vLLM runs in every process, by the entry point group `vllm.general_plugins`."""

from __future__ import annotations

import atexit
import os
import shutil

from reasonkv.runtimes.vllm.config import METRICS_OWNER


def register() -> None:
    """Tell vLLM which manager goes with our KV cache spec; may be called any number of times.

    This changes nothing by itself: only `reasonkv`'s worker makes such a spec. In the process that `reasonkv serve`
    became, it also sees to it that the folder of counts goes when the process ends.
    """
    if os.environ.get(METRICS_OWNER) == str(os.getpid()):
        del os.environ[METRICS_OWNER]
        atexit.register(shutil.rmtree, os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager  # noqa: F401  (registers the built-ins)
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from reasonkv.runtimes.vllm.manager import BoundedManager
    from reasonkv.runtimes.vllm.spec import BoundedSpec

    # Registering first would leave vLLM's own specs out: it registers them only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(BoundedSpec, BoundedManager)
