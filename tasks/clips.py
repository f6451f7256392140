"""Clips of video files as tensors: decoded by PyAV, sampled in time and space.

A training view is (C, T, H, W), the views of a test are (views, C, T, H, W); both uint8, RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from budgeted.errors import UserError
from tasks.decode import LOCAL


class Clips(Dataset):
    """Samples (view(path), label) of a list of (path, label)."""

    torch_only = True  # the views draw from torch alone

    def __init__(self, items: Sequence[tuple[str, int]], view: Callable[[str], Tensor]) -> None:
        self.items, self.view = items, view

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return self.view(path), label


class TrainView:
    """A clip from a random time, its short side scaled to a random length in `scale`, cropped at random, flipped."""

    def __init__(self, frames: int, stride: int, scale: Sequence[int], crop: int, flip: float) -> None:
        self.frames, self.stride, self.scale, self.crop, self.flip = frames, stride, scale, crop, flip

    def __call__(self, path: str) -> Tensor:
        video = decode(
            path, lambda n: clip(n, draw(0, last_start(n, self.frames, self.stride)), self.frames, self.stride)
        )
        video = resize_short(video.permute(0, 3, 1, 2), draw(*self.scale))
        top, left = (draw(0, side - self.crop) for side in video.shape[-2:])
        video = video[..., top : top + self.crop, left : left + self.crop]
        if torch.rand(()) < self.flip:
            video = video.flip(-1)
        return video.transpose(0, 1).contiguous()


class TestViews:
    """clips x crops views: clips spread evenly over the video's length, square crops over its longer side."""

    __test__ = False  # for pytest

    def __init__(self, frames: int, stride: int, clips: int, crops: int, crop: int) -> None:
        self.frames, self.stride, self.clips, self.crops, self.crop = frames, stride, clips, crops, crop

    def __call__(self, path: str) -> Tensor:
        wanted: list[int] = []

        def pick(n: int) -> list[int]:
            for start in spread(last_start(n, self.frames, self.stride), self.clips):
                wanted.extend(clip(n, start, self.frames, self.stride))
            return sorted(set(wanted))

        video = resize_short(decode(path, pick).permute(0, 3, 1, 2), self.crop)
        corners = zip(*(spread(side - self.crop, self.crops) for side in video.shape[-2:]), strict=True)
        crops = torch.stack([video[..., y : y + self.crop, x : x + self.crop] for y, x in corners])
        places = {index: place for place, index in enumerate(sorted(set(wanted)))}
        views = crops[:, [places[index] for index in wanted]].unflatten(1, (self.clips, self.frames))
        return views.transpose(0, 1).flatten(0, 1).transpose(1, 2).contiguous()


def draw(low: int, high: int) -> int:
    """A random whole number in [low, high], of torch's generator."""
    return int(torch.randint(low, high + 1, ()))


def clip(n: int, start: int, frames: int, stride: int) -> list[int]:
    """Indices of `frames` frames, `stride` apart, from `start`. Past the end of the n frames it goes on at the first,
    as in video-nonlocal-net. Raises ValueError for less than `frames` frames."""
    if n < frames:
        raise ValueError(f"has {n} frames, task.frames={frames} are needed")
    return [(start + k * stride) % n for k in range(frames)]


def last_start(n: int, frames: int, stride: int) -> int:
    """The last start of a window of frames x stride frames within n; 0 where it is longer than that."""
    return max(0, n - frames * stride)


def spread(last: int, count: int) -> list[int]:
    """`count` whole numbers evenly from 0 to `last`; the middle for one."""
    return [round(last * k / (count - 1)) for k in range(count)] if count > 1 else [last // 2]


def resize_short(video: Tensor, short: int) -> Tensor:
    """(T, C, H, W) uint8 with its shorter side brought to `short`, bilinear and antialiased."""
    sides = video.shape[-2:]
    if min(sides) == short:
        return video
    size = [max(short, round(side * short / min(sides))) for side in sides]
    return F.interpolate(video, size=size, mode="bilinear", antialias=True)


def decode(path: str, pick: Callable[[int], Sequence[int]]) -> Tensor:
    """Frames (len(indices), H, W, 3), uint8 RGB, of the indices that pick(number of frames) asks for.

    Frame i is the i-th in order of presentation. Packets are read, not decoded, to learn how many there are; then
    decoding goes from the last keyframe before the first frame wanted to the last one wanted, leaves out frames that
    no other refers to, and converts none but those wanted. Raises UserError, naming the file, where there is no
    video, less than nine tenths of what the header promises, or a frame that does not decode.
    """
    import av

    try:
        with av.open(path, options=LOCAL) as container:
            if not container.streams.video:
                raise ValueError("has no video stream")
            stream = container.streams.video[0]
            packets: list[Any] = [p for p in container.demux(stream) if p.pts is not None]
            times = sorted(p.pts for p in packets if not p.is_discard)
            end = max((p.pts + (p.duration or 0) for p in packets), default=0) - (stream.start_time or 0)
            if not times or any(p.is_corrupt for p in packets) or end < 0.9 * (stream.duration or 0):
                raise ValueError(f"is cut short: {len(times)} of {stream.frames} frames are there")
            wanted = [times[i] for i in pick(len(times))]
            frames = _decode_packets(stream.codec_context, packets, set(wanted))
            return torch.from_numpy(np.stack([frames[time] for time in wanted]))
    except (av.FFmpegError, OSError, ValueError, KeyError) as error:
        reason = "damaged: a frame is not there" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be used: {reason}; replace it or take it off the list") from None


def _decode_packets(codec: Any, packets: Sequence[Any], wanted: set[int]) -> dict[int, np.ndarray]:
    """RGB images (H, W, 3) by time: those of `wanted` that the packets hold."""
    from av.video.reformatter import VideoReformatter

    codec.thread_count = 1  # the loading processes are the parallelism
    to_rgb, found = VideoReformatter(), {}
    first = max((i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= min(wanted)), default=0)
    for packet in [*packets[first:], None]:  # None drains the decoder
        if packet is not None:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in codec.decode(packet):
            if frame.pts in wanted:
                found[frame.pts] = to_rgb.reformat(frame, format="rgb24").to_ndarray()
        if len(found) == len(wanted):
            break
    return found
