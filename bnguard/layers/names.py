"""Dotted names of modules and of their tensors, and how people read them."""

from __future__ import annotations

# Attributes in which torch.compile and Lightning Fabric keep the module that they wrap.
WRAPPED = ("_orig_mod", "_forward_module")


def without_wrappers(name: str) -> str:
    """Return a dotted name without the parts that wrappers add.

    >>> without_wrappers("module._orig_mod.layer1._orig_mod.bn"), without_wrappers("module")
    ('layer1.bn', '')
    """
    parts = [part for part in name.split(".") if part not in WRAPPED]
    # DataParallel adds it in front only: elsewhere it may be the user's own name.
    while parts and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def layer_label(name: str | None) -> str:
    """Return a layer in words; a name without letters would read as a number.

    >>> layer_label("stem.bn"), layer_label("0.1"), layer_label(""), layer_label(None)
    ('stem.bn', 'layer 0.1', 'the model itself', 'the model')
    """
    if name is None:
        return "the model"
    is_number = not any(map(str.isalpha, name))
    return (f"layer {name}" if is_number else name) if name else "the model itself"
