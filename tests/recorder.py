"""python tests/recorder.py OUT FLAGS: residual_ppo.py, which also writes what it computed to OUT, an npz file.

states: all of TrainState after each iteration, flattened (iterations, size); flops: of an update, on each device;
training_seeds, eval_seeds: of the environments; evaluations: what each call of evaluate returned, flattened.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import residual_ppo

out, states, inputs, seeds, evaluations = sys.argv.pop(1), [], [], [], []
make_env, train, evaluate = residual_ppo.make_env, residual_ppo.train, residual_ppo.evaluate


def flatten(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def recording_make_env(env_id, addon, squash, env_seeds):
    seeds.append(env_seeds)
    return make_env(env_id, addon, squash, env_seeds)


def recording_train(env, update, *rest):
    def recording_update(*data):
        inputs.append((update, data))
        return update(*data)

    return train(env, recording_update, *rest, after=lambda state: states.append(flatten(jax.device_get(state))))


def recording_evaluate(*inputs):
    results = evaluate(*inputs)
    evaluations.append(flatten(results))
    return results


residual_ppo.make_env, residual_ppo.train = recording_make_env, recording_train
residual_ppo.evaluate = recording_evaluate
residual_ppo.main(tyro.cli(residual_ppo.Args))
update, data = inputs[-1]
flops = update.func.lower(*update.args, *data).compile().cost_analysis()["flops"]
training_seeds, eval_seeds = seeds
arrays = {"states": np.stack(states), "evaluations": np.stack(evaluations)}
np.savez(out, flops=flops, training_seeds=training_seeds, eval_seeds=eval_seeds, **arrays)
