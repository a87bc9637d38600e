"""Methods that carry a number beside every slot: each equals a reference that attends one query at a time.

One KV head with two query heads decodes 62 tokens and compacts every 8, with sinks and the newest tokens protected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from slot_views import make_view
from torch import Tensor

from reasonkv import noise
from reasonkv.methods.base import Method, Observed
from reasonkv.methods.gkv import GKV
from reasonkv.methods.inertiakv import InertiaKV
from reasonkv.methods.keyformer import Keyformer
from reasonkv.methods.lazyeviction import LazyEviction
from reasonkv.methods.raas import RaaS
from reasonkv.methods.rkv import mean_cosine
from reasonkv.methods.sagekv import SageKV
from reasonkv.rotary import Rotary

D, TOKENS, PROMPT, KEEP, INTERVAL, SINKS, RECENT = 16, 62, 14, 22, 8, 2, 2
WINDOW = KEEP + INTERVAL


class Slow:
    """What a reference is shown: every query's attention as it comes, and what is held at a compaction."""

    def __init__(self, keys: Tensor, queries: Tensor) -> None:
        self.keys, self.queries = keys[0, 0].double(), queries[0].double()
        self.events = 0

    def logits(self, q: int, t: int, held: list[int]) -> Tensor:
        return self.keys[held] @ self.queries[q, t] * D**-0.5

    def attention(self, t: int, held: list[int]) -> dict[int, float]:
        """Mean over the two query heads."""
        rows = [self.logits(q, t, held).softmax(0) for q in range(2)]
        return dict(zip(held, ((rows[0] + rows[1]) / 2).tolist(), strict=True))

    def step(self, t: int, held: list[int]) -> None:
        """Take in the query of token t, whose slot is the last one held."""

    def scores(self, held: list[int]) -> dict[int, float]:
        """What slots are ranked by at a compaction."""
        raise NotImplementedError

    def after(self, kept: list[int]) -> None:
        """Be told what a compaction left."""


def play(method: Method, slow_of: Callable[[Tensor, Tensor], Slow], names: tuple[str, ...] = ()) -> None:
    draw = torch.Generator().manual_seed(3)
    keys, queries = torch.randn(1, 1, TOKENS, D, generator=draw), 2 * torch.randn(1, 2, TOKENS, D, generator=draw)
    keys[:, :, 1] *= 3  # a sink that some queries attend to most
    slow, recent = slow_of(keys, queries), max(RECENT, method.needs.recent)
    held: list[int] = []
    initial = {name: float(one.initial) for name, one in method.needs.slot_state.items()}
    stored: dict[str, Tensor] = {name: torch.empty(0) for name in initial}
    row_state = method.new_row_state(1, 2, D, keys.device) if method.needs.observes else {}
    last = 0
    for t in range(TOKENS):
        held.append(t)
        slow.step(t, held)
        if method.needs.observes and t + 1 >= PROMPT:
            at = torch.arange(last, t + 1)[None]
            method.observe(row_state, Observed(queries[:, :, last : t + 1], at, at >= 0, 0, Rotary(torch.ones(D // 2))))
            last = t + 1
        if len(held) < KEEP + INTERVAL:
            continue
        T = min(method.needs.queries, t + 1)
        view = make_view(
            keys[:, :, held], queries[:, :, t + 1 - T : t + 1], positions=torch.tensor(held), sinks=SINKS,
            recent=recent, prompt=PROMPT, event=slow.events,
        )  # fmt: skip
        state = {
            name: torch.cat([stored[name], torch.full((len(held) - len(stored[name]),), start)])[None, None]
            for name, start in initial.items()
        }
        view = replace(view, state=state, row_state=row_state, prompt_length_B=torch.tensor([PROMPT]))
        plan = method.plan(view, KEEP)
        scores = slow.scores(held)
        middle = sorted(held[SINKS : len(held) - recent], key=lambda slot: (-scores[slot], -slot))
        kept = sorted(held[:SINKS] + middle[: KEEP - SINKS - recent] + held[len(held) - recent :])
        assert [held[slot] for slot in plan.kept_BHK[0, 0].tolist()] == kept
        held, slow.events = kept, slow.events + 1
        slow.after(kept)
        stored = {name: plan.state[name][0, 0] for name in initial}
        for name in names:
            expected = [getattr(slow, name).get(slot, -1.0) for slot in held]
            assert stored[name].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert slow.events == 5


# --------------------------------------------------------------------------------------------------------------- g-kv


class SlowGKV(Slow):
    def __init__(self, keys: Tensor, queries: Tensor, method: GKV) -> None:
        super().__init__(keys, queries)
        self.method, self.score = method, dict[int, float]()

    def scores(self, held: list[int]) -> dict[int, float]:
        W, now = self.method.window, held[-1]
        old, total = held[: len(held) - W], torch.zeros(len(held) - W, dtype=torch.float64)
        for t in range(now - W + 1, now + 1):  # maximum over the group for every query, then the mean
            seen = [slot for slot in held if slot <= t]
            total += torch.stack([self.logits(q, t, seen).softmax(0)[: len(old)] for q in range(2)]).amax(0) / W
        counted = total if self.method.variant == "paper" else total[SINKS:]
        new = dict(zip(old, (total / counted.max()).tolist(), strict=True))
        a, before = self.method.alpha, self.score
        update = {
            "max": lambda f, s: max(a * f, s),
            "mean": lambda f, s: a * f + (1 - a) * s,
            "sum": lambda f, s: a * f + s,
        }[self.method.memory]
        self.score = {slot: update(before[slot], s) if slot in before else s for slot, s in new.items()}
        half = self.method.kernel // 2
        ranked = {
            slot: max(self.score[other] for other in old[max(0, i - half) : i + half + 1]) for i, slot in enumerate(old)
        }
        if self.method.weight < 1:
            same = mean_cosine(self.keys[None, None, held])[0, 0].softmax(0)[: len(old)]
            same = same / (same if self.method.variant == "paper" else same[SINKS:]).max()
            w = self.method.weight
            ranked = {slot: w * ranked[slot] - (1 - w) * float(same[i]) for i, slot in enumerate(old)}
        return {slot: ranked.get(slot, math.inf) for slot in held}

    def after(self, kept: list[int]) -> None:
        self.score = {slot: self.score[slot] for slot in kept if slot in self.score}


@pytest.mark.parametrize(
    "method",
    [
        GKV(),
        GKV("paper", kernel=5),
        GKV(memory="mean", alpha=0.6, window=4),
        GKV(memory="sum", kernel=3),
        GKV("paper", weight=0.3),
    ],
    ids=lambda method: method.spec(),
)
def test_gkv_remembers_the_largest_attention_of_earlier_compactions(method: GKV) -> None:
    play(method, lambda keys, queries: SlowGKV(keys, queries, method), ("score",))


# ------------------------------------------------------------------------------------------------------- lazyeviction


class SlowLazy(Slow):
    """Activations and gaps of every token, by the two rules of the paper."""

    def __init__(self, keys: Tensor, queries: Tensor, alpha: float) -> None:
        super().__init__(keys, queries)
        self.alpha, self.activated, self.interval = alpha, dict[int, float](), dict[int, float]()

    def step(self, t: int, held: list[int]) -> None:
        self.activated[t], self.interval[t] = t, 0.0
        for slot, weight in self.attention(t, held).items():
            if weight >= self.alpha:
                self.interval[slot] = max(self.interval[slot], t - self.activated[slot])
                self.activated[slot] = t

    def scores(self, held: list[int]) -> dict[int, float]:
        return {slot: lazy_score(held[-1] - self.activated[slot], self.interval[slot]) for slot in held}


def lazy_score(age: float, interval: float) -> float:
    if interval == 0:
        return float(age == 0)
    return 2 / (1 + math.exp(age / interval)) + 2 / (1 + math.exp(interval + 1))


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_lazyeviction_tracks_the_longest_pause_of_every_slot(alpha: float) -> None:
    method = LazyEviction(alpha=alpha, window=WINDOW)
    play(method, lambda keys, queries: SlowLazy(keys, queries, alpha), ("activated", "interval"))


# --------------------------------------------------------------------------------------------------------------- raas


class SlowRaaS(Slow):
    def __init__(self, keys: Tensor, queries: Tensor, method: RaaS) -> None:
        super().__init__(keys, queries)
        self.method, self.stamps = method, dict[int, float]()

    def step(self, t: int, held: list[int]) -> None:
        page_of = {slot: slot // self.method.page for slot in held}
        self.stamps[page_of[t]] = max(t, self.stamps.get(page_of[t], -1))
        paid = dict.fromkeys((page_of[slot] for slot in held[SINKS:]), 0.0)  # sinks are in no page
        for slot, weight in self.attention(t, held).items():
            if slot in held[SINKS:]:
                paid[page_of[slot]] += weight
        used = sorted(paid, key=lambda page: -paid[page])[: math.ceil(self.method.share * len(paid))]
        if self.method.rule == "alpha":
            used = [page for page in paid if paid[page] > self.method.alpha]
        for page in used:
            self.stamps[page] = t

    def scores(self, held: list[int]) -> dict[int, float]:
        self.stamp = {slot: self.stamps[slot // self.method.page] for slot in held}
        return self.stamp


@pytest.mark.parametrize(
    "method",
    [RaaS(page=4, window=WINDOW), RaaS(page=3, share=0.2, window=WINDOW), RaaS(4, "alpha", alpha=0.2, window=WINDOW)],
    ids=lambda method: method.spec(),
)
def test_raas_evicts_the_pages_whose_last_use_is_oldest(method: RaaS) -> None:
    play(method, lambda keys, queries: SlowRaaS(keys, queries, method), ("stamp",))


# ---------------------------------------------------------------------------------------------------------- inertiakv


class SlowInertia(Slow):
    def __init__(self, keys: Tensor, queries: Tensor, method: InertiaKV) -> None:
        super().__init__(keys, queries)
        self.method, self.average = method, dict[int, float]()

    def step(self, t: int, held: list[int]) -> None:
        self.average.setdefault(t, 0.0)
        if t % self.method.refresh == 0:
            for slot, weight in self.attention(t, held).items():
                self.average[slot] = self.method.alpha * self.average[slot] + (1 - self.method.alpha) * weight

    def scores(self, held: list[int]) -> dict[int, float]:
        return self.average


@pytest.mark.parametrize("refresh", [1, 4])
def test_inertiakv_is_a_moving_average_of_attention(refresh: int) -> None:
    method = InertiaKV(refresh=refresh, window=WINDOW)
    play(method, lambda keys, queries: SlowInertia(keys, queries, method), ("average",))


def test_inertiakv_without_a_past_is_the_newest_querys_attention() -> None:
    method = InertiaKV(alpha=0.0, window=WINDOW)

    class Newest(SlowInertia):
        def scores(self, held: list[int]) -> dict[int, float]:
            return self.attention(held[-1], held)

    play(method, lambda keys, queries: Newest(keys, queries, method))


# ---------------------------------------------------------------------------------------------------------- keyformer


class SlowKeyformer(Slow):
    """Sums of softmax((x + noise) / tau); the noise is that of the method, asked for one query at a time."""

    def __init__(self, keys: Tensor, queries: Tensor, method: Keyformer) -> None:
        super().__init__(keys, queries)
        self.method, self.attention_sums = method, dict[int, float]()

    def step(self, t: int, held: list[int]) -> None:
        self.attention_sums.setdefault(t, 0.0)
        step = min(max(0, t - PROMPT + 1), self.method.steps)
        tau = self.method.tau + (self.method.tau_end - self.method.tau) * step / self.method.steps
        for q in range(2):
            uniform = noise.uniform(torch.tensor(held), seed=0, row_seed=0, layer=0, head=q, event=t)
            disturbed = (self.logits(q, t, held) + noise.gumbel(uniform).double()) / tau
            for slot, weight in zip(held, disturbed.softmax(0).tolist(), strict=True):
                self.attention_sums[slot] += weight / 2

    def scores(self, held: list[int]) -> dict[int, float]:
        newest = held[len(held) - int((KEEP - SINKS) * self.method.recent_share) :]
        return {slot: math.inf if slot in newest else self.attention_sums[slot] for slot in held}


def test_keyformer_sums_attention_under_noise_at_a_rising_temperature() -> None:
    method = Keyformer(window=WINDOW, steps=20)
    play(method, lambda keys, queries: SlowKeyformer(keys, queries, method))
    steps = method.temperature(torch.tensor([3, 13, 14, 33, 99]), torch.tensor(14))
    assert steps.tolist() == pytest.approx([1.0, 1.0, 1.05, 2.0, 2.0])


# ------------------------------------------------------------------------------------------------------------- sagekv


class SlowSage(Slow):
    def __init__(self, keys: Tensor, queries: Tensor, method: SageKV) -> None:
        super().__init__(keys, queries)
        self.method, self.chosen = method, dict[int, float]()

    def scores(self, held: list[int]) -> dict[int, float]:
        self.newest = held[len(held) - int((KEEP - SINKS) * self.method.recent_share) :]
        if self.events == 0 or not self.method.once:
            attention = self.attention(held[-1], held)
            return {slot: math.inf if slot in self.newest else attention[slot] for slot in held}
        return {slot: math.inf if slot in self.chosen else slot for slot in held}

    def after(self, kept: list[int]) -> None:
        if self.events == 1 or not self.method.once:
            self.chosen = {slot: 1.0 for slot in kept[SINKS:] if slot not in self.newest}


@pytest.mark.parametrize("once", [True, False])
def test_sagekv_chooses_once_and_slides_a_window(once: bool) -> None:
    method = SageKV(recent_share=0.4, once=once)
    play(method, lambda keys, queries: SlowSage(keys, queries, method))
