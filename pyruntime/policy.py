"""C function pointers across the C ABI: ABI functions for ``numba.njit`` and ctypes, and callbacks.

A compiled Python function calls the ABI as directly as C does, and the ABI calls back compiled
Python functions. This is the only module that knows about numba.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pyruntime._ext._cffi import ffi, lib
from pyruntime.errors import InvalidArgumentError, NotFoundError

__all__ = ["c_function", "callback_address"]

_SIGNED = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
_UNSIGNED = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_FLOATS = {4: ctypes.c_float, 8: ctypes.c_double}


def _ctype(kind: Any) -> Any:
    if kind.kind == "void":
        return None
    if kind.kind in ("pointer", "function"):
        return ctypes.c_void_p
    if kind.kind == "primitive":
        size = ffi.sizeof(kind)
        if kind.cname in ("float", "double"):
            return _FLOATS[size]
        return (_SIGNED if int(ffi.cast(kind, -1)) < 0 else _UNSIGNED)[size]
    raise InvalidArgumentError(f"{kind.cname} cannot be passed by value to compiled code")


def c_function(name: str) -> Any:
    """Give a function of the C ABI with its C signature, for ctypes and ``numba.njit``.

    Parameters
    ----------
    name : str
        E.g. ``"pyrt_pool_get"``.

    Returns
    -------
    ctypes function pointer
        Pointers are ``c_void_p``; pass ``array.ctypes.data`` (``.ctypes`` works inside njit code).
        numba calls it without the interpreter; status codes are the caller's to check.

    Raises
    ------
    pyruntime.errors.NotFoundError
        The ABI has no such function.
    """
    try:
        function = ffi.addressof(lib, name)
    except (AttributeError, TypeError):
        raise NotFoundError(f"the C ABI has no function {name!r}") from None
    signature = ffi.typeof(function).item if ffi.typeof(function).kind == "pointer" else None
    signature = signature or ffi.typeof(function)
    prototype = ctypes.CFUNCTYPE(_ctype(signature.result), *map(_ctype, signature.args))
    return prototype(int(ffi.cast("uintptr_t", function)))


def callback_address(function: Any) -> int:
    """Give the address of a compiled function, for options of the ABI that take a callback.

    Parameters
    ----------
    function : numba cfunc, ctypes function pointer or int
        The caller keeps it alive as long as the ABI may call it.

    Returns
    -------
    int
        Never 0.
    """
    address = getattr(function, "address", function)  # numba.cfunc
    if callable(address) and hasattr(address, "argtypes"):  # ctypes
        address = ctypes.cast(address, ctypes.c_void_p).value
    if not isinstance(address, int) or isinstance(address, bool) or address <= 0:
        raise InvalidArgumentError(
            f"{function!r} has no address; pass a numba cfunc, a ctypes function or an address"
        )
    return address
