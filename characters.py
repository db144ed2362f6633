"""Which characters a text has beside printable ASCII, its composed form, and its words in lower case: faster than text
methods find them, since most text has few such characters, and what is true of each of those few is true of the text.

    odd("Ça va?\\n") == "\\nÇ"
"""
import functools
import re
import unicodedata

PRINTABLE = bytes(range(32, 127))
LONGEST_RUN = 30             # of combining marks, as in Unicode's stream-safe text (UAX #15): no language has more


@functools.lru_cache(maxsize=1)
def odd(text):
    """The different characters of a text that are not printable ASCII, in their order."""
    return "".join(sorted(set(others(text))))


def others(text):
    """All characters of a text that are not printable ASCII, as they stand there."""
    return text.encode("utf-8", "surrogatepass").translate(None, PRINTABLE).decode("utf-8", "surrogatepass")


def nfc(text):
    """Unicode's composed form, NFC. U+034F, which nobody sees, cuts runs of more than LONGEST_RUN combining marks: to
    put a run in order takes the square of its length."""
    if marks := "".join(filter(unicodedata.combining, odd(text))):
        text = re.sub(f"([{marks}]{{{LONGEST_RUN}}})(?=[{marks}])", "\\1\u034f", text)
    return unicodedata.normalize("NFC", text)


def lower(text):
    """text.lower() as UTF-8."""
    if odd(text).lower() == odd(text):          # of bytes, lower() changes ASCII alone
        return text.encode("utf-8", "surrogatepass").lower()
    return text.lower().encode("utf-8", "surrogatepass")


def lower_words(text):
    """text.lower().split(), each word as UTF-8."""
    if only_ascii_spaces(text):
        return lower(text).split()
    return [word.encode("utf-8", "surrogatepass") for word in text.lower().split()]


def lower_line(text):
    """" ".join(text.lower().split()) as UTF-8."""
    if not only_ascii_spaces(text):
        return b" ".join(lower_words(text))
    line = lower(text).translate(TO_SPACES)
    while b"  " in line:
        line = line.replace(b"  ", b" ")
    return line.strip()


def only_ascii_spaces(text):
    return not any(map(str.isspace, odd(text).translate(NO_SPACES)))


ASCII_SPACES = " \t\n\r\v\f"         # what bytes.split takes for white space; str.split knows more
NO_SPACES = str.maketrans("", "", ASCII_SPACES)
TO_SPACES = bytes.maketrans(ASCII_SPACES.encode(), b" " * len(ASCII_SPACES))
