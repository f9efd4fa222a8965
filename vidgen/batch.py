"""The batches that train: packed rows of spacetime tokens for a denoiser, chunks of video for a VAE."""

from __future__ import annotations

from typing import Any

from flax import struct

Context = tuple[Any, Any]  # (values [B,L,E] f32 or ids [B,L] i32, segment [B,L] i32)


@struct.dataclass
class TokenBatch:
    """B rows of S tokens. A row holds up to K segments (clips), told apart by `segment`.

    N noise levels a row: level 0 is always clean (noise 0), and in plain training level k belongs to segment k, so
    N = K + 1 and `level` equals `segment`. Optional fields are None where the model has no use for them.

    Attributes:
      tokens: [B,S,P] f32, clean latents, patchified, t-major. The feed carries u8 pixel blocks [B,S,D] here, a
        quarter of the bytes, until `tokenizer.latents` turns them into latents at the start of the step.
      coords: [B,S,3] f32, (t, y, x) in patches; t in seconds where the config says so.
      segment: [B,S] i32, 0 = padding, 1..K = the row's clips.
      level: [B,S] i32 in [0, N), which of the row's noise levels a token has; known tokens have level 0.
      known: [B,S,P] bool, or [B,S,1] where whole tokens are, or None; True = given, keep it (first frame, region, clip
        to extend).
      cond: [B,S,C] f32 or None, extra channels beside the noisy tokens.
      vectors: [B,N,V] f32 or None, class, fps, camera, action.
      context: name → (values [B,L,E] f32 or ids [B,L] i32, segment [B,L] i32): what is attended to. "empty" is attended
        to by nobody: of a frozen text encoder, the empty prompt [B,1,E], which a dropped caption becomes.
      clip: [B,K] i32, which clip of the index each segment is, -1 where there is none; its shape says what K is. None
        where rows hold one clip each, in sampling.
    """

    tokens: Any
    coords: Any
    segment: Any
    level: Any
    known: Any = None
    cond: Any = None
    vectors: Any = None
    context: dict[str, Context] = struct.field(default_factory=dict)
    clip: Any = None


@struct.dataclass
class VideoBatch:
    """B chunks of one size, each cut out of a clip.

    Attributes:
      video: [B,T,H,W,3] u8, RGB; x / 127.5 - 1 is what a VAE sees.
      clip: [B] i32, which clip of the index each chunk is of, -1 where it could not be read: such a chunk is black and
        has no weight.
    """

    video: Any
    clip: Any
