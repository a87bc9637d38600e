"""What the task families promise: the same problems everywhere, splits that cannot meet, checkers that accept the
right answer and nothing else, and traces that a second, independent reading of the prompt confirms."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields
from statistics import mean

import pytest
from task_verifiers import VERIFIERS, near_misses

from reasonkv.tasks import Draw, Kind, TaskError, get_task, split_of, task_names
from reasonkv.tasks.base import final_answer
from tools.testbed.tokenizer import VOCABULARY

FAMILIES = ["program", "search", "arithmetic", "recall", "longdoc"]

# The first problems of both splits, as SHA-256. When a dial or a format changes on purpose, print the dict anew:
#     python tests/test_tasks.py
GOLDEN = {
    "program": "ad50d1dd03d50b16",
    "program:lines=4,constants=2,report=1": "a59cd289b84ee87f",
    "program:lines=96,constants=8,variables=16,report=8,rarity=90": "8965d5cebaf05980",
    "search": "a7b654dfc9602641",
    "search:nodes=3": "8b01972225e437c2",
    "search:nodes=48,extra=100,depth=100": "0d947243d050ec6e",
    "arithmetic": "87482af5f99ba158",
    "arithmetic:digits=8": "950bc65ca43641d6",
    "arithmetic:operation=add,digits=80": "f2f9f69ce3151dc0",
    "recall": "ff869ee72644766d",
    "recall:where=prompt,distance=1000": "ab4b55c98b5cd94c",
    "recall:where=mixed,distance=60,facts=2,ask=1": "82a96714421a0366",
    "recall:distance=3000,facts=12,ask=12": "b00a59f5d168dc97",
    "longdoc": "a34fc24c700ef1da",
    "longdoc:mode=passage,ask=20": "53ff97cf0c3cc4b8",
    "longdoc:tokens=40,ask=1": "f5ca7a25eff2e66c",
}

SPECS = [
    *GOLDEN,
    "program:lines=5,constants=8,variables=3,report=8,rarity=0",
    "search:nodes=48,extra=0,depth=100",
    "search:nodes=12,extra=100,depth=0",
    "arithmetic:digits=2",
    "arithmetic:operation=add,digits=2",
    "recall:where=mixed,distance=250,facts=12,ask=12",
    "recall:where=prompt,distance=60,ask=12",
    "longdoc:tokens=3200,ask=32",
    "longdoc:tokens=40,mode=passage,ask=32",
]


def digest(spec: str) -> str:
    task = get_task(spec)
    problems = [task.problem(i, seed=3, split=split) for split in ("test", "train") for i in range(4)]
    text = "\n".join(f"{one.prompt}\t{one.trace}\t{one.answer}" for one in problems)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("spec", GOLDEN)
def test_problems_are_the_same_on_every_machine(spec: str) -> None:
    assert digest(spec) == GOLDEN[spec]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_golden_problems_at_its_defaults_and_at_odd_dials(family: str) -> None:
    assert family in GOLDEN
    assert any(spec.startswith(f"{family}:") for spec in GOLDEN)


@pytest.mark.parametrize(
    "spec",
    [  # tiny dials, so that chance repeats would be found
        "program:lines=4,constants=2,variables=3,report=1",
        "search:nodes=3,extra=0",
        "arithmetic:digits=2",
        "arithmetic:operation=add,digits=2",
        "recall:distance=60,facts=2,ask=1,where=prompt",
        "longdoc:tokens=40,ask=1",
    ],
)
def test_splits_never_share_a_problem(spec: str) -> None:
    task = get_task(spec)
    drawn = {
        split: {task.problem(i, seed=seed, split=split).prompt for seed in (0, 1) for i in range(n)}
        for split, n in (("test", 300), ("train", 900))
    }
    assert not drawn["test"] & drawn["train"]
    assert len(drawn["test"]) > 560
    assert len(drawn["train"]) > 1680
    assert all(split_of(prompt) == split for split in drawn for prompt in drawn[split])


@pytest.mark.parametrize("spec", SPECS)
def test_every_reference_is_accepted_and_right_by_an_independent_reading_of_the_prompt(spec: str) -> None:
    task = get_task(spec)
    words = set(VOCABULARY)
    for split in ("test", "train"):
        for example in range(12):
            problem = task.problem(example, split=split)
            VERIFIERS[task.name](problem)
            assert problem.answer and problem.trace.endswith(problem.answer)
            assert task.check(problem, problem.trace)
            assert task.check(problem, problem.trace + " <eos> <pad> <pad>")
            text = f"{problem.prompt} {problem.trace}".split()
            assert len(text) < 4096 and words.issuperset(text)


def test_near_misses_of_twenty_kinds_are_rejected_and_every_family_meets_a_dozen() -> None:
    applied: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for spec in SPECS:
        task = get_task(spec)
        for example in range(6):
            problem = task.problem(example)
            for kind, output in near_misses(problem, task.problem(example + 1)).items():
                assert not task.check(problem, output), f"{spec}, example {example}: {kind}"
                applied[task.name].add(kind)
    assert len(set.union(*applied.values())) >= 20
    assert all(len(kinds) >= 12 for kinds in applied.values()), applied


def test_thinking_is_not_graded_and_special_tokens_end_the_answer() -> None:
    task = get_task("program")
    problem = task.problem(0)
    assert task.check(problem, f"n00 wrong </think> {problem.answer}")
    assert task.check(problem, f"</think> {problem.answer} <eos> all go </think>")
    assert final_answer("a </think> b 3 <pad>") == ["b", "3"]
    assert final_answer("a <eos> </think> b 3") is None


def test_the_verifiers_find_a_wrong_step() -> None:
    """A verifier that accepts anything would prove nothing: change one word in the middle of each trace."""
    for family, verify in VERIFIERS.items():
        for example in range(8):
            problem = get_task(family).problem(example)
            words = problem.trace.split()
            places = [i for i, word in enumerate(words) if word.isdigit()]
            place = places[(example + 1) * len(places) // 10]
            words[place] = str((int(words[place]) + 1) % 10)
            object.__setattr__(problem, "trace", " ".join(words))
            object.__setattr__(problem, "answer", " ".join(words[words.index("</think>") + 1 :]))
            with pytest.raises(AssertionError):
                verify(problem)


@pytest.mark.parametrize("family", ["program", "search", "arithmetic"])
def test_default_traces_are_long_enough_to_compress(family: str) -> None:
    lengths = [len(get_task(family).problem(example).trace.split()) for example in range(100)]
    assert 500 <= mean(lengths) <= 2000
    assert min(lengths) > 300  # the search that is over soonest has 344


def test_default_documents_are_long_prompts_with_short_answers() -> None:
    problems = [get_task("longdoc").problem(example) for example in range(20)]
    assert all(1000 <= len(problem.prompt.split()) <= 3000 for problem in problems)
    assert all(len(problem.trace.split()) < 100 for problem in problems)


def test_program_reads_values_far_behind() -> None:
    """Half of the report is what was mentioned longest ago: far behind at the default."""
    gaps = []
    for example in range(50):
        words = get_task("program").problem(example).trace.split()
        end = words.index("</think>")
        behind = [end - max(i for i in range(end) if words[i] == n) for n in words[end + 1 :: 2]]
        gaps.append(max(behind))
    assert sorted(gaps)[len(gaps) // 2] > 150


def test_search_goes_back_and_finds_its_goal_late() -> None:
    shares = []
    for example in range(50):
        problem = get_task("search").problem(example)
        assert " back " in problem.trace
        shares.append(len(set(re.findall(r"n\d\d", problem.trace))) / get_task("search").nodes)
    assert mean(shares) > 0.7


# Lines that lie between a fact and the answers besides the work: the rest of the chain and the work's constants in
# the trace, or the prompt from the fact on. At most this many tokens with eight facts.
AROUND = 230


@pytest.mark.parametrize(("distance", "usual"), [(250, (1.3, 1.7)), (1000, (1.05, 1.25)), (3000, (1.0, 1.08))])
@pytest.mark.parametrize("where", ["prompt", "trace"])
def test_recall_states_a_fact_once_and_puts_the_dials_distance_of_work_behind_it(
    where: str, distance: int, usual: tuple[float, float]
) -> None:
    task = get_task(f"recall:where={where},distance={distance}")
    behind = []
    for example in range(10):
        problem = task.problem(example)
        prompt = len(problem.prompt.split())
        words = f"{problem.prompt} {problem.trace}".split()
        end = words.index("</think>")
        assert len(words) < 4096
        work = end - words.index("left", prompt)
        assert abs(work - distance) <= 0.05 * distance
        for key in words[end + 1 :: 2][:-2]:  # the last two are results of the work
            stated = [i for i in range(end - 1) if words[i] == key and words[i + 1].isdigit()]
            assert len(stated) == 1
            assert (stated[0] < prompt) == (where == "prompt")
            assert work <= end - stated[0] <= work + AROUND
            behind.append((end - stated[0]) / distance)
    assert usual[0] < mean(behind) < usual[1]  # what the documentation says the distance really is


def test_longdoc_has_the_length_asked_for_and_one_fact_for_each_key() -> None:
    for tokens in (40, 200, 1100, 3200):
        for mode in ("facts", "passage"):
            words = get_task(f"longdoc:tokens={tokens},mode={mode}").problem(0).prompt.split()
            assert abs(words.index("?") - 1 - tokens) < 5


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_name_what_each_word_of_a_trace_asks(family: str) -> None:
    draft = get_task(family).draft_of(0, seed=0, split="test")
    assert len(draft.kinds) == len(draft.trace)
    end = draft.trace.index("</think>")
    assert {kind for kind in draft.kinds[: end + 1]} <= {Kind.COPY, Kind.RETRIEVAL, Kind.ARITHMETIC}
    assert set(draft.kinds[end + 1 :]) == {Kind.ANSWER}
    if family == "program":
        for index, (word, kind) in enumerate(zip(draft.trace, draft.kinds, strict=True)):
            assert kind is not Kind.RETRIEVAL or (word.isdigit() and draft.trace[index - 1].isalpha())
            assert kind is not Kind.ARITHMETIC or draft.trace[index - 1] == "="
        assert set(Kind) == set(draft.kinds)


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_written_in_full_gives_the_same_task(spec: str) -> None:
    assert get_task(get_task(spec).spec) == get_task(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("progam", ["progam", "'program'", *FAMILIES]),
        ("zzz", ["zzz", *FAMILIES]),
        ("", FAMILIES),
        ("program:line=4", ["'line'", "lines", "report"]),
        ("program:lines", ["lines=VALUE"]),
        ("program:lines=", ["whole number", "''"]),
        ("program:lines=3", ["4", "96", "3"]),
        ("program:lines=97", ["4", "96", "97"]),
        ("program:lines=many", ["whole number", "many"]),
        ("program:lines=-8", ["-8"]),
        ("program:lines=4.0", ["whole number", "4.0"]),
        ("program:lines=\N{ARABIC-INDIC DIGIT EIGHT}", ["whole number"]),
        ("program:lines=" + "9" * 5000, ["whole number from 4 to 96"]),
        ("program:lines=4,lines=8", ["lines", "twice"]),
        ("search:nodes=2", ["3", "48", "2"]),
        ("search:nodes=49", ["3", "48", "49"]),
        ("search:depth=101", ["0", "100", "101"]),
        ("search:edges=4", ["'edges'", "nodes, extra, depth"]),
        ("arithmetic:operation=divide", ["multiply, add", "divide"]),
        ("arithmetic:digits=9", ["multiply", "at most 8", "9", "operation=add"]),
        ("arithmetic:operation=add,digits=81", ["2", "80", "81"]),
        ("recall:where=nowhere", ["trace, prompt, mixed", "nowhere"]),
        ("recall:distance=3001", ["3000"]),
        ("longdoc:tokens=4000", ["3200"]),
        ("longdoc:mode=", ["facts, passage", "''"]),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(spec: str, words: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        get_task(spec)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert all(word in message for word in words), message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dial_is_checked_at_both_ends(family: str) -> None:
    for one in fields(get_task(family)):
        assert one.metadata["help"]
        if "range" in one.metadata:
            low, high = one.metadata["range"]
            assert low <= one.default <= high
            for bad in (low - 1, high + 1, True, 1.5):
                with pytest.raises(TaskError, match=one.name):
                    type(get_task(family))(**{one.name: bad})


def test_bad_split_and_example_are_refused() -> None:
    with pytest.raises(TaskError, match="no split 'dev'"):
        get_task("program").problem(0, split="dev")
    with pytest.raises(TaskError, match="counted from 0"):
        get_task("program").problem(-1)


def test_task_names_are_what_get_task_accepts() -> None:
    assert task_names() == FAMILIES
    assert [get_task(name).name for name in task_names()] == FAMILIES


def test_draws_are_even() -> None:
    draw = Draw("even")
    counts = [0] * 7
    for _ in range(7000):
        counts[draw.below(7)] += 1
    assert min(counts) > 850
    assert sorted(draw.sample("abcde", 5)) == list("abcde")


if __name__ == "__main__":
    for each in GOLDEN:
        print(f'    "{each}": "{digest(each)}",')
