"""Prompts in the form the models were trained on: a body, the spoken lines, the background sound.

The body is one English paragraph of 150 to 200 words, in which every spoken line stands in quotation marks at
the moment it is said. `Dialogue:` repeats the lines, `Background Sound:` names what else is heard. Chinese,
Japanese and Korean characters are separated by single spaces; punctuation stays where it is.
"""

# ruff: noqa: RUF001, RUF002 (full-width punctuation is what is looked for)

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

LANGUAGES = ("Mandarin", "Cantonese", "English", "Japanese", "Korean", "German", "French")
LINE_FORMAT = "Speaker, Language: words"
NO_SOUND = "No prominent background sound"
BODY_WORDS = (150, 200)
CJK_PER_WORD = 2  # Mandarin needs 1.5 to 2 characters for an English word, Japanese and Korean a little more

# Han with its iteration mark and zero, kana with their marks, Hangul; half-width forms last.
_CJK = (
    "[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3131-\u318e\uac00-\ud7a3\uff66-\uff9d\uffa1-\uffdc]"
)
_MARK = "[\u3099\u309a\uff9e\uff9f\ufe00-\ufe0f\U000e0100-\U000e01ef]"  # belongs to the character before
_BEFORE_WORD = re.compile(rf"({_CJK}{_MARK}*)\s*(?!{_MARK})(?=\w)")
_AFTER_WORD = re.compile(rf"(?<=\w)(?={_CJK})")
_CHARACTER = re.compile(rf"{_CJK}{_MARK}*")

_QUOTES = (('"', '"'), ("“", "”"), ("„", "“"), ("„", "”"), ("«", "»"), ("»", "«"),
           ("「", "」"), ("『", "』"), ("＂", "＂"))  # fmt: skip
_QUOTED = re.compile("|".join(f"{start}[^{start}{end}]*{end}" for start, end in _QUOTES))
_QUOTE_MARK = re.compile("[" + "".join(sorted({mark for pair in _QUOTES for mark in pair})) + "]")
_HEADER = re.compile(r"\b(Dialogue|Background Sound)\s*[:：]", re.IGNORECASE)


@dataclass(frozen=True)
class DialogueLine:
    """One spoken line: who speaks (about five words), in which of `LANGUAGES`, and the words.

    Raises ValueError for another language and for a blank speaker or text.
    """

    speaker: str
    language: str
    text: str

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"the language must be one of {', '.join(LANGUAGES)}, got {self.language!r}")
        for name in ("speaker", "text"):
            if not getattr(self, name).strip():
                raise ValueError(f"the {name} of a dialogue line is blank")

    def __str__(self) -> str:
        return f'<{spaced(self.speaker)}, {self.language}>: "{spaced(self.text)}"'


# Building


def spaced(text: str) -> str:
    """`text` as one line, single spaces between words and around every Chinese, Japanese or Korean character.

    Punctuation keeps its place: "你好，world" becomes "你 好，world". The result is in Unicode's NFC.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return _AFTER_WORD.sub(" ", _BEFORE_WORD.sub(r"\1 ", text))


def parse_dialogue(text: str) -> list[DialogueLine]:
    """Read one line per row, `Speaker, Language: words`; blank rows are skipped.

    Full-width commas and colons, quotation marks around the words and the angle brackets of the trained form
    are understood. Raises ValueError that names the row.
    """
    return [_parse_row(number, row) for number, row in enumerate(text.splitlines(), 1) if row.strip()]


def _parse_row(number: int, row: str) -> DialogueLine:
    row = row.strip()
    head, colon, words = _split(row, ":：", last=False)
    speaker, comma, language = _split(head.strip().strip("<>＜＞"), ",，、", last=True)
    name = {known.lower(): known for known in LANGUAGES}.get(language.strip().lower())
    words = _without_quotes(words.strip())
    if not colon:
        found = "no colon"
    elif not comma:
        found = "no comma before the colon"
    elif name is None:
        found = f"the language {language.strip()!r}"
    elif not speaker.strip():
        found = "no speaker"
    elif not words:
        found = "no words after the colon"
    else:
        return DialogueLine(speaker.strip(), name, words)
    raise ValueError(
        f"dialogue: row {number} has {found}, got {_shortened(row)!r}; write it as `{LINE_FORMAT}`, "
        f"where Language is one of {', '.join(LANGUAGES)}"
    )


def _split(text: str, separators: str, *, last: bool) -> tuple[str, str, str]:
    """Like str.partition at the first or last of several separators; without one, all of it comes first."""
    places = [i for i, character in enumerate(text) if character in separators]
    if not places:
        return text, "", ""
    i = places[-1 if last else 0]
    return text[:i], text[i], text[i + 1 :]


def _without_quotes(words: str) -> str:
    """Take off one pair of quotation marks that encloses all of `words`."""
    return words[1:-1].strip() if _QUOTED.fullmatch(words) else words


def build_prompt(body: str, dialogue: Sequence[DialogueLine] = (), background_sound: str = "") -> str:
    """Return the prompt in the trained form; without lines it has no `Dialogue:` part.

    A blank `background_sound` stands for none. Raises ValueError for a blank body.
    """
    if not body.strip():
        raise ValueError("body is blank: describe the person, the performance, the light and the camera")
    parts = [spaced(body)]
    if dialogue:
        parts.append("\n".join(["Dialogue:", *map(str, dialogue)]))
    sound = spaced(background_sound.strip().strip("<>＜＞")) or NO_SOUND
    parts.append(f"Background Sound:\n<{sound}>")
    return "\n\n".join(parts)


# Warnings


def _forms(verbs: str) -> str:
    """A pattern for "to run", "will run", "runs" and "running" of every verb; a bare "run" may be a noun."""
    forms = []
    for verb in verbs.split():
        stem = verb.removesuffix("e")
        ending = "es" if verb.endswith(("e", "sh", "ch")) else "s"
        forms.append(rf"(?:to|will) {verb}|{stem}{ending}|{stem}{stem[-1]}?ing")
    return rf"\b(?:{'|'.join(forms)})\b"


def _pattern(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE)


_ADVERBS = r"(?: \w+ly| (?:then|now|also|is|begins?|starts?|continues))*"
_AWAY = r"(?: (?:in|out|up|down|left|right|around|back|away|across|along|off|into|towards?)\b)?"
_CAMERA_VERBS = (
    "move follow pan tilt zoom orbit circle track push pull glide sweep rotate swing shake drift cut rise "
    "travel approach advance"
)
# In "she looks at the camera and moves" and "facing the camera, moving" it is she who does.
_LOOKED_AT = ("to", "toward", "towards", "at", "into", "facing", "faces", "from", "off", "in", "behind")
_NOT_LOOKED_AT = "".join(rf"(?<!\b{word} )(?<!\b{word} the )" for word in _LOOKED_AT)
_CAMERA = _pattern(
    rf"{_NOT_LOOKED_AT}\b(?:camera|shot|frame|view){_ADVERBS} {_forms(_CAMERA_VERBS)}{_AWAY}",
    r"\bcamera (?:movements?|motion|pan|tilt|shake|push|orbit)\b",
    r"\b(?:tracking|crane|drone|dolly|orbit|orbiting|handheld|following) (?:shot|camera|footage)\b",
    r"\b(?:whip|slow|quick)[ -]pan\b|\bpanning\b|(?:^|(?<=[.;:] ))pan (?:left|right|up|down|across|to)\b",
    r"\bzoom(?:s|ed|ing)?\b(?! (?:call|meeting|lens))|\bdoll(?:y|ies)\b|\bpush-in\b|\bpull-out\b",
    r"\b(?:jump|smash|hard)[ -]cuts?\b|\bcuts to (?:an?|the|another|black)\b|(?:^|(?<=[.;:] ))cut to\b",
    r"\b(?:scene|shot) (?:change|transition|switch)(?:e?s)?\b|\bswitch(?:es|ing)? scenes\b",
)
# A hand runs through hair, a walking stick stands still, and "drives the performance" is a figure of speech.
_BEFORE_THING = r"(?! (?:an?|one|his|her|their|its|the|through|back|late|low|out|water|shoes?)\b)"
_MOTION = _pattern(
    _forms("run spin fight") + _BEFORE_THING + _AWAY,
    _forms("walk jump leap kick ride") + r"(?! (?:sticks?|shoes?)\b)" + _AWAY,
    _forms("drive") + r"(?! (?:audio|force|rain|the (?:performance|narrative|scene|expression))\b)",
    _forms("sprint dance march climb swim gallop crawl skate surf punch wrestle twirl stride stroll chase"),
    r"\b(?:somersault|cartwheel|backflip)\w*",
    r"\b(?:stands?|gets?) up\b(?! straight)|\b(?:sits|lies) down\b|\bturn(?:s|ing) around\b",
    r"\b(?:rises|rising|jumps|leaps) to (?:his|her|their|its) feet\b",
    r"\b(?:large|big|wide|sweeping|broad|wild) (?:arm |body |hand )?(?:movement|gesture|motion)s?\b",
)
_NEGATED = re.compile(
    r"(?:\b(?:no|not|non|without|never|neither|nor|avoid\w*|instead of|rather than|free of)\b|n['’]t\b)"
    r"(?:(?!\b(?:but|while|as|then|when|before|after|until)\b)[^.;!?])*$",
    re.IGNORECASE,
)


def warnings_for(body: str, dialogue: Sequence[DialogueLine] = (), background_sound: str = "") -> list[str]:
    """Say in full sentences what the models do badly; an empty list where nothing is found.

    Looked for: a length other than trained, a body that is not English, camera moves and large motion (by
    English words, without what is spoken or denied), lines that the body lacks, parts in the wrong input.
    """
    text = spaced(body)
    told = _QUOTED.sub('""', text)  # what is said aloud moves nothing
    found = [
        _length_warning(text),
        _language_warning(told),
        _phrase_warning(_CAMERA, told, "camera moves", "let the camera stand still"),
        _phrase_warning(
            _MOTION, told, "large motion", "keep the torso in place and move face, head and hands"
        ),
    ]
    found += [_line_warning(number, line, text) for number, line in enumerate(dialogue, 1)]
    found += [_header_warning("body", body), _header_warning("background_sound", background_sound)]
    return [warning for warning in found if warning]


def count_words(text: str) -> int:
    """Count words, two Chinese, Japanese or Korean characters as one of them (rounded up)."""
    rest, num_characters = _CHARACTER.subn(" ", spaced(text))
    return sum(any(map(str.isalnum, word)) for word in rest.split()) - (-num_characters // CJK_PER_WORD)


def _length_warning(body: str) -> str:
    num_words, (low, high) = count_words(body), BODY_WORDS
    if low <= num_words <= high:
        return ""
    cure = (
        "describe face, voice and light more closely" if num_words < low else "leave out what matters least"
    )
    counting = " (two Chinese, Japanese or Korean characters count as one)" if _CHARACTER.search(body) else ""
    plural = "" if num_words == 1 else "s"
    return f"body: {num_words} word{plural}{counting}; the models were trained on {low} to {high}: {cure}."


def _language_warning(told: str) -> str:
    latin = count_words(_CHARACTER.sub(" ", told))
    if count_words(told) - latin <= latin:
        return ""
    return "body: mostly not English; write it in English, only the spoken lines in their own language."


def _phrase_warning(pattern: re.Pattern[str], told: str, what: str, cure: str) -> str:
    """Name what `pattern` finds, once each, but where the sentence denies it ("no camera motion")."""
    found = (match for match in pattern.finditer(told) if not _NEGATED.search(told, 0, match.start()))
    phrases = dict.fromkeys(f"“{match.group()}”" for match in found)
    return f"body: {', '.join(phrases)}: the models do {what} badly; {cure}." if phrases else ""


def _line_warning(number: int, line: DialogueLine, body: str) -> str:
    """Look for the words of a line in the spaced `body`; case and punctuation do not count."""
    body, words = body.casefold(), re.findall(r"\w+", spaced(line.text).casefold())
    if not words:
        return ""
    name = f"dialogue: line {number} (“{_shortened(spaced(line.text))}”)"
    place = re.search(r"(?<!\w)" + r"[\W_]+".join(map(re.escape, words)) + r"(?!\w)", body)
    if place is None:
        return f"{name} is not in the body; put the same words there, in quotation marks, when they are said."
    if not (_QUOTE_MARK.search(body, 0, place.start()) and _QUOTE_MARK.search(body, place.end())):
        return f"{name} stands in the body without quotation marks; put them around it."
    return ""


def _header_warning(name: str, text: str) -> str:
    header = _HEADER.search(text)
    if header is None:
        return ""
    socket = header.group(1).lower().replace(" ", "_")
    return (
        f"{name}: has “{header.group()}” in it; move that part to {socket}, its heading is written for you."
    )


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
