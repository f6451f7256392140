"""The video adapter: frames, views, models and weights, and whole cells on the embedded clips."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import urllib.error
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from budgeted.errors import UserError
from tasks import base, cli, tiny

ROOT = Path(__file__).resolve().parent.parent
ACTIONS = ROOT.parent / "shared" / "data" / "actions"
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pytorchvideo", "av"))), reason="needs pytorchvideo and av"
)


@pytest.fixture(scope="module")
def clips():
    from tasks import clips

    return clips


@pytest.fixture(scope="module")
def video():
    from tasks import video

    return video


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The embedded set."""
    folder = tmp_path_factory.mktemp("data") / "kinetics_tiny"
    tiny.ensure({"task": {"name": "kinetics_tiny"}, "data": {"root": str(folder)}})
    return folder


@pytest.fixture
def adapter(video, root, tmp_path):
    """adapter("key=value", ...) is the adapter of a kinetics_tiny cell."""

    def make(*words: str):
        recipe = cli.recipe(("task=kinetics_tiny", f"data.root={root}", f"out={tmp_path}", *words))
        return video.Video(recipe.cfg, recipe.data, torch.device("cpu"))

    return make


def task(**changed):
    return {"model": "tiny", "weights": "none", "dropout": 0.0, "options": {}, **changed}


def write(path: Path, count: int, codec: str = "libx264", size: int = 64, **options: str) -> Path:
    """A video of `count` frames at 10 a second in which something moves, with B-frames where the codec has them."""
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 255, (size, size, 3), np.uint8)
    with av.open(str(path), "w", options={k: v for k, v in options.items() if k == "movflags"}) as out:
        rest = {k.replace("_", "-"): v for k, v in options.items() if k != "movflags"}
        stream = out.add_stream(codec, rate=10, options=rest)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for k in range(count):
            frame = np.roll(canvas, 3 * k, 1)
            frame[:8, : 2 * k + 2] = 255 - 5 * k
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return path


def every_frame(path: Path) -> torch.Tensor:
    """All frames (T, H, W, 3), decoded from the first to the last."""
    import av
    import numpy as np

    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]))


def by_pytorchvideo(path: Path, start: int, stop: int) -> torch.Tensor:
    """Frames start..stop (T, H, W, 3) as pytorchvideo's own decoder gives them."""
    import av
    from pytorchvideo.data.encoded_video_pyav import EncodedVideoPyAV

    with av.open(str(path)) as container:
        rate = Fraction(container.streams.video[0].average_rate)
    with path.open("rb") as file:
        source = EncodedVideoPyAV(file, decode_audio=False)
        frames = source.get_clip(start / rate, stop / rate)["video"]
        source.close()
    return frames.permute(1, 2, 3, 0)


def same_as_pytorchvideo(clips, path: Path, seed: int) -> None:
    start = random.Random(seed).randrange(10)
    asked: list[int] = []

    def pick(n: int) -> list[int]:
        asked.extend(range(start, min(n, start + 64), 8))
        return asked

    ours = clips.decode(str(path), pick)
    theirs = by_pytorchvideo(path, start, asked[-1] + 1)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours.float(), theirs[::8]), path


# Frames.


@pytest.mark.skipif(not ACTIONS.is_dir(), reason=f"the real clips are not at {ACTIONS}")
def test_frames_of_real_clips_are_pytorchvideos(clips):
    """Of every 20th clip; with FULL=1 of all 220."""
    files = sorted(ACTIONS.glob("*/*/*.mp4"))
    for seed, path in enumerate(files if os.environ.get("FULL") == "1" else files[::20]):
        same_as_pytorchvideo(clips, path, seed)


def test_frames_of_embedded_clips_are_pytorchvideos(clips, root):
    for seed, path in enumerate(sorted(root.glob("*/*/*.mp4"))[::5]):
        same_as_pytorchvideo(clips, path, seed)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b.mp4", "libx264", {"bf": "3", "g": "250"}),
        ("open.mp4", "libx264", {"bf": "3", "g": "8", "x264_params": "open-gop=1:b-pyramid=normal:scenecut=0"}),
        ("intra.mp4", "libx264", {"g": "1"}),
        ("mpeg4.mp4", "mpeg4", {"bf": "2", "g": "12"}),
        ("vp9.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu_used": "8"}),
    ],
)
def test_any_frame_of_any_coding_is_the_one_a_full_decoding_gives(clips, tmp_path, name, codec, options):
    path = write(tmp_path / name, 30, codec, **options)
    whole = every_frame(path)
    assert len(whole) == 30
    for indices in ([0], [29], [13], [14, 13, 14], [5, 11, 17, 23], list(range(30))):
        assert torch.equal(clips.decode(str(path), lambda n, wanted=indices: wanted), whole[indices]), indices


def test_a_clip_cut_without_recoding_starts_where_its_edit_list_says(clips, tmp_path):
    import av

    source, path = write(tmp_path / "whole.mp4", 40, g="12", bf="2"), tmp_path / "cut.mp4"
    with av.open(str(source)) as whole, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        per_frame = int(1 / (whole.streams.video[0].average_rate * whole.streams.video[0].time_base))
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - 15 * per_frame, packet.dts - 15 * per_frame, stream
                if packet.pts >= -3 * per_frame:
                    cut.mux(packet)
    assert torch.equal(clips.decode(str(path), range), every_frame(path))
    assert torch.equal(clips.decode(str(path), lambda n: [0]), every_frame(source)[15:16])


def test_a_clip_past_the_end_starts_over(clips):
    assert clips.clip(300, 200, 8, 8) == [200, 208, 216, 224, 232, 240, 248, 256]
    assert clips.clip(20, 0, 4, 8) == [0, 8, 16, 4]
    with pytest.raises(ValueError, match="has 7 frames, task.frames=8 are needed"):
        clips.clip(7, 0, 8, 8)


def test_clips_spread_from_the_first_window_to_the_last(clips):
    assert clips.last_start(300, 8, 8) == 236
    assert clips.last_start(50, 8, 8) == 0
    assert clips.spread(236, 10) == [0, 26, 52, 79, 105, 131, 157, 184, 210, 236]
    assert clips.spread(236, 1) == [118]


# Files that are no use.


def truncated(path: Path) -> None:
    write(path, 40, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_between_frames(path: Path) -> None:
    import av

    write(path, 40, movflags="faststart")
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    path.write_bytes(path.read_bytes()[: packets[20].pos + packets[20].size])


def zeroed(path: Path) -> None:
    write(path, 40, movflags="faststart", bf="0")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(bytes(content))


def audio_only(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode(None))


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")


USELESS = {
    "cut short: [0-9]+ of 40": truncated,
    "cut short: 2[0-9] of 40": truncated_between_frames,
    "Invalid data|damaged|cut short": zeroed,
    "no video stream": audio_only,
    "has 5 frames, task.frames=8": lambda path: write(path, 5),
    "Invalid data": lambda path: path.write_bytes(b""),
    "Invalid": lambda path: path.write_text("not a video " * 100),
    "cannot be used": playlist,
    "No such file": lambda path: None,
    "Is a directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(("says", "make"), USELESS.items(), ids=[getattr(f, "__name__", "") for f in USELESS.values()])
def test_a_file_that_is_no_use_is_named_in_one_line(clips, tmp_path, says, make):
    path = tmp_path / "clip_000001_000011.mp4"
    make(path)
    with pytest.raises(UserError, match=says) as error:
        clips.decode(str(path), lambda n: clips.clip(n, n - 1, 8, 8))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# Views.


def test_a_training_view_is_a_function_of_torchs_generator(clips, tmp_path):
    path = str(write(tmp_path / "a.mp4", 30))
    view = clips.TrainView(frames=4, stride=5, scale=(36, 48), crop=32, flip=0.5)

    def seen(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return view(path)

    views = [seen(k) for k in range(8)]
    assert all(v.shape == (3, 4, 32, 32) and v.dtype == torch.uint8 and v.is_contiguous() for v in views)
    assert all(torch.equal(seen(k), v) for k, v in enumerate(views))
    assert len({v.float().mean().item() for v in views}) == 8


def test_a_training_view_without_freedom_is_the_clip_itself(clips, tmp_path):
    path = write(tmp_path / "a.mp4", 16)
    frames = every_frame(path)[::4].permute(3, 0, 1, 2)
    arguments = {"frames": 4, "stride": 4, "scale": (64, 64), "crop": 64}
    assert torch.equal(clips.TrainView(**arguments, flip=0.0)(str(path)), frames)
    assert torch.equal(clips.TrainView(**arguments, flip=1.0)(str(path)), frames.flip(-1))


def test_the_views_of_a_test_are_clips_by_crops(clips, tmp_path):
    path = write(tmp_path / "a.mp4", 30)
    frames = every_frame(path)  # 64 x 64: wider for the three crops
    views = clips.TestViews(frames=4, stride=5, clips=3, crops=1, crop=64)(str(path))
    assert views.shape == (3, 3, 4, 64, 64)
    for view, start in zip(views, (0, 5, 10), strict=True):
        assert torch.equal(view, frames[start : start + 20 : 5].permute(3, 0, 1, 2))


def test_crops_lie_along_the_longer_side(clips, monkeypatch):
    wide = torch.arange(4 * 32 * 62 * 3, dtype=torch.int32).remainder(251).to(torch.uint8).view(4, 32, 62, 3)
    monkeypatch.setattr(clips, "decode", lambda path, pick: wide[pick(4)])
    views = clips.TestViews(frames=2, stride=1, clips=2, crops=3, crop=32)("")
    assert views.shape == (6, 3, 2, 32, 32)
    expected = [wide[t : t + 2, :, x : x + 32].permute(3, 0, 1, 2) for t in (0, 2) for x in (0, 15, 30)]
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


@pytest.mark.parametrize(
    ("sides", "scaled"), [((240, 320), (256, 341)), ((320, 240), (341, 256)), ((256, 300), (256, 300))]
)
def test_the_short_side_is_scaled(clips, sides, scaled):
    out = clips.resize_short(torch.full((2, 3, *sides), 7, dtype=torch.uint8), 256)
    assert out.shape[-2:] == scaled and out.dtype == torch.uint8 and (out == 7).all()


def test_scores_are_the_mean_softmax_of_the_views(adapter):
    video = adapter()
    video.model = nn.Flatten()
    logits = torch.tensor(
        [[[0.0, 1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0]], [[0.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0]]]
    )
    by_hand = torch.stack([(torch.softmax(a, 0) + torch.softmax(b, 0)) / 2 for a, b in logits])
    found = video._scores(logits[:, :, :, None, None, None])
    assert torch.allclose(found, by_hand)
    assert found[0].argmax() == 0 and logits[0].sum(0).argmax() == 0


def test_pixels_are_normalised_as_upstream_does(adapter):
    x = adapter()._prepare(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.tolist() == pytest.approx([-2.0, 0.55 / 0.225])


def test_the_set_is_the_one_inspected(adapter, root):
    video = adapter("data.subset=20")
    train, val = video.train_dataset(), video.val_dataset()
    assert (len(train), len(val)) == (20, 40)
    x, y = val[7]
    assert x.shape == (2, 3, 4, 36, 36) and y == tiny.MOTIONS.index(Path(val.items[7][0]).parent.name)


def test_a_model_that_takes_no_test_views_says_so_before_it_trains(tmp_path):
    """MViT knows positions of its training crop alone; at the end of the budget it would be too late."""
    tiny_ = cli.recipe(("task=kinetics_tiny", f"out={tmp_path}"))
    cli.embedded_data(tiny_.cfg)
    words = ("task=kinetics", "task.model=mvit_base_16x4", "task.frames=16", "task.stride=1", "task.weights=none",
             "task.scale=[224,224]", "task.batch_size=2", "budget.amount=1it", f"data.root={tiny_.data.root}",
             f"out={tmp_path}")  # fmt: skip
    recipe = cli.recipe(words)
    with pytest.raises(UserError, match=r"task.test_crop=256: mvit_base_16x4 takes no such views.*task.test_crop=224"):
        base.train(recipe)
    assert not (recipe.cell.directory / "metrics.jsonl").read_text()


# Models.


def test_i3d_is_the_published_one(video):
    """28.04 M parameters and 37.53 G multiply-adds at 256 x 256 in pytorchvideo's model zoo, which counts batch norm."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = video.make_model(task(model="i3d_r50"), 400).eval()
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 8, 256, 256)).shape == (1, 400)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(28.04, abs=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(37.53, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "i3d_r50"])
def test_residual_branches_start_at_zero_and_dropout_is_the_recipes(video, name):
    model = video.make_model(task(model=name, dropout=0.25), 5)
    last = [m for m in model.modules() if getattr(m, "block_final_bn", False)]
    assert len(last) == {"tiny": 3, "i3d_r50": 16}[name]
    assert all((m.weight == 0).all() for m in last)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]


@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [
        ("slow_r50", 8, 224),
        ("slowfast_r50", 32, 224),
        ("x3d_xs", 4, 160),
    ],
)
def test_models_of_the_hub_give_logits(video, name, frames, size):
    with torch.device("meta"):
        model = video.make_model(task(model=name), 7)
        assert model(torch.empty(2, 3, frames, size, size)).shape == (2, 7)
    assert not any(isinstance(getattr(m, "activation", None), nn.Softmax) for m in model.modules())


def test_an_unknown_model_or_option_is_refused_in_one_line(video):
    with pytest.raises(UserError, match="task.model=i3d_r5: .*did you mean 'i3d_r50'"):
        video.make_model(task(model="i3d_r5"), 5)
    with pytest.raises(UserError, match="task.model=slow_r50_detection"):  # takes boxes as well
        video.make_model(task(model="slow_r50_detection"), 5)
    with pytest.raises(UserError, match="tiny refuses them: .*widht"):
        video.make_model(task(options={"widht": 4}), 5)
    with pytest.raises(UserError, match="task.dropout=0.5: pytorchvideo's csn_r101 has none"), torch.device("meta"):
        video.make_model(task(model="csn_r101", dropout=0.5), 5)


def test_batch_norm_is_not_decayed(adapter):
    from tasks.base import build_optimizer, decay_groups

    video = adapter()
    plain, norms = build_optimizer(video.cfg, decay_groups(video.make_model(), video.norm_decay)).param_groups
    assert (plain["weight_decay"], norms["weight_decay"]) == (1e-4, 0.0)
    assert plain["nesterov"] and plain["momentum"] == 0.9
    assert all(p.ndim == 1 for p in norms["params"]) and len(norms["params"]) == 2 * (1 + 3 * 4)


def test_the_cost_of_an_iteration_is_that_of_its_batch(adapter):
    assert adapter("task.batch_size=32").flops() == 2 * adapter("task.batch_size=16").flops() > 0


# Weights.


def test_inflated_weights_see_a_still_clip_as_the_picture(video, tmp_path):
    """c2d_r50 has no temporal kernel: with ResNet-50's weights and classifier it is ResNet-50 on every frame."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    images = resnet50(num_classes=9).eval()
    torch.save(images.state_dict(), tmp_path / "r50.pth")
    options = {"head_pool_kernel_size": [4, 2, 2]}
    model = video.make_model(task(model="c2d_r50", options=options, weights=str(tmp_path / "r50.pth")), 9).eval()
    model.blocks[-1].proj.load_state_dict(images.fc.state_dict())
    picture = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model(picture[:, :, None].repeat(1, 1, 8, 1, 1)), images(picture), atol=1e-4)


def test_inflation_divides_a_kernel_over_its_planes(video):
    from torchvision.models import resnet50

    images = resnet50().state_dict()
    own = video.make_model(task(model="i3d_r50"), 5).state_dict()
    state = video.inflate(images, own)
    assert set(own) - set(state) == {"blocks.6.proj.weight", "blocks.6.proj.bias"}
    stem, first = state["blocks.0.conv.weight"], state["blocks.1.res_blocks.0.branch2.conv_a.weight"]
    assert stem.shape == (64, 3, 5, 7, 7) and first.shape == (64, 64, 3, 1, 1)
    assert torch.equal(stem[:, :, 4], images["conv1.weight"] / 5)
    assert torch.equal(first[:, :, 0], images["layer1.0.conv1.weight"] / 3)
    assert torch.equal(state["blocks.5.res_blocks.2.branch2.norm_c.bias"], images["layer4.2.bn3.bias"])


def test_weights_of_another_number_of_classes_lend_all_but_the_classifier(video, tmp_path):
    torch.manual_seed(1)
    source = video.make_model(task(), 400)
    torch.save({"model_state": source.state_dict()}, tmp_path / "k400.pyth")  # as in pytorchvideo's zoo
    model = video.make_model(task(weights=str(tmp_path / "k400.pyth")), 5)
    assert torch.equal(model.blocks[0].conv.weight, source.blocks[0].conv.weight)
    assert model.blocks[-1].proj.weight.shape == (5, 128)


def test_weights_that_do_not_fit_are_refused_in_one_line(video, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(video.make_model(task(options={"depths": [1, 1]}), 5).state_dict(), path)
    with pytest.raises(UserError, match=r"does not fit the model: 24 missing, 2 unknown, 0 of another shape"):
        video.make_model(task(weights=str(path)), 5)
    torch.save({"state_dict": [1, 2]}, path)
    with pytest.raises(UserError, match="holds no state dict"):
        video.make_model(task(weights=str(path)), 5)
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match="not a file of tensors"):
        video.make_model(task(weights=str(path)), 5)
    with pytest.raises(UserError, match="no such file"):
        video.make_model(task(weights="/nope.pt"), 5)


def test_weights_that_would_run_code_are_refused(video, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a file of tensors"):
        video.make_model(task(weights=str(tmp_path / "evil.pt")), 5)
    assert not (tmp_path / "ran").exists()


def test_without_a_network_the_error_says_where_the_weights_are_and_what_else_to_give(video, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as error:
        video.make_model(task(model="i3d_r50", weights="torchvision://resnet50"), 5)
    said = str(error.value)
    assert "cannot be fetched from https://download.pytorch.org/models/resnet50-0676ba61.pth" in said
    assert "give task.weights=PATH, or none" in said and "\n" not in said
    with pytest.raises(UserError, match="torchvision has no such weights"):
        video.make_model(task(weights="torchvision://resnet51"), 5)


# Recipes and cells.


def test_the_recipe_is_the_papers(root):
    recipe = cli.recipe(("task=kinetics", "schedule=step", "budget=100%", f"data.root={root}"))
    rates = [
        recipe.cfg["task"]["lr"] * recipe.schedule(t / recipe.total)
        for t in (0, 149_999, 150_000, 249_999, 250_000, 299_999)
    ]
    assert recipe.total == 300_000
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    assert cli.recipe(("task=kinetics", "budget=1%", f"data.root={root}")).total == 3000


def cell(out: Path, root: Path, *words: str, expect: int = 0) -> dict:
    """Run one kinetics_tiny cell in a process of its own; its result."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "run.py"),
        "task=kinetics_tiny",
        f"out={out}",
        f"data.root={root}",
        *words,
    ]
    environment = {**os.environ, "BUDGETED_BAR": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    (state,) = [json.loads(p.read_text()) for p in out.glob("*/*/*/*/state.json")]
    return state if expect else json.loads(next(out.glob("*/*/*/*/result.json")).read_text())


@pytest.mark.slow
def test_a_cell_is_the_same_for_any_number_of_workers(tmp_path, root):
    words = ("budget.amount=4it", "device=cpu")
    one, other = (cell(tmp_path / str(n), root, f"data.workers={n}", *words) for n in (0, 2))
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["metrics"] == other["metrics"]


@pytest.mark.slow
def test_a_cell_learns_and_more_with_more_budget(tmp_path, root):
    little, much = (
        cell(tmp_path / name, root, f"budget={name}%", "device=cpu")["reported"]["value"] for name in ("10", "100")
    )
    assert much > 0.5 > little  # chance is .2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_too_short_fails_its_cell_and_is_named(tmp_path, root, workers):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(root, folder)
    short = next(iter(sorted(folder.glob("train/*/*.mp4"))))
    write(short, 2)
    state = cell(tmp_path / "out", folder, "budget.amount=6it", f"data.workers={workers}", "device=cpu", expect=1)
    assert state["state"] == "failed"
    assert str(short) in state["error"] and "task.frames=4 are needed" in state["error"]
