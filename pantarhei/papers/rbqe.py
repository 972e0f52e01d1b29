"""RBQE: one blind network enhances JPEGs of every quality, and stops early where that suffices.

Xing, Xu, Li, Guan, "Early Exit or Not: Resource-Efficient Blind Quality Enhancement for Compressed
Images", ECCV 2020 (arXiv 2006.16581).

The story: train the nested U-Net on crops of mixed quality; calibrate the exit threshold on images
that are neither trained nor tested on; run it on the test images and compare with always taking
the last exit, with static networks trained on the same crops for the same number of steps, and
with routers that know everything (the label) or nothing (chance).

Differences from the paper: its RAISE photographs are not here, so Berkeley images train and
LIVE1 + classic5 test; the codec is baseline JPEG on luma; the networks are small at ``cpu``. Test
images are cut in the middle to ``test_crop`` pixels on the codec's grid, as the paper cuts to 512
(JPEG codes blocks independently, so cutting before or after compression is the same). Luma is
full-range BT.601; dPSNR is in dB on 8-bit luma, mean over images; MACs are true ones per image,
assessments included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.runs import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pantarhei.compute.enhancement.nested_unet import NestedUNet
    from pantarhei.compute.enhancement.routing import ExitTable, Outcome
    from pantarhei.compute.enhancement.training import Weights

QUALITIES = (50, 40, 30, 20, 10)


def _at(cpu: float, gpu: float | None = None) -> dict[str, float]:
    """Return a bound that is claimed at ``cpu`` and ``gpu`` alone."""
    return {"cpu": cpu, "gpu": cpu if gpu is None else gpu}


CLAIMS = (
    ClaimSpec(
        "gains-everywhere",
        "the dynamic network raises the PSNR at each of the five qualities (> 0 dB)",
        "smallest mean dPSNR of a quality, dB",
        ">=",
        0.001,
        "1.55 at QF50 to 1.92 at QF10 (full net, RAISE)",
    ),
    ClaimSpec(
        "average-gain",
        "one blind dynamic network raises the PSNR on average over the five qualities",
        "mean dPSNR, dB",
        ">=",
        _at(0.3, 0.7),
        "1.678 (JPEG, full net, RAISE)",
    ),
    ClaimSpec(
        "against-dncnn",
        "it is not worse than a blind DnCNN trained on the same crops for the same steps",
        "mean dPSNR minus DnCNN's, dB",
        ">=",
        _at(-0.05),
        "+0.34 (1.678 against 1.337)",
    ),
    ClaimSpec(
        "fewer-macs-than-dncnn",
        "and needs at least four times fewer MACs per image",
        "MACs of DnCNN over mean MACs of the dynamic network",
        ">=",
        _at(4.0),
        "6 to 10",
    ),
    ClaimSpec(
        "harder-costs-more",
        "compute follows difficulty: strongly compressed images take more MACs",
        "mean MACs at QF10 over mean MACs at QF50",
        ">=",
        {"quick": 1.0, **_at(1.2)},
        "1.54 between QP42 and QP22 (HEVC)",
    ),
    ClaimSpec(
        "as-good-as-the-last-exit",
        "at the calibrated threshold the average PSNR is within 0.03 dB of the last exit's",
        "mean dPSNR of the last exit minus that of the dynamic run, dB",
        "<=",
        0.03,
        "0.01 (HEVC)",
    ),
    ClaimSpec(
        "saves-macs",
        "while saving MACs against always running the whole network",
        "1 - mean MACs over those of the last exit",
        ">=",
        {"quick": 0.01, **_at(0.10)},
        "0.127 (HEVC)",
    ),
    ClaimSpec(
        "beats-chance",
        "choosing exits by the score beats choosing them at random at equal mean MACs",
        "mean dPSNR minus that of random routing, dB",
        ">=",
        _at(0.01),
    ),
    ClaimSpec(
        "score-orders-quality",
        "the training-free score, averaged over the test images, rises strictly with quality",
        "smallest rise of the mean score between neighbouring qualities",
        ">=",
        0.001,
        "0.05 (0.59 to 0.77 over five QPs, HEVC)",
    ),
    ClaimSpec(
        "score-ranks-each-image",
        "within each image the score ranks the qualities (full-size test images)",
        "mean over images of Spearman's correlation of score and QF",
        ">=",
        _at(0.93),
    ),
    ClaimSpec(
        "weights-keep-the-shallow-exit",
        "weighting exits by difficulty does not lower the first exit on easy images",
        "dPSNR of exit 1 at QF50, weighted minus uniform weights, mean over seeds, dB",
        ">=",
        _at(-0.01),
    ),
    ClaimSpec(
        "weights-keep-the-deep-exit",
        "nor the last exit on hard images",
        "dPSNR of the last exit at QF10, weighted minus uniform weights, mean over seeds, dB",
        ">=",
        _at(-0.01),
    ),
    ClaimSpec(
        "weights-help",
        "and raises at least one of the two (> 0 dB)",
        "the larger of the two differences, dB",
        ">=",
        _at(0.001),
    ),
)

# Milliseconds a step on two cores (bf16, channels-last, 16 crops of 64x64): the network 125,
# DnCNN 712, DCAD 317, a single exit 115. At `cpu` 850 steps of each are 18 minutes, six networks
# of 250 steps for the weights 3, everything else 4: below 30 with a margin for the machine.
SETTINGS: dict[str, dict[str, int | float | str | bool | tuple[Any, ...]]] = {
    "quick": {
        "data": "photographs",
        "halve": True,  # pictures that came as JPEG files are reduced, for cleaner targets
        "levels": 5,
        "width": 16,
        "crop": 48,
        "batch": 16,
        "steps": 400,
        "lr": 2e-3,
        "precision": "bf16",
        "baselines": False,
        "weight_seeds": 0,
        "weight_steps": 0,
        "test_crop": 256,
        "loss_db": 0.01,  # what the calibration may lose; the paper lost as much
    },
    "cpu": {
        "data": "berkeley",
        "halve": True,
        "levels": 5,
        "width": 16,
        "crop": 64,
        "batch": 16,
        "steps": 850,
        "lr": 2e-3,
        "precision": "bf16",
        "baselines": True,
        "weight_seeds": 3,
        "weight_steps": 250,
        "test_crop": 256,
        "loss_db": 0.01,
    },
    "gpu": {
        "data": "berkeley",
        # 128-pixel crops of 200 halved images would be seen hundreds of times.
        "halve": False,
        "levels": 6,
        "width": 32,
        "crop": 128,
        "batch": 64,
        "steps": 15000,
        "lr": 4e-4,
        "precision": "bf16",
        "baselines": True,
        "weight_seeds": 3,
        "weight_steps": 2500,
        "test_crop": 512,
        "loss_db": 0.01,
    },
}

# Split of the photographs that come with scikit-image and scikit-learn. Those that calibrate are,
# like those of the test, lossless photographs at their own size: a threshold holds for its kind.
VALIDATION = ("chelsea", "motorcycle_left")
TEST = ("astronaut", "camera", "coffee")
LEFT_OUT = ("hubble_deep_field", "retina")


def recipe(run: Run) -> Iterator[Claim]:
    """Train, calibrate, run, compare; see the module's text."""
    from pantarhei.compute.enhancement import routing
    from pantarhei.compute.enhancement.training import centre, difficulty_weights
    from pantarhei.papers import _rbqe_figures as figures

    training, validation, whole = _pictures(run)
    test = [centre(image, run.settings.test_crop) for image in whole]
    run.log(
        f"{len(training)} images to train on, {len(validation)} to calibrate, {len(test)} to test."
    )
    yield from _score_claims(run, whole)

    net = _trained_network(run, "rbqe", training, difficulty_weights, run.settings.steps, run.seed)
    held_out = routing.measure_exits(net, validation, QUALITIES)
    calibration = routing.calibrate(held_out, loss=run.settings.loss_db)
    run.log(
        f"Calibrated threshold {calibration.chosen:.3f}; the turning point of the curve would be "
        f"{calibration.turning_point():.3f}."
    )
    table = routing.measure_exits(net, test, QUALITIES)
    run.metrics("exits.csv", table.rows())

    dynamic = routing.dynamic_routing(table, calibration.chosen)
    last = routing.static_routing(table, net.exits)
    chance = routing.random_routing(table, dynamic)
    outcomes = {f"exit {k}": routing.static_routing(table, k) for k in range(1, net.exits + 1)}
    outcomes |= {"dynamic": dynamic, "random": chance}
    outcomes |= {"oracle": routing.oracle_routing(table, QUALITIES[0], QUALITIES[-1])}
    yield from _routing_claims(run, table, dynamic, last, chance)

    if run.settings.baselines:
        outcomes |= _baselines(run, training, test)
        theirs = outcomes["DnCNN"].gain.mean()
        # one that is no better than its input has not trained, and to be ahead of it says nothing
        ahead = dynamic.gain.mean() - theirs if theirs > 0 else float("nan")
        ratio = _macs(outcomes["DnCNN"]) / _macs(dynamic)
        yield run.claim("against-dncnn", ahead, evidence="methods.csv")
        yield run.claim("fewer-macs-than-dncnn", ratio, evidence="methods.csv")
    if run.settings.weight_seeds:
        yield from _weight_claims(run, training, test)

    methods = _methods(outcomes, table)
    run.metrics("methods.csv", methods)
    rows = routing.quality_table(net, test, QUALITIES, calibration.chosen)
    run.metrics("qualities.csv", rows)
    run.metrics("wall_clock.csv", _wall_clock(net, test[0].to(run.device)))
    sweep = routing.calibrate(table)
    run.figure("curve", figures.curve(sweep, methods, calibration.chosen))
    run.figure("exits", figures.exits(dynamic.histogram(table.quality, net.exits)))
    run.figure("side_by_side", figures.side_by_side(net, test[0].to(run.device), calibration))
    for row in methods:
        run.log(
            f"{row['method']}: {row['dpsnr']:+.3f} dB at {row['gmacs']:.3f} GMACs per image "
            f"({row['dpsnr_10']:+.3f} at QF10, {row['dpsnr_50']:+.3f} at QF50)."
        )
    run.log(f"Pictures: {run.path('side_by_side.png')}, {run.path('curve.png')}.")


def _pictures(run: Run) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return raw luma images (1, H, W) for training, calibration and test, disjoint."""
    from pantarhei import data
    from pantarhei.compute.enhancement.training import raw_luma

    if run.settings.data == "photographs":
        planes = raw_luma(data.load("photographs_gray"))
        apart = (*VALIDATION, *TEST, *LEFT_OUT)
        training = [plane for name, plane in planes.items() if name not in apart]
        return training, [planes[n] for n in VALIDATION], [planes[n] for n in TEST]
    halve = None if run.settings.halve else False
    berkeley = list(raw_luma(data.load("images_train_color"), halve).values())
    test = [raw_luma(data.load("classic5")), raw_luma(data.load("live1"))]
    training = [plane for index, plane in enumerate(berkeley) if index % 10]
    return training, berkeley[::10], [plane for planes in test for plane in planes.values()]


def _train(
    run: Run,
    name: str,
    net: nn.Module,
    training: list[Tensor],
    weights: Weights,
    steps: int,
    seed: int,
) -> None:
    """Train any of the networks: the same crops in the same order for the same steps."""
    from functools import partial

    import torch

    from pantarhei.compute.enhancement.training import CompressedCrops, exit_loss, fast_layout
    from pantarhei.fit import fit

    s = run.settings
    crops = CompressedCrops(
        training, s.crop, s.batch, qualities=QUALITIES, seed=seed, device=run.device
    )
    done = fit(
        fast_layout(net),
        crops,
        exit_loss(weights),
        steps=steps,
        optimizer=partial(torch.optim.Adam, fused=True),
        lr=s.lr,
        schedule="cosine",
        warmup=steps // 20,
        seed=seed,
        precision=s.precision,
        device=run.device,
        checkpoint=run.checkpoint(name),
        label=name,
        quiet=run.quiet,
    )
    run.metrics(f"training/{name}.csv", done.history)


def _trained_network(
    run: Run, name: str, training: list[Tensor], weights: Weights, steps: int, seed: int
) -> NestedUNet:
    import torch

    from pantarhei.compute.enhancement.nested_unet import NestedUNet

    torch.manual_seed(seed)
    net = NestedUNet(levels=run.settings.levels, width=run.settings.width)
    _train(run, name, net, training, weights, steps, seed)
    return net


def _score_claims(run: Run, images: list[Tensor]) -> Iterator[Claim]:
    """Does the training-free score order quality? Compressed test images at full size."""
    import torch
    from scipy.stats import spearmanr

    from pantarhei.compute.enhancement.quality import TchebichefQuality
    from pantarhei.data.simulate.codecs import jpeg_luma

    judge, rising = TchebichefQuality(), sorted(QUALITIES)
    rows = []
    for image in images:
        batch = image.to(run.device).expand(len(rising), 1, -1, -1)
        rows.append(judge(jpeg_luma(batch, torch.tensor(rising))).score.cpu())
    scores = torch.stack(rows)
    ranks = [float(spearmanr(rising, row.numpy())[0]) for row in scores]
    named = [f"QF{q}" for q in rising]
    lines = [
        {"image": index, **dict(zip(named, row.tolist(), strict=True)), "spearman": rank}
        for index, (row, rank) in enumerate(zip(scores, ranks, strict=True))
    ]
    run.metrics("scores.csv", lines)
    yield run.claim("score-orders-quality", scores.mean(0).diff().min(), evidence="scores.csv")
    yield run.claim("score-ranks-each-image", sum(ranks) / len(ranks), evidence="scores.csv")


def _routing_claims(
    run: Run, table: ExitTable, dynamic: Outcome, last: Outcome, chance: Outcome
) -> Iterator[Claim]:
    """Compare the calibrated dynamic run with the last exit and with chance."""
    gain = {q: float(dynamic.gain[table.quality == q].mean()) for q in QUALITIES}
    macs = {q: float(dynamic.macs[table.quality == q].double().mean()) for q in QUALITIES}
    yield run.claim("gains-everywhere", min(gain.values()), evidence="qualities.csv")
    yield run.claim("average-gain", dynamic.gain.mean(), evidence="methods.csv")
    yield run.claim("harder-costs-more", macs[10] / macs[50], evidence="qualities.csv")
    lost = last.gain.mean() - dynamic.gain.mean()
    yield run.claim("as-good-as-the-last-exit", lost, evidence="methods.csv")
    yield run.claim("saves-macs", 1 - _macs(dynamic) / _macs(last), evidence="methods.csv")
    ahead = dynamic.gain.mean() - chance.gain.mean()
    yield run.claim("beats-chance", ahead, evidence="methods.csv")


def _baselines(run: Run, training: list[Tensor], test: list[Tensor]) -> dict[str, Outcome]:
    """Train and measure the static networks."""
    import torch

    from pantarhei.compute.enhancement.baselines import DCAD, DnCNN, SingleExit
    from pantarhei.compute.enhancement.nested_unet import NestedUNet
    from pantarhei.compute.enhancement.routing import Outcome, measure_static
    from pantarhei.compute.enhancement.training import uniform_weights

    s = run.settings
    makers: dict[str, Callable[[], Any]] = {
        "single exit": lambda: SingleExit(NestedUNet(levels=s.levels, width=s.width)),
        "DCAD": DCAD,
        "DnCNN": DnCNN,
    }
    outcomes = {}
    for name, make in makers.items():
        torch.manual_seed(run.seed)
        net = make()
        _train(run, name.replace(" ", "_"), net, training, uniform_weights, s.steps, run.seed)
        gain = measure_static(net, test, QUALITIES)
        macs = torch.tensor([net.macs(*image.shape[-2:]) for image in test for _ in QUALITIES])
        outcomes[name] = Outcome(torch.ones_like(macs), gain, macs)
    return outcomes


def _weight_claims(run: Run, training: list[Tensor], test: list[Tensor]) -> Iterator[Claim]:
    """Train with difficulty weights and with uniform ones: same seeds, same (shorter) schedule."""
    import torch

    from pantarhei.compute.enhancement.routing import measure_exits
    from pantarhei.compute.enhancement.training import difficulty_weights, uniform_weights

    rows: list[dict[str, float | str]] = []
    for seed in range(run.seed, run.seed + run.settings.weight_seeds):
        row: dict[str, float | str] = {"seed": str(seed)}
        for kind, weights in (("weighted", difficulty_weights), ("uniform", uniform_weights)):
            steps = run.settings.weight_steps
            net = _trained_network(run, f"{kind}_{seed}", training, weights, steps, seed)
            table = measure_exits(net, test, (50, 10))
            row[f"{kind}_shallow"] = float(table.gain[table.quality == 50, 0].mean())
            row[f"{kind}_deep"] = float(table.gain[table.quality == 10, -1].mean())
        for place in ("shallow", "deep"):
            row[place] = float(row[f"weighted_{place}"]) - float(row[f"uniform_{place}"])
        rows.append(row)
    means = {}
    for place in ("shallow", "deep"):
        values = torch.tensor([float(row[place]) for row in rows])
        means[place] = float(values.mean())
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
        run.log(f"Weighted minus uniform, {place} exit: {means[place]:+.4f} +- {error:.4f} dB.")
    run.metrics("weights.csv", rows)
    yield run.claim("weights-keep-the-shallow-exit", means["shallow"], evidence="weights.csv")
    yield run.claim("weights-keep-the-deep-exit", means["deep"], evidence="weights.csv")
    yield run.claim("weights-help", max(means.values()), evidence="weights.csv")


def _macs(outcome: Outcome) -> float:
    return float(outcome.macs.double().mean())


def _methods(outcomes: dict[str, Outcome], table: ExitTable) -> list[dict[str, Any]]:
    """Return one row per method: mean dPSNR, that of each quality, MACs."""
    rows = []
    for name, outcome in outcomes.items():
        row = {"method": name, "dpsnr": float(outcome.gain.mean()), "gmacs": _macs(outcome) / 1e9}
        for q in sorted(QUALITIES):
            row[f"dpsnr_{q}"] = float(outcome.gain[table.quality == q].mean())
        rows.append(row)
    return rows


def _wall_clock(net: NestedUNet, image: Tensor) -> list[dict[str, float]]:
    """Time every exit on one image beside its MACs in both conventions."""
    import torch

    from pantarhei.cost import latency_ms

    rows = []
    height, width = image.shape[-2:]
    with torch.no_grad():
        for k in range(1, net.exits + 1):
            row = {"exit": k, "gmacs": net.macs(height, width, k) / 1e9}
            row["gmacs_paper_convention"] = net.macs(height, width, k, "paper") / 1e9
            row["ms"] = latency_ms(net, image[None], exit=k)
            rows.append(row)
    return rows
