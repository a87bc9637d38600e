"""Self-distillation of a gate: the model, frozen, shows what it attends to, and the gate learns to expect it.

One row (a text) at a time: the model reads it once, and of some of its queries the attention to every full page before
their own is the target. The gate's parameters alone are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.calibration.corpus import text_batches
from reasonkv.evaluate.generate import encode, end_tokens
from reasonkv.evaluate.reference import QueryRecorder
from reasonkv.identity import model_hash
from reasonkv.methods.ops import upcast
from reasonkv.methods.seer import gate_keys, gate_logits, gate_queries
from reasonkv.methods.sparse_read import FullPages, PageView, Parameters, SelectionMethod
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.runtimes.transformers.attention import LogitRule
from reasonkv.runtimes.transformers.setup import rotary_of
from reasonkv.seer.gate import Gate, GateError, random_gate
from reasonkv.tasks import Task


class TrainingRow(NamedTuple):
    """One text, int64 ids [L], and how many of its first tokens are prompt, whose queries attend to everything."""

    ids_L: Tensor
    prompt: int


@dataclass(frozen=True)
class GateRecipe:
    """How a gate is trained; the defaults are the paper's, but for `queries` and what a row is.

    Args:
        page_size: tokens of a page.
        steps: optimizer steps.
        rows: rows of one step.
        queries: most queries of a row that are trained on, spread evenly over those after its prompt.
        rate: peak of the learning rate, reached after `warmup` steps and followed by a cosine down to a hundredth.
        warmup: steps.
        seed: of the first weights.

    """

    page_size: int = 64
    steps: int = 800
    rows: int = 16
    queries: int = 256
    rate: float = 1e-3
    warmup: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("page_size", "steps", "rows", "queries"):
            if getattr(self, name) < 1:
                raise GateError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train_gate(
    model: PreTrainedModel,
    rows: Iterable[TrainingRow],
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
        model: a causal language model; it is not changed.
        rows: texts, begun again when they run out.
        recipe: how.
        source: what `rows` are, for the record.
        on_step: called with the number of steps done and the step's loss, mean over layers.

    Raises:
        GateError: no row is longer than a page, or the loss is not finite.
        UnsupportedModelError, RotaryError: a model that cannot be observed.
    """
    repeated = cycle(rows)
    rotary = rotary_of(model)
    gate: Gate | None = None
    optimizer: torch.optim.AdamW | None = None
    for step in range(recipe.steps):
        losses = []
        for row in islice(repeated, recipe.rows):
            seen = _observe(model, row, recipe.queries)
            if gate is None:
                gate = _new_gate(model, seen, recipe, source)
                optimizer = torch.optim.AdamW(_trained(gate), lr=recipe.rate, weight_decay=0.0)
            found = [
                loss
                for number, layer in seen.items()
                if (loss := _loss(gate.layers[number], layer, recipe.page_size, rotary)) is not None
            ]
            if found:
                loss = torch.stack(found).sum() / recipe.rows
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()) * recipe.rows / len(found))
        if gate is None or optimizer is None or not losses:
            raise GateError(f"There is nothing to train on: no text has decoded tokens beyond {recipe.page_size}.")
        if not math.isfinite(sum(losses)):
            raise GateError(f"The loss of step {step + 1} is not a number; lower the learning rate.")
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, sum(losses) / len(losses))
    assert gate is not None
    for parameter in _trained(gate):
        parameter.requires_grad_(False)
    return gate.to("cpu")


@torch.no_grad()
def kept_attention(
    model: PreTrainedModel,
    rows: Iterable[TrainingRow],
    method: SelectionMethod,
    pages: int,
    *,
    queries: int = 256,
) -> float:
    """Share of full KV's attention that falls on what a selection method reads.

    Mean over queries after the prompt that have more than `pages` pages, their query heads, layers and rows.

    Args:
        model: a causal language model.
        rows: texts.
        method: the method; its `dense` layers count as any other.
        pages: pages to read, a query's own included.
        queries: most queries of a row, spread evenly.

    Raises:
        GateError: no query has more pages than that.
    """
    prepared = method.prepare(model)
    rotary, c = rotary_of(model), prepared.page_size
    total, count = 0.0, 0
    for row in rows:
        for number, seen in _observe(model, row, queries).items():
            parameters = None if prepared.layers is None else prepared.layers[number]
            H, full = seen.keys_HLD.shape[0], seen.keys_HLD.shape[1] // c
            asked_T = seen.positions_T // c >= pages
            if not asked_T.any():
                continue
            first_n = torch.arange(full, device=seen.keys_HLD.device) * c
            keys_nHcD = seen.keys_HLD[:, : full * c].view(H, full, c, -1).transpose(0, 1)
            summaries = method.summarise(FullPages(keys_nHcD, first_n, parameters, rotary))
            state = {name: summary.transpose(0, 1)[None] for name, summary in summaries.items()}
            position_1T = seen.positions_T[asked_T][None]
            view = PageView(
                state, seen.queries_HgTD[:, :, asked_T].flatten(0, 1)[None], position_1T, c, parameters, rotary
            )
            chosen_HTP = method.select(view, [pages])[0]
            chosen_HgTP = chosen_HTP.view(H, -1, *chosen_HTP.shape[1:])
            weights_HgTL = _attention(seen)[:, :, asked_T]
            page_L = torch.arange(seen.keys_HLD.shape[1], device=weights_HgTL.device) // c
            own_TL = page_L == view.own_Bq[0, :, None]
            read_HgTL = chosen_HgTP[..., page_L.clamp(max=full - 1)] & (page_L < view.own_Bq[0, :, None]) | own_TL
            kept_HgT = (weights_HgTL * read_HgTL).sum(-1) / weights_HgTL.sum(-1)
            total, count = total + float(kept_HgT.mean(1).sum()), count + H * int(asked_T.sum())
    if not count:
        raise GateError(f"No text has a query after its prompt with more than {pages} pages of {c} tokens.")
    return total / count


def task_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int,
    seed: int = 0,
    split: str = "train",
    context: int | None = None,
) -> Iterator[TrainingRow]:
    """Prompts with their reference traces; tasks take turns.

    Args:
        model: for its end-of-sequence token.
        tokenizer: the model's.
        tasks: task families.
        limit: problems of each.
        seed: of the problems.
        split: "train", so that nothing is trained on what it is tested with.
        context: most tokens of a row.
    """
    end = end_tokens(model)[:1]
    for example in range(limit):
        for task in tasks:
            problem = task.problem(example, seed=seed, split=split)
            prompt = len(encode(tokenizer, problem.prompt))
            ids = encode(tokenizer, f"{problem.prompt} {problem.trace}").tolist() + end
            yield TrainingRow(torch.tensor(ids[:context]), prompt)


def text_rows(tokenizer: PreTrainedTokenizerBase, path: Path, *, tokens: int, window: int) -> Iterator[TrainingRow]:
    """Windows of a text file, whose first halves count as prompt, as in the paper.

    Raises:
        CalibrationError: the file is missing, empty, or not UTF-8.
    """
    for ids_1T in text_batches(tokenizer, path, tokens=tokens, window=window, batch_size=1):
        yield TrainingRow(ids_1T[0], ids_1T.shape[1] // 2)


# -- internals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """One layer of one row: rotated queries after the prompt [H, g, T, D], their token indices, all rotated keys."""

    queries_HgTD: Tensor
    positions_T: Tensor
    keys_HLD: Tensor
    rule: LogitRule


@torch.no_grad()
def _observe(model: PreTrainedModel, row: TrainingRow, queries: int) -> dict[int, _Seen]:
    """The model reads a row; what its full-attention layers asked and held."""
    L, device = len(row.ids_L), model.device
    after = max(L - row.prompt, 0)
    taken = min(queries, after)
    positions_T = row.prompt + (torch.arange(taken, device=device) * after) // max(taken, 1)
    found = {}
    with CompressedCache(model, QueryRecorder(L), prompt_lengths=[L], max_length=L) as cache:
        model.get_decoder()(
            input_ids=row.ids_L[None].to(device), past_key_values=cache, use_cache=True,
            attention_mask=torch.ones(1, L, dtype=torch.long, device=device),
        )  # fmt: skip
        for layer in cache.compressed_layers:
            storage = layer.storage
            assert storage is not None and storage.keys is not None and storage.ring is not None
            assert layer.rule is not None
            queries_HqTD, keys_HLD = storage.ring[0, positions_T].transpose(0, 1), storage.keys[0, :, :L]
            queries_HgTD = queries_HqTD.view(keys_HLD.shape[0], -1, *queries_HqTD.shape[1:])
            found[layer.index] = _Seen(upcast(queries_HgTD), positions_T, upcast(keys_HLD), layer.rule)
    return found


def _new_gate(model: PreTrainedModel, seen: dict[int, _Seen], recipe: GateRecipe, source: str) -> Gate:
    count = model.config.get_text_config().num_hidden_layers
    shapes = [
        (*seen[number].queries_HgTD.shape[:2], seen[number].keys_HLD.shape[2]) if number in seen else None
        for number in range(count)
    ]
    gate = random_gate(shapes, recipe.page_size, model_hash(model), seed=recipe.seed, source=source).to(model.device)
    for parameter in _trained(gate):
        parameter.requires_grad_(True)
    return gate


def _trained(gate: Gate) -> list[Tensor]:
    return [tensor for layer in gate.layers for tensor in layer.values()]


def _attention(seen: _Seen) -> Tensor:
    """The model's attention weights [H, g, T, L]."""
    logits = (seen.queries_HgTD * seen.rule.scaling) @ seen.keys_HLD[:, None].mT
    if seen.rule.softcap is not None:
        logits = seen.rule.softcap * torch.tanh(logits / seen.rule.softcap)
    later_TL = torch.arange(seen.keys_HLD.shape[1], device=logits.device) > seen.positions_T[:, None]
    logits = logits.masked_fill(later_TL, float("-inf"))
    if seen.rule.sinks is None:
        return logits.softmax(-1)
    H, g, T, _ = logits.shape
    sinks = seen.rule.sinks.to(logits.dtype).view(H, g, 1, 1).expand(H, g, T, 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


def _loss(parameters: Parameters, seen: _Seen, c: int, rotary: Rotary) -> Tensor | None:
    """KL divergence of one layer, or None where no query has two full pages before its own."""
    own_T = seen.positions_T // c
    P = int(own_T.max()) if len(own_T) else 0
    asked_T = own_T >= 2  # one page alone leaves nothing to choose
    if P < 2 or not asked_T.any():
        return None
    seen = _Seen(seen.queries_HgTD[:, :, asked_T], seen.positions_T[asked_T], seen.keys_HLD, seen.rule)
    H, _, D = seen.keys_HLD.shape
    first_P = torch.arange(P, device=own_T.device) * c
    before_TP = torch.arange(P, device=own_T.device) < own_T[asked_T][:, None]
    with torch.no_grad():
        peak_HTP = _attention(seen)[..., : P * c].reshape(H, -1, len(before_TP), P, c).amax((1, -1)) * before_TP
        target_HTP = peak_HTP / peak_HTP.sum(-1, keepdim=True).clamp(min=1e-12)
        place_Pc = first_P[:, None] + torch.arange(c, device=own_T.device)
        plain_HPcD = rotary.unrotate(seen.keys_HLD[:, : P * c].view(H, P, c, D), place_Pc)
        plain_HgTD = rotary.unrotate(seen.queries_HgTD, seen.positions_T)
    keys_HPE = gate_keys(parameters, plain_HPcD.transpose(0, 1), first_P, rotary).transpose(0, 1)
    queries_HTE = gate_queries(parameters, plain_HgTD[None], seen.positions_T[None, None], rotary)[0]
    logits_HTP = gate_logits(queries_HTE[None], keys_HPE[None])[0].masked_fill(~before_TP, float("-inf"))
    log_gate_HTP = logits_HTP.log_softmax(-1).masked_fill(~before_TP, 0.0)
    per_query_HT = (torch.special.xlogy(target_HTP, target_HTP) - target_HTP * log_gate_HTP).sum(-1)
    loss: Tensor = per_query_HT.mean()
    return loss
