"""What the flow solver and the flow models cost against the obvious way, in one run.

python benchmarks/flow.py [--cells 64] [--cases 16] [--steps 20] [--rounds 3]

step       a cavity's time step: all cases as one batch, one case after another, and the same scheme
           in NumPy with SciPy's cosine transform for the pressure, case after case; checked to give
           the same velocities
poisson    the pressure equation alone: products with the eigenvectors (all cases at once) against
           SciPy's cosine transform and against a sparse LU factored beforehand
deeponet   a whole frame: the fast path, branch and trunk computed once, against one query at a
           time (a sample of queries, extrapolated)

float64 on one thread, seconds of the processor, medians over rounds; the ratio is the other's time
over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.fft import dctn, idctn
from scipy.sparse.linalg import splu

from pantarhei.data.simulate.flow import Flow, Side
from pantarhei.data.simulate.poisson import Laplacian
from pantarhei.systems.flow import model
from pantarhei.systems.flow._layers import grid_points


def cavity_numpy(n: int, nu: float, dt: float, steps: int) -> np.ndarray:
    """The scheme of the library's solver for one cavity with a lid of speed 1; returns u."""
    h = 1 / n
    u, v, old = np.zeros((n, n + 1)), np.zeros((n + 1, n)), None
    k = 2 * np.cos(np.pi * np.arange(n) / n) - 2
    eigenvalues = (k[:, None] + k) / h**2
    eigenvalues[0, 0] = 1.0

    def padded(q: np.ndarray, normal: bool, wall: float) -> np.ndarray:
        low, high = (-q[2:0:-1], -q[-2:-4:-1]) if normal else (-q[1::-1], 2 * wall - q[:-3:-1])
        return np.concatenate([low, q, high])

    def along(q: np.ndarray, c: np.ndarray, normal: bool, wall: float = 0.0) -> np.ndarray:
        wide, m = padded(q, normal, wall), len(c)
        a, b, mid, d, e = (wide[i : i + m] for i in range(5))
        central, biased = 4 * (d - b) - (e - a), a + e - 4 * (b + d) + 6 * mid
        return nu * (b + d - 2 * mid) / h**2 - (c * central + np.abs(c) * biased) / (4 * h)

    def mean_of_four(q: np.ndarray, lid: float = 0.0) -> np.ndarray:
        wide = np.concatenate([-q[:1], q, 2 * lid - q[-1:]])
        mean = (wide[1:] + wide[:-1]) / 2
        return (mean[:, 1:] + mean[:, :-1]) / 2

    for _ in range(steps):
        ru = along(u.T, u.T, True).T + along(u, mean_of_four(v.T).T, False, 1.0)
        rv = along(v.T, mean_of_four(u, 1.0).T, False).T + along(v, v, True)
        du, dv = (ru, rv) if old is None else (1.5 * ru - 0.5 * old[0], 1.5 * rv - 0.5 * old[1])
        u, v, old = u + dt * du, v + dt * dv, (ru, rv)
        u[:, [0, -1]], v[[0, -1]] = 0, 0
        spectrum = dctn((np.diff(u, axis=1) + np.diff(v, axis=0)) / h, norm="ortho") / eigenvalues
        spectrum[0, 0] = 0
        phi = idctn(spectrum, norm="ortho")
        u[:, 1:-1] -= np.diff(phi, axis=1) / h
        v[1:-1] -= np.diff(phi, axis=0) / h
    return u


def cavities(n: int, nu: torch.Tensor, dt: float, steps: int) -> torch.Tensor:
    """The library's solver for a batch of cavities; returns u."""
    h = torch.full_like(nu, 1 / n)
    flow = Flow((n, n), h, h, nu, top=Side("wall", 1.0))
    state, dts = flow.start(), torch.full_like(nu, dt)
    for _ in range(steps):
        state = flow.step(state, dts)
    return state.u


def timed(run: Callable[[], object], rounds: int) -> float:
    """Return the median processor time of some rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


def report(name: str, ours: float, others: dict[str, float], note: str = "") -> None:
    """Print a line for each rival."""
    print(f"{name}: ours {ours:.4f} s{note}")
    for other, seconds in others.items():
        print(f"  against {other}: {seconds:.4f} s, ratio {seconds / ours:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("cells", 64), ("cases", 16), ("steps", 20), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(1)
    n, rounds = a.cells, a.rounds
    nu = torch.linspace(1 / 400, 1 / 100, a.cases, dtype=torch.float64)
    dt = 0.05 / n

    slow = [cavity_numpy(n, float(one), dt, a.steps) for one in nu]
    gap = np.abs(cavities(n, nu, dt, a.steps).numpy() - np.stack(slow)).max()
    ours = timed(lambda: cavities(n, nu, dt, a.steps), rounds)
    updates = a.cases * n * n * a.steps
    others = {
        "one case after another": timed(
            lambda: [cavities(n, nu[i : i + 1], dt, a.steps) for i in range(a.cases)], rounds
        ),
        "NumPy and SciPy": timed(
            lambda: [cavity_numpy(n, float(one), dt, a.steps) for one in nu], rounds
        ),
    }
    note = f", {updates / ours / 1e6:.2f} million cell updates/s (u differs by {gap:.1e})"
    report("step", ours, others, note)

    h = torch.full((a.cases,), 1 / n, dtype=torch.float64)
    f = torch.randn(a.cases, n, n, dtype=torch.float64)
    laplace = Laplacian((n, n), h, h)
    k = (2 * np.cos(np.pi * np.arange(n) / n) - 2) * n**2
    eigenvalues = k[:, None] + k
    eigenvalues[0, 0] = np.inf
    line = sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n)).tolil()
    line[0, 0] = line[-1, -1] = -1
    whole = (sparse.kronsum(line, line) * n**2).tolil()
    whole[0, 0] -= 1.0  # pins one cell
    factors, flat = splu(whole.tocsc()), f.flatten(1).numpy().T.copy()
    dct = {
        "SciPy's cosine transform": timed(
            lambda: idctn(dctn(f.numpy(), axes=(1, 2)) / eigenvalues, axes=(1, 2)), rounds
        ),
        "sparse LU, factored before": timed(lambda: factors.solve(flat), rounds),
    }
    report("poisson", timed(lambda: laplace.solve(f), rounds), dct)

    net, omega, t = model("deeponet", 5, (n, n)), torch.randn(a.cases, 5), torch.ones(a.cases)
    points = grid_points((n, n))
    with torch.no_grad():
        fast = timed(lambda: net.predict_frame(t, omega), rounds)
        some = points[:: max(1, len(points) // 32)]
        single = timed(lambda: [net.predict(q[None], t, omega) for q in some], rounds)
    report("deeponet", fast, {"one query at a time": single * len(points) / len(some)})


if __name__ == "__main__":
    main()
