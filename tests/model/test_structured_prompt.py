"""Prompts in the trained form: how they are built, read from a widget, and what is warned about."""

# ruff: noqa: RUF001 (full-width punctuation belongs to the languages tried)

import dataclasses
import json
import unicodedata
from pathlib import Path

import pytest

from happyhorse.model.structured_prompt import (
    LANGUAGES,
    DialogueLine,
    build_prompt,
    count_words,
    parse_dialogue,
    spaced,
    warnings_for,
)

PACK = Path(__file__).parents[2]
FILLER = "The light is soft and even and falls on his calm face from the left side. "  # 15 words
SAID = 'He says calmly, "Guten Morgen, wie geht\'s?" '
BODY = (SAID + FILLER * 10).strip()  # 157 words
GREETING = DialogueLine("Old man in red hat", "German", "Guten Morgen, wie geht's?")


def warned(body: str, *lines: DialogueLine, sound: str = "") -> str:
    """All warnings but the one on the length."""
    return "\n".join(w for w in warnings_for(body, lines, sound) if "trained on 150 to 200" not in w)


# Building


def test_a_prompt_has_the_trained_form() -> None:
    lines = [GREETING, DialogueLine("Young woman in yellow coat", "Mandarin", "你好，老师。")]
    assert build_prompt("An old man speaks.", lines, "A low hum of a lift") == (
        "An old man speaks.\n"
        "\n"
        "Dialogue:\n"
        '<Old man in red hat, German>: "Guten Morgen, wie geht\'s?"\n'
        '<Young woman in yellow coat, Mandarin>: "你 好，老 师。"\n'
        "\n"
        "Background Sound:\n"
        "<A low hum of a lift>"
    )


def test_without_lines_there_is_no_dialogue_part_and_without_sound_the_fixed_words() -> None:
    want = "A man smiles.\n\nBackground Sound:\n<No prominent background sound>"
    assert build_prompt("A man smiles.") == build_prompt(" A man smiles.\n", [], "\n ") == want
    assert build_prompt("A man smiles.", [], "<No prominent background sound>") == want


def test_the_body_is_one_paragraph() -> None:
    assert build_prompt("One  line.\nAnother.\n\nA third.").startswith("One line. Another. A third.\n\nBack")


@pytest.mark.parametrize("body", ["", " \n\t\u3000"])
def test_a_blank_body_is_refused(body: str) -> None:
    with pytest.raises(ValueError, match="body is blank: describe"):
        build_prompt(body, [GREETING], "rain")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("你好，世界！", "你 好，世 界！"),
        ("你 好　世 界", "你 好 世 界"),
        ("有的人在一起，还带着假面具呢...", "有 的 人 在 一 起，还 带 着 假 面 具 呢..."),
        ("早晨，你食咗飯未呀？", "早 晨，你 食 咗 飯 未 呀？"),
        ("スーパーで「お茶」", "ス ー パ ー で「お 茶」"),
        ("ｶﾞﾗｽ", "ｶﾞ ﾗ ｽ"),
        ("안녕하세요, 세계!", "안 녕 하 세 요, 세 계!"),
        ("事業はSDGsに2つ", "事 業 は SDGs に 2 つ"),
        ("佐々木", "佐 々 木"),
        ("𠮷野", "𠮷 野"),
        ('He says, "你好" again', 'He says, "你 好" again'),
        ("Schöne Grüße, l'œuvre naïve", "Schöne Grüße, l'œuvre naïve"),
        ("", ""),
    ],
)
def test_chinese_japanese_and_korean_characters_stand_apart(text: str, want: str) -> None:
    assert spaced(text) == want
    assert spaced(want) == want


@pytest.mark.parametrize("text", ["한국어", "が ぎ", "Köln"])
def test_decomposed_characters_are_composed_first(text: str) -> None:
    assert spaced(unicodedata.normalize("NFD", text)) == spaced(text)


# Lines


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_read_in_any_case(language: str) -> None:
    for row in (
        f"A girl, {language}: Hi",
        f"A girl,{language.upper()}:Hi",
        f"A girl， {language.lower()}： Hi",
    ):
        assert parse_dialogue(row) == [DialogueLine("A girl", language, "Hi")]


@pytest.mark.parametrize(
    "row",
    [
        "Old man, red hat, German: Ach: so!",
        '  <Old man, red hat, German>: "Ach: so!"  ',
        "Old man, red hat, German: “Ach: so!”",
        "Old man, red hat, German: „Ach: so!“",
        "Old man, red hat, German：「Ach: so!」",
        "＜Old man, red hat, German＞： « Ach: so! »",
    ],
)
def test_a_row_may_have_more_commas_colons_quotation_marks_and_brackets(row: str) -> None:
    assert parse_dialogue(row) == [DialogueLine("Old man, red hat", "German", "Ach: so!")]


def test_only_marks_around_all_words_are_taken_off() -> None:
    for words in ('"No" and "yes"', "'Tis late", "Say “no”"):
        assert parse_dialogue(f"A girl, English: {words}")[0].text == words


def test_what_is_built_is_read_back() -> None:
    lines = [GREETING, DialogueLine("Young woman, yellow coat", "Korean", "안 녕, 세 계!")]
    assert parse_dialogue("\n".join(map(str, lines))) == lines


def test_blank_rows_are_skipped_and_nothing_is_no_line() -> None:
    assert parse_dialogue("") == parse_dialogue(" \n\n") == []
    assert len(parse_dialogue("\nA, English: one\n\r\n  \nB, English: two\n")) == 2


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("Hello there", "no colon"),
        ("Anna: Hello", "no comma before the colon"),
        ("German: Hallo", "no comma before the colon"),
        ("Anna, Chinese: 你好", "the language 'Chinese'"),
        ("Anna, : Hello", "the language ''"),
        (", English: Hello", "no speaker"),
        ("Anna, English:", "no words after the colon"),
        ('Anna, English: " "', "no words after the colon"),
    ],
)
def test_a_wrong_row_is_named_with_the_form_and_the_languages(row: str, found: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_dialogue(f"Anna, English: fine\n\n{row}")
    message = str(error.value)
    assert message.startswith(f"dialogue: row 3 has {found}, got {row!r};")
    assert "`Speaker, Language: words`" in message
    assert all(language in message for language in LANGUAGES)


def test_a_long_row_is_shortened_in_the_error() -> None:
    with pytest.raises(ValueError, match="x…'") as error:
        parse_dialogue("x" * 5000)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (("A", "Spanish", "Hola"), "must be one of Mandarin, .*French, got 'Spanish'"),
        ((" ", "English", "Hi"), "speaker of a dialogue line is blank"),
        (("A", "English", "\n"), "text of a dialogue line is blank"),
    ],
)
def test_a_line_made_by_hand_is_checked(values: tuple[str, str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DialogueLine(*values)


def test_lines_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GREETING.text = "x"


# Warnings


def test_a_body_as_trained_has_no_warning() -> None:
    assert warnings_for(BODY, [GREETING], "rain on a roof") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("It's 2 - two!", 3), ("你好，世界", 2), ("你好吗", 2), ("He says: 你好", 3), ("...", 0)],
)
def test_words_are_counted_and_two_cjk_characters_are_one(text: str, count: int) -> None:
    assert count_words(text) == count


@pytest.mark.parametrize(("num_words", "warns"), [(149, True), (150, False), (200, False), (201, True)])
def test_lengths_other_than_trained_are_warned_about(num_words: int, warns: bool) -> None:
    warnings = warnings_for("word " * num_words)
    assert warnings == [] or (warns and len(warnings) == 1)
    assert any(f"{num_words} words; the models were trained on 150 to 200" in w for w in warnings) == warns


def test_the_warning_on_the_length_tells_how_characters_count() -> None:
    assert "(two Chinese" in warnings_for("He says 你好")[0]
    assert "(two Chinese" not in warnings_for("He says hello")[0]


def test_a_body_in_another_script_is_warned_about() -> None:
    assert "body: mostly not English" in warned("一个老人坐在桌子旁边，光线柔和，他说：“你好。”")
    assert warned('An old man says, "有的人在一起生活一辈子，还带着假面具呢，比如说你十年了。"') == ""


@pytest.mark.parametrize(
    "text",
    [
        "The camera slowly pushes in on her.",
        "Camera pans left.",
        "the camera begins to orbit him",
        "The shot is tracking a car.",
        "Slow zoom on the face.",
        "A dolly shot of a man.",
        "It is a tracking shot.",
        "Gentle camera movement.",
        "She smiles. Pan to the window.",
        "The scene cuts to a street.",
        "Not a smile, but the camera follows her.",
    ],
)
def test_camera_moves_are_warned_about(text: str) -> None:
    assert "the models do camera moves badly; let the camera stand still." in warned(text)


@pytest.mark.parametrize(
    "text",
    [
        "The camera remains static in a medium shot.",
        "The framing remains steady with no camera motion and no large body movement.",
        "The shot is stable, without pans, zooms or cuts to another scene.",
        "The camera doesn't move, zoom or follow her.",
        "A man with a pan looks intently at the pan to his left.",
        "She looks at the camera, moves her lips and tilts her head.",
        "Facing the camera slowly moving her head, she smiles.",
        "The man in the shot moves his lips.",
        'He says, "Zoom in, the camera pans left!"',
        "She is on a Zoom call, a camera on the table.",
        "A static over-the-shoulder shot; her eyes follow a handheld microphone.",
    ],
)
def test_a_static_camera_is_not_warned_about(text: str) -> None:
    assert warned(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "He runs across the street.",
        "A woman walks down a runway.",
        "They begin to dance.",
        "She is jumping and kicking a ball.",
        "He rides a bicycle.",
        "He drives the car.",
        "He stands up.",
        "Then she turns around and rises to her feet.",
        "He makes wild gestures.",
        "He does a cartwheel.",
    ],
)
def test_large_motion_is_warned_about(text: str) -> None:
    assert "the models do large motion badly" in warned(text)


@pytest.mark.parametrize(
    "text",
    [
        "He runs a hand through his hair; running water is heard.",
        "An old man with a walking stick and a running shoe.",
        "The performance is driven by the lips, driving the narrative.",
        'She whispers, "I am running late, let\'s go dancing."',
        "She fights back tears and rolls her eyes.",
        "His posture is upright, with no large body movement, walking or dancing.",
        "Her skin and spine are still; she stands up straight.",
    ],
)
def test_small_motion_is_not_warned_about(text: str) -> None:
    assert warned(text) == ""


def test_each_phrase_is_named_once() -> None:
    warning = warned("He runs away. He runs away. She dances.")
    assert warning.count("“runs away”") == 1
    assert "“runs away”, “dances”" in warning


def test_a_line_missing_from_the_body_is_named() -> None:
    other = DialogueLine("A girl", "French", "Ça va ?")
    warnings = warnings_for(BODY, [GREETING, other])
    assert len(warnings) == 1
    assert warnings[0].startswith("dialogue: line 2 (“Ça va ?”) is not in the body;")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("He says, “Hello, world” and smiles", "hello world!"),
        ('He says, "It\'s fine" and smiles', "It’s fine."),
        ("He says, 「你好，世界」 aloud", "你 好 世 界"),
        ('He says, " 눌 러 그 럼 ." aloud', "눌러그럼"),
        ('He says, "Straße"', "STRASSE"),
        ("He smiles", "..."),
    ],
)
def test_case_spaces_and_punctuation_do_not_matter_in_the_body(body: str, text: str) -> None:
    assert warned(body, DialogueLine("A man", "English", text)) == ""


def test_words_inside_other_words_do_not_count() -> None:
    assert "not in the body" in warned(
        'He has a nose and says, "nothing"', DialogueLine("A man", "English", "No")
    )


def test_a_line_without_quotation_marks_is_warned_about() -> None:
    line = DialogueLine("A man", "English", "Hello")
    assert "without quotation marks" in warned("He says hello to her.", line)


@pytest.mark.parametrize(
    ("body", "sound", "names"),
    [
        ('A man. Dialogue:\n<A man, English>: "x"', "", ("body: has “Dialogue:”", "to dialogue")),
        ("A man. Background sound: rain", "", ("body: has “Background sound:”", "to background_sound")),
        ("A man.", "Background Sound: rain", ("background_sound: has", "heading is written for you")),
    ],
)
def test_headings_in_the_wrong_place_are_warned_about(body: str, sound: str, names: tuple[str, str]) -> None:
    text = warned(body, sound=sound)
    assert all(name in text for name in names)


def test_hostile_text_takes_no_time() -> None:
    for text in ("camera " * 3000, "no " * 5000 + "walks", '"' * 5000, "你" * 5000, "a, " * 5000 + ": x"):
        warnings_for(text, [GREETING])


def test_the_example_is_the_prompt_of_the_workflow() -> None:
    graph = json.loads((PACK / "workflows" / "text_to_film.json").read_text(encoding="utf-8"))
    body, dialogue, sound = next(
        node["widgets_values"] for node in graph["nodes"] if node["type"] == "HappyHorsePrompt"
    )
    lines = parse_dialogue(dialogue)
    assert warnings_for(body, lines, sound) == []
    assert (PACK / "docs" / "prompt.txt").read_text(encoding="utf-8").rstrip() == build_prompt(
        body, lines, sound
    )
