"""Where samples come from: an embedded SGLang engine, or a server that runs elsewhere."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from .cache import CacheInfo
from .config import RunConfig, TaskConfig
from .endpoint import Endpoint
from .generation import Generation
from .variant import Variant

T = TypeVar("T")

NOTHING: Mapping[str, Any] = {}


class Client(Protocol):
    """What the runner needs. Coroutines of one client run under its own ``run``."""

    async def generate(
        self,
        prompt: str,
        sampling_params: dict[str, Any],
        n: int,
        request: Mapping[str, Any] = NOTHING,
    ) -> list[Generation]:
        """``n`` branches of one prompt, which is prefilled once; ``request`` has more fields of
        SGLang's request."""

    def info(self) -> dict[str, Any]:
        """SGLang's ``server_info``; not callable from within ``run``."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` to its end."""

    def close(self) -> None:
        """Release what the client holds. An embedded engine ends."""


@contextmanager
def start_environment(config: TaskConfig) -> Iterator[None]:
    """The environment in which an engine is started; its processes inherit the variables."""
    # What SGLang's optional kernels have to say about missing hardware, once per process.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    if config.cpu_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.cpu_threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class EngineClient:
    """An ``sglang.Engine`` of its own, whose start takes most of a minute on a small CPU.

    Raises:
        RuntimeError: the engine came up without the KV cache that ``variant`` asks for.
    """

    def __init__(self, config: RunConfig, variant: Variant, seed: int) -> None:
        with start_environment(config):
            import sglang
            from sglang.srt.utils import kill_process_tree

            try:
                self._engine = sglang.Engine(**engine_args(config, variant, seed))
            except BaseException:
                # A scheduler that dies at start leaves its siblings, and exit would wait for them.
                kill_process_tree(os.getpid(), include_parent=False)
                raise
        try:
            check_variant(variant, self.info())
            self._warm_up(config)
        except BaseException:
            self.close()
            raise

    def _warm_up(self, config: RunConfig) -> None:
        """Compile and allocate before the clock runs, and leave an empty cache."""
        warm = config.sampling_params | {"max_new_tokens": 4, "ignore_eos": True}
        self.run(self.generate("warm up", warm, config.n))
        self._engine.flush_cache()

    async def generate(
        self,
        prompt: str,
        sampling_params: dict[str, Any],
        n: int,
        request: Mapping[str, Any] = NOTHING,
    ) -> list[Generation]:
        answer = await self._engine.async_generate(
            prompt=prompt, sampling_params=sampling_params | {"n": n}, **request
        )
        return [Generation.parse(item) for item in (answer if n > 1 else [answer])]

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._engine.get_server_info()
        return info

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        # The engine's sockets are bound to the loop it was made with.
        result: T = self._engine.loop.run_until_complete(work)
        return result

    def close(self) -> None:
        self._engine.shutdown()


class ServerClient:
    """A running SGLang server. Requests wait in threads, as many as are in flight.

    Raises:
        RuntimeError: the server cannot be reached, or answers with an error.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.base_url is None:
            raise ValueError("base_url is missing")
        self._server = Endpoint(config.base_url, config.timeout)
        self._threads = ThreadPoolExecutor(config.concurrency + 1)

    async def generate(
        self,
        prompt: str,
        sampling_params: dict[str, Any],
        n: int,
        request: Mapping[str, Any] = NOTHING,
    ) -> list[Generation]:
        body = {"text": prompt, "sampling_params": sampling_params | {"n": n}, **request}
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._threads, self._server.ask, "generate", body)
        return [Generation.parse(item) for item in (answer if n > 1 else [answer])]

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._server.ask("server_info")
        return info

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def engine_args(config: TaskConfig, variant: Variant, seed: int) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``; the configuration's own have the last word."""
    import torch

    args: dict[str, Any] = {
        "model_path": config.model,
        "dtype": "bfloat16",
        "random_seed": seed,
        "log_level": "error",
    }
    if config.mem_fraction_static is not None:
        args["mem_fraction_static"] = config.mem_fraction_static
    if not torch.cuda.is_available():
        args["device"] = "cpu"
        if variant.bits is None:
            # Without a name SGLang takes a backend that needs Intel's AMX.
            args["attention_backend"] = "torch_native"
    args |= variant.engine_args
    return args | {
        name: value
        for name, value in config.engine_args.items()
        if variant.bits is not None or not name.startswith("kv_quant_")
    }


def check_variant(variant: Variant, info: dict[str, Any]) -> None:
    """Make sure that an engine stores KV as ``variant`` says: SGLang runs on without a plug-in
    that it could not load.

    Raises:
        RuntimeError: it does not; says what it stores instead.
    """
    found = CacheInfo.parse(info).variant
    if found != variant.name:
        raise RuntimeError(
            f"variant {variant.name}: the engine stores KV as {found}, not as {variant.name}; "
            "is patternkv_sgl installed in this environment?"
        )


def check_sampling(info: dict[str, Any], n: int) -> None:
    """Make sure that branches of one prompt differ.

    Raises:
        RuntimeError: they would not.
    """
    if n > 1 and info.get("enable_deterministic_inference"):
        raise RuntimeError(
            f"n {n}: a server with --enable-deterministic-inference gives all branches of a prompt "
            "the same random numbers; start it without that flag"
        )
