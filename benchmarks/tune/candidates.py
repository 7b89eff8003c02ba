"""Launch configurations worth a try."""

import itertools
from collections.abc import Iterator
from dataclasses import fields

from pmkernels.configs import Config

CONFIG_FIELDS = fields(Config)


def describe(config: Config) -> str:
    """Return the fields that are not as a Config has them by default."""
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in sparse(config).items())


def sparse(config: Config) -> dict[str, int]:
    """Return a Config as files have it. Tile sizes that are used, warps and stages, and what is not the default."""
    always = ("num_warps", "num_stages")
    return {
        f.name: getattr(config, f.name)
        for f in CONFIG_FIELDS
        if f.name in always or getattr(config, f.name) != f.default
    }


def candidates(op: str, kind: str, max_rows: int | None) -> Iterator[Config]:
    """Yield launch configurations worth a try, the likelier ones first."""
    exact = kind == "float32"
    tiles: tuple[tuple[int, int, int], ...]
    if op == "linear" and kind == "16-bit":
        first, second = {32: (32, 16), 128: (64, 128), 256: (64, 128), 512: (128, 64), None: (128, 256)}[max_rows]
        tiles = ((64, 64, 8), (64, 128, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4))
        depths = ((8, 1), (4, 1), (1, 2))
        for block_m, of, ways in ((first, tiles, depths), (second, tiles[:3], depths[:2])):
            for (n, d, warps), (unroll, stages) in itertools.product(of, ways):
                yield Config(block_m, n, d, warps, stages, unroll)
    elif op == "linear":
        tiles = (
            ((64, 16, 8), (64, 32, 8), (32, 32, 4), (64, 16, 4)) if exact else ((64, 32, 8), (64, 16, 8), (128, 32, 8))
        )
        blocks = (32, 64) if exact else (64, 128)
        for block_m, (n, d, warps), (unroll, stages) in itertools.product(blocks, tiles, ((1, 2), (4, 1))):
            yield Config(block_m, n, d, warps, stages, unroll)
    elif op == "weight_grad" and kind == "16-bit":
        tiles = ((64, 128, 8), (128, 128, 8), (64, 128, 4), (128, 256, 8), (64, 256, 8), (64, 64, 4))
        for stages, block_m, (n, d, warps) in itertools.product((3, 4), (64, 32), tiles):
            yield Config(block_m, n, d, warps, stages)
    elif op == "weight_grad":
        tiles = (
            ((64, 64, 8), (64, 128, 8), (64, 64, 4))
            if exact
            else ((64, 64, 8), (64, 128, 8), (128, 128, 8), (64, 64, 4))
        )
        for stages, block_m, (n, d, warps) in itertools.product((2, 3), (32, 16) if exact else (32, 64), tiles):
            yield Config(block_m, n, d, warps, stages)
    elif op == "merge":
        tiles = ((16, 128, 4), (8, 256, 4), (32, 64, 4), (32, 128, 8), (16, 256, 8), (4, 512, 4), (64, 64, 8))
        for (n, d, warps), (unroll, stages) in itertools.product(tiles, ((8, 1), (4, 1), (1, 2))):
            yield Config(0, n, d, warps, stages, unroll)
    elif op == "merge_grad":
        # blocks of 64 and more: the partial sums of P and Q stay below a weight
        for n, d, warps in itertools.product((64, 128), (64, 128), (4, 8)):
            yield Config(16, n, d, warps, 2)
    elif op == "preference":
        # few rows: weights are read, by many programs with many loads in flight; many: large tiles
        tiles = ((64, 128, 4), (64, 64, 4), (32, 128, 4), (128, 64, 4), (64, 128, 8))
        if max_rows is None:
            tiles = ((128, 64, 8), (256, 64, 8), (128, 64, 4), (64, 64, 4))
        around: tuple[int, ...] = {32: (32, 16), 512: (64, 32, 128)}.get(max_rows or 0, (128, 256))
        for block_m, (n, d, warps), stages in itertools.product(around, tiles, (3, 4)):
            yield Config(block_m, n, d, warps, stages)
    elif op == "widen":
        for block_m, d, warps, stages in itertools.product((32, 64, 16), (64, 128), (4, 8), (3, 2)):
            yield Config(block_m=block_m, block_d=d, num_warps=warps, num_stages=stages)
    elif op == "shrink":
        for block_m, d, warps, stages in itertools.product((64, 32, 128), (64, 128), (4, 8), (3, 2)):
            yield Config(block_m=block_m, block_d=d, num_warps=warps, num_stages=stages)
    elif op == "factor_grad":
        for block_m, n, warps, stages in itertools.product((64, 32, 128), (64, 128), (4, 8), (3, 2)):
            yield Config(block_m=block_m, block_n=n, num_warps=warps, num_stages=stages)
