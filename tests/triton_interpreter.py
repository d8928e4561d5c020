"""Triton 3.6's interpreter under NumPy >= 2.5, which no longer turns [1] arrays into scalars."""

import triton.runtime.interpreter as interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_item(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def install() -> None:
    """Makes run-time loop bounds work in the interpreter."""
    interpreter._patch_lang_tensor = _patch_tensor_with_item
