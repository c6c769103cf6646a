"""S2MTS2: self-supervised mean teacher for semi-supervised image classification, in one file.

Images are plentiful, labels are expensive. This file implements "Self-supervised Mean Teacher for
Semi-supervised Chest X-ray Classification" (Liu, Tian, Cordeiro, Belagiannis, Reid and Carneiro,
MLMI 2021, arXiv 2103.03629). Two networks of the same shape are trained. The STUDENT is trained by
gradient descent. The TEACHER is an exponential moving average (EMA) of the student: after each
step, teacher <- a teacher + (1 - a) student. It changes slowly: a steady target for the student.

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

The teacher of stage 2 is the result; the student is tested beside it. With 20 labels of digits its
accuracy is .96, without stage 1 .92, with labels only .80 (five seeds, README.md).

Commands:
    a laptop            python s2mts2.py pretrain && python s2mts2.py finetune
    each ingredient     python s2mts2.py ablate --labels 10 20 --seeds 5
    MoCo instead        python s2mts2.py pretrain --keys 1 --covariance-weight 0 --out runs/moco
    your own images     python s2mts2.py pretrain --data DIR && python s2mts2.py finetune
    new images          python s2mts2.py predict IMAGES
    several GPUs        torchrun --nproc_per_node=4 s2mts2.py pretrain --data cxr14 --root DIR

Symbols of the papers, names in this file, shapes:
    q, k_m, n_j   query [N, D], keys [N, M, D], queue [K, D]: embeddings and negatives
    mu, Sigma     mean (it enters the queue) and covariance (never formed) of the keys of an image
    t             temperature
    c, lambda     covariance_weight in the loss; its value in the last epoch, --covariance-weight
    a, w          teacher_momentum, the EMA decay; weight of the consistency loss
    p, p'         probabilities [N, C] of student and teacher
N images in a batch, M keys of an image, D dimensions of an embedding, K negatives, C classes; in
stage 2, L labelled and N unlabelled images in a batch.

A tag names the source of the text up to the next tag, empty line or row of a list: [abstract] of
the paper (the text of the paper was not at hand), [authors' code] (github.com/FBLADL/semi-chest),
[Mean Teacher] (arXiv 1703.01780), [JCL] (joint contrastive loss, arXiv 2009.14776), [MoCo] (arXiv
1911.05722), [ACPL] (github.com/FBLADL/ACPL, their label lists), [our choice], [plumbing].

Map: 1 network and teacher   2 joint contrastive loss   3 stage 1   4 stage 2   5 evaluation
     -- a first reader can stop there --   6 settings   7 views   8 data   9 decoding
     10 reports and ablation   11 runs and checkpoints   12 devices and processes   13 command line
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
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

    arch      [authors' code] "densenet121"; [our choice] "tiny", with 0.14 million weights
    channels  1 or 3
    outputs   int: D for head "mlp", C for head "linear"
    head      "mlp": projection head of stage 1, dropped after it; "linear": classifier
    imagenet  bool: start densenet121 from torchvision's ImageNet weights, a download of 31 MB
    Raises OSError if the weights cannot be downloaded.
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

    Why no gradient, stage 1: [MoCo] the keys in the queue are of earlier steps, so the teacher must
    change slowly. This also saves M of M + 1 backward passes. Why no gradient, stage 2: [our
    choice] if both networks had gradients, they could collapse to a trivial solution of the
    consistency loss, one output for all unlabelled images.

    BatchNorm of the teacher. In training: statistics of its own batch, in stage 2 of unlabelled
    images only; the student's batch has both kinds. In evaluation: [our choice] running statistics,
    the EMA of the student's; the teacher's own passes do not change them. In training they lag
    behind the weights. Stage 1 fails if its teacher uses them: measured on digits, 12 epochs, the
    loss stays within 0.1 of log(K + 1). At the end they match: the weights hardly change any more.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            # PyTorch: running <- (1 - momentum) * running + momentum * batch.
            module.momentum = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """[abstract] teacher <- momentum * teacher + (1 - momentum) * student, in place.

    teacher, student  nn.Modules of the same architecture; the student does not change
    momentum          float in [0, 1], the EMA decay a
    With a constant a, n updates with students theta_1 ... theta_n give the weighted mean
        theta'_n = a^n theta'_0 + (1 - a) sum_{i=1..n} a^(n-i) theta_i.
    [authors' code] BatchNorm's running statistics are averaged too. [our choice] Its integer
    counter is copied.
    """
    averages = [*teacher.parameters(), *teacher.buffers()]
    latest = [*student.parameters(), *student.buffers()]
    for average, value in zip(averages, latest, strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - momentum)
        else:
            average.copy_(value)


# ---- 2. Joint contrastive loss -------------------------------------------------------------------


def joint_contrastive_loss(query, keys, queue, temperature, covariance_weight):
    """[JCL] Contrast a query with infinitely many keys of its own image.

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

    Sigma is the biased covariance, the mean of (k - mu)(k - mu)^T. So q^T Sigma q / t^2 is the
    biased variance of the M numbers q.k_m / t, and no D x D matrix is formed.

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
# hence an EMA decay close to 1.
#
# With a decay of 0 the networks collapse, as measured on digits: all images get nearly the same
# embedding (mean cosine .9999), and the loss is log(K + 1).
# Temperature t: a low value gives most weight to the most similar negatives, which separates images
# that look alike. A high value treats all negatives alike.
# The loss: a student that knows nothing gives all 1 + K vectors the same probability: log(K + 1).
# It starts lower, because the random directions in the queue are easy to reject, rises while keys
# replace them (often within the first epoch, of which the mean is printed), and falls by learning.
# BatchNorm leakage: an embedding depends on the other images of its batch. A query and its keys
# share them, so the student could find its keys by this trace. [MoCo] Images are shuffled between
# GPUs. [our choice] Not done: it did not help in an earlier version. SyncBatchNorm, as in MoCo v3
# (arXiv 2104.02057), does not remove the trace; with it several GPUs are to compute what one does.


def pretrain(data, args):
    """Pre-train student and teacher on all training images, without labels.

    data  Data                             args  from parse_args(["pretrain", ...])
    Returns (student, teacher). Writes pretrain.pt, log.jsonl and views.png to the output folder.
    Raises UserError if args and data do not match.
    """
    device = choose_device(args.device)
    seed_torch(args.seed, "pretrain")
    imagenet = args.init == "imagenet"
    student = build_network(args.arch, data.images.shape[1], args.dim, "mlp", imagenet).to(device)
    teacher = make_teacher(student)
    student, teacher = synchronise(student), synchronise(teacher)
    # [JCL] Random directions fill the queue at first. [our choice] It is at most as long as the
    # training set. The order changes in each epoch, so at this length about half of the queries
    # meet an old key of their own image; in a longer queue nearly all would.
    length = min(args.queue, len(data.train))
    queue = F.normalize(torch.randn(length, args.dim), dim=1).to(device)  # [K, D]
    optimizer = torch.optim.SGD(
        student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    steps = len(data.train) // args.batch
    require(steps, f"{len(data.train)} training images: --batch must not be larger")
    # [plumbing] Loads an earlier checkpoint into these four. Writes one, and a log, at each epoch's
    # end. Seeds torch at its start, so that a resumed run equals an uninterrupted one.
    state = dict(student=student, teacher=teacher, optimizer=optimizer, queue=queue)
    run = start_run(data, args, args.batch, state)
    save_views(data, args)
    print(f"the loss rises to about log(K + 1) = {math.log(length + 1):.2f} at first, then falls")
    embed = average_gradients(student)

    for epoch, losses in run:
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        # [JCL] c grows to lambda. With lambda = 2 it is above 1, the value of the bound, in the
        # second half: agreement of the keys then weighs more than the bound asks for. [our choice]
        # Our reason for the growth: Sigma means little while the network is untrained.
        c = args.lambda_ * (epoch + 1) / args.epochs
        order = batches(data.train, steps, args.batch, args.seed, epoch)
        for indices in tqdm(order, f"epoch {epoch + 1}", leave=False, disable=RANK > 0):
            images = torch.from_numpy(data.images[indices]).to(device)  # uint8 [N, channels, ...]
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
            losses.append(loss.detach())
    return student, teacher


def enqueue(queue, means):
    """Put means [N, D] in front of queue [K, D], in place. The oldest drop out at the end.

    [JCL] The mean of unit vectors is shorter than 1; it is not normalised again. [our choice] Our
    reason: q.n_j is then the mean over the keys of that image, and smaller if these differ.
    """
    queue.copy_(torch.cat([means, queue])[: len(queue)])


def learning_rate(args, epoch):
    """[authors' code] Learning rate of an epoch, 0 <= epoch < args.epochs.

    "cosine" decreases towards 0. "steps" divides by 10 at 1/2 and 5/6: at 15 and 25 of 30 epochs.
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
# provides the target and is evaluated: an average over many steps varies less than a single one.
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
    student, teacher = map(synchronise, load_networks(args, data))
    adam = dict(lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=args.weight_decay, **adam)
    steps = max(args.min_steps, math.ceil(max(len(labelled), len(unlabelled)) / args.batch))
    # BatchNorm of the teacher needs two images.
    use_unlabelled = args.consistency > 0 and len(unlabelled) >= 2 * PROCESSES
    # L and N of a step, over all processes. [our choice] Not more images than there are.
    size_l = min(args.batch, len(labelled)) // PROCESSES * PROCESSES
    size_n = min(args.batch, len(unlabelled)) // PROCESSES * PROCESSES * use_unlabelled
    enough = size_l and size_l + size_n > PROCESSES
    require(enough, f"BatchNorm needs two images for each of {PROCESSES} processes; raise --labels")
    print(f"{len(labelled):,} labelled and {len(unlabelled):,} unlabelled training images")
    state = dict(student=student, teacher=teacher, optimizer=optimizer)
    run = start_run(data, args, size_l + size_n, state, labelled)
    classify = average_gradients(student)

    for epoch, losses in run:
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        w = consistency_weight(args, epoch)
        order_l = batches(labelled, steps, size_l, args.seed, epoch)
        order_n = batches(unlabelled, steps, size_n, args.seed, epoch)
        bar = tqdm(order_l, f"epoch {epoch + 1}", leave=False, disable=RANK > 0)
        for step, (indices_l, indices_n) in enumerate(zip(bar, order_n, strict=True)):
            targets = torch.from_numpy(data.targets[indices_l]).to(device)  # [L, C]
            images = torch.from_numpy(data.images[indices_l]).to(device)  # [L, channels, ...]
            views = random_views(images, args.augment, args.size)  # [L, channels, size, size]
            if use_unlabelled:
                # [Mean Teacher] Each network has its own view. [authors' code] Both see the same.
                images = torch.from_numpy(data.images[indices_n]).to(device)  # [N, channels, ...]
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
            losses.append(loss.detach())
    return report(student, teacher, data, args) if RANK == 0 else None


def consistency_weight(args, epoch):
    """[authors' code] w of an epoch: 0 in the first, then it grows linearly to args.consistency.

    This takes the fraction `ramp` of the epochs. If that is 1, the last of n has (n - 1) / n
    of args.consistency. Why 0: at first the classifier is random, and so are the predictions.
    """
    return args.consistency * min(1, epoch / (args.ramp * args.epochs))


def warmed_up(decay, updates):
    """[Mean Teacher] EMA decay of update 1, 2, ...: 1/2, 2/3, ... but at most the given one.

    Until then the teacher is the mean of its first weights and of n students, each with weight
    1 / (n + 1). So it soon forgets the untrained classifier. It also forgets the teacher of stage
    1, which matters little: w is 0 in the first epoch, and the student starts from stage 1 as well.
    """
    return min(1 - 1 / (updates + 1), decay)


def load_networks(args, data):
    """Student and teacher for stage 2, with the weights of args.start, on args.device.

    args.start  path of a checkpoint of stage 1, "scratch" or "imagenet"
    [our choice] Student and teacher of stage 1 get the same new classifier. [authors' code] There
    both start from the student. Warns of test images that stage 1 has seen. Raises UserError if a
    checkpoint has another architecture or number of channels.
    """
    channels, imagenet = data.images.shape[1], args.start == "imagenet"
    student = build_network(args.arch, channels, len(data.classes), imagenet=imagenet)
    teacher, new = make_teacher(student), student.classifier.state_dict(prefix="classifier.")
    if args.start not in ("scratch", "imagenet"):
        saved = load_checkpoint(args.start, "pretrain")
        there, here = (saved["args"]["arch"], saved["channels"]), (args.arch, channels)
        require(there == here, f"{args.start} has network and channels {there}, not {here}")
        for network, name in ((student, "student"), (teacher, "teacher")):
            kept = saved["state"][name].items()
            kept = {key: value for key, value in kept if "classifier" not in key}
            network.load_state_dict(kept | new, strict=True)
        # [plumbing] Images of stage 1 can have become test images, when they were labelled.
        seen = np.setdiff1d(np.array(saved["images"], np.uint64), data.hashes[data.train])
        what = f"training images of {args.start} (a column split keeps the old test set)"
        warn_of_copies(data, seen, what)
    device = choose_device(args.device)
    return student.to(device), teacher.to(device)


def supervised_loss(logits, targets, multilabel):
    """[authors' code] Cross-entropy of logits [L, C] with targets [L, C]: 0, 1 or NaN (not known).

    Multi-label: binary cross-entropy, [our choice] mean over the known targets. Multi-class: cross-
    entropy, mean over the images whose row is known. Returns a scalar.
    """
    if multilabel:
        known = ~targets.isnan()
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    else:
        known = ~targets.isnan().any(1)
        losses = F.cross_entropy(logits, targets.nan_to_num(), reduction="none")
    # [plumbing] Known targets of all processes, so that the result is that of one process.
    count = all_gather(known.sum()[None]).sum() / PROCESSES
    return losses.where(known, 0).sum() / count


def consistency_loss(student_logits, teacher_logits, multilabel):
    """[authors' code] Squared difference of probabilities, mean over N and C, of logits [N, C].

    Probabilities, not logits: confident and very confident should count as nearly the same.
    """
    predicted = probabilities(student_logits, multilabel)
    return F.mse_loss(predicted, probabilities(teacher_logits, multilabel))


def probabilities(logits, multilabel):
    """Sigmoid (multi-label) or softmax (multi-class) of logits [N, C]."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


# ---- 5. Evaluation -------------------------------------------------------------------------------


def evaluate(network, data, indices, size, classify=True):
    """Probabilities of all classes, float64 [n, C]: each image once and in the given order.

    network   from build_network            size  int, side of a view in pixels
    indices   int64 [n], into data.images. Why float64: in float32 probabilities near 1 are equal.
    classify  False: the outputs of the network instead, [n, outputs]
    """
    blocks = np.split(indices, range(64, len(indices), 64))
    images = (torch.from_numpy(data.images[block]) for block in tqdm(blocks, "test", leave=False))
    outputs = torch.cat([predict_batch(network, each, size) for each in images])
    return (probabilities(outputs, data.multilabel) if classify else outputs).numpy()


@torch.no_grad()
def predict_batch(network, images, size):
    """Outputs for images, uint8 [N, channels, height, width]: float64 [N, outputs], no bfloat16."""
    training = network.training
    network.eval()
    outputs = network(random_views(images.to(next(network.parameters()).device), PLAIN, size))
    network.train(training)
    return outputs.cpu().double()


# ---- A first reader can stop here: the rest is settings, views, data, files, command line --------

# ---- 6. Settings ---------------------------------------------------------------------------------

# The recipe of Chest X-ray14 in full: value in stage 1, value in stage 2 (None: not read there),
# meaning with unit. Each row is an option, such as --batch 64 (lambda_: --covariance-weight).
#
# [authors' code] Stage 1 is that of pretrain.py and dataloader.py.
# Stage 2 blends their scripts, because the last one, finetune.py, has no unlabelled image and no
# EMA. From it: size, batch, lr, betas, eps, "steps", labels, rotation. From the older scripts for
# CheXpert and ISIC2018: 30 epochs, EMA decay, consistency weight and its ramp.
# [our choice] An epoch of stage 2 is a pass over the unlabelled images, on Chest X-ray14 about
# 5,300 steps. [authors' code] A pass over the labelled images, 130 steps with their list.
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
    lr=              (0.03,          0.05,          "learning rate of the first epoch"),
    schedule=        ("cosine",      "steps",       "of the learning rate: cosine or steps"),
    momentum=        (0.9,           None,          "of SGD"),
    beta1=           (None,          0.9,           "AdamW: decay of the mean gradient"),
    beta2=           (None,          0.99,          "AdamW: decay of the mean squared gradient"),
    eps=             (None,          0.1,           "AdamW: added to the root of the mean square"),
    weight_decay=    (1e-4,          0.0,           "L2 penalty (stage 1); of AdamW (stage 2)"),
    # The average covers about the last 1 / (1 - a) steps.
    teacher_momentum=(0.999,         0.999,         "a, the EMA decay of the teacher"),
    # JCL's own script has 4 keys, t 0.2 and the same lambda.
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

# The other recipes, as what differs from it. The data set chooses its recipe, --recipe another one.
RECIPES = dict(
    cxr14=dict(pretrain={}, finetune={}),
    # [authors' code] dataloader_xpert.py; stage 2 from the older script. [our choice] 224 px in
    # stage 1, theirs are 256; 2 % of the labels, since their lists are not published.
    chexpert=dict(
        pretrain=dict(size=224, keys=5, erase_p=0.0),
        finetune=dict(size=224, batch=64, schedule="cosine", weight_decay=0.01, rotate=10.0,
                      jitter=0.4, hue=0.4, jitter_p=0.8)),
    # [authors' code] pretrain_isic.py and the older script of stage 2, which stops at epoch 80 of a
    # cosine and a ramp over 100. [our choice] Ours end at 80; 224 px; the vertical flip; no
    # translation, theirs is 0.02 in both stages.
    isic2018=dict(
        pretrain=dict(size=224, keys=5, centre=0.25, crop=0.0, rotate_p=1.0, vertical_flip_p=0.5,
                      erase_p=0.0),
        finetune=dict(size=224, epochs=80, schedule="cosine", labels=0.2, rotate=10.0,
                      vertical_flip_p=0.5)),
    # [our choice] Chosen on held-out training images; README, Results, says what was tried.
    digits=dict(
        pretrain=dict(arch="tiny", init="random", size=32, epochs=45, batch=64, lr=0.06,
                      teacher_momentum=0.99, queue=512, temperature=0.4, crop=0.5, rotate=25.0,
                      rotate_p=1.0, flip_p=0.0, hue=0.0, blur=0.0, blur_p=0.0, erase_p=0.0),
        finetune=dict(arch="tiny", size=32, epochs=14, batch=32, lr=0.1, schedule="cosine",
                      teacher_momentum=0.97, consistency=200.0, labels=10, crop=0.4, rotate=20.0,
                      flip_p=0.0, jitter=0.4, jitter_p=0.8)),
    # [our choice] For a laptop, and for all other data; chosen on held-out images of ISIC2018.
    # Below 4,800 images stage 2 would be too short: min_steps.
    small=dict(
        pretrain=dict(arch="tiny", init="random", size=32, epochs=45, batch=128, lr=0.06,
                      teacher_momentum=0.99, queue=4096, rotate=25.0, rotate_p=1.0, jitter=0.2,
                      hue=0.02, blur=0.0, blur_p=0.0, erase_p=0.0),
        finetune=dict(arch="tiny", size=64, epochs=5, batch=64, min_steps=75, schedule="cosine",
                      teacher_momentum=0.99, consistency=20.0, ramp=0.33, labels="all", crop=0.2,
                      rotate=10.0, jitter=0.2, hue=0.02, jitter_p=0.8)),
)
# fmt: on


# ---- 7. Views ------------------------------------------------------------------------------------

# A view shows an image with another position, exposure or sharpness. The networks learn to ignore
# what differs. random_views and rectangle sample the random numbers; the others take them.

# No random change, for evaluation.
PLAIN = "centre crop rotate rotate_p flip_p vertical_flip_p jitter hue jitter_p blur blur_p erase_p"
PLAIN = dict.fromkeys(PLAIN.split(), 0.0)

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

    # [our choice] Resize first: all views get one shape. torchvision crops at full resolution.
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if any(augment[name] for name in ("centre", "crop", "rotate", "flip_p", "vertical_flip_p")):
        ratio = 4 / 3 if augment["crop"] else 1
        left, top, width, height = rectangle(uniform, 1 - augment["crop"], 1, ratio)
        kept = 1 - augment["centre"]
        left, width = (1 - kept) / 2 + kept * left, kept * width
        angle = uniform(-1, 1) * augment["rotate"] * (uniform(0, 1) < augment["rotate_p"])
        flips = uniform(0, 1) < augment["flip_p"], uniform(0, 1) < augment["vertical_flip_p"]
        images = crop_rotate_flip(images, left, top, width, height, angle, *flips)
    if augment["jitter_p"]:
        chosen = uniform(0, 1) < augment["jitter_p"]
        factors = [1 + chosen * augment["jitter"] * uniform(-1, 1) for _ in range(3)]
        images = jitter_colours(images, *factors, chosen * augment["hue"] * uniform(-1, 1))
    # Blur is expensive, so only some images go through it: blur_p * count, stochastic rounding.
    blurred = int(augment["blur_p"] * count + torch.rand(()))
    if blurred and augment["blur"]:
        chosen = torch.rand(count, device=device).argsort()[:blurred]
        sigma = uniform(min(0.1, augment["blur"]), augment["blur"])[:blurred]
        images[chosen] = gaussian_blur(images[chosen], sigma, augment["blur"])
    # With Python numbers: a tensor from the CPU would make the CPU wait for the GPU.
    for channel, mean, std in zip(images.unbind(1), *NORMALISATION[images.shape[1]], strict=True):
        channel.sub_(mean).div_(std)
    if augment["erase_p"]:
        # After the normalisation 0 is the mean colour of ImageNet.
        left, top, width, height = rectangle(uniform, 0.02, 0.33, 3.3)
        images = erase(images, left, top, width * (uniform(0, 1) < augment["erase_p"]), height)
    return images


def rectangle(uniform, smallest, largest, ratio):
    """Random rectangles: left, top, width, height [N], as fractions of the image's side.

    Areas are from smallest to largest, fractions of the image's; ratio: largest ratio of the sides.
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
    flip, vertical_flip       bool or float [N], 1 to flip, 0 not to
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
    """Set a rectangle of each image [N, channels, side, side] to 0, in place; fractions [N]."""
    place = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])  # [N, side]
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])  # [N, side]
    return images.mul_(~(rows[:, None, :, None] & columns[:, None, None, :]))


# ---- 8. Data -------------------------------------------------------------------------------------

KNOWN = ("digits", "cxr14", "chexpert", "isic2018")
FINDINGS = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
    "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia"
)
CELLS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": np.nan}


@dataclass
class Data:
    """Images, labels and a split. Can be made by hand. Raises UserError if they do not fit."""

    name: str  # results go to runs/<name>/
    images: np.ndarray  # uint8 [n, 1 or 3, height, width], in memory or memory-mapped
    targets: np.ndarray  # float32 [n, C]: 0, 1 or NaN = not known; NaN only: an unlabelled image
    classes: list  # names of the columns of targets
    names: list  # names of the images
    train: np.ndarray  # int64 indices
    test: np.ndarray  # int64 indices of labelled images
    # True: each class is a yes or no (sigmoid). False: one class an image (softmax), and a row that
    # is not completely known counts as unlabelled.
    multilabel: bool
    hashes: np.ndarray = None  # uint64 [n], equal for equal images; of the pixels unless given

    def __post_init__(self):
        self.images, self.targets = np.asanyarray(self.images), np.asarray(self.targets, np.float32)
        self.train, self.test = np.asarray(self.train, np.int64), np.asarray(self.test, np.int64)
        self.classes, self.names = list(map(str, self.classes)), list(map(str, self.names))
        count, used = len(self.names), [*self.train, *self.test]
        right = self.images.dtype == np.uint8 and self.images.shape[:-2] in ((count, 1), (count, 3))
        right &= self.targets.shape == (count, len(self.classes))
        require(right, "not n names, images uint8 [n, 1 or 3, height, width], targets [n, classes]")
        require(len({*self.names}) == count, "two images have the same name")
        require(len({*self.classes} - {""}) == len(self.classes), "class names are equal or empty")
        require(self.multilabel or len(self.classes) > 1, "one class an image needs two classes")
        require(np.isin(np.nan_to_num(self.targets), (0, 1)).all(), "a target is not 0, 1 or NaN")
        one_hot = (self.targets == 1).sum(1) == 1
        require(self.multilabel or one_hot[self.known].all(), "a row of targets is not one-hot")
        require(len(self.train), "there is no training image")
        require(len({*used} & {*range(count)}) == len(used), "train and test: an index is wrong")
        require(self.known[self.test].all(), "a test image has no label")
        if self.hashes is None:
            self.hashes = np.array([hash_of(image.tobytes()) for image in self.images], np.uint64)

    @property
    def known(self):
        """bool [n]: whether an image is labelled."""
        known = ~np.isnan(self.targets)
        return known.any(1) if self.multilabel else known.all(1)


def load_data(name, root=None, size=64, uncertain="zeros", partial=False):
    """Load a data set and print a line that describes it. Returns Data.

    name       digits, cxr14, chexpert, isic2018, a folder, or a MedMNIST .npz file
    root       folder of cxr14, chexpert or isic2018; data/<name> unless given
    size       side in pixels of the square to which image files are resized
    uncertain  CheXpert's -1: "zeros", "ones", or "ignore" (not known; in test images 0)
    partial    bool: use only the image files that are there
    """
    if name in KNOWN and os.path.isdir(name):
        warn(f"{name} is the data set {name}; for the folder write ./{name}, or --root {name}")
    path = Path(root or f"data/{name}") if name in KNOWN else Path(name)
    if name == "digits":
        data = load_digits()
    elif path.suffix == ".npz":
        data = load_npz(path)
    else:
        loaders = dict(cxr14=load_cxr14, isic2018=load_isic2018)
        loaders["chexpert"] = lambda root: load_chexpert(root, uncertain)
        table, rows, *meaning = loaders.get(name, load_folder)(path)
        rows = [row for row in rows if not partial or os.path.isfile(row["path"])]
        require(rows, f"{path} is no folder with images ({' '.join(ENDINGS)})")
        title = os.path.basename(os.path.abspath(name))
        data = from_table(title, size, table, rows, *meaning)
    known, used = data.known, np.concatenate([data.train, data.test])
    shown = f"{len(known):,} images, {len(known) - len(used):,} of them not used"
    shown = f"{shown}; {len(data.train):,} train, {known[data.train].sum():,} of them labelled"
    kind = "multi-label" if data.multilabel else "one class an image"
    counts = map("{} {:,.0f}".format, data.classes, np.nansum(data.targets[used[known[used]]], 0))
    print(f"{data.name}: {shown}; {len(data.test):,} test; {kind}: {', '.join(counts)}")
    warn_of_copies(data, data.hashes[data.train], "training images")
    if not (known[data.train].any() and len(data.test)):
        warn("stage 2 needs labelled images in train and in test; see README.md, Your own images")
    return data


def warn_of_copies(data, seen, what):
    """Warn of test images that are also among other images, whose hashes are given."""
    copies = data.test[np.isin(data.hashes[data.test], seen)]
    if len(copies):
        same = data.train[data.hashes[data.train] == data.hashes[copies[0]]]
        names = " and ".join(data.names[index] for index in [copies[0], *same[:1]])
        warn(f"{len(copies):,} test images are also {what}, such as {names}")


def choose_labelled(data, labels, seed):
    """Choose the labelled training images. The others count as unlabelled.

    labels  fraction of each class if < 1; number of images if >= 1; "all"; or the path of a file
            with one image name a line
    seed    int, of the random sample
    Returns int64 indices, ascending. Warns of classes without a labelled image.

    [ACPL] A fraction: for each class, "No Finding" counted as one class, this fraction of its
    images at random; the union of these. A fraction of all images could miss rare classes.
    [our choice] Rounded to the nearest number, at least one; [ACPL] there rounded down. A number:
    equally many of each class, as far as they go, as FixMatch (arXiv 2001.07685) has it;
    multi-label: one of each class, then images at random.
    """
    pool = data.train[data.known[data.train]]
    there = f"{data.name}: {len(pool)} training and {len(data.test)} test images are labelled"
    remedy = "add labels, or a column split; see README.md, Your own images"
    require(len(pool) and len(data.test), f"{there}; {remedy}")
    random, positive = np.random.RandomState(seed), data.targets[pool] == 1
    # Each class in random order. Without a positive target: "No Finding".
    classes = [random.permutation(pool[column]) for column in [*positive.T, ~positive.any(1)]]
    if labels == "all":
        chosen = pool
    elif isinstance(labels, (str, os.PathLike)):
        wanted = {line.strip() for line in read_text(labels).splitlines()} - {""}
        chosen = [index for index in pool if data.names[index] in wanted]
        other = sorted(wanted.difference(data.names[index] for index in chosen))
        text = f"--labels {labels}: no labelled training image {other[:1]!a}"
        require(wanted and not other, text)
    elif 0 < labels < 1:
        chosen = [each[: max(1, math.floor(labels * len(each) + 0.5))] for each in classes]
        chosen = np.unique(np.concatenate(chosen))
    else:
        # Sort by the place of an image in its class, then at random: first one of each class.
        place = np.full(len(data.names), len(data.names))
        for members in classes:
            place[members] = np.minimum(place[members], np.arange(len(members)))
        place = np.minimum(place[pool], 1) if data.multilabel else place[pool]
        least = (place == 0).sum()
        right = labels % 1 == 0 and least <= labels <= len(pool)
        require(right, f"--labels {labels} is not from {least} (each class once) to {len(pool)}")
        chosen = pool[np.lexsort([random.random_sample(len(pool)), place])[: int(labels)]]
    missing = np.flatnonzero(~(data.targets[chosen] == 1).any(0))
    if len(missing):
        warn(f"no labelled training image of {', '.join(data.classes[each] for each in missing)}")
    return np.sort(chosen)


def load_digits():
    """scikit-learn's digits: 1,797 grey scans, 8 x 8 pixels, 10 classes. 80 % train, stratified."""
    images, digits = datasets.load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = [f"digit{index:04d}" for index in range(len(images))]
    split = dict(test_size=0.2, stratify=digits, random_state=0)
    train, test = model_selection.train_test_split(np.arange(len(images)), **split)
    return Data("digits", images, np.eye(10)[digits], range(10), names, train, test, False)


def load_npz(path):
    """A 2D set of MedMNIST (arXiv 2110.14795): {train,val,test}_{images,labels}.

    The images of val are training images. Labels are class numbers [n, 1] or [n], or 0 and 1 [n, C]
    (multi-label); -1 is not labelled.
    """
    names = [f"{part}_{kind}" for kind in ("images", "labels") for part in ("train", "val", "test")]
    try:
        # Not with allow_pickle: object arrays could run code.
        with np.load(path) as file:
            arrays = [file[name] for name in names]
    except Exception as error:
        raise UserError(f"cannot read {', '.join(names)} of {path} ({error})") from None
    images, labels, right = arrays[:3], arrays[3:], True
    for x, y in zip(images, labels, strict=True):
        right &= x.dtype == np.uint8 and x.ndim in (3, 4) and x.shape[1:] == images[0].shape[1:]
        right &= y.dtype.kind in "iu" and y.ndim in (1, 2) and y.shape[1:] == labels[0].shape[1:]
        right &= x.shape[:1] == y.shape[:1] and x.shape[3:] in ((), (1,), (3,))
    found = [f"{name} {x.dtype} {x.shape}" for name, x in zip(names, arrays, strict=True)]
    text = f"{path}: {', '.join(found)}: not images uint8 [n, side, side] or [n, side, side, 3] and"
    require(right, f"{text} labels of integers [n, 1] or [n, C], alike in all parts")
    images, labels = np.concatenate(images), np.concatenate(labels).astype(np.int64)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    labels = labels[:, None] if labels.ndim == 1 else labels
    known, multilabel = (labels >= 0).any(1), labels.shape[1] > 1
    count = 2 if multilabel else len(np.unique(labels[known]))
    wrong = np.setdiff1d(labels, range(-1, count))[:1]
    text = f"{path}: label {wrong} is not from 0 to {count - 1}, without gaps, or -1"
    require(not len(wrong), text)
    targets = np.where(labels < 0, np.nan, labels if multilabel else labels == range(count))
    # Unlabelled images of the test part are in neither part.
    index, first_test = np.arange(len(labels)), len(arrays[0]) + len(arrays[1])
    train, test = index[:first_test], index[first_test:][known[first_test:]]
    names, classes = [f"image{row:06d}" for row in index], range(targets.shape[1])
    return Data(path.stem, images, targets, classes, names, train, test, multilabel)


def from_table(title, size, table, rows, classes, channels, multilabel):
    """Make Data of a table with a row for each image.

    rows  list of dicts of str, with the keys
          image, path  name of the image, and path of its file
          split        train, test, or blank
          group        images of one group, such as a patient, are on one side of the split
          label        a class, or several as in "Mass|Edema", or No Finding; blank: unlabelled
          or one for each class: 1, 0, or blank (not known)
    The loaders return the arguments from `table`, its path, on. None: is to be found out.
    """
    if all("label" in row for row in rows):
        labels = [{each.strip() for each in row["label"].split("|")} - {""} for row in rows]
        classes = classes or sorted(set().union(*labels) - {"No Finding"})
        wrong = [each for each in classes if each.lower() in ("nan", "na", "n/a", "none", "-1")]
        require(not wrong, f"{table}: label {wrong} is no class; leave it blank")
        targets = [[each in found if found else np.nan for each in classes] for found in labels]
    else:
        for row in rows:
            wrong = [(each, row[each]) for each in classes if row.get(each, "") not in CELLS]
            text = f"{table}: image {row['image']}, column and cell {wrong[:1]}"
            require(not wrong, f"{text}: a cell is 1, 0 or blank; class names are in column label")
        targets = [[CELLS[row.get(each, "")] for each in classes] for row in rows]
    targets = np.array(targets, np.float32)
    labelled = ~np.isnan(targets).all(1)
    text = f"{table}: only one class, or no 0; a blank is not a 0"
    require(not labelled.any() or (targets == 0).any(), text)
    if multilabel is None:
        # Multi-class: each labelled image has exactly one 1.
        multilabel = len(classes) < 2 or bool((np.nansum(targets[labelled], 1) != 1).any())
    if not multilabel:
        # One 1 and blanks: that class.
        targets[labelled] = np.nan_to_num(targets[labelled])
    # A group is on one side. Where no labelled image has a split, about a fifth of the labelled
    # groups is the test set, by a hash of their names. Unlabelled images of a test group, or with
    # the split test, are on neither side.
    sides = np.array([row.get("split", "") for row in rows], object)
    groups = np.array([row.get("group") or row["image"] for row in rows])
    wrong = {*sides} - {"train", "test", ""}
    require(not wrong, f"{table}: split {wrong} is not train, test or blank")
    if not (sides[labelled] != "").any():
        codes = [zlib.crc32(each.encode("utf-8", "surrogateescape")) for each in groups]
        sides[labelled & (np.array(codes) % 5 == 0)] = "test"
    test = (sides == "test") | np.isin(groups, groups[labelled & (sides == "test")])
    clash = groups[labelled & test & (sides == "train")]
    require(not len(clash), f"{table}: group {clash[:1]} is in train and in test")
    train, test = np.flatnonzero(~test), np.flatnonzero(test & labelled)
    names, paths = [row["image"] for row in rows], [row["path"] for row in rows]
    unique, counts = np.unique(names, return_counts=True)
    require(counts.max() == 1, f"{table}: image {unique[counts > 1][:1]} is there twice")
    images, hashes = load_images(paths, size, channels)
    return Data(title, images, targets, classes, names, train, test, multilabel, hashes)


def load_cxr14(root):
    """NIH Chest X-ray14: 14 findings, the official lists of training and test images."""
    table = root / "Data_Entry_2017_v2020.csv"
    if not table.exists():
        table = root / "Data_Entry_2017.csv"
    _, cells = read_csv(table, "Image Index", "Finding Labels")
    label_of = {row["Image Index"]: row["Finding Labels"] for row in cells}
    # JPEG copies have the same names. Of a .jpg and a .png the .png is used: it is sorted last.
    files = [*root.glob("images/*"), *root.glob("data/*"), *root.glob("images_*/images/*")]
    files = [file for file in files if file.suffix.lower() in (".jpeg", ".jpg", ".png")]
    files.sort(key=lambda file: (file.suffix.lower() == ".png", file))
    path_of, rows, classes = {file.stem: str(file) for file in files}, [], FINDINGS.split()
    for split, names in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        for name in read_text(root / names).split():
            label = label_of.get(name, "").replace("Pleural Thickening", "Pleural_Thickening")
            right = {*label.split("|")} <= {*classes, "No Finding"}
            require(right, f"{table}: {name} of {names} has the label {label!r}, not of {classes}")
            path = path_of.get(os.path.splitext(name)[0], f"{root}/images/{name}")
            rows.append(dict(image=name, path=path, split=split, label=label))
    return table, rows, classes, 1, True


def load_chexpert(root, uncertain):
    """CheXpert: 14 observations, all images of train.csv. 70 % of the patients train, 20 % test.

    [our choice] 10 % are left out, for tuning. A blank is negative.
    """
    table = max(root.glob("CheXpert-v1.0*/train.csv"), default=root / "train.csv")
    header, cells = read_csv(table, "Path")
    others = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
    classes, rows = [name for name in header if name not in others], []
    # Patients are beside the table in train/, or in "CheXpert-v1.0 batch 2 (train 1)" to 4.
    folders = table.parent.parent.glob("CheXpert-v1.0 batch*/*")
    folder_of = {folder.name: folder for folder in folders}
    for row in cells:
        # The path starts with the name of the archive; the patient comes after "train".
        name = row["Path"].partition("/")[2]
        patient, _, rest = name.partition("/")[2].partition("/")
        tenth = zlib.crc32(patient.encode()) % 10
        if tenth != 2:
            split = "test" if tenth < 2 else "train"
            unsure = dict(zeros="0", ones="1", ignore="0" if split == "test" else "")[uncertain]
            meaning = {"": "0", "-1.0": unsure, "-1": unsure}
            targets = {each: meaning.get(row[each], row[each]) for each in classes}
            path = f"{folder_of.get(patient, f'{table.parent}/train/{patient}')}/{rest}"
            rows.append(targets | dict(image=name, path=path, split=split, group=patient))
    return table, rows, classes, 1, True


def load_isic2018(root):
    """ISIC2018 task 3: photographs of skin lesions, 7 classes. 80 % of the lesions train."""
    prefix = "ISIC2018_Task3_Training_"
    table = root / f"{prefix}GroundTruth" / f"{prefix}GroundTruth.csv"
    classes = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    _, rows = read_csv(table, "image", *classes)
    groupings = next(root.rglob(f"{prefix}LesionGroupings.csv"), None)
    lesions = read_csv(groupings, "image", "lesion_id")[1] if groupings else []
    lesion_of = {row["image"]: row["lesion_id"] for row in lesions}
    for row in rows:
        row["path"] = f"{root}/{prefix}Input/{row['image']}.jpg"
        row["group"] = lesion_of.get(row["image"], "")
    alone = sum(not row["group"] for row in rows)
    if alone:
        text = f"{alone:,} images have no lesion in {prefix}LesionGroupings.csv"
        warn(f"{text}, so that a lesion can be in train and in test; add it to {root}")
    return table, rows, classes, 3, False


def load_folder(root):
    """A folder of images, at any depth, with a table labels.csv or with class folders.

    labels.csv     columns image, and label or one for each class; if wanted group and split
    class folders  train/<class>/ and test/<class>/
    All other images are unlabelled. Without a split, from_table chooses test images.
    """
    table, (files, others) = root / "labels.csv", find_images(root)
    if others:
        warn(f"{len(others):,} files and links are no images, such as {', '.join(others[:3])}")
    there = table.exists()
    header, rows = read_csv(table, "image") if there else (["label"], [])
    classes = [name for name in header if name not in ("image", "group", "split")]
    if "label" in classes:
        unread, classes = [name for name in classes if name != "label"], None
        if unread:
            warn(f"{table}: columns beside label are not read: {', '.join(unread)}")
    named = {row["image"] for row in rows}
    gone = sorted(named.difference(files))
    text = f"{table}: the folder has no image {gone[:1]!a}, of {len(gone):,} such names; upper and"
    text += " lower case and Unicode form count; names that begin with . @ or __ are left out"
    require(not gone, text)
    for name in {*files} - named:
        part, _, below = ("", "", "") if there else name.partition("/")
        label = below.split("/")[0] if part in ("train", "test") and "/" in below else ""
        rows.append(dict(image=name, label=label, split="test" if part == "test" else ""))
    rows = [row | dict(path=f"{root}/{row['image']}") for row in rows]
    rows.sort(key=lambda row: row["image"])
    return table if there else root, rows, classes, None, None


def find_images(root):
    """Names of the image files of a folder, at any depth, and of its other files.

    Left out: names that begin with a dot, @ or __ (thumbnails and the like), labels.csv, and
    views.png, which stage 1 writes. Links to folders are other files.
    """
    images, others = [], []
    for path in sorted(Path(root).rglob("*")):
        name, folder = path.relative_to(root).as_posix(), path.is_dir()
        hidden = path.name in ("labels.csv", "views.png") or re.search(r"(^|/)(\.|@|__)", name)
        if not hidden and (path.is_symlink() or not folder):
            (images if name.lower().endswith(ENDINGS) and not folder else others).append(name)
    return images, others


def read_text(path):
    """The text of a file in UTF-8. Raises UserError."""
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text in UTF-8 ({error})") from None


def read_csv(path, *wanted):
    """A table with commas: its header, and its rows as dicts. Raises UserError."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""))
    lines = [[cell.strip() for cell in line] for line in lines]
    header, *lines = [line for line in lines if any(line)] or [[]]
    missing = [name for name in wanted if name not in header]
    require(not missing, f"{path}: no column {missing} in {header}; write commas between columns")
    require(len({*header}) == len(header), f"{path}: two columns have one name: {header}")
    wrong = [line[0] for line in lines if len(line) != len(header)]
    require(not wrong, f"{path}: the row of {wrong[:1]} is longer or shorter than the header")
    return header, [dict(zip(header, line, strict=True)) for line in lines]


# ---- 9. Decoding ---------------------------------------------------------------------------------

# Of image files, in lower case.
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif")


@contextlib.contextmanager
def open_image(path):
    """Pillow's image of a file, in a with statement. Raises UserError if it cannot be used."""
    try:
        with Image.open(path) as image:
            # Pillow would clip 16 bits or keep the lowest 8. TIFF's tag 258: bits of each channel.
            deep = image.mode[0] in "IF" or re.search(";16[BLN]", str(image.tile))
            bits = np.max(getattr(image, "tag_v2", {}).get(258, 8))
            require(not deep and bits <= 8, "more than 8 bits a channel, scale them to 0 to 255")
            yield image
    except Exception as error:
        raise UserError(f"cannot read image {path} ({error}); replace it or remove it") from None


def decode(path, size, channels):
    """An image file as uint8 [channels, size, size], and the hash of the file."""
    with open_image(path) as image:
        mode, square = "L" if channels == 1 else "RGB", (size, size)
        # JPEG only: decode at 1/2, 1/4 or 1/8 of the size, at least twice ours. Much faster. The
        # sides may be fractions then; the box has them exactly.
        reduced = image.draft(None, (2 * size, 2 * size))
        if reduced:
            image = image.convert(mode).resize(square, Image.BILINEAR, reduced[1])
        upright = ImageOps.exif_transpose(image).convert(mode)
        pixels = np.stack(upright.resize(square, Image.BILINEAR).split())
        return pixels, hash_of(Path(path).read_bytes())


def hash_of(*contents):
    """A number of 64 bits for some bytes. With 32, equal ones by chance would be likely."""
    return int.from_bytes(hashlib.blake2b(b"".join(contents), digest_size=8).digest(), "little")


def load_images(paths, size, channels):
    """Decoded images, uint8 [n, channels, size, size], memory-mapped, and their hashes [n].

    They are in an .npy file in runs/decoded/, with the hashes after the array. Its name has a hash
    of path, size and time of change of each file. channels: 1, 3, or None for 1 if all are grey.
    """
    gone = [path for path in paths if not os.path.isfile(path)]
    text = f"{len(gone):,} image files are missing, such as {gone[:1]}; add them or correct"
    require(not gone, f"{text} the table (for cxr14, chexpert and isic2018: --partial)")
    stats = [(os.path.abspath(path), os.stat(path)) for path in paths]
    state = [(path, x.st_size, x.st_mtime_ns, x.st_ctime_ns) for path, x in stats]
    key = hash_of(repr([channels, *state]).encode("utf-8", "surrogateescape"))
    file = Path("runs", "decoded", f"{size}px-{key:016x}.npy")
    # Of the processes of a machine the first decodes, and the others wait.
    if not file.exists() and LOCAL_RANK == 0:
        channels = channels or max(map(channels_of, paths))
        shape, hashes = (len(paths), channels, size, size), []
        with new_file(file) as stream, ThreadPoolExecutor() as pool:
            head = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(stream, head)
            # Blocks: a stop need not wait for all that is left, and the disk may be slow.
            for start in tqdm(range(0, len(paths), 64), "decode", unit="x 64 images"):
                block = paths[start : start + 64]
                for pixels, code in pool.map(lambda path: decode(path, size, channels), block):
                    stream.write(pixels.tobytes())
                    hashes.append(code)
            stream.write(np.array(hashes, "<u8").tobytes())
    while not file.exists():
        time.sleep(1)
    try:
        images = np.load(file, mmap_mode="r")
        hashes = np.fromfile(file, "<u8", offset=images.offset + images.nbytes)
        return images, hashes.reshape(len(paths))
    except (EOFError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}); remove it") from None


def channels_of(path):
    """1 for a grey image, else 3."""
    with open_image(path) as image:
        return 1 if image.mode in ("1", "L", "LA") else 3


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
        result["accuracy"] = float(np.mean(truth == prediction))
        result["macro_sensitivity"] = float(np.mean(tp / (tp + fn)))
        result["macro_specificity"] = float(np.mean(tn / np.maximum(tn + fp, 1)))
        result["macro_f1"] = float(np.mean(2 * tp / (2 * tp + fp + fn)))
    return result


def report(student, teacher, data, args):
    """Evaluate both networks on the test images. Returns the dict in metrics.json.

    It is the teacher's, with the student's as "student". Test images select nothing.
    """
    out, networks = output_folder(data, args), dict(teacher=teacher, student=student)
    scores = {name: evaluate(networks[name], data, data.test, args.size) for name in networks}
    require(np.isfinite([*scores.values()]).all(), "an output is not finite; use a smaller --lr")
    results = score(data, scores)
    result = results["teacher"] | dict(student=results["student"])
    write_file(out / "metrics.json", json.dumps(result, indent=1) + "\n")
    names = [data.names[index] for index in data.test]
    write_predictions(out / "predictions.csv", data.classes, names, scores["teacher"])
    print(f"written to {out}: metrics.json, predictions.csv")
    return result


def score(data, scores):
    """Metrics of {name: scores of the test images}, as {name: metrics}. Prints them."""
    truth, results = data.targets[data.test], {}
    for name, each in scores.items():
        results[name] = classification_metrics(truth, each, data.classes, data.multilabel)
    first, *_ = columns = [*results.values()]
    rows = [(name, [each["auc"][name] for each in columns]) for name in data.classes]
    rows += [(name, [each[name] for each in columns]) for name in first if name != "auc"]
    print_row(f"AUC on {len(truth):,} test images", results)
    for name, cells in rows:
        print_row(name, ["n/a" if x is None else f"{x:.4f}" for x in cells])
    return results


def print_row(name, texts):
    """Print a row of a table."""
    print(f"{name:26}", *(f"{text:>17}" for text in texts))


def write_predictions(path, classes, names, scores):
    """A CSV file with the probabilities [n, C] of images, with all digits: six would make ties."""
    table = io.StringIO()
    rows = [[name, *map(float, row)] for name, row in zip(names, scores, strict=True)]
    csv.writer(table, lineterminator="\n").writerows([["image", *classes], *rows])
    write_file(path, table.getvalue())


def linear_probe(data, args):
    """The command evaluate: what has stage 1 learnt? A linear classifier on frozen features.

    The features are the teacher's, before its head. Returns the dict in probe.json. [our choice]
    Logistic regression on standardised features, default penalty; multi-label: one for each class.
    """
    labelled = choose_labelled(data, args.labels, args.seed)
    # "scratch" is then the network that finetune starts from.
    seed_torch(args.seed, "finetune")
    _, teacher = load_networks(args, data)
    teacher.classifier = nn.Identity()
    features = evaluate(teacher, data, labelled, args.size, classify=False)
    of_test = evaluate(teacher, data, data.test, args.size, classify=False)
    scores = np.full((len(data.test), len(data.classes)), np.nan)
    targets = data.targets[labelled]
    for column, truth in enumerate(targets.T if data.multilabel else [targets.argmax(1)]):
        there = ~np.isnan(truth)
        if len(np.unique(truth[there])) > 1:
            model = linear_model.LogisticRegression(max_iter=1000)
            model = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
            fitted = model.fit(features[there], truth[there]).predict_proba(of_test)
            columns = [column] if data.multilabel else model.classes_
            scores[:, columns] = fitted[:, 1:] if data.multilabel else fitted
    print(f"linear probe of {args.start} with {len(labelled):,} labelled images, {args.size} px")
    result = score(data, dict(probe=scores))["probe"] | dict(start=args.start)
    name = f"probe-{args.start}.json" if args.start in ("scratch", "imagenet") else "probe.json"
    write_file(output_folder(data, args) / name, json.dumps(result, indent=1) + "\n")
    return result


# What is each ingredient worth? Leave it out. {scratch}: new weights, of ImageNet where stage 1
# starts from these.
ABLATION = {
    "jcl": "pretrain",
    "moco": "pretrain --keys 1 --covariance-weight 0",
    "random + probe": "evaluate {scratch}",
    "jcl + probe": "evaluate {out}/jcl-{seed}/pretrain.pt",
    "scratch + supervised": "finetune --from {scratch} --consistency 0",
    "scratch + mean teacher": "finetune --from {scratch}",
    "moco + mean teacher": "finetune --from {out}/moco-{seed}/pretrain.pt",
    "jcl + supervised": "finetune --from {out}/jcl-{seed}/pretrain.pt --consistency 0",
    "jcl + mean teacher": "finetune --from {out}/jcl-{seed}/pretrain.pt",
}


def ablate(data, args):
    """Run the rows of ABLATION with seeds 0 to args.seeds - 1 and each number of labels.

    Each run is a command line, which is printed and can be typed, with all given options that its
    command has. A finished run is only evaluated again. A seed has the same labels in every row.
    Returns the dict in ablation.json, {labels: {row: {metric: [one a seed]}}}.
    """
    out = args.out or f"runs/{data.name}/ablation"
    # Wrong numbers raise an error before the first run.
    for labels in args.labels:
        choose_labelled(data, labels, 0)
    table = {str(labels): {} for labels in args.labels}
    scratch = "imagenet" if args.init == "imagenet" else "scratch"
    for seed in range(args.seeds):
        for row, words in ABLATION.items():
            line = [word.format(scratch=scratch, out=out, seed=seed) for word in words.split()]
            for labels in [""] if words.startswith("pretrain") else args.labels:
                folder = re.sub("[^A-Za-z0-9.]+", "-", f"{row}-{labels}-{seed}")
                more = dict(seed=seed, out=f"{out}/{folder}", labels=labels)
                result = run_line(line, args.given | more)
                if labels:
                    values_of = table[str(labels)].setdefault(row, {})
                    for metric in result.keys() - {"auc", "student", "start"}:
                        values_of.setdefault(metric, []).append(result[metric])
        write_file(Path(out, "ablation.json"), json.dumps(table, indent=1) + "\n")
    first = table[str(args.labels[0])]
    for metric in sorted(next(iter(first.values()))):
        print(f"\n{metric}, mean +- standard deviation of seeds 0 to {args.seeds - 1}")
        print_row("labels", table)
        for row in first:
            runs = [np.array(each[row][metric], float) for each in table.values()]
            print_row(row, [f"{x.mean():.4f} +- {x.std(ddof=1):.4f}" for x in runs])
    return table


def run_line(line, given):
    """Print a command line and run it, with the given options that the command has."""
    for name, value in given.items():
        option = option_of(name)
        # What the row itself says comes first.
        if name in COMMANDS[line[0]][1] and option not in line:
            if isinstance(value, bool):
                line = [*line, option if value else option.replace("--", "--no-")]
            else:
                line = [*line, option, str(value)]
    print("\n$ python s2mts2.py", shlex.join(line))
    return execute(parse_args(line))


# ---- 11. Runs and checkpoints [plumbing] ---------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix. The text is one line and says what to do."""


def require(condition, message):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def warn(text):
    """Print what is doubtful or left out."""
    if RANK == 0:
        print(f"warning: {text}", file=sys.stderr)


def start_run(data, args, images, state, labelled=()):
    """Load the checkpoint of an earlier run with these settings, or remove its results.

    images  number of images in a step
    state   dict of the modules, the optimizer and tensors to save and to load
    Returns the generator run_epochs. Raises UserError if the checkpoint has other settings.
    """
    stage, folder = args.command, output_folder(data, args)
    path, history = folder / f"{stage}.pt", []
    # Plain values, whatever a notebook gave: numbers of numpy, or paths.
    plain = json.loads(json.dumps(vars(args), default=lambda x: getattr(x, "tolist", x.__str__)()))
    values = plain | plain["augment"]
    settings = {option_of(x): values[x] for x in (*CXR14, "seed", "amp") if x in values}
    # What else the result depends on. Labels and test images are no part of stage 1.
    settings["processes"] = PROCESSES
    weights = [x for name in ("student", "teacher") for x in state[name].state_dict().values()]
    settings["first weights"] = hash_of(*(x.cpu().numpy().tobytes() for x in weights))
    settings["training images or their order"] = hash_of(data.hashes[data.train].tobytes())
    if stage == "finetune":
        for name, some in (("labelled images", labelled), ("test images", data.test)):
            settings[name] = hash_of(data.hashes[some].tobytes(), data.targets[some].tobytes())
    if path.exists() and not args.fresh:
        saved = load_checkpoint(path, stage)
        old, history = saved["settings"], saved["history"]
        differ = [x for x in settings if settings[x] != old.get(x)]
        # Names with a space are of hashes, whose values say nothing.
        differ = [x if " " in x else f"{x} {old.get(x)} there, {settings[x]} here" for x in differ]
        require(not differ, f"{path} differs, use --fresh or --out: {'; '.join(differ)}")
        for name, value in state.items():
            load = value.copy_ if isinstance(value, torch.Tensor) else value.load_state_dict
            load(saved["state"][name])
    elif RANK == 0:
        # What an earlier run of this stage wrote is of other settings.
        old = dict(pretrain=["probe.json"], finetune=["metrics.json", "predictions.csv"])
        for name in [path.name, *old[stage]]:
            (folder / name).unlink(missing_ok=True)
    if stage == "finetune":
        names = "".join(f"{data.names[index]}\n" for index in labelled)
        write_file(folder / "labelled.txt", names)
    done, device = len(history), next(state["student"].parameters()).device
    everywhere = all_gather(torch.tensor([done], device=device)).tolist()
    require(everywhere == [done] * PROCESSES, f"copy {path} to all machines")
    status = "finished" if done == args.epochs else f"epoch {done + 1} of {args.epochs}"
    print(f"{stage}, {status}, on {device}: {path}, from {args.start or args.init}")
    print(", ".join(f"{name} {settings[name]}" for name in settings if " " not in name))
    content = dict(stage=stage, args=plain, settings=settings, history=history)
    content |= dict(classes=data.classes, multilabel=data.multilabel)
    content |= dict(channels=data.images.shape[1], images=data.hashes[data.train].tolist())
    return run_epochs(path, content, images, state)


def run_epochs(path, content, images, state):
    """Yield each epoch that is left, and a list for the losses of its steps.

    content  what the checkpoint has beside the state; see start_run
    Seeds torch, so that a resumed run equals an uninterrupted one. After an epoch the checkpoint
    and the log are written. Raises UserError if the loss or a weight is not finite.
    """
    stage, history, epochs = content["stage"], content["history"], content["args"]["epochs"]
    log = path.with_name("log.jsonl")

    def write_log():
        """The other stage's lines, and this one's, so that they fit the checkpoint."""
        lines = read_text(log).splitlines() if log.exists() else []
        others = [line for line in lines if f'"stage": "{stage}"' not in line]
        write_file(log, "".join(f"{line}\n" for line in [*others, *map(json.dumps, history)]))

    write_log()
    for epoch in range(len(history), epochs):
        seed_torch(content["args"]["seed"], stage, epoch, RANK)
        losses, began = [], time.perf_counter()
        yield epoch, losses
        seconds = time.perf_counter() - began
        loss = all_gather(torch.stack(losses).mean()[None]).mean().item()
        # The sum of squares: weights that are finite but huge give outputs that are not.
        squares = [weight.square().sum() for weight in state["student"].parameters()]
        finite = math.isfinite(loss) and torch.stack(squares).isfinite().all()
        require(finite, f"{stage}: the loss or a weight is not finite; use a smaller --lr")
        lr, speed = state["optimizer"].param_groups[0]["lr"], len(losses) * images / seconds
        line = dict(stage=stage, epoch=epoch, loss=loss, lr=lr, seconds=seconds)
        history.append(line | dict(images_per_second=speed))
        left = tqdm.format_interval(seconds * (epochs - epoch - 1))
        now = f"{stage} epoch {epoch + 1}/{epochs}: loss {loss:.4f}, learning rate {lr:.2g}"
        print(f"{now}, {speed:.0f} images/s, {left} left")
        content["state"], stream = {}, io.BytesIO()
        for name, value in state.items():
            tensor = isinstance(value, torch.Tensor)
            content["state"][name] = value if tensor else value.state_dict()
        torch.save(content, stream)
        write_file(path, stream.getvalue())
        write_log()


def seed_torch(*parts):
    """Seed torch's generator with a hash of the parts."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))


def save_views(data, args):
    """views.png: a row for each of 8 training images, one query view and M key views."""
    seed_torch(args.seed, "views")
    images = torch.from_numpy(data.images[data.train[:8]]).repeat_interleave(1 + args.keys, 0)
    views, stream = random_views(images, args.augment, args.size), io.BytesIO()
    views = F.interpolate(views, scale_factor=math.ceil(96 / args.size))
    torchvision.utils.save_image(views, stream, "png", nrow=1 + args.keys, normalize=True)
    write_file(output_folder(data, args) / "views.png", stream.getvalue())


def output_folder(data, args):
    """Path of the folder for results."""
    return Path(args.out or f"runs/{data.name}")


@contextlib.contextmanager
def new_file(path):
    """A stream for a file, which replaces an old one when all is written. Raises UserError."""
    # Two processes may write the same file.
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path, content):
    """Write bytes, or text in UTF-8. Only the first process does."""
    if RANK == 0:
        text = isinstance(content, str)
        with new_file(path) as stream:
            stream.write(content.encode("utf-8", "surrogateescape") if text else content)


def load_checkpoint(path, stage):
    """The checkpoint of a stage, on the CPU. Raises UserError if it is not one."""
    try:
        # weights_only admits tensors and plain values. Other pickles could run code.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        # An older s2mts2.py had other names of settings.
        there, _ = saved["stage"], saved["settings"]["--seed"]
    except Exception:
        raise UserError(f"cannot read checkpoint {path}; run its stage, with --fresh") from None
    require(there == stage, f"{path} is a checkpoint of {there}, not of {stage}")
    return saved


# ---- 12. Devices and processes [plumbing] --------------------------------------------------------

# torchrun starts this program once for each GPU. Each process holds the same networks and the same
# queue, and takes its part of each batch. Without torchrun the first three functions do nothing.
RANK, LOCAL_RANK, PROCESSES = 0, 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, LOCAL_RANK, PROCESSES = (int(os.environ[x]) for x in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def synchronise(network):
    """BatchNorm with the statistics of all processes, on GPUs: PyTorch has it for them only."""
    common = distributed.is_initialized() and next(network.parameters()).is_cuda
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if common else network


def average_gradients(network):
    """The network, whose gradients become means over all processes."""
    parallel = nn.parallel.DistributedDataParallel
    return parallel(network) if distributed.is_initialized() else network


def all_gather(tensor):
    """The tensors [N, ...] of all processes, one after another."""
    if not distributed.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(PROCESSES)]
    distributed.all_gather(parts, tensor)
    return torch.cat(parts)


def choose_device(name):
    """The torch.device for auto, cpu, cuda, cuda:1 or mps. Raises UserError if it is not there."""
    # Each process of torchrun has its own GPU.
    cuda = f"cuda:{LOCAL_RANK}"
    name = dict(auto=cuda if torch.cuda.is_available() else "cpu", cuda=cuda).get(name, name)
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except Exception as error:
        raise UserError(f"--device {name} is not there ({error})") from None
    return device


def mixed_precision(device, amp):
    """A context in which networks compute in bfloat16, on GPUs that have it and if amp is set."""
    amp = amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


# ---- 13. Command line [plumbing] -----------------------------------------------------------------

# Options that are not in the table of settings: default, meaning.
OPTIONS = dict(
    data=("digits", "digits, cxr14, chexpert, isic2018, a folder or FILE.npz [digits or --from's]"),
    root=(None, "folder of cxr14, chexpert or isic2018 [data/NAME]"),
    partial=(False, "use only the image files that are there"),
    uncertain=("zeros", "-1 of CheXpert [zeros]"),
    recipe=(None, "settings [those of the data; small for others]"),
    out=(None, "folder [runs/NAME, or that of the checkpoint]; predict: file [predicted.csv]"),
    fresh=(False, "start over: remove the results of this stage"),
    device=("auto", "auto, cpu, cuda, cuda:1 or mps [auto: cuda, else cpu]"),
    amp=(True, "bfloat16 on GPUs [on]"),
    seed=(0, "of all random numbers, not of the split [0]"),
    start=(None, "checkpoint; for stage 2 and probe also scratch, imagenet [newest in runs/*/]"),
    files=(None, "folders or image files"),
    seeds=(3, "runs of each row [3]"),
)
COMMON = ["data", "root", "partial", "uncertain", "recipe", "out", "device"]
STAGE_1 = [name for name, (value, _, _) in CXR14.items() if value is not None]
STAGE_2 = [name for name, (_, value, _) in CXR14.items() if value is not None]
# What a command is for, and the options that it reads.
COMMANDS = dict(
    pretrain=("stage 1, without labels", [*COMMON, "seed", "fresh", "amp", *STAGE_1]),
    finetune=("stage 2, with a few labels", [*COMMON, "seed", "fresh", "amp", "start", *STAGE_2]),
    evaluate=("linear probe of stage 1", ["start", *COMMON, "seed", "arch", "size", "labels"]),
    predict=("write probabilities for new images", ["files", "start", "out", "device"]),
    ablate=("what is each ingredient worth", ["seeds", *COMMON, "fresh", "amp", *CXR14]),
)
# fmt: off
CHOICES = dict(
    arch=("densenet121", "tiny"), init=("imagenet", "random"), schedule=("cosine", "steps"),
    uncertain=("zeros", "ones", "ignore"), recipe=tuple(RECIPES))
# Least and largest value, where another would give a wrong result. All numbers are 0 or more.
LIMITS = dict.fromkeys([name for name in CXR14 if name.endswith("_p")], (0, 1)) | dict(
    jitter=(0, 1), hue=(0, 1), crop=(0, .99), centre=(0, .99), teacher_momentum=(0, 1),
    beta1=(0, .9999), beta2=(0, .9999), temperature=(1e-3, 1e9), ramp=(1e-3, 1e9),
    epochs=(1, 1e9), batch=(2, 1e9), size=(16, 1e9), keys=(1, 1e9), queue=(1, 1e9), dim=(1, 1e9),
    seeds=(2, 1e9), seed=(0, 2**32 - 1))
# fmt: on
# How many values, if not one.
NARGS = {("predict", "files"): "+", ("evaluate", "start"): "?", ("ablate", "labels"): "+"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, one line each."""

    def error(self, message):
        """Raise UserError. Called by argparse."""
        raise UserError(f"{message}; see python {self.prog} --help")


def file_or_number(text):
    """A type for argparse: "all", a file, a fraction below 1, or a number of images."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        if text == "all" or os.path.isfile(text):
            return text
        raise argparse.ArgumentTypeError(f"{text} is not a number, all, or a file") from None


def option_of(name):
    """The option of a setting, such as --weight-decay."""
    special = dict(start="--from", lambda_="--covariance-weight")
    return special.get(name, "--" + name.replace("_", "-"))


def parse_args(argv=None):
    """Parse a command line, sys.argv[1:] if None. Returns a Namespace. Raises UserError."""
    parser = Parser("s2mts2.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (purpose, names) in COMMANDS.items():
        about = f"{purpose}. In brackets the default; of settings, that of the recipe cxr14."
        sub = commands.add_parser(command, help=purpose, description=about, allow_abbrev=False)
        for name in names:
            *values, text = OPTIONS.get(name) or CXR14[name]
            # Stage 1 and stage 2, or one default.
            value = values[-1] if command == "finetune" or values[0] is None else values[0]
            text += f" [{value}]" if name in CXR14 else ""
            look = dict(dest=name, help=text.replace("%", "%%"), default=argparse.SUPPRESS)
            if isinstance(value, bool):
                look["action"] = argparse.BooleanOptionalAction
            else:
                kind = str if value is None else type(value)
                look["type"] = file_or_number if name == "labels" else kind
                look |= dict(choices=CHOICES.get(name), nargs=NARGS.get((command, name)))
            positional = command in ("predict", "evaluate") and name == names[0]
            sub.add_argument(*[] if positional else [option_of(name)], **look)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, (int, float)):
            least, largest = LIMITS.get(name, (0, 1e9))
            require(least <= value <= largest, f"{option_of(name)} {value} is out of range")
    return settings_of(given.pop("command"), given)


def settings_of(command, given):
    """All settings of a command: from table, recipe, stage 1 or given; the later ones win."""
    names, stage = COMMANDS[command][1], "finetune" if command == "finetune" else "pretrain"
    alone = PROCESSES == 1 or command in ("pretrain", "finetune")
    require(alone, f"{command} runs in one process, without torchrun")
    values = dict(start=None) | {name: OPTIONS[name][0] for name in names if name in OPTIONS}
    values |= taken_over(command, given) if "start" in names else {}
    values |= given | dict(command=command, given=given)
    if command == "predict":
        return argparse.Namespace(**values)
    known = values["data"] in KNOWN
    values["recipe"] = recipe = values["recipe"] or (values["data"] if known else "small")
    table = {name: row[stage == "finetune"] for name, row in CXR14.items()}
    table |= RECIPES[recipe][stage]
    if command in ("evaluate", "ablate"):
        labels = RECIPES[recipe]["finetune"].get("labels", CXR14["labels"][1])
        table["labels"] = [labels] if command == "ablate" else labels
    values = {name: value for name, value in table.items() if value is not None} | values
    tiny, size = values["arch"] == "tiny", values["size"]
    if tiny and "init" in values and "init" not in given:
        values["init"] = "random"
    imagenet = "imagenet" in (values.get("init"), values["start"])
    require(not (tiny and imagenet), "tiny has no ImageNet weights; use --arch densenet121")
    require(tiny or size >= 32, "densenet121 needs --size 32 or more")
    require(3 * values["blur"] <= size - 1, "--blur must be below a third of --size")
    require(values["batch"] % PROCESSES == 0, f"--batch is no multiple of {PROCESSES} processes")
    files = known and values["data"] != "digits"
    for name in ("root", "partial", "uncertain"):
        require(files or name not in given, f"--{name} is for cxr14, chexpert and isic2018")
    # Absolute, so that a checkpoint has its data from any folder.
    if files:
        values["root"] = os.path.abspath(values["root"] or f"data/{values['data']}")
    elif not known:
        values["data"] = os.path.abspath(values["data"])
    values["augment"] = {name: values.pop(name) for name in PLAIN}
    return argparse.Namespace(**values)


def taken_over(command, given):
    """The start of a command, a given one or the newest checkpoint, and settings stored in it."""
    start, stage = given.get("start"), "finetune" if command == "predict" else "pretrain"
    if start is None:
        remedy = "name a checkpoint" + ("" if command == "predict" else ", scratch or imagenet")
        require("data" not in given, f"{command} with --data has no start; {remedy}")
        found = sorted(Path("runs").glob(f"*/{stage}.pt"), key=os.path.getmtime)
        require(found, f"no {stage}.pt in runs/*/; first run python s2mts2.py {stage}, or {remedy}")
        start = str(found[-1])
        print(f"starts from {start}")
    if command != "predict" and start in ("scratch", "imagenet"):
        return dict(start=start)
    checkpoint = load_checkpoint(start, stage)
    saved = checkpoint["args"]
    if len(checkpoint["history"]) < saved["epochs"]:
        warn(f"{start} is not finished")
    values = dict(start=start, arch=saved["arch"])
    if command != "predict" and "data" not in given:
        size = ["size"] if "size" in saved["given"] else []
        names = ["data", "root", "partial", "uncertain", "recipe", *size]
        values |= {name: saved[name] for name in names}
        print(f"data of {start}: {saved['root'] or saved['data']}")
        # Results stand beside stage 1, but never outside the present folder.
        folder = Path(os.path.abspath(start)).parent
        if folder.is_relative_to(Path.cwd()):
            values["out"] = os.path.relpath(folder)
    return values


def predict(args):
    """Write the teacher's probabilities for image files to the CSV file args.out.

    Raises UserError at the end if files were skipped, which are named; the others are in the file.
    """
    saved, out = load_checkpoint(args.start, "finetune"), args.out or "predicted.csv"
    channels, classes, size = saved["channels"], saved["classes"], saved["args"]["size"]
    teacher = build_network(args.arch, channels, len(classes))
    teacher.load_state_dict(saved["state"]["teacher"])
    teacher.to(choose_device(args.device))
    require(not os.path.isdir(out), f"--out {out} is a folder; name a CSV file")
    paths, skipped, scores = [], [], {}
    for item in args.files:
        images, others = find_images(item) if os.path.isdir(item) else (None, [])
        paths += [item] if images is None else [os.path.join(item, name) for name in images]
        skipped += [os.path.join(item, name) for name in others]
    # A table of an earlier run is no file that was skipped.
    skipped = [path for path in skipped if os.path.abspath(path) != os.path.abspath(out)]
    require(paths, f"{args.files[0]} has no images ({' '.join(ENDINGS)})")
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(paths), 64), "predict", unit="x 64 images"):
            block = paths[start : start + 64]
            decoded = {path: pool.submit(decode, path, size, channels) for path in block}
            skipped += [str(each.exception()) for each in decoded.values() if each.exception()]
            images = {x: each.result()[0] for x, each in decoded.items() if not each.exception()}
            if images:
                batch = torch.from_numpy(np.stack([*images.values()]))
                outputs = predict_batch(teacher, batch, size)
                scores |= zip(images, probabilities(outputs, saved["multilabel"]), strict=True)
    write_predictions(Path(out), classes, scores, scores.values())
    print(f"written to {out}: {len(scores):,} images, with {args.start}")
    for line in sorted(skipped):
        warn(f"skipped: {line}")
    require(not skipped, f"{len(skipped):,} files were skipped, named above")


def execute(args):
    """Run the command of args. Returns its result."""
    if args.command == "predict":
        return predict(args)
    commands = dict(pretrain=pretrain, finetune=finetune, evaluate=linear_probe, ablate=ablate)
    data = load_data(args.data, args.root, args.size, args.uncertain, args.partial)
    return commands[args.command](data, args)


def main(argv=None):
    """Run a command. Returns its exit status: 0, 2 if the user can fix it, 130 on Ctrl-C."""
    status, text = 0, ""
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else io.StringIO()):
            if PROCESSES > 1:
                # First of all, so that an error of one machine ends the others too.
                gpu = torch.cuda.is_available()
                distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
            args = parse_args(argv)
            # TF32 on GPUs: faster, and exact enough for training and evaluation.
            torch.set_float32_matmul_precision("high")
            # Linux: keep freed memory for the next step. It saves filling new memory with zeros.
            # -3: M_MMAP_THRESHOLD, older versions refuse more than 32 MB. -1: M_TRIM_THRESHOLD.
            with contextlib.suppress(AttributeError, TypeError):
                mallopt = ctypes.CDLL(None).mallopt
                mallopt(-3, 2**27) or mallopt(-3, 2**25)
                mallopt(-1, -1)
            execute(args)
    except KeyboardInterrupt:
        text = "stopped; to resume a stage, run the same command without --fresh"
        status, text = 130, text if RANK == 0 else ""
    except (UserError, OSError, csv.Error) as error:
        status, text = 2, "error: " + " ".join(str(error).split())
    except (MemoryError, torch.OutOfMemoryError):
        status, text = 2, "error: out of memory; use a smaller --batch or --size"
    if text and RANK:
        # Most errors are of all processes. The first one prints, and torchrun ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if text:
        print(text, file=sys.stderr)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    # A terminal that cannot show a letter of a name shows a question mark.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")
    # What ends a job on a cluster is as Ctrl-C: no half file stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
