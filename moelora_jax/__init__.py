"""Many LoRA adapters over one Mixture-of-Experts model, in one jitted program."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moelora_jax.public import *  # noqa: F403
else:
    # JAX takes seconds to import, and ``moelora --help`` needs none of it.
    def __getattr__(name):
        from importlib import import_module

        public = import_module("moelora_jax.public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module 'moelora_jax' has no attribute {name!r}")
        return getattr(public, name)

    def __dir__():
        return [*globals(), *__getattr__("__all__")]
