"""Scheduling for LLM serving: events in, step plans out."""

from pyruntime.sched.compose import PRESETS, Explanation, KvView, Policy, preset
from pyruntime.sched.core import Scheduler
from pyruntime.sched.model import Request, Resources, State
from pyruntime.sched.parts import (
    ChunkedPrefill,
    Fcfs,
    LayeredPrefill,
    PromptFits,
    TailRecompute,
    TailSwap,
)
from pyruntime.sched.plan import Preempt, StepPlan, make_plan

__all__ = [
    "PRESETS",
    "ChunkedPrefill",
    "Explanation",
    "Fcfs",
    "KvView",
    "LayeredPrefill",
    "Policy",
    "Preempt",
    "PromptFits",
    "Request",
    "Resources",
    "Scheduler",
    "State",
    "StepPlan",
    "TailRecompute",
    "TailSwap",
    "make_plan",
    "preset",
]
