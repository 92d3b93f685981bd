"""The command ``quantize``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from pyruntime.engine.calibrate import calibrate as measure
from pyruntime.engine.quantize import SEARCH, compare_schemes, quantize

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory.")],
    out: Annotated[str, typer.Argument(help="Directory to write; must not exist.")],
    layout: Annotated[
        str, typer.Option(help="Planes: 2222 (widths 2, 4, 6, 8), 422 (4, 6, 8) or 44 (4, 8).")
    ] = "2222",
    dense: Annotated[
        int | None, typer.Option(help="Width of the dense matrices, 4 or 8; float by default.")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="Text to weigh errors by the activations it causes.")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Also show the errors of a low base with binary planes.")
    ] = False,
    search: Annotated[
        int, typer.Option(help="Places tried for each end of a group's range.", min=1, max=16)
    ] = SEARCH,
) -> None:
    """Quantize a model; prints error by layer and width, and writes a plot beside the weights."""
    importance = None
    if calibrate is not None:
        print(f"calibrating on {calibrate}", file=sys.stderr)
        importance = measure(model, calibrate)
    begin = time.monotonic()

    def show(done: int, total: int) -> None:
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        spent = time.monotonic() - begin
        print(f"layer {done}/{total}, {spent:.1f} s", end=end, file=sys.stderr, flush=True)

    report = quantize(
        model,
        out,
        layout=layout,
        dense_bits=dense,
        importance=importance,
        search=search,
        progress=show,
    )
    print(report.as_text())
    if compare:
        for name, errors in compare_schemes(model).items():
            print(f"{name:>14}" + "".join(f"  {b}: {e:.2e}" for b, e in errors.items()))
    print(f"wrote {Path(out)}: quantization.json, quantization.svg, experts.mxs")
