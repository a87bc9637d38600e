"""Collect the statistics of a model's queries from windows of tokens, with running sums only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from reasonkv.calibration.horizon import HorizonSums, fit_horizon, future_distances
from reasonkv.calibration.queries import rotaries, watched
from reasonkv.calibration.statistics import Calibration, CalibrationError, head_dim_of, rope_type_of
from reasonkv.identity import model_hash
from reasonkv.offload import input_device
from reasonkv.rotary import Rotary

LARGEST_WINDOW, SMALLEST_WINDOW = 4096, 256
MEMORY = 10**9
"""Bytes beyond the model that `fitting_window` allows."""
TOKENS_AT_ONCE = 512
"""Tokens whose un-rotated queries are held in float32 at one time."""


class QuerySums:
    """Running sums over tokens of q_f, |q_f| and |q_f|^2, per layer, query head and rotary pair.

    Un-rotating costs one rounding of the rotated query in the model's dtype (2 ** -9 of an element in bfloat16), of
    random sign, which the mean over thousands of tokens removes.

    Args:
        rotaries: the rotation of every layer.
        horizon: also sum what the weights of future distances are fitted to.

    Holds [4, Hq, F] float64 a layer (float32 where the device knows no float64), on the layer's device.
    """

    def __init__(self, rotaries: Sequence[Rotary], *, horizon: bool = False) -> None:
        self.rotaries = rotaries
        self.horizon = HorizonSums(len(rotaries)) if horizon else None
        self.sums: list[Tensor | None] = [None] * len(rotaries)
        self.tokens = [0] * len(rotaries)
        self.start = 0  # position of the next forward's first token

    def __call__(self, layer: int, query_BHqTD: Tensor, key_BHLD: Tensor, options: dict[str, Any]) -> None:
        """Add the queries of a forward; see `reasonkv.calibration.queries.Watch`."""
        (B, Hq, T, D), device, rotary = query_BHqTD.shape, query_BHqTD.device, self.rotaries[layer]
        F = rotary.inv_freq.numel()
        sums = self.sums[layer]
        if sums is None:
            wide = torch.float32 if device.type == "mps" else torch.float64
            sums = self.sums[layer] = torch.zeros(4, Hq, F, dtype=wide, device=device)
        position_T = self.start + torch.arange(T, device=device)
        step = max(1, TOKENS_AT_ONCE // B)
        for part_BHqtD, position_t in zip(
            torch.split(query_BHqTD, step, 2), torch.split(position_T, step), strict=True
        ):
            plain_BHqtD = rotary.unrotate(part_BHqtD.float(), position_t)
            real, imaginary = plain_BHqtD[..., :F], plain_BHqtD[..., F : 2 * F]
            square = real.square() + imaginary.square()
            for row, values in enumerate((real, imaginary, square.sqrt(), square)):
                sums[row] += values.sum((0, 2))
        self.tokens[layer] += B * T
        if self.horizon is not None:
            self.horizon.add(layer, rotary, query_BHqTD, key_BHLD, options.get("scaling") or D**-0.5, self.start)


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    piece: int | None = None,
    horizon: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    name: str | None = None,
    source: str | None = None,
) -> Calibration:
    """Average the queries of every layer over all tokens of `batches` (TriAttention, calibration).

    Every row is a text of its own, from position 0 on. The result does not depend on how rows are batched, up to
    rounding. Nothing of size (tokens) is kept between batches; `working_bytes` bounds what one batch needs.

    Args:
        model: a causal language model; its dtype, device and attention kernel are used and not changed.
        batches: int64 ids [B, T], unpadded; T may differ from batch to batch.
        piece: feed a row in chunks of so many tokens with a KV cache; None feeds it whole without one.
        horizon: also fit weights of the future distances (`reasonkv.calibration.horizon`). No distance longer than a
            window is learned.
        progress: called with the number of tokens done after every batch.
        name: the model's name, for the record.
        source: what `batches` are, in words, for the record.

    Returns:
        Statistics on the CPU, with the model's hash, RoPE type and the date.

    Raises:
        CalibrationError: no tokens, a window beyond the model's context, layers that differ in their rotary pairs, or
            rotary frequencies that were rounded to half precision.
        UnsupportedModelError, RotaryError: see `reasonkv.calibration.queries.rotaries`.
    """
    sums = QuerySums(_checked_rotaries(model), horizon=horizon)
    config, decoder, done = model.config.get_text_config(), model.get_decoder(), 0
    context = getattr(config, "max_position_embeddings", None)
    with watched(model, sums) as arguments:
        for ids_BT in batches:
            if ids_BT.ndim != 2 or ids_BT.numel() == 0:
                raise CalibrationError(f"A batch must be token ids [rows, tokens], not {list(ids_BT.shape)}.")
            T = ids_BT.shape[1]
            if context is not None and context < T:
                raise CalibrationError(
                    f"A window has {T} tokens, but the model's context is {context}; use a smaller window."
                )
            options: dict[str, Any] = {"use_cache": False}
            if piece is not None and piece < T:
                options = {"use_cache": True, "past_key_values": DynamicCache(config=model.config)}
            sums.start = 0
            for part_Bt in torch.split(ids_BT, piece or T, 1):
                decoder(input_ids=part_Bt.to(input_device(model)), **options, **arguments)
                sums.start += part_Bt.shape[1]
            done += ids_BT.numel()
            progress(done)
    if done == 0:
        raise CalibrationError("There is no text to calibrate on; give at least one token.")
    if any(total is None for total in sums.sums):
        raise CalibrationError(f"Layer {sums.sums.index(None)} does not call attention through AttentionInterface.")
    totals = [total.cpu().double() for total in sums.sums if total is not None]
    real, imaginary, modulus, square = (torch.stack(totals, 1) / done).float()
    mean_LHqF, horizon_LHqJ = torch.complex(real, imaginary), None
    if sums.horizon is not None:
        found = [
            fit_horizon(sums.horizon.tau_HqF(layer).cpu(), mean_HqF, rotary.inv_freq.cpu(), future_distances())
            for layer, (mean_HqF, rotary) in enumerate(zip(mean_LHqF, sums.rotaries, strict=True))
        ]
        horizon_LHqJ = torch.stack(found).float()
    return Calibration(
        mean_LHqF, modulus, square, horizon_LHqJ=horizon_LHqJ, head_dim=head_dim_of(config), tokens=done,
        model=model_hash(model), rope_type=rope_type_of(config), verified=True, name=name, source=source,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def working_bytes(config: PreTrainedConfig, batch: int, window: int, *, dtype: torch.dtype, eager: bool = False) -> int:
    """Return an upper estimate of the bytes that `collect` needs beyond the model, for windows fed whole.

    It is the largest moment of one layer (its attention or its feed-forward part, beside the residual stream), the
    un-rotated queries, and the sums. The tests hold it against what is allocated.

    Args:
        config: a transformers configuration.
        batch: rows at once.
        window: tokens of a row.
        dtype: of the model's activations.
        eager: the attention kernel writes all logits out.
    """
    text = config.get_text_config()
    D, Hq = head_dim_of(text), int(text.num_attention_heads)
    H = int(getattr(text, "num_key_value_heads", None) or Hq)
    size, rows = dtype.itemsize, batch * window
    feed_forward = int(text.intermediate_size)
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        feed_forward = max(feed_forward, int(experts) * int(getattr(text, "moe_intermediate_size", feed_forward)))
    wide = max(size, 4)  # norms and rotations compute in float32 at least
    stream = rows * int(text.hidden_size) * (3 * size + 3 * wide)
    attention = rows * D * (6 * Hq + 6 * H) * size
    logits = 3 * batch * Hq * window**2 * wide if eager else 0
    unrotated = 8 * min(rows, TOKENS_AT_ONCE) * Hq * D * 4
    sums = int(text.num_hidden_layers) * 4 * Hq * (D // 2) * 8
    return stream + max(attention + max(logits, unrotated), 4 * rows * feed_forward * size) + sums


def fitting_window(model: PreTrainedModel, batch: int = 1) -> int:
    """Return the longest window, a power of two, that needs at most `MEMORY` bytes and fits the model's context."""
    config = model.config.get_text_config()
    window = LARGEST_WINDOW
    context = getattr(config, "max_position_embeddings", None) or window
    eager = config._attn_implementation == "eager"
    while window > SMALLEST_WINDOW and (
        window > context or working_bytes(config, batch, window, dtype=model.dtype, eager=eager) > MEMORY
    ):
        window //= 2
    return min(window, context)


def _checked_rotaries(model: PreTrainedModel) -> list[Rotary]:
    found = rotaries(model)
    rounded = [name for name, buffer in model.named_buffers() if "inv_freq" in name and buffer.dtype.itemsize < 4]
    if rounded:
        raise CalibrationError(
            f"The model's rotary frequencies ({rounded[0]}) are in half precision, as model.to(dtype) makes them, so "
            "its queries cannot be un-rotated exactly; load it with from_pretrained(..., dtype=...)."
        )
    pairs = {kind: rotary.inv_freq.numel() for kind, rotary in found}
    if len(set(pairs.values())) > 1:
        listed = ", ".join(f"{count} in {kind} layers" for kind, count in pairs.items())
        raise CalibrationError(f"The model's layers differ in their number of rotary pairs ({listed}).")
    return [rotary for _, rotary in found]
