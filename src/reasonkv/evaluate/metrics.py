"""Fidelity of a bounded cache against the full-KV model, token by token, in float32.

Legend: N output tokens of one row in one chunk, V vocabulary, k tokens stored per position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError


class NonFiniteError(ReasonKVError, RuntimeError):
    """Log-probabilities contain NaN or infinity where the trace needs a number."""


@dataclass(frozen=True)
class TeacherLogprobs:
    """The full-KV model's log-probabilities at N output positions.

    Args:
        ids_Nk: int64, its k most likely tokens, most likely first; None when k is the whole vocabulary, and then the
            next field is in vocabulary order.
        logprobs_Nk: float32, their log-probabilities.
        rest_N: float32, log-probability of all other tokens together (-inf when there are none).
    """

    ids_Nk: Tensor | None
    logprobs_Nk: Tensor
    rest_N: Tensor

    @classmethod
    def from_logits(cls, logits_NV: Tensor, k: int) -> TeacherLogprobs:
        """Reduce logits to the k most likely tokens and the rest."""
        logprobs_NV = logits_NV.float().log_softmax(-1)
        if k >= logprobs_NV.shape[-1]:
            return cls(None, logprobs_NV, logprobs_NV.new_full(logprobs_NV.shape[:1], -torch.inf))
        top = logprobs_NV.topk(k, dim=-1)
        return cls(top.indices, top.values, _rest(logprobs_NV, top.indices))

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

        Args:
            logits_NV: the bounded cache's logits, any float dtype.
            tokens_N: int64, the trace's tokens at those positions.
            teacher: the full-KV model's log-probabilities at the same positions.
        """
        logprobs_NV = logits_NV.float().log_softmax(-1)
        best_N1 = teacher.best_N()[:, None]
        hits_N5 = logprobs_NV.topk(min(5, logprobs_NV.shape[-1]), dim=-1).indices == best_N1
        nll_N = -logprobs_NV.gather(1, tokens_N[:, None])[:, 0]
        found = (nll_N, kl_divergence(teacher, logprobs_NV), hits_N5[:, 0], hits_N5.any(-1))
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


def kl_divergence(teacher: TeacherLogprobs, logprobs_NV: Tensor) -> Tensor:
    """Return the KL divergence [N], nats, over the teacher's k tokens and one bucket that holds all others.

    Never larger than the divergence over the whole vocabulary, and equal to it when k is the whole vocabulary.

    Args:
        teacher: p.
        logprobs_NV: float32, q over the whole vocabulary.
    """
    p_Nk = teacher.logprobs_Nk
    if teacher.ids_Nk is None:
        return _cross(p_Nk, logprobs_NV).sum(-1)
    q_Nk = logprobs_NV.gather(1, teacher.ids_Nk)
    return _cross(p_Nk, q_Nk).sum(-1) + _cross(teacher.rest_N, _rest(logprobs_NV, teacher.ids_Nk))


def _cross(p: Tensor, q: Tensor) -> Tensor:
    """Return exp(p) (p - q), and 0 where p is -inf."""
    return torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))


def _rest(logprobs_NV: Tensor, ids_Nk: Tensor) -> Tensor:
    # summed over what is left rather than 1 - the sum of what is taken, which cancels when the rest is small
    return logprobs_NV.scatter(1, ids_Nk, -torch.inf).logsumexp(-1)
