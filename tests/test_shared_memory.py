"""The KV cache and the experts on one budget: who gives way, and that the text is the same."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest

from pyruntime import LLM, errors
from pyruntime.engine.llm import BLOCK_SIZE, STEP_TOKENS, make_loop
from pyruntime.engine.memory import plan_memory
from pyruntime.engine.messages import Submit
from pyruntime.engine.quantize import quantize
from pyruntime.kv import BlockMemory, BlockPool, KvGroup, KvStorage, ServingPool
from pyruntime.models import shipped
from pyruntime.pool import UNIT_BYTES, Budget
from tests.stepping import DATA

MIB = 1 << 20
KV = 4 * MIB
RUNNING = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "tiny"
    quantize(shipped(), out, layout="422")
    return out


@pytest.fixture(scope="module")
def unlimited(directory):
    return LLM(directory)


def budget_for(llm, shared):
    """A budget that leaves `shared` bytes to experts and the KV cache."""
    engine = llm.loop.engine
    tokens = STEP_TOKENS + RUNNING
    for budget in range(shared, shared + 64 * MIB, MIB // 4):
        with contextlib.suppress(errors.CapacityError):
            plan = plan_memory(
                budget, engine.config, engine.weights.dense_bytes, 0, 0, shared, tokens, RUNNING
            )
            return budget if plan.shared == shared else None
    raise AssertionError("no budget is enough")


def resident_at(address):
    """Resident bytes of the mapping at an address."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            name, _, rest = line.partition(" ")
            if "-" in name and not name.endswith(":"):
                low, high = (int(end, 16) for end in name.split("-"))
                inside = low <= address < high
            elif inside and name == "Rss:":
                return int(rest.split()[0]) << 10
    raise AssertionError("no such mapping")


def prompts(tokens, n, length, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, tokens, length).tolist() for _ in range(n)]


def drive(loop, submits, each=lambda: None):
    texts = {}
    for submit in submits:
        assert loop.submit(submit).finish_reason is None
        texts[submit.id] = []
    while loop.busy:
        for delta in loop.step():
            assert not delta.error, delta.error
            texts[delta.id] += delta.tokens
        each()
    return texts


def submits(llm, n=12, length=300, out=24):
    some = prompts(llm.loop.engine.config.vocab_size, n, length)
    return [Submit(f"r{i}", each, max_tokens=out, ignore_eos=True) for i, each in enumerate(some)]


def test_experts_give_way_as_the_kv_cache_grows(directory, unlimited):
    want = drive(unlimited.loop, submits(unlimited))
    shared = KV + 2 * UNIT_BYTES
    budget = budget_for(unlimited, shared)
    assert budget // 4 >= KV
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    experts, memory = loop.engine.experts, loop.pool._memory
    whole = experts._live().statistics()["limit_bytes"]
    assert shared <= whole < shared + UNIT_BYTES
    # Before anything is written, all of it is the experts'.
    for layer in experts.store.layers:
        experts.prefetch(layer, range(experts.store.num_experts), bits=8)
    experts.drain()
    before = experts.stats()
    assert before["capacity_bytes"] > shared - KV and memory.reserved_bytes == 0
    seen = []
    keys = loop.engine.kv.keys[0].ctypes.data

    def check():
        stats = experts.stats()
        used = stats["capacity_bytes"] + memory.reserved_bytes
        assert stats["resident_bytes"] <= stats["capacity_bytes"]
        assert used <= whole
        assert memory.opened[0] * loop.engine.kv_bytes // loop.pool.num_blocks <= KV
        tables = {
            block
            for known in loop.pool._requests.values()
            for block in loop.pool.pool.tables([known.seq], width=known.blocks or 1).ravel()
        }
        assert max(tables, default=-1) < memory.opened[0]
        seen.append((memory.reserved_bytes, stats["capacity_bytes"], resident_at(keys)))
        experts.verify()
        loop.pool.check()

    assert drive(loop, submits(unlimited), check) == want
    reserved, capacity, kv = zip(*seen, strict=True)
    assert reserved[-1] == KV and list(reserved) == sorted(reserved)
    assert capacity[-1] < before["capacity_bytes"]
    slack = 4096 * 2 * loop.engine.config.num_layers  # a page on the mark, of each part
    assert all(there <= granted + slack for there, granted in zip(kv, reserved, strict=True))
    assert kv[0] > 0 and kv[-1] > KV // 2
    assert loop.pool.stats()["memory_bytes"] == KV
    flat = loop.snapshot()
    assert flat["kv"]["memory_bytes"] == KV and flat["kv"]["blocks|0|withheld"] == 0
    assert loop.stats.step_errors == 0


def test_refinements_are_the_first_to_go(directory, unlimited):
    budget = budget_for(unlimited, 10 * MIB)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    experts, memory = loop.engine.experts, loop.pool._memory
    for layer in experts.store.layers:
        experts.prefetch(layer, range(experts.store.num_experts), bits=8)
    experts.drain()
    other = memory._budget.register("others", priority=1)
    seen = []
    while memory._budget.available_bytes + experts.spare_bytes() > 0:
        other.reserve(UNIT_BYTES)
        seen.append(experts.stats()["resident"])
        experts.verify()
    base, refinements = [n[0] for n in seen], [sum(n[1:]) for n in seen]
    assert refinements[0] > 0 == refinements[-1] and base[0] > base[-1]
    assert all(n == base[0] for n, finer in zip(base, refinements, strict=True) if finer)
    assert base[-1] >= len(experts.store.layers)  # a floor in each
    assert experts.stats()["capacity_bytes"] == experts._least_bytes
    with pytest.raises(errors.CapacityError):
        other.reserve(UNIT_BYTES)
    other.close(force=True)


def test_what_others_hold_is_back_pressure(directory, unlimited):
    few = submits(unlimited, n=6, length=200, out=40)
    want = drive(unlimited.loop, few)
    budget = budget_for(unlimited, KV + 2 * UNIT_BYTES)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    memory, experts = loop.pool._memory, loop.engine.experts
    other = memory._budget.register("other", priority=5)
    # What is left is enough for two requests, not for four.
    bytes_of_one = -(-240 // BLOCK_SIZE) * loop.engine.kv_bytes // loop.pool.num_blocks
    leave = -(-2 * bytes_of_one // UNIT_BYTES) * UNIT_BYTES
    other.reserve(memory._budget.limit_bytes - experts._least_bytes - leave)
    most = []
    running = lambda: most.append(len(loop.scheduler.running))  # noqa: E731
    assert drive(loop, few, running) == want
    assert max(most) < RUNNING
    assert loop.pool.num_free < loop.pool.num_blocks
    assert memory.reserved_bytes <= leave
    assert loop.stats.step_errors == 0
    experts.verify()
    # With the memory back, all of it can be had again.
    other.close(force=True)
    assert drive(loop, submits(unlimited, n=8, length=300)) == drive(
        unlimited.loop, submits(unlimited, n=8, length=300)
    )
    assert memory.reserved_bytes == KV


def test_prefetches_on_their_way_do_not_stop_the_kv_cache(directory, unlimited):
    budget = budget_for(unlimited, KV + UNIT_BYTES)
    loop = make_loop(directory, kv_bytes=KV, max_running=RUNNING, memory_budget=budget)
    experts = loop.engine.experts

    def fetch():
        for layer in experts.store.layers:
            experts.prefetch(layer, range(experts.store.num_experts), bits=8)

    given = submits(unlimited)
    assert drive(loop, given, fetch) == drive(unlimited.loop, given)
    assert loop.pool._memory.reserved_bytes == KV
    assert loop.stats.step_errors == 0


def test_a_lone_request_reaches_the_limit(directory, unlimited):
    budget = budget_for(unlimited, KV + UNIT_BYTES)
    loop = make_loop(directory, kv_bytes=KV, max_running=1, memory_budget=budget)
    longest = min(loop.engine.config.max_len, loop.pool.num_blocks * BLOCK_SIZE) - 8
    [prompt] = prompts(loop.engine.config.vocab_size, 1, longest)
    given = [Submit("a", prompt, max_tokens=8, ignore_eos=True)]
    assert drive(loop, given) == drive(unlimited.loop, given)


@pytest.mark.parametrize("policy", ["swap", "layered"])
def test_other_policies_share_too(directory, unlimited, policy):
    given = submits(unlimited, n=10, length=400, out=24)
    want = drive(unlimited.loop, given)
    budget = budget_for(unlimited, KV + 4 * UNIT_BYTES) + 96 * MIB
    loop = make_loop(
        directory,
        policy=policy,
        kv_bytes=KV,
        max_running=RUNNING,
        memory_budget=budget,
        swap_bytes=4 * MIB if policy == "swap" else 0,
    )
    assert drive(loop, given) == want
    assert loop.stats.step_errors == 0
    loop.pool.check()


def test_a_plan_without_room_is_refused(directory, unlimited):
    engine = unlimited.loop.engine
    arguments = engine.config, engine.weights.dense_bytes, 0, KV, UNIT_BYTES, STEP_TOKENS, 4
    with pytest.raises(errors.CapacityError, match=r"kv at most 4\.0, experts at least 2\.0"):
        plan_memory(budget_for(unlimited, KV), *arguments)
    plan = plan_memory(budget_for(unlimited, KV + UNIT_BYTES), *arguments)
    assert plan.shared == KV + UNIT_BYTES


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_open_as_memory_is_granted(groups):
    layers = [KvGroup((i,), 64 * i, 16) for i in range(groups)]
    pool = BlockPool(64, groups=layers, num_layers=groups)
    budget = Budget(96 * MIB)
    holder = budget.register("holder")
    asked = []
    sizes = [300 << 10, 1 << 20][:groups]
    memory = BlockMemory(pool, budget, sizes, spare=lambda: 0, settle=lambda: asked.append(1))
    assert memory.opened == [0] * groups and pool.available() == 0
    assert memory.withheld == [64] * groups
    memory.open([1] * groups, [0] * groups)
    assert pool.available(group=0) == memory.opened[0] == UNIT_BYTES // sizes[0]
    assert memory.reserved_bytes == groups * UNIT_BYTES
    for left in (0, 1, 5, 11):
        holder.reserve(budget.available_bytes - left * UNIT_BYTES)
        could = memory.obtainable()
        cost = memory._more(could)
        assert sum(cost) <= left * UNIT_BYTES
        more = [n + 1 for n in could]
        before = memory.opened
        if could != memory.withheld:
            assert sum(memory._more(more)) > left * UNIT_BYTES
            memory.open(more, more)
            assert memory.opened == before and asked.pop() == 1
        memory.open(could, could)
        assert all(a >= b + n for a, b, n in zip(memory.opened, before, could, strict=True))
        assert not asked
        pool.check()
        holder.give_back(holder.reserved_bytes)
    memory.open([64] * groups, [0] * groups)
    assert memory.withheld == [0] * groups == memory.obtainable()
    assert [pool.available(group=g) for g in range(groups)] == [64] * groups


def test_blocks_are_written_from_the_lowest_on():
    pool = BlockPool(3000, block_size=16)
    ids = pool.take_blocks(3000)
    assert sorted(ids.tolist()) == list(range(3000))
    with pytest.raises(errors.CapacityError, match="are wanted and 0"):
        pool.take_blocks(1)
    pool.unpin_blocks(np.arange(10, dtype=np.uint32))
    assert sorted(pool.take_blocks(4).tolist()) == [0, 1, 2, 3] or pool.available() == 6
    pool.check()


def test_content_is_kept_while_there_is_memory():
    budget = Budget(16 * MIB)
    size = UNIT_BYTES // 4
    pool = ServingPool(16, memory=lambda blocks: BlockMemory(blocks, budget, [size]))
    for request in range(3):
        tokens = np.arange(64, dtype=np.int32) + 1000 * request
        pool.admit(request, tokens)
        pool.step([(request, 64)])
        pool.commit(request, 64, 1, tokens)
        pool.free(request)
    assert pool.stats()["groups"][0]["cached"] == 12
    assert pool.stats()["evicted"]["capacity"] == 0
    other = budget.register("other")
    other.reserve(budget.available_bytes)
    tokens = np.arange(128, dtype=np.int32) + 9000
    pool.admit(9, tokens)
    assert pool.dry_run([(9, 128)]) == pool.num_free - 8 >= 0
    pool.step([(9, 128)])
    assert pool.stats()["evicted"]["capacity"] > 0
    pool.check()


def test_small_pages_hold_what_was_written():
    storage = KvStorage.allocate([KvGroup((0, 1), 0, 16)], 32, 2, 8, small_pages=True)
    storage.keys[1][3] = 7
    assert storage.keys[1][3].min() == 7 and not storage.values[1].any()
    assert storage.nbytes == 2 * 2 * 32 * 16 * 2 * 8 * 4


PEAK = """
import resource, sys
import numpy as np
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine import quantize  # what imports take is not the budget's
def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
directory, budget, kv = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
before = resident()
loop = make_loop(directory, kv_bytes=kv, max_running=4, memory_budget=budget)
rng = np.random.default_rng(0)
peak = 0
for i in range(16):
    loop.submit(Submit(f"r{i}", rng.integers(3, 2000, 400).tolist(), max_tokens=24))
while loop.busy:
    loop.step()
    peak = max(peak, resident())
print(peak - before, loop.pool._memory.reserved_bytes, loop.stats.step_errors)
"""


def test_resident_memory_stays_within_the_budget(directory):
    budget = 64 * MIB
    command = [sys.executable, "-c", PEAK, str(directory), str(budget), str(16 * MIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, kv, failed = map(int, done.stdout.split())
    assert failed == 0 and kv == 16 * MIB
    assert peak <= 1.05 * budget


@pytest.mark.parametrize("case", ["mixtral_window", "qwen2moe"])
def test_windows_and_dense_layers_share_too(tmp_path, case):
    quantize(DATA / case, tmp_path / "q", layout="422")
    given = [
        Submit(f"r{i}", each, max_tokens=8, ignore_eos=True)
        for i, each in enumerate(prompts(90, 6, 60))
    ]
    want = drive(make_loop(tmp_path / "q", kv_bytes=MIB), given)
    loop = make_loop(tmp_path / "q", kv_bytes=MIB, max_running=2, memory_budget=64 * MIB)
    assert drive(loop, given) == want
    assert loop.pool._memory.reserved_bytes >= UNIT_BYTES
    loop.pool.check()
    loop.engine.experts.verify()
