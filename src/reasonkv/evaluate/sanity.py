"""Whether full KV's own results are good enough for budgets to mean anything."""

from __future__ import annotations

import pandas as pd

SOLVED, CUT_OFF, LOOPING, UNREAD = 0.1, 0.5, 0.3, 0.2
"""Share of right answers below which, and of other outputs above which, accuracies say nothing."""


def sanity_warnings(frame: pd.DataFrame) -> list[str]:
    """Return a sentence for each task on which full KV itself fails, with what to try."""
    found = []
    for task, own in frame[frame["method"] == "full"].groupby("task", sort=False):
        n = len(own)
        if "correct" not in own or ("trace_correct" in own and own["trace_correct"].notna().all()):
            right = float(own["trace_correct"].astype(float).mean())
            if right < SOLVED:  # not so for traces from elsewhere, where it is NaN
                found.append(
                    f"full KV's traces of {task} are {right:.0%} right (n = {n}), so agreement with them says little "
                    f"about answers. Try a stronger model, another prompt, or more output tokens."
                )
            continue
        right, cut = float(own["correct"].astype(float).mean()), float(own["truncated"].astype(float).mean())
        loops = float((own["repetition"] > 0.5).mean())
        if cut > CUT_OFF:
            found.append(f"{cut:.0%} of full KV's answers to {task} were cut off; raise --max-new-tokens.")
        if loops > LOOPING:
            found.append(f"{loops:.0%} of full KV's answers to {task} end in a loop; try --temperature 0.6.")
        unread = float(own["extracted"].isna().mean()) if "extracted" in own and own["score"].notna().any() else 0.0
        if unread > UNREAD:
            found.append(
                f"no answer could be read in {unread:.0%} of full KV's outputs for {task}; check --grade and --prompt."
            )
        if right < SOLVED:
            found.append(
                f"full KV answers {right:.0%} of {task} right (n = {n}), so accuracies at any budget mean nothing. "
                f"Try a stronger model, another prompt or grader, or compare by `reasonkv replay`."
            )
    if "grader_error" in frame and frame["grader_error"].notna().any():
        failed = frame[frame["grader_error"].notna()]
        found.append(f"the grader failed on {len(failed)} outputs, first: {failed['grader_error'].iloc[0]}")
    return found
