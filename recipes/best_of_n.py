"""Best-of-n over several KV caches: the same problems and sampling for each, one table.

    python -m recipes.best_of_n --config recipes/demo/best_of_n.yaml --num-problems 16
    python -m recipes.best_of_n --config … --base-url http://127.0.0.1:30000

Draws n samples per problem once, with every cache variant in turn on an engine of its own (or with
the one a running server has), and derives pass@k and maj@k for k = 1, 2, 4 … n from them. A run
that was cut off goes on where it stopped when the same command is given again. README.md lists
keys and output files.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml

from .cache import CacheInfo
from .config import RunConfig, parse_args
from .engines import EngineClient, ServerClient, check_sampling
from .environment import git_commit, hardware, versions
from .folder import model_fingerprint, run_folder
from .problems import ProblemSet, load_problems
from .report import plot, table, variant_metrics, with_same_memory
from .runner import Run
from .variant import Variant


def main(argv: Sequence[str] | None = None) -> int:
    """Run what ``argv`` (default: the command line) describes; gives the exit status."""
    config = parse_args(argv)
    try:
        problems = load_problems(config)
        folder, runs = run(config, problems)
        report(folder, runs)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: RunConfig, problems: ProblemSet) -> tuple[Path, dict[str, Run]]:
    """Draw what is missing of every variant; gives the run's folder and its runs by variant."""
    if config.base_url is not None:
        return run_server(config, problems)
    folder = make_folder(config, problems)
    runs = {}
    for name in config.variants:
        variant = Variant.parse(name)
        runs[name] = Run(folder, variant.slug, config, problems)
        if runs[name].finished:
            print(f"==> {name}: complete in {folder}", flush=True)
            continue
        print(f"==> {name}: starting an engine", flush=True)
        seed = runs[name].next_seed
        client = EngineClient(config, variant, seed)
        try:
            runs[name].draw(client, name, seed)
        finally:
            client.close()
    return folder, runs


def run_server(config: RunConfig, problems: ProblemSet) -> tuple[Path, dict[str, Run]]:
    """Draw what is missing of the one variant that a running server has."""
    client = ServerClient(config)
    try:
        info = client.info()
        check_sampling(info, config.n)
        config = dataclasses.replace(config, model=info["model_path"])
        folder = make_folder(config, problems)
        name = CacheInfo.parse(info).variant
        print(f"==> {name}: {info['model_path']} at {config.base_url}", flush=True)
        drawn = Run(folder, Variant(name).slug, config, problems)
        if not drawn.finished:
            drawn.draw(client, name, info["random_seed"])
    finally:
        client.close()
    return folder, {name: drawn}


def make_folder(config: RunConfig, problems: ProblemSet) -> Path:
    """The run's folder, with its configuration in it."""
    folder = run_folder(config, problems)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config.as_dict(), sort_keys=False), encoding="utf-8"
    )
    return folder


def report(folder: Path, runs: dict[str, Run]) -> None:
    """Write ``metrics.json`` and ``plot.png`` and print the table.

    Variants that the folder has from other runs stay: servers are visited one at a time.
    """
    config = next(iter(runs.values())).config
    path = folder / "metrics.json"
    variants = orjson.loads(path.read_bytes())["variants"] if path.exists() else {}
    for name, drawn in runs.items():
        variants[name] = variant_metrics(
            drawn.samples.items, drawn.sessions.items, config.n, config.num_problems
        )
    variants = with_same_memory(variants)
    metrics: dict[str, Any] = {
        "config": config.as_dict(),
        "sampling_params": config.sampling_params | {"n": config.n},
        "variants": variants,
        "model_fingerprint": model_fingerprint(config.model or ""),
        "versions": versions(),
        "hardware": hardware(),
        "git_commit": git_commit(),
    }
    path.write_bytes(orjson.dumps(metrics, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    title = f"{config.num_problems} problems, {config.n} samples each"
    print(f"\n{title}\n\n{table(variants, config.n)}\n", flush=True)
    plot(variants, title, folder / "plot.png")
    print(f"{folder}: metrics.json, plot.png, samples-*.jsonl")


if __name__ == "__main__":
    sys.exit(main())
