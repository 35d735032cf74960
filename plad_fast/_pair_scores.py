"""What a model thinks of preference pairs: the log-probabilities of both responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from plad_fast._rows import read_row
from plad_fast.errors import UsageError
from plad_fast.metrics import FloatArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plad_fast.tokenization import EncodedGroup


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, Any]],
    *,
    length_normalization: float = 0.0,
    batch_size: int = 8,
    max_length: int = 1024,
    progress: bool = True,
) -> dict[str, FloatArray]:
    """Log-probabilities of the chosen and the rejected response of every pair.

    Args:
        model: a causal language model; it is put into eval mode meanwhile.
        tokenizer: the model's tokenizer.
        pairs: rows of the standard preference format (`prompt`, `chosen`, `rejected`; text or chat
            messages).
        length_normalization: alpha; a log-probability is divided by its token count ** alpha.
        batch_size: pairs in one forward pass; the numbers do not depend on it but for rounding.
        max_length: tokens of prompt and response; a longer prompt loses its beginning.
        progress: show a progress bar.

    Returns:
        {"chosen": (P,), "rejected": (P,)} in the order of `pairs`, float64, in nats.

    Raises:
        UsageError: no pairs, one that is not as above, a response longer than `max_length`, or a
            log-probability that is not finite.
    """
    from plad_fast.head import causal_lm_logprobs, evaluating
    from plad_fast.packing import PreferenceCollator, to_device
    from plad_fast.sharing import prepare
    from plad_fast.tokenization import encode_group

    if not pairs:
        raise UsageError("there are no pairs to score; pass at least one")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; pass 1 or more")
    features = []
    for index, pair in enumerate(pairs):
        try:
            prompt, responses = read_row(pair)
            if len(responses) != 2:
                raise UsageError(f"{len(responses)} responses; give one chosen and one rejected")
            features.append(encode_group(tokenizer, prompt, responses, max_length=max_length))
        except UsageError as error:
            raise UsageError(f"pair {_pair_name(pairs, index)}: {error}") from None
    too_long = [index for index, feature in enumerate(features) if not feature["fits"]]
    if too_long:
        raise UsageError(
            f"{len(too_long)} of {len(pairs)} pairs hold a response longer than "
            f"max_length={max_length} tokens, the first is pair {_pair_name(pairs, too_long[0])}; "
            "raise max_length, or leave those pairs out"
        )
    # Pairs of like length share a batch, the longest first: little padding, and a batch that
    # does not fit into memory fails at once.
    order = sorted(range(len(pairs)), key=lambda index: -_num_tokens(features[index]))
    pad_token_id = tokenizer.pad_token_id  # padding is masked, so any id would do
    collate = PreferenceCollator(
        0 if pad_token_id is None else pad_token_id, group_size=2, layout=prepare(model)
    )
    device = next(model.parameters()).device
    logps = np.empty((len(pairs), 2))
    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=len(pairs), desc="scoring", unit="pair", disable=not progress) as bar,
    ):
        for start in range(0, len(pairs), batch_size):
            rows = order[start : start + batch_size]
            batch = to_device(collate([features[row] for row in rows]), device)
            result = causal_lm_logprobs(model, batch, length_normalization=length_normalization)
            logps[rows] = result.sums.double().cpu().numpy().reshape(-1, 2)
            bar.update(len(rows))
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if len(bad):
        raise UsageError(
            f"{len(bad)} of {len(pairs)} pairs have a log-probability that is not finite, the "
            f"first is pair {_pair_name(pairs, int(bad[0]))}; the model has diverged or overflows "
            "in its dtype: train with a lower learning rate, or load it in float32"
        )
    return {"chosen": logps[:, 0], "rejected": logps[:, 1]}


def _pair_name(pairs: Sequence[Mapping[str, Any]], index: int) -> str:
    return str(pairs[index].get("id", f"number {index}"))


def _num_tokens(feature: EncodedGroup) -> int:
    return len(feature["prompt_ids"]) + max(map(len, feature["response_ids"]))
