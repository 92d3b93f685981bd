"""llama.cpp's quantization error: run by bench_moe_codes.py under its own interpreter.

Reads a float32 matrix from a .npy file; prints one JSON object: bits per weight and relative
squared error by type.
"""

import ctypes
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from llama_matvec import library

KINDS = ("Q2_K", "Q4_0", "Q4_K", "Q6_K", "Q8_0")


def main():
    weights = np.ascontiguousarray(np.load(sys.argv[1]), np.float32)
    rows, columns = weights.shape
    base = library("ggml-base")
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    found = {}
    for name in KINDS:
        kind = GGMLQuantizationType[name]
        size = base.ggml_row_size(kind.value, columns)
        packed = np.empty((rows, size), np.uint8)
        base.ggml_quantize_chunk(
            kind.value, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, None
        )
        lost = dequantize(packed, kind).reshape(weights.shape).astype(np.float64) - weights
        error = float((lost**2).sum() / (weights.astype(np.float64) ** 2).sum())
        found[name] = {"bits_per_weight": 8 * size / columns, "error": error}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
