"""What repairs and strips the text of a document: small pure steps, text -> text, or None where nothing is left.

    clean(text, parse_steps("mojibake,html,unicode,whitespace"))    # (text, "") or (None, "html")

Each step leaves text alone that it is not about, and none needs another; they run in the order in which they are named,
and the default order is the sensible one. Libraries are loaded by the step that uses them, once a process.
"""
import functools
import importlib
import ipaddress
import itertools
import re
import unicodedata

import characters
import isolated

DEFAULT_STEPS = "mojibake,html,unicode,whitespace"
NEEDS = {"mojibake": ("ftfy",), "html": ("trafilatura", "selectolax.lexbor"), "wiki": ("mwparserfromhell",)}
LONGEST = 60                  # seconds of computing that a step may spend on one document with markup
SURROGATES = re.compile("[\ud800-\udfff]+")
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
                       "\u2066-\u2069\ufeff\ufff9-\ufffb]")     # not U+200C and U+200D: Persian, Hindi, emoji need them
SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.M)
INNER, BLANK_LINES = re.compile(r"(?<=\S) {3,}(?=\S)"), re.compile(r"\n{4,}")


def parse_steps(names):
    """["mojibake", ...] of "mojibake,..."; ValueError for one that there is not, or whose library is missing."""
    steps = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in steps if name not in STEPS]
    if unknown:
        raise ValueError(f"there is no cleaning step {unknown[0]!r}; those are {', '.join(STEPS)}")
    for name in steps:
        for module in NEEDS.get(name, ()):
            library(module)
    return steps


def clean(text, names):
    """(text, "") after the named steps, or (None, the step that left nothing).

    Half a surrogate pair, which no file can hold, is always repaired, even where no step is named. Markup is parsed in
    a process of its own: "html crashed", "html took more than 60 s" or "html raised ValueError" is then the step that
    left nothing.
    """
    text = surrogates(text)
    if not text.strip():
        return None, "empty"
    for name in names:
        if name in NEEDS_CARE and NEEDS_CARE[name](text):
            try:
                text = isolated.call("cleaners", name, text, LONGEST)
            except isolated.Lost as lost:
                return None, f"{name} {lost}"
        else:
            text = STEPS[name](text)
        if not text or text.isspace():
            return None, name
    return surrogates(text), ""         # wiki makes some, of &#xD800;


@functools.cache
def library(name):
    """An imported module; ValueError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this cleaning step needs {name}, which is not installed: "
                         "pip install -r requirements-clean.txt") from None


def surrogates(text):
    """Pairs become the character they encode, and single ones U+FFFD."""
    if not SURROGATES.search(characters.odd(text)):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --- characters ---

REACH = 6                     # characters that ftfy's signs of mojibake span at most, each with one that is not ASCII
UNUSUAL = re.compile("[^\x00-\x7f“”‘’—–…]")      # what typesetters add to ASCII is never mojibake by itself
NOT_ASCII = re.compile(r"[^\x00-\x7f]+(?:[\x00-\x7f]{1,12}[^\x00-\x7f]+)*")


def mojibake(text):
    """Text that was decoded with the wrong encoding, decoded with the right one, line by line (ftfy).

    Only the encoding: quotes, widths, ligatures and entities stay as they are. Pure ASCII cannot be mojibake.
    """
    if not UNUSUAL.search(characters.odd(text)):
        return text
    ftfy = library("ftfy")
    is_bad = ftfy.badness.is_bad
    return "\n".join(ftfy.fix_encoding(line) if not line.isascii() and UNUSUAL.search(line) and suspicious(line, is_bad)
                     else line for line in text.split("\n"))


def suspicious(line, is_bad):
    """Whether ftfy would look closer at a line: decided from the surroundings of what is not ASCII, which is faster."""
    return any(is_bad(line[max(0, match.start() - REACH):match.end() + REACH]) for match in NOT_ASCII.finditer(line))


def unicode(text):
    """Unicode's composed form, NFC: a letter and its accents are one character wherever there is one."""
    return characters.nfc(text)


def whitespace(text):
    """Lines end in \\n; control and invisible characters go; every kind of space is a space. Blanks at the ends of
    lines go, three and more inside a line become one, three and more empty lines two. Indentation, tabs, and the two
    spaces before a comment or after a full stop stay."""
    odd = characters.odd(text)
    if LINE_ENDS.search(odd):
        text = LINE_ENDS.sub("\n", text)
    if INVISIBLE.search(odd):
        text = INVISIBLE.sub("", text)
    if SPACES.search(odd):
        text = SPACES.sub(" ", text)
    text += "\n"
    if " \n" in text or "\t\n" in text:
        text = TRAILING.sub("", text)
    if "   " in text:
        text = INNER.sub(" ", text)
    if "\n\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n")


# --- markup ---

FIRST_TAG = re.compile("[\ufeff \t\r\n]*<")
PAGE = re.compile(r"(?:<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
TAG = re.compile(r"</?(?:a|article|b|blockquote|br|center|code|div|em|font|form|h[1-6]|hr|i|iframe|img|input|li|link|"
                 r"main|meta|nav|ol|p|pre|script|section|small|span|strong|style|table|tbody|td|th|tr|u|"
                 r"ul)\b[^<>]*>", re.I)
BLOCK = re.compile(r"(</?(?:article|blockquote|br|div|form|h[1-6]|hr|li|main|nav|ol|p|pre|section|table|tr|ul)\b)",
                   re.I)
TAG_SHARE = 0.05              # of a text that begins with a tag: above it the text is HTML, below it talks about HTML
NESTED = re.compile(r"<(/?)(?!(?:area|base|br|col|colgroup|dd|dt|embed|hr|img|input|li|link|meta|option|p|param|source|"
                    r"tbody|td|tfoot|th|thead|tr|track|wbr)\b)[a-z][^<>]*(?<!/)>", re.I)     # what an end tag ends
DEPTH = 2000                  # of tags in tags, more than any browser builds: the time of parsing is its square


def html(text):
    """The main text of a page (trafilatura), the whole text of a fragment (selectolax); None if it has no text.

    HTML is what begins with <!doctype html>, <html>, <head> or <body>, or with any usual tag if more than TAG_SHARE of
    it is tags.
    """
    if not begins_with_tag(text):
        return text
    start = text[FIRST_TAG.match(text).end() - 1:]
    if PAGE.match(start):
        extract = library("trafilatura").extract
        try:
            main = extract(start, include_comments=False, include_tables=True)
        except Exception:               # no page of a crawl may end the run, and the text is still there
            main = None
        return main or fragment(start)
    tags = TAG.findall(start) if TAG.match(start) else []
    return fragment(start) if sum(map(len, tags)) > TAG_SHARE * len(start) else text


def begins_with_tag(text):
    return FIRST_TAG.match(text) is not None


def fragment(text):
    """All text between the tags, blocks as lines, without scripts and styles; None if there is none, or if tags stand
    more than DEPTH deep in one another."""
    ups_and_downs = (-1 if match[1] else 1 for match in NESTED.finditer(text))
    if max(itertools.accumulate(ups_and_downs), default=0) > DEPTH:
        return None
    tree = library("selectolax.lexbor").LexborHTMLParser(BLOCK.sub(r"\n\1", text))
    tree.strip_tags(["script", "style", "noscript", "template", "svg", "head"], recursive=True)
    body = tree.body.text(separator="", strip=False) if tree.body else ""
    return "\n".join(filter(None, map(str.strip, body.split("\n")))) or None


WIKI_MARKS = (re.compile(r"\[\[[^\[\]\n]+\]\]"), re.compile(r"\{\{[^{}]+\}\}"), re.compile(r"'{2,3}[^'\n]+'{2,3}"),
              re.compile(r"^(={2,6})[^=\n]+\1\s*$", re.M), re.compile(r"^\{\|", re.M))
WIKI_MEDIA = re.compile(r"\s*(?:file|image|category|media|datei|bild|kategorie|fichier|catégorie|archivo|"
                        r"categoría)\s*:", re.I)
WIKI_TAGS = {"ref", "table", "gallery", "math"}


def wiki(text):
    """MediaWiki's markup stripped (mwparserfromhell): what links and headings say stays; templates, tables, references,
    media and categories go; None for a redirect. Text with fewer than two kinds of the markup is left alone."""
    if text[:20].lstrip().lower().startswith("#redirect"):
        return None
    if not has_wiki_marks(text):
        return text
    try:
        page = library("mwparserfromhell").parse(text)
    except RecursionError:
        return text
    unwanted = page.filter_templates(recursive=False) + page.filter_comments()
    unwanted += page.filter_tags(matches=lambda node: str(node.tag).strip().lower() in WIKI_TAGS)
    unwanted += page.filter_wikilinks(matches=lambda node: WIKI_MEDIA.match(str(node.title)))
    for node in unwanted:
        try:
            page.remove(node)
        except ValueError:              # it went with the node that holds it
            pass
    return page.strip_code(normalize=True, collapse=True)


def has_wiki_marks(text):
    return sum(bool(mark.search(text)) for mark in WIKI_MARKS) >= 2


# LaTeX: no kept library strips it and leaves formulas as they are
LATEX = re.compile(r"\\(?:documentclass|usepackage|begin|end|(?:sub)*section|chapter|paragraph|cite[pt]?|label|ref|"
                   r"item)\b")
MATH = re.compile(r"\\begin\{(equation|align|gather|multline|eqnarray|displaymath|math)(\*?)\}.*?\\end\{\1\2\}|"
                  r"\\\[.*?\\\]|\\\(.*?\\\)|(?<!\\)\$\$.*?\$\$|(?<!\\)\$[^$\n]{1,500}(?<!\\)\$", re.S)
LATEX_FLOATS = re.compile(r"\\begin\{(figure|table|tabular|tikzpicture|thebibliography|filecontents|CCSXML)(\*?)\}.*?"
                          r"\\end\{\1\2\}", re.S)
LATEX_DROPPED = re.compile(
    r"[~ ]?\\(?:label|(?:eq|page|auto|c|C)?ref|[Cc]ite\w*|nocite|bibliography(?:style)?|includegraphics|input|include|"
    r"usepackage|documentclass|(?:re)?newcommand|def|vspace|hspace|setlength|setcounter|addtocounter|pagestyle|"
    r"thispagestyle|footnote|thanks|date|author|affiliation|email|index|hypersetup)\*?(?:\s*\[[^\[\]]*\])*"
    r"(?:\\?\w*)(?:\{(?:[^{}]|\{[^{}]*\})*\})+")
LATEX_HEADING = re.compile(r"(?:(?<!\s)\s+)?\\(?:title|part|chapter|(?:sub)*section|(?:sub)?paragraph)\*?"
                           r"(?:\[[^\[\]]*\])?\{((?:[^{}]|\{[^{}]*\})*)\}\s*")
LATEX_ACCENT = re.compile(r"\\(?:([\'`^\"~=.])\s*|([cvuHrkb])(?:\s+|(?=\{)))\{?\\?([A-Za-z])\}?")
ACCENTS = dict(zip("'`^\"~=.cvuHrkb", "\u0301\u0300\u0302\u0308\u0303\u0304\u0307\u0327\u030c\u0306\u030b\u030a"
                                     "\u0328\u0331"))
LATEX_SIGNS = {"ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "o": "ø", "O": "Ø", "aa": "å", "AA": "Å",
               "l": "ł", "L": "Ł", "i": "i", "ldots": "…", "dots": "…", "LaTeX": "LaTeX", "TeX": "TeX", "S": "§",
               "textbackslash": "\\"}


def latex(text):
    """LaTeX stripped to its text: title, headings and formulas stay (formulas as they are written); preamble, comments,
    floats, bibliography, citations and footnotes go; other commands leave their last argument. Text with fewer than two
    of the usual commands is left alone."""
    if not has_latex_marks(text):
        return text
    formulas = []

    def hide(match):
        formulas.append(match[0])
        return f"\ue000{len(formulas) - 1}\ue001"

    text = re.sub(r"^[ \t]*%.*\n?|(?<!\\)%.*", "", text.replace("\ue000", ""), flags=re.M)
    preamble, _, body = text.partition(r"\begin{document}")
    if body:
        title = re.search(r"\\title\*?\{(?:[^{}]|\{[^{}]*\})*\}", preamble)
        text = (title[0] if title else "") + body.partition(r"\end{document}")[0]
    text = LATEX_FLOATS.sub("", MATH.sub(hide, text))
    text = LATEX_HEADING.sub(r"\n\n\1\n\n", LATEX_DROPPED.sub("", text))
    text = LATEX_ACCENT.sub(lambda m: unicodedata.normalize("NFC", m[3] + ACCENTS[m[1] or m[2]]), text)
    text = re.sub(r"\\href\{[^{}]*\}", "", text)
    text = re.sub(r"\\(?:begin|end)\{[^{}]*\}(?:\[[^\[\]]*\]|\{[^{}]*\})*|\\bibitem", "", text)
    text = re.sub(r"(?:(?<![ \t])[ \t]+)?\\item\b[ \t]*", "- ", text)
    for _ in range(20):                 # from the inside out, as deep as anyone writes
        text, changed = re.subn(r"\\[A-Za-z]+\*?(?:\[[^\[\]]*\])*\{([^{}]*)\}", r"\1", text)
        if not changed:
            break
    text = re.sub(r"\\\\(?:\[[^\[\]]*\])?", "\n", text)
    text = re.sub(r"\\([A-Za-z]+)\*? ?", lambda m: LATEX_SIGNS.get(m[1], ""), text)
    text = re.sub(r"(?<!\\)[{}]", "", text.replace("~", " "))
    text = re.sub(r"\\([%&$_#{} ])", r"\1", text).replace("---", "—").replace("--", "–").replace("``", "“")
    text = re.sub(r"\n\s*\n", "\n\n", text.replace("''", "”")).strip()
    return re.sub("\ue000(\\d+)\ue001", lambda m: formulas[int(m[1])], text) or None


def has_latex_marks(text):
    return len(LATEX.findall(text)) >= 2


# --- what is not for a model to learn ---

EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:(?:[^\W_]|-){1,63}\.){1,8}"
                   r"(?:[A-Za-z]{2,24}(?![A-Za-z0-9_])|[^\W\d_]{2,24}\b)")      # no space need stand after .com
IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)")
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|3[068]|35|6011|64|65|62")     # the networks that issue them
PHONE = re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|"
                   r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4})(?![\w-]|\.\d)")


def luhn(digits):
    """Whether the last of the digits is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) << (place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number - 9 * (number > 9) for number in doubled) % 10 == 0


def pii(text):
    """E-mail addresses, phone numbers, public IP addresses and card numbers as [EMAIL], [PHONE], [IP] and [CARD].

    Card numbers need a known prefix and a right check digit; phone numbers a + or North America's form.
    """
    if "@" in text:
        text = EMAIL.sub("[EMAIL]", text)
    text = IPV4.sub(mask_ip, text)
    if "::" in text or text.count(":") >= 7:
        text = IPV6.sub(mask_ip, text)
    return PHONE.sub(mask_phone, CARD.sub(mask_card, text))


def mask_ip(match):
    try:
        return "[IP]" if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]


def mask_card(match):
    digits = re.sub(r"\D", "", match[0])
    return "[CARD]" if CARD_PREFIX.match(digits) and luhn(digits) else match[0]


def mask_phone(match):
    return "[PHONE]" if 8 <= sum(map(str.isdigit, match[0])) <= 15 else match[0]


NOTICE_LENGTH = 200           # characters: a longer line is prose, whatever it mentions
NOTICE = re.compile(
    r"accept (?:all )?cookies|(?:uses?|use of) cookies|cookie (?:policy|settings|preferences)|privacy policy|"
    r"terms (?:of (?:use|service)|and conditions)|all rights reserved|(?:^|\W)(?:©|\(c\)|copyright) *(?:19|20)\d\d|"
    r"^skip to (?:main )?(?:content|navigation)|"
    r"^(?:share|tweet|pin|email|print|save|like)(?: (?:this|it|on|via|to|with)\b.*)?$|"
    r"^(?:share|follow (?:us|me)|find us|like us) (?:on|via) |"
    r"^(?:log|sign) ?(?:in|up|out)(?: (?:or|to|with|now|here)\b.*)?$|"
    r"^subscribe(?: (?:to|now|here|today)\b.*)?$|sign up for (?:our|the|a) .{0,40}newsletter|enable javascript|"
    r"^(?:read|show|load|view|see) (?:more|less|all)\W*$|^(?:click|tap) here\b.{0,60}$|"
    r"^(?:back to top|leave a (?:reply|comment)|"
    r"advertisement|sponsored(?: content)?|related (?:posts|articles|stories)|previous(?: post)?|next(?: post)?|"
    r"(?:no|\d+) comments?|home|menu|search|close|toggle navigation|loading\W*|about us|contact us|sitemap)\W*$", re.I)
BETWEEN_ITEMS = re.compile("[|»›·•]")


def boilerplate(text):
    """The text without its lines that are a site's and not the page's: notices, share and sign-in links, and menus,
    which are three and more short items between | » › · or •. For web pages in English; lines that repeat across
    documents are dedup.py's."""
    lines = text.split("\n")
    kept = [line for line in lines if len(line) > NOTICE_LENGTH or not is_boilerplate(line.strip())]
    return text if len(kept) == len(lines) else "\n".join(kept).strip("\n") or None


def is_boilerplate(line):
    return bool(line) and not line.startswith("|") and (bool(NOTICE.search(line)) or is_menu(line))


def is_menu(line):
    items = BETWEEN_ITEMS.split(line)
    return len(items) > 2 and all(item and len(item.strip()) <= 30 for item in items)


STEPS = {"mojibake": mojibake, "html": html, "latex": latex, "wiki": wiki, "unicode": unicode, "whitespace": whitespace,
         "boilerplate": boilerplate, "pii": pii}
NEEDS_CARE = {"html": begins_with_tag, "latex": has_latex_marks, "wiki": has_wiki_marks}      # step: for which texts
