"""Checkpoints as they lie on disk: the pony's weights, packed in every way that weights are published in."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_files import full_size
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from happyhorse.model import catalog, checkpoint
from happyhorse.model.checkpoint import (
    NETWORKS,
    check_names,
    describe,
    load,
    load_tokenizer,
    open_checkpoint,
)
from happyhorse.model.config import MAGIHUMAN, PONY, VARIANTS, AudioVAEConfig, Config, VideoDecoderConfig
from happyhorse.model.key_maps import KEY_MAPS
from happyhorse.model.rope import rope_bands
from happyhorse.model.stream_writer import write_tensors
from happyhorse.model.weight_files import SafetensorsFile, open_weights

State = dict[str, Tensor]
Weights = Callable[[str], State]  # see the fixture `weights`

# part or variant -> its file in the pony
FILES = {
    **{variant: f"{variant}/model.safetensors" for variant in VARIANTS},
    "text_encoder": "text_encoder/model.safetensors",
    "video_vae": "wan22_vae.safetensors",
    "video_decoder": "turbo_vae/model.safetensors",
    "audio_vae": "audio_vae/model.safetensors",
}
FOREIGN = {"first_stage_model.quant_conv.weight": torch.ones(4), "vae.encoder.conv1.bias": torch.ones(2)}


@pytest.fixture
def weights(pony_folder: Path) -> Weights:
    """The weights of a part of the pony under our own names."""

    def read(name: str) -> State:
        stored = load_file(pony_folder / FILES[name])
        return {key.removeprefix("pretransform.model."): tensor for key, tensor in stored.items()}

    return read


@pytest.fixture
def pony_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot carry a configuration are taken for the pony's, not for the published model's."""
    monkeypatch.setattr(checkpoint, "MAGIHUMAN", PONY)


def header(config: Config, **entries: str) -> dict[str, str]:
    return {"format": "pt", "config": json.dumps(config.to_dict()), **entries}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def write_shards(folder: Path, state: State, num_shards: int, metadata: dict[str, str]) -> list[Path]:
    """Shards and their index, named as published; tensors are dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    homes = {name: shards[i % num_shards] for i, name in enumerate(state)}
    for shard in shards:
        save_file({name: state[name] for name in state if homes[name] == shard}, shard, metadata)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: home.name for name, home in homes.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return shards


def assert_weights(module: nn.Module, want: State) -> None:
    """The module holds these values, as far as its dtypes can tell them apart."""
    state = module.state_dict()
    assert state.keys() == want.keys()
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor, want[name].to(tensor.dtype)), name


# Transformers


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_with_an_index_load_in_the_published_number_formats(
    tmp_path: Path, weights: Weights, stored: torch.dtype, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(stored) for name, tensor in weights("distill").items()}
    config = PONY.transformers["distill"]
    write_shards(tmp_path / "distill", state, 3, header(config))
    opened = open_checkpoint(tmp_path / "distill")
    assert (opened.part, opened.variant, opened.config) == ("transformer", "distill", config)
    assert opened.dtypes == {{torch.float32: "F32", torch.bfloat16: "BF16"}[stored]}
    assert opened.parameters == sum(tensor.numel() for tensor in state.values())
    module = load(opened, dtype)
    assert_weights(module, state)
    assert not module.training and not any(weight.requires_grad for weight in module.parameters())
    for name, tensor in module.state_dict().items():
        in_block = re.fullmatch(r"block\.layers\.\d+\.(attention|mlp)\.\w+_(qkv|proj)\.weight", name)
        assert tensor.dtype == (dtype if in_block else torch.float32), name
    assert sum(tensor.dtype == torch.bfloat16 for tensor in module.state_dict().values()) == (
        4 * config.num_layers if dtype == torch.bfloat16 else 0
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_file_loads_with_each_prefix_and_foreign_tensors_beside_it(
    tmp_path: Path, weights: Weights, prefix: str, variant: str
) -> None:
    state, config = weights(variant), PONY.transformers[variant]
    path = tmp_path / "any.safetensors"
    save_file(prefixed(prefix, state) | (FOREIGN if prefix else {}), path, header(config, variant=variant))
    opened = open_checkpoint(path, "transformer", variant)
    assert (opened.variant, opened.config) == (variant, config)
    assert_weights(load(opened, torch.bfloat16), state)


def test_each_part_is_found_in_a_file_that_holds_several(tmp_path: Path, weights: Weights) -> None:
    transformer, audio_vae = weights("distill"), weights("audio_vae")
    path = tmp_path / "distill.safetensors"
    packed = prefixed("model.diffusion_model.", transformer) | prefixed("pretransform.model.", audio_vae)
    save_file(packed, path)
    for part, state in (("transformer", transformer), ("audio_vae", audio_vae)):
        opened = open_checkpoint(path, part)
        assert opened.part == part and opened.names.keys() == state.keys()


def test_stored_bands_are_used_and_absent_ones_computed(tmp_path: Path, weights: Weights) -> None:
    state, config = weights("base"), PONY.transformers["base"]
    formula = rope_bands(config.head_dim)
    rounded = formula.to(torch.bfloat16)
    assert not torch.equal(rounded.float(), formula), "rounding must show for this test to mean something"
    for stored, want in ((rounded, rounded.float()), (formula * 2, formula * 2), (None, formula)):
        bands = {} if stored is None else {"adapter.rope.bands": stored}
        others = {name: tensor for name, tensor in state.items() if name != "adapter.rope.bands"}
        path = tmp_path / "base.safetensors"
        save_file(others | bands, path, header(config))
        got = load(open_checkpoint(path), torch.bfloat16).adapter.rope.bands
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize(
    ("path", "variant"),
    [
        ("distill-merger_bf16.safetensors", "distill"),
        ("540p_sr_merge_bf16.safetensors", "540p_sr"),
        ("1080p_sr_merge_fp8.safetensors", "1080p_sr"),
        ("base/", "base"),
        ("distill/", "distill"),
        ("540p_sr/", "540p_sr"),
        ("1080p_sr/", "1080p_sr"),
        ("base_fp8/", "base"),
        ("distill_fp8/", "distill"),
        ("540p_sr_fp8/", "540p_sr"),
        ("1080p_sr_fp8/", "1080p_sr"),
        ("distill/transformer/", "distill"),
        ("1080p_sr/model.safetensors", "1080p_sr"),
        ("MagiHuman-v1.0-Distill/", "distill"),
        ("base/540p_sr.safetensors", "540p_sr"),
        ("base-and-distill/540p_sr/model.safetensors", "540p_sr"),
    ],
)
def test_published_names_tell_the_variant(tmp_path: Path, weights: Weights, path: str, variant: str) -> None:
    file = tmp_path / path / "model.safetensors" if path.endswith("/") else tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights("distill"), file)
    opened = open_checkpoint(tmp_path / path)
    assert opened.variant == variant
    assert opened.config == MAGIHUMAN.transformers[variant]
    assert open_checkpoint(tmp_path / path, "transformer", variant).variant == variant
    other = next(v for v in VARIANTS if v != variant)
    with pytest.raises(ValueError, match=rf"is the variant '{variant}' by its name, but '{other}' is"):
        open_checkpoint(tmp_path / path, "transformer", other)


@pytest.mark.parametrize("path", ["fp8.safetensors", "database/x.safetensors", "base-distill.safetensors"])
def test_a_name_that_tells_no_variant_leaves_it_to_the_user(
    tmp_path: Path, weights: Weights, path: str
) -> None:
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    save_file(weights("distill"), file)
    for variant in VARIANTS:
        assert open_checkpoint(file, variant=variant).variant == variant
    with pytest.raises(ValueError, match=r"cannot tell which variant .*safetensors is; say so with"):
        open_checkpoint(file)
    with pytest.raises(ValueError, match=r"asked for must be one of base, distill, .*, got '720p'"):
        open_checkpoint(file, variant="720p")


def test_the_header_decides_the_variant_before_the_name(tmp_path: Path, weights: Weights) -> None:
    path, config = tmp_path / "base.safetensors", PONY.transformers["distill"]
    save_file(weights("distill"), path, header(config, variant="distill"))
    assert open_checkpoint(path).variant == open_checkpoint(path, variant="distill").variant == "distill"
    with pytest.raises(ValueError, match=r"is the variant 'distill' by its header, but 'base' is asked for"):
        open_checkpoint(path, variant="base")
    save_file(weights("distill"), path, header(config, variant="turbo"))
    with pytest.raises(ValueError, match=r"header of .*base\.safetensors must be one of .*, got 'turbo'"):
        open_checkpoint(path)


# The other parts


@pytest.mark.usefixtures("pony_numbers")
@pytest.mark.parametrize("zipped", [True, False])
def test_the_video_vae_loads_from_a_plain_pickle(tmp_path: Path, weights: Weights, zipped: bool) -> None:
    path, state = tmp_path / "Wan2.2_VAE.pth", weights("video_vae")
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(path)
    assert (opened.part, opened.variant, opened.config) == ("video_vae", None, PONY.video_vae)
    assert opened.dtypes == {"float16"}
    for dtype in (torch.float32, torch.bfloat16):
        module = load(opened, dtype)
        assert_weights(module, state)
        assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}


def published_decoder_json(config: VideoDecoderConfig) -> str:
    """The published configuration file with the numbers of `config`."""
    published = full_size("turbo_vaed")["config"]
    assert published["aligned_feature_projection_mode"], "such fields of the training must be ignored"
    return json.dumps(published | config.to_dict())


@pytest.mark.parametrize("prefix", ["module.decoder.", "decoder.", "module.", ""])
def test_the_light_decoder_loads_from_a_training_checkpoint(
    tmp_path: Path, weights: Weights, prefix: str
) -> None:
    state = weights("video_decoder")
    named = {name.replace("decoder.", prefix, 1): tensor for name, tensor in state.items()}
    if "decoder." in prefix:  # else they could not be told from the decoder's own
        start = prefix.removesuffix("decoder.")
        named |= prefixed(f"{start}aligned_feature_projection_heads.0.", {"weight": torch.ones(3, 3)})
    folder = tmp_path / "turbo_vae"
    folder.mkdir()
    old = {name: tensor + 1 for name, tensor in named.items()}
    training = {"state_dict": old, "optimizer": {"state": {0: torch.ones(2)}, "lr": 1e-4}, "step": 340000}
    torch.save({"ema_state_dict": named, **training}, folder / "checkpoint-340000.ckpt")
    config = published_decoder_json(PONY.video_decoder)
    (folder / "TurboV3-Wan22-TinyShallow_7_7.json").write_text(config, encoding="utf-8")
    for path in (folder, folder / "checkpoint-340000.ckpt"):
        opened = open_checkpoint(path)
        assert (opened.part, opened.config) == ("video_decoder", PONY.video_decoder)
        assert_weights(load(opened, torch.float32), state)


def published_audio_json(config: AudioVAEConfig) -> str:
    """stable-audio-open's model_config.json with the numbers of `config`."""
    published = full_size("oobleck")["config"]
    numbers = {"channels": config.channels, "c_mults": config.c_mults, "strides": config.strides}
    published["encoder"]["config"] |= numbers | {"latent_dim": 2 * config.latent_dim}
    published["decoder"]["config"] |= numbers | {"latent_dim": config.latent_dim}
    published |= {"latent_dim": config.latent_dim, "downsampling_ratio": config.samples_per_latent}
    pretransform = {"type": "autoencoder", "iterate_batch": True, "config": published}
    model = {"pretransform": pretransform, "diffusion": {"type": "dit", "config": {"depth": 24}}}
    return json.dumps({"model_type": "diffusion_cond", "sample_rate": 44100, "model": model})


def test_the_audio_vae_loads_from_the_whole_of_stable_audio(tmp_path: Path, weights: Weights) -> None:
    state = weights("audio_vae")
    foreign = prefixed("model.model.transformer.layers.0.", {"pre_norm.gamma": torch.ones(3)})
    save_file(prefixed("pretransform.model.", state) | foreign, tmp_path / "model.safetensors")
    (tmp_path / "model_config.json").write_text(published_audio_json(PONY.audio_vae), encoding="utf-8")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        opened = open_checkpoint(path)
        assert (opened.part, opened.config) == ("audio_vae", PONY.audio_vae)
        assert_weights(load(opened, torch.float32), state)


def test_the_ponys_audio_json_says_what_its_header_says(tmp_path: Path, pony_folder: Path) -> None:
    for source in (pony_folder / "audio_vae").glob("*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored, tmp_path / "model.safetensors")  # now without a header
    assert open_checkpoint(tmp_path).config == PONY.audio_vae


@pytest.mark.parametrize("prefix", ["model.encoder.", "encoder.", "model.", ""])
def test_the_text_encoder_loads_with_each_prefix(tmp_path: Path, weights: Weights, prefix: str) -> None:
    state = weights("text_encoder")
    save_file(prefixed(prefix, state), tmp_path / "t5gemma.safetensors", header(PONY.text_encoder))
    assert_weights(load(open_checkpoint(tmp_path / "t5gemma.safetensors"), torch.float32), state)


@pytest.mark.parametrize("decoder_is_there", [True, False])
def test_the_text_encoder_is_read_without_its_decoder(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, decoder_is_there: bool
) -> None:
    encoder = prefixed("model.encoder.", weights("text_encoder"))
    decoder = {name.replace("encoder", "decoder"): tensor + 1 for name, tensor in encoder.items()}
    half = len(encoder)
    state = {**encoder, **decoder, "lm_head.out_proj.weight": torch.ones(2)}
    names = list(state)
    parts = [names[: half // 2], names[half // 2 : half], names[half : half + 9], names[half + 9 :]]
    files = [f"model-{i + 1:05}-of-00009.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        if decoder_is_there or all(name in encoder for name in part):
            save_file({name: state[name] for name in part}, tmp_path / file, header(PONY.text_encoder))
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")

    read, seen = SafetensorsFile.read, []
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: (seen.append(name), read(self, name))[1])
    opened = open_checkpoint(tmp_path, "text_encoder")
    assert_weights(load(opened, torch.float32), weights("text_encoder"))
    assert sorted(seen) == sorted(encoder)


def test_a_missing_shard_that_is_needed_is_named(tmp_path: Path, weights: Weights) -> None:
    state = prefixed("model.encoder.", weights("text_encoder"))
    shards = write_shards(tmp_path, state, 3, header(PONY.text_encoder))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of its shards are missing \({shards[1].name}\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["header", "beside a file", "beside shards", "nowhere"])
def test_the_tokenizer_lies_in_the_header_or_beside_the_weights(
    tmp_path: Path, pony_folder: Path, weights: Weights, place: str
) -> None:
    text = (pony_folder / "text_encoder" / "tokenizer.json").read_text(encoding="utf-8")
    extra = {"tokenizer": text} if place == "header" else {}
    path = tmp_path / "encoder.safetensors"
    if place == "beside shards":
        path = tmp_path / "t5gemma-9b-9b-ul2"
        write_shards(path, weights("text_encoder"), 2, header(PONY.text_encoder))
        (path / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        save_file(weights("text_encoder"), path, header(PONY.text_encoder, **extra))
    beside = tmp_path / "tokenizer.json"
    if place == "beside a file":
        beside.write_text(text, encoding="utf-8")
    if place == "header":  # the header's is meant, whatever else lies about
        beside.write_text("{}", encoding="utf-8")
    opened = open_checkpoint(path)
    if place == "nowhere":
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist; put the"):
            load_tokenizer(opened)
        return
    tokenizer = load_tokenizer(opened)
    tokens, _ = tokenizer.encode("a red circle")
    assert tokens and tokenizer.vocab_size <= PONY.text_encoder.vocab_size


# Files that are not read


def test_compressed_shards_are_refused_with_the_cure(tmp_path: Path, weights: Weights) -> None:
    shards = write_shards(tmp_path / "distill", weights("distill"), 2, header(PONY.transformers["distill"]))
    for shard in shards:
        shard.rename(shard.with_name(shard.name + ".zst"))
    cure = re.escape(f"zstd -d {tmp_path / 'distill'}/*.zst")
    with pytest.raises(ValueError, match=f"compressed shards; decompress them first: {cure}"):
        open_checkpoint(tmp_path / "distill")
    (tmp_path / "distill" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"compressed shards.*; decompress them first: {cure}"):
        open_checkpoint(tmp_path / "distill")
    one = shards[0].with_name(shards[0].name + ".zst")
    with pytest.raises(ValueError, match=re.escape(f"decompress it first: zstd -d {one}")):
        open_checkpoint(one)


MAP = '{"weight_map": %s}'


@pytest.mark.parametrize("index", ["", "[]", MAP % "[]", MAP % '{"a": 1}', MAP % '{"a": [2]}', "\udcff"])
def test_a_broken_index_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json is not an index of shards .*; download it again"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/part.safetensors", "", "/etc/passwd"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    index = json.dumps({"weight_map": {"a": name}})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json names shards outside its folder"):
        open_weights(tmp_path)


def test_a_folder_of_several_files_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no checkpoint file; name the file"):
        open_weights(tmp_path)
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"found a\.safetensors, b\.safetensors; name the file"):
        open_weights(tmp_path)


@pytest.mark.parametrize("value", [[1], {"epoch": 3}, {"state_dict": {}}, {0: torch.ones(1)}, torch.ones(2)])
def test_a_pickle_without_named_tensors_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no dictionary of tensors; give a \.safetensors"):
        open_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused_wherever_the_damage_is(tmp_path: Path, zipped: bool) -> None:
    """Every outcome is a file that can be read, or one sentence that names it; the damage is seeded."""
    path, generator = tmp_path / "x.pth", torch.Generator().manual_seed(0)
    torch.save({"a": torch.ones(3, 4), "b": torch.zeros(5)}, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place, value in torch.randint(0, 1 << 30, (3, 2), generator=generator).tolist():
            damaged[place % len(whole)] = value % 256
        path.write_bytes(damaged)
        try:
            open_weights(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 20


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable, tuple[Path]]:
            return Path.touch, (tmp_path / "attacked",)

    pickle.loads(pickle.dumps(Attack()))
    assert (tmp_path / "attacked").exists(), "the attack must work for this test to mean something"
    (tmp_path / "attacked").unlink()
    for name, write in (("plain.pth", pickle.dump), ("torch.ckpt", torch.save)):
        with (tmp_path / name).open("wb") as stream:
            write({"encoder": torch.ones(1), "attack": Attack()}, stream)
        with pytest.raises(ValueError, match=r"was not loaded, for it can run code"):
            open_weights(tmp_path / name)
        assert not (tmp_path / "attacked").exists()


# Strictness


def test_names_and_shapes_that_do_not_fit_are_counted_and_the_first_are_named(
    tmp_path: Path, weights: Weights
) -> None:
    state = weights("text_encoder")
    total, gone = len(state), [name for name in state if ".mlp." in name][:4]
    state = {name: tensor for name, tensor in state.items() if name not in gone}
    state |= {"layers.9.extra": torch.ones(1), "norm.weight": torch.ones(2, 3)}
    save_file(state, tmp_path / "x.safetensors", header(PONY.text_encoder))
    opened = open_checkpoint(tmp_path / "x.safetensors")
    for refused in (
        lambda: load(opened, torch.float32),
        lambda: check_names(opened, opened.build().state_dict()),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        message = str(error.value)
        assert f"x.safetensors does not fit the text encoder: of {total} tensors" in message
        assert re.search(r"4 missing \((layers\.\d\.mlp\.\w+\.weight, ){3}\.\.\.\)", message)
        assert "1 unknown (layers.9.extra)" in message
        width = PONY.text_encoder.hidden_size
        assert f"1 of another shape (norm.weight [2, 3] instead of [{width}])" in message
    assert describe(tmp_path / "x.safetensors").endswith(message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", list(FILES))
def test_a_single_bad_value_is_found_and_its_tensor_and_part_are_named(
    tmp_path: Path, pony_folder: Path, name: str, value: float
) -> None:
    source, path = pony_folder / FILES[name], tmp_path / "x.safetensors"
    state = load_file(source)
    victim = sorted(state)[len(state) // 2]
    state[victim].view(-1)[-1] = value
    save_file(state, path, safe_open(source, "pt").metadata())
    opened = open_checkpoint(path)
    own = next(ours for ours, theirs in opened.names.items() if theirs == victim)
    what = name.replace("_", " ") if name not in VARIANTS else f"{name} transformer"
    with pytest.raises(ValueError, match=rf"x\.safetensors: {re.escape(own)} of the {what} holds NaN"):
        load(opened, torch.bfloat16)


BAD_CONFIGS = {
    "not JSON": "{",
    "another kind": "[1]",
    "a number": "3",
    "a field missing": {"hidden_size": None},
    "a field too many": {"dropout": 0.1},
    "a text for a number": {"num_hidden_layers": "two"},
    "a number for a list": {"dim_mult": 4},
    "a truth for a number": {"num_hidden_layers": True},
}


@pytest.mark.parametrize("case", list(BAD_CONFIGS))
def test_a_configuration_that_cannot_be_used_is_refused_when_the_file_is_opened(
    tmp_path: Path, weights: Weights, case: str
) -> None:
    change = BAD_CONFIGS[case]
    part = "video_vae" if "dim_mult" in change else "text_encoder"
    config = getattr(PONY, part).to_dict()
    if not isinstance(change, str):
        config = {name: value for name, value in (config | change).items() if value is not None}
        change = json.dumps(config)
    save_file(weights(part), tmp_path / "x.safetensors", {"config": change})
    with pytest.raises(ValueError, match=r"x\.safetensors: its configuration cannot be used: .*; correct"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("part", "change"),
    [("video_decoder", {"decoder_layers_per_block": (2, 2)}), ("text_encoder", {"hidden_size": -1})],
)
def test_a_configuration_that_contradicts_itself_is_refused_when_it_is_built(
    tmp_path: Path, weights: Weights, part: str, change: dict[str, object]
) -> None:
    config = dataclasses.replace(getattr(PONY, part), **change)
    save_file(weights(part), tmp_path / "x.safetensors", header(config))
    with pytest.raises(ValueError, match=r"x\.safetensors: no .* can be built from its configuration \("):
        load(open_checkpoint(tmp_path / "x.safetensors"), torch.float32)


@pytest.mark.parametrize(
    ("name", "file"), [("audio_vae", "model_config.json"), ("video_decoder", "TurboV3-Wan22-Tiny.json")]
)
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', '{"decoder_causal": true}'])
def test_a_published_configuration_that_cannot_be_used_is_named(
    tmp_path: Path, weights: Weights, name: str, file: str, text: str
) -> None:
    save_file(weights(name), tmp_path / "model.safetensors")
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(file)}: its config.* cannot be used: .*; correct"):
        open_checkpoint(tmp_path)


# The pony and the published model


@pytest.mark.parametrize("name", list(FILES))
def test_every_part_of_the_pony_is_found_loads_and_is_described(pony_folder: Path, name: str) -> None:
    path = catalog.find(name, pony_folder)
    part = "transformer" if name in VARIANTS else name
    opened = open_checkpoint(path, part, name if name in VARIANTS else None)
    assert opened.config == (PONY.transformers[name] if name in VARIANTS else getattr(PONY, name))
    module = load(opened, torch.bfloat16)
    assert type(module) is NETWORKS[part]
    count = sum(tensor.numel() for tensor in module.state_dict().values())
    assert opened.parameters == count and len(module.state_dict()) == len(opened.names)
    dtypes = "BF16" if name == "base" else "BF16, F32" if name in VARIANTS else "F16"
    size = f"{count:,} parameters in {len(opened.names)} tensors"
    assert describe(path) == f"{path}: {opened.label}, {dtypes}, {size}, complete"
    assert opened.label == (f"{name} transformer" if name in VARIANTS else name.replace("_", " "))


def test_the_ponys_tokenizer_belongs_to_its_text_encoder(pony_folder: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(catalog.find("text_encoder", pony_folder)))
    tokens, offsets = tokenizer.encode("a red circle bounces slow .")
    assert len(tokens) == len(offsets) and max(tokens) < tokenizer.vocab_size == PONY.text_encoder.vocab_size


def test_a_part_that_is_not_there_is_said_with_its_source(tmp_path: Path) -> None:
    for part in FILES:
        with pytest.raises(FileNotFoundError, match=rf"no {part.replace('_', ' ')} in .*; get it from \w+"):
            catalog.find(part, tmp_path)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("distill", "distill-merger_bf16.safetensors"),
        ("540p_sr", "540p_sr_merge_bf16.safetensors"),
        ("1080p_sr", "1080p_sr_merge_bf16.safetensors"),
        ("base", "base/"),
        ("text_encoder", "t5gemma-9b-9b-ul2/"),
        ("video_vae", "Wan2.2_VAE.pth"),
        ("video_vae", "wan2.2_vae.safetensors"),
        ("video_decoder", "turbo_vae/"),
        ("audio_vae", "stable-audio-open-1.0/"),
        ("audio_vae", "sd_audio.safetensors"),
    ],
)
def test_published_names_are_found_in_the_folder_of_models(tmp_path: Path, part: str, name: str) -> None:
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert catalog.find(part, tmp_path) == path


def tree(config: Config, network: type[nn.Module]) -> tuple[dict[str, int], dict[str, type]]:
    """Parameters with their number of axes, and modules with their classes; layers are not told apart."""
    with torch.device("meta"):
        module = network(config)

    def name_of(name: str) -> str:
        return re.sub(r"\blayers\.\d+", "layers.N", name)

    tensors = {name_of(name): tensor.ndim for name, tensor in module.state_dict().items()}
    return tensors, {name_of(name): type(child) for name, child in module.named_modules()}


def test_the_pony_differs_from_the_published_model_in_numbers_only() -> None:
    assert PONY.transformers.keys() == MAGIHUMAN.transformers.keys() == set(VARIANTS)
    assert PONY.sizes.keys() == MAGIHUMAN.sizes.keys()
    pairs = {
        **{v: (PONY.transformers[v], MAGIHUMAN.transformers[v], NETWORKS["transformer"]) for v in VARIANTS},
        **{part: (getattr(PONY, part), getattr(MAGIHUMAN, part), network)
           for part, network in NETWORKS.items() if part != "transformer"},
    }  # fmt: skip
    for name, (small, full, network) in pairs.items():
        assert type(small) is type(full), name
        if name == "video_vae":
            full = dataclasses.replace(full, num_res_blocks=small.num_res_blocks)
        assert tree(small, network) == tree(full, network), name
        for field in dataclasses.fields(full):  # what is no size is the same
            if field.type in (str, bool):
                assert getattr(small, field.name) == getattr(full, field.name), (name, field.name)


def layer_kinds(variant: str, config: SimpleNamespace) -> dict[str, set[bool]]:
    values = config.transformers[variant]
    fields = ("mm_layers", "gelu7_layers", "local_attn_layers")
    return {field: {i in getattr(values, field) for i in range(values.num_layers)} for field in fields}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pony_has_every_kind_of_layer_that_the_published_model_has(variant: str) -> None:
    kinds, published = (layer_kinds(variant, of) for of in (PONY, MAGIHUMAN))
    if "sr" in variant:  # a copy of weights for each modality would not fit beside the width; base has them
        published["mm_layers"] = {False}
    assert kinds == published


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pony_is_as_wide_as_a_token(variant: str) -> None:
    config = PONY.transformers[variant]  # else it could not tell all of its noise
    assert config.hidden_size >= config.video_in_channels


def test_names_of_the_key_maps_are_names_of_the_networks() -> None:
    for part, keys in KEY_MAPS.items():
        config = MAGIHUMAN.transformers["base"] if part == "transformer" else getattr(MAGIHUMAN, part)
        with torch.device("meta"):
            names = NETWORKS[part](config).state_dict()
        assert {keys.own_prefix + keys.signature, *keys.optional} <= names.keys()


# Writing


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors = tmp_path / "latents.safetensors", {"video": torch.randn(2, 3).t(), "audio": torch.ones(4)}
    write_tensors(path, tensors)
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items())
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match=r"could not be written: no space left on device.*latents\.safetensors"):
        write_tensors(path, {"video": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_text_encoder_is_described_with_what_it_lacks(pony_folder: Path, tmp_path: Path) -> None:
    assert describe(pony_folder / "text_encoder").endswith("complete")
    file = tmp_path / "encoder.safetensors"
    file.write_bytes((pony_folder / "text_encoder" / "model.safetensors").read_bytes())
    assert "complete, but without a tokenizer: " in describe(file)
