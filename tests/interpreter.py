"""Corrections of Triton's CPU interpreter, which up to 3.9.0 truncates casts to bfloat16 and computes on its raw bits.

Casts and `tl.dot` become right, and the latter sums in one order everywhere. Arithmetic on bfloat16 itself raises:
kernels compute in float32. A mask into which a scalar's comparison went holds integers, which 3.9.0 no longer takes: it
is made a mask again. What a load leaves out, without a word of what is there instead, is NaN and not zero.

And what took half of the time is done once: the language is prepared once a launch, not anew in each call of a function
within a kernel, types and shapes are kept, and what is the same already is not compared part by part.
"""

import functools
import math

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# What takes bfloat16 as it is, besides the corrected methods: these move elements.
ALLOWED = {
    f"create_{name}"
    for name in (
        *("masked_load", "store", "masked_store", "fp_ext", "bitcast", "select", "reshape", "trans"),
        *("expand_dims", "broadcast", "splat", "join", "split"),
    )
}

_cast_others = InterpreterBuilder.cast_impl
_convert_others = InterpreterBuilder.create_fp_to_fp
_check_reduced = ReduceScanOpInterface.check_tensor
_patch_always = interpreter._patch_lang
_describe_block = tl.block_type.__init__
_compare_others = tl.dtype.__eq__
_broadcast_others = TritonSemantic.broadcast_impl_value
_dtype_of = interpreter._get_np_dtype
_NUMPY_DTYPES: dict = {}
_BLOCK_TYPES: dict = {}
_load_masked = InterpreterBuilder.create_masked_load
_store_masked = InterpreterBuilder.create_masked_store


def install() -> None:
    """Correct the interpreter for the rest of the process. A second call changes nothing."""
    if InterpreterBuilder.cast_impl is _cast:
        return
    for name, method in list(vars(InterpreterBuilder).items()):
        if name.startswith("create_") and name not in ALLOWED:
            setattr(InterpreterBuilder, name, _refusing(method))
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _convert
    InterpreterBuilder.create_dot = _dot
    ReduceScanOpInterface.check_tensor = _check
    interpreter._patch_lang = _patch
    InterpreterBuilder.create_masked_load = _load
    InterpreterBuilder.create_masked_store = _store
    tl.block_type.__init__ = _init_block_type
    tl.dtype.__eq__ = _is_dtype
    tl.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast
    interpreter._get_np_dtype = _numpy_dtype


@functools.cache
def _languages(function) -> list:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch(function):
    """The interpreter's meaning for what a function sees of the language; what has it already is left alone."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch_always(function)
    return interpreter._LangPatchScope()  # nothing to restore


def _numpy_dtype(dtype):
    name = dtype.scalar.name
    if name not in _NUMPY_DTYPES:
        _NUMPY_DTYPES[name] = _dtype_of(dtype)
    return _NUMPY_DTYPES[name]


def _init_block_type(self, element_ty, shape) -> None:
    shape = shape.values if isinstance(shape, tl.tuple) else tl.core._unwrap_if_constexpr(shape)
    shape = tuple(size if isinstance(size, int) else tl.core._unwrap_if_constexpr(size) for size in shape)
    key = element_ty.name, shape
    if key not in _BLOCK_TYPES:
        _describe_block(self, element_ty, list(shape))
        _BLOCK_TYPES[key] = vars(self).copy()
    vars(self).update(_BLOCK_TYPES[key])


def _init_tensor(self, handle, type) -> None:
    """As the language's own, but that equal shapes are one."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape) if type.is_block() else ())


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _is_dtype(self, other) -> bool:
    return self.name == other.name if type(other) is tl.dtype else _compare_others(self, other)


def _broadcast(self, lhs, rhs):
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast_others(self, lhs, rhs)


def _load(self, pointers, mask, other, *args):
    if other is None and pointers.data.size > 1:  # of one element, Triton takes an `other` of 0 for none
        other = _undefined(pointers)
    return _load_masked(self, pointers, _as_mask(mask), other, *args)


def _undefined(pointers) -> TensorHandle:
    """What a GPU leaves where nothing is loaded: NaN, or -1, as if the worst."""
    dtype = pointers.get_element_ty()
    bits = np.full(pointers.data.shape, -1, f"i{_numpy_dtype(dtype).itemsize}")
    return TensorHandle(bits.view(_numpy_dtype(dtype)), dtype)


def _store(self, pointers, values, mask, *args):
    return _store_masked(self, pointers, values, _as_mask(mask), *args)


def _as_mask(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(handle.data.astype(bool), tl.int1)


def _is_bfloat16(operand) -> bool:
    return isinstance(operand, (TensorHandle, tl.tensor)) and operand.dtype.scalar.name == "bf16"


def _refuse(operands) -> None:
    if any(map(_is_bfloat16, operands)):
        raise TypeError("bfloat16 arithmetic in the interpreter: cast to float32 first")


def _refusing(method):
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        _refuse((*args, *kwargs.values()))
        return method(self, *args, **kwargs)

    return checked


def _check(self, tensors) -> None:
    """Reductions and scans call this first; they work on the arrays and never reach the builder."""
    _check_reduced(self, tensors)
    _refuse(tensors)


def _widened(handle: TensorHandle) -> TensorHandle:
    """Bfloat16 is the upper half of a float32."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(handle: TensorHandle, to_integer=np.rint) -> TensorHandle:
    """One rounding, as on a GPU, from float64 too; the default takes the nearest and ties to even.

    Bfloat16 keeps 8 bits of a number, and below 2**-126 multiples of 2**-133.
    """
    values = handle.data.astype(np.float64)
    step = np.maximum(np.frexp(values)[1] - 8, -133)
    rounded = np.ldexp(to_integer(np.ldexp(values, -step)), step).astype(np.float32)
    return TensorHandle((rounded.view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)


@np.errstate(over="ignore", invalid="ignore")  # a GPU casts to infinity and casts NaN without a warning
def _cast(self, src, dst_type):
    if dst_type.scalar == tl.bfloat16:
        return _narrowed(_widened(src))
    return _cast_others(self, _widened(src), dst_type)


@np.errstate(over="ignore", invalid="ignore")
def _convert(self, src, dst_type, rounding_mode):
    if dst_type.scalar == tl.bfloat16 and rounding_mode == ir.ROUNDING_MODE.RTZ:
        return _narrowed(src, np.trunc)
    return _convert_others(self, src, dst_type, rounding_mode)


@np.errstate(over="ignore", invalid="ignore")
def _dot(self, a, b, d, *args):
    """Each element's terms are summed in an order that only their number decides, as on a GPU: BLAS goes by all sizes,
    and by the CPU.
    """
    a, b = _widened(a), _widened(b)
    assert a.dtype.primitive_bitwidth > 8
    columns = np.ascontiguousarray(b.data.T, d.data.dtype)
    products = np.einsum("mk,nk->mn", np.ascontiguousarray(a.data, d.data.dtype), columns)
    return TensorHandle(products + d.data, d.dtype.scalar)
