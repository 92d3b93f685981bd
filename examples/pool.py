"""Packets in a memory pool: written in bulk, read as arrays, shared by threads without copies."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pyruntime.pool import Pool

PACKET = np.dtype([("source", "u4"), ("length", "u2"), ("payload", "u1", 1514)])


def checksum(pool: Pool, indices: np.ndarray) -> int:
    packets = pool.read(indices)
    pool.release_from(indices)  # by another thread than the one that took them out
    return int(packets.astype(np.uint64).sum())


def main() -> None:
    with Pool(PACKET.itemsize, capacity=100_000, prefault="sync") as pool:
        print(f"{pool!r}: {pool.coverage():.0%} of its memory on huge pages")
        rng = np.random.default_rng(0)
        batches, expected = [], 0
        for _ in range(100):
            indices = np.empty(256, np.uint32)
            pool.acquire_into(indices)
            data = rng.integers(0, 256, (256, PACKET.itemsize), np.uint8)
            pool.write(indices, data)
            batches.append(indices)
            expected += int(data.astype(np.uint64).sum())
        with ThreadPoolExecutor(4) as threads:
            total = sum(threads.map(lambda batch: checksum(pool, batch), batches))
        assert total == expected

        with pool.acquire() as buf:  # one object as a buffer; a view keeps it out
            packet = pool.view(buf, PACKET, 1)[0]
            packet["source"], packet["length"] = 0x0A000001, 64
            print(f"object {buf.index} holds a packet of {packet['length']} bytes")
            del packet
        stats = pool.stats()
        print(f"{stats['gets']} objects taken out, {stats['in_use']} still out")


if __name__ == "__main__":
    main()
