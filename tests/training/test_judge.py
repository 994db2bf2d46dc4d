from itertools import cycle, permutations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from happyhorse.training.data import judge
from happyhorse.training.data.clip import Clip, make_clip
from happyhorse.training.data.judge import (
    BounceVerdict,
    HeadVerdict,
    compare,
    judge_bounce,
    judge_head,
    mouth_correlation,
    sync_f1,
)
from happyhorse.training.data.sound import SAMPLE_RATE
from happyhorse.training.data.world import BACKGROUNDS, COLORS, Bounce, heads_in_hats, held_out

COUNT = 40
JUDGES = {"bounce": judge_bounce, "head": judge_head}
WORLDS = pytest.mark.parametrize("world", JUDGES)
Verdict = BounceVerdict | HeadVerdict


def verdict_of(clip: Clip, frames: np.ndarray | None = None) -> Verdict:
    """The verdict of a clip, or of its sound with other frames."""
    world = "bounce" if isinstance(clip.attributes, Bounce) else "head"
    return JUDGES[world](clip.frames if frames is None else frames, clip.sound, SAMPLE_RATE)


def figures(clips: list[Clip], verdicts: list[Verdict]) -> dict[str, float]:
    """The mean of each attribute and score."""
    rows = [compare(clip.attributes, verdict) for clip, verdict in zip(clips, verdicts, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def spoiled(frames: np.ndarray, seed: int) -> np.ndarray:
    """Frames blurred, noisy and with a shift of colour, some 25 dB from the true ones."""
    random = np.random.default_rng(seed)
    blurred = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1.4))) for frame in frames]
    noisy = np.stack(blurred) + random.normal(0, 8, frames.shape) + random.normal(0, 5, 3)
    return noisy.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clips() -> dict[str, list[Clip]]:
    return {
        world: [make_clip(attributes, seed) for seed, attributes in enumerate(held_out(world, COUNT))]
        for world in JUDGES
    }


@pytest.fixture(scope="module")
def verdicts(clips: dict[str, list[Clip]]) -> dict[str, list[Verdict]]:
    return {world: [verdict_of(clip) for clip in some] for world, some in clips.items()}


@WORLDS
def test_true_renders_are_judged_right(
    world: str, clips: dict[str, list[Clip]], verdicts: dict[str, list[Verdict]]
) -> None:
    found = figures(clips[world], verdicts[world])
    assert min(found.values()) >= 0.97, found
    assert all(value >= 0.99 for name, value in found.items() if name != "shape_iou"), found


def test_bounces_and_onsets_are_those_of_the_clip(
    clips: dict[str, list[Clip]], verdicts: dict[str, list[Verdict]]
) -> None:
    for clip, verdict in zip(clips["bounce"], verdicts["bounce"], strict=True):
        assert verdict.bounces == verdict.onsets == clip.onsets


@WORLDS
@pytest.mark.parametrize("size", [(192, 192), (160, 96), (96, 160)], ids=str)
def test_pictures_of_any_size_are_judged_right(world: str, size: tuple[int, int]) -> None:
    some = [make_clip(attributes, seed, size) for seed, attributes in enumerate(held_out(world, 4))]
    found = figures(some, [verdict_of(clip) for clip in some])
    assert min(found.values()) >= 0.97, found


@WORLDS
def test_blurred_and_noisy_frames_are_still_judged_right(world: str, clips: dict[str, list[Clip]]) -> None:
    some = clips[world][:20]
    found = figures(some, [verdict_of(clip, spoiled(clip.frames, 0)) for clip in some])
    assert min(found.values()) >= 0.95, found


def test_the_sound_of_another_clip_is_in_sync_only_by_chance(verdicts: dict[str, list[Verdict]]) -> None:
    pairs = permutations(verdicts["bounce"], 2)
    assert 0.2 < np.mean([sync_f1(seen.bounces, heard.onsets) for seen, heard in pairs]) < 0.4


def test_the_mouth_does_not_follow_the_sound_of_another_clip(verdicts: dict[str, list[Verdict]]) -> None:
    pairs = permutations(verdicts["head"], 2)
    found = [mouth_correlation(seen.opening, heard.loudness) for seen, heard in pairs]
    assert abs(np.mean(found)) < 0.05 and abs(np.median(found)) < 0.05


@WORLDS
def test_grey_and_silent_films_score_at_chance(world: str, clips: dict[str, list[Clip]]) -> None:
    some = clips[world]
    grey, silence = np.full_like(some[0].frames, 128), np.zeros_like(some[0].sound)
    found = figures(some, [JUDGES[world](grey, silence, SAMPLE_RATE)] * len(some))
    chance = {"background": 1 / 4, "hair": 1 / 4, "shirt": 1 / 4, "hat": 1}  # else there is nothing to judge
    assert all(value <= chance.get(name, 0) + 0.12 for name, value in found.items()), found


def test_a_shape_on_a_still_film_does_not_bounce(clips: dict[str, list[Clip]]) -> None:
    for clip in clips["bounce"][:5]:
        verdict = verdict_of(clip, np.repeat(clip.frames[:1], len(clip.frames), axis=0))
        assert (verdict.bounces, verdict.speed, verdict.sync_f1) == ((), "none", 0.0)
        assert verdict.shape == clip.attributes.shape


def test_a_new_shape_is_recognised_in_every_colour() -> None:
    backgrounds = cycle(BACKGROUNDS)
    for colour in COLORS:
        clip = make_clip(Bounce("heart", colour, next(backgrounds), "fast", "low"), 0)
        assert min(compare(clip.attributes, verdict_of(clip)).values()) > 0.95


def test_a_hat_is_recognised_on_every_head_and_hides_nothing_that_is_judged() -> None:
    for seed, attributes in enumerate(heads_in_hats()[:COUNT]):
        clip = make_clip(attributes, seed)
        assert min(compare(clip.attributes, verdict_of(clip)).values()) > 0.95


def test_sound_at_the_rate_of_a_film_gives_the_same_verdict(clips: dict[str, list[Clip]]) -> None:
    clip = clips["bounce"][0]
    times = np.arange(clip.sound.shape[1] * 441 // 512) * 512 / 441
    slower = np.stack([np.interp(times, np.arange(len(side)), side) for side in clip.sound])
    assert judge_bounce(clip.frames, slower, 44100).onsets == clip.onsets
    assert judge_bounce(clip.frames, slower, 44100).pitch == clip.attributes.pitch


@pytest.mark.parametrize(
    ("bounces", "onsets", "score"),
    [((5, 17), (5, 17), 1), ((5, 17), (7, 15), 1), ((5, 17), (8, 14), 0), ((5,), (4, 6), 2 / 3), ((), (), 0)],
)
def test_sync_counts_each_note_once_within_two_frames(
    bounces: tuple[int, ...], onsets: tuple[int, ...], score: float
) -> None:
    assert sync_f1(bounces, onsets) == pytest.approx(score)


@pytest.mark.parametrize(
    ("silent", "pauses"), [(slice(0, 0), False), (slice(20, 24), False), (slice(20, 25), True)]
)
def test_a_pause_is_a_silence_of_five_frames(
    silent: slice, pauses: bool, clips: dict[str, list[Clip]]
) -> None:
    clip, frame = clips["head"][0], SAMPLE_RATE // 25
    sound = np.tile(np.sin(np.arange(frame) * 2 * np.pi * 10 / frame), (2, len(clip.frames)))
    sound[:, silent.start * frame : silent.stop * frame] *= 0.05
    assert judge.judge_head(clip.frames, sound, SAMPLE_RATE).pauses == pauses


def test_missing_sound_is_silence() -> None:
    assert judge.frame_loudness(np.ones((2, 4096)), SAMPLE_RATE, 4).tolist() == [1, 1, 0, 0]


def test_what_cannot_be_judged_is_named() -> None:
    sound = np.zeros((2, 100))
    with pytest.raises(ValueError, match=r"must be uint8 \[frames, height, width, 3\], got float32 \[1, "):
        judge_head(np.zeros((1, 8, 8, 3), np.float32), sound, SAMPLE_RATE)
    with pytest.raises(ValueError, match=r"sound to judge must be \[channels, samples\], got \[100\]"):
        judge_bounce(np.zeros((1, 8, 8, 3), np.uint8), sound[0], SAMPLE_RATE)
