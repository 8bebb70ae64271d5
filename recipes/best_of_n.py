"""Best-of-n over several KV caches: the same problems and sampling for each, one table.

    python -m recipes.best_of_n --config recipes/demo/best_of_n.yaml --num-problems 16
    python -m recipes.best_of_n --config … --base-url http://127.0.0.1:30000

Draws n samples per problem once, with every cache variant in turn on an engine of its own (or with
the one a running server has), and derives pass@k, maj@k and other ways of picking one answer for
k = 1, 2, 4 … n from them. A run that was cut off goes on where it stopped when the same command is
given again. README.md lists keys and output files.
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
from .config import RunConfig
from .engines import EngineClient, ServerClient, check_sampling
from .environment import demo_package
from .folder import run_folder
from .problems import ProblemSet, load_problems
from .report import plot, table, variant_metrics, with_same_memory
from .runner import Run
from .scoring import Verifier, score_samples
from .settings import as_dict, parse
from .variant import Variant

DESCRIPTION = "Best-of-n on one set of problems, for several KV caches."


@dataclasses.dataclass(frozen=True)
class Results:
    """What one call has to report.

    Attributes:
        folder: where the files are.
        runs: by variant, at least one.
        skipped: why a variant could not run here, by variant.
    """

    folder: Path
    runs: dict[str, Run]
    skipped: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what ``argv`` (default: the command line) describes; gives the exit status."""
    config = parse(RunConfig, "best_of_n", DESCRIPTION, argv)
    try:
        # What the report needs complains now rather than after the samples.
        demo_package("matplotlib", "plots need")
        if config.verifier is not None:
            Verifier(config.verifier)
        report(run(config, load_problems(config)))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: RunConfig, problems: ProblemSet) -> Results:
    """Draw what is missing of every variant.

    Raises:
        RuntimeError: an engine does not start. ``fp8``, which SGLang has not on all hardware, is
            left out with its reason instead, as long as another variant ran.
    """
    if config.base_url is not None:
        return run_server(config, problems)
    results = Results(make_folder(config, problems), {}, {})
    for name in config.variants:
        variant = Variant.parse(name)
        drawn = Run(results.folder, variant.slug, config, problems)
        if drawn.finished:
            print(f"==> {name}: complete in {results.folder}", flush=True)
            results.runs[name] = drawn
            continue
        print(f"==> {name}: starting an engine", flush=True)
        seed = drawn.next_seed
        try:
            client = EngineClient(config, variant, seed)
        except RuntimeError as error:
            if name != "fp8":
                raise
            print(f"==> {name}: left out: {error}", flush=True)
            results.skipped[name] = str(error)
            continue
        try:
            drawn.draw(client, name, seed)
        finally:
            client.close()
        results.runs[name] = drawn
    if not results.runs:
        raise RuntimeError(f"no variant could run: {results.skipped}")
    return results


def run_server(config: RunConfig, problems: ProblemSet) -> Results:
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
        if drawn.finished:
            drawn.claim(info)
        else:
            drawn.draw(client, name, info["random_seed"])
    finally:
        client.close()
    return Results(folder, {name: drawn}, {})


def make_folder(config: RunConfig, problems: ProblemSet) -> Path:
    """The run's folder, with its configuration in it."""
    folder = run_folder(config, problems)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(as_dict(config), sort_keys=False), encoding="utf-8"
    )
    return folder


def report(results: Results) -> None:
    """Score the samples where ``select`` asks for it, write ``metrics.json`` and ``plot.png`` and
    print the table.

    Variants that the folder has from other runs stay: servers are visited one at a time.
    """
    folder, config = results.folder, next(iter(results.runs.values())).config
    path = folder / "metrics.json"
    variants = orjson.loads(path.read_bytes())["variants"] if path.exists() else {}
    for name, drawn in results.runs.items():
        scores = score_samples(drawn.scores, config, drawn.problems, drawn.samples.items)
        variants[name] = variant_metrics(drawn, scores)
    variants = with_same_memory(variants)
    metrics: dict[str, Any] = {
        "config": as_dict(config),
        "sampling_params": config.sampling_params | {"n": config.n},
        "variants": variants,
        "skipped": results.skipped,
    }
    path.write_bytes(orjson.dumps(metrics, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    title = f"{config.num_problems} problems, {config.n} samples each"
    print(f"\n{title}\n\n{table(variants, config.n, config.select)}\n", flush=True)
    plot(variants, title, folder / "plot.png", config.select)
    print(f"{folder}: metrics.json, plot.png, samples-*.jsonl")


if __name__ == "__main__":
    sys.exit(main())
