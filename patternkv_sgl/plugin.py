"""The only file that touches SGLang's registries and hooks.

`load` is the entry point ``sglang.srt.plugins``; SGLang calls it once in every process. Without
``--kv-quant`` every hook returns what the original returns. SGLang only logs a plug-in that fails
to load or a hook that fails to apply, so the backend factory raises unless pool and hooks are ours,
and the first batch unless the tree is: a wrong set-up ends in an error, never in a dense cache.

| target | why | what breaks without it |
|---|---|---|
| ``ServerArgs``, ``Engine.server_args_class`` | the ``--kv-quant`` flags | unknown argument |
| attention backend registry | forward passes over the packed cache | unknown backend |
| radix cache registry | nodes that own tables | unknown tree |
| `hooks.BUILD_POOL` | our pool class and its extra arguments | dense pool, refused |
| `hooks.CELL_SIZE`, `hooks.POOL_SIZES` | capacity from packed bytes, room for tables | refused |
| `hooks.FUSED_STORE` | fused RoPE kernels must not write K and V into the pool | dense writes |
| `hooks.INIT_FORWARD_BATCH` | the batch's requests: tables, shared segments | refused |
| `hooks.CAN_RUN_GRAPH` | batches larger than decode graphs were captured for | reads past memory |
| `hooks.INTERNAL_STATE` | numbers under ``/server_info`` | no numbers |
| `hooks.BEAM_SEARCH` | beams are rows without requests | refused per request |
| `hooks.ADD_REQUEST` | branches wait for what prefills their prompt | each prefills it |
| `hooks.ENQUEUE` | a stored prompt needs no prefill ahead of its branches | a forward each |
| `hooks.ORDER_QUEUE` | branches keep their request's place | they queue behind prompts |
| `hooks.PROCESS_RESULT`, `hooks.RELEASE` | answers leave ahead of releases | they wait for all |
| `hooks.FLUSH` | gauges of the empty cache | they show the flushed one |
| `hooks.CREATE_SAMPLER` | tokens drawn in one pass over the logits | seven of SGLang's |
| `hooks.CANARY_WALK` | canary sweeps know SGLang's own tree only | refused in a sweep |
| `hooks.HANDLE_BATCH`, `hooks.SEND_REQUEST` | branches reach the scheduler together | one by one |
| `hooks.VALIDATE_REQUEST` | requests that end a scheduler | refused per request |
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from patternkv_sgl import hooks, tokenizer_manager

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from patternkv_sgl.cache import PatternCache
    from patternkv_sgl.sizing import Sizing

logger = logging.getLogger(__name__)

# A scheduler process has one pool and one tree: sizing leaves its decisions here for the pool
# that is built from them, and the tree's factory leaves the cache for the hooks.
_sizing: Sizing | None = None
_num_tables = 0
_cache: PatternCache | None = None


def load() -> None:
    """Register flags, backend, tree and hooks with SGLang."""
    import sglang.srt.server_args as server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from patternkv_sgl.server_args import BACKEND, KVQuantServerArgs

    hooks.record_targets()
    HookRegistry.register("sglang.srt.server_args.ServerArgs", KVQuantServerArgs, HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.entrypoints.engine.Engine.server_args_class",
        KVQuantServerArgs,
        HookType.REPLACE,
    )
    server_args.add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(_build_backend)
    register_radix_cache_backend(BACKEND, _build_tree)
    HookRegistry.register(hooks.BUILD_POOL, _build_pool, HookType.AROUND)
    HookRegistry.register(hooks.CELL_SIZE, _cell_size, HookType.AROUND)
    HookRegistry.register(hooks.POOL_SIZES, _reserve, HookType.BEFORE)
    HookRegistry.register(hooks.FUSED_STORE, _no_fused_store, HookType.AROUND)
    HookRegistry.register(hooks.INIT_FORWARD_BATCH, _init_forward_batch, HookType.AROUND)
    HookRegistry.register(hooks.CAN_RUN_GRAPH, _can_run_graph, HookType.AROUND)
    HookRegistry.register(hooks.INTERNAL_STATE, _internal_state, HookType.AFTER)
    HookRegistry.register(hooks.BEAM_SEARCH, _no_beam_search, HookType.AROUND)
    HookRegistry.register(hooks.ADD_REQUEST, _add_request, HookType.AROUND)
    HookRegistry.register(hooks.ENQUEUE, _enqueue, HookType.AROUND)
    HookRegistry.register(hooks.ORDER_QUEUE, _order_queue, HookType.BEFORE)
    HookRegistry.register(hooks.PROCESS_RESULT, _process_result, HookType.AROUND)
    HookRegistry.register(hooks.RELEASE, _release, HookType.AROUND)
    HookRegistry.register(hooks.FLUSH, _flush, HookType.AFTER)
    HookRegistry.register(hooks.CREATE_SAMPLER, _create_sampler, HookType.AROUND)
    HookRegistry.register(hooks.CANARY_WALK, _canary_walk, HookType.AROUND)
    HookRegistry.register(hooks.HANDLE_BATCH, tokenizer_manager.handle_batch, HookType.AROUND)
    HookRegistry.register(hooks.SEND_REQUEST, tokenizer_manager.send_request, HookType.AROUND)
    HookRegistry.register(
        hooks.VALIDATE_REQUEST, tokenizer_manager.validate_request, HookType.BEFORE
    )


def _cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    global _sizing
    if not hooks.enabled():
        return original(self, kvc, num_layers)
    from patternkv_sgl.sizing import Sizing

    _sizing = Sizing.of_model(kvc, num_layers)
    return _sizing.geometry.bytes_per_token


def _reserve(
    self: Any, available_bytes: int, page_size: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    global _num_tables
    if _sizing is None:
        return None
    _num_tables = _sizing.geometry.num_tables(available_bytes)
    return (self, available_bytes - _sizing.reserved_bytes(available_bytes), page_size), {}


def _build_pool(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    if _sizing is None:
        return original(self, **kwargs)
    from sglang.srt.kv_canary.pool_patcher.api import register_pool_attacher

    from patternkv_sgl import canary
    from patternkv_sgl.pool import PatternKVPool, explained_memory

    register_pool_attacher(PatternKVPool, canary.attach)
    kwargs["mha_pool_class"] = partial(
        PatternKVPool,
        geometry=_sizing.geometry,
        num_tables=_num_tables,
        # One row per running request and SGLang's padding row 0.
        num_windows=self.resolve_max_num_reqs(kwargs["max_total_num_tokens"]) + 1,
    )
    with explained_memory("the cache", "--mem-fraction-static", "--max-total-tokens"):
        pool = original(self, **kwargs)
    logger.info(pool.describe())
    return pool


def _build_tree(ctx: TreeCacheBuildContext) -> Any:
    global _cache
    from patternkv_sgl.cache import PatternCache

    _cache = PatternCache(ctx.params)
    return _cache.tree


def _build_backend(runner: Any) -> AttentionBackend:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from patternkv_sgl.backend import PatternKVBackend
    from patternkv_sgl.basis import model_bases
    from patternkv_sgl.cache import CURRENT, STATS
    from patternkv_sgl.pool import PatternKVPool, explained_memory
    from patternkv_sgl.refusals import refuse_layers
    from patternkv_sgl.sampler import BranchSampler
    from patternkv_sgl.scratch import Scratch

    # What SGLang only logs must not end in a dense cache.
    if missing := set(hooks.PARAMETERS) - HookRegistry._patched:
        raise RuntimeError(
            f"hooks of --kv-quant patternkv are not in force: {sorted(missing)}; the log above has "
            "the reason, such as another release of SGLang"
        )
    pool = runner.token_to_kv_pool
    if not isinstance(pool, PatternKVPool):
        raise RuntimeError(
            f"the KV pool is a {type(pool).__name__}, not that of --kv-quant patternkv: another "
            "plug-in has replaced it; leave one of the two out"
        )
    refuse_layers(runner.model)
    if isinstance(runner.sampler, BranchSampler):
        runner.sampler.warm_up(runner.model_config.vocab_size, runner.device)
    assert _sizing is not None
    req_to_token = runner.req_to_token_pool.req_to_token
    flags = ("--mem-fraction-static", "--max-running-requests", "--context-length")
    with explained_memory("kernel scratch", *flags):
        scratch = Scratch(_sizing.scratch, req_to_token.device)
        config, formats = pool.geometry.config, pool.slot_formats
        rotated = {layer for layer, fmt in enumerate(formats) if config.rotates(fmt.k_bits)}
        bases = model_bases(runner.model, rotated, pool.dtype, req_to_token.device)
        return PatternKVBackend(pool, req_to_token, CURRENT, STATS, scratch, bases)


def _no_fused_store(original: Callable[..., bool], forward_batch: Any) -> bool:
    return False if hooks.enabled() else original(forward_batch)


def _init_forward_batch(
    original: Callable[..., Any], cls: type, batch: Any, model_runner: Any, **kwargs: Any
) -> Any:
    forward_batch = original(cls, batch, model_runner, **kwargs)
    if _cache is not None:
        # A prefill of one token each may become a decode step here.
        _cache.begin(batch, forward_batch)
    elif hooks.enabled():
        raise RuntimeError(
            "--kv-quant patternkv has no radix tree of its own here, and nodes of another one own "
            "no tables: start SGLang by launch_server, serve or Engine, and leave out what "
            "replaces its tree"
        )
    return forward_batch


def _can_run_graph(original: Callable[..., bool], self: Any, forward_batch: Any) -> bool:
    if not original(self, forward_batch):
        return False
    return not hooks.enabled() or bool(self.attn_backend.can_replay())


def _internal_state(result: Any, self: Any, recv_req: Any) -> Any:
    if _cache is not None:
        result.internal_state["patternkv"] = _cache.snapshot()
    return result


def _add_request(original: Callable[..., Any], self: Any, req: Any, **kwargs: Any) -> Any:
    if _cache is None or not _cache.admission.holds(self, req):
        return original(self, req, **kwargs)
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.CONTINUE


def _enqueue(
    original: Callable[..., None], self: Any, req: Any, is_retracted: bool = False
) -> None:
    # Behind others it keeps its branches' place in the queue.
    if _cache is None or self.waiting_queue or not _cache.admission.is_done(req):
        original(self, req, is_retracted)
        return
    from patternkv_sgl.admission import finish_prefetch

    finish_prefetch(req)
    self.output_streamer.stream_output([req], req.return_logprob)


def _order_queue(self: Any, waiting_queue: list[Any], *args: Any, **kwargs: Any) -> None:
    if _cache is None or _cache.tree.disable:
        return
    from sglang.srt.runtime_context import get_parallel

    from patternkv_sgl.admission import branches_first

    # Other policies and priorities are what somebody asked for. Replicas get branches whose
    # requests have waited elsewhere.
    in_order = self.policy.value == "fcfs" and not self.enable_priority_scheduling
    if in_order and get_parallel().num_dp_ranks == 1:
        branches_first(waiting_queue)


def _process_result(original: Callable[..., None], self: Any, batch: Any, result: Any) -> None:
    if _cache is None:
        original(self, batch, result)
        return
    with _cache.releases.processing():
        original(self, batch, result)


def _release(original: Callable[..., None], req: Any, tree_cache: Any, *, checkpoint: bool) -> None:
    release = partial(original, req, tree_cache, checkpoint=checkpoint)
    if _cache is None:
        release()
    else:
        _cache.releases.put(release)


def _flush(flushed: bool, self: Any, *args: Any, **kwargs: Any) -> bool:
    if _cache is not None:
        _cache.update_gauges()
    return flushed


def _create_sampler(original: Callable[..., Any], backend: str | None = None) -> Any:
    from sglang.srt.runtime_context import get_exec

    # Other backends are what somebody asked for, or of another platform.
    if not hooks.enabled() or (backend or get_exec().kernel.sampling_backend) != "flashinfer":
        return original(backend)
    from patternkv_sgl.sampler import BranchSampler

    return BranchSampler()


def _canary_walk(original: Callable[..., Any], *, radix_cache: Any, **kwargs: Any) -> Any:
    if _cache is None or radix_cache is not _cache.tree:
        return original(radix_cache=radix_cache, **kwargs)
    from patternkv_sgl import canary

    return canary.walk(radix_cache, unlocked_only=kwargs.get("unlocked_only", False))


def _no_beam_search(original: Callable[..., Any], self: Any, req: Any, recv_req: Any) -> Any:
    if hooks.enabled():
        return (
            f"Beam search (beam_width={recv_req.sampling_params.beam_width}) is not supported with "
            "--kv-quant patternkv; use n parallel samples instead."
        )
    return original(self, req, recv_req)
