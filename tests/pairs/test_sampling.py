"""Streams of random numbers by prompt, and the tokens drawn with them."""

from __future__ import annotations

import pytest
import torch

from plad_fast.errors import UsageError
from plad_fast.pairs.generation.sampling import RowSampler, Sampling, invert_cdf


def test_a_stream_depends_on_seed_and_prompt_id_alone():
    one, other = (Sampling(20, seed=3).uniforms(prompt_id) for prompt_id in ("a", "b"))
    assert torch.equal(Sampling(7, seed=3, n=2).uniforms("b"), other[:7])
    assert not torch.equal(one, other)
    assert not torch.equal(Sampling(20, seed=4).uniforms("a"), one)
    # Stored answers stay valid only as long as the numbers of sample 0 are these.
    assert one[:3].tolist() == [0.36142635345458984, 0.9842919707298279, 0.8634724020957947]


def test_samples_have_streams_of_their_own_that_no_id_can_spell():
    ids = ["a", "a", "a", "3:a", "a\t1", "1", "\0\0\0\0\0\0\0\1a"]
    samples = [0, 1, 2, 0, 0, 0, 0]
    sampling = Sampling(20, seed=3)
    rows = [sampling.uniforms(*row) for row in zip(ids, samples, strict=True)]
    assert len({tuple(row.tolist()) for row in rows}) == len(ids)


def test_a_token_of_probability_0_is_never_drawn(monkeypatch):
    """A parallel sum may rise by rounding where nothing is added."""
    rising = torch.tensor([[0.5, 0.75, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: rising)
    assert invert_cdf(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([0.6])).tolist() == [2]


def test_inverse_cdf_follows_the_softmax():
    torch.manual_seed(0)
    probs = (2 * torch.randn(20)).softmax(-1)
    n = 100_000
    chosen = invert_cdf(probs.expand(n, -1), torch.rand(n))
    counts = torch.bincount(chosen, minlength=20)
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi_square < 43.8  # 99.9 % point at 19 degrees of freedom


def test_inverse_cdf_never_takes_a_token_of_no_probability():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, -1)
    ends = torch.tensor([0.0, 0.49999, 0.5, 1 - 2**-24])  # the last is the largest torch.rand gives
    assert invert_cdf(probs, ends).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"top_k": 2}, {3, 4}),
        ({"top_p": 0.55}, {3, 4}),
        ({"top_k": 3, "top_p": 0.5}, {4}),  # 0.4 / 0.78 after the first filter
        ({"temperature": 1e-4}, {4}),
        ({"temperature": 0}, {4}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_bound_the_support(options, support):
    logits = torch.tensor([0.1, 0.12, 0.18, 0.2, 0.4]).log()
    ids = [str(i) for i in range(300)]
    prompt = torch.zeros(len(ids), 1, dtype=torch.int64)
    sampling = Sampling(**options)
    sampler = RowSampler(sampling, torch.stack([sampling.uniforms(i) for i in ids]), 1)
    scores = sampler(prompt, logits.expand(len(ids), -1))
    assert set(scores.argmax(-1).tolist()) == support
    assert not sampler.broken.any()


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"batch_size": 0},
        {"top_k": -1},
        {"seed": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
    ],
)
def test_sampling_checks_its_values(option):
    (name,) = option
    with pytest.raises(UsageError, match=name):
        Sampling(**option)
