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


def collect(header: Path, plain: list[Path]) -> None:
    """Append the headers that `header` includes, each after those it includes itself."""
    for name in re.findall(r'^#include "pyruntime/(\w+\.h)"$', header.read_text(), re.MULTILINE):
        path = header.with_name(name)
        if path not in plain and "_inline" not in name:
            collect(path, plain)
            plain.append(path)


def main(directory: str, output: str) -> None:
    """Write the module's C source."""
    plain: list[Path] = []
    collect(Path(directory) / "pyruntime.h", plain)
    builder = cffi.FFI()
    for path in plain:
        builder.cdef(declarations(path.read_text()))
    builder.set_source(
        "pyruntime._ext._cffi", "".join(f'#include "pyruntime/{path.name}"\n' for path in plain)
    )
    builder.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
