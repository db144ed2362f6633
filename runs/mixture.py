"""A mixture by temperature beside a proportional one: held-out bits per byte of each source, equal tokens, three seeds.

    python runs/mixture.py TEXT [STEPS] [TEMPERATURE]

Every .jsonl.gz and .txt.gz file of the folder TEXT is a source, of which 20 MB at most are taken. One tokenizer is
trained on all of them together, and each becomes a folder of tokens with a held-out side of its own. The two mixtures
train the same model from the same seeds on the same number of tokens; only the shares differ. A small number is good;
a difference below 0 says that the temperature won.
"""
import json
import os
import statistics
import subprocess
import sys

SEEDS = (1, 2, 3)
WORK = "out/mixture"
LIMIT = 20_000_000
MODEL = ("--n_layer=4 --n_head=4 --n_embd=256 --context=256 --rows_per_step=16 --eval_tokens=100000 --sample_tokens=0 "
         "--curves=false --compile=false")


def command(line):
    """Runs one of our scripts; what it prints goes to the end of out/mixture/output.txt."""
    with open(f"{WORK}/output.txt", "a") as output:
        subprocess.run([sys.executable, *line.split()], check=True, stdout=output, stderr=output)


def main(text, steps="800", temperature="3.3"):
    os.makedirs(WORK, exist_ok=True)
    paths = [os.path.join(text, name) for name in sorted(os.listdir(text)) if name.endswith((".jsonl.gz", ".txt.gz"))]
    if len(paths) < 2:
        raise SystemExit(f"runs/mixture.py: {text} holds {len(paths)} .jsonl.gz and .txt.gz files; a mixture needs two")
    print(f"{len(paths)} sources, {steps} steps, temperature {temperature}; see {WORK}/output.txt", flush=True)
    command(f"data.py --sources={','.join(paths)} --max_bytes={LIMIT} --out_dir={WORK}/all --overwrite=true")
    folders = {}
    for path in paths:
        name = os.path.basename(path).split(".")[0]
        folders[name] = f"{WORK}/{name}"
        command(f"data.py --sources={path} --max_bytes={LIMIT} --tokenizer={WORK}/all --out_dir={WORK}/{name} "
                "--overwrite=true")

    final = {}                                              # (mixture, seed): the last evaluation's record
    mixtures = {"proportional": 1, "temperature": float(temperature)}
    for seed in SEEDS:
        for mixture, t in mixtures.items():
            out_dir = f"{WORK}/{mixture}-{seed}"
            command(f"pretrain.py --data={','.join(folders.values())} --mix_temperature={t:g} --max_steps={steps} "
                    f"--eval_every={steps} --seed={seed} --out_dir={out_dir} --overwrite=true {MODEL}")
            with open(f"{out_dir}/log.jsonl") as log:
                final[mixture, seed] = [record for record in map(json.loads, log) if "val_bpb" in record][-1]
            print(f"seed {seed}, {mixture}: " + ", ".join(
                f"{name} {final[mixture, seed][f'val_bpb/{name}']:.4f}" for name in folders), flush=True)

    print(f"\n{'source':28} {'share of tokens':>16} {'epochs':>14} {'bits per byte':>18} {'difference, each seed':>26}")
    first = [final[mixture, SEEDS[0]] for mixture in mixtures]
    trained = [sum(record[f"tokens/{name}"] for name in folders) for record in first]
    for name in sorted(folders, key=lambda name: first[0][f"tokens/{name}"]):
        shares = [f"{record[f'tokens/{name}'] / total:.1%}" for record, total in zip(first, trained)]
        epochs = [f"{record[f'epoch/{name}']:.2f}" for record in first]
        scores = [[final[mixture, seed][f"val_bpb/{name}"] for seed in SEEDS] for mixture in mixtures]
        differences = [after - before for before, after in zip(*scores)]
        print(f"{name:28} {' > '.join(shares):>16} {' > '.join(epochs):>14} "
              f"{' > '.join(f'{statistics.mean(each):.4f}' for each in scores):>18} "
              f"{' '.join(f'{difference:+.4f}' for difference in differences):>26}")
    means = [[statistics.mean(final[mixture, seed][f"val_bpb/{name}"] for name in folders) for seed in SEEDS]
             for mixture in mixtures]
    print(f"{'mean of the sources':60} {' > '.join(f'{statistics.mean(each):.4f}' for each in means):>18} "
          f"{' '.join(f'{after - before:+.4f}' for before, after in zip(*means)):>26}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: bash runs/mixture.sh TEXT [STEPS] [TEMPERATURE]")
    main(*sys.argv[1:])
