"""Results as cells that may be compared: by family and prompt policy, then method and budget, then example."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiment import POLICIES, Line, by_example, policy_of
from kept_records import keep, load

from reasonkv.evaluate.results import Results
from reasonkv.evaluate.statistics import Difference, Estimate, estimate, paired_difference
from reasonkv.methods import method_class
from reasonkv.methods.base import Method

METRICS = {
    "kl": ("KL, nats", -1.0),
    "top1": ("top-1, points", 100.0),
    "answer_top1": ("answer tokens right, points", 100.0),
}
"""Words for a metric, and the factor that makes more of it better."""


@dataclass(frozen=True)
class Group:
    """What may be compared with one another: a family under a prompt policy."""

    task: str
    policy: str

    def __str__(self) -> str:
        return f"{self.task}, {POLICIES[self.policy]}"


Cells = dict[Group, dict[tuple[str, str], dict[int, Line]]]
"""Lines by group, then by (method, budget's label), then by example. Full KV's budget is ""."""


@dataclass(frozen=True)
class Found:
    """Everything in some folders, by kind: replays, generated answers, and replays with diagnostics."""

    replays: Cells
    answers: Cells
    diagnosed: Cells


def load_cells(paths: Iterable[Path], records_to: Path, *, by_folder: bool = True) -> Found:
    """Read results in either form, and keep the records of those that are not kept yet.

    A cell that comes a second time replaces the first, and a printed line says so. It does so whole, because a cell of
    both would be the mean of two versions of a method. Rows of tables come in the order in which cells first came.

    Args:
        paths: FOLDER/NAME as `result_paths` finds them; later ones replace earlier ones.
        records_to: where records are kept.
        by_folder: in a folder there for each FOLDER.

    Raises:
        SystemExit: one file holds a method, budget and example twice, or kept records would be lost.

    """
    found, began = Found({}, {}, {}), dict[tuple[str, Group, tuple[str, str]], str]()
    for path in paths:
        results = load(path)
        keep(results, records_to / path.parent.name if by_folder else records_to)
        for place, lines in _cells_in(path, results).items():
            kind, group, cell = place
            there = getattr(found, kind).setdefault(group, {}).setdefault(cell, {})
            if cell[1] and there.keys() & lines.keys():  # full KV runs in several experiments, and is the same in all
                print(
                    f"{path}: {len(lines)} records of {' at '.join(cell)} slots, begun {results.manifest['date']}, "
                    f"replace {len(there)} begun {began[place]}."
                )
                there.clear()
            there.update(lines)
            began[place] = results.manifest["date"]
    return found


def _cells_in(path: Path, results: Results) -> dict[tuple[str, Group, tuple[str, str]], dict[int, Line]]:
    """Lines by field of `Found`, group and cell, then by example."""
    cells: dict[tuple[str, Group, tuple[str, str]], dict[int, Line]] = {}
    replays = "diagnosed" if path.name.startswith("lost") else "replays"
    for kind, lines in ((replays, results.records), ("answers", results.answers)):
        for line in lines:
            cell = (spec_of(line), label_of(line))
            here = cells.setdefault((kind, Group(line.task, policy_of(path)), cell), {})
            if line.example in here:
                raise SystemExit(f"{path} holds {' at '.join(cell)} slots a second time.")
            here[line.example] = line
    return cells


def spec_of(line: Line) -> str:
    """The method's shortest spec, from the options a record holds."""
    options = dict(line.options)
    if line.method == "cask" and line.budget is not None and line.budget["prompt"] == "on_top":
        options.pop("prompt_share")  # the prompt is protected whole, so no share of it is chosen
    made: Method = method_class(line.method)(**options)
    return made.spec()


def label_of(line: Line) -> str:
    """The budget's slots, or what a window keeps of its tokens."""
    if line.budget is None:
        return ""
    size = line.budget.get("size")
    return f"{line.budget['tokens']} of every {size}" if size else str(line.budget["tokens"])


def budgets(cells: Mapping[tuple[str, str], object]) -> list[str]:
    """Labels of the budgets, smallest first."""
    return sorted({label for _, label in cells if label}, key=lambda label: int(label.split()[0]))


def methods(cells: Mapping[tuple[str, str], object]) -> list[str]:
    """Methods with a budget, in the order they ran."""
    return list(dict.fromkeys(method for method, label in cells if label))


def mean(lines: Mapping[int, Line], metric: str) -> Estimate:
    """A metric's mean over examples."""
    return estimate(list(by_example(dict(lines), metric).values()))


def gain(ours: Mapping[int, Line], theirs: Mapping[int, Line], metric: str, scale: float) -> Difference | None:
    """Paired difference, positive where ours is better by the sign of `scale`."""
    left, right = by_example(dict(ours), metric), by_example(dict(theirs), metric)
    return paired_difference({k: scale * v for k, v in left.items()}, {k: scale * v for k, v in right.items()})


def verdict(found: Difference | None) -> str:
    """better, worse, or undecided where the interval holds 0."""
    if found is None:
        return "-"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "undecided"


def words(found: Difference | None, digits: int = 3) -> str:
    """A difference with its interval."""
    return "-" if found is None else f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def count_verdicts(found: Iterable[Difference | None]) -> str:
    """How often better / undecided / worse."""
    counts: dict[str, int] = defaultdict(int)
    for one in found:
        counts[verdict(one)] += 1
    return " / ".join(str(counts[name]) for name in ("better", "undecided", "worse")) if counts else "-"
