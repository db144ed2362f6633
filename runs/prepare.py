"""Seconds, MB/s and peak memory of data.py on the standard library and on GIGABYTES of text made from FILES.

    python runs/prepare.py GIGABYTES FILE.jsonl[.gz] ...
"""
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time

WORK = "out/prepare"


def measure(name, flags):
    begin = time.perf_counter()
    command = [sys.executable, "data.py", *flags, "--overwrite=true"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 10
    print(f"{name}: {seconds:.1f} s whole process, {peak:,.0f} MiB at most\n  " + "\n  ".join(said.stdout.splitlines()))


def main(gigabytes, *files):
    measure("standard library", ["--sources=stdlib", f"--out_dir={WORK}/stdlib"])
    shutil.rmtree(f"{WORK}/text", ignore_errors=True)
    os.makedirs(f"{WORK}/text")
    size = copy = 0
    while size < float(gigabytes) * 1e9:
        for file in files:
            target = f"{WORK}/text/{copy}-{os.path.basename(file).removesuffix('.gz')}"
            with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as rows, \
                    open(target, "w", encoding="utf-8") as out:
                for row in rows:
                    text = f"{copy} " + json.loads(row)["text"]         # no two copies alike
                    size += len(text.encode())
                    out.write(json.dumps({"text": text}) + "\n")
        copy += 1
    measure(f"{size / 1e9:.2f} GB of text", [f"--sources={WORK}/text", f"--out_dir={WORK}/tokens"])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: bash runs/prepare.sh GIGABYTES FILE.jsonl[.gz] ...")
    main(*sys.argv[1:])
