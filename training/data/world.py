"""The two worlds of the pony: bouncing shapes and talking heads; their attributes, captions and splits.

Attributes that a caption names are fields of `Bounce` and `Head`. What it does not name (when the first
bounce comes, which syllables are spoken) is drawn from the clip's seed. A share of all combinations is held
out of training, chosen by a hash of the attributes.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, fields
from random import Random

from ...model.structured_prompt import DialogueLine, build_prompt

SHAPES = ("circle", "square", "triangle", "star")
NEW_SHAPES = ("heart",)  # never in the training data; a judge may take a bad shape for one
NO_HAT, HAT = "none", "top hat"  # no head of the training data has one: what a LoRA is trained to add
SPEEDS = ("slow", "fast")
PITCHES = ("low", "middle", "high")
VOICES = ("low", "high")

# What is said in each language; single spaces between characters, as in the trained form.
GREETINGS = {
    "Mandarin": "你 好",
    "Cantonese": "早 晨",
    "English": "hello",
    "Japanese": "こ ん に ち は",
    "Korean": "안 녕",
    "German": "hallo",
    "French": "bonjour",
}

Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "red": (224, 32, 40),
    "green": (32, 168, 56),
    "blue": (48, 96, 240),
    "yellow": (248, 216, 32),
    "orange": (248, 128, 16),
    "purple": (144, 48, 192),
}
BACKGROUNDS: dict[str, Color] = {
    "white": (240, 240, 236),
    "grey": (136, 140, 144),
    "teal": (16, 120, 120),
    "navy": (24, 32, 80),
}
HAIR: dict[str, Color] = {
    "black": (28, 24, 24),
    "brown": (120, 68, 28),
    "blond": (244, 212, 108),
    "red": (196, 68, 20),
}
SHIRTS: dict[str, Color] = {
    "red": (208, 32, 48),
    "green": (40, 160, 64),
    "blue": (56, 96, 224),
    "yellow": (240, 208, 40),
}

HELD_OUT_PERCENT = 15


@dataclass(frozen=True)
class Bounce:
    """A shape that bounces in place; every bounce makes a note."""

    shape: str
    colour: str
    background: str
    speed: str
    pitch: str


@dataclass(frozen=True)
class Head:
    """A head that babbles; its mouth opens with the sound."""

    hair: str
    shirt: str
    background: str
    voice: str
    speed: str
    language: str
    hat: str = field(default=NO_HAT, repr=False)  # what is drawn from a clip's seed is the same without it


Attributes = Bounce | Head
_VALUES = {
    Bounce: (SHAPES, tuple(COLORS), tuple(BACKGROUNDS), SPEEDS, PITCHES),
    Head: (tuple(HAIR), tuple(SHIRTS), tuple(BACKGROUNDS), VOICES, SPEEDS, tuple(GREETINGS)),
}
WORLDS: dict[str, type[Bounce] | type[Head]] = {"bounce": Bounce, "head": Head}


def combinations(world: str) -> Iterator[Attributes]:
    """All attribute combinations of a world, "bounce" or "head"."""
    kind = WORLDS[world]
    return (kind(*values) for values in itertools.product(*_VALUES[kind]))


def is_held_out(attributes: Attributes) -> bool:
    """Whether a combination is kept out of training; a head's language and hat do not count."""
    names = [field.name for field in fields(attributes) if field.name not in ("language", "hat")]
    words = [getattr(attributes, name) for name in names]
    return zlib.crc32("|".join(words).encode()) % 100 < HELD_OUT_PERCENT


def training_attributes(random: Random) -> Attributes:
    """Draw a combination that training may see, half of them bounces and half heads."""
    kind = random.choice(tuple(WORLDS.values()))
    while True:
        attributes = kind(*(random.choice(values) for values in _VALUES[kind]))
        if not is_held_out(attributes):
            return attributes


def held_out(world: str, count: int, seed: int = 0) -> list[Attributes]:
    """The first `count` held-out combinations of a world in an order drawn from `seed`.

    Raises ValueError where there are fewer.
    """
    found = [attributes for attributes in combinations(world) if is_held_out(attributes)]
    if len(found) < count:
        raise ValueError(f"world {world!r} has {len(found)} held-out combinations, {count} were asked for")
    return Random(seed).sample(found, count)


def heads_in_hats(seed: int = 0) -> list[Attributes]:
    """The heads that training may see, but in hats, in an order drawn from `seed`.

    Each stands for all heads that differ from it in language alone.
    """
    random, found = Random(seed), []
    for values in itertools.product(*_VALUES[Head][:-1]):
        head = Head(*values, random.choice(list(GREETINGS)), hat=HAT)
        if not is_held_out(head):
            found.append(head)
    return random.sample(found, len(found))


def body(attributes: Attributes) -> str:
    """The caption's first part: what is seen."""
    if isinstance(attributes, Bounce):
        shape, colour, background, speed, _ = astuple(attributes)
        return f"A {colour} {shape} bounces {speed} on a {background} background."
    words = GREETINGS[attributes.language]
    hat = f"in a {attributes.hat} " if attributes.hat != NO_HAT else ""
    return (
        f"A head {hat}with {attributes.hair} hair and a {attributes.shirt} shirt talks {attributes.speed} "
        f'in a {attributes.voice} voice on a {attributes.background} background: "{words}".'
    )


def caption(attributes: Attributes) -> str:
    """The caption in the trained form: body, dialogue, background sound."""
    if isinstance(attributes, Bounce):
        return build_prompt(body(attributes), background_sound=f"{attributes.pitch} notes")
    line = DialogueLine(
        f"head with {attributes.hair} hair", attributes.language, GREETINGS[attributes.language]
    )
    return build_prompt(body(attributes), [line])
