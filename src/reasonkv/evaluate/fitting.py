"""Fit the networks of the method `forecast`: replay texts through a bounded cache, and learn what should have stayed.

Every compaction of a replay shows what a network would see, and full KV's attention still to come says which slots were
worth keeping. The first round evicts by the newest queries' attention. Later rounds evict by the networks of the round
before, so that they are fitted to the slots that they themselves leave.

Legend: L bounded layers, H KV heads, N slots that may go, X inputs, S slots that stayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.budget import Budget
from reasonkv.calibration import Calibration, CalibrationError
from reasonkv.calibration.corpus import read_corpus
from reasonkv.calibration.job import CalibrateJob
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.decoding import Request, write_full
from reasonkv.evaluate.generate import room
from reasonkv.evaluate.progress import Progress, silent
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.traces import encode_prompts
from reasonkv.layers import bounded_layers
from reasonkv.methods.base import Requirements
from reasonkv.methods.forecast import Forecast
from reasonkv.methods.ops import top_k_slots
from reasonkv.network import FORECAST_ATTENTION, FORECAST_FEATURES, Network
from reasonkv.plan import Plan
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.tasks import Task, TaskOptions
from reasonkv.view import SlotView

BUDGETS = (64, 128, 256)
"""Tokens kept beside the prompt; rows take turns. Compactions come every half of it."""
ROUNDS, UNITS, EPOCHS, RATE = 2, 32, 8, 5e-3
_ATTENTION, _VALUE = -7, -1  # places among a slot's inputs
_ANSWER = 1024  # most tokens of an answer, unless the job has a window
_BATCH = 8  # rows replayed at once
_COMPACTIONS = 4  # of one optimizer step
_MOST_BYTES = 2**31  # of what is recorded in a round
_HELD_OUT = 8  # every eighth row is not fitted to


class Compaction(NamedTuple):
    """One compaction of one row, in all bounded layers: float16 inputs [L, H, N, X], targets [L, H, N], S, and the row.

    Of one layer, without L.
    """

    inputs_LHNX: Tensor
    target_LHN: Tensor
    stayed: int
    row: int


class Fitted(NamedTuple):
    """The networks, and how well they do on every eighth text, which they were not fitted to."""

    network: Network  # of all layers' KV heads
    compactions: int  # that they were fitted to
    # of the target that the best choice holds, what a choice by them holds; None where no text is left over
    share: float | None = None
    attention_share: float | None = None  # the same of a choice by the newest queries' attention


def fit_forecast(
    model: PreTrainedModel,
    rows: Sequence[TraceRow],
    calibration: Calibration,
    *,
    budgets: Sequence[int] = BUDGETS,
    rounds: int = ROUNDS,
    seed: int = 0,
    queries: bool = True,
    progress: Progress = silent,
) -> Fitted:
    """Fit a network per KV head to full KV's attention still to come (see the module).

    Target of a slot that may go: the attention that later queries pay to its token, mean over the query heads of its
    group, times the norm of its value; half of it the sum over those queries, half the largest, each as a share of all
    such slots. Loss: cross entropy of the scores' softmax. AdamW, and a cosine from `RATE` to 0.

    Args:
        rows: texts, each with its prompt, which never goes.
        calibration: the model's statistics, beside which the networks will stand.
        budgets: tokens kept beside the prompt; rows take turns.
        rounds: replays of all rows.
        seed: of the first weights and of the order.
        queries: whether the networks see what the newest queries attend to.

    Raises:
        CalibrationError: the texts are too short for a compaction, or the layers' heads differ in number or size.
        UnsupportedModelError, RotaryError: a model that cannot be bounded.
    """
    held_out = set(range(len(rows))[_HELD_OUT - 1 :: _HELD_OUT])
    network: Network | None = None
    seen: list[Compaction] = []
    for number in range(1, rounds + 1):
        known = calibration if network is None else replace(calibration, forecast=network)
        every = 2 if number < rounds else 1  # the last policy is the one that counts
        places = range(0, len(rows), every)
        found = _record(model, rows, places, known, budgets, partial(progress, f"replay {number}"))
        if len(found) < 2:
            raise CalibrationError(
                f"The texts are too short to fit a forecast: they need {min(budgets) * 3 // 2} tokens after the prompt."
            )
        seen += found  # slots that another policy left are not forgotten
        fitted_to = [one for one in seen if one.row not in held_out]
        fitted_to = fitted_to if queries else [_without_queries(one) for one in fitted_to]
        network = _fit(model, fitted_to, seed, partial(progress, f"fit {number}"))
    assert network is not None
    others = [one for one in seen if one.row in held_out]
    if not others:
        return Fitted(network, len(fitted_to))
    own = network.to(model.device).part(list(bounded_layers(model.config)))
    shown = others if queries else [_without_queries(one) for one in others]
    share = _share(shown, lambda one: _all(own, one.inputs_LHNX.float()))
    by_attention = _share(others, lambda one: one.inputs_LHNX[..., _ATTENTION].float())
    return Fitted(network, len(fitted_to), share, by_attention)


@dataclass(frozen=True)
class _Recorder(Forecast):
    """Evicts as forecast does, or by the newest queries' attention without a network, and records every compaction."""

    sink: Any = field(default_factory=dict)
    every: int = 1

    @property
    def needs(self) -> Requirements:
        return replace(super().needs, future=True)

    def plan(self, view: SlotView, keep: int) -> Plan:
        inputs_BHNX, H = self.inputs(view), view.positions_BHN.shape[1]
        norms_BHN = inputs_BHNX[..., _VALUE].exp()
        sums_BHN, peaks_BHN = (view.future_attention_BHN(how) * norms_BHN for how in ("sum", "max"))
        for place, (row, event) in enumerate(zip(view.rows, view.event_B.tolist(), strict=True)):
            if (row + event) % self.every:
                continue
            is_free_HN = ~view.is_protected_BHN[place]
            free = [torch.unflatten(x[place][is_free_HN], 0, (H, -1)) for x in (inputs_BHNX, sums_BHN, peaks_BHN)]
            inputs_HNX, *parts = free
            target_HN = torch.stack([part / part.sum(-1, keepdim=True).clamp(min=1e-12) for part in parts]).sum(0)
            stayed = keep - int((~is_free_HN[0]).sum())
            self.sink.setdefault((row, event), []).append(Compaction(inputs_HNX.half(), target_HN, stayed, row))
        network = None if view.calibration is None else view.calibration.forecast
        if network is None:
            scores_BHN = inputs_BHNX[..., _ATTENTION] + inputs_BHNX[..., _VALUE]
        else:
            scores_BHN = Forecast.fitted(network, view.keys_BHND.shape[-1]).score(view)
        return Plan(top_k_slots(scores_BHN, keep, view.is_protected_BHN))


def _without_queries(one: Compaction) -> Compaction:
    """Return a compaction without the inputs that come from queries."""
    key = one.inputs_LHNX.shape[-1] - FORECAST_FEATURES
    parts = (one.inputs_LHNX[..., :key], one.inputs_LHNX[..., key + FORECAST_ATTENTION :])
    return one._replace(inputs_LHNX=torch.cat(parts, -1))


def _record(
    model: PreTrainedModel,
    rows: Sequence[TraceRow],
    asked: Sequence[int],
    calibration: Calibration,
    budgets: Sequence[int],
    on_rows: Callable[[int, int], None],
) -> list[Compaction]:
    """Replay the rows asked for, and return their compactions, without those after which nothing is attended to."""
    config, found, done = model.config.get_text_config(), list[Compaction](), 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    a_slot = len(bounded_layers(model.config)) * heads * (calibration.head_dim + 8) * 2
    # a compaction every b / 2 tokens shows 3 b / 2 slots
    size = sum(3 * len(rows[place].output_T) for place in asked) * a_slot
    for turn, tokens in enumerate(budgets):
        places = asked[turn :: len(budgets)]
        for first in range(0, len(places), _BATCH):
            own = places[first : first + _BATCH]
            batch, sink = [rows[place] for place in own], dict[tuple[int, int], list[Compaction]]()
            with CompressedCache(
                model,
                _Recorder(sink=sink, every=-(-size // _MOST_BYTES)),
                Budget(tokens=tokens, interval=tokens // 2, recent=tokens // 4),
                prompt_lengths=[len(row.prompt_P) for row in batch],
                max_length=max(row.fed for row in batch),
                reference=FullAttention.collect(model, batch),
                calibration=calibration,
            ) as cache:
                for _ in feed(model, cache, batch, distances=cache.tokens_to_next_event, score=False):
                    pass
            done += len(batch)
            on_rows(done, len(asked))
            for (row, _), layers in sink.items():
                if len({one.inputs_LHNX.shape for one in layers}) > 1:
                    raise CalibrationError("The model's layers differ in their heads, so one forecast cannot fit them.")
                inputs_LHNX = torch.stack([one.inputs_LHNX for one in layers])
                target_LHN = torch.stack([one.target_LHN for one in layers])
                if bool((target_LHN.sum(-1) > 0).all()):
                    found.append(Compaction(inputs_LHNX, target_LHN, layers[0].stayed, own[row]))
    return found


def _fit(model: PreTrainedModel, seen: Sequence[Compaction], seed: int, on_step: Callable[[int, int], None]) -> Network:
    """Return networks fitted to compactions, with an axis for all layers of the model in front."""
    L, H, _, X = seen[0].inputs_LHNX.shape
    device = seen[0].inputs_LHNX.device
    sample_LHnX = torch.cat([one.inputs_LHNX for one in seen[:: -(-len(seen) // 64)]], 2).float()
    mean_LHX, deviation_LHX = sample_LHnX.mean(2), sample_LHnX.std(2).clamp(min=1e-3)
    weights = list(Network.fresh(L, H, X, UNITS, seed).to(device).tensors().values())
    ends = [torch.stack([getattr(one.inputs_LHNX, how)(2) for one in seen]) for how in ("amin", "amax")]
    scaled = [(end.float() - mean_LHX) / deviation_LHX for end in (ends[0].amin(0), ends[1].amax(0))]
    network = Network(*weights[:4], *scaled)
    weights = [weight.requires_grad_() for weight in weights[:4]]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    steps = [
        order[first : first + _COMPACTIONS]
        for order in (torch.randperm(len(seen), generator=generator).tolist() for _ in range(EPOCHS))
        for first in range(0, len(order), _COMPACTIONS)
    ]
    with torch.enable_grad():
        for step, chosen in enumerate(steps):
            losses = []
            for one in (seen[place] for place in chosen):
                scaled_LHNX = (one.inputs_LHNX.float() - mean_LHX[:, :, None]) / deviation_LHX[:, :, None]
                share_LHN = one.target_LHN / one.target_LHN.sum(-1, keepdim=True)
                losses.append(-(share_LHN * _all(network, scaled_LHNX).log_softmax(-1)).sum())
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / len(steps))) / 2
            optimizer.zero_grad()
            (torch.stack(losses).sum() / len(chosen)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            on_step(step + 1, len(steps))
    fitted = Network(*(x.detach() for x in network.tensors().values())).of_scaled(mean_LHX, deviation_LHX)
    whole = model.config.get_text_config().num_hidden_layers
    own = torch.tensor(bounded_layers(model.config))
    spread = [
        x.new_zeros(whole, *x.shape[1:], device="cpu").index_copy(0, own, x.cpu()) for x in fitted.tensors().values()
    ]
    return Network(*spread)


def _all(network: Network, inputs_LHNX: Tensor) -> Tensor:
    """Return the scores [L, H, N] of all layers at once: layers are taken for heads."""
    flat = Network(*(x.flatten(0, 1) for x in network.tensors().values()))
    return torch.unflatten(flat(inputs_LHNX.flatten(0, 1)[None])[0], 0, inputs_LHNX.shape[:2])


def _share(compactions: Sequence[Compaction], score: Callable[[Compaction], Tensor]) -> float:
    """Return the share of the best choice's target that a choice by scores holds, mean over compactions and heads."""
    shares = []
    for one in compactions:
        best_LH = one.target_LHN.topk(one.stayed, -1).values.sum(-1)
        chosen_LH = one.target_LHN.gather(-1, score(one).topk(one.stayed, -1).indices).sum(-1)
        shares.append((chosen_LH / best_LH).mean())
    return float(torch.stack(shares).mean())


def add_forecast(
    job: CalibrateJob,
    model: PreTrainedModel,
    rows: Sequence[TraceRow],
    calibration: Calibration,
    *,
    progress: Progress = silent,
) -> tuple[Calibration, Fitted]:
    """Return a calibration with the networks that its job asks for beside it, and how well they do.

    Raises:
        CalibrationError, UnsupportedModelError, RotaryError: see `fit_forecast`.
    """
    fitted = fit_forecast(model, rows, calibration, seed=job.seed, queries=not job.without_queries, progress=progress)
    return replace(calibration, forecast=fitted.network), fitted


def texts_of(
    job: CalibrateJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[Task] = (),
    options: TaskOptions | None = None,
    progress: Progress = silent,
) -> list[TraceRow]:
    """Return a job's texts, each with its prompt.

    They are windows of a text file, of which nothing counts as prompt; reference traces of tasks; and full KV's answers
    to tasks in words, which have none.

    Args:
        tasks: those that `job.task` names.
        options: how their problems become prompts.

    Raises:
        CorpusError, TraceError: a text that cannot be read, or a prompt that does not fit.
    """
    asked, known = [task for task in tasks if task.chat], [task for task in tasks if not task.chat]
    rows = list(own_answers(job, model, tokenizer, asked, options, progress))
    if job.text is not None or known:
        passages, _ = read_corpus(job, model, tokenizer, known)
        texts = [(ids_L, 1 if job.text else max(prompt, 1)) for ids_L, prompt in passages]
        rows += [TraceRow(ids_L[:prompt], ids_L[prompt:]) for ids_L, prompt in texts if len(ids_L) > prompt]
    return rows


def own_answers(
    job: CalibrateJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    options: TaskOptions | None = None,
    progress: Progress = silent,
) -> Iterator[TraceRow]:
    """Yield the training problems of a job with what full KV answers, greedily."""
    most, written = job.window or _ANSWER, 0

    def on_tokens(count: int) -> None:
        nonlocal written
        written += count
        progress("tokens of answers", written, most * job.limit * len(tasks))

    for task in tasks:
        problems = [task.problem(example, seed=job.seed, split="train") for example in range(job.limit)]
        prompts = encode_prompts(model, tokenizer, task, problems, options)
        for first in range(0, job.limit, 4 * _BATCH):
            batch = prompts[first : first + 4 * _BATCH]
            requests = [Request(prompt, room(model, len(prompt), most)) for prompt in batch]
            answers = write_full(model, requests, on_tokens=on_tokens)
            yield from (TraceRow(prompt, torch.tensor(one.tokens)) for prompt, one in zip(batch, answers, strict=True))
