"""Labels: what people say of a step beside its state, its metrics and its metadata.

Owns   what may be said: finite numbers by name, and JSON of no more than so many bytes.
Never  reads a meaning into them: rules and dashboards do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from deltackpt.errors import InvalidInputError

#: Metadata is read whenever steps are listed.
_METADATA_SIZE_MAX = 1 << 20


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics as plain floats; refuse what is no finite number."""
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(f"metrics: found {metrics!r}, expected a dict of names and numbers")
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or isinstance(value, (str, bytes)):
            raise InvalidInputError(f"metrics: found {name!r}: {value!r}, expected names and numbers")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as e:
            raise InvalidInputError(f"metrics[{name!r}]: found {value!r}, expected a number") from e
        if not math.isfinite(number):
            raise InvalidInputError(
                f"metrics[{name!r}]: found {number}, expected a finite number",
                hint="leave it out, or use metadata",
            )
        plain[name] = number
    return plain


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as plain JSON; refuse what is none."""
    if not isinstance(metadata, Mapping):
        raise InvalidInputError(f"metadata: found {metadata!r}, expected a dict")
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidInputError(
            f"metadata: is not JSON: {e}", hint="use plain values, or put it into the state"
        ) from e
    if len(text) > _METADATA_SIZE_MAX:
        raise InvalidInputError(
            f"metadata: has {len(text)} bytes, at most {_METADATA_SIZE_MAX} allowed",
            hint="put it into the state",
        )
    plain: dict[str, Any] = json.loads(text)
    return plain
