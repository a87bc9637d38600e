"""`longdoc`: a long document of facts, then questions at its end.

    <longdoc> n42 c 7 3 ; n42 f 0 9 ; n17 c 1 1 ; n17 a 5 0 ; ... ? n17 c n42 f <think>
    </think> n17 c 1 1 ; n42 f 0 9 ;

A fact has a two-token key, an entity (label) and an attribute (letter); neither alone is enough to
find it. Facts of one entity stand together; the questions are about different entities. With
`mode=passage` a question gives the first and last key of a passage, and the answer restates it:

    ... ? n42 f to n17 a <think>
    </think> n42 f 0 9 ; n17 c 1 1 ; n17 a 5 0 ;
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, choice_dial, dial

_FACT_TOKENS = 5
_MIN_ATTRIBUTES, _SPREAD = 3, 5  # an entity of an ordinary document has 3 to 8 attributes
_MAX_ENTITIES = 90  # long documents give each entity more attributes instead


@dataclass(frozen=True)
class LongDoc(GeneratedTask):
    """The dials of `longdoc`; the default prompt is about 1,100 tokens."""

    name = "longdoc"

    mode: str = choice_dial("facts", ("facts", "passage"), "ask single facts, or restate passages")
    tokens: int = dial(1100, 40, 3200, "document length in tokens; a fact is 5")
    ask: int = dial(8, 1, 32, "questions, or about how many facts a passage has")

    def draft(self, draw: Draw) -> Draft:
        """One document with questions and answers."""
        sections = _sections(draw, self.tokens // _FACT_TOKENS)
        draft = Draft(prompt=["<longdoc>"])
        for section in sections:
            for fact in section:
                draft.prompt += fact
        draft.prompt.append("?")
        draft.write("</think>", "c")
        facts = [fact for section in sections for fact in section]
        if self.mode == "passage":
            asked = _passage(draw, facts, self.ask)
            draft.prompt += [*asked[0][:2], "to", *asked[-1][:2]]
        else:
            asked = self._questions(draw, sections, facts)
            for fact in asked:
                draft.prompt += fact[:2]
        for fact in asked:
            draft.write(" ".join(fact), "AAAAA")
        draft.prompt.append("<think>")
        return draft

    def _questions(self, draw: Draw, sections: list[list[list[str]]], facts: list[list[str]]) -> list[list[str]]:
        """Facts of different entities as far as there are enough, else any facts."""
        if self.ask > len(sections):
            return draw.sample(facts, min(self.ask, len(facts)))
        return [draw.choice(section) for section in draw.sample(sections, self.ask)]


def _passage(draw: Draw, facts: list[list[str]], ask: int) -> list[list[str]]:
    """Consecutive facts: `ask` of them, give or take half."""
    size = min(len(facts), max(1, ask + draw.between(-(ask // 2), ask // 2)))
    start = draw.below(len(facts) - size + 1)
    return facts[start : start + size]


def _sections(draw: Draw, count: int) -> list[list[list[str]]]:
    """`count` facts `[label, letter, digit, digit, ";"]`, grouped by entity, all keys different."""
    low = max(_MIN_ATTRIBUTES, -(-count // _MAX_ENTITIES))
    sections: list[list[list[str]]] = []
    labels = draw.sample(LABELS, len(LABELS))
    while count > 0:
        size = min(count, draw.between(low, low + _SPREAD))
        label = labels[len(sections)]
        sections.append(
            [[label, letter, str(draw.below(10)), str(draw.below(10)), ";"] for letter in draw.sample(LETTERS, size)]
        )
        count -= size
    return sections
