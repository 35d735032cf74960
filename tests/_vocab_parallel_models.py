"""Cases of _vocab_parallel_ranks.py with models whose heads PyTorch or transformers sharded."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plad_fast.errors import UsageError
from plad_fast.fused import fused_linear_preference_loss
from plad_fast.head import call_inside, causal_lm_logprobs, find_head, head_arguments
from plad_fast.packing import PreferenceCollator
from plad_fast.vocab_parallel import vocab_parallel_preference_loss
from tests._vocab_parallel_ranks import case, close
from tests.naive import features
from tests.tiny_models import make_model

VOCAB = 97  # that no number of ranks divides


def batch_of(seed: int = 0) -> Any:
    groups = features([3 + seed, 4], [[2, 3], [4, 1]], VOCAB)
    return PreferenceCollator(pad_token_id=0, group_size=2, layout="padded")(groups)


def mesh_of(group: Any, name: str | None = "tp") -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=None if name is None else (name,))


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    return make_model("llama").to(dtype)


def check_same(sharded: nn.Module, whole: nn.Module, run: Any, run_whole: Any) -> None:
    """Values, and the gradient of every parameter; the head's is placed as the head is."""
    found, expected = run(sharded), run_whole(whole)
    close(found, expected, "result")
    found.backward()
    expected.backward()
    theirs = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        grad = parameter.grad
        if hasattr(parameter, "placements"):
            if name.startswith("lm_head"):
                assert grad.placements == parameter.placements, name
            grad = grad.full_tensor()
        close(grad, theirs[name].grad, name)


def refused(match: str, run: Any) -> None:
    try:
        run()
    except UsageError as error:
        assert match in str(error), str(error)
    else:
        raise AssertionError(match)


def squares(model: nn.Module) -> torch.Tensor:
    out = causal_lm_logprobs(model, batch_of(), length_normalization=0.5)
    return (out.sums**2).sum() + out.token_logprobs[::2].sum()


def one_pass(model: nn.Module) -> torch.Tensor:
    arguments = head_arguments(model, batch_of(), tensor_parallel=True)
    op = vocab_parallel_preference_loss if "group" in arguments else fused_linear_preference_loss
    return op(**arguments, loss="plad_ranking", beta=9.0, sft_weight=0.1).loss


@case
def a_colwise_head_of_pytorch_equals_the_whole_model(group):
    """Uneven rows of a head that is not tied."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    for run in (squares, one_pass):
        whole = llama()
        sharded = copy.deepcopy(whole)
        parallelize_module(sharded, mesh_of(group), {"lm_head": ColwiseParallel()})
        assert find_head(sharded, tensor_parallel=True).group is not None
        check_same(sharded, whole, run, run)


@case
def hidden_states_sharded_over_the_sequence_are_gathered(group):
    """Those of a SequenceParallel norm; a plain tensor of a part of the sequence is refused."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def split(_module, inputs):
        whole = DTensor.from_local(inputs[0], mesh, [Replicate()])
        return whole.redistribute(placements=[Shard(1)])

    mesh = mesh_of(group)
    for local in (False, True):
        whole = llama()
        sharded = copy.deepcopy(whole)
        plan = {
            "model.norm": SequenceParallel(use_local_output=local),
            "lm_head": ColwiseParallel(input_layouts=Shard(1)),
        }
        parallelize_module(sharded, mesh, plan)
        sharded.model.norm.register_forward_pre_hook(split, prepend=True)
        if local:
            refused("sharded over the sequence", functools.partial(squares, sharded))
            continue
        for run in (squares, one_pass):
            sharded.zero_grad()
            whole.zero_grad()
            check_same(sharded, whole, run, run)


@case
def a_model_sharded_by_transformers_equals_the_whole_one(group):
    """By its own plan for Llama, the layers and the head; transformers 5 alone has it for CPUs."""
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        return
    heads = 4
    if heads % dist.get_world_size(group):
        return
    whole = llama()
    sharded = copy.deepcopy(whole)
    plan = {"lm_head": "colwise_gather_output"}
    for layer in range(len(whole.model.layers)):
        for name in ("gate_proj", "up_proj"):
            plan[f"model.layers.{layer}.mlp.{name}"] = "colwise"
        plan[f"model.layers.{layer}.mlp.down_proj"] = "rowwise"
    weights = {f"{name}.weight": style for name, style in plan.items()}
    apply_tensor_parallelism(sharded, mesh_of(group), {**plan, **weights})
    assert find_head(sharded, tensor_parallel=True).group is not None
    for run in (squares, one_pass):
        sharded.zero_grad()
        whole.zero_grad()
        check_same(sharded, whole, run, run)


@case
def data_parallel_shards_are_not_taken_for_the_vocabulary(group):
    """FSDP2's head outside the forward has the same placement; its mesh, or its data, tell."""
    from torch.distributed.fsdp import fully_shard

    for name in ("dp", None, "fsdp"):
        mesh = mesh_of(group, name)
        model = llama(torch.float32)
        fully_shard(model, mesh=mesh)
        refused("tensor parallelism", lambda model=model: find_head(model, tensor_parallel=True))
        # Inside the forward it is whole, and taken as ever.
        inside = call_inside(model, model, causal_lm_logprobs, model, batch_of())
        inside.sums.sum().backward()

    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    # Sharded by tensor parallelism, but not said to be; named by its mesh it is taken.
    mesh = mesh_of(group, None)
    model = parallelize_module(llama(), mesh, {"lm_head": ColwiseParallel()})
    refused("pass tensor_parallel=mesh", lambda: causal_lm_logprobs(model, batch_of()))
    named = causal_lm_logprobs(model, batch_of(), tensor_parallel=mesh)
    close(named.sums, causal_lm_logprobs(llama(), batch_of()).sums, "named by its mesh")
    # Who does not ask for it is told what to do.
    refused("sharded", lambda: head_arguments(model, batch_of()))
    # Should the name lie: ranks with other data are found out by the op.
    lying = parallelize_module(llama(), mesh_of(group), {"lm_head": ColwiseParallel()})
    refused("differ between ranks", lambda: causal_lm_logprobs(lying, batch_of(dist.get_rank())))
