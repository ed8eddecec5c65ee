"""Mean cross-entropy of a linear layer's logits at the labelled rows."""

from torch.nn import functional as F


def masked_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100):
    """Cross-entropy of hidden @ weight.T + bias, the mean over rows whose label counts.

    Args:
        hidden: [rows, size]; weight: [vocabulary, size]; bias: [vocabulary].
        labels: int64 [rows], `ignore_index` where a row does not count.

    Returns: fp32 scalar; 0 where no row counts.
    """
    rows = (labels != ignore_index).nonzero().squeeze(1)
    logits = F.linear(hidden.index_select(0, rows), weight.to(hidden.dtype), bias.to(hidden.dtype))
    total = F.cross_entropy(logits.float(), labels.index_select(0, rows), reduction="sum")
    return total / max(len(rows), 1)
