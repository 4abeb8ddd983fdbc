"""Dotted names of modules and of their tensors."""

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
