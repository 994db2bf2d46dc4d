"""The example graphs, each described once: for the published models, and as a pony twin without files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from happyhorse.model.catalog import SOURCES
from happyhorse.sampler.guidance import DEFAULT_NEGATIVE_PROMPT

Json = dict[str, Any]
Link = list[Any]  # [node id, output]

# What is said in the example films. A body has 150 to 200 words, in quotation marks what is spoken.

TALK = (
    "A young woman with short dark hair and a mustard-yellow coat stands in front of a softly lit café "
    "window in the early morning. Her shoulders face the camera and her posture is relaxed, one hand "
    "resting on the collar of her coat. At first she looks slightly to the side with calm eyes, her lips "
    "closed, and breathes in. Then her gaze returns to the lens, her eyebrows lift a little, and a warm "
    'smile spreads slowly across her face. She says in a soft, clear voice with a gentle lilt, "{line}" '
    "Her mouth forms every syllable precisely, her chin dips on the last word, and her eyes narrow with "
    "quiet amusement. After speaking she keeps smiling, blinks once and tilts her head a few degrees. Warm "
    "light from the window falls on her left cheek and leaves the other side in mild shadow; the "
    "background is out of focus in amber and grey. {style}"
)
REALISTIC = (
    "The picture is a realistic medium close-up at eye level with a static camera, natural skin texture and "
    "shallow depth of field."
)
PAINTED = (
    "The picture is a hand-painted watercolour animation with visible brush strokes and paper grain, a "
    "medium close-up at eye level with a static camera."
)
DRAWING = (
    "A child's drawing in flat, bright colours comes to life. A girl with big yellow hair in two wide "
    "tufts, round blue eyes and a plain pink dress stands on a green hill under a clear blue sky with two "
    "white clouds. Her arms are stretched out to both sides. At first she only smiles at the viewer with "
    "her mouth closed and her eyes open. Then she blinks twice, lifts her eyebrows and opens her mouth. "
    'She says in a high, cheerful voice, full of wonder, "{line}" Her small black mouth opens and closes '
    "with every syllable, her eyes shine, and her hands tremble a little with joy. The tufts of her hair "
    "sway gently as if a light breeze went through them. After the last word she closes her mouth, smiles "
    "more broadly than before and tilts her head to one side. The clouds stay where they are. The colours "
    "remain flat and even, without shadows, and the outlines keep their uneven, hand-drawn look. The "
    "camera is static and shows the whole figure from the front."
)


@dataclass(frozen=True)
class Words:
    """The three parts of a prompt."""

    body: str
    dialogue: str = ""
    background_sound: str = ""


def talk(line: str, style: str = REALISTIC) -> Words:
    """The woman at the window says `line`."""
    speaker = "Young woman in yellow coat"
    return Words(TALK.format(line=line, style=style), f"{speaker}, English: {line}", "Quiet murmur of a café")


def drawing(line: str) -> Words:
    """The girl of the picture that comes with ComfyUI says `line`."""
    return Words(DRAWING.format(line=line), f"Cheerful girl with yellow hair, English: {line}")


MORNING = talk("Good morning. I saved you a seat.")
PONY_WORDS = Words("a red circle bounces slow on a teal background .")


# What a graph is made of


@dataclass
class Node:
    """A node of the API format, and where it stands: the title of its group."""

    kind: str
    inputs: Json
    group: str
    title: str | None = None


@dataclass
class Graph:
    """A film's graph. `pony` takes the built-in miniatures, small sizes and sources that need no file."""

    name: str
    pony: bool
    words: Words
    nodes: list[Node] = field(default_factory=list)

    def add(self, group: str, kind: str, title: str | None = None, **inputs: Any) -> "Output":
        """Add a node; an `Output` as an input is a link. Dots in input names are written as `__`."""
        self.nodes.append(Node(kind, {k.replace("__", "."): v for k, v in inputs.items()}, group, title))
        return Output(len(self.nodes))

    def api(self) -> Json:
        """The graph in the host's API format."""
        return {
            str(number): {
                "class_type": node.kind,
                "inputs": {k: v.link if isinstance(v, Output) else v for k, v in node.inputs.items()},
            }
            | ({"_meta": {"title": node.title}} if node.title else {})
            for number, node in enumerate(self.nodes, 1)
        }

    # Sources

    def model(self, variant: str, title: str | None = None) -> "Output":
        choice = f"pony: {variant}" if self.pony else variant
        inputs = {"model": choice, "weight_dtype": "default", "variant": "auto"}
        return self.add(MODELS, "HappyHorseLoadModel", title, **inputs)

    def clip(self) -> "Output":
        choice = "pony" if self.pony else "t5gemma-9b-9b-ul2"
        inputs = {"text_encoder": choice, "weight_dtype": "default", "device": "default"}
        return self.add(MODELS, "HappyHorseLoadTextEncoder", **inputs)

    def wan(self, title: str | None = None) -> "Output":
        choice = "pony" if self.pony else "Wan2.2_VAE.pth"
        return self.add(MODELS, "HappyHorseLoadVideoVAE", title, vae=choice, weight_dtype="default")

    def turbo(self, title: str | None = None) -> "Output":
        choice = "pony: turbo" if self.pony else "turbo_vae"
        return self.add(MODELS, "HappyHorseLoadVideoVAE", title, vae=choice, weight_dtype="default")

    def audio_vae(self) -> "Output":
        choice = "pony" if self.pony else "stable-audio-open-1.0"
        return self.add(MODELS, "HappyHorseLoadAudioVAE", audio_vae=choice)

    def picture(self) -> "Output":
        if self.pony:
            blank = self.add(
                INPUTS, "EmptyImage", "A picture", width=160, height=96, batch_size=1, color=0x2080C0
            )
            return self.add(INPUTS, "ImageAddNoise", "with some grain", image=blank, seed=7, strength=0.2)
        return self.add(INPUTS, "LoadImage", "Your picture: the first frame", image="example.png")

    def sound(self, model: "Output", positive: "Output", vae: "Output", audio_vae: "Output") -> "Output":
        if not self.pony:
            return self.add(INPUTS, "LoadAudio", "Your sound: choose a file", audio="voice.wav")
        sizes = self.size() | {"seconds": self.seconds, "batch_size": 1}
        latent = self.add(FIRST, "HappyHorseEmptyLatent", "Size and length", **sizes)
        rest = {"seed": 7, "steps": 1, "denoise": 1.0}
        film = self.add(
            FIRST, "HappyHorseSampler", "One step", model=model, positive=positive, latent=latent, **rest
        )
        return self.add(FIRST, "HappyHorseDecode", "Its sound", latent=film, vae=vae, audio_vae=audio_vae).at(
            1
        )

    def film(self) -> "Output":
        if not self.pony:
            return self.add(INPUTS, "LoadVideo", "Your film: choose a file", file="film.mp4")
        blank = self.add(
            INPUTS, "EmptyImage", "25 frames", width=128, height=128, batch_size=25, color=0x2080C0
        )
        frames = self.add(INPUTS, "ImageAddNoise", "with some grain", image=blank, seed=7, strength=0.2)
        silence = self.add(INPUTS, "EmptyAudio", duration=1.0, sample_rate=44100, channels=2)
        return self.add(INPUTS, "CreateVideo", "A film", images=frames, audio=silence, fps=25.0)

    # The steps of a film

    def encode(self, clip: "Output") -> "Output":
        """The prompt in its three parts, encoded."""
        prompt = self.add(PROMPT, "HappyHorsePrompt", **vars(self.words))
        return self.add(PROMPT, "HappyHorseTextEncode", clip=clip, prompt=prompt)

    def size(self) -> Json:
        if self.pony:
            return {"aspect": "custom", "width": 128, "height": 128}
        return {"aspect": "16:9", "width": 448, "height": 256}

    @property
    def seconds(self) -> float:
        return 1.0 if self.pony else 5.0

    def empty(self) -> "Output":
        sizes = self.size() | {"seconds": self.seconds, "batch_size": 1}
        return self.add(LATENT, "HappyHorseEmptyLatent", "Size and length", **sizes)

    def sample(
        self, model: "Output", positive: "Output", latent: "Output", denoise: float = 1.0, **more: "Output"
    ) -> "Output":
        inputs = {"seed": 42, "steps": 0, "denoise": denoise} | more
        return self.add(SAMPLE, "HappyHorseSampler", model=model, positive=positive, latent=latent, **inputs)

    def save(
        self, latent: "Output", vae: "Output", audio_vae: "Output", audio: "Output | None" = None
    ) -> None:
        """Decode while saving."""
        given = {} if audio is None else {"audio": audio}
        film = self.add(SAVE, "HappyHorseDecodeVideo", latent=latent, vae=vae, audio_vae=audio_vae, **given)
        self.save_video(film)

    def save_video(self, film: "Output") -> None:
        inputs = {"filename_prefix": f"happyhorse/{self.name}", "format": "auto", "format.codec": "auto"}
        self.add(SAVE, "SaveVideo", video=film, **inputs)


@dataclass(frozen=True)
class Output:
    """An output of a node."""

    node: int
    slot: int = 0

    def at(self, slot: int) -> "Output":
        return Output(self.node, slot)

    @property
    def link(self) -> Link:
        return [str(self.node), self.slot]


MODELS, INPUTS, PROMPT = "Models", "What you bring", "Prompt"
LATENT, SAMPLE, LARGER = "The film's start", "Sample", "Super-resolution"
FIRST = "A first film, for its sound"
BOTH, JOIN_PICTURES, JOIN_SOUNDS = "Both films", "Join the pictures", "Join the sounds"
SAVE = "Decode and save"
COLUMNS = (
    (MODELS, INPUTS), (PROMPT,), (FIRST,), (LATENT, SAMPLE, LARGER),
    (BOTH,), (JOIN_PICTURES, JOIN_SOUNDS), (SAVE,)
)  # fmt: skip

# The graphs


def text_to_film(g: Graph) -> None:
    model, clip, vae, audio_vae = g.model("distill"), g.clip(), g.turbo(), g.audio_vae()
    g.save(g.sample(model, g.encode(clip), g.empty()), vae, audio_vae)


def image_to_film(g: Graph) -> None:
    model, clip = g.model("distill"), g.clip()
    encoder, vae, audio_vae = g.wan("Video VAE: encodes"), g.turbo("Video VAE: decodes"), g.audio_vae()
    picture, positive = g.picture(), g.encode(clip)
    latent = g.add(LATENT, "HappyHorseImageToFilm", latent=g.empty(), vae=encoder, image=picture)
    g.save(g.sample(model, positive, latent), vae, audio_vae)


def audio_to_film(g: Graph) -> None:
    model, clip, vae, audio_vae = g.model("distill"), g.clip(), g.turbo(), g.audio_vae()
    positive = g.encode(clip)
    sound = g.sound(model, positive, vae, audio_vae)
    latent = _with_sound(g, g.empty(), audio_vae, sound)
    g.save(g.sample(model, positive, latent), vae, audio_vae, latent.at(1))


def image_and_audio_to_film(g: Graph) -> None:
    model, clip = g.model("distill"), g.clip()
    encoder, vae, audio_vae = g.wan("Video VAE: encodes"), g.turbo("Video VAE: decodes"), g.audio_vae()
    picture, positive = g.picture(), g.encode(clip)
    sound = g.sound(model, positive, vae, audio_vae)
    latent = g.add(LATENT, "HappyHorseImageToFilm", latent=g.empty(), vae=encoder, image=picture)
    latent = _with_sound(g, latent, audio_vae, sound)
    g.save(g.sample(model, positive, latent), vae, audio_vae, latent.at(1))


def _with_sound(g: Graph, latent: Output, audio_vae: Output, sound: Output) -> Output:
    inputs = {"mode": "hold", "encoding": "mean", "seed": 42}
    return g.add(LATENT, "HappyHorseAudioToFilm", latent=latent, audio_vae=audio_vae, audio=sound, **inputs)


def film_to_film(g: Graph) -> None:
    model, clip = g.model("distill"), g.clip()
    encoder, vae, audio_vae = g.wan("Video VAE: encodes"), g.turbo("Video VAE: decodes"), g.audio_vae()
    film, positive = g.film(), g.encode(clip)
    latent = g.add(LATENT, "HappyHorseFilmToFilm", vae=encoder, audio_vae=audio_vae, video=film, **g.size())
    g.save(g.sample(model, positive, latent, denoise=0.6), vae, audio_vae)


def continue_film(g: Graph) -> None:
    model, clip = g.model("distill"), g.clip()
    encoder, vae, audio_vae = g.wan("Video VAE: encodes"), g.turbo("Video VAE: decodes"), g.audio_vae()
    film, positive = g.film(), g.encode(clip)
    inputs = g.size() | {"seconds": g.seconds, "overlap": 9}
    latent = g.add(LATENT, "HappyHorseContinueFilm", vae=encoder, audio_vae=audio_vae, video=film, **inputs)
    new = g.sample(model, positive, latent)
    old, overlap = g.add(BOTH, "GetVideoComponents", "The first film", video=film), latent.at(1)
    new = g.add(BOTH, "HappyHorseDecode", "The new film", latent=new, vae=vae, audio_vae=audio_vae)
    rest = {"batch_index": overlap, "length": 4096}
    frames = g.add(JOIN_PICTURES, "ImageFromBatch", "New pictures without the overlap", image=new, **rest)
    frames = g.add(
        JOIN_PICTURES, "BatchImagesNode", "First, then new", images__image0=old, images__image1=frames
    )
    seconds = g.add(
        JOIN_SOUNDS, "ComfyMathExpression", "Overlap in seconds", expression="a / 25", values__a=overlap
    )
    rest = {"start_index": seconds, "duration": 60.0}
    sound = g.add(JOIN_SOUNDS, "TrimAudioDuration", "New sound without the overlap", audio=new.at(1), **rest)
    sound = g.add(
        JOIN_SOUNDS, "AudioConcat", "First, then new", audio1=old.at(1), audio2=sound, direction="after"
    )
    g.save_video(g.add(SAVE, "CreateVideo", images=frames, audio=sound, fps=new.at(2)))


def base_with_guidance(g: Graph) -> None:
    model, clip, vae, audio_vae = g.model("base"), g.clip(), g.turbo(), g.audio_vae()
    positive, negative = (
        g.encode(clip),
        g.add(
            PROMPT, "HappyHorseTextEncode", "What it shall not be", clip=clip, prompt=DEFAULT_NEGATIVE_PROMPT
        ),
    )
    g.save(g.sample(model, positive, g.empty(), negative=negative), vae, audio_vae)


def super_resolution_540p(g: Graph) -> None:
    _enlarged(g, "540p")


def super_resolution_1080p(g: Graph) -> None:
    _enlarged(g, "1080p")


def _enlarged(g: Graph, size: str) -> None:
    model, larger = g.model("distill", "Model: makes the film"), g.model(f"{size}_sr", "Model: enlarges it")
    clip, vae, audio_vae = g.clip(), g.turbo(), g.audio_vae()
    positive = g.encode(clip)
    small = g.sample(model, positive, g.empty())
    inputs = {"size": size, "seed": 42, "width": 1920, "height": 1088, "steps": 0}
    if g.pony and size == "1080p":
        inputs |= {"size": "custom", "width": 256, "height": 256}
    large = g.add(
        LARGER, "HappyHorseSuperResolution", model=larger, positive=positive, latent=small, **inputs
    )
    g.save(large, vae, audio_vae)


def stock_nodes(g: Graph) -> None:
    model, clip, vae, audio_vae = g.model("distill"), g.clip(), g.turbo(), g.audio_vae()
    words = g.words
    parts = [words.body, f"Background Sound:\n<{words.background_sound or 'No prominent background sound'}>"]
    if words.dialogue:
        speaker, _, line = words.dialogue.partition(": ")
        parts.insert(1, f'Dialogue:\n<{speaker}>: "{line}"')
    positive = g.add(PROMPT, "CLIPTextEncode", "Prompt", clip=clip, text="\n\n".join(parts))
    settings = {"seed": 42, "steps": 8, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}
    film = g.add(
        SAMPLE, "KSampler", model=model, positive=positive, negative=positive, latent_image=g.empty(),
        denoise=1.0, **settings,
    )  # fmt: skip
    parts = g.add(SAVE, "LTXVSeparateAVLatent", "Separate picture and sound", av_latent=film)
    images = g.add(SAVE, "VAEDecode", samples=parts, vae=vae)
    sound = g.add(SAVE, "VAEDecodeAudio", samples=parts.at(1), vae=audio_vae)
    g.save_video(g.add(SAVE, "CreateVideo", images=images, audio=sound, fps=25.0))


@dataclass(frozen=True)
class Workflow:
    """A graph; its title, what it makes and how to use it, for its note; and its words."""

    build: Callable[[Graph], None]
    title: str
    makes: str
    use: str
    words: Words = MORNING

    @property
    def name(self) -> str:
        return self.build.__name__

    def graph(self, pony: bool) -> Graph:
        """The graph for the published models, or its pony twin."""
        name = f"pony_{self.name}" if pony else self.name
        graph = Graph(name, pony, PONY_WORDS if pony else self.words)
        self.build(graph)
        return graph


OWN_WORDS = "Write the words that are spoken in it into **body** (in quotation marks) and **dialogue**."
HILL = "Hello! You can see everything from up here."
ALL = [
    Workflow(
        text_to_film,
        "Text to film",
        "A film with sound from a prompt alone.",
        "**body** says what is seen and heard in 150 to 200 words; **dialogue** repeats what is spoken.",
    ),
    Workflow(
        image_to_film,
        "Image to film",
        "A film with sound whose first frame is a given picture.",
        "Choose your picture in *Load Image* and describe it in the prompt; it is cropped about its centre "
        "to the film's aspect.",
        drawing(HILL),
    ),
    Workflow(
        audio_to_film,
        "Audio to film",
        "A film for a given sound, lips in step with speech.",
        f"Choose your sound in *Load Audio*. {OWN_WORDS}",
    ),
    Workflow(
        image_and_audio_to_film,
        "Image and audio to film",
        "A given picture speaks with a given sound.",
        f"Choose your picture in *Load Image* and your sound in *Load Audio*. {OWN_WORDS}",
        drawing(HILL),
    ),
    Workflow(
        film_to_film,
        "Film to film",
        "A film is changed as the prompt says, its sound too.",
        "Choose your film in *Load Video*. **denoise** in the sampler says by how much it is changed; 1 "
        "makes it wholly new.",
        talk("Good morning. I saved you a seat.", PAINTED),
    ),
    Workflow(
        continue_film,
        "Continue film",
        "The last frames of a film and their sound are the start of a new one; both are then joined.",
        "Choose your film in *Load Video*: one made here, or another with 25 frames a second. It keeps its "
        "size, and the new frames are fitted to it.",
        talk("The coffee is still warm."),
    ),
    Workflow(
        base_with_guidance,
        "Base model with guidance",
        "A film with sound by the model before distillation.",
        "It runs 32 steps of two passes each, eight times as many passes as the distilled model, and it "
        "reads the negative prompt.",
    ),
    Workflow(
        super_resolution_540p,
        "Super-resolution, 540p",
        "A film with sound, made at 448x256 and enlarged to 896x512 before it is decoded.",
        "The sound stays as it is.",
    ),
    Workflow(
        super_resolution_1080p,
        "Super-resolution, 1080p",
        "A film with sound, made at 448x256 and enlarged to about 1920x1088 before it is decoded.",
        "The sound stays as it is. *Decode Video* writes the file piece by piece.",
    ),
    Workflow(
        stock_nodes,
        "Stock nodes",
        "A film with sound by ComfyUI's own nodes; only the loaders and the empty latent are ours.",
        "**KSampler** with `lcm`, `simple`, 8 steps and cfg 1 suits the distilled model; with cfg 1 it "
        "does not look at the negative prompt. It draws its noise in another way than *HappyHorse "
        "Sampler*: the same seed gives another film.",
    ),
]
PONIES = ("text_to_film", "image_to_film", "audio_to_film", "image_and_audio_to_film")

# The note


@dataclass(frozen=True)
class File:
    """A choice in a loader: its part in the catalog, where it goes below models/, and its licence."""

    part: str
    folder: str
    licence: str
    url: str = ""  # where the choice is one file


FILES = {
    **{
        variant: File(variant, f"diffusion_models/{variant}/", "Apache-2.0")
        for variant in ("distill", "base", "540p_sr", "1080p_sr")
    },
    "t5gemma-9b-9b-ul2": File("text_encoder", "text_encoders/t5gemma-9b-9b-ul2/", "Gemma terms"),
    "turbo_vae": File("video_decoder", "vae/turbo_vae/", "Apache-2.0"),
    "Wan2.2_VAE.pth": File(
        "video_vae",
        "vae/",
        "Apache-2.0",
        "https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B/resolve/main/Wan2.2_VAE.pth",
    ),
    "stable-audio-open-1.0": File("audio_vae", "vae/stable-audio-open-1.0/", "Stability AI Community"),
}
CHOICE_INPUTS = ("model", "text_encoder", "vae", "audio_vae")
WEIGHTS = (
    "The weights are those of **daVinci-MagiHuman** (Sand.ai and GAIR), the family that HappyHorse-1.0 "
    "grew out of. HappyHorse's own weights are not public."
)
PONY_NOTE = (
    "## Needs no file\nThe *pony* is a miniature of all networks that comes with these nodes. Its weights "
    "are **random: the film is noise**, in picture and sound. It shows that everything works, from the "
    "prompt to the file. Where a picture or a sound is needed, other nodes make one.\n\nFor real "
    "films open **{real}**."
)
LICENCES = "The Gemma and Stability licences are not open-source licences: read them before commercial use."


def choices(graph: Graph) -> list[str]:
    """What the loaders of a graph choose, in their order."""
    loaders = [node for node in graph.nodes if node.group == MODELS]
    return [node.inputs[name] for node in loaders for name in CHOICE_INPUTS if name in node.inputs]


def note(workflow: Workflow, graph: Graph) -> str:
    """Markdown: what the workflow does, and which files it needs from where."""
    about = f"# {workflow.title}\n{workflow.makes}"
    if graph.pony:
        return f"{about}\n\n{PONY_NOTE.format(real=workflow.name)}\n\n{WEIGHTS}"
    about += f" {workflow.use}"
    lines = []
    for choice in dict.fromkeys(choices(graph)):
        file = FILES[choice]
        repository, _, rest = SOURCES[file.part].origin.partition(" ")
        origin = f"[{repository.rstrip(',')}](https://huggingface.co/{repository.rstrip(',')})"
        lines.append(f"- `models/{file.folder}`: {origin}{rest and f', {rest}'}; {file.licence}")
    files = "\n".join(lines)
    return f"{about}\n\n## Files\n{files}\n\nThe key R renews the lists.\n\n{WEIGHTS}\n\n{LICENCES}"
