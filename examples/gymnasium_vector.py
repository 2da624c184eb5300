"""Gymnasium's vector environments, to stand in a copy of a script where its make_simulator is, with one of one's own.

Each step is a call from the compiled rollout to Python. Put your environment in the place of Point, or make one by
gymnasium.make. Give --env-id any name; --addon none, or a line in ADDON_TASKS. Simulator is the script's.
"""

import gymnasium
import jax
import numpy as np
from jax.experimental import io_callback


class Point(gymnasium.Env):
    """A point in the plane that should stay at the origin; leaving a square of side 4 ends an episode, or 100 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)  # position and velocity
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)  # acceleration

    def reset(self, *, seed=None, options=None):
        """Start anywhere, at rest."""
        super().reset(seed=seed)
        self.state, self.steps = np.float32([*self.np_random.uniform(-1, 1, 2), 0, 0]), 0
        return self.state.copy(), {}

    def step(self, action):
        """A tenth of a second."""
        self.state[2:] += 0.1 * action
        self.state[:2] += 0.1 * self.state[2:]
        self.steps += 1
        outside = bool((np.abs(self.state[:2]) > 2).any())
        return self.state.copy(), 1 - float(np.abs(self.state[:2]).sum()), outside, self.steps == 100, {}


def make_simulator(env_id: str, env_kwargs: str, seeds: np.ndarray) -> "Simulator":  # noqa: F821
    """An environment for each of the seeds (num_envs,); Gymnasium's own mode of resetting is what a Simulator wants."""
    mode = gymnasium.vector.AutoresetMode.NEXT_STEP
    envs = gymnasium.vector.SyncVectorEnv([Point] * len(seeds), autoreset_mode=mode)
    space, actions, count = envs.single_observation_space, envs.single_action_space, len(seeds)
    shapes = {"obs": np.zeros((count, *space.shape), np.float32), "reward": np.zeros(count, np.float32)}
    shapes |= {"terminated": np.zeros(count, bool), "truncated": np.zeros(count, bool), "steps": np.int32(0)}

    def host_step(steps, action):
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(action))
        values = np.float32(obs), np.float32(reward), terminated, truncated, np.int32(steps + 1)
        return dict(zip(shapes, values, strict=True))

    def reset():
        return np.int32(0), np.float32(envs.reset(seed=seeds.tolist())[0])

    def step(steps, action):  # as each call takes what the one before returned, they keep their order
        result = io_callback(host_step, shapes, steps, action)
        return result["steps"], result["obs"], result["reward"], result["terminated"], result["truncated"]

    return Simulator(reset, step, *space.shape, actions.low, actions.high, jax.devices("cpu")[0], "gymnasium")  # noqa: F821
