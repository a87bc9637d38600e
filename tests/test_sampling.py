"""What sampling promises: the tokens that transformers' own filters leave, stop texts, a budget of thinking, and
published settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TASK, tiny_loaded, tiny_model
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from reasonkv import CompressedCache
from reasonkv.evaluate.decoding import FIRST, DecodingError, Generated, Request, TextRules, decode_batch, likely_tokens
from reasonkv.evaluate.generate import decode as text_of
from reasonkv.evaluate.generate import encode
from reasonkv.evaluate.job import GenerateJob, JobError, ReplayJob, Sampling, TraceSettings
from reasonkv.evaluate.published import DIRECT, OPEN, THINKING, fill, with_published
from reasonkv.evaluate.run import run
from reasonkv.models import LoadedModel
from reasonkv.tasks import TaskOptions, get_task
from reasonkv.tasks.declaration import Declaration

WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


@pytest.mark.parametrize("spread", [0.2, 1.0, 6.0])
@pytest.mark.parametrize(
    "fields", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 400, "top_p": 0.8, "min_p": 0.01}]
)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers_filters(fields: dict, spread: float) -> None:
    scores = spread * torch.randn(3, 4 * FIRST, generator=torch.Generator().manual_seed(1))
    kept, ids = likely_tokens(Sampling(1.0, **({"top_p": 1.0} | fields)), scores)
    ours = torch.full_like(scores, -torch.inf).scatter(1, ids, kept)
    theirs = LogitsProcessorList([WARPERS[name](value) for name, value in fields.items()])(None, scores)
    assert torch.equal(ours, theirs)


def test_tokens_as_likely_as_the_last_one_may_be_drawn_whatever_their_order() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0]).repeat(1, 1)
    for sampling in (Sampling(1.0, 1.0, top_k=2), Sampling(1.0, 0.6)):
        kept, ids = likely_tokens(sampling, scores)
        assert sorted(ids[0, kept[0] > -torch.inf].tolist()) == [0, 2, 3, 4]


def write(
    loaded: LoadedModel, prompts: list[torch.Tensor], sampling: Sampling, limit: int = 40, think_end: str = "</think>"
) -> list[Generated]:
    requests = [Request(one, limit, number) for number, one in enumerate(prompts)]
    lengths, seeds = [len(one) for one in prompts], [one.row_seed for one in requests]
    rules = TextRules(loaded.tokenizer, sampling, think_end)
    with CompressedCache(loaded.model, "full", prompt_lengths=lengths, row_seeds=seeds) as cache:
        return decode_batch(loaded.model, cache, requests, sampling=sampling, rules=rules)


def test_the_repetition_penalty_is_that_of_model_generate() -> None:
    loaded = tiny_loaded(torch.float64)
    prompts = [torch.arange(7, 30), torch.arange(40, 52)]
    settings = GenerationConfig(max_new_tokens=40, repetition_penalty=1.4, pad_token_id=0, do_sample=False)
    outputs = write(loaded, prompts, Sampling(repetition_penalty=1.4))
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = loaded.model.generate(prompt[None], generation_config=settings)[0, len(prompt) :].tolist()
        assert output.tokens == theirs
    assert outputs != write(loaded, prompts, Sampling())


def test_a_stop_text_ends_an_output_and_is_cut_off() -> None:
    loaded = tiny_loaded()
    prompts = [torch.arange(7, 30), torch.arange(40, 52)]
    plain = write(loaded, prompts, Sampling())
    stop = text_of(loaded.tokenizer, plain[0].tokens[4:6])
    first, second = write(loaded, prompts, Sampling(stop=(stop,)))
    assert (first.tokens, first.truncated) == (plain[0].tokens[:6], False)
    assert text_of(loaded.tokenizer, first.tokens, (stop,)) == text_of(loaded.tokenizer, plain[0].tokens[:4]) + " "
    assert second.tokens == plain[1].tokens[: len(second.tokens)]
    with pytest.raises(DecodingError, match="need a tokenizer"):
        list(decode_batch(tiny_model(), None, [], sampling=Sampling(stop=(stop,))))  # type: ignore[arg-type]


def test_thinking_ends_after_its_budget_and_only_where_it_goes_on() -> None:
    loaded = tiny_loaded()
    problem = encode(loaded.tokenizer, get_task(TASK).problem(0).prompt)  # its last token opens thinking
    end = encode(loaded.tokenizer, "</think>").tolist()
    closed = torch.cat([problem, torch.tensor(end)])
    plain = write(loaded, [problem, closed], Sampling())
    assert not any(set(end) & set(one.tokens) for one in plain)
    thought, answered = write(loaded, [problem, closed], Sampling(think_budget=9))
    assert thought.tokens[:9] == plain[0].tokens[:9]
    assert thought.tokens[9:10] == end
    assert thought.tokens.count(end[0]) == 1
    assert answered.tokens == plain[1].tokens
    assert write(loaded, [problem], Sampling(think_budget=9)) == [thought]
    (other,) = write(loaded, [closed], Sampling(think_budget=3), think_end="n00 n01")  # marks of another model
    assert other.tokens[3:5] == encode(loaded.tokenizer, "n00 n01").tolist()


# -- published settings -----------------------------------------------------------------------------------------------


def named(name: str, kind: str | None = None, **own: object) -> LoadedModel:
    loaded = tiny_loaded()
    loaded.model.config.model_type = kind or "llama"
    loaded.model.generation_config = GenerationConfig(**own)
    return replace(loaded, name=name)


@pytest.mark.parametrize(
    ("model", "thinking", "expected"),
    [
        (named("Qwen/Qwen3-8B", "qwen3"), None, THINKING),
        (named("Qwen/Qwen3-8B", "qwen3"), "off", DIRECT),
        (named("Qwen/Qwen3-4B-Instruct-2507", "qwen3", do_sample=True, top_p=0.8), None, DIRECT),
        (named("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"), None, {"temperature": 0.6, "top_p": 0.95}),
        (named("openai/gpt-oss-20b", "gpt_oss"), None, OPEN),
        (
            named("own", do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),
            None,
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
        ),
    ],
    ids=["qwen3", "qwen3-off", "qwen3-instruct", "r1", "gpt-oss", "its own file"],
)
def test_published_sampling_is_that_of_the_model_s_authors(model: LoadedModel, thinking: str, expected: dict) -> None:
    asked = Sampling(preset="published", min_p=0.1)
    assert fill(asked, model, thinking=thinking) == Sampling(**expected, min_p=0.1)
    assert fill(Sampling(temperature=0.3, preset="published"), model, thinking=thinking).temperature == 0.3
    assert fill(Sampling(0.3), model) == Sampling(0.3)


def test_a_task_s_own_sampling_counts_where_the_family_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = {"first": Declaration(sampling={"temperature": 0.8, "top_k": 5}, max_new_tokens=99, stop=["Q:"])}
    monkeypatch.setattr("reasonkv.evaluate.published.declaration_of", declared.get)
    asked = Sampling(preset="published")
    job = GenerateJob(task="first", samples=2, sampling=asked, methods="full")
    found = with_published(job, named("own"))
    assert (found.sampling, found.max_new_tokens) == (Sampling(0.8, top_k=5, stop=("Q:",)), 99)
    traces = ReplayJob(task="first", traces=TraceSettings(source="sampled", preset="published"))
    assert with_published(traces, named("own")).traces.sampling == Sampling(0.8, top_k=5, stop=("Q:",))
    assert fill(asked, named("x/r1-distill-y"), ["first"]).temperature == 0.6
    declared["second"] = Declaration(sampling={"temperature": 0.1})
    for others in (["first", "program"], ["first", "second"]):
        with pytest.raises(JobError, match="one by one"):
            fill(asked, named("own"), others)
    with pytest.raises(JobError, match="Nobody publishes sampling for own"):
        fill(asked, named("own"), ["program"])


def test_a_task_s_own_limit_and_stop_texts_count(tmp_path: Path) -> None:
    def task(text: str = "") -> str:
        (tmp_path / "rows.jsonl").write_text('{"question": "w", "answer": "x"}\n')
        fields = "dataset: rows.jsonl\nprompt: '{question}'\nanswer: answer\ngrade: exact\nmax_new_tokens: 20\n"
        (tmp_path / "task.yaml").write_text(fields + text)
        return str(tmp_path / "task.yaml")

    loaded, options = tiny_loaded(), TaskOptions(chat="off")
    (plain,) = run(GenerateJob(task=task(), methods="full", options=options), loaded, tmp_path / "plain")
    assert plain.output_tokens == 20
    word = plain.output.split()[5]
    job = GenerateJob(task=task(f"stop: ['{word}']\n"), methods="full", options=options)
    (stopped,) = run(job, loaded, tmp_path / "stopped")
    assert (stopped.output, stopped.truncated) == (plain.output.partition(word)[0], False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_p": 2.0}, "min_p must be a number of at least 0 and at most 1"),
        ({"top_k": 0}, "top_k must be a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
        ({"think_budget": 0}, "think_budget must be"),
        ({"stop": ("",)}, "at least one character"),
        ({"temperature": float("nan")}, "temperature must be"),
    ],
)
def test_sampling_out_of_range_is_one_sentence(fields: dict, words: str) -> None:
    with pytest.raises(JobError, match=words):
        Sampling(**fields)


def test_trace_settings_say_what_older_folders_say() -> None:
    usual = {"source": "greedy", "max_new_tokens": 2048, "temperature": 0.6, "top_p": 0.95}
    assert TraceSettings().to_dict() == usual
    assert TraceSettings(**TraceSettings(top_k=3, stop=("a",)).to_dict()) == TraceSettings(top_k=3, stop=("a",))
    assert Sampling(0.7).to_dict() == {"temperature": 0.7, "top_p": 0.95}
    for fields, words in (
        ({"source": "gready"}, "greedy, sampled, reference"),
        ({"preset": "published"}, "is for sampled traces"),
        ({"temperature": 0.0}, "temperature above 0"),
    ):
        with pytest.raises(JobError, match=words):
            TraceSettings(**fields)
