"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

That torchvision cannot load its compiled operators, and then fails on import because it describes two of them to
``torch.library``, which knows no such names. Here the names are declared first. Nothing implements them:
calling one still raises. What Qwen-VL's processors take from torchvision (resizing, normalising) needs none.

`make setup-judge` copies this file into the judge's environment, where a ``.pth`` file imports it at every start
of Python, because vLLM starts several processes. So it has to cost nothing until torchvision is imported.
"""

import sys
from importlib.abc import MetaPathFinder


class DeclareNames(MetaPathFinder):
    """Finds nothing; declares torchvision's operators when somebody looks for torchvision."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


def declare() -> None:
    """Schemas of the operators that torchvision 0.28 describes on import, kept for the life of the process."""
    import torch

    global _library
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_library = None
sys.meta_path.insert(0, DeclareNames())
