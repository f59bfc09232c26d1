"""Data sets of several fields whose previews are compared with the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddiff.data.columns import FieldsDocuments


def build_previewed(component: Any, keys: Mapping[str, Any]) -> FieldsDocuments:
    """Build a data set, and assert that `preview` describes its columns."""
    config = component.Config(**keys)
    found = component.build(config, seed=0, cache=None)
    assert component.preview(config) == found.shapes
    for name, shape in component.preview(config).items():
        if shape.picture is not None:
            values = found.train.read(name, [0]).values[0]
            theirs = found.shapes[name].picture
            assert theirs is not None
            assert np.array_equal(shape.picture.pixels(values), theirs.pixels(values))
    return found
