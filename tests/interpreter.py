"""Corrections of Triton's CPU interpreter, which up to 3.9.0 truncates casts to bfloat16 and computes on its raw bits.

Casts and `tl.dot` become right, and the latter sums in one order everywhere. Arithmetic on bfloat16 itself raises:
kernels compute in float32. A mask into which a scalar's comparison went holds integers, which 3.9.0 no longer takes: it
is made a mask again. What a load leaves out, without a word of what is there instead, is NaN and not zero.

And what took most of the time is done once: the language is prepared once a launch, not anew in each call of a function
within a kernel, types and shapes are kept, and what is the same already is not compared part by part. What an operation
makes of the types of its two operands is found once; later pairs of these types only take NumPy's broadcasting.
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
_unwrap_others = tl.core._unwrap_if_constexpr
_dtype_of = interpreter._get_np_dtype
_NUMPY_DTYPES: dict = {}
_BLOCK_TYPES: dict = {}
_OPERANDS: dict = {}
_EXPANDED: dict = {}
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
    tl.core._unwrap_if_constexpr = _unwrap
    interpreter._patch_attr = _patch_attr
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
        self.sizes, self.of_tensor = shape, _shape(shape)
        _BLOCK_TYPES[key] = vars(self).copy()
    vars(self).update(_BLOCK_TYPES[key])


def _init_tensor(self, handle, type) -> None:
    """As the language's own, but that equal shapes are one."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _SCALAR


def _shape(sizes: tuple[int, ...]) -> tuple:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


_SCALAR = _shape(())


def _is_dtype(self, other) -> bool:
    return self.name == other.name if type(other) is tl.dtype else _compare_others(self, other)


def _patch_attr(owner, name, member, builder, scope) -> None:
    scope.set_attr(owner, name, _interpreted(member, builder))


@functools.cache
def _interpreted(member, builder):
    """The interpreter's meaning of a function of the language, without what looks at its keywords on the way."""
    function, semantic = getattr(member, "__wrapped__", member), _Semantic(builder)

    def interpreted(*args, **keywords):
        keywords["_semantic"] = semantic
        return function(*args, **keywords)

    return interpreted


class _Semantic(TritonSemantic):
    """Triton's own, but that what an operation makes of its operands' types is found once."""

    def binary_op_type_checking_impl(self, lhs, rhs, *flags, **named_flags):
        key = _kind(lhs), _kind(rhs), flags, *named_flags.items()
        return _operands(self, super().binary_op_type_checking_impl, key, lhs, rhs, *flags, **named_flags)

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.type.name == rhs.type.name:
            return lhs, rhs
        return _operands(self, super().broadcast_impl_value, (lhs.type.name, rhs.type.name), lhs, rhs)

    def expand_dims(self, input, axis):
        key = input.type.name, axis
        if key not in _EXPANDED:
            expanded = super().expand_dims(input, axis)
            _EXPANDED[key] = expanded.type
            return expanded
        type = _EXPANDED[key]
        return tl.tensor(TensorHandle(input.handle.data.reshape(type.sizes), input.handle.dtype), type)


def _kind(operand):
    """What decides how an operand is converted: a tensor's type, a number itself (0.0 and -0.0 are equal, but two)."""
    return operand.type.name if isinstance(operand, tl.tensor) else repr(operand)


def _operands(semantic, find, key, lhs, rhs, *flags, **named_flags):
    known = _OPERANDS.get(key)
    if known is None:
        left, right = find(lhs, rhs, *flags, **named_flags)
        _OPERANDS[key] = _becomes(lhs, left), _becomes(rhs, right)
        return left, right
    left, right = known
    return (
        lhs if left is None else _converted(semantic, lhs, left),
        rhs if right is None else _converted(semantic, rhs, right),
    )


def _becomes(operand, converted):
    """What all operands of its kind become: tensors of this type, None as they are, or of a number this tensor."""
    if not isinstance(operand, tl.tensor):
        return converted
    return None if converted.type.name == operand.type.name else converted.type


def _converted(semantic, operand, found):
    if isinstance(found, tl.tensor):
        return found
    if operand.dtype.name != found.scalar.name:
        operand = semantic.cast(operand, found.scalar)
    if operand.type.name == found.name:
        return operand
    return tl.tensor(TensorHandle(np.broadcast_to(operand.handle.data, found.sizes), operand.handle.dtype), found)


def _unwrap(value):
    return value if isinstance(value, tl.tensor) else _unwrap_others(value)


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


def _refuse(operands) -> None:
    for operand in operands:
        if isinstance(operand, (TensorHandle, tl.tensor)) and operand.dtype.scalar.name == "bf16":
            raise TypeError("bfloat16 arithmetic in the interpreter: cast to float32 first")


def _refusing(method):
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        _refuse((*args, *kwargs.values()) if kwargs else args)
        return method(self, *args, **kwargs)

    return checked


def _check(self, tensors) -> None:
    """Reductions and scans call this first; they work on the arrays and never reach the builder."""
    _check_reduced(self, tensors)
    _refuse(tensors)


def _widened(handle: TensorHandle) -> TensorHandle:
    """Bfloat16 is the upper half of a float32."""
    if handle.dtype.scalar.name != "bf16":
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
