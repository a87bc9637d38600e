"""The numbers of a cell that tables and figures show: headings, meanings, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of a cell.

    Args:
        key: its name in the estimates.
        label: the column's heading.
        title: what a figure's axis says.
        meaning: one sentence.
        scale: what the number is multiplied by for people.
        digits: digits after the point.
        plotted: whether figures offer it.
    """

    key: str
    label: str
    title: str
    meaning: str
    scale: float = 1.0
    digits: int = 0
    plotted: bool = True


_MEMORY = (
    Metric(
        "physical_mean",
        "mean slots",
        "mean slots",
        "slots per KV head held, mean over output tokens; what attention reads, unless slots read says otherwise",
        plotted=False,
    ),
    Metric(
        "physical_peak",
        "peak slots",
        "peak slots",
        "most slots per KV head held at once, prompt included",
        plotted=False,
    ),
    Metric(
        "slots_read_mean",
        "slots read",
        "slots read",
        "slots per KV head that attention reads, mean over output tokens, where that is not all that is held",
        plotted=False,
    ),
    Metric(
        "bytes_read_mean",
        "KiB read",
        "KiB read",
        "KiB of keys, values and page summaries read per output token, where that is not all that is held",
        1 / 1024,
        0,
        False,
    ),
    Metric(
        "saved_bytes",
        "saved bytes %",
        "saved bytes, %",
        "share of full KV's bytes that is not held at the end, the method's own state counted as held",
        100,
        1,
        False,
    ),
    Metric(
        "bytes_held", "KiB held", "KiB held", "KiB held at the end, the method's own state included", 1 / 1024, 0, False
    ),
)
REPLAY = (
    Metric(
        "top1",
        "top-1 %",
        "top-1 agreement with full KV, %",
        "share of output tokens where the most likely token is the full-KV model's",
        100,
        1,
    ),
    Metric(
        "answer_top1",
        "answer top-1 %",
        "top-1 agreement on the answer alone, %",
        "share of the answer's tokens, those after </think>, where the most likely token is the full-KV model's; over "
        "the traces that have such a part",
        100,
        1,
    ),
    Metric(
        "kl",
        "KL",
        "KL from full KV, nats",
        "mean divergence from the full-KV model's top tokens and one bucket for the rest, nats",
        1,
        3,
    ),
    Metric(
        "nll", "NLL", "NLL of full KV's tokens, nats", "mean negative log-likelihood of the trace's tokens, nats", 1, 3
    ),
    Metric(
        "top5",
        "top-5 %",
        "top-5 agreement with full KV, %",
        "share of output tokens where the full-KV model's most likely token is among the five most likely",
        100,
        1,
    ),
    *_MEMORY,
)
EVALUATE = (
    Metric(
        "correct", "accuracy %", "accuracy, %", "share of answers that the task's checker accepts as a whole", 100, 1
    ),
    Metric(
        "truncated",
        "truncated %",
        "truncated answers, %",
        "share of answers that met the limit on their length before they ended",
        100,
        1,
    ),
    Metric(
        "repetition",
        "in loops %",
        "output tokens in loops, %",
        "share of output tokens that repeat what stands just before them, in a loop",
        100,
        1,
    ),
    Metric(
        "diverged",
        "diverged %",
        "answers that differ from full KV's, %",
        "share of answers that differ from full KV's answer to the same problem in any token",
        100,
        1,
    ),
    Metric("output_tokens", "output tokens", "output tokens", "tokens written, the end of sequence included", 1, 0),
    *_MEMORY,
)
DIAGNOSTICS = (
    Metric(
        "lost_attention",
        "lost attention %",
        "attention lost, %",
        "of the attention full KV pays after the first event, the part to tokens given up by then; mean over layers "
        "and KV heads",
        100,
        1,
    ),
    Metric(
        "lost_lookups",
        "lost look-ups %",
        "look-ups lost, %",
        "of the tokens that a later query of full KV pays more than half its attention, the part given up by then",
        100,
        1,
    ),
    Metric(
        "lost_mass",
        "lost mass %",
        "representative mass lost, %",
        "attention to folded tokens minus what their slots stand for, as a part of all attention in the interval; "
        "negative where a slot stands for more than its tokens got",
        100,
        1,
    ),
    Metric(
        "lost_mass_absolute",
        "misplaced mass %",
        "representative mass misplaced, %",
        "the same with every slot's difference counted positive",
        100,
        1,
    ),
    Metric(
        "kappa_dispersion_relative",
        "kappa dispersion",
        "kappa dispersion of groups, relative",
        "mean kappa distance of folded keys to their group's key, in mean kappa norms of those keys",
        1,
        3,
    ),
    Metric(
        "rho_core",
        "rho core",
        "rho of the core",
        "attention to the protected core, over that to as many best candidates",
        1,
        3,
    ),
    Metric(
        "rho_rep",
        "rho rep.",
        "rho of the representatives",
        "attention to the representatives' own slots, over that to as many best candidates",
        1,
        3,
    ),
)
"""Of replays with diagnostics; the last five are CASK's own, means over its events."""
