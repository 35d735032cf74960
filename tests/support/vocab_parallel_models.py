"""Cases of tests/ops/test_vocab_parallel.py on heads that PyTorch or transformers sharded."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from plad_fast.data.packing import PreferenceCollator
from plad_fast.models.head import causal_lm_logprobs, head_arguments
from plad_fast.models.lm_head import find_head
from plad_fast.models.wrappers import call_inside
from plad_fast.ops.preference_losses import fused_linear_preference_loss
from plad_fast.ops.vocab_parallel.api import vocab_parallel_preference_loss
from tests.support import vocab_parallel_numbers, vocab_parallel_refusals  # noqa: F401
from tests.support.naive import features
from tests.support.tiny_models import make_model
from tests.support.vocab_parallel_ranks import CASES, WORLD, case, close, refused

try:  # transformers 5 alone has it for CPUs
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism
except ImportError:
    apply_tensor_parallelism = None

__all__ = ["CASES"]  # of all these modules

VOCAB = 97  # that no number of ranks divides


def batch_of(seed: int = 0) -> Any:
    groups = features([3 + seed, 4], [[2, 3], [4, 1]], VOCAB)
    return PreferenceCollator(pad_token_id=0, group_size=2, layout="padded")(groups)


def mesh_of(group: Any, name: str | None = "tp") -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=None if name is None else (name,))


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
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


def squares(model: nn.Module, batch: Any = None) -> torch.Tensor:
    out = causal_lm_logprobs(model, batch or batch_of(), length_normalization=0.5)
    return (out.sums**2).sum() + out.token_logprobs[::2].sum()


def one_pass(model: nn.Module, batch: Any = None) -> torch.Tensor:
    arguments = head_arguments(model, batch or batch_of(), tensor_parallel=True)
    op = vocab_parallel_preference_loss if "group" in arguments else fused_linear_preference_loss
    return op(**arguments, loss="plad_ranking", beta=9.0, sft_weight=0.1).loss


@case
def a_colwise_head_of_pytorch_equals_the_whole_model(group):
    """Uneven rows of a head that is not tied; in one of two runs with a bias."""
    for run in (squares, one_pass):
        whole = llama()
        if run is one_pass:
            whole.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB, dtype=torch.float64))
        sharded = copy.deepcopy(whole)
        parallelize_module(sharded, mesh_of(group), {"lm_head": ColwiseParallel()})
        assert find_head(sharded, tensor_parallel=True).group is not None
        check_same(sharded, whole, run, run)


@case
def hidden_states_sharded_over_the_sequence_are_gathered(group):
    """Those of a SequenceParallel norm; a plain tensor of a part of the sequence is refused."""

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


def a_model_sharded_by_transformers_equals_the_whole_one(group):
    """By its own plan for Llama; where a key's head would be cut in two, without attention's."""
    whole = llama()
    sharded = copy.deepcopy(whole)
    size = dist.get_world_size(group)
    own = whole.config.base_model_tp_plan
    if whole.config.num_key_value_heads % size:
        own = {name: style for name, style in own.items() if "self_attn" not in name}
    styles = {f"model.{name}": style for name, style in own.items()} | type(whole)._tp_plan
    plan = {
        name.replace("*", str(layer)): style
        for name, style in styles.items()
        for layer in range(len(whole.model.layers) if "*" in name else 1)
    }
    assert plan["lm_head"] == "colwise_gather_output"
    weights = {f"{name}.weight": style for name, style in plan.items()}
    apply_tensor_parallelism(sharded, mesh_of(group), {**plan, **weights})
    assert find_head(sharded, tensor_parallel=True).group is not None
    for run in (squares, one_pass):
        sharded.zero_grad()
        whole.zero_grad()
        check_same(sharded, whole, run, run)


if apply_tensor_parallelism is not None:
    case(a_model_sharded_by_transformers_equals_the_whole_one)


@case
def a_tied_head_gets_both_gradients(group):
    whole = llama()
    whole.lm_head.weight = whole.model.embed_tokens.weight
    sharded = copy.deepcopy(whole)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(),
    }
    parallelize_module(sharded, mesh_of(group), plan)
    sharded.model.embed_tokens.weight = sharded.lm_head.weight
    for run in (squares, one_pass):
        sharded.zero_grad()
        whole.zero_grad()
        check_same(sharded, whole, run, run)
    assert "lm_head.weight" not in dict(sharded.named_parameters())


class Collectives(TorchDispatchMode):
    """Notes the largest tensor of every collective, DTensors' own included."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # which will come here with its local tensors
            return NotImplemented
        if "c10d" in str(function):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.numbers.append(max(tensor.numel() for tensor in tensors))
        return function(*args, **(kwargs or {}))


@case
def no_collective_is_as_large_as_the_logits_or_the_head(group):
    size = dist.get_world_size(group)
    sharded = parallelize_module(llama(), mesh_of(group), {"lm_head": ColwiseParallel()})
    rows, width = len(batch_of()["targets"]), sharded.config.hidden_size
    for run in (squares, one_pass):
        with Collectives() as seen:
            run(sharded).backward()
        assert size * 3 * rows in seen.numbers, seen.numbers
        assert max(seen.numbers) == rows * width < rows * VOCAB, seen.numbers


def fsdp_and_tensor_parallelism_together(group):
    """Two by two processes: the head's rows over one dimension, data and weights over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = llama()
    whole.resize_token_embeddings(100)
    sharded = copy.deepcopy(whole)
    parallelize_module(sharded, mesh["tp"], {"lm_head": ColwiseParallel()})
    own = copy.deepcopy(sharded)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(sharded, mesh=mesh["dp"])
    assert sharded.lm_head.weight.device_mesh.mesh_dim_names == ("dp", "tp")
    refused("not known to be one", find_head, sharded, tensor_parallel=True)
    batches = [batch_of(seed) for seed in range(2)]
    mine = batches[mesh.get_local_rank("dp")]
    for run in (squares, one_pass):
        sharded.zero_grad()
        whole.zero_grad()
        expected = [run(whole, batch) for batch in batches]
        found = call_inside(
            sharded, sharded, lambda _, run=run: run(sharded, mine), mine["targets"]
        )
        close(found, expected[mesh.get_local_rank("dp")], "result")
        found.backward()
        (sum(expected) / 2).backward()  # FSDP's gradients are means
        for name, parameter in sharded.named_parameters():
            close(parameter.grad.full_tensor(), whole.get_parameter(name).grad, name)

    # A head that FSDP takes by itself would be whole in its own forward only.
    fully_shard(own.lm_head, mesh=mesh["dp"])
    fully_shard(own, mesh=mesh["dp"])
    inside = functools.partial(call_inside, own, own, lambda _: squares(own, mine))
    refused("not by itself", inside, mine["targets"])


case(fsdp_and_tensor_parallelism_together, sizes=[WORLD])


@case
def data_parallel_shards_are_not_taken_for_the_vocabulary(group):
    """FSDP2's head outside the forward has the same placement; its mesh, or its data, tell."""
    for name in ("dp", None, "fsdp"):
        mesh = mesh_of(group, name)
        model = llama(torch.float32)
        if name is None:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        refused("tensor parallelism", lambda model=model: find_head(model, tensor_parallel=True))
        # Inside the forward it is whole, and taken as ever; so is one that is a unit of its own.
        inside = call_inside(model, model, causal_lm_logprobs, model, batch_of())
        inside.sums.sum().backward()

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
