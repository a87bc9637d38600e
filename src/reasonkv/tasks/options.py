"""How tasks from data become prompts and how outputs are graded: options that every command takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How tasks from data become prompts, and how their outputs are graded. What is not given comes from the task.

    Args:
        prompt: Template of the prompt: text with {field}, Jinja with {{ field }}, or @FILE that holds one.
        answer: Field that holds the answer (a text, a number, or a list of accepted ones), or a Jinja template.
        grade: math, number, exact, choice, contains, f1, rouge, edit, code, or FILE.py:function.
        extract: Regular expression that finds the answer in an output. Its last match counts, in it the first group.
        shots: Worked examples before the question.
        shots_from: File with the examples, in the form of the task's data. Unless given, as the task says.
        data_dir: Folder with the data of hub datasets, for machines without network: NAME.jsonl or NAME.parquet.
        chat: Use the tokenizer's chat template: auto - where there is one and the task comes from data; on; off.
        system: System message of the chat.
        thinking: Ask the chat template for thinking, on or off. Unless given, the template's own default.
        think_end: Text that ends thinking; only what follows it is graded.
    """

    prompt: str | None = None
    answer: str | None = None
    grade: str | None = None
    extract: str | None = None
    shots: int | None = None
    shots_from: Path | None = None
    data_dir: Path | None = None
    chat: Literal["auto", "on", "off"] = "auto"
    system: str | None = None
    thinking: Literal["on", "off"] | None = None
    think_end: str = THINK_END

    def to_dict(self) -> dict[str, Any]:
        """Return the options that are not the defaults, for manifests."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
