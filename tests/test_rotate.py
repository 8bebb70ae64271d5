"""Rotation of queries and keys: torch against its definition, the kernel against torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import pytest
import torch

from patternkv_kernels import hadamard, rotate
from tests.simt_library import compile_library, fields, unavailable

H_Q, H_KV = 6, 2
DTYPES = (torch.bfloat16, torch.float16)
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_POINTERS = ("q", "k", "factors", "out")
_NUMBERS = ("n", "h_q", "h_kv", "q_token", "q_head", "k_token", "k_head")


class Arguments(ctypes.Structure):
    """``Arguments`` of ``simt/rotate.cpp``."""

    _fields_ = fields(_POINTERS, _NUMBERS)


@functools.cache
def _library(head_dim: int) -> ctypes.CDLL:
    return compile_library("rotate", 4, 4, head_dim)


def simt_rotate(
    q: torch.Tensor, k: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rotate`` by the CUDA kernel's source, on CPU tensors."""
    (n, h_q, d), h_kv = q.shape, k.shape[1]
    out = torch.full((n, h_q + h_kv, d), torch.nan, dtype=q.dtype)
    pointers = [x.data_ptr() for x in (q, k, factors, out)]
    numbers = (n, h_q, h_kv, *q.stride()[:2], *k.stride()[:2])
    name = "bf16" if q.dtype == torch.bfloat16 else "fp16"
    _library(d)[f"rotate_{name}"](ctypes.byref(Arguments(*pointers, *numbers)))
    return out[:, :h_q], out[:, h_q:]


@pytest.fixture(
    params=[
        pytest.param("reference"),
        pytest.param("simt", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def run(request: pytest.FixtureRequest) -> Rotate:
    """``rotate`` of CPU tensors by one of its implementations."""
    if request.param == "reference":
        return functools.partial(rotate, impl="reference")
    if request.param == "simt":
        if reason := unavailable():
            pytest.skip(reason)
        return simt_rotate

    def on_device(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Strides survive: what was a part of a projection still is.
        q, k, factors = (
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda").copy_(x)
            for x in tensors
        )
        turned_q, turned_k = rotate(q, k, factors, impl="cuda")
        return turned_q.cpu(), turned_k.cpu()

    return on_device


def factors(d: int, dtype: torch.dtype) -> torch.Tensor:
    signs = torch.randint(2, (H_Q + H_KV, d)) * 2 - 1
    return (signs * torch.randint(-6, 3, (H_Q + H_KV, d)).float().exp2()).to(dtype)


def parts(n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one projection's output, which has values as well."""
    qkv = torch.randn(n, H_Q + 2 * H_KV, d).to(dtype)
    return qkv[:, :H_Q], qkv[:, H_Q : H_Q + H_KV]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("n", [1, 7])
def test_rounds_the_definition(run: Rotate, n: int, d: int, dtype: torch.dtype) -> None:
    q, k = parts(n, d, dtype)
    by = factors(d, dtype)
    turned = run(q, k, by)
    for x, found, own in zip((q, k), turned, by.split([H_Q, H_KV]), strict=True):
        exact = (x.double() * own.double()) @ hadamard(d).double()
        # Half a unit in the last place; terms of a float32 sum may be larger than the sum.
        tolerance = exact.abs() * torch.finfo(dtype).eps / 2 + 2.0**-16
        assert found.dtype == dtype and found.shape == x.shape
        assert ((found.double() - exact).abs() <= tolerance).all()


def test_tensors_of_their_own_and_parts_of_one_agree(run: Rotate) -> None:
    q, k = parts(40, 128, torch.bfloat16)
    by = factors(128, torch.bfloat16)
    for found, expected in zip(run(q.clone(), k.clone(), by), run(q, k, by), strict=True):
        assert torch.equal(found, expected)


def test_no_tokens() -> None:
    q, k = parts(0, 64, torch.bfloat16)
    turned_q, turned_k = rotate(q, k, factors(64, torch.bfloat16))
    assert turned_q.shape == q.shape and turned_k.shape == k.shape


def test_a_transform_twice_is_a_multiple() -> None:
    for d, block in ((64, 64), (96, 32), (128, 128), (256, 256)):
        assert torch.equal(hadamard(d) @ hadamard(d), block * torch.eye(d))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, f: (q, k[1:], f), "k \\[2, 2, 64\\]"),
        (lambda q, k, f: (q, k, f[1:]), "factors \\[7, 64\\]"),
        (lambda q, k, f: (q, k, f.float()), "factors torch.float32"),
    ],
)
def test_arguments_must_fit(change: Callable[..., tuple[torch.Tensor, ...]], message: str) -> None:
    q, k = parts(3, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        rotate(*change(q, k, factors(64, torch.bfloat16)))
