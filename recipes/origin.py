"""What the samples of one variant were drawn with; guards them against being mixed with others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from .environment import git_commit, hardware, versions
from .model import fingerprint, local_model

# SGLang's own arguments that a sample depends on, besides all of --kv-quant.
SERVER_KEYS = (
    "version", "model_path", "revision", "weight_version", "dtype", "quantization",
    "kv_cache_dtype", "attention_backend", "sampling_backend", "device", "tp_size", "page_size",
    "chunked_prefill_size", "context_length", "json_model_override_args", "chat_template",
    "lora_paths", "disable_radix_cache",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Written ahead of a variant's first sample.

    Attributes:
        server: arguments of the engine that samples depend on; model_fingerprint: of the model's
            files, None if they are elsewhere. A later session must have the same.
        versions, hardware, git_commit: of the first session.
    """

    server: dict[str, Any]
    model_fingerprint: str | None
    versions: dict[str, str | None]
    hardware: dict[str, str | int | None]
    git_commit: str | None

    @classmethod
    def of(cls, info: dict[str, Any]) -> Origin:
        """The origin of what an engine with this ``server_info`` draws now."""
        server = {
            name: info[name]
            for name in sorted(info)
            if name in SERVER_KEYS or name.startswith("kv_quant")
        }
        folder = local_model(info["model_path"])
        model = fingerprint(folder) if folder else None
        return cls(server, model, versions(), hardware(), git_commit())

    @classmethod
    def read(cls, path: Path) -> Origin:
        return cls(**orjson.loads(path.read_bytes()))

    def write(self, path: Path) -> None:
        path.write_bytes(
            orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        )

    def check(self, path: Path) -> None:
        """Make sure that the origin in ``path`` is the same as this one.

        Raises:
            ValueError: it differs in something that samples depend on, or is not there.
        """
        if not path.exists():
            raise ValueError(
                f"{path} is missing: what the samples beside it were drawn with is not known; "
                "name another --output"
            )
        first = Origin.read(path)
        before = first.server | {"model_fingerprint": first.model_fingerprint}
        now = self.server | {"model_fingerprint": self.model_fingerprint}
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before | now)
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{path}: the samples there were drawn with another engine ({'; '.join(changed)}); "
                "name another --output, or an engine like the first"
            )
