"""Imports point down only, and one module alone touches SGLang's registries."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "patternkv_kernels": ROOT / "kernels" / "patternkv_kernels",
    "patternkv_sgl": ROOT / "patternkv_sgl",
}

# A module imports modules of earlier ranks only. A package's own name is its `__init__`.
LAYERS = [
    [
        "patternkv_kernels.format",
        "patternkv_kernels.launch",
        "patternkv_kernels.mined",
        "patternkv_kernels.mining_reference",
        "patternkv_kernels.plan",
        "patternkv_kernels.rotate_reference",
        "patternkv_kernels.window",
    ],
    ["patternkv_kernels.compiler"],
    ["patternkv_kernels.jit"],
    ["patternkv_kernels.build", "patternkv_kernels.dispatch", "patternkv_kernels.tables"],
    [
        "patternkv_kernels.dequantize_reference",
        "patternkv_kernels.store_cuda",
        "patternkv_kernels.store_reference",
    ],
    [
        "patternkv_kernels.decode_cuda",
        "patternkv_kernels.decode_reference",
        "patternkv_kernels.dequantize_cuda",
        "patternkv_kernels.mining_cuda",
        "patternkv_kernels.rotate_cuda",
    ],
    [
        "patternkv_kernels.decode",
        "patternkv_kernels.dequantize",
        "patternkv_kernels.mining",
        "patternkv_kernels.ragged",
        "patternkv_kernels.rotate",
        "patternkv_kernels.store",
    ],
    ["patternkv_kernels.windowed_layers"],
    ["patternkv_kernels"],
    [
        "patternkv_sgl",
        "patternkv_sgl.dispatch",
        "patternkv_sgl.hooks",
        "patternkv_sgl.platform",
    ],
    [
        "patternkv_sgl.basis",
        "patternkv_sgl.checkpoint",
        "patternkv_sgl.config",
        "patternkv_sgl.cpu_platform",
        "patternkv_sgl.tables",
    ],
    ["patternkv_sgl.pool", "patternkv_sgl.requests", "patternkv_sgl.stats"],
    [
        "patternkv_sgl.guard",
        "patternkv_sgl.radix",
        "patternkv_sgl.scratch",
        "patternkv_sgl.segments",
    ],
    ["patternkv_sgl.batch"],
    [
        "patternkv_sgl.canary",
        "patternkv_sgl.metadata",
        "patternkv_sgl.prefill",
        "patternkv_sgl.warmup",
    ],
    ["patternkv_sgl.planner"],
    ["patternkv_sgl.backend"],
    ["patternkv_sgl.refusals"],
    ["patternkv_sgl.server_args"],
    [
        "patternkv_sgl.admission",
        "patternkv_sgl.release",
        "patternkv_sgl.sampler",
        "patternkv_sgl.sizing",
    ],
    ["patternkv_sgl.cache", "patternkv_sgl.tokenizer_manager"],
    ["patternkv_sgl.plugin"],
]
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}

# Folders that import anything and are imported by nothing.
LEAVES = {"benchmarks", "patternkv_recipes", "recipes", "tests"}

# The one module that may register with SGLang.
PLUGIN = "patternkv_sgl.plugin"
REGISTRY = re.compile(r"HookRegistry|register_\w+|add_\w+_choices")


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere, in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if module in PACKAGES else module.rpartition(".")[0]
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [base])])
            yield base
            # `from package import module` imports the module as well.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def registrations(tree: ast.AST) -> Iterator[str]:
    """Uses of what registers something with SGLang, imported by name or called as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
            yield from (alias.name for alias in node.names if REGISTRY.fullmatch(alias.name))
        elif isinstance(node, ast.Attribute) and REGISTRY.fullmatch(node.attr):
            yield ast.unparse(node)


def violations(module: str, source: str) -> list[str]:
    """What is wrong with one module of our packages, one line each."""
    tree = ast.parse(source)
    if module not in RANK:
        return [f"{module} has no rank: add {module} to LAYERS"]
    found = []
    for name in sorted(set(imported(module, tree))):
        top = name.partition(".")[0]
        if top in LEAVES:
            found.append(f"{module} imports {name}: nothing imports {top}/")
        elif top == "sglang" and module.startswith("patternkv_kernels"):
            found.append(f"{module} imports {name}: the kernels know no SGLang")
        elif name != module and name in RANK and RANK[name] >= RANK[module]:
            found.append(f"{module} imports {name}, which is not below it")
        elif top in PACKAGES and name not in RANK and name.rpartition(".")[0] not in RANK:
            found.append(f"{module} imports {name}, which has no rank")
    if module != PLUGIN:
        found += [f"{module} uses {name}: only plugin.py registers" for name in registrations(tree)]
    return found


def modules() -> dict[str, Path]:
    """Every module of our packages, by dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=modules())
def test_imports_point_down(module: str, path: Path) -> None:
    assert not violations(module, path.read_text(encoding="utf-8"))


def test_every_rank_names_a_module() -> None:
    assert set(RANK) == set(modules())


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("patternkv_kernels.store", "import sglang.srt.utils", "the kernels know no SGLang"),
        ("patternkv_kernels.store", "from sglang import srt", "the kernels know no SGLang"),
        ("patternkv_kernels.decode", "import patternkv_sgl.config", "not below it"),
        ("patternkv_kernels.format", "from patternkv_kernels.store import pack", "not below it"),
        ("patternkv_kernels.format", "from patternkv_kernels import store", "not below it"),
        ("patternkv_kernels.format", "from . import store", "not below it"),
        ("patternkv_kernels.format", "from .store import pack", "not below it"),
        ("patternkv_kernels", "from patternkv_sgl.pool import PatternKVPool", "not below it"),
        ("patternkv_sgl.config", "def f():\n    from patternkv_sgl import plugin", "not below it"),
        ("patternkv_sgl.pool", "import recipes.config", "nothing imports recipes/"),
        ("patternkv_sgl.pool", "from tests.cases import CASES", "nothing imports tests/"),
        ("patternkv_sgl.newcomer", "", "add patternkv_sgl.newcomer to LAYERS"),
        (
            "patternkv_sgl.pool",
            "from sglang.srt.plugins.hook_registry import HookRegistry as H",
            "only plugin.py registers",
        ),
        (
            "patternkv_sgl.radix",
            "from sglang.srt.mem_cache.registry import register_radix_cache_backend",
            "only plugin.py registers",
        ),
        ("patternkv_sgl.backend", "args.add_attention_backend_choices(['x'])", "only plugin.py"),
        ("patternkv_sgl.backend", "registry.register_attention_backend('x')", "only plugin.py"),
    ],
)
def test_violations_are_found(module: str, source: str, complaint: str) -> None:
    (found, *_) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("patternkv_kernels.store", "import torch\nfrom patternkv_kernels.format import pack"),
        ("patternkv_sgl.radix", "import sglang\nfrom patternkv_kernels import SlotFormat"),
        (
            "patternkv_sgl.plugin",
            "from sglang.srt.plugins.hook_registry import HookRegistry\n"
            "HookRegistry.register(target, hook)\n"
            "args.add_attention_backend_choices(['x'])",
        ),
    ],
)
def test_downward_imports_pass(module: str, source: str) -> None:
    assert not violations(module, source)
