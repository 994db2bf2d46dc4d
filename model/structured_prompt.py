"""Prompts in the form the models were trained on: a body, the spoken lines, the background sound.

The body is one English paragraph of 150 to 200 words, in which every spoken line stands in quotation marks at
the moment it is said. `Dialogue:` repeats the lines, `Background Sound:` names what else is heard. Chinese,
Japanese and Korean characters are separated by single spaces; punctuation stays where it is.
"""

# ruff: noqa: RUF001 (full-width punctuation is what is looked for)

import re
import unicodedata
from collections.abc import Iterable, Sequence
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
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3\uff66-\uff9d\uffa1-\uffdc]"
)
_MARKS = "[\u3099\u309a\uff9e\uff9f\ufe00-\ufe0f\U000e0100-\U000e01ef]*"  # belong to the character before
_BEFORE_WORD = re.compile(rf"({_CJK}{_MARKS})\s*(?=\w)")
_AFTER_WORD = re.compile(rf"(?<=\w)(?={_CJK})")
_CHARACTER = re.compile(_CJK + _MARKS)

_QUOTES = (('"', '"'), ("“", "”"), ("”", "”"), ("„", "“"), ("„", "”"), ("«", "»"), ("»", "«"),
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

_CAMERA_VERB = (
    r"(?:moves?|moving|follow(?:s|ing)?|pan(?:s|ning)?|tilt(?:s|ing)?|zoom(?:s|ing)?|orbit(?:s|ing)?|circl(?:es?|ing)"
    r"|track(?:s|ing)?|doll(?:y|ies|ying)|push(?:es|ing)?|pull(?:s|ing)?|glid(?:es?|ing)|cran(?:es|ing)"
    r"|sweep(?:s|ing)?|rotat(?:es?|ing)|swing(?:s|ing)?|shak(?:es?|ing)|drift(?:s|ing)?|ris(?:es|ing)"
    r"|fl(?:ies|ying)|cuts|cutting|travel(?:s|ing)?|approach(?:es|ing)?|advanc(?:es|ing))\b"
)
# "She looks at the camera and moves closer" is her move: the camera must be what the clause is about.
_CAMERA_SUBJECT = (
    "".join(
        rf"(?<!\b{before} )(?<!\b{before} the )"
        for before in ("to", "toward", "towards", "at", "into", "facing", "faces", "from", "off")
    )
    + r"\b(?:camera|shot|frame|viewpoint)"
)
_ADVERBS = r"(?:\s+(?:\w+ly|then|now|also|is|will|begins?|starts?|continues|to))*"
_CAMERA = re.compile(
    rf"{_CAMERA_SUBJECT}{_ADVERBS}\s+{_CAMERA_VERB}(?:\s+(?:in|out|up|down|left|right|around|back|away|across)\b)?"
    r"|\bcamera\s+(?:movements?|motion|moves|pans?|tilts?|shake|push|orbits?)\b"
    r"|\b(?:whip|slow|quick)[ -]pans?\b|\bpanning\b|(?:^|(?<=[.;:] ))(?:slowly )?pans? (?:left|right|up|down|across|to)\b"
    r"|\bzoom(?:s|ed|ing)?\b(?! (?:call|meeting|lens))"
    r"|\b(?:dolly|dollies|crash zoom|push[ -]in|pull[ -]out)\b"
    r"|\b(?:tracking|crane|drone|dolly|orbit|orbiting|handheld|following) (?:shot|camera|footage)\b"
    r"|\b(?:cuts?|cutting|jump[ -]cuts?) (?:to|away|between)\b(?= (?:a|an|the|another|black|his|her)\b)"
    r"|\b(?:scene|shot) (?:change|transition|switch)(?:e?s)?\b|\bswitch(?:es|ing)? scenes?\b",
    re.IGNORECASE,
)
# Third person, -ing and "to" forms; the exceptions after a verb are still ones ("runs a hand through her hair").
_SMALL = r"(?! (?:a|an|one|his|her|their|its|the|through|back|late|low|out of|water|shoes?|stick|eyes)\b)"
_MOTION = re.compile(
    r"\b(?:runs|running|to run|walks|walking|to walk|jumps|jumping|to jump|leaps|leaping|to leap|spins|spinning|to spin"
    rf"|fights|fighting|to fight|kicks|kicking|to kick|rides|riding|to ride|drives|driving|to drive){_SMALL}"
    r"(?: (?:away|off|around|across|along|down|up|toward|towards|into|out)\b)?"
    r"|\b(?:sprints?|sprinting|hops|hopping|danc(?:es|ing)|to dance|march(?:es|ing)|climb(?:s|ing)|to climb|swims|swimming"
    r"|somersault\w*|cartwheel\w*|backflip\w*|gallop\w*|crawl(?:s|ing)|skat(?:es|ing)|skiing|surfing|punch(?:es|ing)"
    r"|wrestl(?:es|ing)|twirl(?:s|ing)|strid(?:es|ing)|stroll(?:s|ing)|chas(?:es|ing)|rush(?:es|ing))\b"
    r"|\b(?:stands?|gets?|standing|getting) up\b(?! straight)|\b(?:sits|sitting|lies|lying) down\b"
    r"|\b(?:rises|rising|jumps|gets|leaps) to (?:his|her|their|its) feet\b|\bturn(?:s|ing) around\b"
    r"|\b(?:large|big|wide|sweeping|broad|wild|full-body) (?:arm |body |hand |limb )?(?:movements?|gestures?|motions?)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:\b(?:no|not|non|without|never|neither|nor|avoid\w*|instead of|rather than|free of)\b|n['’]t\b)"
    r"(?:(?!\b(?:but|while|as|then|when|before|after|until)\b)[^.;!?])*$",
    re.IGNORECASE,
)


def warnings_for(body: str, dialogue: Sequence[DialogueLine] = (), background_sound: str = "") -> list[str]:
    """Say in full sentences what the models do badly; an empty list where nothing is found.

    Looked for: a length other than trained, a body that is not English, camera moves and large motion (English
    words, not those spoken or negated), lines that the body lacks, and parts pasted into the wrong input.
    """
    text = spaced(body)
    told = _QUOTED.sub('""', text)  # what is said aloud moves nothing
    found = [_length_warning(text), _language_warning(told)]
    found.append(
        _phrase_warning(
            _phrases(_CAMERA, told),
            "a moving camera",
            "they were trained on a static one: describe a fixed shot",
        )
    )
    found.append(
        _phrase_warning(
            _phrases(_MOTION, told), "large motion",
            "keep the torso in place: put it into the face, the head and small gestures",
        )
    )  # fmt: skip
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
        "describe more of the face, the voice and the light"
        if num_words < low
        else "leave out what matters least"
    )
    counting = " (two Chinese, Japanese or Korean characters count as one)" if _CHARACTER.search(body) else ""
    plural = "" if num_words == 1 else "s"
    return f"body: {num_words} word{plural}{counting}; the models were trained on {low} to {high}: {cure}."


def _language_warning(told: str) -> str:
    latin = count_words(_CHARACTER.sub(" ", told))
    if count_words(told) - latin <= latin:
        return ""
    return "body: mostly not English; the models were trained on English bodies: only the spoken lines stay as they are."


def _phrases(pattern: re.Pattern[str], told: str) -> list[str]:
    """What `pattern` finds, once each, without places that the sentence denies ("no camera motion")."""
    found = (match for match in pattern.finditer(told) if not _NEGATED.search(told, 0, match.start()))
    return list(dict.fromkeys(match.group().strip() for match in found))


def _phrase_warning(phrases: Iterable[str], what: str, cure: str) -> str:
    quoted = ", ".join(f"“{phrase}”" for phrase in phrases)
    return f"body: {quoted} asks for {what}, which the models do badly; {cure}." if quoted else ""


def _line_warning(number: int, line: DialogueLine, body: str) -> str:
    words = re.findall(r"\w+", spaced(line.text).casefold())
    if not words:
        return ""
    place = re.search(r"(?<!\w)" + r"[\W_]+".join(map(re.escape, words)) + r"(?!\w)", body.casefold())
    name = f"dialogue line {number} (“{_shortened(spaced(line.text))}”)"
    if place is None:
        return f"{name}: not in the body; put the same words there, in quotation marks, when they are said."
    if not (
        _QUOTE_MARK.search(body.casefold(), 0, place.start())
        and _QUOTE_MARK.search(body.casefold(), place.end())
    ):
        return f"{name}: in the body without quotation marks; put them around the words."
    return ""


def _header_warning(name: str, text: str) -> str:
    header = _HEADER.search(text)
    if header is None:
        return ""
    socket = header.group(1).lower().replace(" ", "_")
    return f"{name}: contains “{header.group()}”; what follows belongs into {socket}, the heading is written for you."


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
