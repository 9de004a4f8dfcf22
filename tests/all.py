"""All that `make test` leaves out, step by step: `make test-all`.

A step that has passed is not repeated: after an interruption or a failure the next call goes on where this one stopped. FRESH=1
begins anew, ONLY="fuzz wheel" runs some. Each step's output is in build/test-all/<step>.log.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "build" / "test-all"
STATE = FOLDER / "state.json"
LIMIT = 4 * 3600  # seconds, of all steps together on two cores


@dataclass(frozen=True)
class Step:
    """A name and its make target; ``python`` where the step wants a Python of that version."""

    name: str
    make: tuple[str, ...]
    python: str | None = None


STEPS = (
    Step("data", ("data",)),
    Step("exhaustive", ("exhaustive",)),
    Step("fuzz", ("fuzz",)),
    Step("sanitize", ("sanitize",)),
    Step("portable", ("portable",)),
    *(Step(f"torch-{torch}", ("test", f"TORCH={torch}")) for torch in ("2.10.0", "2.14.1", "2.15.0")),
    *(Step(f"python-{python}", ("test", f"PY={python}"), python) for python in ("3.10", "3.11", "3.12", "3.13")),
    Step("zoo", ("zoo",)),
    Step("counters", ("counters",)),
    Step("wheel", ("wheel",)),
)


def find_python(version: str) -> str | None:
    """A Python of that version that runs: on the path, or one of pyenv's."""
    on_path = shutil.which(f"python{version}")
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    if (pyenv := shutil.which("pyenv")) is not None:
        root = Path(subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout.strip() or root)
    candidates = [on_path, *sorted(map(str, root.glob(f"versions/{version}.*/bin/python{version}")))]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def revision() -> str:
    """The commit, with "-dirty" where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()


def skipped(log: str) -> Counter[str]:
    """How many tests a pytest run skipped, by reason."""
    found: Counter[str] = Counter()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] [^ ]+ (.*)$", log, re.M):
        found[reason] += int(count)
    return found


def run(step: Step, python: str | None) -> int:
    """Runs a step with its output in its log; returns the exit code."""
    command = ["make", "--no-print-directory", *step.make, *([f"PYTHON={python}"] if python else [])]
    with (FOLDER / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, 15)  # make and all that it started
            process.wait()
            raise


def main() -> int:
    """Runs what has not passed yet; returns 1 if a step failed."""
    only = os.environ.get("ONLY", "").split()
    if unknown := set(only) - {step.name for step in STEPS}:
        sys.exit(f"test-all: ONLY must name steps of {', '.join(step.name for step in STEPS)}, got {', '.join(sorted(unknown))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if os.environ.get("FRESH"):
        STATE.unlink(missing_ok=True)
    state: dict[str, dict[str, object]] = json.loads(STATE.read_text()) if STATE.exists() else {}
    absent: list[str] = []
    reasons: Counter[str] = Counter()
    seconds, failed = 0.0, []
    for step in STEPS:
        if only and step.name not in only:
            continue
        python = None if step.python is None else find_python(step.python)
        if step.python is not None and python is None:
            absent.append(f"{step.name}: no Python {step.python} was found")
            print(f"{step.name:15} skipped: no Python {step.python} was found", flush=True)
            continue
        before = state.get(step.name)
        if before is None:
            print(f"{step.name:15} ", end="", flush=True)
            started = time.monotonic()
            code = run(step, python)
            taken = time.monotonic() - started
            print(f"{'ok' if code == 0 else 'FAILED':8} {taken:6.0f} s", flush=True)
            if code:
                failed.append(step.name)
                print("\n".join((FOLDER / f"{step.name}.log").read_text().splitlines()[-15:]))
                seconds += taken
                continue
            before = state[step.name] = {"seconds": round(taken), "revision": revision()}
            STATE.write_text(json.dumps(state, indent=1))
        else:
            print(f"{step.name:15} ok       {before['seconds']:6} s, before, at {before['revision'] or 'an unknown commit'}")
        seconds += float(str(before["seconds"]))
        log = FOLDER / f"{step.name}.log"
        reasons += skipped(log.read_text()) if log.exists() else Counter()
    print(f"total {seconds / 60:.0f} of {LIMIT // 60} minutes; {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    for reason, count in reasons.most_common():
        print(f"  {count} tests skipped: {reason}")
    for reason in absent:
        print(f"  a step skipped: {reason}")
    if absent:
        print(f"{len(absent)} steps skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; make test-all goes on from here")
        sys.exit(130)
