"""Bad input on the command line: exit code 2, one sentence on what is wrong, and nothing left behind."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import disk_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from happyhorse import cli
from happyhorse.media import FILM_RATE, FilmWriter
from happyhorse.sampler import pipeline, plan

State = dict[str, Tensor]
Header = dict[str, str]
Edit = Callable[[State, Header], object]
Make = Callable[["Packer", str], Path]  # (pack, option) -> the file to give for that option

SMALL = ("--size", "64x64", "--seconds", "0.2", "--steps", "1", "--device", "cpu")
PROGRESS = re.compile(
    r"(loading the [\w ]+|text|image|audio|sampling|super-resolution|sound|decoding): +\d+%.*"
)
LONGEST = 450  # characters; the folder of the test's files counts as one


@dataclass(frozen=True)
class Outcome:
    """What a command did; `out` is the folder that it was to write into."""

    code: int
    stderr: str
    out: Path

    def assert_refused(self, *words: str, after: str | None = None) -> None:
        """Refused in one sentence that holds `words`, before any work or `after` a stage that did some."""
        assert self.code == 2, self.stderr
        lines = [line.strip() for line in re.split(r"[\r\n]", self.stderr) if line.strip()]
        bars = [line for line in lines if PROGRESS.fullmatch(line)]
        stages = [bar.partition(":")[0] for bar in bars if not re.match(r"loading|.*:   0%", bar)]
        sentences = [line for line in lines if not PROGRESS.fullmatch(line)]
        assert len(sentences) == 1, self.stderr
        sentence = sentences[0].replace(str(self.out.parent), "FOLDER")
        assert re.match(r"happyhorse( generate)?: \S", sentence)
        assert [word for word in words if word not in sentence] == [], sentence
        assert len(sentence) < LONGEST and not re.search(r"\wError\b|Traceback", self.stderr), sentence
        assert (stages[-1] if stages else None) == after, f"stopped after {stages}"
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        assert list(self.out.iterdir()) == []


Generate = Callable[..., Outcome]  # see the fixture `generate`


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def generate(pony_folder: Path, out: Path) -> Generate:
    """Run `happyhorse generate` here; an exception that is not caught there fails the test."""

    def run(
        *options: object, prompt: str | None = "a red circle", models: Path | None = pony_folder
    ) -> Outcome:
        words = [] if prompt is None else ["--prompt", prompt]
        words += [] if models is None else ["--models", str(models)]
        fixed = ["generate", "--preset", "pony", "--out", str(out / "film.mp4"), *SMALL]
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = cli.main([*fixed, *words, *map(str, options)])
            except SystemExit as stop:  # the parser's way
                code = stop.code
        return Outcome(code, stderr.getvalue(), out)

    return run


def test_these_films_are_made_when_nothing_is_wrong(generate: Generate) -> None:
    outcome = generate()
    assert outcome.code == 0 and [path.name for path in outcome.out.iterdir()] == ["film.mp4"]


# Options

OPTIONS = {
    "size between the steps": (["--size", "100x70"], ["multiples of 32", "got 100x70", "nearest is 96x64"]),
    "size of nothing": (["--size", "0x0"], ["multiples of 32", "got 0x0", "nearest is 32x32"]),
    "size garbage": (["--size", "big"], ["--size", "like 448x256", "'big'"]),
    "size of one side": (["--size", "448"], ["--size", "like 448x256", "'448'"]),
    "size negative": (["--size=-64x64"], ["--size", "like 448x256", "'-64x64'"]),
    "size beyond memory": (["--size", "320000x320000"], ["this film needs about", "GB are free"]),
    "size and aspect": (["--aspect", "1:1"], ["--aspect", "--size"]),
    "seconds too few": (["--seconds", "0.16"], ["seconds must be from 0.2 to 30", "got 0.16"]),
    "seconds too many": (["--seconds", "30.04"], ["seconds must be from 0.2 to 30", "got 30.04"]),
    "seconds negative": (["--seconds", "-1"], ["seconds must be from 0.2 to 30", "got -1"]),
    "seconds NaN": (["--seconds", "nan"], ["seconds must be from 0.2 to 30", "got nan"]),
    "seconds infinite": (["--seconds", "inf"], ["seconds must be from 0.2 to 30", "got inf"]),
    "seconds off the grid": (["--seconds", "1.03"], ["multiple of 0.04", "got 1.03", "1 and 1.04"]),
    "seconds text": (["--seconds", "long"], ["--seconds", "float", "'long'"]),
    "steps none": (["--steps", "0"], ["--steps", "whole number from 1 to 1000", "'0'"]),
    "steps negative": (["--steps", "-3"], ["--steps", "whole number from 1 to 1000", "'-3'"]),
    "steps text": (["--steps", "few"], ["--steps", "whole number from 1 to 1000", "'few'"]),
    "steps broken": (["--steps", "1.5"], ["--steps", "whole number from 1 to 1000", "'1.5'"]),
    "steps too many": (["--steps", "1001"], ["--steps", "whole number from 1 to 1000", "'1001'"]),
    "seed negative": (["--seed", "-1"], ["--seed", "whole number from 0 to", "'-1'"]),
    "seed text": (["--seed", "lucky"], ["--seed", "whole number from 0 to", "'lucky'"]),
    "seed too large": (["--seed", str(2**63)], ["--seed", "whole number from 0 to", str(2**63)]),
    "variant unknown": (["--variant", "turbo"], ["--variant", "'turbo'", "base", "distill"]),
    "super-resolution unknown": (["--sr", "4k"], ["--sr", "'4k'", "540p", "1080p"]),
    "decoder unknown": (["--decoder", "fast"], ["--decoder", "'fast'", "turbo", "wan"]),
    "device unknown": (["--device", "toaster"], ["--device", "'toaster' cannot be used here", "try cpu"]),
    "device without values": (["--device", "meta"], ["--device", "'meta' cannot be used here", "try cpu"]),
    "upscale odd": (["--upscale", "101x100"], ["--upscale", "even", "'101x100'"]),
    "upscale mode": (["--upscale", "64x64:magic"], ["--upscale", "bilinear, nearest, bicubic", "'magic'"]),
    "negative prompt blank": (["--negative", " "], ["--negative", "must be words", "' '"]),
    "option unknown": (["--loud"], ["--loud"]),
}


@pytest.mark.parametrize("case", list(OPTIONS))
def test_an_option_that_cannot_be_used_is_refused_at_once(generate: Generate, case: str) -> None:
    options, words = OPTIONS[case]
    generate(*options).assert_refused(*words)


def test_an_unknown_aspect_is_refused_with_those_there_are(generate: Generate) -> None:
    known = ["16:9", "9:16", "1:1", "4:3", "3:4", "21:9"]
    generate("--aspect", "2:1").assert_refused("--aspect", "'2:1'", *known)


@pytest.mark.parametrize("prompt", [None, "", "  \t\n", "half \ud83d a pair"])
def test_a_film_needs_a_prompt_of_words(generate: Generate, prompt: str | None) -> None:
    words = ["required", "--prompt"] if prompt is None else ["--prompt", "must be words", repr(prompt)]
    generate(prompt=prompt).assert_refused(*words)


# Images and sound


def picture(path: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "PNG")
    return path.read_bytes()


def sound(path: Path, samples: int = 8000) -> bytes:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9999, 9999, samples, dtype=np.int16).tobytes())
    return path.read_bytes()


def silent_film(path: Path) -> bytes:
    with FilmWriter(path, 64, 64, sound=False) as film:
        film.add_frames(torch.zeros(5, 64, 64, 3, dtype=torch.uint8))
    return path.read_bytes()


def film_without_end(path: Path) -> bytes:
    with FilmWriter(path, 64, 64) as film:
        film.add_audio(torch.randn(2, FILM_RATE) / 9)
        film.add_frames(torch.zeros(25, 64, 64, 3, dtype=torch.uint8))
    return path.read_bytes()[:-5000]


IMAGE_KINDS = "is not a readable image (damaged, or none of PNG, JPEG, WEBP, BMP, TIFF, GIF)"
NO_SOUND = "is damaged, or no sound or film that FFmpeg reads"
MEDIA = {
    "image missing": ("--image", "a.png", None, ["there is no such file", "a.png"]),
    "image empty": ("--image", "a.png", b"", ["a.png is empty"]),
    "image truncated": ("--image", "a.png", lambda path: picture(path)[:-2000], ["a.png " + IMAGE_KINDS]),
    "image cut early": ("--image", "a.png", lambda path: picture(path)[:20], ["a.png " + IMAGE_KINDS]),
    "image that is text": ("--image", "a.png", b"a picture of a horse\n", ["a.png " + IMAGE_KINDS]),
    "image that is sound": ("--image", "a.wav", sound, ["a.wav " + IMAGE_KINDS]),
    "image that is a folder": ("--image", ".", None, ["is not a file; give the path of one"]),
    "sound missing": ("--audio", "a.wav", None, ["there is no such file", "a.wav"]),
    "sound empty": ("--audio", "a.wav", b"", ["a.wav is empty"]),
    "sound truncated": ("--audio", "a.wav", lambda path: sound(path)[:-9000], ["a.wav is cut off"]),
    "sound cut in its header": ("--audio", "a.wav", lambda path: sound(path)[:30], [f"a.wav {NO_SOUND}"]),
    "sound that is text": ("--audio", "a.wav", b"neigh\n" * 99, [f"a.wav {NO_SOUND}"]),
    "sound that is an image": ("--audio", "a.png", picture, ["a.png has no sound track"]),
    "film without sound": ("--audio", "a.mp4", silent_film, ["a.mp4 has no sound track"]),
    "film truncated": ("--audio", "a.mp4", film_without_end, ["a.mp4 is "]),
}


@pytest.mark.parametrize("case", list(MEDIA))
def test_an_image_or_sound_that_cannot_be_used_is_refused_before_any_work(
    generate: Generate, tmp_path: Path, case: str
) -> None:
    option, name, content, words = MEDIA[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content(path))
    generate(option, path).assert_refused(*words)


# Checkpoints

# option -> the file of that part in the pony
PARTS = {
    "--model": "distill/model.safetensors",
    "--sr-model": "540p_sr/model.safetensors",
    "--text-encoder": "text_encoder/model.safetensors",
    "--vae": "wan22_vae.safetensors",
    "--turbo-vae": "turbo_vae/model.safetensors",
    "--audio-vae": "audio_vae/model.safetensors",
}
BANDS = "adapter.rope.bands"


class Packer:
    """Writes changed copies of the pony's files; a text encoder gets its tokenizer beside it."""

    def __init__(self, pony: Path, folder: Path) -> None:
        self.pony, self.folder = pony, folder

    def __call__(self, option: str, edit: Edit | None = None) -> Path:
        """The file that belongs to `option` after `edit(tensors, header)`."""
        source = self.pony / PARTS[option]
        state, header = load_file(source), safe_open(source, "pt").metadata()
        if edit:
            edit(state, header)
        path = self.folder / f"distill{option}.safetensors"
        save_file(state, path, header)
        tokenizer = (self.pony / "text_encoder" / "tokenizer.json").read_bytes()
        (self.folder / "tokenizer.json").write_bytes(tokenizer)
        return path


@pytest.fixture
def pack(pony_folder: Path, tmp_path: Path) -> Packer:
    folder = tmp_path / "packed"
    folder.mkdir()
    return Packer(pony_folder, folder)


def file(name: str, content: bytes) -> Make:
    """A file of this content."""

    def make(pack: Packer, option: str) -> Path:  # noqa: ARG001
        (pack.folder / name).write_bytes(content)
        return pack.folder / name

    return make


CUT = "distill.safetensors"


def cut(start: int, stop: int | None) -> Make:
    """A piece of the right file."""
    return lambda pack, option: file(CUT, pack(option).read_bytes()[start:stop])(pack, option)


def folder(pack: Packer, option: str) -> Path:  # noqa: ARG001
    return pack.folder


def other(name: str) -> Make:
    """Another file or folder of the pony."""
    return lambda pack, option: pack.pony / name  # noqa: ARG005


def changed(edit: Edit) -> Make:
    return lambda pack, option: pack(option, edit)


def with_header(name: str, value: str) -> Make:
    return changed(lambda state, header: header.update({name: value}))  # noqa: ARG005


def with_config(old: str, new: str) -> Make:
    """The right file with a text in its configuration replaced."""
    return changed(lambda state, header: header.update(config=header["config"].replace(old, new)))  # noqa: ARG005


def index(text: str, **shards: bytes) -> Make:
    """A folder with an index of shards, and these shards."""

    def make(pack: Packer, option: str) -> Path:  # noqa: ARG001
        (pack.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        for name, content in shards.items():
            (pack.folder / f"{name}.safetensors").write_bytes(content)
        return pack.folder

    return make


def only_the_first(state: State, header: Header) -> None:  # noqa: ARG001
    for name in sorted(state)[1:]:
        del state[name]


def only_a_lora(state: State, header: Header) -> None:  # noqa: ARG001
    state.clear()
    state["diffusion_model.block.layers.0.mlp.down_proj.lora_A.weight"] = torch.ones(2, 8)


def without_feed_forward(state: State, header: Header) -> None:  # noqa: ARG001
    for name in [name for name in state if ".mlp." in name]:
        del state[name]


def with_tensor(name: str, *shape: int, value: float = 1.0) -> Make:
    return changed(lambda state, header: state.update({name: torch.full(shape, value)}))  # noqa: ARG005


AGAIN = "download it again"
DAMAGED = ["distill.safetensors is damaged or not a safetensors file", AGAIN]
NO_PICKLE = ["vae.pth is damaged or not a torch file", AGAIN]
NO_INDEX = ["index.json is not an index of shards", AGAIN]
UNUSABLE = ["its configuration cannot be used", "correct it, or download the file again"]
ONE_SHARD = '{"weight_map": {"adapter.video_embedder.weight": "a.safetensors"}}'
CHECKPOINTS: dict[str, tuple[str, Make, list[str]]] = {
    "missing": ("--model", other("no.safetensors"), ["no.safetensors does not exist; give a"]),
    "empty": ("--model", cut(0, 0), DAMAGED),
    "truncated": ("--model", cut(0, -1), DAMAGED),
    "cut in its header": ("--model", cut(0, 99), DAMAGED),
    "without its beginning": ("--model", cut(9, None), DAMAGED),
    "text": ("--model", file(CUT, b"weights\n" * 9), DAMAGED),
    "another format": ("--model", file("a.onnx", b"ONNX"), ["a.onnx is not a checkpoint", "; give a .saf"]),
    "a Git LFS pointer": ("--model", file("distill.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
                          ["distill.safetensors only points to the real file", "git lfs pull"]),
    "a LoRA": ("--model", changed(only_a_lora), ["is a LoRA, not a checkpoint; give it to --lora"]),
    "half a GGUF": ("--model", file("a.gguf", b"GGUF"), ["a.gguf ends in the middle of its header"]),
    "a web page": ("--vae", file("vae.pth", b"<html>"), ["vae.pth holds more than tensors, or is damaged"]),
    "an empty pickle": ("--vae", file("vae.pth", b""), NO_PICKLE),
    "a broken zip": ("--vae", file("vae.pth", b"PK\3\4" * 99), NO_PICKLE),
    "another part": ("--model", other("audio_vae"), ["holds the audio vae; give the file", "transformer"]),
    "another VAE": ("--vae", other("turbo_vae"), ["holds the video decoder; give the file", "video vae"]),
    "another variant": ("--model", other("540p_sr"), ["'540p_sr' by its header, but 'distill' is asked for"]),
    "no variant of ours": ("--model", with_header("variant", "mini"),
                           ["must be one of base, distill, 540p_sr, 1080p_sr, got 'mini'"]),
    "tensors of no part": ("--audio-vae", changed(only_the_first),
                           ["1 tensors of no known part (pretransform.model.decoder", "audio vae"]),
    "an empty folder": ("--model", folder, ["found no checkpoint file; name the file"]),
    "keys missing": ("--model", changed(without_feed_forward),
                     ["does not fit the distill transformer", "18 missing (block.layers.0.mlp.", ", ...)"]),
    "keys unknown": ("--text-encoder", with_tensor("layers.7.x", 1),
                     ["does not fit the text encoder", "1 unknown (layers.7.x)"]),
    "keys misshapen": ("--turbo-vae", with_tensor("decoder.conv_out.conv.bias", 7),
                       ["does not fit the video decoder", "1 of another shape (decoder.conv_out.conv"]),
    "a shard missing": ("--model", index(ONE_SHARD), ["1 of its shards are missing (a.safetensors); down"]),
    "a shard empty": ("--model", index(ONE_SHARD, a=b""), ["a.safetensors is damaged", AGAIN]),
    "index not JSON": ("--model", index("{"), NO_INDEX),
    "index without shards": ("--model", index('{"metadata": {}}'), NO_INDEX),
    "index of nothing": ("--model", index('{"weight_map": {}}'), ["0 tensors of no known part"]),
    "config not JSON": ("--model", with_config("}", ""), UNUSABLE),
    "config of a list": ("--model", with_header("config", "[1]"),
                         [*UNUSABLE, "must be a JSON object, got '[1]'"]),
    "config incomplete": ("--vae", with_config('"dec_dim"', '"dim"'), [*UNUSABLE, "missing fields ['dec"]),
    "config too full": ("--vae", with_config("{", '{"x": 1, '), [*UNUSABLE, "unknown fields ['x']; acc"]),
    "config of text": ("--model", with_config('"hidden_size": 192', '"hidden_size": "192"'),
                       [*UNUSABLE, "hidden_size must be int, got"]),
    "config without layers": ("--model", with_config('"num_layers": 6', '"num_layers": 0'),
                              [*UNUSABLE, "are named but there are only 0"]),
    "config too short": ("--turbo-vae", with_config("[2, 2, 2, 3, 3]", "[2, 2]"),
                         ["no video decoder can be built from its configuration", "correct it, or download"]),
    "config of another size": ("--model", with_config('"hidden_size": 192', '"hidden_size": 160'),
                               ["does not fit the distill transformer", "of another shape (adapter."]),
    "NaN in the transformer": ("--model", with_tensor("final_norm_audio.weight", 192, value=float("nan")),
                               ["final_norm_audio.weight of the distill transformer holds NaN", AGAIN]),
    "infinity in the text encoder": ("--text-encoder", with_tensor("norm.weight", 96, value=float("inf")),
                                     ["norm.weight of the text encoder holds NaN or infinite", AGAIN]),
}  # fmt: skip
LATE = {"NaN in the transformer": "text"}  # values are looked at when a part is loaded


@pytest.mark.parametrize("case", list(CHECKPOINTS))
def test_a_checkpoint_that_cannot_be_used_is_refused(
    generate: Generate, tmp_path: Path, pack: Packer, case: str
) -> None:
    option, make, words = CHECKPOINTS[case]
    picture(tmp_path / "a.png")
    image = ["--image", tmp_path / "a.png"] if option == "--vae" else []
    generate(option, make(pack, option), *image).assert_refused(*words, after=LATE.get(case))


def test_parts_that_are_not_there_are_named_with_their_source(generate: Generate, tmp_path: Path) -> None:
    generate(models=tmp_path).assert_refused("no text encoder in FOLDER", "t5gemma-9b-9b-ul2", "get it from")


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(generate: Generate, tmp_path: Path, pack: Packer) -> None:
    mark = tmp_path / "attacked"
    for name, dump in (("plain.pth", pickle.dump), ("torch.ckpt", torch.save)):
        with (pack.folder / name).open("wb") as stream:
            dump({"ema_state_dict": {}, "attack": Attack(mark)}, stream)
        outcome = generate("--turbo-vae", pack.folder / name)
        outcome.assert_refused(f"{name} holds more than tensors", "not loaded", "can run code", "safetensors")
        assert not mark.exists()
    pickle.loads((pack.folder / "plain.pth").read_bytes())
    assert mark.exists(), "the attack must work for this test to mean something"


NOT_ONE = ["tokenizer.json is not a tokenizer.json", "give the one of the text encoder"]
TOKENIZERS = {
    "missing": (None, ["tokenizer.json does not exist", "put the tokenizer.json of google/t5gemma"]),
    "empty": (b"", NOT_ONE),
    "of another format": (b'{"model": 1}', NOT_ONE),
    "not text": (b"\xff\xfe\x00", ["cannot read the tokenizer", "give the tokenizer.json of the text"]),
}


@pytest.mark.parametrize("case", list(TOKENIZERS))
def test_a_tokenizer_that_cannot_be_used_is_refused(generate: Generate, pack: Packer, case: str) -> None:
    content, words = TOKENIZERS[case]
    path = pack("--text-encoder")
    tokenizer = path.with_name("tokenizer.json")
    tokenizer.unlink() if content is None else tokenizer.write_bytes(content)
    generate("--text-encoder", path).assert_refused(*words)


def test_the_tokenizer_of_a_larger_model_is_refused(generate: Generate, pack: Packer) -> None:
    path = pack("--text-encoder")
    tokenizer = json.loads(path.with_name("tokenizer.json").read_bytes())
    tokenizer["model"]["vocab"]["horse"] = 4711
    path.with_name("tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    words = "the tokenizer has 4712 tokens, the text encoder 512; give the tokenizer.json of this encoder"
    generate("--text-encoder", path).assert_refused(words)


# Numbers that overflow

BAD = "values are NaN or infinite; check the weights"
FIRST_LAYER = "pretransform.model.{}.layers.0.weight_g"
# a tensor that gets finite values too large to compute with; what is told, and the last stage shown
OVERFLOWS = {
    "text": ("--text-encoder", "norm.weight", [], ["encoding the prompt", "NaN or infinite"], None),
    "image": ("--vae", "encoder.head.2.bias", ["--image", "a.png"],
              ["encoding the image", f"image {BAD}"], "text"),
    "audio": ("--audio-vae", FIRST_LAYER.format("encoder"), ["--audio", "a.wav"],
              ["encoding the audio", f"audio {BAD}"], "text"),
    "video": ("--model", "final_linear_video.weight", [], ["sampling, step 1 of 1", f"video {BAD}"], "text"),
    "sound latents": ("--model", "final_linear_audio.weight", ["--steps", "2"],
                      ["sampling, step 1 of 2", f"audio {BAD}"], "text"),
    "super-resolution": ("--sr-model", "final_linear_video.weight", ["--sr", "540p"],
                         ["super-resolution, step 1 of 5", f"video {BAD}"], "sampling"),
    "sound": ("--audio-vae", FIRST_LAYER.format("decoder"), [],
              ["decoding the sound", f"sound {BAD}"], "sampling"),
    "picture": ("--turbo-vae", "decoder.conv_out.conv.weight", [],
                ["decoding the picture", f"pixel {BAD}"], "sound"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(OVERFLOWS))
def test_numbers_that_overflow_stop_the_film_and_the_stage_is_named(
    generate: Generate, tmp_path: Path, pack: Packer, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    option, tensor, options, words, stage = OVERFLOWS[case]
    picture(tmp_path / "a.png")
    sound(tmp_path / "a.wav", samples=1920)  # as long as the film, else there is a notice about it

    def fill(state: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        state[tensor] = torch.full_like(state[tensor], 3e38, dtype=torch.float32)

    path = pack(option, fill)
    monkeypatch.chdir(tmp_path)
    generate(option, path, *options).assert_refused(*words, after=stage)


# Outputs


OUTPUTS = {
    "no such folder": (
        ["--out", "FOLDER/absent/film.mp4"],
        ["--out: the folder FOLDER/absent does not exist; create it"],
    ),
    "a folder": (
        ["--out", "FOLDER/taken.mp4"],
        ["--out: FOLDER/taken.mp4 is a folder; give the name of a file"],
    ),
    "a file for a folder": (["--out", "FOLDER/file/film.mp4"], ["file does not exist; create it or"]),
    "another ending": (["--out", "FOLDER/film.avi"], ["--out must end in .mp4, got 'film.avi'"]),
    "no ending": (["--out", "FOLDER/film"], ["must end in .mp4", "got 'film'"]),
    "a name too long": (["--out", f"FOLDER/{'y' * 300}.mp4"], ["name too long", "yyy.mp4"]),
    "latents of another ending": (
        ["--save-latents", "FOLDER/a.pt"],
        ["--save-latents must end in .safetensors, got 'a.pt'"],
    ),
    "latents in no folder": (
        ["--save-latents", "FOLDER/absent/a.safetensors"],
        ["--save-latents: the folder FOLDER/absent does not"],
    ),
    "a graph of another ending": (["--save-workflow", "FOLDER/a.txt"], ["--save-workflow must end in .json"]),
}


@pytest.mark.parametrize("case", list(OUTPUTS))
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    generate: Generate, tmp_path: Path, case: str
) -> None:
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    options, words = OUTPUTS[case]
    generate(*(option.replace("FOLDER", str(tmp_path)) for option in options)).assert_refused(*words)
    assert sorted(tmp_path.rglob("*")) == before


INPUTS = {
    "the sound": (["--audio", "GIVEN/film.mp4", "--out", "GIVEN/film.mp4"], "film.mp4 is the source itself"),
    "the model": (
        ["--model", "GIVEN/distill/model.safetensors", "--save-latents", "GIVEN/distill/model.safetensors"],
        "model.safetensors is the source itself",
    ),
    "a file beside its weights": (
        ["--model", "GIVEN/distill", "--save-latents", "GIVEN/distill/latents.safetensors"],
        "latents.safetensors lies in the source folder",
    ),
}


@pytest.mark.parametrize("case", list(INPUTS))
def test_what_a_film_is_made_of_is_never_replaced(
    generate: Generate, tmp_path: Path, pony_folder: Path, case: str
) -> None:
    shutil.copytree(pony_folder / "distill", tmp_path / "distill")
    assert generate("--out", tmp_path / "film.mp4").code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options, words = INPUTS[case]
    generate(*(option.replace("GIVEN", str(tmp_path)) for option in options)).assert_refused(words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_options_that_change_nothing_are_told(
    generate: Generate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent = tmp_path / "absent"
    outcome = generate("--negative", "x", "--sr-model", absent, "--vae", absent, "--audio-mode", "start")
    assert outcome.code == 0
    for words in (
        "--negative changes nothing: distill never sees it",
        "--sr-model changes nothing: --sr is not given",
        "--vae changes nothing: neither --image nor --decoder wan is given",
        "--audio-mode changes nothing: --audio is not given",
    ):
        assert words in caplog.text
    caplog.clear()
    assert generate("--variant", "base", "--negative", "x").code == 0
    assert "changes nothing" not in caplog.text


@pytest.mark.parametrize("num_bytes", [0, 2000])
def test_a_disk_that_is_full_is_told_and_no_half_film_stays(generate: Generate, num_bytes: int) -> None:
    with disk_of(num_bytes):
        outcome = generate()
    last = {0: "sound", 2000: "decoding"}[num_bytes]
    outcome.assert_refused("the film could not be written: file too large: FOLDER/out/film.mp4", after=last)


def test_latents_that_do_not_fit_on_the_disk_are_told(generate: Generate, out: Path) -> None:
    with disk_of(2000):
        outcome = generate("--save-latents", out / "film.safetensors")
    words = "the file could not be written: file too large (it needs", "FOLDER/out/film.safetensors"
    outcome.assert_refused(*words, after="sampling")


def test_miniature_models_that_do_not_fit_on_the_disk_are_told(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with disk_of(2000):
        outcome = generate(models=None)
    outcome.assert_refused("the pony cannot be written to FOLDER/cache/happyhorse (", "set XDG_CACHE")
    assert list((cache / "happyhorse").iterdir()) == []


# Memory

# options of a film, those of a smaller one, and how that one is called
SMALLER = {
    "a shorter film": (
        ["--size", "512x512", "--seconds", "2"],
        ["--size", "512x512", "--seconds", "1"],
        "--seconds 1",
    ),
    "a smaller picture": (["--size", "512x512"], ["--size", "96x96"], "--size 96x96"),
    "a smaller film": (["--size", "512x512", "--sr", "540p"], ["--size", "512x512"], "the film without --sr"),
    "another placement": (["--offload", "none"], ["--offload", "stage"], "--offload stage ("),
}


@pytest.mark.parametrize("case", list(SMALLER))
def test_a_film_that_does_not_fit_is_refused_with_one_that_would(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    options, smaller, cure = SMALLER[case]

    def gigabytes(*options: str) -> float:
        """What this film needs, by its own account."""
        monkeypatch.setattr(plan, "free_memory", lambda device: 0)  # noqa: ARG005
        outcome = generate(*options)
        outcome.assert_refused("this film needs about", "0.00 GB are free; nothing smaller would fit")
        return float(re.search(r"needs about ([\d.]+) GB on cpu", outcome.stderr)[1])

    free = (gigabytes(*options) + gigabytes(*smaller)) / 2
    monkeypatch.setattr(plan, "free_memory", lambda device: round(free * 1e9))  # noqa: ARG005
    generate(*options).assert_refused("this film needs about", f"what would fit: {cure}")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "generate", stop)
    assert generate(*smaller).code == 130, "this one is begun"


# Interruption, and real processes


def command(pony: Path, *options: str) -> list[str]:
    fixed = ["--preset", "pony", "--models", str(pony), "--device", "cpu", "--prompt", "a", "--out", "a.mp4"]
    return [sys.executable, "-m", "happyhorse", "generate", *fixed, *options]


@pytest.mark.parametrize("case", ["size", "pickle"])
def test_a_real_process_says_one_sentence_too(
    pony_folder: Path, out: Path, tmp_path: Path, case: str
) -> None:
    """Here warnings of libraries would be seen."""
    (tmp_path / "vae.pth").write_bytes(pickle.dumps({"attack": Attack(tmp_path / "attacked")}))
    options, words = {
        "size": (["--size", "100x70"], ["got 100x70"]),
        "pickle": (["--turbo-vae", str(tmp_path / "vae.pth")], ["vae.pth holds more than tensors"]),
    }[case]
    done = subprocess.run(command(pony_folder, *options), cwd=out, capture_output=True, text=True, timeout=60)
    Outcome(done.returncode, done.stderr, out).assert_refused(*words)
    assert not done.stdout and done.stderr.count("\n") == 1 and not (tmp_path / "attacked").exists()


def test_a_console_without_the_letters_of_a_name_is_no_failure(pony_folder: Path, out: Path) -> None:
    options = ["--size", "32x32", "--seconds", "0.2", "--steps", "1", "--out", "\u9a6c.mp4"]
    done = subprocess.run(
        command(pony_folder, *options), cwd=out, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert done.returncode == 0 and b"\\u9a6c.mp4" in done.stdout and (out / "\u9a6c.mp4").exists()


def test_ctrl_c_ends_a_film_within_two_seconds_and_leaves_nothing(pony_folder: Path, out: Path) -> None:
    options = ["--variant", "base", "--steps", "200", "--seconds", "4"]
    with subprocess.Popen(command(pony_folder, *options), cwd=out, stderr=subprocess.PIPE) as process:
        try:
            seen = b""
            while not re.search(rb"sampling: +[1-9]", seen):
                seen += process.stderr.read1() or pytest.fail(f"ended early: {seen.decode()}")
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            code = process.wait(timeout=30)
            seconds = time.monotonic() - start
            seen += process.stderr.read()
        finally:
            process.kill()
    assert code == 130 and seconds < 2, (code, seconds)
    assert seen.decode().splitlines()[-1] == "happyhorse: interrupted; no film was written"
    assert b"Traceback" not in seen
    assert list(out.iterdir()) == []


def test_ctrl_c_while_the_film_is_written_leaves_nothing(
    generate: Generate, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(chunk: Tensor) -> None:  # noqa: ARG001
        assert list(out.glob(".*")), "the unfinished film must be there for this test to mean something"
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "frames_to_uint8", interrupt)
    outcome = generate()
    assert outcome.code == 130 and "interrupted; no film was written" in outcome.stderr
    outcome.assert_nothing_left()
