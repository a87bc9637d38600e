"""Training batches: token ids, and for each trace token what kind it is.

A batch is a pure function of (recipe, family, step, stage), so that a resumed run sees the data the
interrupted one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonkv.tasks import Draft, Draw, Kind, get_task, split_of
from tools.testbed.recipe import Recipe, Stage
from tools.testbed.tokenizer import EOS, PAD, VOCABULARY

_IDS = {word: index for index, word in enumerate(VOCABULARY)}
_MAX_LENGTH = 4096


@dataclass(frozen=True)
class Batch:
    """Rows of prompt + trace + end of sequence, padded on the right (no mask is needed: causal).

    `ids` int64 [B, T]. `at` int64 [N] indexes the flattened B * T positions whose *next* token is a
    trace token; `targets` and `kinds` int64 [N] say which token and which `Kind` it is.
    """

    ids: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor
    kinds: torch.Tensor


def make_batch(recipe: Recipe, family: str, step: int, stage: int) -> Batch:
    """Training problems of one family at one draw of the stage's dials: `stage.tokens` or one."""
    chosen = recipe.courses[family].stages[stage]
    draw = Draw(f"batch/{recipe.seed}/{family}/{step}/{stage}")
    task = get_task(_spec(family, chosen, draw))
    rows: list[Draft] = []
    longest = 0
    while True:
        draft = task.draft(draw)
        if split_of(" ".join(draft.prompt)) != "train":
            continue
        length = len(draft.prompt) + len(draft.trace) + 1
        if length > _MAX_LENGTH:
            continue
        if rows and (len(rows) + 1) * max(longest, length) > chosen.tokens:
            return _collate(rows)
        rows.append(draft)
        longest = max(longest, length)


def choose_stage(recipe: Recipe, family: str, step: int, level: int) -> int:
    """The stage a step trains: the family's level, or for the share `review` an easier one."""
    draw = Draw(f"stage/{recipe.seed}/{family}/{step}")
    return draw.below(level) if level and draw.unit() < recipe.review else level


def _spec(family: str, stage: Stage, draw: Draw) -> str:
    dials = [f"{name}={draw.between(*edges)}" for name, edges in stage.ranges.items()]
    dials += [f"{name}={draw.choice(words)}" for name, words in stage.words.items()]
    return f"{family.partition('/')[0]}:{','.join(dials)}"


def _collate(rows: list[Draft]) -> Batch:
    length = max(len(row.prompt) + len(row.trace) + 1 for row in rows)
    ids_BT = torch.full((len(rows), length), PAD)
    at: list[int] = []
    targets: list[int] = []
    kinds: list[int] = []
    for index, row in enumerate(rows):
        ids = [_IDS[word] for word in row.prompt + row.trace] + [EOS]
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        start = len(row.prompt)
        at.extend(range(index * length + start - 1, index * length + len(ids) - 1))
        targets.extend(ids[start:])
        kinds.extend(int(kind) for kind in row.kinds)
        kinds.append(int(Kind.ANSWER))
    return Batch(ids_BT, torch.tensor(at), torch.tensor(targets), torch.tensor(kinds))
