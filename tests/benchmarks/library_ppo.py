"""PPO of Stable-Baselines3 on these environments beside this project's, in CPU seconds to the same level.

    python getData.py --source synthetic --seed 10 --data-dir FOLDER
    python feature_reducer.py --scale small --data-dir FOLDER
    OMP_NUM_THREADS=1 python tests/benchmarks/library_ppo.py FOLDER

Every line is a validation: growth over the benchmark, basis points a day, of the deterministic policy on the
validation split, and the CPU seconds of training before it (set-up aside; Stable-Baselines3's validations
aside too). Three settings of Stable-Baselines3: everything as it comes; decisions an hour apart, logits and
latents, with its own MLP; the same with this project's network. Then train.py's PPO as it comes on the same
latents, so with a fixed encoder and without pretraining.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from portfolio_env import PortfolioEnv

HOLD, ENVS, STEPS = 12, 16, 128
LOG_STD = -1.0  # of the library's policies
SETTINGS = {"n_steps": STEPS, "batch_size": 512, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 0.5}


class ProjectPolicy(ActorCriticPolicy):
    """train.py's ActorCritic at the small scale, tied between the coins, on latents and weights held."""

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        names = {"TRUNK": "trunk", "TOKEN_WIDTH": "width", "HEADS": "heads", "BLOCKS": "blocks"}
        shape = {argument: getattr(train, name).small for name, argument in names.items()}
        shape["feed_forward"] = 4 * shape["width"]
        self.assets = self.action_space.shape[0] + 1
        latent_dim = self.observation_space.shape[0] - self.assets
        self.network = train.ActorCritic(latent_dim, self.assets, **shape, log_std=LOG_STD, tied=True)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _outputs(self, seen: torch.Tensor) -> tuple:
        """Distribution and values [B] of observations [B, L + A]."""
        latent, weights = seen.split([seen.shape[1] - self.assets, self.assets], dim=1)
        mean, value = self.network(self.network.market_tokens(latent), weights)
        return self.action_dist.proba_distribution(mean, self.network.log_std.expand_as(mean)), value

    def forward(self, obs: torch.Tensor, deterministic: bool = False) -> tuple:
        distribution, value = self._outputs(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, value[:, None], distribution.log_prob(actions)

    def evaluate_actions(self, obs: torch.Tensor, actions: torch.Tensor) -> tuple:
        distribution, value = self._outputs(obs)
        return value[:, None], distribution.log_prob(actions), distribution.entropy()

    def predict_values(self, obs: torch.Tensor) -> torch.Tensor:
        return self._outputs(obs)[1][:, None]

    def get_distribution(self, obs: torch.Tensor) -> object:
        return self._outputs(obs)[0]


def validate(model: PPO, options: dict) -> float:
    """Growth over the benchmark, bp a day, from all cash through the whole validation split."""
    options = options | {"split": "validation", "random_weights": False}
    probe = PortfolioEnv(**options | {"steps": 1})
    hold = probe.hold_bars
    steps = (probe.last_row + hold - probe.first_row) // hold
    env = PortfolioEnv(**options | {"steps": steps})
    seen, _ = env.reset(options={"start": env.first_row})
    normal, gained, over = model.get_vec_normalize_env(), 0.0, False
    while not over:
        action, _ = model.predict(normal.normalize_obs(seen) if normal else seen, deterministic=True)
        seen, reward, terminated, truncated, _ = env.step(action)
        gained, over = gained + reward, terminated or truncated
    return 1e4 * gained / (steps * hold / 288)


def stable_baselines(
    name: str, policy: object, total: int, every: int, options: dict, settings: dict
) -> None:
    """Train and print a line for each validation."""
    env = make_vec_env("CryptoPortfolio-v0", ENVS, seed=0, env_kwargs=options)
    if settings:
        env = VecNormalize(env, norm_obs=policy == "MlpPolicy", gamma=settings["gamma"])
    model = PPO(policy, env, seed=0, device="cpu", **settings)
    seconds = 0.0
    for done in range(0, total, every):
        begun = time.process_time()
        model.learn(every, reset_num_timesteps=not done)
        seconds += time.process_time() - begun
        show(name, model.num_timesteps, seconds, validate(model, options))


def this_project(folder: Path) -> None:
    """Run train.py, and print a line for each validation."""
    flags = [f"--hold={HOLD}", "--validate-every=5", "--pretrain-epochs=0", "--no-train-encoder", "--no-test"]
    flags += [f"--num-envs={ENVS}", f"--steps={STEPS}", "--batches=40", "--run=library-ppo"]
    replicas = ENVS * train.REPLICAS
    command = [sys.executable, "-u", train.__file__, "--scale=small", f"--data-dir={folder}", *flags]
    begun = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        clock = psutil.Process(process.pid)
        for line in process.stdout:
            batch = re.match(r"batch +(\d+)/", line)
            if not batch:
                continue
            used = sum(clock.cpu_times()[:2])
            if batch[1] == "1":
                # the set-up, and a batch that is not counted
                begun = used
            if found := re.search(r"validation (\S+)", line):
                show("train.py", int(batch[1]) * replicas * STEPS, used - begun, float(found[1]))


def show(name: str, steps: int, seconds: float, validation: float) -> None:
    """Print a line."""
    print(f"{name:34}{steps:>9,} steps {seconds:>7.1f} s {validation:>+8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200_000, help="of each training but the first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = {"data_dir": arguments.folder}
    slower = plain | {"hold_bars": HOLD, "steps": STEPS, "action": "logits", "observation": "latents"}
    slower |= {"random_weights": True}
    rollout = ENVS * STEPS
    steps = arguments.steps // rollout * rollout
    stable_baselines("SB3, everything as it comes", "MlpPolicy", 2 * 16 * 2048, 16 * 2048, plain, {})
    own = SETTINGS | {"policy_kwargs": {"log_std_init": LOG_STD}}
    stable_baselines("SB3, hold 12, logits, latents", "MlpPolicy", steps, 8 * rollout, slower, own)
    stable_baselines("SB3, the same, project's network", ProjectPolicy, steps, 8 * rollout, slower, SETTINGS)
    this_project(arguments.folder)


if __name__ == "__main__":
    main()
