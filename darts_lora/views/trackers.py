"""Where a run's figures go: TensorBoard and what else accelerate knows, each guarded by itself.
Not here: what of a search is shown (search_views.py), how TensorBoard shows it (tensorboard.py)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from transformers import TrainerCallback

from darts_lora.base.errors import InputError

PROJECT = "darts_lora"  # the runs of one project stand side by side
# How trackers call the name that a run gets; the others have none, or make one up.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}

# Whose log_images takes batches of images, and what it must be told of them.
TAKE_IMAGES = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


def check_trackers(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that `report_to` names, as transformers' option of that name does: one, several,
    "all" that are installed, or "none".

    Raises:
        InputError: accelerate does not know one of them, or its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    installed = [str(kind) for kind in get_available_trackers()]
    if names == ["none"]:
        return []
    if names == ["all"]:
        return installed
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise InputError(f"report_to={name!r}: must be one or several of {known}; all; or none")
        if name not in installed:
            raise InputError(f"report_to={name!r}: is not installed; pip install {name}")
    return list(dict.fromkeys(names))


class Trackers:
    """Gives a run's figures to trackers. One that fails is left out from there on, after one
    warning: a run of hours does not end because a disk is full or a network is gone.

    A resumed run takes back in TensorBoard what came after its checkpoint. Elsewhere it is a new
    run, whose steps go on from there.

    Args:
        names: of the trackers, as check_trackers gives them.
        output_dir: tensorboard/ goes there; its name is the run's.
        options: of the run, shown beside its figures.
        first_step: where the run starts.
        more: further trackers that take the same figures, which their owner finishes.
        otherwise: said in the warning of one that fails, such as where else the figures are.
    """

    def __init__(
        self,
        names: Sequence[str],
        output_dir: str,
        options: dict[str, Any],
        *,
        first_step: int = 0,
        more: Sequence[GeneralTracker] = (),
        otherwise: str = "",
    ):
        self.otherwise, self.step = otherwise, first_step
        self.own: list[Any] = []
        self.open: list[Any] = list(more)
        for name in names:
            self._guarded(name, self._start, name, output_dir, options)

    def _start(self, name: str, output_dir: str, options: dict[str, Any]) -> None:
        if name == "tensorboard":
            from darts_lora.views.tensorboard import TensorBoard

            tracker = TensorBoard(output_dir, self.step)
        else:
            maker, run = LOGGER_TYPE_TO_CLASS[name], os.path.basename(os.path.abspath(output_dir))
            folder = [output_dir] if maker.requires_logging_directory else []
            named = {RUN_NAMES[name]: run} if name in RUN_NAMES else {}
            tracker = maker(os.environ.get("WANDB_PROJECT", PROJECT), *folder, **named)
            tracker.start()
        plain = bool | int | float | str | None
        values = {n: v if isinstance(v, plain) else str(v) for n, v in options.items()}
        tracker.store_init_configuration(values)
        self.own.append(tracker)
        self.open.append(tracker)

    def log(self, values: dict[str, float | str], step: int) -> None:
        """Numbers and texts by tag, to all of them."""
        self._each(step, lambda tracker: tracker.log(values, step=step))

    def log_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Images by tag, (height, width, 3) uint8, to those that take some."""
        self._each(step, lambda tracker: _log_images(tracker, images, step))

    def call(self, method: str, *args, step: int) -> None:
        """A method that not all have, of those that have it."""
        self._each(step, lambda tracker: getattr(tracker, method, lambda *_: None)(*args, step))

    def finish(self) -> None:
        """Write out what is still held back."""
        for tracker in list(self.open):
            if tracker in self.own:
                self._guarded(tracker.name, tracker.finish)
        self.open = []

    def _each(self, step: int, act: Callable[[Any], None]) -> None:
        self.step = step
        for tracker in list(self.open):
            if not self._guarded(tracker.name, act, tracker):
                self.open.remove(tracker)

    def _guarded(self, name: str, act: Callable, *args) -> bool:
        try:
            act(*args)
        except Exception as error:
            shown = "TensorBoard" if name == "tensorboard" else name
            warnings.warn(
                f"{shown} is left out from step {self.step} on ({type(error).__name__}: {error})"
                + (f"; {self.otherwise}" if self.otherwise else ""),
                stacklevel=2,
            )
            return False
        return True


class Views(TrainerCallback):
    """The figures of a training, to its trackers."""

    def __init__(self, report_to: list[str], output_dir: str, options: dict[str, Any]):
        self.open = partial(Trackers, report_to, output_dir, options)
        self.trackers: Trackers | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trackers = self.open(first_step=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.trackers is not None:
            numbers = {name: v for name, v in logs.items() if isinstance(v, int | float)}
            self.trackers.log({f"train/{n}": v for n, v in numbers.items()}, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trackers is not None:
            self.trackers.finish()


def _log_images(tracker: GeneralTracker, images: dict[str, np.ndarray], step: int) -> None:
    if tracker.name in TAKE_IMAGES:
        batches = {tag: image[None] for tag, image in images.items()}
        tracker.log_images(batches, step=step, **TAKE_IMAGES[tracker.name])
    elif tracker.name == "trackio":  # takes images, but accelerate does not know
        import trackio

        tracker.log({tag: trackio.Image(image) for tag, image in images.items()}, step=step)
