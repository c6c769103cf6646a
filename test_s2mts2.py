"""Tests of s2mts2.py: python -m pytest -q. They need no network and make their own data."""

import copy
import csv
import doctest
import faulthandler
import functools
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import zlib
from collections import Counter, OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn import linear_model, metrics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import s2mts2
from s2mts2 import PLAIN, Data, UserError, choose_labelled, load_data

SCRIPT = Path(s2mts2.__file__).resolve()


# One thread, here and in the subprocesses: the last bits depend on the number of threads.
torch.set_num_threads(1)


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SCRIPT.parent),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch, request):
    """Each test runs in an empty folder, and without a GPU unless it asks for one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if "gpu" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu():
    if not HAS_GPU:
        pytest.skip("needs a GPU")


def parse(command):
    return s2mts2.parse_args(command.split())


def run(*commands):
    """Run commands. Each must end with status 0."""
    for command in commands:
        assert s2mts2.main(command.split()) == 0, command


def error_of(command, capsys):
    """The error of a command: status 2 and, at the end of stderr, the one line "error: ..."."""
    capsys.readouterr()
    assert s2mts2.main(command.split()) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert "error: " not in "".join(before)
    return last


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


def table(path):
    """Header, image names and numbers of a CSV file with predictions."""
    header, *rows = csv.reader(Path(path).read_text(encoding="utf-8").splitlines())
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], float)


# ---- made data


def made_by_hand(channels=1, multilabel=True, count=40):
    """Noise with a bright square if the first target is 1; 12 images are test images."""
    random, targets = np.random.default_rng(0), np.eye(3)[np.arange(count) % 3]
    images = random.integers(0, 120, (count, channels, 16, 16), np.uint8)
    if multilabel:
        targets = (random.random((count, 3)) < 0.4) * (np.arange(count)[:, None] > 3)
    images[targets[:, 0] == 1, :, 4:12, 4:12] = 250
    split, names = random.permutation(count), [f"i{k}" for k in range(count)]
    return s2mts2.Data(
        "mine", images, targets, ["a", "b", "c"], names, split[:-12], split[-12:], multilabel
    )


def numbered(count=40, channels=1, multilabel=True):
    """made_by_hand, but each image has one grey level, 4 times its number."""
    data = made_by_hand(channels, multilabel, count)
    data.images[...] = (4 * np.arange(count, dtype=np.uint8)).reshape(-1, 1, 1, 1)
    return data


def numbers_of(views):
    """The numbers of images made by `numbered`, from plain views of them."""
    return ((views[:, 0].mean((1, 2)) * 0.226 + 0.449) * 255 / 4).round().int().tolist()


def photo(count=3, channels=3, side=48):
    """Smooth random images in [0, 1]."""
    images = torch.rand(count, channels, 6, 6)
    return F.interpolate(images, (side, side), mode="bicubic").clamp(0, 1)


# ---- what a stage really does: spies


class SmallNetwork(nn.Module):
    """Two layers and a BatchNorm, for views of 16 pixels."""

    def __init__(self, channels, outputs):
        super().__init__()
        convolution = nn.Conv2d(channels, 4, 4, 4)
        self.features = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        self.classifier = nn.Linear(64, outputs)

    def forward(self, images):
        return self.classifier(self.features(images))


@pytest.fixture
def small_network(monkeypatch):
    def build(arch, channels, outputs, head="linear", imagenet=False):
        return SmallNetwork(channels, outputs)

    monkeypatch.setattr(s2mts2, "build_network", build)


def copied(value):
    """A copy that later steps do not change."""
    if isinstance(value, nn.Module):
        return copied(value.state_dict())
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


class Recorder:
    """Records what each step of a stage does.

    steps     a namespace for each step: epoch, order (names of calls), loss, images, and under the
              name of a spied function the list of its calls: given, result, after
    first     state dicts of student and teacher, and the queue, before the first step
    networks  student and teacher themselves
    """

    SPIED = (
        "random_views",
        "joint_contrastive_loss",
        "supervised_loss",
        "consistency_loss",
        "ema_update",
        "enqueue",
    )

    def __init__(self, monkeypatch):
        self.steps, self.step = [], None
        for name in self.SPIED:
            monkeypatch.setattr(s2mts2, name, self.spy(name, getattr(s2mts2, name)))
        for name in ("__init__", "start_epoch", "step"):
            original = getattr(s2mts2.Run, name)
            after = getattr(self, f"after_{name.strip('_')}")

            def spied(run, *given, original=original, after=after):
                result = original(run, *given)
                after(run, *given)
                return result

            monkeypatch.setattr(s2mts2.Run, name, spied)

    def note(self, name, **values):
        if self.step is not None:
            self.step.order.append(name)
            self.step.__dict__.setdefault(name, []).append(SimpleNamespace(**values))

    def spy(self, name, function):
        def spied(*given):
            before = [copied(each) for each in given]
            result = function(*given)
            after = [copied(each) for each in given]
            gradient = [isinstance(each, torch.Tensor) and each.requires_grad for each in given]
            objects = [each for each in given if isinstance(each, nn.Module)]
            self.note(
                name,
                given=before,
                result=copied(result),
                after=after,
                gradient=gradient,
                objects=objects,
            )
            return result

        return spied

    def after_init(self, run, *given):
        self.networks = {name: run.state[name] for name in ("student", "teacher")}
        self.optimizer = run.state["optimizer"]
        self.first = copied(dict(self.networks, queue=run.state.get("queue")))
        for name, network in self.networks.items():
            network.register_forward_hook(functools.partial(self.passed, name))
        self.optimizer.register_step_pre_hook(self.before_optimizer)

    def after_start_epoch(self, run, epoch):
        self.epoch, self.step = epoch, SimpleNamespace(order=[], epoch=epoch)

    def passed(self, name, network, given, result):
        self.note(
            name, views=copied(given[0]), result=copied(result), gradient=result.requires_grad
        )

    def before_optimizer(self, optimizer, *given):
        group = dict(optimizer.param_groups[0])
        self.note("optimizer", group={k: v for k, v in group.items() if k != "params"})

    def after_step(self, run, loss, images):
        self.step.loss, self.step.images = loss.item(), images
        self.steps.append(self.step)
        self.step = SimpleNamespace(order=[], epoch=self.epoch)


@pytest.fixture
def record(monkeypatch, small_network):
    """A function that runs a stage and returns what it recorded."""

    def recorded(data, command):
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            recorder.args = args = parse(command)
            recorder.result = getattr(s2mts2, args.command)(data, args)
        return recorder

    return recorded


def one(calls):
    (call,) = calls
    return call


def numbers_by_pixels(data, images):
    """Which images of data these pixels are."""
    number = {image.tobytes(): k for k, image in enumerate(data.images)}
    return [number[image.tobytes()] for image in np.asarray(images)]


def sources(data, step):
    """{bytes of a view: number of its image} of all views that a step made."""
    made = {}
    for call in step.random_views:
        numbers = numbers_by_pixels(data, call.given[0])
        made |= {view.numpy().tobytes(): k for k, view in zip(numbers, call.result, strict=True)}
    return made


def shown(data, step, network):
    """Numbers of the images that a network saw in a step, view by view."""
    made = sources(data, step)
    return [made[view.numpy().tobytes()] for view in one(getattr(step, network)).views]


def different_views(step):
    """How many different views both networks saw in a step."""
    calls = [*step.student, *step.teacher]
    return len({view.numpy().tobytes() for call in calls for view in call.views})


class Reference:
    """Both networks in double precision, with optimizer and EMA as the papers define them."""

    def __init__(self, recorder, channels):
        outputs = len(recorder.first["student"]["classifier.bias"])
        self.student, self.teacher = (
            SmallNetwork(channels, outputs).double().train() for _ in range(2)
        )
        self.student.load_state_dict(recorder.first["student"])
        self.teacher.load_state_dict(recorder.first["teacher"])
        weights = list(self.student.parameters())
        self.mean = [torch.zeros_like(weight) for weight in weights]
        self.square = [torch.zeros_like(weight) for weight in weights]
        self.updates = 0

    @torch.no_grad()
    def output_of_teacher(self, views):
        # A copy: the passes of the teacher do not change its running statistics.
        return copy.deepcopy(self.teacher)(views.double())

    def sgd(self, loss, lr, momentum, weight_decay):
        weights = list(self.student.parameters())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for k, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                self.mean[k] = momentum * self.mean[k] + gradient + weight_decay * weight
                weight -= lr * self.mean[k]

    def adamw(self, loss, lr, beta1, beta2, eps, weight_decay):
        weights = list(self.student.parameters())
        gradients = torch.autograd.grad(loss, weights)
        self.updates += 1
        with torch.no_grad():
            for k, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                self.mean[k] = beta1 * self.mean[k] + (1 - beta1) * gradient
                self.square[k] = beta2 * self.square[k] + (1 - beta2) * gradient**2
                mean = self.mean[k] / (1 - beta1**self.updates)
                square = self.square[k] / (1 - beta2**self.updates)
                weight -= lr * weight_decay * weight + lr * mean / (square.sqrt() + eps)

    def ema(self, a):
        latest = self.student.state_dict()
        for name, value in self.teacher.state_dict().items():
            floating = value.is_floating_point()
            value.copy_(a * value + (1 - a) * latest[name] if floating else latest[name])

    def check(self, call):
        """Compare with both networks after a recorded ema_update."""
        teacher, student, _ = call.after
        for ours, recorded in ((self.teacher, teacher), (self.student, student)):
            for name, value in ours.state_dict().items():
                assert torch.allclose(recorded[name].double(), value.double(), 1e-4, 2e-5), name


# ---- one step of stage 1

STAGE_1 = (
    "pretrain --recipe small --size 16 --epochs 3 --batch 8 --keys 3 --queue 20 --dim 6 "
    "--temperature .3 --covariance-weight 1.7 --lr .1 --momentum .8 --weight-decay .01 "
    "--teacher-momentum .9 "
)
A_1, T, M, LR_1 = 0.9, 0.3, 3, 0.1


def loss_with_covariance_matrices(query, keys, queue, t, c):
    losses = []
    for q, k in zip(query, keys, strict=True):
        mean, covariance = k.mean(0), torch.cov(k.T, correction=0)
        positive = q @ mean / t + c / (2 * t**2) * q @ covariance @ q
        others = sum((q @ n / t).exp() for n in queue)
        losses.append(torch.log(positive.exp() + others) - q @ mean / t)
    return sum(losses) / len(losses)


@pytest.fixture
def stage_1(record):
    """28 training images and a batch of 8: three steps of an epoch, three epochs."""
    data = made_by_hand()
    recorder = record(data, STAGE_1)
    recorder.data = data
    return recorder


def test_stage_1_takes_full_batches_of_training_images(stage_1):
    assert [step.epoch for step in stage_1.steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [step.images for step in stage_1.steps] == [8] * 9
    for step in stage_1.steps:
        numbers = shown(stage_1.data, step, "student")
        assert len({*numbers}) == 8
        assert {*numbers} <= {*stage_1.data.train.tolist()}


def test_stage_1_shows_the_student_one_view_and_the_teacher_m_views_of_each_image(stage_1):
    for step in stage_1.steps:
        query, keys = (shown(stage_1.data, step, name) for name in ("student", "teacher"))
        assert keys == [number for number in query for _ in range(M)]


def test_query_and_keys_are_different_views(stage_1):
    assert [different_views(step) for step in stage_1.steps] == [8 + 8 * M] * 9


@pytest.mark.parametrize(
    "command", [STAGE_1, "finetune --from scratch --epochs 1 --batch 8 --labels 6 --size 16"]
)
def test_views_are_made_with_the_settings(record, command):
    recorder = record(made_by_hand(channels=3), command + " --crop .3 --jitter .25")
    for call in recorder.steps[0].random_views:
        _, augment, size = call.given
        assert augment == recorder.args.augment
        assert (augment["crop"], augment["jitter"], size) == (0.3, 0.25, 16)


def test_the_loss_of_stage_1_gets_embeddings_of_unit_length_and_the_temperature(stage_1):
    for step in stage_1.steps:
        call = one(step.joint_contrastive_loss)
        query, keys, _, temperature, _ = call.given
        student, teacher = one(step.student).result, one(step.teacher).result
        expected = teacher / teacher.square().sum(1, keepdim=True).sqrt()
        assert torch.allclose(query, student / student.square().sum(1, keepdim=True).sqrt())
        assert keys.shape == (8, M, 6)
        assert all(
            torch.allclose(keys[n, m], expected[n * M + m]) for n in range(8) for m in range(M)
        )
        assert temperature == T


def test_the_loss_that_the_optimizer_minimises_is_the_joint_contrastive_loss(stage_1):
    for step in stage_1.steps:
        assert step.loss == one(step.joint_contrastive_loss).result.item()


def test_the_weight_of_the_covariance_grows_to_lambda(stage_1):
    weights = [one(step.joint_contrastive_loss).given[4] for step in stage_1.steps]
    assert weights == pytest.approx([1.7 / 3] * 3 + [2 * 1.7 / 3] * 3 + [1.7] * 3)


def test_no_gradient_reaches_teacher_keys_and_queue(stage_1):
    for step in stage_1.steps:
        assert one(step.student).gradient and not one(step.teacher).gradient
        assert one(step.joint_contrastive_loss).gradient[:3] == [True, False, False]
    for weight in stage_1.networks["teacher"].parameters():
        assert not weight.requires_grad and weight.grad is None


def test_the_queue_starts_with_random_directions_of_unit_length(stage_1):
    queue = stage_1.first["queue"]
    assert queue.shape == (20, 6)
    assert torch.allclose(queue.norm(dim=1), torch.ones(20))
    assert (queue @ queue.T).fill_diagonal_(0).max() < 0.999
    assert queue.mean().abs() < 0.2


def test_the_queue_is_at_most_as_long_as_the_training_set(record):
    assert record(made_by_hand(), STAGE_1 + "--queue 100").first["queue"].shape == (28, 6)


def test_a_batch_larger_than_the_training_set_is_refused(small_network):
    with pytest.raises(s2mts2.UserError, match="28 training images: --batch"):
        s2mts2.pretrain(made_by_hand(), parse(STAGE_1 + "--batch 29"))


def test_a_batch_of_all_training_images_is_one_step(record):
    recorder = record(made_by_hand(), STAGE_1 + "--batch 28")
    assert [step.images for step in recorder.steps] == [28] * 3


def test_stage_1_says_the_loss_of_chance_level(record, capsys):
    record(made_by_hand(), STAGE_1 + "--queue 100")
    assert f"log(K + 1) = {math.log(28 + 1):.2f}" in capsys.readouterr().out


def test_the_means_of_the_keys_enter_the_queue_after_the_loss(stage_1):
    queue = stage_1.first["queue"]
    for step in stage_1.steps:
        _, keys, negatives, _, _ = one(step.joint_contrastive_loss).given
        assert torch.allclose(negatives, queue, atol=1e-6)
        means = keys.sum(1) / M
        assert (means.norm(dim=1) < 0.99999).all()
        queue = torch.cat([means, queue])[:20]
        assert torch.allclose(one(step.enqueue).after[0], queue, atol=1e-6)


def test_stage_1_goes_from_loss_to_optimizer_to_ema(stage_1):
    for step in stage_1.steps:
        kept = ("student", "teacher", "joint_contrastive_loss", "optimizer", "ema_update")
        order = [name for name in step.order if name in kept]
        assert {*order[:2]} == {"student", "teacher"} and order[2:] == [*kept[2:]]


def test_the_ema_of_stage_1_has_the_given_decay_and_the_student_is_its_source(stage_1):
    for step in stage_1.steps:
        call = one(step.ema_update)
        assert call.given[2] == A_1
        assert call.objects == [stage_1.networks["teacher"], stage_1.networks["student"]]


def test_both_networks_are_in_training_mode_in_stage_1(stage_1):
    # In evaluation mode the running statistics of the student would stay.
    assert stage_1.networks["student"].training and stage_1.networks["teacher"].training
    counted = stage_1.networks["student"].features[1].num_batches_tracked
    assert counted == 9


@pytest.mark.parametrize("options", ["", "--keys 1 --covariance-weight 0", "--schedule steps"])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_after_each_step_of_stage_1_equal_an_independent_calculation(
    record, channels, options
):
    recorder = record(made_by_hand(channels), STAGE_1 + options)
    keys = 1 if "keys" in options else M
    weight = 0 if "keys" in options else 1.7
    cosine, steps = [LR_1, LR_1 * 0.75, LR_1 * 0.25], [LR_1, LR_1, LR_1 / 10]
    reference, queue = Reference(recorder, channels), recorder.first["queue"].double()
    assert len(recorder.steps) == 9
    for step in recorder.steps:
        student_views, teacher_views = one(step.student).views, one(step.teacher).views
        query = F.normalize(reference.student(student_views.double()), dim=1)
        keys_now = F.normalize(reference.output_of_teacher(teacher_views), dim=1)
        keys_now = keys_now.reshape(8, keys, 6)
        c = weight * (step.epoch + 1) / 3
        loss = loss_with_covariance_matrices(query, keys_now, queue, T, c)
        assert step.loss == pytest.approx(loss.item(), abs=1e-4)
        rates = steps if "steps" in options else cosine
        reference.sgd(loss, rates[step.epoch], 0.8, 0.01)
        reference.ema(A_1)
        reference.check(one(step.ema_update))
        queue = torch.cat([keys_now.mean(1), queue])[:20]


def test_stage_1_trains_with_sgd(stage_1):
    assert type(stage_1.optimizer) is torch.optim.SGD
    weights = [weight for group in stage_1.optimizer.param_groups for weight in group["params"]]
    assert {*map(id, weights)} == {*map(id, stage_1.networks["student"].parameters())}
    for step in stage_1.steps:
        group = one(step.optimizer).group
        assert (group["momentum"], group["weight_decay"]) == (0.8, 0.01)
        assert not group["nesterov"] and group["dampening"] == 0


def test_stage_1_returns_the_trained_networks_and_saves_them(stage_1):
    saved = torch.load("runs/mine/pretrain.pt", weights_only=True)["state"]
    for network, name in zip(stage_1.result, ("student", "teacher"), strict=True):
        assert network is stage_1.networks[name]
        assert all(torch.equal(saved[name][k], v) for k, v in network.state_dict().items())
    assert torch.equal(saved["queue"], stage_1.steps[-1].enqueue[0].after[0])


@pytest.mark.parametrize(
    "command, expected",
    [
        ("pretrain --dim 7 --arch tiny", ("tiny", 3, 7, "mlp", False)),
        ("pretrain --dim 7 --init imagenet", ("densenet121", 3, 7, "mlp", True)),
        ("pretrain --dim 7 --init random", ("densenet121", 3, 7, "mlp", False)),
        ("finetune --from scratch", ("densenet121", 3, 3, "linear", False)),
        ("finetune --from imagenet", ("densenet121", 3, 3, "linear", True)),
    ],
)
def test_each_stage_builds_its_network(monkeypatch, command, expected):
    """Stage 1 has a projection head with D outputs, stage 2 a linear classifier."""
    built = []

    def build(arch, channels, outputs, head="linear", imagenet=False):
        built.append((arch, channels, outputs, head, imagenet))
        raise KeyboardInterrupt

    monkeypatch.setattr(s2mts2, "build_network", build)
    args = parse(f"{command} --recipe cxr14" + " --labels 6" * ("finetune" in command))
    with pytest.raises(KeyboardInterrupt):
        getattr(s2mts2, args.command)(made_by_hand(3), args)
    assert built == [expected]


# ---- one step of stage 2

STAGE_2 = (
    "finetune --from scratch --recipe small --size 16 --epochs 3 --batch 8 --min-steps 0 --lr .05 "
    "--beta1 .8 --beta2 .9 --eps .02 --weight-decay .3 --teacher-momentum .8 --consistency 7 "
    "--ramp .5 "
)


def in_file(data, indices, name="labels.txt"):
    """Write the names of images to a file for --labels."""
    Path(name).write_text("".join(f"{data.names[k]}\n" for k in indices))
    return f"--labels {name} "


def unknown_targets(data, labelled):
    """Make a third of the targets of labelled images unknown, but no whole row."""
    data.targets[labelled[0::3], 0] = np.nan
    data.targets[labelled[1::3], 1] = np.nan
    data.targets[labelled[1::3], 2] = np.nan


@pytest.fixture
def stage_2(record):
    """6 labelled and 22 unlabelled training images, batch 8: three steps of an epoch."""
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[:6]))
    recorder.data, recorder.labelled = data, data.train[:6].tolist()
    return recorder


def test_stage_2_shows_the_student_labelled_images_and_then_unlabelled_ones(stage_2):
    unlabelled = {*stage_2.data.train.tolist()} - {*stage_2.labelled}
    assert [step.images for step in stage_2.steps] == [6 + 8] * 9
    for step in stage_2.steps:
        numbers = shown(stage_2.data, step, "student")
        # Six labels are fewer than a batch: each is there once.
        assert sorted(numbers[:6]) == sorted(stage_2.labelled)
        assert len(numbers) == 6 + 8 and {*numbers[6:]} <= unlabelled


def test_stage_2_shows_the_teacher_other_views_of_the_same_unlabelled_images(stage_2):
    for step in stage_2.steps:
        assert shown(stage_2.data, step, "teacher") == shown(stage_2.data, step, "student")[6:]
        # Not one view for both networks.
        assert not torch.equal(one(step.teacher).views, one(step.student).views[6:])


def test_all_views_of_a_step_of_stage_2_differ(stage_2):
    assert [different_views(step) for step in stage_2.steps] == [6 + 8 + 8] * 9


def test_each_loss_of_stage_2_gets_the_right_outputs(stage_2):
    for step in stage_2.steps:
        numbers, logits = shown(stage_2.data, step, "student"), one(step.student).result
        own, targets, multilabel = one(step.supervised_loss).given
        assert torch.equal(own, logits[:6]) and multilabel is True
        assert np.array_equal(targets.numpy(), stage_2.data.targets[numbers[:6]])
        own, other, multilabel = one(step.consistency_loss).given
        assert torch.equal(own, logits[6:]) and multilabel is True
        assert torch.equal(other, one(step.teacher).result)


def test_no_gradient_reaches_the_teacher_in_stage_2(stage_2):
    for step in stage_2.steps:
        assert one(step.supervised_loss).gradient[0]
        assert one(step.consistency_loss).gradient[:2] == [True, False]
    for weight in stage_2.networks["teacher"].parameters():
        assert not weight.requires_grad and weight.grad is None


def test_the_loss_of_stage_2_is_the_sum_with_a_weight_that_grows_from_0(stage_2):
    for step in stage_2.steps:
        supervised, other = (
            one(calls).result.item() for calls in (step.supervised_loss, step.consistency_loss)
        )
        # --consistency 7 --ramp .5 of three epochs.
        weight = 7 * min(1, step.epoch / 1.5)
        assert weight in (0, pytest.approx(7 * 2 / 3), 7)
        assert step.loss == pytest.approx(supervised + weight * other, abs=1e-6)
        assert other > 1e-5


def test_the_warm_up_of_the_ema_does_not_start_again_in_each_epoch(stage_2):
    decays = [one(step.ema_update).given[2] for step in stage_2.steps]
    assert decays == pytest.approx([1 / 2, 2 / 3, 3 / 4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8])


def test_the_ema_of_stage_2_follows_the_optimizer_and_changes_the_teacher(stage_2):
    for step in stage_2.steps:
        kept = ("supervised_loss", "consistency_loss", "optimizer", "ema_update")
        assert [name for name in step.order if name in kept] == [*kept]
        call = one(step.ema_update)
        assert call.objects == [stage_2.networks["teacher"], stage_2.networks["student"]]


def test_stage_2_trains_the_student_with_adamw(stage_2):
    assert type(stage_2.optimizer) is torch.optim.AdamW
    weights = [weight for group in stage_2.optimizer.param_groups for weight in group["params"]]
    assert {*map(id, weights)} == {*map(id, stage_2.networks["student"].parameters())}
    for step in stage_2.steps:
        group = one(step.optimizer).group
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 0.02)
        assert group["weight_decay"] == 0.3 and not group["amsgrad"]


@pytest.mark.parametrize("command", [STAGE_1, STAGE_2 + "--labels 6 "])
@pytest.mark.parametrize(
    "schedule, factors",
    [
        ("cosine", [(1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in range(6)]),
        ("steps", [1, 1, 1, 0.1, 0.1, 0.01]),
    ],
)
def test_the_optimizer_has_the_learning_rate_of_the_epoch(record, command, schedule, factors):
    recorder = record(made_by_hand(), f"{command} --epochs 6 --schedule {schedule} --lr .01")
    rates = [one(step.optimizer).group["lr"] for step in recorder.steps]
    assert rates == pytest.approx([0.01 * factor for factor in factors for _ in range(3)])


SCENARIOS = {
    "multi-label": dict(),
    "unknown targets": dict(unknown=True),
    "multi-class": dict(multilabel=False),
    "multi-class with unlabelled rows": dict(multilabel=False, unlabelled_rows=True),
    "more labels than a batch": dict(multilabel=False, labelled=12),
    "without consistency loss": dict(options="--consistency 0 "),
    "multi-class without consistency loss": dict(multilabel=False, options="--consistency 0 "),
    "all labelled": dict(labelled=28),
    "colour and steps": dict(channels=3, options="--schedule steps "),
    "no decay": dict(options="--weight-decay 0 --teacher-momentum 1 "),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_weights_after_each_step_of_stage_2_equal_an_independent_calculation(record, scenario):
    made = dict(channels=1, multilabel=True, labelled=6, options="") | SCENARIOS[scenario]
    data = made_by_hand(made["channels"], made["multilabel"])
    labelled = data.train[: made["labelled"]]
    labels = in_file(data, labelled)
    if "unknown" in made:
        unknown_targets(data, labelled)
    if "unlabelled_rows" in made:
        # A row that is known in part counts as unlabelled.
        data.targets[np.setdiff1d(data.train, labelled)] = np.nan
        data.targets[data.train[8], 1] = 0
        labels = "--labels all "
    recorder = record(data, STAGE_2 + labels + made["options"])
    consistent = "--consistency 0" not in made["options"] and len(labelled) < 28
    rates = [0.05, 0.05, 0.005] if "steps" in made["options"] else [0.05, 0.0375, 0.0125]
    decay, highest = (0, 1) if scenario == "no decay" else (0.3, 0.8)
    reference, count = Reference(recorder, made["channels"]), min(8, len(labelled))
    steps = math.ceil(max(len(labelled), 28 - len(labelled)) / 8)
    assert len(recorder.steps) == 3 * steps
    for update, step in enumerate(recorder.steps, 1):
        views = one(step.student).views
        logits = reference.student(views.double())
        numbers = shown(data, step, "student")
        losses = []
        for logit, target in zip(logits, data.targets[numbers[:count]], strict=False):
            if made["multilabel"]:
                for x, y in zip(logit, target, strict=True):
                    p = 1 / (1 + torch.exp(-x))
                    losses += [] if math.isnan(y) else [-torch.log(p if y else 1 - p)]
            else:
                losses += [-torch.log(logit.exp()[target.argmax()] / logit.exp().sum())]
        loss = sum(losses) / len(losses)
        if consistent:
            own, other = logits[count:], reference.output_of_teacher(one(step.teacher).views)
            if made["multilabel"]:
                own, other = 1 / (1 + torch.exp(-own)), 1 / (1 + torch.exp(-other))
            else:
                own, other = (x.exp() / x.exp().sum(1, keepdim=True) for x in (own, other))
            weight = 7 * min(1, step.epoch / 1.5)
            loss = loss + weight * ((own - other) ** 2).sum() / own.numel()
        assert step.loss == pytest.approx(loss.item(), abs=1e-4)
        reference.adamw(loss, rates[step.epoch], 0.8, 0.9, 0.02, decay)
        reference.ema(min(1 - 1 / (update + 1), highest))
        reference.check(one(step.ema_update))


@pytest.mark.parametrize("labels", [6, 28])
@pytest.mark.parametrize("options", ["--consistency 0", "--consistency 7"])
def test_without_unlabelled_images_or_weight_the_teacher_is_not_asked(record, labels, options):
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[:labels]) + options)
    # The number of steps does not depend on the weight: 22 unlabelled or 28 labelled images.
    assert len(recorder.steps) == 3 * math.ceil(max(labels, 28 - labels) / 8)
    used = labels == 6 and options == "--consistency 7"
    for step in recorder.steps:
        assert ("teacher" in step.order, "consistency_loss" in step.order) == (used, used)
        assert step.images == len(one(step.student).views) == min(labels, 8) + 8 * used


@pytest.mark.parametrize("unlabelled, shown_images", [(0, 0), (1, 0), (2, 2), (5, 5), (8, 8)])
def test_a_step_has_each_unlabelled_image_once_if_there_are_few(unlabelled, shown_images, record):
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[: 28 - unlabelled]))
    assert len(recorder.steps) == 3 * math.ceil((28 - unlabelled) / 8)
    for step in recorder.steps:
        numbers = shown(data, step, "student")[8:]
        assert len({*numbers}) == len(numbers) == shown_images
        assert {*numbers} <= {*data.train[28 - unlabelled :].tolist()}


def test_more_labels_than_a_batch_give_batches_of_that_size(record):
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[:20]))
    assert len(recorder.steps) == 3 * 3
    for step in recorder.steps:
        numbers = shown(data, step, "student")
        assert len(numbers) == 8 + 8 and {*numbers[:8]} <= {*data.train[:20].tolist()}
        assert sorted(numbers[8:]) == sorted(data.train[20:].tolist())


def test_min_steps_is_the_least_number_of_steps_of_an_epoch(record):
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[:6]) + "--min-steps 5")
    assert Counter(step.epoch for step in recorder.steps) == {0: 5, 1: 5, 2: 5}
    decays = [one(step.ema_update).given[2] for step in recorder.steps]
    assert decays == pytest.approx([1 / 2, 2 / 3, 3 / 4] + [0.8] * 12)


def test_stage_2_starts_from_stage_1_with_one_new_classifier(record, monkeypatch):
    data = made_by_hand()
    record(data, STAGE_1 + "--out first")
    saved = torch.load("first/pretrain.pt", weights_only=True)["state"]
    recorder = record(data, STAGE_2 + "--labels 6 --from first/pretrain.pt --out second")
    for name in ("student", "teacher"):
        network = recorder.first[name]
        kept = [key for key in network if "classifier" not in key]
        assert all(torch.equal(network[key], saved[name][key]) for key in kept)
        assert network["classifier.weight"].shape == (3, 64)
        assert torch.equal(
            network["classifier.weight"], recorder.first["student"]["classifier.weight"]
        )
    weight = "features.0.weight"
    assert not torch.equal(recorder.first["student"][weight], recorder.first["teacher"][weight])


def test_stage_2_from_scratch_starts_with_two_equal_networks(stage_2):
    student, teacher = stage_2.first["student"], stage_2.first["teacher"]
    assert all(torch.equal(student[name], teacher[name]) for name in student)


@pytest.mark.parametrize("command", [STAGE_1, STAGE_2 + "--labels 6 "])
def test_the_first_weights_depend_on_the_seed_only(record, command):
    first = []
    for k, seed in enumerate((0, 0, 1)):
        recorder = record(made_by_hand(), f"{command} --epochs 1 --out o{k} --seed {seed}")
        first.append(recorder.first["student"])
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert not torch.equal(first[0]["features.0.weight"], first[2]["features.0.weight"])
    assert not torch.equal(first[0]["classifier.weight"], first[2]["classifier.weight"])


def test_an_unfinished_stage_1_gives_a_warning(record, capsys):
    record(made_by_hand(), STAGE_1 + "--epochs 2")
    path, args = "runs/mine/pretrain.pt", parse(STAGE_2 + "--from runs/mine/pretrain.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s2mts2, "build_network", lambda *given, **more: SmallNetwork(1, 3))
        s2mts2.load_networks(args, 1, ["a", "b", "c"])
        assert "warning" not in capsys.readouterr().out
        saved = torch.load(path, weights_only=True)
        torch.save(saved | dict(history=saved["history"][:1]), path)
        s2mts2.load_networks(args, 1, ["a", "b", "c"])
    assert f"warning: {path} is not finished" in capsys.readouterr().out


def test_one_image_in_a_step_is_refused(small_network):
    data = made_by_hand()
    args = parse(STAGE_2 + in_file(data, data.train[-1:]) + "--consistency 0")
    with pytest.raises(s2mts2.UserError, match="BatchNorm needs two images.*--labels"):
        s2mts2.finetune(data, args)


def test_one_label_and_unlabelled_images_are_enough(record):
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[-1:]))
    assert [step.images for step in recorder.steps] == [1 + 8] * 3 * 4


def test_a_finetune_checkpoint_gives_both_networks_with_their_classifiers(record):
    record(made_by_hand(), STAGE_2 + "--labels 6 --out done")
    saved = torch.load("done/finetune.pt", weights_only=True)["state"]
    args = SimpleNamespace(arch="tiny", start="done/finetune.pt", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s2mts2, "build_network", lambda *given, **more: SmallNetwork(1, 3))
        networks = s2mts2.load_networks(args, 1, ["a", "b", "c"])
    for network, name in zip(networks, ("student", "teacher"), strict=True):
        assert all(torch.equal(saved[name][k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("arch, channels", [("densenet121", 1), ("tiny", 3)])
def test_a_checkpoint_of_another_network_is_refused(record, arch, channels):
    record(made_by_hand(), STAGE_1 + "--epochs 1")
    args = SimpleNamespace(arch=arch, start="runs/mine/pretrain.pt", device="cpu")
    with pytest.raises(s2mts2.UserError, match=r"'tiny', 1.*not"):
        s2mts2.load_networks(args, channels, ["a", "b", "c"])


def test_the_teacher_is_the_result_and_the_student_is_tested_beside_it(stage_2):
    data = stage_2.data
    result = json.loads(Path("runs/mine/metrics.json").read_text())
    assert result == stage_2.result
    for name, found in (("teacher", result), ("student", result["student"])):
        network = stage_2.networks[name].eval()
        pixels = torch.from_numpy(data.images[data.test]).float() / 255
        with torch.no_grad():
            scores = network((pixels - 0.449) / 0.226).sigmoid()
        auc = [
            metrics.roc_auc_score(data.targets[data.test, k], scores[:, k])
            if 0 < data.targets[data.test, k].sum() < 12
            else None
            for k in range(3)
        ]
        assert list(found["auc"].values()) == pytest.approx(auc)


# ---- epochs: order, views, which images


def by_epoch(recorder, data, network, part=slice(None)):
    """The numbers of the images that a network saw: a list for each epoch."""
    seen = {}
    for step in recorder.steps:
        seen.setdefault(step.epoch, []).extend(shown(data, step, network)[part])
    return list(seen.values())


RUNS = [
    (STAGE_1, "student", slice(None)),
    (STAGE_2 + "--labels 6 ", "student", slice(6)),
    (STAGE_2 + "--labels 6 ", "student", slice(6, None)),
]


@pytest.mark.parametrize("command, network, part", RUNS)
def test_the_order_of_images_depends_on_epoch_and_seed_only(record, command, network, part):
    data, orders = made_by_hand(), []
    labels = in_file(data, data.train[:6]) * ("finetune" in command)
    for k, options in enumerate(("--seed 0", "--seed 0", "--seed 1", "--seed 0 --lr 0")):
        recorder = record(data, f"{command} {labels} {options} --out o{k}")
        orders.append(by_epoch(recorder, data, network, part))
    assert orders[0] == orders[1] == orders[3]
    different = {tuple(epoch) for order in (orders[0], orders[2]) for epoch in order}
    assert len(different) == 6


@pytest.mark.parametrize("command", [STAGE_1, STAGE_2 + "--labels 6 "])
def test_the_views_depend_on_epoch_step_and_seed(record, command):
    data = made_by_hand()
    # All images are the same picture, so that only the random numbers of the views differ.
    data.images[...] = (photo(1, 1, 16) * 255).byte().numpy()
    runs = []
    for k, seed in enumerate((0, 0, 1)):
        recorder = record(data, f"{command} --seed {seed} --out o{k}")
        calls = [call for step in recorder.steps for call in step.random_views]
        runs.append([view.numpy().tobytes() for call in calls for view in call.result])
    assert runs[0] == runs[1]
    assert len({*runs[0]}) == len(runs[0])
    assert not {*runs[0]} & {*runs[2]}


def test_an_epoch_of_stage_1_shows_each_training_image_at_most_once(record):
    data = made_by_hand()
    for epoch in by_epoch(record(data, STAGE_1), data, "student"):
        assert len(epoch) == len({*epoch}) == 24
    # Over the epochs all are shown: what is left out differs.
    longer = by_epoch(record(data, STAGE_1 + "--epochs 8 --out longer"), data, "student")
    assert {*sum(longer, [])} == {*data.train.tolist()}


@pytest.mark.parametrize("options", ["", "--min-steps 10"])
def test_an_epoch_of_stage_2_shows_all_images_equally_often(record, options):
    data = made_by_hand()
    recorder = record(data, STAGE_2 + in_file(data, data.train[:6]) + options)
    steps = 10 if options else 3
    for numbers in by_epoch(recorder, data, "student", slice(6)):
        assert Counter(numbers) == dict.fromkeys(data.train[:6].tolist(), steps)
    for numbers in by_epoch(recorder, data, "student", slice(6, None)):
        count = Counter(numbers)
        assert {*count} == {*data.train[6:].tolist()}
        assert max(count.values()) == math.ceil(steps * 8 / 22)
        assert min(count.values()) == steps * 8 // 22


def test_repeated_passes_over_few_images_have_different_orders():
    batches = s2mts2.batches(np.arange(6) + 100, 5, 6, 0, 0)
    assert batches.shape == (5, 6)
    assert all(sorted(batch) == [100, 101, 102, 103, 104, 105] for batch in batches.tolist())
    assert len({*map(tuple, batches.tolist())}) == 5


def test_no_images_give_empty_batches():
    assert s2mts2.batches(np.arange(0), 5, 8, 0, 0).shape == (5, 0)


def test_the_batches_of_all_processes_are_those_of_one(monkeypatch):
    whole = s2mts2.batches(np.arange(50), 4, 12, 3, 1)
    monkeypatch.setattr(s2mts2, "PROCESSES", 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(s2mts2, "RANK", rank)
        parts.append(s2mts2.batches(np.arange(50), 4, 12, 3, 1))
    assert np.array_equal(np.concatenate(parts, 1), whole)


def watch_images(monkeypatch):
    """Record the numbers of the images that networks see while they are trained."""
    seen, training = {"pretrain": set(), "finetune": set()}, []

    class Watched(SmallNetwork):
        def forward(self, images):
            if training and self.training:
                seen[training[0]].update(numbers_of(images))
            return super().forward(images)

    def watched(name, stage):
        def spied(data, args):
            training[:] = [name]
            args.augment = s2mts2.PLAIN
            return stage(data, args)

        return spied

    monkeypatch.setattr(
        s2mts2,
        "build_network",
        lambda arch, channels, outputs, *_, **__: Watched(channels, outputs),
    )
    for name in seen:
        monkeypatch.setattr(s2mts2, name, watched(name, getattr(s2mts2, name)))
    return seen


@pytest.mark.parametrize("multilabel", [True, False])
def test_no_test_image_reaches_a_network_in_training(monkeypatch, multilabel):
    seen, data = watch_images(monkeypatch), numbered(multilabel=multilabel)
    unused = data.train[-3:]
    data.train = data.train[:-3]
    data.targets[data.train[6:]] = np.nan
    monkeypatch.setattr(s2mts2, "load_data", lambda *given: data)
    run("pretrain --size 16 --epochs 8 --batch 8 --arch tiny --out o")
    run("finetune --from o/pretrain.pt --epochs 3 --batch 8 --size 16 --labels all")
    assert seen["pretrain"] == seen["finetune"] == {*data.train.tolist()}
    assert not seen["pretrain"] & {*data.test.tolist(), *unused.tolist()}


@pytest.mark.parametrize("split", [True, False])
def test_no_image_of_a_test_group_reaches_a_network_in_training(monkeypatch, split):
    """Images 3 g, 3 g + 1 and 3 g + 2 are of group g; the last of each group is unlabelled."""
    seen, rows = watch_images(monkeypatch), []
    for k in range(60):
        name = f"{k:02d}.png"
        Path("own").mkdir(exist_ok=True)
        Image.new("L", (16, 16), 4 * k).save(f"own/{name}")
        label = "" if k % 3 == 2 else k % 2
        part = "test" if k // 3 in (2, 5) else "train"
        rows.append(f"{name},{label},g{k // 3}" + f",{part}" * split)
    header = "image,cat,group" + ",split" * split
    Path("own/labels.csv").write_text("\n".join([header, *rows]))
    groups = {2, 5}
    if not split:
        data = s2mts2.load_data("own", size=16)
        groups = {int(data.names[k][:2]) // 3 for k in data.test}
        assert 1 <= len(groups) <= 9
    run("pretrain --data own --size 16 --epochs 8 --batch 8 --out o")
    run("finetune --from o/pretrain.pt --epochs 3 --batch 8 --size 16")
    expected = {k for k in range(60) if k // 3 not in groups}
    assert seen["pretrain"] == seen["finetune"] == expected


def test_no_unlabelled_image_of_the_test_part_of_a_file_reaches_a_network(monkeypatch):
    seen, arrays, first = watch_images(monkeypatch), {}, 0
    for part, count in (("train", 30), ("val", 10), ("test", 12)):
        levels = 4 * np.arange(first, first + count, dtype=np.uint8)
        arrays[f"{part}_images"] = np.broadcast_to(levels[:, None, None], (count, 16, 16))
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 2
        arrays[f"{part}_labels"][::3] = -1
        first += count
    np.savez("set.npz", **arrays)
    run("pretrain --data set.npz --size 16 --epochs 8 --batch 8 --out o")
    run("finetune --from o/pretrain.pt --epochs 3 --batch 8 --size 16")
    assert seen["pretrain"] == seen["finetune"] == {*range(40)}


def test_targets_of_unlabelled_images_are_never_read(record):
    data = made_by_hand()
    labels = in_file(data, data.train[:6])
    weights = []
    for out, value in (("zero", 0), ("one", 1), ("unknown", np.nan)):
        targets = data.targets.copy()
        targets[data.train[6:]] = value
        other = replace(data, targets=targets)
        stages = [
            record(other, f"{STAGE_1} --out {out}"),
            record(other, f"{STAGE_2} {labels} --from {out}/pretrain.pt --out {out}"),
        ]
        weights.append([copied(stage.networks["teacher"]) for stage in stages])
    for others in weights[1:]:
        for first, other in zip(weights[0], others, strict=True):
            assert all(torch.equal(first[name], other[name]) for name in first)


# ---- network and teacher


@pytest.mark.parametrize("arch", ["tiny", "densenet121"])
def test_a_grey_network_starts_as_the_colour_network_on_a_grey_image(arch):
    networks = []
    for channels in (3, 1):
        torch.manual_seed(5)
        networks.append(s2mts2.build_network(arch, channels, 5).eval())
    colour, grey = networks
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-4)
    assert grey.features.conv0.in_channels == 1


def test_densenet121_is_torchvisions_with_a_linear_classifier():
    network = s2mts2.build_network("densenet121", 3, 5)
    theirs = torchvision.models.densenet121()
    theirs.classifier = nn.Linear(1024, 5)
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (network, theirs)]
    assert shapes[0] == shapes[1]


def test_the_tiny_network_has_a_seventh_of_a_million_weights():
    network = s2mts2.build_network("tiny", 1, 10)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(0.14e6, rel=0.05)
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_the_projection_head_has_two_layers_with_a_relu():
    head = s2mts2.build_network("tiny", 3, 7, head="mlp").classifier
    features = s2mts2.build_network("tiny", 3, 7).classifier.in_features
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [head[0].in_features, head[0].out_features] == [features, features]
    assert [head[2].in_features, head[2].out_features] == [features, 7]


@pytest.mark.parametrize("imagenet, name", [(True, "IMAGENET1K_V1"), (False, None)])
def test_imagenet_weights_are_loaded_if_asked_for(monkeypatch, imagenet, name):
    asked, original = [], torchvision.models.densenet121
    monkeypatch.setattr(
        torchvision.models, "densenet121", lambda weights: asked.append(weights) or original()
    )
    s2mts2.build_network("densenet121", 3, 2, imagenet=imagenet)
    assert asked == [name]


def randomise(network):
    for value in network.state_dict().values():
        floating = value.is_floating_point()
        value.copy_(torch.randn_like(value) if floating else torch.randint(99, value.shape))


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1.0])
def test_one_ema_update_is_a_teacher_plus_1_minus_a_student(a):
    student = SmallNetwork(1, 4).double()
    teacher = s2mts2.make_teacher(student)
    randomise(student)
    randomise(teacher)
    before, source = copied(teacher), copied(student)
    s2mts2.ema_update(teacher, student, a)
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, a * before[name] + (1 - a) * source[name], atol=1e-12)
        else:
            assert torch.equal(value, source[name])
        assert torch.equal(student.state_dict()[name], source[name])


def test_the_ema_equals_the_general_sum_over_changing_students():
    student, a = SmallNetwork(1, 4).double(), 0.9
    teacher = s2mts2.make_teacher(student)
    expected = {name: a**7 * value for name, value in teacher.state_dict().items()}
    for n in range(1, 8):
        randomise(student)
        for name, value in student.state_dict().items():
            expected[name] = expected[name] + (1 - a) * a ** (7 - n) * value
        s2mts2.ema_update(teacher, student, a)
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, expected[name], atol=1e-12)


def test_the_teacher_is_a_copy_without_gradients():
    student = SmallNetwork(1, 4)
    teacher = s2mts2.make_teacher(student)
    for (name, ours), theirs in zip(teacher.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.data_ptr() != theirs.data_ptr()
        assert theirs.requires_grad and not ours.requires_grad


def test_the_teachers_batchnorm_uses_the_batch_and_keeps_its_running_statistics():
    student = s2mts2.build_network("tiny", 1, 4)
    teacher, images = s2mts2.make_teacher(student).train(), torch.randn(8, 1, 32, 32) * 5 + 3
    before = copied(teacher)
    assert torch.allclose(teacher(images), student.train()(images), atol=1e-5)
    for name, value in teacher.state_dict().items():
        assert "num_batches" in name or torch.equal(value, before[name])


def test_the_teacher_in_evaluation_uses_its_running_statistics():
    teacher = s2mts2.make_teacher(s2mts2.build_network("tiny", 1, 4)).eval()
    images = torch.randn(8, 1, 32, 32) * 5 + 3
    alone = teacher(images)[0]
    assert torch.allclose(alone, teacher(images[:1])[0], atol=1e-4)
    teacher.features.norm0.running_mean.add_(1)
    assert not torch.allclose(alone, teacher(images)[0], atol=1e-3)


# ---- losses


def embeddings(images=6, keys=4, dim=10, negatives=30, dtype=torch.float64):
    query = F.normalize(torch.randn(images, dim, dtype=dtype), dim=1)
    noise = torch.randn(images, keys, dim, dtype=dtype)
    key = F.normalize(query[:, None] + noise * 0.5, dim=2)
    queue = F.normalize(torch.randn(negatives, dim, dtype=dtype), dim=1)
    return query.clone().requires_grad_(), key, queue


@pytest.mark.parametrize("t, c", [(0.3, 0.0), (0.3, 0.7), (0.3, 2.0), (1.5, 1.0)])
def test_the_joint_contrastive_loss_and_its_gradient_equal_the_definition(t, c):
    query, keys, queue = embeddings()
    ours = s2mts2.joint_contrastive_loss(query, keys, queue, t, c)
    theirs = loss_with_covariance_matrices(query, keys, queue, t, c)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-9)
    gradients = [torch.autograd.grad(loss, query)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-9)


@pytest.mark.parametrize("c", [0.0, 2.0])
def test_with_one_key_the_joint_contrastive_loss_is_infonce(c):
    query, keys, queue = embeddings(keys=1)
    logits = torch.cat([(query * keys[:, 0]).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    ours = s2mts2.joint_contrastive_loss(query, keys, queue, 0.2, c)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_worked_example_of_the_joint_contrastive_loss_is_right():
    function = s2mts2.joint_contrastive_loss
    (example,) = doctest.DocTestFinder().find(function, "loss", globs=vars(s2mts2).copy())
    result = doctest.DocTestRunner().run(example)
    assert result.attempted == 3 and result.failed == 0
    assert math.log(math.exp(1 / 2 + 1 / 8) + 2) - 1 / 2 == pytest.approx(0.853, abs=5e-4)


def test_the_loss_bounds_the_mean_over_many_gaussian_keys():
    query, keys, queue = (each.detach() for each in embeddings(images=3, keys=5, negatives=200))
    mean, t = keys.mean(1, keepdim=True), 0.2
    noise = torch.randn(3, 100_000, 5, dtype=torch.float64)
    # mean + sum_m z_m (k_m - mean) / sqrt(M) has the mean and the biased covariance of the keys.
    sample = mean + torch.cat([noise, -noise], 1) @ (keys - mean) / 5**0.5
    positives = torch.einsum("nd,nsd->ns", query, sample) / t
    negatives = (query @ queue.T / t).exp().sum(1, keepdim=True)
    monte_carlo = (torch.log(positives.exp() + negatives) - positives).mean()
    difference = s2mts2.joint_contrastive_loss(query, keys, queue, t, 1.0) - monte_carlo
    assert -2e-4 <= difference <= 0.005
    without = s2mts2.joint_contrastive_loss(query, keys, queue, t, 0.0)
    assert without < monte_carlo - 0.005


def test_the_loss_of_a_student_that_knows_nothing_is_log_of_k_plus_1():
    query = torch.tensor([[1.0, 0.0, 0.0]])
    keys, queue = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[0.0, 0.0, 1.0]]).repeat(7, 1)
    loss = s2mts2.joint_contrastive_loss(query, keys, queue, 0.1, 1.0)
    assert loss.item() == pytest.approx(math.log(8))


def test_the_loss_forms_no_tensor_larger_than_the_logits_and_is_finite():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    query, keys, queue = embeddings(30, 5, 20, 200, torch.float32)
    keys[0, 0], keys[0, 1] = query[0].detach(), -query[0].detach()
    with Sizes():
        loss = s2mts2.joint_contrastive_loss(query, keys, queue, 0.005, 2.0)
        loss.backward()
    assert 0 < max(sizes) <= 30 * 201
    assert loss.isfinite() and query.grad.isfinite().all()


def test_the_queue_holds_the_newest_means_first():
    for length, batch in ((7, 3), (5, 5), (4, 9)):
        queue, means = torch.full((length, 2), -1), torch.arange(36).repeat(2, 1).T
        expected = [-1] * length
        for first in range(0, 36, batch):
            s2mts2.enqueue(queue, means[first : first + batch])
            expected = (list(range(first, min(36, first + batch))) + expected)[:length]
            assert queue[:, 0].tolist() == queue[:, 1].tolist() == expected


def test_the_supervised_loss_of_multi_label_data_is_the_mean_over_known_targets():
    logits = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    truth, unknown = (torch.rand(40, 3) < 0.4).double(), torch.rand(40, 3) < 0.3
    loss = s2mts2.supervised_loss(logits, truth.masked_fill(unknown, torch.nan), True)
    p = 1 / (1 + (-logits).exp())
    expected = -torch.where(truth == 1, p, 1 - p).log()[~unknown].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    assert (logits.grad[unknown] == 0).all() and (logits.grad[~unknown] != 0).all()


def test_the_supervised_loss_of_multi_class_data_is_the_mean_over_known_rows():
    logits = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    targets, unknown = torch.eye(3).double()[torch.arange(40) % 3], torch.arange(40) % 4 == 1
    # A row that is known in part counts as not known.
    targets[unknown] = torch.nan
    targets[5, 1] = 0
    loss = s2mts2.supervised_loss(logits, targets, False)
    soft = logits.exp() / logits.exp().sum(1, keepdim=True)
    terms = [-soft[n, n % 3].log() for n in range(40) if n % 4 != 1]
    assert loss.item() == pytest.approx(sum(terms).item() / 30, rel=1e-9)
    loss.backward()
    assert (logits.grad[unknown] == 0).all() and (logits.grad[~unknown] != 0).all()


@pytest.mark.parametrize("multilabel", [True, False])
def test_the_supervised_loss_of_two_processes_is_that_of_one(monkeypatch, multilabel):
    logits, targets = torch.randn(12, 3), torch.eye(3)[torch.arange(12) % 3]
    targets[[1, 2, 3, 9]] = torch.nan
    whole = s2mts2.supervised_loss(logits, targets, multilabel)
    parts = slice(6), slice(6, None)
    # Known rows of the two processes: 3 and 5; each has 3 targets.
    counts = [9, 15] if multilabel else [3, 5]
    monkeypatch.setattr(s2mts2, "PROCESSES", 2)
    monkeypatch.setattr(s2mts2, "all_gather", lambda tensor: torch.tensor(counts))
    losses = [s2mts2.supervised_loss(logits[part], targets[part], multilabel) for part in parts]
    # Gradients are averaged over the processes.
    assert torch.allclose(sum(losses) / 2, whole)


@pytest.mark.parametrize("multilabel", [True, False])
def test_the_consistency_loss_is_the_mean_squared_difference_of_probabilities(multilabel):
    one, two = torch.randn(2, 40, 3, dtype=torch.float64)
    loss = s2mts2.consistency_loss(one, two, multilabel)
    if multilabel:
        p, q = 1 / (1 + (-one).exp()), 1 / (1 + (-two).exp())
    else:
        p, q = (x.exp() / x.exp().sum(1, keepdim=True) for x in (one, two))
    assert loss.item() == pytest.approx(((p - q) ** 2).sum().item() / 120, rel=1e-9)


# ---- evaluation and metrics


def test_evaluation_gives_each_image_once_in_the_given_order(small_network):
    data, network = made_by_hand(), SmallNetwork(1, 3)
    pixels = torch.from_numpy(data.images).float() / 255
    with torch.no_grad():
        expected = network.eval()((pixels - 0.449) / 0.226).sigmoid().numpy()
    for indices in (data.test, data.test[::-1].copy(), data.train):
        for batch in (1, 5, 64):
            scores = s2mts2.evaluate(network, data, indices, 16, batch)
            assert np.allclose(scores, expected[indices], atol=1e-5)


def test_evaluation_of_multi_class_data_gives_softmax_probabilities():
    data, network = made_by_hand(3, False), SmallNetwork(3, 3)
    scores = s2mts2.evaluate(network, data, data.test, 16)
    assert scores.dtype == np.float32
    assert np.allclose(scores.sum(1), 1, atol=1e-5) and (scores > 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_neither_network_nor_its_mode(training):
    data, network = made_by_hand(), SmallNetwork(1, 3).train(training)
    before = copied(network)
    s2mts2.evaluate(network, data, data.test, 16)
    assert network.training == training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_evaluation_resizes_to_the_given_side():
    data, sides = made_by_hand(), []
    network = SmallNetwork(1, 3)
    network.features = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten())
    network.features.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape))
    s2mts2.evaluate(network, data, data.test, 24)
    assert sides == [(12, 1, 24, 24)]


def test_the_auc_of_a_class_uses_its_known_targets_only():
    random = np.random.default_rng(0)
    targets, scores = (random.random((60, 3)) < 0.4).astype(np.float32), random.random((60, 3))
    targets[random.random((60, 3)) < 0.3] = np.nan
    targets[targets[:, 2] == 1, 2] = np.nan
    result, known = s2mts2.classification_metrics(targets, scores, "abc", True), ~np.isnan(targets)
    a, b = (metrics.roc_auc_score(targets[known[:, k], k], scores[known[:, k], k]) for k in (0, 1))
    # Class c has no positive.
    assert result["auc"] == dict(a=pytest.approx(a), b=pytest.approx(b), c=None)
    assert result["mean_auc"] == pytest.approx((a + b) / 2)
    assert set(result) == {"auc", "mean_auc"}


def test_no_auc_at_all_is_none():
    result = s2mts2.classification_metrics(np.ones((5, 2)), np.random.rand(5, 2), "ab", True)
    assert result == dict(mean_auc=None, auc=dict(a=None, b=None))


def test_scores_that_are_not_a_number_have_no_auc():
    scores = np.random.default_rng(0).random((6, 2))
    scores[3, 0] = np.nan
    result = s2mts2.classification_metrics(np.eye(2)[np.arange(6) % 2], scores, "ab", True)
    assert result["auc"]["a"] is None and result["auc"]["b"] is not None


def test_multi_class_metrics_agree_with_scikit_learn():
    random, mean = np.random.default_rng(0), dict(labels=[0, 1, 2], average="macro")
    truth, scores = random.integers(0, 3, 60), random.random((60, 4)).astype(np.float32)
    scores[np.arange(60), truth] += 0.4
    # Class d does not occur in the targets.
    result = s2mts2.classification_metrics(np.eye(4)[truth], scores, "abcd", False)
    most = scores.argmax(1)
    expected = dict(
        mean_auc=np.mean([metrics.roc_auc_score(truth == k, scores[:, k]) for k in range(3)]),
        accuracy=np.mean(truth == most),
        macro_f1=metrics.f1_score(truth, most, **mean),
        macro_sensitivity=metrics.recall_score(truth, most, **mean),
        macro_specificity=np.mean([np.mean(most[truth != k] != k) for k in range(3)]),
    )
    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_specificity_of_a_single_negative():
    truth, scores = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    result = s2mts2.classification_metrics(np.eye(2)[truth], scores, "ab", False)
    # Class a: its one negative is right. Class b: one of its two.
    assert result["macro_specificity"] == pytest.approx((1 + 1 / 2) / 2)


# ---- settings


# Size, epochs, batch, learning rate, ... of design.md, read in the authors' code.
PUBLISHED = {
    "pretrain --data cxr14": dict(
        arch="densenet121", init="imagenet", size=256, epochs=100, batch=256, lr=0.03,
        schedule="cosine", momentum=0.9, weight_decay=1e-4, teacher_momentum=0.999, keys=2,
        dim=128, queue=65536, temperature=0.07, lambda_=2, crop=0.8, rotate=10, rotate_p=0.5,
        jitter=0.4, hue=0.4, jitter_p=0.8, blur=2, blur_p=0.5, flip_p=0.5, erase_p=0.5, centre=0),
    "pretrain --data chexpert": dict(size=224, keys=5, erase_p=0, crop=0.8, queue=65536),
    "pretrain --data isic2018": dict(size=224, keys=5, erase_p=0, crop=0, centre=0.25),
    "finetune --from imagenet --data cxr14": dict(
        arch="densenet121", size=512, epochs=30, batch=16, lr=0.05, beta1=0.9, beta2=0.99,
        eps=0.1, weight_decay=0, schedule="steps", teacher_momentum=0.999, consistency=1, ramp=1,
        labels=0.02, rotate=5),
    "finetune --from imagenet --data chexpert": dict(
        size=224, epochs=30, batch=64, lr=0.05, eps=0.1, weight_decay=0.01, schedule="cosine",
        labels=0.02),
    "finetune --from imagenet --data isic2018": dict(
        size=224, epochs=80, batch=16, lr=0.05, eps=0.1, weight_decay=0, schedule="cosine",
        labels=0.2),
}  # fmt: skip


@pytest.mark.parametrize("command", PUBLISHED)
def test_the_recipes_have_the_published_values(command):
    args = parse(command)
    values = vars(args) | args.augment
    assert {name: values[name] for name in PUBLISHED[command]} == PUBLISHED[command]


@pytest.mark.parametrize("schedule, last", [("cosine", 0.0027), ("steps", 0.01)])
def test_the_learning_rate_decreases_and_stays_positive(schedule, last):
    args = parse(f"pretrain --data cxr14 --lr 1 --epochs 30 --schedule {schedule}")
    rates = [s2mts2.learning_rate(args, epoch) for epoch in range(30)]
    assert rates[0] == 1 and rates[29] == pytest.approx(last, rel=0.02)
    assert rates == sorted(rates, reverse=True)
    if schedule == "steps":
        assert rates[14:16] == pytest.approx([1, 0.1]) and rates[24:26] == pytest.approx(
            [0.1, 0.01]
        )


@pytest.mark.parametrize("recipe", ["cxr14", "digits"])
def test_the_ramp_of_the_published_recipe_grows_until_the_end(recipe):
    args = parse(f"finetune --from scratch --recipe {recipe} --consistency 3 --epochs 4")
    weights = [s2mts2.consistency_weight(args, epoch) for epoch in range(4)]
    assert weights == pytest.approx([0, 0.75, 1.5, 2.25])


# ---- views

ZERO, ONE = torch.zeros(3), torch.ones(3)


def pixels_of(views):
    """Views in [0, 1], without the normalisation."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if views.shape[1] == 1:
        mean, std = [0.449], [0.226]
    return views * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_view_is_the_normalised_image(channels):
    colour = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if channels == 3 else ([0.449], [0.226])
    images = (photo(channels=channels) * 255).to(torch.uint8)
    before, views = images.clone(), s2mts2.random_views(images, PLAIN, 48)
    assert views.dtype == torch.float32 and torch.equal(images, before)
    assert torch.allclose(views, TF.normalize(images / 255, *colour), atol=1e-6)
    resized = TF.normalize(TF.resize(images / 255, [20, 20], antialias=True), *colour)
    assert torch.allclose(s2mts2.random_views(images, PLAIN, 20), resized, atol=1e-5)


def test_images_that_are_float_are_not_changed():
    images = photo()
    before = images.clone()
    strong = PLAIN | dict(jitter=0.4, jitter_p=1.0, erase_p=1.0, blur=1.0, blur_p=1.0)
    s2mts2.random_views(images, strong, 48)
    assert torch.equal(images, before)
    assert torch.allclose(pixels_of(s2mts2.random_views(images, PLAIN, 48)), before, atol=1e-6)


def test_many_images_have_the_views_of_few():
    # At 600 pixels two images at a time go through a CPU's cache.
    images = torch.arange(0, 250, 50, dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 1, 4, 4)
    views = pixels_of(s2mts2.random_views(images, PLAIN, 600))
    assert views.shape == (5, 1, 600, 600)
    assert torch.allclose(views.mean((1, 2, 3)) * 255, images[:, 0, 0, 0].float(), atol=0.01)


def test_crop_rotation_and_flips_agree_with_torchvision():
    images, bilinear = photo(side=64), TF.InterpolationMode.BILINEAR
    # Left, top, width, height, angle, flip and vertical flip of three images.
    numbers = torch.Tensor(
        [
            [0.25, 0.25, 0],
            [0.25, 0.125, 0],
            [0.5, 0.5, 1],
            [0.5, 0.5, 1],
            [20, -7, 90],
            [1, 0, 1],
            [0, 1, 1],
        ]
    )
    cropped = s2mts2.crop_rotate_flip(images, *numbers[:4], ZERO, ZERO, ZERO)
    views = s2mts2.crop_rotate_flip(images, *numbers)
    flips = TF.hflip, TF.vflip, lambda image: TF.vflip(TF.hflip(image))
    for k, image in enumerate(images):
        left, top, width, height = (64 * numbers[:4, k]).int().tolist()
        expected = TF.resized_crop(image, top, left, height, width, [64, 64], antialias=False)
        # torchvision does not see pixels beyond the border of the crop.
        assert (cropped[k] - expected)[:, 4:-4, 4:-4].abs().max() < 1e-5
        expected = flips[k](TF.rotate(expected, float(numbers[4, k]), bilinear))
        assert (views[k] - expected)[:, 16:48, 16:48].abs().max() < 0.01


def affine_maps(change, count=1000, side=32):
    """Where the pixels of views come from: [n, 2, 3], as (x, y) = A (column, row) + b, in [-1, 1].

    The image holds its own coordinates: red is the column, green the row. They are read from the
    middle of the views, which lies in the image.
    """
    place = (2 * torch.arange(side) + 1) / side - 1
    red, green = place.expand(side, side), place.expand(side, side).T
    image = torch.stack([red, green, torch.zeros(side, side)]) / 4 + 0.5
    views = s2mts2.random_views(image.expand(count, -1, -1, -1), PLAIN | change, side)
    middle = slice(side // 4, -side // 4)
    coordinates = (pixels_of(views)[:, :2, middle, middle] - 0.5) * 4
    ones = torch.ones(side, side)
    known = torch.stack([red, green, ones])[:, middle, middle].flatten(1).T
    solution = torch.linalg.lstsq(known.expand(count, -1, -1), coordinates.flatten(2).mT).solution
    assert torch.allclose(known @ solution, coordinates.flatten(2).mT, atol=1e-3)
    return solution.mT


def test_rotation_goes_in_both_directions_up_to_the_given_angle():
    maps = affine_maps(dict(rotate=10.0, rotate_p=1.0))
    angles = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert -10.01 < angles.min() < -9.5 and 9.5 < angles.max() < 10.01
    assert angles.mean().abs() < 0.7
    assert angles.std() == pytest.approx(10 / 3**0.5, rel=0.1)


def test_random_crops_have_area_ratio_and_place_of_the_settings():
    maps = affine_maps(dict(crop=0.8), 4000)
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    area, ratio = width * height, (width / height).log()
    assert 0.199 < area.min() < 0.25 and 0.95 < area.max() < 1.001
    assert area.mean() == pytest.approx(0.58, abs=0.03)
    assert -math.log(4 / 3) - 0.001 < ratio.min() < -0.26
    assert math.log(4 / 3) + 0.001 > ratio.max() > 0.26
    for shift, size in ((maps[:, 0, 2], width), (maps[:, 1, 2], height)):
        start = (1 + shift - size) / 2
        room = 1 - size
        assert start.min() > -0.001 and (start - room).max() < 0.001
        where = (start / room)[room > 0.1]
        assert where.min() < 0.02 and where.max() > 0.98
        assert where.mean() == pytest.approx(0.5, abs=0.03)
    assert (maps[:, 0, 1].abs() < 0.001).all() and (maps[:, 1, 0].abs() < 0.001).all()


def test_the_centre_crop_keeps_the_middle_of_the_width():
    expected = torch.tensor([[0.75, 0, 0], [0, 1, 0]])
    assert torch.allclose(affine_maps(dict(centre=0.25), 20), expected, atol=1e-3)


def test_a_random_crop_after_the_centre_crop_stays_in_the_middle():
    maps = affine_maps(dict(centre=0.25, crop=0.5))
    for axis, largest in ((0, 0.75), (1, 1)):
        edges = maps[:, axis, 2, None] + maps[:, axis, axis, None] * torch.tensor([-1, 1])
        assert edges.abs().max() == pytest.approx(largest, abs=0.01)


def test_outside_of_the_image_a_view_is_black():
    views = s2mts2.random_views(
        torch.ones(50, 1, 32, 32), PLAIN | dict(rotate=45.0, rotate_p=1), 32
    )
    assert (pixels_of(views)[:, 0, 0, 0].abs() < 1e-5).any()


@pytest.mark.parametrize("name, axis", [("flip_p", 0), ("vertical_flip_p", 1)])
def test_a_flip_turns_one_axis(name, axis):
    maps = affine_maps({name: 1.0}, 20)
    expected = torch.eye(2, 3)
    expected[axis, axis] = -1
    assert torch.allclose(maps, expected, atol=1e-3)


def test_brightness_contrast_and_saturation_agree_with_torchvision():
    images, factors = photo(), torch.Tensor([0.6, 1.3, 1.4])
    theirs = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for place, change in enumerate(theirs):
        values = [factors if k == place else ONE for k in range(3)]
        ours = s2mts2.jitter_colours(images, *values, ZERO)
        grey = s2mts2.jitter_colours(images[:, :1], *values, ZERO)
        for k, factor in enumerate(factors.tolist()):
            assert (ours[k] - change(images[k], factor)).abs().max() < 0.005
            assert (grey[k] - change(images[k, :1], factor)).abs().max() < 1e-5


def test_brightness_comes_before_contrast():
    images = photo() * 0.2 + 0.3
    brightness, contrast = torch.Tensor([0.7, 1.2, 1.4]), torch.Tensor([1.3, 0.6, 1.2])
    ours = s2mts2.jitter_colours(images, brightness, contrast, ONE, ZERO)
    for k, image in enumerate(images):
        brighter = TF.adjust_brightness(image, brightness[k].item())
        expected = TF.adjust_contrast(brighter, contrast[k].item())
        assert (ours[k] - expected).abs().max() < 0.005


def test_a_rotation_of_the_hue_keeps_the_grey_level_and_three_thirds_are_a_circle():
    images = photo() * 0.2 + 0.4
    half, third = (s2mts2.jitter_colours(images, ONE, ONE, ONE, ONE / parts) for parts in (2, 3))
    assert (half - images).abs().max() > 0.05
    assert (TF.rgb_to_grayscale(half) - TF.rgb_to_grayscale(images)).abs().max() < 0.005
    circle = s2mts2.jitter_colours(third, ONE, ONE, ONE, ONE * 2 / 3)
    assert torch.allclose(circle, images, atol=1e-3)


def colour_factors(change, count=2000):
    """Brightness, contrast, saturation and rotation of the hue (fraction of a circle) of views.

    The image is two grey levels with the same reddish tint.
    """
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.275, -0.321], [0.212, -0.523, 0.311]])
    level = torch.tensor([0.4, 0.5]).repeat(4, 2).expand(3, 4, 4)
    tint = to_yiq.inverse() @ torch.tensor([0.0, 0.03, 0.01])
    image = level + tint.view(3, 1, 1)
    views = s2mts2.random_views(image.expand(count, -1, -1, -1), PLAIN | change, 4)
    new = torch.einsum("ij,njhw->nihw", to_yiq, pixels_of(views))
    brightness = new[:, 0].mean((1, 2)) / 0.45
    contrast = (new[:, 0, 0, 1] - new[:, 0, 0, 0]) / 0.1 / brightness
    plane = torch.complex(new[:, 1, 0, 0], new[:, 2, 0, 0]) / complex(0.03, 0.01)
    saturation = plane.abs() / contrast / brightness
    return brightness, contrast, saturation, plane.angle() / (2 * math.pi)


def test_jitter_goes_up_and_down_by_the_given_part():
    *factors, hue = colour_factors(dict(jitter=0.4, hue=0.1, jitter_p=1.0))
    for factor in factors:
        assert 0.595 < factor.min() < 0.62 and 1.38 < factor.max() < 1.405
        assert factor.mean() == pytest.approx(1, abs=0.03)
    assert -0.1001 < hue.min() < -0.095 and 0.095 < hue.max() < 0.1001
    # Four random numbers, not one.
    correlation = torch.corrcoef(torch.stack([*factors, hue])) - torch.eye(4)
    assert correlation.abs().max() < 0.1


def test_jitter_of_grey_images_goes_up_and_down():
    images = torch.full((500, 1, 4, 4), 0.5)
    views = s2mts2.random_views(images, PLAIN | dict(jitter=0.4, jitter_p=1.0), 4)
    level = pixels_of(views).mean((1, 2, 3)) / 0.5
    assert 0.599 < level.min() < 0.63 and 1.37 < level.max() < 1.401


def test_the_kernel_of_the_blur_reaches_three_standard_deviations():
    dot = torch.zeros(1, 1, 31, 31)
    dot[0, 0, 15, 15] = 1
    blurred = s2mts2.gaussian_blur(dot, torch.tensor([1.5]), 1.5)[0, 0, 15]
    # ceil(4.5) pixels on each side.
    assert blurred.nonzero().flatten().tolist() == list(range(10, 21))


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_torchvision(channels):
    images, sigma = torch.rand(3, channels, 48, 40), torch.Tensor([0.1, 1.0, 2.0])
    blurred = s2mts2.gaussian_blur(images, sigma, 2.0)
    for image, view, width in zip(images, blurred, sigma.tolist(), strict=True):
        assert torch.allclose(view, TF.gaussian_blur(image, [13, 13], [width] * 2), atol=1e-5)


def test_blur_has_standard_deviations_from_a_tenth_to_the_largest():
    images = torch.zeros(300, 1, 33, 33)
    images[:, :, 16, 16] = 1
    views = pixels_of(s2mts2.random_views(images, PLAIN | dict(blur=2.0, blur_p=1.0), 33))
    distance = torch.arange(33.0) - 16
    sigma = (views[:, 0].sum(1) * distance**2).sum(1).clamp(min=0).sqrt()
    assert sigma.min() < 0.2 and 1.9 < sigma.max() < 2.01
    assert sigma.mean() == pytest.approx(1.05, abs=0.15)


@pytest.mark.parametrize("largest, low", [(2.0, 0.1), (0.05, 0.05)])
def test_the_blur_gets_random_standard_deviations_of_the_range(largest, low, monkeypatch):
    """The pixels of a narrow blur do not show its width."""
    got = []

    def record(images, sigma, most):
        got.append((sigma, most))
        return images

    monkeypatch.setattr(s2mts2, "gaussian_blur", record)
    images = torch.zeros(1000, 1, 16, 16, dtype=torch.uint8)
    s2mts2.random_views(images, PLAIN | dict(blur=largest, blur_p=1.0), 16)
    ((sigma, most),) = got
    assert most == largest
    near = 0.01 * (largest - low) + 1e-6
    assert low - 1e-6 <= sigma.min() <= low + near
    assert largest - near <= sigma.max() <= largest + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_erase_clears_the_rectangle(channels):
    expected = torch.ones(2, channels, 8, 8)
    place = torch.Tensor([[0.25, 0], [0.5, 0], [0.5, 0], [0.25, 1]])
    expected[0, :, 4:6, 2:6] = 0
    assert torch.equal(s2mts2.erase(torch.ones_like(expected), *place), expected)


def test_erased_rectangles_have_the_mean_grey_and_areas_of_the_settings():
    images = torch.full((1000, 3, 32, 32), 0.9)
    views = s2mts2.random_views(images, PLAIN | dict(erase_p=1.0), 32)
    erased = (views == 0).all(1)
    area = erased.float().mean((1, 2))
    assert 0.01 < area.min() < 0.04 and 0.29 < area.max() < 0.36
    assert area.mean() == pytest.approx(0.17, abs=0.02)
    assert torch.allclose(pixels_of(views).permute(0, 2, 3, 1)[~erased], torch.tensor(0.9))
    height, width = erased.any(2).sum(1), erased.any(1).sum(1)
    assert (width > 1.8 * height).any() and (height > 1.8 * width).any()


def test_each_view_has_its_own_random_numbers():
    strong = dict.fromkeys(PLAIN, 0.5) | dict(centre=0.1, crop=0.8, rotate=10.0, blur=2.0)
    for channels in (1, 3):
        copies = photo(1, channels).expand(16, -1, -1, -1)
        views = s2mts2.random_views(copies, strong, 32).flatten(1)
        assert views.isfinite().all()
        assert torch.cdist(views, views).add(torch.eye(16)).min() > 0.1


@pytest.mark.parametrize(
    "change, probability",
    [
        (dict(flip_p=0.5), 0.5),
        (dict(vertical_flip_p=0.3), 0.3),
        (dict(rotate=10.0, rotate_p=0.3), 0.3),
        (dict(jitter=0.4, jitter_p=0.8), 0.8),
        (dict(hue=0.4, jitter_p=0.6), 0.6),
        (dict(erase_p=0.5), 0.5),
        (dict(blur=2.0, blur_p=0.5), 0.5),
        (dict(crop=0.8), 1.0),
        (dict(rotate=10.0), 0.0),
        (dict(jitter=0.4, hue=0.4), 0.0),
        (dict(blur=2.0), 0.0),
    ],
)
def test_each_change_has_its_probability(change, probability):
    copies = photo(1, 3, 24).expand(600, -1, -1, -1)
    views = s2mts2.random_views(copies, PLAIN | change, 24)
    difference = (views - s2mts2.random_views(copies, PLAIN, 24)).abs().flatten(1).amax(1)
    assert (difference > 1e-3).float().mean() == pytest.approx(probability, abs=0.07)


def test_the_blurred_images_are_chosen_at_random_and_also_of_a_single_one():
    image = torch.rand(1, 1, 32, 32)
    plain, change = s2mts2.random_views(image, PLAIN, 32), PLAIN | dict(blur=2.0, blur_p=0.5)
    alone = [not torch.equal(s2mts2.random_views(image, change, 32), plain) for _ in range(200)]
    assert np.mean(alone) == pytest.approx(0.5, abs=0.12)
    copies = image.expand(8, -1, -1, -1)
    blurred = [
        (s2mts2.random_views(copies, change, 32) != plain).flatten(1).any(1) for _ in range(100)
    ]
    share = torch.stack(blurred).float().mean(0)
    assert (share - 0.5).abs().max() < 0.2


# ---- devices


class WithoutFiles:
    """In place of Run: tensors without values cannot be saved."""

    epochs_done = 0

    def __init__(self, data, args, images_per_epoch, state, labelled=()):
        pass

    def start_epoch(self, epoch):
        pass

    def step(self, loss, images):
        assert loss.device.type == "cuda"
        Path("steps").write_text(f"{Path('steps').read_text()}{images} ")

    def finish_epoch(self):
        pass


def moved(module, device=None, **words):
    """Module.to, which cannot move tensors without values."""
    for each in module.modules() if device else ():
        for name, value in each._parameters.items():
            each._parameters[name] = nn.Parameter(value.detach().to(device), value.requires_grad)
        for name, value in each._buffers.items():
            each._buffers[name] = value.to(device)
    return module


def without_batchnorm(arch, channels, outputs, head="linear", imagenet=False):
    features = nn.Sequential(nn.Conv2d(channels, 4, 4, 4), nn.Flatten())
    return nn.Sequential(OrderedDict(features=features, classifier=nn.Linear(64, outputs)))


def imitate_gpu(fake_tensors, args):
    """Run a stage with tensors that have a device, cuda, but no values. Write errors to a file.

    PyTorch raises an error where a tensor on the CPU meets one on the GPU. For such tensors it has
    no backward pass and no numbers: what needs them is replaced. Runs in a process of its own.
    """
    faulthandler.disable()
    rand = torch.rand
    torch.rand = lambda *size, **words: 0.5 if size == ((),) else rand(*size, **words)
    torch.cuda.set_device, torch.Tensor.backward = lambda device: None, lambda loss: None
    torch.Tensor.pin_memory = lambda tensor: tensor
    nn.Module.to, s2mts2.build_network = moved, without_batchnorm
    s2mts2.Run, s2mts2.save_views, s2mts2.report = WithoutFiles, print, print
    with torch.no_grad(), fake_tensors.FakeTensorMode(allow_non_fake_inputs=True):
        moved(nn.Linear(3, 2), "cuda")(torch.zeros(4, 3, device="cuda")).cpu()
        Path("steps").write_text("")
        try:
            for multilabel in (True, False):
                getattr(s2mts2, args.command)(made_by_hand(3, multilabel), args)
        except Exception:
            Path("error").write_text(traceback.format_exc())


@pytest.mark.parametrize(
    "stage, images", [("pretrain --keys 2", 8), ("finetune --from scratch --labels 6", 6 + 8)]
)
@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a process of its own"
)
def test_no_tensor_on_the_cpu_meets_one_on_the_gpu(stage, images):
    fake_tensors = pytest.importorskip("torch._subclasses.fake_tensor")
    command = f"{stage} --recipe cxr14 --arch tiny --size 16 --batch 8 --epochs 1 --device cuda"
    command += " --blur 2 --blur-p .5 --erase-p .5 --jitter .4 --hue .1 --jitter-p .8"
    given = fake_tensors, parse(command)
    process = multiprocessing.get_context("fork").Process(target=imitate_gpu, args=given)
    process.start()
    process.join(60)
    error = Path("error").read_text() if Path("error").exists() else ""
    # The last line names the error: of two devices, or of something that cannot be imitated.
    assert "device" not in error.strip().rpartition("\n")[2], error
    if error or process.exitcode != 0:
        process.kill()
        pytest.skip(f"this PyTorch cannot imitate a GPU: {error[-200:]}")
    # Three steps for each kind of labels.
    assert Path("steps").read_text().split() == [str(images)] * 6


# ---- made data


class TinyNetwork(nn.Module):
    """A linear network of the mean pixels of a 4 x 4 grid."""

    def __init__(self, arch, channels, outputs, head="linear", imagenet=False):
        super().__init__()
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.classifier = nn.Linear(16 * channels, outputs)

    def forward(self, images):
        return self.classifier(self.features(images))


@pytest.fixture
def tiny_network(monkeypatch):
    monkeypatch.setattr(s2mts2, "build_network", TinyNetwork)


TINY_STAGE_1 = "--epochs 1 --batch 4 --size 16 --device cpu"
TINY_STAGE_2 = "--epochs 1 --batch 4 --min-steps 0 --device cpu"


def write_image(path, seed, mode="L"):
    """A small picture that is different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).convert(mode).save(path)


def close_to_file(pixels, path, mode):
    """Whether pixels [channels, side, side] are those of a small image file."""
    side = pixels.shape[-1]
    expected = Image.open(path).convert(mode).resize((side, side), Image.Resampling.BILINEAR)
    expected = np.atleast_3d(np.asarray(expected, int)).transpose(2, 0, 1)
    return np.abs(expected - pixels).max() <= 2


FINDINGS = ["No Finding", "Hernia", "Mass|Nodule", "Effusion", "Mass|Pleural_Thickening"]
LESIONS = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
ENTRIES, ISIC = "Data_Entry_2017_v2020.csv", "ISIC2018_Task3_Training_"


def cxr14(root, count=30):
    """Images of patients with three images each; image 3 is RGBA, image 4 RGB."""
    rows = ["Image Index,Finding Labels,Follow-up #,OriginalImage[Width,Height]"]
    names = [f"{k // 3:08d}_{k % 3:03d}.png" for k in range(count)]
    for k, name in enumerate(names):
        rows.append(f"{name},{FINDINGS[k % 5]},0,2500,2048")
        write_image(root / "images" / name, k, {3: "RGBA", 4: "RGB"}.get(k, "L"))
    train = count * 2 // 3
    parts = {"train_val_list.txt": names[:train], "test_list.txt": names[train:], ENTRIES: rows}
    for name, lines in parts.items():
        (root / name).write_text("\n".join(lines) + "\n")


def chexpert(root, prefix="CheXpert-v1.0-small", count=80):
    """Two images of each patient. Target j of patient p is entry (p + j) % 4 of four."""
    rows = ["Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(f"finding {k}" for k in range(14))]
    for k in range(count):
        name = f"{prefix}/train/patient{k // 2:05d}/study1/view{k % 2 + 1}_frontal.jpg"
        write_image(root / name, k)
        cells = ",".join(["1.0", "0.0", "-1.0", ""][(k // 2 + j) % 4] for j in range(14))
        rows.append(f"{name},Female,68,Frontal,AP,{cells}")
    (root / prefix / "train.csv").write_text("\n".join(rows) + "\n")


def isic2018(root, count=84):
    """Image k has class k % 7; the two images of a lesion are k and k + 7."""
    rows, lesions = ["image," + ",".join(LESIONS)], ["image,lesion_id,diagnosis_confirm_type"]
    (root / f"{ISIC}GroundTruth").mkdir(parents=True)
    for k in range(count):
        write_image(root / f"{ISIC}Input/ISIC_{k:07d}.jpg", k, "RGB")
        rows.append(f"ISIC_{k:07d}," + ",".join("1.0" if k % 7 == j else "0.0" for j in range(7)))
        lesions.append(f"ISIC_{k:07d},HAM_{k % 7}{k // 14},histopathology")
    (root / f"{ISIC}GroundTruth/{ISIC}GroundTruth.csv").write_text("\n".join(rows))
    (root / f"{ISIC}LesionGroupings.csv").write_text("\n".join(lesions))


def npz(root=Path(), grey=True, multilabel=False, counts=(60, 4, 16), **changes):
    """A file as MedMNIST has it. Returns its arrays."""
    random, arrays = np.random.default_rng(0), {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        number = np.arange(count, dtype=np.int64)[:, None]
        shape = (count, 16, 16, 3)[: 4 - grey]
        arrays[f"{part}_images"] = random.integers(0, 255, shape, np.uint8)
        arrays[f"{part}_labels"] = (number >> np.arange(3)) % 2 if multilabel else number % 4
    root.mkdir(exist_ok=True, parents=True)
    np.savez_compressed(root / "set.npz", **arrays | changes)
    return arrays


def folder(root, mode="L", count=20, labelled=16, suffix="png"):
    """Own images of two classes, cat (odd) and dog (even); the last ones are not in the table."""
    names = [f"{'ab'[k % 2]}/{k:03d}.{suffix}" for k in range(count)]
    for k, name in enumerate(names):
        write_image(root / name, k, mode)
    rows = [f"{name},{k % 2},{1 - k % 2}\n" for k, name in enumerate(names[:labelled])]
    (root / "labels.csv").write_text("image,cat,dog\n" + "".join(rows))
    return names


def shade(path, value, side=8, **options):
    """An image in one grey: its value shows which image it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), value).save(path, **options)


def shades(data):
    """{name: grey value of its first pixel}"""
    return {name: int(image[0, 0, 0]) for name, image in zip(data.names, data.images, strict=True)}


def own(header, rows, count=None, root=Path("own"), delimiter=",", encoding="utf-8"):
    """Images img0.png, img1.png ... of shade 10, 11 ... and a table. Returns the folder."""
    count = len(rows) if count is None else count
    for k in range(count):
        shade(root / f"img{k}.png", 10 + k)
    text = "\n".join([header, *rows]).replace(",", delimiter) + "\n"
    (root / "labels.csv").write_bytes(text.encode(encoding))
    return str(root)


def targets_of(data):
    """{name: its targets, "not known" for a row of NaN}"""
    pairs = zip(data.names, data.targets.tolist(), strict=True)
    return {name: "not known" if np.isnan(row).all() else row for name, row in pairs}


def names_of(data, part):
    """The names of the images of a part, sorted."""
    return sorted(data.names[index] for index in part)


def used(data):
    """Number of images in train or test."""
    return len(data.train) + len(data.test)


def write_16_bit_png(path, colour, samples):
    """A PNG of 16 bits a channel. colour: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    array = np.full((12, 12, samples), 3000, ">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in array)
    head = struct.pack(">IIBBBBB", 12, 12, 16, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_16_bit_tiff(path, samples, planar=False, order="<"):
    """An uncompressed TIFF of 16 bits a channel; planar: one colour after another."""
    array = np.full((samples, 12, 12), 3000, order + "u2")
    body = array.tobytes() if planar else array.transpose(1, 2, 0).tobytes()
    strips = samples if planar else 1
    tags = [
        (256, "I", [12]),
        (257, "I", [12]),
        (258, "H", [16] * samples),
        (259, "H", [1]),
        (262, "H", [2 if samples > 2 else 1]),
        (273, "I", [0] * strips),
        (277, "H", [samples]),
        (278, "I", [12]),
        (279, "I", [len(body) // strips] * strips),
        (284, "H", [2 if planar else 1]),
    ]
    if samples in (2, 4):
        tags.append((338, "H", [2]))
    more = 8 + 2 + 12 * len(tags) + 4
    data = more + sum(
        len(values) * struct.calcsize(kind)
        for _, kind, values in tags
        if len(values) * struct.calcsize(kind) > 4
    )
    tags[5] = (273, "I", [data + k * (len(body) // strips) for k in range(strips)])
    entries, extra = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed) > 4:
            place = struct.pack(order + "I", more + len(extra))
            extra, packed = extra + packed, place
        code = {"H": 3, "I": 4}[kind]
        entries += struct.pack(order + "HHI", tag, code, len(values)) + packed.ljust(4, b"\0")
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    path.write_bytes(mark + entries + bytes(4) + extra + body)


# ---- Data


NAN_7 = np.where(np.arange(40) == 7, np.nan, np.ones((3, 40))).T
ONE_HOT = np.eye(3)[np.arange(40) % 3]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(images=np.zeros((40, 1, 16, 16))), "not uint8 images"),
        (dict(images=np.zeros((40, 2, 16, 16), np.uint8)), "not uint8 images"),
        (dict(images=np.zeros((39, 1, 16, 16), np.uint8)), "n names"),
        (dict(targets=np.zeros((40, 4))), "targets"),
        (dict(targets=np.ones((40, 3)) * 0.5), "image i0 has a wrong target"),
        (
            dict(targets=ONE_HOT + NAN_7 * 0, test=[7], train=[1], multilabel=False),
            "image i7 is in test without label",
        ),
        (dict(targets=ONE_HOT * 0, multilabel=False), "image i0 is not one-hot"),
        (dict(targets=ONE_HOT * 0 + 1, multilabel=False), "image i0 is not one-hot"),
        (dict(targets=NAN_7, test=[7], train=[1]), "image i7 is in test without label"),
        (dict(train=[]), "no training image"),
        (dict(test=[]), "no labelled test image"),
        (dict(test=[40]), "indices"),
        (dict(test=[-1]), "indices"),
        (dict(train=[1], test=[3, 3]), "image i3 is in train and test twice"),
        (dict(train=[3], test=[3]), "image i3 is in train and test twice"),
        (dict(classes="aba"), "class names are equal"),
        (dict(classes="a", targets=np.ones((40, 1)), multilabel=False), "needs two classes"),
        (dict(classes=["a", "", "b"]), "class names are equal or empty"),
        (dict(names=["i8", *range(7), "i8", *range(31)]), "image i8 is there twice"),
    ],
)
def test_data_made_by_hand_is_checked_and_the_image_is_named(change, words):
    with pytest.raises(UserError, match=words):
        replace(made_by_hand(), **change)


def test_data_has_the_documented_types():
    images = list(made_by_hand().images)
    data = replace(
        made_by_hand(), images=images, classes=range(3), names=range(40), train=[1, 2], test=(3,)
    )
    assert data.images.shape == (40, 1, 16, 16)
    assert data.targets.dtype == np.float32
    assert data.train.dtype == data.test.dtype == np.int64
    assert data.classes == ["0", "1", "2"]
    assert data.names[39] == "39"


@pytest.mark.parametrize(
    "multilabel, expected", [(True, [True, True, False]), (False, [True] + [False] * 2)]
)
def test_a_partly_known_row_is_labelled_only_if_multi_label(multilabel, expected):
    targets = ONE_HOT.copy()
    targets[1, 0], targets[2] = np.nan, np.nan
    data = replace(
        made_by_hand(), targets=targets, train=[0, 1, 2], test=[3], multilabel=multilabel
    )
    assert data.known[:3].tolist() == expected


# ---- the loaders


def test_digits_are_scaled_to_255_and_split_stratified():
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert data.images.max() == 255
    assert data.targets[:4].argmax(1).tolist() == [0, 1, 2, 3]
    assert not data.multilabel
    assert sorted([*data.train, *data.test]) == [*range(1797)]
    assert data.targets[data.test].sum(0).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_digits_have_the_same_split_for_good():
    assert load_data("digits").test[:6].tolist() == [1496, 188, 705, 820, 413, 744]


def test_cxr14_has_the_official_lists_and_findings():
    cxr14(Path("root"), 9)
    data = load_data("cxr14", "root", size=24)
    assert data.name == "cxr14"
    assert data.multilabel
    first, *others = data.classes
    assert first == "Atelectasis"
    assert " ".join(others) == (
        "Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
        "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia"
    )
    assert data.names[:4] == [
        "00000000_000.png",
        "00000000_001.png",
        "00000000_002.png",
        "00000001_000.png",
    ]
    assert [data.names[k] for k in data.train] == data.names[:6]
    assert [data.names[k] for k in data.test] == [
        "00000002_000.png",
        "00000002_001.png",
        "00000002_002.png",
    ]
    positives = [np.flatnonzero(row == 1).tolist() for row in data.targets]
    assert positives == [[], [13], [4, 5], [2], [4, 12], [], [13], [4, 5], [2]]
    assert (data.targets.sum(1) == [0, 1, 2, 1, 2, 0, 1, 2, 1]).all()


def test_cxr14_images_are_grey_and_in_the_order_of_the_names():
    cxr14(Path("root"), 9)
    data = load_data("cxr14", "root", size=24)
    assert data.images.shape == (9, 1, 24, 24)
    for name, image in zip(data.names, data.images, strict=True):
        assert close_to_file(image, f"root/images/{name}", "L")


@pytest.mark.parametrize("layout", ["images", "data", "images_001/images", "images_012/images"])
def test_cxr14_images_are_found_in_each_layout(layout):
    cxr14(Path("root"), 6)
    Path("root/images").rename("root/before")
    Path("root", layout).parent.mkdir(exist_ok=True)
    Path("root/before").rename(Path("root", layout))
    data = load_data("cxr14", "root", size=16)
    assert all(
        close_to_file(image, Path("root", layout, name), "L")
        for name, image in zip(data.names, data.images, strict=True)
    )


def test_cxr14_takes_the_newer_of_two_tables():
    cxr14(Path("root"), 6)
    table = Path("root", ENTRIES)
    Path("root/Data_Entry_2017.csv").write_text(table.read_text().replace("Hernia", "Edema"))
    assert load_data("cxr14", "root", size=16).targets[1].nonzero()[0].tolist() == [13]
    table.unlink()
    assert load_data("cxr14", "root", size=16).targets[1].nonzero()[0].tolist() == [9]


def test_cxr14_images_with_another_ending_are_found_by_their_stem():
    cxr14(Path("root"), 6)
    for k, path in enumerate(sorted(Path("root/images").iterdir())):
        path.unlink()
        shade(path.with_suffix(".JPG" if k else ".jpg"), 40 * k)
    data = load_data("cxr14", "root", size=8)
    assert data.names[1] == "00000000_001.png"
    assert [*shades(data).values()] == [0, 40, 80, 120, 160, 200]


def test_cxr14_prefers_png_to_a_copy_with_another_ending():
    cxr14(Path("root"), 6)
    for name in ("00000000_001.png", "00000000_001.jpg", "00000000_001.tif"):
        shade(Path("root/images", name), 70 if name.endswith("png") else 200)
    assert load_data("cxr14", "root", size=8).images[1, 0, 0, 0] == 70


def test_cxr14_takes_the_same_of_two_copies_in_whatever_order_they_are_listed(monkeypatch):
    cxr14(Path("root"), 6)
    Path("root/images/00000000_001.png").unlink()
    for value, ending in ((50, ".jpg"), (60, ".tif")):
        shade(Path("root/images/00000000_001" + ending), value)
    for backwards in (False, True):
        listed = sorted(os.listdir("root/images"), reverse=backwards)
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda folder, listed=listed: listed)
            assert load_data("cxr14", "root", size=8).images[1, 0, 0, 0] == 50


# A stable hash of the patients: these are in the test set, and these in neither part, for good.
CHEXPERT_TEST, CHEXPERT_TUNING = [0, 5, 9, 10, 11, 14, 23], [2, 21, 29, 36]


@pytest.mark.parametrize(
    "prefix, root", [("CheXpert-v1.0-small", "."), ("CheXpert-v1.0", "CheXpert-v1.0")]
)
def test_chexpert_is_split_by_patient(prefix, root):
    chexpert(Path(), prefix)
    data = load_data("chexpert", root, size=16)
    assert data.names[:2] == [f"train/patient00000/study1/view{k}_frontal.jpg" for k in (1, 2)]
    assert data.images.shape == (80, 1, 16, 16)
    assert data.multilabel
    assert data.classes == [f"finding {k}" for k in range(14)]
    train, test = (sorted({int(k) // 2 for k in part}) for part in (data.train, data.test))
    assert test == CHEXPERT_TEST
    assert {*range(40)} - {*train, *test} == {*CHEXPERT_TUNING}
    assert (len(data.train), len(data.test)) == (58, 14)


def test_chexpert_images_belong_to_their_names():
    chexpert(Path(), count=12)
    data = load_data("chexpert", ".", size=16)
    assert all(
        close_to_file(image, f"CheXpert-v1.0-small/{name}", "L")
        for name, image in zip(data.names, data.images, strict=True)
    )


@pytest.mark.parametrize(
    "uncertain, in_train, in_test", [("zeros", 0, 0), ("ones", 1, 1), ("ignore", np.nan, 0)]
)
def test_chexpert_has_three_policies_and_a_blank_is_negative(uncertain, in_train, in_test):
    chexpert(Path(), count=24)
    data = load_data("chexpert", ".", size=16, uncertain=uncertain)
    # Patient 1 (images 2, 3) is in train, patient 0 in test.
    train = [0, in_train, 0, 1, 0, in_train, 0, 1, 0, in_train, 0, 1, 0, in_train]
    test = [1, 0, in_test, 0, 1, 0, in_test, 0, 1, 0, in_test, 0, 1, 0]
    assert 3 in data.train
    assert np.array_equal(data.targets[3], train, equal_nan=True)
    assert np.array_equal(data.targets[0], test, equal_nan=True)


def test_class_counts_hold_only_images_that_are_used(capsys):
    chexpert(Path())
    data, out = load_data("chexpert", ".", size=16), capsys.readouterr().out
    # Two images of each patient p with (p + 0) % 4 == 0, without those for tuning.
    patients = {*range(0, 40, 4)} - {*CHEXPERT_TUNING}
    assert f"multi-label: finding 0 {2 * len(patients)}, " in out
    assert "80 images, 72 labelled, 0 unlabelled, 8 not used; 58 train, 14 test" in out
    assert len(data.names) == 80


def test_chexpert_as_it_is_handed_out_today_has_its_images_in_batches():
    chexpert(Path(), "CheXpert-v1.0", 60)
    top = Path("chexpertchestxrays-u20210408")
    for k in range(60):
        batch = top / f"CheXpert-v1.0 batch {2 + k // 20} (train {1 + k // 20})"
        rest = f"patient{k // 2:05d}/study1/view{k % 2 + 1}_frontal.jpg"
        (batch / rest).parent.mkdir(parents=True, exist_ok=True)
        Path("CheXpert-v1.0/train", rest).rename(batch / rest)
    (top / "CheXpert-v1.0 batch 1 (validate & csv)").mkdir()
    Path("CheXpert-v1.0/train.csv").rename(top / "CheXpert-v1.0 batch 1 (validate & csv)/train.csv")
    data = load_data("chexpert", top, size=16)
    assert len(data.names) == 60
    test = {k // 2 for k in data.test.tolist()}
    assert test == {k for k in CHEXPERT_TEST if k < 30}
    assert not test & {k // 2 for k in data.train.tolist()}
    path = top / "CheXpert-v1.0 batch 3 (train 2)/patient00015/study1/view2_frontal.jpg"
    assert close_to_file(data.images[31], path, "L")
    assert data.targets[31].tolist() == [0, 1, 0, 0] * 3 + [0, 1]


def test_isic2018_is_split_by_lesion(capsys):
    isic2018(Path())
    data = load_data("isic2018", ".", size=24)
    assert data.classes == LESIONS
    assert not data.multilabel
    assert data.images.shape == (84, 3, 24, 24)
    assert data.names[5] == "ISIC_0000005"
    assert data.targets.argmax(1).tolist() == [k % 7 for k in range(84)]
    assert close_to_file(data.images[5], f"{ISIC}Input/ISIC_0000005.jpg", "RGB")
    train, test = ({(k % 7, k // 14) for k in part.tolist()} for part in (data.train, data.test))
    assert not train & test
    assert used(data) == 84
    # A stable hash: these lesions for good.
    expected = [
        f"{j}{k}" for j in range(7) for k in range(6) if zlib.crc32(b"HAM_%d%d" % (j, k)) % 5 == 0
    ]
    assert sorted(f"{j}{k}" for j, k in test) == expected
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("place", [f"{ISIC}GroundTruth", f"{ISIC}GroundTruth/more", "lesions"])
def test_isic2018_finds_the_lesions_wherever_they_were_unpacked(place, capsys):
    isic2018(Path())
    expected = load_data("isic2018", ".", size=16).test
    Path(place).mkdir(exist_ok=True)
    Path(f"{ISIC}LesionGroupings.csv").rename(Path(place, f"{ISIC}LesionGroupings.csv"))
    assert (load_data("isic2018", ".", size=16).test == expected).all()
    assert "warning" not in capsys.readouterr().out


def test_isic2018_without_lesions_warns_with_a_number(capsys):
    isic2018(Path())
    Path(f"{ISIC}LesionGroupings.csv").unlink()
    data = load_data("isic2018", ".", size=16)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    lesions = [{(k % 7, k // 14) for k in part.tolist()} for part in (data.train, data.test)]
    bound = int(re.search(r"up to (\d+) lesions", warning)[1])
    assert "84 of 84 images" in warning
    assert bound == min(len(data.test), len(data.train)) >= len(lesions[0] & lesions[1]) > 0


def test_isic2018_with_a_part_of_the_lesions_warns_of_the_others(capsys):
    isic2018(Path())
    table = Path(f"{ISIC}LesionGroupings.csv")
    table.write_text("\n".join(table.read_text().splitlines()[:-3]))
    load_data("isic2018", ".", size=16)
    out = capsys.readouterr().out
    assert "warning: 3 of 84 images have no lesion" in out
    assert "up to 3 lesions" in out


@pytest.mark.parametrize("grey, multilabel", [(True, True), (False, False)])
def test_a_medmnist_file_is_read(grey, multilabel):
    arrays, data = npz(Path(), grey, multilabel), load_data("set.npz")
    assert data.name == "set"
    assert data.images.shape == (80, 1 if grey else 3, 16, 16)
    assert data.multilabel == multilabel
    assert data.train.tolist() == [*range(64)]
    assert data.test.tolist() == [*range(64, 80)]
    assert data.classes == ["0", "1", "2", "3"][: 3 if multilabel else 4]
    for part, index, row in (("train", 3, 3), ("val", 2, 62), ("test", 6, 70)):
        image, label = arrays[f"{part}_images"][index], arrays[f"{part}_labels"][index]
        assert (data.images[row] == (image if grey else image.transpose(2, 0, 1))).all()
        assert (data.targets[row] == (label if multilabel else np.arange(4) == label)).all()


def test_npz_labels_of_minus_one_are_not_labelled(capsys):
    train, test = np.full((40, 1), -1), np.full((9, 1), -1)
    train[:12, 0], test[:3, 0] = np.arange(12) % 3, (2, 0, 1)
    images = np.zeros((40, 8, 8), np.uint8)
    parts = dict(train_images=images, train_labels=train, val_images=images[:6])
    parts |= dict(val_labels=train[:6], test_images=images[:9], test_labels=test)
    np.savez("set.npz", **parts)
    data, out = load_data("set.npz"), capsys.readouterr().out
    assert data.classes == ["0", "1", "2"]
    assert data.known.sum() == 12 + 6 + 3
    assert np.isnan(data.targets[12:40]).all()
    assert data.train.tolist() == [*range(46)]
    assert data.test.tolist() == [46, 47, 48]
    assert data.targets[data.test].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert "55 images, 21 labelled, 28 unlabelled, 6 not used; 46 train, 3 test" in out
    assert "0 7, 1 7, 2 7" in out


def test_npz_multi_label_minus_one_is_not_known():
    labels = np.array([[1, 0], [0, -1], [-1, -1], [0, 1]])
    npz(
        Path(),
        counts=(60, 4, 4),
        val_labels=labels,
        test_labels=labels,
        train_labels=labels[[0] * 60],
    )
    data = load_data("set.npz")
    nan = np.nan
    expected = [[1, 0], [0, nan], [nan, nan], [0, 1]]
    assert np.array_equal(data.targets[60:64], expected, equal_nan=True)
    assert data.test.tolist() == [64, 65, 67]


def test_npz_flat_labels_are_class_numbers():
    flat = {
        f"{part}_labels": np.arange(n) % 3 for part, n in dict(train=60, val=4, test=16).items()
    }
    npz(Path(), **flat)
    data = load_data("set.npz")
    assert not data.multilabel
    assert data.targets[:5].argmax(1).tolist() == [0, 1, 2, 0, 1]
    assert data.targets[64:].argmax(1).tolist() == [k % 3 for k in range(16)]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(train_images=np.zeros((60, 8, 8, 8), np.uint8)),
            r"train_images is uint8 \(60, 8, 8, 8\).*2D",
        ),
        (
            dict(val_images=np.zeros((4, 16, 16))),
            r"val_images is float64 \(4, 16, 16\).*uint8, 0 to 255",
        ),
        (dict(test_images=np.zeros((16, 16, 16), np.int16)), r"test_images is int16.*uint8"),
        (
            dict(train_labels=np.zeros((59, 1), int)),
            r"\(60, 16, 16\), train_labels is int64 \(59, 1\).*same n",
        ),
        (dict(val_labels=np.zeros((5, 1), int)), r"val_labels is int64 \(5, 1\).*same n"),
        (dict(test_labels=np.zeros((16, 1))), r"test_labels is float64 \(16, 1\).*integers"),
        (
            dict(test_labels=np.zeros((16, 1, 1), int)),
            r"test_labels is int64 \(16, 1, 1\).*class numbers",
        ),
        (dict(train_labels=np.full((60, 1), -2)), r"label \[-2\] is not .*from 0 to 3"),
        (dict(train_labels=np.full((60, 1), 7)), r"label \[7\].*number the classes without gaps"),
        (dict(train_labels=np.full((60, 1), 255, np.uint8)), r"label \[255\]"),
    ],
)
def test_npz_arrays_that_do_not_fit_are_named_with_shape_and_remedy(changes, words, capsys):
    npz(Path(), **changes)
    error = error_of("pretrain --data set.npz", capsys)
    assert re.search("set.npz: .*" + words, error), error


def test_npz_multi_label_values_other_than_0_and_1_are_refused(capsys):
    npz(Path(), multilabel=True, val_labels=np.full((4, 3), 2))
    assert "label [2] is not" in error_of("pretrain --data set.npz", capsys)


def test_npz_without_a_part_names_its_array(capsys):
    np.savez("set.npz", train_images=np.zeros((9, 16, 16), np.uint8))
    assert "set.npz: ['train_labels'] is missing" in error_of("pretrain --data set.npz", capsys)


# ---- a folder of own images


def test_a_folder_with_one_column_a_class_is_read(capsys):
    names = folder(Path("pets"))
    data, out = load_data("pets", size=24), capsys.readouterr().out
    assert data.name == "pets"
    assert data.images.shape == (20, 1, 24, 24)
    assert data.classes == ["cat", "dog"]
    assert not data.multilabel
    assert data.names == sorted(names)
    expected = {name: [k % 2, 1 - k % 2] if k < 16 else "not known" for k, name in enumerate(names)}
    assert targets_of(data) == expected
    # A stable hash of the names, of the labelled images only.
    test = [name for name in names[:16] if zlib.crc32(name.encode()) % 5 == 0]
    assert names_of(data, data.test) == sorted(test)
    assert used(data) == 20
    assert f"20 images, 16 labelled, 4 unlabelled, 0 not used; {20 - len(test)} train" in out
    assert "one class an image: cat 8, dog 8" in out


def test_images_of_a_folder_belong_to_their_names():
    names = folder(Path("pets"), "RGB")
    data = load_data("pets", size=24)
    assert data.images.shape == (20, 3, 24, 24)
    for name in names:
        assert close_to_file(data.images[data.names.index(name)], f"pets/{name}", "RGB")


def test_a_given_split_is_kept_and_other_images_train():
    root = own(
        "image,a,b,split",
        [f"img{k}.png,{k % 2},{1 - k % 2},{'test' if k % 3 == 0 else ' Train '}" for k in range(8)],
        10,
    )
    data = load_data(root, size=8)
    assert names_of(data, data.test) == ["img0.png", "img3.png", "img6.png"]
    assert names_of(data, data.train) == [f"img{k}.png" for k in (1, 2, 4, 5, 7, 8, 9)]


def test_groups_stay_on_one_side():
    rows = [f"img{k}.png,{k % 2},{1 - k % 2},g{k // 3}" for k in range(30)]
    data = load_data(own("image,a,b,group", rows), size=8)
    test = {data.names[k] for k in data.test}
    chosen = [g for g in range(10) if zlib.crc32(b"g%d" % g) % 5 == 0]
    assert test == {f"img{3 * g + j}.png" for g in chosen for j in range(3)}


def test_a_labelled_image_without_split_follows_the_test_images_of_its_group():
    rows = ["img0.png,1,0,g,test", "img1.png,0,1,g,", "img2.png,1,0,h,train", "img3.png,0,1,,"]
    data = load_data(own("image,a,b,group,split", rows), size=8)
    assert names_of(data, data.test) == ["img0.png", "img1.png"]
    assert names_of(data, data.train) == ["img2.png", "img3.png"]


def test_an_unlabelled_image_of_a_test_group_or_with_the_part_test_is_not_used(capsys):
    rows = [
        "img0.png,1,0,g,test",
        "img1.png,,,g,",
        "img2.png,,,g,train",
        "img3.png,,,h,test",
        "img4.png,,,h,",
        "img5.png,1,0,k,train",
        "img6.png,0,1,k,",
    ]
    data = load_data(own("image,a,b,group,split", rows, 8), size=8)
    assert names_of(data, data.train) == ["img4.png", "img5.png", "img6.png", "img7.png"]
    assert names_of(data, data.test) == ["img0.png"]
    assert (
        "8 images, 3 labelled, 2 unlabelled, 3 not used; 4 train, 1 test" in capsys.readouterr().out
    )


def test_an_unlabelled_image_of_a_group_that_the_hash_puts_into_test_is_not_used():
    tested = next(g for g in range(99) if zlib.crc32(b"g%d" % g) % 5 == 0)
    other = next(g for g in range(99) if zlib.crc32(b"g%d" % g) % 5)
    rows = [f"img0.png,1,0,g{tested}", f"img1.png,,,g{tested}"]
    rows += [f"img2.png,0,1,g{other}", f"img3.png,,,g{other}"]
    data = load_data(own("image,a,b,group", rows), size=8)
    assert names_of(data, data.test) == ["img0.png"]
    assert names_of(data, data.train) == ["img2.png", "img3.png"]


@pytest.mark.parametrize(
    "column", ["image", "file_name", "image_path", "filename", "path", "Image"]
)
def test_each_name_of_the_image_column_is_known(column):
    rows = ["1,img0.png,0,test", "0,img1.png,1,train"]
    data = load_data(own(f"a,{column},b,split", rows), size=8)
    assert data.classes == ["a", "b"]
    assert targets_of(data) == {"img0.png": [1, 0], "img1.png": [0, 1]}


@pytest.mark.parametrize("column", ["group", "patient_id", "patient", "Patient_ID"])
def test_each_name_of_the_group_column_is_known(column):
    rows = ["img0.png,1,0,7,test", "img1.png,,,7,", "img2.png,0,1,8,train"]
    data = load_data(own(f"image,a,b,{column},split", rows), size=8)
    assert data.classes == ["a", "b"]
    assert names_of(data, data.train) == ["img2.png"]


@pytest.mark.parametrize("column", ["is_valid", "is_test", "Is_Test"])
def test_a_split_column_of_true_and_false_is_known(column):
    rows = [
        f"img{k}.png,{k % 2},{1 - k % 2},{cell}"
        for k, cell in enumerate(("true", "False", "1", "0", ""))
    ]
    data = load_data(own(f"image,a,b,{column}", rows), size=8)
    assert names_of(data, data.test) == ["img0.png", "img2.png"]
    assert names_of(data, data.train) == ["img1.png", "img3.png", "img4.png"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiters_and_encodings(delimiter, encoding):
    rows = ["img0.png,1,0,test", "img1.png,0,1,train"]
    root = own("image,肺炎,b,split", rows, delimiter=delimiter, encoding=encoding)
    data = load_data(root, size=8)
    assert data.classes == ["肺炎", "b"]
    assert targets_of(data) == {"img0.png": [1, 0], "img1.png": [0, 1]}
    assert names_of(data, data.test) == ["img0.png"]


def test_class_names_with_another_delimiter_in_them():
    root = own("image;a, 1, 2, 3;b, right;split", ["img0.png;1;0;test", "img1.png;0;1;train"])
    assert load_data(root, size=8).classes == ["a, 1, 2, 3", "b, right"]


def test_quoted_cells_and_windows_line_ends():
    own("x", [], 2)
    text = 'image,"a, left",b,split\r\n"img0.png",1,0,test\r\n"img1.png",0,1,train\r\n'
    Path("own/labels.csv").write_bytes(text.encode())
    data = load_data("own", size=8)
    assert data.classes == ["a, left", "b"]
    assert targets_of(data) == {"img0.png": [1, 0], "img1.png": [0, 1]}


def test_empty_rows_of_a_spreadsheet_are_skipped():
    root = own(
        "image,a,b,split",
        ["", ",,,", "img0.png,1,0,test", " , ,,", "img1.png,0,1,train", ",,,", ",,,"],
        2,
    )
    data = load_data(root, size=8)
    assert data.names == ["img0.png", "img1.png"]
    assert data.known.all()


def test_empty_rows_above_the_header_are_skipped():
    own("image,a,b,split", ["img0.png,1,0,test", "img1.png,0,1,train"])
    table = Path("own/labels.csv")
    table.write_text("\n\n" + table.read_text().replace(",", ";"))
    assert load_data("own", size=8).classes == ["a", "b"]


@pytest.mark.parametrize("cell", ["1", "1.0", "true", "TRUE", "yes", "Yes", " 1 "])
def test_cells_that_are_one(cell):
    root = own("image,a,b,split", [f"img0.png,{cell},0,test", "img1.png,0,1,train"])
    assert load_data(root, size=8).targets[0].tolist() == [1, 0]


@pytest.mark.parametrize("cell", ["0", "0.0", "false", "FALSE", "no", "No"])
def test_cells_that_are_zero(cell):
    root = own("image,a,b,split", [f"img0.png,1,{cell},test", "img1.png,0,1,train"])
    assert load_data(root, size=8).targets[0].tolist() == [1, 0]


@pytest.mark.parametrize("cell", ["", " ", "nan", "NaN", "NA", "na"])
def test_cells_that_are_not_known(cell):
    rows = ["img0.png,1,0,1,test", "img1.png,0,1,1,train", f"img2.png,0,{cell},1,train"]
    data = load_data(own("image,a,b,c,split", rows), size=8)
    assert data.multilabel
    assert np.array_equal(data.targets[2], [0, np.nan, 1], equal_nan=True)


@pytest.mark.parametrize("cell", ["-1", "2", "0.5", "x", "1,5", "none", "inf"])
def test_any_other_cell_is_named_with_row_column_value_and_remedy(cell, capsys):
    rows = ["img0.png;1;0;test", "", f"img1.png;0;{cell};train"]
    error = error_of(f"pretrain --data {own('image;a;b;split', rows, 2)}", capsys)
    pattern = rf"own/labels.csv, row 4 .*column b: {re.escape(repr(cell))} is not 1, 0 or blank"
    assert re.search(pattern, error), error


def test_two_ones_in_a_row_make_a_table_multi_label(capsys):
    rows = [
        f"img{k}.png,{row}"
        for k, row in enumerate(["1,0,0,test", "0,0,1,train"] + ["1,1,,train"] * 6)
    ]
    data = load_data(own("image,effusion,mass,edema,split", rows), size=8)
    assert data.multilabel
    assert data.known.sum() == 8
    assert np.array_equal(data.targets[2], [1, 1, np.nan], equal_nan=True)
    assert "multi-label: effusion 7, mass 6, edema 1" in capsys.readouterr().out


def test_a_multi_class_row_with_one_1_and_blanks_is_that_class():
    rows = [
        "img0.png,1,0,0,test",
        "img1.png,0,0,1,train",
        "img2.png,,1,,train",
        "img3.png,0,,1,train",
    ]
    data = load_data(own("image,a,b,c,split", rows), size=8)
    assert not data.multilabel
    assert data.targets.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_a_multi_class_row_of_zeros_and_blanks_is_unlabelled_and_counted(capsys):
    rows = [
        "img0.png,1,0,0,test",
        "img1.png,0,0,1,train",
        "img2.png,0,,0,train",
        "img3.png,,,,train",
    ]
    data, out = load_data(own("image,a,b,c,split", rows), size=8), capsys.readouterr().out
    assert not data.multilabel
    assert np.isnan(data.targets[2:]).all()
    assert "warning: own/labels.csv: 1 rows have zeros and blanks, but no 1: unlabelled" in out
    assert "a 1, b 0, c 1" in out


def test_a_row_of_zeros_makes_a_table_multi_label():
    rows = ["img0.png,1,0,test", "img1.png,0,1,train", "img2.png,0,0,train"]
    assert load_data(own("image,a,b,split", rows), size=8).multilabel


def test_one_column_is_multi_label():
    root = own("image,cat,split", ["img0.png,1,test", "img1.png,0,train", "img2.png,0,test"])
    data = load_data(root, size=8)
    assert data.multilabel
    assert data.targets[:, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "header", ["image,label,split", "file_name,label,split", "path,Labels,is_test"]
)
def test_one_column_of_class_names(header):
    part = dict(zip((0, 1), ("train", "test") if "split" in header else "01", strict=True))
    rows = [
        f"img{k}.png,{('dog', 'cat')[k % 2] if k < 6 else ''},{part[k in (0, 3)]}" for k in range(8)
    ]
    data = load_data(own(header, rows), size=8)
    assert data.classes == ["cat", "dog"]
    assert not data.multilabel
    dog, cat = [0, 1], [1, 0]
    expected = [dog, cat, dog, cat, dog, cat, "not known", "not known"]
    assert [*targets_of(data).values()] == expected
    assert names_of(data, data.test) == ["img0.png", "img3.png"]


def test_several_class_names_in_a_cell_are_multi_label():
    rows = [
        f"img{k}.png,{cell}"
        for k, cell in enumerate(["cat|dog,test", "dog,train", " cat | bird ,", "na,", ","])
    ]
    data = load_data(own("image,labels,split", rows), size=8)
    assert data.classes == ["bird", "cat", "dog"]
    assert data.multilabel
    expected = [[0, 1, 1], [0, 0, 1], [1, 1, 0], "not known", "not known"]
    assert [*targets_of(data).values()] == expected


def test_class_names_of_one_column_may_be_numbers_and_words_of_cells():
    rows = [
        f"img{k}.png,{cell},{'test' if k < 3 else 'train'}"
        for k, cell in enumerate(["1", "0", "yes", "0"])
    ]
    data = load_data(own("image,label,split", rows), size=8)
    assert data.classes == ["0", "1", "yes"]
    assert data.targets.argmax(1).tolist() == [1, 0, 2, 0]


def test_other_columns_beside_a_label_are_named_as_not_read(capsys):
    own("image,label,age,split", ["img0.png,cat,7,test", "img1.png,dog,8,train"])
    data = load_data("own", size=8)
    assert data.classes == ["cat", "dog"]
    assert "columns not read: age" in capsys.readouterr().out


def class_folders(root, test=True):
    """Twelve images in train/, four in test/, three elsewhere. Image k has the shade 10 + k."""
    names = []
    for k in range(19):
        part = "test" if test and k % 4 == 0 else "train"
        place = f"{part}/{('dog', 'cat')[k % 3 == 0]}"
        if k >= 16:
            place = ("new", "train", "test" if test else "more")[k - 16]
        names.append(f"{place}/{k:02d}.png")
        shade(root / names[-1], 10 + k)
    return names


def test_an_image_in_test_without_a_class_is_not_used_if_test_has_no_classes():
    for k in range(20):
        shade(Path(f"pets/train/{('cat', 'dog')[k % 2]}/{k}.png"), 10 + k)
    shade(Path("pets/test/unknown.png"), 200)
    data = load_data("pets", size=8)
    assert len(data.test) > 0
    assert "test/unknown.png" not in names_of(data, data.train) + names_of(data, data.test)


def test_class_folders_of_one_class_are_refused(capsys):
    for k in range(4):
        shade(Path(f"pets/train/cat/{k}.png"), 10 + k)
    assert "two or more class folders" in error_of("pretrain --data pets", capsys)


def test_errors_of_class_folders_do_not_speak_of_a_table():
    names = class_folders(Path("pets"))
    os.link(f"pets/{names[0]}", "pets/train/cat/twice.png")
    with pytest.raises(UserError, match="^pets/train: .* are one file, there twice"):
        load_data("pets", size=8)


def test_names_of_columns_with_capitals_and_spaces():
    rows = [
        f"img{k}.png,{k % 2},{1 - k % 2},p{k // 2},{'yes' if k > 7 else 'no'}" for k in range(10)
    ]
    data = load_data(own("File Name,a,b,Patient ID,Is Test", rows), size=8)
    assert data.classes == ["a", "b"]
    assert names_of(data, data.test) == ["img8.png", "img9.png"]


def test_class_folders(capsys):
    names = class_folders(Path("pets"))
    data, out = load_data("pets", size=8), capsys.readouterr().out
    assert data.classes == ["cat", "dog"]
    assert not data.multilabel
    cat, dog = [1, 0], [0, 1]
    expected = [cat if k % 3 == 0 else dog for k in range(16)] + ["not known"] * 3
    assert targets_of(data) == dict(zip(names, expected, strict=True))
    assert names_of(data, data.test) == sorted(names[0:16:4])
    # An unlabelled image in test/ is not used.
    assert names_of(data, data.train) == sorted(set(names[:18]) - set(names[0:16:4]))
    assert shades(data) == {name: 10 + k for k, name in enumerate(names)}
    assert "16 labelled, 2 unlabelled, 1 not used; 14 train, 4 test" in out


def test_class_folders_without_test_are_split_by_a_hash():
    names = class_folders(Path("pets"), test=False)
    data = load_data("pets", size=8)
    expected = [name for name in names[:16] if zlib.crc32(name.encode()) % 5 == 0]
    assert names_of(data, data.test) == sorted(expected)


def test_class_folders_count_only_without_a_table():
    names = class_folders(Path("pets"))
    rows = [f"{names[1]},1,0,test", f"{names[2]},0,1,train"]
    Path("pets/labels.csv").write_text("\n".join(["image,a,b,split", *rows]))
    data = load_data("pets", size=8)
    assert data.classes == ["a", "b"]
    assert data.known.sum() == 2


def test_a_class_folder_that_is_only_in_test_is_an_error(capsys):
    class_folders(Path("pets"))
    shade(Path("pets/test/bird/1.png"), 1)
    assert "test/bird/1.png: no folder train/bird" in error_of("pretrain --data pets", capsys)


def test_class_folders_of_links_to_images_elsewhere():
    """As people make them from a pool of images, without copies."""
    for k in range(8):
        shade(Path(f"pets/all/{k}.png"), 10 + k)
        place = Path(f"pets/{'test' if k < 2 else 'train'}/{('cat', 'dog')[k % 2]}/{k}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(f"../../all/{k}.png")
    data = load_data("pets", size=8)
    assert len(data.names) == 8
    assert data.classes == ["cat", "dog"]
    by_shade = dict(zip(shades(data).values(), data.targets.tolist(), strict=True))
    assert by_shade == {10 + k: [1 - k % 2, k % 2] for k in range(8)}
    assert sorted(data.images[data.test, 0, 0, 0].tolist()) == [10, 11]


def test_an_image_in_two_class_folders_by_a_link_is_an_error_that_names_both(capsys):
    class_folders(Path("pets"))
    Path("pets/train/cat/again.png").symlink_to("../dog/01.png")
    error = error_of("pretrain --data pets", capsys)
    assert "train/cat/again.png" in error
    assert "train/dog/01.png" in error


# ---- which files count

FORMATS = dict(
    png="PNG",
    jpg="JPEG",
    jpeg="JPEG",
    jpe="JPEG",
    jfif="JPEG",
    tif="TIFF",
    tiff="TIFF",
    bmp="BMP",
    webp="WEBP",
    gif="GIF",
)


@pytest.mark.parametrize("upper", [False, True])
def test_ten_endings_in_any_case_are_images(upper, capsys):
    for k, (ending, form) in enumerate(FORMATS.items()):
        shade(Path(f"own/{k}.{ending.upper() if upper else ending}"), 20 * k, format=form)
    Path("own/notes.txt").write_text("not an image\n")
    Path("own/more.TXT").write_text("not an image\n")
    Path("own/Makefile").write_text("not an image\n")
    first, second = sorted(path.name for path in Path("own").iterdir() if path.suffix)[:2]
    Path("own/labels.csv").write_text(f"image,label,split\n{first},a,test\n{second},b,train\n")
    data, out = load_data("own", size=8), capsys.readouterr().out
    assert len(data.names) == 10
    for name, value in shades(data).items():
        assert abs(value - 20 * int(name[0])) <= 2, name
    assert re.search("left out.*: 1 Makefile, 2 .txt", out)


def test_hidden_files_and_folders_and_views_png_stay_out():
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    for name in (".hidden/1.png", ".2.png", "._img0.png", "views.png", "sub/.deep/3.png"):
        shade(Path(root, name), 99)
    assert load_data(root, size=8).names == ["img0.png", "img1.png"]


def test_what_the_program_writes_is_not_counted(capsys):
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    load_data(root, size=8)
    load_data(root, size=9)
    assert "left out" not in capsys.readouterr().out


def test_linked_folders_are_followed():
    root = own(
        "image,label,split", ["img0.png,a,test", "img1.png,b,train", "unlabelled/u1.png,b,train"], 2
    )
    for k in range(6):
        shade(Path(f"big/u{k}.png"), 100 + k)
    Path(root, "unlabelled").symlink_to("../big")
    data = load_data(root, size=8)
    expected = {f"unlabelled/u{k}.png": 100 + k for k in range(6)}
    assert shades(data) == {"img0.png": 10, "img1.png": 11} | expected
    assert data.known.sum() == 3


@pytest.mark.parametrize(
    "link, place", [("sub/again", ".."), ("sub/deep/self", "."), ("zzz", "sub"), ("up", "../own")]
)
def test_cycles_of_links_end_and_each_image_is_there_once(link, place):
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    shade(Path(root, "sub/deep/u.png"), 50)
    Path(root, link).symlink_to(place)
    assert load_data(root, size=8).names == ["img0.png", "img1.png", "sub/deep/u.png"]


def test_a_link_to_an_image_is_not_a_second_image():
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    Path(root, "copy.png").symlink_to("img0.png")
    os.link(Path(root, "img1.png"), Path(root, "hard.png"))
    data = load_data(root, size=8)
    assert sorted(shades(data).values()) == [10, 11]
    assert data.known.all()


def test_a_broken_link_is_a_missing_image(capsys):
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    Path(root, "gone.png").symlink_to("nowhere.png")
    assert "1 of 3 image files are missing, such as ['own/gone.png']" in error_of(
        f"pretrain --data {root}", capsys
    )


@pytest.mark.parametrize(
    "other", ["IMG1.png", "img1.PNG", "./img1.png", "sub/../img1.png", "sub\\..\\Img1.png"]
)
def test_another_spelling_in_the_table_is_the_same_file(other):
    root = own("image,a,b,split", ["img0.png,1,0,test", f"{other},0,1,train"], 2)
    shade(Path(root, "sub/img1.png"), 50)
    data = load_data(root, size=8)
    assert len(data.names) == 3
    assert data.known.sum() == 2
    by_shade = dict(zip(shades(data).values(), data.targets.tolist(), strict=True))
    assert by_shade[11] == [0, 1]
    assert np.isnan(by_shade[50]).all()


def test_a_table_whose_endings_are_all_in_another_case():
    for k in range(8):
        shade(Path(f"own/img{k}.JPG"), 10 * k, format="JPEG")
    rows = [f"img{k}.jpg,{k % 2},{1 - k % 2},{'test' if k < 2 else 'train'}" for k in range(8)]
    Path("own/labels.csv").write_text("\n".join(["image,a,b,split", *rows]))
    data = load_data("own", size=8)
    assert len(data.names) == 8
    assert data.known.all()
    assert all(abs(value - 10 * int(name[3])) <= 1 for name, value in shades(data).items())


@pytest.mark.parametrize("other", ["img0.png", "IMG0.PNG", "sub/../img0.png", "a.png", "z.png"])
def test_two_names_of_one_file_in_the_table_are_an_error_that_names_both(other, capsys):
    root = own("image,a,b", ["img0.png,1,0", f"{other},0,1"], 2)
    Path(root, "sub").mkdir()
    if other == "a.png":
        Path(root, "a.png").symlink_to("img0.png")
    if other == "z.png":
        os.link(Path(root, "img0.png"), Path(root, "z.png"))
    error = error_of(f"pretrain --data {root}", capsys)
    assert f"img0.png and {other} are one file, there twice" in error


def test_another_case_of_a_file_that_has_a_second_name_by_a_link():
    root = own("image,a,b,split", ["IMG0.PNG,1,0,test", "img1.png,0,1,train"], 2)
    Path(root, "a.png").symlink_to("img0.png")
    data = load_data(root, size=8)
    assert sorted(shades(data).values()) == [10, 11]
    assert data.known.all()


def test_files_whose_names_differ_only_in_case_are_two_images():
    root = own("image,a,b,split", ["img0.png,1,0,test", "IMG0.png,0,1,train"], 1)
    shade(Path(root, "IMG0.png"), 77)
    data = load_data(root, size=8)
    assert targets_of(data) == {"img0.png": [1, 0], "IMG0.png": [0, 1]}
    assert shades(data) == {"img0.png": 10, "IMG0.png": 77}


# ---- bad data


def edit(name, old="", new=""):
    """A function that replaces old in a file below root, or the whole file."""

    def change():
        path = Path("root", name)
        path.write_text(path.read_text().replace(old, new, 1) if old else new)

    return change


BROKEN, OWN, LABELS = "images/00000002_001.png", "b/001.png", "labels.csv"


@pytest.mark.parametrize(
    "make, spoil, words",
    [
        (cxr14, lambda: Path("root", ENTRIES).unlink(), "Data_Entry_2017"),
        (cxr14, lambda: os.truncate(f"root/{BROKEN}", 300), f"cannot read image .*{BROKEN}"),
        (cxr14, lambda: Path("root/test_list.txt").unlink(), "test_list.txt"),
        (
            cxr14,
            edit("test_list.txt", "\n", "\n9999_000.png\n"),
            "no row for 9999_000.png.*test_list.txt",
        ),
        (cxr14, edit(ENTRIES, "Effusion", "Confusion"), "Confusion"),
        (chexpert, edit("CheXpert-v1.0-small/train.csv", "0.0", "0.5"), "0.5"),
        (chexpert, lambda: Path("root/CheXpert-v1.0-small/train.csv").unlink(), "train.csv"),
        (isic2018, edit(f"{ISIC}GroundTruth/{ISIC}GroundTruth.csv", "1.0", "0.0"), "ISIC_0000000"),
        (isic2018, edit(f"{ISIC}GroundTruth/{ISIC}GroundTruth.csv", "1.0", "x"), "x"),
        (
            folder,
            lambda: [path.unlink() for path in Path("root").rglob("*.png")],
            "root is not a folder",
        ),
        (folder, lambda: Path("root", LABELS).unlink(), "no labels.csv and no folder train"),
        (folder, edit(LABELS), "labels.csv is empty"),
        (
            folder,
            edit(OWN, new="not an image"),
            f"cannot read image root/{OWN} .*replace it or remove it",
        ),
        (folder, edit(OWN), f"cannot read image root/{OWN}"),
        (folder, edit(LABELS, "image", "file"), "labels.csv: needs a column image"),
        (folder, edit(LABELS, OWN, "b/999.png"), "1 of 21 image files are missing.*root/b/999.png"),
        (folder, edit(LABELS, OWN, f"{OWN},1,0\n{OWN}"), f"{OWN} and {OWN} are one file"),
        (folder, edit(LABELS, OWN, ""), "labels.csv, row 3 .*column image.* blank"),
        (folder, edit(LABELS, f"{OWN},", OWN), "labels.csv: row 3 is longer or shorter than row 1"),
        (folder, edit(LABELS, f"{OWN},", f"{OWN},0,"), "labels.csv: row 3 is longer or shorter"),
        (folder, edit(LABELS, new="image,a\n"), "labels.csv"),
        (folder, edit(LABELS, new="image\na/000.png\n"), "needs a column for each class"),
        (
            folder,
            edit(LABELS, new="image,label\na/000.png,\n"),
            "column label needs two or more classes",
        ),
        (folder, edit(LABELS, new=f"image,a\n{OWN},1\na/002.png,1\n"), "write the zeros"),
        (
            folder,
            edit(LABELS, new=f"image,a,a\n{OWN},1,0\na/002.png,0,1\n"),
            r"labels.csv.*\['image', 'a', 'a'\]",
        ),
        (
            folder,
            edit(LABELS, new=f"image,file_name,a\n{OWN},x,1\n"),
            "labels.csv: two columns have one meaning",
        ),
        (
            folder,
            edit(LABELS, new=f"image,a,split,is_test\n{OWN},1,test,1\n"),
            "labels.csv: two columns have one meaning",
        ),
        (
            folder,
            edit(LABELS, new=f"image,cat,group,split\na/000.png,1,g7,train\n{OWN},0,g7,test\n"),
            "group g7 is in train and in test; see a/000.png",
        ),
        (
            folder,
            edit(LABELS, new=f"image,cat,split\na/000.png,1,train\n{OWN},0,validation\n"),
            f"row 3 .*{OWN}.*column split: 'validation' is not train, test or blank",
        ),
        (
            folder,
            edit(LABELS, new=f"image,cat,is_test\na/000.png,1,0\n{OWN},0,maybe\n"),
            "row 3 .*column .*'maybe' is not",
        ),
        (
            folder,
            edit(LABELS, new=f"image,cat,split\na/000.png,1,train\n{OWN},0,train\n"),
            "no labelled test image",
        ),
        (
            folder,
            lambda: Path("root", LABELS).write_bytes(b"image,caf\xe9\n"),
            "labels.csv is not a text in UTF-8",
        ),
        (
            folder,
            lambda: Path("root", LABELS).write_bytes(b"\xff\xfei\0m"),
            "labels.csv is not a text",
        ),
        (npz, lambda: npz(Path("root"), train_labels=np.array([[print]] * 60, object)), "set.npz"),
        (npz, edit("set.npz"), "set.npz"),
        (npz, lambda: os.truncate("root/set.npz", 900), "set.npz"),
        (npz, lambda: Path("root/set.npz").unlink(), "set.npz"),
    ],
)
def test_bad_data_is_named_in_one_line_and_nothing_is_written(make, spoil, words, capsys):
    make(Path("root"))
    spoil()
    before = {*Path().rglob("*")}
    own_data = dict(folder="root", npz="root/set.npz").get(make.__name__)
    error = error_of(f"pretrain --data {own_data or f'{make.__name__} --root root'}", capsys)
    assert re.search(words, error), error
    assert {path.suffix for path in {*Path().rglob("*")} - before} <= {".uint8"}


@pytest.mark.parametrize("name", ["cxr14", "chexpert", "isic2018"])
def test_a_missing_image_is_named_with_its_remedy_and_can_be_left_out(name):
    make = globals()[name]
    make(Path("root"))
    first, second = sorted(Path("root").rglob("*.png" if name == "cxr14" else "*.jpg"))[4:6]
    first.unlink()
    second.unlink()
    with pytest.raises(UserError) as error:
        load_data(name, "root", 16)
    assert re.search(
        rf"2 of \d+ image files are missing.*({first.name}|{second.name})", str(error.value)
    )
    assert "--partial" in str(error.value)
    assert "split" not in str(error.value)
    data = load_data(name, "root", 16, partial=True)
    assert len(data.names) == {"cxr14": 28, "chexpert": 78, "isic2018": 82}[name]
    left = (
        first.stem
        if name != "chexpert"
        else str(first)[-len("patient00000/study1/view1_frontal.jpg") :]
    )
    assert not any(left in each for each in data.names)


def test_partial_images_belong_to_their_names():
    cxr14(Path("root"), 9)
    Path("root/images/00000000_001.png").unlink()
    data = load_data("cxr14", "root", 16, partial=True)
    assert (len(data.train), len(data.test)) == (5, 3)
    for name, image in zip(data.names, data.images, strict=True):
        assert close_to_file(image, f"root/images/{name}", "L")
    assert data.targets[1].nonzero()[0].tolist() == [4, 5]


def test_no_image_at_all_is_an_error_that_names_the_folder(capsys):
    cxr14(Path("root"), 3)
    for path in Path("root/images").iterdir():
        path.unlink()
    command = "pretrain --data cxr14 --root root --partial"
    assert "no image file of cxr14 is in root" in error_of(command, capsys)


# ---- choose_labelled


def long_tailed():
    """100 training images: class a on 50, b on 10, c on 3 of them; 42 without a finding."""
    targets, names = np.zeros((110, 3), np.float32), [f"{k}.png" for k in range(110)]
    targets[:50, 0] = targets[45:55, 1] = targets[60:63, 2] = 1
    images, train, test = np.zeros((110, 1, 8, 8), np.uint8), np.arange(100), np.arange(100, 110)
    return Data("tail", images, targets, ["a", "b", "c"], names, train, test, True)


def multi_class():
    """34 training images: classes 0, 1, 2 in turn; the last ten are unlabelled."""
    targets = np.eye(3)[np.arange(40) % 3]
    targets[30:] = np.nan
    images, names = np.zeros((40, 1, 8, 8), np.uint8), [f"{k}.png" for k in range(40)]
    return Data(
        "mc", images, targets, ["a", "b", "c"], names, np.arange(6, 40), np.arange(6), False
    )


@pytest.mark.parametrize(
    "make, labels, seed, expected",
    [
        (long_tailed, 0.1, 0, [2, 10, 11, 28, 41, 48, 57, 62, 81, 84, 94]),
        (long_tailed, 0.1, 3, [9, 12, 31, 39, 45, 47, 58, 60, 67, 81, 88]),
        (long_tailed, 0.06, 0, [10, 11, 28, 48, 57, 62, 81, 84]),
        (long_tailed, 4, 0, [28, 48, 62, 84]),
        (long_tailed, 4, 3, [12, 45, 60, 88]),
        (multi_class, 0.1, 0, [10, 23, 24]),
        (multi_class, 3, 3, [7, 17, 21]),
    ],
)
def test_a_fraction_and_one_of_each_class_are_the_same_images_for_good(
    make, labels, seed, expected
):
    assert choose_labelled(make(), labels, seed).tolist() == expected


def counts_of(data, chosen):
    """Images with each class, and without any."""
    return [*data.targets[chosen].sum(0).astype(int), (data.targets[chosen].sum(1) == 0).sum()]


def test_a_fraction_is_taken_of_each_class_and_of_images_without_a_finding():
    data = long_tailed()
    for seed in range(20):
        chosen = choose_labelled(data, 0.1, seed)
        a, b, c, without = counts_of(data, chosen)
        # Sampled: 5 of 50, 1 of 10, at least one of 3, 4 of 42; an image can have two classes.
        assert a >= 5
        assert b >= 1
        assert c == 1
        assert without == 4
        assert 9 <= len(chosen) <= 11
        assert chosen.dtype == np.int64
        assert (np.diff(chosen) > 0).all()
        assert chosen.max() < 100


def test_a_fraction_is_rounded_to_the_nearest_number():
    data = long_tailed()
    without = [
        counts_of(data, choose_labelled(data, labels, 0))[3] for labels in (0.03, 0.04, 0.5, 0.99)
    ]
    assert without == [1, 2, 21, 42]


@pytest.mark.parametrize("number", [4, 5, 20.0, 77, 100])
def test_a_number_of_labels_is_exact_with_one_of_each_class(number):
    data = long_tailed()
    for seed in range(5):
        chosen = choose_labelled(data, number, seed)
        assert len({*chosen.tolist()}) == len(chosen) == number
        assert min(counts_of(data, chosen)) >= 1
        assert {*choose_labelled(data, 4, seed)} <= {*chosen}


@pytest.mark.parametrize("number", [0, 1, 2, 1.5, -3, float("nan")])
def test_a_number_of_labels_below_the_number_of_classes_is_refused(number):
    with pytest.raises(UserError, match="is not from"):
        choose_labelled(long_tailed(), number, 0)


def test_a_number_of_labels_takes_further_images_at_random():
    data = long_tailed()
    counts = np.mean(
        [counts_of(data, choose_labelled(data, 24, seed)) for seed in range(200)], axis=0
    )
    # One of each of four, 20 more of the other 96 at random: 48 of a, 40 without a finding.
    assert counts[0] == pytest.approx(1.5 + 20 * 48 / 96, abs=1.0)
    assert counts[3] == pytest.approx(1 + 20 * 41 / 96, abs=1.0)


@pytest.mark.parametrize("labels", [0.1, 4, 24])
def test_seeds_choose_different_images_and_a_seed_always_the_same(labels):
    data = long_tailed()
    samples = [tuple(choose_labelled(data, labels, seed).tolist()) for seed in range(12)]
    assert len(set(samples)) == 12
    assert samples == [tuple(choose_labelled(data, labels, seed).tolist()) for seed in range(12)]


def test_only_labelled_training_images_are_chosen():
    data = multi_class()
    assert choose_labelled(data, "all", 0).tolist() == [*range(6, 30)]
    assert choose_labelled(data, 24, 0).tolist() == [*range(6, 30)]
    for labels in (0.5, 12):
        chosen = choose_labelled(data, labels, 0)
        assert len(chosen) == 12
        assert chosen.min() >= 6
        assert chosen.max() < 30


@pytest.mark.parametrize("kind", [str, Path])
def test_labels_from_a_file_with_repeated_and_empty_lines(kind):
    Path("list.txt").write_text("\n7.png\n3.png\r\n  61.png \n7.png\n\n")
    for seed in (0, 1):
        assert choose_labelled(long_tailed(), kind("list.txt"), seed).tolist() == [3, 7, 61]


@pytest.mark.parametrize(
    "labels", [3, 101, 4.5, 0, "nowhere.txt", "empty.txt", "other.txt", "test.txt"]
)
def test_labels_that_do_not_fit_are_named(labels):
    for name, text in dict(empty="\n", other="1.png\nx.png\n", test="105.png\n").items():
        Path(f"{name}.txt").write_text(text)
    with pytest.raises((UserError, OSError), match=str(labels)):
        choose_labelled(long_tailed(), labels, 0)


def test_a_file_with_an_unlabelled_image_is_refused():
    Path("list.txt").write_text("7.png\n35.png\n")
    with pytest.raises(UserError, match="no labelled training image .*35.png"):
        choose_labelled(multi_class(), "list.txt", 0)


def test_a_binary_file_of_labels_is_refused_in_one_line():
    Path("list.bin").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="list.bin is not a text"):
        choose_labelled(long_tailed(), "list.bin", 0)


# ---- one image


def decoded(path, size=8, channels=1):
    return s2mts2.decode(path, size, channels).astype(int)


def photograph(path, width=1200, height=900, **options):
    """A large colour picture with structures of all sizes."""
    random, total = np.random.default_rng(0), 0
    for side in (3, 10, 20):
        coarse = Image.fromarray(random.integers(0, 255, (side, side, 3), np.uint8))
        total = total + np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    Image.fromarray((total / 3).astype(np.uint8)).save(path, quality=95, **options)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_jpeg_is_nearly_as_if_it_were_decoded_in_full(size, channels):
    photograph("photo.jpg")
    with Image.open("photo.jpg") as image:
        full = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.BILINEAR)
    full = np.asarray(full, int).reshape(size, size, channels).transpose(2, 0, 1)
    assert np.abs(full - decoded("photo.jpg", size, channels)).max() <= 2


def test_a_large_jpeg_is_decoded_at_reduced_scale(monkeypatch):
    photograph("photo.jpg")
    sizes, load = [], JpegImageFile.load
    monkeypatch.setattr(
        JpegImageFile, "load", lambda image: sizes.append(image.size) or load(image)
    )
    for size, reduced in ((32, (150, 113)), (64, (300, 225)), (500, (1200, 900))):
        decoded("photo.jpg", size, 3)
        # At least twice the size, in both directions.
        assert sizes[0] == reduced
        sizes.clear()


@pytest.mark.parametrize(
    "width, height, reduced", [(2000, 300, (1000, 150)), (300, 2000, (150, 1000))]
)
def test_the_shorter_side_of_a_jpeg_limits_the_scale(width, height, reduced, monkeypatch):
    photograph("photo.jpg", width, height)
    sizes, load = [], JpegImageFile.load
    monkeypatch.setattr(
        JpegImageFile, "load", lambda image: sizes.append(image.size) or load(image)
    )
    decoded("photo.jpg", 64, 3)
    assert sizes[0] == reduced


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif"])
def test_an_image_is_turned_as_its_exif_says(orientation, name):
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 240, 160, 80
    # How the camera stores it, so that the orientation shows it upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(name, exif=exif)
    assert np.abs(decoded(name, 16)[0] - upright).max() <= 4


COLOURED = np.zeros((8, 8, 3), np.uint8) + np.array([200, 100, 50], np.uint8)


@pytest.mark.parametrize(
    "name, mode, grey, colour",
    [
        ("x.png", "L", 124, (124, 124, 124)),
        ("x.png", "LA", 124, (124, 124, 124)),
        ("x.png", "RGB", 124, (200, 100, 50)),
        ("x.png", "RGBA", 124, (200, 100, 50)),
        ("x.png", "P", 124, (200, 100, 50)),
        ("x.png", "1", 255, (255, 255, 255)),
        ("x.bmp", "RGB", 124, (200, 100, 50)),
        ("x.bmp", "L", 124, (124, 124, 124)),
        ("x.bmp", "P", 124, (200, 100, 50)),
        ("x.bmp", "1", 255, (255, 255, 255)),
        ("x.gif", "P", 124, (200, 100, 50)),
        ("x.tif", "L", 124, (124, 124, 124)),
        ("x.tif", "RGB", 124, (200, 100, 50)),
        ("x.tif", "RGBA", 124, (200, 100, 50)),
        ("x.tif", "CMYK", 124, (200, 100, 50)),
        ("x.jpg", "L", 124, (124, 124, 124)),
        ("x.jpg", "CMYK", 124, (200, 100, 50)),
        ("x.webp", "RGB", 124, (200, 100, 50)),
    ],
)
def test_images_of_8_bits_and_less_are_read(name, mode, grey, colour):
    image = Image.fromarray(COLOURED)
    if mode == "P":
        image = image.quantize(4)
    elif mode == "1":
        image = Image.new("1", (8, 8), 1)
    Image.Image.save(image if mode == image.mode else image.convert(mode), name)
    assert decoded(name).shape == (1, 8, 8)
    assert np.abs(decoded(name) - grey).max() <= 3
    assert np.abs(decoded(name, 8, 3)[:, 4, 4] - colour).max() <= 6


def test_a_black_and_white_image_keeps_black():
    Image.fromarray(np.eye(2) > 0).save("x.png")
    assert decoded("x.png", 2)[0].tolist() == [[255, 0], [0, 255]]


DEEP = {
    "grey.png": lambda path: write_16_bit_png(path, 0, 1),
    "rgb.png": lambda path: write_16_bit_png(path, 2, 3),
    "la.png": lambda path: write_16_bit_png(path, 4, 2),
    "rgba.png": lambda path: write_16_bit_png(path, 6, 4),
    "grey.tif": lambda path: write_16_bit_tiff(path, 1),
    "motorola.tif": lambda path: write_16_bit_tiff(path, 1, order=">"),
    "rgb.tif": lambda path: write_16_bit_tiff(path, 3),
    "rgb_motorola.tiff": lambda path: write_16_bit_tiff(path, 3, order=">"),
    "rgba.tif": lambda path: write_16_bit_tiff(path, 4),
    "planar.tif": lambda path: write_16_bit_tiff(path, 3, planar=True),
    "integers.tif": lambda path: Image.new("I", (12, 12), 3000).save(path),
    "floats.tif": lambda path: Image.new("F", (12, 12), 0.5).save(path),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_a_channel_are_refused_with_the_remedy(name):
    DEEP[name](Path(name))
    with Image.open(name) as image:
        assert image.size == (12, 12)
    for channels in (1, 3):
        with pytest.raises(UserError, match=f"{name}.*8 bits.*scale them to 0 to 255"):
            decoded(name, 8, channels)


@pytest.mark.parametrize("name", ["grey.png", "rgb.png", "planar.tif"])
def test_a_deep_image_in_a_folder_is_named(name, capsys):
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    DEEP[name](Path(root, name))
    error = error_of(f"pretrain --data {root}", capsys)
    assert f"own/{name}" in error
    assert "scale them" in error


def test_an_image_beyond_the_limit_of_pillow_is_named(monkeypatch, capsys):
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    shade(Path(root, "very_large.png"), 5, side=40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "cannot read image own/very_large.png" in error_of(f"pretrain --data {root}", capsys)


def test_one_colour_image_makes_a_folder_colour():
    root = own("image,label,split", ["img0.png,a,test", "img1.png,b,train"])
    Image.new("LA", (8, 8), (12, 9)).save("own/img2.png")
    Image.new("1", (8, 8), 1).save("own/img3.png")
    assert load_data(root, size=8).images.shape == (4, 1, 8, 8)
    Image.new("RGB", (8, 8), (1, 2, 3)).save("own/img4.png")
    data = load_data(root, size=8)
    assert data.images.shape == (5, 3, 8, 8)
    assert data.images[4, :, 0, 0].tolist() == [1, 2, 3]


# ---- decoding


def numbered_files(count=140, first=0, root=Path("own")):
    """Images of shade first, first + 1, ..., in several blocks. Returns {name: shade}."""
    names = [f"img{k:03d}.png" for k in range(count)]
    for k, name in enumerate(names):
        shade(root / name, first + k)
    rows = [f"{name},{'ab'[k % 2]},{'train' if k > 3 else 'test'}" for k, name in enumerate(names)]
    (root / "labels.csv").write_text("\n".join(["image,label,split", *rows]))
    return {name: first + k for k, name in enumerate(names)}


@pytest.fixture
def decodings(monkeypatch):
    """The names of the files that are decoded, in a list."""
    names, original = [], s2mts2.decode

    def decode(path, *arguments):
        names.append(Path(path).name)
        return original(path, *arguments)

    monkeypatch.setattr(s2mts2, "decode", decode)
    return names


def stop_at(monkeypatch, name, action):
    """Do something before a file is decoded, in the block meant."""
    original = s2mts2.decode

    def decode(path, *arguments):
        if Path(path).name == name:
            action(path)
        return original(path, *arguments)

    monkeypatch.setattr(s2mts2, "decode", decode)


def test_the_bar_of_decoding_counts_each_image(capsys):
    numbered_files(9)
    load_data("own", size=8)
    assert "decode: 100%" in capsys.readouterr().err


def test_decoded_images_are_used_again(decodings):
    expected = numbered_files()
    assert shades(load_data("own", size=8)) == expected
    assert len(decodings) == 140
    assert shades(load_data("own", size=8)) == expected
    assert len(decodings) == 140


def test_each_size_is_decoded_on_its_own():
    numbered_files(6)
    assert [load_data("own", size=size).images.shape[2:] for size in (8, 6, 8)] == [
        (8, 8),
        (6, 6),
        (8, 8),
    ]


@pytest.mark.parametrize("size", [8, 16])
def test_images_replaced_under_the_same_names_are_decoded_anew(size, decodings, capsys):
    expected = numbered_files(90)
    load_data("own", size=8)
    capsys.readouterr()
    for k in (0, 7, 80):
        shade(Path(f"own/img{k:03d}.png"), 200 + k % 7, side=size)
        os.utime(f"own/img{k:03d}.png", (1e9, 1e9 + k))
        expected[f"img{k:03d}.png"] = 200 + k % 7
    decodings.clear()
    assert shades(load_data("own", size=8)) == expected
    assert sorted(decodings) == ["img000.png", "img007.png", "img080.png"]
    assert "images have changed since they were decoded" in capsys.readouterr().out


def test_pixels_that_a_run_uses_do_not_change_with_the_files():
    expected = numbered_files(10)
    in_use = load_data("own", size=8)
    shade(Path("own/img003.png"), 203)
    os.utime("own/img003.png", (1e9, 1e9))
    assert shades(load_data("own", size=8)) == expected | {"img003.png": 203}
    assert shades(in_use) == expected


def test_a_file_that_has_become_empty_is_named():
    cxr14(Path("root"), 6)
    load_data("cxr14", "root", size=8)
    os.truncate("root/images/00000000_001.png", 0)
    with pytest.raises(UserError, match="00000000_001.png"):
        load_data("cxr14", "root", size=8)


def test_added_and_removed_images_are_noticed():
    expected = numbered_files(10)
    load_data("own", size=8)
    shade(Path("own/new.png"), 222)
    assert shades(load_data("own", size=8)) == expected | {"new.png": 222}
    Path("own/new.png").unlink()
    shade(Path("own/a.png"), 223)
    assert shades(load_data("own", size=8)) == expected | {"a.png": 223}


def test_another_list_of_files_of_the_same_sizes_and_times_is_decoded_on_its_own():
    """Archives can give all files one time, and BMP files of one shape have one size."""
    for name, value in dict(a=10, b=11, c=12, d=13).items():
        shade(Path(f"own/{name}.bmp"), value)
        os.utime(f"own/{name}.bmp", (1e9, 1e9))
    Path("own/labels.csv").write_text("image,label,split\nb.bmp,x,test\nc.bmp,y,train\n")
    Path("own/d.bmp").rename("d.bmp")
    assert shades(load_data("own", size=8)) == {"a.bmp": 10, "b.bmp": 11, "c.bmp": 12}
    # Three images again, and each stands where another stood.
    Path("own/a.bmp").unlink()
    Path("d.bmp").rename("own/d.bmp")
    assert shades(load_data("own", size=8)) == {"b.bmp": 11, "c.bmp": 12, "d.bmp": 13}


def test_renamed_images_keep_their_pixels():
    numbered_files(10)
    load_data("own", size=8)
    for one, two in (("img004.png", "x"), ("img005.png", "img004.png"), ("x", "img005.png")):
        Path("own", one).rename(Path("own", two))
    data = shades(load_data("own", size=8))
    assert (data["img004.png"], data["img005.png"]) == (5, 4)


def test_an_interrupted_decoding_goes_on(monkeypatch, decodings):
    expected = numbered_files()
    with monkeypatch.context() as patch:
        stop_at(patch, "img100.png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_data("own", size=8)
    decodings.clear()
    assert shades(load_data("own", size=8)) == expected
    assert sorted(decodings) == [f"img{k:03d}.png" for k in range(64, 140)]
    assert len([*Path("own").glob("*.uint8")]) == 1
    assert not [*Path("own").glob("*.part")]


def test_an_interrupted_decoding_goes_on_only_with_unchanged_files(monkeypatch, decodings, capsys):
    expected = numbered_files()
    with monkeypatch.context() as patch:
        stop_at(patch, "img100.png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_data("own", size=8)
    shade(Path("own/img003.png"), 203)
    shade(Path("own/img130.png"), 204)
    os.utime("own/img003.png", (1e9, 1e9))
    decodings.clear()
    new = {"img003.png": 203, "img130.png": 204}
    assert shades(load_data("own", size=8)) == expected | new
    assert len(decodings) == 140 - 64 + 1
    assert "images have changed" in capsys.readouterr().out


def test_a_decoding_that_stops_early_keeps_what_an_earlier_one_left(monkeypatch, decodings):
    expected = numbered_files()
    with monkeypatch.context() as patch:
        stop_at(patch, "img100.png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_data("own", size=8)
    os.truncate("own/img003.png", 50)
    with pytest.raises(UserError, match="img003.png"):
        load_data("own", size=8)
    shade(Path("own/img003.png"), 3)
    decodings.clear()
    assert shades(load_data("own", size=8)) == expected
    assert len(decodings) == 140 - 64 + 1


def test_a_decoding_ends_well_if_another_one_has_finished_meanwhile(monkeypatch):
    expected, others = numbered_files(), []

    def finish(path):
        if not others:
            others.append(path)
            others.append(shades(load_data("own", size=8)))

    stop_at(monkeypatch, "img139.png", finish)
    assert shades(load_data("own", size=8)) == expected == others[1]
    assert not [*Path("own").glob("*.part")]


def test_images_exported_again_after_a_broken_one_are_the_new_ones():
    numbered_files(first=0)
    Path("own/img100.png").write_bytes(Path("own/img100.png").read_bytes()[:50])
    with pytest.raises(UserError, match="img100.png"):
        load_data("own", size=8)
    expected = numbered_files(first=80)
    assert shades(load_data("own", size=8)) == expected


def test_pixels_reach_the_disk_before_what_says_that_they_are_there(monkeypatch):
    """After a power cut a file has what was written before os.fsync, and perhaps more."""
    numbered_files()
    seen, length = [], 8 * 8

    def fsync(descriptor):
        content = Path(f"/proc/self/fd/{descriptor}").resolve().read_bytes()
        heads = np.frombuffer(content[: 140 * s2mts2.HEAD.itemsize], s2mts2.HEAD)
        pixels = np.frombuffer(content[len(heads.tobytes()) :], np.uint8).reshape(140, length)
        seen.append(((heads["stat"][:, 0] > 0).sum(), (pixels == np.arange(140)[:, None]).all(1)))

    monkeypatch.setattr(os, "fsync", fsync)
    load_data("own", size=8)
    assert [heads for heads, _ in seen] == [0, 64, 128]
    assert [pixels.sum() - pixels[0] for _, pixels in seen] == [63, 127, 139]


def test_a_cut_off_file_of_decoded_images_is_made_anew():
    expected = numbered_files(20)
    load_data("own", size=8)
    (whole,) = Path("own").glob("*.uint8")
    os.truncate(whole, whole.stat().st_size - 1)
    assert shades(load_data("own", size=8)) == expected


def test_decoded_images_open_when_the_originals_are_gone(decodings):
    cxr14(Path("root"), 9)
    before = np.array(load_data("cxr14", "root", size=8).images)
    Path("root/images").rename("root/gone")
    decodings.clear()
    data = load_data("cxr14", "root", size=8)
    assert (data.images == before).all()
    assert not decodings


def test_a_folder_opens_when_the_images_of_its_table_are_gone(decodings):
    expected = numbered_files(20)
    load_data("own", size=8)
    for k in range(1, 20):
        Path(f"own/img{k:03d}.png").unlink()
    decodings.clear()
    assert shades(load_data("own", size=8)) == expected
    assert not decodings


def test_gone_originals_are_taken_over_when_others_change():
    expected = numbered_files(20)
    load_data("own", size=8)
    Path("own/img004.png").unlink()
    shade(Path("own/img005.png"), 205)
    os.utime("own/img005.png", (1e9, 1e9))
    assert shades(load_data("own", size=8)) == expected | {"img005.png": 205}


def test_a_file_that_changes_while_it_is_decoded_is_an_error_that_names_it(monkeypatch):
    numbered_files(8)
    original = s2mts2.decode

    def decode(path, *arguments):
        pixels = original(path, *arguments)
        if path.endswith("img005.png"):
            shade(Path(path), 205)
            os.utime(path, (1e9, 1e9))
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(s2mts2, "decode", decode)
        with pytest.raises(UserError, match="own/img005.png changed while it was read"):
            load_data("own", size=8)
    assert shades(load_data("own", size=8))["img005.png"] == 205


def test_a_file_that_changes_after_it_was_decoded_is_decoded_again(monkeypatch):
    expected = numbered_files()
    changed = []

    def change(path):
        if not changed:
            changed.append(path)
            shade(Path("own/img001.png"), 201)
            os.utime("own/img001.png", (1e9, 1e9))

    stop_at(monkeypatch, "img100.png", change)
    assert shades(load_data("own", size=8)) == expected | {"img001.png": 201}


def test_two_folders_of_the_same_names_share_a_cache():
    first, second = (
        numbered_files(12, 0, Path("a/images")),
        numbered_files(12, 100, Path("b/images")),
    )
    for _ in range(2):
        assert shades(load_data("a/images", size=8, cache="cache")) == first
        assert shades(load_data("b/images", size=8, cache="cache")) == second
    assert {path.suffix for path in Path("a").rglob("*") if path.is_file()} == {".png", ".csv"}
    assert len([*Path("cache").rglob("*.uint8")]) == 2


def start_decoding(root, life):
    """A process that decodes a folder of shades 0, 1, 2, ... Returns its id.

    It ends with 0 if all pixels are right. It kills itself at its event number life; an event is an
    image that is decoded, or the moment before or after a file is renamed.
    """
    process = os.fork()
    if process:
        return process
    status, events, rename = 1, iter(range(life)), os.replace
    # The parent's lock could be held by a process that is killed.
    s2mts2.tqdm.set_lock(threading.RLock())
    s2mts2.tqdm.monitor_interval = 0

    def event(path):
        if next(events, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0005)

    def replace_file(*arguments):
        event(arguments)
        rename(*arguments)
        event(arguments)

    original = s2mts2.decode
    s2mts2.decode = lambda *arguments: event(arguments) or original(*arguments)
    os.replace = replace_file
    try:
        images = s2mts2.load_data(root, size=4).images
        status = 2 * any((image != k).any() for k, image in enumerate(images))
    finally:
        os._exit(status)


def end_of(process):
    """The status of a process: 0 right pixels, 2 wrong ones, 1 an error, -9 killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("seed", range(20))
def test_two_processes_decode_at_once_are_killed_and_one_is_restarted(seed):
    numbered_files(80)
    random = np.random.default_rng(seed)
    first, second = (start_decoding("own", int(random.integers(0, 82))) for _ in "ab")
    statuses = [end_of(first)]
    # The other may still run.
    third = start_decoding("own", 9999)
    statuses += [end_of(second), end_of(third)]
    assert {*statuses[:2]} <= {0, -9}
    assert statuses[2] == 0
    assert shades(load_data("own", size=4)) == {f"img{k:03d}.png": k for k in range(80)}


def test_two_processes_decode_at_once_undisturbed():
    for folder_name in "abc":
        numbered_files(80, 0, Path(folder_name))
        pair = [start_decoding(folder_name, 9999) for _ in "ab"]
        assert [end_of(process) for process in pair] == [0, 0]
        assert len([*Path(folder_name).glob("*.uint8")]) == 1


# ---- runs and the data that they are of


def test_other_images_under_the_same_names_are_another_run(tiny_network, capsys):
    numbered_files(24)
    run(f"pretrain --data own {TINY_STAGE_1}", f"finetune {TINY_STAGE_2}")
    before = Path("runs/own/metrics.json").read_bytes()
    shade(Path("own/img019.png"), 219)
    for path in Path("own").glob("*.uint8"):
        path.unlink()
    for command in (f"pretrain --data own {TINY_STAGE_1}", f"finetune {TINY_STAGE_2}"):
        error = error_of(command, capsys)
        assert re.search(
            r"\.pt differs, use --fresh or --out: .*data \d+ there and \d+ here", error
        )
    assert "is of other data" in error_of("evaluate", capsys)
    assert Path("runs/own/metrics.json").read_bytes() == before
    run(
        f"pretrain --data own {TINY_STAGE_1} --fresh",
        f"finetune {TINY_STAGE_2} --fresh",
        "evaluate",
    )


@pytest.mark.parametrize("index", [0, 11, 23])
def test_the_checksum_covers_every_image_and_label_and_the_split(index):
    numbered_files(24)
    data = load_data("own", size=8)
    whole = s2mts2.checksum_of(data)
    images, targets = np.array(data.images), data.targets.copy()
    assert s2mts2.checksum_of(replace(data, images=images.copy())) == whole
    images[index, 0, 7, 7] ^= 1
    targets[index] = targets[index][::-1]
    both = np.concatenate([data.train, data.test])
    others = [
        dict(images=images),
        dict(targets=targets),
        dict(train=both[:19], test=both[19:]),
        dict(train=data.train[:-1]),
        dict(names=[*data.names[:-1], "x"]),
        dict(classes=["b", "a"]),
    ]
    sums = {s2mts2.checksum_of(replace(data, **other)) for other in others}
    assert len(sums | {whole}) == 7


def test_folders_with_names_like_patterns(tiny_network):
    numbered_files(12, 0, Path("set1"))
    numbered_files(12, 50, Path("set[1]"))
    run(f"pretrain --data set[1] {TINY_STAGE_1}", f"pretrain --data set1 {TINY_STAGE_1}")
    run(f"finetune --data set[1] {TINY_STAGE_2}")
    assert Path("runs/set[1]/metrics.json").exists()
    saved = torch.load("runs/set[1]/finetune.pt", weights_only=True)["args"]
    assert (saved["start"], saved["data"]) == ("runs/set[1]/pretrain.pt", "set[1]")


def test_two_folders_with_one_last_name_do_not_mix(tiny_network, capsys):
    numbered_files(12, 0, Path("a/images"))
    numbered_files(12, 50, Path("b/images"))
    run(f"pretrain --data a/images {TINY_STAGE_1}")
    assert "no pretrain.pt of b/images" in error_of(
        f"finetune --data b/images {TINY_STAGE_2}", capsys
    )
    assert "differs" in error_of(f"pretrain --data b/images {TINY_STAGE_1}", capsys)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_classes_called_like_metrics_and_letters_that_a_terminal_cannot_show(
    encoding, tiny_network, monkeypatch
):
    numbered_files(24)
    table = Path("own/labels.csv")
    rows = [
        f"img{k:03d}.png,{k % 2},{1 - k % 2},0,{'train' if k > 9 else 'test'}" for k in range(24)
    ]
    rows[-1] = "img023.png,0,0,1,train"
    table.write_text("\n".join(["image,accuracy,mean_auc,肺炎,split", *rows]), encoding="utf-8")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding, write_through=True))
    run(f"pretrain --data own {TINY_STAGE_1}", f"finetune {TINY_STAGE_2}")
    shown = screen.getvalue().decode(encoding)
    result = json.loads(Path("runs/own/metrics.json").read_text())
    assert {*result["auc"]} == {"accuracy", "mean_auc", "肺炎"}
    for name in ("accuracy", "mean_auc"):
        values = re.findall(rf"^{name} +([\d.]+) ", shown, re.MULTILINE)
        assert sorted(values) == sorted(f"{x:.4f}" for x in (result["auc"][name], result[name]))
    assert ("肺炎" if encoding == "utf-8" else "??") in shown
    assert (
        Path("runs/own/predictions.csv")
        .read_text("utf-8")
        .startswith("image,accuracy,mean_auc,肺炎\n")
    )


# ---- predict


@pytest.fixture
def trained(tiny_network):
    """A finetune.pt of own images in pets/. Returns their names."""
    names = folder(Path("pets"), "RGB")
    run(f"pretrain --data pets {TINY_STAGE_1}", f"finetune {TINY_STAGE_2} --lr 0.05")
    return names


def test_predict_takes_several_folders(trained):
    shade(Path("one/a.png"), 50)
    shade(Path("two/a.png"), 60)
    run("predict one two pets/a/000.png")
    assert table("predicted.csv")[1] == ["one/a.png", "two/a.png", "pets/a/000.png"]


def test_predict_refuses_a_folder_as_its_output_before_it_starts(trained, capsys):
    Path("results").mkdir()
    assert "--out results is a folder" in error_of("predict pets --out results", capsys)
    assert not list(Path().glob("*.tmp"))


def test_predict_gives_the_probabilities_of_the_test(trained):
    run("predict pets --out out/new.csv")
    header, tested, scores = table("runs/pets/predictions.csv")
    again, names, new = table("out/new.csv")
    assert again == header == ["image", "cat", "dog"]
    assert names == sorted(trained)
    assert len({*new[:, 0]}) == 20
    row = dict(zip(names, new, strict=True))
    assert np.allclose([row[name] for name in tested], scores, atol=1e-5)
    assert np.allclose(new.sum(1), 1, atol=1e-5)


def test_predict_keeps_the_order_of_the_files(trained):
    run("predict pets")
    row = dict(zip(*table("predicted.csv")[1:], strict=True))
    files = ["pets/b/007.png", "pets/a/012.png", "pets/b/001.png"]
    run(f"predict {' '.join(files)} --from runs/pets/finetune.pt --out some.csv")
    _, names, scores = table("some.csv")
    assert names == files
    assert np.allclose(scores, [row[name.removeprefix("pets/")] for name in files], atol=1e-5)


def test_predict_skips_and_names_broken_files_and_ends_with_status_2(trained, capsys):
    for k in range(64):
        write_image(Path(f"new/{k:02d}.png"), k, "RGB")
    run("predict new --out before.csv")
    _, names, before = table("before.csv")
    Path("new/03.png").write_bytes(b"broken")
    os.truncate("new/62.png", 300)
    DEEP["rgb.png"](Path("new/40.png"))
    write_image(Path("new/99.jpg"), 99)
    capsys.readouterr()
    assert "3 files were skipped" in error_of("predict new --out after.csv", capsys)
    broken = {"03.png", "40.png", "62.png"}
    _, left, after = table("after.csv")
    assert left == sorted({*names, "99.jpg"} - broken)
    kept = [k for k, name in enumerate(names) if name not in broken]
    assert np.allclose(after[:-1], before[kept], atol=1e-5)


def test_predict_prints_the_name_and_reason_of_what_it_skipped(trained, capsys):
    Path("pets/a/000.png").write_bytes(b"broken")
    DEEP["grey.png"](Path("pets/deep.png"))
    assert s2mts2.main(["predict", "pets"]) == 2
    out = capsys.readouterr().out
    assert "cannot read image pets/a/000.png" in out
    assert re.search("cannot read image pets/deep.png.*scale them", out)
    assert "19 images" in out


def test_predict_counts_other_files_as_skipped(trained, capsys):
    for k, (ending, form) in enumerate(FORMATS.items()):
        shade(Path(f"new/{k}.{ending.upper() if k % 2 else ending}"), 20 * k, format=form)
    run("predict new --out all.csv")
    Path("new/notes.txt").write_text("not an image\n")
    Path("new/.hidden").write_text("not an image\n")
    capsys.readouterr()
    assert s2mts2.main(["predict", "new", "--out", "again.csv"]) == 2
    shown = capsys.readouterr()
    assert "not an image: new/notes.txt" in shown.out
    assert "error: 1 files were skipped" in shown.err
    assert table("again.csv")[1] == table("all.csv")[1] == sorted(os.listdir("new"))[1:-1]
    assert Path("again.csv").read_bytes() == Path("all.csv").read_bytes()


def test_predict_follows_links_to_folders(trained):
    Path("new").mkdir()
    Path("new/linked").symlink_to("../pets/a")
    Path("new/cycle").symlink_to(".")
    run("predict new")
    assert table("predicted.csv")[1] == [f"linked/{k:03d}.png" for k in range(0, 20, 2)]


def test_predict_reads_a_file_under_each_of_its_names(trained):
    shade(Path("new/one.png"), 50)
    Path("new/two.png").symlink_to("one.png")
    run("predict new")
    _, names, scores = table("predicted.csv")
    assert names == ["one.png", "two.png"] and (scores[0] == scores[1]).all()


def test_predict_of_files_that_are_all_broken_writes_no_row(trained, capsys):
    Path("broken.png").write_bytes(b"broken")
    assert "1 files were skipped" in error_of("predict broken.png", capsys)
    assert table("predicted.csv")[:2] == (["image", "cat", "dog"], [])


def test_predict_of_a_missing_file_names_it(trained, capsys):
    assert s2mts2.main(["predict", "pets/a/000.png", "nowhere.png"]) == 2
    assert "nowhere.png" in capsys.readouterr().out
    assert table("predicted.csv")[1] == ["pets/a/000.png"]


def test_predict_of_an_empty_folder_is_an_error(trained, capsys):
    Path("empty").mkdir()
    assert "empty has no images" in error_of("predict empty", capsys)


def test_predict_turns_an_image_as_its_exif_says(trained):
    image = Image.open("pets/a/000.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    run("predict pets/a/000.png turned.png")
    scores = table("predicted.csv")[2]
    assert np.allclose(scores[0], scores[1], atol=1e-4)


def test_predict_refuses_outputs_that_are_not_finite(trained, capsys):
    saved = torch.load("runs/pets/finetune.pt", weights_only=True)
    saved["state"]["teacher"]["classifier.bias"][0] = float("nan")
    torch.save(saved, "runs/pets/finetune.pt")
    assert "not finite" in error_of("predict pets", capsys)
    assert not Path("predicted.csv").exists()


SHORT = "finetune --labels 8 --epochs 1 --min-steps 1"


def lines(path):
    """The lines of log.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_json(path):
    return json.loads(Path(path).read_text())


def saved(path):
    return torch.load(path, weights_only=True)


def same(ours, theirs, atol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# ---- made data


class Small(nn.Module):
    """Two layers in the place of DenseNet, without BatchNorm."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.hidden = nn.Linear(16 * channels, 12)
        self.classifier = nn.Linear(12, outputs)

    def forward(self, images):
        return self.classifier(self.hidden(self.features(images)).tanh())


@pytest.fixture
def small_networks(monkeypatch):
    """Put Small in the place of each network. Returns the arguments of build_network."""
    calls = []

    def build(arch, channels, outputs, head="linear", imagenet=False):
        calls.append(dict(arch=arch, outputs=outputs, head=head, imagenet=imagenet))
        return Small(channels, outputs)

    monkeypatch.setattr(s2mts2, "build_network", build)
    return calls


def own_images(root, mode="L"):
    """60 own images of two classes; the last 20 are not in the table. Three are not read."""
    names = [f"{'ab'[k % 2]}/{k:03d}.{'png' if k % 3 else 'jpg'}" for k in range(60)]
    for k, name in enumerate([*names, ".hidden/1.png", "a/.2.png", "views.png"]):
        write_image(root / name, k, mode)
    rows = [f"{name},{k % 2},{1 - k % 2}\n" for k, name in enumerate(names[:40])]
    (root / "labels.csv").write_text("image,cat,dog\n" + "".join(rows))
    return names


# ---- settings


@pytest.mark.parametrize(
    "command, expected",
    [
        (
            "pretrain --data cxr14",
            "size 256|epochs 100|batch 256|lr 0.03|momentum 0.9|weight_decay 0.0001|keys 2|dim 128|"
            "queue 65536|temperature 0.07|lambda_ 2.0|teacher_momentum 0.999|schedule cosine|"
            "init imagenet|arch densenet121|crop 0.8|rotate 10.0|erase_p 0.5",
        ),
        (
            "finetune --from imagenet --data cxr14",
            "size 512|epochs 30|batch 16|lr 0.05|schedule steps|beta1 0.9|beta2 0.99|eps 0.1|"
            "weight_decay 0.0|teacher_momentum 0.999|consistency 1.0|ramp 1.0|labels 0.02|"
            "rotate 5.0",
        ),
        ("pretrain --data chexpert", "size 224|keys 5|erase_p 0.0|queue 65536|blur 2.0"),
        (
            "finetune --from imagenet --data chexpert",
            "size 224|batch 64|weight_decay 0.01|rotate 10.0|jitter_p 0.8|schedule cosine",
        ),
        ("pretrain --data isic2018", "size 224|keys 5|centre 0.25|crop 0.0|vertical_flip_p 0.5"),
        ("finetune --from imagenet --data isic2018", "epochs 80|labels 0.2|schedule cosine"),
        (
            "pretrain",
            "arch tiny|init random|size 32|epochs 45|batch 64|lr 0.06|teacher_momentum 0.99|"
            "queue 512|temperature 0.4|keys 2|lambda_ 2.0|crop 0.5|rotate 25.0|flip_p 0.0",
        ),
        (
            "finetune --from scratch",
            "arch tiny|size 32|epochs 14|batch 32|lr 0.1|teacher_momentum 0.97|consistency 200.0|"
            "ramp 1.0|labels 10|crop 0.4|min_steps 0",
        ),
        ("pretrain --data x.npz", "arch tiny|init random|size 32|batch 128|queue 4096|jitter 0.2"),
        (
            "finetune --from scratch --data x.npz",
            "size 64|epochs 5|batch 64|min_steps 75|consistency 20.0|ramp 0.33|labels all",
        ),
    ],
)
def test_each_data_set_has_its_recipe(command, expected):
    args = vars(parse(command))

    values = args | args["augment"]

    assert [f"{pair.split()[0]} {values[pair.split()[0]]}" for pair in expected.split("|")] == (
        expected.split("|")
    )


def without(args, *names):
    return {name: value for name, value in vars(args).items() if name not in names}


@pytest.mark.parametrize("stage", ["pretrain", "finetune --from scratch"])
def test_arch_tiny_changes_only_the_network(stage):
    whole, tiny = parse(f"{stage} --data cxr14"), parse(f"{stage} --data cxr14 --arch tiny")

    assert (whole.arch, tiny.arch) == ("densenet121", "tiny")
    # ImageNet weights are only for densenet121.
    assert "finetune" in stage or (whole.init, tiny.init) == ("imagenet", "random")
    left_out = ("arch", "init", "given")
    assert without(tiny, *left_out) == without(whole, *left_out)


@pytest.mark.parametrize("stage", ["pretrain", "finetune --from scratch"])
def test_option_recipe_replaces_the_recipe_of_the_data(stage):
    other, own = (parse(f"{stage} --data {data}") for data in ("cxr14 --recipe small", "DIR"))

    left_out = ("given", "data", "recipe")
    assert without(other, *left_out) == without(own, *left_out)
    assert (
        parse(f"{stage} --data digits --recipe cxr14").size == parse(f"{stage} --data cxr14").size
    )


def test_given_options_replace_the_recipe():
    args = parse(
        "pretrain --keys 5 --covariance-weight 0.5 --temperature 1 --rotate-p 0.3 --no-amp --out x"
    )

    assert (args.keys, args.lambda_, args.temperature, args.amp, args.out) == (
        5,
        0.5,
        1,
        False,
        "x",
    )
    assert args.augment == {**parse("pretrain").augment, "rotate_p": 0.3}


def test_help_of_each_command_has_the_options_that_it_reads_with_meaning_and_values(capsys):
    texts = {}
    for command in s2mts2.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            s2mts2.main([command, "--help"])
        texts[command] = " ".join(capsys.readouterr().out.split())

        assert stopped.value.code == 0

    assert "--keys" in texts["pretrain"] and "--keys" not in texts["finetune"]
    assert "--consistency" in texts["finetune"] and "--consistency" not in texts["pretrain"]
    assert "--seeds" in texts["ablate"] and "--lr" not in texts["predict"]
    for name, (first, second, meaning) in s2mts2.CXR14.items():
        for command, value in (("pretrain", first), ("finetune", second)):
            assert value is None or s2mts2.option_of(name) in texts[command]
            assert value is None or meaning in texts[command]
    expected = (
        "t, in units of cosine similarity [0.07 cxr14, chexpert, isic2018, small; 0.4 digits]"
    )
    assert expected in texts["pretrain"]


# ---- settings that stage 2 takes over, and where it starts


def test_finetune_takes_over_network_and_what_stage_1_was_given(small_networks):
    given = "--data cxr14 --root root --partial --cache c --recipe small --size 16 --keys 3"
    s2mts2.pretrain(made_by_hand(), parse(f"pretrain {given} --out out --epochs 1 --batch 8"))

    args = parse("finetune --from out/pretrain.pt")

    assert (args.data, args.root, args.partial, args.cache) == ("cxr14", "root", True, "c")
    assert (args.recipe, args.arch, args.size, args.out) == ("small", "tiny", 16, "out")
    # Stage 2 has epochs and batch of its own, and the command line counts most.
    assert (args.epochs, args.batch) == (5, 64)
    args = parse("finetune --from out/pretrain.pt --size 24 --out other --root elsewhere")
    assert (args.size, args.out, args.root) == (24, "other", "elsewhere")


def test_finetune_takes_over_the_policy_for_uncertain_targets(small_networks):
    given = "--data chexpert --uncertain ignore --arch tiny --init random"
    s2mts2.pretrain(made_by_hand(), parse(f"pretrain {given} --epochs 1 --batch 8 --out out"))

    args = parse("finetune --from out/pretrain.pt")

    # The size was not given to stage 1, so it is that of the recipe's stage 2.
    assert (args.uncertain, args.arch, args.size) == ("ignore", "tiny", 224)
    assert args.schedule == "cosine"


def test_finetune_on_other_data_takes_over_only_the_network(small_networks):
    command = (
        "pretrain --data cxr14 --root root --partial --arch tiny --size 16 --epochs 1 --batch 8"
    )
    s2mts2.pretrain(made_by_hand(), parse(f"{command} --out out"))

    args = parse("finetune --from out/pretrain.pt --data chexpert")

    assert (args.arch, args.root, args.partial, args.out) == ("tiny", None, False, None)
    assert (args.size, args.recipe) == (224, "chexpert")


def test_finetune_starts_from_the_newest_stage_1(small_networks):
    npz()
    for name in ("one", "two"):
        run(f"pretrain --data set.npz --epochs 1 --batch 8 --out runs/{name}")
    os.utime("runs/one/pretrain.pt", (1e9, 1e9))
    assert parse("finetune").start == "runs/two/pretrain.pt"

    # Repeating a finished run makes its checkpoint the newest.
    run("pretrain --data set.npz --epochs 1 --batch 8 --out runs/one")

    assert parse("finetune").start == parse("finetune --data set.npz").start
    assert parse("finetune").start == "runs/one/pretrain.pt"
    assert parse("finetune").data == "set.npz"


@pytest.mark.parametrize("one, two", [("a/images", "b/images"), ("set[1]", "set1")])
def test_data_is_found_by_its_path_not_by_its_name(one, two, small_networks, capsys):
    for path in (one, two):
        own_images(Path(path))
    write_image(Path(two, "a/000.jpg"), 99)
    run(f"pretrain --data {one} --epochs 1 --batch 8 --out runs/one")
    assert "no pretrain.pt of" in error_of(f"finetune --data {two}", capsys)

    run(f"pretrain --data {two} --epochs 1 --batch 8 --out runs/two")

    assert parse("finetune").start == "runs/two/pretrain.pt"
    assert parse(f"finetune --data {one}").start == "runs/one/pretrain.pt"
    # Another spelling of the same path.
    assert parse(f"finetune --data ./{two}/../{Path(two).name}").start == "runs/two/pretrain.pt"
    # The folder is not written by two runs of different data.
    assert "differs" in error_of(
        f"pretrain --data {two} --epochs 1 --batch 8 --out runs/one", capsys
    )


def test_a_broken_checkpoint_of_other_data_is_named_and_passed_over(small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8")
    s2mts2.write_file(Path("runs/other/pretrain.pt"), b"broken")
    os.utime("runs/other/pretrain.pt", (2e9, 2e9))

    assert parse("finetune --data set.npz").start == "runs/set/pretrain.pt"

    assert "warning: runs/other/pretrain.pt" in capsys.readouterr().out
    assert "runs/other/pretrain.pt" in error_of("finetune", capsys)


# ---- each option changes the result, and is compared on resume

BASE = (
    "--epochs 2 --batch 8 --size 32 --arch tiny --lr 0.1 --crop 0.3 --rotate 30 --rotate-p 0.7 "
    "--flip-p 0.5 --jitter 0.5 --hue 0.3 --jitter-p 0.7 --blur 2 --blur-p 0.6 --erase-p 0.6 "
    "--schedule cosine --teacher-momentum 0.6"
)
BASES = {
    "pretrain": f"pretrain {BASE} --init random --dim 6 --queue 20",
    "finetune": f"finetune --from scratch --labels 6 --min-steps 3 --consistency 9 {BASE}",
}
BOTH = (
    "size 24|epochs 3|batch 4|lr 0.05|schedule steps|weight-decay 0.3|teacher-momentum 0.5|"
    "centre 0.4|crop 0.7|rotate 60|rotate-p 0.1|flip-p 0|vertical-flip-p 0.5|jitter 0.1|hue 0.1|"
    "jitter-p 0.1|blur 1|blur-p 0.1|erase-p 0.1|seed 1"
)
OTHERS = {
    "pretrain": f"{BOTH}|momentum 0.1|keys 3|dim 5|queue 9|temperature 0.3|covariance-weight 0",
    "finetune": f"{BOTH}|min-steps 4|beta1 0.5|beta2 0.5|eps 1|consistency 2|ramp 0.5|labels 9",
}


def train(command):
    args = parse(command)
    return getattr(s2mts2, args.command)(made_by_hand(channels=3), args)


@cache
def weights_of_base(stage):
    train(f"{BASES[stage]} --out base")
    return saved(f"base/{stage}.pt")["state"]["teacher"]


@pytest.mark.parametrize(
    "stage, option", [(stage, each) for stage in OTHERS for each in OTHERS[stage].split("|")]
)
def test_an_option_changes_the_networks(stage, option, small_networks):
    train(f"{BASES[stage]} --{option} --out other")

    with pytest.raises(AssertionError):
        same(saved(f"other/{stage}.pt")["state"]["teacher"], weights_of_base(stage))


@pytest.mark.parametrize("stage", OTHERS)
def test_the_same_command_gives_the_same_networks(stage, small_networks):
    train(f"{BASES[stage]} --out other")

    same(saved(f"other/{stage}.pt")["state"]["teacher"], weights_of_base(stage))


def test_the_options_of_these_tests_are_all_settings():
    for stage, column in (("pretrain", 0), ("finetune", 1)):
        tested = {option.split()[0].replace("-", "_") for option in OTHERS[stage].split("|")}
        there = {name for name, row in s2mts2.CXR14.items() if row[column] is not None}
        assert tested | {"arch", "init"} >= there - {"lambda_"}


def test_options_arch_and_init_choose_the_network(small_networks):
    for options in ("--arch tiny", "--arch densenet121 --init imagenet", "--arch densenet121"):
        train(f"pretrain --epochs 1 --batch 8 {options} --dim 7 --out {len(small_networks)}")
    train("finetune --from imagenet --arch densenet121 --epochs 1 --batch 8 --out new")

    assert small_networks == [
        dict(arch="tiny", outputs=7, head="mlp", imagenet=False),
        dict(arch="densenet121", outputs=7, head="mlp", imagenet=True),
        dict(arch="densenet121", outputs=7, head="mlp", imagenet=False),
        dict(arch="densenet121", outputs=3, head="linear", imagenet=True),
    ]


@pytest.mark.parametrize("stage", OTHERS)
def test_a_run_is_not_resumed_with_another_setting(stage, small_networks):
    train(BASES[stage])
    before = Path(f"runs/mine/{stage}.pt").read_bytes()
    others = [*OTHERS[stage].split("|"), "arch densenet121", "no-amp"]
    others += ["init imagenet --arch densenet121"] * (stage == "pretrain")

    for option in others:
        name = "lambda_" if option.startswith("cov") else option.removeprefix("no-").split()[0]
        wrong = rf"--fresh or --out: .*\b{name.replace('-', '_')} \S+ there and \S+ here"
        with pytest.raises(UserError, match=wrong):
            train(f"{BASES[stage]} --{option}")

    assert Path(f"runs/mine/{stage}.pt").read_bytes() == before


@pytest.mark.parametrize("stage", OTHERS)
def test_a_run_is_not_resumed_with_other_data(stage, small_networks):
    data, args = made_by_hand(), parse(BASES[stage])
    getattr(s2mts2, stage)(data, args)
    test, train = data.test, data.train
    last = data.images.copy()
    last[39, 0, 15, 15] ^= 1
    targets = data.targets.copy()
    targets[data.test[0]] = 1 - targets[data.test[0]]

    for change in (
        dict(images=last),
        dict(targets=targets),
        dict(classes=["a", "c", "b"]),
        dict(names=[f"j{k}" for k in range(40)]),
        dict(train=np.append(train[1:], train[0])),
        dict(train=np.append(train, test[0]), test=test[1:]),
        dict(train=train[1:]),
    ):
        with pytest.raises(UserError, match="data [0-9]+ there"):
            getattr(s2mts2, stage)(replace(data, **change), args)


def test_stage_2_is_not_resumed_with_another_stage_1(small_networks):
    for seed in (0, 1):
        train(f"{BASES['pretrain']} --seed {seed} --out {seed}")
    command = f"{BASES['finetune']} --out two --from"
    train(f"{command} 0/pretrain.pt")

    with pytest.raises(UserError, match="first_weights"):
        train(f"{command} 1/pretrain.pt")

    # The same weights under another name are the same run.
    Path("0").rename("moved")
    train(f"{command} moved/pretrain.pt")


def test_options_that_do_not_change_the_result_do_not_stop_a_resumed_run(
    small_networks, monkeypatch
):
    train(BASES["pretrain"])
    monkeypatch.setattr(s2mts2, "ema_update", None)

    train(f"{BASES['pretrain']} --device cpu --cache c --out runs/mine --recipe digits")


def test_options_of_the_data_reach_the_loader(monkeypatch, small_networks):
    calls = []

    def load(*arguments):
        calls.append(arguments)
        return made_by_hand()

    monkeypatch.setattr(s2mts2, "load_data", load)
    given = "--data chexpert --root r --cache c --partial --uncertain ones --size 32"

    run(f"pretrain {given} --arch tiny --epochs 1 --batch 8 --out out")
    run("finetune --from out/pretrain.pt --epochs 1 --labels 6 --batch 8")
    run("evaluate out/finetune.pt", "evaluate out/pretrain.pt --labels 6")
    run(f"ablate {given} --arch tiny --epochs 1 --batch 8 --labels 6 --seeds 2 --out table")

    assert set(calls) == {("chexpert", "r", 32, "c", "ones", True)}
    run("evaluate out/finetune.pt --root q --cache d --uncertain zeros")
    assert calls[-1] == ("chexpert", "q", 32, "d", "zeros", True)


# ---- bad commands

BAD = {
    "": "|train|evaluate|evaluate nowhere.pt|evaluate --epochs 3|predict|finetune|--lr 1|"
    "pretrain --from scratch|predict file|predict file --epochs 3|predict file --root .|"
    "evaluate file",
    "pretrain ": "extra|--nonsense|--epoch 2|--data mnist|--epochs 0|--epochs x|--batch 1438|"
    "--batch 1|--lr nan|--lr inf|--lr -1|--teacher-momentum 1.1|--crop 1|--centre 1|--blur 11|"
    "--temperature 0|--dim 1000000000000|--keys 0|--queue 0|--size 15|"
    "--size 31 --arch densenet121|--seed -1|--seed 4294967296|--init imagenet|--device tpu|"
    "--device cuda:99|--labels 3|--out file|--data file|--root x|--data cxr14|--partial|"
    "--data cxr14 --root file|--data cxr14 --uncertain ones|--flip-p 7|--rotate-p 1.5|--hue 2|"
    "--recipe nothing|--arch vgg|--schedule never|--consistency 1|--min-steps 3|"
    "--data chexpert --uncertain perhaps|--init imagenet --arch tiny|--seeds 2",
    "finetune --from ": "nowhere.pt|file|imagenet --arch tiny|scratch --beta1 1|scratch --ramp 0|"
    "scratch --keys 2|scratch --init random|scratch --consistency -1|scratch --jitter-p 2",
    "finetune --from scratch --labels ": "0|1.5|5|2000|nowhere.txt|file|binary",
    "evaluate scratch ": "--labels 5|--recipe nothing|--lr 1",
    "ablate ": "--seeds 1|--seed 1|--lr -3|--size 8|--labels nowhere.txt|--labels 10 nowhere.txt|"
    "--init imagenet --arch tiny|--labels binary|--labels 10 5|--from scratch|--epochs 0",
}


@pytest.mark.parametrize(
    "command, options",
    [
        ("pretrain", "batch 2|size 16|epochs 1|keys 1|queue 1|dim 1|temperature 0.001|lr 0"),
        ("pretrain", "teacher-momentum 1|momentum 0|centre 0.99|crop 0.99|jitter 1|hue 1|seed 0"),
        ("pretrain", "rotate-p 1|flip-p 1|vertical-flip-p 1|jitter-p 1|blur-p 1|erase-p 1"),
        ("pretrain", "blur 10.3|seed 4294967295|covariance-weight 0"),
        ("finetune --from scratch", "ramp 0.001|beta1 0.9999|beta2 0.9999|consistency 0"),
        ("finetune --from scratch", "min-steps 0|eps 0|weight-decay 0|teacher-momentum 0"),
        ("ablate", "seeds 2"),
    ],
)
def test_the_least_and_the_largest_values_are_accepted(command, options):
    for option in options.split("|"):
        name, value = option.replace("covariance-weight", "lambda_").split()
        args = vars(parse(f"{command} --{option}"))
        assert float(value) == (args | args["augment"])[name.replace("-", "_")]


@pytest.mark.parametrize("command", [start + end for start in BAD for end in BAD[start].split("|")])
def test_bad_commands_end_with_one_line_and_write_nothing(command, capsys):
    Path("file").write_text("neither a folder nor a checkpoint\n")
    Path("binary").write_bytes(bytes(range(256)))

    error_of(command, capsys)

    assert sorted(os.listdir()) == ["binary", "file"]


@pytest.mark.parametrize(
    "command, words",
    [
        ("pretrain --flip-p 7", "--flip-p 7.0 is out of range"),
        ("pretrain --covariance-weight -1", "--covariance-weight -1.0 is out of range"),
        ("pretrain --batch 1438", "1437 training images: --batch must not be larger"),
        ("finetune --from scratch --labels binary", "binary"),
        ("finetune", "first run python s2mts2.py pretrain"),
        ("evaluate", "first run python s2mts2.py finetune"),
        ("predict binary", "first run python s2mts2.py finetune"),
        ("pretrain --data cxr14", "Data_Entry_2017"),
        ("pretrain --keyes 2", "see python s2mts2.py"),
        ("pretrain --uncertain ones", "--uncertain is only for chexpert"),
        ("pretrain --device cuda:99", "--device cuda:99 is not there"),
        ("pretrain --size 31 --arch densenet121", "--size 32 or more"),
    ],
)
def test_an_error_says_what_to_change(command, words, capsys):
    Path("binary").write_bytes(bytes(range(256)))

    assert words in error_of(command, capsys)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
    ],
)
def test_out_of_memory_names_batch_and_size(error, monkeypatch, capsys):
    def stage(data, args):
        raise error

    monkeypatch.setattr(s2mts2, "pretrain", stage)

    line = error_of("pretrain", capsys)

    assert "out of memory" in line and "--batch" in line and "--size" in line


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access"), ValueError("a bug"), KeyError(1)],
)
def test_an_error_that_the_user_cannot_fix_keeps_its_traceback(error, monkeypatch):
    def stage(data, args):
        raise error

    monkeypatch.setattr(s2mts2, "pretrain", stage)

    with pytest.raises(type(error)) as raised:
        s2mts2.main(["pretrain"])
    assert raised.value is error


@pytest.mark.parametrize(
    "error, text", [(OSError, "error: no space left"), (KeyboardInterrupt, "stopped; to resume")]
)
def test_the_message_stands_below_the_progress_bar(
    error, text, monkeypatch, small_networks, capsys
):
    def stop(*arguments):
        raise error("no space left")

    monkeypatch.setattr(s2mts2, "ema_update", stop)

    assert s2mts2.main(["pretrain", "--batch", "512"]) in (2, 130)

    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith(text) and "pretrain:   0%" in "".join(before)


def test_ctrl_c_ends_with_130_and_says_how_to_resume(monkeypatch, capsys):
    monkeypatch.setattr(s2mts2, "pretrain", interrupt)

    assert s2mts2.main(["pretrain", "--fresh", "--seed", "3"]) == 130

    text = capsys.readouterr().err.strip()
    assert text == "stopped; to resume a stage, run the same command without --fresh"


def test_a_terminal_with_few_letters_shows_question_marks_and_files_keep_the_letters(
    monkeypatch, small_networks
):
    names = own_images(Path("pets"))
    rows = "".join(f"{name},{k % 2},{1 - k % 2}\n" for k, name in enumerate(names[:40]))
    Path("pets/labels.csv").write_text(f"image,naïve,猫\n{rows}", encoding="utf-8")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    run("pretrain --data pets --epochs 1 --batch 8", "finetune --epochs 1 --min-steps 1")
    run("predict pets --out 猫.csv")

    streams[0].flush()
    shown = streams[0].buffer.getvalue().decode("cp1252")
    assert "naïve" in shown and "\n?  " in shown and "?.csv" in shown
    assert list(read_json("runs/pets/metrics.json")["auc"]) == ["naïve", "猫"]
    for file in ("runs/pets/predictions.csv", "猫.csv"):
        assert table(file)[0] == ["image", "naïve", "猫"]


# ---- reports


def test_auc_is_that_of_the_known_targets():
    random = np.random.default_rng(0)
    targets = (random.random((40, 3)) < 0.5).astype(np.float32)
    targets[random.random((40, 3)) < 0.3] = np.nan
    scores = random.random((40, 3))

    result = s2mts2.classification_metrics(targets, scores, "abc", True)

    known = ~np.isnan(targets)
    auc = [metrics.roc_auc_score(targets[known[:, k], k], scores[known[:, k], k]) for k in range(3)]
    assert result == dict(
        mean_auc=pytest.approx(np.mean(auc)),
        auc=dict(zip("abc", map(pytest.approx, auc), strict=True)),
    )


def test_a_class_without_positive_or_negative_or_score_has_no_auc():
    targets = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1], [0, np.nan, 0, 0]], np.float32)
    scores = np.array([[0.9, 0.1, 0.2, np.nan]] * 2 + [[0.3, 0.4, 0.1, np.nan]] * 2)
    nothing = np.full_like(targets, np.nan)

    result = s2mts2.classification_metrics(targets, scores, "abcd", True)

    assert result["auc"] == dict(a=0.5, b=None, c=None, d=None) and result["mean_auc"] == 0.5
    assert s2mts2.classification_metrics(nothing, scores, "abcd", True)["mean_auc"] is None


def test_a_class_that_is_called_like_a_metric_does_not_disturb_the_report(small_networks, capsys):
    data = replace(made_by_hand(multilabel=False), classes=["accuracy", "mean_auc", "student"])

    result = s2mts2.finetune(data, parse("finetune --from scratch --epochs 1 --labels 6"))

    header, _, scores = table("runs/mine/predictions.csv")
    targets = data.targets[data.test]
    auc = [metrics.roc_auc_score(targets[:, k], scores[:, k]) for k in range(3)]
    accuracy = np.mean(scores.argmax(1) == targets.argmax(1))
    assert header[1:] == data.classes
    assert list(result["auc"].values()) == pytest.approx(auc)
    assert (result["accuracy"], result["mean_auc"]) == pytest.approx((accuracy, np.mean(auc)))
    # The table on screen has both, the classes first.
    shown = re.findall(r"^(accuracy|mean_auc|student) +([0-9.]+)", capsys.readouterr().out, re.M)
    expected = dict(accuracy=[auc[0], accuracy], mean_auc=[auc[1], np.mean(auc)], student=[auc[2]])
    for name, values in expected.items():
        found = [float(number) for word, number in shown if word == name]
        assert found == pytest.approx(values, abs=6e-5)


def test_the_report_is_of_the_teacher_with_the_student_beside_it(small_networks):
    data, args = made_by_hand(), parse("finetune --from scratch --out out")
    student, teacher = Small(1, 3), Small(1, 3)

    result = s2mts2.report(student, teacher, data, args)

    for network, ours in ((teacher, result), (student, result["student"])):
        scores = s2mts2.evaluate(network, data, data.test, args.size)
        expected = s2mts2.classification_metrics(data.targets[data.test], scores, "abc", True)
        assert {name: ours[name] for name in expected} == expected
    assert result["mean_auc"] != result["student"]["mean_auc"]
    assert read_json("out/metrics.json") == result
    _, names, written = table("out/predictions.csv")
    assert names == [data.names[k] for k in data.test]
    assert np.allclose(written, s2mts2.evaluate(teacher, data, data.test, args.size), rtol=1e-5)


def test_small_probabilities_keep_their_order_in_the_csv_file():
    random = np.random.default_rng(0)
    scores = (10.0 ** -random.uniform(1, 12, (300, 2))).astype(np.float32)

    s2mts2.write_predictions(
        Path("new/p.csv"), ["a", 'b, "c"'], [f"i,{k}" for k in range(300)], scores
    )

    header, names, written = table("new/p.csv")
    assert (header, names[7]) == (["image", "a", 'b, "c"'], "i,7")
    assert (written.argsort(0) == scores.argsort(0)).all()
    assert np.allclose(written, scores, rtol=1e-5)


def test_the_table_has_the_best_class_first_and_marks_what_is_not_defined(capsys):
    one = dict(mean_auc=0.7, auc=dict(a=0.6, b=None, c=0.8))
    two = dict(mean_auc=None, auc=dict(a=0.5, b=None, c=None))

    s2mts2.print_metrics(1234, dict(teacher=one, student=two))

    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["AUC", "on", "1,234", "test", "images", "teacher", "student"],
        ["c", "0.8000", "n/a"],
        ["a", "0.6000", "0.5000"],
        ["b", "n/a", "n/a"],
        ["mean_auc", "0.7000", "n/a"],
    ]


# ---- linear probe


def features(network, data, indices, size):
    network.classifier = nn.Identity()
    with torch.no_grad():
        return network(s2mts2.random_views(torch.from_numpy(data.images[indices]), PLAIN, size))


def regression(rows, truth, unseen):
    """Standardised logistic regression, written out."""
    mean, std = rows.mean(0), rows.std(0)
    model = linear_model.LogisticRegression(max_iter=1000).fit((rows - mean) / std, truth)
    return model.predict_proba((unseen - mean) / std)


@pytest.mark.parametrize("multilabel", [True, False])
def test_the_probe_is_a_logistic_regression_on_frozen_features(multilabel):
    data, network = made_by_hand(multilabel=multilabel), Small(1, 5)
    labelled = np.sort(data.train[:20])
    if multilabel:
        data.targets[labelled[:6], 0] = np.nan
        data.targets[labelled, 2] = 1
    before = {name: value.clone() for name, value in network.state_dict().items()}

    scores = s2mts2.linear_probe(network, data, labelled, 16)

    same(dict(network.state_dict()), before)
    known, unseen = (features(network, data, part, 16).numpy() for part in (labelled, data.test))
    targets = data.targets[labelled]
    if not multilabel:
        assert np.allclose(scores, regression(known, targets.argmax(1), unseen), atol=1e-4)
        return
    assert np.allclose(scores[:, 0], regression(known[6:], targets[6:, 0], unseen)[:, 1], atol=1e-4)
    assert np.allclose(scores[:, 1], regression(known, targets[:, 1], unseen)[:, 1], atol=1e-4)
    # A class with positives only cannot be fitted.
    assert np.isnan(scores[:, 2]).all()


def test_the_probe_of_a_class_without_labels_is_not_known():
    data = made_by_hand(multilabel=False)
    labelled = data.train[data.targets[data.train, 1] == 0]

    scores = s2mts2.linear_probe(Small(1, 5), data, labelled, 16)

    assert np.isnan(scores[:, 1]).all() and np.allclose(scores[:, [0, 2]].sum(1), 1)


def test_evaluate_probes_a_checkpoint_of_stage_1(small_networks, capsys):
    npz()
    run("pretrain --data set.npz --size 16 --epochs 1 --batch 8", SHORT)
    before = Path("runs/set/metrics.json").read_bytes()
    capsys.readouterr()

    run("evaluate runs/set/pretrain.pt --labels 12 --seed 5")

    assert "12 labelled images, 16 px" in capsys.readouterr().out
    result = read_json("runs/set/probe.json")
    data, teacher = s2mts2.load_data("set.npz"), Small(1, 128)
    teacher.load_state_dict(saved("runs/set/pretrain.pt")["state"]["teacher"])
    scores = s2mts2.linear_probe(teacher, data, s2mts2.choose_labelled(data, 12, 5), 16)
    expected = s2mts2.classification_metrics(
        data.targets[data.test], scores, data.classes, data.multilabel
    )
    assert result == expected | dict(start="runs/set/pretrain.pt")
    assert Path("runs/set/metrics.json").read_bytes() == before
    for seed in ("", " --seed 0"):
        run(f"evaluate runs/set/pretrain.pt --labels 12{seed} --out seed{seed[8:]}")
    assert read_json("seed/probe.json") == read_json("seed0/probe.json") != result
    run("evaluate runs/set/pretrain.pt --labels 16 --seed 5 --size 24 --out other")
    assert read_json("other/probe.json")["mean_auc"] != result["mean_auc"]


def test_the_probe_of_labels_of_one_class_is_an_error(small_networks, capsys):
    names = own_images(Path("pets"))
    Path("one.txt").write_text(f"{names[3]}\n{names[5]}\n")
    command = "evaluate scratch --data pets --labels one.txt"
    assert "of one class" in error_of(command, capsys)


def test_evaluate_probes_stage_1_on_other_data(small_networks):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8 --size 24 --seed 3")

    run("evaluate runs/set/pretrain.pt --data digits --labels 12")

    result = read_json("runs/digits/probe.json")
    assert result["start"] == "runs/set/pretrain.pt" and len(result["auc"]) == 10
    # Of stage 1 only the network was taken over.
    args = parse("evaluate runs/set/pretrain.pt --data digits")
    assert (args.size, args.seed, args.recipe, args.labels) == (32, 0, "digits", 10)


def test_evaluate_scratch_probes_the_first_weights(small_networks, capsys):
    npz()

    run("evaluate scratch --data set.npz --labels 12 --size 16 --out one")
    run("evaluate scratch --data set.npz --labels 12 --size 16 --out two")
    run("evaluate scratch --data set.npz --labels 12 --size 16 --seed 1 --out three")

    one, two, three = (
        read_json(next(Path(out).glob("probe-*.json"))) for out in ("one", "two", "three")
    )
    assert one["start"] == "scratch" and 0 < one["accuracy"] < 1
    assert one == two and one != three
    assert small_networks[0]["imagenet"] is False
    run("evaluate imagenet --data set.npz --labels 12 --arch densenet121 --size 32 --out four")
    assert small_networks[-1] == dict(arch="densenet121", outputs=4, head="linear", imagenet=True)


# ---- evaluate and predict


@pytest.mark.parametrize("make", [cxr14, chexpert, isic2018, npz])
def test_both_stages_run_on_each_data_set_and_evaluate_repeats_the_results(make, small_networks):
    make(Path("root"))
    where = "root/set.npz" if make is npz else f"{make.__name__} --root root --init random"
    where += " --uncertain ignore" * (make is chexpert)

    run(f"pretrain --data {where} --arch tiny --epochs 1 --batch 8 --size 32")
    run("finetune --labels 0.5 --epochs 1 --batch 4")

    (out,) = Path("runs").iterdir()
    names = "pretrain.pt finetune.pt log.jsonl metrics.json predictions.csv labelled.txt views.png"
    assert {file.name for file in out.iterdir()} == set(names.split())
    read = [(out / name).read_bytes() for name in ("metrics.json", "predictions.csv")]
    result = json.loads(read[0])
    assert result["mean_auc"] and ("macro_f1" in result) == (make in (isic2018, npz))
    (out / "metrics.json").unlink()
    run("evaluate", f"evaluate {out}/finetune.pt --out other")
    for folder in (out, Path("other")):
        assert [
            (folder / name).read_bytes() for name in ("metrics.json", "predictions.csv")
        ] == read


def test_the_default_commands_train_a_densenet_on_digits(monkeypatch, capsys):
    def reduced(*arguments):
        data = load(*arguments)
        return replace(data, train=data.train[:200], test=data.test[:100])

    load = s2mts2.load_data
    monkeypatch.setattr(s2mts2, "load_data", reduced)

    run("pretrain --epochs 2 --size 16", "finetune --epochs 1 --size 16", "evaluate --device cpu")

    out, err = capsys.readouterr()
    assert "pretrain epoch 2/2: loss" in out and "log(K + 1) = 5.30" in out
    result, log = read_json("runs/digits/metrics.json"), lines("runs/digits/log.jsonl")
    assert 0 < result["accuracy"] < 1 and 0.3 < result["mean_auc"] < 1
    assert [(line["stage"], line["epoch"]) for line in log] == [
        ("pretrain", 0),
        ("pretrain", 1),
        ("finetune", 0),
    ]
    student = saved("runs/digits/finetune.pt")["state"]["student"]
    assert student["features.conv0.weight"].shape[:2] == (32, 1)


def test_settings_of_a_checkpoint_cannot_be_changed_by_evaluate(small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8", SHORT)

    for options in ("--size 24", "--labels 9", "--seed 4", "--data digits", "--recipe digits"):
        error_of(f"evaluate runs/set/finetune.pt {options}", capsys)
    error_of("evaluate runs/set/pretrain.pt --arch densenet121", capsys)

    # What is the checkpoint's may be said again.
    run("evaluate runs/set/finetune.pt --labels 8 --seed 0 --data ./set.npz --arch tiny")


def test_evaluate_refuses_other_data_under_the_same_name(small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8", SHORT)

    npz(counts=(61, 4, 16))

    assert "finetune.pt is of other data" in error_of("evaluate", capsys)


def test_evaluate_reads_data_that_were_moved(small_networks):
    own_images(Path("pets"))
    run("pretrain --data pets --epochs 1 --batch 8", "finetune --epochs 1 --min-steps 1")
    Path("pets").rename("moved")

    run("evaluate runs/pets/finetune.pt --data moved --out again")

    assert read_json("again/metrics.json") == read_json("runs/pets/metrics.json")


def test_predict_does_not_trip_over_its_own_table(small_networks):
    own_images(Path("pets"))
    run("pretrain --data pets --epochs 1 --batch 8", "finetune --epochs 1 --min-steps 1")

    for _ in range(2):
        run("predict pets/a --out pets/a/table.csv")

    assert len(table("pets/a/table.csv")[1]) == 30


@pytest.mark.parametrize("out", ["", " --out pets/results"])
def test_what_a_run_writes_below_the_images_is_not_an_image(out, small_networks, monkeypatch):
    own_images(Path("pets"))
    monkeypatch.chdir("pets")
    out = out.replace("pets/", "")
    for _ in range(2):
        run(f"pretrain --data . --epochs 1 --batch 8{out}")
    (checkpoint,) = Path().rglob("pretrain.pt")

    run(f"finetune --from {checkpoint} --epochs 1 --min-steps 1")

    assert (checkpoint.parent / "views.png").exists()
    assert len(load_data(".", size=8).names) == 60


def test_views_of_a_run_that_was_stopped_in_its_first_epoch_are_no_image(
    small_networks, monkeypatch
):
    own_images(Path("pets"))
    monkeypatch.chdir("pets")
    monkeypatch.setattr(s2mts2, "ema_update", interrupt)

    assert s2mts2.main(["pretrain", "--data", ".", "--batch", "8"]) == 130

    assert list(Path("runs").rglob("views.png"))
    assert len(load_data(".", size=8).names) == 60


def test_views_png_of_the_user_is_an_image():
    names = own("image,a,b,split", ["img0.png,1,0,test", "img1.png,0,1,train"], 3)
    shade(Path(names, "more/views.png"), 77)
    assert "more/views.png" in load_data(names, size=8).names


@pytest.mark.parametrize("command", [SHORT, "evaluate", "predict set/0.png"])
def test_a_start_that_was_not_named_is_printed_first(command, small_networks, capsys):
    npz()
    write_image(Path("set/0.png"), 0)
    run("pretrain --data set.npz --epochs 1 --batch 8", SHORT)
    capsys.readouterr()

    run(command)

    stage = "pretrain" if command == SHORT else "finetune"
    assert capsys.readouterr().out.splitlines()[0] == f"starts from runs/set/{stage}.pt"


def test_predict_repeats_the_predictions_for_a_folder_and_for_files(small_networks):
    own_images(Path("DIR"))
    run("pretrain --data DIR --epochs 1 --batch 8", "finetune --epochs 1 --min-steps 1")

    run("predict DIR --out out/new.csv")
    run("predict DIR/b/001.png DIR/a/002.png --from runs/DIR/finetune.pt")

    header, names, scores = table("runs/DIR/predictions.csv")
    again, images, new = table("out/new.csv")
    row = dict(zip(images, new, strict=True))
    assert again == header and len(row) == 60 and images == sorted(images)
    assert np.allclose([row[name] for name in names], scores, atol=1e-5)
    _, paths, scores = table("predicted.csv")
    assert paths == ["DIR/b/001.png", "DIR/a/002.png"]
    assert np.allclose(scores, [row[path[4:]] for path in paths], atol=1e-5)


def test_predict_names_what_it_skips_and_ends_with_status_2(small_networks, capsys):
    own_images(Path("DIR"))
    run("pretrain --data DIR --epochs 1 --batch 8", "finetune --epochs 1 --min-steps 1")
    run("predict DIR --out all.csv")
    broken = {"a/002.png", "b/059.png"}
    for name in broken:
        Path("DIR", name).write_bytes(b"broken")
    Path("DIR/notes.txt").write_text("not an image")
    capsys.readouterr()

    assert s2mts2.main(["predict", "DIR", "--out", "good.csv"]) == 2

    out, err = capsys.readouterr()
    assert all(name in out for name in (*broken, "notes.txt")) and "58 images" in out
    assert err.splitlines()[-1].startswith("error: ")
    _, images, scores = table("all.csv")
    row = dict(zip(images, scores, strict=True))
    _, good, scores = table("good.csv")
    assert {*images} - {*good} == broken
    assert np.allclose(scores, [row[name] for name in good], atol=1e-5)
    error_of("predict DIR/a/002.png nowhere.png --out none.csv", capsys)


def huge(path):
    """Make a checkpoint's weights huge but finite, so that the outputs are not finite."""
    checkpoint = saved(path)
    for name in ("student", "teacher"):
        for value in checkpoint["state"][name].values():
            value.fill_(3e38)
    torch.save(checkpoint, path)


def test_outputs_that_are_not_finite_are_one_line(small_networks, capsys):
    own_images(Path("DIR"))
    run("pretrain --data DIR --epochs 1 --batch 8", "finetune --epochs 1 --min-steps 1")
    before = Path("runs/DIR/metrics.json").read_bytes()
    huge("runs/DIR/finetune.pt")

    assert "not finite" in error_of("evaluate", capsys)
    assert "not finite" in error_of("predict DIR", capsys)

    assert Path("runs/DIR/metrics.json").read_bytes() == before
    assert not Path("predicted.csv").exists()


# ---- ablation


ABLATE = "ablate --seeds 2 --epochs 1 --batch 8 --labels 6 9 --size 16 --lr 0.02 --out out"


def load_made(*arguments):
    return made_by_hand(multilabel=False)


@pytest.fixture(scope="module")
def ablation_folder(tmp_path_factory):
    """A folder with an ablation, made once, with two seeds and two numbers of labels."""
    path = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(
            s2mts2, "build_network", lambda a, channels, outputs, *b, **c: Small(channels, outputs)
        )
        patch.setattr(s2mts2, "load_data", load_made)
        run(ABLATE)
    return path


def test_the_ablation_keeps_a_folder_with_spaces(monkeypatch, small_networks, capsys):
    monkeypatch.setattr(s2mts2, "load_data", load_made)
    words = ABLATE.replace("--labels 6 9", "--labels 6").split()[:-1]
    assert s2mts2.main([*words, "my runs"]) == 0
    assert not Path("my-runs").exists()
    assert len(list(Path("my runs").iterdir())) == 1 + 2 * (2 + len(s2mts2.ABLATION))
    assert "macro_f1, mean +- standard deviation of seeds 0 to 1" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["-1", "nan", "0"])
def test_the_ablation_refuses_numbers_of_labels_before_its_first_run(labels, monkeypatch, capsys):
    monkeypatch.setattr(s2mts2, "load_data", load_made)
    monkeypatch.setattr(s2mts2, "pretrain", None)
    assert "--labels" in error_of(f"ablate --labels 6 {labels} --size 16", capsys)


@pytest.fixture
def ablation(ablation_folder, monkeypatch, small_networks):
    """The table of the ablation, in whose folder the test runs."""
    monkeypatch.chdir(ablation_folder)
    monkeypatch.setattr(s2mts2, "load_data", load_made)
    return read_json("out/ablation.json")


@pytest.mark.parametrize("text, value", [("10", 10), ("0.5", 0.5), ("all", "all")])
def test_a_given_number_of_labels_is_that_of_the_recipe(text, value):
    """So an ablation finds the finished runs of its folder, such as scratch-supervised-10-0."""
    labels = parse(f"finetune --from scratch --labels {text}").labels
    assert labels == value and str(labels) == text


def test_the_ablation_has_a_row_for_each_ingredient(ablation, capsys):
    stage_1 = dict(moco=(1, 0), jcl=(2, 2))
    assert list(ablation) == ["6", "9"]
    for labels, rows in ablation.items():
        assert set(rows) == {
            "random + probe",
            "jcl + probe",
            "scratch + supervised",
            "scratch + mean teacher",
            "moco + mean teacher",
            "jcl + supervised",
            "jcl + mean teacher",
        }
        for row, seed in [(row, seed) for row in rows for seed in (0, 1)]:
            start, stage_2 = row.split(" + ")
            out = Path(f"out/{start}-{stage_2.replace(' ', '-')}-{labels}-{seed}")
            probe = stage_2 == "probe"
            result = read_json(*out.glob("probe*.json" if probe else "metrics.json"))
            for name in ("accuracy", "mean_auc", "macro_f1"):
                assert rows[row][name][seed] == result[name]
            assert "auc" not in rows[row] and "student" not in rows[row]
            if probe:
                expected = dict(random="scratch", jcl=f"out/jcl-{seed}/pretrain.pt")[start]
                assert result["start"] == expected
                continue
            args = saved(out / "finetune.pt")["args"]
            assert (args["consistency"] > 0) == (stage_2 == "mean teacher")
            assert (args["seed"], args["labels"], args["lr"]) == (seed, float(labels), 0.02)
            expected = "scratch" if start == "scratch" else f"out/{start}-{seed}/pretrain.pt"
            assert args["start"] == expected
    for name, expected in stage_1.items():
        for seed in (0, 1):
            args = saved(f"out/{name}-{seed}/pretrain.pt")["args"]
            assert (args["keys"], args["lambda_"], args["seed"]) == (*expected, seed)


def test_rows_of_one_seed_have_the_same_labels_and_seeds_have_others(ablation):
    chosen = {
        (labels, seed): {file.read_text() for file in Path("out").glob(f"*-{labels}-{seed}/*.txt")}
        for labels in ("6", "9")
        for seed in (0, 1)
    }

    assert all(len(texts) == 1 for texts in chosen.values())
    assert len(set.union(*chosen.values())) == 4


def test_the_printed_commands_of_the_ablation_can_be_typed(ablation, capsys, monkeypatch):
    # All runs are finished, so they are only evaluated again.
    monkeypatch.setattr(s2mts2, "ema_update", None)
    run(ABLATE)
    assert read_json("out/ablation.json") == ablation
    typed = re.findall(r"^\$ python s2mts2\.py (.*)$", capsys.readouterr().out, re.M)
    files = {path: path.read_bytes() for path in Path("out").rglob("*.json")}

    assert len(typed) == 2 * (2 + 7 * 2)
    for line in typed[:16]:
        assert s2mts2.main(shlex.split(line)) == 0

    assert {path: path.read_bytes() for path in Path("out").rglob("*.json")} == files


def test_the_ablation_prints_mean_and_standard_deviation(capsys):
    rows = {row: dict(accuracy=[0.5, 0.7]) for row in s2mts2.ABLATION}
    rows["jcl + probe"] = dict(accuracy=[None, 0.7])

    s2mts2.print_ablation({"10": rows, "20": rows}, 2)

    out = capsys.readouterr().out
    assert "accuracy, mean +- standard deviation of seeds 0 to 1" in out
    assert re.search(r"^jcl \+ mean teacher( +0\.6000 \+- 0\.1414){2}$", out, re.M)
    assert re.search(r"^jcl \+ probe( +n/a){2}$", out, re.M)


def test_rows_without_stage_1_start_where_stage_1_starts(monkeypatch):
    starts = {}

    def record(words, given):
        starts[Path(given["out"]).name] = given.get("start")
        return dict(mean_auc=0.5)

    monkeypatch.setattr(s2mts2, "type_command", record)
    monkeypatch.setattr(s2mts2, "data_for", lambda args: made_by_hand())

    run("ablate --data cxr14 --seeds 2 --labels 0.5 --out out")

    assert starts["scratch-supervised-0.5-1"] == starts["random-probe-0.5-1"] == "imagenet"
    assert starts["jcl-mean-teacher-0.5-1"] == "out/jcl-1/pretrain.pt"
    run("ablate --data cxr14 --init random --seeds 2 --labels 0.5 --out out")
    assert starts["scratch-supervised-0.5-1"] == starts["random-probe-0.5-1"] == "scratch"


# ---- runs: stopped and resumed


def test_the_bar_shows_the_loss_when_it_is_drawn(small_networks):
    data, args = made_by_hand(), parse("pretrain --epochs 1 --batch 8")
    network = s2mts2.build_network("tiny", 1, 4, "mlp")
    state = dict(student=network, teacher=network)
    run = s2mts2.Run(data, args, 24, state)
    drawn, shown = [False, True], []
    run.bar.update = lambda images: drawn.pop(0)
    run.bar.set_postfix_str = lambda text, refresh: shown.append(text)
    run.start_epoch(0)

    run.step(torch.tensor(2.5), 8)
    run.step(torch.tensor(1.25), 8)

    # Reading the loss of each step would make the host wait for a GPU.
    assert shown == ["loss 1.250"]


def test_the_bar_is_closed_after_the_last_epoch(small_networks):
    data, args = made_by_hand(), parse("pretrain --epochs 2 --batch 8")
    network = s2mts2.build_network("tiny", 1, 4, "mlp")
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    state = dict(student=network, teacher=network, optimizer=optimizer)
    run, closed = s2mts2.Run(data, args, 24, state), []
    run.bar.close = lambda: closed.append(len(run.history))
    for epoch in range(2):
        run.start_epoch(epoch)
        run.step(torch.tensor(2.5), 24)
        run.finish_epoch()
    assert closed == [2]


@pytest.mark.parametrize("stage", BASES)
@pytest.mark.parametrize("update", [1, 4, 9])
def test_a_run_stopped_by_ctrl_c_resumes_exactly(stage, update, monkeypatch, small_networks):
    command, calls, ema_update = f"{BASES[stage]} --epochs 4 --min-steps 3", [], s2mts2.ema_update
    command = command.replace("--min-steps 3", "") if stage == "pretrain" else command
    train(f"{command} --out whole")

    def stop(*arguments):
        calls.append(1)
        return interrupt() if len(calls) == update else ema_update(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(s2mts2, "ema_update", stop)
        train(f"{command} --out halves")
    train(f"{command} --out halves")

    same(saved(f"halves/{stage}.pt")["state"], saved(f"whole/{stage}.pt")["state"])
    log, whole = (lines(f"{out}/log.jsonl") for out in ("halves", "whole"))
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    for name in ("loss", "lr", "stage"):
        assert [line[name] for line in log] == [line[name] for line in whole]
    names = dict(pretrain=["views.png"], finetune=["metrics.json", "predictions.csv"])[stage]
    for name in names:
        assert Path("halves", name).read_bytes() == Path("whole", name).read_bytes()


def test_densenet_is_resumed_exactly(monkeypatch):
    command = "pretrain --epochs 2 --batch 8 --size 16 --arch tiny"
    train(f"{command} --out whole")

    finish = s2mts2.Run.finish_epoch

    def stop(run):
        finish(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(s2mts2.Run, "finish_epoch", stop)
        train(f"{command} --out halves")
    train(f"{command} --out halves")

    same(saved("halves/pretrain.pt")["state"], saved("whole/pretrain.pt")["state"])


@pytest.mark.parametrize("stage", BASES)
def test_a_finished_run_does_not_train(stage, small_networks, monkeypatch, capsys):
    first = train(BASES[stage])
    before = Path(f"runs/mine/{stage}.pt").read_bytes()
    monkeypatch.setattr(s2mts2, "ema_update", None)
    capsys.readouterr()

    again = train(BASES[stage])

    assert "finished" in capsys.readouterr().out
    assert Path(f"runs/mine/{stage}.pt").read_bytes() == before
    if stage == "finetune":
        assert again == first
    else:
        same([dict(net.state_dict()) for net in again], [dict(net.state_dict()) for net in first])


def test_fresh_starts_over_with_other_settings(small_networks):
    train(BASES["pretrain"])
    train(f"{BASES['pretrain']} --lr 0.01 --out other")

    train(f"{BASES['pretrain']} --lr 0.01 --fresh")

    ours, theirs = saved("runs/mine/pretrain.pt"), saved("other/pretrain.pt")
    same(ours["state"], theirs["state"])
    assert ours["args"]["lr"] == 0.01 and len(lines("runs/mine/log.jsonl")) == 2


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_fresh_removes_all_that_its_stage_wrote(stage, small_networks, monkeypatch):
    npz()
    run(
        "pretrain --data set.npz --epochs 2 --batch 8",
        "finetune --labels 8 --epochs 3 --min-steps 1",
    )
    run("evaluate runs/set/pretrain.pt --labels 8")
    monkeypatch.setattr(s2mts2, "ema_update", interrupt)

    assert s2mts2.main(f"{stage} --data set.npz --lr 0.01 --batch 8 --fresh".split()) == 130

    there = {path.name for path in Path("runs/set").iterdir()}
    stage_1 = {"pretrain.pt", "views.png", "probe.json"}
    stage_2 = {"finetune.pt", "labelled.txt", "metrics.json", "predictions.csv"}
    # What comes before the first step is written anew.
    expected = stage_2 | {"views.png"} if stage == "pretrain" else stage_1 | {"labelled.txt"}
    assert there == expected | {"log.jsonl"}
    epochs = [line["stage"] for line in lines("runs/set/log.jsonl")]
    assert epochs == (["finetune"] * 3 if stage == "pretrain" else ["pretrain"] * 2)


@pytest.mark.parametrize("stage", BASES)
@pytest.mark.parametrize("write", ["again", "remove"])
def test_another_run_that_writes_the_same_folder_ends_one_in_an_error(
    stage, write, small_networks, monkeypatch
):
    calls, ema_update, path = [], s2mts2.ema_update, Path(f"runs/mine/{stage}.pt")
    per_epoch = 3

    def other_run(*arguments):
        calls.append(1)
        if len(calls) == per_epoch + 2:
            assert path.exists()
            if write == "remove":
                path.unlink()
            else:
                with monkeypatch.context() as patch:
                    patch.setattr(s2mts2, "ema_update", ema_update)
                    train(f"{BASES[stage]} --fresh --seed 9")
        return ema_update(*arguments)

    monkeypatch.setattr(s2mts2, "ema_update", other_run)

    with pytest.raises(UserError, match="another run has written .*use another --out"):
        train(BASES[stage])

    if write == "again":
        assert saved(path)["args"]["seed"] == 9 and len(saved(path)["history"]) == 2


def test_the_log_has_a_line_for_each_epoch(small_networks, monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(s2mts2, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    losses, loss = [], s2mts2.joint_contrastive_loss

    def record(*arguments):
        losses.append(loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(s2mts2, "joint_contrastive_loss", record)

    train(f"{BASES['pretrain']} --lr 0.4")

    # 28 training images are 3 steps of 8 images; the clock moves 5 s in an epoch.
    means = [torch.stack(losses[first : first + 3]).mean().item() for first in (0, 3)]
    for k, line in enumerate(lines("runs/mine/log.jsonl")):
        assert line == dict(
            stage="pretrain",
            epoch=k,
            loss=pytest.approx(means[k]),
            lr=pytest.approx((0.4, 0.2)[k]),
            seconds=5,
            images_per_second=pytest.approx(24 / 5),
        )


@pytest.mark.parametrize("text", [bytes(range(256)), b'{"stage": "pretr', b"\xff\xfe\x00"])
def test_a_damaged_log_does_not_end_in_a_traceback(text, small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8")
    Path("runs/set/log.jsonl").write_bytes(text)

    status = s2mts2.main(SHORT.split())

    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 0 or (status == 2 and last.startswith("error: ") and "log.jsonl" in last)


def test_views_png_has_a_row_for_each_of_8_images(small_networks):
    train(f"{BASES['pretrain']} --keys 3 --out one")
    train(f"{BASES['pretrain']} --keys 3 --seed 1 --out two")

    with Image.open("one/views.png") as image:
        # 32 px are enlarged to 96, with borders of 2: 4 columns, 8 rows.
        assert image.size == (2 + 4 * 98, 2 + 8 * 98)
    assert Path("one/views.png").read_bytes() != Path("two/views.png").read_bytes()


def test_labelled_txt_names_the_labelled_images(small_networks):
    data, args = made_by_hand(), parse(f"{BASES['finetune']} --seed 3")

    s2mts2.finetune(data, args)

    names = Path("runs/mine/labelled.txt").read_text().split()
    assert names == [data.names[k] for k in s2mts2.choose_labelled(data, 6, 3)]


@pytest.mark.parametrize("stage", BASES)
def test_a_loss_that_is_not_finite_stops_the_run(stage, small_networks):
    with pytest.raises(UserError, match=f"{stage} epoch 1: .* not finite; use a smaller --lr"):
        train(
            f"{BASES[stage]} --lr 1e30 --eps 1e-30".replace("--eps 1e-30" * (stage[0] == "p"), "")
        )

    assert not Path(f"runs/mine/{stage}.pt").exists()
    assert not Path("runs/mine/metrics.json").exists()


def test_weights_that_are_finite_but_huge_stop_the_run(monkeypatch):
    network = Small(3, 3)
    # A loss of 0 for zero inputs, whatever the weights are.
    network.hidden.weight.data.fill_(0)
    network.classifier.weight.data.fill_(1e25)
    monkeypatch.setattr(s2mts2, "build_network", lambda *arguments, **keywords: network)

    with pytest.raises(UserError, match="a weight is not finite"):
        train(f"{BASES['finetune']} --lr 0")


def test_one_labelled_image_alone_is_refused_before_training(small_networks, capsys):
    npz()
    Path("one.txt").write_text("image000003\n")
    command = "finetune --from scratch --data set.npz --epochs 1 --min-steps 1 --labels one.txt"

    assert "BatchNorm needs two images" in error_of(f"{command} --consistency 0", capsys)

    run(command)


def test_two_processes_that_write_one_file_do_not_disturb_each_other(monkeypatch):
    """The second writes between the first's writing and its renaming."""
    rename, pids = os.replace, iter((1, 2))
    monkeypatch.setattr(os, "getpid", lambda: next(pids))

    def replace_file(source, target):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", rename)
            if Path(source).read_text() == "first":
                s2mts2.write_file(Path("x.json"), "second")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace_file)
    s2mts2.write_file(Path("x.json"), "first")

    assert os.listdir() == ["x.json"] and Path("x.json").read_text() == "first"


# ---- checkpoints


def test_a_checkpoint_needs_neither_its_stage_1_nor_more_than_plain_values(small_networks):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8", SHORT)
    result = Path("runs/set/metrics.json").read_bytes()

    Path("runs/set/pretrain.pt").unlink()
    run("evaluate --out again")

    assert Path("again/metrics.json").read_bytes() == result
    checkpoint = saved("runs/set/finetune.pt")
    assert (checkpoint["stage"], checkpoint["version"]) == ("finetune", s2mts2.VERSION)
    assert checkpoint["channels"] == 1 and checkpoint["multilabel"] is False
    assert checkpoint["classes"] == ["0", "1", "2", "3"]


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "trap", "number", "folder"])
def test_a_damaged_checkpoint_says_what_to_do(damage, small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8")
    path = Path("runs/set/pretrain.pt")
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("trap", "number"):
        torch.save(
            dict(stage="pretrain", state=Trap(), args=Trap()) if damage == "trap" else 3, path
        )
    else:
        path.write_bytes(b"hello" * (damage == "text"))

    for command in (f"finetune --from {path}", "pretrain --data set.npz --epochs 1 --batch 8"):
        line = error_of(command, capsys)
        assert "runs/set/pretrain.pt is not a readable checkpoint" in line
        assert "delete it and run its stage again" in line
    assert not Path("sprung").exists()


@pytest.mark.parametrize("version", [None, 1, s2mts2.VERSION + 1])
def test_a_checkpoint_of_another_version_is_refused(version, small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8")
    checkpoint = saved("runs/set/pretrain.pt")
    del checkpoint["version"]
    # The old program had these names.
    old = dict(checkpoint, args=dict(covariance_weight=2.0)) | (
        {"version": version} if version else {}
    )
    torch.save(old, "runs/set/pretrain.pt")

    for command in ("finetune", "pretrain --data set.npz --epochs 1 --batch 8"):
        line = error_of(command, capsys)
        assert "runs/set/pretrain.pt is from another version" in line and "--fresh" in line
    run("pretrain --data set.npz --epochs 1 --batch 8 --fresh")


def test_a_checkpoint_of_the_other_stage_is_refused(small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8", SHORT)

    wrong = error_of("predict set.npz --from runs/set/pretrain.pt", capsys)
    assert "checkpoint of pretrain, not of finetune" in wrong
    wrong = error_of("finetune --from runs/set/finetune.pt --out other", capsys)
    assert "checkpoint of finetune, not of pretrain" in wrong


def test_stage_2_refuses_another_network_and_other_channels(small_networks, capsys):
    npz()
    run("pretrain --data set.npz --epochs 1 --batch 8")

    assert "tiny" in error_of("finetune --labels 8 --arch densenet121", capsys)

    with pytest.raises(UserError, match=r"\('tiny', 1\), not \('tiny', 3\)"):
        s2mts2.load_networks(parse("finetune"), 3, ["a"])


def test_a_file_is_replaced_as_a_whole(monkeypatch):
    s2mts2.write_file(Path("new/file"), "old")
    monkeypatch.setattr(os, "replace", interrupt)

    with pytest.raises(KeyboardInterrupt):
        s2mts2.write_file(Path("new/file"), b"new")

    assert Path("new/file").read_text() == "old"


# ---- devices


def test_a_device_is_chosen_and_computes_in_float32_without_a_gpu():
    for name in ("auto", "cpu"):
        assert s2mts2.choose_device(name) == torch.device("cpu")
    with s2mts2.mixed_precision(torch.device("cpu"), True):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_both_stages_run_on_a_gpu(gpu):
    npz()
    run("pretrain --data set.npz --arch tiny --epochs 2 --batch 8 --size 16")
    run("finetune --labels 8 --epochs 1 --min-steps 2")
    result, scores = read_json("runs/set/metrics.json"), table("runs/set/predictions.csv")[2]

    # The checkpoint opens on a CPU, and there the predictions are about the same.
    run("evaluate --device cpu --out cpu")

    assert s2mts2.choose_device("auto").type == "cuda" and np.isfinite(scores).all()
    assert np.allclose(table("cpu/predictions.csv")[2], scores, atol=0.01)
    assert read_json("cpu/metrics.json")["mean_auc"] == pytest.approx(result["mean_auc"], abs=0.1)
    with s2mts2.mixed_precision(torch.device("cuda"), True):
        product = torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
    assert product.dtype == torch.bfloat16 or not torch.cuda.is_bf16_supported()


# ---- processes

# Importing torch takes seconds. This program does it once, and then a fork is a new process: it
# loads s2mts2 again, with its environment, and runs a command. Like torchrun it ends the other
# processes of a job if one fails.
SERVER = """
import importlib, json, os, signal, sys, traceback
import s2mts2

def child(job, rank):
    os.chdir(job["folder"])
    os.environ.update(job["environments"][rank])
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    # A process that hangs ends after two minutes.
    signal.alarm(120)
    importlib.reload(s2mts2)
    exec(job["code"], dict(s2mts2=s2mts2, rank=rank))
    return s2mts2.main(job["words"])

for line in sys.stdin:
    job, running, statuses = json.loads(line), {}, {}
    for rank in range(len(job["environments"])):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                status = child(job, rank)
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        running[pid] = rank
    while running:
        pid, status = os.wait()
        statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
    print(json.dumps([statuses[rank] for rank in sorted(statuses)]), flush=True)
"""


@pytest.fixture(scope="session")
def server():
    command = [sys.executable, "-c", SERVER]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as program:
        yield program
        program.stdin.close()


def free_port():
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        return stream.getsockname()[1]


def torchrun_environment(rank, count, port):
    """What torchrun tells a process."""
    values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_PORT=port)
    values |= dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="none")
    return {name: str(value) for name, value in values.items()}


@pytest.fixture
def processes(server):
    """A function that runs a command in new processes.

    count 0 is one process without torchrun. Code is run in each before the command; it knows s2mts2
    and rank. Returns statuses, and what the processes wrote to stdout and stderr.
    """

    def start(command, count=0, code=""):
        port = free_port()
        environments = [torchrun_environment(rank, count, port) for rank in range(count)]
        job = dict(words=command.split(), code=code, folder=os.getcwd())
        job["environments"] = environments or [{}]
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        return statuses, *(
            [Path(f"{name}{rank}.txt").read_text() for rank in range(len(statuses))]
            for name in ("out", "err")
        )

    return start


SMALL_NETWORK = f"""
import torch
from torch import nn
{inspect.getsource(Small)}
s2mts2.build_network = lambda arch, channels, outputs, *more, **words: Small(channels, outputs)
"""
# Each process samples views of its own. Without random numbers two processes compute what one does.
PLAIN_VIEWS = """
random_views = s2mts2.random_views
s2mts2.random_views = lambda images, augment, size: random_views(images, s2mts2.PLAIN, size)
"""
# Kill the process at an event: a step, or before or after a file is replaced.
KILL = """
import os, signal
events, ema_update, replace = iter(range({moment} - 1)), s2mts2.ema_update, os.replace

def event():
    if next(events, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)

def update(*arguments):
    event()
    ema_update(*arguments)

def replace_file(*arguments):
    event()
    replace(*arguments)
    event()

s2mts2.ema_update, os.replace = update, replace_file
"""


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("lives", [(1, 2, 5, 4), (6, 9, 12), (10, 11, 14), (32,)])
def test_a_run_killed_at_several_moments_ends_the_same(stage, lives, processes, small_networks):
    npz()
    command = f"{stage} --data set.npz --epochs 4 --batch 16 --size 16 --device cpu"
    command += " --from scratch --labels 10 --min-steps 0" * (stage == "finetune")
    run(f"{command} --out whole")

    for moment in lives:
        statuses, *_ = processes(command, code=SMALL_NETWORK + KILL.format(moment=moment))
        assert statuses == [-9]
    run(command)

    same(saved(f"runs/set/{stage}.pt")["state"], saved(f"whole/{stage}.pt")["state"])
    assert [line["epoch"] for line in lines("runs/set/log.jsonl")] == [0, 1, 2, 3]
    names = dict(
        pretrain=["views.png"], finetune=["metrics.json", "predictions.csv", "labelled.txt"]
    )
    for name in names[stage]:
        assert Path("whole", name).read_bytes() == Path("runs/set", name).read_bytes()


def every_third_unknown(count):
    """Multi-label targets of 0 and 1; about half are -1, and every fifth row is all -1."""
    random = np.random.default_rng(1)
    targets = random.integers(0, 2, (count, 3))
    targets[random.random((count, 3)) < np.linspace(0.1, 0.9, count)[:, None]] = -1
    targets[::5] = -1
    return targets


def compared(first, second, stage, atol):
    """Compare the results of two runs."""
    one, two = (lines(f"{out}/log.jsonl") for out in (first, second))
    for line, other in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=atol)
    ours, theirs = (saved(f"{out}/{stage}.pt") for out in (first, second))
    for name in ("student", "teacher"):
        same(ours["state"][name], theirs["state"][name], atol)
    return ours["state"], theirs["state"]


@pytest.mark.parametrize("multilabel", [True, False])
def test_two_processes_compute_what_one_does(multilabel, processes):
    changes = dict(train_labels=every_third_unknown(60)) if multilabel else {}
    npz(multilabel=multilabel, **changes)
    code = SMALL_NETWORK + PLAIN_VIEWS
    pretrain = "pretrain --data set.npz --epochs 2 --batch 8 --size 16 --queue 40"
    finetune = "finetune --data set.npz --epochs 3 --batch 8 --labels 15 --min-steps 3 --eps 0.1"

    for count, out in ((0, "one"), (2, "two")):
        statuses, *_ = processes(f"{pretrain} --out {out}", count, code)
        assert not any(statuses)
        statuses, shown, _ = processes(
            f"{finetune} --from one/pretrain.pt --out {out}", count, code
        )
        assert not any(statuses)
        assert [text.count("finetune epoch 3/3") for text in shown] == [1, 0][: max(1, count)]

    ours, theirs = compared("one", "two", "pretrain", 1e-5)
    same(ours["queue"], theirs["queue"], 1e-5)
    compared("one", "two", "finetune", 1e-5)
    assert np.allclose(table("one/predictions.csv")[2], table("two/predictions.csv")[2], atol=1e-5)
    # The networks have learnt something, so equal results say something.
    start, end = saved("one/pretrain.pt"), saved("one/finetune.pt")
    difference = (
        start["state"]["student"]["hidden.weight"] - end["state"]["student"]["hidden.weight"]
    )
    assert difference.abs().max() > 0.01


def test_one_process_of_torchrun_gives_the_results_of_none(processes):
    npz()
    for stage in ("pretrain", "finetune --labels 10 --min-steps 3"):
        command = f"{stage} --data set.npz --epochs 2 --batch 8 --size 16"
        for count, out in ((0, "none"), (1, "one")):
            start = f"--from {out}/pretrain.pt" if "finetune" in stage else ""
            statuses, *_ = processes(f"{command} {start} --out {out}", count, SMALL_NETWORK)
            assert statuses == [0]

        compared("none", "one", stage.split()[0], 1e-6)

    # Runs with and without torchrun continue each other.
    statuses, out, _ = processes(f"{command} {start} --out none", 1, SMALL_NETWORK)
    assert statuses == [0] and "finished" in out[0]


def test_the_number_of_processes_is_compared_on_resume(processes, small_networks, capsys):
    npz()
    command = "pretrain --data set.npz --epochs 1 --batch 8 --size 16"
    assert processes(command, 2, SMALL_NETWORK)[0] == [0, 0]

    assert "processes 2 there and 1 here" in error_of(command, capsys)


# Of these, the first process says the error, and the others are ended.
@pytest.mark.parametrize(
    "command, words",
    [
        ("finetune --from scratch --data pets --labels one.txt", "fewer than 2 processes"),
        ("finetune --from scratch --data pets --labels 1.5", "--labels 1.5"),
        ("pretrain --data pets --batch 9", "--batch must be a multiple of 2 processes"),
        ("pretrain --data broken --batch 8", "broken/a/002.png"),
        ("evaluate scratch --data pets", "without torchrun"),
        ("pretrain --data pets --batch 8 --epochs 1 --lr 0", "not finite"),
    ],
)
def test_an_error_in_two_processes_is_one_line(command, words, processes):
    for name in ("pets", "broken"):
        own_images(Path(name))
    Path("broken/a/002.png").write_bytes(b"broken")
    data = s2mts2.load_data("pets")
    Path("one.txt").write_text(data.names[data.train[data.known[data.train]][0]])
    # The second process waits for longer than this test takes, before it says its error. Its loss
    # is not finite.
    code = """
import math
if rank == 1:
    sleep = s2mts2.time.sleep
    s2mts2.time.sleep = lambda seconds: sleep(100 if seconds >= 5 else seconds)
    loss = s2mts2.joint_contrastive_loss
    s2mts2.joint_contrastive_loss = lambda *arguments: loss(*arguments) + math.inf
"""

    statuses, _, err = processes(command, 2, SMALL_NETWORK + code)

    assert statuses[0] == 2 and statuses[1] != 0
    assert "Traceback" not in "".join(err)
    (error,) = re.findall("^error: .*", "\n".join(err), re.M)
    assert words in error and error in err[0]
    assert not list(Path().rglob("*.pt"))


def test_stage_2_in_two_processes_with_a_densenet_writes_one_set_of_files(processes):
    npz()
    command = "finetune --from scratch --data set.npz --epochs 1 --batch 8 --labels 10"

    statuses, out, err = processes(f"{command} --arch tiny --size 16 --min-steps 1", 2)

    assert statuses == [0, 0]
    assert out[0].count("finetune epoch 1/1") == 1 and "finetune: 100%" in err[0]
    assert out[1] == "" and "finetune:" not in err[1] and "test:" not in err[1]
    names = ["finetune.pt", "labelled.txt", "log.jsonl", "metrics.json", "predictions.csv"]
    assert sorted(os.listdir("runs/set")) == names and len(lines("runs/set/log.jsonl")) == 1
    # The checkpoint is that of one process without torchrun: evaluate repeats its results.
    before = read_json("runs/set/metrics.json")
    run("evaluate --out again")
    assert read_json("again/metrics.json")["mean_auc"] == pytest.approx(
        before["mean_auc"], abs=0.001
    )


def test_a_killed_process_of_torchrun_ends_all_and_the_command_resumes(processes):
    npz()
    command = "pretrain --data set.npz --epochs 3 --batch 16 --size 16 --device cpu"
    kill = textwrap.indent(KILL.format(moment=6), "    ")
    Path("killed.py").write_text(
        f"import sys, s2mts2\n{SMALL_NETWORK}\nif s2mts2.RANK == 1:\n{kill}\n"
        "sys.exit(s2mts2.main())\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "killed.py"]

    done = subprocess.run(
        [sys.executable, *words, *command.split()], capture_output=True, text=True, env=ENVIRONMENT
    )

    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert done.stdout.count("pretrain epoch 1/3") == 1
    assert len(lines("runs/set/log.jsonl")) == 1
    for out in ("", " --out whole"):
        statuses, shown, _ = processes(command + out, 2, SMALL_NETWORK)
        assert statuses == [0, 0] and ("pretrain epoch 1/3" in shown[0]) == bool(out)
    same(saved("runs/set/pretrain.pt")["state"], saved("whole/pretrain.pt")["state"])


# ---- the files themselves


def test_importing_does_nothing():
    code = """
import torch, numpy

def state():
    return (
        torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.get_rng_state().sum(), numpy.random.get_state()[1].sum(),
    )

before = state()
import s2mts2
assert state() == before
"""
    words = [sys.executable, "-c", code]

    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and os.listdir() == []


def test_the_program_ends_with_the_status_of_its_command(processes):
    code = """
import runpy, sys
sys.argv = ["s2mts2.py", "train"]
runpy.run_path(s2mts2.__file__, run_name="__main__")
"""

    statuses, (out,), (err,) = processes("", code=code)

    assert statuses == [2] and out == ""
    assert err.strip().startswith("error: ") and len(err.strip().splitlines()) == 1


def test_no_line_has_over_100_columns():
    for path in (SCRIPT, Path(__file__)):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100


README = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")


def code_blocks():
    """The code blocks of README.md: fenced, or indented by four spaces."""
    fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", README, re.M | re.S)
    rest = re.sub(r"^ *```[^\n]*\n.*?^ *```", "", README, flags=re.M | re.S)
    indented = re.findall(r"(?:^    .*\n?(?:[ \t]*\n(?=    ))*)+", rest, re.M)
    return [textwrap.dedent(block) for block in [*fenced, *indented]]


# Not run: what needs several GPUs, other data, a download, or a name; ablations; --help.
SKIPPED = (
    "torchrun|ablate|--root|cxr14|chexpert|isic2018|imagenet|densenet121|--help|"
    r"\b(?!(?:DIR|IMAGES)\b)[A-Z]{2,}\b"
)


def commands_of_readme(own):
    """Commands of README.md, of blocks with own images or of the others."""
    blocks = [
        [
            command.strip()
            for line in block.splitlines()
            for command in re.findall(r"python s2mts2\.py ([^#&|\n]+)", line)
            if not re.search(SKIPPED, command) and "torchrun" not in line
        ]
        for block in code_blocks()
    ]
    chosen = [block for block in blocks if own == bool(re.search("DIR|IMAGES", str(block)))]
    return [command for block in chosen for command in block]


@pytest.mark.parametrize("own", [False, True])
def test_the_commands_of_the_readme_run(own, monkeypatch, small_networks):
    def reduced(*arguments):
        data = load(*arguments)
        return replace(data, train=data.train[:200], test=data.test[:60])

    load = s2mts2.load_data
    monkeypatch.setattr(s2mts2, "load_data", reduced)
    for name in ("DIR", "IMAGES"):
        own_images(Path(name))
    Path("IMAGES/labels.csv").unlink()
    common = "--batch 8 --epochs 1"
    run(f"pretrain --data {'DIR' if own else 'digits'} {common}", f"finetune {common}")

    commands = commands_of_readme(own)

    assert len(commands) > 2
    for command in commands:
        training = command.split()[0] in ("pretrain", "finetune")
        run(f"{command} {common} --fresh" if training else command)


def test_the_example_for_notebooks_runs(small_networks):
    (block,) = [block for block in code_blocks() if "import numpy as np, s2mts2" in block]

    exec(block[block.index("import numpy") :], {})

    assert list(Path("runs").glob("*/metrics.json"))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_weights_of_stage_1_fit_torchvisions_densenet(channels):
    teacher = s2mts2.build_network("densenet121", channels, 8, "mlp").eval()
    Path("runs/cxr14").mkdir(parents=True)
    state = dict(teacher=teacher.state_dict())
    torch.save(dict(channels=channels, state=state), "runs/cxr14/pretrain.pt")
    (block,) = [block for block in code_blocks() if "torchvision.models.densenet121()" in block]
    names = dict(torch=torch, torchvision=torchvision)

    exec(block, names)

    images = torch.randn(2, channels, 64, 64)
    expected, ours = teacher.features(images), names["network"].eval().features
    assert torch.allclose(ours(images.expand(-1, 3, -1, -1)), expected, atol=1e-4)
