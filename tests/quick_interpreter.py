"""Triton's interpreter without work that it repeats or throws away: a third to a half of the time of a kernel.

Whenever one jit function calls another, it looks through all of triton.language for what it has to replace, though the
launch has replaced it already; for each number type that it looks up it makes a table of all of them; and it computes
every sum and product of integers once more in 64 bits, for an assertion that is left out where nobody debugs.
"""

from dataclasses import replace
from functools import cache
from types import FunctionType, ModuleType

from triton import language as tl
from triton.runtime import interpreter


def install() -> None:
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton's, which is left as it is
        return
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    look_up = interpreter._get_np_dtype
    look_up_once = cache(look_up)
    # Types of pointers cannot be hashed.
    interpreter._get_np_dtype = lambda dtype: (look_up_once if type(dtype) is tl.dtype else look_up)(dtype)
    patch_language, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    patched: set[ModuleType] = set()

    class LaunchScope(scope_type):
        """Of a launch, the only one that the interpreter ever restores."""

        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_once_a_launch(function: FunctionType) -> scope_type:
        modules = {each for each in (tl, tl.core) if _sees(function, each)}
        if modules and modules <= patched:
            return scope_type()
        patched.update(modules)
        return patch_language(function)

    interpreter._LangPatchScope = LaunchScope
    interpreter._patch_lang = patch_once_a_launch


@cache
def _sees(function: FunctionType, module: ModuleType) -> bool:
    return any(value is module for value in function.__globals__.values())
