"""The report of a cleaning run: report.json, and report.html, one page that needs nothing beside it.

    facts = {"sources": {...}, "histograms": {...}, ...}
    report.write("data/clean", facts)
    print(report.summary(facts))

facts holds plain JSON; all but sources may be absent:

    sources      {name: {"documents_in", "bytes_in", "documents_out", "bytes_out": numbers,
                         "rejected": {rule: [documents, bytes]},       every document that came in and not out
                         "unreadable": {reason: number}, "mended": {reason: number}, "places": {reason: [text]}}}
                 as raw.py counted the last three; bytes are of text, as it came in and as it was written
    histograms   {what: {"edges": [n + 1 numbers], "in": [n], "out": [n]}}; histogram() counts, and counts add up
    duplicates   {what: number}, as in {"exact duplicates": 5, "clusters of near duplicates": 2}
    questions    {evaluation file: {"questions": that it holds, "documents": that held one}}
    examples     [{"rule", "source", "id", "text"}]: some rejected documents
    options      {name: value};  seconds: of the run
"""
import html
import itertools
import json
import os
import re
import sys
import time

import numpy as np

LENGTH_EDGES = [0, *(round(10 ** (power / 4)) for power in range(4, 29))]          # 10 characters to 10 million, log
EXAMPLE_CHARACTERS = 1500
IN, OUT = "#b9bdc5", "#2f6fb3"
COLOURS = ("#2f6fb3", "#e08a2c", "#4a9d5b", "#c0504d", "#8064a2", "#8a6d4f", "#d678b4", "#7f7f7f", "#b5b83c", "#3aa6b9")
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } small, .faint { color: #666 }
table { border-collapse: collapse; margin: .6em 0 }
td, th { padding: .2em .7em; text-align: right; vertical-align: top }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere }
tr:hover td { background: #f2f4f7 } svg { display: block; max-width: 100% }
.bar { width: 14em } .bar div { height: 1em; background: #2f6fb3 } .warning { background: #ffe9c7; padding: .5em .8em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .7em }
pre { max-height: 16em; overflow: auto }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5em } figure { margin: 0 } figcaption { font-weight: 600 }
"""


# ---- numbers ----


def histogram(values, edges):
    """Counts of values between the edges, as a list; those beyond the ends fall into the first and the last bin."""
    values = np.asarray(values, dtype=float)
    values = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
    return np.histogram(values, edges)[0].tolist()


def totals(facts):
    """{"documents_in": ..., "rejected": {rule: [documents, bytes]}, "unreadable": ...} over all sources."""
    total = {"documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0}
    rejected, unreadable, mended = {}, {}, {}
    for source in facts["sources"].values():
        for name in total:
            total[name] += source[name]
        for rule, (documents, size) in source.get("rejected", {}).items():
            before = rejected.get(rule, (0, 0))
            rejected[rule] = [before[0] + documents, before[1] + size]
        for name, into in (("unreadable", unreadable), ("mended", mended)):
            for reason, number in source.get(name, {}).items():
                into[reason] = into.get(reason, 0) + number
    return {**total, "rejected": rejected, "unreadable": unreadable, "mended": mended}


def missing(facts):
    """{source: documents that came in, and neither out nor under a rule}; something is wrong unless it is empty."""
    lost = {}
    for name, source in facts["sources"].items():
        rejected = sum(documents for documents, _ in source.get("rejected", {}).values())
        lost[name] = source["documents_in"] - source["documents_out"] - rejected
    return {name: number for name, number in lost.items() if number}


def share(part, whole):
    return f"{part / whole:.1%}" if whole else "-"


def size(number):
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def most_first(counts):
    return sorted(counts.items(), key=lambda item: (-(item[1][0] if isinstance(item[1], list) else item[1]), item[0]))


def summary(facts):
    """The run in a few lines for the console."""
    total = totals(facts)
    lines = [f"{total['documents_out']:,} of {total['documents_in']:,} documents kept "
             f"({share(total['documents_out'], total['documents_in'])}), "
             f"{size(total['bytes_out'])} of {size(total['bytes_in'])}"]
    for rule, (documents, bytes_) in most_first(total["rejected"]):
        lines.append(f"  {documents:>9,}  {size(bytes_):>9}  {rule}")
    for reason, number in most_first(total["unreadable"]):
        lines.append(f"  {number:>9,}             could not be read: {reason}")
    for reason, number in most_first(total["mended"]):
        lines.append(f"  {number:>9,}             mended: {reason}")
    for name, file in facts.get("questions", {}).items():
        lines.append(f"  {file['documents']:>9,}             held one of the {file['questions']:,} questions of {name}")
    if total["documents_in"] and not total["documents_out"]:
        rule, (number, _) = most_first(total["rejected"])[0] if total["rejected"] else ("?", (0, 0))
        lines.append(f"nothing is left: {rule!r} alone rejected {number:,}; loosen or leave out that rule")
    return "\n".join(lines)


def rejected(facts, count):
    """The first `count` examples of each rule for the console."""
    def rule(example):
        return example["rule"]
    return "".join(f"--- {rule(example)}: {example['id']}\n{example['text'][:400]}\n\n"
                   for _, of_rule in itertools.groupby(sorted(facts["examples"], key=rule), rule)
                   for example in itertools.islice(of_rule, count))


def printable(text):
    """The text as the console can show it: control characters as U+FFFD, what its encoding lacks as escapes."""
    encoding, text = sys.stdout.encoding or "utf-8", re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Pace:
    """A line every 30 s, of long work that is called for what it has done: pace("pass 1: 20 MB", share of all)."""

    def __init__(self):
        self.started = self.last_line = time.perf_counter()
        self.first = None

    def __call__(self, said, share):
        now = time.perf_counter()
        begun, before = self.first = self.first or (now, share)         # what an earlier start did took no time
        if now - self.last_line > 30:
            self.last_line = now
            left = (now - begun) * (1 - share) / (share - before) if share > before else None
            print(f"{said}, {now - self.started:,.0f} s" + (f", {share:.0%}, {left:,.0f} s left" if left else ""),
                  file=sys.stderr, flush=True)


# ---- page ----


def table(head, rows):
    """HTML of a table; cells are text, or (HTML,) as it stands."""
    def cells(row, tag):
        texts = (cell[0] if isinstance(cell, tuple) else html.escape(str(cell)) for cell in row)
        return "".join(f"<{tag}>{text}</{tag}>" for text in texts)
    return f"<table><tr>{cells(head, 'th')}</tr>" + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</table>"


def bar(part, whole):
    return (f'<div class="bar"><div style="width:{100 * part / whole if whole else 0:.2f}%"></div></div>',)


def number_text(value):
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def histogram_svg(edges, before, after, width=440, height=170):
    """SVG of two histograms, one in front of the other: bars of equal width, as the edges may grow."""
    foot, top, n = 18, max(1, *before, *after), len(before)
    step, room = width / n, height - foot - 12
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for counts, colour, inset in ((before, IN, 0.08), (after, OUT, 0.25)):
        for i, count in enumerate(counts):
            tall = room * count / top
            name = f"{number_text(edges[i])} to {number_text(edges[i + 1])}: {count:,}"
            parts.append(f'<rect x="{step * (i + inset):.1f}" y="{height - foot - tall:.1f}" height="{tall:.1f}" '
                         f'width="{step * (1 - 2 * inset):.1f}" fill="{colour}"><title>{name}</title></rect>')
    for i in range(0, n + 1, max(1, n // 5)):
        anchor = "start" if i == 0 else "end" if i == n else "middle"
        parts.append(f'<text x="{step * i:.1f}" y="{height - 4}" font-size="11" text-anchor="{anchor}" fill="#666">'
                     f"{number_text(edges[i])}</text>")
    return "".join(parts) + "</svg>"


def mixture_svg(rows, width=900):
    """SVG of one bar of shares for each (label, {name: number})."""
    names = list(dict.fromkeys(name for _, numbers in rows for name in numbers))
    parts = [f'<svg viewBox="0 0 {width} {34 * len(rows)}" width="{width}" height="{34 * len(rows)}" role="img">']
    for y, (label, numbers) in enumerate(rows):
        whole, x = sum(numbers.values()) or 1, 60
        parts.append(f'<text x="0" y="{34 * y + 20}" font-size="13" fill="#666">{label}</text>')
        for i, name in enumerate(names):
            wide = (width - 60) * numbers.get(name, 0) / whole
            note = f"{html.escape(name)}: {share(numbers.get(name, 0), whole)}"
            parts.append(f'<rect x="{x:.1f}" y="{34 * y + 3}" width="{wide:.1f}" height="26" '
                         f'fill="{COLOURS[i % len(COLOURS)]}"><title>{note}</title></rect>')
            x += wide
    return "".join(parts) + "</svg>"


def page(facts):
    """The HTML of a run."""
    total, sources = totals(facts), facts["sources"]
    body = [f"<h1>{total['documents_out']:,} of {total['documents_in']:,} documents kept</h1>",
            f"<p>{size(total['bytes_out'])} of {size(total['bytes_in'])} of text "
            f"({share(total['bytes_out'], total['bytes_in'])})"
            + (f", in {facts['seconds']:,.0f} s" if "seconds" in facts else "") + ".</p>"]
    for name, number in missing(facts).items():
        body.append(f'<p class="warning">{number:,} documents of {html.escape(name)} are unaccounted for.</p>')

    body.append("<h2>By source</h2>" + table(
        ["source", "documents in", "out", "", "bytes in", "out", ""],
        [[name, f"{s['documents_in']:,}", f"{s['documents_out']:,}", share(s["documents_out"], s["documents_in"]),
          size(s["bytes_in"]), size(s["bytes_out"]), share(s["bytes_out"], s["bytes_in"])]
         for name, s in sources.items()]))
    if len(sources) > 1:
        body.append("<h2>Mixture, by bytes</h2>" + mixture_svg(
            [(way, {name: s[f"bytes_{way}"] for name, s in sources.items()}) for way in ("in", "out")]))
        body.append(table(["", "share in", "share out"], [
            [(f'<span style="color:{COLOURS[i % len(COLOURS)]}">■</span> {html.escape(name)}',),
             share(s["bytes_in"], total["bytes_in"]), share(s["bytes_out"], total["bytes_out"])]
            for i, (name, s) in enumerate(sources.items())]))

    if total["rejected"]:
        most = max(documents for documents, _ in total["rejected"].values())
        body.append("<h2>Rejected, by rule</h2>" + table(
            ["rule", "documents", "of all", "bytes", ""],
            [[rule, f"{n:,}", share(n, total["documents_in"]), size(b), bar(n, most)]
             for rule, (n, b) in most_first(total["rejected"])]))
        if len(sources) > 1:
            rules = [rule for rule, _ in most_first(total["rejected"])]
            body.append("<details><summary>by rule and source</summary>" + table(
                ["rule", *sources],
                [[rule, *(f"{s.get('rejected', {}).get(rule, (0, 0))[0]:,}" for s in sources.values())]
                 for rule in rules]) + "</details>")
    for key, title in (("unreadable", "Could not be read"), ("mended", "Mended while reading")):
        rows = [[reason, name, f"{number:,}", "; ".join(s.get("places", {}).get(reason, []))]
                for name, s in sources.items() for reason, number in most_first(s.get(key, {}))]
        if rows:
            body.append(f"<h2>{title}</h2>" + table(["what", "source", "number", "the first of them"], rows))

    if facts.get("duplicates"):
        body.append("<h2>Duplicates</h2>" + table(["", ""], [[name, number_text(value)] for name, value in
                                                             facts["duplicates"].items()]))
    if facts.get("questions"):
        body.append("<h2>Evaluation questions found in the text</h2>" + table(
            ["file", "questions", "documents that held one"],
            [[name, *(f"{f[key]:,}" for key in ("questions", "documents"))]
             for name, f in facts["questions"].items()]))
    if facts.get("histograms"):
        body.append(f'<h2>Histograms</h2><p><span style="color:{IN}">■</span> in '
                    f'<span style="color:{OUT}">■</span> out</p><div class="pictures">')
        for name, h in facts["histograms"].items():
            body.append(f"<figure><figcaption>{html.escape(name)}</figcaption>"
                        f"{histogram_svg(h['edges'], h['in'], h['out'])}</figure>")
        body.append("</div>")
    if facts.get("examples"):
        body.append("<h2>Examples of what was rejected</h2>")
        for example in sorted(facts["examples"], key=lambda example: example["rule"]):
            text = example["text"]
            cut = "" if len(text) <= EXAMPLE_CHARACTERS else f"\n[... {len(text) - EXAMPLE_CHARACTERS:,} more]"
            body.append(f"<p><b>{html.escape(example['rule'])}</b> <small>{html.escape(example['id'])}</small></p>"
                        f"<pre>{html.escape(text[:EXAMPLE_CHARACTERS] + cut)}</pre>")
    if facts.get("options"):
        body.append("<details><summary>Options</summary>" + table(
            ["", ""], [[name, value] for name, value in facts["options"].items()]) + "</details>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Cleaning report</title>'
            f"<style>{CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n")


def write(out_dir, facts):
    """Writes report.json and report.html into out_dir, each whole or not at all; ValueError if the disk refuses."""
    from common import write_atomic
    text = json.dumps({**facts, "total": totals(facts)}, indent=1, ensure_ascii=False, default=float)
    for name, content in (("report.html", page(facts)), ("report.json", text)):     # its end, last
        write_atomic(os.path.join(out_dir, name), content.encode("utf-8", "replace"))
