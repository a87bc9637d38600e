"""The scoring rules of LongBench (arXiv 2308.14508) and LongBench v2 (arXiv 2412.15204); the best answer counts.

Chinese texts are cut into characters. The authors cut them into words with jieba, so these scores differ a little from
published ones.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from reasonkv.tasks.base import UNREAD, Grade

_CHINESE_MARKS = frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
).union(string.punctuation)
_CHOICE = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


def qa_f1(output: str, answer: str) -> float:
    """Return the F1 of words, without case, punctuation and articles."""
    return _f1(_plain_words(output), _plain_words(answer))


def qa_f1_characters(output: str, answer: str) -> float:
    """Return the F1 of characters, without case, punctuation and spaces."""
    found, wanted = (
        [c for c in text.lower() if c not in _CHINESE_MARKS and not c.isspace()] for text in (output, answer)
    )
    return _f1(found, wanted)


def rouge_l(output: str, answer: str) -> float:
    """Return the F-measure of ROUGE-L over sentences, each word counted once.

    Of every pair of sentences, words of a longest common subsequence count; sentences end at full stops.
    """
    found, wanted = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part] for text in (output, answer)
    )
    if not found or not wanted:
        return 0.0
    common = {word for one in wanted for other in found for word in _common_words(one, other)}
    precision = len(common) / len({word for words in found for word in words})
    recall = len(common) / len({word for words in wanted for word in words})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_characters(output: str, answer: str) -> float:
    """Return ROUGE-L with characters as words."""
    return rouge_l(" ".join("".join(output.split())), " ".join("".join(answer.split())))


def number_share(output: str, answer: str) -> float:
    """Return the share of the output's numbers that are the answer's number."""
    numbers, wanted = re.findall(r"\d+", output), re.findall(r"\d+", answer)
    return numbers.count(wanted[0]) / len(numbers) if numbers and wanted else 0.0


def grade_classification(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Divide 1 by the classes of `all_classes` that the output names, if the right one is among them.

    A class that is part of the right one's name does not count.
    """
    named = [name for name in row.get("all_classes") or answers if name in output]

    def score(answer: str) -> float:
        rivals = list(named)
        for name in rivals:  # the authors' loop removes while it runs, and so skips the class after a removed one
            if name in answer and name != answer:
                rivals.remove(name)
        return 1 / len(rivals) if answer in rivals else 0.0

    return Grade(max(map(score, answers)), output.strip()) if named else UNREAD


def first_code(output: str) -> str:
    """Return the first line of code; lines with a backquote or a comment are none."""
    lines = output.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return first if first.strip() else ""


def likeness(line: str, answer: str) -> float:
    """Return difflib's ratio in steps of 0.01, as where the authors' package fuzzywuzzy is installed alone."""
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def chosen(output: str) -> str | None:
    """Return the letter after "The correct answer is", in parentheses or else without."""
    text = output.replace("*", "")
    return next((match[1] for pattern in _CHOICE if (match := pattern.search(text))), None)


def _plain_words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(found) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _common_words(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """Return the words of the longest common subsequence that the public scorer finds among equally long ones."""
    lengths = [[0] * (len(other) + 1)]
    for word in one:
        above, row = lengths[-1], [0]
        for at, candidate in enumerate(other):
            row.append(above[at] + 1 if word == candidate else max(above[at + 1], row[at]))
        lengths.append(row)
    found, i, j = set(), len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.add(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
