"""Whether what the library says a convolution costs is what it does: formula against ones, against what runs, against gradients."""

from omniconv.analysis.verify.checks import Check, of_counters, of_problem
from omniconv.analysis.verify.grid import problems
from omniconv.analysis.verify.networks import of_network
from omniconv.analysis.verify.oracle import counted
from omniconv.analysis.verify.run import Summary, Verification, summaries, verify

__all__ = [
    "Check",
    "Summary",
    "Verification",
    "counted",
    "of_counters",
    "of_network",
    "of_problem",
    "problems",
    "summaries",
    "verify",
]
