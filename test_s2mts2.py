"""Tests of s2mts2.py: python -m pytest -q. They need no network and make their own data."""

import ast
import copy
import csv
import doctest
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn import linear_model, metrics, pipeline, preprocessing
from torch import distributed, nn

import s2mts2
from s2mts2 import (
    Data,
    PLAIN,
    UserError,
    choose_labelled,
    classification_metrics,
    decode,
    evaluate,
    load_data,
    main,
    parse_args,
)

# The last bits depend on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder, without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)


RANDOM_VIEWS = s2mts2.random_views


# ---- 1. Oracle: both stages in float64, from the formulas of the method --------------------------

# No loss, EMA or schedule of s2mts2 is called here; only the order of the images comes from
# s2mts2.batches. The network is small. The views are made: a view depends on the pixels, on the
# number of the call and on the row of the batch, so a mix-up of any of them changes all weights.


def small_network(arch, channels, outputs, *more, norm=nn.BatchNorm2d, **words):
    """A convolution, BatchNorm, tanh and a linear layer, for views of any size."""
    layers = nn.Conv2d(channels, 3, 8, 8), norm(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    network = nn.Sequential(*layers)
    network.classifier = nn.Linear(12, outputs)
    return network


def made_views(images, call, jitter):
    """Views of uint8 images: powers that depend on the call and the row. Plain without jitter."""
    power = 1 + jitter * torch.sin(2.0 * call + 0.7 * torch.arange(len(images)))
    return F.interpolate(images / 255, 32) ** power.view(-1, 1, 1, 1)


@pytest.fixture
def built(monkeypatch):
    """Replaces networks and views. Returns a list: what was asked for and each network's start."""
    networks, calls = [], Counter()

    def build(arch, channels, outputs, head="linear", imagenet=False):
        network, asked = (
            small_network("tiny", channels, outputs),
            (arch, channels, outputs, head, imagenet),
        )
        networks.append(SimpleNamespace(asked=asked, first=copy.deepcopy(network.state_dict())))
        return network

    def views(images, augment, size):
        # The calls of each function count on their own: first view of pretrain, second, ...
        caller = inspect.currentframe().f_back.f_code.co_name
        calls[caller] += 1
        assert size == 32
        return made_views(images, calls[caller], augment["jitter"])

    monkeypatch.setattr(s2mts2, "build_network", build)
    monkeypatch.setattr(s2mts2, "random_views", views)
    return networks


def made_data(multilabel=False, channels=1):
    """11 training images, one unlabelled, one known in part; 6 test images; two files of labels."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (17, channels, 8, 8)).astype(np.uint8)
    order = random.permutation(17)
    targets = np.eye(3)[np.argsort(order) % 3]
    if multilabel:
        targets = np.where(random.rand(17, 3) < 0.25, np.nan, random.rand(17, 3) < 0.5)
        targets[order[[1, 12, 13]]] = [[1, 0, 1], [0, 1, 0], [1, 0, np.nan]]
    targets[order[4]], targets[order[7], 1] = np.nan, np.nan
    names, train = [f"image{index}" for index in range(17)], order[:11]
    for file, rows in (("few.txt", [1, 3, 6]), ("one.txt", [1])):
        Path(file).write_text("".join(f"{names[index]}\n" for index in train[rows]))
    return Data("made", images, targets, list("abc"), names, train, order[11:], multilabel)


def arguments(command, settings):
    """args of a command with all these settings given."""
    words = [command, "--data", "digits", "--size", "32", "--jitter", "0.6", "--jitter-p", "1"]
    special = dict(start="--from", lambda_="--covariance-weight")
    for name, value in settings.items():
        words += [special.get(name, "--" + name.replace("_", "-")), str(value)]
    return parse_args(words)


def same(one, two):
    """Whether two state dicts are equal."""
    return one.keys() == two.keys() and all(torch.equal(one[name], x) for name, x in two.items())


class Oracle:
    """Student and teacher in float64, with made views, an optimizer and the EMA."""

    def __init__(self, student, teacher, data, optimizer, **options):
        channels, outputs = data.images.shape[1], len(student["classifier.bias"])
        self.student, self.teacher = (
            small_network("tiny", channels, outputs).double() for _ in range(2)
        )
        self.student.load_state_dict(student)
        self.teacher.load_state_dict(teacher)
        self.optimizer = optimizer(self.student.parameters(), lr=1, **options)
        self.data, self.calls, self.history = data, itertools.count(1), []

    def views(self, indices):
        return made_views(torch.tensor(self.data.images[indices]), next(self.calls), 0.6).double()

    def ask_teacher(self, views):
        """Output with the statistics of the batch; the copy's running statistics are lost."""
        return copy.deepcopy(self.teacher)(views).detach()

    def step(self, loss, lr, a):
        """A step of the student, then of the EMA: all floats; the integer counter is copied."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        latest = self.student.state_dict()
        for name, value in self.teacher.state_dict().items():
            decay = 0 if name.endswith("num_batches_tracked") else a
            value.copy_(decay * value + (1 - decay) * latest[name])

    def check(self, path):
        """Compare weights, buffers, losses and learning rates with a checkpoint. Returns it."""
        saved = torch.load(path, weights_only=True)
        for network in ("student", "teacher"):
            ours, theirs = getattr(self, network).state_dict(), saved["state"][network]
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                other = theirs[name].double()
                assert torch.allclose(other, value.double(), 1e-4, 1e-5), (network, name)
        history = [(line["epoch"], line["loss"], line["lr"]) for line in saved["history"]]
        assert np.allclose(history, self.history, 1e-4, 1e-5)
        assert {line["stage"] for line in saved["history"]} == {Path(path).stem}
        return saved


def rate(s, epoch):
    """Learning rate: half a cosine, or a tenth from 1/2 and a hundredth from 5/6 of the epochs."""
    if s.schedule == "cosine":
        return s.lr * (0.5 + 0.5 * math.cos(math.pi * epoch / s.epochs))
    return s.lr * (1 if 2 * epoch < s.epochs else 0.1 if 6 * epoch < 5 * s.epochs else 0.01)


def sigma_loss(query, keys, queue, t, c):
    """The joint contrastive loss with mu and Sigma of each image, word for word."""
    losses = []
    for q, k in zip(query, keys, strict=True):
        mu = k.mean(0)
        sigma = (k - mu).T @ (k - mu) / len(k)
        positive = torch.exp(q @ mu / t + c / (2 * t**2) * (q @ sigma @ q))
        losses.append(torch.log(positive + torch.exp(queue @ q / t).sum()) - q @ mu / t)
    return torch.stack(losses).mean()


STAGE_1 = dict(
    arch="tiny", epochs=3, batch=4, lr=0.1, schedule="cosine", momentum=0.8, weight_decay=0.05,
    teacher_momentum=0.7, keys=3, queue=7, dim=5, temperature=0.3, lambda_=1.5, seed=4, out="out",
)  # fmt: skip


@pytest.mark.parametrize("channels, changes", [
    (1, dict()),
    (3, dict(keys=1, queue=100, schedule="steps", epochs=6, batch=5)),
    (3, dict(batch=11, queue=3, weight_decay=0, seed=0)),
    (1, dict(arch="densenet121", init="imagenet", lambda_=0, queue=11, temperature=0.5)),
], ids=str)  # fmt: skip
def test_stage_1_equals_the_oracle(built, monkeypatch, capsys, channels, changes):
    data, s = made_data(channels=channels), SimpleNamespace(**STAGE_1 | changes)
    queues, enqueue = [], s2mts2.enqueue
    monkeypatch.setattr(s2mts2, "enqueue", lambda *x: queues.append(x[0].clone()) or enqueue(*x))
    networks = s2mts2.pretrain(data, arguments("pretrain", vars(s)))
    assert [each.asked for each in built] == [(s.arch, channels, 5, "mlp", "init" in changes)]
    queue = queues[0].double()
    assert queue.shape == (min(s.queue, 11), 5) and len(queue.unique()) == queue.numel()
    assert torch.allclose(queue.norm(dim=1), torch.ones(1).double())
    assert f"{math.log(len(queue) + 1):.2f}" in capsys.readouterr().out

    options = dict(momentum=s.momentum, weight_decay=s.weight_decay)
    oracle = Oracle(built[0].first, built[0].first, data, torch.optim.SGD, **options)
    for epoch in range(s.epochs):
        losses, lr, c = [], rate(s, epoch), s.lambda_ * (epoch + 1) / s.epochs
        for indices in s2mts2.batches(data.train, 11 // s.batch, s.batch, s.seed, epoch):
            query = oracle.student(oracle.views(indices))
            query = query / query.norm(dim=1, keepdim=True)
            keys = oracle.ask_teacher(oracle.views([i for i in indices for _ in range(s.keys)]))
            keys = (keys / keys.norm(dim=1, keepdim=True)).view(s.batch, s.keys, s.dim)
            losses.append(sigma_loss(query, keys, queue, s.temperature, c))
            oracle.step(losses[-1], lr, s.teacher_momentum)
            queue = torch.stack([*(each.mean(0) for each in keys), *queue][: len(queue)])
        oracle.history.append((epoch, torch.stack(losses).mean().item(), lr))
    state, png = oracle.check("out/pretrain.pt")["state"], Path("out/views.png")
    assert torch.allclose(state["queue"].double(), queue, atol=1e-4) and png.exists()
    for network, name in zip(networks, ("student", "teacher"), strict=True):
        assert network.training and same(state[name], network.state_dict())


STAGE_2 = dict(
    arch="tiny", epochs=3, batch=4, min_steps=0, lr=0.2, schedule="cosine", beta1=0.8, beta2=0.95,
    eps=0.1, weight_decay=0.0, teacher_momentum=0.75, consistency=5.0, ramp=1.0, labels="few.txt",
    seed=2, out="out", start="scratch",
)  # fmt: skip


def softmax_or_sigmoid(logits, multilabel):
    scores = logits.exp()
    return scores / (1 + scores) if multilabel else scores / scores.sum(1, keepdim=True)


def cross_entropy(logits, targets, multilabel):
    """Mean over the known targets (multi-label) or the images (multi-class)."""
    p = softmax_or_sigmoid(logits, multilabel)
    if multilabel:
        return -torch.where(targets == 1, p, 1 - p)[~targets.isnan()].log().mean()
    return -p[targets == 1].log().mean()


@pytest.mark.parametrize("multilabel, changes", [
    (False, dict(start="first/pretrain.pt")),
    (True, dict(start="first/pretrain.pt", labels=6, weight_decay=0.1, ramp=0.5, batch=3)),
    (False, dict(schedule="steps", epochs=6, ramp=0.4, teacher_momentum=0.9)),
    (True, dict(labels="all", min_steps=4, seed=5)),
    (False, dict(labels="one.txt", epochs=2)),
    (False, dict(labels=8, batch=3, min_steps=2)),
    (False, dict(consistency=0.0, weight_decay=0.02, batch=2)),
    (True, dict(arch="densenet121", start="imagenet", eps=0.5, schedule="steps")),
], ids=str)  # fmt: skip
def test_stage_2_equals_the_oracle(built, multilabel, changes):
    data, s = made_data(multilabel, 1 + 2 * multilabel), SimpleNamespace(**STAGE_2 | changes)
    if s.start == "first/pretrain.pt":
        s2mts2.pretrain(data, arguments("pretrain", STAGE_1 | dict(out="first", epochs=2)))
    result = s2mts2.finetune(data, arguments("finetune", vars(s)))

    # The start: a new classifier, the same in both; all else from stage 1, if there was one.
    channels, first = data.images.shape[1], built[-1].first
    assert built[-1].asked == (s.arch, channels, 3, "linear", s.start == "imagenet")
    starts = [first, first]
    if s.start not in ("scratch", "imagenet"):
        stage_1 = torch.load(s.start, weights_only=True)["state"]
        new = {name: value for name, value in first.items() if "classifier" in name}
        starts = [stage_1[network] | new for network in ("student", "teacher")]
    pool = data.train[np.isnan(data.targets[data.train]).sum(1) < (3 if multilabel else 1)]
    names = Path("out/labelled.txt").read_text().split()
    labelled = np.array([int(name.removeprefix("image")) for name in names])
    assert (np.diff(labelled) > 0).all() and {*labelled} <= {*pool}
    assert len(labelled) == {"few.txt": 3, "one.txt": 1, "all": len(pool)}.get(s.labels, s.labels)
    assert s.labels != "few.txt" or {*names} == {*Path("few.txt").read_text().split()}
    unlabelled = np.array(sorted({*data.train} - {*labelled}))
    # A single unlabelled image has no BatchNorm statistics.
    both = s.consistency > 0 and len(unlabelled) > 1
    size_l, size_n = min(s.batch, len(labelled)), min(s.batch, len(unlabelled)) * both
    steps = max(s.min_steps, math.ceil(max(len(labelled), len(unlabelled)) / s.batch))
    options = dict(betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay)
    oracle, updates = Oracle(*starts, data, torch.optim.AdamW, **options), 0
    for epoch in range(s.epochs):
        losses, lr, w = [], rate(s, epoch), s.consistency * min(1, epoch / s.epochs / s.ramp)
        order_l = s2mts2.batches(labelled, steps, size_l, s.seed, epoch)
        order_n = s2mts2.batches(unlabelled, steps, size_n, s.seed, epoch)
        for indices_l, indices_n in zip(order_l, order_n, strict=True):
            targets, views = torch.from_numpy(data.targets[indices_l]), oracle.views(indices_l)
            if both:
                teacher_logits = oracle.ask_teacher(oracle.views(indices_n))
                views = torch.cat([views, oracle.views(indices_n)])
            logits = oracle.student(views)
            losses.append(cross_entropy(logits[:size_l], targets, multilabel))
            if both:
                p_student = softmax_or_sigmoid(logits[size_l:], multilabel)
                p_teacher = softmax_or_sigmoid(teacher_logits, multilabel)
                losses[-1] = losses[-1] + w * (p_student - p_teacher).square().mean()
            updates += 1
            oracle.step(losses[-1], lr, min(1 - 1 / (updates + 1), s.teacher_momentum))
        oracle.history.append((epoch, torch.stack(losses).mean().item(), lr))
    oracle.check("out/finetune.pt")

    # The teacher is the result; the student is tested beside it.
    views = made_views(torch.from_numpy(data.images[data.test]), 0, 0).double()
    networks = oracle.teacher.eval(), oracle.student.eval()
    with torch.no_grad():
        teacher, student = (softmax_or_sigmoid(net(views), multilabel).numpy() for net in networks)
    header, *rows = (line.split(",") for line in Path("out/predictions.csv").read_text().split())
    assert header == ["image", "a", "b", "c"]
    assert [row[0] for row in rows] == [f"image{index}" for index in data.test]
    assert np.allclose(np.array([row[1:] for row in rows], float), teacher, atol=2e-5)
    truth = data.targets[data.test]
    for ours, scores in ((result.pop("student"), student), (result, teacher)):
        assert ours == s2mts2.classification_metrics(truth, scores, "abc", multilabel)


@pytest.mark.parametrize("stage, settings", [("pretrain", STAGE_1), ("finetune", STAGE_2)])
def test_the_seed_decides_weights_and_views(built, monkeypatch, stage, settings):
    """All images are equal; even so no view comes twice, also in another epoch."""
    data, runs = made_data(), []
    data.images[:] = data.images[0]

    def record(images, augment, size):
        views = RANDOM_VIEWS(images, augment, size)
        if augment != PLAIN:
            runs[-1].append(views.sum().item())
        return views

    monkeypatch.setattr(s2mts2, "random_views", record)
    for seed, out in ((0, "one"), (0, "two"), (1, "three")):
        runs.append([])
        getattr(s2mts2, stage)(data, arguments(stage, settings | dict(seed=seed, out=out)))
    assert [same(built[0].first, each.first) for each in built] == [True, True, False]
    assert runs[0] == runs[1] and len({*runs[0], *runs[2]}) == 2 * len(runs[0])


def test_batches_hold_all_images_in_an_order_of_seed_and_epoch():
    indices, keys = np.arange(100, 110), ((0, 0), (0, 0), (0, 1), (1, 0), (1, 1))
    orders = [s2mts2.batches(indices, 3, 3, *key) for key in keys]
    assert all(order.shape == (3, 3) and len({*order.flat} & {*indices}) == 9 for order in orders)
    assert (orders[0] == orders[1]).all() and len({tuple(order.flat) for order in orders}) == 4
    # Each pass over few images has all of them, each pass in another order.
    passes = s2mts2.batches(indices, 10, 4, 0, 0).reshape(4, 10)
    assert (np.sort(passes) == indices).all() and len({*map(tuple, passes)}) == 4
    assert s2mts2.batches(indices[:0], 10, 0, 0, 0).shape == (10, 0)


def test_too_few_images_for_a_step_are_an_error(built):
    with pytest.raises(UserError, match="11 training images"):
        s2mts2.pretrain(made_data(), arguments("pretrain", STAGE_1 | dict(batch=12)))
    one = STAGE_2 | dict(labels="one.txt", consistency=0.0)
    with pytest.raises(UserError, match="two images"):
        s2mts2.finetune(made_data(), arguments("finetune", one))


# ---- 2. Network, losses, schedules, evaluation, recipes ------------------------------------------


@pytest.mark.parametrize("arch, width, weights", [("tiny", 112, 14e4), ("densenet121", 1024, 7e6)])
def test_a_grey_network_is_the_colour_network_of_grey_images(monkeypatch, arch, width, weights):
    asked, models = [], s2mts2.torchvision.models
    network = models.densenet121
    monkeypatch.setattr(models, "densenet121", lambda weights: asked.append(weights) or network())
    one, relu, two = s2mts2.build_network(arch, 1, 7, head="mlp", imagenet=True).classifier
    assert one.weight.shape == (width, width) and two.weight.shape == (7, width)
    assert isinstance(relu, nn.ReLU)
    torch.manual_seed(1)
    colour = s2mts2.build_network(arch, 3, 5).eval()
    torch.manual_seed(1)
    grey, images = s2mts2.build_network(arch, 1, 5).eval(), torch.randn(2, 1, 32, 32)
    assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-4)
    assert grey.features.conv0.in_channels == 1 and grey.classifier.weight.shape == (5, width)
    assert sum(each.numel() for each in colour.parameters()) == pytest.approx(weights, rel=0.04)
    assert asked == (["IMAGENET1K_V1", None, None] if arch == "densenet121" else [])


def test_the_teacher_has_no_gradient_and_its_passes_do_not_move_its_statistics():
    student, views = small_network("tiny", 1, 4), torch.rand(5, 1, 32, 32)
    teacher = s2mts2.make_teacher(student)
    assert {each.requires_grad for each in student.parameters()} == {True}
    assert {each.requires_grad for each in teacher.parameters()} == {False}
    # In training both normalise with the batch. Only the student's statistics move.
    assert teacher.training and torch.equal(teacher(views), student(views))
    assert teacher[1].running_mean.eq(0).all()
    assert not torch.allclose(teacher.eval()(views), student(views), atol=1e-3)


def test_the_ema_averages_all_floats_and_copies_the_counter():
    student = small_network("tiny", 1, 2)
    teacher = s2mts2.make_teacher(student)
    for each in student.state_dict().values():
        each.copy_(10 * torch.rand(each.shape) + 1)
    old, new = (copy.deepcopy(each.state_dict()) for each in (teacher, student))
    s2mts2.ema_update(teacher, student, 0.7)
    assert same(new, student.state_dict())
    for name, value in teacher.state_dict().items():
        a = 0 if name.endswith("num_batches_tracked") else 0.7
        assert torch.allclose(value, (a * old[name] + (1 - a) * new[name]).to(value.dtype))


@pytest.mark.parametrize("t, c", [(0.3, 0.0), (0.3, 0.7), (0.1, 2.0), (1.5, 1.0)])
def test_the_joint_contrastive_loss_equals_the_formula_with_sigma(t, c):
    function, double = s2mts2.joint_contrastive_loss, dict(dtype=torch.float64)
    query = F.normalize(torch.randn(6, 10, **double), dim=1).requires_grad_()
    keys = F.normalize(query.detach()[:, None] + torch.randn(6, 4, 10, **double) / 2, dim=2)
    queue = F.normalize(torch.randn(30, 10, **double), dim=1)
    ours, expected = (loss(query, keys, queue, t, c) for loss in (function, sigma_loss))
    assert torch.allclose(ours, expected, 1e-10)
    gradients = [torch.autograd.grad(loss, query)[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, 1e-8)
    # The order of keys and of negatives does not matter. A low temperature does not overflow.
    assert torch.allclose(ours, function(query, keys.flip(1), queue.flip(0), t, c), 1e-10)
    assert function(query, keys, queue, 1e-4, c).isfinite()
    # With equal keys, or a single one, it is InfoNCE, a cross-entropy.
    logits = torch.cat([(query * keys[:, 0]).sum(1, keepdim=True), query @ queue.T], 1) / t
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    for count in (1, 5):
        equal = keys[:, :1].expand(-1, count, -1)
        assert torch.allclose(function(query, equal, queue, t, c), expected, 1e-10)


def test_the_queue_holds_the_newest_means_first():
    queue, means = torch.arange(5)[:, None], torch.arange(10, 18)[:, None]
    for count, expected in ((3, [10, 11, 12, 0, 1]), (8, [10, 11, 12, 13, 14])):
        s2mts2.enqueue(queue, means[:count])
        assert queue.flatten().tolist() == expected


def test_schedules_of_learning_rate_and_ema():
    for schedule, expected in (("steps", [2, 2, 2, 0.2, 0.2, 0.02]), ("cosine", [2, 1.5, 0.5])):
        args = SimpleNamespace(lr=2.0, schedule=schedule, epochs=len(expected))
        rates = [s2mts2.learning_rate(args, epoch) for epoch in range(args.epochs)]
        assert rates == pytest.approx(expected)
    assert [s2mts2.warmed_up(0.7, n) for n in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 0.7])


@pytest.mark.parametrize("multilabel", [True, False])
def test_an_unknown_target_has_no_loss_and_no_gradient(multilabel):
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.eye(3).double()[torch.arange(8) % 3]
    targets[[1, 4, 4, 4], [1, 0, 1, 2]] = torch.nan
    # A row of multi-class data that is known in part counts as unknown.
    unknown = targets.isnan() if multilabel else targets.isnan().any(1, True).expand(8, 3)
    loss, rows = s2mts2.supervised_loss(logits, targets, multilabel), ~unknown.all(1)
    assert torch.allclose(loss, cross_entropy(logits[rows], targets[rows], multilabel), 1e-10)
    loss.backward()
    assert torch.equal(logits.grad == 0, unknown)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_gives_each_image_once_in_order_and_keeps_the_network(training):
    data, network = made_data(), small_network("tiny", 1, 3).train(training)
    indices, before = np.random.permutation(85) % 17, copy.deepcopy(network.state_dict())
    scores = s2mts2.evaluate(network, data, indices, 32)
    assert network.training == training and same(before, network.state_dict())
    views = s2mts2.random_views(torch.from_numpy(data.images[indices]), PLAIN, 32)
    assert np.allclose(scores, network.eval()(views).softmax(1).detach(), atol=1e-6)


def test_metrics_of_multi_label_data_use_the_known_targets():
    random = np.random.RandomState(0)
    targets, scores = (random.rand(60, 4) < 0.4).astype(np.float32), random.rand(60, 4)
    targets[random.rand(60, 4) < 0.3] = np.nan
    # Class c has no positive, class d no negative.
    targets[targets[:, 2] == 1, 2], targets[targets[:, 3] == 0, 3] = np.nan, np.nan
    known = ~np.isnan(targets)
    a, b = (metrics.roc_auc_score(targets[known[:, k], k], scores[known[:, k], k]) for k in (0, 1))
    result = s2mts2.classification_metrics(targets, scores, "abcd", True)
    assert result == dict(auc=dict(a=a, b=b, c=None, d=None), mean_auc=pytest.approx((a + b) / 2))
    # Without a score there is no AUC either.
    result = s2mts2.classification_metrics(targets[:, :1], scores[:, :1] * np.nan, "a", True)
    assert result == dict(mean_auc=None, auc=dict(a=None))


@pytest.mark.parametrize("truth", [[0, 1, 2, 2, 1, 0] * 10, [0, 1, 0, 0]])
def test_metrics_of_multi_class_data_agree_with_scikit_learn(truth):
    """One or two classes do not occur in the targets."""
    random, truth, present = np.random.RandomState(0), np.array(truth), np.unique(truth)
    scores = random.rand(len(truth), 4) + 0.4 * np.eye(4)[truth]
    most, macro = scores.argmax(1), dict(labels=present, average="macro")
    aucs = {"abc"[k]: metrics.roc_auc_score(truth == k, scores[:, k]) for k in present}
    result = s2mts2.classification_metrics(np.eye(4)[truth], scores, "abcd", False)
    assert result.pop("auc") == dict.fromkeys("abcd") | aucs
    assert result == pytest.approx(dict(
        mean_auc=np.mean([*aucs.values()]),
        accuracy=metrics.accuracy_score(truth, most),
        macro_f1=metrics.f1_score(truth, most, **macro),
        macro_sensitivity=metrics.recall_score(truth, most, **macro),
        macro_specificity=np.mean([np.mean(most[truth != k] != k) for k in present]),
    ))  # fmt: skip


# Values of the authors' code, from design.md: of all three data sets, then of each.
PUBLISHED = dict(
    pretrain=dict(epochs=100, batch=256, lr=0.03, momentum=0.9, weight_decay=1e-4, queue=65536,
                  temperature=0.07, lambda_=2, teacher_momentum=0.999, schedule="cosine"),
    finetune=dict(lr=0.05, beta2=0.99, eps=0.1, consistency=1, ramp=1, teacher_momentum=0.999),
)  # fmt: skip


@pytest.mark.parametrize("stage, data, values", [
    ("pretrain", "cxr14", dict(size=256, keys=2, crop=0.8, erase_p=0.5)),
    ("pretrain", "chexpert", dict(size=224, keys=5, crop=0.8, erase_p=0)),
    ("pretrain", "isic2018", dict(size=224, keys=5, crop=0, centre=0.25, erase_p=0)),
    ("finetune", "cxr14", dict(size=512, epochs=30, batch=16, schedule="steps", labels=0.02)),
    ("finetune", "chexpert", dict(size=224, epochs=30, batch=64, schedule="cosine", labels=0.02)),
    ("finetune", "isic2018", dict(size=224, epochs=80, batch=16, schedule="cosine", labels=0.2)),
])  # fmt: skip
def test_the_recipes_have_the_published_values(stage, data, values):
    start = ["--from", "imagenet"] if stage == "finetune" else []
    args, values = parse_args([stage, "--data", data, *start]), PUBLISHED[stage] | values
    assert {name: (vars(args) | args.augment)[name] for name in values} == values


# ---- 3. Views ------------------------------------------------------------------------------------

MEANS = {1: ([0.449], [0.226]), 3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}
ONE = torch.ones(3)


def photo(count=3, channels=3, side=48):
    """Smooth random images in [0, 1]."""
    images = torch.rand(count, channels, 6, 6)
    return F.interpolate(images, (side, side), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_view_is_the_resized_and_normalised_image(channels):
    images = (photo(5, channels) * 255).to(torch.uint8)
    before, floats = images.clone(), images / 255
    # At 600 pixels a batch is cut into blocks.
    for size in (48, 20, 600):
        resized = TF.resize(images / 255, [size, size], antialias=True)
        views = s2mts2.random_views(images, PLAIN, size)
        assert views.dtype == torch.float32 and torch.equal(images, before)
        assert torch.allclose(views, TF.normalize(resized, *MEANS[channels]), atol=1e-5)
    # Images of floats give the same views, and are not changed.
    assert torch.equal(s2mts2.random_views(floats, PLAIN, 600), views)
    s2mts2.random_views(floats, PLAIN | dict(blur=1.0, blur_p=1.0, erase_p=1.0), 48)
    assert torch.equal(floats, images / 255)


def test_each_view_has_its_own_random_numbers():
    strong = dict.fromkeys(PLAIN, 0.5) | dict(centre=0.1, crop=0.8, rotate=10.0, blur=2.0)
    for channels, size in ((1, 32), (3, 32), (1, 600)):
        views = s2mts2.random_views(photo(1, channels).expand(5, -1, -1, -1), strong, size)
        assert views.isfinite().all() and torch.pdist(views.flatten(1)).min() > 0.1


@pytest.mark.parametrize("probability, changes", [
    (0.5, dict(flip_p=0.5)), (0.3, dict(vertical_flip_p=0.3)), (0.5, dict(erase_p=0.5)),
    (0.3, dict(rotate=10.0, rotate_p=0.3)), (0.4, dict(blur=2.0, blur_p=0.4)),
    (0.8, dict(jitter=0.4, jitter_p=0.8)), (0.6, dict(jitter=0.4, hue=0.4, jitter_p=0.6)),
    (0.5, dict(hue=0.4, jitter_p=0.5)), (1.0, dict(crop=0.8)), (1.0, dict(centre=0.2)),
    (0.0, dict(rotate=10.0, jitter=0.4, hue=0.4, blur=2.0)),
    (0.0, dict(rotate_p=1.0, jitter_p=1.0, blur_p=1.0)),
], ids=str)  # fmt: skip
def test_each_change_alone_has_its_probability(probability, changes):
    copies = photo(1, 3, 24).expand(600, -1, -1, -1)
    views = s2mts2.random_views(copies, PLAIN | changes, 24)
    difference = (views - TF.normalize(copies, *MEANS[3])).abs().flatten(1).amax(1)
    assert (difference > 1e-3).float().mean() == pytest.approx(probability, abs=0.07)


def test_blurred_images_are_chosen_at_random_also_of_a_single_one():
    image = torch.rand(1, 1, 32, 32)
    for count, calls in ((1, 300), (8, 100)):
        copies, blur = image.expand(count, -1, -1, -1), PLAIN | dict(blur=2.0, blur_p=0.5)
        views = torch.stack([s2mts2.random_views(copies, blur, 32) for _ in range(calls)])
        chosen = (views - TF.normalize(image, *MEANS[1])).abs().amax((2, 3, 4)) > 1e-3
        assert (chosen.float().mean(0) - 0.5).abs().max() < 0.2


def sampled(name, **changes):
    """What random_views gives to one of its functions, for 4,000 images."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s2mts2, name, lambda *numbers: given.append(numbers) or numbers[0])
        s2mts2.random_views(torch.zeros(4000, 3, 16, 16), PLAIN | changes, 16)
    return given[0][1:]


def assert_uniform(values, low, high):
    """Values are spread evenly from low to high."""
    width = high - low
    assert low - 1e-5 <= values.min() <= low + 0.01 * width
    assert high - 0.01 * width <= values.max() <= high + 1e-5
    assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * width + 1e-6)
    assert values.std() == pytest.approx(width / 12**0.5, abs=0.015 * width + 1e-6)


def assert_rectangles(left, top, width, height, smallest, largest, ratio):
    """Areas, logarithms of the ratio and places are uniform; a longer side than 1 is cut to 1."""
    area, limit = width * height, min(largest, 1 / ratio)
    uncut = area < 0.9999 * limit
    assert_uniform(area[uncut], smallest, limit)
    assert_uniform((width / height)[uncut].log(), -math.log(ratio), math.log(ratio))
    assert 0.97 * largest < area.max() < largest + 1e-5
    for start, length in ((left, width), (top, height)):
        assert_uniform((start / (1 - length))[length < 0.9], 0, 1)


def test_random_numbers_of_each_change_fill_their_range():
    *numbers, hue = sampled("jitter_colours", jitter=0.4, hue=0.1, jitter_p=1.0)
    for factor in numbers:
        assert_uniform(factor, 0.6, 1.4)
    assert_uniform(hue, -0.1, 0.1)
    assert (torch.corrcoef(torch.stack([*numbers, hue])) - torch.eye(4)).abs().max() < 0.1
    for largest, least in ((2.0, 0.1), (0.05, 0.05)):
        sigma, limit = sampled("gaussian_blur", blur=largest, blur_p=1.0)
        assert limit == largest and len(sigma) == 4000
        assert_uniform(sigma, least, largest)
    *_, angle, flip, vertical = sampled("crop_rotate_flip", rotate=10.0, rotate_p=1.0, flip_p=1.0)
    assert_uniform(angle, -10, 10)
    assert flip.eq(1).all() and vertical.eq(0).all()
    left, top, width, height, *_ = sampled("crop_rotate_flip", crop=0.8, centre=0.25)
    # The rectangle of a crop lies in the middle of the width.
    assert_rectangles((left - 0.125) / 0.75, top, width / 0.75, height, 0.2, 1, 4 / 3)
    numbers = torch.stack(sampled("crop_rotate_flip", centre=0.25))
    assert torch.allclose(numbers, torch.tensor([[0.125], [0], [0.75], [1], [0], [0], [0]]))
    assert_rectangles(*sampled("erase", erase_p=1.0), 0.02, 0.33, 3.3)


def test_crop_rotation_and_flips_agree_with_torchvision():
    images, none = photo(side=64), torch.zeros(3)
    # Left, top, width, height, angle, flip and vertical flip of three images.
    numbers = torch.tensor([
        [0.125, 0.5, 0], [0.375, 0.0625, 0], [0.5, 0.5, 1], [0.5, 0.75, 1],
        [20, -7, 90], [1, 0, 1], [0, 1, 1],
    ])  # fmt: skip
    crops = s2mts2.crop_rotate_flip(images, *numbers[:4], none, none, none)
    views = s2mts2.crop_rotate_flip(images, *numbers)
    flips = TF.hflip, TF.vflip, lambda image: TF.vflip(TF.hflip(image))
    for k, image in enumerate(images):
        left, top, width, height = (64 * numbers[:4, k]).int().tolist()
        expected = TF.resized_crop(image, top, left, height, width, [64, 64], antialias=False)
        # torchvision does not see the pixels beyond the border of the crop.
        assert (crops[k] - expected)[:, 4:-4, 4:-4].abs().max() < 1e-5
        turned = TF.rotate(expected, float(numbers[4, k]), TF.InterpolationMode.BILINEAR)
        assert (views[k] - flips[k](turned))[:, 16:48, 16:48].abs().max() < 0.02
    # Outside of the image a view is black.
    turned = s2mts2.crop_rotate_flip(images, none, none, ONE, ONE, 45 * ONE, none, none)
    assert turned[:, :, 0, 0].eq(0).all() and turned[:, :, 32, 32].ne(0).all()


def test_brightness_contrast_and_saturation_agree_with_torchvision():
    """In the order saturation, brightness, contrast; for three images at once."""
    images, hue = 0.3 + 0.2 * photo(), torch.tensor([0.1, -0.25, 0.4])
    factors = torch.tensor([[0.6, 1.3, 1.8], [1.3, 0.6, 1.2], [1.4, 0.7, 1.3]])
    for part in (images, images[:, :1]):
        ours = s2mts2.jitter_colours(part, *factors, 0 * ONE)
        for image, view, (bright, contrast, colour) in zip(part, ours, factors.T, strict=True):
            image = TF.adjust_brightness(TF.adjust_saturation(image, colour), bright)
            assert (view - TF.adjust_contrast(image, contrast)).abs().max() < 0.005
    views = s2mts2.jitter_colours(photo(), *factors, 0 * ONE)
    assert views.min() == 0 and views.max() == 1
    # Hue is a rotation and saturation a factor of the colours in YIQ; the grey level stays.
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.275, -0.321], [0.212, -0.523, 0.311]])
    views = s2mts2.jitter_colours(images, ONE, ONE, factors[2], hue)
    before, after = (torch.einsum("ij,njhw->inhw", yiq, each) for each in (images, views))
    assert torch.allclose(after[0], before[0], atol=1e-5)
    before, after = (torch.complex(*each[1:].movedim(1, -1)) for each in (before, after))
    assert torch.allclose(after, before * torch.polar(factors[2], 2 * math.pi * hue), atol=1e-5)


def test_blur_agrees_with_torchvision():
    images, sigma = torch.rand(3, 3, 48, 40), torch.tensor([0.1, 1.0, 2.0])
    for part in (images, images[:, :1]):
        # The kernel reaches three of the largest standard deviations: 6 pixels on each side.
        pairs = zip(part, sigma.tolist(), strict=True)
        expected = torch.stack([TF.gaussian_blur(image, [13, 13], width) for image, width in pairs])
        assert torch.allclose(s2mts2.gaussian_blur(part, sigma, 2.0), expected, atol=1e-5)
    row = s2mts2.gaussian_blur(F.pad(torch.ones(1, 1, 1, 1), [15] * 4), ONE[:1], 1.5)[0, 0, 15]
    assert row.nonzero().flatten().tolist() == list(range(10, 21))


def test_an_erased_rectangle_has_its_size_and_place_within_a_pixel():
    left, top, width, height = torch.rand(4, 2000) * 0.4 + torch.tensor([[0], [0], [0.1], [0.1]])
    images = torch.full((2000, 3, 32, 32), 0.9)
    erased = s2mts2.erase(images, left, top, width, height) == 0
    rows, columns = erased.any(3), erased.any(2)
    assert torch.equal(erased, rows[..., None] & columns[:, :, None])
    for pixels, start, length in ((rows[:, 0], top, height), (columns[:, 2], left, width)):
        side, size = pixels.shape[1], pixels.sum(1)
        assert (size - side * length).abs().max() < 1.001
        assert (size - side * length).mean().abs() < 0.05
        assert (pixels.int().argmax(1) - side * start).abs().max() < 0.501


def refuses(words, function, *arguments, **options):
    """Check that a call raises a UserError, one line with these words."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert not [word for word in words.split() if word not in text] and "\n" not in text, text


# ---- Files -> images, labels, split, or error ----------------------------------------------------


def level(name):
    """The grey level of an image says which one it is: ten times the last number in its name."""
    return 10 * int(re.findall(r"\d+", name)[-1])


def make(root, files):
    """Make files of text, where "; " ends a line; of bytes; of arrays; links; "" is an image."""
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "":
            # A grey X-ray can be in a file with three channels.
            mode = "RGB" if name.startswith("images") else "L"
            Image.new("L", (8, 8), level(name)).convert(mode).save(path)
        elif isinstance(content, dict):
            np.savez(path, **content)
        elif isinstance(content, Path):
            path.symlink_to(content)
        else:
            lines = content if isinstance(content, bytes) else content.replace("; ", "\n").encode()
            path.write_bytes(lines)


def own(table, images=None, **more):
    """A folder with labels.csv, unless None, and with the images of the table, unless given."""
    rows = table.split("; ")[1:] if images is None else images.split()
    files = {} if table is None else {"labels.csv": table}
    return "own", dict.fromkeys([row.split(",")[0] for row in rows], "") | files | more


def cxr14(images, rows, train, test="", older=""):
    """Chest X-ray14. The last two names of its header have a comma in them, without quotes."""
    header = "Image Index,Finding Labels,Age,OriginalImage[Width,Height],Pixels[x,y]; "
    files = {"train_val_list.txt": train.replace(" ", "\n"), "test_list.txt": f"{test}\n"}
    for name, lines in {"_v2020": rows, "": older}.items():
        files[f"Data_Entry_2017{name}.csv"] = header + re.sub("(?=; )|$", ",58,1,1,1,1", lines)
    return "cxr14", dict.fromkeys(images.split(), "") | files


def chexpert(table, images, folder="CheXpert-v1.0-small/train", place="CheXpert-v1.0-small"):
    """CheXpert. {5} is the path of image 5, of patient 5."""
    view = "patient{0:05d}/study1/view{0}_frontal.jpg".format
    table = re.sub(r"{(\d+)}", lambda k: "CheXpert-v1.0-small/train/" + view(int(k[1])), table)
    files = {f"{folder}/{view(int(each))}": "" for each in images.split()}
    return "chexpert", files | {f"{place}/train.csv": table}


def isic2018(lesions, folder="."):
    """ISIC2018. Images 1, 2 and 16 are of the classes 0, 6 and 1. The lesions are in a folder."""
    prefix, header = "ISIC2018_Task3_Training_", "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
    rows = "I1,1,0,0,0,0,0,0; I2,0,0,0,0,0,0,1; I16,0.0,1.0,0.0,0.0,0.0,0.0,0.0"
    files = {f"{prefix}Input/I{k}.jpg": "" for k in (1, 2, 16)}
    files[f"{prefix}GroundTruth/{prefix}GroundTruth.csv"] = f"{header}; {rows}"
    return "isic2018", files | {f"{folder}/{prefix}LesionGroupings.csv": lesions}


def npz(*labels, shape=(8, 8), **changes):
    """An .npz file with labels of train, val and test. The levels of the images fit their names."""
    arrays, count = {}, 0
    for part, of_part in zip(("train", "val", "test"), labels, strict=True):
        levels = 10 * np.arange(count, count := count + len(of_part), dtype=np.uint8)
        arrays[f"{part}_images"] = np.tile(levels.reshape(-1, *[1] * len(shape)), (1, *shape))
        arrays[f"{part}_labels"] = np.array(of_part)
    return "own/set.npz", {"set.npz": arrays | changes}


def png(image, changes=()):
    """The bytes of a PNG file, with bytes of its header changed: [(place, value), ...]."""
    image.save(stream := io.BytesIO(), "PNG")
    content = bytearray(stream.getvalue())
    for place, value in changes:
        content[place] = value
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


# What becomes of them: one of, or any of the classes: training images, each with its targets / test
# images / images of neither + what is printed. The hash of 8.png, 12.png, train/cat/7.png, group c,
# I16, L7 and the patients 5 and 9 says test. Patient 2 is left out.
FINDINGS = (
    "any of Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
    "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia: "
)
LESIONS = "one of MEL NV BCC AKIEC BKL DF VASC: "
BLACK = Image.new("RGB", (16, 99))
# fmt: off
CASES = [
    # A table with a column for each class, or with the column label.
    (own("image,a,b,split; 1.png,1.0,0.0,train; 2.png,0,1,test; 3.png,,,test; 4.png,,,; 8.png,0,1,",
         "0.png 1.png 2.png 3.png 4.png 8.png sub/5.png"),
     "one of a b: 0=?? 1=10 4=?? 8=01 5=?? / 2=01 / 3=??"),
    (own("image,a,b,c; 1.png,,1,; 2.png,0,0,1"), "one of a b c: 1=010 2=001"),
    (own("image,a,b,c; 1.png,1,1,; 2.png,1,0,0; 3.png,0,,0"), "any of a b c: 1=11? 2=100 3=0?0"),
    (own("image,label; 1.png,b | a; 2.png,; 3.png,No Finding; 4.png,c"),
     "any of a b c: 1=110 2=??? 3=000 4=001"),
    (own("image,label; 1.png,a; 2.png,b; 3.png,No Finding"), "any of a b: 1=10 2=01 3=00"),
    # Split and groups. An unlabelled image of a test group is on neither side.
    (own("image,label,group; 1.png,a,c; 12.png,,; 2.png,b,c; 3.png,,c; 4.png,,a; 8.png,b,a"),
     "one of a b: 12=?? 4=?? 8=01 / 1=10 2=01 / 3=??"),
    (own("image,label,split; 1.png,a,; 2.png,,test; 3.png,,train; 8.png,b,"),
     "one of a b: 1=10 3=?? / 8=01 / 2=??"),
    (own("image,label,group,split; 1.png,a,g,test; 2.png,b,h,; 3.png,b,g,; x1.png,,g,train"),
     "one of a b: 2=01 / 1=10 3=01 / 1=??"),
    (own("image,label,group,split; 1.png,a,g,; 2.png,b,h,test; 3.png,,g,test; 4.png,b,,train"),
     "one of a b: 1=10 4=01 / 2=01 / 3=??"),
    (own("image,label,group,split; 1.png,a,mine,train; 2.png,b,mine,test"), "error: mine"),
    (own("image,label,split; 1.png,a,train; 2.png,b,val"), "error: own 'val' train test"),
    # Cells, rows and columns.
    (own("\ufeffimage, label\r\n 1.png , cat\r\n,\r\n\r\n2.png,dog\r\n,,\r\n", "1.png 2.png"),
     "one of cat dog: 1=10 2=01"),
    (own("image,a,b; 1.png,1,; 2.png,,1"), "error: own 0 blank"),
    (own("image,a,b; 1.png,1,0; 2.png,-1,0"), "error: own 2.png a '-1' 1, 0 or blank"),
    (own("image,a,b; 1.png,1,nan; 2.png,1,0"), "error: own 1.png b 'nan'"),
    (own("image;a;b; 1.png;1;0", "1.png"), "error: labels.csv image commas"),
    (own("image,a\n1.png,1\n".encode("utf-16"), "1.png"), "error: labels.csv UTF-8"),
    (own("image,a,a; 1.png,1,0"), "error: labels.csv two columns 'a'"),
    (own("image,label; 1.png,cat,x; 2.png,dog"), "error: labels.csv 1.png longer"),
    (own("image,label,group; 1.png,cat,; 2.png,dog"), "error: labels.csv 2.png shorter"),
    (own("image,label; 1.png,cat; 2.png,NaN; 3.png,dog"), "error: labels.csv 'NaN' blank"),
    (own("image,label,a; 1.png,x,1; 2.png,y,0"), "one of x y: 1=10 2=01 + warning, beside"),
    (own(None, "train/a/1.png train/b/2.png test/a/3.png test/4.png"),
     "one of a b: 1=10 2=01 / 3=10 / 4=??"),
    (npz([[0, 1]], [[1]], [[0, 1]]), "error: set.npz val_labels (1, 1)"),
    # Names.
    (own("image,label; 1.png,cat; 2.png,dog; 1.png,dog"), "error: 1.png twice"),
    (own("image,a; img1.jpg,1", "IMG1.JPG"), "error: labels.csv 'img1.jpg' upper"),
    (own("image,a; e\u03011.png,1", "\xe91.png"), r"error: labels.csv 'e\u03011.png' Unicode"),
    (own("image,a; 1.png,1; 7.png,1; 5.png,0", "1.png"), "error: labels.csv '5.png' 2"),
    (own("image,a; 1.png,1", ""), "error: labels.csv '1.png'"),
    (own(None, ""), "error: own images .png"),
    # Folders without a table.
    (own(None, "6.png more/x/5.png test/a/3.png train/4.png train/a/1.png train/group/x/2.png"),
     "one of a group: 6=?? 5=?? 4=?? 1=10 2=01 / 3=10"),
    (own(None, "train/cat/7.png train/dog/2.png"), "one of cat dog: 2=01 / 7=10"),
    (own("image,label; train/cat/1.png,a; test/dog/3.png,b",
         "train/cat/1.png test/dog/3.png test/dog/4.png"), "one of a b: 3=01 4=?? 1=10"),
    (own(None, "train/cat/1.png train/dog/2.png train/cat/.3.png train/cat/@eaDir/4.png @7.png "
         "__MACOSX/train/cat/5.png .git/train/x/6.png test/dog/__8.png"),
     "one of cat dog: 1=10 2=01"),
    (own(None, "1.png 2.JPG 3.jpeg 4.jfif 5.jpe 6.tif 7.TIFF 8.bmp 9.webp a10.gif", **{
        "notes.txt": b"", "more": Path("../other"), "../other/2.png": "",
        "out/views.png": png(BLACK), "out/log.jsonl": "{}"}),
     "any of : 1= 2= 3= 4= 5= 6= 7= 8= 9= 10= + warning: 3, notes.txt"),
    # The same image in train and test.
    (own(None, "3.png test/a/1.png test/b/3.png test/b/4.png train/a/5.png train/path/1.png"),
     "one of a b path: 3=??? 5=100 1=001 / 1=100 3=010 4=010 + warning: 2 test, a/1.png, h/1.png"),
    (own("image,a,split; 1.png,1,; 2.png,0,test; x2.png,0,"),
     "any of a: 1=1 2=0 / 2=0 + warning: 1 test, 2.png, x2.png"),
    # Images that cannot be used: cut, empty, of 16 bits, of 1,600 megapixels. A file called runs.
    (own(None, "1.png", **{"2.png": png(BLACK)[:50]}), "error: own/2.png"),
    (own(None, "1.png", **{"2.jpg": b""}), "error: own/2.jpg"),
    (own(None, "1.png", **{"2.png": png(Image.new("I;16", (8, 8)))}), "error: own/2.png 8 bits"),
    (own(None, "1.png", **{"2.png": png(BLACK, [(19, 8), (24, 16)])}), "error: own/2.png 8 bits"),
    (own(None, "1.png", **{"2.png": png(BLACK, [(17, 255)])}), "error: own/2.png pixels"),
    (own(None, "1.png", **{"../runs": "text"}), "error: runs/decoded"),
    # Chest X-ray14. The newer of two tables is used.
    (cxr14("images/1.png images_002/images/2.jpg data/3.JPEG images_012/images/4.png",
           "1.png,Hernia|Mass; 2.png,No Finding; 3.png,Mass; 4.png,Pleural Thickening; 5.png,Mass",
           "3.png 1.png 4.png", "2.png", "1.png,Edema"),
     FINDINGS + "3=00001000000000 1=00001000000001 4=00000000000010 / 2=00000000000000"),
    (cxr14("images/1.png", "1.png,Nodul", "1.png"), "error: 1.png 'Nodul' 'Nodule'"),
    (cxr14("images/1.png", "2.png,Mass", "1.png"), "error: _v2020.csv 1.png train_val"),
    (cxr14("images/2.png", "1.png,Mass; 2.png,Mass", "1.png 2.png"), "error: 1 1.png --partial"),
    (cxr14("images/2.png", "1.png,Mass; 2.png,Edema", "1.png 2.png"), FINDINGS + "2=00000000010000",
     dict(partial=True)),
    # CheXpert. Columns are found by their names.
    (chexpert("Path,Sex,Age,Frontal/Lateral,AP/PA,Edema,Mass; {1},Male,68,Frontal,AP,1.0,-1.0; "
              "{2},Male,9,Frontal,PA,R,; {3},Male,9,Lateral,,,0.0; {5},Male,9,Frontal,AP,-1.0,1",
              "1 3 5"),
     "any of Edema Mass: 1=10 3=00 / 5=01"),
    (chexpert("Mass,Path,Edema; -1,{1},1; 0,{3},-1; -1,{5},-1", "1 3 5"),
     "any of Mass Edema: 1=11 3=01 / 5=11", dict(uncertain="ones")),
    (chexpert("Mass,Path,Edema; -1,{1},1; ,{3},-1.0; -1,{5},1", "1 3 5"),
     "any of Mass Edema: 1=?1 3=0? / 5=01", dict(uncertain="ignore")),
    (chexpert("Path,Edema,Reader; {1},1,0; {3},0,R7", "1 3"), "error: patient00003 Reader 'R7'"),
    (chexpert("Path,Edema; {1},1; {9},0", "1 9", "train", "."), "any of Edema: 1=1 / 9=0"),
    (chexpert("Path,Edema; {1},1; {5},0", "1 5", "CheXpert-v1.0 batch 3 (train 2)",
              "CheXpert-v1.0 batch 1 (validate & csv)"), "any of Edema: 1=1 / 5=0"),
    # ISIC2018. Images of one lesion are on one side.
    (isic2018("image,lesion_id; I16,L1; I2,L7; I1,L7"),
     LESIONS + "16=0100000 / 1=1000000 2=0000001"),
    (isic2018("image,lesion_id; I2,L7", "ISIC2018_Task3_Training_GroundTruth"),
     LESIONS + "1=1000000 / 2=0000001 16=0100000 + warning: 2 images, LesionGroupings.csv"),
    (isic2018("image,lesion_id; I2,L7", "../elsewhere"),
     LESIONS + "1=1000000 2=0000001 / 16=0100000 + warning: 3 images, LesionGroupings.csv"),
    # .npz files: train, val and test.
    (npz([[2], [0]], [[1]], [[0]]), "one of 0 1 2: 0=001 1=100 2=010 / 3=100"),
    (npz([1, 0], np.zeros(0, int), [1], shape=(8, 9, 3)), "one of 0 1: 0=01 1=10 / 2=01"),
    (npz([[0], [-1]], [[1]], [[-1], [1]]), "one of 0 1: 0=10 1=?? 2=01 / 4=01 / 3=??"),
    (npz([[0, 1], [-1, -1]], [[1, -1]], [[0, 0], [-1, -1]]),
     "any of 0 1: 0=01 1=?? 2=1? / 3=00 / 4=??"),
    (npz([[0], [3]], [[1]], [[0]]), "error: set.npz 3 gaps"),
    (npz([[0, 2]], [[1, 0]], [[0, 0]]), "error: set.npz 2 0 to 1"),
    (npz([0, 1], [0], [1], val_images=np.ones((1, 8, 8))), "error: set.npz val_images float64"),
    (npz([0, 1], [0], [1], shape=(8, 8, 8)), "error: set.npz train_images (2, 8, 8, 8) side"),
    (npz([0, 1], [0], [1], test_images=np.zeros((1, 8, 9), np.uint8)), "error: set.npz (1, 8, 9)"),
    (npz([0, 1], [0], [1], test_labels=[0, 1]), "error: set.npz test_labels (2,) (1, 8, 8)"),
    (npz([0, 1], [0], [1.0]), "error: set.npz test_labels float64 integers"),
    (npz([0, 1], [0], [1], test_labels=np.array([1], object)), "error: set.npz allow_pickle=False"),
    (npz([[-1], [-1]], [[-1]], [[-1]]), "error: two classes"),
    (("own/set.npz", {"set.npz": dict(train_images=np.ones(1))}), "error: set.npz train_labels"),
]
# fmt: on


def summary(data):
    """Classes, and targets of the images of train, test and neither, whose names fit the pixels."""
    levels = np.array([level(name) for name in data.names])
    assert np.abs(data.images - levels.reshape(-1, 1, 1, 1) * 1.0).max() <= 2
    sides = [data.train, data.test, np.setdiff1d(np.arange(len(levels)), [*data.train, *data.test])]
    cells = np.array(["0", "1", "?"])[np.nan_to_num(data.targets, nan=2).astype(int)]
    texts = [" ".join(f"{levels[k] // 10}={''.join(cells[k])}" for k in side) for side in sides]
    kind = "any of" if data.multilabel else "one of"
    return f"{kind} {' '.join(data.classes)}: {' / '.join(text for text in texts if text)}"


@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_files_give_images_labels_and_split_or_an_error(case, capsys):
    (name, files), expected, *options = case
    folder, options = "own" if "own" in name else f"data/{name}", dict(*options, size=16)
    make(folder, files)
    before = sorted(Path(folder).rglob("*"))
    if expected.startswith("error: "):
        refuses(expected.removeprefix("error: "), load_data, name, **options)
        assert not [*Path("runs/decoded").rglob("*")]
    else:
        wanted, _, words = expected.partition(" + ")
        data = load_data(name, **options)
        assert summary(data) == wanted
        assert folder == "own" or data.images.shape[1] == (3 if name == "isic2018" else 1)
        if "set.npz" in files:
            assert data.images.shape[2:] == files["set.npz"]["train_images"].shape[1:3]
        shown = "".join(capsys.readouterr())
        assert not [text for text in words.split(", ") if text not in shown]
        # Without labelled images on both sides there is one warning more.
        needed = not (data.known[data.train].any() and len(data.test))
        assert ("stage 2 needs" in shown) == needed
        assert shown.count("warning") == words.count("warning") + needed
    # The folder of the data may be read-only.
    assert sorted(Path(folder).rglob("*")) == before


def test_digits_are_stratified_and_a_folder_of_this_name_is_named(capsys):
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.max() == 255
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert np.abs(data.targets[data.test].mean(0) - data.targets.mean(0)).max() < 0.002
    assert not capsys.readouterr().err
    make("digits", {"1.png": ""})
    load_data("digits")
    assert "./digits" in capsys.readouterr().err
    assert load_data("./digits", size=16).names == ["1.png"]


def by_hand(kinds, multilabel=False):
    """Data: an image a letter, its class. Upper case: test; ".": no finding; "-": unlabelled."""
    classes = sorted({*kinds.lower()} - {".", "-"})
    targets = [[np.nan if x == "-" else x.lower() == each for each in classes] for x in kinds]
    images = np.random.default_rng(0).integers(0, 256, (len(kinds), 1, 8, 8), np.uint8)
    train, test = ([k for k, x in enumerate(kinds) if x.isupper() == side] for side in (0, 1))
    names = [f"name{k}" for k in range(len(kinds))]
    return Data("hand", images, targets, classes, names, train, test, multilabel)


NOT_DATA = {
    "same name": dict(names=["name0", "name1", "name1"]),
    "index train test": dict(train=[0, 1, 2]),
    "no training image": dict(train=[]),
    "target NaN": dict(targets=[[1, 0], [0, 0.5], [1, 0]], multilabel=True),
    "one-hot": dict(targets=[[1, 0], [1, 1], [1, 0]]),
    "test label": dict(targets=[[1, 0], [0, 1], [0, np.nan]]),
    "targets": dict(targets=[[1, 0], [0, 1]]),
    "wrong": dict(test=[-1]),
    "uint8": dict(images=np.zeros((3, 1, 8, 8))),
    "1 or 3": dict(images=np.zeros((3, 2, 8, 8), np.uint8)),
    "equal": dict(classes=["a", "a"]),
    "two classes": dict(classes=["a"], targets=[[1], [1], [1]]),
}


@pytest.mark.parametrize("words", NOT_DATA)
def test_data_that_do_not_fit_are_refused(words):
    refuses(words, replace, by_hand("abA"), **NOT_DATA[words])


# fmt: off
CHOICES = [
    # A fraction of each class: rounded, at least one. No finding counts as a class.
    (True, "a" * 30 + "b" * 10 + "c" + "." * 18 + "ABC--", 0.25, "....." + "a" * 8 + "bbbc"),
    (False, "a" * 30 + "b" * 10 + "AB" + "-" * 90, 0.01, "ab"),
    # A number: as many of each class as can be; multi-label: one of each, and the rest at random.
    (False, "aa" + "b" * 20 + "c" * 20 + "ABC----", 12, "aabbbbbccccc"),
    (True, "a" * 90 + "b" + "." * 90 + "AB----", 3, ".ab"),
    (False, "aabbcA--", "all", "aabbc"),
]
# fmt: on


@pytest.mark.parametrize("multilabel, kinds, labels, expected", CHOICES)
def test_labelled_images_of_each_class(multilabel, kinds, labels, expected):
    for seed in range(5):
        chosen = choose_labelled(by_hand(kinds, multilabel), labels, seed)
        assert "".join(sorted(kinds[index] for index in chosen)) == expected
        assert (np.diff(chosen) > 0).all()


def test_labelled_images_depend_on_the_seed():
    digits = load_data("digits")
    for labels in (0.01, 23):
        first, again, other = (choose_labelled(digits, labels, seed) for seed in (0, 0, 1))
        assert first.tolist() == again.tolist() != other.tolist()
    assert sorted(digits.targets[first].sum(0)) == [2] * 7 + [3] * 3
    # Those of the results in README.md.
    ten = [176, 181, 361, 620, 673, 1216, 1374, 1495, 1579, 1675]
    assert choose_labelled(digits, 10, 0).tolist() == ten
    several = by_hand("a" * 91 + "b" * 10 + "A", multilabel=True)
    counts = [several.targets[choose_labelled(several, 22, seed)].sum(0)[1] for seed in range(9)]
    assert 1 < np.mean(counts) < 5
    several.targets[:91] = 1
    assert (np.diff(choose_labelled(several, 0.5, 0)) > 0).all()


def test_labelled_images_from_a_file(capsys):
    data, file = by_hand("aabbcA-"), Path("labels.txt")
    file.write_text("name3\nname1\n\nname3\n")
    assert choose_labelled(data, "labels.txt", 0).tolist() == [1, 3] and data.targets.itemsize == 4
    assert capsys.readouterr().err == "warning: no labelled training image of c\n"
    for name in ("name5", "name6", "name7"):
        file.write_text(f"name1\n{name}\n")
        refuses(f"labels.txt '{name}'", choose_labelled, data, file, 0)


def test_labelled_images_that_are_not_there():
    for labels in (0, 2, 6, 3.5, -1, np.nan):
        refuses("--labels 3 5", choose_labelled, by_hand("aabbcA-"), labels, 0)
    make("own", {"1.png": "", "2.png": ""})
    for data in (by_hand("AB--"), by_hand("ab--"), load_data("own", size=16)):
        refuses(f"{data.name} label training test", choose_labelled, data, "all", 0)
    # Zeros and a blank do not say the class.
    partly_known = replace(by_hand("aabB"), targets=[[0, np.nan], [1, 0], [0, 1], [0, 1]])
    assert choose_labelled(partly_known, "all", 0).tolist() == [1, 2]
    several = replace(partly_known, multilabel=True)
    assert choose_labelled(several, "all", 0).tolist() == [0, 1, 2]


def difference(path, image, channels=3):
    """What decode makes of a file minus the pixels of an upright image."""
    small = image.convert("L" if channels == 1 else "RGB").resize((32, 32), Image.BILINEAR)
    return decode(path, 32, channels)[0] - np.atleast_3d(small).transpose(2, 0, 1) * 1.0


X, Y = np.meshgrid(np.linspace(0, 9, 203), np.linspace(0, 7, 131))
WAVES = Image.fromarray(np.uint8(127 + 120 * np.stack([np.sin(X), np.sin(Y), np.cos(X + Y)], 2)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pixels_are_pillows(mode):
    make("own", {"1.png": "", "2.png": png(WAVES.convert(mode))})
    for channels in (1, 3):
        assert not difference("own/2.png", WAVES.convert(mode), channels).any()
    assert load_data("own", size=16).images.shape[1] == (1 if mode in "1LA" else 3)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_an_image_is_turned_as_exif_says(ending):
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    for orientation, turn in enumerate(turns.split(), 2):
        exif = Image.Exif()
        exif[274] = orientation
        WAVES.save(f"1.{ending}", exif=exif, quality=95)
        with Image.open(f"1.{ending}") as image:
            errors = np.abs(difference(f"1.{ending}", image.transpose(Image.Transpose[turn])))
        # A large JPEG is decoded at a lower resolution: faster, and nearly the same.
        assert 0 < errors.mean() < 1 if ending == "jpg" else not errors.any()
        assert errors.max() <= 4


def test_decoded_images_are_opened_again(monkeypatch):
    arrays = np.random.default_rng(0).integers(0, 256, (150, 16, 16, 3), np.uint8)
    make("own", {f"{k:03d}.png": png(Image.fromarray(array)) for k, array in enumerate(arrays)})
    first = load_data("own", size=16)
    assert (first.images == arrays.transpose(0, 3, 1, 2)).all() and len({*first.hashes}) == 150
    small = load_data("own", size=8)
    assert small.images.shape[-1] == 8 and (small.hashes == first.hashes).all()
    monkeypatch.setattr(Image, "open", None)
    again = load_data("own/", size=16)
    assert again.name == "own" and (again.images == first.images).all()
    assert {path.suffix for path in Path("runs/decoded").iterdir()} == {".npy"}
    (large,) = Path("runs/decoded").glob("16px*")
    for size in (os.path.getsize(large) - 8, 900, 0):
        os.truncate(large, size)
        refuses(f"{large} remove", load_data, "own", size=16)


def test_a_changed_image_has_its_new_pixels():
    make("own", {"1.bmp": ""})
    load_data("own", size=16)
    before = os.stat("own/1.bmp")
    Image.new("L", (8, 8), 200).save("own/1.bmp")
    os.utime("own/1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load_data("own", size=16).images.max() == 200
    assert os.path.getsize("own/1.bmp") == before.st_size


HERE = Path(__file__).resolve().parent


@pytest.fixture
def small(monkeypatch):
    """Small networks, and set.npz: 28 training and 12 test images, 16 px, in colour, 3 classes."""
    monkeypatch.setattr(s2mts2, "build_network", small_network)
    made_npz()


def parse(command):
    return parse_args(shlex.split(command))


def made_npz(**changes):
    random, parts = np.random.default_rng(0), {}
    for part, count in (("train", 20), ("val", 8), ("test", 12)):
        parts[f"{part}_images"] = random.integers(0, 256, (count, 16, 16, 3), np.uint8)
        parts[f"{part}_labels"] = np.arange(count) % 3
    np.savez("set.npz", **parts | changes)


def pets(root="pets", count=24, seed=0, mode="RGB"):
    """A folder of images, whose names begin with the seed."""
    Path(root).mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    for index in range(count):
        Image.fromarray(pixels[index]).convert(mode).save(f"{root}/{seed}{index:02d}.png")


def label(root="pets", split="test"):
    """labels.csv: cat and dog in turns, two are blank; the split of each third image."""
    lines = ["image,label,split"]
    for index, path in enumerate(sorted(Path(root).glob("*.png"))):
        name = "" if index in (1, 2) else ("cat", "dog")[index % 2]
        lines.append(f"{path.name},{name},{'train' if index % 3 else split}")
    Path(root, "labels.csv").write_text("\n".join(lines))


@pytest.fixture
def run(capsys):
    """Run a command, check its status, and return stdout (or the one line of an error), stderr."""

    def run_command(command, status=0):
        capsys.readouterr()
        assert main(shlex.split(command)) == status
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if re.match("error: |stopped", line)]
        assert len(lines) == (status > 0)
        return (lines[0] if lines else out), err

    return run_command


def read(path):
    """What is in a file, without times, so that it can be compared."""
    kind, text = Path(path).suffix, Path(path).read_bytes().decode("utf-8", "replace")
    if kind == ".csv":
        rows = csv.reader(text.splitlines()[1:])
        return {name: [*map(float, values)] for name, *values in rows}
    if kind == ".pt":
        saved = torch.load(path, weights_only=True)
        text = json.dumps([saved["state"], saved["history"]], default=torch.Tensor.tolist)
    elif kind == ".jsonl":
        text = f"[{','.join(text.splitlines())}]"
    elif kind != ".json":
        return text
    timed = ("seconds", "images_per_second")
    return json.loads(text, object_pairs_hook=lambda x: {k: v for k, v in x if k not in timed})


def results(folder):
    """What is in each file of a folder."""
    return {name: read(f"{folder}/{name}") for name in sorted(os.listdir(str(folder)))}


def near(one, two, atol=1e-6):
    """Whether all numbers in dicts and lists are nearly equal."""
    numbers = [re.findall(r"-?[0-9]+[.][0-9e-]+", json.dumps(each)) for each in (one, two)]
    return numbers[0] and np.allclose(*np.array(numbers, float), atol=atol)


COMMON = "--data set.npz --epochs 2 --batch 8 --size 16"
PRETRAIN = f"pretrain {COMMON} --queue 20 --dim 6"
SHORT = "finetune --epochs 2 --batch 8 --min-steps 3"
FINETUNE = f"{SHORT} {COMMON} --from scratch --labels 9 --consistency 9 --ramp 1"
STAGES = dict(pretrain=PRETRAIN, finetune=FINETUNE)


# ---- The two commands, and scores ----------------------------------------------------------------


def test_the_two_commands_on_digits(run):
    for stage in STAGES:
        out, err = run(f"{stage} --size 16 --epochs 1 --batch 256")
        assert re.search(f"(?m)^{stage}, epoch 1 of 1, on cpu", out) and "warning" not in err

    found, data = results("runs/digits"), load_data("digits")
    names = "finetune.pt labelled.txt log.jsonl metrics.json predictions.csv pretrain.pt views.png"
    assert " ".join(found) == names
    # 5 steps of 256 images; 6 steps of 10 labelled and 256 unlabelled images.
    lines = map(json.loads, Path("runs/digits/log.jsonl").read_text().splitlines())
    for line, stage, images in zip(lines, STAGES, (5 * 256, 6 * 266), strict=True):
        assert " ".join(line) == "stage epoch loss lr seconds images_per_second"
        assert (line["stage"], line["epoch"]) == (stage, 0) and line["lr"] > 0
        assert line["images_per_second"] * line["seconds"] == pytest.approx(images)
    assert [*found["predictions.csv"]] == [data.names[index] for index in data.test]
    scores, result = np.array([*found["predictions.csv"].values()]), found["metrics.json"]
    targets, student = data.targets[data.test], result.pop("student")
    assert np.allclose(scores.sum(1), 1)
    assert classification_metrics(targets, scores, data.classes, False) == result
    row = f"mean_auc +{result['mean_auc']:.4f} +{student['mean_auc']:.4f}\n"
    assert re.search("AUC on 360 test images +teacher +student\n", out) and re.search(row, out)
    # Both networks, built again from the checkpoint.
    state = torch.load("runs/digits/finetune.pt", weights_only=True)["state"]
    for name, expected in dict(teacher=result, student=student).items():
        network = s2mts2.build_network("tiny", 1, 10)
        network.load_state_dict(state[name])
        again = evaluate(network, data, data.test, 16)
        assert classification_metrics(targets, again, data.classes, False) == expected
    rows = np.flatnonzero(np.isin(data.names, found["labelled.txt"].split()))
    assert np.isin(rows, data.train).all() and (data.targets[rows].sum(0) == 1).all()


def test_scores_near_1_do_not_tie(run, monkeypatch):
    def fixed(*arguments, **words):
        """Its outputs are a tenth of the grey level of a plain view, and 0."""
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network.classifier = nn.Linear(1, 2)
        network.classifier.weight.data = torch.tensor([[25.5 * 0.226], [0]])
        network.classifier.bias.data = torch.tensor([25.5 * 0.449, 0])
        return network

    monkeypatch.setattr(s2mts2, "build_network", fixed)
    images = np.full((16, 16, 4), [175, 179, 172, 174], np.uint8).transpose(2, 0, 1)
    parts = {f"{part}_images": images for part in ("train", "val", "test")}
    made_npz(**parts, **{f"{part}_labels": [0, 0, 1, 1] for part in ("train", "val", "test")})

    run("finetune --data set.npz --from scratch --lr 0 --epochs 1 --size 16 --labels all")

    assert read("runs/set/metrics.json")["auc"] == {"0": 1, "1": 1}
    first, second = np.array([*read("runs/set/predictions.csv").values()]).T
    assert metrics.roc_auc_score([1, 1, 0, 0], first) == 1
    assert metrics.roc_auc_score([0, 0, 1, 1], second) == 1


# ---- Settings ------------------------------------------------------------------------------------

SETTINGS = """
pretrain: arch tiny init random size 32 epochs 45 lr 0.06 recipe digits crop 0.5 keys 2
pretrain --data cxr14 --batch 32 --no-amp: arch densenet121 init imagenet batch 32 amp False
pretrain --data isic2018 --recipe small: arch tiny centre 0.0 batch 128 recipe small
pretrain --data DIR: recipe small size 32 queue 4096 temperature 0.07 partial False
pretrain --data DIR --recipe cxr14 --arch tiny: init random size 256 arch tiny erase_p 0.5
finetune --from scratch --data digits: batch 32 consistency 200.0 labels 10 start scratch
finetune --from scratch --data chexpert: size 224 batch 64 lr 0.05 rotate 10.0 labels 0.02
finetune --from scratch --data x.npz: labels all min_steps 75 ramp 0.33 size 64
evaluate scratch --data digits: labels 10 size 32 arch tiny start scratch
ablate --data cxr14 --labels 0.1 30 all: labels [0.1,30,'all'] seeds 3
"""


@pytest.mark.parametrize("line", SETTINGS.strip().splitlines())
def test_settings_of_a_command(line):
    command, words = line.split(": ")
    args, words = vars(parse(command)), words.split()

    for name, value in zip(words[::2], words[1::2], strict=True):
        found = args["augment"][name] if name in PLAIN else args[name]
        assert str(found).replace(" ", "") == value, name


def test_finetune_takes_over_data_and_settings_of_the_newest_stage_1(run, small, monkeypatch):
    calls, data = [], load_data("set.npz")

    def load(name, root=None, size=64, uncertain="zeros", partial=False):
        calls.append((name, root, size, uncertain, partial))
        return data

    monkeypatch.setattr(s2mts2, "load_data", load)
    given = "--data chexpert --root r --partial --uncertain ones --recipe small --size 24"
    for name, seconds in dict(a=10, b=30, c=20).items():
        run(f"pretrain {given} --epochs 1 --batch 8 --out runs/{name}")
        os.utime(f"runs/{name}/pretrain.pt", (seconds, seconds))

    assert "runs/b/pretrain.pt" in run(SHORT)[0] and "runs/b/pretrain.pt" in run("evaluate")[0]

    assert calls == [("chexpert", os.path.abspath("r"), 24, "ones", True)] * 5
    assert {"metrics.json", "probe.json"} < {*os.listdir("runs/b")}
    args = torch.load("runs/b/finetune.pt", weights_only=True)["args"]
    assert (args["recipe"], args["arch"], args["labels"]) == ("small", "tiny", "all")
    assert "scratch or imagenet" in run("finetune --data chexpert", 2)[0]
    # Given values win. Other data have no size, recipe or folder of stage 1.
    args = parse("finetune --recipe chexpert --size 40 --out o")
    assert (args.data, args.recipe, args.size, args.out) == ("chexpert", "chexpert", 40, "o")
    args = parse("finetune --from runs/a/pretrain.pt --data cxr14")
    assert (args.recipe, args.size, args.out, args.arch) == ("cxr14", 512, None, "tiny")


def test_a_checkpoint_has_its_data_from_any_folder(run, small, monkeypatch):
    for seed, folder in enumerate("ab"):
        pets(f"{folder}/img", seed=seed)
        label(f"{folder}/img")
    monkeypatch.chdir("a")
    run("pretrain --data img --epochs 1 --batch 8")
    monkeypatch.chdir("../b")

    run(f"{SHORT} --from ../a/runs/img/pretrain.pt")

    # The names of a's images begin with 0.
    assert {name[0] for name in read("runs/img/labelled.txt").split()} == {"0"}
    assert sorted(os.listdir("../a/runs/img")) == ["log.jsonl", "pretrain.pt", "views.png"]
    # The size of stage 2 is that of its recipe, since none was given.
    assert torch.load("runs/img/finetune.pt", weights_only=True)["args"]["size"] == 64


# Of these the option before the last word is named.
OUT_OF_RANGE = (
    "batch 1|batch 1.5|epochs 0|lr inf|lr -1|seed -1|keys 0|temperature 0|flip-p 7|"
    "crop 1|jitter 2|teacher-momentum 1.1|arch resnet|recipe large|bach 4|epoch 4|from x.pt|"
    "arch densenet121 --size 16|blur 8 --size 24|data . --root x|data digits --device cuda:9"
)
# What is named: a command.
WRONG = """
COMMAND:
train: train
pretrain: finetune
pretrain: evaluate
--partial: pretrain --partial
densenet121: pretrain --init imagenet
densenet121: finetune --from imagenet --data digits
a.txt: finetune --from scratch --data digits --labels a.txt
--epochs: evaluate scratch --data digits --epochs 3
--seeds: ablate --seeds 1
nowhere: pretrain --data nowhere
nowhere: finetune --from nowhere.pt
nowhere: predict . --from nowhere.pt
scratch: predict . --from scratch
"""
WRONG += "".join(f"{x.split()[-2]}: pretrain --{x}\n" for x in OUT_OF_RANGE.split("|"))


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_a_wrong_command_is_one_line(line, run):
    words, command = f"{line} ".split(": ")
    assert words in run(command, 2)[0] and not os.listdir()


# ---- Resume --------------------------------------------------------------------------------------

# Settings with which each option has an effect.
BASE = (
    "--size 32 --lr 0.1 --crop 0.3 --rotate 30 --rotate-p 0.7 --flip-p 0.5 --jitter 0.5 --hue 0.3 "
    "--jitter-p 0.7 --blur 2 --blur-p 0.6 --erase-p 0.6 --schedule cosine --teacher-momentum 0.6"
)
OTHERS = dict(arch="densenet121", schedule="steps", init="imagenet --arch densenet121")
# What does not change the result, and what chooses data and start: they are compared as they are.
NOT_COMPARED = "help from data root partial uncertain recipe out device fresh amp"


@pytest.mark.parametrize("stage", STAGES)
def test_each_option_changes_the_run(stage, run, small, capsys):
    base, path = f"{STAGES[stage]} {BASE}", f"runs/set/{stage}.pt"
    run(base)
    with pytest.raises(SystemExit):
        main([stage, "--help"])
    options = {*re.findall("--(?!no-)([a-z0-9-]+)", capsys.readouterr().out)}
    before, args = results("runs/set"), vars(parse(base))

    assert "--amp True" in run(f"{base} --no-amp", 2)[0]
    for option in sorted(options.difference(NOT_COMPARED.split())):
        name = option.replace("-", "_").replace("covariance_weight", "lambda_")
        value = {**args, **args["augment"]}[name]
        other = value + 1 if isinstance(value, int) else OTHERS.get(name) or value / 2 or 0.1
        change = f"{base} --{option} {other}"
        assert f" --{option} {value} there" in run(change, 2)[0]
        if option not in ("arch", "init"):
            run(f"{change} --out other --fresh")
            assert read(f"other/{stage}.pt")[0]["teacher"] != read(path)[0]["teacher"], option
    assert "finished" in run(f"{base} --device cpu --recipe small --out runs/set")[0]
    assert results("runs/set") == before and len(options) > 30


def test_other_images_labels_or_weights_are_another_run(run, small):
    pets()
    label()
    for seed in (0, 1):
        run(f"{PRETRAIN} --data pets --seed {seed} --out {seed}")
    table, two = Path("pets/labels.csv"), f"{SHORT} --labels 6 --out two --from"
    run(f"{two} 0/pretrain.pt")

    assert "first weights" in run(f"{two} 1/pretrain.pt", 2)[0]
    # The same weights under another name are the same run.
    Path("0").rename("moved")
    assert "finished" in run(f"{two} moved/pretrain.pt")[0]
    text = table.read_text()
    name = re.search("(.*),cat,train", text)[1]
    for old, new, differs in (
        (f"{name},cat", f"{name},dog", "labelled images"),
        ("003.png,dog", "003.png,cat", "test images"),
        ("001.png,,train", "001.png,,test", "training images"),
    ):
        table.write_text(text.replace(old, new))
        assert differs in run(f"{two} moved/pretrain.pt", 2)[0]
    table.write_text(text)
    Image.new("RGB", (16, 16), "red").save("pets/001.png")
    assert "training images" in run(f"{PRETRAIN} --data pets --seed 1 --out 1", 2)[0]


@pytest.fixture
def stop(monkeypatch):
    """Counts events, and Ctrl-C comes at one of them: around a step, around replacing a file."""
    events = SimpleNamespace(count=0, at=0)

    def event():
        events.count += 1
        if events.count == events.at:
            raise KeyboardInterrupt

    def with_events(function):
        def call(*arguments):
            event()
            function(*arguments)
            event()

        return call

    monkeypatch.setattr(s2mts2, "ema_update", with_events(s2mts2.ema_update))
    monkeypatch.setattr(os, "replace", with_events(os.replace))
    return events


def test_an_unfinished_start_is_named(run, small, stop):
    Image.new("RGB", (16, 16)).save("1.png")
    for stage, command in STAGES.items():
        stop.count, stop.at = 0, 16
        run(f"{command} --out runs/{stage}", 130)
        path = f"runs/{stage}/{stage}.pt"
        assert len(read(path)[1]) == 1
        following = dict(pretrain=f"{SHORT} --out runs", finetune="predict 1.png")[stage]
        assert f"{path} is not finished" in run(following)[1]


def test_numbers_of_numpy_are_plain_in_a_checkpoint(small):
    data, args = load_data("set.npz"), parse(FINETUNE)
    data.targets[data.train[::2]] = np.nan
    args.epochs, args.out = np.int64(2), Path("out")
    result = s2mts2.finetune(data, args)
    assert data.known.sum() == 14 + 12 and s2mts2.finetune(data, args) == result


def test_a_number_of_labels_is_not_a_file(run, small):
    Path("10").write_text("image000001\n")
    assert parse(f"{FINETUNE} --labels 10").labels == 10
    assert parse(f"{FINETUNE} --labels ./10").labels == "./10"
    assert "number" in run(f"{FINETUNE} --labels none", 2)[0]


def test_labels_that_are_added_after_stage_1(run, small, stop):
    pets()
    command, table = f"{PRETRAIN} --data pets", Path("pets/labels.csv")
    stop.at = 16
    run(command, 130)
    assert "labels" in run(SHORT, 2)[0]
    label(split="train")
    out, _ = run(command)
    assert "epoch 2 of 2" in out and "epoch 1/2" not in out

    # Images 0, 3, 6, ... of 24 become test images. Another name does not hide that.
    label()
    assert "training images" in run(command, 2)[0]
    Path("pets/000.png").rename("pets/other.png")
    table.write_text(table.read_text().replace("000.png", "other.png"))
    assert "warning: 8 test images" in run(SHORT)[1]
    run(f"{command} --fresh")
    assert "warning" not in run(f"{SHORT} --fresh")[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_ends_like_an_uninterrupted_one(stage, run, small, stop):
    run(f"{STAGES[stage]} --out whole")
    whole, moments = results("whole"), stop.count
    assert moments > 16 and [line["epoch"] for line in whole["log.jsonl"]] == [0, 1]

    for moment in range(1, moments + 1):
        stop.count, stop.at = 0, moment
        assert "same command" in run(f"{STAGES[stage]} --out {moment}", 130)[0]
        assert not [*Path().rglob("*.tmp")]
        run(f"{STAGES[stage]} --out {moment}")
        assert results(moment) == whole, moment


def test_a_finished_run_prints_its_table_again_and_fresh_removes_it(run, small, stop):
    run(PRETRAIN)
    run("evaluate")
    out, _ = run(SHORT)
    before = results("runs/set")
    again, _ = run(SHORT)
    assert out[out.index("AUC on") :] == again[again.index("AUC on") :] and "finished" in again
    assert results("runs/set") == before and "epoch 1/2" not in again

    removed = dict(pretrain="pretrain.pt probe.json")
    removed["finetune"] = "finetune.pt metrics.json predictions.csv"
    for stage, command in dict(pretrain=PRETRAIN, finetune=SHORT).items():
        files = {*os.listdir("runs/set")}
        # Stopped in the first epoch.
        stop.count, stop.at = 0, 7
        run(f"{command} --fresh --lr 0.01", 130)
        gone = files - {*os.listdir("runs/set"), "labelled.txt"}
        assert gone == {*removed[stage].split()}
        assert stage not in [line["stage"] for line in read("runs/set/log.jsonl")]
        run(command)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_is_no_checkpoint(stage, run, small, monkeypatch):
    for more in ("", "--batch 14 --epochs 1"):
        large = f"--lr 1e9 --weight-decay 1e9 {more}"
        assert "finite" in run(f"{STAGES[stage]} {large}", 2)[0] and not [*Path().rglob("*.pt")]
    for loss in ("joint_contrastive_loss", "supervised_loss"):
        monkeypatch.setattr(s2mts2, loss, lambda outputs, *arguments: outputs.sum() * 0 + math.inf)
    assert "--lr" in run(STAGES[stage], 2)[0] and not [*Path().rglob("*.pt")]


def test_outputs_that_are_not_finite(run, small, monkeypatch):
    monkeypatch.setattr(s2mts2, "evaluate", lambda *words: np.full((12, 3), np.nan))
    assert "finite" in run(FINETUNE, 2)[0] and not Path("runs/set/metrics.json").exists()


# ---- Files ---------------------------------------------------------------------------------------


def test_a_full_disk(run, small):
    pets()
    label()
    run(f"{PRETRAIN} --data pets")
    run(SHORT)
    before, most = results("runs/pets"), resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    longer, larger = f"{SHORT} --fresh --lr 0.01", f"{PRETRAIN} --data pets --size 64"
    for command, path in ((larger, "runs/decoded/"), (longer, "runs/pets/finetune.pt")):
        # No file can be longer than this.
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, most))
        try:
            line, _ = run(command, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert path in line and not [*Path().rglob("*.tmp")]
    assert results("runs/pets")["pretrain.pt"] == before["pretrain.pt"]


class Code:
    """A pickle of it makes a folder where it is read."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_what_is_no_checkpoint_is_named(run, small):
    for command in STAGES.values():
        run(command)
    good, saved = Path("runs/set/pretrain.pt"), torch.load("runs/set/pretrain.pt")
    damaged = dict(empty=b"", cut=good.read_bytes()[:5000], code=pickle.dumps(Code(), 2))
    for name, content in damaged.items():
        Path(f"{name}.pt").write_bytes(content)
    saved["settings"] = dict(seed=0)
    for name, content in dict(foreign={}, zip=Code(), older=saved).items():
        torch.save(content, f"{name}.pt")

    for name in (*damaged, "foreign", "zip", "older", "runs/set/finetune"):
        for command in ("finetune --from", "evaluate"):
            assert f"{name}.pt" in run(f"{command} {name}.pt", 2)[0]
    assert "pretrain.pt" in run("predict . --from runs/set/pretrain.pt", 2)[0]
    assert "channels" in run(f"{SHORT} --from {good} --data digits", 2)[0]
    good.write_bytes(damaged["cut"])
    assert "--fresh" in run(PRETRAIN, 2)[0] and not Path("made").exists()
    run(f"{PRETRAIN} --fresh")


def test_the_first_process_of_each_machine_decodes(monkeypatch):
    pets()
    waits = []

    def other(seconds):
        """What the first process does while this one waits."""
        waits.append(seconds)
        monkeypatch.setattr(s2mts2, "LOCAL_RANK", 0)
        load_data("pets", size=16)

    monkeypatch.setattr(s2mts2.time, "sleep", other)
    monkeypatch.setattr(s2mts2, "RANK", 2)
    assert load_data("pets", size=24).images.shape == (24, 3, 24, 24) and not waits
    monkeypatch.setattr(s2mts2, "LOCAL_RANK", 1)
    assert load_data("pets", size=16).images.shape == (24, 3, 16, 16) and len(waits) == 1


# ---- Predict, probe, ablation --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_predict_gives_the_probabilities_of_the_report(mode, run, small):
    pets(count=70, mode=mode)
    label()
    if mode == "L":
        table = Path("pets/labels.csv")
        table.write_text(table.read_text().replace(",cat,", ",cat|dog,"))
    run(f"{FINETUNE} --data pets")
    expected = read("runs/pets/predictions.csv")
    Path("pets/labels.csv").unlink()
    Path("pets").rename("new")

    for _ in range(2):
        out, err = run("predict new --out new/table.csv")
        assert "runs/pets/finetune.pt" in out and "warning" not in err
    scores = {Path(name).name: row for name, row in read("new/table.csv").items()}
    assert Path("new/table.csv").read_text().startswith("image,cat,dog\n")
    assert len({*map(tuple, scores.values())}) == len(scores) == 70 and len(expected) == 24
    assert near({name: scores[name] for name in expected}, expected)
    # Files and folders, grey and colour; what is skipped is named, and the others are there.
    image = Image.open("new/001.png").convert("L")
    image.save("grey.png")
    image.convert("RGB").save("colour.png")
    Path("new/table.csv").rename("new/notes.txt")
    Path("new/broken.png").write_bytes(b"broken")
    Path("runs/pets/finetune.pt").rename("last.pt")
    line, err = run("predict grey.png gone.png new colour.png --out other.csv --from last.pt", 2)
    assert "3 " in line and all(x in err for x in ("gone.png", "new/broken.png", "new/notes.txt"))
    other = read("other.csv")
    assert near(other.pop("grey.png"), other.pop("colour.png"), 1e-4)
    assert near({f"new/{name}": row for name, row in scores.items()}, other)


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_probe_is_a_regression_on_the_features_of_the_teacher(multilabel, run, small):
    if multilabel:
        labels = np.random.default_rng(3).integers(0, 2, (40, 3))
        labels[:28, 2] = 0
        made_npz(train_labels=labels[:20], val_labels=labels[20:28], test_labels=labels[28:])
    run(f"{PRETRAIN} --lr 1")
    checkpoint, data = torch.load("runs/set/pretrain.pt"), load_data("set.npz")
    network = small_network("tiny", 3, 6).eval()
    network.load_state_dict(checkpoint["state"]["teacher"])
    network.classifier = nn.Identity()
    views = RANDOM_VIEWS(torch.from_numpy(data.images), PLAIN, 16)
    with torch.no_grad():
        known, unseen = (network(views[part]).double() for part in (data.train, data.test))
    scores, targets = np.full((12, 3), np.nan), data.targets[data.train]
    for column, truth in enumerate(targets.T[:2] if multilabel else [targets.argmax(1)]):
        model = linear_model.LogisticRegression(max_iter=1000)
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
        found = model.fit(known, truth).predict_proba(unseen)
        scores[:, [column] if multilabel else [0, 1, 2]] = found[:, 1:] if multilabel else found
    expected = classification_metrics(data.targets[data.test], scores, data.classes, multilabel)
    # Only the teacher counts.
    for value in checkpoint["state"]["student"].values():
        value.zero_()
    torch.save(checkpoint, "runs/set/pretrain.pt")

    run("evaluate --labels all")

    found = read("runs/set/probe.json")
    assert {name: found[name] for name in expected} == expected
    assert (found["auc"]["2"] is None) == multilabel and found["mean_auc"] > 0
    run("evaluate scratch --data set.npz --labels all --size 16 --out scratch")
    assert [*Path("scratch").glob("probe*.json")] and read("runs/set/probe.json") == found


def test_ablate_trains_each_row_with_each_seed(run, small, monkeypatch):
    command = "ablate --data set.npz --epochs 1 --batch 8 --size 16 --min-steps 0 --seeds 2"
    command += " --labels 6 12 --flip-p 0.25 --consistency 50 --fresh --no-amp"
    out, _ = run(command)

    table = read("runs/set/ablation/ablation.json")
    lines = re.findall(r"(?m)^\$ python s2mts2.py (.*)", out)
    assert [*table] == ["6", "12"] and len({*lines}) == len(lines) == 2 * (2 + 2 * 7)
    two = ["scratch + supervised", "scratch + mean teacher", "moco + mean teacher"]
    two += ["jcl + supervised", "jcl + mean teacher"]
    assert [*table["6"]] == [*table["12"]] == ["random + probe", "jcl + probe", *two]
    for args in [parse(line) for line in lines]:
        assert args.seed == int(args.out[-1]) and args.size == 16
        assert args.command == "evaluate" or (args.fresh, args.amp) == (True, False)
        assert args.command == "evaluate" or args.augment["flip_p"] == 0.25
        assert args.command != "pretrain" or (args.keys, args.lambda_) == (
            (1, 0) if "moco" in args.out else (2, 2)
        )
        if args.command == "finetune":
            (row,) = [row for row in two if re.sub("[ +]+", "-", row) in args.out]
            start = row.split(" +")[0]
            assert args.consistency == (0 if "supervised" in row else 50)
            assert start == "scratch" == args.start or f"/{start}-{args.seed}/" in args.start
            accuracy = table[str(args.labels)][row]["accuracy"][args.seed]
            assert accuracy == read(f"{args.out}/metrics.json")["accuracy"]
            first = re.sub("[^/]*(-[0-9]+-[0-9])$", r"jcl-supervised\1", args.out)
            assert read(f"{args.out}/labelled.txt") == read(f"{first}/labelled.txt")
    for row in table["6"]:
        pairs = [each[row]["mean_auc"] for each in table.values()]
        cells = [f"{np.mean(pair):.4f} +- {np.std(pair, ddof=1):.4f}" for pair in pairs]
        assert re.search(rf"(?m)^{re.escape(row)} +{' +'.join(map(re.escape, cells))}$", out)
    monkeypatch.setattr(s2mts2, "ema_update", None)
    run(command.replace("--fresh", ""))
    assert read("runs/set/ablation/ablation.json") == table
    assert "--labels 99" in run(f"{command} --out a --labels 6 99", 2)[0] and not Path("a").exists()


# ---- Processes -----------------------------------------------------------------------------------


def plain_networks(patch):
    """Networks without BatchNorm and views without random numbers: equal in each process."""
    patch(s2mts2, "build_network", lambda *words, **more: small_network(*words, norm=nn.Identity))
    patch(s2mts2, "random_views", lambda images, _, size: RANDOM_VIEWS(images, PLAIN, size))


# Some commands, and then an error of the second process only.
DRIVER = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import s2mts2, torch, {Path(__file__).stem} as tests
from torch import distributed
tests.plain_networks(setattr)
# One group of processes for all commands: that of a second one could meet the first one's.
start, distributed.destroy_process_group = distributed.init_process_group, lambda: None
distributed.init_process_group = lambda name: distributed.is_initialized() or start(name)
statuses = [s2mts2.main(command.split()) for command in sys.argv[1:]]
print(f"random numbers {{torch.initial_seed()}}\\n", end="")
distributed.barrier()
def load(*arguments):
    raise s2mts2.UserError("only here")
if s2mts2.RANK == 1:
    s2mts2.load_data = load
sys.exit(any(statuses) or s2mts2.main([*sys.argv[1].split(), "--out", "three"]))
"""


def test_two_processes_compute_what_one_does(run, small, monkeypatch):
    labels = np.random.default_rng(1).integers(-1, 2, (28, 3))
    made_npz(train_labels=labels[:20], val_labels=labels[20:], test_labels=abs(labels[:12]))
    commands = PRETRAIN, FINETUNE.replace("scratch", "two/pretrain.pt").replace("9", "16", 1)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    Path("driver.py").write_text(DRIVER)
    words = [*torchrun.split(), "driver.py", *(f"{command} --out two" for command in commands)]

    done = subprocess.run(words, capture_output=True, text=True)

    assert done.returncode != 0 and done.stderr.count("error: only here") == 1
    assert done.stdout.count("finetune epoch 2/2") == 1 and not Path("three").exists()
    # Each process has its own random views.
    assert len({*re.findall("random numbers (.*)", done.stdout)}) == 2
    plain_networks(monkeypatch.setattr)
    for command in commands:
        assert "processes" in run(f"{command} --out two", 2)[0]
        run(f"{command} --out one")
    one, two = (results(out) for out in ("one", "two"))
    monkeypatch.setattr(s2mts2, "all_gather", lambda tensor: tensor + 1)
    assert "machines" in run(PRETRAIN, 2)[0]
    assert [*one] == [*two] and one["labelled.txt"] == two["labelled.txt"]
    for name in ("pretrain.pt", "finetune.pt", "log.jsonl", "predictions.csv"):
        assert near(one[name], two[name], 1e-4), name


@pytest.mark.parametrize("command", ["pretrain --batch 9", "evaluate scratch --data digits"])
def test_an_error_of_all_processes_is_one_line(command, run, monkeypatch, capsys):
    monkeypatch.setattr(s2mts2, "PROCESSES", 2)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(s2mts2.signal, "signal", lambda *words: None)
    # While the second process waits it is ended by torchrun.
    monkeypatch.setattr(s2mts2.time, "sleep", sys.exit)

    assert "process" in run(command, 2)[0]
    monkeypatch.setattr(s2mts2, "RANK", 1)
    with pytest.raises(SystemExit):
        run(command)
    assert "error: " not in capsys.readouterr().err
    # Stopped with the others, it has nothing to say.
    monkeypatch.setattr(s2mts2, "parse_args", lambda argv: signal.raise_signal(signal.SIGINT))
    assert main([]) == 130 and not capsys.readouterr().err


# ---- The files of the project --------------------------------------------------------------------


def test_the_commands_of_the_readme_can_be_typed(run, small):
    text, names = (HERE / "README.md").read_text(), "pretrain|finetune|evaluate|predict|ablate"
    for out in ("DIR", "digits"):
        for command in STAGES.values():
            run(f"{command} --out runs/{out}")
    commands = re.findall(rf"s2mts2\.py ((?:{names})[^`&|#\n]*)", text + s2mts2.__doc__)

    assert len(commands) > 10 and "python -m pytest" in text
    for command in commands:
        parse(command)
    for command in names.split("|"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


def test_the_files_of_the_project():
    source, tests = (Path(each).read_text() for each in (s2mts2.__file__, __file__))
    tree, used = ast.parse(source), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), node.name
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        used |= {name.split(".")[0] for name in names}
    needed = used - {*sys.stdlib_module_names, "PIL", "sklearn"} | {"scikit-learn", "torchvision"}
    assert {*re.findall("(?m)^[a-z-]+", (HERE / "requirements.txt").read_text())} == needed
    assert doctest.testmod(s2mts2) == (0, 3)
    assert len(tests.splitlines()) <= len(source.splitlines()) <= 1839
    # An import does nothing.
    before = torch.get_rng_state().tolist(), torch.get_float32_matmul_precision()
    runpy.run_path(s2mts2.__file__, run_name="imported")
    assert (torch.get_rng_state().tolist(), torch.get_float32_matmul_precision()) == before
    assert not os.listdir()
