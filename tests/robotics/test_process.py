"""`igate run --bag`: stamps are kept, and the answers are the engine's own, as an independent reader sees them."""

from __future__ import annotations

import io
from pathlib import Path

import bags
import numpy as np
import pytest
import tinynet
from igate_command import igate, refused
from PIL import Image

from igate_edge import Engine
from igate_edge.bundle import Bundle
from igate_edge.errors import CheckFailed, DataError
from igate_edge.metrics import make_metric
from igate_edge.robotics import tabletop_bag
from igate_edge.robotics.bag import BagSource, BagWriter
from igate_edge.robotics.messages import CameraInfoMessage, ImageMessage, image_message
from igate_edge.robotics.process import answer_bag
from igate_edge.runtime.frame import Camera

FRAMES = tinynet.frames(6, size=(16, 24))
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tabletop.igate"


def run(bundle: Path, cache: Path, *arguments: object):
    return igate("run", bundle, "--cache", cache, "--precision", "float", *arguments)


def test_a_results_bag_holds_the_engines_answers_under_the_frames_stamps(
    tmp_path: Path, bundle: Path, cache: Path
) -> None:
    stamps = bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    done = run(bundle, cache, "--bag", tmp_path / "in.mcap", "--out", tmp_path / "made" / "out.mcap", "--json")
    assert done.code == 0, done.out + done.err
    assert done.json["frames"] == 6 and done.json["losses"] == [] and done.json["refused"] == {}
    found: dict[str, list] = {}
    for topic, log_ns, message in bags.decoded(tmp_path / "made" / "out.mcap"):
        found.setdefault(topic, []).append((log_ns, message))
    assert set(found) == {
        *(f"/front/igate/{name}" for name in ("segmentation", "depth", "classification", "label_info", "camera_info")),
        "/diagnostics",
    }
    with Engine.open(bundle, precision="float", cache_dir=cache) as engine:
        wanted = [engine(frame) for frame in FRAMES]
    for topic, task in (("segmentation", "seg"), ("depth", "depth")):
        messages = found[f"/front/igate/{topic}"]
        assert [bags.stamp(message) for _, message in messages] == stamps
        assert [log_ns for log_ns, _ in messages] == [stamp + 2_000_000 for stamp in stamps]
        assert all(message.header.frame_id == "front_optical" for _, message in messages)
        for (_, message), answer in zip(messages, wanted, strict=True):
            np.testing.assert_allclose(bags.pixels(message), answer[task], rtol=1e-6)
    tags = [[one.score for one in message.results] for _, message in found["/front/igate/classification"]]
    np.testing.assert_allclose(tags, [answer["tag"] for answer in wanted], rtol=1e-6)
    ((_, label),) = found["/front/igate/label_info"]
    assert [one.class_name for one in label.class_map] == ["floor", "cup", "hand"]
    assert all(list(message.k) == list(bags.CAMERA.k) for _, message in found["/front/igate/camera_info"])
    ((_, health),) = found["/diagnostics"]
    assert health.status[0].level == 0 and health.status[0].message == "every frame was answered"


def test_every_colour_encoding_gives_the_same_answer(tmp_path: Path, bundle: Path, cache: Path) -> None:
    """Case R3, and a camera that changes encoding and size in mid-stream."""
    image, path = FRAMES[0], tmp_path / "in.mcap"
    alpha = np.dstack([image, np.full(image.shape[:2], 9, np.uint8)])
    same = {"rgb8": image, "bgr8": image[..., ::-1], "rgba8": alpha, "bgra8": alpha[..., [2, 1, 0, 3]]}
    with BagWriter(path) as bag:
        for stamp, (encoding, pixels) in enumerate(same.items()):
            bag.write("/c/image", image_message(pixels, encoding, stamp))
        bag.write("/c/image", image_message(image[:8], "rgb8", 10))
        bag.write("/c/image", image_message(image, "32FC3", 11))
    done = run(bundle, cache, "--bag", path, "--out", tmp_path / "out.mcap", "--json")
    assert done.code == 0 and done.json["frames"] == 5
    assert done.json["refused"] == {"/c/image: malformed image message": 1}
    masks = [message for topic, _, message in bags.decoded(tmp_path / "out.mcap") if topic.endswith("/segmentation")]
    assert len({bytes(message.data) for message in masks[:4]}) == 1
    assert [message.height for message in masks] == [16, 16, 16, 16, 8]


def test_two_cameras_depth_in_millimetres_and_a_limit(tmp_path: Path, bundle: Path, cache: Path) -> None:
    path = tmp_path / "in.mcap"
    with BagWriter(path) as bag:
        for stamp, image in enumerate(FRAMES):
            bag.write(f"/{('left', 'right')[stamp % 2]}/image_raw", image_message(image, "rgb8", stamp))
    options = ("--depth-encoding", "16UC1", "--limit", 5, "--json")
    done = run(bundle, cache, "--bag", path, "--out", tmp_path / "out.mcap", *options)
    assert done.json["frames_by_topic"] == {"/left/image_raw": 3, "/right/image_raw": 2}
    messages = [(topic, message) for topic, _, message in bags.decoded(tmp_path / "out.mcap")]
    depth = [(topic, message) for topic, message in messages if topic.endswith("/depth")]
    assert [topic for topic, _ in depth] == [
        f"/{side}/igate/depth" for side in ("left", "right", "left", "right", "left")
    ]
    with Engine.open(bundle, precision="float", cache_dir=cache) as engine:
        metres = engine(FRAMES[0])["depth"]
    assert np.abs(bags.pixels(depth[0][1]) / 1000 - metres).max() <= 0.00051
    assert [topic for topic, _ in messages].count("/right/igate/label_info") == 1


def test_damage_is_named_in_the_answer_and_in_the_results(tmp_path: Path, bundle: Path, cache: Path) -> None:
    path = tmp_path / "in.mcap"
    stamps = bags.camera_bag(path, list(np.random.default_rng(0).integers(0, 255, (20, 60, 80, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:100_000])
    done = run(bundle, cache, "--bag", path, "--out", tmp_path / "out.mcap")
    assert done.code == 0 and "LOST: in.mcap: damaged at byte" in done.out
    found = bags.decoded(tmp_path / "out.mcap")
    kept = [bags.stamp(message) for topic, _, message in found if topic.endswith("/depth")]
    assert kept == stamps[: len(kept)] and 5 <= len(kept) < 20
    (health,) = [message for topic, _, message in found if topic == "/diagnostics"]
    assert health.status[0].level == 1 and "what follows is lost" in health.status[0].message


def test_a_camera_info_of_another_size_is_not_passed_on(tmp_path: Path, bundle: Path, cache: Path) -> None:
    with BagWriter(tmp_path / "in.mcap") as bag:
        bag.write("/c/camera_info", CameraInfoMessage(Camera(640, 480, (1.0,) * 9), 1))
        bag.write("/c/image", image_message(FRAMES[0], "rgb8", 1))
    done = run(bundle, cache, "--bag", tmp_path / "in.mcap", "--out", tmp_path / "out.mcap")
    assert "1 camera_info of /c/image left out: of another size" in done.out
    assert not [topic for topic, _, _ in bags.decoded(tmp_path / "out.mcap") if topic.endswith("camera_info")]


class Failing:
    """An engine that has no answer for its second frame."""

    def __init__(self, engine: Engine) -> None:
        self.tasks, self.report, self._engine, self._count = engine.tasks, engine.report, engine, 0

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self._count += 1
        if self._count == 2:
            raise CheckFailed("the engine gave no usable answer", "NaN", "look")
        return self._engine(image)


def test_a_frame_without_answer_is_counted_and_the_others_are_answered(
    tmp_path: Path, bundle: Path, cache: Path
) -> None:
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    with Engine.open(bundle, precision="float", cache_dir=cache) as engine, BagWriter(tmp_path / "out.mcap") as writer:
        done = answer_bag(Failing(engine), BagSource(tmp_path / "in.mcap"), writer)  # type: ignore[arg-type]
    assert len(done.ms) == 5 and dict(done.failed) == {"/front/image_raw: the engine gave no usable answer": 1}


def test_wrong_use_is_refused_and_writes_nothing(tmp_path: Path, bundle: Path, cache: Path) -> None:
    path = tmp_path / "in.mcap"
    bags.camera_bag(path, FRAMES[:1])
    refused(run(bundle, cache, "--bag", path, "--out", path, "--json"), 2, "overwrite the input")
    refused(run(bundle, cache, "x.png", "--bag", path, "--json"), 2, "two inputs")
    refused(run(bundle, cache, "--json"), 2, "neither INPUT nor --bag")
    out = tmp_path / "out.mcap"
    refused(run(bundle, cache, "--bag", path, "--out", out, "--depth-encoding", "metres", "--json"), 2, "32FC1")
    refused(run(bundle, cache, "--bag", path, "--out", out, "--topic", "/x", "--json"), 2, "/front/image_raw")
    with BagWriter(tmp_path / "bad.mcap") as bag:
        bag.write("/c/image", ImageMessage(1, 1, "8UC2", 2, bytes(2), stamp_ns=1))
    refused(run(bundle, cache, "--bag", tmp_path / "bad.mcap", "--out", out, "--json"), 2, "no frame", "1 of /c/image")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.mcap", "in.mcap"]


# The tabletop bag


@pytest.fixture(scope="module")
def tabletop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mujoco", reason="NOT TESTED: MuJoCo is missing, pip install 'igate-edge[train]'")
    path = tmp_path_factory.mktemp("tabletop") / "in.mcap"
    assert tabletop_bag.main([str(path), "--seconds", "2", "--rate", "4"]) == 0
    return path


def test_the_camera_of_the_tabletop_bag_moves_and_its_labels_follow(tabletop: Path) -> None:
    found: dict[str, list] = {}
    for topic, _, message in bags.decoded(tabletop):
        found.setdefault(topic, []).append(message)
    stamps = [tabletop_bag.START_NS + 250_000_000 * k for k in range(8)]
    assert all([bags.stamp(one) for one in messages] == stamps for messages in found.values())
    depths = [bags.pixels(one) for one in found["/truth/depth"]]
    assert all(np.abs(a - b).mean() > 0.005 for a, b in zip(depths, depths[1:], strict=False))
    first = np.asarray(Image.open(io.BytesIO(bytes(found[tabletop_bag.IMAGE][0].data))))
    assert np.array_equal(first, next(iter(tabletop_bag.frames(2, 4, 7, (96, 128))))["image"])
    # A point at the image's middle is seen along the optical axis: K has the middle between two pixels.
    assert found[tabletop_bag.INFO][0].k[2] == 63.5 and found[tabletop_bag.INFO][0].k[5] == 47.5


def test_metrics_of_the_results_bag_are_the_engines_own(tmp_path: Path, tabletop: Path) -> None:
    """Two readers: ours scores the bag; mcap-ros2-support and Pillow give the engine the frames."""
    out, cache = tmp_path / "out.mcap", tmp_path / "cache"
    assert run(EXAMPLE, cache, "--bag", tabletop, "--out", out).code == 0
    specs = Bundle.read(EXAMPLE).tasks
    scored = tabletop_bag.score(tabletop, out, specs)
    metrics, found = {spec.name: make_metric(spec) for spec in specs}, bags.decoded(tabletop)
    labels = {(topic, bags.stamp(one)): bags.pixels(one) for topic, _, one in found if topic.startswith("/truth/")}
    with Engine.open(EXAMPLE, precision="float", cache_dir=cache) as engine:
        for topic, _, one in found:
            if topic == tabletop_bag.IMAGE:
                outputs = engine(np.asarray(Image.open(io.BytesIO(bytes(one.data)))))
                for spec in specs:
                    metrics[spec.name].update(outputs[spec.name], labels[f"/truth/{spec.target}", bags.stamp(one)])
    assert scored == {name: metric.compute() for name, metric in metrics.items()}
    assert scored["semseg"]["pixel_accuracy"] > 0.8


def test_scores_need_every_frame(tmp_path: Path, tabletop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.mcap"
    assert run(EXAMPLE, tmp_path / "cache", "--bag", tabletop, "--out", out, "--limit", 3).code == 0
    with pytest.raises(DataError, match="8 labels, 3 answers, 3 stamps in both"):
        tabletop_bag.score(tabletop, out, Bundle.read(EXAMPLE).tasks)
    assert tabletop_bag.main([str(tabletop), "--score", str(out), "--bundle", str(EXAMPLE)]) == 2
    assert "other stamps" in capsys.readouterr().err
