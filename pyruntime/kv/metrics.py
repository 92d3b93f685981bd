"""A block pool's statistics as metrics: flat, to be added up, and in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["FAMILIES", "Family", "families", "flatten", "to_prometheus"]


class Family(NamedTuple):
    """Metrics of one name."""

    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    text: str
    labels: tuple[str, ...] = ()


FAMILIES = {
    "blocks": Family("gauge", "KV blocks by group and state", ("group", "state")),
    "memory_bytes": Family("gauge", "Bytes of a shared budget that KV blocks have"),
    "sequences": Family("gauge", "Open sequences, pins among them"),
    "promised_blocks": Family("gauge", "KV blocks that sequences were promised and do not hold"),
    "nodes": Family("gauge", "Blocks of content known"),
    "pins": Family("gauge", "Pins of programs that call tools"),
    "pinned_blocks": Family("gauge", "KV blocks that pins hold, with repetitions"),
    "steps": Family("counter", "Steps by whether they fitted", ("result",)),
    "admissions": Family("counter", "Prompts admitted"),
    "prompt_tokens": Family("counter", "Prompt tokens looked for, and found", ("result",)),
    "allocated_blocks": Family("counter", "KV blocks handed out"),
    "extended_blocks": Family("counter", "Of them those right behind the sequence's last"),
    "extents": Family("counter", "Runs of KV blocks begun elsewhere"),
    "evicted_blocks": Family("counter", "Cached KV blocks given up, by reason", ("reason",)),
    "settled_blocks": Family("counter", "Full KV blocks by what became of them", ("result",)),
    "copied_blocks": Family("counter", "KV blocks copied before they were written"),
    "moved_slots": Family("counter", "Slots packed"),
    "pins_ended": Family("counter", "Pins that ended or were not made, by reason", ("reason",)),
    "score_faults": Family("counter", "User score functions that did not answer"),
    "swapped_blocks": Family("gauge", "KV blocks on the host"),
    "swaps": Family("counter", "Copies to or from the host, by how they ended", ("result",)),
    "swap_bytes": Family("counter", "Bytes copied to or from the host"),
    "swap_clean_blocks": Family("counter", "Blocks swapped out whose copy was there still"),
    "swap_copies": Family("counter", "Contiguous pieces they were copied in"),
    "swap_seconds": Family("counter", "Time that copies took"),
    "swap_wait_seconds": Family("counter", "Time that steps waited for them"),
    "disk_blocks": Family("gauge", "KV blocks on disk"),
    "disk_asked_blocks": Family("counter", "Prompts' KV blocks asked of the disk", ("result",)),
    "disk_stored_blocks": Family("counter", "KV blocks written to disk"),
    "disk_lost_blocks": Family("counter", "KV blocks not on disk any more, or never", ("reason",)),
    "disk_bytes": Family("counter", "Bytes of KV blocks on disk", ("direction",)),
    "disk_failures": Family("counter", "Reads and writes of the disk that failed"),
    "step_seconds": Family("histogram", "Time of a step in the pool", ("le",)),
}


def flatten(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return `BlockPool.stats` as numbers by name and labels, ``name|label|...``.

    Those of several pools may be added up.

    Examples
    --------
    >>> from pyruntime.kv import BlockPool
    >>> flatten(BlockPool(64).stats())["blocks|0|free"]
    64
    """
    flat: dict[str, float] = {
        "memory_bytes": stats.get("memory_bytes", 0),
        "sequences": stats["open_seqs"],
        "promised_blocks": stats["promised"],
        "nodes": stats["nodes"],
        "pins": stats["pins"],
        "pinned_blocks": stats["pinned_blocks"],
        "steps|fitted": stats["steps"],
        "steps|refused": stats["failed_steps"],
        "admissions": stats["admissions"],
        "prompt_tokens|asked": stats["asked_tokens"],
        "prompt_tokens|found": stats["hit_tokens"],
        "allocated_blocks": stats["allocated"],
        "extended_blocks": stats["extended"],
        "extents": stats["extents"],
        "copied_blocks": stats["copies"],
        "moved_slots": stats["moves"],
        "score_faults": stats["score_faults"],
        "swapped_blocks": stats.get("swapped", 0),
        "swap_bytes": stats.get("swap_bytes", 0),
        "swap_copies": stats.get("swap_descriptors", 0),
        "swap_clean_blocks": stats.get("swap_clean", 0),
        "swap_seconds": stats.get("swap_copy_ns", 0) / 1e9,
        "swap_wait_seconds": stats.get("swap_wait_ns", 0) / 1e9,
    }
    flat |= {
        "disk_blocks": stats.get("disk_items", 0),
        "disk_asked_blocks|found": stats.get("disk_found", 0),
        "disk_asked_blocks|missing": stats.get("disk_asked", 0) - stats.get("disk_found", 0),
        "disk_stored_blocks": stats.get("disk_stored", 0),
        "disk_bytes|read": stats.get("disk_bytes_read", 0),
        "disk_bytes|written": stats.get("disk_bytes_written", 0),
        "disk_failures": stats.get("disk_failures", 0),
    }
    for reason in ("evicted", "corrupt", "dropped"):
        flat[f"disk_lost_blocks|{reason}"] = stats.get(f"disk_{reason}", 0)
    bad = {name: stats.get(f"swap_{name}", 0) for name in ("failed", "cancelled")}
    flat["swaps|done"] = stats.get("swap_finished", 0) - sum(bad.values())
    flat |= {f"swaps|{name}": count for name, count in bad.items()}
    for number, group in enumerate(stats["groups"]):
        states = {name: group[name] for name in ("free", "reserved", "cached")}
        if "withheld" in group:
            states["withheld"] = group["withheld"]
        states["held"] = group["num_blocks"] - sum(states.values())
        flat |= {f"blocks|{number}|{state}": count for state, count in states.items()}
    flat |= {f"evicted_blocks|{reason}": n for reason, n in stats["evicted"].items()}
    for result in ("published", "duplicates", "unpublished"):
        flat[f"settled_blocks|{result}"] = stats[result]
    for reason in ("expired", "ended", "pressed", "refused"):
        flat[f"pins_ended|{reason}"] = stats[f"pins_{reason}"]
    total = 0
    for bucket, count in enumerate(stats["step_us"]):
        total += count
        last = bucket == len(stats["step_us"]) - 1
        flat[f"step_seconds|{'+Inf' if last else 2**bucket / 1e6}"] = total
    flat["step_seconds|sum"] = stats["step_ns"] / 1e9
    return flat


def families(
    flat: Mapping[str, float],
) -> Iterator[tuple[str, Family, list[tuple[tuple[str, ...], float]]]]:
    """Yield name, family, and (label values, number) of each, from what `flatten` returned.

    A histogram's last one is its sum.
    """
    found: dict[str, list[tuple[tuple[str, ...], float]]] = {}
    for key, value in flat.items():
        name, *labels = key.split("|")
        found.setdefault(name, []).append((tuple(labels), value))
    for name, family in FAMILIES.items():
        if name in found:
            yield name, family, found[name]


def to_prometheus(stats: Mapping[str, Any], prefix: str = "pyruntime_kv_") -> str:
    """Return `BlockPool.stats` in Prometheus's text format."""
    lines = []
    for name, family, values in families(flatten(stats)):
        full = prefix + name
        suffix = {"counter": "_total", "histogram": "_bucket"}.get(family.kind, "")
        lines += [f"# HELP {full}{suffix if suffix == '_total' else ''} {family.text}"]
        lines += [f"# TYPE {full}{suffix if suffix == '_total' else ''} {family.kind}"]
        for labels, value in values:
            if labels == ("sum",) and family.kind == "histogram":
                lines.append(f"{full}_sum {value}")
                continue
            given = ",".join(f'{k}="{v}"' for k, v in zip(family.labels, labels, strict=True))
            lines.append(f"{full}{suffix}{'{' + given + '}' if given else ''} {value}")
            if labels == ("+Inf",):
                lines.append(f"{full}_count {value}")
    return "\n".join(lines) + "\n"
