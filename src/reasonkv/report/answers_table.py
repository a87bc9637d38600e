"""The terminal table of an evaluation: accuracy of every method at every budget, and what became of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from reasonkv.evaluate.accuracy import AccuracyRow
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.generate import Sampling
from reasonkv.evaluate.statistics import Estimate
from reasonkv.report.cohorts import Cell, rule_sentence, what_was_read
from reasonkv.report.wording import difference_text, estimate_text, seeds_sentence

_HEADINGS = (
    "budget", "n", "accuracy %", "vs full", "vs random", "cut off %", "tokens", "loops %", "differ %", "first at",
    "mean slots", "peak slots", "saved bytes %",
)  # fmt: skip
_WHOLE = {"accuracy %", "vs full", "vs random"}  # columns whose cells hold spaces


def answers_tables(rows: Sequence[AccuracyRow], answers: Sequence[AnswerRecord] = ()) -> list[Table]:
    """One table per task; full KV first, then methods in their order.

    Args:
        rows: from `summarize_answers`.
        answers: the records behind them, for what methods read that hold everything and select.
    """
    read = what_was_read(answers)
    tasks = dict.fromkeys(row.task for row in rows)
    return [_table(task, [row for row in rows if row.task == task], read) for task in tasks]


def _table(task: str, rows: Sequence[AccuracyRow], read: Mapping[Cell, dict[str, Estimate]]) -> Table:
    selects = any(cell[0] == task for cell in read)
    table = Table(
        title=task,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for heading in (*_HEADINGS, *(("slots read",) if selects else ())):
        whole_words = max(map(len, heading.split()))
        table.add_column(heading, justify="right", no_wrap=heading in _WHOLE, min_width=whole_words)
    previous = None
    for row in sorted(rows, key=lambda row: row.budget is not None):
        if previous is not None and row.method != previous:
            table.add_section()
        e = row.estimates
        chosen = read.get((row.task, row.method, row.tokens))
        table.add_row(
            row.method if row.method != previous else "",
            "-" if row.tokens is None else f"{row.tokens:,}",
            str(row.n) if row.answers == row.n else f"{row.n} ({row.answers})",
            estimate_text(e["correct"], 1, 100),
            difference_text(row.versus_full, 0, 100),
            difference_text(row.versus_random, 0, 100),
            f"{e['truncated'].mean * 100:.0f}",
            f"{e['output_tokens'].mean:,.0f}",
            f"{e['repetition'].mean * 100:.0f}",
            f"{e['diverged'].mean * 100:.0f}",
            "-" if row.median_divergence is None else f"{row.median_divergence:,.0f}",
            f"{e['physical_mean'].mean:,.0f}",
            f"{e['physical_peak'].mean:,.0f}",
            f"{e['saved_bytes'].mean * 100:.1f}",
            *([f"{chosen['slots_read_mean'].mean:,.0f}" if chosen else "all"] if selects else []),
        )
        previous = row.method
    return table


def answers_caption(answers: Sequence[AnswerRecord], sampling: Sampling | None = None) -> str:
    """What the numbers are, in sentences: errors, what the budget counts, problems, samples, seeds.

    Args:
        answers: the records behind the table.
        sampling: how answers were sampled, None for greedy.
    """
    problems = {(one.task, one.example) for one in answers}
    samples = 1 + max(one.sample for one in answers)
    tasks = list(dict.fromkeys(one.task for one in answers))
    counts = "; ".join(f"{task} {sum(1 for name, _ in problems if name == task)}" for task in tasks)
    how = "greedy"
    if sampling is not None:
        many = f"{samples} samples each" if samples > 1 else "one sample each"
        how = f"{many} at temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    sentences = [
        f"n: problems ({counts}), {how}. ± is one standard error, clustered by problem. vs: paired difference of "
        f"accuracy on the same problems in points, to full KV and to random at the same budget, with its 95 % "
        f"bootstrap interval. cut off: stopped at the token limit. loops: share of tokens in an n-gram that stands "
        f"three times or more in a row. differ: outputs that are not full KV's; first at: the median token at which "
        f"they leave it."
    ]
    if any(one.budget for one in answers):
        sentences.append(rule_sentence(answers))
    sentences.append(seeds_sentence({one.seed for one in answers}))
    return " ".join(sentences)
