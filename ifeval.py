"""IFEval (Zhou et al. 2023, arXiv:2311.07911): 25 kinds of instructions whose following a program can verify.

    strict, loose = ifeval.check(prompt, response, instruction_ids, kwargs)

takes a row of the published file and says for each instruction whether the response follows it. Strict looks at the
response as it is. Loose is true if any of 8 variants follows: as it is, without its first line, its last line or both,
each with and without asterisks, so that "Sure, here it is:" and bold type do no harm. A blank response follows nothing.

Verdicts are meant to be those of google-research/instruction_following_eval. What differs:
- Sentences and words in capitals are counted by regular expressions here, by nltk with a trained model there.
- A language is told by its script and, within a script, by its most common words here; by langdetect there, which takes
  many English texts in capitals for other languages.
- A letter to count may be any character here; there one outside a-z is replaced by a random letter (2 rows of 541).
"""
import json
import re
import string
import unicodedata
from collections import Counter

AT_LEAST, LESS_THAN = "at least", "less than"


def compare(count, relation, threshold):
    if relation not in (AT_LEAST, LESS_THAN):
        raise ValueError(f"relation must be {AT_LEAST!r} or {LESS_THAN!r}, got {relation!r}")
    return count >= threshold if relation == AT_LEAST else count < threshold


# --- sentences, words, languages ---

# a period behind these, or behind single letters as in U.S., ends a sentence only where a word of STARTERS follows
ABBREVIATIONS = set("mr mrs ms dr prof st messrs rep sen gen lt col maj adm vs inc ltd co corp bros cos jr sr jan feb "
                    "aug sept sep oct nov dec tues wed fri ave ft ph.d".split())
STARTERS = set("The This That These It He She They We You I In If But However When While There So And Some".split())
MARKS = re.compile(r"[.!?]+(?=[\s)\]}\"';:*@({\[])")


def count_sentences(text):
    """Sentences end in . ! or ? before white space or punctuation, but not behind an abbreviation or an initial of a
    name, nor in a number or an ellipsis that goes on in lower case. The end of the text ends one too."""
    text = text.strip().rstrip(")]}\"'*_")
    count = bool(text)
    for match in MARKS.finditer(text):
        marks = match.group()
        word = re.split(r"[\s()\[\]{}\"'“‘*_-]", text[max(0, match.start() - 12):match.start()])[-1]
        space, following = re.match(r"(\s*)(\w*)", text[match.end():match.end() + 30]).groups()
        if marks.startswith(".."):
            count += following[:1].isupper()
        elif marks == "." and len(word) == 1 and word.isupper():
            count += following in STARTERS or not following[:1].isupper() or "\n" in space
        elif marks == "." and (word.lower() in ABBREVIATIONS or re.fullmatch(r"(\w\.)+\w", word)):
            count += following in STARTERS
        else:
            count += not (word.isdigit() and following[:1].islower())
    return count


def count_words(text):
    """Runs of letters, digits and underscores. Vowel signs of Indian scripts, for re gaps, are taken out before."""
    return len(re.findall(r"\w+", "".join(c for c in text if not unicodedata.category(c).startswith("M"))))


def count_capital_words(text):
    """Words in capitals, and I is one. Hyphens, slashes and periods inside a word join it; I'M and CANNOT are two."""
    text = re.sub(r"(n't|'(?:s|m|d|ll|re|ve)|(?<=\bcan)not)\b", r" \1", text, flags=re.IGNORECASE)
    return sum(word.isupper() for word in re.split(r"[\s,;:?!()\[\]{}<>\"“”‘’–—@#$%&]|--|\.\.\.", text))


# Of each language common words that its neighbours in the same script do not share, or share rarely.
COMMON_WORDS = {
    "LATIN": {
        "en": "the of and to in is that for it with as was on are be this you i by not have from or at an your my he "
              "she they we can will his her which their what if there when all has were but a do so no me "
              "over up out about",
        "es": "el la de que y en los un del las por con una su para es al lo como más pero sus este esta ser son entre "
              "cuando muy sin sobre también hasta hay donde desde nos ni yo",
        "pt": "o a de que e do da em um para com não uma os no se na por mais as dos como mas ao ele das seu sua ou "
              "ser quando muito nos já eu também pelo pela até isso são você é",
        "fr": "le la les de des et un une du en que qui dans pour sur est pas plus au par ne se ce il je avec son sont "
              "aux ou mais nous vous cette être elle été leur l d c'est",
        "it": "il di che la e un per in non è una del con si da sono le della i gli dei al ha come più ma nel alla "
              "anche lo delle questo mi su essere ho io tra nella",
        "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus "
              "er hat dass sie nach wird bei einer um am sind noch wie einem über ich wir kann oder",
        "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als maar dan bij nog uit naar hij ze "
              "we wordt door over je ik",
        "pl": "w i na z do się nie że jest o to jak po za od dla co przez ale są jego który oraz tego być może tak czy "
              "jako już ich ma",
        "fi": "ja on ei että se me ne eivät hän oli joka mutta tai kun myös ovat niin kuin sen mitä voi vain olla "
              "ole jos  minä sekä mukaan hyvin kanssa tämä siitä nyt",
        "sw": "ya na wa kwa ni katika la za cha kuwa hii yake hiyo kama lakini au watu ambayo sana pia huo mimi wewe "
              "yeye wao kila hivyo baada ili hadi bado vya kutoka zaidi",
        "vi": "là và của có không được cho một trong người với này những các để tôi đã khi bạn đến từ về như ra cũng "
              "sẽ thì nhiều vào rất tại phải theo"},
    "CYRILLIC": {
        "ru": "и в не на что с я он как это по но из у за от для мы вы так же был его или при все они чтобы если еще "
              "ещё когда быть может",
        "bg": "и в на се да от за е са че с не това по как но ще във като си е́ към бъде му или при тази този които "
              "който много може само",
        "uk": "і в на не що з та у до як це за для й але від про він ми ви бути його або при які який є також щоб якщо "
              "так можна"},
    "ARABIC": {
        "ar": "في من على إلى أن هذا هذه التي الذي عن مع كان لا ما هو هي أو كل بين كما لم قد ذلك بعد عند حيث يمكن و",
        "fa": "و در به از که این را است با برای آن یک می‌شود تا بر هم ما شما خود کرد شد های می اما یا من نیز باید هر",
        "ur": "کے کی میں ہے سے کا اور کو یہ پر نے ہیں کہ ایک بھی نہیں وہ اس تھا ہو کر لیے تو جو ہم آپ گیا ساتھ"},
    "DEVANAGARI": {
        "hi": "है के में की और से का को हैं यह पर एक नहीं भी ने कि इस लिए हो था तो कर जो या वह हम आप अपने साथ मैं",
        "mr": "आहे आणि या हे ते आहेत मध्ये त्या ही तो ती पण एक असे साठी नाही होते होता आपण मी काय त्यांच्या करण्यासाठी "
              "म्हणून किंवा तर झाले",
        "ne": "छ र को मा हो गर्न छन् यो लागि पनि एक भएको गर्ने हुन्छ छैन थियो हामी तपाईं म तथा नेपाल सबै हुन् गरेको "
              "भने त्यो वा गर्नुहोस् धेरै"},
}
OF_ONE_SCRIPT = {"BENGALI": "bn", "GURMUKHI": "pa", "GUJARATI": "gu", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn",
                 "MALAYALAM": "ml", "THAI": "th", "HANGUL": "ko", "HEBREW": "he", "HIRAGANA": "ja", "CJK": "zh",
                 "GREEK": "el"}
COMMON_WORDS = {script: {name: set(words.split()) for name, words in languages.items()}
                for script, languages in COMMON_WORDS.items()}
LANGUAGES = set(OF_ONE_SCRIPT.values()).union(*COMMON_WORDS.values())


def detect_language(text):
    """ISO 639-1 code of the language of most of the text; None if it has no letters, or too few of the common words."""
    scripts = Counter(unicodedata.name(c, "?").split()[0].replace("KATAKANA", "HIRAGANA") for c in text if c.isalpha())
    if scripts["HIRAGANA"]:                     # Japanese has more Chinese characters than its own
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)
    script = max(scripts, key=scripts.get, default=None)
    if script not in COMMON_WORDS:
        return OF_ONE_SCRIPT.get(script)
    words = Counter(word.strip(string.punctuation + "।«»“”„’‘…،؟؛–—¿¡") for word in text.lower().split())
    found = {name: sum(words[word] for word in common) for name, common in COMMON_WORDS[script].items()}
    best = max(found, key=found.get)
    return best if found[best] > 0.05 * words.total() else None


def is_english(text):
    """Texts of no certain language, such as "yes!" or a list of names, are taken for English."""
    return detect_language(text) in ("en", None)


# --- the instructions, in groups as in the paper ---

def keywords_existence(response, keywords):
    return all(keyword.lower() in response.lower() for keyword in keywords)


def keywords_frequency(response, keyword, frequency, relation):
    return compare(response.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(response, forbidden_words):
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response, letter, let_frequency, let_relation):
    return compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(response, language):
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {' '.join(sorted(LANGUAGES))}, got {language!r}")
    return detect_language(response) == language


def number_sentences(response, num_sentences, relation):
    return compare(count_sentences(response), relation, num_sentences)


def number_paragraphs(response, num_paragraphs):
    """Paragraphs are divided by ***; one may stand before the first and after the last, but nowhere two in a row."""
    parts = [bool(part.strip()) for part in response.split("***")]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


def number_words(response, num_words, relation):
    return compare(count_words(response), relation, num_words)


def nth_paragraph_first_word(response, num_paragraphs, nth_paragraph, first_word):
    """Here paragraphs are divided by blank lines."""
    paragraphs = [paragraph.split() for paragraph in response.split("\n\n")]
    if len(paragraphs) < nth_paragraph or not paragraphs[nth_paragraph - 1]:
        return False
    word = re.split(r"[.,?!'\"]", paragraphs[nth_paragraph - 1][0].lstrip("'").lstrip('"'))[0]
    return word.lower() == first_word.lower() and sum(map(bool, paragraphs)) == num_paragraphs


def number_placeholders(response, num_placeholders):
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response, postscript_marker):
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(postscript_marker.strip(), re.escape(postscript_marker.strip()))
    return bool(re.search(pattern, response, re.IGNORECASE))


def number_bullet_lists(response, num_bullets):
    lines = [line.strip() for line in response.split("\n")]
    return sum(line.startswith("-") or line.startswith("*") and line[1:2] != "*" for line in lines) == num_bullets


def constrained_response(response):
    return any(f"My answer is {answer}." in response for answer in ("yes", "no", "maybe"))


def number_highlighted_sections(response, num_highlights):
    single = [text for text in re.findall(r"\*([^\n*]*)\*", response) if text.strip()]
    double = [text for text in re.findall(r"\*\*([^\n*]*)\*\*", response) if text.strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(response, section_spliter, num_sections):
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response):
    text = re.sub(r"^```(json|Json|JSON)?|```$", "", response.strip())
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(response):
    return any(text.strip("<> \t") for text in re.findall(r"<<([^\n]+)>>", response))


def two_responses(response):
    """Exactly two that differ, divided by ******."""
    parts = [part.strip() for part in response.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(response, prompt_to_repeat):
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response, end_phrase):
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(response, capital_frequency, capital_relation):
    return compare(count_capital_words(response), capital_relation, capital_frequency)


def english_capital(response):
    return response.isupper() and is_english(response)


def english_lowercase(response):
    return response.islower() and is_english(response)


def no_comma(response):
    return "," not in response


def quotation(response):
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


FOLLOWS = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "startend:quotation": quotation,
}
SUPPORTED = set(FOLLOWS)


def loose_variants(response):
    """The 8 texts of which the loose verdict needs one; blank ones are left out."""
    lines = response.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [variant for text in [response, *shorter] for variant in (text, text.replace("*", ""))]
    return [variant for variant in dict.fromkeys(variants) if variant.strip()]


def check(prompt, response, instruction_ids, kwargs):
    """(strict, loose): two lists of bools, one for each instruction. `kwargs` are its arguments, None as if not given.

    The prompt itself decides nothing (what repeat_prompt compares with is an argument); errors quote it.
    ValueError for an unknown instruction or relation, or arguments that do not fit the instruction.
    """
    where = f"in the row with prompt {prompt[:60]!r}"
    unknown = [name for name in instruction_ids if name not in FOLLOWS]
    if unknown:
        raise ValueError(f"no instruction is called {unknown[0]!r} {where}; known are {', '.join(sorted(FOLLOWS))}")
    if len(kwargs) != len(instruction_ids):
        raise ValueError(f"{len(instruction_ids)} instructions but arguments for {len(kwargs)} {where}")
    strict, loose = [], []
    for name, arguments in zip(instruction_ids, kwargs):
        given = {key: value for key, value in arguments.items() if value is not None}
        try:
            strict.append(FOLLOWS[name](response, **given) and bool(response.strip()))
            loose.append(any(FOLLOWS[name](variant, **given) for variant in loose_variants(response)))
        except TypeError:
            raise ValueError(f"{name} was given arguments {given} that do not fit it, {where}") from None
    return strict, loose
