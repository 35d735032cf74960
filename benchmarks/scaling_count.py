"""Operations, stored bytes and sent bytes of one training step, counted from a Llama's shapes.

Every function here is compared with a measurement in tests/benchmarks/test_scaling.py: parameters
with transformers' own count, products with those that torch's profiler sees in a real step,
activations with the tensors that autograd saves, collectives with those that FSDP2 and DDP issue.

T tokens that enter the model, N rows that reach the LM head, D hidden, V vocabulary, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30
_BLOCK_SHARE = 16  # of the scratch budget; see plad_fast.ops.impl.workspace


@dataclass(frozen=True)
class Shape:
    """A Llama: RMSNorm, rotary attention with G groups of keys, gated MLP, no biases."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int = 128256
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def linear_parameters(self) -> int:
        """Of one block, without its norms."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.tied else 2)
        block = self.linear_parameters + 2 * self.hidden
        return embeddings + self.layers * block + self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Of adapters on every linear layer of the body."""
        return self.layers * sum(rank * (rows + cols) for rows, cols in self.linears.values())

    def fsdp_elements(self, world: int) -> tuple[int, int]:
        """(root, block): elements that FSDP2 gathers for what is outside of the blocks, and for
        one block. It pads the first dimension of every parameter to a multiple of the world."""

        def padded(*shape: int) -> int:
            rows = -(-shape[0] // world) * world
            return rows * (shape[1] if len(shape) > 1 else 1)

        matrix = padded(self.vocab, self.hidden)
        root = matrix * (1 if self.tied else 2) + padded(self.hidden)
        block = sum(padded(*shape) for shape in self.linears.values()) + 2 * padded(self.hidden)
        return root, block


LLAMA_1B = Shape("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, tied=True)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336)
LLAMA_70B = Shape("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672)
SHAPES = (LLAMA_1B, LLAMA_8B, LLAMA_70B)


@dataclass(frozen=True)
class Workload:
    """Pairs of one length, which one GPU runs in one forward and backward."""

    pairs: int
    prompt: int
    response: int
    shared: bool = True
    """Every prompt once, `layout="shared"`; else once for each response."""
    active: float = 1.0
    """Share of the pairs whose loss has a gradient."""

    @property
    def tokens(self) -> int:  # T
        return self.pairs * ((1 if self.shared else 2) * self.prompt + 2 * self.response)

    @property
    def rows(self) -> int:  # N
        """Response tokens: no other reaches the head."""
        return 2 * self.pairs * self.response

    @property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(how many, queries, keys) of the attention calls; see plad_fast.data.row_layout."""
        whole = self.prompt + self.response
        if not self.shared:
            return ((2 * self.pairs, whole, whole),)
        return ((self.pairs, whole, whole), (self.pairs, self.response, whole))

    @property
    def attended(self) -> int:
        """Query-key products of one head, masked ones included."""
        return sum(count * queries * keys for count, queries, keys in self.spans)


@dataclass(frozen=True)
class Flops:
    """Of forward and backward of one GPU's batch."""

    linears: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linears + self.attention + self.head


def head_products(
    *, response: int, scratch_rows: int, active: float = 1.0, frozen: bool = False
) -> float:
    """Matrix products of 2 N D V flop that the one-pass loss makes of pairs of equal length.

    One for the forward, and for active pairs two (one where the head is frozen) for the backward.
    A pair that is longer than the buffer computes all but its last `scratch_rows` rows again.
    """
    again = max(0, 2 * response - scratch_rows) / (2 * response)
    return 1 + active * ((1 if frozen else 2) + again)


class Chunk(NamedTuple):
    """Logits that the one-pass loss holds at a time."""

    rows: int
    bytes: int
    whole: bool
    """All rows are one chunk, and the gradient of the head needs no float32 accumulator."""


def one_pass_chunk(shape: Shape, num_rows: int, memory: float, *, frozen: bool = False) -> Chunk:
    """As the kernels have it for bfloat16 on a GPU with this memory: float32 rows of logits, a copy
    of the hidden states and their gradient in float32, within the default budget."""
    wanted = max(GIB, 5 * shape.vocab * max(shape.hidden, 4096))
    budget = min(int(memory) // 16, wanted)
    per_row = 4 * (-(-shape.vocab // 64) * 64) + (4 + 2) * shape.hidden
    accumulator = 0 if frozen else 4 * shape.vocab * shape.hidden
    if num_rows * per_row <= budget + accumulator:
        return Chunk(num_rows, num_rows * per_row, True)
    rows = (budget - budget // _BLOCK_SHARE) // per_row
    rows = max(1, rows // 128 * 128 or rows)
    return Chunk(rows, rows * per_row, False)


def scratch_rows(shape: Shape, scratch_bytes: int, bytes_per_logit: int = 6) -> int:
    """Rows of logits that fit the budget; 4 bytes a logit in float32, 6 from 16-bit operands."""
    per_row = shape.vocab * bytes_per_logit + 3 * shape.hidden * 4
    return max(1, (scratch_bytes - scratch_bytes // _BLOCK_SHARE) // per_row)


def step_flops(
    shape: Shape,
    work: Workload,
    *,
    products: float,
    checkpointing: bool = False,
    lora_rank: int | None = None,
) -> Flops:
    """Products of one forward and backward, masked attention included.

    Checkpointing runs the blocks forward twice. With LoRA the body's weights have no gradient, and
    the first block's queries, keys and values have no input that wants one (unless checkpointing
    asks for it, as PEFT does).
    """
    per_linear = 2 * work.tokens * shape.linear_parameters * shape.layers
    forwards = 2 if checkpointing else 1
    if lora_rank is None:
        linears = per_linear * (forwards + 2)
    else:
        adapters = 2 * work.tokens * shape.lora_parameters(lora_rank)
        linears = per_linear * (forwards + 1) + adapters * (forwards + 2)
        if not checkpointing:
            first = [shape.linears[name] for name in ("q_proj", "k_proj", "v_proj")]
            linears -= 2 * work.tokens * sum(r * c + lora_rank * c for r, c in first)
    attention = 4 * shape.heads * shape.head_dim * work.attended * shape.layers * (forwards + 2)
    return Flops(linears, attention, round(2 * work.rows * shape.head_parameters * products))


def block_activations(
    shape: Shape, work: Workload, *, autocast: bool = False, cuda: bool = False
) -> int:
    """Bytes that autograd keeps of one block, with PyTorch's SDPA, in bfloat16.

    Args:
        autocast: parameters and residual stream are float32: autocast keeps a copy of its input for
            every linear layer. (Its copies of the weights are not in here.)
        cuda: keys and values of a masked span are repeated for all heads, as on GPUs.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Two norms (in float32, and what the weight multiplies), the inputs of linear layers, rsqrt.
    stream = (2 * 8 + 5 * 2 if autocast else 2 * 6 + 2 * 2) * shape.hidden + 8
    mlp = 4 * 2 * shape.ffn  # gate, silu(gate), up, their product
    attention = 2 * 2 * queries + 2 * 2 * keys + 4 * shape.heads
    total = work.tokens * (stream + mlp + attention)
    if work.shared:
        wide = queries if cuda else keys
        total += work.tokens * 2 * queries  # the spans' outputs, put together
        _, (count, responses, seen) = work.spans
        total += count * 2 * seen * (2 * wide + responses)  # keys, values and the mask
    return total


def rest_activations(shape: Shape, work: Workload, *, autocast: bool = False) -> int:
    """Bytes that are kept outside of the blocks: the last norm, and the rows for the head."""
    norm = (8 if autocast else 6) * shape.hidden + 4
    return work.tokens * norm + work.rows * 2 * shape.hidden


def activations(
    shape: Shape,
    work: Workload,
    *,
    checkpointing: bool = False,
    autocast: bool = False,
    cuda: bool = False,
) -> int:
    """Bytes at the backward's most: all blocks, or their inputs and one block run again."""
    block = block_activations(shape, work, autocast=autocast, cuda=cuda)
    rest = rest_activations(shape, work, autocast=autocast)
    if not checkpointing:
        return shape.layers * block + rest
    inputs = work.tokens * shape.hidden * (4 if autocast else 2)
    return shape.layers * inputs + block + rest


@dataclass(frozen=True)
class Collectives:
    """Bytes of the whole (gathered, unreduced) buffers of one step, and how many calls."""

    gathered_forward: int = 0
    gathered_backward: int = 0
    reduce_scattered: int = 0
    all_reduced: int = 0
    calls: int = 0

    def received(self, world: int) -> float:
        """Bytes that reach one GPU; an all-reduce is a reduce-scatter and an all-gather."""
        whole = self.gathered_forward + self.gathered_backward + self.reduce_scattered
        return (world - 1) / world * (whole + 2 * self.all_reduced)


def fsdp_collectives(shape: Shape, world: int, *, item: int = 2) -> Collectives:
    """FSDP2 over the blocks and the rest, each block gathered again for its backward.

    Embedding, last norm and head are the root's: gathered once, and kept until the step ends.
    """
    if world == 1:
        return Collectives()
    root, block = shape.fsdp_elements(world)
    blocks = shape.layers * block
    return Collectives(
        gathered_forward=item * (root + blocks),
        gathered_backward=item * blocks,
        reduce_scattered=item * (root + blocks),
        calls=3 * shape.layers + 2,
    )


def ddp_collectives(parameters: int, world: int, *, item: int = 4) -> Collectives:
    """DDP: gradients of the parameters' dtype, in buckets of 25 MiB."""
    if world == 1:
        return Collectives()
    size = item * parameters
    return Collectives(all_reduced=size, calls=-(-size // (25 * 2**20)))
