"""Tests of s2mts2.py: python -m pytest -q. They need no network and no data but what they make."""

import copy
import csv
import http.server
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from sklearn import metrics
from torch.utils._python_dispatch import TorchDispatchMode

import s2mts2
from s2mts2 import PLAIN, Data, UserError, main, parse_args

SCRIPT = Path(s2mts2.__file__).resolve()

# torchvision announces that its decoders will move to another package one day.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- data


def made_by_hand(channels=1, multilabel=True, count=40, classes=3, side=16, seed=0):
    """A Data of noise; image i shows a bright square if its first target is set."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 120, (count, channels, side, side), np.uint8)
    if multilabel:
        targets = (draw.random((count, classes)) < 0.4).astype(np.float32)
        targets[:4] = 0
    else:
        targets = np.eye(classes, dtype=np.float32)[np.arange(count) % classes]
    images[targets[:, 0] == 1, :, 4:12, 4:12] = 250
    split = draw.permutation(count)
    return Data("mine", images, targets, [f"c{k}" for k in range(classes)], [f"i{k}" for k in range(count)],
                split[:-12], split[-12:], multilabel)


FINDINGS = ["No Finding", "Hernia", "Mass|Nodule", "Effusion", "Pleural_Thickening|Mass"]


@pytest.fixture
def xrays(tmp_path):
    """A Chest X-ray14 folder in the official layout, with 30 images, one RGBA and one RGB among them."""
    root = tmp_path / "xrays"
    (root / "images").mkdir(parents=True)
    draw, names = np.random.default_rng(0), [f"{k // 3:08d}_{k % 3:03d}.png" for k in range(30)]
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
             "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"]
    for k, name in enumerate(names):
        lines.append(f"{name},{FINDINGS[k % 5]},0,{k // 3},50,M,PA,2500,2048,0.168,0.168")
        channels = {3: 4, 4: 3}.get(k, 1)
        image = np.repeat(draw.integers(0, 255, (1, 48, 40), np.uint8), channels, 0)
        if channels == 4:
            image[3] = 255
        torchvision.io.write_png(torch.from_numpy(image[:3]), str(root / "images" / name))
        if channels == 4:
            from PIL import Image
            Image.fromarray(image.transpose(1, 2, 0), "RGBA").save(root / "images" / name)
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(names[:20]) + "\n")
    (root / "test_list.txt").write_text("\n".join(names[20:]))
    return root


def test_digits_are_split_by_class_and_always_alike():
    data = s2mts2.load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.max() == 255 and not data.multilabel
    assert len(data.train) == 1437 and len(data.test) == 360
    assert not set(data.train) & set(data.test)
    shares = data.targets[data.test].mean(0) / data.targets.mean(0)
    assert np.abs(shares - 1).max() < 0.03
    assert (s2mts2.load_data("digits").train == data.train).all()


def test_cxr14_reads_the_official_layout(xrays):
    data = s2mts2.load_data("cxr14", xrays, size=32)
    assert data.images.shape == (30, 1, 32, 32) and data.images.dtype == np.uint8
    assert len(data.train) == 20 and len(data.test) == 10 and data.multilabel
    assert data.names[0] == "00000000_000.png" and data.classes[0] == "Atelectasis"
    assert [data.classes[k] for k in np.flatnonzero(data.targets[4])] == ["Mass", "Pleural_Thickening"]
    assert data.targets[0].sum() == 0 and data.targets[1][data.classes.index("Hernia")] == 1
    for row in (0, 3, 4):
        pixels = torchvision.io.decode_image(str(xrays / "images" / data.names[row]))[:1]
        expected = TF.resize(pixels, [32, 32], antialias=True).int()
        assert (torch.from_numpy(np.array(data.images[row])).int() - expected).abs().max() <= 1


def test_decoded_images_are_kept_and_an_interrupted_build_goes_on(xrays, monkeypatch):
    first = np.array(s2mts2.load_data("cxr14", xrays, size=32).images)
    kept = list(xrays.glob("*.npy"))
    assert len(kept) == 1 and not list(xrays.glob("*.part")) and not list(xrays.glob("*.count"))
    # Kept: the images themselves are not needed again.
    decode = torchvision.io.decode_image
    monkeypatch.setattr(torchvision.io, "decode_image", None)
    assert (np.array(s2mts2.load_data("cxr14", xrays, size=32).images) == first).all()
    # Interrupted after 12 images: those are taken over as they are, the others decoded.
    whole = kept[0].read_bytes()
    kept[0].rename(kept[0].with_suffix(".part"))
    kept[0].with_suffix(".count").write_text("12")
    seen = []
    monkeypatch.setattr(torchvision.io, "decode_image", lambda file, mode: seen.append(file) or decode(file, mode))
    s2mts2.load_data("cxr14", xrays, size=32)
    assert len(seen) == 18 and kept[0].read_bytes() == whole
    # Another size is another file, and --cache another place.
    s2mts2.load_data("cxr14", xrays, size=24, cache=xrays / "elsewhere")
    assert len(list((xrays / "elsewhere").glob("*.npy"))) == 1


def test_cxr14_is_found_in_each_layout(xrays):
    expected = np.array(s2mts2.load_data("cxr14", xrays, size=32).images)
    (xrays / "Data_Entry_2017_v2020.csv").rename(xrays / "Data_Entry_2017.csv")
    (xrays / "images").rename(xrays / "data")
    next(xrays.glob("*.npy")).unlink()
    assert (s2mts2.load_data("cxr14", xrays, size=32).images == expected).all()
    next(xrays.glob("*.npy")).unlink()
    for k, file in enumerate(sorted((xrays / "data").iterdir())):
        folder = xrays / f"images_{1 + k // 10:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    (xrays / "data").rmdir()
    assert (s2mts2.load_data("cxr14", xrays, size=32).images == expected).all()


def test_a_recipe_is_not_changed_by_whoever_changes_his_copy():
    parse_args(["pretrain"]).augment["flip_p"] = 0.5
    assert parse_args(["pretrain"]).augment["flip_p"] == 0


def test_partial_without_any_image_says_so(xrays):
    for image in (xrays / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="no image to decode"):
        s2mts2.load_data("cxr14", xrays, size=32, partial=True)


def test_partial_takes_the_images_that_are_there(xrays, capsys):
    for name in ("00000000_001.png", "00000001_000.png", "00000002_000.png", "00000009_002.png"):
        (xrays / "images" / name).unlink()
    with pytest.raises(UserError, match="4 of 30 images are missing: .*00000002_000.png ...; .*--partial"):
        s2mts2.load_data("cxr14", xrays, size=32)
    data = s2mts2.load_data("cxr14", xrays, size=32, partial=True)
    assert "26 of 30 images are there" in capsys.readouterr().out
    assert (len(data.images), len(data.train), len(data.test)) == (26, 17, 9)
    row = data.names.index("00000001_001.png")
    pixels = torchvision.io.decode_image(str(xrays / "images/00000001_001.png"), torchvision.io.ImageReadMode.GRAY)
    expected = TF.resize(pixels, [32, 32], antialias=True).int()
    assert (torch.from_numpy(np.array(data.images[row])).int() - expected).abs().max() <= 1
    assert [data.classes[k] for k in np.flatnonzero(data.targets[row])] == ["Mass", "Pleural_Thickening"]


def write_jpeg(file, side=(40, 30), colours=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = F.interpolate(torch.rand(1, colours, 5, 4) * 255, side, mode="bicubic").clamp(0, 255)
    torchvision.io.write_jpeg(pixels[0].to(torch.uint8), str(file))


def chexpert(folder, prefix="CheXpert-v1.0-small"):
    """A CheXpert folder: 40 patients with a frontal and a lateral view; uncertain and blank entries."""
    lines = ["Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(s2mts2.CHEXPERT_CLASSES)]
    values = ["1.0", "0.0", "-1.0", ""]
    for k in range(80):
        name = f"train/patient{k // 2:05d}/study1/view{k % 2 + 1}_{'lateral' if k % 2 else 'frontal'}.jpg"
        write_jpeg(folder / name)
        findings = ",".join(values[(k // 2 + j) % 4] for j in range(14))
        lines.append(f"{prefix}/{name},Female,68,{'Lateral,' if k % 2 else 'Frontal,AP'},{findings}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_chexpert_is_split_by_patient(tmp_path, prefix):
    folder = chexpert(tmp_path / prefix, prefix)
    data = s2mts2.load_data("chexpert", tmp_path, size=24)
    assert data.images.shape == (80, 1, 24, 24) and len(data.classes) == 14 and data.multilabel
    assert (len(data.train), len(data.test)) == (56, 16)
    held = s2mts2.load_data("chexpert", folder, size=24, validation=True)
    assert (len(held.train), len(held.test)) == (56, 8) and (held.train == data.train).all()
    patients = [{data.names[k].split("/")[1] for k in part} for part in (data.train, data.test, held.test)]
    assert [len(part) for part in patients] == [28, 8, 4] and len(set.union(*patients)) == 40
    # By a hash, so the same for good.
    assert sorted(patients[2]) == ["patient00005", "patient00011", "patient00037", "patient00039"]
    assert "train/patient00003/study1/view2_lateral.jpg" in data.names
    # 1, 0, uncertain, blank, for each patient from another finding on.
    assert data.targets[0].tolist() == data.targets[1].tolist() == [1, 0, 0, 0] * 3 + [1, 0]
    ones = s2mts2.load_data("chexpert", tmp_path, size=24, uncertain="ones")
    assert ones.targets[0].tolist() == [1, 0, 1, 0] * 3 + [1, 0]


def isic(root, groupings=True):
    """An ISIC2018 folder: 12 images of each class, two of each lesion."""
    prefix, draw = "ISIC2018_Task3_Training_", np.random.default_rng(0)
    rows, lesions = [], ["image,lesion_id,diagnosis_confirm_type"]
    for k in draw.permutation(84):
        name = f"ISIC_{24306 + k:07d}"
        write_jpeg(root / f"{prefix}Input" / f"{name}.jpg", (30, 40), 3)
        rows.append(name + "," + ",".join("1.0" if k % 7 == j else "0.0" for j in range(7)))
        lesions.append(f"{name},HAM_{k % 7}{k // 14},histopathology")
    (root / f"{prefix}GroundTruth").mkdir()
    (root / f"{prefix}GroundTruth" / f"{prefix}GroundTruth.csv").write_text(
        "\n".join(["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", *rows]) + "\n")
    if groupings:
        (root / f"{prefix}LesionGroupings.csv").write_text("\n".join(lesions) + "\n")
    return root


@pytest.mark.parametrize("groupings", [True, False])
def test_isic_is_split_by_class_and_lesion(tmp_path, groupings, capsys):
    data = s2mts2.load_data("isic2018", isic(tmp_path, groupings), size=24)
    assert data.images.shape == (84, 3, 24, 24) and not data.multilabel
    assert data.classes == ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    number = np.array([int(name[5:]) - 24306 for name in data.names])
    assert (data.targets.argmax(1) == number % 7).all()
    # One lesion in five, rounded, of 6 with two images each or of 12 with one.
    assert (data.targets[data.test].sum(0) == 2).all() and len(data.train) == 70
    lesions = [set(zip(number[part] % 7, number[part] // 14)) for part in (data.train, data.test)]
    assert groupings == (not lesions[0] & lesions[1])
    assert groupings != ("images of one lesion may be in train and test" in capsys.readouterr().out)


@pytest.mark.parametrize("make, file, spoil, words", [
    (chexpert, "train.csv", lambda text: text.replace("AP/PA", "PA/AP"), "does not have the columns Path, Sex"),
    (chexpert, "train.csv", lambda text: "", "does not have the columns"),
    (chexpert, "train.csv", lambda text: text.replace("0.0", "0.5", 1), "repeated line .*patient"),
    (chexpert, "train.csv", lambda text: text[:-2].rpartition(",")[0], "repeated line .*patient00039"),
    (chexpert, "train.csv", lambda text: text.replace("study1/", "", 1), "repeated line .*patient00000"),
    (chexpert, "train.csv", lambda text: text + text.splitlines()[1], "repeated line .*patient00000"),
    (chexpert, "train.csv", lambda text: text + text.splitlines()[2].replace("-small", ""), "repeated line .*view2"),
    (chexpert, "train.csv", lambda text: text + "x" * 200_000, "not a table"),
    (isic, "{0}GroundTruth/{0}GroundTruth.csv", lambda text: text.replace(",VASC", ""), "columns image, MEL"),
    (isic, "{0}GroundTruth/{0}GroundTruth.csv", lambda text: text.replace("1.0", "0.0", 1), "repeated line .*ISIC_"),
    (isic, "{0}GroundTruth/{0}GroundTruth.csv", lambda text: text.replace("0.0", "1.0", 1), "repeated line .*ISIC_"),
    (isic, "{0}LesionGroupings.csv", lambda text: text + "ISIC_0024306\n", "repeated line .*ISIC_0024306"),
])
def test_broken_tables_of_the_other_sets_are_named(tmp_path, make, file, spoil, words):
    path = make(tmp_path) / file.format("ISIC2018_Task3_Training_")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=words):
        s2mts2.load_data(make.__name__.replace("isic", "isic2018"), tmp_path, size=24)
    assert not list(tmp_path.rglob("*px-*"))


def medmnist(monkeypatch, root, name, side=28, rows=(20, 4, 6), seed=0):
    """A file of MedMNIST's shape, whose checksum and row counts the program knows."""
    draw, classes = np.random.default_rng(seed), s2mts2.MEDMNIST[name][0]
    colours = (3,) if name == "dermamnist" else ()
    arrays = {}
    for split, count in zip(("train", "val", "test"), rows):
        arrays[f"{split}_images"] = draw.integers(0, 255, (count, side, side, *colours), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count)[:, None] % 7 if colours else
                                     draw.integers(0, 2, (count, len(classes)))).astype(np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    file = root / (f"{name}.npz" if side == 28 else f"{name}_{side}.npz")
    np.savez_compressed(file, **arrays)
    known = {28: "0", 64: "0", 128: "0", 224: "0", side: torchvision.datasets.utils.calculate_md5(file)}
    monkeypatch.setitem(s2mts2.MEDMNIST, name, (classes, dict(zip(("train", "val", "test"), rows)), known))
    return file, arrays


@pytest.mark.parametrize("name, size, side", [
    ("chestmnist", 28, 28), ("chestmnist", 40, 64), ("dermamnist", 16, 28), ("dermamnist", 64, 64),
    ("dermamnist", 300, 224)])
def test_medmnist_reads_the_file_of_the_size(tmp_path, monkeypatch, name, size, side):
    file, arrays = medmnist(monkeypatch, tmp_path, name, side)
    data = s2mts2.load_data(name, tmp_path, size=size)
    colours = 3 if name == "dermamnist" else 1
    assert data.images.shape == (30, colours, side, side)
    assert (len(data.train), len(data.test)) == (24, 6) and data.names[24] == "test00000"
    for row, key, index in ((3, "train", 3), (21, "val", 1), (25, "test", 1)):
        expected = arrays[f"{key}_images"][index]
        assert (data.images[row] == (expected.transpose(2, 0, 1) if colours == 3 else expected)).all()
    if colours == 3:
        assert data.classes == ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"] and not data.multilabel
        assert (data.targets.argmax(1)[:20] == np.arange(20) % 7).all()
    else:
        assert data.multilabel and (data.targets[:20] == arrays["train_labels"]).all()
    # The second time the images are not unpacked again.
    monkeypatch.setattr(s2mts2, "unpack_images", None)
    assert (s2mts2.load_data(name, tmp_path, size=size).images == data.images).all()


def test_altered_files_of_medmnist_are_refused_and_stay(tmp_path, monkeypatch):
    file, _ = medmnist(monkeypatch, tmp_path, "dermamnist")
    whole = file.read_bytes()
    for spoilt in (whole[:len(whole) // 2], whole[:-9] + b"x" + whole[-8:], b""):
        file.write_bytes(spoilt)
        with pytest.raises(UserError, match="dermamnist.npz is not the published file .*move it away"):
            s2mts2.load_data("dermamnist", tmp_path, size=28)
        assert file.read_bytes() == spoilt and [path.name for path in tmp_path.iterdir()] == ["dermamnist.npz"]
    file.write_bytes(whole)
    classes, rows, known = s2mts2.MEDMNIST["dermamnist"]
    monkeypatch.setitem(s2mts2.MEDMNIST, "dermamnist", (classes, dict(rows, val=5), known))
    with pytest.raises(UserError, match="does not have 20 . 5 . 6 rows"):
        s2mts2.load_data("dermamnist", tmp_path, size=28)


def test_medmnist_is_downloaded_and_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    file, _ = medmnist(monkeypatch, tmp_path / "server", "dermamnist")
    whole, sent, asked = file.read_bytes(), 1000, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:sent])

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(s2mts2, "MEDMNIST_URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        # Every answer breaks off.
        with pytest.raises(UserError, match=r"http://127.0.0.1.*/dermamnist.npz.*by hand.*mine/dermamnist.npz"):
            s2mts2.load_data("dermamnist", tmp_path / "mine", size=28)
        assert asked and not list((tmp_path / "mine").iterdir())
        sent = len(whole)
        assert len(s2mts2.load_data("dermamnist", tmp_path / "mine", size=28).images) == 30
        assert (tmp_path / "mine/dermamnist.npz").read_bytes() == whole and "dermamnist.npz" in asked[-1]
    finally:
        server.shutdown()
        server.server_close()
    # No network at all.
    with pytest.raises(UserError, match="by hand"):
        s2mts2.load_data("dermamnist", tmp_path / "other", size=28)
    assert not list((tmp_path / "other").iterdir())


def test_a_killed_build_of_the_cache_goes_on_to_the_same_bytes(tmp_path):
    """Killed five times, each time when a few more images are decoded."""
    files = {}
    for k in range(60):
        files[f"{k}.jpg"] = str(tmp_path / f"{k}.jpg")
        write_jpeg(tmp_path / f"{k}.jpg")
    script = """
import os, signal, sys, threading
import s2mts2
left, lock, write_text = [int(sys.argv[2])], threading.Lock(), s2mts2.write_text
decode = s2mts2.torchvision.io.decode_image
def dying(*arguments):
    with lock:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return decode(*arguments)
s2mts2.torchvision.io.decode_image = dying
s2mts2.DECODE_BLOCK, s2mts2.THREAD_BLOCK = 8, 2
s2mts2.decode_images({f"{k}.jpg": f"{k}.jpg" for k in range(60)}, 16, 1, sys.argv[1])
"""
    run = lambda cache, life: subprocess.run(
        [sys.executable, "-c", script, cache, str(life)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    assert run("whole", 0).returncode == 0
    for life in (3, 11, 19, 24, 9):
        assert run("killed", life).returncode == -9 and not list(Path("killed").glob("*.npy"))
    assert run("killed", 0).returncode == 0
    one, other = (next(Path(folder).iterdir()) for folder in ("whole", "killed"))
    assert one.name == other.name and one.read_bytes() == other.read_bytes()
    assert len(list(Path("killed").iterdir())) == 1


def test_what_does_not_fit_is_refused_before_images_are_decoded(xrays, capsys):
    command = f"pretrain --data cxr14 --root {xrays} --size 32 --arch tiny --init random --epochs 1 --batch 4".split()
    assert main(command) == 0
    next(xrays.glob("*.npy")).unlink()
    scratch = ["finetune", "--from", "scratch", "--arch", "tiny", *command[1:7]]
    for words, reason in ((command + ["--batch", "400"], "more than the"), (command + ["--lr", ".1"], "lr 0.03 there"),
                          (command + ["--out", "new", "--batch", "400"], "more than the"),
                          (scratch + ["--labels", "3"], "one of each class")):
        assert main(words) == 2
        assert reason in capsys.readouterr().err and not list(xrays.glob("*px-*")) and not Path("new").exists()


def test_an_image_that_was_replaced_is_decoded_again(xrays):
    before = np.array(s2mts2.load_data("cxr14", xrays, size=32).images)
    file = xrays / "images/00000003_001.png"
    assert file.exists()
    torchvision.io.write_png(torch.full((1, 50, 50), 77, dtype=torch.uint8), str(file))
    after = s2mts2.load_data("cxr14", xrays, size=32)
    changed = (after.images != before).any((1, 2, 3))
    assert [after.names[index] for index in np.flatnonzero(changed)] == [file.name]


def test_a_cache_that_cannot_be_kept_or_is_cut_is_explained(xrays):
    with pytest.raises(UserError, match="--cache"):
        s2mts2.load_data("cxr14", xrays, size=32, cache=xrays / "test_list.txt" / "x")
    s2mts2.load_data("cxr14", xrays, size=32)
    kept = next(xrays.glob("*.npy"))
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(UserError, match="delete it"):
        s2mts2.load_data("cxr14", xrays, size=32)


@pytest.mark.parametrize("change, rule", [
    (dict(images=np.zeros((40, 16, 16), np.uint8)), "uint8"),
    (dict(images=np.zeros((40, 1, 16, 16), np.float32)), "uint8"),
    (dict(targets=np.zeros((40, 4))), "targets"), (dict(targets=np.full((40, 3), 0.5)), "0 or 1"),
    (dict(multilabel=False), "one-hot"), (dict(names=["a"] * 40), "name"), (dict(test=[]), "empty"),
    (dict(test=[40]), "index"), (dict(test=[1, 1]), "twice"), (dict(train=[1], test=[1]), "twice"),
])
def test_data_made_by_hand_is_checked(change, rule):
    data = made_by_hand()
    with pytest.raises(UserError, match=rule):
        Data(**{**vars(data), **change})


# ------------------------------------------------------------------------------------ labelled subset


def test_numbers_may_serve_as_names():
    data = Data(**{**vars(made_by_hand()), "classes": range(3), "names": np.arange(40)})
    assert data.classes == ["0", "1", "2"] and data.names[-1] == "39"
    s2mts2.fingerprint_of(data)


def long_tailed():
    """1,000 training images: class 0 on 500, class 1 on 100, class 2 on 3 of them; 397 without finding."""
    targets = np.zeros((1010, 3), np.float32)
    targets[:500, 0] = targets[450:550, 1] = targets[600:603, 2] = 1
    return Data("tail", np.zeros((1010, 1, 8, 8), np.uint8), targets, ["a", "b", "c"],
                [f"{k}.png" for k in range(1010)], np.arange(1000), np.arange(1000, 1010), True)


def test_the_labelled_are_a_share_of_each_class_and_at_least_one():
    data = long_tailed()
    without = data.targets[:1000].sum(1) == 0
    sizes = set()
    for seed in range(20):
        chosen = s2mts2.choose_labelled(data, 0.02, seed)
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all() and chosen.max() < 1000
        of_class = data.targets[chosen].sum(0)
        # Drawn 10, 2, 1 and 9 of 447; a draw of one class may fall on an image of another as well.
        assert of_class[0] >= 10 and of_class[1] >= 2 and of_class[2] == 1
        assert without[chosen].sum() == round(0.02 * without.sum())
        assert 22 - 3 <= len(chosen) <= 22
        sizes.add(tuple(chosen))
    assert len(sizes) == 20
    assert (s2mts2.choose_labelled(data, 0.02, 7) == s2mts2.choose_labelled(data, 0.02, 7)).all()
    digits = s2mts2.load_data("digits")
    counts = digits.targets[s2mts2.choose_labelled(digits, 0.02, 0)].sum(0)
    assert (counts == np.round(0.02 * digits.targets[digits.train].sum(0))).all()


@pytest.mark.parametrize("number", [4, 50, 777, 1000])
def test_a_number_of_labels_is_met_exactly_with_every_class(number):
    data = long_tailed()
    chosen = s2mts2.choose_labelled(data, number, 3)
    assert len(np.unique(chosen)) == number and (data.targets[chosen].sum(0) >= 1).all()
    assert (data.targets[chosen].sum(1) == 0).any()
    if number >= 50:
        assert abs(data.targets[chosen, 0].mean() - 0.5) < 0.1


def test_the_labelled_can_be_written_and_read_again(tmp_path):
    data = long_tailed()
    chosen = s2mts2.choose_labelled(data, 0.05, 1)
    (tmp_path / "list.txt").write_text("".join(data.names[k] + "\n" for k in chosen[::-1]) + "\n")
    assert (s2mts2.choose_labelled(data, str(tmp_path / "list.txt"), 99) == chosen).all()


@pytest.mark.parametrize("labels", [3, 1001, "nowhere.txt", "empty.txt", "stranger.txt", "test.txt"])
def test_labels_that_do_not_fit_are_refused(labels, tmp_path):
    for name, text in (("empty", "\n"), ("stranger", "1.png\nx.png\n"), ("test", "1005.png\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError):
        s2mts2.choose_labelled(long_tailed(), labels, 0)


# ------------------------------------------------------------------------------------------------ views


def photo(count=3, channels=3, side=48):
    """Smooth random images in 0..1."""
    return F.interpolate(torch.rand(count, channels, 6, 6), (side, side), mode="bicubic").clamp(0, 1)


def normalised(images):
    mean, std = torch.tensor(s2mts2.MEAN), torch.tensor(s2mts2.STD)
    if images.shape[1] == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def column(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_view_is_the_normalised_image(channels):
    images = (photo(channels=channels) * 255).to(torch.uint8)
    before = images.clone()
    views = s2mts2.random_views(images, PLAIN, 48)
    assert views.dtype == torch.float32 and (images == before).all()
    assert torch.allclose(views, normalised(images / 255), atol=1e-6)
    smaller = s2mts2.random_views(images, PLAIN, 20)
    resized = TF.resize(images / 255, [20, 20], antialias=True)
    assert torch.allclose(smaller, normalised(resized), atol=1e-5)
    # Zero strengths at full probability are no change either.
    idle = dict(PLAIN, rotate_p=1.0, jitter_p=1.0)
    assert torch.allclose(s2mts2.random_views(images, idle, 48), views, atol=1e-5)


def test_crop_agrees_with_torchvision():
    images = photo()
    views = s2mts2.crop_rotate_flip(images, column(.25, .125, .5), column(.125, .25, .25), column(.5, .5, .25),
                                    column(.5, .25, .5), torch.zeros(3), torch.zeros(3), torch.zeros(3))
    for k, (top, left, height, width) in enumerate([(6, 12, 24, 24), (12, 6, 12, 24), (12, 24, 24, 12)]):
        expected = TF.resize(TF.crop(images[k], top, left, height, width), [48, 48], antialias=False)
        inner = slice(4, -4)
        # torchvision cannot look beyond the crop's border, so compare inside.
        assert (views[k] - expected)[:, inner, inner].abs().max() < 1e-5


def test_flip_and_rotation_agree_with_torchvision():
    images, zero, one = photo(), torch.zeros(3), torch.ones(3)
    flipped = s2mts2.crop_rotate_flip(images, zero, zero, one, one, zero, column(1, 0, 0), column(0, 0, 1))
    for k, expected in enumerate((TF.hflip(images[0]), images[1], TF.vflip(images[2]))):
        assert torch.allclose(flipped[k], expected, atol=1e-6)
    angles = column(10, -7, 90)
    turned = s2mts2.crop_rotate_flip(images, zero, zero, one, one, angles, zero, zero)
    both = s2mts2.crop_rotate_flip(images, zero, zero, one, one, angles, one, one)
    for k in range(3):
        expected = TF.rotate(images[k], float(angles[k]), TF.InterpolationMode.BILINEAR)
        assert torch.allclose(turned[k], expected, atol=1e-5)
        assert torch.allclose(both[k], TF.vflip(TF.hflip(expected)), atol=1e-5)


def test_crop_then_rotation_then_flip_in_one_agree_with_one_after_another():
    images = photo(1, 1, 64)
    view = s2mts2.crop_rotate_flip(images, column(.25), column(.25), column(.5), column(.5), column(20), column(1),
                                   column(0))
    cropped = TF.resized_crop(images, 16, 16, 32, 32, [64, 64], antialias=False)
    expected = TF.hflip(TF.rotate(cropped, 20, TF.InterpolationMode.BILINEAR))
    assert (view - expected)[..., 16:48, 16:48].abs().max() < 0.01


def test_brightness_contrast_and_saturation_agree_with_torchvision():
    images, one, zero = photo(), torch.ones(3), torch.zeros(3)
    factors = column(.6, 1.3, 1.4)
    for place, theirs in ((1, TF.adjust_brightness), (2, TF.adjust_contrast), (3, TF.adjust_saturation)):
        settings = [one, one, one, zero]
        settings[place - 1] = factors
        changed = s2mts2.jitter_colours(images, *settings)
        for k in range(3):
            assert (changed[k] - theirs(images[k], float(factors[k]))).abs().max() < 0.005
    grey = s2mts2.jitter_colours(images[:, :1], factors, one, one * 5, one)
    assert torch.allclose(grey[1], TF.adjust_brightness(images[1, :1], 1.3), atol=1e-6)
    assert (TF.adjust_contrast(images[0, :1], .6) - s2mts2.jitter_colours(
        images[:, :1], one, factors, one, zero)[0]).abs().max() < 1e-5


def test_hue_turns_colours_and_keeps_grey_levels():
    images = photo() * 0.2 + 0.4
    one = torch.ones(3)
    assert torch.allclose(s2mts2.jitter_colours(images, one, one, one, one), images, atol=1e-3)
    turned = s2mts2.jitter_colours(images, one, one, one, one * 0.5)
    assert (turned - images).abs().max() > 0.05
    assert (TF.rgb_to_grayscale(turned) - TF.rgb_to_grayscale(images)).abs().max() < 0.005
    thrice = images
    for _ in range(3):
        thrice = s2mts2.jitter_colours(thrice, one, one, one, one / 3)
    assert torch.allclose(thrice, images, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_torchvision(channels):
    images, sigma = torch.rand(3, channels, 48, 40), column(0.1, 1.0, 2.0)
    blurred = s2mts2.gaussian_blur(images, sigma, 2.0)
    for k in range(3):
        expected = TF.gaussian_blur(images[k], [13, 13], [float(sigma[k])] * 2)
        assert torch.allclose(blurred[k], expected, atol=1e-5)


def test_erase_clears_exactly_the_rectangle():
    erased = s2mts2.erase(torch.ones(2, 3, 8, 8), column(.25, 0), column(.5, 0), column(.5, 0), column(.25, 1))
    expected = torch.ones(2, 3, 8, 8)
    expected[0, :, 4:6, 2:6] = 0
    assert (erased == expected).all()


STRONG = dict(centre=0.1, crop=0.8, vertical_flip_p=0.5, rotate=10.0, rotate_p=0.5, flip_p=0.5, jitter=0.4, hue=0.4, jitter_p=0.8, blur=2.0,
              blur_p=0.5, erase_p=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_copy_of_an_image_gets_its_own_view_and_a_seed_repeats_them(channels):
    copies = photo(1, channels).mul(255).to(torch.uint8).expand(16, -1, -1, -1)
    assert set(STRONG) == set(PLAIN)
    torch.manual_seed(5)
    views = s2mts2.random_views(copies, STRONG, 32)
    assert views.shape == (16, channels, 32, 32) and views.isfinite().all()
    assert torch.cdist(views.flatten(1), views.flatten(1)).add(torch.eye(16)).min() > 0.1
    torch.manual_seed(5)
    assert (s2mts2.random_views(copies, STRONG, 32) == views).all()
    torch.manual_seed(6)
    assert (s2mts2.random_views(copies, STRONG, 32) != views).any()


@pytest.mark.parametrize("strength, share", [
    (dict(flip_p=0.5), 0.5), (dict(vertical_flip_p=0.3), 0.3), (dict(rotate=10.0, rotate_p=0.3), 0.3), (dict(jitter=0.4, jitter_p=0.8), 0.8),
    (dict(blur=2.0, blur_p=0.5), 0.5), (dict(erase_p=0.5), 0.5), (dict(crop=0.8), 1.0)])
def test_each_strength_changes_its_share_of_the_views(strength, share):
    copies = photo(1, 1, 24).expand(400, -1, -1, -1)
    plain = s2mts2.random_views(copies, PLAIN, 24)
    views = s2mts2.random_views(copies, dict(PLAIN, **strength), 24)
    changed = ((views - plain).abs().flatten(1).amax(1) > 1e-3).float().mean()
    assert abs(changed - share) < 0.1


def test_brightness_and_hue_change_the_same_views():
    copies = photo(1, 3, 16).expand(600, -1, -1, -1)
    views = s2mts2.random_views(copies, dict(PLAIN, jitter=0.4, hue=0.4, jitter_p=0.5), 16)
    changed = ((views - s2mts2.random_views(copies, PLAIN, 16)).abs().flatten(1).amax(1) > 1e-3).float().mean()
    assert abs(changed - 0.5) < 0.1


def test_crops_keep_the_share_of_the_area_that_they_should(monkeypatch):
    seen = []
    monkeypatch.setattr(s2mts2, "crop_rotate_flip", lambda images, *draws: seen.append(draws) or images)
    s2mts2.random_views(torch.zeros(4000, 1, 4, 4), dict(PLAIN, crop=0.8), 4)
    left, top, width, height = seen[0][:4]
    area = width * height
    assert 0.199 < area.min() < 0.25 and 0.95 < area.max() <= 1
    assert abs(area.mean() - 0.58) < 0.03 and (width / height).max() <= 4 / 3 + 1e-4
    assert left.min() >= 0 and (left + width).max() <= 1.00001 and (top + height).max() <= 1.00001


def test_the_centre_is_cut_out_of_every_view():
    images = photo(2, 3, 48)
    views = s2mts2.random_views(images, dict(PLAIN, centre=0.25), 48)
    expected = normalised(TF.resize(images[..., 6:42], [48, 48], antialias=False))
    assert (views - expected)[..., 4:-4].abs().max() < 1e-4
    noisy = dict(PLAIN, centre=0.25, crop=0.5)
    borders = torch.ones(200, 1, 40, 40)
    borders[..., 4:36] = 0.5
    assert s2mts2.random_views(borders, noisy, 40).max() <= normalised(torch.full((1, 1, 1, 1), 0.5)).item() + 1e-5


# ---------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("arch", ["densenet121", "tiny"])
def test_a_grey_network_is_the_colour_network_on_a_grey_image(arch):
    torch.manual_seed(1)
    colour = s2mts2.build_network(arch, 3, 5).eval()
    torch.manual_seed(1)
    grey = s2mts2.build_network(arch, 1, 5).eval()
    grey.classifier.load_state_dict(colour.classifier.state_dict())
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-4)
    assert grey.features.conv0.weight.shape[1] == 1
    assert isinstance(grey, torchvision.models.DenseNet)


def test_the_heads_have_the_shapes_of_their_stages():
    mlp = s2mts2.build_network("tiny", 1, 32, "mlp")
    assert [type(layer).__name__ for layer in mlp.classifier] == ["Linear", "ReLU", "Linear"]
    assert mlp(torch.randn(2, 1, 32, 32)).shape == (2, 32)
    assert isinstance(s2mts2.build_network("tiny", 3, 7).classifier, torch.nn.Linear)


def test_imagenet_weights_are_used_and_their_absence_is_explained(monkeypatch):
    torch.manual_seed(3)
    weights = torchvision.models.densenet121().state_dict()
    # The published file has older names for the layers of a block: norm.1 for norm1.
    published = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
                 for name, value in weights.items() if "num_batches" not in name}
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: dict(published))
    network = s2mts2.build_network("densenet121", 1, 14, imagenet=True)
    assert torch.equal(network.features.conv0.weight, weights["features.conv0.weight"].sum(1, keepdim=True))
    weight = "denseblock1.denselayer1.conv1.weight"
    assert torch.equal(network.features.state_dict()[weight], weights[f"features.{weight}"])

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="https://.*densenet121.*checkpoints.*--init random"):
        s2mts2.build_network("densenet121", 1, 14, imagenet=True)


# -------------------------------------------------------------------------------------------- teacher


def test_ema_matches_its_closed_form():
    student = s2mts2.build_network("tiny", 1, 4).double()
    teacher = s2mts2.make_teacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        student.features.norm0.running_var.fill_(3)
        student.features.norm0.num_batches_tracked.fill_(17)
    before, places = copy.deepcopy(teacher.state_dict()), [p.data_ptr() for p in teacher.parameters()]
    untouched = copy.deepcopy(student.state_dict())
    for _ in range(7):
        s2mts2.ema_update(teacher, student, 0.9)
    assert places == [p.data_ptr() for p in teacher.parameters()]
    for name, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], untouched[name])
        expected = untouched[name]
        if value.is_floating_point():
            expected = 0.9 ** 7 * before[name] + (1 - 0.9 ** 7) * untouched[name]
        assert torch.allclose(value, expected, atol=1e-12), name
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teachers_batchnorm_uses_the_batch_and_is_not_moved_by_it():
    student = s2mts2.build_network("tiny", 1, 4)
    teacher = s2mts2.make_teacher(student).train()
    before = copy.deepcopy(teacher.state_dict())
    images = torch.randn(8, 1, 32, 32) * 5 + 3
    with torch.no_grad():
        training, plain = teacher(images), student.train()(images)
    assert torch.allclose(training, plain, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    # In evaluation mode it does use the running statistics that ema_update gave it.
    teacher.eval()
    with torch.no_grad():
        one = teacher(images)[0]
        assert torch.allclose(one, teacher(images[:1])[0], atol=1e-4)
        assert not torch.allclose(one, training[0], atol=1e-3)
        teacher.features.norm0.running_mean.add_(1)
        assert not torch.allclose(one, teacher(images)[0], atol=1e-3)


# ---------------------------------------------------------------------------- joint contrastive loss


def embeddings(images=6, keys=4, dim=10, negatives=30, dtype=torch.float64):
    query = F.normalize(torch.randn(images, dim, dtype=dtype), dim=1)
    spread = torch.randn(images, keys, dim, dtype=dtype) * 0.5
    return (query, F.normalize(query.detach()[:, None] + spread, dim=2),
            F.normalize(torch.randn(negatives, dim, dtype=dtype), dim=1))


def loss_with_covariance_matrices(query, keys, queue, temperature, weight):
    losses = []
    for q, k in zip(query, keys):
        mean = k.mean(0)
        covariance = sum(torch.outer(one - mean, one - mean) for one in k) / len(k)
        positive = q @ mean / temperature + weight / (2 * temperature ** 2) * q @ covariance @ q
        negatives = sum(torch.exp(q @ n / temperature) for n in queue)
        losses.append(torch.log(torch.exp(positive) + negatives) - q @ mean / temperature)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0, 2.0])
def test_the_loss_equals_its_definition_in_value_and_gradient(weight):
    query, keys, queue = embeddings()
    query.requires_grad_()
    short = s2mts2.joint_contrastive_loss(query, keys, queue, 0.3, weight)
    long = loss_with_covariance_matrices(query, keys, queue, 0.3, weight)
    assert abs(short - long) < 1e-9
    ours, = torch.autograd.grad(short, query)
    theirs, = torch.autograd.grad(long, query)
    assert (ours - theirs).abs().max() < 1e-9


def test_with_one_key_the_loss_is_infonce():
    query, keys, queue = embeddings(keys=1)
    logits = torch.cat([(query * keys[:, 0]).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    for weight in (0.0, 1.0):
        assert abs(s2mts2.joint_contrastive_loss(query, keys, queue, 0.2, weight) - expected) < 1e-12


def test_the_loss_bounds_the_mean_over_many_gaussian_keys():
    query, keys, queue = embeddings(images=3, keys=5, negatives=200)
    temperature = 0.2
    bound = s2mts2.joint_contrastive_loss(query, keys, queue, temperature, 1.0)
    mean = keys.mean(1, keepdim=True)
    # mean + sum_m z_m (k_m - mean) / sqrt(M) has exactly the mean and the biased covariance of the keys.
    noise = torch.randn(3, 100_000, 5, dtype=torch.float64)
    sample = mean + torch.cat([noise, -noise], 1) @ (keys - mean) / math.sqrt(5)
    positives = torch.einsum("nd,nsd->ns", query, sample) / temperature
    negatives = (query @ queue.T / temperature).exp().sum(1, keepdim=True)
    monte_carlo = (torch.log(positives.exp() + negatives) - positives).mean()
    assert monte_carlo - 2e-4 <= bound <= monte_carlo + 0.005
    # Without the covariance it is no bound.
    assert s2mts2.joint_contrastive_loss(query, keys, queue, temperature, 0.0) < monte_carlo - 0.005


def test_the_loss_is_finite_at_a_tiny_temperature():
    query, keys, queue = embeddings(dtype=torch.float32)
    keys[0, 0], keys[0, 1] = query[0], -query[0]
    query.requires_grad_()
    loss = s2mts2.joint_contrastive_loss(query, keys, queue, 0.005, 2.0)
    loss.backward()
    assert loss.isfinite() and query.grad.isfinite().all()


def test_autograd_keeps_little_more_than_the_logits():
    query, keys, queue = embeddings(images=256, keys=5, dim=128, negatives=16384, dtype=torch.float32)
    query.requires_grad_()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = s2mts2.joint_contrastive_loss(query, keys, queue, 0.07, 2.0)
    assert sum(kept.values()) <= 3 * 256 * 16384 * 4
    loss.backward()


def test_the_loss_never_forms_a_tensor_larger_than_the_logits():
    class Largest(TorchDispatchMode):
        floats = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.floats = max(self.floats, result.numel())
            return result

    # N x D x D, N x K x M and N x K x D would all be larger.
    query, keys, queue = embeddings(images=30, keys=5, dim=20, negatives=200)
    query.requires_grad_()
    with Largest() as largest:
        s2mts2.joint_contrastive_loss(query, keys, queue, 0.07, 2.0).backward()
    assert largest.floats == 30 * 201


# --------------------------------------------------------------------------------------------- metrics


def test_metrics_leave_out_and_name_classes_without_an_auc():
    targets = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]], np.float32)
    scores = np.array([[.9, .1, .2], [.2, .3, .4], [.3, .5, .6], [.4, .7, .8]], np.float32)
    result = s2mts2.classification_metrics(targets, scores, ["a", "b", "c"], True)
    assert result == dict(auc=dict(a=0.75, b=None, c=None), mean_auc=0.75)
    nothing = s2mts2.classification_metrics(targets[:, 1:], scores[:, 1:], ["b", "c"], True)
    assert nothing["mean_auc"] is None


def test_multi_class_metrics_agree_with_their_definitions():
    draw = np.random.default_rng(0)
    truth, scores = draw.integers(0, 3, 60), draw.random((60, 4)).astype(np.float32)
    scores[np.arange(60), truth] += 0.4
    result = s2mts2.classification_metrics(np.eye(4)[truth], scores, list("abcd"), False)
    answer = scores.argmax(1)
    recalls = [np.mean(answer[truth == k] == k) for k in range(3)]
    specificities = [np.mean(answer[truth != k] != k) for k in range(3)]
    assert result["auc"]["d"] is None
    assert result["mean_auc"] == pytest.approx(
        np.mean([metrics.roc_auc_score(truth == k, scores[:, k]) for k in range(3)]))
    assert result["accuracy"] == pytest.approx(np.mean(answer == truth))
    assert result["macro_sensitivity"] == pytest.approx(np.mean(recalls))
    assert result["macro_specificity"] == pytest.approx(np.mean(specificities))
    f1 = [2 * np.sum((answer == k) & (truth == k)) / (np.sum(answer == k) + np.sum(truth == k)) for k in range(3)]
    assert result["macro_f1"] == pytest.approx(np.mean(f1))


# ------------------------------------------------------------------------------------- the two stages


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("channels, multilabel", [(1, True), (3, False)])
def test_both_stages_run_on_data_made_by_hand(channels, multilabel, capsys):
    data = made_by_hand(channels, multilabel)
    args = parse_args("pretrain --epochs 2 --batch 8 --size 32 --seed 3".split())
    student, teacher = s2mts2.pretrain(data, args)
    saved = torch.load("runs/mine/pretrain.pt", weights_only=True)
    assert torch.equal(saved["state"]["teacher"]["features.conv0.weight"], teacher.features.conv0.weight)
    grid = torchvision.io.decode_image("runs/mine/views.png")
    assert grid.shape[1:] == (8 * 98 + 2, 3 * 98 + 2) and grid.float().std() > 10
    # The student and the teacher have both learnt, and not the same.
    assert not torch.equal(student.features.conv0.weight, teacher.features.conv0.weight)
    # The queue (no longer than the training set) holds the means of the last keys, shorter than 1.
    queue = saved["state"]["queue"]
    assert queue.shape == (28, 128) and "queue cut from 512 to 28" in capsys.readouterr().out
    assert (queue.norm(dim=1) < 0.99999).sum() >= 24

    args = parse_args("finetune --epochs 2 --batch 8 --labels 6 --consistency 1".split())
    assert args.size == 32 and args.arch == "tiny" and args.start.endswith("pretrain.pt")
    result = s2mts2.finetune(data, args)
    assert json.loads(Path("runs/mine/metrics.json").read_text()) == result
    assert set(result["auc"]) == set(data.classes) and "mean_auc" in result["student"]
    assert ("accuracy" in result) != multilabel
    labelled = Path("runs/mine/labelled.txt").read_text().split()
    assert len(labelled) == 6 and set(labelled) <= {data.names[k] for k in data.train}
    with open("runs/mine/predictions.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["image", *data.classes]
    assert [row[0] for row in rows[1:]] == [data.names[k] for k in data.test]
    scores = np.array(rows[1:])[:, 1:].astype(float)
    again = s2mts2.classification_metrics(data.targets[data.test], scores, data.classes, multilabel)
    assert again["mean_auc"] == pytest.approx(result["mean_auc"], abs=0.01)
    assert multilabel or np.allclose(scores.sum(1), 1, atol=1e-4)
    assert [(entry["stage"], entry["epoch"]) for entry in lines("runs/mine/log.jsonl")] == [
        ("pretrain", 0), ("pretrain", 1), ("finetune", 0), ("finetune", 1)]


def test_the_losses_of_stage_2_are_what_they_say():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 3, generator=draw, dtype=torch.float64)
    truth = torch.eye(3, dtype=torch.float64)[torch.arange(7) % 3]
    yes, soft = 1 / (1 + (-ours).exp()), ours.exp() / ours.exp().sum(1, keepdim=True)
    by_hand = -(truth * yes.log() + (1 - truth) * (1 - yes).log()).sum() / (7 * 3)
    assert s2mts2.supervised_loss(ours, truth, True).item() == pytest.approx(by_hand.item(), rel=1e-9)
    by_hand = -(truth * soft.log()).sum() / 7
    assert s2mts2.supervised_loss(ours, truth, False).item() == pytest.approx(by_hand.item(), rel=1e-9)
    for multilabel, mine, other in ((True, yes, theirs.sigmoid()), (False, soft, theirs.softmax(1))):
        by_hand = (mine - other).square().sum() / (7 * 3)
        assert s2mts2.consistency_loss(ours, theirs, multilabel).item() == pytest.approx(by_hand.item(), rel=1e-9)


def test_stage_2_starts_from_stage_1(capsys):
    data = made_by_hand()
    student, teacher = s2mts2.pretrain(data, parse_args("pretrain --epochs 1 --batch 8 --size 32".split()))
    args = parse_args(["finetune"])
    students, teachers = s2mts2.starting_networks(data, args)
    for ours, theirs in ((students, student), (teachers, teacher)):
        for name, value in theirs.state_dict().items():
            assert name.startswith("classifier") or torch.equal(ours.state_dict()[name], value), name
    assert torch.equal(students.classifier.weight, teachers.classifier.weight)
    # A checkpoint that lacks a weight, or has one too many, or of another shape, is refused.
    whole = torch.load("runs/mine/pretrain.pt", weights_only=True)
    weight = "features.norm0.weight"
    for change in (lambda w: w.pop(weight), lambda w: w.update(extra=w[weight]),
                   lambda w: w.update({weight: w[weight][:3]})):
        broken = copy.deepcopy(whole)
        change(broken["state"]["teacher"])
        torch.save(broken, "broken.pt")
        with pytest.raises(UserError, match="broken.pt does not fit"):
            s2mts2.starting_networks(data, parse_args("finetune --from broken.pt".split()))
    with pytest.raises(UserError, match="does not fit a tiny with 3"):
        s2mts2.starting_networks(made_by_hand(channels=3), args)


def test_the_weights_of_the_terms_grow_with_the_epochs(monkeypatch):
    data, weights = made_by_hand(), []
    loss = s2mts2.joint_contrastive_loss
    monkeypatch.setattr(s2mts2, "joint_contrastive_loss", lambda *a: weights.append(a[4]) or loss(*a))
    s2mts2.pretrain(data, parse_args("pretrain --epochs 4 --batch 28 --size 32".split()))
    assert weights == [0.5, 1.0, 1.5, 2.0]
    momenta, ema = [], s2mts2.ema_update
    monkeypatch.setattr(s2mts2, "ema_update", lambda t, s, m: momenta.append(m) or ema(t, s, m))
    monkeypatch.setattr(s2mts2, "consistency_loss", lambda s, t, m: (0 * s).sum() + 1)
    monkeypatch.setattr(s2mts2, "supervised_loss", lambda s, t, m: (0 * s).sum())
    s2mts2.finetune(data, parse_args("finetune --epochs 4 --batch 28 --labels 5 --consistency 8 "
                                     "--teacher-momentum .7".split()))
    assert momenta == pytest.approx([1 / 2, 2 / 3, .7, .7])
    assert [entry["loss"] for entry in lines("runs/mine/log.jsonl")][4:] == [0, 2, 4, 6]


def test_stage_2_shows_labelled_and_unlabelled_in_the_right_place(monkeypatch):
    data = made_by_hand(count=30)
    data.images[...] = np.arange(30, dtype=np.uint8).reshape(-1, 1, 1, 1) * 8
    views, kinds = s2mts2.random_views, []

    def spy(images, augment, size):
        kinds.append((images[:, 0, 0, 0] // 8).tolist())
        return views(images, augment, size)

    monkeypatch.setattr(s2mts2, "random_views", spy)
    args = parse_args("finetune --from scratch --epochs 1 --batch 7 --labels 5 --out out".split())
    s2mts2.finetune(data, args)
    labelled = set(s2mts2.choose_labelled(data, 5, 0).tolist())
    training = kinds[:6]
    # 18 train images, 5 labelled, 13 not: two steps of (labelled, teacher's view, student's view).
    assert len(training) == 6
    for first in (0, 3):
        assert set(training[first]) <= labelled and training[first + 1] == training[first + 2]
        assert not set(training[first + 1]) & labelled
    assert set(training[0] + training[3]) == labelled
    assert set(training[1] + training[4]) == set(data.train.tolist()) - labelled
    # What follows is the test: every image once for each network, plain.
    assert [k for kind in kinds[6:] for k in kind] == [*data.test, *data.test]


def test_without_consistency_no_unlabelled_image_is_seen(monkeypatch):
    data, seen = made_by_hand(), set()
    gather = s2mts2.gather
    monkeypatch.setattr(s2mts2, "gather", lambda d, p, v: seen.update(p.tolist()) or gather(d, p, v))
    s2mts2.finetune(data, parse_args("finetune --from scratch --consistency 0 --labels 6 --epochs 1 --batch 8".split()))
    assert seen == set(s2mts2.choose_labelled(data, 6, 0)) | set(data.test)
    # As many steps as with the unlabelled: 22 of them in batches of 8.
    assert torch.load("runs/mine/finetune.pt", weights_only=True)["state"]["optimizer"]["state"][0]["step"] == 3


def test_evaluation_shows_each_image_once_and_in_order_whatever_the_batch():
    data, network = made_by_hand(), s2mts2.build_network("tiny", 1, 3)
    whole = s2mts2.evaluate(network, data, data.test, 32, batch=64)
    assert whole.shape == (12, 3) and network.training
    for batch in (1, 5):
        assert np.allclose(s2mts2.evaluate(network, data, data.test, 32, batch=batch), whole, atol=1e-5)
    assert np.allclose(s2mts2.evaluate(network, data, data.test[::-1].copy(), 32), whole[::-1], atol=1e-5)


def equal(ours, theirs):
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_interrupted_stage_goes_on_and_ends_as_if_it_had_not_been(stage, monkeypatch, capsys):
    data = made_by_hand()
    command = {"pretrain": "pretrain --epochs 3 --batch 8 --size 32",
               "finetune": "finetune --from scratch --epochs 3 --batch 8 --labels 6 --size 32"}[stage].split()
    run = dict(pretrain=s2mts2.pretrain, finetune=s2mts2.finetune)[stage]
    run(data, parse_args([*command, "--out", "whole"]))
    update, calls = s2mts2.ema_update, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(s2mts2, "ema_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, parse_args([*command, "--out", "halves"]))
    monkeypatch.setattr(s2mts2, "ema_update", update)
    assert len(lines("halves/log.jsonl")) == 2
    run(data, parse_args([*command, "--out", "halves"]))
    assert "going on after epoch 2" in capsys.readouterr().out
    one, other = (torch.load(f"{folder}/{stage}.pt", weights_only=True) for folder in ("whole", "halves"))
    assert equal(one["state"], other["state"])
    assert [entry["epoch"] for entry in lines("halves/log.jsonl")] == [0, 1, 2]
    # Once more: finished. Another setting: refused, and nothing overwritten, unless --fresh.
    run(data, parse_args([*command, "--out", "halves"]))
    assert "finished" in capsys.readouterr().out
    before = Path(f"halves/{stage}.pt").read_bytes()
    with pytest.raises(UserError, match="other settings: lr .* there and 0.5 here"):
        run(data, parse_args([*command, "--out", "halves", "--lr", ".5"]))
    assert Path(f"halves/{stage}.pt").read_bytes() == before
    run(data, parse_args([*command, "--out", "halves", "--lr", ".5", "--fresh"]))


@pytest.mark.parametrize("length, batch", [(7, 3), (5, 5), (4, 9), (8, 4)])
def test_the_queue_keeps_the_last_means_in_turn(length, batch):
    queue, written = torch.zeros(length, 2), torch.arange(1.0, 60).repeat(2, 1).T
    place = queue.data_ptr()
    for first in range(0, 36, batch):
        s2mts2.enqueue(queue, written[first:first + batch], first)
        count = min(length, first + batch)
        expected = torch.arange(first + batch - count, first + batch) + 1.0
        assert sorted(queue[:, 0].tolist())[-count:] == expected.tolist()
    assert queue.data_ptr() == place


PROCESS = """
import sys, torch, s2mts2, numpy as np
from torch import nn
plain, batch, out, epochs = sys.argv[1] == "plain", sys.argv[2], sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if plain:
    s2mts2.build_network = lambda arch, channels, outputs, *more: nn.Sequential(
        nn.Flatten(), nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, outputs))
draw = np.random.default_rng(0)
data = s2mts2.Data("mine", draw.integers(0, 255, (40, 1, 16, 16), np.uint8), np.eye(2)[np.arange(40) % 2],
                   ["a", "b"], [str(k) for k in range(40)], np.arange(32), np.arange(32, 40), False)
s2mts2.load_data = lambda *arguments: data
done, pretrain = [], s2mts2.pretrain
def kept(data, args):
    args.augment = s2mts2.PLAIN if plain else args.augment
    args.size = 16 if plain else 32
    done.extend(pretrain(data, args))
s2mts2.pretrain = kept
status = s2mts2.main(["pretrain", "--epochs", epochs, "--batch", batch, "--out", out, "--device", "cpu"])
torch.save([network.state_dict() for network in done], f"{out}/rank{s2mts2.RANK}.pt")
sys.exit(status)
"""


def test_two_processes_do_the_work_of_one():
    Path("process.py").write_text(PROCESS)

    def run(processes, *words):
        command = [sys.executable, "process.py", *words]
        if processes > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Without BatchNorm and with plain views: the same losses and weights.
    run(1, "plain", "8", "one", "3")
    assert run(2, "plain", "8", "two", "3").count("epoch 3/3") == 1
    ours, theirs = (torch.load(f"{out}/pretrain.pt")["state"] for out in ("one", "two"))
    for one, two in zip(lines("one/log.jsonl"), lines("two/log.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert torch.allclose(ours["queue"], theirs["queue"], atol=1e-4)
    assert torch.allclose(ours["student"]["1.weight"], theirs["student"]["1.weight"], atol=1e-4)
    # With BatchNorm and random views: both processes end with equal networks, running statistics included,
    # and one process goes on where two left off.
    run(2, "densenet", "8", "both", "1")
    zero, one = (torch.load(f"both/rank{rank}.pt") for rank in (0, 1))
    assert equal(zero, one)
    saved = torch.load("both/pretrain.pt", weights_only=True)
    assert equal(saved["state"]["teacher"], zero[1]) and (saved["state"]["queue"].norm(dim=1) < 0.99999).all()
    # The statistics are those that one process sees, but for the smaller batches.
    run(1, "densenet", "8", "alone", "1")
    alone = torch.load("alone/pretrain.pt")["state"]["student"]["features.norm0.running_var"]
    ratio = saved["state"]["student"]["features.norm0.running_var"] / alone
    assert 0.8 < ratio.median() < 1.25
    saved["settings"]["epochs"] = 2
    torch.save(saved, "both/pretrain.pt")
    assert "going on after epoch 1" in run(1, "densenet", "8", "both", "2")


def test_of_two_processes_one_says_why_they_stop():
    command = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run([sys.executable, *command, str(SCRIPT), "pretrain", "--epochs", "1", "--lr", "1e30"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and done.stderr.count("error: the loss is nan in epoch 1") == 1
    assert "RuntimeError" not in done.stderr and "FutureWarning" not in done.stderr


def test_several_processes_are_refused_where_they_do_not_work(monkeypatch, capsys):
    monkeypatch.setattr(s2mts2, "PROCESSES", 3)
    for command, words in (("finetune", "without torchrun"), ("evaluate", "without torchrun"),
                           ("pretrain --batch 64", "multiple")):
        assert main(command.split()) == 2 and words in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(UserError, match="the loss is nan in epoch 1.*--lr"):
        s2mts2.pretrain(made_by_hand(), parse_args("pretrain --epochs 2 --batch 8 --size 32 --lr 1e30".split()))
    assert not Path("runs/mine/pretrain.pt").exists()


# ---------------------------------------------------------------------------------------- the command


def run_script(*words, **environment):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_the_two_commands_on_digits_and_evaluate():
    done = run_script("pretrain", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "image/s" in done.stderr and "loss" in done.stderr and "<" in done.stderr
    done = run_script("finetune", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "positive  teacher  student" in done.stdout and "mean_auc" in done.stdout
    folder = Path("runs/digits")
    assert {file.name for file in folder.iterdir()} == {
        "pretrain.pt", "finetune.pt", "log.jsonl", "metrics.json", "predictions.csv", "labelled.txt", "views.png"}
    assert len((folder / "labelled.txt").read_text().split()) == 30
    before = {name: (folder / name).read_bytes() for name in ("metrics.json", "predictions.csv")}
    (folder / "metrics.json").unlink()
    assert main(["evaluate"]) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert main(["evaluate", "runs/digits/finetune.pt", "--batch", "7", "--out", "other"]) == 0
    theirs, ours = (json.loads(Path(file).read_text()) for file in ("runs/digits/metrics.json", "other/metrics.json"))
    assert ours["accuracy"] == theirs["accuracy"]


def test_the_command_on_xrays(xrays, capsys):
    common = ["--epochs", "1", "--batch", "4", "--device", "cpu"]
    assert main(["pretrain", "--data", "cxr14", "--root", str(xrays), "--arch", "tiny", "--init", "random",
                 "--size", "32", "--queue", "7", *common]) == 0
    assert main(["finetune", "--labels", "0.5", *common]) == 0
    out = capsys.readouterr().out
    for name in s2mts2.CXR14_CLASSES:
        assert f"\n{name} " in out
    result = json.loads(Path("runs/cxr14/metrics.json").read_text())
    assert len(result["auc"]) == 14
    assert [name for name, auc in result["auc"].items() if auc is not None] == [
        "Effusion", "Mass", "Nodule", "Pleural_Thickening", "Hernia"]
    assert "because the test split has no positive or no negative: Atelectasis, Cardiomegaly" in out
    queue = torch.load("runs/cxr14/pretrain.pt", weights_only=True)["state"]["queue"]
    assert queue.shape == (7, 128) and (queue.norm(dim=1) < 0.99999).all()
    # Labels from a file, and stage 1 from another folder.
    assert main(["finetune", "--from", "runs/cxr14/pretrain.pt", "--labels", "runs/cxr14/labelled.txt",
                 "--out", "second", *common]) == 0
    assert Path("second/labelled.txt").read_text() == Path("runs/cxr14/labelled.txt").read_text()
    assert json.loads(Path("second/metrics.json").read_text()) == result


@pytest.mark.parametrize("name", ["chexpert", "isic2018", "chestmnist", "dermamnist"])
def test_both_stages_run_on_the_other_sets(name, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    if name.endswith("mnist"):
        medmnist(monkeypatch, root, name)
    else:
        dict(chexpert=chexpert, isic2018=isic)[name](root)
    small = "--epochs 1 --batch 4 --device cpu --size 28".split()
    assert main(["pretrain", "--data", name, "--root", str(root), "--arch", "tiny", "--init", "random", *small]) == 0
    assert main(["finetune", "--labels", "0.3", *small]) == 0
    result = json.loads(Path(f"runs/{name}/metrics.json").read_text())
    assert len(result["auc"]) == (7 if name in ("isic2018", "dermamnist") else 14) and result["mean_auc"]
    assert ("macro_f1" in result) == (name in ("isic2018", "dermamnist"))
    assert len(Path(f"runs/{name}/predictions.csv").read_text().splitlines()) == 1 + dict(
        chexpert=16, isic2018=14).get(name, 6)
    if name == "chexpert":
        assert main(["finetune", "--validation", "--out", "validation", "--labels", "0.3", *small]) == 0
        assert len(Path("validation/predictions.csv").read_text().splitlines()) == 1 + 8
        assert main(["evaluate", "validation/finetune.pt", "--no-validation", "--out", "tested"]) == 0
        splits = [json.loads(Path(f"{folder}/metrics.json").read_text())["split"] for folder in ("validation", "tested")]
        assert splits == ["validation", "test"]
        assert len(Path("tested/predictions.csv").read_text().splitlines()) == 1 + 16
        labelled = [Path(f"{folder}/labelled.txt").read_text() for folder in ("runs/chexpert", "validation")]
        assert labelled[0] == labelled[1]


def test_the_recipe_sets_what_the_command_line_leaves_open():
    args = parse_args("pretrain --data cxr14 --keys 5".split())
    assert (args.size, args.batch, args.queue, args.temperature, args.keys) == (256, 256, 65536, 0.07, 5)
    args = parse_args("finetune --data cxr14 --from imagenet --labels 500".split())
    assert (args.size, args.batch, args.lr, args.labels, args.arch) == (512, 16, 0.05, 500, "densenet121")
    assert parse_args(["pretrain"]).data == "digits"


def test_stage_2_takes_over_the_size_only_if_the_user_chose_it():
    source = dict(root="somewhere", cache=None, partial=True, uncertain="ones", validation=False)
    saved = dict(format=s2mts2.FORMAT, stage="pretrain", source=source, history=[{}], state=dict(student={}, teacher={}),
                 settings=dict(data="cxr14", size=256, arch="tiny", epochs=1))
    torch.save(saved, "theirs.pt")
    args = parse_args("finetune --from theirs.pt".split())
    assert (args.data, args.size, args.arch, args.root) == ("cxr14", 512, "tiny", "somewhere")
    assert args.partial and args.uncertain == "ones" and args.out == "."
    saved["settings"]["size"] = 64
    torch.save(saved, "theirs.pt")
    assert parse_args("finetune --from theirs.pt".split()).size == 64
    args = parse_args("finetune --from theirs.pt --data digits".split())
    assert args.root is None and not args.partial
    # The images of another set do not change what network it is.
    saved["settings"]["arch"] = "densenet121"
    torch.save(saved, "theirs.pt")
    assert parse_args("finetune --from theirs.pt --data digits".split()).arch == "densenet121"


def test_learning_rates_follow_their_schedules():
    args = parse_args("finetune --data cxr14 --from scratch".split())
    assert [round(s2mts2.learning_rate(args, epoch), 6) for epoch in (0, 14, 15, 24, 25, 29)] == [
        .05, .05, .005, .005, .0005, .0005]
    args = parse_args("pretrain --lr 1 --epochs 4".split())
    assert [round(s2mts2.learning_rate(args, epoch), 3) for epoch in range(4)] == [1, .854, .5, .146]


@pytest.mark.parametrize("command", [
    "", "train", "pretrain --data mnist", "pretrain --epochs 0", "pretrain --epochs x", "pretrain --batch 1",
    "pretrain --batch 1438", "pretrain --lr -1", "pretrain --lr nan", "pretrain --lr inf", "pretrain --keys 0",
    "pretrain --queue 0", "pretrain --temperature 0", "pretrain --covariance-weight -1", "pretrain --dim 0",
    "pretrain --teacher-momentum 1.1", "pretrain --dim 1000000000000", "pretrain --batch 1e9",
    "pretrain --batch 10000000000", "pretrain --queue 99999999999", "pretrain --keys 99999", "evaluate --no-amp", "pretrain --size 8", "pretrain --size 31 --arch densenet121",
    "pretrain --arch resnet", "pretrain --init zeros", "pretrain --init imagenet", "pretrain --seed -1",
    "pretrain --device tpu", "pretrain --device cuda:99", "pretrain --labels 3", "pretrain --nonsense",
    "pretrain --out file", "pretrain --data cxr14", "pretrain --data cxr14 --root file",
    "finetune", "finetune --from nowhere.pt", "finetune --from file", "finetune --from scratch --labels 0",
    "finetune --from scratch --labels 1.5", "finetune --from scratch --labels 5",
    "finetune --from scratch --labels 2000", "finetune --from scratch --labels nowhere.txt",
    "finetune --from scratch --labels file", "finetune --from scratch --consistency -1",
    "finetune --from imagenet --arch tiny", "finetune --data cxr14", "evaluate", "evaluate nowhere.pt",
    "evaluate file", "evaluate --epochs 3"])
def test_bad_commands_end_with_one_line_and_leave_nothing(command, capsys):
    Path("file").write_text("this is no folder and no checkpoint\n")
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.count("error:") == 1, err
    assert [path.name for path in Path().rglob("*")] == ["file"]


def test_numbers_have_upper_bounds():
    for switch, value in (("dim", 10**6), ("keys", 10**4), ("queue", 10**10), ("batch", 10**7), ("epochs", 10**7)):
        with pytest.raises(UserError, match="is not from"):
            parse_args(["pretrain", f"--{switch}", str(value)])


def edit(root, name, change):
    file = root / name
    file.write_text(change(file.read_text()))


@pytest.mark.parametrize("spoil, words", [
    (lambda root: (root / "Data_Entry_2017_v2020.csv").unlink(), ["Data_Entry_2017.csv", "nihcc.app.box.com"]),
    (lambda root: (root / "test_list.txt").unlink(), ["test_list.txt", "nihcc.app.box.com"]),
    (lambda root: (root / "images").rename(root / "pictures"), ["images", "nihcc.app.box.com"]),
    (lambda root: (root / "images/00000002_001.png").unlink(), ["1 of 30", "00000002_001.png"]),
    (lambda root: (root / "images/00000002_001.png").write_bytes(b"\x89PNG not an image"), ["00000002_001.png"]),
    (lambda root: (root / "images/00000002_001.png").write_bytes(b""), ["00000002_001.png"]),
    (lambda root: (root / "images/00000002_001.png").write_bytes(
        (root / "images/00000002_002.png").read_bytes()[:300]), ["00000002_001.png"]),
    (lambda root: edit(root, "Data_Entry_2017_v2020.csv", lambda text: text.replace("Effusion", "Confusion", 1)),
     ["Confusion", "00000001_000.png"]),
    (lambda root: edit(root, "Data_Entry_2017_v2020.csv", lambda text: text.replace("Effusion", "No Finding|Mass", 1)),
     ["unknown label 'No Finding'", "00000001_000.png"]),
    (lambda root: edit(root, "Data_Entry_2017_v2020.csv", lambda text: text + text.splitlines()[1]),
     ["00000000_000.png"]),
    (lambda root: edit(root, "Data_Entry_2017_v2020.csv", lambda text: text + "nonsense\n"), ["nonsense"]),
    (lambda root: edit(root, "test_list.txt", lambda text: text + "\n00000000_000.png\n"), ["00000000_000.png"]),
    (lambda root: edit(root, "test_list.txt", lambda text: text + "\n99999999_000.png\n"), ["99999999_000.png"]),
    (lambda root: edit(root, "test_list.txt", lambda text: ""), ["empty"]),
])
def test_broken_folders_are_named_in_one_line(xrays, spoil, words, capsys):
    spoil(xrays)
    before = sorted(path for path in Path().rglob("*"))
    assert main(["pretrain", "--data", "cxr14", "--root", str(xrays), "--size", "32", "--batch", "4"]) == 2
    err = capsys.readouterr().err
    message, = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(word in message for word in words) and "Traceback" not in err
    after = sorted(path for path in Path().rglob("*") if path.suffix != ".npy")
    assert after == before


def test_a_checkpoint_that_would_run_code_is_refused(capsys):
    class Trap:
        def __reduce__(self):
            return os.system, ("touch sprung",)

    torch.save(dict(format=s2mts2.FORMAT, stage="pretrain", state=Trap()), "trap.pt")
    assert main(["finetune", "--from", "trap.pt"]) == 2
    assert capsys.readouterr().err.startswith("error: trap.pt") and not Path("sprung").exists()


def test_importing_does_nothing_and_ctrl_c_ends_with_130(monkeypatch, capsys):
    done = subprocess.run([sys.executable, "-c", "import s2mts2"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(s2mts2, "pretrain", interrupt)
    assert main(["pretrain", "--fresh", "--seed", "3"]) == 130
    assert capsys.readouterr().err.strip().endswith("go on after the last finished epoch: "
                                                    "python s2mts2.py pretrain --seed 3")
    # The checkpoint that was the newest is named, as it may no longer be by then.
    monkeypatch.setattr(s2mts2, "finetune", interrupt)
    assert main(["finetune", "--from", "scratch"]) == 130
    assert capsys.readouterr().err.strip().endswith("finetune --from scratch")
    monkeypatch.setattr(s2mts2, "newest", lambda *arguments: "scratch")
    assert main(["finetune"]) == 130 and capsys.readouterr().err.strip().endswith("finetune --from scratch")
    monkeypatch.setattr(s2mts2, "newest", interrupt)
    assert main(["finetune"]) == 130 and capsys.readouterr().err.strip().endswith("s2mts2.py finetune")


# ------------------------------------------------------------------------- nothing lost, nothing wrong


QUICK = "pretrain --epochs 3 --batch 64 --size 16".split()


def started(*words, **keywords):
    """The script, running, when it has written its first checkpoint."""
    path = Path("runs/digits/pretrain.pt")
    before = path.stat().st_mtime_ns if path.exists() else None
    process = subprocess.Popen([sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, **keywords)
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.02)
    return process


def without_times(path):
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")}
            for line in lines(path)]


def test_killed_after_each_epoch_a_run_goes_on_to_the_same_end():
    command = [*QUICK, "--epochs", "4"]
    assert run_script(*command, "--out", "whole").returncode == 0
    for wait in (0.0, 0.2, 0.1):
        process = started(*command)
        time.sleep(wait)
        process.kill()
        process.communicate()
    assert run_script(*command).returncode == 0
    one, other = (torch.load(f"{out}/pretrain.pt", weights_only=True) for out in ("whole", "runs/digits"))
    assert equal(one["state"], other["state"])
    assert without_times("whole/log.jsonl") == without_times("runs/digits/log.jsonl")
    assert [line["epoch"] for line in lines("runs/digits/log.jsonl")] == [0, 1, 2, 3]
    assert not list(Path().rglob("*.tmp"))


def test_sigterm_ends_with_143_and_a_second_run_is_told_of_the_first():
    process = started(*QUICK, "--epochs", "500")
    second = run_script(*QUICK)
    process.terminate()
    _, error = process.communicate()
    assert second.returncode == 2 and "error: another run is writing to runs/digits" in second.stderr
    assert process.returncode == 143 and "Traceback" not in error
    assert error.strip().endswith(f"python s2mts2.py {shlex.join([*QUICK, '--epochs', '500'])}")


def test_on_a_full_disk_the_old_checkpoint_stays_and_there_is_a_message():
    """A limit on the size of files, below that of a checkpoint, stands for a full disk."""
    assert run_script(*QUICK).returncode == 0
    path, more = Path("runs/digits/pretrain.pt"), [*QUICK[:1], "--epochs", "4", *QUICK[3:], "--out", "runs/digits"]
    saved = torch.load(path, weights_only=True)
    saved["settings"]["epochs"] = 4
    torch.save(saved, path)
    before = path.read_bytes()
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); " \
              f"sys.argv = sys.argv[0:1] + {more!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    message, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "cannot write" in message and "make room" in message
    assert path.read_bytes() == before and "Traceback" not in done.stderr and not list(Path().rglob("*.tmp"))
    assert run_script(*more).returncode == 0 and len(lines("runs/digits/log.jsonl")) == 4


@pytest.mark.parametrize("spoil, words", [
    (lambda whole, saved: whole[:len(whole) // 2], "broken"),
    (lambda whole, saved: whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:],
     "broken"),
    (lambda whole, saved: dict(saved, format=99), "format 99"),
    (lambda whole, saved: dict(saved, stage="finetune"), "of stage finetune"),
    (lambda whole, saved: dict(saved, state={}), "broken"),
    (lambda whole, saved: dict(saved, state=dict(saved["state"], queue=torch.zeros(3, 3))), "other contents"),
    (lambda whole, saved: dict(saved, settings=dict(saved["settings"], images="others")), "images others there"),
])
def test_checkpoints_that_are_not_as_written_are_refused(spoil, words, capsys):
    data, args = made_by_hand(), parse_args("pretrain --epochs 1 --batch 8 --size 32".split())
    s2mts2.pretrain(data, args)
    path = Path("runs/mine/pretrain.pt")
    spoilt = spoil(path.read_bytes(), torch.load(path, weights_only=True))
    path.write_bytes(spoilt) if isinstance(spoilt, bytes) else torch.save(spoilt, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        s2mts2.pretrain(data, args)
    assert path.read_bytes() == before
    s2mts2.pretrain(data, parse_args("pretrain --epochs 1 --batch 8 --size 32 --fresh".split()))


def test_a_checkpoint_of_other_images_labels_or_split_is_noticed():
    data, args = made_by_hand(), parse_args("pretrain --epochs 1 --batch 8 --size 32".split())
    s2mts2.pretrain(data, args)
    both = np.concatenate([data.train, data.test])
    for change in (dict(images=255 - data.images), dict(classes=["c0", "c2", "c1"]), dict(targets=1 - data.targets),
                   dict(train=both[:-11], test=both[-11:])):
        with pytest.raises(UserError, match="other settings: .*(images|test)"):
            s2mts2.pretrain(Data(**{**vars(data), **change}), args)


def test_a_fingerprint_tells_where_one_part_ends():
    numbers = np.arange(9)
    parts = [("ab", "c"), ("a", "bc"), (numbers[:4], numbers[4:]), (numbers[:5], numbers[5:]), (numbers,),
             (numbers.reshape(3, 3),), (numbers.astype(np.float64),)]
    assert len({s2mts2.fingerprint(*each) for each in parts}) == len(parts)


def test_weights_that_diverge_in_the_last_step_are_not_kept():
    command = "finetune --from scratch --epochs 1 --batch 28 --size 32 --labels 28 --lr 1e30"
    for _ in range(2):
        with pytest.raises(UserError, match="not finite"):
            s2mts2.finetune(made_by_hand(), parse_args(command.split()))
    assert not Path("runs/mine/metrics.json").exists()


def test_an_old_count_does_not_vouch_for_new_images(xrays, monkeypatch):
    """Left behind by a build that was killed, then met by another that stops before its first note."""
    whole = np.array(s2mts2.load_data("cxr14", xrays, size=32).images)
    kept = next(xrays.glob("*.npy"))
    kept.unlink()
    kept.with_suffix(".count").write_text("12")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torchvision.io, "decode_image", interrupt)
        s2mts2.load_data("cxr14", xrays, size=32)
    assert (np.array(s2mts2.load_data("cxr14", xrays, size=32).images) == whole).all()


def test_two_builds_of_one_cache_at_once_are_refused(xrays):
    s2mts2.load_data("cxr14", xrays, size=32)
    kept = next(xrays.glob("*.npy"))
    kept.unlink()
    with s2mts2.alone(kept), pytest.raises(UserError, match="another run"):
        s2mts2.load_data("cxr14", xrays, size=32)
    assert not list(xrays.glob("*px-*"))


def test_evaluate_refuses_other_data_than_the_checkpoints():
    data = made_by_hand()
    s2mts2.finetune(data, parse_args("finetune --from scratch --epochs 1 --batch 8 --labels 6 --size 32".split()))
    args = parse_args(["evaluate"])
    assert s2mts2.evaluate_checkpoint(data, args) == json.loads(Path("runs/mine/metrics.json").read_text())
    both = np.concatenate([data.train, data.test])
    for change in (dict(images=255 - data.images), dict(train=both[:-11], test=both[-11:])):
        with pytest.raises(UserError, match="trained on other images"):
            s2mts2.evaluate_checkpoint(Data(**{**vars(data), **change}), args)


def test_only_a_lack_of_memory_is_the_users_to_mend(monkeypatch, capsys):
    def failing(message):
        def pretrain(data, args):
            raise RuntimeError(message)
        monkeypatch.setattr(s2mts2, "pretrain", pretrain)

    failing("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    assert main(["pretrain"]) == 2 and "smaller --batch" in capsys.readouterr().err
    failing("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError):
        main(["pretrain"])


@pytest.mark.parametrize("command", [
    "pretrain --root x", "pretrain --partial", "pretrain --data cxr14 --uncertain ones", "finetune --from scratch --validation",
    "ablate --seeds 1", "ablate --lr 3", "ablate --epochs 0", "ablate --size 8", "ablate --arch densenet121 --size 20",
    "ablate --data mnist", "ablate --labels -1", "ablate --seed 1", "ablate --init imagenet --arch tiny",
    "ablate --labels nowhere.txt", "pretrain --epoch 2"])
def test_switches_without_a_meaning_are_refused(command, capsys):
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not list(Path().rglob("*"))


# ------------------------------------------------------------------------------------ ablation and text


def test_the_ablation_leaves_out_each_ingredient_in_turn(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(s2mts2, "load_data", lambda *arguments: made_by_hand(multilabel=False))
    pretrain, finetune = s2mts2.pretrain, s2mts2.finetune
    monkeypatch.setattr(s2mts2, "pretrain", lambda d, a: seen.append((a.stage, a.seed, a.keys)) or pretrain(d, a))
    monkeypatch.setattr(s2mts2, "finetune", lambda d, a: seen.append(
        (a.stage, a.seed, Path(a.start).parent.name, a.consistency > 0)) or finetune(d, a))
    command = "ablate --seeds 2 --epochs 1 --batch 8 --labels 6 --out".split() + [str(Path("runs/digits/ablation").resolve())]
    assert main(command) == 0
    assert seen[:7] == [("pretrain", 0, 1), ("pretrain", 0, 2), ("finetune", 0, "", False), ("finetune", 0, "", True),
                        ("finetune", 0, "moco-0", True), ("finetune", 0, "jcl-0", False), ("finetune", 0, "jcl-0", True)]
    assert [entry[1] for entry in seen[7:]] == [1] * 7
    out = Path("runs/digits/ablation")
    table = json.loads((out / "ablation.json").read_text())
    assert list(table) == list(s2mts2.ABLATION)
    assert table["jcl + mean teacher"]["accuracy"][1] == json.loads(
        (out / "jcl-mean-teacher-1/metrics.json").read_text())["accuracy"]
    for seed in "01":
        assert len({path.read_text() for path in out.glob(f"*-{seed}/labelled.txt")}) == 1
    printed = capsys.readouterr().out
    assert "jcl + mean teacher" in printed and " +- " in printed and "covariance_weight 0.0" in printed
    # --fresh trains all again; without it nothing is, and the table is the same.
    seen.clear()
    old = (out / "jcl-1/pretrain.pt").stat().st_mtime_ns
    (out / "mine").mkdir()
    (out / "mine/pretrain.pt").touch()
    with monkeypatch.context() as patch:
        # Not before the images are there.
        patch.setattr(s2mts2, "load_data", lambda *arguments: s2mts2.read_lines("nowhere"))
        assert main([*command, "--fresh"]) == 2 and (out / "jcl-1/pretrain.pt").stat().st_mtime_ns == old
        # And then all at once, but for what is not its own.
        def load_and_check(*arguments):
            arguments[-1](made_by_hand(multilabel=False))
            return made_by_hand(multilabel=False)

        patch.setattr(s2mts2, "load_data", load_and_check)
        # A run of other settings beside the ablation is no hindrance.
        pretrain(made_by_hand(multilabel=False), parse_args("pretrain --epochs 2 --batch 8".split()))
        patch.setattr(s2mts2, "run_command", lambda args: 1 / 0 if args.stage != "ablate" else ablate(args))
        ablate = s2mts2.ablate
        with pytest.raises(ZeroDivisionError):
            main([*command, "--fresh"])
        assert [path.parent.name for path in out.rglob("*.pt")] == ["mine"]
        assert not json.loads((out / "ablation.json").read_text())["jcl + mean teacher"]["accuracy"]
        Path("runs/mine/pretrain.pt").unlink()
    assert main([*command, "--fresh"]) == 0 and (out / "jcl-1/pretrain.pt").stat().st_mtime_ns > old
    monkeypatch.setattr(s2mts2, "ema_update", None)
    assert main(command) == 0 and json.loads((out / "ablation.json").read_text()) == table
    # finetune does not start from the ablation's by mistake, whatever its folder is called.
    out.rename("runs/digits/other")
    with pytest.raises(UserError, match="first run"):
        parse_args(["finetune"])


@pytest.mark.parametrize("stage", list(s2mts2.COMMANDS))
def test_every_switch_is_read_and_explained_on_one_screen(stage, capsys):
    with pytest.raises(SystemExit):
        main([stage, "--help"])
    text = capsys.readouterr().out
    assert text.count("\n") <= 40 and max(map(len, text.splitlines())) <= 100
    source = SCRIPT.read_text()
    for stages, switch, _, words, keywords in (row for rows in s2mts2.SWITCHES.values() for row in rows):
        if stage[0] in stages:
            name = keywords.get("dest", switch[2:].replace("-", "_"))
            assert f"{switch} " in text or f"{switch}," in text
            # fresh, seeds and the rest as args.NAME; those of the data through SOURCE as well.
            assert f"args.{name}" in source, name
    for stage, recipe in s2mts2.RECIPES["digits"].items():
        assert s2mts2.RECIPES["cxr14"][stage].keys() == recipe.keys()


def readme(mark):
    """The indented commands of the README that begin with mark, without comments."""
    text = (SCRIPT.parent / "README.md").read_text()
    return [line.split("#")[0].strip() for line in text.splitlines() if re.match(f"    +{mark}", line)]


def test_the_commands_of_the_readme_run(monkeypatch):
    """All that need no download and no GPU, with an epoch each; they come in an order in which they work."""
    digits = s2mts2.load_digits()
    # Fewer images than there are, so that it takes less time.
    digits.train, digits.test = digits.train[:600], digits.test[:100]
    monkeypatch.setattr(s2mts2, "load_digits", lambda: digits)
    commands = [line for line in readme("python s2mts2.py") if not re.search("--data|--help|--root|FILE", line)]
    assert len(commands) >= 13 and sum("runs/moco" in command for command in commands) == 2
    assert main(["pretrain", "--epochs", "1", "--size", "16"]) == main(["finetune", "--epochs", "1"]) == 0
    for command in commands:
        for one in command.split(" && "):
            words = shlex.split(one.removeprefix("python s2mts2.py "))
            words += dict(ablate=["--seeds", "2", "--size", "16"], pretrain=["--size", "16"]).get(words[0], [])
            if words[0] != "evaluate":
                words += ["--epochs", "1", "--fresh"]
            assert main(words) == 0, one


def test_the_exercise_that_changes_a_line_changes_what_it_says():
    """A teacher with running statistics: it runs, and a batch no longer decides how an image is embedded."""
    text, line = SCRIPT.read_text(), "module.track_running_stats = False"
    assert text.count(line) == 1 and "`module.eval()`" in (SCRIPT.parent / "README.md").read_text()
    Path("changed.py").write_text(text.replace(line, "module.eval()"))
    script = subprocess.run([sys.executable, "changed.py", "pretrain", "--epochs", "1", "--out", "runs/running"])
    assert script.returncode == 0 and Path("runs/running/pretrain.pt").exists()
    spec = importlib.util.spec_from_file_location("changed", "changed.py")
    changed = sys.modules["changed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    images = torch.rand(6, 1, 32, 32)
    for module, leaks in ((s2mts2, True), (changed, False)):
        teacher = module.make_teacher(module.build_network("tiny", 1, 8, "mlp"))
        assert torch.allclose(teacher(images)[:3], teacher(images[:3]), atol=1e-5) != leaks


def test_the_example_for_notebooks_runs():
    text = (SCRIPT.parent / "README.md").read_text()
    start = text.index("    import numpy as np, s2mts2")
    code = text[start:].split("\n\n")[0]
    exec("\n".join(line[4:] for line in code.splitlines()), {})
    assert Path("runs/mine/metrics.json").exists()
    assert main(["finetune"]) == 2
