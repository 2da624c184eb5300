"""What a process does that is forked with the packages of the scripts imported, which takes longer than most tests."""

import os
import runpy
import sys
import warnings
from pathlib import Path

PACKAGES = ["envpool", "flax", "gymnasium", "jax", "optax", "rich.progress", "safetensors.numpy", "tensorboardX"]
PACKAGES += ["matplotlib.figure", "tyro"]
warnings.filterwarnings("ignore", message=".*os.fork")  # of JAX, which has no threads before its first computation


def play(path: str, flags: list[str], folder: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Be python PATH FLAGS in a folder, writing to two files."""
    for number, name in ((1, stdout), (2, stderr)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [path, *flags]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
