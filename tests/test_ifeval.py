"""ifeval.py: each kind of instruction has responses that follow it and responses that do not."""
import gzip
import json
import os
from pathlib import Path

import pytest

import ifeval

DATA = Path(os.environ.get("ZERO2CHAT_DATA") or Path(ifeval.__file__).resolve().parents[1] / "shared" / "data")
ROWS = DATA / "eval/chat/ifeval.jsonl.gz"
needs_rows = pytest.mark.skipif(not ROWS.is_file(), reason=f"no {ROWS}; set ZERO2CHAT_DATA")

# kind: (arguments, responses that follow, responses that do not)
TABLE = [
    ("keywords:existence", {"keywords": ["sea", "salt water"]}, ["The SEA is salt water.", "overseas, salt waters"],
     ["The sea is salty.", "saltwater sea"]),
    ("keywords:existence", {"keywords": ["c++", "a.b"]}, ["C++ and a.b"], ["ccc and axb"]),
    ("keywords:frequency", {"keyword": " ha ", "frequency": 3, "relation": "at least"},
     ["Ha ha ha", "hahaha", "hahahaha"], ["ha ha", "h a"]),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "less than"}, ["ha ha", "none"], ["ha ha HA"]),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "never ever"]}, ["candid, never, ever"],
     ["I CAN.", "Never ever!"]),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, ["Quick, quiet"],
     ["Quick"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"}, ["Oh!"], ["Oh!!"]),
    ("language:response_language", {"language": "de"}, ["Das ist ein Hund und er mag die Katze nicht."],
     ["This is a dog and it does not like the cat.", "Dit is een hond en hij houdt niet van de kat.", "42"]),
    ("language:response_language", {"language": "kn"}, ["ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ."], ["ఈ రోజు వాతావరణం బాగుంది."]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
     ["One. Two! Three?", "Mr. Li came. He sat. So did I."],
     ["One. Two!", "Mr. J. Li came... at 3.30 p.m. to the U.S. Embassy"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One only", "one."],
     ["One. Two."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "***\na\n***\nb\n***", "a *** b", "a\n\nx\n***\nb"], ["a\n\nb", "a\n***\n***\nb", "a***b***c"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, ["a", "a***"], ["a***b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two-three", "a b c d"],
     ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
     ["One.\n\nThen two.", "One.\n\n\"then, two", "One\nmore.\n\nTHEN"],
     ["One.\n\nAnd then.", "One.\nThen two.", "One.\n\nThen.\n\nThree.", "One.\n\n\n\nThen two.",
     "Then.\n\nThenceforth."]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] lives in [street], [city]"],
     ["[name] lives", "[name [x]", "[na\nme] [x]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. Hello", "p. s. hi"],
     ["Bye.\nPS: Hello", "P.S"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S Hello", "p. p. s."],
     ["P.S. Hello"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["n.b. hello"], ["nobs"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "Two:\n- a\n  - b", "*a\n-b\n**bold**"],
     ["* a", "* a\n* b\n- c", "a * b * c", "1. a\n2. b"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes.", "Well. My answer is maybe."],
     ["My answer is yes", "my answer is no.", "Yes."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and *b c*", "**a** and *b*"],
     ["*a*", "* a\n* b", "** ** *a*", "**a**"]),
    ("detectable_format:multiple_sections", {"section_spliter": " SECTION ", "num_sections": 2},
     ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2 SECTION3"],
     ["SECTION 1\na", "Section 1\nSection 2", "SECTION one SECTION two"]),
    ("detectable_format:json_format", {}, ['{"a": [1, null]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "3"],
     ["{'a': 1}", '{"a": 1} is it', "{", "[" * 100000]),
    ("detectable_format:title", {}, ["<<A day>>\nIt rained.", "x << y >> z"],
     ["<A day>", "<<>>", "<< >>", "<<A\nday>>"]),
    ("combination:two_responses", {}, ["a******b", "******\na\n******\nb\n******"],
     ["a", "a******a", "a******b******c", "a************b", "a*****b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Tell me why. "},
     ["Tell me why. Because.", "\n TELL ME WHY.Because"], ["Because.", "Sure! Tell me why. Because."]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ["Yes. any questions?\n", '"Any questions?"'],
     ["Any questions? Ask.", "Questions?"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"},
     ["NASA and I like U.S. food", "A-B C/D, (E)", "I'M SURE", "WE CANNOT"],
     ["NASA and ESA", "Nasa And I", "1 2 3", "A-B-C D"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, ["none here"],
     ["NO"]),
    ("change_case:english_capital", {}, ["THE DOG IS HERE.", "YES!", "3 DOGS"],
     ["THE DOG IS Here.", "123", "DER HUND IST NICHT DA."]),
    ("change_case:english_lowercase", {}, ["the dog is here.", "yes!"],
     ["The dog is here.", "123", "el perro no está en la casa."]),
    ("punctuation:no_comma", {}, ["No; none."], ["Yes, one."]),
    ("startend:quotation", {}, ['"Hello"', ' "a" and "b"\n'], ['"Hello', 'Hello', '"', "“Hello”", "'Hello'"]),
]
GOOD = [(name, arguments, response) for name, arguments, good, _ in TABLE for response in good]
BAD = [(name, arguments, response) for name, arguments, _, bad in TABLE for response in bad]

# two texts in each language of the benchmark that is not told by its script alone, one in the others
TEXTS = {
    "en": ["The weather is nice today and we are going to the beach with our friends.",
           "Dogs need food and a warm bed."],
    "es": ["Hoy hace buen tiempo y vamos a la playa con nuestros amigos.",
           "Los perros necesitan agua y también comida."],
    "pt": ["Hoje o tempo está bom e nós vamos à praia com os amigos.",
           "Os cães precisam de água e também gostam do parque."],
    "fr": ["Il fait beau et nous allons à la plage avec nos amis.", "Les chiens ont besoin d'eau et de nourriture."],
    "it": ["Oggi il tempo è bello e andiamo in spiaggia con gli amici.", "I cani hanno bisogno di acqua e di cibo."],
    "de": ["Heute ist es schön und wir gehen mit Freunden an den Strand.",
           "Hunde brauchen Wasser und mögen auch den Park."],
    "nl": ["Het weer is mooi en we gaan met vrienden naar het strand.",
           "Honden hebben water nodig en ook een warm bed."],
    "pl": ["Jest ładna pogoda i idziemy na plażę z przyjaciółmi.", "Psy potrzebują wody, ale nie lubią się kąpać."],
    "fi": ["Tänään on kaunis sää ja me menemme rannalle.", "Koirat tarvitsevat vettä, mutta ne eivät pidä sateesta."],
    "sw": ["Leo hali ya hewa ni nzuri na tunaenda pwani.", "Mbwa wanahitaji maji na chakula, pia wanapenda bustani."],
    "vi": ["Hôm nay thời tiết đẹp và chúng tôi đi biển với những người bạn.", "Chó cần nước và cũng thích đi dạo."],
    "ru": ["Сегодня хорошая погода, и мы идём на пляж с друзьями.", "Собакам нужна вода, но они не любят дождь."],
    "bg": ["Днес времето е хубаво и отиваме на плажа.", "Кучетата се нуждаят от вода, но не обичат дъжда."],
    "uk": ["Сьогодні гарна погода, і ми йдемо на пляж з друзями.", "Собакам потрібна вода, але вони не люблять дощ."],
    "ar": ["الطقس جميل اليوم ونحن ذاهبون إلى الشاطئ مع أصدقائنا.", "تحتاج الكلاب إلى الماء والطعام في الحديقة."],
    "fa": ["امروز هوا خوب است و ما با دوستانمان به ساحل می‌رویم.", "سگ‌ها به آب و غذا نیاز دارند."],
    "ur": ["آج موسم اچھا ہے اور ہم دوستوں کے ساتھ ساحل پر جا رہے ہیں۔", "کتوں کو پانی اور کھانے کی ضرورت ہے۔"],
    "hi": ["आज मौसम अच्छा है और हम दोस्तों के साथ जा रहे हैं।", "कुत्तों को पानी और भोजन की ज़रूरत होती है।"],
    "mr": ["आज हवामान छान आहे आणि आम्ही मित्रांसोबत जात आहोत.", "कुत्र्यांना पाणी आणि अन्न हवे असते."],
    "ne": ["आज मौसम राम्रो छ र हामी साथीहरूसँग जाँदैछौं।", "कुकुरहरूलाई पानी र खाना चाहिन्छ।"],
    "bn": ["আজ আবহাওয়া ভালো এবং আমরা সমুদ্র সৈকতে যাচ্ছি।"], "pa": ["ਅੱਜ ਮੌਸਮ ਚੰਗਾ ਹੈ।"],
    "gu": ["આજે હવામાન સારું છે."], "ta": ["இன்று வானிலை நன்றாக உள்ளது."], "te": ["ఈ రోజు వాతావరణం బాగుంది."],
    "kn": ["ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ."], "ml": ["ഇന്ന് കാലാവസ്ഥ നല്ലതാണ്."], "th": ["วันนี้อากาศดีและเรากำลังไปชายหาด"],
    "ko": ["오늘은 날씨가 좋아서 해변에 갑니다."], "he": ["מזג האוויר יפה היום ואנחנו הולכים לים."],
    "ja": ["今日は天気が良いので、友達と海へ行きます。", "カタカナで書く。"], "zh": ["今天天气很好，我们去海边。"],
    "el": ["Ο καιρός είναι καλός σήμερα."],
}


def strict(name, arguments, response):
    return ifeval.check("", response, [name], [arguments])[0][0]


def loose(name, arguments, response):
    return ifeval.check("", response, [name], [arguments])[1][0]


def test_the_table_shows_every_kind_both_ways():
    assert {name for name, *_ in GOOD} == {name for name, *_ in BAD} == ifeval.SUPPORTED
    assert len(ifeval.SUPPORTED) == 25


@pytest.mark.parametrize("name, arguments, response", GOOD)
def test_a_response_that_follows_passes_strict_and_loose(name, arguments, response):
    assert ifeval.check("", response, [name], [arguments]) == ([True], [True])


@pytest.mark.parametrize("name, arguments, response", BAD)
def test_a_response_that_does_not_follow_fails_strict(name, arguments, response):
    assert strict(name, arguments, response) is False


@pytest.mark.parametrize("name, arguments, response", [row for row in BAD if "*" not in row[2] and "\n" not in row[2]])
def test_without_asterisks_and_further_lines_loose_is_strict(name, arguments, response):
    assert loose(name, arguments, response) is False


@pytest.mark.parametrize("name, arguments", [row[:2] for row in TABLE])
@pytest.mark.parametrize("response", ["", " ", "\n\n\t"])
def test_a_blank_response_follows_nothing(name, arguments, response):
    assert ifeval.check("", response, [name], [arguments]) == ([False], [False])


@pytest.mark.parametrize("response, variants", [
    ("a", ["a"]), ("a\nb", ["a\nb", "b", "a"]),
    ("a\n*b*\nc", ["a\n*b*\nc", "a\nb\nc", "*b*\nc", "b\nc", "a\n*b*", "a\nb", "*b*", "b"]),
    ("*a*", ["*a*", "a"]), ("\na\n", ["\na\n", "a"]), ("", []),
])
def test_the_loose_variants_are_the_eight_of_the_paper_without_blank_and_equal_ones(response, variants):
    assert ifeval.loose_variants(response) == variants


@pytest.mark.parametrize("response, name, arguments", [
    ('Sure, here it is:\n"Hello"', "startend:quotation", {}),
    ('"Hello"\nI hope this helps, friend.', "startend:quotation", {}),
    ('Sure:\n{"a": 1}\nAnything else?', "detectable_format:json_format", {}),
    ("**My answer is **yes.", "detectable_format:constrained_response", {}),
    ("Sure,\nno comma", "punctuation:no_comma", {}),
    ("**Any** questions?", "startend:end_checker", {"end_phrase": "Any questions?"}),
])
def test_first_line_last_line_and_asterisks_are_forgiven_by_loose_only(response, name, arguments):
    assert ifeval.check("", response, [name], [arguments]) == ([False], [True])


def test_strict_is_never_more_generous_than_loose():
    for name, arguments, response in GOOD + BAD:
        assert strict(name, arguments, response) <= loose(name, arguments, response)


# --- sentences, words, languages ---

@pytest.mark.parametrize("text, count", [
    ("", 0), (" \n", 0), ("Hello", 1), ("Hello. You", 2), ("Hello.You", 1), ("3.5 is 3.50.", 1), ("A?! B", 2),
    ("a. b. c.", 3), ('He said "Go." Then left.', 2), ("(Yes.) No.", 2), ("**Bold.** Not.", 2), ("One\n\nTwo", 1),
    ("Dr. Who met Mrs. Li.", 1), ("I live in the U.S. The end.", 2), ("I saw the U.S. Senate.", 1),
    ("Wait... what?", 1), ("Wait... What?", 2), ("1. One\n2. Two", 3), ("J. R. R. Tolkien wrote.", 1),
    ("See version 2. or later", 1), ('"Stop!" he said.', 2),
])
def test_sentences_are_counted(text, count):
    assert ifeval.count_sentences(text) == count


@pytest.mark.parametrize("text, count", [
    ("", 0), ("...", 0), ("one two-three", 3), ("it's 3.5_a", 4), ("ఈ రోజు వాతావరణం", 3), ("e\u0301te\u0301", 1),
])
def test_words_are_counted_in_every_script(text, count):
    assert ifeval.count_words(text) == count


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_the_language_is_told(name, text):
    assert ifeval.detect_language(text) == name
    assert ifeval.detect_language(f"**{text}** 1, 2, 3... ") == name


@pytest.mark.parametrize("text", ["", "123 !?", "Lulu, Bella, Max", "xyzzy"])
def test_no_language_is_made_up(text):
    assert ifeval.detect_language(text) is None


# --- what the published file needs, and what is wrong input ---

@needs_rows
def test_every_published_row_can_be_checked():
    with gzip.open(ROWS, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 541
    kinds = set()
    for row in rows:
        for response in ("A short answer. Of two sentences!", row["prompt"], "*\n" * 3, ""):
            verdicts = ifeval.check(row["prompt"], response, row["instruction_id_list"], row["kwargs"])
            for verdict in verdicts:
                assert [type(v) for v in verdict] == [bool] * len(row["instruction_id_list"])
        kinds |= set(row["instruction_id_list"])
    assert kinds == ifeval.SUPPORTED


def test_arguments_that_are_none_count_as_absent():
    arguments = {"num_words": 2, "relation": "at least", "keywords": None, "language": None}
    assert ifeval.check("", "one two", ["length_constraints:number_words"], [arguments]) == ([True], [True])


def test_several_instructions_get_a_verdict_each_in_order():
    names = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    assert ifeval.check("", '"<<A>>, b"', names, [{}] * 3) == ([False, True, True], [False, True, True])


@pytest.mark.parametrize("names, kwargs, words", [
    (["keywords:nothing"], [{}], "keywords:nothing"), (["punctuation:no_comma"], [], "1 instructions"),
    (["length_constraints:number_words"], [{"num_words": 3}], "num_words"),
    (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "about"),
    (["punctuation:no_comma"], [{"letter": "a"}], "letter"),
    (["language:response_language"], [{"language": "xx"}], "xx"),
])
@pytest.mark.parametrize("response", ["text", ""])
def test_wrong_input_is_one_sentence(names, kwargs, words, response):
    with pytest.raises(ValueError) as error:
        ifeval.check("Write three words", response, names, kwargs)
    assert words in str(error.value) and "\n" not in str(error.value)
