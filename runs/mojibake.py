"""Cases of mojibake that cleaners.py repairs, beside ftfy's own fix_text, file by file.

    python runs/mojibake.py path/to/dirty
"""
import glob
import gzip
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ftfy

import cleaners

STRAIGHT = str.maketrans("‘’“”", "''\"\"")      # fix_text straightens quotes; the step leaves them as they were written


def main(folder):
    files = sorted(glob.glob(os.path.join(folder, "mojibake_*.json*")))
    if not files:
        sys.exit(f"runs/mojibake.py: {folder} holds no mojibake_*.json.gz")
    print(f"{'file':<36}{'cases':>7}{'mojibake':>10}{'fix_text':>10}")
    for path in files:
        with (gzip.open if path.endswith(".gz") else open)(path) as file:
            cases = json.load(file)
        expected = [case.get("fixed-encoding", case["fixed"]).translate(STRAIGHT) for case in cases]
        ours = [cleaners.mojibake(case["original"]).translate(STRAIGHT) for case in cases]
        theirs = [ftfy.fix_text(case["original"]) == case["fixed"] for case in cases]
        print(f"{os.path.basename(path):<36}{len(cases):>7}{sum(map(str.__eq__, ours, expected)):>10}{sum(theirs):>10}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
