"""Train the testbed model: curriculum, atomic checkpoints, resume, progress, log and curve.

One optimizer step adds the gradients of one small batch of each family. The state of a run is the
weights, the optimizer, the curriculum and a few counters; data come from the step number, so that a
run that was killed continues as if it had not been.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import nn
from transformers import AttentionInterface, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from reasonkv.errors import ReasonKVError
from reasonkv.files import write_atomically
from reasonkv.tasks import Kind
from tools.testbed.attention import NAME, training_attention
from tools.testbed.data import Batch, choose_stage, make_batch
from tools.testbed.initial import initialise
from tools.testbed.recipe import Recipe
from tools.testbed.tokenizer import make_tokenizer

_SMOOTHING = 0.95  # of the running accuracies, per training batch
_KEPT_CHECKPOINTS = 3


class TrainingError(ReasonKVError, RuntimeError):
    """Training cannot start or continue; the text is one sentence."""


@dataclass
class Progress:
    """What a run knows besides weights and optimizer state; stored as JSON in each checkpoint.

    `accuracy[family][kind]` and `loss[family]` are running means at the family's present level;
    `seen` counts batches since the last promotion.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """Where the finished model lies and what the run cost."""

    model_path: Path
    progress: Progress
    curve_path: Path


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = True,
    minutes: float | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train by `recipe` in folder `out`; leaves `out/model`, `training_log.jsonl` and `curve.png`.

    With `minutes` the run, resumed parts included, ends after that much training time or after
    `recipe.steps`, whichever is first, and the learning rate is scheduled for that end; without it
    the result depends on the recipe and the machine's arithmetic alone. With `resume` a run found
    in `out` is continued. `console` shows live progress; None is silent.

    Raises `TrainingError` (one sentence) when `out` cannot be used.
    """
    out = Path(out)
    draw_curve = _curve_drawer()
    _prepare(out, resume)
    torch.manual_seed(recipe.seed)
    model = _make_model(recipe)
    optimizer = _make_optimizer(model, recipe)
    progress = _restore(out, model, optimizer) or Progress()
    for family in recipe.courses:
        progress.level.setdefault(family, 0)
        progress.seen.setdefault(family, 0)
        progress.accuracy.setdefault(family, {})
    write_atomically(out / "recipe.json", (json.dumps(asdict(recipe), indent=1) + "\n").encode())
    _trim_log(out, progress.step)
    model.train()
    live = Live(console=console, refresh_per_second=1) if console else nullcontext()
    with live:
        while (done := _share_done(recipe, progress, minutes)) < 1:
            began = time.monotonic()
            rate = _learning_rate(recipe, progress.step, done)
            _step(model, optimizer, recipe, progress, rate)
            progress.step += 1
            progress.seconds += time.monotonic() - began
            if progress.step % recipe.log_every == 0:
                _log(out, progress, rate)
                if isinstance(live, Live):
                    live.update(_table(progress, done, rate))
            if progress.step % recipe.save_every == 0:
                _checkpoint(out, model, optimizer, progress)
    _checkpoint(out, model, optimizer, progress)
    _write_model(model.to(torch.bfloat16), out / "model")
    curve = draw_curve(out / "training_log.jsonl", out / "curve.png")
    return TrainingResult(out / "model", progress, curve)


def _curve_drawer() -> Callable[[Path, Path], Path]:
    """`draw_curve`, or an error at the start of a run rather than at its end."""
    try:
        from tools.testbed.curve import draw_curve
    except ImportError as error:
        raise TrainingError("Training draws its curve with altair: pip install 'reasonkv[eval]'.") from error
    return draw_curve


def _step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    progress: Progress,
    rate: float,
) -> None:
    """One optimizer step over one batch of each family; updates running means and levels."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    due = [family for family, course in recipe.courses.items() if progress.step % course.every == 0]
    for family in due:
        level = progress.level[family]
        stage = choose_stage(recipe, family, progress.step, level)
        batch = make_batch(recipe, family, progress.step, stage)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            hidden_BTD = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
            logits_NV = model.lm_head(hidden_BTD.flatten(0, 1)[batch.at])
        loss = nn.functional.cross_entropy(logits_NV.float(), batch.targets)
        (loss / len(due)).backward()  # type: ignore[no-untyped-call]  # torch's own gap
        progress.tokens += batch.ids.numel()
        if stage == level:
            _account(progress, family, loss.item(), logits_NV.argmax(-1), batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    for family, course in recipe.courses.items():
        _promote(progress, family, len(course.stages) - 1, recipe.promote_at)


def _account(progress: Progress, family: str, loss: float, guesses: torch.Tensor, batch: Batch) -> None:
    """Fold one batch into the family's running loss and accuracy by token kind."""
    right = guesses == batch.targets
    progress.loss[family] = _smooth(progress.loss.get(family), loss)
    means = progress.accuracy[family]
    for kind in Kind:
        chosen = right[batch.kinds == kind]
        if chosen.numel():
            name = kind.name.lower()
            means[name] = _smooth(means.get(name), chosen.float().mean().item())
    progress.seen[family] += 1


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else _SMOOTHING * old + (1 - _SMOOTHING) * new


def _promote(progress: Progress, family: str, last: int, threshold: float) -> None:
    """Move the family to its next stage once looking values up is good enough, answers included.

    Arithmetic need not be: longer problems hold more of it a token.
    """
    means = progress.accuracy[family]
    looked_up = min(means.get("retrieval", 1.0), means.get("answer", 0.0))
    enough = progress.seen[family] >= 1 / (1 - _SMOOTHING)
    if enough and progress.level[family] < last and looked_up > threshold:
        progress.level[family] += 1
        progress.seen[family] = 0
        progress.accuracy[family] = {}
        progress.loss.pop(family, None)


def _share_done(recipe: Recipe, progress: Progress, minutes: float | None) -> float:
    """How much of the run is over, from 0 to 1 (or a little more)."""
    done = progress.step / recipe.steps
    return done if minutes is None else max(done, progress.seconds / (60 * minutes))


def _learning_rate(recipe: Recipe, step: int, done: float) -> float:
    """Warm-up by steps, then flat, then linear to zero over the last `decay` of the run."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.learning_rate * warm * min(1.0, (1 - done) / recipe.decay)


def _make_model(recipe: Recipe) -> Qwen3ForCausalLM:
    """A fresh model that attends with the training kernel (the saved model does not know it)."""
    AttentionInterface.register(NAME, training_attention)
    model = Qwen3ForCausalLM(recipe.model_config())
    initialise(model)
    model.set_attn_implementation(NAME)
    return model


def _make_optimizer(model: Qwen3ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms and embeddings are not decayed."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def _prepare(out: Path, resume: bool) -> None:
    """Make the folder, or refuse it in one sentence."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            if (out / "latest").exists():
                raise TrainingError(f"{out} already holds a training run; resume it or choose another folder.")
        elif any(out.iterdir()) and not (out / "recipe.json").exists():
            raise TrainingError(f"{out} is not empty and holds no training run; choose another.")
    except OSError as error:
        raise TrainingError(f"{out} cannot be used for training: {error.strerror}.") from error


def _checkpoint(out: Path, model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Save a checkpoint that is either whole or absent: a loadable folder, then a pointer to it."""
    name = f"step-{progress.step:06d}"
    work = out / f".{name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    with _no_bars():
        model.save_pretrained(work)
    make_tokenizer().save_pretrained(work)
    torch.save(optimizer.state_dict(), work / "optimizer.pt")
    write_atomically(work / "progress.json", json.dumps(asdict(progress)).encode())
    if (out / name).exists():
        shutil.rmtree(out / name)
    os.replace(work, out / name)
    write_atomically(out / "latest", name.encode())
    for old in sorted(out.glob("step-*"))[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def _restore(out: Path, model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Load the latest checkpoint into model and optimizer; None when there is none."""
    pointer = out / "latest"
    if not pointer.exists():
        return None
    folder = out / pointer.read_text().strip()
    try:
        with _no_bars():
            model.load_state_dict(Qwen3ForCausalLM.from_pretrained(folder).state_dict())
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return Progress(**json.loads((folder / "progress.json").read_text()))
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"The checkpoint {folder} does not fit this recipe or is damaged; use another folder."
        ) from error


def _write_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """The final folder: weights as they are, configuration, tokenizer."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    with _no_bars():
        model.save_pretrained(work)
    make_tokenizer().save_pretrained(work)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the library's own progress bars out of ours while weights are read or written."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _log(out: Path, progress: Progress, rate: float) -> None:
    """Append one line to the log: counters, rate, and each family's loss and accuracies."""
    line: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 2),
        "learning_rate": rate,
    }
    for family, level in progress.level.items():
        means = {kind: round(value, 5) for kind, value in progress.accuracy[family].items()}
        loss = progress.loss.get(family)
        line[family] = {"level": level, "loss": loss and round(loss, 6), **means}
    with (out / "training_log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def _trim_log(out: Path, step: int) -> None:
    """Drop log lines past the checkpoint that training resumes from (they will be rewritten)."""
    path = out / "training_log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the line that a kill cut short
            break
    write_atomically(path, "".join(kept).encode())


def _table(progress: Progress, done: float, rate: float) -> Table:
    """The live display."""
    speed = progress.tokens / max(progress.seconds, 1e-9)
    table = Table(
        title=f"step {progress.step}  {done:.0%}  {progress.tokens / 1e6:.2f} M tokens  "
        f"{speed:,.0f} tokens/s  rate {rate:.2e}"
    )
    kinds = [kind.name.lower() for kind in Kind]
    for heading in ("family", "stage", "loss", *kinds):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for family, level in progress.level.items():
        means, loss = progress.accuracy[family], progress.loss.get(family)
        table.add_row(
            family,
            str(level),
            "" if loss is None else f"{loss:.4f}",
            *(f"{means[kind]:.2%}" if kind in means else "" for kind in kinds),
        )
    return table
