import sys

import pytest
import torch
from helpers import DEVICES, FLOATS, backends, check, close_to_truth, refused, relative, run
from torch.nn import functional as F

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
each_backend = pytest.mark.parametrize("backend", backends("masked_cross_entropy"))


def inputs(rows, hidden, vocabulary, seed=0, labelled=0.4):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (
        torch.randn(s, generator=g).bfloat16().float()
        for s in ((rows, hidden), (vocabulary, hidden), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) > labelled] = -100
    return [x, (w * 4 / hidden**0.5).bfloat16().float(), b, labels]


def plain(x, w, b, labels):
    return F.cross_entropy(F.linear(x, w, b), labels)


def ours(x, w, b, labels):
    loss = ops.masked_cross_entropy(x, w, b, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    return loss.to(x.dtype)


@pytest.mark.parametrize("shape", [(90, 64, 517), (33, 20, 1000), (5, 7, 3), (64, 128, 4200)])
@pytest.mark.parametrize("dtype", FLOATS)
@each_backend
def test_forward_backward(backend, dtype, shape):
    check(backend, dtype, ours, plain, inputs(*shape))


@each_backend
def test_vocabulary_of_bert(backend):
    """No multiple of a block's or a thread's share; each row's losses in many parts."""
    check(backend, torch.float32, ours, plain, inputs(7, 8, 30522, labelled=1.0), fp32=2e-5)


@each_backend
def test_several_chunks(backend, monkeypatch):
    """Rows over several chunks, the weight's gradient summed over them."""
    file = sys.modules["bertfast.ops.masked_cross_entropy"]  # the function has its name
    row_chunks, sizes = file.row_chunks, []

    def chunks(rows, vocabulary, most, values):
        sizes.append([j - i for i, j in row_chunks(rows, vocabulary, 13, values)])
        return row_chunks(rows, vocabulary, 13, values)

    monkeypatch.setattr(file, "row_chunks", chunks)
    for dtype in FLOATS:
        check(backend, dtype, ours, plain, inputs(100, 24, 130))
    assert backend == "reference" or (sizes and min(len(s) for s in sizes) >= 3)


def test_chunks_bound_the_memory():
    from bertfast.ops.masked_cross_entropy import row_chunks

    for rows, vocabulary in ((5000, 30522), (1, 30522), (700, 250002), (0, 9), (513, 10)):
        chunks = row_chunks(rows, vocabulary, 512, 2**24)
        assert [r for i, j in chunks for r in range(i, j)] == list(range(rows))
        assert all(0 < j - i <= 512 and (j - i) * vocabulary <= 2**24 for i, j in chunks)


def test_many_rows_on_cpu():
    """More than one chunk and a long vocabulary, as they are in use."""
    check("cpu", torch.float32, ours, plain, inputs(1100, 16, 9000, labelled=1.0), fp32=2e-5)


@pytest.mark.parametrize("missing", [(2,), (0,), (1,), (0, 1)])
@each_backend
def test_optional_bias_and_frozen_inputs(backend, missing):
    """Nothing is computed for what needs no gradient."""
    tensors = inputs(40, 16, 60)
    if missing == (2,):
        tensors[2] = None
        return check(backend, torch.float32, ours, plain, tensors)
    truth = run(plain, [t.double() if i < 3 else t for i, t in enumerate(tensors)], torch.ones(()))
    leaves = [
        t.to(DEVICES[backend]).requires_grad_(i < 3 and i not in missing)
        for i, t in enumerate(tensors)
    ]
    with ops.backend(backend):
        ops.masked_cross_entropy(*leaves).backward()
    for i, (leaf, t) in enumerate(zip(leaves[:3], truth[1:], strict=True)):
        assert leaf.grad is None if i in missing else relative(leaf.grad, t) < 1e-5


@each_backend
def test_mixed_precision(backend):
    """bf16 and fp16 hidden beside fp32 parameters: each gradient in its own dtype."""
    for dtype in (torch.bfloat16,) if backend == "cpu" else (torch.bfloat16, torch.float16):
        x, w, b, labels = inputs(50, 32, 70)
        truth = run(plain, [x.double(), w.double(), b.double(), labels], torch.ones(()))
        leaves = [t.to(DEVICES[backend]).requires_grad_() for t in (x.to(dtype), w, b)]
        with ops.backend(backend):
            loss = ops.masked_cross_entropy(*leaves, labels.to(DEVICES[backend]))
            loss.backward()
        assert loss.dtype == torch.float32
        assert [t.grad.dtype for t in leaves] == [dtype, torch.float32, torch.float32]
        for a, t in zip([loss, *(t.grad for t in leaves)], truth, strict=True):
            assert relative(a.detach(), t) < 1e-2


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", [b for b in backends("masked_cross_entropy") if b != "cpu"])
def test_fp16_with_a_loss_scale(backend):
    """Probabilities of 1e-5 over 300 rows would vanish in fp16, were the mean taken first."""
    x, w, b, labels = inputs(300, 16, 4000, labelled=1.0)
    labels.fill_(0)
    truth = run(plain, [(x / 8).half().double(), w.double(), b.double(), labels], torch.ones(()))
    x = (x / 8).half().to(DEVICES[backend])
    w, b = (t.half().to(DEVICES[backend]).requires_grad_() for t in (w, b))
    with ops.backend(backend):
        (ops.masked_cross_entropy(x, w, b, labels.to(x.device)) * 2**13).backward()
    assert relative(w.grad.float() / 2**13, truth[2]) < 1e-2
    assert (b.grad == 0).double().mean() < 0.01


@each_backend
def test_incoming_gradient_and_double_use(backend):
    """Another factor in backward, two backward passes, no mean left in what is saved."""
    tensors = inputs(30, 16, 40)
    truth = run(plain, [t.double() if i < 3 else t for i, t in enumerate(tensors)], torch.ones(()))
    leaves = [t.to(DEVICES[backend]) for t in tensors]
    leaves[:3] = [t.requires_grad_() for t in leaves[:3]]
    with ops.backend(backend):
        loss = ops.masked_cross_entropy(*leaves)
        (loss * 3).backward(retain_graph=True)
        loss.backward()
    for leaf, t in zip(leaves[:3], truth[1:], strict=True):
        assert relative(leaf.grad, 4 * t) < 1e-5


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
@each_backend
def test_ignored_rows(backend, ignore_index):
    """Left out, or let in by `labelled_only` and worth nothing: the same. NaN in them is unseen."""
    x, w, b, labels = inputs(60, 24, 50)
    labels[labels == -100] = ignore_index
    truth = run(
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), labels, ignore_index=ignore_index),
        [t.double() for t in (x, w, b)],
        torch.ones(()),
    )
    x, w, b, labels = (t.to(DEVICES[backend]) for t in (x, w, b, labels))
    for labelled_only in (False, True):
        if not labelled_only:
            x = torch.where((labels == ignore_index)[:, None], float("nan"), x)
        else:
            x = x.nan_to_num()
        with ops.backend(backend):
            got = run(
                lambda x, w, b, only=labelled_only: ops.masked_cross_entropy(
                    x, w, b, labels, ignore_index=ignore_index, labelled_only=only
                ),
                [x, w, b],
                torch.ones((), device=x.device),
            )
        for a, t in zip(got, truth, strict=True):
            assert relative(a, t) < 1e-5


@each_backend
def test_no_label(backend):
    """0 with zero gradients, whether no row is labelled or there is none."""
    for labelled_only in (False, True):
        for rows in (6, 0):
            x, w, b, labels = inputs(rows, 8, 20, labelled=0)
            x, w, b, labels = (t.to(DEVICES[backend]) for t in (x, w, b, labels))
            leaves = [t.requires_grad_() for t in (x, w, b)]
            with ops.backend(backend):
                loss = ops.masked_cross_entropy(*leaves, labels, labelled_only=labelled_only)
                loss.backward()
            assert loss == 0
            assert all(t.grad.shape == t.shape and (t.grad == 0).all() for t in leaves)


@each_backend
def test_nan_and_large_values(backend):
    x, w, b, labels = (t.to(DEVICES[backend]) for t in inputs(20, 8, 33, labelled=1.0))
    x.requires_grad_()
    with ops.backend(backend):
        big = ops.masked_cross_entropy(x * 1e4, w, b, labels)
        close_to_truth(big, plain((x * 1e4).double(), w.double(), b.double(), labels), floor=1e-5)
        bad = x.detach().clone()
        bad[3, 2] = float("nan")
        bad.requires_grad_()
        loss = ops.masked_cross_entropy(bad, w, b, labels)
        loss.backward()
    rows = bad.grad.isnan().any(1)
    assert loss.isnan() and rows[3] and rows.sum() == 1


@pytest.mark.parametrize("shift", [100, 1e4])
@each_backend
def test_large_logits(backend, shift):
    """Loss and gradients lose no more than the logits' own rounding: as torch's."""
    x, w, b, labels = inputs(20, 8, 33, labelled=1.0)
    tensors = [x, w, b + shift, labels]
    wide = [t.double() if i < 3 else t for i, t in enumerate(tensors)]
    truth = run(plain, wide, torch.ones(()))
    peer = run(plain, tensors, torch.ones(()))
    with ops.backend(backend):
        there = [t.to(DEVICES[backend]) for t in tensors]
        got = run(ours, there, torch.ones((), device=there[0].device))
    for a, p, t in zip(got, peer, truth, strict=True):
        assert relative(a, t) <= 1e-6 + 2 * relative(p, t)


@each_backend
def test_minus_infinity_masks_a_word(backend):
    x, w, b, labels = inputs(12, 8, 33, labelled=1.0)
    b[5], labels[labels == 5] = -torch.inf, 6
    tensors = [x, w, b, labels]
    wide = [t.double() if i < 3 else t for i, t in enumerate(tensors)]
    truth = run(plain, wide, torch.ones(()))
    with ops.backend(backend):
        there = [t.to(DEVICES[backend]) for t in tensors]
        got = run(ours, there, torch.ones((), device=there[0].device))
    assert all(relative(a, t) < 1e-5 for a, t in zip(got, truth, strict=True))


@each_backend
def test_label_out_of_range(backend):
    x, w, b, labels = inputs(6, 8, 20, labelled=1.0)
    for bad in (-1, 20):
        labels[4] = bad
        there = [t.to(DEVICES[backend]) for t in (x, w, b, labels)]
        with ops.backend(backend):
            if backend in ("triton", "cuda"):  # called past the check that a CPU's tensors have
                arguments = *there, -100, 0
                kernel = ops.registry.select("masked_cross_entropy", *arguments)
                assert kernel(*arguments)[0].isnan()
            else:
                refused(
                    IndexError, f"labels run .*{bad}.*0 to 19", ops.masked_cross_entropy, *there
                )


@each_backend
def test_autocast_changes_nothing(backend):
    """The model decides an operator's dtypes; inside, fp32 stays fp32."""
    tensors = inputs(50, 32, 70)
    truth = run(plain, [t.double() if i < 3 else t for i, t in enumerate(tensors)], torch.ones(()))
    there = [t.to(DEVICES[backend]) for t in tensors]
    with ops.backend(backend), torch.autocast(DEVICES[backend], torch.bfloat16):
        got = run(ours, there, torch.ones((), device=there[0].device))
    assert all(relative(a, t) < 1e-5 for a, t in zip(got, truth, strict=True))


@each_backend
def test_views(backend):
    x, w, b, labels = (t.to(DEVICES[backend]) for t in inputs(30, 20, 40))
    misaligned = torch.zeros(40 * 20 + 1, device=w.device)[1:].view(40, 20).copy_(w)
    truth = plain(x.double(), w.double(), b.double(), labels)
    with ops.backend(backend):
        for xv, wv, lv in (
            (x.T.contiguous().T, w, labels),
            (x, w.T.contiguous().T, labels),
            (x, misaligned, torch.stack([labels, labels], 1)[:, 0]),
        ):
            close_to_truth(ops.masked_cross_entropy(xv, wv, b, lv), truth, floor=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_change_bits(dtype):
    tensors, results, before = inputs(300, 40, 1000), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with ops.backend("cpu"):
                leaves = [t.to(dtype) if i < 3 else t for i, t in enumerate(tensors)]
                results.append(run(ours, leaves, torch.ones(())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_second_derivative_is_refused():
    x, w, b, labels = inputs(6, 8, 20, labelled=1.0)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.masked_cross_entropy(x, w, b, labels), x, create_graph=True)
    refused(RuntimeError, "no second derivative", grad.sum().backward)


def test_refusals():
    x, w, b, labels = inputs(4, 6, 9)
    loss = ops.masked_cross_entropy
    refused(
        ValueError,
        r"labels has shape \[3\], expected \[rows\], where rows is 4",
        loss,
        x,
        w,
        b,
        labels[:3],
    )
    refused(TypeError, "labels has dtype torch.int32", loss, x, w, b, labels.int())
    refused(ValueError, r"expected \[rows, hidden\]", loss, x[0], w, b, labels[0])
    refused(ValueError, r"weight has shape \[6, 9\]", loss, x, w.T, b, labels)
    refused(ValueError, r"bias has shape \[5\]", loss, x, w, b[:5], labels)
    refused(TypeError, "float64", loss, x, w.double(), b, labels)


@pytest.mark.skipif("triton" not in backends("masked_cross_entropy"), reason="no Triton")
@pytest.mark.parametrize("label", [1, -100])
def test_gradient_is_zero_behind_the_vocabulary(label):
    """Products that read pairs look there."""
    from bertfast.kernels.masked_cross_entropy import _launch

    device = DEVICES["triton"]
    rows = torch.full((2, 64), float("nan"), device=device)
    logits = rows[:, :61]
    logits.copy_(torch.randn(2, 61))
    labels = torch.tensor([label, 3], device=device)
    _launch(logits, None, labels, torch.empty(2, device=device), 64, -100, True)
    assert rows.isfinite().all() and not rows[:, 61:].any()
