"""Rings of recent queries give back what was put in, newest last, whatever their rows have seen."""

from __future__ import annotations

import pytest
import torch

from reasonkv.slots import newest_queries


@pytest.mark.parametrize("lengths", [(5, 8), (8, 9), (21, 13)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_newest_queries_come_oldest_first(lengths: tuple[int, int], count: int) -> None:
    texts = [torch.randn(length, 4, 6) for length in lengths]
    ring = torch.full((3, 8, 4, 6), torch.nan)  # rows 2 and 0 are asked for
    for row, text in zip((2, 0), texts, strict=True):
        for token, queries_HqD in enumerate(text):
            ring[row, token % 8] = queries_HqD
    queries_bHqnD, token_bn = newest_queries(ring, torch.tensor([2, 0]), torch.tensor(lengths), count)
    for number, text in enumerate(texts):
        assert torch.equal(queries_bHqnD[number], text[-count:].transpose(0, 1))
        assert token_bn[number].tolist() == list(range(len(text) - count, len(text)))
