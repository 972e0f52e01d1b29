"""Cell-updates per second of the simulators of fields, against NumPy and SciPy, in one run.

python benchmarks/simulators.py [--size 64] [--cases 16] [--rounds 3] [--device cpu|cuda]

The baseline is what one writes without the library: the same scheme with NumPy arrays, SciPy's
``map_coordinates``, ``dctn`` and FFTs, one case after another. Both advance the same cases by the
same number of steps in turns. Printed are cell-updates per second (cells x steps x cases over
seconds of the processor, of the clock on a device; a step of the compressible solver is one of its
own), their ratio, and by how much the two results differ relative to the largest value. Smoke is
in float32, as the simulator's own default, the others in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
from scipy.ndimage import map_coordinates

from pantarhei.data.simulate import compressible as gas
from pantarhei.data.simulate.compressible import Compressible
from pantarhei.data.simulate.shallow_water import ShallowWater
from pantarhei.data.simulate.smoke import Smoke


def numpy_smoke(box: Smoke, s: np.ndarray, b: float, steps: int) -> np.ndarray:
    n, dx, dt = box.size, box.dx, box.dt
    u, v = np.zeros((n, n + 1), s.dtype), np.zeros((n + 1, n), s.dtype)
    k = 2 * np.cos(np.pi * np.arange(n) / n) - 2
    eigenvalues = (k[:, None] + k) / dx**2
    eigenvalues[0, 0] = np.inf

    def carried(q, up, right, mode):
        y, x = np.mgrid[: q.shape[0], : q.shape[1]].astype(s.dtype)
        where = (y - up * dt / dx, x - right * dt / dx)
        # constant fades to zero within a cell of the border, as bilinear with zeros outside does
        return map_coordinates(q, where, order=1, mode=mode, prefilter=False)

    for _ in range(steps):
        vc, uc = (v[1:] + v[:-1]) / 2, (u[:, 1:] + u[:, :-1]) / 2
        s = carried(s, vc, uc, "nearest")
        v_on_u = np.pad((vc[:, 1:] + vc[:, :-1]) / 2, ((0, 0), (1, 1)))
        u_on_v = np.pad((uc[1:] + uc[:-1]) / 2, ((1, 1), (0, 0)))
        u, v = carried(u, v_on_u, u, "grid-constant"), carried(v, v, u_on_v, "grid-constant")
        v[1:-1] += dt * b * (s[1:] + s[:-1]) / 2
        u, v = (
            q + dt * box.viscosity / dx**2 * (
                p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * q
            )
            for q, p in ((u, np.pad(u, 1)), (v, np.pad(v, 1)))
        )  # fmt: skip
        u[:, [0, -1]], v[[0, -1]] = 0, 0
        div = (np.diff(u, axis=1) + np.diff(v, axis=0)).astype(np.float64) / dx
        p = scipy.fft.idctn(scipy.fft.dctn(div, norm="ortho") / eigenvalues, norm="ortho")
        u[:, 1:-1] -= (np.diff(p, axis=1) / dx).astype(s.dtype)
        v[1:-1] -= (np.diff(p, axis=0) / dx).astype(s.dtype)
    return s


def numpy_water(sea: ShallowWater, state: np.ndarray, steps: int) -> np.ndarray:
    n = sea.size
    my, mx = np.fft.fftfreq(n, 1 / n)[:, None], np.fft.rfftfreq(n, 1 / n)
    largest = np.maximum(abs(my), abs(mx)) / (n / 3)
    keep, decay = largest < 1, np.exp(-36 * largest**18)
    ky, kx = 2 * np.pi / sea.length * my, 2 * np.pi / sea.length * mx
    rfft, irfft = scipy.fft.rfft2, lambda z: scipy.fft.irfft2(z, s=(n, n))

    def tendency(z):
        h, u, v = (irfft(part) for part in z)
        spin = 1 + irfft(1j * (kx * z[2] - ky * z[1]))
        hu, hv, sv, su = (keep * rfft(q) for q in ((1 + h) * u, (1 + h) * v, spin * v, spin * u))
        head = keep * rfft(h + (u * u + v * v) / 2)
        return np.stack([-1j * (kx * hu + ky * hv), sv - 1j * kx * head, -su - 1j * ky * head])

    z, dt = rfft(state), sea.dt
    for _ in range(steps):
        k1 = tendency(z)
        k2 = tendency(z + dt / 2 * k1)
        k3 = tendency(z + dt / 2 * k2)
        k4 = tendency(z + dt * k3)
        z = decay * (z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return irfft(z)


def numpy_gas(conserved: np.ndarray, dts: np.ndarray, dx: float) -> np.ndarray:
    g = gas.GAMMA

    def primitive(c):
        rho, mx, my, e = c
        p = (g - 1) * (e - (mx**2 + my**2) / (2 * rho))
        return np.stack([rho, mx / rho, my / rho, np.maximum(p, 1e-4)])

    def flux(w, axis):
        forward = np.roll(w, -1, axis) - w
        backward = np.roll(forward, 1, axis)
        slope = np.minimum(2 * np.minimum(abs(forward), abs(backward)), abs(forward + backward) / 2)
        slope = np.where(forward * backward > 0, slope * np.sign(forward), 0) / 2
        left, right = w + slope, np.roll(w - slope, -1, axis)
        (rl, ul, _, pl), (rr, ur, _, pr) = left, right
        cl, cr = np.sqrt(g * pl / rl), np.sqrt(g * pr / rr)
        sl, sr = np.minimum(ul - cl, ur - cr), np.maximum(ul + cl, ur + cr)
        ml, mr = rl * (sl - ul), rr * (sr - ur)
        sm = (pr - pl + ml * ul - mr * ur) / (ml - mr)
        side = sm >= 0
        rho, u, v, p = np.where(side, left, right)
        s, m = np.where(side, sl, sr), np.where(side, ml, mr)
        e = p / (g - 1) + rho * (u * u + v * v) / 2
        star = m / (s - sm)
        jump = np.stack([star - rho, star * sm - rho * u, star * v - rho * v,
                         star * (e / rho + (sm - u) * (sm + p / m)) - e])  # fmt: skip
        f = np.stack([rho * u, rho * u * u + p, rho * u * v, (e + p) * u])
        return f + np.where(side, np.minimum(s, 0), np.maximum(s, 0)) * jump

    def outflow(c):
        w = primitive(c)
        fx, fy = flux(w, 2), flux(w[[0, 2, 1, 3]], 1)[[0, 2, 1, 3]]
        return (fx - np.roll(fx, 1, 2) + fy - np.roll(fy, 1, 1)) / dx

    for dt in dts:
        conserved = conserved - dt * outflow(conserved - dt / 2 * outflow(conserved))
    return conserved


def contenders(name: str, size: int, cases: int, steps: int, device: str) -> tuple[Callable, ...]:
    """Return ours and the baseline: functions that give the same states."""
    if name == "smoke":
        box = Smoke(size=size)
        smoke, b = box.initial(range(cases))
        s, b = smoke.float().to(device), b.float().to(device)

        def ours() -> torch.Tensor:
            state = (s, s.new_zeros(cases, size, size + 1), s.new_zeros(cases, size + 1, size))
            for _ in range(steps):
                state = box.step(state, b)
            return state[0]

        arrays = s.cpu().numpy()
        return ours, lambda: np.stack([numpy_smoke(box, one, 0.5, steps) for one in arrays])
    if name == "shallow-water":
        sea = ShallowWater(size=size)
        start = sea.initial(range(cases)).to(device)

        def water() -> torch.Tensor:
            spectra = torch.fft.rfft2(start)
            for _ in range(steps):
                spectra = sea.step(spectra)
            return torch.fft.irfft2(spectra, s=(size, size))

        arrays = start.cpu().numpy()
        return water, lambda: np.stack([numpy_water(sea, one, steps) for one in arrays])
    start = gas.to_conserved(Compressible(size=size, stride=1).initial(range(cases))).to(device)
    dts, state = [], start
    for _ in range(steps):
        dts.append(0.3 / size / gas._fastest(state))
        state = gas.step(state, dts[-1], 1 / size)

    def flow() -> torch.Tensor:
        state = start
        for _ in range(steps):
            state = gas.step(state, 0.3 / size / gas._fastest(state), 1 / size)
        return state

    arrays, times = start.cpu().numpy(), torch.stack(dts).cpu().numpy().reshape(steps, cases)
    return flow, lambda: np.stack(
        [numpy_gas(one, times[:, i], 1 / size) for i, one in enumerate(arrays)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    updates = options.size**2 * options.cases * options.steps
    print(f"{options.size} x {options.size} cells, {options.cases} cases, {options.steps} steps, "
          f"{options.device}, {torch.get_num_threads()} threads")  # fmt: skip
    # of the processor, which other work does not disturb; a device is waited for by the clock
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for name in ("smoke", "shallow-water", "compressible"):
        ours, baseline = contenders(
            name, options.size, options.cases, options.steps, options.device
        )
        seconds: dict[str, list[float]] = {"ours": [], "numpy": []}
        for _ in range(options.rounds):
            for key, call in (("ours", ours), ("numpy", baseline)):
                began = clock()
                result = call()
                if key == "ours":
                    mine = result.cpu().numpy()  # waits for the device
                seconds[key].append(clock() - began)
        gap = np.abs(mine - result).max() / np.abs(result).max()
        a, b = (updates / statistics.median(seconds[key]) for key in ("ours", "numpy"))
        print(f"{name:14} ours {a / 1e6:8.2f} M/s   NumPy {b / 1e6:8.2f} M/s   ours/NumPy "
              f"{a / b:6.2f}   largest difference {gap:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
