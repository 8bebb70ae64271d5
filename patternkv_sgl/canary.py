"""SGLang's KV canary (``--kv-canary``) over the packed cache.

The canary keeps, beside the pool, which token and position every slot was last written for, and
checks it wherever a slot is read again. With ``--kv-canary-real-data`` it also keeps a hash of the
slot's bytes: here of layer 0, of the codes of its first KV head. K and V share a slot, so one pair
of buffers serves both, as with MLA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.kernels.ops.kv_canary.verify import CANARY_SLOT_BYTES, RealKvSource
from sglang.srt.kv_canary.buffer_group import CanaryBufferGroup, PoolKind
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import RadixCacheWalkResult

if TYPE_CHECKING:
    from patternkv_sgl.pool import PatternKVPool
    from patternkv_sgl.radix import PatternRadixCache

ALIGNMENT = 16  # bytes that the hash loads at once
# SGLang's launch plan has room to verify three times the slots of the pool, four int64 each.
_PLAN_BYTES = 3 * 4 * torch.int64.itemsize


def nbytes(num_slots: int) -> int:
    """Device memory that the canary of a pool of ``num_slots`` takes."""
    return num_slots * (2 * CANARY_SLOT_BYTES + _PLAN_BYTES)


def attach(
    *,
    pool: PatternKVPool,
    device: torch.device,
    read_bytes: int,
    kv_token_id_vs_position_offset: int,
) -> tuple[CanaryBufferGroup, ...]:
    """A pool attacher of ``sglang.srt.kv_canary.pool_patcher``: the canary's buffers of ``pool``.

    Args:
        read_bytes: bytes of a slot to hash: 0 for none, more than there are for all.

    Raises:
        ValueError: slots of this format are not aligned for the hash.
    """
    fmt, num_slots = pool.slot_formats[0], len(pool.slot_table)
    sources: tuple[RealKvSource, ...] = ()
    if read_bytes:
        code_bytes = fmt.code_bytes
        if code_bytes % ALIGNMENT:
            raise ValueError(
                f"--kv-canary-real-data hashes {ALIGNMENT} bytes at a time: the codes of "
                f"{code_bytes} bytes of this model are no multiple of that; leave it at 'none'"
            )
        sources = (
            RealKvSource(
                tensor=pool.packed[0],
                page_size=fmt.page_size,
                num_bytes_per_token=code_bytes,
                read_bytes=min(read_bytes, code_bytes),
            ),
        )
    head, tail = (
        torch.zeros(num_slots, CANARY_SLOT_BYTES, dtype=torch.uint8, device=device)
        for _ in range(2)
    )
    return (
        CanaryBufferGroup(
            kind=PoolKind.FULL,
            k_head=head,
            k_tail=tail,
            v_head=None,
            v_tail=None,
            real_kv_sources_k=sources,
            real_kv_sources_v=(),
            swa_index_lut=None,
            kv_token_id_vs_position_offset=kv_token_id_vs_position_offset,
        ),
    )


def walk(tree: PatternRadixCache, *, unlocked_only: bool) -> RadixCacheWalkResult:
    """Slot, position and the slot before (-1 for none) of every token in ``tree``, for the sweep.

    ``unlocked_only`` leaves out the nodes that running requests hold.
    """
    slots: list[int] = []
    positions: list[int] = []
    previous: list[int] = []
    waiting = [(child, 0, -1) for child in tree.root_node.children.values()]
    while waiting:
        node, start, before = waiting.pop()
        held = node.value.tolist()
        if not (unlocked_only and node.lock_ref):
            slots += held
            positions += range(start, start + len(held))
            previous += [before, *held[:-1]]
        end = start + len(held)
        waiting += [(child, end, held[-1]) for child in node.children.values()]
    as_tensor = (torch.tensor(values, dtype=torch.int64) for values in (slots, positions, previous))
    slot_indices, position_indices, previous_indices = as_tensor
    return RadixCacheWalkResult(
        slot_indices=slot_indices,
        positions=position_indices,
        prev_slot_indices=previous_indices,
    )
