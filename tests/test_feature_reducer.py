"""The window store, the reducer and its checkpoints."""

import copy
import itertools
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import altered
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers.optimization import Adafactor

import feature_reducer
import getData
from feature_reducer import FeatureReducer, FeatureWindows, ReducerCheckpoint, load_checkpoint
from getData import UserError

BARS = (5, 4, 3)  # of 5m, 15m, 1h
LENGTHS = {"5m": 300_000, "15m": 900_000, "1h": 3_600_000}
COLUMNS = ["A.c", "A.d", "B.c", "B.d", "C.c", "C.d"]
TRAIN = (600 * 300_000, 1_500 * 300_000)


def make_frames(bars: int = 2_000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Random features that start at the epoch; the first 30 rows of every timeframe are warm-up."""
    rng = np.random.default_rng(seed)
    frames = {}
    for timeframe, length in LENGTHS.items():
        count = bars * 300_000 // length
        values = rng.normal(2.0, 3.0, (count, len(COLUMNS))).astype(np.float32)
        values[:30] = np.nan
        index = pd.to_datetime((np.arange(count) + 1) * length, unit="ms", utc=True)
        frames[timeframe] = pd.DataFrame(values, index=index, columns=COLUMNS)
    return frames


@pytest.fixture(scope="module")
def windows() -> FeatureWindows:
    return FeatureWindows(make_frames(), BARS, train=TRAIN)


def test_disk_space_is_checked_before_the_run(tmp_path):
    """What lies there is replaced; the temporary copy of the largest file needs its room too."""
    free = shutil.disk_usage(tmp_path).free
    feature_reducer.check_disk(tmp_path, {"a.pt": 0.3 * free, "b.pt": 0.1 * free})
    with pytest.raises(UserError, match=r"not enough disk: a\.pt, b\.pt need .* GB more in .* GB are free"):
        feature_reducer.check_disk(tmp_path, {"a.pt": 0.6 * free, "b.pt": 0.1 * free})
    with (tmp_path / "a.pt").open("wb") as file:
        file.truncate(int(0.6 * free))  # a hole: it takes no room, but replacing it frees what it says
    feature_reducer.check_disk(tmp_path, {"a.pt": 0.6 * free, "b.pt": 0.1 * free})


def test_coins_in_another_order(windows):
    """The values of coin order[i] stand in the place of coin i, in every bar of every timeframe."""
    rows = torch.arange(700, 703)
    order = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
    assert torch.equal(windows(rows, order)[0], windows(rows)[0])
    plain = windows(rows).unflatten(1, (3, -1))
    mixed = windows(rows, order).unflatten(1, (3, -1))
    for row in range(3):
        for slot in range(3):
            assert torch.equal(mixed[row, slot], plain[row, order[row, slot]])


@settings(max_examples=30)
@given(data=st.data())
def test_any_window_of_any_row_is_the_slow_one(windows, data):
    """Of any lengths, for any decisions, in any order of the coins (two columns each)."""
    bars = data.draw(st.tuples(*(st.integers(1, 12) for _ in BARS)))
    store = FeatureWindows(make_frames(), bars, normalisation=windows.normalisation)
    rows = data.draw(st.lists(st.integers(int(store.valid.argmax()), 1_999), min_size=1, max_size=4))
    coins = data.draw(st.permutations(range(3)))
    plain, mixed = store(torch.tensor(rows)), store(torch.tensor(rows), torch.tensor([coins] * len(rows)))
    for row, window, other in zip(rows, plain, mixed, strict=True):
        expected = naive_window(make_frames(), row, windows.normalisation, bars)
        np.testing.assert_array_equal(window, expected)
        np.testing.assert_array_equal(other, expected.reshape(3, -1)[coins].ravel())


def naive_window(
    frames: dict[str, pd.DataFrame], row: int, normalisation: dict, bars: tuple = BARS
) -> np.ndarray:
    """The slow second way: of each coin filter by close time, take the tail, normalise, concatenate."""
    now = frames["5m"].index[row]
    parts = []
    for coin in "ABC":
        for (timeframe, frame), count in zip(frames.items(), bars, strict=True):
            own = frame[[f"{coin}.c", f"{coin}.d"]]
            tail = torch.from_numpy(own[frame.index <= now].tail(count).to_numpy(copy=True))
            tail = (tail - normalisation["mean"][timeframe]) / normalisation["std"][timeframe]
            parts.append(tail.clamp(-8, 8).flatten().numpy())
    return np.concatenate(parts)


def test_gathered_windows_are_the_last_completed_bars(windows):
    frames = make_frames()
    rows = torch.tensor([700, 701, 711, 1_234, 1_999])
    gathered = windows(rows)
    assert gathered.shape == (5, sum(BARS) * len(COLUMNS)) == (5, windows.input_dim)
    for row, window in zip(rows.tolist(), gathered, strict=True):
        np.testing.assert_array_equal(window.numpy(), naive_window(frames, row, windows.normalisation))


def test_no_future_value_reaches_a_window():
    row = 1_000
    frames = make_frames()
    before = FeatureWindows(frames, BARS, train=(400 * 300_000, 900 * 300_000))
    changed = {name: frame.copy() for name, frame in frames.items()}
    cut = {}
    for name, frame in changed.items():
        future = frame.index > frames["5m"].index[row]
        frame.loc[future] = 1e6
        cut[name] = frames[name].loc[~future]
    rows = torch.arange(500, row + 1)
    for frames_after in (changed, cut):
        after = FeatureWindows(frames_after, BARS, train=(400 * 300_000, 900 * 300_000))
        assert torch.equal(before(rows), after(rows))


def test_normalisation_sees_the_training_split_only(windows):
    frames = make_frames()
    times = feature_reducer.close_ms(frames["15m"])
    inside = frames["15m"].to_numpy(np.float64)[(times >= TRAIN[0]) & (times < TRAIN[1])]
    for channel in range(2):  # pooled over the coins
        of_all = np.concatenate([inside[:, column] for column in range(channel, 6, 2)])
        assert windows.normalisation["mean"]["15m"][channel] == pytest.approx(of_all.mean(), rel=1e-6)
        assert windows.normalisation["std"]["15m"][channel] == pytest.approx(of_all.std(), rel=1e-6)
    for frame in frames.values():
        outside = (feature_reducer.close_ms(frame) < TRAIN[0]) | (feature_reducer.close_ms(frame) >= TRAIN[1])
        frame[outside] = 99.0
    again = feature_reducer.fit_normalisation(frames, TRAIN)
    for kind in ("mean", "std"):
        for name in frames:
            assert torch.equal(again[kind][name], windows.normalisation[kind][name])


def test_a_constant_channel_becomes_zero_and_extremes_are_clipped():
    frames = make_frames()
    frames["5m"].iloc[30:, ::2] = 7.0
    frames["5m"].iloc[1_400, 3] = 1e9
    windows = FeatureWindows(frames, BARS, train=(600 * 300_000, 1_300 * 300_000))
    window = windows(torch.tensor([1_400])).view(3, -1)[:, windows.slices["5m"]].view(3, BARS[0], 2)
    assert torch.equal(window[..., 0], torch.zeros(3, BARS[0]))
    assert window[1, -1, 1] == 8.0
    assert window[0, -1, 1].abs() < 8.0


def test_rows_with_incomplete_windows_are_refused(windows):
    # 30 warm-up bars and 3 bars of 1h: the window is complete from the close of hour 33, the 396th 5-minute
    # bar
    assert windows.valid.nonzero()[0][0] == 33 * 12 - 1
    assert len(windows.rows(TRAIN)) == 900
    with pytest.raises(UserError, match="too little history: 5 of the 15 decisions of the test split"):
        windows.rows((386 * 300_000, 401 * 300_000), "test")
    with pytest.raises(UserError, match="too little history"):
        FeatureWindows(make_frames(36), (5, 4, 4), train=TRAIN)


def test_full_scale_shapes_and_parameter_count():
    with torch.device("meta"):
        reducer = FeatureReducer(134_980, 3_222, 2_148)
        latent, reconstruction = reducer(torch.empty(2, 134_980))
    assert latent.shape == (2, 2_148)
    assert reconstruction.shape == (2, 134_980)
    by_hand = 2 * (134_980 * 3_222 + 3_222 * 2_148) + 3_222 + 2_148 + 3_222 + 134_980
    assert sum(parameter.numel() for parameter in reducer.parameters()) == by_hand == 883_796_404
    assert round(134_980 / 2_148, 1) == 62.8


def test_full_scale_tied_shapes_and_parameter_count():
    with torch.device("meta"):
        reducer = FeatureReducer(134_980, 3_222, 2_148, coins=10)
        latent, reconstruction = reducer(torch.empty(2, 134_980))
        dense = reducer.to_dense(10)
    assert (latent.shape, reconstruction.shape) == ((2, 2_148), (2, 134_980))
    layers = [layer for part in (reducer.encoder, reducer.decoder) for layer in (part[0], part[2])]
    hidden, small = (289, 332), (193, 218)  # 10 x 289 + 332 = 3,222 and 10 x 193 + 218 = 2,148
    assert [(layer.inputs, layer.outputs) for layer in layers] == [
        ((13_498, 0), hidden), (hidden, small), (small, hidden), (hidden, (13_498, 0)),
    ]  # fmt: skip
    by_hand = 0
    for (coin_in, market_in), (coin_out, market_out) in [(layer.inputs, layer.outputs) for layer in layers]:
        by_hand += coin_in * coin_out + (coin_in + market_in + 1) * (coin_out + market_out)
    assert sum(parameter.numel() for parameter in reducer.parameters()) == by_hand == 25_203_527
    assert sum(parameter.numel() for parameter in dense.parameters()) == 883_796_404
    plain = FeatureReducer(3, 2, 1)
    assert [type(part) for part in dense.encoder] == [type(part) for part in plain.encoder]


@settings(max_examples=40)
@given(data=st.data())
def test_tied_layers_treat_coins_alike_and_are_dense_ones(data):
    """Of any widths and coins: permuted coins give permuted outputs, and `to_dense` the same ones."""
    inputs, outputs = (data.draw(st.tuples(st.integers(1, 5), st.integers(0, 4))) for _ in range(2))
    coins = data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    layer = feature_reducer.EquivariantLinear(inputs, outputs)
    x = torch.randn(4, coins * inputs[0] + inputs[1])
    y = layer(x)
    assert y.shape == (4, coins * outputs[0] + outputs[1])
    torch.testing.assert_close(layer.to_dense(coins)(x), y, rtol=1e-5, atol=1e-5)
    order = data.draw(st.permutations(range(coins)))
    torch.testing.assert_close(
        layer(permuted(x, order, inputs[0])), permuted(y, order, outputs[0]), rtol=1e-5, atol=1e-6
    )


def permuted(x: torch.Tensor, order: list[int], width: int) -> torch.Tensor:
    """Blocks `order` of the coins, `width` values each, in front of the market's as it is."""
    own = len(order) * width
    return torch.cat([x[..., :own].unflatten(-1, (-1, width))[..., order, :].flatten(-2), x[..., own:]], -1)


def test_a_tied_layer_by_hand():
    """Two coins of one value, a market of one: out_i = 2 x_i + 3 mean + 5 m + 7 and 11 mean + 13 m + 17."""
    layer = feature_reducer.EquivariantLinear((1, 1), (1, 1))
    with torch.no_grad():
        layer.own.weight.fill_(2)
        layer.shared.weight.copy_(torch.tensor([[3.0, 5.0], [11.0, 13.0]]))
        layer.shared.bias.copy_(torch.tensor([7.0, 17.0]))
    x = torch.tensor([10.0, 20.0, 1.0])
    assert layer(x).tolist() == [2 * 10 + 3 * 15 + 5 + 7, 2 * 20 + 3 * 15 + 5 + 7, 11 * 15 + 13 + 17]


def test_a_tied_reducer_takes_any_number_of_coins():
    torch.manual_seed(0)
    reducer = FeatureReducer(3 * 20, 30, 12, coins=3)
    (coin, market) = reducer.encoder[2].outputs
    for coins in (1, 2, 3, 8):
        x = torch.randn(5, coins * 20)
        latent, reconstruction = reducer(x)
        assert latent.shape == (5, coins * coin + market)
        dense = reducer.to_dense(coins)
        torch.testing.assert_close(dense(x), (latent, reconstruction), rtol=1e-5, atol=1e-5)
        order = list(range(coins))[::-1]
        again = reducer(permuted(x, order, 20))
        torch.testing.assert_close(again[0], permuted(latent, order, coin), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[1], permuted(reconstruction, order, 20), rtol=1e-5, atol=1e-6)
    assert dense.latent_dim == 8 * coin + market
    with pytest.raises(getData.UsageError, match="a layer of 10 values is too narrow for 12 coins"):
        FeatureReducer(12 * 20, 30, 10, coins=12)


def tied_pca(windows: FeatureWindows, rows: torch.Tensor) -> tuple:
    return feature_reducer.fit_tied_pca(windows, rows, (4, 5))


def test_the_tied_pca_is_the_optimum_of_the_symmetric_problem(windows):
    """Its error is what is left of the covariance averaged over all orders of the coins.

    Equivariant maps of (4, 5) latents keep 4 deviation components, twice in this covariance, and 9 of the
    mean: with few windows, so that both see the same ones.
    """
    rows = torch.arange(700, 1_000, 3)
    x = windows(rows).double()
    of_mean, of_deviation = tied_pca(windows, rows)
    blocks = x.unflatten(1, (3, -1))
    middle = blocks.mean(1, keepdim=True)
    _, deviation, _ = feature_reducer.fit_pca((blocks - middle).float().flatten(0, 1), 4)
    third = (blocks - middle)[::3].flatten(0, 1)  # which is what it looks at
    kept = np.linalg.svd(third.numpy(), full_matrices=False)[2][:4]
    np.testing.assert_allclose(of_deviation[1] @ of_deviation[1].T, kept.T @ kept, atol=1e-4)
    mean, basis = of_mean[0].double(), of_mean[1].double()
    common = mean + (middle - mean) @ basis @ basis.T
    found = common + (blocks - middle) @ deviation.double() @ deviation.double().T
    error = float((found - blocks).square().sum() / len(x))

    orders = list(itertools.permutations(range(3)))
    everything = torch.cat([blocks[:, order] for order in orders]).flatten(1)  # [6 R, D]
    everything = everything - everything.mean(0)
    values, vectors = np.linalg.eigh((everything.T @ everything / len(everything)).numpy())
    parts = vectors.T.reshape(len(values), 3, -1)
    is_common = np.ptp(parts, axis=1).max(1) < 1e-6  # the same in every coin
    kept = sorted(values[is_common])[::-1][:9], sorted(values[~is_common])[::-1][:8]
    assert error == pytest.approx(values.sum() - sum(map(sum, kept)), rel=1e-4)


def test_the_initialised_tied_reducer_is_the_tied_pca(windows):
    torch.manual_seed(0)
    rows = torch.arange(700, 1_400)
    reducer = FeatureReducer(windows.input_dim, 24, 17, coins=3)
    assert feature_reducer.blocks_of(17, 3) == reducer.encoder[2].outputs == (5, 2)
    of_mean, of_deviation = feature_reducer.fit_tied_pca(windows, rows, (5, 2))
    feature_reducer.initialise_from_tied_pca(reducer, of_mean, of_deviation)
    x = windows(rows)
    with torch.no_grad():
        latent, reconstruction = reducer(x)
    blocks = x.unflatten(1, (3, -1))
    middle = blocks.mean(1, keepdim=True)
    linear = of_mean[0] + (middle - of_mean[0]) @ of_mean[1] @ of_mean[1].T
    linear = linear + (blocks - middle) @ of_deviation[1] @ of_deviation[1].T
    linear = linear.flatten(1)
    assert (reconstruction - linear).square().mean() < 2e-3 * (x - linear).square().mean()
    assert latent.var(0).mean().item() == pytest.approx(1.0, rel=0.1)


def test_pca_is_the_svd():
    x = (
        torch.randn(60, 200, generator=torch.Generator().manual_seed(0))
        @ torch.diag(torch.linspace(3, 0.1, 200))
        + 1.0
    )
    mean, basis, std = feature_reducer.fit_pca(x.clone(), 10)
    left, singular, right = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(std, singular[:10] / np.sqrt(59), rtol=1e-4)
    np.testing.assert_allclose(basis @ basis.T, right[:10].T @ right[:10], atol=1e-4)


def test_the_initialised_reducer_is_the_pca():
    x = (
        torch.randn(400, 120, generator=torch.Generator().manual_seed(1))
        @ torch.diag(torch.linspace(3, 0.2, 120))
        - 0.5
    )
    mean, basis, std = feature_reducer.fit_pca(x.clone(), 12)
    torch.manual_seed(0)
    reducer = FeatureReducer(120, 18, 12)
    feature_reducer.initialise_from_pca(reducer, mean, basis, std)
    latent, reconstruction = reducer(x)
    linear = mean + (x - mean) @ basis @ basis.T
    assert (reconstruction - linear).square().mean() < 1e-3 * (x - linear).square().mean()
    # not whitened: the latents keep the scores' relative scale, on average at variance 1
    torch.testing.assert_close(latent.std(0) / latent.std(0)[0], std / std[0], rtol=0.02, atol=0)
    assert latent.square().mean().item() == pytest.approx(1.0, rel=0.02)


def test_reconstruction_metrics_by_hand(windows):
    rows = torch.tensor([700, 900, 1_500])
    target = windows(rows)
    metrics = feature_reducer.reconstruction_metrics(lambda x: x + 0.05, windows, rows, 2)
    assert metrics["mse"] == pytest.approx(0.0025, rel=1e-4)
    assert metrics["accuracy"] == 1.0
    metrics = feature_reducer.reconstruction_metrics(torch.zeros_like, windows, rows, 2)
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["accuracy"] == pytest.approx((target.abs() < 0.1).float().mean().item())
    hourly = 2 * BARS[2]  # values, the last ones of each coin

    def only_hourly(x: torch.Tensor) -> torch.Tensor:
        x = x.view(len(x), 3, -1).clone()
        x[..., :-hourly] = 0
        return x.flatten(1)

    metrics = feature_reducer.reconstruction_metrics(only_hourly, windows, rows, 3)
    assert metrics["explained_variance_1h"] == 1.0
    assert metrics["explained_variance_5m"] == pytest.approx(0.0, abs=1e-9)
    expected = float(target.view(3, 3, -1)[..., -hourly:].square().sum() / target.square().sum())
    assert metrics["explained_variance"] == pytest.approx(expected, rel=1e-5)


def test_random_rows_are_a_permutation_that_depends_on_the_seed():
    rows = torch.arange(100, 150)
    first = feature_reducer.random_rows(rows, 0, 5)
    assert sorted(first.tolist()) == rows.tolist()
    assert torch.equal(first, feature_reducer.random_rows(rows, 0, 5))
    assert not torch.equal(first, feature_reducer.random_rows(rows, 0, 6))
    assert len(feature_reducer.random_rows(rows, 7, 5)) == 7
    assert feature_reducer.spread_rows(rows, 3).tolist() == [100, 124, 149]


def test_adafactor_moves_zero_initialised_parameters():
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(layer.weight)
    optimizer = feature_reducer.make_adafactor(layer, 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(torch.ones(4, 3)) - 1).square().mean().backward()
        optimizer.step()
    assert layer.weight.abs().min() > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta1": 0.9},
        {"weight_decay": 0.1, "clip_threshold": 0.3},
        {"scale_parameter": True},
        {"scale_parameter": True, "relative_step": True, "warmup_init": True, "lr": None, "decay_rate": -0.5},
    ],
)
def test_adafactor_in_blocks_is_that_of_the_library(monkeypatch, options):
    """Over 50 steps with gradients of all sizes and none, on odd shapes; each goes on from the other."""
    monkeypatch.setattr(
        feature_reducer, "_block_bytes", lambda _: 400
    )  # several blocks, the last one not full
    options = {"lr": 1e-2, "scale_parameter": False, "relative_step": False, "warmup_init": False} | options
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 13), (1, 1), (1, 31), (201, 3), (3, 150), (5,), (), (2, 3, 5), (2, 2, 3, 4), (4, 4)]
    expected = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    found = copy.deepcopy(expected)

    class InBlocks(Adafactor):
        step = feature_reducer.adafactor_step

    library, blocks = Adafactor(expected, **options), InBlocks(found, **options)
    for step in range(50):
        for position, (first, second) in enumerate(zip(expected, found, strict=True)):
            size = 0.0 if position == 9 or step % 7 == 3 else 10.0 ** (step % 5 - 3)
            first.grad = size * torch.randn(first.shape, generator=generator)
            second.grad = 4 * first.grad
        library.step()
        blocks.step(factor=0.25 if step % 2 else torch.tensor(0.25))
        if step == 20:
            states = library.state_dict(), blocks.state_dict()
            library, blocks = Adafactor(expected, **options), InBlocks(found, **options)
            library.load_state_dict(copy.deepcopy(states[1]))
            blocks.load_state_dict(copy.deepcopy(states[0]))
    for first, second in zip(expected, found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
    for first, second in zip(library.state.values(), blocks.state.values(), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"RMS"}:
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-12)


# ------------------------------------------------------------------------------------------------ checkpoints


FOOTER = {
    "source": "synthetic:seed=0", "symbols": ["A", "B", "C"], "channels": ["c", "d"], "timeframes": LENGTHS,
    "inputs": {"A": "00"},
    "splits": {
        "train": list(TRAIN),
        "validation": [1_600 * 300_000, 1_700 * 300_000],
        "test": [1_800 * 300_000, 1_900 * 300_000],
    },
}  # fmt: skip


def test_a_checkpoint_of_another_market_is_refused():
    dense, tied = ({"market": FOOTER, "coins": coins} for coins in (None, 3))
    feature_reducer.check_market(dense, FOOTER)
    later = FOOTER | {"splits": FOOTER["splits"] | {"validation": [TRAIN[1], 0]}, "inputs": {"A": "11"}}
    feature_reducer.check_market(dense, later)  # newer bars of the same source
    with pytest.raises(UserError, match="source synthetic:seed=0, the features have binance"):
        feature_reducer.check_market(dense, FOOTER | {"source": "binance"})
    real = {"market": FOOTER | {"source": "recorded:x"}, "coins": 3}
    feature_reducer.check_market(real, FOOTER | {"source": "binance", "symbols": ["D"]})
    for source, other in (("binance", tied), ("planted:strength=1,seed=0 on recorded:x", real)):
        with pytest.raises(UserError, match="was trained on source"):
            feature_reducer.check_market(other, FOOTER | {"source": source})
    earlier = FOOTER | {"splits": FOOTER["splits"] | {"validation": [TRAIN[1] - 1, 0]}}
    for saved in (dense, tied):
        with pytest.raises(UserError, match="trained or chosen on bars that are now in a later split"):
            feature_reducer.check_market(saved, earlier)
    with pytest.raises(UserError, match="bars and splits of the stopped run"):
        feature_reducer.check_resumed({"fixed": {}, "market": FOOTER}, {}, later)


def test_a_checkpoint_brings_everything_back(tmp_path, windows):
    torch.manual_seed(0)
    reducer = FeatureReducer(windows.input_dim, 9, 6)
    footer = FOOTER
    content = feature_reducer.reducer_checkpoint(reducer, windows, footer, "small")
    feature_reducer.save_checkpoint(tmp_path / "r.pt", content)
    saved = load_checkpoint(tmp_path / "r.pt", ReducerCheckpoint)
    again = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    store = FeatureWindows(make_frames(), saved["window_bars"], normalisation=saved["normalisation"])
    rows = torch.arange(800, 810)
    assert torch.equal(again.encoder(store(rows)), reducer.encoder(windows(rows)))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pt"
    feature_reducer.save_checkpoint(path, {"x": torch.ones(3)})
    code = (
        "import resource, signal, sys, torch, feature_reducer\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    feature_reducer.save_checkpoint(Path(sys.argv[1]), {'x': torch.ones(1_000_000)})\n"
        "except feature_reducer.UserError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert f"cannot write {path}" in result.stdout
    assert torch.equal(torch.load(str(path), weights_only=True)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["c.pt"]


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def reducer_content(windows: FeatureWindows) -> dict:
    torch.manual_seed(0)
    return feature_reducer.reducer_checkpoint(
        FeatureReducer(windows.input_dim, 9, 6), windows, FOOTER, "small"
    )


def test_foreign_checkpoints_are_refused_in_one_line(tmp_path, windows):
    good = tmp_path / "good.pt"
    content = reducer_content(windows)
    feature_reducer.save_checkpoint(good, content)
    load_checkpoint(good, ReducerCheckpoint)
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(content["reducer"]["encoder.0.weight"].numpy().tobytes()) + 40] ^= (
        1  # one bit of one weight
    )
    (tmp_path / "flipped.pt").write_bytes(flipped)
    (tmp_path / "truncated.pt").write_bytes(whole[:2_000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    malicious = Malicious(tmp_path / "ran")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(malicious))
    variants = {
        "malicious": {"x": malicious},
        "old": {"schema": 1},
        "foreign": {"schema": 0},
        "bare": {"reducer": None},
        "numbers": {"window_bars": [1.5]},
        "short": {"window_bars": [5, 4]},
        "dimless": {"dims": [72, 9]},
        "edgeless": {"market": content["market"] | {"splits": content["market"]["splits"] | {"train": []}}},
        "normless": {"normalisation": {"mean": {}}},
        "still": {"normalisation": content["normalisation"] | {"std": {"5m": torch.zeros(2)}}},
        "shifted": {"normalisation": content["normalisation"] | {"mean": {"5m": torch.full((2,), math.nan)}}},
        "double": {"reducer": {name: weights.double() for name, weights in content["reducer"].items()}},
        "splitless": {"market": content["market"] | {"splits": {"train": [0, 1]}}},
    }
    for name, change in variants.items():
        torch.save(content | change, tmp_path / f"{name}.pt")
    for name in ("flipped", "truncated", "text", "empty", "list", "pickle", "missing", *variants):
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path / f"{name}.pt", ReducerCheckpoint)
        assert "\n" not in str(caught.value)
        assert f"{name}.pt" in str(caught.value)
        assert "python feature_reducer.py" in str(caught.value)
    with pytest.raises(UserError, match="expected"):
        load_checkpoint(good, feature_reducer.ReducerState)
    assert not (tmp_path / "ran").exists()


def reducer_state(windows: FeatureWindows) -> dict:
    progress = asdict(feature_reducer.Progress(epoch=1, best={"mse": 0.5}, pca={"mse": 0.25}))
    content = reducer_content(windows) | {"kind": "feature_reducer_last", "optimizer": {}, "scaler": {}}
    return content | {"progress": progress, "fixed": {"SEED": 0}}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema", 1, "was written by an earlier version of these scripts"),
        ("dims", [72, 9, 0], "dims.2: Input should be greater than or equal to 1"),
        ("dims", [73, 9, 6], r"dims \[73, 9, 6\] do not fit windows of \[5, 4, 3\] bars and 6 columns"),
        ("market", None, "market: Input should be a valid dictionary"),
        ("market.source", None, "market.source: Input should be a valid string"),
        ("market.timeframes.15m", "900000", "market.timeframes.15m: Input should be a valid integer"),
        ("market.splits.test", [1], "market.splits.test: List should have at least 2 items"),
        (
            "normalisation.mean.1h",
            torch.full((2,), math.inf),
            "normalisation.mean.1h: Input should be finite",
        ),
        (
            "normalisation.std.5m",
            torch.zeros(2),
            "normalisation.std.5m: Input should be greater than 0",
        ),
        (
            "reducer.encoder.0.bias",
            torch.zeros(9).half(),
            "encoder.0.bias: Input should be float32, not torch.float16",
        ),
        ("reducer.encoder.0.bias", [0.0], "reducer.encoder.0.bias: Input should be an instance of Tensor"),
        ("scaler", ..., "scaler: Field required"),
        ("progress", ..., "progress: Field required"),
        ("progress.epoch", "1", "progress.epoch: Input should be a valid integer"),
        ("progress.batch", True, "progress.batch: Input should be a valid integer"),
        ("progress.skipped", -1, "progress.skipped: Input should be greater than or equal to 0"),
        ("progress.best.mse", "0.5", "progress.best.mse: Input should be a valid number"),
        ("progress.more", 1, "progress.more: Unexpected keyword argument"),
    ],
)
def test_a_checkpoint_of_another_form_is_one_line_that_names_the_place(
    tmp_path, windows, place, value, message
):
    """... is a key that is not there."""
    keys = place.split(".", 1) if place.startswith("reducer") else place.split(".")
    torch.save(altered(reducer_state(windows), keys, value), tmp_path / "c.pt")
    with pytest.raises(
        UserError, match=f"{message}.*; move it away and run python feature_reducer.py$"
    ) as error:
        load_checkpoint(tmp_path / "c.pt", feature_reducer.ReducerState)
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_says_comes_back_as_its_types(tmp_path, windows):
    content = reducer_state(windows)
    torch.save(content, tmp_path / "c.pt")
    saved = load_checkpoint(tmp_path / "c.pt", feature_reducer.ReducerState)
    assert saved["progress"] == feature_reducer.Progress(epoch=1, best={"mse": 0.5}, pca={"mse": 0.25})
    assert saved.keys() == content.keys()
    checked = TypeAdapter(feature_reducer.ReducerState).validate_python(content)
    assert all(
        checked["reducer"][name] is weights for name, weights in content["reducer"].items()
    )  # no copies


def test_any_damaged_byte_of_a_checkpoint_is_noticed_or_harmless(tmp_path, windows):
    """Whatever bit falls over: the same content comes back, or one line says that the file is damaged."""
    path = tmp_path / "c.pt"
    content = reducer_content(windows)
    feature_reducer.save_checkpoint(path, content)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            back = load_checkpoint(path, ReducerCheckpoint)
        except UserError:
            refused += 1
            continue
        assert all(
            torch.equal(back["reducer"][name], weights) for name, weights in content["reducer"].items()
        )
        assert {key: back[key] for key in ("dims", "market", "window_bars")} == {
            key: content[key] for key in ("dims", "market", "window_bars")
        }
    assert refused > 100


def test_any_damaged_bit_of_the_table_of_contents_is_noticed_or_harmless(tmp_path, windows):
    path = tmp_path / "c.pt"
    feature_reducer.save_checkpoint(path, reducer_content(windows))
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")
    for bit in range(8 * 46):
        damaged = bytearray(whole)
        damaged[entry + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(UserError):
            assert load_checkpoint(path, ReducerCheckpoint)["dims"] == reducer_content(windows)["dims"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_altered_pickle_with_the_right_checksum_is_one_line(tmp_path, windows):
    path, altered = tmp_path / "c.pt", tmp_path / "altered.pt"
    feature_reducer.save_checkpoint(path, reducer_content(windows))
    with zipfile.ZipFile(path) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    (name,) = (name for name in content if name.endswith("data.pkl"))
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(300):
        pickled = bytearray(content[name])
        pickled[rng.integers(len(pickled))] = rng.integers(256)
        with zipfile.ZipFile(altered, "w") as parts:
            for part, data in (content | {name: bytes(pickled)}).items():
                parts.writestr(part, data)
        try:
            load_checkpoint(altered, ReducerCheckpoint)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in reason for reason in refused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [39, 9, 7]}, "weights do not fit"),
        ({"reducer": {}}, "weights do not fit"),
    ],
)
def test_weights_of_another_shape_are_refused(windows, change, message):
    with pytest.raises(UserError, match=message):
        feature_reducer.reducer_from_checkpoint(reducer_content(windows) | change, "cpu")


def test_a_normalisation_of_other_columns_is_refused(windows):
    normalisation = {kind: dict(parts) for kind, parts in windows.normalisation.items()}
    normalisation["std"]["1h"] = torch.ones(5)
    with pytest.raises(UserError, match="normalisation does not fit 2 channels of 1h"):
        FeatureWindows(make_frames(), BARS, normalisation=normalisation)


def test_states_of_another_optimizer_are_refused():
    layer = torch.nn.Linear(2, 2)
    optimizer, other = torch.optim.Adam(layer.parameters()), torch.optim.Adam([layer.weight])
    with pytest.raises(UserError, match="do not fit"):
        feature_reducer.load_states([optimizer], [other.state_dict()])
    with pytest.raises(UserError, match="do not fit"):
        feature_reducer.load_states([optimizer], [])
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    wrong_parts = {
        "exp_avg": torch.ones(3, 2),
        "exp_avg_sq": torch.full((2, 2), math.nan),
        "step": None,
        "more": 1.0,
    }
    for name, wrong in wrong_parts.items():
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0][name] = wrong
        with pytest.raises(UserError, match="do not fit"):
            feature_reducer.load_states([torch.optim.Adam(layer.parameters())], [state])
    for group in ({"lr": "x"}, {"lr": math.nan}):
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0] |= group
        with pytest.raises(UserError, match="do not fit"):
            feature_reducer.load_states([torch.optim.Adam(layer.parameters())], [state])
    for scale in ("x", math.inf):
        with pytest.raises(UserError, match="do not fit"):
            feature_reducer.load_states(
                [torch.amp.GradScaler("cpu")], [torch.amp.GradScaler("cpu").state_dict() | {"scale": scale}]
            )
    feature_reducer.load_states([torch.optim.Adam(layer.parameters())], [optimizer.state_dict()])
    adafactor = feature_reducer.make_adafactor(layer, 1e-3)
    adafactor.step()
    feature_reducer.load_states([feature_reducer.make_adafactor(layer, 1e-3)], [adafactor.state_dict()])


# ----------------------------------------------------------------------------------- saving in the background


def checkpoint_of(weights: torch.Tensor, **extra: object) -> dict:
    return {"reducer": {"w": weights}, **extra}


def test_what_changes_after_the_call_is_not_what_is_written(tmp_path):
    """The file holds the moment of the call: tensors, numbers in lists, tuples; buffers are used again."""
    weights, state = torch.ones(3), {"rolling": [1.0], "betas": (0.9, 0.999)}
    writer, path = feature_reducer.CheckpointWriter(), tmp_path / "a.pt"
    writer.write(path, checkpoint_of(weights, state=state, same=weights))
    buffers = set(map(id, writer._buffers.values()))
    assert len(buffers) == 1  # of a tensor that stands there twice
    weights += 1
    state["rolling"].append(2.0)
    writer.wait()
    saved = torch.load(str(path), weights_only=True)
    assert torch.equal(saved["reducer"]["w"], torch.ones(3))
    assert saved["state"] == {"rolling": [1.0], "betas": (0.9, 0.999)}
    writer.write(path, checkpoint_of(weights))
    assert set(map(id, writer._buffers.values())) == buffers
    assert writer.exit_code(130) == 130
    assert torch.equal(torch.load(str(path), weights_only=True)["reducer"]["w"], torch.full((3,), 2.0))


def test_a_failed_write_is_told_and_ends_nothing(tmp_path, capsys):
    """A folder stands where the file should go. What is written now is on disk when the call returns, or is
    said not to be; a failed file does not keep the next one from being written."""
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    writer = feature_reducer.CheckpointWriter()
    best.mkdir()
    assert not writer.write_now(best, checkpoint_of(torch.ones(1)))
    warning = capsys.readouterr().err
    assert f"warning: cannot write {best}" in warning
    assert "previous file" not in warning
    writer.write(last, checkpoint_of(torch.ones(1)))
    assert writer.exit_code() == 5
    assert last.is_file()
    assert list(writer.failed) == [best]
    assert f"error: {best} is not up to date" in capsys.readouterr().err
    best.rmdir()
    assert writer.write_now(best, checkpoint_of(torch.ones(1)))
    assert torch.equal(torch.load(str(best), weights_only=True)["reducer"]["w"], torch.ones(1))
    assert writer.exit_code() == 0
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


def test_weights_that_are_not_finite_replace_no_file(tmp_path):
    writer, path = feature_reducer.CheckpointWriter(), tmp_path / "c.pt"
    writer.write(path, checkpoint_of(torch.ones(3)))
    assert not writer.write_now(path, checkpoint_of(torch.tensor([1.0, math.nan, 1.0])))
    assert writer.exit_code() == 5
    assert writer.failed[path].endswith("w is not finite. The previous file is intact")
    assert torch.equal(torch.load(str(path), weights_only=True)["reducer"]["w"], torch.ones(3))


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_feature_that_is_not_finite_is_named(value):
    frames = make_frames()
    frames["15m"].iloc[400, 4] = value
    with pytest.raises(
        UserError, match=rf"C.c of 15m is {value} at 1970-01-05 04:15:00\+00:00: run python getData"
    ):
        FeatureWindows(frames, BARS, train=TRAIN)


def test_a_step_with_a_gradient_that_is_not_finite_moves_nothing():
    """Also without a loss scale, and in both modules where one is bad."""
    good, bad = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = [parameter.clone() for parameter in [*good.parameters(), *bad.parameters()]]
    optimizers = [torch.optim.Adam(module.parameters()) for module in (good, bad)]
    loss = good(torch.ones(2)).sum() + bad(torch.tensor([1.0, math.inf])).sum()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms, skipped = feature_reducer.clipped_step(loss, [good, bad], optimizers, scaler, 1.0)
    assert skipped
    assert math.isfinite(norms[0])
    assert not math.isfinite(norms[1])
    after = [*good.parameters(), *bad.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    modules = {"good": good, "bad": bad}
    counts = feature_reducer.StepCounts()
    feature_reducer.count_skipped(counts, 5, 8, modules, "here")
    assert counts == feature_reducer.StepCounts(skipped=5, skipped_in_a_row=0)  # three were taken
    feature_reducer.count_skipped(counts, 39, 39, modules, "here")
    feature_reducer.count_skipped(counts, 1, 1, modules, "here")
    assert counts == feature_reducer.StepCounts(skipped=45, skipped_in_a_row=40)
    with pytest.raises(
        UserError, match=r"41 steps in a row .* in step 41: the gradient of bad\.weight is not finite"
    ):
        feature_reducer.count_skipped(counts, 1, 1, modules, "in step 41")
    with torch.no_grad():
        good.bias[0] = math.nan
    assert feature_reducer.first_bad_tensor(modules) == "good.bias is not finite"


def test_resumed_log_has_no_duplicate_and_no_missing_row(tmp_path):
    log = feature_reducer.RunLog(tmp_path)
    for step in (1, 2, 3):
        log.add(step, {"loss": step / 10, "validation": None})
    log.close()
    log = feature_reducer.RunLog(tmp_path, steps_done=2)
    for step in (3, 4):
        log.add(step, {"loss": step / 10, "validation": 1.0})
    log.close()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].tolist() == [1, 2, 3, 4]
    assert table["loss"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert table["validation"].isna().tolist() == [True, True, False, False]


def test_log_rows_wait_while_the_disk_is_full(tmp_path):
    """A limit on the file's size stands for the disk; what did not fit is whole once there is room again."""
    code = (
        "import resource, signal, sys, feature_reducer\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = feature_reducer.RunLog(Path(sys.argv[1]))\n"
        "for step in range(1, 9):\n"
        "    limit = 40 if 3 <= step < 7 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    log.add(step, {'loss': step / 8})\n"
        "    print(step, Path(sys.argv[1], 'metrics.csv').read_text().count('\\n'))\n"
        "log.close()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    lines = dict(line.split() for line in result.stdout.splitlines())
    assert lines["2"] == "3"  # with the header
    assert lines["4"] == lines["6"] < "6"  # rows that came before the limit, none of them half
    assert "has to wait" in result.stderr
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].tolist() == list(range(1, 9))
    assert table["loss"].tolist() == [step / 8 for step in range(1, 9)]


def test_curves_that_cannot_be_written_are_said_in_one_line(tmp_path):
    """TensorBoard writes in a thread, whose failure shows at a later row."""
    code = (
        "import resource, signal, sys, time, feature_reducer\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = feature_reducer.RunLog(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70, resource.RLIM_INFINITY))\n"
        "log.add(1, {'loss': 1.0})\n"
        "while log.board.file_writer.event_writer._async_writer._worker.is_alive():\n"
        "    time.sleep(0.01)\n"
        "log.add(2, {'loss': 2.0})\n"
        "log.add(3, {'loss': 3.0})\n"
        "log.close()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60
    )
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: no more TensorBoard curves")
    assert pd.read_csv(tmp_path / "metrics.csv")["loss"].tolist() == [1, 2, 3]


def test_not_enough_memory_is_said_before_allocating(capsys):
    with pytest.raises(
        UserError, match=r"not enough memory: 1000000\.0 GB needed, .* GB free on cpu; use less"
    ):
        feature_reducer.check_memory({"parameters": 6e14}, 4e14, torch.device("cpu"), "use less")
    assert "parameters 600000.00, checkpoint copy 400000.00" in capsys.readouterr().out
    # what the run holds already is not needed again
    feature_reducer.check_memory({"parameters": 6e14}, 4e14, torch.device("cpu"), "use less", held=1e15)


def test_bytes_of_a_checkpoint_count_what_it_shares_once():
    weights = torch.zeros(5)
    content = {"a": weights, "b": [weights, {"c": (torch.zeros(3, dtype=torch.float64), "text")}], "d": 1.0}
    assert feature_reducer.held_bytes(content) == 5 * 4 + 3 * 8
    assert feature_reducer.held_bytes(None) == 0


def test_scale_follows_the_device_and_flags_win(capsys):
    small = {"LATENT_DIM": 5, "EPOCHS": 2}
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert feature_reducer.apply_scale("auto", cpu, small, {"EPOCHS": 9}) == {
        "SCALE": "small",
        "LATENT_DIM": 5,
    }
    assert feature_reducer.apply_scale("auto", cuda, small, {}) == {"SCALE": "full"}
    assert feature_reducer.apply_scale("full", cpu, small, {}) == {"SCALE": "full"}
    assert "scale: small because the device is cpu" in capsys.readouterr().out
    with pytest.raises(UserError, match="SCALE = 'tiny'"):
        getData.assign_constants(vars(feature_reducer), {"SCALE": "tiny"})
