"""`python app.py`: the page, on http://127.0.0.1:7860, at once: the model loads while it is there already.

`build_app(pipeline)` is the same page around any pipeline, for tests and for other programs.
"""

from __future__ import annotations

import argparse
import errno
import io
import ipaddress
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from pipeline.blocks import StreamingPipeline
from pipeline.cli import (
    EMBEDDED_MODEL,
    EXIT_FAILED,
    LoadPipeline,
    SentenceParser,
    add_attention,
    add_memory,
    check_device_name,
    check_memory,
    check_model_folder,
    exit_code,
    load_pipeline,
    say,
)
from pipeline.config import SECONDS_RANGE
from pipeline.errors import InvalidRequest, SelfForcingError
from pipeline.loading import LOADED_SHARE, report_loading
from pipeline.worker import ModelWorker
from prompting.language import ENHANCER_HELP, LanguageEnhancer
from web.generation import DEFAULT_MAX_SECONDS
from web.models import ModelChoices
from web.page import build_app
from web.storage import TemporaryHome

__all__ = ["build_app", "main"]


POLL_SECONDS = 0.5
"""How long to wait in one go: on Windows Ctrl-C does not interrupt a wait."""

_ADDRESS_ERRORS = (None, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)
"""Gradio's own "no free port" has no number."""

MCP_PATH = "/gradio_api/mcp/"

SPACE_VARIABLE = "SPACE_ID"
"""Hugging Face Spaces set this; there, the platform is what stands between the page and the public."""


def main(argv: Sequence[str] | None = None, load: LoadPipeline | None = None) -> int:
    """Serve the page until Ctrl-C or SIGTERM. Returns the exit code: 0, 1 (failed) or 2 (bad input)."""
    worker, home, language = None, None, None
    stop = threading.Event()
    code = EXIT_FAILED
    try:
        options = parse(argv)
        auth = read_auth(options.auth)
        check_exposure(options, auth)
        folder, device = check_model_folder(options.model), check_device_name(options.device)
        language = None if options.enhancer is None else LanguageEnhancer(options.enhancer)
        memory = check_memory(options.memory)
        check = partial(has_room, device=device, memory=memory) if load is None else None
        load = load or partial(load_pipeline, memory=memory, attention=options.attention)
        home = make_home()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        say(f"Loading the model in {folder.name} ...")
        worker = ModelWorker(lambda: warmed_up(load(folder, device), options.compile))
        models = menu_choices(options, folder, lambda chosen: warmed_up(load(chosen, device), options.compile), check)
        serve(worker, options, auth, stop, models, language)
        code = 0
    except SelfForcingError as error:
        say(str(error))
        code = exit_code(error)
    except Exception:
        traceback.print_exc()  # here: below, the process may end at once
    finally:
        ended = all(thread.close(timeout=2) for thread in (worker, language) if thread is not None)
        if home is not None:
            home.close()
        if not ended:
            # A thread of a model is in the middle of something, of loading perhaps, that cannot be interrupted; torch
            # aborts the process with words of its own if the interpreter goes away under it.
            sys.stderr.flush()
            os._exit(code)
    return code


def make_home() -> TemporaryHome:
    """A folder of this process's own for uploads and videos; Gradio is told to put its files there.

    Raises:
        SelfForcingError: it cannot be made.
    """
    try:
        home = TemporaryHome(os.environ.get("GRADIO_TEMP_DIR"))
    except OSError as error:
        raise SelfForcingError(
            f"The folder for temporary files cannot be used ({error.strerror}). Free some space or name another one "
            "in GRADIO_TEMP_DIR."
        ) from error
    os.environ["GRADIO_TEMP_DIR"] = str(home.path)
    if (mcp := sys.modules.get("gradio.mcp")) is not None:  # it has noted down where files went before
        mcp.DEFAULT_TEMP_DIR = str(home.path)
    return home


def warmed_up(pipeline: StreamingPipeline, compile: bool = False) -> StreamingPipeline:
    """What happens only once, kernels being chosen and memory fetched, need not happen in front of a visitor.

    With `compile`, torch.compile's own warm-up begins, too.
    """
    if hasattr(pipeline, "warm_up"):
        report_loading("Warming up", LOADED_SHARE)
        pipeline.warm_up(**({"compile": True} if compile else {}))
    return pipeline


def has_room(folder: Path, device: str | None, memory: str) -> None:
    """`placing.check_exchange`. Imports torch."""
    from pipeline.placing import check_exchange

    check_exchange(folder, device, memory)


def menu_choices(
    options: argparse.Namespace,
    folder: Path,
    load: Callable[[Path], StreamingPipeline],
    check: Callable[[Path], None] | None = None,
) -> ModelChoices | None:
    """What the Model menu offers. The model and the disk are everybody's: with strangers around, there is no menu."""
    mode = options.model_menu or ("off" if _has_visitors(options) else "download")
    if mode == "off":
        return None
    return ModelChoices(folder, load, mode, **({} if check is None else {"check": check}))


def serve(
    worker: ModelWorker,
    options: argparse.Namespace,
    auth: tuple[str, str] | None,
    stop: threading.Event,
    models: ModelChoices | None = None,
    language: LanguageEnhancer | None = None,
) -> None:
    """Serve until told to stop.

    Raises:
        InvalidRequest: the address cannot be served on.
        SelfForcingError: the model could not be loaded.
    """
    ticked = ["compile"] if options.compile else []
    demo = build_app(worker, options.max_seconds, models, language, ticked)
    _reach_oneself_without_a_proxy()
    try:
        with redirect_stdout(io.StringIO()):  # what Gradio has to say of share links and MCP, this program says itself
            _, local, public = demo.launch(
                server_name=_for_gradio(options.host),
                server_port=options.port,
                share=options.share,
                auth=auth,
                mcp_server=options.mcp,
                quiet=True,
                prevent_thread_lock=True,
            )
    except OSError as error:
        if error.errno not in _ADDRESS_ERRORS:
            raise SelfForcingError(
                f"The page could not be started ({error.strerror or type(error).__name__})."
            ) from error
        raise InvalidRequest(
            f"Port {options.port} on {options.host} cannot be used: another program has it, or the address is not this "
            "machine's. Choose another one with --port."
        ) from error
    except Exception as error:  # the check whether the page answers has errors of many kinds
        raise SelfForcingError(
            f"The page was started, but this machine cannot reach it ({type(error).__name__}). If a proxy is set, add "
            f"localhost, 127.0.0.1 and {options.host} to NO_PROXY."
        ) from error
    address = public or local
    try:
        if options.share and not public:
            say("There is no share link: gradio.live could not be reached. The page is on this machine only.")
        say(f"Open {address} in a browser. Ctrl-C stops.")
        if options.mcp:
            say(f"MCP clients connect to {address.rstrip('/')}{MCP_PATH}.")
        announced = False
        while not stop.wait(POLL_SECONDS):
            if worker.loaded and not announced:
                worker.wait_ready()
                say("The model is ready.")
                announced = True
        say("Stopping: a video that is being made ends here." if worker.busy and not worker.exchanging else "Stopping.")
    finally:
        demo.close(verbose=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser(prog="python app.py", description="Serve the text-to-video page.", allow_abbrev=False)
    parser.add_argument(
        "--host",
        default="0.0.0.0" if SPACE_VARIABLE in os.environ else "127.0.0.1",
        help="address to listen on; 0.0.0.0 is the whole network (default: this machine only)",
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--share", action="store_true", help="also open a temporary public link through gradio.live")
    parser.add_argument("--mcp", action="store_true", help="serve the API to MCP clients as well")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for this name and password")
    parser.add_argument(
        "--allow-public", action="store_true", help="serve beyond this machine without a password, on purpose"
    )
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED_MODEL, metavar="FOLDER", help="model folder (default: weights/embedded)"
    )
    parser.add_argument(
        "--model-menu",
        choices=("off", "switch", "download"),
        help="whether visitors may exchange the model for another one that is here, or download one as well (default: "
        "download if only this machine can reach the page, else off)",
    )
    parser.add_argument("--enhancer", metavar="FOLDER|NAME@REVISION", help=ENHANCER_HELP)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)")
    add_memory(parser)
    add_attention(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="tick torch.compile on the page, and begin with it at the start, in the background",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=DEFAULT_MAX_SECONDS,
        metavar="N",
        help=f"longest video that may be asked for, in seconds (default: {DEFAULT_MAX_SECONDS:g}); a run may take "
        "twice as long and a minute more",
    )
    options = parser.parse_args(argv)
    low, high = SECONDS_RANGE
    if not low <= options.max_seconds <= high:
        raise InvalidRequest(f"max-seconds is {options.max_seconds:g}, but must be a number from {low:g} to {high:g}.")
    if not 1 <= options.port <= 65535:
        raise InvalidRequest(f"port is {options.port}, but must be a number from 1 to 65535.")
    return options


def read_auth(text: str | None) -> tuple[str, str] | None:
    """`user:password` as a pair; the password may hold further colons."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise InvalidRequest("auth must be a name and a password with a colon between them: --auth user:password.")
    return user, password


def check_exposure(options: argparse.Namespace, auth: tuple[str, str] | None) -> None:
    """A page that anybody can reach, on a machine that works for whoever asks, is never an accident."""
    if auth is not None and options.mcp:
        raise InvalidRequest(
            "No password can be asked for with --mcp: MCP clients get past it in part, and never to the rest. "
            "Leave out --auth or --mcp."
        )
    if not _has_visitors(options) or SPACE_VARIABLE in os.environ:
        return
    reach = "A share link" if options.share else f"The address {options.host}"
    if auth is None and not options.allow_public:
        raise InvalidRequest(
            f"{reach} lets other people use this machine. Set a password with --auth user:password, or add "
            "--allow-public."
        )
    say(f"{reach} lets other people use this machine{'' if auth is None else ' if they know the password'}.")


def _has_visitors(options: argparse.Namespace) -> bool:
    """Whether others than whoever sits at this machine can reach the page."""
    return options.share or not _is_loopback(options.host) or SPACE_VARIABLE in os.environ


def _reach_oneself_without_a_proxy() -> None:
    """Gradio asks its own page whether it is there. No proxy knows, whatever else goes through one."""
    for name in ("no_proxy", "NO_PROXY"):
        given = os.environ.get(name) or os.environ.get(name.swapcase(), "")
        os.environ[name] = ",".join(filter(None, (given, "localhost", "127.0.0.1", "::1")))


def _for_gradio(host: str) -> str:
    """It wants an address of IPv6 as browsers do, in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name: it may stand for any address
        return False


if __name__ == "__main__":
    sys.exit(main())
