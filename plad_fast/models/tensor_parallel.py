"""DTensors of tensor parallelism, as the vocabulary-parallel ops take them.

FSDP2 leaves DTensors with the same placement on its own mesh, whose ranks hold other data: taking
its shards for the vocabulary's would be wrong. The name of the mesh's dimension tells them apart,
which is "tp" in transformers and torchtitan, or the caller names the mesh. Under both, a weight is
sharded in two dimensions, except inside the wrapped forward, where that of the tensors is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from plad_fast.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_NAME = "tp"


def holds_vocab_rows(weight: Tensor | None, accepted: bool | DeviceMesh) -> bool:
    """Whether a head is sharded by tensor parallelism, and by nothing else.

    Raises:
        UsageError: by both, which the head's own forward cannot undo: it takes tensors apart for
            tensor parallelism too.
    """
    if not accepted or weight is None or not _is_dtensor(weight):
        return False
    names = weight.device_mesh.mesh_dim_names or ()  # type: ignore[attr-defined]
    if len(names) > 1 and _NAME in names:
        raise UsageError(
            f"the LM head is sharded over the dimensions {names} of a mesh: call this inside the "
            "wrapped forward (plad_fast.models.call_inside), and let fully_shard take the head "
            "with the whole model, not by itself"
        )
    return _is_accepted(weight, accepted)


def vocab_rows(
    weight: Tensor, bias: Tensor | None, accepted: bool | DeviceMesh, family: str
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """This rank's rows of a head sharded by tensor parallelism, and the group that has them all.

    Gradients come back as DTensors. A weight that is no DTensor is returned as it is.

    Raises:
        UsageError: a DTensor that is not sharded by its rows over a mesh that is accepted.
    """
    if not accepted or not _is_dtensor(weight):
        return weight, bias, None
    what = f"the LM head of {family}"
    mesh = _accepted_mesh(weight, accepted, what)
    for tensor in (weight, bias):
        if tensor is not None and (not _is_dtensor(tensor) or not _by_rows(tensor)):
            raise UsageError(
                f"{what} has a weight or bias with placements "
                f"{getattr(tensor, 'placements', 'of one device')}; vocabulary-parallel losses "
                "need both sharded by rows (Shard(0), which ColwiseParallel gives)"
            )
    if bias is not None and bias.device_mesh != mesh:  # type: ignore[attr-defined]
        raise UsageError(f"weight and bias of {what} lie on different meshes")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise UsageError(f"the mesh of {what} must list its ranks in ascending order, got {ranks}")
    return _local(weight), None if bias is None else _local(bias), mesh.get_group()


def whole_hidden(
    hidden: Tensor,  # (R, T, D)
    accepted: bool | DeviceMesh,
    tokens: Tensor,  # (R, T)
) -> Tensor:  # (R, T, D)
    """Hidden states of all tokens as a plain tensor; those sharded over the sequence are gathered.

    Its gradient must be whole on every rank, as it is by default of the vocabulary-parallel ops.

    Raises:
        UsageError: another placement, or another number of tokens than the batch has.
    """
    if accepted and hidden.shape[:2] != tokens.shape:
        raise UsageError(
            f"the hidden states have {tuple(hidden.shape[:2])} tokens, the batch "
            f"{tuple(tokens.shape)}; if they are sharded over the sequence, let the last norm take "
            "and return DTensors (SequenceParallel(use_local_output=False))"
        )
    if not _is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Replicate, Shard

    _accepted_mesh(hidden, accepted, "the model's hidden states")
    whole = hidden.placements[0]  # type: ignore[attr-defined]
    if whole not in (Replicate(), Shard(1)):
        raise UsageError(
            f"the hidden states have placement {whole}; vocabulary-parallel losses take "
            "Replicate(), or Shard(1), over the sequence"
        )
    everywhere = hidden.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
    return everywhere.to_local(grad_placements=[Replicate()])


def _accepted_mesh(tensor: Any, accepted: bool | DeviceMesh, what: str) -> DeviceMesh:
    mesh = tensor.device_mesh
    if _is_accepted(tensor, accepted):
        return mesh
    raise UsageError(
        f"{what} lies on a mesh of dimensions {mesh.mesh_dim_names}, which is not known to be one "
        "of tensor parallelism. Sharded by FSDP, it is whole inside the wrapped forward only "
        f"(plad_fast.models.call_inside); for tensor parallelism name the dimension {_NAME!r}, or "
        "pass tensor_parallel=mesh"
    )


def _is_accepted(tensor: Any, accepted: bool | DeviceMesh) -> bool:
    mesh = tensor.device_mesh
    if mesh.ndim != 1:
        return False
    return mesh.mesh_dim_names == (_NAME,) if isinstance(accepted, bool) else accepted == mesh


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # without loading torch.distributed.tensor


def _by_rows(tensor: Any) -> bool:
    from torch.distributed.tensor import Shard

    (placement,) = tensor.placements
    # A subclass shards in another order.
    return type(placement) is Shard and placement.dim % tensor.ndim == 0


def _local(tensor: Any) -> Tensor:
    from torch.distributed.tensor import Shard

    return tensor.to_local(grad_placements=[Shard(0)])
