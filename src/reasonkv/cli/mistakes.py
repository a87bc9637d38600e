"""Every error that a user can cause, as one sentence and an exit code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cyclopts import CycloptsError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from reasonkv.errors import ReasonKVError

FAILED, USAGE, INTERRUPTED = 1, 2, 130
LONGEST = 1600
"""Characters of a sentence, more than any that repeats no input."""
REPLACED = {
    "train-testbed": "The bundled model is trained in a checkout now: python -m tools.testbed.",
    "frontier --task": "`reasonkv tune` searches for budgets now; frontier reads finished results folders.",
}
EXTRA = dict.fromkeys(("pandas", "pyarrow", "scipy", "pydantic", "jinja2", "altair", "vl_convert"), "eval")
EXTRA |= {"rapidfuzz": "compare", "sentence_transformers": "compare", "ray": "ray"}
"""Modules of optional dependencies, with the extra that installs them."""


class UsageError(ReasonKVError, ValueError):
    """Arguments that no command can carry out; the message is one sentence."""


def explain(error: Exception, tokens: Sequence[str]) -> tuple[str, int]:
    """Return one sentence and the exit code of an error that a user can cause.

    Raises:
        Exception: the error itself where it is a defect, which keeps its traceback.
    """
    cause = error.__cause__ if isinstance(error, CycloptsError) else error
    if isinstance(cause, ReasonKVError):
        from reasonkv.evaluate.records import RecordError

        failed = isinstance(cause, (RuntimeError, RecordError))
        return _line(cause), FAILED if failed else USAGE
    if isinstance(error, CycloptsError):
        return _wrong_flag(error, tokens), USAGE
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
        return f"This needs {error.name}; install it with: pip install 'reasonkv[{EXTRA[error.name]}]'.", FAILED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "The device ran out of memory; lower --batch-size, or use --dtype bfloat16.", FAILED
    if isinstance(error, UnicodeError):
        return f"A text is no valid UTF-8 ({_line(error)}).", FAILED
    if isinstance(error, OSError):
        return _line(error) + ".", FAILED
    raise error


def _line(error: BaseException) -> str:
    """Return an error as one line; a value of many characters that it repeats is cut."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


def _wrong_flag(error: CycloptsError, tokens: Sequence[str]) -> str:
    """Say in one sentence what is wrong with a command line that does not parse."""
    chain = " ".join(error.command_chain or ())
    if isinstance(error, UnknownCommandError):
        for old, sentence in REPLACED.items():
            if tokens[0] == old:
                return sentence
    if isinstance(error, UnknownOptionError) and chain == "frontier":
        option = error.token.keyword or error.token.value
        if option.split("=")[0] in {"--task", "--methods", "--out", "--model", "--limit", "--resolution"}:
            return REPLACED["frontier --task"]
    if isinstance(error, UnusedCliTokensError):
        text = f"Unexpected argument {(error.unused_tokens or [''])[0]!r}"
    else:
        text = _line(error).partition(" Available commands:")[0].rstrip(".")
        text = re.sub(r"\. (Did|Choose)", lambda found: f"; {found[1].lower()}", text)
        text = re.sub(r'^Command "[^"]*" parameter (\S+) requires an argument', r"Give \1 a value", text)
    return f"{text.removesuffix('?')}; see `{' '.join(['reasonkv', chain]).strip()} --help`."
