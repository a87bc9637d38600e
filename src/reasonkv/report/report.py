"""The report: one HTML file that says what ran, what came out, and how to run it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from reasonkv.evaluate.frontier import regime
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.results import Results, load_results
from reasonkv.files import write_atomically
from reasonkv.report.cohorts import UNBOUNDED, Cohort, cohorts
from reasonkv.report.columns import definitions, record_table, summary_table
from reasonkv.report.environment import environment_section
from reasonkv.report.glance import glance
from reasonkv.report.html import INSPECTOR_SCRIPTS, INSPECTOR_STYLES, page
from reasonkv.report.marks import marks
from reasonkv.report.narrative import MAIN, cohort_label, findings, job_words, rule_text, what_ran
from reasonkv.report.regimes import MEANING, SELECTING
from reasonkv.report.usable import usable_intro, usable_section

TITLE = "What the cache kept, and what that did"
INSPECTIONS = "inspections"
"""The folder inside a results folder where `reasonkv inspect` leaves its traces."""


def write_report(folders: Sequence[Path], path: Path, *, title: str = TITLE) -> Path:
    """Write the report of one or more results folders.

    Args:
        folders: made by `reasonkv replay`, `evaluate` or `demo`.
        path: HTML file to write, whole or not at all.
        title: heading of the page.

    Returns:
        `path`.

    Raises:
        ResultsError: a folder holds no results, is named twice, or an inspection in it is damaged.
        RecordError: a record is damaged.
        OSError: the file cannot be written.
    """
    if len({Path(one).resolve() for one in folders}) < len(folders):
        raise ResultsError("A results folder is named twice; name each once.")
    text = report_html([load_results(Path(one)) for one in folders], title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def report_html(results: Sequence[Results], *, title: str = TITLE) -> str:
    """The report as one HTML document.

    Args:
        results: of at least one folder.
        title: heading of the page, plain text.

    Raises:
        ResultsError: an inspection is damaged.
    """
    groups = cohorts(results)
    summaries = [summary_table(one.rows, one.kind) for one in groups]
    records = [record_table(one.answers or one.records) for one in results]
    inspections = _inspections(results)
    data: dict[str, Any] = {
        "report": {
            "cohorts": [_cohort_data(one, table, groups) for one, table in zip(groups, summaries, strict=True)],
            "folders": [_folder_name(one, results) for one in results],
            "inspections": [{"id": f"inspection-{at}", "name": name} for at, (name, _) in enumerate(inspections)],
        }
    }
    # each in an element of its own, so that the page parses only what somebody looks at
    data |= {f"records-{at}": table for at, table in enumerate(records)}
    data |= {f"inspection-{at}": one for at, (_, one) in enumerate(inspections)}
    sections = [
        ("overview", "At a glance", _overview(results, groups)),
        ("frontier", "Frontier", _frontier(groups)),
        ("usable", "Usable budgets and crossings", _usable(groups)),
        (
            "tables",
            "Summary table",
            _mount(
                "summary",
                "Every cell: means with standard errors, and paired differences to full KV and to random "
                "at the same budget. Sort by any heading.",
            ),
        ),
        ("regimes", "Regimes", _regimes(results)),
        (
            "inspector",
            "Trace inspector",
            _mount("inspector", "One trace, token by token: what was kept, what was dropped, and when.")
            if inspections
            else "",
        ),
        ("records", "Records", _mount("records", "Every record that the means are made of.")),
        (
            "reproduce",
            "Environment and command",
            environment_section([(_folder_name(one, results), one.manifest) for one in results]),
        ),
        ("definitions", "Definitions", _definitions([*summaries, *records])),
    ]
    shown = [(name, heading, body) for name, heading, body in sections if body]
    contents = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in shown)
    body = (
        '<a class="skip" href="#overview">Skip to the results</a><div class="page report">'
        f'<header class="topbar"><p class="kicker">reasonkv report</p>'
        f'<button type="button" data-theme-toggle></button></header>'
        f'<h1>{escape(title)}</h1><div class="layout"><nav class="contents" aria-label="Contents"><ol>{contents}</ol>'
        "</nav><main>"
        + "".join(
            f'<section id="{name}" aria-labelledby="{name}-heading"><h2 id="{name}-heading">{heading}</h2>'
            f"{part}</section>"
            for name, heading, part in shown
        )
        + '<noscript><p class="card">Figures and tables are drawn by this file\'s own script, which is switched off '
        "here.</p></noscript></main></div></div>"
    )
    styles, scripts = ["report.css"], ["report_table.js", "report_chart.js", "report.js"]
    if inspections:
        styles, scripts = [*styles, *INSPECTOR_STYLES], [*INSPECTOR_SCRIPTS, *scripts]
    return page(title, body, styles=styles, scripts=scripts, data=data)


def _cohort_data(cohort: Cohort, table: dict[str, Any], groups: Sequence[Cohort]) -> dict[str, Any]:
    methods = list(dict.fromkeys(row.method for row in cohort.rows if row.tokens is not None))
    baseline = None
    if not cohort.keeps_prompt and cohort.rule:  # then the random of another folder is the one to beat
        other = next((one for one in groups if one.keeps_prompt and one.same_problems(cohort)), None)
        rows = [row for row in other.rows if row.method == "random"] if other else []
        if other and rows:
            baseline = {
                "table": summary_table(rows, other.kind),
                "label": "random, prompt kept",
                "counted": other.rule["prompt"] == "keep",
            }
    return {
        "label": _cohort_name(cohort, groups),
        "kind": cohort.kind,
        "table": table,
        "main": MAIN[cohort.kind][0],
        "methods": marks(methods),
        "fixed": "random" if cohort.keeps_prompt else None,
        "baseline": baseline,
        "full": UNBOUNDED,
    }


def _cohort_name(cohort: Cohort, groups: Sequence[Cohort]) -> str:
    name = cohort_label(cohort)
    alike = [one for one in groups if cohort_label(one) == name]
    return name if len(alike) == 1 else f"{name} ({cohort.results.folder.resolve().name})"


def _folder_name(one: Results, results: Sequence[Results]) -> str:
    name = one.folder.resolve().name
    alike = sum(other.folder.resolve().name == name for other in results)
    return str(one.folder) if alike > 1 else name


def _overview(results: Sequence[Results], groups: Sequence[Cohort]) -> str:
    parts = [f'<p class="lead">{escape(what_ran(one))}</p>' for one in results]
    rules = {rule_text(one) for one in groups}
    if len(rules) == 1:
        parts.append(f"<p>{escape(rules.pop())}</p>")
    for cohort in _answers_first(groups):
        parts.append(f"<h3>{escape(_cohort_name(cohort, groups))}</h3>")
        parts += [f"<p>{escape(rule_text(cohort))}</p>"] if rules else []
        parts.append(glance(cohort))
        lines = findings(cohort)
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f"<details><summary>In words, at the smallest budget</summary><ul>{items}</ul></details>")
    return "".join(parts)


def _frontier(groups: Sequence[Cohort]) -> str:
    if not any(one.rule for one in groups):
        return ""
    return _mount(
        "charts",
        "Band: one standard error over problems. Dashed grey: full KV. Point at a mark, or move between marks with the "
        "arrow keys, to read its numbers; press a name to hide or show a method.",
    )


def _usable(groups: Sequence[Cohort]) -> str:
    parts = []
    for cohort in _answers_first(groups):
        found = usable_section(cohort)
        if found:
            parts.append(f"<h3>{escape(_cohort_name(cohort, groups))}</h3>{found}")
    return usable_intro() + "".join(parts) if parts else ""


def _answers_first(groups: Sequence[Cohort]) -> list[Cohort]:
    """Answers are the point; what stands for them comes after."""
    return sorted(groups, key=lambda one: one.kind != "evaluate")


def _mount(name: str, words: str) -> str:
    return f'<p class="muted">{escape(words)}</p><div data-mount="{name}"></div>'


def _regimes(results: Sequence[Results]) -> str:
    counts: Counter[tuple[str, str, int, str]] = Counter()
    guards: Counter[str] = Counter()
    for one in results:
        for record in one.answers or one.records:
            guards.update(record.guards)
            if record.budget is not None:
                job = job_words("evaluate" if one.answers else "replay", record.budget["prompt"])
                counts[job, record.task, record.budget["tokens"], regime(record)] += 1
    if not counts:
        return ""
    found = {key[3] for key in counts}
    names = [name for name in MEANING if name != SELECTING or name in found]
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in names)
    # budgets that did the same are one row: what differs is what has to be seen
    alike: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for job, task, tokens in dict.fromkeys(key[:3] for key in counts):
        met = tuple(name for name in names if counts[job, task, tokens, name])
        alike.setdefault((job, task, met), []).append(tokens)
    rows = []
    for (job, task, _), sizes in alike.items():
        sums = [sum(counts[job, task, tokens, name] for tokens in sizes) for name in names]
        cells = "".join(f'<td class="number">{f"{count:,}" if count else "–"}</td>' for count in sums)
        budgets = ", ".join(f"{tokens:,}" for tokens in sorted(sizes))
        rows.append(
            f'<tr><td class="name">{escape(job)}</td><th scope="row">{escape(task)}</th>'
            f'<td class="name">{budgets}</td>{cells}</tr>'
        )
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(MEANING[name])}</dd>" for name in names)
    fell_back = (
        f"<p>Guards: {escape(', '.join(f'{name} {count:,}' for name, count in guards.items()))}.</p>" if guards else ""
    )
    return (
        '<p class="muted">Equal budgets do not mean equal pressure. Records are kept apart by what the budget did, in '
        f'every figure and table here.</p><dl class="words">{meanings}</dl>{fell_back}'
        '<div class="table-frame" tabindex="0" role="region" aria-label="Records by regime"><table><thead><tr>'
        '<th scope="col">job</th><th scope="col">task</th><th scope="col">budgets</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _definitions(tables: Sequence[dict[str, Any]]) -> str:
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in definitions(tables)
    )
    return f'<p class="muted">± is one standard error everywhere.</p><dl class="definitions">{items}</dl>'


def _inspections(results: Sequence[Results]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for one in results:
        for path in sorted((one.folder / INSPECTIONS).glob("*.json")):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                data = None
            if not isinstance(data, dict):
                raise ResultsError(f"{path} cannot be read as an inspection; make it anew with `reasonkv inspect`.")
            name = path.stem if len(results) == 1 else f"{_folder_name(one, results)}: {path.stem}"
            found.append((name, data))
    return found
