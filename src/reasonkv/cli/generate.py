"""`reasonkv generate`: text from a bounded cache, whether it is right, and what the cache held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from cyclopts import Parameter

from reasonkv.cli.config import STANDARD_INPUT, read_text
from reasonkv.cli.console import note, print_json
from reasonkv.cli.flags import GROUPS, ConfigFile, Json, ModelFlags, Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import MOST_ANSWERS, BudgetOptions, Sampling
from reasonkv.numbers import TOO_MANY
from reasonkv.tasks.options import TaskOptions

WRITING = Parameter(group=GROUPS["Sampling"])


@command
def generate(
    text: str | None = None,
    /,
    *,
    prompt: str | None = None,
    task: str | None = None,
    limit: int = 1,
    method: str | None = None,
    budget: Annotated[BudgetOptions, Without(("mean_slots",))],
    sampling: Sampling,
    max_new_tokens: Annotated[int, WRITING] = 2048,
    chat: Annotated[bool | None, Parameter(group=GROUPS["Sampling"], negative="--no-chat")] = None,
    options: Annotated[TaskOptions, Without(("prompt", "chat"))],
    seed: Annotated[int, WRITING] = 0,
    model: ModelFlags,
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Generate through a bounded cache, and show what it held.

    Example: `reasonkv generate "How many primes are below 100?" --model Qwen/Qwen3-8B --method rkv --budget 512`

    Args:
        text: The prompt; - reads it from standard input.
        prompt: The prompt, as an option.
        task: Problems of this task instead, with dials: program:lines=40; the answers are checked.
        limit: Problems of the task.
        method: Method, with options: rkv:KEY=VALUE. Unless given, full KV without a budget; with one, forecast where it
            was fitted to the model, else expected.
        max_new_tokens: Most tokens to generate.
        chat: Put the prompt into the model's chat template; unless given, where the tokenizer has one.
        seed: Seed of problems, sampling and methods.
    """
    from reasonkv.calibration import default_method
    from reasonkv.evaluate.cells import make_budgets, make_config
    from reasonkv.evaluate.decoding import Request, TextRules, decode_batch
    from reasonkv.evaluate.generate import decode, encode, render, room
    from reasonkv.evaluate.published import fill
    from reasonkv.models import one_thread_if_small
    from reasonkv.resolve import context_length
    from reasonkv.runtimes.transformers import CompressedCache
    from reasonkv.tasks import get_task

    for name, value, most in (("--limit", limit, MOST_ANSWERS), ("--max-new-tokens", max_new_tokens, TOO_MANY)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
        if value >= most:
            raise UsageError(f"{name} must be below {most:,}.")
    words = text if prompt is None else prompt
    if (words is None) == (task is None) or (text is not None and prompt is not None):
        raise UsageError("Give either a prompt or --task NAME, as in: reasonkv generate 'What is 6 times 7?'.")
    if words == STANDARD_INPUT:
        words = read_text(words)
    if words is not None and not words.strip():
        raise UsageError("The prompt is empty; give it at least one word.")
    cell = make_config(method or ("expected" if make_budgets(budget) else "full"), budget)
    options = replace(options, chat="auto" if chat is None else "on" if chat else "off")
    family = None if task is None else get_task(task, options)
    problems: Sequence[Any] = [None] if family is None else [family.problem(i, seed=seed) for i in range(limit)]
    loaded = model.load()
    lm, tokenizer, context = loaded.model, loaded.tokenizer, context_length(loaded.model)
    if method is None and cell.budget is not None:
        cell = replace(cell, method=default_method(lm, loaded.calibration_file))
        note(f"Method {cell.method.name}, since none is given.")
    sampling = fill(sampling, loaded, () if task is None else (task,), options.thinking)
    sampling = sampling.stopping(() if family is None else family.stop)
    rules, rows = TextRules(tokenizer, sampling, options.think_end), []
    for example, problem in enumerate(problems):
        asked = str(words) if problem is None else problem.prompt
        own = options if family is None else family.prompt_options(options)
        rendered, special = render(tokenizer, asked, own, from_data=family is None or family.chat)
        ids = encode(tokenizer, rendered, special=special)
        if len(ids) == 0 or (context is not None and len(ids) >= context):
            raise UsageError(f"The prompt has {len(ids)} tokens; {loaded.name} takes 1 to {(context or 0) - 1}.")
        request = Request(ids, room(lm, len(ids), max_new_tokens), example)
        cache = CompressedCache(
            lm, cell.method.for_tokenizer(tokenizer), cell.budget, prompt_lengths=[len(ids)], seed=seed,
            row_seeds=[example], max_length=len(ids) + request.limit, calibration=loaded.calibration_file,
            dtype=loaded.kv_dtype,
        )  # fmt: skip
        with one_thread_if_small(lm), cache:
            (answer,) = decode_batch(lm, cache, [request], sampling=sampling, seed=seed, rules=rules)
        output, stats = decode(tokenizer, answer.tokens, sampling.stop), answer.stats
        row = {"prompt": rendered, "output": output, "truncated": answer.truncated, "output_tokens": len(answer.tokens)}
        row |= {name: getattr(stats, name) for name in stats.__dataclass_fields__}
        row["correct"] = None if family is None else family.check(problem, output)
        row["example"] = None if family is None else example
        rows.append(row)
        if not json:
            _print(row)
    if json:
        print_json({"model": loaded.name, "method": cell.method.spec(), "rows": rows})
    elif family:
        print(f"{sum(bool(row['correct']) for row in rows)} of {len(rows)} right.")


def _print(row: dict[str, Any]) -> None:
    verdict = {None: "", True: "right answer; ", False: "wrong answer; "}[row["correct"]]
    print(row["output"])
    note(
        f"[{verdict}{row['length']:,} tokens seen, {row['physical_terminal']:,.0f} slots kept "
        f"(mean {row['physical_mean']:,.0f}, peak {row['physical_peak']:,.0f}), {row['events']} compactions; "
        f"{row['bytes_in_use'] / 2**20:.2f} MiB in use, full KV {row['bytes_full'] / 2**20:.2f} MiB"
        + ("; stopped at the token limit]" if row["truncated"] else "]")
    )
