"""The example graphs, each described once: for the published models, and as a pony twin without files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from happyhorse.model.catalog import SOURCES
from happyhorse.model.config import MAGIHUMAN, PONY, Preset
from happyhorse.training.data.world import Bounce, Head, body

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
PONY_BOUNCE = Words(body(Bounce("circle", "red", "teal", "slow", "high")), background_sound="high notes")
PONY_TALK = Words(
    body(Head("black", "yellow", "white", "low", "slow", "French")), "head with black hair, French: bonjour"
)


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
    """A film's graph. `pony` takes the built-in miniatures, small sizes, and a first film of its own in place
    of files.
    """

    name: str
    pony: bool
    words: Words
    nodes: list[Node] = field(default_factory=list)
    first: "Output | None" = None  # the first film, once it is there

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

    def brought(self, loaded: "Loaded") -> "Output":
        """What the pony makes for itself, a first film: images, sound, frame rate."""
        if self.first is None:
            sizes = self.size() | {"seconds": self.seconds, "batch_size": 1}
            latent = self.add(FIRST, "HappyHorseEmptyLatent", "Size and length", **sizes)
            rest = {"seed": 7, "steps": 0, "denoise": 1.0}
            film = self.add(
                FIRST,
                "HappyHorseSampler",
                model=loaded.model,
                positive=loaded.positive,
                latent=latent,
                **rest,
            )
            self.first = self.add(
                FIRST, "HappyHorseDecode", latent=film, vae=loaded.vae, audio_vae=loaded.audio_vae
            )
        return self.first

    def picture(self, loaded: "Loaded") -> "Output":
        if not self.pony:
            return self.add(INPUTS, "LoadImage", "Your picture: the first frame", image="example.png")
        frames = self.brought(loaded)
        return self.add(FIRST, "ImageFromBatch", "Its first frame", image=frames, batch_index=0, length=1)

    def sound(self, loaded: "Loaded") -> "Output":
        if not self.pony:
            return self.add(INPUTS, "LoadAudio", "Your sound: choose a file", audio="voice.wav")
        return self.brought(loaded).at(1)

    def film(self, loaded: "Loaded") -> "Output":
        if not self.pony:
            return self.add(INPUTS, "LoadVideo", "Your film: choose a file", file="film.mp4")
        made = self.brought(loaded)
        return self.add(FIRST, "CreateVideo", "A film", images=made, audio=made.at(1), fps=made.at(2))

    # The steps of a film

    def encode(self, clip: "Output") -> "Output":
        """The prompt in its three parts, encoded."""
        prompt = self.add(PROMPT, "HappyHorsePrompt", **vars(self.words))
        return self.add(PROMPT, "HappyHorseTextEncode", clip=clip, prompt=prompt)

    def size(self, aspect: str = "16:9") -> Json:
        if self.pony:
            return {"aspect": "custom", "width": 96, "height": 96}
        return {"aspect": aspect, "width": 448, "height": 256}

    @property
    def preset(self) -> Preset:
        return PONY if self.pony else MAGIHUMAN

    @property
    def seconds(self) -> float:
        return self.preset.default_seconds

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
FIRST = "A first film"
BOTH, JOIN_PICTURES, JOIN_SOUNDS = "Both films", "Join the pictures", "Join the sounds"
SAVE = "Decode and save"
COLUMNS = (
    (MODELS, INPUTS), (PROMPT,), (FIRST,), (LATENT, SAMPLE, LARGER),
    (BOTH,), (JOIN_PICTURES, JOIN_SOUNDS), (SAVE,)
)  # fmt: skip

# The graphs


class Loaded(NamedTuple):
    """The distilled model, the encoded prompt and the decoders."""

    model: Output
    positive: Output
    vae: Output
    audio_vae: Output


def load(g: Graph) -> Loaded:
    model, clip, vae, audio_vae = g.model("distill"), g.clip(), g.turbo("Video VAE: decodes"), g.audio_vae()
    return Loaded(model, g.encode(clip), vae, audio_vae)


def text_to_film(g: Graph) -> None:
    loaded = load(g)
    g.save(g.sample(loaded.model, loaded.positive, g.empty()), loaded.vae, loaded.audio_vae)


def image_to_film(g: Graph) -> None:
    encoder, loaded = g.wan("Video VAE: encodes"), load(g)
    picture = g.picture(loaded)
    latent = g.add(LATENT, "HappyHorseImageToFilm", latent=g.empty(), vae=encoder, image=picture)
    g.save(g.sample(loaded.model, loaded.positive, latent), loaded.vae, loaded.audio_vae)


def audio_to_film(g: Graph) -> None:
    loaded = load(g)
    latent = _with_sound(g, g.empty(), loaded.audio_vae, g.sound(loaded))
    g.save(g.sample(loaded.model, loaded.positive, latent), loaded.vae, loaded.audio_vae, latent.at(1))


def image_and_audio_to_film(g: Graph) -> None:
    encoder, loaded = g.wan("Video VAE: encodes"), load(g)
    picture, sound = g.picture(loaded), g.sound(loaded)
    latent = g.add(LATENT, "HappyHorseImageToFilm", latent=g.empty(), vae=encoder, image=picture)
    latent = _with_sound(g, latent, loaded.audio_vae, sound)
    g.save(g.sample(loaded.model, loaded.positive, latent), loaded.vae, loaded.audio_vae, latent.at(1))


def _with_sound(g: Graph, latent: Output, audio_vae: Output, sound: Output) -> Output:
    inputs = {"mode": "hold", "encoding": "mean", "seed": 42}
    return g.add(LATENT, "HappyHorseAudioToFilm", latent=latent, audio_vae=audio_vae, audio=sound, **inputs)


def film_to_film(g: Graph) -> None:
    encoder, loaded = g.wan("Video VAE: encodes"), load(g)
    film, sources = g.film(loaded), {"vae": encoder, "audio_vae": loaded.audio_vae}
    latent = g.add(LATENT, "HappyHorseFilmToFilm", video=film, **sources, **g.size("as given"))
    g.save(g.sample(loaded.model, loaded.positive, latent, denoise=0.6), loaded.vae, loaded.audio_vae)


def continue_film(g: Graph) -> None:
    encoder, loaded = g.wan("Video VAE: encodes"), load(g)
    film, sources = g.film(loaded), {"vae": encoder, "audio_vae": loaded.audio_vae}
    inputs = g.size("as given") | {"seconds": g.seconds, "overlap": 9}
    latent = g.add(LATENT, "HappyHorseContinueFilm", video=film, **sources, **inputs)
    new = g.sample(loaded.model, loaded.positive, latent)
    overlap, old, old_sound = (latent.at(slot) for slot in (1, 2, 3))
    new = g.add(
        BOTH, "HappyHorseDecode", "The new film", latent=new, vae=loaded.vae, audio_vae=loaded.audio_vae
    )
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
        JOIN_SOUNDS, "AudioConcat", "First, then new", audio1=old_sound, audio2=sound, direction="after"
    )
    g.save_video(g.add(SAVE, "CreateVideo", images=frames, audio=sound, fps=new.at(2)))


def base_with_guidance(g: Graph) -> None:
    model, clip, vae, audio_vae = g.model("base"), g.clip(), g.turbo(), g.audio_vae()
    positive, negative = (
        g.encode(clip),
        g.add(
            PROMPT, "HappyHorseTextEncode", "What it shall not be", clip=clip, prompt=g.preset.negative_prompt
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
        inputs |= {"size": "custom", "width": 288, "height": 288}
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
    pony_words: Words = PONY_BOUNCE

    @property
    def name(self) -> str:
        return self.build.__name__

    def graph(self, pony: bool) -> Graph:
        """The graph for the published models, or its pony twin."""
        name = f"pony_{self.name}" if pony else self.name
        graph = Graph(name, pony, self.pony_words if pony else self.words)
        self.build(graph)
        return graph


OWN_WORDS = (
    "Write the words that are spoken in it into **body**, the upper box of the prompt (in quotation marks), "
    "and into **dialogue** below it."
)
HILL = "Hello! You can see everything from up here."
ALL = [
    Workflow(
        text_to_film,
        "Text to film",
        "A film with sound from a prompt alone.",
        "**body**, the upper box of the prompt, says what is seen and heard in 150 to 200 words; "
        "**dialogue**, below it, repeats what is spoken.",
    ),
    Workflow(
        image_to_film,
        "Image to film",
        "A film with sound whose first frame is a given picture.",
        "Choose your picture in *Load Image* and describe it in the prompt; it is cropped about its centre "
        "to the film's aspect.",
        drawing(HILL),
        PONY_TALK,
    ),
    Workflow(
        audio_to_film,
        "Audio to film",
        "A film for a given sound, lips in step with speech.",
        f"Choose your sound in *Load Audio*. {OWN_WORDS}",
        pony_words=PONY_TALK,
    ),
    Workflow(
        image_and_audio_to_film,
        "Image and audio to film",
        "A given picture speaks with a given sound.",
        f"Choose your picture in *Load Image* and your sound in *Load Audio*. {OWN_WORDS}",
        drawing(HILL),
        PONY_TALK,
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
        "Choose your film in *Load Video*. It keeps its size and becomes 25 frames a second, and the new "
        "frames are fitted to it.",
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
        "A film with sound, enlarged to twice its width and height before it is decoded.",
        "448x256 pixels become 896x512; the sound stays as it is.",
        pony_words=PONY_TALK,
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
PONIES = (
    "text_to_film", "image_to_film", "audio_to_film", "image_and_audio_to_film", "super_resolution_540p",
)  # fmt: skip

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
    "## Needs no file\nThe *pony* is a miniature of all networks that comes with these nodes, trained on two "
    "tiny worlds, bouncing shapes and heads that babble, at 96x96 pixels: it knows their words only, and at "
    "other sizes its films may be empty. Its captions are as short as these; what **HappyHorse Prompt** says "
    "of their length is meant for the real models. A picture or a sound that a workflow starts from is taken "
    "from a first film.\n\nFor real films open **{real}**."
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
