"""Time one training step, ours beside the published libraries', on the same vectors.

    python benchmarks/step.py                               what runs without peers: ours, its reference, the encoder's product
    python benchmarks/step.py 8192 8192-dead --rounds 9     some of the work only
    python benchmarks/step.py growth                        how time and memory grow: a line in vectors and in latents

The names of the work are `n_latents` and, where a tenth of the latents is dead, `-dead`. README.md beside this file says how to
have the peers take part.
"""

import argparse
import itertools
import json
from dataclasses import asdict, replace

import harness
import peers
from harness import OURS, Contest, Goal, Launch, Turns
from workload import StepWork

WORKS = {
    "8192": StepWork(),
    "8192-dead": StepWork(dead=0.1),
    "32768": StepWork(n_latents=32768),
    "32768-dead": StepWork(n_latents=32768, dead=0.1),
    "30-layers": StepWork(n_layers=30, n_tokens=410, d_model=576, n_latents=9216),
}
MICRO = "-micro6"
"""Ends the name of a contender that takes the step from six micro-batches."""
DEFAULT = [
    *(
        OURS,
        "ours-micro6",
        "ours-reference",
        "sgemm",
        "official",
        "sparsify",
        "sparsify-micro6",
        "saelens-sparse",
        "dictionary-learning",
    )
]
"""Every peer at the settings that are fastest here; sparsify also as it comes."""
TIMES_OURS = {
    "8192": {"official": 19, "sparsify": 5},
    "8192-dead": {"official": 9, "sparsify": 4},
    "32768": {"official": 20, "sparsify": 8},
}
"""How many times our CPU time a peer's should be."""
TIMES_REFERENCE = {"official": 3.5, "sparsify": 1.0}
"""The same for our step in plain torch, on all work."""
OF_SGEMM = {"8192": 0.8}
"""Most of our CPU time, in encoder products."""
OF_LEANEST = 0.5
"""Most of our peak memory, in units of the leanest peer's."""
GROWTH_TOKENS = (512, 1024, 1536, 2048, 2560)
GROWTH_LATENTS = (4096, 8192, 16384, 24576, 32768)
STRAIGHT = 0.98
"""Least R^2 of a line through the step times."""
BYTES_A_PAIR = 0.1
"""Most bytes of memory that one more vector costs per latent; a dense matrix of activations takes 4."""


def main() -> None:
    """Be a worker, or measure what is asked for."""
    options = arguments()
    if options.worker is not None:
        work = StepWork(**options.worker_work)
        harness.serve(lambda turns: run(options.worker, work, turns))
    harness.print_header(options)
    works, contests, goals = dict[str, object](), dict[str, Contest](), list[Goal]()
    for name in options.work:
        if name == "growth":
            grown = list(dict.fromkeys(resized(work, options) for work in growth_works()))
            contest = growth_contest(grown, options)
            goals += print_growth(grown, contest)
            works[name] = {size(work): asdict(work) for work in grown}
        else:
            work = resized(WORKS[name], options)
            print(f"\n{name}: {work}", flush=True)
            contest = harness.compete(launches(work, options), options.rounds)
            harness.print_contest(contest, work.n_vectors, "vectors")
            goals += step_goals(name, contest)
            works[name] = asdict(work)
        contests[name] = contest
    harness.print_modifications([contest for name, contest in contests.items() if name != "growth"])
    harness.print_goals(goals)
    if options.tokens is not None or options.n_latents is not None:
        print("  The sizes were changed: the goals are about the full ones.")
    harness.write_json(options, works, contests, goals)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, list(peers.CONTENDERS), DEFAULT)
    names = [*WORKS, "growth"]
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"some of {', '.join(names)} (default: all)")
    parser.add_argument("--tokens", type=int, help="tokens of a layer, instead of each work's: to try things out")
    parser.add_argument("--n-latents", type=int, help="latents, instead of each work's")
    options = parser.parse_args()
    if unknown := set(options.work) - set(names):
        parser.error(f"no work is called {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    options.work = options.work or names
    return options


def run(name: str, work: StepWork, turns: Turns) -> None:
    """One contender's life."""
    peers.CONTENDERS[name].run(work, turns)


def launches(work: StepWork, options: argparse.Namespace) -> list[Launch]:
    """The contenders asked for, on one piece of work."""
    return [launch(name, name, work, options) for name in harness.chosen(options)]


def launch(label: str, name: str, work: StepWork, options: argparse.Namespace) -> Launch:
    """How to start a contender as this script's worker."""
    python = peers.interpreter(peers.CONTENDERS[name].family)
    command = [python, __file__, "--worker", name, "--worker-work", json.dumps(asdict(work))]
    return Launch(label, command, options.threads)


def resized(work: StepWork, options: argparse.Namespace) -> StepWork:
    """The work with the sizes given on the command line; a growth keeps its proportions."""
    if options.tokens is not None:
        work = replace(work, n_tokens=max(1, options.tokens * work.n_tokens // WORKS["8192"].n_tokens))
    if options.n_latents is not None:
        work = replace(work, n_latents=max(2 * work.k, options.n_latents * work.n_latents // WORKS["8192"].n_latents))
    return work


# ---- goals -----------------------------------------------------------------------------------------------------------


def step_goals(name: str, contest: Contest) -> list[Goal]:
    """What one piece of work says about our promises; a peer counts as its fastest contender."""
    goals = []
    if name in OF_SGEMM:
        measured = contest.ratio(OURS, "sgemm")
        goals.append(Goal(f"{name}: ours / encoder sgemm, CPU", OF_SGEMM[name], measured, at_least=False))
    for to, bounds in ((OURS, TIMES_OURS.get(name, {})), ("ours-reference", TIMES_REFERENCE)):
        goals += [
            Goal(f"{name}: {family} / {to}, CPU", bound, fastest(contest, family, to))
            for family, bound in bounds.items()
        ]
    for suffix in ("", MICRO):
        measured = of_leanest(contest, suffix)
        goals.append(Goal(f"{name}: ours{suffix} / leanest peer, peak RSS", OF_LEANEST, measured, at_least=False))
    return goals


def fastest(contest: Contest, family: str, to: str) -> float | None:
    """The CPU time of a family's fastest contender, in units of another contender's."""
    ratios = [contest.ratio(name, to) for name in contest.turns if peers.CONTENDERS[name].family == family]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def of_leanest(contest: Contest, suffix: str) -> float | None:
    """Our peak memory in units of the leanest peer's: on the whole step at once, or (MICRO) where both go through it in parts."""
    names = [name for name in contest.turns if name.endswith(MICRO) == bool(suffix)]
    theirs = [contest.peak_mib(name) for name in names if peers.CONTENDERS[name].family in peers.PEERS]
    leanest = min((peak for peak in theirs if peak is not None), default=None)
    ours = contest.peak_mib(OURS + suffix) if OURS + suffix in contest.turns else None
    return None if ours is None or leanest is None else ours / leanest


# ---- growth ----------------------------------------------------------------------------------------------------------


def growth_works() -> list[StepWork]:
    """Five sizes in vectors, five in latents, and the corner that both need."""
    by_tokens = [StepWork(n_tokens=n) for n in GROWTH_TOKENS]
    by_latents = [StepWork(n_latents=n) for n in GROWTH_LATENTS]
    corner = StepWork(n_tokens=GROWTH_TOKENS[0], n_latents=GROWTH_LATENTS[-1])
    return list(dict.fromkeys([*by_tokens, *by_latents, corner]))


def growth_contest(works: list[StepWork], options: argparse.Namespace) -> Contest:
    """Our step at every size, the sizes taking turns."""
    print(
        "\ngrowth: our step, none dead; memory is the peak above what libraries, data and weights take before the first step"
    )
    return harness.compete([launch(size(work), OURS, work, options) for work in works], options.rounds)


def size(work: StepWork) -> str:
    """Vectors x latents."""
    return f"{work.n_vectors} x {work.n_latents}"


def print_growth(works: list[StepWork], contest: Contest) -> list[Goal]:
    """Print time and memory of each size and the fits; returns what they say about our promises."""
    harness.print_sizes(contest, "vectors x latents")
    there = [work for work in works if size(work) in contest.turns]
    goals = []
    for what, line in (("n_vectors", most_common(there, "n_latents")), ("n_latents", most_common(there, "n_vectors"))):
        sizes = [float(getattr(work, what)) for work in line]
        seconds = [harness.median(contest.turns[size(work)], "cpu") for work in line]
        fit = harness.fit_line(sizes, seconds) if len(line) > 2 else None
        if fit is not None:
            print(f"  CPU s = {fit.intercept:.4f} + {fit.slope:.3e} x {what} (R^2 {fit.r2:.4f}, {len(line)} sizes)")
        goals.append(Goal(f"growth: step time is a line in {what}, R^2", STRAIGHT, fit and fit.r2))
    pairs = bytes_a_pair(there, contest)
    if pairs is not None:
        print(f"  memory: {pairs:.3f} bytes for every pair of a vector and a latent (a dense float32 matrix: 4)")
    claim = "growth: bytes of memory for each pair of a vector and a latent"
    return [*goals, Goal(claim, BYTES_A_PAIR, pairs, at_least=False)]


def most_common(works: list[StepWork], fixed: str) -> list[StepWork]:
    """The works that share the most frequent value of a size: one arm of the growth."""
    values = [getattr(work, fixed) for work in works]
    mode = max(values, key=values.count, default=None)
    return [work for work in works if getattr(work, fixed) == mode]


def bytes_a_pair(works: list[StepWork], contest: Contest) -> float | None:
    """What memory grows by with vectors and latents together.

    What grows with either alone (weights, moments, activations) cancels in the difference of differences over the corners of
    the smallest and largest sizes that all four exist for.
    """
    memory = {(work.n_vectors, work.n_latents): contest.added_mib(size(work)) for work in works}
    best, found = 0, None
    for (v0, n0), (v1, n1) in itertools.permutations(memory, 2):
        corners = [memory.get(at) for at in ((v1, n1), (v1, n0), (v0, n1), (v0, n0))]
        area = (v1 - v0) * (n1 - n0)
        if v1 > v0 and area > best and None not in corners:
            both, one, other, neither = (corner or 0.0 for corner in corners)
            best, found = area, (both - one - other + neither) * 2**20 / area
    return found


if __name__ == "__main__":
    main()
