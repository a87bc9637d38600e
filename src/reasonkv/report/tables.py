"""The terminal table of a replay: every method at every budget, with standard errors, and what the budget counts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from reasonkv.evaluate.records import Record
from reasonkv.evaluate.summary import Estimate, Row

_PROMPT_WORDS = {
    "count": "the prompt counts inside the budget and may be dropped",
    "keep": "the prompt counts inside the budget and is never dropped",
    "on_top": "the prompt is held on top of the budget and never dropped",
}


def replay_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per task; full KV first, then methods in their order.

    Args:
        rows: from `summarize`.
    """
    return [_table(task, [row for row in rows if row.task == task]) for task in dict.fromkeys(r.task for r in rows)]


def _table(task: str, rows: Sequence[Row]) -> Table:
    table = Table(
        title=task,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for heading in ("budget", "n", "top-1 %", "NLL", "KL", "mean slots", "peak slots", "saved bytes %", "s/trace"):
        table.add_column(heading, justify="right")
    previous = None
    for row in sorted(rows, key=lambda row: row.tokens is not None):
        if previous is not None and row.method != previous:
            table.add_section()
        e = row.estimates
        table.add_row(
            row.method if row.method != previous else "",
            "-" if row.tokens is None else f"{row.tokens:,}",
            str(row.n),
            _cell(e["top1"], 1, 100),
            _cell(e["nll"], 3),
            _cell(e["kl"], 3),
            _cell(e["physical_mean"], 0),
            _cell(e["physical_peak"], 0),
            _cell(e["saved_bytes"], 1, 100),
            f"{e['seconds'].mean:.2f}",  # a batch's time divided by its rows: it has no spread of its own
        )
        previous = row.method
    return table


def _cell(one: Estimate, digits: int, scale: float = 1) -> str:
    mean = f"{one.mean * scale:,.{digits}f}"
    mean = mean.removeprefix("-") if float(mean.replace(",", "")) == 0 else mean
    return mean if one.se is None else f"{mean} ±{one.se * scale:,.{digits}f}"


def caption(records: Sequence[Record]) -> str:
    """What the numbers are, in sentences: what the budget counts, prompt policy, seeds, traces."""
    budgets = [record.budget for record in records if record.budget]
    tasks = dict.fromkeys(record.task for record in records)
    lengths = []
    for task in tasks:
        own = {record.example: record for record in records if record.task == task}.values()
        prompt = sum(record.prompt_tokens for record in own) / len(own)
        output = sum(record.output_tokens for record in own) / len(own)
        right = sum(record.trace_correct for record in own)
        lengths.append(f"{task} {prompt:,.0f} + {output:,.0f} tokens, {right} of {len(own)} traces answer right")
    seeds = sorted({record.seed for record in records})
    sentences = [f"± is one standard error over traces. Full KV's traces, prompt + output: {'; '.join(lengths)}."]
    if budgets:
        one = budgets[0]
        rule = "every" if one["trigger"] == "occupancy" else "on the grid of"
        sentences.append(
            f"Budget: slots per KV head and layer that stay after a compaction ({rule} {one['interval']} tokens), "
            f"{one['sinks']} sinks and the {one['recent']} newest among them; {_PROMPT_WORDS[one['prompt']]}. "
            f"Slots are what attention reads, everything held included. s/trace is replay's time, not decoding's."
        )
    sentences.append(f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.")
    return " ".join(sentences)


def figure_note(records: Sequence[Record]) -> str:
    """One line for under a figure: what the band is, and how the prompt was treated."""
    policies = dict.fromkeys(record.budget["prompt"] for record in records if record.budget)
    words = "; ".join(_PROMPT_WORDS[policy] for policy in policies)
    return f"Band: one standard error over traces. {words[:1].upper()}{words[1:]}."
