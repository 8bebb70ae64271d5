"""The wheel carries what the packages need, shadows nothing, and its README states the flags."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.server_args import FLAG_DEFAULTS

ROOT = Path(__file__).parents[1]
# Folder in the checkout → import name.
PACKAGES = {
    "kernels/patternkv_kernels": "patternkv_kernels",
    "patternkv_sgl": "patternkv_sgl",
    "recipes": "patternkv_recipes",
}
MODEL = "recipes/demo/model"
SHIPPED = {".py", ".cu", ".cuh", ".yaml", ".typed"}
# Added to the copy that is built, so that the patterns for data files are tested at every depth.
PROBES = [
    "kernels/patternkv_kernels/csrc/probe.cu",
    "kernels/patternkv_kernels/csrc/sm90/decode/probe.cu",
    "kernels/patternkv_kernels/include/patternkv/probe.cuh",
    "recipes/probe.yaml",
    "recipes/demo/probe.yaml",
]


def python(
    *arguments: str, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would in ``cwd``: only ``path`` on PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the sources, at a path with a space, with the probes added."""
    copy = tmp_path_factory.mktemp("a checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "patternkv_sgl", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for probe in PROBES:
        (copy / probe).parent.mkdir(parents=True, exist_ok=True)
        (copy / probe).touch()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=checkout)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_wheel_has_every_source(
    checkout: Path, contents: set[str], folder: str, package: str
) -> None:
    files = (path for path in (checkout / folder).rglob("*") if path.suffix in SHIPPED)
    expected = {f"{package}/{path.relative_to(checkout / folder).as_posix()}" for path in files}
    assert expected
    assert not expected - contents


@pytest.mark.slow
def test_wheel_has_the_demo_model(contents: set[str]) -> None:
    names = {path.name for path in (ROOT / MODEL).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {f"patternkv_recipes/demo/model/{name}" for name in names} <= contents


@pytest.mark.slow
def test_wheel_is_typed(contents: set[str]) -> None:
    assert {"patternkv_kernels/py.typed", "patternkv_sgl/py.typed"} <= contents


@pytest.mark.slow
def test_wheel_has_nothing_else(contents: set[str]) -> None:
    tops = {name.partition("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES.values())


@pytest.mark.slow
def test_entry_points(wheel: Path, contents: set[str]) -> None:
    (name,) = (name for name in contents if name.endswith(".dist-info/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(zipfile.ZipFile(wheel).read(name).decode())
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "sglang.srt.plugins": {"patternkv": "patternkv_sgl.plugin:load"},
        "sglang.srt.platforms": {"patternkv_cpu": "patternkv_sgl.platform:activate"},
    }


@pytest.mark.slow
def test_recipe_runs_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    shown = python("-m", "patternkv_recipes.best_of_n", "--help", cwd=tmp_path, path=unpacked)
    assert shown.returncode == 0, shown.stderr
    assert "--config" in shown.stdout


INSTALLED = "import importlib.metadata; importlib.metadata.distribution('patternkv-sgl')"
WHERE = "import {0}; print({0}.__file__)"


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES.values())
def test_wheel_imports(unpacked: Path, tmp_path: Path, package: str) -> None:
    found = python("-c", WHERE.format(package), cwd=tmp_path, path=unpacked)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == unpacked / package / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_editable_install_imports(tmp_path: Path, folder: str, package: str) -> None:
    installed = python("-c", INSTALLED, cwd=tmp_path)
    if "PackageNotFoundError" in installed.stderr:
        pytest.skip("patternkv-sgl is not installed here")
    found = python("-c", WHERE.format(package), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == ROOT / folder / "__init__.py"


# What SGLang and transformers do at run time.
HUGGING_FACE = "import kernels; from kernels import get_kernel; print(kernels.__file__)"


def test_hugging_face_kernels_stays_importable() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = python("-c", HUGGING_FACE, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert not Path(found.stdout.strip()).is_relative_to(ROOT / "kernels")


def test_an_init_in_kernels_would_shadow_it(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert "ImportError" in python("-c", HUGGING_FACE, cwd=tmp_path).stderr


def _as_flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def test_readme_states_every_flag() -> None:
    cells = (line.split("|") for line in (ROOT / "README.md").read_text("utf-8").splitlines())
    stated = {row[1].strip(" `"): (row[2].strip(), row[3].strip()) for row in cells if len(row) > 4}
    assert all(_as_flag(field) in stated for field in FLAG_DEFAULTS)
    defaults = PatternKVConfig()
    for name, (low, high) in PatternKVConfig.RANGES.items():
        default = getattr(defaults, name)
        stated_default, values = stated[_as_flag(f"kv_quant_{name}")]
        assert stated_default == ("by memory" if name == "tables" else str(default))
        assert values == f"{low} to {high}"
    assert stated["--kv-quant-bits"][0] == f"`{defaults.k_bits}`"
