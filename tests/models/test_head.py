"""Log-probabilities through the head are those of the model's own logits, or it is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.head import backbone_hidden, causal_lm_logprobs, check_architecture

COMMON = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FEATURES = [
    {"prompt_ids": [1, 5, 9], "response_ids": [[12, 7, 2], [33, 2]]},
    {"prompt_ids": [1, 60], "response_ids": [[4, 8, 15, 16, 23, 2], [42, 2]]},
]


def build(name, **overrides):
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **overrides})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    return model


def naive_sums(model, batch):
    """From the logits of the whole model, one sequence after the other, without padding."""
    sums = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        tokens = row[mask.bool()]
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)
        sums.append(logprobs[:-1].gather(1, tokens[1:, None]).squeeze(1))
    counts = batch["cu_seqlens"].diff().tolist()
    return torch.stack([s[-count:].sum() for s, count in zip(sums, counts, strict=True)])


@pytest.fixture(scope="module")
def batch():
    return PreferenceCollator(pad_token_id=0, group_size=2)(FEATURES)


# Of every family test_architectures.py compares fewer gradients. A cap of 2 bites: logits reach 5.
@pytest.mark.parametrize(
    ("name", "options"),
    [("Llama", {}), ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}), ("Phi", {})],
    ids=["plain", "cap", "bias"],
)
def test_logprobs_equal_the_models_own(name, options, batch):
    """Values, and the gradient of every parameter; padding included."""
    model = build(name, **options)
    check_architecture(model.train())
    assert model.training
    model.eval()
    ours = causal_lm_logprobs(model, batch).sums
    theirs = naive_sums(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)

    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5])
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(sums @ upstream, parameters, allow_unused=True)
        for sums in (ours, theirs)
    ]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_length_normalization_and_temperature_reach_the_op(batch):
    model = build("Llama")
    plain = causal_lm_logprobs(model, batch)
    means = causal_lm_logprobs(model, batch, length_normalization=1.0)
    torch.testing.assert_close(means.sums, plain.sums / plain.counts)
    hot = causal_lm_logprobs(model, batch, temperature=1e6).sums
    torch.testing.assert_close(hot, -plain.counts * torch.tensor(61.0).log(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("change", ["scale", "vocabulary"])
def test_check_finds_what_the_config_does_not_say(change):
    """A model from the hub may do anything to its logits; training it would be silently wrong."""
    model = build("Llama")
    forward = type(model).forward

    def other(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2 if change == "scale" else output.logits[..., :-1]
        return output

    model.forward = other.__get__(model)
    with pytest.raises(UsageError, match="does more to its logits"):
        check_architecture(model)


def test_check_finds_a_model_that_sees_padding():
    """Or the future: its log-probabilities would depend on what else is in the batch."""
    model = build("Llama")
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: out + out.mean(1, True))
    with pytest.raises(UsageError, match=r"not a causal model|does more"):
        check_architecture(model)
    config = transformers.CpmAntConfig(
        vocab_size=61, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=24
    )
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="not a causal model"):
        check_architecture(transformers.CpmAntForCausalLM(config))


def test_backbone_runs_without_the_head(batch):
    model = build("Llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    hidden = backbone_hidden(model, batch["input_ids"], batch["attention_mask"])
    assert hidden.shape == (*batch["input_ids"].shape, 16)


def test_peft_model_is_seen_through(batch):
    """PEFT wraps the model and puts its adapters into the layers of the one inside."""

    class Peft(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = base

        def get_base_model(self):
            return self.base_model.model

    model = build("Llama")
    wrapped = causal_lm_logprobs(Peft(model), batch).sums
    assert torch.equal(wrapped, causal_lm_logprobs(model, batch).sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixed_precision(dtype, batch):
    """bf16 weights, and float32 weights under bf16 autocast: as near as the model's own logits."""
    truth = naive_sums(build("Llama"), batch)
    model = build("Llama").to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        ours = causal_lm_logprobs(model, batch).sums
        theirs = naive_sums(model, batch)
    assert ours.dtype == torch.float32
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    budget = 2 * (theirs.float() - truth).abs().max() + 1e-3
    assert (ours - truth).abs().max() <= budget
