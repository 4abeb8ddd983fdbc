"""What users and maintainers read is plain modern English: forms to avoid, and what to write."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

AVOID = {
    r"[Tt]aken? back|[Pp]uts? back": "roll back, restore",
    r"(in|a) vain": "unused, redundant",
    r"(is|are|be|was|were) told": "is reported",
    r"tells?( \w+)? of|[Tt]ells? (what|which|whether|how|that)|tells .* (from|apart)": "reports",
    r"stands?|stand-ins?": "is, means",
    r"beside": "next to",
    r"([Nn]one|[Nn]ull|[Nn]othing|NaN|[Oo]nly|status 1) where": "if",
    r"(?<![Tt]here )(?<!when )(is|are) no (?!longer|more|harm)": "is not a",
    r"(is|are) none that": "cannot",
    r"[Ww]hat arrives|arrives? (at|in)": "inputs of",
    r"(at most )?so many": "at most N, this many",
    r"(?<![\d.,])1 (updates|layers|steps|samples|batches|channels|findings|warnings|errors)": "1 x",
    r"all the same|none the less": "anyway",
    r"learnt|anew|afresh|mended": "learned, again, fixed",
    r"[Bb]ut for": "except for",
    r"has no such|as it stands|of no": "lacks the, as it is, without",
}
FORM = re.compile("|".join(rf"\b(?:{form})\b" for form in AVOID))


def test_no_form_to_avoid_is_written():
    files = [
        file
        for file in sorted((ROOT / "bnguard").rglob("*"))
        if file.suffix in (".py", ".js", ".html")
    ]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in [*files, ROOT / "README.md"]
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        # The README's table of rules is written from the rules.
        if FORM.search(line) and not line.startswith("| BN")
    ]
    assert not found, "\n".join(found)
