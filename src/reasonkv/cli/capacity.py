"""`reasonkv plan-capacity`: how many requests run at once on which devices, and how fast, before anything is bought."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

from reasonkv.cli.console import note, print_json, print_list, quiet_libraries
from reasonkv.cli.flags import Json, Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.cli.ready import one_budget, serve_line
from reasonkv.evaluate.job import BudgetOptions
from reasonkv.load import Load

if TYPE_CHECKING:
    from reasonkv.capacity import Capacity, Plan
    from reasonkv.methods import Method


@command
def plan_capacity(
    *,
    model: str,
    gpu: str = "H200",
    load: Load,
    method: str = "random",
    budget: Annotated[BudgetOptions, Without(("mean_slots", "layer_shares"))],
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    json: Json = False,
) -> None:
    """Say what fits on GPUs and how fast it decodes, full KV against bounded: bytes, requests at once, tokens/s.

    Example: `reasonkv plan-capacity --model Qwen/Qwen3-8B --gpu H200 --requests 4096 --length 32k --budget 2048`

    Only the model's configuration is read. Speeds are those of the floor model: what must be moved and computed over
    a data sheet's peaks, so no engine is faster; of this machine, over what is measured now.

    Args:
        model: A model folder (config.json is enough), the bundled testbed, or a name on the Hugging Face hub.
        gpu: A GPU by its name, such as H200, H100, A100, L40S or RTX-4090; this - this machine's; cpu - its CPU.
        load: Requests, and how the devices share the model.
        method: Method, with options: rkv:KEY=VALUE.
        budget: Its budget; 2,048 tokens unless given.
        dtype: Of weights, keys and values; auto is the model's own.
    """
    from reasonkv import capacity
    from reasonkv.checkpoints import load_config
    from reasonkv.methods import get_method
    from reasonkv.models import DTYPES
    from reasonkv.resolve import check_model, resolve_budget

    quiet_libraries()
    is_sized = budget.window is not None or budget.tokens or budget.keep
    given = one_budget(budget if is_sized else replace(budget, tokens=(2048,)))
    chosen = get_method(method)
    if not chosen.bounded:
        raise UsageError(f"{chosen.name} keeps every slot, which is planned in any case; give --method a bounded one.")
    chosen, resolved = resolve_budget(chosen, given)
    config = load_config(model)
    if reasons := check_model(config, chosen):
        raise UsageError(reasons[0])
    own = config.get_text_config(decoder=True).dtype
    of = DTYPES.get(dtype) or own or DTYPES["bfloat16"]
    device = capacity.find_device(gpu, of)
    place = None if device.name in capacity.GPUS else "cpu" if "CPU" in device.name else "cuda"
    assert resolved is not None
    plan = capacity.plan_capacity(config, device, load, resolved, of, place)
    notes = _notes(config, load, plan, chosen, measured=place is not None)
    serve = serve_line(model, method, budget, given.tokens or 0)
    for way in ("tensor", "pipeline", "data"):
        size = getattr(load, f"{way}_parallel")
        serve += f" --{way}-parallel-size {size}" if size > 1 and not serve.startswith("#") else ""
    if json:
        print_json({"model": model, "method": chosen.spec(), **asdict(plan), "notes": notes, "serve": serve})
        return
    size, weights, left = plan.parameters / 1e9, plan.weight_bytes / 1e9, plan.cache_memory / 1e9
    print(
        f"{model}: {size:,.2f} billion parameters. Each of {plan.devices} x {plan.device} holds {weights:,.1f} GB of "
        f"weights and has {left:,.1f} GB left for keys and values."
    )
    names = ("", "full KV", f"{chosen.name}, {plan.bounded.kept}")
    pairs = zip(_cells(plan.full), _cells(plan.bounded), strict=True)
    print_list(names, ((name, full, bounded) for (name, full), (_, bounded) in pairs), right=True, width=110)
    for one in notes:
        note(one)
    print(serve)


def _cells(found: Capacity) -> list[tuple[str, str]]:
    """Return the lines of one column of the table."""
    fits = found.at_once > 0
    return [
        ("slots per request, mean (most)", f"{found.slots_mean:,.0f} ({found.slots_peak:,})"),
        ("GB of a request's cache, mean (most)", f"{found.bytes_mean / 1e9:,.3g} ({found.bytes_peak / 1e9:,.3g})"),
        ("requests at once (all at their most)", f"{found.at_once:,} ({found.at_once_surely:,})"),
        ("decode step, ms", f"{found.step_ms:,.1f}" if fits else "-"),
        ("answer tokens per second", f"{found.tokens_per_second:,.0f}" if fits else "no request fits"),
        ("hours for all requests", "-" if found.hours is None else f"{found.hours:,.2f}"),
    ]


def _notes(config: object, load: Load, plan: Plan, method: Method, *, measured: bool) -> list[str]:
    """Return what has to be known beside the numbers, one sentence each."""
    from reasonkv.runtimes.vllm.config import not_in_stages

    said = ["Speeds at a data sheet's peaks: an upper bound for any engine. Links between devices cost nothing here."]
    if measured:
        said = ["Speeds at rates measured now, with the share of them that products and attention reach here."]
    if plan.kv_copies > 1:
        said.append(
            f"Each KV head is stored {plan.kv_copies:g} times, because KV heads do not divide among "
            f"{load.tensor_parallel} ranks; reasonkv's vLLM runtime refuses that."
        )
    if load.pipeline_parallel > 1 and (reason := not_in_stages(method)):
        said.append(f"reasonkv's vLLM runtime refuses {method.name} with pipeline parallelism, {reason}.")
    if getattr(config, "quantization_config", None):
        said.append("The checkpoint is quantised; its weights are counted in the dtype all the same.")
    return said
