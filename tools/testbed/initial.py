"""Initial weights: an ordinary random start, plus heads that already look back and look up.

Looking a value up takes two steps (an "induction" circuit): a token must know what stood before
it, and a later layer must match on that and copy. Qwen3 has no biases in its query and key
projections and normalizes both, so both steps are slow to appear from a purely random start: in our
trials they took longer than everything else in training. We therefore lay them down and let
training do the rest; every weight stays trainable.

The residual stream starts in three parts: token embeddings in the lower half (with one component
common to all), a projection of the token one back in the third quarter, and of the token two back
in the last quarter.

* Layer 0, head h attends h + 1 tokens back, by its fastest rotary frequencies; heads 0 and 1 write
  what they see into the last two quarters.
* Layer 1 copies the token it attends to. Its first group of heads matches "my token is the token
  before yours" (what follows a name), its second "the token before me is two before you".
* Layer 2's first group matches "we have the same token two before us" (the same place in a line).
"""

from __future__ import annotations

import torch
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

_COMMON = 0.25  # the component that all embeddings share, in dimension 0
_FREQUENCIES = 8  # rotary pairs that place a shift head's peak; fewer repeat within the context
_SHIFT_GAIN = 3.0  # on normalized queries and keys: a peak about 10 above its neighbours
_MATCH_GAIN = 1.5
_OUT = 0.006  # random residual writers start small beside the embeddings
_FINAL_GAIN = 0.3  # keeps the first logits small: tied embeddings predict the present token


@torch.no_grad()
def initialise(model: Qwen3ForCausalLM) -> None:
    """Set all weights of a fresh model, in place, from torch's global generator.

    Needs hidden size >= 4 head sizes; the parts that need a second or third layer are left out of
    shallower models.
    """
    config = model.config
    hidden, size = config.hidden_size, config.head_dim
    half = hidden // 2
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            writes = "o_proj" in name or "down_proj" in name
            weight.normal_(0, _OUT if writes else hidden**-0.5)
        elif "q_norm" in name or "k_norm" in name:
            weight.fill_(_MATCH_GAIN)
    model.model.norm.weight.fill_(_FINAL_GAIN)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0, half**-0.5)
    embedding[:, half:] = 0
    embedding[:, 0] = _COMMON
    project = torch.randn(size, hidden) * half**-0.5  # of token embeddings, to one head's size
    project[:, half:] = 0
    project[:, 0] = 0
    back_one = torch.eye(size, hidden).roll(half, 1)
    back_two = back_one.roll(size, 1)
    layers: list[Qwen3Attention] = [layer.self_attn for layer in model.model.layers]
    _make_shift_heads(layers[0], config.rope_parameters["rope_theta"])
    layers[0].v_proj.weight[:size] = project
    for head, where in enumerate((back_one, back_two)):
        layers[0].o_proj.weight[:, head * size : (head + 1) * size] = 0.09 * where.T
    if len(layers) > 1:
        _make_match(layers[1], 0, project, back_one, project)
        _make_match(layers[1], 1, back_one, back_two, project)
    if len(layers) > 2:
        _make_match(layers[2], 0, back_two, back_two, project)


def _make_shift_heads(attention: Qwen3Attention, base: float) -> None:
    """Head h attends h + 1 tokens back: its queries are the constant key, rotated by h + 1."""
    size = attention.head_dim
    half = size // 2
    pairs = min(_FREQUENCIES, half)
    angle = base ** (-torch.arange(pairs) / half)
    queries = attention.q_proj.weight.view(-1, size, attention.q_proj.weight.shape[1])
    keys = attention.k_proj.weight.view(-1, size, queries.shape[-1])
    for weight in (queries, keys):
        weight.mul_(0.1 * size**-0.5)
    keys[:, :pairs, 0] = 1.0
    for head in range(queries.shape[0]):
        queries[head, :pairs, 0] = torch.cos((head + 1) * angle)
        queries[head, half : half + pairs, 0] = -torch.sin((head + 1) * angle)
    attention.q_norm.weight.fill_(_SHIFT_GAIN)
    attention.k_norm.weight.fill_(_SHIFT_GAIN)


def _make_match(
    attention: Qwen3Attention,
    group: int,
    query: torch.Tensor,
    key: torch.Tensor,
    copy: torch.Tensor,
) -> None:
    """A KV head and its query heads that match `query` x with `key` x and write the token's copy.

    `query`, `key` and `copy` are [head size, hidden]; the copy lands in the embeddings' half.
    """
    size = attention.head_dim
    share = attention.num_key_value_groups
    if group * size >= attention.k_proj.weight.shape[0]:
        return
    attention.k_proj.weight[group * size : (group + 1) * size].mul_(0.2).add_(key)
    attention.v_proj.weight[group * size : (group + 1) * size] = copy
    for head in range(group * share, (group + 1) * share):
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows].mul_(0.2).add_(query)
        attention.o_proj.weight[:, rows] += 0.06 * copy.T
