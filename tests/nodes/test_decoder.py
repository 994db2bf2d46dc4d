"""The decoding nodes: what they hand to the host's nodes, and films written while they are decoded."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import InputImpl
from comfy_extras import nodes_video
from torch import Tensor

import nodes as stock  # the host's
from happyhorse.media import read_audio, read_film_metadata
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import Latents
from happyhorse.model.video_vae import denormalize_latents, normalize_latents
from happyhorse.nodes.audio_vae import load_audio_vae
from happyhorse.nodes.decoder import HappyHorseDecode, HappyHorseDecodeVideo
from happyhorse.nodes.vae import VideoVAEObject, load_video_vae
from happyhorse.sampler.parts import Parts, open_part
from happyhorse.sampler.pipeline import FilmLatents, write_film

pytestmark = pytest.mark.host
SHAPE = FilmShape(96, 64, 26)  # 25 frames, 1 s
SAMPLES = 44100


@pytest.fixture(scope="module", autouse=True)
def as_the_host_runs() -> Iterator[None]:
    """The host executes every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vaes(pony_folder: Path) -> dict[str, Any]:
    return {
        "vae": load_video_vae(pony_folder / "turbo_vae"),
        "audio_vae": load_audio_vae(pony_folder / "audio_vae"),
    }


@pytest.fixture(scope="module")
def wan(pony_folder: Path) -> VideoVAEObject:
    return load_video_vae(pony_folder / "wan22_vae.safetensors")


def film_latent(batch: int = 1, shape: FilmShape = SHAPE) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    grid = (shape.latent_frames, shape.latent_rows, shape.latent_columns)
    video = denormalize_latents(torch.randn(batch, 48, *grid, generator=generator))
    return {
        "samples": NestedTensor([video, torch.randn(batch, 64, shape.audio_latents, generator=generator)])
    }


def tone(seconds: float, rate: int, channels: int = 1) -> dict[str, Any]:
    time = torch.arange(int(seconds * rate)) / rate
    return {"waveform": (0.3 * torch.sin(2764 * time)).expand(1, channels, -1), "sample_rate": rate}


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


def frames_of(file: Path | BytesIO) -> Tensor:
    source = str(file) if isinstance(file, Path) else file
    return InputImpl.VideoFromFile(source).get_components().images


def test_decode_gives_the_pictures_of_stock_nodes_and_the_unchanged_sound(vaes: dict[str, Any]) -> None:
    latent = film_latent()
    images, audio, fps = HappyHorseDecode.execute(latent, **vaes).result
    (wanted,) = stock.VAEDecode().decode(vaes["vae"], latent)
    assert torch.equal(images, wanted) and fps == 25.0
    sound = vaes["audio_vae"].decode(latent["samples"].unbind()[1]).movedim(-1, 1)
    assert audio["sample_rate"] == 44100 and audio["waveform"].shape == (1, 2, SAMPLES)
    assert torch.equal(audio["waveform"], sound[..., :SAMPLES])


def test_a_batch_is_decoded_one_film_after_the_other(vaes: dict[str, Any]) -> None:
    images, audio, _ = HappyHorseDecode.execute(film_latent(2), **vaes).result
    assert images.shape == (50, 64, 96, 3) and audio["waveform"].shape == (1, 2, 2 * SAMPLES)
    second = {"samples": NestedTensor([stream[1:] for stream in film_latent(2)["samples"].unbind()])}
    alone = HappyHorseDecode.execute(second, **vaes).result[1]["waveform"]
    torch.testing.assert_close(audio["waveform"][..., SAMPLES:], alone, atol=1e-4, rtol=0)
    _, given, _ = HappyHorseDecode.execute(film_latent(2), **vaes, audio=tone(0.5, 44100)).result
    first, again = given["waveform"].chunk(2, dim=-1)
    assert torch.equal(first, again) and first.any()
    with pytest.raises(ValueError, match=r"latent: one VIDEO .* batch of 2; connect HappyHorse Decode"):
        HappyHorseDecodeVideo.execute(film_latent(2), **vaes)


@pytest.mark.parametrize(("seconds", "rate", "channels"), [(0.5, 44100, 1), (3, 48000, 2), (1, 44100, 2)])
def test_given_sound_replaces_the_decoded(
    seconds: float, rate: int, channels: int, vaes: dict[str, Any]
) -> None:
    _, audio, _ = HappyHorseDecode.execute(film_latent(), **vaes, audio=tone(seconds, rate, channels)).result
    heard = min(SAMPLES, int(seconds * SAMPLES))
    wanted = torch.nn.functional.pad(tone(seconds, 44100, 2)["waveform"][..., :heard], (0, SAMPLES - heard))
    torch.testing.assert_close(audio["waveform"], wanted, atol=2e-2 if rate != 44100 else 0, rtol=0)


def test_a_streamed_film_is_the_command_lines(
    vaes: dict[str, Any], pony_folder: Path, tmp_path: Path
) -> None:
    latent = film_latent()
    (video,) = HappyHorseDecodeVideo.execute(latent, **vaes).result
    video.save_to(str(tmp_path / "ours.mp4"), metadata={"prompt": {"1": {"class_type": "X"}}, "note": "text"})
    names = {"video_decoder": "turbo_vae", "audio_vae": "audio_vae"}
    checkpoints = {role: open_part(role, pony_folder / name) for role, name in names.items()}
    parts = Parts(checkpoints, torch.device("cpu"), "stage", torch.float32, torch.float32)
    pictures, sound = latent["samples"].unbind()
    core = Latents(normalize_latents(pictures), sound.transpose(1, 2))
    write_film(parts, FilmLatents(core, SHAPE, None), tmp_path / "core.mp4", {}, lambda *_: None)
    assert psnr(frames_of(tmp_path / "ours.mp4"), frames_of(tmp_path / "core.mp4")) > 50
    heard = [read_audio(tmp_path / name, 44100, 2) for name in ("ours.mp4", "core.mp4")]
    torch.testing.assert_close(*heard, atol=1e-3, rtol=0)
    tags = read_film_metadata(tmp_path / "ours.mp4")
    assert json.loads(tags["prompt"]) == {"1": {"class_type": "X"}} and tags["note"] == "text"


def test_components_hold_the_film_that_is_streamed(vaes: dict[str, Any], tmp_path: Path) -> None:
    latent = film_latent()
    (video,) = HappyHorseDecodeVideo.execute(latent, **vaes).result
    images, audio, _ = HappyHorseDecode.execute(latent, **vaes).result
    components = video.get_components()
    assert torch.equal(components.images, images) and components.frame_rate == 25
    assert torch.equal(components.audio["waveform"], audio["waveform"])
    video.save_to(str(tmp_path / "film.mp4"))
    # H.264 loses much of a film of noise; so the loss of the host's own writer, made as fine, is the limit
    InputImpl.VideoFromComponents(components).save_to(str(tmp_path / "host.mp4"), crf=17)
    streamed, whole = frames_of(tmp_path / "film.mp4"), frames_of(tmp_path / "host.mp4")
    assert streamed.shape == whole.shape == (25, 64, 96, 3)
    assert psnr(streamed, images) > psnr(whole, images) - 1


def test_a_film_is_never_whole_while_it_is_written(
    vaes: dict[str, Any], wan: VideoVAEObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("the whole film was decoded")

    monkeypatch.setattr(VideoVAEObject, "decode", decode)
    for vae in (vaes["vae"], wan):
        (video,) = HappyHorseDecodeVideo.execute(film_latent(), vae, vaes["audio_vae"]).result
        assert video.get_dimensions() == (96, 64) and video.get_duration() == 1.0
        assert video.get_frame_count() == 25 and video.get_frame_rate() == 25
        assert video.get_container_format() == "mp4" and video.get_color_space() == "sRGB"
        video.save_to(str(tmp_path / "film.mp4"), format="mp4", codec="h264")
        buffer = BytesIO()
        video.save_to(buffer)
        assert buffer.getvalue() == (tmp_path / "film.mp4").read_bytes()


def test_a_film_without_memory_is_decoded_as_the_host_does(
    vaes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    (video,) = HappyHorseDecodeVideo.execute(film_latent(), **vaes).result
    monkeypatch.setattr(VideoVAEObject, "decode_stream", no_memory)
    video.save_to(str(tmp_path / "film.mp4"))
    assert len(frames_of(tmp_path / "film.mp4")) == 25


def test_an_interrupted_film_leaves_nothing_behind(vaes: dict[str, Any], tmp_path: Path) -> None:
    import comfy.model_management

    (video,) = HappyHorseDecodeVideo.execute(film_latent(), **vaes).result
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        video.save_to(str(tmp_path / "film.mp4"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("film.mkv", {"format": "mkv"}),
        ("film.webm", {"format": "webm"}),
        ("film.mp4", {"codec": "av1"}),
        ("film.mp4", {"crf": 30.0}),
        ("film.mp4", {"bit_depth": 10}),
        ("film.mp4", {"color_space": "HDR"}),
    ],
)
def test_everything_else_is_written_by_the_host(
    name: str, options: dict[str, Any], vaes: dict[str, Any], tmp_path: Path
) -> None:
    (video,) = HappyHorseDecodeVideo.execute(film_latent(shape=FilmShape(96, 64, 5)), **vaes).result
    video.save_to(str(tmp_path / name), **options)
    assert len(frames_of(tmp_path / name)) == 5


def test_stock_nodes_save_cut_and_take_films_apart(vaes: dict[str, Any]) -> None:
    (video,) = HappyHorseDecodeVideo.execute(film_latent(), **vaes).result
    images, audio, fps = HappyHorseDecode.execute(film_latent(), **vaes).result
    created = nodes_video.CreateVideo.execute(images, fps, audio).result[0]
    for node, stem in ((video, "streamed"), (created, "created")):
        save = nodes_video.SaveVideo.PREPARE_CLASS_CLONE(None)  # as the host, for its hidden inputs
        save.execute(node, stem, {"format": "auto", "codec": {"codec": "auto"}})
        (file,) = Path(folder_paths.get_output_directory()).glob(f"{stem}_*.mp4")
        saved = InputImpl.VideoFromFile(str(file)).get_components()
        assert saved.images.shape == (25, 64, 96, 3) and saved.frame_rate == 25
        assert saved.audio["sample_rate"] == 44100
        assert 0 <= saved.audio["waveform"].shape[2] - SAMPLES < 1024
    (cut,) = nodes_video.VideoSlice.execute(video, 0.4, 0.2, True).result
    assert len(cut.get_components().images) == 5
    with pytest.raises(ValueError, match="Failed to slice"):
        nodes_video.VideoSlice.execute(video, 0.4, 2.0, True)
    taken = nodes_video.GetVideoComponents.execute(video).result
    assert torch.equal(taken[0], images) and taken[2] == 25.0 and taken[3] == 8


def test_wrong_inputs_name_the_socket(vaes: dict[str, Any], wan: VideoVAEObject) -> None:
    latent, video, sound = film_latent(), vaes["vae"], vaes["audio_vae"]
    refused = {
        r"vae: this must be a VAE for video .* 64 channels; connect": (latent, sound, sound),
        r"audio_vae: this must be the audio VAE .* 48 channels; connect": (latent, video, wan),
        r"latent: .* stream": ({"samples": latent["samples"].unbind()[0]}, video, sound),
        r"audio: the sound holds no samples": (latent, video, sound, tone(0, 44100)),
    }
    for message, inputs in refused.items():
        for node in (HappyHorseDecode, HappyHorseDecodeVideo):
            with pytest.raises(ValueError, match=message):
                node.execute(*inputs)


@pytest.mark.parametrize("node", [HappyHorseDecode, HappyHorseDecodeVideo])
def test_every_socket_is_explained(node: Any) -> None:
    schema = node.define_schema()
    assert schema.category == "HappyHorse/decode" and schema.description and schema.search_aliases
    assert all(socket.tooltip for socket in (*schema.inputs, *schema.outputs))
    assert all(socket.display_name for socket in schema.outputs)
