"""Entry point of the `pyruntime` command; `doctor` works without extras."""

from __future__ import annotations

import os
import signal
import sys

from pyruntime import doctor

USAGE = """usage: pyruntime COMMAND

commands:
  serve [MODEL]     serve a model over the OpenAI API (without MODEL, the one that ships)
  generate PROMPT   continue a text
  quantize MODEL OUT  write a model whose experts run at 2, 4, 6 or 8 bits
  doctor [--json]   what this machine has, and what the runtime falls back to

`pyruntime COMMAND --help` lists the options.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        Exit status: 0; 2 for a command line that cannot be understood; 141, as shells have it, when
        the reader of the output went away.
    """
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader went away (`pyruntime doctor | head -1`): nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(args: list[str]) -> int:
    if args in (["doctor"], ["doctor", "--json"]):
        report = doctor.examine()
        print(doctor.as_json(report) if "--json" in args else doctor.as_text(report))
        return 0
    if args and args[0] in ("serve", "generate", "quantize"):
        try:
            from pyruntime.serve import cli
        except ModuleNotFoundError as error:
            print(
                f'`pyruntime {args[0]}` needs {error.name}: pip install "pyruntime[serve]"',
                file=sys.stderr,
            )
            return 1
        return cli.main(args)
    print(USAGE, end="", file=sys.stdout if args in (["--help"], ["-h"]) else sys.stderr)
    return 0 if args in (["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main())
