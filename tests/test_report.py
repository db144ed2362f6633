"""report.py: the page shows what the facts say and nothing else, and needs nothing beside it."""
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest

import report

FACTS = {
    "sources": {
        "crawl/*.jsonl.gz": {"documents_in": 1000, "bytes_in": 2_000_000, "documents_out": 700, "bytes_out": 1_500_000,
                             "rejected": {"basic: length": [250, 100_000], "gopher: <b>words</b>": [50, 60_000]},
                             "unreadable": {"invalid JSON": 3}, "mended": {"decoded as cp1252": 7},
                             "places": {"invalid JSON": ["crawl/a.jsonl.gz:17"]}},
        "books": {"documents_in": 10, "bytes_in": 8_000_000, "documents_out": 10, "bytes_out": 7_900_000,
                  "rejected": {}}},
    "histograms": {"characters": {"edges": [0, 10, 100, 1000], "in": [5, 500, 505], "out": [0, 300, 410]}},
    "duplicates": {"exact duplicates": 41, "clusters of near duplicates": 12},
    "questions": {"eval/gsm8k.jsonl": {"questions": 1319, "documents": 6}},
    "examples": [{"rule": "basic: length", "source": "crawl", "id": "a:1", "text": "<script>alert(1)</script>"}],
    "options": {"steps": "mojibake,html"}, "seconds": 12.5}


class Tags(HTMLParser):
    """Open tags, links out of the page, and whether every tag was closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def cells(text):
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", text)]


def test_the_page_is_whole_html_that_loads_nothing_and_runs_nothing():
    page = report.page(FACTS)
    tags = Tags(page)
    assert not tags.open and not tags.links and "script" not in tags.seen and "http" not in page
    assert tags.seen.count("svg") == 2 and "&lt;script&gt;alert(1)" in page and "gopher: &lt;b&gt;words" in page


def test_the_page_shows_numbers_by_source_and_rule():
    shown = cells(report.page(FACTS))
    row = shown.index("crawl/*.jsonl.gz")
    assert shown[row:row + 7] == ["crawl/*.jsonl.gz", "1,000", "700", "70.0%", "2.0 MB", "1.5 MB", "75.0%"]
    row = shown.index("basic: length")
    assert shown[row:row + 4] == ["basic: length", "250", "24.8%", "100.0 kB"]
    row = shown.index("eval/gsm8k.jsonl")
    assert shown[row:row + 3] == ["eval/gsm8k.jsonl", "1,319", "6"]
    assert "crawl/a.jsonl.gz:17" in shown and "41" in shown


def test_bars_are_as_tall_as_their_counts():
    svg = report.histogram_svg([0, 1, 2], [10, 5], [4, 0], height=130)
    assert [float(tall) for tall in re.findall(r'<rect.*? height="([\d.]+)"', svg)] == [100, 50, 40, 0]


def test_mixture_bars_share_the_width_as_the_bytes_do():
    svg = report.mixture_svg([("in", {"a": 3, "b": 1}), ("out", {"b": 5})], width=460)
    widths = [float(width) for width in re.findall(r'<rect.*? width="([\d.]+)"', svg)]
    assert widths == [300, 100, 0, 400]


def test_a_document_that_no_rule_accounts_for_is_told():
    assert not report.missing(FACTS) and "unaccounted" not in report.page(FACTS)
    source = {**FACTS["sources"]["books"], "documents_out": 8}
    facts = {"sources": {"books": source}}
    assert report.missing(facts) == {"books": 2} and "2 documents of books are unaccounted for" in report.page(facts)


def test_histogram_counts_every_value_once_also_beyond_the_ends():
    counts = report.histogram([-5, 0, 1, 9.5, 10, 99, float("nan")], [0, 1, 10])
    assert counts == [2, 4]
    assert sum(report.histogram(range(0, 20_000_000, 777_777), report.LENGTH_EDGES)) == 26
    assert all(a < b for a, b in zip(report.LENGTH_EDGES, report.LENGTH_EDGES[1:]))


def test_totals_add_up_over_sources():
    total = report.totals(FACTS)
    assert (total["documents_in"], total["documents_out"], total["bytes_in"]) == (1010, 710, 10_000_000)
    assert total["rejected"] == {"basic: length": [250, 100_000], "gopher: <b>words</b>": [50, 60_000]}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_the_console_cannot_show_is_escaped(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, "strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    facts = {"examples": [{"rule": "b", "id": "caf\udce9:1", "text": "\u4e2d \ud800\x1b"}] + [
        {"rule": "a", "id": f"x:{i}", "text": "y" * 500} for i in range(3)]}
    print(report.printable(report.rejected(facts, 2)))
    stdout.seek(0)
    shown = "\u4e2d \\ud800\ufffd" if encoding == "utf-8" else "\\u4e2d \\ud800\\ufffd"
    assert stdout.read() == "".join(f"--- a: x:{i}\n{'y' * 400}\n\n" for i in range(2)) + (
        f"--- b: caf\\udce9:1\n{shown}\n\n\n")


def test_long_work_says_how_much_is_done_and_what_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    pace = report.Pace()
    for now[0], share in (10, 0.5), (20, 0.6), (31, 0.7), (50, 0.9), (70, 0.9):     # half of it by an earlier start
        pace("pass 1", share)
    assert capsys.readouterr().err == "pass 1, 31 s, 70%, 32 s left\npass 1, 70 s, 90%, 15 s left\n"


def test_a_run_that_keeps_nothing_names_the_rule():
    source = {"documents_in": 5, "bytes_in": 50, "documents_out": 0, "bytes_out": 0,
              "rejected": {"c4: sentences": [4, 40], "basic: length": [1, 10]}}
    said = report.summary({"sources": {"a": source}})
    assert "nothing is left: 'c4: sentences' alone rejected 4" in said
    assert "nothing is left" not in report.summary(FACTS) and "of eval/gsm8k.jsonl" in report.summary(FACTS)


def test_only_sources_need_to_be_there(tmp_path):
    empty = {"documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0}
    report.write(str(tmp_path), {"sources": {"a": empty}})
    Tags((tmp_path / "report.html").read_text())
    report.summary({"sources": {"a": empty}})


def test_json_holds_the_facts_and_files_are_replaced_whole(tmp_path):
    (tmp_path / "report.json").write_text("old")
    report.write(str(tmp_path), FACTS)
    told = json.loads((tmp_path / "report.json").read_text())
    assert {name: told[name] for name in FACTS} == FACTS and told["total"]["documents_out"] == 710
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    with pytest.raises(ValueError, match="could not write"):
        (tmp_path / "blocked/report.json").mkdir(parents=True)
        report.write(str(tmp_path / "blocked"), FACTS)


def test_the_json_that_says_a_run_is_complete_is_written_last(tmp_path, monkeypatch):
    import common
    written = []
    monkeypatch.setattr(common, "write_atomic", lambda path, content: written.append(path))
    report.write(str(tmp_path), {"sources": {}})
    assert written[-1].endswith("report.json")
