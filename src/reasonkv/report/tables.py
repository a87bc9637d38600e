"""The terminal table of a replay: every method at every budget, with standard errors, and what the budget counts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from reasonkv.evaluate.records import Record
from reasonkv.evaluate.summary import Row
from reasonkv.report.cohorts import rule_sentence, selecting_labels
from reasonkv.report.measures import DIAGNOSTICS
from reasonkv.report.wording import PROMPT_WORDS, estimate_text, listed, seeds_sentence


def replay_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per task; full KV first, then methods in their order.

    Args:
        rows: from `summarize`.
    """
    return [_table(task, [row for row in rows if row.task == task]) for task in dict.fromkeys(r.task for r in rows)]


def _frame(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _table(task: str, rows: Sequence[Row]) -> Table:
    table = _frame(task)
    table.add_column("method", no_wrap=True)
    selects = any("slots_read_mean" in row.estimates for row in rows)
    headings = ("budget", "n", "top-1 %", "NLL", "KL", "mean slots", "peak slots", "saved bytes %", "s/trace")
    for heading in (*headings, *(("slots read",) if selects else ())):
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
            estimate_text(e["top1"], 1, 100),
            estimate_text(e["nll"], 3),
            estimate_text(e["kl"], 3),
            estimate_text(e["physical_mean"], 0),
            estimate_text(e["physical_peak"], 0),
            estimate_text(e["saved_bytes"], 1, 100),
            f"{e['seconds'].mean:.2f}",  # a batch's time divided by its rows: it has no spread of its own
            *([estimate_text(e["slots_read_mean"], 0) if "slots_read_mean" in e else "all"] if selects else []),
        )
        previous = row.method
    return table


def diagnostic_tables(rows: Sequence[Row]) -> list[Table]:
    """What was lost, one table per task; none where no diagnostics were asked for.

    Args:
        rows: from `summarize`.
    """
    tables = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task and any(one.key in row.estimates for one in DIAGNOSTICS)]
        shown = [metric for metric in DIAGNOSTICS if any(metric.key in row.estimates for row in own)]
        if not own:
            continue
        table = _frame(f"{task}: what was lost")
        table.add_column("method", no_wrap=True)
        table.add_column("budget", justify="right")
        for metric in shown:
            table.add_column(metric.label, justify="right")
        for row in own:
            cells = [
                estimate_text(row.estimates[metric.key], metric.digits, metric.scale)
                if metric.key in row.estimates
                else "-"
                for metric in shown
            ]
            table.add_row(row.method, f"{row.tokens:,}", *cells)
        tables.append(table)
    return tables


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
    sentences = [f"± is one standard error over traces. Full KV's traces, prompt + output: {'; '.join(lengths)}."]
    if budgets:
        sentences.append(f"{rule_sentence(records)} s/trace is replay's time, not decoding's.")
    sentences.append(seeds_sentence({record.seed for record in records}))
    return " ".join(sentences)


def figure_note(records: Sequence[Record]) -> str:
    """One line for under a figure: what the band is, and how the prompt was treated."""
    policies = dict.fromkeys(record.budget["prompt"] for record in records if record.budget)
    words = "; ".join(PROMPT_WORDS[policy] for policy in policies)
    selecting = selecting_labels(records)
    if selecting and "on_top" in policies:
        words += f"; not drawn, as their budget is what is read in all: {listed(selecting)}"
    return f"Band: one standard error over traces. {words[:1].upper()}{words[1:]}."
