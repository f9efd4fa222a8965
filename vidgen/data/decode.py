"""Video files and bytes ↔ arrays of pixels, through PyAV (FFmpeg).

A frame is found by its place in the order of presentation: seek to the key frame before it, then compare time stamps,
so that frames read from the middle are bit for bit those of a decode from the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation

from vidgen.data.clip import BadClip

# Demuxers that read one file and nothing else: a playlist or a text file must not make FFmpeg open other things.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,ogg,gif,mpeg,mpegts,mpegvideo,h264,hevc,m4v,ivf,y4m,yuv4mpegpipe,"
    "png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe"
)
INDEXED = {"mov", "matroska", "gif"}  # whose packets are frames, each with its time; the rest is counted by decoding
REORDER = 16  # frames that one may stand earlier in a file than on screen: the limit of H.264 and H.265
LONGEST_GAP = 600.0  # seconds between two frames beyond which time stamps are taken to be broken
MAGIC = (b"\x1aE\xdf\xa3", b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV")
ATOMS = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip", b"pnot", b"sidx", b"uuid")
Source = bytes | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before its pixels are decoded.

    Attributes:
      frames: how many.
      height, width: pixels, as shown: after the file's rotation.
      fps: frames a second; of a variable rate the mean.
      constant: whether frames are evenly spaced in time.
      aspect: width of a pixel over its height, as shown; 1.0 unless the file says otherwise.
      pts: [frames] i64, time stamps in the file's own unit, rising; None where frames can only be counted.
      times: [frames] f64, seconds since the first frame.
      duration: seconds, the last frame's own time on screen included.
    """

    frames: int
    height: int
    width: int
    fps: float
    constant: bool
    aspect: float
    pts: np.ndarray | None
    times: np.ndarray
    duration: float


def probe(source: Source) -> VideoInfo:
    """Reads sizes and all time stamps of a video or image, given as bytes or as a path.

    Raises BadClip: "missing file", "empty file", "not a video", "no frames", "truncated", "damaged", "broken
    timestamps", "no known codec".
    """
    with _open(source) as container:
        stream = container.streams.video[0]
        formats = set(container.format.name.split(","))
        declared, rate, unit = stream.frames, float(stream.average_rate or 0), float(stream.time_base or 1)
        first = next(_iterate(container, stream), None)
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        if first is None:
            raise BadClip("no frames")
        turned = round(first.rotation / 90) % 2 == 1
        height, width = (first.width, first.height) if turned else (first.height, first.width)
    stamps = None
    if formats & INDEXED:
        with _open(source) as container:
            stamps = _packet_times(container)
            if stamps is not None and len(stamps) < declared:
                raise BadClip("truncated")
    pts = None if stamps is None else stamps[:, 0]
    if stamps is None:
        with _open(source) as container:
            frames = _iterate(container, container.streams.video[0])
            stamps = np.array([(np.nan if f.pts is None else f.pts, f.duration or 0) for f in frames], float)
    times = (stamps[:, 0] - stamps[0, 0]) * unit
    if not (np.diff(times) > 0).all():  # NaN too: a file without times plays at its rate
        times = np.arange(len(times)) / (rate or 24.0)
    fps, constant = _rate(times, rate)
    last = stamps[-1, 1] * unit
    return VideoInfo(
        frames=len(times),
        height=height,
        width=width,
        fps=fps,
        constant=constant,
        aspect=1 / aspect if turned else aspect,
        pts=pts,
        times=times,
        duration=float(times[-1] + (last if last > 0 and not constant else 1 / fps)),
    )


def _rate(times: np.ndarray, declared: float) -> tuple[float, bool]:
    """Frames a second, and whether frames are evenly spaced; `declared` is what the file says, 0 where it doesn't."""
    if len(times) == 1:
        return declared or 1.0, True
    if np.diff(times).max() > LONGEST_GAP:
        raise BadClip("broken timestamps")
    gap = times[-1] / (len(times) - 1)
    # Containers that count in milliseconds or hundredths place frames up to one unit off: far less than half a frame.
    constant = bool(np.abs(times - np.arange(len(times)) * gap).max() < 0.5 * gap)
    return (declared if constant and abs(declared * gap - 1) < 0.05 else 1 / gap), constant


def decode(source: Source, start: int = 0, frames: int | None = None) -> tuple[np.ndarray, float]:
    """Frames [start, start + frames) of a video (all that are left if `frames` is None), as they are stored.

    Rotation is applied; a variable frame rate isn't evened out (`VideoInfo.times` says when each frame is shown).

    Returns:
      video: [T,H,W,3] u8, RGB.
      fps: frames a second; of a variable rate the mean.

    Raises BadClip as `probe` does, and "too short" where the video has fewer frames than were asked for.
    """
    if start == 0:  # the common case, and no look at the index needed
        with _open(source) as container:
            stream = container.streams.video[0]
            declared, rate = stream.frames, stream.average_rate
            video = [to_rgb(f) for f in itertools.islice(_iterate(container, stream), frames)]
        if not video:
            raise BadClip("no frames")
        if frames is None and declared > len(video):
            raise BadClip("truncated")
        if frames is not None and len(video) < frames:
            raise BadClip("too short")
        return np.stack(video), float(rate or 0) or 1.0
    info = probe(source)
    stop = info.frames if frames is None else start + frames
    if not 0 <= start < stop <= info.frames:
        raise BadClip("too short")
    return np.stack([to_rgb(f) for f in stream_frames(source, info, start, stop)]), info.fps


def stream_frames(source: Source, info: VideoInfo, start: int, stop: int) -> Iterator[av.VideoFrame]:
    """Frames [start, stop) of a probed video, one at a time, by key frame seek; `to_rgb` makes pixels of them.

    Raises BadClip("truncated") when the file ends before `stop`, "damaged" when a frame cannot be decoded.
    """
    with _open(source) as container:
        stream = container.streams.video[0]
        if not isinstance(source, bytes):
            stream.thread_type = "AUTO"
        place, due, first = 0, start, None
        if start > REORDER and info.pts is not None:
            first = int(info.pts[start])
            container.seek(int(info.pts[start - REORDER]), stream=stream)
        for frame in _iterate(container, stream, first):
            if info.pts is not None and frame.pts is not None:
                place = int(np.searchsorted(info.pts, frame.pts))
            if place > due:
                raise BadClip("damaged")
            if place == due:
                yield frame
                due += 1
            place += 1
            if due == stop:
                return
    raise BadClip("truncated")


def to_rgb(frame: av.VideoFrame, height: int = 0, width: int = 0) -> np.ndarray:
    """[H,W,3] u8 of a decoded frame, turned upright, scaled to `height` × `width` (as shown) if they are given.

    Shrinking averages areas, growing is bicubic.
    """
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    if turns % 2:
        height, width = width, height
    shrink = (height or frame.height) <= frame.height and (width or frame.width) <= frame.width
    image = frame.to_ndarray(
        format="rgb24",
        width=width or frame.width,
        height=height or frame.height,
        interpolation=(Interpolation.AREA if shrink else Interpolation.BICUBIC) | Interpolation.ACCURATE_RND,
        threads=1,
    )
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class Encoder:
    """H.264 in MP4, frame by frame, in memory.

    With `full_chroma`, or where a side is odd, which halved chroma cannot be, colour has the resolution of brightness
    (yuv444p): truer small objects, and every size ≥ 1 × 1 comes back exactly. Otherwise it has half (yuv420p), which
    every browser and player shows. Colours are BT.709 and tagged so. The same frames give the same bytes.
    """

    def __init__(
        self, height: int, width: int, fps: float, *, gop: int = 8, crf: float = 16, full_chroma: bool = False
    ):
        """gop: frames from one key frame to the next. crf: x264's constant quality, 0 (best) to 51."""
        if fps <= 0:
            raise ValueError(f"fps={fps}: expected more than 0")
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4", options={"fflags": "+bitexact"})
        # With its macroblock tree, x264's bits differ from run to run on some sizes; a short GOP has little use for it.
        options = {"crf": str(crf), "preset": "medium", "x264-params": "log-level=error:mbtree=0"}
        self._stream = stream = self._container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options=options
        )
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if full_chroma or height % 2 or width % 2 else "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count = gop, 1
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited

    def add(self, image: np.ndarray) -> None:
        """image: [H,W,3] u8."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(
            format=self._stream.pix_fmt,
            dst_colorspace="ITU709",
            interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
            threads=1,
        )
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """The MP4 file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()


def encode(video: np.ndarray, fps: float, *, gop: int = 8, crf: float = 16, full_chroma: bool = False) -> bytes:
    """An MP4 file of video [T,H,W,3] u8; see `Encoder`."""
    _check(video)
    encoder = Encoder(video.shape[1], video.shape[2], fps, gop=gop, crf=crf, full_chroma=full_chroma)
    for image in video:
        encoder.add(image)
    return encoder.finish()


def encode_gif(video: np.ndarray, fps: float) -> bytes:
    """A looping GIF of video [T,H,W,3] u8, with a palette made for it. GIF times are hundredths of a second."""
    _check(video)
    rate = Fraction(fps).limit_denominator(1001)
    graph = av.filter.Graph()
    size = {"width": video.shape[2], "height": video.shape[1]}
    source = graph.add_buffer(format=av.VideoFormat("rgb24"), time_base=1 / rate, **size)
    split, sink = graph.add("split"), graph.add("buffersink")
    palette, use = graph.add("palettegen", "reserve_transparent=0"), graph.add("paletteuse", "dither=sierra2_4a")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    file = io.BytesIO()
    with av.open(file, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "pal8"
        for i, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            source.push(frame)
        source.push(None)
        with contextlib.suppress(av.error.EOFError, av.error.BlockingIOError):
            while True:
                container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file of image [H,W,3] u8."""
    _check(image[None])
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _check(video: np.ndarray) -> None:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(f"expected video [T,H,W,3] of uint8, got {video.dtype} {list(video.shape)}")


@contextlib.contextmanager
def _open(source: Source) -> Iterator[av.container.InputContainer]:
    """An open container with a video stream; FFmpeg's errors as BadClip."""
    known = _check_whole(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    try:
        container = av.open(file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise BadClip("truncated" if known else "not a video") from error
    with container:
        if not container.streams.video:
            raise BadClip("no frames" if known or container.streams.audio else "not a video")
        yield container


def _check_whole(source: Source) -> bool:
    """Whether the first bytes are those of a known kind of file, which is as long as it says.

    FFmpeg decodes what there is of a file without a word, so this looks where files say how long they are. Raises
    BadClip: "missing file", "unreadable file", "empty file", "truncated".
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            total = file.seek(0, os.SEEK_END)
            file.seek(max(0, total - 64))
            tail = file.read().rstrip(b"\0")
            file.seek(0)
            head = file.read(64)
            if not head:
                raise BadClip("empty file")
            end = _last_box(file, total) if head[4:8] in ATOMS else _declared_size(head)
    except FileNotFoundError as error:
        raise BadClip("missing file") from error
    except OSError as error:
        raise BadClip("unreadable file") from error
    marks = ((b"GIF8", b";"), (b"\x89PNG", b"IEND"), (b"\xff\xd8\xff", b"\xff\xd9"))
    if end > total or any(head.startswith(start) and stop not in tail for start, stop in marks):
        raise BadClip("truncated")
    return head.startswith(MAGIC) or head[4:8] in ATOMS


def _last_box(file: io.BufferedIOBase, total: int) -> int:
    """Where the boxes of an MP4 or QuickTime file end, by their own sizes."""
    at = 0
    while at + 8 <= total:
        file.seek(at)
        box = file.read(16)
        size = int.from_bytes(box[8:] if box[:4] == b"\0\0\0\1" else box[:4], "big")
        if size < 8 or box[4:8] not in ATOMS:  # to the end of the file, or bytes that are no box
            return at
        at += size
    return at


def _declared_size(head: bytes) -> int:
    """How long an AVI, WebM or Matroska file says it is; 0 where it doesn't."""
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    if not head.startswith(b"\x1aE\xdf\xa3"):
        return 0
    at, size = _vint(head, 4)
    if head[at + size : at + size + 4] != b"\x18\x53\x80\x67":  # the segment, which holds all the rest
        return 0
    at, size = _vint(head, at + size + 4)
    return at + size


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """Where the variable-length integer of Matroska (RFC 8794) at `at` ends, and its value; 0 for "unknown"."""
    if at >= len(data) or not data[at]:
        return at, 0
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return at + length, 0 if value == (1 << 7 * length) - 1 else value


def _iterate(container, stream, first: int | None = None) -> Iterator[av.VideoFrame]:
    """Decoded frames; those before time stamp `first` may be broken: after a seek they can lack what they refer to."""
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt and (first is None or frame.pts is None or frame.pts >= first):
                raise BadClip("damaged")
            yield frame
    except av.error.DecoderNotFoundError as error:
        raise BadClip("no known codec") from error
    except av.error.FFmpegError as error:
        raise BadClip("damaged") from error


def _packet_times(container) -> np.ndarray | None:
    """[N,2] i64, (time stamp, duration) of all frames, in the order of presentation; None where a packet has none."""
    try:
        packets = [
            (p.pts, p.duration or 0) for p in container.demux(container.streams.video[0]) if p.size and not p.is_discard
        ]
    except av.error.FFmpegError as error:
        raise BadClip("truncated") from error
    if any(pts is None for pts, _ in packets):
        return None
    if not packets:
        raise BadClip("no frames")
    stamps = np.array(sorted(packets), np.int64)
    return stamps if (np.diff(stamps[:, 0]) > 0).all() else None
