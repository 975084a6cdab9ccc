"""Near-duplicates among the 34 channels: python tests/benchmarks/channel_redundancy.py FOLDER

FOLDER holds recorded 5-minute bars, one file per symbol. For every timeframe and pair of channels: the larger
of |Pearson| and |Spearman| over all rows of all coins after the warm-up. Above 0.97 a channel should be
replaced.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))
import getData


def redundancy(channels: pd.DataFrame) -> pd.Series:
    """Return max(|Pearson|, |Spearman|) of every pair of columns, largest first."""
    both = np.maximum(channels.corr().abs(), channels.rank().corr().abs()).to_numpy()
    rows, columns = np.triu_indices(len(both), 1)
    pairs = [f"{channels.columns[i]} - {channels.columns[j]}" for i, j in zip(rows, columns, strict=True)]
    return pd.Series(both[rows, columns], pairs).sort_values(ascending=False)


def main() -> None:
    folder = Path(sys.argv[1])
    symbols = sorted({getData.symbol_name(path.stem) for path in folder.glob("*.*")} - {"README"})
    raw = {
        symbol: getData.validate_bars(symbol, bars)
        for symbol, bars in getData.recorded_bars(folder, symbols).items()
    }
    raw = {symbol: bars.set_index("timestamp") for symbol, bars in raw.items()}
    for timeframe, period in getData.TIMEFRAMES.items():
        parts = []
        for bars in raw.values():
            grid = pd.date_range(bars.index[0], bars.index[-1], freq="5min", unit="ms")
            filled = getData.fill_gaps(bars, grid)
            parts.append(getData.compute_channels(getData.resample(filled, period)).dropna())
        pairs = redundancy(pd.concat(parts))
        print(
            f"{timeframe}: {sum(map(len, parts)):,} rows, {(pairs > 0.97).sum()} pairs above 0.97; largest:"
        )
        print(pairs.head(8).round(3).to_string(), "\n")


if __name__ == "__main__":
    main()
