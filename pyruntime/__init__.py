"""pyruntime: a low-level systems runtime with native cores, Python first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyruntime import errors
from pyruntime._ext import _native

if TYPE_CHECKING:
    from pyruntime.engine.llm import LLM

__all__ = ["LLM", "__version__", "errors", "set_num_threads"]

__version__ = _native.version()

if _native.abi_version() != _native.ABI_VERSION:  # a stale library beside a new module
    raise errors.VersionError(
        f"libpyruntime has ABI {_native.abi_version()}, the bindings were built for "
        f"{_native.ABI_VERSION}; rebuild with `pip install -e .`"
    )


def set_num_threads(size: int) -> None:
    """Resize the process's one thread pool.

    Parameters
    ----------
    size : int
        Threads that work on a native call, the caller's included (1..1024). The default is the
        number of CPUs the process may run on, or ``PYRUNTIME_THREADS``.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        `size` is out of range; the pool is unchanged.
    """
    _native.threads_resize(size)


def __getattr__(name: str) -> Any:
    if name == "LLM":  # imported on use: it needs the extra `serve`
        from pyruntime.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'pyruntime' has no attribute {name!r}")
