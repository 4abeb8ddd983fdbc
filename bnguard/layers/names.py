"""Dotted names of modules and of their tensors."""

from __future__ import annotations

# What torch.compile and Lightning Fabric call the module that they wrap, be it the whole model or a
# part of it; it says nothing about the layer.
WRAPPED = ("_orig_mod", "_forward_module")


def without_wrappers(name: str) -> str:
    """Return a dotted name as its author wrote it, without what wrappers put in.

    >>> without_wrappers("module._orig_mod.layer1._orig_mod.bn"), without_wrappers("module")
    ('layer1.bn', '')
    """
    parts = [part for part in name.split(".") if part not in WRAPPED]
    # Only in front, where DataParallel puts it: elsewhere it may be a name of the author's.
    while parts and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)
