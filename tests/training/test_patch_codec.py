"""The latents that the video VAE is trained towards."""

from pathlib import Path
from random import Random

import torch

from happyhorse.training.data.pool import VideoPool
from happyhorse.training.generators import generator
from happyhorse.training.patch_codec import PatchCodec, fit


def test_latents_have_mean_zero_and_about_unit_deviation() -> None:
    pool, random = VideoPool(12, 0), Random(0)
    codec = fit((pool.crops(1, 96, random) for _ in range(24)), generator(0, "codec"))
    latents = codec.encode(torch.cat([pool.crops(1, 96, Random(i)) for i in range(12)]))
    assert latents.shape == (12, 48, 13, 6, 6)
    deviations = latents.std(dim=(0, 2, 3, 4))
    assert latents.mean().abs() < 0.1
    assert deviations.min() > 0.5 and deviations.max() < 2


def test_48_components_hold_nearly_all_of_films_that_have_no_more() -> None:
    # films whose patches are mixtures of 40 fixed ones can be told from their latents exactly
    draw = generator(0, "films")
    patterns = torch.randn(40, 3, 4, 16, 16, generator=draw)

    def film() -> torch.Tensor:
        weights = torch.randn(2, 2, 3, 40, generator=draw)
        rest = torch.einsum("fyxk,kctpq->cftypxq", weights, patterns).reshape(1, 3, 8, 32, 48)
        return torch.cat([rest[:, :, :1], rest], dim=2)

    films = [film() for _ in range(80)]
    codec = fit(films, draw)
    seen = torch.cat([codec.encode(x)[:, :, 1:].movedim(1, -1).reshape(-1, 48) for x in films])
    patches = torch.cat([x[:, :, 1:].unfold(2, 4, 4).unfold(3, 16, 16).unfold(4, 16, 16)
                         .permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 3072) for x in films])  # fmt: skip
    ones = torch.ones(len(seen), 1)
    solution = torch.linalg.lstsq(torch.cat([seen, ones], dim=1), patches, driver="gelsd").solution
    rebuilt = torch.cat([seen, ones], dim=1) @ solution
    assert (rebuilt - patches).norm() / patches.norm() < 0.02


def test_the_first_frame_counts_as_four(tmp_path: Path) -> None:
    pool = VideoPool(6, 0)
    codec = fit((pool.crops(1, 96, Random(i)) for i in range(6)), generator(0, "codec"))
    picture = pool.crops(1, 48, Random(1))[:, :, :1]
    still = codec.encode(torch.cat([picture] * 5, dim=2))
    assert still.shape[2] == 2
    torch.testing.assert_close(still[:, :, 0], still[:, :, 1])
    codec.save(tmp_path / "codec.safetensors")
    again = PatchCodec.from_file(tmp_path / "codec.safetensors")
    assert torch.equal(again.encode(picture), codec.encode(picture))


def test_the_metric_gives_errors_of_latents_the_size_of_those_of_pixels() -> None:
    project, errors = torch.randn(3072, 48, generator=generator(0, "codec")), torch.randn(5, 48)
    codec = PatchCodec(torch.zeros(3072), project / 3072**0.5 * torch.linspace(1, 4, 48))
    pixels = (errors @ torch.linalg.pinv(codec.project)).norm(dim=1)
    ratios = (errors @ codec.pixel_metric.T).norm(dim=1) / pixels
    torch.testing.assert_close(ratios, ratios[:1].expand(5), rtol=1e-4, atol=0)
