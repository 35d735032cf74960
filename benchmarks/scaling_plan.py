"""Memory and time of one training step on W GPUs: counts of `scaling_count` over assumed rates.

Everything that is assumed is in `scaling_rates`; nothing here was run on a GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from benchmarks.scaling_count import (
    GIB,
    Chunk,
    Collectives,
    Flops,
    Shape,
    Workload,
    activations,
    block_activations,
    ddp_collectives,
    fsdp_collectives,
    head_products,
    one_pass_chunk,
    scratch_rows,
    step_flops,
)
from benchmarks.scaling_rates import H100, Assumptions, Gpu

SCRATCH_BYTES = GIB  # what a vocabulary-parallel head takes of a GPU with 64 GiB or more


@dataclass(frozen=True)
class Strategy:
    """How a model is spread, and what a parameter takes."""

    name: str
    sharded: bool
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    autocast: bool = False
    """Weights in float32, and autocast's 16-bit copies beside them."""
    lora_rank: int | None = None
    vocab_parallel: bool = False
    """Each GPU of a node has a part of the head's rows, and the node's hidden states."""


DDP = Strategy("DDP, float32", False, 4, 4, 8, autocast=True)
DDP_BF16 = Strategy("DDP, bfloat16", False, 2, 2, 4)
DDP_8BIT = Strategy("DDP, bfloat16, 8-bit AdamW", False, 2, 2, 2)
DDP_LORA = Strategy("DDP, LoRA", False, 2, 4, 8, lora_rank=16)
FSDP = Strategy("FSDP2, float32", True, 4, 4, 8)
FSDP_LORA = Strategy("FSDP2, LoRA", True, 2, 4, 8, lora_rank=16)
FSDP_VOCAB = Strategy("FSDP2, vocabulary-parallel", True, 4, 4, 8, vocab_parallel=True)
STRATEGIES = (DDP, DDP_BF16, DDP_8BIT, DDP_LORA, FSDP, FSDP_LORA, FSDP_VOCAB)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the step's most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    buffers: float

    @property
    def total(self) -> float:
        held = self.weights + self.gradients + self.optimizer
        return held + self.activations + self.head + self.buffers


@dataclass(frozen=True)
class Seconds:
    """Of one step; `collectives` is what products do not hide."""

    linears: float
    attention: float
    head: float
    traffic: float
    optimizer: float
    collectives: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def binds(self) -> str:
        """The largest part."""
        return max(vars(self), key=lambda part: vars(self)[part])


@dataclass(frozen=True)
class Plan:
    """One step of one strategy on `world` GPUs, a whole number of nodes beyond the first."""

    shape: Shape
    work: Workload
    strategy: Strategy
    world: int
    gpu: Gpu = H100
    checkpointing: bool = True
    assumed: Assumptions = field(default_factory=Assumptions)

    @property
    def trainable(self) -> int:
        rank = self.strategy.lora_rank
        return self.shape.parameters if rank is None else self.shape.lora_parameters(rank)

    @property
    def head_group(self) -> int:
        """GPUs that share the rows of the head."""
        return min(self.world, self.gpu.per_node) if self.strategy.vocab_parallel else 1

    @property
    def products(self) -> float:
        """Of the head: `head_products` with the rows that the default budget holds."""
        if self.head_group > 1:
            rows = scratch_rows(self.shape, SCRATCH_BYTES)
        else:
            rows = self.head_chunk.rows
        frozen = self.strategy.lora_rank is not None
        return head_products(
            response=self.work.response, scratch_rows=rows, active=self.work.active, frozen=frozen
        )

    @property
    def head_chunk(self) -> Chunk:
        """Of the one-pass loss in kernels, which a vocabulary-parallel head does without."""
        frozen = self.strategy.lora_rank is not None
        return one_pass_chunk(self.shape, self.work.rows, self.gpu.memory_bytes, frozen=frozen)

    @property
    def flops(self) -> Flops:
        return step_flops(
            self.shape,
            self.work,
            products=self.products,
            checkpointing=self.checkpointing,
            lora_rank=self.strategy.lora_rank,
        )

    @property
    def collectives(self) -> Collectives:
        if not self.strategy.sharded:
            return ddp_collectives(self.trainable, self.world, item=self.strategy.gradient_bytes)
        whole = fsdp_collectives(self.shape, self.world)
        spared = 2 * self.shape.head_parameters * (1 - 1 / self.head_group)
        reduced = whole.reduce_scattered - spared
        if self.strategy.lora_rank is not None and self.world > 1:
            reduced = 2 * self.trainable
        return Collectives(
            round(whole.gathered_forward - spared),
            whole.gathered_backward,
            round(reduced),
            calls=whole.calls,
        )

    @property
    def memory(self) -> Memory:
        strategy, shape = self.strategy, self.shape
        parts = self.world if strategy.sharded else 1
        lora = strategy.lora_rank is not None
        weights = strategy.weight_bytes * shape.parameters + (4 * self.trainable if lora else 0)
        gradients = strategy.gradient_bytes * self.trainable / parts
        head, of_backward = self._head_bytes()
        at_head, at_backward = self._buffer_bytes()
        # At the head no parameter has its gradient yet, in the backward no scratch is left.
        backward_needs_more = gradients + of_backward + at_backward > head + at_head
        return Memory(
            weights=weights / parts,
            gradients=gradients if backward_needs_more else 0.0,
            optimizer=strategy.optimizer_bytes * self.trainable / parts,
            activations=activations(
                shape,
                self.work,
                checkpointing=self.checkpointing,
                autocast=strategy.autocast,
                cuda=True,
            ),
            head=of_backward if backward_needs_more else head,
            buffers=at_backward if backward_needs_more else at_head,
        )

    def _head_bytes(self) -> tuple[float, float]:
        """While the loss runs: scratch, the weight's gradient and d_hidden; and what of it waits
        for the backward. A gradient of several chunks is accumulated in float32, and a
        vocabulary-parallel one copied to 16 bits."""
        rows = 2 * self.work.rows * self.shape.hidden
        part = self.shape.head_parameters / self.head_group
        if self.head_group > 1:  # the group's hidden states in 16 bits, their gradient in float32
            rows = (2 + 4) * self.work.rows * self.shape.hidden * self.head_group
            return 4 * part + max(SCRATCH_BYTES, 2 * part) + rows, 2 * part + rows
        chunk = self.head_chunk
        if self.strategy.lora_rank is not None:
            return chunk.bytes + rows, rows
        gradient = (2 if chunk.whole else 4) * part
        return chunk.bytes + gradient + rows, gradient + rows

    def _buffer_bytes(self) -> tuple[float, float]:
        """While the loss runs, and in the backward, where gradients are whole for a moment."""
        strategy, shape = self.strategy, self.shape
        if not strategy.sharded:
            reducer = 0
            if self.world > 1:  # DDP's buckets are a second copy of the gradients
                reducer = strategy.gradient_bytes * self.trainable
            copies = 0
            if strategy.autocast:
                copies = 2 * (shape.layers * shape.linear_parameters + shape.head_parameters)
            return reducer + copies, reducer + copies
        root, block = shape.fsdp_elements(self.world)
        root -= round(shape.head_parameters * (1 - 1 / self.head_group))
        gathered = 2.0 * (root + 2 * block)  # a block, and the next one on its way
        if strategy.lora_rank is not None:
            return gathered, gathered
        # The head's part of the root's gradient is counted with the head.
        own = 0 if shape.tied else shape.head_parameters
        return gathered, gathered + 2.0 * (own + 2 * block)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.memory_bytes - self.assumed.reserve_bytes

    @property
    def seconds(self) -> Seconds:
        gpu, assumed, work, shape = self.gpu, self.assumed, self.work, self.shape
        flops, hbm = self.flops, gpu.hbm * assumed.hbm_share
        rate = gpu.flops * assumed.product_share
        # With few tokens it is reading the weights that takes the time.
        passes = 4 if self.checkpointing else 3
        read = passes * 2 * shape.layers * shape.linear_parameters / hbm
        linears, head = max(flops.linears / rate, read), flops.head / rate
        attention = flops.attention / (gpu.flops * assumed.attention_share)
        kept = shape.layers * block_activations(
            shape, work, autocast=self.strategy.autocast, cuda=True
        )
        # Logits are written and read in float32, those of active pairs once more, their gradient
        # is written in 16 bits and read by two products.
        logits = work.rows * shape.vocab * (8 + work.active * (4 + 3 * 2))
        parts = self.world if self.strategy.sharded else 1
        states = 2 * (self.strategy.weight_bytes + self.strategy.optimizer_bytes)
        stepped = (states + self.strategy.gradient_bytes) * self.trainable / parts
        traffic = (assumed.passes * kept + logits) / hbm
        compute = linears + head + attention + traffic
        return Seconds(
            linears=linears,
            attention=attention,
            head=head,
            traffic=traffic,
            optimizer=stepped / hbm,
            collectives=self._exposed(compute),
        )

    def _exposed(self, compute: float) -> float:
        """Seconds of collectives that no product hides."""
        if self.world == 1:
            return 0.0
        gpu, assumed, calls = self.gpu, self.assumed, self.collectives
        rate = gpu.link(self.world) * assumed.link_share
        share = (self.world - 1) / self.world
        forward = share * calls.gathered_forward / rate
        backward = calls.received(self.world) / rate - forward + calls.calls * assumed.latency
        passes = 4 if self.checkpointing else 3
        exposed = 0.0
        for took, beside in ((forward, compute / passes), (backward, compute * (1 - 1 / passes))):
            exposed += took - min(assumed.overlap * took, beside)
        return exposed + self._head_seconds()

    def _head_seconds(self) -> float:
        """Of the head group's own collectives, which nothing runs beside: hidden states gathered in
        16 bits, and what plad_fast.ops.vocab_parallel sends in float32: three numbers a row from
        every GPU, gathered chunk by chunk, and the gradient of the hidden states, all-reduced.
        Before them the ranks agree, and settle on the size of the chunks."""
        group = self.head_group
        if group == 1:
            return 0.0
        rows = self.work.rows * group
        sent = (2 + 2 * 4) * rows * self.shape.hidden + 3 * 4 * rows * group
        rate = self.gpu.nvlink * self.assumed.link_share
        part = dataclasses.replace(self.shape, vocab=self.shape.vocab // group)
        chunks = -(-rows // scratch_rows(part, SCRATCH_BYTES))
        return (group - 1) / group * sent / rate + (4 + chunks) * self.assumed.latency

    @property
    def pairs_per_second(self) -> float:
        return self.world * self.work.pairs / self.seconds.total
