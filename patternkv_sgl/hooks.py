"""The SGLang functions that the plug-in hooks, whether hooks have anything to do, and a check that
the functions are still what we hook. Nothing here imports SGLang before it is called.
"""

from __future__ import annotations

import inspect
import pkgutil

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."
_SIZING = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator."

BUILD_POOL = _CONFIGURATOR + "_build_mha_kv_pool"
CELL_SIZE = _SIZING + "_compute_cell_size"
POOL_SIZES = _SIZING + "calculate_pool_sizes"
FUSED_STORE = "sglang.srt.models.utils.enable_fused_set_kv_buffer"
INIT_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
CAN_RUN_GRAPH = (
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph"
)
INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
BEAM_SEARCH = "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init"
ADD_REQUEST = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
ENQUEUE = "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue"
ORDER_QUEUE = "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority"
PROCESS_RESULT = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
RELEASE = "sglang.srt.mem_cache.common.release_kv_cache"
FLUSH = "sglang.srt.managers.scheduler.Scheduler.flush_cache"
CREATE_SAMPLER = "sglang.srt.layers.sampler.create_sampler"
HANDLE_BATCH = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request"
SEND_REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request"
VALIDATE_REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"

CANARY_WALK = "sglang.srt.kv_canary.radix_cache_walker.walk_radix_cache_for_canary"

# Parameters that each hook passes on or relies on, as SGLang 0.5.23 names them.
PARAMETERS = {
    BUILD_POOL: ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
    CELL_SIZE: ("self", "kvc", "num_layers"),
    POOL_SIZES: ("self", "available_bytes", "page_size"),
    FUSED_STORE: ("forward_batch",),
    INIT_FORWARD_BATCH: ("batch", "model_runner"),
    CAN_RUN_GRAPH: ("self", "forward_batch"),
    INTERNAL_STATE: ("self", "recv_req"),
    BEAM_SEARCH: ("self", "req", "recv_req"),
    ADD_REQUEST: ("self", "req", "has_chunked_req", "truncation_align_size"),
    ENQUEUE: ("self", "req", "is_retracted"),
    ORDER_QUEUE: ("self", "waiting_queue"),
    PROCESS_RESULT: ("self", "batch", "result"),
    RELEASE: ("req", "tree_cache", "checkpoint"),
    FLUSH: ("self", "empty_cache"),
    CREATE_SAMPLER: ("backend",),
    HANDLE_BATCH: ("self", "obj", "request", "request_states"),
    SEND_REQUEST: ("self", "tokenized_obj"),
    VALIDATE_REQUEST: ("self", "obj", "input_ids"),
    CANARY_WALK: ("radix_cache", "unlocked_only", "swa_resident_only"),
}

_moved: list[str] = []


def enabled() -> bool:
    """Whether this process serves with ``--kv-quant``."""
    from sglang.srt.runtime_context import get_memory

    return getattr(get_memory(), "kv_quant", None) is not None


def record_targets() -> None:
    """Compare every target with `PARAMETERS`; call before any hook is applied."""
    _moved.clear()
    for target, expected in PARAMETERS.items():
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            _moved.append(f"{target} is gone ({error})")
            continue
        if found[: len(expected)] != expected:
            _moved.append(f"{target} takes {found}, expected it to begin with {expected}")


def moved_targets() -> list[str]:
    """One line for each target that was missing or had other parameters at `record_targets`.

    Empty before that: a spawned process rebuilds its ServerArgs, which the launcher has checked,
    before it loads plug-ins.
    """
    return list(_moved)
