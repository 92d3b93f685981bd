"""llama.cpp's matrix-vector products: run by bench_moe.py under its own interpreter.

A graph of one product per matrix, computed on one thread by the library as in a model; it quantizes
the activations inside the timed part, as we do.
"""

import ctypes
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

TYPES = {"Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "Q6_K": 14}


def library(name):
    folder = Path(llama_cpp.__file__).parent / "lib"
    for path in sorted(folder.glob(f"lib{name}.so*")):
        return ctypes.CDLL(str(path))
    raise OSError(f"no lib{name} beside llama_cpp")


def main():
    kind, rows, columns, copies = sys.argv[1], *map(int, sys.argv[2:])
    base, cpu = library("ggml-base"), library("ggml-cpu")
    cpu.ggml_cpu_init()
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    size = base.ggml_row_size(TYPES[kind], columns)
    matrix = np.empty(rows * size, np.uint8)
    base.ggml_quantize_chunk(
        TYPES[kind], weights.ctypes.data, matrix.ctypes.data, 0, rows, columns, None
    )
    matrices = [matrix.copy() for _ in range(copies)]
    # A matrix times a vector as the library computes it: through its graph, on one thread.
    graph = Graph(base, cpu, TYPES[kind], rows, columns, matrices, rng)
    graph.run()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.thread_time()
        graph.run()
        spent = time.thread_time() - begin
        print(copies * rows * columns / spent / 1e9, flush=True)


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Graph:
    """One ggml graph of a product per matrix."""

    def __init__(self, base, cpu, kind, rows, columns, matrices, rng):
        pointer = ctypes.c_void_p
        for lib, name, result, arguments in (
            (base, "ggml_init", pointer, [InitParams]),
            (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int] + [ctypes.c_int64] * 2),
            (base, "ggml_mul_mat", pointer, [pointer] * 3),
            (base, "ggml_new_graph_custom", pointer, [pointer, ctypes.c_size_t, ctypes.c_bool]),
            (base, "ggml_build_forward_expand", None, [pointer] * 2),
            (base, "ggml_get_data", pointer, [pointer]),
            (
                cpu,
                "ggml_graph_compute_with_ctx",
                ctypes.c_int,
                [pointer, pointer, ctypes.c_int],
            ),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        total = sum(m.nbytes for m in matrices) + (64 << 20) + len(matrices) * rows * 8
        self.context = base.ggml_init(InitParams(total, None, False))
        x = base.ggml_new_tensor_2d(self.context, 0, columns, 1)
        values = rng.standard_normal(columns, np.float32)
        ctypes.memmove(base.ggml_get_data(x), values.ctypes.data, values.nbytes)
        self.graph = base.ggml_new_graph_custom(self.context, 4 * len(matrices) + 64, False)
        for matrix in matrices:
            w = base.ggml_new_tensor_2d(self.context, kind, columns, rows)
            ctypes.memmove(base.ggml_get_data(w), matrix.ctypes.data, matrix.nbytes)
            base.ggml_build_forward_expand(self.graph, base.ggml_mul_mat(self.context, w, x))
        self.compute = cpu.ggml_graph_compute_with_ctx

    def run(self):
        if self.compute(self.context, self.graph, 1) != 0:
            raise RuntimeError("the graph failed")


if __name__ == "__main__":
    main()
