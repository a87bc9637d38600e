"""Fidelity of a bounded cache against the full-KV model, token by token, in float32.

Over a vocabulary of 152k tokens, a softmax costs as much as attention. So logits are worked on in slices that stay in
the CPU's cache, with one sum of exponentials each: that of the tokens outside the full-KV model's top k.

Legend: N output tokens of one row in one chunk, V vocabulary, k tokens stored per position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError

SLICE_ELEMENTS = 1 << 21
"""Logits worked on at once: 8 MiB of float32."""


class NonFiniteError(ReasonKVError, RuntimeError):
    """Log-probabilities contain NaN or infinity where the trace needs a number."""


@dataclass(frozen=True)
class TeacherLogprobs:
    """The full-KV model's log-probabilities at N output positions."""

    # int64, its k most likely tokens, most likely first; None when k is the whole vocabulary, and then the next field
    # is in vocabulary order
    ids_Nk: Tensor | None
    logprobs_Nk: Tensor  # float32, their log-probabilities
    rest_N: Tensor  # float32, log-probability of all other tokens together (-inf when there are none)

    @classmethod
    def from_logits(cls, logits_NV: Tensor, k: int) -> TeacherLogprobs:
        """Reduce logits to the k most likely tokens and the rest."""
        if k >= logits_NV.shape[-1]:
            logprobs_NV = logits_NV.float().log_softmax(-1)
            return cls(None, logprobs_NV, logprobs_NV.new_full(logprobs_NV.shape[:1], -torch.inf))
        parts = []
        for start in range(0, len(logits_NV), size := _slice(logits_NV)):
            scores_nV = logits_NV[start : start + size].to(torch.float32, copy=True)
            ids_nk = scores_nV.topk(k, dim=-1).indices
            parts.append((ids_nk, *_split(scores_nV, ids_nk)[:2]))
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[TeacherLogprobs]) -> TeacherLogprobs:
        """Return the positions of all parts, on the CPU."""
        ids = [one.ids_Nk for one in parts if one.ids_Nk is not None]
        rest = (torch.cat([getattr(one, name) for one in parts]).cpu() for name in ("logprobs_Nk", "rest_N"))
        return cls(torch.cat(ids).cpu() if ids else None, *rest)

    def best_N(self) -> Tensor:
        """Return the most likely token at each position, int64."""
        return self.logprobs_Nk.argmax(-1) if self.ids_Nk is None else self.ids_Nk[:, 0]

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> TeacherLogprobs:
        """Return positions `start` to `stop` (exclusive), on another device if one is given."""
        ids = None if self.ids_Nk is None else self.ids_Nk[start:stop].to(device)
        return TeacherLogprobs(ids, self.logprobs_Nk[start:stop].to(device), self.rest_N[start:stop].to(device))


@dataclass(frozen=True)
class TraceMetrics:
    """Means over one trace's output tokens (fields as in `ReplayRecord`), and the negative log-likelihood of each."""

    top1: float
    top5: float
    nll: float
    kl: float
    first_mismatch: int | None
    answer_top1: float | None
    nll_T: Tensor = field(compare=False)


class TraceScore:
    """Accumulates one trace's metrics, chunk by chunk."""

    def __init__(self) -> None:
        self._chunks: list[tuple[Tensor, ...]] = []

    def add(self, logits_NV: Tensor, tokens_N: Tensor, teacher: TeacherLogprobs) -> None:
        """Score N positions.

        KL, in nats, is over the teacher's k tokens and one bucket for all others: never larger than over the whole
        vocabulary, and equal to it when k is the whole vocabulary.

        Args:
            logits_NV: the bounded cache's logits, any float dtype.
        """
        for start in range(0, len(tokens_N), size := _slice(logits_NV)):
            stop = start + size
            own = teacher.rows(start, stop, logits_NV.device)
            self._add(logits_NV[start:stop], tokens_N[start:stop, None], own)

    def _add(self, logits_NV: Tensor, tokens_N1: Tensor, teacher: TeacherLogprobs) -> None:
        scores_NV = logits_NV.to(torch.float32, copy=True)
        # tokens as likely as the best one are no better; which of them a sort puts first is chance
        best_N1 = scores_NV.gather(1, teacher.best_N()[:, None])
        beaten_n = (scores_NV.amax(-1) > best_N1[:, 0]).nonzero()[:, 0]  # few; counting in every row costs a pass more
        rank_N = torch.zeros(len(scores_NV), dtype=torch.int64, device=scores_NV.device)
        rank_N[beaten_n] = (scores_NV[beaten_n] > best_N1[beaten_n]).sum(-1)
        if teacher.ids_Nk is None:
            logprobs_NV = scores_NV.log_softmax(-1)
            kl_N, token_N1 = _cross(teacher.logprobs_Nk, logprobs_NV).sum(-1), logprobs_NV.gather(1, tokens_N1)
        else:
            token_N1 = scores_NV.gather(1, tokens_N1)
            logprobs_Nk, rest_N, mass_N1 = _split(scores_NV, teacher.ids_Nk)
            kl_N = _cross(teacher.logprobs_Nk, logprobs_Nk).sum(-1) + _cross(teacher.rest_N, rest_N)
            token_N1 = token_N1 - mass_N1
        found = (-token_N1[:, 0], kl_N, rank_N < 1, rank_N < 5)
        self._chunks.append(tuple(one.cpu() for one in found))

    def result(self, answer_at: int | None = None) -> TraceMetrics:
        """Return means over everything added; sums in float64, so that they do not depend on how the trace was cut.

        Args:
            answer_at: index of the first token of the answer, if the trace has one; `answer_top1` is over those alone.

        Raises:
            NonFiniteError: NaN or infinity among the scores.
        """
        nll_T, kl_T, top1_T, top5_T = (torch.cat(chunks) for chunks in zip(*self._chunks, strict=True))
        nll, kl = nll_T.double().mean(), kl_T.double().mean()
        if not bool(torch.isfinite(nll) & torch.isfinite(kl)):
            raise NonFiniteError("the log-probabilities are not finite")
        wrong = (~top1_T).nonzero()
        return TraceMetrics(
            top1=top1_T.double().mean().item(),
            top5=top5_T.double().mean().item(),
            nll=nll.item(),
            kl=kl.item(),
            first_mismatch=int(wrong[0]) if len(wrong) else None,
            answer_top1=None if answer_at is None else top1_T[answer_at:].double().mean().item(),
            nll_T=nll_T,
        )


def _cross(p: Tensor, q: Tensor) -> Tensor:
    """Return exp(p) (p - q), and 0 where p is -inf."""
    return torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))


def _split(scores_NV: Tensor, ids_Nk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of some tokens [N, k] and of all others together [N], and log sum exp [N, 1].

    The rest is summed over what is left rather than 1 - the sum of what is taken, which cancels when it is small.

    Args:
        scores_NV: float32 logits, which are overwritten.
        ids_Nk: the tokens.
    """
    taken_Nk = scores_NV.gather(1, ids_Nk)
    rest_N1 = scores_NV.scatter_(1, ids_Nk, -torch.inf).logsumexp(-1, keepdim=True)
    mass_N1 = torch.logaddexp(rest_N1, taken_Nk.logsumexp(-1, keepdim=True))
    return taken_Nk - mass_N1, (rest_N1 - mass_N1)[:, 0], mass_N1


def _slice(logits_NV: Tensor) -> int:
    """Return how many positions are worked on at once."""
    return max(1, SLICE_ELEMENTS // logits_NV.shape[-1])
