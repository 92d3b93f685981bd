"""Command line of the model commands: ``serve`` and ``generate``."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pyruntime.engine.client import EngineClient, ThreadClient
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.llm import BLOCK_SIZE, LLM, make_loop
from pyruntime.engine.process import ProcessClient
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.text import Tokenizer
from pyruntime.errors import Error
from pyruntime.models import SHIPPED_NAME, shipped
from pyruntime.serve import quantize
from pyruntime.serve.app import ServerConfig, create_app
from pyruntime.serve.keys import ApiKeys
from pyruntime.serve.router import Router

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("quantize")(quantize.command)
console = Console(stderr=True)

Model = Annotated[
    str | None,
    typer.Argument(help="Hugging Face model directory; the model that ships by default."),
]
Policy = Annotated[str, typer.Option(help="Scheduling policy: fcfs, layered or swap.")]
Bits = Annotated[
    int | None,
    typer.Option(help="Width of a quantized model's experts; its widest by default.", min=2, max=8),
]
MemoryBudget = Annotated[
    int | None,
    typer.Option(help="MiB per worker for weights, experts, KV cache and activations.", min=1),
]
BitPolicy = Annotated[
    str | None,
    typer.Option(help="Widths token by token: fixed:4, rank:8,6,4, average:4.2, deadline:50."),
]
Deterministic = Annotated[
    bool, typer.Option(help="Whether text never depends on which experts are in memory.")
]
Retention = Annotated[
    str,
    typer.Option(
        help="How long a program's KV blocks stay while it calls a tool: formula (as long as it "
        "pays, by what was measured), fixed (2 s, for quick tools) or off."
    ),
]
KvMemory = Annotated[int, typer.Option(help="KV cache limit in MiB.", min=1)]
KvDtype = Annotated[
    str, typer.Option(help="Keys and values are kept in float32, or float16 of half the memory.")
]


class JsonFormatter(logging.Formatter):
    """One JSON object per line; never a prompt or a completion."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Server(uvicorn.Server):
    """uvicorn that drains the engine on SIGTERM or SIGINT before it ends."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, grace_s: float) -> None:
        super().__init__(config)
        self._client = client
        self._grace_s = grace_s
        self._drain: asyncio.Task[None] | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Start, and remember the event loop for the signal handler."""
        self._event_loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain: no new requests, what runs may end within the grace period."""
        # Not super(): it would end the process by the signal once all is drained.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self._event_loop is not None and self._drain is None:
            self._event_loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_engine())

    async def _drain_engine(self) -> None:
        if not await self._client.drain(self._grace_s):
            logging.getLogger(__name__).warning("grace period over; ending what still runs")
        await asyncio.to_thread(self._client.close)


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Model id; the directory's name.")] = None,
    policy: Policy = "fcfs",
    kv_memory: KvMemory = 1024,
    kv_dtype: KvDtype = "float32",
    bits: Bits = None,
    memory_budget: MemoryBudget = None,
    bit_policy: BitPolicy = None,
    deterministic: Deterministic = True,
    max_running: Annotated[int, typer.Option(help="Requests computing at a time.", min=1)] = 64,
    max_queued: Annotated[int, typer.Option(help="Requests waiting at most.", min=1)] = 1024,
    max_body: Annotated[int, typer.Option(help="Request body limit in KiB.", min=1)] = 4096,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="KEY[:TENANT[:MAX_PRIORITY]]; repeatable. Also PYRUNTIME_API_KEYS."),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Engine processes behind a router; 1 is a thread.", min=1, max=64)
    ] = 1,
    swap_memory: Annotated[int, typer.Option(help="MiB to swap to with policy swap.", min=0)] = 0,
    disk_cache: Annotated[
        Path | None,
        typer.Option(help="File that keeps keys and values of served text across restarts."),
    ] = None,
    disk_memory: Annotated[int, typer.Option(help="MiB of that file at most.", min=1)] = 4096,
    retention: Retention = "formula",
    grace_s: Annotated[float, typer.Option(help="Seconds to finish after SIGTERM.", min=0)] = 30.0,
) -> None:
    """Serve a model over the OpenAI API, with a status page at /."""
    _log_to_stderr()
    directory = Path(model) if model else shipped()
    keys = ApiKeys([*(api_key or ()), *os.environ.get("PYRUNTIME_API_KEYS", "").split()])
    options: dict[str, Any] = {
        "policy": policy,
        "kv_bytes": kv_memory << 20,
        "kv_dtype": kv_dtype,
        "max_running": max_running,
        "max_queued": max_queued,
        "swap_bytes": swap_memory << 20,
        "bits": bits,
        "memory_budget": memory_budget << 20 if memory_budget else None,
        "bit_policy": bit_policy,
        "deterministic": deterministic,
        "retention": None if retention == "off" else retention,
    }
    if disk_cache is not None:
        options |= {"disk_cache": str(disk_cache), "disk_bytes": disk_memory << 20}
    client: EngineClient
    with _loading(directory) as progress:
        tokenizer = Tokenizer(directory)
        max_len = ModelConfig.load(directory).max_len
        if workers == 1:
            client = ThreadClient(make_loop(directory, **options, progress=progress))
        else:
            client = _router(directory, options, workers, progress)
    config = ServerConfig(
        name or (directory.name if model else SHIPPED_NAME), max_len, keys, max_body << 10
    )
    application = create_app(client, tokenizer, config, client.close)
    settings = uvicorn.Config(
        application,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(grace_s) + 10,
    )
    server = Server(settings, client, grace_s)
    console.print(f"serving {config.model} on http://{host}:{port}", highlight=False)
    server.run()


def _router(directory: Path, options: dict[str, Any], workers: int, progress: Any) -> Router:
    """Start engine processes behind a router; their cores are shared out, and the disk cache."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)

    def connect(index: int, ended: Callable[[], None]) -> ProcessClient:
        own = dict(options)
        if "disk_cache" in own:  # a file belongs to one process
            own["disk_cache"] += f".{index}"
            own["disk_bytes"] //= workers
        return ProcessClient(str(directory), own, progress, ended, threads)

    return Router(connect, workers, BLOCK_SIZE)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    model: Annotated[
        str | None, typer.Option(help="Hugging Face model directory; the shipped one by default.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option(help="Treat the prompt as a user's message.")] = False,
    policy: Policy = "fcfs",
    kv_memory: KvMemory = 1024,
    kv_dtype: KvDtype = "float32",
    bits: Bits = None,
    memory_budget: MemoryBudget = None,
    bit_policy: BitPolicy = None,
    deterministic: Deterministic = True,
) -> None:
    """Continue a prompt and print the text as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    directory = Path(model) if model else shipped()
    with _loading(directory) as progress:
        llm = LLM(
            directory,
            policy=policy,
            kv_bytes=kv_memory << 20,
            kv_dtype=kv_dtype,
            bits=bits,
            memory_budget=memory_budget << 20 if memory_budget else None,
            bit_policy=bit_policy,
            deterministic=deterministic,
            progress=progress,
        )
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    tokens = llm.tokenizer.chat([{"role": "user", "content": text}]) if chat else None

    async def show() -> None:
        async for piece in llm.stream(tokens or text, params, max_tokens=max_tokens):
            print(piece, end="", flush=True)
        print()

    with llm:
        asyncio.run(show())


class _loading:
    """Shows a bar once loading has taken a second."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Any:
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None and time.monotonic() - self._begin > 1:
            self._bar = Progress(
                TextColumn("loading {task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} layers"),
                TimeElapsedColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._directory.name, total=total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("pyruntime", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def main(args: list[str]) -> int:
    """Run a model command; return the exit status."""
    try:
        app(args, standalone_mode=False)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return 130
    except Error as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 1
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return 0
