"""Vocabulary-parallel ops in groups of two and four processes that talk over gloo."""

from __future__ import annotations

import pytest
import torch

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
