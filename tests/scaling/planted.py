"""Runs whose law is known, for the tests of `vidgen fit`."""

import csv

import numpy as np

from vidgen.scaling.table import Run

LAW = np.array([0.16, 2.1, 18.0, 0.33, 0.31])  # E, A, B, α, β
BUDGETS = (2e12, 8e12, 3e13, 1e14, 3e14)


def loss(law, n, d):
    e, a, b, alpha, beta = law
    return e + a / n**alpha + b / d**beta


def per_token(n):
    """FLOPs of a token: more than 6N, by a factor that falls as sizes grow."""
    return 14.0 * np.asarray(n, float) ** 0.95


def sweep(law=LAW, noise=0.004, seed=0, budgets=BUDGETS, sizes=6, ratio=400.0, named=True):
    """Runs at equal FLOPs, sizes about the best."""
    rng = np.random.default_rng(seed)
    runs = []
    for c in budgets:
        for i, factor in enumerate(np.geomspace(0.25, 4, sizes)):
            n = float(np.sqrt(c / 6 / ratio) * factor)
            d = float(c / per_token(n))
            y = float(loss(law, n, d) * np.exp(noise * rng.standard_normal()))
            runs.append(Run(f"c{c:.0e}-{i}", n, d, c, y, budget=c if named else None))
    return runs


def design(decades=3.0, first=1e12):
    """([30] N, [30] D): six sizes at each of five budgets over so many decades."""
    c = np.repeat(np.geomspace(first, first * 10**decades, 5), 6)
    n = np.sqrt(c / 6 / 100) * np.tile(np.geomspace(0.25, 4, 6), 5)
    return n, c / (6 * n)


def draw_law(rng, n, d):
    """A law whose two terms are of the size of E or somewhat less, in the middle of the runs."""
    alpha, beta = rng.uniform(0.2, 0.8, 2)
    a, b = rng.uniform(0.1, 1.0, 2) * np.exp([alpha * np.log(n).mean(), beta * np.log(d).mean()])
    return np.array([rng.uniform(0.1, 2.0), a, b, alpha, beta])


def bound(law, n, d, noise):
    """[5]: Cramér and Rao's bound on the standard deviation of E, A, B, α, β: no unbiased fit is better."""
    e, a, b, alpha, beta = law
    y = loss(law, n, d)
    by = [np.ones_like(n), n**-alpha, d**-beta, -a * n**-alpha * np.log(n), -b * d**-beta * np.log(d)]
    scaled = np.stack(by) / y * law[:, None]  # of log parameters, for the sake of the inverse
    return np.sqrt(np.diag(np.linalg.inv(scaled @ scaled.T / noise**2))) * law


def write(path, runs, **columns):
    """A CSV of runs; `columns`: name → values."""
    names = ["name", "parameters", "tokens", "flops", "loss", "budget"]
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow([*names, *columns])
        for i, r in enumerate(runs):
            writer.writerow([getattr(r, n) if getattr(r, n) is not None else "" for n in names]
                            + [values[i] for values in columns.values()])  # fmt: skip
    return str(path)
