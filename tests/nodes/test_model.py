"""The MODEL among the host's own nodes."""

import logging
from pathlib import Path

import comfy.samplers
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_torch_compile import TorchCompileModel
from safetensors.torch import save_file

import nodes as stock
from happyhorse.nodes.latents import film_latent, masks, start_audio, streams
from happyhorse.nodes.model import load_model
from happyhorse.nodes.sampler import (
    HappyHorseGuider,
    HappyHorseNoise,
    HappyHorseSampler,
    HappyHorseSamplerSelect,
    HappyHorseSigmas,
    hold_start_audio,
    partial_sigmas,
)
from happyhorse.sampler.schedule import flow_sigmas

SEED = 7


@pytest.fixture(scope="module")
def model(pony_folder: Path):
    return load_model(pony_folder / "distill", None, "float32")


@pytest.fixture(scope="module")
def prompt(model) -> list:
    states = torch.randn(
        1, 9, model.model.config.text_in_channels, generator=torch.Generator().manual_seed(1)
    )
    return [[states, {}]]


def empty(batch: int = 1, audio: int = 9) -> dict:
    video = torch.zeros(batch, 48, (audio - 1) // 4 + 1, 4, 6)
    return film_latent(video, torch.zeros(batch, 64, audio))


def sample(model, prompt: list, latent: dict | None = None, steps: int = 3, seed: int = SEED) -> NestedTensor:
    with torch.inference_mode():
        result = HappyHorseSampler.execute(model, prompt, latent or empty(), seed, steps, 1.0)
    return result[0]["samples"]


def custom(model, prompt: list, latent: dict | None = None, sampler=None, steps: int = 8) -> NestedTensor:
    sigmas = HappyHorseSigmas.execute(steps, 1.0, 5.0)[0]
    sampler = sampler or KSamplerSelect.execute("lcm")[0]
    arguments = model, True, SEED, 1.0, prompt, prompt, sampler, sigmas, latent or empty()
    with torch.inference_mode():
        return SamplerCustom.execute(*arguments)[0]["samples"]


def difference(a: NestedTensor, b: NestedTensor) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.unbind(), b.unbind(), strict=True))


def test_sampler_custom_with_lcm_is_our_sampler(model, prompt: list) -> None:
    # its formula rounds otherwise, which eight steps of the trained network enlarge
    ours = sample(model, prompt, steps=8)
    for found, expected in zip(custom(model, prompt).unbind(), ours.unbind(), strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-4


def test_our_sampler_in_sampler_custom_is_our_sampler_node(model, prompt: list) -> None:
    ours = HappyHorseSamplerSelect.execute("dmd2")[0]
    assert difference(custom(model, prompt, sampler=ours), sample(model, prompt, steps=8)) == 0


def test_ksampler_with_lcm_is_near_our_sampler(model, prompt: list) -> None:
    with torch.inference_mode():
        result = stock.KSampler().sample(model, SEED, 8, 1.0, "lcm", "simple", prompt, prompt, empty())
    # its levels differ by up to 3e-4, so its film does too; a random network enlarges that
    assert difference(result[0]["samples"], sample(model, prompt, steps=8)) < 0.1


def test_a_batch_of_two_holds_two_films(model, prompt: list) -> None:
    video, audio = sample(model, prompt, empty(batch=2)).unbind()
    assert video.shape[0] == audio.shape[0] == 2
    assert not torch.equal(video[0], video[1])


def test_a_noise_mask_keeps_what_it_covers(model, prompt: list) -> None:
    latent = empty()
    video, audio = latent["samples"].unbind()
    video[:, :, :1], audio[:] = torch.randn(1, 48, 1, 4, 6), torch.randn(audio.shape)
    mask = torch.ones_like(video[:, :1])
    mask[:, :, 0] = 0
    latent["noise_mask"] = NestedTensor([mask, torch.zeros_like(audio[:, :1])])
    for result in (sample(model, prompt, latent), custom(model, prompt, latent)):
        torch.testing.assert_close(result.unbind()[0][:, :, :1], video[:, :, :1], rtol=0, atol=1e-5)
        assert torch.equal(result.unbind()[1], audio)
        assert (result.unbind()[0][:, :, 1:] != 0).all()


def test_a_plain_mask_covers_the_video_only(model, prompt: list) -> None:
    given = empty()
    given["samples"].unbind()[0].normal_()
    latent = stock.SetLatentNoiseMask().set_mask(given, torch.zeros(1, 4, 6))[0]
    video, audio = custom(model, prompt, latent).unbind()
    torch.testing.assert_close(video, given["samples"].unbind()[0], rtol=0, atol=1e-5)
    assert audio.abs().mean() > 0.1


@pytest.mark.parametrize("kohya", [False, True])
def test_stock_lora_loaders_patch_every_kind_of_linear(
    model, prompt: list, tmp_path: Path, kohya: bool
) -> None:
    weights = {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if weight.ndim == 2:
            path = "diffusion_model." + name.removesuffix(".weight")
            down, up = torch.randn(4, weight.shape[1]) / 30, torch.randn(weight.shape[0], 4) / 30
            stem = "lora_unet_" + path.removeprefix("diffusion_model.").replace(".", "_") if kohya else path
            weights[stem + (".lora_down.weight" if kohya else ".lora_A.weight")] = down
            weights[stem + (".lora_up.weight" if kohya else ".lora_B.weight")] = up
    save_file(weights, tmp_path / "lora.safetensors")
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(tmp_path), is_default=True)
    patched = stock.LoraLoaderModelOnly().load_lora_model_only(model, "lora.safetensors", 1.0)[0]
    assert len(patched.patches) == len(weights) // 2
    assert difference(sample(patched, prompt), sample(model, prompt)) > 1e-2
    assert len(model.patches) == 0


def test_torch_compile_changes_nothing(model, prompt: list, compiler: str) -> None:
    del compiler
    compiled = TorchCompileModel.execute(model, "inductor")[0]
    assert difference(sample(compiled, prompt, steps=1), sample(model, prompt, steps=1)) < 1e-4


def test_single_layers_can_be_compiled(model, prompt: list, compiler: str) -> None:
    del compiler
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = model.clone()
    keys = [f"diffusion_model.block.layers.{i}" for i in range(len(model.model.diffusion_model.block.layers))]
    set_torch_compile_wrapper(model=patched, backend="inductor", keys=keys)
    assert difference(sample(patched, prompt, steps=1), sample(model, prompt, steps=1)) < 1e-4


def test_easy_cache_skips_steps(model, prompt: list, caplog: pytest.LogCaptureFixture) -> None:
    cached = EasyCacheNode.execute(model, 10.0, 0.15, 0.95, True)[0]
    with caplog.at_level(logging.INFO):
        euler = KSamplerSelect.execute("euler")[0]
        video, audio = custom(cached, prompt, sampler=euler, steps=20).unbind()
    assert video.isfinite().all() and audio.isfinite().all()
    assert any("skipped" in record.message for record in caplog.records)


def test_model_sampling_sd3_changes_the_shift_of_stock_schedules(model, prompt: list) -> None:
    shifted = ModelSamplingSD3().patch(model, 1.0)[0]
    run = stock.KSampler().sample
    with torch.inference_mode():
        films = [
            run(m, SEED, 4, 1.0, "euler", "simple", prompt, prompt, empty())[0]["samples"]
            for m in (model, shifted)
        ]
    assert difference(*films) > 1e-2


def test_patches_replace_and_attention_overrides_are_honoured(model, prompt: list) -> None:
    seen = {"blocks": [], "attention": 0}

    def replace(args: dict, extra: dict) -> dict:
        seen["blocks"].append(args["transformer_options"]["block_index"])
        return extra["original_block"](args)

    def override(function, q: torch.Tensor, k: torch.Tensor, *args, **kwargs):
        seen["attention"] += 1
        # in float32 GPUs have no kernel for fewer key heads but the one that makes the whole matrix of scores
        assert q.dtype == torch.float32
        assert q.shape[1] == k.shape[1]
        return function(q, k, *args, **kwargs)

    patched = model.clone()
    layers = len(model.model.diffusion_model.block.layers)
    for index in range(layers):
        patched.set_model_patch_replace(replace, "dit", "double_block", index)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    result = sample(patched, prompt, steps=1)
    assert seen["blocks"] == list(range(layers))
    assert seen["attention"] >= layers
    assert difference(result, sample(model, prompt, steps=1)) < 1e-3


def test_weights_stay_as_they_are_stored(pony_folder: Path) -> None:
    for name, dtype in (("default", torch.bfloat16), ("float8_e4m3fn", torch.float8_e4m3fn)):
        network = load_model(pony_folder / "distill", None, name).model.diffusion_model
        layer = network.block.layers[0]
        for weight in (layer.attention.linear_qkv.weight, layer.mlp.down_proj.weight):
            assert getattr(weight, "_qdata", weight).dtype == dtype
        assert network.adapter.video_embedder.weight.dtype == torch.float32


def test_a_model_is_loaded_anew_for_nodes_that_need_static_weights(model) -> None:
    make, arguments = model.cached_patcher_init
    assert not make(*arguments, disable_dynamic=True).is_dynamic()


def test_the_noise_of_a_seed_is_the_hosts(model) -> None:
    del model
    noise = HappyHorseNoise.execute(SEED)[0].generate_noise(empty())
    video = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(noise.unbind()[0], video)
    start = empty()
    start["start_audio"] = start["samples"].unbind()[1].fill_(3)
    assert (HappyHorseNoise.execute(SEED)[0].generate_noise(start).unbind()[1] == 3).all()
    finished = start | {"samples": NestedTensor([stream + 1 for stream in start["samples"].unbind()])}
    assert (HappyHorseNoise.execute(SEED)[0].generate_noise(finished).unbind()[1] != 4).all()


def test_a_film_taken_from_a_batch_is_made_again(model, prompt: list) -> None:
    def made(latent: dict) -> dict:
        with torch.inference_mode():
            return HappyHorseSampler.execute(model, prompt, latent, SEED, 1, 1.0)[0]  # no noise between steps

    second = [stream[1:] for stream in made(empty(batch=2))["samples"].unbind()]
    again = made(empty() | {"batch_index": [1]})
    assert again["batch_index"] == [1]
    for stream, want in zip(again["samples"].unbind(), second, strict=True):
        torch.testing.assert_close(stream, want, atol=1e-4, rtol=0)


def test_a_held_start_of_the_sound_keeps_what_else_the_latent_says() -> None:
    start = empty() | {"batch_index": [3]}
    start["start_audio"] = streams(start)[1]
    held = hold_start_audio(start)
    assert held["batch_index"] == [3] and start_audio(held) is None
    assert not masks(held)[1].any() and masks(held)[0].all()


def test_the_base_model_is_guided_and_needs_a_negative_prompt(pony_folder: Path, prompt: list) -> None:
    base = load_model(pony_folder / "base", None, "float32")
    with pytest.raises(ValueError, match="negative: the base model"):
        HappyHorseSampler.execute(base, prompt, empty(), SEED, 2, 1.0)
    other = [[-prompt[0][0], {}]]
    with torch.inference_mode():
        guided = HappyHorseSampler.execute(base, prompt, empty(), SEED, 2, 1.0, other)[0]["samples"]
        alike = HappyHorseSampler.execute(base, prompt, empty(), SEED, 2, 1.0, prompt)[0]["samples"]
    assert difference(guided, alike) > 1e-2
    assert type(HappyHorseGuider.execute(base, prompt, other)[0]).__name__ == "PublishedGuider"


def test_denoise_below_one_changes_a_film_by_so_much(model, prompt: list) -> None:
    film = sample(model, prompt)
    latent = film_latent(*film.unbind())
    with torch.inference_mode():
        films = [
            HappyHorseSampler.execute(model, prompt, latent, SEED + 1, 4, share)[0]["samples"]
            for share in (0.05, 0.4, 1.0)
        ]
    changes = [difference(other, film) for other in films]
    assert 0 < changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize(("steps", "denoise", "whole"), [(4, 0.5, 8), (3, 0.3, 10), (4, 1.0, 4)])
def test_denoise_is_the_share_of_a_schedule_that_is_run(steps: int, denoise: float, whole: int) -> None:
    assert torch.equal(partial_sigmas(steps, 5.0, denoise), flow_sigmas(whole, 5.0)[-steps - 1 :])


HOOKS = ("calc_cond_batch_function", "pre_cfg_function", "cfg_function", "post_cfg_function")


@pytest.mark.parametrize("hook", HOOKS)
def test_nodes_that_patch_guidance_are_heard(hook: str, pony_folder: Path, prompt: list) -> None:
    base, other, heard = load_model(pony_folder / "base", None, "float32"), [[-prompt[0][0], {}]], []

    def patch(told: dict) -> object:
        heard.append(told["sigma"].item())
        conds, sigma, options = told.get("conds"), told["sigma"], told["model_options"]
        if hook == "calc_cond_batch_function":
            results = comfy.samplers.calc_cond_batch(told["model"], conds, told["input"], sigma, options)
            return [2 * result for result in results]
        if hook == "pre_cfg_function":
            return [2 * result for result in told["conds_out"]]
        if hook == "cfg_function":
            return told["input"] - told["cond_denoised"]
        return 2 * told["denoised"]

    patched = base.clone()
    if hook == "calc_cond_batch_function":
        patched.set_model_sampler_calc_cond_batch_function(patch)
    else:
        getattr(patched, f"set_model_sampler_{hook}")(patch)
    with torch.inference_mode():
        plain, changed = (
            HappyHorseSampler.execute(model, prompt, empty(), SEED, 2, 1.0, other)[0]["samples"]
            for model in (base, patched)
        )
    assert len(heard) == 2 and heard[0] > heard[1]
    assert difference(plain, changed) > 0.1


def split(sampler, sigmas, model, prompt: list, latent: dict) -> NestedTensor:
    """One film in two runs, as with SplitSigmas."""
    first, second = sigmas[:3], sigmas[2:]
    with torch.inference_mode():
        half = SamplerCustom.execute(model, True, SEED, 1.0, prompt, prompt, sampler, first, latent)[0]
        whole = SamplerCustom.execute(model, False, SEED, 1.0, prompt, prompt, sampler, second, half)
    return whole[0]["samples"]


@pytest.mark.parametrize(("name", "most"), [("unipc", 0.3), ("euler", 1e-4)])
def test_a_schedule_may_be_split(name: str, most: float, model, prompt: list) -> None:
    """Only the history is lost between the parts, so UniPC's first step after the cut is of first order."""
    select = HappyHorseSamplerSelect if name == "unipc" else KSamplerSelect
    sampler, sigmas = select.execute(name)[0], HappyHorseSigmas.execute(8, 1.0, 5.0)[0]
    whole, parts = custom(model, prompt, sampler=sampler), split(sampler, sigmas, model, prompt, empty())
    for found, expected in zip(parts.unbind(), whole.unbind(), strict=True):
        assert (found - expected).norm() / expected.norm() < most


def test_unipc_refuses_levels_that_it_cannot_tell_apart(model, prompt: list) -> None:
    sampler, sigmas = HappyHorseSamplerSelect.execute("unipc")[0], HappyHorseSigmas.execute(60, 1.0, 100.0)[0]
    arguments = model, True, SEED, 1.0, prompt, prompt, sampler, sigmas, empty()
    with pytest.raises(ValueError, match=r"sigmas: unipc begins at 0\.9998, .* lower shift"):
        SamplerCustom.execute(*arguments)


def test_stock_schedules_that_begin_at_one_work_with_unipc(model, prompt: list) -> None:
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    sampler = HappyHorseSamplerSelect.execute("unipc")[0]
    with torch.inference_mode():
        arguments = model, True, SEED, 1.0, prompt, prompt, sampler, sigmas, empty()
        result = SamplerCustom.execute(*arguments)[0]["samples"]
    assert all(stream.isfinite().all() for stream in result.unbind())


def test_soft_masks_blend_as_the_hosts_samplers_do(model, prompt: list) -> None:
    latent = empty()
    for stream in latent["samples"].unbind():
        stream.normal_(generator=torch.Generator().manual_seed(3))
    video, audio = latent["samples"].unbind()
    latent["noise_mask"] = NestedTensor([torch.full_like(video[:, :1], 0.5), torch.ones_like(audio[:, :1])])
    ours = custom(model, prompt, latent, HappyHorseSamplerSelect.execute("dmd2")[0])
    assert difference(ours, custom(model, prompt, latent)) < 1e-3


def test_differential_diffusion_is_heard(model, prompt: list) -> None:
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    latent = empty()
    for stream in latent["samples"].unbind():
        stream.normal_(generator=torch.Generator().manual_seed(3))
    video, audio = latent["samples"].unbind()
    latent["noise_mask"] = NestedTensor([torch.full_like(video[:, :1], 0.5), torch.ones_like(audio[:, :1])])
    changed = DifferentialDiffusion.execute(model)[0]
    sampler = HappyHorseSamplerSelect.execute("dmd2")[0]
    assert difference(custom(changed, prompt, latent, sampler), custom(model, prompt, latent, sampler)) > 1e-2
