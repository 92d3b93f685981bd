"""Write the C source of `_cffi`, a binding made from the public headers alone.

Run by the build: ``python cffi_build.py HEADER_DIRECTORY OUTPUT.c``.
"""

import re
import sys
from pathlib import Path

import cffi


def declarations(text: str) -> str:
    """Reduce a public header to what cffi's parser reads: no comments, no preprocessor."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    constants = re.findall(r"^#define (PYRT_[A-Z_]*VERSION) \d+$", text, re.MULTILINE)
    text = re.sub(r"#ifdef __cplusplus\n(?:extern \"C\" \{|\})\n#endif", "", text)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*$", "", text, flags=re.MULTILINE)
    text = text.replace('extern "C" {', "").replace("PYRT_API ", "").replace(" PYRT_NOEXCEPT", "")
    return text + "".join(f"\n#define {name} ..." for name in constants)


def main(directory: str, output: str) -> None:
    """Write the module's C source."""
    headers = sorted(Path(directory).glob("*.h"), key=lambda path: (path.name != "abi.h", path))
    plain = [path for path in headers if path.name != "pyruntime.h" and "_inline" not in path.name]
    builder = cffi.FFI()
    for path in plain:
        builder.cdef(declarations(path.read_text()))
    builder.set_source(
        "pyruntime._ext._cffi", "".join(f'#include "pyruntime/{path.name}"\n' for path in plain)
    )
    builder.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
