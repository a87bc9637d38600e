from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, Kind, dial

_FACT_TOKENS = 5
_MIN_ATTRIBUTES, _SPREAD = 3, 5  # an entity of an ordinary document has 3 to 8 attributes
_MAX_ENTITIES = 90  # long documents give each entity more attributes instead


@dataclass(frozen=True)
class LongDoc(GeneratedTask):
    """`longdoc`: a long document of facts, then questions at its end.

        <longdoc> n42 c 7 3 ; n42 f 0 9 ; n17 c 1 1 ; n17 a 5 0 ; ... ? n17 c n42 f <think>
        </think> n17 c 1 1 ; n42 f 0 9 ;

    The key of a fact has two tokens, an entity (label) and an attribute (letter). Neither alone is enough to find
    it. Facts of one entity stand together. The questions are about different entities. With `mode=passage` a
    question gives the first and last key of a passage, and the answer restates it:

        ... ? n42 f to n17 a <think>
        </think> n42 f 0 9 ; n17 c 1 1 ; n17 a 5 0 ;

    The default prompt is about 1,100 tokens.
    """

    name = "longdoc"

    mode: str = dial("facts", "ask single facts, or restate passages", choices=("facts", "passage"))
    tokens: int = dial(1100, "document length in tokens; a fact is 5", range=(40, 3200))
    ask: int = dial(8, "questions, or about how many facts a passage has", range=(1, 32))

    def draft(self, draw: Draw) -> Draft:
        """Draw one document with questions and answers."""
        sections = _sections(draw, self.tokens // _FACT_TOKENS)
        facts = [fact for section in sections for fact in section]
        draft = Draft(["<longdoc>"])
        draft.ask(f"{' '.join(facts)} ?")
        if self.mode == "passage":
            size = min(len(facts), max(1, self.ask + draw.between(-(self.ask // 2), self.ask // 2)))
            asked = draw.run(facts, size)
            draft.ask(f"{_key(asked[0])} to {_key(asked[-1])}")
        else:
            if self.ask <= len(sections):
                asked = [draw.choice(section) for section in draw.sample(sections, self.ask)]
            else:  # too few entities to ask about different ones
                asked = draw.sample(facts, min(self.ask, len(facts)))
            draft.ask(" ".join(map(_key, asked)))
        draft.ask("<think>")
        draft.write("</think>")
        draft.write(" ".join(asked), Kind.ANSWER)
        return draft


def _key(fact: str) -> str:
    return fact[: len("n42 c")]


def _sections(draw: Draw, count: int) -> list[list[str]]:
    """Return `count` facts, such as `n42 c 7 3 ;`, grouped by entity, with different keys."""
    low = max(_MIN_ATTRIBUTES, -(-count // _MAX_ENTITIES))
    sections: list[list[str]] = []
    labels = draw.sample(LABELS, len(LABELS))
    while count > 0:
        size = min(count, draw.between(low, low + _SPREAD))
        label = labels[len(sections)]
        letters = draw.sample(LETTERS, size)
        sections.append([f"{label} {letter} {draw.below(10)} {draw.below(10)} ;" for letter in letters])
        count -= size
    return sections
