"""Collect the statistics of a model's queries from windows of tokens, with running sums only.

The queries are those that the model's attention function is given: an attention function registered with transformers
shows them and then attends. They have one layout for every model family, unlike what forward hooks on projections and
norms see. Only the rotation has to be undone, which is exact because positions are known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonkv.calibration.horizon import HorizonSums, fit_horizon
from reasonkv.calibration.statistics import Calibration, CalibrationError, frequencies_of, rope_type_of
from reasonkv.identity import model_hash, norm_weights
from reasonkv.layers import bounded_layers, head_dim_of, hide_unchosen, layer_rotaries
from reasonkv.offload import input_device
from reasonkv.rotary import Rotary

Watch = Callable[[int, Tensor, Tensor, dict[str, Any]], None]
"""Called with a layer's index, its rotated queries [B, Hq, T, D] and keys [B, H, T, D], and its attention's options."""

_KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_ARGUMENT, _PREFIX = "reasonkv_watch", "reasonkv_watched_"
_TOKENS_AT_ONCE = 512  # whose un-rotated queries are held in float32


@contextmanager
def watched(model: PreTrainedModel, watch: Watch) -> Iterator[dict[str, Any]]:
    """Set the model's attention to one that shows queries and keys, and set it back afterwards.

    Yields:
        Keyword arguments that a forward must be given for `watch` to be called in every layer.
    """
    before = model.get_decoder().config._attn_implementation or "eager"
    kernel = before.removeprefix("reasonkv_")
    model.set_attn_implementation(_PREFIX + (kernel if kernel in _KERNELS else "sdpa"))
    try:
        yield {_ARGUMENT: watch}
    finally:
        model.set_attn_implementation(before)


def rotaries(model: PreTrainedModel) -> list[Rotary]:
    """Return the rotation of every layer, on the model's device.

    Raises:
        UnsupportedModelError: a model that no compressed cache can serve.
        RotaryError: RoPE that cannot be undone.
    """
    from reasonkv.resolve import UnsupportedModelError, attends_by_itself, check_model

    problems = check_model(model)
    if problems:
        raise UnsupportedModelError(problems[0])
    if attends_by_itself(model):
        raise UnsupportedModelError(f"{type(model).__name__} attends by code of its own, which shows no queries.")
    return [rotary.to(input_device(model)) for rotary in layer_rotaries(model.config)]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    horizon: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    name: str | None = None,
    source: str | None = None,
) -> Calibration:
    """Average the queries of every layer over all tokens of `batches` (TriAttention, calibration).

    Every row is a text of its own, from position 0 on. The result does not depend on how rows are batched, up to
    rounding. Nothing of size (tokens) is kept between batches. Un-rotating costs one rounding of a query in the model's
    dtype, of random sign, which the mean over thousands of tokens removes.

    Args:
        model: a causal language model; its dtype, device and attention kernel are used and not changed.
        batches: int64 ids [B, T], unpadded; T may differ from batch to batch.
        horizon: also fit weights of the future distances (`reasonkv.calibration.horizon`). No distance longer than a
            window is learned.
        progress: called with the number of tokens done after every batch.
        name: the model's name, for the record.
        source: what `batches` are, in words, for the record.

    Returns:
        Statistics on the CPU, with the model's hash, RoPE type and frequencies, and the date.

    Raises:
        CalibrationError: no tokens, a window beyond the model's context, layers that differ in their rotary pairs, or
            rotary frequencies that were rounded to half precision.
        UnsupportedModelError, RotaryError: see `rotaries`.
    """
    rotary_L = _checked_rotaries(model)
    F = rotary_L[0].inv_freq.numel()
    sums: dict[int, Tensor] = {}  # by layer, [4, Hq, F]: real and imaginary part, modulus, square
    phases = HorizonSums() if horizon else None

    def add(layer: int, query_BHqTD: Tensor, key_BHTD: Tensor, options: dict[str, Any]) -> None:
        (B, Hq, T, D), device, rotary = query_BHqTD.shape, query_BHqTD.device, rotary_L[layer]
        if layer not in sums:
            wide = torch.float32 if device.type == "mps" else torch.float64
            sums[layer] = torch.zeros(4, Hq, F, dtype=wide, device=device)
        step = max(1, _TOKENS_AT_ONCE // B)
        for part_BHqtD, position_t in zip(
            torch.split(query_BHqTD, step, 2), torch.split(torch.arange(T, device=device), step), strict=True
        ):
            plain_BHqtD = rotary.canonical(rotary.unrotate(part_BHqtD.float(), position_t))
            real, imaginary = plain_BHqtD[..., :F], plain_BHqtD[..., F : 2 * F]
            square = real.square() + imaginary.square()
            for row, values in enumerate((real, imaginary, square.sqrt(), square)):
                sums[layer][row] += values.sum((0, 2))
        if phases is not None:
            phases.add(layer, rotary, query_BHqTD, key_BHTD, options.get("scaling") or D**-0.5)

    config, decoder, done = model.config.get_text_config(), model.get_decoder(), 0
    context = getattr(config, "max_position_embeddings", None)
    with watched(model, add) as arguments:
        for ids_BT in batches:
            if ids_BT.ndim != 2 or ids_BT.numel() == 0:
                raise CalibrationError(f"A batch must be token ids [rows, tokens], not {list(ids_BT.shape)}.")
            T = ids_BT.shape[1]
            if context is not None and context < T:
                raise CalibrationError(
                    f"A window has {T} tokens, but the model's context is {context}; use a smaller window."
                )
            decoder(input_ids=ids_BT.to(input_device(model)), use_cache=False, **arguments)
            done += ids_BT.numel()
            progress(done)
    if done == 0:
        raise CalibrationError("There is no text to calibrate on; give at least one token.")
    missing = sorted(set(bounded_layers(model.config)) - set(sums))
    if missing:
        raise CalibrationError(f"Layer {missing[0]} does not call attention through AttentionInterface.")
    nothing = torch.zeros_like(next(iter(sums.values())))  # of layers without attention, so that layer i stays row i
    totals = torch.stack([sums.get(layer, nothing).cpu().double() for layer in range(len(rotary_L))], 1)
    real, imaginary, modulus, square = (totals / done).float()
    mean_LHqF, horizon_LHqJ = torch.complex(real, imaginary), None
    if phases is not None:
        found = [
            fit_horizon(phases.tau_HqF(layer if layer in sums else min(sums)).cpu(), mean_HqF, rotary.inv_freq.cpu())
            for layer, (mean_HqF, rotary) in enumerate(zip(mean_LHqF, rotary_L, strict=True))
        ]
        horizon_LHqJ = torch.stack(found).float()
    return Calibration(
        mean_LHqF, modulus, square, horizon_LHqJ=horizon_LHqJ, head_dim=head_dim_of(config), tokens=done,
        model=model_hash(model), rope_type=rope_type_of(config), frequencies=frequencies_of(config),
        norms=norm_weights(model), verified=True, name=name, source=source,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def attention_weights(
    queries_HgTD: Tensor,
    keys_HLD: Tensor,
    positions_T: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the weights [H, g, T, L] that queries at some positions pay to all keys up to their own.

    Args:
        scaling, softcap, sinks: of the model's attention; learned sinks [Hq] take weight and give nothing.
    """
    (H, g, T, _), L = queries_HgTD.shape, keys_HLD.shape[1]
    logits: Tensor = ((queries_HgTD.flatten(1, 2) * scaling) @ keys_HLD.mT).view(H, g, T, L)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    later_TL = torch.arange(L, device=logits.device) > positions_T[:, None]
    logits = logits.masked_fill_(later_TL, float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    sinks_HgT1 = sinks.to(logits.dtype).view(H, g, 1, 1).expand(H, g, T, 1)
    return torch.cat([logits, sinks_HgT1], -1).softmax(-1)[..., :-1]


def _checked_rotaries(model: PreTrainedModel) -> list[Rotary]:
    found = rotaries(model)
    rounded = [name for name, buffer in model.named_buffers() if "inv_freq" in name and buffer.dtype.itemsize < 4]
    if rounded:
        raise CalibrationError(
            f"The model's rotary frequencies ({rounded[0]}) are in half precision, as model.to(dtype) makes them, so "
            "its queries cannot be un-rotated exactly; load it with from_pretrained(..., dtype=...)."
        )
    pairs = sorted({rotary.inv_freq.numel() for rotary in found})
    if len(pairs) > 1:
        raise CalibrationError(f"The model's layers differ in their number of rotary pairs ({pairs}).")
    return found


def _attention(kernel: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        watch: Watch | None = kwargs.pop(_ARGUMENT, None)
        if watch is not None:
            watch(int(module.layer_idx), query, key, kwargs)  # type: ignore[arg-type]  # an int, not a submodule
        chosen = kwargs.pop("indices", None)
        if chosen is not None and attention_mask is not None:  # of an indexer, which hides nothing by itself
            attention_mask = hide_unchosen(attention_mask, chosen)
        # the eager attention of the model's own file knows its softcap and sinks
        own = sys.modules[type(module).__module__]
        stock = own.eager_attention_forward if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
        out: tuple[Tensor, Tensor | None] = stock(module, query, key, value, attention_mask, **kwargs)
        return out

    return forward


for _kernel in _KERNELS:
    AttentionInterface.register(_PREFIX + _kernel, _attention(_kernel))
    AttentionMaskInterface.register(_PREFIX + _kernel, ALL_MASK_ATTENTION_FUNCTIONS[_kernel])
