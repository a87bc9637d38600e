"""`reasonkv generate`: text from a bounded cache, whether it is right, and what the cache held."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.budgets import make_budget, make_window
from reasonkv.cli.common import UsageError, expected_errors


@expected_errors
def generate(
    prompt: Annotated[str | None, typer.Option(help="One prompt; or give --task.")] = None,
    task: Annotated[str | None, typer.Option(help="A task's problems instead, with dials: program:lines=40.")] = None,
    limit: Annotated[int, typer.Option(help="Problems of the task.")] = 1,
    model: common.Model = "testbed",
    method: Annotated[str, typer.Option(help="Method, with options: rkv:KEY=VALUE.")] = "full",
    budget: Annotated[int | None, typer.Option(help="Slots per KV head and layer after a compaction.")] = None,
    window: common.WindowSize = None,
    window_buffer: common.WindowBuffer = 64,
    retention: common.Retention = "0.3",
    seed: common.Seed = 0,
    interval: common.Interval = 128,
    sinks: common.Sinks = 4,
    recent: common.Recent = 64,
    prompt_policy: common.PromptPolicy = "count",
    trigger: common.Trigger = "occupancy",
    trigger_counts: common.TriggerCounts = "all",
    cut_prompt: common.CutPrompt = "prefill",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 2048,
    temperature: common.Temperature = 0.0,
    top_p: common.TopP = 0.95,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    calibration: common.CalibrationFile = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Generate through a bounded cache and show what it held.

    Example: [b]reasonkv generate --method snapkv --budget 256 --prompt-policy on_top --task program --limit 2[/b]
    """
    from reasonkv.methods import get_method
    from reasonkv.tasks import get_task

    common.check_limit(limit)
    if (prompt is None) == (task is None):
        raise UsageError("Give either --prompt TEXT or --task NAME.")
    if prompt is not None and not prompt.strip():
        raise UsageError("The prompt is empty; give it at least one word.")
    chosen = get_method(method)
    if budget is not None and window is not None:
        raise UsageError("Give either --budget or --window.")
    if chosen.bounded == (budget is None and window is None):
        raise UsageError(
            f"{chosen.name} needs a budget; give --budget TOKENS (or --window SIZE)."
            if chosen.bounded
            else "full takes no budget; leave --budget out, or choose another --method."
        )
    limits = None if window is None else make_window(window, window_buffer, retention)
    if budget is not None:
        limits = make_budget(
            budget, interval=interval, sinks=sinks, recent=recent, prompt=prompt_policy, trigger=trigger,
            trigger_counts=trigger_counts, cut_prompt=cut_prompt,
        )  # fmt: skip
    if limits is not None:
        limits.check_protected(recent=chosen.needs.recent)
    family = get_task(task) if task is not None else None
    problems: list[Any] = [family.problem(i, seed=seed) for i in range(limit)] if family else [None]

    loaded = common.open_model(model, dtype, device, calibration)
    from reasonkv.evaluate.generate import Sampling, context_length, encode, generate_rows
    from reasonkv.models import one_thread_if_small
    from reasonkv.runtimes.transformers import CompressedCache

    rows = []
    for number, problem in enumerate(problems):
        text = problem.prompt if problem is not None else str(prompt)
        if chat:
            text = _templated(loaded.tokenizer, text)
        ids = encode(loaded.tokenizer, text)
        context = context_length(loaded.model)
        if len(ids) == 0 or (context is not None and len(ids) >= context):
            raise UsageError(f"The prompt has {len(ids)} tokens; {loaded.name} takes 1 to {(context or 0) - 1}.")
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        sampling = Sampling(temperature, top_p) if temperature > 0 else None
        with (
            one_thread_if_small(loaded.model),
            CompressedCache(
                loaded.model,
                loaded.method_for(chosen),
                limits,
                prompt_lengths=[len(ids)],
                seed=seed,
                max_length=len(ids) + room,
                calibration=loaded.calibration_for(chosen),
            ) as cache,
        ):
            (output,) = generate_rows(
                loaded.model, [ids], room, sampling=sampling, seed=seed, row_seeds=[number], cache=cache
            )
            stats = cache.stats().rows[0]
        text_out = str(loaded.tokenizer.decode(output, skip_special_tokens=True))
        row = {
            "example": problem.example if problem is not None else None,
            "prompt": text,
            "output": text_out,
            "correct": family.check(problem, text_out) if family else None,
            "truncated": len(output) == room,
            "output_tokens": len(output),
            **{name: getattr(stats, name) for name in stats.__dataclass_fields__},
        }
        rows.append(row)
        if not json:
            _print(row)
    if json:
        common.print_json({"model": loaded.name, "method": chosen.spec(), "rows": rows})
    elif family:
        right = sum(bool(row["correct"]) for row in rows)
        typer.echo(f"{right} of {len(rows)} right.")


def _templated(tokenizer: Any, text: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("This model's tokenizer has no chat template; leave --chat out.")
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _print(row: dict[str, Any]) -> None:
    verdict = {None: "", True: "right answer; ", False: "wrong answer; "}[row["correct"]]
    typer.echo(row["output"])
    common.note(
        f"[{verdict}{row['length']:,} tokens seen, {row['physical_terminal']:,.0f} slots held "
        f"(mean {row['physical_mean']:,.0f}, peak {row['physical_peak']:,.0f}), {row['events']} compactions, "
        f"{row['bytes_held'] / 2**20:.2f} MiB held of {row['bytes_full'] / 2**20:.2f} MiB"
        + ("; stopped at the token limit]" if row["truncated"] else "]")
    )
