"""Vocabulary-parallel ops in groups of two and four processes that talk over gloo."""

from __future__ import annotations

import pytest
import torch

from plad_fast import UsageError, fused_linear_preference_loss, linear_sequence_logprobs
from tests.support.problems import make_problem
from tests.support.process_sets import results, start
from tests.support.vocab_parallel_models import CASES
from tests.support.vocab_parallel_ranks import WORLD

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return start(folder, "ran", f"tests.support.vocab_parallel_models:CASES:{WORLD}")


@pytest.mark.parametrize("case", CASES)
def test_vocab_parallel(ran, case):
    results(ran, "CASES", WORLD, case)


def test_a_head_sharded_by_tensor_parallelism_is_sent_to_its_own_ops():
    """`head_arguments` has a group for it."""
    inputs = make_problem([2, 3]).inputs
    with pytest.raises(UsageError, match=r"group: .*vocab_parallel_preference_loss"):
        fused_linear_preference_loss(*inputs, group=object())
    with pytest.raises(UsageError, match=r"group: .*vocab_parallel_sequence_logprobs"):
        linear_sequence_logprobs(*inputs, group=object())
