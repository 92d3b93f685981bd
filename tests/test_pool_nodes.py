"""Pools on several NUMA nodes, on a topology that threads only claim to be on."""

import threading

import pytest

from pyruntime import errors
from pyruntime.pool import NodePools

NODES = [2, 0, 5]
EACH = 40


class Claim(threading.local):
    """The node that a thread says it is on."""

    node = 2

    def __call__(self):
        return self.node


@pytest.fixture
def claim():
    return Claim()


@pytest.fixture
def pools(claim):
    with NodePools(64, EACH, nodes=NODES, node_of=claim, check="state") as pools:
        yield pools


def held(pools):
    return {node: pool.num_bufs for node, pool in pools.pools.items()}


def test_a_thread_gets_memory_of_its_node(pools, claim):
    def take(node):
        claim.node = node
        assert pools.home() is pools.pools[node]
        bufs[node] = [pools.acquire() for _ in range(EACH)]

    bufs = {}
    threads = [threading.Thread(target=take, args=(node,)) for node in NODES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(pools) == dict.fromkeys(NODES, EACH)
    for node in NODES:
        inside = pools.pools[node].stats()
        assert inside["in_use"] == EACH
    bufs.clear()  # on a thread of another node: back to where they came from all the same
    assert held(pools) == dict.fromkeys(NODES, 0)
    assert [s["in_use"] for s in pools.stats().values()] == [0, 0, 0]


def test_an_exhausted_node_borrows_in_order(pools, claim):
    claim.node = 0
    bufs = [pools.acquire() for _ in range(EACH)]
    assert held(pools) == {2: 0, 0: EACH, 5: 0}
    bufs += [pools.acquire() for _ in range(EACH)]
    assert held(pools) == {2: 0, 0: EACH, 5: EACH}
    bufs += [pools.acquire() for _ in range(EACH)]
    assert pools.try_acquire() is None
    with pytest.raises(errors.CapacityError, match="exhausted"):
        pools.acquire()
    bufs.clear()


def test_an_unknown_node_counts_as_the_first(pools, claim):
    claim.node = 63
    assert pools.home() is pools.pools[2]


def test_closing_waits_for_objects(pools):
    buf = pools.acquire()
    for force in (False, True):
        with pytest.raises(errors.StateError, match="1 objects"):
            pools.close(force=force)
    assert not any(pool.closed for pool in pools.pools.values())
    buf.release()
    pools.close()
    pools.close()
    with pytest.raises(errors.ClosedError):
        pools.acquire()


@pytest.mark.parametrize("nodes", [[], [1, 1], [-1], [64]])
def test_bad_nodes(nodes):
    with pytest.raises(errors.InvalidArgumentError):
        NodePools(64, 10, nodes=nodes)


def test_all_nodes_of_the_machine_by_default():
    with NodePools(64, 10) as pools:
        assert pools.home() in pools.pools.values()
        pools.acquire().release()
