"""Self-distillation of a gate: the frozen model shows what it attends to, and the gate learns to predict it.

One sequence at a time: the model reads it once. For some of its queries, the attention to every full page before their
own is the target. Only the gate's parameters are trained.

Legend: H KV heads, g query heads of a group, T sampled queries, L tokens, P pages of c tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.calibration.corpus import Passage, read_corpus, task_passages
from reasonkv.calibration.job import CorpusError
from reasonkv.calibration.queries import attention_weights, rotaries, watched
from reasonkv.identity import model_hash
from reasonkv.layers import bounded_layers
from reasonkv.methods.ops import upcast
from reasonkv.methods.quest import Quest
from reasonkv.methods.seer import SeerAttention, gate_keys, gate_logits, gate_queries
from reasonkv.methods.sparse_read import FullPages, PageView, Parameters, Prepared, SelectionMethod
from reasonkv.rotary import Rotary
from reasonkv.seer.gate import Gate, GateError, random_gate, save_gate
from reasonkv.seer.job import GateRecipe, TrainGateJob
from reasonkv.tasks import Task

_HELD_OUT = 4  # problems of each task, or windows of a text
_PAGES = (4, 8, 16)


class TrainedGate(NamedTuple):
    """What a job made: the gate, what it was trained on, its loss (mean of the last 20 steps), and `attention_kept`.

    `attention_kept` has, by number of pages, the share of attention on the pages that "gate", "untrained gate" and
    "quest" choose; numbers of pages that no held-out sequence has are left out.
    """

    gate: Gate
    source: str
    loss: float
    attention_kept: dict[int, dict[str, float]]


def run(
    job: TrainGateJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[Task] = (),
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainedGate:
    """Train a gate, write it, and measure it.

    Args:
        tasks: those that `job.task` names.
        progress: called with the steps done and the mean loss of the last 20 of them.

    Raises:
        CorpusError: the text cannot be read, or fills no two windows.
        GateError, UnsupportedModelError, RotaryError: see `train_gate`.
        OSError: the file cannot be written.
    """
    passages, source = read_corpus(job, model, tokenizer, tasks)
    rows = list(passages)
    if job.text is None:
        held_out = list(task_passages(model, tokenizer, tasks, limit=_HELD_OUT, seed=job.seed, split="test"))
    elif len(rows) < 2:
        raise CorpusError(f"{job.text} fills one window; give a longer text, or a smaller window.")
    else:
        kept_back = min(_HELD_OUT, len(rows) // 2)
        rows, held_out = rows[:-kept_back], rows[-kept_back:]
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses[:] = [*losses[-19:], loss]
        progress(step, sum(losses) / len(losses))

    gate = train_gate(model, rows, job, source=source, on_step=on_step)
    save_gate(job.out, gate)
    untrained = random_gate(gate.shapes, gate.page_size, gate.model, seed=job.seed)
    kept: dict[int, dict[str, float]] = {}
    for pages in _PAGES:
        with suppress(GateError):  # no sequence has so many pages
            kept[pages] = {
                "gate": kept_attention(model, held_out, SeerAttention(), pages, gate=gate),
                "untrained gate": kept_attention(model, held_out, SeerAttention(), pages, gate=untrained),
                "quest": kept_attention(model, held_out, Quest(page_size=gate.page_size), pages),
            }
    return TrainedGate(gate, source, sum(losses) / len(losses), kept)


def train_gate(
    model: PreTrainedModel,
    rows: Iterable[Passage],
    recipe: GateRecipe,
    *,
    source: str = "",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Gate:
    """Train a gate for a model (SeerAttention-R, section 3.3).

    Target of a query, KV head and page: the largest of the attention weights to the page's tokens and over the query
    heads of the group, divided by the sum over pages. Loss: KL divergence from it to the gate's softmax, over the full
    pages before the query's own, mean over queries and KV heads, summed over layers. AdamW without weight decay.

    Args:
        rows: sequences, begun again when they run out.
        source: what they are, for the gate's file.
        on_step: called with the number of steps done and the step's loss, mean over layers.

    Raises:
        GateError: no sequence is longer than a page, or the loss is not finite.
        UnsupportedModelError, RotaryError: a model that cannot be observed.
    """
    repeated, gate = cycle(rows), None
    for step in range(recipe.steps):
        losses = []
        for row in islice(repeated, recipe.rows):
            seen = _observe(model, row, recipe.queries)
            if gate is None:
                layers = range(model.config.get_text_config().num_hidden_layers)
                shapes = [seen[i].shape if i in seen else None for i in layers]
                gate = random_gate(shapes, recipe.page_size, model_hash(model), seed=recipe.seed, source=source)
                gate = gate.to(model.device)
                trained = [tensor.requires_grad_() for layer in gate.layers for tensor in layer.values()]
                optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
            of_layer = (_loss(gate.layers[number], layer, recipe.page_size) for number, layer in seen.items())
            found = [loss for loss in of_layer if loss is not None]
            if found:
                loss = torch.stack(found).sum() / recipe.rows
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()) * recipe.rows / len(found))
        if gate is None or not losses:
            raise GateError(f"There is nothing to train on: no text has decoded tokens beyond {recipe.page_size}.")
        if not math.isfinite(sum(losses)):
            raise GateError(f"The loss of step {step + 1} is not a number; lower the learning rate.")
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, sum(losses) / len(losses))
    assert gate is not None
    for parameter in trained:
        parameter.requires_grad_(False)
    return gate.to("cpu")


@torch.no_grad()
def kept_attention(
    model: PreTrainedModel,
    rows: Iterable[Passage],
    method: SelectionMethod,
    pages: int,
    *,
    queries: int = 256,
    gate: Gate | None = None,
) -> float:
    """Return the share of full KV's attention that falls on what a selection method reads.

    Mean over queries after the prompt that have more than `pages` pages, their query heads, layers and sequences.

    Args:
        method: its `dense` layers count as any other.
        pages: pages to read, a query's own included.
        queries: most queries of a sequence, spread evenly.
        gate: used instead of the one that the method finds.

    Raises:
        GateError: no query has more pages than that.
    """
    prepared = method.prepare(model) if gate is None else Prepared(gate.page_size, gate.to(model.device).layers)
    c, total, count = prepared.page_size, 0.0, 0
    for row in rows:
        for number, seen in _observe(model, row, queries).items():
            parameters = None if prepared.layers is None else prepared.layers[number]
            (H, _, D), full = seen.shape, seen.keys_HLD.shape[1] // c
            seen = seen.only(seen.positions_T // c >= pages)
            if not len(seen.positions_T):
                continue
            first_n = torch.arange(full, device=seen.keys_HLD.device) * c
            keys_nHcD = seen.keys_HLD[:, : full * c].view(H, full, c, D).transpose(0, 1)
            summaries = method.summarise(FullPages(keys_nHcD, first_n, parameters, seen.rotary))
            state = {name: summary.transpose(0, 1)[None] for name, summary in summaries.items()}
            queries_1HqTD = seen.queries_HgTD.flatten(0, 1)[None]
            view = PageView(state, queries_1HqTD, seen.positions_T[None], c, parameters, seen.rotary)
            chosen_HgTP = torch.unflatten(method.select(view, [pages])[0], 0, (H, -1))
            weights_HgTL = _attention(seen)
            page_L = torch.arange(seen.keys_HLD.shape[1], device=weights_HgTL.device) // c
            own_T1 = view.own_Bq[0, :, None]
            read_HgTL = chosen_HgTP[..., page_L.clamp(max=full - 1)] & (page_L < own_T1) | (page_L == own_T1)
            kept_HgT = (weights_HgTL * read_HgTL).sum(-1) / weights_HgTL.sum(-1)
            total, count = total + float(kept_HgT.mean(1).sum()), count + H * len(seen.positions_T)
    if not count:
        raise GateError(f"No text has a query after its prompt with more than {pages} pages of {c} tokens.")
    return total / count


class _Seen(NamedTuple):
    """One layer of one sequence: rotated queries after the prompt, their token indices, all rotated keys.

    `options` are those of the model's attention: scaling, softcap and learned sinks (`s_aux`).
    """

    queries_HgTD: Tensor
    positions_T: Tensor
    keys_HLD: Tensor
    rotary: Rotary
    options: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, g and D."""
        H, g, _, D = self.queries_HgTD.shape
        return H, g, D

    def only(self, asked_T: Tensor) -> _Seen:
        """Return some of the queries."""
        return self._replace(queries_HgTD=self.queries_HgTD[:, :, asked_T], positions_T=self.positions_T[asked_T])


@torch.no_grad()
def _observe(model: PreTrainedModel, row: Passage, queries: int) -> dict[int, _Seen]:
    """Let the model read a sequence; what its full-attention layers asked and held, by their index."""
    rotary_L, bounded, found = rotaries(model), bounded_layers(model.config), {}
    after = max(len(row.ids_L) - row.prompt, 0)
    taken = min(queries, after)
    positions_T = row.prompt + (torch.arange(taken, device=model.device) * after) // max(taken, 1)

    def watch(layer: int, query_1HqLD: Tensor, key_1HLD: Tensor, options: dict[str, Any]) -> None:
        if layer in bounded:
            queries_HgTD = torch.unflatten(query_1HqLD[0][:, positions_T], 0, (key_1HLD.shape[1], -1))
            found[layer] = _Seen(upcast(queries_HgTD), positions_T, upcast(key_1HLD[0]), rotary_L[layer], options)

    with watched(model, watch) as arguments:
        model.get_decoder()(input_ids=row.ids_L[None].to(model.device), use_cache=False, **arguments)
    return found


def _attention(seen: _Seen) -> Tensor:
    """The model's attention weights [H, g, T, L]."""
    scaling, softcap, sinks = (seen.options.get(name) for name in ("scaling", "softcap", "s_aux"))
    return attention_weights(
        seen.queries_HgTD, seen.keys_HLD, seen.positions_T, scaling=scaling or seen.shape[2] ** -0.5, softcap=softcap,
        sinks=sinks,
    )  # fmt: skip


def _loss(parameters: Parameters, seen: _Seen, c: int) -> Tensor | None:
    """KL divergence of one layer, or None where no query has two full pages before its own."""
    seen = seen.only(seen.positions_T // c >= 2)  # one page alone leaves nothing to choose
    if not len(seen.positions_T):
        return None
    (H, _, D), own_T = seen.shape, seen.positions_T // c
    P = int(own_T.max())
    first_P = torch.arange(P, device=own_T.device) * c
    before_TP = torch.arange(P, device=own_T.device) < own_T[:, None]
    with torch.no_grad():
        peak_HTP = _attention(seen)[..., : P * c].reshape(H, -1, len(before_TP), P, c).amax((1, -1)) * before_TP
        target_HTP = peak_HTP / peak_HTP.sum(-1, keepdim=True).clamp(min=1e-12)
        place_Pc = first_P[:, None] + torch.arange(c, device=own_T.device)
        plain_HPcD = seen.rotary.unrotate(seen.keys_HLD[:, : P * c].view(H, P, c, D), place_Pc)
        plain_HgTD = seen.rotary.unrotate(seen.queries_HgTD, seen.positions_T)
    keys_HPE = gate_keys(parameters, plain_HPcD.transpose(0, 1), first_P, seen.rotary).transpose(0, 1)
    queries_HTE = gate_queries(parameters, plain_HgTD[None], seen.positions_T[None, None], seen.rotary)[0]
    logits_HTP = gate_logits(queries_HTE[None], keys_HPE[None])[0].masked_fill(~before_TP, float("-inf"))
    log_gate_HTP = logits_HTP.log_softmax(-1).masked_fill(~before_TP, 0.0)
    per_query_HT = (torch.special.xlogy(target_HTP, target_HTP) - target_HTP * log_gate_HTP).sum(-1)
    loss: Tensor = per_query_HT.mean()
    return loss
