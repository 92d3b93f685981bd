"""Pools on every NUMA node, used as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyruntime._ext import _native
from pyruntime.errors import CapacityError, InvalidArgumentError, StateError
from pyruntime.pool.arguments import leave
from pyruntime.pool.objects import Buf, Pool

__all__ = ["NodePools"]


class NodePools:
    """One `Pool` on each NUMA node: objects come from the calling thread's node.

    A `Buf` goes back to the pool it came from, whichever thread drops it. Indices are those of one
    pool, so bulk calls are made on `home()`, which is the thread's own.

    Parameters
    ----------
    object_bytes, capacity : int
        As of `Pool`; `capacity` is that of each node.
    nodes : sequence of int, optional
        Nodes (0..63), in the order in which they help each other out. Default: all of the machine.
    node_of : callable, optional
        Returns the node of the calling thread, as a scheduler that pins threads knows it; one that
        is not among `nodes` counts as the first. Default: where the thread runs at that moment.
    **options
        Of each `Pool`, but for `node`.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        There are no nodes, one comes twice, or an option is outside its range.
    pyruntime.errors.OutOfMemoryError
        The system gives no memory.

    Notes
    -----
    A node that does not exist or refuses memory falls back to another, which ``fallbacks`` of its
    pool's `stats` counts. For C and C++ the same is in ``pyruntime/pool_nodes.h``.

    Examples
    --------
    >>> with NodePools(2048, capacity=1000) as pools:
    ...     buf = pools.acquire()
    ...     buf.release()
    """

    def __init__(
        self,
        object_bytes: int,
        capacity: int,
        *,
        nodes: Sequence[int] | None = None,
        node_of: Callable[[], int] | None = None,
        **options: Any,
    ) -> None:
        wanted = _native.nodes() if nodes is None else list(nodes)
        if not wanted or len(set(wanted)) != len(wanted):
            raise InvalidArgumentError(f"nodes is {wanted}; it must name different nodes")
        self._node_of = _native.current_node if node_of is None else node_of
        pools: dict[int, Pool] = {}
        try:
            for node in wanted:
                pools[node] = Pool(object_bytes, capacity, node=node, **options)
        except BaseException:
            for pool in pools.values():
                pool.close()
            raise
        self._pools = pools
        self._order = wanted

    @property
    def pools(self) -> dict[int, Pool]:
        """The pool of each node, by node."""
        return dict(self._pools)

    def home(self) -> Pool:
        """Return the pool of the calling thread's node."""
        return self._pools[self._home()]

    def _home(self) -> int:
        node = self._node_of()
        return node if node in self._pools else self._order[0]

    def try_acquire(self) -> Buf | None:
        """Take one object out, of this thread's node if it has one, or return None."""
        home = self._home()
        buf = self._pools[home].try_acquire()
        if buf is None:
            at = self._order.index(home)
            for node in self._order[at + 1 :] + self._order[:at]:
                buf = self._pools[node].try_acquire()
                if buf is not None:
                    break
        return buf

    def acquire(self) -> Buf:
        """Take one object out, of this thread's node if it has one.

        Raises
        ------
        pyruntime.errors.CapacityError
            Every node is exhausted.
        """
        buf = self.try_acquire()
        if buf is None:
            raise CapacityError(
                f"the pools of nodes {self._order} are exhausted; release objects or raise capacity"
            )
        return buf

    def stats(self) -> dict[int, dict[str, int]]:
        """Return the statistics of each node's pool, by node; see `Pool.stats`."""
        return {node: pool.stats() for node, pool in self._pools.items()}

    def close(self, *, force: bool = False) -> None:
        """Unmap the memory of all nodes; closing twice does nothing. See `Pool.close`.

        Raises
        ------
        pyruntime.errors.StateError
            Objects are out; all pools stay open then.
        BufferError
            Arrays over a pool are alive.
        """
        live = [pool for pool in self._pools.values() if not pool.closed]
        out = sum(pool.num_bufs if force else pool.stats()["in_use"] for pool in live)
        if out:
            raise StateError(f"{out} objects are still out; release them before closing")
        for pool in live:
            pool.close(force=force)

    def __enter__(self) -> NodePools:
        """Return the pools themselves."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close, unless an exception is on its way and objects are still out."""
        leave(self.close, self, error)

    def __repr__(self) -> str:
        """Say what the pools are, without walking them."""
        return f"<NodePools {self._pools}>"
