"""The policy, PPO and the joint update."""

import copy
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, altered, put_back, same_tensors, set_constants
from hypothesis import given
from hypothesis import strategies as st
from test_feature_reducer import BARS, FOOTER, make_frames
from torch import nn
from transformers.optimization import Adafactor

import feature_reducer
import getData
import portfolio_env
import train
from feature_reducer import FeatureReducer, FeatureWindows, load_checkpoint
from getData import UsageError, UserError
from portfolio_env import VectorPortfolioEnv

sys.path.append(str(ROOT / "tests" / "benchmarks"))
import launches

COINS = 3
LATENT = 12
EPSILON = 0.5
GAMMA = 0.99
CONSTANTS = {  # of this file's tests, which may set others
    "SEEDS": (0,), "GAMMA": (GAMMA, GAMMA), "CLIP": 0.2, "POLICY_SHARE": 0.7, "RECONSTRUCTION_SHARE": 0.3,
    "TARGET_KL": 0.0, "REPLICAS": 1, "UPDATE_EPOCHS": 1, "MINIBATCH": 128, "NUM_ENVS": 8, "STEPS": 16,
    "MASK": 0.0, "SCALE": "small", "_REWARD_SCALE": 1.0, "_LEAST_COINS": COINS,
    "SWEEPS": 0,
}  # fmt: skip
dense_and_tied = pytest.mark.parametrize("tied", [False, True], ids=["dense", "tied"])


def make_policy(log_std: float = -1.0, tied: bool = False) -> train.ActorCritic:
    torch.manual_seed(0)
    return train.ActorCritic(LATENT, COINS + 1, (20, 16), 8, 2, 16, 2, 3.0, log_std, tied)


def make_env(
    hold_bars: int = 1, device: str = "cpu", coins: Sequence[int] = range(COINS)
) -> VectorPortfolioEnv:
    generator = torch.Generator().manual_seed(3)
    steps = 0.002 * torch.randn(2_000, COINS, generator=generator, dtype=torch.float64)
    close = steps.cumsum(0).exp()
    opens = torch.cat([torch.ones(1, COINS, dtype=torch.float64), close[:-1]])
    prices = (part[:, list(coins)].to(device) for part in (opens, close))
    return VectorPortfolioEnv(*prices, cost=0.001, hold_bars=hold_bars)


@pytest.fixture(scope="module")
def windows() -> FeatureWindows:
    return FeatureWindows(make_frames(), BARS, train=(600 * 300_000, 1_500 * 300_000))


@pytest.fixture
def make_setup(windows, monkeypatch) -> Callable[..., train.Setup]:
    """A function that gives train.py the constants of this file and others, and makes what it works on."""

    def make(amp=False, tied=False, log_std=-1.0, hold_bars=1, **constants: object) -> train.Setup:
        full = {name: value.full for name, value in vars(train).items() if isinstance(value, getData.Scaled)}
        for name, value in (full | CONSTANTS | constants).items():
            monkeypatch.setattr(train, name, value)
        policy = make_policy(log_std, tied)
        return train.Setup(
            device=torch.device("cpu"), amp=amp, footer=FOOTER, windows=windows, env=make_env(hold_bars),
            prices=(), train_rows=torch.arange(600, 1_500), spans={}, return_scale=500.0, policy=policy,
            reducer=FeatureReducer(windows.input_dim, 16, LATENT, COINS if tied else None),
        )  # fmt: skip

    return make


def no_mask(steps: int, count: int) -> torch.Tensor:
    return torch.zeros(steps + 1, count, COINS, len(BARS), dtype=torch.bool)


def same_order(count: int) -> train.Permutation:
    return train.Permutation(torch.arange(COINS).expand(count, COINS), COINS + 1)


def two_segments() -> tuple[torch.Tensor, train.Permutation]:
    return train.random_weights(2, COINS + 1, train.generator_for(0)), same_order(2)


def roll(setup: train.Setup, batch: int = 0, epsilon: float = EPSILON, sweeps: int = 0) -> train.Rollout:
    draws = train.draw_rollout(setup, batch, epsilon)
    steps, segments = draws.explores.shape
    rows = train.segment_rows(draws.starts, steps, setup.env.hold_bars)
    coins, masked = draws.permutation.coins.repeat(steps + 1, 1), draws.masked.flatten(0, 1)
    tokens = train.encode(setup.policy, setup.reducer, setup.windows, rows, 300, coins, masked)
    tokens = tokens.unflatten(0, (steps + 1, segments))
    return train.collect_rollout(setup, tokens, draws, train.GAMMA[0], sweeps)


def make_optimizers(setup: train.Setup, *rates: float) -> tuple[torch.optim.Optimizer, ...]:
    optimizers = train.make_optimizers(setup.policy, setup.reducer)
    train.set_rates(optimizers, rates, 0.0)
    return optimizers


def make_run(
    setup: train.Setup, folder: Path = Path(), rates: tuple = (), scale: float = 1024.0, **progress: object
) -> train.Run:
    """A training of the run "a" that has moved nothing yet."""
    progress = train.Progress(run="a", started="now", pretrain_encoder_rate=0.1, hold_bars=1, **progress)
    return train.Run(
        last=folder / "checkpoints" / "a" / "last.pt", progress=progress, fixed={},
        optimizers=make_optimizers(setup, *rates) if rates else (),
        scaler=torch.amp.GradScaler(setup.device.type, init_scale=scale, enabled=setup.amp),
        stop=SimpleNamespace(exit_code=0), saver=feature_reducer.Saver(5), data=setup, flags={},
        policy=setup.policy, reducer=setup.reducer, changed={}, counted=True,
    )  # fmt: skip


def update(setup: train.Setup, rollout: train.Rollout, rates: tuple = (1e-4, 1e-4)) -> dict[str, float]:
    return train.update(setup, make_run(setup, rates=rates), rollout)


def losses(policy, batch: train.Rollout, mean, value):
    """The losses of transitions [B, K, ...]; mean and value are [B * K, ...], as the policy gives them."""
    mean, value = mean.view(batch.logits.shape), value.view(batch.value.shape)
    return train.ppo_losses(mean, value, policy.log_std, batch, 0.2)


def outputs(setup: train.Setup, batch: train.Rollout):
    """Means [B * K, N] and values of transitions [B, K, ...], each encoded by itself."""
    flat = [part.flatten(0, 1) for part in (batch.rows, batch.permutation, batch.masked, batch.weights)]
    rows, coins, masked, weights = flat
    inputs = setup.windows(rows, coins)
    latent, reconstruction = setup.reducer(train.mask_windows(inputs.clone(), masked, setup.windows))
    return *setup.policy(setup.policy.market_tokens(latent), weights), inputs, reconstruction


# ----------------------------------------------------------------------------------------------------- policy


def test_full_scale_architecture():
    with torch.device("meta"), torch.no_grad():
        latent = FeatureReducer(134_980, 3_222, 2_148).encoder(torch.empty(5, 134_980))
        policy, tied = (train.ActorCritic(2_148, 11, tied=tied) for tied in (False, True))
        for agent in (policy, tied):
            tokens = agent.market_tokens(latent)
            assert tokens.shape == (5, 11, 192)
            assert agent.actor.out_features == agent.critic.out_features == 1  # of each token, and of all
            assert len(agent.blocks) == 8
            assert all(block.self_attn.num_heads == 12 and block.norm_first for block in agent.blocks)
            assert all(block.linear1.weight.shape == (768, 192) for block in agent.blocks)
    assert policy.log_std.shape == (10,)  # ten coins beside cash at 0: 11 actions
    block = 4 * 192 * 192 + 4 * 192 + 2 * 192 * 768 + 768 + 192 + 4 * 192
    trunk = 2 * 2_148 + 2_148 * 768 + 768 + 768 * 384 + 384 + 384 * 2_112 + 2_112
    rest = 11 * 192 + 2 * 192 + 2 * 192 + 2 * 193 + 10
    assert sum(parameter.numel() for parameter in policy.parameters()) == 8 * block + trunk + rest
    coin = (193, 218), (69, 78), (34, 44), (192, 192)  # 10 x 69 + 78 = 768, 10 x 34 + 44 = 384
    sizes = [(layer.inputs, layer.outputs) for layer in (tied.trunk[position] for position in (1, 3, 5))]
    assert sizes == list(itertools.pairwise(coin))


def test_a_tied_policy_permutes_with_its_coins():
    """Of any number of coins: the logits follow the coins of latent and weights, the value stays."""
    policy = make_policy(tied=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.3)
    coin, market = policy.trunk[1].inputs
    assert coin * COINS + market == LATENT
    for coins in (1, 2, COINS, 7):
        latent = torch.randn(5, coins * coin + market)
        weights = torch.rand(5, coins + 1)
        mean, value = policy(policy.market_tokens(latent), weights)
        assert mean.shape == (5, coins)
        order = torch.randperm(coins)
        moved = latent[:, : coins * coin].view(5, coins, coin)[:, order].flatten(1)
        moved = torch.cat([moved, latent[:, coins * coin :]], 1)
        held = torch.cat([weights[:, :1], weights[:, 1:][:, order]], 1)
        again, same = policy(policy.market_tokens(moved), held)
        torch.testing.assert_close(again, mean[:, order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same, value, rtol=1e-4, atol=1e-5)
    assert (mean[0] - mean[0].mean()).abs().max() > 0.05  # coins do differ


def test_the_policy_sees_the_weights_it_holds_and_wants_about_equal_ones_at_first():
    policy = make_policy()
    tokens, held = policy.market_tokens(torch.randn(50, LATENT)), torch.full((50, COINS + 1), 0.25)
    weights = train.weights_from_logits(policy(tokens, held)[0])
    assert (weights - 0.25).abs().max() < 0.05
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    cash, coin, *_ = torch.eye(COINS + 1).split(1)
    assert not torch.equal(policy(tokens[:1], cash)[0], policy(tokens[:1], coin)[0])
    weights = train.weights_from_logits(torch.tensor([[12.0, 0.0, 0.0], [-12.0, -12.0, -12.0]]))
    assert min(weights[0, 1], weights[1, 0]) > 0.999  # one can come close to 1


def test_gaussian_density_equals_torch_distributions():
    mean, log_std, x = torch.randn(7, COINS), torch.randn(COINS), torch.randn(7, COINS)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(train.gaussian_log_prob(x, mean, log_std), expected)


def test_sampled_actions_follow_the_mixture(make_setup):
    """The share of random steps, and the spread of the others around the mean."""
    setup = make_setup(log_std=-4.0, STEPS=64, NUM_ENVS=16)
    flat = train.flatten_rollout(roll(setup), 1)
    mean = outputs(setup, flat)[0].view(flat.logits.shape)
    near = ((flat.logits - mean).abs() < 6 * math.exp(-4.0)).all(-1)
    assert torch.equal(near, ~flat.explores)
    share = float((~near).float().mean())
    assert abs(share - EPSILON) < 4 * math.sqrt(EPSILON * (1 - EPSILON) / near.numel())
    assert float(flat.logits[~near].std()) == pytest.approx(1.0, rel=0.1)
    assert float((flat.logits - mean)[near].std().detach()) == pytest.approx(math.exp(-4.0), rel=0.1)


def test_permutations_of_the_coins(make_setup):
    """Weights come with the coins in the places that they name; a tied policy sees a part of the coins."""
    order = train.Permutation(torch.tensor([[2, 0, 1], [0, 1, 2]]), 4)
    held = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    assert torch.equal(order.to_slots(held), torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]]))
    assert torch.equal(order.to_env(order.to_slots(held)), held)
    part = train.Permutation(torch.tensor([[2, 0]]), 4)
    assert torch.equal(part.to_env(torch.tensor([[0.1, 0.7, 0.2]])), torch.tensor([[0.1, 0.2, 0.0, 0.7]]))
    for tied, least, orders in ((False, 1, 6), (True, 3, 6), (True, 2, 6), (True, 1, 3)):
        setup, sizes = make_setup(tied=tied, _LEAST_COINS=least), set()
        for key in range(12):
            _, weights, order, masked = train.draw_segments(setup, 200, 1, train.generator_for(key))
            count = order.coins.shape[1]
            sizes.add(count)
            assert masked.shape[2] == count
            assert all(len(set(coins)) == count for coins in order.coins.tolist())
            torch.testing.assert_close(order.to_slots(weights).sum(1), torch.ones(200, dtype=torch.float64))
            if count == least:
                assert len(order.coins.unique(dim=0)) == orders
        assert sizes == (set(range(least, COINS + 1)) if tied else {COINS})


def test_a_part_of_the_coins_is_the_market_of_that_part(windows, make_setup):
    """Gradients of a tied agent that sees two of three coins are those on a market of these two alone. (The
    critic's are not: the benchmark, which no action moves, stays that of all coins.)"""
    setup, coins = make_setup(tied=True, hold_bars=2), [2, 0]
    starts, held = torch.tensor([700, 900]), torch.tensor([[0.1, 0.6, 0.3], [1.0, 0.0, 0.0]]).double()
    frames = {}
    for name, frame in make_frames().items():
        blocks = np.array_split(frame.columns, COINS)  # of the coins
        frames[name] = frame[[column for coin in coins for column in blocks[coin]]]
    market = FeatureWindows(frames, BARS, normalisation=windows.normalisation)

    def gradients(setup: train.Setup, coins: list[int]) -> dict[str, torch.Tensor]:
        for module in setup.modules().values():
            module.zero_grad()
        order = train.Permutation(torch.tensor([coins] * 2), setup.env.assets)
        train.segment_loss(setup, starts, order.to_env(held), order, no_mask(4, 2)[:, :, :2])[0].backward()
        named = (*setup.policy.named_parameters(), *setup.reducer.named_parameters())
        return {name: part.grad.clone() for name, part in named if part.grad is not None}

    part = gradients(setup, coins)
    alone = gradients(replace(setup, windows=market, env=make_env(2, coins=coins)), [0, 1])
    assert (
        part.keys() == alone.keys() > {"actor.weight", "critic.weight", "critic.bias", "encoder.0.own.weight"}
    )
    for name in part.keys() - {"critic.weight", "critic.bias"}:
        torch.testing.assert_close(part[name], alone[name], rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- PPO


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def test_gae_by_hand():
    """A terminated end is worth nothing, a truncated one bootstraps; nothing leaks back over either."""
    # deltas: 1 + 0.9 * 1 - 0.5 = 1.4; 2 + 0.9 * 1.5 - 1 = 2.35, or 2 - 1; 3 + 0.9 * 2 - 1.5 = 3.3, or 3 - 1.5
    parts = column(1.0, 2.0, 3.0), column(0.5, 1.0, 1.5), column(1.0, 1.5, 2.0)
    never, last, twice = (column(*ends).bool() for ends in ((0, 0, 0), (0, 0, 1), (0, 1, 1)))
    for terminated, truncated, expected in (
        (never, last, [1.4 + 0.45 * (2.35 + 0.45 * 3.3), 2.35 + 0.45 * 3.3, 3.3]),
        (last, never, [1.4 + 0.45 * (2.35 + 0.45 * 1.5), 2.35 + 0.45 * 1.5, 1.5]),
        (never, twice, [1.4 + 0.45 * 2.35, 2.35, 3.3]),
        (twice, never, [1.4 + 0.45 * 1.0, 1.0, 1.5]),
    ):
        advantage = train.compute_gae(*parts, terminated, truncated, 0.9, 0.5)
        assert advantage[:, 0].tolist() == pytest.approx(expected)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 3),
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_gae_is_the_sum_of_its_definition(seed, steps, envs, gamma, gae_lambda, ends):
    """Each advantage is the sum of (gamma lambda)^k delta_k over the steps to the next end; float64."""
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, steps, envs))
    terminated, truncated = rng.random((2, steps, envs)) < ends / 2
    arguments = [torch.from_numpy(part) for part in (rewards, values, next_values, terminated, truncated)]
    advantages = train.compute_gae(*arguments, gamma, gae_lambda).numpy()
    deltas, ends = rewards + gamma * ~terminated * next_values - values, terminated | truncated
    for step, env in np.ndindex(steps, envs):
        expected, weight = 0.0, 1.0
        for later in range(step, steps):
            expected += weight * deltas[later, env]
            weight *= gamma * gae_lambda
            if ends[later, env]:
                break
        assert advantages[step, env] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_memory_plan_counts_the_replicas(make_setup, monkeypatch, tmp_path):
    """Activations of the transformer for each transition, tokens once for each window."""
    constants = {"TOKEN_WIDTH": 8, "BLOCKS": 2, "MINIBATCH": 64, "NUM_ENVS": 8, "STEPS": 2**16, "HOLD": 12}
    needs, setup = [], make_setup(**constants)
    setup = replace(setup, footer={"splits": dict.fromkeys(("validation", "test"), (0, 1))})
    monkeypatch.setattr(feature_reducer, "check_room", lambda parts, *_: needs.append(parts))
    for replicas, sweeps in (64, 0), (8 * 64, 0), (1, 50):  # more, twice, than pretraining's decisions
        monkeypatch.setattr(train, "REPLICAS", replicas)
        monkeypatch.setattr(train, "SWEEPS", sweeps)
        train.plan_memory(setup.reducer, setup.policy, setup, 0, False, tmp_path)
    one, eight, swept = needs
    assert one["encoded decisions"] == eight["encoded decisions"] == 2 * 4 * 8 * (2**16 + 1) * 4 * 8
    assert eight["policy"] - one["policy"] == 4 * 7 * 64 * 64 * 4 * 8 * 2 * 18
    assert swept["policy"] - one["policy"] == 4 * (16 * 33 * 100 - 64 * 64) * 4 * 8 * 2 * 18


def test_the_mean_of_the_other_replicas_by_hand():
    """The second segment has a ruined replica, the third a single one left, the fourth none."""
    yes, no = True, False
    advantage = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 9e9], [4.0, 9e9, 9e9], [9e9, 9e9, 9e9]])
    alive = torch.tensor([[yes, yes, yes], [yes, yes, no], [yes, no, no], [no, no, no]])
    expected = torch.tensor([[1 - 4, 2 - 3.5, 6 - 1.5], [-1.0, 1.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(train.minus_others(advantage, alive), expected)
    alone = torch.tensor([[3.0], [-1.0]])
    assert torch.equal(train.minus_others(alone, alone < 9), alone)


def test_the_baseline_changes_no_expected_gradient_and_takes_the_market_out():
    """One decision with an exact policy gradient: reward 2 a - a^2 + 3 z a + 20 z with a market z that all
    replicas share, actions a = m + s e, a share epsilon of them random and shared as well.
    Then d E[reward] / d m = (1 - epsilon) (2 - 2 m), whatever the random actions are.
    """
    generator = torch.Generator().manual_seed(0)
    m, s, groups, replicas = 0.3, 0.6, 400_000, 4
    market = torch.randn(groups, 1, generator=generator)
    noise, explores = train.draw_noise(1, groups, replicas, 1, EPSILON, generator)
    noise, explores = noise[0, ..., 0], explores[0, :, None]
    action = torch.where(explores, noise, m + s * noise)
    reward = 2 * action - action.square() + 3 * market * action + 20 * market
    score = torch.where(explores, 0.0, (action - m) / s**2)  # of the density of what is not random

    def gradient(advantage):
        each = (score * advantage).mean(1)
        return float(each.mean()), float(each.std()) / math.sqrt(groups)

    plain, plain_error = gradient(reward)
    reduced, error = gradient(train.minus_others(reward, torch.ones_like(reward, dtype=torch.bool)))
    exact = (1 - EPSILON) * (2 - 2 * m)
    assert abs(plain - exact) < 4 * plain_error
    assert abs(reduced - exact) < 4 * error
    assert error < plain_error / 4


def test_replicas_share_the_market_and_the_random_steps_but_not_the_noise(make_setup):
    rollout = roll(make_setup(REPLICAS=4))
    groups = train.Rollout(*(part.unflatten(1, (8, 4)) for part in rollout))
    for shared in (groups.rows, groups.permutation, groups.masked, groups.explores, groups.benchmark):
        assert torch.equal(shared, shared[:, :, :1].expand_as(shared))
    assert torch.equal(groups.weights[0], groups.weights[0][:, :1].expand_as(groups.weights[0]))
    same = (groups.logits == groups.logits[:, :, :1]).all(-1)[:, :, 1:]
    assert torch.equal(same, groups.explores[:, :, 1:])
    gae = rollout.returns - rollout.value
    expected = train.minus_others(gae.unflatten(1, (8, 4)), groups.alive).flatten(1)
    torch.testing.assert_close(rollout.advantage, expected)
    share = float(1 - rollout.advantage.var() / gae.var())
    assert train.rollout_metrics(rollout, 1)["baseline_share"] == pytest.approx(share)


@pytest.mark.parametrize("sweeps", [0, 1])
@dense_and_tied
def test_ratio_is_one_before_the_first_step_random_steps_included(make_setup, monkeypatch, tied, sweeps):
    """In float64, so that only the algebra can make a difference and not the order of a sum; also where one
    sweep has not settled what is held."""

    call, forward = FeatureWindows.__call__, train.ActorCritic.forward
    monkeypatch.setattr(FeatureWindows, "__call__", lambda *parts: call(*parts).double())
    monkeypatch.setattr(train.ActorCritic, "forward", lambda *parts: forward(*parts[:2], parts[2].double()))
    setup = make_setup(tied=tied, REPLICAS=3, MASK=0.3)
    setup.policy.double(), setup.reducer.double()
    rollout = roll(setup, sweeps=sweeps)
    assert rollout.explores.any()
    flat = train.flatten_rollout(rollout, 3)
    chosen = torch.randperm(len(flat.rows))[:40]
    batch = train.Rollout(*(field[chosen] for field in flat))
    mean, value, *_ = outputs(setup, batch)
    _, stats = losses(setup.policy, batch, mean, value)
    # the heads and weights pass through float32 once, on both sides alike
    assert abs(float(stats["ratio_max"]) - 1) < 1e-5
    assert float(stats["approx_kl"]) < 1e-9
    assert float(stats["clip_fraction"]) == 0


def make_batch(policy, ratios: list[float], advantage: list[float]) -> tuple[train.Rollout, torch.Tensor]:
    count = len(ratios)
    mean, advantage = torch.zeros(count, 1, COINS), column(*advantage)
    logits, no = torch.full((count, 1, COINS), 0.3), torch.zeros(count, 1, dtype=torch.bool)
    log_prob = train.gaussian_log_prob(logits, mean, policy.log_std) - column(*ratios).log()
    fields = dict.fromkeys(train.Rollout._fields, no) | {
        "logits": logits, "log_prob": log_prob.detach(), "alive": ~no,
        "returns": 1.0 + advantage, "advantage": advantage, "value": torch.ones(count, 1),
    }  # fmt: skip
    return train.Rollout(**fields), mean


@dense_and_tied
def test_clipped_objective_by_hand(tied):
    policy = make_policy(tied=tied)
    ratios = [1.5, 1.5, 0.5, 0.5]
    batch, mean = make_batch(policy, ratios, [1.0, -1.0, 1.0, -1.0])
    loss, stats = losses(policy, batch, mean, torch.tensor([2.0, 0.0, 2.0, 0.0]))
    size = 1 / math.sqrt(4 / 3)  # the advantages normalised by their sample standard deviation
    # min(1.5, 1.2) * +; min(-1.5, -1.2); min(0.5, 0.8); min(-0.5, -0.8)
    assert float(stats["actor_loss"]) == pytest.approx(-size * (1.2 - 1.5 + 0.5 - 0.8) / 4, rel=1e-5)
    # returns are 2, 0, 2, 0
    assert float(stats["critic_loss"]) == pytest.approx(0.0, abs=1e-12)
    assert float(stats["clip_fraction"]) == 1.0
    kl = np.mean([ratio - 1 - math.log(ratio) for ratio in ratios])
    assert float(stats["approx_kl"]) == pytest.approx(kl, rel=1e-4)
    entropy = COINS * (-1 + 0.5 * math.log(2 * math.pi * math.e))
    assert float(loss.detach()) == pytest.approx(float(stats["actor_loss"]) - 0.01 * entropy, rel=1e-5)
    # a minibatch of one, whose advantage has no standard deviation
    batch, mean = make_batch(policy, [1.0], [3.0])
    loss, stats = losses(policy, batch, mean, torch.tensor([1.0]))
    assert torch.isfinite(loss)
    assert float(stats["critic_loss"]) == pytest.approx(9.0)


def test_random_steps_and_steps_after_a_ruin_teach_the_actor_nothing():
    policy = make_policy()
    batch, mean = make_batch(policy, [1.5] * 4, [1.0, -1.0, 5.0, 7.0])
    batch = batch._replace(explores=column(0, 0, 1, 0).bool(), alive=column(1, 1, 1, 0).bool())
    mean.requires_grad_()
    loss, stats = losses(policy, batch, mean, torch.tensor([1.0, 1.0, 1.0, 1e6]))
    mean_of, spread = 5 / 3, math.sqrt(((1 - 5 / 3) ** 2 + (1 + 5 / 3) ** 2 + (5 - 5 / 3) ** 2) / 2)
    first, second, third = ((x - mean_of) / spread for x in (1.0, -1.0, 5.0))
    # both below the mean, so that 1.5 counts and not 1.2; the random one has ratio 1
    assert float(stats["actor_loss"]) == pytest.approx(-(1.5 * first + 1.5 * second + third) / 3, rel=1e-5)
    assert float(stats["critic_loss"]) == pytest.approx((1 + 1 + 25) / 3)
    loss.backward()
    assert mean.grad[:2].abs().min() > 0
    assert not mean.grad[2:].any()


class Mover(nn.Module):
    """An agent that moves a share of what it holds to what it wants: its memory of what it held is known."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.wish = share, nn.Parameter(torch.linspace(-1.5, 1.5, 8))

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
        target = (1 - self.share) * weights + self.share * (tokens @ self.wish).softmax(-1)
        return (target[:, 1:] / target[:, :1]).log(), tokens.mean((1, 2))


def decided(gain: float, memory: float) -> train.ActorCritic:
    policy = make_policy(tied=True)
    with torch.no_grad():
        policy.actor.weight.normal_(0, gain)
        policy.weight_embedding.weight.normal_(0, memory)
    return policy


SWEPT = {  # with the turnover of each, per decision
    "keeps": (0.02, lambda: Mover(0.02)),
    "moves": (0.2, lambda: Mover(0.4)),
    "trades": (0.3, lambda: Mover(0.8)),
    "forgets": (0.4, lambda: decided(0.3, 0.1)),
    "reacts": (0.4, lambda: decided(0.3, 1.0)),
}


@pytest.mark.parametrize("agent", SWEPT)
@pytest.mark.parametrize("hold_bars", [1, 12, 288])
@pytest.mark.parametrize("cost", [0.0, 0.001])
def test_sweeps_have_the_gradient_of_one_decision_after_another(make_setup, agent, hold_bars, cost):
    """Within 5 % of it where no weight changed by more than _UNSETTLED in the last sweep; as many sweeps as
    there are states are exact, and an agent that keeps what it holds is not taken for settled before."""
    setup, steps, count = make_setup(tied=True), 12, 8
    noise = torch.randn(4_000, COINS, generator=train.generator_for(3), dtype=torch.float64)
    closes = (0.002 * noise).cumsum(0).exp()
    env = VectorPortfolioEnv(closes, closes, cost=cost, hold_bars=hold_bars, fill="close")
    turnover, make = SWEPT[agent]
    setup = replace(setup, env=env, policy=make())
    generator = train.generator_for(4)
    tokens = torch.randn(steps + 1, count, 3, 8, generator=generator)
    coins = torch.rand(count, COINS, generator=generator).argsort(1)[:, :2]  # of three
    order = train.Permutation(coins, COINS + 1)
    weights = order.to_env(train.random_weights(count, 3, generator))

    def results(sweeps: int):
        segment = tokens, 5 + 40 * torch.arange(count), weights, order, sweeps
        taken, outcomes, unsettled = train.decide_segment(setup, *segment)
        names, parameters = zip(*setup.policy.named_parameters(), strict=True)
        grads = torch.autograd.grad(outcomes.reward.mean(), parameters, allow_unused=True)
        gradient = torch.cat([part.flatten() for part in grads if part is not None])
        return taken, outcomes, float(unsettled), gradient

    taken, outcomes, unsettled, gradient = results(0)
    assert unsettled == 0
    moved = float(taken.target.detach().diff(dim=0).abs().sum(-1).mean()) / 2
    assert moved == pytest.approx(turnover, rel=0.6)
    settled = []
    for sweeps in (1, 2, 3, 4, 6, 9):
        *_, unsettled, approximate = results(sweeps)
        error = float((approximate - gradient).norm() / gradient.norm())
        if unsettled <= train._UNSETTLED:
            settled.append(sweeps)
            assert error < 0.05
    assert bool(settled) == (agent != "keeps")
    exact, same, unsettled, approximate = results(steps + 1)
    assert unsettled < 1e-6
    for first, second in zip((*exact, *same, approximate), (*taken, *outcomes, gradient), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_a_rollout_by_sweeps_is_that_of_one_decision_after_another(make_setup):
    """Of 128 noisy decisions; the account is that of the targets taken."""
    setup = make_setup(tied=True, STEPS=128, REPLICAS=2, _LEAST_COINS=2)
    setup = replace(setup, policy=decided(0.3, 0.3))
    chain, swept, few = (roll(setup, epsilon=0.1, sweeps=sweeps) for sweeps in (0, train._ROLLOUT_SWEEPS, 1))
    assert float((few.reward - chain.reward).abs().max()) > 1e-4
    assert float((few.weights - chain.weights).abs().max()) > 0.1
    assert float((swept.reward - chain.reward).abs().max()) < 1e-4
    for name, tolerance in (("weights", 1e-3), ("log_prob", 1e-2), ("portfolio", 1e-4), ("advantage", 0.05)):
        difference = (getattr(swept, name) - getattr(chain, name)).abs().max()
        assert float(difference) < tolerance, name


@pytest.mark.parametrize(("hold_bars", "limits"), [(1, ()), (2, ()), (2, (0.4, 0.1, 0.15))])
def test_rollout_is_what_the_environment_says(windows, make_setup, hold_bars, limits):
    """And the advantages, from the policy's values of all S + 1 states, the last included."""
    setup, env = make_setup(hold_bars=hold_bars), make_env(hold_bars)
    setup.env.limits = env.limits = portfolio_env.Limits(*limits)
    policy, rollout, swept = setup.policy, roll(setup), roll(setup, sweeps=17)
    torch.testing.assert_close(swept.reward, rollout.reward, rtol=1e-4, atol=1e-9)
    order = train.Permutation(rollout.permutation[0], COINS + 1)
    assert len(order.coins.unique(dim=0)) > 1
    weights = env.reset(rollout.rows[0], 16, order.to_env(rollout.weights[0].double()))
    for step in range(16):
        torch.testing.assert_close(order.to_slots(weights).float(), rollout.weights[step])
        target = order.to_env(train.weights_from_logits(rollout.logits[step].double()))
        weights, reward, _, truncated = env.step(target)
        torch.testing.assert_close(reward, rollout.reward[step], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(env.value, rollout.portfolio[step], rtol=1e-6, atol=0)
    assert truncated.all()
    assert torch.equal(rollout.rows, rollout.rows[:1] + hold_bars * torch.arange(16).unsqueeze(1))
    # total reward = log growth over the benchmark
    growth = rollout.portfolio[-1].log() - rollout.benchmark[-1].log()
    torch.testing.assert_close(rollout.reward.sum(0), growth)
    per_bar = train.rollout_metrics(rollout, hold_bars)["reward"]
    assert per_bar == pytest.approx(float(growth.mean()) / (16 * hold_bars))

    held = torch.cat([rollout.weights, order.to_slots(weights).float().unsqueeze(0)])
    rows = torch.cat([rollout.rows, rollout.rows[-1:] + hold_bars]).flatten()
    with torch.no_grad():
        tokens = policy.market_tokens(setup.reducer.encoder(windows(rows, order.coins.repeat(17, 1))))
        values = policy(tokens, held.flatten(0, 1))[1].reshape(17, 8)
    torch.testing.assert_close(rollout.value, values[:-1])
    powers = (GAMMA * 0.95) ** torch.arange(16.0)
    deltas = 500.0 * rollout.reward.float() + GAMMA * values[1:] - values[:-1]
    for step in range(16):
        expected = (powers[: 16 - step, None] * deltas[step:]).sum(0)
        torch.testing.assert_close(rollout.advantage[step], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sweeps", [0, 3])
def test_steps_after_ruin_are_not_trained_on(make_setup, sweeps):
    """All coins fall by 99 % in one bar: who held them is ruined there, and the others go on."""
    setup, opens = make_setup(), torch.ones(2_000, COINS, dtype=torch.float64)
    opens[int(train.draw_rollout(setup, 0, EPSILON).starts[0]) + 6 :] = 0.01
    env = VectorPortfolioEnv(opens, opens, cost=0.0, ruin=0.5)
    rollout = roll(replace(setup, env=env), sweeps=sweeps)
    ruined = (rollout.portfolio < 0.5).cumsum(0) > 0
    assert ruined[:, 0].any()
    assert not ruined[0, 0]
    assert torch.equal(rollout.alive[1:], ~ruined[:-1])
    assert rollout.alive[0].all()
    assert len(train.flatten_rollout(rollout, 1).rows) == int(rollout.alive.sum()) < rollout.alive.numel()
    fall = int(ruined[:, 0].int().argmax())
    # nothing after the end leaks back: the last step alive is worth its reward and no more
    expected = 500.0 * rollout.reward[fall, 0] - rollout.value[fall, 0]
    assert float(rollout.advantage[fall, 0]) == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------- the joint update


def test_the_transformer_computes_in_float32_whatever_the_precision_around_it():
    policy = make_policy()
    tokens, weights = torch.randn(5, COINS + 1, policy.width), torch.full((5, COINS + 1), 0.25)
    plain = policy(tokens, weights)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = policy(tokens, weights)
    assert same_tensors(plain, mixed)


@dense_and_tied
def test_the_encoder_gets_seven_tenths_policy_and_three_tenths_reconstruction(make_setup, monkeypatch, tied):
    """The gradients that `update` hands to the optimizers, against backward passes that encode each replica's
    masked window anew."""
    setup = make_setup(tied=tied, REPLICAS=2, MASK=0.3)
    policy, reducer, rollout = setup.policy, setup.reducer, roll(setup)
    rollout = rollout._replace(log_prob=rollout.log_prob + 0.1 * torch.randn(rollout.log_prob.shape))

    step = lambda loss, *rest: loss.backward() or dict.fromkeys([*rest[1], "skipped"], 0.0)  # noqa: E731
    monkeypatch.setattr(train, "optimizer_step", step)
    update(setup, rollout)
    batch = train.flatten_rollout(rollout, 2)
    mean, value, inputs, reconstruction = outputs(setup, batch)
    policy_loss, _ = losses(policy, batch, mean, value)
    reconstruction_loss = torch.nn.functional.mse_loss(reconstruction, inputs)

    encoder, pair = list(reducer.encoder.parameters()), (policy_loss, reconstruction_loss)
    of_policy, of_error = (torch.autograd.grad(loss, encoder, retain_graph=True) for loss in pair)
    for parameter, first, second in zip(encoder, of_policy, of_error, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(parameter.grad, 0.7 * first + 0.3 * second, rtol=1e-3, atol=1e-6)
    parts = (reducer.decoder, reconstruction_loss, 0.3, 1e-6), (policy, policy_loss, 1.0, 1e-5)
    for module, loss, share, atol in parts:
        expected = torch.autograd.grad(loss, module.parameters(), retain_graph=True)
        for parameter, gradient in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, share * gradient, rtol=1e-3, atol=atol)


def test_gradients_are_clipped_policy_and_encoder_each(make_setup):
    setup = make_setup(_MAX_NORM=0.5)
    inputs = setup.windows(torch.arange(700, 740))
    latent, reconstruction = setup.reducer(inputs)
    mean, value = setup.policy(setup.policy.market_tokens(latent), torch.full((40, COINS + 1), 0.25))
    loss = 1e4 * (mean.square().mean() + value.mean() + (reconstruction - inputs).square().mean())
    copies = copy.deepcopy(setup.policy), copy.deepcopy(setup.reducer)
    gradients = [torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
                 for module in (setup.policy, setup.reducer)]  # fmt: skip
    stats = train.optimizer_step(loss, make_run(setup, rates=(1e-3, 1e-3)), {})
    plain = {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    libraries = torch.optim.Adam(copies[0].parameters(), lr=1e-3), Adafactor(copies[1].parameters(), **plain)
    for name, clone, grads, library in zip(("policy", "encoder"), copies, gradients, libraries, strict=True):
        for parameter, gradient in zip(clone.parameters(), grads, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(clone.parameters(), 0.5)
        assert norm > 100
        assert stats[f"{name}_grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        library.step()
    for module, clone in zip((setup.policy, setup.reducer), copies, strict=True):
        for parameter, expected in zip(module.parameters(), clone.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)


def test_every_transition_is_visited_once_per_epoch(make_setup, monkeypatch):
    setup = make_setup(UPDATE_EPOCHS=2, MINIBATCH=24)
    rollout, rows, call = roll(setup), [], FeatureWindows.__call__
    record = lambda *parts: rows.extend(parts[1].tolist()) or call(*parts)  # noqa: E731
    monkeypatch.setattr(FeatureWindows, "__call__", record)
    assert update(setup, rollout)["updates"] == 2 * math.ceil(128 / 24)
    assert sorted(rows[:128]) == sorted(rows[128:]) == sorted(rollout.rows.flatten().tolist())
    assert rows[:128] != rows[128:]


def test_a_gpu_is_waited_for_once_a_step_and_given_few_kernels():
    """Once in a pretraining step, after the backward pass, in a rollout, in a minibatch and in a batch."""
    with put_back(train):
        setup = launches.make_setup()
        optimizers = launches.make_optimizers(setup)
        chain, swept = (launches.count_parts(setup, optimizers, sweeps) for sweeps in (0, 3))
        _, waits = launches.count_evaluation(setup.policy, 960, setup.policy.width)
        segments = train.draw_segments(setup, 4, 32, train.generator_for(0))
        with launches.counted() as forward_and_backward:
            train.segment_loss(setup, *segments, None, 3)[0].backward()
    assert waits < 16
    assert forward_and_backward[1] == 0
    for parts in chain, swept:
        assert [waits for _, waits in parts.values()] == [1, 1, 1 + 1]
    most = {"pretraining step": 2_500, "rollout": 5_300, "update": 1_300}
    for part, (kernels, _) in swept.items():
        assert kernels < most[part], (part, kernels)
        assert part == "update" or kernels < chain[part][0] / 3


def test_the_update_stops_at_the_kl_limit(make_setup):
    setup = make_setup(UPDATE_EPOCHS=50, TARGET_KL=0.01)
    stats = update(setup, roll(setup), (3e-3, 1e-3))
    assert 1 <= stats["updates"] < 50
    assert stats["approx_kl"] > 1.5 * 0.01  # what ended it


def test_the_step_is_fitted_to_the_kl_target(monkeypatch):
    """Over twice the target it is divided by 1.5, under half of it multiplied, up to 1; between neither."""
    monkeypatch.setattr(train, "TARGET_KL", 0.4)
    progress = train.Progress(run="a", started="", pretrain_encoder_rate=0.1, step_size=0.5)
    steps = (0.9, 0.5 / 1.5), (0.8, 0.5 / 1.5), (0.2, 0.5 / 1.5), (0.1, 0.5), (0.0, 0.75), (0.0, 1)
    for approx_kl, expected in steps:
        train.adapt_step(progress, approx_kl)
        assert progress.step_size == pytest.approx(expected)


def test_float16_overflow_is_skipped_and_the_scale_falls(windows, make_setup):
    setup = make_setup(amp=True)
    run = make_run(setup, rates=(1e-3, 1e-3), scale=2.0**40)
    after = [*setup.policy.parameters(), *setup.reducer.parameters()]
    before = [parameter.clone() for parameter in after]

    def step() -> dict[str, float]:
        inputs = windows(torch.arange(700, 740))
        with torch.autocast("cpu", torch.float16):
            latent, reconstruction = setup.reducer(inputs)
            mean, value = setup.policy(setup.policy.market_tokens(latent), torch.full((40, COINS + 1), 0.25))
        assert latent.dtype == torch.float16
        loss = mean.square().mean() + value.mean() + (reconstruction.float() - inputs).square().mean()
        return train.optimizer_step(loss, run, {})

    stats = step()
    assert stats["skipped"] == 1
    assert run.scaler.get_scale() == 2.0**39
    assert same_tensors(before, after)
    while stats["skipped"]:
        stats = step()
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not same_tensors(before, after)
    assert math.isfinite(stats["policy_grad_norm"])
    # clipping came after unscaling: the norms are of the true gradient, not 2 ** 20 times that
    assert stats["encoder_grad_norm"] < 100


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
any_device = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu])])


def move(setup: train.Setup, name: str) -> train.Setup:
    device, rows = torch.device(name), torch.arange(700, 710)
    store = FeatureWindows(make_frames(), BARS, device, setup.windows.normalisation)
    torch.testing.assert_close(store(rows.to(device)).cpu(), setup.windows(rows))
    setup.policy.to(device), setup.reducer.to(device)
    on_device = {"windows": store, "env": make_env(device=name), "train_rows": setup.train_rows.to(device)}
    return replace(setup, device=device, **on_device)


@any_device
def test_float16_rollout_and_update_agree(make_setup, name):
    """Both in the same precision: the first ratio is 1 to the rounding of float16."""
    setup = move(make_setup(amp=True, REPLICAS=4), name)
    stats = update(setup, roll(setup))
    assert stats["updates"] == 1
    assert abs(stats["ratio_max"] - 1) < 0.02
    assert stats["skipped"] == 0
    assert math.isfinite(stats["policy_loss"])


def planted_setup(make_setup, tied: bool, **constants: object) -> train.Setup:
    """A coin rises by 1 % where its newest feature is above the mean and falls by 1 % where it is not.
    Dense: coin 1 alone, so that the network must tell the coins apart; tied: each coin.
    """
    own = make_frames()["5m"].iloc[:, : (2 * COINS if tied else 1) : 2].to_numpy()
    signal = np.where(np.nan_to_num(own) > 2.0, 1.0, -1.0)
    steps = np.zeros((2_000, COINS))
    # held from the open of t + 1 to the open of t + 2: what bar t says
    steps[2:, : signal.shape[1]] = 0.01 * signal[:-2]
    opens = torch.from_numpy(np.exp(steps.cumsum(0)))
    closes = torch.cat([opens[1:], opens[-1:]])
    env = VectorPortfolioEnv(opens, closes, cost=0.0001)
    return replace(make_setup(tied=tied, log_std=-0.5, **constants), env=env, return_scale=100.0)


# dense and tied: 1 % in the bars in which a coin rises
PERFECT = train.bp_per_day(0.01 / 2), train.bp_per_day(0.01 * (1 - 1 / 2**COINS))


@dense_and_tied
def test_pretraining_learns_a_planted_edge(make_setup, tied):
    setup = planted_setup(make_setup, tied, _REWARD_SCALE=0.05)
    run, growth, error = make_run(setup, rates=(6e-3, 6e-3)), [], []
    for step in range(60):
        starts, weights, _, masked = train.draw_segments(setup, 16, 8, train.generator_for(0, step))
        loss, stats, _ = train.segment_loss(setup, starts, weights, same_order(16), masked)
        train.optimizer_step(loss, run, {})
        growth.append(float(stats["growth_bp_day"]))
        error.append(float(stats["reconstruction_loss"]))
    assert error[-1] < error[0]
    assert np.mean(growth[-5:]) > 0.6 * PERFECT[tied]
    assert abs(growth[0]) < 0.2 * PERFECT[tied]


def test_ppo_alone_climbs_on_a_planted_edge(make_setup):
    constants = {"REPLICAS": 8, "GAMMA": (0.5, 0.5), "MINIBATCH": 32, "NUM_ENVS": 16}
    setup = planted_setup(make_setup, tied=True, **constants)
    run, rewards = make_run(setup, rates=(1e-2, 1e-3)), []
    for batch in range(25):
        run.progress.batch, rollout = batch, roll(setup, batch, epsilon=0.05)
        rewards.append(train.bp_per_day(float(rollout.reward.mean())))
        train.update(setup, run, rollout)
    early, late = np.mean(rewards[:5]), np.mean(rewards[-5:])
    assert abs(early) < 0.25 * PERFECT[True]
    assert late > 0.35 * PERFECT[True]  # what the noise costs included


def test_the_critic_is_fitted_to_the_returns_met(windows, make_setup):
    """The critic's loss in pretraining again, from the rewards of the environment and discounted sums: five
    decisions, two bars apart, each segment with its coins in another order."""
    setup = make_setup(hold_bars=2, GAMMA=(0.9, 0.99), _REWARD_SCALE=0.05)
    starts = torch.tensor([700, 900, 1_100])
    coins = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
    weights = train.random_weights(3, COINS + 1, train.generator_for(0))
    _, stats, _ = train.segment_loss(
        setup, starts, weights, train.Permutation(coins, COINS + 1), no_mask(5, 3)
    )
    held, rewards, values = setup.env.reset(starts, 5, weights), [], []
    with torch.no_grad():
        for step in range(6):
            latent = setup.reducer.encoder(windows(starts + 2 * step, coins))
            seen = torch.cat([held[:, :1], held[:, 1:].gather(1, coins)], 1)
            mean, value = setup.policy(setup.policy.market_tokens(latent), seen.float())
            values.append(value)
            if step < 5:
                slots = train.weights_from_logits(mean.double())
                target = slots.clone()
                for segment, slot in itertools.product(range(3), range(COINS)):
                    target[segment, 1 + coins[segment, slot]] = slots[segment, 1 + slot]
                held, reward, _, _ = setup.env.step(target)
                rewards.append(setup.return_scale * reward)
    gamma, scale = 0.9, 0.05
    errors, total = [], values[5]
    for step in reversed(range(5)):
        total = scale * rewards[step] + gamma * total
        errors.append((values[step] - total).square())
    assert float(stats["critic_loss"]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    growth = train.bp_per_day(float(torch.stack(rewards).mean()) / setup.return_scale / 2)
    assert float(stats["growth_bp_day"]) == pytest.approx(growth, rel=1e-5)


def test_the_decoder_is_asked_for_what_is_masked_and_not_for_noise(windows, make_setup):
    """Masked: one timeframe of one coin is zero, all else as it was. Noise is that of the step. The error is
    that on the whole windows, of every fourth decision."""
    rows, setup = torch.tensor([700, 900]), make_setup(PRETRAIN_NOISE=0.5)
    whole, masked = windows(torch.cat([rows, rows + 4])), no_mask(1, 2)[0]
    masked[0, 1, 2] = masked[1, 0, 0] = True
    expected = windows(rows).view(2, COINS, -1)
    expected[0, 1, 2 * (5 + 4) :] = 0  # two channels of 5, 4 and 3 bars
    expected[1, 0, : 2 * 5] = 0
    assert torch.equal(train.mask_windows(windows(rows), masked, windows), expected.flatten(1))

    _, stats, tensors = train.segment_loss(setup, rows, *two_segments(), ~no_mask(4, 2))
    assert not tensors["windows"].any()
    with torch.no_grad():
        blank = setup.reducer(torch.zeros(1, windows.input_dim))[1]
    error = float((whole - blank).square().mean())
    assert float(stats["reconstruction_loss"]) == pytest.approx(error, rel=1e-5)

    noise, bank = torch.zeros(10, 600), train.noise_bank(0, 2**22, torch.device("cpu"))
    train.add_noise(noise, 2, bank, train.generator_for(3))
    assert float(noise.mean()) == pytest.approx(0, abs=5 * 0.5 / 6_000**0.5)
    assert float(noise.std()) == pytest.approx(0.5, rel=0.05)
    drawn = *two_segments(), no_mask(4, 2), train.generator_for(3)
    _, stats, tensors = train.segment_loss(setup, rows, *drawn)
    seen = windows(torch.cat([rows + step for step in range(5)]))
    train.add_noise(seen, 2, bank, train.generator_for(3))
    assert torch.equal(tensors["windows"], seen)
    with torch.no_grad():
        reconstruction = setup.reducer(seen.view(5, 2, -1)[::4].flatten(0, 1))[1]
    error = float((whole - reconstruction).square().mean())
    assert float(stats["reconstruction_loss"]) == pytest.approx(error, rel=1e-5)


def test_what_is_not_finite_is_named(make_setup):
    """The learning rates are blamed only where weights are refused, and only in a training."""
    setup, (weights, _) = make_setup(JOB="evaluate"), two_segments()
    modules = setup.policy, setup.reducer
    for last, error, words, held in (
        (10**6, ValueError, "4 steps", weights),
        (10, UserError, r"here: all parameters are finite; .*--checkpoint", weights * math.nan),
    ):
        with pytest.raises(error, match=words), train.stop_where_not_finite(*modules, "here"):
            setup.env.reset(torch.tensor([0, last]), 4, held)
    setup = make_setup(JOB="train", amp=True)  # where the loss scale could fall
    with torch.no_grad():
        setup.reducer.encoder[0].weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"reducer\.encoder\.0\.weight is not finite; .*learning rates"):
        train.pretrain_step(setup, make_run(setup, rates=(1e-3, 1e-3)), 1)
    words = r"not finite here: reducer\.encoder\.0\.weight is not finite; .*rates"
    modules = setup.policy, setup.reducer
    with pytest.raises(UserError, match=words), train.stop_where_not_finite(*modules, "here"):
        roll(setup)


# --------------------------------------------------------------------------------- evaluation and checkpoints


def one_after_another(policy, tokens, mark, weights: torch.Tensor, limit: Callable) -> torch.Tensor:
    """Targets [R, A], each decision from where the one before led."""
    targets = []
    for token, factors in zip(tokens.split(1), mark.split(1), strict=True):
        targets.append(limit(None, weights, train.decide(policy, token, weights)))
        weights, _ = portfolio_env.drift(targets[-1], factors)
    return torch.cat(targets)


class Slow(nn.Module):
    """An agent that moves so little of what it holds that it remembers its start for long."""

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, _=None) -> tuple[torch.Tensor, None]:
        target = 0.999 * weights + 0.001 * tokens[..., 0].softmax(-1)
        return (target[:, 1:] / target[:, :1]).log(), None


def no_limit(_: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return target


def band(_: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return portfolio_env.constrain(weights, target, 0.001, portfolio_env.Limits(0.9, 0.01, 0.2))


@pytest.mark.parametrize("agent", ["untrained", "decided", "slow", "band"])
@pytest.mark.parametrize(("count", "segments"), [(1, 1), (5, 9), (201, 4)])
def test_segments_side_by_side_decide_as_one_after_another(monkeypatch, agent, count, segments):
    """Equal to rounding, also where the last segment is shorter; in far fewer steps if the agent forgets."""
    generator = torch.Generator().manual_seed(5)
    policy, limit = Slow() if agent == "slow" else make_policy(), band if agent == "band" else no_limit
    if agent in ("decided", "band"):
        with torch.no_grad():
            policy.actor.weight.normal_(0, 0.3, generator=generator)
            policy.weight_embedding.weight.normal_(0, 1.0, generator=generator)
    tokens = torch.randn(count, COINS + 1, 8, generator=generator)
    mark = 1 + 0.01 * torch.randn(count, COINS + 1, generator=generator, dtype=torch.float64)
    mark[:, 0] = 1
    expected = one_after_another(policy, tokens, mark, torch.eye(COINS + 1, dtype=torch.float64)[:1], limit)
    if agent == "decided" and count > 5:
        assert expected.max() > 0.9
        assert expected.std(0).min() > 0.05
    steps, decide = [], train.decide
    monkeypatch.setattr(train, "decide", lambda *arguments: steps.append(1) or decide(*arguments))
    targets = train.agent_targets(policy, tokens, mark, segments, limit=limit)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)
    if segments < count:
        slow = agent in ("slow", "band")
        assert len(steps) < (count + 4 * (count / segments + 1) if slow else 3 * count / segments)
    held = torch.full((1, COINS + 1), 1 / (COINS + 1), dtype=torch.float64)
    targets = train.agent_targets(policy, tokens[:40], mark[:40], segments, held, limit=limit)
    expected = one_after_another(policy, tokens[:40], mark[:40], held, limit)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 23, 131, 630])
def test_whole_blocks_of_decisions_change_places(count):
    first, second = (train.other_moments(count, 42, train.generator_for(seed)) for seed in (0, 1))
    blocks = min(count, max(8, count // 42))
    assert (first == torch.arange(count)).sum() == (count == 1)  # none stays, where there is another
    assert (first.diff() != 1).sum() < blocks
    assert len(first.unique()) > count - blocks  # of blocks of two lengths, which differ by 1
    assert torch.equal(first, second) == (count < 3)


@dense_and_tied
def test_importance_is_what_an_account_loses_whose_windows_were_replaced(make_setup, tied):
    """The agent sees the second channel of 15m alone, so it loses exactly nothing without any other part."""
    setup, start, hold_bars = make_setup(tied=tied), 700, 4
    steps = np.random.default_rng(0).normal(0, 0.01, (2_000, COINS))
    prices = (np.exp(steps.cumsum(0)),) * 2
    env = VectorPortfolioEnv(*map(torch.from_numpy, prices), cost=0.001, hold_bars=hold_bars)
    setup = replace(setup, env=env)
    used = torch.zeros(setup.windows.input_dim // COINS, dtype=torch.bool)  # values of a coin
    used[11:18:2] = True  # ten of 5m come before
    layer = setup.reducer.encoder[0]
    with torch.no_grad():
        nn.init.normal_(setup.policy.actor.weight)
        for weight in (layer.own.weight, layer.shared.weight) if tied else (layer.weight,):
            weight[:, ~used.repeat(weight.shape[1] // len(used))] = 0
            weight *= 20
    parts = train.parts_of_windows(setup.windows, FOOTER, True)
    rows = torch.arange(start, start + 200, hold_bars)
    lost = dict(zip(parts, train.growth_by_part(setup, rows, parts.values(), 2).T, strict=True))
    concerned = {part for part in parts if part[1] in ("", "d", *"ABC") and part[2] in ("", "15m")}
    assert len(parts) == 2 + 3 + 6 + COINS
    assert {part for part, path in lost.items() if path.any()} == concerned
    assert len(concerned) == 3 + COINS

    own = setup.windows(rows).view(len(rows), COINS, -1)

    @torch.no_grad()
    def growth(windows: torch.Tensor) -> np.ndarray:
        tokens = setup.policy.market_tokens(setup.reducer.encoder(windows.flatten(1)))

        def decide(row: int, seen: np.ndarray) -> np.ndarray | None:
            step, rest = divmod(row - start, hold_bars)
            one = tokens[step : step + 1], torch.from_numpy(seen[None])
            return None if rest else train.decide(setup.policy, *one)[0].numpy()

        result = portfolio_env.backtest(decide, *prices, start, start + 200, cost=0.001)
        return np.diff(np.log(result.value[::hold_bars]))

    expected = dict.fromkeys(concerned, 0.0)
    for draw in range(2):
        moments = train.other_moments(len(rows), 504, train.generator_for(0, train.Stream.IMPORTANCE, draw))
        other = own[moments]
        assert torch.equal(other, setup.windows(rows[moments]).view_as(own))
        for part in concerned:
            without, alone = own.clone(), other.clone()
            for coin in range(COINS) if part[0] != "coin" else ["ABC".index(part[1])]:
                without[:, coin, used] = other[:, coin, used]
                alone[:, coin, used] = own[:, coin, used]
            pairs = (own, without), (alone, other)
            owed = [(growth(more) - growth(less)) / hold_bars / 2 for more, less in pairs]
            expected[part] = expected[part] + np.stack(owed)
    for part in concerned:
        assert np.abs(lost[part]).max() > 1e-4
        np.testing.assert_allclose(lost[part], expected[part], atol=1e-7)


def test_a_last_checkpoint_of_another_form_is_one_line_that_names_the_place(tmp_path, make_setup):
    """... is a key that is not there."""
    run = make_run(make_setup(), tmp_path, probes={"12": [0.5]})
    state = {"kind": "train_last", "scaler": {}, "optimizers": [{}, {}], "fixed": {}}
    content = train.agent_checkpoint(run) | state | {"progress": asdict(run.progress)}
    torch.save(content, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt", train.AgentState)["progress"].probes == {"12": [0.5]}
    for place, value in {
        "policy": ..., "policy_shape.trunk": [10], "policy_shape.heads": ..., "seed": -1, "optimizers": {},
        "progress.run": ..., "progress.batch": "many", "progress.rolling": ["0.1"], "progress.fold": 1,
    }.items():  # fmt: skip
        torch.save(altered(content, place.split("."), value), tmp_path / "c.pt")
        with pytest.raises(UserError, match=rf"^[^\n]*c\.pt.*{re.escape(place)}[^\n]*$"):
            load_checkpoint(tmp_path / "c.pt", train.AgentState)


def test_what_is_drawn_at_random(make_setup):
    """Weights lie on the simplex, segments inside the split."""
    weights = train.random_weights(1_000, 5, train.generator_for(0))
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(1_000, dtype=torch.float64))
    single = (weights.max(1).values == 1).float().mean()
    assert 0.4 < single < 0.6
    assert (weights.mean(0) - 0.2).abs().max() < 0.05
    setup = replace(make_setup(), train_rows=torch.arange(100, 140))
    draws = [train.draw_segments(setup, 64, 30, train.generator_for(seed)) for seed in range(20)]
    starts = torch.cat([segments[0] for segments in draws])
    assert train.longest_piece(setup) == 40
    assert starts.min() == 100
    assert starts.max() == 107  # steps 107 .. 136, the last one filled at 137 and valued at the open of 138
    # generators depend on the whole key
    keys = [(0, 1), (1, 0), (0, 2), (0,), (0,)]  # the same twice
    draws = {tuple(torch.randn(2, generator=train.generator_for(*key)).tolist()) for key in keys}
    assert len(draws) == 4


def test_rates_are_halved_on_a_plateau_of_the_rolling_reward(monkeypatch):
    """Three batches without a better mean of two; the first mean of two counts, a better one starts anew."""
    for name, value in {"_ROLLING": 2, "PATIENCE": 3, "BATCHES": 100}.items():
        monkeypatch.setattr(train, name, value)
    progress = train.Progress(run="a", started="now", pretrain_encoder_rate=0.1)
    found = []
    for reward in (9.0, 1.0, 1.0, 0.0, 0.0, 11.0, 0.0, 0.0, 0.0):
        found.append((train.on_plateau(progress, reward), progress.best_reward, progress.stale))
        progress.batch += 1
    assert found == [
        (False, -math.inf, 1), (False, 5.0, 0), (False, 5.0, 1), (False, 5.0, 2), (True, 5.0, 0),
        (False, 5.5, 0), (False, 5.5, 1), (False, 5.5, 2), (True, 5.5, 0),
    ]  # fmt: skip
    assert progress.rolling == [0.0, 0.0]


def test_learning_rates_and_figures_by_hand():
    """Rates: a cosine to a tenth."""
    assert train.set_rates((), (1.0, 0.1), 0.0) == pytest.approx((1.0, 0.1))
    assert train.set_rates((), (1.0, 0.1), 0.5, 0.25) == pytest.approx((0.55 / 4, 0.055 / 4))
    assert train.set_rates((), (1.0, 0.1), 1.0, 1 / 32) == pytest.approx((0.1 / 32, 0.01 / 32))
    portfolio = torch.tensor([[1.1, 1.0], [0.99, 1.2]])
    zeros = torch.zeros(2, 2)
    parts = {"portfolio": portfolio, "benchmark": portfolio, "reward": zeros + 0.5, "alive": zeros == 0}
    fields = dict.fromkeys(train.Rollout._fields, zeros) | parts
    returns, same = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)
    variance = (
        (returns, returns, 1.0),
        (same, returns, 0.0),
        (-returns, returns, -3.0),
        (returns, same, math.nan),
    )
    for value, met, expected in variance:
        metrics = train.rollout_metrics(train.Rollout(**fields | {"value": value, "returns": met}), 1)
        assert metrics["explained_variance"] == pytest.approx(expected, nan_ok=True)
    assert metrics["portfolio_value"] == pytest.approx(1.095)
    assert metrics["max_drawdown"] == pytest.approx(0.05)  # 10 % in one environment, none in the other
    growth = np.log([1.1, 1.0, 0.9, 1.2])
    sharpe = growth.mean() / growth.std(ddof=1) * math.sqrt(105_120)
    assert metrics["sharpe"] == pytest.approx(sharpe, rel=1e-5)
    assert metrics["reward"] == 0.5


# --------------------------------------------------------------------------------------- constants and trials


def test_the_given_numbers_are_the_defaults_of_full_scale():
    """What the design fixes, in one place; the small scale may have other rates and lengths."""
    given_numbers = {
        "POLICY_RATE": 5e-4, "ENCODER_RATE": 5e-5, "_GAE_LAMBDA": 0.95, "CLIP": 0.2, "_CRITIC_WEIGHT": 0.5,
        "_ENTROPY_WEIGHT": 0.01, "POLICY_SHARE": 0.7, "RECONSTRUCTION_SHARE": 0.3, "_MAX_NORM": 1.0,
        "EPSILON": (0.075, 0.02), "STEPS": 128, "_ROLLING": 50, "PATIENCE": 100, "BATCHES": 5_000,
        "BLOCKS": 8, "HEADS": 12, "TOKEN_WIDTH": 192, "TRUNK": (768, 384), "HIDDEN_DIM": 3_222,
        "LATENT_DIM": 2_148, "WINDOW_BARS": (144, 96, 72, 36, 49), "PRETRAIN_EPOCHS": 10,
        "FEE_RATE": 0.001, "FILL": "next_open", "REWARD": "excess",
    }  # fmt: skip
    any_scale = "CLIP", "POLICY_SHARE", "RECONSTRUCTION_SHARE", "EPSILON", "STEPS", "PATIENCE"
    assert not any(isinstance(getattr(train, name), getData.Scaled) for name in any_scale)
    with put_back(train):
        set_constants(train, {})
        assert {name: getattr(train, name) for name in given_numbers} == given_numbers


def test_sweeps_are_taken_where_a_gpu_is_unless_a_flag_says_otherwise():
    for device, name, text, value in (
        ("cpu", "SWEEPS", "auto", 0), ("cuda", "SWEEPS", "auto", 3), ("cuda", "SWEEPS", "0", 0),
        ("cpu", "SWEEPS", "5", 5),
    ):  # fmt: skip
        with put_back(train):
            setattr(train, name, getData.constant_value(vars(train), name, text, strict=False))
            feature_reducer.settle_constants(vars(train), {}, torch.device(device), {})
            assert vars(train)[name] == value


def test_list_of_trials(tmp_path):
    """One row for each training: a resumed one takes its own place, another one of the same name does not."""
    path = tmp_path / "runs" / "trials.csv"

    def sharpes(**row: object) -> list[float]:
        portfolio_env.append_trial(path, row)
        return portfolio_env.read_trial_sharpes(path)

    assert portfolio_env.read_trial_sharpes(path) == []
    assert np.isnan(sharpes(time="a", run="1", validation_bp_day=1.0)).tolist() == [True]
    sharpes(time="b", run="1", test_sharpe_bar=0.5)
    same = np.testing.assert_array_equal
    same(sharpes(time="b", run="2", test_sharpe_bar=0.25), [np.nan, 0.5, 0.25])
    same(sharpes(time="b", run="1", test_sharpe_bar=0.75), [np.nan, 0.25, 0.75])
    same(sharpes(time="b", run="1", validation_bp_day=2.0), [np.nan, 0.25, 0.75])  # not tested again
    for sharpe in (0.1, 0.2):  # a name that pandas would take for a missing value
        last = sharpes(time="c", run="NA", validation_bp_day=math.nan, test_sharpe_bar=sharpe)
    same(last, [np.nan, 0.25, 0.75, 0.2])
    for seeds, sharpe in (("0", 0.3), ("0 1", 0.4), ("0", 0.5)):  # an ensemble with one more is another agent
        last = sharpes(time="d", run="many", seed=seeds, test_sharpe_bar=sharpe)
    same(last[4:], [0.4, 0.5])

    bad = b"", b"time,run\n1,2\n3,4,5\n", b"time,run\n\xff\xfe,2\n", b"time,run,test_sharpe_bar\na,b,oops\n"
    for content in bad:
        path.write_bytes(content)
        for use in (lambda: portfolio_env.read_trial_sharpes(path), lambda: sharpes(time="a", run="1")):
            with pytest.raises(UserError, match=r"^[^\n]*trials\.csv[^\n]*$"):
                use()
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "values",
    [
        {"HEADS": 5}, {"MINIBATCH": 5_000}, {"TRUNK": (1, 2, 3)}, {"GAMMA": (0.5,)}, {"SLIPPAGE_RATE": 0.999},
        {"RUN": "../x"}, {"RUN": "x" * 101}, {"RUN": "x//y"}, {"RUN": "mine/second"}, {"RUN": "best.pt"},
        {"RUN": "trials.csv"}, {"SEEDS": (1, 1)}, {"SEEDS": (2**32,)}, {"FOLD": 1}, {"ENGINE": "ray"},
        {"LOG_STD": 4.0}, {"WALK_FORWARD": 2, "TEST": False}, {"SWEEPS": -1}, {"SWEEPS": "three"},
        {"GRID": "HOLT=4"}, {"GRID": "HOLD"}, {"GRID": "HOLD=4,many"}, {"GRID": "TRUNK=8x8,0x8"},
        {"GRID": "TRUNK=8,8;0,8"}, {"GRID": "TRUNK=8,8"},
        {"GRID": "FEE_RATE=0.1"}, {"GRID": "HOLD=4 HOLD=5"}, {"GRID": "HOLD=4,04"},
    ],
    ids=str,
)  # fmt: skip
def test_constants_are_checked(values):
    """In one line, which names those at fault; in a grid the name that it varies."""
    with put_back(train), pytest.raises(UsageError) as error:
        set_constants(train, values)
    varied = values.get("GRID", "").split()[-1:]
    names = [*values, *(word.split("=")[0] for word in varied)]
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


def test_the_runs_of_seeds_folds_and_a_grid():
    """Every combination, fold and seed once, each in a folder named after it."""
    values = {"GRID": "POLICY_RATE=1e-3,3e-4 TRUNK=8x8,16x8", "WALK_FORWARD": 2, "SEEDS": (0, 5)}
    with put_back(train):
        set_constants(train, values)
        plans = {plan.name: plan for plan in train.plan_runs()}
    assert len(plans) == 2 * 2 * 2 * 2
    assert plans["POLICY_RATE=0.001,TRUNK=8x8/fold-1/seed-0"][2:5] == (
        {"POLICY_RATE": 0.001, "TRUNK": (8, 8)}, 1, 0,
    )  # fmt: skip
    assert "POLICY_RATE=0.0003,TRUNK=16x8/fold-2/seed-5" in plans


def test_a_grid_is_checked_before_its_first_run():
    rates = "PRETRAIN_POLICY_RATE", "POLICY_RATE", "ENCODER_RATE", "TARGET_KL", "LOG_STD", "MASK"
    names = *rates, "PRETRAIN_NOISE", "RECONSTRUCTION_SHARE", "POLICY_SHARE"
    long = " ".join(f"{name}=0.123456789,0.12345678" for name in names)
    for grid, flags, at_fault in (
        ("MINIBATCH=8,64 STEPS=2,200", {}, "MINIBATCH 64"),  # of a batch of 8 x 2
        ("HOLD=4,12", {"HOLDS": (4, 12)}, "HOLDS"),
        (long, {}, "RUN"),
    ):
        with put_back(train):
            set_constants(train, {"GRID": grid})
            with pytest.raises(UsageError, match=at_fault):
                train.check_combinations(flags, "a")
            assert train.RUN == ""


def test_an_ensemble_is_the_mean_of_its_members(windows, make_setup):
    """Two agents with encoders of their own: logits, values and reconstructions by hand."""
    setup = make_setup()
    torch.manual_seed(9)
    other = train.ActorCritic(LATENT, COINS + 1, (20, 16), 8, 2, 16, 2)
    members = [(setup.policy, setup.reducer), (other, FeatureReducer(windows.input_dim, 16, LATENT))]
    agent, rows = train.Ensemble(members), torch.arange(700, 740)
    weights = train.random_weights(40, COINS + 1, train.generator_for(3)).float()
    means, *outputs = (
        policy(train.encode(policy, reducer, windows, rows, 16), weights)
        for policy, reducer in ((agent, agent), *members)
    )
    for mean, first, second in zip(means, *outputs, strict=True):
        torch.testing.assert_close(mean, (first + second) / 2)
    assert not torch.allclose(outputs[0][0], outputs[1][0])
    first, second = (reducer(windows(rows))[1] for _, reducer in members)
    torch.testing.assert_close(agent.decoder(agent.encoder(windows(rows))), (first + second) / 2)


def test_the_best_of_many_validations_is_judged_by_all_of_them():
    """Of 40 without skill some look good alone; one series in two kinds of decisions counts once."""
    rng, progress = np.random.default_rng(0), train.Progress(run="a", started="", pretrain_encoder_rate=0.1)
    noise, skill = rng.normal(size=(40, 60)), rng.normal(size=60) + 0.45

    def validation(days: np.ndarray) -> train.Validation:
        return train.Validation(float(days.mean()), 0.0, 0.0, days.tolist(), 3.0)

    def record(days: np.ndarray) -> bool:
        better = progress.improves(validation(days))
        if better:
            progress.best_validation, progress.best_days = float(days.mean()), days.tolist()
        return better

    assert record(skill)
    alone = progress.p_value
    for number, days in enumerate(noise):
        progress.hold_bars = (12, 48)[number % 2]
        assert not record(days)
    assert not record(np.where(np.arange(60) == 7, 300.0, 0.0))  # more on the whole, by one day
    every = np.column_stack([skill, *noise, np.where(np.arange(60) == 7, 300.0, 0.0)])
    assert progress.p_value == pytest.approx(portfolio_env.above_chance(every, 3.0)[1][0], abs=0.01)
    assert alone < progress.p_value < 0.05
    assert progress.above_chance

    steady, bold = 0.4 + 0.1 * noise[0], 0.6 + 1.2 * noise[1]
    progress.validations, progress.best_validation = {}, -math.inf
    assert record(steady - steady.mean() + 0.4)
    assert not record(bold - bold.mean() + 0.6)  # grows more, but not for sure
    assert portfolio_env.above_chance(bold[:, None], 3.0)[0].all()
    assert record(bold - bold.mean() + 1.6)

    progress.validations, progress.best_validation = {}, -math.inf
    for days in noise:
        record(days)
    best = max(noise, key=np.mean)
    assert portfolio_env.above_chance(best[:, None], 3.0)[0].all()  # alone it would have been believed
    assert not progress.above_chance
    assert not progress.improves(validation(np.full(60, np.nan)))
    progress.improves(validation(noise[0])._replace(block=20.0))  # too few blocks to tell
    assert progress.above_chance
    assert math.isnan(progress.p_value)


def test_a_validation_is_the_growth_and_its_bootstrap_interval(make_setup, monkeypatch):
    """By the backtest's own metrics, with four blocks of three days."""
    rng = np.random.default_rng(3)
    close = np.exp(0.002 * rng.normal(size=(8_000, COINS)).cumsum(0))
    setup = replace(make_setup(), prices=(close, close), spans={"validation": (500, 7_500)})
    orders = rng.dirichlet(np.ones(COINS + 1), 7_000) * (np.arange(7_000) % 288 == 0)[:, None]
    monkeypatch.setattr(train, "agent_orders", lambda *_: orders)
    validation = train.validate(setup)
    result = train.backtest_agent(setup, "validation")
    assert validation.growth == pytest.approx(portfolio_env.metrics(result)["excess_bp_day"])
    returns = portfolio_env.excess_returns(result)
    ends = portfolio_env.bootstrap_interval(returns, portfolio_env.block_length(returns))
    assert validation[1:3] == pytest.approx([1e4 * 288 * end for end in ends])
    assert sum(validation.days) == pytest.approx(returns.sum())
    assert validation.low < validation.growth < validation.high


@pytest.mark.parametrize("found", [False, True])
def test_not_above_chance_the_best_agent_holds_all_alike(make_setup, tmp_path, monkeypatch, found):
    """By the validations until then; a stop makes true what later ones have changed."""
    monkeypatch.setattr(train, "DATA_DIR", tmp_path)
    setup = make_setup()
    run = make_run(setup, tmp_path)
    run.progress.p_value = 0.04 if found else 0.06
    train.save_best(run, "best.pt", train.Validation(5.0, 1.0, 9.0, [], 3.0))
    assert (run.progress.best_validation, run.progress.best_failed) == (5.0, False)

    saved, before = make_policy(), copy.deepcopy(setup.policy.state_dict())
    best = tmp_path / "checkpoints" / "a" / "best.pt"
    train.load_policy(saved, load_checkpoint(best, train.AgentCheckpoint))
    different = [name for name, part in saved.state_dict().items() if not torch.equal(part, before[name])]
    assert different == ([] if found else ["actor.weight"])
    assert (saved.abstains, setup.policy.abstains) == (not found, False)
    alike = torch.full((5, COINS + 1), 1 / (COINS + 1))
    mean, _ = saved(torch.randn(5, COINS + 1, saved.width), alike)
    assert torch.equal(train.weights_from_logits(mean), alike) == (not found)

    run.progress.pretrained, run.stop.exit_code, run.progress.p_value = True, 130, 0.06 if found else 0.04
    train.train_agent(setup, run)
    assert load_checkpoint(best, train.AgentCheckpoint)["abstains"] == found
    assert not best.with_name("final.pt").exists()


def two_markets(make_setup, **constants: object) -> tuple[train.Setup, train.Setup]:
    """Five coins, of which two are never there and three come and go, and these three alone; one agent."""
    setup, alive = make_setup(tied=True, hold_bars=4, **constants), [0, 2, 3]
    rng, rows = np.random.default_rng(1), len(make_frames()["5m"])
    members = np.zeros((rows, 5), bool)
    members[:, alive] = True
    members[:700, 0] = members[800:820, 2] = members[950:, 3] = members[1_000:1_005] = False
    prices = np.exp(rng.normal(0, 0.002, (2, rows, 5)).cumsum(1))
    both = []
    for coins in (range(5), alive):
        frames = {}
        for timeframe, frame in make_frames().items():
            names = [f"{coin}.{name}" for coin in range(5) for name in "cd"]
            columns = np.full((len(frame), 10), np.nan)
            columns[:, [0, 1, 4, 5, 6, 7]] = frame
            columns[200:204, 4:6] = np.nan  # the second one begins a new life
            wide = pd.DataFrame(columns.astype(np.float32), frame.index, names)
            frames[timeframe] = wide[[f"{coin}.{name}" for coin in coins for name in "cd"]]
        there = members[:, list(coins)]
        store = FeatureWindows(frames, BARS, train=(600 * 300_000, 1_500 * 300_000), members=there)
        arrays = [part[:, list(coins)] for part in prices]
        env = VectorPortfolioEnv(*map(torch.tensor, arrays), cost=0.001, hold_bars=4, present=store.present)
        spans = {"test": (600, 1_400)}
        both.append(replace(setup, windows=store, env=env, prices=tuple(arrays), spans=spans))
    return tuple(both)


def slots_of(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orders [E, 5] of all coins, those of the three that are there [E, 3] by themselves, and their slots."""
    coins = torch.rand(count, 5, generator=generator).argsort(1)
    slots = torch.isin(coins, torch.tensor([0, 2, 3])).nonzero()[:, 1].view(count, 3)
    return coins, torch.tensor([0, -1, 1, 2, -1])[coins.gather(1, slots)], slots


def test_coins_that_are_never_there_change_no_pretraining(make_setup):
    setups, generator = two_markets(make_setup), torch.Generator().manual_seed(0)
    starts, (coins, others, slots) = torch.tensor([690, 705, 790, 940, 990, 1_200]), slots_of(generator, 6)
    weights = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    weights /= weights.sum(1, keepdim=True)
    wide = torch.zeros(6, 6, dtype=torch.float64)
    wide[:, [0, 1, 3, 4]] = weights
    masked = torch.rand(9, 6, 5, len(BARS), generator=generator) < 0.3
    few = masked.gather(2, slots[None, :, :, None].expand(9, -1, -1, len(BARS)))
    results = []
    for setup, order, held, hidden in zip(
        setups, (coins, others), (wide, weights), (masked, few), strict=True
    ):
        for module in setup.modules().values():
            module.zero_grad(set_to_none=True)
        permutation = train.Permutation(order, setup.env.assets)
        for sweeps in (0, 3):
            loss, stats, _ = train.segment_loss(setup, starts, held, permutation, hidden, sweeps=sweeps)
            loss.backward()
            results.append([loss, *stats.values()])
        results.append(
            [p.grad.clone() for m in setup.modules().values() for p in m.parameters() if p.grad is not None]
        )
    for one, other in zip(results[:3], results[3:], strict=True):
        for part, same in zip(one, other, strict=True):
            torch.testing.assert_close(part, same, rtol=1e-4, atol=1e-6)
    assert all(part.abs().max() > 0 for part in results[2])


def test_coins_that_are_never_there_change_no_update_and_no_order(make_setup):
    generator, results = torch.Generator().manual_seed(0), []
    coins, others, slots = slots_of(generator, 4)
    starts, noise = torch.tensor([690, 790, 940, 990]), torch.randn(6, 4, 2, 5, generator=generator)
    few = noise.gather(3, slots[None, :, None].expand(6, -1, 2, -1))
    explores = torch.rand(6, 4, generator=generator) < 0.3
    for number, (order, draws) in enumerate(((coins, noise), (others, few))):
        setup = two_markets(make_setup, REPLICAS=2, MINIBATCH=64)[number]
        nn.init.normal_(setup.policy.actor.weight)
        permutation = train.Permutation(order, setup.env.assets)
        weights = torch.eye(setup.env.assets, dtype=torch.float64)[:1].repeat(4, 1)
        masked = torch.zeros(7, 4, order.shape[1], len(BARS), dtype=torch.bool)
        rows = train.segment_rows(starts, 6, 4)
        tokens = train.encode(
            setup.policy, setup.reducer, setup.windows, rows, 300, order.repeat(7, 1), masked.flatten(0, 1)
        )
        drawn = train.Draws(starts, weights, permutation, masked, draws, explores)
        rollout = train.collect_rollout(setup, tokens.unflatten(0, (7, 4)), drawn, 0.5)
        figures = update(setup, rollout, (0.0, 0.0))
        orders = train.agent_orders(setup, "test")[:, [0, 1, 3, 4] if not number else slice(None)]
        account = train.backtest_agent(setup, "test")
        gradients = [p.grad for module in setup.modules().values() for p in module.parameters()]
        numbers = [*figures.values(), orders, account.value, account.benchmark]
        parts = rollout.log_prob, rollout.reward, rollout.value, rollout.advantage
        results.append([*parts, *map(torch.tensor, numbers), *gradients])
    for part, same in zip(*results, strict=True):
        torch.testing.assert_close(part, same, rtol=1e-3, atol=1e-6)


def test_latents_of_the_environments_are_those_of_their_rows_across_a_hole(make_setup):
    setup, _ = two_markets(make_setup)  # nobody is there from row 1,000 to 1,005
    there = torch.cat([torch.arange(700, 1_000), torch.arange(1_005, 1_400)])
    drawn = replace(setup, train_rows=there)
    assert train.longest_piece(drawn) == 395
    starts = train.draw_segments(drawn, 200, 98, train.generator_for(0))[0]  # 98 decisions, 4 bars apart
    assert set(starts.tolist()) == {1_005}
    times = setup.windows.times
    market = portfolio_env.Market(*setup.prices, times, setup.present(), setup.reducer, setup.windows)
    latents, rows = portfolio_env.encode_rows(market, 990, 1_010), torch.arange(990, 1_011)
    expected = setup.reducer.encoder(setup.windows(rows), setup.windows.there(rows))
    torch.testing.assert_close(torch.from_numpy(latents), expected.detach())
