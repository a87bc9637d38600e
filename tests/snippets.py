"""Run the code of a page as a reader would, on models that need no download."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

from tiny import save_tiny
from transformers import AutoTokenizer

from reasonkv.cli import make_app

HUB_MODEL = "Qwen/Qwen3-4B"
CHAT_TEMPLATE = "<program> {% for message in messages %}{{ message.content }} {% endfor %}<think>"


def python_blocks(page: str) -> list[str]:
    """The Python of a page, in order."""
    return re.findall(r"```python\n(.*?)```", page, re.S)


def hub_model(folder: Path) -> Path:
    """Save what stands for the hub model: a tiny random one with a chat template."""
    model = save_tiny(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    return model


def runnable(blocks: list[str], model: Path) -> str:
    """Blocks as one program on that model.

    An answer of 8,192 tokens becomes one of 700, which is still long enough to be compressed.
    """
    return "\n".join(blocks).replace(HUB_MODEL, str(model)).replace("max_new_tokens=8192", "max_new_tokens=700")


def run_python(blocks: list[str], folder: Path) -> str:
    """Run blocks as a program of their own in `folder` and return what it prints."""
    script = folder / "snippet.py"
    script.write_text(runnable(blocks, hub_model(folder / "model")))
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


def run_here(blocks: list[str], model: Path, folder: Path, page: str) -> str:
    """Run blocks in this process, in `folder` and with no name defined, and return what they print."""
    out, names = io.StringIO(), {"__name__": "__main__"}
    with chdir(folder), redirect_stdout(out):
        exec(compile(runnable(blocks, model), page, "exec"), names)  # the page's own code
    return out.getvalue()


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
