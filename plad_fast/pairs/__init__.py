"""The pair factory: prompts, two models' answers to them, and preference pairs of these."""

from plad_fast.pairs.answering import (
    Answered,
    discard_answers,
    generate_answers,
    stored_answers,
)
from plad_fast.pairs.build import PairReport, as_response, build_answers, build_pairs
from plad_fast.pairs.filters import PairFilters, is_usable
from plad_fast.pairs.given import CallableModel, ColumnModel, column_answers
from plad_fast.pairs.local_model import LocalModel
from plad_fast.pairs.prompts import Prompt, as_messages, builtin_prompts, load_prompts
from plad_fast.pairs.sampling import Sampling
from plad_fast.pairs.scoring import Scorer, open_scorer, score_answers, stored_scores
from plad_fast.pairs.sharding import joined
from plad_fast.pairs.sources import open_local_model, open_teacher, teacher_fingerprint
from plad_fast.pairs.store import AnswerStore
from plad_fast.pairs.teachers import Answer, Failure, TextModel

__all__ = [
    "Answer",
    "AnswerStore",
    "Answered",
    "CallableModel",
    "ColumnModel",
    "Failure",
    "LocalModel",
    "PairFilters",
    "PairReport",
    "Prompt",
    "Sampling",
    "Scorer",
    "TextModel",
    "as_messages",
    "as_response",
    "build_answers",
    "build_pairs",
    "builtin_prompts",
    "column_answers",
    "discard_answers",
    "generate_answers",
    "is_usable",
    "joined",
    "load_prompts",
    "open_local_model",
    "open_scorer",
    "open_teacher",
    "score_answers",
    "stored_answers",
    "stored_scores",
    "teacher_fingerprint",
]
