"""Bytes of activations: sums of the tensors alive at each network's fullest moment, as its code makes them.

tests/sampler/test_plan.py compares them with the live tensors of the networks themselves, of published and
miniature size. What a device's library takes beside tensors is not in them.
"""

import torch

from ..model.audio_vae import CHUNK, decoder_context
from ..model.config import (
    AudioVAEConfig,
    Config,
    TextEncoderConfig,
    TransformerConfig,
    VideoDecoderConfig,
    VideoVAEConfig,
)
from ..model.geometry import PIXELS_PER_LATENT, FilmShape
from ..model.prompt import TEXT_LIMIT
from ..model.transformer import piece_tokens
from ..model.video_decoder import largest_tile, piece_frames, reach, tile_grid

TEXT_TOKENS = TEXT_LIMIT  # a longer prompt is encoded whole, and needs more
SMALL_TENSORS = 1.05  # everything that the formulas leave out


def activations(
    role: str,
    config: Config,
    shape: FilmShape,
    dtype: torch.dtype,
    device: torch.device,
    piece: int = 0,
    tiles: int = 0,
) -> float:
    """Bytes of the tensors alive at the fullest moment of the network of a role, without its weights.

    `piece` and `tiles` are those of a placement.
    """
    size = dtype.itemsize
    if isinstance(config, TransformerConfig):
        tokens = shape.video_tokens + shape.audio_latents + TEXT_TOKENS
        windowed = config.frame_receptive_field < shape.latent_frames - 1
        if piece:
            near = min(2 * config.frame_receptive_field + 1, shape.latent_frames) if windowed else 0
            seen = near * shape.video_tokens // shape.latent_frames + shape.audio_latents + TEXT_TOKENS
            return _transformer_in_pieces(config, tokens, size, device, piece, seen)
        return transformer_activations(config, tokens, size, device, windowed)
    if isinstance(config, TextEncoderConfig):
        return _text_encoder(config, size)
    if isinstance(config, AudioVAEConfig):
        return _audio(config, shape)
    if isinstance(config, VideoDecoderConfig):
        return _turbo_decoder(config, shape, size, tiles)
    return (_video_encoder if role == "video_vae" else _wan_decoder)(config, shape, size)


def transformer_activations(
    config: TransformerConfig, tokens: int, size: int, device: torch.device, windowed: bool = True
) -> int:
    """Bytes of a forward pass over `tokens`, `size` being that of a value in the linears.

    `windowed` is whether the film is longer than the window of local layers, where there are any.
    """
    width, groups = config.hidden_size, config.num_query_groups * config.head_dim
    windowed = windowed and bool(config.local_attn_layers)
    stream = 4 * width + 3 * config.head_dim  # float32, and the rotary table
    heads = size * (width + 2 * groups + config.num_heads) + size * (width + groups)  # qkvg; q and k rotated
    # the result and its copies, or with windows its pieces
    attended = 3 * size * width
    if device.type == "cpu":  # there all of it is float32
        attended = (2 * size + (8 if size == 4 else 18) + (14 if windowed else 0)) * width
    gated = (8 + size) * width
    inner = max(
        config.inner_width(i) * (16 if i in config.gelu7_layers else 24) for i in range(config.num_layers)
    )
    mlp = tokens * (2 * 4 + size) * width + min(tokens, piece_tokens(tokens)) * inner
    return max(tokens * (stream + heads + max(attended, gated)), mlp)


def _transformer_in_pieces(
    config: TransformerConfig, tokens: int, size: int, device: torch.device, piece: int, seen: int
) -> int:
    """The same in pieces; `seen` is how many keys a window has."""
    width, groups = config.hidden_size, config.num_query_groups * config.head_dim
    piece, on_cpu = min(piece, tokens), device.type == "cpu"
    heads = size * (width + 2 * groups + config.num_heads)
    whole = tokens * (8 * width + 3 * config.head_dim + heads)  # both streams, the heads' inputs
    keys = (seen if config.local_attn_layers else 0) * 4 * size * groups  # of one frame and the next
    keys += tokens * (8 * groups if on_cpu else 0)  # there they are made float32
    attended = piece * width * (18 if on_cpu else 8 + 3 * size)
    mlp = piece * max(
        config.inner_width(i) * (16 if i in config.gelu7_layers else 24) for i in range(config.num_layers)
    )
    last_norm = tokens * 12 * width
    return max(whole + keys + attended, tokens * (8 * width + 3 * config.head_dim) + mlp, last_norm)


def _text_encoder(config: TextEncoderConfig, size: int) -> int:
    heads = (3 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    scores = config.num_attention_heads * TEXT_TOKENS**2 * 12  # three of float32, or its equal
    return scores + TEXT_TOKENS * size * (2 * config.hidden_size + heads)


def _turbo_decoder(config: VideoDecoderConfig, shape: FilmShape, size: int, tiles: int) -> int:
    pixels, length = shape.width * shape.height, shape.latent_frames
    first, step = config.first_chunk_size, config.step_size
    frames, chunk = 4 * first - 3, 0
    if length > first:  # later windows; meanwhile the pixels of the one before are being written
        frames, chunk = 4 * (step + 1 + (length > first + step)), 4 * 3 * pixels * 4 * step
    # The last blocks at full size hold input, middle and output; a piece needs 10 bytes a value for its norm
    full = config.decoder_spatio_temporal_scaling.index(True) + 1
    area = pixels
    if tiles:
        area = _largest_tile(config, shape, tiles)
        chunk += 4 * 3 * pixels * 4 * max(step, first)  # what the tiles are put together in
    frame = area // config.patch_size**2 * max(config.decoder_block_out_channels[:full])
    piece = min(piece_frames(frame, frames) + 2, frames)
    return 3 * frames * frame * size + piece * frame * 10 + chunk + latent_bytes(shape)


def _largest_tile(config: VideoDecoderConfig, shape: FilmShape, tiles: int) -> int:
    """Pixels of the largest tile with its margins."""
    size = shape.latent_rows, shape.latent_columns
    latents = largest_tile(*size, tile_grid(*size, tiles, reach(config)), reach(config))
    return latents * PIXELS_PER_LATENT**2


def _wan_decoder(config: VideoVAEConfig, shape: FilmShape, size: int) -> float:
    # The first block at full size works on two widths, beside two frames of the past of every convolution:
    # together 46 frames of one width. There are four frames of pixels at a time, and those before them.
    pixels, frames = shape.width * shape.height, 38.5 + 4 * config.num_res_blocks
    return pixels * (frames * config.dec_dim / 4 * size + 2 * 4 * 3 * 4) + latent_bytes(shape)


def _video_encoder(config: VideoVAEConfig, shape: FilmShape, size: int) -> float:
    # 15 frames of the first width, most of them the past that a picture alone does not need; then the patches
    pixels, frames = shape.width * shape.height, 7.3 + 4 * config.num_res_blocks
    return pixels * (frames * config.dim / 4 * size + 9 * size + 3 * 4)


def latent_bytes(shape: FilmShape) -> int:
    """Bytes of the video latents of a film, float32."""
    return 4 * 48 * shape.latent_frames * shape.latent_rows * shape.latent_columns


def _audio(config: AudioVAEConfig, shape: FilmShape) -> int:
    # Five tensors of the first width at every sample of a piece; or the largest weight, put together anew.
    latents = min(shape.audio_latents, CHUNK + 2 * decoder_context(config))
    widths = [config.channels * multiple for multiple in config.c_mults[-2:]]
    weight = 4 * widths[0] * widths[-1] * 2 * config.strides[-1]
    piece = 5 * 4 * latents * config.samples_per_latent * config.channels
    sound = 4 * config.io_channels * shape.audio_latents * config.samples_per_latent
    return max(piece, weight) + sound
