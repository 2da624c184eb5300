"""python tests/two_devices.py FOLDER: all five scripts on two devices; writes FOLDER/said.json, what ran where.

The first CPU device is the host's, as ever; the second one stands for an accelerator. While they train and evaluate,
what is moved between the two, or from NumPy to either, without device_put or device_get is an error. Some are run
again, with another seed, and find what they compiled in FOLDER/cache.
"""

import json
import os
import sys
from pathlib import Path

folder = Path(sys.argv.pop(1))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")

import jax  # noqa: E402

root = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (root, root / "tests", root / "residual_q_learning"))
from conftest import run_main  # noqa: E402

import residual_ppo  # noqa: E402
import residual_sac  # noqa: E402
import soft_ppo  # noqa: E402
import soft_sac  # noqa: E402
import train_prior_ppo  # noqa: E402

host, accelerator = jax.devices("cpu")
jax.devices = lambda backend=None: [host if backend == "cpu" else accelerator]
jax.device_count = lambda: 1
jax.config.update("jax_default_device", accelerator)

FLAGS = {"env_id": "InvertedPendulum-v4", "num_envs": 4, "num_steps": 8, "total_timesteps": 96, "eval_episodes": 1}
FLAGS |= {"runs_dir": folder / "runs", "progress": False}
PPO = {"num_minibatches": 2}
SAC = {"learning_starts": 40, "batch_size": 8, "critic_hidden_sizes": (8,), "updates_per_step": 1 / 16}
NEW = {"hidden_sizes": (8,)}
OLD = {"env_id": "Hopper-v4", "prior": root / "priors" / "Hopper-v4.safetensors"}
PRIOR = NEW | {"num_evals": 1, "export": folder / "prior.safetensors"}
SCRIPTS = {
    train_prior_ppo: ("train", "soft_update", PPO | PRIOR, 1),
    soft_ppo: ("train", "soft_update", PPO | NEW, 1),
    residual_ppo: ("train", "residual_update", PPO | OLD, 2),
    soft_sac: ("train_off_policy", "soft_sac_update", SAC | NEW, 2),
    residual_sac: ("train_off_policy", "residual_sac_update", SAC | OLD, 1),
}


def watched(function, name, where):
    """A function that notes where its results are, and which arrays of a prior it was given."""

    def call(*inputs):
        outputs = function(*inputs)
        arrays = [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]
        where.setdefault(name, set()).update(device.id for x in arrays for device in x.devices())
        if name.startswith("residual"):
            where.setdefault("priors", set()).add(str([id(x) for x in jax.tree.leaves(inputs[1])]))
        return outputs

    return call


def guarded(function):
    """A function during which nothing moves without a word."""

    def call(*inputs, **options):
        with jax.transfer_guard("disallow"):
            return function(*inputs, **options)

    return call


said = {}
for script, (train, update, flags, seeds) in SCRIPTS.items():
    where = {}
    for name in (update, "rollout", "first_episodes"):
        setattr(script, name, watched(getattr(script, name), name, where))
    for name in (train, "evaluate"):
        setattr(script, name, guarded(getattr(script, name)))
    compiled = []
    for seed in range(1, 1 + seeds):
        before = set((folder / "cache").glob("*-cache"))
        run_main(script, script.Args(**FLAGS | flags, seed=seed))
        new = set((folder / "cache").glob("*-cache")) - before
        compiled.append(sorted(path.name.partition("-")[0].removeprefix("jit_") for path in new))
    said[script.__name__] = {name: sorted(x) for name, x in where.items()} | {"compiled": compiled}
(folder / "said.json").write_text(json.dumps(said, indent=1))
