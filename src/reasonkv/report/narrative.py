"""What was run and what came out, in sentences with the numbers of the records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonkv.evaluate.results import Results
from reasonkv.report.cohorts import UNBOUNDED, Cohort, SummaryRow
from reasonkv.report.regimes import DECODE_ACTIVE
from reasonkv.report.wording import budget_sentence, estimate_text, listed

MAIN = {"replay": ("top1", "top-1 agreement", 100.0, 1), "evaluate": ("correct", "accuracy", 100.0, 1)}
"""By kind: the metric that is looked at first, its name, its scale and its digits."""


def what_ran(results: Results) -> str:
    """One paragraph: command, model, tasks, problems, seeds, methods."""
    records: Sequence[Any] = results.answers or results.records
    model = results.manifest.get("model", {})
    seeds = sorted({one.seed for one in records})
    tasks = listed(list(dict.fromkeys(one.task for one in records)))
    problems = len({(one.task, one.example) for one in records})
    methods = len({(one.method, str(one.options)) for one in records if one.budget is not None})
    budgets = sorted({one.budget["tokens"] for one in records if one.budget})
    if results.answers:
        samples = len({one.sample for one in records})
        did = f"wrote answers to {problems:,} problems ({'greedy' if samples == 1 else f'{samples} samples each'})"
    else:
        did = f"replayed {problems:,} traces that full KV had written"
    cells = f"full KV and {methods} method{'s' if methods != 1 else ''}"
    if budgets:
        cells += f" at {listed([f'{one:,}' for one in budgets] if len(budgets) < 6 else [f'{len(budgets)} budgets'])}"
        cells += " slots per KV head" if len(budgets) < 6 else f" from {budgets[0]:,} to {budgets[-1]:,} slots"
    name = model.get("name", "an unnamed model")
    return (
        f"The model {name} {did}, of {tasks}: {cells}, {len(records):,} records. "
        f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )


def rule_text(cohort: Cohort) -> str:
    """What the budget of a cohort counts, in sentences; nothing where only full KV ran."""
    if not cohort.rule:
        return "Only full KV ran."
    return budget_sentence(cohort.rule, cohort.selecting, cohort.padded, evicting=cohort.evicts)


def cohort_label(cohort: Cohort) -> str:
    """A few words for a switch: the job, and how the prompt is treated."""
    return job_words(cohort.kind, cohort.rule.get("prompt"))


def job_words(kind: str, prompt: str | None) -> str:
    """The same of a kind, `replay` or `evaluate`, and a prompt policy; None where only full KV ran."""
    words = {"count": "prompt compressible", "keep": "prompt kept", "on_top": "prompt kept on top"}
    job = "Answers" if kind == "evaluate" else "Replay"
    return f"{job}, {words[prompt]}" if prompt else job


def findings(cohort: Cohort) -> list[str]:
    """One sentence per task: full KV, random, and the best method at the smallest decode-active budget."""
    key, name, scale, digits = MAIN[cohort.kind]

    def text(row: SummaryRow) -> str:
        return estimate_text(row.estimates[key], digits, scale) + " %"

    found = []
    for task in dict.fromkeys(row.task for row in cohort.rows):
        full = next((row for row in cohort.rows if row.task == task and row.regime == UNBOUNDED), None)
        dropped = [row for row in cohort.rows if row.task == task and row.regime == DECODE_ACTIVE]
        if not dropped:
            continue
        tokens = min(row.tokens or 0 for row in dropped)
        here = [row for row in dropped if row.tokens == tokens]
        best = max(
            (row for row in here if row.method != "random"), key=lambda row: row.estimates[key].mean, default=None
        )
        random = next((row for row in here if row.method == "random"), None)
        parts = [f"{random.method} {text(random)}"] if random else []
        if best:
            count = len(here) - bool(random)
            parts.append(
                f"{best.method} {text(best)}, the highest of {count}" if count > 1 else f"{best.method} {text(best)}"
            )
        if full:
            parts.append(f"full KV {text(full)}")
        saved = here[0].estimates["saved_bytes"].mean
        found.append(f"{task}, {tokens:,} slots ({saved:.0%} of full KV's bytes saved), {name}: {'; '.join(parts)}.")
    return found
