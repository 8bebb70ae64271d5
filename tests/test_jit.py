"""Building the CUDA kernels: what is looked for, what a change rebuilds, what failures say."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import patternkv_kernels.build as build
import patternkv_kernels.compiler as compiler
import patternkv_kernels.dispatch as dispatch
import patternkv_kernels.jit as jit
from patternkv_kernels import SlotFormat

VARIANT = jit.Variant("store", 4, 2, 64, "90a")
SOURCES = sorted((Path(jit.__file__).parent / "csrc").glob("*.cu"))
CACHES = (
    jit.load_variant,
    compiler.nvcc,
    compiler.nvcc_version,
    compiler.include_folders,
    jit._source_digest,
    dispatch._failure,
    dispatch._warn,
)
needs_nvcc = pytest.mark.skipif(not compiler.is_available(), reason=str(compiler.unavailable()))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty build cache, and nothing remembered before or after."""
    monkeypatch.setenv("PATTERNKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATTERNKV_CUDA_ARCH", "90a")
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a CUDA compiler. Returns what CUDA_HOME is set to."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(
        compiler, "_nvcc_candidates", lambda: iter([tmp_path / "toolkit" / "bin" / "nvcc"])
    )
    return tmp_path / "toolkit"


@pytest.fixture
def fake_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that logs its calls and writes whatever follows ``-o``."""
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && cat "{tmp_path}/version" && exit\n'
        f'echo "$*" >> "{tmp_path}/calls"\n'
        'while [ "$1" != -o ]; do shift; done\n'
        "sleep 0.2\n"
        'echo library > "$2"\n'
    )
    path.chmod(0o755)
    (tmp_path / "version").write_text("release 13.0")
    (tmp_path / "calls").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("NVCC_CCBIN", "sh")
    return tmp_path


def calls(fake: Path) -> list[str]:
    return (fake / "calls").read_text().splitlines()


def test_a_missing_compiler_is_explained(no_nvcc: Path) -> None:
    reason = compiler.unavailable()
    assert not compiler.is_available()
    assert reason is not None and str(no_nvcc / "bin" / "nvcc") in reason
    assert "CUDA_HOME" in reason and 'impl="reference"' in reason
    with pytest.raises(
        compiler.BuildError, match="store_k4v2_d64 cannot be compiled: no CUDA compiler"
    ):
        jit.load("store", SlotFormat(4, 2, 64, h_kv=1))


def test_compilers_are_looked_for_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    monkeypatch.setattr(compiler, "_package_folders", lambda name: [tmp_path / "site" / name])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("CUDA_HOME", "/home")
    monkeypatch.setenv("CUDA_PATH", "/path")
    found = [str(path) for path in compiler._nvcc_candidates()]
    assert found == [
        "/home/bin/nvcc",
        "/path/bin/nvcc",
        "/usr/local/cuda/bin/nvcc",
        "/usr/bin/nvcc",
        str(wheel),
    ]


def test_a_missing_cplusplus_compiler_is_explained(
    fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC_CCBIN", "no-such-compiler")
    assert "no C++ compiler for nvcc: no-such-compiler" in str(compiler.unavailable())


def test_missing_headers_are_explained(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_package_folders", lambda name: [])
    assert "pip install flashinfer-python" in str(compiler.unavailable())


def test_headers_come_from_bare_folders_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder without `__init__.py` will do, and nothing is imported to find it."""
    (tmp_path / "header_package" / "data" / "include").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert compiler._package_folder("header_package", "x") == tmp_path / "header_package"
    assert "header_package" not in sys.modules


def test_importing_the_package_compiles_and_loads_nothing() -> None:
    code = (
        "import sys, patternkv_kernels\n"
        "print([name for name in ('flashinfer', 'tvm_ffi') if name in sys.modules])"
    )
    kernels = Path(jit.__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=kernels, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("arch", ["75", "sm_90", "90ab", "nine"])
def test_bad_architectures_are_refused(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATTERNKV_CUDA_ARCH", arch)
    with pytest.raises(compiler.BuildError, match=arch):
        compiler.arch()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_architecture_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATTERNKV_CUDA_ARCH")
    with pytest.raises(compiler.BuildError, match="set PATTERNKV_CUDA_ARCH"):
        compiler.arch()


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100")]
)
def test_architecture_of_a_gpu(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATTERNKV_CUDA_ARCH")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    compiler._device_arch.cache_clear()
    try:
        assert compiler.arch() == arch
    finally:
        compiler._device_arch.cache_clear()


def test_a_library_is_built_once(fake_nvcc: Path) -> None:
    library = jit.build(VARIANT)
    assert library.read_text() == "library\n"
    assert library.parent.name == "sm_90a"
    assert jit.build(VARIANT) == library
    (call,) = calls(fake_nvcc)
    assert "-gencode=arch=compute_90a,code=sm_90a" in call
    assert "-DPKV_K_BITS=4 -DPKV_V_BITS=2 -DPKV_HEAD_DIM=64" in call
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock"}


@pytest.mark.slow
def test_processes_build_a_library_once(fake_nvcc: Path) -> None:
    code = (
        "import patternkv_kernels.jit as jit\n"
        "print(jit.build(jit.Variant('store', 4, 2, 64, '90a')))"
    )
    kernels = Path(jit.__file__).parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=kernels, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    libraries = {process.communicate()[0].strip() for process in started}
    assert len(libraries) == 1 and Path(libraries.pop()).exists()
    assert len(calls(fake_nvcc)) == 1


def test_changes_rebuild(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = [jit.build(VARIANT)]

    def rebuilt(variant: jit.Variant = VARIANT) -> bool:
        for cache in CACHES:
            cache.cache_clear()
        built.append(jit.build(variant))
        return len(set(built)) == len(built)

    source = tmp_path / "store.cu"
    source.write_text("one")
    monkeypatch.setattr(jit, "source_file", lambda op: source)
    assert rebuilt(), "another source"
    source.write_text("two")
    assert rebuilt(), "an edited source"
    monkeypatch.setattr(jit, "_FLAGS", (*jit._FLAGS, "-lineinfo"))
    assert rebuilt(), "another flag"
    (fake_nvcc / "version").write_text("release 13.1")
    assert rebuilt(), "another compiler"
    assert rebuilt(VARIANT._replace(k_bits=2)) and rebuilt(VARIANT._replace(arch="80"))
    assert not rebuilt(), "nothing changed"


def test_libraries_are_used_without_a_compiler(
    fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = jit.build(VARIANT)
    (fake_nvcc / "toolkit" / "bin" / "nvcc").unlink()
    monkeypatch.setattr(compiler, "_nvcc_candidates", lambda: iter([]))
    compiler.nvcc.cache_clear()
    compiler.nvcc_version.cache_clear()
    assert not compiler.is_available()
    assert jit.build(VARIANT) == library


def test_a_failing_compiler_is_quoted(fake_nvcc: Path) -> None:
    nvcc = fake_nvcc / "toolkit" / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nseq 1 99\necho "no such thing" >&2\nexit 3\n'
    )
    with pytest.raises(compiler.BuildError) as caught:
        jit.build(VARIANT)
    message = str(caught.value)
    assert "exit code 3 on store_k4v2_d64 for sm_90a" in message
    assert f"{nvcc} -std=c++17" in message and message.endswith("no such thing")
    assert "\n99\n" in message and "\n9\n" not in message
    assert not list(jit.cache_folder("90a").glob("*.so"))


def test_a_broken_library_is_named(fake_nvcc: Path) -> None:
    pytest.importorskip("tvm_ffi")
    with pytest.raises(compiler.BuildError, match=r"store_k4v2_d64-\w+-\w+\.so does not load"):
        jit.load("store", SlotFormat(4, 2, 64, h_kv=1))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "89", "90a"])
@pytest.mark.parametrize("op", [path.stem for path in SOURCES])
def test_sources_compile(op: jit.Op, arch: str, tmp_path: Path) -> None:
    jit.compile_source(jit.Variant(op, 4, 2, 128, arch), tmp_path / "out.cubin", "-cubin")
    assert (tmp_path / "out.cubin").stat().st_size > 0


@needs_nvcc
@pytest.mark.slow
def test_a_built_library_loads() -> None:
    pytest.importorskip("tvm_ffi")
    module = jit.load("dequantize", SlotFormat(2, 2, 64, h_kv=1))
    assert callable(module.dequantize)


@needs_nvcc
@pytest.mark.slow
def test_a_library_keeps_its_state_to_itself(tmp_path: Path) -> None:
    """Layers of other bits bring another library of the same names into the process."""
    library = tmp_path / "out.so"
    jit.compile_source(jit.Variant("decode", 4, 4, 64, "80"), library, "-shared")
    command = ["nm", "-D", "--defined-only", str(library)]
    exported = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = [line.split()[-1] for line in exported.splitlines() if "patternkv" in line]
    assert ours == [] and "__tvm_ffi_decode" in exported


def test_every_op_has_a_source() -> None:
    assert {path.stem for path in SOURCES} == set(jit.OPS)


def test_sources_are_package_data() -> None:
    for op in jit.OPS:
        for path in jit.source_files(op):
            assert path.suffix in {".cu", ".cuh"} and path.is_relative_to(Path(jit.__file__).parent)


def test_build_command(
    fake_nvcc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--arch", "80", "--bits", "4:4", "2:4", "--head-dim", "64", "--jobs", "2"]
    assert build.main(arguments) == 0
    # Ops of all bits have one library for both.
    count = 2 * len(jit.OPS) - len(jit.OPS_OF_ALL_BITS)
    assert len(calls(fake_nvcc)) == count
    assert f"{count} of {count} libraries for sm_80" in capsys.readouterr().out
    (fake_nvcc / "toolkit" / "bin" / "nvcc").write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    assert build.main(["--arch", "89", "--op", "store", "--bits", "4:2", "--head-dim", "128"]) == 1
    assert "error: store_k4v2_d128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--bits", "4:3"], "each one of"),
        (["--bits", "4:"], "each one of"),
        (["--head-dim", "80"], "80"),
        (["--op", "mine"], "mine"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_build_command_refuses(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["foo", ""])
def test_build_command_refuses_an_architecture(
    arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(["--arch", arch]) == 1
    assert capsys.readouterr().err.startswith(f"error: --arch {arch!r}: must be digits")


def test_build_command_without_a_gpu_names_its_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATTERNKV_CUDA_ARCH")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.main([]) == 1
    assert "compile for: name it with --arch (80, " in capsys.readouterr().err
    monkeypatch.setenv("PATTERNKV_CUDA_ARCH", "foo")
    assert build.main([]) == 1
    assert "error: PATTERNKV_CUDA_ARCH='foo': must be" in capsys.readouterr().err


FMT = SlotFormat(4, 2, 64, h_kv=1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_reference_serves_tensors_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert not dispatch.use_cuda("auto", "store", FMT, CPU, None)
    assert not dispatch.use_cuda("reference", "store", FMT, CUDA, None)
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        dispatch.use_cuda("cuda", "store", FMT, CPU, None)
    with pytest.raises(ValueError, match="impl='triton'"):
        dispatch.use_cuda("triton", "store", FMT, CPU, None)  # type: ignore[arg-type]
    assert not caplog.records


def test_falling_back_warns_once(
    no_nvcc: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: memoryview(b""))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not dispatch.use_cuda("auto", "store", FMT, CUDA, None)
    (record,) = caplog.records
    assert "store runs torch ops on the GPU" in record.message and "CUDA_HOME" in record.message
    with pytest.raises(ValueError, match="no CUDA compiler"):
        dispatch.use_cuda("cuda", "store", FMT, CUDA, None)
    with pytest.raises(ValueError, match="k is complex"):
        dispatch.use_cuda("cuda", "store", FMT, CUDA, "k is complex")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets ``PATTERNKV_IMPL`` as at the start of a process, or the one of an op."""

    def ask(impl: str, op: str = "") -> None:
        monkeypatch.setenv("PATTERNKV_IMPL" + (op and f"_{op}"), impl)
        dispatch.auto_impl.cache_clear()

    yield ask
    dispatch.auto_impl.cache_clear()


def test_the_environment_decides_what_auto_is(asked: Callable[..., None]) -> None:
    asked("reference")
    assert not dispatch.use_cuda("auto", "store", FMT, CUDA, None)
    reason = dispatch.missing("store", FMT, CUDA)
    assert reason == "the environment (PATTERNKV_IMPL) asks for the torch ops"
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        dispatch.use_cuda("cuda", "store", FMT, CPU, None)
    asked("cuda")
    with pytest.raises(ValueError, match="impl='cuda' cannot run store: the tensors are on cpu"):
        dispatch.use_cuda("auto", "store", FMT, CPU, None)
    asked("reference", "STORE")
    assert not dispatch.use_cuda("auto", "store", FMT, CPU, None)
    with pytest.raises(ValueError, match="impl='cuda' cannot run decode: the tensors are on cpu"):
        dispatch.use_cuda("auto", "decode", FMT, CPU, None)
    asked("slow", "DECODE")
    with pytest.raises(ValueError, match="PATTERNKV_IMPL_DECODE='slow': choose one of"):
        dispatch.use_cuda("auto", "decode", FMT, CPU, None)
    asked("fast")
    with pytest.raises(ValueError, match="PATTERNKV_IMPL='fast': choose one of"):
        dispatch.use_cuda("auto", "mining", FMT, CPU, None)
