"""Statistics and networks for the methods that are timed with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from decoding import Subject

from reasonkv import get_method
from reasonkv.calibration import Calibration
from reasonkv.calibration.job import CalibrateJob
from reasonkv.calibration.run import run as calibrate
from reasonkv.evaluate.fitting import UNITS, add_forecast, texts_of
from reasonkv.network import FORECAST_ATTENTION, FORECAST_FEATURES, Network
from reasonkv.tasks import get_task


def random_calibration(config: Any, *, queries: bool = False) -> Calibration:
    """Return statistics of queries that point one way in some pairs and every way in others, and fresh networks.

    Args:
        queries: the networks are those that see the newest queries' attention.
    """
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    width = config.head_dim + FORECAST_FEATURES - (0 if queries else FORECAST_ATTENTION)
    mean = torch.randn(layers, config.num_attention_heads, config.head_dim // 2, dtype=torch.cfloat)
    modulus = mean.abs() + torch.rand(mean.shape)
    network = Network.fresh(layers, heads, width, UNITS)
    return Calibration(mean, modulus, modulus.square() * 1.2, head_dim=config.head_dim, forecast=network)


def calibration_of(subject: Subject, methods: Sequence[str], limit: int = 2) -> Calibration | None:
    """Return statistics from a few prompts, if a method asks for any, as `reasonkv calibrate` makes them.

    The networks of forecast see no queries, as those that come with the package, unless its form with queries is timed.
    """
    if not any(get_method(method).needs.calibration for method in methods):
        return None
    if subject.tokenizer is None:
        return random_calibration(subject.model.config)
    fits = any(method.startswith("forecast") for method in methods)
    job = CalibrateJob(task=["program:lines=24"], limit=limit, forecast=fits, without_queries="forecast" not in methods)
    tasks = [get_task(spec) for spec in job.task]
    found = calibrate(job, subject.model, subject.tokenizer, tasks=tasks)
    if not job.forecast:
        return found
    return add_forecast(job, subject.model, texts_of(job, subject.model, subject.tokenizer, tasks=tasks), found)[0]
