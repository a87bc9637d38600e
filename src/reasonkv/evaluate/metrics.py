"""Fidelity of a candidate against the full-KV model, token by token, in float32.

Legend: N output tokens of one row in one piece, V vocabulary, k reference tokens stored per position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError


class NonFiniteError(ReasonKVError, RuntimeError):
    """A candidate's log-probabilities contain NaN or infinity where the trace needs a number."""


@dataclass(frozen=True)
class Reference:
    """The full-KV model's opinion at N output positions.

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
    def from_logits(cls, logits_NV: Tensor, k: int) -> Reference:
        """Reduce logits to the k most likely tokens and the rest."""
        logprobs_NV = logits_NV.float().log_softmax(-1)
        if k >= logprobs_NV.shape[-1]:
            return cls(None, logprobs_NV, logprobs_NV.new_full(logprobs_NV.shape[:1], -torch.inf))
        top = logprobs_NV.topk(k, dim=-1)
        return cls(top.indices, top.values, _rest(logprobs_NV, top.indices))

    def best_N(self) -> Tensor:
        """int64, the most likely token at each position."""
        return self.logprobs_Nk.argmax(-1) if self.ids_Nk is None else self.ids_Nk[:, 0]

    def rows(self, start: int, stop: int) -> Reference:
        """Positions `start` to `stop` (exclusive)."""
        ids = None if self.ids_Nk is None else self.ids_Nk[start:stop]
        return Reference(ids, self.logprobs_Nk[start:stop], self.rest_N[start:stop])

    def to(self, device: torch.device) -> Reference:
        """The same on another device."""
        ids = None if self.ids_Nk is None else self.ids_Nk.to(device)
        return Reference(ids, self.logprobs_Nk.to(device), self.rest_N.to(device))


@dataclass(frozen=True)
class TraceMetrics:
    """Means over one trace's output tokens; see `Record` for the fields."""

    top1: float
    top5: float
    nll: float
    kl: float
    first_mismatch: int | None
    answer_top1: float | None = None


@dataclass
class TraceScore:
    """Accumulates one trace's metrics, piece by piece."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    top1: list[Tensor] = field(default_factory=list)
    top5: list[Tensor] = field(default_factory=list)

    def add(self, logits_NV: Tensor, tokens_N: Tensor, reference: Reference) -> None:
        """Score N positions.

        Args:
            logits_NV: the candidate's logits, any float dtype.
            tokens_N: int64, the trace's tokens at those positions.
            reference: the full-KV model's opinion at the same positions.
        """
        logprobs_NV = logits_NV.float().log_softmax(-1)
        best_N = reference.best_N()
        top_N5 = logprobs_NV.topk(min(5, logprobs_NV.shape[-1]), dim=-1).indices
        self.nll.append(-logprobs_NV.gather(1, tokens_N[:, None])[:, 0].cpu())
        self.kl.append(kl_divergence(reference, logprobs_NV).cpu())
        self.top1.append((top_N5[:, 0] == best_N).cpu())
        self.top5.append((top_N5 == best_N[:, None]).any(-1).cpu())

    def nll_N(self) -> Tensor:
        """float32, negative log-likelihood of each token so far."""
        return torch.cat(self.nll)

    def result(self, answer_at: int | None = None) -> TraceMetrics:
        """Means over everything added; sums in float64, so that they do not depend on how the trace was cut.

        Args:
            answer_at: index of the first token of the answer, if the trace has one; `answer_top1` is over those alone.

        Raises:
            NonFiniteError: NaN or infinity among the scores.
        """
        nll, kl, top1 = self.nll_N().double().mean(), torch.cat(self.kl).double().mean(), torch.cat(self.top1)
        if not bool(torch.isfinite(nll) & torch.isfinite(kl)):
            raise NonFiniteError("the log-probabilities are not finite")
        wrong = (~top1).nonzero()
        return TraceMetrics(
            top1=top1.double().mean().item(),
            top5=torch.cat(self.top5).double().mean().item(),
            nll=nll.item(),
            kl=kl.item(),
            first_mismatch=int(wrong[0]) if len(wrong) else None,
            answer_top1=None if answer_at is None else top1[answer_at:].double().mean().item(),
        )


def kl_divergence(reference: Reference, logprobs_NV: Tensor) -> Tensor:
    """KL divergence [N], nats, over the reference's k tokens and one bucket that holds all others.

    Never larger than the divergence over the whole vocabulary, and equal to it when k is the whole vocabulary.

    Args:
        reference: p.
        logprobs_NV: float32, q over the whole vocabulary.
    """
    p_Nk = reference.logprobs_Nk
    if reference.ids_Nk is None:
        return _cross(p_Nk, logprobs_NV).sum(-1)
    q_Nk = logprobs_NV.gather(1, reference.ids_Nk)
    return _cross(p_Nk, q_Nk).sum(-1) + _cross(reference.rest_N, _rest(logprobs_NV, reference.ids_Nk))


def _cross(p: Tensor, q: Tensor) -> Tensor:
    """exp(p) (p - q), and 0 where p is -inf."""
    return torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))


def _rest(logprobs_NV: Tensor, ids_Nk: Tensor) -> Tensor:
    # summed over what is left rather than 1 - the sum of what is taken, which cancels when the rest is small
    return logprobs_NV.scatter(1, ids_Nk, -torch.inf).logsumexp(-1)
