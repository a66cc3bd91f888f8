"""Losses and metrics against NumPy, how they add up, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import tasks
from msjax.tasks import count_correct

RNG = np.random.default_rng(0)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def metrics_in_batches(task, outputs, labels, cuts):
    """The metrics of batches of unequal sizes, added up."""
    total = None
    for o, y in zip(np.split(outputs, cuts), np.split(labels, cuts), strict=True):
        sums = jax.jit(task.sums)(jnp.asarray(o), jnp.asarray(y))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return task.finish(total)


def losses(task, outputs, labels, *, train=True):
    return np.asarray(task.losses(jnp.asarray(outputs), jnp.asarray(labels), train=train))


def test_classification():
    logits, y = RNG.normal(size=(20, 7)).astype(np.float32), RNG.integers(0, 7, 20).astype(np.int32)
    task = tasks.classification()
    np.testing.assert_allclose(losses(task, logits, y), -np.log(softmax(logits))[np.arange(20), y], rtol=1e-5)
    ranks = (logits > logits[np.arange(20), y][:, None]).sum(1)
    found = metrics_in_batches(task, logits, y, [3, 10])
    assert found == {"top1_percent": 100 * (ranks < 1).mean(), "top5_percent": 100 * (ranks < 5).mean()}


def test_label_smoothing_is_cross_entropy_against_the_smoothed_target_in_training_alone():
    logits, y = RNG.normal(size=(5, 4)).astype(np.float32), np.int32([0, 3, 1, 1, 2])
    target = 0.8 * np.eye(4)[y] + 0.2 / 4
    task = tasks.classification(label_smoothing=0.2)
    np.testing.assert_allclose(losses(task, logits, y), -(target * np.log(softmax(logits))).sum(1), rtol=1e-5)
    plain = losses(tasks.classification(), logits, y)
    np.testing.assert_array_equal(losses(task, logits, y, train=False), plain)
    with pytest.raises(ValueError, match=r"label_smoothing must be a number in \[0, 1\), got 1"):
        tasks.classification(label_smoothing=1.0)


def test_count_correct_ranks_ties_by_class_and_rejects_nan():
    logits = jnp.array([[1.0, 3, 2, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [jnp.nan] * 7])
    labels = jnp.array([1, 1, 5, 0])
    # Row 0 is right; row 1 comes second of two equals; row 2 comes sixth of seven equals; row 3 counts as wrong.
    assert (int(tasks.count_correct(logits, labels, 1)), int(tasks.count_correct(logits, labels, 5))) == (1, 2)


def test_multi_label():
    logits, y = RNG.normal(size=(9, 5)).astype(np.float32), RNG.integers(0, 2, (9, 5)).astype(np.int32)
    task = tasks.multi_label()
    p = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(losses(task, logits, y), -np.log(np.where(y, p, 1 - p)).mean(1), rtol=1e-4)
    right = (logits > 0) == y
    found = metrics_in_batches(task, logits, y, [4])
    assert found["accuracy_percent"] == pytest.approx(100 * right.mean())
    assert found["exact_percent"] == pytest.approx(100 * right.all(1).mean())
    y[0, 0] = -1  # of data that nobody has checked before
    assert np.isnan(losses(task, logits, y)).tolist() == [True] + [False] * 8


@pytest.mark.parametrize("shape", [(9,), (9, 3)])
def test_regression(shape):
    y = RNG.normal(size=shape).astype(np.float32)
    outputs = RNG.normal(size=(*shape, 1) if len(shape) == 1 else shape).astype(np.float32)
    task, error = tasks.regression(), outputs.reshape(9, -1) - y.reshape(9, -1)
    np.testing.assert_allclose(losses(task, outputs, y), (error**2).mean(1), rtol=1e-5)
    found = metrics_in_batches(task, outputs, y, [2, 4])
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert found["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)


def test_segmentation_counts_the_whole_set_and_not_what_is_ignored():
    logits, y = RNG.normal(size=(6, 4, 4, 3)).astype(np.float32), RNG.integers(0, 3, (6, 4, 4)).astype(np.int32)
    y[0, 0, :] = 255
    task = tasks.segmentation(3, ignore=255)
    valid, safe = y != 255, np.where(y == 255, 0, y)
    nats = -np.log(np.take_along_axis(softmax(logits), safe[..., None], -1))[..., 0]
    expected = [(nats[i] * valid[i]).sum() / valid[i].sum() for i in range(6)]
    np.testing.assert_allclose(losses(task, logits, y), expected, rtol=1e-5)
    guess = logits.argmax(-1)
    of_class = [((guess == c) & valid, (y == c) & valid) for c in range(3)]
    iou = np.mean([(g & t).sum() / (g | t).sum() for g, t in of_class])
    found = metrics_in_batches(task, logits, y, [1, 4])
    assert found["mean_iou_percent"] == pytest.approx(100 * iou)
    assert found["pixel_accuracy_percent"] == pytest.approx(100 * (guess == y)[valid].mean())
    dice = np.mean([2 * (g & t).sum() / (g.sum() + t.sum()) for g, t in of_class])
    assert found["mean_dice_percent"] == pytest.approx(100 * dice)
    # A class that counts for nothing has no intersection over union, though pixels of others be taken for it.
    background, valid = tasks.segmentation(3, ignore=0), (y == 1) | (y == 2)
    of_class = [((guess == c) & valid, (y == c) & valid) for c in (1, 2)]
    iou = np.mean([(g & t).sum() / (g | t).sum() for g, t in of_class])
    assert ((guess == 0) & valid).any()
    kept = np.where(valid, y, 0)
    assert metrics_in_batches(background, logits, kept, [1, 4])["mean_iou_percent"] == pytest.approx(100 * iou)
    with pytest.raises(ValueError, match="outputs must have num_classes=2 values a pixel, got 3"):
        tasks.segmentation(2).sums(logits, kept)


def test_labels_of_narrow_dtypes():
    """uint8 holds neither −100, which is not 156, nor the number of 300 classes."""
    logits = RNG.normal(size=(2, 4, 300)).astype(np.float32)
    for label, task in (
        (156, tasks.next_token()),
        (100, tasks.next_token()),
        (255, tasks.segmentation(300, ignore=-1)),
    ):
        narrow, wide = (np.full((2, 4), label, dtype) for dtype in (np.uint8, np.int32))
        np.testing.assert_array_equal(losses(task, logits, narrow), losses(task, logits, wide))
        jax.tree.map(np.testing.assert_array_equal, task.sums(logits, narrow), task.sums(logits, wide))
    narrow, first = jnp.uint8([100, 250]), jnp.asarray(logits[:, 0])
    np.testing.assert_array_equal(tasks.cross_entropy(first, narrow), tasks.cross_entropy(first, narrow.astype(int)))
    assert tasks.count_correct(first, narrow, top=300) == 2


def test_next_token():
    logits, y = RNG.normal(size=(5, 6, 11)).astype(np.float32), RNG.integers(0, 11, (5, 6)).astype(np.int32)
    y[2, 3:] = -100
    task, valid = tasks.next_token(), y >= 0
    nats = -np.log(np.take_along_axis(softmax(logits), np.where(valid, y, 0)[..., None], -1))[..., 0]
    np.testing.assert_allclose(
        losses(task, logits, y), [n[v].mean() for n, v in zip(nats, valid, strict=True)], rtol=1e-5
    )
    found = metrics_in_batches(task, logits, y, [1, 3])
    assert found["perplexity"] == pytest.approx(np.exp(nats[valid].mean()), rel=1e-5)
    assert found["accuracy_percent"] == pytest.approx(100 * (logits.argmax(-1) == y)[valid].mean())


def huber(outputs, labels):
    d = jnp.abs(outputs - labels)
    return jnp.where(d < 1, d * d / 2, d - 0.5)


def test_a_task_of_ones_own():
    task = tasks.custom(huber, {"bias": lambda o, y: o - y, "worst": tasks.Metric(lambda o, y: (o > y).sum(), float)})
    o, y = jnp.arange(6.0), jnp.full(6, 2.0)
    assert (task.name, task.headline) == ("huber", "bias")
    found = metrics_in_batches(task, np.asarray(o), np.asarray(y), [2])
    assert found == {"bias": pytest.approx(0.5), "worst": 3.0}
    assert tasks.custom(huber).headline == "loss"
    with pytest.raises(TypeError, match=r"metrics must be functions by name, as \{'error': function\}, got "):
        tasks.custom(huber, [huber])
    assert hash(tasks.custom(huber)) == hash(tasks.custom(huber)) and tasks.custom(huber) == tasks.custom(huber)


LIKE = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            tasks.custom(lambda o, y: o.mean(), name="mean"),
            r"loss of task 'mean' must return one value a sample, \(2,\)",
        ),
        (tasks.custom(lambda o, y: o, name="all"), r"one value a sample, \(2,\), got \(2, 3\)"),
        (tasks.custom(lambda o, y: y, name="whole"), "loss of task 'whole' must return floating values, got int32"),
        (tasks.custom(lambda o, y: o @ y, name="product"), "task 'product' must take outputs float32.*but its loss"),
        (
            tasks.custom(lambda o, y: (o - y[:, None].repeat(2, 1)) ** 2, name="sum"),
            "task 'sum' must take .* raised (Type|Value)Err",
        ),
        (tasks.custom(lambda o, y: o[:, 0], {"a": lambda o, y: o.mean()}), r"a metric must return one value a sample"),
        (
            tasks.custom(lambda o, y: o[:, 0], {"a": tasks.Metric(lambda o, y: o, float)}),
            r"metric 'a' must have sums of shape \(n,\) or \(\)",
        ),
        (
            tasks.custom(lambda o, y: o[:, 0], {"a": tasks.Metric(lambda o, y: o[:, 0], float)}),
            "metric 'a' must have sums whose shape does not depend on the batch",
        ),
    ],
)
def test_what_does_not_add_up_is_refused_on_shapes_alone(task, message):
    with pytest.raises(ValueError, match=message):
        task.check(*LIKE)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (tasks.Metric(lambda o, y: o.mean(), float), r"metric 'a' must have sums that add up over batches, got"),
        (tasks.Metric(lambda o, y: o.sum(), lambda total: total[3]), "metric 'a' must make a number .* IndexError"),
        (tasks.Metric(lambda o, y: o.sum(0), lambda total: total), "metric 'a' must make a number .* TypeError"),
    ],
)
def test_metrics_that_do_not_add_up_or_finish_are_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        tasks.custom(lambda o, y: o[:, 0], {"a": metric}).check_sums(*LIKE)


def test_no_metric_is_called_loss_and_no_two_alike():
    with pytest.raises(ValueError, match="metrics must have other names than 'loss'"):
        tasks.custom(lambda o, y: o[:, 0], {"loss": lambda o, y: o[:, 0]})
    metric = tasks.mean_of(lambda o, y: o[:, 0])
    with pytest.raises(ValueError, match="metrics must have a name each, got a, b, a"):
        tasks.Task("x", lambda o, y: o[:, 0], tuple((name, metric) for name in "aba"))


def test_a_list_of_metrics_makes_a_task_that_can_be_hashed(unchecked):
    of = lambda o, y: o[:, 0]  # noqa: E731
    metric = tasks.mean_of(of)
    as_list = tasks.Task("x", of, [["a", metric]])
    assert as_list == tasks.Task("x", of, (("a", metric),)) and hash(as_list)


def test_sums_may_be_numbers_of_python():
    metric = tasks.Metric(lambda o, y: float(o.shape[0]), lambda total: float(total))
    task = tasks.custom(lambda o, y: o[:, 0], {"n": metric})
    assert task.finish(task.sums(jnp.zeros((5, 1)), jnp.zeros(5))) == {"n": 5.0}


def test_sums_of_narrow_floats_are_added_up_in_float32():
    """In bfloat16 a sum of so many would stand still at 256 times what is added."""
    metric = tasks.Metric(lambda o, y: o.sum(0), lambda total: float(total[0]))
    task, total = tasks.custom(lambda o, y: o[:, 0], {"a": metric}), 0
    for _ in range(1000):
        total += task.sums(jnp.full((50, 1), 1, jnp.bfloat16), jnp.zeros(50))["a"]
    assert task.finish({"a": total}) == {"a": 50_000.0}


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (tasks.segmentation(3, ignore=255), np.int32([[0, 1], [2, 0]])),
        (tasks.next_token(), np.int32([[0, 1], [2, 0]])),
        (tasks.regression(), np.ones((2, 2, 3), np.float32)),
        (tasks.multi_label(), np.ones((2, 2, 3), np.int32)),
    ],
)
def test_metrics_of_nothing_are_no_numbers(task, labels):
    sums = task.sums(jnp.ones((2, 2, 3)), jnp.asarray(labels))
    assert all(np.isfinite(value) for value in task.finish(sums).values())
    found = task.finish(jax.tree.map(np.zeros_like, sums))
    assert found and all(np.isnan(value) for value in found.values())


def test_places_that_are_ignored_are_nothing():
    for task, ignore in ((tasks.segmentation(3, ignore=255), 255), (tasks.next_token(), -100)):
        found = task.finish(task.sums(jnp.ones((2, 4, 3)), jnp.full((2, 4), ignore, jnp.int32)))
        assert all(np.isnan(value) for value in found.values())


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_classes_show(label):
    """Where nobody has checked them, as of data that are read as they are needed."""
    outputs = jnp.float32(RNG.normal(size=(2, 4, 3)))
    y = np.int32(RNG.integers(0, 3, (2, 4)))
    y[1, 2] = label
    for task in (tasks.segmentation(3, ignore=255), tasks.next_token(ignore=None)):
        found = task.losses(outputs, jnp.asarray(y), train=True)
        assert np.isfinite(found[0]) and np.isnan(found[1])
    assert count_correct(outputs[:, 0], jnp.int32([label, label]), top=3) == 0


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (tasks.classification(), np.int32([0, 3]), r"labels must be in 0..2 for 3 outputs, got 3 at index 1"),
        (tasks.classification(), np.int32([-1, 0]), r"got -1 at index 0"),
        (tasks.classification(), np.float32([1, 0]), "labels must be integers, the numbers of classes, got float32"),
        (tasks.multi_label(), np.int32([[0, 1, 2]]), "labels must be 0 or 1 for multi_label, got 2"),
        (tasks.multi_label(), np.int32([[0, 1]]), r"labels must have the outputs' shape \(3,\) a sample, got \(2,\)"),
        (tasks.regression(), np.float32([1, np.nan]), "labels must be finite, got nan at index 1"),
        (tasks.segmentation(3), np.int32([[0, 1], [3, 0]]), r"got 3 at index \(1, 0\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(task, labels, message):
    with pytest.raises(ValueError, match=message):
        task.check_labels(labels, jax.ShapeDtypeStruct((3,), jnp.float32))


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (2, 3, 4)])
@pytest.mark.parametrize("task", [tasks.segmentation(3), tasks.next_token()], ids=lambda task: task.name)
def test_a_label_for_every_place(task, shape):
    like = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
    with pytest.raises(ValueError, match=r"outputs' shape without its last axis, \(2, 4, 4\), got \(2, "):
        task.check(*like)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.segmentation("3"), "num_classes must be an integer of at least 1, got '3'"),
        (lambda: tasks.segmentation(2.5), r"num_classes must be an integer of at least 1, got 2\.5"),
        (lambda: tasks.segmentation(0), "num_classes must be an integer of at least 1, got 0"),
        (lambda: tasks.segmentation(3, ignore=0.5), r"ignore must be an integer, got 0\.5"),
        (lambda: tasks.next_token(ignore="pad"), "ignore must be an integer, got 'pad'"),
        (lambda: tasks.classification(label_smoothing="a"), r"label_smoothing must be a number in \[0, 1\), got 'a'"),
    ],
)
def test_options_that_are_no_numbers_are_named(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


NUMBERS, CLASSES = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "message"),
    [
        (tasks.classification(), {"a": NUMBERS}, CLASSES, r"one array for classification, got {'a': float32\[2, 3\]}"),
        (tasks.regression(), (NUMBERS, NUMBERS), NUMBERS, r"one array for regression, got \(float32\[2, 3\], float32"),
        (tasks.multi_label(), jax.ShapeDtypeStruct((2, 3), jnp.int32), NUMBERS, "must be floating for multi_label"),
        (tasks.next_token(), {"a": NUMBERS}, CLASSES, "outputs must be one array for a class a place, got {'a'"),
        (tasks.custom(lambda o, y: o["b"]), {"a": NUMBERS}, CLASSES, r"must take outputs {'a': float32\[2, 3\]} and"),
    ],
)
def test_outputs_that_do_not_fit_are_named(task, outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        task.check(outputs, labels)


def test_a_loss_that_broadcasts_over_samples_is_refused():
    outputs, labels = jax.ShapeDtypeStruct((3, 1), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    square = tasks.custom(lambda o, y: ((o - y) ** 2).mean(-1), name="square")
    with pytest.raises(
        ValueError, match=r"loss of task 'square' must give each sample its own value.*outputs\[..., 0\]"
    ):
        square.check_sums(outputs, labels)
    for task in (tasks.custom(lambda o, y: (o[..., 0] - y) ** 2), tasks.regression(), tasks.multi_label()):
        task.check_sums(outputs, labels)
        task.check(outputs, labels)
    # The other way round, and what is not the loss.
    apart, mixed = lambda o, y: (o[..., 0] - y) ** 2, lambda o, y: ((o - y) ** 2).mean(-1)
    floats = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((3, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"loss of task 'square' must give .*float32\[3, 1\] make .*labels\[..., 0\]"):
        square.check_sums(*floats)
    with pytest.raises(ValueError, match="metric 'error' must give each sample its own value"):
        tasks.custom(apart, {"error": mixed}).check_sums(outputs, labels)
    with pytest.raises(ValueError, match="test_loss of task 't' must give each sample its own value"):
        tasks.custom(apart, test_loss=mixed, name="t").check_sums(outputs, labels)


def test_the_loss_of_tests_is_checked_with_the_other():
    shapes = jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
    task = tasks.custom(lambda o, y: o.mean(-1) - y, test_loss=lambda o, y: o.mean(), name="t")
    with pytest.raises(ValueError, match=r"loss of task 't' must return one value a sample, \(3,\), got \(\)"):
        task.check(*shapes)


def test_numbers_of_numpy_can_be_written():
    metric = tasks.Metric(lambda o, y: jnp.stack([o.sum(), jnp.float32(len(y))]), lambda total: total[0] / total[1])
    found = tasks.custom(lambda o, y: o[:, 0], {"mean": metric}).finish({"mean": np.float32([3, 2])})
    assert json.dumps(found) == '{"mean": 1.5}'


def test_one_label_that_is_there_or_not():
    """Of integers (N, 1), which a data set has as (N,)."""
    task, outputs = tasks.multi_label(), jnp.float32([[2.0], [-1.0]])
    ones = [task.losses(outputs, labels, train=True) for labels in (jnp.int32([1, 1]), jnp.float32([[1], [1]]))]
    np.testing.assert_array_equal(*ones)
    found = task.sums(outputs, jnp.int32([1, 1]))["exact_percent"]
    np.testing.assert_array_equal(found, task.sums(outputs, jnp.float32([[1], [1]]))["exact_percent"])
    task.check_labels(np.int32([0, 1]), jax.ShapeDtypeStruct((1,), jnp.float32))


@pytest.mark.parametrize("loss", [None, 3])
def test_a_loss_is_a_function(unchecked, loss):
    with pytest.raises(TypeError, match="loss must be a function of outputs and labels"):
        tasks.custom(loss)
    with pytest.raises(TypeError, match="test_loss must be a function of outputs and labels, or None, got 3"):
        tasks.custom(lambda o, y: y, test_loss=3)


@pytest.mark.parametrize("divide", [lambda a, b: int(a) / int(b), lambda a, b: float(a / b)], ids=["Python", "NumPy"])
@pytest.mark.filterwarnings("error")
def test_a_metric_that_divides_by_what_labels_of_zeros_lack(divide):
    """The share of a class that is found: the check's labels have none of it, real ones have."""
    found = lambda o, y: jnp.stack([((o.argmax(-1) == 1) & (y == 1)).sum(), (y == 1).sum()])  # noqa: E731
    recall = tasks.Metric(found, lambda total: divide(*total))
    task = tasks.custom(tasks.classification().loss, {"recall": recall})
    like = jax.ShapeDtypeStruct
    task.check_sums(like((4, 2), jnp.float32), like((4,), jnp.int32))
    sums = task.sums(jnp.float32([[0, 1], [1, 0]]), jnp.int32([1, 1]))
    assert task.finish(sums) == {"recall": 0.5}
    none = task.sums(jnp.float32([[0, 1], [1, 0]]), jnp.int32([0, 0]))
    with np.errstate(all="ignore"):
        assert np.isnan(task.finish(none)["recall"])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("task", "outputs", "labels"),
    [
        (tasks.classification(), np.float32([[1, 2, 0]]), np.int32([1])),
        (tasks.multi_label(), np.float32([[1, -2, 0]]), np.int32([[1, 0, 1]])),
        (tasks.regression(), np.float32([[1]]), np.float32([0.5])),
    ],
    ids=lambda it: getattr(it, "name", ""),
)
def test_tasks_promote_no_dtypes(task, outputs, labels, x64):
    like = lambda a: jax.ShapeDtypeStruct((4, *a.shape[1:]), a.dtype)  # noqa: E731
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        task.check(like(outputs), like(labels))
        outputs, labels = jnp.asarray(outputs), jnp.asarray(labels)
        strict = task.losses(outputs, labels, train=True), task.finish(task.sums(outputs, labels))
    usual = task.losses(outputs, labels, train=True), task.finish(task.sums(outputs, labels))
    np.testing.assert_allclose(strict[0], usual[0], rtol=1e-6)
    assert strict[1] == pytest.approx(usual[1])
