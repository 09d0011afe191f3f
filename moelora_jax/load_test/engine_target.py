"""An engine as the target of a load: apart, as it imports JAX, which a client does not need."""

from collections.abc import Callable

from moelora_jax.engine.async_engine import AsyncEngine
from moelora_jax.engine.requests import Request
from moelora_jax.errors import MoeLoraError
from moelora_jax.load_test.runner import Outcome


class EngineTarget:
    """An engine in this process.

    Args:
        engine: started.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def run(self, outcome: Outcome, clock: Callable[[], float]) -> None:
        """Submit it and read its stream."""
        planned = outcome.planned
        try:
            stream = self._engine.submit(
                Request(
                    prompt=planned.prompt,
                    adapter=planned.adapter,
                    max_new_tokens=planned.output_tokens,
                )
            )
            async for output in stream:
                if output.token >= 0:
                    outcome.token_times.append(clock())
                    outcome.num_tokens += 1
                if output.finish_reason in ("cancelled", "timeout"):
                    outcome.error = output.finish_reason
        except MoeLoraError as error:
            outcome.error = type(error).__name__
