import pytest
import torch
from golden_files import GoldenFile, golden_files, recorded_transformer, relative_error

from happyhorse.model.config import TransformerConfig
from happyhorse.model.geometry import SIZE_STEP, FilmShape
from happyhorse.model.packing import Latents
from happyhorse.model.transformer import JointTransformer
from happyhorse.sampler import stages
from happyhorse.sampler.conditions import Conditions, DenoiseFunction, StepCallback
from happyhorse.sampler.stages import Network, network_of, sample_base, sample_super_resolution
from happyhorse.sampler.super_resolution import mix_audio

E2E = pytest.mark.parametrize("golden", golden_files("e2e"), ids=str)


def recorded_network(file: GoldenFile, part: str) -> Network:
    """The transformer `part` ('base' or 'sr') of a recorded run, in float32."""
    values, state = recorded_transformer(file, part)
    with torch.device("meta"):
        transformer = JointTransformer(TransformerConfig.from_dict(values), compute_dtype=torch.float32)
    transformer.load_state_dict(state, strict=True, assign=True)
    return network_of(transformer.requires_grad_(False))


def rounded(size: list[int]) -> list[int]:
    """The published code rounds [width, height] down to multiples of 32; ours refuses other sizes."""
    return [side // SIZE_STEP * SIZE_STEP for side in size]


class Run:
    """One recorded run: its inputs, its random draws, and a check of what comes out of every step."""

    def __init__(self, file: GoldenFile) -> None:
        self.meta, self.tensors = file.config, file.tensors()
        self.text = self.tensors["in.text"][:, : self.meta["text_len"]]
        self.negative = self.tensors["in.text_null"][:, : self.meta["text_null_len"]]
        self.given_audio = self.tensors.get("in.audio_latent")
        draws = iter(self.meta["draw_order"])
        self.draws = (self.tensors[f"draw.{name}"] for name in draws)
        self.done = 0
        self.compared = set()

    def shape(self) -> FilmShape:
        width, height = rounded(self.meta["base_size"])
        if self.given_audio is None:
            return FilmShape.from_seconds(width, height, self.meta["seconds"])
        return FilmShape(width, height, self.given_audio.shape[1])

    def start(self) -> Latents:
        audio = next(self.draws) if self.given_audio is None else self.given_audio
        return Latents(next(self.draws), audio)

    def step_noise(self, like: Latents) -> Latents:
        noise = Latents(next(self.draws), next(self.draws))
        assert noise.video.shape == like.video.shape
        return noise

    def image(self, size: list[int]) -> torch.Tensor | None:
        return self.tensors[f"in.image_latent.{size[1]}x{size[0]}"] if self.meta.get("image") else None

    def checked(self, denoise: DenoiseFunction) -> DenoiseFunction:
        """The same, every step's velocity (after guidance) being compared with the recorded one."""

        def compared(latents: Latents, sigma: float) -> Latents:
            denoised = denoise(latents, sigma)
            velocity = latents.map(lambda x, clean: (x - clean) / sigma, denoised)
            self.compare(f"step.{self.done:02}.velocity_", velocity)
            return denoised

        return compared

    def check_step(self, held_audio: torch.Tensor | None) -> StepCallback:
        """Compare every step's latents with the recorded ones, in which a held sound is left untouched."""

        def check(index: int, latents: Latents, denoised: Latents) -> None:  # noqa: ARG001
            latents = latents if held_audio is None else latents._replace(audio=held_audio)
            self.compare(f"step.{self.done:02}.", latents)
            self.done += 1

        return check

    def compare(self, prefix: str, got: Latents) -> None:
        for stream in Latents._fields:
            want = self.tensors.get(name := prefix + stream)
            if want is not None:
                self.compared.add(name)
                assert relative_error(getattr(got, stream), want) < 1e-4, name

    def assert_all_was_compared(self) -> None:
        assert next(self.draws, None) is None, "every recorded draw must be used"
        recorded = {name for name in self.tensors if name.startswith(("step.", "out."))}
        assert self.compared == recorded
        assert {"step.00.velocity_video", "out.video", "out.audio"} <= recorded


@E2E
def test_golden_sampling_runs(golden: GoldenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    run, meta = Run(golden), golden.config
    denoise_function = stages.denoise_function
    monkeypatch.setattr(stages, "denoise_function", lambda *args: run.checked(denoise_function(*args)))
    shape = run.shape()
    guided = meta["cfg_number"] == 2
    start = run.start()
    assert start.video.shape[2:] == (shape.latent_frames, shape.latent_rows, shape.latent_columns)
    assert start.audio.shape[1] == shape.audio_latents
    # the published few-step run re-noises a given sound, the two-pass run holds it
    held = run.given_audio if guided else None
    latents = sample_base(
        recorded_network(golden, "base"), start, run.text,
        negative=run.negative if guided else None, few_step=not guided, steps=meta["steps"],
        noise_fn=run.step_noise, conditions=Conditions(run.image(rounded(meta["base_size"])), held),
        shift=meta["shift"], callback=run.check_step(held),
    )  # fmt: skip
    if "sr_size" in meta:
        noise = Latents(next(run.draws), next(run.draws))
        sr_guided = meta["sr_cfg_number"] == 2
        latents = sample_super_resolution(
            recorded_network(golden, "sr"), latents, noise, run.text,
            negative=run.negative if sr_guided else None, steps=meta["sr_steps"],
            first_frame=run.image(rounded(meta["sr_size"])),
            shift=meta["shift"], callback=run.check_step(mix_audio(latents.audio, noise.audio)),
        )  # fmt: skip
    run.compare("out.", latents)
    run.assert_all_was_compared()
