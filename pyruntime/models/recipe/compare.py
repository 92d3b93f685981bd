"""Bits per byte of xz and of a 5-gram model on the held-out text, for comparison.

Usage: ``python compare.py CORPUS_DIRECTORY``. The 5-gram model is over bytes, interpolated after
Witten and Bell (1991), trained on the training text. xz is given the held-out text alone, and, as a
second figure, after the training text (within its window of 256 MiB).
"""

import lzma
import sys
from pathlib import Path

import numpy as np


def xz_bits(train, held):
    """Return bits per byte of `held` alone, and of `held` after `train`."""

    def size(data):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 28}]
        return len(lzma.compress(data, lzma.FORMAT_XZ, filters=filters))

    alone = size(held)
    after = size(train + held) - size(train)
    return 8 * alone / len(held), 8 * after / len(held)


def ngram_bits(train, held, order=5):
    """Return bits per byte of a Witten-Bell interpolated byte n-gram model."""
    a, b = np.frombuffer(train, np.uint8), np.frombuffer(held, np.uint8)
    probability = np.full(len(b) - order + 1, 1 / 256)
    for size in range(1, order + 1):

        def windows(data, size=size):
            code = np.zeros(len(data) - order + 1, np.uint64)
            for i in range(order - size, order):
                code = code << np.uint64(8) | data[i : len(data) - order + 1 + i]
            return code

        grams, counts = np.unique(windows(a), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        types = np.diff(np.append(first, len(grams)))

        def look_up(keys, values, wanted):
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            return np.where(keys[at] == wanted, values[at], 0)

        wanted = windows(b)
        count = look_up(grams, counts, wanted)
        total = look_up(contexts, totals, wanted >> np.uint64(8))
        kinds = look_up(contexts, types, wanted >> np.uint64(8))
        seen = total > 0
        probability[seen] = (count[seen] + kinds[seen] * probability[seen]) / (
            total[seen] + kinds[seen]
        )
    return -np.log2(probability).mean()


if __name__ == "__main__":
    texts = [(Path(sys.argv[1]) / f"{split}.txt").read_bytes() for split in ("train", "held_out")]
    train, held = (text.replace(b"<|endoftext|>", b"") for text in texts)
    print(f"5-gram: {ngram_bits(train, held):.4f} bits/byte")
    print(
        "xz: {:.4f} bits/byte alone, {:.4f} after the training text".format(*xz_bits(train, held))
    )
