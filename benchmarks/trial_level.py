"""Measure what the trial promises: how often it accepts a removal that harms by exactly the tolerance, and
how often one that is harmless. Prints the tables of docs/trial.md; `--write` puts them there.

    python -m benchmarks.trial_level --write docs/trial.md
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from dynaprune.pruning.decide.looks import FUTILE, few_bear_the_harm, plan_looks, predictive_power
from dynaprune.pruning.decide.significance import harm_p_values

THRESHOLD = 0.01
RUNGS = 3
CLASSES = 10
CHUNK = 1500
NOISES = (0.0, 0.1, 1.0, 3.0, 6.0, 10.0)
SIZES = (1024, 512, 256, 128, 64)

Draw = Callable[[torch.Generator, int, int, float], Tensor]
"""(generator, draws, n, noise) -> paired rises [draws, n] whose expectation is 0; one tolerance is 1."""


def normal(generator: torch.Generator, draws: int, n: int) -> Tensor:
    return torch.randn(draws, n, generator=generator, dtype=torch.float64)


def gaussian(generator: torch.Generator, draws: int, n: int, noise: float) -> Tensor:
    return noise * normal(generator, draws, n)


def student_t3(generator: torch.Generator, draws: int, n: int, noise: float) -> Tensor:
    """Student's t with 3 degrees of freedom, standard deviation `noise`."""
    chi2 = sum(normal(generator, draws, n) ** 2 for _ in range(3))
    return noise * normal(generator, draws, n) / chi2.sqrt()


def lognormal(sigma: float, sign: float = 1.0) -> Draw:
    """Centred lognormal of standard deviation `noise`; skewness 6.2 (sigma 1), 33 (1.5), 414 (2)."""
    mean = math.exp(sigma**2 / 2)
    deviation = mean * math.sqrt(math.expm1(sigma**2))

    def draw(generator: torch.Generator, draws: int, n: int, noise: float) -> Tensor:
        return sign * noise * (torch.exp(sigma * normal(generator, draws, n)) - mean) / deviation

    return draw


def scale_mixture(generator: torch.Generator, draws: int, n: int, noise: float) -> Tensor:
    """Most samples hardly move, a few move much, either way: normal times lognormal(1); kurtosis 164."""
    return noise * normal(generator, draws, n) * torch.exp(normal(generator, draws, n) - 1)


def concentrated(share: float, sigma: float = 0.0) -> Draw:
    """All harm in a random `share` of the samples, of equal or lognormal(sigma) height, on Gaussian noise."""

    def draw(generator: torch.Generator, draws: int, n: int, noise: float) -> Tensor:
        hit = torch.rand(draws, n, generator=generator, dtype=torch.float64) < share
        height = torch.full((), 1 / share, dtype=torch.float64)
        if sigma:
            height = height * torch.exp(sigma * normal(generator, draws, n) - sigma**2 / 2)
        return hit * height - 1 + noise * normal(generator, draws, n)

    return draw


def with_classes(in_class: float, elsewhere: float) -> Draw:
    """Rise `in_class` in class 0 of ten, `elsewhere` in the others. Returns [draws, n, 1 + CLASSES]: the
    rise, then its contribution by class."""

    def draw(generator: torch.Generator, draws: int, n: int, noise: float) -> Tensor:
        label = torch.randint(CLASSES, (draws, n), generator=generator)
        rise = torch.where(label == 0, in_class, elsewhere) + noise * normal(generator, draws, n)
        return torch.stack([rise, *(rise * (label == c) for c in range(CLASSES))])

    return draw


# name: (draw, noise levels, promised). The level of a shape that is all noise does not depend on its scale.
SHAPES: dict[str, tuple[Draw, tuple[float, ...], bool]] = {
    "Gaussian": (gaussian, (10.0,), True),
    "Student t, 3 degrees": (student_t3, (10.0,), True),
    "lognormal, sigma 1": (lognormal(1.0), (10.0,), True),
    "in 2% of the samples": (concentrated(0.02), NOISES, True),
    "in one class of ten": (concentrated(0.1), NOISES, True),
    "lognormal to the left, sigma 1.5": (lognormal(1.5, -1.0), (10.0,), False),
    "normal x lognormal(1)": (scale_mixture, (10.0,), False),
    "in one class, lognormal(1) heights": (concentrated(0.1, 1.0), NOISES, False),
    "lognormal, sigma 1.5": (lognormal(1.5), (10.0,), False),
    "lognormal, sigma 2": (lognormal(2.0), (10.0,), False),
    "in 2%, lognormal(1) heights": (concentrated(0.02, 1.0), NOISES, False),
    "in 0.5% of the samples": (concentrated(0.005), NOISES, False),
}


def rises(draw: Draw, draws: int, n: int, noise: float, mean: float, seed: int) -> Iterator[Tensor]:
    """Chunks of paired rises of expectation `mean`, in units of the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, draws, CHUNK):
        yield draw(generator, min(CHUNK, draws - start), n, noise) + mean


class Tested(NamedTuple):
    """What tests of one set came to: `passed` bool [draws], `used` the share of the samples looked at."""

    passed: Tensor
    used: Tensor


def looked_at(p_values: Callable[[int], Tensor], n: int, early: bool) -> Tested:
    """Tests at THRESHOLD / RUNGS of n samples that come in quarters.

    Args:
        p_values: of the first so many samples.
        early: whether half of the samples may accept.
    """
    looks = plan_looks([n // 4] * 4, THRESHOLD / RUNGS, early=early)
    passed = torch.zeros(())
    running, used = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    for look in looks:
        p = p_values(look.samples)
        share = look.samples / n
        used = torch.where(running, share, used)
        passed = torch.where(running & (p < look.level), torch.ones(()), passed)
        running = running & ~(p < look.level)
        if share < 1:
            power = torch.from_numpy(predictive_power(p.numpy(), share, looks[-1].level))
            running = running & ~(power < FUTILE)
    return Tested(passed.bool(), used)


def of_the_first(d: Tensor) -> Callable[[int], Tensor]:
    """p-values of the first so many samples of `d` [draws, n], each computed once."""
    return cache(lambda count: harm_p_values(d[..., :count], 1.0))


class Levels(NamedTuple):
    """Shares accepted: by one test at THRESHOLD of all samples; by an event of RUNGS independent sets of all
    samples; by an event with three looks at each, in a run that has seen a set of the same kind, and in one
    that has seen harmless sets only. `used` is the share of the samples that a test of the third looked at.
    """

    single: float
    whole: float
    event: float
    unwarned: float
    used: float


def acceptance(draw: Draw, draws: int, n: int, noise: float, mean: float, seed: int) -> Levels:
    """How often removals of this kind are accepted."""
    found = []
    for d in rises(draw, draws * (RUNGS + 1), n, noise, mean, seed):
        # Of every four sets the first is what the run saw before: all its samples were looked at.
        sets = d.view(-1, RUNGS + 1, n)
        before, now = sets[:, 0], sets[:, 1:]
        p_values = of_the_first(now)
        p = p_values(n)
        shut, open_ = looked_at(p_values, n, False), looked_at(p_values, n, True)
        warned = few_bear_the_harm(before, 1.0).unsqueeze(1)
        passed, used = (torch.where(warned, s, o).double() for s, o in zip(shut, open_, strict=True))
        columns = [p < THRESHOLD, p < THRESHOLD / RUNGS, passed, open_.passed, used]
        found.append(torch.stack([column.double() for column in columns]))
    single, whole, event, unwarned, used = torch.cat(found, 1)
    any_of = [x.amax(1).mean() for x in (whole, event, unwarned)]
    return Levels(*map(float, (single.mean(), *any_of, used.mean())))


def single_rung_power(draw: Draw, draws: int, n: int, noise: float, mean: float, seed: int) -> float:
    """Share accepted by one test at THRESHOLD / RUNGS: what the largest set meets."""
    return power_and_use(draw, draws, n, noise, mean, seed)[0]


def power_and_use(
    draw: Draw, draws: int, n: int, noise: float, mean: float, seed: int
) -> tuple[float, float]:
    """Share accepted by one test at THRESHOLD / RUNGS with three looks, and share of the samples used."""
    tests = [looked_at(of_the_first(d), n, True) for d in rises(draw, draws, n, noise, mean, seed)]
    passed, used = (torch.cat(column).double() for column in zip(*tests, strict=True))
    return float(passed.mean()), float(used.mean())


def class_acceptance(
    in_class: float, elsewhere: float, draws: int, n: int, noise: float, seed: int
) -> list[float]:
    """Share accepted by one test at THRESHOLD / RUNGS: [without the check by class, with it]."""
    generator = torch.Generator().manual_seed(seed)
    draw = with_classes(in_class, elsewhere)
    passed = []
    for start in range(0, draws, 500):
        d = draw(generator, min(500, draws - start), n, noise)
        p_values = of_the_first(d)
        without = looked_at(lambda m, p=p_values: p(m)[0], n, True).passed
        with_check = looked_at(lambda m, p=p_values: p(m).amax(0), n, True).passed
        passed.append(torch.stack([without, with_check]))
    return torch.cat(passed, 1).double().mean(1).tolist()


def uncorrected(draw: Draw, draws: int, n: int, noise: float, seed: int) -> tuple[float, float]:
    """Acceptance of the same event by the plain t-test and by Johnson's statistic, for comparison."""
    critical = student.ppf(THRESHOLD / RUNGS, n - 1)
    plain, johnson = [], []
    for d in rises(draw, draws * RUNGS, n, noise, 1.0, seed):
        mean = d.mean(-1)
        centred = d - mean.unsqueeze(-1)
        s = (centred.square().sum(-1) / (n - 1)).sqrt().clamp_min(1e-300)
        u, g = (mean - 1) / s, centred.pow(3).mean(-1) / s**3
        plain.append(math.sqrt(n) * u < critical)
        johnson.append(math.sqrt(n) * (u + g * u**2 / 3 + g / (6 * n)) < critical)
    return tuple(float(torch.cat(x).view(-1, RUNGS).any(1).double().mean()) for x in (plain, johnson))


def level_tables(draws: int, seed: int) -> tuple[str, dict[int, float]]:
    """Markdown of the levels (worst over the noise levels), and the worst promised level by n."""
    lines = [
        "| harm at the tolerance, n = 1,024 | plain t, event | Johnson, event | one test | one look, event "
        "| **three looks, event** | of the samples | the first such harm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_size: dict[str, list[float]] = {}
    for name, (draw, noises, promised) in SHAPES.items():
        found = [acceptance(draw, draws, 1024, s, 1.0, seed) for s in noises]
        worst = Levels(*(max(column) for column in zip(*found, strict=True)))
        used = sum(each.used for each in found) / len(found)
        other = [uncorrected(draw, draws, 1024, s, seed) for s in noises]
        plain, johnson = (max(column) for column in zip(*other, strict=True))
        label = name if promised else f"{name} (harder)"
        lines.append(
            f"| {label} | {plain:.2%} | {johnson:.2%} | {worst.single:.2%} | {worst.whole:.2%} "
            f"| **{worst.event:.2%}** | {used:.2f} | {worst.unwarned:.2%} |"
        )
        by_size[name] = [worst.event]
        for n in SIZES[1:]:
            by_size[name].append(max(acceptance(draw, draws, n, s, 1.0, seed).event for s in noises))
        print(name, [f"{x:.4f}" for x in by_size[name]], flush=True)
    lines += [
        "",
        "| event, by n | " + " | ".join(f"{n:,}" for n in SIZES) + " |",
        "|---" * (1 + len(SIZES)) + "|",
    ]
    for name, levels in by_size.items():
        label = name if SHAPES[name][2] else f"{name} (harder)"
        lines.append(f"| {label} | " + " | ".join(f"{level:.2%}" for level in levels) + " |")
    worst_of = {n: max(by_size[name][i] for name in SHAPES if SHAPES[name][2]) for i, n in enumerate(SIZES)}
    return "\n".join(lines), worst_of


def power_tables(draws: int, seed: int) -> str:
    """Markdown of the acceptance of removals that harm less than the tolerance, by the noise."""
    noises = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 16.0)
    lines = [
        "| rise, noise, n | " + " | ".join(f"{s:g}" for s in noises) + " |",
        "|---" * (1 + len(noises)) + "|",
    ]
    rows = [
        ("Gaussian", gaussian, 1024, (-0.5, 0.0, 0.25, 0.5, 0.75)),
        ("Student t, 3 degrees", student_t3, 1024, (0.0, 0.5)),
        ("normal x lognormal(1)", scale_mixture, 1024, (0.0, 0.5)),
        ("lognormal, sigma 1", lognormal(1.0), 1024, (0.0, 0.5)),
        ("lognormal to the left, sigma 1", lognormal(1.0, -1.0), 1024, (0.0, 0.5)),
        ("Gaussian", gaussian, 256, (0.0, 0.5)),
    ]
    for name, draw, n, means in rows:
        for mean in means:
            cells = [power_and_use(draw, draws, n, s, mean, seed) for s in noises]
            shown = " | ".join(f"{power:.1%} ({used:.2f})" for power, used in cells)
            lines.append(f"| {mean:g}, {name}, n = {n:,} | {shown} |")
    return "\n".join(lines)


def class_table(draws: int, seed: int) -> str:
    """Markdown of what the check by class adds and costs."""
    noises = (1.0, 4.0, 8.0)
    lines = [
        "| ten classes, n = 1,024, noise | " + " | ".join(f"{s:g}" for s in noises) + " |",
        "|---" * (1 + len(noises)) + "|",
    ]
    cases = {
        "harm 10 in one class, the other nine gain 10/9": (10.0, -10 / 9),
        "harm 10 in one class, the others unmoved": (10.0, 0.0),
        "harm 5 in one class, the others gain 5/9": (5.0, -5 / 9),
        "no harm": (0.0, 0.0),
    }
    for name, (in_class, elsewhere) in cases.items():
        cells = [class_acceptance(in_class, elsewhere, draws, 1024, s, seed) for s in noises]
        lines.append(f"| {name} | " + " | ".join(f"{a:.1%} -> {b:.1%}" for a, b in cells) + " |")
    return "\n".join(lines)


def replace_block(text: str, name: str, table: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` replaced by the table."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"expected a block <!-- {name} --> ... <!-- /{name} --> in the document")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=5000, help="events per figure (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="MARKDOWN", help="document whose tables are replaced")
    options = parser.parse_args()
    levels, worst = level_tables(options.draws, options.seed)
    tables = {
        "levels": levels,
        "power": power_tables(options.draws, options.seed),
        "classes": class_table(options.draws, options.seed),
    }
    print(*tables.values(), sep="\n\n")
    print("MEASURED_LEVELS =", {n: round(level, 4) for n, level in sorted(worst.items())})
    if options.write:
        text = options.write.read_text()
        for name, table in tables.items():
            text = replace_block(text, name, table)
        draft = options.write.with_suffix(".new")
        draft.write_text(text)
        draft.replace(options.write)


if __name__ == "__main__":
    main()
