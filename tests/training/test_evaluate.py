from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from happyhorse.media import AAC_FRAME, FilmWriter, read_audio
from happyhorse.training.data.sound import SAMPLE_RATE
from happyhorse.training.evaluate import (
    SHUFFLED,
    Figures,
    Prompt,
    evaluate,
    film_path,
    make_prompts,
    read_film,
)
from happyhorse.training.measure import write_render

COUNT = 4


def flat(figures: Figures) -> dict[tuple[str, str, str], float]:
    return {
        (mode, world, name): value
        for mode, worlds in figures.items()
        for world, found in worlds.items()
        for name, value in found.items()
    }


def grey_film(prompt: Prompt, path: Path) -> None:
    """A film that shows nothing and says nothing."""
    with FilmWriter(path, *prompt.size) as film:
        film.add_audio(torch.zeros(2, 1764 * 49))
        film.add_frames(torch.full((49, prompt.size[1], prompt.size[0], 3), 128, dtype=torch.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def true_figures(folder: Path) -> Figures:
    return evaluate(write_render, folder, COUNT)


def test_true_renders_are_all_right_after_h264_and_aac(true_figures: Figures) -> None:
    for (mode, world, name), value in flat(true_figures).items():
        if name == "first frame PSNR":
            assert value > 27, (mode, world)
        elif name == "pauses":
            assert 0 < value < 1, mode
        elif not name.endswith(SHUFFLED):
            assert value > 0.95, (mode, world, name)


def test_a_given_sound_is_no_merit_of_the_film(true_figures: Figures) -> None:
    assert "pitch" in true_figures["text"]["bounce"] and "voice" in true_figures["image"]["head"]
    assert not {"pitch", "voice", "pauses"} & {
        *true_figures["audio"]["bounce"],
        *true_figures["audio"]["head"],
    }


def test_the_sound_of_other_films_does_not_fit(true_figures: Figures) -> None:
    for worlds in true_figures.values():
        assert worlds["bounce"]["sync" + SHUFFLED] < worlds["bounce"]["sync"] - 0.4
        assert worlds["head"]["mouth" + SHUFFLED] < worlds["head"]["mouth"] - 0.4


def test_a_film_that_does_not_go_on_from_its_image_takes_another_course(tmp_path: Path) -> None:
    def another(prompt: Prompt, path: Path) -> None:
        write_render(replace(prompt, seed=prompt.seed + 1), path)

    figures = evaluate(another, tmp_path, 2 * COUNT, ["image"])["image"]["bounce"]
    assert figures["course"] < 0.6 < figures["sync"]


def test_grey_films_get_no_more_than_chance(tmp_path: Path) -> None:
    for (_, _, name), value in flat(evaluate(grey_film, tmp_path, COUNT, ["text"])).items():
        chance = {
            "background": 0.5,
            "hair": 0.5,
            "shirt": 0.5,
            "hat": 1.0,
        }  # no hat was asked for, none is seen
        assert value <= chance.get(name, 0), name


def test_prompts_do_not_depend_on_how_many_there_are_or_what_is_given(tmp_path: Path) -> None:
    texts = make_prompts("head", "text", tmp_path, 3)
    assert texts == make_prompts("head", "text", tmp_path, 60)[:3]
    images = make_prompts("head", "image", tmp_path, 3)
    assert [one.text for one in texts] == [one.text for one in images]
    assert [one.seed for one in texts] == [0, 1, 2]


def test_the_given_image_and_sound_are_those_of_the_render(tmp_path: Path) -> None:
    (image,) = make_prompts("bounce", "image", tmp_path, 1)
    (sound,) = make_prompts("bounce", "audio", tmp_path, 1)
    clip = image.render()
    assert np.array_equal(np.asarray(Image.open(image.image)), clip.frames[0])
    assert np.abs(read_audio(sound.audio, SAMPLE_RATE, 2).numpy() - clip.sound).max() < 1e-4
    assert image.audio is None and sound.image is None


def test_an_unknown_mode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the mode must be one of text, audio, image, got 'video'"):
        make_prompts("head", "video", tmp_path)


def test_a_decoded_film_is_the_render_but_for_compression(true_figures: Figures, folder: Path) -> None:
    assert true_figures
    clip = make_prompts("head", "text", folder, 1)[0].render()
    frames, sound = read_film(film_path(folder, "text", "head", 0))
    assert frames.shape == clip.frames.shape
    assert 0 <= sound.shape[1] - 49 * 1764 < AAC_FRAME
    assert np.abs(frames.astype(float) - clip.frames).mean() < 4
