"""Traces from elsewhere: prompts and outputs that an engine wrote, one JSON object a line, told apart by their keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import TypeAdapter

from reasonkv.tasks.base import Problem, Task, TaskError
from reasonkv.tasks.options import THINK, THINK_END, TaskOptions
from reasonkv.tasks.rows import read_rows

_SHAPES = (
    "prompt + output (also as token ids: prompt_token_ids + output_token_ids), vLLM's outputs, requests and responses "
    "of the OpenAI API (choices), and samples of lm-eval (resps)"
)
_PROMPTS = ("prompt_token_ids", "messages", "prompt")
_OUTPUTS = ("output_token_ids", "token_ids", "output", "completion", "text")


TokenId = Annotated[int, Ge(0), Lt(2**31)]


@dataclass(frozen=True)
class GivenTrace:
    """One prompt, as the model read it or as messages, with its output and the thinking that a server split off it."""

    prompt: str | list[TokenId] | list[dict[str, Any]]
    output: str | list[TokenId]
    reasoning: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The prompt where it is a chat."""
        is_chat = isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)
        return self.prompt if is_chat else None  # type: ignore[return-value]

    def output_text(self, prompt: str, think_end: str) -> str:
        """Return the output with its thinking in front, which the prompt may have opened."""
        if self.reasoning is None or not isinstance(self.output, str):
            return str(self.output)
        opened = prompt.rstrip().endswith(THINK)
        return f"{'' if opened else THINK + chr(10)}{self.reasoning.strip(chr(10))}\n{think_end}\n\n{self.output}"


_CHECKED = TypeAdapter(GivenTrace)


@dataclass(frozen=True)
class GivenTraces(Task):
    """Traces of a file as the user named it; trace i is problem i, and outputs are not graded."""

    name: str
    traces: tuple[GivenTrace, ...]
    skipped: tuple[str, ...] = ()
    think_end: str = THINK_END

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.traces))  # derived

    @property
    def digest(self) -> str:
        """Twelve hex digits that stand for the traces."""
        return hashlib.sha256(json.dumps([asdict(one) for one in self.traces]).encode()).hexdigest()[:12]

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return the prompt of a trace.

        Raises:
            TaskError: there are fewer traces.
        """
        if not 0 <= example < len(self.traces):
            raise TaskError(f"{self.name} has {len(self.traces)} traces, so there is no trace {example}.")
        trace = self.traces[example]
        prompt = trace.messages[-1].get("content", "") if trace.messages else trace.prompt
        return Problem(self.name, example, seed, split, str(prompt), str(trace.output), "")


def given_traces(path: str, options: TaskOptions) -> GivenTraces:
    """Read the traces of a file, or of a folder of runs (`merged/merged.jsonl`, or all its .jsonl files).

    Raises:
        TaskError: there is no such file, or no trace in it.
    """
    place = Path(path).expanduser()
    files = [place]
    if place.is_dir():
        merged = place / "merged" / "merged.jsonl"
        files = [merged] if merged.is_file() else sorted(place.glob("*.jsonl"))
    found, skipped = list[GivenTrace](), list[str]()
    for file in files:
        rows, unread = read_rows(file)
        skipped += unread
        filters = (row["filter"] for row in rows if "filter" in row and "resps" in row)
        first = next(filters, None)  # lm-eval repeats a sample for each of its filters
        for number, row in enumerate(rows, 1):
            if "resps" in row and row.get("filter", first) != first:
                continue
            own, problem = _traces(row)
            found += own
            if problem:
                skipped.append(f"object {number} {problem}")
    if not found:
        why = f" ({skipped[0]})" if skipped else ""
        raise TaskError(f"{path} holds no traces{why}; known are {_SHAPES}.")
    return GivenTraces(path, tuple(found), tuple(skipped), options.think_end)


def _traces(row: Mapping[str, Any]) -> tuple[list[GivenTrace], str]:
    """Return the traces of one object, and what is wrong with it in words."""
    try:
        pairs = [_CHECKED.validate_python(vars(one)) for one in _pairs(row)]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return [], f"has a shape of its own; its keys are {', '.join(map(str, row))}"
    whole = [one for one in pairs if one.prompt and one.output]
    if not pairs:
        return [], f"is no trace; its keys are {', '.join(map(str, row))}"
    return whole, "" if len(whole) == len(pairs) else "has an empty prompt or output"


def _pairs(row: Mapping[str, Any]) -> Iterator[GivenTrace]:
    request = row.get("request") or row.get("body") or row
    response = row.get("response") or row
    request, response = (one.get("body") or one for one in (request, response))  # as in files of the batch API
    if "choices" in response:
        for choice in response["choices"]:
            message = choice.get("message") or {}
            prompt = choice.get("prompt_token_ids") or response.get("prompt_token_ids") or _first(request, _PROMPTS)
            output = choice.get("token_ids") or message.get("content") or choice.get("text") or ""
            yield GivenTrace(_plain(prompt), output, message.get("reasoning_content") or message.get("reasoning"))
    elif isinstance(row.get("outputs"), list):
        for one in row["outputs"]:
            yield GivenTrace(_plain(_first(row, _PROMPTS)), _first(one, _OUTPUTS) if isinstance(one, dict) else one)
    elif "resps" in row:
        given = row["arguments"]
        prompt = given["gen_args_0"]["arg_0"] if isinstance(given, dict) else given[0][0]
        for response_of_one in row["resps"]:
            for text in response_of_one:
                if isinstance(text, str):  # a log-likelihood is a pair
                    yield GivenTrace(prompt, text)
    elif any(name in row for name in _OUTPUTS):
        yield GivenTrace(_plain(_first(row, _PROMPTS)), _first(row, _OUTPUTS))
    elif row.get("messages") and row["messages"][-1]["role"] == "assistant":
        *before, answer = row["messages"]
        yield GivenTrace(before, answer["content"], answer.get("reasoning_content"))


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name)), "")


def _plain(prompt: Any) -> Any:
    """Return the only prompt of a list of one."""
    alone = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list))
    return prompt[0] if alone else prompt
