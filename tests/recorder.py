"""python tests/recorder.py OUT FLAGS: residual_ppo.py, which also writes what it computed to OUT, an npz file.

states: all of TrainState after each iteration, flattened (iterations, size); flops: of an update, on each device;
evaluations: what each call of evaluate returned, flattened.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from conftest import run_main  # noqa: E402

import residual_ppo  # noqa: E402

out, states, inputs, evaluations = sys.argv.pop(1), [], [], []
train, evaluate = residual_ppo.train, residual_ppo.evaluate


def flatten(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def recording_train(env, update, args, state, log):
    def recording_update(*data):
        inputs.append((update, data))
        return update(*data)

    def recording_log(iteration, state, metrics):
        states.append(flatten(jax.device_get(state)))
        log(iteration, state, metrics)

    return train(env, recording_update, args, state, recording_log)


def recording_evaluate(*inputs):
    results = evaluate(*inputs)
    evaluations.append(flatten(results))
    return results


residual_ppo.train, residual_ppo.evaluate = recording_train, recording_evaluate
run_main(residual_ppo, tyro.cli(residual_ppo.Args))
update, data = inputs[-1]
flops = update.func.lower(*update.args, *data).compile().cost_analysis()["flops"]
np.savez(out, flops=flops, states=np.stack(states), evaluations=np.stack(evaluations))
