"""How CASK's query heads vote for its protected core."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Votes:
    """How often each candidate is among a query head's best c, for any c; the rows are sorted once.

    Args:
        matrix_Mn: scores of M query heads (of all layers a plan covers) for n candidates.

    """

    def __init__(self, matrix_Mn: Tensor) -> None:
        self._matrix = matrix_Mn
        if matrix_Mn.device.type == "cpu":  # NumPy sorts rows several times faster than torch here
            self._ascending = torch.from_numpy(np.sort(matrix_Mn.numpy(), axis=-1))
        else:
            self._ascending = matrix_Mn.sort(-1).values

    def count(self, best: int) -> NDArray[np.int64]:
        """int [n]: votes when every head names its `best` candidates; of a head's equals the older are named."""
        n = self._matrix.shape[1]
        if best == 0:
            return np.zeros(n, dtype=np.int64)
        least_M1 = self._ascending[:, n - best : n - best + 1]
        named_Mn = self._matrix >= least_M1
        if best < n and bool((self._ascending[:, n - best - 1] == least_M1[:, 0]).any()):
            above_Mn = self._matrix > least_M1
            equal_Mn = named_Mn & ~above_Mn
            room_M1 = best - above_Mn.sum(-1, keepdim=True)
            named_Mn = above_Mn | (equal_Mn & (equal_Mn.cumsum(-1) <= room_M1))
        votes: NDArray[np.int64] = named_Mn.sum(0).cpu().numpy()
        return votes
