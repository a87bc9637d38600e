"""Sampling as a model's authors publish it: `--sampling published`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from reasonkv.evaluate.job import GenerateJob, JobError, ReplayJob
from reasonkv.evaluate.settings import Sampling
from reasonkv.models import LoadedModel
from reasonkv.tasks.declaration import declaration_of

S = TypeVar("S", bound=Sampling)
J = TypeVar("J", bound=ReplayJob | GenerateJob)

THINKING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
DIRECT = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
"""Of Qwen3 with and without thinking."""
DISTILLED = {"temperature": 0.6, "top_p": 0.95}
"""Of the models distilled from DeepSeek-R1."""
OPEN = {"temperature": 1.0, "top_p": 1.0}
"""Of gpt-oss."""
_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def with_published(job: J, model: LoadedModel) -> J:
    """Return a job whose sampling is filled in, and the limit on outputs with the tasks' where none is given.

    Raises:
        JobError: published sampling is asked for, and nobody publishes any.
    """
    thinking = job.options.thinking
    if isinstance(job, ReplayJob):
        return replace(job, traces=fill(job.traces, model, job.task, thinking))
    if job.sampling.preset is None:
        return job
    limits = [one.max_new_tokens for one in map(declaration_of, job.task) if one and one.max_new_tokens]
    limit = job.max_new_tokens or max(limits, default=None)
    return replace(job, sampling=fill(job.sampling, model, job.task, thinking), max_new_tokens=limit)


def fill(sampling: S, model: LoadedModel, tasks: Sequence[str] = (), thinking: str | None = None) -> S:
    """Return sampling whose fields that are not given are published ones; those without a preset are returned as given.

    The model's family decides, then the files of the tasks, then the model's generation_config.json.

    Args:
        thinking: on, off, or None for the chat template's default.

    Raises:
        JobError: there is nothing of the kind, or the tasks differ.
    """
    if sampling.preset is None:
        return sampling
    files = [one for one in map(declaration_of, tasks) if one is not None]
    declared, stops = [dict(one.sampling) for one in files], {tuple(one.stop) for one in files}
    if len(stops) == 1 and not sampling.stop:
        sampling = replace(sampling, stop=stops.pop())
    found = family_sampling(model, thinking)
    if found is None and any(declared):
        if any(one != declared[0] for one in declared) or len(declared) < len(tasks):
            raise JobError(f"The tasks {', '.join(tasks)} publish different sampling; run them one by one.")
        found = declared[0]
    found = found or own_sampling(model)
    if not found:
        raise JobError(f"Nobody publishes sampling for {model.name}; give --temperature and --top-p.")
    return sampling.filled(found)


def family_sampling(model: LoadedModel, thinking: str | None = None) -> Mapping[str, float] | None:
    """Return what the model's family publishes, or None."""
    kind = str(model.model.config.model_type)
    if kind == "gpt_oss":
        return OPEN
    if kind.startswith("qwen3"):  # its models without thinking say so themselves
        direct = thinking == "off" or (thinking is None and own_sampling(model).get("top_p") == DIRECT["top_p"])
        return DIRECT if direct else THINKING
    return DISTILLED if "r1-distill" in model.name.lower() else None


def own_sampling(model: LoadedModel) -> Mapping[str, float]:
    """Return what the model's generation_config.json says about sampling; empty where it is greedy."""
    config = model.model.generation_config
    if config is None or not config.do_sample:
        return {}
    own = {name: getattr(config, name, None) for name in _FIELDS}
    # 0 and 1 are "off" there, and no values of ours
    found = {name: value for name, value in own.items() if value and (name in {"temperature", "top_p"} or value != 1)}
    return {"temperature": 1.0, "top_p": 1.0} | found
