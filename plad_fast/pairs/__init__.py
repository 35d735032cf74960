"""The pair factory: prompts, two models' answers to them, and preference pairs of these."""

from plad_fast.pairs.answering import Answered, generate_answers, stored_answers
from plad_fast.pairs.build import PairReport, as_response, build_pairs
from plad_fast.pairs.local_model import LocalModel
from plad_fast.pairs.prompts import Prompt, as_messages, builtin_prompts, load_prompts
from plad_fast.pairs.sampling import Sampling
from plad_fast.pairs.store import AnswerStore
from plad_fast.pairs.teachers import Answer, Failure, TextModel

__all__ = [
    "Answer",
    "AnswerStore",
    "Answered",
    "Failure",
    "LocalModel",
    "PairReport",
    "Prompt",
    "Sampling",
    "TextModel",
    "as_messages",
    "as_response",
    "build_pairs",
    "builtin_prompts",
    "generate_answers",
    "load_prompts",
    "stored_answers",
]
