"""Learn to compress one decision's window of indicators, 134,980 values, into 2,148 and back.

reads   data/features/{5m,15m,1h,4h,1d}.parquet        (getData.py; without data: a synthetic market)
writes  data/checkpoints/feature_reducer.pt            (best on the validation split; train.py starts from it)
        data/checkpoints/feature_reducer_last.pt       (everything that --resume needs)
        data/runs/feature_reducer/                     (metrics.csv, TensorBoard)
        data/latents.parquet                           (with --job compress: every window's latent vector)

    python feature_reducer.py                  train (scale "full" on a CUDA GPU, "small" otherwise)
    python feature_reducer.py --resume         go on where the last run stopped
    python feature_reducer.py --job compress   write data/latents.parquet from the trained reducer

Sections: windows and model; evaluation; checkpoints, start and stop, optimizer step of both trainings
(train.py imports them); this script's own steps.

Letters in shape comments: T bars, N coins, K channels, P window values of one coin, D = N x P window values,
B windows, H hidden, L latent.

Exit codes: 0 done; 1 a mistake, in one line; 2 wrong flag or constant; 3 another training is at work in the
folder; 5 a checkpoint could not be written; 130, 143 and 129 stopped by Ctrl-C, SIGTERM or a closed terminal,
and saved (a second one ends at once).
"""

import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import stat
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Literal, NotRequired, TypeVar, get_args

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from filelock import FileLock
from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    TypeAdapter,
    ValidationError,
    with_config,
)
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict

import getData
from getData import Count, NonNegative, Positive, Seed, UsageError, UserError, Whole

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: full-scale CPU updates are a fifth faster

# What the brackets mean stands in getData.py
# Job and files [all; free]
JOB: Literal["train", "compress"] = "train"  # compress: write data/latents.parquet from the trained reducer
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
DEVICE: str = "auto"  # auto | cpu | cuda | cuda:1 ...

# Going on [train; free]
RESUME: bool = False  # go on from feature_reducer_last.pt
EPOCHS: Whole = 10

# Compressing [compress; free]
CHECKPOINT: str = "feature_reducer.pt"  # what to compress with: also train.py's best.pt ..., or a path

# Model [train]
SCALE: Literal["auto", "full", "small"] = "auto"  # auto: full where there is a CUDA GPU
WINDOW_BARS: tuple[Count, ...] = (192, 96, 72, 30, 7)  # completed bars of 5m, 15m, 1h, 4h, 1d in one window
HIDDEN_DIM: Count = 3_222
LATENT_DIM: Count = 2_148
TIE_COINS: bool = True  # one set of weights for all coins; False: dense, weights of its own for each
INIT: Literal["pca", "random"] = "pca"  # pca: start as the best linear reducer

# Optimisation [train]
WINDOWS_PER_EPOCH: Whole = 16_384  # drawn anew each epoch, since neighbours are nearly the same; 0: all
LEARNING_RATE: Positive = 0.00005  # Adafactor
MAX_NORM: Positive = 1.0  # gradient clipping
PCA_WINDOWS: Count = 4_096  # training windows that the PCA yardstick (and INIT = "pca") is fitted on
VALIDATION_WINDOWS: Count = 4_096  # evenly spread over the validation split
SAVE_MINUTES: NonNegative = 5.0  # between writes of feature_reducer_last.pt; it is written at a stop, too

SEED: Seed = getData.SEED  # set in getData.py

# System [all]
BATCH_SIZE: Count = 256  # windows
AMP: Literal["auto", "on", "off"] = "auto"  # float16 mixed precision; auto: on with CUDA

# What SCALE = "small" uses in place of the constants above (a flag still wins)
SMALL = {
    "WINDOW_BARS": (24, 12, 10, 6, 4),
    "HIDDEN_DIM": 456,
    "LATENT_DIM": 304,
    "EPOCHS": 2,
    "LEARNING_RATE": 0.000005,  # after the PCA, larger steps only fit the training windows better
}

# No settings, and so no flags
_SCHEMA = 3  # of the checkpoints
_DAMAGED = (  # what zipfile, pickle and torch raise on altered bytes
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, RuntimeError,
    TypeError, UnpicklingError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_MAX_SKIPPED = 40  # steps in a row; from 65,536 the loss scale falls to 1 in 16
_NOT_WRITTEN = 5  # exit code: a checkpoint could not be written
_ACCURACY_TOLERANCE = 0.1  # standard deviations: closer than this counts as reconstructed
_NORMALISED_CLIP = 8.0  # standard deviations


# ------------------------------------------------------------------------------------------ windows and model


# ------------------------------------------------------------------------------------------ windows and model


class FeatureWindows:
    """Keeps the compact feature arrays on the device and gathers any window from them on demand.

    A window is the last `bars[k]` completed bars of each timeframe k at the close of a 5-minute bar, coin by
    coin: [N, P] with P = sum of bars[k] x channels, in the order timeframe, bar, channel. A coin's bars are
    adjacent in memory, so each of its timeframes is one row of an overlapping view of the array: gathering B
    windows reads and writes each value once, and nothing of size [T, D] ever exists.

    Args:
        frames: timeframe -> features [T_k, N x K], columns `SYMBOL.channel`, index = bar close time; the
            first one is the decision grid.
        bars: completed bars per timeframe.
        device: where the arrays live.
        normalisation: mean and std of each channel, {timeframe: [K]} each; None fits them on `train`.
        train: (first, last exclusive) decision time of the training split in ms; without `normalisation`.

    Raises:
        UserError: a timeframe has fewer bars than one window.
    """

    def __init__(
        self,
        frames: dict[str, pd.DataFrame],
        bars: Sequence[int],
        device: torch.device | str = "cpu",
        normalisation: dict[str, dict[str, Tensor]] | None = None,
        train: tuple[int, int] | None = None,
    ) -> None:
        if len(bars) != len(frames):
            raise UserError(f"WINDOW_BARS has {len(bars)} numbers, the features {len(frames)} timeframes")
        self.bars = dict(zip(frames, bars, strict=True))
        self.times = close_ms(next(iter(frames.values())))  # [T]
        self.coins = count_coins(next(iter(frames.values())))
        self.slices: dict[str, slice] = {}  # of a coin's P values
        self.views: dict[str, Tensor] = {}
        self.starts: dict[str, Tensor] = {}
        warm_up = check_features(frames)
        self.normalisation = normalisation or fit_normalisation(frames, train)
        valid = np.ones(len(self.times), dtype=bool)
        offset = 0
        for timeframe, frame in frames.items():
            count, channels = self.bars[timeframe], frame.shape[1] // self.coins
            moments = [self.normalisation[kind].get(timeframe, torch.empty(0)) for kind in ("mean", "std")]
            if [part.shape for part in moments] != [(channels,)] * 2:
                raise UserError(
                    f"the checkpoint's normalisation does not fit {channels} channels of {timeframe}"
                )
            if len(frame) < count:
                raise UserError(
                    f"too little history: a window needs {count} bars of {timeframe}, the features have "
                    f"{len(frame)}; collect more days with getData.py"
                )
            values = torch.from_numpy(np.array(frame, dtype=np.float32, order="C"))
            values = values.view(len(frame), self.coins, channels).transpose(0, 1).contiguous()  # [N, T_k, K]
            values.sub_(moments[0]).div_(moments[1]).clamp_(-_NORMALISED_CLIP, _NORMALISED_CLIP)
            last = np.searchsorted(close_ms(frame), self.times, side="right") - 1  # completed bar [T]
            start = last - count + 1
            valid &= start >= warm_up[timeframe]
            shape = (self.coins * len(frame) - count + 1, count * channels)  # row: coin x T_k + first bar
            self.views[timeframe] = values.to(device).as_strided(shape, (channels, 1))
            self.starts[timeframe] = torch.from_numpy(start.clip(0)).to(device)
            self.slices[timeframe] = slice(offset, offset + count * channels)
            offset += count * channels
        self.lengths = {timeframe: len(frame) for timeframe, frame in frames.items()}
        self.input_dim = self.coins * offset
        self.valid = valid  # [T] decisions whose window is complete
        self.device = torch.device(device)

    def __call__(self, rows: Tensor, order: Tensor | None = None) -> Tensor:
        """Gather the normalised windows [B, D] of decisions `rows` [B] (of the 5-minute grid, on the device).

        With `order` [B, N] the values of coin order[b, i] stand where those of coin i belong.
        """
        if order is None:
            order = torch.arange(self.coins, device=self.device)
        out = torch.empty(len(rows) * self.coins, self.input_dim // self.coins, device=self.device)
        for timeframe, view in self.views.items():
            first = self.starts[timeframe][rows].unsqueeze(1) + self.lengths[timeframe] * order  # [B, N]
            torch.index_select(view, 0, first.flatten(), out=out[:, self.slices[timeframe]])
        return out.view(len(rows), self.input_dim)

    def rows(self, split: Sequence[int], name: str = "this") -> Tensor:
        """Return the rows [R] of a split (first ms, last ms exclusive); all have complete windows."""
        inside = (self.times >= split[0]) & (self.times < split[1])
        if not inside.any() or not self.valid[inside].all():
            found = int((inside & self.valid).sum())
            raise UserError(
                f"too little history: {found} of the {int(inside.sum())} decisions of the {name} split have "
                f"a complete window of {list(self.bars.values())} bars; collect more days with getData.py or "
                "shorten WINDOW_BARS"
            )
        return torch.from_numpy(inside.nonzero()[0]).to(self.device)


def close_ms(frame: pd.DataFrame) -> np.ndarray:
    """Return the close times [T] of a frame's bars in ms since 1970, UTC."""
    return frame.index.as_unit("ms").asi8


def count_coins(frame: pd.DataFrame) -> int:
    """Return the number of coins in columns `SYMBOL.channel`."""
    return len({column.rpartition(".")[0] for column in frame.columns})


def check_features(frames: dict[str, pd.DataFrame]) -> dict[str, int]:
    """Return the number of rows before the first one without gaps, per timeframe: the coins' warm-up.

    Raises:
        UserError: a later value is missing or infinite, with its column and time.
    """
    warm_up = {}
    for timeframe, frame in frames.items():
        finite = np.isfinite(frame.to_numpy())
        whole = finite.all(1)
        warm_up[timeframe] = first = int(whole.argmax()) if whole.any() else len(frame)
        if not whole[first:].all():
            row = first + int(whole[first:].argmin())
            column = int(finite[row].argmin())
            raise UserError(
                f"{frame.columns[column]} of {timeframe} is {frame.iloc[row, column]} at {frame.index[row]}: "
                "run python getData.py --job features"
            )
    return warm_up


def fit_normalisation(
    frames: dict[str, pd.DataFrame], train: tuple[int, int]
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Return mean and standard deviation [K] of each channel over the training split (ms) and all coins."""
    mean, std = {}, {}
    for timeframe, frame in frames.items():
        times = close_ms(frame)
        values = frame.to_numpy(dtype=np.float64)[(times >= train[0]) & (times < train[1])]
        if len(values) < 2 or not np.isfinite(values).all():
            found = f"{len(values)} bars of {timeframe}"
            raise UserError(f"too little history: {found} in the training split; collect more days")
        values = values.reshape(len(values), count_coins(frame), -1)  # [R, N, K]
        mean[timeframe] = torch.from_numpy(values.mean((0, 1))).float()
        # a constant channel carries no information: leave it at 0 rather than divide by almost nothing
        spread = values.std((0, 1))
        std[timeframe] = torch.from_numpy(np.where(spread > 1e-8, spread, 1.0)).float()
    return {"mean": mean, "std": std}


def blocks_of(width: int, coins: int) -> tuple[int, int]:
    """Return the widths of each coin's block and of the market's, `width` in all.

    A tenth is the market's, the rest goes to the coins in equal parts, and what these leave to the market.

    Raises:
        UsageError: `width` is too small for so many coins.
    """
    coin = 9 * width // (10 * coins)
    if not coin:
        raise UsageError(f"a layer of {width} values is too narrow for {coins} coins with TIE_COINS")
    return coin, width - coins * coin


def width_of(blocks: tuple[int, int], coins: int) -> int:
    """Return the width in all of blocks (coin, market) with so many coins; the inverse of `blocks_of`."""
    coin, market = blocks
    return coins * coin + market


class EquivariantLinear(nn.Module):
    """A linear layer that treats all coins alike, however many there are.

    It maps [coin block x N | market block] to such blocks: out_i = A x_i + B mean(x) + C m for each coin and
    D mean(x) + E m for the market, with a bias each. These are all the linear maps that commute with every
    permutation of the coins (Zaheer et al. 2017, Deep Sets; Maron et al. 2019, arXiv:1812.09902). It is a
    dense layer whose blocks are tied: see `to_dense`.

    Args:
        inputs, outputs: widths of one coin's block and of the market's, which may be 0.
    """

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, int]) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.own = nn.Linear(inputs[0], outputs[0], bias=False)  # A
        self.shared = nn.Linear(sum(inputs), sum(outputs))  # [[B, C], [D, E]]
        with torch.no_grad():  # a coin's output is the sum of two
            self.own.weight /= math.sqrt(2)
            self.shared.weight[: outputs[0]] /= math.sqrt(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N x coin | market] of x [..., N x coin | market]."""
        own = x.shape[-1] - self.inputs[1]
        coins = x[..., :own].unflatten(-1, (-1, self.inputs[0]))  # [..., N, coin]
        shared = self.shared(torch.cat([coins.mean(-2), x[..., own:]], -1))
        to_coins, market = shared.split(self.outputs, -1)
        out = self.own(coins).add_(to_coins.unsqueeze(-2)).flatten(-2)
        return torch.cat([out, market], -1) if self.outputs[1] else out  # no copy of a whole window

    @torch.no_grad()
    def to_dense(self, coins: int) -> nn.Linear:
        """Return the same function of so many coins as a dense layer."""
        (coin_in, _), (coin_out, _) = self.inputs, self.outputs
        weight, bias = self.shared.weight, self.shared.bias
        widths = (width_of(blocks, coins) for blocks in (self.inputs, self.outputs))
        dense = nn.utils.skip_init(nn.Linear, *widths, device=weight.device)
        own = dense.weight[: coins * coin_out, : coins * coin_in]
        own = own.unflatten(0, (coins, coin_out)).unflatten(2, (coins, coin_in))  # a view [N, out, N, in]
        own.copy_((weight[:coin_out, :coin_in] / coins).unsqueeze(1))
        for coin in range(coins):
            own[coin, :, coin] += self.own.weight
        dense.weight[: coins * coin_out, coins * coin_in :] = weight[:coin_out, coin_in:].repeat(coins, 1)
        dense.weight[coins * coin_out :, : coins * coin_in] = (
            weight[coin_out:, :coin_in].repeat(1, coins) / coins
        )
        dense.weight[coins * coin_out :, coins * coin_in :] = weight[coin_out:, coin_in:]
        dense.bias.copy_(torch.cat([bias[:coin_out].repeat(coins), bias[coin_out:]]))
        return dense


class FeatureReducer(nn.Module):
    """Autoencoder D -> H -> L -> H -> D with GELU; 134,980 -> 3,222 -> 2,148 has 883.8 M parameters.

    With `coins` the weights are tied between the coins (25.2 M at full size): the widths are those in all at
    so many coins, and the same weights take windows of any other number of coins. No dropout and no batch
    statistics: rollout and update must see the same latent for the same window.
    """

    def __init__(self, input_dim: int, hidden_dim: int, latent_dim: int, coins: int | None = None) -> None:
        super().__init__()
        self.input_dim, self.hidden_dim, self.latent_dim = input_dim, hidden_dim, latent_dim
        self.coins = coins
        if coins:
            window, hidden, latent = (
                (input_dim // coins, 0), blocks_of(hidden_dim, coins), blocks_of(latent_dim, coins)
            )  # fmt: skip
            layer = EquivariantLinear
        else:
            window, hidden, latent, layer = input_dim, hidden_dim, latent_dim, nn.Linear
        self.encoder = nn.Sequential(layer(window, hidden), nn.GELU(), layer(hidden, latent))
        self.decoder = nn.Sequential(layer(latent, hidden), nn.GELU(), layer(hidden, window))

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return latent [B, L] and reconstruction [B, D] of windows [B, D]."""
        latent = self.encoder(windows)
        return latent, self.decoder(latent)


def fit_pca(windows: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit an exact PCA to N windows [N, D] through their Gram matrix (N is far smaller than D).

    `windows` is centred in place.

    Returns:
        mean [D], components [D, K] with orthonormal columns, and the standard deviation [K] of each score.
    """
    assert components < len(windows), "PCA needs more windows than components"
    mean = windows.mean(0)
    windows -= mean
    eigenvalues, vectors = torch.linalg.eigh((windows @ windows.T).double())  # ascending [N], [N, N]
    eigenvalues = eigenvalues[-components:].flip(0).clamp(min=1e-6)
    vectors = vectors[:, -components:].flip(1)
    basis = windows.T @ (vectors / eigenvalues.sqrt()).float()  # [D, K]
    return mean, basis, (eigenvalues / (len(windows) - 1)).sqrt().float()


@torch.no_grad()
def initialise_from_pca(reducer: FeatureReducer, mean: Tensor, basis: Tensor, std: Tensor) -> None:
    """Make the reducer compute the PCA [D, K = L], up to GELU(4 + s) - (4 + s): under 1e-3 for |s| < 0.5.

    Hidden unit k carries 4 + score_k / (2 std_k), where GELU is almost the identity; the next bias subtracts
    the 4 again. The latents are the scores at their own relative scale (not whitened, so that noise
    components stay small), divided by one number so that their average variance is 1. Hidden units beyond K
    keep their random input weights, and their outputs start with weight 0.
    """
    first, _, second = reducer.encoder
    third, _, fourth = reducer.decoder
    count = basis.shape[1]
    assert count == reducer.latent_dim <= reducer.hidden_dim
    loudness = std.square().mean().sqrt()
    shift, width = 4.0, 2.0 * std
    first.weight[:count] = (basis / width).T
    first.bias[:count] = shift - (mean @ basis) / width
    second.weight.zero_()
    second.weight[:, :count] = torch.diag(width / loudness)
    second.bias.copy_(-shift * width / loudness)
    third.weight[:count] = torch.diag(loudness / width)
    third.bias[:count] = shift
    fourth.weight[:, count:] = 0.0
    fourth.weight[:, :count] = basis * width
    fourth.bias.copy_(mean - shift * (basis * width).sum(1))


def fit_tied_pca(
    windows: FeatureWindows, rows: Tensor, components: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Fit the PCA of a tied reducer to the windows of `rows` [R]: the best equivariant linear autoencoder.

    A linear map that treats all coins alike acts on their mean and on each coin's deviation from it apart.
    Latents of (coin, market) = `components` values keep coin + market components of the mean, since the coin
    blocks have a mean too, and the same `coin` components of every deviation.

    Returns:
        `fit_pca` of the coins' mean, and of the deviations (of every N-th window: each has N of them).
    """
    coin, market = components

    def blocks(part: Tensor) -> Tensor:
        return windows(part).unflatten(1, (windows.coins, -1))  # [B, N, P]

    means = torch.cat([blocks(part).mean(1) for part in rows.split(256)])  # [R, P]
    some = blocks(rows[:: windows.coins])
    some -= some.mean(1, keepdim=True)
    return fit_pca(means, coin + market), fit_pca(some.flatten(0, 1), coin)


def check_blocks(reducer: FeatureReducer) -> None:
    """Raise UsageError where a tied reducer's hidden layer cannot carry the PCA of its latent."""
    (hidden, hidden_market), (coin, market) = (reducer.encoder[layer].outputs for layer in (0, 2))
    if coin > hidden or market > hidden_market:
        raise UsageError(
            f"INIT = 'pca' needs blocks of HIDDEN_DIM (coin {hidden}, market {hidden_market}) of at least "
            f"those of LATENT_DIM ({coin}, {market}): raise HIDDEN_DIM, or use --init random"
        )


@torch.no_grad()
def initialise_from_tied_pca(
    reducer: FeatureReducer,
    of_mean: tuple[Tensor, Tensor, Tensor],
    of_deviation: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Make a tied reducer compute the PCA of `fit_tied_pca`, in the way of `initialise_from_pca`.

    A coin's hidden unit k carries 4 + deviation score_k / width_k + mean score_k / (another width_k), where
    GELU is almost the identity; the average over the coins tells the two apart.
    """
    first, _, second = reducer.encoder
    third, _, fourth = reducer.decoder
    (coin, market), (hidden, _) = second.outputs, first.outputs
    mean, basis, std = of_mean
    _, deviation, deviation_std = of_deviation
    silent = deviation_std < 1e-3 * std[0]  # one coin, or coins that are all alike: there are no deviations
    deviation, deviation_std = deviation.masked_fill(silent, 0.0), deviation_std.masked_fill(silent, 1.0)
    common, own = basis[:, :coin], basis[:, coin:]  # of the mean: in the coins' blocks, and in the market's
    variance = reducer.coins * (deviation_std.square().sum() + std[:coin].square().sum())
    loudness = ((variance + std[coin:].square().sum()) / reducer.latent_dim).sqrt()
    shift = 4.0
    wide, wide_common = 8**0.5 * deviation_std, 8**0.5 * std[:coin]  # 8: each coin's unit is the sum of two
    wide_own = 2.0 * std[coin:]
    units, market_units = slice(coin), slice(hidden, hidden + market)

    def set_own(layer: EquivariantLinear, rows: slice, columns: slice, own: Tensor, total: Tensor) -> None:
        layer.own.weight[rows, columns] = own
        layer.shared.weight[rows, columns] = total - own

    set_own(first, units, slice(None), (deviation / wide).T, (common / wide_common).T)
    first.shared.bias[units] = shift - (mean @ common) / wide_common
    first.shared.weight[market_units] = (own / wide_own).T
    first.shared.bias[market_units] = shift - (mean @ own) / wide_own
    for layer in (second, fourth):
        layer.own.weight.zero_()
        layer.shared.weight.zero_()
    gains = wide / loudness, wide_common / loudness, wide_own / loudness
    set_own(second, units, units, gains[0].diag(), gains[1].diag())
    second.shared.weight[coin:, market_units] = gains[2].diag()
    second.shared.bias.copy_(-shift * torch.cat(gains[1:]))
    third.shared.weight[units] = 0.0
    third.shared.weight[market_units] = 0.0
    set_own(third, units, units, (1 / gains[0]).diag(), (1 / gains[1]).diag())
    third.shared.weight[market_units, coin:] = (1 / gains[2]).diag()
    third.shared.bias[units] = third.shared.bias[market_units] = shift
    set_own(fourth, slice(None), units, deviation * wide, common * wide_common)
    fourth.shared.weight[:, market_units] = own * wide_own
    fourth.shared.bias.copy_(mean - shift * ((common * wide_common).sum(1) + (own * wide_own).sum(1)))


# ------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def within_tolerance(difference: Tensor) -> Tensor:
    """Return the reconstruction accuracy: the share of errors below a tenth of a standard deviation."""
    return (difference.abs() < _ACCURACY_TOLERANCE).float().mean()


@torch.no_grad()
def reconstruction_metrics(
    reconstruct: Callable[[Tensor], Tensor], windows: FeatureWindows, rows: Tensor, batch_size: int
) -> dict[str, float]:
    """Measure how well `reconstruct` ([B, D] -> [B, D]) returns the windows of `rows` [R].

    mse: mean squared error of the normalised values. explained_variance: 1 - mse / mean square, relative to
    predicting the training mean, overall and per timeframe. accuracy: share of values within 0.1 standard
    deviation.
    """
    error = torch.zeros(len(windows.slices), dtype=torch.float64)
    total, close = torch.zeros_like(error), torch.zeros(1, dtype=torch.float64)
    for chunk in rows.split(batch_size):
        target = windows(chunk)  # [B, D]
        difference = reconstruct(target).float() - target
        close += float(within_tolerance(difference)) * difference.numel()
        blocks = [part.unflatten(1, (windows.coins, -1)) for part in (difference, target)]  # [B, N, P]
        for k, part in enumerate(windows.slices.values()):
            for sums, values in zip((error, total), blocks, strict=True):
                sums[k] += float(values[..., part].square().sum(dtype=torch.float64))
    values = len(rows) * windows.input_dim
    per_timeframe = {
        f"explained_variance_{name}": 1 - float(error[k] / total[k]) for k, name in enumerate(windows.bars)
    }
    return {
        "mse": float(error.sum()) / values,
        "explained_variance": 1 - float(error.sum() / total.sum()),
        "accuracy": float(close) / values,
        **per_timeframe,
    }


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """Return at most `count` rows, evenly spread over `rows` [R]."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]


def random_rows(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` different rows of `rows` [R] in random order; the same for a seed on any device."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[: count or len(rows)].to(rows.device)]


# ----------------------------------------------------------------------------- checkpoints, of both trainings


Weights = dict[str, Tensor]
Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class Splits(TypedDict):
    """First decision time and the one after the last of each split, in ms."""

    train: Span
    validation: Span
    test: Span


class Market(TypedDict):
    """What a checkpoint was trained on, as the footers of the features say it."""

    source: str
    symbols: list[str]
    channels: list[str]
    timeframes: dict[str, int]  # ms
    inputs: dict[str, str]  # SHA-256 of each coin's bars
    splits: Splits


class Normalisation(TypedDict):
    """Mean and standard deviation [C] of each timeframe's columns."""

    mean: dict[str, Tensor]
    std: dict[str, Tensor]


@with_config(ConfigDict(strict=True, arbitrary_types_allowed=True))
class EncoderCheckpoint(TypedDict):
    """What every checkpoint holds: all that it takes to encode windows elsewhere."""

    schema: int
    scale: str
    dims: Annotated[list[Count], Field(min_length=3, max_length=3)]  # D, H, L
    coins: Count | None  # between which the weights are tied, at these dims; None: dense
    window_bars: list[Count]
    normalisation: Normalisation
    market: Market
    reducer: Weights


class ReducerCheckpoint(EncoderCheckpoint):
    """feature_reducer.pt."""

    kind: Literal["feature_reducer"]
    metrics: NotRequired[dict[str, float]]  # on the validation split


class JointEncoder(EncoderCheckpoint):
    """What feature_reducer.py reads of train.py's pretrained.pt, best.pt and final.pt."""

    kind: Literal["train"]
    run: str
    others: NotRequired[list[object]]  # of an ensemble


@dataclass(kw_only=True)
class StepCounts:
    """Optimizer steps that a training skipped because of gradients that were not finite."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    skipped: Whole = 0
    skipped_in_a_row: Whole = 0


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a .pt so that `path` is at every moment either the old file or the whole new one.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        with getData.replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path} ({reason}); free some space there") from None


def link_newest(link: Path, target: Path) -> None:
    """Let the name `link` stand for `target` from one moment to the next (a copy where links are not known).

    Raises:
        UserError: the folder of `link` is not writable.
    """
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(target, link.parent))
        except OSError:
            shutil.copyfile(target, temporary)
        os.replace(temporary, link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{link} cannot be a link to {target} ({error.strerror or error})") from None


class Saver:
    """Write the checkpoints of a training; a write that fails is reported and remembered, and ends nothing.

    Args:
        minutes: between two writes of the state that `due` asks for.
        links: a folder in which the name of each file stands for it; None: nowhere.

    Attributes:
        failed: the files whose last write failed, and why.
    """

    def __init__(self, minutes: float, links: Path | None = None) -> None:
        self.failed: dict[Path, str] = {}
        self._seconds, self._links, self._last = 60 * minutes, links, time.monotonic()

    def due(self) -> bool:
        """Return whether the time has come to write the state again."""
        return time.monotonic() - self._last >= self._seconds

    def write(self, path: Path, content: EncoderCheckpoint) -> bool:
        """Write a file; return whether it is on disk."""
        try:
            for name, tensor in [*content["reducer"].items(), *content.get("policy", {}).items()]:
                if not torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)):
                    raise UserError(f"{path} is not written: {name} is not finite")
            save_checkpoint(path, content)
            if self._links:
                link_newest(self._links / path.name, path)
            self.failed.pop(path, None)
        except UserError as error:
            intact = ". The previous file is intact" if path.is_file() else ""
            self.failed[path] = f"{error}{intact}"
            print(f"\nwarning: {error}{intact}; training goes on", file=sys.stderr, flush=True)
        self._last = time.monotonic()
        return path not in self.failed

    def exit_code(self, code: int = 0) -> int:
        """Return `code`, or 5 after a line for each file whose last write failed."""
        for path, reason in self.failed.items():
            print(f"error: {path} is not up to date: {reason}", file=sys.stderr)
        return _NOT_WRITTEN if self.failed else code


Form = TypeVar("Form", bound=EncoderCheckpoint)


def load_checkpoint(path: Path, form: type[Form]) -> Form:
    """Read a .pt that `save_checkpoint` wrote, on the CPU; code in a pickle never runs.

    Args:
        form: the TypedDict of what the file must hold; it names the kind of checkpoint.

    Raises:
        UserError: missing, truncated, damaged, foreign, of another schema, kind or form.
    """
    (kind,) = get_args(form.__annotations__["kind"])
    script = f"python {kind.removesuffix('_last')}.py"
    advice = f"move it away and run {script}"
    if not path.exists():
        raise UserError(f"there is no {path}; it is written by {script}")
    try:
        with zipfile.ZipFile(path) as parts:  # torch itself does not look at the checksums
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} is damaged")
        content = torch.load(str(path), map_location="cpu", weights_only=True)
    except (*_DAMAGED, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "memory" in reason:
            size = path.stat().st_size / 1e9
            raise UserError(f"not enough memory to read {path}: it needs {size:.1f} GB, free some") from None
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}); {advice}") from None
    found = type(content).__name__
    if isinstance(content, dict):
        found = content.get("kind"), content.get("schema")
    if found in [(kind, schema) for schema in range(1, _SCHEMA)]:
        raise UserError(f"{path} was written by an earlier version of these scripts; {advice}")
    if found != (kind, _SCHEMA):
        raise UserError(f"{path} holds {found}, expected {(kind, _SCHEMA)}; {advice}")
    try:
        content = TypeAdapter(form).validate_python(content)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place, reason = ".".join(map(str, wrong["loc"])), wrong["msg"].removeprefix("Value error, ")
        raise UserError(f"{path} is no {kind} checkpoint: {place}: {reason}; {advice}") from None
    market, bars = content["market"], content["window_bars"]
    columns = (content["coins"] or len(market["symbols"])) * len(market["channels"])
    if len(bars) != len(market["timeframes"]) or sum(bars) * columns != content["dims"][0]:
        reason = f"dims {content['dims']} do not fit windows of {bars} bars and {columns} columns"
        raise UserError(f"{path} is no {kind} checkpoint: {reason}; {advice}")
    return content


def checkpoint_path(data_dir: Path, name: str) -> Path:
    """Return the checkpoint of that name in `data_dir`, or else the file at that path."""
    path, other = data_dir / "checkpoints" / name, Path(name)  # an absolute one stays as it is
    return (other if other.exists() and not path.exists() else path).absolute()


def reducer_checkpoint(
    reducer: FeatureReducer, windows: FeatureWindows, footer: dict, scale: str
) -> ReducerCheckpoint:  # fmt: skip
    """Collect all that it takes to encode windows elsewhere."""
    return {
        "schema": _SCHEMA,
        "kind": "feature_reducer",
        "scale": scale,
        "dims": [reducer.input_dim, reducer.hidden_dim, reducer.latent_dim],
        "coins": reducer.coins,
        "window_bars": list(windows.bars.values()),
        "normalisation": windows.normalisation,
        "market": {name: footer[name] for name in Market.__annotations__},
        "reducer": reducer.state_dict(),
    }


def reducer_from_checkpoint(saved: EncoderCheckpoint, device: torch.device | str) -> FeatureReducer:
    """Build the reducer of a checkpoint on the device; its memory is allocated once.

    Raises:
        UserError: the weights do not have the shapes that the checkpoint names.
    """
    with torch.device("meta"):
        reducer = FeatureReducer(*saved["dims"], saved["coins"])
    try:
        reducer.load_state_dict(saved["reducer"], assign=True)
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint's weights do not fit {saved['dims']} ({str(error).splitlines()[-1].strip()})"
        ) from None
    return reducer.to(device).requires_grad_(True)


def load_states(targets: Sequence, states: Sequence[dict]) -> None:
    """Give scaler and optimizers their states back.

    Raises:
        UserError: they belong to others.
    """
    try:
        for target, state in zip(targets, states, strict=True):
            target.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the checkpoint's optimizer and scaler do not fit ({reason}): start anew") from None


def fixed_constants(constants: dict[str, object]) -> dict[str, object]:
    """Return those of a script's globals() that a resumed run must have too, as plain values."""
    marks = getData.constant_marks(constants)
    chosen = {
        name: constants[name]
        for name, mark in marks.items()
        if mark.mark != "free" and mark.has_job(constants["JOB"])
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def check_resumed(saved: dict, fixed: dict[str, object], footer: dict | None = None) -> None:
    """Refuse to resume with other constants, or (given a footer) on other bars, than the stopped run had.

    Raises:
        UserError: with the names and the old values.
    """
    before = saved["fixed"]
    changed = [f"{name} = {before.get(name)}" for name in fixed if before.get(name) != fixed[name]]
    if changed:
        raise UserError(f"--resume needs the constants of the stopped run, which had {', '.join(changed)}")
    if footer and any(saved["market"][name] != footer[name] for name in ("inputs", "splits")):
        raise UserError("--resume needs the bars and splits of the stopped run; these differ: start anew")


def check_columns(saved: EncoderCheckpoint, footer: dict) -> None:
    """Refuse a checkpoint that was trained on other columns; tied weights take any coins.

    Raises:
        UserError: with what differs.
    """
    for name in ("channels", "timeframes") if saved["coins"] else ("symbols", "channels", "timeframes"):
        if saved["market"][name] != footer[name]:
            raise UserError(
                f"the checkpoint was trained on {name} {saved['market'][name]}, the features have "
                f"{footer[name]}: run python feature_reducer.py on these features first"
            )


def check_market(saved: EncoderCheckpoint, footer: dict) -> None:
    """Refuse to train on from a checkpoint whose splits reach into the later ones here, or of another market.

    Tied weights may come from any real market to another; made bars (synthetic, planted) mix with no others.

    Raises:
        UserError: with what differs.
    """
    trained, advice = saved["market"], "run python feature_reducer.py on these features first"
    sources = trained["source"], footer["source"]
    made = {source.partition(":")[0] for source in sources} & {"synthetic", "planted"}
    if sources[0] != sources[1] and (made or not saved["coins"]):
        found = f"source {trained['source']}, the features have {footer['source']}"
        raise UserError(f"the checkpoint was trained on {found}: {advice}")
    if any(
        trained["splits"][name][1] > footer["splits"][later][0]
        for name, later in (("train", "validation"), ("validation", "test"))
    ):
        reason = "the checkpoint was trained or chosen on bars that are now in a later split"
        raise UserError(f"{reason}: {advice}")


# ----------------------------------------------------------------- start, features and stop of both trainings


def apply_scale(scale: str, device: torch.device, small: dict, flags: dict) -> dict:
    """Print the chosen scale and return the constants that it changes: at "small" those not set by flags."""
    chosen = scale if scale != "auto" else ("full" if device.type == "cuda" else "small")
    reason = f" because the device is {device} (force it with --scale full or --scale small)"
    why = reason if scale == "auto" else ""
    print(f"=== scale: {chosen}{why} ===", flush=True)
    changes = small if chosen == "small" else {}
    return {"SCALE": chosen, **{name: value for name, value in changes.items() if name not in flags}}


def pick_device(name: str) -> torch.device:
    """Return the torch device called `name`; "auto" is CUDA where there is a GPU.

    Raises:
        UsageError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TypeError("only cpu and cuda are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"DEVICE {name!r} cannot be used ({reason}); use --device cpu") from None
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def amp_enabled(choice: str, device: torch.device) -> bool:
    """Return whether float16 autocast and gradient scaling are on; "auto" means on CUDA."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")  # a CPU is 6 x slower with it


def half_precision(device: torch.device, amp: bool) -> torch.autocast:
    """Return float16 autocast, where on; entered once around many steps it casts the weights only once."""
    return torch.autocast(device.type, torch.float16, enabled=amp)


def without_memory_traceback(main: Callable[[], int]) -> Callable[[], int]:
    """Wrap `main` so that running out of memory is one line."""

    def wrapped() -> int:
        try:
            return main()
        except (MemoryError, RuntimeError) as error:  # for the CPU torch has no class of its own
            ours = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not ours and "DefaultCPUAllocator" not in str(error):
                raise
            reason = str(error).rpartition("DefaultCPUAllocator: ")[2].split(". ")[0] or "out of memory"
            raise UserError(f"{reason}: use --scale small, or smaller batches (see the constants)") from None

    return wrapped


@contextmanager
def training_folder(data_dir: Path, folder: Path, seed: int) -> Iterator[None]:
    """Keep other trainings out of the `folder` of a run's checkpoints, and make the data where there is none.

    Raises:
        TryLater: another training is at work there.
    """
    with getData.locked(folder, "training"):
        with FileLock(data_dir / ".making.lock"):  # another training may be making it
            getData.ensure_data(data_dir, seed)
        yield


def load_windows(
    data_dir: Path,
    bars: Sequence[int],
    device: torch.device,
    saved: EncoderCheckpoint | None = None,
    splits: Splits | None = None,
) -> tuple[FeatureWindows, dict]:
    """Load the features of `data_dir` as windows, and their footer.

    Args:
        saved: a checkpoint whose normalisation to use. splits: in place of those of the footer.

    Raises:
        UserError: no features, or others (symbols, channels, timeframes) than the checkpoint was trained on.
    """
    frames, footer = getData.load_features(data_dir)
    footer |= {"splits": splits or footer["splits"]}
    if saved:
        check_columns(saved, footer)
    lengths = zip(bars, footer["timeframes"].values(), strict=False)
    look_back = max(count * length for count, length in lengths) + max(footer["timeframes"].values())
    if look_back > footer["purge_ms"]:
        days, apart = look_back / getData.DAY_MS, footer["purge_ms"] / getData.DAY_MS
        raise UserError(
            f"a window of {list(bars)} bars looks back {days:.1f} days, the splits are only {apart:.1f} days "
            "apart: shorten WINDOW_BARS or raise --purge-days of getData.py"
        )
    normalisation = saved["normalisation"] if saved else None
    return FeatureWindows(frames, bars, device, normalisation, footer["splits"]["train"]), footer


def pinned_folder(last: Path, inputs: dict[str, str]) -> Path:
    """Return the folder with the features of the bars `inputs` for the run of the checkpoint `last`."""
    text = json.dumps(inputs, sort_keys=True)
    return last.with_suffix(f".market-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


@contextmanager
def run_features(data_dir: Path, last: Path, saved: EncoderCheckpoint | None) -> Iterator[Path]:
    """Yield the folder of a run's features; getData.py writes none in the meantime.

    A new run finds them in `data_dir` and pins them for its resumes, which find them there, whatever
    has come into `data_dir` since.
    """
    with getData.features_lock(data_dir):
        if not saved:
            yield data_dir
            pin_features(data_dir, last)
        else:
            folder = pinned_folder(last, saved["market"]["inputs"])
            yield folder if folder.exists() else data_dir


def pin_features(data_dir: Path, last: Path, others: Sequence[Path] = ()) -> None:
    """Keep the features of a run, and `others` files, for its resumes.

    They are hard links (copies where the file system has none), which stay what they are when getData.py
    replaces the files. Those of an earlier run of this name stay until `last` is this one's
    (`drop_other_pins`).

    Raises:
        UserError: they cannot be written.
    """
    _, footer = getData.load_prices(data_dir)
    folder = pinned_folder(last, footer["inputs"])
    unfinished = folder.with_name(f"{folder.name}.tmp")
    targets = {path: Path("features", path.name) for path in (data_dir / "features").glob("*.parquet")}
    try:
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        (unfinished / "features").mkdir(parents=True)
        for path, place in (targets | {path: Path(path.name) for path in others}).items():
            try:
                os.link(path.resolve(), unfinished / place)
            except OSError:
                shutil.copyfile(path, unfinished / place)
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"the features cannot be kept in {folder}: {error}") from None


def drop_other_pins(last: Path, footer: dict) -> None:
    """Remove the features of runs before the one that `last` holds now."""
    for old in last.parent.glob(f"{last.stem}.market-*"):
        if old != pinned_folder(last, footer["inputs"]):
            shutil.rmtree(old, ignore_errors=True)


def reducer_memory(
    dims: Sequence[int], coins: int | None, batch_size: int, amp: bool, optimizer: str = "adafactor"
) -> dict[str, float]:
    """Return the bytes that training a reducer of `dims` D, H, L takes at its peak: {what: bytes}."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in FeatureReducer(*dims, coins).parameters()]
    weights = sum(shape.numel() for shape in shapes)
    means = sum(sum(shape) for shape in shapes)  # Adafactor's, of rows and columns
    state = 4 * means if optimizer == "adafactor" else 12 * weights
    return {
        "parameters": 4 * weights,
        "gradients": 4 * weights,
        "optimizer": state,
        "half-precision weights": 2 * weights * amp,
        # of each window: itself, output, difference, gradient
        "activations": batch_size * (4 * dims[0] * 4 + 8 * dims[1] * 4),
    }


def check_memory(needs: dict[str, float], device: torch.device, advice: str, used: float = 0.0) -> None:
    """Print what a run needs ({what: bytes}) and stop before allocating where the device has less free.

    Args:
        used: bytes that this run has on the device already, for example in a loaded checkpoint.

    Raises:
        UserError: with the needed and the free memory.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available + used
    total = sum(needs.values())
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needs.items())
    available = f"{free / 1e9:.1f} GB free on {device}"
    print(f"memory: {listed}; together {total / 1e9:.2f} GB of {available}", flush=True)
    if total > free:
        raise UserError(f"not enough memory: {total / 1e9:.1f} GB needed, {available}; {advice}")


def check_disk(folder: Path, files: dict[str, float]) -> None:
    """Stop before the run where the disk cannot hold its files ({name: bytes}) and a copy of the largest.

    Files of these names in `folder` will be replaced; temporary ones that a killed run left are removed.

    Raises:
        UserError: with the needed and the free space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.pt.tmp"):
        left.unlink()
    paths = {folder / name: size for name, size in files.items()}
    present = {path: path.stat().st_size if path.exists() else 0 for path in paths}
    grown = sum(max(0.0, size - present[path]) for path, size in paths.items())
    needed, free = grown + max(files.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"not enough disk: {', '.join(files)} need {needed / 1e9:.1f} GB more in {folder}, "
            f"{free / 1e9:.1f} GB are free; free some, or use another --data-dir"
        )


def resume_command(script: str, *more: str) -> str:
    """Return the command that goes on with this run: its own flags, `more` of them, and --resume."""
    flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
    return shlex.join(["python", script, *flags, *more, "--resume"])


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a request to finish the batch; a second one ends at once.

    Not a second SIGHUP: shell and kernel both send one when a terminal is closed.

    Attributes:
        exit_code: 128 + the signal's number after a request, 0 before.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        kinds = {stream: os.fstat(stream).st_mode for stream in (1, 2)}
        self._closing = [
            stream for stream, kind in kinds.items() if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)
        ]
        self._signals = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            self._signals[signal.SIGHUP] = signal.SIG_DFL
        for number in self._signals:
            signal.signal(number, self._request)

    def close(self) -> None:
        """Restore the default action of signals."""
        for number, action in self._signals.items():
            signal.signal(number, action)

    def _request(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:  # the terminal or a pipe to it is gone, and writing there an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._closing:
                os.dup2(nowhere, stream)
            os.close(nowhere)
        if self.exit_code:
            if number == signal.SIGHUP:
                return
            os._exit(128 + number)
        self.exit_code = 128 + number
        text = "finishing the batch, then saving and stopping (Ctrl-C again: stop at once)"
        print(f"\n{text}", file=sys.stderr, flush=True)


class Board:
    """Write TensorBoard's event file of one run, without its writer's thread and seconds of imports.

    Args:
        first_step: the curves' points from there on, which an earlier process wrote, are void; 0: none are.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if first_step:
            self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """Add a point to each curve; None: no value."""
        points = [Summary.Value(tag=name, simple_value=x) for name, x in values.items() if x is not None]
        self._write(step=step, summary=Summary(value=points))

    def add_outcome(self, constants: dict[str, object], figures: dict[str, float]) -> None:
        """Add a run's constants and results, for the table that compares runs."""
        plain = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in constants.items()
        }
        self._write(summary=hparams_pb(plain))
        self.add(0, {f"outcome/{name}": value for name, value in figures.items()})

    def _write(self, **event: object) -> None:
        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())


class RunLog:
    """Writes metrics.csv and TensorBoard of one run; a resume drops the rows after `steps_done`.

    Rows that cannot be written (a full disk) wait in memory until one can.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        self.path = folder / "metrics.csv"
        self.waiting: list[list[object]] = []
        self.board: Board | None = None
        lines = self.path.read_bytes().splitlines(keepends=True) if steps_done and self.path.exists() else []
        steps = [line.split(b",")[0] for line in lines if line.endswith(b"\n")]
        if steps and not (steps[0] == b"step" and all(map(bytes.isdigit, steps[1:]))):
            raise UserError(f"{self.path} is damaged: move it away, then go on with --resume")
        rows = [line for step, line in zip(steps[1:], lines[1:], strict=False) if int(step) <= steps_done]
        self.fields = lines[0].decode(errors="replace").strip().split(",") if rows else []
        if not steps_done:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        try:  # the rows stand first in the file: truncating it after them needs no disk space
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            os.truncate(self.path, sum(map(len, lines[:1] + rows)) if rows else 0)
            self.board = Board(folder, steps_done + 1 if steps_done else 0)
        except OSError as error:
            print(f"warning: no TensorBoard curves ({error}); training goes on", file=sys.stderr)

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """Add a row: the step (from 1) and its metrics, always the same names; None: no value."""
        row = {"step": step, **values}
        if not self.fields:
            self.fields = list(row)
            self.waiting.append(self.fields)
        if self.fields != list(row):
            raise UserError(f"{self.path} is damaged: move it away, then go on with --resume")
        self.waiting.append(list(row.values()))
        self.flush()
        try:
            if self.board:
                self.board.add(step, values)
        except OSError as error:
            print(f"warning: no more TensorBoard curves ({error}); training goes on", file=sys.stderr)
            self.board = None

    def flush(self) -> None:
        """Write the rows that wait."""
        size = 0
        try:
            size = self.path.stat().st_size
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows(self.waiting)
            self.waiting = []
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # no half rows
            print(f"warning: {self.path} has to wait ({error}); training goes on", file=sys.stderr)


def progress_bar(total: int, done: int, what: str, unit: str) -> tqdm:
    """Return a progress bar that shows only in a terminal."""
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=None)


# --------------------------------------------------------------------------- optimizer step of both trainings


def clipped_step(
    loss: Tensor,
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> tuple[list[float], bool]:
    """Run the backward pass, clip each module in true units, and step.

    Where the norm of any module's gradient is not finite nothing moves, and the loss scale falls if a
    gradient itself is not finite.

    Returns:
        The gradient norms before clipping, and whether the step was skipped.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    norms = []
    for module, optimizer in zip(modules, optimizers, strict=True):
        scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
    usable = all(torch.isfinite(norm) for norm in norms)
    if usable:
        for module, optimizer, norm in zip(modules, optimizers, norms, strict=True):
            if getattr(optimizer, "takes_factor", False):
                scaler.step(optimizer, factor=(max_norm / (norm + 1e-6)).clamp(max=1.0))
            else:
                nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
                scaler.step(optimizer)
    scaler.update()
    return [float(norm) for norm in norms], not usable


def make_adafactor(module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018) with a fixed learning rate: factored second moment, no momentum.

    The one of `transformers`, which steps by `adafactor_step`; torch.optim.Adafactor scales steps by the
    parameter and so freezes what starts at zero.
    """
    from transformers.optimization import Adafactor  # here, for the import alone takes seconds

    class BlockAdafactor(Adafactor):
        step = adafactor_step
        takes_factor = True

    return BlockAdafactor(
        module.parameters(), lr=learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
    )


@torch.no_grad()
def adafactor_step(optimizer: torch.optim.Optimizer, *, factor: float | Tensor = 1.0) -> None:
    """Take the step of transformers' Adafactor, with its state, a block of rows at a time.

    The library makes some twenty passes over each matrix and two temporaries of its size. Here three passes
    read the gradient in blocks that stay in the cache: row and column means of its square, RMS of the update,
    and the update itself.

    Args:
        factor: multiplies the gradients, so that clipping them takes no pass of its own.
    """
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        if parameter.grad is not None:
            _update_in_blocks(parameter, optimizer.state[parameter], group, factor)


def _update_in_blocks(parameter: Tensor, state: dict, group: dict, factor: float | Tensor) -> None:
    """Update a float32 parameter [..., R, C] or [C]: Shazeer & Stern, arXiv:1804.04235, algorithms 4, 5."""
    gradient, shape = parameter.grad, parameter.shape
    factored = len(shape) >= 2
    if not state:
        means = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        means = means if factored else {"exp_avg_sq": shape}
        state |= {"step": 0} | {name: gradient.new_zeros(size) for name, size in means.items()}
    state["step"] += 1
    decay = 1.0 - math.pow(state["step"], group["decay_rate"])
    epsilon = group["eps"][0]

    # M matrices [R, C], each in blocks of rows; a vector is a matrix of one row
    rows, columns = (shape[-2], shape[-1]) if factored else (1, parameter.numel())
    gradients, weights = gradient.view(-1, rows, columns), parameter.view(-1, rows, columns)
    height = max(1, _block_bytes(gradient.device) // (4 * columns))
    blocks = [(m, slice(row, row + height)) for m in range(len(gradients)) for row in range(0, rows, height)]
    buffer = gradient.new_empty(min(height, rows), columns)
    if factored:
        row_mean, column_sum = (
            gradient.new_empty(len(gradients), rows),
            gradient.new_zeros(len(gradients), columns),
        )
        for m, part in blocks:
            block = gradients[m, part]
            square = torch.mul(block, block, out=buffer[: len(block)])
            row_mean[m, part] = square.mean(1)
            column_sum[m] += square.sum(0)
        row, column = state["exp_avg_sq_row"].view(-1, rows), state["exp_avg_sq_col"].view(-1, columns)
        row.mul_(decay).add_(factor**2 * row_mean + epsilon, alpha=1 - decay)
        column.mul_(decay).add_(factor**2 / rows * column_sum + epsilon, alpha=1 - decay)
        row_factor = (row / row.mean(1, keepdim=True)).rsqrt().unsqueeze(2)  # [M, R, 1]
        column_factor = factor * column.rsqrt()  # [M, C]
    else:
        square = state["exp_avg_sq"]
        square.mul_(decay).add_((factor * gradient).square() + epsilon, alpha=1 - decay)
        row_factor, column_factor = gradient.new_ones(1, 1, 1), factor * square.rsqrt().view(1, columns)

    total = gradient.new_zeros((), dtype=torch.float64)
    for m, part in blocks:
        block = gradients[m, part]
        update = torch.mul(block, column_factor[m], out=buffer[: len(block)])
        total += (torch.linalg.vector_norm(update, dim=1) * row_factor[m, part, 0]).square().sum()
    root_mean_square = (total / gradient.numel()).sqrt().float()
    row_factor = row_factor * (group["lr"] / (root_mean_square / group["clip_threshold"]).clamp(min=1.0))
    for m, part in blocks:
        block, weight = gradients[m, part], weights[m, part]
        update = torch.mul(block, column_factor[m], out=buffer[: len(block)])
        weight.addcmul_(update, row_factor[m, part], value=-1.0)


def _block_bytes(device: torch.device) -> int:
    """Return the bytes of a block of which the few copies at work at once stay in the cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size // 4 if device.type == "cuda" else 16 << 20


def check_finite(
    loss: float,
    scaler: torch.amp.GradScaler,
    modules: dict[str, nn.Module],
    what: str,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Stop on a non-finite loss, unless the scaler skips the step and can still lower its scale.

    Raises:
        UserError: with the first parameter that is not finite, or the first one of `tensors`.
    """
    if math.isfinite(loss) or (scaler.is_enabled() and scaler.get_scale() > 1.0):
        return
    bad = first_bad_tensor(modules, tensors)
    raise UserError(f"the loss is {loss} {what}: {bad}; lower the learning rates")


def count_skipped(
    counts: StepCounts, skipped: int, steps: int, modules: dict[str, nn.Module], what: str
) -> None:  # fmt: skip
    """Add the `skipped` ones of `steps` optimizer steps to `counts`.

    Raises:
        UserError: too many in a row were skipped for any loss scale; with the first bad tensor.
    """
    counts.skipped += skipped
    counts.skipped_in_a_row = counts.skipped_in_a_row + skipped if skipped == steps else 0
    if counts.skipped_in_a_row > _MAX_SKIPPED:
        bad = first_bad_tensor(modules)
        raise UserError(f"{counts.skipped_in_a_row} steps in a row were skipped {what}: {bad}")


def first_bad_tensor(modules: dict[str, nn.Module], tensors: dict[str, Tensor] | None = None) -> str:
    """Name the first parameter that is not finite; without one, the first of `tensors`, then gradient."""
    parts = {name: module.named_parameters() for name, module in modules.items()}
    named = [(f"{module}.{name}", p) for module, found in parts.items() for name, p in found]
    on_the_way = [(f"the {name}", tensor) for name, tensor in (tensors or {}).items()]
    gradients = [(f"the gradient of {name}", p.grad) for name, p in named if p.grad is not None]
    for name, tensor in [*named, *on_the_way, *gradients]:
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    return "all weights are finite"


# ------------------------------------------------------------------------------------ this script's own steps


def check_constants() -> None:
    """Raise UsageError for constants that cannot work together, before anything is computed."""
    if INIT == "pca" and HIDDEN_DIM < LATENT_DIM:
        raise UsageError(
            f"INIT = 'pca' needs HIDDEN_DIM >= LATENT_DIM, not {HIDDEN_DIM} < {LATENT_DIM}; use --init random"
        )
    if PCA_WINDOWS <= LATENT_DIM:
        raise UsageError(f"PCA_WINDOWS must be above LATENT_DIM, not {PCA_WINDOWS} <= {LATENT_DIM}")


def load_encoder(path: Path) -> EncoderCheckpoint:
    """Load what a checkpoint of this script, or of train.py, says of its encoder.

    Raises:
        UserError: as `load_checkpoint`, or it has several.
    """
    alone = path.name.startswith("feature_reducer")
    saved = load_checkpoint(path, ReducerCheckpoint if alone else JointEncoder)
    if saved.get("others"):
        raise UserError(f"{path} is an ensemble with several encoders: name one of its agents")
    return saved


def compress(data_dir: Path, device: torch.device, amp: bool, batch_size: int) -> None:
    """Encode every complete window with CHECKPOINT's encoder into data/latents.parquet, a chunk at a time.

    Its footer says which market, checkpoint and run (of one that was trained jointly) the latents come from.
    """
    path = checkpoint_path(data_dir, CHECKPOINT)
    saved = load_encoder(path)
    reducer = reducer_from_checkpoint(saved, device)
    windows, footer = load_windows(data_dir, saved["window_bars"], device, saved)
    check_market(saved, footer)
    rows = torch.from_numpy(windows.valid.nonzero()[0]).to(device)
    with torch.no_grad():
        width = reducer.encoder(windows(rows[:1])).shape[1]  # of as many coins as there are here
    names = [f"z{k}" for k in range(width)]
    schema = pa.schema(
        [("close_time", pa.timestamp("ms", tz="UTC")), *((name, pa.float16()) for name in names)]
    )
    about = {"source": footer["source"], "inputs": footer["inputs"], "checkpoint": path.name}
    schema = getData.with_footer(schema, about | {"run": saved.get("run", ""), "symbols": footer["symbols"]})
    target = data_dir / "latents.parquet"
    try:
        with (
            torch.no_grad(),
            getData.replacing(target) as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for group in tqdm(rows.split(16 * batch_size), desc="compress", unit="group", disable=None):
                with half_precision(device, amp):
                    latent = torch.cat(
                        [reducer.encoder(windows(chunk)).half() for chunk in group.split(batch_size)]
                    )
                times = pa.array(windows.times[group.cpu().numpy()], pa.timestamp("ms", tz="UTC"))
                latent = np.ascontiguousarray(latent.T.cpu().numpy())  # [L, B]
                columns = [pa.array(column) for column in latent]
                writer.write_table(pa.Table.from_arrays([times, *columns], schema=schema))
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error}); free some space there") from None
    print(f"latents: {target} [{len(rows)}, {width}] float16")


def epoch_batches(rows: Tensor, epoch: int) -> Sequence[Tensor]:
    """Return the shuffled minibatches [B] of an epoch, the same ones when it is resumed."""
    return random_rows(rows, WINDOWS_PER_EPOCH, SEED * 1_000_003 + epoch + 1).split(BATCH_SIZE)


@dataclass(kw_only=True)
class Progress(StepCounts):
    """Where a training stands; kept in feature_reducer_last.pt."""

    epoch: Whole = 0
    batch: Whole = 0  # of the epoch
    running: StrictFloat = 0.0  # exponential mean of the epoch's losses
    best: dict[str, StrictFloat] = field(default_factory=lambda: {"mse": math.inf})  # of feature_reducer.pt
    best_failed: StrictBool = False  # its last write: a resume tries again
    pca: dict[str, StrictFloat] = field(default_factory=dict)  # of the yardstick


class ReducerState(EncoderCheckpoint):
    """feature_reducer_last.pt."""

    kind: Literal["feature_reducer_last"]
    optimizer: dict
    scaler: dict
    progress: Progress
    fixed: dict[str, object]  # constants that must be the same in a resumed run


def plan_memory(data_dir: Path, windows: FeatureWindows, amp: bool, new: bool) -> None:
    """Say what the training needs, and stop where memory or disk cannot hold it."""
    coins, dims = windows.coins if TIE_COINS else None, (windows.input_dim, HIDDEN_DIM, LATENT_DIM)
    needs = reducer_memory(dims, coins, BATCH_SIZE, amp)
    if new:  # the PCA is over before there are gradients
        values = 3 * dims[0] / coins if coins else dims[0]  # of a sample; tied: mean, deviation, their window
        pca = 4 * (PCA_WINDOWS + LATENT_DIM) * values + 24 * PCA_WINDOWS**2
        needs["PCA, beyond these"] = max(0, pca - sum(needs.values()) + needs["parameters"])
    used = 0 if new else needs["parameters"] + needs["optimizer"]  # of the loaded checkpoint
    check_memory(needs, windows.device, "use --scale small, or lower --batch-size", used)
    names = ("feature_reducer.pt", "feature_reducer_last.pt")
    check_disk(data_dir / "checkpoints", dict.fromkeys(names, needs["parameters"]))


def first_reducer(
    windows: FeatureWindows, train_rows: Tensor, validation_rows: Tensor
) -> tuple[FeatureReducer, dict[str, float]]:
    """Make the reducer to start from, and measure the PCA yardstick on the validation split."""
    coins = windows.coins if TIE_COINS else None
    reducer = FeatureReducer(windows.input_dim, HIDDEN_DIM, LATENT_DIM, coins).to(windows.device)
    if coins and INIT == "pca":
        check_blocks(reducer)
    count = min(PCA_WINDOWS, len(train_rows))
    print(f"PCA yardstick: {LATENT_DIM} components from {count} training windows", flush=True)
    if len(train_rows) <= LATENT_DIM:
        raise UserError(f"too little history: {len(train_rows)} training windows for {LATENT_DIM} components")
    rows = random_rows(train_rows, PCA_WINDOWS, SEED)
    if coins:
        of_mean, of_deviation = fit_tied_pca(windows, rows, blocks_of(LATENT_DIM, coins))
        mean, basis, _ = of_mean
        deviation = of_deviation[1]

        def reconstruct(x: Tensor) -> Tensor:
            x = x.unflatten(1, (coins, -1))  # [B, N, P]
            middle = x.mean(1, keepdim=True)
            common = mean + (middle - mean) @ basis @ basis.T
            return (common + (x - middle) @ deviation @ deviation.T).flatten(1)

        if INIT == "pca":
            initialise_from_tied_pca(reducer, of_mean, of_deviation)
    else:
        mean, basis, std = fit_pca(windows(rows), LATENT_DIM)

        def reconstruct(x: Tensor) -> Tensor:
            return torch.addmm(mean, (x - mean) @ basis, basis.T)

        if INIT == "pca":
            initialise_from_pca(reducer, mean, basis, std)
    return reducer, reconstruction_metrics(reconstruct, windows, validation_rows, BATCH_SIZE)


def train(data_dir: Path, device: torch.device, amp: bool) -> int:
    """Train the reducer and keep the best by validation loss; return the exit code."""
    torch.manual_seed(SEED)
    stop, saver = StopSignal(), Saver(SAVE_MINUTES)
    best_path, last_path = (data_dir / "checkpoints" / f"feature_reducer{part}.pt" for part in ("", "_last"))
    fixed = fixed_constants(globals()) | {"AMP": amp}
    saved = load_checkpoint(last_path, ReducerState) if RESUME else None
    with run_features(data_dir, last_path, saved) as market:
        windows, footer = load_windows(market, WINDOW_BARS, device, saved)
    if saved:
        check_resumed(saved, fixed, footer)
    train_rows = windows.rows(footer["splits"]["train"], "training")
    validation_rows = windows.rows(footer["splits"]["validation"], "validation")
    validation_rows = spread_rows(validation_rows, VALIDATION_WINDOWS)
    values = windows.input_dim
    shape = f"{values:,} -> {HIDDEN_DIM:,} -> {LATENT_DIM:,} ({values / LATENT_DIM:.1f}x)"
    print(f"reducer: {shape}, market: {footer['source']}")
    plan_memory(data_dir, windows, amp, not saved)
    if saved:
        reducer, progress = reducer_from_checkpoint(saved, device), saved["progress"]
        if not best_path.exists():
            print(f"{best_path} is missing: the reducer of this state is the first to be written there")
            progress.best, progress.best_failed = {"mse": math.inf}, True
    else:
        progress = Progress(best_failed=True)  # there is none yet
        reducer, progress.pca = first_reducer(windows, train_rows, validation_rows)
    optimizer = make_adafactor(reducer, LEARNING_RATE)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    if saved:
        load_states([scaler, optimizer], [saved["scaler"], saved["optimizer"]])
    del saved
    log = RunLog(data_dir / "runs" / "feature_reducer", progress.epoch)

    def reconstruct(x: Tensor) -> Tensor:
        with half_precision(device, amp):
            return reducer(x)[1]

    def validate() -> tuple[dict[str, float], bool]:
        """Measure the reducer, and write it where it is the best so far; return the metrics, and whether."""
        metrics = reconstruction_metrics(reconstruct, windows, validation_rows, BATCH_SIZE)
        improved = metrics["mse"] < progress.best["mse"]
        if improved:
            content = reducer_checkpoint(reducer, windows, footer, SCALE) | {"metrics": metrics}
            progress.best_failed = not saver.write(best_path, content)
            progress.best = progress.best if progress.best_failed else metrics
        return metrics, improved

    def save_last() -> None:
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "fixed": fixed}
        state |= {"kind": "feature_reducer_last", "progress": asdict(progress)}
        if saver.write(last_path, reducer_checkpoint(reducer, windows, footer, SCALE) | state):
            drop_other_pins(last_path, footer)

    if progress.best_failed:
        metrics, _ = validate()
        figures = f"mse {metrics['mse']:.4f}  explained variance {metrics['explained_variance']:.4f}"
        print(f"epoch {progress.epoch:3d}  validation {figures}")
        save_last()
    while progress.epoch < EPOCHS and not stop.exit_code:
        where = f"in epoch {progress.epoch + 1}"
        batches = epoch_batches(train_rows, progress.epoch)
        bar = progress_bar(len(batches), progress.batch, f"epoch {progress.epoch + 1}", "batch")
        for rows in batches[progress.batch :]:
            target = windows(rows)  # [B, D]
            with half_precision(device, amp):
                _, reconstruction = reducer(target)
            loss = F.mse_loss(reconstruction.float(), target)
            value = loss.item()
            tensors = {"windows": target, "reconstruction": reconstruction}
            check_finite(value, scaler, {"reducer": reducer}, where, tensors)
            _, skipped = clipped_step(loss, [reducer], [optimizer], scaler, MAX_NORM)
            count_skipped(progress, int(skipped), 1, {"reducer": reducer}, where)
            progress.running = 0.95 * progress.running + 0.05 * value if progress.running else value
            progress.batch += 1
            bar.update()
            bar.set_postfix(mse=f"{progress.running:.4f}")
            if stop.exit_code:
                break
            if saver.due():
                save_last()
        bar.close()
        if progress.batch < len(batches):
            break
        metrics, improved = validate()
        progress.epoch += 1
        row = {"train_mse": progress.running, **{f"validation_{name}": x for name, x in metrics.items()}}
        log.add(progress.epoch, {**row, "skipped_steps": progress.skipped})
        print(
            f"epoch {progress.epoch:3d}  train mse {progress.running:.4f}  "
            f"validation mse {metrics['mse']:.4f}  explained variance {metrics['explained_variance']:.4f}  "
            f"accuracy {metrics['accuracy']:.4f}{'  *' * improved}",
            flush=True,
        )
        progress.batch, progress.running = 0, 0.0
    save_last()
    log.flush()
    if stop.exit_code:
        print(f"stopped in epoch {progress.epoch + 1}; go on with: {resume_command('feature_reducer.py')}")
        return saver.exit_code(stop.exit_code)

    print(f"\n{'validation split':32s}{'reducer':>10s}{f'PCA {LATENT_DIM}':>10s}")
    for name, value in progress.pca.items():
        print(f"{name + ':':32s}{progress.best.get(name, math.nan):10.4f}{value:10.4f}")
    print(f"checkpoint: {best_path}")
    return saver.exit_code()


def main(argv: list[str] | None = None) -> int:
    flags = getData.set_constants(globals(), argv)
    device = pick_device(DEVICE)
    amp = amp_enabled(AMP, device)
    if JOB == "compress":  # the checkpoint has its own scale
        compress(DATA_DIR, device, amp, BATCH_SIZE)
        return 0
    getData.assign_constants(globals(), apply_scale(SCALE, device, SMALL, flags))
    check_constants()
    with training_folder(DATA_DIR, DATA_DIR / "checkpoints", SEED):
        return train(DATA_DIR, device, amp)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    getData.run_script(without_memory_traceback(main))
