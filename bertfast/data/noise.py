"""Labels that may be wrong: rows that others make look like another class."""

import numpy as np

FOLDS = 4


def suspects(ids: list[list[int]], labels: list[str], most: int = 20) -> list[tuple[int, str]]:
    """Positions of rows whose tokens fit another class best, and that class, the clearest first.

    Each row is judged by a naive Bayes of the other folds (Rennie et al. 2003) on its token ids.
    most: how many to give at most.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.model_selection import KFold
    from sklearn.naive_bayes import ComplementNB

    names, y = np.unique(labels, return_inverse=True)
    if len(y) < 2 * FOLDS or len(names) < 2:
        return []
    ends = np.cumsum([0, *map(len, ids)])
    columns = np.concatenate([np.asarray(row, np.int64) for row in ids])
    counts = csr_matrix(
        (np.ones(len(columns)), columns, ends), (len(y), columns.max(initial=0) + 1)
    )
    counts.sum_duplicates()
    x = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    margin, best = np.zeros(len(y)), y.copy()
    for seen, held in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        model = ComplementNB(alpha=0.1, norm=True).fit(x[seen], y[seen])
        p = np.full((len(held), len(names)), -np.inf)
        p[:, model.classes_] = model.predict_log_proba(x[held])
        best[held] = p.argmax(1)
        known = np.isin(y[held], model.classes_)  # of another class nothing can be said
        margin[held] = np.where(known, p.max(1) - p[np.arange(len(held)), y[held]], 0)
    order = np.argsort(-margin, kind="stable")[:most]
    return [(int(i), str(names[best[i]])) for i in order if margin[i] > 0]
