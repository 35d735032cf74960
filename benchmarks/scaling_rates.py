"""Assumptions of the scaling page: GPUs by their data sheets, and shares of their rates."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scaling_count import GIB


@dataclass(frozen=True)
class Gpu:
    """From data sheets, and therefore assumed."""

    name: str
    memory_bytes: float
    flops: float
    """Dense bfloat16 products a second."""
    hbm: float
    """Bytes a second."""
    nvlink: float
    """Bytes a second and direction, to the GPUs of the same node."""
    network: float = 50e9
    """Bytes a second and direction, to other nodes: a card of 400 Gbit/s for each GPU."""
    per_node: int = 8

    def link(self, world: int) -> float:
        """Bytes a second that a ring over `world` GPUs carries. In every ring a byte enters a node
        once, so that the node's network cards share it."""
        alone = world <= self.per_node
        return self.nvlink if alone else min(self.nvlink, self.per_node * self.network)


H100 = Gpu("H100 80 GB", 79 * GIB, 989e12, 3.35e12, 450e9)
A100 = Gpu("A100 80 GB", 79 * GIB, 312e12, 2.04e12, 300e9, network=25e9)
GPUS = (H100, A100)


@dataclass(frozen=True)
class Assumptions:
    """What nobody counted."""

    product_share: float = 0.6
    """Of the peak rate that large matrix products reach."""
    attention_share: float = 0.35
    """Of the peak rate that attention reaches; its masked products are counted too."""
    hbm_share: float = 0.8
    link_share: float = 0.8
    passes: int = 4
    """Times that a kept byte crosses memory: written and read forward, read backward, and as much
    again for its gradient."""
    overlap: float = 0.8
    """Share of the collectives that can run beside products."""
    latency: float = 30e-6
    """Seconds of a collective of no bytes."""
    reserve_bytes: float = 6 * GIB
    """CUDA context, NCCL's buffers, cuBLAS workspaces, fragmentation."""
