"""What the benchmarks of the engine and the server share."""

import gc
import statistics
from pathlib import Path


def size(benchmark, full, small):
    """Return `full`, or `small` when benchmarks only have to run (``--benchmark-disable``)."""
    return small if benchmark.disabled else full


def middle(values):
    """Return the median of what was measured: one value when benchmarks are disabled."""
    return statistics.median_low(values)


class PeakMemory:
    """The highest resident size of this process since the object was made, in MiB."""

    def __init__(self):
        gc.collect()  # the engine of the benchmark before
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._since_reset = True
        except OSError:  # not allowed here: then it is the peak since the process began
            self._since_reset = False

    def report(self):
        """Return the figure under a name that says what it is."""
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) >> 10
        return {"peak_rss_mb" if self._since_reset else "peak_rss_mb_since_start": peak}
