"""Convolutions of 3×3 and 1×1 pixels, and their gradients, as XLA runs them well on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(x, kernel, strides, padding, **options):
    """`lax.conv_general_dilated` for `nnx.Conv`; those of 3×3 and 1×1 are computed as below on a CPU.

    XLA's own weight gradients took most of a narrow network's step there, and its convolutions to maps of two pixels
    two thirds of the step of VGG19 at full width. The derivative is then reverse-mode only (`custom_vjp`). For
    `ConvNorm`, which has no dilation, groups or precision.
    """
    size, stride = kernel.shape[:2], strides[0]
    if jax.default_backend() == "cpu" and not isinstance(padding, str):
        around = {tuple(pad) for pad in padding}
        if size == (3, 3) and around == {(1, 1)} and tuple(strides) in ((1, 1), (2, 2)):
            return _conv3x3(x, kernel, stride)
        if size == (1, 1) and around == {(0, 0)}:
            return x[:, ::stride, :: strides[1]] @ kernel[0, 0]
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _convolve(x, kernel, stride):
    h, w = (-(-side // stride) for side in x.shape[1:3])
    if min(h, w) < 3:  # XLA takes up to 70 times as long as for as many operations on larger maps
        pixels = jnp.concatenate([tap for row in _taps(x, h, w, stride) for tap in row], axis=-1)
        return pixels @ kernel.reshape(-1, kernel.shape[-1])
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT)


def _taps(x, h, w, stride):
    """The pixels of x that the kernel's (u, v) meets, each (n, h, w, i): a list for each u."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = stride * (h - 1) + 1, stride * (w - 1) + 1
    return [[x[:, u : u + rows : stride, v : v + columns : stride] for v in range(3)] for u in range(3)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3(x, kernel, stride):
    """(n, h, w, i) and (3, 3, i, o) to (n, ⌈h / stride⌉, ⌈w / stride⌉, o), padded by one."""
    return _convolve(x, kernel, stride)


def _forward(x, kernel, stride):
    return _convolve(x, kernel, stride), (x, kernel)


def _backward(stride, saved, g):
    x, kernel = saved
    # Else XLA computes them again for each of the copies below, all the way from the last convolution's output.
    x, g = lax.optimization_barrier((x, g))
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, kernel, stride), x)(g)
    gradient = _kernel_gradient(x, g) if stride == 1 else _strided_kernel_gradient(x, g, stride)
    return dx, gradient.astype(kernel.dtype)


_conv3x3.defvjp(_forward, _backward)


def _kernel_gradient(x, g):
    """Σ x[row + u, column + v]·g[row, column] as one product: x moved by v, g by −u, all nine pairs at once."""
    i, o = x.shape[-1], g.shape[-1]
    columns = _moved(x, axis=2, by=(1, 0, -1)).reshape(-1, 3 * i)
    rows = _moved(g, axis=1, by=(-1, 0, 1)).reshape(-1, 3 * o)
    return _product(columns, rows).reshape(3, i, 3, o).transpose(2, 0, 1, 3)


def _strided_kernel_gradient(x, g, stride):
    """Σ x[stride·row + u, stride·column + v]·g[row, column], a product for each u."""
    _, h, w, o = g.shape
    g = g.reshape(-1, o)
    sides = (_beside(row).reshape(len(g), -1) for row in _taps(x, h, w, stride))
    return jnp.stack([_product(side, g).reshape(3, -1, o) for side in sides])


def _product(a, b):
    """(m, p) and (m, q) to (p, q)."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _moved(x, axis, by):
    """Copies of x moved along `axis`, zeros coming in, side by side in the channels."""

    def moved(shift):
        pads = [(0, 0, 0)] * 4
        pads[axis] = (shift, -shift, 0)
        return lax.pad(x, x.dtype.type(0), pads)

    return _beside([moved(shift) for shift in by])


def _beside(parts):
    """Arrays side by side in the channels."""
    # A sum of pads, which XLA fuses; a concatenation it does not.
    channels = parts[0].shape[-1]
    total = None
    for n, part in enumerate(parts):
        pads = [(0, 0, 0)] * 3 + [(n * channels, (len(parts) - 1 - n) * channels, 0)]
        part = lax.pad(part, part.dtype.type(0), pads)
        total = part if total is None else total + part
    return total
