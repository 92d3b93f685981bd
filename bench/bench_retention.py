"""Agent programs on the model that ships: what keeping their KV blocks during tool calls saves.

After Continuum (arXiv 2511.02230): a number of programs is always on; each turn adds a tool's
output to the conversation, tools take a log-normal time, and the KV cache holds a part of all
conversations only. The rules and plain LRU serve the same programs, in turns, in real time: a
program's time is from its first turn's arrival to its last one's end.
"""

import time

import numpy as np

from bench.support import middle, size
from pyruntime.engine.llm import BLOCK_SIZE, make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.models import shipped

RULES = (None, "fixed", "formula")
BLOCK_BYTES = BLOCK_SIZE * 4096


class Program:
    """A conversation of several turns; what tools answer and how long they take is its own."""

    def __init__(self, seed, turns):
        rng = np.random.default_rng(seed)
        self.name = f"p{seed}"
        self.tokens = rng.integers(300, 2000, 320).tolist()
        self.answers = rng.integers(300, 2000, (turns, 64)).tolist()
        self.tools = [("quick", "slow")[int(kind)] for kind in rng.random(turns) < 0.3]
        self.seconds = [
            float(rng.lognormal(np.log(0.2 if tool == "quick" else 2.0), 0.5))
            for tool in self.tools
        ]
        self.turn, self.due, self.begin = 0, 0.0, 0.0

    def submit(self, loop):
        last = self.turn == len(self.answers) - 1
        id = f"{self.name}/{self.turn}"
        sampling = SamplingParams()
        loop.submit(
            Submit(
                id,
                self.tokens,
                sampling,
                16,
                ignore_eos=True,
                program=self.name,
                last_turn=last,
                tool=self.tools[self.turn],
            )
        )

    def answered(self, tokens, now):
        """Take a turn's tokens in; whether the program is over."""
        self.tokens = self.tokens + tokens + self.answers[self.turn]
        self.due = now + self.seconds[self.turn]
        self.turn += 1
        return self.turn == len(self.answers)


def serve(rule, programs, at_a_time, blocks):
    """Serve programs, so many at a time; return seconds of each, and the share found in memory."""
    loop = make_loop(shipped(), kv_bytes=blocks * BLOCK_BYTES, retention=rule)
    waiting, away, served, out, times = list(programs), [], {}, {}, []
    now = time.monotonic()
    for program in waiting[:at_a_time]:
        program.begin = program.due = now
        away.append(program)
    del waiting[:at_a_time]
    while away or served:
        now = time.monotonic()
        for program in [p for p in away if p.due <= now]:
            away.remove(program)
            served[f"{program.name}/{program.turn}"] = program
            program.submit(loop)
        if not loop.busy:
            time.sleep(max(0.0, min(p.due for p in away) - time.monotonic()))
            continue
        for delta in loop.step():
            out.setdefault(delta.id, []).extend(delta.tokens)
            if not delta.finish_reason:
                continue
            assert delta.finish_reason == "length", delta
            program, now = served.pop(delta.id), time.monotonic()
            if not program.answered(out.pop(delta.id), now):
                away.append(program)
                continue
            times.append(now - program.begin)
            if waiting:
                following = waiting.pop(0)
                following.begin = following.due = now
                away.append(following)
    stats = loop.stats
    return times, stats.cached_tokens / stats.prompt_tokens, loop.pool.stats()


def test_programs(benchmark):
    count, turns, rounds = size(benchmark, (32, 6, 3), (3, 2, 1))
    blocks = size(benchmark, 240, 80)
    figures = {rule: [] for rule in RULES}
    benchmark.group = "agent programs"

    def all_rules():
        for turn in range(rounds):
            for rule in RULES:
                programs = [Program(100 * turn + i, turns) for i in range(count)]
                times, found, stats = serve(rule, programs, min(16, count), blocks)
                p95 = float(np.percentile(times, 95))
                figures[rule].append((float(np.mean(times)), p95, found, stats["pins_made"]))

    benchmark.pedantic(all_rules, rounds=1)
    for rule, rows in figures.items():
        mean, p95, found, pins = (middle(column) for column in zip(*rows, strict=True))
        benchmark.extra_info[rule or "lru"] = {
            "mean_s": round(mean, 2),
            "p95_s": round(p95, 2),
            "prompt_tokens_found": round(found, 3),
            "pins": pins,
        }
