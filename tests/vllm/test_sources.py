"""What we build on in vLLM, read out of its source text: the installed one, and others that cannot be imported here.

`REASONKV_VLLM_SOURCES` names more, as folders with a folder `vllm`, divided by colons: an unpacked wheel is enough.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest

MANAGER, SCHEDULER = "v1/core/single_type_kv_cache_manager.py", "v1/core/sched/scheduler.py"
GROUPS = "v1/core/kv_cache_utils.py"
MOVED = {GROUPS: "v1/core/kv_cache_planning.py"}
"""Files whose content is elsewhere since vLLM 0.33."""
OURS = Path(__file__).parents[2] / "src" / "reasonkv" / "runtimes" / "vllm"
FUNCTIONS = {
    (MANAGER, "SingleTypeKVCacheManager.get_num_blocks_to_allocate"): "self request_id num_tokens new_computed_blocks "
    "total_computed_tokens num_local_computed_tokens num_tokens_main_model apply_admission_cap prefill_end",
    (MANAGER, "SingleTypeKVCacheManager.allocate_new_blocks"): "self request_id num_tokens num_tokens_main_model",
    (MANAGER, "SingleTypeKVCacheManager.cache_blocks"): "self request num_tokens retention_interval replay_boundaries",
    (MANAGER, "SingleTypeKVCacheManager.remove_skipped_blocks"): "self request_id processed_computed_tokens "
    "num_prompt_tokens",
    (MANAGER, "SingleTypeKVCacheManager.pop_blocks_for_free"): "self request_id",
    (MANAGER, "SingleTypeKVCacheManager._get_num_evictable_blocks"): "cls blocks",
    (MANAGER, "FullAttentionManager.find_longest_cache_hit"): "cls block_hashes max_length kv_cache_group_ids block_pool "
    "kv_cache_spec drop_eagle_block alignment_tokens dcp_world_size pcp_world_size",
    (SCHEDULER, "Scheduler.add_request"): "self request",
    (SCHEDULER, "Scheduler._reserve_prefill_lookahead"): "self request num_computed_tokens num_new_tokens",
    (SCHEDULER, "Scheduler._free_request"): "self request delay_free_blocks",
    (SCHEDULER, "Scheduler._preempt_request"): "self request timestamp drop_stale_output",
    ("v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry._ensure_registered"): "cls vllm_config",
    ("v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry.register"): "cls kvcache_spec_cls manager_class "
    "uniform_type_base_spec",
    ("v1/attention/backend.py", "AttentionMetadataBuilder.build"): "self common_prefix_len common_attn_metadata "
    "fast_build",
    ("v1/attention/backends/registry.py", "register_backend"): "backend class_path is_mamba",
    (GROUPS, "get_kv_cache_groups"): "vllm_config kv_cache_spec",
    (GROUPS, "_get_kv_cache_groups_uniform_page_size"): "kv_cache_spec",
    ("v1/kv_cache_interface.py", "KVCacheSpec.is_uniform_with_collection"): "self kv_cache_specs",
    ("v1/kv_cache_interface.py", "MambaSpec.max_memory_usage_bytes"): "self vllm_config",
    ("v1/kv_cache_interface.py", "SlidingWindowSpec.max_memory_usage_bytes"): "self vllm_config",
    ("model_executor/layers/attention/attention.py", "Attention.get_kv_cache_spec"): "self vllm_config",
    ("v1/worker/gpu_worker.py", "Worker.execute_model"): "self scheduler_output",
    ("v1/worker/gpu_worker.py", "Worker.determine_available_memory"): "self",
    ("v1/worker/cpu_worker.py", "CPUWorker.determine_available_memory"): "self",
    ("v1/worker/gpu_worker.py", "Worker.initialize_from_config"): "self kv_cache_config",
    ("v1/worker/gpu_worker.py", "Worker.get_kv_cache_spec"): "self",
} | {
    (f"v1/attention/backends/{file}.py", f"{name}.{method}"): f"self layer {rest}"
    for file, name in (
        ("cpu_attn", "CPUAttentionBackendImpl"), ("flash_attn", "FlashAttentionImpl"),
        ("triton_attn", "TritonAttentionImpl"),
    )
    for method, rest in (
        ("forward", "query key value kv_cache attn_metadata output output_scale output_block_scale"),
        ("do_kv_cache_update", "key value kv_cache slot_mapping"),
    )
}  # fmt: skip
"""Functions that we override or call, and what they take."""
FIELDS = {
    ("v1/attention/backend.py", "CommonAttentionMetadata"): "query_start_loc seq_lens seq_lens_cpu_upper_bound "
    "max_seq_len block_table_tensor slot_mapping num_reqs req_idx",
    ("v1/core/sched/output.py", "SchedulerOutput"): "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens "
    "finished_req_ids preempted_req_ids",
    ("v1/core/sched/output.py", "NewRequestData"): "req_id prompt_token_ids sampling_params num_computed_tokens",
    ("v1/core/sched/output.py", "CachedRequestData"): "req_ids resumed_req_ids num_computed_tokens",
}
"""Fields that we read."""
WORDS = {
    SCHEDULER: "self.kv_cache_manager self.max_model_len self.requests grammar_compile_error_reqs "
    "kv_transfer_params,ec_transfer_params=self._free_request(request)",
    # each kind of full attention is looked up once, as far as those before it were found
    "v1/core/kv_cache_coordinator.py": "self.single_type_managers self.block_pool curr_hit_length=_new_hit_length "
    "ifisinstance(spec,FullAttentionSpec)andcached_blocksisnotNone:",
    GROUPS: "except(AssertionError,ValueError): exceptAssertionError: ifmax_num_layers<min_num_layers*1.5:",
    "v1/kv_cache_interface.py": "classChunkedLocalAttentionSpec( defunpadded_page_size_bytes(self) sliding_window:",
    "config/scheduler.py": "disable_hybrid_kv_cache_manager",
    "v1/request.py": "self.skip_reading_prefix_cache self.num_prompt_tokens self.max_tokens",
    "v1/worker/gpu_model_runner.py": "self.input_batch self.input_ids",
    "v1/worker/gpu_input_batch.py": "defreq_ids(self)",
    "v1/worker/gpu/model_runner.py": "self.req_states self.input_buffers",
    "v1/worker/gpu/states.py": "self.index_to_req_id",
}
"""Text without blanks: attributes of objects that vLLM gives us."""


def sources() -> list[Path]:
    """Folders of vLLM's source: the installed one, found without importing it, and those that are named."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        spec = None
    found = [Path(one) / "vllm" for one in os.environ.get("REASONKV_VLLM_SOURCES", "").split(":") if one]
    installed = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    return [one for one in installed + found if (one / MANAGER).is_file()]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def definition(path: Path, name: str) -> ast.AST:
    """The class or function of that name."""
    node: ast.AST = parsed(path)
    for part in name.split("."):
        node = next(one for one in ast.iter_child_nodes(node) if getattr(one, "name", None) == part)
    return node


def place(root: Path, file: str) -> Path:
    """A file of that version."""
    moved = root / MOVED.get(file, file)
    return moved if moved.is_file() else root / file


def names_in(path: Path) -> set[str]:
    """What a module can be asked for: its definitions, its variables and what it imports."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {one.asname or one.name for one in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # of a table of lazy imports
    return found


def is_there(root: Path, module: str, name: str) -> bool:
    path = root.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.is_file() and bool({name, "*"} & names_in(file))


@pytest.mark.parametrize("root", sources() or [None], ids=str)
def test_what_we_import_is_there_under_one_of_its_names(root: Path | None) -> None:
    if root is None:
        pytest.skip("no source of vLLM here")
    missing = []
    for file in sorted(OURS.glob("*.py")):
        tree = parsed(file)
        either = {  # imports of which one is enough
            id(node): attempt
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            for node in ast.walk(attempt)
        }
        ways: dict[int, list[bool]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm":
                there = all(is_there(root, str(node.module), one.name) for one in node.names)
                ways.setdefault(id(either.get(id(node), node)), []).append(there)
                if not there and id(node) not in either:
                    missing.append(f"{file.name}: {ast.unparse(node)}")
        missing += [file.name for found in ways.values() if not any(found)]
    assert missing == []


@pytest.mark.parametrize("root", sources() or [None], ids=str)
def test_what_we_override_read_or_call_is_as_it_was(root: Path | None) -> None:
    if root is None:
        pytest.skip("no source of vLLM here")
    moved = {}
    for (file, name), expected in FUNCTIONS.items():
        node = definition(place(root, file), name)
        assert isinstance(node, ast.FunctionDef)
        given = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if given != expected.split():
            moved[name] = given
    for (file, name), expected in FIELDS.items():
        node = definition(root / file, name)
        assert isinstance(node, ast.ClassDef)
        there = {
            one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
        if missing := set(expected.split()) - there:
            moved[name] = sorted(missing)
    for file, expected in WORDS.items():
        text = "".join(place(root, file).read_text().split())
        if missing := {word for word in expected.split() if word not in text}:
            moved[file] = sorted(missing)
    assert moved == {}
