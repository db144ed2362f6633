"""What repairs and strips the text of a document: small pure steps, text -> text, or None where nothing is left.

    clean(text, parse_steps("mojibake,html,unicode,whitespace"))    # (text, "") or (None, "html")

Each step leaves text alone that it is not about, and none needs another; they run in the order in which they are named,
and the default order is the sensible one. Libraries are loaded by the step that uses them, once a process.
"""
import functools
import html as entities
import importlib
import ipaddress
import re
import unicodedata

DEFAULT_STEPS = "mojibake,html,unicode,whitespace"
SURROGATES = re.compile("[\ud800-\udfff]+")
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069"
                       "\ufeff\ufff9-\ufffb]")         # not U+200C and U+200D, which Persian, Hindi and emoji need
SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
TRAILING, INNER, BLANK_LINES = re.compile(r"[ \t]+$", re.M), re.compile(r"(?<=\S) {3,}(?=\S)"), re.compile(r"\n{4,}")


def parse_steps(names):
    """["mojibake", ...] of "mojibake,..."; ValueError for one that there is not."""
    steps = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in steps if name not in STEPS]
    if unknown:
        raise ValueError(f"there is no cleaning step {unknown[0]!r}; those are {', '.join(STEPS)}")
    return steps


def clean(text, names):
    """(text, "") after the named steps, without white space around it, or (None, the step that left nothing).

    Half a surrogate pair, which no file can hold, is always repaired, even where no step is named.
    """
    if not text.isascii() and SURROGATES.search(text):
        text = surrogates(text)
    if not text.strip():
        return None, "empty"
    for name in names:
        text = STEPS[name](text)
        if not text or text.isspace():
            return None, name
    return text, ""


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
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --- characters ---

def mojibake(text):
    """Text that was decoded with the wrong encoding, decoded with the right one, line by line (ftfy).

    Only the encoding: quotes, widths, ligatures and entities stay as they are. Pure ASCII cannot be mojibake.
    """
    if text.isascii():
        return text
    ftfy = library("ftfy")
    if not ftfy.badness.is_bad(text):
        return text
    return "".join(line if line.isascii() else ftfy.fix_encoding(line) for line in text.splitlines(keepends=True))


def unicode(text):
    """Unicode's composed form, NFC: a letter and its accents are one character wherever there is one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def whitespace(text):
    """Lines end in \\n; control and invisible characters go; every kind of space is a space. Blanks at the ends of lines
    go, three and more inside a line become one, three and more empty lines two. Indentation, tabs, and the two spaces
    before a comment or after a full stop stay."""
    text = INVISIBLE.sub("", LINE_ENDS.sub("\n", text))
    if not text.isascii():
        text = SPACES.sub(" ", text)
    return BLANK_LINES.sub("\n\n\n", INNER.sub(" ", TRAILING.sub("", text))).strip("\n")


# --- markup ---

PAGE = re.compile(r"\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
TAG = re.compile(r"</?(?:a|article|b|blockquote|br|center|code|div|em|font|form|h[1-6]|hr|i|iframe|img|input|li|link|main|"
                 r"meta|nav|ol|p|pre|script|section|small|span|strong|style|table|tbody|td|th|tr|u|ul)\b[^<>]*>", re.I)
BLOCK = re.compile(r"(</?(?:article|blockquote|br|div|form|h[1-6]|hr|li|main|nav|ol|p|pre|section|table|tr|ul)\b)", re.I)
TAG_SHARE = 0.05              # of a text that begins with a tag: above it the text is HTML, below it talks about HTML


def html(text):
    """The main text of a page (trafilatura), the whole text of a fragment (selectolax); None if it has no text.

    HTML is what begins with <!doctype html>, <html>, <head> or <body>, or with any usual tag if tags are TAG_SHARE of it.
    """
    start = text.lstrip("\ufeff \t\r\n")
    if not start.startswith("<"):
        return text
    if PAGE.match(start):
        main = library("trafilatura").extract(start, include_comments=False, include_tables=True)
        return main or fragment(start)
    tags = TAG.findall(start) if TAG.match(start) else []
    return fragment(start) if sum(map(len, tags)) > TAG_SHARE * len(start) else text


def fragment(text):
    """All text between the tags, blocks as lines, without scripts and styles; None if there is none."""
    tree = library("selectolax.lexbor").LexborHTMLParser(BLOCK.sub(r"\n\1", text))
    tree.strip_tags(["script", "style", "noscript", "template", "svg", "head"], recursive=True)
    body = tree.body.text(separator="", strip=False) if tree.body else ""
    return "\n".join(filter(None, map(str.strip, body.split("\n")))) or None


STEPS = {"mojibake": mojibake, "html": html, "unicode": unicode, "whitespace": whitespace}
