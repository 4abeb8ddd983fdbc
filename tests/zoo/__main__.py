"""``python -m tests.zoo``: run the whole zoo and print the scoreboard."""

from __future__ import annotations

import argparse
import os
import time

from tests.zoo.runs import architectures_by_rule, run_zoo
from tests.zoo.scoreboard import scoreboard

# Limits were set from seeds 0 to 2.
SEEDS = (10, 11, 12)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.zoo", description=__doc__)
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="the runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--list", action="store_true", help="the faults of each rule, not run")
    options = parser.parse_args()
    if options.list:
        print(_listed())
        return
    start = time.perf_counter()
    faulty, healthy = run_zoo(options.seeds, only=options.only, jobs=options.jobs)
    if not faulty and not healthy:
        parser.error(f"no run has {options.only!r} in its name; --list shows the faults")
    print(scoreboard(faulty, healthy))
    seeds = ", ".join(map(str, options.seeds))
    print(f"seeds {seeds}; {time.perf_counter() - start:.0f} s in {options.jobs} processes")


def _listed() -> str:
    return "\n".join(
        f"{code}  {name}: {', '.join(architectures)}"
        for code, faults in sorted(architectures_by_rule().items())
        for name, architectures in faults.items()
    )


if __name__ == "__main__":
    main()
