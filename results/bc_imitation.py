"""Behaviour cloning by the library imitation, at a given budget, its policy written as a policy file.

    pip install imitation safetensors
    python results/bc_imitation.py demonstrations.npz policy.safetensors --env-id Hopper-v4 --num-updates 5000

imitation 1.0 wants older versions of Gymnasium and Stable-Baselines3 than the rest, so it needs an environment of its
own, and nothing of this repository.  All that is not given here is at its defaults.
"""

import argparse
import json

import gymnasium
import numpy as np
import safetensors.numpy
import torch
from imitation.algorithms import bc
from imitation.data.types import Transitions
from imitation.policies.base import NormalizeFeaturesExtractor
from stable_baselines3.common.policies import ActorCriticPolicy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("demonstrations", help="an .npz file, as train_prior_bc.py reads")
parser.add_argument("export", help="the policy file to write")
parser.add_argument("--env-id", required=True)
parser.add_argument("--num-updates", type=int, required=True)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[256, 256])
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()

torch.manual_seed(args.seed)
torch.set_num_threads(1)
with np.load(args.demonstrations) as file:
    obs, action, low, high = (file[x] for x in ("observations", "actions", "action_low", "action_high"))
spaces = gymnasium.spaces.Box(-np.inf, np.inf, obs.shape[1:], np.float32), gymnasium.spaces.Box(low, high)
policy = ActorCriticPolicy(
    *spaces,
    lr_schedule=lambda _: 1e-3,
    net_arch=args.hidden_sizes,
    activation_fn=torch.nn.ReLU,
    features_extractor_class=NormalizeFeaturesExtractor,
)
# It asks for the next observations, and does not use them.
transitions = Transitions(obs, action, np.array([{}] * len(obs)), next_obs=obs, dones=np.zeros(len(obs), bool))
trainer = bc.BC(
    observation_space=spaces[0],
    action_space=spaces[1],
    rng=np.random.default_rng(args.seed),
    policy=policy,
    demonstrations=transitions,
    batch_size=args.batch_size,
    device="cpu",
)
trainer.train(n_batches=args.num_updates, progress_bar=False, log_interval=1_000_000)

state = {name: x.detach().cpu().numpy() for name, x in policy.state_dict().items()}
norm = {name.rpartition(".")[2]: x for name, x in state.items() if name.startswith("features_extractor.normalize.")}
layers = [f"mlp_extractor.policy_net.{2 * i}" for i in range(len(args.hidden_sizes))] + ["action_net"]
tensors = {f"actor_mean.{2 * i}.{x}": state[f"{name}.{x}"] for i, name in enumerate(layers) for x in ("weight", "bias")}
tensors |= {"actor_logstd": state["log_std"], "obs_mean": norm["running_mean"], "obs_var": norm["running_var"] + 1e-5}
metadata = {"env_id": args.env_id, "squash": "false", "activation": "relu", "obs_clip": "inf"}
metadata["hidden_sizes"] = json.dumps(args.hidden_sizes)
safetensors.numpy.save_file({k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}, args.export, metadata)
