"""Why do learning rates transfer? (arXiv 2402.17457): sharpness that does not depend on the size.

The story: networks of several widths, then depths, are trained at every rate of a grid under the
parametrisations that should and should not transfer. Then the sharpness, in the units in which
2/eta_0 is the threshold of stability, is followed over training at one rate. Full-batch descent
shows that it settles at that threshold, a solvable network why it rises, and residual blocks of two
layers where the theory ends.

The network is the family of the theory: D inputs, L layers of N ReLU units without biases.
Figures for cifar10 are made with a JPEG-75 copy of the data set.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.files import read_json, write_json
from pantarhei.runs import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pantarhei.learning.families import Networks
    from pantarhei.learning.lr_transfer import Size, Sweep

# Bounds are the fact sheet's, written before the first run. At quick (1,437 images of 64 pixels,
# widths to 256) claims about percents of loss or sharpness are not made, nor is that about NTP,
# whose shift over a factor 8 of width is no more than one step of the grid.
CLAIMS = (
    ClaimSpec(
        "sharpening-is-predicted",
        "a two-layer linear network of width 4096 ends at the sharpness of the closed form",
        "relative error at D = 16 under muP",
        "<=",
        0.01,
    ),
    ClaimSpec(
        "width-mup-transfers",
        "under muP the best learning rate stays where it is as the width grows",
        "steps of a factor of 2 between the best rates of the smallest and largest width",
        "<=",
        1.0,
        "transfers",
    ),
    ClaimSpec(
        "width-mup-regret",
        "under muP the small model's learning rate serves the large one",
        "loss of the largest width at the smallest one's rate, over its best loss, minus 1",
        "<=",
        {"cpu": 0.03, "gpu": 0.03},
        "transfers",
    ),
    ClaimSpec(
        "width-ntp-moves",
        "under NTP the best rate moves up with the width, or the small model's costs 10 %",
        "the larger of steps upwards and regret / 0.10, smallest to largest width",
        ">=",
        {"cpu": 1.0, "gpu": 1.0},
        "does not transfer",
    ),
    ClaimSpec(
        "width-mup-sharpness",
        "under muP the sharpness during training does not depend on the width",
        "standard deviation over mean of the widths, at a fixed step",
        "<=",
        {"cpu": 0.15, "gpu": 0.15},
        "the same curve for all widths",
    ),
    ClaimSpec(
        "width-ntp-sharpness",
        "under NTP the sharpness during training depends on the width",
        "largest over smallest of the widths, at the same step",
        ">=",
        {"cpu": 2.5, "gpu": 2.5},
        "differs strongly",
    ),
    ClaimSpec(
        "depth-mup-transfers",
        "under Depth-muP the best learning rate is the same at all depths",
        "largest shift from the shallowest network's best rate, steps of a factor of 2",
        "<=",
        1.0,
        "transfers (one layer a block)",
    ),
    ClaimSpec(
        "depth-unscaled-moves",
        "without the factor 1/sqrt(L) it is not: it moves, or every rate diverges",
        "largest shift, steps of a factor of 2; all rates of the grid where all diverge",
        ">=",
        3.0,
    ),
    ClaimSpec(
        "edge-of-stability",
        "full-batch descent brings the sharpness to 2/eta_0, at two widths",
        "steps in the longest stretch within 10 % of the threshold, the shorter of two widths",
        ">=",
        100.0,
        "a threshold that does not depend on the width",
    ),
    ClaimSpec(
        "two-layer-blocks",
        "with two layers in a block the sharpness depends more on the depth",
        "coefficient of variation over depths, two layers over one",
        ">=",
        {"cpu": 1.0, "gpu": 1.0},
        "no transfer with two layers",
    ),
)

# Exponents of two bound the grids. NTP's best rate is far above muP's, and at its grid's upper end
# in the sheet's trial: its own grid goes higher. The edge's rate and steps were chosen after a
# trial (quick: on its own widths; cpu: on width 64).
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": "digits",
        "images": 1437,
        "batch_size": 128,
        "seeds": 3,
        "steps": 100,
        "widths": (32, 64, 128, 256),
        "sp_widths": (32, 128),
        "mup_grid": (-4, 6),
        "ntp_grid": (0, 10),
        "sp_grid": (-9, 1),
        "depth_width": 32,
        "depths": (2, 8, 32),
        "depth_steps": 60,
        "depth_grid": (-4, 6),
        "sharpness_images": 256,
        "sharpness_widths": (32, 128),
        "sharpness_steps": 100,
        "sharpness_every": 25,
        "sharpness_at": 100,
        "mup_lr": 0.5,
        "ntp_lr": 16.0,
        "depth_lr": 1.0,
        "edge_widths": (32, 128),
        "edge_images": 512,
        "edge_lr": 2.0,
        "edge_steps": 800,
        "edge_every": 20,
        "linear_widths": (64, 256, 1024, 4096),
        "linear_steps": 4000,
    },
    "cpu": {
        "data": "cifar10",
        "images": 4096,
        "batch_size": 128,
        "seeds": 3,
        "steps": 300,
        "widths": (64, 128, 256, 512, 1024),
        "sp_widths": (64, 256, 1024),
        "mup_grid": (-4, 6),
        "ntp_grid": (0, 10),
        "sp_grid": (-9, 1),
        "depth_width": 128,
        "depths": (2, 4, 8, 16, 32),
        "depth_steps": 200,
        "depth_grid": (-4, 6),
        "sharpness_images": 1024,
        "sharpness_widths": (64, 128, 256, 512),
        "sharpness_steps": 300,
        "sharpness_every": 50,
        "sharpness_at": 200,
        "mup_lr": 0.5,
        "ntp_lr": 16.0,
        "depth_lr": 1.0,
        "edge_widths": (128, 512),
        "edge_images": 512,
        "edge_lr": 1.0,
        "edge_steps": 2000,
        "edge_every": 20,
        "linear_widths": (64, 256, 1024, 4096),
        "linear_steps": 4000,
    },
    # All of CIFAR-10, 20 epochs, widths to 2,048: what the sheet names for an accelerator, with
    # the same family of networks. It has not been run: no accelerator was at hand.
    "gpu": {
        "data": "cifar10",
        "images": 50_000,
        "batch_size": 128,
        "seeds": 3,
        "steps": 7812,
        "widths": (128, 256, 512, 1024, 2048),
        "sp_widths": (128, 512, 2048),
        "mup_grid": (-4, 6),
        "ntp_grid": (0, 10),
        "sp_grid": (-9, 1),
        "depth_width": 256,
        "depths": (2, 4, 8, 16, 32),
        "depth_steps": 7812,
        "depth_grid": (-4, 6),
        "sharpness_images": 4096,
        "sharpness_widths": (128, 256, 512, 1024, 2048),
        "sharpness_steps": 7812,
        "sharpness_every": 500,
        "sharpness_at": 5000,
        "mup_lr": 0.5,
        "ntp_lr": 16.0,
        "depth_lr": 1.0,
        "edge_widths": (128, 512, 2048),
        "edge_images": 4096,
        "edge_lr": 1.0,
        "edge_steps": 4000,
        "edge_every": 20,
        "linear_widths": (64, 256, 1024, 4096),
        "linear_steps": 4000,
    },
}


def recipe(run: Run) -> Iterator[Claim]:
    """Measure the claims in the order of the story."""
    study = Study.of(run)
    yield run.claim("sharpening-is-predicted", linear_oracle(run), evidence="linear.csv")

    s = run.settings
    sweeps = {
        "muP": study.sweep("mup", widths=s.widths, grid=s.mup_grid),
        "NTP": study.sweep("ntp", widths=s.widths, grid=s.ntp_grid),
        "SP": study.sweep("sp", widths=s.sp_widths, grid=s.sp_grid, seeds=1),
    }
    study.tabulate("width-sweeps", sweeps)
    mup, ntp = sweeps["muP"].transfer(), sweeps["NTP"].transfer()
    yield run.claim("width-mup-transfers", abs(mup.shift[-1]), evidence="width-sweeps.csv")
    yield run.claim("width-mup-regret", mup.regret[-1], evidence="width-sweeps.csv")
    moved = max(ntp.shift[-1], min(ntp.regret[-1], 1.0) / 0.10)  # divergence costs it all
    yield run.claim("width-ntp-moves", moved, evidence="width-sweeps.csv")

    curves = {
        "muP": study.sharpness("mup", s.mup_lr, widths=s.sharpness_widths),
        "NTP": study.sharpness("ntp", s.ntp_lr, widths=s.sharpness_widths),
    }
    found = study.compare_curves("width-sharpness", curves)
    yield run.claim("width-mup-sharpness", found["muP"]["cv"], evidence="width-sharpness.csv")
    yield run.claim("width-ntp-sharpness", found["NTP"]["ratio"], evidence="width-sharpness.csv")

    sweeps = {
        "Depth-muP": study.sweep("depth-mup", depths=s.depths, grid=s.depth_grid),
        "muP without 1/sqrt(L)": study.sweep("mup", depths=s.depths, grid=s.depth_grid),
    }
    study.tabulate("depth-sweeps", sweeps)
    scaled, unscaled = (largest_shift(sweep) for sweep in sweeps.values())
    yield run.claim("depth-mup-transfers", scaled, evidence="depth-sweeps.csv")
    yield run.claim("depth-unscaled-moves", unscaled, evidence="depth-sweeps.csv")

    yield run.claim("edge-of-stability", study.edge(), evidence="edge.csv")

    curves = {
        "Depth-muP, one layer a block": study.sharpness("depth-mup", s.depth_lr, depths=s.depths),
        "two layers a block": study.sharpness("depth-mup", s.depth_lr, depths=s.depths, layers=2),
    }
    one, two = study.compare_curves("depth-sharpness", curves).values()
    yield run.claim("two-layer-blocks", two["cv"] / one["cv"], evidence="depth-sharpness.csv")


@dataclass(frozen=True)
class Study:
    """The data, and what is trained on them."""

    run: Run
    inputs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, run: Run) -> Study:
        """Load the images, grey and flat; CIFAR-10's with every second pixel. Standardised."""
        import numpy as np
        import torch

        from pantarhei.data import load

        data = load(run.settings.data)
        images = data.train_images[: run.settings.images].astype(np.float32)
        if images.ndim == 4:
            images = images.mean(3)[:, ::2, ::2]
        x = torch.from_numpy(images).flatten(1).to(run.device)
        labels = torch.from_numpy(data.train_labels[: run.settings.images]).to(run.device)
        return cls(run, (x - x.mean()) / x.std(), labels)

    def family(self, skip: bool = False, layers: int = 1) -> Networks:
        """Return the networks of the theory for these data."""
        from pantarhei.learning.families import Networks

        return Networks(self.inputs.shape[1], 10, skip=skip, layers=layers)

    def batches(self) -> Callable[[int], Any]:
        """Return the training batches."""
        from pantarhei.fit import Batches

        size = self.run.settings.batch_size
        return Batches(self.inputs, self.labels, batch_size=size, seed=self.run.seed)

    def sweep(
        self,
        kind: Any,
        *,
        widths: Sequence[int] = (),
        depths: Sequence[int] = (),
        grid: tuple[int, int],
        seeds: int | None = None,
    ) -> Sweep:
        """Train at every size, rate and seed; the final loss is that of all training images."""
        from pantarhei.learning.lr_transfer import lr_sweep

        s, family = self.run.settings, self.family(skip=bool(depths))
        name = f"{kind}-{'depth' if depths else 'width'}"
        parts = zip(self.inputs.split(512), self.labels.split(512), strict=True)
        return lr_sweep(
            family,
            self.batches(),
            cross_entropy,
            widths=widths or (s.depth_width,),
            depths=depths or (2,),
            grid=[2.0**k for k in range(grid[0], grid[1] + 1)],
            steps=s.depth_steps if depths else s.steps,
            kind=kind,
            roles=family.roles,
            branches=family.branches,
            evaluate=list(parts),
            seeds=seeds or s.seeds,
            seed=self.run.seed,
            device=self.run.device,
            checkpoint=self.run.checkpoint(f"{name}.json"),
            quiet=self.run.quiet,
            label=f"sweep, {name}",
        )

    def start(self, family: Networks, size: Size, kind: Any, seed: int) -> tuple[nn.Module, Any]:
        """Return a network with its parametrisation.

        In the multiplier form all SGD rates are gamma^2 eta_0, so that gamma^2 H is the Hessian
        times a number.
        """
        import torch

        from pantarhei.learning.lr_transfer import build
        from pantarhei.learning.parametrization import parametrize

        model = build(family, size, seed)
        torch.manual_seed(seed)
        found = parametrize(
            model, roles=family.roles, branches=family.branches, kind=kind, form="multiplier"
        )
        return model.to(self.run.device), found

    def sharpness(
        self,
        kind: Any,
        lr: float,
        *,
        widths: Sequence[int] = (),
        depths: Sequence[int] = (),
        layers: int = 1,
    ) -> dict[str, Any]:
        """Follow lambda_max(gamma^2 H) and the loss over training, for every size and seed."""
        from pantarhei.learning.lr_transfer import Size

        s, family = self.run.settings, self.family(bool(depths), layers)
        sizes = [Size(w, d) for w in widths or (s.depth_width,) for d in depths or (2,)]
        steps = s.depth_steps if depths else s.sharpness_steps
        axis = "depth" if depths else "width"
        total = len(sizes) * s.seeds
        rows = []
        with self.run.progress(total, f"sharpness, {kind} {axis} k={layers}") as bar:
            for size in sizes:
                for seed in range(self.run.seed, self.run.seed + s.seeds):
                    name = f"sharpness-{kind}-{axis}-k{layers}-{size.width}-{size.depth}-{seed}"
                    rows += _kept(
                        self.run,
                        name,
                        lambda size=size, seed=seed: self._followed(  # type: ignore[misc]
                            family, size, kind, lr, seed, steps
                        ),
                    )
                    bar.advance(note=str(size))
        return {"sizes": sizes, "rows": rows, "threshold": 2 / lr, "axis": axis}

    def _followed(
        self, family: Networks, size: Size, kind: Any, lr: float, seed: int, steps: int
    ) -> list[dict[str, Any]]:
        from pantarhei.fit import fit
        from pantarhei.probes.sharpness import Sharpness
        from pantarhei.probes.watch import Watch

        s = self.run.settings
        model, found = self.start(family, size, kind, seed)
        gamma2 = 1.0 if kind == "ntp" else float(size.width or 1)
        some = (self.inputs[: s.sharpness_images], self.labels[: s.sharpness_images])
        watch = Watch(
            cross_entropy,
            some,
            every=s.sharpness_every,
            probes=[Sharpness(parts=(), scale=gamma2, tol=1e-2)],
        )
        watch.record(model, 0)
        fit(
            model,
            self.batches(),
            cross_entropy,
            steps=steps,
            optimizer=lambda _: found.optimizer(lr),
            seed=self.run.seed,
            precision="32",
            device=self.run.device,
            quiet=True,
            on_step=watch,
        )
        where = {"width": size.width, "depth": size.depth, "seed": seed}
        return [{**where, **row} for row in watch.rows]

    def compare_curves(
        self, name: str, curves: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, float]]:
        """Write the curves and their picture; return how they differ at the fixed step."""
        import numpy as np

        from pantarhei.learning import _lr_transfer_figures as figures
        from pantarhei.learning.lr_transfer import consistency

        rows, panels, found, reports = [], {}, {}, {}
        for title, curve in curves.items():
            rows += [{"parametrisation": title, **row} for row in curve["rows"]]
            steps = sorted({int(row["step"]) for row in curve["rows"]})
            shape = (len(curve["sizes"]), self.run.settings.seeds, len(steps))
            values, losses = (
                np.array([row[key] for row in curve["rows"]]).reshape(shape)
                for key in ("sharpness", "loss")
            )
            panels[title] = (curve["sizes"], steps, values, curve["threshold"])
            at = bisect_right(steps, self.run.settings.sharpness_at) - 1
            level = values[:, :, at].mean(1)
            found[title] = {
                "cv": float(level.std() / level.mean()),
                "ratio": float(level.max() / level.min()),
            }
            sizes = [getattr(size, curve["axis"]) for size in curve["sizes"]]
            reports[title] = found[title] | {
                key: consistency(sizes, steps[1:], kept[:, :, 1:]).to_json()
                for key, kept in (("sharpness", values), ("loss", losses))
            }
        self.run.metrics(f"{name}.csv", rows)
        write_json(self.run.path(f"{name}-consistency.json"), reports)
        self.run.figure(name, figures.curves(panels))
        return found

    def tabulate(self, name: str, sweeps: dict[str, Sweep]) -> None:
        """Write what the sweeps measured, the transfer of their rates, and their picture."""
        from pantarhei.learning import _lr_transfer_figures as figures

        rows = [
            {"parametrisation": title, **{k: v for k, v in row.items() if k != "curve"}}
            for title, sweep in sweeps.items()
            for row in sweep.rows
        ]
        self.run.metrics(f"{name}.csv", rows)
        peers = []
        for title, sweep in sweeps.items():
            transfer = sweep.transfer()
            for optimum, regret in zip(transfer.optima, transfer.regret, strict=True):
                peers.append(
                    {
                        "parametrisation": title,
                        "width": optimum.size.width,
                        "depth": optimum.size.depth,
                        "lr tuned here": optimum.lr,
                        "loss": optimum.loss,
                        "regret of the smallest size's lr": regret,
                        "at the grid's end": optimum.at_edge,
                        "trainings to tune here": len(sweep.grid) * sweep.seeds,
                        "verdict": transfer.verdict,
                    }
                )
            self.run.log(f"{name}, {title}: {transfer.verdict}; {transfer.reason}")
        self.run.metrics(f"{name}-transfer.csv", peers)
        self.run.figure(name, figures.sweeps(sweeps))

    def edge(self) -> float:
        """Train on all of some images at once, by MSE; return the shorter stay at the edge."""
        import numpy as np

        from pantarhei.learning import _lr_transfer_figures as figures
        from pantarhei.learning.lr_transfer import Size
        from pantarhei.probes.stability import edge_of_stability

        s = self.run.settings
        sizes = [Size(width, 2) for width in s.edge_widths]
        rows, stays, series = [], [], []
        for size in sizes:
            name = f"edge-{size.width}"
            kept = _kept(self.run, name, lambda size=size: self._descended(size))  # type: ignore[misc]
            steps = [row["step"] for row in kept]
            values = [row["sharpness"] for row in kept]
            found = edge_of_stability(steps, values, 2 / s.edge_lr)
            self.run.log(f"Edge of stability, {size}: {found}.")
            stays.append(found.stayed)
            series.append([values])
            rows += [{"width": size.width, **row} for row in kept]
        self.run.metrics("edge.csv", rows)
        panel = (sizes, steps, np.array(series), 2 / s.edge_lr)
        self.run.figure("edge", figures.curves({"full-batch descent, MSE, muP": panel}))
        return float(min(stays))

    def _descended(self, size: Size) -> list[dict[str, Any]]:
        from torch.nn.functional import one_hot

        from pantarhei.fit import fit
        from pantarhei.probes.sharpness import Sharpness
        from pantarhei.probes.watch import Watch

        s = self.run.settings
        model, found = self.start(self.family(), size, "mup", self.run.seed)
        whole = (self.inputs[: s.edge_images], one_hot(self.labels[: s.edge_images], 10).float())
        watch = Watch(
            squared_error,
            whole,
            every=s.edge_every,
            probes=[Sharpness(parts=(), scale=float(size.width or 1), tol=1e-2)],
        )
        fit(
            model,
            lambda n: whole,
            squared_error,
            steps=s.edge_steps,
            optimizer=lambda _: found.optimizer(s.edge_lr),
            precision="32",
            device=self.run.device,
            quiet=self.run.quiet,
            label=f"edge of stability, {size}",
            on_step=watch,
        )
        return [dict(row) for row in watch.rows]


def linear_oracle(run: Run) -> float:
    """Train the solvable network at several widths; return the error at the largest, under muP."""
    import numpy as np

    from pantarhei.learning import _lr_transfer_figures as figures
    from pantarhei.learning.lr_transfer import Size
    from pantarhei.learning.sharpening import descend, final_sharpness, sharpness_curve

    s, rows, panels = run.settings, [], {}
    sizes = [Size(width, None) for width in s.linear_widths]
    for title in ("muP", "NTP"):
        found = [
            descend(
                width, 16, features=1.0 if title == "muP" else 1 / width,
                steps=s.linear_steps, seed=run.seed, record=max(1, s.linear_steps // 50),
            )
            for width in s.linear_widths
        ]  # fmt: skip
        for width, descent in zip(s.linear_widths, found, strict=True):
            predicted = final_sharpness(16, features=1.0 if title == "muP" else 1 / width)
            rows.append(
                {
                    "parametrisation": title,
                    "width": width,
                    "initial": descent.sharpness[0],
                    "final": descent.sharpness[-1],
                    "predicted": float(predicted),
                    "error": float(abs(descent.sharpness[-1] / predicted - 1)),
                    "loss": descent.loss[-1],
                }
            )
        values = np.array([[descent.sharpness] for descent in found])
        panels[title] = (sizes, found[0].times / 0.05, values, None)
    run.metrics("linear.csv", rows)
    figure = figures.curves(panels, share=True)
    times = np.linspace(0, 0.05 * s.linear_steps, 200)
    for axis, curve in zip(
        figure.axes, (sharpness_curve(times, 16), np.full(200, 2 / 16)), strict=True
    ):
        axis.plot(times / 0.05, curve, "k--", lw=1, label="predicted, infinite width")
        axis.legend(fontsize=8, frameon=False)
    run.figure("linear", figure)
    largest = ("muP", max(s.linear_widths))
    return next(r["error"] for r in rows if (r["parametrisation"], r["width"]) == largest)


def largest_shift(sweep: Sweep) -> float:
    """Return the largest shift of the best rate; the whole grid where all rates diverge."""
    shifts = [
        float(len(sweep.grid)) if math.isnan(shift) else abs(shift)
        for shift in sweep.transfer().shift
    ]
    return max(shifts)


def cross_entropy(model: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a batch (inputs, labels)."""
    from torch.nn import functional

    return functional.cross_entropy(model(batch[0]), batch[1])


def squared_error(model: Any, batch: Any) -> Tensor:
    """Return half the squared error, summed over the outputs and averaged over the batch."""
    result: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().sum(1).mean()
    return result


def _kept(run: Run, name: str, compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what was computed before an interruption, or compute it now and keep it."""
    path = run.checkpoint(f"{name}.json")
    if not path.exists():
        write_json(path, compute())
    rows: list[dict[str, Any]] = read_json(path)
    return rows
