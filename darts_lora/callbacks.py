"""Between the steps of a finetune: the bar, the adapter so far, TensorBoard, requests to stop.
Not here: the training (finetune.py), what asks for a stop (interruption.py)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from darts_lora.files import write_whole
from darts_lora.interruption import Stopped, StopRequest


class Progress(ProgressCallback):
    """The bar with the time left; beside it one number, the loss."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class SaveAdapter(TrainerCallback):
    """The adapter to `folder` every `save_steps` steps (0: never) and where a stop is asked for."""

    def __init__(self, trainer: Trainer, save_steps: int, folder: str, stop: StopRequest):
        self.trainer, self.save_steps, self.folder, self.stop = trainer, save_steps, folder, stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        status = 0
        if state.global_step == state.max_steps:
            self.stop.finish()
        else:
            status = self.stop.agreed(self.trainer.accelerator)
        due = self.save_steps > 0 and state.global_step % self.save_steps == 0
        if (due or status) and state.is_world_process_zero:
            write_whole(self.folder, model.save_pretrained)
        if status:
            if state.is_world_process_zero:
                print(
                    f"\n{self.stop.reason(status)}: stopped after step {state.global_step} of "
                    f"{state.max_steps}; {kept(self.folder)}",
                    file=sys.stderr,
                    flush=True,
                )
            raise Stopped(status)


def kept(folder: str) -> str:
    if not os.path.isdir(folder):
        return "no adapter was written"
    return f"{folder} has the last adapter that was saved; a finetune starts anew"


class Views(TensorBoardCallback):
    """TensorBoard as transformers writes it; where it fails, the training goes on without it."""

    def on_train_begin(self, *args, **kwargs):
        self._guarded(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args, **kwargs):
        self._guarded(super().on_log, *args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        self._guarded(super().on_train_end, *args, **kwargs)

    def _guarded(self, act: Callable, *args, **kwargs) -> None:
        if getattr(self, "failed", False):
            return
        try:
            act(*args, **kwargs)
        except Exception as error:
            self.failed = True
            warnings.warn(
                f"TensorBoard is left out from here on ({type(error).__name__}: {error})",
                stacklevel=2,
            )
