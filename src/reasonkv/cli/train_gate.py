"""`reasonkv train-gate`: train the gate of SeerAttention-R for a model."""

from __future__ import annotations

from typing import Annotated

from reasonkv.cli.console import note, print_json, progress_bars, show
from reasonkv.cli.flags import ConfigFile, Json, ModelFlags, Without, command
from reasonkv.seer.job import TrainGateJob


@command
def train_gate(
    *,
    job: TrainGateJob,
    model: Annotated[ModelFlags, Without(("calibration", "kv_dtype"))],
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Train the gate that the method seer chooses pages with; the model itself is not changed.

    Example: `reasonkv train-gate --model Qwen/Qwen3-8B --text book.txt --out reasonkv_gate.safetensors`

    The gate learns to predict the model's own attention. Afterwards it is compared with an untrained gate and with
    Quest on held-out text, by the share of attention that falls on equally many pages.
    """
    from reasonkv.models import one_thread_if_small
    from reasonkv.seer.training import run
    from reasonkv.tasks import get_task

    tasks = [get_task(spec) for spec in job.task]
    loaded = model.load()
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}")
    with one_thread_if_small(loaded.model), progress_bars(1) as bar:

        def progress(step: int, loss: float) -> None:
            bar(f"steps, loss {loss:.3f}", step, job.steps)

        made = run(job, loaded.model, loaded.tokenizer, tasks=tasks, progress=progress)
    parameters = made.gate.parameters
    if json:
        facts = {"file": job.out, "page_size": job.page_size, "parameters": parameters, "source": made.source}
        print_json({**facts, "loss": made.loss, "attention_kept": made.attention_kept})
        return
    print(f"Trained {parameters:,} parameters in {job.steps:,} steps on {made.source}: {show(job.out)}")
    for pages, shares in made.attention_kept.items():
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"Attention on {pages} pages of {job.page_size} tokens, held-out text: {words}")
