"""What the task families promise: the same problems everywhere, splits that cannot meet, checkers
that accept the right answer and nothing else."""

from __future__ import annotations

import hashlib

import pytest

from reasonkv.tasks import Draw, Kind, Problem, TaskError, get_task, split_of, task_names
from reasonkv.tasks.base import final_answer
from reasonkv.tasks.steps import calculate

SPECS = [
    "program",
    "program:lines=4,constants=2,report=1",
    "program:lines=96,constants=8,variables=16,report=8,rarity=90",
    "recall",
    "recall:where=prompt,distance=1000",
    "recall:where=mixed,distance=60,facts=2,ask=1",
    "recall:distance=3000,facts=12,ask=12",
    "longdoc",
    "longdoc:mode=passage,ask=20",
    "longdoc:tokens=3200,ask=32",
    "longdoc:tokens=40,ask=1",
]


def digest(spec: str, split: str) -> str:
    task = get_task(spec)
    problems = [task.problem(example, seed=3, split=split) for example in range(5)]
    text = "\n".join(f"{one.prompt}\t{one.trace}\t{one.answer}" for one in problems)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("spec", "split", "expected"),
    [
        ("program", "test", "9a81fa371ac5721a"),
        ("program", "train", "bed3d7a2c00bf464"),
        ("recall", "test", "2361684ea0c2bcf9"),
        ("recall", "train", "af80ec08cc8e4c91"),
        ("recall:where=prompt,distance=1000", "test", "5b720aa5cb4ae9ef"),
        ("recall:where=prompt,distance=1000", "train", "b94bd33b6e1d8c1b"),
        ("longdoc", "test", "ff2528af746edcc6"),
        ("longdoc", "train", "58d65739eb26a804"),
        ("longdoc:mode=passage", "test", "1f2236deb212b35b"),
        ("longdoc:mode=passage", "train", "76a0f97a169e7b79"),
    ],
)
def test_problems_are_the_same_on_every_machine(spec: str, split: str, expected: str) -> None:
    assert digest(spec, split) == expected


@pytest.mark.parametrize("name", ["program", "recall", "longdoc"])
def test_splits_never_share_a_problem(name: str) -> None:
    # tiny dials, so that chance repeats would be found
    easy = {
        "program": "program:lines=4,constants=2,variables=3,report=1",
        "recall": "recall:distance=60,facts=2,ask=1,where=prompt",
        "longdoc": "longdoc:tokens=40,ask=1",
    }[name]
    task = get_task(easy)
    drawn = {
        split: {task.problem(i, seed=seed, split=split).prompt for seed in (0, 1) for i in range(n)}
        for split, n in (("test", 1000), ("train", 2000))
    }
    assert not drawn["test"] & drawn["train"]
    assert len(drawn["test"]) > 1900
    assert len(drawn["train"]) > 3900
    assert all(split_of(prompt) == split for split in drawn for prompt in drawn[split])


@pytest.mark.parametrize("spec", SPECS)
def test_every_reference_answer_is_accepted(spec: str) -> None:
    task = get_task(spec)
    for example in range(30):
        problem = task.problem(example)
        assert problem.trace.endswith(problem.answer)
        assert problem.answer
        assert task.check(problem, problem.trace)
        assert task.check(problem, problem.trace + " <eos> <pad> <pad>")


def near_misses(problem: Problem) -> dict[str, str]:
    """Outputs that are almost right."""
    thinking, answer = problem.trace.split("</think>")
    words = answer.split()
    digits = [i for i, word in enumerate(words) if word.isdigit()]

    def but(index: int, word: str) -> str:
        return " ".join([*words[:index], word, *words[index + 1 :]])

    def other(index: int) -> str:
        return str((int(words[index]) + 1) % 10)

    return {
        "first value wrong": f"{thinking}</think> {but(digits[0], other(digits[0]))}",
        "last value wrong": f"{thinking}</think> {but(digits[-1], other(digits[-1]))}",
        "a name wrong": f"{thinking}</think> {but(0, '?')}",
        "last word missing": f"{thinking}</think> {' '.join(words[:-1])}",
        "first item missing": f"{thinking}</think> {' '.join(words[2:])}",
        "one word too many": f"{problem.trace} {words[-1]}",
        "answer said twice": f"{problem.trace} {answer}",
        "thinking never ends": f"{thinking} {answer}",
        "words reversed": f"{thinking}</think> {' '.join(reversed(words))}",
        "no answer": f"{thinking}</think>",
        "nothing": "",
        "ends before the answer": f"{thinking}</think> <eos> {answer}",
        "thinking reopened": f"{problem.trace} </think> {answer}",
    }


@pytest.mark.parametrize("spec", SPECS)
def test_near_misses_are_rejected(spec: str) -> None:
    task = get_task(spec)
    for example in range(10):
        problem = task.problem(example)
        for why, output in near_misses(problem).items():
            assert not task.check(problem, output), why


def test_thinking_is_not_graded() -> None:
    task = get_task("program")
    problem = task.problem(0)
    assert task.check(problem, f"n00 wrong </think> {problem.answer}")
    assert final_answer("a </think> b 3 <pad>") == ["b", "3"]


def test_program_traces_are_right_and_every_value_follows_its_name() -> None:
    for example in range(20):
        problem = get_task("program").problem(example)
        values: dict[str, int] = {}
        lines = problem.trace.split(" </think>")[0].split(" ;")[:-1]
        for line in lines:
            left, right = (half.split() for half in line.split(" : "))
            label, operands, result = left[0], left[1:], left[-1]
            if "=" in left:
                one, one_value, operator, two, two_value, _, _ = operands
                assert values[one] == int(one_value)
                assert values[two] == int(two_value)
                assert int(result) == calculate(operator, values[one], values[two])
            assert right == [label, right[1], result]
            values[right[1]] = int(result)
        assert len(lines) == get_task("program").lines
        answer = problem.answer.split()
        assert answer == [w for name in answer[::2] for w in (name, str(values[name]))]


def test_program_reads_values_far_behind() -> None:
    """Half of the report is what was mentioned longest ago: far behind at the default."""
    gaps = []
    for example in range(50):
        problem = get_task("program").problem(example)
        words = problem.trace.split()
        end = words.index("</think>")
        behind = [end - max(i for i in range(end) if words[i] == n) for n in words[end + 1 :: 2]]
        gaps.append(max(behind))
    assert sorted(gaps)[len(gaps) // 2] > 150


@pytest.mark.parametrize("distance", [250, 550, 1000, 3000])
@pytest.mark.parametrize("where", ["prompt", "trace"])
def test_recall_states_a_fact_once_and_far_from_its_question(where: str, distance: int) -> None:
    task = get_task(f"recall:where={where},distance={distance}")
    for example in range(10):
        problem = task.problem(example)
        words = f"{problem.prompt} {problem.trace}".split()
        end = words.index("</think>")
        assert len(words) < 4096
        work = end - words.index("left", len(problem.prompt.split()))
        assert abs(work - distance) <= 0.1 * distance
        for key in words[end + 1 :: 2]:
            stated = [i for i in range(end - 1) if words[i] == key and words[i + 1].isdigit()]
            assert len(stated) == 1
            assert (stated[0] < len(problem.prompt.split())) == (where == "prompt")


def test_longdoc_has_the_length_asked_for_and_one_fact_for_each_key() -> None:
    for tokens in (40, 200, 1100, 3200):
        for mode in ("facts", "passage"):
            problem = get_task(f"longdoc:tokens={tokens},mode={mode}").problem(0)
            words = problem.prompt.split()
            document = words[1 : words.index("?")]
            facts = [tuple(document[i : i + 5]) for i in range(0, len(document), 5)]
            assert abs(len(document) - tokens) < 5
            assert len({fact[:2] for fact in facts}) == len(facts)
            answers = problem.answer.split()
            asked = [tuple(answers[i : i + 5]) for i in range(0, len(answers), 5)]
            assert set(asked) <= set(facts)


def test_kinds_name_what_each_word_of_a_trace_asks() -> None:
    draft = get_task("program").draft_of(0, seed=0, split="test")
    assert len(draft.kinds) == len(draft.trace)
    for index, (word, kind) in enumerate(zip(draft.trace, draft.kinds, strict=True)):
        if kind is Kind.RETRIEVAL:
            assert word.isdigit()
            assert draft.trace[index - 1].isalpha()
        if kind is Kind.ARITHMETIC:
            assert draft.trace[index - 1] == "="
    assert {Kind.COPY, Kind.RETRIEVAL, Kind.ARITHMETIC, Kind.ANSWER} == set(draft.kinds)


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_written_in_full_gives_the_same_task(spec: str) -> None:
    assert get_task(get_task(spec).spec) == get_task(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("progam", ["progam", "'program'", "recall", "longdoc"]),
        ("zzz", ["zzz", "program", "recall", "longdoc"]),
        ("", ["program"]),
        ("program:line=4", ["'line'", "lines", "report"]),
        ("program:lines", ["lines=VALUE"]),
        ("program:lines=3", ["4", "96", "3"]),
        ("program:lines=97", ["4", "96", "97"]),
        ("program:lines=many", ["whole number", "many"]),
        ("program:lines=-8", ["-8"]),
        ("recall:where=nowhere", ["trace, prompt, mixed", "nowhere"]),
        ("recall:distance=3001", ["3000"]),
        ("longdoc:tokens=4000", ["3200"]),
        ("program:lines=4,lines=8", ["lines", "twice"]),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(spec: str, words: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        get_task(spec)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_bad_split_and_example_are_refused() -> None:
    with pytest.raises(TaskError, match="no split 'dev'"):
        get_task("program").problem(0, split="dev")
    with pytest.raises(TaskError, match="counted from 0"):
        get_task("program").problem(-1)


def test_task_names_are_what_get_task_accepts() -> None:
    assert task_names() == ["program", "recall", "longdoc"]
    assert [get_task(name).name for name in task_names()] == task_names()


def test_draws_are_even() -> None:
    draw = Draw("even")
    counts = [0] * 7
    for _ in range(7000):
        counts[draw.below(7)] += 1
    assert min(counts) > 850
    assert sorted(draw.sample("abcde", 5)) == list("abcde")
