"""The window store, the reducer and its checkpoints."""

import copy
import itertools
import math
import os
import pickle
import re
import resource
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import altered, put_back, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers.optimization import Adafactor

import feature_reducer
import getData
from feature_reducer import FeatureReducer, FeatureWindows, ReducerCheckpoint, load_checkpoint
from getData import UsageError, UserError

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


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of files stands for the disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@settings(max_examples=30)
@given(data=st.data())
def test_any_window_of_any_row_is_the_slow_one(windows, data):
    """Of any lengths, for any decisions, each with the coins (two columns each) in another order."""
    bars = data.draw(st.tuples(*(st.integers(1, 12) for _ in BARS)))
    store = FeatureWindows(make_frames(), bars, normalisation=windows.normalisation)
    rows = data.draw(st.lists(st.integers(int(store.valid.argmax()), 1_999), min_size=1, max_size=4))
    orders = [data.draw(st.permutations(range(3))) for _ in rows]
    plain, mixed = store(torch.tensor(rows)), store(torch.tensor(rows), torch.tensor(orders))
    assert plain.shape == (len(rows), sum(bars) * len(COLUMNS)) == (len(rows), store.input_dim)
    for row, order, window, other in zip(rows, orders, plain, mixed, strict=True):
        expected = naive_window(make_frames(), row, windows.normalisation, bars)
        np.testing.assert_array_equal(window, expected)
        np.testing.assert_array_equal(other, expected.reshape(3, -1)[order].ravel())


def naive_window(frames: dict[str, pd.DataFrame], row: int, normalisation: dict, bars: tuple) -> np.ndarray:
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


def test_no_future_value_reaches_a_window():
    frames, train, rows = make_frames(), (400 * 300_000, 900 * 300_000), torch.arange(500, 1_001)
    expected, now = FeatureWindows(frames, BARS, train=train)(rows), frames["5m"].index[1_000]
    cut = {name: frame[:now] for name, frame in frames.items()}
    changed = {name: part.reindex(frames[name].index, fill_value=1e6) for name, part in cut.items()}
    for other in (cut, changed):
        assert torch.equal(FeatureWindows(other, BARS, train=train)(rows), expected)


def test_normalisation_sees_the_training_split_only(windows):
    frames = make_frames()
    times = feature_reducer.close_ms(frames["15m"])
    inside = frames["15m"].to_numpy(np.float64)[(times >= TRAIN[0]) & (times < TRAIN[1])]
    for channel in range(2):  # pooled over the coins
        of_all = np.concatenate([inside[:, column] for column in range(channel, 6, 2)])
        assert windows.normalisation["mean"]["15m"][channel] == pytest.approx(of_all.mean(), rel=1e-6)
        assert windows.normalisation["std"]["15m"][channel] == pytest.approx(of_all.std(), rel=1e-6)
    for frame in frames.values():
        times = feature_reducer.close_ms(frame)
        frame[(times < TRAIN[0]) | (times >= TRAIN[1])] = 99.0
    assert same_tensors(feature_reducer.fit_normalisation(frames, TRAIN), windows.normalisation)


def test_a_constant_channel_becomes_zero_and_extremes_are_clipped():
    frames = make_frames()
    frames["5m"].iloc[30:, ::2] = 7.0
    frames["5m"].iloc[1_400, 3] = 1e9
    windows = FeatureWindows(frames, BARS, train=(600 * 300_000, 1_300 * 300_000))
    window = windows(torch.tensor([1_400])).view(3, -1)[:, windows.slices["5m"]].view(3, BARS[0], 2)
    assert torch.equal(window[..., 0], torch.zeros(3, BARS[0]))
    assert window[1, -1, 1] == 8.0
    assert window[0, -1, 1].abs() < 8.0


def test_incomplete_windows_and_features_that_are_not_finite_are_refused(windows):
    """30 warm-up bars and 3 bars of 1h: complete from the close of hour 33, the 396th 5-minute bar."""
    assert windows.valid.nonzero()[0][0] == 33 * 12 - 1
    assert len(windows.rows(TRAIN)) == 900
    with pytest.raises(UserError, match="too little history: 5 of the 15 decisions of the test split"):
        windows.rows((386 * 300_000, 401 * 300_000), "test")
    with pytest.raises(UserError, match="too little history"):
        FeatureWindows(make_frames(36), (5, 4, 4), train=TRAIN)
    frames = make_frames()
    for value in (math.nan, math.inf, -math.inf):
        frames["15m"].iloc[400, 4] = value  # at the close of the 1,203rd 5-minute bar
        with pytest.raises(UserError, match="800 of the 801 decisions of the training split"):
            FeatureWindows(frames, BARS, train=TRAIN).rows((403 * 300_000, 1_204 * 300_000), "training")


def test_full_scale_widths_and_parameter_counts():
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        dense, tied = (FeatureReducer(134_980, 3_222, 2_148, coins) for coins in (None, 10))
    assert dense.dims(10) == tied.dims(10) == (134_980, 3_222, 2_148)
    layers = [layer for part in (dense.encoder, dense.decoder) for layer in (part[0], part[2])]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [
        (134_980, 3_222), (3_222, 2_148), (2_148, 3_222), (3_222, 134_980),
    ]  # fmt: skip
    by_hand = 2 * (134_980 * 3_222 + 3_222 * 2_148) + 3_222 + 2_148 + 3_222 + 134_980
    assert count(dense) == by_hand == 883_796_404
    layers = [layer for part in (tied.encoder, tied.decoder) for layer in (part[0], part[2])]
    hidden, small = (289, 332), (193, 218)  # 10 x 289 + 332 = 3,222 and 10 x 193 + 218 = 2,148
    assert [(layer.inputs, layer.outputs) for layer in layers] == [
        ((13_498, 0), hidden), (hidden, small), (small, hidden), (hidden, (13_498, 0)),
    ]  # fmt: skip
    by_hand = sum(
        layer.inputs[0] * layer.outputs[0] + (sum(layer.inputs) + 1) * sum(layer.outputs) for layer in layers
    )
    assert count(tied) == by_hand == 25_203_527
    assert sum(count(layer.to_dense(10)) for layer in layers) == 883_796_404


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


def permuted(x: Tensor, order: list[int], width: int) -> Tensor:
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
        assert reducer.dims(coins) == (coins * 20, coins * 9 + 3, coins * coin + market)
        order = list(range(coins))[::-1]
        again = reducer(permuted(x, order, 20))
        torch.testing.assert_close(again[0], permuted(latent, order, coin), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[1], permuted(reconstruction, order, 20), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="10 values .* 12 coins"):
        FeatureReducer(12 * 20, 30, 10, coins=12)


def test_the_tied_pca_is_the_optimum_of_the_symmetric_problem(windows):
    """Its error is what is left of the covariance averaged over all orders of the coins.
    Equivariant maps of (4, 5) latents keep 4 deviation components, twice in this covariance, and 9 of the
    mean: with few windows, so that both see the same ones.
    """
    rows = torch.arange(700, 1_000, 3)
    blocks = windows(rows).double().unflatten(1, (3, -1))
    middle = blocks.mean(1, keepdim=True)
    (mean, basis, _), (_, deviation, _) = feature_reducer.fit_tied_pca(windows, rows, (4, 5))
    third = (blocks - middle)[::3].flatten(0, 1)  # which is what it looks at
    best = np.linalg.svd(third.numpy(), full_matrices=False)[2][:4]
    np.testing.assert_allclose(deviation @ deviation.T, best.T @ best, atol=1e-4)
    _, deviation, _ = feature_reducer.fit_pca((blocks - middle).float().flatten(0, 1), 4)
    mean, basis, deviation = mean.double(), basis.double(), deviation.double()
    common = mean + (middle - mean) @ basis @ basis.T
    linear = common + (blocks - middle) @ deviation @ deviation.T
    error = float((linear - blocks).square().sum() / len(blocks))

    orders = list(itertools.permutations(range(3)))
    everything = torch.cat([blocks[:, order] for order in orders]).flatten(1)  # [6 R, D]
    everything = everything - everything.mean(0)
    values, vectors = np.linalg.eigh((everything.T @ everything / len(everything)).numpy())
    parts = vectors.T.reshape(len(values), 3, -1)
    is_common = np.ptp(parts, axis=1).max(1) < 1e-6  # the same in every coin
    largest = sorted(values[is_common])[::-1][:9], sorted(values[~is_common])[::-1][:8]
    assert error == pytest.approx(values.sum() - sum(map(sum, largest)), rel=1e-4)


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
    (mean, basis, _), (_, deviation, _) = of_mean, of_deviation
    blocks = x.unflatten(1, (3, -1))
    middle = blocks.mean(1, keepdim=True)
    linear = mean + (middle - mean) @ basis @ basis.T + (blocks - middle) @ deviation @ deviation.T
    linear = linear.flatten(1)
    assert (reconstruction - linear).square().mean() < 2e-3 * (x - linear).square().mean()
    assert latent.var(0).mean().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("rows", "values"), [(60, 200), (400, 120)])
def test_pca_is_the_svd_and_the_initialised_reducer(rows, values):
    """Of Gaussian rows whose standard deviations fall from 3."""
    x = torch.randn(rows, values, generator=torch.Generator().manual_seed(0))
    x = x @ torch.diag(torch.linspace(3, 0.1, values)) + 1
    mean, basis, std = feature_reducer.fit_pca(x.clone(), 10)
    left, singular, right = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(std, singular[:10] / np.sqrt(rows - 1), rtol=1e-4)
    np.testing.assert_allclose(basis @ basis.T, right[:10].T @ right[:10], atol=1e-4)
    torch.manual_seed(0)
    reducer = FeatureReducer(values, 18, 10)
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
    metrics = feature_reducer.reconstruction_metrics(lambda x, _: x + 0.05, windows, rows, 2)
    assert metrics["mse"] == pytest.approx(0.0025, rel=1e-4)
    assert metrics["accuracy"] == 1.0
    metrics = feature_reducer.reconstruction_metrics(lambda x, _: 0 * x, windows, rows, 2)
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["accuracy"] == pytest.approx((target.abs() < 0.1).float().mean().item())
    hourly = 2 * BARS[2]  # values, the last ones of each coin

    only_hourly = torch.ones(3, windows.input_dim // 3)
    only_hourly[:, :-hourly] = 0
    metrics = feature_reducer.reconstruction_metrics(lambda x, _: x * only_hourly.flatten(), windows, rows, 3)
    assert metrics["explained_variance_1h"] == 1.0
    assert metrics["explained_variance_5m"] == pytest.approx(0.0, abs=1e-9)
    expected = float(target.view(3, 3, -1)[..., -hourly:].square().sum() / target.square().sum())
    assert metrics["explained_variance"] == pytest.approx(expected, rel=1e-5)


def test_random_rows_are_a_permutation_that_depends_on_the_seed():
    rows = torch.arange(100, 150)
    first, again, other = (feature_reducer.random_rows(rows, 0, seed) for seed in (5, 5, 6))
    assert sorted(first.tolist()) == rows.tolist()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(feature_reducer.random_rows(rows, 7, 5)) == 7
    assert feature_reducer.spread_rows(rows, 3).tolist() == [100, 124, 149]


def test_adafactor_in_blocks_is_that_of_the_library(monkeypatch):
    """Over 50 steps with gradients of all sizes and none, on odd shapes; each goes on from the other."""
    monkeypatch.setattr(feature_reducer, "_CPU_BLOCK", 400)  # several blocks, the last one not full
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 13), (1, 1), (1, 31), (201, 3), (3, 150), (5,), (), (4, 4)]
    expected = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
    nn.init.zeros_(expected[0])
    actual = copy.deepcopy(expected)

    def optimizers() -> tuple[Adafactor, Adafactor]:
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        library = Adafactor(expected.parameters(), lr=1e-2, **fixed)
        return library, feature_reducer.make_adafactor(actual, 1e-2)

    library, blocks = optimizers()
    for step in range(50):
        for position, (first, second) in enumerate(zip(expected, actual, strict=True)):
            size = 0.0 if position == 7 or step % 7 == 3 else 10.0 ** (step % 5 - 3)
            first.grad = size * torch.randn(first.shape, generator=generator)
            second.grad = 4 * first.grad
        library.step()
        blocks.step(factor=0.25 if step % 2 else torch.tensor(0.25))
        if step == 20:
            states = library.state_dict(), blocks.state_dict()
            library, blocks = optimizers()
            library.load_state_dict(copy.deepcopy(states[1]))
            blocks.load_state_dict(copy.deepcopy(states[0]))
    assert actual[0].abs().mean() > 0.01
    for first, second in zip(expected, actual, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
    for first, second in zip(library.state.values(), blocks.state.values(), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"RMS"}:
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-12)


FOOTER = {
    "source": "synthetic:seed=0", "symbols": ["A", "B", "C"], "channels": ["c", "d"], "timeframes": LENGTHS,
    "inputs": {"A": "00"}, "formulas_sha256": "0f", "absent": False, "universe": 0, "member_days": 0,
    "splits": {"train": [*TRAIN], "validation": [48 * 10**7, 51 * 10**7], "test": [54 * 10**7, 57 * 10**7]},
}  # fmt: skip


def test_a_checkpoint_of_another_market_is_refused():
    dense, tied = ({"market": FOOTER, "coins": coins} for coins in (None, 3))
    feature_reducer.check_market(dense, FOOTER)
    later = FOOTER | {"splits": FOOTER["splits"] | {"validation": [TRAIN[1], 0]}, "inputs": {"A": "11"}}
    feature_reducer.check_market(dense, later)  # newer bars of the same source
    real = {"market": FOOTER | {"source": "recorded:x"}, "coins": 3}
    feature_reducer.check_market(real, FOOTER | {"source": "binance", "symbols": ["D"]})
    planted = "planted:strength=1,seed=0 on recorded:x"
    for saved, source in ((dense, "binance"), (tied, "binance"), (real, planted)):
        with pytest.raises(UserError, match=f"{saved['market']['source']}, .* {source}"):
            feature_reducer.check_market(saved, FOOTER | {"source": source})
    earlier = FOOTER | {"splits": FOOTER["splits"] | {"validation": [TRAIN[1] - 1, 0]}}
    for saved in (dense, tied):
        with pytest.raises(UserError, match="train split reaches into the validation split"):
            feature_reducer.check_market(saved, earlier)


@pytest.mark.parametrize(
    ("name", "here", "difference"),
    [
        ("channels", ["c", "e", "f"], r"channels \(d, e, f\):"),
        ("channels", ["d", "c"], r"channels \(their order\):"),
        ("symbols", ["A", "B", "C", "D"], r"symbols \(D\):"),
        ("timeframes", {"5m": 300_000, "1h": 3_600_000}, r"timeframes \(15m\):"),
        ("formulas_sha256", "1e", "other formulas"),
    ],
)
def test_columns_that_differ_are_named(name, here, difference):
    saved = {"market": FOOTER, "coins": None}
    with pytest.raises(UserError, match=difference):
        feature_reducer.check_columns(saved, FOOTER | {name: here})
    feature_reducer.check_columns(saved | {"coins": 3}, FOOTER | {"symbols": ["D"]})


def reducer_content(windows: FeatureWindows) -> dict:
    torch.manual_seed(0)
    reducer = FeatureReducer(windows.input_dim, 9, 6)
    return feature_reducer.reducer_checkpoint(reducer, windows, FOOTER, "small")


def reducer_state(windows: FeatureWindows) -> dict:
    progress = asdict(feature_reducer.Progress(epoch=1, best={"mse": 0.5}, pca={"mse": 0.25}))
    content = reducer_content(windows) | {"kind": "feature_reducer_last", "optimizers": [{}], "scaler": {}}
    return content | {"progress": progress, "fixed": {"SEED": 0}}


def test_a_checkpoint_brings_everything_back(tmp_path, windows):
    torch.manual_seed(0)
    reducer = FeatureReducer(windows.input_dim, 9, 6)
    feature_reducer.save_checkpoint(tmp_path / "r.pt", reducer_content(windows))
    saved = load_checkpoint(tmp_path / "r.pt", ReducerCheckpoint)
    again = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    store = FeatureWindows(make_frames(), saved["window_bars"], normalisation=saved["normalisation"])
    rows = torch.arange(800, 810)
    assert torch.equal(again.encoder(store(rows)), reducer.encoder(windows(rows)))
    assert all(parameter.requires_grad for parameter in again.parameters())
    content = reducer_state(windows)
    torch.save(content, tmp_path / "state.pt")
    saved = load_checkpoint(tmp_path / "state.pt", feature_reducer.ReducerState)
    assert saved["progress"] == feature_reducer.Progress(**content["progress"])
    assert saved.keys() == content.keys()


class Malicious(str):
    def __reduce__(self):
        return Path.touch, (Path(self),)


def test_foreign_checkpoints_are_refused_in_one_line(tmp_path, windows):
    good, content = tmp_path / "good.pt", reducer_content(windows)
    feature_reducer.save_checkpoint(good, content)
    whole = good.read_bytes()
    flipped = bytearray(whole)  # one bit of one weight
    flipped[whole.index(content["reducer"]["encoder.0.weight"].numpy().tobytes()) + 40] ^= 1
    malicious = Malicious(tmp_path / "ran")
    files = {"flipped": flipped, "cut": whole[:2_000], "text": b"hello", "empty": b""}
    for name, data in (files | {"pickle": pickle.dumps(malicious)}).items():
        (tmp_path / f"{name}.pt").write_bytes(data)
    variants = {
        "list": [1, 2],
        "malicious": content | {"x": malicious},
        "old": content | {"schema": 3},
        "state": content | {"kind": "feature_reducer_last"},
    }
    for name, variant in variants.items():
        torch.save(variant, tmp_path / f"{name}.pt")
    for name in ("missing", "pickle", *files, *variants):
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path / f"{name}.pt", ReducerCheckpoint)
        assert "\n" not in str(caught.value)
        assert f"{name}.pt" in str(caught.value)
        assert "python feature_reducer.py" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_form_is_one_line_that_names_the_place(tmp_path, windows):
    """... is a key that is not there."""
    for keys, value in (
        (["market"], None), (["dims"], [72, 9]), (["market", "splits", "train"], []), (["scaler"], ...),
        (["market", "timeframes", "15m"], "900000"), (["reducer", "encoder.0.bias"], [0.0]),
        (["progress", "epoch"], "x"), (["progress", "skipped"], -1), (["progress", "best", "mse"], "0.5"),
    ):  # fmt: skip
        torch.save(altered(reducer_state(windows), keys, value), tmp_path / "c.pt")
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path / "c.pt", feature_reducer.ReducerState)
        assert "\n" not in str(error.value)
        assert f" {'.'.join(keys)} " in str(error.value).replace("`", "")


def test_any_damage_of_a_checkpoint_is_noticed_or_harmless(tmp_path, windows):
    """Whatever bit falls over, in the whole file or in an entry of its table of contents: the same content
    comes back, or one line says that the file is damaged."""
    path, content = tmp_path / "c.pt", reducer_content(windows)
    feature_reducer.save_checkpoint(path, content)
    whole = path.read_bytes()
    entry = 8 * whole.index(b"PK\x01\x02")
    anywhere = np.random.default_rng(0).integers(8 * len(whole), size=300).tolist()
    refused = 0
    for bit in [*anywhere, *range(entry, entry + 8 * 46)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            back = load_checkpoint(path, ReducerCheckpoint)
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(back["reducer"][name], part) for name, part in content["reducer"].items())
            assert all(back[key] == content[key] for key in ("dims", "market", "window_bars"))
    assert refused > 200


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_altered_pickle_with_the_right_checksum_is_one_line(tmp_path, windows):
    path = tmp_path / "c.pt"
    feature_reducer.save_checkpoint(path, reducer_content(windows))
    with zipfile.ZipFile(path) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    (name,) = (name for name in content if name.endswith("data.pkl"))
    rng, refused = np.random.default_rng(0), []
    for _ in range(300):
        pickled = bytearray(content[name])
        pickled[rng.integers(len(pickled))] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as parts:
            for part, data in (content | {name: bytes(pickled)}).items():
                parts.writestr(part, data)
        try:
            load_checkpoint(path, ReducerCheckpoint)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in reason for reason in refused)


def test_a_failed_write_keeps_the_old_file_and_ends_nothing(tmp_path, capsys):
    """What is written now is on disk when the call returns, or is said not to be; a failed file does not keep
    the next one from being written, and is written when there is room again."""
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    saver = feature_reducer.Saver(5.0)

    def write(path: Path, weights: Tensor) -> bool:
        return saver.write(path, {"reducer": {"w": weights}})

    assert write(best, torch.ones(3))
    with full_disk(100_000):
        assert not write(best, torch.ones(100_000))
        assert write(last, torch.ones(1))
    assert list(saver.failures) == [best]
    assert saver.exit_code(130) == 5
    for line in capsys.readouterr().err.strip().splitlines():  # the warning and the error
        assert str(best) in line
    assert torch.equal(torch.load(str(best), weights_only=True)["reducer"]["w"], torch.ones(3))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]
    assert write(best, torch.zeros(3))
    assert not torch.load(str(best), weights_only=True)["reducer"]["w"].any()
    assert saver.exit_code(130) == 130


def test_a_run_goes_on_with_the_state_that_it_saved(tmp_path, windows, monkeypatch):
    """And knows what could not be written; its state is due when so many minutes have passed since then."""
    clock = [0.0]
    monkeypatch.setattr(feature_reducer.time, "monotonic", lambda: clock[0])

    def run(reducer: FeatureReducer) -> feature_reducer.Run:
        return feature_reducer.Run(
            last=tmp_path / "last.pt", progress=feature_reducer.Progress(), fixed={"SEED": 0},
            optimizers=[feature_reducer.make_adafactor(reducer, 0.01)], scaler=torch.amp.GradScaler("cpu"),
            stop=None, saver=feature_reducer.Saver(5.0, tmp_path / "links"),
        )  # fmt: skip

    def step(reducer: FeatureReducer, run: feature_reducer.Run) -> None:
        loss = reducer(windows(torch.arange(800, 810)))[1].square().mean()
        feature_reducer.clipped_step(loss, [reducer], run.optimizers, run.scaler, 1.0)

    (tmp_path / "links").mkdir()
    reducer = FeatureReducer(windows.input_dim, 9, 6)
    first = run(reducer)
    step(reducer, first)
    content = feature_reducer.reducer_checkpoint(reducer, windows, FOOTER, "small")
    (tmp_path / "best.pt").mkdir()
    assert not first.save_best(tmp_path / "best.pt", content)
    clock[0] = 299.0
    assert not first.saver.due()
    clock[0] = 300.0
    assert first.saver.due()
    first.save_last(content)
    assert not first.saver.due()
    assert os.readlink(tmp_path / "links" / "last.pt") == "../last.pt"
    saved = load_checkpoint(tmp_path / "last.pt", feature_reducer.ReducerState)
    assert saved["progress"] == feature_reducer.Progress(best_failed=True)
    other = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    again = run(other)
    again.go_on(saved)
    for each, goes_on in ((reducer, first), (other, again)):
        step(each, goes_on)
    assert all(map(torch.equal, reducer.parameters(), other.parameters()))
    assert again.scaler.state_dict() == first.scaler.state_dict()


def test_a_step_with_a_gradient_that_is_not_finite_moves_nothing():
    """Also without a loss scale, and in both modules where one is bad."""
    good, bad = nn.Linear(2, 1), nn.Linear(2, 1)
    before = [parameter.clone() for parameter in [*good.parameters(), *bad.parameters()]]
    optimizers = [torch.optim.Adam(module.parameters()) for module in (good, bad)]
    loss = good(torch.ones(2)).sum() + bad(torch.tensor([1.0, math.inf])).sum()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms, skipped, _ = feature_reducer.clipped_step(loss, [good, bad], optimizers, scaler, 1.0)
    assert skipped
    assert [math.isfinite(norm) for norm in norms] == [True, False]
    assert all(map(torch.equal, before, [*good.parameters(), *bad.parameters()]))
    modules = {"good": good, "bad": bad}
    progress = feature_reducer.TrainingProgress()
    feature_reducer.count_skipped(progress, 5, 8, modules, "here")
    assert (progress.skipped, progress.skipped_in_a_row) == (5, 0)  # three were taken
    feature_reducer.count_skipped(progress, 39, 39, modules, "here")
    feature_reducer.count_skipped(progress, 1, 1, modules, "here")
    assert (progress.skipped, progress.skipped_in_a_row) == (45, 40)
    with pytest.raises(UserError, match=r"41 steps .* in step 41: the gradient of bad\.weight"):
        feature_reducer.count_skipped(progress, 1, 1, modules, "in step 41")
    with torch.no_grad():
        good.bias[0] = math.nan
    assert feature_reducer.first_bad_tensor(modules) == "good.bias is not finite"


def test_a_resumed_log_has_no_duplicate_and_no_missing_row(tmp_path):
    log = feature_reducer.RunLog(tmp_path)
    for step in (1, 2, 3):
        log.add(step, {"loss": step / 10, "validation": None})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0.")  # of a process that was killed
    log = feature_reducer.RunLog(tmp_path, steps_done=2)
    for step in (3, 4):
        log.add(step, {"loss": step / 10, "validation": 1.0})
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table[["step", "loss"]].to_numpy().tolist() == [[step, step / 10] for step in range(1, 5)]
    assert table["validation"].isna().tolist() == [True, True, False, False]
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in curves.Scalars("loss")] == [1, 2, 3, 4]
    feature_reducer.RunLog(tmp_path)  # a new run
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


def test_log_rows_wait_while_the_disk_is_full(tmp_path, capsys):
    """What did not fit is whole once there is room again; the curves go on then."""
    log, rows = feature_reducer.RunLog(tmp_path), {}
    for step in range(1, 9):
        with full_disk(40 if 3 <= step < 7 else resource.RLIM_INFINITY):
            log.add(step, {"loss": step / 8})
        rows[step] = (tmp_path / "metrics.csv").read_text().count("\n")
    assert rows[2] == 3  # with the header
    assert rows[4] == rows[6] < 6  # rows that came before the limit, none of them half
    table = pd.read_csv(tmp_path / "metrics.csv")[["step", "loss"]]
    assert table.to_numpy().tolist() == [[step, step / 8] for step in range(1, 9)]
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in curves.Scalars("loss")] == [1, 2, 7, 8]
    warnings = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings)
    assert any("metrics.csv" in line for line in warnings)
    assert sum("TensorBoard" in line for line in warnings) == 4


def test_room_is_checked_before_the_run(tmp_path, capsys):
    """What lies there is replaced; the temporary copy of the largest file needs its room too."""
    device, room = torch.device("cpu"), shutil.disk_usage(tmp_path).free

    def check(needs: float = 0.0, used: float = 0.0, **files: float) -> None:
        files = {f"{name}.pt": part * room for name, part in files.items()}
        needs = {"parameters": needs, "activations": 2e6, "gradients": 0.0}
        feature_reducer.check_room(needs, used, device, "use less", tmp_path, files)

    with pytest.raises(UserError, match=r"memory: 600000\.0 GB needed, .* free on cpu; use less"):
        check(6e14, a=0.1)
    assert "parameters 600000.00, activations 0.00; together 600000.00 GB" in capsys.readouterr().out
    check(5e6, a=0.1)
    assert "memory: parameters 5.00, activations 2.00; together 7.00 MB of " in capsys.readouterr().out
    check(6e14, used=1e15, a=0.1)  # what the run holds already is not needed again
    check(a=0.3, b=0.1)
    with pytest.raises(UserError, match=r"disk: a\.pt, b\.pt need .* GB more in .* GB are free"):
        check(a=0.6, b=0.1)
    with (tmp_path / "a.pt").open("wb") as file:
        file.truncate(int(0.6 * room))  # a hole: it takes no room, but replacing it frees what it says
    check(a=0.6, b=0.1)


def settled(flags: dict, before: dict | None = None, device: str = "cpu", **edited: object) -> dict:
    """The constants of a training with these flags, after edits of the script and of the run `before`."""
    with put_back(feature_reducer):
        getData.assign_constants(vars(feature_reducer), edited | flags)
        feature_reducer.settle_constants(vars(feature_reducer), flags, torch.device(device), before or {})
        names = "SCALE", "AMP", "EPOCHS", "LATENT_DIM", "SEED"
        return {name: getattr(feature_reducer, name) for name in names}


def test_each_scale_has_its_values_and_edits_and_flags_act_at_both(capsys):
    small = {"SCALE": "small", "AMP": "off", "EPOCHS": 2, "LATENT_DIM": 304, "SEED": 0}
    full = {"SCALE": "full", "AMP": "on", "EPOCHS": 10, "LATENT_DIM": 2_148, "SEED": 0}
    assert settled({}) == small
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search("small because the device is cpu .* WINDOW_BARS=24,12,10,6,4 .*LATENT_DIM=304", line)
    assert settled({}, EPOCHS=3) == small | {"EPOCHS": 3}
    assert "EPOCHS" not in capsys.readouterr().out  # the edited value acts: nothing is replaced
    assert settled({"EPOCHS": 9}) == small | {"EPOCHS": 9}
    assert settled({}, device="cuda") == full
    assert settled({"SCALE": "full"}, LATENT_DIM=99) == full | {"AMP": "off", "LATENT_DIM": 99}
    assert capsys.readouterr().out.endswith("=== scale: full ===\n")


def test_a_resumed_run_keeps_its_constants_and_says_so(capsys):
    """What is free follows the script; a flag may only say what the run has."""
    before = {"SCALE": "full", "AMP": "on", "LATENT_DIM": 50, "SEED": 0}
    expected = before | {"EPOCHS": 10}
    assert settled({}, before, LATENT_DIM=60) == expected
    scale, stays = capsys.readouterr().out.splitlines()
    assert "=== scale: full ===" in scale
    assert stays.endswith(": SCALE=full LATENT_DIM=50 AMP=on")
    assert settled({"LATENT_DIM": 50, "EPOCHS": 7}, before | {"AMP": "off"}, SCALE="full")["EPOCHS"] == 7
    assert len(capsys.readouterr().out.splitlines()) == 1
    for flags in ({"LATENT_DIM": 60}, {"SCALE": "small"}, {"SEED": 1}):
        with pytest.raises(UserError, match=f"has {min(flags)}={before[min(flags)]}: "):
            settled(flags, before)
