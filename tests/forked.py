"""Scripts run as a user runs them, but forked from a process where the libraries are loaded.
Not here: fresh interpreters (recipes/conftest.py, cli/test_wheel.py, test_readme.py)."""

import os
import runpy
import socket
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess

RECIPES = ("search", "derive", "finetune", "evaluate", "report")
LOADED = [f"darts_lora.cli.{recipe}" for recipe in RECIPES]
LOADED += ["transformers.models.mllama.modeling_mllama", "torch.utils.tensorboard"]
PATIENCE = 300  # seconds

context = get_context("forkserver")
context.set_forkserver_preload(LOADED)


def run(script, *arguments, folder, processes=1, **environment):
    """The finished script in that folder, as subprocess.run gives it. Several processes make a gloo
    group, as torchrun's do; then it is what all said, and the last status that is not 0."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100", **environment}
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    if processes > 1:
        environment |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(processes),
                        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        files = [os.path.join(place, name) for name in ("stdout", "stderr")]
        started = []
        for rank in map(str, range(processes)):
            own = environment | ({"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {})
            given = str(script), list(map(str, arguments)), str(folder), own, files
            started.append(context.Process(target=_script, args=given))
            started[-1].start()
        for process in started:
            process.join(PATIENCE)
            process.kill()
            process.join()
        status = max((process.exitcode for process in started), key=abs)
        return CompletedProcess(arguments, status, *(Path(file).read_text() for file in files))


def _script(script, arguments, folder, environment, files):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
