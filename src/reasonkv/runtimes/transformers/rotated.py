"""Rotation and codebook, as in TurboQuant (Zandieh et al., 2025, arXiv 2504.19874; the variant for squared error).

A vector is rotated by one fixed random matrix, so that its coordinates look like normal numbers whatever it was. Each
becomes the nearest of the few points that are best for normal numbers. Codes and one scale for a vector are stored.

Three things differ from the paper. Keys are brought to one size first: a rotation spreads an error in proportion to
the largest channels over all of them, and keys with a bias (Qwen2.5) have channels a hundred times the others. So the
mean of a row's first packed keys is subtracted, per head and channel, and channels are divided by the square root of
their deviation from it, which is what makes the summed error least. The scale is the one with the least error for the
codes, not the norm. And a packed slot keeps its codes as long as no method changes its vector: they are moved, not
computed again, so nothing drifts.

Legend: as in `reasonkv.runtimes.transformers.codes`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from reasonkv import noise
from reasonkv.methods.ops import upcast
from reasonkv.runtimes.transformers.codes import Part, Rows, SlotCodes, in_bytes, out_of_bytes

CODEBOOK = {
    2: (0.452780035, 1.510417608),
    4: (0.128395030, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571),
}
"""Positive points by bits, of the quantiser with the least squared error for standard normal numbers (Max, 1960)."""

_MOST_APART = 64  # sizes of channels, so that one that stood still at first does not drown the others later


@cache
def rotation(width: int) -> Tensor:
    """Return a random orthogonal matrix [D, D], float64: the same on every machine, up to rounding."""
    words = torch.arange(width * width)
    uniform = noise.uniform(words, seed=0, row_seed=0, layer=0, head=0, event=0)
    orthogonal, triangle = torch.linalg.qr(noise.normal(uniform).double().view(width, width))
    matrix: Tensor = orthogonal * triangle.diagonal().sign()  # the one with a positive triangle is unique
    return matrix


def codebook(bits: int) -> Tensor:
    """Return the points in ascending order, float64 [2 ** bits]."""
    positive = torch.tensor(CODEBOOK[bits], dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def channels_of(x_bHND: Tensor) -> Tensor:
    """Return mean and size [b, H, 2, D] of every channel, in the slots' dtype; sizes are positive."""
    mean = x_bHND.mean(2, keepdim=True)
    size = (upcast(x_bHND) - mean).square().mean(2, keepdim=True) ** 0.25
    size = size.maximum(size.amax(3, keepdim=True) / _MOST_APART).to(x_bHND.dtype)
    return torch.cat([mean, torch.where(size > 0, size, 1)], 2)


class RotatedCodes(SlotCodes):
    """Codes of rotated vectors.

    Args:
        like, bits: as in `SlotCodes`.
        by_channel: take mean and size of channels apart, those of a row's first packed slots.
    """

    def __init__(self, like: Tensor, bits: int, by_channel: bool) -> None:
        super().__init__(like, bits)
        # mean and size; a size of 0 is not known yet
        self.channels_BH2D = like.new_zeros(self.rows, self.heads, 2, self.width) if by_channel else None
        wide = torch.promote_types(like.dtype, torch.float32)
        self.rotation, points = (one.to(self.device, wide) for one in (rotation(self.width), codebook(bits)))
        self.borders = (points[1:] + points[:-1]) / 2
        every = torch.arange(256, dtype=torch.uint8, device=self.device)[:, None]
        self.points_of_byte = points[out_of_bytes(every, bits, 1).int()]  # [256, 8 / bits]

    def parts(self) -> list[Part]:
        """Return codes of neighbouring channels in one byte, and scales."""
        return [Part(1, -(-self.width * self.bits // 8), torch.uint8), Part(1, 1, torch.bfloat16)]

    def encode(self, rows: Rows, x_bHND: Tensor) -> list[Tensor]:
        """Return the parts of some slots."""
        return self._encode(self._levelled(rows, x_bHND))

    def decode(self, rows: Rows, parts: list[Tensor]) -> Tensor:
        """Return the slots that parts stand for."""
        x = (self._points(parts[0]) * parts[1]) @ self.rotation
        if self.channels_BH2D is not None:
            known = self.channels_BH2D[rows]
            x = x * known[:, :, 1:] + known[:, :, :1]
        return x.to(self.dtype)

    def rewrite(self, rows: Rows, x_bHND: Tensor, source_bHN: Tensor, stays_bHN: Tensor) -> None:
        """Move the codes of slots that stay, and encode the others."""
        fresh_bHN, parts = ~stays_bHN, []
        encoded = self._encode(self._levelled(rows, x_bHND)[fresh_bHN])
        source_bHN1 = source_bHN.clamp(max=self.slots - 1).unsqueeze(3)
        for stored, new in zip(self.stored, encoded, strict=True):
            part = stored[rows].gather(2, source_bHN1.expand(*source_bHN.shape, stored.shape[3]))
            part[fresh_bHN] = new
            parts.append(part)
        self._place(rows, 0, x_bHND.shape[2], parts)

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        super().select_rows(index)
        if self.channels_BH2D is not None:
            self.channels_BH2D = self.channels_BH2D.index_select(0, index)

    def bytes_per_row(self) -> int:
        """Bytes of the mean and size of a row's channels."""
        return 0 if self.channels_BH2D is None else self.channels_BH2D[0].nbytes

    def _levelled(self, rows: Rows, x_bHND: Tensor) -> Tensor:
        """Return what is rotated, in the dtype that is computed in; a row's first slots say how large channels are."""
        if self.channels_BH2D is None:
            return upcast(x_bHND)
        known = self.channels_BH2D[rows]
        known = torch.where(known[:, :, 1:] > 0, known, channels_of(x_bHND))
        self.channels_BH2D[rows] = known
        return (upcast(x_bHND) - known[:, :, :1]) / known[:, :, 1:]

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Return the codes [..., D bits / 8] and scales [..., 1] of vectors [..., D]."""
        rotated = x @ self.rotation.T
        length = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        code = torch.bucketize(rotated * (self.width**0.5 / length), self.borders, out_int32=True).to(torch.uint8)
        code = in_bytes(pad(code, (0, -self.width * self.bits % 8 // self.bits)), self.bits, -1)
        points = self._points(code)
        scale = (rotated * points).sum(-1, keepdim=True) / points.square().sum(-1, keepdim=True)
        return [code, scale.to(torch.bfloat16)]

    def _points(self, code: Tensor) -> Tensor:
        """Return the points [..., D] of codes in bytes."""
        return embedding(code.int(), self.points_of_byte).flatten(-2)[..., : self.width]
