"""The first table of the report: methods down, tasks across, one tab per budget, a bar in every cell."""

from __future__ import annotations

from html import escape

from reasonkv.report.cohorts import UNBOUNDED, Cohort, SummaryRow
from reasonkv.report.narrative import MAIN
from reasonkv.report.regimes import DECODE_ACTIVE, SELECTING
from reasonkv.report.wording import estimate_text


def glance(cohort: Cohort) -> str:
    """The main metric of every method on every task, one table per budget; HTML.

    Of methods that drop slots decode-active records only, and below them those that hold everything and select.
    Budgets that were solved for a mean differ by task, so tables go by rank: each task's smallest budget first.
    """
    tasks = list(dict.fromkeys(row.task for row in cohort.rows))
    full = {row.task: row for row in cohort.rows if row.regime == UNBOUNDED}
    active = [row for row in cohort.rows if row.regime in {DECODE_ACTIVE, SELECTING}]
    active.sort(key=lambda row: row.regime == SELECTING)
    budgets = {task: sorted({row.tokens or 0 for row in active if row.task == task}) for task in tasks}
    deepest = max(map(len, budgets.values()), default=0)
    name = MAIN[cohort.kind][1]
    tables = []
    for rank in range(max(1, deepest)):
        tokens = {task: own[rank] for task, own in budgets.items() if rank < len(own)}
        here = {(row.method, row.task): row for row in active if tokens.get(row.task) == row.tokens}
        methods = list(dict.fromkeys(method for method, _ in here))
        sizes = sorted(set(tokens.values()))
        title = (
            " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]])) + " slots" if sizes else ""
        )
        head = "".join(f'<th scope="col">{escape(task)}</th>' for task in tasks)
        rows = [_line("full KV", [full.get(task) for task in tasks], full, cohort, "full")]
        rows += [_line(one, [here.get((one, task)) for task in tasks], full, cohort) for one in methods]
        dropping = [row for row in here.values() if row.regime == DECODE_ACTIVE]
        saved = "".join(f"<td>{_saved([row for row in dropping if row.task == task])}</td>" for task in tasks)
        foot = f'<tfoot><tr><th scope="row">saved bytes</th>{saved}</tr></tfoot>' if dropping else ""
        caption = f"{name}, % ± one standard error" + (f", at {title}" if title else "")
        tables.append(
            f'<div class="table-frame glance" data-budget="{escape(title)}" tabindex="0" role="region" '
            f'aria-label="{escape(caption)}"><table><caption><span>{escape(caption)}</span></caption><thead><tr>'
            f'<th scope="col">method</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>{foot}</table></div>'
        )
    return f'<div class="glances" data-glances>{"".join(tables)}</div>'


def _line(
    label: str, rows: list[SummaryRow | None], full: dict[str, SummaryRow], cohort: Cohort, style: str = ""
) -> str:
    key, _, scale, digits = MAIN[cohort.kind]
    cells = []
    for row in rows:
        if row is None:
            cells.append('<td class="none">–</td>')
            continue
        one = row.estimates[key]
        top = full[row.task].estimates[key].mean if row.task in full else 1.0
        mark = f'<i style="left:{100 * min(1, max(0, top)):.1f}%"></i>' if not style else ""
        mean, _, error = estimate_text(one, digits, scale).partition(" ")
        cells.append(
            f'<td><span class="value">{mean} <small>{error}</small></span>'
            f'<span class="bar" aria-hidden="true"><b style="width:{100 * min(1, max(0, one.mean)):.1f}%"></b>{mark}'
            "</span></td>"
        )
    read = [row.estimates["slots_read_mean"].mean for row in rows if row and row.regime == SELECTING]
    aside = f" <small>holds all, reads {_span(read, '{:,.0f}')} slots</small>" if read else ""
    return f'<tr class="{style}"><th scope="row">{escape(label)}{aside}</th>{"".join(cells)}</tr>'


def _saved(rows: list[SummaryRow]) -> str:
    shares = [row.estimates["saved_bytes"].mean for row in rows]
    return _span(shares, "{:.0%}") if shares else "–"


def _span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
