"""The recipe of the bundled model: its shape, its optimizer and its curriculum, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import Qwen3Config

from tools.testbed.tokenizer import EOS, PAD, VOCABULARY

Range = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """One difficulty of a family: how many tokens a step takes of it, and its dials.

    A step at this stage draws every dial once: a whole number from its inclusive range, or one of
    its words. Dials not named keep their defaults.
    """

    tokens: int
    ranges: Mapping[str, Range] = field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """A family's stages, from easy to hard; every `every`-th step has a batch of it."""

    stages: tuple[Stage, ...]
    every: int = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the trained model, given the machine's arithmetic.

    A course is named after its family; `family/variant` is a second course of the same family.

    The learning rate warms up for `warmup` steps, stays at `learning_rate`, and falls linearly to
    zero over the last `decay` of the run. A family moves to its next stage when the running
    accuracy of value look-ups at its present stage passes `promote_at`.
    """

    courses: Mapping[str, Course]
    steps: int = 3300
    layers: int = 3
    hidden: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    learning_rate: float = 1.5e-3
    warmup: int = 50
    decay: float = 0.35
    weight_decay: float = 0.01
    clip: float = 1.0
    promote_at: float = 0.95
    review: float = 0.2
    seed: int = 1
    save_every: int = 100
    log_every: int = 10
    autocast: bool = True

    def model_config(self) -> Qwen3Config:
        """A standard Qwen3 configuration; nothing about the model is custom."""
        return Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )

    @staticmethod
    def bundled() -> Recipe:
        """The recipe of the model in this package."""
        return Recipe(courses=_COURSES)

    @staticmethod
    def smoke() -> Recipe:
        """A tiny model and a few steps: seconds, for tests of the machinery."""
        courses = {
            "program": Course((Stage(120, {"lines": (4, 6), "constants": (2, 2)}),)),
            "longdoc": Course((Stage(120, {"tokens": (40, 60), "ask": (2, 3)}),)),
        }
        return replace(
            Recipe(courses=courses),
            steps=8,
            layers=2,
            hidden=64,
            query_heads=2,
            kv_heads=1,
            head_dim=16,
            intermediate=64,
            warmup=2,
            save_every=4,
            log_every=1,
        )


def _program(tokens: int, lines: Range, constants: Range, variables: Range, report: Range) -> Stage:
    return Stage(
        tokens,
        {"lines": lines, "constants": constants, "variables": variables, "report": report},
    )


def _recall(tokens: int, distance: Range, facts: Range, ask: Range) -> Stage:
    return Stage(
        tokens,
        {"distance": distance, "facts": facts, "ask": ask},
        {"where": ("trace", "trace", "prompt")},
    )


def _longdoc(tokens: int, length: Range, ask: Range, *modes: str) -> Stage:
    return Stage(tokens, {"tokens": length, "ask": ask}, {"mode": modes})


def _search(tokens: int, nodes: Range) -> Stage:
    return Stage(tokens, {"nodes": nodes, "extra": (20, 60), "depth": (30, 70)})


def _arithmetic(tokens: int, operation: str, digits: Range) -> Stage:
    return Stage(tokens, {"digits": digits}, {"operation": (operation,)})


_COURSES: Mapping[str, Course] = {
    "program": Course(
        (
            _program(1400, (8, 14), (2, 2), (4, 8), (2, 4)),
            _program(2000, (10, 24), (2, 4), (4, 8), (2, 6)),
            _program(3200, (20, 48), (3, 6), (6, 12), (3, 6)),
            _program(3200, (32, 60), (4, 8), (8, 14), (4, 8)),
            _program(3200, (40, 66), (4, 8), (10, 14), (4, 8)),
        )
    ),
    "search": Course(
        (
            _search(1000, (4, 6)),
            _search(1500, (5, 10)),
            _search(2200, (8, 18)),
            _search(2800, (14, 26)),
            _search(3200, (20, 34)),
        )
    ),
    "arithmetic": Course(
        (
            _arithmetic(1000, "multiply", (2, 2)),
            _arithmetic(1500, "multiply", (2, 3)),
            _arithmetic(2200, "multiply", (3, 4)),
            _arithmetic(3000, "multiply", (4, 6)),
        )
    ),
    "arithmetic/add": Course(
        (
            _arithmetic(1000, "add", (2, 8)),
            _arithmetic(1500, "add", (4, 20)),
            _arithmetic(2200, "add", (16, 50)),
        ),
        every=3,
    ),
    "recall": Course(
        (
            _recall(1200, (60, 120), (2, 4), (2, 4)),
            _recall(1600, (100, 300), (3, 8), (3, 8)),
            _recall(2000, (250, 700), (4, 10), (4, 10)),
            _recall(2400, (300, 700), (6, 10), (4, 8)),
            _recall(2800, (250, 1600), (6, 12), (4, 8)),
        ),
        every=2,
    ),
    "longdoc": Course(
        (
            _longdoc(1200, (40, 80), (4, 8), "facts", "passage"),
            _longdoc(1500, (80, 240), (8, 24), "facts", "facts", "passage"),
            _longdoc(2000, (200, 600), (16, 32), "facts", "facts", "passage"),
            _longdoc(2600, (500, 1200), (16, 32), "facts", "facts", "facts", "passage"),
            _longdoc(2800, (700, 1800), (16, 32), "facts", "facts", "facts", "passage"),
        ),
        every=2,
    ),
}
