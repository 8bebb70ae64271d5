"""The files of a model, if they are on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

EDGE_BYTES = 1 << 20


def local_model(model: str) -> Path | None:
    """The folder ``model``, or where Hugging Face's cache keeps the model of that name; None if
    neither is on this machine (a server elsewhere)."""
    if Path(model).is_dir():
        return Path(model)
    try:
        path = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def fingerprint(folder: Path) -> str:
    """Digest of a model folder: each file's name and size, and its first and last MiB, so that
    retrained weights differ and large ones need not be read whole."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
