"""What ends a run early: signals, the time limit, and what the machine refuses, told in one line.
Not here: a search that is ended by them (test_search.py), a finetune (test_finetune.py)."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from darts_lora import InputError
from darts_lora.base import interruption
from darts_lora.base.interruption import (
    Stopped,
    StopRequest,
    told_as_input_errors,
    worker_context,
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_once_and_handlers_come_back(number, status):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.status == 0
        os.kill(os.getpid(), number)
        assert stop.status == status and stop.reason(status) == number.name
        assert signal.getsignal(number) == before, "a second one ends the process as ever"
    assert signal.getsignal(number) == before


def test_a_second_interrupt_is_not_held_back(request):
    # a shell's background job begins with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), StopRequest():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("asked", ["SIGTERM", "time"])
def test_a_loop_that_does_not_come_back_is_ended(monkeypatch, asked):
    """As one that waits for a batch in vain; what is written behind the loop is waited for."""
    monkeypatch.setattr(interruption, "PATIENCE", 0.2)
    child = os.fork()
    if child == 0:
        with StopRequest(None if asked == "SIGTERM" else 1e-9) as stop:
            if asked == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(5):
                time.sleep(0.1)  # steps that end, of which none takes long
                stop.step()
            if asked == "time":
                threading.Event().wait(60)
            stop.finish()
            time.sleep(1)
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (3 if asked == "SIGTERM" else 75)


def test_the_time_is_over_after_so_many_minutes(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop, endless = StopRequest(2.5), StopRequest()
    now += 149
    assert stop.status == 0
    now += 1
    assert stop.status == 75 and endless.status == 0
    assert stop.reason(75) == "max_runtime=2.5 minutes are over"


def test_several_processes_stop_when_one_is_asked_to_and_one_asks_no_device():
    asked = []

    def accelerator(processes):
        def gather(own):
            asked.append(int(own))
            return torch.tensor([0, 143])

        return SimpleNamespace(num_processes=processes, device="cpu", gather=gather)

    stop = StopRequest(max_runtime=0)
    assert stop.agreed(accelerator(1)) == 75 and not asked
    assert stop.agreed(accelerator(2)) == 143 and asked == [75]


def test_a_thread_of_a_notebook_gets_no_signals_and_runs_all_the_same():
    found = []

    def inside():
        with StopRequest() as stop:
            found.append(stop.status)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [0]


def test_a_script_that_knows_nothing_of_it_exits_with_the_status():
    assert issubclass(Stopped, SystemExit) and Stopped(143).code == 143


def allocate_on_the_cpu():
    torch.empty(1 << 60, dtype=torch.uint8)


def allocate_by_numpy():
    np.empty(1 << 60, dtype=np.uint8)


def allocate_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has")


@pytest.mark.parametrize("allocate", [allocate_on_the_cpu, allocate_by_numpy, allocate_on_a_gpu])
def test_no_memory_left_says_what_to_reduce_and_what_is_left(allocate):
    with pytest.raises(InputError) as error, told_as_input_errors(lambda: "all is kept"):
        allocate()
    text = str(error.value)
    assert text.startswith("out of memory (") and text.endswith("; all is kept")
    assert "lower batch_size" in text and "gradient_checkpointing" in text and "\n" not in text


class Rows:
    """Of which the third does something to its worker."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return self.act() if row == 2 else row


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise InputError("row 2, column 'image': cannot be read")


def read(act, **options):
    """The rows, or the error: its frames, which hold the workers, are gone then."""
    try:
        with told_as_input_errors(lambda: "all is kept"):
            return [int(row) for row in DataLoader(Rows(act), num_workers=1, **options)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_data_worker_that_dies_is_told():
    text = read(kill)
    assert text.startswith("InputError: num_workers: a data worker died (")
    assert text.endswith(
        "lower num_workers if memory was short, 0 loads in the main process; all is kept"
    )


def hand_over_nothing():
    """As where shared memory is full: what is to be handed over cannot be pickled."""
    return threading.Lock()


def lose_a_descriptor():
    """As where no file descriptor is left for the thread that hands them over."""
    threading.Thread(target=lambda: sys.excepthook(OSError, OSError(24, "Too many"), None)).start()
    time.sleep(60)


@pytest.mark.parametrize("act", [hand_over_nothing, lose_a_descriptor])
def test_a_data_worker_that_cannot_hand_its_batch_over_is_told_and_not_waited_for(act):
    own = {"multiprocessing_context": worker_context(1), "collate_fn": lambda rows: rows[0]}
    text = read(act, batch_size=1, **own)
    assert text.startswith("InputError: num_workers: a data worker could not hand its batch over: ")
    assert "/dev/shm" in text and "ulimit -n" in text and text.endswith("; all is kept")


def test_too_many_open_files_are_told_as_such():
    with pytest.raises(InputError, match="ulimit -n"), told_as_input_errors():
        raise OSError(24, "Too many open files")


def test_bad_input_that_a_data_worker_found_is_one_line():
    assert read(refuse) == "InputError: row 2, column 'image': cannot be read"


def brought(error, where):
    """Raise it as PyTorch does in the main process when it was raised elsewhere."""
    try:
        raise error
    except Exception:
        ExceptionWrapper(where=where).reraise()


def test_a_worker_that_dies_behind_the_thread_that_pins_its_batches_is_told():
    with pytest.raises(InputError, match="a data worker died"), told_as_input_errors():
        brought(ConnectionResetError("reset"), "in pin memory thread for device 0")


class Cut:
    """A file that ends too early, read in the main process."""

    def __len__(self):
        return 1

    def __getitem__(self, row):
        raise EOFError("ended before the end-of-stream marker")


def test_errors_of_the_rows_are_not_those_of_a_dead_worker():
    for error in (RuntimeError("sizes are not equal"), ConnectionResetError("reset by peer")):
        with pytest.raises(type(error), match=str(error)), told_as_input_errors():
            brought(error, "in DataLoader worker process 0")
    with pytest.raises(EOFError, match="ended before"), told_as_input_errors():
        next(iter(DataLoader(Cut())))


def test_errors_of_another_kind_go_through():
    with pytest.raises(ConnectionError, match="refused"), told_as_input_errors(str):
        raise ConnectionRefusedError("refused")  # not out of a data loader
    with pytest.raises(RuntimeError, match="shapes"), told_as_input_errors(str):
        raise RuntimeError("shapes differ")
    with pytest.raises(InputError, match=r"^plain$"), told_as_input_errors(str):
        raise InputError("plain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_data_workers_alive(number):
    def signalled():
        for _ in range(20):
            os.kill(os.getpid(), number)  # from a process that is not the worker's parent
            time.sleep(0.001)
        return 2

    # from here on PyTorch starts a thread in each worker, before a worker_init_fn is called
    torch.set_num_threads(torch.get_num_threads())
    assert read(signalled, multiprocessing_context=worker_context(1)) == [0, 1, 2, 3]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the main process hears them"


def test_without_workers_or_such_signals_a_data_loader_starts_them_itself(monkeypatch):
    assert worker_context(0) is None
    monkeypatch.delattr(signal, "sigwaitinfo")
    assert worker_context(1) is None


def idle(ready):
    ready.set()
    time.sleep(300)


@pytest.mark.parametrize("processes", [worker_context(1), multiprocessing.get_context("fork")])
def test_a_data_worker_ends_when_its_parent_ends_it(processes):
    """Also one that was forked off while a request to stop is waited for; else the exit hangs."""
    ready = processes.Event()
    with StopRequest() as stop:
        worker = processes.Process(target=idle, args=(ready,), daemon=True)
        worker.start()
        assert ready.wait(60)
        worker.terminate()
        worker.join(60)
        ended, status = not worker.is_alive(), stop.status
    worker.kill()
    assert ended and status == 0


def test_a_dead_workers_signal_after_its_connection_broke_is_no_error_of_its_own():
    def handler(*_):  # as PyTorch's, of SIGCHLD
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        text = r"^num_workers: a data worker died \(DataLoader .*pid 7"
        with pytest.raises(InputError, match=text), told_as_input_errors():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise ConnectionResetError("Caught ConnectionResetError in pin memory thread")
        time.sleep(0.3)  # nothing is left to come
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
