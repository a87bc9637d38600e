"""Query statistics equal those of the model's own queries before RoPE, for every family, batch and kernel."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import CONFIGS, batch, tiny_model
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from reasonkv.calibration import (
    Calibration,
    CalibrationError,
    collect,
)
from reasonkv.calibration.corpus import read_corpus
from reasonkv.calibration.job import CorpusJob
from reasonkv.identity import model_hash
from reasonkv.rotary import RotaryError
from reasonkv.runtimes.transformers import CompressedCache, UnsupportedModelError

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
INTERLEAVED = {"cohere": 8, "glm4": 4}  # dimension 2f pairs with 2f + 1; how many such pairs
OTHERWISE = ("gemma4", *(name for name, config in CONFIGS.items() if getattr(config, "kv_lora_rank", None)))
"""Refused (layers that differ in their pairs), or with queries from another projection (tests/test_latent.py)."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}


def own_queries(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Each layer's queries [B, T, Hq, D] straight from its projection and its norm, before any rotation."""
    found: list[Tensor] = []
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads

    def keep(attention: Any) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
            hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            projection = getattr(attention, "q_proj", None) or attention.qkv_proj
            queries = projection(hidden)[..., : heads * size].unflatten(-1, (heads, size))
            found.append(attention.q_norm(queries) if hasattr(attention, "q_norm") else queries)

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(keep(layer.self_attn), with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def direct(model: PreTrainedModel, batches: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, mean modulus and mean square by definition, float64 [L, Hq, F]."""
    per_layer: list[list[Tensor]] = []
    for ids in batches:
        queries = [one.double().flatten(0, 1) for one in own_queries(model, ids)]
        per_layer = [[*old, new] for old, new in zip(per_layer or [[] for _ in queries], queries, strict=True)]
    tokens = torch.stack([torch.cat(parts) for parts in per_layer])  # [L, N, Hq, D]
    F = tokens.shape[-1] // 2
    complex_tokens = torch.complex(tokens[..., :F], tokens[..., F:])
    if model.config.model_type in INTERLEAVED:
        rotated = tokens[..., : 2 * INTERLEAVED[model.config.model_type]]
        complex_tokens = torch.complex(rotated[..., ::2], rotated[..., 1::2])
    return complex_tokens.mean(1), complex_tokens.abs().mean(1), complex_tokens.abs().square().mean(1)


def check_equal(found: Calibration, expected: tuple[Tensor, Tensor, Tensor], **close: float) -> None:
    mean, modulus, square = expected
    close = close or CLOSE
    assert found.square_LHqF is not None
    assert found.mean_LHqF.dtype == torch.complex64 and found.modulus_LHqF.dtype == torch.float32
    assert_close(found.mean_LHqF.to(torch.complex128), mean, **close)
    assert_close(found.modulus_LHqF.double(), modulus, **close)
    assert_close(found.square_LHqF.double(), square, **close)


def texts() -> list[Tensor]:
    return [batch([37, 37])[0], batch([20], seed=1)[0]]


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in OTHERWISE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_equal_a_direct_computation(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    found = collect(model, texts())
    check_equal(found, direct(model, texts()))
    assert found.tokens == 2 * 37 + 20


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_attention_kernel_does_not_matter_and_is_set_back(kernel: str) -> None:
    model = tiny_model("gemma3", kernel=kernel)
    ids = batch([30])[0]
    with torch.no_grad():
        before = model(ids).logits
        found = collect(model, texts())
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == kernel
    check_equal(found, direct(model, texts()))


def test_yarn_scaling_is_no_part_of_the_statistics() -> None:
    config = LlamaConfig(**models.COMMON, rope_parameters=YARN)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    assert model.model.rotary_emb.attention_scaling > 1.2
    found = collect(model, texts())
    check_equal(found, direct(model, texts()))
    assert found.rope_type == "yarn"


def test_dimensions_that_rope_leaves_alone_are_left_out() -> None:
    config = copy.deepcopy(CONFIGS["phi3"])
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = AutoModelForCausalLM.from_config(config).double().eval()
    found = collect(model, texts())
    assert (found.head_dim, found.pairs) == (16, 4)
    queries = torch.stack([torch.cat([own_queries(model, ids)[i].flatten(0, 1) for ids in texts()]) for i in range(3)])
    assert_close(found.modulus_LHqF.double(), torch.complex(queries[..., :4], queries[..., 4:8]).abs().mean(1), **CLOSE)


def test_half_precision_stays_close_to_its_own_queries(tmp_path: Path) -> None:
    tiny_model("qwen3", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = [batch([400, 400])[0]]
    check_equal(collect(model, ids), direct(model, ids), rtol=2e-3, atol=2e-3)


def test_rotary_frequencies_rounded_to_half_precision_are_refused() -> None:
    with pytest.raises(CalibrationError, match="half precision"):
        collect(tiny_model("qwen3", torch.float32).to(torch.bfloat16), texts())


def test_batches_equal_single_windows() -> None:
    model = tiny_model("llama", torch.float32)
    rows = batch([33] * 5)[0]
    together, apart = collect(model, [rows]), collect(model, rows.split(1))
    assert_close(together.mean_LHqF, apart.mean_LHqF, **CLOSE)
    assert_close(together.modulus_LHqF, apart.modulus_LHqF, **CLOSE)
    assert together.tokens == apart.tokens == 5 * 33


def test_far_positions_are_undone_as_exactly_as_near_ones() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids = batch([3000])[0]
    check_equal(collect(model, [ids]), direct(model, [ids]), rtol=1e-4, atol=1e-5)


def test_the_models_hash_is_the_same_under_any_attention() -> None:
    model = tiny_model("qwen3", torch.float32)
    digest = model_hash(model)
    assert collect(model, texts()).model == digest
    with CompressedCache(model, "streaming", 128):
        assert model_hash(model) == digest


def test_concentration_is_one_for_a_constant_query_and_zero_for_a_dead_pair() -> None:
    mean = torch.zeros(1, 2, 4, dtype=torch.complex64)
    mean[0, 0] = torch.tensor([1 + 1j, 2, 0, 0.5j])
    found = Calibration(mean, mean.abs() * torch.tensor([1.0, 2.0]).view(1, 2, 1), head_dim=8)
    assert_close(found.concentration_LHqF()[0, 0], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert_close(found.concentration_LHqF()[0, 1], torch.zeros(4))
    assert_close(found.concentration(2), torch.tensor([[1.0, 0.0]]))


# -- memory -------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made inside and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.known:
                    self._follow(storage)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self.now -= size
            self.known.discard(address)

        weakref.finalize(storage, forget)


WIDE = Qwen3Config(
    vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64,
)  # fmt: skip


def peak(model: PreTrainedModel, batches: list[Tensor]) -> int:
    with LiveBytes() as live:
        collect(model, batches)
    return live.peak


def test_memory_does_not_grow_with_the_number_of_windows() -> None:
    model = AutoModelForCausalLM.from_config(WIDE).eval()
    ids = torch.randint(0, 64, (1, 256))
    assert peak(model, [ids] * 6) <= peak(model, [ids]) * 1.05


EIGHT_B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "context", "window"),
    [
        ("sdpa", 40960, 4096),
        ("eager", 40960, 1024),
        ("sdpa", 512, 512),
    ],
)
def test_windows_of_a_text_are_short_for_eager_attention_and_fit_the_context(
    kernel: str, context: int, window: int
) -> None:
    config = copy.deepcopy(EIGHT_B)
    config.max_position_embeddings = context
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    _, source = read_corpus(CorpusJob(text=Path("book.txt")), model, None)  # type: ignore[arg-type]
    assert source == f"text book.txt in windows of {window} tokens"


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_windows_beyond_the_context_and_empty_texts_are_refused() -> None:
    model = tiny_model("qwen3")
    with pytest.raises(CalibrationError, match=r"4097 tokens, but the model's context is 4096"):
        collect(model, [torch.zeros(1, 4097, dtype=torch.long)])
    with pytest.raises(CalibrationError, match="no text"):
        collect(model, [])
    with pytest.raises(CalibrationError, match=r"\[rows, tokens\]"):
        collect(model, [torch.zeros(4, dtype=torch.long)])
    assert model.config._attn_implementation == "sdpa"


def test_models_whose_rope_cannot_be_undone_are_refused() -> None:
    config = LlamaConfig(**models.COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises((UnsupportedModelError, RotaryError), match="dynamic"):
        collect(AutoModelForCausalLM.from_config(config), texts())


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", {"num_hidden_layers": 5}, "3 layers, but the model has 5"),
        ("qwen3", {"num_attention_heads": 8}, "4 query heads in a layer, but the model has 8"),
        ("qwen3", {"head_dim": 32}, "16 dimensions in a head, but the model has 32"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "8 rotary pairs in a head, but the model has 4"),
        ("qwen3", {"rope_parameters": YARN}, "RoPE type 'default', but the model has 'yarn'"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rotary frequencies whose hash is"),
    ],
)  # fmt: skip
def test_another_models_statistics_are_refused_with_both_numbers(
    family: str, change: dict[str, Any], words: str
) -> None:
    model = tiny_model(family)
    found = collect(model, texts())
    found.check(model.config, model_hash(model))
    other = copy.deepcopy(model.config)
    other.layer_types = None
    other.update(change)
    with pytest.raises(CalibrationError, match=words):
        found.check(other)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    mean, modulus = torch.zeros(2, 3, 4, dtype=torch.complex64), torch.zeros(2, 3, 4)
    with pytest.raises(CalibrationError, match="all alike"):
        Calibration(mean, modulus[:1], head_dim=8)
    with pytest.raises(CalibrationError, match="not finite"):
        Calibration(mean, modulus + torch.nan, head_dim=8)
    with pytest.raises(CalibrationError, match=r"torch\.float32"):
        Calibration(mean, modulus.double(), head_dim=8)
    with pytest.raises(CalibrationError, match="head_dim of 6"):
        Calibration(mean, modulus, head_dim=6)
