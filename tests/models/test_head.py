"""Log-probabilities through the head are those of the model's own logits, or it is refused."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import transformers
from torch import nn

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.head import backbone_hidden, causal_lm_logprobs, check_architecture
from plad_fast.models.lm_head import find_head
from plad_fast.models.wrappers import call_inside, unwrap

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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
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
    check_architecture(model)
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


def test_unknown_scale_is_refused_by_name():
    """Some models multiply by an entry of that name, others divide by it or ignore it."""
    model = build("Llama", logit_scale=0.5)
    with pytest.raises(UsageError, match=r"config\.logit_scale is 0\.5"):
        find_head(model)


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


@pytest.mark.parametrize("family", ["Gemma3", "AyaVision"])
def test_text_part_of_a_larger_model_is_seen(family):
    """Batches of text alone. Both ignore what their text model's config says on scale or cap."""
    text = {"final_logit_softcapping": 2.0}
    if family == "AyaVision":
        text = {"model_type": "cohere2", "logit_scale": 0.25}
    config = getattr(transformers, f"{family}Config")(
        text_config={**COMMON, "head_dim": 8, **text},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    head = find_head(model)
    assert (head.softcap, head.logit_scale) == (None, 1.0)
    check_architecture(model)


def test_scale_of_a_larger_model_is_not_guessed():
    """What a model of text and images does with its text model's entries is its own affair."""
    config = transformers.LlavaConfig(
        text_config={**COMMON, "model_type": "gemma2", "head_dim": 8},
        vision_config={**VISION, "model_type": "clip_vision_model"},
    )
    with pytest.raises(UsageError, match="final_logit_softcapping is 30"):
        find_head(transformers.LlavaForConditionalGeneration(config))


class LoraLinear(nn.Module):
    """Stands for PEFT's wrapper, which holds a linear layer without being one."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.weight = base.weight


def test_unsafe_heads_are_refused():
    model = build("Llama")
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(UsageError, match="LoraLinear"):
        find_head(model)

    model = build("Llama")
    model.lm_head.weight = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves outside of forward
    with pytest.raises(UsageError, match="sharded"):
        find_head(model)

    with torch.device("meta"), pytest.raises(UsageError, match="meta device"):
        find_head(build("Llama"))

    with pytest.raises(UsageError, match="no LM head"):
        find_head(build("Llama").model)

    with pytest.raises(UsageError, match="not a transformers model"):
        find_head(nn.Linear(2, 2))


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


def test_call_inside_restores_the_forward():
    module = nn.Linear(2, 2)
    assert call_inside(module, module, lambda x: x + 1, 1) == 2
    assert "forward" not in vars(module)

    def fail():
        raise RuntimeError("inside")

    own = module.forward = lambda x: x  # as accelerate does for autocast
    with pytest.raises(RuntimeError, match="inside"):
        call_inside(module, module, fail)
    assert vars(module)["forward"] is own


@pytest.fixture(scope="module")
def process_group():
    """A world of one process."""
    import torch.distributed as dist

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_pass_through_wrappers(kind, process_group, batch):
    """Both act in their forward only: outside of it DDP reduces nothing and FSDP is sharded."""
    plain = build("Llama")
    causal_lm_logprobs(plain, batch).sums.sum().backward()
    model = copy.deepcopy(plain)
    model.zero_grad()
    if kind == "ddp":
        wrapper = nn.parallel.DistributedDataParallel(model)
        reduced = []
        wrapper.register_comm_hook(None, lambda _, bucket: _reduced(bucket, reduced))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapper = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UsageError, match="sharded"):
            find_head(model)
    assert unwrap(wrapper) is model
    sums = call_inside(wrapper, model, lambda: causal_lm_logprobs(model, batch).sums)
    sums.sum().backward()
    if kind == "ddp":
        assert sum(reduced) == sum(p.numel() for p in model.parameters())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = ours.grad if kind == "ddp" else ours.grad.full_tensor()
        torch.testing.assert_close(gradient, theirs.grad)


def _reduced(bucket, sizes):
    sizes.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
