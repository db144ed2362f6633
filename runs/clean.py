"""What cleaning reaches on a corpus whose every document is known, and whether it pays.

    python runs/clean.py make DATA FOLDER [documents] [seed]    the dirty corpus from DATA/text, DATA/eval
    python runs/clean.py score DATA FOLDER                      duplicates, spam, good documents, planted questions
    python runs/clean.py simhash FOLDER [distances]             duplicates by SimHash in place of MinHash
    python runs/clean.py speed DATA FOLDER                      MB/s of the whole chain on one core, and memory
    python runs/clean.py pays FOLDER [seeds] [steps]            base models of the dirty and the clean corpus

FOLDER holds dirty/*.jsonl.gz (text only), labels.jsonl.gz (a row for each: what it is) and heldout.jsonl.gz, chapters
of which nothing stands in dirty/.

Of all documents 43 % are good (books, textbooks, speeches, cut between paragraphs), 30 % copies of these, of which a
third exact and the rest edited in a known share of their words, 20 % spam of five kinds, 5 % in other languages and 2 %
good ones into which an evaluation question was put.
"""
import glob
import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time

BOOKS = ("books_standardebooks.part.jsonl.gz", "textbooks_openstax.part.jsonl.gz", "us_speeches.jsonl.gz")
SHARES = {"exact": 0.1, "edited": 0.2, "spam": 0.2, "language": 0.05, "planted": 0.02}      # the rest is good
EDITS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)       # of words: 5-gram Jaccard of about 1 to 0.6
NGRAM, JACCARD = 5, 0.8                                     # as clean.py's ngram and threshold are
HELD_OUT = 0.05                                             # of chapters
TRAINED = {"n_layer": 4, "n_head": 4, "n_embd": 256, "rows_per_step": 16, "context": 256, "eval_every": 100_000,
           "sample_tokens": 0, "curves": "false"}
WORDS = re.compile(r"\w+")

# ---- spam ----

PRODUCTS = ("watches shoes handbags sunglasses pills mortgages loans casino insurance ringtones essays followers "
            "tickets jackets mattresses vitamins hosting laptops perfumes jerseys").split()
PRAISE = ("cheap best discount online free buy now sale top replica original wholesale shipping offer price "
          "deal").split()
MENU = ("Home", "About us", "Contact", "Login", "Register", "My account", "Cart (0)", "Checkout", "Privacy policy",
        "Terms", "Sitemap", "Next", "Previous", "Share", "Tweet", "Reply", "Read more", "Subscribe", "RSS", "Print")


def stuffed(rng):
    """The same few keywords in every order."""
    words = rng.sample(PRODUCTS, 2) + rng.sample(PRAISE, 7)
    return " ".join(" ".join(rng.choices(words, k=rng.randint(5, 12))).capitalize() + "."
                    for _ in range(rng.randint(30, 90)))


def looped(rng):
    """One advertisement over and over, with a number that counts up."""
    line = (f"Visit our shop for the {rng.choice(PRAISE)} {rng.choice(PRODUCTS)} and the {rng.choice(PRODUCTS)} that "
            "everyone is talking about, and you will be glad that you did")
    return "\n".join(f"{line} ({i})!" if rng.random() < 0.3 else line + "!" for i in range(rng.randint(10, 40)))


def gibberish(rng):
    """Letters as they come, in words as long as they come."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 25))) for _ in range(rng.randint(80, 400)))


def menus(rng):
    """Menus, links and dates of pages, without a page."""
    lines = []
    for _ in range(rng.randint(30, 90)):
        link = f"http://www.{rng.choice(PRODUCTS)}-{rng.choice(PRAISE)}.example/?id={rng.randint(1, 99999)}"
        lines.append(rng.choice([*rng.choices(MENU, k=3), link, " | ".join(rng.sample(MENU, 5))]))
    return "\n".join(lines)


def tables(rng):
    """Numbers, codes and marks: logs, price lists, decoration."""
    marks = "#*$%|~=+-_<>/\\^&@★☆♥►●■"
    cell = lambda: rng.choice((f"{rng.randint(0, 10 ** 6)}", f"{rng.uniform(0, 999):.2f}",
                               f"0x{rng.getrandbits(32):08X}", rng.choice(marks) * rng.randint(1, 12)))
    return "\n".join(" ".join(cell() for _ in range(rng.randint(4, 12))) for _ in range(rng.randint(20, 80)))


SPAM = {"stuffed": stuffed, "looped": looped, "gibberish": gibberish, "menus": menus, "tables": tables}

# ---- other languages: any of each column makes a sentence ----

LANGUAGES = {name: [column.split("; ") for column in columns] for name, columns in {
    "de": (
        "Gestern; Am Morgen; Im letzten Jahr; Nach dem Essen; Manchmal; Kurz vor Weihnachten; Heute",
        "kaufte; suchte; fand; vergaß; zeichnete; reparierte; verschenkte; beschrieb",
        "meine Nachbarin; der alte Lehrer; ein Mädchen aus Köln; unser Bäcker; die Ärztin; niemand",
        "drei Äpfel; ein rotes Fahrrad; das Buch über Vögel; eine große Uhr; den Schlüssel; zwei Briefe",
        "auf dem Markt.; hinter der Schule.; in der kleinen Stadt am Fluss.; für seine Schwester.; im Regen."),
    "fr": (
        "Hier; Ce matin; L’année dernière; Après le repas; Parfois; Avant la fête; Aujourd’hui",
        "ma voisine; le vieux professeur; une fille de Lyon; notre boulanger; le médecin; personne d’autre",
        "cherchait; dessinait; réparait; oubliait; trouvait; vendait; regardait; apportait",
        "trois pommes; un vélo rouge; le livre sur les oiseaux; une grande horloge; la clé; deux lettres",
        "au marché.; derrière l’école.; dans la petite ville près du fleuve.; pour sa sœur.; sous la pluie."),
    "es": (
        "Ayer; Esta mañana; El año pasado; Después de comer; A veces; Antes de la fiesta; Hoy",
        "mi vecina; el viejo maestro; una niña de Sevilla; nuestro panadero; la médica; el señor Núñez",
        "buscaba; dibujaba; arreglaba; olvidaba; encontraba; vendía; miraba; traía",
        "tres manzanas; una bicicleta roja; el libro sobre pájaros; un reloj grande; la llave; dos cartas",
        "en el mercado.; detrás de la escuela.; en el pueblo junto al río.; para su hermana.; bajo la lluvia."),
    "it": (
        "Ieri; Stamattina; L’anno scorso; Dopo pranzo; A volte; Prima della festa; Oggi",
        "la mia vicina; il vecchio maestro; una ragazza di Bari; il nostro fornaio; il medico; mio zio",
        "cercava; disegnava; riparava; dimenticava; trovava; vendeva; guardava; portava",
        "tre mele; una bicicletta rossa; il libro sugli uccelli; un grande orologio; la chiave; due lettere",
        "al mercato.; dietro la scuola.; nella piccola città sul fiume.; per sua sorella.; sotto la pioggia."),
    "ru": (
        "Вчера; Утром; В прошлом году; После обеда; Иногда; Перед праздником; Сегодня",
        "наш сосед; старый учитель; мальчик из Казани; пекарь; врач; никто другой не",
        "искал; рисовал; чинил; забывал; находил; продавал; рассматривал; приносил",
        "три яблока; красный велосипед; книгу о птицах; большие часы; старый ключ; два письма",
        "на рынке.; за школой.; в маленьком городе у реки.; для своей сестры.; под дождём.")}.items()}


def foreign(language, rng):
    """A text of 6 to 12 sentences; in more of them the same words would come back, and give it away as spam."""
    return " ".join(" ".join(map(rng.choice, LANGUAGES[language])) for _ in range(rng.randint(6, 12)))


# ---- copies ----


def edited(text, share, rng):
    """The text with this share of its words, at least one, replaced, removed or doubled by others of its words."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    words = [text[start:end] for start, end in spans]
    out, end = [], 0
    chosen = set(rng.sample(range(len(spans)), max(1, round(share * len(spans)))))
    for i, (start, stop) in enumerate(spans):
        out.append(text[end:start])
        action = rng.randrange(3) if i in chosen else None
        out.append({None: words[i], 0: rng.choice(words), 1: "", 2: f"{words[i]} {rng.choice(words)}"}[action])
        end = stop
    return "".join(out) + text[end:]


def reshaped(text, rng):
    """The same words: as they were, in capitals, or with other white space."""
    return rng.choice((text, text, text.upper(), re.sub(r"\s+", " ", text), text.replace(" ", "  ") + "\n"))


def ngrams(text):
    words = WORDS.findall(text.lower())
    return {tuple(words[i:i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}


def jaccard(a, b):
    """Share of the word n-grams of two texts that both have."""
    a, b = ngrams(a), ngrams(b)
    return len(a & b) / len(a | b)


# ---- make ----


def read_rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path, rows):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def cut(text, rng):
    """Yields parts of 1,000 to 5,000 characters or a little more, between paragraphs; a shorter rest is left out."""
    part, wanted = "", rng.randint(1000, 5000)
    for paragraph in text.split("\n\n"):
        part = f"{part}\n\n{paragraph}" if part else paragraph
        if len(part) >= wanted:
            yield part
            part, wanted = "", rng.randint(1000, 5000)


def question_text(row):
    return next((row[name] for name in ("question", "prompt", "query", "goal") if isinstance(row.get(name), str)), "")


def corpus(good, questions, n, rng):
    """[(text, label)] of n documents, shuffled. good: an iterator of texts; questions: {file: [text]}.

    A label says `what`: good, exact, edited, spam, language or planted; and `of`, the text's place among the good ones
    that it is or copies, with the `share` edited; `kind`; or the `file` and `question` planted.
    """
    count = {what: round(share * n) for what, share in SHARES.items()}
    originals = list(itertools.islice(good, n - sum(count.values())))
    planted = list(itertools.islice(good, count["planted"]))
    if len(planted) < count["planted"]:
        raise SystemExit(f"the data folder has too little text for {n:,} documents; ask for fewer")
    rows = [(text, {"what": "good", "of": i}) for i, text in enumerate(originals)]
    for what, shares in (("exact", (0,)), ("edited", EDITS)):
        for j in range(count[what]):
            i, share = rng.randrange(len(originals)), shares[j % len(shares)]
            text = edited(originals[i], share, rng) if share else reshaped(originals[i], rng)
            rows.append((text, {"what": what, "of": i, "share": share}))
    for j in range(count["spam"]):
        kind = list(SPAM)[j % len(SPAM)]
        rows.append((SPAM[kind](rng), {"what": "spam", "kind": kind}))
    for j in range(count["language"]):
        kind = list(LANGUAGES)[j % len(LANGUAGES)]
        rows.append((foreign(kind, rng), {"what": "language", "kind": kind}))
    files = itertools.cycle(sorted(questions))
    for text, file in zip(planted, files):
        question, paragraphs = rng.choice(questions[file]), text.split("\n\n")
        shown = rng.choice((question, f"Q: {question}", question.upper(), question.replace(" ", "\n")))
        paragraphs.insert(rng.randint(0, len(paragraphs)), shown)
        rows.append(("\n\n".join(paragraphs), {"what": "planted", "file": file, "question": question}))
    rng.shuffle(rows)
    return rows


def make(data, folder, documents=8000, seed=0):
    rng = random.Random(int(seed))
    chapters = [row["text"] for name in BOOKS for row in read_rows(f"{data}/text/{name}")]
    rng.shuffle(chapters)
    held_out = int(HELD_OUT * len(chapters))
    questions = {}
    for path in evaluation_files(data):
        questions[path] = [text for text in map(question_text, read_rows(path)) if len(text.split()) >= 8]
    parts = (part for chapter in chapters[held_out:] for part in cut(chapter, rng))
    rows = corpus(parts, questions, int(documents), rng)
    shutil.rmtree(f"{folder}/dirty", ignore_errors=True)
    per_file = -(-len(rows) // 8)
    labels = []
    for number in range(8):
        path = f"{folder}/dirty/{number}.jsonl.gz"
        some = rows[number * per_file:(number + 1) * per_file]
        write_rows(path, [{"text": text} for text, _ in some])
        labels += [{"id": f"{path}:{line}", **label} for line, (_, label) in enumerate(some, 1)]
    write_rows(f"{folder}/labels.jsonl.gz", labels)
    write_rows(f"{folder}/heldout.jsonl.gz", [{"text": text} for text in chapters[:held_out]])
    size = sum(len(text.encode()) for text, _ in rows)
    print(f"{len(rows):,} documents, {size / 1e6:.1f} MB, in {folder}/dirty; {held_out:,} chapters held out")


def evaluation_files(data):
    """Files of data/eval with questions that are asked; gsm8k's training side is no evaluation."""
    return [path for path in sorted(glob.glob(f"{data}/eval/*/*.jsonl.gz"))
            if "train" not in os.path.basename(path) and question_text(read_rows(path)[0])]


# ---- score ----


def run_clean(folder, name, *flags):
    """ids of the documents that clean.py keeps of the dirty corpus."""
    out_dir = f"{folder}/{name}"
    subprocess.run([sys.executable, "clean.py", f"--sources={folder}/dirty", f"--out_dir={out_dir}", "--overwrite=true",
                    *flags], check=True)
    return {row["id"] for path in glob.glob(f"{out_dir}/documents/*.jsonl.gz") for row in read_rows(path)}


def duplicates_found(labels, texts, kept):
    """{"recall", "precision", "pairs", "dropped", "by share"} of a run that drops nothing but duplicates.

    A pair is an original and its copy of Jaccard JACCARD or more: found if not both are kept. A drop is right if one of
    the document's family (an original and its copies) has that Jaccard with it. Spam is left aside: it repeats itself.
    """
    families = {}
    for label in labels:
        if label["what"] in ("good", "exact", "edited"):
            families.setdefault(label["of"], []).append(label)
    found, by_share, right, dropped = [], {}, 0, 0
    for family in families.values():
        original = next(label for label in family if label["what"] == "good")
        for label in family:
            if label is not original:
                near = jaccard(texts[label["id"]], texts[original["id"]])
                gone = label["id"] not in kept or near >= JACCARD and original["id"] not in kept
                by_share.setdefault(label["share"], []).append((near, gone))
                found += [gone] if near >= JACCARD else []
            if label["id"] not in kept:
                dropped += 1
                right += any(jaccard(texts[label["id"]], texts[other["id"]]) >= JACCARD
                             for other in family if other is not label)
    dropped += sum(label["what"] in ("planted", "language") and label["id"] not in kept for label in labels)
    return {"recall": sum(found) / max(1, len(found)), "precision": right / max(1, dropped), "pairs": len(found),
            "dropped": dropped, "by share": by_share}


def filtered(labels, kept):
    """{(what, kind): (documents, gone)}; a good document is gone if it and all its copies are."""
    families = {label["of"] for label in labels if "of" in label and label["id"] in kept}
    counts = {}
    for label in labels:
        if label["what"] in ("exact", "edited"):
            continue
        gone = label["of"] not in families if label["what"] == "good" else label["id"] not in kept
        key = label["what"], label.get("kind") or label.get("file", "")
        before = counts.get(key, (0, 0))
        counts[key] = before[0] + 1, before[1] + gone
    return counts


def duplicates(folder, labels, *flags):
    texts = {f"{path}:{line}": row["text"] for path in glob.glob(f"{folder}/dirty/*.jsonl.gz")
             for line, row in enumerate(read_rows(path), 1)}
    alone = duplicates_found(labels, texts, run_clean(folder, "deduplicated", "--filters=", *flags))
    print(f"\nduplicates: recall {alone['recall']:.4f} of {alone['pairs']:,} copies at Jaccard {JACCARD} or more, "
          f"precision {alone['precision']:.4f} of {alone['dropped']:,} dropped")
    print("| words edited | copies | mean Jaccard | of Jaccard 0.8 or more | found | others dropped |\n"
          "|---|---|---|---|---|---|")
    for share, pairs in sorted(alone["by share"].items()):
        near, far = ([gone for j, gone in pairs if (j >= JACCARD) == side] for side in (True, False))
        mean = statistics.mean(j for j, _ in pairs)
        print(f"| {share:.1%} | {len(pairs)} | {mean:.3f} | {len(near)} | {sum(near)} | {sum(far)} |")


def simhash(folder, distances="3,6,10"):
    for distance in distances.split(","):
        print(f"\nSimHash of 3-grams, at most {distance} of 64 bits apart")
        duplicates(folder, read_rows(f"{folder}/labels.jsonl.gz"), "--near_duplicates=simhash", "--ngram=3",
                   f"--distance={distance}")


def score(data, folder):
    labels = read_rows(f"{folder}/labels.jsonl.gz")
    duplicates(folder, labels)
    counts = filtered(labels, run_clean(folder, "clean", f"--questions={','.join(evaluation_files(data))}"))
    print("\n| documents | kind | number | gone | share |\n|---|---|---|---|---|")
    for what in ("good", "spam", "language", "planted"):
        of_it = {kind: numbers for (group, kind), numbers in sorted(counts.items()) if group == what}
        total = [sum(numbers[i] for numbers in of_it.values()) for i in (0, 1)]
        for kind, (n, gone) in [*(of_it.items() if len(of_it) > 1 else ()), ("all", total)]:
            print(f"| {what} | {os.path.basename(kind)} | {n:,} | {gone:,} | {gone / n:.2%} |")


def speed(data, folder):
    begin = time.perf_counter()
    subprocess.run([sys.executable, "clean.py", f"--sources={data}/text", f"--out_dir={folder}/speed", "--workers=1",
                    "--overwrite=true"], check=True)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
    with open(f"{folder}/speed/report.json", encoding="utf-8") as file:
        size = json.load(file)["total"]["bytes_in"]
    print(f"one process: {size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s, {peak:.2f} GiB")


# ---- pays ----


def pays(folder, seeds=3, steps=1000):
    """Bits per byte of held-out chapters, their first pretrain.eval_tokens tokens, after equal tokens of either corpus;
    one tokenizer, that of the dirty one."""
    if not glob.glob(f"{folder}/clean/documents/*.jsonl.gz"):
        raise SystemExit(f"{folder}/clean holds no documents; run first: python runs/clean.py score DATA {folder}")
    for name, source, tokenizer in (("dirty", f"{folder}/dirty", ""),
                                    ("clean", f"{folder}/clean/documents", f"{folder}/tokens/dirty")):
        subprocess.run([sys.executable, "data.py", f"--sources={source}", f"--val_sources={folder}/heldout.jsonl.gz",
                        f"--tokenizer={tokenizer}", f"--out_dir={folder}/tokens/{name}", "--overwrite=true"],
                       check=True)
    found = {"dirty": [], "clean": []}
    for seed in range(int(seeds)):
        for name in found:
            out_dir = f"{folder}/models/{name}-{seed}"
            flags = {**TRAINED, "data": f"{folder}/tokens/{name}", "out_dir": out_dir, "seed": 1337 + seed,
                     "max_steps": int(steps), "overwrite": "true"}
            subprocess.run([sys.executable, "pretrain.py", *(f"--{key}={value}" for key, value in flags.items())],
                           check=True, stdout=subprocess.DEVNULL)
            with open(f"{out_dir}/log.jsonl", encoding="utf-8") as file:
                found[name].append([row["val_bpb"] for row in map(json.loads, file) if "val_bpb" in row][-1])
            print(f"seed {seed}, {name}: {found[name][-1]:.4f} bits per byte", flush=True)
    print("\n| trained on | bits per byte of held-out text, by seed | mean |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {', '.join(f'{value:.4f}' for value in values)} | {statistics.mean(values):.4f} |")
    gains = [dirty - clean for dirty, clean in zip(found["dirty"], found["clean"])]
    print(f"dirty minus clean: {', '.join(f'{gain:+.4f}' for gain in gains)}, mean {statistics.mean(gains):+.4f}")


if __name__ == "__main__":
    commands = {"make": make, "score": score, "simhash": simhash, "speed": speed, "pays": pays}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]](*map(os.path.normpath, sys.argv[2:]))
