"""What GPUs and TPUs are given to compute, as far as it can be shown without one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import NamedSharding
from jax.sharding import AbstractMesh

import residual_ppo
import residual_sac
import soft_ppo
import soft_sac
import train_prior_ppo

PPO = {"num_envs": 8, "num_steps": 4, "num_minibatches": 2, "hidden_sizes": (8, 8)}
SAC = {"num_envs": 8, "num_steps": 4, "updates_per_step": 1 / 16, "batch_size": 8, "critic_hidden_sizes": (8,)}
CUSTOMISE = {"gamma": 0.99, "omega_prime": 0.3, "alpha_hat": 0.03, "survival_reward": 1.0}
OBS_DIM, ACTION_DIM = 11, 3


def shape(*sizes, dtype=jnp.float32):
    """The shape and type of an array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


KEY, FLAGS = shape(2, dtype=jnp.uint32), shape(4, 8, dtype=bool)
ROLLOUT = (shape(5, 8, OBS_DIM), shape(4, 8, ACTION_DIM), shape(4, 8), shape(4, 8), FLAGS, FLAGS, FLAGS)


def actor(script, **form):
    """A small policy's form."""
    return script.Actor(ACTION_DIM, (8, 8), **form)


def prior(script):
    """The shapes of a policy."""
    form = actor(script, state_dependent_std=True)
    stats = script.RunningStats(shape(OBS_DIM), shape(OBS_DIM), shape())
    return script.Policy(jax.eval_shape(form.init, jax.random.key(0), shape(OBS_DIM)), stats, form)


def ppo_inputs(script, args, **form):
    """What an update is given after its settings: state, transitions and key."""
    state = jax.eval_shape(partial(script.init_state, args, actor(script, **form), OBS_DIM), KEY)
    return state, script.Transitions(*ROLLOUT), KEY


def sac_inputs(script, args):
    """The same of SAC, with the buffer."""
    form = actor(script, state_dependent_std=True)
    state = jax.eval_shape(partial(script.init_sac_state, args, 0.1, form, OBS_DIM), KEY)
    buffer = jax.eval_shape(partial(script.empty_buffer, args, OBS_DIM, ACTION_DIM))
    return state, buffer, script.Transitions(*ROLLOUT), KEY


def trace_soft(script, entropy, seed, **form):
    """An iteration of soft_ppo.py or train_prior_ppo.py with a treatment of entropy."""
    args = script.Args(**PPO, seed=seed)
    loss = partial(script.entropy_bonus_loss, ent_coef=0.01) if entropy in ("bonus", "repeat") else script.ppo_loss
    alpha = 0.1 if entropy in ("soft", "repeat") else 0.0
    return script.soft_update.trace(loss, 1.0, alpha, args, *ppo_inputs(script, args, **form))


def trace_residual(init_from_prior, seed):
    """An iteration of residual_ppo.py."""
    args = residual_ppo.Args(**PPO, **CUSTOMISE, init_from_prior=init_from_prior, seed=seed)
    return residual_ppo.residual_update.trace(args, prior(residual_ppo), *ppo_inputs(residual_ppo, args))


def trace_soft_sac(seed):
    """An iteration of soft_sac.py with all that it can do."""
    args = soft_sac.Args(**SAC, auto_alpha=True, layer_norm=True, target_network_frequency=2, seed=seed)
    return soft_sac.soft_sac_update.trace(args, *sac_inputs(soft_sac, args))


def trace_residual_sac(seed):
    """An iteration of residual_sac.py."""
    args = residual_sac.Args(**SAC, **CUSTOMISE, init_from_prior=False, seed=seed)
    return residual_sac.residual_sac_update.trace(args, prior(residual_sac), *sac_inputs(residual_sac, args))


PPO_UPDATES = {
    "residual_ppo": partial(trace_residual, True),
    "residual_ppo from scratch": partial(trace_residual, False),
    "soft_ppo soft": partial(trace_soft, soft_ppo, "soft", state_dependent_std=True),
    "soft_ppo bonus": partial(trace_soft, soft_ppo, "bonus"),
    "soft_ppo repeat": partial(trace_soft, soft_ppo, "repeat", state_dependent_std=True),
    "soft_ppo none": partial(trace_soft, soft_ppo, "none", squash=False),
    "train_prior_ppo": partial(trace_soft, train_prior_ppo, "soft"),
}
SAC_UPDATES = {"soft_sac": trace_soft_sac, "residual_sac": trace_residual_sac}
CASES = [(name, count) for name in PPO_UPDATES for count in (1, 4)] + [(name, 1) for name in SAC_UPDATES]


@pytest.mark.parametrize(("name", "num_devices"), CASES)
def test_update_is_lowered_for_gpu_and_tpu_in_true_float32(name, num_devices, monkeypatch):
    """No custom call, no float64, every product of matrices in true float32; SAC learns on one device."""
    mesh = AbstractMesh((num_devices,), ("data",))
    for script in (residual_ppo, soft_ppo, train_prior_ppo):
        monkeypatch.setattr(script, "across_devices", partial(NamedSharding, mesh))
    traced = (PPO_UPDATES | SAC_UPDATES)[name](seed=num_devices)  # another seed is traced anew
    text = traced.lower(lowering_platforms=("cuda", "tpu")).as_text()
    assert f'["data"={num_devices}]' in text or name in SAC_UPDATES
    assert "custom_call" not in text
    assert "f64" not in text
    products = re.findall(r"stablehlo\.(?:dot|dot_general|convolution)\b.*", text)
    assert len(products) >= 12
    assert [x for x in products if "precision = [HIGHEST, HIGHEST]" not in x] == []
