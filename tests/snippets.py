"""Run the code of a page as a reader would, on models that need no download."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tiny import save_tiny
from transformers import AutoTokenizer

from reasonkv.cli import make_app

HUB_MODEL = "Qwen/Qwen3-4B"
CHAT_TEMPLATE = "<program> {% for message in messages %}{{ message.content }} {% endfor %}<think>"


def python_blocks(page: str) -> list[str]:
    """The Python of a page, in order."""
    return re.findall(r"```python\n(.*?)```", page, re.S)


def run_python(blocks: list[str], folder: Path) -> str:
    """Run blocks as one program in `folder` and return what it prints.

    The hub model is replaced by a tiny random one with a chat template, and an answer of 8,192 tokens by one of 700,
    which is still long enough to be compressed.
    """
    model = save_tiny(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    code = "\n".join(blocks).replace(HUB_MODEL, str(model)).replace("max_new_tokens=8192", "max_new_tokens=700")
    script = folder / "snippet.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """This process's, with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def commands(page: str) -> list[str]:
    """The `reasonkv` commands of a page's shell blocks, with continued lines joined."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in blocks.splitlines() if line.startswith("reasonkv ")]


def parses(command: str, page: str = "") -> None:
    """Raise if the command line does not accept a command, without running it; `run.yaml` is the page's own."""
    if "run.yaml" in command:
        Path("run.yaml").write_text("".join(re.findall(r"```yaml\n(.*?)```", page, re.S)))
    make_app().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
