"""The concatenated forward that every packed layout is held to: one unpadded sequence at a time.

It uses the whole model, its own attention and its own logits, and nothing of plad_fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plad_fast.data.row_layout import RowLayout

Features = Sequence[dict[str, Any]]


class Step(NamedTuple):
    logprobs: Tensor  # (N,) of every response token
    loss: Tensor
    gradients: dict[str, Tensor]


def features(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], vocab: int = 97
) -> list[dict[str, Any]]:
    """Groups of random tokens, by their lengths."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=draw).tolist()

    return [
        {"prompt_ids": tokens(prompt), "response_ids": [tokens(count) for count in counts]}
        for prompt, counts in zip(prompts, responses, strict=True)
    ]


def sequences(groups: Features) -> Iterator[tuple[list[int], list[int]]]:
    for group in groups:
        for response in group["response_ids"]:
            yield group["prompt_ids"], response


def naive_logprobs(model: nn.Module, groups: Features) -> list[Tensor]:
    """Of every sequence the log-probabilities of its response tokens."""
    found = []
    for prompt, response in sequences(groups):
        tokens = torch.tensor([*prompt, *response])
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        found.append(logprobs[len(prompt) - 1 :])
    return found


def all_pairs_hinge(sums: Tensor, group_size: int) -> Tensor:
    """With a margin that no pair reaches: every sequence has a gradient."""
    s = sums.reshape(-1, group_size)
    margins = [
        torch.relu(100.0 - s[:, i] + s[:, j])
        for i in range(group_size)
        for j in range(i + 1, group_size)
    ]
    return torch.stack(margins).sum(0).mean()


def naive_step(model: nn.Module, groups: Features) -> Step:
    logprobs = naive_logprobs(model, groups)
    sums = torch.stack([each.sum() for each in logprobs])
    return step_of(model, torch.cat(logprobs), sums, len(groups[0]["response_ids"]))


def step_of(model: nn.Module, logprobs: Tensor, sums: Tensor, group_size: int) -> Step:
    model.zero_grad()
    loss = all_pairs_hinge(sums, group_size)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return Step(logprobs.detach(), loss.detach(), gradients)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 where both are zero."""
    difference = (found - expected).detach().norm()
    return 0.0 if difference == 0 else float(difference / expected.detach().norm())


def largest_error(found: Step, expected: Step) -> float:
    """Of log-probabilities, loss, and each parameter's gradient on its own."""
    assert found.gradients.keys() == expected.gradients.keys()
    return max(
        relative(found.logprobs, expected.logprobs),
        relative(found.loss, expected.loss),
        *(relative(found.gradients[name], g) for name, g in expected.gradients.items()),
    )


def places(groups: Features, layout: str) -> list[tuple[int, list[int]]]:
    """Of every sequence the row, and the places in it of its tokens: the layouts, written out."""
    found, start = [], 0
    for index, (prompt, response) in enumerate(sequences(groups)):
        group_size = len(groups[0]["response_ids"])
        if layout == "padded":
            found.append((index, list(range(len(prompt) + len(response)))))
            continue
        if layout == "packed" or index % group_size == 0:
            trunk = list(range(start, start + len(prompt)))
            start += len(prompt)
        found.append((0, [*trunk, *range(start, start + len(response))]))
        start += len(response)
    return found


def seen_by_definition(layout: RowLayout, window: int | None) -> Tensor:  # (T, T) bool
    """Token by token: same group, own piece or the trunk, not later, not beyond the window."""
    tokens = [
        (group, piece, place + (0 if piece == 0 else lengths[0]))
        for group, lengths in enumerate(layout.groups)
        for piece, length in enumerate(lengths)
        for place in range(length)
    ]

    def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        distance = query[2] - key[2]
        return (
            query[0] == key[0]
            and key[1] in (0, query[1])
            and distance >= 0
            and (window is None or distance < window)
        )

    return torch.tensor([[sees(q, k) for k in tokens] for q in tokens]).reshape(len(tokens), -1)


def attention_by_definition(
    query: Tensor,  # (1, H, T, C)
    key: Tensor,  # (1, G, T, C)
    value: Tensor,  # (1, G, T, C)
    layout: RowLayout,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
    scale: float | None = None,
) -> Tensor:  # (1, T, H, C)
    """One mask over the whole row."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen_by_definition(layout, window).to(query.device), -torch.inf)
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], 3)
    return (scores.softmax(3)[..., : key.shape[2]] @ value).transpose(1, 2)
