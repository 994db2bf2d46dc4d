"""Our VAE objects in the host's own nodes: the core's numbers, tiles, and what they refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_extras import nodes_audio
from torch import Tensor

import nodes as stock  # the host's
from happyhorse.model.audio_vae import encode_driving_audio, to_film_rate
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.geometry import FilmShape
from happyhorse.model.video_vae import denormalize_latents, normalize_latents
from happyhorse.nodes.audio_vae import load_audio_vae
from happyhorse.nodes.inputs import encode_sound
from happyhorse.nodes.vae import load_video_vae

pytestmark = pytest.mark.host
VIDEO_PARTS = {"wan": "wan22_vae.safetensors", "turbo": "turbo_vae"}


@pytest.fixture(scope="module", autouse=True)
def as_the_host_runs() -> Iterator[None]:
    """The host executes every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vaes(pony_folder: Path) -> dict[str, Any]:
    files = {name: load_video_vae(pony_folder / path) for name, path in VIDEO_PARTS.items()}
    return files | {"audio": load_audio_vae(pony_folder / "audio_vae")}


def core(pony_folder: Path, path: str) -> torch.nn.Module:
    return load(open_checkpoint(pony_folder / path), torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video_latents(frames: int = 4, rows: int = 4, columns: int = 6, batch: int = 1) -> Tensor:
    return denormalize_latents(random(batch, 48, frames, rows, columns))


def film(frames: int = 13, height: int = 64, width: int = 96) -> Tensor:
    return random(frames, height, width, 3).sigmoid()


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


def nested(video: Tensor) -> dict[str, Any]:
    return {"samples": NestedTensor([video, random(video.shape[0], 64, 13)])}


@pytest.mark.parametrize("part", VIDEO_PARTS)
def test_stock_decoding_is_the_cores(part: str, vaes: dict[str, Any], pony_folder: Path) -> None:
    latents = video_latents(frames=7)
    (images,) = stock.VAEDecode().decode(vaes[part], {"samples": latents})
    wanted = core(pony_folder, VIDEO_PARTS[part]).decode(normalize_latents(latents))
    wanted = (wanted[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)
    assert images.shape == (25, 64, 96, 3)
    torch.testing.assert_close(images, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part", VIDEO_PARTS)
def test_nested_batches_become_one_row_of_frames(part: str, vaes: dict[str, Any]) -> None:
    latents = video_latents(batch=2)
    (images,) = stock.VAEDecode().decode(vaes[part], nested(latents))
    (second,) = stock.VAEDecode().decode(vaes[part], {"samples": latents[1:]})
    assert images.shape == (26, 64, 96, 3)
    torch.testing.assert_close(images[13:], second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", VIDEO_PARTS)
def test_tiles_as_large_as_the_film_change_nothing_however_short(part: str, vaes: dict[str, Any]) -> None:
    latents = video_latents(frames=7)
    (whole,) = stock.VAEDecode().decode(vaes[part], {"samples": latents})
    (tiled,) = stock.VAEDecodeTiled().decode(
        vaes[part], {"samples": latents}, tile_size=512, overlap=64, temporal_size=8, temporal_overlap=4
    )
    torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part", VIDEO_PARTS)
def test_small_tiles_give_the_whole_film(part: str, vaes: dict[str, Any]) -> None:
    latents = nested(video_latents(rows=6, columns=12))
    (whole,) = stock.VAEDecode().decode(vaes[part], latents)
    blended, cut = (
        stock.VAEDecodeTiled().decode(vaes[part], latents, tile_size=96, overlap=overlap)[0]
        for overlap in (32, 0)
    )
    assert blended.shape == (13, 96, 192, 3)
    assert blended.amin() >= 0 and blended.amax() <= 1
    assert psnr(blended, whole) > max(30, psnr(cut, whole) + 1)


def test_a_decoder_without_memory_goes_on_in_tiles(
    vaes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = video_latents()
    (whole,) = stock.VAEDecode().decode(vaes["wan"], {"samples": latents})
    decode = vaes["wan"].first_stage_model.decode

    def decode_tiles_only(x: Tensor, output_buffer: Tensor | None = None) -> Tensor:
        if output_buffer is not None:
            raise torch.OutOfMemoryError("out of memory")
        return decode(x)

    monkeypatch.setattr(vaes["wan"].first_stage_model, "decode", decode_tiles_only)
    (tiled,) = stock.VAEDecode().decode(vaes["wan"], {"samples": latents})
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


def test_stock_encoding_is_the_cores_in_raw_latents(vaes: dict[str, Any], pony_folder: Path) -> None:
    (latent,) = stock.VAEEncode().encode(vaes["wan"], film())
    video = film().movedim(-1, 0)[None] * 2 - 1
    wanted = denormalize_latents(core(pony_folder, VIDEO_PARTS["wan"]).encode(video))
    assert latent["samples"].shape == (1, 48, 4, 4, 6)
    torch.testing.assert_close(latent["samples"], wanted, atol=1e-5, rtol=0)


def test_tiled_encoding_of_one_tile_is_the_plain_one(vaes: dict[str, Any]) -> None:
    (whole,) = stock.VAEEncode().encode(vaes["wan"], film())
    (tiled,) = stock.VAEEncodeTiled().encode(
        vaes["wan"], film(), tile_size=512, overlap=64, temporal_size=8, temporal_overlap=4
    )
    torch.testing.assert_close(tiled["samples"], whole["samples"], atol=1e-6, rtol=0)
    (small,) = stock.VAEEncodeTiled().encode(vaes["wan"], film(), tile_size=64, overlap=32)
    small, whole = (normalize_latents(latent["samples"]) for latent in (small, whole))
    assert small.shape == whole.shape
    assert (small - whole).norm() < 0.2 * whole.norm()


def test_a_picture_is_cut_to_whole_latents(vaes: dict[str, Any]) -> None:
    picture = film(1, 70, 100)
    (latent,) = stock.VAEEncode().encode(vaes["wan"], picture)
    (cut,) = stock.VAEEncode().encode(vaes["wan"], picture[:, 3:67, 2:98])
    assert torch.equal(latent["samples"], cut["samples"])


def test_a_batch_of_films_is_encoded_whole(vaes: dict[str, Any]) -> None:
    films = torch.stack([film(), film().flip(0)])
    latents = vaes["wan"].encode(films)
    assert latents.shape == (2, 48, 4, 4, 6)
    torch.testing.assert_close(latents[:1], vaes["wan"].encode(films[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", VIDEO_PARTS)
def test_the_stream_holds_the_frames_of_the_film(part: str, vaes: dict[str, Any]) -> None:
    latents = video_latents(frames=9)
    chunks = list(vaes[part].decode_stream(latents))
    assert len(chunks) > 1
    frames = (torch.cat(chunks, dim=2)[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(frames, vaes[part].decode(latents)[0], atol=1e-6, rtol=0)


def test_decoding_can_be_interrupted_and_tells_how_far_it_is(
    vaes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.utils

    told = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: told.append((done, total))
    )
    vaes["wan"].decode(video_latents(frames=3))
    assert told[0] == (1, 9) and told[-1] == (9, 9)
    told.clear()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        vaes["wan"].decode(video_latents(frames=3))
    assert not told
    assert vaes["wan"].decode(video_latents(frames=1)).isfinite().all()


def test_stock_audio_decoding_is_the_cores_but_for_the_loudness(
    vaes: dict[str, Any], pony_folder: Path
) -> None:
    latents = random(2, 64, 26)
    wanted = to_film_rate(core(pony_folder, "audio_vae").decode(latents.transpose(1, 2)))
    torch.testing.assert_close(vaes["audio"].decode(latents).movedim(-1, 1), wanted, atol=1e-6, rtol=0)
    loudness = (wanted.std(dim=(1, 2), keepdim=True) * 5).clamp(min=1)
    video_and_audio = {"samples": NestedTensor([video_latents(batch=2), latents])}
    for audio in (
        nodes_audio.VAEDecodeAudio.execute(vaes["audio"], video_and_audio)[0],
        nodes_audio.VAEDecodeAudioTiled.execute(vaes["audio"], {"samples": latents}, 32, 8)[0],
    ):
        assert audio["sample_rate"] == 44100
        assert audio["waveform"].shape == (2, 2, 26 * 1764)
        torch.testing.assert_close(audio["waveform"], wanted / loudness, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 2])
def test_stock_audio_encoding_is_the_cores(channels: int, vaes: dict[str, Any], pony_folder: Path) -> None:
    sound = random(1, channels, 51200) * 0.1
    latent = nodes_audio.VAEEncodeAudio.execute(vaes["audio"], {"waveform": sound, "sample_rate": 51200})[0]
    network = core(pony_folder, "audio_vae")
    wanted = network.encode(sound.expand(1, 2, -1)).transpose(1, 2)
    assert latent["samples"].shape == (1, 64, 25)
    torch.testing.assert_close(latent["samples"], wanted, atol=1e-6, rtol=0)
    driving = encode_driving_audio(vaes["audio"].first_stage_model, sound[0])
    torch.testing.assert_close(driving.transpose(1, 2), wanted, atol=1e-6, rtol=0)
    tiled = vaes["audio"].encode_tiled(sound.movedim(1, -1), tile_x=4096, overlap=512)
    assert torch.equal(tiled, latent["samples"])


def test_the_audio_vae_never_rounds_to_tf32(vaes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vae, seen = vaes["audio"], []
    for name in ("encode", "decode"):
        work = getattr(vae.first_stage_model, name)

        def noting(*given: Any, work: Any = work, **more: Any) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return work(*given, **more)

        monkeypatch.setattr(vae.first_stage_model, name, noting)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    sound, latents = random(1, 51200, 2) * 0.1, random(1, 64, 26)
    vae.decode(latents)
    vae.decode_tiled_1d(latents.transpose(1, 2))
    vae.encode(sound)
    vae.encode_tiled_1d(sound.movedim(-1, 1))
    encode_sound(vae, {"waveform": sound.movedim(-1, 1), "sample_rate": 51200}, FilmShape(64, 32, 25))
    assert seen == [False] * 5 and torch.backends.cudnn.allow_tf32


def test_sound_without_memory_goes_on_in_smaller_pieces(
    vaes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, network = random(1, 64, 60), vaes["audio"].first_stage_model
    sound = 0.05 * random(
        1, 100_000, 2
    )  # much louder than any film, the trained network multiplies roundings
    whole, encoded = vaes["audio"].decode(latents), vaes["audio"].encode(sound)
    for method in ("decode", "encode"):
        small = getattr(network, method)

        def only_small(x: Tensor, chunk: int | None = None, small: Any = small) -> Tensor:
            if chunk is None:
                raise torch.OutOfMemoryError("out of memory")
            return small(x, chunk=chunk)

        monkeypatch.setattr(network, method, only_small)
    torch.testing.assert_close(vaes["audio"].decode(latents), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(vaes["audio"].encode(sound), encoded, atol=1e-5, rtol=0)


def test_the_turbo_decoder_refuses_to_encode(vaes: dict[str, Any]) -> None:
    for encode in (vaes["turbo"].encode, vaes["turbo"].encode_tiled):
        with pytest.raises(ValueError, match=r"vae: the turbo decoder cannot encode; load the Wan2.2 VAE"):
            encode(film())


@pytest.mark.parametrize(
    ("part", "shape"),
    [("wan", (1, 16, 3, 4, 4)), ("turbo", (1, 4, 8, 8)), ("wan", (1, 64, 26)), ("audio", (1, 48, 3, 4, 4))],
)
def test_latents_of_another_kind_are_refused(part: str, shape: tuple[int, ...], vaes: dict[str, Any]) -> None:
    for decode in (vaes[part].decode, vaes[part].decode_tiled):
        with pytest.raises(ValueError, match=r"samples: this VAE decodes .* got .*; connect"):
            decode(torch.zeros(shape))


def test_input_of_another_kind_is_refused(vaes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pixels: a film must have 4n\+1 frames .* got 12; take 9 .* 13"):
        vaes["wan"].encode(film(12))
    with pytest.raises(ValueError, match=r"pixels: .* \(1, 8, 64, 3\)"):
        vaes["wan"].encode(film(1, 8, 64))
    with pytest.raises(ValueError, match=r"pixels: .* \(1, 51200, 2\)"):
        vaes["wan"].encode(random(1, 51200, 2))
    with pytest.raises(ValueError, match=r"audio: .* 2048 samples .* \(1, 100, 2\)"):
        vaes["audio"].encode(random(1, 100, 2))
    with pytest.raises(ValueError, match=r"audio: .* \(13, 64, 96, 3\)"):
        vaes["audio"].encode(film())


def test_values_that_are_no_numbers_stop_the_decoding(vaes: dict[str, Any]) -> None:
    latents, sound = video_latents(), random(1, 64, 26)
    latents[0, 0, 1], sound[0, 0, 3] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"decoding the picture: .* NaN .* weight_dtype float32"):
        vaes["wan"].decode(latents)
    with pytest.raises(ValueError, match=r"decoding the sound: .* NaN"):
        vaes["audio"].decode(sound)


def test_the_memory_asked_for_grows_with_the_picture_and_not_with_the_length(vaes: dict[str, Any]) -> None:
    for part in VIDEO_PARTS:
        small, large, long = (
            vaes[part].memory_used_decode(shape, torch.float32)
            for shape in ((1, 48, 9, 8, 8), (1, 48, 9, 16, 16), (1, 48, 90, 8, 8))
        )
        assert 3 < large / small < 5
        assert long < 1.5 * small
    assert vaes["wan"].memory_used_encode((1, 3, 13, 64, 70), torch.float32) > 0


def test_the_patcher_can_be_made_anew(vaes: dict[str, Any]) -> None:
    for vae in vaes.values():
        make, arguments = vae.patcher.cached_patcher_init
        fresh = make(*arguments, disable_dynamic=True)
        assert not fresh.is_dynamic()
        for (name, own), (other, copy) in zip(
            vae.get_sd().items(), fresh.model.state_dict().items(), strict=True
        ):
            assert name == other and torch.equal(own, copy)


@pytest.mark.parametrize(("name", "dtype"), [("default", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_of_the_asked_dtype(name: str, dtype: torch.dtype, pony_folder: Path) -> None:
    vae = load_video_vae(pony_folder / "wan22_vae.safetensors", name)
    assert {tensor.dtype for tensor in vae.get_sd().values()} == {dtype}
    exact = load_video_vae(pony_folder / "wan22_vae.safetensors").decode(video_latents())
    assert (vae.decode(video_latents()) - exact).abs().mean() < 0.02


def test_a_file_of_another_part_is_refused(pony_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"vae: .* holds the audio vae; choose"):
        load_video_vae(pony_folder / "audio_vae")
    with pytest.raises(ValueError, match="holds the video vae"):
        load_audio_vae(pony_folder / "wan22_vae.safetensors")


def test_loading_says_nothing_of_missing_weights(pony_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_audio_vae(pony_folder / "audio_vae")
    assert "No VAE weights" not in caplog.text
