"""Cases for sets of processes: one loss and its gradients through DDP, FSDP2 and ZeRO-3.

Every process has its share of the groups, the loss has the denominators of all, and every gradient
has to be the one of a single process that has all groups.
"""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model
from plad_fast.models.head import causal_lm_logprobs, through_head
from plad_fast.models.lm_head import find_head
from plad_fast.models.sharing import prepare
from plad_fast.models.wrappers import call_inside, unwrap
from plad_fast.ops.preference_losses import fused_linear_preference_loss
from tests.support.tiny_models import make_model

RATE = 0.1

# Lengths and numbers of groups differ from process to process.
GROUPS = [
    {"prompt_ids": [1, 5, 9], "response_ids": [[12, 7, 2], [33, 2]]},
    {"prompt_ids": [1, 60], "response_ids": [[4, 8, 15, 16, 23, 2], [42, 2]]},
    {"prompt_ids": [1, 6, 7, 8, 9, 10], "response_ids": [[3, 2], [9, 9, 9, 9, 2]]},
    {"prompt_ids": [1], "response_ids": [[2], [70, 71, 72, 73, 74, 75, 76, 2]]},
    {"prompt_ids": [1, 11], "response_ids": [[13, 2], [14, 2]]},
    {"prompt_ids": [1, 20, 21], "response_ids": [[], [22, 2]]},
    {"prompt_ids": [1, 30, 31, 32], "response_ids": [[33, 34, 2], [35, 2]]},
]


def share(rank, world):
    """The first process has most groups, the last has one."""
    cuts = {1: [0, 7], 2: [0, 6, 7], 4: [0, 3, 5, 6, 7]}[world]
    return GROUPS[cuts[rank] : cuts[rank + 1]]


def build(tied=False, frozen=False, lora=False):
    model = make_model("llama")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True
    if frozen:
        model.lm_head.weight.requires_grad_(False)
    if lora:
        import peft

        adapted = ["q_proj", "lm_head"]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)
            model = peft.get_peft_model(model, config)
    return model


def batch_and_loss(module, groups, *, layout="padded", loss="plad_ranking", sft_weight=0.3):
    """A batch, and a function of nothing to see that makes the share of its loss in all's."""
    batch = PreferenceCollator(0, 2, layout=layout)(groups)
    tokens = sum(len(group["response_ids"][0]) for group in GROUPS)
    options = {"loss": loss, "sft_weight": sft_weight}
    if loss == "plad_margin":
        # All but the last process's only group ask for more than they will ever have.
        gaps = [-1e3 if group is GROUPS[-1] else 1e3 for group in groups]
        options["scores"] = torch.tensor([[gap, 0.0] for gap in gaps]).flatten()

    def op(**arguments):
        return fused_linear_preference_loss(
            **arguments, **options, num_groups=len(GROUPS), num_tokens=tokens
        )

    return batch, lambda _: through_head(module, batch, op)


def sums_of(module, batch):
    return lambda _: causal_lm_logprobs(module, batch).sums


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ddp(model, **options):
    return nn.parallel.DistributedDataParallel(model, **options)


def fsdp(model, units="layers", **policy):
    """`units` says which modules beside the whole model are sharded by themselves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    lm = base_model(model)
    if units != "whole":
        for layer in lm.model.layers:
            shard(layer)
    if units == "head":  # as torchtitan does
        shard(lm.lm_head)
    if units == "tail":  # as accelerate does
        tied = lm.lm_head.weight is lm.model.embed_tokens.weight
        shard([lm.model.norm, *([lm.model.embed_tokens] if tied else []), lm.lm_head])
    shard(model)
    with pytest.raises(UsageError, match="sharded"):
        find_head(model)
    return model


def averaged_over(wrapper):
    """By how many processes a wrapper divides gradients: FSDP2 of torch 2.8 by none over gloo."""
    sums = isinstance(wrapper, FSDPModule) and torch.__version__.startswith("2.8.")
    return 1 if sums else dist.get_world_size()


def zero3(model, stage=3):
    """Of the real DeepSpeed. It clips gradients unless told not to."""
    import deepspeed

    # Its own all-reduce in shared memory would be compiled first.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )[0]


def gradient(wrapper, parameter, like):
    if hasattr(wrapper, "step"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).view_as(like)
    return whole(parameter.grad)


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
                parameter.grad = None


def equal_one_process(
    wrap, folder, *, checkpointing=False, layout="padded", tied=False, built=(), **loss
):
    """Loss and gradients; the second step meets what the first and an evaluation left."""
    rank, world = dist.get_rank(), dist.get_world_size()
    single = build(tied, **dict.fromkeys(built, True))
    model = copy.deepcopy(single)
    for each in (single, model):
        prepare(each, layout)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapper = wrap(model)
    module = unwrap(wrapper)
    theirs = dict(single.named_parameters())
    for _ in range(2):
        expected = batch_and_loss(single, GROUPS, layout=layout, **loss)[1](None)
        expected.loss.backward()
        batch, run = batch_and_loss(module, share(rank, world), layout=layout, **loss)
        out = call_inside(wrapper, module, run, batch["input_ids"])
        if loss.get("loss") == "plad_margin":
            assert bool(out.active.any()) == (rank < world - 1)
        loss_of_all = out.loss * averaged_over(wrapper)
        getattr(wrapper, "backward", torch.Tensor.backward)(loss_of_all)
        total = out.loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.loss.detach(), rtol=1e-5, atol=1e-5)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, name
                continue
            torch.testing.assert_close(
                gradient(wrapper, parameter, theirs[name]),
                theirs[name].grad,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        step(single)
        wrapper.step() if hasattr(wrapper, "step") else step(module)
        with torch.no_grad():
            found = call_inside(wrapper, module, sums_of(module, batch), batch["input_ids"])
            truth = sums_of(single, batch)(None)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


def sums_stay_float32(folder, *, units):
    """`output_dtype` rounds what leaves a wrapped model, but not losses and log-probabilities."""
    half = build()
    for parameter in half.parameters():  # buffers stay as they are
        parameter.data = parameter.data.bfloat16()
    # Every process the same, so that the mean over them is one's own.
    batch, run = batch_and_loss(half, GROUPS)
    expected = run(None)
    expected.loss.backward()
    policy = {"param_dtype": torch.bfloat16, "output_dtype": torch.bfloat16}
    model = fsdp(build(), units, **policy, reduce_dtype=torch.float32)
    out = call_inside(model, model, batch_and_loss(model, GROUPS)[1], batch["input_ids"])
    (out.loss * averaged_over(model) / dist.get_world_size()).backward()
    for name in ("loss", "sums", "group_losses"):
        found, truth = getattr(out, name), getattr(expected, name)
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-5)
    assert out.loss != out.loss.bfloat16()  # else the comparison says nothing
    theirs = dict(half.named_parameters())
    for name, parameter in model.named_parameters():
        found, truth = whole(parameter.grad), theirs[name].grad.float()
        assert found.dtype == torch.float32
        assert (found - truth).norm() <= 0.01 * truth.norm(), name


def unused_parameters(folder):
    """DDP looks for them from what the call returns."""

    def wrap(model):
        model.unused = nn.Parameter(torch.ones(3))
        return ddp(model, find_unused_parameters=True)

    rank, world = dist.get_rank(), dist.get_world_size()
    model = build()
    wrapper = wrap(model)
    for _ in range(2):
        batch, run = batch_and_loss(model, share(rank, world))
        call_inside(wrapper, model, run, batch["input_ids"]).loss.backward()
    assert model.unused.grad is None or not model.unused.grad.any()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "unused")


def _cases():
    equal = functools.partial
    inactive = {"loss": "plad_margin", "sft_weight": 0.0}
    cases = {}
    for tied in (False, True):
        name = "tied" if tied else "untied"
        cases[f"ddp-{name}"] = equal(equal_one_process, ddp, tied=tied)
        for units in ("whole", "layers", "tail", *([] if tied else ["head"])):
            wrap = functools.partial(fsdp, units=units)
            cases[f"fsdp2-{units}-{name}"] = equal(equal_one_process, wrap, tied=tied)
    cases |= {
        "ddp-shared": equal(equal_one_process, ddp, layout="shared"),
        "fsdp2-tail-shared": equal(
            equal_one_process, functools.partial(fsdp, units="tail"), layout="shared"
        ),
        "ddp-inactive": equal(equal_one_process, ddp, **inactive),
        "fsdp2-tail-inactive": equal(
            equal_one_process, functools.partial(fsdp, units="tail"), **inactive
        ),
        "ddp-frozen": equal(equal_one_process, ddp, built=["frozen"]),
        "fsdp2-tail-frozen": equal(
            equal_one_process, functools.partial(fsdp, units="tail"), built=["frozen"]
        ),
        "ddp-checkpointing": equal(equal_one_process, ddp, checkpointing=True),
        "fsdp2-head-checkpointing": equal(
            equal_one_process, functools.partial(fsdp, units="head"), checkpointing=True
        ),
        "ddp-unused": unused_parameters,
        "fsdp2-whole-bf16": equal(sums_stay_float32, units="whole"),
        "fsdp2-tail-bf16": equal(sums_stay_float32, units="tail"),
    }
    if importlib.util.find_spec("peft") is not None:
        cases["fsdp2-head-lora"] = equal(
            equal_one_process, functools.partial(fsdp, units="head"), built=["lora"]
        )
    return cases


LOSSES = _cases()
FOUR = {
    name: LOSSES[name]
    for name in (
        "ddp-untied",
        "fsdp2-head-untied",
        "fsdp2-tail-tied",
        "fsdp2-tail-shared",
        "fsdp2-tail-inactive",
    )
}
"""For four processes, where all of them would take long."""

ZERO_LOSSES = {
    f"zero{stage}-{'tied' if tied else 'untied'}{suffix}": functools.partial(
        equal_one_process, functools.partial(zero3, stage=stage), tied=tied, **options
    )
    for stage, tied, suffix, options in (
        (3, False, "", {}),
        (3, True, "", {}),
        (3, False, "-shared", {"layout": "shared"}),
        (3, False, "-frozen", {"built": ["frozen"]}),
        (3, False, "-inactive", {"loss": "plad_margin", "sft_weight": 0.0}),
        (2, True, "", {}),
    )
}
