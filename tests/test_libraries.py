"""The environments as other libraries use them: Gymnasium, Stable-Baselines3, TorchRL, and their options."""

import subprocess
import sys
import tomllib
import tracemalloc
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, copy_market, load
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeObservation, RecordEpisodeStatistics
from test_page import make_report
from test_portfolio_env import COST, random_market

import feature_reducer
import getData
import portfolio_env
from portfolio_env import GymVectorEnv, PortfolioEnv, weights_from_logits

ID = "CryptoPortfolio-v0"


@pytest.fixture(scope="module")
def prices() -> dict[str, np.ndarray]:
    return dict(zip(("open_prices", "close_prices"), random_market(400, 4), strict=True))


def test_logits_are_a_softmax_with_cash_at_zero(prices):
    by_hand = np.array([1, 2, 4, 1, 1]) / 9  # of the logits 0, log 2, log 4, 0, 0
    one, other = (PortfolioEnv(**prices, cost=COST, steps=3, action=kind) for kind in ("logits", "weights"))
    for env in (one, other):
        env.reset(options={"start": 100})
    got, expected = one.step(np.log([2, 4, 1, 1])), other.step(by_hand)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-7)
    assert got[1] == pytest.approx(expected[1], abs=1e-12)
    logits = np.random.default_rng(0).normal(0, 300, (20, 4))  # e^300 is no number in float32
    expected = weights_from_logits(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(one.weights_of(logits, (20,)), expected, atol=1e-12)
    assert one.action_space.shape == (4,)
    for wrong in (by_hand, [np.nan, 0, 0, 0], [np.inf, 0, 0, 0], None):
        with pytest.raises(ValueError, match="logits must"):
            one.step(wrong)


def test_latents_and_windows_are_those_of_the_checkpoint(market_dir, trained):
    """Of the reducer alone, or of the encoder that was trained jointly with the agent."""
    data_dir, latents = trained[0], []
    options = {"data_dir": data_dir, "split": "validation", "hold_bars": 12, "steps": 20}
    for kind, checkpoint in (
        ("windows", "feature_reducer.pt"), ("latents", "feature_reducer.pt"), ("latents", "best.pt"),
    ):  # fmt: skip
        saved = load(data_dir / "checkpoints" / checkpoint)
        windows, _ = feature_reducer.load_windows(data_dir, saved["window_bars"], torch.device("cpu"), saved)
        env = gymnasium.make(ID, observation=kind, checkpoint=checkpoint, **options).unwrapped
        first, _ = env.reset(seed=3)
        second, *_, info = env.step(env.action_space.sample())
        assert info["time"] == windows.times[info["row"]]
        np.testing.assert_allclose(second[-env.assets :], info["weights"], atol=1e-7)
        assert env.observation_space.contains(second)
        expected = windows(torch.tensor([info["row"] - 12, info["row"]]))
        if kind == "latents":
            with torch.no_grad():
                expected = feature_reducer.reducer_from_checkpoint(saved, "cpu").encoder(expected)
            latents.append(first)
        actual = np.stack([first, second])[:, : -env.assets]
        np.testing.assert_allclose(actual, expected, atol=1e-5 * (kind == "latents"))
    assert not np.allclose(*latents)
    with pytest.raises(ValueError, match="give data_dir"):
        PortfolioEnv(*random_market(400, 3), observation="latents")
    with pytest.raises(getData.UserError, match=r"feature_reducer.pt; .* python feature_reducer.py"):
        PortfolioEnv(data_dir=market_dir, observation="latents")
    with pytest.raises(getData.UserError, match=r"later.pt"):
        PortfolioEnv(data_dir=data_dir, observation="latents", checkpoint="later.pt")


def test_the_rows_of_a_split(market_dir):
    frame, footer = getData.load_prices(market_dir)
    times = frame.index.as_unit("ms").asi8
    env = PortfolioEnv(data_dir=market_dir, split="all", steps=100)
    assert times[env.first_row] == footer["splits"]["train"][0]
    # the last decision: filled at the open of the bar after it, and held to the open of the last bar
    assert env.last_row + 99 == len(times) - 3
    info = env.reset(seed=0)[1]
    assert info["time"] == times[info["row"]]
    np.testing.assert_array_equal(env.unwrapped.market.close_prices, frame.filter(like=".close"))
    env = PortfolioEnv(data_dir=str(market_dir), split="validation", steps=100)
    first, stop = footer["splits"]["validation"]
    assert times[env.first_row] == first
    assert times[env.last_row + 100] <= stop
    vector = gymnasium.make_vec(ID, num_envs=2, data_dir=str(market_dir), steps=100)
    assert vector.reset(seed=1)[0].shape == (2, 48 * 3 + 4)


def test_environments_share_the_prices_of_a_folder_until_its_files_change(market_dir, tmp_path):
    folder = copy_market(market_dir, tmp_path / "data")
    one = PortfolioEnv(data_dir=folder, steps=10)
    tracemalloc.start()
    others = [PortfolioEnv(data_dir=str(folder), split=split) for split in ("train", "test", "all")]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(env.market is one.market for env in others)
    assert taken < 0.1 * one.market.close_prices.nbytes
    path = folder / "features" / "prices.parquet"
    prices, footer = getData.read_frame(path), getData.read_footer(path)
    getData.write_parquet(path, 2 * prices, footer)
    other = PortfolioEnv(data_dir=folder, steps=10)
    np.testing.assert_array_equal(other.market.close_prices, 2 * one.market.close_prices)


def test_wrong_options_and_steps_before_a_reset_are_refused_in_one_line(prices):
    for options, message in (
        ({"action": "orders"}, 'action must be "weights" or "logits"'),
        ({"observation": "prices"}, 'observation must be "returns" or "latents" or "windows"'),
        ({"fill": "open"}, 'fill must be "next_open" or "close"'),
        ({"reward": "sharpe"}, 'reward must be "excess" or "growth"'),
        ({"hold_bars": 0}, "must be at least 1"),
        ({"hold_bars": 80, "steps": 5}, "fit into 400 rows"),
    ):
        for make in (PortfolioEnv, GymVectorEnv):
            with pytest.raises(ValueError, match=message) as error:
                make(**prices, **options)
            assert "\n" not in str(error.value)
    for env in (PortfolioEnv(**prices, steps=5), GymVectorEnv(2, **prices, steps=5)):
        with pytest.raises(ValueError, match='reset options are "start" and "weights"; got \'sart\''):
            env.reset(options={"sart": 100})
        with pytest.raises(RuntimeError, match="call reset"):
            env.step(env.action_space.sample())


@pytest.mark.parametrize("action", ["weights", "logits"])
def test_gymnasium_checks_every_form(prices, action):
    env = gymnasium.make(f"portfolio_env:{ID}", **prices, steps=10, hold_bars=12, action=action)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # the box of weights starts a hair above 0, so that clipping never makes all zeros; of logits, at -10
    assert all("symmetric and normalized" in str(warning.message) for warning in caught)
    clipped = np.clip(np.full(env.action_space.shape, -20.0), env.action_space.low, env.action_space.high)
    env.reset(seed=0)
    env.step(clipped.astype(np.float32))


def test_vector_env_equals_single_envs_from_other_rows_and_weights(prices):
    many, one = GymVectorEnv(3, **prices, steps=9, hold_bars=4), PortfolioEnv(**prices, steps=9, hold_bars=4)
    rng = np.random.default_rng(0)
    start = {"start": np.array([60, 61, 300]), "weights": rng.dirichlet(np.ones(5), 3)}
    actions = rng.dirichlet(np.ones(5), (9, 3))
    many_results = [many.reset(options=start), *map(many.step, actions[:-1])]
    for env in range(3):
        one_results = [one.reset(options={name: part[env] for name, part in start.items()})]
        one_results += map(one.step, actions[:-1, env])
        for (seen, *more, _), (seen_one, *more_one, _) in zip(many_results, one_results, strict=True):
            np.testing.assert_allclose(seen[env], seen_one, atol=1e-6)
            np.testing.assert_allclose([part[env] for part in more], more_one, atol=1e-12)
    assert many_results[-1][-1]["row"].tolist() == [92, 93, 332]


def compare(ours: object, theirs: object, where: object = ...) -> None:
    """Assert that two answers hold the same keys, types, shapes and masks, and the same numbers `where`; then
    overwrite ours."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, part in theirs.items():
            compare(ours[name], part, theirs.get(f"_{name}", ...))
        return
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_allclose(*(np.array([*part[where]], float) for part in (ours, theirs)), atol=1e-6)
    ours[...] = 0


@pytest.mark.parametrize("action", ["weights", "logits"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_vector_env_equals_synchronous_ones_in_each_mode(mode, action):
    """Step by step, through ruin in some and ends in all. All start at the one row from which nine steps fit;
    arrays that a caller overwrites are its own."""
    opens, closes = random_market(43, 3, seed=2)
    opens[20:], closes[20:] = opens[20:] / 20, closes[20:] / 20  # which ruins who holds coins there
    options = {"open_prices": opens, "close_prices": closes, "cost": COST, "steps": 9, "hold_bars": 4,
               "look_back": 5, "action": action}  # fmt: skip
    many = gymnasium.make_vec(ID, num_envs=6, autoreset_mode=mode.value, **options)
    sync = SyncVectorEnv([lambda: PortfolioEnv(**options)] * 6, autoreset_mode=mode)
    assert many.metadata == sync.metadata
    assert many.observation_space == sync.observation_space
    assert many.action_space == sync.action_space
    both, rng, ends = (many, sync), np.random.default_rng(0), []
    for ours, theirs in zip(*(env.reset(seed=0) for env in both), strict=True):
        compare(ours, theirs)
    for _ in range(40):
        actions = rng.normal(0, 3, (6, 3)) if action == "logits" else rng.dirichlet(np.ones(4) / 4, 6)
        ours, theirs = (env.step(actions) for env in both)
        over = theirs[2] | theirs[3]
        ends += {*zip(theirs[2][over].tolist(), theirs[3][over].tolist(), strict=True)}
        for our_part, their_part in zip(ours, theirs, strict=True):
            compare(our_part, their_part)
        if mode is AutoresetMode.DISABLED and over.any():
            with pytest.raises(RuntimeError, match="call reset"):
                many.step(actions)
            ours, theirs = (env.reset(options={"reset_mask": over}) for env in both)
            compare(ours[0], theirs[0])
            compare(ours[1], theirs[1])
    assert {(True, False), (False, True)} == set(ends)


def test_vector_env_is_seeded_and_works_under_wrappers(prices):
    def play(seed: int, mode: str = "SameStep", wrap: type = RecordEpisodeStatistics) -> list[np.ndarray]:
        env = wrap(gymnasium.make_vec(ID, num_envs=3, **prices, steps=4, autoreset_mode=mode))
        first, _ = env.reset(seed=seed)
        env.action_space.seed(seed)
        steps = [env.step(env.action_space.sample()) for _ in range(5)]
        if wrap is NormalizeObservation:
            seen = play(seed, mode)
            np.testing.assert_allclose(env.obs_rms.mean, np.mean(seen, (0, 1)), atol=1e-4)
        else:
            assert steps[3][4]["episode"]["l"].tolist() == [4, 4, 4]
        return [first, *(step[0] for step in steps)]

    np.testing.assert_array_equal(play(1), play(1))
    assert not np.array_equal(play(1), play(2))
    play(1, "NextStep", NormalizeObservation)


@pytest.mark.parametrize("action", ["weights", "logits"])
def test_stable_baselines_checks_and_trains(prices, action):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    from stable_baselines3 import PPO

    options = {**prices, "steps": 16, "look_back": 4, "action": action}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checker.check_env(PortfolioEnv(**options))
    assert all("symmetric" in str(warning.message) for warning in caught)
    env = gymnasium.make(ID, **options)
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=1, device="cpu", seed=0).learn(64)
    assert model.num_timesteps == 64
    choice, _ = model.predict(env.reset(seed=0)[0], deterministic=True)
    assert env.action_space.contains(choice)


def test_torchrl_checks_and_steps_both_environments(prices):
    envs = pytest.importorskip("torchrl.envs")
    from torchrl.envs.utils import check_env_specs

    env = envs.GymWrapper(PortfolioEnv(**prices, steps=5, hold_bars=12, look_back=4))
    env = env.auto_register_info_dict()
    check_env_specs(env)
    rollout = env.rollout(5)
    assert rollout["next", "time"].flatten().diff().tolist() == [12 * 300_000] * 4
    assert rollout["next", "truncated"].flatten().tolist() == [False] * 4 + [True]
    env = envs.GymWrapper(gymnasium.make_vec(ID, num_envs=3, steps=4, look_back=4, **prices))
    check_env_specs(env)
    rollout = env.rollout(8, break_when_any_done=False)
    assert rollout["next", "done"].sum(0).flatten().tolist() == [0, 0, 0, 3] * 2
    weights = rollout["next", "observation"][..., -5:]
    assert torch.isfinite(rollout["next", "observation"]).all()  # the final ones too
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8))
    assert (rollout["observation"][:, 4, -5] == 1).all()  # all cash again


def test_the_daily_returns_that_the_readme_gives_to_quantstats_are_those_of_the_account(tmp_path):
    """From 12:00 on, so that the first day and the last are no whole ones."""
    report = make_report(12.5)
    report = replace(report, times=report.times + 144 * 300_000)
    series = portfolio_env.series_table(report, "daily", report.agents["daily"])
    getData.write_parquet(tmp_path / "series.parquet", series, {})
    (block,) = [part for part in (ROOT / "README.md").read_text().split("```") if "quantstats.rep" in part]
    lines = block[block.index("series =") : block.index("quantstats.rep")]
    scope = {"pd": pd}
    exec(lines.replace("data/reports/RUN", str(tmp_path)), scope)
    growth, account = (1 + scope["daily"]).cumprod(), report.agents["daily"]  # the headline
    ends = [144, *range(432, 3600, 288), 3600]
    np.testing.assert_allclose(growth["value"], account.value[ends])
    np.testing.assert_allclose(growth["benchmark"], account.benchmark[ends])


def test_the_project_installs_the_four_scripts_with_the_pinned_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = project["tool"]["setuptools"]
    assert set(settings["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert settings["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    code = f"import gymnasium; gymnasium.make('portfolio_env:{ID}', data_dir='nowhere')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "UserError: no 5m.parquet in" in result.stderr  # it is found by its name alone
