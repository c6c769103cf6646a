"""S2MTS2: self-supervised mean teacher for semi-supervised image classification, in one file.

Images are plentiful, labels are expensive. This file implements "Self-supervised Mean Teacher for
Semi-supervised Chest X-ray Classification" (Liu, Tian, Cordeiro, Belagiannis, Reid and Carneiro,
MLMI 2021, arXiv 2103.03629). Two networks of the same shape are trained. The STUDENT is trained by
gradient descent. The TEACHER is an exponential moving average (EMA) of the student: after each
step, teacher <- a teacher + (1 - a) student. The average of many students is more accurate than the
last one, so the teacher can provide targets for the student.

    Stage 1, pretrain: all images, no labels.
        image --> 1 query view --> student --> q ------------------+
          |                           | EMA of the weights         +--> joint contrastive loss,
          |                           v                            |    trains the student
          +-----> M key views ---> teacher --> k_1 ... k_M --------+
                                                 | mean            |
                                                 v                 |
                              queue of past means: n_1 ... n_K ----+

    Stage 2, finetune: the same two networks with a new classifier, few labels.
        labelled image --> a view --> student --> p -- cross-entropy with its label --+
                                                                                      +--> trains
        unlabelled image > view 1 --> student --> p --+                               |    the
                 |                                    +-- mean squared difference ----+    student
                 +-------> view 2 --> teacher --> p' -+           times w

The teacher of stage 2 is the result; the student is tested beside it. With 10 labels of digits its
accuracy is .88, without stage 1 .83, with labels only .63 (ten seeds, README.md).

Commands:
    a laptop            python s2mts2.py pretrain && python s2mts2.py finetune
    each ingredient     python s2mts2.py ablate --seeds 10
    MoCo instead        python s2mts2.py pretrain --keys 1 --covariance-weight 0 --out runs/moco
    your own images     python s2mts2.py pretrain --data DIR && python s2mts2.py finetune
    new images          python s2mts2.py predict IMAGES
    several GPUs        torchrun --nproc_per_node=4 s2mts2.py pretrain --data cxr14 --root DIR

Symbols of the paper, names in this file, shapes:
    q, k_m, n_j   query [N, D], keys [N, M, D], queue [K, D]: embeddings and negatives
    mu, Sigma     mean (it enters the queue) and covariance (never formed) of the keys of an image
    t             temperature
    c, lambda     covariance_weight in the loss; c in the last epoch, --covariance-weight
    a, w          teacher_momentum, the EMA decay; weight that grows to args.consistency
    p, p'         probabilities [N, C] of student and teacher
N images in a batch, M keys of an image, D dimensions of an embedding, K negatives, C classes; in
stage 2, L labelled and N unlabelled images in a batch.

A tag names the source of the text up to the next tag or empty line: [paper], [authors' code]
(github.com/FBLADL/semi-chest), [Mean Teacher] (arXiv 1703.01780), [JCL] (joint contrastive loss,
arXiv 2009.14776), [MoCo] (arXiv 1911.05722), [ACPL] (github.com/FBLADL/ACPL, the authors' label
lists), [our choice]. [plumbing] is code that is not part of the method.

Map: 1 network and teacher   2 joint contrastive loss   3 stage 1   4 stage 2   5 evaluation
     -- a first reader can stop there --   6 settings   7 views   8 data   9 decoding
     10 reports and ablation   11 runs and checkpoints   12 devices and processes   13 command line
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from sklearn import datasets, linear_model, metrics, model_selection, pipeline, preprocessing
from torch import distributed, nn
from tqdm import tqdm


# ---- 1. Network and teacher ----------------------------------------------------------------------


def build_network(arch, channels, outputs, head="linear", imagenet=False):
    """torchvision's DenseNet with a new head: float32 [N, channels, side, side] -> [N, outputs].

    arch      "densenet121" [paper]; "tiny", a DenseNet of 0.14 million weights for small images
    channels  1 or 3
    outputs   int: D for head "mlp", C for head "linear"
    head      "mlp": projection head of stage 1, dropped after it; "linear": classifier
    imagenet  bool: start densenet121 from torchvision's ImageNet weights, a download of 31 MB
    Returns an nn.Module. Raises OSError if the weights cannot be downloaded.
    """
    if arch == "densenet121":
        network = torchvision.models.densenet121(weights="IMAGENET1K_V1" if imagenet else None)
    else:
        network = torchvision.models.DenseNet(16, block_config=(2, 4, 4), num_init_features=32)
    if channels == 1:
        # Three equal channels through a filter are one channel through the sum of the filter. The
        # network starts as exactly the one that sees three copies of the normalised grey image.
        stem = network.features.conv0
        stem.weight, stem.in_channels = nn.Parameter(stem.weight.sum(1, keepdim=True)), 1
    width = network.classifier.in_features
    network.classifier = nn.Linear(width, outputs)
    if head == "mlp":
        network.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), network.classifier)
    # [plumbing] The channels of a pixel stand side by side in memory: convolutions run faster.
    return network.to(memory_format=torch.channels_last)


def make_teacher(student):
    """A copy of the student. No gradient reaches it; only ema_update changes its weights.

    Why no gradient, stage 1: [MoCo] a teacher trained by gradient descent changes fast. Keys of
    earlier steps stay in the queue and would not fit. This also saves M of M + 1 backward passes.
    Why no gradient, stage 2: [Mean Teacher] the consistency loss asks two networks to agree.
    [our choice] Our reason: if both could move, the two networks could collapse to a trivial
    solution, one output for all unlabelled images.

    BatchNorm of the teacher. In stage 1 and 2 it normalises with the statistics of its batch. In
    stage 2 this batch has unlabelled images only; the student's batch has both kinds. In evaluation
    it uses running statistics: [our choice] the EMA of the student's, not changed by the teacher's
    own passes. They come from past students and do not fit the present teacher. So stage 1 fails if
    its teacher uses them: measured on digits, 12 epochs, the loss stays within 0.1 of log(K + 1).
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            # PyTorch: running <- (1 - momentum) * running + momentum * batch.
            module.momentum = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """[paper] teacher <- momentum * teacher + (1 - momentum) * student, in place.

    teacher, student  nn.Modules of the same architecture; the student does not change
    momentum          float in [0, 1], the EMA decay a
    With a constant a, n updates with students theta_1 ... theta_n give the weighted mean
        theta'_n = a^n theta'_0 + (1 - a) sum_{i=1..n} a^(n-i) theta_i.
    [authors' code] BatchNorm's running statistics are averaged like weights. [our choice] Its
    integer counter is copied.
    """
    averages = [*teacher.parameters(), *teacher.buffers()]
    latest = [*student.parameters(), *student.buffers()]
    floats = [pair for pair in zip(averages, latest, strict=True) if pair[0].is_floating_point()]
    # One call for all tensors. On a GPU a call for each would take longer than the arithmetic.
    torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1 - momentum)
    for average, value in zip(averages, latest, strict=True):
        if not average.is_floating_point():
            average.copy_(value)


# ---- 2. Joint contrastive loss -------------------------------------------------------------------


def joint_contrastive_loss(query, keys, queue, temperature, covariance_weight):
    """[paper] The loss of [JCL]: contrast a query with infinitely many keys of its own image.

    query              float [N, D], unit length
    keys               float [N, M, D], unit length, no gradient; the positives
    queue              float [K, D], no gradient; the negatives
    temperature        float > 0, t
    covariance_weight  float >= 0, c; M = 1, with any c, is MoCo's InfoNCE
    Returns a scalar, the mean over the N images.

    InfoNCE asks which of 1 + K vectors is the key of this query. It is a cross-entropy,
        -log( e^(q.k/t) / (e^(q.k/t) + sum_j e^(q.n_j/t)) ),
    and depends on the one random view behind k. JCL asks for its mean over all possible views.
    Model the keys of an image as a Gaussian with mean mu and covariance Sigma. Then
      - the mean of -q.k/t is -q.mu/t;
      - the mean of log(e^(q.k/t) + ...) is at most log(mean of e^(q.k/t) + ...), because log is
        concave (Jensen's inequality);
      - the mean of e^(q.k/t) is e^(q.mu/t + q^T Sigma q / (2 t^2)) (moment-generating function).
    So the mean over infinitely many keys is at most, with c = 1,
        loss = log( e^(q.mu/t + c q^T Sigma q / (2 t^2)) + sum_j e^(q.n_j/t) ) - q.mu/t.
    For c < 1 the loss is not guaranteed to be an upper bound; c > 1 loosens the bound. Even for
    c = 1 it is approximate: unit vectors are not Gaussian, and mu and Sigma are estimated from M
    keys. The covariance term is large where the keys of an image differ along the query. It turns
    the query to directions in which they agree.

    [JCL] Sigma is the biased covariance, the mean of (k - mu)(k - mu)^T. So q^T Sigma q / t^2 is
    the biased variance of the M numbers q.k_m / t, and no D x D matrix is formed.

    Worked example, N = 1, M = 2, K = 2, t = c = 1. q.k_m is 1 and 0: mean 1/2, variance 1/4.
    q.n_j is 0 and 0. So the loss is log(e^(1/2 + 1/8) + 1 + 1) - 1/2 = log(3.868) - 0.5 = 0.853.
    >>> query, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> queue = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> round(joint_contrastive_loss(query, keys, queue, 1.0, 1.0).item(), 3)
    0.853
    """
    positives = torch.einsum("nd,nmd->nm", query, keys) / temperature  # [N, M]
    mean = positives.mean(1)  # [N]
    # 1/t^2 is already in `positives`.
    variance = positives.var(1, unbiased=False)  # [N]
    positive = mean + covariance_weight / 2 * variance  # [N]
    negatives = query @ queue.T / temperature  # [N, K]
    logits = torch.cat([positive[:, None], negatives], 1)  # [N, 1 + K]
    # Minus mean, not minus positive: in the loss the covariance stands only inside the log.
    return (logits.logsumexp(1) - mean).mean()


# ---- 3. Stage 1: pretrain ------------------------------------------------------------------------

# The student sees one view of an image. It must distinguish the teacher's keys of other views of
# this image from K negatives, key means of earlier images. No label is needed.
#
# [MoCo] Queue: a few negatives are easy to reject and teach little, so keys of the last K images
# are kept; [JCL] their means. Old and new keys are comparable only if the teacher changes slowly:
# hence an EMA decay close to 1. [our choice] With a decay of 0 the networks collapse, measured on
# digits: all images get nearly the same embedding (mean cosine .9999), the loss is log(K + 1).
# Temperature t: a low value gives most weight to the most similar negatives, which separates images
# that look alike. A high value treats all negatives alike.
# The loss: a student that knows nothing gives all 1 + K vectors the same probability, a loss of
# log(K + 1). The loss starts lower, because random directions fill the queue at first and are easy
# to reject. It rises while keys replace them, and falls when the student learns.
# BatchNorm leakage: an embedding depends on the other images of its batch. A query and its keys
# share them, so the student could find its keys by this trace. [MoCo] Images are shuffled between
# GPUs. [our choice] Not done: BatchNorm in shuffled groups did not improve stage 1 in an earlier
# version. Several GPUs use SyncBatchNorm as in MoCo v3 (arXiv 2104.02057): loss and statistics are
# those of one GPU; only the random views differ.


def pretrain(data, args):
    """Pre-train student and teacher on all training images, without labels.

    data  Data
    args  from parse_args(["pretrain", ...])
    Returns (student, teacher). Writes pretrain.pt, log.jsonl and views.png to the output folder.
    Raises UserError if args and data do not match.
    """
    device = choose_device(args.device)
    seed_torch(args.seed, "pretrain")
    imagenet = args.init == "imagenet"
    student = build_network(args.arch, data.images.shape[1], args.dim, "mlp", imagenet).to(device)
    teacher = make_teacher(student)
    student, teacher = synchronise(student), synchronise(teacher)
    # [authors' code] Random directions fill the queue at first. [our choice] It is at most as long
    # as the training set. Even so some queries meet an old key of their own image, since the order
    # changes in each epoch. In a longer queue nearly all would.
    length = min(args.queue, len(data.train))
    queue = F.normalize(torch.randn(length, args.dim), dim=1).to(device)  # [K, D]
    optimizer = torch.optim.SGD(
        student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    steps = len(data.train) // args.batch
    require(steps, f"{len(data.train)} training images: --batch must not be larger")
    # [plumbing] Writes checkpoint and log. Loads an earlier checkpoint into these four.
    state = dict(student=student, teacher=teacher, optimizer=optimizer, queue=queue)
    run = Run(data, args, steps * args.batch, state)
    save_views(data, args)
    print(f"loss: starts low, rises to about log(K + 1) = {math.log(length + 1):.2f}, then falls")
    embed = average_gradients(student)

    for epoch in range(run.epochs_done, args.epochs):
        # [plumbing] Seeds torch, so that a resumed run equals an uninterrupted one.
        run.start_epoch(epoch)
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        # [JCL] c grows to lambda. [our choice] Our reason: Sigma means little while the network is
        # untrained. With lambda = 2, c reaches 1, the value of the bound, in the middle.
        c = args.lambda_ * (epoch + 1) / args.epochs
        for indices in batches(data.train, steps, args.batch, args.seed, epoch):
            images = to_device(data.images[indices], device)  # uint8 [N, channels, height, width]
            copies = images.repeat_interleave(args.keys, 0)  # uint8 [N * M, channels, ...]
            query_views = random_views(images, args.augment, args.size)  # [N, channels, size, size]
            key_views = random_views(copies, args.augment, args.size)  # [N * M, channels, ...]
            with mixed_precision(device, args.amp):
                # The teacher first: on a GPU its activations are gone before the student's come.
                with torch.no_grad():
                    keys = F.normalize(teacher(key_views).float(), dim=1)  # [N * M, D]
                    keys = keys.unflatten(0, (-1, args.keys))  # [N, M, D]
                query = F.normalize(embed(query_views).float(), dim=1)  # [N, D]
            loss = joint_contrastive_loss(query, keys, queue, args.temperature, c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, args.teacher_momentum)
            enqueue(queue, all_gather(keys.mean(1)))  # mean over M: [N, D]
            run.step(loss, args.batch)
        run.finish_epoch()
    return student, teacher


def enqueue(queue, means):
    """Put means [N, D] in front of queue [K, D], in place. The oldest drop out at the end.

    [JCL] The mean of several unit vectors is shorter than 1. It is not normalised again.
    """
    queue.copy_(torch.cat([means, queue])[: len(queue)])


def learning_rate(args, epoch):
    """[authors' code] Learning rate of an epoch, 0 <= epoch < args.epochs.

    "cosine" decreases towards 0. "steps" divides by 10 at 1/2 and again at 5/6 of the epochs.
    [our choice] Of 30 epochs 1/2 and 5/6 are 15 and 25, as in their script.
    """
    progress = epoch / args.epochs
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * progress)) / 2
    return args.lr * 0.1 ** ((progress >= 1 / 2) + (progress >= 5 / 6))


def batches(indices, steps, size, seed, epoch):
    """int64 [steps, size]: the indices in random order, repeated if there are not enough.

    The order depends on seed and epoch only. Size 0 gives empty batches. With several processes:
    this process's part of each batch, [steps, size / processes].
    """
    random = np.random.RandomState([seed, epoch])
    repeats = 1 + steps * size // max(1, len(indices))
    order = np.concatenate([random.permutation(indices) for _ in range(repeats)])
    return order[: steps * size].reshape(steps, PROCESSES, -1)[:, RANK]


# ---- 4. Stage 2: finetune ------------------------------------------------------------------------

# [Mean Teacher] Labels say what the classes are. Unlabelled images say where a prediction must not
# change: student and teacher see two views of an image and should predict the same. The teacher
# provides the target and is evaluated, because an average over many steps is more accurate.
# [our choice] An epoch shows each unlabelled image about once, or more often if there are few. The
# labelled images repeat. With --consistency 0 the number of steps is the same, so that runs can be
# compared. Then the student sees labelled images only, also in its BatchNorm.


def finetune(data, args):
    """Fine-tune student and teacher with a few labels and all unlabelled images, then test both.

    data  Data                             args  from parse_args(["finetune", ...])
    Returns the dict in metrics.json. Writes finetune.pt, log.jsonl, labelled.txt, metrics.json and
    predictions.csv to the output folder. Raises UserError if args and data do not match.
    """
    device = choose_device(args.device)
    labelled = choose_labelled(data, args.labels, args.seed)
    unlabelled = np.setdiff1d(data.train, labelled)
    seed_torch(args.seed, "finetune")
    # [paper] Student and teacher of stage 1, both with the same new classifier. Or new networks.
    student, teacher = map(synchronise, load_networks(args, data.images.shape[1], data.classes))
    adam = dict(lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=args.weight_decay, **adam)
    steps = max(args.min_steps, math.ceil(max(len(labelled), len(unlabelled)) / args.batch))
    # BatchNorm of the teacher needs two images.
    use_unlabelled = args.consistency > 0 and len(unlabelled) >= 2 * PROCESSES
    # L and N of a step, over all processes. [our choice] Not more images than there are.
    size_l = min(args.batch, len(labelled)) // PROCESSES * PROCESSES
    size_n = min(args.batch, len(unlabelled)) // PROCESSES * PROCESSES * use_unlabelled
    require(size_l, f"{len(labelled)} labelled images are fewer than {PROCESSES} processes")
    require(size_l + size_n > PROCESSES, "BatchNorm needs two images in a step; use more --labels")
    print(f"{len(labelled):,} labelled and {len(unlabelled):,} unlabelled training images")
    state = dict(student=student, teacher=teacher, optimizer=optimizer)
    run = Run(data, args, steps * (size_l + size_n), state, labelled)
    classify = average_gradients(student)

    for epoch in range(run.epochs_done, args.epochs):
        run.start_epoch(epoch)
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        w = consistency_weight(args, epoch)
        order_l = batches(labelled, steps, size_l, args.seed, epoch)
        order_n = batches(unlabelled, steps, size_n, args.seed, epoch)
        for step, (indices_l, indices_n) in enumerate(zip(order_l, order_n, strict=True)):
            targets = to_device(data.targets[indices_l], device)  # [L, C]
            images = to_device(data.images[indices_l], device)  # uint8 [L, channels, ...]
            views = random_views(images, args.augment, args.size)  # [L, channels, size, size]
            if use_unlabelled:
                # [Mean Teacher] Each network has its own view. [authors' code] There both see one.
                images = to_device(data.images[indices_n], device)  # uint8 [N, channels, ...]
                teacher_views = random_views(images, args.augment, args.size)
                student_views = random_views(images, args.augment, args.size)
                views = torch.cat([views, student_views])  # [L + N, channels, size, size]
            with mixed_precision(device, args.amp):
                if use_unlabelled:
                    with torch.no_grad():
                        teacher_logits = teacher(teacher_views).float()  # [N, C]
                logits = classify(views).float()  # [L, C] or [L + N, C]
            loss = supervised_loss(logits[: len(targets)], targets, data.multilabel)
            if use_unlabelled:
                student_logits = logits[len(targets) :]  # [N, C]
                loss = loss + w * consistency_loss(student_logits, teacher_logits, data.multilabel)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, warmed_up(args.teacher_momentum, epoch * steps + step + 1))
            run.step(loss, size_l + size_n)
        run.finish_epoch()
    return report(student, teacher, data, args) if RANK == 0 else None


def consistency_weight(args, epoch):
    """[authors' code] w of an epoch: 0 in the first, then it grows linearly.

    It reaches args.consistency after the fraction `ramp` of the epochs; with ramp = 1 it ends one
    step below. Why 0: at first the classifier is random, and so are the teacher's predictions.
    """
    return args.consistency * min(1, epoch / (args.ramp * args.epochs))


def warmed_up(decay, updates):
    """[Mean Teacher] EMA decay of update 1, 2, ...: 1/2, 2/3, ... but at most the given one.

    Until then the teacher is the mean of its first weights and of n students, each with weight
    1 / (n + 1). So it soon forgets the untrained classifier, and also the weights of stage 1.
    """
    return min(1 - 1 / (updates + 1), decay)


def load_networks(args, channels, classes):
    """Student and teacher for stage 2, with the weights of args.start, on args.device.

    args.start  path of a checkpoint, "scratch" or "imagenet"
    Networks of stage 1 get a new classifier, the same in both; those of stage 2 keep their own.
    Raises UserError if a checkpoint has another architecture or another number of channels.
    """
    student = build_network(args.arch, channels, len(classes), imagenet=args.start == "imagenet")
    teacher, new = make_teacher(student), student.classifier.state_dict(prefix="classifier.")
    if args.start not in ("scratch", "imagenet"):
        saved = load_checkpoint(args.start, "pretrain", "finetune")
        there, here = (saved["args"]["arch"], saved["channels"]), (args.arch, channels)
        require(there == here, f"{args.start} has network and channels {there}, not {here}")
        if len(saved["history"]) < saved["args"]["epochs"]:
            print(f"warning: {args.start} is not finished")
        for network, name in ((student, "student"), (teacher, "teacher")):
            kept = saved["state"][name]
            if saved["stage"] == "pretrain":
                kept = {key: value for key, value in kept.items() if "classifier" not in key} | new
            network.load_state_dict(kept, strict=True)
    device = choose_device(args.device)
    return student.to(device), teacher.to(device)


def supervised_loss(logits, targets, multilabel):
    """[paper] Cross-entropy of logits [L, C] with targets [L, C] of 0, 1 or NaN (not known).

    Multi-label: binary cross-entropy, mean over the known targets. Multi-class: cross-entropy, mean
    over the images whose row is known. Returns a scalar; an unknown target has a gradient of 0.
    """
    if multilabel:
        known = ~targets.isnan()
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    else:
        known = ~targets.isnan().any(1)
        losses = F.cross_entropy(logits, targets.nan_to_num(), reduction="none")
    # [plumbing] Known targets of all processes, so that the mean of their losses is that of one.
    count = all_gather(known.sum()[None]).sum() / PROCESSES
    return losses.where(known, 0).sum() / count


def consistency_loss(student_logits, teacher_logits, multilabel):
    """[paper] Squared difference of probabilities, mean over N and C, from logits [N, C].

    Probabilities, not logits: confident and very confident should count as nearly the same.
    """
    predicted = probabilities(student_logits, multilabel)
    return F.mse_loss(predicted, probabilities(teacher_logits, multilabel))


def probabilities(logits, multilabel):
    """Sigmoid (multi-label) or softmax (multi-class) of logits [N, C]."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


# ---- 5. Evaluation -------------------------------------------------------------------------------


def evaluate(network, data, indices, size, batch=64):
    """Probabilities of all classes, float32 [n, C]: each image once and in the given order.

    network  from build_network           size   int, side of a view in pixels
    indices  int64 [n], into data.images  batch  int, images at a time
    """
    return probabilities(outputs_of(network, data, indices, size, batch), data.multilabel).numpy()


def outputs_of(network, data, indices, size, batch=64):
    """Outputs of the network for images, as evaluate: float32 [n, outputs], on the CPU."""
    blocks = np.split(indices, range(batch, len(indices), batch))
    images = (torch.from_numpy(data.images[block]) for block in tqdm(blocks, "test", leave=False))
    return torch.cat([predict_batch(network, each, size) for each in images])


@torch.no_grad()
def predict_batch(network, images, size):
    """Outputs for images, a uint8 tensor [N, channels, height, width]: float32 [N, outputs].

    Without bfloat16: it has so few digits that images would have equal probabilities.
    """
    training = network.training
    network.eval()
    outputs = network(random_views(images.to(next(network.parameters()).device), PLAIN, size))
    network.train(training)
    return outputs.cpu()


# ---- A first reader can stop here: the rest is settings, views, data, files, command line --------

# ---- 6. Settings ---------------------------------------------------------------------------------

# The recipe of Chest X-ray14 in full: stage 1, stage 2 (None: not read there), meaning with unit.
# A row is an option, such as --batch 64 (lambda_: --covariance-weight); --help has its meaning. The
# values are from the authors' code; the text of the paper was not at hand.
#
# Stage 1: [authors' code] pretrain.py and dataloader.py. Not copied: LeakyReLU in the backbone, a
# projection head of three layers, float16.
# Stage 2 is a blend, since their last script has no unlabelled image and no EMA. [authors' code]
# Last script, finetune.py: size, batch, lr, betas, eps, schedule, labels, rotation; 10 epochs.
# Older scripts: 30 epochs (CheXpert; ISIC2018 80 of 100), EMA decay, consistency weight, its ramp.
# These have a cosine. "steps" is from the last script; its 10 epochs end before it divides.
# An epoch of theirs is a pass over the labelled images. [our choice] Ours is a pass over the
# unlabelled ones: on Chest X-ray14 about 5,300 steps, not 108; on ISIC2018 four times as many.
# fmt: off
CXR14 = dict(
    #                 stage 1        stage 2        meaning, with unit
    arch=            ("densenet121", "densenet121", "densenet121, or tiny for small images"),
    init=            ("imagenet",    None,          "first weights: imagenet or random"),
    size=            (256,           512,           "side of a view, pixels"),
    epochs=          (100,           30,            "passes over the (unlabelled) training images"),
    batch=           (256,           16,            "images in a step, in stage 2 of each kind"),
    min_steps=       (None,          0,             "least number of steps of an epoch"),
    # Stage 1 has SGD. Stage 2 has AdamW; without weight decay that is Adam. Its eps is far above
    # most gradients, so a step is nearly that of SGD with a learning rate of lr / eps = 0.5.
    # With few labels such steps can overwrite the features of stage 1. Few epochs and an early w,
    # as in the recipe small, limit this.
    lr=              (0.03,          0.05,          "learning rate of the first epoch"),
    schedule=        ("cosine",      "steps",       "of the learning rate: cosine or steps"),
    momentum=        (0.9,           None,          "of SGD"),
    beta1=           (None,          0.9,           "AdamW: decay of the mean gradient"),
    beta2=           (None,          0.99,          "AdamW: decay of the mean squared gradient"),
    eps=             (None,          0.1,           "AdamW: added to the root of the mean square"),
    weight_decay=    (1e-4,          0.0,           "L2 penalty (stage 1); of AdamW (stage 2)"),
    # The average covers about the last 1 / (1 - a) steps.
    teacher_momentum=(0.999,         0.999,         "a, the EMA decay of the teacher"),
    # JCL's own code has 4 keys, t 0.2 and the same lambda (10 in its first commit).
    keys=            (2,             None,          "M, key views of an image"),
    dim=             (128,           None,          "D, dimensions of an embedding"),
    queue=           (65536,         None,          "K, negatives; at most the training images"),
    temperature=     (0.07,          None,          "t, in units of cosine similarity"),
    lambda_=         (2.0,           None,          "lambda, weight of the covariance at the end"),
    consistency=     (None,          1.0,           "w at the end of its ramp (consistency loss)"),
    ramp=            (None,          1.0,           "fraction of the epochs in which w grows"),
    labels=          (None,          0.02,          "fraction of each class, number, all, or file"),
    # The views. Stage 1: one query and M keys. Stage 2: one for each network.
    centre=          (0.0,           0.0,           "fraction of the width cut off before crop"),
    crop=            (0.8,           0.8,           "random crop: largest fraction cut off (area)"),
    rotate=          (10.0,          5.0,           "rotation: largest angle, degrees"),
    rotate_p=        (0.5,           1.0,           "probability of the rotation"),
    flip_p=          (0.5,           0.5,           "probability of a horizontal flip"),
    vertical_flip_p= (0.0,           0.0,           "probability of a vertical flip"),
    jitter=          (0.4,           0.0,           "brightness, contrast, saturation: 1 +- this"),
    hue=             (0.4,           0.0,           "largest rotation, fraction of a circle"),
    jitter_p=        (0.8,           0.0,           "probability of the four changes of colour"),
    blur=            (2.0,           0.0,           "largest standard deviation, pixels"),
    blur_p=          (0.5,           0.0,           "probability of the blur"),
    erase_p=         (0.5,           0.0,           "probability of erasing a rectangle"),
)
# fmt: on
VIEWS = tuple(CXR14)[tuple(CXR14).index("centre") :]

# The other recipes, as what differs from it. The data set chooses its recipe, --recipe another one.
# fmt: off
RECIPES = dict(
    cxr14=dict(pretrain={}, finetune={}),
    # [authors' code] dataloader_xpert.py; stage 2 from the older script. [our choice] 224 px in
    # stage 1, theirs are 256; 2 % of the labels, since their lists are not published.
    chexpert=dict(
        pretrain=dict(size=224, keys=5, erase_p=0.0),
        finetune=dict(
            size=224, batch=64, schedule="cosine", weight_decay=0.01,
            rotate=10.0, jitter=0.4, hue=0.4, jitter_p=0.8)),
    # [authors' code] pretrain_isic.py and the older script of stage 2, which stops at epoch 80 of a
    # cosine and a ramp over 100. [our choice] Ours end at 80; 224 px; the vertical flip; no
    # translation, theirs is 0.02 in both stages.
    isic2018=dict(
        pretrain=dict(
            size=224, keys=5, centre=0.25, crop=0.0, rotate_p=1.0, vertical_flip_p=0.5,
            erase_p=0.0),
        finetune=dict(
            size=224, epochs=80, schedule="cosine", labels=0.2, rotate=10.0, vertical_flip_p=0.5)),
    # [our choice] Chosen on held-out training images, but after an earlier recipe was seen on the
    # test images; see README, Results. Not better on held-out images, accuracy of 8 pairs of seeds
    # (standard error): stage 2 from the probe's classifier -.022 (.011), the same with the full w
    # from the first epoch -.383 (.032); no warm-up of the EMA -.014 (.009).
    digits=dict(
        pretrain=dict(
            arch="tiny", init="random", size=32, epochs=45, batch=64, lr=0.06,
            teacher_momentum=0.99, queue=512, temperature=0.4, crop=0.5, rotate=25.0,
            rotate_p=1.0, flip_p=0.0, hue=0.0, blur=0.0, blur_p=0.0, erase_p=0.0),
        finetune=dict(
            arch="tiny", size=32, epochs=14, batch=32, lr=0.1, schedule="cosine",
            teacher_momentum=0.97, consistency=200.0, labels=10, crop=0.4, rotate=20.0,
            flip_p=0.0, jitter=0.4, jitter_p=0.8)),
    # [our choice] For a laptop, and for all other data. Chosen on held-out images of ISIC2018. Not
    # clearly better there: lambda 0 or 1; at equal cost MoCo or five keys; in stage 1 a shorter
    # queue or another EMA decay; in stage 2 stronger views. 10 epochs of stage 2 with consistency
    # 50 were slightly better, in twice the time. With more change of colour in stage 2 it lost much
    # of what stage 1 had added. Below 4,800 images stage 2 would be too short: min_steps.
    small=dict(
        pretrain=dict(
            arch="tiny", init="random", size=32, epochs=45, batch=128, lr=0.06,
            teacher_momentum=0.99, queue=4096, rotate=25.0, rotate_p=1.0, jitter=0.2,
            hue=0.02, blur=0.0, blur_p=0.0, erase_p=0.0),
        finetune=dict(
            arch="tiny", size=64, epochs=5, batch=64, min_steps=75, schedule="cosine",
            teacher_momentum=0.99, consistency=20.0, ramp=0.33, labels="all", crop=0.2,
            rotate=10.0, jitter=0.2, hue=0.02, jitter_p=0.8)),
)
# fmt: on


# ---- 7. Views ------------------------------------------------------------------------------------

# A view shows an image with another position, exposure or sharpness. The networks learn to ignore
# what differs between views. random_views samples the random numbers; the others take them.

# No random change, for evaluation.
PLAIN = dict.fromkeys(VIEWS, 0.0)

# [our choice] One normalisation for both stages and evaluation: mean and standard deviation of
# ImageNet, for grey images their mean over the colours.
NORMALISATION = {1: ([0.449], [0.226]), 3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}


def random_views(images, augment, size):
    """One random view of each image. Each image has its own random numbers, from torch's generator.

    images   uint8 [N, channels, height, width], or float in [0, 1]; 1 or 3 channels, any device
    augment  dict with the keys of PLAIN
    size     int, side of the views in pixels
    Returns float32 [N, channels, size, size] on the same device, normalised.
    """
    count, device = len(images), images.device
    # [plumbing] A CPU is fastest with as many images at a time as its cache holds.
    at_once = max(1, 2**20 // size**2)
    if device.type == "cpu" and count > at_once:
        return torch.cat([random_views(part, augment, size) for part in images.split(at_once)])
    images = images / 255 if images.dtype == torch.uint8 else images.float().clone()

    def uniform(low, high):
        """Random numbers [N] from low to high."""
        return torch.empty(count, device=device).uniform_(low, high)

    def sometimes(probability):
        """1 with the probability, else 0, [N]."""
        return (torch.rand(count, device=device) < probability).float()

    # [our choice] Resize first, so that all views of a batch have one shape. torchvision crops at
    # full resolution.
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if any(augment[name] for name in ("centre", "crop", "rotate", "flip_p", "vertical_flip_p")):
        ratio = 4 / 3 if augment["crop"] else 1
        left, top, width, height = rectangle(uniform, 1 - augment["crop"], 1, ratio)
        kept = 1 - augment["centre"]
        left, width = (1 - kept) / 2 + kept * left, kept * width
        angle = uniform(-1, 1) * augment["rotate"] * sometimes(augment["rotate_p"])
        flips = sometimes(augment["flip_p"]), sometimes(augment["vertical_flip_p"])
        images = crop_rotate_flip(images, left, top, width, height, angle, *flips)
    if augment["jitter_p"]:
        chosen = sometimes(augment["jitter_p"])
        factors = [1 + chosen * augment["jitter"] * uniform(-1, 1) for _ in range(3)]
        images = jitter_colours(images, *factors, chosen * augment["hue"] * uniform(-1, 1))
    # Blur is expensive, so only some images go through it: blur_p * count, stochastic rounding.
    blurred = int(augment["blur_p"] * count + torch.rand(()))
    if blurred and augment["blur"]:
        chosen = torch.rand(count, device=device).argsort()[:blurred]
        sigma = uniform(min(0.1, augment["blur"]), augment["blur"])[:blurred]
        images[chosen] = gaussian_blur(images[chosen], sigma, augment["blur"])
    # With Python numbers: a tensor from the host would make the host wait for the GPU.
    for channel, mean, std in zip(images.unbind(1), *NORMALISATION[images.shape[1]], strict=True):
        channel.sub_(mean).div_(std)
    if augment["erase_p"]:
        # After the normalisation 0 is the mean grey of ImageNet.
        left, top, width, height = rectangle(uniform, 0.02, 0.33, 3.3)
        images = erase(images, left, top, width * sometimes(augment["erase_p"]), height)
    return images


def rectangle(uniform, smallest, largest, ratio):
    """Random rectangles: left, top, width, height [N], as fractions of the image's side.

    uniform            (low, high) -> random numbers [N]
    smallest, largest  area, as a fraction of the image's; ratio: largest ratio of the sides
    [our choice] A side longer than the image is cut to it, where torchvision samples again.
    """
    area, ratio = uniform(smallest, largest), torch.exp(uniform(-1, 1) * math.log(ratio))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    return uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height), width, height


def crop_rotate_flip(images, left, top, width, height, angle, flip, vertical_flip):
    """Crop, resize to the old size, rotate, flip: one affine map and one bilinear resampling.

    images                    float32 [N, channels, side, side]; the same shape is returned
    left, top, width, height  float32 [N], the crop as fractions of the side
    angle                     float32 [N], degrees counter-clockwise
    flip, vertical_flip       float32 [N], 1 to flip, 0 not to
    Outside of the image a view is black.
    """
    # From a pixel of the view back to the image: flip, rotate, shrink to the crop, move to it. Both
    # coordinates run from -1 to 1. F.affine_grid gives the same grid, but is slower on a CPU.
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    flip, vertical_flip = 1 - 2 * flip, 1 - 2 * vertical_flip
    place = (2 * torch.arange(images.shape[-1], device=images.device) + 1) / images.shape[-1] - 1
    column = torch.stack([width * cos * flip, height * sin * flip])  # [2, N]
    row = torch.stack([-width * sin * vertical_flip, height * cos * vertical_flip])  # [2, N]
    shift = torch.stack([2 * left + width - 1, 2 * top + height - 1])  # [2, N]
    across, down = column[..., None] * place + shift[..., None], row[..., None] * place
    grid = across[:, :, None, :] + down[:, :, :, None]  # [2, N, side, side]
    return F.grid_sample(images, grid.permute(1, 2, 3, 0), align_corners=False)


def jitter_colours(images, brightness, contrast, saturation, hue):
    """Change brightness, contrast, saturation (factors [N]) and hue (fraction of a circle [N]).

    images  float32 [N, channels, height, width] in [0, 1]; the same shape is returned
    Grey images have no saturation and hue.
    """
    grey = images
    if images.shape[1] == 3:
        # In YIQ the first coordinate is the grey level, and the other two span the colours. So
        # saturation is a factor and hue a rotation of a plane: one 3 x 3 matrix for each image.
        # [our choice] torchvision rotates the hue in HSV, which no matrix can.
        yiq = [[0.299, 0.587, 0.114], [0.596, -0.275, -0.321], [0.212, -0.523, 0.311]]
        to_yiq = torch.tensor(yiq, device=images.device)
        cos = saturation * torch.cos(2 * math.pi * hue)
        sin = saturation * torch.sin(2 * math.pi * hue)
        one, zero = torch.ones_like(cos), torch.zeros_like(cos)
        rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
        matrix = to_yiq.inverse() @ torch.stack(rows, 1).view(-1, 3, 3) @ to_yiq
        images = torch.einsum("nij,njhw->nihw", matrix, images)
        grey = torch.einsum("c,nchw->nhw", to_yiq[0], images)
    # contrast * (brightness * pixel) + (1 - contrast) * (brightness * mean), in one pass.
    mean = brightness * grey.flatten(1).mean(1)
    shift, factor = (1 - contrast) * mean, contrast * brightness
    return (images * factor.view(-1, 1, 1, 1)).add_(shift.view(-1, 1, 1, 1)).clamp_(0, 1)


def gaussian_blur(images, sigma, largest):
    """Blur images [N, channels, height, width] with standard deviations sigma [N] <= largest."""
    # A Gaussian is close to 0 beyond three standard deviations.
    radius = math.ceil(3 * largest)
    distance = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.softmax(-distance.square() / (2 * sigma.square()[:, None]), 1)
    # A Gaussian is a separable kernel: rows first, then columns. As a depthwise convolution, with
    # all images as its channels, each image has a kernel of its own.
    weights = weights.repeat_interleave(images.shape[1], 0)
    blurred = F.pad(images.flatten(0, 1)[None], [radius] * 4, mode="reflect")
    blurred = F.conv2d(blurred, weights[:, None, None, :], groups=len(weights))
    blurred = F.conv2d(blurred, weights[:, None, :, None], groups=len(weights))
    return blurred.view(images.shape)


def erase(images, left, top, width, height):
    """Set a rectangle of each image [N, channels, height, width] to 0, in place; fractions [N]."""

    def inside(start, length, side):
        """1 for the pixels of a row or column from start to start + length, else 0: [N, side]."""
        place = (torch.arange(side, device=images.device) + 0.5) / side
        return ((place >= start[:, None]) & (place < (start + length)[:, None])).float()

    rows, columns = inside(top, height, images.shape[-2]), inside(left, width, images.shape[-1])
    return images.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])


# ---- 8. Data -------------------------------------------------------------------------------------


@dataclass
class Data:
    """Images, labels and a split. Can be made by hand.

    name         str; results go to runs/<name>/
    images       uint8 [n, 1 or 3, height, width], in memory or memory-mapped
    targets      float32 [n, C]: 0, 1 or NaN = not known. A row of NaN is an unlabelled image.
    classes      names of the columns of targets
    names        names of the images
    train, test  int64 indices. Unlabelled images are not in test.
    multilabel   True: each class is a yes or no (sigmoid). False: one class an image (softmax), and
                 a row that is not completely known counts as unlabelled.
    Raises UserError, which names the first wrong image.
    """

    name: str
    images: np.ndarray
    targets: np.ndarray
    classes: list
    names: list
    train: np.ndarray
    test: np.ndarray
    multilabel: bool

    def __post_init__(self):
        self.images = np.asanyarray(self.images)
        self.targets = np.asarray(self.targets, np.float32)
        self.train, self.test = np.asarray(self.train, np.int64), np.asarray(self.test, np.int64)
        self.classes, self.names = list(map(str, self.classes)), list(map(str, self.names))
        count, used = len(self.names), np.concatenate([self.train, self.test])
        require(
            self.images.dtype == np.uint8
            and self.images.shape[:-2] in ((count, 1), (count, 3))
            and self.targets.shape == (count, len(self.classes)),
            "not uint8 images [n, 1 or 3, height, width], targets [n, classes] and n names",
        )
        require(len(self.train), "there is no training image")
        require(len(self.test), "there is no labelled test image; name some in a column split")
        require(used.min() >= 0 and used.max() < count, "train and test must be indices of images")
        require(len({*self.classes} - {""}) == len(self.classes), "class names are equal or empty")
        require(self.multilabel or len(self.classes) > 1, "one class an image needs two classes")
        last = {name: index for index, name in enumerate(self.names)}
        one_hot = (self.targets == 1).sum(1) == 1
        for right, rule in (
            (np.arange(count) == [last[name] for name in self.names], "is there twice"),
            (np.bincount(used, minlength=count) < 2, "is in train and test twice"),
            (np.isin(np.nan_to_num(self.targets), (0, 1)).all(1), "has a wrong target"),
            (self.multilabel | ~self.known | one_hot, "is not one-hot"),
            (self.known | ~np.isin(np.arange(count), self.test), "is in test without label"),
        ):
            require(right.all(), f"image {self.names[right.argmin()]} {rule}")

    @property
    def known(self):
        """bool [n]: whether an image is labelled."""
        known = ~np.isnan(self.targets)
        return known.any(1) if self.multilabel else known.all(1)


def load_data(name, root=None, size=64, cache=None, uncertain="zeros", partial=False):
    """Load a data set and print a line that describes it. Returns Data.

    name       digits, cxr14, chexpert, isic2018, a folder, or a MedMNIST .npz file
    root       folder of cxr14, chexpert or isic2018; data/<name> unless given
    size       side in pixels of the square to which image files are resized
    cache      folder for the resized images; the folder of the data unless given
    uncertain  CheXpert's -1: "zeros", "ones", or "ignore" (not known; in test images 0)
    partial    bool: use only the image files that are there
    Raises UserError if a file is missing or wrong.
    """
    loaders = dict(cxr14=load_cxr14, isic2018=load_isic2018)
    loaders["chexpert"] = lambda root: load_chexpert(root, uncertain)
    root = Path(root or f"data/{name}") if name in loaders else Path(name)
    try:
        if name == "digits":
            data = load_digits()
        elif root.suffix == ".npz":
            data = load_npz(root)
        else:
            rows, classes, channels, multilabel = loaders.get(name, load_folder)(root)
            rows = [row for row in rows if not partial or os.path.exists(row.path)]
            require(rows, f"no image file of {name} is in {root}")
            names, paths = [row.name for row in rows], [row.path for row in rows]
            targets, parts = [row.targets for row in rows], np.array([row.part for row in rows])
            train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
            channels = channels or count_channels(paths)
            # Images that need no memory: first all other parts are checked.
            images = np.broadcast_to(np.uint8(0), (len(rows), channels, size, size))
            data = Data(title_of(name), images, targets, classes, names, train, test, multilabel)
            # Two folders may have files of the same names.
            folder = Path(cache, *root.resolve().parts[1:]) if cache else root
            data.images = load_images(names, paths, size, channels, folder)
    except UserError:
        raise
    except Exception as error:
        text = " ".join(f"cannot read {root} ({type(error).__name__}: {error})".split())
        raise UserError(f"{text}; see README.md") from None
    describe(data)
    return data


def describe(data):
    """Print what was understood: images, labels, split and the positives of each class."""
    used = np.isin(np.arange(len(data.names)), np.concatenate([data.train, data.test]))
    labelled, kind = used & data.known, "multi-label" if data.multilabel else "one class an image"
    counts = map("{} {:,.0f}".format, data.classes, np.nansum(data.targets[labelled], 0))
    print(f"{data.name}: {len(used):,} images, {labelled.sum():,} labelled, ", end="")
    print(f"{(used & ~data.known).sum():,} unlabelled, {(~used).sum():,} not used; ", end="")
    print(f"{len(data.train):,} train, {len(data.test):,} test; {kind}: {', '.join(counts)}")


def title_of(name):
    """The name of a data set in runs/: of a folder or an .npz file its last part."""
    return Path(name).resolve().name.removesuffix(".npz")


def choose_labelled(data, labels, seed):
    """Choose the labelled training images. The others count as unlabelled.

    labels  fraction of each class if < 1; number of images if >= 1; "all"; or the path of a file
            with one image name a line
    seed    int, of the random sample
    Returns int64 indices, ascending. Raises UserError if a number or a file does not match.

    [ACPL] A fraction: for each class, "No Finding" counted as one class, this fraction of its
    images at random; the union of these. A fraction of all images could miss rare classes.
    [our choice] Rounded to the nearest number, at least one; [ACPL] there rounded down. A number:
    as many of each class as can be, the rest from classes at random; multi-label: one of each
    class, then images at random.
    """
    pool = data.train[data.known[data.train]]
    if labels != "all" and isinstance(labels, (str, os.PathLike)):
        wanted, names = set(read_lines(labels)), [data.names[index] for index in pool]
        other = sorted(wanted.difference(names))
        require(wanted and not other, f"--labels {labels}: no labelled training image {other[:1]}")
        return np.sort(pool[[name in wanted for name in names]])
    if labels == "all":
        return np.sort(pool)
    random, positive = np.random.RandomState(seed), data.targets[pool] == 1
    # Each class in random order. Without a positive target: "No Finding", which multi-class data
    # does not have.
    classes = [random.permutation(pool[column]) for column in [*positive.T, ~positive.any(1)]]
    if 0 < labels < 1:
        counts = [max(1, math.floor(labels * len(members) + 0.5)) for members in classes]
        chosen = [members[:count] for members, count in zip(classes, counts, strict=True)]
        return np.unique(np.concatenate(chosen))
    # The place of an image in the order of its class, in the first order if it is in several.
    place = np.full(len(data.names), len(data.names))
    for members in classes:
        place[members] = np.minimum(place[members], np.arange(len(members)))
    if data.multilabel:
        place = np.minimum(place, 1)
    least = (place == 0).sum()
    right = labels % 1 == 0 and least <= labels <= len(pool)
    ends = f"{least}, one of each class, to {len(pool)}, all labelled images"
    require(right, f"--labels {labels} is not from {ends}")
    order = np.lexsort([random.random_sample(len(pool)), place[pool]])
    return np.sort(pool[order[: int(labels)]])


def load_digits():
    """scikit-learn's digits: 1,797 grey scans, 8 x 8 pixels, 10 classes. 80 % train, stratified."""
    images, digits = datasets.load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = [f"digit{index:04d}" for index in range(len(images))]
    train, test = model_selection.train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits, random_state=0
    )
    return Data("digits", images, np.eye(10)[digits], range(10), names, train, test, False)


def load_npz(path):
    """A 2D set of MedMNIST (arXiv 2110.14795): {train,val,test}_{images,labels}; val is train.

    Labels are class numbers [n, 1] or [n], or 0 and 1 [n, K] (multi-label). -1 is not labelled.
    """
    images, labels = [], []
    # Not with allow_pickle: object arrays could run code.
    with np.load(path) as file:
        for part in ("train", "val", "test"):
            keys = [f"{part}_images", f"{part}_labels"]
            gone = [key for key in keys if key not in file]
            require(not gone, f"{path}: {gone} is missing; it needs images and labels of each part")
            x, y = (file[key] for key in keys)
            right_x = x.dtype == np.uint8 and (x.ndim == 3 or x.shape[3:] in ((1,), (3,)))
            right_y = y.dtype.kind in "iu" and y.ndim in (1, 2) and len(x) == len(y)
            require(
                right_x and right_y,
                f"{path}: {keys[0]} is {x.dtype} {x.shape}, {keys[1]} is {y.dtype} {y.shape}; "
                "images must be 2D and uint8, 0 to 255: [n, side, side] or [n, side, side, 3]; "
                "labels integers with the same n: class numbers [n, 1], or 0 and 1 [n, K]",
            )
            images.append(x.reshape(*x.shape[:3], -1))
            labels.append(y.reshape(len(y), -1).astype(np.int64))
    first_test = len(labels[0]) + len(labels[1])
    images, labels = np.concatenate(images).transpose(0, 3, 1, 2), np.concatenate(labels)
    multilabel = labels.shape[1] > 1
    count = 2 if multilabel else len(np.unique(labels[labels >= 0]))
    wrong = np.setdiff1d(labels, range(-1, count))
    remedy = "number the classes without gaps; -1 is not labelled"
    require(not len(wrong), f"{path}: label {wrong[:1]} is not from 0 to {count - 1}; {remedy}")
    targets = np.where(labels < 0, np.nan, labels if multilabel else labels == np.arange(count))
    index, labelled = np.arange(len(labels)), (labels >= 0).any(1)
    # Unlabelled images of the test part are in neither part.
    train, test = index[:first_test], index[first_test:][labelled[first_test:]]
    names, classes = [f"image{row:06d}" for row in index], range(targets.shape[1])
    return Data(title_of(path), images, targets, classes, names, train, test, multilabel)


@dataclass
class Row:
    """An image file, as a loader finds it. A loader returns (rows, classes, channels, multilabel).

    targets  0, 1 or NaN (not known) for each class
    part     train, test, or "": not used, or not given in a folder
    group    of a folder: images of one group stay on one side of the split
    """

    name: str
    path: str
    targets: list
    part: str
    group: str = ""


# fmt: off
CXR14_CLASSES = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
]
# fmt: on


def load_cxr14(root):
    """NIH Chest X-ray14: 14 findings, the official lists of training and test images."""
    # The name of the newer table, ..._v2020.csv, is the larger one.
    table = max(root.glob("Data_Entry_2017*.csv"), default=root / "Data_Entry_2017_v2020.csv")
    # Only the first two columns count. Names in the header have commas without quotes.
    findings = dict(line.split(",", 2)[:2] for line in read_lines(table)[1:])
    target_of = dict(zip([*CXR14_CLASSES, "No Finding"], np.eye(15, 14), strict=True))
    folders = [root / "images", root / "data", *sorted(root.glob("images_*/images"))]
    path_of = {}
    for folder in filter(Path.is_dir, folders):
        for file in sorted(os.listdir(folder)):
            if file.lower().endswith(ENDINGS):
                # An image may have another ending, such as .jpg. The name in the lists comes first.
                path_of.setdefault(os.path.splitext(file)[0], f"{folder}/{file}")
                path_of[file] = f"{folder}/{file}"
    rows = []
    for part, names in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        for name in read_lines(root / names):
            require(name in findings, f"{table}: no row for {name}, which is in {names}")
            targets = sum(target_of[label] for label in findings[name].split("|"))
            path = path_of.get(name) or path_of.get(os.path.splitext(name)[0])
            rows.append(Row(name, path or f"{folders[0]}/{name}", targets, part))
    return rows, CXR14_CLASSES, 1, True


def load_chexpert(root, uncertain):
    """CheXpert: 14 observations, all images of train.csv. 70 % of the patients train, 20 % test.

    [our choice] 10 % are in neither part, for tuning. A blank is negative. For -1 the CheXpert
    paper has U-Zeros, U-Ones and U-Ignore.
    """
    table = max(root.glob("CheXpert-v1.0*/train.csv"), default=root / "train.csv")
    header, cells = read_table(table)
    # Images are beside the table in train/, or in folders "CheXpert-v1.0 batch 2 (train 1)" to 4.
    folders = [table.parent / "train", *sorted(table.parent.parent.glob("CheXpert-v1.0 batch*"))]
    folder_of = {
        patient: folder for folder in folders if folder.is_dir() for patient in os.listdir(folder)
    }
    value, rows = {"": 0, "0.0": 0, "1.0": 1}, []
    for path, *others in cells.values():
        # The path starts with the name of the archive; the patient comes after "train".
        name = path.partition("/")[2]
        patient, _, rest = name.partition("/")[2].partition("/")
        tenth = zlib.crc32(patient.encode()) % 10
        part = "test" if tenth < 2 else "" if tenth == 2 else "train"
        value["-1.0"] = dict(zeros=0, ones=1, ignore=0 if part == "test" else np.nan)[uncertain]
        path = f"{folder_of.get(patient, folders[0])}/{patient}/{rest}"
        rows.append(Row(name, path, [value[cell] for cell in others[4:]], part))
    return rows, header[5:], 1, True


def load_isic2018(root):
    """ISIC2018 task 3: photographs of skin lesions, 7 classes. 80 % of the lesions train."""
    prefix = "ISIC2018_Task3_Training_"
    header, cells = read_table(root / f"{prefix}GroundTruth" / f"{prefix}GroundTruth.csv")
    groupings = next(root.rglob(f"{prefix}LesionGroupings.csv"), None)
    pairs = read_table(groupings)[1].values() if groupings else []
    lesion = {image: group for image, group, *_ in pairs}
    rows = []
    for name, *targets in cells.values():
        part = "test" if in_fifth(lesion.get(name, name)) else "train"
        rows.append(Row(name, f"{root}/{prefix}Input/{name}.jpg", list(map(float, targets)), part))
    alone = sum(row.name not in lesion for row in rows)
    if alone:
        most = min(alone, sum(row.part == "test" for row in rows))
        print(
            f"warning: {alone:,} of {len(rows):,} images have no lesion in {groupings or root}: up "
            f"to {most:,} lesions could have images in train and in test. Add "
            f"{prefix}LesionGroupings.csv"
        )
    return rows, header[1:], 3, False


def load_folder(root):
    """A folder of images, at any depth, with a table labels.csv or with class folders.

    labels.csv     columns: see read_labels. Images that are not in it are unlabelled.
    class folders  train/<class>/ and test/<class>/; all other images are unlabelled.
    Without a given split, a fifth of the labelled groups is the test set.
    """
    table, (files, others) = root / "labels.csv", find_images(root)
    require(files, f"{root} is not a folder with images ({' '.join(ENDINGS)})")
    endings = Counter(Path(name).suffix.lower() or name for name in others)
    if endings:
        print("left out, not images:", ", ".join(f"{n} {end}" for end, n in endings.items()))
    if table.exists():
        classes, rows = read_labels(table)
    else:
        require((root / "train").is_dir(), f"{root}: no labels.csv and no folder train")
        classes, rows = read_class_folders(files)
        table = root / "train"
    rows = find_files(rows, root, files, table, classes)
    multilabel = choose_task(rows, table)
    split_groups(rows, table)
    return rows, classes, None, multilabel


def find_files(rows, root, files, table, classes):
    """Find the file of each row, and add a row for each other file, unlabelled. Sorted by name.

    A file can have several names: upper and lower case, a/../b, a link. So files are compared, not
    names, and two rows of one file raise an error.
    """
    in_lower_case, found = {name.lower(): name for name in files}, {}
    for row in rows:
        path = root / row.name.replace("\\", "/")
        if not path.exists():
            other = os.path.relpath(path, root).replace("\\", "/").lower()
            path = root / in_lower_case.get(other, row.name)
        row.path = str(path)
        first = found.setdefault(identity(path), row)
        require(first is row, f"{table}: {first.name} and {row.name} are one file, there twice")
    for name in files:
        unlabelled = Row(name, f"{root}/{name}", [np.nan] * len(classes), "")
        found.setdefault(identity(root / name), unlabelled)
    return sorted(found.values(), key=lambda row: row.name)


def choose_task(rows, table):
    """Whether the task is multi-label. Multi-class: targets become completely known or unknown.

    Multi-class: each completely known row has exactly one 1, and no row has two. There a row with
    one 1 and blanks is that class; a row of zeros and blanks is of no use, it becomes unlabelled.
    """
    targets = np.array([row.targets for row in rows], np.float32)
    remedy = "write the zeros of each class, a blank is not a 0"
    require((targets == 0).any(), f"{table}: no 0 in it; {remedy}")
    ones, known = (targets == 1).sum(1), ~np.isnan(targets)
    complete = known.all(1)
    one_hot = complete.any() and (ones[complete] == 1).all() and ones.max() == 1
    if targets.shape[1] == 1 or not one_hot:
        return True
    targets[ones == 1] = np.nan_to_num(targets[ones == 1])
    useless = known.any(1) & (ones == 0)
    targets[useless] = np.nan
    if useless.any():
        print(f"warning: {table}: {useless.sum()} rows have zeros and blanks, but no 1: unlabelled")
    for row, values in zip(rows, targets, strict=True):
        row.targets = values
    return False


def split_groups(rows, table):
    """Set the part of each row. A group with a labelled test image is in test.

    Unlabelled images of such a group, or with the part test, are in neither part.
    """
    labelled = {row.name for row in rows if not np.isnan(row.targets).all()}
    for row in rows:
        row.group = row.group or row.name
    if not any(row.part for row in rows if row.name in labelled):
        for row in rows:
            if row.name in labelled and in_fifth(row.group):
                row.part = "test"
    tested = {row.group for row in rows if row.name in labelled and row.part == "test"}
    for row in rows:
        side = "test" if row.group in tested else "train"
        if row.name not in labelled and "test" in (side, row.part):
            row.part = ""
            continue
        fits = row.part in ("", side)
        require(fits, f"{table}: group {row.group} is in train and in test; see {row.name}")
        row.part = side


# What the names of columns and the cells of labels.csv mean, in lower case.
COLUMNS = {name: name for name in ("image", "group", "split", "label")}
COLUMNS |= dict.fromkeys(("file_name", "filename", "image_path", "path"), "image")
COLUMNS |= dict(patient_id="group", patient="group", is_valid="split", is_test="split")
COLUMNS |= dict(labels="label")
YES, NO, BLANK = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no"), ("", "nan", "na")
TARGETS = dict.fromkeys(YES, 1) | dict.fromkeys(NO, 0) | dict.fromkeys(BLANK, np.nan)
PARTS = dict.fromkeys((*YES, "test"), "test") | dict.fromkeys((*NO, "train"), "train")
PARTS |= dict.fromkeys(BLANK, "")


def column_of(name):
    """The meaning of a column of labels.csv; the name itself if it is a class."""
    return COLUMNS.get(name.lower().replace(" ", "_"), name)


def read_labels(table):
    """Read labels.csv. Returns its classes and rows, without their paths.

    Columns: image; either one for each class, with 1, 0 or blank = not known, or one column label
    with the name of the class, or of several joined by |; if wanted, group (images of one group
    stay on one side) and split. COLUMNS has their other names.
    """
    header, cells = read_table(table)
    header = list(map(column_of, header))
    require(len({*header}) == len(header), f"{table}: two columns have one meaning: {header}")
    require("image" in header, f"{table}: needs a column image, and one for each class, or label")
    classes, words = [name for name in header if name not in COLUMNS], {}
    if "label" in header:
        if classes:
            print(f"{table}: columns not read: {', '.join(classes)}")
        for number, row in cells.items():
            parts = [part.strip() for part in row[header.index("label")].split("|")]
            words[number] = {part for part in parts if part.lower() not in BLANK}
        classes = sorted(set().union(*words.values()))
        require(len(classes) > 1, f"{table}: column label needs two or more classes, not {classes}")
    require(classes, f"{table}: needs a column for each class, or a column label that is filled")

    rows = []
    for number, row in cells.items():
        row = dict(zip(header, row, strict=True))
        place = f"{table}, row {number} ({row['image']}), column"
        require(row["image"], f"{place} image: it is blank")
        if words:
            targets = [name in words[number] if words[number] else np.nan for name in classes]
        else:
            wanted = "1, 0 or blank; write one of them, or remove the column if it is no class"
            targets = [meaning(TARGETS, row[name], f"{place} {name}", wanted) for name in classes]
        wanted = "train, test or blank; write one of them"
        part = meaning(PARTS, row.get("split", ""), f"{place} split", wanted)
        rows.append(Row(row["image"], "", targets, part, row.get("group", "")))
    return classes, rows


def meaning(values, cell, place, wanted):
    """The value of a cell. Raises UserError with the place and what is wanted there."""
    require(cell.lower() in values, f"{place}: {cell!r} is not {wanted}")
    return values[cell.lower()]


def read_class_folders(files):
    """Classes and rows, without their paths, of files train/<class>/... and test/<class>/..."""
    inside = [name for name in files if name.startswith(("train/", "test/"))]
    class_of = {name: name.split("/")[1] for name in inside if name.count("/") > 1}
    classes = sorted({one for name, one in class_of.items() if name.startswith("train/")})
    rows = []
    for name in inside:
        own, part = class_of.get(name), "test" if name.startswith("test/") else ""
        require(own is None or own in classes, f"{name}: no folder train/{own}")
        targets = [one == own if own else np.nan for one in classes]
        rows.append(Row(name, "", targets, part))
    require(len(classes) > 1, f"folder train needs two or more class folders, not {classes}")
    return classes, rows


def find_images(root):
    """Names of the image files of a folder, at any depth, through links, and of its other files.

    Left out: what is hidden and what this program writes. A folder that links lead back to is read
    once.
    """
    images, others, seen = [], [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if identity(folder) in seen:
            folders.clear()
            continue
        seen.add(identity(folder))
        at_top = Path(folder) == Path(root)
        if not at_top and {"views.png", "log.jsonl"} <= {*names}:
            # An output folder of this program.
            continue
        for path in (Path(folder, name) for name in sorted(names) if name[0] != "."):
            ours = at_top and path.name in ("labels.csv", "views.png")
            if not ours and path.suffix not in (".uint8", ".part"):
                kind = images if path.suffix.lower() in ENDINGS else others
                kind.append(path.relative_to(root).as_posix())
    return images, others


def identity(path):
    """What is equal for all names of one file: device and number. The path if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return str(path)
    return found.st_dev, found.st_ino


def in_fifth(group):
    """Whether a lesion or a group is one of a fifth, always the same: the test set."""
    return zlib.crc32(group.encode("utf-8", "surrogateescape")) % 5 == 0


def read_text(path):
    """The text of a file: UTF-8, or UTF-16 with a byte order mark. Raises UserError."""
    content = Path(path).read_bytes()
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text in UTF-8; save it as CSV UTF-8") from None


def read_lines(path):
    """The lines of a text file, without empty lines."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_table(path):
    """A table with commas, semicolons or tabs. Returns header and {line number: cells}, all str.

    Empty rows are left out. Raises UserError if a row is longer or shorter than the header.
    """
    text = read_text(path)
    first = next(filter(str.strip, text.splitlines()), "")
    # A name of a class may have other delimiters in it.
    delimiter = max(
        ",;\t", key=lambda each: ("image" in map(column_of, first.split(each)), first.count(each))
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    table = {}
    for row in reader:
        if any(map(str.strip, row)):
            table[reader.line_num] = [cell.strip() for cell in row]
    require(table, f"{path} is empty")
    header = table.pop(min(table))
    for number, row in table.items():
        require(len(row) == len(header), f"{path}: row {number} is longer or shorter than row 1")
    return header, table


# ---- 9. Decoding ---------------------------------------------------------------------------------

# What Pillow reads, in lower case.
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif")


@contextlib.contextmanager
def open_image(path):
    """Pillow's image of a file, in a with statement. Raises UserError if it cannot be used."""
    try:
        with Image.open(path) as image:
            # Pillow would cut 16 bits to 8, at white or at the lowest bits.
            deep = image.mode[0] in "IF" or re.search(";16[BLN]", str(image.tile))
            # TIFF: tag 258 is BitsPerSample.
            bits = np.max(getattr(image, "tag_v2", {}).get(258, 8))
            require(not deep and bits <= 8, "more than 8 bits a channel, scale them to 0 to 255")
            yield image
    except Exception as error:
        raise UserError(f"cannot read image {path} ({error}); replace it or remove it") from None


def decode(path, size, channels):
    """One image file as uint8 [channels, size, size]. Raises UserError if it is broken."""
    with open_image(path) as image:
        mode, square = "L" if channels == 1 else "RGB", (size, size)
        # JPEG only: decode at 1/2, 1/4 or 1/8 of the size, at least twice ours. Much faster. The
        # sides may be no whole numbers then; the box has them exactly.
        reduced = image.draft(None, (2 * size, 2 * size))
        if reduced:
            image = image.convert(mode).resize(square, Image.BILINEAR, reduced[1])
        upright = ImageOps.exif_transpose(image).convert(mode)
        return np.stack(upright.resize(square, Image.BILINEAR).split())


def count_channels(paths):
    """1 if all images are grey, else 3."""
    for path in filter(os.path.exists, paths):
        with open_image(path) as image:
            if image.mode not in ("1", "L", "LA"):
                return 3
    return 1


def stat_of(path):
    """Size and time of the last change of a file; -1 twice if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


# The row of an image in a file of decoded images: size and time of the image file when it was
# decoded, and the CRC-32 of its pixels.
HEAD = np.dtype([("stat", "<i8", (2,)), ("crc", "<u4")])


def load_images(names, paths, size, channels, folder):
    """The decoded images, uint8 [n, channels, size, size], memory-mapped from a file in a folder.

    The file has a row of HEAD for each image, then the pixels. Images that are not in it yet, or
    whose files have changed, are decoded. So a stopped decoding goes on.
    """
    key = zlib.crc32("\0".join(names).encode("utf-8", "surrogateescape"))
    file = Path(folder, f"{size}px-{channels}-{key:08x}.uint8")
    shape = (len(paths), channels, size, size)
    while True:
        stats = np.array([stat_of(path) for path in paths])
        head = np.zeros(len(paths), HEAD)
        if stat_of(file)[0] == head.nbytes + math.prod(shape):
            head = np.fromfile(file, HEAD, len(paths))
        done = head["stat"][:, 0] > 0
        changed = done & (stats[:, 0] >= 0) & (head["stat"] != stats).any(1)
        if done.all() and not changed.any():
            pixels = np.memmap(file, np.uint8, "r", head.nbytes, shape)
            # checksum_of takes them, so that it need not read all pixels.
            pixels.crc = head["crc"]
            return pixels
        # Of several processes the first decodes, and the others wait.
        if RANK == 0:
            decode_to(file, paths, shape, stats, head, done & ~changed)
        time.sleep(1 if RANK else 0)


def decode_to(file, paths, shape, stats, head, done):
    """Decode the images that are not done, and write pixels and heads to the file.

    Two processes may do so at the same time: both write the same. Raises UserError if an image file
    is missing, broken, or changes meanwhile.
    """
    gone = [paths[index] for index in np.flatnonzero(~done & (stats[:, 0] < 0))]
    there = f"{len(gone):,} of {len(paths):,} image files are missing, such as {gone[:1]}"
    remedy = "add them or correct the table; for cxr14, chexpert, isic2018 there is --partial"
    require(not gone, f"{there}; {remedy}")
    length = math.prod(shape[1:])
    total = head.nbytes + len(paths) * length
    file.parent.mkdir(parents=True, exist_ok=True)
    if (head["stat"][~done] > 0).any():
        print(f"images have changed since they were decoded to {file}: decoded again")
        # In a copy: another process may be training on the old pixels.
        copied = file.with_suffix(f".{os.urandom(4).hex()}.part")
        shutil.copyfile(file, copied)
        os.replace(copied, file)
    if stat_of(file)[0] != total:
        file.unlink(missing_ok=True)
        file.touch()

    def attempt(index):
        """The pixels of an image whose file did not change meanwhile."""
        pixels = decode(paths[index], *shape[2:0:-1]).tobytes()
        unchanged = stat_of(paths[index]) == tuple(stats[index])
        require(unchanged, f"image {paths[index]} changed while it was read; run this again")
        return pixels

    todo = np.flatnonzero(~done)
    bar = tqdm(total=len(todo), desc="decode", unit="image")
    with open(file, "r+b") as stream, ThreadPoolExecutor() as pool, bar:
        stream.truncate(total)
        for block in np.split(todo, range(64, len(todo), 64)):
            for index, pixels in zip(block, pool.map(attempt, block), strict=True):
                stream.seek(head.nbytes + index * length)
                stream.write(pixels)
                head[index] = stats[index], zlib.crc32(pixels)
                bar.update()
            # First the pixels: what stops here leaves no head of an image that is not there.
            stream.flush()
            os.fsync(stream.fileno())
            for index in block:
                stream.seek(index * HEAD.itemsize)
                stream.write(head[index].tobytes())


# ---- 10. Reports and ablation --------------------------------------------------------------------


def classification_metrics(targets, scores, classes, multilabel):
    """Metrics of scores [n, C] for targets [n, C] of 0, 1 or NaN. Returns a dict, all in [0, 1].

    auc       {class: area under the ROC curve over its known targets; None without a positive or
              without a negative, or if its scores are NaN}
    mean_auc  mean over the classes that have an AUC; None if no class has one
    Multi-class also: accuracy, and macro_sensitivity, macro_specificity and macro_f1, means over
    the classes that occur in targets.
    """
    auc = {}
    for name, truth, score in zip(classes, targets.T, scores.T, strict=True):
        known = ~np.isnan(truth)
        defined = 0 < truth[known].sum() < known.sum() and not np.isnan(score).any()
        auc[name] = float(metrics.roc_auc_score(truth[known], score[known])) if defined else None
    values = [value for value in auc.values() if value is not None]
    result = dict(mean_auc=float(np.mean(values)) if values else None, auc=auc)
    if not multilabel:
        truth, prediction = targets.argmax(1), np.nan_to_num(scores).argmax(1)
        # For each class that occurs: true negatives, false positives and so on.
        counts = metrics.multilabel_confusion_matrix(truth, prediction, labels=np.unique(truth))
        tn, fp, fn, tp = counts.reshape(-1, 4).T
        means = dict(
            accuracy=truth == prediction,
            macro_sensitivity=tp / (tp + fn),
            macro_specificity=tn / np.maximum(tn + fp, 1),
            macro_f1=2 * tp / (2 * tp + fp + fn),
        )
        result |= {name: float(np.mean(values)) for name, values in means.items()}
    return result


def report(student, teacher, data, args):
    """Evaluate both networks on the test images and print a table.

    Writes metrics.json and predictions.csv. Returns the dict in metrics.json: the teacher's
    classification_metrics, and the student's under "student". Test images select nothing, neither
    an epoch nor a network.
    """
    targets, out = data.targets[data.test], output_folder(data, args)
    scores = [evaluate(network, data, data.test, args.size) for network in (teacher, student)]
    finite = all(np.isfinite(each).all() for each in scores)
    require(finite, "an output of the network is not finite; use a smaller --lr")
    result, other = (
        classification_metrics(targets, each, data.classes, data.multilabel) for each in scores
    )
    print_metrics(len(targets), dict(teacher=result, student=other))
    result["student"] = other
    write_file(out / "metrics.json", json.dumps(result, indent=1) + "\n")
    names = [data.names[index] for index in data.test]
    write_predictions(out / "predictions.csv", data.classes, names, scores[0])
    print(f"written to {out}: metrics.json, predictions.csv")
    return result


def print_metrics(count, columns):
    """Print results side by side, best class first. n/a: not defined, and not in the mean."""
    results = list(columns.values())
    first = results[0]
    best_first = sorted(first["auc"], key=lambda name: -(first["auc"][name] or 0))
    rows = [(name, [each["auc"][name] for each in results]) for name in best_first]
    rows += [(name, [each[name] for each in results]) for name in first if name != "auc"]
    print(f"{f'AUC on {count:,} test images':27}", *(f"{name:>8}" for name in columns))
    for name, values in rows:
        print(f"{name:27}", *("     n/a" if value is None else f"{value:8.4f}" for value in values))


def write_predictions(path, classes, names, scores):
    """A CSV file with the probabilities [n, C] of images, six significant digits."""
    table = io.StringIO()
    rows = [[name, *map("{:.6g}".format, row)] for name, row in zip(names, scores, strict=True)]
    csv.writer(table, lineterminator="\n").writerows([["image", *classes], *rows])
    write_file(path, table.getvalue())


def retest(data, args):
    """The command evaluate: report a finetune.pt again, or probe what stage 1 learnt."""
    if args.stage == "finetune":
        saved = load_checkpoint(args.start, "finetune")
        require(saved["settings"]["data"] == checksum_of(data), f"{args.start} is of other data")
        return report(*load_networks(args, saved["channels"], data.classes), data, args)
    labelled, targets = choose_labelled(data, args.labels, args.seed), data.targets[data.test]
    seed_torch(args.seed, "finetune")
    _, teacher = load_networks(args, data.images.shape[1], data.classes)
    scores = linear_probe(teacher, data, labelled, args.size)
    result = classification_metrics(targets, scores, data.classes, data.multilabel)
    print(f"linear probe of {args.start} with {len(labelled):,} labelled images, {args.size} px")
    print_metrics(len(targets), dict(probe=result))
    result["start"] = args.start
    first = f"probe-{args.start}.json" if args.start in ("scratch", "imagenet") else "probe.json"
    write_file(output_folder(data, args) / first, json.dumps(result, indent=1) + "\n")
    return result


def linear_probe(network, data, labelled, size):
    """What has stage 1 learnt? The standard test: a linear classifier on frozen features.

    network   stage 1's teacher; its features are what comes before its head
    labelled  int64 indices of the images whose labels are used
    Returns float [n, C], probabilities of the test images; NaN for a class that cannot be fitted.
    [our choice] Logistic regression on standardised features, with scikit-learn's default penalty.
    Multi-label data has one regression for each class.
    """
    network = copy.deepcopy(network)
    network.classifier = nn.Identity()
    known = outputs_of(network, data, labelled, size).numpy()
    unseen = outputs_of(network, data, data.test, size).numpy()
    scores = np.full((len(data.test), len(data.classes)), np.nan)

    def fit(rows, truth):
        """Probabilities [n, classes of truth] and these classes; none if truth has only one."""
        if len(np.unique(truth)) < 2:
            return np.nan, []
        model = linear_model.LogisticRegression(max_iter=1000)
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), model).fit(rows, truth)
        return model.predict_proba(unseen), model.classes_

    targets = data.targets[labelled]
    if not data.multilabel:
        columns, classes = fit(known, targets.argmax(1))
        require(len(classes), "the labelled images are of one class; use more --labels")
        scores[:, classes] = columns
        return scores
    for index, truth in enumerate(targets.T):
        there = ~np.isnan(truth)
        columns, classes = fit(known[there], truth[there])
        if len(classes):
            scores[:, index] = columns[:, 1]
    return scores


# What is each ingredient worth? Leave it out. A row is a start and a command: a stage 1 of STARTS,
# or none, where random and scratch are the first weights of stage 1.
STARTS = dict(jcl="", moco="--keys 1 --covariance-weight 0")
ABLATION = {
    "random + probe": "evaluate",
    "jcl + probe": "evaluate",
    "scratch + supervised": "finetune --consistency 0",
    "scratch + mean teacher": "finetune",
    "moco + mean teacher": "finetune",
    "jcl + supervised": "finetune --consistency 0",
    "jcl + mean teacher": "finetune",
}


def ablate(args):
    """Run the rows of ABLATION with seeds 0 to args.seeds - 1 and each number of labels.

    Each run is a command line, which is printed and can be typed. An option such as --lr is passed
    to all commands that have it. A seed has the same labels in every row. A finished run is only
    evaluated again. Returns the dict in ablation.json, {labels: {row: {metric: [one a seed]}}}.
    """
    out = args.out or f"runs/{title_of(args.data)}/ablation"
    # Wrong settings raise an error before the first run.
    first = parse_args(command_line("pretrain", args.given))
    data = data_for(first)
    for labels in args.labels:
        choose_labelled(data, labels, 0)
    weights = "imagenet" if first.init == "imagenet" else "scratch"
    table = {str(labels): {row: {} for row in ABLATION} for labels in args.labels}
    for seed in range(args.seeds):
        starts = dict(random=weights, scratch=weights)
        for name, words in STARTS.items():
            folder = f"{out}/{name}-{seed}"
            type_command(f"pretrain {words}", args.given | dict(seed=seed, out=folder))
            starts[name] = f"{folder}/pretrain.pt"
        for row, words in ABLATION.items():
            for labels in args.labels:
                folder = f"{row}-{Path(str(labels)).name}-{seed}".replace(" + ", "-")
                more = dict(start=starts[row.split()[0]], labels=labels, seed=seed)
                more["out"] = f"{out}/{folder.replace(' ', '-')}"
                result = type_command(words, args.given | more)
                for metric in sorted(result.keys() - {"auc", "student", "start"}):
                    table[str(labels)][row].setdefault(metric, []).append(result[metric])
        write_file(Path(out, "ablation.json"), json.dumps(table, indent=1) + "\n")
    print_ablation(table, args.seeds)
    return table


def type_command(words, given):
    """Print a command line, with the given options that the command has, and run it."""
    line = command_line(words, given)
    print("\n$ python s2mts2.py", shlex.join(line))
    return execute(parse_args(line))


def print_ablation(table, seeds):
    """Print a table for each metric: a row of ABLATION, a column for each number of labels."""
    names = {metric for rows in table.values() for row in rows.values() for metric in row}
    for metric in sorted(names):
        print(f"\n{metric}, mean +- standard deviation of seeds 0 to {seeds - 1}")
        print(f"{'labels':24}", *(f"{labels:>16}" for labels in table))
        for row in ABLATION:
            cells = []
            for rows in table.values():
                values = rows[row].get(metric, [None])
                defined = None not in values
                cells.append(
                    f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}" if defined else "n/a"
                )
            print(f"{row:24}", *(f"{cell:>16}" for cell in cells))


# ---- 11. Runs and checkpoints [plumbing] ---------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix. The text is one line and says what to do."""


def require(condition, message):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


# A checkpoint of another version is refused.
VERSION = 2
OUTPUTS = dict(
    pretrain=("pretrain.pt", "views.png", "probe.json"),
    finetune=("finetune.pt", "labelled.txt", "metrics.json", "predictions.csv"),
)


class Run:
    """A stage in its output folder: settings, checkpoint, log and bar.

    data, args  as for the stage          images_per_epoch  int, of all processes
    state       dict of the modules, the optimizer and tensors to save
    labelled    int64 indices, stage 2
    epochs_done counts the epochs of an earlier checkpoint that was loaded into state.
    """

    def __init__(self, data, args, images_per_epoch, state, labelled=()):
        self.args, self.state, self.images_per_epoch = args, state, images_per_epoch
        self.history, self.folder = [], output_folder(data, args)
        self.path = self.folder / f"{args.command}.pt"
        # Plain values, whatever a notebook gave.
        plain = json.loads(json.dumps(vars(args), default=str))
        # The others do not change the result, or a checksum covers them.
        left_out = {*OPTIONS, "augment", "command", "given"} - {"seed", "amp"}
        settings = {name: value for name, value in plain.items() if name not in left_out}
        # The first weights: another stage 1 is another run of stage 2.
        networks = [state[name].state_dict().values() for name in ("student", "teacher")]
        first = checksum(*(weight.cpu() for weights in networks for weight in weights))
        settings |= plain["augment"] | dict(processes=PROCESSES, data=checksum_of(data))
        settings |= dict(labelled=checksum(np.asarray(labelled, np.int64)), first_weights=first)
        self.constant = dict(version=VERSION, stage=args.command, args=plain, settings=settings)
        self.constant |= dict(classes=data.classes, multilabel=data.multilabel)
        self.constant |= dict(channels=data.images.shape[1])
        if self.path.exists() and not args.fresh:
            self.resume()
        else:
            self.start_over()
        self.epochs_done = done = len(self.history)
        status = "finished" if done == args.epochs else f"{done} epochs done"
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"\n{self.path}, from {args.start or args.init}, {status}: {shown}")
        # What this run has written; another run that writes here would change it.
        self.written = stat_of(self.path)
        if len(labelled):
            names = "".join(f"{data.names[index]}\n" for index in labelled)
            write_file(self.folder / "labelled.txt", names)
        silent = RANK > 0 or done == args.epochs
        look = dict(desc=args.command, unit="image", unit_scale=True, mininterval=0.5)
        total, first = args.epochs * images_per_epoch, done * images_per_epoch
        self.bar = tqdm(total=total, initial=first, disable=silent, **look)

    def resume(self):
        """Load the checkpoint, so that the loop goes on after its last complete epoch."""
        saved, here = load_checkpoint(self.path, self.args.command), self.constant["settings"]
        pairs = {name: (saved["settings"].get(name), value) for name, value in here.items()}
        differ = [f"{name} {a} there and {b} here" for name, (a, b) in pairs.items() if a != b]
        require(not differ, f"{self.path} differs, use --fresh or --out: {'; '.join(differ)}")
        for name, value in self.state.items():
            load = value.copy_ if isinstance(value, torch.Tensor) else value.load_state_dict
            load(saved["state"][name])
        self.history = saved["history"]
        if len(self.history) == self.args.epochs and RANK == 0:
            # The newest checkpoint is that of the last command, also if nothing is left to do.
            self.path.touch()

    def start_over(self):
        """Remove what an earlier run of this stage wrote, so that the loop starts alone."""
        if RANK == 0:
            for name in OUTPUTS[self.args.command]:
                (self.folder / name).unlink(missing_ok=True)
            self.write_log()

    def start_epoch(self, epoch):
        """Seed torch, so that the rest of a resumed loop equals that of an uninterrupted one."""
        seed_torch(self.args.seed, self.args.command, epoch, RANK)
        self.losses, self.began = [], time.perf_counter()

    def step(self, loss, images):
        """Count a step. The loss is read only when the bar is drawn: reading waits for a GPU."""
        self.losses.append(loss.detach())
        if self.bar.update(images):
            self.bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

    def finish_epoch(self):
        """Write log and checkpoint. Ends the loop if the loss or a weight is not finite."""
        epoch, stage = len(self.history), self.args.command
        seconds = time.perf_counter() - self.began
        loss = all_gather(torch.stack(self.losses).mean()[None]).mean().item()
        # The sum of squares: weights that are finite but huge give outputs that are not.
        squares = [weight.square().sum() for weight in self.state["student"].parameters()]
        finite = math.isfinite(loss) and torch.stack(squares).isfinite().all()
        now = f"{stage} epoch {epoch + 1}"
        require(finite, f"{now}: the loss or a weight is not finite; use a smaller --lr")
        lr = self.state["optimizer"].param_groups[0]["lr"]
        speed = self.images_per_epoch / seconds
        line = dict(stage=stage, epoch=epoch, loss=loss, lr=lr, seconds=seconds)
        self.history.append(line | dict(images_per_second=speed))
        self.bar.write(
            f"{now}/{self.args.epochs}: loss {loss:.4f}, "
            f"learning rate {lr:.2g}, {speed:.0f} images/s"
        )
        if RANK == 0:
            alone = stat_of(self.path) == self.written
            require(alone, f"another run has written {self.path}; use another --out")
            # The log before the checkpoint: a run killed between them writes this line again.
            self.write_log()
            self.write_checkpoint()
        if epoch + 1 == self.args.epochs:
            self.bar.close()

    def write_log(self):
        """Replace this stage's lines in log.jsonl by those of the loop so far."""
        path = self.folder / "log.jsonl"
        lines = read_lines(path) if path.exists() else []
        lines = [line for line in lines if f'"stage": "{self.args.command}"' not in line]
        lines += map(json.dumps, self.history)
        write_file(path, "".join(f"{line}\n" for line in lines))

    def write_checkpoint(self):
        """Write all that the loop needs to go on from here."""
        state = {
            name: value if isinstance(value, torch.Tensor) else value.state_dict()
            for name, value in self.state.items()
        }
        checkpoint = io.BytesIO()
        torch.save(self.constant | dict(history=self.history, state=state), checkpoint)
        write_file(self.path, checkpoint.getvalue())
        self.written = stat_of(self.path)


def seed_torch(*parts):
    """Seed torch's generator with a hash of the parts."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))


def checksum(*arrays):
    """CRC-32 of the bytes of arrays."""
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return total


def checksum_of(data):
    """Checksum of names, targets, split and all pixels. Decoded images bring that of theirs."""
    names = str([data.classes, data.names, data.images.shape, len(data.train)])
    pixels = getattr(data.images, "crc", None)
    if pixels is None:
        pixels = np.array([zlib.crc32(np.ascontiguousarray(image)) for image in data.images])
    names = np.frombuffer(names.encode("utf-8", "surrogateescape"), np.uint8)
    return checksum(names, data.targets, data.train, data.test, np.asarray(pixels, np.int64))


def save_views(data, args):
    """views.png: a row for each of 8 training images, one query view and M key views."""
    seed_torch(args.seed, "views")
    images = torch.from_numpy(data.images[data.train[:8]]).repeat_interleave(1 + args.keys, 0)
    views = random_views(images, args.augment, args.size)
    views, png = F.interpolate(views, scale_factor=math.ceil(96 / args.size)), io.BytesIO()
    torchvision.utils.save_image(views, png, "png", nrow=1 + args.keys, normalize=True)
    write_file(output_folder(data, args) / "views.png", png.getvalue())


def output_folder(data, args):
    """Path of the folder for results."""
    return Path(args.out or f"runs/{data.name}")


def write_file(path, content):
    """Write text or bytes and rename: path is the old file or the new one, never half of it."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        text = isinstance(content, str)
        temporary.write_bytes(content.encode("utf-8", "surrogateescape") if text else content)
        os.replace(temporary, path)


def load_checkpoint(path, *stages):
    """The checkpoint of one of the stages, on the CPU. Raises UserError if it is not one."""
    try:
        # weights_only admits tensors and plain values. Other pickles could run code.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        stage = saved["stage"]
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:
        text = f"{path} is not a readable checkpoint ({type(error).__name__})"
        raise UserError(f"{text}; delete it and run its stage again") from None
    right = saved.get("version") == VERSION
    require(right, f"{path} is from another version of s2mts2.py; run its stage with --fresh")
    require(stage in stages, f"{path} is a checkpoint of {stage}, not of {stages[0]}")
    return saved


# ---- 12. Devices and processes [plumbing] --------------------------------------------------------

# torchrun starts this program once for each GPU. Each process holds the same networks and the same
# queue, and takes its part of each batch. Without torchrun the first three functions do nothing.
RANK, PROCESSES = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def synchronise(network):
    """BatchNorm with the statistics of all processes, on GPUs: PyTorch has it for them only."""
    common = distributed.is_initialized() and next(network.parameters()).is_cuda
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if common else network


def average_gradients(network):
    """The network, whose gradients become means over all processes."""
    if not distributed.is_initialized():
        return network
    return nn.parallel.DistributedDataParallel(network)


def all_gather(tensor):
    """The tensors [N, ...] of all processes, one after another."""
    if not distributed.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(PROCESSES)]
    distributed.all_gather(parts, tensor)
    return torch.cat(parts)


def to_device(array, device):
    """A tensor of an array on a device. From pinned memory the host does not wait for the copy."""
    tensor, gpu = torch.from_numpy(array), device.type == "cuda"
    return (tensor.pin_memory() if gpu else tensor).to(device, non_blocking=gpu)


def choose_device(name):
    """The torch.device for auto, cpu, cuda, cuda:1 or mps. Raises UserError if it is not there."""
    # Each process of torchrun has its own GPU.
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = dict(auto=cuda if torch.cuda.is_available() else "cpu", cuda=cuda).get(name, name)
    try:
        device = torch.zeros(1, device=name).device
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not there ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def mixed_precision(device, amp):
    """A context in which networks compute in bfloat16, on GPUs that have it and if amp is set."""
    amp = amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def keep_memory():
    """Linux: keep freed memory for the next step. It saves filling new memory with zeros."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # -3: M_MMAP_THRESHOLD, older versions refuse more than 32 MB. -1: M_TRIM_THRESHOLD.
        mallopt(-3, 2**27) or mallopt(-3, 2**25)
        mallopt(-1, -1)


# ---- 13. Command line [plumbing] -----------------------------------------------------------------

# Options that are not in the tables: default, meaning.
OPTIONS = dict(
    data=("digits", "digits, cxr14, chexpert, isic2018, a folder or FILE.npz [digits or --from's]"),
    root=(None, "folder of cxr14, chexpert or isic2018 [data/NAME]"),
    cache=(None, "folder for decoded images [the folder of the data]"),
    partial=(False, "use only the image files that are there"),
    uncertain=("zeros", "-1 of CheXpert: zeros, ones or ignore [zeros]"),
    recipe=(None, f"{', '.join(RECIPES)} [that of the data; small for others]"),
    out=(None, "folder [runs/NAME, or that of the checkpoint]; predict: file [predicted.csv]"),
    fresh=(False, "start over: remove the results of this stage"),
    device=("auto", "auto, cpu, cuda, cuda:1 or mps [auto: cuda, else cpu]"),
    amp=(True, "bfloat16 on GPUs [on]"),
    seed=(0, "of all random numbers, not of the split [0]"),
    start=(None, "checkpoint; but for predict also scratch, imagenet [newest in runs/*/]"),
    files=(None, "folders or image files"),
    seeds=(3, "runs of each row [3]"),
)
COMMON = ["data", "root", "cache", "partial", "uncertain", "recipe", "out", "device"]
STAGE_1 = [name for name, (value, _, _) in CXR14.items() if value is not None]
STAGE_2 = [name for name, (_, value, _) in CXR14.items() if value is not None]
BOTH = list(dict.fromkeys(STAGE_1 + STAGE_2))
PROBE = "test a finetune.pt again, or fit a linear classifier to the features of a pretrain.pt"
# What a command is for, and the options that it reads.
COMMANDS = dict(
    pretrain=("stage 1, without labels", [*COMMON, "seed", "fresh", "amp", *STAGE_1]),
    finetune=("stage 2, with a few labels", [*COMMON, "seed", "fresh", "amp", "start", *STAGE_2]),
    evaluate=(PROBE, ["start", *COMMON, "seed", "arch", "size", "labels"]),
    predict=("write probabilities for new images", ["files", "start", "out", "device"]),
    ablate=("what is each ingredient worth", ["seeds", *COMMON, "fresh", "amp", *BOTH]),
)
# The values of an option: words, or the least and the largest number. Others are 0 or more.
# fmt: off
VALUES = dict(
    arch=("densenet121", "tiny"), init=("imagenet", "random"), schedule=("cosine", "steps"),
    uncertain=("zeros", "ones", "ignore"), recipe=tuple(RECIPES),
    batch=(2, math.inf), size=(16, math.inf), epochs=(1, math.inf), seeds=(2, math.inf),
    keys=(1, math.inf), queue=(1, math.inf), dim=(1, math.inf), seed=(0, 2**32 - 1),
    temperature=(1e-3, math.inf), ramp=(1e-3, math.inf), teacher_momentum=(0, 1),
    beta1=(0, 0.9999), beta2=(0, 0.9999), centre=(0, 0.99), crop=(0, 0.99), jitter=(0, 1),
    hue=(0, 1), rotate_p=(0, 1), flip_p=(0, 1), vertical_flip_p=(0, 1), jitter_p=(0, 1),
    blur_p=(0, 1), erase_p=(0, 1),
)
# fmt: on


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, one line each."""

    def error(self, message):
        """Raise UserError. Called by argparse."""
        raise UserError(f"{message}; see python {self.prog} --help")


def file_or_number(text):
    """A type for argparse: "all", a file, a fraction below 1, or a number of images."""
    if text == "all" or os.path.isfile(text):
        return text
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a file, a number or all") from None


def option_of(name):
    """The option of a setting, such as --weight-decay."""
    special = dict(start="--from", lambda_="--covariance-weight")
    return special.get(name, "--" + name.replace("_", "-"))


def setting(name, recipe, stage):
    """The value of a setting: of the recipe, else of the table."""
    return RECIPES[recipe][stage].get(name, CXR14[name][stage == "finetune"])


def help_of(command, name):
    """What --help prints for an option: its meaning and, in brackets, its value in each recipe."""
    if name in OPTIONS:
        return OPTIONS[name][1]
    if command == "ablate":
        return CXR14[name][2]
    recipes_of = {}
    for recipe in RECIPES:
        stage = "finetune" if command == "finetune" or name == "labels" else "pretrain"
        recipes_of.setdefault(str(setting(name, recipe, stage)), []).append(recipe)
    values = [f"{value} {', '.join(recipes)}" for value, recipes in recipes_of.items()]
    return f"{CXR14[name][2]} [{'; '.join(values) if len(values) > 1 else [*recipes_of][0]}]"


def add_option(parser, command, name):
    """Add an option to the parser of a command."""
    default = OPTIONS[name][0] if name in OPTIONS else CXR14[name][0] or CXR14[name][1]
    text = help_of(command, name).replace("%", "%%")
    kind = file_or_number if name == "labels" else str if default is None else type(default)
    words = VALUES.get(name) if kind is str else None
    metavar = {str: "NAME", int: "N", float: "X"}.get(kind, "LABELS")
    if kind is bool:
        action = argparse.BooleanOptionalAction if default else "store_true"
        parser.add_argument(option_of(name), action=action, help=text)
    elif name == "files":
        parser.add_argument(name, nargs="+", metavar="IMAGES", help=text)
    elif name == "start" and command == "evaluate":
        parser.add_argument(name, nargs="?", metavar="CHECKPOINT", help=text)
    elif name == "labels" and command == "ablate":
        parser.add_argument("--labels", nargs="+", type=kind, metavar=metavar, help=text)
    else:
        given = dict(dest=name, type=kind, choices=words, metavar=metavar)
        parser.add_argument(option_of(name), help=text, **given)


def parse_args(argv=None):
    """Parse a command line, sys.argv[1:] if None. Returns a Namespace. Raises UserError."""
    parser = Parser("s2mts2.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (text, names) in COMMANDS.items():
        files = dict(predict="IMAGES [IMAGES ...] ", evaluate="[CHECKPOINT] ").get(command, "")
        sub = commands.add_parser(
            command,
            help=text,
            description=f"{text}. In brackets: the default, for each recipe.",
            usage=f"python s2mts2.py {command} {files}[options]",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26),
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        for name in names:
            add_option(sub, command, name)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, (int, float)):
            least, largest = VALUES.get(name, (0, math.inf))
            # Neither infinite nor NaN.
            fits = least <= value <= largest and math.isfinite(value)
            require(fits, f"{option_of(name)} {value} is out of range")
    return settings_of(given.pop("command"), given)


def command_line(words, given):
    """The words of a command with the given options, as far as the command has them."""
    command, *words = words.split()
    line = [command]
    for name in [name for name in COMMANDS[command][1] if name in given]:
        value = given[name]
        if name == "start" and command == "evaluate":
            line.insert(1, value)
        elif isinstance(value, bool):
            line += [option_of(name) if value else option_of(name).replace("--", "--no-")]
        else:
            line += [option_of(name), str(value)]
    return line + words


def settings_of(command, given):
    """All settings of a command: of the table, the recipe, stage 1, and given. Later ones count."""
    alone = PROCESSES == 1 or command in ("pretrain", "finetune")
    require(alone, f"{command} runs in one process, without torchrun")
    start, taken = find_start(command, given), {}
    if start not in (None, "scratch", "imagenet") or command == "predict":
        stages = dict(finetune=["pretrain"], evaluate=["finetune", "pretrain"])
        saved = load_checkpoint(start, *stages.get(command, ["finetune"]))
        if saved["stage"] == "finetune":
            return reopened(command, saved["args"], given, start)
        taken = taken_over(saved["args"], given, start)
    stage = "finetune" if command == "finetune" else "pretrain"
    values = {name: OPTIONS[name][0] for name in COMMANDS[command][1] if name in OPTIONS}
    values |= taken | given | dict(start=start)
    recipe = values["recipe"] or (values["data"] if values["data"] in RECIPES else "small")
    for name in STAGE_2 if stage == "finetune" else STAGE_1:
        values.setdefault(name, setting(name, recipe, stage))
    labels = setting("labels", recipe, "finetune")
    if command in ("evaluate", "ablate"):
        values.setdefault("labels", [labels] if command == "ablate" else labels)
    if values["arch"] == "tiny" and "init" not in given and stage == "pretrain":
        values["init"] = "random"
    check(values, given)
    values["augment"] = {name: values.pop(name) for name in VIEWS}
    values |= dict(recipe=recipe, command=command, stage=stage, given=given)
    return argparse.Namespace(**values)


def find_start(command, given):
    """Where a command starts: as given, else at the newest checkpoint; None in stage 1."""
    if command in ("pretrain", "ablate") or "start" in given:
        return given.get("start")
    stage = "pretrain" if command == "finetune" else "finetune"
    found = Path("runs").glob(f"*/{stage}.pt")
    for path in sorted(found, key=os.path.getmtime, reverse=True):
        try:
            if "data" not in given or same_data(given, load_checkpoint(path, stage)["args"]):
                print(f"starts from {path}")
                return str(path)
        except UserError as error:
            print(f"warning: {error}")
    of_data = f" of {given['data']}" if "data" in given else ""
    remedy = f"first run python s2mts2.py {stage}, or name a checkpoint"
    raise UserError(f"no {stage}.pt{of_data} in runs/*/; {remedy}")


def same_data(given, saved):
    """Whether the given data, if any, are those of a checkpoint: the same name or path."""

    def place(data, root):
        """What distinguishes data sets: the folder, and for a known name also the name."""
        known = data in ("digits", "cxr14", "chexpert", "isic2018")
        return known and data, Path((root or f"data/{data}") if known else data).resolve()

    root = given.get("root") or saved["root"]
    return "data" not in given or place(given["data"], root) == place(saved["data"], saved["root"])


def taken_over(saved, given, start):
    """What is taken over from stage 1: the network and, for the same data, what it was given."""
    taken = dict(arch=saved["arch"])
    if same_data(given, saved):
        names = ("data", "root", "cache", "partial", "uncertain", "recipe", "size")
        taken |= {name: saved["given"][name] for name in names if name in saved["given"]}
        taken["out"] = str(Path(start).parent)
    return taken


def reopened(command, saved, given, start):
    """Settings of a finetune.pt; only the places of data and results can be given anew."""
    free = {"start", "files", "out", "device", "data", "root", "cache", "partial", "uncertain"}
    for name in given.keys() - free:
        same = given[name] == saved.get(name)
        require(same, f"{start} has {option_of(name)} {saved.get(name)}, which cannot be changed")
    out = "predicted.csv" if command == "predict" else str(Path(start).parent)
    values = saved | dict(device="auto", out=out) | given
    values |= dict(start=start, command=command, stage="finetune", given=given)
    return argparse.Namespace(**values)


def check(values, given):
    """Raise UserError for settings that do not fit together."""
    tiny, size = values["arch"] == "tiny", values["size"]
    fits = values["batch"] % PROCESSES == 0
    require(fits, f"--batch must be a multiple of {PROCESSES} processes")
    require(tiny or size >= 32, "densenet121 needs --size 32 or more")
    require(3 * values["blur"] <= size - 1, "--blur must be below a third of --size")
    imagenet = "imagenet" in (given.get("init"), given.get("start"))
    require(not (tiny and imagenet), "tiny has no ImageNet weights; use --arch densenet121")
    sets = ("cxr14", "chexpert", "isic2018")
    for name, fits in dict(root=sets, partial=sets, uncertain=("chexpert",)).items():
        right = name not in given or values["data"] in fits
        require(right, f"--{name} is only for {', '.join(fits)}")


def predict(args):
    """Write the teacher's probabilities for image files to the CSV file args.out.

    Network, size, channels and classes are the checkpoint's. Raises UserError at the end if files
    were skipped, which are named; the others are in the file.
    """
    saved = load_checkpoint(args.start, "finetune")
    _, teacher = load_networks(args, saved["channels"], saved["classes"])
    path_of, skipped, scores = {}, [], {}
    for item in args.files:
        if not os.path.isdir(item):
            path_of[item] = item
            continue
        images, others = find_images(item)
        others = [f"{item}/{name}" for name in others]
        skipped += [f"not an image: {x}" for x in others if identity(x) != identity(args.out)]
        for name in sorted(images):
            # Of one folder: the names below it.
            path_of[name if len(args.files) == 1 else f"{item}/{name}"] = f"{item}/{name}"
    require(path_of, f"{args.files[0]} has no images ({' '.join(ENDINGS)})")
    require(not os.path.isdir(args.out), f"--out {args.out} is a folder; name a CSV file")

    def attempt(name):
        """The decoded image; None if it cannot be read."""
        try:
            return decode(path_of[name], args.size, saved["channels"])
        except UserError as error:
            skipped.append(str(error))

    names = list(path_of)
    with ThreadPoolExecutor() as pool, tqdm(total=len(names), desc="predict", unit="image") as bar:
        for start in range(0, len(names), 64):
            block = names[start : start + 64]
            images = dict(zip(block, pool.map(attempt, block), strict=True))
            images = {name: image for name, image in images.items() if image is not None}
            if images:
                batch = torch.from_numpy(np.stack(list(images.values())))
                outputs = predict_batch(teacher, batch, args.size)
                outputs = probabilities(outputs, saved["multilabel"]).numpy()
                require(np.isfinite(outputs).all(), f"{args.start}: an output is not finite")
                scores |= zip(images, outputs, strict=True)
            bar.update(len(block))
    write_predictions(Path(args.out), saved["classes"], scores, scores.values())
    for line in sorted(skipped):
        print(line)
    print(f"written to {args.out}: {len(scores):,} images, with {args.start}")
    require(not skipped, f"{len(skipped):,} files were skipped, named above")


def data_for(args):
    """The Data of args."""
    return load_data(args.data, args.root, args.size, args.cache, args.uncertain, args.partial)


def execute(args):
    """Run the command of args. Returns its result."""
    if args.command in ("predict", "ablate"):
        return dict(predict=predict, ablate=ablate)[args.command](args)
    stage = dict(pretrain=pretrain, finetune=finetune, evaluate=retest)[args.command]
    return stage(data_for(args), args)


def main(argv=None):
    """Run a command. Returns its exit status: 0, 2 if the user can fix it, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter of a name shows a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    status, text = 0, ""
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else io.StringIO()):
            args = parse_args(argv)
            # TF32 on GPUs: faster, and exact enough for training.
            torch.set_float32_matmul_precision("high")
            keep_memory()
            if "TORCHELASTIC_RUN_ID" in os.environ:
                backend = "nccl" if choose_device(args.device).type == "cuda" else "gloo"
                distributed.init_process_group(backend)
            execute(args)
    except KeyboardInterrupt:
        status, text = 130, "stopped; to resume a stage, run the same command without --fresh"
    except (UserError, OSError) as error:
        status, text = 2, "error: " + " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        # Of torch's own errors the user can fix too little memory.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        status, text = 2, "error: out of memory; use a smaller --batch or --size"
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    # If all processes fail, the first prints why: torchrun ends the others while they sleep.
    time.sleep(5 * (RANK > 0 and status > 0))
    # Below the progress bar, which is gone by now.
    if text:
        print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
