from dataclasses import replace
from random import Random

import numpy as np
import pytest

from happyhorse.model.config import PONY
from happyhorse.training.data.clip import PERIODS, SYLLABLES, make_clip
from happyhorse.training.data.sound import SAMPLES_PER_LATENT
from happyhorse.training.data.world import (
    GREETINGS,
    HAT,
    NEW_SHAPES,
    NO_HAT,
    WORLDS,
    Bounce,
    Head,
    caption,
    combinations,
    held_out,
    is_held_out,
    training_attributes,
)

BALL = Bounce("circle", "red", "teal", "fast", "low")
TALKER = Head("black", "blue", "white", "high", "slow", "French")


@pytest.mark.parametrize(("world", "all_of_them", "kept_out"), [("bounce", 576, 85), ("head", 1792, 51 * 7)])
def test_the_same_combinations_are_always_held_out(world: str, all_of_them: int, kept_out: int) -> None:
    everything = list(combinations(world))
    assert len(set(everything)) == all_of_them
    assert sum(map(is_held_out, everything)) == kept_out


def test_a_language_does_not_decide_what_is_held_out() -> None:
    for head in combinations("head"):
        assert is_held_out(head) == is_held_out(replace(head, language="English"))


def test_training_draws_both_worlds_and_nothing_that_is_held_out() -> None:
    random = Random(0)
    drawn = [training_attributes(random) for _ in range(2000)]
    assert not any(map(is_held_out, drawn))
    assert not any(isinstance(one, Bounce) and one.shape in NEW_SHAPES for one in drawn)
    assert not any(isinstance(one, Head) and one.hat != NO_HAT for one in drawn)
    assert 0.45 < sum(isinstance(one, Head) for one in drawn) / len(drawn) < 0.55


def test_a_hat_changes_nothing_but_what_is_drawn_of_it() -> None:
    hatless, wearing = make_clip(TALKER, 0), make_clip(replace(TALKER, hat=HAT), 0)
    assert np.array_equal(hatless.sound, wearing.sound)
    changed = (hatless.frames != wearing.frames).any(axis=(0, 3))
    assert changed.any() and not changed[20:].any()  # above the eyes
    assert caption(replace(TALKER, hat=HAT)) == caption(TALKER).replace("A head", "A head in a top hat")


@pytest.mark.parametrize("world", WORLDS)
def test_held_out_prompts_are_the_same_every_time(world: str) -> None:
    prompts = held_out(world, 60)
    assert prompts == held_out(world, 60) != held_out(world, 60, seed=1)
    assert len(set(prompts)) == 60
    assert all(map(is_held_out, prompts))


def test_more_held_out_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="'bounce' has 85 held-out combinations, 86 were asked for"):
        held_out("bounce", 86)


def test_captions_have_the_trained_form() -> None:
    assert caption(BALL) == (
        "A red circle bounces fast on a teal background.\n\nBackground Sound:\n<low notes>"
    )
    assert caption(TALKER) == (
        "A head with black hair and a blue shirt talks slow in a high voice on a white background: "
        '"bonjour".\n\nDialogue:\n<head with black hair, French>: "bonjour"\n\n'
        "Background Sound:\n<No prominent background sound>"
    )


@pytest.mark.parametrize("world", WORLDS)
def test_every_combination_has_its_own_caption(world: str) -> None:
    captions = [caption(attributes) for attributes in combinations(world)]
    assert len(set(captions)) == len(captions)
    assert not any(map(PONY.unknown_words, captions))


def test_the_dialogue_speaks_every_language() -> None:
    for language, words in GREETINGS.items():
        assert f'{language}>: "{words}"' in caption(replace(TALKER, language=language))


def test_a_clip_depends_on_its_attributes_and_its_seed_alone() -> None:
    first, again, other = make_clip(TALKER, 1), make_clip(TALKER, 1), make_clip(TALKER, 2)
    assert np.array_equal(first.frames, again.frames) and np.array_equal(first.sound, again.sound)
    assert not np.array_equal(first.sound, other.sound)


def test_a_clip_has_the_sizes_that_were_asked_for() -> None:
    clip = make_clip(BALL, 0, size=(64, 32), frames=9, latents=12)
    assert clip.frames.shape == (9, 32, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.sound.shape == (2, 12 * SAMPLES_PER_LATENT) and clip.sound.dtype == np.float32


@pytest.mark.parametrize("speed", PERIODS)
@pytest.mark.parametrize("seed", range(4))
def test_notes_begin_with_the_frames_named_as_onsets(speed: str, seed: int) -> None:
    clip = make_clip(replace(BALL, speed=speed), seed)
    assert set(np.diff(clip.onsets)) == {PERIODS[speed]}
    blocks = clip.sound[0].reshape(-1, SAMPLES_PER_LATENT)
    assert not blocks[: clip.onsets[0]].any()
    loudness = (blocks**2).mean(axis=1)[: len(clip.frames)]
    rises = np.flatnonzero(np.diff(loudness, prepend=0) > 0.1 * loudness.max())
    assert tuple(rises) == clip.onsets


@pytest.mark.parametrize("speed", PERIODS)
def test_a_shape_is_lowest_at_the_onsets(speed: str) -> None:
    clip = make_clip(replace(BALL, speed=speed), 3)
    is_red = (clip.frames[..., 0] > 150) & (clip.frames[..., 2] < 100)
    lowest = [np.flatnonzero(picture.any(axis=1)).max() for picture in is_red]
    assert {lowest[onset] for onset in clip.onsets} == {max(lowest)}
    assert lowest.count(max(lowest)) == len(clip.onsets)


@pytest.mark.parametrize("speed", SYLLABLES)
def test_the_mouth_is_as_open_as_the_voice_is_loud(speed: str) -> None:
    clip = make_clip(replace(TALKER, speed=speed), 0)
    loudness = np.sqrt((clip.sound[0].reshape(-1, SAMPLES_PER_LATENT) ** 2).mean(axis=1))[: len(clip.frames)]
    assert np.corrcoef(loudness, clip.opening)[0, 1] > 0.99
    dark_red = (clip.frames[..., 0] > 80) & (clip.frames[..., 0] < 130) & (clip.frames[..., 1] < 30)
    assert np.corrcoef(dark_red.sum(axis=(1, 2)), clip.opening)[0, 1] > 0.97


def test_no_sound_is_louder_than_full_scale() -> None:
    for attributes in held_out("head", 8) + held_out("bounce", 8):
        assert np.abs(make_clip(attributes, 0, size=(32, 32), frames=1).sound).max() < 1
