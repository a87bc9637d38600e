"""Old home of the answer records; see `reasonkv.evaluate.records`."""

from reasonkv.evaluate.records import AnswerRecord, read_answers

__all__ = ["AnswerRecord", "read_answers"]
