"""Pattern-quantized KV cache: the slot format and its reference ops (tensors in, tensors out)."""

from patternkv_kernels.decode import tree_decode, tree_decode_with_lse
from patternkv_kernels.decode_cuda import (
    DecodeShape,
    DecodeWorkspace,
    SlotSource,
    decode_unavailable,
    plan_decode,
    plans_are_alike,
)
from patternkv_kernels.dequantize import dequantize
from patternkv_kernels.format import SlotFormat, SlotViews
from patternkv_kernels.mined import MinedTable
from patternkv_kernels.mining import mine_kv, mine_table
from patternkv_kernels.mining_reference import query_weight
from patternkv_kernels.plan import DecodePlan
from patternkv_kernels.ragged import (
    RaggedAttention,
    RaggedWorkspace,
    merge_states,
    ragged_workspace,
)
from patternkv_kernels.rotate import rotate
from patternkv_kernels.rotate_reference import hadamard, rotate_heads
from patternkv_kernels.store import store_kv
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import Window, WindowWrite
from patternkv_kernels.windowed_layers import WindowedLayers, store_windows

__all__ = [
    "DecodePlan",
    "DecodeShape",
    "DecodeWorkspace",
    "LayerTables",
    "MinedTable",
    "RaggedAttention",
    "RaggedWorkspace",
    "SlotFormat",
    "SlotSource",
    "SlotViews",
    "Window",
    "WindowWrite",
    "WindowedLayers",
    "decode_unavailable",
    "dequantize",
    "hadamard",
    "merge_states",
    "mine_kv",
    "mine_table",
    "plan_decode",
    "plans_are_alike",
    "query_weight",
    "ragged_workspace",
    "rotate",
    "rotate_heads",
    "store_kv",
    "store_windows",
    "tree_decode",
    "tree_decode_with_lse",
]
