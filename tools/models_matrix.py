"""Check every causal architecture of the installed transformers against the oracle, and write docs/models.md.

    python -m tools.models_matrix              # all of them; continues where a run ended
    python -m tools.models_matrix llama jamba  # some, again

Each architecture runs as a tiny random model in a process of its own with a time limit, so that none can stop the rest.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing.connection
import resource
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from reasonkv import Budget, CompressedCache, ReasonKVError
from reasonkv.calibration import Calibration
from reasonkv.files import write_atomically
from reasonkv.layers import bounded_layers, cache_layers, head_dim_of, layer_rotaries, text_config
from reasonkv.methods import get_method
from reasonkv.resolve import attends_by_itself, check_model
from reasonkv.runtimes.transformers.attention import PREFIX
from tools.slot_oracle import RecordingCache
from tools.tiny_models import architectures, tiny_config, tiny_model

METHODS = ("full", "random", "snapkv:window=4,kernel=3", "expected", "triattention")
QUERY_FREE = ("full", "random", "streaming", "keydiff", "knorm")
"""Where a model shows no queries."""
LENGTHS, PIECES = (44, 31), [20, 1, 1, 1, 7, 1, 1, 1, 1, 7, 1, 1, 1]
BUDGET = Budget(12, interval=4, sinks=1, recent=4, prompt="count")
NO_CACHE = {
    "gemma4_assistant": "reads the keys and values of another model",
    "gemma4_unified_assistant": "reads the keys and values of another model",
    "openai-gpt": "keeps no cache",
    "rwkv": "carries a state",
    "xlstm": "carries a state",
}
"""Architectures without an attention cache of their own, beside those whose layers are all of a fixed size."""
FLOAT64 = ("xglm",)
"""Architectures that need float64 as the default dtype: they make numbers of the model's range in that."""
VERDICTS = ("exact", "keys alone", "wrong", "refused", "not run", "no cache")
EXACT, LOGITS, ROTATION = 1e-12, 1e-6, 1e-4
STATE, PAGE = Path("build/models_matrix.jsonl"), Path("docs/models.md")
CPU_S, WALL_S = 60, 900  # of one architecture; a busy machine is no hang


def examine(model_type: str) -> dict[str, Any]:
    """Return the verdict on one architecture, and why.

    It is "exact", "keys alone" (exact for methods that need no queries), "refused", "wrong", "not run", or "no cache"
    where nothing grows.
    """
    row: dict[str, Any] = {"type": model_type, "verdict": "refused", "why": "", "methods": {}}
    if model_type in NO_CACHE:
        return row | {"verdict": "no cache", "why": f"{model_type} {NO_CACHE[model_type]}."}
    kernel = None
    try:
        model = tiny_model(model_type)
        if problems := check_model(model):
            grows = not problems[0].startswith("No layer of")
            return row | {"verdict": "refused" if grows else "no cache", "why": problems[0]}
        stock = _stock_logits(model)
        if stock.isnan().any():  # eager masks overflow in float64 where a padded row sees nothing
            kernel = "reference"
            model.set_attn_implementation(PREFIX + kernel)
            stock = _stock_logits(model)
    except Exception as error:
        if problems := check_model(tiny_config(model_type)):  # by its configuration alone
            return row | {"why": problems[0]}
        return row | {"verdict": "not run", "why": f"the tiny model fails by itself ({_first(error)})"}
    config = model.config
    row["layers"] = f"{len(bounded_layers(config))} of {len(cache_layers(config))}"
    methods = QUERY_FREE if attends_by_itself(model) else METHODS
    for spec in methods:
        name = spec.partition(":")[0]
        try:
            row["methods"][name] = _difference(model, spec, stock, kernel)
        except ReasonKVError as error:
            row["methods"][name] = str(error)
        except Exception as error:
            row["methods"][name] = f"{type(error).__name__}: {_first(error)}"
            return row | {"verdict": "wrong", "why": f"{name}: {_first(error)}"}
    wrong = [name for name, found in row["methods"].items() if isinstance(found, float) and found > EXACT]
    refused = [name for name, found in row["methods"].items() if isinstance(found, str)]
    if wrong:
        return row | {"verdict": "wrong", "why": f"{', '.join(wrong)} differ from the oracle"}
    if len(refused) == len(methods):
        return row | {"why": row["methods"]["full"]}
    if methods is QUERY_FREE:
        return row | {"verdict": "keys alone", "why": check_model(model, get_method("snapkv"))[0]}
    why = f"{', '.join(refused)} refused: {row['methods'][refused[0]]}" if refused else ""
    return row | {"verdict": "exact", "why": why}


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = max(LENGTHS)
    mask = torch.stack([torch.arange(width) >= width - length for length in LENGTHS]).long()
    ids = torch.randint(5, 200, (len(LENGTHS), width), generator=generator).masked_fill(mask == 0, 0)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def _logits(model: PreTrainedModel, cache: Any) -> Tensor:
    ids, mask, positions = _batch()
    takes = inspect.signature(model.forward).parameters
    parts, start = [], 0
    for size in PIECES:
        end = start + size
        options = {"position_ids": positions[:, start:end]} if "position_ids" in takes else {}
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **options)
        parts.append(out.logits)
        start = end
    return torch.cat(parts, 1)


def _stock_logits(model: PreTrainedModel) -> Tensor:
    return _logits(model, MiniMaxCache() if model.config.model_type == "minimax" else DynamicCache(config=model.config))


def _difference(model: PreTrainedModel, spec: str, stock: Tensor, kernel: str | None) -> float:
    """Return the largest difference of any call of attention; raise where the whole model differs from full KV."""
    _, mask, _ = _batch()
    options: dict[str, Any] = {
        "kernel": kernel,
        "prompt_lengths": [PIECES[0] - (max(LENGTHS) - length) for length in LENGTHS],
    }
    if spec == "triattention":
        options["calibration"] = _statistics(model)
    budget = None if spec == "full" else BUDGET
    with RecordingCache(model, spec, budget, mask_BL=mask, **options) as cache, sdpa_kernel(SDPBackend.MATH):
        logits = _logits(model, cache)
    if spec == "full":
        real = mask[:, : logits.shape[1]].bool()
        gap = (logits - stock)[real].abs().max().item()
        assert gap <= LOGITS, f"logits differ from the stock cache's by {gap:.1e}"
    else:
        assert cache.rows[0].events > 0, "nothing was compacted"
    assert cache.calls >= len(PIECES) * len(cache.compressed_layers), "some layers do not attend"
    if spec in ("expected", "triattention"):
        _check_rotation(model)
    return cache.worst


@torch.no_grad()
def _check_rotation(model: PreTrainedModel) -> None:
    """Check that un-rotating works: one token at several positions must have one key, once the rotation is undone."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return
    positions = torch.tensor([[0], [1], [7], [100]])
    ids = torch.full((4, 1), 9)
    with CompressedCache(model, "full") as cache:
        model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
        for layer in cache.compressed_layers:
            assert layer.storage is not None
            keys = layer.storage.keys[:, :, :1]
            if layer.expansion is not None:
                keys, _ = layer.expansion.shown(keys, layer.storage.values[:, :, :1])
            norms = keys[:, :, 0].norm(dim=-1)
            if ((norms - norms[:1]).abs() > ROTATION * norms).any():
                continue  # no rotation: the positions are in what the layer is given (learned embeddings)
            plain = layer_rotaries(model.config)[layer.index].unrotate(keys, positions[:, None])
            gap = ((plain - plain[:1]).abs().max() / plain.abs().max()).item()
            assert gap <= ROTATION, f"keys of layer {layer.index} are un-rotated wrongly (by {gap:.0%})"


def _statistics(model: PreTrainedModel) -> Calibration:
    config, generator = text_config(model.config), torch.Generator().manual_seed(5)
    pairs = layer_rotaries(model.config)[0].inv_freq.numel()
    shape = (config.num_hidden_layers, config.num_attention_heads, pairs)
    mean = torch.view_as_complex(torch.randn(*shape, 2, generator=generator))
    modulus = mean.abs() + torch.rand(shape, generator=generator)
    return Calibration(mean, modulus, modulus**2 + 0.1, head_dim=head_dim_of(config))


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0][:160] if lines else ''}"


def _in_child(model_type: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    torch.set_num_threads(1)
    if model_type in FLOAT64:
        torch.set_default_dtype(torch.float64)
    answers.put(examine(model_type))


def examine_apart(model_type: str) -> dict[str, Any]:
    """Return `examine` of a process of its own; a crash or a hang is a verdict like any other."""
    context = multiprocessing.get_context("fork")  # what is imported already need not be imported again
    answers = context.SimpleQueue()
    process = context.Process(target=_in_child, args=(model_type, answers), daemon=True)
    process.start()
    ready = multiprocessing.connection.wait([answers._reader, process.sentinel], WALL_S)  # type: ignore[attr-defined]
    if answers._reader in ready:  # type: ignore[attr-defined]
        found = dict(answers.get())
    else:
        why = "its process died" if ready else f"no answer within {WALL_S} s"
        found = {"type": model_type, "verdict": "not run", "why": why, "methods": {}}
    process.kill()
    process.join()
    return found


def _names(specs: Sequence[str]) -> str:
    return ", ".join(spec.partition(":")[0] for spec in specs)


def page(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return docs/models.md: the verdicts, and which of the architectures have none yet."""
    counts = Counter(row["verdict"] for row in rows)
    exact, keys_alone, growing = counts["exact"], counts["keys alone"], max(len(rows) - counts["no cache"], 1)
    lines = [
        "# Models",
        "",
        f"Every causal architecture of transformers {transformers.__version__} as a tiny random model, made by "
        "`python -m tools.models_matrix`: a left-padded batch, a chunked prefill, decoding, "
        f"{len(METHODS)} methods ({_names(METHODS)}).",
        "",
        f"**Of {growing} architectures with an attention cache that grows, {exact} are exact ({exact / growing:.0%}), "
        f"and {keys_alone} more are exact for methods that read keys alone "
        f"(together {(exact + keys_alone) / growing:.0%}). "
        f"{counts['refused']} are refused with a reason, {counts['wrong']} wrong, {counts['not run']} not run.**",
        "",
        "Exact: every call of attention equals float64 attention over the kept slots to 1e-12, and full KV equals the "
        'stock cache. "Bounded layers" are those whose cache grows with the text. Models that attend by code of their '
        f"own show no queries. They run {len(QUERY_FREE)} methods that need none ({_names(QUERY_FREE)}). Their own "
        "code is repeated over the kept slots, which must give the same numbers, and over the whole text under a mask.",
        "",
        f"The share is of architectures with an attention cache that grows. {counts['no cache']} others do not count: "
        "all their layers slide or carry a state, or they keep no cache of their own. They stand at the end.",
        "",
        "| model type | bounded layers | verdict | |",
        "|---|---|---|---|",
    ]
    order = {name: number for number, name in enumerate(VERDICTS)}
    for row in sorted(rows, key=lambda row: (order[row["verdict"]], row["type"])):
        why = row["why"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{row['type']}` | {row.get('layers', '')} | {row['verdict']} | {why} |")
    left = sorted(set(names) - {row["type"] for row in rows})
    if left:
        lines += ["", f"Not examined yet ({len(left)} of {len(names)}): {', '.join(f'`{name}`' for name in left)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Examine architectures, keep every verdict at once, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types to examine again; default: all not examined yet")
    given = parser.parse_args().types
    transformers.logging.set_verbosity_error()
    done = {row["type"]: row for row in map(json.loads, STATE.read_text().splitlines())} if STATE.exists() else {}
    for model_type in given or [name for name in architectures() if name not in done]:
        row = done[model_type] = examine_apart(model_type)
        print(f"{model_type}: {row['verdict']} {row['why']}", flush=True)
        STATE.parent.mkdir(exist_ok=True)
        write_atomically(PAGE, page(list(done.values()), architectures()).encode())
        write_atomically(STATE, "".join(json.dumps(one) + "\n" for one in done.values()).encode())


if __name__ == "__main__":
    main()
