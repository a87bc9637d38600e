"""Run the commands of docs/your-model.md as they stand there, one after the other, and say how long each took.

python benchmarks/guide.py WORK                        # needs the hub: for the model, and for gsm8k
python benchmarks/guide.py WORK --model FOLDER --lm-eval "--include_path TASKS --tasks my_gsm8k"    # without it

`pip install` lines are skipped. What a command printed is kept in WORK/NAME.log.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "your-model.md"
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


def main() -> None:
    """Run; the exit code is 1 if a command's was not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder to run in")
    parser.add_argument("--model", default=MODEL, help="folder of the model")
    parser.add_argument("--lm-eval", default="--tasks gsm8k", help="the task of the lm-eval command")
    given = parser.parse_args()
    text = GUIDE.read_text().replace(MODEL, given.model).replace("--tasks gsm8k", given.lm_eval)
    given.work.mkdir(parents=True, exist_ok=True)
    for plan in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (given.work / "plan.yaml").write_text(plan)
    # commands are looked for beside this interpreter first, whether or not its environment is active
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    began, failed = time.monotonic(), 0
    for line in [line for line in lines if line and not line.startswith("pip ")]:
        name = "lm_eval" if "lm_eval" in line else line.split()[1]
        start = time.monotonic()
        with (given.work / f"{name}.log").open("w") as log:
            code = subprocess.call(line, shell=True, cwd=given.work, env=env, stdout=log, stderr=subprocess.STDOUT)
        failed += code != 0
        print(f"{name}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
