"""Tokens per second of SGLang with --kv-quant patternkv against stock SGLang on one GPU.

    python -m benchmarks.bench_serving                 # writes benchmarks/results/serving.jsonl
    python -m benchmarks.bench_serving --check         # compares that file with the targets
    python -m benchmarks.bench_serving --plot FILE     # draws it
    python -m benchmarks.bench_serving --markdown      # prints it as tables

Each engine is a process of its own and gets the same random prompts. By default the model is the
shape of Llama-3.1-8B with random weights: speed does not depend on them. A cell's prompts are in
the radix cache before its time is taken; TTFT is that of one fresh prompt. ``--suite smoke --kv 4/4
--model recipes/demo/model --engine-args '{"max_total_tokens": 5000}'`` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, read_rows
from benchmarks.serving_cases import Cell, cells
from benchmarks.serving_results import HEADER, headline, line, markdown, misses, plot
from benchmarks.serving_worker import READY
from patternkv_sgl.config import PatternKVConfig
from recipes.environment import git_commit, hardware, versions

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
KINDS = ("bf16", "fp8", "4/4", "4/2", "2/2")
MAX_REQUESTS = 256
"""That run at once under ``--kv-gib``, with any cache; the default of ours."""
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the targets that --out misses")
    parser.add_argument("--markdown", action="store_true", help="print --out as tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows of --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--suite", choices=("design", "best_of_n", "others", "all", "smoke"), default="all"
    )
    parser.add_argument("--prompts", help="only these prompt lengths, such as 2048,16384")
    parser.add_argument("--branches", help="only these numbers of branches, such as 1,32")
    parser.add_argument("--workloads", help="only these workloads, such as tree,saturation")
    parser.add_argument(
        "--kv",
        default=",".join(KINDS),
        help=f"which of {', '.join(KINDS)}; bf16 and fp8 are stock SGLang's (default: %(default)s)",
    )
    parser.add_argument("--model", help="model folder; default: Llama-3.1-8B's shape, on a GPU")
    parser.add_argument(
        "--stock-backend", default="flashinfer", help="stock's --attention-backend (%(default)s)"
    )
    parser.add_argument(
        "--mem-fraction", type=float, default=0.8, help="--mem-fraction-static (%(default)s)"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all engines at once, then measure one after the other while the rest idle; "
        "--mem-fraction is then that of the memory the ones before left free",
    )
    parser.add_argument(
        "--kv-gib",
        type=float,
        help="limit the KV cache of every engine to this much, tables and windows of ours included",
    )
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON with more arguments of Engine"
    )
    args = parser.parse_args(argv)
    args.kv = args.kv.split(",")
    for name in ("prompts", "branches"):
        if chosen := getattr(args, name):
            setattr(args, name, {int(number) for number in chosen.split(",")})
    if args.workloads:
        args.workloads = set(args.workloads.split(","))
    if unknown := set(args.kv) - set(KINDS):
        parser.error(f"--kv {','.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    return args


def engine_args(args: argparse.Namespace, kv: str, model: str) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine`` for one kind of KV cache.

    Args:
        model: folder of the model.
    """
    found: dict[str, Any] = {
        "model_path": model,
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "mem_fraction_static": args.mem_fraction,
        "random_seed": 0,
        "log_level": "warning",
    }
    if args.model is None:
        found["load_format"] = "dummy"
    if kv in ("bf16", "fp8"):
        found["attention_backend"] = args.stock_backend
    if kv == "fp8":
        found["kv_cache_dtype"] = "fp8_e4m3"
    elif kv != "bf16":
        found |= {"kv_quant": "patternkv", "kv_quant_bits": kv.replace("/", ":")}
    if args.kv_gib is not None:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        most = args.engine_args.get("max_running_requests", MAX_REQUESTS)
        found |= {"max_running_requests": most, **limited(kv, args.kv_gib, config, most)}
    return found | args.engine_args


def limited(kv: str, kv_gib: float, config: dict[str, Any], max_requests: int) -> dict[str, Any]:
    """Arguments that hold a KV cache to ``kv_gib``.

    Args:
        kv: see `KINDS`.
        config: the model's ``config.json``.
        max_requests: most that run; each has a window with ours.
    """
    import torch

    # SGLang takes seconds to import.
    from patternkv_sgl.pool import PoolGeometry

    dense = kv in ("bf16", "fp8")
    k_bits, v_bits = (4, 4) if dense else map(int, kv.split("/"))
    options = PatternKVConfig(k_bits, v_bits)
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    geometry = PoolGeometry(options, layers, heads, config["head_dim"], torch.bfloat16)
    kv_bytes = int(kv_gib * 2**30)
    if dense:
        per_token = geometry.dense_bytes_per_token // (2 if kv == "fp8" else 1)
        return {"max_total_tokens": kv_bytes // per_token}
    left = kv_bytes - geometry.reserved_bytes(kv_bytes, max_requests + 1)
    return {
        "max_total_tokens": left // geometry.bytes_per_token,
        "kv_quant_tables": geometry.num_tables(kv_bytes),
    }


class EngineProcess:
    """A worker; see :mod:`benchmarks.serving_worker`.

    Raises:
        RuntimeError: the worker ended; its log says why.
    """

    def __init__(self, kv: str, options: dict[str, Any], log: Path) -> None:
        self.kv, self._log = kv, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving_worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w", encoding="utf-8"),
            text=True,
            bufsize=1,
        )

    def ready(self) -> int:
        """Wait for the engine; tokens that its KV cache holds."""
        return int(self._answer()[READY])

    def measure(self, cell: Cell) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(vars(cell)) + "\n")
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"the engine with {self.kv} ended: …{tail}")
        row: Row = json.loads(text)
        return row

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def is_chosen(cell: Cell, args: argparse.Namespace) -> bool:
    filters = (
        (args.prompts, cell.prompt),
        (args.branches, cell.branches),
        (args.workloads, cell.workload),
    )
    return all(not chosen or value in chosen for chosen, value in filters)


def measure_all(args: argparse.Namespace) -> int:
    """Measure, print and write row by row, so that an interrupted run leaves what it has."""
    chosen = [cell for cell in cells(args.suite) if is_chosen(cell, args)]
    made_with = {"gpu": hardware()["gpu"], "versions": versions(), "commit": git_commit()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        model = args.model or str(folder)
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))

        def start(kv: str) -> EngineProcess:
            options = {
                "engine_args": engine_args(args, kv, model),
                "vocab_size": config["vocab_size"],
            }
            return EngineProcess(kv, options, folder / f"{kv.replace('/', '')}.log")

        print(HEADER, flush=True)
        with args.out.open("w", encoding="utf-8") as file:
            engines = (start(kv) for kv in args.kv)
            failed = False
            for engine in list(engines) if args.together else engines:
                try:
                    engine_row = {
                        "engine": "stock" if engine.kv in ("bf16", "fp8") else "patternkv",
                        "kv": engine.kv,
                        "kv_tokens": engine.ready(),
                        "mem_fraction": args.mem_fraction,
                        "kv_gib": args.kv_gib,
                    }
                    for cell in chosen:
                        row = engine_row | engine.measure(cell) | made_with
                        print(json.dumps(row), file=file, flush=True)
                        print(line(row), flush=True)
                except RuntimeError as error:
                    failed = True
                    print(error, flush=True)
                finally:
                    engine.close()
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.plot:
        plot(read_rows(args.out), args.plot)
    elif args.markdown:
        rows = read_rows(args.out)
        print(f"{headline(rows)}\n\n{markdown(rows)}")
    elif args.check:
        missed = misses(read_rows(args.out))
        print("\n".join(missed) or "every target is reached")
        return 1 if missed else 0
    elif args.model is None and hardware()["gpu"] is None:
        sys.exit(
            "error: no GPU here, which the default model, Llama-3.1-8B's shape, needs: run this on "
            "a machine with one, or name a small model for the CPU, as in --model "
            "recipes/demo/model --suite smoke --kv 4/4"
        )
    else:
        return measure_all(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
