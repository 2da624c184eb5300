"""python tests/recorder.py OUT FLAGS: residual_ppo.py, which also writes what it computed to OUT, an npz file.

states: all of TrainState after each iteration, flattened (iterations, size); flops: of an update, on each device.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import residual_ppo

out, states, inputs = sys.argv.pop(1), [], []
train = residual_ppo.train


def recording_train(env, addon, actor, update, *rest):
    def recording_update(*data):
        inputs.append((update, data))
        return update(*data)

    return train(env, addon, actor, recording_update, *rest, after=lambda state: states.append(jax.device_get(state)))


residual_ppo.train = recording_train
residual_ppo.main(tyro.cli(residual_ppo.Args))
update, data = inputs[-1]
flops = update.func.lower(*update.args, *data).compile().cost_analysis()["flops"]
flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)]) for state in states]
np.savez(out, states=np.stack(flat), flops=flops)
