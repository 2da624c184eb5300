"""A simulator written in JAX, to stand in a copy of a script where its make_simulator is: Gymnasium's Pendulum-v1.

Rollouts then run where the updates do, and nothing crosses to the host. Give --env-id any name; --addon none, or a line
in ADDON_TASKS. Simulator is the script's.
"""

import jax
import jax.numpy as jnp
import numpy as np


def make_simulator(env_id: str, env_kwargs: str, seeds: np.ndarray) -> "Simulator":  # noqa: F821
    """One pendulum for each of the seeds (num_envs,), in episodes of 200 steps."""
    high, device = np.float32([2]), jax.devices()[0]

    def start(key):  # a key and what it draws: an angle, 0 being upright, and a speed
        key, angle_key, speed_key = jax.random.split(key, 3)
        return (
            key,
            jax.random.uniform(angle_key, (), float, -jnp.pi, jnp.pi),
            jax.random.uniform(speed_key, (), float, -1),
        )

    def observe(angle, speed):
        return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed], -1)

    def reset():
        key, angle, speed = jax.vmap(start)(jax.vmap(jax.random.key)(jax.device_put(seeds, device)))
        return (key, angle, speed, jnp.zeros(len(seeds), int)), observe(angle, speed)

    def step(state, action):
        key, angle, speed, steps = state
        torque, reset_now = action[:, 0], steps == 200  # the step after an end only resets
        offset = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        reward = -(offset**2 + 0.1 * speed**2 + 0.001 * torque**2)
        next_speed = jnp.clip(speed + (15 * jnp.sin(angle) + 3 * torque) * 0.05, -8, 8)
        next_key, new_angle, new_speed = jax.vmap(start)(key)
        angle = jnp.where(reset_now, new_angle, angle + next_speed * 0.05)
        speed = jnp.where(reset_now, new_speed, next_speed)
        steps = jnp.where(reset_now, 0, steps + 1)
        never = jnp.zeros_like(reset_now)  # it never terminates
        return (next_key, angle, speed, steps), observe(angle, speed), reward, never, steps == 200

    return Simulator(reset, step, 3, -high, high, device, "jax_pendulum")  # noqa: F821
