"""The ``--kv-quant`` flags: SGLang's ServerArgs with our fields, defaults and refusals.

One record serves the command line, ``--config`` files and ``sgl.Engine`` keyword arguments.
"""

from __future__ import annotations

import logging
from typing import Any, Optional

import sglang.srt.server_args as sglang_server_args
import torch
from sglang.srt.arg_groups.arg_utils import A, Arg

from patternkv_sgl.config import PatternKVConfig, parse_bits, parse_layer_bits
from patternkv_sgl.refusals import (
    refuse_canary_on_cpu,
    refuse_model,
    refuse_options,
    refuse_sglang,
)

logger = logging.getLogger(__name__)

BACKEND = "patternkv"
DEFAULT_MAX_RUNNING_REQUESTS = 256
DEFAULTS = PatternKVConfig()
SWITCH = {"on": True, "off": False}
# The tuning flags; --kv-quant itself is not one.
FLAG_DEFAULTS: dict[str, Any] = {
    "kv_quant_bits": str(DEFAULTS.k_bits),
    "kv_quant_patterns": DEFAULTS.patterns,
    "kv_quant_window": DEFAULTS.window,
    "kv_quant_sinks": DEFAULTS.sinks,
    "kv_quant_mine_tokens": DEFAULTS.mine_tokens,
    "kv_quant_rotate": None,
    "kv_quant_layer_bits": None,
    "kv_quant_tables": DEFAULTS.tables,
    "kv_quant_check": DEFAULTS.check,
}

# The module path of a parent class matters to hooks: SGLang's hook registry rewrites every module
# global that is the replaced class, so the original ServerArgs lives only in this closure.


def _range(name: str) -> str:
    low, high = PatternKVConfig.RANGES[name]
    return f"{low} to {high}"


def _build(base: Any) -> Any:
    class KVQuantServerArgs(base, dict=True):  # type: ignore[misc, call-arg]
        kv_quant: A[
            Optional[str],  # noqa: UP045 - SGLang's argument parser reads Optional
            Arg(
                help="KV cache quantization scheme. 'patternkv' stores K and V as the id of a "
                "pattern plus a low-bit residual; patterns are mined at prefill and shared "
                "through the radix tree.",
                choices=[BACKEND],
            ),
        ] = None
        kv_quant_bits: A[
            str,
            "Bits of the residuals with --kv-quant patternkv: 4, 2, or K:V such as 4:2.",
        ] = FLAG_DEFAULTS["kv_quant_bits"]
        kv_quant_patterns: A[
            int,
            f"Patterns per table, for K and V each ({_range('patterns')}). More patterns mean "
            "smaller residuals, larger tables and, beyond 64, slower kernels.",
        ] = FLAG_DEFAULTS["kv_quant_patterns"]
        kv_quant_window: A[
            int,
            "Latest tokens of each running request, generated or ending a short prompt, that "
            f"attention reads in the model dtype ({_range('window')}).",
        ] = FLAG_DEFAULTS["kv_quant_window"]
        kv_quant_sinks: A[
            int,
            "First tokens of a sequence that are stored exactly, as patterns of their own "
            f"({_range('sinks')}).",
        ] = FLAG_DEFAULTS["kv_quant_sinks"]
        kv_quant_mine_tokens: A[
            int,
            "A prefill of at least this many new tokens mines a pattern table of its own; a "
            f"shorter one uses the table of its prefix ({_range('mine_tokens')}).",
        ] = FLAG_DEFAULTS["kv_quant_mine_tokens"]
        kv_quant_rotate: A[
            Optional[str],  # noqa: UP045
            Arg(
                help="Whether K is stored rotated, which spreads outliers over all channels and "
                "takes a kernel per layer and step. Default: on with K at 2 bits, off at 4.",
                choices=list(SWITCH),
            ),
        ] = FLAG_DEFAULTS["kv_quant_rotate"]
        kv_quant_layer_bits: A[
            Optional[str],  # noqa: UP045
            "Layers with bits of their own: LAYER=K:V with commas between, where LAYER is a number "
            "or 'last'; or 'none'. Default with K at 2 bits: last=4:V.",
        ] = FLAG_DEFAULTS["kv_quant_layer_bits"]
        kv_quant_tables: A[
            Optional[int],  # noqa: UP045
            f"Table slots, the zero table included ({_range('tables')}). Default: 1 percent of "
            "what SGLang leaves for KV before --max-total-tokens caps it, between 16 and 1024.",
        ] = FLAG_DEFAULTS["kv_quant_tables"]
        kv_quant_check: A[
            bool,
            "Verify table ownership and per-slot table ids while serving (slow; for tests).",
        ] = FLAG_DEFAULTS["kv_quant_check"]

        def __post_init__(self) -> None:
            base.__post_init__(self)
            _prepare(self)

        def check_server_args(self) -> None:
            base.check_server_args(self)
            if self.kv_quant is not None:
                from sglang.srt.arg_groups.model_override_base import model_config_of

                model = model_config_of(self)
                refuse_model(model)
                config_of(self).exceptions(model.num_hidden_layers)
                _warn_of_no_sharing(self)
                _warn_of_no_mining(self)

    KVQuantServerArgs._NS_BY_FIELD = {
        **base._NS_BY_FIELD,
        **dict.fromkeys(KVQuantServerArgs.__annotations__, "memory"),
    }
    KVQuantServerArgs.__module__ = __name__
    KVQuantServerArgs.__qualname__ = "KVQuantServerArgs"
    return KVQuantServerArgs


def _prepare(args: Any) -> None:
    """Refuse what cannot work, then select our backend, tree and memory defaults."""
    if args.kv_quant is None:
        refuse_idle_flags(args)
        return
    if args.kv_quant != BACKEND:
        raise ValueError(
            f"--kv-quant {args.kv_quant!r}: expected {BACKEND!r}, or leave it unset for the "
            "model's own dtype"
        )
    refuse_sglang()
    config_of(args)
    refuse_options(args)
    args.attention_backend = args.radix_cache_backend = BACKEND
    if args.device == "cpu" or not torch.cuda.is_available():
        refuse_canary_on_cpu(args)
        # The torch operators read the batch's plan on the host, which a captured graph cannot.
        args.disable_cuda_graph = True
    if args.max_running_requests is None:
        # Every request slot reserves a bf16 window; stock's default of 2048 to 4096 slots would
        # spend gigabytes on windows that are never filled.
        args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS


def _warn_of_no_sharing(args: Any) -> None:
    """Log what an option costs that leaves branches nothing to share."""
    if args.disable_radix_cache:
        logger.warning(
            "--disable-radix-cache: every branch prefills the whole prompt and stores and reads a "
            "copy of its own. Drop the flag to share prompts between branches and requests."
        )


def _warn_of_no_mining(args: Any) -> None:
    """Log that chunks are too short for what ``--kv-quant-mine-tokens`` asks of a prefill."""
    chunk, needed = args.chunked_prefill_size, args.kv_quant_mine_tokens
    if chunk is not None and 0 < chunk < needed:
        logger.warning(
            "--chunked-prefill-size %d is below --kv-quant-mine-tokens %d: no chunk is long enough "
            "to mine a table, so all prompts are stored with that of the first one. Raise the "
            "first to at least %d, or lower the second.",
            *(chunk, needed, needed),
        )


def refuse_idle_flags(args: Any) -> None:
    """Refuse tuning flags that would silently do nothing.

    Raises:
        ValueError: names the flag that was set without ``--kv-quant``.
    """
    for name, default in FLAG_DEFAULTS.items():
        value = getattr(args, name)
        if value != default:
            raise ValueError(
                f"--{name.replace('_', '-')} {value!r} has no effect without --kv-quant: add "
                f"--kv-quant {BACKEND}, or drop it"
            )


def config_of(args: Any) -> PatternKVConfig:
    """The options carried by a ServerArgs record or by SGLang's published memory settings.

    Raises:
        ValueError: a malformed or out-of-range flag.
    """
    k_bits, v_bits = parse_bits(args.kv_quant_bits)
    rotate = args.kv_quant_rotate
    if rotate is not None and rotate not in SWITCH:
        raise ValueError(f"--kv-quant-rotate {rotate!r}: expected on or off")
    layer_bits = args.kv_quant_layer_bits
    return PatternKVConfig(
        k_bits,
        v_bits,
        patterns=args.kv_quant_patterns,
        window=args.kv_quant_window,
        sinks=args.kv_quant_sinks,
        mine_tokens=args.kv_quant_mine_tokens,
        rotate=None if rotate is None else SWITCH[rotate],
        layer_bits=None if layer_bits is None else parse_layer_bits(layer_bits),
        tables=args.kv_quant_tables,
        check=args.kv_quant_check,
    )


KVQuantServerArgs = _build(sglang_server_args.ServerArgs)
