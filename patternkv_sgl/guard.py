"""How well the first mined prefill's K is stored, for a warning where a head needs more bits."""

from __future__ import annotations

import logging

import torch

from patternkv_kernels import dequantize
from patternkv_sgl.pool import PatternKVPool
from patternkv_sgl.stats import Stats

logger = logging.getLogger(__name__)

LIMIT = 0.25
"""Of :func:`logit_error` in the worst head. Caches that keep the demo model's answers stay below
0.24 there, those that lose them are above 0.28 (docs/quality.md)."""
_QUERIES, _KEYS = 64, 512
"""Most that a layer is measured with, evenly spaced."""


def logit_error(q: torch.Tensor, k: torch.Tensor, stored_k: torch.Tensor) -> torch.Tensor:
    """Error of the products of queries and keys over their spread, root mean square, ``[h_kv]``.

    ``q [n, h_q, d]``; ``k`` and ``stored_k`` ``[m, h_kv, d]``. What all keys of a query have in
    common counts neither as spread nor as error, as in a softmax. Not finite if the input is not.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    spread, error = (
        torch.einsum("nhgd,mhd->hngm", grouped, x.float()) for x in (k, stored_k.float() - k)
    )
    squares = [x.var(-1, correction=0).mean((1, 2)) for x in (error, spread)]
    return (squares[0] / squares[1].clamp_min(1e-30)).sqrt()


class LogitGuard:
    """Measures each layer once and warns once, without making the host wait for the device.

    Args:
        pool: whose stored K is measured.
        stats: gets the worst head's error.
    """

    def __init__(self, pool: PatternKVPool, stats: Stats) -> None:
        self._pool, self._stats = pool, stats
        geometry = pool.geometry
        self._errors = torch.zeros(geometry.num_layers, geometry.h_kv, device=pool.device)
        self._left = set(range(geometry.num_layers))
        self._copy: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def wants(self, index: int) -> bool:
        """Whether the layer at ``index`` is not measured yet."""
        return index in self._left

    def measure(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        slots: torch.Tensor,
        table_ids: torch.Tensor,
    ) -> None:
        """Take ``n`` tokens of the layer at ``index``, just stored in ``slots`` with ``table_ids``;
        ``q [n, h_q, d]`` and ``k [n, h_kv, d]`` in the basis of stored K."""
        pool, few = self._pool, slice(None, None, -(-len(k) // _KEYS))
        stored_k, _ = dequantize(
            pool.slot_formats[index],
            pool.packed[index],
            slots[few].long(),
            pool.tables[index],
            table_ids[few],
            dtype=k.dtype,
        )
        q = q[:: -(-len(q) // _QUERIES)]
        self._errors[index] = logit_error(q, k[few], stored_k)
        self._left.discard(index)
        if not self._left:
            self._copy = self._errors.to("cpu", non_blocking=True)
            if q.is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()

    def poll(self) -> None:
        """Warn if all layers are measured, the numbers have arrived, and one is too large."""
        if self._copy is None or (self._copied is not None and not self._copied.query()):
            return
        errors, self._copy = self._copy.nan_to_num(posinf=0.0), None
        layer, head = divmod(int(errors.argmax()), errors.shape[1])
        worst = float(errors[layer, head])
        self._stats.logit_error_percent = round(100 * worst)
        if worst > LIMIT:
            logger.warning(
                "PatternKV: %s-bit K moves attention's logits in layer %d, KV head %d by %.2f of "
                "their spread (limit %.2f; %d of %d heads exceed it), so answers may suffer: %s",
                self._pool.slot_formats[layer].k_bits,
                self._pool.start_layer + layer,
                head,
                worst,
                LIMIT,
                int((errors > LIMIT).sum()),
                errors.numel(),
                self._remedy(torch.nonzero((errors > LIMIT).any(1))[:, 0].tolist()),
            )

    def _remedy(self, layers: list[int]) -> str:
        """What helps ``layers``."""
        config, formats = self._pool.geometry.config, self._pool.slot_formats
        low = [layer for layer in layers if formats[layer].k_bits == 2]
        exceptions = config.exceptions(len(formats)) | {
            layer: (4, formats[layer].v_bits) for layer in low
        }
        remedies = []
        if low:
            chosen = (f"{layer}={k}:{v}" for layer, (k, v) in sorted(exceptions.items()))
            remedies.append("--kv-quant-layer-bits " + ",".join(chosen))
        if not all(config.rotates(formats[layer].k_bits) for layer in layers):
            remedies.append("--kv-quant-rotate on")
        return "use " + " or ".join(remedies or ["more --kv-quant-patterns, or no --kv-quant"])
