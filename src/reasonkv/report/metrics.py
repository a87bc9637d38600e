"""The numbers that tables and figures show: headings, meanings, and how they are written."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd


class Metric(NamedTuple):
    """A number of a cell.

    Args:
        key: its column in a summary.
        label: the column's heading.
        meaning: one sentence.
        scale: what the number is multiplied by for people.
        digits: digits after the point.
        title: what a figure's axis says; "" where figures do not offer it.
    """

    key: str
    label: str
    meaning: str
    scale: float = 1.0
    digits: int = 0
    title: str = ""


# fmt: off
_MEMORY = (
    Metric("physical_mean", "mean slots", "slots per KV head kept, mean over output tokens; what attention reads, "
           "unless slots read says otherwise"),
    Metric("physical_peak", "peak slots", "most slots per KV head kept at once, prompt included"),
    Metric("slots_read_mean", "slots read", "slots per KV head that attention reads, mean over output tokens, where "
           "that is not all that is kept"),
    Metric("bytes_read_mean", "KiB read", "KiB of keys, values and page summaries read per output token, where that is "
           "not all that is kept", 1 / 1024),
    Metric("saved_bytes", "saved bytes %", "share of full KV's bytes that is not in use at the end, the method's own "
           "state counted as used", 100, 1),
    Metric("bytes_held", "KiB kept", "KiB in use at the end, the method's own state included", 1 / 1024),
)
DIAGNOSTICS = (
    Metric("lost_attention", "lost attention %", "of the attention full KV pays after the first event, the part to "
           "tokens given up by then; mean over layers and KV heads", 100, 1, "attention lost, %"),
    Metric("lost_lookups", "lost look-ups %", "of the tokens that a later query of full KV pays more than half its "
           "attention, the part given up by then", 100, 1, "look-ups lost, %"),
    Metric("lost_mass", "lost mass %", "attention to folded tokens minus what their slots stand for, as a part of all "
           "attention in the interval; negative where a slot stands for more than its tokens got", 100, 1,
           "representative mass lost, %"),
    Metric("lost_mass_absolute", "misplaced mass %", "the same with every slot's difference counted positive", 100, 1,
           "representative mass misplaced, %"),
    Metric("kappa_dispersion_relative", "kappa dispersion", "mean kappa distance of folded keys to their group's key, "
           "in mean kappa norms of those keys", 1, 3, "kappa dispersion of groups, relative"),
    Metric("rho_core", "rho core", "attention to the protected core, over that to as many best candidates", 1, 3,
           "rho of the core"),
    Metric("rho_rep", "rho rep.", "attention to the representatives' own slots, over that to as many best candidates",
           1, 3, "rho of the representatives"),
)
"""Of replays with diagnostics; the last five are CASK's own, means over its compactions."""
METRICS = {
    "replay": (
        Metric("top1", "top-1 %", "share of output tokens where the most likely token is the full-KV model's", 100, 1,
               "top-1 agreement with full KV, %"),
        Metric("answer_top1", "answer top-1 %", "share of the answer's tokens, those after </think>, where the most "
               "likely token is the full-KV model's; over the traces that have such a part", 100, 1,
               "top-1 agreement on the answer alone, %"),
        Metric("kl", "KL", "mean divergence from full KV's top tokens and one bucket for the rest, nats", 1, 3,
               "KL from full KV, nats"),
        Metric("nll", "NLL", "mean negative log-likelihood of the trace's tokens, nats", 1, 3,
               "NLL of full KV's tokens, nats"),
        Metric("top5", "top-5 %", "share of output tokens where the full-KV model's most likely token is among the "
               "five most likely", 100, 1, "top-5 agreement with full KV, %"),
        *_MEMORY, *DIAGNOSTICS,
    ),
    "evaluate": (
        Metric("correct", "accuracy %", "share of answers that the task's checker accepts as a whole", 100, 1,
               "accuracy, %"),
        Metric("truncated", "truncated %", "share of answers that met the limit on their length before they ended", 100,
               1, "truncated answers, %"),
        Metric("repetition", "in loops %", "share of output tokens that repeat what stands just before them, in a loop",
               100, 1, "output tokens in loops, %"),
        Metric("diverged", "diverged %", "share of answers that differ from full KV's answer to the same problem in "
               "any token", 100, 1, "answers that differ from full KV's, %"),
        Metric("output_tokens", "output tokens", "tokens written, the end of sequence included", 1, 0, "output tokens"),
        *_MEMORY,
    ),
}
_OF_RECORDS = (
    Metric("example", "example", "number of the problem; also the row seed of random methods"),
    Metric("sample", "sample", "number of the sample of that problem"),
    Metric("prompt_tokens", "prompt tokens", "tokens of the prompt"),
    Metric("first_divergence", "first divergence", "first output token that differs from full KV's"),
    Metric("first_mismatch", "first mismatch", "first output token that counts against top-1"),
    Metric("bytes_full", "KiB full KV", "what full KV would use at the end", 1 / 1024),
    Metric("events", "compactions", "how often the method ran"),
    Metric("tokens_dropped", "evicted", "tokens whose slots were given up"),
    Metric("seed", "seed", "the run's seed"),
)
_KNOWN = {one.key: one for kind in METRICS.values() for one in kind} | {one.key: one for one in _OF_RECORDS}
RECORD_METRICS = tuple(_KNOWN[key] for key in (
    "example", "sample", "prompt_tokens", "output_tokens", "repetition", "first_divergence", "top1", "answer_top1",
    "kl", "nll", "first_mismatch", "physical_mean", "physical_peak", "bytes_held", "bytes_full", "events",
    "tokens_dropped", "seed",
))
"""The numbers of one record, in the order of the record table."""
MAIN = {kind: metrics[0] for kind, metrics in METRICS.items()}
"""By kind: the metric that is looked at first."""
UNITS = {
    "tokens": "budget, slots per KV head after a compaction",
    "physical_mean": "mean slots per output token",
    "bytes_held": "bytes in use at the end",
}
REGIMES = {
    "compressed": "decoding went on compressing, with tokens of its own to choose from: what comparisons rest on",
    "prompt_fills_budget": "compactions ran, but the prompt and the protected slots left no decode token to choose",
    "uncompressed": "no compaction ran and nothing was evicted: full KV under another name",
    "selecting": "everything was kept, and every decoded token read a part of it: the budget is what it may read, so "
                 "its place is beside methods with as many mean slots and not beside those of equal budget",
}
# fmt: on


def shown_metrics(kind: str, summary: pd.DataFrame) -> list[Metric]:
    """Return the metrics that a summary has, in their order."""
    return [metric for metric in METRICS[kind] if metric.key in summary]
