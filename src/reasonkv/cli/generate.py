"""`reasonkv generate`: text from a bounded cache, whether it is right, and what the cache held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from reasonkv.cli.config import STANDARD_INPUT, read_text
from reasonkv.cli.console import note, print_json
from reasonkv.cli.flags import GROUPS, ConfigFile, Json, ModelFlags, Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import MOST_ANSWERS, BudgetOptions, Sampling
from reasonkv.numbers import TOO_MANY
from reasonkv.tasks.options import TaskOptions

if TYPE_CHECKING:
    from reasonkv.evaluate.cells import RunConfig
    from reasonkv.evaluate.decoding import TextRules
    from reasonkv.models import LoadedModel

MOST = {"--limit": MOST_ANSWERS, "--max-new-tokens": TOO_MANY}
WRITING = Parameter(group=GROUPS["Sampling"])


@command
def generate(
    text: str | None = None,
    /,
    *,
    prompt: str | None = None,
    task: str | None = None,
    limit: int = 1,
    method: str = "full",
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
        method: Method, with options: rkv:KEY=VALUE.
        max_new_tokens: Most tokens to generate.
        chat: Put the prompt into the model's chat template; unless given, where the tokenizer has one.
        seed: Seed of problems, sampling and methods.
    """
    from reasonkv.evaluate.cells import make_config
    from reasonkv.evaluate.decoding import TextRules
    from reasonkv.evaluate.generate import render
    from reasonkv.evaluate.published import fill
    from reasonkv.tasks import get_task

    for name, value in (("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if not 1 <= value < MOST[name]:
            raise UsageError(
                f"{name} must be at least 1, not {value}." if value < 1 else f"{name} must be below {MOST[name]:,}."
            )
    words = text if prompt is None else prompt
    if (words is None) == (task is None) or (text is not None and prompt is not None):
        raise UsageError("Give either a prompt or --task NAME, as in: reasonkv generate 'What is 6 times 7?'.")
    if words == STANDARD_INPUT:
        words = read_text(words)
    if words is not None and not words.strip():
        raise UsageError("The prompt is empty; give it at least one word.")
    cell = make_config(method, budget)
    options = replace(options, chat="auto" if chat is None else "on" if chat else "off")
    family = None if task is None else get_task(task, options)
    problems: Sequence[Any] = [None] if family is None else [family.problem(i, seed=seed) for i in range(limit)]
    loaded = model.load()
    sampling = fill(sampling, loaded, () if task is None else (task,), options.thinking)
    sampling = sampling.stopping(() if family is None else family.stop)
    rules = TextRules(loaded.tokenizer, sampling, options.think_end)
    rows = []
    for problem in problems:
        asked = str(words) if problem is None else problem.prompt
        own = options if family is None else family.prompt_options(options)
        rendered = render(loaded.tokenizer, asked, own, from_data=family is None or family.chat)
        row = _answer(loaded, rendered, cell, rules, max_new_tokens, seed, getattr(problem, "example", 0))
        row["correct"] = None if family is None else family.check(problem, row["output"])
        row["example"] = getattr(problem, "example", None)
        rows.append(row)
        if not json:
            _print(row)
    if json:
        print_json({"model": loaded.name, "method": cell.method.spec(), "rows": rows})
    elif family:
        print(f"{sum(bool(row['correct']) for row in rows)} of {len(rows)} right.")


def _answer(
    loaded: LoadedModel,
    prompt: tuple[str, bool],
    cell: RunConfig,
    rules: TextRules,
    max_new_tokens: int,
    seed: int,
    row_seed: int,
) -> dict[str, Any]:
    """Generate one answer; the text and what the cache held."""
    from reasonkv.evaluate.decoding import Request, decode_batch
    from reasonkv.evaluate.generate import decode, encode, room
    from reasonkv.models import one_thread_if_small
    from reasonkv.resolve import context_length
    from reasonkv.runtimes.transformers import CompressedCache

    text, special = prompt
    ids, context = encode(loaded.tokenizer, text, special=special), context_length(loaded.model)
    if len(ids) == 0 or (context is not None and len(ids) >= context):
        raise UsageError(f"The prompt has {len(ids)} tokens; {loaded.name} takes 1 to {(context or 0) - 1}.")
    most = room(loaded.model, len(ids), max_new_tokens)
    with (
        one_thread_if_small(loaded.model),
        CompressedCache(
            loaded.model,
            cell.method.for_tokenizer(loaded.tokenizer),
            cell.budget,
            prompt_lengths=[len(ids)],
            seed=seed,
            row_seeds=[row_seed],
            max_length=len(ids) + most,
            calibration=loaded.calibration_file,
            dtype=loaded.kv_dtype,
        ) as cache,
    ):
        request = Request(ids, most, row_seed)
        (answer,) = decode_batch(loaded.model, cache, [request], sampling=rules.sampling, seed=seed, rules=rules)
    stats = answer.stats
    return {
        "prompt": text,
        "output": decode(loaded.tokenizer, answer.tokens, rules.sampling.stop),
        "truncated": answer.truncated,
        "output_tokens": len(answer.tokens),
        **{name: getattr(stats, name) for name in stats.__dataclass_fields__},
    }


def _print(row: dict[str, Any]) -> None:
    verdict = {None: "", True: "right answer; ", False: "wrong answer; "}[row["correct"]]
    print(row["output"])
    note(
        f"[{verdict}{row['length']:,} tokens seen, {row['physical_terminal']:,.0f} slots kept "
        f"(mean {row['physical_mean']:,.0f}, peak {row['physical_peak']:,.0f}), {row['events']} compactions; "
        f"{row['bytes_in_use'] / 2**20:.2f} MiB in use, full KV {row['bytes_full'] / 2**20:.2f} MiB"
        + ("; stopped at the token limit]" if row["truncated"] else "]")
    )
