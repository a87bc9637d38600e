"""Collect the statistics of a model's queries from windows of tokens, with running sums only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from reasonkv.calibration.horizon import fit_horizon, future_distances
from reasonkv.calibration.queries import TOKENS_AT_ONCE, QuerySums, summing
from reasonkv.calibration.statistics import Calibration, CalibrationError, head_dim_of, rope_type_of
from reasonkv.identity import model_hash
from reasonkv.rotary import Rotary

LARGEST_WINDOW = 4096
"""Tokens of a window, where memory and the model's context allow it."""
SMALLEST_WINDOW = 256
MEMORY = 10**9
"""Bytes beyond the model that `fitting_window` allows."""


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    piece: int | None = None,
    horizon: bool = False,
    on_done: Callable[[int], None] = lambda _: None,
    name: str | None = None,
    source: str | None = None,
) -> Calibration:
    """Average the queries of every layer over all tokens of `batches` (TriAttention, calibration).

    Every row is a text of its own, from position 0 on. The result does not depend on how rows are batched, up to
    rounding. Nothing of size (tokens) is kept between batches; `working_bytes` says what one batch needs.

    Args:
        model: a causal language model; it is used as it is (dtype, device, attention kernel) and left so.
        batches: int64 ids [B, T], unpadded; T may differ from batch to batch.
        piece: feed a row in pieces of so many tokens with a KV cache; None feeds it whole without one.
        horizon: also fit weights of the future distances (`reasonkv.calibration.horizon`); windows that are short
            beside the model's reach teach short distances.
        on_done: called with the tokens of every batch.
        name: the model's name, for the record.
        source: what `batches` are, in words, for the record.

    Returns:
        Statistics on the CPU, with the model's hash, RoPE type and the date.

    Raises:
        CalibrationError: no tokens, a window beyond the model's context, layers that differ in their rotary pairs, or
            rotary frequencies that were rounded to half precision.
        UnsupportedModelError: a model that no compressed cache can serve.
        RotaryError: RoPE that cannot be undone.
    """
    sums = QuerySums(_rotaries(model), horizon=horizon)
    decoder = model.get_decoder()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    with summing(model, sums) as arguments:
        for ids_BT in batches:
            _check_ids(ids_BT, context)
            T = ids_BT.shape[1]
            step = T if piece is None else piece
            options: dict[str, Any] = {"use_cache": False, **arguments}
            if step < T:
                options.update(use_cache=True, past_key_values=DynamicCache(config=model.config))
            for start in range(0, T, step):
                sums.start = start
                decoder(input_ids=ids_BT[:, start : start + step].to(model.device), **options)
            on_done(ids_BT.numel())
    return _averages(model, sums, name, source)


def working_bytes(config: PreTrainedConfig, batch: int, window: int, *, dtype: torch.dtype, eager: bool = False) -> int:
    """Upper estimate of the bytes that `collect` needs beyond the model, for windows fed whole.

    The largest moment of one layer (its attention or its feed-forward part, beside the residual stream), the
    queries that stand un-rotated, and the sums. The tests hold it against what is allocated.

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
    hidden = int(text.hidden_size)
    feed_forward = int(text.intermediate_size)
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        feed_forward = max(feed_forward, int(experts) * int(getattr(text, "moe_intermediate_size", feed_forward)))
    wide = max(size, 4)  # norms and rotations compute in float32 at least
    stream = rows * hidden * (3 * size + 3 * wide)
    attention = rows * D * (6 * Hq + 6 * H) * size
    logits = 3 * batch * Hq * window**2 * wide if eager else 0
    unrotated = 8 * min(rows, TOKENS_AT_ONCE) * Hq * D * 4
    sums = int(text.num_hidden_layers) * 4 * Hq * (D // 2) * 8
    return stream + max(attention + max(logits, unrotated), 4 * rows * feed_forward * size) + sums


def fitting_window(model: PreTrainedModel, batch: int = 1) -> int:
    """The longest window, a power of two, that needs at most `MEMORY` bytes and fits the model's context."""
    config = model.config.get_text_config()
    window = LARGEST_WINDOW
    context = getattr(config, "max_position_embeddings", None) or window
    eager = config._attn_implementation == "eager"
    while window > SMALLEST_WINDOW and (
        window > context or working_bytes(config, batch, window, dtype=model.dtype, eager=eager) > MEMORY
    ):
        window //= 2
    return min(window, context)


def _rotaries(model: PreTrainedModel) -> list[Rotary]:
    """The rotation of every layer.

    Raises:
        CalibrationError, RotaryError, UnsupportedModelError: as in `collect`.
    """
    # imported here because the runtime imports this package
    from reasonkv.runtimes.transformers.support import UnsupportedModelError, check_model, layer_types

    problems = check_model(model)
    if problems:
        raise UnsupportedModelError(problems[0])
    rounded = [name for name, buffer in model.named_buffers() if "inv_freq" in name and buffer.dtype.itemsize < 4]
    if rounded:
        raise CalibrationError(
            f"The model's rotary frequencies ({rounded[0]}) are in half precision, as model.to(dtype) makes them, so "
            "its queries cannot be un-rotated exactly; load it with from_pretrained(..., dtype=...)."
        )
    types = layer_types(model.config)
    by_type = {one: Rotary.from_config(model.config, one) for one in dict.fromkeys(types)}
    pairs = {one: rotary.inv_freq.numel() for one, rotary in by_type.items()}
    if len(set(pairs.values())) > 1:
        listed = ", ".join(f"{count} in {one} layers" for one, count in pairs.items())
        raise CalibrationError(f"The model's layers differ in their number of rotary pairs ({listed}).")
    return [by_type[one] for one in types]


def _check_ids(ids_BT: Tensor, context: int | None) -> None:
    if ids_BT.ndim != 2 or ids_BT.numel() == 0:
        raise CalibrationError(f"A batch must be token ids [rows, tokens], not {list(ids_BT.shape)}.")
    if context is not None and ids_BT.shape[1] > context:
        raise CalibrationError(
            f"A window has {ids_BT.shape[1]} tokens, but the model's context is {context}; use a smaller window."
        )


def _averages(model: PreTrainedModel, sums: QuerySums, name: str | None, source: str | None) -> Calibration:
    if not any(sums.tokens):
        raise CalibrationError("There is no text to calibrate on; give at least one token.")
    config = model.config.get_text_config()
    layers = []
    for index, (total, tokens) in enumerate(zip(sums.sums, sums.tokens, strict=True)):
        if total is None:
            raise CalibrationError(f"Layer {index} of the model does not call attention through AttentionInterface.")
        layers.append((total.cpu().double() / tokens).float())
    means_4LHqF = torch.stack(layers, dim=1)
    real, imaginary, modulus, square = means_4LHqF.unbind()
    mean_LHqF = torch.complex(real, imaginary)
    return Calibration(
        mean_LHqF,
        modulus,
        square,
        horizon_LHqJ=_horizons(sums, mean_LHqF),
        head_dim=head_dim_of(config),
        tokens=sums.tokens[0],
        model=model_hash(model),
        rope_type=rope_type_of(config),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        verified=True,
        name=name,
        source=source,
    )


def _horizons(sums: QuerySums, mean_LHqF: Tensor) -> Tensor | None:
    """Weights of the future distances of all layers, float32 [L, Hq, J], where they were asked for."""
    if sums.horizon is None:
        return None
    offsets_J = future_distances()
    found = [
        fit_horizon(sums.horizon.tau_HqF(layer).cpu(), mean_HqF, rotary.inv_freq.cpu(), offsets_J)
        for layer, (mean_HqF, rotary) in enumerate(zip(mean_LHqF, sums.rotaries, strict=True))
    ]
    return torch.stack(found).float()
