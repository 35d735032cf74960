"""Calls through DDP and FSDP give the gradients of the bare model."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from torch import nn

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.head import causal_lm_logprobs
from plad_fast.models.lm_head import find_head
from plad_fast.models.wrappers import call_inside, unwrap
from tests.models.test_head import FEATURES, build


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
def test_gradients_pass_through_wrappers(kind, process_group):
    """Both act in their forward only: outside of it DDP reduces nothing and FSDP is sharded."""
    plain, batch = build("Llama"), PreferenceCollator(0, 2)(FEATURES)
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
