"""`longdoc`: a long document of facts, then questions at its end.

    <longdoc> n42 c 7 3 ; n42 f 0 9 ; n17 c 1 1 ; n17 a 5 0 ; ... ? n17 c n42 f <think>
    </think> n17 c 1 1 ; n42 f 0 9 ;

A fact has a two-token key, an entity (label) and an attribute (letter); neither alone is enough to
find it. Facts of one entity stand together. With `mode=entity` a question is an entity alone, and
the answer restates all its facts in order:

    ... ? n42 all n17 all <think>
    </think> n42 c 7 3 ; n42 f 0 9 ; n17 c 1 1 ; n17 a 5 0 ;
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

    mode: str = choice_dial("facts", ("facts", "entity"), "ask single facts, or whole entities")
    tokens: int = dial(1100, 40, 3200, "document length in tokens; a fact is 5")
    ask: int = dial(8, 1, 32, "questions")

    def draft(self, draw: Draw) -> Draft:
        """One document with questions and answers."""
        sections = _sections(draw, self.tokens // _FACT_TOKENS)
        draft = Draft(prompt=["<longdoc>"])
        for section in sections:
            for fact in section:
                draft.prompt += fact
        draft.prompt.append("?")
        draft.write("</think>", "c")
        if self.mode == "entity":
            for section in draw.sample(sections, min(self.ask, len(sections))):
                draft.prompt += [section[0][0], "all"]
                for fact in section:
                    draft.write(" ".join(fact), "AAAAA")
        else:
            facts = [fact for section in sections for fact in section]
            for fact in draw.sample(facts, min(self.ask, len(facts))):
                draft.prompt += fact[:2]
                draft.write(" ".join(fact), "AAAAA")
        draft.prompt.append("<think>")
        return draft


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
