"""The scale plan counts what a step really does."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import scaling, scaling_table
from benchmarks.measure import PRODUCTS
from benchmarks.scaling_count import (
    GIB,
    SHAPES,
    Shape,
    Workload,
    activations,
    block_activations,
    head_products,
    one_pass_chunk,
    rest_activations,
    scratch_rows,
    step_flops,
)
from benchmarks.scaling_plan import SCRATCH_BYTES, STRATEGIES, Plan
from benchmarks.scaling_rates import GPUS
from plad_fast import fused_linear_preference_loss
from plad_fast.data.packing import PreferenceBatch, PreferenceCollator
from plad_fast.models.head import head_arguments
from plad_fast.models.sharing import prepare
from plad_fast.ops.backend import (
    _MAX_CUDA_SCRATCH_BYTES,
    HeadOptions,
    one_pass_scratch_bytes,
)
from plad_fast.ops.impl.kernel_workspace import KernelWorkspace
from plad_fast.ops.impl.workspace import Workspace
from tests.support.launched import Started, python

TINY = Shape("tiny", layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=500)
WORK = Workload(pairs=4, prompt=32, response=16)
TWICE = dataclasses.replace(WORK, shared=False)

of_transformers_5 = pytest.mark.skipif(
    transformers.__version__ < "5",
    reason="in transformers 4 layers keep more, and each row has a rotation of its own",
)


def make_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM(make_config(TINY)).to(dtype)


def make_batch(model: torch.nn.Module, work: Workload, layout: str, **options) -> PreferenceBatch:
    if layout == "padded":
        model.set_attn_implementation(options["attention"])
    features = [
        {
            "prompt_ids": [1 + i] * work.prompt,
            "response_ids": [[7] * work.response, [8] * work.response],
        }
        for i in range(work.pairs)
    ]
    return PreferenceCollator(0, 2, layout=prepare(model, layout, check=False, **options))(features)


def step(model: torch.nn.Module, batch: PreferenceBatch, active: int, **options) -> None:
    """One forward and backward in which the first `active` pairs have a gradient."""
    pairs = (len(batch["cu_seqlens"]) - 1) // 2
    scores = torch.tensor([[1e6 if i < active else -1e6, 0.0] for i in range(pairs)]).flatten()
    out = fused_linear_preference_loss(
        **head_arguments(model, batch),
        loss="plad_margin",
        scores=scores,
        **{"sft_weight": 0.0, "length_normalization": 0.0, **options},
    )
    assert out.active.sum() == active
    out.loss.backward()


def measured_flops(*args, **options) -> int:
    """Matrix products that run, by the profiler: it sees those inside of registered ops too."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        step(*args, **options)
    return sum(event.flops for event in profiler.key_averages() if event.key in PRODUCTS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_parameters_are_those_of_transformers(shape: Shape) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape))
    assert shape.parameters == model.num_parameters()


def test_adapters_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=list(TINY.linears))
    model = peft.get_peft_model(make_model(), config)
    assert TINY.lora_parameters(4) == model.get_nb_trainable_parameters()[0]


@of_transformers_5
@pytest.mark.parametrize(
    ("work", "layout", "active", "checkpointing"),
    [
        (WORK, "shared", 1, False),
        (WORK, "shared", 0, False),  # the head's forward alone, and a backward of zeros
        (WORK, "shared", 4, True),
        (TWICE, "packed", 4, False),
        (TWICE, "padded", 2, False),
    ],
)
def test_products_of_a_step(work: Workload, layout: str, active: int, checkpointing: bool) -> None:
    model = make_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, work, layout, attention="eager")
    products = head_products(response=16, scratch_rows=1000, active=active / 4)
    counted = step_flops(TINY, work, products=products, checkpointing=checkpointing)
    assert batch["input_ids"].numel() == work.tokens
    assert len(batch["targets"]) == work.rows
    assert counted.total == measured_flops(model, batch, active)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_with_adapters_and_a_frozen_head(checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=list(TINY.linears))
    model = peft.get_peft_model(make_model(), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    batch = make_batch(model, WORK, "shared", attention="eager")
    products = head_products(response=16, scratch_rows=1000, frozen=True)
    counted = step_flops(TINY, WORK, products=products, checkpointing=checkpointing, lora_rank=4)
    assert measured_flops(model, batch, 4) == pytest.approx(counted.total, rel=0.01)


@of_transformers_5
def test_products_of_pairs_longer_than_the_buffer() -> None:
    """Pairs of 32 rows in a buffer of 20: twelve rows of each active pair are computed again."""
    budget = next(b for b in itertools.count(30_000, 100) if scratch_rows(TINY, b, 4) == 20)
    model = make_model()
    batch = make_batch(model, WORK, "shared", attention="eager")
    products = head_products(response=16, scratch_rows=20, active=0.5)
    assert products == 1 + 0.5 * (2 + 12 / 32)
    counted = step_flops(TINY, WORK, products=products)
    assert counted.total == measured_flops(model, batch, 2, scratch_bytes=budget)


def test_rows_of_the_scratch_are_those_of_the_op() -> None:
    for budget in (10_000, 100_000, 1_000_000):
        hidden, weight = torch.empty(10_000, TINY.hidden), torch.empty(TINY.vocab, TINY.hidden)
        options = HeadOptions(scratch_bytes=budget)
        workspace = Workspace((hidden, weight, None), options, len(hidden), for_gradient=True)
        assert workspace.rows == scratch_rows(TINY, budget, 4)
    assert _MAX_CUDA_SCRATCH_BYTES == SCRATCH_BYTES


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gib", [2, 24, 80])
def test_chunks_of_the_one_pass_loss_are_those_of_the_kernels(
    gib: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = gib * GIB
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for shape, num_rows in itertools.product(SHAPES, (100, 2048, 8192, 20_000)):
        chunk = one_pass_chunk(shape, num_rows, memory, frozen=frozen)
        hidden = torch.empty(num_rows, shape.hidden, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device="meta")
        budget = one_pass_scratch_bytes(torch.device("cuda", 0), *weight.shape)
        workspace = KernelWorkspace(
            (hidden, weight, None),
            HeadOptions(scratch_bytes=budget),
            num_rows,
            for_gradient=True,
            needs=(True, not frozen, False),
        )
        assert workspace.rows == chunk.rows
        assert chunk.whole == (workspace.rows >= num_rows)


@of_transformers_5
@pytest.mark.parametrize(("work", "layout"), [(WORK, "shared"), (TWICE, "padded")])
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_what_autograd_keeps(work: Workload, layout: str, autocast: bool) -> None:
    """Within 3 %: tables of the rotation and the token ids are left out."""
    model = make_model(torch.float32 if autocast else torch.bfloat16)
    batch = make_batch(model, work, layout, attention="sdpa")
    # Parameters are counted on their own, and so are autocast's copies of them.
    shapes = [tuple(p.shape) for p in model.parameters()]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own and tuple(tensor.shape) not in shapes + [s[::-1] for s in shapes]:
            kept[pointer] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden = head_arguments(model, batch)["hidden"]
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    measured += work.rows * 2 * TINY.hidden  # what the op keeps: its input
    assert len(hidden) == work.rows
    assert measured == pytest.approx(activations(TINY, work, autocast=autocast), rel=0.03)


def test_checkpointing_keeps_inputs_and_one_block() -> None:
    """Saved outside of the checkpoints: the blocks' inputs and the last norm."""
    model = make_model(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, WORK, "shared", attention="sdpa")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = head_arguments(model, batch)
    measured = sum(kept.values()) + held["hidden"].nbytes
    counted = activations(TINY, WORK, checkpointing=True) - block_activations(TINY, WORK)
    assert measured == pytest.approx(counted, rel=0.05)
    assert counted < rest_activations(TINY, WORK) + activations(TINY, WORK) / 4


COLLECTIVES = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from plad_fast.models import call_inside, causal_lm_logprobs
from plad_fast.data import PreferenceCollator
from benchmarks.scaling_count import ddp_collectives, fsdp_collectives
from tests.benchmarks.test_scaling import TINY, make_config
from transformers import LlamaForCausalLM
import dataclasses

WORLD = 64
sent = {}

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if name.startswith("c10d."):
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
            sizes = sent.setdefault(name, [])
            sizes.append(max(x.nbytes for x in tensors))
        return function(*args, **(kwargs or {}))

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
features = [{"prompt_ids": [1] * 8, "response_ids": [[2] * 4, [3] * 4]}]
batch = PreferenceCollator(0, 2, layout="padded")(features)

def step(wrapper, module):
    def forward(_):
        return causal_lm_logprobs(module, batch).sums.sum()
    call_inside(wrapper, module, forward, batch["input_ids"]).backward()

for tied in (False, True):
    shape = dataclasses.replace(TINY, tied=tied)
    model = LlamaForCausalLM(make_config(shape)).train()
    if tied:  # checkpointing changes nothing
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    sent.clear()
    with Recorder():
        step(model, model)
    gathered, reduced = sent["c10d._allgather_base_"], sent["c10d._reduce_scatter_base_"]
    counted = fsdp_collectives(shape, WORLD)
    assert sum(gathered) == counted.gathered_forward + counted.gathered_backward, sent
    assert sum(reduced) == counted.reduce_scattered, sent
    assert len(gathered) + len(reduced) == counted.calls, sent

    buckets = []
    model = LlamaForCausalLM(make_config(shape))
    wrapper = DistributedDataParallel(model)

    def hook(_, bucket):
        buckets.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapper.register_comm_hook(None, hook)
    step(wrapper, model)
    assert sum(buckets) == ddp_collectives(shape.parameters, WORLD).all_reduced, buckets
"""


def test_collectives_of_64_processes(tmp_path: Path) -> None:
    """FSDP2 and DDP of a world of 64 that exists in one process only: bytes and calls of a step."""
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    started = Started(1, [str(script)], tmp_path / "logs", program=python)
    assert started.statuses() == [0], started.said()


def test_what_must_hold_of_any_plan() -> None:
    for gpu, shape, strategy in itertools.product(GPUS, SHAPES, STRATEGIES):
        if not scaling.sensible(shape, strategy, 2):
            continue
        plans = [Plan(shape, scaling.WORK, strategy, world, gpu) for world in scaling.WORLDS[1:]]
        memory = [plan.memory.total for plan in plans]
        if strategy.sharded:
            assert memory == sorted(memory, reverse=True), (shape.name, strategy.name)
            assert memory[0] > memory[-1]
        for plan in plans:
            seconds = plan.seconds
            assert all(value >= 0 for value in vars(seconds).values())
            bare = plan.flops.total / gpu.flops
            assert seconds.total > bare, "faster than the peak"
            more = dataclasses.replace(plan, checkpointing=False)
            assert more.memory.total > plan.memory.total
            assert more.seconds.total < seconds.total
            half = dataclasses.replace(plan, work=dataclasses.replace(plan.work, active=0.5))
            assert half.seconds.head < seconds.head
    none = dataclasses.replace(scaling.WORK, active=0.0)
    assert Plan(SHAPES[1], none, STRATEGIES[0], 1).products == 1


def test_peers_products_are_those_that_the_loss_benchmark_counted() -> None:
    measured = scaling_table.measured_heads()
    assert {name: float(measured[name]["products"]) for name in scaling_table.PEERS} == {
        "naive": 3.0, "trl": 4.0, "liger": 3.0, "cut-cross-entropy": 3.0,
    }  # fmt: skip
    assert float(measured["one-pass"]["products"]) == head_products(
        response=64, scratch_rows=1024, active=0.5
    )


def test_bad_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--pairs", "0"], ["--active", "2"], ["--response", "-1"]):
        with pytest.raises(SystemExit):
            scaling.main(arguments)
        assert "at least 1" in capsys.readouterr().err


def test_other_settings_are_printed_and_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    before = scaling.CSV.read_bytes()
    assert scaling.main(["--pairs", "2", "--concatenated"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is written" in printed
    assert "FSDP2, vocabulary-parallel" in printed
    assert scaling.CSV.read_bytes() == before
