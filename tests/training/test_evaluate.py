import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from happyhorse.media import AAC_FRAME, FilmWriter, read_audio
from happyhorse.training.data.sound import SAMPLE_RATE
from happyhorse.training.evaluate import (
    CHANCE,
    SHUFFLED,
    Figures,
    Prompt,
    ceiling,
    contact_sheet,
    evaluate,
    film_path,
    films_by,
    make_prompts,
    measure,
    open_models,
    read_film,
    table,
    write_render,
    write_report,
)

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
        elif not name.endswith(SHUFFLED):
            assert value > 0.95, (mode, world, name)


def test_the_sound_of_other_films_does_not_fit(true_figures: Figures) -> None:
    for worlds in true_figures.values():
        assert worlds["bounce"]["sync" + SHUFFLED] < worlds["bounce"]["sync"] - 0.4
        assert worlds["head"]["mouth" + SHUFFLED] < worlds["head"]["mouth"] - 0.4


def test_grey_films_get_no_more_than_chance(tmp_path: Path) -> None:
    for (_, _, name), value in flat(evaluate(grey_film, tmp_path, COUNT, ["text"])).items():
        assert value <= (0.5 if name in ("background", "hair", "shirt") else 0), name


def test_prompts_do_not_depend_on_how_many_there_are_or_what_is_given(tmp_path: Path) -> None:
    texts = make_prompts("head", "text", tmp_path, 3)
    images = make_prompts("head", "image", tmp_path, 3)
    assert [one.text for one in texts] == [one.text for one in images]
    assert [one.seed for one in texts] == [0, 1, 2]
    assert texts == make_prompts("head", "text", tmp_path, 3)


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


def test_the_report_has_ceiling_and_chance_beside_each_figure(true_figures: Figures, tmp_path: Path) -> None:
    write_report(tmp_path / "pony.json", true_figures, true_figures)
    assert json.loads((tmp_path / "pony.json").read_text()) == {
        "figures": true_figures, "ceilings": true_figures
    }  # fmt: skip
    lines = (tmp_path / "pony.md").read_text().splitlines()
    assert "| text | bounce | colour | 1.00 | 1.00 | 0.17 |" in lines
    sync, chance = (true_figures["audio"]["bounce"]["sync" + end] for end in ("", SHUFFLED))
    assert f"| audio | bounce | sync | {sync:.2f} | {sync:.2f} | {chance:.2f} |" in lines
    assert not any(SHUFFLED in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pony.json", "pony.md"]


def test_a_table_without_ceilings_leaves_them_empty() -> None:
    assert "| text | head | voice | 0.75 |  | 0.50 |" in table({"text": {"head": {"voice": 0.75}}})


def test_a_contact_sheet_has_a_row_for_every_film(true_figures: Figures, folder: Path) -> None:
    assert true_figures
    films = {f"{world} 1": film_path(folder, "text", world, 1) for world in ("bounce", "head")}
    one, two = contact_sheet(dict([*films.items()][:1])), contact_sheet(films)
    assert two.size == (one.width, 2 * one.height)
    assert np.asarray(two)[one.height :].std() > 20


def test_the_ceiling_is_measured_through_the_networks(tmp_path: Path) -> None:
    found = ceiling(Unchanged(), Unchanged(), tmp_path, 2)
    assert found["networks"]["both"]["PSNR"] > 45  # but for rounding
    assert found["image"]["bounce"]["sync"] == found["image"]["bounce"]["kept"] == 1
    halved = ceiling(Unchanged(0.5), Unchanged(), tmp_path, 2)
    assert halved["networks"]["both"]["PSNR"] < 20
    assert halved["networks"]["both"]["worst frame"] <= halved["networks"]["both"]["PSNR"]


class Unchanged(torch.nn.Module):
    """A VAE whose latents are the film itself, times a factor when decoded."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.encode: Callable[[torch.Tensor], torch.Tensor] = lambda film: film

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.factor


@pytest.mark.parametrize("variant", ["base", "distill"])
def test_films_are_made_from_every_kind_of_prompt(variant: str, pony_folder: Path, tmp_path: Path) -> None:
    make_film = films_by(open_models(pony_folder, variant, torch.device("cpu")), steps=1)
    figures = evaluate(make_film, tmp_path, 1, size=(32, 32))
    assert set(figures) == {"text", "audio", "image"}
    assert set(CHANCE) <= {name for _, _, name in flat(figures)}


def test_a_folder_of_models_is_measured(pony_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    figures, ceilings = measure(pony_folder, "distill", out, torch.device("cpu"), 1, (32, 32))
    assert ceilings["networks"]["both"]["PSNR"] < 25  # random weights
    assert json.loads((out / "figures.json").read_text()) == {"figures": figures, "ceilings": ceilings}
    assert Image.open(out / "films.png").height > 6 * 96


def test_ceilings_that_are_given_are_not_measured_again(pony_folder: Path, tmp_path: Path) -> None:
    given = {"text": {"head": {"voice": 0.5}}}
    _, ceilings = measure(pony_folder, "distill", tmp_path, torch.device("cpu"), 1, (32, 32), given)
    assert ceilings == given and not (tmp_path / "ceiling").exists()
    assert json.loads((tmp_path / "figures.json").read_text())["ceilings"] == given
