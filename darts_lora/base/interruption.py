"""What ends a run before its last step: signals, its time limit, lack of memory, a dead data
worker. Not here: the loops that end (search.py, finetune.py), nor what they save."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch

from darts_lora.base.errors import InputError, one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

if sys.platform != "win32":
    from multiprocessing.context import ForkContext, ForkProcess
else:  # has no fork, and worker_context no use for them
    ForkContext = ForkProcess = object

TIME_OVER = 75  # EX_TEMPFAIL of sysexits.h: not finished, to be run again
HANDS_FULL = 71  # EX_OSERR: a data worker could not hand its batch over
PATIENCE = (
    60.0  # seconds that a step may take to end once a stop was asked for, if none took longer
)


class Stopped(SystemExit):
    """A run ended early because it was asked to; `code` is the exit status: 143 for SIGTERM, 130
    for SIGINT, 75 where the time was over. A script that doesn't catch it exits with that."""


class PeerLostError(InputError):
    """The processes of a run lost each other: most often another one ended, and says why."""


class StopRequest:
    """Notes SIGTERM, SIGINT and the end of the time while its `with` block runs, for a loop that
    asks between two steps. A second signal of the same kind ends the process as ever; and so does
    the first one where the loop does not come back, as while it waits for a batch in vain.

    Args:
        max_runtime: minutes from here on; None: no limit.
    """

    def __init__(self, max_runtime: float | None = None):
        self.max_runtime = max_runtime
        self.end = None if max_runtime is None else time.monotonic() + 60 * max_runtime
        self.process, self.received = os.getpid(), 0
        self.handlers: dict[int, Any] = {}
        self.came_back, self.longest = time.monotonic(), 0.0
        self.over = threading.Event()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._note)
        self.step()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.finish()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def step(self) -> None:
        """The loop came back: a step has ended."""
        now = time.monotonic()
        self.longest, self.came_back = max(self.longest, now - self.came_back), now

    def finish(self) -> None:
        """The loop is over, and its result is being written: that is waited for."""
        self.over.set()

    def _watch(self) -> None:
        """End the process where a stop was asked for and the loop does not come back."""
        asked = None
        while not self.over.wait(min(1.0, PATIENCE / 4)):
            if not self.status:
                continue
            asked = asked or time.monotonic()
            waited = time.monotonic() - max(asked, self.came_back)
            if waited > max(PATIENCE, 2 * self.longest):
                print(
                    f"\n{self.reason(self.status)}: ended within a step that did not end for "
                    f"{waited:.0f} s; the last checkpoint stays",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(self.status)

    def _note(self, number: int, frame) -> None:
        signal.signal(number, self.handlers[number])
        if os.getpid() == self.process:
            self.received = number
        else:  # forked off with this handler
            os.kill(os.getpid(), number)

    @property
    def status(self) -> int:
        """Exit status that was asked for; 0: go on."""
        if self.received:
            return 128 + self.received
        return TIME_OVER if self.end is not None and time.monotonic() >= self.end else 0

    def agreed(self, accelerator: Accelerator) -> int:
        """The status that any process was asked for, the same on all of them."""
        self.step()
        status = self.status
        if accelerator.num_processes > 1:  # one does not wait for the device
            asked = torch.tensor([status], device=accelerator.device)
            status = int(accelerator.gather(asked).max())
        if status:
            self.finish()
        return status

    def reason(self, status: int) -> str:
        """What asked for that exit status, in words."""
        if status == TIME_OVER:
            return f"max_runtime={self.max_runtime} minutes are over"
        return signal.Signals(status - 128).name


def worker_context(num_workers: int) -> BaseContext | None:
    """How a data loader starts its workers (multiprocessing_context): SIGTERM and SIGINT to a whole
    group or job leave them alone, they are for the main process, which needs its next batch from
    them. Its own SIGTERM ends them, as ever. None: as the data loader would do by itself."""
    return _Context() if num_workers and hasattr(signal, "sigwaitinfo") else None  # not on macOS


class _Worker(ForkProcess):
    started: ClassVar[WeakSet[_Worker]] = WeakSet()

    def start(self) -> None:
        self.started.add(self)
        # held back over the fork: libraries start threads in the child before any of our code runs
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        sys.excepthook = _hands_full  # of the thread that hands file descriptors over
        super().run()


class _Queue(Queue):
    """What cannot be handed over is waited for for ever: a worker ends with a status instead."""

    _on_queue_feeder_error = staticmethod(
        lambda error, batch: _hands_full(type(error), error, None)
    )


class _Context(ForkContext):
    Process = _Worker

    def Queue(self, maxsize: int = 0) -> _Queue:
        return _Queue(maxsize, ctx=self.get_context())


def _hands_full(kind: type, error: BaseException, trace) -> None:
    print(f"data worker: {one_line(error)}", file=sys.stderr, flush=True)
    os._exit(HANDS_FULL)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def told_as_input_errors(where: Callable[[], str] | None = None) -> Iterator[None]:
    """What the machine refuses inside, as an InputError that says what to change; and one of a data
    worker as the one line that it was.

    Args:
        where: () -> what is left to go on from, for the message.

    Raises:
        InputError: no memory is left, or a data worker died.
    """
    try:
        yield
    except InputError as error:
        if "in DataLoader worker process" in str(error):  # wrapped in the worker's traceback
            raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from error
        raise
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        try:
            told = _told(error)
        except RuntimeError as late:  # of PyTorch's handler: a dead worker's signal comes anywhere
            told = _told(late)
        if told is None:
            raise
        raise type(told)(f"{told}; {where()}" if where else str(told)) from error


def _told(error: Exception) -> InputError | None:
    """What the user is told of an error; None: it is none of the machine's."""
    text, broke_off = " ".join(str(error).split()), _broke_off_between_processes(error)
    if broke_off:
        text = _workers_end() or text
    died = broke_off or "DataLoader worker (pid" in text
    full = died and any(worker.exitcode == HANDS_FULL for worker in _Worker.started)
    if full or "Too many open files" in text:
        return InputError(
            "num_workers: a data worker could not hand its batch over: shared memory or file "
            "descriptors are short; raise the size of /dev/shm (docker run --shm-size) or ulimit "
            "-n, or lower num_workers, batch_size or max_length; num_workers=0 loads in the main "
            "process"
        )
    if died:
        return InputError(
            f"num_workers: a data worker died ({text[:150] or 'no answer'}): lower num_workers if "
            "memory was short, 0 loads in the main process"
        )
    if _lost_a_peer(error):
        return PeerLostError(
            f"num_processes: the processes of this run lost each other ({text[:150]}); where one "
            "of them ended, its own line says why"
        )
    if lacks_memory(error):
        return InputError(
            f"out of memory ({text[:150]}): lower batch_size (and raise "
            "gradient_accumulation_steps), max_length or the largest of ranks; or set "
            "gradient_checkpointing, dtype=bfloat16 or quantization"
        )
    return None


def lacks_memory(error: Exception) -> bool:
    """Whether it says that no memory is left, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error)


def _lost_a_peer(error: Exception) -> bool:
    """Whether gloo or NCCL says that another process does not answer."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    kinds = (torch.distributed.DistError,) if several else ()
    return several and (isinstance(error, kinds) or "/gloo/" in str(error))


def _workers_end(seconds: float = 1.0) -> str:
    """What PyTorch's signal handler says of a worker's end, which may come after the connection
    broke and would be raised anywhere then, even out of the handling of that; "" if nothing."""
    try:
        time.sleep(seconds)  # a signal's handler runs, and raises, in here
    except RuntimeError as error:
        return " ".join(str(error).split())
    return ""


def _broke_off_between_processes(error: Exception) -> bool:
    """Whether this is how a batch that a dead worker still held looks to the main process, or to
    the thread there that pins batches."""
    if not isinstance(error, ConnectionError | EOFError):
        return False
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "in pin memory thread" in str(error) or any(
        code.co_name == "_try_get_data" and code.co_filename.endswith("dataloader.py")
        for code in frames
    )
