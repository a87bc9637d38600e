"""The model `reasonkv` of lm-evaluation-harness: its own `hf` model with a bounded KV cache.

    python -m reasonkv.lm_eval --model reasonkv --model_args pretrained=MODEL,method=cask,tokens=1024 --tasks gsm8k

Generation goes through `model.generate` as before, with a `CompressedCache`. Log-likelihoods come from a replay: the
context is the prompt, and the continuation is fed through the bounded cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from reasonkv.budget import Budget, BudgetFields
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.methods import get_method, refuse_future
from reasonkv.resolve import resolve_budget
from reasonkv.runtimes.transformers import CompressedCache, RowStats

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of context and continuation, or None, and their token ids."""

_AUTO_BATCH = 8  # sequences of a replay under --batch_size auto


@register_model("reasonkv")
class BoundedLM(HFLM):
    """lm-eval's `hf` model with a bounded cache.

    Args:
        pretrained: folder, hub name, or a model.
        method: a method or its spec; options are separated by semicolons, as in rkv:window=16;kernel=5.
        calibration: statistics of the model's queries, for methods that need them; looked up unless given.
        seed: of methods that draw random numbers.
        kv_dtype: of the slots that a bounded method keeps, as `dtype` of `CompressedCache`.
        options: fields of `reasonkv.Budget` (tokens, keep, interval, prompt, ...), and arguments of lm-eval's `hf`.

    Raises:
        MethodError, BudgetError: an unknown method, or a budget that does not fit it.
        UnsupportedModelError: the model's attention cannot be bounded.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        method: Any = "full",
        calibration: str | None = None,
        seed: int = 0,
        kv_dtype: Any = None,
        **options: Any,
    ) -> None:
        chosen = get_method(method.replace(";", ",") if isinstance(method, str) else method)
        refuse_future(chosen)
        given = {name: options.pop(name) for name in BudgetFields.__annotations__ if name in options}
        resolve_budget(chosen, Budget.from_fields(None, given))  # mistakes are reported before the model is loaded
        super().__init__(pretrained=pretrained, **options)
        if self.backend != "causal":
            raise ReasonKVError("A bounded cache needs a decoder-only model; use backend=causal.")
        self.method = chosen.for_tokenizer(self.tokenizer)
        self.budget = Budget.from_fields(None, given)
        self.cache_options: dict[str, Any] = {"seed": seed, "calibration": calibration, "dtype": kv_dtype}
        self.measured: list[RowStats] = []
        cache = self.open_cache()  # a model that cannot be bounded is reported before the tasks are loaded
        cache.detach()
        if self.budget is not None and self.budget.layer_shares:
            self.budget = cache.budget  # calibrated shares as numbers

    def open_cache(self, **more: Any) -> CompressedCache:
        """Return an empty cache."""
        return CompressedCache(self.model, self.method, self.budget, **self.cache_options, **more)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        if (generation.get("num_beams") or 1) > 1:
            raise ReasonKVError("Beams share a cache, so no stats of one sequence exist; leave num_beams out.")
        out: Tensor = super()._model_generate(context, max_length, stop, custom_generate=self._decode, **generation)
        return out

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList,
        **prepared: Any,
    ) -> Any:
        """Decode as `generate` would, with our cache, and keep the stats of each sequence at its end."""
        with self.open_cache(max_length=generation_config.max_length) as cache:
            ends = _Ends(stopping_criteria)
            ends.cache, ends.rows = cache, {}
            prepared |= {"past_key_values": cache, "stopping_criteria": ends}
            out = model._sample(input_ids, generation_config=generation_config, **prepared)
        self.measured += ends.rows.values()
        return out

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the continuation's log-likelihood and whether it is what greedy decoding writes."""
        found: list[tuple[float, bool]]
        if not self.method.bounded:
            found = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
            return found
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else _AUTO_BATCH)
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at][1]) - len(requests[at][2]))
        found = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Replaying loglikelihood requests")
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for at, answer in zip(batch, self._replay([requests[at] for at in batch]), strict=True):
                found[at] = answer
                if requests[at][0] is not None:  # windows of a rolling request are stored by their caller
                    self.cache_hook.add_partial("loglikelihood", requests[at][0], answer)
            bar.update(len(batch))
        bar.close()
        return found

    def _replay(self, batch: Sequence[Request]) -> list[tuple[float, bool]]:
        rows = [
            # too long for the model: the beginning is cut off, as lm-eval does
            TraceRow(torch.tensor(context[-(self.max_length + 1 - len(answer)) :]), torch.tensor(answer))
            for _, context, answer in batch
        ]
        sums, greedy = [0.0] * len(rows), [True] * len(rows)
        prompts = [len(row.prompt_P) for row in rows]
        with self.open_cache(prompt_lengths=prompts, max_length=max(row.fed for row in rows)) as cache:
            for scored in feed(self.model, cache, rows, distances=cache.tokens_to_next_event):
                logits_NV = scored.logits_NV.float()
                tokens_N = rows[scored.row].output_T[scored.start : scored.start + len(logits_NV)].to(logits_NV.device)
                sums[scored.row] += float(logits_NV.log_softmax(-1).gather(1, tokens_N[:, None]).sum())
                greedy[scored.row] &= bool((logits_NV.argmax(-1) == tokens_N).all())
            self.measured += cache.stats().rows
        return list(zip(sums, greedy, strict=True))

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval says about the model, and what its caches held."""
        info: dict[str, Any] = super().get_model_info()
        held: dict[str, Any] = {
            "method": self.method.spec(),
            "budget": None if self.budget is None else self.budget.to_dict(),
            "sequences": len(self.measured),
        }
        if self.measured:
            held |= {
                "mean_tokens_seen": fmean(row.length for row in self.measured),
                "mean_kept_tokens": fmean(row.physical_terminal for row in self.measured),
                "mean_attended_tokens": fmean(row.physical_mean for row in self.measured),
                "mean_compactions": fmean(row.events for row in self.measured),
            }
        return info | {"reasonkv": held}


class _Ends(StoppingCriteriaList):
    """Stopping criteria that keep the stats of a sequence when it ends: later tokens of it are padding."""

    cache: CompressedCache
    rows: dict[int, RowStats]

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        done_B: Tensor = super().__call__(input_ids, scores, **more)
        ended = [row for row in done_B.nonzero()[:, 0].tolist() if row not in self.rows]
        if ended:
            stats = self.cache.stats().rows
            self.rows |= {row: stats[row] for row in ended}
        return done_B
