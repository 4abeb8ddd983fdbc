"""``python -m tests.field``: run every situation and print the score."""

from __future__ import annotations

import argparse
import warnings

import torch

from tests.field.situation import LEAST_SHARE_BACK, Verdict, judge, situations


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.field", description=__doc__)
    parser.add_argument("--only", default="", help="the situations whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    verdicts = []
    for name, situation in situations():
        if options.only in name:
            verdicts.append(judge(situation, options.seed))
            print(_line(name, verdicts[-1], situation.expected_failure), flush=True)
    print(_score(verdicts))


def _line(name: str, verdict: Verdict, expected_failure: str) -> str:
    faulty, share = verdict.faulty, verdict.share_back
    parts = [f"{'right' if verdict.is_right else 'WRONG'}  {name}:"]
    parts.append(f"healthy {verdict.healthy.accuracy:.2f}")
    accused = (*verdict.healthy.accusations, *verdict.healthy.announced)
    if accused:
        parts.append(f"accused of {' '.join(dict.fromkeys(accused))}")
    if faulty is not None:
        named = " ".join(faulty.accusations) or "nothing"
        parts.append(f"· faulty {faulty.accuracy:.2f}, {named} ({verdict.cause} expected)")
    if share is not None:
        parts.append(f"· fix restores {share:.0%}")
    if expected_failure:
        parts.append(f"· open: {expected_failure}")
    return " ".join(parts)


def _score(verdicts: list[Verdict]) -> str:
    faults = [verdict for verdict in verdicts if verdict.faulty is not None]
    fixes = [verdict.share_back for verdict in faults if verdict.share_back is not None]
    accused = sum(bool(v.healthy.accusations or v.healthy.announced) for v in verdicts)
    return "\n".join(
        [
            f"situations          {len(verdicts)}, all of it right in "
            f"{sum(verdict.is_right for verdict in verdicts)}",
            f"right cause first   {sum(v.first == v.cause for v in faults)} of {len(faults)}",
            f"silent              {sum(v.first is None for v in faults)} of {len(faults)}",
            f"healthy accused     {accused} of {len(verdicts)}",
            f"fix works           {sum(s >= LEAST_SHARE_BACK for s in fixes)} of {len(fixes)}",
        ]
    )


if __name__ == "__main__":
    main()
