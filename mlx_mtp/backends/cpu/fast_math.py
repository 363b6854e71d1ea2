"""Exponentials for MLX's CPU back-end, in float32.

MLX's x86 wheel computes ``exp`` one element at a time (30 ns each), and with it SwiGLU, softmax and
every cross-entropy.  Here it is made of basic operations, which ``mx.compile`` joins into one loop
that the C++ compiler vectorises (4 ns; 10 ns where there is no compiler and MLX runs the operations
one by one).

``exp(x) = 2**n * 2**f`` with n the nearest whole number to ``x / ln 2``: adding 1.5 * 2**23 leaves
n in the low bits of the sum, a shift makes them the exponent of ``2**n``, and ``2**f`` for
``|f| <= 1/2`` is Taylor's polynomial of degree 6, whose error is under 2e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

_LOG2_E = 1.4426950408889634
_ROUND = 1.5 * 2**23
_POLYNOMIAL = (  # (ln 2)**j / j!, highest power first
    1.5403530393381610e-4,
    1.3333558146428443e-3,
    9.6181291076284772e-3,
    5.5504108664821580e-2,
    2.4022650695910072e-1,
    6.9314718055994531e-1,
    1.0,
)
PIECE = 1_000_000  # elements that stay in the processor's cache from one operation to the next


def exp(x: mx.array) -> mx.array:
    """Exponential of float32 values; 0 below -88, infinite above 88.4.

    The relative error is at most ``4e-7 + 1e-7 * |x|``; the second part is that of rounding
    ``x / ln 2``.
    """
    scaled = mx.clip(x * _LOG2_E, -127.0, 128.0)
    whole = scaled + _ROUND
    part = scaled - (whole - _ROUND)
    power: Any = _POLYNOMIAL[0]
    for coefficient in _POLYNOMIAL[1:]:
        power = power * part + coefficient
    return power * mx.left_shift(whole.view(mx.int32) + 127, 23).view(mx.float32)


@mx.compile
def _shifted_exp(x: mx.array, shift: mx.array) -> mx.array:
    return exp(x - shift)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1.0 + exp(-gate)) * up


@mx.compile
def _sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + exp(-x))


@mx.compile
def _gate_gradient(gate: mx.array, up: mx.array, sigmoid: mx.array, ahead: mx.array) -> mx.array:
    return ahead * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))


@mx.compile
def _up_gradient(gate: mx.array, sigmoid: mx.array, ahead: mx.array) -> mx.array:
    return ahead * gate * sigmoid


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) * up``, float32 of one shape."""
    return _differentiable_swiglu(gate, up)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, float32."""
    return _differentiable_softmax(x)


def logsumexp(x: mx.array) -> mx.array:
    """Log of the sum of exponentials over the last axis, float32 ``[R, V]`` to ``[R]``."""
    return _differentiable_logsumexp(x)


def cross_entropy(logits: mx.array, tokens: mx.array) -> mx.array:
    """``logsumexp(logits) - logits[token]``, float32 ``[R, V]`` and ids ``[R]`` to ``[R]``."""
    return _differentiable_cross_entropy(logits, tokens)


def _swiglu_vjp(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> Any:
    del output
    gate, up = primals
    sigmoid = _sigmoid(gate)  # loops with one output are the ones that become vector code
    return _gate_gradient(gate, up, sigmoid, cotangent), _up_gradient(gate, sigmoid, cotangent)


def _softmax(x: mx.array) -> mx.array:
    powers = _shifted_exp(x, x.max(axis=-1, keepdims=True))
    return powers * mx.reciprocal(powers.sum(axis=-1, keepdims=True))


def _softmax_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    del primals
    product = cotangent * output
    return product - output * product.sum(axis=-1, keepdims=True)


def _logsumexp(x: mx.array) -> mx.array:
    return mx.concatenate([_logsumexp_piece(piece) for piece in _pieces(x, _piece_rows(x))])


def _logsumexp_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    values = (_pieces(x, _piece_rows(primals)) for x in (primals, output, cotangent))
    return mx.concatenate(
        [
            _shifted_exp(x, shift[:, None]) * factor[:, None]
            for x, shift, factor in zip(*values, strict=True)
        ]
    )


def _cross_entropy(logits: mx.array, tokens: mx.array) -> mx.array:
    return _logsumexp(logits) - _of_tokens(logits, tokens)


def _cross_entropy_vjp(
    primals: Sequence[mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    logits, tokens = primals
    gradient = _logsumexp_vjp(logits, cotangent, output + _of_tokens(logits, tokens))
    gradient[mx.arange(tokens.size), tokens] -= cotangent
    return gradient, mx.zeros_like(tokens)


def _of_tokens(logits: mx.array, tokens: mx.array) -> mx.array:
    return mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def _logsumexp_piece(x: mx.array) -> mx.array:
    largest = x.max(axis=-1, keepdims=True)
    return largest[:, 0] + mx.log(_shifted_exp(x, largest).sum(axis=-1))


def _piece_rows(x: mx.array) -> int:
    return max(1, PIECE // x.shape[-1])


def _pieces(x: mx.array, rows: int) -> list[mx.array]:
    return [x[start : start + rows] for start in range(0, x.shape[0], rows)]


def _with_vjp(function: Any, vjp: Any) -> Any:
    custom: Any = mx.custom_function(function)
    custom.vjp(vjp)
    return custom


_differentiable_swiglu = _with_vjp(_swiglu, _swiglu_vjp)
_differentiable_softmax = _with_vjp(_softmax, _softmax_vjp)
_differentiable_logsumexp = _with_vjp(_logsumexp, _logsumexp_vjp)
_differentiable_cross_entropy = _with_vjp(_cross_entropy, _cross_entropy_vjp)
