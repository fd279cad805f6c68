"""Models from a path or hub id, whole: weights that are missing or broken are an error, and no random numbers."""

from __future__ import annotations

import pickle
import struct
from typing import Any

from safetensors import SafetensorError


def load_whole(auto: Any, name: str, **init_kwargs: Any) -> Any:
    """`auto.from_pretrained(name, **init_kwargs)`, which draws at random whatever the files do not hold and only logs it: the
    score of a language model where a reward model was meant, or the other way round.

    Args:
        auto: an `AutoModelFor...` class.
        name: path or hub id.
        init_kwargs: of `from_pretrained`.

    Raises:
        ValueError: weights that cannot be read, do not fit the configuration, or are missing; the message names the model.
        OSError: there are no files.
    """
    try:
        model, found = auto.from_pretrained(name, output_loading_info=True, **init_kwargs)
    except (SafetensorError, pickle.UnpicklingError, struct.error) as error:
        raise ValueError(f"{name}: the weights cannot be read, the file is broken or cut off: {error}") from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ValueError(f"{name}: the weights do not have the sizes in its config.json; they belong to another model") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}, which would be random: it "
            f"was not saved as {type(model).__name__}; give a model that was"
        )
    return model
