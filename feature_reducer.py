"""Learn to compress one decision's window of indicators, 134,980 values, into 2,148 and back.

reads   data/features/{5m,15m,1h,4h,1d}.parquet        (getData.py; without data: a synthetic market)
writes  data/checkpoints/feature_reducer.pt            (best on the validation split; train.py starts from it)
        data/checkpoints/feature_reducer_last.pt       (everything that --resume needs)
        data/runs/feature_reducer/                     (metrics.csv, TensorBoard)
        data/latents.parquet                           (with --job compress: every window's latent vector)

    python feature_reducer.py                  train (scale "full" on a CUDA GPU, "small" otherwise)
    python feature_reducer.py --resume         go on where the last run stopped
    python feature_reducer.py --job compress   write data/latents.parquet from the trained reducer

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
import re
import shlex
import shutil
import signal
import stat
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from operator import gt
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Literal, NotRequired, TypeVar, get_args

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from pydantic import ConfigDict, Field, StrictBool, StrictFloat, TypeAdapter, with_config
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict

import getData
from getData import Count, NonNegative, Positive, Scaled, Seed, UsageError, UserError, Whole

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: full-scale CPU updates are a fifth faster

# What the brackets mean stands in getData.py
# Job and files [all; free]
JOB: Literal["train", "compress"] = "train"  # compress: write data/latents.parquet from the trained reducer
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
DEVICE: str = "auto"  # auto | cpu | cuda | cuda:1 ...

# Going on [train; free]
RESUME: bool = False  # go on from feature_reducer_last.pt
EPOCHS: Whole = Scaled(10, small=2)
SAVE_MINUTES: NonNegative = 5.0  # between writes of feature_reducer_last.pt; it is written at a stop, too

# Compressing [compress; free]
CHECKPOINT: str = "feature_reducer.pt"  # what to compress with: also train.py's best.pt ..., or a path

# Model [train]
SCALE: Literal["auto", "full", "small"] = "auto"  # auto: full where there is a CUDA GPU
WINDOW_BARS: tuple[Count, ...] = Scaled((144, 96, 72, 36, 49), small=(24, 12, 10, 6, 4))  # of 5m ... 1d
HIDDEN_DIM: Count = Scaled(3_222, small=456)
LATENT_DIM: Count = Scaled(2_148, small=304)
TIE_COINS: bool = True  # one set of weights for all coins; False: dense, weights of its own for each
INIT: Literal["pca", "random"] = "pca"  # pca: start as the best linear reducer

# Optimisation [train]
WINDOWS_PER_EPOCH: Whole = 16_384  # drawn anew each epoch, since neighbours are nearly the same; 0: all
LEARNING_RATE: Positive = Scaled(0.00005, small=0.000005)  # Adafactor; after the PCA larger ones overfit
PCA_WINDOWS: Count = 4_096  # training windows that the PCA yardstick (and INIT = "pca") is fitted on
SEED: Seed = getData.SEED  # set in getData.py

# System [all]
BATCH_SIZE: Count = 256  # windows
AMP: Literal["auto", "on", "off"] = "auto"  # float16 mixed precision; auto: on with CUDA

# No settings, and so no flags
_SCHEMA = 4  # of the checkpoints
_ANEW = "run python feature_reducer.py on these features first"
# what zipfile, pickle and torch raise on altered bytes
_DAMAGE = (*getData.Damage, AssertionError, AttributeError, ImportError, UnpicklingError, struct.error)
_CPU_BLOCK = 16 << 20  # bytes of a matrix of which the few copies at work at once stay in a CPU's cache
_MAX_SKIPPED = 40  # steps in a row; from 65,536 the loss scale falls to 1 in 16
_NORMALISED_CLIP = 8.0  # standard deviations
_MAX_NORM = 1.0  # gradient clipping


# ------------------------------------------------------------------------------------------ windows and model


Normalisation = dict[str, dict[str, Tensor]]  # mean and std: {timeframe: [K]}


class FeatureWindows:
    """Keeps the compact feature arrays on the device and gathers any window from them on demand.

    A window is the last `bars[k]` completed bars of each timeframe k at the close of a 5-minute bar, coin by
    coin: [N, P] with P = sum of bars[k] x channels, in the order timeframe, bar, channel. A coin's bars are
    adjacent in memory, so each of its timeframes is one row of an overlapping view of the array: gathering B
    windows reads and writes each value once, and nothing of size [T, D] ever exists.

    Args:
        frames: timeframe -> features [T_k, N x K], columns `SYMBOL.channel`, index = bar close time; the
            first one is the decision grid.
        members: which coins may be held at each decision of the grid [T, N]; None: all, and a window is
            complete only if it is so for each. The windows of a coin that is absent, or not complete, are 0.
        normalisation: of each channel; None fits it on `train`, (first, last exclusive) decision time in ms.
    """

    def __init__(
        self, frames: dict[str, pd.DataFrame], bars: Sequence[int], device: torch.device | str = "cpu",
        normalisation: Normalisation | None = None, train: tuple[int, int] | None = None,
        members: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        if len(bars) != len(frames):
            raise UserError(f"WINDOW_BARS has {len(bars)} numbers, the features {len(frames)} timeframes")
        grid = next(iter(frames.values()))
        self.bars = dict(zip(frames, bars, strict=True))
        self.times, self.coins = close_ms(grid), count_coins(grid)  # [T], N
        self.views, self.starts, self.lengths, self.slices = {}, {}, {}, {}  # slices: of a coin's P values
        self.normalisation, offset = normalisation or fit_normalisation(frames, train), 0
        present = np.ones((len(grid), self.coins), bool) if members is None else members
        for timeframe, frame in frames.items():
            count, channels = self.bars[timeframe], frame.shape[1] // self.coins
            if len(frame) < count:
                problem = f"a window needs {count} bars of {timeframe}, the features have {len(frame)}"
                raise UserError(f"too little history: {problem}; collect more days with getData.py")
            values = torch.from_numpy(np.array(frame, dtype=np.float32, order="C"))
            values = values.view(len(frame), self.coins, channels).transpose(0, 1).contiguous()  # [N, T_k, K]
            last = np.searchsorted(close_ms(frame), self.times, side="right") - 1  # completed bar [T]
            start = last - count + 1
            whole = np.isfinite(values.numpy()).all(2)  # [N, T_k]
            gaps = np.pad((~whole).cumsum(1).T, ((1, 0), (0, 0)))  # before each bar [T_k + 1, N]
            present = present & (start >= 0)[:, None] & (gaps[last + 1] == gaps[start.clip(0)])
            mean, std = (self.normalisation[kind][timeframe] for kind in ("mean", "std"))
            values.sub_(mean).div_(std).clamp_(-_NORMALISED_CLIP, _NORMALISED_CLIP)
            shape = (self.coins * len(frame) - count + 1, count * channels)  # row: coin x T_k + first bar
            self.views[timeframe] = values.to(device).as_strided(shape, (channels, 1))
            self.starts[timeframe] = torch.from_numpy(start.clip(0)).to(device)
            self.slices[timeframe] = slice(offset, offset + count * channels)
            self.lengths[timeframe] = len(frame)
            offset += count * channels
        self.input_dim, self.device = self.coins * offset, torch.device(device)
        self.valid, self.most, self.present = present.all(1), self.coins, None
        if members is not None:
            self.valid, self.most = present.any(1), int(present.sum(1).max())
            self.present = torch.from_numpy(present).to(device)

    def __call__(self, rows: Tensor, permutation: Tensor | None = None) -> Tensor:
        """Gather the normalised windows [B, D] at `rows` [B] of the grid; of coins `permutation` [B, K]."""
        there = self.there(rows, permutation)
        if permutation is None:
            permutation = torch.arange(self.coins, device=self.device).expand(len(rows), -1)
        out = torch.empty(permutation.numel(), self.input_dim // self.coins, device=self.device)
        for timeframe, view in self.views.items():
            first = self.starts[timeframe][rows, None] + self.lengths[timeframe] * permutation  # [B, N]
            torch.index_select(view, 0, first.flatten(), out=out[:, self.slices[timeframe]])
        if there is not None:
            out.masked_fill_(~there.view(-1, 1), 0.0)
        return out.view(len(rows), -1)

    def there(self, rows: Tensor, permutation: Tensor | None = None) -> Tensor | None:
        """Return which coins [..., K] are present at decisions `rows` [...]; None: all of them always."""
        present = None if self.present is None else self.present[rows]
        return present if present is None or permutation is None else present.gather(-1, permutation)

    def rows(self, split: Sequence[int], name: str = "this") -> Tensor:
        """Return the rows [R] of a split (first ms, last ms exclusive); all have complete windows."""
        inside = (self.times >= split[0]) & (self.times < split[1])
        if self.present is not None:  # where no coin is there nothing is decided
            inside &= self.valid
        if not inside.any() or not self.valid[inside].all():
            whole = f"{(inside & self.valid).sum()} of the {inside.sum()} decisions of the {name} split"
            problem = f"{whole} have a complete window of {list(self.bars.values())} bars"
            advice = "collect more days with getData.py or shorten WINDOW_BARS"
            raise UserError(f"too little history: {problem}; {advice}")
        return torch.from_numpy(inside.nonzero()[0]).to(self.device)


def close_ms(frame: pd.DataFrame) -> np.ndarray:
    """Return the close times [T] of a frame's bars in ms since 1970, UTC."""
    return frame.index.as_unit("ms").asi8


def count_coins(frame: pd.DataFrame) -> int:
    """Return the number of coins in columns `SYMBOL.channel`."""
    return len({column.rpartition(".")[0] for column in frame.columns})


def fit_normalisation(frames: dict[str, pd.DataFrame], train: tuple[int, int]) -> Normalisation:
    """Return mean and std [K] of each channel over the training split (ms) and the coins that are there."""
    mean, std = {}, {}
    for timeframe, frame in frames.items():
        times = close_ms(frame)
        values = frame.to_numpy()[(times >= train[0]) & (times < train[1])]
        values = values.reshape(-1, coins := count_coins(frame), frame.shape[1] // coins)  # [R, N, K]
        whole = np.isfinite(values).all(2)
        if (bars := whole.any(1).sum()) < 2:
            problem = f"{bars} bars of {timeframe} in the training split"
            raise UserError(f"too little history: {problem}; collect more days with getData.py")
        values = values[whole].astype(np.float64)
        mean[timeframe] = torch.from_numpy(values.mean(0)).float()
        spread = values.std(0)  # of a constant channel almost 0: it stays 0, divided by 1
        std[timeframe] = torch.from_numpy(np.where(spread > 1e-8, spread, 1.0)).float()
    return {"mean": mean, "std": std}


def blocks_of(width: int, coins: int) -> tuple[int, int]:
    """Return the widths of each coin's block (nine tenths are the coins') and of the market's block."""
    coin = 9 * width // (10 * coins)
    if not coin:
        raise UsageError(f"a layer of {width} values is too narrow for {coins} coins with TIE_COINS")
    return coin, width - coins * coin


class EquivariantLinear(nn.Module):
    """A linear layer that treats all coins alike, however many there are.

    It maps [coin block x N | market block] to such blocks: out_i = A x_i + B mean(x) + C m for each coin and
    D mean(x) + E m for the market, with a bias each. These are all the linear maps that commute with every
    permutation of the coins (Zaheer et al. 2017, Deep Sets; Maron et al. 2019, arXiv:1812.09902). It is a
    dense layer whose blocks are tied: see `to_dense`. Where coins are absent, the mean is that of those which
    are `present`, and the outputs of the others are 0: what a market without them gives. `inputs` and
    `outputs` are the widths of one coin's block and of the market's, which may be 0.
    """

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, int]) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.own = nn.Linear(inputs[0], outputs[0], bias=False)  # A
        self.shared = nn.Linear(sum(inputs), sum(outputs))  # [[B, C], [D, E]]
        with torch.no_grad():  # a coin's output is the sum of two
            self.own.weight /= math.sqrt(2)
            self.shared.weight[: outputs[0]] /= math.sqrt(2)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Return [..., N x coin | market] of x [..., N x coin | market], coins `present` [..., N]."""
        own = x.shape[-1] - self.inputs[1]
        coins = x[..., :own].unflatten(-1, (-1, self.inputs[0]))  # [..., N, coin], 0 where absent
        shared = self.shared(torch.cat([mean_present(coins, present), x[..., own:]], -1))
        to_coins, market = shared.split(self.outputs, -1)
        out = self.own(coins).add_(to_coins.unsqueeze(-2))
        out = (out if present is None else out * present.unsqueeze(-1)).flatten(-2)
        return torch.cat([out, market], -1) if self.outputs[1] else out  # no copy of a whole window

    @torch.no_grad()
    def to_dense(self, coins: int) -> nn.Linear:
        """Return the same function of so many coins as a dense layer."""
        (coin_in, _), (coin_out, _) = self.inputs, self.outputs
        of_coins, of_market = self.shared.weight[:, :coin_in], self.shared.weight[:, coin_in:]
        weight = torch.cat([of_coins.repeat(1, coins) / coins, of_market], 1)
        weight = torch.cat([weight[:coin_out].repeat(coins, 1), weight[coin_out:]])
        weight[: coins * coin_out, : coins * coin_in] += torch.block_diag(*[self.own.weight] * coins)
        dense = nn.Linear(*weight.T.shape, device=weight.device)
        dense.weight.copy_(weight)
        dense.bias.copy_(torch.cat([self.shared.bias[:coin_out].repeat(coins), self.shared.bias[coin_out:]]))
        return dense


def mean_present(coins: Tensor, present: Tensor | None) -> Tensor:
    """Return the mean [..., P] of those of `coins` [..., N, P] that are present [..., N]; 0 of none."""
    if present is None:
        return coins.mean(-2)
    return torch.einsum("...np,...n->...p", coins, present.to(coins)) / present.sum(-1, True).clamp(min=1)


class Layers(nn.Sequential):
    """Layers one after another, of which those between coins know which of them are present."""

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, present) if isinstance(layer, EquivariantLinear) else layer(x)
        return x


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
        window, hidden, latent, layer = input_dim, hidden_dim, latent_dim, nn.Linear
        if coins:
            window, layer = (input_dim // coins, 0), EquivariantLinear
            hidden, latent = blocks_of(hidden_dim, coins), blocks_of(latent_dim, coins)
        self.encoder = Layers(layer(window, hidden), nn.GELU(), layer(hidden, latent))
        self.decoder = Layers(layer(latent, hidden), nn.GELU(), layer(hidden, window))

    def dims(self, coins: int) -> tuple[int, int, int]:
        """Return D, H and L with so many coins."""
        if not self.coins:
            return self.input_dim, self.hidden_dim, self.latent_dim
        first, _, second = self.encoder
        blocks = first.inputs, first.outputs, second.outputs
        return tuple(coins * coin + market for coin, market in blocks)

    def forward(self, windows: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return latent [B, L] and reconstruction [B, D] of windows [B, D] of coins `present` [B, N]."""
        latent = self.encoder(windows, present)
        return latent, self.decoder(latent, present)


Pca = tuple[Tensor, Tensor, Tensor]  # mean [D], orthonormal components [D, K], their scores' deviations [K]


def reducer_input(windows: FeatureWindows, tied: bool) -> tuple[int, int | None]:
    """Return how many values of how many coins (None: untied) a reducer takes: the most there are at once."""
    if windows.present is not None and not tied:
        raise UserError("coins that come and go need weights that any number of them share: use --tie-coins")
    return windows.input_dim // windows.coins * windows.most, windows.most if tied else None


def fit_pca(windows: Tensor, components: int) -> Pca:
    """Fit an exact PCA to windows [R, D], centred in place, through their Gram matrix (R is far below D)."""
    assert components < len(windows), "PCA needs more windows than components"
    mean = windows.mean(0)
    windows -= mean
    eigenvalues, vectors = torch.linalg.eigh((windows @ windows.T).double())  # ascending [R], [R, R]
    eigenvalues = eigenvalues[-components:].flip(0).clamp(min=1e-6)
    vectors = vectors[:, -components:].flip(1)
    basis = windows.T @ (vectors / eigenvalues.sqrt()).float()  # [D, K]
    return mean, basis, (eigenvalues / (len(windows) - 1)).sqrt().float()


@torch.no_grad()
def initialise_from_pca(reducer: FeatureReducer, mean: Tensor, basis: Tensor, std: Tensor) -> None:
    """Make the reducer compute the PCA [D, K = L], up to GELU(4 + s) - (4 + s): under 1e-3 for |s| < 0.5.

    Hidden unit k carries 4 + score_k / (2 std_k), where GELU is almost the identity; the next bias subtracts
    the 4 again. The latents are the scores (not whitened, so that noise stays small), divided by one number
    so that their average variance is 1. Hidden units beyond K start random, with outputs of weight 0.
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


def fit_tied_pca(windows: FeatureWindows, rows: Tensor, components: tuple[int, int]) -> tuple[Pca, Pca]:
    """Fit the PCA of a tied reducer to the windows of `rows` [R]: the best equivariant linear autoencoder.

    A linear map that treats all coins alike acts on their mean and on each coin's deviation from it apart.
    Latents of (coin, market) = `components` values keep coin + market components of the mean, since the coin
    blocks have a mean too, and the same `coin` components of every deviation. Returns `fit_pca` of the coins'
    mean, and of the deviations (of every N-th window: each has N of them).
    """
    (coin, market), shape, some = components, (windows.coins, -1), rows[:: windows.coins]
    means = [mean_present(windows(part).unflatten(1, shape), windows.there(part)) for part in rows.split(256)]
    deviations = windows(some).unflatten(1, shape)  # [R / N, N, P]
    deviations -= mean_present(deviations, windows.there(some)).unsqueeze(1)
    deviations = deviations.flatten(0, 1) if windows.present is None else deviations[windows.there(some)]
    return fit_pca(torch.cat(means), coin + market), fit_pca(deviations, coin)  # [R, P], [.., P]


@torch.no_grad()
def initialise_from_tied_pca(reducer: FeatureReducer, of_mean: Pca, of_deviation: Pca) -> None:
    """Make a tied reducer compute the PCA of `fit_tied_pca`, in the way of `initialise_from_pca`.

    A coin's hidden unit k carries 4 + deviation score_k / width_k + mean score_k / (another width_k).
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
    shift, units, market_units = 4.0, slice(coin), slice(hidden, hidden + market)
    wide, wide_common = 8**0.5 * deviation_std, 8**0.5 * std[:coin]  # 8: each coin's unit is the sum of two
    wide_own = 2.0 * std[coin:]

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
    third.shared.weight[units] = third.shared.weight[market_units] = 0.0
    set_own(third, units, units, (1 / gains[0]).diag(), (1 / gains[1]).diag())
    third.shared.weight[market_units, coin:] = (1 / gains[2]).diag()
    third.shared.bias[units] = third.shared.bias[market_units] = shift
    set_own(fourth, slice(None), units, deviation * wide, common * wide_common)
    fourth.shared.weight[:, market_units] = own * wide_own
    fourth.shared.bias.copy_(mean - shift * ((common * wide_common).sum(1) + (own * wide_own).sum(1)))


# ------------------------------------------------------------------------------------------------- evaluation


def reconstruction_metrics(
    reconstruct: Callable, windows: FeatureWindows, rows: Tensor, batch_size: int
) -> dict[str, float]:
    """Measure how well `reconstruct` ([B, D], coins present -> [B, D]) returns the windows of `rows` [R].

    mse: of the normalised values. explained_variance: 1 - mse / mean square, so that the training mean has 0;
    overall and per timeframe. accuracy: share of values within 0.1 standard deviations.
    """
    (errors, squares), accuracy, count = reconstruction_sums(reconstruct, windows, rows, batch_size)
    parts = {"explained_variance": slice(None)}
    parts |= {f"explained_variance_{timeframe}": part for timeframe, part in windows.slices.items()}
    shares = {name: 1 - float(errors[:, part].sum() / squares[:, part].sum()) for name, part in parts.items()}
    return {"mse": float(errors.sum()) / count, **shares, "accuracy": accuracy}


@torch.no_grad()
def reconstruction_sums(
    reconstruct: Callable, windows: FeatureWindows, rows: Tensor, batch_size: int
) -> tuple[Tensor, float, int]:
    """Return squared errors and values, summed over the windows [2, N, P], the share of errors below a tenth
    of a standard deviation, and how many values there are; none of absent coins."""
    sums, close, count = torch.zeros(2, windows.input_dim, dtype=torch.float64, device=rows.device), 0, 0
    for chunk in rows.split(batch_size):
        target, there = windows(chunk), windows.there(chunk)  # [B, D], [B, N]
        difference = reconstruct(target, there).float() - target
        sums += torch.stack([x.square().sum(0, dtype=torch.float64) for x in (difference, target)])
        errors = of_present(difference, there)
        close, count = close + int((errors.abs() < 0.1).sum()), count + errors.numel()
    return sums.view(2, windows.coins, -1).cpu(), close / count, count


def mean_square(difference: Tensor, there: Tensor | None) -> Tensor:
    """Return the mean square of differences [B, N x P] that are 0 for coins not present [B, N]."""
    mean = difference.square().mean()
    return mean if there is None else mean * there.numel() / there.sum().clamp(min=1)


def of_present(windows: Tensor, there: Tensor | None) -> Tensor:
    """Return those of the values [B, N x P] that belong to coins present [B, N]."""
    return windows if there is None else windows.unflatten(1, (there.shape[1], -1))[there]


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """Return at most `count` rows, evenly spread over `rows` [R]."""
    count = min(count, len(rows))
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]


def random_rows(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` rows of `rows` [R] (0: all) in random order; the same for a seed on any device."""
    permutation = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[permutation[: count or len(rows)].to(rows.device)]


# ----------------------------------------------------------------------------- checkpoints, of both trainings


Weights = dict[str, Tensor]
Span = Annotated[list[int], Field(min_length=2, max_length=2)]
Form = TypeVar("Form", bound="EncoderCheckpoint")
Splits = dict[str, Span]  # train, validation, test: first decision time and the one after the last, in ms


class Footer(TypedDict):
    """What the footers of the features say of what a checkpoint was trained on."""

    source: str
    symbols: list[str]
    channels: list[str]
    timeframes: dict[str, int]  # ms
    inputs: dict[str, str]  # SHA-256 of each coin's bars
    absent: bool  # coins may come and go
    universe: int  # so many of them are members, each month anew; 0: all
    member_days: int  # that a coin is there before it is one
    formulas_sha256: str
    splits: Splits


@with_config(ConfigDict(strict=True, arbitrary_types_allowed=True, extra="allow"))
class EncoderCheckpoint(TypedDict):
    """What every checkpoint holds: all that it takes to encode windows elsewhere."""

    kind: Literal["feature_reducer", "train"]
    schema: int
    scale: str
    dims: Annotated[list[Count], Field(min_length=3, max_length=3)]  # D, H, L
    coins: Count | None  # between which the weights are tied, at these dims; None: dense
    window_bars: list[Count]
    normalisation: Normalisation
    market: Footer
    reducer: Weights


class ReducerCheckpoint(EncoderCheckpoint):
    """feature_reducer.pt."""

    kind: Literal["feature_reducer"]
    metrics: NotRequired[dict[str, float]]  # on the validation split


@dataclass(kw_only=True)
class TrainingProgress:
    """Where a training stands; kept in its last.pt."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # and not strict: it comes as a dict

    skipped: Whole = 0  # optimizer steps, because of gradients that were not finite
    skipped_in_a_row: Whole = 0
    best_failed: StrictBool = False  # the last write of the best file: a resume tries again


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a .pt so that `path` is at every moment either the old file or the whole new one."""
    try:
        with getData.replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise UserError(f"cannot write {path} ({getData.one_line(error)}); free some space there") from None


class Saver:
    """Writes checkpoints; a write that fails is reported and remembered, and ends no training.

    A training's state is `due` again after so many minutes. In the folder `links` the name of each file
    stands for it from its first write on.
    """

    def __init__(self, minutes: float, links: Path | None = None) -> None:
        self.seconds, self.links, self.last_state = 60 * minutes, links, time.monotonic()
        self.failures: dict[Path, str] = {}  # of the last write of each file
        self.linked = set[Path]()

    def due(self) -> bool:
        """Return whether the time has come to write the state again."""
        return time.monotonic() - self.last_state >= self.seconds

    def write(self, path: Path, content: EncoderCheckpoint) -> bool:
        """Write a file; return whether it is on disk."""
        try:
            save_checkpoint(path, content)
        except UserError as error:
            self.failures[path] = f"{error}{'. The previous file is intact' * path.is_file()}"
            print(f"\nwarning: {self.failures[path]}; training goes on", file=sys.stderr, flush=True)
            return False
        self.failures.pop(path, None)
        if self.links and path not in self.linked:
            temporary = self.links / f".{path.name}.{os.getpid()}.tmp"
            try:
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(os.path.relpath(path, self.links))
                os.replace(temporary, self.links / path.name)
                self.linked.add(path)
            except OSError as error:
                print(f"warning: {self.links / path.name} is no link to {path} ({error})", file=sys.stderr)
        return True

    def exit_code(self, code: int = 0) -> int:
        """Return `code`, or 5 after a line for each file whose last write failed."""
        for path, reason in self.failures.items():
            print(f"error: {path} is not up to date: {reason}", file=sys.stderr)
        return 5 if self.failures else code


def load_checkpoint(path: Path, form: type[Form]) -> Form:
    """Read a .pt that `save_checkpoint` wrote, on the CPU; code in a pickle never runs.

    UserError: missing, truncated, damaged, foreign, of another schema, kind or `form`: what it must hold.
    """
    kinds = get_args(form.__annotations__["kind"])
    scripts = " or ".join(f"python {kind.removesuffix('_last')}.py" for kind in kinds)
    if not path.exists():
        raise UserError(f"there is no {path}; it is written by {scripts}")
    try:
        with zipfile.ZipFile(path) as parts:  # torch itself does not look at the checksums
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} is damaged")
        content = torch.load(str(path), map_location="cpu", weights_only=True)
        if content.get("schema") != _SCHEMA or content.get("kind") not in kinds:
            raise ValueError(f"{content['kind']} of schema {content['schema']}, not {kinds} of {_SCHEMA}")
        return TypeAdapter(form).validate_python(content)
    except _DAMAGE as error:
        reason = getData.one_line(error)
        advice = "free some" if "memory" in reason.lower() else f"move it away and run {scripts}"
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): {advice}") from None


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
        "market": {name: footer[name] for name in Footer.__annotations__},
        "reducer": reducer.state_dict(),
    }


def reducer_from_checkpoint(saved: EncoderCheckpoint, device: torch.device | str) -> FeatureReducer:
    """Build the reducer of a checkpoint on the device; its memory is allocated once."""
    with torch.device("meta"):
        reducer = FeatureReducer(*saved["dims"], saved["coins"])
    reducer.load_state_dict(saved["reducer"], assign=True)
    return reducer.to(device).requires_grad_(True)


def fixed_constants(constants: dict[str, object]) -> dict[str, object]:
    """Return those of a script's globals() that a resumed run must have too."""
    marks, job = getData.constant_marks(constants).items(), constants["JOB"]
    return {name: constants[name] for name, mark in marks if mark.mark != "free" and mark.has_job(job)}


def check_columns(saved: EncoderCheckpoint, footer: dict) -> None:
    """Refuse a checkpoint of other columns, or of other formulas of them; tied weights take any coins."""
    if saved["market"]["formulas_sha256"] != footer["formulas_sha256"]:
        raise UserError("the checkpoint is of features of other formulas than these: train on these anew")
    for name in ("channels", "timeframes") if saved["coins"] else ("symbols", "channels", "timeframes"):
        before, here = saved["market"][name], footer[name]
        if before != here:
            apart = [part for part in [*before, *here] if part not in before or part not in here]
            what = ", ".join(apart) or "their order"
            raise UserError(f"the features and the checkpoint differ in {name} ({what}): {_ANEW}")


def check_bars(saved: EncoderCheckpoint, footer: dict) -> None:
    """Refuse to resume on other bars or splits."""
    if any(saved["market"][name] != footer[name] for name in ("inputs", "splits")):
        raise UserError("--resume needs the bars and splits of the stopped run, these differ: start anew")


def check_market(saved: EncoderCheckpoint, footer: dict) -> None:
    """Refuse to train on from a checkpoint whose splits reach into later ones here, or of another market."""
    # Tied weights may come from any real market to another; made bars (synthetic, planted) mix with none.
    before, sources = saved["market"], (saved["market"]["source"], footer["source"])
    made = {source.partition(":")[0] for source in sources} & {"synthetic", "planted"}
    if sources[0] != sources[1] and (made or not saved["coins"]):
        raise UserError("the checkpoint was trained on {}, the features have {}: {}".format(*sources, _ANEW))
    for name, later in (("train", "validation"), ("validation", "test")):
        if before["splits"][name][1] > footer["splits"][later][0]:
            raise UserError(f"the checkpoint's {name} split reaches into the {later} split here: {_ANEW}")


# ----------------------------------------------------------------- start, features and stop of both trainings


def settle_constants(
    constants: dict[str, object], flags: dict[str, object], device: torch.device, before: dict[str, object]
) -> dict[str, object]:
    """Give the constants in a script's globals() the values of the scale, or of the run `before` to resume.

    Flags win at any scale, but must be what the run had. Returns the values that the run keeps although the
    script has others. Prints those, and the scale with all values that it has in place of the full ones.
    """

    def listed(values: dict[str, object]) -> str:
        return " ".join(f"{name}={getData.plain_text(value)}" for name, value in values.items())

    why = f" because the device is {device} (force it with --scale full or --scale small)"
    why *= constants["SCALE"] == "auto" and not before
    automatic = {"SCALE": ("small", "full"), "AMP": ("off", "on"), "SWEEPS": (0, 3)}  # on a CPU, on a GPU
    for name, pair in automatic.items():
        if constants.get(name) == "auto":
            constants[name] = pair[device.type == "cuda"]
    scale = before.get("SCALE", constants["SCALE"])
    scaled = {name: value.small for name, value in constants.items() if isinstance(value, Scaled)}
    getData.choose_scale(constants, scale)
    fixed = fixed_constants(constants)
    stays = {name: before[name] for name in fixed if before.get(name, fixed[name]) != fixed[name]}
    if given := {name: value for name, value in stays.items() if name in flags}:
        raise UserError(f"the run has {listed(given)}: leave the flag out, or begin another one")
    getData.assign_constants(constants, stays)
    small = {name: value for name, value in scaled.items() if constants[name] == value and scale == "small"}
    replaced = f"; in place of the full values: {listed(small)}" * bool(small)
    print(f"=== scale: {scale}{why}{replaced} ===", flush=True)
    if stays:
        print(f"the run goes on as it began, not as the script says now: {listed(stays)}")
    return stays


def pick_device(name: str, amp: str) -> tuple[torch.device, bool]:
    """Return the torch device called `name`, and whether to use float16 there; "auto" is a GPU with both."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"DEVICE {name!r} fails ({getData.one_line(error)}); use --device cpu") from None
    if device.index is not None:
        torch.cuda.set_device(device)
    return device, amp == "on" or (amp == "auto" and device.type == "cuda")  # a CPU is 6 x slower with it


def half_precision(device: torch.device, amp: bool) -> torch.autocast:
    """Return float16 autocast, where on; entered once around many steps it casts the weights only once."""
    return torch.autocast(device.type, torch.float16, enabled=amp)


@contextmanager
def training_folder(data_dir: Path, folder: Path, seed: int) -> Iterator[None]:
    """Keep other trainings out of the `folder` of a run's checkpoints; make the data where there is none."""
    with getData.locked(folder, "training"):
        for unfinished in folder.glob("*.pt.tmp"):  # of a training that was killed
            unfinished.unlink()
        with FileLock(data_dir / ".making.lock"):  # another training may be making it
            getData.ensure_data(data_dir, seed)
        yield


def load_windows(
    data_dir: Path, bars: Sequence[int], device: torch.device, saved: EncoderCheckpoint | None = None,
    splits: Splits | None = None,
) -> tuple[FeatureWindows, dict]:  # fmt: skip
    """Load features as windows normalised as `saved`, and their footer with `splits` in place of its own."""
    frames, footer = getData.load_features(data_dir)
    footer |= {"splits": splits or footer["splits"]}
    if saved:
        check_columns(saved, footer)
    members = None
    if footer["absent"]:
        members = getData.members_of(getData.load_prices(data_dir)[0], footer["symbols"])
    normalised = saved and saved["normalisation"], footer["splits"]["train"]
    windows = FeatureWindows(frames, bars, device, *normalised, members)
    first, stop = footer["splits"]["train"]  # from the first whole window on
    first = max(first, int(windows.times[windows.valid.argmax()]))
    return windows, footer | {"splits": footer["splits"] | {"train": [first, stop]}}


def pinned_folder(last: Path, inputs: dict[str, str]) -> Path:
    """Return the folder with the features of the bars `inputs` for the run of the checkpoint `last`."""
    text = json.dumps(inputs, sort_keys=True)
    return last.with_suffix(f".market-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


@contextmanager
def run_features(
    data_dir: Path, last: Path, saved: EncoderCheckpoint | None, others: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield the folder of a run's features, which a new run pins; getData.py writes none in the meantime."""
    with getData.features_lock(data_dir):
        if not saved:
            yield data_dir
            pin_features(data_dir, last, others)
        else:
            folder = pinned_folder(last, saved["market"]["inputs"])
            yield folder if folder.exists() else data_dir


def pin_features(data_dir: Path, last: Path, others: Sequence[Path] = ()) -> None:
    """Keep the features of a run, and `others` files, for its resumes, whatever getData.py makes later."""
    folder = pinned_folder(last, getData.load_prices(data_dir)[1]["inputs"])
    unfinished = folder.with_name(f"{folder.name}.tmp")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    (unfinished / "features").mkdir(parents=True)
    for path in [*(data_dir / "features").glob("*.parquet"), *others]:
        target = unfinished / ("" if path in others else "features") / path.name
        try:
            os.link(path.resolve(), target)  # which stays as it is when the file is replaced
        except OSError:  # the file system has none
            shutil.copyfile(path, target)
    unfinished.rename(folder)


def drop_other_pins(last: Path, footer: dict) -> None:
    """Remove the features of runs before the one that `last` holds now."""
    for old in last.parent.glob(f"{last.stem}.market-*"):
        if old != pinned_folder(last, footer["inputs"]):
            shutil.rmtree(old, ignore_errors=True)


def training_memory(reducer: FeatureReducer, coins: int, windows: int, amp: bool) -> dict[str, float]:
    """Return the bytes {what: bytes} that training a reducer takes, with batches of `windows` of `coins`."""
    parameters = list(reducer.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    values, hidden, _ = reducer.dims(coins)
    return {
        "parameters": weights,
        "gradients": weights,
        "optimizer": 4 * sum(sum(parameter.shape) for parameter in parameters),  # means of rows and columns
        "half-precision weights": weights / 2 * amp,
        "activations": 4 * windows * (4 * values + 8 * hidden),  # window, output, difference, gradient
    }


def check_room(
    needs: dict[str, float], used: float, device: torch.device, advice: str,
    folder: Path, files: dict[str, float],
) -> None:  # fmt: skip
    """Print the {what: bytes} that a run needs, and stop before it where memory or disk cannot hold it."""
    free = psutil.virtual_memory().available + used  # a checkpoint that is loaded takes some of them already
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    total = sum(needs.values())
    unit, power = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    listed = ", ".join(f"{name} {size / power:.2f}" for name, size in needs.items() if size)
    available = f"{free / 1e9:.1f} GB free on {device}"
    print(f"memory: {listed}; together {total / power:.2f} {unit} of {available}", flush=True)
    if total > free:
        raise UserError(f"not enough memory: {total / 1e9:.1f} GB needed, {available}; {advice}")
    present = {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in files}
    # each file is replaced by way of a temporary copy
    needed = sum(max(0.0, size - present[name]) for name, size in files.items()) + max(files.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        lack = f"{', '.join(files)} need {needed / 1e9:.1f} GB more in {folder}, {free / 1e9:.1f} GB are free"
        raise UserError(f"not enough disk: {lack}; free some, or use another --data-dir")


def resume_command(constants: dict[str, object], flags: dict[str, object]) -> str:
    """Return the command that goes on with this run: those of the flags that last.pt does not have."""
    marks, script = getData.constant_marks(constants), Path(constants["__file__"]).name
    free = {name: value for name, value in flags.items() if marks[name].mark == "free"} | {"RESUME": True}
    return shlex.join(["python", script, *(getData.flag_text(*flag) for flag in free.items())])


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a request to finish the batch; a second one ends at once."""

    def __init__(self) -> None:
        self.exit_code = 0  # after a request 128 + the signal's number
        self._actions = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            self._actions[signal.SIGHUP] = signal.SIG_DFL
        for number in self._actions:
            signal.signal(number, self._request)

    def close(self) -> None:
        """Restore the default action of signals."""
        for number, action in self._actions.items():
            signal.signal(number, action)

    def _request(self, number: int, _frame: object) -> None:
        # The terminal or a pipe to it is gone, and writing there an error; shell and kernel both send one.
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                if not stat.S_ISREG(os.fstat(stream).st_mode):
                    os.dup2(nowhere, stream)
            os.close(nowhere)
        elif self.exit_code:
            os._exit(128 + number)
        if not self.exit_code:
            self.exit_code = 128 + number
            text = "finishing the batch, then saving and stopping (Ctrl-C again: stop at once)"
            print(f"\n{text}", file=sys.stderr, flush=True)


@dataclass(kw_only=True)
class Run:
    """A training under way: where it stands, what moves its weights, and how it stops and is saved."""

    last: Path  # the file that a resume goes on from
    progress: TrainingProgress
    fixed: dict[str, object]  # constants that must be the same in a resumed run
    optimizers: Sequence[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    stop: StopSignal
    saver: Saver
    clock: list[float] = field(default_factory=list)  # at the ends of the first steps of this process

    def say_duration(self, bar: tqdm, steps: float) -> None:
        """Note that a step is over; after the fourth print how long the `steps` still to come take."""
        self.clock.append(time.monotonic())
        if len(self.clock) == 4:
            step = (self.clock[3] - self.clock[0]) / 3  # the first one takes longer
            minutes = max(1, steps * step / 60)
            bar.write(f"time: about {minutes:,.0f} min, as {steps:,.0f} steps of {step:.2f} s")
            print(end="", flush=True)

    def go_on(self, saved: EncoderCheckpoint) -> None:
        """Take over from what `save_last` wrote where the training stands, but for the weights."""
        self.progress = saved["progress"]
        self.scaler.load_state_dict(saved["scaler"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def save_last(self, content: EncoderCheckpoint) -> None:
        """Write all that it takes to go on later, with the weights of the checkpoint `content`."""
        state = {"kind": f"{content['kind']}_last", "progress": asdict(self.progress), "fixed": self.fixed}
        state |= {"scaler": self.scaler.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        if self.saver.write(self.last, content | state):
            drop_other_pins(self.last, content["market"])
        self.saver.last_state = time.monotonic()

    def save_best(self, path: Path, content: EncoderCheckpoint) -> bool:
        """Write the best so far; where that fails, return False, and a resume tries again."""
        self.progress.best_failed = not self.saver.write(path, content)
        return not self.progress.best_failed


class RunLog:
    """Writes metrics.csv and TensorBoard of one run; a resume drops the rows after `steps_done`."""

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        self.path, self.steps_done = folder / "metrics.csv", steps_done
        self.records: RecordWriter | None = None  # of TensorBoard, whose own writer takes seconds to import
        self.waiting: list[list[object]] = []
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines[1:] if re.fullmatch(rb"\d+,.*\s", line)]
        rows = [line for line in whole if int(line.split(b",")[0]) <= steps_done]
        self.header = lines[0].decode().strip().split(",") if rows else []
        if lines:  # the rows to keep stand first: truncating the file after them needs no disk space
            os.truncate(self.path, sum(map(len, lines[:1] + rows)) if rows else 0)
        for old in folder.glob("events.out.tfevents.*") if not steps_done else ():
            old.unlink()

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """Add a row: the step (from 1) and its metrics, always the same names; None: no value."""
        if not self.header:
            self.header = ["step", *values]
            self.waiting.append(self.header)
        assert self.header == ["step", *values]
        self.waiting.append([step, *values.values()])
        self.flush()
        points = [Summary.Value(tag=name, simple_value=x) for name, x in values.items() if x is not None]
        events = [{"step": step, "summary": Summary(value=points)}]
        try:
            if not self.records:
                path = self.path.with_name(f"events.out.tfevents.{time.time_ns()}.{os.getpid()}")
                self.records = RecordWriter(open(path, "ab", buffering=0))  # noqa: SIM115
                if self.steps_done:  # the points from here on, which an earlier process wrote, are void
                    events.insert(0, {"step": step, "session_log": SessionLog(status=SessionLog.START)})
                events.insert(0, {"file_version": "brain.Event:2"})
            for event in events:
                self.records.write(Event(wall_time=time.time(), **event).SerializeToString())
        except OSError as error:  # its file may end with half a record: the next step begins another
            self.records = None
            print(f"warning: no TensorBoard curves ({error}); training goes on", file=sys.stderr)

    def flush(self) -> None:
        """Write the rows that wait since they could not be written (a full disk)."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
    loss: Tensor, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler, max_norm: float, figures: dict[str, Tensor] | None = None,
    limits: dict[str, float] | None = None,
) -> tuple[list[float], bool, dict[str, float]]:  # fmt: skip
    """Run the backward pass, unless a CUDA graph has done so, clip each module in true units, and step.

    Where the norm of any module's gradient is not finite nothing moves, and the loss scale falls if a
    gradient itself is not finite; nor does it where one of the `figures` is over its limit. Returns the norms
    before clipping, whether the step was skipped, and the figures: a GPU is waited for once, for all of them.
    """
    if loss.requires_grad:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
    totals = []
    for module, optimizer in zip(modules, optimizers, strict=True):
        scaler.unscale_(optimizer)
        totals.append(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
    figures = figures or {}
    values = numbers_of([*figures.values(), *totals])
    numbers, norms = dict(zip(figures, values, strict=False)), values[len(figures) :]
    usable = all(map(math.isfinite, norms))
    if usable and not any(numbers[name] > limit for name, limit in (limits or {}).items()):
        for module, optimizer, norm in zip(modules, optimizers, totals, strict=True):
            # not by the scaler, which would wait to see what the norms have shown
            if getattr(optimizer, "takes_factor", False):
                optimizer.step(factor=(max_norm / (norm + 1e-6)).clamp(max=1.0))
            else:
                nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
                optimizer.step()
    scaler.update()
    return norms, not usable, numbers


def numbers_of(scalars: Iterable[Tensor]) -> list[float]:
    """Return scalars of the device as numbers, for which it is waited once."""
    return torch.stack([scalar.detach().double() for scalar in scalars]).tolist()


def make_adafactor(module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Make Adafactor (Shazeer & Stern 2018) with a fixed learning rate: factored second moment, no momentum.

    The one of `transformers`, with its state, which steps by `update_in_blocks`, and takes a factor of the
    gradients there, so that clipping needs no pass of its own. torch.optim.Adafactor scales steps by the
    parameter and so freezes what starts at zero.
    """
    from transformers.optimization import Adafactor  # here, for the import alone takes seconds

    class BlockAdafactor(Adafactor):
        takes_factor = True

        @torch.no_grad()
        def step(self, *, factor: float | Tensor = 1.0) -> None:
            (group,) = self.param_groups
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update_in_blocks(parameter, self.state[parameter], group, factor)

    return BlockAdafactor(module.parameters(), lr=learning_rate, scale_parameter=False, relative_step=False)


def update_in_blocks(parameter: Tensor, state: dict, group: dict, factor: float | Tensor) -> None:
    """Update a float32 parameter [R, C] or [C]: Shazeer & Stern, arXiv:1804.04235, algorithms 4 and 5.

    The library makes some twenty passes over each matrix and two temporaries of its size. Here three passes
    read the gradient in blocks of rows that stay in the cache.
    """
    gradient, shape = parameter.grad, parameter.shape
    factored = len(shape) == 2
    if not state:
        rows_and_columns = {"exp_avg_sq_row": shape[:1], "exp_avg_sq_col": shape[1:]}
        means = rows_and_columns if factored else {"exp_avg_sq": shape}
        state |= {"step": 0} | {name: gradient.new_zeros(size) for name, size in means.items()}
    state["step"] += 1
    decay = 1.0 - math.pow(state["step"], group["decay_rate"])
    epsilon = group["eps"][0]

    rows, columns = shape if factored else (1, parameter.numel())  # a vector is a matrix of one row
    gradient, weight = gradient.view(rows, columns), parameter.view(rows, columns)
    cuda = gradient.is_cuda and torch.cuda.get_device_properties(gradient.device)
    height = max(1, (cuda.L2_cache_size // 4 if cuda else _CPU_BLOCK) // (4 * columns))
    blocks = [slice(row, row + height) for row in range(0, rows, height)]
    buffer = gradient.new_empty(min(height, rows), columns)
    if factored:
        row_mean, column_sum = gradient.new_empty(rows), gradient.new_zeros(columns)
        for part in blocks:
            square = torch.mul(gradient[part], gradient[part], out=buffer[: len(gradient[part])])
            row_mean[part] = square.mean(1)
            column_sum += square.sum(0)
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row.mul_(decay).add_(factor**2 * row_mean + epsilon, alpha=1 - decay)
        column.mul_(decay).add_(factor**2 / rows * column_sum + epsilon, alpha=1 - decay)
        row_factor = (row / row.mean()).rsqrt().unsqueeze(1)  # [R, 1]
        column_factor = factor * column.rsqrt()  # [C]
    else:
        square = state["exp_avg_sq"]
        square.mul_(decay).add_((factor * parameter.grad).square() + epsilon, alpha=1 - decay)
        row_factor, column_factor = gradient.new_ones(1, 1), factor * square.rsqrt().view(columns)

    total = gradient.new_zeros((), dtype=torch.float64)
    for part in blocks:
        update = torch.mul(gradient[part], column_factor, out=buffer[: len(gradient[part])])
        total += (torch.linalg.vector_norm(update, dim=1) * row_factor[part, 0]).square().sum()
    root_mean_square = (total / gradient.numel()).sqrt().float()
    row_factor = row_factor * (group["lr"] / (root_mean_square / group["clip_threshold"]).clamp(min=1.0))
    for part in blocks:
        update = torch.mul(gradient[part], column_factor, out=buffer[: len(gradient[part])])
        weight[part].addcmul_(update, row_factor[part], value=-1.0)


class Diverged(UserError):
    """A training whose numbers are no longer finite."""


def check_finite(
    loss: float, scaler: torch.amp.GradScaler | None, modules: dict[str, nn.Module], what: str,
    tensors: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Stop on a non-finite loss, unless a scaler skips the step and can still lower its scale."""
    if math.isfinite(loss) or (scaler and scaler.is_enabled() and scaler.get_scale() > 1.0):
        return
    bad = first_bad_tensor(modules, tensors)
    raise Diverged(f"the loss is {loss} {what}: {bad}; lower the learning rates")


def count_skipped(
    progress: TrainingProgress, skipped: int, steps: int, modules: dict[str, nn.Module], what: str
) -> None:  # fmt: skip
    """Count the `skipped` ones of `steps` optimizer steps; stop where no loss scale can be the reason."""
    progress.skipped += skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + skipped if skipped == steps else 0
    if progress.skipped_in_a_row > _MAX_SKIPPED:
        bad = first_bad_tensor(modules)
        raise Diverged(f"{progress.skipped_in_a_row} steps in a row were skipped {what}: {bad}")


def first_bad_tensor(modules: dict[str, nn.Module], tensors: dict[str, Tensor] | None = None) -> str:
    """Name the first parameter that is not finite; without one, the first of `tensors`, then gradient."""
    parts = [(f"{name}.{part}", p) for name, one in modules.items() for part, p in one.named_parameters()]
    on_the_way = [(f"the {name}", tensor) for name, tensor in (tensors or {}).items()]
    gradients = [(f"the gradient of {name}", p.grad) for name, p in parts if p.grad is not None]
    for name, tensor in [*parts, *on_the_way, *gradients]:
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    return "all parameters are finite"


# ------------------------------------------------------------------------------------ this script's own steps


def load_encoder(path: Path) -> EncoderCheckpoint:
    """Load what a checkpoint of this script, or of train.py, says of its one encoder."""
    saved = load_checkpoint(path, EncoderCheckpoint)
    if saved.get("others"):
        raise UserError(f"{path} is an ensemble with several encoders: name one of its agents")
    return saved


@torch.no_grad()
def compress(data_dir: Path, device: torch.device, amp: bool, batch_size: int) -> None:
    """Encode every complete window with CHECKPOINT's encoder into data/latents.parquet, a chunk at a time."""
    path = checkpoint_path(data_dir, CHECKPOINT)
    saved = load_encoder(path)
    reducer = reducer_from_checkpoint(saved, device)
    windows, footer = load_windows(data_dir, saved["window_bars"], device, saved)
    check_market(saved, footer)
    rows = torch.from_numpy(windows.valid.nonzero()[0]).to(device)
    *_, width = reducer.dims(windows.coins)
    close_time = pa.timestamp("ms", tz="UTC")
    schema = pa.schema([("close_time", close_time), *((f"z{k}", pa.float16()) for k in range(width))])
    about = {name: footer[name] for name in ("source", "inputs", "symbols")}
    schema = getData.with_footer(schema, about | {"checkpoint": path.name, "run": saved.get("run", "")})
    encodings = dict.fromkeys(schema.names, "BYTE_STREAM_SPLIT") | {"close_time": "DELTA_BINARY_PACKED"}
    packing = {"compression": "zstd", "use_dictionary": False, "column_encoding": encodings}
    target = data_dir / "latents.parquet"
    with getData.replacing(target) as file, pq.ParquetWriter(file, schema, **packing) as writer:
        for group in tqdm(rows.split(16 * batch_size), desc="compress", unit="group", disable=None):
            with half_precision(device, amp):
                chunks = ((windows(chunk), windows.there(chunk)) for chunk in group.split(batch_size))
                parts = [reducer.encoder(*chunk).half() for chunk in chunks]
            latent = torch.cat(parts).T.contiguous().cpu().numpy()  # [L, B]
            times = pa.array(windows.times[group.cpu().numpy()], close_time)
            writer.write_table(pa.Table.from_arrays([times, *map(pa.array, latent)], schema=schema))
    print(f"latents: {target} [{len(rows)}, {width}] float16")


@dataclass(kw_only=True)
class Progress(TrainingProgress):
    """Where the training of a reducer stands."""

    epoch: Whole = 0
    batch: Whole = 0  # of the epoch
    running: StrictFloat = 0.0  # exponential mean of the epoch's losses
    best: dict[str, StrictFloat] = field(default_factory=lambda: {"mse": math.inf})  # of feature_reducer.pt
    pca: dict[str, StrictFloat] = field(default_factory=dict)  # of the yardstick


class ReducerState(EncoderCheckpoint):
    """feature_reducer_last.pt."""

    kind: Literal["feature_reducer_last"]
    optimizers: list[dict]
    scaler: dict
    progress: Progress
    fixed: dict[str, object]  # constants that must be the same in a resumed run


def plan_memory(data_dir: Path, windows: FeatureWindows, amp: bool, new: bool) -> None:
    """Print what the training needs, and stop where memory or disk cannot hold it."""
    values, coins = reducer_input(windows, TIE_COINS)
    with torch.device("meta"):
        reducer = FeatureReducer(values, HIDDEN_DIM, LATENT_DIM, coins)
    needs = training_memory(reducer, windows.coins, BATCH_SIZE, amp)
    if new:  # the PCA is over before there are gradients
        sample = 3 * values / coins if coins else values  # values of one; tied: mean, deviation, their window
        pca = 4 * (PCA_WINDOWS + LATENT_DIM) * sample + 24 * PCA_WINDOWS**2
        needs["PCA, beyond these"] = max(0, pca - sum(needs.values()) + needs["parameters"])
    used = 0 if new else needs["parameters"] + needs["optimizer"]  # of the loaded checkpoint
    files = dict.fromkeys(("feature_reducer.pt", "feature_reducer_last.pt"), needs["parameters"])
    advice = "use --scale small, or lower --batch-size"
    check_room(needs, used, windows.device, advice, data_dir / "checkpoints", files)


def first_reducer(
    windows: FeatureWindows, train_rows: Tensor, validation_rows: Tensor
) -> tuple[FeatureReducer, dict[str, float]]:
    """Make the reducer to start from, and measure the PCA yardstick on the validation split."""
    values, coins = reducer_input(windows, TIE_COINS)
    reducer = FeatureReducer(values, HIDDEN_DIM, LATENT_DIM, coins).to(windows.device)
    hidden, latent = (blocks_of(width, coins) if coins else (width,) for width in (HIDDEN_DIM, LATENT_DIM))
    if INIT == "pca" and any(map(gt, latent, hidden)):  # blocks of a coin and the market
        raise UsageError(f"HIDDEN_DIM {hidden} below LATENT_DIM {latent}: raise it, or use --init random")
    count = min(PCA_WINDOWS, len(train_rows))
    print(f"PCA yardstick: {LATENT_DIM} components from {count} training windows", flush=True)
    if count <= LATENT_DIM:
        raise UserError(f"too few of PCA_WINDOWS, or too little history: more than {LATENT_DIM} are needed")
    rows = random_rows(train_rows, PCA_WINDOWS, SEED)
    pca = fit_tied_pca(windows, rows, latent) if coins else fit_pca(windows(rows), LATENT_DIM)
    if INIT == "pca":
        initialise = initialise_from_tied_pca if coins else initialise_from_pca
        initialise(reducer, *pca)

    def reconstruct(x: Tensor, there: Tensor | None) -> Tensor:
        if not coins:
            mean, basis, _ = pca
            return torch.addmm(mean, (x - mean) @ basis, basis.T)
        (mean, basis, _), (_, deviation, _) = pca
        x = x.unflatten(1, (windows.coins, -1))  # [B, N, P]
        middle = mean_present(x, there).unsqueeze(1)
        common = mean + (middle - mean) @ basis @ basis.T
        result = common + (x - middle) @ deviation @ deviation.T
        return (result if there is None else result * there.unsqueeze(-1)).flatten(1)

    return reducer, reconstruction_metrics(reconstruct, windows, validation_rows, BATCH_SIZE)


def train(data_dir: Path, device: torch.device, amp: bool, flags: dict[str, object]) -> int:
    """Train the reducer and keep the best by validation loss; return the exit code."""
    torch.manual_seed(SEED)
    stop = StopSignal()
    best, last = (data_dir / "checkpoints" / f"feature_reducer{part}.pt" for part in ("", "_last"))
    saved = load_checkpoint(last, ReducerState) if RESUME else None
    with run_features(data_dir, last, saved) as folder:
        windows, footer = load_windows(folder, WINDOW_BARS, device, saved)
    train_rows = windows.rows(footer["splits"]["train"], "training")
    validation_rows = spread_rows(windows.rows(footer["splits"]["validation"], "validation"), 4_096)
    shape = f"{windows.input_dim:,} -> {HIDDEN_DIM:,} -> {LATENT_DIM:,}"
    print(f"reducer: {shape} ({windows.input_dim / LATENT_DIM:.1f}x), market: {footer['source']}")
    plan_memory(data_dir, windows, amp, not saved)
    if saved:
        check_bars(saved, footer)
        reducer, progress = reducer_from_checkpoint(saved, device), saved["progress"]
        if not best.exists():  # the reducer of this state is the first to be written there
            progress.best, progress.best_failed = {"mse": math.inf}, True
    else:
        progress = Progress(best_failed=True)  # there is none yet
        reducer, progress.pca = first_reducer(windows, train_rows, validation_rows)
    optimizer = make_adafactor(reducer, LEARNING_RATE)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    run = Run(
        last=last, progress=progress, fixed=fixed_constants(globals()), optimizers=[optimizer], scaler=scaler,
        stop=stop, saver=Saver(SAVE_MINUTES),
    )  # fmt: skip
    if saved:
        run.go_on(saved)
    del saved  # a second copy of the weights
    log = RunLog(data_dir / "runs" / "feature_reducer", progress.epoch)

    def checkpoint() -> ReducerCheckpoint:
        return reducer_checkpoint(reducer, windows, footer, SCALE)

    def validate(before: str = "") -> dict[str, float]:
        """Return the metrics of the reducer, which are printed; write it where it is the best so far."""
        with half_precision(device, amp):
            measured = windows, validation_rows, BATCH_SIZE
            metrics = reconstruction_metrics(lambda *x: reducer(*x)[1], *measured)
        check_finite(metrics["mse"], None, {"reducer": reducer}, "on the validation split")
        improved = metrics["mse"] < progress.best["mse"]
        if improved and run.save_best(best, checkpoint() | {"metrics": metrics}):
            progress.best = metrics
        figures = f"mse {metrics['mse']:.4f}  explained variance {metrics['explained_variance']:.4f}  "
        figures += f"accuracy {metrics['accuracy']:.4f}{'  *' * improved}"
        print(f"epoch {progress.epoch:3d}  {before}validation {figures}", flush=True)
        return metrics

    if progress.best_failed:
        validate()
        run.save_last(checkpoint())
    while progress.epoch < EPOCHS and not stop.exit_code:
        where = f"in epoch {progress.epoch + 1}"
        rows_of_epoch = random_rows(train_rows, WINDOWS_PER_EPOCH, SEED * 1_000_003 + progress.epoch + 1)
        batches = rows_of_epoch.split(BATCH_SIZE)  # the same ones when the epoch is resumed
        bar = progress_bar(len(batches), progress.batch, f"epoch {progress.epoch + 1}", "batch")
        for rows in batches[progress.batch :]:
            target, there = windows(rows), windows.there(rows)  # [B, D], [B, N]
            with half_precision(device, amp):
                _, reconstruction = reducer(target, there)
            loss = mean_square(reconstruction.float() - target, there)
            figures = {"mse": loss}
            _, skipped, numbers = clipped_step(loss, [reducer], [optimizer], scaler, _MAX_NORM, figures)
            value, tensors = numbers["mse"], {"windows": target, "reconstruction": reconstruction}
            check_finite(value, scaler, {"reducer": reducer}, where, tensors)
            count_skipped(progress, int(skipped), 1, {"reducer": reducer}, where)
            progress.running = 0.95 * progress.running + 0.05 * value if progress.running else value
            progress.batch += 1
            bar.update()
            run.say_duration(bar, (EPOCHS - progress.epoch) * len(batches) - progress.batch)
            bar.set_postfix(mse=f"{progress.running:.4f}")
            if stop.exit_code:
                break
            if run.saver.due():
                run.save_last(checkpoint())
        bar.close()
        if progress.batch < len(batches):
            break
        progress.epoch += 1
        metrics = validate(f"train mse {progress.running:.4f}  ")
        row = {"train_mse": progress.running, **{f"validation_{name}": x for name, x in metrics.items()}}
        log.add(progress.epoch, {**row, "skipped_steps": progress.skipped})
        progress.batch, progress.running = 0, 0.0
    run.save_last(checkpoint())
    log.flush()
    if stop.exit_code:
        print(f"stopped in epoch {progress.epoch + 1}; go on with: {resume_command(globals(), flags)}")
        return run.saver.exit_code(stop.exit_code)

    print(f"\n{'validation split':32s}{'reducer':>10s}{f'PCA {LATENT_DIM}':>10s}")
    for name, value in progress.pca.items():
        print(f"{name + ':':32s}{progress.best.get(name, math.nan):10.4f}{value:10.4f}")
    print(f"checkpoint: {best}")
    return run.saver.exit_code()


def main(argv: list[str] | None = None) -> int:
    flags = getData.set_constants(globals(), argv)
    device, amp = pick_device(DEVICE, AMP)
    if JOB == "compress":  # the checkpoint has its own scale
        compress(DATA_DIR, device, amp, BATCH_SIZE)
        return 0
    last = DATA_DIR / "checkpoints" / "feature_reducer_last.pt"
    before = load_checkpoint(last, ReducerState)["fixed"] if RESUME and last.exists() else {}
    settle_constants(globals(), flags, device, before)
    with training_folder(DATA_DIR, DATA_DIR / "checkpoints", SEED):
        return train(DATA_DIR, device, AMP == "on", flags)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    getData.run_script(main)
