"""The recorder of a GPU that is not there sees what a GPU would be asked to do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks.cuda_recorder import H100, counting
from benchmarks.cuda_rules import RULES

READS = {
    "item": lambda x: x[2].item(),
    "bool": lambda x: bool((x > 1).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "mask written": lambda x: x.__setitem__(x > 1, x[:2].clone()),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x + 1),
    "list": lambda x: x[[0, 2]],
    "to the device": lambda x: torch.tensor([1, 2], device=x.device),
    "lengths": lambda x: x.repeat_interleave(x),
}
QUIET = {
    "view": lambda x: x[1:].reshape(-1, 1).squeeze(1),
    "arithmetic": lambda x: (x * 2 + x).sum(),
    "rows": lambda x: x[x - 1],
    "lengths of known sum": lambda x: x.repeat_interleave(x, output_size=6),
    "not waited for": lambda x: x.to("cpu", non_blocking=True),
    "assertion": lambda x: torch._assert_async((x > 0).all(), "positive"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_of_the_host_waits_once(read):
    with counting() as recorder:
        read(recorder.tensor(torch.tensor([1, 2, 3])))
    assert len(recorder.waits) == 1, recorder.waits


@pytest.mark.parametrize("call", QUIET.values(), ids=QUIET)
def test_what_the_host_does_not_wait_for(call):
    with counting() as recorder:
        call(recorder.tensor(torch.tensor([1, 2, 3])))
    assert recorder.waits == []


def test_the_host_reads_the_values_that_a_device_would_have_computed():
    with counting() as recorder:
        x = recorder.tensor(torch.tensor([3.0, -1.0, 2.0]))
        rows = (x > 0).nonzero().squeeze(1)
        y = torch.zeros_like(x)
        y[rows] = x[rows] * 2
        y.view(3)[1:].neg_()
        assert (y.is_cuda, y.device.type) == (True, "cuda")
        found = y.tolist(), rows.tolist(), torch.cat([x, y]).max().item()
    assert found == ([6.0, 0.0, -4.0], [0, 2], 6.0)


def test_a_value_that_nobody_knows_is_not_invented():
    with counting() as recorder:
        product = recorder.empty(3, 5) @ recorder.empty(5, 7)
        with pytest.raises(RuntimeError, match=r"shape \(\)"):
            product.max().item()


def test_launches_and_bytes():
    with counting() as recorder:
        a, b = recorder.empty(4, 8), recorder.empty(8, 6)
        total = recorder.empty(4, 6, dtype=torch.float32)
        recorder.start(recorder.empty(1, 1))
        torch.mm(a, b, out_dtype=torch.float32)
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0, out=total)
        a.T[1:].unsqueeze(0)
        torch.empty(3, device=a.device)
        total.mul_(2)
        a[torch.zeros(2, dtype=torch.int64, device=a.device)]
    operands = 2 * (4 * 8 + 8 * 6)
    assert [(x.name, x.kind, x.flops, x.read, x.written) for x in recorder.launches] == [
        ("mm", "product", 2 * 4 * 8 * 6, operands, 96),
        ("addmm", "product", 2 * 4 * 8 * 6, operands + 96, 96),
        ("addmm", "product", 2 * 4 * 8 * 6, operands, 96),
        ("mul_", "torch", 0, 96, 96),
        ("zeros", "torch", 0, 0, 16),
        ("index", "torch", 0, 2 * 8 * 2 + 16, 2 * 8 * 2),
    ]
    assert [x.accumulated for x in recorder.launches[:3]] == [0, 192, 0]


def test_peak_is_of_what_lives_at_a_time():
    with counting() as recorder:
        recorder.empty(10)
        given = recorder.empty(100)
        recorder.start(given)
        for _ in range(3):
            torch.empty(1000, device=given.device).sum()
        kept = torch.empty(500, device=given.device)
        del kept
    assert recorder.peak_bytes == 4000 + 4


def test_passes_over_the_gradient_of_the_weight():
    with counting() as recorder:
        weight = recorder.empty(6, 4)
        recorder.start(weight)
        grad = torch.zeros_like(weight, dtype=torch.float32)
        grad[:3].add_(1)
        torch.zeros(6, 5, device=weight.device)
        grad.to(weight.dtype)
        weight * 2
    assert sum(x.grad_read for x in recorder.launches) == (0.5 + 1) * 24
    assert sum(x.grad_written for x in recorder.launches) == (1 + 0.5 + 1 + 1) * 24


def test_a_kernel_without_a_rule_is_refused():
    @triton.jit
    def new_kernel(x_ptr):
        pass

    with counting() as recorder, pytest.raises(KeyError, match="new_kernel"):
        new_kernel[(1,)](recorder.tensor(torch.zeros(3)))
    assert "new_kernel" not in RULES


def test_the_process_has_no_gpu_afterwards():
    available = torch.cuda.is_available()
    with counting():
        assert torch.cuda.get_device_properties(0).multi_processor_count == H100.num_sms
    assert torch.cuda.is_available() == available
    meta = torch.zeros(3, device="meta")
    assert (meta.is_cuda, meta.is_meta, meta.device.type) == (False, True, "meta")
